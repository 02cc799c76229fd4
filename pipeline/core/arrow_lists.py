"""Arrow columns of lists: take rows of them, and read their lengths and values as arrays.

Nothing is copied that need not be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc

LONG_BYTES = 4096
"""Lists of lists are copied row by row if rows have at least so many bytes on average.

For smaller rows ``table.take`` is faster.
"""


def is_list(kind: pa.DataType) -> bool:
    """Return whether values are lists of any kind."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Return whether values are whole numbers or floats, or all are null."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def is_class_name(kind: pa.DataType) -> bool:
    """Return whether values may name a class: texts, whole numbers and booleans."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return is_text(kind) or pa.types.is_integer(plain) or pa.types.is_boolean(plain)


def is_text(kind: pa.DataType) -> bool:
    """Return whether values are texts, also where they are stored as a dictionary."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(plain)
        or pa.types.is_large_string(plain)
        or pa.types.is_string_view(plain)
    )


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether values are bytes of any kind."""
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def nan_as_null(column: pa.Array | pa.ChunkedArray) -> Any:
    """Return a column with null for NaN, which files of pandas have where a value is missing."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def dictionary_codes(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return (n,) codes, -1 for null, and the distinct values that the codes number."""
    whole: Any = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.dictionary_encode()
    codes = encoded.indices.cast(pa.int32()).fill_null(-1)  # they may be unsigned
    return codes.to_numpy(zero_copy_only=False), encoded.dictionary


def holds_files(kind: pa.DataType) -> bool:
    """Return whether values can be files: bytes, paths, or Hugging Face's structs of both."""
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    return is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)


def take(table: pa.Table, places: np.ndarray) -> pa.Table:
    """Return the rows of a table at some indices, as ``table.take`` does.

    ``table.take`` copies lists of lists one inner list at a time. Where lists are long, this copies
    each run of neighbouring rows at once.
    """
    long = {name for name in table.column_names if _has_long_lists(table[name])}
    if not long or not len(places):
        return table.take(pa.array(places))
    others = table.drop_columns(list(long))
    others = others.take(pa.array(places)) if others.num_columns else others
    gaps = np.flatnonzero(np.diff(places) != 1) + 1
    cuts = [0, *gaps.tolist(), len(places)]
    columns: list[pa.ChunkedArray] = []
    for name in table.column_names:
        if name not in long:
            columns.append(others[name])
            continue
        parts: list[pa.Array] = []
        for start, stop in pairwise(cuts):
            parts += table[name].slice(int(places[start]), stop - start).chunks
        columns.append(pa.chunked_array(parts).combine_chunks())
    return pa.table(columns, schema=table.schema)


def _has_long_lists(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds lists of lists, with many bytes a row."""
    kind = column.type
    is_nested = is_list(kind) and is_list(kind.value_type)
    return is_nested and column.nbytes >= LONG_BYTES * len(column)


def joined(column: pa.ChunkedArray) -> Any:
    """Return a column as one array."""
    if not column.num_chunks:
        return pa.array([], column.type)
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.unify_dictionaries().chunks)


def lengths(lists: Any) -> np.ndarray:
    """Return the length of each list, (n,) whole numbers, -1 for null."""
    return filled(pc.list_value_length(lists), -1)


def filled(array: Any, value: float) -> np.ndarray:
    """Return an array in numpy, with a value in the place of nulls.

    ``fill_null`` would copy even where there is no null.
    """
    return (pc.fill_null(array, value) if array.null_count else array).to_numpy()


def floats(array: Any, dtype: Any = np.float32) -> np.ndarray:
    """Return an array of numbers as (n,) floating-point numbers, NaN for null."""
    kind = pa.from_numpy_dtype(dtype)
    return filled(array if array.type == kind else pc.cast(array, kind, safe=False), np.nan)
