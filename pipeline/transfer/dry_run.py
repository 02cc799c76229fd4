"""A description of what a job would do: stages, trials and cost in trials and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.config import registry
from pipeline.config.schema import FULL, Train
from pipeline.core.contracts import Technique, trains
from pipeline.core.contracts.objective_capabilities import couples_rows
from pipeline.core.contracts.technique_capabilities import adapts_without_labels
from pipeline.io.wording import plural
from pipeline.report import plots
from pipeline.report.code_versions import OTHER, describe_changes
from pipeline.train import loop, optim, source
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
        f"in all: {plural(total, 'trial')}, {plural(steps, 'step')}{unknown}{kept}; "
        f"results in {state.job.root}"
    )
    if allowed is not None:
        spent = float(sum(allocation.cost for allocation in planned.values()))
        lines.append(
            f"budget: at most {spent:.4g} of {allowed} trials are spent; a trial with all its "
            "steps counts as one, a shorter one by its share"
        )
    return [*lines, *_describe_reuse(state)]


def _describe_source(name: str, stage: source.SourceStage) -> list[str]:
    spec, changed = stage.spec, ", ".join(stage.changes())
    done = "done" if stage.done else "to run"
    if changed and stage.remake:
        done = f"{done} again, as it was {OTHER}: {changed}"
    elif changed:
        done = f"{done}, {OTHER}: {changed}; it is used unchanged"
    if stage.splits is None:
        return [f"source {name}: {spec.init or spec.backbone} [{done}]"]
    steps = steps_of_source(stage)
    length = f"{spec.train.epochs or 1:g} epochs in steps"
    if isinstance(steps, int):
        length = plural(steps, "step")
    technique = "" if spec.technique == FULL else f" with {spec.technique}"
    assert spec.objective is not None
    takes_last = couples_rows(registry.get("objective", spec.objective.name))
    return [
        f"source {name}: {spec.backbone} by {spec.objective}{technique}, {length} of "
        f"{_size(spec.train)} on {spec.workers} {'rank' if spec.workers == 1 else 'ranks'}; "
        f"{stage.splits.sizes()} [{done}]",
        *_idle_patience(f"source {name}", spec.train, steps, takes_last),
        *_slow_average(f"source {name}", spec.train, steps),
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


def _slow_average(place: str, train: Train, steps: int | str) -> list[str]:
    """Return a warning where ``train.ema`` is too slow for the steps of a run."""
    text = optim.describe_slow_average(train, steps) if isinstance(steps, int) else ""
    return [f"warning: {place}: {text}"] if text else []


def validations(train: Train, steps: int) -> int:
    """Return how often a run of so many steps is validated."""
    return -(-steps // loop.validation_interval(train, steps))


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
    """The trials that train something; pairs of a budget count as so many whole trials."""


class _PlannedTechnique(NamedTuple):
    """The trials of a technique at each label fraction of a target."""

    technique: Technique
    entries: int
    """Entries of the table: one for each source, or for each scratch network."""
    draws: int
    """Search trials of an entry; 0: nothing is searched."""
    repeats: int
    """Further trials of an entry that try its best draws again."""
    is_solved: bool
    """Whether its heads are solved, which takes no training steps."""

    def trials(self, seeds: int) -> int:
        """Return the number of all its trials, search and final."""
        return self.entries * (self.draws + self.repeats + seeds)


Planned = Mapping[tuple[str, str], budget.Allocation]
"""Target and label fraction to how a budget is spent there (`planned_trials`)."""


def describe_target(state: JobState, name: str, planned: Planned) -> TargetCost:
    """Return what the trials of a target cost.

    Args:
        planned: What is planned where the job has a budget.
    """
    job, stage = state.job, state.targets[name]
    names = _names_of_sources(state, name)
    trained = _planned_techniques(state, name, names)
    cost = TargetCost([])
    for fraction in stage.spec.label_fractions:
        usable = [
            planned_technique
            for planned_technique in trained
            if fraction or adapts_without_labels(planned_technique.technique)
        ]
        _add_fraction(cost, state, stage, fraction, usable, planned)
    cost.lines += _evidence(stage)
    fractions = len([fraction for fraction in stage.spec.label_fractions if fraction])
    techniques = [technique_of(component) for component in grid.techniques(job, stage.spec)]
    # what combines trials does so for each label fraction; what tests a source as it is, once
    per_source = [
        fractions if technique.starts_from == "trials" else 1
        for technique in techniques
        if not trains(technique)
    ]
    untrained = sum(per_source) * len(names)
    if untrained:
        cost.trials += untrained
        cost.lines.append(f"target {name} without training: {plural(untrained, 'final trial')}")
    baselines = [str(component) for component in grid.baselines(job, stage.spec)]
    if baselines:
        count = len(baselines) * fractions * job.fanout.seeds
        cost.trials += count
        trials = plural(count, "final trial")
        cost.lines.append(f"target {name}, baselines {', '.join(baselines)}: {trials}")
    return cost


def _names_of_sources(state: JobState, name: str) -> list[str]:
    """Return the sources that a target's trials start from, as many as scores may choose."""
    names = job_state.matching_sources(state, name)
    by_score = state.job.fanout.by_score
    return names[: by_score.top] if by_score else names


