"""The trials of a job as far as they are known: draws of the search, finalists, final trials.

Later ones follow from the records of earlier ones.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np

from pipeline.config.schema import ComponentConfig, spec_hash
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.train.experiment import technique_of
from pipeline.transfer import budget, grid, population, proposals, targets, trial
from pipeline.transfer.grid import SCRATCH, BackboneGroup, PlannedEntry, Trial
from pipeline.transfer.job_state import (
    JobState,
    matching_sources,
    num_scratch_networks,
    read_metadata,
)


def _entries(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> list[tuple[str, PlannedEntry]]:
    """Return (target, entry) for each entry of the job."""
    return [
        (name, entry)
        for name in state.targets
        for entry in grid.planned_entries(
            state.job,
            name,
            [group for group in groups if set(group.sources) & set(matching_sources(state, name))],
            chosen[name],
        )
    ]


def _trial(
    state: JobState,
    name: str,
    entry: PlannedEntry,
    hyper: grid.HyperParameters,
    seed: int,
    stage: str,
    members: tuple[Trial, ...] = (),
) -> Trial:
    """Make a trial of an entry, from the keys of its source and of the target's rows."""
    key = state.sources[entry.source].key if entry.source != SCRATCH else ""
    target, technique = state.targets[name], technique_of(entry.technique)
    data_key = target.key
    # at label fraction 0 the unlabelled rows are the training rows, and their number sets the steps
    trains_on_unlabelled = entry.label_fraction == 0 and grid.needs_training(entry.technique)
    if target.unlabelled_key and (trains_on_unlabelled or targets.reads_target(technique)):
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

    An entry with one setting has no search trials.

    Args:
        records: Record of each trial, by its id; None: all that exist.
    """
    if state.job.fanout.trials == 1:
        return []
    known = _search_trials_after(state, groups, chosen, records or {})
    if records is not None or state.job.fanout.searcher == "random":
        return known
    # each generation that has ended makes the next one known
    existing: dict[str, TrialRecord] = {}
    for _ in range(max(proposals.GENERATIONS - 1, population.POINTS)):
        unread = [one for one in known if one.id not in existing]
        existing |= trial.read_records(state.job.root, grid.folders(unread))
        known = _search_trials_after(state, groups, chosen, existing)
    return known


def _search_trials_after(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    records: Mapping[str, TrialRecord],
) -> list[Trial]:
    """Return the search trials that are known once the trials with these records have ended."""
    streamed = _streamed(state)
    values = {trial_id: validation_value(record) for trial_id, record in records.items()}
    curves = {trial_id: validation_curve(record) for trial_id, record in records.items()}
    out: list[Trial] = []
    for name, entry in _entries(state, groups, chosen):
        if grid.needs_training(entry.technique):
            out += proposals.search_trials(
                state.job,
                state.job.targets[name],
                entry.technique,
                f"{name}|{entry.group.key}" not in streamed,
                partial(_trial, state, name, entry, seed=grid.SEARCH_SEED, stage="search"),
                values,
                curves,
            )
    return out


def _streamed(state: JobState) -> list[str]:
    """Return ``target|key of a backbone group`` of the rows that are not held in memory."""
    if state.streamed is None:
        return read_metadata(state).get("streamed", [])
    return state.streamed


def finalist_trials(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    ranked: dict[str, list[dict[str, float]]],
) -> list[Trial]:
    """Return trials of the best few draws of every entry with further seeds.

    Their number is in `Fanout.search_finalists`. There are none where there is a single draw.

    Args:
        ranked: Draws of each entry, the best first.
    """
    spec, out = state.job.fanout.search_finalists, []
    for name, entry in _entries(state, groups, chosen) if ranked else ():
        first = grid.SEARCH_SEED
        of_entry = _trial(state, name, entry, {}, first, "search").entry
        best = ranked.get(of_entry, [])[: spec.top]
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
        if grid.combines_trials(entry.technique):
            combined.append((name, entry))
            continue
        entry_name = _trial(state, name, entry, {}, 0, "final").entry
        if entry_name in cut:
            continue
        hyper = winners.get(entry_name, {})
        out += [
            _trial(state, name, entry, hyper, seed, "final")
            for seed in range(state.job.fanout.seeds if grid.needs_training(entry.technique) else 1)
        ]
    for name, entry in combined:
        members = tuple(
            one
            for one in out
            if (one.source, one.backbone_key, one.target) == (entry.source, entry.group.key, name)
            and grid.takes(entry.technique, one.technique)
            # 1 and 1.0 are equal numbers, but mean one row per class and all rows
            and grid.fraction_text(one.label_fraction) == grid.fraction_text(entry.label_fraction)
        )
        out.append(_trial(state, name, entry, {}, 0, "final", members))
    return [*out, *_baseline_trials(state, groups)]


def _baseline_trials(state: JobState, groups: list[BackboneGroup]) -> list[Trial]:
    """Return the trials of baselines. They read rows as the first backbone group of a target."""
    out: list[Trial] = []
    for name, target in state.targets.items():
        if not grid.baselines(state.job, target.spec):
            continue
        names = set(matching_sources(state, name))
        group = next(group for group in groups if set(group.sources) & names)
        out += grid.baseline_trials(state.job, name, group, target.key, state.ids_in_old_layout)
    return out


def validation_value(record: TrialRecord) -> float | None:
    """Return the primary metric of a trial on validation rows, larger is better.

    It is None where the trial failed, was stopped early or has no value.
    """
    row = _validation_row(record)
    if row is None or row.value is None or math.isnan(row.value):
        return None
    return row.value if row.higher_is_better else -row.value


def _validation_row(record: TrialRecord) -> ResultRow | None:
    """Return the row of a finished trial with its primary metric on validation rows."""
    if record.status != "done":
        return None
    return next((row for row in record.rows if row.metric and row.is_validation), None)


def validation_curve(record: TrialRecord) -> dict[int, float]:
    """Return the primary metric at each validation of a trial, by its step, larger is better.

    It is empty where the trial failed, was stopped early or has no value.
    """
    row = _validation_row(record)
    if row is None or row.metric is None:
        return {}
    sign = 1.0 if row.higher_is_better else -1.0
    values = {point.step: sign * point.metrics.get(row.metric, math.nan) for point in record.curve}
    return {step: value for step, value in values.items() if not math.isnan(value)}


def validation_losses(records: Mapping[str, TrialRecord]) -> dict[str, float]:
    """Return the loss on validation rows of each trial that has a value there, by its id."""
    losses = {
        trial_id: record.validation.get("loss", math.nan)
        for trial_id, record in records.items()
        if validation_value(record) is not None
    }
    return {trial_id: loss for trial_id, loss in losses.items() if not math.isnan(loss)}


def ranked_draws(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, list[dict[str, float]]]:
    """Return a dict from each entry to its draws, the best first.

    Of equally good draws the one that was drawn first comes first.
    """
    return {
        entry: [hyper for hyper, _ in sorted(draws, key=_draw_sort_key, reverse=True)]
        for entry, draws in _validation_values(search, records).items()
    }


def winning_draws(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, dict[str, float]]:
    """Return the best draw of every entry on validation, at equal budget.

    Trials that were stopped early or failed cannot win.
    """
    return {entry: ranked[0] for entry, ranked in ranked_draws(search, records).items()}


def _validation_values(
    search: list[Trial], records: Sequence[TrialRecord | None]
) -> dict[str, list[tuple[dict[str, float], list[float]]]]:
    """Return a dict from each entry to its draws, each with the validation value of every seed.

    Larger values are better. Trials without a record and those that failed, were stopped early or
    have no value are left out.
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


