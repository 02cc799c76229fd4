"""Advice: which source and which technique a target should take, and what is still in doubt.

The gain of every tested (source, technique) over the target's best scratch network is an estimate
with an error. The largest of many estimates is partly luck, so measured gains are not compared with
each other. Each is first shrunk towards the sum of the effects of its source, technique and target,
the more the larger its error is (`gain_model`). These effects are estimated from all like entries:
those of any job with the same modality, objective and metric. Where the metric has no bounds, the
target must be the same too. Sources of the same name and backbone count as the same one, and a
target with another share of labels as another target. Expected gains are best linear unbiased
predictions (Robinson, Statistical Science 1991), averaged over the restricted likelihood of the
spreads.

Pairs that were not tried, and targets without any trial, get a prediction from the same model, but
never a recommendation. The pair is named whose trial is worth most: the best expected gain after
one more trial, on average, minus the best expected gain of today (knowledge gradient; Frazier,
Powell and Dayanik, INFORMS Journal on Computing 2009).

Pairs that a budget of trials cut have no gain: they are named, and get neither. Those that it kept
did well on validation rows, so their effects may be too large.

Gains over the same scratch network share its error, which no number of entries averages out. An
expected gain is therefore never more certain than the measured one, and a source is recommended
only where its measured interval lies above zero too. Between two entries errors count as
independent, which makes the doubt between them rather too large. Of twelve pairs without any true
gain one is then recommended in 0 to 3 % of all cases, whatever the part of the error that they
share (tests/benchmarks/advice.py).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from pipeline.report import gain_model, matrix, plots, results, stats
from pipeline.report.blocks import format_interval
from pipeline.report.gain_model import GainModel
from pipeline.report.matrix import MIN_SEEDS, SCRATCH, GainEstimate, MatrixEntry
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

METHOD = (
    "Expected gain: the measured gain over the target's best scratch network, shrunk towards the "
    "sum of the effects of its source, technique and target in all entries with the same modality, "
    "objective and metric. In brackets: its 95 % interval. The model is explained by "
    "`python -m pydoc pipeline.report.advice`."
)
UNTRIED_SHOWN = 3


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
    """What to do with a target at one label fraction.

    Attributes:
        source: The source to use; None: train from scratch, or there is not enough evidence.
        technique: The technique to use with it.
        verdict: "use", "scratch" or "not enough evidence".
        expected: (gain, low, high) of the best entry, None where there is none.
        because: Sentences on the best entry: what was measured, and what it costs.
        others: A sentence for each other source.
        untried: A sentence for each of the most promising pairs that were not tried, and one on
            those that a budget cut.
        next_experiment: What would settle most.
    """

    target: str
    label_fraction: str
    metric: str
    verdict: str
    headline: str
    source: str | None = None
    technique: str | None = None
    expected: tuple[float, float, float] | None = None
    because: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    next_experiment: str = ""

    def lines(self) -> list[str]:
        """Return the advice as lines of text."""
        details = [*self.because, *self.others, *self.untried]
        if self.next_experiment:
            details.append(f"next: {self.next_experiment}")
        indented = [f"  {line}" for line in details]
        labels = plots.labels_text(self.label_fraction)
        return [f"{self.target} at {labels}, {self.metric}: {self.headline}", *indented]


_Kind = tuple[str, str, str]
"""Modality, objective and metric."""
_Pair = tuple[tuple[str, str], str]
"""Source with its backbone, and technique."""


@dataclass(frozen=True)
class NewTarget:
    """A target of which no trial with these labels has finished."""

    name: str
    label_fraction: str
    modality: str
    objective: str
    metric: str | None = None
    """None: the objective's first."""


@dataclass(frozen=True)
class Expected:
    """An expected gain, with its 95 % interval as that of a normal distribution."""

    mean: float
    variance: float
    weight_of_others: float
    """How far the measured gain was shrunk towards the sum of its effects, from 0 to 1."""

    @property
    def low(self) -> float:
        return self.mean - stats.NORMAL_95 * math.sqrt(self.variance)

    @property
    def high(self) -> float:
        return self.mean + stats.NORMAL_95 * math.sqrt(self.variance)

    @property
    def estimate(self) -> tuple[float, float, float]:
        """(mean, low, high)"""
        return self.mean, self.low, self.high


