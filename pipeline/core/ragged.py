"""Rows that differ in length: (B,) object arrays of 1-D arrays until they are collated, then padded
to the longest one of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def ragged(rows: Iterable[np.ndarray]) -> np.ndarray:
    """(B,) objects, one 1-D array a row."""
    listed = list(rows)
    out = np.empty(len(listed), dtype=object)
    for i, row in enumerate(listed):
        out[i] = row
    return out


def lengths(rows: np.ndarray) -> np.ndarray:
    """(B,) int64 of a ragged array, or of a plain one (B, n), whose rows are all of one length."""
    return (
        np.array([len(row) for row in rows], dtype=np.int64)
        if rows.dtype == object
        else np.full(len(rows), rows.shape[1], dtype=np.int64)
    )


def padded(rows: np.ndarray, least: int = 0, fill: int = 0) -> np.ndarray:
    """(B, n) of a ragged array, n the longest row and ``least`` at least; shorter rows end in
    ``fill``.
    """
    width = max(least, int(lengths(rows).max(initial=0)))
    out = np.full((len(rows), width), fill, dtype=rows[0].dtype if len(rows) else np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def size(array: np.ndarray) -> int:
    """Bytes of an array, those that its objects (rows, encoded files) hold where it has some."""
    if array.dtype != object:
        return array.nbytes
    return sum(row.nbytes if isinstance(row, np.ndarray) else len(row) for row in array)
