"""Linear CKA of features and labels."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.contracts.score import score


@register("score", "cka", title="Linear CKA")
@score(tasks=("classes", "label sets", "numbers"), bounds=(0.0, 1.0))
def cka(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the centred kernel alignment of features and labels, from 0 to 1. Higher is better.

    |Y' F|^2 / (|F' F| |Y' Y|) with centred features F and labels Y (Cortes et al. 2012; Kornblith
    et al., ICML 2019). Classes are one-hot vectors; real numbers are standardised.

    Use it for classes, label sets or numbers; it compares features of any width.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers, or (n, L) 0 or 1, or (n,) or (n, T) real numbers.

    Returns:
        The score, NaN where features or labels do not vary.
    """
    f = features.astype(np.float64)
    y = labels.reshape(len(labels), -1).astype(np.float64)
    if not np.issubdtype(labels.dtype, np.floating) and labels.ndim == 1:
        y = (labels[:, None] == np.unique(labels)).astype(np.float64)
    f, y = f - f.mean(0), y - y.mean(0)
    if np.issubdtype(labels.dtype, np.floating):
        y = y[:, y.any(0)]
        y = y / y.std(0)
    scale = _norm_of_gram(f) * _norm_of_gram(y)
    return float(((y.T @ f) ** 2).sum() / scale) if scale > 0 else float("nan")


def _norm_of_gram(x: np.ndarray) -> float:
    """Return the Frobenius norm of x' x, which is that of x x'."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(np.linalg.norm(gram))
