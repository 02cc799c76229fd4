"""Records of irregular events with static features, such as the measurements of an ICU stay and the
patient's age.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import filled, floats, is_list, is_number, is_text, joined, lengths
from pipeline.core.capabilities import NameDifference
from pipeline.core.contracts import Arrays, Batch, Modality
from pipeline.core.inputs import EventInputs
from pipeline.core.ragged import pad, ragged
from pipeline.core.rng import uniform
from pipeline.core.specs import State
from pipeline.media.deviation import divisors, rounded_mean
from pipeline.media.static_features import (
    MAX_DEVIATIONS,
    SHORT_FLOATS,
    TAILS,
    StaticFeatures,
    StaticState,
    check_share,
)

MAX_NAMED = 8
MIN_UNREAD = 0.001
"""A smaller share of events at hours that are not read is not reported."""
DROP = 0
"""Random stream of a row's key."""

PREPARATION = """
state, options = graph["modality"]["state"], graph["modality"]["options"]
mean, std = np.array(state["mean"]), np.array(state["std"])
variable = {name: place for place, name in enumerate(state["variables"])}  # counted from 0
events = []
for record in records:
    triples = zip(record["times"], record["variables"], record["values"])
    kept = [
        (time, variable[name], value)
        for time, name, value in triples
        if name in variable and -options["before"] <= time < options["hours"]
    ]
    events.append(sorted(kept, key=lambda event: event[0]))
shape = len(events), max(1, *map(len, events))
inputs["times"], inputs["values"] = np.zeros((2, *shape), np.float32)
inputs["variables"], inputs["mask"] = np.zeros(shape, np.int64), np.zeros(shape, bool)
for row, kept in enumerate(events):
    for i, (time, place, value) in enumerate(kept):
        value = np.clip((value - mean[place]) / std[place], -MAX_DEVIATIONS, MAX_DEVIATIONS)
        inputs["times"][row, i], inputs["values"][row, i] = time, value
        inputs["variables"][row, i], inputs["mask"][row, i] = place, True
inputs = {name: inputs[name] for name in graph["inputs"]}
"""
"""Code that adds the events to the inputs of a network outside of this package."""


class EventsOptions(Options):
    hours: float = Field(
        48.0,
        gt=0,
        le=24 * 366,
        description="events after this many hours are left out, as are those at that very hour",
    )
    before: float = Field(
        0.0,
        ge=0,
        le=24 * 366,
        description="hours before the start that are read too, such as laboratory results before "
        "the ICU",
    )
    min_rows: int = Field(
        10,
        ge=1,
        description="rows of the fitted sample that must have a variable, or a text among the "
        "static facts, for it to be known",
    )
    max_variables: int = Field(
        2000, ge=1, description="most variables that are known, those that most rows have"
    )
    drop: float = Field(
        0.0, ge=0, lt=1, description="training: share of a row's events that are left out at random"
    )


class EventsState(TypedDict):
    """State of `Events`."""

    variables: list[str]
    mean: list[float]
    std: list[float]
    """Mean and standard deviation of the values of each variable."""
    static: NotRequired[StaticState]


