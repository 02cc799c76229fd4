"""Any long table of events (whose, when, what, how much) to one row an entity."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes, filled, is_number, joined
from pipeline.data.csv_tables import CsvFile
from pipeline.io import file_identity, storage
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine.grouped import (
    Entities,
    EventReader,
    Events,
    EventTables,
    GroupedImporter,
    variable_codes,
)
from pipeline.prepare.engine.importing import (
    Info,
    InvalidRow,
    check_columns,
    first_few,
    first_reason,
    invalid_rows,
    is_repeated,
    parse_names,
)
from pipeline.prepare.engine.inputs import InputSplit, find_inputs
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import (
    COLUMN_TYPES,
    NULLS,
    SUFFIXES,
    Column,
    RowCounts,
    batches,
    check_zones,
    epoch_times,
    read_schema,
    split_table,
    timezone_awareness,
    without_nulls,
)

HOURS = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600, "days": 24.0}
MICROSECONDS_PER_HOUR = 3_600_000_000
TABLE = "events"
MAX_HOURS = 100_000
"""More than eleven years from an entity's start: probably absolute times, written as numbers."""


class EventsOptions(Options):
    entity: str = Field(
        "entity",
        description="the column that says whose event it is (a stay, a machine), in both tables",
    )
    time: str = Field("time", description="the column that says when")
    variable: str = Field("variable", description="the column that says what was measured or done")
    value: str = Field(
        "value",
        description="the column of numbers, or of texts such as <0.1; empty: every event has the "
        "value 1",
    )
    unit: Literal["hours", "minutes", "seconds", "days", "timestamp"] = Field(
        "hours", description="of the times; timestamp: see start"
    )
    start: str = Field(
        "",
        description="with unit=timestamp: the column of the entities' table that says when the "
        "entity's time begins",
    )
    entities: str = Field(
        "",
        description="table with one row an entity (CSV or Parquet): facts and outcomes; empty: "
        "entities are those that have events",
    )
    static: str = Field(
        "",
        description="columns of the entities' table that are known at the start, such as "
        "Age,Gender: inputs",
    )
    outcomes: str = Field(
        "", description="columns of it that labels are made of, never inputs; empty: all others"
    )
    group: str = Field(
        "",
        description="the column of it by which splits are cut, such as subject_id: rows have it "
        "as patient",
    )
    split: Literal["train", "validation", "test"] = Field(
        "train", description="the split of all rows"
    )
    clean: Literal["none", "clinical"] = Field(
        "none",
        description="clinical: canonical units and plausible ranges by variable name "
        "(clinical/ranges.csv)",
    )
    newlines: bool = Field(
        True,
        description="false: no field holds a line end, so that a large CSV file is read by "
        "several tasks at a time",
    )


