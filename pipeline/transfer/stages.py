"""The stages of a job in order: sources, scores, trials, results, report.

The results of a stage are stored under keys of their inputs, so that finished work is not repeated.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pipeline.checkpoints import bundle, pretrained
from pipeline.config import provenance, registry
from pipeline.config.schema import Job, spec_hash
from pipeline.core.contracts import trains
from pipeline.core.contracts.objective_capabilities import names_labels
from pipeline.core.contracts.technique_capabilities import (
    LABELLED_SOURCE,
    NeedsLibrary,
    adapts_without_labels,
)
from pipeline.core.metrics.catalog import metric
from pipeline.core.specs import ObjectiveSpec
from pipeline.data.manifests import Selection
from pipeline.io import checksums, file_identity, storage, write_fence
from pipeline.io.json_values import JsonObject
from pipeline.report import code_versions as origins
from pipeline.report import folds, matrix, report, results, stats, subgroups, trial_folder
from pipeline.report.code_versions import TrialProvenance
from pipeline.report.results import ResultRow
from pipeline.report.source_scores import PairScores, ScoreValue, SelectionScore
from pipeline.report.source_summary import SourceSummary
from pipeline.report.trial_record import TrialRecord
from pipeline.train import fit_components, launch, source
from pipeline.train.experiment import technique_of
from pipeline.train.progress import Progress
from pipeline.train.row_checks import findings_from_metadata
from pipeline.transfer import (
    budget,
    fanout,
    grid,
    label_sets,
    measured_shift,
    overlap,
    proposals,
    pruning,
    scoring,
    targets,
    trial,
)
from pipeline.transfer.grid import SCRATCH, BackboneGroup, Trial
from pipeline.transfer.scoring import Pair
from pipeline.transfer.targets import TargetStage
from pipeline.transfer.trial import Shared


@dataclass
class JobState:
    """The knowledge that the stages of one command share."""

    job: Job
    progress: Progress
    verbose: bool = False
    wait: bool | None = None
    """Whether to wait for nodes that have not joined the cluster yet (`launch.cluster`)."""
    remake: tuple[str, ...] = ()
    """"sources", "trials" or both: which results are made again where other code or versions made
    them.
    """
    sources: dict[str, source.SourceStage] = field(default_factory=dict)
    targets: dict[str, TargetStage] = field(default_factory=dict)
    pretraining: list[SourceSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unusable_targets: dict[str, str] = field(default_factory=dict)
    """Targets that could not be prepared, each with the reason. The others continue without them.
    """
    scores: dict[str, SelectionScore] = field(default_factory=dict)
    """``source|target`` to the score, where sources were chosen by scores."""
    source_scores: dict[str, PairScores] = field(default_factory=dict)
    """``source|target`` to every transferability score, where they were computed."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Target to the number of its test rows that were left out because they are also in a source.
    """
    streamed: list[str] | None = None
    """``target|backbone group`` of those whose rows are not held in memory; None: not known yet."""
    whole_targets: frozenset[str] = frozenset()
    """Targets of a part of a job (``only``) that have all their sources in it, by name in the job.
    """
    ids_in_old_layout: frozenset[str] = frozenset()
    """Ids of the trials that lie where an older version laid them."""
    key: str = ""
    """Hash of everything that the metadata of a run depends on (`_save_metadata`)."""
    subgroups: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Target to the values of its test rows in each subgroup column, for targets with subgroups."""
    cut_by_budget: dict[str, str] = field(default_factory=dict)
    """Id of the last search trial of a pair that the budget cut to the reason."""
    failed_in_budget: list[str] = field(default_factory=list)
    """Ids of the search trials that failed, where a budget cut their pairs for it."""
    trial_provenance: dict[str, TrialProvenance] = field(default_factory=dict)
    """Trial id to the code and versions that made it, for the trials in the table."""


def check(job: Job, progress: Progress, **options: Any) -> JobState:
    """Check everything that can be checked before a run starts: data, columns, splits, storage.

    Raises:
        ValueError: The message lists all problems.
    """
    try:
        storage.check_writable(job.root)
    except storage.StorageError as error:
        raise ValueError(f"storage: {error}") from error
    whole, job = job, job.selected()
    are_whole = {name for name in job.targets if whole.taken_by(name) <= job.sources.keys()}
    job = grid.expand_folds(job)
    state, problems = JobState(job, progress, **options, whole_targets=frozenset(are_whole)), []
    state.ids_in_old_layout = trial_folder.ids_in_old_layout(job.root)

    def each(
        make: Callable[[Job, str], Any], names, into: dict[str, Any], place: Callable[[str], str]
    ) -> None:
        for name in names:
            try:
                into[name] = make(job, name)
            except (ValueError, storage.StorageError) as error:
                problems.append(at_place(place(name), error))

    def place_of_target(name: str) -> str:
        return f"targets.{name.removesuffix(grid.fold_suffix(job.targets[name].fold))}"

    with file_identity.progress_to(progress.update):
        each(source.stage, job.sources, state.sources, lambda name: f"sources.{name}")
        if job.only and not problems:
            state.job = job = _without_other_modalities(state)
            state.sources = {name: state.sources[name] for name in job.sources}
        each(targets.stage, job.targets, state.targets, place_of_target)
    are_read = not problems
    for target in state.targets.values():
        if are_read:
            problems += _source_problems(state, target)
            problems += _label_problems(state, target)
        problems += _score_problems(job, target)
        problems += _budget_problems(job, target)
        problems += _search_problems(job, target)
    problems += _library_problems(job, state)
    problems += baseline_problems(whole)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    if "sources" in state.remake:
        state.sources = {name: replace(stage, remake=True) for name, stage in state.sources.items()}
    for name, target in state.targets.items():
        sources = {one: state.sources[one] for one in matching(state, name)}
        state.targets[name] = replace(target, against=overlap.key(target, sources))
    for line in _what_is_not_compared(whole):
        progress.note(line)
    for note in _notes_on_identity(job):
        state.notes.append(note)
        progress.note(note)
    state.key = spec_hash(
        [stage.key for stage in state.sources.values()],
        {name: [stage.key, matching(state, name)] for name, stage in state.targets.items()},
        job.fanout.select,
    )
    planned_allocations(state)  # a budget that is too small is an error
    return state


def _without_other_modalities(state: JobState) -> Job:
    """Return the part of a job without targets and sources that match none of the other kind.

    The modality of a checkpoint may be known only after it has been read, so that `Job.selected`
    takes too many. Those that ``only`` names stay.
    """
    job, taken = state.job, {name: set(matching(state, name)) for name in state.job.targets}
    kept = {
        name
        for name, target in job.targets.items()
        if taken[name]
        or job.is_named(name.removesuffix(grid.fold_suffix(target.fold)), target.data.modality.name)
    }
    fitting = set[str]().union(*taken.values())
    sources = {
        name
        for name, stage in state.sources.items()
        if name in fitting or job.is_named(name, _modality_name(stage))
    }
    return job.restricted(sources, kept)


def at_place(place: str, error: Exception) -> str:
    """Return an error's message with its place in the job file, unless it begins with a place."""
    text = str(error)
    return text if text.startswith(("sources.", "targets.")) else f"{place}: {text}"


def _source_problems(state: JobState, target: TargetStage) -> list[str]:
    """Return what is wrong between a target and the sources that it is to be adapted from."""
    names, problems = matching(state, target.name), []
    if not names:
        modality = target.spec.data.modality.name
        return [
            f"targets.{target.name_in_job}: no source reads {modality}; add one or name it in "
            "sources"
        ]
    for name in names:
        try:
            targets.check_modality(target, state.job.sources[name])
        except ValueError as error:
            problems.append(str(error))
    return problems


