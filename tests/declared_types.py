"""Whether a JSON value is what a type of this project declares (`TypedDict` and what it is made
of)."""

import sys
from collections.abc import Mapping
from types import UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


def declared(owner: type, name: str) -> Any:
    """The type of a class's attribute, or of what its method returns; None where there is none."""
    for base in owner.__mro__:
        found = vars(base).get("__annotations__", {}).get(name)
        if found is None and name in vars(base):
            found = getattr(vars(base)[name], "__annotations__", {}).get("return")
        if found is not None:
            return eval(found, vars(sys.modules[base.__module__]))
    return None


def undeclared(value: Any, owner: type, name: str) -> list[str]:
    """What of a value is not as a class declares it. Plugins may leave it open, as the
    contract does; classes of the package name its keys.
    """
    kind = declared(owner, name)
    if kind is not None and get_origin(kind) is not Mapping:
        return differences(value, kind)
    is_ours = owner.__module__.startswith("pipeline.")
    return [f"{owner.__name__}.{name} has no type of its own"] if is_ours else []


def differences(value: Any, kind: Any, place: str = "") -> list[str]:
    """What of a value is not as its type declares it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Required, NotRequired):
        return differences(value, args[0], place)
    if kind is Any:
        return []
    wrong = [f"{place}: {value!r:.60} is no {kind}"]
    if origin in (Union, UnionType):
        return wrong if all(differences(value, one) for one in args) else []
    if origin is Literal:
        return [] if value in args else wrong
    if is_typeddict(kind):
        return _keys(value, kind, place) if isinstance(value, dict) else wrong
    if origin is list and isinstance(value, list):
        parts = [(one, args[0], f"{place}[{i}]") for i, one in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        parts = [(one, args[1], f"{place}.{name}") for name, one in value.items()]
    else:
        fits = type(value) is kind or (kind is float and type(value) is int)
        return [] if fits else wrong
    return [line for part in parts for line in differences(*part)]


def _keys(value: dict[str, Any], kind: Any, place: str) -> list[str]:
    hints = get_type_hints(kind, include_extras=True)
    # NotRequired is not seen in annotations that are texts
    needed = [name for name in kind.__required_keys__ if get_origin(hints[name]) is not NotRequired]
    lines = [f"{place}.{name} is missing" for name in needed if name not in value]
    lines += [f"{place}.{name} is not declared" for name in value if name not in hints]
    for name in value.keys() & hints.keys():
        lines += differences(value[name], hints[name], f"{place}.{name}")
    return lines
