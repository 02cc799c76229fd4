"""Hidden values and hidden events of a record, to be told from the rest: masked modelling (Devlin
et al. 2019) on sets of events.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.rng import uniform

HIDE, LEAVE = (1 << 20), (1 << 20) + 1
"""Streams of the rows' keys, apart from the modality's."""


class MaskedEventsOptions(Options):
    values: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="share of the events whose values are hidden, to be told from the others",
    )
    events: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="share of the rest that is left out whole; of which variables is to be told "
        "from pooled",
    )
    weight: float = Field(
        1.0, ge=0, description="weight of telling what was left out, against the hidden values"
    )


@register("objective", "masked_events", options=MaskedEventsOptions)
class MaskedEvents(Objective):
    """Squared error of the standardised values that are hidden, and cross-entropy of which
    variables had events left out, averaged over variables. What is hidden follows from the row's
    key, in evaluation too, so that its loss can be compared from one to the next. Rows without
    events take no part.

    Raises ValueError for a backbone without a token for each event, and where nothing would be
    hidden.
    """

    metrics = ("loss",)
    log_names = ("value_error", "events_loss")

    def __init__(self, backbone: Backbone, options: MaskedEventsOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs = backbone.arch["inputs"]
        if "variables" not in inputs or backbone.causal:
            raise ValueError(
                f"{backbone.arch['name']} has no token for each event: masked_events takes "
                "events/strats; for events/gru take forecast"
            )
        if not options.values and not options.events:
            raise ValueError(
                "masked_events: values and events are both 0, so that nothing is hidden; "
                "raise one of them"
            )
        self.variables: int = inputs["variables"]
        width: Any = backbone.token_dim
        self.value = nn.Linear(width, 1)
        self.left_out = nn.Linear(backbone.pooled_dim, self.variables)

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B,) squared errors averaged over the hidden values, cross-entropies, and which rows have
        the one and the other.
        """
        mask, width = batch["mask"], batch["mask"].shape[1]
        hidden = mask & (uniform(batch.keys, width, HIDE) < self.options.values)
        gone = mask & ~hidden & (uniform(batch.keys, width, LEAVE) < self.options.events)
        features = backbone(
            batch.replace(mask=mask & ~gone, values=batch["values"].masked_fill(hidden, 0.0)),
            token_mask=hidden,
            want=("tokens",),
        )
        error = (self.value(features.tokens)[..., 0].float() - batch["values"]).square() * hidden
        squares = error.sum(1) / hidden.sum(1).clamp(min=1)
        was_hidden = (
            torch.zeros(len(batch), self.variables, device=mask.device).scatter_add_(
                1, batch["variables"], gone.float()
            )
            > 0
        )
        entropy = F.binary_cross_entropy_with_logits(
            self.left_out(features.pooled).float(), was_hidden.float(), reduction="none"
        ).mean(1)
        return squares, entropy, hidden.any(1), mask.any(1)

    def loss(self, backbone: Backbone, batch: Batch):
        losses, real, logs = self._losses(backbone, batch)
        return (
            losses.sum(),
            real.sum(),
            {name: value.detach().sum() for name, value in logs.items()},
        )

    def _losses(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        squares, entropy, hidden, real = self._rows(backbone, batch)
        value, events = squares * hidden, entropy * real
        return (
            value + self.options.weight * events,
            real.float(),
            {"value_error": value, "events_loss": events},
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        losses, real, _ = self._losses(backbone, batch)
        return {"loss": losses, "count": real}
