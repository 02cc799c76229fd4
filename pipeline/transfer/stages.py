"""A job's stages in order: sources, scores, trials, results, report. Each is keyed: what is done is not done again."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline import bundle, registry, storage
from pipeline.job import Job, spec_hash
from pipeline.metrics import metric
from pipeline.train import launch, source
from pipeline.train.progress import Progress
from pipeline.transfer import cells as matrix
from pipeline.transfer import fanout, report, results, scores, stats, targets, trial, trials
from pipeline.transfer.targets import TargetStage
from pipeline.transfer.trial import Shared
from pipeline.transfer.trials import SCRATCH, Base, Trial


@dataclass
class State:
    """What the stages of one command know so far."""

    job: Job
    progress: Progress
    verbose: bool = False
    growing: bool = False
    sources: dict[str, source.SourceStage] = field(default_factory=dict)
    targets: dict[str, TargetStage] = field(default_factory=dict)
    pretraining: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(job: Job, progress: Progress, **options: Any) -> State:
    """Everything that can be known before anything starts: data, columns, splits, storage. Raises ValueError with all problems."""
    storage.check_writable(job.root)
    state, problems = State(job, progress, **options), []

    def each(make: Callable[[Job, str], Any], names, into: dict[str, Any]) -> None:
        for name in names:
            try:
                into[name] = make(job, name)
            except (ValueError, storage.StorageError) as error:
                problems.append(str(error))

    each(source.stage, job.sources, state.sources)
    each(targets.stage, job.targets, state.targets)
    for name, target in state.targets.items():
        if not problems and not _matching(state, name):
            problems.append(f"targets.{name}: no source reads {target.spec.data.modality.name}; add one or name it in sources")
    if problems:
        raise ValueError("\n".join(problems))
    return state


def _modality_name(stage: source.SourceStage) -> str | None:
    if stage.spec.data is not None:
        return stage.spec.data.modality.name
    if stage.done:
        return storage.read_json(storage.join(stage.bundle_uri, "manifest.json"))["modality"]["name"]
    return "image" if stage.spec.backbone.name.startswith("timm") else "text"


def _matching(state: State, target: str) -> list[str]:
    """Sources that a target fans out: those it names, or all of its modality."""
    spec = state.job.targets[target]
    named = spec.sources if spec.sources is not None else list(state.sources)
    return [n for n in named if n in state.sources and _modality_name(state.sources[n]) == spec.data.modality.name]


def describe(state: State) -> list[str]:
    """The resolved stages, trials and cost of ``--dry-run``."""
    job, lines = state.job, []
    for name, stage in state.sources.items():
        done = "done" if stage.done else "to run"
        if stage.splits is None:
            lines.append(f"source {name}: {stage.spec.init or stage.spec.backbone} [{done}]")
            continue
        train = stage.spec.train
        steps = str(train.steps) if train.steps else ("after packing" if stage.packed else str(source.steps_of(train, len(stage.splits.train))))
        lines.append(f"source {name}: {stage.spec.backbone} by {stage.spec.objective}, {steps} steps of {train.global_batch} rows on "
                     f"{stage.spec.workers} ranks; {stage.splits.sizes()} [{done}]")
    total = steps_total = 0
    for name, stage in state.targets.items():
        names = _matching(state, name)
        if job.fanout.select:
            names = names[:job.fanout.select.top]
        kinds = {(str(job.sources[n].backbone), str(data.modality) if (data := job.sources[n].data) else "") for n in names}
        plugs = trials.techniques(job, stage.spec)
        moving = [p for p in plugs if registry.get("technique", p.name).from_source]
        cells = (len(plugs) - len(moving)) * len(kinds) + len(moving) * len(names)
        for fraction in stage.spec.label_fractions:
            search = cells * job.fanout.trials if job.fanout.trials > 1 else 0
            final = cells * job.fanout.seeds
            rows = len(stage.splits.train) if isinstance(fraction, int) else int(fraction * len(stage.splits.train))
            train = stage.spec.train
            steps = train.steps or source.steps_of(train, max(rows, 1))
            total, steps_total = total + search + final, steps_total + (search + final) * steps
            lines.append(f"target {name} at {trials.fraction_text(fraction)} labels: {cells} cells = {search} search + {final} final trials of {steps} steps; "
                         f"{stage.splits.sizes()}")
    lines.append(f"in all: {total} trials, {steps_total} steps; results in {job.root}")
    return lines


def pretrain(state: State) -> None:
    """Every source to its bundle."""
    for name, stage in state.sources.items():
        facts = launch.pretrain(stage, state.progress, state.verbose, state.growing)
        state.pretraining.append(facts)
        if facts.get("cached"):
            state.progress.note(f"{name}: done before ({stage.bundle_uri})")
        else:
            values = ", ".join(f"{k} {v:.4g}" for k, v in facts["metrics"].items())
            state.progress.note(f"{name}: {facts['steps']} steps in {facts['seconds']:.0f} s; validation {values or 'none'}; bundle {stage.bundle_uri}")
        if facts.get("transfer"):
            state.progress.note(f"{name}: {facts['transfer']}")


def share(state: State) -> Shared:
    """What the trials read: weights, decoded targets. Raises ValueError when a source has no bundle yet."""
    job = state.job
    missing = [name for name, stage in state.sources.items() if not stage.done]
    if missing:
        raise ValueError(f"sources {', '.join(missing)} have no bundle yet: run `pretrain` (or `run`) first")
    loaded = {name: targets.weights(stage.bundle_uri) for name, stage in state.sources.items()}
    found = trials.bases({name: (manifest["arch"], manifest["modality"]) for name, (_, manifest) in loaded.items()})
    held: dict[tuple[str, str], trial.TargetData] = {}
    for name, target in state.targets.items():
        by_modality: dict[str, trial.TargetData] = {}
        for base in found:
            if set(base.sources) & set(_matching(state, name)):
                key = spec_hash(base.modality)
                by_modality[key] = held[name, base.key] = by_modality.get(key) or targets.prepare(target, base)
        text = next(iter(by_modality.values())).split_text
        state.progress.note(f"{name}: {text}")
    _note_overlaps(state)
    facts = {"git_sha": _git_sha(), "spec_hash": spec_hash(job), "scores": {}}
    return Shared(job.name, job.root, job.seed, {base.key: base for base in found}, {name: w for name, (w, _) in loaded.items()},
                  {name: stage.bundle_uri for name, stage in state.sources.items()}, held, job.fanout.keep_bundles != "none", facts)


def _note_overlaps(state: State) -> None:
    """Promise 10: rows of a target that also stand in a source are counted and reported."""
    for name, target in state.targets.items():
        for source_name in _matching(state, name):
            stage = state.sources[source_name]
            if stage.splits is None or stage.spec.data is None:
                continue
            role = registry.get("modality", target.spec.data.modality.name).roles[0]
            count = targets.overlap(target.splits.test, target.spec.data.columns[role], stage.splits.train, stage.spec.data.columns[role])
            if count is None:
                state.notes.append(f"{name}: too many rows to look for its test rows in source {source_name}")
            elif count:
                state.notes.append(f"{name}: {count} of {len(target.splits.test)} test rows also stand in source {source_name}")
                state.progress.note(state.notes[-1])


def _git_sha() -> str | None:
    try:
        out = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def score(state: State, shared: Shared) -> list[dict[str, Any]]:
    """Transferability of every source for every target."""
    out = []
    for name in state.targets:
        for base in shared.bases.values():
            for source_name in base.sources:
                if source_name in _matching(state, name) and (name, base.key) in shared.targets:
                    state.progress.update(f"score: {source_name} for {name}")
                    out.append({"target": name, "source": source_name, "backbone": base.label, **scores.score(shared, source_name, base.key, name)})
    return sorted(out, key=lambda row: (row["target"], -row["logme"]))


def _select(state: State, shared: Shared) -> dict[str, set[str]]:
    """Sources to fan out for each target: all, or the best-scored."""
    select = state.job.fanout.select
    chosen = {name: set(_matching(state, name)) for name in state.targets}
    if select is None:
        return chosen
    by_target: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in score(state, shared):
        by_target[row["target"]].append(row)
        shared.facts["scores"][f"{row['source']}|{row['target']}"] = {"score_name": select.score, "score_value": row[select.score]}
    for name, found in by_target.items():
        best = sorted(found, key=lambda row: -row[select.score])[:select.top]
        chosen[name] = {row["source"] for row in best}
        dropped = [row["source"] for row in found if row["source"] not in chosen[name]]
        if dropped:
            state.notes.append(f"{name}: sources kept by {select.score}: {', '.join(sorted(chosen[name]))}; left out: {', '.join(dropped)}")
            state.progress.note(state.notes[-1])
    return chosen


def _cells(state: State, bases: list[Base], chosen: dict[str, set[str]]) -> list[tuple[str, tuple[Base, str, Any, Any]]]:
    return [(name, cell) for name in state.targets
            for cell in trials.cells(state.job, name, [b for b in bases if set(b.sources) & set(_matching(state, name))], chosen[name])]


def _trial(state: State, name: str, cell: tuple[Base, str, Any, Any], hyper: dict[str, float], seed: int, stage: str) -> Trial:
    key = state.sources[cell[1]].key if cell[1] != SCRATCH else ""
    return trials.make(state.job, name, cell, hyper, seed, stage, key, state.targets[name].key)


def search_trials(state: State, bases: list[Base], chosen: dict[str, set[str]]) -> list[Trial]:
    """Every cell with every draw; none when there is only one draw."""
    draws = trials.draws(state.job)
    return [_trial(state, name, cell, hyper, 0, "search") for name, cell in _cells(state, bases, chosen) for hyper in draws] if len(draws) > 1 else []


def final_trials(state: State, bases: list[Base], chosen: dict[str, set[str]], winners: dict[str, dict[str, float]]) -> list[Trial]:
    """Every cell's winner with every seed; a cell whose search has no winner runs with the target's own settings."""
    out = []
    for name, cell in _cells(state, bases, chosen):
        hyper = winners.get(_trial(state, name, cell, {}, 0, "final").cell, {})
        out += [_trial(state, name, cell, hyper, seed, "final") for seed in range(state.job.fanout.seeds)]
    return out


def finetune(state: State, shared: Shared) -> list[Trial]:
    """Search (when there are draws), then every cell's winner with every seed. Returns all trials of the job."""
    job, chosen, bases = state.job, _select(state, shared), list(shared.bases.values())
    resources = launch.resources()
    search = search_trials(state, bases, chosen)
    winners = _winners(search, fanout.run("search", search, shared, job.fanout, resources, state.progress)) if search else {}
    final = final_trials(state, bases, chosen, winners)
    fanout.run("fine-tune", final, shared, job.fanout, resources, state.progress)
    return [*search, *final]


