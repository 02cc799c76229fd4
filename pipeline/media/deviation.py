"""Means and deviations by which numbers are standardised."""

from __future__ import annotations

import numpy as np

FLOAT32_ROUNDING, FLOAT64_ROUNDING = 1e-6, 1e-12
"""A deviation below this share of the greatest number is rounding, by the type of the numbers."""
STILL = 1e-12
"""A deviation below this is that of zeros with rounding errors."""
VISIBLE = 1e-5
"""A change of a standardised number that counts."""


def divisors(std: np.ndarray, size: np.ndarray, is_float64: bool = False) -> np.ndarray:
    """Return what numbers are divided by: their deviation, or 1 where they do not vary.

    Args:
        std: (N,) standard deviations.
        size: (N,) greatest absolute numbers.
        is_float64: Whether the numbers are stored as float64, or as integers.
    """
    rounding = FLOAT64_ROUNDING if is_float64 else FLOAT32_ROUNDING
    return np.where(std > np.maximum(rounding * size, STILL), std, 1.0)


def short_mean(mean: float, std: float) -> float:
    """Return a mean with 7 digits, or with all where a standardised number would show it.

    The mean may be large beside the deviation: a time in seconds, a number of a sample.
    """
    short = float(f"{mean:.7g}")
    return short if abs(short - mean) <= VISIBLE * std else mean
