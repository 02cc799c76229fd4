"""Shift between a source and a target, and between a target's training and test rows.

Covariate shift by a classifier two-sample test (Lopez-Paz and Oquab, Revisiting Classifier
Two-Sample Tests, ICLR 2017) on the features of the source's network; label shift by the shares of
classes; concept shift by comparing a head that was fitted elsewhere with one that is fitted to the
rows themselves; and, where rows are made of single features, the drift of each.

Rows of one group (a patient, a speaker, an episode) are alike, and splits never divide a group.
Where groups are known they are never divided between fitting and trying either, and every interval
and p value counts groups instead of rows: each is one observation. This is exact where the rows of
a group are all equal, and cautious where they are not.

Nothing here chooses anything: what is measured goes into the report alone.
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

from pipeline.core.groups import unit_numbers
from pipeline.report.shift import Drift, Estimate
from pipeline.report.stats import t_interval

RIDGE = 0.01
"""Of linear classifiers, in shares of the mean variance of a feature."""
FOLDS = 5
FEWEST, FEWEST_GROUPS = 20, 4
"""Rows and groups of each side that a comparison needs."""


def domain_classifier_accuracy(
    rows: np.ndarray,
    others: np.ndarray,
    groups: np.ndarray | None = None,
    other_groups: np.ndarray | None = None,
    seed: int = 0,
) -> Estimate:
    """Return the accuracy of a classifier of two samples, with Wilson's 95 % interval.

    A linear classifier is fitted to a random half of the groups and tried on the other half. Both
    sides weigh the same in each, so that chance is 0.5, and groups weigh the same on their side.

    Args:
        rows: (n, D) features.
        others: (m, D) features.
        groups: (n,) group of each row; None: each row is independent.
        other_groups: (m,) the same for the others.
        seed: Of the halves.

    Raises:
        ValueError: A side has fewer than FEWEST rows or FEWEST_GROUPS groups.
    """
    if min(len(rows), len(others)) < FEWEST:
        raise ValueError(f"fewer than {FEWEST} rows on one side")
    rng = np.random.default_rng(seed)
    fitted, tried = [], []
    for features, group_of_row in ((rows, groups), (others, other_groups)):
        unit = unit_numbers(group_of_row, len(features))
        count = int(unit.max()) + 1
        if count < FEWEST_GROUPS:
            raise ValueError(f"fewer than {FEWEST_GROUPS} groups on one side")
        place = rng.permutation(count)[unit]  # the rows of a group stay together
        order = np.argsort(place, kind="stable")
        order = rng.permutation(order) if group_of_row is not None else order
        is_fitted = place[order] < count // 2
        fitted.append(features[order[is_fitted]])
        tried.append((features[order[~is_fitted]], place[order[~is_fitted]]))
    rows_per_side = min(map(len, fitted))
    x = np.concatenate([features[:rows_per_side] for features in fitted]).astype(np.float64)
    y = np.repeat([[1.0], [-1.0]], rows_per_side, axis=0)
    accuracies, num_units = [], []
    for sign, (features, unit) in zip((1, -1), tried, strict=True):
        margin = sign * ridge_predictions(x, y, features.astype(np.float64))[:, 0]
        is_right = (margin > 0) + 0.5 * (margin == 0)
        number = unit_numbers(unit, len(unit))
        rows_per_unit = np.bincount(number)
        accuracies.append(float((np.bincount(number, is_right) / rows_per_unit).mean()))
        num_units.append(len(rows_per_unit))
    # the mean of two shares is as certain as one share of so many observations
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
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
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
    n, m = (sum(one[name] for name in shared) for one in (counts, others))
    if not n or not m:
        return {}
    level = 1 - 0.05 / len(shared)
    # rows of one group are one observation together: each row counts groups / rows
    scale, other_scale = (
        1.0 if of is None else min(of / sum(one.values()), 1.0)
        for of, one in ((groups, counts), (other_groups, others))
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

    The fitted one is linear, and tried by cross-validation on the same rows. It has their labels
    and the other has not: with few rows, or where the inputs are new to the other as well, the
    difference is not that of the concept alone.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.
        existing_scores: (n, K) probabilities or scores of the same classes by the existing head.
        groups: (n,) group of each row; None: each row is independent.

    Raises:
        ValueError: There are fewer than FEWEST rows, rows of one class alone, or fewer than
            FEWEST_GROUPS groups.
    """
    if len(labels) < FEWEST or len(np.unique(labels)) < 2:
        raise ValueError(f"fewer than {FEWEST} rows of two classes that both sides have")
    unit = unit_numbers(groups, len(labels))
    count = int(unit.max()) + 1
    if count < FEWEST_GROUPS:
        raise ValueError(f"fewer than {FEWEST_GROUPS} groups")
    fold = (np.random.default_rng(0).permutation(count) % FOLDS)[unit]
    x, y = features.astype(np.float64), np.eye(existing_scores.shape[1])[labels]
    fitted = np.empty(len(labels), dtype=np.int64)
    for k in np.unique(fold):
        is_tried = fold == k
        scores = ridge_predictions(x[~is_tried], y[~is_tried], x[is_tried])
        fitted[is_tried] = scores.argmax(1)
    difference = (fitted == labels).astype(float) - (existing_scores.argmax(1) == labels)
    of_groups = np.bincount(unit, difference) / np.bincount(unit)
    return Estimate(*t_interval(of_groups.tolist()))


