"""Write rows as row groups of a Parquet file.

One row group is held in memory, or `SHUFFLED_BYTES` where rows are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_bytes, is_list, is_text
from pipeline.core.rng import mix, row_keys
from pipeline.prepare.engine.importing import Row

GROUP_BYTES, GROUP_ROWS = 8 << 20, 16384
"""Most bytes (about), and most rows, of a row group."""
SHUFFLED_BYTES = 512 << 20
"""Rows are shuffled among at most so many bytes."""
DISTINCT = ("sha256", "path", "transcript")
"""Texts that differ from row to row, so that a dictionary of them saves nothing."""


class RowGroups:
    """Writes tables of rows in row groups of a Parquet file.

    Rows that are shuffled wait until there are SHUFFLED_BYTES of them, or all.

    Args:
        path: the file.
        schema: its columns.
        shuffles: write the rows in a fixed shuffled order.
        holds_files: rows hold images or recordings, which do not get smaller by compression.
    """

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        shuffles: bool = False,
        holds_files: bool = False,
    ):
        self.shuffles_rows = shuffles
        texts = [one.name for one in schema if is_text(one.type) and one.name not in DISTINCT]
        compression = "none" if holds_files else "zstd"
        dictionaries: Any = texts if holds_files else True  # pyarrow's stubs know a bool alone
        self.file = pq.ParquetWriter(
            path, schema, compression=compression, use_dictionary=dictionaries
        )
        self.blocks: list[pa.Table] = []
        self.waiting: list[pa.Table] = []
        self.held_bytes = self.num_shuffles = self.rows = 0

    def __enter__(self) -> RowGroups:
        return self

    def add(self, block: pa.Table) -> None:
        """Add a table of rows; the row groups do not depend on how rows were cut into tables."""
        self.rows += len(block)
        total, at = np.cumsum(row_bytes(block)), 0
        while at < len(block):
            before = int(total[at - 1]) if at else 0
            most = at + GROUP_ROWS - sum(map(len, self.blocks))
            stop = min(
                most, int(np.searchsorted(total, before + GROUP_BYTES - self.held_bytes)) + 1
            )
            self.blocks.append(block.slice(at, stop - at))
            if stop > len(block):
                self.held_bytes += int(total[-1]) - before
                return
            self._flush()
            at = stop

    def _flush(self) -> None:
        if self.blocks:
            table = pa.concat_tables(self.blocks).combine_chunks()
            if not self.shuffles_rows:
                self.file.write_table(table)
            else:
                self.waiting.append(table)
                if sum(one.nbytes for one in self.waiting) >= SHUFFLED_BYTES:
                    self._shuffle()
        self.blocks, self.held_bytes = [], 0

    def _shuffle(self) -> None:
        if self.waiting:
            rows, groups = pa.concat_tables(self.waiting), len(self.waiting)
            keys = row_keys(
                mix(*b"prepare"), np.full(len(rows), self.num_shuffles), np.arange(len(rows))
            )
            self.file.write_table(
                rows.take(pa.array(np.argsort(keys, kind="stable"))),
                row_group_size=-(-len(rows) // groups),
            )
            self.waiting, self.num_shuffles = [], self.num_shuffles + 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
            self._shuffle()
        self.file.close()


def tables_of(rows: Iterable[Row | pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows as tables of about GROUP_BYTES with the columns of a schema."""
    waiting: list[Row] = []
    size = 0

    def gathered() -> Iterator[pa.Table]:
        nonlocal size
        if waiting:
            yield pa.Table.from_pylist(waiting, schema=schema)
            waiting.clear()
        size = 0

    for row in rows:
        if not isinstance(row, dict):
            yield from gathered()
            yield row.select(schema.names).cast(schema)
            continue
        waiting.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str | bytes | list))
        if size >= GROUP_BYTES or len(waiting) >= GROUP_ROWS:
            yield from gathered()
    yield from gathered()


def lengths(column: Any) -> np.ndarray:
    """Return values of lists, characters of texts or bytes of files, (rows,) int64; 0 for null."""
    if is_list(column.type):
        found = pc.list_value_length(column)
    else:
        found = pc.utf8_length(column) if is_text(column.type) else pc.binary_length(column)
    return np.asarray(found.fill_null(0).to_numpy(), dtype=np.int64)


def by_split(rows: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each split, sorted by its name."""
    splits = sorted(set(rows["split"].to_pylist()))
    return {split: rows.filter(pc.equal(rows["split"], split)) for split in splits}


def row_bytes(block: pa.Table) -> np.ndarray:
    """Estimate the bytes of each row, (rows,) int64; a character counts as one."""
    out = np.zeros(len(block), dtype=np.int64)
    for column in block.columns:
        kind = column.type
        if is_list(kind) and (is_list(kind.value_type) or is_bytes(kind.value_type)):
            out += _inner_weights(column, 4 if is_list(kind.value_type) else 1)
        elif is_list(kind):
            out += 16 * lengths(column)
        elif is_text(kind) or is_bytes(kind):
            out += lengths(column)
        else:
            out += 8 * (kind.num_fields if pa.types.is_struct(kind) else 1)
    return out


def _inner_weights(column: Any, each: int) -> np.ndarray:
    """Bytes in lists of lists (`each` bytes a value) or in lists of files, (rows,) int64."""
    held, outer = column.combine_chunks(), lengths(column)
    bounds = np.concatenate([[0], np.cumsum(lengths(held.flatten()) * each)])
    ends = np.cumsum(outer)
    return bounds[ends] - bounds[ends - outer]
