"""MEDS, the Medical Event Data Standard: one row a label, with the record up to that time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine import records
from pipeline.prepare.engine.grouped import Entities, EventReader, Events, EventTables
from pipeline.prepare.engine.importing import Notes, Row, first_few, split_of
from pipeline.prepare.engine.inputs import InputSplit
from pipeline.prepare.engine.records import YEAR, RecordsImporter, Windows
from pipeline.prepare.readers.archives import Listing, Opener, listing
from pipeline.prepare.readers.csv_blocks import Column, RowCounts, batches, read_table, split_table

TABLE = "data"
DATA = {
    "subject_id": Column("id"),
    "time": Column("moment"),
    "code": Column("text"),
    "numeric_value": Column("number", False),
    "text_value": Column("text", False),
}
SPLITS_FILE, DATASET_FILE = "metadata/subject_splits.parquet", "metadata/dataset.json"
SPLITS = {"train": "train", "tuning": "validation", "held_out": "test"}
"""MEDS's names of splits; others are read as those of any publisher."""
BIRTH = "MEDS_BIRTH"
SPANS = {name: pa.int64() for name in ("subject_id", "first", "last")}
BIRTHS = {"subject_id": pa.int64(), "time": pa.int64()}
STATIC = {
    "subject_id": pa.int64(),
    "code": pa.string(),
    "numeric_value": pa.float64(),
    "text_value": pa.string(),
}
"""Columns of what a pass over the data finds, also of a file without rows."""
AGE, CODES = "Age", "codes"
"""Static features that are made here."""


class MedsOptions(Options):
    labels: str = Field(
        "",
        description="label table (Parquet or CSV, a file or a folder): one row a label; empty: one "
        "row a subject, without labels, that ends with its last event",
    )
    label: Literal["", "boolean_value", "integer_value", "float_value", "categorical_value"] = (
        Field("", description="the column of labels; empty: the only one that has values")
    )
    history: float = Field(
        24.0 * 366,
        gt=0,
        le=24 * 366,
        description="hours before the prediction time from which events enter; modality events "
        "reads a year at most",
    )
    characters: int = Field(
        32,
        ge=0,
        description="a text value of up to so many characters is a category; longer ones, such as "
        "notes, are left out",
    )


class Subjects(NamedTuple):
    """What one pass over the data finds of each subject.

    Attributes:
        spans: subject_id, `first` and `last`, in microseconds since 1970, of timed events, sorted;
            `first` is after `last` where there are none.
        born: subject to microseconds since 1970.
        static: rows without a time: subject_id, code, numeric_value, text_value.
    """

    spans: pa.Table
    born: dict[int, int]
    static: pa.Table


