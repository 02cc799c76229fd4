"""Regular series: numbers of one or more channels at a fixed rate, such as an electrocardiogram,
the sensors of a machine or the log of a robot.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import floats, is_list, is_number, joined, lengths
from pipeline.core.capabilities import NameDifference
from pipeline.core.contracts import Arrays, Batch, Modality
from pipeline.core.inputs import SeriesInputs
from pipeline.core.ragged import lengths as lengths_of_rows
from pipeline.core.ragged import ragged
from pipeline.core.rng import uniform
from pipeline.media.deviation import divisors, rounded_mean
from pipeline.media.perceptual_hash import THUMB, PerceptualSearch
from pipeline.media.static_features import SHORT_FLOATS

CROP, SCALE, JITTER = 0, 1, 2
"""Random streams of a row's key."""
THUMB_SIZE = THUMB * THUMB
"""Numbers of a thumbnail, by which near duplicates are found."""
MAX_LEVEL = 255
"""Largest level of a number in a thumbnail."""
STEP_TOLERANCE = 0.05
"""Share by which the step of a row may differ from that of the fitted rows."""
MIN_STD_SHARE = 0.3
"""In a thumbnail a channel is divided at least by this share of the row's largest deviation."""


class SeriesOptions(Options):
    length: int = Field(
        128,
        ge=2,
        le=1 << 20,
        description="steps that the network reads; shorter rows end in missing numbers",
    )
    cut: Literal["first", "middle", "last"] = Field(
        "last", description="which steps of a longer row are read"
    )
    missing: Literal["mean", "last"] = Field(
        "mean",
        description="what replaces a missing number: mean: the mean of its channel over the steps "
        "that are read; last: the channel's last number before it, or the mean if there is none",
    )
    crop: bool = Field(
        False, description="training: the steps of a longer row are read from a random place"
    )
    scale: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="training: each channel of a row, standardised, is multiplied by a random "
        "factor, at most by this share above or below 1",
    )
    jitter: float = Field(
        0.0,
        ge=0,
        le=10,
        description="training: standard deviation of normal noise that is added to every number, "
        "in standard deviations of its channel",
    )


class SeriesState(TypedDict):
    """State of `Series`."""

    mean: list[float]
    std: list[float]
    """Mean and standard deviation of each channel."""
    names: NotRequired[list[str]]
    """Names of the channels, where the rows are structs."""
    step: NotRequired[float]
    """Median time between two steps, where the rows have a column of it."""


