"""95 % intervals of a metric, of its mean over seeds and of its gain over scratch, and p values of
gains.

The interval of a single run is the percentile bootstrap over its test rows (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993), or over whole groups (patients, speakers) where groups are
declared. A unit below is a group where groups are declared, otherwise a row.

Several seeds on the same test units form what radiology calls a multi-reader multi-case study: the
seeds are the readers and the units are the cases. The quantity measured is the gain of a pair of
runs. It varies with the seed (initialisation, row order, label subset), with the units that happen
to be in the test split, and with both together. Its mean over S seeds has the variance

    seed variance of the gains / S  +  covariance over units between the gains of two seeds

(Obuchowski and Rockette, Communications in Statistics 24(2), 1995). The first part is estimated
from S values, the second from resampled units. The degrees of freedom of Student's t for their sum
follow Satterthwaite (1946), as Hillis (Statistics in Medicine 26(3), 2007) found best for few
readers. All units of one draw are the same for every run, and gains are paired on seed and on row.

A percentile bootstrap over seeds would not do: of 3 seeds it is [min, max], which misses the true
value in 25 % of the cases when seeds are the larger noise. One deviation from Hillis makes the
intervals wider: the seed variance is at least what resampled units alone explain of it. Otherwise
three seeds that agree by chance would give an interval without width.

Where hyper-parameters were searched, the noise of that choice is a third part (`choice_variance`).

Where all test units are alike (20 right rows of 20), so are all resamples, and their percentiles
would claim certainty. For a metric with bounds the interval is then the exact one of Clopper and
Pearson (`_widen`).

tests/benchmarks/false_verdicts.py measures the share of false verdicts on comparisons without any
true difference, and holds the table of results.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from pipeline.core.groups import count_units, num_units, unit_numbers
from pipeline.core.metrics.catalog import Metric, Predictions
from pipeline.core.metrics.policies import OF_EPISODES

NORMAL_95 = float(special.ndtri(0.975))
"""Half the width of the 95 % interval of a standard normal distribution."""
DRAWS = 1000
RECOMPUTED_DRAWS = 200
"""Draws for a metric that is not a sum over units and must be computed again for each draw."""

ROUNDING = 1e-9
"""Resampled values that differ by no more are the same."""

MAX_UNITS_IN_MEMORY = 4_000_000
"""Resampled units that are held at the same time (8 bytes each, twice)."""
MAX_UNITS_SAMPLED = 200_000_000
"""Resampled units in all draws. Where they would be more, there are fewer draws, down to
RECOMPUTED_DRAWS.
"""

MIN_RARER_UNITS = 10
"""A verdict needs this number of test units outside of the most frequent class.

Measured on networks without any true difference whose seeds find the same rows hard, the share of
AUROC intervals that excluded zero was 21 % with 2 positive rows, 12 % with 3, 9 % with 5, and 5 to
6 % with 10 and with 20 (tests/benchmarks/false_verdicts.py).
"""
MIN_UNITS = 20
"""A verdict needs this number of test units. Fewer do not show the tails of their distribution.

Measured on differences with a long tail and a true mean of zero (lognormal, sigma 1), the share of
intervals that excluded zero was 19 % with 5 units, 15 % with 10, 12 % with 20 and 9 % with 60. On
groups of rows that are right or wrong it was 3 % with 10 groups and 5 % with 20 and with 40.
"""

CHOICE_DRAWS = 1000
"""Number of simulated searches that estimate the variance of choosing hyper-parameters."""
CHOICE_DEGREES = 2
"""Degrees of freedom of that variance: one less than the number of settings that are tried again,
three by default.
"""


@dataclass(frozen=True, eq=False)
class RunPredictions:
    """Test predictions of one trial.

    Attributes:
        rows: (n,) int64 row ids, each once.
        predictions: Arrays by name, their first dimension is n.
        seed: Seed of the trial.
        groups: (n,) patient, speaker or scene of each row, where the data declare one.
        labels: Names of the columns of the scores.
        subgroups: Column of ``Target.subgroups`` to (n,) its value for each row.
        rollout_frames: (F, H, W, 3) uint8 pictures of the first row's episode.
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
    """A gain over scratch. Positive is better, whatever the direction of the metric.

    ``low`` and ``high`` bound its 95 % interval. ``seeds`` is the number of paired seeds. With one
    seed the interval is over test units only and ``p_value`` is NaN, because a single value does
    not show the spread between seeds.
    """

    value: float
    low: float
    high: float
    p_value: float
    seeds: int