def _draw_sort_key(draw: tuple[dict[str, float], list[float]]) -> tuple[int, float]:
    """Return the sort key of a draw, by the number of finished seeds and then by validation value.

    Draws that were not tried again, or failed with a seed, were found worse.
    """
    _, values = draw
    return len(values), float(np.mean(values))


# ---------------------------------------------------------------- a budget of trials


def planned_allocations(state: JobState) -> dict[tuple[str, str], budget.Allocation]:
    """Map (target, label fraction) to what is planned there before anything has run.

    It is empty where the job has no budget. Before the sources are trained it may count more
    scratch networks than there are (`num_scratch_networks`).

    Raises:
        BudgetError: The budget is too small.
    """
    job, by_score = state.job, state.job.fanout.by_score
    if job.fanout.budget is None:
        return {}
    sizes: dict[tuple[str, str], budget.BracketSize] = {}
    for name, stage in state.targets.items():
        names = matching_sources(state, name)[: by_score.top if by_score else None]
        networks = num_scratch_networks(state, names)
        trained = [
            component
            for component in grid.techniques(job, stage.spec)
            if grid.needs_training(component)
        ]
        competing = [one for one in trained if not grid.starts_random(one)] * len(names)
        in_memory = stage.spec.data.decode != "train"  # where it is auto, it is not known yet
        size = _size(
            [component for component in trained if grid.starts_random(component)] * networks,
            competing,
            sum(in_memory and grid.is_solved(stage.spec, technique_of(one)) for one in competing),
            job.fanout.seeds,
        )
        for fraction in stage.spec.label_fractions:
            sizes[name, grid.fraction_text(fraction, stage.spec.objective.name)] = size
    # refused before a source is trained: heads of targets that turn out too large are not solved
    largest = [
        replace(size, solved=0) if state.targets[name].spec.data.decode == "auto" else size
        for (name, _), size in sizes.items()
    ]
    try:
        budget.allocate(job.fanout.budget, largest, job.fanout.seeds)
    except budget.BudgetError as error:
        if largest == list(sizes.values()):
            raise
        raise budget.BudgetError(
            f"{error}; or say data.decode: memory for targets whose rows fit in memory, where "
            "solved heads take less"
        ) from None
    allocations = budget.allocate(job.fanout.budget, list(sizes.values()), job.fanout.seeds)
    return dict(zip(sizes, allocations, strict=True))


