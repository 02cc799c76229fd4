"""The stages of a job in order: sources, scores, trials, results, report.

The results of a stage are stored under keys of their inputs, so that finished work is not repeated.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pipeline.checkpoints import bundle
from pipeline.config import provenance
from pipeline.config.schema import Job, spec_hash
from pipeline.data.manifests import Selection
from pipeline.io import file_identity, storage, write_fence
from pipeline.io.threads import threaded_map
from pipeline.io.wording import plural
from pipeline.report import code_versions as origins
from pipeline.report import folds, matrix, plots, report, results, stats, subgroups, trial_folder
from pipeline.report.results import ResultRow
from pipeline.report.source_scores import PairScores, ScoreValue, SelectionScore
from pipeline.report.source_summary import SourceSummary
from pipeline.report.trial_record import TrialRecord
from pipeline.train import launch, source
from pipeline.train.experiment import technique_of
from pipeline.train.progress import Progress
from pipeline.train.row_checks import findings_from_metadata
from pipeline.transfer import (
    budget,
    fanout,
    grid,
    measured_shift,
    overlap,
    pruning,
    scoring,
    targets,
    trial,
)
from pipeline.transfer.comparison_columns import (
    diverged_trials,
    fill_best_baseline,
    fill_comparison,
    gain_over_scratch,
)
from pipeline.transfer.existing_trials import (
    provenance_of_trials,
    search_and_final_trials,
    trials_to_remake,
)
from pipeline.transfer.grid import SCRATCH, BackboneGroup, Trial
from pipeline.transfer.job_checks import (
    baseline_problems,
    budget_problems,
    compare_labels,
    comparison_notes,
    identity_notes,
    library_problems,
    repeat_problems,
    score_problems,
    search_problems,
    source_problems,
)
from pipeline.transfer.job_state import (
    JobState,
    backbone_groups,
    matching_sources,
    read_metadata,
    save_metadata,
    stored_choice,
    used_places,
    without_other_modalities,
)
from pipeline.transfer.planned_trials import (
    decide_budget,
    failed_before,
    final_trials,
    finalist_trials,
    planned_allocations,
    ranked_draws,
    search_trials,
    winning_draws,
)
from pipeline.transfer.scoring import SourceTargetPair
from pipeline.transfer.targets import TargetStage
from pipeline.transfer.trial import Shared


def check(job: Job, progress: Progress, **options: Any) -> JobState:
    """Check everything that can be checked before a run starts: data, columns, splits, storage.

    Raises:
        ValueError: The message lists all problems.
    """
    try:
        storage.check_writable(job.root)
    except storage.StorageError as error:
        raise ValueError(f"storage: {error}") from error
    # the job as it is written, and the part of it that runs (`only`)
    whole_job, job = job, job.selected()
    whole_targets = {name for name in job.targets if whole_job.taken_by(name) <= job.sources.keys()}
    job = grid.expand_folds(job)
    state = JobState(job, progress, **options, whole_targets=frozenset(whole_targets))
    state.ids_in_old_layout = trial_folder.ids_in_old_layout(job.root)
    problems: list[str] = []
    with file_identity.progress_to(progress.update):
        problems += _stage_sources(state)
        if job.only and not problems:
            state.job = job = without_other_modalities(state)
            state.sources = {name: state.sources[name] for name in job.sources}
        problems += _stage_targets(state)
    are_all_planned = not problems
    for target in state.targets.values():
        problems += _target_problems(state, target, are_all_planned)
    problems += library_problems(state)
    problems += baseline_problems(whole_job)
    problems += repeat_problems(whole_job)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    if "sources" in state.remake:
        state.sources = {name: replace(stage, remake=True) for name, stage in state.sources.items()}
    for name, target in state.targets.items():
        sources = {
            source_name: state.sources[source_name] for source_name in matching_sources(state, name)
        }
        state.targets[name] = replace(target, overlap_key=overlap.key(target, sources))
    for line in comparison_notes(whole_job):
        progress.note(line)
    _add_notes(state, identity_notes(job))
    state.key = spec_hash(
        [stage.key for stage in state.sources.values()],
        {name: [stage.key, matching_sources(state, name)] for name, stage in state.targets.items()},
        job.fanout.select,
    )
    planned_allocations(state)  # a budget that is too small is an error
    return state


def _target_problems(state: JobState, target: TargetStage, are_all_planned: bool) -> list[str]:
    """Return what is wrong with a target beside its own rows.

    Args:
        are_all_planned: Whether all sources and targets are in the state. Otherwise a target is not
            compared with its sources.
    """
    problems: list[str] = []
    if are_all_planned:
        problems += source_problems(state, target)
        label_problems, notes = compare_labels(state, target)
        problems += label_problems
        _add_notes(state, notes)
    return [
        *problems,
        *score_problems(state.job, target),
        *budget_problems(state.job, target),
        *search_problems(state.job, target),
    ]


def _stage_sources(state: JobState) -> list[str]:
    """Add the stage of each source that has no problem to the state, and return the problems."""
    problems = []
    for name in state.job.sources:
        try:
            state.sources[name] = source.plan_source(state.job, name)
        except (ValueError, storage.StorageError) as error:
            problems.append(at_place(f"sources.{name}", error))
    return problems


def _stage_targets(state: JobState) -> list[str]:
    """Add the stage of each target that has no problem to the state, and return the problems."""
    problems = []
    for name, spec in state.job.targets.items():
        try:
            state.targets[name] = targets.plan_target(state.job, name)
        except (ValueError, storage.StorageError) as error:
            name_in_file = name.removesuffix(grid.fold_suffix(spec.fold))
            problems.append(at_place(f"targets.{name_in_file}", error))
    return problems


def _add_notes(state: JobState, notes: Iterable[str]) -> None:
    """Add notes to the run's and show them, each once: folds of a target have the same ones."""
    for note in notes:
        if note not in state.notes:
            state.note(note)


