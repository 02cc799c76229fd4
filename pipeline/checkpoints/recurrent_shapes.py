"""Trace recurrent networks without running their steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@contextmanager
def known_shapes() -> Generator[None]:
    """Let torch compute the shapes of a GRU's outputs without its steps, while it traces.

    A graph holds a GRU as one operator. To know the shapes of its outputs, torch 2.11 runs each
    step on tensors without data, 0.1 seconds a step with a dynamic number of rows: a GRU of 2000
    hours was not traced in 100 seconds.
    """
    decompositions: Any = import_module("torch._decomp")
    table = decompositions.decomposition_table
    operator: Any = torch.ops.aten.gru.input
    kernels, in_table = dict(operator.py_kernels), table[operator]
    operator.py_kernels.update(dict.fromkeys(kernels, _empty_outputs))
    table[operator] = _empty_outputs
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        table[operator] = in_table
        operator.py_kernels.update(kernels)
        operator._dispatch_cache.clear()


def _empty_outputs(
    inputs: Tensor,
    hidden: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes that ``aten.gru.input`` gives: all steps, and the last ones."""
    directions = 2 if bidirectional else 1
    rows_and_steps = inputs.shape[:2]
    width = directions * hidden.shape[2]
    return inputs.new_empty((*rows_and_steps, width)), torch.empty_like(hidden)
