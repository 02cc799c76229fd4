"""Pretraining of tables without labels: hidden columns of a row are predicted from the others.

Shapes: B rows, K numbers, C known texts (categories), N texts of a row.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

NUMBERS, TEXTS = (1 << 20), (1 << 20) + 1
"""Random streams of the rows' keys, apart from the modality's."""


class MaskedColumnsOptions(Options):
    share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of a row's numbers and texts that is hidden (0.3 in VIME)",
    )
    weight: float = Field(
        1.0, ge=0, description="weight of the loss of hidden texts, against hidden numbers"
    )


@register("objective", "masked_columns", options=MaskedColumnsOptions)
class MaskedColumns(PositionLosses):
    """Masked pretraining on rows of a table: predict hidden numbers and texts from the others.

    It needs rows of a table (modality ``table``). Use it to pretrain ``table/ft_transformer`` where
    few rows have a label.

    Hidden numbers and texts are missing for the backbone. Linear heads on the pooled features
    predict them; a target starts from these features. The loss of a row is the mean squared error
    of its hidden standardised numbers, plus ``weight`` times the cross entropy of which texts are
    hidden, averaged over the known texts. What is hidden follows from the row's key, in evaluation
    too. Rows of which nothing is hidden take no part. It assumes that columns depend on each other.

    After VIME (Yoon et al., NeurIPS 2020) and the masked columns of TabTransformer (Huang et al.
    2020); VIME replaces hidden values by those of other rows.

    Logged, as means over the rows that take part: ``number_error``, 0 in rows without a hidden
    number; ``zero_error``, that of predicting 0, the column's mean; and ``text_loss``.
    """

    metrics = ("loss",)
    log_names = ("number_error", "zero_error", "text_loss")

    def __init__(self, backbone: Backbone, options: MaskedColumnsOptions, state: State):
        """Raise ValueError for a backbone of other rows than those of a table."""
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        if inputs.get("features") != "table":
            raise ValueError(
                f"{backbone.arch.name} reads no rows of a table: masked_columns takes "
                "table/ft_transformer"
            )
        self.numbers, self.codes = inputs["numbers"], inputs["codes"]
        self.head = nn.Linear(backbone.pooled_dim, self.numbers + self.codes)

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B,) losses, 1 or 0 for rows that count, and what is logged."""
        known, codes = batch["numbers_known"], batch["codes"]
        share = self.options.share
        hidden = known & (uniform(batch.keys, known.shape[1], NUMBERS) < share)
        # by the text and not by its place, so that padding does not move what is hidden
        chosen = uniform(batch.keys, self.codes + 1, TEXTS) < share
        hidden_codes = (codes > 0) & chosen.gather(1, codes)
        seen = batch.replace(
            numbers=batch["numbers"].masked_fill(hidden, 0.0),
            numbers_known=known & ~hidden,
            codes=codes.masked_fill(hidden_codes, 0),
        )
        predicted = self.head(backbone(seen).pooled).float()
        numbers, logits = predicted.split([self.numbers, self.codes], 1)

        number_error = _mean_where((numbers - batch["numbers"]).square(), hidden)
        zero_error = _mean_where(batch["numbers"].square(), hidden)

        places = torch.zeros(len(codes), self.codes + 1, device=codes.device)
        is_hidden = places.scatter_add_(1, codes, hidden_codes.float())[:, 1:] > 0
        entropy = F.binary_cross_entropy_with_logits(logits, is_hidden.float(), reduction="none")
        text_loss = entropy.sum(1) / max(self.codes, 1)

        counts = hidden.any(1) | hidden_codes.any(1)
        text_loss = text_loss * counts
        losses = number_error + self.options.weight * text_loss
        parts = {"number_error": number_error, "zero_error": zero_error, "text_loss": text_loss}
        return losses, counts.float(), parts


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Return (B,) means of the values (B, K) that are counted; 0 where none is."""
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)