@register("modality", "events", options=EventsOptions)
class Events(Modality):
    """Records of events, each with a time, a variable and a value.

    A row has three lists of one length: ``times`` (hours since the row's start, in any order),
    ``variables`` (names) and ``values`` (numbers). It may have no events. The struct ``static``
    holds what is known at the start: numbers, texts (a category) and lists of texts (codes).

    - Variables are matched by name. Rows from elsewhere share the variables that they have in
      common with the rows that the state was fitted on, in whatever order variables or codes are.
    - Events of other variables are ignored. The run and the report list them (``coverage``).
    - Values are standardised by variable, and clipped to 8 standard deviations.

    Tensors:

    - ``times`` (B, N) float32 hours, ascending; ``variables`` (B, N) int64; ``values`` (B, N)
      float32; ``mask`` (B, N), true where there is an event
    - ``numbers`` (B, K) float32, the static numbers, standardised, 0 where unknown;
      ``numbers_known`` (B, K) bool
    - ``codes`` (B, C) int64, the static texts: 1 + the index among the known texts, padded with 0
    - while training with ``drop`` also ``recorded`` (B, N) bool, the mask before events were
      dropped
    """

    state: EventsState
    roles = ("times", "variables", "values")
    optional_roles = ("static", "events")
    record_column = "entity"
    target_options = ("hours", "before", "drop")
    cost_role = "events"
    cost_unit = "events"

    def __init__(self, options: Any, state: State):
        super().__init__(options, state)
        self.static_features = StaticFeatures(state.get("static") or StaticFeatures.empty_state())
        self.names = pa.array(state.get("variables", []), pa.string())
        self.mean, self.std = (
            np.array(state.get(name, []), dtype=np.float64) for name in ("mean", "std")
        )

    @classmethod
    def fit(cls, options, table, columns, backbone) -> EventsState:
        """Find the variables that enough rows have, with mean and deviation, and the static
        features.

        Raises ValueError when no row can be decoded.
        """
        parts, reasons = _lists(table, columns)
        if not any(not reason for reason in reasons):
            raise ValueError(
                f"columns {', '.join(columns[role] for role in cls.roles)}: none of the first "
                f"{len(reasons)} rows can be read: "
                f"{reasons[0] if reasons else 'no rows'}"
            )
        row, time, name, value = parts
        _check_window(time, options, columns["times"])
        inside = _in_window(time, options)
        row = row[inside]
        value = value[inside]
        place = name.indices.to_numpy()[inside]
        names = name.dictionary.to_pylist()
        rows = _rows_with(row, place, len(names))
        ranked = sorted(
            (
                (-count, name)
                for count, name in zip(rows.tolist(), names, strict=True)
                if count >= options.min_rows
            )
        )
        kept = sorted(name for _, name in ranked[: options.max_variables])
        if not kept:
            raise ValueError(
                f"column {columns['variables']}: no variable is in {options.min_rows} of "
                f"{len(table)} rows in {_window(options)}: lower min_rows, or raise hours"
            )
        counts = np.bincount(place, minlength=len(names))
        sorted_values = value[np.argsort(place, kind="stable")]
        by_variable = np.split(sorted_values, np.cumsum(counts)[:-1])
        values_of = dict(zip(names, by_variable, strict=True))
        state: EventsState = {"variables": kept, "mean": [], "std": []}
        for variable in kept:
            values = values_of[variable].astype(np.float64)
            clipped = values.clip(*np.quantile(values, TAILS))
            is_float64 = value.dtype == np.float64
            std = float(divisors(clipped.std(), np.abs(clipped).max(), is_float64))
            state["mean"].append(rounded_mean(float(clipped.mean()), std))
            state["std"].append(float(f"{std:.7g}"))
        if "static" in columns:
            state["static"] = StaticFeatures.fit(
                table[columns["static"]], columns["static"], options.min_rows
            )
        return state

    def required_type(self, role, kind) -> str:
        if role == "static":
            return self.static_features.required_type(kind)
        if role not in self.roles or (is_list(kind) and _suits(role, kind.value_type)):
            return ""
        return f"lists of {'texts' if role == 'variables' else 'numbers'}"

    def inputs(self) -> EventInputs:
        return {
            "variables": len(self.names),
            **self.static_features.sizes(),
            "start": -self.options.before,
            "hours": self.options.hours,
        }

    def coverage(self, table, columns) -> str:
        """Describe which variables and static features of these rows are known, which are ignored,
        and how many events are at hours that are not read.
        """
        (row, time, names, _), _ = _lists(table, columns)
        counts, rows = _events_and_rows(row, names)
        shared = set(self.state["variables"]) & counts.keys()
        share = sum(counts[name] for name in shared) / max(1, counts.total())
        text = f"{len(shared)} of {len(counts)} variables are known ({share:.1%} of the events)"
        lost = [name for name, _ in counts.most_common() if name not in shared]
        # a rare name may identify a patient
        shown = [name for name in lost if rows[name] >= self.options.min_rows][:MAX_NAMED]
        if len(shown) < len(lost):
            shown.append(f"{len(lost) - len(shown)} others")
        if lost:
            text += f"; left out: {', '.join(shown)}"
        unread = np.count_nonzero(~_in_window(time, self.options)) / max(1, len(time))
        if unread >= MIN_UNREAD:
            text += f"; {unread:.1%} of the events are not in {_window(self.options)}, and not read"
        static = ""
        if columns.get("static") in table.column_names:
            static = self.static_features.coverage(table[columns["static"]], columns["static"])
        elif any(self.static_features.sizes().values()):
            static = (
                "the network knows static features, but no column is named for those of these "
                "rows: name it (data.columns, or --column static=NAME)"
            )
        return text + (f"; {static}" if static else "")

    def check_known_share(self, table, columns) -> float:
        (row, time, names, _), _ = _lists(table, columns)
        _check_window(time, self.options, columns["times"])
        counts, rows = _events_and_rows(row, names)
        known, total = sum(counts[name] for name in self.state["variables"]), counts.total()
        # a rare name may identify a patient
        names = [name for name in rows if rows[name] >= self.options.min_rows]
        known_names = {*self.state["variables"], *self.static_features.field_names()}
        if columns.get("static") in table.column_names:
            static = columns["static"]
            of_static = self.static_features.known_values(table[static], static)
            known, total = known + of_static[0], total + of_static[1]
            names += [field.name for field in table.schema.field(static).type]
        place = f"columns {columns['variables']}, {columns.get('static', '')}".removesuffix(", ")
        return check_share(known, total, place, names, known_names)

    def name_differences(self, table, columns) -> list[NameDifference]:
        """List all variables and static features that only the state or only these rows have.

        Variables that few rows have are counted, not named.
        """
        (row, _, names, _), _ = _lists(table, columns)
        _, rows = _events_and_rows(row, names)
        unknown = sorted(rows.keys() - self.state["variables"])
        named = tuple(name for name in unknown if rows[name] >= self.options.min_rows)
        differences = [
            NameDifference(
                "variables that the source knows and its rows lack",
                tuple(name for name in self.state["variables"] if name not in rows),
            ),
            NameDifference(
                "variables that its rows have and the source does not know (left out)",
                named,
                len(unknown) - len(named),
            ),
        ]
        static = (
            self.static_features.name_differences(
                table[columns["static"]], columns["static"], self.options.min_rows
            )
            if columns.get("static") in table.column_names
            else []
        )
        return [
            *(difference for difference in differences if difference.names or difference.rare),
            *static,
        ]

    def single_features(self, table, columns):
        """Yield static features, and count, first, last, smallest and largest value of each
        variable.
        """
        if columns.get("static") in table.column_names:
            yield from self.static_features.features(
                table[columns["static"]], columns["static"], self.options.min_rows
            )
        (row, time, names, value), _ = _lists(table, columns)
        inside = _in_window(time, self.options)
        row = row[inside]
        time = time[inside]
        value = value[inside].astype(np.float64)
        place = names.indices.to_numpy()[inside]
        order = np.lexsort((time, row, place))
        row, value, place = row[order], value[order], place[order]
        known = set(self.state.get("variables", []))
        for number, name in enumerate(names.dictionary.to_pylist()):
            start, stop = np.searchsorted(place, [number, number + 1])
            if start == stop or (known and name not in known):
                continue
            rows, first, count = np.unique(row[start:stop], return_index=True, return_counts=True)
            if len(rows) < self.options.min_rows:
                continue
            values = value[start:stop]
            numbers_by_kind = {
                "how often": count,
                "first value": values[first],
                "last value": values[first + count - 1],
                "least value": np.minimum.reduceat(values, first),
                "largest value": np.maximum.reduceat(values, first),
            }
            for what, numbers in numbers_by_kind.items():
                column = np.full(len(table), 0.0 if what == "how often" else np.nan)
                column[rows] = numbers
                yield f"{name} ({what})", column

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        (row, time, name, value), reasons = _lists(table, columns)
        known = filled(pc.index_in(name.dictionary, value_set=self.names), -1)
        place = known[name.indices.to_numpy()]
        kept = (place >= 0) & _in_window(time, self.options)
        if not kept.all():
            row, time, place, value = row[kept], time[kept], place[kept], value[kept]
        is_same_row = row[1:] == row[:-1]
        if ((time[1:] < time[:-1]) & is_same_row).any():
            order = np.lexsort((time, row))
            row, time, place, value = row[order], time[order], place[order], value[order]
        mean, std = (of_all.astype(value.dtype)[place] for of_all in (self.mean, self.std))
        value = ((value - mean) / std).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS).astype(np.float32)
        spans = list(pairwise(np.searchsorted(row, np.arange(len(table) + 1)).tolist()))
        out: Arrays = {
            role: ragged([array[start:stop] for start, stop in spans])
            for role, array in (
                ("times", time),
                ("variables", place.astype(np.int64)),
                ("values", value),
            )
        }
        return out | self.static_features.decode(
            table[columns["static"]] if "static" in columns else None,
            len(table),
            columns.get("static", ""),
        ), reasons

    def costs(self, table, columns) -> np.ndarray:
        """Return (B,) float64: the number of events of each row plus 1, so that no row costs
        nothing.

        From the column ``events`` where there is one, else the lengths of the lists.
        """
        column = columns.get("events")
        if column in table.column_names:
            counts = np.nan_to_num(floats(joined(table[column]), np.float64))
        else:
            counts = lengths(joined(table[columns["times"]]))
        return np.maximum(counts, 0.0) + 1.0

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        own = {name: arrays[name] for name in ("times", "variables", "values", "codes")}
        lengths = np.array([len(row) for row in own["times"]])
        width = max(1, int(lengths.max(initial=0)))
        out = {
            name: torch.from_numpy(pad(array, 1 if name == "codes" else width))
            for name, array in own.items()
        }
        out["mask"] = torch.from_numpy(np.arange(width) < lengths[:, None])
        return out | super().collate(
            {name: array for name, array in arrays.items() if name not in own}
        )

    def preparation_code(self) -> str:
        """Return code that prepares rows as `decode` and `collate` do (`PreparesInputs`)."""
        variables = self.state["variables"][:2]
        record: dict[str, Any] = {"times": [0.5, 1.0][: len(variables)], "variables": variables}
        record["values"] = self.state["mean"][:2]
        record["static"] = self.static_features.example_row()
        return (
            f"records = [{record!r}]  # an example: replace it by your rows, times in hours\n"
            'rows = [record["static"] for record in records]\n'
            f'state = graph["modality"]["state"].get("static", {StaticFeatures.empty_state()})\n'
            + self.static_features.preparation_code()
            + PREPARATION.replace("MAX_DEVIATIONS", f"{MAX_DEVIATIONS:g}")
        )

    def random_rows(self, rows, rng, length=1.0):
        state = self.state
        table: dict[str, list[Any]] = {"times": [], "variables": [], "values": []}
        for _ in range(rows):
            count = max(1, int(length * rng.integers(5, 20)))
            places = rng.integers(0, len(state["variables"]), count)
            table["times"].append(np.sort(rng.uniform(0, self.options.hours, count)).tolist())
            table["variables"].append([state["variables"][place] for place in places])
            values = [
                float(state["mean"][place] + state["std"][place] * rng.standard_normal())
                for place in places
            ]
            table["values"].append(values)
        if any(self.static_features.sizes().values()):
            table["static"] = self.static_features.random_rows(rows, rng)
        return self.collate(self.decode(pa.table(table), {name: name for name in table})[0])

    def augment(self, batch: Batch) -> Batch:
        """Drop a random share of the events; ``recorded`` (B, N) still has all that there are."""
        if not self.options.drop:
            return batch
        recorded = batch["mask"]
        is_kept = uniform(batch.keys, recorded.shape[1], DROP) >= self.options.drop
        return batch.replace(mask=recorded & is_kept, recorded=recorded)


