"""Gradual unfreezing with slanted triangular and discriminative rates (ULMFiT)."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Phase, Technique, backbone_layers


class GradualUnfreezingOptions(LayerOptions):
    groups: int = Field(
        4,
        ge=1,
        description="groups of neighbouring layers that are unfrozen together, from the top",
    )
    unfreeze_share: float = Field(
        0.5, gt=0, lt=1, description="share of the steps until all groups are unfrozen"
    )
    discriminative: float = Field(
        2.6, ge=1, description="learning rate of a group relative to the one below it"
    )
    cut: float = Field(0.1, gt=0, lt=1, description="share of the steps in which the rate rises")
    ratio: float = Field(
        32.0, gt=1, description="highest learning rate of the run relative to the lowest one"
    )


@register("technique", "gradual_unfreezing", options=GradualUnfreezingOptions)
class GradualUnfreezing(Technique):
    """Train the head, then thaw the backbone's layers from the top down (Howard and Ruder 2018).

    The learning rates of all groups rise and fall together over the whole run; ``train.warmup`` and
    ``train.schedule`` are not used. The head learns at ``lr``, and each group at 1 /
    ``discriminative`` of the rate of the group above it.

    It assumes that lower layers are more general. It helps on few rows and where a new head would
    spoil the source's features at first. It hurts in short runs, and where the lowest layers must
    change (other sensors, other spectra): they learn last and least.
    """

    def __init__(self, options=None):
        super().__init__(options)
        self.groups: int = self.options.groups

    def wrap(self, task):
        # a backbone may have fewer layers
        self.groups = min(self.options.groups, len(backbone_layers(task.layers())))
        return task

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "discriminative": (1.0, 4.0),
        }

    def phases(self, steps):
        groups = self.groups
        unfreezing = round(self.options.unfreeze_share * steps)
        ends = [round(unfreezing * (i + 1) / groups) for i in range(groups)]
        phases, began = [], 0
        for thawed, end in enumerate([*ends, steps]):
            if end > began:
                factor = partial(self._factor, began, steps)
                phases.append(Phase(f"{thawed} of {groups} groups", end - began, factor=factor))
                began = end
        return tuple(phases)

    def _factor(self, began: int, steps: int, step: int, phase_steps: int) -> float:
        return slanted_triangular(
            began + step, steps, cut=self.options.cut, ratio=self.options.ratio
        )

    def rates(self, layers, phase):
        thawed, groups = int(phase.split()[0]), self.groups
        own = backbone_layers(layers)
        rates = dict.fromkeys(layers, 1.0)
        for number, name in enumerate(own):
            # group 0 is at the top
            above = (len(own) - 1 - number) * groups // len(own)
            rates[name] = self.options.discriminative ** -(above + 1) if above < thawed else 0.0
        return rates


def slanted_triangular(step: int, steps: int, *, cut: float, ratio: float) -> float:
    """Return the learning-rate factor of a step (Howard and Ruder 2018, equation 3).

    It rises linearly for ``cut`` of the steps and then falls to 1 / ``ratio``.
    """
    peak = max(1, int(steps * cut))
    share = step / peak if step < peak else 1 - (step - peak) / max(1, steps - peak)
    return (1 + share * (ratio - 1)) / ratio
