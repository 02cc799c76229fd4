"""Spend a budget of trials by successive halving over pairs of source and technique.

For each target and label fraction, every pair runs a ninth of the steps, the better ones run all
steps with one seed, and the best run with all seeds (Karnin et al. 2013; Jamieson and Talwalkar
2016). The trials that choose have a seed that no final trial has. Short runs compare the sources of
one technique, since a whole network has hardly moved where another one is at its end. Techniques
are compared with all steps; a pair with a solved head is among these without a further trial, since
its short run is its whole run.

Targets come one after the other: which sources and techniques did well on earlier ones counts.
Every decision is a pure function of the validation values, so that a job that was killed decides
again as it did.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import fmean

from pipeline.config.schema import ComponentConfig, Train, round_hyper_parameter
from pipeline.io.wording import plural
from pipeline.report import plots
from pipeline.report.results import CUT_BY_BUDGET
from pipeline.train.experiment import technique_of
from pipeline.transfer.grid import Trial

RUNGS = (Fraction(1, 9), Fraction(1))
"""Shares of the steps that pairs are tried with, before the best run with every seed."""
MIN_COMPARED_PAIRS = 2
"""Fewest pairs that are compared with all steps, beside those with solved heads."""
MIN_STEPS = RUNGS[0].denominator
"""Steps that a target needs at least, so that the shortest rung has one."""
MANY_STEPS = 10_000
"""A large number of steps: ``technique.steps(MANY_STEPS) / MANY_STEPS`` is how many times the
target's steps a technique trains.
"""


class BudgetError(ValueError):
    """A budget is too small for a job."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A source with a technique, which competes for the budget: one entry of the matrix."""

    rungs: tuple[Trial, ...]
    """Its search trial at each of `RUNGS`."""

    @property
    def is_solved(self) -> bool:
        """Whether its first trial is its last: its head is solved, whatever the steps."""
        return self.rungs[0].id == self.rungs[-1].id

    @property
    def source(self) -> str:
        return self.rungs[0].source

    @property
    def technique(self) -> str:
        return str(self.rungs[0].technique)

    @property
    def entry(self) -> str:
        return self.rungs[0].entry


@dataclass(frozen=True)
class BracketSize:
    """What the cost of a bracket depends on."""

    pairs: int
    scratch: Fraction
    """Cost of what is always trained: scratch with all seeds, in trials."""
    pair_cost: Fraction = Fraction(1)
    """Cost of a trial of a pair: above 1 where a technique takes more steps than it is given."""
    solved: int = 0
    """Pairs whose head is solved: their short run is their whole run."""


@dataclass(frozen=True)
class Bracket:
    """The pairs of one target and label fraction, of which successive halving keeps the best."""

    target: str
    label_fraction: str
    pairs: tuple[Contender, ...]
    size: BracketSize


@dataclass(frozen=True)
class Allocation:
    """How many pairs of a bracket are tried at each rung, and how many are trained in full."""

    size: BracketSize
    seeds: int
    """Number of seeds of a pair that is trained in full."""
    rungs: tuple[int, int]
    """One number for each of `RUNGS`; 0: the rung is left out, since it would cut nothing. Pairs
    with solved heads are in both numbers, and have one trial.
    """
    finalists: int

    @property
    def num_search_trials(self) -> int:
        """The number of trials at all rungs."""
        return sum(self.rungs) - (self.size.solved if all(self.rungs) else 0)

    @property
    def cost(self) -> Fraction:
        """In trials, those of scratch included."""
        of_pairs = _cost(self.rungs, self.finalists, self.seeds, self.size.solved)
        return self.size.scratch + self.size.pair_cost * of_pairs

    @property
    def stepped_cost(self) -> Fraction:
        """The part of the cost that takes training steps, if as many finalists as can be do."""
        solved, stepped = self.size.solved, self.size.pairs - self.size.solved
        first, second = (max(0, count - solved) for count in self.rungs)
        of_pairs = _cost((first, second), min(self.finalists, stepped), self.seeds)
        return self.size.pair_cost * of_pairs

    def num_kept_after(self, rung: int) -> int:
        """Return how many pairs are kept after a rung."""
        return next((count for count in self.rungs[rung + 1 :] if count), self.finalists)

    def text(self) -> str:
        """Return the rungs in words."""
        tried = [
            f"{count} with {steps_text(share)}"
            for count, share in zip(self.rungs, RUNGS, strict=True)
            if count
        ]
        return ", ".join([*tried, f"{self.finalists} with {plural(self.seeds, 'seed')}"])

    def describe(self) -> str:
        """Return what the bracket spends: scratch, each rung, and the sum in trials."""
        if not self.size.pairs:
            return f"{_number(self.cost)} trials of scratch"
        return (
            f"{plural(self.size.pairs, 'pair')} of source and technique: {self.text()}; with "
            f"{_number(self.size.scratch)} trials of scratch it costs {_number(self.cost)} trials"
        )


