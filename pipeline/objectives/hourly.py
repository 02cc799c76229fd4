"""Predictions at many times of a row: patient monitoring, evaluated every hour.

For example decompensation and the remaining length of stay. Shapes: B rows of a batch, n rows of
a table, N tokens, M label times of a row, C classes.
"""

from __future__ import annotations

import math
from typing import Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import ClassHeadOptions, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import floats, is_list, is_number, joined, lengths
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.core.metrics import calibration
from pipeline.core.nn import losses
from pipeline.core.nn.linear_head import head_inputs
from pipeline.core.ragged import ragged


class HourlyOptions(ClassHeadOptions):
    task: Literal["binary", "multiclass"] = Field(
        "binary",
        description="binary: label_values are 0 or 1 (false or true); multiclass: whole numbers "
        "from 0",
    )
    classes: int = Field(
        2,
        ge=2,
        le=1000,
        description="how many classes a multiclass task has (10 buckets of remaining stay)",
    )
    class_weight: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: in training a label has the weight labels / (classes x labels of "
        "its class), counted over all training rows; the evaluated loss is not weighted",
    )
    every: float = Field(
        1.0,
        gt=0,
        description="hours between the times at which onetomany predict evaluates new rows, up to "
        "their last event",
    )


class HourlyState(TypedDict):
    """State of `Hourly`."""

    labels: list[str]
    """Class names."""
    counts: list[int]
    """Training labels of each class."""
    last_label: NotRequired[float]
    """Hour of the last training label, until `bind_to_backbone` has compared it with ``hours``: no
    bundle has it, since it may tell of one patient."""
    hours: NotRequired[float]
    """The last hour of which the backbone reads events; absent: all hours."""
    temperature: NotRequired[float]
    """Set by calibration; absent before."""


