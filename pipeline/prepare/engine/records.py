"""Longitudinal records of people, as MEDS and OMOP have them, to rows that end at a time.

A row is about one person and has an hour 0: the time of a prediction, the start of a visit. Events
from `history` before hour 0 up to the row's end enter it, so that one event may enter several rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes, filled, is_text, joined
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine.grouped import EventReader, Events, GroupedImporter
from pipeline.prepare.engine.importing import InvalidRow, Notes, first_reason, invalid_row
from pipeline.prepare.engine.inputs import find_inputs
from pipeline.prepare.readers.archives import Entry, Opener
from pipeline.prepare.readers.csv_blocks import Column, read_schema, read_table

HOUR = 3_600_000_000
DAY, YEAR = 24 * HOUR, 365.2425 * 24 * HOUR
"""Microseconds."""
MAX_EVENTS_AT_ONCE = 1 << 20
"""Events that are made of one block at a time, where each enters several rows."""
NUMBER = "number"
"""What stands after the name of a variable whose values are numbers of an unknown unit."""
VALUES = {
    "boolean_value": "text",
    "integer_value": "id",
    "float_value": "number",
    "categorical_value": "text",
}
"""Columns of a MEDS label table that may hold the label, and how each is read."""
TRUE, FALSE = ("true", "1", "1.0", "t"), ("false", "0", "0.0", "f")
NO_SUBJECT, EARLY = (
    "no such subject in the data",
    "its subject has no event at or before the prediction time",
)
NO_ROWS, OUTSIDE = "no row is about its subject", "not within the time of a row"
LONG_TEXT = "texts that are too long to be a category (the event stays, without its text)"
NO_NUMBER = "fields of numbers that hold another text (the event stays, without a number)"


class Windows:
    """Which rows an event enters.

    Args:
        subjects: (R,) int64, whom each row is about; rows are sorted by subject, then by `end`.
        start, zero, end: (R,) int64 microseconds since 1970: events from `start` to `end`, both
            inclusive, enter; their hours count from `zero`.
    """

    def __init__(
        self,
        subjects: np.ndarray,
        start: np.ndarray,
        zero: np.ndarray,
        end: np.ndarray,
    ):
        self.start, self.zero = start, zero
        self.subjects, counts = np.unique(subjects, return_counts=True)
        self.stops = np.cumsum(counts)
        self.ends = np.unique(end)
        # One sorted key for (subject, end): microseconds of centuries leave no bits for a subject
        self.keys = self._keys(np.repeat(np.arange(len(counts)), counts), end)

    def _keys(self, places: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return numbers that sort by subject, then by the first end at or after a time."""
        return places * (len(self.ends) + 1) + np.searchsorted(self.ends, times)

    def places(self, subjects: np.ndarray) -> np.ndarray:
        """Return (n,) position of each id among the subjects, or -1."""
        return index_in_sorted(self.subjects, subjects)

    def events(
        self,
        subjects: np.ndarray,
        times: np.ndarray,
        codes: np.ndarray,
        names: list[str],
        values: np.ndarray,
        reader: EventReader,
    ) -> Iterator[Events]:
        """Yield n events once for each row that they enter; those that enter none are counted.

        Args:
            subjects, times, codes, values: (n,) each; times in microseconds since 1970.
            names: of the variables that `codes` count.
            reader: takes the counts.
        """
        place = self.places(subjects)
        reader.count(NO_ROWS, int(np.count_nonzero(place < 0)))
        event = np.flatnonzero(place >= 0)
        place = place[event]
        first = np.searchsorted(self.keys, self._keys(place, times[event]))
        counts = self.stops[place] - first
        enters = np.zeros(len(event), dtype=bool)
        total = np.cumsum(counts)
        cuts = np.searchsorted(
            total, np.arange(MAX_EVENTS_AT_ONCE, counts.sum(), MAX_EVENTS_AT_ONCE)
        )
        for begin, stop in pairwise([0, *cuts.tolist(), len(event)]):
            some = counts[begin:stop]
            which = np.repeat(np.arange(begin, stop), some)
            before = np.cumsum(some) - some
            row = np.arange(some.sum()) + np.repeat(first[begin:stop] - before, some)
            inside = times[event[which]] >= self.start[row]
            which, row = which[inside], row[inside]
            enters[which] = True
            source = event[which]
            hours = (times[source] - self.zero[row]) / HOUR
            yield Events(row, hours, codes[source], names, values[source])
        reader.count(OUTSIDE, int(len(event) - np.count_nonzero(enters)))


