"""Find rows that are the same: by a digest of their content (of recordings the bytes of their
files), images also by a perceptual hash, records of events also if they are two cuts of one record.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
2010): 32 x 32 grey pixels, the 8 x 8 lowest frequencies of their DCT-II without the constant ones,
one bit each for being above the median. Two images are near duplicates when their hashes differ in
at most NEAR_BITS of 64 bits and their 16 x 16 thumbnails correlate by at least NEAR_CORRELATION:
X-rays are alike in their low frequencies, and the hash alone is not enough for them.

Measured on real images (2026-11-24). Of different images, pairs within 4 bits, and of these also
within 0.98: nih_chestxray14_1000 (64 px, 499,500 pairs) 2 and 0; pneumoniamnist (28 px, 2,878,800
pairs) 15 and 5, which are the 5 pairs of equal pixels in it; clothing_small 2 and 1; fashion_mnist
(28 px) 81 and 7, alike to the eye. At 6 bits without thumbnails: 7, 140, 6 and 362. Of 300 changed
images of each set this share is found: JPEG of quality 75: 1.00, 1.00, 1.00, 0.98; resized to 75 %:
1.00, 1.00, 1.00, 0.98; enlarged twice and quality 75: 1.00 or above 0.99; quality 50: 1.00, 0.89,
0.99, 0.93; resized to half: 1.00, 0.99, 1.00, 0.54 (fashion_mnist has 14 px then). Cropped, rotated
or mirrored images are not found.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import registry
from pipeline.config.schema import spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.data.loader import threaded_map
from pipeline.data.manifests import Reader, Selection, value_text
from pipeline.data.stream import map_items
from pipeline.io import checksums, file_identity, storage
from pipeline.media import audio_io

NEAR_BITS, NEAR_CORRELATION = 4, 0.98
VERSION = 3
"""Raised when the code makes other signatures of the same rows."""
SPREAD_BYTES, SPREAD_IMAGES = 64 << 20, 20_000
"""Smaller selections are read in this process, since others take seconds to start. Rows of folders
of images or sound are only paths, so their number counts.
"""
BLOCK_BYTES = 1 << 20
SIDE, FREQUENCIES, THUMB = 32, 8, 16
PAIRS = 1 << 20
"""Pairs that are compared at a time."""


@dataclass(frozen=True)
class RowSignatures:
    """What n rows are compared by. A row that cannot be read, and a record without events, equals
    no other.

    Attributes:
        digest: (n,) uint64 of the content.
        readable: (n,) bool.
        hash: of images, (n,) uint64.
        thumb: of images, (n, 256) uint8.
        record: of records of events, (n,) uint64.
    """

    digest: np.ndarray
    readable: np.ndarray
    hash: np.ndarray | None = None
    thumb: np.ndarray | None = None
    record: np.ndarray | None = None
    """A digest of the record's id and its first moment, which all cuts of one record share. 0:
    none.
    """

    def __len__(self) -> int:
        return len(self.digest)


def row_signatures(
    selection: Selection,
    modality: str,
    columns: tuple[str, ...],
    folder: str,
    piece: tuple[str | None, str | None] = (None, None),
    record: str = "",
) -> RowSignatures:
    """Return the signatures of every row of a selection, by all of the columns together.

    Rows are read once; signatures are kept under the folder. Runs on Ray if it is running and the
    selection is large.

    Args:
        piece: columns of `start` and `seconds`, for rows that are segments of recordings.
        record: the column with the id of the record that a row of events was cut from, or "".

    Raises:
        StorageError: files that cannot be read.
    """
    ids = selection.ids(np.arange(len(selection)))
    key = spec_hash(
        VERSION,
        selection.manifest.fingerprint,
        modality,
        *columns,
        piece,
        hashlib.sha256(ids.tobytes()).hexdigest(),
        *([record] if record else []),
    )
    uri = storage.join(folder, key)
    content = checksums.kept_bytes(uri, "the rows are compared anew")
    if content is not None:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return RowSignatures(**{name: found[name] for name in found.files})
    work = SignatureMaker(selection, modality, columns, piece, record)
    cuts = selection.boundaries.tolist()
    spans = list(pairwise(cuts))  # row groups, which are read whole
    large = selection.manifest.size > SPREAD_BYTES or (
        modality in ("image", "audio") and len(selection) > SPREAD_IMAGES
    )
    parts = list(map_items(work, spans) if len(spans) > 1 and large else map(work, spans)) or [
        work((0, 0))
    ]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    checksums.keep_bytes(uri, buffer.getvalue())
    return RowSignatures(**arrays)


class SignatureMaker:
    """Makes the signatures of a span of a selection, in this process or in a Ray task."""

    def __init__(
        self,
        selection: Selection,
        modality: str,
        columns: tuple[str, ...],
        piece: tuple[str | None, str | None] = (None, None),
        record: str = "",
    ):
        self.selection, self.modality, self.columns, self.piece, self.record = (
            selection,
            modality,
            columns,
            piece,
            record,
        )

    def __call__(self, span: tuple[int, int]) -> dict[str, np.ndarray]:
        kind = registry.get("modality", self.modality)
        names = list(dict.fromkeys([*self.columns, *filter(None, (*self.piece, self.record))]))
        table = single_precision(
            Reader(self.selection.manifest, names).take(self.selection.ids(np.arange(*span))),
            self.columns,
        )
        if self.modality == "audio":
            return self._recordings(table)
        if self.modality != "image":
            rows = list(zip(*(table[column].to_pylist() for column in self.columns), strict=True))
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
        image: Any = kind(kind.options_class(size=SIDE, channels=1, fit="squash"), {})
        encoded, missing = image.encoded(table, {image.roles[0]: self.columns[0]})
        # Zeros for what is no image: without contrast, near to nothing
        pixels, _ = image.unpack(encoded, torch.device("cpu"))
        grey = pixels["image"].numpy()[:, 0]
        there = np.array([not reason for reason in missing], dtype=bool)
        thumb = (
            grey.reshape(-1, THUMB, SIDE // THUMB, THUMB, SIDE // THUMB)
            .mean((2, 4))
            .round()
            .astype(np.uint8)
            .reshape(-1, THUMB * THUMB)
        )
        return {
            "digest": np.array([_digest(bytes(data)) for data in encoded], dtype=np.uint64),
            "readable": there,
            "hash": phash(grey),
            "thumb": thumb,
        }

    def _recordings(self, table: pa.Table) -> dict[str, np.ndarray]:
        starts, lengths = (
            [None] * len(table) if name is None else table[name].to_pylist() for name in self.piece
        )
        names = list(
            dict.fromkeys(
                recording
                for recording in map(_recording_source, table[self.columns[0]])
                if isinstance(recording, str)
            )
        )
        known = dict(zip(names, threaded_map(_recording, names), strict=True))
        digests, readable = np.zeros(len(table), dtype=np.uint64), np.zeros(len(table), dtype=bool)
        for i, recording in enumerate(map(_recording_source, table[self.columns[0]])):
            if recording:
                content, total = (
                    known[recording] if isinstance(recording, str) else _recording(recording)
                )
                digests[i], readable[i] = (
                    _digest(content + _piece(starts[i], lengths[i], total)),
                    True,
                )
        return {"digest": digests, "readable": readable}


def single_precision(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Cast floating-point columns, also in lists, to float32, which models read.

    A number that is a double in one table and a float in another is then the same.
    """
    for name in dict.fromkeys(columns):
        kind = table.schema.field(name).type
        wanted = with_float32(kind)
        if wanted is not None:
            index = table.schema.get_field_index(name)
            table = table.set_column(index, name, pc.cast(table[name], wanted, safe=False))
    return table


