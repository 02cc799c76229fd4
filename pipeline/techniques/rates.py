"""Techniques that are nothing but learning rates and phases: scratch, zero_shot, random_probe,
linear_probe, full, lp_ft.
"""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Phase, Technique


class ScratchOptions(Options):
    budget: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="steps, relative to the target's: a row beside plain scratch shows what "
        "scratch reaches with more",
    )


@register("technique", "scratch", options=ScratchOptions)
class Scratch(Technique):
    """The same network and budget from its random initialisation: what every gain is measured
    against.
    """

    from_source = False

    def steps(self, steps):
        return max(1, round(self.options.budget * steps))


@register("technique", "zero_shot")
class ZeroShot(Technique):
    """The source's network and head as they are, tried on the target's test rows: where adaptation
    starts. For objectives whose head is carried over.
    """

    needs_training = False

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)


@register("technique", "full")
class Full(Technique):
    """Every layer moves, from the first step."""


class ProbeOptions(Options):
    lr_scale: float = Field(
        1.0,
        gt=0,
        description="learning rate of the head, relative to lr: alone it takes a larger one than "
        "a whole network",
    )


@register("technique", "linear_probe", options=ProbeOptions)
class LinearProbe(Technique):
    """Only the head moves; the backbone stays in evaluation mode, so its features are computed
    once.
    """

    frozen = True

    def phases(self, steps):
        return (Phase("all", steps, self.options.lr_scale),)

    def rates(self, layers, phase):
        return {name: float(name == "head") for name in layers}


@register("technique", "random_probe", options=ProbeOptions)
class RandomProbe(LinearProbe):
    """A linear probe of random weights: what a probe owes to its backbone's shape alone, and so
    what pretraining must beat.
    """

    from_source = False


class LPFTOptions(Options):
    probe_share: float = Field(
        0.3, gt=0, lt=1, description="share of the steps that train the head alone"
    )
    probe_lr_scale: float = Field(
        1.0, gt=0, description="learning rate of the first part, relative to lr"
    )
    full_lr_scale: float = Field(
        1.0, gt=0, description="learning rate of the second part, relative to lr"
    )


@register("technique", "lp_ft", options=LPFTOptions)
class LPFT(Technique):
    """First the head, then everything (Kumar et al. 2022)."""

    def phases(self, steps):
        first = min(max(1, round(self.options.probe_share * steps)), steps - 1) if steps > 1 else 0
        probe = (Phase("probe", first, self.options.probe_lr_scale),) if first else ()
        return (*probe, Phase("full", steps - first, self.options.full_lr_scale))

    def rates(self, layers, phase):
        return {name: 1.0 if phase == "full" or name == "head" else 0.0 for name in layers}
