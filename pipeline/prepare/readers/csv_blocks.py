"""Read long tables in batches of columns: CSV (also compressed, and in byte ranges) and Parquet.

Columns may be in any order and case. What is read at a time is a block of some MiB, and nothing is
done for each row in Python. No error message holds a value of the table.

pyarrow parses; the fields of CSV are texts at first. What it and duckdb do not do is here: byte
ranges, by which many tasks read one file, and an error where some times have a zone and others
none.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import filled, is_bytes, is_text
from pipeline.data.csv_tables import open_csv
from pipeline.prepare.engine.inputs import (
    SQUEEZED,
    InputFiles,
    InputSplit,
    SplitReader,
    plain_suffix,
)
from pipeline.prepare.readers import parquet
from pipeline.prepare.readers.archives import Entry, FileRange, Opener, is_gzipped

BLOCK_BYTES, BATCH_ROWS = 1 << 20, 16384
"""What is read of CSV and of Parquet at a time."""
TABLE_EXPANSION = 8
"""Estimated bytes of text in a byte of a compressed table (CHARTEVENTS: 33 GB in 4.2)."""
SUFFIXES = (".csv", ".tsv", ".parquet")
INSTANT = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,9})?)?)?$"
ZONED = r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d{1,9})?)? ?([Zz]|[+-]\d\d(:?\d\d)?)$"
"""A time with its zone (ISO 8601: Z, +02:00, +0200, +02)."""
MIXED_ZONES = (
    "some of its times have a zone (Z, +02:00) and others none, so nobody can tell how far apart "
    "they are; write all of them in one way"
)
MAX_ID = str(np.iinfo(np.int64).max)
BAD_LINE = "another number of fields than the header has"
NULLS = ["", "NULL", "NA", "NaN", "nan"]
"""Fields that mean nothing, except in columns of texts: a drug may be called nan."""
COLUMN_TYPES = {
    "id": pa.int64(),
    "number": pa.float64(),
    "time": pa.timestamp("s"),
    "moment": pa.timestamp("us"),
    "text": pa.string(),
    "numbers": pa.list_(pa.float64()),
}
"""`moment`: a time with fractions of a second, as int64 microseconds since 1970. `numbers`: a list
of numbers (Parquet only).
"""


class Column(NamedTuple):
    """A wanted column: its kind, and whether the table must have it."""

    kind: str
    needed: bool = True


@dataclass
class RowCounts:
    """Counts of one pass.

    Attributes:
        rows: rows that were read.
        bad: lines that are no rows.
        listed: the first of them, as place and reason.
        zoned: whether the times had a zone; both values where some had one and some had none.
    """

    rows: int = 0
    bad: int = 0
    listed: list[str] = field(default_factory=list)
    zoned: set[bool] = field(default_factory=set)

    def line(self, place: str, reason: str) -> str:
        self.bad += 1
        if len(self.listed) < 3:
            self.listed.append(f"{place}: {reason}")
        return "skip"


def split_table(
    table: str,
    entry: Entry,
    most: int,
    has_line_ends: bool = False,
) -> list[InputSplit]:
    """Cut a table into input splits of about `most` bytes of text.

    A compressed table is read whole from its start, and so is CSV whose fields may hold a line end.
    """
    if _is_parquet(entry):
        return [
            part._replace(name=table, size=max(1, 3 * part.size))
            for part in parquet.split_files(InputFiles([(entry, "")], {}, ""), most)
        ]
    squeezed = entry.name.lower().endswith(SQUEEZED)
    is_whole = squeezed or entry.member or is_gzipped(entry.uri) or has_line_ends
    count = 1 if is_whole else max(1, -(-entry.size // most))
    bounds = [entry.size * i // count for i in range(count)] + [-1]
    size = max(1, entry.size * (TABLE_EXPANSION if squeezed else 1) // count)
    return [InputSplit(table, "", entry, start, stop, size) for start, stop in pairwise(bounds)]


def table_name(entry: Entry) -> str:
    """Return the name without folder and suffixes: chartevents of a/CHARTEVENTS.csv.gz."""
    return posixpath.basename(entry.name).lower().split(".")[0]


def find_tables(entries: list[Entry], names: Collection[str], source: str) -> dict[str, Entry]:
    """Return the tables of some names, by name. Raises ValueError for one that is there twice."""
    tables: dict[str, Entry] = {}
    for entry in entries:
        name = table_name(entry)
        if plain_suffix(entry.name) not in SUFFIXES or name not in names:
            continue
        if name in tables:
            raise ValueError(
                f"{source}: table {name} stands there twice ({tables[name].name}, {entry.name}); "
                "keep one"
            )
        tables[name] = entry
    return tables


def batches(
    part: InputSplit,
    columns: dict[str, Column],
    opener: Opener,
    tally: RowCounts,
) -> Iterator[pa.Table]:
    """Yield the rows of an input split as tables with all of `columns`, in that order.

    A value is null where a field is empty or not of its column's kind, and where the table has no
    such column.

    Args:
        part: what to read.
        columns: wanted columns by their lower-case names. Kinds: id: int64; number: float64 or
            text; time: seconds; text.
        opener: opens the files.
        tally: takes the counts.

    Raises:
        ValueError: a missing column, a file that is no table, or one that ends early.
    """
    entry = part.entry
    picked = _picked(entry, read_schema(entry, opener).names, columns)
    read = _of_parquet if _is_parquet(entry) else _of_csv
    for block in read(part, list(dict.fromkeys(picked.values())), opener, tally):
        tally.rows += len(block)
        _see_zones(
            {own: (block[own], columns[name].kind) for name, own in picked.items()}, entry, tally
        )
        converted: dict[str, Any] = {}
        for name, column in columns.items():
            if name not in picked:
                converted[name] = pa.nulls(len(block), COLUMN_TYPES[column.kind])
                continue
            values = block[picked[name]].combine_chunks()
            if read is _of_csv:
                values = without_nulls(values, column.kind == "text")
            converted[name] = _fitting(values, column.kind, picked[name], entry)
        yield pa.table(converted)


def read_table(
    table: str,
    entry: Entry,
    columns: dict[str, Column],
    opener: Opener,
    tally: RowCounts | None = None,
) -> pa.Table:
    """Read a small table at once, as `batches` does.

    Raises ValueError also for lines that are no rows, naming the first.
    """
    tally = tally or RowCounts()
    blocks = list(batches(InputSplit(table, "", entry), columns, opener, tally))
    if tally.bad:
        raise ValueError(
            f"{tally.listed[0]}; {tally.bad} such lines: repair the table or download it again"
        )
    return (
        pa.concat_tables(blocks).combine_chunks()
        if blocks
        else pa.table(
            {name: pa.array([], COLUMN_TYPES[column.kind]) for name, column in columns.items()}
        )
    )


def read_schema(entry: Entry, opener: Opener) -> pa.Schema:
    """Return a table's columns, unchanged; those of CSV are texts."""
    reading = SplitReader(InputSplit(entry.name, "", entry), opener)
    if _is_parquet(entry):
        with parquet.open_split(reading) as file:
            return file.schema_arrow
    with reading.open() as handle:
        return pa.schema([(name, pa.string()) for name in _header(entry, handle)[0]])