def at_place(place: str, error: Exception) -> str:
    """Return an error's message after its place in the job file, unless it begins with a place."""
    text = str(error)
    return text if text.startswith(("sources.", "targets.")) else f"{place}: {text}"


# ---------------------------------------------------------------- sources and targets


def pretrain(state: JobState) -> None:
    """Pretrain each source that has no bundle yet, and collect the metadata of all."""
    pruning.record_uses(state.job.root, used_places(state), of_part=bool(state.job.only))
    for name, stage in state.sources.items():
        metadata = launch.run_source(stage, state.progress, state.verbose, state.wait)
        state.progress.on_end([stage])
        summary = SourceSummary.from_metadata(metadata)
        state.pretraining.append(summary)
        if metadata.get("cached"):
            report_done(state, name)
        else:
            values = ", ".join(f"{k} {v:.4g}" for k, v in summary.metrics.items())
            stopped = " (stopped by patience)" if summary.stopped_at else ""
            state.progress.note(
                f"{name}: {summary.steps} steps{stopped} in {summary.seconds:.0f} s; "
                f"validation {values or 'none'}; bundle {stage.bundle_uri}"
            )
        if summary.transfer:
            state.progress.note(f"{name}: {summary.transfer}")
        if summary.warning:
            state.notes.append(f"sources.{name}: {summary.warning}")
        state.notes += [
            finding.line(f"sources.{name}") for finding in findings_from_metadata(metadata)
        ]


def report_done(state: JobState, name: str) -> None:
    """Report a source that is finished already, and what has changed since it was made."""
    stage = state.sources[name]
    state.progress.note(f"{name}: done before ({stage.bundle_uri})")
    if changed := stage.changes():
        state.progress.note(
            f"warning: {name}: {origins.OTHER}: {', '.join(changed)}; it is used unchanged; "
            "--remake changed makes it again"
        )


def prepare_shared(state: JobState) -> Shared:
    """Prepare the data that the trials read: weights and decoded targets.

    Raises:
        ValueError: A source has no bundle yet, or no target could be prepared.
    """
    job = state.job
    missing = [name for name, stage in state.sources.items() if not stage.has_bundle]
    if missing:
        raise ValueError(
            f"sources {', '.join(missing)} have no bundle yet: run `pretrain` (or `run`) first"
        )
    pruning.record_uses(job.root, used_places(state), of_part=bool(job.only))
    uris = {name: stage.bundle_uri for name, stage in state.sources.items()}
    loaded = {name: targets.load_weights(uri) for name, uri in uris.items()}
    manifests = {name: manifest for name, (_, _, manifest) in loaded.items()}
    groups = grid.backbone_groups(
        {name: (manifest.arch, manifest.modality) for name, manifest in manifests.items()}
    )
    data = _prepare_targets(state, groups)
    if not data:
        raise ValueError("\n".join(_left_out(state)))
    state.streamed = [
        f"{name}|{group}" for (name, group), prepared in data.items() if not prepared.in_memory
    ]
    source_rows = rows_of_sources(state)
    validation = {
        name: splits.validation
        for name in source_rows
        if (splits := state.sources[name].splits) is not None and len(splits.validation)
    }
    return Shared(
        job=job.name,
        root=job.root,
        seed=job.seed,
        backbone_groups={group.key: group for group in groups},
        weights={name: backbone for name, (backbone, _, _) in loaded.items()},
        parents=uris,
        targets=data,
        keep_bundles=job.fanout.keep_bundles != "none",
        keep_changes_alone=job.fanout.bundle_weights == "changes",
        source_keys={name: stage.key for name, stage in state.sources.items()},
        spec_hash=spec_hash(job),
        git_sha=_git_sha(),
        heads={name: (manifests[name].objective, head) for name, (_, head, _) in loaded.items()},
        fences=write_fence.current_fences(),
        parent_weights={name: bundle.weights_sha256(uri) for name, uri in uris.items()},
        remake="trials" in state.remake,
        source_rows=source_rows,
        source_reads={name: state.sources[name].reads for name in source_rows},
        source_validation=validation,
    )


