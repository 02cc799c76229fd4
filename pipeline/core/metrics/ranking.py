"""Metrics that rank rows, as weighted sums: one sort serves every bootstrap draw.

Scores are (n,) floats, higher is more likely. Positive is (n,) bool. Drawn is (n, R) float64, how
often each row was drawn in each of R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ranking = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(scores, positive, drawn) -> (R,) values; NaN without both classes or where a score is NaN."""


def _ranked(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return how often positives and negatives of each run of equal scores were drawn.

    Runs are in order of falling scores; neighbouring runs without a positive are joined.

    Returns:
        (G, R) positives and (G, R) negatives.
    """
    order = np.argsort(-scores, kind="stable")
    s, y, drawn = scores[order], positive[order], drawn[order]
    starts = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    held = np.add.reduceat(y.astype(np.int64), starts) > 0
    starts = starts[held | np.concatenate([[True], held[:-1]])]
    rows = np.add.reduceat(drawn, starts, axis=0)
    hits = np.add.reduceat(drawn * y[:, None], starts, axis=0)
    return hits, rows - hits


def undefined(drawn: np.ndarray) -> np.ndarray:
    """Return (R,) NaN: the metric has no value in any of the resamples."""
    resamples: int = drawn.shape[1]
    return np.full(resamples, np.nan)


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return (R,) areas under the ROC curve.

    It is how often a positive scores above a negative, ties counted half (Mann and Whitney 1947).
    """
    if not len(scores) or np.isnan(scores).any():
        return undefined(drawn)
    hits, misses = _ranked(scores, positive, drawn)
    pairs = hits.sum(0) * misses.sum(0)
    below = misses.sum(0) - np.cumsum(misses, axis=0)
    return np.where(
        pairs > 0, (hits * (below + misses / 2)).sum(0) / np.maximum(pairs, 1e-300), np.nan
    )


def weighted_average_precision(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return (R,) average precisions.

    It is the sum over thresholds of the precision times the recall that is added, not interpolated,
    as in scikit-learn.
    """
    if not len(scores) or np.isnan(scores).any():
        return undefined(drawn)
    hits, misses = _ranked(scores, positive, drawn)
    found = np.cumsum(hits, axis=0)
    precision = found / np.maximum(found + np.cumsum(misses, axis=0), 1e-300)
    total, both = hits.sum(0), (hits.sum(0) > 0) & (misses.sum(0) > 0)
    return np.where(both, (hits * precision).sum(0) / np.maximum(total, 1e-300), np.nan)


def weighted_min_precision_sensitivity(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return (R,) the best min(precision, sensitivity) over all thresholds.

    Event 1 of the CinC Challenge 2012 (Silva et al. 2012).
    """
    if not len(scores) or np.isnan(scores).any():
        return undefined(drawn)
    hits, misses = _ranked(scores, positive, drawn)
    found, total = np.cumsum(hits, axis=0), hits.sum(0)
    precision = found / np.maximum(found + np.cumsum(misses, axis=0), 1e-300)
    best = np.minimum(precision, found / np.maximum(total, 1e-300)).max(0)
    return np.where((total > 0) & (misses.sum(0) > 0), best, np.nan)