def feature_drift(
    features: Iterable[tuple[str, np.ndarray]], count: int, groups: tuple[int, int] | None = None
) -> tuple[Drift, ...]:
    """Compare the single features of two samples, the largest drift first.

    Numbers by the test of Kolmogorov and Smirnov, on the rows that have one, and the share of rows
    that have none by the chi-square test; categories by the Jensen-Shannon divergence in bits, with
    the p value of the chi-square test. The p values are corrected together by the procedure of
    Benjamini and Hochberg (1995).

    Args:
        features: Name and values of each feature (`HasSingleFeatures`) of the rows of both samples
            together, since categories are numbered within one table.
        count: How many of the rows, from the first on, are of the first sample.
        groups: Number of groups of both samples; None: each row is independent.
    """
    found: list[tuple[str, float, float, str]] = []
    for name, values in features:
        sides = values[:count], values[count:]
        shares = (1.0, 1.0)
        if groups is not None:
            shares = tuple(
                min(of / max(len(one), 1), 1.0) for of, one in zip(groups, sides, strict=True)
            )
        found += [(name, *one) for one in _drifts(*sides, shares)]
    if not found:
        return ()
    corrected = stats.false_discovery_control([p for _, _, p, _ in found])
    drifts = [
        Drift(name, size, float(p), kind)
        for (name, size, _, kind), p in zip(found, corrected, strict=True)
    ]
    return tuple(sorted(drifts, key=lambda one: (-one.size, one.feature)))


def _drifts(
    values: np.ndarray, others: np.ndarray, shares: tuple[float, ...]
) -> list[tuple[float, float, str]]:
    """Return (size, p value, kind) of each comparison of a feature that has enough rows.

    Args:
        shares: Of both sides, groups in relation to rows; 1 where rows are independent.
    """
    if min(len(values), len(others)) < FEWEST:
        return []
    sides = values, others
    if not np.issubdtype(values.dtype, np.floating):
        return [_drift_of_categories(*sides, shares)]
    known = [np.isfinite(one) for one in sides]
    found: list[tuple[float, float, str]] = []
    if not all(one.all() for one in known):
        _, p, _ = _drift_of_categories(known[0], known[1], shares)
        found.append((abs(float(known[0].mean() - known[1].mean())), p, "missing"))
    values, others = (one[here] for one, here in zip(sides, known, strict=True))
    if min(len(values), len(others)) < FEWEST:
        return found
    test: Any = stats.ks_2samp(values, others)
    p = float(test.pvalue)
    if shares != (1.0, 1.0):
        n, m = (max(len(o) * s, 1.0) for o, s in zip((values, others), shares, strict=True))
        p = float(stats.kstwo.sf(test.statistic, max(round(n * m / (n + m)), 1)))
    return [*found, (float(test.statistic), p, "numbers")]


def _drift_of_categories(
    values: np.ndarray, others: np.ndarray, shares: tuple[float, ...]
) -> tuple[float, float, str]:
    """Return the size of a drift of categories, its p value and "categories"."""
    kinds = np.union1d(values, others)
    if len(kinds) < 2:
        return 0.0, 1.0, "categories"
    counts = np.array([(one[:, None] == kinds).sum(0) for one in (values, others)])
    size = float(jensenshannon(*counts, base=2)) ** 2
    found: Any = stats.chi2_contingency(counts * np.array(shares)[:, None])
    return size, float(found.pvalue), "categories"