def _label_problems(state: JobState, target: TargetStage) -> list[str]:
    """Return why rows or heads of a source cannot serve a target whose technique asks for them.

    Labels that only one side has are added to the notes.
    """
    problems: dict[str, None] = {}
    for component in target.techniques:
        technique = technique_of(component)
        place = f"targets.{target.name_in_job}: techniques: {component.name}"
        for name in matching(state, target.name):
            stage = state.sources[name]
            reads_labels = LABELLED_SOURCE in technique.streams()
            if stage.splits is None:
                if targets.reads_source(technique):
                    problems[
                        f"{place} reads the rows of its source, and {name} is a checkpoint without "
                        "data: give the target techniques or sources of its own"
                    ] = None
                continue
            starts_with_its_head = (
                0 in target.spec.label_fractions
                and adapts_without_labels(technique)
                and trains(technique)
            )
            if not (reads_labels or starts_with_its_head):
                continue
            ours = ObjectiveSpec(target.spec.objective.name, {}, target.state)
            theirs = _fitted_labels(stage, ours.name)
            # at label fraction 0 nothing teaches a label that the source lacks
            if problem := label_sets.problem(name, theirs, ours, needs_all=starts_with_its_head):
                what = "head, at label fraction 0," if starts_with_its_head else "labelled rows"
                problems[f"{place} reads the {what} of its source: {problem}"] = None
            elif text := label_sets.compare(theirs.state, ours.state).text():
                note = f"{target.name_in_job}: labels of source {name}, by name: {text}"
                if note not in state.notes:
                    state.notes.append(note)
                    state.progress.note(note)
    return list(problems)


def _fitted_labels(stage: source.SourceStage, objective: str) -> ObjectiveSpec:
    """Return a source's objective with its labels, as far as they can be compared at all."""
    spec, splits = stage.spec, stage.splits
    assert spec.objective is not None and splits is not None
    name = spec.objective.name
    is_comparable = name == objective and names_labels(registry.get("objective", name))
    state = fit_components.fit_objective(spec, splits) if is_comparable else {}
    return ObjectiveSpec(name, {}, state)


def _score_problems(job: Job, target: TargetStage) -> list[str]:
    """Return the problem where sources are chosen by a score that the target's rows do not have."""
    select = job.fanout.by_score
    if select is None:
        return []
    score = scoring.scores()[select.score]
    objective = target.spec.objective.name
    kinds = scoring.label_kinds(registry.get("objective", objective))
    if kinds and "labels" in score.inputs and 0 in target.spec.label_fractions:
        return [
            f"fanout.select: {select.score} scores sources by labels of "
            f"targets.{target.name_in_job}, of which label_fractions: 0 may use none: leave select "
            "out, or put 0 in a job of its own"
        ]
    if any(map(score.takes, kinds or (None,))):
        return []
    return [
        f"fanout.select: targets.{target.name_in_job} is {objective}, and {select.score} scores "
        f"sources by {' or '.join(score.tasks)} of rows: choose a score that reads no labels "
        "(frechet, mmd, proxy_a), leave select out, or put the target in a job of its own"
    ]


def _budget_problems(job: Job, target: TargetStage) -> list[str]:
    """Return what keeps a budget from being spent on a target."""
    if job.fanout.budget is None:
        return []
    place, train = f"targets.{target.name}", target.spec.train
    rows = min(map(target.labelled, target.spec.label_fractions))
    steps = targets.planned_steps(
        train.model_copy(update={"global_batch": min(train.global_batch, rows)}),
        rows,
        target.packed,
    )
    out = [
        f"{place}: techniques: {component.name} combines final trials, of which "
        "fanout.select.budget cuts some: leave the technique out, or the budget"
        for component in grid.techniques(job, target.spec)
        if grid.combines_trials(component)
    ]
    if not len(target.splits.validation):
        out.append(
            f"{place}: fanout.select.budget chooses by validation rows, and there are none: give "
            "data.validation_fraction, or leave the budget out"
        )
    if isinstance(steps, int) and steps < budget.LEAST_STEPS:
        length = f"steps: {steps}"
        if train.steps is None:
            length = f"epochs: {train.epochs or 1:g} of {rows} rows, so {steps} steps,"
        out.append(
            f"{place}.train.{length} cannot be cut to {budget.RUNGS[0]}, which "
            f"fanout.select.budget tries first: at least {budget.LEAST_STEPS} steps, or no budget"
        )
    return out


def _search_problems(job: Job, target: TargetStage) -> list[str]:
    """Return what techniques declare to be searched and do not take, or what the search lacks."""
    if job.fanout.searcher == "optuna":
        try:
            proposals.library()
        except ValueError as error:
            return [str(error)]
    if job.fanout.search != "auto":
        return []
    return [
        f"fanout.search: technique {one.name} declares what it does not take: {problem}"
        for one in target.techniques
        if (problem := grid.search_problem(one))
    ]


def _library_problems(job: Job, state: JobState) -> list[str]:
    """Return a problem for each technique that needs a library which is not installed."""
    found = [one for target in state.targets.values() for one in target.techniques]
    found += [spec.technique for spec in job.sources.values()]
    problems: list[str] = []
    for component in found:
        technique = technique_of(component)
        if isinstance(technique, NeedsLibrary):
            try:
                technique.check_library()
            except ValueError as error:
                problems.append(f"techniques: {component.name}: {error}")
    return problems


def baseline_problems(job: Job) -> list[str]:
    """Return a problem for each baseline that the job names and that suits no target."""
    if job.baselines == "auto" or not job.targets:
        return []
    return [
        f"baselines: {one.name} can read the rows or predict the labels of no target: leave it out"
        for one in job.baselines
        if not any(grid.is_suitable(one, target) for target in job.targets.values())
    ]


def _what_is_not_compared(job: Job) -> list[str]:
    """Return a sentence on missing targets, or on each one to which no source is carried over."""
    if not job.targets:
        return ["the job has no targets: its sources are pretrained, nothing is compared"]
    return [
        f"targets.{name}: scratch is its only technique, so that no source is carried over to it"
        for name, spec in job.targets.items()
        if job.sources and {one.name for one in grid.techniques(job, spec)} == {"scratch"}
    ]


def _notes_on_identity(job: Job) -> list[str]:
    """Return a sentence for each source and target whose files are not identified by content."""
    named = [
        (f"sources.{name}", data)
        for name, spec in job.sources.items()
        for data in (spec.data, spec.probe)
        if data is not None
    ]
    named += [
        (f"targets.{name}", data)
        for name, spec in job.targets.items()
        for data in (spec.data, spec.unlabelled)
        if data is not None
    ]
    by_stat = dict.fromkeys(
        place
        for place, data in named
        if "stat" in (data.identity, *(part.identity for part in data.more))
    )
    return [
        f"{place}: its local files are told apart by size and time of change, not by what they "
        "hold (data.identity: stat): a change that keeps both is "
        "not found, and a copy counts as other data"
        for place in by_stat
    ]


def _modality_name(stage: source.SourceStage) -> str | None:
    if stage.spec.data is not None:
        return stage.spec.data.modality.name
    if stage.has_bundle:
        return bundle.read_manifest(stage.bundle_uri).modality.name
    # What the job says decides between the networks of CLIP; `read` refuses what is not there
    return stage.spec.modality_name or pretrained.modality_name(stage.spec.backbone.name)


def matching(state: JobState, target: str) -> list[str]:
    """Return the sources that a target is adapted from: those it names, or all of its modality."""
    spec = state.job.targets[target]
    named = spec.sources if spec.sources is not None else list(state.sources)
    return [
        n
        for n in named
        if n in state.sources and _modality_name(state.sources[n]) == spec.data.modality.name
    ]


def scratch_networks(state: JobState, names: Collection[str]) -> int:
    """Return how many scratch networks sources have: those of one backbone and modality share one.

    Before the sources are trained, they share one where their backbone, rows and modality are the
    same; it may turn out that fewer are needed.
    """
    if all(stage.has_bundle for stage in state.sources.values()):
        return sum(bool(set(group.sources) & set(names)) for group in _backbone_groups(state))
    return len({_backbone_kind(state.sources[name]) for name in names})


def _backbone_kind(stage: source.SourceStage) -> tuple[str, ...]:
    """Return a key that sources with the same backbone and rows share."""
    if stage.splits is None or stage.spec.data is None:
        return (str(stage.spec.backbone), stage.spec.init or "")
    return (
        str(stage.spec.backbone),
        stage.spec.init or "",
        str(stage.spec.data.modality),
        spec_hash(source.data_key(stage.spec.data)),
        stage.splits.fingerprint,
    )