def _rows_with(row: np.ndarray, place: np.ndarray, words: int) -> np.ndarray:
    """Count the rows that have each word: (words,) from (E,) row and (E,) word of every event."""
    factor = max(1, words)
    pairs = np.unique(row * factor + place)
    return np.bincount(pairs % factor, minlength=words)


def _in_window(time: np.ndarray, options: EventsOptions) -> np.ndarray:
    """Return (E,) bool, the events that are read, by their hours."""
    return (time >= -options.before) & (time < options.hours)


def _window(options: EventsOptions) -> str:
    return f"hours {0 - options.before:g} to {options.hours:g}"


def _check_window(time: np.ndarray, options: EventsOptions, column: str) -> None:
    """Raise ValueError where no event (E,) is read, or only those at hour 0, where the rows end."""
    if not len(time):
        return
    ends_at_0 = not options.before and time.min() < 0 and time.max() <= 0
    if ends_at_0 or not _in_window(time, options).any():
        raise ValueError(
            f"column {column}: {_window(options)} are read, and these rows have "
            f"{'events at hour 0 and before alone' if ends_at_0 else 'no event there'}; write "
            "times in hours since the row's start, or set before and hours in data.modality (for "
            "rows that end at hour 0, as those of prepare meds: {events: {before: 720, hours: 1}})"
        )


