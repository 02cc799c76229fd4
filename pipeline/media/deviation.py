"""Means and deviations by which numbers are standardised."""

from __future__ import annotations

import numpy as np

FLOAT32_ROUNDING, FLOAT64_ROUNDING = 1e-6, 1e-12
"""A deviation below this share of the greatest number is rounding, by the type of the numbers."""
SMALLEST_STD = 1e-12
"""A deviation below this is that of zeros with rounding errors."""
TOLERANCE = 1e-5
"""The greatest change of a standardised number that rounding a mean may make."""


def divisors(std: np.ndarray, size: np.ndarray, is_float64: bool = False) -> np.ndarray:
    """Return what numbers are divided by: their deviation, or 1 where they do not vary.

    Args:
        std: (N,) standard deviations.
        size: (N,) greatest absolute numbers.
        is_float64: Whether the numbers are stored as float64, or as integers.
    """
    rounding = FLOAT64_ROUNDING if is_float64 else FLOAT32_ROUNDING
    return np.where(std > np.maximum(rounding * size, SMALLEST_STD), std, 1.0)


def rounded_mean(mean: float, std: float) -> float:
    """Round a mean to 7 digits unless that would move standardised values by more than 1e-5.

    It does where the mean is large beside the deviation: Unix times, ids of samples.
    """
    short = float(f"{mean:.7g}")
    return short if abs(short - mean) <= TOLERANCE * std else mean
