"""Metrics of rows that have one class each, and of rows that have one at every position.

``for_role="label"`` marks those that any target with a label column may be judged by.
"""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics import calibration
from pipeline.core.metrics.label_sets import macro, scored
from pipeline.core.metrics.metric import (
    SHARE,
    Bounds,
    Predictions,
    counts_by_row,
    f1,
    mean_where,
    ratio,
    resampled,
    sum_draws,
    sum_known,
)
from pipeline.core.metrics.ranking import (
    Ranking,
    weighted_auroc,
    weighted_average_precision,
    weighted_min_precision_sensitivity,
)

# ---------------------------------------------------------------- shares of rows


def _among_best(p: Predictions, k: int) -> np.ndarray:
    """Return units of the share of rows whose class is one of the k likeliest."""
    import torch  # its topk decides between equal scores, as it did for every earlier result

    scores, label = torch.as_tensor(p["scores"]), torch.as_tensor(p["label"])
    if not len(label):
        return np.zeros((0, 2))
    best = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    is_hit = (best == label[..., None]).any(-1)
    return sum_known(is_hit.numpy(), p["label"] >= 0)


@register("metric", "accuracy")
@ratio(bounds=SHARE)
def accuracy(p: Predictions) -> np.ndarray:
    """Share of rows (or of hourly positions) whose true class has the largest score."""
    return _among_best(p, 1)


@register("metric", "top5_accuracy")
@ratio(bounds=SHARE, for_role="label")
def top5_accuracy(p: Predictions) -> np.ndarray:
    """Share of rows whose true class is among the five largest scores."""
    return _among_best(p, 5)


def predicted_class(p: Predictions) -> np.ndarray:
    """Return the class that is predicted for each row (n,), or at each position of rows (n, M).

    It is the one with the largest score. Where a decision threshold was chosen, it is the positive
    one of two if its probability is at least the threshold.
    """
    scores = p["scores"]
    if "threshold" not in p:
        return scores.argmax(-1)
    threshold = p["threshold"].reshape(-1, *[1] * (scores.ndim - 2))
    return (calibration.softmax(scores)[..., 1] >= threshold).astype(np.int64)


def confusion(p: Predictions) -> np.ndarray:
    """Count the rows of each true class (first axis) by their `predicted_class` (second).

    Returns:
        (C, C) int64.
    """
    classes = p["scores"].shape[1]
    cell = p["label"].astype(np.int64) * classes + predicted_class(p)
    return np.bincount(cell, minlength=classes * classes).reshape(classes, classes)


# ---------------------------------------------------------------- from how often rows were drawn


