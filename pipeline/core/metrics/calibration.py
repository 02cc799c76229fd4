"""Calibration of probabilities: calibration error, reliability, temperature and decision threshold.

Scores are logits, as predictions hold them: (..., C) of classes, or (..., L) of labels that are
independently true or false. Temperature and threshold are fitted on validation rows; the callers
see to that.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.core.metrics.metric import sum_draws
from pipeline.core.metrics.ranking import undefined

BINS = 15
"""Equal-width bins of the calibration error (Guo et al. 2017)."""
RELIABILITY_BINS = 10
"""Most bins of a reliability curve."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Bounds of the temperature.

Perfect predictions would need 0, random ones infinity.
"""


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities (..., C) float64."""
    scores = scores.astype(np.float64)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Return probabilities, float64, of logits of any shape."""
    half = np.tanh(scores.astype(np.float64) / 2)
    return (1 + half) / 2


# ---------------------------------------------------------------- how far off


def confidence(scores: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted probability and whether the prediction came true.

    Of two classes the probability is that of the positive (second) one, as a calibration curve
    shows it; of more classes that of the likeliest one (Guo et al. 2017).

    Returns:
        (K,) float64 and (K,) bool.
    """
    probability = softmax(scores)
    if scores.shape[-1] == 2:
        return probability[:, 1], label == 1
    return probability.max(-1), label == probability.argmax(-1)


def weighted_calibration_error(
    probability: np.ndarray, true: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Return expected calibration errors, one a resample.

    It is the mean over rows of the distance between the mean probability of their bin and the share
    that came true in it.

    Args:
        probability, true: (K,) as `confidence` returns them.
        drawn: (K, R) float64, how often each row was drawn in each resample.

    Returns:
        (R,); NaN without rows, or where a probability is NaN.
    """
    if not len(probability) or np.isnan(probability).any():
        return undefined(drawn)
    place = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    apart = sum_draws(place, drawn, BINS, weight=true - probability)
    total = drawn.sum(0)
    return np.where(
        total > 0,
        np.abs(apart).sum(0) / np.maximum(total, 1e-300),
        np.nan,
    )


def reliability(
    probability: np.ndarray, true: np.ndarray, least: int = 20
) -> list[tuple[float, float, int]]:
    """Return the points of a reliability curve, of bins with equally many rows.

    Args:
        least: The fewest rows of a bin.

    Returns:
        (mean probability, share that came true, rows) of each bin; [] for fewer rows than two bins
        need.
    """
    bins = min(RELIABILITY_BINS, len(probability) // least)
    if bins < 2:
        return []
    parts = np.array_split(np.argsort(probability, kind="stable"), bins)
    bins_of_rows: list[tuple[float, float, int]] = []
    for part in parts:
        mean_probability = float(probability[part].mean())
        bins_of_rows.append((mean_probability, float(true[part].mean()), len(part)))
    return bins_of_rows


# ---------------------------------------------------------------- what is fitted on validation rows


def temperature(scores: np.ndarray, label: np.ndarray) -> float:
    """Return the scalar to divide scores by for the smallest loss of these rows.

    Temperature scaling (Guo et al. 2017), within [0.05, 20]. The loss is convex in 1 / temperature,
    so its slope is bisected.

    Args:
        scores: (K, C) of classes, or (K, L) of labels.
        label: (K,) class numbers, or (K, L) 0 or 1, for which the loss is the binary one.

    Returns:
        The temperature; 1.0 without rows or where a score is not finite.
    """
    if not len(scores) or not np.isfinite(scores).all():
        return 1.0
    scores = scores.astype(np.float64)
    has_classes = label.ndim == 1
    true_scores = scores[np.arange(len(scores)), label] if has_classes else scores * label
    goal = true_scores.sum()

    def is_overconfident(inverse_temperature: float) -> bool:
        probability = (softmax if has_classes else sigmoid)(inverse_temperature * scores)
        return (probability * scores).sum() > goal

    low, high = np.log(1 / MAX_TEMPERATURE), np.log(1 / MIN_TEMPERATURE)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_overconfident(np.exp(middle)) else (middle, high)
    return float(np.exp(-(low + high) / 2))


def best_threshold(
    probability: np.ndarray, positive: np.ndarray, goal: Literal["f1", "youden"]
) -> float:
    """Return the probability at and above which rows are called positive.

    It gives the largest F1 of these rows, or sensitivity + specificity (Youden 1950). It lies half
    way to the next lower probability, so that none of these rows lies on it.

    Args:
        probability: (K,) probabilities.
        positive: (K,) bool.

    Returns:
        The threshold; 0.5 where not both classes are there.
    """
    if positive.all() or not positive.any() or np.isnan(probability).any():
        return 0.5
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order]
    true_positives, called_positive = np.cumsum(positive[order]), np.arange(1, len(order) + 1)
    is_last_of_ties = np.append(ranked[1:] != ranked[:-1], True)
    ends = np.flatnonzero(is_last_of_ties)
    true_positives, called_positive = true_positives[ends], called_positive[ends]
    num_positive = int(positive.sum())
    if goal == "f1":
        value = 2 * true_positives / (called_positive + num_positive)
    else:
        sensitivity = true_positives / num_positive
        false_positives = called_positive - true_positives
        value = sensitivity - false_positives / (len(positive) - num_positive)
    best = int(np.argmax(value))
    below = ranked[ends[best] + 1] if best + 1 < len(ends) else 0.0
    found = np.float32((ranked[ends[best]] + below) / 2)  # as test predictions hold it
    return float(found if found <= ranked[ends[best]] else np.nextafter(found, np.float32(0)))