def epoch_times(column: Any, unit: str = "s") -> tuple[np.ndarray, np.ndarray]:
    """Convert times, or texts such as 2101-10-20T19:08:00+02:00, to whole seconds.

    Args:
        column: (n,) The times.
        unit: "us": to microseconds instead.

    Returns:
        ((n,) int64 seconds since 1970, UTC where there is a zone; (n,) bool whether there is a
            time).

    Raises:
        ValueError: another type, or texts of which some have a zone and others none.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = _times(array)
    elif not pa.types.is_timestamp(array.type) and not pa.types.is_date(array.type):
        raise ValueError(
            f"a column of times has the type {array.type}; it must hold times or texts such as "
            "2101-10-20 19:08:00"
        )
    is_valid = np.asarray(array.is_valid())
    zone = array.type.tz if pa.types.is_timestamp(array.type) else None
    whole = array.cast(pa.timestamp(unit, tz=zone), safe=False).cast(pa.int64())
    return filled(whole, 0), is_valid


def timezone_awareness(column: Any) -> set[bool]:
    """Return whether the times of a column have a zone: {True}, {False}, both, or an empty set."""
    if column.null_count == len(column):
        return set()
    if pa.types.is_dictionary(column.type):
        return timezone_awareness(column.cast(column.type.value_type))
    if pa.types.is_timestamp(column.type):
        return {column.type.tz is not None}
    if not is_text(column.type):
        return {False}
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    if _cast_times(text) is not None:
        return {False}
    found = {True: ZONED, False: INSTANT}
    return {
        zoned
        for zoned, pattern in found.items()
        if pc.any(pc.match_substring_regex(text, pattern)).as_py()
    }


def _cast_times(text: Any) -> Any:
    """Return texts as times if all are without a zone, the usual case; else None."""
    # Arrow reads 2101-10-20 19, which INSTANT does not
    if not pc.any(pc.equal(pc.binary_length(text), len("2101-10-20 19"))).as_py():
        with suppress(pa.ArrowInvalid):
            return text.cast(pa.timestamp("us"))
    return None


def _times(array: Any) -> Any:
    """Parse texts as times (UTC where they have a zone), null where they are none.

    Raises ValueError where some have a zone and others none.
    """
    text = pc.utf8_trim_whitespace(array)
    if (found := _cast_times(text)) is not None:
        return found
    with_zone = timezone_awareness(text)
    if len(with_zone) == 2:
        raise MixedZonesError(MIXED_ZONES)
    is_zoned = True in with_zone
    good = pc.match_substring_regex(text, ZONED if is_zoned else INSTANT)
    text = pc.if_else(good, text, None)
    if is_zoned:
        text = pc.utf8_upper(
            pc.replace_substring_regex(text, r" ?([Zz]|[+-]\d\d(:?\d\d)?)$", r"\1")
        )
    with suppress(pa.ArrowInvalid):
        return text.cast(pa.timestamp("us", tz="UTC" if is_zoned else None)).cast(
            pa.timestamp("us")
        )
    # A day such as the 31st of June: rare
    return pa.array([_instant(one) for one in text.to_pylist()], pa.timestamp("us"))


class MixedZonesError(ValueError):
    """Some times of a column have a zone and others none."""


def _instant(text: str | None) -> Any:
    from datetime import UTC, datetime

    with suppress(ValueError):
        found = datetime.fromisoformat(text) if text else None
        return found.astimezone(UTC).replace(tzinfo=None) if found and found.tzinfo else found
    return None


# ---------------------------------------------------------------- the two formats


def _is_parquet(entry: Entry) -> bool:
    return entry.name.lower().endswith(".parquet")


def _picked(
    entry: Entry,
    names: list[str],
    columns: dict[str, Column],
) -> dict[str, str]:
    """Map wanted names to the table's own. Raises ValueError for a missing or repeated column."""
    own: dict[str, list[str]] = {}
    for name in names:
        own.setdefault(name.strip().lower(), []).append(name)
    out = {}
    for name, column in columns.items():
        same_name = [name] if names.count(name) == 1 else own.get(name.lower(), [])
        if len(same_name) > 1:
            raise ValueError(
                f"{entry.name}: {len(same_name)} columns are called {name!r}; rename one"
            )
        if same_name:
            out[name] = same_name[0]
        elif column.needed:
            raise ValueError(f"{entry.name}: no column {name!r}; {registry.nearest(name, own)}")
    return out