@dataclass(frozen=True)
class _TestedPair:
    """A source with a technique on a target, as one job measured it."""

    store: str
    entry: MatrixEntry
    kind: _Kind
    """Modality, objective and metric: what it shares with like entries."""
    seed_variance: float | None
    """Part of the gain's variance that further seeds reduce; None where it is not known."""
    expected: Expected | None = None
    """None where it is not settled (`settled`)."""

    @property
    def name(self) -> str:
        where = f" ({self.store})" if self.store else ""
        return f"source {self.entry.source} with {self.entry.technique}{where}"

    @property
    def gain(self) -> GainEstimate:
        """Its gain over the best scratch network, which gains of all backbones have in common."""
        return self.entry.over_best_scratch

    @property
    def settled(self) -> bool:
        """Whether its gain has an error that includes the spread between seeds."""
        return self.missing == ""

    @property
    def missing(self) -> str:
        """What its gain lacks as evidence, or an empty string."""
        gain = self.gain
        if self.without_labels:
            return "no gain over scratch, which is not defined without labels"
        if gain.value is None:
            return "no gain over scratch"
        if gain.seeds < MIN_SEEDS:
            return f"{gain.seeds} seed paired with scratch, {MIN_SEEDS} are needed"
        if not gain.predicted:
            return "no test predictions, so its interval is over seeds alone"
        if gain.low is None or gain.high is None:
            return "no interval"
        if gain.evidence:
            return f"too few test units ({gain.evidence})"
        if gain.unknown_choice:
            return f"an interval without the noise of its search, {gain.unknown_choice}"
        return ""

    @property
    def pays(self) -> bool:
        """Whether both the measured and the expected gain lie above zero with their intervals."""
        low = self.gain.low
        return self.expected is not None and self.expected.low > 0 and low is not None and low > 0

    @property
    def hurts(self) -> bool:
        """Whether both the measured and the expected gain lie below zero with their intervals."""
        high = self.gain.high
        below = self.expected is not None and self.expected.high < 0
        return below and high is not None and high < 0

    @property
    def without_labels(self) -> bool:
        """Whether it used no labels of the target, so that there is no scratch to compare with."""
        return plots.fraction_label(self.entry.label_fraction) == "none"

    @property
    def can_be_repeated(self) -> bool:
        """Whether another seed of it can be had: not of what is made of the trials of all seeds."""
        return not self.entry.combines_trials

    @property
    def variance(self) -> float:
        """Variance of the gain, from its 95 % interval as that of a normal distribution."""
        low, high = self.gain.low, self.gain.high
        assert low is not None
        assert high is not None
        return ((high - low) / (2 * stats.NORMAL_95)) ** 2


@dataclass(frozen=True)
class _Untried:
    """A pair that was not tried on a target, and the gain that the model predicts."""

    source: str
    technique: str
    mean: float
    low: float
    high: float
    worth: float
    """By how much its trial is expected to raise the expected gain of the best choice."""

    @property
    def name(self) -> str:
        return f"source {self.source} with {self.technique}"


