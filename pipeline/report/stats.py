"""95 % intervals of a metric, of its mean over seeds and of its gain over scratch, and p values of
gains.

One run alone has the percentile bootstrap over its test units (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993), or over whole groups (patients, speakers) where they are
declared. Units and groups are both called units below.

Several seeds on the same test units are what radiology calls a multi-reader multi-case study: seeds
are the readers, units the cases, and the quantity of a pair of runs is its gain. A gain varies with
the seed (initialisation, row order, label subset), with the units that happen to be in the test
split, and with both together. Its mean over S seeds has the variance

    seed variance of the gains / S  +  covariance over units between the gains of two seeds

(Obuchowski and Rockette, Communications in Statistics 24(2), 1995). The first part is estimated
from S values, the second from resampled units. The degrees of freedom of Student's t for their sum
follow Satterthwaite (1946), as Hillis (Statistics in Medicine 26(3), 2007) found best for few
readers. All units of one draw are the same for every run, and gains are paired on seed and on row.

Why no percentile bootstrap over seeds: of 3 seeds it is [min, max], which misses the truth in 25 %
of the cases when seeds are the larger noise. One deviation from Hillis, on the safe side: the seed
variance is never taken for less than what resampled units alone explain of it. Otherwise three
seeds that agree by chance give an interval of no width.

Where hyper-parameters were searched, the noise of the choice itself is a third part
(`choice_variance`).

tests/benchmarks/false_verdicts.py measures all this on comparisons without any true difference; its
table stands there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from pipeline.metrics.catalog import Metric, Predictions

DRAWS = 1000
RECOMPUTED_DRAWS = 200
"""Draws for a metric without units: it is computed anew for each of them."""

_CELLS = 4_000_000
"""Resampled units held at once (8 bytes each, twice)."""
_WORK = 200_000_000
"""Resampled units in all: above it there are fewer draws, down to RECOMPUTED_DRAWS."""

MIN_RARER_UNITS = 10
"""Test units of the rarer class below which no verdict is given. Of networks without any true
difference whose seeds agree on what they find hard, so many intervals of AUROC excluded zero: 21 %
with 2 positive rows, 12 % with 3, 9 % with 5, and 5 to 6 % with 10 and with 20
(tests/benchmarks/false_verdicts.py).
"""
MIN_UNITS = 20
"""Test units (rows, or groups where they are declared) below which no verdict is given: fewer do
not show the tails of what they stand for. Of differences with a long tail and a true mean of zero
(lognormal, sigma 1) so many intervals excluded zero: 19 % with 5 units, 15 % with 10, 12 % with 20
and 9 % with 60; of groups of rows that are right or wrong 3 % with 10 and 5 % with 20 and with 40.
"""

CHOICE_DRAWS = 1000
"""Simulated searches for the variance that the choice of hyper-parameters adds."""
CHOICE_DEGREES = 2
"""Degrees of freedom of that variance: of the few settings that are tried again, three by default,
one less.
"""


@dataclass(frozen=True, eq=False)
class RunPredictions:
    """Test predictions of one trial: ``rows`` (n,) int64 row ids, each once, and what was predicted
    for them.

    ``groups`` (n,) names the patient, speaker or scene of each row, where the data declare one;
    ``labels`` the columns of the scores; ``subgroups`` the value of each row (n,) in each column
    that the target is told apart by. ``rollout_frames``: (F, H, W, 3) uint8 pictures of the first
    row's episode.
    """

    rows: np.ndarray
    predictions: Predictions
    seed: int
    groups: np.ndarray | None = None
    labels: tuple[str, ...] = ()
    subgroups: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    rollout_frames: np.ndarray | None = None


@dataclass(frozen=True)
class Gain:
    """A gain over scratch, positive when better whatever the metric's direction.

    ``low`` and ``high`` bound its 95 % interval. ``seeds`` says how many seeds both sides have: of
    one seed the interval is over test units alone and ``p_value`` is NaN, because one value says
    nothing of the spread between seeds.
    """

    value: float
    low: float
    high: float
    p_value: float
    seeds: int


@dataclass(frozen=True)
class Uncertainty:
    """The variance of a mean over seeds and the degrees of freedom of Student's t that go with
    it.
    """

    variance: float
    degrees: float

    def half_width(self) -> float:
        """Of the 95 % interval."""
        if self.variance <= 0:
            return 0.0
        return float(special.stdtrit(self.degrees, 0.975)) * math.sqrt(self.variance)

    def p_value(self, mean: float) -> float:
        """Two-sided, of the hypothesis that the true mean is zero."""
        if self.variance <= 0:
            return 1.0 if mean == 0 else 0.0
        return float(2 * special.stdtr(self.degrees, -abs(mean) / math.sqrt(self.variance)))


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over seeds by Student's t, for runs whose predictions are gone; NaN bounds
    for one value.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:
        return mean, math.nan, math.nan
    half = Uncertainty(float(array.var(ddof=1)) / len(array), len(array) - 1).half_width()
    return mean, mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number: below 0.05 the chance of even one false among all of
    them is below 5 %.

    Holm (Scandinavian Journal of Statistics 6(2), 1979); it asks nothing of how the comparisons
    depend on each other.
    """
    count, corrected, running = len(p_values), [1.0] * len(p_values), 0.0
    order: list[int] = np.argsort(p_values, kind="stable").tolist()
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = running
    return corrected