def _of_parquet(
    part: InputSplit,
    columns: list[str],
    opener: Opener,
    tally: RowCounts,
) -> Iterator[pa.Table]:
    for _, table in parquet.batches(SplitReader(part, opener), columns, BATCH_ROWS):
        yield table


def _see_zones(found: dict[str, tuple[Any, str]], entry: Entry, tally: RowCounts) -> None:
    """Record whether the times of a batch have zones.

    A column of days beside one of times does not count: the day of a time in UTC has no zone.
    Raises ValueError where some times, here or in batches before, have a zone and others none.
    """
    times = {own: column for own, (column, kind) in found.items() if kind in ("time", "moment")}
    is_day = {own: pa.types.is_date(column.type) for own, column in times.items()}
    for own, column in times.items():
        if is_day[own] and not all(is_day.values()):
            continue
        tally.zoned |= timezone_awareness(column)
        if len(tally.zoned) == 2:
            raise MixedZonesError(f"{entry.name}: column {own!r}: {MIXED_ZONES}")


def check_zones(name: str, zoned: set[bool], other: str, other_zoned: set[bool]) -> None:
    """Raise ValueError where the times of one table have a zone and those of another have none.

    Args:
        name, other: what the two are called in the error.
        zoned, other_zoned: whether the times had a zone (`RowCounts`).
    """
    if len(zoned | other_zoned) < 2:
        return
    with_zone, without = (name, other) if True in zoned else (other, name)
    raise ValueError(
        f"{with_zone}: its times have a zone (Z, +02:00), and those of {without} have none: nobody "
        "can tell how far apart they are; write both with a zone, or both without"
    )


def without_nulls(array: Any, text: bool) -> Any:
    """Set texts that mean nothing to null: "" in a column of texts, any of NULLS in others."""
    if not pa.types.is_string(array.type):
        return array
    nothing = pc.is_in(array, value_set=pa.array([""] if text else NULLS))
    return pc.if_else(nothing, None, array)


def _fitting(array: Any, kind: str, name: str, entry: Entry) -> Any:
    """Convert a column to a kind. Raises ValueError naming the column and its type."""
    found = array.type
    is_time = pa.types.is_temporal(found)
    try:
        if is_bytes(found) or (kind in ("id", "number") and is_time):
            raise pa.ArrowInvalid
        return _shape(array, kind)
    except MixedZonesError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
        needed = {
            "id": "whole numbers",
            "number": "numbers",
            "text": "texts",
            "numbers": "lists of numbers",
        }.get(kind, "times, or texts such as 2101-10-20 19:08:00")
        advice = (
            "; if these are times of events, give unit=timestamp and start=COLUMN"
            if kind == "number" and is_time
            else ""
        )
        raise ValueError(
            f"{entry.name}: column {name!r} has the type {found}, where {needed} are "
            f"read{advice or '; convert it'}"
        ) from None


