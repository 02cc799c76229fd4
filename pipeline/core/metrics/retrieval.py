"""Metrics of images with captions: is the right one among the nearest?

A row is an image and a caption of it: ``image_embedding`` and ``caption_embedding`` (n, D), of
which the dot product is the score of a pair, and ``image_number`` and ``caption_number`` (n,).
Rows of one image (an image with several captions) have one image number, 0 or more; -1 is an image
of its own. Rows of one text have one caption number. Images may be whatever has captions, such as
sounds.

Each different image is a query once, against all different texts, and each different text against
all different images. Every caption of an image counts as a hit, and every image of a text. Ties
count as misses: a wrong candidate with the score of the best right one ranks before it, so that a
network that maps all rows to one point has recall 0.

A resample draws rows, and with them their queries. The candidates stay the same: recall is higher
among fewer of them. Where rows of one image are groups of the data, a resample draws whole groups.
"""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import SHARE, Predictions, resampled

MAX_ROWS = 30_000
"""Most rows that are compared; of more, this many, evenly spread. COCO's usual 5,000 test images
have 25,010 captions.
"""
TIE = 1e-6
"""Scores that differ by less are ties: the same product may be rounded in several ways."""
SCORES_AT_ONCE = 16_000_000
"""Scores (queries x candidates) that are held at once."""


@register("metric", "image_to_text_recall_at_1")
@resampled(bounds=SHARE, compares_rows=True)
def image_to_text_recall_at_1(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of images whose nearest text is one of their captions; equal texts count once."""
    return _recall(p, counts, "image", "caption", 1)


@register("metric", "image_to_text_recall_at_5")
@resampled(bounds=SHARE, compares_rows=True)
def image_to_text_recall_at_5(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of images with one of their captions among the five nearest texts."""
    return _recall(p, counts, "image", "caption", 5)


@register("metric", "text_to_image_recall_at_1")
@resampled(bounds=SHARE, compares_rows=True)
def text_to_image_recall_at_1(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of different texts whose nearest image is one that they are a caption of."""
    return _recall(p, counts, "caption", "image", 1)


@register("metric", "text_to_image_recall_at_5")
@resampled(bounds=SHARE, compares_rows=True)
def text_to_image_recall_at_5(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of different texts with an image of theirs among the five nearest images."""
    return _recall(p, counts, "caption", "image", 5)


def _recall(
    p: Predictions,
    counts: np.ndarray,
    query: str,
    candidate: str,
    k: int,
) -> np.ndarray:
    """Return (R,) shares of queries with a right candidate among the ``k`` nearest.

    NaN where an embedding is not finite, or where there are no more than ``k`` candidates, among
    which a right one always is. A query with several rows has weight 1 in all.
    """
    n = len(p["image_number"])
    if n > MAX_ROWS:
        some = np.linspace(0, n - 1, MAX_ROWS).astype(np.int64)
        p, counts = {name: array[some] for name, array in p.items()}, counts[:, some]
    vectors = (p[f"{query}_embedding"], p[f"{candidate}_embedding"])
    if not n or not all(np.isfinite(one).all() for one in vectors):
        return np.full(len(counts), np.nan)
    queries, candidates = (_codes(p[f"{name}_number"]) for name in (query, candidate))
    if candidates.max() < k:
        return np.full(len(counts), np.nan)
    is_found = _wrong_before(*vectors, queries, candidates) < k
    weight = 1 / np.bincount(queries)[queries]
    total = counts @ weight
    found = counts @ (weight * is_found[queries])
    return np.where(total > 0, found / np.where(total > 0, total, 1), np.nan)


def _codes(numbers: np.ndarray) -> np.ndarray:
    """Return (n,) codes from 0 of the different numbers; each -1 has a code of its own."""
    own = -1 - np.arange(len(numbers))
    return np.unique(np.where(numbers < 0, own, numbers), return_inverse=True)[1]


def _wrong_before(
    query_vectors: np.ndarray,
    candidate_vectors: np.ndarray,
    queries: np.ndarray,
    candidates: np.ndarray,
) -> np.ndarray:
    """Return (Q,) how many wrong candidates score no less than the best right one of each query.

    Args:
        query_vectors: (n, D) of each row.
        candidate_vectors: (n, D) of each row.
        queries: (n,) number of each row's query, from 0 to Q - 1.
        candidates: (n,) likewise of its candidate.
    """
    by_query = np.argsort(queries, kind="stable")
    sorted_queries = queries[by_query]
    first_rows = np.unique(queries, return_index=True)[1]
    vectors = query_vectors[first_rows]
    others = candidate_vectors[np.unique(candidates, return_index=True)[1]].T
    size = max(1, SCORES_AT_ONCE // others.shape[1])
    before = np.zeros(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), size):
        scores = vectors[start : start + size] @ others
        stop = start + len(scores)
        low, high = np.searchsorted(sorted_queries, (start, stop))
        rows = by_query[low:high]
        own, right = queries[rows] - start, candidates[rows]
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, own, scores[own, right])
        scores[own, right] = -np.inf
        before[start:stop] = (scores > best[:, None] - TIE).sum(1)
    return before
