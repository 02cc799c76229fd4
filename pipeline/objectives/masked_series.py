"""Masked pretraining on regular series without labels (PatchTST: Nie et al., ICLR 2023).

Shapes: B rows, N patches of a row, T steps (P a patch), C channels.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.contracts.backbone_capabilities import patch_steps
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

HIDE = 1 << 20
"""Random stream of a row's key that draws hidden patches; the modality's streams are others."""


class MaskedSeriesOptions(Options):
    share: float = Field(
        0.4, gt=0, lt=1, description="probability that a patch is hidden (0.4 in the paper)"
    )
    together: bool = Field(
        True,
        description="hide the same patches in all channels; false: draw them for each channel, as "
        "in the paper, where a network that mixes channels may copy them from the others",
    )


@register("objective", "masked_series", options=MaskedSeriesOptions)
class MaskedSeries(PositionLosses):
    """Masked pretraining on series: predict hidden patches from the others.

    It needs rows of modality ``series``, and ``hf/patchtst`` or ``hf/patchtsmixer`` with
    ``patch_stride`` equal to ``patch_length``. Use it to pretrain on recordings without labels. Nie
    et al. 2023, "A Time Series is Worth 64 Words" (PatchTST).

    A hidden patch is missing for the backbone. Missing numbers are replaced by the mean of the
    channel's other numbers in the row, whatever option ``missing`` says. A linear layer on the
    token of the patch predicts how far its numbers are from that mean, in standard deviations of
    the channel. The loss of a row is the mean squared error over its hidden numbers that are known,
    of channels of which some number is left. What is hidden follows from the row's key, in
    evaluation too. Rows without such numbers take no part.

    Give the backbone ``scaling: null``: with transformers' default it sees each row without its
    level and amplitude, and cannot predict numbers in the channel's unit.
    """

    metrics = ("loss",)

    def __init__(self, backbone: Backbone, options: MaskedSeriesOptions, state: State):
        """Raise ValueError for a backbone without a token a patch."""
        super().__init__(backbone, options, state)
        steps = patch_steps(backbone)
        if steps is None or backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch.name}: masked_series takes hf/patchtst or hf/patchtsmixer with "
                "patch_stride equal to patch_length, without use_cls_token, on rows (length of "
                "modality series) of a whole number of patches"
            )
        self.steps = steps
        self.head = nn.Linear(backbone.token_dim, steps * backbone.arch.inputs["channels"])

    def hidden(self, batch: Batch) -> Tensor:
        """Return (B, T, C) true for numbers that are hidden."""
        b, t, c = batch["known"].shape
        patches, width = t // self.steps, 1 if self.options.together else c
        chosen = uniform(batch.keys, patches * width, HIDE) < self.options.share
        by_step = chosen.view(b, patches, width).repeat_interleave(self.steps, 1)
        return by_step.expand(b, t, c)

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B,) losses, and 1 or 0 for rows that count."""
        known, series = batch["known"], batch["series"]
        hidden = self.hidden(batch)
        seen = known & ~hidden
        count = seen.sum(1, keepdim=True).clamp(min=1)
        mean = (series * seen).sum(1, keepdim=True) / count
        # missing numbers were filled in from hidden ones as well
        shown = torch.where(seen, series, mean)
        features = backbone(batch.replace(series=shown, known=seen), want=("tokens",))
        assert features.tokens is not None
        predicted = self.head(features.tokens).float().view(series.shape)
        is_target = known & hidden & seen.any(1, keepdim=True)
        squares = (predicted - (series - mean)).square() * is_target
        losses = squares.sum((1, 2)) / is_target.sum((1, 2)).clamp(min=1)
        return losses, is_target.any(2).any(1).float(), {}
