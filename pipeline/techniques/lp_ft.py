"""Linear probing, then full fine-tuning (Kumar et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import HeadFirst


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
class LPFT(HeadFirst):
    """Train the head first, then everything.

    Linear probing, then fine-tuning (Kumar et al., Fine-Tuning can Distort Pretrained Features and
    Underperform Out-of-Distribution, ICLR 2022).

    It assumes that the source's features are good, and that a random head would spoil them. It
    helps where the target's test rows differ from its training rows, and on few rows. It hurts in
    short runs, because fewer steps are left for the rest.
    """

    def search_space(self):
        return {"lr": (0.03, 3.0), "probe_lr_scale": (1.0, 100.0)}

    def phases(self, steps):
        lr_scales = {"probe": self.options.probe_lr_scale, "full": self.options.full_lr_scale}
        phases = super().phases(steps)
        return tuple(replace(phase, lr_scale=lr_scales[phase.name]) for phase in phases)
