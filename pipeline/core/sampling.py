"""Deterministic samples of rows."""

from __future__ import annotations

import numpy as np


def evenly_spread(n: int, count: int) -> np.ndarray:
    """Return at most ``count`` of the indices 0 to n - 1, evenly spread.

    The first and the last are among them (with a count of 1 only the first).

    Returns:
        (min(n, count),) int64, in ascending order.
    """
    last = max(0, n - 1)
    places = np.linspace(0, last, min(n, count))
    return np.unique(places.astype(np.int64))
