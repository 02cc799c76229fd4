"""What a job would do, in words: stages, trials and cost in trials and steps."""

from __future__ import annotations

from pipeline.config.schema import FULL, Train, spec_hash
from pipeline.data.plan import Plan
from pipeline.report.code_versions import OTHER, describe_changes
from pipeline.train import source
from pipeline.train.experiment import technique_of
from pipeline.transfer import grid, stages
from pipeline.transfer.stages import JobState
from pipeline.transfer.targets import TargetStage


def describe(state: JobState) -> list[str]:
    """The resolved stages, trials and cost of ``--dry-run``."""
    job, lines = state.job, []
    for name, stage in state.sources.items():
        changed = ", ".join(stage.changes())
        done = "done" if stage.done else "to run"
        if changed:
            done = (
                f"{done} anew, as it was {OTHER}: {changed}"
                if stage.remake
                else f"{done}, {OTHER}: {changed}; it is used as it is"
            )
        if stage.splits is None:
            lines.append(f"source {name}: {stage.spec.init or stage.spec.backbone} [{done}]")
            continue
        train = stage.spec.train
        rows = len(stage.splits.train)
        steps = _steps(train, rows, stage.packed)
        summary = (
            f"{steps} steps" if isinstance(steps, int) else f"{train.epochs or 1:g} epochs in steps"
        )
        by = f"{stage.spec.objective}"
        if stage.spec.technique != FULL:
            by += f" with {stage.spec.technique}"
        lines.append(
            f"source {name}: {stage.spec.backbone} by {by}, {summary} of "
            f"{_size(train)} on "
            f"{stage.spec.workers} ranks; {stage.splits.sizes()} [{done}]"
        )
    ready = stages.trial_status(state)
    total, steps_total, unknown = 0, 0, ""
    for name, stage in state.targets.items():
        names = stages.matching(state, name)
        if job.fanout.select:
            names = names[: job.fanout.select.top]
        kinds = {_kind(state, n) for n in names}
        plugs = grid.techniques(job, stage.spec)
        untrained = [component for component in plugs if not grid.needs_training(component)]
        fractions = len(stage.spec.label_fractions)
        tried = sum(fractions if grid.combines_trials(one) else 1 for one in untrained) * len(names)
        plugs = [component for component in plugs if grid.needs_training(component)]
        counts = [
            (
                technique_of(component),
                len(kinds) if grid.starts_random(component) else len(names),
            )
            for component in plugs
        ]
        cells = sum(many for _, many in counts)
        tries, seeds = job.fanout.trials if job.fanout.trials > 1 else 0, job.fanout.seeds
        again = job.fanout.search_finalists.further_trials(tries)
        tries += again
        total += len(stage.spec.label_fractions) * cells * (tries + seeds)
        for fraction in stage.spec.label_fractions:
            rows = stage.labelled(fraction)
            train = stage.spec.train.model_copy(
                update={"global_batch": min(stage.spec.train.global_batch, rows)}
            )
            steps = _steps(train, rows, stage.packed)
            summary = (
                f"{steps} steps" if isinstance(steps, int) else f"{train.epochs or 1:g} epochs"
            )
            if isinstance(steps, int):
                steps_total += sum(
                    many * (tries + seeds) * technique.steps(steps) for technique, many in counts
                )
                longer = sorted({technique.steps(steps) for technique, _ in counts} - {steps})
                summary += (
                    f" (with a budget of its own {', '.join(map(str, longer))})" if longer else ""
                )
            else:
                unknown = f" and those to be known {steps}"
            drawn = (
                " (before search)"
                if {"steps", "epochs", "global_batch"} & set(job.fanout.search)
                else ""
            )
            share = grid.fraction_text(fraction, stage.spec.objective.name)
            searched = f"{cells * tries} search" + (
                f" ({cells * again} of them try the best draws again)" if again else ""
            )
            lines.append(
                f"target {name} at {share} labels: {cells} cells = {searched} + "
                f"{cells * seeds} final trials of "
                f"{summary}{drawn} on {rows} {'documents' if stage.packed else 'rows'}; "
                f"{stage.splits.sizes()}"
            )
        lines += _evidence(stage)
        if tried:
            total += tried
            lines.append(f"target {name} without training: {tried} final trials")
    kept = (
        f", {sum(done for _, done in ready)} of the {len(ready)} trials are done" if ready else ""
    )
    lines.append(
        f"in all: {total} trials, {steps_total} steps{unknown}{kept}; results in {job.root}"
    )
    _, origins = stages.reusable_results(state)
    summary = describe_changes(origins)
    if summary and "trials" in state.remake:
        summary[0] = summary[0].partition(" and are used")[0] + " and are made anew"
    anew = [name for name, stage in state.sources.items() if stage.remake and stage.changes()]
    if anew and "trials" in state.remake:
        summary.append(
            f"the trials of {', '.join(anew)} are made anew too, unless the weights of the "
            "source come out as they were"
        )
    return [*lines, *summary]


def _evidence(stage: TargetStage) -> list[str]:
    """How many units of each split tell two networks apart, and whether those of the test split are
    enough for a verdict.
    """
    found = stage.evidence()
    if not found:
        return []
    test = found["test"]
    counts = ", ".join(f"{name} {one.count}" for name, one in found.items())
    enough = (
        f"a verdict needs {test.least} in test"
        if test.enough
        else f"too few to tell anything: a verdict needs {test.least} in test"
    )
    return [f"target {stage.name}, {test.what}: {counts}; {enough}"]


def _steps(train: Train, rows: int, packed: bool) -> int | str:
    """Steps of a run, or when they will be known: into how many rows documents are packed, or into
    how many batches rows are cut, a run finds out.
    """
    if train.steps is not None:
        return train.steps
    if packed:
        return "after packing"
    return (
        "after sorting"
        if train.batch_cost is not None
        else Plan(rows, 0, train.global_batch).steps(train.epochs or 1.0)
    )


def _size(train: Train) -> str:
    return (
        f"{train.global_batch} rows" if train.batch_cost is None else f"cost {train.batch_cost:g}"
    )


def _kind(state: JobState, name: str) -> tuple[str, ...]:
    """What tells apart the networks that scratch is trained for: the backbone and what is fitted on
    a source's rows.
    """
    stage = state.sources[name]
    if stage.splits is None or stage.spec.data is None:
        return (str(stage.spec.backbone), stage.spec.init or "")
    return (
        str(stage.spec.backbone),
        stage.spec.init or "",
        str(stage.spec.data.modality),
        spec_hash(source.data_key(stage.spec.data)),
        stage.splits.fingerprint,
    )