def trial_status(state: JobState) -> list[tuple[Trial, bool]]:
    """Return each trial of the job and whether it is finished.

    The result is empty while a source has no bundle or the search is not finished.
    """
    if (
        not state.targets
        or not all(stage.done for stage in state.sources.values())
        or _read_metadata(state).get("broken")
    ):
        return []  # a target that was left out is prepared again
    if checksums.is_damaged(_metadata_uri(state)):
        return []  # the run goes through its stages once more, which makes them again
    groups, chosen = _backbone_groups(state), _chosen_before(state)
    if chosen is None:
        return []
    if state.job.fanout.budget is not None:
        found = _spent(state, groups, chosen)
        failed = _failed_before(state, groups, chosen)
        done = [
            (one, is_done or one.id in failed)
            for one, is_done in _trial_status(state, found.search, groups)
        ]
        if not all(one for _, one in done):
            return []
        final = final_trials(state, groups, chosen, {}, found.cut)
        return done + _trial_status(state, final, groups)
    draws = search_trials(state, groups, chosen)
    done = _trial_status(state, draws, groups)
    if not all(one for _, one in done):
        return []
    again = finalist_trials(state, groups, chosen, ranked_draws(draws, _records(state, draws)))
    done += _trial_status(state, again, groups)
    if not all(one for _, one in done):
        return []
    search = [*draws, *again]
    return done + _trial_status(
        state,
        final_trials(state, groups, chosen, winning_draws(search, _records(state, search))),
        groups,
    )


def _records(state: JobState, found: list[Trial]) -> list[TrialRecord | None]:
    records = trial.read_records(state.job.root, grid.folders(found))
    return [records.get(one.id) for one in found]


def _trial_status(
    state: JobState, found: list[Trial], groups: list[BackboneGroup]
) -> list[tuple[Trial, bool]]:
    anew = _trials_to_remake(state, found, groups)
    as_they_are = [one for one in found if one.id not in anew]
    unfinished = fanout.unfinished_of(state.job.root, as_they_are, state.job.fanout)
    return [(one, one.id not in anew and one.id not in unfinished) for one in found]


# -------------------------------------------------------------- what made the trials that are there


def provenance_of_trials(
    state: JobState, found: list[Trial], groups: list[BackboneGroup]
) -> dict[str, TrialProvenance]:
    """Return trial id to the code and versions that made it, for trials that have ended.

    What has changed of a trial's members has changed of it too: ``found`` holds both.
    """
    by_key = {group.key: group for group in groups}
    weights = {
        name: bundle.weights_sha256(stage.bundle_uri)
        for name, stage in state.sources.items()
        if stage.has_bundle
    }
    out, records = {}, _records(state, found)
    began = {record.trial_id: _began(record) for record in records if record is not None}
    for one, record in zip(found, records, strict=True):
        if record is not None:
            target, group = state.job.targets[one.target], by_key[one.backbone_key]
            now = grid.trial_made_by(one, target, group)
            out[one.id] = origins.provenance_of_record(
                record, now, one.source, weights.get(one.source)
            )
    for one in found:
        members = [member.id for member in one.members if member.id in out]
        if one.id not in out or not members:
            continue
        changes = [change for member in members for change in out[member].changes]
        if any(began[member] > began[one.id] for member in members):
            changes.append("trials that it combines were made anew since")
        all_changes = dict.fromkeys((*out[one.id].changes, *changes))
        out[one.id] = replace(out[one.id], changes=tuple(all_changes))
    return out


def _began(record: TrialRecord) -> float:
    """Return when a trial began, in seconds; 0 where its record does not say."""
    moments = [row.started_at.timestamp() for row in record.rows if row.started_at]
    return min(moments, default=0.0)


def _trials_to_remake(state: JobState, found: list[Trial], groups: list[BackboneGroup]) -> set[str]:
    """Return the ids of the trials that have ended and are to be made again."""
    if "trials" not in state.remake:
        return set()
    return {
        one for one, origin in provenance_of_trials(state, found, groups).items() if origin.changes
    }


def reusable_results(
    state: JobState,
) -> tuple[dict[str, tuple[str, ...]], dict[str, TrialProvenance]]:
    """Return the existing results that would be used as they are.

    Where the search is not finished, or a source has no bundle, only the trials that are already
    known are returned.

    Returns:
        Source to the changes of code and versions since it was made, and the known trials by id.
    """
    changed = {name: stage.changes() for name, stage in state.sources.items() if stage.has_bundle}
    chosen = _chosen_before(state)
    if len(changed) < len(state.sources) or chosen is None:
        return changed, {}
    groups = _backbone_groups(state)
    search, final = _planned_trials(state, groups, chosen)
    return changed, provenance_of_trials(state, [*search, *final], groups)


def _planned_trials(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], list[Trial]]:
    """Return the search trials that have ended, and the final trials that follow from them."""
    if state.job.fanout.budget is not None:
        found = _spent(state, groups, chosen)
        return list(found.tried), final_trials(state, groups, chosen, {}, found.cut)
    search = _search(state, groups, chosen)
    records = _records(state, search)
    there = [one for one, record in zip(search, records, strict=True) if record is not None]
    return there, final_trials(state, groups, chosen, winning_draws(search, records))


def _search(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> list[Trial]:
    """Return all draws of the search, and the best finished ones again with further seeds."""
    draws = search_trials(state, groups, chosen)
    return [
        *draws,
        *finalist_trials(state, groups, chosen, ranked_draws(draws, _records(state, draws))),
    ]


def _backbone_groups(state: JobState) -> list[BackboneGroup]:
    manifests = {
        name: bundle.read_manifest(stage.bundle_uri) for name, stage in state.sources.items()
    }
    return grid.backbone_groups(
        {name: (manifest.arch, manifest.modality) for name, manifest in manifests.items()}
    )


# ------------------------------------------------- what a run leaves for `report` beside its trials


class _StoredMetadata(TypedDict, total=False):
    """What a run leaves for later commands and for the report.

    Most fields are those of `JobState`. A run of an older version may lack some.
    """

    key: str
    notes: list[str]
    broken: dict[str, str]
    scores: dict[str, SelectionScore]
    source_scores: dict[str, JsonObject]
    left_out: dict[str, int]
    streamed: list[str]
    failed_in_budget: list[str]
    chosen: dict[str, list[str]]
    """Target to the sources that were fanned out."""


def _metadata_uri(state: JobState) -> str:
    """Return where the metadata of a run lie. Each part of a job (``only``) has a file of its own,
    so that those of the whole job stay. Runs of earlier versions called it facts, so it still is.
    """
    part = f"-{spec_hash(sorted(set(state.job.only)))}" if state.job.only else ""
    return storage.join(state.job.root, f"facts{part}.json")


def _save_metadata(state: JobState, chosen: dict[str, set[str]]) -> None:
    metadata: _StoredMetadata = {
        "key": state.key,
        "notes": state.notes,
        "broken": state.unusable_targets,
        "scores": state.scores,
        "source_scores": {pair: found.to_json() for pair, found in state.source_scores.items()},
        "left_out": state.left_out,
        "streamed": state.streamed or [],
        "failed_in_budget": state.failed_in_budget,
        "chosen": {name: sorted(found) for name, found in chosen.items()},
    }
    checksums.write_document(_metadata_uri(state), metadata)


def _read_metadata(state: JobState) -> _StoredMetadata:
    """Return the metadata that the newest run of the same sources and targets wrote, or {}."""
    remedy = (
        "what it told the report (notes, scores, targets that were left out) is missing until the "
        "job runs again"
    )
    found: Any = checksums.document_or_none(_metadata_uri(state), remedy) or {}
    return found if found.get("key") == state.key else {}


def _chosen_before(state: JobState) -> dict[str, set[str]] | None:
    """Return the sources of each target as the newest run chose them.

    Returns None where they must still be chosen by scores.
    """
    if state.job.fanout.by_score is None:
        return {name: set(matching(state, name)) for name in state.targets}
    found = _read_metadata(state).get("chosen")
    return None if found is None else {name: set(found.get(name, ())) for name in state.targets}


def used_places(state: JobState) -> dict[str, tuple[str, ...]]:
    """Return for each source its bundle, and the checkpoint that the source itself started from."""
    return {
        name: tuple(filter(None, (stage.bundle_uri, stage.checkpoint_text)))
        for name, stage in state.sources.items()
    }


def all_ids(state: JobState) -> set[str]:
    """Return the ids of all trials of the job, whether they have run or not.

    Raises:
        ValueError: They cannot be known yet.
    """
    if state.job.only:
        raise ValueError(
            "only: a part of a job does not tell which trials the rest has; leave it out to prune"
        )
    lacking = [name for name, stage in state.sources.items() if not stage.has_bundle]
    broken, chosen = _read_metadata(state).get("broken") or {}, _chosen_before(state)
    why = ""
    if lacking:
        why = f"sources {', '.join(lacking)} have no bundle yet"
    elif broken:
        why = f"targets {', '.join(broken)} were left out of the newest run"
    elif chosen is None:
        why = "which sources are fanned out is not known yet"
    if not why and chosen is not None:
        groups = _backbone_groups(state)
        if state.job.fanout.budget is not None:
            is_through = not _spent(state, groups, chosen).waiting
        else:
            is_through = None not in _records(state, _search(state, groups, chosen))
        if is_through:
            search, final = _planned_trials(state, groups, chosen)
            return {one.id for one in (*search, *final)}
        why = "its search is not through"
    raise ValueError(
        f"{state.job.root}: {why}, so it is not known which trials belong to the job; run it "
        "to its end first, then prune"
    )


def stale(state: JobState) -> pruning.StaleTrials:
    """Return the stored trials that are no longer part of the job.

    Raises:
        ValueError: The trials of the job cannot be known yet.
    """
    return pruning.find_stale(
        state.job.root, all_ids(state), pruning.uses(state.job.root, used_places(state))
    )


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
            f"warning: {name}: {origins.OTHER}: {', '.join(changed)}; it is used as it is, "
            "--remake changed makes it anew"
        )


