"""95 % intervals of a metric, of its mean over seeds and of its gain over scratch.

The method is the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993) over test units, or over
whole groups (patients, speakers) where they are declared; all seeds of one draw see the same units, and a gain is paired on
seed and on row. Seeds are resampled too, and because three of them are few, their deviations are widened by
``seed_widening``: the plain percentile interval of 3 seeds is their [min, max], which misses the truth in 25 % of the cases
when seeds are the larger noise (measured, 1500 repeats of 3 seeds x 500 units: coverage 0.75 plain, 0.94 widened; where
units are the larger noise 0.94 and 0.97). One seed says nothing about seeds: then only units are resampled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.metrics import Metric, Predictions

DRAWS = 1000
RECOMPUTED_DRAWS = 200
"""Draws for a metric without units: it is computed anew for each of them."""

_CELLS = 4_000_000
"""Resampled units held at once (8 bytes each, twice)."""
_WORK = 200_000_000
"""Resampled units in all: above it there are fewer draws, down to RECOMPUTED_DRAWS."""

_T_975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
_Z_975 = 1.959964


@dataclass(frozen=True, eq=False)
class Run:
    """Test predictions of one trial: ``rows`` (n,) int64 row ids, each once, and what was predicted for them.

    ``groups`` (n,) names the patient, speaker or scene of each row, where the data declare one; ``labels`` the columns of the scores;
    ``subgroups`` the value of each row (n,) in each column that the target is told apart by. ``film``: (F, H, W, 3) uint8 pictures of the first row's episode.
    """

    rows: np.ndarray
    predictions: Predictions
    seed: int
    groups: np.ndarray | None = None
    labels: tuple[str, ...] = ()
    subgroups: dict[str, np.ndarray] = field(default_factory=dict)
    film: np.ndarray | None = None


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t: tabled to 10, then Abramowitz and Stegun 26.7.5 (error below 2e-4)."""
    if df < 1:
        raise ValueError(f"degrees of freedom {df} must be at least 1")
    if df <= len(_T_975):
        return _T_975[df - 1]
    z = _Z_975
    return (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))


def seed_widening(seeds: int) -> float:
    """Factor on resampled seed deviations: t / z for their unknown spread, sqrt(S / (S - 1)) for the bootstrap's narrowness.

    The expanded percentile interval of Hesterberg (The American Statistician 69(4), 2015), for the seeds alone:
    2.7 for 3 seeds, 1.6 for 5, 1.2 for 10. 0 for one seed.
    """
    return t_quantile(seeds - 1) / _Z_975 * math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over seeds by Student's t, for runs whose predictions are gone; NaN bounds for one value."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:
        return mean, math.nan, math.nan
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, mean - half, mean + half


