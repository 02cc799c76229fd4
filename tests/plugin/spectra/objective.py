"""The brightness of a lamp: one number a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective


class BrightnessOptions(Options):
    standardise: bool = Field(True, description="learn the number by the training rows' deviation")


@register("objective", "brightness", options=BrightnessOptions)
class Brightness(Objective):
    """A linear head with the squared error. State: ``mean`` and ``std`` of the training rows."""

    roles = ("value",)
    metrics = ("brightness_error", "loss")
    label_kind = "numbers"
    label_tensor = "value"
    label_tensors = ("value",)

    @classmethod
    def fit(cls, options, table, columns):
        values = _values(table, columns)
        std = float(values.std()) or 1.0
        if not options.standardise:
            return {"mean": 0.0, "std": 1.0}
        return {"mean": float(values.mean()), "std": std}

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        if columns.get("value") not in table.column_names:
            return {}
        return {"value": _values(table, columns)}

    def __init__(self, backbone: Backbone, options: Any, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, 1)

    def head_loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        losses = self.head_predict(features, batch)["loss"]
        return losses.sum(), losses.new_full((), float(len(losses))), {}

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        scaled = self.head(features)
        return self.predict_scores(scaled * self.state["std"] + self.state["mean"], batch)

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = {"prediction": scores[:, 0]}
        if "value" in batch.data:
            error = (scores[:, 0] - batch["value"]) / self.state["std"]
            found |= {"value": batch["value"], "loss": error**2}
        return found

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        return self.head_predict(backbone(batch).pooled, batch)

    def loss(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.head_loss(backbone(batch).pooled, batch)


def _values(table, columns) -> np.ndarray:
    return table[columns["value"]].to_numpy().astype(np.float32)