def choice_variance(trials: Sequence[Sequence[float]], *, seed: int = 0) -> float:
    """Variance that choosing the best of several hyper-parameter settings adds to the chosen one's
    true value.

    ``trials``: of each setting that was tried again its validation values, one a seed; all have at
    least two. The search is repeated with the noise that its seeds show (one pooled variance), and
    the variance is that of the chosen settings' means: nothing where one setting is clearly best or
    all are equally good, much where the search could as well have ended elsewhere. 0 for fewer than
    two settings.
    """
    if len(trials) < 2:
        return 0.0
    means = np.array([np.mean(values) for values in trials])
    degrees = sum(len(values) - 1 for values in trials)
    pooled = sum((len(values) - 1) * float(np.var(values, ddof=1)) for values in trials) / degrees
    noise = np.sqrt([pooled / len(values) for values in trials])
    rng = np.random.default_rng(seed)
    chosen = (means + noise * rng.normal(size=(CHOICE_DRAWS, len(means)))).argmax(1)
    return float(means[chosen].var())


def interval(
    metric: Metric,
    predictions: Predictions,
    *,
    groups: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of one run's metric, over test units. ``groups`` (n,): whole groups are
    resampled. (NaN, NaN) without rows.
    """
    values = _resample(metric, [predictions], groups, draws, np.random.default_rng(seed))
    return _bounds(values[:, 0])


def mean_interval(
    metric: Metric,
    runs: list[RunPredictions],
    groups: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over the seeds' runs, over test units and seeds, within the
    metric's bounds.

    ``groups`` (n,) belongs to the rows of ``runs[0]``; without it the runs' own groups are taken.
    Rows that not every run has are left out. Raises ValueError when no row is common, or a row
    stands twice.
    """
    if not runs:
        raise ValueError("no runs to average")
    predictions, groups = _aligned(runs, groups, runs[0])
    values = np.array([metric.value(p) for p in predictions])
    resampled = _resample(metric, predictions, groups, draws, np.random.default_rng(seed))
    mean, low, high, _ = _estimate(values, resampled, _units(predictions, groups), 0.0)
    low, high = np.clip((low, high), *metric.bounds(predictions[0]))
    return mean, float(low), float(high)


def gain(
    metric: Metric,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
    groups: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(gain, low, high) of ours over scratch, as `compare` has it."""
    found = compare(metric, ours, scratch, groups, draws=draws, seed=seed)
    return found.value, found.low, found.high


def compare(
    metric: Metric,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
    groups: np.ndarray | None = None,
    *,
    choice: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gain:
    """The gain of ours over scratch; positive is better, also for a metric where lower is better.

    Paired on seed (seeds that only one side has are left out) and on row. ``groups`` (n,) belongs
    to the rows of ``ours[0]``; without it the runs' own groups are taken. ``choice``: the variance
    that the choice of hyper-parameters adds, of both sides together. The interval stays within what
    the metric's bounds allow a difference. Raises ValueError when no seed or no row is common, or a
    row or seed stands twice.
    """
    sides: list[dict[int, RunPredictions]] = []
    for name, side in (("ours", ours), ("scratch", scratch)):
        by_seed = {run.seed: run for run in side}
        if len(by_seed) != len(side):
            raise ValueError(
                f"{name}: seeds {sorted(run.seed for run in side)} are not distinct, so they "
                "cannot be paired"
            )
        sides.append(by_seed)
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise ValueError(f"no seed in common: ours {sorted(sides[0])}, scratch {sorted(sides[1])}")
    predictions, groups = _aligned([side[s] for side in sides for s in seeds], groups, ours[0])
    sign, n = (1.0 if metric.higher_is_better else -1.0), len(seeds)
    values = np.array([metric.value(p) for p in predictions])
    gains = sign * (values[:n] - values[n:])
    resampled = _resample(metric, predictions, groups, draws, np.random.default_rng(seed))
    mean, low, high, p_value = _estimate(
        gains, sign * (resampled[:, :n] - resampled[:, n:]), _units(predictions, groups), choice
    )
    least, most = metric.bounds(predictions[0])
    low, high = np.clip((low, high), least - most, most - least)
    return Gain(mean, float(low), float(high), p_value, n)


@dataclass(frozen=True)
class Evidence:
    """How many test units a verdict rests on: of the rarer class where rows have classes or labels,
    else all of them.
    """

    count: int
    least: int
    what: str

    @property
    def enough(self) -> bool:
        return self.count >= self.least

    def text(self) -> str:
        return f"{self.count} test {self.what}, a verdict needs {self.least}"


def evidence(run: RunPredictions) -> Evidence:
    """The test units that tell two networks apart.

    Of rows with a class: those of the commonest class, or those of all others, whichever are fewer.
    Of rows with a set of labels: the rarer side of each label, summed over the labels. A group
    counts once on each side on which it has rows.
    """
    p, unit = run.predictions, "rows" if run.groups is None else "groups"
    if "label" in p and "scores" in p:
        return class_evidence(p["label"], run.groups, unit)
    if "labels" in p and "scores" in p:
        return label_set_evidence(p["labels"], run.groups, unit)
    return Evidence(count_units(np.ones(len(run.rows), dtype=bool), run.groups), MIN_UNITS, unit)


def class_evidence(label: np.ndarray, groups: np.ndarray | None, unit: str) -> Evidence:
    """Evidence of rows with a class each, ``label`` (n,), or one at each of their positions, (n, M)
    with -1 where there is none.
    """
    known = label >= 0
    if not known.any():
        return Evidence(0, MIN_RARER_UNITS, f"{unit} of the rarer class")
    commonest = np.bincount(label[known].astype(np.int64)).argmax()
    positions = (len(label), -1)
    of_commonest = (known & (label == commonest)).reshape(positions).any(1)
    of_others = (known & (label != commonest)).reshape(positions).any(1)
    count = min(count_units(of_commonest, groups), count_units(of_others, groups))
    classes = len(np.unique(label[known]))
    return Evidence(
        count,
        MIN_RARER_UNITS,
        f"{unit} of the rarer class" if classes <= 2 else f"{unit} outside of the commonest class",
    )


def label_set_evidence(labels: np.ndarray, groups: np.ndarray | None, unit: str) -> Evidence:
    """Evidence of rows with a set of labels each, ``labels`` (n, L) 0 or 1."""
    total = count_units(np.ones(len(labels), dtype=bool), groups)
    rarer = sum(rarer_side(column > 0, groups) for column in labels.T)
    return Evidence(min(rarer, total), MIN_RARER_UNITS, f"{unit} of the rarer side of the labels")


def rarer_side(positive: np.ndarray, groups: np.ndarray | None) -> int:
    """Units with a positive row, or those with a negative one, whichever are fewer. ``positive``
    (n,) bool.
    """
    return min(count_units(positive, groups), count_units(~positive, groups))


def count_units(where: np.ndarray, groups: np.ndarray | None) -> int:
    """How many rows, or groups with such a row, are ``where``, (n,) bool."""
    return int(where.sum()) if groups is None else len(np.unique(groups[where]))


def common_rows(runs: list[RunPredictions]) -> np.ndarray:
    """Sorted ids of the rows that every run has. Raises ValueError when a row stands twice in a
    run.
    """
    common = None
    for run in runs:
        rows = np.unique(run.rows)
        if len(rows) != len(run.rows):
            raise ValueError(
                f"{len(run.rows) - len(rows)} row ids stand twice in the predictions of seed "
                f"{run.seed}; give each row once"
            )
        common = rows if common is None else np.intersect1d(common, rows, assume_unique=True)
    return common if common is not None else np.zeros(0, np.int64)


# ---------------------------------------------------------------- pairing


def _places(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted row id stands in ``rows``."""
    order = np.argsort(rows, kind="stable")
    return order[np.searchsorted(rows, wanted, sorter=order)]


def _for_rows(groups: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``groups`` of ``rows``, in the order of ``wanted``. Raises ValueError where a wanted row has
    none.
    """
    if len(groups) != len(rows):
        raise ValueError(f"{len(groups)} groups for {len(rows)} rows; give one a row")
    if len(np.setdiff1d(wanted, rows)):
        raise ValueError(
            f"{len(np.setdiff1d(wanted, rows))} rows have no group; give groups for the rows "
            "of every run"
        )
    return np.asarray(groups)[_places(rows, wanted)]


def _aligned(
    runs: list[RunPredictions], groups: np.ndarray | None, owner: RunPredictions
) -> tuple[list[Predictions], np.ndarray | None]:
    """Every run's predictions for the common rows, sorted by row id, and the groups of those rows.

    Given ``groups`` are those of ``owner``'s rows.
    """
    rows = common_rows(runs)
    if not len(rows):
        raise ValueError(
            "no test row in common, so the runs cannot be paired; evaluate them on the same rows"
        )
    if groups is None and all(run.groups is not None for run in runs):
        groups, owner = runs[0].groups, runs[0]
    if groups is not None:
        groups = _for_rows(groups, owner.rows, rows)
    out: list[Predictions] = []
    for run in runs:
        if np.array_equal(run.rows, rows):  # the usual case: no copy of the scores
            out.append(run.predictions)
        else:
            places = _places(run.rows, rows)
            out.append({name: array[places] for name, array in run.predictions.items()})
    return out, groups


# ---------------------------------------------------------------- resampling


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _units(predictions: list[Predictions], groups: np.ndarray | None) -> int:
    """How many units are drawn from: groups where there are any, else rows."""
    return len(next(iter(predictions[0].values()))) if groups is None else len(np.unique(groups))


def _estimate(
    values: np.ndarray, resampled: np.ndarray, units: int, choice: float
) -> tuple[float, float, float, float]:
    """(mean, low, high, p value of a mean of zero) of one value a seed, (S,), and its resampled
    values, (draws, S).

    Of one seed: the percentile interval over units, and no p value.
    """
    mean = float(values.mean())
    resampled = resampled[np.isfinite(resampled).all(axis=1)]
    if len(values) < 2:
        return (mean, *_bounds(resampled[:, 0]), math.nan)
    if len(resampled) < 2 or not np.isfinite(values).all():
        return mean, math.nan, math.nan, math.nan
    found = _uncertainty(values, resampled, units, choice)
    half = found.half_width()
    return mean, mean - half, mean + half, found.p_value(mean)


def _uncertainty(
    values: np.ndarray, resampled: np.ndarray, units: int, choice: float
) -> Uncertainty:
    """The variance of the mean of S values, (S,), over seeds, units and the choice of
    hyper-parameters (see the module's text).
    """
    seeds = len(values)
    covariance = np.cov(resampled, rowvar=False) * (
        units / max(units - 1, 1)
    )  # a resample varies too little by (n - 1) / n
    diagonal = float(np.trace(covariance))
    shared = max(0.0, (float(covariance.sum()) - diagonal) / (seeds * (seeds - 1)))
    explained_by_units = max(0.0, diagonal / seeds - shared) / seeds
    between_seeds = max(float(values.var(ddof=1)) / seeds, explained_by_units)
    variance = between_seeds + shared + choice
    if variance <= 0:
        return Uncertainty(0.0, seeds - 1)
    weight = (
        between_seeds**2 / (seeds - 1) + shared**2 / max(units - 1, 1) + choice**2 / CHOICE_DEGREES
    )
    return Uncertainty(variance, variance**2 / weight)


def _resample(
    metric: Metric,
    runs: list[Predictions],
    groups: np.ndarray | None,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(draws, runs) values of the metric, all runs on the same resampled units in each draw."""
    n = len(next(iter(runs[0].values())))
    if not n:
        return np.full((draws, len(runs)), np.nan)
    member = None
    if groups is not None:
        if len(groups) != n:
            raise ValueError(f"{len(groups)} groups for {n} rows; give one a row")
        member = np.unique(groups, return_inverse=True)[1].reshape(-1)
    if metric.units is None and metric.resampled is not None:
        return _recount(metric, runs, member, n, draws, rng)
    if metric.units is None:
        return _recompute(metric, runs, member, n, min(draws, RECOMPUTED_DRAWS), rng)
    units = np.concatenate([np.asarray(metric.units(p), dtype=np.float64) for p in runs], axis=1)
    if member is not None:
        units = np.stack([np.bincount(member, column) for column in units.T], axis=1)
    totals = _totals(units, draws, rng).reshape(-1, len(runs), 2)
    counted = totals[..., 1] != 0
    ratios = np.full(totals.shape[:-1], np.nan)
    np.divide(totals[..., 0], totals[..., 1], out=ratios, where=counted)
    if metric.final is not float:
        finite: list[float] = ratios[counted].tolist()
        ratios[counted] = [metric.final(ratio) for ratio in finite]
    return ratios


def _totals(units: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, K) sums of as many units (n, K) as there are, drawn with replacement, in bounded
    memory.

    Equal units are drawn together, by a multinomial over their kinds: the same distribution, and
    for hits and misses of a few runs there are a few dozen kinds, whatever n is.
    """
    n = len(units)
    kinds, counts = np.unique(units, axis=0, return_counts=True)
    if 4 * len(kinds) <= n:
        chunk = max(1, _CELLS // len(kinds))
        return np.concatenate(
            [
                rng.multinomial(n, counts / n, size=min(chunk, draws - i)) @ kinds
                for i in range(0, draws, chunk)
            ]
        )
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, _WORK // n))
    chunk = max(1, _CELLS // n)
    out: list[np.ndarray] = []
    for start in range(0, draws, chunk):
        out.append(_counts(n, min(chunk, draws - start), rng).astype(np.float64) @ units)
    return np.concatenate(out)


def _counts(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) int64: how often each of n units comes when n are drawn with replacement."""
    picked = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(picked.reshape(-1), minlength=draws * n).reshape(draws, n)


def _recount(
    metric: Metric,
    runs: list[Predictions],
    member: np.ndarray | None,
    n: int,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Values from how often each unit was drawn (whole groups with ``member``), chunk by chunk of
    draws, all runs on the same counts.
    """
    assert metric.resampled is not None
    cells = max(
        array.size for p in runs for array in p.values()
    )  # a metric of many classes reads each of them in every draw
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, _WORK // cells))
    held = max(
        (p["label"].size for p in runs if "label" in p), default=n
    )  # a row may have many positions, and each is drawn with it
    chunk, drawn = max(1, _CELLS // max(n, held)), n if member is None else int(member.max()) + 1
    out: list[np.ndarray] = []
    for start in range(0, draws, chunk):
        counts = _counts(drawn, min(chunk, draws - start), rng)
        counts = counts if member is None else counts[:, member]
        out.append(
            np.stack(
                [np.asarray(metric.resampled(p, counts), dtype=np.float64) for p in runs], axis=1
            )
        )
    return np.concatenate(out)


def _recompute(
    metric: Metric,
    runs: list[Predictions],
    member: np.ndarray | None,
    n: int,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    members: list[np.ndarray] | None = None
    if member is not None:
        order = np.argsort(member, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(member))[:-1])
    out = np.empty((draws, len(runs)))
    with warnings.catch_warnings():
        # a metric may warn of a class that a resample misses, once a draw
        warnings.simplefilter("ignore")
        for row in out:
            if members is None:
                picked = rng.integers(0, n, n)
            else:
                drawn: list[int] = rng.integers(0, len(members), len(members)).tolist()
                picked = np.concatenate([members[g] for g in drawn])
            row[:] = [
                metric.value({name: array[picked] for name, array in p.items()}) for p in runs
            ]
    return out