def _prepare_targets(
    state: JobState, groups: list[BackboneGroup]
) -> dict[tuple[str, str], trial.TargetData]:
    """Prepare all targets.

    A target that cannot be prepared is left out with a warning, and the others continue. Its other
    folds are left out too: a mean over them would pass for one over all rows.

    Returns:
        The data by (target, key of a backbone group).
    """
    data: dict[tuple[str, str], trial.TargetData] = {}
    for name, stage in list(state.targets.items()):
        if name not in state.targets:  # another of its folds cannot be prepared
            continue
        state.progress.update(f"{name}: reading")
        try:
            by_group = _prepare_target(state, name, groups)
        except ValueError as error:
            reason = str(error)
            if stage.name_in_job != name:
                reason = f"fold {stage.spec.fold}: {reason}"
            _leave_out(state, stage.name_in_job, reason)
        else:
            data |= {(name, group): prepared for group, prepared in by_group.items()}
    return {key: prepared for key, prepared in data.items() if key[0] in state.targets}


def _leave_out(state: JobState, name_in_job: str, reason: str) -> None:
    """Remove all folds of a target from the state, and note why."""
    for name, stage in list(state.targets.items()):
        if stage.name_in_job == name_in_job:
            state.unusable_targets[name] = reason
            del state.targets[name]
    state.notes.append(f"{name_in_job}: left out: {reason}")
    state.progress.note(f"warning: targets.{name_in_job} is left out: {reason}")


def _prepare_target(
    state: JobState, name: str, groups: list[BackboneGroup]
) -> dict[str, trial.TargetData]:
    """Prepare a target as each backbone group reads it, and add findings to the notes.

    Returns:
        The data by the key of a backbone group.

    Raises:
        ValueError: The target cannot be used.
    """
    job, target = state.job, state.targets[name]
    sources = {
        source_name: state.sources[source_name] for source_name in matching_sources(state, name)
    }
    found_overlap = overlap.find_overlap(target, sources, storage.join(job.root, "signs"))
    target = replace(target, splits=replace(target.splits, test=found_overlap.test))
    data: dict[str, trial.TargetData] = {}
    by_reading: dict[str, trial.TargetData] = {}
    for group in groups:
        if not set(group.sources) & set(sources):
            continue
        key = targets.reading_key(target, group)
        if key in by_reading:
            data[group.key] = targets.data_for_group(by_reading[key], group)
        else:
            data[group.key] = targets.prepare(target, group)
        by_reading[key] = data[group.key]
    text = f"{name}: {next(iter(data.values())).split_text}"
    if " left out: " in text:
        state.notes.append(text)
    state.progress.note(text)
    batches = job.fanout.stated_search.get("global_batch", ())
    findings = [
        *(finding for prepared in by_reading.values() for finding in prepared.findings),
        *targets.unmet_requests(target, batches),
        *targets.missing_classes(target),
    ]
    for finding in dict.fromkeys(findings):
        state.notes.append(finding.line(name))
        if finding.in_terminal:
            state.progress.note(finding.line(name))
    num_test_rows = len(state.targets[name].splits.test)
    state.num_dropped_test_rows[name] = num_test_rows - len(found_overlap.test)
    for note in found_overlap.notes:
        state.note(note)
    return data


def rows_of_sources(state: JobState) -> dict[str, tuple[Selection, dict[str, str]]]:
    """Return the training rows, with their columns, of each source that has data.

    It is empty unless a technique reads them, or a target has label fraction 0: trials are then
    chosen on validation rows of the source.
    """
    are_read = any(
        0 in target.spec.label_fractions
        or any(targets.reads_source(technique_of(component)) for component in target.techniques)
        for target in state.targets.values()
    )
    if not are_read:
        return {}
    return {
        name: (stage.splits.train, dict(stage.spec.data.columns))
        for name, stage in state.sources.items()
        if stage.splits is not None and stage.spec.data is not None
    }


