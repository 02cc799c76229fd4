"""TransRate: mutual information of features and labels, by coding rates."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.contracts.score import score

DISTORTION = 1e-4
"""The squared error up to which features are coded, in shares of their total variance."""


@register("score", "transrate", title="TransRate")
@score(tasks=("classes",))
def transrate(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the mutual information of features and labels by coding rate. Higher is better.

    R(Z) - sum_c n_c / n R(Z_c) with R(Z) = log det(I + Z' Z / (n e)) / 2 in nats (Huang et al.,
    ICML 2022). The features are centred and divided by the root of their total variance, so that
    the scale of a network does not count. The authors' code has 1 / C in place of n_c / n. Both
    are the same for C balanced classes; mutual information weighs classes by their frequency.

    It needs classes. Use it beside ``logme``: it fits no head.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.

    Returns:
        The score, NaN where the features do not vary.
    """
    z = features.astype(np.float64)
    z -= z.mean(0)
    total = float((z**2).sum()) / len(z)
    if not total > 0:
        return float("nan")
    z /= np.sqrt(total)
    parts = [z[labels == value] for value in np.unique(labels)]
    return _rate(z) - sum(len(part) / len(z) * _rate(part) for part in parts)


def _rate(z: np.ndarray) -> float:
    """Return the coding rate of (n, D) rows, from the smaller of both Gram matrices."""
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    _, log_determinant = np.linalg.slogdet(np.eye(len(gram)) + gram / (len(z) * DISTORTION))
    return 0.5 * float(log_determinant)