@register("objective", "hourly", options=HourlyOptions)
class Hourly(Objective):
    """Labels of each hour: a linear head on a causal backbone's tokens, read at the label's time.

    Use it where a row has a label for each hour, such as the risk of dying within a day. It
    needs a causal backbone (``events/gru``).

    The label at time t is predicted from the last token that holds events and ends at t or before,
    and from log(1 + hours since then). Before the first such token a learned start vector takes its
    place. Tokens without events are not used, because the place where a row's tokens end would
    reveal when its last event is. So no prediction at t uses anything from after t (Harutyunyan et
    al. 2019, decompensation and length of stay). Label times after the hour up to which events are
    read are refused.

    Columns: ``label_times``, a list of hours since the row's start, ascending, and
    ``label_values``, a list as long. The backbone gives ``tokens``, in ``stages["times"]`` (B, N)
    float32 the hour at which each token's information ends, ascending, and in
    ``stages["charted"]`` (B, N) bool which of them hold events. The loss is the cross entropy
    summed over labels. Predictions are padded to (B, M): ``label`` -1 and ``times`` NaN behind a
    row's last one.
    """

    state: HourlyState
    roles = ("label_times", "label_values")
    metrics = ("auroc", "auprc", "loss", "min_precision_sensitivity", "brier", "ece")
    log_names = ("accuracy",)
    position_labels = ("classes",)
    label_kind = "position_classes"
    label_tensor = "label_values"
    position_features = ("tokens", "stages")
    output_types = {
        "times": pa.list_(pa.float32()),
        "prediction": pa.list_(pa.int32()),
        "probabilities": pa.list_(pa.list_(pa.float32())),
    }

    @classmethod
    def target_metrics(cls, options, state: HourlyState):
        if options.task == "binary":
            return cls.metrics
        return ("kappa", "macro_f1", "accuracy", "loss")

    @classmethod
    def fit(cls, options, table, columns) -> HourlyState:
        """Count the labels of each class.

        Raises:
            ValueError: the task contradicts its classes, or no training row has a label.
        """
        if options.task == "binary" and options.classes != 2:
            raise ValueError(
                f"option classes of hourly: a binary task has 2 classes, not {options.classes}; "
                "set task: multiclass, or leave classes out"
            )
        labels = [str(k) for k in range(options.classes)]
        unfitted: HourlyState = {"labels": labels, "counts": []}
        values = cls._numbers("label_values", table, columns, unfitted).astype(np.int64)
        if not len(values):
            raise ValueError(
                f"columns {columns['label_times']} and {columns['label_values']}: none of "
                f"{len(table)} training rows has a label"
            )
        counts = np.bincount(values, minlength=options.classes).tolist()
        last = float(cls._numbers("label_times", table, columns, unfitted).max())
        return {"labels": labels, "counts": counts, "last_label": last}

    @classmethod
    def _numbers(
        cls, role: str, table: pa.Table, columns: dict[str, str], state: HourlyState
    ) -> np.ndarray:
        """Return (m,) float64, all label times or values of the rows that can be used."""
        name = columns[role]
        kept = table[name].filter(pa.array(cls._is_valid(table, columns, state)))
        return _lists(kept, name)[0]

    @classmethod
    def _is_valid(cls, table: pa.Table, columns: dict[str, str], state: HourlyState) -> np.ndarray:
        """Return (n,) bool, rows whose labels can be used."""
        reasons = cls.invalid_label_reasons(table, columns, state)
        return np.array([not reason for reason in reasons], dtype=bool)

    @classmethod
    def encode(cls, table, columns, state: HourlyState) -> Arrays:
        """Return ``label_times`` and ``label_values``, (n,) ragged float32 and int16.

        Rows whose labels cannot be used have none.
        """
        if columns.get("label_values") not in table.column_names:  # new rows to predict
            return {}
        is_valid = cls._is_valid(table, columns, state)
        name = columns["label_times"]
        last_hour = state.get("hours", np.inf)
        late = (_lists(table[name], name)[0] > last_hour).sum()
        if late:
            raise ValueError(f"column {name}: {late} {_beyond(last_hour)}")
        arrays: Arrays = {}
        for role, kind in (("label_times", np.float32), ("label_values", np.int16)):
            flat, counts = _lists(table[columns[role]], columns[role])
            lists = np.split(flat, np.cumsum(counts)[:-1])[: len(table)]
            nothing = np.zeros(0, kind)
            arrays[role] = ragged(
                values.astype(kind) if valid else nothing
                for values, valid in zip(lists, is_valid, strict=True)
            )
        return arrays

    @classmethod
    def bind_to_backbone(cls, state: HourlyState, backbone) -> HourlyState:
        """Replace ``last_label`` by ``hours``, up to which events are read.

        Raises ValueError for training labels after that hour.
        """
        hours = backbone.arch.inputs.get("hours")
        bound: HourlyState = {**state}
        bound.pop("last_label", None)
        if hours is None:
            return bound
        if state.get("last_label", -np.inf) > hours:
            raise ValueError(f"role label_times: some of the training rows' {_beyond(hours)}")
        return {**bound, "hours": hours}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: HourlyState):
        """Name rows with values that are not classes, or times that do not ascend.

        And rows with more times than values, or fewer. Reasons show no value of a patient.
        """
        if columns.get("label_values") not in table.column_names:
            return [""] * len(table)
        times_name = columns["label_times"]
        values_name = columns["label_values"]
        times, num_times = _lists(table[times_name], times_name)
        values, num_values = _lists(table[values_name], values_name)
        row_of_time = np.repeat(np.arange(len(table)), num_times)
        row_of_value = np.repeat(np.arange(len(table)), num_values)
        ascends = np.ones(len(times), dtype=bool)
        is_later = times[1:] >= times[:-1]
        is_new_row = row_of_time[1:] != row_of_time[:-1]
        ascends[1:] = is_later | is_new_row
        num_classes = len(state["labels"])
        is_class = np.isin(values, np.arange(num_classes))
        reasons = np.full(len(table), "", dtype=object)
        reasons[row_of_value[~is_class]] = (
            f"a value of {values_name} is not a class from 0 to {num_classes - 1}"
        )
        reasons[row_of_time[~ascends]] = f"{times_name} do not ascend"
        reasons[row_of_time[~np.isfinite(times)]] = f"a time of {times_name} is not a number"
        reasons[num_times != num_values] = f"{times_name} and {values_name} are not equally many"
        return reasons.tolist()

    @classmethod
    def check_test(cls, options, table, columns, state: HourlyState):
        """Labels of two classes are needed."""
        if len(np.unique(cls._numbers("label_values", table, columns, state))) < 2:
            raise ValueError(
                f"column {columns['label_values']}: these {len(table)} rows hold labels of one "
                "class only, so they cannot be distinguished: give this split more rows"
            )

    def __init__(self, backbone: Backbone, options: HourlyOptions, state: HourlyState):
        """Raise ValueError for a backbone that is not causal, or gives no tokens."""
        super().__init__(backbone, options, state)
        if backbone.token_dim is None or not backbone.causal:
            raise ValueError(
                f"{backbone.arch.name} is not causal: a prediction at an hour would see what "
                "comes after it; hourly needs a backbone of events that reads them in one "
                "direction, with tokens (see its option causal)"
            )
        self.head = nn.Linear(backbone.token_dim + 1, len(state["labels"]))
        self.start = nn.Parameter(torch.randn(backbone.token_dim) * 0.02)

    # ---------------------------------------------------------------- scores

    def _scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scores (B, M, C), times (B, M) and which of them are real (B, M).

        And a zero that every parameter of the backbone contributes to.
        """
        features = backbone(batch, want=("tokens", "stages"))
        if features.tokens is None or "times" not in features.stages:
            raise ValueError(
                f"{backbone.arch.name} does not tell when its tokens end "
                '(stages["times"]): hourly needs a backbone of events'
            )
        read, log_age, times, is_time = self._read(features, batch)
        unused = features.pooled.float().sum() * 0.0
        return self._head_scores(read, log_age), times, is_time, unused

    def _head_scores(self, read: Tensor, log_age: Tensor) -> Tensor:
        """Return scores (B, M, C) of tokens (B, M, D) and of time (B, M, 1)."""
        read = head_inputs(read, self.options, self.training)
        inputs = torch.cat([read, log_age.to(read.dtype)], dim=-1)
        return self.head(inputs).float()

    def _read(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the head reads of tokens (B, M, D) and of time (B, M, 1), and `_times`."""
        tokens, ends = features.tokens, features.stages["times"]
        assert tokens is not None
        real = features.mask
        if real is None:
            real = torch.ones(ends.shape, dtype=torch.bool, device=ends.device)
        times, is_time = self._times(batch, ends, real)
        ends = ends.masked_fill(~real, torch.inf).contiguous()

        # position 0 is the start vector, position k + 1 is token k
        has_events = features.stages.get("charted", real) & real
        has_events = F.pad(has_events, (1, 0), value=True)
        positions = torch.arange(has_events.shape[1], device=ends.device)
        if torch.compiler.is_exporting():  # ONNX has neither searchsorted nor cummax
            can_be_read = (ends[:, None] <= times[:, :, None]) & has_events[:, None, 1:]
            position = torch.where(can_be_read, positions[1:], 0).amax(2)
        else:
            last_with_events = torch.where(has_events, positions, 0).cummax(1).values
            ended = torch.searchsorted(ends, times.contiguous(), right=True)
            position = last_with_events.gather(1, ended)
        end_of_token = F.pad(ends, (1, 0)).gather(1, position)
        age = (times - end_of_token).clamp(min=0)
        log_age = age.log1p()[..., None]

        start = self.start.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        tokens = torch.cat([start, tokens], dim=1)
        index = position[..., None].expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, index), log_age, times, is_time

    def labelled_positions(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (m, D) tokens that labels are read from, (m,) their classes, and (m,) their rows.

        Rows are places in the batch.
        """
        read, _, _, is_time = self._read(features, batch)
        labels = batch["label_values"].long()[is_time]
        return read[is_time].float(), labels, is_time.nonzero()[:, 0]

    def _times(self, batch: Batch, ends: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times (B, M) to predict at, and which of them are real (B, M).

        The labels' times; for new rows every so many hours, up to the first at which a row's last
        token has ended.
        """
        if "label_times" in batch.data:
            times = batch["label_times"].to(ends)
            positions = torch.arange(times.shape[1], device=ends.device)
            lengths = batch["label_times_lengths"][:, None]
            return times, positions < lengths
        every = self.options.every
        # a column of its own, since a batch may have no tokens
        real_ends = ends.masked_fill(~real, -torch.inf)
        last = F.pad(real_ends, (0, 1), value=-torch.inf).amax(1)
        count = (last / every).ceil().clamp(min=1)
        most = int(count.max().item())
        numbers = torch.arange(1, most + 1, device=ends.device, dtype=ends.dtype)
        hours = every * numbers
        times = hours.expand(len(ends), -1)
        last_hours = (every * count)[:, None]
        return times, times <= last_hours

    def loss(self, backbone: Backbone, batch: Batch):
        scores, _, is_time, unused = self._scores(backbone, batch)
        scores = scores[is_time]
        label = batch["label_values"].long()[is_time]
        weight = None
        gamma = 0.0
        if self.training:
            gamma = self.options.focal
            if self.options.class_weight != "none":
                weight = losses.balanced_class_weights(self.state["counts"], scores.device)
        row_losses = losses.cross_entropies(scores, label, weight, gamma)
        count = torch.full((), float(len(label)), device=scores.device)
        hits = scores.argmax(-1) == label
        return row_losses.sum() + unused, count, {"accuracy": hits.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``scores`` (B, M, C) and ``times`` (B, M).

        With labels ``label`` (B, M) int64, ``loss``, a sum, and its ``count`` (B,).
        """
        scores, times, is_time, _ = self._scores(backbone, batch)
        times = torch.where(is_time, times, torch.nan)
        if "label_values" not in batch.data:
            return {"scores": scores / self.state.get("temperature", 1.0), "times": times}
        label = torch.where(is_time, batch["label_values"].long(), -1)
        return {**self._compare(scores, label), "times": times}

    def raw_outputs(self, backbone, batch):
        """`scores` (B, M, C): one for each of `labels` at each of M times. Their softmax are the
        probabilities. The times are `every` (of `objective_options`) hours, twice and three times
        as many and so on, up to `hours` of `objective_state`. After a row's last event a
        prediction sees nothing newer than that.
        """
        hours, every = self.state.get("hours"), self.options.every
        if hours is None:
            raise ValueError(
                f"{backbone.arch.name} does not say up to which hour it reads events, so a graph "
                "of tensors has no times to predict at. Take --kind bundle"
            )
        features = backbone(batch, want=("tokens", "stages"))
        ends = features.stages["times"]
        count = max(1, math.ceil(hours / every))
        times = every * torch.arange(1, count + 1, device=ends.device, dtype=ends.dtype)
        rows = ends.shape[0]
        lengths = torch.full((rows,), count, device=ends.device)
        asked = batch.replace(label_times=times.expand(rows, -1), label_times_lengths=lengths)
        read, log_age, _, _ = self._read(features, asked)
        return {"scores": self._head_scores(read, log_age) / self.state.get("temperature", 1.0)}

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what `predict` does, without the times, of logits (B, M, C)."""
        return self._compare(scores, batch["label_values"].long())

    def _compare(self, scores: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return scores, labels and losses; ``label`` (B, M) is -1 where there is none."""
        scores = scores / self.state.get("temperature", 1.0)
        row_losses = F.cross_entropy(
            scores.flatten(0, 1), label.flatten(), reduction="none", ignore_index=-1
        )
        return {
            "scores": scores,
            "label": label,
            "loss": row_losses.view(label.shape).sum(1),
            "count": (label >= 0).sum(1).float(),
        }

    @property
    def needs_calibration(self) -> bool:
        return self.options.calibrate != "none"

    def calibrate(self, predictions):
        """Fit the temperature."""
        is_time = predictions["label"] >= 0
        scores = predictions["scores"][is_time]
        label = predictions["label"][is_time]
        self.state = {**self.state, "temperature": calibration.temperature(scores, label)}

    def output_columns(self, predictions, raw_rows):
        """Return lists, one entry a time.

        ``times`` in hours, ``prediction`` (the likeliest class) and ``probabilities`` (of each).
        """
        probabilities = calibration.softmax(predictions["scores"]).astype(np.float32)
        is_time = np.isfinite(predictions["times"])
        padded = {
            "times": predictions["times"],
            "prediction": probabilities.argmax(-1),
            "probabilities": probabilities,
        }
        columns = {}
        for name, array in padded.items():
            columns[name] = np.empty(len(is_time), dtype=object)
            for row, real in enumerate(is_time):
                columns[name][row] = array[row][real].tolist()
        return columns


def _beyond(hours: float) -> str:
    """Return what is wrong with label times after the last hour that is read."""
    return (
        f"times lie after hour {hours:g}, up to which events are read, so they would be predicted "
        "from old events: raise hours in data.modality ({events: {hours: ...}})"
    )


def _lists(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (m,) float64, the numbers of all rows one after the other, and (n,) their lengths.

    A null is NaN.

    Raises:
        ValueError: a column of another type.
    """
    array = joined(column)
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.float64()))
    inner = array.type.value_type if is_list(array.type) else None
    if inner is None or not (is_number(inner) or pa.types.is_boolean(inner)):
        raise ValueError(f"column {name} holds {column.type}: hourly reads a list of numbers a row")
    counts = np.maximum(lengths(array), 0).astype(np.int64)
    return floats(pc.list_flatten(array), np.float64), counts
