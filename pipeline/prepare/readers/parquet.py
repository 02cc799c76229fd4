"""Parquet files as a source: input splits of whole row groups, read in batches of bounded size."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
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
    whole_files,
)
from pipeline.prepare.readers.archives import MAX_FILE_BYTES, Entry, Opener

SUFFIXES = (".parquet", ".pq")
BATCH_BYTES, BATCH_ROWS = 32 << 20, 4096
"""Most bytes (about), and most rows, at a time."""


def row_group_bytes(entry: Entry) -> list[int]:
    """Return the bytes of each row group, or nothing for a file that cannot be read in parts.

    Raises ValueError for a damaged file.
    """
    if plain_suffix(entry.name) not in SUFFIXES or not _is_plain(entry):
        return []
    with storage.open_read(entry.uri) as handle:
        about = open_parquet(handle, entry.name).metadata
        return [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]


def split_files(
    listed: InputFiles,
    most: int,
    cut_others: Callable[[InputFiles], list[InputSplit]] = whole_files,
) -> list[InputSplit]:
    """Cut Parquet files into input splits of neighbouring row groups, of about `most` bytes.

    `cut_others` cuts other files, and Parquet that is in archives, compressed or without rows.
    """
    out: list[InputSplit] = []
    entries = [entry for entry, _ in listed.files]
    sizes_of_files = threaded_map(row_group_bytes, entries)
    for (entry, split), sizes in zip(listed.files, sizes_of_files, strict=True):
        parts: list[InputSplit] = []
        for i, size in enumerate(sizes):
            extended = parts[-1].size + size if parts else 0
            if parts and extended <= most:
                parts[-1] = parts[-1]._replace(stop=i + 1, size=extended)
            else:
                parts.append(InputSplit(entry.name, split, entry, i, i + 1, size))
        out += parts or cut_others(InputFiles([(entry, split)], {}, ""))
    return out


@contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Raise ValueError with the name of a file that is found to be damaged in the block."""
    try:
        yield
    except storage.StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name}: not a whole Parquet file ({error}); download it again") from None


def open_parquet(handle: BinaryIO, name: str) -> pq.ParquetFile:
    """Open a Parquet file; `name`: for errors. Raises ValueError for a damaged one."""
    with naming_damage(name):
        return pq.ParquetFile(handle)


def _is_plain(entry: Entry) -> bool:
    """Tell whether a file can be read in parts: it lies in no archive and is not compressed."""
    return entry.offset < 0 and not entry.member and not entry.name.lower().endswith(SQUEEZED)


@contextmanager
def open_split(reading: SplitReader) -> Iterator[pq.ParquetFile]:
    """Open the file of an input split. Raises ValueError for a damaged one."""
    entry = reading.input_split.entry
    with reading.open() as handle:
        stored = handle
        if not _is_plain(entry):
            stored = io.BytesIO(handle.read(MAX_FILE_BYTES + 1))
            if len(stored.getbuffer()) > MAX_FILE_BYTES:
                raise ValueError(
                    f"{entry.name}: more than {MAX_FILE_BYTES >> 20} MiB in an archive; unpack it"
                )
        with naming_damage(entry.name):
            yield pq.ParquetFile(stored)


def read_schema(input_split: InputSplit) -> pa.Schema:
    """Return the columns of an input split's file, without metadata."""
    with Opener() as opener, open_split(SplitReader(input_split, opener)) as file:
        return file.schema_arrow.remove_metadata()


def batches(
    reading: SplitReader,
    columns: list[str] | None = None,
    most_rows: int = BATCH_ROWS,
    check_schema: Callable[[pa.Schema], object] = bool,
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (rows of the file before them, rows) of an input split, in order.

    `check_schema` is called first, with all columns of the file; it raises ValueError.
    """
    start, stop = reading.input_split.start, reading.input_split.stop
    with open_split(reading) as file:
        check_schema(file.schema_arrow)
        about = file.metadata
        sizes = [about.row_group(i) for i in range(about.num_row_groups)]
        held = sizes[start:stop] if stop >= 0 else sizes
        row = sum(group.num_rows for group in sizes[:start])
        widest = max((group.total_byte_size // max(1, group.num_rows) for group in held), default=0)
        rows = max(1, min(most_rows, BATCH_BYTES // max(1, widest)))
        for batch in file.iter_batches(
            rows, list(range(start, stop)) if stop >= 0 else None, columns
        ):
            yield row, pa.Table.from_batches([batch]).replace_schema_metadata()
            row += len(batch)