def current(state: State) -> list[dict[str, Any]]:
    """Rows of the results table that belong to the job as it is now."""
    if not all(stage.done for stage in state.sources.values()):
        return []
    manifests = {name: storage.read_json(storage.join(stage.bundle_uri, "manifest.json")) for name, stage in state.sources.items()}
    bases = trials.bases({name: (manifest["arch"], manifest["modality"]) for name, manifest in manifests.items()})
    chosen = {name: set(_matching(state, name)) for name in state.targets}
    search = [(one, record) for one in search_trials(state, bases, chosen) if (record := trial.read_record(state.job.root, one.id))]
    winners = _winners([one for one, _ in search], [record for _, record in search])
    final = final_trials(state, bases, chosen, winners)
    return results.select(results.read(state.job.root), {one.id for one in [*(one for one, _ in search), *final]})


def _winners(search: list[Trial], records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The best draw of every cell on validation, at equal budget; pruned and failed trials do not win."""
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for one, record in zip(search, records, strict=True):
        if record["status"] != "done":
            continue
        row = next(r for r in record["rows"] if r["metric"] and r["split"] == "validation")
        good = row["value"] if row["higher_is_better"] else -row["value"]
        if not np.isnan(good) and (one.cell not in best or good > best[one.cell][0]):
            best[one.cell] = (good, one.hyper_parameters)
    return {cell: hyper for cell, (_, hyper) in best.items()}


def collect(state: State, shared: Shared, found: list[Trial]) -> list[dict[str, Any]]:
    """Records of trials to rows of the results table, with the gain of each over scratch at the same seed."""
    root = state.job.root
    records = {one.id: record for one in found if (record := trial.read_record(root, one.id)) is not None}
    if state.job.fanout.keep_bundles == "best":
        best: dict[str, Any] = {}
        fanout.prune_bundles(root, [one for one in found if one.stage == "final"], "best", best)
        kept = {record["trial_id"] for record in best.values()}
    else:
        kept = set(records)
    scratch = {(one.base, one.target, trials.fraction_text(one.label_fraction), one.seed): one for one in found
               if one.source == SCRATCH and one.stage == "final"}
    rows = []
    for one in found:
        for row in records.get(one.id, {"rows": []})["rows"]:
            row = {**row, "hyper_parameters": json.dumps(row["hyper_parameters"], sort_keys=True), "started_at": datetime.fromtimestamp(row["started_at"], UTC)}
            if one.id not in kept:
                row["bundle_uri"] = None
            against = scratch.get((one.base, one.target, trials.fraction_text(one.label_fraction), one.seed))
            if row["split"] == "test" and against is not None and against.id in records and one.source != SCRATCH:
                row |= _gain(root, one, against, row, records)
            rows.append(row)
    results.append(root, rows)
    return rows


def _gain(root: str, one: Trial, against: Trial, row: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    of = metric(row["metric"])
    theirs = next((r["value"] for r in records[against.id]["rows"] if r["split"] == "test" and r["metric"] == row["metric"]), None)
    if theirs is None:
        return {}
    out = {"scratch_value": theirs, "gain": (row["value"] - theirs) * (1 if of.higher_is_better else -1)}
    ours, scratch = (trial.read_predictions(root, t.id, t.seed) for t in (one, against))
    if of.units is not None and ours is not None and scratch is not None:
        out["gain"], out["gain_low"], out["gain_high"] = stats.gain(of, [ours], [scratch])
    return out


def show(state: State, rows: list[dict[str, Any]]) -> tuple[list[matrix.Cell], tuple[str, str]]:
    """Cells of the job's table, and the written report."""
    root = state.job.root
    final = [row for row in rows if row["trial_stage"] == "final"]
    runs = {row["trial_id"]: run for row in final if row["status"] == "done" and row["split"] == "test"
            and (run := trial.read_predictions(root, row["trial_id"], row["seed"])) is not None}
    cells = matrix.cells(rows, runs)
    curves = {}
    for trial_id in {row["trial_id"] for row in final}:
        record = trial.read_record(root, trial_id)
        if record:
            curves[trial_id] = [{"step": c["step"], "loss": c.get("loss"), "validation": {k: v for k, v in c.items() if k != "step"}} for c in record["curve"]]
    if not state.pretraining:
        state.pretraining = [launch.facts_of(stage) for stage in state.sources.values() if stage.done]
    where = report.write(root, job_name=state.job.name, cells=cells, rows=rows, curves=curves,
                         pretraining=[{**facts, "bundle_uri": facts.get("bundle")} for facts in state.pretraining],
                         splits={name: stage.splits.sizes() for name, stage in state.targets.items()}, notes=state.notes,
                         versions={**bundle.versions(), "job": spec_hash(state.job)})
    return cells, where


def failures(rows: list[dict[str, Any]]) -> list[str]:
    return sorted({f"{row['target']} / {row['technique']} / {row['source']} seed {row['seed']}: {row['error']}" for row in rows if row["status"] == "failed"})
