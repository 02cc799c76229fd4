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
    """Train the same network from random weights, for the same steps or a multiple of them.

    Every gain is measured against it (He et al., Rethinking ImageNet Pre-training, ICCV 2019: with
    enough rows and steps it may be as good). It assumes nothing of a source, since it reads none.
    It helps with many rows, and where no source suits. It hurts with few rows and in short runs.
    """

    starts_from = "random"

    def steps(self, steps):
        return max(1, round(self.options.budget * steps))