class _LikeEntries:
    """Settled entries of the same kind, and the model of their gains."""

    def __init__(self, choices: list[_TestedPair]) -> None:
        self.entries = choices
        gains = [choice.gain.value or 0.0 for choice in choices]
        self.model = GainModel(
            [_place(choice) for choice in choices], gains, [choice.variance for choice in choices]
        )

    def expected(self) -> list[Expected]:
        """Return the expected gain of each, no more certain than the measured one."""
        posterior = self.model.posterior(range(len(self.entries)))
        variances = posterior.covariance.diagonal()
        return [
            Expected(float(mean), max(float(variance), choice.variance), float(weight))
            for choice, mean, variance, weight in zip(
                self.entries, posterior.means, variances, posterior.shrinkage, strict=True
            )
        ]

    def untried(
        self, tried: list[_TestedPair], target: tuple[str, str], cut: Collection[_Pair] = ()
    ) -> list[_Untried]:
        """Return every pair of a source and a technique that was not tried, the best first.

        Args:
            tried: All entries of the target.
            target: Its name and label fraction.
            cut: Pairs that were tried, and cut by a budget of trials.
        """
        measured = [
            place for place, choice in enumerate(self.entries) if _place(choice)[2] == target
        ]
        pairs = {*cut, *map(_pair, tried)}
        repeatable = [choice for choice in self.entries if choice.can_be_repeated]
        sources = dict.fromkeys(_place(choice)[0] for choice in self.entries)
        techniques = dict.fromkeys(choice.entry.technique for choice in repeatable)
        new = [pair for pair in itertools.product(sources, techniques) if pair not in pairs]
        if not new:
            return []
        posterior = self.model.posterior(measured, [(*pair, target) for pair in new])
        of_target = [self.entries[place].variance for place in measured]
        error = float(np.median(of_target or [choice.variance for choice in self.entries]))
        lows, highs = posterior.interval()
        # the error of scratch is that of every gain on the target
        least = stats.NORMAL_95 * math.sqrt(min(of_target, default=0.0))
        # scratch is a choice too, and a pair becomes one by its trial
        choices = [*range(len(measured))]
        now = max([0.0, *posterior.means[choices]])
        out: list[_Untried] = []
        for place, (source, technique) in enumerate(new, len(measured)):
            mean = float(posterior.means[place])
            then = [*choices, place]
            row = posterior.covariance[place]
            changes = np.append(row[then], 0.0) / math.sqrt(row[place] + error)
            means = np.append(posterior.means[then], 0.0)
            out.append(
                _Untried(
                    source[0],
                    technique,
                    mean,
                    min(float(lows[place]), mean - least),
                    max(float(highs[place]), mean + least),
                    gain_model.knowledge_gradient(means, changes, now),
                )
            )
        return sorted(out, key=lambda choice: -choice.mean)

    def describe_spreads(self, decimals: int) -> tuple[str, ...]:
        """Return a sentence on how much gains differ by source, technique and target, if any."""
        model = self.model
        spreads = model.median_spreads()
        parts = [
            f"{spread:.{decimals}f} between {what}"
            for what, spread, levels in zip(
                ("sources", "techniques", "targets"), spreads, model.levels, strict=False
            )
            if len(levels) > 1
        ]
        if not parts:
            return ()
        return (
            f"the {len(self.entries)} gains that this is estimated from differ by "
            f"{', '.join(parts)}, and by {spreads[-1]:.{decimals}f} for other reasons "
            "(standard deviations)",
        )


def _place(choice: _TestedPair) -> tuple[tuple[str, str], str, tuple[str, str]]:
    """Return its levels in the model: source with its backbone, technique, target with labels."""
    entry = choice.entry
    return (entry.source, entry.backbone), entry.technique, (entry.target, entry.label_fraction)


def _pair(choice: _TestedPair) -> _Pair:
    return _place(choice)[:2]


def advise(
    stores: Sequence[Store], target: str | None = None, new: Sequence[NewTarget] = ()
) -> list[Advice]:
    """Advise on every target of these results, by label fraction.

    Of the sources whose measured and expected gain lie above zero with their intervals the one with
    the largest expected gain is recommended. Expected gains are those of a model in which the
    effects of source, technique and target add up (`gain_model`). Results of different objectives
    or metrics are advised on apart.

    Args:
        stores: Results of one or several jobs. Trials that stand in several are used once.
        target: Advise on this target alone. Entries of the others still count as like entries.
        new: Targets without trials. They get predictions where other targets have like entries.

    Raises:
        ValueError: There are no tested trials, or none of the target.
    """
    named = _named(stores)
    choices, models = _with_expected(_choices(stores, named))
    cut = _cut_by_budget(itertools.chain(*named))
    groups: dict[tuple[str, str, _Kind], list[_TestedPair]] = defaultdict(list)
    for choice in choices:
        if target is None or target in (
            choice.entry.target,
            choice.entry.target.partition(" [")[0],
        ):
            groups[choice.entry.target, choice.entry.label_fraction, choice.kind].append(choice)
    asked = [one for one in new if target in (None, one.name)]
    if not groups and not (asked and choices):
        raise ValueError(_nothing_found(stores, choices, target))
    order = sorted(groups, key=lambda key: (key[0], matrix.fraction_order(key[1]), key[2]))
    known = [
        _advice(
            groups[key],
            models.get((key[2], _of_target(groups[key][0]))),
            cut[key[:2]],
        )
        for key in order
    ]
    return known + [advice for one in asked for advice in _on_new_target(one, models)]