def _size(
    scratch_techniques: Sequence[ComponentConfig],
    pair_techniques: Sequence[ComponentConfig],
    num_solved: int,
    seeds: int,
) -> budget.BracketSize:
    """Return the size of a bracket, given the technique of each of its entries.

    Args:
        num_solved: Number of pairs whose head is solved.
    """
    return budget.BracketSize(
        len(pair_techniques),
        sum(map(budget.relative_cost, scratch_techniques), Fraction(0)) * seeds,
        max(map(budget.relative_cost, pair_techniques), default=Fraction(1)),
        num_solved,
    )


def brackets_of(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    seed: int = grid.SEARCH_SEED,
) -> list[budget.Bracket]:
    """Return the brackets of a job, in the order of its targets and label fractions.

    Args:
        seed: Of the search trials. Final trials never use it: a pair that was kept for a lucky
            seed would carry that luck into its gain.
    """
    entries: dict[tuple[str, str], list[PlannedEntry]] = defaultdict(list)
    for name, entry in _entries(state, groups, chosen):
        if grid.needs_training(entry.technique):
            objective = state.targets[name].spec.objective.name
            entries[name, grid.fraction_text(entry.label_fraction, objective)].append(entry)
    out: list[budget.Bracket] = []
    streamed = _streamed(state)
    for (name, fraction), of_bracket in entries.items():
        spec = state.targets[name].spec
        competing = [entry for entry in of_bracket if not grid.starts_random(entry.technique)]
        pairs: list[budget.Contender] = []
        for entry in competing:
            in_memory = f"{name}|{entry.group.key}" not in streamed
            is_solved = in_memory and grid.is_solved(spec, technique_of(entry.technique))
            settings = [budget.shortened(spec.train, rung) for rung in range(len(budget.RUNGS))]
            trials = [
                _trial(state, name, entry, settings[-1] if is_solved else hyper, seed, "search")
                for hyper in settings
            ]
            pairs.append(budget.Contender(tuple(trials)))
        size = _size(
            [entry.technique for entry in of_bracket if grid.starts_random(entry.technique)],
            [entry.technique for entry in competing],
            sum(pair.is_solved for pair in pairs),
            state.job.fanout.seeds,
        )
        out.append(budget.Bracket(name, fraction, tuple(pairs), size))
    return out


def decide_budget(
    state: JobState,
    groups: list[BackboneGroup],
    chosen: dict[str, set[str]],
    records: Mapping[str, TrialRecord] | None = None,
) -> budget.Decision:
    """Decide which pairs are kept, and note in the state why the others were cut.

    Args:
        records: Record of each trial, by its id; None: all that exist.
    """
    brackets, spec = brackets_of(state, groups, chosen), state.job.fanout
    assert spec.budget is not None
    allocations = budget.allocate(spec.budget, [bracket.size for bracket in brackets], spec.seeds)
    if records is None:
        trials = [one for bracket in brackets for pair in bracket.pairs for one in pair.rungs]
        records = trial.read_records(state.job.root, grid.folders(trials))
    values = {trial_id: validation_value(record) for trial_id, record in records.items()}
    decision = budget.decide(brackets, allocations, values, validation_losses(records))
    state.cut_by_budget = decision.reasons
    return decision


def failed_before(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> dict[str, TrialRecord]:
    """Return the records of search trials that had failed when a budget was spent, by id."""
    ids = read_metadata(state).get("failed_in_budget")
    if "trials" in state.remake or not ids:
        return {}
    pairs = [pair for bracket in brackets_of(state, groups, chosen) for pair in bracket.pairs]
    trials = [one for pair in pairs for one in pair.rungs if one.id in ids]
    records = trial.read_records(state.job.root, grid.folders(trials))
    return {trial_id: record for trial_id, record in records.items() if record.failed}