def _events_and_rows(row: np.ndarray, names: Any) -> tuple[Counter[str], dict[str, int]]:
    """Count the events of each variable, and the rows that have it, of events from `_lists`."""
    place, words = names.indices.to_numpy(), names.dictionary.to_pylist()
    events = np.bincount(place, minlength=len(words)).tolist()
    rows = _rows_with(row, place, len(words)).tolist()
    counts = +Counter(dict(zip(words, events, strict=True)))
    return counts, {name: count for name, count in zip(words, rows, strict=True) if count}


Parts = tuple[np.ndarray, np.ndarray, Any, np.ndarray]


def _lists(table: pa.Table, columns: dict[str, str]) -> tuple[Parts, list[str]]:
    """Flatten the lists of a table.

    Returns:
        (row, hour, name, value) of every event of the usable rows, names as an Arrow dictionary;
        and for each row "" or why it cannot be used.

    Raises:
        ValueError: a column does not hold lists of such values.
    """
    columns_by_role, reasons = {}, [""] * len(table)
    for role in Events.roles:
        columns_by_role[role] = column = joined(table[columns[role]])
        if not is_list(column.type) or not _suits(role, column.type.value_type):
            raise ValueError(
                f"column {columns[role]}: it holds {column.type}; {role} are lists of "
                f"{'texts' if role == 'variables' else 'numbers'}, as onetomany prepare events "
                "writes them"
            )
    counts = {role: lengths(column).astype(np.int64) for role, column in columns_by_role.items()}
    n = counts["times"]
    differs = (n != counts["variables"]) | (n != counts["values"])
    for i in np.flatnonzero((n < 0) | differs):
        description = ", ".join(
            f"{counts[role][i]} {role}" if counts[role][i] >= 0 else f"null {role}"
            for role in Events.roles
        )
        reasons[i] = f"an event is a time, a variable and a value, and the row has {description}"
    good = np.array([not reason for reason in reasons], dtype=bool)
    if not good.all():
        columns_by_role = {
            role: column.filter(pa.array(good)) for role, column in columns_by_role.items()
        }
    flat = {role: pc.list_flatten(column) for role, column in columns_by_role.items()}
    row = np.repeat(np.arange(len(table)), np.where(good, n, 0))
    time = floats(flat["times"])
    # float32 would round a number that is large beside its deviation
    is_short = flat["values"].type in SHORT_FLOATS
    value = floats(flat["values"], np.float32 if is_short else np.float64)
    name = (
        flat["variables"]
        if pa.types.is_dictionary(flat["variables"].type)
        else pc.cast(flat["variables"], pa.string()).dictionary_encode()
    )
    for role, wrong in (
        ("time", ~np.isfinite(time)),
        ("value", ~np.isfinite(value)),
        ("variable", np.asarray(name.is_null())),
    ):
        for i in np.unique(row[wrong]) if wrong.any() else ():
            reasons[i] = (
                reasons[i]
                or f"{np.count_nonzero(wrong & (row == i))} of its {n[i]} events have no {role}, "
                "or one that is not a number"
            )
    if any(reasons):
        kept = np.array([not reason for reason in reasons])[row]
        row, time, value, name = row[kept], time[kept], value[kept], name.filter(pa.array(kept))
    return (row, time, name, value), reasons


def _suits(role: str, kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if role == "variables":
        return is_text(plain) or pa.types.is_null(plain)
    return is_number(plain)