def _git_sha() -> str | None:
    """Return the commit of this code, where it is in a Git checkout."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


# ---------------------------------------------------------------- scores


def score(state: JobState, shared: Shared) -> list[dict[str, Any]]:
    """Score every source for every target.

    Returns:
        A row for each pair, sorted by target, the best source first by the score that chooses
        sources (LogME where none does). It has ``target``, ``source``, ``backbone``, the value of
        each score (None where it is not defined), ``intervals`` (score to low and high) and
        ``undefined`` (score to the reason).
    """
    _compute_scores(state, shared, list(state.targets))
    select = state.job.fanout.by_score
    by = scoring.DEFAULT_SCORE if select is None else select.score
    out = []
    for (name, group), sources in _pairs(state, shared, list(state.targets)).items():
        for source_name in sources:
            scores = state.source_scores[f"{source_name}|{name}"].scores
            out.append(
                {
                    "target": name,
                    "source": source_name,
                    "backbone": shared.backbone_groups[group].label,
                    **{score: value.value for score, value in scores.items()},
                    "intervals": {
                        score: (value.low, value.high)
                        for score, value in scores.items()
                        if value.low is not None
                    },
                    "undefined": {
                        score: value.reason
                        for score, value in scores.items()
                        if value.value is None
                    },
                }
            )
    ranks = {pair: _rank(scored.scores[by]) for pair, scored in state.source_scores.items()}
    return sorted(out, key=lambda row: (row["target"], *ranks[f"{row['source']}|{row['target']}"]))


def _pairs(
    state: JobState, shared: Shared, names: Sequence[str]
) -> dict[tuple[str, str], list[str]]:
    """Return a dict from (target, key of a backbone group) to the group's sources to be scored."""
    return {
        (name, group.key): [
            source_name
            for source_name in group.sources
            if source_name in matching_sources(state, name)
        ]
        for name in names
        for group in shared.backbone_groups.values()
        if (name, group.key) in shared.targets
    }


def _compute_scores(
    state: JobState, shared: Shared, names: Sequence[str], scored: Collection[str] | None = None
) -> None:
    """Compute the scores and the shift of every source for these targets, on the workers.

    A source that cannot be scored is added to the notes, and the others continue.

    Args:
        scored: Targets that are scored; shift alone is measured for the others. None: all.
    """
    rows = {
        name: (scoring.sample(stage.splits.train), dict(stage.spec.data.columns))
        for name, stage in state.sources.items()
        if stage.splits is not None and stage.spec.data is not None
    }
    labels = {name: _class_counts(state, stage, shared) for name, stage in state.sources.items()}
    columns = {
        name: stage.spec.data.group
        for name, stage in state.sources.items()
        if name in rows and stage.spec.data is not None
    }
    counts = {
        name: measured_shift.group_count(stage.splits.train, columns.get(name))
        for name, stage in state.sources.items()
        if labels.get(name) and stage.splits is not None  # only the shift of classes needs them
    }
    pairs = [
        SourceTargetPair(
            source_name,
            group,
            name,
            rows.get(source_name),
            labels.get(source_name, {}),
            columns.get(source_name),
            counts.get(source_name),
            scored is None or name in scored,
        )
        for (name, group), sources in _pairs(state, shared, names).items()
        for source_name in sources
    ]
    all_scores = fanout.for_pairs(scoring.score_pair, pairs, shared, state.job.fanout, state.wait)
    for number, pair in enumerate(all_scores, 1):
        state.progress.update(f"scores: {number}/{len(pairs)}")
        state.source_scores[f"{pair.source}|{pair.target}"] = pair
        if pair.error:
            what = "score" if scored is None or pair.target in scored else "measured shift"
            line = f"{pair.target}: source {pair.source} has no {what} ({pair.error})"
            state.note(line, is_warning=True)


def _class_counts(state: JobState, stage: source.SourceStage, shared: Shared) -> dict[str, int]:
    """Return the number of training rows of each class of a source, {} where rows have none.

    Labels that the source's head does not know are a warning: only the shift of classes needs them.
    """
    head, _ = shared.heads.get(stage.name, (None, {}))
    if head is None or stage.splits is None or stage.spec.data is None:
        return {}
    columns = stage.spec.data.columns
    try:
        return measured_shift.class_counts_of_rows(
            stage.splits.train, columns, head.name, head.state
        )
    except ValueError as error:
        state.progress.note(f"warning: source {stage.name}: no shift of its classes ({error})")
        return {}


def _rank(score: ScoreValue) -> tuple[bool, float]:
    """Return the sort key of a score: the best first, what is not defined last."""
    if score.value is None:
        return True, 0.0
    return False, -score.value if score.higher_is_better else score.value


def _select_sources(state: JobState, shared: Shared) -> dict[str, set[str]]:
    """Select the sources of each target: all, or those with the best scores.

    Targets with a choice of sources are scored also where all of them are fanned out: the report
    then compares the scores with what fine-tuning showed. Of the others shift alone is measured.
    """
    select = state.job.fanout.by_score
    chosen = {name: set(matching_sources(state, name)) for name in state.targets}
    scored = [name for name in state.targets if select is not None or len(chosen[name]) > 1]
    _compute_scores(state, shared, list(state.targets), scored)
    if select is None:
        return chosen
    for name in scored:
        ranks: dict[str, tuple[bool, float]] = {}
        for source_name in matching_sources(state, name):
            pair = f"{source_name}|{name}"
            score = state.source_scores[pair].scores[select.score]
            ranks[source_name] = _rank(score)
            state.scores[pair] = SelectionScore(score_name=select.score, score_value=score.value)
        if all(is_undefined for is_undefined, _ in ranks.values()):
            line = f"{name}: no source has a {select.score} score, so none is left out by it"
            state.note(line, is_warning=True)
            continue
        best = sorted(ranks, key=ranks.__getitem__)
        chosen[name] = set(best[: select.top])
        if dropped := best[select.top :]:
            state.note(
                f"{name}: sources kept by {select.score}: {', '.join(sorted(chosen[name]))}; "
                f"left out: {', '.join(dropped)}"
            )
    return chosen


