"""Multi-label classification: any number of labels a row, of whatever a backbone pools.

For example the findings of an X-ray. Shapes: B rows of a batch, n rows of a table, L labels.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import ClassHeadOptions, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list
from pipeline.core.contracts import Arrays, Backbone, Batch
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.metrics import calibration
from pipeline.core.nn import losses
from pipeline.core.nn.linear_head import PooledHead, head_inputs


class MultilabelOptions(ClassHeadOptions):
    separator: str = Field(
        "|",
        min_length=1,
        description="what separates the labels of a row, if the column has texts (ChestX-ray14's "
        "A|B) and not lists",
    )
    labels: list[str] | None = Field(
        None, description="the labels in their order; none: those of the training rows, sorted"
    )
    min_positives: int = Field(
        1,
        ge=1,
        description="a label counts in macro averages if so many test rows have it; the same for "
        "validation rows, but if no label has so many of them, labels with at least one count",
    )
    pos_weight: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: in training a positive of a label has the weight negatives / "
        "positives, counted over all training rows; the evaluated loss is not weighted",
    )

    @property
    def balances_labels(self) -> bool:
        return self.pos_weight != "none"


class MultilabelState(TypedDict):
    """State of `Multilabel`."""

    labels: list[str]
    """Names of the labels, in the order of the scores."""
    separator: str
    """Option ``separator``."""
    positives: list[int]
    """Training rows that have each label."""
    rows: int
    """Training rows."""
    temperature: NotRequired[float]
    """Set by calibration; absent before."""


@register("objective", "multilabel", options=MultilabelOptions)
class Multilabel(PooledHead):
    """Multi-label classification: a linear head on the pooled features, one logit per label.

    Use it where a row may have several labels or none, such as findings or diagnoses; each
    label is its own yes or no (binary relevance, Boutell et al. 2004). Where each row has one
    class, take ``classification``.

    Binary cross entropy, summed over rows and averaged over labels.

    The ``labels`` column holds lists of texts or integers, or texts with a separator. A null, an
    empty list or an empty text is a row without labels.
    """

    state: MultilabelState
    roles = ("labels",)
    metrics = ("macro_auroc", "macro_average_precision", "macro_f1", "micro_f1", "loss")
    transformers_head = TransformersHead(
        "ForSequenceClassification",
        problem_type="multi_label_classification",
        linear_on="pooled",
    )
    null_label_means = "a row without any label"
    label_tensors = ("labels",)
    class_tensor = "labels"
    head_options = ("norm",)
    label_kind = "label_sets"
    label_tensor = "labels"
    output_types = {
        "prediction": pa.list_(pa.string()),
        "probability": pa.list_(pa.float32()),
    }

    @classmethod
    def fit(cls, options, table, columns) -> MultilabelState:
        """Take the labels of the training rows, or those that option ``labels`` names.

        Raises:
            ValueError: no training row has a label, or one has a label that is not named.
        """
        name = columns["labels"]
        of_rows, _ = _entries(table[name], name, options.separator)
        labels = options.labels or sorted(pc.unique(of_rows).to_pylist())
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"option labels of multilabel: {twice} occur twice")
        if not labels:
            raise ValueError(f"column {name}: none of {len(table)} training rows has a label")
        state: MultilabelState = {
            "labels": labels,
            "separator": options.separator,
            "positives": [],
            "rows": len(table),
        }
        state["positives"] = _positives(table, columns, state).tolist()
        return state

    @classmethod
    def encode(cls, table, columns, state: MultilabelState) -> Arrays:
        """Return ``labels`` (n, L) uint8."""
        if columns.get("labels") not in table.column_names:  # new rows to predict
            return {}
        labels = np.zeros((len(table), len(state["labels"])), dtype=np.uint8)
        labels[_places(table, columns, state)] = 1
        return {"labels": labels}

    @classmethod
    def check_test(cls, options, table, columns, state: MultilabelState):
        """Some label must have ``min_positives`` rows with it, and one without."""
        positives = _positives(table, columns, state)
        is_scored = (positives >= options.min_positives) & (positives < len(table))
        if not is_scored.any():
            raise ValueError(
                f"none of {len(positives)} labels has {options.min_positives} positive rows and a "
                f"negative one among these {len(table)} (at most {int(positives.max(initial=0))} "
                "positive): lower min_positives, or give this split more rows"
            )

    def __init__(self, backbone: Backbone, options: MultilabelOptions, state: MultilabelState):
        super().__init__(backbone, options, state)
        self.head = nn.Linear(backbone.pooled_dim, len(state["labels"]))

    def scores(self, pooled: Tensor) -> Tensor:
        """Return logits (B, L) of pooled features (B, D)."""
        inputs = head_inputs(pooled, self.options, self.training)
        return losses.at_least_float32(self.head(inputs))

    def _pos_weight(self, device: torch.device) -> Tensor | None:
        """Return (L,) negatives a positive. No buffer: a stack of heads shares its template's."""
        if self.options.pos_weight == "none":
            return None
        rows = self.state["rows"]
        weights = [(rows - positives) / max(positives, 1) for positives in self.state["positives"]]
        return torch.tensor(weights, device=device)

    @property
    def needs_calibration(self) -> bool:
        return self.options.calibrate != "none"

    def calibrate(self, predictions):
        """Fit the temperature."""
        temperature = calibration.temperature(predictions["scores"], predictions["labels"])
        self.state = {**self.state, "temperature": temperature}

    def head_loss(self, features: Tensor, batch: Batch):
        scores = self.scores(features)
        labels = batch["labels"].to(scores.dtype)
        gamma = self.options.focal if self.training else 0.0
        weight = self._pos_weight(scores.device)
        row_losses = losses.binary_cross_entropies(scores, labels, weight, gamma)
        count = torch.full((), float(labels.shape[0]), device=labels.device)
        return row_losses.mean(-1).sum(), count, {}

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``scores`` (B, L), and with labels ``labels``, ``loss`` and ``min_positives``."""
        return self._calibrated(scores, batch.data.get("labels"))

    def average(self, predictions):
        """Return the mean of the probabilities, as scores (Lakshminarayanan et al. 2017)."""
        scores = torch.stack([one["scores"] for one in predictions])
        yes, no = (F.logsigmoid(sign * scores).logsumexp(0) for sign in (1, -1))
        return self._calibrated(yes - no, predictions[0].get("labels"))

    def _calibrated(self, scores: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        scores = scores / self.state.get("temperature", 1.0)
        if labels is None:
            return {"scores": scores}
        rows = len(labels)
        row_losses = F.binary_cross_entropy_with_logits(scores, labels.float(), reduction="none")
        least = self.options.min_positives
        return {
            "scores": scores,
            "labels": labels,
            "loss": row_losses.mean(-1),
            "min_positives": torch.full((rows,), least, dtype=torch.int32, device=labels.device),
        }

    def raw_outputs(self, backbone, batch):
        """`scores` (B, L): one for each of `labels`. Their sigmoid are the probabilities."""
        return {"scores": self.logits(backbone, batch)}

    def output_columns(self, predictions, raw_rows):
        """Return ``prediction``, names of the labels above 0.5, and how probable they are.

        ``probability`` has a number for each of these names, ``probabilities`` (n, L) for all
        labels.
        """
        probabilities = torch.from_numpy(predictions["scores"]).sigmoid().numpy()
        names = np.array(self.state["labels"], dtype=object)
        predicted = np.empty(len(probabilities), dtype=object)
        of_predicted = np.empty(len(probabilities), dtype=object)
        for row, of_labels in enumerate(probabilities):
            is_predicted = of_labels > 0.5
            predicted[row] = names[is_predicted].tolist()
            of_predicted[row] = of_labels[is_predicted].tolist()
        return {
            "prediction": predicted,
            "probability": of_predicted,
            "probabilities": probabilities,
        }


# ---------------------------------------------------------------- rows


def _places(
    table: pa.Table, columns: dict[str, str], state: MultilabelState
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the label number of every label of every row.

    Raises:
        ValueError: a label that is not known.
    """
    name = columns["labels"]
    entries, rows = _entries(table[name], name, state["separator"])
    known = pa.array(state["labels"], pa.string())
    places = pc.index_in(entries, value_set=known)
    if places.null_count:
        value = entries.filter(pc.is_null(places))[0].as_py()
        raise ValueError(
            f"column {name}: label {value!r} is not one of the {len(known)} known ones (those of "
            f"the training rows, or option labels); {nearest(value, state['labels'])}"
        )
    return rows, places.to_numpy().astype(np.int64)


