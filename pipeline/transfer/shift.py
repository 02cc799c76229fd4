"""Shift between a source and a target, and between a target's training and test rows.

Covariate shift by a classifier two-sample test (Lopez-Paz and Oquab, Revisiting Classifier
Two-Sample Tests, ICLR 2017) on the features of the source's network; label shift by the shares of
classes; concept shift by comparing a head that was fitted elsewhere with one that is fitted to the
rows themselves; and, where rows are made of single features, the drift of each.

Rows of one group (a patient, a speaker, an episode) are alike, and splits never divide a group.
Where groups are known, a classifier is never tested on rows of a group that it was fitted to, and
every interval and p value counts groups instead of rows: each is one observation. This is exact
where the rows of a group are all equal, and cautious where they are not.

The results are for the report only; nothing is chosen by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy  # its stats is slow to import, so it is named in full: scipy imports it at first use
from scipy import special  # pyright: ignore[reportMissingTypeStubs]
from scipy.spatial.distance import (  # pyright: ignore[reportMissingTypeStubs]
    jensenshannon,
)

from pipeline.core.groups import unit_numbers
from pipeline.report.shift import Drift, Estimate
from pipeline.report.stats import t_interval

RIDGE = 0.01
"""L2 penalty of linear classifiers, as a share of the mean variance of a feature."""
FOLDS = 5
MIN_ROWS, MIN_GROUPS = 20, 4
"""Rows and groups of each side that a comparison needs."""


def domain_classifier_accuracy(
    rows: np.ndarray,
    others: np.ndarray,
    groups: np.ndarray | None = None,
    other_groups: np.ndarray | None = None,
    seed: int = 0,
) -> Estimate:
    """Return the accuracy of a classifier of two samples, with Wilson's 95 % interval.

    A linear classifier is fitted to a random half of the groups and tested on the other half. Both
    samples have the same weight in each half, so that chance is 0.5, and so have all groups of a
    sample.

    Args:
        rows: (n, D) features.
        others: (m, D) features.
        groups: (n,) group of each row; None: each row is independent.
        other_groups: (m,) the same for the others.
        seed: Of the halves.

    Raises:
        ValueError: A side has fewer than MIN_ROWS rows or MIN_GROUPS groups.
    """
    if min(len(rows), len(others)) < MIN_ROWS:
        raise ValueError(f"fewer than {MIN_ROWS} rows on one side")
    rng = np.random.default_rng(seed)
    fitted, tested = [], []
    for features, group_of_row in ((rows, groups), (others, other_groups)):
        unit = unit_numbers(group_of_row, len(features))
        count = int(unit.max()) + 1
        if count < MIN_GROUPS:
            raise ValueError(f"fewer than {MIN_GROUPS} groups on one side")
        rank = rng.permutation(count)[unit]  # the same for all rows of a group
        order = np.argsort(rank, kind="stable")
        order = rng.permutation(order) if group_of_row is not None else order
        is_fitted = rank[order] < count // 2
        fitted.append(features[order[is_fitted]])
        tested.append((features[order[~is_fitted]], rank[order[~is_fitted]]))
    rows_per_side = min(map(len, fitted))
    x = np.concatenate([features[:rows_per_side] for features in fitted]).astype(np.float64)
    y = np.repeat([[1.0], [-1.0]], rows_per_side, axis=0)
    accuracies, num_units = [], []
    for sign, (features, unit) in zip((1, -1), tested, strict=True):
        margin = sign * ridge_predictions(x, y, features.astype(np.float64))[:, 0]
        is_right = (margin > 0) + 0.5 * (margin == 0)
        number = unit_numbers(unit, len(unit))
        rows_per_unit = np.bincount(number)
        accuracies.append(float((np.bincount(number, is_right) / rows_per_unit).mean()))
        num_units.append(len(rows_per_unit))
    # the mean of two shares has the variance of one share of this many observations
    count = 4 / (1 / num_units[0] + 1 / num_units[1])
    accuracy = sum(accuracies) / 2
    low, high = wilson(accuracy * count, count)
    return Estimate(accuracy, low, high)


def ridge_predictions(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> np.ndarray:
    """Return (t, k) predictions of ridge regression with an intercept, fitted to (n, k) targets."""
    mean, offset = x.mean(0), y.mean(0)
    x, y = x - mean, y - offset
    n, width = x.shape
    penalty = RIDGE * float((x**2).sum()) / width + 1e-300
    if width <= n:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ y)
    else:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(n), y)
    return (x_new - mean) @ weights + offset


def wilson(hits: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share (1927)."""
    z = float(special.ndtri((1 + level) / 2))
    share = hits / n
    whole = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / whole
    variance = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance) / whole
    return middle - half, middle + half


def label_shift(
    counts: Mapping[str, int],
    others: Mapping[str, int],
    groups: int | None = None,
    other_groups: int | None = None,
) -> dict[str, Estimate]:
    """Return the change of each class's share, for the classes that both sides have.

    Shares are those among the rows of shared classes. Intervals are Newcombe's (Statistics in
    Medicine 17, 1998, method 10), widened by Bonferroni's rule so that all of them hold together
    in 95 % of cases.

    Args:
        counts: Number of the target's rows of each class.
        others: The same for what it is compared with.
        groups: Number of groups of the target's rows; None: each row is independent.
        other_groups: The same for what it is compared with.
    """
    shared = [name for name in counts if name in others]
    n, m = (sum(of_side[name] for name in shared) for of_side in (counts, others))
    if not n or not m:
        return {}
    level = 1 - 0.05 / len(shared)
    # rows of one group are one observation together: each row counts groups / rows
    scale, other_scale = (
        1.0 if num_groups is None else min(num_groups / sum(of_side.values()), 1.0)
        for num_groups, of_side in ((groups, counts), (other_groups, others))
    )
    return {
        name: share_change(
            counts[name] * scale, n * scale, others[name] * other_scale, m * other_scale, level
        )
        for name in shared
    }


