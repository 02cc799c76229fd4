"""A description of what a job would do: stages, trials and cost in trials and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.config import registry
from pipeline.config.schema import FULL, Train
from pipeline.core.contracts import trains
from pipeline.core.contracts.objective_capabilities import couples_rows
from pipeline.core.contracts.technique_capabilities import adapts_without_labels
from pipeline.report.code_versions import OTHER, describe_changes
from pipeline.train import source
from pipeline.train.experiment import technique_of
from pipeline.transfer import budget, existing_trials, grid, job_state, planned_trials
from pipeline.transfer.job_state import JobState
from pipeline.transfer.targets import TargetStage, planned_steps


def describe(state: JobState) -> list[str]:
    """Return the text of ``--dry-run``: the resolved stages, trials and cost."""
    lines: list[str] = []
    for name, stage in state.sources.items():
        lines += _describe_source(name, stage)
    allowed, planned = state.job.fanout.budget, planned_trials.planned_allocations(state)
    total, steps, unknown = 0, 0, ""
    for name in state.targets:
        cost = describe_target(state, name, planned)
        lines += cost.lines
        total, steps, unknown = total + cost.trials, steps + cost.steps, cost.unknown or unknown
    status = existing_trials.trial_status(state)
    done = sum(is_done for _, is_done in status)
    kept = f", {done} of the {len(status)} trials are done" if status else ""
    lines.append(
        f"in all: {total} trials, {steps} steps{unknown}{kept}; results in {state.job.root}"
    )
    if allowed is not None:
        spent = float(sum(one.cost for _, one in planned.values()))
        lines.append(
            f"budget: at most {spent:.4g} of {allowed} trials are spent; a trial with all its "
            "steps counts as one, a shorter one by its share"
        )
    return [*lines, *_describe_reuse(state)]


def _describe_source(name: str, stage: source.SourceStage) -> list[str]:
    spec, changed = stage.spec, ", ".join(stage.changes())
    done = "done" if stage.done else "to run"
    if changed and stage.remake:
        done = f"{done} anew, as it was {OTHER}: {changed}"
    elif changed:
        done = f"{done}, {OTHER}: {changed}; it is used as it is"
    if stage.splits is None:
        return [f"source {name}: {spec.init or spec.backbone} [{done}]"]
    steps = steps_of_source(stage)
    length = f"{spec.train.epochs or 1:g} epochs in steps"
    if isinstance(steps, int):
        length = f"{steps} steps"
    technique = "" if spec.technique == FULL else f" with {spec.technique}"
    assert spec.objective is not None
    takes_last = couples_rows(registry.get("objective", spec.objective.name))
    return [
        f"source {name}: {spec.backbone} by {spec.objective}{technique}, {length} of "
        f"{_size(spec.train)} on {spec.workers} {'rank' if spec.workers == 1 else 'ranks'}; "
        f"{stage.splits.sizes()} [{done}]",
        *_idle_patience(f"source {name}", spec.train, steps, takes_last),
    ]


def _idle_patience(place: str, train: Train, steps: int | str, takes_last: bool) -> list[str]:
    """Return a warning where ``train.patience`` cannot end a run before its last step.

    Args:
        place: What is trained, in words.
        takes_last: Whether the last weights are kept whatever validation says.
    """
    if train.patience is None:
        return []
    if takes_last:
        why = "as the last weights are always taken"
        return [f"warning: {place}: train.patience is ignored, {why}"]
    if not isinstance(steps, int):
        return []
    count = validations(train, steps)
    # the first validation is the best so far, and after the last one no step is left
    if train.patience <= count - 2:
        return []
    return [
        f"warning: {place}: train.patience: {train.patience} ends no run early, as {steps} steps "
        f"have {count} validations: lower it or train.eval_every_steps"
    ]


def validations(train: Train, steps: int) -> int:
    """Return how often a run of so many steps is validated."""
    return -(-steps // (train.eval_every_steps or max(1, steps // 5)))


def steps_of_source(stage: source.SourceStage) -> int | str:
    """Return the steps of a source with data, or a text where they are not known yet."""
    assert stage.splits is not None
    return planned_steps(stage.spec.train, len(stage.splits.train), stage.packed)


class TrialGroup(NamedTuple):
    """Trials that each take the same time."""

    trials: int
    steps: int | None
    """Steps of a trial; None: they are not known yet."""
    rows: int
    """Rows that a trial is trained on."""
    is_frozen: bool
    """Whether they train heads on features that are computed once."""
    networks: int
    """How many networks the trials start from."""


@dataclass
class TargetCost:
    """The cost of a target's trials, as text and as numbers."""

    lines: list[str]
    trials: int = 0
    steps: int = 0
    unknown: str = ""
    """A sentence that further steps are not known yet, or an empty string."""
    groups: list[TrialGroup] = field(default_factory=list[TrialGroup])
    """The trials that train something; those of a budget count as so many whole ones."""


