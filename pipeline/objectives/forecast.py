"""Forecasting the next hours of a record without labels: what STraTS is pretrained with (Tipirneni
and Reddy 2022, section 3.3).
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

CUT = 1 << 19
"""Stream of the rows' keys, apart from the modality's."""
FARTHEST = 5.0
"""Deviations that an error counts at most: one wrong entry of a nurse should not outweigh a day of
a patient.
"""


class ForecastOptions(Options):
    horizon: float = Field(
        6.0, gt=0, description="hours ahead whose mean value of each variable is forecast"
    )
    after: float = Field(
        12.0,
        ge=0,
        description="backbones that are not causal: rows are cut at a random hour, so many after "
        "their first event at least",
    )
    presence: float = Field(
        0.3,
        ge=0,
        description="weight of telling which variables will be measured at all; 0: as published",
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout before the head")


@register("objective", "forecast", options=ForecastOptions)
class Forecast(Objective):
    """From what is known at an hour, the mean standardised value of each variable over the next
    ``horizon`` hours: squared error over the variables that are measured there, each error counted
    up to 5 deviations, and cross-entropy of whether they are, weighed by ``presence``; both
    averaged over all variables.

    A causal backbone (events/gru) forecasts at each of its tokens that has events behind it, from
    the token alone; others once a row, from ``pooled`` of the events up to a cut that the row's key
    chooses (in evaluation the middle). Nothing from after that hour is read. Rows with nothing to
    forecast take no part, nor do hours whose horizon reaches beyond the window: what comes after it
    is not known, and is no absence.

    Logged, averaged over all variables as the loss is: ``measured``, the share that is measured;
    ``error``, the squared errors of those; ``zero_error``, those of always forecasting the mean,
    which is 0. error / measured is the mean squared error.
    """

    metrics = ("loss",)
    log_names = ("error", "zero_error", "measured")

    def __init__(self, backbone: Backbone, options: ForecastOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs = backbone.arch["inputs"]
        if "variables" not in inputs:
            raise ValueError(
                f"{backbone.arch['name']} reads no events: forecast takes a backbone of "
                "events, such as events/gru"
            )
        self.variables: int = inputs["variables"]
        self.latest: float = inputs["hours"] - options.horizon
        """The last hour whose horizon lies within the window."""
        if self.latest <= inputs["start"]:
            raise ValueError(
                f"forecast.horizon: {options.horizon:g} hours ahead are as many as the window "
                f"has ({inputs['start']:g} to {inputs['hours']:g}): "
                "lower horizon, or raise hours in data.modality"
            )
        width: Any = backbone.token_dim if backbone.causal else backbone.pooled_dim
        self.head = nn.Sequential(
            nn.Dropout(options.dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2 * self.variables),
        )

    def ahead(self, batch: Batch, hours: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, V) float32 mean value of each variable in the ``horizon`` hours after ``hours``
        (B, T, ascending), and (B, T, V) bool whether it is there.
        """
        total, count = (
            self._until(batch, hours + self.options.horizon, value)
            - self._until(batch, hours, value)
            for value in (
                batch["values"].double(),
                torch.ones_like(batch["values"], dtype=torch.float64),
            )
        )
        seen = count > 0.5
        return (total / count.clamp(min=1)).float(), seen

    def _until(self, batch: Batch, hours: Tensor, value: Tensor) -> Tensor:
        """(B, T, V) sums of ``value`` over the events before each of ``hours``."""
        mask, (rows, length) = batch["mask"], hours.shape
        place = torch.searchsorted(hours.contiguous(), batch["times"].contiguous(), right=True)
        kept = mask & (place < length)
        index = (
            torch.arange(rows, device=hours.device)[:, None] * length + place
        ) * self.variables + batch["variables"]
        out = torch.zeros(
            rows * length * self.variables, dtype=value.dtype, device=hours.device
        ).index_add_(0, index[kept], value[kept])
        return out.view(rows, length, self.variables).cumsum(1)

    def _cut(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The events before an hour of each row, and that hour (B, 1)."""
        times, mask = batch["times"], batch["mask"]
        first = times.masked_fill(~mask, float("inf")).amin(1)
        last = times.masked_fill(~mask, float("-inf")).amax(1)
        low = first + self.options.after
        low = low.clamp(max=self.latest)
        high = torch.maximum((last - self.options.horizon / 2).clamp(max=self.latest), low)
        share = uniform(batch.keys, 1, CUT)[:, 0] if self.training else torch.full_like(first, 0.5)
        hour = torch.where(
            mask.any(1), low + (high - low) * share, torch.zeros_like(first)
        ).nan_to_num()
        return batch.replace(mask=mask & (times < hour[:, None])), hour[:, None]

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B, T) losses, (B, T) which count, and (B, T) parts of them to log."""
        if backbone.causal:
            features = backbone(batch, want=("tokens", "stages"))
            assert features.tokens is not None and features.mask is not None
            found, hours, real, unused = (
                features.tokens,
                features.stages["times"],
                features.mask,
                features.pooled,
            )
        else:
            seen, hours = self._cut(batch)
            features = backbone(seen)
            found, real, unused = (
                features.pooled[:, None],
                seen["mask"].any(1, keepdim=True),
                features.pooled,
            )
        mean, present = self.ahead(batch, hours)
        real = real & present.any(2) & (hours <= self.latest)
        value, logit = self.head(found).float().unflatten(-1, (2, self.variables)).unbind(-2)
        squares = (value - mean).clamp(-FARTHEST, FARTHEST).square() * present
        presence_loss = F.binary_cross_entropy_with_logits(logit, present.float(), reduction="none")
        losses = (
            squares.mean(2)
            + self.options.presence * presence_loss.mean(2)
            + 0.0 * unused.float().sum(1, keepdim=True)
        )
        zero = mean.clamp(-FARTHEST, FARTHEST).square() * present
        return (
            losses * real,
            real.float(),
            {
                "error": squares.mean(2) * real,
                "zero_error": zero.mean(2) * real,
                "measured": present.float().mean(2) * real,
            },
        )

    def loss(self, backbone: Backbone, batch: Batch):
        losses, real, logs = self._rows(backbone, batch)
        return (
            losses.sum(),
            real.sum(),
            {name: value.detach().sum() for name, value in logs.items()},
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (B,), summed over the hours that are forecast, and ``count`` (B,), how many
        those are.
        """
        losses, real, _ = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": real.sum(1)}
