"""Find rows that are equal or nearly equal.

Rows are compared by a digest of their content (recordings by the bytes of their files). Records of
events are also equal if they are two cuts of one record. Nearly equal rows are found where the
modality can tell (`FindsNearRows`).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.config.schema import spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import decodes_on_device, file_roles, finds_near_rows
from pipeline.data.manifests import Reader, Selection, value_text
from pipeline.data.stream import map_items
from pipeline.io import checksums, file_identity, storage
from pipeline.io.threads import threaded_map
from pipeline.media import audio_io

VERSION = 7
"""To be raised where the code makes other signatures of the same rows."""
SPREAD_BYTES, SPREAD_FILES = 64 << 20, 20_000
"""Smaller selections are read in this process, since Ray tasks take seconds to start. Rows of
folders of images or sound are only paths, so their number counts there.
"""
BLOCK_BYTES = 1 << 20
PAIRS = 1 << 17
"""Pairs that are compared at a time."""


@dataclass(frozen=True)
class RowSignatures:
    """The numbers by which n rows are compared."""

    digest: np.ndarray
    """(n,) uint64: digest of the content."""
    readable: np.ndarray
    """(n,) bool. False: the row cannot be read or has no events, and equals no other."""
    near: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays of n rows by which the modality finds nearly equal rows."""
    record: np.ndarray | None = None
    """(n,) uint64 of records of events: digest of the record's id and its first moment, which all
    cuts of one record share. 0: none.
    """

    def __len__(self) -> int:
        return len(self.digest)


def row_signatures(
    selection: Selection,
    modality: str,
    columns: dict[str, str],
    folder: str,
    record: str = "",
) -> RowSignatures:
    """Return the signatures of every row of a selection, by all of the columns together.

    Rows are read once, since signatures are kept in the folder. Large selections are read by Ray
    tasks, if Ray is running.

    Args:
        columns: Role to column; of recordings also those of `start` and `seconds`, for rows that
            are segments.
        record: The column with the id of the record that a row of events was cut from, or "".

    Raises:
        StorageError: A file cannot be read.
    """
    ids = selection.all_ids
    kind = registry.get("modality", modality)
    key = spec_hash(
        VERSION,
        selection.manifest.fingerprint,
        modality,
        columns,
        hashlib.sha256(ids.tobytes()).hexdigest(),
        *([record] if record else []),
    )
    uri = storage.join(folder, key)
    content = checksums.read_checked_or_none(uri, "the rows are compared anew")
    if content is not None:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return _from_arrays({name: file[name] for name in file.files})
    work = SignatureMaker(selection, modality, columns, record)
    spans = list(pairwise(selection.row_group_starts.tolist()))
    has_many_files = bool(file_roles(kind)) and len(selection) > SPREAD_FILES
    is_large = has_many_files or selection.manifest.num_bytes > SPREAD_BYTES
    use_tasks = is_large and len(spans) > 1
    parts = list(map_items(work, spans) if use_tasks else map(work, spans))
    if not parts:
        parts = [work((0, 0))]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    checksums.write_checked(uri, buffer.getvalue())
    return _from_arrays(arrays)


NEAR = "near_"
"""Prefix of the modality's own arrays among those that are kept."""


def _from_arrays(arrays: dict[str, np.ndarray]) -> RowSignatures:
    """Return the signatures of arrays as they are kept in a file."""
    near = {name.removeprefix(NEAR): a for name, a in arrays.items() if name.startswith(NEAR)}
    rest = {name: array for name, array in arrays.items() if not name.startswith(NEAR)}
    return RowSignatures(**rest, near=near)