def _nothing_found(stores: Sequence[Store], choices: list[_TestedPair], target: str | None) -> str:
    places = ", ".join(store.name for store in stores)
    if choices:
        named = ", ".join(sorted({choice.entry.target for choice in choices}))
        return f"{places}: no tested trial of a target {target!r}; there are {named}"
    return f"{places}: no tested trial with a source, so there is nothing to advise on"


def _named(stores: Sequence[Store]) -> list[list[ResultRow]]:
    """Return the current rows of each store, with a name for each target that no other one has."""
    current = [[row for row in store.rows if row.current is not False] for store in stores]
    named = iter(results.disambiguate_targets(row for rows in current for row in rows))
    return [list(itertools.islice(named, len(own))) for own in current]


def _cut_by_budget(rows: Iterable[ResultRow]) -> dict[tuple[str, str], dict[_Pair, str]]:
    """Return the pairs that a budget cut at each (target, label fraction), and when it cut them."""
    out: dict[tuple[str, str], dict[_Pair, str]] = defaultdict(dict)
    for row in rows:
        if row.is_cut_by_budget:
            pair = (row.source, row.backbone), results.technique(row)
            out[row.target, row.label_fraction][pair] = row.error or ""
    return out


def _choices(stores: Sequence[Store], named: Sequence[list[ResultRow]]) -> list[_TestedPair]:
    """Return a choice for each entry with a source that has finished final trials.

    Jobs that share trials have the same ids for them. An entry of which every trial stood in a
    store before is left out; scratch trials are used in each store, which measures its gains over
    them.

    Args:
        named: The rows of each (`_named`).
    """
    seen: set[str] = set()
    out: list[_TestedPair] = []
    for store, rows in zip(stores, named, strict=True):
        by_entry: dict[matrix.EntryKey, list[ResultRow]] = defaultdict(list)
        for row in rows:
            by_entry[matrix.entry_key(row)].append(row)
        for entry in matrix.matrix_entries(rows, store.runs):
            of_entry = by_entry[entry.key]
            if entry.source == SCRATCH or entry.against or not entry.n_seeds:
                continue
            if {row.trial_id for row in of_entry} <= seen:
                continue
            first = of_entry[0]
            kind = (first.modality or "", first.objective, entry.metric)
            name = store.name if len(stores) > 1 else ""
            scratch = entry.key._replace(
                source=SCRATCH, backbone=entry.best_scratch, technique=matrix.SCRATCH_TECHNIQUE
            )
            variance = _seed_variance(entry, of_entry, by_entry.get(scratch, []))
            out.append(_TestedPair(name, entry, kind, variance))
        seen |= {row.trial_id for row in rows if row.source != SCRATCH}
    return out


def _seed_variance(
    entry: MatrixEntry, rows: list[ResultRow], scratch: list[ResultRow]
) -> float | None:
    """Return the variance of a mean gain that comes from its seeds, None where it is not known."""
    ours, of_scratch = _by_seed(entry, rows), _by_seed(entry, scratch)
    gains = [
        fmean(
            value - of_scratch[seed][fold]
            for fold, value in by_fold.items()
            if fold in of_scratch[seed]
        )
        for seed, by_fold in ours.items()
        if by_fold.keys() & of_scratch.get(seed, {}).keys()
    ]
    return float(np.var(gains, ddof=1) / len(gains)) if len(gains) >= MIN_SEEDS else None


def _by_seed(entry: MatrixEntry, rows: list[ResultRow]) -> dict[int, dict[int | None, float]]:
    """Return the entry's metric on test rows by seed and fold; the fold is None without folds."""
    out: dict[int, dict[int | None, float]] = defaultdict(dict)
    for row in rows:
        is_tested = row.trial_stage == "final" and row.split == "test"
        if is_tested and row.metric == entry.metric and row.value is not None:
            out[row.seed][row.fold] = row.value
    return out


