"""Parquet files as a source: input splits of whole row groups, read in batches of bounded size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io import storage
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine.inputs import (
    SQUEEZED,
    InputFiles,
    InputSplit,
    SplitReader,
    plain_suffix,
)
from pipeline.prepare.readers.archives import MOST_BYTES, Entry, Opener

SUFFIXES = (".parquet", ".pq")
BATCH_BYTES, BATCH_ROWS = 32 << 20, 4096
"""Most bytes (about), and most rows, at a time."""


def groups(entry: Entry) -> list[int]:
    """Return the bytes of each row group, or nothing for a file that cannot be read in parts.

    Raises ValueError for a damaged file.
    """
    if (
        plain_suffix(entry.name) not in SUFFIXES
        or entry.offset >= 0
        or entry.member
        or entry.name.lower().endswith(SQUEEZED)
    ):
        return []
    with storage.open_read(entry.uri) as handle:
        return group_sizes(open_parquet(handle, entry.name))


def group_sizes(file: pq.ParquetFile) -> list[int]:
    """Return the bytes of each row group."""
    about = file.metadata
    return [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]


def row_groups(entry: Entry, split: str, sizes: list[int], most: int) -> list[InputSplit]:
    """Group neighbouring row groups into input splits of up to about `most` bytes."""
    out: list[InputSplit] = []
    for i, size in enumerate(sizes):
        if out and out[-1].size + size <= most:
            out[-1] = out[-1]._replace(stop=i + 1, size=out[-1].size + size)
        else:
            out.append(InputSplit(entry.name, split, entry, i, i + 1, size))
    return out


def split_files(listed: InputFiles, most: int) -> list[InputSplit]:
    """Cut files into input splits of about `most` bytes.

    Files in archives, compressed ones and ones without rows stay whole.
    """
    out: list[InputSplit] = []
    for (entry, split), sizes in zip(
        listed.files, threaded_map(groups, [entry for entry, _ in listed.files]), strict=True
    ):
        out += row_groups(entry, split, sizes, most) or [
            InputSplit(entry.name, split, entry, size=entry.size)
        ]
    return out


@contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Raise ValueError with the name of a file that is found to be damaged in the block."""
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name}: not a whole Parquet file ({error}); get it again") from None


def open_parquet(handle: BinaryIO, name: str) -> pq.ParquetFile:
    """Open a Parquet file; `name`: for errors. Raises ValueError for a damaged one."""
    with naming_damage(name):
        return pq.ParquetFile(handle)


@contextmanager
def opened(reading: SplitReader) -> Iterator[pq.ParquetFile]:
    """Open the file of an input split. Raises ValueError for a damaged one."""
    with reading.open() as handle:
        is_cut = reading.input_split.stop >= 0
        stored = handle if is_cut else io.BytesIO(handle.read(MOST_BYTES))
        with naming_damage(reading.input_split.name):
            yield pq.ParquetFile(stored)


def schema(input_split: InputSplit) -> pa.Schema:
    """Return the columns of an input split's file, without metadata."""
    opener = Opener()
    try:
        with opened(SplitReader(input_split, opener)) as file:
            return file.schema_arrow.remove_metadata()
    finally:
        opener.close()


def batches(
    reading: SplitReader, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (rows of the file before them, rows) of an input split, in order."""
    start, stop = reading.input_split.start, reading.input_split.stop
    with opened(reading) as file:
        about = file.metadata
        sizes = [about.row_group(i) for i in range(about.num_row_groups)]
        held = sizes[start:stop] if stop >= 0 else sizes
        row = sum(group.num_rows for group in sizes[:start])
        widest = max((group.total_byte_size // max(1, group.num_rows) for group in held), default=0)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest)))
        for batch in file.iter_batches(
            rows, list(range(start, stop)) if stop >= 0 else None, columns
        ):
            yield row, pa.Table.from_batches([batch]).replace_schema_metadata()
            row += len(batch)