class SignatureMaker:
    """Makes the signatures of a span of a selection, in this process or in a Ray task."""

    def __init__(
        self, selection: Selection, modality: str, columns: dict[str, str], record: str = ""
    ):
        self.selection, self.modality = selection, modality
        self.columns, self.record = columns, record

    def __call__(self, span: tuple[int, int]) -> dict[str, np.ndarray]:
        kind = registry.get("modality", self.modality)
        record = [self.record] if self.record else []
        names = list(dict.fromkeys([*self.columns.values(), *record]))
        ids = self.selection.ids(np.arange(*span))
        table = Reader(self.selection.manifest, names).take(ids)
        if decodes_on_device(kind):
            table, out = self._files(kind, table)
        elif file_roles(kind):
            out = self._recordings(kind, table)
        else:
            out = self._values(canonical_numbers(table, tuple(self.columns.values())))
        if finds_near_rows(kind):
            near = kind.near_signatures(table, self.columns)
            out |= {NEAR + name: array for name, array in near.items()}
        return out

    def _files(
        self,
        kind: Any,
        table: pa.Table,
    ) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """Read files whole.

        Returns:
            The table with their bytes in place of their names, and the digests of the rows.
        """
        column = self.columns[kind.roles[0]]
        modality = kind(kind.options_class(), {})
        encoded, missing = modality.encoded(table, {kind.roles[0]: column})
        out = {
            "digest": np.array([_digest(bytes(data)) for data in encoded], dtype=np.uint64),
            "readable": np.array([not reason for reason in missing], dtype=bool),
        }
        content = pa.array([bytes(data) for data in encoded], pa.large_binary())
        return table.set_column(table.schema.get_field_index(column), column, content), out

    def _values(self, table: pa.Table) -> dict[str, np.ndarray]:
        columns = [_texts_as_bytes(table[column]) for column in self.columns.values()]
        rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
        out = {
            "digest": np.array([_digest(_content(row)) for row in rows], dtype=np.uint64),
            "readable": np.array(
                [None not in row and not all(value == [] for value in row) for row in rows],
                dtype=bool,
            ),
        }
        if self.record:
            moments = map(_first_moment, rows)
            marks = [
                _record(record, moment)
                for record, moment in zip(table[self.record].to_pylist(), moments, strict=True)
            ]
            out["record"] = np.array(marks, dtype=np.uint64)
        return out

    def _recordings(self, kind: Any, table: pa.Table) -> dict[str, np.ndarray]:
        column = self.columns[kind.roles[0]]
        starts, lengths = (
            table[self.columns[role]].to_pylist() if role in self.columns else [None] * len(table)
            for role in ("start", "seconds")
        )
        names = list(
            dict.fromkeys(
                recording
                for recording in map(_recording_source, table[column])
                if isinstance(recording, str)
            )
        )
        known = dict(zip(names, threaded_map(_recording, names), strict=True))
        digests = np.zeros(len(table), dtype=np.uint64)
        readable = np.zeros(len(table), dtype=bool)
        for i, recording in enumerate(map(_recording_source, table[column])):
            if not recording:
                continue
            is_file = isinstance(recording, str)
            content, total = known[recording] if is_file else _recording(recording)
            digests[i] = _digest(content + _piece(starts[i], lengths[i], total))
            readable[i] = True
        return {"digest": digests, "readable": readable}


