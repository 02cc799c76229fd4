"""Probabilities that mean what they say: calibration error, reliability, temperature and decision
threshold, from scores.

Scores are logits, as predictions hold them: (..., C) of classes, or (..., L) of labels that are
true or not by themselves. What is fitted here (temperature, threshold) is fitted on validation
rows; the callers see to that.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

BINS = 15
"""Equal-width bins of the calibration error (Guo et al. 2017)."""
COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures that are looked at: rows that are all right would want 0, rows without any skill
infinity.
"""


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities (..., C) float64."""
    scores = scores.astype(np.float64)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Probabilities, float64, of logits of any shape."""
    half = np.tanh(scores.astype(np.float64) / 2)
    return (1 + half) / 2


# ---------------------------------------------------------------- how far off


def confidence(scores: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) float64 probability that was said, and (K,) bool whether it came true.

    Of two classes it is the positive (second) one's, as a calibration curve shows it; of more the
    likeliest class's (Guo et al. 2017).
    """
    chance = softmax(scores)
    if scores.shape[-1] == 2:
        return chance[:, 1], label == 1
    return chance.max(-1), label == chance.argmax(-1)


def weighted_calibration_error(
    chance: np.ndarray, true: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """(R,) expected calibration errors: the mean over rows of the distance between what their bin
    said and what came true in it.

    chance, true: (K,) as ``confidence`` gives them. drawn: (K, R) float64, how often each was
    drawn. NaN without rows, or where a chance is NaN.
    """
    if not len(chance) or np.isnan(chance).any():
        return np.full(drawn.shape[1], np.nan)
    place = np.minimum((chance * BINS).astype(np.int64), BINS - 1)
    order = np.argsort(place, kind="stable")
    starts = np.unique(place[order], return_index=True)[1]
    apart = np.add.reduceat((drawn * (true - chance)[:, None])[order], starts, axis=0)
    total = drawn.sum(0)
    return np.where(total > 0, np.abs(apart).sum(0) / np.maximum(total, 1e-300), np.nan)


def reliability(
    chance: np.ndarray, true: np.ndarray, bins: int = 10, least: int = 20
) -> list[tuple[float, float, int]]:
    """(mean probability said, share that came true, rows) of bins with equally many rows each, at
    least ``least``; [] for fewer rows than two bins take.
    """
    bins = min(bins, len(chance) // least)
    if bins < 2:
        return []
    parts = np.array_split(np.argsort(chance, kind="stable"), bins)
    return [(float(chance[part].mean()), float(true[part].mean()), len(part)) for part in parts]


# ---------------------------------------------------------------- what is fitted on validation rows


def temperature(scores: np.ndarray, label: np.ndarray) -> float:
    """The scalar that scores are divided by for the smallest loss of these rows (temperature
    scaling, Guo et al. 2017), within [0.05, 20].

    scores: (K, C) with label (K,) class numbers, or (K, L) with label (K, L) 0 or 1, whose loss is
    the binary one. The loss is convex in 1 / temperature, so its slope is bisected. 1.0 without
    rows or where a score is not finite.
    """
    if not len(scores) or not np.isfinite(scores).all():
        return 1.0
    scores = scores.astype(np.float64)
    goal = (
        scores[np.arange(len(scores)), label].sum() if label.ndim == 1 else (scores * label).sum()
    )

    def too_sharp(inverse: float) -> bool:
        chance = softmax(inverse * scores) if label.ndim == 1 else sigmoid(inverse * scores)
        return (chance * scores).sum() > goal

    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if too_sharp(np.exp(middle)) else (middle, high)
    return float(np.exp(-(low + high) / 2))


def best_threshold(
    chance: np.ndarray, positive: np.ndarray, goal: Literal["f1", "youden"]
) -> float:
    """The probability at and above which rows are called positive, for the largest F1 of these
    rows, or sensitivity + specificity (Youden 1950).

    chance: (K,). positive: (K,) bool. It lies half way to the next lower probability, so that none
    of these rows lies on it. 0.5 without both classes.
    """
    if positive.all() or not positive.any() or np.isnan(chance).any():
        return 0.5
    order = np.argsort(-chance, kind="stable")
    ranked = chance[order]
    hits, calls = np.cumsum(positive[order]), np.arange(1, len(order) + 1)
    ends = np.flatnonzero(np.concatenate([ranked[1:] != ranked[:-1], [True]]))
    hits, calls = hits[ends], calls[ends]
    true = int(positive.sum())
    value = (
        2 * hits / (calls + true)
        if goal == "f1"
        else hits / true - (calls - hits) / (len(positive) - true)
    )
    best = int(np.argmax(value))
    below = ranked[ends[best] + 1] if best + 1 < len(ends) else 0.0
    found = np.float32((ranked[ends[best]] + below) / 2)  # as test predictions hold it
    return float(found if found <= ranked[ends[best]] else np.nextafter(found, np.float32(0)))