def steps_text(share: Fraction) -> str:
    """Return a share of the steps in words."""
    return "all steps" if share == 1 else f"{share} of the steps"


# ---------------------------------------------------------------- how much each bracket may spend


def relative_cost(component: ComponentConfig) -> Fraction:
    """Return how many times the steps that a target gives a technique takes (`Technique.steps`)."""
    return Fraction(technique_of(component).steps(MANY_STEPS), MANY_STEPS)


def allocate(budget: int, sizes: Sequence[BracketSize], seeds: int) -> list[Allocation]:
    """Share the budget of a job out over its brackets.

    Each has what it needs at least, and a part of the rest by its number of pairs. What one leaves
    over goes to the next.

    Args:
        budget: Full-length trials of the whole job, those of scratch included.
        seeds: Number of seeds of a pair that is trained in full.

    Raises:
        BudgetError: The budget is too small to try every pair.
    """
    least = [size.scratch + size.pair_cost * _minimum_cost(size, seeds) for size in sizes]
    rest = budget - sum(least)
    if rest < 0:
        scratch = sum(size.scratch for size in sizes)
        raise BudgetError(
            f"fanout.select.budget: {budget} trials are too few for this job: scratch takes "
            f"{_number(scratch)}, and {_number(sum(least) - scratch)} more are needed to try every "
            f"source with every technique with {steps_text(RUNGS[0])}, {MIN_COMPARED_PAIRS} of "
            "them with all, and the best of each target and label fraction with "
            f"{plural(seeds, 'seed')}: give at least {math.ceil(sum(least))}, or fewer "
            "techniques, sources, label fractions or seeds"
        )
    weights = [size.pairs * size.pair_cost for size in sizes]
    out, left_over = [], Fraction(0)
    for size, needed, weight in zip(sizes, least, weights, strict=True):
        own_budget = needed + left_over + (rest * weight / sum(weights) if weight else 0)
        rungs, finalists = _rungs(size, (own_budget - size.scratch) / size.pair_cost, seeds)
        out.append(Allocation(size, seeds, rungs, finalists))
        left_over = own_budget - out[-1].cost
    return out


def _minimum_cost(size: BracketSize, seeds: int) -> Fraction:
    """Return the least cost of finding one pair and training it with every seed."""
    stepped = size.pairs - size.solved
    short = size.pairs * RUNGS[0] + min(MIN_COMPARED_PAIRS, stepped)
    whole = size.solved * RUNGS[0] + stepped
    return min(Fraction(size.pairs * seeds), min(short, whole) + seeds)


def _cost(rungs: Sequence[int], finalists: int, seeds: int, solved: int = 0) -> Fraction:
    """Return what pairs cost; a solved head costs the share of the first rung, at whichever rung.

    Args:
        solved: Number of pairs with solved heads, which are in the count of each rung.
    """
    first, second = rungs
    tried = (first or solved) * RUNGS[0] + (second - solved) * RUNGS[1] if second else Fraction(0)
    return tried + finalists * seeds


def _rungs(size: BracketSize, budget: Fraction, seeds: int) -> tuple[tuple[int, int], int]:
    """Return how many pairs are tried at each rung, and how many with every seed.

    There are as many of these as the budget allows when every rung cuts the same share of the
    pairs. What is left then is for the second rung. The first is left out where trying every pair
    at the second costs no more.
    """
    pairs, solved = size.pairs, size.solved
    if pairs * seeds <= budget:
        return (0, 0), pairs
    for finalists in range(min(pairs - 1, math.floor(budget / seeds)), 0, -1):
        if _cost((0, pairs), finalists, seeds, solved) <= budget:
            return (0, pairs), finalists
        stepped = math.floor(budget - finalists * seeds - pairs * RUNGS[0])
        is_enough = stepped + solved >= math.ceil(math.sqrt(pairs * finalists))
        if finalists == 1 or (is_enough and stepped >= MIN_COMPARED_PAIRS):
            return (pairs, stepped + solved), finalists
    raise AssertionError(f"{budget} trials are too few for any of {pairs} pairs")