def merge_spans(spans: list[pa.Table]) -> pa.Table:
    """Merge tables of (person, ``first``, ``last``) into one row a person, sorted by person.

    Args:
        spans: At least one table. Its first column holds the person's number, ``first`` and
            ``last`` are times.
    """
    person = spans[0].column_names[0]
    return (
        pa.concat_tables(spans)
        .group_by(person)
        .aggregate([("first", "min"), ("last", "max")])
        .rename_columns({"first_min": "first", "last_max": "last"})
        .sort_by(person)
    )


def index_in_sorted(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return (n,) position of each number among the sorted `known`, or -1."""
    if not len(known):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, at, -1)


# ---------------------------------------------------------------- variables and values


class NamedEvents(NamedTuple):
    """Variables and values of n events: (n,) positions in `names`, the names, (n,) float64."""

    codes: np.ndarray
    names: list[str]
    values: np.ndarray


def name_events(
    codes: Any,
    numbers: Any,
    texts: Any,
    units: Any,
    characters: int,
    dropped: Counter[str],
) -> NamedEvents:
    """Name the variable of each event by its code and by what its value is.

    An event with a number is called `CODE: UNIT` (`CODE: number` where no unit is known), one with
    a text `CODE: TEXT`, with the value 1, and one with neither `CODE`, with the value 1: an event
    without a number never counts as a number of the same code.

    Args:
        codes: (n,) texts without nulls.
        numbers: (n,) float64, or texts as `csv_blocks.batches` gives them; null and NaN are no
            number, another text is counted in `dropped`.
        texts: (n,) texts; one such as <0.1 counts as its bound.
        units: (n,) texts.
        characters: longer texts count as none, and are counted in `dropped`.
    """
    number = plausible.numbers(numbers)
    given, is_other_text = number.reasons == 0, number.reasons > 1
    dropped[NO_NUMBER] += int(np.count_nonzero(is_other_text))
    text = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))
    text = pc.if_else(pc.equal(text, ""), None, text)
    parsed = plausible.numbers(text)
    is_bound = np.where(given, number.censored, parsed.censored)
    dropped[plausible.CENSORED] += int(np.count_nonzero(is_bound))
    values = np.where(given, number.values, parsed.values)
    is_number = ~np.isnan(values)

    is_long = np.asarray(pc.greater(pc.utf8_length(text), characters).fill_null(False))
    dropped[LONG_TEXT] += int(np.count_nonzero(is_long & ~is_number))
    text = pc.if_else(pa.array(is_long), None, text)
    what = pc.if_else(pa.array(is_number), pc.coalesce(units, NUMBER), text)
    name = pc.coalesce(pc.binary_join_element_wise(codes, what, ": "), codes)
    name_codes, names = dictionary_codes(name)
    return NamedEvents(
        name_codes.astype(np.int64), names.to_pylist(), np.where(is_number, values, 1.0)
    )


# ---------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """A MEDS label table, sorted by subject and time.

    Attributes:
        subjects: (n,) int64.
        times: (n,) int64 microseconds since 1970, the times of prediction.
        values: (n,) labels: int64 (also true and false), float64 or string.
        places: (n,) where each stands: file and row.
        invalid: rows that cannot be used: path, split and reason.
        fingerprint: changes when the files do.
        column: the column that the labels are from.
    """

    subjects: np.ndarray
    times: np.ndarray
    values: pa.Array
    places: np.ndarray
    invalid: list[InvalidRow]
    fingerprint: str
    column: str

    def usable(
        self,
        ids: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
    ) -> tuple[np.ndarray, list[InvalidRow]]:
        """Return ((n,) whether there are events that a label may be predicted from, all rows of
        the table that cannot be used).

        Args:
            ids: (S,) sorted subjects of the data.
            first, last: (S,) times of their events; `first` is after `last` where there are none.
        """
        index = index_in_sorted(ids, self.subjects)
        is_known = index >= 0
        has_events = is_known.copy()
        has_events[is_known] = first[index[is_known]] <= np.minimum(
            last[index[is_known]], self.times[is_known]
        )
        reasons = first_reason((~is_known, NO_SUBJECT), (~has_events, EARLY))
        invalid = [
            invalid_row(self.places[i], "train", str(reasons[i]))
            for i in np.flatnonzero(reasons != "")
        ]
        return has_events, [*self.invalid, *invalid]


class RecordsImporter(GroupedImporter):
    """Base class for records of people, with the options `labels` and `history`. Examples: `meds`,
    `omop`.

    Attributes:
        labels: the label table, where one is given.
        label: "label" where that table has classes, else "".
    """

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        self.labels = read_labels(o.labels, getattr(o, "label", "")) if o.labels else None
        has_classes = self.labels is not None and self.labels.column != "float_value"
        self.label = "label" if has_classes else ""

    def __getstate__(self) -> dict[str, object]:
        """Leave labels and tables out of what is sent to tasks: they need the options alone."""
        return {"options": self.options, "label": self.label}

    @property
    def history(self) -> int:
        """Microseconds before hour 0 from which events enter."""
        return round(self.options.history * HOUR)

    def rows_of_persons(
        self,
        spans: pa.Table,
        noun: str,
        notes: Notes,
    ) -> tuple[pa.Table, list[InvalidRow]]:
        """Return (one row a label, or one a person that ends with the last event; the label rows
        that cannot be used).

        Args:
            spans: of each person the number, `first` and `last`, as `merge_spans` returns them;
                `first` is after `last` where there are no timed events.
            noun: what the notes call persons.
            notes: takes the counts.
        """
        ids, first, last = (column.to_numpy() for column in spans.columns)
        if self.labels is None:
            has_events = first <= last
            notes[f"{noun} without timed events, left out"] = int(np.count_nonzero(~has_events))
            persons, end_times, label_columns, invalid = ids[has_events], last[has_events], {}, []
        else:
            good, invalid = self.labels.usable(ids, first, last)
            has_no_label = ~np.isin(ids, self.labels.subjects)
            notes[f"{noun} without label rows, left out"] = int(np.count_nonzero(has_no_label))
            persons, end_times = self.labels.subjects[good], self.labels.times[good]
            label_columns = {"label": self.labels.values.filter(pa.array(good))}
        columns = {
            "entity": pa.array(persons),
            "patient": pa.array(persons),
            "prediction_time": pa.array(end_times, pa.timestamp("us")),
        }
        return pa.table({**columns, **label_columns}), invalid


def read_labels(uri: str, column: str) -> Labels:
    """Read a label table of MEDS (Parquet or CSV; a file, or a folder of them).

    Columns: `subject_id`, `prediction_time`, and one of VALUES.

    Args:
        uri: the table.
        column: the one of VALUES that is the label; "": the only one with values.

    Raises:
        ValueError: no such table, a missing column or one of another type, no label, or several
            columns of labels where none is named.
    """
    found = find_inputs(uri, (".parquet", ".csv"), "all")
    names = [column] if column else list(VALUES)
    wanted = {
        "subject_id": Column("id"),
        "prediction_time": Column("moment"),
        **{name: Column(VALUES[name], bool(column)) for name in names},
    }
    tables, places = [], []
    with Opener() as opener:
        for entry, _ in found.files:
            check_types(entry, opener, LABEL_TYPES)
            table = read_table("labels", entry, wanted, opener)
            table = pa.table({name: _label(table[name], name) for name in wanted})
            tables.append(table)
            places += [f"{entry.name}:row {i + 1}" for i in range(len(table))]
    table = pa.concat_tables(tables).combine_chunks()
    given = [name for name in names if table[name].null_count < len(table)]
    if len(given) != 1:
        there = ", ".join(given) or "none"
        raise ValueError(
            f"{uri}: one of {', '.join(names)} holds the label, and with values there are {there}; "
            f"{'name it: --set label=' + given[0] if given else 'give a table with labels'}"
        )
    return _sorted_labels(table, given[0], np.array(places, dtype=object), found.fingerprint)


def _sorted_labels(table: pa.Table, column: str, places: np.ndarray, fingerprint: str) -> Labels:
    """Sort the valid rows by subject and time, and list the others."""
    subject, time = (filled(joined(table[name]), 0) for name in ("subject_id", "prediction_time"))
    valid = {
        name: np.asarray(table[name].combine_chunks().is_valid()) for name in table.schema.names
    }
    needed = ("subject_id", "prediction_time", column)
    reasons = first_reason(*((~valid[name], f"no {name}") for name in needed)).astype(object)
    order = np.lexsort((np.arange(len(table)), time, subject))
    order = order[reasons[order] == ""]
    is_again = (np.diff(subject[order]) == 0) & (np.diff(time[order]) == 0)
    reasons[order[1:][is_again]] = "the same subject and time again"
    invalid = [
        invalid_row(places[i], "train", str(reasons[i])) for i in np.flatnonzero(reasons != "")
    ]
    kept = order[reasons[order] == ""]
    values = table[column].combine_chunks().take(pa.array(kept))
    return Labels(subject[kept], time[kept], values, places[kept], invalid, fingerprint, column)


def _label(column: Any, name: str) -> Any:
    """Convert a column of labels to what rows have: true and false to 1 and 0."""
    if name == "boolean_value":
        text = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        known = pc.if_else(pc.is_in(text, value_set=pa.array(FALSE)), 0, None)
        is_true = pc.is_in(text, value_set=pa.array(TRUE))
        return pc.if_else(is_true, 1, known).cast(pa.int64())
    if name == "float_value":
        found = plausible.numbers(column)
        return pa.array(found.values, pa.float64(), mask=found.reasons != 0)
    return column


# ---------------------------------------------------------------- types


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) and kind.tz is None


ColumnTypes = dict[str, tuple[Callable[[pa.DataType], bool], str]]
"""Of each column a test of its type, and what the standard calls that type."""
LABEL_TYPES: ColumnTypes = {
    "subject_id": (pa.types.is_integer, "int64"),
    "prediction_time": (_is_time, "timestamp[us] without a zone"),
    "boolean_value": (pa.types.is_boolean, "bool"),
    "integer_value": (pa.types.is_integer, "int64"),
    "float_value": (pa.types.is_floating, "float"),
    "categorical_value": (is_text, "string"),
}
DATA_TYPES: ColumnTypes = {
    "subject_id": (pa.types.is_integer, "int64"),
    "time": (_is_time, "timestamp[us] without a zone"),
    "code": (is_text, "string"),
    "numeric_value": (pa.types.is_floating, "float"),
    "text_value": (is_text, "string"),
}
SPLIT_TYPES: ColumnTypes = {
    "subject_id": (pa.types.is_integer, "int64"),
    "split": (is_text, "string"),
}
"""Types of MEDS 0.4 (github.com/Medical-Event-Data-Standard/meds, schema.py)."""


def check_types(entry: Entry, opener: Opener, types: ColumnTypes) -> None:
    """Raise ValueError for a column of a Parquet file that has another type than MEDS gives it.

    Widths may differ (float64 for float), and so may dictionaries. A column without values may have
    any type.
    """
    if not entry.name.lower().endswith(".parquet"):
        return
    for field in read_schema(entry, opener):
        if field.name not in types:
            continue
        fits, wanted = types[field.name]
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if not fits(kind) and not pa.types.is_null(kind):
            raise ValueError(
                f"{entry.name}: column {field.name!r} has the type {field.type}, where MEDS has "
                f"{wanted}; convert it"
            )
