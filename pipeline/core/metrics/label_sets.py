"""Metrics of rows that each have a set of labels, and the macro averages over labels."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import (
    SHARE,
    PerLabel,
    Predictions,
    counts_by_row,
    mean_where,
    numerator_denominator,
    ratio,
    resampled,
)
from pipeline.core.metrics.ranking import (
    Ranking,
    undefined,
    weighted_auroc,
    weighted_average_precision,
)


def scored(p: Predictions, strict: bool = False) -> np.ndarray:
    """Find the labels that are part of macro averages.

    They have a negative and ``min_positives`` positives among these rows. They are found once, over
    the rows that are scored, so they are the same for every run and every resample of the rows. A
    resample may still miss one class of a label: that label is then left out of its average.

    Args:
        strict: Where no label has enough positives (a small validation split), labels with one
            positive stand in; not if strict, as for test rows.

    Returns:
        (L,) bool.

    Raises:
        ValueError: no label is left.
    """
    n, positives = len(p["labels"]), p["labels"].sum(0, dtype=np.int64)
    least = max(1, int(p["min_positives"][0])) if n and "min_positives" in p else 1
    for enough in (least,) if strict else (least, 1):
        kept = (positives >= enough) & (positives < n)
        if kept.any():
            return kept
    raise ValueError(
        f"none of {len(positives)} labels has {least if strict else 1} positive rows and a "
        f"negative one among these {n} rows (at most "
        f"{int(positives.max(initial=0))} positive): "
        f"{'lower min_positives, or ' if strict else ''}give this split more rows"
    )


def macro(
    ranking: Ranking, scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Average a ranking metric over labels.

    Args:
        scores: (n, L).
        positive: (n, L) bool.
        drawn: (n, R) how often each row was drawn.

    Returns:
        (R,) means over the labels that have both classes in a draw; NaN where none has, or where a
        score is NaN.
    """
    if np.isnan(scores).any():
        return undefined(drawn)
    each = [ranking(scores[:, k], positive[:, k], drawn) for k in range(scores.shape[1])]
    values = np.array(each).reshape(-1, drawn.shape[1])
    return mean_where(values, ~np.isnan(values))


def _of_label(name: str, ranking: Ranking) -> PerLabel:
    def values(p: Predictions, counts: np.ndarray, k: int) -> np.ndarray:
        return ranking(
            p["scores"][:, k],
            p["labels"][:, k].astype(bool),
            counts_by_row(counts),
        )

    return PerLabel(name, resampled=values)


def _of_labels(ranking: Ranking, p: Predictions, counts: np.ndarray) -> np.ndarray:
    kept = scored(p)
    return macro(
        ranking, p["scores"][:, kept], p["labels"][:, kept].astype(bool), counts_by_row(counts)
    )


@register("metric", "micro_f1")
@ratio(bounds=SHARE)
def micro_f1(p: Predictions) -> np.ndarray:
    """F1 over all pairs of row and label, by probabilities above 0.5."""
    true, guess = p["labels"].astype(bool), p["scores"] > 0
    num_hits = (true & guess).sum(1)
    return numerator_denominator(2 * num_hits, true.sum(1) + guess.sum(1))


@register("metric", "macro_auroc")
@resampled(bounds=SHARE, per_label=_of_label("auroc", weighted_auroc))
def macro_auroc(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean over labels of the area under the ROC curve."""
    return _of_labels(weighted_auroc, p, counts)


@register("metric", "macro_average_precision")
@resampled(bounds=SHARE, per_label=_of_label("average_precision", weighted_average_precision))
def macro_average_precision(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean over labels of the average precision."""
    return _of_labels(weighted_average_precision, p, counts)