def _number(value: Fraction | int) -> str:
    return f"{float(value):.4g}"


def shortened(train: Train, rung: int) -> dict[str, float]:
    """Return the hyper-parameters of a trial at a rung: its steps, or its epochs.

    Where the target states neither, it has one epoch.
    """
    if RUNGS[rung] == 1:
        return {}
    if train.steps is not None:
        return {"steps": math.floor(train.steps * RUNGS[rung])}
    epochs = (train.epochs or 1.0) * float(RUNGS[rung])
    return {"epochs": round_hyper_parameter("epochs", epochs)}


# ---------------------------------------------------------------- which pairs are kept


@dataclass
class History:
    """How sources and techniques did on earlier targets.

    A rank is between 0 (the best) and 1 (the worst). What is not known counts as 0.5.
    """

    sources: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Ranks of each source among the sources of each technique."""
    techniques: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Ranks of the best pair of each technique, among pairs with all steps."""

    def source(self, pair: Contender) -> float:
        """Return the mean rank of a pair's source."""
        return _mean(self.sources.get(pair.source))

    def technique(self, pair: Contender) -> float:
        """Return the mean rank of a pair's technique."""
        return _mean(self.techniques.get(pair.technique))

    def add(self, bracket: _BracketResult) -> None:
        """Add what a bracket that is decided has shown."""
        for pair, rank in bracket.ranks_among_sources.items():
            self.sources[pair.source].append(rank)
        best: dict[str, float] = {}
        for pair, rank in bracket.ranks_with_all_steps.items():
            best[pair.technique] = min(rank, best.get(pair.technique, 1.0))
        for technique, rank in best.items():
            self.techniques[technique].append(rank)


def _mean(ranks: Sequence[float] | None) -> float:
    return fmean(ranks) if ranks else 0.5


@dataclass(frozen=True)
class Decision:
    """Which pairs are kept, as far as the values of ended trials decide it."""

    tried: tuple[Trial, ...] = ()
    """Search trials with a value."""
    waiting: tuple[Trial, ...] = ()
    """Search trials that must run before anything further can be decided."""
    rung: str = ""
    """The target and rung of those, for the progress line."""
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    """Why a pair was cut, by the id of its last trial."""
    cut: frozenset[str] = frozenset()
    """Entries of the pairs that were cut."""
    notes: tuple[str, ...] = ()
    """A sentence on every bracket that is decided."""

    @property
    def search(self) -> list[Trial]:
        """The search trials that are known so far."""
        return [*self.tried, *self.waiting]


def decide(
    brackets: Sequence[Bracket],
    allocations: Sequence[Allocation],
    values: Mapping[str, float | None],
    losses: Mapping[str, float] | None = None,
) -> Decision:
    """Decide which pairs are kept.

    Args:
        brackets: The brackets, target by target.
        allocations: What each may spend (`allocate`).
        values: Value of each trial on validation rows, by its id, larger is better; None: it failed
            or has no value. Trials that have not ended are left out.
        losses: Loss on validation rows of each that has a value. It compares trials of equal value:
            several may predict all of few rows correctly or, after a short run, no word or box.
    """
    history, out = History(), Decision()
    for target in dict.fromkeys(bracket.target for bracket in brackets):
        of_target = [
            _decide(bracket, allocation, values, losses or {}, history)
            for bracket, allocation in zip(brackets, allocations, strict=True)
            if bracket.target == target
        ]
        for result in of_target:
            out = replace(
                out,
                tried=(*out.tried, *result.tried),
                waiting=(*out.waiting, *result.waiting),
                reasons=out.reasons | result.reasons,
                cut=out.cut | {pair.entry for pair in result.cut},
                notes=(*out.notes, *result.notes),
            )
        if out.waiting:
            rungs = sorted({result.rung for result in of_target if result.waiting})
            return replace(out, rung=f"{target}, rung {' and '.join(map(str, rungs))}")
        for result in of_target:
            history.add(result)
    return out


@dataclass
class _BracketResult:
    """The decisions of one bracket."""

    kept: list[Contender]
    cut: list[Contender] = field(default_factory=list[Contender])
    tried: list[Trial] = field(default_factory=list[Trial])
    waiting: list[Trial] = field(default_factory=list[Trial])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    rung: int = 0
    ranks_among_sources: dict[Contender, float] = field(default_factory=dict[Contender, float])
    """Ranks among the sources of one technique, at the first rung."""
    ranks_with_all_steps: dict[Contender, float] = field(default_factory=dict[Contender, float])
    """Ranks among the pairs with all steps."""


