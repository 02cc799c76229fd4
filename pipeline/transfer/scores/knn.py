"""Nearest neighbours: how often rows that lie close together have the same label."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.config.registry import register
from pipeline.core.contracts.score import score
from pipeline.core.groups import unit_numbers
from pipeline.core.metrics.ranking import weighted_auroc
from pipeline.train.online_probe import KNN, neighbours


@register("score", "knn", title="kNN")
@score(tasks=("classes", "label sets"), bounds=(0.0, 1.0))
def knn(
    features: np.ndarray, labels: np.ndarray, k: int = KNN, groups: np.ndarray | None = None
) -> float:
    """Return the leave-one-out recall of k nearest neighbours by cosine, the mean over classes.

    Higher is better. Where classes are equally frequent it is the accuracy; otherwise an accuracy
    would be highest for features that tell nothing, when every row votes for the frequent class.

    Where rows have groups, no neighbour is of the row's own group. Test rows are of other groups
    too; otherwise features that recognise a patient would seem to predict the diagnosis.

    The prediction of a row is the most frequent class of its neighbours. For (n, L) labels, 0 or 1,
    the score is the macro AUROC of the number of neighbours with each label. It is NaN where no
    label varies, where no class has rows of two groups, or where all rows are of one group.

    It needs classes or label sets. Use it where a linear head may be too simple. The rule of the
    nearest neighbours is Cover and Hart's (1967).

    Args:
        features: (n, D) features.
        labels: (n,) class numbers, or (n, L) 0 or 1.
        groups: (n,) group of each row; None: each row is independent.
    """
    y = torch.from_numpy(labels.astype(np.int64))
    if groups is not None and len(np.unique(groups)) < 2:
        return float("nan")
    if y.dim() == 1 and not _has_pairs(labels, groups):
        return float("nan")
    nearest = y[neighbours(features, k, groups=groups)]
    if y.dim() == 1:
        is_right = (nearest.mode(1).values == y).double()
        recalls = [is_right[y == label].mean() for label in y.unique()]
        return float(torch.stack(recalls).mean())
    everyone = np.ones((len(features), 1))
    areas = [
        weighted_auroc(vote, label, everyone)[0]
        for vote, label in zip(
            nearest.sum(1).numpy().T,
            (y.numpy() > 0).T,
            strict=True,
        )
    ]
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")


def _has_pairs(labels: np.ndarray, groups: np.ndarray | None) -> bool:
    """Return whether a class has rows of two groups, so that a neighbour can be right."""
    units = np.stack([labels, unit_numbers(groups, len(labels))])
    classes_of_units = np.unique(units, axis=1)[0]
    return len(np.unique(classes_of_units)) < len(classes_of_units)
