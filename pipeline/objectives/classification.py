"""Single-label classification, of whatever a backbone pools: images, texts, records.

Shapes: B rows of a batch, n rows of a table, D features, C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import ClassHeadOptions, nearest, register
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.metrics import calibration
from pipeline.core.nn import losses
from pipeline.core.nn.eager import eager
from pipeline.core.nn.linear_head import PooledHead, head_inputs
from pipeline.core.rng import uniform

BETA, CUT = 101, 102
"""Random streams of a row's key: how much is mixed, and where the patch lies."""
_TRIES = 32
"""Draws of which the first accepted one is a number from a beta distribution."""
SHOWN_LABELS = 5
"""Labels that an error message names."""


class ClassificationOptions(ClassHeadOptions):
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="training only (Szegedy et al. 2016)"
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=1,
        description="training only: images and labels of two rows are mixed by a share from "
        "Beta(mixup, mixup) (Zhang et al. 2018; 0.1 to 0.4 there); rows are paired within their "
        "canonical shard, and within a micro-batch",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="training only: a patch of another row's image, its area from "
        "Beta(cutmix, cutmix) (Yun et al. 2019; 1 there); with mixup too, each row takes one of "
        "both by a fair coin",
    )
    positive: str | int | float | bool | None = Field(
        None,
        description="of two classes the positive one (the event to predict), by its value or "
        "name; it becomes the second class; none: the larger value",
    )
    class_weight: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: in training a row has the weight rows / (classes x rows of its "
        "class), counted over the labelled training rows; the evaluated loss is not weighted",
    )
    threshold: Literal["none", "f1", "youden"] = Field(
        "none",
        description="of two classes: rows are called positive from the probability with the "
        "largest F1, or sensitivity + specificity, on the validation rows; none: the likelier "
        "class",
    )

    @property
    def mixes_inputs(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def balances_labels(self) -> bool:
        return self.class_weight != "none"


class ClassificationState(TypedDict):
    """State of `Classification`."""

    values: list[Any]
    """The classes as the column has them: numbers or texts."""
    labels: list[str]
    """Names of the classes."""
    counts: NotRequired[list[int]]
    """Training rows of each class, for class weights."""
    temperature: NotRequired[float]
    """Set by calibration; absent before."""
    threshold: NotRequired[float]
    """Set when a threshold is chosen; absent before."""


@register("objective", "classification", options=ClassificationOptions)
class Classification(PooledHead):
    """Classification: a linear head on the pooled features.

    Use it where each row has one class of several; where a row has several labels, take
    ``multilabel``, and for a number ``regression``. The loss is the cross entropy of a softmax
    (Bridle 1990).
    """

    state: ClassificationState
    roles = ("label",)
    optional_roles = ("label_name",)
    needed_roles = roles
    metrics = ("accuracy", "macro_f1", "loss")
    transformers_head = TransformersHead(
        "ForSequenceClassification",
        problem_type="single_label_classification",
        linear_on="pooled",
    )
    log_names = ("accuracy",)
    label_tensors = ("label",)
    class_tensor = "label"
    head_options = ("norm",)
    label_kind = "classes"
    label_tensor = "label"
    output_types = {}

    @classmethod
    def target_metrics(cls, options, state: ClassificationState):
        """Of two classes judge also the ranking of the positive one, and calibration."""
        if len(state["labels"]) != 2:
            return cls.metrics
        return (*cls.metrics, "auroc", "auprc", "min_precision_sensitivity", "brier", "ece")

    @classmethod
    def fit(cls, options, table, columns) -> ClassificationState:
        """Take the sorted values of the training rows as classes, a named positive one last.

        A ``label_name`` column gives their names.

        Raises:
            ValueError: rows without a label, a single class, or a label with several names.
        """
        given = {role: columns[role] for role in ("label", "label_name") if role in columns}
        table = pa.table({name: _plain(table[name], name) for name in given.values()})
        column = table[columns["label"]]
        _refuse_nulls(column, columns["label"])
        values = sorted(pc.unique(column).to_pylist())
        if len(values) < 2:
            raise ValueError(
                f"column {columns['label']}: the training rows hold one label only ({values}); "
                "classification needs two"
            )
        names = [str(value) for value in values]
        if "label_name" in columns:
            names = _label_names(table, columns, values)
        order = _order(values, names, options)
        state: ClassificationState = {
            "values": [values[k] for k in order],
            "labels": [names[k] for k in order],
        }
        if options.class_weight != "none":
            labels = cls.encode(table, columns, state)["label"]
            state["counts"] = np.bincount(labels, minlength=len(values)).tolist()
        return state

    @classmethod
    def encode(cls, table, columns, state: ClassificationState) -> Arrays:
        """Return ``label`` (n,) int64 class numbers."""
        name = columns.get("label", "")
        if name not in table.column_names:  # new rows to predict
            return {}
        column = _plain(table[name], name)
        _refuse_nulls(column, name)
        try:
            known = pa.array(state["values"], type=column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise ValueError(
                f"column {name}: it holds {column.type} values, but the labels of the training "
                f"rows are like {state['values'][0]!r}; write both in one type"
            ) from None
        numbers = pc.index_in(column, value_set=known)
        if numbers.null_count:
            if _are_sentences(state["labels"]):
                # a row's text may be personal: it is not quoted
                raise ValueError(
                    f"column {name}: a label is in no training row ({len(state['labels'])} labels "
                    "known). They look like sentences: if the columns of text and label are "
                    "swapped, write columns: {label: NAME} with the column of classes"
                )
            unknown = column.filter(pc.is_null(numbers))
            value = unknown[0].as_py()
            advice = nearest(str(value), state["labels"])
            if pa.types.is_floating(column.type):
                advice = (
                    "to estimate numbers, write objective: regression and columns: "
                    f"{{value: {name}}}"
                )
            raise ValueError(
                f"column {name}: label {value!r} is in no training row "
                f"({len(state['labels'])} labels known); {advice}"
            )
        return {"label": numbers.to_numpy().astype(np.int64)}

    def __init__(
        self, backbone: Backbone, options: ClassificationOptions, state: ClassificationState
    ):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, len(state["labels"]))

    def scores(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) of pooled features (B, D)."""
        return self.head(head_inputs(pooled, self.options, self.training))

    # ---------------------------------------------------------------- loss

    def _training_losses(self, scores: Tensor, label: Tensor) -> Tensor:
        """Return (B,) losses: smoothed, weighted by class, focal."""
        weight = None
        if self.options.class_weight != "none":
            assert "counts" in self.state
            weight = losses.balanced_class_weights(self.state["counts"], scores.device)
        return losses.cross_entropies(
            scores, label, weight, self.options.focal, self.options.label_smoothing
        )

    def head_loss(self, features: Tensor, batch: Batch):
        options = self.options
        if self.options.mixes_inputs and self.training:
            raise ValueError(
                "options mixup and cutmix of classification mix images: they cannot train a head "
                "on cached features; leave them out"
            )
        scores = losses.at_least_float32(self.scores(features))
        label = batch["label"]
        if self.training and (options.class_weight != "none" or options.focal):
            total = self._training_losses(scores, label).sum()
        else:
            smoothing = options.label_smoothing if self.training else 0.0
            total = F.cross_entropy(scores, label, reduction="sum", label_smoothing=smoothing)
        count = torch.full((), float(label.shape[0]), device=label.device)
        return total, count, {"accuracy": (scores.argmax(-1) == label).sum()}

    def loss(self, backbone: Backbone, batch: Batch):
        if self.options.mixes_inputs and self.training:
            return self._mixed_loss(backbone, batch)
        return super().loss(backbone, batch)

    def _mixed_loss(self, backbone: Backbone, batch: Batch):
        """Return the loss of mixed images, each label weighed by its image's share."""
        other, share, images = mixed(batch, self.options.mixup, self.options.cutmix)
        features = backbone(batch.replace(image=images)).pooled
        scores = self.scores(features).float()
        total = torch.zeros((), device=scores.device)
        hits = torch.zeros((), device=scores.device)
        of_row = (batch["label"], share)
        of_partner = (batch["label"][other], 1 - share)
        for label, weight in (of_row, of_partner):
            weighted = weight * self._training_losses(scores, label)
            is_hit = scores.argmax(-1) == label
            total = total + weighted.sum()
            hits = hits + (weight * is_hit).sum()
        count = torch.full((), float(len(batch)), device=scores.device)
        return total, count, {"accuracy": hits.detach()}

    # ---------------------------------------------------------------- predictions

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``scores`` (B, C), with labels ``label`` and ``loss``, and the ``threshold``."""
        return self._calibrated(scores, batch.data.get("label"))

    def average(self, predictions):
        """Return the mean of the probabilities, as scores (Lakshminarayanan et al. 2017)."""
        logs = torch.stack([one["scores"].log_softmax(-1) for one in predictions])
        scores = logs.logsumexp(0) - math.log(len(predictions))
        return self._calibrated(scores, predictions[0].get("label"))

    def _calibrated(self, scores: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        scores = scores / self.state.get("temperature", 1.0)
        predictions = {"scores": scores}
        if label is not None:
            predictions["label"] = label
            predictions["loss"] = F.cross_entropy(scores, label, reduction="none")
        if "threshold" in self.state:
            predictions["threshold"] = torch.full(
                (scores.shape[0],),
                self.state["threshold"],
                dtype=torch.float64,
                device=scores.device,
            )
        return predictions

    def raw_outputs(self, backbone, batch):
        """`scores` (B, C): one for each of `labels`. Their softmax are the probabilities."""
        return {"scores": self.logits(backbone, batch)}

    @property
    def needs_calibration(self) -> bool:
        return self.options.calibrate != "none" or self.options.threshold != "none"

    def calibrate(self, predictions):
        """Fit the temperature, then the threshold on the scores that it gives."""
        scores = predictions["scores"]
        label = predictions["label"]
        if self.options.calibrate == "temperature":
            temperature = calibration.temperature(scores, label)
            self.state = {**self.state, "temperature": temperature}
            scores = scores / np.float32(temperature)
        if self.options.threshold != "none":
            probability = calibration.softmax(scores)[:, 1]
            goal = self.options.threshold
            threshold = calibration.best_threshold(probability, label == 1, goal)
            self.state = {**self.state, "threshold": threshold}

    def output_columns(self, predictions, raw_rows):
        """Return ``prediction``, its ``probability`` and all ``probabilities`` (n, C).

        The prediction is the name of the likeliest label, or of the one that the threshold decides.
        Probabilities are in the order of the bundle's labels.
        """
        names = np.array(self.state["labels"], dtype=object)
        scores = predictions["scores"]
        probabilities = calibration.softmax(scores)
        if "threshold" in self.state:
            predicted = probabilities[:, 1] >= self.state["threshold"]
        else:
            predicted = scores.argmax(1)
        numbers = np.asarray(predicted, dtype=np.int64)
        return {
            "prediction": names[numbers],
            "probability": probabilities[np.arange(len(numbers)), numbers].astype(np.float32),
            "probabilities": probabilities.astype(np.float32),
        }


# ---------------------------------------------------------------- labels


def _plain(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return the values themselves of a column that is stored as a dictionary (categorical), texts
    where it has bytes, and null for NaN, which files of pandas have where a label is missing.

    Raises:
        ValueError: bytes that are not UTF-8.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = arrow_lists.nan_as_null(column)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        raise ValueError(
            f"column {name}: its labels are bytes that are not UTF-8 text; convert the file (from "
            "Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def _refuse_nulls(column: pa.ChunkedArray, name: str) -> None:
    """Raise ValueError where a row has no label (null), with how many and what to do."""
    if not column.null_count:
        return
    values = [str(value) for value in pc.unique(column.drop_null()).to_pylist()]
    advice = "write their labels"
    if values:
        more = ["..."] if len(values) > SHOWN_LABELS else []
        shown = ", ".join([*sorted(values)[:SHOWN_LABELS], *more])
        advice += (
            f", or leave these rows out: data.where: {{{name}: [{shown}]}} keeps the rows that "
            "have one"
        )
    raise ValueError(
        f"column {name}: {column.null_count} of {len(column)} rows have no label (null); {advice}"
    )


def _label_names(
    table: pa.Table,
    columns: dict[str, str],
    values: list[Any],
) -> list[str]:
    """Return the name of each value, unique: heads are carried over by name.

    Where several labels have one name (ImageNet has two cranes), the value is added to it. A null
    is not a name.

    Raises:
        ValueError: a label has several names, or none.
    """
    label = columns["label"]
    label_name = columns["label_name"]
    names_of: dict[Any, list[str]] = {}
    for pair in table.group_by([label, label_name]).aggregate([]).to_pylist():
        if pair[label_name] is not None:
            names_of.setdefault(pair[label], []).append(str(pair[label_name]))
    several = {value: names for value, names in names_of.items() if len(names) > 1}
    if several:
        raise ValueError(f"column {label_name}: one label has several names: {several}")
    nameless = [value for value in values if value not in names_of]
    if nameless:
        raise ValueError(
            f"column {label_name}: no row names label {nameless[0]!r} (all are null): write its "
            "name, or leave label_name out of columns"
        )
    names = [names_of[value][0] for value in values]
    count = Counter(names)
    pairs = zip(names, values, strict=True)
    return [name if count[name] == 1 else f"{name} ({value})" for name, value in pairs]


def _are_sentences(labels: Sequence[str]) -> bool:
    """Return whether labels look like texts: more than 20, of four words or more on average."""
    return len(labels) > 20 and sum(len(one.split()) for one in labels) >= 4 * len(labels)


def _order(values: list[Any], names: list[str], options: ClassificationOptions) -> list[int]:
    """Return the indices of the values in class order.

    Raises:
        ValueError: the positive class is not there, or an option for two classes has more.
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
    wanted = str(options.positive)
    matching = [k for k in (0, 1) if wanted in (str(values[k]), names[k])]
    if len(matching) != 1:
        raise ValueError(
            f"option positive of classification: {options.positive!r} is not one of the classes "
            f"{', '.join(names)}"
        )
    return [1 - matching[0], matching[0]]


# ---------------------------------------------------------------- mixing


@eager
def mixed(batch: Batch, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each image with a partner's, by mixup or cutmix.

    All of it follows from the rows' keys and shards, so it is the same at any number of ranks.

    Returns:
        (B,) int64 partner of each row, (B,) float32 share of the row itself, and the mixed
        ``image`` (B, C, H, W).

    Raises:
        ValueError: rows without images, or no row has a partner.
    """
    if "image" not in batch.data:
        raise ValueError(
            "options mixup and cutmix of classification mix images, and these rows hold "
            f"{', '.join(sorted(batch.data))}; leave them out"
        )
    # a row that could not be decoded is left out of its batch, and may leave one other row alone
    if batch.shards is not None and len(np.unique(batch.shards)) == len(batch) > 1:
        raise ValueError(
            "options mixup and cutmix of classification pair rows of one canonical shard, and "
            f"these {len(batch)} rows lie in as many shards: leave train.canonical_shards out, or "
            "raise train.global_batch and micro_batch to two rows or more for each shard"
        )
    image = batch["image"]
    keys = batch.keys
    other = batch.partners().to(image.device)
    coin = uniform(keys, 1, CUT)[:, 0]
    centre = uniform(keys, 3, CUT)[:, 1:]
    if mixup and cutmix:
        is_cut = coin < 0.5
    else:
        is_cut = torch.full_like(coin, bool(cutmix), dtype=torch.bool)
    share = torch.where(is_cut, beta(keys, cutmix or 1.0), beta(keys, mixup or 1.0))
    height, width = image.shape[-2:]
    patch = _patch(share, centre, height, width).float()
    share_outside = 1 - patch.mean((1, 2))
    share = torch.where(is_cut, share_outside, share)
    weight = torch.where(is_cut[:, None, None], 1 - patch, share[:, None, None])
    weight = weight[:, None].to(image.dtype)
    images = weight * image + (1 - weight) * image[other]
    return other, share, images


def beta(keys: Tensor, alpha: float) -> Tensor:
    """Return (B,) float32 samples of Beta(alpha, alpha), 0 < alpha <= 1, by (B,) keys.

    The first of 32 tries that is accepted (Joehnk, Metrika 8, 1964), in logarithms, as
    U ** (1 / alpha) is 0 in float32 for a small alpha. At worst (alpha 1) a try is accepted half
    of the time, so none is once in 4e9 rows.
    """
    u = uniform(keys, 2 * _TRIES, BETA).clamp(min=2.0**-25)
    u = u.log() / alpha
    a = u[:, :_TRIES]
    b = u[:, _TRIES:]
    is_accepted = torch.logaddexp(a, b) <= 0
    first = is_accepted.int().argmax(1, keepdim=True)
    samples = torch.sigmoid(a - b)
    return samples.gather(1, first)[:, 0]


def _patch(share: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """Return (B, height, width) bool: the part that comes from the partner.

    Its sides are sqrt(1 - share) of the image's, around a centre anywhere in it.

    Args:
        share: (B,) of the row itself.
        centre: (B, 2) from 0 to 1.
    """
    side = (1 - share).clamp(min=0).sqrt()

    def inside(pixels: int, middle: Tensor) -> Tensor:
        """Return (B, pixels), rounded as the authors' code does."""
        middle = (middle * pixels).floor()[:, None]
        length = (side * pixels).floor()
        half = (length / 2).floor()[:, None]
        along = torch.arange(pixels, device=share.device)[None]
        return (along >= middle - half) & (along < middle + half)

    rows = inside(height, centre[:, 0])
    columns = inside(width, centre[:, 1])
    return rows[:, :, None] & columns[:, None, :]