def _decide(
    bracket: Bracket,
    allocation: Allocation,
    values: Mapping[str, float | None],
    losses: Mapping[str, float],
    history: History,
) -> _BracketResult:
    """Decide on the pairs of one bracket, as far as its trials have ended."""
    out = _BracketResult(list(bracket.pairs))
    stages = [i for i, n in enumerate(allocation.rungs) if n]
    for number, rung in enumerate(stages, 1):
        trials = {pair: pair.rungs[rung] for pair in out.kept}
        out.rung, out.waiting = number, [one for one in trials.values() if one.id not in values]
        out.tried += [one for one in trials.values() if one.id in values and one not in out.tried]
        if out.waiting:
            return out
        measured = {
            pair: (_sort_value(values[one.id]), -losses.get(one.id, math.inf))
            for pair, one in trials.items()
        }
        out.ranks_among_sources = out.ranks_among_sources or ranks_among_sources(measured)
        if RUNGS[rung] == 1:
            out.ranks_with_all_steps = relative_ranks(measured)
            ranked = sorted(measured, key=out.ranks_with_all_steps.__getitem__)
        else:
            ranked = rank_short_runs(measured, history)
            ranked.sort(key=lambda pair: not pair.is_solved)
        keep = allocation.num_kept_after(rung)
        for rank, pair in enumerate(ranked[keep:], keep + 1):
            has_value = _sort_value(values[trials[pair].id]) > -math.inf
            why = f"rank {rank} of {len(ranked)}" if has_value else "no value on validation rows"
            out.reasons[trials[pair].id] = (
                f"{CUT_BY_BUDGET} after rung {number} of {len(stages)} "
                f"({steps_text(RUNGS[rung])}): {why}"
            )
        out.kept, out.cut = ranked[:keep], [*out.cut, *ranked[keep:]]
    if stages:
        named = ", ".join(f"{pair.source} · {pair.technique}" for pair in out.kept)
        labels = plots.labels_text(bracket.label_fraction)
        out.notes.append(
            f"{bracket.target} at {labels}: the budget trained {named} with "
            f"every seed and cut {len(out.cut)} of {len(bracket.pairs)} pairs of source and "
            "technique"
        )
    return out


def _sort_value(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


Measured = Mapping[Contender, tuple[float, float]]
"""For each pair its value on validation rows, larger is better, and its negated loss for ties."""


def relative_ranks(measured: Measured) -> dict[Contender, float]:
    """Return the rank of each pair by its value, 0 for the best and 1 for the worst."""
    most = max(1, len(measured) - 1)
    return {
        pair: sum(other > value for other in measured.values()) / most
        for pair, value in measured.items()
    }


def ranks_among_sources(measured: Measured) -> dict[Contender, float]:
    """Return the rank of each pair among those with the same technique."""
    out: dict[Contender, float] = {}
    for technique in {pair.technique for pair in measured}:
        out |= relative_ranks(
            {p: value for p, value in measured.items() if p.technique == technique}
        )
    return out


def rank_short_runs(measured: Measured, history: History) -> list[Contender]:
    """Return pairs by short runs, the best first.

    1. The pair with the largest value.
    2. The best source of each technique, then the second best of each, and so on. Among those,
       techniques that did well on earlier targets come first, and then larger values.

    Each technique ranks its sources by the sum of three ranks: the pair's own among them, the mean
    rank of its source over all techniques, and that on earlier targets. One short run is noisy,
    and sources differ more lastingly.

    Args:
        measured: What each pair reached.
        history: What earlier targets have shown.
    """
    own, among_all = ranks_among_sources(measured), relative_ranks(measured)
    of_source: dict[str, list[float]] = defaultdict(list)
    for pair, rank in own.items():
        of_source[pair.source].append(rank)
    round_of: dict[Contender, int] = {}
    for technique in {pair.technique for pair in measured}:
        ranked = sorted(
            (pair for pair in measured if pair.technique == technique),
            key=lambda pair: own[pair] + fmean(of_source[pair.source]) + history.source(pair),
        )
        round_of |= {pair: number for number, pair in enumerate(ranked)}
    best = max(measured, key=measured.__getitem__)
    return sorted(
        measured,
        key=lambda pair: (
            pair is not best,
            round_of[pair],
            history.technique(pair) + among_all[pair],
        ),
    )