@register("modality", "series", options=SeriesOptions)
class Series(Modality):
    """Rows of T steps of C numbers, at one sampling rate for all rows.

    A row of the column with role ``series`` has one of three forms. NaN and null are missing
    numbers.

    - a struct with a list of T numbers for each channel
    - T lists of C numbers
    - a list of T numbers (one channel)

    Channels of structs are matched by name. A channel that the fitted rows do not have is left out,
    and one that a row lacks is missing there. If the state has no names (fitted on lists, or of a
    published checkpoint), structs are refused, since the order of their channels may differ from
    file to file.

    Tensors: ``series`` (B, length, C) float32, standardised by channel, and ``known`` (B, length,
    C) bool, true for numbers that are not missing.

    The column with role ``step``, if it is named, has the time between two steps of each row
    (``onetomany prepare series --set order=`` writes it). A row whose step differs from that of the
    fitted rows by more than 5 % is bad, in training and in prediction. Without this column nothing
    compares sampling rates.

    - Option ``cut`` says which steps of a longer row are read. A shorter row ends in missing steps.
    - Option ``missing`` says what replaces a missing number: the mean of its channel over the steps
      that are read, or the channel's last number.

    Augmentation: Um et al., "Data augmentation of wearable sensor data for Parkinson's disease
    monitoring using convolutional neural networks", ICMI 2017 (jitter, scaling); random crops are
    the window slicing of Le Guennec et al. 2016.
    """

    state: SeriesState
    roles = ("series",)
    optional_roles = ("step",)
    target_options = ("missing", "crop", "scale", "jitter")
    near_search = PerceptualSearch("signs of random projections of averaged channels")

    @classmethod
    def fit(cls, options, table, columns, backbone) -> SeriesState:
        """Find the channels, with mean and standard deviation of each.

        Raises ValueError when no row can be read.
        """
        column = table[columns["series"]]
        if problem := _problem(column.type):
            raise ValueError(f"column {columns['series']}: it holds {column.type}, not {problem}")
        names = _names(column.type)
        rows = _read(column, names, None)
        is_float64 = _number_type(column.type) not in SHORT_FLOATS
        good = [row for row, reason in zip(rows.values, rows.reasons, strict=True) if not reason]
        if not good:
            raise ValueError(
                f"column {columns['series']}: none of the first {len(table)} rows can be read: "
                f"{[*rows.reasons, 'no rows'][0]}"
            )
        state: SeriesState = {"mean": [], "std": []}
        if names is not None:
            state["names"] = names
        if "step" in columns:
            state["step"] = float(f"{_median_step(table[columns['step']], columns['step']):.6g}")
        for channel in range(rows.channels):
            values = np.concatenate([row[:, channel] for row in good])
            values = values[~np.isnan(values)]
            if not len(values):
                values = np.zeros(1)
            std = float(divisors(values.std(), np.abs(values).max(), is_float64))
            state["mean"].append(rounded_mean(float(values.mean()), std))
            state["std"].append(float(f"{std:.7g}"))
        return state

    def required_type(self, role, kind) -> str:
        if role == "step":
            return "" if is_number(kind) else "numbers"
        return _problem(kind, self.state)

    def inputs(self) -> SeriesInputs:
        return {"steps": self.options.length, "channels": self.channels}

    @property
    def channels(self) -> int:
        return len(self.state["mean"])

    # ------------------------------------------------------------ in the data workers

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        """Standardise each channel in float64: its numbers may be large beside their deviation."""
        rows = self._rows(table, columns)
        mean, std = np.array(self.state["mean"]), np.array(self.state["std"])
        with np.errstate(over="ignore"):
            standardised = [((row - mean) / std).astype(np.float32) for row in rows.values]
        for i, row in enumerate(standardised):
            if np.isinf(row).any():
                rows.reasons[i] = "the series holds a number far beyond its channel's deviation"
        for i, reason in enumerate(self._step_reasons(table, columns)):
            rows.reasons[i] = rows.reasons[i] or reason
        return {
            "series": ragged(np.nan_to_num(row).reshape(-1) for row in standardised),
            "known": ragged(~np.isnan(row).reshape(-1) for row in standardised),
        }, rows.reasons

    def _step_reasons(self, table: Any, columns: dict[str, str]) -> list[str]:
        """Return for each row "" or why it has another sampling rate than the fitted rows."""
        if "step" not in columns or "step" not in self.state:
            return [""] * len(table)
        name, fitted = columns["step"], self.state["step"]
        reasons: list[str] = []
        for step in floats(joined(table[name]), np.float64).tolist():
            if math.isnan(step):
                reasons.append(f"its step ({name}) is missing, so its sampling rate is unknown")
            elif abs(step - fitted) <= STEP_TOLERANCE * fitted:
                reasons.append("")
            else:
                reasons.append(
                    f"its steps are {step:.6g} apart ({name}), and {fitted:g} in the rows that the "
                    "network was trained on: bring it to that rate (faster logs by onetomany "
                    f"prepare series --set step={fitted:g})"
                )
        return reasons

    def _rows(self, table: Any, columns: dict[str, str]) -> SeriesRows:
        column = table[columns["series"]]
        if problem := _problem(column.type, self.state):
            empty = np.zeros((0, self.channels))
            reason = f"a value of type {column.type} is not {problem}"
            return SeriesRows([empty] * len(column), [reason] * len(column), self.channels)
        return _read(column, self.state.get("names"), self.channels)

    @classmethod
    def near_signatures(cls, table, columns):
        """Return 64 signs of random projections, and the averages that are projected.

        Channels of structs are in the order of their names. Each channel of a row is centred and
        divided by its standard deviation, or by `MIN_STD_SHARE` of the row's largest one if that
        is more. Then it is averaged to as many numbers as make `THUMB_SIZE` of all channels. What
        cannot be read has averages of one value.

        Measured on the 24 sonars of scitos_wall_following (2026-12-01), 340 windows of 16 steps: no
        false match among 57,630 pairs. Share of changed copies that is found: noise of 1 % of the
        deviation 1.00, of 5 % 0.79; rounded to 0.1 m 0.96; shifted by one step 0 (0.53 for windows
        of 64 steps).
        """
        column = table[columns["series"]]
        thumbs = np.full((len(column), THUMB_SIZE), MAX_LEVEL // 2, dtype=np.uint8)
        if not _problem(column.type):
            names = _names(column.type)
            rows = _read(column, None if names is None else sorted(names), None)
            for i in np.flatnonzero([not reason for reason in rows.reasons]):
                thumbs[i] = _thumbnail(rows.values[i])
        projection = np.random.default_rng(0).standard_normal((THUMB_SIZE, 64))
        bits = (thumbs - np.float64(MAX_LEVEL / 2)) @ projection > 0
        return {"hash": np.packbits(bits, axis=1).view("<u8").reshape(-1), "thumb": thumbs}

    # ------------------------------------------------------------ what is known of the channels

    def coverage(self, table, columns) -> str:
        """Describe which channels one side alone has, and how many rows are cut or filled up."""
        what = ("channels that these rows lack", "unknown channels, left out")
        differences = map(NameDifference, what, self._differences(table, columns))
        parts = [one.text() for one in differences if one.names]
        if "step" in self.state and "step" not in columns:
            parts.append(
                f"known steps are {self.state['step']:g} apart, and those of these rows are not "
                "compared: name their column (data.columns, or --column step=NAME)"
            )
        rows = self._rows(table, columns).values
        length = self.options.length
        longer = sum(len(row) > length for row in rows)
        if longer:
            parts.append(
                f"{longer} of {len(rows)} rows have more than {length} steps; option cut says "
                f"which are read ({self.options.cut})"
            )
        shorter = sum(0 < len(row) < length for row in rows)  # none: it cannot be read
        if shorter:
            parts.append(
                f"{shorter} of {len(rows)} rows have fewer than {length} steps, and missing "
                "numbers behind them"
            )
        return "; ".join(parts)

    def name_differences(self, table, columns) -> list[NameDifference]:
        missing, unknown = self._differences(table, columns)
        differences = [
            NameDifference("channels that the source knows and its rows lack", missing),
            NameDifference(
                "channels that its rows have and the source does not know (left out)", unknown
            ),
        ]
        return [one for one in differences if one.names]

    def _differences(
        self, table: Any, columns: dict[str, str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of channels that only the state has, and those that only rows have."""
        known = self.state.get("names") or []
        names = _names(table[columns["series"]].type) or []
        if not known or not names:
            return (), ()
        missing = tuple(name for name in known if name not in names)
        return missing, tuple(name for name in names if name not in known)

    def single_features(self, table, columns):
        """Yield mean and standard deviation of each channel in every row."""
        rows = self._rows(table, columns)
        names = self.state.get("names") or [f"channel {i}" for i in range(self.channels)]
        for channel, name in enumerate(names):
            statistics = np.full((2, len(table)), np.nan)
            for i, row in enumerate(rows.values):
                values = row[:, channel]
                values = values[~np.isnan(values)]
                if len(values):
                    statistics[:, i] = values.mean(), values.std()
            yield f"{name} (mean)", statistics[0]
            yield f"{name} (standard deviation)", statistics[1]

    # ------------------------------------------------------------ batches

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        counts = lengths_of_rows(arrays["series"]) // self.channels
        # at least one step, as `_cut` takes its steps from it
        shape = (len(counts), max(1, int(counts.max(initial=0))), self.channels)
        for name, dtype in (("series", np.float32), ("known", np.bool_)):
            padded = np.zeros(shape, dtype)
            for target, row in zip(padded, arrays[name], strict=True):
                target.reshape(-1)[: len(row)] = row
            out[name] = torch.from_numpy(padded)
        rest = {name: array for name, array in arrays.items() if name not in out}
        return {**super().collate(rest), **out, "series_lengths": torch.from_numpy(counts)}

    def random_rows(self, rows, rng, length=1.0):
        """Return rows of the read length, with missing numbers; every other one ends early."""
        shape = (rows, self.options.length, self.channels)
        known = rng.random(shape) > 0.1
        known[1::2, 3 * self.options.length // 4 :] = False
        values = np.where(known, rng.standard_normal(shape), 0.0).astype(np.float32)
        arrays = {"series": values, "known": known}
        return self.collate({name: ragged(one.reshape(rows, -1)) for name, one in arrays.items()})

    def augment(self, batch: Batch) -> Batch:
        """Crop, scale and add noise, as the options say."""
        options = self.options
        batch = self._cut(batch, options.crop)
        series = batch["series"]
        if options.scale:
            u = uniform(batch.keys, self.channels, SCALE)
            series = series * (1 + options.scale * (2 * u - 1))[:, None]
        if options.jitter:
            noise = _normal(batch.keys, series.shape[1] * series.shape[2]).view_as(series)
            series = series + options.jitter * noise
        return batch.replace(series=series)

    def finish(self, batch: Batch) -> Batch:
        """Take the steps that the network reads, and fill in missing numbers."""
        batch = self._cut(batch)
        known = batch["known"]
        series = batch["series"].masked_fill(~known, 0.0)
        count = known.sum(1, keepdim=True).clamp(min=1)
        filled = (series.sum(1, keepdim=True) / count).expand_as(series)
        if self.options.missing == "last":
            steps = torch.arange(known.shape[1], device=known.device)[:, None]
            last = torch.where(known, steps, -1).cummax(1).values
            filled = torch.where(last < 0, filled, series.gather(1, last.clamp(min=0)))
        return batch.replace(series=torch.where(known, series, filled))

    def _cut(self, batch: Batch, crop: bool = False) -> Batch:
        """Take ``length`` steps of every row, unless that is done.

        Args:
            crop: From a random place; else as option ``cut`` says.
        """
        if "series_lengths" not in batch.data:
            return batch
        counts = batch["series_lengths"]
        room = (counts - self.options.length).clamp(min=0)
        if crop:
            chosen = uniform(batch.keys, 1, CROP)[:, 0] * (room + 1)
            starts = torch.minimum(chosen.long(), room)
        else:
            starts = {"first": 0 * room, "middle": room // 2, "last": room}[self.options.cut]
        steps = starts[:, None] + torch.arange(self.options.length, device=counts.device)
        is_there = (steps < counts[:, None])[..., None]
        most = batch["series"].shape[1] - 1
        places = steps.clamp(max=most)[..., None].expand(-1, -1, self.channels)
        series, known = (batch[name].gather(1, places) for name in ("series", "known"))
        rest = {name: one for name, one in batch.data.items() if name != "series_lengths"}
        cut = {"series": series, "known": known & is_there}
        return Batch(batch.rows, batch.keys, {**rest, **cut}, batch.shards)


def _median_step(column: Any, name: str) -> float:
    """Return the median time between two steps, of the rows in which it is known.

    Raises ValueError for a column without positive numbers.
    """
    steps = floats(joined(column), np.float64) if is_number(column.type) else np.empty(0)
    steps = steps[np.isfinite(steps) & (steps > 0)]
    if not len(steps):
        raise ValueError(
            f"column {name}: it holds {column.type} without a positive number, and step is the "
            "time between two steps: correct the column, or leave step out of data.columns"
        )
    return float(np.median(steps))


def _normal(keys: Tensor, count: int) -> Tensor:
    """Return (B, count) standard normal numbers by the Box-Muller transform."""
    half = -(-count // 2)
    u = uniform(keys, 2 * half, JITTER)
    radius = (-2 * torch.log1p(-u[:, :half])).sqrt()
    angle = 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def _thumbnail(row: np.ndarray) -> np.ndarray:
    """Return (THUMB_SIZE,) levels of a row (T, C): its channels, each standardised and averaged."""
    known = ~np.isnan(row)
    mean = np.nan_to_num(row).sum(0) / known.sum(0).clip(min=1)
    centred = np.where(known, row - mean, 0.0)
    std = centred.std(0)
    # the noise of a channel that hardly varies is not enlarged
    divisor = np.maximum(std, MIN_STD_SHARE * std.max())
    scaled = centred / np.where(divisor > 0, divisor, 1.0)
    channels = torch.from_numpy(scaled.T.copy())[None]
    averages = F.adaptive_avg_pool1d(channels, max(1, THUMB_SIZE // row.shape[1])).reshape(
        1,
        1,
        -1,
    )
    bins = F.adaptive_avg_pool1d(averages, THUMB_SIZE)[0, 0].numpy()
    largest = np.abs(bins).max() or 1.0
    return np.round((1 + bins / largest) * MAX_LEVEL / 2).astype(np.uint8)


# ---------------------------------------------------------------- columns


class SeriesRows(NamedTuple):
    """The rows of a column of series."""

    values: list[np.ndarray]
    """Of each row (T, C) float64, NaN where a number is missing; without steps where it cannot be
    read."""
    reasons: list[str]
    """Why a row cannot be read; "" where it can."""
    channels: int


def _number_type(kind: Any) -> Any:
    """Return the type of the numbers of a column; of a struct, the widest of its channels."""
    if pa.types.is_struct(kind):
        types = [_number_type(field.type) for field in kind]
        return next((one for one in types if one not in SHORT_FLOATS), pa.float32())
    return _number_type(kind.value_type) if is_list(kind) else kind


def _names(kind: Any) -> list[str] | None:
    """Return the names of a struct's channels, None of lists."""
    return [field.name for field in kind] if pa.types.is_struct(kind) else None


def _problem(kind: Any, state: SeriesState | None = None) -> str:
    """Describe the type that a column needs, where it has another one; else ""."""
    is_struct = pa.types.is_struct(kind)
    named = (state or {}).get("names")
    channels = len(state["mean"]) if state else None
    if is_struct and (named or state is None):
        wrong = [
            field.name
            for field in kind
            if (not named or field.name in named)
            and not (is_list(field.type) and is_number(field.type.value_type))
        ]
        if not wrong:
            return ""
        return f"a struct of lists of numbers, one for each channel (field {wrong[0]} is none)"
    if named:
        return f"a struct of lists of numbers, one for each of the channels {', '.join(named)}"
    values = kind.value_type if is_list(kind) else None
    inner = values.value_type if values is not None and is_list(values) else values
    if inner is not None and is_number(inner):
        return ""
    if channels:
        return (
            f"a list of steps, each a list of {channels} numbers in the order of the source's "
            "channels, which have no names"
        )
    return "a struct of lists of numbers, one a channel, or a list of steps"


def _read(column: Any, names: list[str] | None, channels: int | None) -> SeriesRows:
    """Read structs of lists, lists of lists, or lists of numbers.

    Args:
        names: Channels of structs, in the order in which they are returned; None for lists.
        channels: Channels of lists; None: as many as most steps have.
    """
    array = joined(column) if isinstance(column, pa.ChunkedArray) else column
    if names is not None:
        return _channels(array, names)
    return _steps(array, channels)


class Lists(NamedTuple):
    """A column of lists of numbers."""

    starts: np.ndarray
    lengths: np.ndarray
    """(n,) of each list, -1 for null."""
    values: np.ndarray
    """All numbers, one list behind the other."""

    @classmethod
    def of(cls, lists: Any) -> Lists:
        counts = lengths(lists).astype(np.int64)
        ends = np.cumsum(np.maximum(counts, 0))
        return cls(ends - np.maximum(counts, 0), counts, floats(lists.flatten(), np.float64))

    def __getitem__(self, row: int) -> np.ndarray:
        start = self.starts[row]
        return self.values[start : start + max(0, self.lengths[row])]


def _channels(struct: Any, names: list[str]) -> SeriesRows:
    """Read structs with a list for each channel."""
    fields = dict(zip(_names(struct.type) or [], struct.flatten(), strict=True))
    lists = {k: Lists.of(fields[name]) for k, name in enumerate(names) if name in fields}
    values: list[np.ndarray] = []
    reasons: list[str] = []
    for i in range(len(struct)):
        own = {k: one[i] for k, one in lists.items() if one.lengths[i] >= 0}
        steps = {len(one) for one in own.values()}
        reason = _reason(own.values(), steps)
        row = np.full((0 if reason else steps.pop(), len(names)), np.nan)
        if not reason:
            for k, one in own.items():
                row[:, k] = one
        values.append(row)
        reasons.append(reason)
    return SeriesRows(values, reasons, len(names))


def _reason(channels: Any, steps: set[int]) -> str:
    """Return why a row's channels are not a series, or ""."""
    if not steps:
        return "the series is null, or has none of the channels"
    if len(steps) > 1:
        return f"channels of one row have {min(steps)} and {max(steps)} steps"
    if steps == {0}:
        return "the series has no steps"
    if any(np.isinf(one).any() for one in channels):
        return "the series holds an infinite number"
    return ""


def _steps(lists: Any, channels: int | None) -> SeriesRows:
    """Read lists of steps, each a number or a list of numbers."""
    counts = lengths(lists).astype(np.int64)
    ends = np.cumsum(np.maximum(counts, 0))
    inner = lists.flatten()
    if not is_list(inner.type):
        widths = np.ones(len(inner), dtype=np.int64)
        steps = Lists(np.arange(len(inner)), widths, floats(inner, np.float64))
    else:
        steps = Lists.of(inner)
    if channels is None:
        most_frequent = np.bincount(steps.lengths[steps.lengths > 0], minlength=2).argmax()
        channels = int(most_frequent) or 1
    values: list[np.ndarray] = []
    reasons: list[str] = []
    for count, end in zip(counts.tolist(), ends.tolist(), strict=True):
        start = end - max(count, 0)
        widths = steps.lengths[start:end]
        row, reason = np.zeros((0, channels)), ""
        if count < 0:
            reason = "the series is null"
        elif not count:
            reason = "the series has no steps"
        elif (wrong := np.flatnonzero(widths != channels)).size:
            step = int(wrong[0])
            width = max(0, int(widths[step]))
            reason = f"step {step} has {width} numbers, and {channels} channels were expected"
        else:
            first = steps.starts[start]
            row = steps.values[first : first + count * channels].reshape(count, channels)
            if np.isinf(row).any():
                row, reason = row[:0], "the series holds an infinite number"
        values.append(row)
        reasons.append(reason)
    return SeriesRows(values, reasons, channels)
