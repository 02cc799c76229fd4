"""Metrics that rank rows, as weighted sums: one sort serves every bootstrap draw.

Scores: (n,) float, higher is more likely. Positive: (n,) bool. Drawn: (n, R) float64, how often
each row was drawn in each of R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ranking = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(scores, positive, drawn) to (R,) values; NaN without both classes, or where a score is NaN."""


def _ranked(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(G, R) drawn positives and negatives of each run of equal scores, the highest first;
    neighbouring runs without a positive are one.
    """
    order = np.argsort(-scores, kind="stable")
    s, y, drawn = scores[order], positive[order], drawn[order]
    starts = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    held = np.add.reduceat(y.astype(np.int64), starts) > 0
    starts = starts[held | np.concatenate([[True], held[:-1]])]
    rows = np.add.reduceat(drawn, starts, axis=0)
    hits = np.add.reduceat(drawn * y[:, None], starts, axis=0)
    return hits, rows - hits


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(R,) areas under the ROC curve: how often a positive scores above a negative, ties counted
    half (Mann and Whitney, 1947).
    """
    if not len(scores) or np.isnan(scores).any():
        return np.full(drawn.shape[1], np.nan)
    hits, misses = _ranked(scores, positive, drawn)
    pairs = hits.sum(0) * misses.sum(0)
    below = misses.sum(0) - np.cumsum(misses, axis=0)
    return np.where(
        pairs > 0, (hits * (below + misses / 2)).sum(0) / np.maximum(pairs, 1e-300), np.nan
    )


def weighted_average_precision(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """(R,) average precisions: the precision at each threshold times the recall that it adds, not
    interpolated (as scikit-learn has it).
    """
    if not len(scores) or np.isnan(scores).any():
        return np.full(drawn.shape[1], np.nan)
    hits, misses = _ranked(scores, positive, drawn)
    found = np.cumsum(hits, axis=0)
    precision = found / np.maximum(found + np.cumsum(misses, axis=0), 1e-300)
    total, both = hits.sum(0), (hits.sum(0) > 0) & (misses.sum(0) > 0)
    return np.where(both, (hits * precision).sum(0) / np.maximum(total, 1e-300), np.nan)


def weighted_min_precision_sensitivity(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """(R,) the best min(precision, sensitivity) over all thresholds (Silva et al. 2012: event 1 of
    the CinC Challenge 2012).
    """
    if not len(scores) or np.isnan(scores).any():
        return np.full(drawn.shape[1], np.nan)
    hits, misses = _ranked(scores, positive, drawn)
    found, total = np.cumsum(hits, axis=0), hits.sum(0)
    precision = found / np.maximum(found + np.cumsum(misses, axis=0), 1e-300)
    best = np.minimum(precision, found / np.maximum(total, 1e-300)).max(0)
    return np.where((total > 0) & (misses.sum(0) > 0), best, np.nan)
