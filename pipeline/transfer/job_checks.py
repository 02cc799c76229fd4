"""Checks of a job before it runs: problems that stop it, and notes."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import trains
from pipeline.core.contracts.objective_capabilities import names_labels
from pipeline.core.contracts.technique_capabilities import (
    LABELLED_SOURCE,
    NeedsLibrary,
    adapts_without_labels,
)
from pipeline.core.specs import ObjectiveSpec
from pipeline.train import fit_components, source
from pipeline.train.experiment import technique_of
from pipeline.transfer import (
    budget,
    grid,
    label_sets,
    population,
    proposals,
    scoring,
    targets,
)
from pipeline.transfer.job_state import JobState, matching_sources
from pipeline.transfer.targets import TargetStage


def source_problems(state: JobState, target: TargetStage) -> list[str]:
    """Return what is wrong between a target and the sources that it is to be adapted from."""
    names, problems = matching_sources(state, target.name), []
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


def compare_labels(state: JobState, target: TargetStage) -> tuple[list[str], list[str]]:
    """Compare the labels of a target and of its sources, where a technique needs both.

    Returns:
        Problems: why rows or heads of a source cannot serve the target. Notes: labels that only one
        side has.
    """
    problems: dict[str, None] = {}
    notes: dict[str, None] = {}
    for component in target.techniques:
        technique = technique_of(component)
        place = f"targets.{target.name_in_job}: techniques: {component.name}"
        for name in matching_sources(state, target.name):
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
                notes[f"{target.name_in_job}: labels of source {name}, by name: {text}"] = None
    return list(problems), list(notes)


def _fitted_labels(stage: source.SourceStage, objective: str) -> ObjectiveSpec:
    """Return a source's objective with its labels, as far as they can be compared at all."""
    spec, splits = stage.spec, stage.splits
    assert spec.objective is not None and splits is not None
    name = spec.objective.name
    is_comparable = name == objective and names_labels(registry.get("objective", name))
    state = fit_components.fit_objective(spec, splits) if is_comparable else {}
    return ObjectiveSpec(name, {}, state)


def score_problems(job: Job, target: TargetStage) -> list[str]:
    """Return the problem where sources are chosen by a score that the target's rows do not have."""
    select = job.fanout.by_score
    if select is None:
        return []
    score = scoring.scores()[select.score]
    objective = target.spec.objective.name
    kinds = scoring.label_kinds(registry.get("objective", objective), target.state)
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


def budget_problems(job: Job, target: TargetStage) -> list[str]:
    """Return what keeps a budget from being spent on a target."""
    if job.fanout.budget is None:
        return []
    place, train = f"targets.{target.name}", target.spec.train
    rows = min(map(target.num_labelled_rows, target.spec.label_fractions))
    steps = targets.planned_steps(
        train.model_copy(update={"global_batch": min(train.global_batch, rows)}),
        rows,
        target.packed,
    )
    out = [
        f"{place}: techniques: {component.name} combines final trials, of which "
        "fanout.select.budget drops some: leave the technique out, or the budget"
        for component in grid.techniques(job, target.spec)
        if grid.combines_trials(component)
    ]
    if isinstance(steps, int) and steps < budget.MIN_STEPS:
        length = f"steps: {steps}"
        if train.steps is None:
            length = f"epochs: {train.epochs or 1:g} of {rows} rows, so {steps} steps,"
        out.append(
            f"{place}.train.{length} cannot be cut to {budget.RUNGS[0]}, which "
            f"fanout.select.budget tries first: at least {budget.MIN_STEPS} steps, or no budget"
        )
    return out


def search_problems(job: Job, target: TargetStage) -> list[str]:
    """Return what techniques declare to be searched and do not take, or what the search lacks."""
    try:
        proposals.check_installed(job.fanout.searcher)
    except ValueError as error:
        return [str(error)]
    if job.fanout.searcher == "pbt" and (found := population.problems(target.name, target.spec)):
        return found
    if job.fanout.searcher == "bayesopt":
        for component in target.techniques:
            space = grid.search_space(job, target.spec, component)
            choices = [name for name in space.values if not space.is_range(name)]
            if choices:
                return [
                    f"fanout.searcher: bayesopt searches ranges alone, and {component.name} has "
                    f"choices of {', '.join(choices)}: say optuna or hyperopt, or state a range "
                    "(with search: auto, state the option in techniques)"
                ]
    if job.fanout.search != "auto":
        return []
    return [
        f"fanout.search: technique {component.name} declares what it does not take: {problem}"
        for component in target.techniques
        if (problem := grid.search_problem(component))
    ]


def library_problems(state: JobState) -> list[str]:
    """Return a problem for each technique that needs a library which is not installed."""
    components = [
        *(component for target in state.targets.values() for component in target.techniques),
        *(spec.technique for spec in state.job.sources.values()),
    ]
    problems: list[str] = []
    for component in components:
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
        f"baselines: {component.name} can read the rows or predict the labels of no target: leave "
        "it out"
        for component in job.baselines
        if not any(grid.is_suitable(component, target) for target in job.targets.values())
    ]


def repeat_problems(job: Job) -> list[str]:
    """Return a problem for each list that names a thing twice: its trials would be the same."""
    lists: dict[str, Sequence[object]] = {"techniques": job.techniques}
    if job.baselines != "auto":
        lists["baselines"] = job.baselines
    for name, target in job.targets.items():
        place = f"targets.{name}"
        lists[f"{place}.techniques"] = target.techniques or ()
        lists[f"{place}.sources"] = target.sources or ()
        # 1 and 1.0 are equal numbers, but mean one row per class and all rows
        lists[f"{place}.label_fractions"] = [*map(grid.fraction_text, target.label_fractions)]
    return [
        f"{place}: {value} is there twice, and its trials would be the same: leave one out"
        for place, values in lists.items()
        for number, value in enumerate(values)
        if value in values[:number]
    ]


def comparison_notes(job: Job) -> list[str]:
    """Return a sentence on missing targets, or on each one to which no source is transferred."""
    if not job.targets:
        return ["the job has no targets: its sources are pretrained, nothing is compared"]
    return [
        f"targets.{name}: scratch is its only technique, so no source is transferred to it"
        for name, spec in job.targets.items()
        if job.sources
        and all(component.name == "scratch" for component in grid.techniques(job, spec))
    ]


def identity_notes(job: Job) -> list[str]:
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
        f"{place}: its local files are identified by size and modification time, not by content "
        "(data.identity: stat): a change that keeps both is not found, and a copy counts as other "
        "data"
        for place in by_stat
    ]
