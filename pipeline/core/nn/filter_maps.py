"""Outputs of the layers inside a network, filter by filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def filter_count(module: Any) -> int | None:
    """Return how many filters (output channels) a module with a weight matrix has, else None."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # torch's attention reads its weight and never calls it
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return cast("Any", module).nf
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    if isinstance(module, nn.MultiheadAttention):
        return cast("Any", module).embed_dim
    return None


def filter_counts(backbone: nn.Module) -> dict[str, int]:
    """Return how many filters each module inside a backbone has, by name, in its order.

    Modules for one kind of rows (a robot's own encoder) are left out: other rows never reach them.
    """
    modules: dict[str, nn.Module] = dict(cast("Any", backbone).named_modules())
    by_kind = tuple(f"{name}." for name, module in modules.items() if _serves_kinds(module))
    counts = {
        name: filter_count(module)
        for name, module in modules.items()
        if not name.startswith(by_kind)
    }
    return {name: count for name, count in counts.items() if count is not None}


def _serves_kinds(module: nn.Module) -> bool:
    """Return whether a module holds one like module for each kind of rows."""
    return isinstance(module, nn.ModuleDict) and len({type(one) for one in module.values()}) == 1


def change_filters(module: nn.Module, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a module's output, of the same kind, with other values.

    Args:
        module: A module with filters.
        output: What it returned; recurrent layers and attention return tuples, of which the first
            entry is changed.
        change: Takes the values with filters last, (..., C), and returns others of this shape.
    """
    first, rest = _split(output)
    values: Any = first.data if isinstance(first, PackedSequence) else first
    channels = 1 if isinstance(module, CONVOLUTIONS) else -1
    changed: Any = change(values.movedim(channels, -1)).movedim(-1, channels)
    if isinstance(first, PackedSequence):
        changed = first._replace(data=changed)
    return changed if rest is None else (changed, *rest)


def _split(output: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """Return the first entry of an output and the others; None where it is no tuple."""
    if type(output) is not tuple:
        return output, None
    entries = cast("tuple[Any, ...]", output)
    return entries[0], entries[1:]


class FilterMap(NamedTuple):
    """What a module returned for a batch."""

    values: Tensor
    """(B, ..., C), filters last."""
    mask: Tensor | None = None
    """(B, N) which positions are real, where the module itself knows; else None."""

    def known_mask(self, tokens: Tensor | None) -> Tensor | None:
        """Return the mask, or that of the backbone's tokens where it has the same positions."""
        if self.mask is not None or tokens is None:
            return self.mask
        return tokens if tokens.shape == self.values.shape[:-1] else None


class FilterMaps:
    """What modules of a backbone return in its latest call, and which filters are switched off.

    Args:
        backbone: Forward hooks are put on its modules.
        names: Names of modules with filters.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str]):
        self.off: dict[str, Tensor] = {}
        """Numbers of the filters whose output is replaced by 0, by module."""
        self._outputs: dict[str, FilterMap] = {}
        self._hooks: list[Any] = [backbone.register_forward_pre_hook(self._forget)]
        for name in names:
            module = backbone.get_submodule(name)
            self._hooks.append(module.register_forward_hook(partial(self._keep, name)))

    def take(self) -> dict[str, FilterMap]:
        """Return the outputs of the latest call in the order of calls, and forget them."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._outputs = {}

    def _forget(self, backbone: Any, inputs: Any) -> None:
        self._outputs = {}

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        if name in self.off:
            output = change_filters(module, output, partial(_without, self.off[name]))
        first, _ = _split(output)
        values = first
        mask = None
        if isinstance(first, PackedSequence):
            values, lengths = pad_packed_sequence(first, batch_first=True)
            mask = (torch.arange(values.shape[1]) < lengths[:, None]).to(values.device)
        elif _is_sequence_first(module) and values.dim() == 3:
            values = values.transpose(0, 1)
        channels = 1 if isinstance(module, CONVOLUTIONS) else -1
        self._outputs.pop(name, None)
        self._outputs[name] = FilterMap(values.movedim(channels, -1), mask)
        return output if name in self.off else None


def _is_sequence_first(module: Any) -> bool:
    """Return whether a module returns (N, B, C), as torch's layers of sequences do unless told."""
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first


def _without(filters: Tensor, values: Tensor) -> Tensor:
    """Return values (..., C) with some filters at 0."""
    return values.index_fill(-1, filters.to(values.device), 0.0)
