"""Read CSV with pyarrow, block by block, so that a file of any size takes little memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.core.arrow_compute import pc

BLOCK_BYTES, ROW_BYTES = 4 << 20, 64 << 20
"""A block, and the longest row. Arrow reads a dozen or more blocks ahead: 0.25 GB in memory for a
file of any size (2026-11-24, 4 MiB; 0.7 GB with 16)."""
LEADING_ZERO = r"[+-]?0\d.*"
CODE = rf"{LEADING_ZERO}|[+-]?(9\d{{15}}|\d{{17,}})"
"""Pattern of a field that looks like a number and is an identifier: 007, or a whole number beyond
2^53. A floating-point number would lose its leading zeros or its last digits.
"""
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
        handle: The file's bytes.
        block_bytes: Bytes that are read at a time; no row may be longer.
        delimiter: Separates fields.
        names: Names of the columns, where the first line is a row.
        types: Types of columns; those of the others follow from the first block.
        columns: Columns to read; all where not given.
        nulls: Fields that mean null (never in columns of texts).
        has_line_ends: Whether fields in quotes may hold line ends.
        on_invalid_row: Called with each row that has another number of fields; returns "skip".
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


class CsvFile:
    """A CSV file with a header, read block by block as tables of one schema.

    A block knows only its own values, so the types of columns come from a first pass over the
    file. Columns of numbers are then searched for codes (`CODE`), since 007 is not 7.

    Args:
        open_file: Opens its bytes; called several times.
        name: Its name, for errors.
        delimiter: Separates fields.
        types: Types of columns where they are known.
        nulls: Fields that mean null (never in columns of texts).

    Attributes:
        types: The type of each column.
        code_columns: Columns that look like numbers and have codes. They are texts without blanks
            at their ends, null where a number would be.

    Raises:
        ValueError: It is no CSV, or a row is longer than ROW_BYTES.
    """

    def __init__(
        self,
        open_file: Callable[[], AbstractContextManager[BinaryIO]],
        name: str,
        *,
        delimiter: str = ",",
        types: dict[str, pa.DataType] | None = None,
        nulls: Sequence[str] | None = None,
    ):
        self._open_file, self._name, self._delimiter = open_file, name, delimiter
        self._nulls = pacsv.ConvertOptions().null_values if nulls is None else list(nulls)
        self._block_bytes = BLOCK_BYTES
        self.types = self._find_types(dict(types or {}))
        inferred = {name: kind for name, kind in self.types.items() if name not in (types or {})}
        self.code_columns = self.find_code_columns(inferred)

    @property
    def number_columns(self) -> frozenset[str]:
        """Columns of which each value looks like a number, also those without a value."""
        numbers = (pa.null(), pa.int64(), pa.float64())
        return frozenset(name for name, kind in self.types.items() if kind in numbers)

    @property
    def time_columns(self) -> frozenset[str]:
        """Columns of which each value looks like a date or a time."""
        return frozenset(name for name, kind in self.types.items() if pa.types.is_temporal(kind))

    def tables(
        self,
        code_columns: Collection[str] = (),
        types: Mapping[str, pa.DataType] | None = None,
        order: Sequence[str] = (),
    ) -> Iterator[pa.Table]:
        """Yield its tables, the first of them without rows.

        Args:
            code_columns: Columns in which other files of the same data have codes.
            types: Types of columns over all files of the same data.
            order: The columns of the first of these files. Those of this one are read in the same
                order, if they are the same ones.
        """
        codes = {
            name
            for name in self.code_columns | set(code_columns)
            if self.types.get(name, pa.binary()) != pa.binary()
        }
        own = {name: kind for name, kind in (types or {}).items() if name in self.types}
        is_reordered = set(order) == set(self.types) and list(order) != list(self.types)
        texts_of_codes = {name: pa.string() for name in codes}
        columns = order if is_reordered else None
        for table in self._blocks(self.types | own | texts_of_codes, columns):
            for index, name in enumerate(table.column_names):
                if name in codes:
                    texts = pc.utf8_trim_whitespace(table.column(index))
                    is_null = pc.is_in(texts, pa.array(self._nulls, pa.string()))
                    texts = pc.if_else(is_null, pa.scalar(None, pa.string()), texts)
                    table = table.set_column(index, name, texts)
            yield table

    def _blocks(
        self, types: dict[str, pa.DataType], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        with self._open_file() as handle:
            reader = open_csv(
                handle,
                block_bytes=self._block_bytes,
                delimiter=self._delimiter,
                types=types,
                columns=columns,
                nulls=self._nulls,
            )
            yield reader.schema.empty_table()
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def _find_types(self, known: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
        """Return the type of each column that holds all of its values."""
        names: list[str] = []
        while True:
            try:
                for table in self._blocks(known):
                    names = table.column_names
                    known = dict(zip(names, table.schema.types, strict=True))
                return known
            except pa.ArrowInvalid as error:
                text = str(error).splitlines()[0]
                match = re.match(r"In CSV column #(\d+): .*conversion error", text)
                column = names[int(match[1])] if match and names else ""
                is_longer_than_block = "straddling" in text
                if is_longer_than_block and self._block_bytes < ROW_BYTES:
                    self._block_bytes *= 2
                elif is_longer_than_block:
                    raise ValueError(
                        f"{self._name}: not readable as csv: a row is longer than "
                        f"{ROW_BYTES >> 20} MiB; is a quote left open?"
                    ) from None
                elif column and known[column] != pa.binary():
                    known[column] = WIDER.get(known[column], pa.string())
                else:
                    where = f" (column {column!r})" if column else ""
                    raise ValueError(f"{self._name}: not readable as csv: {text}{where}") from None

    def find_code_columns(self, types: Mapping[str, pa.DataType]) -> frozenset[str]:
        """Return which columns look like numbers and have codes.

        Args:
            types: The types that columns would have. One of int64 holds all digits of a number:
                there only leading zeros would be lost.
        """
        patterns = {
            name: LEADING_ZERO if kind == pa.int64() else CODE
            for name, kind in types.items()
            if name in self.number_columns and kind in (pa.int64(), pa.float64())
        }
        code_columns: set[str] = set()
        if not patterns:
            return frozenset()
        types = self.types | {name: pa.string() for name in patterns}
        for table in self._blocks(types, list(patterns)):
            for name, fields in zip(table.column_names, table.columns, strict=True):
                is_code = pc.match_substring_regex(fields, rf"^\s*({patterns[name]})\s*$")
                if pc.any(is_code).as_py():
                    code_columns.add(name)
            if len(code_columns) == len(patterns):
                break
        return frozenset(code_columns)
