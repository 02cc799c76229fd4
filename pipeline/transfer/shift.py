"""Shift between a source and a target, and between a target's training and test rows.

Covariate shift by a classifier two-sample test (Lopez-Paz and Oquab, Revisiting Classifier
Two-Sample Tests, ICLR 2017) on the features of the source's network; label shift by the shares of
classes; concept shift by comparing the source's head with a head that is fitted to the target; and,
where rows are made of single features, the drift of each.

Nothing here chooses anything: what is measured goes into the report alone. Of test rows only the
inputs are read, never the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import special, stats  # pyright: ignore[reportMissingTypeStubs]
from scipy.spatial.distance import (  # pyright: ignore[reportMissingTypeStubs]
    jensenshannon,
)

from pipeline.report.shift import Drift, Estimate
from pipeline.report.stats import t_interval

RIDGE = 0.01
"""Of linear classifiers, in shares of the mean variance of a feature."""
FOLDS = 5
FEWEST = 20
"""Rows of each side that a comparison needs."""


def told_apart(rows: np.ndarray, others: np.ndarray, seed: int = 0) -> Estimate:
    """Return the accuracy of telling two samples apart, with Wilson's 95 % interval.

    A linear classifier is fitted to a random half of the rows and tried on the other half; both
    sides have equally many rows in each, so that chance is 0.5. Rows count as independent: where
    they come in groups (speakers, patients) that differ, the samples do as well.

    Args:
        rows: (n, D) features.
        others: (m, D) features.
        seed: Of the halves.

    Raises:
        ValueError: A side has fewer than FEWEST rows.
    """
    count = min(len(rows), len(others)) // 2 * 2
    if count < FEWEST:
        raise ValueError(f"fewer than {FEWEST} rows on one side")
    rng = np.random.default_rng(seed)
    sides = [one[rng.permutation(len(one))[:count]] for one in (rows, others)]
    half = count // 2
    fitted, tried = (
        np.concatenate([one[part] for one in sides]).astype(np.float64)
        for part in (slice(half), slice(half, None))
    )
    side = np.repeat([1.0, -1.0], half)
    right = int((linear(fitted, side[:, None], tried)[:, 0] * side > 0).sum())
    low, high = wilson(right, count)
    return Estimate(right / count, low, high)


def linear(x: np.ndarray, y: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """Return (t, k) predictions of ridge regression with an intercept, fitted to (n, k) targets."""
    mean, offset = x.mean(0), y.mean(0)
    x, y = x - mean, y - offset
    n, width = x.shape
    penalty = RIDGE * float((x**2).sum()) / width + 1e-300
    if width <= n:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(n), y)
    return (tried - mean) @ weights + offset


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share (1927)."""
    z = float(special.ndtri((1 + level) / 2))
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def label_shift(counts: Mapping[str, int], others: Mapping[str, int]) -> dict[str, Estimate]:
    """Return the change of each class's share, for the classes that both sides have.

    Shares are those among the rows of shared classes. Intervals are Newcombe's (Statistics in
    Medicine 17, 1998, method 10), widened by Bonferroni's rule so that all of them hold together
    in 95 % of cases.

    Args:
        counts: Class to its number of rows in the target.
        others: The same for what it is compared with.
    """
    shared = [name for name in counts if name in others]
    n, m = (sum(one[name] for name in shared) for one in (counts, others))
    if not n or not m:
        return {}
    level = 1 - 0.05 / len(shared)
    return {name: share_change(counts[name], n, others[name], m, level) for name in shared}


def share_change(hits: int, n: int, other_hits: int, m: int, level: float = 0.95) -> Estimate:
    """Return hits / n - other_hits / m with Newcombe's interval from those of Wilson."""
    share, other = hits / n, other_hits / m
    (low, high), (other_low, other_high) = wilson(hits, n, level), wilson(other_hits, m, level)
    change = share - other
    return Estimate(
        change,
        change - math.hypot(share - low, other_high - other),
        change + math.hypot(high - share, other - other_low),
    )


def concept_shift(
    features: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, seed: int = 0
) -> Estimate:
    """Return by how much a fitted head is right more often than the source's own head.

    Both are linear and see the same features of the same labelled rows, the fitted one by
    cross-validation. It has the target's labels and the other has not: with few rows, or where the
    inputs are new to the source as well, the difference is not that of the concept alone.

    Args:
        features: (n, D) features of the target's training rows.
        labels: (n,) class numbers.
        probabilities: (n, K) what the source's head says of the same classes in the same order.
        seed: Of the folds.

    Raises:
        ValueError: There are fewer than FEWEST rows, or rows of one class alone.
    """
    if len(labels) < FEWEST or len(np.unique(labels)) < 2:
        raise ValueError(f"fewer than {FEWEST} rows of two classes that both sides have")
    fold = np.random.default_rng(seed).permutation(len(labels)) % FOLDS
    x, y = features.astype(np.float64), np.eye(probabilities.shape[1])[labels]
    fitted = np.empty(len(labels), dtype=np.int64)
    for k in range(FOLDS):
        held = fold == k
        fitted[held] = linear(x[~held], y[~held], x[held]).argmax(1)
    gained = (fitted == labels).astype(float) - (probabilities.argmax(1) == labels)
    return Estimate(*t_interval(gained.tolist()))


def feature_drift(features: Iterable[tuple[str, np.ndarray]], count: int) -> tuple[Drift, ...]:
    """Compare the single features of two samples, the largest drift first.

    Numbers by the test of Kolmogorov and Smirnov, on the rows that have one; categories by the
    Jensen-Shannon divergence in bits, with the p value of the chi-square test. The p values are
    corrected together by the procedure of Benjamini and Hochberg (1995).

    Args:
        features: Name and values of each feature (`HasSingleFeatures`) of the rows of both samples
            together, since categories are numbered within one table.
        count: How many of the rows, from the first on, are of the first sample.
    """
    found = [
        (name, *one)
        for name, values in features
        if (one := _drift(values[:count], values[count:])) is not None
    ]
    if not found:
        return ()
    corrected = stats.false_discovery_control([p for _, _, p, _ in found])
    drifts = [
        Drift(name, size, float(p), kind)
        for (name, size, _, kind), p in zip(found, corrected, strict=True)
    ]
    return tuple(sorted(drifts, key=lambda one: (-one.size, one.feature)))


def _drift(values: np.ndarray, others: np.ndarray) -> tuple[float, float, str] | None:
    """Return (size, p value, kind) of the drift of a feature; None where rows are too few."""
    if np.issubdtype(values.dtype, np.floating):
        values, others = values[np.isfinite(values)], others[np.isfinite(others)]
        if min(len(values), len(others)) < FEWEST:
            return None
        test: Any = stats.ks_2samp(values, others)
        return float(test.statistic), float(test.pvalue), "numbers"
    if min(len(values), len(others)) < FEWEST:
        return None
    kinds = np.union1d(values, others)
    counts = np.array([(one[:, None] == kinds).sum(0) for one in (values, others)])
    if len(kinds) < 2:
        return 0.0, 1.0, "categories"
    size = float(jensenshannon(*counts, base=2)) ** 2
    found: Any = stats.chi2_contingency(counts)
    return size, float(found.pvalue), "categories"
