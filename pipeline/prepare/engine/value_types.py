"""Types of values in tables whose columns have none (CSV, JSON), and the types of whole columns."""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

import pyarrow as pa


class ValueType(IntEnum):
    """Each type holds the values of those before it, except that only a STRING holds a BOOL."""

    NULL = 0
    BOOL = 1
    INTEGER = 2
    FLOAT = 3
    STRING = 4

    @property
    def column_type(self) -> pa.DataType:
        """Of a column of such values; one without any value holds strings."""
        return (pa.string(), pa.bool_(), pa.int64(), pa.float64(), pa.string())[self]


def type_of_value(value: Any) -> ValueType:
    """Return the type of a Python value; lists, dicts and the largest integers become strings."""
    if value is None:
        return ValueType.NULL
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int) and abs(value) < 1 << 63:
        return ValueType.INTEGER
    return ValueType.FLOAT if isinstance(value, float) else ValueType.STRING


def common_type(a: int, b: int) -> ValueType:
    """Return the type that holds the values of both."""
    has_bool = ValueType.BOOL in (a, b)
    is_mixed = has_bool and max(a, b) > ValueType.BOOL
    return ValueType.STRING if is_mixed else ValueType(max(a, b))


def convert(value: Any, value_type: int) -> Any:
    """Convert a value to a type; None stays None, and what is no text is a string of JSON."""
    if value is None or isinstance(value, str):
        return value
    if value_type != ValueType.STRING and type_of_value(value) == value_type:
        return value
    if value_type == ValueType.FLOAT:
        return float(value)
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
