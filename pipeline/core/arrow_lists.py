"""Arrow columns of lists: their rows by place, and their lengths and values as arrays. What need
not be copied is not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc

LONG_BYTES = 4096
"""Lists of lists are copied row by row where a row holds so much on average; of smaller ones
pyarrow's own way is the faster one.
"""


def is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether values are texts, also those that are stored as a dictionary."""
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return (
        pa.types.is_string(plain)
        or pa.types.is_large_string(plain)
        or pa.types.is_string_view(plain)
    )


def is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def holds_files(kind: pa.DataType) -> bool:
    """Whether values can be files: their bytes, their paths, or structs of both as Hugging Face has
    them.
    """
    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {field.name for field in kind})
    return is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)


def take(table: pa.Table, places: np.ndarray) -> pa.Table:
    """``table.take``, which looks up lists of lists one inner list at a time: in columns of long
    ones each stretch of rows is copied as a whole.
    """
    long = (
        {
            name
            for name in table.column_names
            if is_list(kind := table[name].type)
            and is_list(kind.value_type)
            and table[name].nbytes >= LONG_BYTES * len(table)
        }
        if len(places)
        else set()
    )
    if not long:
        return table.take(pa.array(places))
    others = table.drop_columns(list(long))
    others = others.take(pa.array(places)) if others.num_columns else others
    cuts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    columns = []
    for name in table.column_names:
        parts = (
            [
                part
                for start, stop in pairwise(cuts)
                for part in table[name].slice(int(places[start]), stop - start).chunks
            ]
            if name in long
            else []
        )
        columns.append(pa.chunked_array(parts).combine_chunks() if name in long else others[name])
    return pa.table(columns, schema=table.schema)


def joined(column: pa.ChunkedArray) -> Any:
    """A column as one array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return (
        pa.concat_arrays(column.unify_dictionaries().chunks)
        if column.num_chunks
        else pa.array([], column.type)
    )


def lengths(lists: Any) -> np.ndarray:
    """(n,) whole numbers, how long each list is, -1 for null."""
    return filled(pc.list_value_length(lists), -1)


def filled(array: Any, value: float) -> np.ndarray:
    """An array with a value for null; ``fill_null`` copies even where there is nothing to fill."""
    return (pc.fill_null(array, value) if array.null_count else array).to_numpy()


def floats(array: Any) -> np.ndarray:
    """(n,) float32 of an array of numbers, NaN for null."""
    return filled(
        array if array.type == pa.float32() else pc.cast(array, pa.float32(), safe=False), np.nan
    )