# ---------------------------------------------------------------- trials


def _run_trials(
    state: JobState,
    shared: Shared,
    name: str,
    trials: list[Trial],
    rerun_ids: Collection[str],
    scheduler: str | None = None,
) -> dict[str, TrialRecord]:
    """Run trials as the job says (`fanout.run`), and return the record of each by its id.

    Args:
        scheduler: In place of the job's.
    """
    spec = state.job.fanout
    if scheduler is not None:
        spec = spec.model_copy(update={"scheduler": scheduler})
    records = fanout.run(name, trials, shared, spec, state.progress, rerun_ids, state.wait)
    return {one.id: record for one, record in zip(trials, records, strict=True)}


def _run_budget(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> budget.Decision:
    """Run the rungs of every target one after the other, and decide which pairs are kept.

    A search trial that failed is not run again once pairs were kept without it: its result would
    change which pairs are kept, for this and every later target.
    """
    records = failed_before(state, groups, chosen)
    while True:
        decision = decide_budget(state, groups, chosen, records)
        if not decision.waiting:
            break
        waiting = list(decision.waiting)
        rerun_ids = trials_to_remake(state, waiting, groups)
        records |= _run_trials(state, shared, f"budget, {decision.rung}", waiting, rerun_ids)
    for note in decision.notes:
        state.note(note)
    _note_failed(state, decision.tried, records)
    return decision


def _note_failed(
    state: JobState, tried: Sequence[Trial], records: Mapping[str, TrialRecord]
) -> None:
    """Store which search trials of a budget failed, and add a note on those of each target.

    Where all trials of a target and label fraction failed, no pair was chosen by them, so they run
    again with the job.
    """
    by_target_and_fraction: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for one in tried:
        by_target_and_fraction[one.target, grid.fraction_text(one.label_fraction)].append(one)
    state.failed_in_budget = []
    for (name, fraction), trials in by_target_and_fraction.items():
        failed = [one for one in trials if records[one.id].failed]
        if not 0 < len(failed) < len(trials):
            continue
        state.failed_in_budget += [one.id for one in failed]
        named = ", ".join(f"{one.source} · {one.technique}" for one in failed)
        labels = plots.labels_text(fraction)
        state.note(
            f"{name} at {labels}: search trials of the budget failed, so these pairs were cut: "
            f"{named}. They do not run again with the job, which would then keep other pairs; "
            "another number for fanout.select.budget tries them again",
            is_warning=True,
        )


def finetune(state: JobState, shared: Shared) -> list[Trial]:
    """Search or spend the budget, and then run every entry that is left with every seed.

    Returns:
        All trials of the job.
    """
    groups = list(shared.backbone_groups.values())
    chosen = _select_sources(state, shared)
    if state.job.fanout.budget is not None:
        decision = _run_budget(state, shared, groups, chosen)
        search, final = decision.tried, final_trials(state, groups, chosen, {}, decision.cut)
    else:
        search, winners = _run_search(state, shared, groups, chosen)
        final = final_trials(state, groups, chosen, winners)
    save_metadata(state, chosen)
    _run_final(state, shared, groups, final)
    _measure_shift_of_test(state, shared)
    save_metadata(state, chosen)
    return [*search, *final]


def _run_search(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], dict[str, dict[str, float]]]:
    """Run the search, and then its best draws again with further seeds.

    Returns:
        Its trials, and a dict from each entry to its winning draw.
    """
    search, records = _run_draws(state, shared, groups, chosen)
    finalists = finalist_trials(state, groups, chosen, ranked_draws(search, records))
    if finalists:
        rerun_ids = trials_to_remake(state, finalists, groups)
        # none is stopped early: a mean over seeds needs all of them
        again = _run_trials(state, shared, "search, best again", finalists, rerun_ids, "fifo")
        records += again.values()
        search = [*search, *finalists]
    winners = winning_draws(search, records)
    for entry in sorted({one.entry for one in search} - set(winners)):
        state.note(
            f"search: no trial of {entry} ended well, so it has no winner: its final trials run "
            "with the target's own settings",
            is_warning=True,
        )
    return search, winners


def _run_draws(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], list[TrialRecord]]:
    """Run every draw once; draws that follow from earlier trials come in later generations.

    Returns:
        The trials and their records.
    """
    records: dict[str, TrialRecord] = {}
    while True:
        search = search_trials(state, groups, chosen, records)
        waiting = [one for one in search if one.id not in records]
        if not waiting:
            return search, [records[one.id] for one in search]
        rerun_ids = trials_to_remake(state, waiting, groups)
        records |= _run_trials(state, shared, "search", waiting, rerun_ids)