def _positions(p: Predictions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (K, C) scores, (K,) int64 labels and (K, R) how often each was drawn.

    K counts rows, or the positions of all rows, each drawn as often as its row.
    """
    scores, label, drawn = p["scores"], p["label"].astype(np.int64), counts_by_row(counts)
    if label.ndim == 1:
        return scores, label, drawn
    row, place = np.nonzero(label >= 0)
    return scores[row, place], label[row, place], drawn[row]


def _class_counts(p: Predictions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the drawn rows of each class, (C, R): hits, true ones, and ones called so."""
    scores, label, drawn = _positions(p, counts)
    guess, count = scores.argmax(1), scores.shape[1]
    hit = label == guess
    return (
        sum_draws(label, drawn, count, weight=hit),
        sum_draws(label, drawn, count),
        sum_draws(guess, drawn, count),
    )


@register("metric", "balanced_accuracy")
@resampled(bounds=SHARE, for_role="label")
def balanced_accuracy(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that there are rows of."""
    hits, true, _ = _class_counts(p, counts)
    return mean_where(hits / np.maximum(true, 1), true > 0)


@register("metric", "macro_f1")
@resampled(bounds=SHARE)
def macro_f1(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Unweighted mean of the F1 of each class (the largest score), or of each label (probabilities
    above 0.5, over the labels that are `scored`).
    """
    if "labels" in p:
        kept, drawn = scored(p), counts_by_row(counts)
        true = p["labels"][:, kept].astype(bool)
        guess = p["scores"][:, kept] > 0
        hits, true, guessed = (
            part.T.astype(np.float64) @ drawn for part in (true & guess, true, guess)
        )
        return mean_where(f1(hits, true, guessed), true > 0)
    hits, true, guessed = _class_counts(p, counts)
    return mean_where(f1(hits, true, guessed), true + guessed > 0)


@register("metric", "kappa")
@resampled(bounds=(-1.0, 1.0), for_role="label", reads_order=True)
def kappa(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Cohen's linearly weighted kappa: agreement of ordered classes beyond chance, 1 at best (Cohen
    1968; lengths of stay: Harutyunyan et al. 2019). One minus the mean distance between classes as
    a share of what chance gives; NaN where there is one class only, and only it is called.
    """
    scores, label, drawn = _positions(p, counts)
    classes: int = scores.shape[1]
    cell = label * classes + scores.argmax(1)
    table = sum_draws(cell, drawn, classes * classes).reshape(classes, classes, -1)
    numbers = np.arange(classes)
    distance = np.abs(numbers[:, None] - numbers).astype(np.float64)
    found = np.einsum("cd,cdr->r", distance, table)
    by_chance = np.einsum("cr,cd,dr->r", table.sum(1), distance, table.sum(0))
    expected = by_chance / np.maximum(table.sum((0, 1)), 1)
    return np.where(expected > 0, 1 - found / np.maximum(expected, 1e-300), np.nan)


# ---------------------------------------------------------------- rankings


def _ranked(ranking: Ranking, p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Rank by the positive class of two, by how far its score lies above the other's; of more
    classes each against the rest, by its probability, averaged.
    """
    scores, label, drawn = _positions(p, counts)
    if scores.shape[1] == 2:
        return ranking(
            scores[:, 1].astype(np.float64) - scores[:, 0],
            label == 1,
            drawn,
        )
    import torch

    probabilities = torch.as_tensor(scores).double().softmax(1).numpy()
    classes: int = scores.shape[1]
    return macro(ranking, probabilities, label[:, None] == np.arange(classes), drawn)


@register("metric", "auroc")
@resampled(bounds=SHARE, for_role="label")
def auroc(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the positive class: how often a positive row scores above a
    negative one (Hanley and McNeil 1982).
    """
    return _ranked(weighted_auroc, p, counts)


@register("metric", "auprc")
@resampled(bounds=SHARE, for_role="label")
def auprc(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of the positive class, as the average precision: the
    steps are not interpolated.
    """
    return _ranked(weighted_average_precision, p, counts)


@register("metric", "min_precision_sensitivity")
@resampled(bounds=SHARE, for_role="label")
def min_precision_sensitivity(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Largest min(precision, sensitivity) over thresholds, by which the PhysioNet/CinC Challenge
    2012 ranked.
    """
    return _ranked(weighted_min_precision_sensitivity, p, counts)


# ---------------------------------------------------------------- probabilities


def _brier_bounds(p: Predictions) -> Bounds:
    return 0.0, 1.0 if p["scores"].shape[-1] == 2 else 2.0


@register("metric", "brier")
@ratio(higher_is_better=False, bounds=_brier_bounds, for_role="label")
def brier(p: Predictions) -> np.ndarray:
    """Brier score: mean squared error of the class probabilities (Brier 1950). Of two classes it is
    that of the positive one, of more their sum over classes. Lower is better.
    """
    probabilities, label = calibration.softmax(p["scores"]), p["label"]
    if probabilities.shape[-1] == 2:
        return sum_known((probabilities[..., 1] - (label == 1)) ** 2, label >= 0)
    classes: int = probabilities.shape[-1]
    true = label[..., None] == np.arange(classes)
    return sum_known(((probabilities - true) ** 2).sum(-1), label >= 0)


@register("metric", "ece")
@resampled(higher_is_better=False, bounds=SHARE, for_role="label")
def ece(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Expected calibration error: how far the predicted probability is from the share of rows that
    come true, on average. Lower is better (Guo et al. 2017).
    """
    scores, label, drawn = _positions(p, counts)
    confidence, right = calibration.confidence(scores, label)
    return calibration.weighted_calibration_error(confidence, right, drawn)


# ---------------------------------------------------------------- at the decision threshold


def _called(p: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (n,) or (n, M) bool: called positive, positive, and known."""
    known = p["label"] >= 0
    called = (predicted_class(p) == 1) & known
    return called, p["label"] == 1, known


@register("metric", "f1_at_threshold")
@ratio(bounds=SHARE)
def f1_at_threshold(p: Predictions) -> np.ndarray:
    """F1 of the positive class at the threshold that was chosen on the validation rows: twice the
    true positives, divided by the rows called positive plus the positive rows.
    """
    called, positive, _ = _called(p)
    hits = called & positive
    return sum_known(hits, called) + sum_known(hits, positive)


@register("metric", "precision_at_threshold")
@ratio(bounds=SHARE)
def precision_at_threshold(p: Predictions) -> np.ndarray:
    """Share of true positives among the rows called positive at the threshold that was chosen on
    the validation rows.
    """
    called, positive, known = _called(p)
    return sum_known(called & positive, called & known)


@register("metric", "sensitivity_at_threshold")
@ratio(bounds=SHARE)
def sensitivity_at_threshold(p: Predictions) -> np.ndarray:
    """Share of the positive rows that are called so at the threshold that was chosen on the
    validation rows (recall).
    """
    called, positive, known = _called(p)
    return sum_known(called & positive, positive & known)


@register("metric", "specificity_at_threshold")
@ratio(bounds=SHARE)
def specificity_at_threshold(p: Predictions) -> np.ndarray:
    """Share of the negative rows that are called so at the threshold that was chosen on the
    validation rows.
    """
    called, positive, known = _called(p)
    return sum_known(~called & ~positive, ~positive & known)