def _planned_techniques(
    state: JobState, name: str, names: Sequence[str]
) -> list[_PlannedTechnique]:
    """Return the techniques of a target that train something, with their numbers of trials.

    Args:
        names: The sources that they start from.
    """
    job, target = state.job, state.targets[name].spec
    in_memory = target.data.decode != "train"  # where it is auto, it is known after reading
    scratch_networks = job_state.num_scratch_networks(state, names)
    out: list[_PlannedTechnique] = []
    for component in grid.techniques(job, target):
        technique = technique_of(component)
        if not trains(technique):
            continue
        settings = grid.draws(job, target, component, in_memory)
        if job.fanout.searcher == "random":
            settings = grid.without_repeats(settings)
        draws = 0 if settings == [{}] else len(settings)
        entries = scratch_networks if technique.starts_from == "random" else len(names)
        repeats = job.fanout.search_finalists.further_trials(draws)
        is_solved = in_memory and grid.is_solved(target, technique)
        out.append(_PlannedTechnique(technique, entries, draws, repeats, is_solved))
    return out


def _add_fraction(
    cost: TargetCost,
    state: JobState,
    stage: TargetStage,
    fraction: grid.Fraction,
    techniques: Sequence[_PlannedTechnique],
    spending: Planned,
) -> None:
    """Add the trials of a target at a label fraction to its cost."""
    seeds = state.job.fanout.seeds
    share = grid.fraction_text(fraction, stage.spec.objective.name)
    place = f"target {stage.name} at {plots.labels_text(share)}"
    allocation = spending.get((stage.name, share))
    rows = stage.num_labelled_rows(fraction) if fraction else stage.num_rows_without_labels
    batch = min(stage.spec.train.global_batch, rows)
    train = stage.spec.train.model_copy(update={"global_batch": batch})
    steps = planned_steps(train, rows, stage.packed)

    entries = sum(planned.entries for planned in techniques)
    final = entries * seeds
    repeated = sum(planned.entries * planned.repeats for planned in techniques)
    searched = repeated + sum(planned.entries * planned.draws for planned in techniques)
    repeated_text = f" ({repeated} of them try the best draws again)" if repeated else ""
    if allocation is not None:
        searched, repeated_text = allocation.num_search_trials, ""
        final -= (allocation.size.pairs - allocation.finalists) * seeds
    cost.trials += searched + final

    longest, length = steps, f"{train.epochs or 1:g} epochs"
    if isinstance(steps, int):
        steps_of_techniques = {
            planned.technique.steps(steps) for planned in techniques if not planned.is_solved
        }
        longest = max(steps_of_techniques, default=steps)
        length = plural(steps, "step")
        if own_steps := sorted(steps_of_techniques - {steps}):
            counts = ", ".join(map(str, own_steps))
            length += f" (techniques with their own number of steps: {counts})"
    else:
        cost.unknown = f" and those to be known {steps}"
    steps_or_none = steps if isinstance(steps, int) else None
    with_all_seeds = techniques
    if allocation is not None:
        pairs = [planned for planned in techniques if planned.technique.starts_from != "random"]
        with_all_seeds = [planned for planned in techniques if planned not in pairs]
        stepped = allocation.stepped_cost
        solved = allocation.cost - allocation.size.scratch - stepped
        networks = max((planned.entries for planned in pairs if planned.is_solved), default=0)
        cost.steps += math.floor(stepped * (steps_or_none or 0))
        cost.groups += [
            TrialGroup(math.ceil(stepped), steps_or_none, rows, False, 0),
            TrialGroup(math.ceil(solved), steps_or_none, rows, True, networks),
        ]
    for planned in with_all_seeds:
        of_trial = None if steps_or_none is None else planned.technique.steps(steps_or_none)
        trials = planned.trials(seeds)
        cost.steps += 0 if planned.is_solved else trials * (of_trial or 0)
        cost.groups.append(
            TrialGroup(trials, of_trial, rows, planned.technique.frozen, planned.entries)
        )

    is_drawn = {"steps", "epochs", "global_batch"} & set(state.job.fanout.stated_search)
    if is_drawn:
        length += " (before search)"
    if solved := {planned.technique.registered_name for planned in techniques if planned.is_solved}:
        length += f" ({', '.join(sorted(solved))}: the head is solved, no training steps)"
    read = plural(rows, "document" if stage.packed else "row")
    labels = "" if fraction else " without labels"
    noun = "entry" if entries == 1 else "entries"
    search = f"{plural(searched, 'search trial')}{repeated_text} and " if searched else ""
    cost.lines.append(
        f"{place}: {entries} {noun}: {search}{plural(final, 'final trial')} of "
        f"{length} on {read}{labels}; {stage.splits.sizes()}"
    )
    if entries and not is_drawn:
        cost.lines += _idle_patience(place, train, longest, takes_last=not fraction)
        cost.lines += _slow_average(place, train, longest)
    if allocation is not None:
        cost.lines.append(f"{place}, budget: {allocation.describe()}")


