"""GBC: how much the classes overlap as Gaussians."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import eigh

from pipeline.config.registry import register
from pipeline.core.contracts.score import score

COMPONENTS = 64
MIN_VARIANCE = 1e-4
"""Of a class in one direction, in shares of the mean variance: one row of a class has none."""


@register("score", "gbc", title="GBC")
@score(tasks=("classes",), bounds=(-math.inf, 0.0))
def gbc(features: np.ndarray, labels: np.ndarray) -> float:
    """Return minus the sum over pairs of classes of their Bhattacharyya coefficient.

    Higher is better, 0 is the best (Pandy et al., CVPR 2022). Each class is a Gaussian with a
    diagonal covariance on the first 64 principal components of the features.

    It needs classes. Use it to see how far the classes overlap in the features.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.

    Returns:
        The score, NaN where the features do not vary.
    """
    x = _principal_components(features)
    spread = float(x.var(0).mean()) if x.size else 0.0
    if not spread > 0:
        return float("nan")
    parts = [x[labels == value] for value in np.unique(labels)]
    means = np.stack([part.mean(0) for part in parts])
    variances = np.stack([part.var(0) for part in parts]) + MIN_VARIANCE * spread
    total = 0.0
    for k in range(len(parts) - 1):
        middle = (variances[k] + variances[k + 1 :]) / 2
        logs = np.log(variances[k]) + np.log(variances[k + 1 :])
        apart = ((means[k] - means[k + 1 :]) ** 2 / middle).sum(1) / 8
        distance = apart + 0.5 * (np.log(middle) - 0.5 * logs).sum(1)
        total += 2 * float(np.exp(-distance).sum())  # both orders of a pair
    return -total


def _principal_components(features: np.ndarray) -> np.ndarray:
    f = features.astype(np.float64)
    f -= f.mean(0)
    gram = f.T @ f if f.shape[1] <= len(f) else f @ f.T
    places = max(0, len(gram) - COMPONENTS), len(gram) - 1
    variances, vectors = eigh(gram, subset_by_index=places)
    if f.shape[1] <= len(f):
        return f @ vectors
    return vectors * np.sqrt(np.maximum(variances, 0.0))
