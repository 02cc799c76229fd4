"""Distances between a source's training rows and a target's rows, in the source's own features.

They read no label, so every target has them; a source that is a checkpoint has no rows at hand, and
so none of them. Lower is better.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.distance import squareform

from pipeline.config.registry import register
from pipeline.core.contracts.score import Estimate, score
from pipeline.core.groups import unit_numbers
from pipeline.core.sampling import evenly_spread
from pipeline.transfer.shift import MIN_GROUPS, ridge_predictions, wilson

FOLDS = 5
MAX_ROWS = 500
"""Rows of each side that MMD compares pair by pair, evenly spread."""


@register("score", "frechet", title="Fréchet distance")
@score(higher_is_better=False, bounds=(0.0, math.inf))
def frechet(features: np.ndarray, source_features: np.ndarray) -> float:
    """Return the squared Fréchet distance of two Gaussians, in units of the source's variance.

    Lower is better. |m - m_s|^2 + tr(C + C_s - 2 (C C_s)^1/2) (Dowson and Landau 1982; Heusel et
    al. 2017 for images), divided by tr(C_s), so that networks of different scale can be compared.

    It needs rows of the source, and no labels. Use it to see whether the target looks like the
    source; it does not say whether the features help the task.

    Args:
        features: (n, D) features of the target's rows.
        source_features: (m, D) features of the source's rows.

    Returns:
        The distance, NaN where the source's features do not vary.
    """
    (x, mean), (s, source_mean) = (_scaled(one) for one in (features, source_features))
    variance = float((s**2).sum())
    if not variance > 0:
        return float("nan")
    # tr (X'X S'S)^1/2 is the sum of the singular values of X S'
    fewer, more = sorted((x, s), key=len)
    shared = np.linalg.svd(more @ _reduced(fewer).T, compute_uv=False).sum()
    distance = ((mean - source_mean) ** 2).sum() + (x**2).sum() + variance - 2 * shared
    return max(0.0, float(distance)) / variance


def _scaled(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, D) centred rows whose Gram matrix is the covariance, and the mean."""
    f = features.astype(np.float64)
    mean = f.mean(0)
    return (f - mean) / math.sqrt(len(f)), mean


def _reduced(x: np.ndarray) -> np.ndarray:
    """Return (min(n, D), D) rows with the same Gram matrix."""
    return x if len(x) <= x.shape[1] else np.asarray(np.linalg.qr(x, mode="r"))


@register("score", "mmd", title="MMD²")
@score(higher_is_better=False)
def mmd(
    features: np.ndarray,
    source_features: np.ndarray,
    groups: np.ndarray | None = None,
    source_groups: np.ndarray | None = None,
) -> float:
    """Return the squared maximum mean discrepancy, its unbiased estimate, which may be below zero.

    Lower is better. The kernel is Gaussian with the median distance of all rows as its width
    (Gretton et al. 2012). Pairs of rows of the same group are left out of a side's own mean: they
    are alike, and two groups of one population would look like two domains.

    It needs rows of the source, and no labels. Use it in place of ``frechet`` where
    features are far from Gaussian.

    Args:
        features: (n, D) features of the target's rows.
        source_features: (m, D) features of the source's rows.
        groups: (n,) group of each row of the target; None: each row is independent.
        source_groups: (m,) the same for the source's rows.

    Returns:
        The distance, NaN where a side has fewer than two rows or groups, or all rows are alike.
    """
    x, s = (_some(one).astype(np.float64) for one in (features, source_features))
    n = len(x)
    units = [
        _some(unit_numbers(of, len(one)))
        for one, of in ((features, groups), (source_features, source_groups))
    ]
    if any(len(np.unique(unit)) < 2 for unit in units):
        return float("nan")
    both = np.concatenate([x, s])
    squared = (both**2).sum(1)
    apart = both @ both.T
    apart *= -2
    apart += squared[:, None] + squared
    np.maximum(apart, 0.0, out=apart)
    width = float(np.median(squareform(apart, checks=False)))  # of the pairs above the diagonal
    if not width > 0:
        return float("nan")
    apart /= -2 * width
    kernel = np.exp(apart, out=apart)
    within = 0.0
    sides = kernel[:n, :n], kernel[n:, n:]
    for side, unit in zip(sides, units, strict=True):
        within += float(side[unit[:, None] != unit].mean())
    return within - 2 * float(kernel[:n, n:].mean())


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[evenly_spread(len(rows), MAX_ROWS)]


@register("score", "proxy_a", title="Proxy A-distance")
@score(higher_is_better=False, bounds=(0.0, 2.0))
def proxy_a(
    features: np.ndarray,
    source_features: np.ndarray,
    groups: np.ndarray | None = None,
    source_groups: np.ndarray | None = None,
) -> float | Estimate:
    """Return how well a classifier tells rows of the source from rows of the target.

    Lower is better. The score is 2 (1 - 2 e), with the classifier's error e: 0 (or below, by
    chance) if the rows cannot be told apart, at most 2 (Ben-David et al. 2007). The classifier is
    ridge regression on equally many rows of both sides, cross-validated in five folds (four where a
    side has four groups). The interval is Wilson's of the error. Where rows have groups, no group
    is in two folds, the error is the mean of the groups' errors, and each group is one observation.

    It needs rows of the source, and no labels. Use it to see whether source and target can be
    told apart at all.

    Args:
        features: (n, D) features of the target's rows.
        source_features: (m, D) features of the source's rows.
        groups: (n,) group of each row of the target; None: each row is independent.
        source_groups: (m,) the same for the source's rows.

    Returns:
        (value, low, high), NaN where a side has fewer than ten rows or four groups, or the features
        do not vary.
    """
    count = min(len(features), len(source_features))
    rng = np.random.default_rng(0)
    sides, units = [], []
    for one, of in ((features, groups), (source_features, source_groups)):
        drawn = rng.permutation(len(one))[:count]
        sides.append(one[drawn].astype(np.float64))
        units.append(_in_order_drawn(unit_numbers(of, len(one))[drawn]))
    fewest = min(len(np.unique(unit)) for unit in units)
    if count < 2 * FOLDS or fewest < MIN_GROUPS:
        return float("nan")
    if not np.ptp(np.concatenate(sides), axis=0).any():
        return float("nan")
    folds = [unit % min(FOLDS, fewest) for unit in units]
    wrong = [np.zeros(count), np.zeros(count)]
    for k in range(min(FOLDS, fewest)):
        fitted = [one[fold != k] for one, fold in zip(sides, folds, strict=True)]
        least = min(map(len, fitted))  # a larger side would draw the threshold towards itself
        x = np.concatenate([one[:least] for one in fitted])
        y = np.repeat([[1.0], [-1.0]], least, axis=0)
        for sign, one, fold, missed in zip((1, -1), sides, folds, wrong, strict=True):
            missed[fold == k] = sign * ridge_predictions(x, y, one[fold == k])[:, 0] <= 0
    rates = [np.bincount(unit, m) / np.bincount(unit) for unit, m in zip(units, wrong, strict=True)]
    error = float(np.mean([rate.mean() for rate in rates]))
    # the mean of two shares is as certain as one share of so many observations
    observations = 4 / sum(1 / len(rate) for rate in rates)
    low, high = wilson(error * observations, observations)
    value, least_distance, most = (2 * (1 - 2 * one) for one in (error, high, low))
    return value, least_distance, most


def _in_order_drawn(unit: np.ndarray) -> np.ndarray:
    """Return the (n,) numbers of groups, from 0 in the order in which they first come."""
    _, first, group = np.unique(unit, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]