@register("importer", "meds", options=MedsOptions)
class Meds(RecordsImporter):
    """Patients' events in the Medical Event Data Standard (MEDS 0.4).

    It reads a folder in the standard: data/**/*.parquet, and if present
    metadata/subject_splits.parquet and metadata/dataset.json.

    --set labels=TASK gives one row a label (boolean_value, integer_value, float_value or
    categorical_value), with the events up to and including its prediction_time, as the standard
    says. Later events never enter. Without labels, one row a subject, to pretrain on.

    Columns: entity and patient (subject_id), times (hours, from -history to 0, the prediction
    time), variables, values, events, static, prediction_time, label, split. A job reads them with
    modality {events: {before: 720, hours: 1}}.

    Variables: CODE: number for an event with a number, CODE: TEXT for one with a short text, CODE
    for one with neither; the last two have the value 1. Measurements without a time are static:
    numbers under their code, others in the list codes. Age, in years at the prediction time, is
    made of MEDS_BIRTH.

    Splits: train, tuning (validation) and held_out (test); without subject_splits all rows are
    train: cut by patient. Subjects without labels, or without a split, are counted and left out.
    """

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        if o.label and not o.labels:
            raise ValueError(
                f"--set label={o.label}: a column of the label table; name that too: --set "
                "labels=FILE"
            )

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        found = listing(source).without_common_folder(keep=("data", "metadata"))
        taken = [
            entry
            for entry in found.entries
            if entry.name.startswith("data/") and entry.suffix == ".parquet"
        ]
        if not taken:
            raise ValueError(
                f"{source}: no data/**/*.parquet there, where MEDS has its events; give the folder "
                "that holds data and metadata"
            )
        with Opener() as opener:
            for entry in taken:
                records.check_types(entry, opener, records.DATA_TYPES)
            self._parts = [part for entry in taken for part in split_table(TABLE, entry, cut_bytes)]
            self._splits = _splits(found, opener)
            self._about = _about(found, opener)
        fingerprint = f"{found.fingerprint} {self.labels.fingerprint if self.labels else ''}"
        return EventTables([[part] for part in self._parts], fingerprint)

    # ---------------------------------------------------------------- rows

    def entities(self, source: str) -> Entities:
        found = _subjects(self._parts)
        notes: Notes = {"subjects": len(found.spans)}
        rows, invalid = self.rows_of_persons(found.spans, "subjects", notes)
        if self._splits is not None:
            split = np.array(
                [self._splits.get(subject, "") for subject in rows["patient"].to_pylist()],
                dtype=object,
            )
            notes["rows of subjects without a split, left out"] = int(np.count_nonzero(split == ""))
            rows = rows.append_column("split", pa.array(split, pa.string())).filter(
                pa.array(split != "")
            )
            if not len(rows):
                raise ValueError(
                    f"{source}: {SPLITS_FILE} has no split for any subject of the rows; get the "
                    "one of this data"
                )
        else:
            rows = rows.append_column("split", pa.array(["train"] * len(rows), pa.string()))
        static, twice = _static(rows, found, self.options.characters)
        notes["static measurements"] = len(found.static)
        notes["static numbers of a subject given again, of which the first is kept"] = twice
        rows = rows.append_column("static", static)
        zero = rows["prediction_time"].cast(pa.int64()).to_numpy()
        keys = Windows(rows["patient"].to_numpy(), zero - self.history, zero, zero)
        if not self.labels:
            rows = rows.drop_columns("prediction_time")
        info = {
            "time": "hours before the prediction time, which is 0"
            if self.labels
            else "hours before the subject's last event, which is 0",
            "static": [field.name for field in static.type],
            "outcomes": ["label"] if self.labels else [],
            "label": self.labels.column if self.labels else "none",
            "history": self.options.history,
            **self._about,
        }
        shown = {name: count for name, count in notes.items() if count or name == "subjects"}
        return Entities(rows, keys, "patient", invalid, shown, info)

    # ---------------------------------------------------------------- events

    def events(self, reader: EventReader) -> Iterator[Events]:
        for batch in reader.batches(DATA):
            timed = batch.filter(pc.is_valid(batch["time"]))  # the others are static
            for column in ("subject_id", "code"):
                reader.count(f"no {column}", timed[column].null_count)
                timed = timed.filter(pc.is_valid(timed[column]))
            named = records.name_events(
                timed["code"],
                timed["numeric_value"],
                timed["text_value"],
                pa.nulls(len(timed), pa.string()),
                self.options.characters,
                reader.dropped,
            )
            subjects, times = timed["subject_id"].to_numpy(), timed["time"].to_numpy()
            yield from reader.keys.events(subjects, times, *named, reader)