def _positives(table: pa.Table, columns: dict[str, str], state: MultilabelState) -> np.ndarray:
    """Return (L,) rows that have each label; one that a row has twice counts once."""
    rows, places = _places(table, columns, state)
    count = len(state["labels"])
    return np.bincount(np.unique(rows * count + places) % count, minlength=count)


def _entries(column: pa.ChunkedArray, name: str, separator: str) -> tuple[pa.Array, np.ndarray]:
    """Return (m,) texts, every label of every row, and (m,) the rows that they belong to.

    Raises:
        ValueError: a column of another type, or a null inside a list.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_null(kind):
        return pa.array([], pa.string()), np.zeros(0, dtype=np.int64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.split_pattern(column, separator)
    elif not is_list(kind):
        raise ValueError(
            f"column {name} holds {kind}: labels are lists of texts or integers, or texts such as "
            f"'A{separator}B'"
        )
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    rows = pc.list_parent_indices(array)
    flat = pc.list_flatten(array)
    if pa.types.is_dictionary(flat.type):
        flat = flat.cast(flat.type.value_type)
    is_label = (
        pa.types.is_integer,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_null,
    )
    if not any(fits(flat.type) for fits in is_label):
        raise ValueError(f"column {name} holds lists of {flat.type}: labels are texts or integers")
    if flat.null_count:
        raise ValueError(
            f"column {name}: {flat.null_count} labels inside its lists are null; a row without "
            "labels is an empty list"
        )
    texts = pc.utf8_trim_whitespace(flat.cast(pa.string()))
    real = pc.not_equal(texts, "")
    return texts.filter(real), rows.filter(real).to_numpy().astype(np.int64)
