"""Single-label classification, of whatever a backbone pools: images, texts, records."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.rng import uniform
from pipeline.metrics import calibration
from pipeline.nn import losses

_BETA, _CUT = 101, 102
"""Streams of a row's key: how much is mixed, and where the patch lies."""
_TRIES = 32


class ClassificationOptions(Options):
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="training only (Szegedy et al. 2016)"
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=1,
        description="training only: images and labels of two rows are mixed by a share from "
        "Beta(mixup, mixup) "
        "(Zhang et al. 2018; 0.1 to 0.4 there); rows are paired within their canonical shard, "
        "and within a micro-batch",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="training only: a patch of another row's image, its area from Beta(cutmix, "
        "cutmix) (Yun et al. 2019; "
        "1 there); with mixup too, each row takes one of both by a fair coin",
    )
    positive: str | int | float | bool | None = Field(
        None,
        description="of two classes the positive one, by its value or name (the event that is "
        "foretold): "
        "it stands second; none: the larger value",
    )
    class_weight: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: in training a row weighs rows / (classes x rows of its class), "
        "counted "
        "over all training rows; the evaluated loss is not weighted",
    )
    focal: float = Field(
        0.0,
        ge=0,
        description="training only: gamma of the focal loss, (1 - p) ** gamma times the "
        "cross-entropy (Lin et al. 2017; 2 there)",
    )
    calibrate: Literal["none", "temperature"] = Field(
        "none",
        description="temperature: after training one scalar that the scores are divided by is "
        "fitted "
        "on the validation rows (Guo et al. 2017); test metrics and predict use it",
    )
    threshold: Literal["none", "f1", "youden"] = Field(
        "none",
        description="of two classes: rows are called positive from the probability with the "
        "largest "
        "F1, or sensitivity + specificity, on the validation rows; none: the likelier class",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(
        True,
        description="layer norm without parameters before the linear layer, so that one learning "
        "rate fits every backbone",
    )


@register("objective", "classification", options=ClassificationOptions)
class Classification(Objective):
    """A linear head on ``pooled``. State: ``values`` (what stands in the column) and ``labels``
    (their names), in class order; ``counts``, training rows of each, for class weights;
    ``temperature`` and ``threshold`` where they were fitted.
    """

    roles = ("label",)
    optional_roles = ("label_name",)
    metrics = ("accuracy", "macro_f1", "loss")
    log_names = ("accuracy",)

    @classmethod
    def target_metrics(cls, options, state):
        """Of two classes also how well the positive one is ranked, and how far probabilities are
        off.
        """
        return (
            (*cls.metrics, "auroc", "auprc", "min_precision_sensitivity", "brier", "ece")
            if len(state["labels"]) == 2
            else cls.metrics
        )

    @classmethod
    def fit(cls, options, table, columns):
        """Classes are the values of the training rows, sorted, a named positive one last; a
        ``label_name`` column gives their names.
        """
        table = pa.table(
            {
                columns[role]: _plain(table[columns[role]])
                for role in ("label", "label_name")
                if role in columns
            }
        )
        column = table[columns["label"]]
        _refuse_nulls(column, columns["label"])
        values = sorted(pc.unique(column).to_pylist())
        if len(values) < 2:
            raise ValueError(
                f"column {columns['label']}: the training rows hold one label only ({values}); "
                "classification needs two"
            )
        names = [str(v) for v in values]
        if "label_name" in columns:
            pairs = (
                table.group_by([columns["label"], columns["label_name"]]).aggregate([]).to_pylist()
            )
            named: dict[Any, list[str]] = {}
            for pair in pairs:
                named.setdefault(pair[columns["label"]], []).append(
                    str(pair[columns["label_name"]])
                )
            double = {v: n for v, n in named.items() if len(n) > 1}
            if double:
                raise ValueError(
                    f"column {columns['label_name']}: one label has several names: {double}"
                )
            names = [named[v][0] for v in values]
            often = Counter(
                names
                # ImageNet has two cranes: heads are carried over by name, so each name must mean
                # one label
            )
            names = [
                name if often[name] == 1 else f"{name} ({value})"
                for name, value in zip(names, values, strict=True)
            ]
        order = _order(values, names, options)
        state = {"values": [values[k] for k in order], "labels": [names[k] for k in order]}
        if options.class_weight != "none":
            state["counts"] = np.bincount(
                cls.encode(table, columns, state)["label"], minlength=len(values)
            ).tolist()
        return state

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        if columns.get("label") not in table.column_names:  # new rows to predict
            return {}
        column = _plain(table[columns["label"]])
        _refuse_nulls(column, columns["label"])
        try:
            known = pa.array(state["values"], type=column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise ValueError(
                f"column {columns['label']}: it holds {column.type} values, but the labels of "
                "the training rows are like "
                f"{state['values'][0]!r}; write both in one type"
            ) from None
        found = pc.index_in(column, value_set=known)
        if found.null_count:
            value = column.filter(pc.is_null(found))[0].as_py()
            raise ValueError(
                f"column {columns['label']}: label {value!r} never stands in the training rows; "
                f"{nearest(str(value), state['labels'])} ({len(state['labels'])} known)"
            )
        return {"label": found.to_numpy().astype(np.int64)}

    def __init__(self, backbone: Backbone, options: ClassificationOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, len(state["labels"]))

    def scores(self, pooled: Tensor) -> Tensor:
        if self.options.norm:
            pooled = F.layer_norm(pooled, pooled.shape[-1:])
        return self.head(F.dropout(pooled, self.options.dropout, self.training))

    @property
    def mixes_inputs(self) -> bool:
        """Whether training needs the images themselves, so that cached features will not do."""
        return self.options.mixup > 0 or self.options.cutmix > 0

    @property
    def needs_calibration(self) -> bool:
        return self.options.calibrate != "none" or self.options.threshold != "none"

    def _losses(self, scores: Tensor, label: Tensor) -> Tensor:
        """(B,) of a training batch: smoothed, weighted by class, focal."""
        weight = (
            losses.balanced(self.state["counts"], scores.device)
            if self.options.class_weight != "none"
            else None
        )
        return losses.cross_entropies(
            scores, label, weight, self.options.focal, self.options.label_smoothing
        )

    def head_loss(self, features: Tensor, batch: Batch):
        if self.mixes_inputs and self.training:
            raise ValueError(
                "options mixup and cutmix of classification mix images: they cannot train a "
                "head on cached features; leave them out"
            )
        scores, label = self.scores(features).float(), batch["label"]
        if self.training and (self.options.class_weight != "none" or self.options.focal):
            total = self._losses(scores, label).sum()
        else:
            smoothing = self.options.label_smoothing if self.training else 0.0
            total = F.cross_entropy(scores, label, reduction="sum", label_smoothing=smoothing)
        hits = (scores.argmax(-1) == label).sum()
        return total, torch.full((), float(label.shape[0]), device=label.device), {"accuracy": hits}

    def loss(self, backbone: Backbone, batch: Batch):
        if not (self.mixes_inputs and self.training):
            return self.head_loss(backbone(batch).pooled, batch)
        # pyright: ignore
        other, share, images = mixed(batch, self.options.mixup, self.options.cutmix)
        scores = self.scores(backbone(batch.replace(image=images)).pooled).float()
        total, hits = torch.zeros((), device=scores.device), torch.zeros((), device=scores.device)
        for label, weight in ((batch["label"], share), (batch["label"][other], 1 - share)):
            total = total + (weight * self._losses(scores, label)).sum()
            hits = hits + (weight * (scores.argmax(-1) == label)).sum()
        return (
            total,
            torch.full((), float(len(batch)), device=scores.device),
            {"accuracy": hits.detach()},
        )

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        scores = self.scores(features).float() / self.state.get("temperature", 1.0)
        out = {"scores": scores}
        if "label" in batch.data:
            out |= {
                "label": batch["label"],
                "loss": F.cross_entropy(scores, batch["label"], reduction="none"),
            }
        if "threshold" in self.state:
            out["threshold"] = torch.full(
                (scores.shape[0],),
                self.state["threshold"],
                dtype=torch.float64,
                device=scores.device,
            )
        return out

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        return self.head_predict(backbone(batch).pooled, batch)

    def calibrate(self, found):
        if not self.needs_calibration:
            return
        scores = found["scores"]
        if self.options.calibrate == "temperature":
            self.state = {
                **self.state,
                "temperature": calibration.temperature(scores, found["label"]),
            }
            scores = scores / np.float32(self.state["temperature"])
        if self.options.threshold != "none":
            chance = calibration.softmax(scores)[:, 1]
            self.state = {
                **self.state,
                "threshold": calibration.best_threshold(
                    chance, found["label"] == 1, self.options.threshold
                ),
            }

    def output_columns(self, found, raw_rows):
        """``prediction``: the likeliest label's name, or by the threshold. ``probabilities`` (n,
        C), in the order of the bundle's labels.
        """
        names = np.array(self.state["labels"], dtype=object)
        chance = calibration.softmax(found["scores"])
        called = (
            chance[:, 1] >= self.state["threshold"]
            if "threshold" in self.state
            else found["scores"].argmax(1)
        )
        return {
            "prediction": names[np.asarray(called, dtype=np.int64)],
            "probabilities": chance.astype(np.float32),
        }


SHOWN_LABELS = 5


def _refuse_nulls(column: pa.ChunkedArray, name: str) -> None:
    """Raise ValueError where a row has no label (null), with how many and what to do."""
    if not column.null_count:
        return
    values = [str(value) for value in pc.unique(column.drop_null()).to_pylist()]
    shown = ", ".join(
        [*sorted(values)[:SHOWN_LABELS], *(["..."] if len(values) > SHOWN_LABELS else [])]
    )
    advice = (
        f"write their labels, or leave these rows out: data.where: {{{name}: [{shown}]}} keeps "
        "the rows that have one"
        if values
        else "write their labels"
    )
    raise ValueError(
        f"column {name}: {column.null_count} of {len(column)} rows have no label (null); {advice}"
    )


def _order(values: list[Any], names: list[str], options: ClassificationOptions) -> list[int]:
    """Places of the values in class order. Raises ValueError for a positive class that is not
    there, or options for two classes where there are more.
    """
    if options.positive is None and options.threshold == "none":
        return list(range(len(values)))
    if len(values) != 2:
        name = "positive" if options.positive is not None else "threshold"
        raise ValueError(
            f"option {name} of classification is for two classes, and the training rows hold "
            f"{len(values)}: leave it out"
        )
    if options.positive is None:
        return [0, 1]
    found = [
        k
        for k, (value, name) in enumerate(zip(values, names, strict=True))
        if str(options.positive) in (str(value), name)
    ]
    if len(found) != 1:
        raise ValueError(
            f"option positive of classification: {options.positive!r} is none of the classes "
            f"{', '.join(names)}"
        )
    return [1 - found[0], found[0]]


# ---------------------------------------------------------------- mixing


@torch.compiler.disable
def mixed(batch: Batch, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) int64 partner of each row, (B,) float32 share of the row itself, and the mixed ``image``
    (B, C, H, W).

    All of it follows from the rows' keys and shards, so it is the same at any number of ranks.
    Raises ValueError for rows without images, and where no row has a partner.
    """
    if "image" not in batch.data:
        raise ValueError(
            "options mixup and cutmix of classification mix images, and these rows hold "
            f"{', '.join(sorted(batch.data))}; leave them out"
        )
    if batch.shards is not None and len(np.unique(batch.shards)) == len(batch) > 1:
        raise ValueError(
            "options mixup and cutmix of classification pair rows of one canonical shard, and "
            f"these {len(batch)} rows lie in as many shards: "
            "raise global_batch (and micro_batch), or lower canonical_shards"
        )
    x, other, keys = batch["image"], batch.partners().to(batch["image"].device), batch.keys
    coin, place = uniform(keys, 1, _CUT)[:, 0], uniform(keys, 3, _CUT)[:, 1:]
    cuts = coin < 0.5 if mixup and cutmix else torch.full_like(coin, bool(cutmix), dtype=torch.bool)
    share = torch.where(cuts, beta(keys, cutmix or 1.0), beta(keys, mixup or 1.0))
    patch = _patch(share, place, x.shape[-2], x.shape[-1])
    share = torch.where(cuts, 1 - patch.float().mean((1, 2)), share)
    weight = torch.where(cuts[:, None, None], 1 - patch.float(), share[:, None, None])[:, None].to(
        x.dtype
    )
    return other, share, weight * x + (1 - weight) * x[other]


def beta(keys: Tensor, alpha: float) -> Tensor:
    """(B,) float32 from Beta(alpha, alpha), 0 < alpha <= 1, of (B,) keys.

    The first of 32 tries that is taken (Joehnk, Metrika 8, 1964), in logarithms, as U ** (1 /
    alpha) is 0 in float32 for a small alpha. At worst (alpha 1) a try is taken half of the time, so
    none is once in 4e9 rows.
    """
    u = uniform(keys, 2 * _TRIES, _BETA).clamp(min=2.0**-25).log() / alpha
    a, b = u[:, :_TRIES], u[:, _TRIES:]
    first = (torch.logaddexp(a, b) <= 0).int().argmax(1, keepdim=True)
    return torch.sigmoid(a - b).gather(1, first)[:, 0]


def _patch(share: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """(B, height, width) bool: the part that comes from the partner, sides sqrt(1 - share) of the
    image's around a centre anywhere in it.
    """
    side = (1 - share).clamp(min=0).sqrt()

    def inside(pixels: int, centre: Tensor) -> Tensor:
        middle, half = (
            (centre * pixels).floor()[:, None],
            ((side * pixels).floor() / 2).floor()[:, None],
        )  # as the authors' code rounds
        along = torch.arange(pixels, device=share.device)[None]
        return (along >= middle - half) & (along < middle + half)

    return inside(height, place[:, 0])[:, :, None] & inside(width, place[:, 1])[:, None, :]


def _plain(column):
    """The values themselves of a column that is stored as a dictionary (a pandas categorical)."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
