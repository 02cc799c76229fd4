"""The network that is transferred: the contract of every file in ``pipeline/models/``.

A complete small library with one architecture, for the rows of the example in ``modality``::

    from pydantic import Field
    from torch import nn

    from pipeline.config.registry import Options, register
    from pipeline.core.contracts import Backbone, Features
    from pipeline.core.specs import Architecture

    ARCHITECTURES = ["mlp"]


    class MLPOptions(Options):
        width: int = Field(64, ge=1, description="hidden units")


    @register("model", "sensor", options=MLPOptions)
    class MLP(Backbone):
        def __init__(self, architecture, options, inputs):
            super().__init__(architecture, options, inputs)
            if "length" not in inputs:
                raise ValueError("sensor/mlp reads rows of a fixed length")
            name = f"sensor/{architecture}"
            self.arch = Architecture(name, options.model_dump(), dict(inputs))
            self.pooled_dim = options.width
            self.body = nn.Sequential(nn.Linear(inputs["length"], options.width), nn.ReLU())

        def forward(self, batch, *, token_mask=None, want=()):
            return Features(self.body(batch["signal"]))

        def layers(self):
            return {"body": [name for name, _ in self.named_parameters()]}

``ARCHITECTURES`` lists the model names of the library, or says where to find them: a tuple of
package, glob and regular expression. ``WANTS`` (optional) says what inputs an architecture asks its
modality for, such as ``{"wavenet": {"features": "wave"}}``. ``MODALITY`` (optional) names the
modality that it reads, as a text or by architecture, where a weights file of it can be a source
without data. ``TAGS`` (optional) says where the tags of its published weights are found. All are
read without importing the file.

What single objectives need of a backbone is in ``backbone_capabilities``; they refuse one that
lacks it where no default is named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.core.batch import Batch
from pipeline.core.inputs import Inputs
from pipeline.core.specs import Architecture


@dataclass(frozen=True)
class Features:
    """Output of a backbone."""

    pooled: Tensor
    """(B, D) one vector a row."""
    tokens: Tensor | None = None
    """(B, N, D) one vector a position."""
    mask: Tensor | None = None
    """(B, N) bool, true for real positions; None: all of them are."""
    # torch.compile cannot trace dict[...]()
    stages: dict[str, Tensor] = field(default_factory=lambda: {})
    """Named intermediate outputs, such as the feature maps of a convolutional network."""
    latent: Tensor | None = None
    """Output of the convolutions below the context network (speech), where it was wanted."""


@dataclass(frozen=True)
class FeatureMapSpec:
    """A named feature map of a backbone: its channels, and its stride in input pixels."""

    name: str
    channels: int
    stride: int


class Backbone(nn.Module, ABC):
    """The network that is transferred.

    Args:
        architecture: Model name within the library.
        options: An instance of the library's registered options class.
        inputs: What the modality gives (`Modality.inputs`).

    Weights start random, drawn from torch's generator. Raises ValueError where the inputs do not
    fit.
    """

    pooled_dim: int
    """Width of ``Features.pooled``."""
    token_dim: int | None = None
    """Width of ``Features.tokens``; None: there are no tokens."""
    feature_map_specs: tuple[FeatureMapSpec, ...] = ()
    """The feature maps in ``Features.stages``, from input to output."""
    causal: bool = False
    """Whether a token depends on earlier positions only."""
    convolutions: tuple[tuple[int, int, int], ...] | None = None
    """(kernel, stride, padding) of each convolution between the input's samples and ``tokens``, in
    that order (`pipeline.core.nn.conv_arithmetic`): the number of tokens follows from a row's
    length. None for inputs that are not signals."""
    arch: Architecture
    """What rebuilds the network."""

    @abstractmethod
    def __init__(self, architecture: str, options: Any, inputs: Inputs):
        super().__init__()

    @abstractmethod
    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        """Compute features of a batch.

        Args:
            batch: Finished tensors of the modality.
            token_mask: (B, N) bool, true for positions to hide or leave out (masked pretraining).
            want: What is needed beside ``pooled``: "tokens", "stages", "latent".
        """

    @abstractmethod
    def layers(self) -> dict[str, list[str]]:
        """Map each layer's name to its parameters' names, from input to output.

        Every parameter is in exactly one layer.
        """

    def undecayed_parameters(self) -> set[str]:
        """Return the names of matrices that have no weight decay, such as position embeddings."""
        return set()

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Convert a checkpoint's tensors to this input: resample position embeddings, sum colours.

        Returns:
            The tensors under this backbone's names, and a description of each change.
        """
        return tensors, []

    def embedding(self) -> nn.Embedding:
        """Return the token embedding, for objectives that tie their output to it."""
        raise ValueError(
            f"{self.arch.name} has no token embedding: language-model objectives need a text "
            "backbone"
        )
