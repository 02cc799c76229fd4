"""Advice: which source and which technique a target should take, and what is still in doubt.

The gain of every tested (source, technique) over the target's best scratch network is an estimate
with an error. The largest of many estimates is partly luck, so the entries are not compared as they
were measured: each is drawn towards the mean of its like entries, the more the larger its error is
(`stats.shrunken_means`). Like entries have the same modality, objective and metric, whatever their
source, technique, target and job are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from pipeline.report import matrix, results, stats
from pipeline.report.matrix import MIN_SEEDS, SCRATCH, Cell
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

METHOD = (
    "expected gain: the measured gain over the target's best scratch network, drawn towards the "
    "mean of all entries of the same modality, objective and metric by an empirical Bayes estimate "
    "of the normal-normal model (Morris, JASA 1983; Efron & Morris, JASA 1975), with its 95 % "
    "interval; errors of two entries count as independent, which makes doubt rather too large"
)


@dataclass(frozen=True)
class Store:
    """The results of one job."""

    name: str
    """How the advice names it."""
    rows: list[ResultRow]
    runs: dict[str, RunPredictions] = field(default_factory=dict[str, RunPredictions])
    """Trial id to test predictions. Without them intervals are Student's t over seeds."""


@dataclass(frozen=True)
class Advice:
    """What to do with a target at one label fraction, in words.

    Attributes:
        source: The source to use; None: train from scratch, or there is not enough evidence.
        technique: The technique to use with it.
        verdict: "use", "scratch" or "not enough evidence".
        expected: (gain, low, high) of the best entry, None where there is none.
        because: Sentences on the best entry: what was measured, and what it costs.
        others: A sentence for each other source.
        next_experiment: What would settle most.
    """

    target: str
    label_fraction: str
    verdict: str
    headline: str
    source: str | None = None
    technique: str | None = None
    expected: tuple[float, float, float] | None = None
    because: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    next_experiment: str = ""

    def lines(self) -> list[str]:
        """Return the advice as lines of text."""
        settle = [f"next: {self.next_experiment}"] if self.next_experiment else []
        indented = [f"  {line}" for line in (*self.because, *self.others, *settle)]
        return [f"{self.target} at {self.label_fraction} labels: {self.headline}", *indented]


@dataclass(frozen=True)
class _Entry:
    """A source with a technique on a target, as one job measured it."""

    store: str
    cell: Cell
    kind: tuple[str, str, str]
    """Modality, objective and metric: what it shares with like entries."""
    seed_variance: float
    """Part of the gain's variance that further seeds reduce."""
    expected: stats.Shrunken | None = None
    """None where it is not settled (`settled`)."""

    @property
    def name(self) -> str:
        where = f" ({self.store})" if self.store else ""
        return f"source {self.cell.source} with {self.cell.technique}{where}"

    @property
    def settled(self) -> bool:
        """Whether its gain has an error that includes the spread between seeds."""
        return self.missing == ""

    @property
    def missing(self) -> str:
        """What its gain lacks as evidence, or an empty string."""
        cell = self.cell
        if cell.baseline_gain is None or cell.baseline_low is None or cell.baseline_high is None:
            return "no gain over scratch"
        if (cell.paired_seeds or 0) < MIN_SEEDS:
            return f"{cell.paired_seeds or 0} seed paired with scratch, {MIN_SEEDS} are needed"
        return f"too few test units ({cell.evidence})" if cell.evidence else ""

    @property
    def variance(self) -> float:
        """Variance of the gain, from its 95 % interval as that of a normal distribution."""
        cell = self.cell
        assert cell.baseline_low is not None
        assert cell.baseline_high is not None
        return ((cell.baseline_high - cell.baseline_low) / (2 * stats.NORMAL_95)) ** 2


def advise(stores: Sequence[Store], target: str | None = None) -> list[Advice]:
    """Advise on every target of these results, by label fraction.

    A source is recommended where the interval of its expected gain lies above zero. Expected gains
    are those of the hierarchical model ``gain ~ N(true, error^2), true ~ N(mean, spread^2)`` over
    like entries (`stats.shrunken_means`; Morris 1983).

    Args:
        stores: Results of one or several jobs. Trials that stand in several are used once.
        target: Advise on this target alone. Entries of the others still count as like entries.

    Raises:
        ValueError: There are no tested trials, or none of the target.
    """
    entries = _with_expected(_entries(stores))
    groups: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for entry in entries:
        if target is None or target in (entry.cell.target, entry.cell.target.partition(" [")[0]):
            groups[entry.cell.target, entry.cell.label_fraction].append(entry)
    if not groups:
        raise ValueError(_nothing_found(stores, entries, target))
    order = sorted(groups, key=lambda key: (key[0], matrix.fraction_order(key[1])))
    return [_advice(*key, groups[key]) for key in order]