def _measure_shift_of_test(state: JobState, shared: Shared) -> None:
    """Measure how the test rows of each target differ from its training rows, on the workers.

    It reads their labels, so it comes after all trials. The features are those of one source: of
    the first backbone group that has any, the source with the best score, if there are scores.
    """
    pairs: dict[str, SourceTargetPair] = {}
    for (name, group), sources in _pairs(state, shared, list(state.targets)).items():
        scored = [state.source_scores.get(f"{source_name}|{name}") for source_name in sources]
        usable = [pair for pair in scored if pair is not None and not pair.error]
        if usable and name not in pairs:
            best = min(usable, key=_order_by_default_score)
            pairs[name] = SourceTargetPair(best.source, group, name)
    shifts = fanout.for_pairs(
        scoring.shift_of_test, list(pairs.values()), shared, state.job.fanout, state.wait
    )
    for pair, shift in zip(pairs.values(), shifts, strict=True):
        place = f"{pair.source}|{pair.target}"
        scores = state.source_scores[place]
        state.source_scores[place] = replace(scores, shifts=(*scores.shifts, shift))


def _order_by_default_score(pair: PairScores) -> tuple[bool, float]:
    score = pair.scores.get(scoring.DEFAULT_SCORE)
    return (True, 0.0) if score is None else _rank(score)


def _run_final(
    state: JobState, shared: Shared, groups: list[BackboneGroup], final: list[Trial]
) -> None:
    """Run the final trials: first those that are trained, then those that combine them."""
    # of both, before any of them is made again
    rerun_ids = trials_to_remake(state, final, groups)
    combined = [one for one in final if one.combines_trials]
    trained = [one for one in final if not one.combines_trials]
    for name, group in (("fine-tune", trained), ("combine", combined)):
        if group:
            _run_trials(state, shared, name, group, rerun_ids)


# ---------------------------------------------------------------- results and report


def collect_existing_rows(state: JobState) -> list[ResultRow]:
    """Return the results rows of the job as it is now, from the records of trials that have ended.

    Notes, scores and targets that were left out, as the newest run stored them, are put into
    ``state``.
    """
    if not state.targets or not all(stage.has_bundle for stage in state.sources.values()):
        return []
    metadata = read_metadata(state)
    state.notes = metadata.get("notes", [])
    state.unusable_targets = metadata.get("broken", {})
    state.scores = metadata.get("scores", {})
    state.num_dropped_test_rows = metadata.get("left_out", {})
    state.source_scores = {
        pair: PairScores.from_json(stored)
        for pair, stored in metadata.get("source_scores", {}).items()
    }
    state.targets = {
        name: stage for name, stage in state.targets.items() if name not in state.unusable_targets
    }
    groups = backbone_groups(state)
    chosen = stored_choice(state)
    if not chosen:
        chosen = {name: set(matching_sources(state, name)) for name in state.targets}
    search, final = search_and_final_trials(state, groups, chosen)
    return collect(state, [*search, *final])


def collect(state: JobState, trials: list[Trial]) -> list[ResultRow]:
    """Make results rows from the records of trials, with the gain over scratch, paired by seed.

    Names are those of the job as it is now, because a record may be older than a name.
    """
    root = state.job.root
    records = trial.read_records(root, grid.folders(trials))
    state.trial_provenance = provenance_of_trials(state, trials, backbone_groups(state))
    with_bundle = _trials_with_bundle(state, trials, records)
    finished = {
        trial_id
        for trial_id, record in records.items()
        if any(row.split == "test" for row in record.rows) and not diverged_trials(record.rows)
    }
    scratch: dict[tuple[str, str, str], list[Trial]] = defaultdict(list)
    for one in trials:
        is_scratch = one.source == SCRATCH and str(one.technique) == "scratch"
        if is_scratch and one.stage == "final" and one.id in finished:
            scratch[_scratch_key(one)].append(one)
    # a trial and its scratch trials are read once for all their metrics
    num_cached = max(8, 2 + state.job.fanout.seeds)
    predictions = lru_cache(maxsize=num_cached)(partial(trial.read_predictions, root))
    rows: list[ResultRow] = []
    for one in trials:
        if one.id not in records:
            continue
        columns = _current_columns(state, one, records[one.id])
        if one.id not in with_bundle:
            columns["bundle_uri"] = None
        scratch_trials = scratch.get(_scratch_key(one), []) if one.source != SCRATCH else []
        # a soup or a source's network has no seed: it is compared with every one, as in the report
        if len(scratch_trials) < matrix.MIN_SEEDS or grid.needs_training(one.technique):
            scratch_trials = [other for other in scratch_trials if other.seed == one.seed]
        rows_of_trial: list[ResultRow] = []
        for row in records[one.id].rows:
            row = replace(row, **columns)
            if row.split == "test" and scratch_trials:
                row = replace(row, **gain_over_scratch(predictions, row, scratch_trials, records))
                row = _with_note_on_mixed_code(state, row, one, scratch_trials)
            rows_of_trial.append(row)
        rows += [*rows_of_trial, *_by_subgroup(state, predictions, rows_of_trial, one)]
    targets_of = {one.id: one.target for one in trials}
    entries = matrix.matrix_entries(rows, _tested_runs(state, rows, targets_of))
    rows = fill_best_baseline(fill_comparison(rows, entries), entries, predictions)
    results.append(
        root,
        rows,
        current={one.id for one in trials},
        is_of_part=_part_of_table(state, trials) if state.job.only else None,
    )
    return rows


