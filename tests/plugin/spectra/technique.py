"""Fine-tuning of the layers nearest to the output."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Technique


class LastLayersOptions(Options):
    count: int = Field(1, ge=1, description="layers of the backbone that are trained")


@register("technique", "last_layers", options=LastLayersOptions)
class LastLayers(Technique):
    """Train the head and the backbone's last ``count`` layers (Yosinski et al. 2014).

    It assumes that the first layers' features are as good for the target as for the source. It
    helps with few rows, and where inputs look alike. It hurts where inputs differ, since the first
    layers stay as they are.
    """

    def rates(self, layers: dict[str, list[str]], phase: str) -> dict[str, float]:
        trained = list(layers)[-1 - self.options.count :]
        return {name: float(name in trained) for name in layers}
