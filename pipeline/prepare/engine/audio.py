"""Recordings of an index to parts: each decoded once and, where asked, resampled, mixed down or
cut; what needs no change keeps the publisher's bytes.

What is written anew is FLAC of 16 bits, mono: lossless for what had 16 bits and one channel. Rows
stand in the file as they are made, so that a recording of hours takes no more memory than its
pieces of a row group.
"""

from __future__ import annotations

import hashlib
import io
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.loader import threaded_map
from pipeline.io import storage
from pipeline.media import audio_io
from pipeline.media.audio_io import BrokenAudioError, Info, Sound
from pipeline.prepare.engine.importing import Index, place, table
from pipeline.prepare.engine.indexed import GROUP_BYTES, IndexShardTask, is_one_way, loaded
from pipeline.prepare.engine.inputs import HELD_OUT_FIRST, InputSplit, Opener, SplitReader, decoded
from pipeline.prepare.engine.shard_tasks import Importer, Settings, ShardResult, added
from pipeline.prepare.readers.archives import GZIPPED, Entry, Listing, Reader, Window, open_archive
from pipeline.prepare.readers.picture_check import BrokenImageError

SUFFIXES = (".flac", ".wav", ".sph", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au")
"""Of one recording that is there in several forms, the first of these is taken."""
NAMED = 3
LOSSY = (".mp3", ".ogg", ".oga", ".opus")
GROWTH = 3.0
"""About so much larger is FLAC than what it was compressed to with loss, for the size of parts."""
FLAC_BYTES = 1.2
"""About so many bytes has a sample of speech in FLAC, for the same."""
STREAMED = 64 << 20
"""Larger files are read as a stream, where that can be: not out of zip and tar.gz."""
SLACK_SECONDS = 0.1
"""A piece that begins and ends so near to its recording's ends is all of it: lists round their
seconds.
"""
SILENT, CLIPPED = 1e-3, 1e-3
"""No sample above this share of full scale (-60 dB); a larger share of samples at full scale."""
LEVELS = (
    "silent: no sample above 0.001 of full scale; clipped: over 0.1 % of the samples at full scale"
)
COUNTED = ("silent", "clipped", "cut out of longer recordings", "written anew as FLAC")


@dataclass(frozen=True)
class SoundOptions:
    """What an importer's options say of the sound itself, by the same names. ``rate``: samples a
    second, 0 for its own; ``longest`` in seconds.
    """

    rate: int = 0
    longest: float = 30.0
    cut: Literal["silence", "windows"] = "silence"
    mono: bool = False


class AudioImporter(Importer):
    """One publisher's format of recordings. Examples: `librispeech`, `manifest`."""

    def __init__(self, options: Any = None):
        super().__init__(options)
        rate = self.sound_options.rate
        if rate and not audio_io.RATES[0] <= rate <= audio_io.RATES[1]:
            raise ValueError(
                f"--set rate={rate}: from {audio_io.RATES[0]} to {audio_io.RATES[1]} samples "
                "a second, or 0 to keep each recording's own"
            )

    @property
    def sound_options(self) -> SoundOptions:
        given = self.options.model_dump()
        return SoundOptions(
            **{one.name: given[one.name] for one in fields(SoundOptions) if one.name in given}
        )

    @abstractmethod
    def index(self, source: str) -> Index:
        """Every recording of ``source`` by ``recording`` and ``recordings``; what has no recording
        or no transcript as broken. Raises ValueError for files that are not what the publisher
        gives.
        """

    def plan(self, source: str, settings: Settings) -> AudioShardTask:
        return AudioShardTask(self, source, settings)


# ---------------------------------------------------------------- what importers make an index of


def sounds(found: Listing) -> list[Entry]:
    return [entry for entry in found.entries if entry.suffix in SUFFIXES]


def others(found: Listing, *read: str) -> dict[str, int]:
    """How many files of each other kind are left out; ``read``: ends of names that are not."""
    kinds = Counter(
        entry.suffix or entry.name.rpartition("/")[2]
        for entry in found.entries
        if not entry.name.endswith((*SUFFIXES, *read))
    )
    return dict(sorted(kinds.items()))


def recording(
    entry: Entry,
    split: str,
    *,
    start: float | None = None,
    seconds: float | None = None,
    layout: str = "",
    **columns: Any,
) -> dict[str, Any]:
    """One row of an index. ``start`` and ``seconds``: the piece of the file that it stands for;
    ``layout``: the numpy type of samples without a header, at 16 kHz, such as >i2.
    """
    return {
        **place(entry, split),
        "_start": start,
        "_seconds": seconds,
        "_layout": layout,
        **columns,
    }


def recordings(
    rows: list[dict[str, Any]],
    columns: dict[str, pa.DataType],
    source: str,
    bad: list[dict[str, str]],
) -> pa.Table:
    """The rows as a table. Raises ValueError when there are none, with the first of the broken
    ones.
    """
    if not rows and bad:
        first = "; ".join(f"{row['path']}: {row['reason']}" for row in bad[:NAMED])
        raise ValueError(
            f"{source}: no recording that can be used, {len(bad)} broken ones. First ones: {first}"
        )
    return table(
        rows,
        {"_start": pa.float64(), "_seconds": pa.float64(), "_layout": pa.string(), **columns},
        source,
        "recordings",
    )


class Line(NamedTuple):
    """A line of a text file; ``reason``: why it cannot be used, or ""."""

    file: str
    number: int
    text: str
    reason: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


def lines_of(entries: Iterable[Entry]) -> Iterator[Line]:
    """Lines of text files, blank ones left out, by the place of the files: archives are read from
    their start on. Raises ValueError for UTF-16.
    """
    opener = Opener()

    def read(entry: Entry) -> list[Line]:
        out = []
        for number, _, raw in SplitReader(InputSplit(entry.name, "", entry), opener).numbered():
            text, reason = decoded(raw)
            text = text if raw is None or not reason else raw.decode(errors="replace")
            if reason or text.strip():
                out.append(Line(entry.name, number, text, reason))
        return out

    listed = sorted(entries, key=lambda entry: (entry.uri, entry.offset, entry.name))
    loose = all(entry.offset < 0 and not entry.member for entry in listed)
    with closing(opener):
        for found in threaded_map(read, listed, 16 if loose else 1):
            yield from found


def broken(path: str, split: str, reason: str) -> dict[str, str]:
    return {"path": path, "split": split, "reason": reason}


def join_transcripts(
    rows: dict[Any, dict[str, Any]],
    said: dict[Any, list[Line]],
    split_of: Callable[[Any], str],
    wanted: str,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(rows with their transcript, broken ones): recordings by key, and for each key the lines
    whose text is a transcript. ``wanted``: where one should stand, for the reasons.
    """
    out, bad = [], []
    for key, row in rows.items():
        lines = said.get(key, [])
        if not lines:
            bad.append(
                broken(
                    row["path"],
                    row["split"],
                    f"a recording without a transcript: no line for it in {wanted}",
                )
            )
        elif lines[0].reason:
            bad.append(
                broken(
                    row["path"],
                    row["split"],
                    f"its transcript ({lines[0].place}) is {lines[0].reason}",
                )
            )
        elif len({line.text for line in lines}) > 1:
            bad.append(
                broken(
                    row["path"],
                    row["split"],
                    f"two transcripts: {lines[0].place} and {lines[1].place}; remove the wrong one",
                )
            )
        else:
            out.append({**row, "transcript": lines[0].text})
    for key, lines in said.items():
        if key not in rows:
            bad.append(
                broken(
                    lines[0].place,
                    split_of(key),
                    lines[0].reason or "a transcript without its recording",
                )
            )
    return out, bad


def drop_repeated_keys(
    rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(rows whose ``key`` stands once, broken ones): of several the held-out one stays, test before
    validation before train, then the first.
    """
    first: dict[Any, dict[str, Any]] = {}
    out, bad = [], []
    for row in sorted(rows, key=lambda row: HELD_OUT_FIRST.get(row["split"], 3)):
        twin = first.setdefault(key(row), row)
        if twin is row:
            out.append(row)
        else:
            where = "twice" if twin["split"] == row["split"] else f"in {twin['split']} too"
            bad.append(
                broken(
                    row["path"],
                    row["split"],
                    f"stands {where}"
                    + (
                        ""
                        if twin.get("transcript") == row.get("transcript")
                        else f", with another transcript ({twin.get('transcript')!r:.80})"
                    ),
                )
            )
    return out, bad


# ---------------------------------------------------------------- parts


class AudioShardTask(IndexShardTask):
    """The parts of an index of recordings.

    Columns: ``audio`` (a whole file), ``path``, ``split``, the importer's, ``recording_start``
    (where the row begins in the publisher's file) and ``seconds``, ``rate`` and ``channels`` of
    that file, ``sha256`` (of that file; of ``audio`` where the row is a piece of it).
    """

    measures = ("seconds", "speaker", "sha256", "transcript")

    def __init__(self, importer: AudioImporter, source: str, settings: Settings):
        settings.refuse(
            ("resize", "quality"),
            f"importer {importer.registered_name} reads recordings, not images; leave it out",
        )
        super().__init__(importer, source, settings)
        self.notes = {**self.notes, **{what: {} for what in COUNTED}, "levels": LEVELS}

    def sizes(self) -> np.ndarray:
        rows, rate = self.index.rows, self.importer.sound_options.rate
        sizes = super().sizes()
        if rate:
            sizes = sizes * np.where(
                [path.lower().endswith(LOSSY) for path in rows["path"].to_pylist()], GROWTH, 1.0
            )
        seconds = rows["_seconds"].to_numpy()
        return np.where(
            np.isnan(seconds),
            sizes,
            np.minimum(sizes, np.nan_to_num(seconds) * FLAC_BYTES * (rate or 16_000)),
        )

    @property
    def columns(self) -> list[pa.Field]:
        return [
            pa.field("audio", pa.binary()),
            *self.kept,
            pa.field("recording_start", pa.float64()),
            pa.field("seconds", pa.float64()),
            pa.field("rate", pa.int64()),
            pa.field("channels", pa.int64()),
            pa.field("sha256", pa.string()),
        ]

    @property
    def make(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer.sound_options, self.schema)


def _make(
    sound_options: SoundOptions, schema: pa.Schema, rows: pa.Table, scratch: Path
) -> ShardResult:
    """Read, examine and write one part."""
    reader, listed, path = Reader(), rows.to_pylist(), scratch / "part.parquet"
    bad: list[dict[str, str]] = []
    counts: Counter[tuple[str, str]] = Counter()
    try:
        made = _rows(sound_options, reader, listed, bad, counts)
        ordered = sorted(made, key=lambda one: one[0]) if is_one_way(listed) else made
        count = _write(path, schema, (row for _, row in ordered))
    finally:
        reader.close()
    return ShardResult(
        path,
        count,
        bad,
        added((what, split, number) for (what, split), number in sorted(counts.items())),
    )


def _write(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    """Rows to row groups of about GROUP_BYTES; how many they are."""
    texts = [
        field.name
        for field in schema
        if pa.types.is_string(field.type) and field.name not in ("sha256", "path", "transcript")
    ]
    held, size, count = [], 0, 0
    # sound in FLAC does not get smaller
    # pyright: ignore
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=texts) as file:
        for row in rows:
            held.append(row)
            size, count = size + len(row["audio"]), count + 1
            if size >= GROUP_BYTES:
                file.write_table(pa.Table.from_pylist(held, schema=schema))
                held, size = [], 0
        if held or not count:
            file.write_table(pa.Table.from_pylist(held, schema=schema))
    return count


def _rows(
    sound_options: SoundOptions,
    reader: Reader,
    listed: list[dict[str, Any]],
    bad: list[dict[str, str]],
    counts: Counter[tuple[str, str]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place in the index, row) of what can be used; the others to ``bad``, what is to be told of
    rows to ``counts``.
    """
    for i, row, data in loaded(listed, _Load(reader)):
        try:
            if isinstance(data, Exception):
                raise data
            data = _with_header(row, data)
            with nullcontext(data) if isinstance(data, bytes) else data:
                info = audio_io.inspect(data)
                spans, whole = _spans(row, data, info, sound_options)
                for span in spans:
                    try:
                        made, counted = _row(row, data, info, span, whole, sound_options)
                    except BrokenAudioError as error:
                        at = "" if whole else f" from {span[0]:.2f} s to {span[1]:.2f} s"
                        bad.append(
                            broken(f"{row['path']}{at}", row["split"], str(error))
                            | ({"pieces": str(len(spans))} if len(spans) > 1 else {})
                        )
                        continue
                    counts.update((what, row["split"]) for what in counted)
                    yield i, made
        except (BrokenAudioError, BrokenImageError) as error:
            bad.append(broken(row["path"], row["split"], str(error)))


class _Load:
    """A row's file: its bytes, or itself where it is large or only a piece of it is wanted. Of a
    tar.gz the last member is kept: rows that are pieces of one file follow one another, and to read
    it again would unpack all before it anew.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self._last: tuple[tuple[str, int], bytes] | None = None

    def __call__(self, row: dict[str, Any]) -> Sound:
        uri, member, offset, size = row["_uri"], row["_member"], row["_offset"], row["_size"]
        if uri.lower().endswith(GZIPPED) and offset >= 0:
            if self._last is None or self._last[0] != (uri, offset):
                self._last = (uri, offset), self.reader(uri, member, offset, size)
            return self._last[1]
        if member or row["_layout"] or (size <= STREAMED and row["_seconds"] is None):
            return self.reader(uri, member, offset, size)
        if offset < 0:
            return storage.open_read(uri)
        return cast(BinaryIO, io.BufferedReader(_Owning(open_archive(uri), offset, size), 1 << 20))


class _Owning(Window):
    """A part of a file that is closed with it."""

    def close(self) -> None:
        self.handle.close()
        super().close()


def _with_header(row: dict[str, Any], data: Sound) -> Sound:
    """Samples without a header as FLAC; any other file as it is."""
    if not row["_layout"]:
        return data
    assert isinstance(data, bytes), "not read as a stream"
    if not data or len(data) % 2:
        raise BrokenAudioError(
            f"{len(data)} bytes are no 16-bit samples" if data else "the file is empty (0 bytes)"
        )
    return audio_io.encode(np.frombuffer(data, row["_layout"]).astype(np.int16), 16_000)


def _spans(
    row: dict[str, Any], data: Sound, info: Info, sound_options: SoundOptions
) -> tuple[list[tuple[float, float]], bool]:
    """((start, stop) in seconds of the rows that a row of the index becomes, whether that is all of
    the file as one).
    """
    start = row["_start"] or 0.0
    stop = info.seconds if row["_seconds"] is None else start + row["_seconds"]
    whole = start <= SLACK_SECONDS and abs(stop - info.seconds) <= SLACK_SECONDS
    if whole:
        start, stop = 0.0, info.seconds
    if stop - start <= sound_options.longest:
        return [(start, stop)], whole
    if (row.get("transcript") or "").strip():
        raise BrokenAudioError(
            f"{stop - start:.1f} s with a transcript, longer than "
            f"longest={sound_options.longest:g}: "
            "align and cut it, or raise --set longest"
        )
    return audio_io.pieces(
        data, None, sound_options.longest, sound_options.cut, start, None if whole else stop - start
    ), False


def _row(
    row: dict[str, Any],
    data: Sound,
    info: Info,
    span: tuple[float, float],
    whole: bool,
    sound_options: SoundOptions,
) -> tuple[dict[str, Any], list[str]]:
    """(one row, which of COUNTED it is)."""
    start, stop = span
    samples, rate, peak, clipped = (
        audio_io.measured(data) if whole else audio_io.measured(data, start, stop - start)
    )
    counted = [
        what
        for what, is_so in zip(
            COUNTED, (peak <= SILENT, clipped > CLIPPED, not whole), strict=False
        )
        if is_so
    ]
    content = _content(data) if whole else b""
    if whole and sound_options.rate in (0, rate) and not (sound_options.mono and info.channels > 1):
        audio = content
    else:
        samples, rate = (
            audio_io.resample(samples, rate, sound_options.rate or rate),
            sound_options.rate or rate,
        )
        audio = audio_io.encode(audio_io.pcm(samples), rate)
        counted.append(COUNTED[-1])
    return {
        **row,
        "audio": audio,
        "recording_start": start,
        "seconds": len(samples) / rate,
        "rate": info.rate,
        "channels": info.channels,
        "sha256": hashlib.sha256(content if whole else audio).hexdigest(),
    }, counted


def _content(data: Sound) -> bytes:
    if isinstance(data, bytes):
        return data
    data.seek(0)
    return data.read()