def _scratch_key(one: Trial) -> tuple[str, str, str]:
    """Return a key that a trial and the scratch trials that it is compared with share."""
    return one.backbone_key, one.target, grid.fraction_text(one.label_fraction)


def _trials_with_bundle(
    state: JobState, trials: list[Trial], records: Mapping[str, TrialRecord]
) -> set[str]:
    """Remove bundles that the job does not keep, and return the ids of trials that have one."""
    kept = set(records)
    if state.job.fanout.keep_bundles == "best":
        best: dict[str, TrialRecord] = {}
        final = [one for one in trials if one.stage == "final"]
        fanout.prune_bundles(state.job.root, final, "best", best)
        kept = {record.trial_id for record in best.values()}
    uris = {trial_id: uri for trial_id in kept if (uri := records[trial_id].rows[0].bundle_uri)}
    exist = threaded_map(bundle.exists, uris.values())  # another run may have kept fewer
    return {trial_id for trial_id, exists in zip(uris, exist, strict=True) if exists}


def _current_columns(state: JobState, one: Trial, record: TrialRecord) -> dict[str, Any]:
    """Return the columns of a trial's rows that depend on the job as it is now."""
    stage = state.targets[one.target]
    # the length of a trial within a budget is no draw of a search
    drawn = one.hyper_parameters if state.job.fanout.budget is None else {}
    columns = {
        "job": state.job.name,
        "source": one.source,
        "backbone": one.backbone,
        "target": stage.name_in_job,
        "trial_name": one.name,
        "current": True,
        "split_origin": stage.split_origin,
        "drawn": json.dumps(drawn, sort_keys=True),
        **state.scores.get(f"{one.source}|{one.target}", {}),
        "source_scores": _score_column(state, one),
        **state.trial_provenance[one.id].columns(),
    }
    if one.id in state.cut_by_budget and record.status == "done":
        columns |= {"status": "pruned", "error": state.cut_by_budget[one.id]}
    return columns


def _with_note_on_mixed_code(
    state: JobState, row: ResultRow, one: Trial, scratch_trials: Sequence[Trial]
) -> ResultRow:
    """Return a row with a note where other code or versions made a scratch trial."""
    made = state.trial_provenance[one.id].made
    mixed: list[str] = []
    for other in scratch_trials:
        mixed += provenance.differences(made, state.trial_provenance[other.id].made)
    mixed = list(dict.fromkeys(mixed))
    if not mixed:
        return row
    note = f"the gain {origins.MIXED} ({', '.join(mixed)})"
    return replace(row, interval=f"{row.interval}; {note}" if row.interval else note)


def _part_of_table(state: JobState, trials: list[Trial]) -> Callable[[ResultRow], bool]:
    """Return a test whether a row of the table is of the part of the job that ran (``only``).

    All rows of a target are, where all of its sources ran. Of other targets these are: rows of the
    sources that ran, and those without a source: scratch of the same backbones, and baselines.
    """
    pairs = {
        (stage.name_in_job, source)
        for name, stage in state.targets.items()
        for source in matching_sources(state, name)
    }
    without_source = {
        (state.targets[one.target].name_in_job, one.backbone)
        for one in trials
        if one.source == SCRATCH
    }

    def is_of_part(row: ResultRow) -> bool:
        if row.source == SCRATCH and (row.target, row.backbone) in without_source:
            return True
        return row.target in state.whole_targets or (row.target, row.source) in pairs

    return is_of_part


def _score_column(state: JobState, one: Trial) -> str | None:
    """Return the scores of a trial's source for its target, as the results table has them."""
    pair = state.source_scores.get(f"{one.source}|{one.target}")
    if pair is None or not pair.scores:
        return None
    values = {
        name: {"value": score.value, "low": score.low, "high": score.high}
        for name, score in pair.scores.items()
    }
    return json.dumps(values, sort_keys=True)


def _tested_runs(
    state: JobState, rows: list[ResultRow], targets_of: dict[str, str]
) -> dict[str, stats.RunPredictions]:
    """Return the test predictions of these rows with their subgroups, by trial id.

    Args:
        targets_of: The target of each trial, by its id.
    """
    runs = trial.read_test_predictions(state.job.root, rows)
    return {name: _with_subgroups(state, targets_of[name], run) for name, run in runs.items()}