def _splits(found: Listing, opener: Opener) -> dict[int, str] | None:
    """Return the split of each subject, or None without metadata/subject_splits.parquet."""
    entry = next((entry for entry in found.entries if entry.name == SPLITS_FILE), None)
    if entry is None:
        return None
    records.check_types(entry, opener, records.SPLIT_TYPES)
    table = read_table(
        "splits", entry, {"subject_id": Column("id"), "split": Column("text")}, opener
    )
    names = table["split"].drop_null().unique().to_pylist()
    known = {name: SPLITS.get(name) or split_of(name) for name in names}
    if unknown := sorted(name for name, split in known.items() if not split):
        raise ValueError(
            f"{entry.name}: splits called {first_few(unknown)}; in MEDS they are called "
            f"{', '.join(SPLITS)}: rename them"
        )
    pairs = zip(table["subject_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    out: dict[int, str] = {}
    for row, (subject, name) in enumerate(pairs, 1):
        if subject is None or name is None:
            continue
        if out.setdefault(subject, known[name]) != known[name]:
            raise ValueError(
                f"{entry.name}: row {row} gives a subject another split than a row before; a "
                "subject has one split: remove the other"
            )
    return out


def _about(found: Listing, opener: Opener) -> dict[str, str]:
    """Return name, version and licence of the data set, as far as metadata/dataset.json has them.

    Raises ValueError for a file that is not JSON.
    """
    entry = next((entry for entry in found.entries if entry.name == DATASET_FILE), None)
    if entry is None:
        return {}
    with opener(entry) as handle:
        raw = handle.read()
    try:
        about = json.loads(raw)
    except ValueError:
        raise ValueError(f"{entry.name}: not JSON; repair or remove it") from None
    names = ("dataset_name", "dataset_version", "license", "meds_version")
    return {
        name: str(about[name])
        for name in names
        if isinstance(about, dict) and about.get(name) is not None
    }


# ---------------------------------------------------------------- subjects


def _subjects(parts: list[InputSplit]) -> Subjects:
    """Read all data once: memory grows with subjects and static measurements, not with events."""
    timed, born, static = _nothing()
    for one in threaded_map(_subjects_of, parts, threads=4):
        for held, found in zip((timed, born, static), one, strict=True):
            held.append(found)
    spans = records.merge_spans(timed)
    for place, (name, none) in enumerate({"first": 1, "last": 0}.items(), 1):
        spans = spans.set_column(place, name, spans[name].fill_null(none))
    births = pa.concat_tables(born)
    return Subjects(
        spans,
        dict(zip(births["subject_id"].to_pylist(), births["time"].to_pylist(), strict=True)),
        pa.concat_tables(static),
    )


def _nothing() -> tuple[list[pa.Table], list[pa.Table], list[pa.Table]]:
    """Return lists that tables of SPANS, BIRTHS and STATIC are appended to."""
    spans, births, static = (
        [pa.schema(columns).empty_table()] for columns in (SPANS, BIRTHS, STATIC)
    )
    return spans, births, static


def _subjects_of(part: InputSplit) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return (first and last time of each subject, births, rows without a time) of a piece."""
    spans, born, static = _nothing()
    with Opener() as opener:
        for batch in batches(part, DATA, opener, RowCounts()):
            batch = batch.filter(
                pc.and_(pc.is_valid(batch["subject_id"]), pc.is_valid(batch["code"]))
            )
            spans.append(
                batch.group_by("subject_id")
                .aggregate([("time", "min"), ("time", "max")])
                .rename_columns({"time_min": "first", "time_max": "last"})
            )
            is_birth = pc.and_(pc.equal(batch["code"], BIRTH), pc.is_valid(batch["time"]))
            born.append(batch.select(["subject_id", "time"]).filter(is_birth))
            static.append(batch.filter(pc.is_null(batch["time"])).drop_columns("time"))
    return records.merge_spans(spans), pa.concat_tables(born), pa.concat_tables(static)


def _static(rows: pa.Table, found: Subjects, characters: int) -> tuple[pa.Array, int]:
    """Return (the static features of each row, how many numbers are given again).

    Numbers have a field each, named by their code; others stand in the list `codes`.
    """
    table = found.static
    named = records.name_events(
        table["code"],
        table["numeric_value"],
        table["text_value"],
        pa.nulls(len(table), pa.string()),
        characters,
        Counter(),
    )
    is_number = np.char.endswith(np.array(named.names, dtype=np.str_), f": {records.NUMBER}")
    facts: dict[int, Row] = {}
    twice = 0
    pairs = zip(table["subject_id"].to_pylist(), named.codes, named.values, strict=True)
    for subject, code, value in pairs:
        own = facts.setdefault(subject, {})
        if not is_number[code]:
            listed = own.setdefault(CODES, [])
            listed += [named.names[code]] if named.names[code] not in listed else []
            continue
        name = named.names[code].removesuffix(f": {records.NUMBER}")
        if name in (AGE, CODES):
            raise ValueError(
                f"{TABLE}: a static measurement has the code {name}, which is the name of a "
                "feature that is made here; rename that code"
            )
        twice += name in own
        own.setdefault(name, float(value))
    numbers = sorted({name for own in facts.values() for name in own} - {CODES})
    kind = pa.struct(
        [
            *([pa.field(AGE, pa.float64())] if found.born else []),
            *(pa.field(name, pa.float64()) for name in numbers),
            pa.field(CODES, pa.list_(pa.string())),
        ]
    )
    out = []
    zero = rows["prediction_time"].cast(pa.int64()).to_pylist()
    for subject, time in zip(rows["patient"].to_pylist(), zero, strict=True):
        born = found.born.get(subject)
        age = None if born is None or born > time else (time - born) / YEAR
        out.append({CODES: [], **facts.get(subject, {}), AGE: age})
    return pa.array(out, kind), twice
