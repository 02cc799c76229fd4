"""Regression: one number a row, from whatever a backbone pools: images, texts, records.

Shapes: B rows of a batch, n rows of a table, D features.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import LinearHeadOptions, register
from pipeline.core.contracts import Arrays, Backbone, Batch
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.nn import losses
from pipeline.core.nn.linear_head import PooledHead, head_inputs
from pipeline.core.nn.losses import without_autocast

LOSSES = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}
"""Losses of a standardised number; Huber's is quadratic up to one standard deviation."""


class RegressionOptions(LinearHeadOptions):
    loss: Literal["squared", "absolute", "huber"] = Field(
        "squared",
        description="loss of the standardised number: squared estimates means, absolute medians; "
        "huber is squared up to an error of one standard deviation and linear beyond (Huber "
        "1964), so that a few far values have little effect",
    )


class RegressionState(TypedDict):
    """State of `Regression`."""

    mean: float
    """Mean of the training rows' numbers."""
    std: float
    """Their standard deviation."""
    labels: list[str]
    """The name of the column."""


@register("objective", "regression", options=RegressionOptions)
class Regression(PooledHead):
    """Regression: a linear head on the pooled features that predicts one number a row.

    Use it to predict a number, such as a price, an age or a duration; for ordered grades
    ``classification`` with metric ``kappa`` may fit better. The loss is the squared error, or
    Huber's (Huber 1964), which suits numbers with a few outliers.

    The number is standardised by mean and deviation of the training rows, so learning rates and
    penalties do not depend on its unit. Predictions and metrics are in the unit of the column;
    ``loss`` is that of the standardised number. If rows have several numbers, write a target for
    each.
    """

    state: RegressionState
    roles = ("value",)
    needed_roles = roles
    metrics = ("rmse", "mae", "r2", "spearman", "loss")
    transformers_head = TransformersHead(
        "ForSequenceClassification", problem_type="regression", linear_on="pooled"
    )
    label_tensors = ("value",)
    label_kind = "numbers"
    label_tensor = "value"
    label_fraction_unit = "rows"
    output_types = {}

    @classmethod
    def fit(cls, options, table, columns) -> RegressionState:
        """Take mean and standard deviation of the training rows.

        Raises:
            ValueError: the column holds no numbers, or a single one.
        """
        name = columns["value"]
        numbers = _numbers(table[name], name)
        numbers = numbers[np.isfinite(numbers)]
        if not len(numbers) or numbers.min() == numbers.max():
            description = f"one number only ({numbers[0]:g})" if len(numbers) else "no number"
            raise ValueError(
                f"column {name}: the training rows hold {description}; regression needs "
                "numbers that differ"
            )
        return {"mean": float(numbers.mean()), "std": float(numbers.std()), "labels": [name]}

    @classmethod
    def encode(cls, table, columns, state: RegressionState) -> Arrays:
        """Return ``value`` (n,) float32, standardised; NaN where there is no number."""
        name = columns.get("value", "")
        if name not in table.column_names:  # new rows to predict
            return {}
        standardised = (_numbers(table[name], name) - state["mean"]) / state["std"]
        return {"value": standardised.astype(np.float32)}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: RegressionState):
        """A number must be finite: files of pandas have NaN where a value is missing."""
        name = columns["value"]
        numbers = _numbers(table[name], name)
        return ["" if fine else f"{name} is not a finite number" for fine in np.isfinite(numbers)]

    def __init__(self, backbone: Backbone, options: RegressionOptions, state: RegressionState):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, 1)

    @property
    def output_scale(self) -> tuple[float, float]:
        return self.state["std"], self.state["mean"]

    @torch.no_grad()
    def take_scale_of(self, state: RegressionState) -> None:
        """Let a head that was standardised by another mean and deviation predict the same."""
        scale, shift = self.output_scale
        self.head.weight.mul_(state["std"] / scale)
        self.head.bias.mul_(state["std"] / scale).add_((state["mean"] - shift) / scale)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return standardised numbers (B, 1) of pooled features (B, D).

        The head is float32 under autocast too: bfloat16 has 3 digits, and all rows near one number
        would get the same.
        """
        pooled = losses.at_least_float32(pooled)
        pooled = head_inputs(pooled, self.options, self.training)
        with without_autocast(pooled):
            return self.head(pooled)

    def _losses(self, standardised: Tensor, value: Tensor) -> Tensor:
        """Return the (B,) losses of standardised numbers (B,)."""
        return LOSSES[self.options.loss](standardised, value.to(standardised), reduction="none")

    def head_loss(self, features: Tensor, batch: Batch):
        row_losses = self._losses(self.scores(features)[:, 0], batch["value"])
        count = torch.full((), float(len(row_losses)), device=row_losses.device)
        return row_losses.sum(), count, {}

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``prediction`` (B,) float64, and with labels ``value`` and ``loss``.

        In float64, since a number may be large beside its deviation: a year, an altitude.
        """
        standardised = scores[:, 0].double()
        predicted = {"prediction": self._in_unit(standardised)}
        if "value" in batch.data:
            value = batch["value"].double()
            predicted["value"] = self._in_unit(value)
            predicted["loss"] = self._losses(standardised, value)
        return predicted

    def _in_unit(self, standardised: Tensor) -> Tensor:
        scale, shift = self.output_scale
        return standardised * scale + shift

    def average(self, predictions):
        """Return the mean of the numbers."""
        scale, shift = self.output_scale
        first = predictions[0]
        averaged = {"prediction": torch.stack([one["prediction"] for one in predictions]).mean(0)}
        if "value" in first:
            both = (averaged["prediction"], first["value"])
            averaged["value"] = first["value"]
            averaged["loss"] = self._losses(*((one - shift) / scale for one in both))
        return averaged

    def logits(self, backbone, batch):
        return self.raw_outputs(backbone, batch)["prediction"][:, None]

    def raw_outputs(self, backbone, batch):
        """`prediction` (B,) float64: the number, in the unit of the column."""
        standardised = self.scores(backbone(batch).pooled)[:, 0].double()
        return {"prediction": self._in_unit(standardised)}

    def output_columns(self, predictions, raw_rows):
        """Return ``prediction``, in the unit of the column."""
        return {"prediction": predictions["prediction"]}


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Return (n,) float64 numbers of a column, NaN for nulls.

    Raises:
        ValueError: it holds something else than numbers.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_decimal(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column.cast(pa.float64(), safe=False).to_numpy()  # from 2 ** 53 on not exact
    raise ValueError(
        f"column {name} holds {kind}: regression estimates numbers; write them as integers or "
        "floats without leading zeros, or take the objective classification for classes"
    )