def describe_target(
    state: JobState,
    name: str,
    planned: Mapping[tuple[str, str], tuple[budget.BracketSize, budget.Allocation]],
) -> TargetCost:
    job, stage = state.job, state.targets[name]
    names = job_state.matching_sources(state, name)
    if job.fanout.by_score:
        names = names[: job.fanout.by_score.top]
    techniques = [technique_of(component) for component in grid.techniques(job, stage.spec)]
    trained = [one for one in techniques if trains(one)]
    # what combines trials does so for each label fraction; what tests a source as it is, once
    fractions = len([fraction for fraction in stage.spec.label_fractions if fraction])
    others = [one for one in techniques if not trains(one)]
    repeats = [fractions if one.starts_from == "trials" else 1 for one in others]
    untrained = sum(repeats) * len(names)
    from_random = job_state.num_scratch_networks(state, names)
    components = [one for one in grid.techniques(job, stage.spec) if grid.needs_training(one)]
    in_memory = stage.spec.data.decode != "train"  # where it is auto, it is known after reading
    draws = [len(grid.draws(job, stage.spec, component, in_memory)) for component in components]
    finalists, seeds = job.fanout.search_finalists, job.fanout.seeds
    all_counts = [
        (
            one,
            from_random if one.starts_from == "random" else len(names),
            number if number > 1 else 0,  # a single draw needs no search
            finalists.further_trials(number),
        )
        for one, number in zip(trained, draws, strict=True)
    ]
    is_drawn = {"steps", "epochs", "global_batch"} & set(job.fanout.stated_search)
    cost = TargetCost([])
    for fraction in stage.spec.label_fractions:
        counts = [one for one in all_counts if fraction or adapts_without_labels(one[0])]
        entries = sum(count for _, count, _, _ in counts)
        tried_again = sum(count * again for _, count, _, again in counts)
        searched = tried_again + sum(count * number for _, count, number, _ in counts)
        again_text = f" ({tried_again} of them try the best draws again)" if tried_again else ""
        final = entries * seeds
        share = grid.fraction_text(fraction, stage.spec.objective.name)
        size, allocation = planned.get((name, share), (None, None))
        if size is not None and allocation is not None:
            searched, again_text = sum(allocation.rungs), ""
            final -= (size.pairs - allocation.finalists) * seeds
        rows = stage.labelled(fraction) if fraction else stage.rows_without_labels
        batch = min(stage.spec.train.global_batch, rows)
        train = stage.spec.train.model_copy(update={"global_batch": batch})
        steps = planned_steps(train, rows, stage.packed)
        longest = steps
        length = f"{train.epochs or 1:g} epochs"
        if isinstance(steps, int):
            longest = max((technique.steps(steps) for technique, *_ in counts), default=steps)
            length = f"{steps} steps"
            cost.steps += (
                math.floor(allocation.cost * steps)
                if allocation is not None
                else sum(
                    (number + again + seeds) * count * technique.steps(steps)
                    for technique, count, number, again in counts
                )
            )
            longer = sorted({technique.steps(steps) for technique, *_ in counts} - {steps})
            if longer:
                length += f" (with a budget of its own {', '.join(map(str, longer))})"
        else:
            cost.unknown = f" and those to be known {steps}"
        if size is not None and allocation is not None:
            whole = steps if isinstance(steps, int) else None
            cost.groups.append(TrialGroup(math.ceil(allocation.cost), whole, rows, False, 0))
            counts = []
        cost.groups += [
            TrialGroup(
                (number + again + seeds) * count,
                technique.steps(steps) if isinstance(steps, int) else None,
                rows,
                technique.frozen,
                count,
            )
            for technique, count, number, again in counts
        ]
        if is_drawn:
            length += " (before search)"
        cost.trials += searched + final
        unit = "documents" if stage.packed else "rows"
        labels = "" if fraction else " without labels"
        noun = "entry" if entries == 1 else "entries"
        search = f"{searched} search trials{again_text} and " if searched else ""
        cost.lines.append(
            f"target {name} at {share} labels: {entries} {noun}: {search}{final} final trials of "
            f"{length} on {rows} {unit}{labels}; {stage.splits.sizes()}"
        )
        if entries and not is_drawn:
            place = f"target {name} at {share} labels"
            cost.lines += _idle_patience(place, train, longest, takes_last=not fraction)
        if size is not None and allocation is not None:
            spent = budget.describe(allocation, size, seeds)
            cost.lines.append(f"target {name} at {share} labels, budget: {spent}")
    cost.lines += _evidence(stage)
    if untrained:
        cost.trials += untrained
        cost.lines.append(f"target {name} without training: {untrained} final trials")
    baselines = [str(component) for component in grid.baselines(job, stage.spec)]
    if baselines:
        count = len(baselines) * len(list(filter(None, stage.spec.label_fractions))) * seeds
        cost.trials += count
        cost.lines.append(f"target {name}, baselines {', '.join(baselines)}: {count} final trials")
    return cost


def _describe_reuse(state: JobState) -> list[str]:
    """Return which results of other code or versions are used as they are or made again."""
    _, made_by = existing_trials.reusable_results(state)
    lines = describe_changes(made_by)
    if "trials" not in state.remake:
        return lines
    if lines:
        lines[0] = lines[0].partition(" and are used")[0] + " and are made anew"
    anew = [name for name, stage in state.sources.items() if stage.remake and stage.changes()]
    if anew:
        lines.append(
            f"the trials of {', '.join(anew)} are made anew too, unless the weights of the source "
            "come out as they were"
        )
    return lines


def _evidence(stage: TargetStage) -> list[str]:
    """Return the number of units in each split that count for a verdict.

    The sentence also says whether the test split has enough of them.
    """
    found = stage.evidence()
    if not found:
        return []
    test = found["test"]
    counts = ", ".join(f"{name} {one.count}" for name, one in found.items())
    if stage.spec.folds:
        test = replace(test, count=sum(one.count for one in found.values()))
        counts += f", tested in all folds {test.count}"
    enough = (
        f"a verdict needs {test.least} in test"
        if test.enough
        else f"too few to tell anything: a verdict needs {test.least} in test"
    )
    return [f"target {stage.name}, {test.what}: {counts}; {enough}"]


def _size(train: Train) -> str:
    """Return the size of a batch as text."""
    if train.batch_cost is None:
        return f"{train.global_batch} rows"
    return f"cost {train.batch_cost:g}"
