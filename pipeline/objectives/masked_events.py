"""Masked modelling (Devlin et al. 2019) of a patient's record as a set of events.

Shapes: B rows, N events of a row, V variables.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

HIDE, LEAVE = (1 << 20), (1 << 20) + 1
"""Random streams of the rows' keys, apart from the modality's."""


class MaskedEventsOptions(Options):
    values: float = Field(
        0.15, ge=0, lt=1, description="share of the events whose values are hidden and predicted"
    )
    events: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="share of the other events that is left out; which variables had some is "
        "predicted from the pooled features",
    )
    weight: float = Field(
        1.0, ge=0, description="weight of the loss of events left out, against hidden values"
    )


@register("objective", "masked_events", options=MaskedEventsOptions)
class MaskedEvents(PositionLosses):
    """Masked pretraining on events: predict hidden values, and which variables lost events.

    It needs records of events (modality ``events``) and ``events/strats``; for ``events/gru`` take
    ``forecast``. Use it to pretrain without outcomes. It is masked modelling (Devlin et al. 2019)
    of a set of events.

    The loss of a row is the mean squared error of its hidden standardised values, plus ``weight``
    times the cross entropy of the variables left out, averaged over variables. What is hidden
    follows from the row's key, in evaluation too, so that evaluations can be compared. Rows
    without events take no part.
    """

    metrics = ("loss",)
    log_names = ("value_error", "events_loss")

    def __init__(self, backbone: Backbone, options: MaskedEventsOptions, state: State):
        """Raise ValueError for a backbone without a token an event, and for nothing to hide."""
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        if "variables" not in inputs or backbone.causal:
            raise ValueError(
                f"{backbone.arch.name} has no token for each event: masked_events takes "
                "events/strats; for events/gru take forecast"
            )
        if not options.values and not options.events:
            raise ValueError(
                "masked_events: values and events are both 0, so that nothing is hidden; raise "
                "one of them"
            )
        self.variables: int = inputs["variables"]
        width: Any = backbone.token_dim
        self.value = nn.Linear(width, 1)
        self.left_out = nn.Linear(backbone.pooled_dim, self.variables)

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (B,) each: mean squared errors, cross entropies, and which rows have either."""
        mask = batch["mask"]
        width = batch["mask"].shape[1]
        may_hide = uniform(batch.keys, width, HIDE) < self.options.values
        hidden = mask & may_hide
        may_leave = uniform(batch.keys, width, LEAVE) < self.options.events
        # what augmentation has dropped is left out, too
        dropped = batch.data.get("recorded", mask) & ~mask
        left_out = (mask & ~hidden & may_leave) | dropped
        values = batch["values"].masked_fill(hidden, 0.0)
        seen = batch.replace(mask=mask & ~left_out, values=values)
        features = backbone(seen, token_mask=hidden, want=("tokens",))

        predicted = self.value(features.tokens)[..., 0].float()
        difference = predicted - batch["values"]
        squares = difference.square() * hidden
        num_hidden = hidden.sum(1).clamp(min=1)
        error = squares.sum(1) / num_hidden

        counts = torch.zeros(len(batch), self.variables, device=mask.device)
        counts = counts.scatter_add_(1, batch["variables"], left_out.float())
        logits = self.left_out(features.pooled).float()
        is_left_out = (counts > 0).float()
        entropy = F.binary_cross_entropy_with_logits(logits, is_left_out, reduction="none")
        return error, entropy.mean(1), hidden.any(1), mask.any(1)

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B,) losses, 1 or 0 for rows that count, and what is logged."""
        error, entropy, has_hidden, has_events = self._rows(backbone, batch)
        values = error * has_hidden
        events = entropy * has_events
        losses = values + self.options.weight * events
        return losses, has_events.float(), {"value_error": values, "events_loss": events}
