"""What a backbone promises: the network that is carried over.

Shapes: B rows of a batch, D features, N tokens or positions, C channels or classes, H and W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.core.batch import Batch


@dataclass(frozen=True)
class Features:
    """What a backbone gives: ``pooled`` (B, D), ``tokens`` (B, N, D) with ``mask`` (B, N, true
    where real), ``stages`` (named maps).
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    stages: dict[str, Tensor] = field(default_factory=dict)
    latent: Tensor | None = None


@dataclass(frozen=True)
class FeatureMapSpec:
    """One named feature map of a backbone, its channels and its stride in input pixels."""

    name: str
    channels: int
    stride: int


class Backbone(nn.Module, ABC):
    """The network that is carried over."""

    pooled_dim: int
    token_dim: int | None = None
    feature_map_specs: tuple[FeatureMapSpec, ...] = ()
    causal: bool = False
    convolutions: tuple[tuple[int, int, int], ...] | None = None
    """(kernel, stride, padding) of what lies between an input's samples and ``tokens``, in that
    order (``frames``): how many tokens a row has follows from its length alone. None for inputs
    that are no signal.
    """
    arch: dict[str, Any]
    """What rebuilds it offline: ``{"name": "library/model", "options": {...}, "inputs":
    {...}}``.
    """

    @abstractmethod
    def __init__(self, architecture: str, options: Any, inputs: dict[str, Any]):
        """Random weights from torch's generator. ``inputs`` is what the modality gives. Raises
        ValueError where they do not fit.
        """
        super().__init__()

    @abstractmethod
    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        """``want`` names what is needed beyond ``pooled``: "tokens", "stages"."""

    @abstractmethod
    def layers(self) -> dict[str, list[str]]:
        """Layer name to parameter names, from input to output, covering every parameter exactly
        once.
        """

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A checkpoint's tensors, under this backbone's names, in the shapes that this input asks
        for (an embedding of positions resampled, a first layer's channels summed), and in words
        what was changed. By default nothing is.
        """
        return tensors, []

    def embedding(self) -> nn.Embedding:
        """The input embedding, for objectives that tie their output to it."""
        raise ValueError(
            f"{self.arch['name']} has no token embedding: language-model objectives need a "
            "text backbone"
        )