def _of_target(choice: _TestedPair) -> str:
    """Return the target whose entries alone are like this one, "" where those of all are.

    A metric without bounds has another scale on each target.
    """
    return "" if matrix.is_bounded(choice.entry.metric) else choice.entry.target


def _with_expected(
    choices: list[_TestedPair],
) -> tuple[list[_TestedPair], dict[tuple[_Kind, str], _LikeEntries]]:
    """Return the entries with their expected gains, and the model of each kind."""
    kinds: dict[tuple[_Kind, str], list[int]] = defaultdict(list)
    for place, choice in enumerate(choices):
        if choice.settled:
            kinds[choice.kind, _of_target(choice)].append(place)
    out = list(choices)
    models = {kind: _LikeEntries([choices[place] for place in kinds[kind]]) for kind in kinds}
    for kind, places in kinds.items():
        for place, expected in zip(places, models[kind].expected(), strict=True):
            out[place] = replace(choices[place], expected=expected)
    return out, models


def _on_new_target(new: NewTarget, models: dict[tuple[_Kind, str], _LikeEntries]) -> list[Advice]:
    """Return predictions for a target without trials, one for each metric of like entries."""
    out: list[Advice] = []
    for (kind, of_target), like in models.items():
        modality, objective, metric = kind
        same_task = (modality, objective) == (new.modality, new.objective)
        if of_target or not same_task or new.metric not in (None, metric):
            continue
        untried = like.untried([], (new.name, new.label_fraction))
        if not untried:  # all entries combine the trials of others
            continue
        decimals = _decimals(untried[0].high - untried[0].low)
        out.append(
            Advice(
                new.name,
                new.label_fraction,
                metric,
                "not enough evidence",
                "not enough evidence: no trial of it with these labels has finished; other results "
                f"predict the largest gain for {untried[0].name}",
                because=like.describe_spreads(decimals),
                untried=_predictions(untried, decimals),
                next_experiment=_first_trial(untried, decimals),
            )
        )
    if out:
        return out
    headline = (
        "not enough evidence: no trial of it with these labels has finished, and no similar entry "
        f"is there ({new.modality}, {new.objective}, a metric with bounds)"
    )
    metric = new.metric or "its metric"
    return [Advice(new.name, new.label_fraction, metric, "not enough evidence", headline)]


def _predictions(untried: list[_Untried], decimals: int) -> tuple[str, ...]:
    """Return a sentence for each of the most promising of these, which are sorted."""
    return tuple(
        f"{pair.name} was not tried: predicted gain "
        f"{format_interval(pair.mean, pair.low, pair.high, decimals, '+')}"
        for pair in untried[:UNTRIED_SHOWN]
    )


def _were_cut(cut: Mapping[_Pair, str]) -> tuple[str, ...]:
    """Return a sentence on the pairs that a budget cut; none where there are none."""
    if not cut:
        return ()
    named = [
        f"source {source} with {technique} {when.removeprefix(results.CUT_BY_BUDGET).strip()}"
        for ((source, _), technique), when in cut.items()
    ]
    return (f"cut by the budget, so without a gain: {'; '.join(named)}",)


def _first_trial(untried: list[_Untried], decimals: int) -> str:
    """Return the trial that is worth most, of pairs that were not tried; the best first."""
    best = max(untried, key=lambda pair: (round(pair.worth, decimals), pair.mean))
    trial = f"a trial of {best.name} and of scratch"
    if round(best.worth, decimals) <= 0:
        return f"{trial}, which measures its gain; none is expected to change the choice"
    return (
        f"{trial}, which raises the expected gain of the best choice by "
        f"{best.worth:.{decimals}f} on average"
    )