def _shape(array: Any, kind: str) -> Any:
    """Convert a column to a kind; numbers may stay texts, for `plausible.numbers`."""
    if pa.types.is_dictionary(array.type) or is_text(array.type):
        array = array.cast(pa.string())
    if kind == "time":
        seconds, is_valid = epoch_times(array)
        return pa.array(seconds, pa.int64(), mask=~is_valid).cast(COLUMN_TYPES["time"])
    if kind == "moment":
        array = _times(array) if pa.types.is_string(array.type) else array
        if not pa.types.is_temporal(array.type) and not pa.types.is_null(array.type):
            raise pa.ArrowInvalid  # a number would be taken for microseconds since 1970
        return array.cast(pa.timestamp("us", getattr(array.type, "tz", None)), safe=False).cast(
            pa.int64()
        )
    if kind == "id" and pa.types.is_floating(array.type):
        array = pc.if_else(pc.equal(pc.floor(array), array), array, None)
    if kind == "id" and pa.types.is_string(array.type):
        text = pc.utf8_trim_whitespace(array)
        letters = bytes(text.buffers()[2] or b"")
        if b"x" not in letters and b"X" not in letters:  # Arrow reads 0x1F, the pattern does not
            with suppress(pa.ArrowInvalid):  # the usual case, without a pattern
                return text.cast(pa.int64())
        text = pc.if_else(pc.match_substring_regex(text, r"^[+-]?0*\d{1,19}(\.0+)?$"), text, None)
        array = pc.replace_substring_regex(text, r"\.0+$|^\+", "")
        digits = pc.utf8_ltrim(array, "-0")
        fits = pc.or_(pc.less(pc.utf8_length(digits), 19), pc.less_equal(digits, MAX_ID))
        array = pc.if_else(fits, array, None)
    if kind == "number" and pa.types.is_string(array.type):
        return array
    return array.cast(COLUMN_TYPES[kind])


def _header(entry: Entry, handle: BinaryIO) -> tuple[list[str], str, int]:
    """Return (names, delimiter, bytes of the first line)."""
    raw = handle.readline(1 << 20)
    try:
        line = raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(
            f"{entry.name}: its first line is not UTF-8 text; convert the file (iconv -t UTF-8)"
        ) from None
    delimiter = "\t" if plain_suffix(entry.name) == ".tsv" else max(",;\t", key=line.count)
    names = next(csv.reader([line], delimiter=delimiter), [])
    if not any(name.strip() for name in names):
        raise ValueError(
            f"{entry.name}: an empty file, where the first line must name the columns; download "
            "it again"
        )
    return [name.strip() for name in names], delimiter, len(raw)


def _of_csv(
    part: InputSplit,
    columns: list[str],
    opener: Opener,
    tally: RowCounts,
) -> Iterator[pa.Table]:
    entry, rows = part.entry, tally.rows
    with SplitReader(part, opener).open() as handle:
        names, delimiter, first = _header(entry, handle)
        body = handle
        is_whole = part.start == 0 and part.stop < 0
        if not is_whole:
            start, stop = (
                _line_start(handle, at) if at > first else first
                for at in (part.start, part.stop if part.stop >= 0 else entry.size)
            )
            handle.seek(start)
            body = cast(
                BinaryIO, io.BufferedReader(FileRange(handle, start, stop - start), 1 << 20)
            )
            if start >= stop:
                return
        try:
            for batch in open_csv(
                pa.PythonFile(body, mode="r"),
                block_bytes=BLOCK_BYTES,
                delimiter=delimiter,
                names=names,
                types={name: pa.string() for name in columns},
                columns=columns,
                has_line_ends=is_whole,
                on_invalid_row=lambda row: tally.line(_place(row, part), BAD_LINE),
            ):
                rows += len(batch)
                yield pa.Table.from_batches([batch])
        except pa.ArrowInvalid as error:
            if str(error).startswith("Empty CSV file"):
                return
            why = (
                "it is not UTF-8 text: convert it (iconv -t UTF-8)"
                if "UTF8" in str(error)
                else "it is no CSV, or a quote is left open: download it again"
            )
            raise ValueError(f"{entry.name}: cannot be read after row {rows}: {why}") from None


def _place(row: Any, part: InputSplit) -> str:
    if row.number is None or part.start:
        return f"{part.entry.name}:a line after byte {part.start}"
    return f"{part.entry.name}:line {row.number + 1}"


def _line_start(handle: BinaryIO, at: int) -> int:
    """Return the offset of the first line that begins at `at` or after it."""
    handle.seek(at - 1)
    return at - 1 + len(handle.readline())