def _nothing_found(stores: Sequence[Store], entries: list[_Entry], target: str | None) -> str:
    places = ", ".join(store.name for store in stores)
    if entries:
        named = ", ".join(sorted({entry.cell.target for entry in entries}))
        return f"{places}: no tested trial of a target {target!r}; there are {named}"
    return f"{places}: no tested trial with a source, so there is nothing to advise on"


def _entries(stores: Sequence[Store]) -> list[_Entry]:
    """Return an entry for each cell with a source that has finished final trials."""
    seen: set[str] = set()
    out: list[_Entry] = []
    for store in stores:
        fresh = [row for row in store.rows if row.trial_id not in seen and row.current is not False]
        rows = results.disambiguate_targets(fresh)
        by_cell: dict[matrix.CellKey, list[ResultRow]] = defaultdict(list)
        for row in rows:
            by_cell[matrix.cell_key(row)].append(row)
        for cell in matrix.matrix_cells(rows, store.runs):
            if cell.source == SCRATCH or cell.against or not cell.n_seeds:
                continue
            key = (cell.source, cell.backbone, cell.target, cell.technique, cell.label_fraction)
            first = by_cell[key][0]
            kind = (first.modality or "", first.objective, cell.metric)
            name = store.name if len(stores) > 1 else ""
            out.append(_Entry(name, cell, kind, _seed_variance(cell, by_cell[key])))
        seen |= {row.trial_id for row in fresh}
    return out


def _seed_variance(cell: Cell, rows: list[ResultRow]) -> float:
    """Return the variance of a mean gain that comes from its seeds, 0 where it is not known.

    Without test predictions it is all of it, since the interval is over seeds alone.
    """
    if matrix.T_INTERVAL in cell.interval:
        return math.inf
    gains = {
        row.seed: row.baseline_gain
        for row in rows
        if row.trial_stage == "final"
        and row.split == "test"
        and row.metric == cell.metric
        and row.baseline_gain is not None
    }
    values = list(gains.values())
    return float(np.var(values, ddof=1) / len(values)) if len(values) >= MIN_SEEDS else 0.0


def _with_expected(entries: list[_Entry]) -> list[_Entry]:
    """Return the entries with their expected gains, each kind by a model of its own."""
    kinds: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        if entry.settled:
            kinds[entry.kind].append(place)
    out = list(entries)
    for places in kinds.values():
        like = [entries[place] for place in places]
        gains = [entry.cell.baseline_gain or 0.0 for entry in like]
        found = stats.shrunken_means(gains, [entry.variance for entry in like])
        for place, expected in zip(places, found, strict=True):
            out[place] = replace(entries[place], expected=expected)
    return out


def _advice(target: str, fraction: str, entries: list[_Entry]) -> Advice:
    settled = sorted(
        (entry for entry in entries if entry.expected is not None),
        key=lambda entry: -_mean(entry),
    )
    unsettled = [entry for entry in entries if entry.expected is None]
    if not settled:
        first = _most_promising(unsettled)
        lacks = f"{first.name} has {first.missing}"
        return Advice(
            target,
            fraction,
            "not enough evidence",
            f"not enough evidence: {lacks}",
            next_experiment=_more_evidence(first),
        )
    best = settled[0]
    expected = best.expected
    assert expected is not None
    decimals = _decimals(expected.high - expected.low)
    names = {"source": best.cell.source, "technique": best.cell.technique}
    if expected.low > 0:
        verdict, headline, chosen = "use", f"use {best.name}", names
    elif expected.high < 0:
        verdict, chosen = "scratch", {}
        headline = f"train from scratch: every tested source is worse, the best is {best.name}"
    else:
        verdict, chosen = "not enough evidence", {}
        headline = (
            "not enough evidence that any source helps: the interval of the best, "
            f"{best.name}, contains zero"
        )
    return Advice(
        target,
        fraction,
        verdict,
        headline,
        expected=(expected.mean, expected.low, expected.high),
        because=_because(best, decimals),
        others=_others(best, settled, unsettled, decimals),
        next_experiment=_next_experiment(settled, unsettled),
        **chosen,
    )


def _mean(entry: _Entry) -> float:
    return entry.expected.mean if entry.expected is not None else -math.inf


def _decimals(width: float) -> int:
    """Return the decimals that show an interval of this width with two digits."""
    return int(np.clip(1 - math.floor(math.log10(width)), 1, 4)) if width > 0 else 4


def _because(entry: _Entry, decimals: int) -> tuple[str, ...]:
    cell, expected = entry.cell, entry.expected
    assert expected is not None
    value = _estimate((cell.mean, cell.low, cell.high), decimals, signed=False)
    gain = (cell.baseline_gain, cell.baseline_low, cell.baseline_high)
    seconds = "unknown time" if cell.seconds is None else f"{cell.seconds:.3g} s"
    trained = "" if cell.params_trained is None else f", {cell.params_trained:,} parameters trained"
    shrunk = f"drawn {expected.weight_of_mean:.0%} of the way to the mean of like entries"
    if not expected.weight_of_mean:
        shrunk = "not drawn towards others: fewer than four like entries, or no error"
    return (
        f"{cell.metric} {value}; gain over scratch {_estimate(gain, decimals)} over "
        f"{cell.paired_seeds} seeds ({cell.interval})",
        f"expected gain {_interval(expected, decimals)} ({shrunk})",
        f"cost of a trial: {seconds}{trained}",
    )