def canonical_numbers(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Cast numbers, also in lists and structs, so that equal ones are equal however stored.

    Floating-point numbers become float32, which models read, and whole numbers float64: 0.1 is
    then the same as a double and as a float, and 12 the same as 12.0. NaN becomes null.
    """
    for name in dict.fromkeys(columns):
        kind = table.schema.field(name).type
        wanted = with_canonical_numbers(kind)
        if wanted is not None:
            index = table.schema.get_field_index(name)
            column = pc.cast(table[name], wanted, safe=False)
            chunks = [_nan_as_null(chunk) for chunk in column.chunks]
            table = table.set_column(index, name, pa.chunked_array(chunks, wanted))
    return table


def _texts_as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column, its texts as bytes: one that is not UTF-8 has no other value in Python."""
    return column.cast(pa.large_binary()) if arrow_lists.is_text(column.type) else column


def _nan_as_null(array: Any) -> Any:
    """Return an array with null for NaN, also in its lists and structs."""
    if pa.types.is_struct(array.type):
        fields = [_nan_as_null(field) for field in array.flatten()]
        names = [field.name for field in array.type]
        return pa.StructArray.from_arrays(fields, names, mask=array.is_null())
    if not pa.types.is_large_list(array.type):
        return arrow_lists.nan_as_null(array)
    counts = np.maximum(arrow_lists.lengths(array), 0)
    offsets = pa.array(np.append(0, np.cumsum(counts)), pa.int64())
    values = _nan_as_null(array.flatten())
    return pa.LargeListArray.from_arrays(offsets, values, mask=array.is_null())


def with_canonical_numbers(kind: pa.DataType) -> pa.DataType | None:
    """Return the type with floats for all its numbers; None where there are none."""
    if pa.types.is_floating(kind):
        return pa.float32()
    if pa.types.is_integer(kind):
        return pa.float64()
    if arrow_lists.is_list(kind):
        inner = with_canonical_numbers(kind.value_type)
        return None if inner is None else pa.large_list(inner)
    if not pa.types.is_struct(kind):
        return None
    inner = [with_canonical_numbers(part.type) for part in kind]
    if not any(inner):
        return None
    return pa.struct(
        [(part.name, other or part.type) for part, other in zip(kind, inner, strict=True)]
    )


def _recording_source(cell: pa.Scalar) -> str | bytes | None:
    """Return the bytes or the file of a cell of recordings, as the modality takes it."""
    value = cell.as_py()
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    names_no_file = isinstance(value, str) and file_identity.NUL in value
    return value if isinstance(value, (str, bytes)) and not names_no_file else None


def _recording(recording: str | bytes) -> tuple[bytes, float]:
    """Return (a digest of a sound file's bytes, its seconds); 0 for a broken file."""
    digest = hashlib.blake2b(digest_size=16)
    with (
        io.BytesIO(recording)
        if isinstance(recording, bytes)
        else storage.open_read(recording) as file
    ):
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        try:
            return digest.digest(), audio_io.inspect(file).seconds
        except audio_io.BrokenAudioError:
            return digest.digest(), 0.0


def _piece(start: Any, seconds: Any, total: float) -> bytes:
    """Return bytes that identify a row's segment of its recording; empty for the whole of it."""
    begin, length = _known_number(start), _known_number(seconds)
    if begin is None:
        return b""
    lasts_to_end = length is None or abs(length - total) <= audio_io.OVERHANG_SECONDS
    if begin == 0 and lasts_to_end:
        return b""
    return f" {begin:.3f} {'' if length is None else f'{length:.3f}'}".encode()


def _known_number(value: Any) -> float | None:
    """Return a number, or None for null and NaN."""
    is_number = isinstance(value, (int, float)) and not math.isnan(value)
    return value if is_number else None


def _content(row: tuple[Any, ...]) -> bytes:
    """Return the bytes of a row's values, each preceded by its length if there are several."""
    parts = [value if isinstance(value, bytes) else _text(value).encode() for value in row]
    if len(parts) == 1:
        return parts[0]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _text(value: Any) -> str:
    """Return a value as text; the fields of a struct by name, without those that are null."""
    if not isinstance(value, dict):
        return str(value)
    fields = [(name, part) for name, part in value.items() if part is not None]
    return str(sorted(fields))


def _first_moment(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return (time, measurements) of a record's first moment after its start.

    All cuts of a record have it, since a cut leaves out what is later or before the start. None for
    a row without events after its start.
    """
    times, variables, values = ([] if part is None else part for part in row[:3])
    times = [_number(time) for time in times]
    first = min((time for time in times if time is not None and time >= 0), default=None)
    if first is None or not len(times) == len(variables) == len(values):
        return None
    measured = (
        (str(variable), _number(value))
        for time, variable, value in zip(times, variables, values, strict=True)
        if time == first
    )
    return first, sorted(measured, key=str)


def _number(value: Any) -> Any:
    """Round a number to float32; return other values unchanged."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(np.float32(value)) if is_number else value


def _record(record: Any, moment: tuple[Any, ...] | None) -> int:
    """Return the digest of a record's id and first moment; 0 if either is missing.

    Ids alone may be the same in two collections.
    """
    if record is None or moment is None:
        return 0
    return _digest(repr((value_text(record), moment)).encode())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def exact_duplicates(rows: RowSignatures, others: RowSignatures) -> np.ndarray:
    """Return (n,) bool: rows with the content of one of the others."""
    return np.isin(rows.digest, others.digest[others.readable]) & rows.readable


def same_record(rows: RowSignatures, others: RowSignatures) -> np.ndarray:
    """Return (n,) bool: rows that are cuts of a record of which one of the others is a cut too."""
    if rows.record is None or others.record is None:
        return np.zeros(len(rows), dtype=bool)
    return np.isin(rows.record, others.record) & (rows.record != 0)


def near_duplicates(rows: RowSignatures, others: RowSignatures, modality: str) -> np.ndarray:
    """Return (n,) bool: rows that are equal or nearly equal to one of the others.

    Only rows that share a key of the modality's bands are compared.
    """
    is_duplicate = exact_duplicates(rows, others)
    kind = registry.get("modality", modality)
    if not finds_near_rows(kind):
        return is_duplicate
    search = kind.near_search
    mine, theirs = _Distinct(rows), _Distinct(others)
    alike = np.zeros(len(mine.indices), dtype=bool)
    keys_of_both = zip(search.bands(mine.arrays), search.bands(theirs.arrays), strict=True)
    for own_keys, keys in keys_of_both:
        order = np.argsort(keys, kind="stable")
        left = np.flatnonzero(~alike)
        own = own_keys[left]
        first, last = (np.searchsorted(keys[order], own, side=side) for side in ("left", "right"))
        for a, b in _pairs(left, first, last, order):
            alike[a[search.alike(mine.take(a), theirs.take(b))]] = True
    is_duplicate[mine.rows] |= alike[mine.of]
    return is_duplicate


class _Distinct:
    """The distinct signatures among the readable rows."""

    def __init__(self, signatures: RowSignatures):
        self.rows = np.flatnonzero(signatures.readable)
        near = {name: array[self.rows] for name, array in signatures.near.items()}
        flat = [
            np.ascontiguousarray(array.reshape(len(self.rows), math.prod(array.shape[1:])))
            for array in near.values()
        ]
        row_bytes = np.concatenate([array.view(np.uint8) for array in flat], axis=1)
        row_bytes = np.ascontiguousarray(row_bytes)
        as_scalars = row_bytes.view(f"V{row_bytes.shape[1]}").reshape(-1)
        _, self.indices, of = np.unique(as_scalars, return_index=True, return_inverse=True)
        self.of = of.reshape(-1)
        self.arrays = {name: array[self.indices] for name, array in near.items()}

    def take(self, at: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays of the distinct signatures at these indices."""
        return {name: array[at] for name, array in self.arrays.items()}


def _pairs(
    left: np.ndarray, first: np.ndarray, last: np.ndarray, order: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, others) that share a band, about PAIRS at a time: row `left[i]` with
    `order[first[i]:last[i]]`.
    """
    counts = last - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(left):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS, side="right")))
        num_others = counts[start:stop]
        starts = np.cumsum(num_others) - num_others
        within = np.arange(num_others.sum()) - np.repeat(starts, num_others)
        others = order[np.repeat(first[start:stop], num_others) + within]
        yield np.repeat(left[start:stop], num_others), others
        start = stop
