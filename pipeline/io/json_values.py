"""Types of JSON values, and how a value that was read is narrowed to what it should be."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""A value that is written as JSON or was read from it."""
JsonObject: TypeAlias = "dict[str, Json]"


def as_object(value: Any) -> JsonObject:
    """Return a JSON object as it is, and {} for another value."""
    return cast(JsonObject, value) if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Json]:
    """Return a JSON list as it is, and [] for another value."""
    return cast("list[Json]", value) if isinstance(value, list) else []
