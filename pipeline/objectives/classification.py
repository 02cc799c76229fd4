"""Single-label classification, of whatever a backbone pools: images, texts, records."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.contracts import Arrays, Backbone, Batch, Objective
from pipeline.registry import Options, nearest, register


class ClassificationOptions(Options):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="training only (Szegedy et al. 2016)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(True, description="layer norm without parameters before the linear layer, so that one learning rate fits every backbone")


@register("objective", "classification", options=ClassificationOptions)
class Classification(Objective):
    """A linear head on ``pooled``. State: ``values`` (what stands in the column) and ``labels`` (their names), in class order."""

    roles = ("label",)
    optional_roles = ("label_name",)
    metrics = ("accuracy", "macro_f1", "loss")
    log_names = ("accuracy",)

    @classmethod
    def fit(cls, options, table, columns):
        """Classes are the values of the training rows, sorted; a ``label_name`` column gives their names."""
        table = pa.table({columns[role]: _plain(table[columns[role]]) for role in ("label", "label_name") if role in columns})
        column = table[columns["label"]]
        if column.null_count:
            raise ValueError(f"column {columns['label']}: {column.null_count} training rows have no label")
        values = sorted(pc.unique(column).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]
        if len(values) < 2:
            raise ValueError(f"column {columns['label']}: the training rows hold one label only ({values}); classification needs two")
        names = [str(v) for v in values]
        if "label_name" in columns:
            pairs = table.group_by([columns["label"], columns["label_name"]]).aggregate([]).to_pylist()
            named: dict[Any, list[str]] = {}
            for pair in pairs:
                named.setdefault(pair[columns["label"]], []).append(str(pair[columns["label_name"]]))
            double = {v: n for v, n in named.items() if len(n) > 1}
            if double:
                raise ValueError(f"column {columns['label_name']}: one label has several names: {double}")
            names = [named[v][0] for v in values]
            often = Counter(names)  # ImageNet has two cranes: heads are carried over by name, so each name must mean one label
            names = [name if often[name] == 1 else f"{name} ({value})" for name, value in zip(names, values, strict=True)]
        return {"values": values, "labels": names}

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        if columns.get("label") not in table.column_names:  # new rows to predict
            return {}
        column = _plain(table[columns["label"]])
        try:
            known = pa.array(state["values"], type=column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise ValueError(f"column {columns['label']}: it holds {column.type} values, but the labels of the training rows are like "
                             f"{state['values'][0]!r}; write both in one type") from None
        found = pc.index_in(column, value_set=known)  # pyright: ignore[reportAttributeAccessIssue]
        if found.null_count:
            value = column.filter(pc.is_null(found))[0].as_py()  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"column {columns['label']}: label {value!r} never stands in the training rows; "
                             f"{nearest(str(value), state['labels'])} ({len(state['labels'])} known)")
        return {"label": found.to_numpy().astype(np.int64)}

    def __init__(self, backbone: Backbone, options: ClassificationOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, len(state["labels"]))

    def scores(self, pooled: Tensor) -> Tensor:
        if self.options.norm:
            pooled = F.layer_norm(pooled, pooled.shape[-1:])
        return self.head(F.dropout(pooled, self.options.dropout, self.training))

    def head_loss(self, features: Tensor, batch: Batch):
        scores, label = self.scores(features).float(), batch["label"]
        smoothing = self.options.label_smoothing if self.training else 0.0
        total = F.cross_entropy(scores, label, reduction="sum", label_smoothing=smoothing)
        hits = (scores.argmax(-1) == label).sum()
        return total, torch.full((), float(label.shape[0]), device=label.device), {"accuracy": hits}

    def loss(self, backbone: Backbone, batch: Batch):
        return self.head_loss(backbone(batch).pooled, batch)

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        scores = self.scores(features).float()
        out = {"scores": scores}
        if "label" in batch.data:
            out |= {"label": batch["label"], "loss": F.cross_entropy(scores, batch["label"], reduction="none")}
        return out

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        return self.head_predict(backbone(batch).pooled, batch)


def _plain(column):
    """The values themselves of a column that is stored as a dictionary (a pandas categorical)."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
