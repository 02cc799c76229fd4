"""The latest call of a backbone, for penalties on the features that the loss has just used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone, Features


class CallOptions(TypedDict, total=False):
    """Further arguments of `Backbone.forward`."""

    token_mask: Tensor | None
    want: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a backbone: what it was given and what it returned."""

    batch: Batch
    features: Features
    options: CallOptions = field(default_factory=CallOptions)

    def repeat(self, backbone: Backbone) -> Features:
        """Return the features of the same inputs by another backbone."""
        return backbone(self.batch, **self.options)


class LatestCall:
    """Keeps the latest call of a backbone in training, until it is taken.

    A penalty would otherwise run the backbone a second time, which costs as much again and counts
    its rows twice in norm statistics; and the loss may have mixed or hidden parts of the inputs.
    """

    def __init__(self, backbone: Backbone):
        self._call: Call | None = None
        self._hook = backbone.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, backbone: Any, inputs: tuple[Batch, ...], options: Any, out: Features) -> None:
        if torch.is_grad_enabled():
            self._call = Call(inputs[0], out, options)

    def take(self) -> Call:
        """Return the latest call and forget it.

        Raises:
            ValueError: there is none, since the objective reads other parts of the backbone.
        """
        call, self._call = self._call, None
        if call is None:
            raise ValueError(
                "the objective does not read the backbone's features, which this technique's "
                "penalty needs: give the target techniques of its own"
            )
        return call

    def remove(self) -> None:
        """Stop keeping calls."""
        self._hook.remove()
        self._call = None
