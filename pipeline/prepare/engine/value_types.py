"""Types of values in tables whose columns have none (CSV, JSON), and the types of whole columns."""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

import pyarrow as pa

EXACT_IN_FLOAT = 1 << 53
"""Up to here a float64 holds every whole number."""


class ValueType(IntEnum):
    """Types of values, from narrow to wide: a column has the widest type of its values.

    A BOOL beside any other type makes a STRING, and so does a LONG_INTEGER beside a FLOAT, because
    a float would round the number: two ids could become one.
    """

    NULL = 0
    BOOL = 1
    INTEGER = 2
    LONG_INTEGER = 3
    FLOAT = 4
    STRING = 5

    @property
    def column_type(self) -> pa.DataType:
        """Of a column of such values; one without any value holds strings."""
        if self.is_whole:
            return pa.int64()
        return {ValueType.BOOL: pa.bool_(), ValueType.FLOAT: pa.float64()}.get(self, pa.string())

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self in (ValueType.INTEGER, ValueType.LONG_INTEGER)


def type_of_integer(value: int) -> ValueType:
    """Return the type of a whole number that int64 holds."""
    return ValueType.INTEGER if abs(value) <= EXACT_IN_FLOAT else ValueType.LONG_INTEGER


def type_of_value(value: Any) -> ValueType:
    """Return the type of a Python value; lists, dicts and the largest integers become strings."""
    if value is None:
        return ValueType.NULL
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int) and abs(value) < 1 << 63:
        return type_of_integer(value)
    return ValueType.FLOAT if isinstance(value, float) else ValueType.STRING


def common_type(a: int, b: int) -> ValueType:
    """Return the type that holds the values of both."""
    has_bool = ValueType.BOOL in (a, b)
    is_mixed = has_bool and max(a, b) > ValueType.BOOL
    is_rounded = {a, b} == {ValueType.LONG_INTEGER, ValueType.FLOAT}
    return ValueType.STRING if is_mixed or is_rounded else ValueType(max(a, b))


def convert(value: Any, value_type: int) -> Any:
    """Convert a value to a type; None stays None, and what is no text is a string of JSON."""
    if value is None or isinstance(value, str):
        return value
    own_type = type_of_value(value)
    both_whole = own_type.is_whole and ValueType(value_type).is_whole
    if both_whole or (own_type == value_type and value_type != ValueType.STRING):
        return value
    if value_type == ValueType.FLOAT:
        return float(value)
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
