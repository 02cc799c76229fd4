"""Rows that differ in length, as (B,) object arrays of 1-D arrays.

They are padded to the longest row of the batch when they are collated.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def ragged(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return (B,) objects, one 1-D array a row."""
    listed = list(rows)
    out = np.empty(len(listed), dtype=object)
    for i, row in enumerate(listed):
        out[i] = row
    return out


def lengths(rows: np.ndarray) -> np.ndarray:
    """Return the length of each row, (B,) int64, of a ragged array or of a plain one (B, n)."""
    if rows.dtype == object:
        return np.array([len(row) for row in rows], dtype=np.int64)
    return np.full(len(rows), rows.shape[1], dtype=np.int64)


def pad(rows: np.ndarray, least: int = 0, fill: int = 0) -> np.ndarray:
    """Return a ragged array as (B, n); shorter rows end in ``fill``.

    n is the length of the longest row, and at least ``least``.
    """
    width = max(least, int(lengths(rows).max(initial=0)))
    out = np.full(
        (len(rows), width),
        fill,
        dtype=rows[0].dtype if len(rows) else np.int64,
    )
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def concatenate_padded(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays along rows; shorter rows are filled up with -1 (whole numbers) or NaN."""
    shapes = [array.shape[1:] for array in arrays]
    if len(set(shapes)) > 1:
        largest = np.max(shapes, axis=0)
        fill = np.nan if arrays[0].dtype.kind == "f" else -1
        padded: list[np.ndarray] = []
        for array in arrays:
            missing = largest - array.shape[1:]
            widths = [(0, 0), *((0, count) for count in missing)]
            padded.append(np.pad(array, widths, constant_values=fill))
        arrays = padded
    return np.concatenate(arrays)


def num_bytes(array: np.ndarray) -> int:
    """Return the bytes of an array, including those of its objects (rows, encoded files)."""
    if array.dtype != object:
        return array.nbytes
    return sum(row.nbytes if isinstance(row, np.ndarray) else len(row) for row in array)
