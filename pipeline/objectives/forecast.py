"""Forecasting the next hours of a patient's record, without labels: how STraTS is pretrained.

After Tipirneni and Reddy 2022, section 3.3. Shapes: B rows, N events, T hours that are forecast
from, V variables.
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

CUT = 1 << 19
"""Random stream of the rows' keys, apart from the modality's."""
MAX_ERROR = 5.0
"""Largest error that counts, in standard deviations: one wrong entry should not outweigh a day."""


class ForecastOptions(Options):
    horizon: float = Field(
        6.0, gt=0, description="hours ahead whose mean value of each variable is forecast"
    )
    after: float = Field(
        12.0,
        ge=0,
        description="backbones that are not causal: rows are cut at a random hour, at least this "
        "many hours after their first event",
    )
    presence: float = Field(
        0.3,
        ge=0,
        description="weight of predicting which variables will be measured; 0: as published",
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout before the head")


@register("objective", "forecast", options=ForecastOptions)
class Forecast(PositionLosses):
    """Forecast the mean standardised value of each variable over the next ``horizon`` hours.

    It needs records of events (modality ``events``) of some hours. Use it to pretrain
    ``events/gru`` or ``events/strats`` without outcomes. Tipirneni and Reddy 2022 (STraTS, section
    3.3).

    The loss is the squared error over the variables that are measured there; an error counts up to
    5 standard deviations. To this ``presence`` times the cross entropy of whether they are measured
    is added. Both are averaged over all variables.

    A causal backbone (events/gru) forecasts at each of its tokens that has events behind it, from
    the token alone. Others forecast once for each row, from the pooled features of the events
    before a cut. The cut is random by the row's key; in evaluation it is the middle. Nothing after
    that hour is read. Rows with nothing to forecast take no part, nor do hours whose horizon
    reaches beyond the window: what comes after it is unknown, not absent.

    Logged, averaged over all variables as the loss is: ``measured``, the share that is measured;
    ``error``, the squared errors of those; ``zero_error``, those of always forecasting the mean,
    which is 0. error / measured is the mean squared error.
    """

    metrics = ("loss",)
    log_names = ("error", "zero_error", "measured")

    def __init__(self, backbone: Backbone, options: ForecastOptions, state: State):
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        if "variables" not in inputs:
            raise ValueError(
                f"{backbone.arch.name} reads no events: forecast takes a backbone of events, "
                "such as events/gru"
            )
        self.variables: int = inputs["variables"]
        self.latest: float = inputs["hours"] - options.horizon
        """The last hour whose horizon lies within the window."""
        if self.latest <= inputs["start"]:
            raise ValueError(
                f"forecast.horizon: {options.horizon:g} hours ahead are as many as the window has "
                f"({inputs['start']:g} to {inputs['hours']:g}): lower horizon, or raise hours in "
                "data.modality"
            )
        width: Any = backbone.token_dim if backbone.causal else backbone.pooled_dim
        self.head = nn.Sequential(
            nn.Dropout(options.dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2 * self.variables),
        )

    def ahead(self, batch: Batch, hours: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean value of each variable in the ``horizon`` hours after each hour.

        Args:
            hours: (B, T) ascending.

        Returns:
            (B, T, V) float32 means, and (B, T, V) bool which variables are measured there.
        """
        values = batch["values"].double()
        total = self._within_horizon(batch, hours, values)
        count = self._within_horizon(batch, hours, torch.ones_like(values))
        return (total / count.clamp(min=1)).float(), count > 0.5

    def _within_horizon(self, batch: Batch, hours: Tensor, value: Tensor) -> Tensor:
        """Return (B, T, V) sums of ``value`` (B, N) over the events in each hour's horizon."""
        until_end = self._until(batch, hours + self.options.horizon, value)
        return until_end - self._until(batch, hours, value)

    def _until(self, batch: Batch, hours: Tensor, value: Tensor) -> Tensor:
        """Return (B, T, V) sums of ``value`` (B, N) over the events before each hour."""
        # augmentation drops events from what is seen, not from what is to be forecast
        mask, (rows, length) = batch.data.get("recorded", batch["mask"]), hours.shape
        times = batch["times"].contiguous()
        hour = torch.searchsorted(hours.contiguous(), times, right=True)
        kept = mask & (hour < length)
        row = torch.arange(rows, device=hours.device)[:, None]
        index = row * length + hour
        index = index * self.variables + batch["variables"]
        size = rows * length * self.variables
        sums = torch.zeros(size, dtype=value.dtype, device=hours.device)
        sums = sums.index_add_(0, index[kept], value[kept])
        of_hours = sums.view(rows, length, self.variables)
        return of_hours.cumsum(1)

    def cut_at_an_hour(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Return the events before an hour of each row, and that hour (B, 1)."""
        times = batch["times"]
        mask = batch["mask"]
        first = times.masked_fill(~mask, float("inf")).amin(1)
        last = times.masked_fill(~mask, float("-inf")).amax(1)
        low = (first + self.options.after).clamp(max=self.latest)
        high = (last - self.options.horizon / 2).clamp(max=self.latest)
        high = torch.maximum(high, low)
        share = torch.full_like(first, 0.5)
        if self.training:
            share = uniform(batch.keys, 1, CUT)[:, 0]
        hour = low + (high - low) * share
        hour = torch.where(mask.any(1), hour, torch.zeros_like(first))
        hour = hour.nan_to_num()[:, None]
        is_seen = mask & (times < hour)
        return batch.replace(mask=is_seen), hour

    def _features(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what is forecast from: (B, T, D) features, (B, T) hours and which are real.

        And the pooled features (B, D), which are part of the graph.
        """
        if backbone.causal:
            features = backbone(batch, want=("tokens", "stages"))
            assert features.tokens is not None and features.mask is not None
            hours = features.stages["times"]
            return features.tokens, hours, features.mask, features.pooled
        seen, hours = self.cut_at_an_hour(batch)
        pooled = backbone(seen).pooled
        return pooled[:, None], hours, seen["mask"].any(1, keepdim=True), pooled

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B, T) losses of the hours forecast from, which count, and what is logged."""
        features, hours, real, pooled = self._features(backbone, batch)
        mean, present = self.ahead(batch, hours)
        real = real & present.any(2) & (hours <= self.latest)
        output = self.head(features).float().unflatten(-1, (2, self.variables))
        value, logit = output.unbind(-2)
        difference = (value - mean).clamp(-MAX_ERROR, MAX_ERROR)
        squares = difference.square() * present
        entropy = F.binary_cross_entropy_with_logits(logit, present.float(), reduction="none")
        losses = squares.mean(2) + self.options.presence * entropy.mean(2)
        # DDP waits for every parameter's gradient
        losses = losses + 0.0 * pooled.float().sum(1, keepdim=True)
        zero = mean.clamp(-MAX_ERROR, MAX_ERROR).square() * present
        logs = {
            "error": squares.mean(2) * real,
            "zero_error": zero.mean(2) * real,
            "measured": present.float().mean(2) * real,
        }
        return losses * real, real.float(), logs
