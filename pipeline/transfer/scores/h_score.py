"""H-score: how much of the features' variance lies between classes, in whitened features."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.contracts.score import score


@register("score", "h_score", title="H-score")
@score(tasks=("classes",))
def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Return tr(cov(f)^-1 (1 - a) cov(E[f | y])), with cov(f) shrunk by a. Higher is better.

    The H-score of Bao et al. (ICIP 2019) with the covariance of Ledoit and Wolf (2004), as
    Ibrahim et al. (2021) propose: without it the score of wide features is the number of classes.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.

    Returns:
        The score, NaN where the features do not vary.
    """
    f = features.astype(np.float64)
    f -= f.mean(0)
    n, width = f.shape
    mean_variance = float((f**2).sum()) / (n * width)
    if not mean_variance > 0:
        return float("nan")
    member = (labels == np.unique(labels)[:, None]).astype(np.float64)  # (C, n)
    counts = member.sum(1)
    if width > n:
        variances, u = np.linalg.eigh(f @ f.T / n)
        means = (member @ u) * np.sqrt(n * np.maximum(variances, 0.0))  # (C, r) sums
    else:
        variances, v = np.linalg.eigh(f.T @ f / n)
        means = (member @ f) @ v
    means /= counts[:, None]
    variances = np.maximum(variances, 0.0)
    shrinkage = _shrinkage(f, variances, mean_variance)
    total = (1 - shrinkage) * variances + shrinkage * mean_variance
    between = counts / n @ means**2  # (r,)
    is_known = total > 1e-12 * total.max()
    return float((1 - shrinkage) * (between[is_known] / total[is_known]).sum())


def _shrinkage(f: np.ndarray, variances: np.ndarray, mean_variance: float) -> float:
    """Return the weight of the identity in the covariance of Ledoit and Wolf (2004).

    Args:
        f: (n, D) centred features.
        variances: Eigenvalues of their covariance, those that are zero may be missing.
        mean_variance: Its trace over D.
    """
    n, width = f.shape
    squared = float((variances**2).sum())  # of the covariance's Frobenius norm
    distance = squared - width * mean_variance**2
    if distance <= 0:
        return 0.0
    fourth = float(((f**2).sum(1) ** 2).sum())
    return max(0.0, min(fourth / n - squared, n * distance)) / (n * distance)
