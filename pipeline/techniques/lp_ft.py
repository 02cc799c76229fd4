"""Linear probing, then full fine-tuning (Kumar et al. 2022)."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Phase, Technique


class LPFTOptions(LayerOptions):
    probe_share: float = Field(
        0.3, gt=0, lt=1, description="share of the steps that train the head alone"
    )
    probe_lr_scale: float = Field(
        10.0, gt=0, description="learning rate of the first part, relative to lr"
    )
    full_lr_scale: float = Field(
        1.0, gt=0, description="learning rate of the second part, relative to lr"
    )


@register("technique", "lp_ft", options=LPFTOptions)
class LPFT(Technique):
    """Train the head first, then everything.

    It assumes that the source's features are good, and that a random head would spoil them. It
    helps where the target's test rows differ from its training rows, and on few rows. It hurts in
    short runs, because fewer steps are left for the rest.
    """

    def search_space(self):
        return {"lr": (0.03, 3.0), "probe_lr_scale": (1.0, 100.0)}

    def phases(self, steps):
        probe_steps = 0
        if steps > 1:
            probe_steps = min(max(1, round(self.options.probe_share * steps)), steps - 1)
        full = Phase("full", steps - probe_steps, self.options.full_lr_scale)
        if not probe_steps:
            return (full,)
        return (Phase("probe", probe_steps, self.options.probe_lr_scale), full)

    def rates(self, layers, phase):
        is_full = phase == "full"
        return {name: float(is_full or name == "head") for name in layers}