@dataclass(frozen=True)
class Uncertainty:
    """The variance of a mean over seeds, with its degrees of freedom for Student's t."""

    variance: float
    degrees_of_freedom: float

    def half_width(self) -> float:
        """Return half the width of the 95 % interval."""
        if self.variance <= 0:
            return 0.0
        return float(special.stdtrit(self.degrees_of_freedom, 0.975)) * math.sqrt(self.variance)

    def p_value(self, mean: float) -> float:
        """Return the two-sided p value of the hypothesis that the true mean is zero."""
        if self.variance <= 0:
            return 1.0 if mean == 0 else 0.0
        return float(
            2 * special.stdtr(self.degrees_of_freedom, -abs(mean) / math.sqrt(self.variance))
        )


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) of one value for each seed by Student's t.

    It serves runs whose test predictions are missing. The bounds of a single value are NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:
        return mean, math.nan, math.nan
    variance_of_mean = float(array.var(ddof=1)) / len(array)
    half = Uncertainty(variance_of_mean, len(array) - 1).half_width()
    return mean, mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for the number of comparisons.

    When those below 0.05 are called significant, the probability of one or more false ones among
    all comparisons is at most 5 %. The method of Holm (Scandinavian Journal of Statistics 6(2),
    1979) holds however the comparisons depend on each other.
    """
    count, corrected, running = len(p_values), [1.0] * len(p_values), 0.0
    order: list[int] = np.argsort(p_values, kind="stable").tolist()
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def choice_variance(trials: Sequence[Sequence[float]]) -> float:
    """Return the variance that choosing the best of several hyper-parameter settings adds.

    The search is simulated with the noise between its seeds (one pooled variance), and the result
    is the variance of the means of the chosen settings. It is near zero where one setting is
    clearly best or all are equally good, and large where another search might well choose another
    setting.

    Args:
        trials: Validation values of each setting that was tried again, one for each seed, at least
            two.

    Returns:
        The variance, 0 for fewer than two settings.
    """
    if len(trials) < 2:
        return 0.0
    means = np.array([np.mean(values) for values in trials])
    degrees = sum(len(values) - 1 for values in trials)
    squares = sum((len(values) - 1) * float(np.var(values, ddof=1)) for values in trials)
    pooled = squares / degrees
    noise = np.sqrt([pooled / len(values) for values in trials])
    rng = np.random.default_rng(0)
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
    """Return the 95 % interval (low, high) of a run's metric over test units.

    Args:
        metric: The metric.
        predictions: Predictions of n rows.
        groups: (n,) group of each row; with it whole groups are resampled.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        The bounds, NaN without rows.
    """
    values = _resample(metric, [predictions], groups, draws, seed)
    low, high = _bounds(values[:, 0])
    if _has_width(values):
        return low, high
    alike = _num_alike(metric, [predictions], groups)
    return _widen(low, high, low, metric.bounds(predictions), alike)


def mean_interval(metric: Metric, runs: list[RunPredictions]) -> tuple[float, float, float]:
    """Return (mean, low, high) of the metric's mean over runs of several seeds.

    The interval is over seeds and test units and stays within the bounds of the metric. Only rows
    that all runs have are used.

    Args:
        metric: The metric.
        runs: One run for each seed.

    Raises:
        ValueError: The runs have no row in common, or a row is twice in a run.
    """
    if not runs:
        raise ValueError("no runs to average")
    predictions, groups = _align(runs)
    values = np.array([metric.value(p) for p in predictions])
    resampled = _resample(metric, predictions, groups, DRAWS, 0)
    mean, low, high, _ = _estimate(
        values, resampled, num_units(_num_rows(predictions[0]), groups), 0.0
    )
    bounds = metric.bounds(predictions[0])
    if not _has_width(resampled):
        alike = _num_alike(metric, predictions, groups, runs[0].labels)
        low, high = _widen(low, high, mean, bounds, alike)
    low, high = np.clip((low, high), *bounds)
    return mean, float(low), float(high)


def compare(
    metric: Metric,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
    *,
    choice: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gain:
    """Return the gain of ours over scratch. Positive is better, also where a lower metric is.

    Runs are paired by seed and by row; seeds and rows that only one side has are left out. The
    interval stays within the differences that the bounds of the metric allow.

    Args:
        metric: The metric.
        ours: One run for each seed.
        scratch: One run for each seed.
        choice: Variance that choosing hyper-parameters adds, the sum of both sides.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ValueError: There is no seed or no row in common, or a row or seed is twice on one side.
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
    predictions, groups = _align([side[s] for side in sides for s in seeds])
    sign, n = (1.0 if metric.higher_is_better else -1.0), len(seeds)
    values = np.array([metric.value(p) for p in predictions])
    gains = sign * (values[:n] - values[n:])
    resampled = _resample(metric, predictions, groups, draws, seed)
    resampled = sign * (resampled[:, :n] - resampled[:, n:])
    mean, low, high, p_value = _estimate(
        gains, resampled, num_units(_num_rows(predictions[0]), groups), choice
    )
    least, most = metric.bounds(predictions[0])
    largest = most - least
    if not _has_width(resampled) and math.isfinite(largest):
        alike = _num_alike(metric, predictions, groups, ours[0].labels)
        low, high = _widen(low, high, mean, (-largest, largest), alike)
        # p value of the same exact test: it is 0.05 where the interval ends at 0
        exact = min(1.0, 2 * (1 + abs(mean) / largest) ** -alike)
        p_value = p_value if math.isnan(p_value) else max(p_value, exact)
    low, high = np.clip((low, high), -largest, largest)
    return Gain(mean, float(low), float(high), p_value, n)