def _advice(
    choices: list[_TestedPair], like: _LikeEntries | None, cut: Mapping[_Pair, str]
) -> Advice:
    """Return the advice on entries of one target, label fraction and kind.

    Args:
        like: All settled entries of the kind, None where there is none.
        cut: Pairs that a budget cut, and when.
    """
    cut = {pair: when for pair, when in cut.items() if pair not in map(_pair, choices)}
    about = choices[0].entry.target, choices[0].entry.label_fraction, choices[0].entry.metric
    settled = sorted(
        (choice for choice in choices if choice.expected is not None),
        key=lambda choice: -_mean(choice),
    )
    unsettled = [choice for choice in choices if choice.expected is None]
    if not settled:
        first = _most_promising(unsettled)
        return Advice(
            *about,
            "not enough evidence",
            f"not enough evidence: {first.name} has {first.missing}",
            untried=_were_cut(cut),
            next_experiment=_more_evidence(unsettled),
        )
    paying = [choice for choice in settled if choice.pays]
    in_doubt = [choice for choice in settled if not choice.hurts]
    best = (paying or in_doubt or settled)[0]
    names = {"source": best.entry.source, "technique": best.entry.technique} if paying else {}
    if paying:
        verdict, headline = "use", f"use {best.name}"
    elif in_doubt:
        verdict = "not enough evidence"
        headline = (
            f"not enough evidence that any source helps: the interval of {best.name} contains zero"
        )
    elif unsettled:
        verdict, first = "not enough evidence", _most_promising(unsettled)
        headline = (
            f"not enough evidence: {first.name} has {first.missing}; every other tested source is "
            f"worse than scratch, the best of them is {best.name}"
        )
    else:
        verdict = "scratch"
        headline = f"train from scratch: every tested source is worse, the best is {best.name}"
    expected = best.expected
    assert expected is not None
    assert like is not None
    decimals = _decimals(expected.high - expected.low)
    untried = like.untried(choices, (best.entry.target, best.entry.label_fraction), cut)
    return Advice(
        *about,
        verdict,
        headline,
        expected=expected.estimate,
        because=(*_because(best, decimals), *like.describe_spreads(decimals)),
        others=_others(best, settled, unsettled, decimals),
        untried=(*_predictions(untried, decimals), *_were_cut(cut)),
        next_experiment=_next_experiment(settled, unsettled, untried, decimals),
        **names,
    )


def _mean(choice: _TestedPair) -> float:
    return choice.expected.mean if choice.expected is not None else -math.inf


def _decimals(width: float) -> int:
    """Return the decimals that show an interval of this width with two digits."""
    return int(np.clip(1 - math.floor(math.log10(width)), 1, 4)) if width > 0 else 4


def _because(choice: _TestedPair, decimals: int) -> tuple[str, ...]:
    entry, expected = choice.entry, choice.expected
    assert expected is not None
    value = format_interval(entry.mean, entry.low, entry.high, decimals)
    gain = choice.gain
    seconds = "unknown time" if entry.seconds is None else f"{entry.seconds:.3g} s"
    trained = (
        "" if entry.params_trained is None else f", {entry.params_trained:,} parameters trained"
    )
    shrunk = (
        f"shrunk by {expected.weight_of_others:.0%} towards the sum of the effects of its source, "
        "technique and target"
    )
    return (
        f"{entry.metric} {value}; gain over scratch "
        f"{format_interval(gain.value, gain.low, gain.high, decimals, '+')} over "
        f"{gain.seeds} seeds ({gain.how})",
        f"expected gain {format_interval(*expected.estimate, decimals, '+')} ({shrunk})",
        f"cost of a trial: {seconds}{trained}",
    )


def _others(
    best: _TestedPair, settled: list[_TestedPair], unsettled: list[_TestedPair], decimals: int
) -> tuple[str, ...]:
    """Return a sentence for each other source, with its best technique."""
    named = {best.entry.source}
    out: list[str] = []
    for choice in settled:
        expected = choice.expected
        assert expected is not None
        if choice.entry.source in named:
            continue
        named.add(choice.entry.source)
        word = "hurts" if choice.hurts else "pays too" if choice.pays else "is not shown"
        gain = format_interval(*expected.estimate, decimals, "+")
        out.append(f"{choice.name} {word}: expected gain {gain}")
    for choice in unsettled:
        if choice.entry.source not in named:
            named.add(choice.entry.source)
            out.append(f"{choice.name}: not enough evidence, {choice.missing}")
    return tuple(out)


def _most_promising(choices: list[_TestedPair]) -> _TestedPair:
    """Return the entry with the largest measured gain; those without any come last."""

    def gain(choice: _TestedPair) -> float:
        value = choice.gain.value
        return -math.inf if value is None else value

    return max(choices, key=gain)