def share(state: JobState) -> Shared:
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
    loaded = {name: targets.weights(uri) for name, uri in uris.items()}
    manifests = {name: manifest for name, (_, _, manifest) in loaded.items()}
    groups = grid.backbone_groups(
        {name: (one.arch, one.modality) for name, one in manifests.items()}
    )
    data: dict[tuple[str, str], trial.TargetData] = {}
    for name, stage in list(state.targets.items()):
        if name not in state.targets:  # another of its folds cannot be prepared
            continue
        state.progress.update(f"{name}: reading")
        try:
            data |= {
                (name, group): one for group, one in _prepare_target(state, name, groups).items()
            }
        except ValueError as error:  # one bad target: the others continue
            whole = stage.name_in_job
            reason = str(error) if whole == name else f"fold {stage.spec.fold}: {error}"
            # the other folds would pass for all rows of the target
            for fold, other in list(state.targets.items()):
                if other.name_in_job == whole:
                    state.unusable_targets[fold] = reason
                    state.targets.pop(fold)
            data = {key: one for key, one in data.items() if key[0] in state.targets}
            state.notes.append(f"{whole}: left out: {reason}")
            state.progress.note(f"warning: targets.{whole} is left out: {reason}")
    if not state.targets:
        raise ValueError("\n".join(_left_out(state)))
    state.streamed = [f"{name}|{group}" for (name, group), one in data.items() if not one.in_memory]
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


def _prepare_target(
    state: JobState, name: str, groups: list[BackboneGroup]
) -> dict[str, trial.TargetData]:
    """Prepare a target as each backbone group reads it, and add findings to the notes.

    The result is by the key of the backbone group.

    Raises:
        ValueError: The target cannot be used.
    """
    job, target = state.job, state.targets[name]
    sources = {one: state.sources[one] for one in matching(state, name)}
    seen = overlap.find_overlap(target, sources, storage.join(job.root, "signs"))
    target = replace(target, splits=replace(target.splits, test=seen.test))
    data: dict[str, trial.TargetData] = {}
    by_reading: dict[str, trial.TargetData] = {}
    for group in groups:
        if not set(group.sources) & set(sources):
            continue
        key = targets.reading_key(target, group)
        if key in by_reading:
            data[group.key] = targets.for_group(by_reading[key], group)
        else:
            data[group.key] = targets.prepare(target, group)
        by_reading[key] = data[group.key]
    text = f"{name}: {next(iter(data.values())).split_text}"
    if "rows left out" in text:
        state.notes.append(text)
    state.progress.note(text)
    batches = job.fanout.stated_search.get("global_batch", ())
    found = [finding for one in by_reading.values() for finding in one.findings]
    found += [*targets.unmet_requests(target, batches), *targets.missing_classes(target)]
    for finding in dict.fromkeys(found):
        state.notes.append(finding.line(name))
        if finding.in_terminal:
            state.progress.note(finding.line(name))
    state.left_out[name] = len(state.targets[name].splits.test) - len(seen.test)
    for note in seen.notes:
        state.notes.append(note)
        state.progress.note(note)
    return data


