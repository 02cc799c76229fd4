"""Functions that torch.compile calls as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep a function out of compiled graphs: the shapes of its results follow from its values."""
    disabled: Any = torch.compiler.disable(function)  # pyright: ignore[reportUnknownMemberType]
    return disabled