@dataclass(frozen=True)
class Evidence:
    """The number of test units behind a verdict, and how many it needs.

    Where rows have classes or labels, only the units outside of the most frequent class are
    counted.
    """

    count: int
    needed: int
    what: str

    @property
    def enough(self) -> bool:
        """Whether there are enough units for a verdict."""
        return self.count >= self.needed

    def text(self) -> str:
        """Return a description of the number of units and of how many a verdict needs."""
        return f"{self.count} test {self.what}, a verdict needs {self.needed}"


def evidence(run: RunPredictions, metric: str = "") -> Evidence:
    """Return the number of test units that can show a difference between two networks.

    Of rows with one class these are the units of the most frequent class or those of all others,
    whichever are fewer. Of rows with a set of labels these are the units with a label or those
    without it, whichever are fewer, summed over the labels. A group with rows on both sides counts
    on both. Of episodes (`OF_EPISODES`) all count, whatever the classes of their actions are.

    Args:
        run: Predictions of test rows.
        metric: Name of the metric that the networks are compared by.
    """
    p, unit = run.predictions, "rows" if run.groups is None else "groups"
    reads_classes = metric not in OF_EPISODES
    if reads_classes and "label" in p and "scores" in p:
        return class_evidence(p["label"], run.groups, unit)
    if reads_classes and "labels" in p and "scores" in p:
        return label_set_evidence(p["labels"], run.groups, unit)
    return Evidence(num_units(len(run.rows), run.groups), MIN_UNITS, unit)