def _estimate(
    estimate: tuple[float | None, float | None, float | None], decimals: int, signed: bool = True
) -> str:
    middle, low, high = (
        "?" if value is None else f"{value:{'+' if signed else ''}.{decimals}f}"
        for value in estimate
    )
    return f"{middle} [{low}, {high}]"


def _interval(expected: stats.Shrunken, decimals: int) -> str:
    return _estimate((expected.mean, expected.low, expected.high), decimals)


def _others(
    best: _Entry, settled: list[_Entry], unsettled: list[_Entry], decimals: int
) -> tuple[str, ...]:
    """Return a sentence for each other source, with its best technique."""
    told = {best.cell.source}
    out: list[str] = []
    for entry in settled:
        expected = entry.expected
        assert expected is not None
        if entry.cell.source in told:
            continue
        told.add(entry.cell.source)
        word = "hurts" if expected.high < 0 else "pays too" if expected.low > 0 else "is not shown"
        out.append(f"{entry.name} {word}: expected gain {_interval(expected, decimals)}")
    for entry in unsettled:
        if entry.cell.source not in told:
            told.add(entry.cell.source)
            out.append(f"{entry.name}: not enough evidence, {entry.missing}")
    return tuple(out)


def _most_promising(entries: list[_Entry]) -> _Entry:
    """Return the entry with the largest measured gain; those without any come last."""

    def gain(entry: _Entry) -> float:
        found = entry.cell.baseline_gain
        return -math.inf if found is None else found

    return max(entries, key=gain)


def _more_evidence(entry: _Entry) -> str:
    if entry.cell.evidence and (entry.cell.paired_seeds or 0) >= MIN_SEEDS:
        return "more test rows: further seeds cannot replace them"
    if entry.cell.baseline_gain is None:
        return f"scratch with the same backbone and seeds as {entry.name}"
    return f"another seed of {entry.name} and of scratch"


def _next_experiment(settled: list[_Entry], unsettled: list[_Entry]) -> str:
    """Return what would reduce the doubt between the best two entries most."""
    best, *rest = settled
    if not rest:
        if unsettled:
            return _more_evidence(_most_promising(unsettled))
        return "a second source or technique: this is the only entry, it was compared with scratch"
    second = rest[0]
    now = _doubt(_mean(best) - _mean(second), _variance(best) + _variance(second))
    after, entry = min(
        ((_doubt_after(best, second, tried), tried) for tried in (best, second)),
        key=lambda found: found[0],
    )
    other = f"{second.name} is really better than {best.name}"
    if 2 * (_of_seeds(best) + _of_seeds(second)) < _variance(best) + _variance(second):
        return (
            f"more test rows, or another split: the chance that {other} is {now:.0%}, and most of "
            "that doubt comes from the test rows, not from seeds"
        )
    return (
        f"one more seed of {entry.name} (and of scratch): the chance that {other} would fall from "
        f"{now:.0%} to about {after:.0%}"
    )


def _variance(entry: _Entry) -> float:
    assert entry.expected is not None
    return entry.expected.variance


def _of_seeds(entry: _Entry) -> float:
    """Return the part of the variance of an expected gain that comes from seeds.

    Shrinking removes the same share of each part of the measured variance.
    """
    if entry.variance <= 0:
        return 0.0
    return _variance(entry) * min(entry.seed_variance / entry.variance, 1.0)


def _doubt(difference: float, variance: float) -> float:
    """Return the probability that the sign of a normal difference is wrong."""
    if variance <= 0:
        return 0.0 if difference else 0.5
    return float(special.ndtr(-abs(difference) / math.sqrt(variance)))


def _doubt_after(best: _Entry, second: _Entry, tried: _Entry) -> float:
    """Return the doubt between two entries that is expected after one more seed of one of them.

    The seed reduces the part of the variance that comes from seeds from 1/n to 1/(n + 1). The
    difference will then have another value too: its doubt is averaged over what it may be.
    """
    now = _variance(best) + _variance(second)
    seeds = tried.cell.paired_seeds or MIN_SEEDS
    removed = _of_seeds(tried) / (seeds + 1)
    difference = _mean(best) - _mean(second)
    if removed <= 0:
        return _doubt(difference, now)
    points = special.ndtri((np.arange(2000) + 0.5) / 2000) * math.sqrt(removed)
    return fmean(_doubt(difference + point, now - removed) for point in points)
