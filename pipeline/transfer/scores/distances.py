"""Distances between a source's training rows and a target's rows, in the source's own features.

They read no label, so every target has them; a source that is a checkpoint has no rows at hand, and
so none of them. Lower is better.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.registry import register
from pipeline.core.contracts.score import Estimate, score
from pipeline.transfer.shift import linear, wilson

FOLDS = 5
MOST_ROWS = 500
"""Rows of each side that MMD compares pair by pair, evenly spread."""


@register("score", "frechet", title="Fréchet distance")
@score(higher_is_better=False, bounds=(0.0, math.inf))
def frechet(features: np.ndarray, source_features: np.ndarray) -> float:
    """Return the squared Fréchet distance of two Gaussians, in units of the source's variance.

    |m - m_s|^2 + tr(C + C_s - 2 (C C_s)^1/2) (Dowson and Landau 1982; Heusel et al. 2017 for
    images), divided by tr(C_s), so that networks of different scale can be compared.

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
    shared = np.linalg.svd(_reduced(x) @ _reduced(s).T, compute_uv=False).sum()
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
def mmd(features: np.ndarray, source_features: np.ndarray) -> float:
    """Return the squared maximum mean discrepancy, its unbiased estimate, which may be below zero.

    The kernel is Gaussian with the median distance of all rows as its width (Gretton et al. 2012).

    Args:
        features: (n, D) features of the target's rows.
        source_features: (m, D) features of the source's rows.

    Returns:
        The distance, NaN where there are fewer than two rows or all are alike.
    """
    x, s = (_some(one).astype(np.float64) for one in (features, source_features))
    n, m = len(x), len(s)
    if min(n, m) < 2:
        return float("nan")
    both = np.concatenate([x, s])
    squared = (both**2).sum(1)
    apart = np.maximum(squared[:, None] + squared - 2 * both @ both.T, 0.0)
    width = float(np.median(apart[np.triu_indices(n + m, 1)]))
    if not width > 0:
        return float("nan")
    kernel = np.exp(-apart / (2 * width))
    np.fill_diagonal(kernel, 0.0)
    within = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return float(within - 2 * kernel[:n, n:].mean())


def _some(rows: np.ndarray) -> np.ndarray:
    if len(rows) <= MOST_ROWS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, MOST_ROWS).astype(np.int64)]


@register("score", "proxy_a", title="Proxy A-distance")
@score(higher_is_better=False, bounds=(0.0, 2.0))
def proxy_a(features: np.ndarray, source_features: np.ndarray) -> float | Estimate:
    """Return 2 (1 - 2 e) with its interval, for a classifier of source or target with error e.

    From 0 (or below, by chance), where nothing tells them apart, to 2 (Ben-David et al. 2007). The
    classifier is ridge regression, tested on rows that it was not fitted to (five folds); both
    sides have equally many rows. The interval is Wilson's of the error.

    Args:
        features: (n, D) features of the target's rows.
        source_features: (m, D) features of the source's rows.

    Returns:
        (value, low, high), NaN where a side has fewer than ten rows.
    """
    count = min(len(features), len(source_features))
    if count < 2 * FOLDS:
        return float("nan")
    rng = np.random.default_rng(0)
    sides = [one[rng.permutation(len(one))[:count]] for one in (features, source_features)]
    x = np.concatenate(sides).astype(np.float64)
    side = np.repeat([1.0, -1.0], count)
    fold = np.tile(np.arange(count) % FOLDS, 2)
    wrong = 0
    for k in range(FOLDS):
        held = fold == k
        # without the offset: the side that is the larger in fitted rows is the smaller in held ones
        found = linear(x[~held], side[~held, None], x[held])[:, 0] - side[~held].mean()
        wrong += int((found * side[held] <= 0).sum())
    low, high = wilson(wrong, 2 * count)
    value, least, most = (2 * (1 - 2 * error) for error in (wrong / (2 * count), high, low))
    return value, least, most
