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
from pipeline.rng import uniform

_BETA, _CUT = 101, 102
"""Streams of a row's key: how much is mixed, and where the patch lies."""
_TRIES = 32


class ClassificationOptions(Options):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="training only (Szegedy et al. 2016)")
    mixup: float = Field(0.0, ge=0, le=1, description="training only: images and labels of two rows are mixed by a share from Beta(mixup, mixup) "
                         "(Zhang et al. 2018; 0.1 to 0.4 there); rows are paired within their canonical shard, and within a micro-batch")
    cutmix: float = Field(0.0, ge=0, le=1, description="training only: a patch of another row's image, its area from Beta(cutmix, cutmix) (Yun et al. 2019; "
                          "1 there); with mixup too, each row takes one of both by a fair coin")
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

    @property
    def mixes(self) -> bool:
        """Whether training needs the images themselves, so that cached features will not do."""
        return self.options.mixup > 0 or self.options.cutmix > 0

    def head_loss(self, features: Tensor, batch: Batch):
        if self.mixes and self.training:
            raise ValueError("options mixup and cutmix of classification mix images: they cannot train a head on cached features; leave them out")
        scores, label = self.scores(features).float(), batch["label"]
        smoothing = self.options.label_smoothing if self.training else 0.0
        total = F.cross_entropy(scores, label, reduction="sum", label_smoothing=smoothing)
        hits = (scores.argmax(-1) == label).sum()
        return total, torch.full((), float(label.shape[0]), device=label.device), {"accuracy": hits}

    def loss(self, backbone: Backbone, batch: Batch):
        if not (self.mixes and self.training):
            return self.head_loss(backbone(batch).pooled, batch)
        other, share, images = mixed(batch, self.options.mixup, self.options.cutmix)  # pyright: ignore[reportCallIssue]
        scores = self.scores(backbone(batch.replace(image=images)).pooled).float()
        total, hits = torch.zeros((), device=scores.device), torch.zeros((), device=scores.device)
        for label, weight in ((batch["label"], share), (batch["label"][other], 1 - share)):
            total = total + (weight * F.cross_entropy(scores, label, reduction="none", label_smoothing=self.options.label_smoothing)).sum()
            hits = hits + (weight * (scores.argmax(-1) == label)).sum()
        return total, torch.full((), float(len(batch)), device=scores.device), {"accuracy": hits.detach()}

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        scores = self.scores(features).float()
        out = {"scores": scores}
        if "label" in batch.data:
            out |= {"label": batch["label"], "loss": F.cross_entropy(scores, batch["label"], reduction="none")}
        return out

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        return self.head_predict(backbone(batch).pooled, batch)

    def written(self, found, origin):
        """``prediction``: the likeliest label's name. ``probabilities`` (n, C), in the order of the bundle's labels."""
        names = np.array(self.state["labels"], dtype=object)
        return {"prediction": names[found["scores"].argmax(1)], "probabilities": torch.from_numpy(found["scores"]).softmax(1).numpy()}


# ---------------------------------------------------------------- mixing

@torch.compiler.disable
def mixed(batch: Batch, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) int64 partner of each row, (B,) float32 share of the row itself, and the mixed ``image`` (B, C, H, W).

    All of it follows from the rows' keys and shards, so it is the same at any number of ranks. Raises ValueError for rows without
    images, and where no row has a partner.
    """
    if "image" not in batch.data:
        raise ValueError(f"options mixup and cutmix of classification mix images, and these rows hold {', '.join(sorted(batch.data))}; leave them out")
    if batch.shards is not None and len(np.unique(batch.shards)) == len(batch) > 1:
        raise ValueError(f"options mixup and cutmix of classification pair rows of one canonical shard, and these {len(batch)} rows lie in as many shards: "
                         "raise global_batch (and micro_batch), or lower canonical_shards")
    x, other, keys = batch["image"], batch.partners().to(batch["image"].device), batch.keys
    coin, place = uniform(keys, 1, _CUT)[:, 0], uniform(keys, 3, _CUT)[:, 1:]
    cuts = coin < 0.5 if mixup and cutmix else torch.full_like(coin, bool(cutmix), dtype=torch.bool)
    share = torch.where(cuts, beta(keys, cutmix or 1.0), beta(keys, mixup or 1.0))
    patch = _patch(share, place, x.shape[-2], x.shape[-1])
    share = torch.where(cuts, 1 - patch.float().mean((1, 2)), share)
    weight = torch.where(cuts[:, None, None], 1 - patch.float(), share[:, None, None])[:, None].to(x.dtype)
    return other, share, weight * x + (1 - weight) * x[other]


def beta(keys: Tensor, alpha: float) -> Tensor:
    """(B,) float32 from Beta(alpha, alpha), 0 < alpha <= 1, of (B,) keys.

    The first of 32 tries that is taken (Joehnk, Metrika 8, 1964), in logarithms, as U ** (1 / alpha) is 0 in float32 for a small alpha. At
    worst (alpha 1) a try is taken half of the time, so none is once in 4e9 rows.
    """
    u = uniform(keys, 2 * _TRIES, _BETA).clamp(min=2.0 ** -25).log() / alpha
    a, b = u[:, :_TRIES], u[:, _TRIES:]
    first = (torch.logaddexp(a, b) <= 0).int().argmax(1, keepdim=True)
    return torch.sigmoid(a - b).gather(1, first)[:, 0]


def _patch(share: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) bool: the part that comes from the partner, sides sqrt(1 - share) of the image's around a centre anywhere in it."""
    side = (1 - share).clamp(min=0).sqrt()

    def inside(pixels: int, centre: Tensor) -> Tensor:
        middle, half = (centre * pixels).floor()[:, None], ((side * pixels).floor() / 2).floor()[:, None]  # as the authors' code rounds
        along = torch.arange(pixels, device=share.device)[None]
        return (along >= middle - half) & (along < middle + half)

    return inside(height, place[:, 0])[:, :, None] & inside(width, place[:, 1])[:, None, :]


def _plain(column):
    """The values themselves of a column that is stored as a dictionary (a pandas categorical)."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