def _by_subgroup(
    state: JobState,
    predictions: Callable[[str, int], stats.RunPredictions | None],
    rows_of_trial: list[ResultRow],
    one: Trial,
) -> list[ResultRow]:
    """Return rows of a final trial's primary metric, one for each subgroup of the test rows."""
    primary = next((row for row in rows_of_trial if row.split == "test"), None)
    if primary is None or not state.targets[one.target].spec.subgroups:
        return []
    run = predictions(one.folder, one.seed)
    if run is None:
        return []
    return subgroups.result_rows(_with_subgroups(state, one.target, run), primary)


def _with_subgroups(
    state: JobState, target: str, run: stats.RunPredictions
) -> stats.RunPredictions:
    """Return the run with the subgroups that its target names."""
    stage = state.targets.get(target)
    if stage is None or not stage.spec.subgroups:
        return run
    if target not in state.subgroups:
        state.subgroups[target] = subgroups.read(
            stage.splits.test, stage.spec.subgroups, f"targets.{target}.subgroups"
        )
    return subgroups.with_subgroups(run, stage.splits.test, state.subgroups[target])


def write_report(
    state: JobState, rows: list[ResultRow]
) -> tuple[list[matrix.MatrixEntry], tuple[str, str]]:
    """Write the report, and return the entries of the table and the report's two URIs."""
    root = state.job.root
    targets_of = {row.trial_id: f"{row.target}{grid.fold_suffix(row.fold)}" for row in rows}
    rows = results.disambiguate_targets(rows)
    runs = _tested_runs(state, rows, targets_of)
    entries = origins.mark_entries(matrix.matrix_entries(rows, runs), rows, state.trial_provenance)
    folders = {row.trial_id: row.folder for row in rows if row.trial_stage == "final"}
    curves = {name: record.curve for name, record in trial.read_records(root, folders).items()}
    if not state.pretraining:
        state.pretraining = [
            SourceSummary.from_metadata(launch.source_metadata(stage))
            for stage in state.sources.values()
            if stage.has_bundle
        ]
    notes = [*state.notes, *pruning.describe_stale(results.read(root))]
    where = report.write(
        root,
        report.ReportInputs(
            job_name=state.job.name,
            entries=entries,
            rows=rows,
            curves=curves,
            pretraining=state.pretraining,
            splits=_splits_of_targets(state),
            notes=notes,
            versions={"job": spec_hash(state.job)},
            runs=runs,
            code_notes=origins.describe_changes(state.trial_provenance),
            scores=state.scores,
            source_scores=folds.pool_scores(
                state.source_scores,
                {name: stage.name_in_job for name, stage in state.targets.items()},
            ),
            modalities={
                stage.name_in_job: stage.spec.data.modality.name for stage in state.targets.values()
            },
            left_out=[*_left_out(state), *_test_rows_left_out(state)],
        ),
    )
    return entries, where


def _splits_of_targets(state: JobState) -> dict[str, str]:
    """Return for each target of the job where its splits come from."""
    out: dict[str, str] = {}
    for stage in state.targets.values():
        count, fold = stage.spec.folds, stage.spec.fold
        folds_text = f"{count} folds, whose test rows are pooled; fold {fold}: " if count else ""
        out.setdefault(stage.name_in_job, folds_text + _describe_splits(state, stage))
    return out


def _describe_splits(state: JobState, stage: TargetStage) -> str:
    sizes = stage.splits.sizes()
    num_dropped = state.num_dropped_test_rows.get(stage.name)
    if not num_dropped:
        return sizes
    return (
        f"{sizes}; {num_dropped} of the test rows are also in a source and were left out "
        f"(drop_overlap: {stage.spec.drop_overlap})"
    )


def failures(state: JobState, rows: list[ResultRow]) -> list[str]:
    """Return a line for each target that was left out and each trial that failed."""
    return _left_out(state) + sorted(
        {f"{row.trial_name}: {row.error}" for row in rows if row.status == "failed"}
    )


def _test_rows_left_out(state: JobState) -> list[str]:
    """Return a line for each target of which test rows were left out."""
    return [
        f"{name}: {plural(count, 'test row')} also in a source (drop_overlap: "
        f"{state.targets[name].spec.drop_overlap})."
        for name, count in state.num_dropped_test_rows.items()
        if count and name in state.targets
    ]


def _left_out(state: JobState) -> list[str]:
    """Return a line for each target that could not be prepared."""
    suffixes = {name: grid.fold_suffix(target.fold) for name, target in state.job.targets.items()}
    lines = [
        f"targets.{name.removesuffix(suffixes[name])}: {reason}"
        for name, reason in state.unusable_targets.items()
    ]
    return list(dict.fromkeys(lines))