def with_float32(kind: pa.DataType) -> pa.DataType | None:
    """Return the type with float32 for floating-point numbers; None where there are none."""
    if pa.types.is_floating(kind):
        return pa.float32()
    if not arrow_lists.is_list(kind):
        return None
    inner = with_float32(kind.value_type)
    return None if inner is None else pa.large_list(inner)


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
    """Return which segment of its recording a row is; empty for all of it."""
    # NaN is null
    begin, length = (
        value if isinstance(value, (int, float)) and value == value else None
        for value in (start, seconds)
    )
    if begin is None or (
        begin == 0 and (length is None or abs(length - total) <= audio_io.OVER_SECONDS)
    ):
        return b""
    return f" {begin:.3f} {'' if length is None else f'{length:.3f}'}".encode()


def _content(row: tuple[Any, ...]) -> bytes:
    """Return the bytes of a row's values, each preceded by its length if there are several."""
    parts = [value if isinstance(value, bytes) else str(value).encode() for value in row]
    return (
        parts[0]
        if len(parts) == 1
        else b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    )


def _first_moment(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return (time, what was measured) of a record's first moment after its start.

    A cut leaves out what is later, or before the start, and so keeps it. None for a row without
    events after its start.
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
    return (
        0
        if record is None or moment is None
        else _digest(repr((value_text(record), moment)).encode())
    )


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def phash(grey: np.ndarray) -> np.ndarray:
    """Return (n,) uint64 hashes of (n, 32, 32) grey pixels."""
    positions, numbers = np.arange(SIDE), np.arange(1, FREQUENCIES + 1)
    # (8, 32), DCT-II without the constant
    wave = np.cos(np.pi / SIDE * numbers[:, None] * (positions + 0.5))
    found = (wave @ grey.astype(np.float64) @ wave.T).reshape(len(grey), FREQUENCIES**2)
    bits = found > np.median(found, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view("<u8").reshape(-1)


def exact_duplicates(rows: RowSignatures, others: RowSignatures) -> np.ndarray:
    """Return (n,) bool: rows with the content of one of the others."""
    return np.isin(rows.digest, others.digest[others.readable]) & rows.readable


def same_record(rows: RowSignatures, others: RowSignatures) -> np.ndarray:
    """Return (n,) bool: rows that are cuts of a record of which one of the others is a cut too."""
    if rows.record is None or others.record is None:
        return np.zeros(len(rows), dtype=bool)
    return np.isin(rows.record, others.record) & (rows.record != 0)


def near_duplicates(rows: RowSignatures, others: RowSignatures) -> np.ndarray:
    """Return (n,) bool: images that are equal or nearly equal to one of the others.

    Two hashes that differ in at most d bits agree in one of d + 1 bands (the pigeonhole principle;
    Norouzi et al., "Fast search in Hamming space with multi-index hashing", CVPR 2012), so only
    rows that share a band are compared: of uniform hashes 1 pair in 1600.
    """
    found = exact_duplicates(rows, others)
    if rows.hash is None or others.hash is None:
        return found
    theirs = _Images(others)
    mine = _Images(rows)
    alike = np.zeros(len(mine.hash), dtype=bool)
    for low, high in bands_of_signatures():
        keys = _band(theirs.hash, low, high)
        order = np.argsort(keys, kind="stable")
        left = np.flatnonzero(~alike)
        own = _band(mine.hash[left], low, high)
        first, last = (np.searchsorted(keys[order], own, side=side) for side in ("left", "right"))
        for a, b in _pairs(left, first, last, order):
            close = np.bitwise_count(mine.hash[a] ^ theirs.hash[b]) <= NEAR_BITS
            a, b = a[close], b[close]
            for i in range(0, len(a), 1 << 16):
                of, to = a[i : i + (1 << 16)], b[i : i + (1 << 16)]
                alike[
                    of[
                        np.einsum("ij,ij->i", mine.standard(of), theirs.standard(to))
                        >= NEAR_CORRELATION
                    ]
                ] = True
    return found | alike[mine.of]


class _Images:
    """Distinct (hash, thumbnail) pairs; `of` (n,): the pair of each row.

    Images without contrast have a correlation of 0 with all others.
    """

    def __init__(self, rows: RowSignatures):
        assert rows.hash is not None and rows.thumb is not None
        whole = np.ascontiguousarray(
            np.concatenate(
                [rows.hash[:, None].view(np.uint8).reshape(len(rows), 8), rows.thumb], axis=1
            )
        )
        _, indices, of = np.unique(
            whole.view(f"V{whole.shape[1]}").reshape(-1), return_index=True, return_inverse=True
        )
        self.of, self.hash, self.thumb = of.reshape(-1), rows.hash[indices], rows.thumb[indices]

    def standard(self, indices: np.ndarray) -> np.ndarray:
        """Return (k, 256) thumbnails of mean 0 and length 1."""
        found = self.thumb[indices].astype(np.float32)
        found -= found.mean(1, keepdims=True)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def bands_of_signatures() -> Iterator[tuple[int, int]]:
    cuts = [64 * i // (NEAR_BITS + 1) for i in range(NEAR_BITS + 2)]
    return pairwise(cuts)


def _band(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


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
        some = counts[start:stop]
        inside = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        yield np.repeat(left[start:stop], some), order[np.repeat(first[start:stop], some) + inside]
        start = stop