def class_evidence(label: np.ndarray, groups: np.ndarray | None, unit: str) -> Evidence:
    """Return the evidence of rows with classes.

    The most frequent class is found by counting rows or positions, even where units are groups.
    Counting groups could choose another class, which would give as many units or more: counting
    rows is stricter.

    Args:
        label: (n,) class of each row, or (n, M) class of each position, -1 where there is none.
        groups: (n,) group of each row, or None.
        unit: The word for a unit, "rows" or "groups".
    """
    known = label >= 0
    if not known.any():
        return Evidence(0, MIN_RARER_UNITS, f"{unit} outside of the most frequent class")
    most_frequent = np.bincount(label[known].astype(np.int64)).argmax()
    positions = (len(label), -1)
    of_most_frequent = (known & (label == most_frequent)).reshape(positions).any(1)
    of_others = (known & (label != most_frequent)).reshape(positions).any(1)
    count = min(count_units(of_most_frequent, groups), count_units(of_others, groups))
    return Evidence(count, MIN_RARER_UNITS, f"{unit} outside of the most frequent class")


def label_set_evidence(labels: np.ndarray, groups: np.ndarray | None, unit: str) -> Evidence:
    """Return the evidence of rows with a set of labels each, ``labels`` (n, L) 0 or 1."""
    total = num_units(len(labels), groups)
    rarer = sum(rarer_side(column > 0, groups) for column in labels.T)
    return Evidence(min(rarer, total), MIN_RARER_UNITS, f"{unit} of the rarer side of the labels")


def rarer_side(positive: np.ndarray, groups: np.ndarray | None) -> int:
    """Return the number of units with a positive row or with a negative one, the smaller of both.

    ``positive`` is (n,) bool.
    """
    return min(count_units(positive, groups), count_units(~positive, groups))


def common_rows(runs: list[RunPredictions]) -> np.ndarray:
    """Return the sorted ids of the rows that all runs have.

    Raises:
        ValueError: A row is twice in a run.
    """
    common = None
    for run in runs:
        rows = np.unique(run.rows)
        if len(rows) != len(run.rows):
            raise ValueError(
                f"{len(run.rows) - len(rows)} row ids are twice in the predictions of seed "
                f"{run.seed}; give each row once"
            )
        common = rows if common is None else np.intersect1d(common, rows, assume_unique=True)
    return common if common is not None else np.zeros(0, np.int64)


# ---------------------------------------------------------------- pairing


