"""A library with one model: a perceptron over the bands of a spectrum."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.specs import Architecture

ARCHITECTURES = ["perceptron"]


class PerceptronOptions(Options):
    width: int = Field(16, ge=1, description="hidden units")


@register("model", "spectra", options=PerceptronOptions)
class Perceptron(Backbone):
    """Three layers over ``spectrum`` (B, bands); ``pooled`` is (B, width)."""

    def __init__(self, architecture: str, options: PerceptronOptions, inputs: dict[str, Any]):
        super().__init__(architecture, options, inputs)
        if inputs.get("features") != "spectrum":
            raise ValueError("spectra/perceptron reads spectra (modality spectrum)")
        name = f"spectra/{architecture}"
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.pooled_dim = options.width
        self.enter = nn.Linear(inputs["bands"], options.width)
        self.middle = nn.Linear(options.width, options.width)
        self.leave = nn.Linear(options.width, options.width)

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        x = F.gelu(self.enter(batch["spectrum"]))
        return Features(F.gelu(self.leave(F.gelu(self.middle(x)))))

    def layers(self) -> dict[str, list[str]]:
        return {name: [f"{name}.weight", f"{name}.bias"] for name in ("enter", "middle", "leave")}
