"""Units that statistics count.

A unit is a group of rows that are alike, such as those of a patient or a speaker, or a row where
rows have no groups.
"""

from __future__ import annotations

import numpy as np


def unit_numbers(groups: np.ndarray | None, n: int) -> np.ndarray:
    """Return the (n,) number of each row's unit, from 0.

    Args:
        groups: (n,) group of each row; None: each row is independent.
        n: Number of rows.
    """
    return np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]


def num_units(n: int, groups: np.ndarray | None) -> int:
    """Return the number of units of n rows, with ``groups`` as in `unit_numbers`."""
    return n if groups is None else len(np.unique(groups))


def count_units(where: np.ndarray, groups: np.ndarray | None) -> int:
    """Return how many rows ``where``, (n,) bool, selects, or how many groups have such a row."""
    return int(where.sum()) if groups is None else len(np.unique(groups[where]))


def random_half(
    n: int,
    rng: np.random.Generator,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Return the ascending positions of a random half of n rows, or of the rows of half the groups.

    Args:
        n: Number of rows.
        rng: Draws the half.
        groups: (n,) group of each row; None: each row is independent.
    """
    unit = unit_numbers(groups, n)
    count = unit.max(initial=-1) + 1
    is_drawn = np.zeros(count, dtype=bool)
    is_drawn[rng.permutation(count)[: count // 2]] = True
    return np.flatnonzero(is_drawn[unit])