@register("importer", "events", options=EventsOptions)
class LongTable(GroupedImporter):
    """Events of patients, machines, ... in long tables, with a row for each event.

    It reads a table with the columns entity, time, variable and value (CSV, also .gz or .zst, or
    Parquet), and if there is one a table with a row for each entity. Memory does not grow with the
    table.

    Columns: entity, patient (with `--set group`), times (hours since the start), variables, values,
    events (their number), static (`--set static`), and the outcomes.

    - Ids from CSV are texts, unchanged (01 is not 1); those of Parquet may be whole numbers.
    - A text such as <0.1 counts as its bound. What is no number is left out and counted by reason.
    - Exact duplicates, and events of entities that are not in the entities' table, are left out and
      counted.
    - Times are float32: exact to a fraction of a second up to 2,000 hours, to 14 seconds at 50,000.
      Equal values of a variable at times that are then equal count as duplicates.
    """

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        o = self.options
        if (o.unit == "timestamp") != bool(o.start):
            raise ValueError(
                f"--set unit={o.unit} start={o.start}: times that are timestamps need "
                "start=COLUMN of the entities' table, others have none"
            )
        for name in ("static", "outcomes", "group", "start"):
            if getattr(o, name) and not o.entities:
                raise ValueError(
                    f"--set {name}={getattr(o, name)}: it is a column of the entities' table; "
                    "give that: --set entities=FILE"
                )
        if o.entities and not storage.exists(o.entities):
            raise ValueError(f"{o.entities}: no such file for --set entities")
        found = find_inputs(source, SUFFIXES, o.split)
        taken = [
            entry
            for entry, _ in found.files
            if not o.entities or storage.absolute(entry.uri) != storage.absolute(o.entities)
        ]
        if not taken:
            raise ValueError(
                f"{source}: no table but that of the entities; name the table of events"
            )
        with Opener() as opener:
            self._parts = [
                part for entry in taken for part in split_table(TABLE, entry, cut_bytes, o.newlines)
            ]
            self._kind = "id" if _is_whole(taken[0], o.entity, opener) else "text"
        fingerprints = [
            found.fingerprint,
            *([file_identity.fingerprint(storage.absolute(o.entities))] if o.entities else []),
            *([plausible.fingerprint()] if o.clean != "none" else []),
        ]
        return EventTables([[part] for part in self._parts], " ".join(fingerprints), found.notes)

    def entities(self, source: str) -> Entities:
        o = self.options
        if not o.entities:
            ids = self._ids()
            splits = pa.array([o.split] * len(ids), pa.string())
            rows = pa.table({"entity": ids, "split": splits})
            return Entities(
                rows, {"ids": ids, "start": None, "start_zoned": set()}, info=self._info([], [])
            )
        name = o.entities.rpartition("/")[2]
        table = _table(o.entities, (o.entity, o.group))
        columns = table.column_names
        static, outcomes = (parse_names(text) for text in (o.static, o.outcomes))
        check_columns(
            name,
            columns,
            ("entity", o.entity),
            *(("static", one) for one in static),
            *(("outcomes", one) for one in outcomes),
            ("group", o.group),
            ("start", o.start),
        )
        outcomes = outcomes or [
            one for one in columns if one not in {o.entity, o.group, o.start, *static}
        ]
        taken = {"entity", "patient", "times", "variables", "values", "events", "static", "split"}
        if clash := taken.intersection(outcomes):
            raise ValueError(
                f"{name}: an outcome is called {min(clash)!r}, as a column that rows have "
                "anyway; rename it or leave it out of --set outcomes"
            )
        for option, one in (("entity", o.entity), ("group", o.group)):
            if one:
                table = table.set_column(
                    columns.index(one),
                    one,
                    _ids(table[one], f"{name}: column {one!r} for --set {option}"),
                )
        table, invalid = self._good(table, name)
        out = {
            "entity": table[o.entity],
            **({"patient": table[o.group]} if o.group else {}),
            **({"static": _struct(table, static)} if static else {}),
            **{one: table[one] for one in outcomes},
        }
        rows = pa.table(
            {**out, "split": pa.array([o.split] * len(table), pa.string())}
        ).combine_chunks()
        start = epoch_times(table[o.start], "us")[0] if o.start else None
        zoned = timezone_awareness(table[o.start]) if o.start else set()
        ids = rows["entity"].combine_chunks()
        keys = {"ids": ids, "start": start, "start_zoned": zoned}
        return Entities(
            rows,
            keys,
            "patient" if o.group else "entity",
            invalid,
            info=self._info(static, outcomes),
        )

    def _good(self, table: pa.Table, name: str) -> tuple[pa.Table, list[InvalidRow]]:
        """Return (the valid rows by their ids; the others by position, counted from 1)."""
        o = self.options
        ids = table[o.entity].combine_chunks()
        masks = [
            (~np.asarray(ids.is_valid()), "no entity id"),
            (is_repeated(dictionary_codes(ids)[0]), "the same entity id again"),
        ]
        if o.group:
            masks.append((np.asarray(joined(table[o.group]).is_null()), "no group"))
        if o.start:
            masks.append((~epoch_times(table[o.start])[1], "no start"))
        reasons = first_reason(*masks)
        table = table.filter(pa.array(reasons == ""))
        invalid = invalid_rows(name, o.split, reasons)
        return table.take(pc.sort_indices(table[o.entity])), invalid

    def _info(self, static: list[str], outcomes: list[str]) -> Info:
        return {
            "time": "hours since the entity's start",
            "static": static,
            "outcomes": outcomes,
            "clean": self.options.clean,
        }

    def _ids(self) -> pa.Array:
        """Return all entities that have events, sorted: one pass over that column."""
        ids = pa.array([], COLUMN_TYPES[self._kind])
        columns = {self.options.entity: Column(self._kind)}
        with Opener() as opener:
            for part in self._parts:
                for batch in batches(part, columns, opener, RowCounts()):
                    own = pc.unique(_trimmed(batch.column(0).combine_chunks()))
                    ids = pc.unique(pa.concat_arrays([ids, pc.drop_null(own)]))
        return ids.take(pc.sort_indices(ids))

    def events(self, reader: EventReader) -> Iterator[Events]:
        o, keys, zoned = self.options, reader.keys, reader.tally.zoned
        ids = keys["ids"]
        columns = {
            o.entity: Column("id" if pa.types.is_integer(ids.type) else "text"),
            o.time: Column("moment" if o.unit == "timestamp" else "number"),
            o.variable: Column("text"),
            **({o.value: Column("number")} if o.value else {}),
        }
        if len(columns) < 3 + bool(o.value):
            raise ValueError(
                f"--set entity={o.entity} time={o.time} variable={o.variable} value={o.value}: "
                "two of them are the same column"
            )
        events_times = f"{reader.input_split.entry.name}, column {o.time!r}"
        entities_times = f"{o.entities.rpartition('/')[2]}, column {o.start!r}"
        ranges = plausible.Ranges()
        for batch in reader.batches(columns):
            check_zones(events_times, zoned, entities_times, keys["start_zoned"])
            own = _trimmed(batch[o.entity].combine_chunks())
            rows = filled(pc.index_in(own, value_set=ids), -1)
            hours, timed = self._hours(batch[o.time], rows, keys["start"], reader.input_split)
            names, codes = variable_codes(pc.utf8_trim_whitespace(batch[o.variable]))
            numbers = plausible.numbers(batch[o.value]) if o.value else None
            values = numbers.values if numbers else np.ones(len(batch))
            reader.begin(len(batch))
            reader.drop("no such entity", rows < 0)
            reader.drop("no variable", codes < 0)
            reader.drop("no time", ~timed)
            if numbers:
                reader.drop_by_code(plausible.REASONS, numbers.reasons)
            good = reader.good
            if numbers:
                reader.dropped[plausible.CENSORED] += int(np.count_nonzero(good & numbers.censored))
            events = Events(rows, hours, codes, names, values).filter(good)
            is_clinical = o.clean == "clinical"
            yield plausible.canonical(events, ranges, reader) if is_clinical else events

    def _hours(
        self,
        column: Any,
        rows: np.ndarray,
        start: np.ndarray | None,
        part: InputSplit,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ((n,) hours since the entity's start, (n,) whether they are known).

        Raises ValueError for numbers that cannot be such hours.
        """
        if start is not None:
            microseconds = column.fill_null(0).to_numpy()
            return (microseconds - start[rows]) / MICROSECONDS_PER_HOUR, np.asarray(
                column.is_valid()
            )
        found = plausible.numbers(column)
        hours, timed = found.values * HOURS[self.options.unit], found.reasons == 0
        if far := np.count_nonzero(timed & (rows >= 0) & (np.abs(hours) > MAX_HOURS)):
            raise ValueError(
                f"{part.entry.name}: {far} of {len(hours)} "
                f"rows are more than {MAX_HOURS} hours from the entity's start, with --set "
                f"unit={self.options.unit}; name their unit, or if they are absolute, write them "
                "as timestamps (2101-10-20 19:08:00) and give unit=timestamp and start=COLUMN of "
                "the entities' table"
            )
        return hours, timed


def _is_whole(entry: Any, column: str, opener: Opener) -> bool:
    """Tell whether a Parquet column has whole numbers. Raises ValueError if it is missing."""
    found = read_schema(entry, opener)
    if column not in found.names:
        column = next((name for name in found.names if name.lower() == column.lower()), column)
    check_columns(entry.name, found.names, ("entity", column))
    return pa.types.is_integer(found.field(column).type)


def _table(uri: str, ids: tuple[str, ...]) -> pa.Table:
    """Read a table with one row an entity: whole numbers as int64, texts as strings; `ids` of CSV
    are texts.

    Raises ValueError for a file that is no such table.
    """
    found = find_inputs(uri, SUFFIXES, "all")
    if len(found.files) != 1:
        names = first_few(entry.name for entry, _ in found.files)
        raise ValueError(
            f"{uri}: {len(found.files)} tables ({names}) for --set entities; name one file"
        )
    entry = found.files[0][0]
    with Opener() as opener:
        try:
            if entry.name.lower().endswith(".parquet"):
                with opener(entry) as handle:
                    table = pq.read_table(handle)
            else:
                texts = {name: pa.string() for name in ids if name}
                file = CsvFile(partial(opener, entry), entry.name, types=texts, nulls=NULLS)
                table = pa.concat_tables(file.tables())
                if pa.binary() in table.schema.types:
                    raise ValueError("not UTF-8 text")
                table = pa.table(
                    {name: without_nulls(table[name], True) for name in table.column_names}
                )
        # Arrow's words may hold a row: they are not shown
        except (ValueError, OSError, EOFError, zlib.error):
            raise ValueError(
                f"{entry.name}: not a whole table with one row an entity; download it again"
            ) from None
    return pa.table({field.name: _plain(table[field.name], field.type) for field in table.schema})


def _plain(column: Any, kind: pa.DataType) -> Any:
    if pa.types.is_dictionary(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind):
        with suppress(pa.ArrowInvalid):  # more than an int64 holds
            return column.cast(pa.int64())
    return column


def _ids(column: Any, what: str) -> Any:
    """Convert a column of ids to int64 or strings. Raises ValueError for another type."""
    kind = column.type
    if pa.types.is_string(kind):
        return _trimmed(column)
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        with suppress(pa.ArrowInvalid):  # a fraction, or more than an int64 holds
            return column.cast(pa.int64())
    raise ValueError(
        f"{what} has the type {kind}, where ids are whole numbers (to 2^63) or texts; convert "
        "it to texts"
    )


def _trimmed(column: Any) -> Any:
    """Strip ids, and set those that mean nothing to null."""
    if not pa.types.is_string(column.type):
        return column
    return without_nulls(pc.utf8_trim_whitespace(column), False)


def _struct(table: pa.Table, names: list[str]) -> pa.Array:
    """Return static features as a struct.

    Raises ValueError for a column that holds no numbers, texts or lists of texts.
    """
    fields = []
    for name in names:
        column = table[name].combine_chunks()
        kind = column.type
        if is_number(kind) or pa.types.is_boolean(kind):
            column = column.cast(pa.float64())
        elif not (
            pa.types.is_string(kind)
            or (pa.types.is_list(kind) and pa.types.is_string(kind.value_type))
        ):
            raise ValueError(
                f"--set static={name}: a column of the type {kind}; facts are numbers, texts "
                "or lists of texts"
            )
        fields.append(column)
    return pa.StructArray.from_arrays(fields, names=names)