def share_change(
    hits: float, n: float, other_hits: float, m: float, level: float = 0.95
) -> Estimate:
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
    features: np.ndarray,
    labels: np.ndarray,
    existing_scores: np.ndarray,
    groups: np.ndarray | None = None,
) -> Estimate:
    """Return the accuracy of a head fitted to these rows minus that of an existing head.

    The fitted head is linear, and its accuracy is by cross-validation on the same rows. It has seen
    labels of these rows and the existing head has not. Where rows are few, or their inputs are new
    to the existing head, the difference is not due to the concept alone.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.
        existing_scores: (n, K) probabilities or scores of the same classes by the existing head.
        groups: (n,) group of each row; None: each row is independent.

    Raises:
        ValueError: There are fewer than MIN_ROWS rows, rows of one class only, or fewer than
            MIN_GROUPS groups.
    """
    if len(labels) < MIN_ROWS or len(np.unique(labels)) < 2:
        raise ValueError(f"fewer than {MIN_ROWS} rows of two classes that both sides have")
    unit = unit_numbers(groups, len(labels))
    count = int(unit.max()) + 1
    if count < MIN_GROUPS:
        raise ValueError(f"fewer than {MIN_GROUPS} groups")
    fold = (np.random.default_rng(0).permutation(count) % FOLDS)[unit]
    x, y = features.astype(np.float64), np.eye(existing_scores.shape[1])[labels]
    fitted = np.empty(len(labels), dtype=np.int64)
    for k in np.unique(fold):
        is_tested = fold == k
        scores = ridge_predictions(x[~is_tested], y[~is_tested], x[is_tested])
        fitted[is_tested] = scores.argmax(1)
    difference = (fitted == labels).astype(float) - (existing_scores.argmax(1) == labels)
    of_groups = np.bincount(unit, difference) / np.bincount(unit)
    return Estimate(*t_interval(of_groups.tolist()))


def feature_drift(
    features: Iterable[tuple[str, np.ndarray]], count: int, groups: tuple[int, int] | None = None
) -> tuple[Drift, ...]:
    """Compare the single features of two samples, the largest drift first.

    Numbers are compared by the test of Kolmogorov and Smirnov, on the rows that have one, and the
    shares of rows without a number by the chi-square test. Categories are compared by the
    Jensen-Shannon divergence in bits, with the p value of the chi-square test. All p values are
    corrected together by the procedure of Benjamini and Hochberg (1995).

    Args:
        features: Name and values of each feature (`HasSingleFeatures`) of the rows of both samples
            together, since categories are numbered within one table.
        count: How many of the rows, from the first on, are of the first sample.
        groups: Number of groups of both samples; None: each row is independent.
    """
    comparisons: list[tuple[str, float, float, str]] = []
    for name, values in features:
        sides = values[:count], values[count:]
        shares = (1.0, 1.0)
        if groups is not None:
            shares = tuple(
                min(num_groups / max(len(side), 1), 1.0)
                for num_groups, side in zip(groups, sides, strict=True)
            )
        comparisons += [(name, *comparison) for comparison in _drifts(*sides, shares)]
    if not comparisons:
        return ()
    corrected = scipy.stats.false_discovery_control([p for _, _, p, _ in comparisons])
    drifts = [
        Drift(name, size, float(p), kind)
        for (name, size, _, kind), p in zip(comparisons, corrected, strict=True)
    ]
    return tuple(sorted(drifts, key=lambda drift: (-drift.size, drift.feature)))


def _drifts(
    values: np.ndarray, others: np.ndarray, shares: tuple[float, ...]
) -> list[tuple[float, float, str]]:
    """Return (size, p value, kind) of each comparison of a feature that has enough rows.

    Args:
        shares: Of both sides, groups in relation to rows; 1 where rows are independent.
    """
    if min(len(values), len(others)) < MIN_ROWS:
        return []
    if not np.issubdtype(values.dtype, np.floating):
        return [_drift_of_categories(values, others, shares)]
    is_known, other_is_known = np.isfinite(values), np.isfinite(others)
    out: list[tuple[float, float, str]] = []
    if not (is_known.all() and other_is_known.all()):
        _, p, _ = _drift_of_categories(is_known, other_is_known, shares)
        out.append((abs(float(is_known.mean() - other_is_known.mean())), p, "missing"))
    values, others = values[is_known], others[other_is_known]
    if min(len(values), len(others)) < MIN_ROWS:
        return out
    test: Any = scipy.stats.ks_2samp(values, others)
    p = float(test.pvalue)
    if shares != (1.0, 1.0):
        n = max(len(values) * shares[0], 1.0)
        m = max(len(others) * shares[1], 1.0)
        rows = max(round(n * m / (n + m)), 1)
        p = float(scipy.stats.kstwo.sf(test.statistic, rows))
    return [*out, (float(test.statistic), p, "numbers")]


def _drift_of_categories(
    values: np.ndarray, others: np.ndarray, shares: tuple[float, ...]
) -> tuple[float, float, str]:
    """Return the size of a drift of categories, its p value and "categories"."""
    kinds = np.union1d(values, others)
    if len(kinds) < 2:
        return 0.0, 1.0, "categories"
    counts = np.array([(side[:, None] == kinds).sum(0) for side in (values, others)])
    size = float(jensenshannon(*counts, base=2)) ** 2
    test: Any = scipy.stats.chi2_contingency(counts * np.array(shares)[:, None])
    return size, float(test.pvalue), "categories"
