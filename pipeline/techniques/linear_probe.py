"""Linear probes: only the head is trained, on a frozen backbone."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Phase, Technique


class ProbeOptions(Options):
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="learning rate of the head, relative to lr: alone it takes a larger one than a"
        " whole network",
    )


@register("technique", "linear_probe", options=ProbeOptions)
class LinearProbe(Technique):
    """Train the head alone, on features that are computed once.

    The backbone stays in evaluation mode.
    """

    frozen = True

    def phases(self, steps):
        return (Phase("all", steps, self.options.lr_scale),)

    def rates(self, layers, phase):
        return {name: float(name == "head") for name in layers}


@register("technique", "random_probe", options=ProbeOptions)
class RandomProbe(LinearProbe):
    """Train the head on a backbone with random weights.

    It shows what a probe owes to the architecture alone, which pretraining has to beat.
    """

    starts_from = "random"
