"""H-score: how much of the features' variance lies between classes, in whitened features."""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve

from pipeline.config.registry import register
from pipeline.core.contracts.score import score

MIN_VARIANCE = 1e-12
"""A direction with less variance, in shares of the largest, counts as one without any."""


@register("score", "h_score", title="H-score")
@score(tasks=("classes",))
def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Return how much of the features' variance lies between classes. Higher is better.

    The H-score is tr(cov(f)^-1 (1 - a) cov(E[f | y])) (Bao et al., ICIP 2019). The covariance
    cov(f) is shrunk by a (Ledoit and Wolf 2004), as Ibrahim et al. (2021) propose. Without
    shrinkage the score of wide features is the number of classes.

    It needs classes. Use it as a quick measure beside ``logme``.

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
    average = member / counts[:, None]
    gram = (f @ f.T if width > n else f.T @ f) / n
    shrinkage = _shrinkage(f, gram, mean_variance)
    total = (1 - shrinkage) * gram
    total[np.diag_indices_from(total)] += shrinkage * mean_variance
    # of wide features f: f (a f'f + b)^-1 f' = f f' (a f f' + b)^-1
    left, right = (average @ gram * n, average) if width > n else (average @ f, average @ f)
    between = (left * _solve(total, right.T, shrinkage / width).T).sum(1)  # (C,)
    return float((1 - shrinkage) * (counts / n @ between))


def _solve(total: np.ndarray, right: np.ndarray, least: float) -> np.ndarray:
    """Return total^-1 right, without the directions that have no variance.

    Args:
        total: (r, r) covariance.
        right: (r, C) right-hand sides.
        least: Share of its largest variance that its smallest has at least.
    """
    if least > MIN_VARIANCE:
        return solve(total, right, assume_a="pos")
    return np.linalg.pinv(total, rcond=MIN_VARIANCE, hermitian=True) @ right


def _shrinkage(f: np.ndarray, gram: np.ndarray, mean_variance: float) -> float:
    """Return the weight of the identity in the covariance of Ledoit and Wolf (2004).

    Args:
        f: (n, D) centred features.
        gram: Their covariance, or f f' / n, which has the same eigenvalues above zero.
        mean_variance: The covariance's trace over D.
    """
    n, width = f.shape
    squared = float((gram**2).sum())  # of the covariance's Frobenius norm
    distance = squared - width * mean_variance**2
    if distance <= 0:
        return 0.0
    fourth = float(((f**2).sum(1) ** 2).sum())
    return max(0.0, min(fourth / n - squared, n * distance)) / (n * distance)
