"""Predictions at many times of a row: patient monitoring (decompensation, remaining length of
stay), judged every hour.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.ragged import ragged
from pipeline.metrics import calibration
from pipeline.nn import losses as imbalance

MOST_CLASSES = 1000


class HourlyOptions(Options):
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
        description="balanced: in training a label weighs labels / (classes x labels of its "
        "class), "
        "counted over all training rows; the evaluated loss is not weighted",
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
    every: float = Field(
        1.0,
        gt=0,
        description="hours between the times at which onetomany predict judges new rows, up to "
        "their last event",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(
        True,
        description="layer norm without parameters before the linear layer, so that one learning "
        "rate fits every backbone",
    )


@register("objective", "hourly", options=HourlyOptions)
class Hourly(Objective):
    """A linear head on a causal backbone's tokens: the label at time t is told from the last token
    that holds events and whose information ends at t or before, and before the first one from a
    learned start vector, beside log(1 + hours since then). That a row's tokens end with its last
    event tells nothing: tokens without events are passed over. So nothing from after t reaches a
    prediction at t (Harutyunyan et al. 2019, decompensation and length of stay). Label times after
    the hour up to which events are read are refused.

    Columns: ``label_times``, a list of hours since the row's start, ascending, and
    ``label_values``, a list as long. The backbone gives ``tokens``, in ``stages["times"]`` (B, N)
    float32 the hour at which each token's information ends, ascending, and in ``stages["charted"]``
    (B, N) bool which of them hold events. The loss is the cross entropy summed over labels.
    Predictions are padded to (B, M): ``label`` -1 and ``times`` NaN behind a row's last one. State:
    ``labels`` (class names), ``counts`` (training labels) and ``hours`` (up to which events are
    read).
    """

    roles = ("label_times", "label_values")
    metrics = ("auroc", "auprc", "loss", "min_precision_sensitivity", "brier", "ece")
    log_names = ("accuracy",)
    label_tensors = ("label_times", "label_values", "label_times_lengths")
    output_types = {
        "times": pa.list_(pa.float32()),
        "prediction": pa.list_(pa.int32()),
        "probabilities": pa.list_(pa.list_(pa.float32())),
    }

    @classmethod
    def target_metrics(cls, options, state):
        return (
            cls.metrics if options.task == "binary" else ("kappa", "macro_f1", "accuracy", "loss")
        )

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError where the task and its classes contradict, or no training row has a
        label.
        """
        if options.task == "binary" and options.classes != 2:
            raise ValueError(
                "option classes of hourly: a binary task has 2 classes, not "
                f"{options.classes}; say task: multiclass, or leave classes out"
            )
        state = {"labels": [str(k) for k in range(options.classes)]}
        values = cls._values(table, columns, state)
        if not len(values):
            raise ValueError(
                f"columns {columns['label_times']} and {columns['label_values']}: none of "
                f"{len(table)} training rows has a label"
            )
        return {**state, "counts": np.bincount(values, minlength=options.classes).tolist()}

    @classmethod
    def _values(cls, table: pa.Table, columns: dict[str, str], state: dict[str, Any]) -> np.ndarray:
        """(m,) int64, every label of the rows that can be used."""
        fine = np.array(
            [not reason for reason in cls.invalid_label_reasons(table, columns, state)], dtype=bool
        )
        return _lists(
            table[columns["label_values"]].filter(pa.array(fine)), columns["label_values"]
        )[0].astype(np.int64)

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """``label_times`` and ``label_values``: (n,) ragged float32 and int16; none for rows that
        ``invalid_label_reasons`` names.
        """
        if columns.get("label_values") not in table.column_names:  # new rows to predict
            return {}
        fine = np.array(
            [not reason for reason in cls.invalid_label_reasons(table, columns, state)], dtype=bool
        )
        late = (
            _lists(table[columns["label_times"]], columns["label_times"])[0]
            > state.get("hours", np.inf)
        ).sum()
        if late:
            raise ValueError(
                f"column {columns['label_times']}: {late} times lie after hour "
                f"{state['hours']:g}, up to which events are read: they would "
                "be judged by what is long past: raise hours in data.modality ({events: "
                "{hours: ...}})"
            )
        out: Arrays = {}
        for role, kind in (("label_times", np.float32), ("label_values", np.int16)):
            flat, lengths = _lists(table[columns[role]], columns[role])
            parts = np.split(flat, np.cumsum(lengths)[:-1])[: len(table)]
            out[role] = ragged(
                part.astype(kind) if good else np.zeros(0, kind)
                for part, good in zip(parts, fine, strict=True)
            )
        return out

    @classmethod
    def bind_to_backbone(cls, state, backbone):
        """``hours``: up to which events are read."""
        hours = backbone.arch["inputs"].get("hours")
        return state if hours is None else {**state, "hours": hours}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Rows with other times than values, with times that are no numbers or do not ascend, or
        with values that are no class. No value is told.
        """
        if columns.get("label_values") not in table.column_names:
            return [""] * len(table)
        (times, many), (values, as_many) = (
            _lists(table[columns[role]], columns[role]) for role in ("label_times", "label_values")
        )
        row, other = (np.repeat(np.arange(len(table)), lengths) for lengths in (many, as_many))
        later = np.ones(len(times), dtype=bool)
        later[1:] = (times[1:] >= times[:-1]) | (row[1:] != row[:-1])
        classes = len(state["labels"])
        reasons = np.full(len(table), "", dtype=object)
        reasons[other[~np.isin(values, np.arange(classes))]] = (
            f"a value of {columns['label_values']} is no class from 0 to {classes - 1}"
        )
        reasons[row[~later]] = f"{columns['label_times']} do not ascend"
        reasons[row[~np.isfinite(times)]] = f"a time of {columns['label_times']} is no number"
        reasons[many != as_many] = (
            f"{columns['label_times']} and {columns['label_values']} are not equally many"
        )
        return reasons.tolist()

    @classmethod
    def check_test(cls, options, table, columns, state):
        if len(np.unique(cls._values(table, columns, state))) < 2:
            raise ValueError(
                f"column {columns['label_values']}: these {len(table)} rows hold labels of one "
                "class only, so they cannot be told apart: "
                "give this split more rows"
            )

    def __init__(self, backbone: Backbone, options: HourlyOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        if backbone.token_dim is None or not backbone.causal:
            raise ValueError(
                f"{backbone.arch['name']} is not causal: a prediction at an hour would see "
                "what comes after it; hourly needs a backbone of events "
                "that reads them in one direction, with tokens (see its option causal)"
            )
        self.head = nn.Linear(backbone.token_dim + 1, len(state["labels"]))
        self.start = nn.Parameter(torch.randn(backbone.token_dim) * 0.02)

    @property
    def needs_calibration(self) -> bool:
        return self.options.calibrate != "none"

    def _scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores (B, M, C), times (B, M), which of them are there (B, M), and a nought that every
        parameter of the backbone belongs to.
        """
        features = backbone(batch, want=("tokens", "stages"))
        tokens, ends = features.tokens, features.stages.get("times")
        if tokens is None or ends is None:
            raise ValueError(
                f'{backbone.arch["name"]} does not tell when its tokens end (stages["times"]): '
                "hourly needs a backbone of events"
            )
        there = (
            features.mask
            if features.mask is not None
            else torch.ones(ends.shape, dtype=torch.bool, device=ends.device)
        )
        if "label_times" in batch.data:
            times = batch["label_times"].to(ends)
            known = (
                torch.arange(times.shape[1], device=ends.device)
                < batch["label_times_lengths"][:, None]
            )
        else:
            times, known = self._clock(ends, there)
        ends = ends.masked_fill(~there, torch.inf).contiguous()
        charted = F.pad(features.stages.get("charted", there) & there, (1, 0), value=True)
        last = (
            torch.where(charted, torch.arange(charted.shape[1], device=ends.device), 0)
            .cummax(1)
            .values
        )
        place = last.gather(1, torch.searchsorted(ends, times.contiguous(), right=True))
        age = (times - F.pad(ends, (1, 0)).gather(1, place)).clamp(min=0).log1p()
        tokens = torch.cat([self.start.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        chosen = tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))
        if self.options.norm:
            chosen = F.layer_norm(chosen, chosen.shape[-1:])
        chosen = torch.cat(
            [
                F.dropout(chosen, self.options.dropout, self.training),
                age[..., None].to(chosen.dtype),
            ],
            dim=-1,
        )
        scores = self.head(chosen).float()
        return scores, times, known, features.pooled.float().sum() * 0.0

    def _clock(self, ends: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B, M) every so many hours, up to the first at which a row's last token has ended,
        and which of them are there.
        """
        every = self.options.every
        last = (
            ends.masked_fill(~there, -torch.inf).amax(1)
            if ends.shape[1]
            else ends.new_full((len(ends),), -torch.inf)
        )
        count = (last / every).ceil().clamp(min=1)
        times = every * torch.arange(
            1, int(count.max().item()) + 1, device=ends.device, dtype=ends.dtype
        ).expand(len(ends), -1)
        return times, times <= (every * count)[:, None]

    def loss(self, backbone: Backbone, batch: Batch):
        scores, _, known, unused = self._scores(backbone, batch)
        scores, label = scores[known], batch["label_values"].long()[known]
        weighted = self.training and self.options.class_weight != "none"
        losses = imbalance.cross_entropies(
            scores,
            label,
            imbalance.balanced(self.state["counts"], scores.device) if weighted else None,
            self.options.focal if self.training else 0.0,
        )
        count = torch.full((), float(len(label)), device=scores.device)
        return losses.sum() + unused, count, {"accuracy": (scores.argmax(-1) == label).sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``scores`` (B, M, C), ``times`` (B, M); with labels ``label`` (B, M) int64, ``loss``, a
        sum, and its ``count`` (B,).
        """
        scores, times, known, _ = self._scores(backbone, batch)
        scores = scores / self.state.get("temperature", 1.0)
        out = {"scores": scores, "times": torch.where(known, times, torch.nan)}
        if "label_values" not in batch.data:
            return out
        label = torch.where(known, batch["label_values"].long(), -1)
        losses = F.cross_entropy(
            scores.flatten(0, 1), label.flatten(), reduction="none", ignore_index=-1
        ).view(label.shape)
        return {**out, "label": label, "loss": losses.sum(1), "count": known.sum(1).float()}

    def calibrate(self, found):
        if self.needs_calibration:
            known = found["label"] >= 0
            self.state = {
                **self.state,
                "temperature": calibration.temperature(
                    found["scores"][known], found["label"][known]
                ),
            }

    def output_columns(self, found, raw_rows):
        """Lists, one value a time: ``times`` in hours, ``prediction`` (the likeliest class) and
        ``probabilities`` (of each class).
        """
        chance, out = calibration.softmax(found["scores"]).astype(np.float32), {}
        fine = np.isfinite(found["times"])
        for name, array in (
            ("times", found["times"]),
            ("prediction", chance.argmax(-1)),
            ("probabilities", chance),
        ):
            out[name] = np.empty(len(fine), dtype=object)
            out[name][:] = [
                list(row[known].tolist()) for row, known in zip(array, fine, strict=True)
            ]
        return out


def _lists(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(m,) float64, the numbers of all rows one behind the other, a null as NaN, and (n,) how many
    each row has. Raises ValueError for another type.
    """
    kind = column.type
    if pa.types.is_null(kind):
        column, kind = column.cast(pa.list_(pa.float64())), pa.list_(pa.float64())
    nested = is_list(kind)
    inner = kind.value_type if nested else kind
    if not nested or not (
        pa.types.is_integer(inner)
        or pa.types.is_floating(inner)
        or pa.types.is_boolean(inner)
        or pa.types.is_null(inner)
    ):
        raise ValueError(f"column {name} holds {kind}: hourly reads a list of numbers a row")
    whole = column.cast(pa.large_list(inner)).combine_chunks()
    lengths = (
        pc.fill_null(pc.list_value_length(whole), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )  # pyright: ignore[reportAttributeAccessIssue]
    flat = pc.list_flatten(whole)
    flat = flat.cast(pa.int8()) if pa.types.is_boolean(inner) else flat
    return flat.cast(pa.float64()).to_numpy(zero_copy_only=False), lengths
