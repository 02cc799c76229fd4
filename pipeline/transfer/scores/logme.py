"""LogME: the evidence of a linear model of the labels on the features."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.contracts.score import score

BLOCK = 4096
"""Rows that are converted to float64 at a time."""
MIN_RIDGE = 1e-6
"""The squared singular values from a Gram matrix are exact to 1e-15 of the largest. Where the best
t lies below this share of the largest, they are computed from the features themselves."""
Spectrum = tuple[np.ndarray, np.ndarray]
"""(r,) squared singular values of the features, (r, C) squared coordinates of the labels."""


@register("score", "logme", title="LogME")
@score(tasks=("classes", "label sets", "numbers"))
def logme(features: np.ndarray, labels: np.ndarray) -> float:
    """Return the log of the maximum evidence per row, averaged over classes. Higher is better.

    The score is LogME (You et al., ICML 2021). The evidence is that of y ~ N(0, (t I + F F') /
    alpha). The best alpha of every t is known, so only t is searched. The published fixed point
    gave NaN or -inf in 117 of 300 random cases, nearly all with D > n, and stopped at the lower of
    two maxima in others.

    It takes classes, label sets and numbers. Use it first: it is the default of
    ``fanout.select``.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers, or (n, L) 0 or 1, or (n,) or (n, T) real numbers. Columns that
            are the same in all rows are left out. Real numbers are standardised, so that the value
            does not depend on their unit.

    Returns:
        The score, NaN where no column is left.
    """
    y = _columns(labels)
    if not y.shape[1]:
        return float("nan")
    value, ridge = _evidence(_spectrum_of_gram(features, y), y)
    if ridge < MIN_RIDGE:
        value, _ = _evidence(_spectrum(features, y), y)
    return value


def _columns(labels: np.ndarray) -> np.ndarray:
    """Return (n, C) float64, what the linear model predicts."""
    if np.issubdtype(labels.dtype, np.floating):
        y = labels.astype(np.float64).reshape(len(labels), -1)
        y = y[:, y.std(0) > 0]
        return (y - y.mean(0)) / y.std(0)
    if labels.ndim == 1:
        return (labels[:, None] == np.unique(labels)).astype(np.float64)
    return labels[:, labels.any(0) & ~labels.all(0)].astype(np.float64)


def _spectrum(features: np.ndarray, y: np.ndarray) -> Spectrum:
    u, s, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    return s**2, (u.T @ y) ** 2


def _spectrum_of_gram(features: np.ndarray, y: np.ndarray) -> Spectrum:
    """Return the spectrum from the smaller Gram matrix, min(n, D) wide."""
    n, width = features.shape
    if width >= n:
        f = features.astype(np.float64)
        sigma, u = np.linalg.eigh(f @ f.T)
        z2 = (u.T @ y) ** 2
    else:
        gram, projected = np.zeros((width, width)), np.zeros((width, y.shape[1]))
        for start in range(0, n, BLOCK):
            f = features[start : start + BLOCK].astype(np.float64)
            gram += f.T @ f
            projected += f.T @ y[start : start + BLOCK]
        sigma, v = np.linalg.eigh(gram)
        z2 = (v.T @ projected) ** 2 / np.maximum(sigma, 1e-300)[:, None]
    # a direction below the precision counts as one that the features do not have
    is_known = sigma > 1e-14 * max(sigma.max(), 0.0)
    return sigma[is_known], z2[is_known]


def _evidence(spectrum: Spectrum, y: np.ndarray) -> tuple[float, float]:
    """Return the mean of the columns' best evidence, and the least best t, in shares of the
    largest squared singular value.
    """
    sigma, z2 = spectrum
    n = len(y)
    # (C,) what no direction explains
    rest = np.maximum((y**2).sum(0) - z2.sum(0), 0.0) if len(sigma) < n else 0.0
    shares = np.logspace(-10, 4, 561)
    t = max(float(sigma.max(initial=0.0)), 1e-30) * shares[:, None]
    scale = ((1 / (t + sigma)) @ z2 + rest / t) / n  # (T, C) 1 / alpha
    logdet = np.log(t + sigma).sum(1, keepdims=True) + (n - len(sigma)) * np.log(t)
    value = -0.5 * (np.log(2 * np.pi * scale) + logdet / n + 1)
    top = value.argmax(0).clip(1, len(t) - 2)
    left, best, right = (np.take_along_axis(value, (top + k)[None], 0)[0] for k in (-1, 0, 1))
    bend = left - 2 * best + right
    # the peak of the parabola through the three
    downward = np.where(bend < 0, bend, -1.0)
    peak = best - np.where(bend < 0, (left - right) ** 2 / (8 * downward), 0.0)
    found = np.where(value.max(0) > best, value.max(0), peak).mean()
    return float(found), float(shares[value.argmax(0)].min())