def _more_evidence(choices: list[_TestedPair]) -> str:
    """Return what the most promising of these lacks, "" where no experiment gives it to any."""
    possible = [
        choice for choice in choices if choice.can_be_repeated and not choice.without_labels
    ]
    if not possible:
        return ""
    choice = _most_promising(possible)
    gain = choice.gain
    if gain.value is None:
        return f"scratch with the same backbone and seeds as {choice.name}"
    if gain.seeds >= MIN_SEEDS and gain.evidence:
        return "more test rows: further seeds cannot replace them"
    if gain.seeds >= MIN_SEEDS and gain.unknown_choice:
        return (
            f"{choice.name} and scratch again, with the settings that were found and without a "
            "search"
        )
    if gain.seeds >= MIN_SEEDS:
        return (
            f"the final trials of {choice.name} and of scratch again, with their predictions kept"
        )
    return f"another seed of {choice.name} and of scratch"


def _next_experiment(
    settled: list[_TestedPair], unsettled: list[_TestedPair], untried: list[_Untried], decimals: int
) -> str:
    """Return the experiment that would settle most.

    That is the trial of a pair that was not tried where it raises the expected gain of the best
    choice by more than a further seed of any entry does; otherwise what would reduce the doubt
    between the best two entries most.
    """
    if untried:
        worth = max(pair.worth for pair in untried)
        if round(worth, decimals) > 0 and worth > _worth_per_seed(settled):
            return _first_trial(untried, decimals)
    best, *rest = settled
    if not rest:
        if more := _more_evidence(unsettled):
            return more
        return "a second source or technique: this is the only entry, it was compared with scratch"
    second = rest[0]
    if best.seed_variance is None or second.seed_variance is None:
        return f"one more seed of {best.name}, of {second.name} and of scratch"
    now = _doubt(_mean(best) - _mean(second), _variance(best) + _variance(second))
    after, choice = min(
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
        f"one more seed of {choice.name} (and of scratch): the chance that {other} would fall from "
        f"{now:.0%} to about {after:.0%}"
    )


def _variance(choice: _TestedPair) -> float:
    assert choice.expected is not None
    return choice.expected.variance


def _of_seeds(choice: _TestedPair) -> float:
    """Return the part of the variance of an expected gain that comes from seeds.

    It is the same share as of the measured variance.
    """
    if choice.variance <= 0 or choice.seed_variance is None:
        return 0.0
    return _variance(choice) * min(choice.seed_variance / choice.variance, 1.0)


def _doubt(difference: float, variance: float) -> float:
    """Return the probability that the sign of a normal difference is wrong."""
    if variance <= 0:
        return 0.0 if difference else 0.5
    return float(special.ndtr(-abs(difference) / math.sqrt(variance)))


def _removed_per_seed(choice: _TestedPair) -> float:
    """Return by how much one more seed reduces the variance of an expected gain.

    The part that comes from seeds falls from 1/n to 1/(n + 1).
    """
    return _of_seeds(choice) / (choice.gain.seeds + 1)


def _worth_per_seed(settled: list[_TestedPair]) -> float:
    """Return how much one more seed of an entry raises the expected gain of the best choice.

    It is that of the entry where it is largest, and scratch is a choice too.
    """
    means = np.append([_mean(choice) for choice in settled], 0.0)
    changes = np.sqrt([_removed_per_seed(choice) for choice in settled])
    unit = np.eye(len(means))
    return max(
        gain_model.knowledge_gradient(means, change * unit[place], means.max())
        for place, change in enumerate(changes)
    )


def _doubt_after(best: _TestedPair, second: _TestedPair, tried: _TestedPair) -> float:
    """Return the doubt between two entries that is expected after one more seed of one of them.

    The difference will then have another value too: its doubt is averaged over what it may be.
    """
    now = _variance(best) + _variance(second)
    removed = _removed_per_seed(tried)
    difference = _mean(best) - _mean(second)
    if removed <= 0:
        return _doubt(difference, now)
    points = special.ndtri((np.arange(2000) + 0.5) / 2000) * math.sqrt(removed)
    return fmean(_doubt(difference + point, now - removed) for point in points)
