"""Metrics that rank rows, as weighted sums: one sort serves every bootstrap draw.

Scores are (n,) floats, higher is more likely. Positive is (n,) bool. Drawn is (n, R) float64, how
often each row was drawn in each of R resamples. G are the runs of equal scores.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.core.metrics.metric import sum_draws

TARGET_SHARE = 0.01
"""Share of pairs that are of one speaker where the system is used, in NIST's detection cost."""
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
    s, y = scores[order], positive[order]
    starts = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    held = np.add.reduceat(y.astype(np.int64), starts) > 0
    starts = starts[held | np.concatenate([[True], held[:-1]])]
    run = np.empty(len(order), dtype=np.int64)
    lengths = np.diff(starts, append=len(order))
    run[order] = np.repeat(np.arange(len(starts)), lengths)
    rows = sum_draws(run, drawn, len(starts))
    hits = sum_draws(run, drawn, len(starts), weight=positive)
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
    won = (hits * (below + misses / 2)).sum(0)  # a tie is half a pair
    return np.where(pairs > 0, won / np.maximum(pairs, 1e-300), np.nan)


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
    total = hits.sum(0)
    both = (total > 0) & (misses.sum(0) > 0)
    return np.where(
        both,
        (hits * precision).sum(0) / np.maximum(total, 1e-300),
        np.nan,
    )


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


def weighted_equal_error_rate(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return (R,) shares of negatives that are accepted where as many positives are rejected.

    The ROC curve is interpolated linearly between thresholds.
    """
    if not len(scores) or np.isnan(scores).any():
        return undefined(drawn)
    rejected, accepted, has_both = _error_rates(scores, positive, drawn)
    difference = accepted - rejected  # rises from -1, where nothing is accepted, to 1
    after = np.maximum((difference >= 0).argmax(0), 1)
    at = np.arange(len(after))
    low, high = difference[after - 1, at], difference[after, at]
    share = np.where(has_both, -low / np.where(has_both, high - low, 1), 0)
    rate = accepted[after - 1, at] + share * (accepted[after, at] - accepted[after - 1, at])
    return np.where(has_both, rate, np.nan)


def weighted_min_detection_cost(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return (R,) least costs over thresholds.

    Both errors cost 1. The cost is divided by that of rejecting everything (or of accepting
    everything, where that is less), as in NIST's speaker recognition evaluations, where
    `TARGET_SHARE` of all pairs are positive.
    """
    if not len(scores) or np.isnan(scores).any():
        return undefined(drawn)
    rejected, accepted, has_both = _error_rates(scores, positive, drawn)
    costs = TARGET_SHARE * rejected + (1 - TARGET_SHARE) * accepted
    return np.where(has_both, costs.min(0) / min(TARGET_SHARE, 1 - TARGET_SHARE), np.nan)


def _error_rates(
    scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the errors at each threshold, from one that accepts nothing to one that accepts all.

    Returns:
        (G + 1, R) shares of positives that are rejected, (G + 1, R) shares of negatives that are
        accepted, and (R,) whether a resample has both; the shares of others have no meaning.
    """
    hits, misses = _ranked(scores, positive, drawn)
    true, false = hits.sum(0), misses.sum(0)
    nothing = np.zeros((1, drawn.shape[1]))
    accepted_positives = np.concatenate([nothing, np.cumsum(hits, axis=0)])
    accepted_negatives = np.concatenate([nothing, np.cumsum(misses, axis=0)])
    rejected = 1 - accepted_positives / np.maximum(true, 1e-300)
    accepted = accepted_negatives / np.maximum(false, 1e-300)
    return rejected, accepted, (true > 0) & (false > 0)