def _describe_reuse(state: JobState) -> list[str]:
    """Return which results of other code or versions are used unchanged or made again."""
    _, made_by = existing_trials.reusable_results(state)
    are_remade = "trials" in state.remake
    lines = describe_changes(made_by, are_remade)
    if not are_remade:
        return lines
    remade = [name for name, stage in state.sources.items() if stage.remake and stage.changes()]
    if remade:
        lines.append(
            f"the trials of {', '.join(remade)} are made anew too, unless the weights of the "
            "source come out as they were"
        )
    return lines


def _evidence(stage: TargetStage) -> list[str]:
    """Return a sentence on the units of each split that count for a verdict.

    It also says whether the test split has enough of them.
    """
    by_split = stage.evidence()
    if not by_split:
        return []
    test = by_split["test"]
    counts = ", ".join(f"{name} {evidence.count}" for name, evidence in by_split.items())
    if stage.spec.folds:
        test = replace(test, count=sum(evidence.count for evidence in by_split.values()))
        counts += f", tested in all folds {test.count}"
    enough = (
        f"a verdict needs {test.needed} in test"
        if test.enough
        else f"too few for a verdict, which needs {test.needed} in test"
    )
    return [f"target {stage.name}, {test.what}: {counts}; {enough}"]


def _size(train: Train) -> str:
    """Return the size of a batch as text."""
    if train.batch_cost is None:
        return f"{train.global_batch} rows"
    return f"cost {train.batch_cost:g}"
