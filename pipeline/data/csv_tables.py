"""Read CSV with pyarrow, block by block, so that a file of any size takes little memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv

BLOCK_BYTES, ROW_BYTES = 4 << 20, 64 << 20
"""A block, and the longest row. Arrow reads a dozen or more blocks ahead: 0.25 GB in memory for a
file of any size (2026-11-24, 4 MiB; 0.7 GB with 16)."""
WIDER = {
    pa.null(): pa.int64(),
    pa.int64(): pa.float64(),
    pa.float64(): pa.string(),
    pa.string(): pa.binary(),
}
"""What a column becomes when a value is not of its type; string for types that are not listed."""


def open_csv(
    handle: Any,
    *,
    block_bytes: int,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    types: dict[str, pa.DataType] | None = None,
    columns: Sequence[str] | None = None,
    nulls: Sequence[str] | None = None,
    has_line_ends: bool = True,
    on_invalid_row: Callable[[Any], str] | None = None,
) -> pacsv.CSVStreamingReader:
    """Open CSV as a stream of record batches, on one thread.

    Args:
        handle: its bytes.
        block_bytes: what is read at a time; no row may be longer.
        delimiter: what stands between fields.
        names: of the columns, where the first line is a row.
        types: of columns; of the others the first block tells.
        columns: those that are wanted; all where not given.
        nulls: fields that stand for nothing (never in columns of texts).
        has_line_ends: whether fields in quotes may hold line ends.
        on_invalid_row: is called with each row of another number of fields, and says "skip".
    """
    return pacsv.open_csv(
        handle,
        pacsv.ReadOptions(block_size=block_bytes, use_threads=False, column_names=names),
        pacsv.ParseOptions(
            delimiter=delimiter,
            newlines_in_values=has_line_ends,
            invalid_row_handler=on_invalid_row,
        ),
        pacsv.ConvertOptions(column_types=types, include_columns=columns, null_values=nulls),
    )


def csv_tables(
    open_file: Callable[[], AbstractContextManager[BinaryIO]],
    name: str,
    *,
    delimiter: str = ",",
    types: dict[str, pa.DataType] | None = None,
    nulls: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Read a CSV file with a header as tables of one schema, the first of them without rows.

    The types of its columns come from a first pass over all of it, for a block knows only its own.

    Args:
        open_file: opens its bytes; called several times.
        name: of the file, for errors.
        delimiter: what stands between fields.
        types: of columns where they are known.
        nulls: fields that stand for nothing (never in columns of texts).

    Raises:
        ValueError: no CSV, or a row longer than ROW_BYTES.
    """

    def blocks() -> Iterator[pa.Table]:
        with open_file() as handle:
            reader = open_csv(
                handle, block_bytes=block_bytes, delimiter=delimiter, types=known, nulls=nulls
            )
            yield reader.schema.empty_table()
            for batch in reader:
                yield pa.Table.from_batches([batch])

    known, names, block_bytes = dict(types or {}), list[str](), BLOCK_BYTES
    while True:
        try:
            for table in blocks():
                names = table.column_names
                known = dict(zip(names, table.schema.types, strict=True))
            break
        except pa.ArrowInvalid as error:
            text = str(error).splitlines()[0]
            found = re.match(r"In CSV column #(\d+): .*conversion error", text)
            column = names[int(found[1])] if found and names else ""
            if "straddling" in text and block_bytes < ROW_BYTES:  # a row is longer than a block
                block_bytes *= 2
            elif "straddling" in text:
                raise ValueError(
                    f"{name}: not readable as csv: a row is longer than {ROW_BYTES >> 20} MiB; "
                    "is a quote left open?"
                ) from None
            elif column and known[column] != pa.binary():
                known[column] = WIDER.get(known[column], pa.string())
            else:
                where = f" (column {column!r})" if column else ""
                raise ValueError(f"{name}: not readable as csv: {text}{where}") from None
    yield from blocks()
