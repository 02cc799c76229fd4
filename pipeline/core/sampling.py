"""A part of many rows, without chance."""

from __future__ import annotations

import numpy as np


def evenly_spread(n: int, count: int) -> np.ndarray:
    """Return at most ``count`` of n indices, evenly spread from the first to the last.

    Returns:
        (min(n, count),) int64, in ascending order.
    """
    return np.unique(np.linspace(0, max(0, n - 1), min(n, count)).astype(np.int64))
