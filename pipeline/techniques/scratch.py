"""Training from random weights: the baseline of every gain."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Technique


class ScratchOptions(Options):
    budget: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="steps, relative to the target's; with 5, for example, the report also shows "
        "what scratch reaches in five times the steps",
    )


@register("technique", "scratch", options=ScratchOptions)
class Scratch(Technique):
    """Train the same network from random weights, for the same steps or a multiple of them."""

    starts_from = "random"

    def steps(self, steps):
        return max(1, round(self.options.budget * steps))