def _positions(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position in ``rows`` of each wanted row id."""
    order = np.argsort(rows, kind="stable")
    return order[np.searchsorted(rows, wanted, sorter=order)]


def _align(runs: list[RunPredictions]) -> tuple[list[Predictions], np.ndarray | None]:
    """Return the predictions of each run for the common rows, sorted by row id, and their groups.

    The groups are None where a run has none.
    """
    rows = common_rows(runs)
    if not len(rows):
        raise ValueError(
            "no test row in common, so the runs cannot be paired; evaluate them on the same rows"
        )
    groups = runs[0].groups if all(run.groups is not None for run in runs) else None
    if groups is not None:
        groups = groups[_positions(runs[0].rows, rows)]
    out: list[Predictions] = []
    for run in runs:
        if np.array_equal(run.rows, rows):  # the usual case: no copy of the scores
            out.append(run.predictions)
        else:
            positions_in_run = _positions(run.rows, rows)
            out.append({name: array[positions_in_run] for name, array in run.predictions.items()})
    return out, groups


# ---------------------------------------------------------------- resampling


def _num_rows(predictions: Predictions) -> int:
    return len(next(iter(predictions.values())))


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)


def _has_width(resampled: np.ndarray) -> bool:
    """Return whether resampled values (draws, S) differ; also true where none is finite."""
    finite = resampled[np.isfinite(resampled).all(axis=1)]
    return not len(finite) or bool((np.ptp(finite, axis=0) > ROUNDING).any())


def _num_alike(
    metric: Metric,
    predictions: list[Predictions],
    groups: np.ndarray | None,
    labels: Sequence[str] = (),
) -> int:
    """Return the number of units behind a value that is the same in all resamples, at least 1.

    - A ratio: the units that its denominator counts.
    - Other metrics, such as AUROC: the units of `evidence`, because n positive and m negative rows
      make at most min(n, m) independent pairs.
    - The metric of one label: the units of that label's rarer side. If the label's column is not
      known, the smallest such number over all labels.
    """
    p = predictions[0]
    if metric.units is not None:
        is_counted = np.logical_and.reduce([metric.units(one)[:, 1] > 0 for one in predictions])
        return max(1, count_units(is_counted, groups))
    label = metric.name.partition("/")[2]
    if label and "labels" in p:
        columns = [labels.index(label)] if label in labels else range(p["labels"].shape[1])
        return max(1, min(rarer_side(p["labels"][:, k] > 0, groups) for k in columns))
    rows = np.arange(_num_rows(p))
    return max(1, evidence(RunPredictions(rows, p, 0, groups), metric.name).count)


def _widen(
    low: float, high: float, value: float, bounds: tuple[float, float], alike: int
) -> tuple[float, float]:
    """Return the interval of a value over units that are all alike.

    With n units alike, a share 1 - 0.025^(1/n) of all units may be unlike them (Clopper and
    Pearson, Biometrika 26, 1934). Their values may be anywhere within the bounds. Without bounds
    nothing can be said, and the interval stays.

    Args:
        low: Lower bound by resampling.
        high: Upper bound by resampling.
        value: The value.
        bounds: The least and greatest possible value.
        alike: n.
    """
    if not np.isfinite(bounds).all():
        return low, high
    unlike = 1 - 0.025 ** (1 / alike)
    least, most = (value + unlike * (bound - value) for bound in bounds)
    return min(low, least), max(high, most)


def _estimate(
    values: np.ndarray, resampled: np.ndarray, units: int, choice: float
) -> tuple[float, float, float, float]:
    """Return (mean, low, high, p value of the hypothesis that the mean is zero).

    With one seed the interval is the percentile interval over units, and the p value is NaN.

    Args:
        values: (S,) one value for each seed.
        resampled: (draws, S) the same values on resampled units.
        units: Number of units.
        choice: Variance that choosing hyper-parameters adds.
    """
    mean = float(values.mean())
    resampled = resampled[np.isfinite(resampled).all(axis=1)]
    if len(values) < 2:
        return (mean, *_bounds(resampled[:, 0]), math.nan)
    if len(resampled) < 2 or not np.isfinite(values).all():
        return mean, math.nan, math.nan, math.nan
    uncertainty = _uncertainty(values, resampled, units, choice)
    half = uncertainty.half_width()
    return mean, mean - half, mean + half, uncertainty.p_value(mean)


def _uncertainty(
    values: np.ndarray, resampled: np.ndarray, units: int, choice: float
) -> Uncertainty:
    """Return the variance of the mean of ``values``, (S,), with its degrees of freedom.

    It is over seeds, units and the choice of hyper-parameters, as the docstring of the module
    describes.
    """
    seeds = len(values)
    # the variance of a resample is too small by the factor (n - 1) / n
    covariance = np.cov(resampled, rowvar=False) * (units / max(units - 1, 1))
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
    seed: int,
) -> np.ndarray:
    """Return (draws, runs) values of the metric, where all runs of a draw have the same units."""
    n = _num_rows(runs[0])
    if not n:
        return np.full((draws, len(runs)), np.nan)
    member = None
    if groups is not None:
        if len(groups) != n:
            raise ValueError(f"{len(groups)} groups for {n} rows; give one a row")
        member = unit_numbers(groups, n)
    if metric.units is None and metric.resampled is not None:
        return _resample_counts(metric, runs, member, n, draws, seed)
    rng = np.random.default_rng(seed)
    if metric.units is None:
        return _resample_rows(metric, runs, member, n, min(draws, RECOMPUTED_DRAWS), rng)
    units_of_runs = [np.asarray(metric.units(p), dtype=np.float64) for p in runs]
    units = np.concatenate(units_of_runs, axis=1)
    if member is not None:
        units = np.stack([np.bincount(member, column) for column in units.T], axis=1)
    totals = resampled_totals(units, draws, rng).reshape(-1, len(runs), 2)
    counted = totals[..., 1] != 0
    ratios = np.full(totals.shape[:-1], np.nan)
    np.divide(totals[..., 0], totals[..., 1], out=ratios, where=counted)
    if metric.final is not float:
        finite: list[float] = ratios[counted].tolist()
        ratios[counted] = [metric.final(ratio) for ratio in finite]
    return ratios


def resampled_totals(units: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return (draws, K) sums of n units sampled with replacement from ``units`` (n, K).

    Memory is bounded. Equal units are sampled together by a multinomial over the distinct values,
    which has the same distribution: for hits and misses of a few runs there are a few dozen
    distinct values, whatever n is.
    """
    n = len(units)
    distinct, counts = np.unique(units, axis=0, return_counts=True)
    if 4 * len(distinct) <= n:
        chunk = max(1, MAX_UNITS_IN_MEMORY // len(distinct))
        return np.concatenate(
            [
                rng.multinomial(n, counts / n, size=min(chunk, draws - i)) @ distinct
                for i in range(0, draws, chunk)
            ]
        )
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, MAX_UNITS_SAMPLED // n))
    chunk = max(1, MAX_UNITS_IN_MEMORY // n)
    out: list[np.ndarray] = []
    for start in range(0, draws, chunk):
        out.append(_counts(n, min(chunk, draws - start), rng).astype(np.float64) @ units)
    return np.concatenate(out)


@lru_cache(maxsize=1)
def _counts_of_seed(n: int, draws: int, seed: int) -> np.ndarray:
    """Return `_counts` of a new generator; the comparisons of a target all draw the same units.

    They lie in memory as `counts_by_row` wants them.
    """
    counts = np.asfortranarray(_counts(n, draws, np.random.default_rng(seed)))
    counts.setflags(write=False)
    return counts


def _counts(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return (draws, n) int64 counts of each of n units when n are sampled with replacement."""
    first_of_draw = n * np.arange(draws)[:, None]
    picked = rng.integers(0, n, (draws, n)) + first_of_draw
    return np.bincount(picked.reshape(-1), minlength=draws * n).reshape(draws, n)


def _resample_counts(
    metric: Metric,
    runs: list[Predictions],
    member: np.ndarray | None,
    n: int,
    draws: int,
    seed: int,
) -> np.ndarray:
    """Return (draws, runs) values of a metric that can be computed from counts of the units.

    All runs of a draw have the same counts. ``member`` (n,) is the group of each row where whole
    groups are sampled.
    """
    assert metric.resampled is not None
    # a metric of many classes reads each of them in every draw
    cells = max(array.size for p in runs for array in p.values())
    if metric.compares_rows:  # n rows have n (n - 1) / 2 pairs
        draws = min(draws, RECOMPUTED_DRAWS)
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, MAX_UNITS_SAMPLED // cells))
    # a row may have many positions, and each is sampled with it
    positions = max((p["label"].size for p in runs if "label" in p), default=n)
    chunk = max(1, MAX_UNITS_IN_MEMORY // max(n, positions))
    sampled = n if member is None else int(member.max()) + 1
    if metric.compares_rows and member is not None:  # rows of one group are drawn together
        runs = [{**p, "unit": member} for p in runs]
    out: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    for start in range(0, draws, chunk):
        if chunk >= draws:
            counts = _counts_of_seed(sampled, draws, seed)
        else:
            counts = _counts(sampled, min(chunk, draws - start), rng)
        counts = counts if member is None else counts[:, member]
        out.append(
            np.stack(
                [np.asarray(metric.resampled(p, counts), dtype=np.float64) for p in runs], axis=1
            )
        )
    return np.concatenate(out)


def _resample_rows(
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
                sampled: list[int] = rng.integers(0, len(members), len(members)).tolist()
                picked = np.concatenate([members[g] for g in sampled])
            row[:] = [
                metric.value({name: array[picked] for name, array in p.items()}) for p in runs
            ]
    return out
