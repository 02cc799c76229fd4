"""Side-tuning: a second network beside the source's frozen one (Zhang et al. 2020)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.registry import register
from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Features, Task, Technique


class SideBackbone(Backbone):
    """Two backbones of one architecture whose features are mixed: a * base + (1 - a) * side.

    ``a`` is the sigmoid of a number that is trained; it starts at a half.
    """

    def __init__(self, base: Backbone):
        nn.Module.__init__(self)
        self.base, self.side = base, copy.deepcopy(base)
        self.mix = nn.Parameter(torch.zeros(()))
        self.arch, self.pooled_dim, self.token_dim = base.arch, base.pooled_dim, base.token_dim
        self.feature_map_specs, self.causal = base.feature_map_specs, base.causal
        self.convolutions = base.convolutions
        self.positions = getattr(base, "positions", 0)  # 0: it continues no sequence

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        with torch.no_grad():
            base = self.base(batch, token_mask=token_mask, want=want)
        side = self.side(batch, token_mask=token_mask, want=want)
        tokens = None if base.tokens is None else self._mixed(base.tokens, side.tokens)
        latent = None if base.latent is None else self._mixed(base.latent, side.latent)
        stages = {
            name: self._mixed(stage, side.stages[name]) for name, stage in base.stages.items()
        }
        return Features(self._mixed(base.pooled, side.pooled), tokens, base.mask, stages, latent)

    def _mixed(self, base: Tensor, side: Tensor) -> Tensor:
        """Return the mean of two outputs.

        Where both are equal it is exactly that, so the hours at which tokens end stay as they are.
        """
        if not base.is_floating_point():  # which tokens have events
            return base
        return side + self.mix.sigmoid() * (base - side)

    def embedding(self) -> nn.Embedding:
        """Return the token embedding of the base, which is frozen."""
        return self.base.embedding()

    def advance(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Continue a sequence with both backbones (`Continues`)."""
        base_network: Any = self.base
        side_network: Any = self.side
        base_past, side_past = past or (None, None)
        base, base_past = base_network.advance(tokens, mask, positions, base_past)
        side, side_past = side_network.advance(tokens, mask, positions, side_past)
        return self._mixed(base, side), (base_past, side_past)

    def undecayed_parameters(self) -> set[str]:
        return {f"side.{name}" for name in self.side.undecayed_parameters()}

    def layers(self) -> dict[str, list[str]]:
        layers = self.base.layers()
        base = {f"base.{name}": [f"base.{one}" for one in names] for name, names in layers.items()}
        side = {f"side.{name}": [f"side.{one}" for one in names] for name, names in layers.items()}
        return {**base, **side, "mix": ["mix"]}


@register("technique", "side_tuning")
class SideTuning(Technique):
    """Keep the source's backbone unchanged, and train a second copy of it.

    The features are a weighted mean of both, and the weight is trained (Zhang et al. 2020, with a
    side network of the same architecture that starts as a copy). So the network starts as the
    source's, and nothing of the source can be lost.

    It assumes that the target needs further features in addition to the source's. It helps against
    forgetting, with few labels. It hurts where the target is far from the source: half of the
    features are then of no use. It costs twice the memory and time of one network in use, and one
    and a half times the time of full fine-tuning.

    The bundle has both networks. ``predict`` reads it, but it cannot be the source of another job.
    If a language model's output layer is its token embedding, the frozen one scores the tokens.
    """

    keeps_modules = True

    def wrap(self, task):
        return Task(SideBackbone(task.backbone), task.objective)

    def rates(self, layers, phase):
        return {name: float(not name.startswith("base.")) for name in layers}
