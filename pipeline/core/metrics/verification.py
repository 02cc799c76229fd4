"""Metrics of pairs of rows: ``embedding`` (n, E) and ``identity`` (n,), as verification has them.

The score of a pair is the dot product of its embeddings, their cosine where they have length 1. A
pair is genuine where both rows have one identity, else an impostor's.

Each row is compared with each other row. A resample draws units (rows, or groups of rows where the
predictions say which ``unit`` a row belongs to). A pair counts as often as its two units were drawn
together: the product of both counts. What is drawn twice is never compared with its own copy, which
would be a genuine pair of the highest score. So two rows of one unit count as often as the unit was
drawn, which is the bootstrap over subjects of Bolle, Ratha and Pankanti (Computer Vision and Image
Understanding 93(1), 2004).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics import ranking
from pipeline.core.metrics.metric import SHARE, Predictions, counts_by_row, resampled

MAX_PAIRS = 500_000
"""Most pairs of each kind (genuine, impostor) that are compared.

Of more, this many are drawn, the same for all networks. 1,000 rows have fewer.
"""
_WEIGHTS_AT_ONCE = 4_000_000
"""Weights (pairs x resamples) that are held at once."""
SCORES_AT_ONCE = 65_536
"""Pairs whose scores are computed at once."""


class Pairs(NamedTuple):
    """P pairs of rows, by falling score."""

    first: np.ndarray
    """(P,) int64 index of the pair's first row."""
    second: np.ndarray
    """(P,) int64 index of the pair's second row."""
    scores: np.ndarray
    """(P,) float64."""
    is_genuine: np.ndarray
    """(P,) bool."""


@register("metric", "eer")
@resampled(higher_is_better=False, bounds=SHARE, compares_rows=True)
def equal_error_rate(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Equal error rate: the share of impostors' pairs that are accepted, at the threshold where as
    large a share of genuine pairs is rejected. 0 is best, 0.5 is chance.
    """
    return _over_pairs(ranking.weighted_equal_error_rate, p, counts)


@register("metric", "min_dcf")
@resampled(higher_is_better=False, bounds=SHARE, compares_rows=True)
def min_detection_cost(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Least detection cost over all thresholds, as NIST's speaker recognition evaluations have it:
    one pair in a hundred is genuine, both errors cost 1, and to reject every pair costs 1.
    Lower is better.
    """
    return _over_pairs(ranking.weighted_min_detection_cost, p, counts)


def _over_pairs(ranking_metric: ranking.Ranking, p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Return (R,) values of a metric of ranked pairs; NaN where an embedding is not finite."""
    drawn = counts_by_row(counts)
    pairs = ranked_pairs(p["embedding"], p["identity"])
    if not len(pairs.scores) or not np.isfinite(pairs.scores).all():
        return ranking.undefined(drawn)
    is_same_unit = None
    if "unit" in p:
        is_same_unit = (p["unit"][pairs.first] == p["unit"][pairs.second])[:, None]
    size = max(1, _WEIGHTS_AT_ONCE // len(pairs.scores))
    values: list[np.ndarray] = []
    for start in range(0, drawn.shape[1], size):
        some = drawn[:, start : start + size]
        weights = some[pairs.first]
        weights_of_second = some[pairs.second]
        if is_same_unit is not None:
            weights_of_second = np.where(is_same_unit, 1.0, weights_of_second)
        weights *= weights_of_second
        values.append(ranking_metric(pairs.scores, pairs.is_genuine, weights))
    return np.concatenate(values)


def ranked_pairs(embedding: np.ndarray, identity: np.ndarray) -> Pairs:
    """Return all pairs of n rows with their scores, or `MAX_PAIRS` of a kind, drawn once.

    Args:
        embedding: (n, E).
        identity: (n,).
    """
    order = np.argsort(identity, kind="stable")
    sizes = np.unique(identity, return_counts=True)[1]
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    # in that order the partners of a row that lie before it are first all impostors, from place 0
    # to the start of its identity, then all genuine
    genuine = _earlier_partners(starts, np.arange(len(order)) - starts)
    impostors = _earlier_partners(np.zeros_like(starts), starts)
    first, second = (order[np.concatenate(both)] for both in zip(genuine, impostors, strict=True))
    is_genuine = np.arange(len(first)) < len(genuine[0])
    scores = np.empty(len(first))
    for start in range(0, len(first), SCORES_AT_ONCE):
        part = slice(start, start + SCORES_AT_ONCE)
        one, other = (embedding[rows[part]].astype(np.float64) for rows in (first, second))
        scores[part] = np.einsum("pe,pe->p", one, other)
    by_score = np.argsort(-scores, kind="stable")
    return Pairs(first[by_score], second[by_score], scores[by_score], is_genuine[by_score])


def _earlier_partners(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair row r with each of rows ``start[r]`` to ``start[r] + count[r] - 1``.

    Of more than `MAX_PAIRS` pairs this many are drawn, the same for equal arguments.

    Args:
        start: (n,) int64 first partner of each row.
        count: (n,) int64 number of partners of each row.

    Returns:
        (P,) rows and (P,) their partners.
    """
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    if total <= MAX_PAIRS:
        number = np.arange(total)
    else:  # with replacement; few come twice
        number = np.random.default_rng(0).integers(0, total, MAX_PAIRS)
    row = np.searchsorted(ends, number, side="right")
    return row, start[row] + number - (ends[row] - count[row])