def rows_of_sources(state: JobState) -> dict[str, tuple[Selection, dict[str, str]]]:
    """Return the training rows of each source that has data, where a technique reads them, or where
    its validation rows serve in place of a target's (label fraction 0).
    """
    are_read = any(
        0 in target.spec.label_fractions
        or any(targets.reads_source(technique_of(one)) for one in target.techniques)
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


def score(state: JobState, shared: Shared) -> list[dict[str, Any]]:
    """Score every source for every target.

    Returns:
        A row for each pair, best first by the score that chooses sources (LogME where none does):
        ``target``, ``source``, ``backbone``, each score's value, None where it is not defined;
        ``intervals`` and ``undefined``, score to (low, high) and to the reason.
    """
    _compute_scores(state, shared, list(state.targets))
    select = state.job.fanout.by_score
    by = scoring.DEFAULT_SCORE if select is None else select.score
    out = []
    for (name, group), sources in _pairs(state, shared, list(state.targets)).items():
        for source_name in sources:
            found = state.source_scores[f"{source_name}|{name}"].scores
            out.append(
                {
                    "target": name,
                    "source": source_name,
                    "backbone": shared.backbone_groups[group].label,
                    **{score: value.value for score, value in found.items()},
                    "intervals": {
                        score: (value.low, value.high)
                        for score, value in found.items()
                        if value.low is not None
                    },
                    "undefined": {
                        score: value.reason for score, value in found.items() if value.value is None
                    },
                }
            )
    ranks = {pair: _rank(found.scores[by]) for pair, found in state.source_scores.items()}
    return sorted(out, key=lambda row: (row["target"], *ranks[f"{row['source']}|{row['target']}"]))


def _pairs(
    state: JobState, shared: Shared, names: Sequence[str]
) -> dict[tuple[str, str], list[str]]:
    """Return (target, key of a backbone group) to the sources of the group that are scored."""
    return {
        (name, group.key): [one for one in group.sources if one in matching(state, name)]
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
        Pair(
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
    found = fanout.score_pairs(pairs, shared, state.job.fanout, state.wait)
    for number, one in enumerate(found):
        state.progress.update(f"scores: {number + 1}/{len(pairs)}")
        state.source_scores[f"{one.source}|{one.target}"] = one
        if one.error:
            what = "score" if scored is None or one.target in scored else "measured shift"
            line = f"{one.target}: source {one.source} has no {what} ({one.error})"
            state.notes.append(line)
            state.progress.note(f"warning: {line}")


def _class_counts(state: JobState, stage: source.SourceStage, shared: Shared) -> dict[str, int]:
    """Return the number of training rows of each class of a source, {} where rows have none.

    Labels that the source's head does not know are a warning: only the shift of classes needs them.
    """
    head, _ = shared.heads.get(stage.name, (None, {}))
    if head is None or stage.splits is None or stage.spec.data is None:
        return {}
    columns = stage.spec.data.columns
    try:
        return measured_shift.counts_of(stage.splits.train, columns, head.name, head.state)
    except ValueError as error:
        state.progress.note(f"warning: source {stage.name}: no shift of its classes ({error})")
        return {}


def _rank(score: ScoreValue) -> tuple[bool, float]:
    """Return the sort key of a score: the best first, what is not defined last."""
    if score.value is None:
        return True, 0.0
    return False, -score.value if score.higher_is_better else score.value


def _select(state: JobState, shared: Shared) -> dict[str, set[str]]:
    """Select the sources of each target: all, or those with the best scores.

    Targets with a choice of sources are scored also where all of them are fanned out: the report
    then compares the scores with what fine-tuning showed. Of the others shift alone is measured.
    """
    select = state.job.fanout.by_score
    chosen = {name: set(matching(state, name)) for name in state.targets}
    scored = [name for name in state.targets if select is not None or len(chosen[name]) > 1]
    _compute_scores(state, shared, list(state.targets), scored)
    if select is None:
        return chosen
    for name in scored:
        ranks: dict[str, tuple[bool, float]] = {}
        for source_name in matching(state, name):
            pair = f"{source_name}|{name}"
            found = state.source_scores[pair].scores[select.score]
            ranks[source_name] = _rank(found)
            state.scores[pair] = SelectionScore(score_name=select.score, score_value=found.value)
        if all(is_undefined for is_undefined, _ in ranks.values()):
            state.notes.append(
                f"{name}: no source has a {select.score} score, so none is left out by it"
            )
            state.progress.note(f"warning: {state.notes[-1]}")
            continue
        best = sorted(ranks, key=ranks.__getitem__)
        chosen[name] = set(best[: select.top])
        if dropped := best[select.top :]:
            state.notes.append(
                f"{name}: sources kept by {select.score}: {', '.join(sorted(chosen[name]))}; "
                f"left out: {', '.join(dropped)}"
            )
            state.progress.note(state.notes[-1])
    return chosen


def _entries(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> list[tuple[str, tuple[BackboneGroup, str, Any, Any]]]:
    return [
        (name, entry)
        for name in state.targets
        for entry in grid.planned_entries(
            state.job,
            name,
            [b for b in groups if set(b.sources) & set(matching(state, name))],
            chosen[name],
        )
    ]


def _trial(
    state: JobState,
    name: str,
    entry: tuple[BackboneGroup, str, Any, Any],
    hyper: grid.HyperParameters,
    seed: int,
    stage: str,
    members: tuple[Trial, ...] = (),
) -> Trial:
    key = state.sources[entry[1]].key if entry[1] != SCRATCH else ""
    target, technique = state.targets[name], technique_of(entry[2])
    data_key = target.key
    # without labels they are the training rows of every technique, whose number makes its steps
    are_trained_on = entry[3] == 0 and grid.needs_training(entry[2])
    if target.unlabelled_key and (are_trained_on or targets.reads_target(technique)):
        data_key = spec_hash(data_key, target.unlabelled_key)
    return grid.make_trial(
        state.job, name, entry, hyper, seed, stage, key, data_key, members, state.ids_in_old_layout
    )


def search_trials(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    records: Mapping[str, TrialRecord] | None = None,
) -> list[Trial]:
    """Return the search trials that are known so far (`proposals.search_trials`).

    There are none of an entry where there is only one setting.

    Args:
        records: Id of a trial to its record; None: all that there are.
    """
    if state.job.fanout.trials == 1:
        return []
    found = _search_trials(state, groups, chosen, records or {})
    if records is not None or state.job.fanout.searcher == "random":
        return found
    there: dict[str, TrialRecord] = {}
    for _ in range(proposals.GENERATIONS - 1):
        unread = [one for one in found if one.id not in there]
        there |= trial.read_records(state.job.root, grid.folders(unread))
        found = _search_trials(state, groups, chosen, there)
    return found


def _search_trials(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    records: Mapping[str, TrialRecord],
) -> list[Trial]:
    streamed = state.streamed
    if streamed is None:
        streamed = _read_metadata(state).get("streamed", [])
    values = {one: validation_value(record) for one, record in records.items()}
    out: list[Trial] = []
    for name, entry in _entries(state, groups, chosen):
        if grid.needs_training(entry[2]):
            out += proposals.search_trials(
                state.job,
                state.job.targets[name],
                entry[2],
                f"{name}|{entry[0].key}" not in streamed,
                partial(_trial, state, name, entry, seed=grid.SEARCH_SEED, stage="search"),
                values,
            )
    return out


def finalist_trials(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    ranked: dict[str, list[dict[str, float]]],
) -> list[Trial]:
    """Return trials of the best few draws of every entry with further seeds.

    Their number is in `Fanout.search_finalists`. There are none where there is a single draw.

    Args:
        ranked: Entry to its draws, the best first.
    """
    spec, out = state.job.fanout.search_finalists, []
    for name, entry in _entries(state, groups, chosen) if ranked else ():
        first = grid.SEARCH_SEED
        best = ranked.get(_trial(state, name, entry, {}, first, "search").entry, [])[: spec.top]
        if len(best) > 1:
            out += [
                _trial(state, name, entry, hyper, first + i, "search")
                for hyper in best
                for i in range(1, spec.seeds + 1)
            ]
    return out


def final_trials(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    winners: dict[str, dict[str, float]],
    cut: Collection[str] = (),
) -> list[Trial]:
    """Return the trials of every entry's winner with every seed.

    An entry whose search has no winner has the settings of the target. Entries that were ``cut`` by
    a budget have no final trials.
    """
    out: list[Trial] = []
    combined = []
    for name, entry in _entries(state, groups, chosen):
        if grid.combines_trials(entry[2]):
            combined.append((name, entry))
            continue
        entry_name = _trial(state, name, entry, {}, 0, "final").entry
        if entry_name in cut:
            continue
        hyper = winners.get(entry_name, {})
        out += [
            _trial(state, name, entry, hyper, seed, "final")
            for seed in range(state.job.fanout.seeds if grid.needs_training(entry[2]) else 1)
        ]
    for name, entry in combined:
        group, source, component, fraction = entry
        members = tuple(
            one
            for one in out
            if (one.source, one.backbone_key, one.target) == (source, group.key, name)
            and grid.takes(component, one.technique)
            # 1 and 1.0 are equal numbers, but one row a class and all rows
            and grid.fraction_text(one.label_fraction) == grid.fraction_text(fraction)
        )
        out.append(_trial(state, name, entry, {}, 0, "final", members))
    return [*out, *_baseline_trials(state, groups)]


# ---------------------------------------------------------------- a budget of trials


def planned_allocations(
    state: JobState,
) -> dict[tuple[str, str], tuple[budget.BracketSize, budget.Allocation]]:
    """Return (target, label fraction) to size and allocation, before anything has run.

    It is empty where the job has no budget. Before the sources are trained it may count more
    scratch networks than there are (`scratch_networks`).

    Raises:
        BudgetError: The budget is too small.
    """
    job, by_score = state.job, state.job.fanout.by_score
    if job.fanout.budget is None:
        return {}
    sizes: dict[tuple[str, str], budget.BracketSize] = {}
    for name, stage in state.targets.items():
        names = matching(state, name)[: by_score.top if by_score else None]
        networks = scratch_networks(state, names)
        trained = [one for one in grid.techniques(job, stage.spec) if grid.needs_training(one)]
        for fraction in stage.spec.label_fractions:
            sizes[name, grid.fraction_text(fraction, stage.spec.objective.name)] = _size(
                [one for one in trained if grid.starts_random(one)] * networks,
                [one for one in trained if not grid.starts_random(one)] * len(names),
                job.fanout.seeds,
            )
    spent = budget.share_out(job.fanout.budget, list(sizes.values()), job.fanout.seeds)
    return {key: (size, one) for (key, size), one in zip(sizes.items(), spent, strict=True)}


def _size(scratch: Sequence[Any], pairs: Sequence[Any], seeds: int) -> budget.BracketSize:
    """Return the size of a bracket, given the technique of each of its entries."""
    return budget.BracketSize(
        len(pairs),
        sum((budget.relative_cost(one) for one in scratch), Fraction(0)) * seeds,
        max(map(budget.relative_cost, pairs), default=Fraction(1)),
    )


def brackets_of(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    seed: int = grid.SEARCH_SEED,
) -> list[budget.Bracket]:
    """Return the brackets of a job, in the order of its targets and label fractions.

    Args:
        seed: Of the search trials. No final trial has it: a pair that was kept for a lucky network
            would have this network's luck in its gain too.
    """
    entries: dict[tuple[str, str], list[tuple[BackboneGroup, str, Any, Any]]] = defaultdict(list)
    for name, entry in _entries(state, groups, chosen):
        if grid.needs_training(entry[2]):
            objective = state.targets[name].spec.objective.name
            entries[name, grid.fraction_text(entry[3], objective)].append(entry)
    out: list[budget.Bracket] = []
    for (name, fraction), found in entries.items():
        train = state.targets[name].spec.train
        competing = [entry for entry in found if not grid.starts_random(entry[2])]
        pairs = [
            budget.Pair(
                tuple(
                    _trial(state, name, entry, budget.shortened(train, rung), seed, "search")
                    for rung in range(len(budget.RUNGS))
                )
            )
            for entry in competing
        ]
        size = _size(
            [entry[2] for entry in found if grid.starts_random(entry[2])],
            [entry[2] for entry in competing],
            state.job.fanout.seeds,
        )
        out.append(budget.Bracket(name, fraction, tuple(pairs), size))
    return out


def _spent(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    records: Mapping[str, TrialRecord] | None = None,
) -> budget.Decision:
    """Decide which pairs go on, and keep why the others were cut.

    Args:
        records: Id of a trial to its record; None: all that there are.
    """
    brackets, fan = brackets_of(state, groups, chosen), state.job.fanout
    assert fan.budget is not None
    allocation = budget.share_out(fan.budget, [bracket.size for bracket in brackets], fan.seeds)
    if records is None:
        every = [one for bracket in brackets for pair in bracket.pairs for one in pair.rungs]
        records = trial.read_records(state.job.root, grid.folders(every))
    found = budget.decide(
        brackets, allocation, {one: validation_value(record) for one, record in records.items()}
    )
    state.cut_by_budget = found.reasons
    return found


def _spend(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> budget.Decision:
    """Run the rungs of every target one after the other, and decide which pairs go on.

    A search trial that failed is not run again once pairs were kept and trained without it: those
    of this and of every later target would be others.
    """
    records = _failed_before(state, groups, chosen)
    while True:
        found = _spent(state, groups, chosen, records)
        if not found.waiting:
            break
        waiting = list(found.waiting)
        records |= zip(
            (one.id for one in waiting),
            fanout.run(
                f"budget, {found.rung}",
                waiting,
                shared,
                state.job.fanout,
                state.progress,
                _trials_to_remake(state, waiting, groups),
                state.wait,
            ),
            strict=True,
        )
    for note in found.notes:
        state.notes.append(note)
        state.progress.note(note)
    _note_failed(state, found.tried, records)
    return found


def _failed_before(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> dict[str, TrialRecord]:
    """Return the records of search trials that had failed when a budget was spent, by id."""
    ids = _read_metadata(state).get("failed_in_budget")
    if "trials" in state.remake or not ids:
        return {}
    pairs = [pair for bracket in brackets_of(state, groups, chosen) for pair in bracket.pairs]
    trials = [one for pair in pairs for one in pair.rungs if one.id in ids]
    found = trial.read_records(state.job.root, grid.folders(trials))
    return {one: record for one, record in found.items() if record.failed}


def _note_failed(
    state: JobState, tried: Sequence[Trial], records: Mapping[str, TrialRecord]
) -> None:
    """Keep which search trials of a budget failed, and add a note on those of each target.

    Where all of a target and label fraction failed, no pair was kept for its values: they run again
    with the job.
    """
    by_contest: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for one in tried:
        by_contest[one.target, grid.fraction_text(one.label_fraction)].append(one)
    state.failed_in_budget = []
    for (name, fraction), trials in by_contest.items():
        failed = [one for one in trials if records[one.id].failed]
        if not 0 < len(failed) < len(trials):
            continue
        state.failed_in_budget += [one.id for one in failed]
        named = ", ".join(f"{one.source} · {one.technique}" for one in failed)
        state.notes.append(
            f"{name} at {fraction} labels: search trials of the budget failed, so these pairs were "
            f"cut: {named}. They do not run again with the job, which would then keep other pairs; "
            "another number for fanout.select.budget tries them again"
        )
        state.progress.note(f"warning: {state.notes[-1]}")


def _baseline_trials(state: JobState, groups: list[BackboneGroup]) -> list[Trial]:
    """Return the trials of baselines. They read rows as the first backbone group of a target."""
    out: list[Trial] = []
    for name, target in state.targets.items():
        if not grid.baselines(state.job, target.spec):
            continue
        names = set(matching(state, name))
        group = next(one for one in groups if set(one.sources) & names)
        out += grid.baseline_trials(state.job, name, group, target.key, state.ids_in_old_layout)
    return out


def finetune(state: JobState, shared: Shared) -> list[Trial]:
    """Search or spend the budget, and then run every entry that is left with every seed.

    Returns all trials of the job.
    """
    groups = list(shared.backbone_groups.values())
    chosen = _select(state, shared)
    if state.job.fanout.budget is not None:
        found = _spend(state, shared, groups, chosen)
        search, final = found.tried, final_trials(state, groups, chosen, {}, found.cut)
    else:
        search, winners = _run_search(state, shared, groups, chosen)
        final = final_trials(state, groups, chosen, winners)
    _save_metadata(state, chosen)
    _run_final(state, shared, groups, final)
    _measure_shift_of_test(state, shared)
    _save_metadata(state, chosen)
    return [*search, *final]


def _run_search(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], dict[str, dict[str, float]]]:
    """Run the search and the best draws again, where there are several draws.

    Returns its trials, and entry to its winning draw.
    """
    job = state.job
    search, records = _run_draws(state, shared, groups, chosen)
    again = finalist_trials(state, groups, chosen, ranked_draws(search, records))
    if again:
        unpruned = job.fanout.model_copy(
            update={"scheduler": "fifo"}
        )  # a mean over seeds needs all of them
        records += fanout.run(
            "search, best again",
            again,
            shared,
            unpruned,
            state.progress,
            _trials_to_remake(state, again, groups),
            state.wait,
        )
        search = [*search, *again]
    winners = winning_draws(search, records)
    for entry in sorted({one.entry for one in search} - set(winners)):
        state.notes.append(
            f"search: no trial of {entry} ended well, so it has no winner: its final trials run "
            "with the target's own settings"
        )
        state.progress.note(f"warning: {state.notes[-1]}")
    return search, winners


def _run_draws(
    state: JobState, shared: Shared, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], list[TrialRecord]]:
    """Run every draw once, in generations where later ones follow from earlier trials.

    Returns the trials and their records.
    """
    records: dict[str, TrialRecord] = {}
    while True:
        search = search_trials(state, groups, chosen, records)
        waiting = [one for one in search if one.id not in records]
        if not waiting:
            return search, [records[one.id] for one in search]
        records |= zip(
            (one.id for one in waiting),
            fanout.run(
                "search",
                waiting,
                shared,
                state.job.fanout,
                state.progress,
                _trials_to_remake(state, waiting, groups),
                state.wait,
            ),
            strict=True,
        )


def _measure_shift_of_test(state: JobState, shared: Shared) -> None:
    """Measure how the test rows of each target differ from its training rows, on the workers.

    It reads their labels, so it comes after all trials. One source's features serve: the one with
    the best score, where there are scores.
    """
    first: dict[str, Pair] = {}
    for (name, group), sources in _pairs(state, shared, list(state.targets)).items():
        known = [state.source_scores.get(f"{source}|{name}") for source in sources]
        able = [one for one in known if one is not None and not one.error]
        if able and name not in first:
            best = min(able, key=_order_by_default_score)
            first[name] = Pair(best.source, group, name)
    found = fanout.shifts_of_test(list(first.values()), shared, state.job.fanout, state.wait)
    for pair, one in zip(first.values(), found, strict=True):
        place = f"{pair.source}|{pair.target}"
        scores = state.source_scores[place]
        state.source_scores[place] = replace(scores, shifts=(*scores.shifts, one))


def _order_by_default_score(pair: PairScores) -> tuple[bool, float]:
    score = pair.scores.get(scoring.DEFAULT_SCORE)
    return (True, 0.0) if score is None else _rank(score)


def _run_final(
    state: JobState, shared: Shared, groups: list[BackboneGroup], final: list[Trial]
) -> None:
    """Run the final trials: first those that are trained, then those that combine them."""
    anew = _trials_to_remake(state, final, groups)  # of both groups, before a member is made again
    combined = [one for one in final if one.combines_trials]
    trained = [one for one in final if not one.combines_trials]
    for name, group in (("fine-tune", trained), ("combine", combined)):
        if group:
            fanout.run(
                name,
                group,
                shared,
                state.job.fanout,
                state.progress,
                anew,
                state.wait,
            )


def current(state: JobState) -> list[ResultRow]:
    """Return the results rows of the job as it is now, and the notes of the run that made them.

    They are read from the records of the trials that have ended.
    """
    if not state.targets or not all(stage.has_bundle for stage in state.sources.values()):
        return []
    metadata = _read_metadata(state)
    state.notes = metadata.get("notes", [])
    state.unusable_targets = metadata.get("broken", {})
    state.scores = metadata.get("scores", {})
    state.left_out = metadata.get("left_out", {})
    state.source_scores = {
        pair: PairScores.from_json(found)
        for pair, found in metadata.get("source_scores", {}).items()
    }
    state.targets = {
        name: stage for name, stage in state.targets.items() if name not in state.unusable_targets
    }
    groups, chosen = (
        _backbone_groups(state),
        _chosen_before(state) or {name: set(matching(state, name)) for name in state.targets},
    )
    search, final = _planned_trials(state, groups, chosen)
    return collect(state, [*search, *final])


def validation_value(record: TrialRecord) -> float | None:
    """Return the primary metric of a trial on validation rows, larger is better.

    It is None where the trial failed, was stopped early or has no value.
    """
    row = next((r for r in record.rows if r.metric and r.is_validation), None)
    if record.status != "done" or row is None or row.value is None or math.isnan(row.value):
        return None
    return row.value if row.higher_is_better else -row.value


def _tried(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, list[tuple[dict[str, float], list[float]]]]:
    """Return entry to its draws, each with the validation value of every seed, larger is better.

    Trials without a record and those that failed, were stopped early or have no value are left out.
    """
    out: dict[str, dict[str, tuple[dict[str, float], dict[str, float]]]] = defaultdict(dict)
    for one, record in zip(search, records, strict=True):
        value = None if record is None else validation_value(record)
        if value is None:
            continue
        _, values = out[one.entry].setdefault(
            json.dumps(one.hyper_parameters, sort_keys=True), (one.hyper_parameters, {})
        )
        values[one.id] = value
    return {
        entry: [(hyper, list(values.values())) for hyper, values in draws.values()]
        for entry, draws in out.items()
    }


def ranked_draws(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, list[dict[str, float]]]:
    """Return entry to its draws, the best first.

    Of equally good draws the one that was drawn first comes first.
    """
    return {
        entry: [hyper for hyper, _ in sorted(draws, key=_draw_sort_key, reverse=True)]
        for entry, draws in _tried(search, records).items()
    }


def winning_draws(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, dict[str, float]]:
    """Return the best draw of every entry on validation, at equal budget.

    Trials that were stopped early or failed cannot win.
    """
    return {entry: ranked[0] for entry, ranked in ranked_draws(search, records).items()}


def _draw_sort_key(draw: tuple[dict[str, float], list[float]]) -> tuple[int, float]:
    """Return the sort key of a draw, by the number of finished seeds and then by validation value.

    Draws that were not tried again, or failed with a seed, were found worse.
    """
    _, values = draw
    return len(values), float(np.mean(values))


def collect(state: JobState, found: list[Trial]) -> list[ResultRow]:
    """Make results rows from the records of trials, with the gain over scratch with the same seed.

    Names are those of the job as it is now, because a record may be older than a name.
    """
    root, is_budgeted = state.job.root, state.job.fanout.budget is not None
    records = trial.read_records(root, grid.folders(found))
    state.trial_provenance = provenance_of_trials(state, found, _backbone_groups(state))
    if state.job.fanout.keep_bundles == "best":
        best: dict[str, TrialRecord] = {}
        fanout.prune_bundles(root, [one for one in found if one.stage == "final"], "best", best)
        kept = {record.trial_id for record in best.values()}
    else:
        kept = set(records)
    bundles = {one: uri for one in kept if (uri := records[one].rows[0].bundle_uri)}
    is_there = storage.at_once(bundle.exists, bundles.values())
    kept = {
        one for one, there in zip(bundles, is_there, strict=True) if there
    }  # another run may have kept fewer
    scratch = {
        (one.backbone_key, one.target, grid.fraction_text(one.label_fraction), one.seed): one
        for one in found
        if one.source == SCRATCH and str(one.technique) == "scratch" and one.stage == "final"
    }
    predictions = lru_cache(maxsize=8)(
        partial(trial.read_predictions, root)
    )  # of a trial's several metrics, and of its scratch
    targets_of = {one.id: one.target for one in found}
    rows: list[ResultRow] = []
    for one in found:
        known = {
            "job": state.job.name,
            "source": one.source,
            "backbone": one.backbone,
            "target": state.targets[one.target].name_in_job,
            "current": True,
            "split_origin": state.targets[one.target].split_origin,
            # the length of a trial within a budget is no draw of a search
            "drawn": json.dumps({} if is_budgeted else one.hyper_parameters, sort_keys=True),
            **state.scores.get(f"{one.source}|{one.target}", {}),
            "source_scores": _score_column(state, one),
        }
        if one.id in records:
            known |= state.trial_provenance[one.id].columns()
        if one.id not in kept:
            known["bundle_uri"] = None
        if one.id in state.cut_by_budget and records[one.id].status == "done":
            known |= {"status": "pruned", "error": state.cut_by_budget[one.id]}
        for row in records[one.id].rows if one.id in records else ():
            row = replace(row, **known, trial_name=one.name)
            against = scratch.get(
                (one.backbone_key, one.target, grid.fraction_text(one.label_fraction), one.seed)
            )
            if (
                row.split == "test"
                and against is not None
                and against.id in records
                and one.source != SCRATCH
            ):
                row = replace(row, **_gain(predictions, one, against, row, records))
                if mixed := provenance.differences(
                    state.trial_provenance[one.id].made, state.trial_provenance[against.id].made
                ):
                    note = f"the gain {origins.MIXED} ({', '.join(mixed)})"
                    row = replace(row, interval=f"{row.interval}; {note}" if row.interval else note)
            rows.append(row)
        rows += _by_subgroup(state, predictions, rows, one)
    entries = matrix.matrix_entries(rows, _tested_runs(state, rows, targets_of))
    rows = _with_best_baseline(_compared(rows, entries), entries, predictions)
    results.append(
        root,
        rows,
        current={one.id for one in found},
        is_of_part=_part_of_table(state, found) if state.job.only else None,
    )
    return rows


def _part_of_table(state: JobState, found: list[Trial]) -> Callable[[ResultRow], bool]:
    """Return whether a row of the table is of the part of the job that ran (``only``).

    Targets with all their sources are wholly part of it. Of others these are: the pairs with the
    sources that ran, and scratch of the same backbones and baselines, which have no source.
    """
    pairs = {
        (stage.name_in_job, source)
        for name, stage in state.targets.items()
        for source in matching(state, name)
    }
    without_source = {
        (state.targets[one.target].name_in_job, one.backbone)
        for one in found
        if one.source == SCRATCH
    }

    def is_of_part(row: ResultRow) -> bool:
        if row.source == SCRATCH and (row.target, row.backbone) in without_source:
            return True
        return row.target in state.whole_targets or (row.target, row.source) in pairs

    return is_of_part


def _score_column(state: JobState, one: Trial) -> str | None:
    """Return the scores of a trial's source for its target, as the results table has them."""
    found = state.source_scores.get(f"{one.source}|{one.target}")
    if found is None or not found.scores:
        return None
    shown = {
        name: {"value": score.value, "low": score.low, "high": score.high}
        for name, score in found.scores.items()
    }
    return json.dumps(shown, sort_keys=True)


def _tested_runs(
    state: JobState, rows: list[ResultRow], targets_of: dict[str, str]
) -> dict[str, stats.RunPredictions]:
    """Return the test predictions of the finished final trials of these rows, by trial id."""
    tested = {
        row.trial_id: row
        for row in rows
        if row.trial_stage == "final" and row.status == "done" and row.split == "test"
    }
    found = {
        one: trial.read_predictions(state.job.root, row.folder, row.seed)
        for one, row in tested.items()
    }
    return {
        one: _with_subgroups(state, targets_of[one], run)
        for one, run in found.items()
        if run is not None
    }


def _compared(rows: list[ResultRow], entries: list[matrix.MatrixEntry]) -> list[ResultRow]:
    """Fill in the columns that need the comparison of whole entries.

    They are the number of paired seeds, the corrected p value (primary metric only) and the gain
    over the target's best scratch network with the same seed. Only test rows of trials with a
    source have them.
    """
    by_key = {
        (entry.source, entry.backbone, entry.target, entry.technique, entry.label_fraction): entry
        for entry in entries
    }
    tested = [row for row in rows if _is_tested(row)]
    scratch = {
        (row.backbone, row.target, row.label_fraction, row.metric, row.seed, row.fold): row.value
        for row in tested
        if row.source == SCRATCH and results.technique(row) == "scratch"
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        if (
            not _is_tested(row)
            or entry is None
            or row.source == SCRATCH
            or "@" in (row.metric or "")
        ):
            out.append(row)
            continue
        best = scratch.get(
            (entry.baseline, row.target, row.label_fraction, row.metric, row.seed, row.fold)
        )
        baseline_gain = (
            None
            if best is None or row.value is None
            else (row.value - best) * (1 if row.higher_is_better else -1)
        )
        gain_p_holm = entry.gain_p_holm if row.metric == entry.metric else None
        out.append(
            replace(
                row,
                paired_seeds=entry.paired_seeds,
                gain_p_holm=gain_p_holm,
                baseline_gain=baseline_gain,
            )
        )
    return out


def _with_best_baseline(
    rows: list[ResultRow],
    entries: list[matrix.MatrixEntry],
    predictions: Callable[[str, int], stats.RunPredictions | None],
) -> list[ResultRow]:
    """Fill in the gain over the target's best baseline, with the same label fraction and seed."""
    best = {
        (entry.source, entry.backbone, entry.target, entry.technique, entry.label_fraction): entry
        for entry in entries
        if entry.best_baseline
    }
    of_baselines = {
        (
            row.target,
            row.label_fraction,
            results.technique(row),
            row.seed,
            row.fold,
            row.metric,
        ): row
        for row in rows
        if _is_tested(row) and row.backbone == results.NO_BACKBONE
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = best.get(matrix.entry_key(row))
        if entry is None or not _is_tested(row):
            out.append(row)
            continue
        seed_and_fold = row.seed, row.fold
        key = (row.target, row.label_fraction, entry.best_baseline, *seed_and_fold, row.metric)
        gain, low, high = _gain_over(predictions, row, of_baselines.get(key))
        out.append(
            replace(
                row,
                best_baseline=entry.best_baseline,
                best_baseline_gain=gain,
                best_baseline_low=low,
                best_baseline_high=high,
            )
        )
    return out


def _is_tested(row: ResultRow) -> bool:
    """Return whether a row is the test result of a final trial."""
    return (
        row.trial_stage == "final"
        and row.split == "test"
        and bool(row.metric)
        and row.status == "done"
    )


def _by_subgroup(
    state: JobState,
    predictions: Callable[[str, int], stats.RunPredictions | None],
    rows: list[ResultRow],
    one: Trial,
) -> list[ResultRow]:
    """Return rows of a final trial's primary metric, one for each subgroup of the test rows."""
    spec, primary = (
        state.targets[one.target].spec,
        next((row for row in rows if row.trial_id == one.id and row.split == "test"), None),
    )
    run = predictions(one.folder, one.seed) if spec.subgroups and primary is not None else None
    return (
        subgroups.result_rows(_with_subgroups(state, one.target, run), primary)
        if run is not None and primary is not None
        else []
    )


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


def _gain(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    one: Trial,
    against: Trial,
    row: ResultRow,
    records: dict[str, TrialRecord],
) -> dict[str, float]:
    theirs = next(
        (r.value for r in records[against.id].rows if r.split == "test" and r.metric == row.metric),
        None,
    )
    if theirs is None or row.value is None or row.metric is None:
        return {}
    found = _gain_over(predictions, row, replace(row, trial_folder=against.folder, value=theirs))
    names = ("gain", "gain_low", "gain_high")
    known = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    return {"scratch_value": theirs, **known}


def _gain_over(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    row: ResultRow,
    other: ResultRow | None,
) -> matrix.Estimate:
    """Return (gain, low, high) of a trial's row over that of another trial with the same seed.

    What cannot be computed is None.
    """
    if other is None or row.value is None or other.value is None or row.metric is None:
        return None, None, None
    gain = (row.value - other.value) * (1 if row.higher_is_better else -1)
    if "/" in row.metric or "@" in row.metric:
        # of one label or subgroup: the report has its interval over all seeds
        return gain, None, None
    of = metric(row.metric)
    ours, theirs = (predictions(each.folder, each.seed) for each in (row, other))
    can_resample = of.units is not None or of.resampled is not None
    if not can_resample or ours is None or theirs is None:
        return gain, None, None
    return stats.gain(of, [ours], [theirs])


def show(
    state: JobState, rows: list[ResultRow]
) -> tuple[list[matrix.MatrixEntry], tuple[str, str]]:
    """Write the report, and return the entries of the table and the report's two URIs."""
    root = state.job.root
    named = {row.trial_id: f"{row.target}{grid.fold_suffix(row.fold)}" for row in rows}
    rows = results.disambiguate_targets(rows)
    final = [row for row in rows if row.trial_stage == "final"]
    runs = _tested_runs(state, rows, named)
    entries = origins.mark_entries(matrix.matrix_entries(rows, runs), rows, state.trial_provenance)
    curves = {
        name: record.curve
        for name, record in trial.read_records(
            root, {row.trial_id: row.folder for row in final}
        ).items()
    }
    if not state.pretraining:
        state.pretraining = [
            SourceSummary.from_metadata(launch.source_metadata(stage))
            for stage in state.sources.values()
            if stage.has_bundle
        ]
    notes = [*state.notes, *pruning.describe_stale(results.read(root))]
    where = report.write(
        root,
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
            state.source_scores, {name: one.name_in_job for name, one in state.targets.items()}
        ),
        modalities={
            stage.name_in_job: stage.spec.data.modality.name for stage in state.targets.values()
        },
        left_out=[*_left_out(state), *_test_rows_left_out(state)],
    )
    return entries, where


def _splits_of_targets(state: JobState) -> dict[str, str]:
    """Return for each target of the job where its splits come from."""
    out: dict[str, str] = {}
    for stage in state.targets.values():
        count, fold = stage.spec.folds, stage.spec.fold
        where = f"{count} folds, whose test rows are pooled; fold {fold}: " if count else ""
        out.setdefault(stage.name_in_job, where + _describe_splits(state, stage))
    return out


def _describe_splits(state: JobState, stage: TargetStage) -> str:
    gone = state.left_out.get(stage.name)
    description = (
        f"; {gone} of the test rows also stand in a source and were left out (drop_overlap: "
        f"{stage.spec.drop_overlap})"
    )
    return stage.splits.sizes() + (description if gone else "")


def failures(state: JobState, rows: list[ResultRow]) -> list[str]:
    """Return a line for each target that was left out and each trial that failed."""
    return _left_out(state) + sorted(
        {f"{row.trial_name}: {row.error}" for row in rows if row.status == "failed"}
    )


def _test_rows_left_out(state: JobState) -> list[str]:
    """Return a line for each target of which test rows were left out."""
    return [
        f"{name}: {count} test rows that also stand in a source (drop_overlap: "
        f"{state.targets[name].spec.drop_overlap})."
        for name, count in state.left_out.items()
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