def interval(metric: Metric, predictions: Predictions, *, groups: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """(low, high) of one run's metric, over test units. ``groups`` (n,): whole groups are resampled. (NaN, NaN) without rows."""
    values = _resample(metric, [predictions], groups, draws, np.random.default_rng(seed))
    return _bounds(values[:, 0])


def mean_interval(metric: Metric, runs: list[Run], groups: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over the seeds' runs, over test units and seeds, within the metric's bounds.

    ``groups`` (n,) belongs to the rows of ``runs[0]``; without it the runs' own groups are taken. Rows that not every run has
    are left out. Raises ValueError when no row is common, or a row stands twice.
    """
    if not runs:
        raise ValueError("no runs to average")
    predictions, groups = _aligned(runs, groups, runs[0])
    values = np.array([metric.value(p) for p in predictions])
    rng = np.random.default_rng(seed)
    low, high = np.clip(_bounds(_seed_draws(values, _resample(metric, predictions, groups, draws, rng), rng)), *metric.bounds)
    return float(values.mean()), float(low), float(high)


def gain(metric: Metric, ours: list[Run], scratch: list[Run], groups: np.ndarray | None = None, *, draws: int = DRAWS,
         seed: int = 0) -> tuple[float, float, float]:
    """(gain, low, high) of ours over scratch; positive is better, also for a metric where lower is better.

    Paired on seed (seeds that only one side has are left out) and on row. ``groups`` (n,) belongs to the rows of ``ours[0]``;
    without it the runs' own groups are taken. Raises ValueError when no seed or no row is common, or a row or seed stands twice.
    """
    sides = []
    for name, side in (("ours", ours), ("scratch", scratch)):
        by_seed = {run.seed: run for run in side}
        if len(by_seed) != len(side):
            raise ValueError(f"{name}: seeds {sorted(run.seed for run in side)} are not distinct, so they cannot be paired")
        sides.append(by_seed)
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise ValueError(f"no seed in common: ours {sorted(sides[0])}, scratch {sorted(sides[1])}")
    predictions, groups = _aligned([side[s] for side in sides for s in seeds], groups, ours[0])
    sign, n = (1.0 if metric.higher_is_better else -1.0), len(seeds)
    values = np.array([metric.value(p) for p in predictions])
    gains = sign * (values[:n] - values[n:])
    rng = np.random.default_rng(seed)
    resampled = _resample(metric, predictions, groups, draws, rng)
    low, high = _bounds(_seed_draws(gains, sign * (resampled[:, :n] - resampled[:, n:]), rng))
    return float(gains.mean()), low, high


def common_rows(runs: list[Run]) -> np.ndarray:
    """Sorted ids of the rows that every run has. Raises ValueError when a row stands twice in a run."""
    common = None
    for run in runs:
        rows = np.unique(run.rows)
        if len(rows) != len(run.rows):
            raise ValueError(f"{len(run.rows) - len(rows)} row ids stand twice in the predictions of seed {run.seed}; give each row once")
        common = rows if common is None else np.intersect1d(common, rows, assume_unique=True)
    return common if common is not None else np.zeros(0, np.int64)


# ---------------------------------------------------------------- pairing

def _places(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted row id stands in ``rows``."""
    order = np.argsort(rows, kind="stable")
    return order[np.searchsorted(rows, wanted, sorter=order)]


def _for_rows(groups: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``groups`` of ``rows``, in the order of ``wanted``. Raises ValueError where a wanted row has none."""
    if len(groups) != len(rows):
        raise ValueError(f"{len(groups)} groups for {len(rows)} rows; give one a row")
    if len(np.setdiff1d(wanted, rows)):
        raise ValueError(f"{len(np.setdiff1d(wanted, rows))} rows have no group; give groups for the rows of every run")
    return np.asarray(groups)[_places(rows, wanted)]


def _aligned(runs: list[Run], groups: np.ndarray | None, owner: Run) -> tuple[list[Predictions], np.ndarray | None]:
    """Every run's predictions for the common rows, sorted by row id, and the groups of those rows.

    Given ``groups`` are those of ``owner``'s rows.
    """
    rows = common_rows(runs)
    if not len(rows):
        raise ValueError("no test row in common, so the runs cannot be paired; evaluate them on the same rows")
    if groups is None and all(run.groups is not None for run in runs):
        groups, owner = runs[0].groups, runs[0]
    if groups is not None:
        groups = _for_rows(groups, owner.rows, rows)
    out = []
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


def _seed_draws(values: np.ndarray, resampled: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(draws,) of the mean over seeds: units as resampled, (draws, S), plus the widened deviation of resampled seeds, (S,)."""
    n = len(values)
    means = resampled.mean(1)
    if n < 2:
        return means
    picked = rng.integers(0, n, (len(means), n))
    return means + seed_widening(n) * (values[picked].mean(1) - values.mean())


def _resample(metric: Metric, runs: list[Predictions], groups: np.ndarray | None, draws: int, rng: np.random.Generator) -> np.ndarray:
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
    return np.array([[metric.of_units(pair[None]) for pair in draw] for draw in totals])


def _totals(units: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, K) sums of as many units (n, K) as there are, drawn with replacement, in bounded memory.

    Equal units are drawn together, by a multinomial over their kinds: the same distribution, and for hits and misses of a few
    runs there are a few dozen kinds, whatever n is.
    """
    n = len(units)
    kinds, counts = np.unique(units, axis=0, return_counts=True)
    if 4 * len(kinds) <= n:
        chunk = max(1, _CELLS // len(kinds))
        return np.concatenate([rng.multinomial(n, counts / n, size=min(chunk, draws - i)) @ kinds for i in range(0, draws, chunk)])
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, _WORK // n))
    chunk = max(1, _CELLS // n)
    out = []
    for start in range(0, draws, chunk):
        out.append(_counts(n, min(chunk, draws - start), rng).astype(np.float64) @ units)
    return np.concatenate(out)


def _counts(n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) int64: how often each of n units comes when n are drawn with replacement."""
    picked = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(picked.reshape(-1), minlength=draws * n).reshape(draws, n)


def _recount(metric: Metric, runs: list[Predictions], member: np.ndarray | None, n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Values from how often each unit was drawn (whole groups with ``member``), chunk by chunk of draws, all runs on the same counts."""
    assert metric.resampled is not None
    cells = max(array.size for p in runs for array in p.values())  # a metric of many classes reads each of them in every draw
    draws = max(min(draws, RECOMPUTED_DRAWS), min(draws, _WORK // cells))
    held = max((p["label"].size for p in runs if "label" in p), default=n)  # a row may have many positions, and each is drawn with it
    chunk, drawn = max(1, _CELLS // max(n, held)), n if member is None else int(member.max()) + 1
    out = []
    for start in range(0, draws, chunk):
        counts = _counts(drawn, min(chunk, draws - start), rng)
        counts = counts if member is None else counts[:, member]
        out.append(np.stack([np.asarray(metric.resampled(p, counts), dtype=np.float64) for p in runs], axis=1))
    return np.concatenate(out)


def _recompute(metric: Metric, runs: list[Predictions], member: np.ndarray | None, n: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    members = None
    if member is not None:
        order = np.argsort(member, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(member))[:-1])
    out = np.empty((draws, len(runs)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a metric may warn of a class that a resample misses, once a draw
        for row in out:
            picked = rng.integers(0, n, n) if members is None else np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
            row[:] = [metric.value({name: array[picked] for name, array in p.items()}) for p in runs]
    return out
