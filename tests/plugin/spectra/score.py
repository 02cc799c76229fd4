"""How far classes lie apart in a source's features."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register


@register("score", "separation", title="Separation")
def separation(features: np.ndarray, labels: np.ndarray) -> float:
    """Share of the features' variance that lies between classes. Higher is better.

    Args:
        features: (n, D).
        labels: (n,) class numbers; label sets (n, L) have no such share.
    """
    if labels.ndim > 1:
        return float("nan")
    center = features.mean(0)
    total = ((features - center) ** 2).sum()
    groups = [features[labels == value] for value in np.unique(labels)]
    between = sum(len(group) * ((group.mean(0) - center) ** 2).sum() for group in groups)
    return float(between / total) if total else float("nan")
