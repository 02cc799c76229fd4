"""Recordings of an index to shards: each is decoded once and, where asked, resampled, mixed to
mono or cut. What needs no change keeps the publisher's bytes.

New files are 16-bit mono FLAC: lossless for recordings that had 16 bits and one channel. Rows are
written as they are made, so a recording of hours takes the memory of one row group.
"""

from __future__ import annotations

import hashlib
import io
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from pipeline.config.registry import RecordingOptions
from pipeline.io import storage
from pipeline.io.threads import threaded_map
from pipeline.media import audio_io
from pipeline.media.audio_io import BrokenAudioError, RecordingInfo, Sound
from pipeline.prepare.engine.importing import (
    Index,
    InvalidRow,
    Row,
    file_row,
    index_table,
    invalid_row,
)
from pipeline.prepare.engine.indexed import IndexShardTask, is_one_way, load_rows
from pipeline.prepare.engine.inputs import HELD_OUT_FIRST, InputSplit, SplitReader, decoded
from pipeline.prepare.engine.row_groups import RowGroups, tables_of
from pipeline.prepare.engine.shard_tasks import Importer, Settings, ShardResult, sum_by_split
from pipeline.prepare.readers.archives import (
    Entry,
    FileRange,
    Listing,
    Opener,
    Reader,
    is_gzipped,
    open_archive,
)
from pipeline.prepare.readers.picture_check import BrokenImageError

SUFFIXES = (".flac", ".wav", ".sph", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".au")
"""If a recording exists in several formats, the first of these is taken."""
MAX_NAMED = 3
MEASURED = {
    "recording_start": pa.float64(),
    "seconds": pa.float64(),
    "rate": pa.int64(),
    "channels": pa.int64(),
    "sha256": pa.string(),
}
"""What is written beside each recording."""
LOSSY = (".mp3", ".ogg", ".oga", ".opus")
GROWTH = 3.0
"""Estimated size of FLAC relative to a lossy file, for the size of shards."""
FLAC_BYTES = 1.2
"""Estimated bytes of a sample of speech in FLAC, for the size of shards."""
STREAMED = 64 << 20
"""Larger files are read as a stream where possible (not from zip or tar.gz)."""
SLACK_SECONDS = 0.1
"""Publishers round seconds: a segment this close to both ends is the whole recording."""
SILENT = 1e-3
"""A recording is silent if no sample is above this share of full scale (-60 dB)."""
CLIPPED = 1e-3
"""A recording is clipped if a larger share of its samples is at full scale or beyond."""
LEVELS = (
    "silent: no sample above 0.001 of full scale; clipped: over 0.1 % of the samples at full scale "
    "or beyond it, to which such samples of a floating-point file are clipped (make it quieter: "
    "ffmpeg -i in.wav -af volume=0.25 out.wav)"
)
COUNTED = ("silent", "clipped", "cut out of longer recordings", "written anew as FLAC")


class AudioImporter(Importer):
    """Base class for audio data sets. Examples: `librispeech`, `manifest`."""

    def __init__(self, options: Any = None):
        super().__init__(options)
        rate = self.sound_options.rate
        if rate and not audio_io.RATES[0] <= rate <= audio_io.RATES[1]:
            raise ValueError(
                f"--set rate={rate}: from {audio_io.RATES[0]} to {audio_io.RATES[1]} samples "
                "a second, or 0 to keep each recording's own"
            )

    @property
    def sound_options(self) -> RecordingOptions:
        """The options about the sound itself; defaults for those that the importer lacks."""
        own = self.options.model_dump(include=set(RecordingOptions.model_fields))
        return RecordingOptions(**own)

    @abstractmethod
    def index(self, source: str) -> Index:
        """List every recording of `source` (`recording_row`, `recordings_table`).

        Recordings without a transcript and transcripts without a recording are invalid rows. Raises
        ValueError for files that are not in the publisher's format.
        """

    def plan(self, source: str, settings: Settings) -> AudioShardTask:
        return AudioShardTask(self, source, settings)


# ---------------------------------------------------------------- what importers make an index of


def audio_entries(listing: Listing) -> list[Entry]:
    return [entry for entry in listing.entries if entry.suffix in SUFFIXES]


def count_other_files(listing: Listing, *read: str) -> dict[str, int]:
    """Count the files of each other suffix; `read`: suffixes that are read besides sound."""
    left = [entry for entry in listing.entries if not entry.name.endswith((*SUFFIXES, *read))]
    return dict(sorted(Counter(entry.suffix_or_name for entry in left).items()))


def recording_row(
    entry: Entry,
    split: str,
    *,
    start: float | None = None,
    seconds: float | None = None,
    layout: str = "",
    **columns: Any,
) -> Row:
    """Make one row of an index.

    Args:
        entry: the file.
        split: of the row.
        start, seconds: the segment of the file that the row is; None: all of it.
        layout: numpy type of headerless samples at 16 kHz, such as >i2.
        columns: further columns of the row.
    """
    return {
        **file_row(entry, split),
        "_start": start,
        "_seconds": seconds,
        "_layout": layout,
        **columns,
    }


def recordings_table(
    rows: list[Row],
    columns: dict[str, pa.DataType],
    source: str,
    invalid: list[InvalidRow],
) -> pa.Table:
    """Return the rows as a table. Raises ValueError, naming invalid rows, if there are none."""
    if not rows and invalid:
        first = "; ".join(f"{row['path']}: {row['reason']}" for row in invalid[:MAX_NAMED])
        raise ValueError(
            f"{source}: no recording that can be used, {len(invalid)} broken ones. First ones: "
            f"{first}"
        )
    return index_table(
        rows,
        {"_start": pa.float64(), "_seconds": pa.float64(), "_layout": pa.string(), **columns},
        source,
        "recordings",
    )


class Line(NamedTuple):
    """A line of a text file; `reason`: why it is invalid, or ""."""

    file: str
    number: int
    text: str
    reason: str

    @property
    def location(self) -> str:
        return f"{self.file}:{self.number}"


def lines_of(entries: Iterable[Entry]) -> Iterator[Line]:
    """Yield the non-blank lines of text files, archives in their own order.

    Raises ValueError for UTF-16.
    """

    def read(entry: Entry, opener: Opener) -> list[Line]:
        out = []
        for number, _, raw in SplitReader(InputSplit(entry.name, "", entry), opener).numbered():
            text, reason = decoded(raw)
            text = text if raw is None or not reason else raw.decode(errors="replace")
            if reason or text.strip():
                out.append(Line(entry.name, number, text, reason))
        return out

    listed = sorted(entries, key=lambda entry: (entry.uri, entry.offset, entry.name))
    loose = all(entry.offset < 0 and not entry.member for entry in listed)
    with Opener() as opener:
        for lines in threaded_map(partial(read, opener=opener), listed, 16 if loose else 1):
            yield from lines


def segment_of(row: Row) -> tuple[Any, ...]:
    """Return which piece of which file a row of an index is, for `drop_repeated_keys`."""
    start = row["_start"] or 0.0
    return row["_uri"], row["_member"], row["_offset"], start, row["_seconds"]


def unnamed_sounds(listing: Listing, rows: list[Row]) -> int:
    """Count the recordings that no row of an index is of."""
    named = {(row["_uri"], row["path"]) for row in rows}
    return len({(entry.uri, entry.name) for entry in audio_entries(listing)} - named)


def join_transcripts(
    rows: dict[Any, Row],
    said: dict[Any, list[Line]],
    split_of: Callable[[Any], str],
    wanted: str,
) -> tuple[list[Row], list[InvalidRow]]:
    """Join recordings with their transcripts.

    Args:
        rows: recordings by key.
        said: lines of transcripts by key.
        split_of: the split of a key that has no recording.
        wanted: where a transcript should be, for the reasons.

    Returns:
        (rows with their transcript, invalid rows).
    """
    out: list[Row] = []
    invalid: list[InvalidRow] = []
    for key, row in rows.items():
        lines = said.get(key, [])
        if reason := _transcript_problem(lines, wanted):
            invalid.append(invalid_row(row["path"], row["split"], reason))
        else:
            out.append({**row, "transcript": lines[0].text})
    for key, lines in said.items():
        if key not in rows:
            reason = lines[0].reason or "a transcript without its recording"
            invalid.append(invalid_row(lines[0].location, split_of(key), reason))
    return out, invalid


def _transcript_problem(lines: list[Line], wanted: str) -> str:
    """Return why the lines of a recording's transcript cannot be used, or ""."""
    if not lines:
        return f"a recording without a transcript: no line for it in {wanted}"
    if lines[0].reason:
        return f"its transcript ({lines[0].location}) is {lines[0].reason}"
    if len({line.text for line in lines}) > 1:
        return f"two transcripts: {lines[0].location} and {lines[1].location}; remove the wrong one"
    return ""


def drop_repeated_keys(
    rows: list[Row],
    key: Callable[[Row], Any],
) -> tuple[list[Row], list[InvalidRow]]:
    """Keep one row for each `key`: (rows, invalid ones).

    Of several it is the one held out (test before validation before train), then the first.
    """
    first: dict[Any, Row] = {}
    out, invalid = [], []
    for row in sorted(rows, key=lambda row: HELD_OUT_FIRST.get(row["split"], 3)):
        earlier_row = first.setdefault(key(row), row)
        if earlier_row is row:
            out.append(row)
            continue
        reason = (
            "occurs twice"
            if earlier_row["split"] == row["split"]
            else f"stands in {earlier_row['split']} too"
        )
        if earlier_row.get("transcript") != row.get("transcript"):
            reason += f", with another transcript ({earlier_row.get('transcript')!r:.80})"
        invalid.append(invalid_row(row["path"], row["split"], reason))
    return out, invalid


# ---------------------------------------------------------------- parts


class AudioShardTask(IndexShardTask):
    """The shards of an index of recordings.

    Columns: `audio` (a whole file), `path`, `split`, the importer's own, `recording_start` (where
    the row begins in the publisher's file), `seconds`, `rate` and `channels` of that file, and
    `sha256` (of that file; of `audio` where the row is a segment).
    """

    without_images = "reads recordings, not images"
    measures = ("seconds", "speaker", "sha256", "transcript")

    def __init__(self, importer: AudioImporter, source: str, settings: Settings):
        super().__init__(importer, source, settings)
        self.notes = {**self.notes, **{what: {} for what in COUNTED}, "levels": LEVELS}

    def sizes(self) -> np.ndarray:
        rows, rate = self.index.rows, self.importer.sound_options.rate
        sizes = super().sizes()
        if rate:
            is_lossy = [path.lower().endswith(LOSSY) for path in rows["path"].to_pylist()]
            sizes = sizes * np.where(is_lossy, GROWTH, 1.0)
        seconds = rows["_seconds"].to_numpy()
        of_segments = np.minimum(sizes, np.nan_to_num(seconds) * FLAC_BYTES * (rate or 16_000))
        return np.where(np.isnan(seconds), sizes, of_segments)

    @property
    def columns(self) -> list[pa.Field]:
        return [
            pa.field("audio", pa.binary()),
            *self.kept,
            *(pa.field(name, kind) for name, kind in MEASURED.items()),
        ]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer.sound_options, self.schema)


def _make(
    sound_options: RecordingOptions,
    schema: pa.Schema,
    rows: pa.Table,
    scratch: Path,
) -> ShardResult:
    """Read, check and write one shard."""
    listed, path = rows.to_pylist(), scratch / "part.parquet"
    invalid: list[InvalidRow] = []
    counts: Counter[tuple[str, str]] = Counter()
    with Reader() as reader, RowGroups(path, schema, holds_files=True) as writer:
        numbered = _rows(sound_options, reader, listed, invalid, counts)
        if is_one_way(listed):
            numbered = sorted(numbered, key=lambda pair: pair[0])
        for block in tables_of((row for _, row in numbered), schema):
            writer.add(block)
    return ShardResult(
        path,
        writer.rows,
        invalid,
        sum_by_split((what, split, number) for (what, split), number in sorted(counts.items())),
    )


def _rows(
    sound_options: RecordingOptions,
    reader: Reader,
    listed: list[Row],
    invalid: list[InvalidRow],
    counts: Counter[tuple[str, str]],
) -> Iterator[tuple[int, Row]]:
    """Yield (index, row); fills `invalid` with invalid rows, and `counts` for the summary."""
    for i, row, data in load_rows(listed, _Load(reader)):
        try:
            if isinstance(data, Exception):
                raise data
            data = _with_header(row, data)
            with nullcontext(data) if isinstance(data, bytes) else data:
                info = audio_io.inspect(data)
                spans, whole = _spans(row, data, info, sound_options)
                for span in spans:
                    try:
                        new_row, counted = _row(row, data, info, span, whole, sound_options)
                    except BrokenAudioError as error:
                        at = "" if whole else f" from {span[0]:.2f} s to {span[1]:.2f} s"
                        left_out = invalid_row(f"{row['path']}{at}", row["split"], str(error))
                        if len(spans) > 1:
                            left_out["pieces"] = str(len(spans))
                        invalid.append(left_out)
                        continue
                    counts.update((what, row["split"]) for what in counted)
                    yield i, new_row
        except (BrokenAudioError, BrokenImageError) as error:
            invalid.append(invalid_row(row["path"], row["split"], str(error)))


class _Load:
    """Loads a row's file: its bytes, or an open file if it is large or only a segment is wanted.

    The last member of a tar.gz is kept, as several rows may be segments of it, and to read it again
    is to decompress the archive from its start.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self._last: tuple[tuple[str, int], bytes] | None = None

    def __call__(self, row: Row) -> Sound:
        uri, member, offset, size = row["_uri"], row["_member"], row["_offset"], row["_size"]
        if is_gzipped(uri) and offset >= 0:
            if self._last is None or self._last[0] != (uri, offset):
                self._last = (uri, offset), self.reader(uri, member, offset, size)
            return self._last[1]
        if member or row["_layout"] or (size <= STREAMED and row["_seconds"] is None):
            return self.reader(uri, member, offset, size)
        if offset < 0:
            return storage.open_read(uri)
        return cast(BinaryIO, io.BufferedReader(_Owning(open_archive(uri), offset, size), 1 << 20))


class _Owning(FileRange):
    """A part of a file that closes the file with it."""

    def close(self) -> None:
        self.handle.close()
        super().close()


def _with_header(row: Row, data: Sound) -> Sound:
    """Encode headerless samples as FLAC; return other files unchanged."""
    if not row["_layout"]:
        return data
    assert isinstance(data, bytes), "not read as a stream"
    if not data or len(data) % 2:
        raise BrokenAudioError(
            f"{len(data)} bytes are no 16-bit samples" if data else "the file is empty (0 bytes)"
        )
    return audio_io.encode(np.frombuffer(data, row["_layout"]).astype(np.int16), 16_000)


def _spans(
    row: Row,
    data: Sound,
    info: RecordingInfo,
    sound_options: RecordingOptions,
) -> tuple[list[tuple[float, float]], bool]:
    """Return ([(start, stop) in seconds of each row], whether the one row is the whole file)."""
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
            f"longest={sound_options.longest:g}: align and cut it, or raise --set longest"
        )
    return audio_io.pieces(
        data,
        None,
        sound_options.longest,
        sound_options.cut,
        start,
        None if whole else stop - start,
    ), False


def _row(
    row: Row,
    data: Sound,
    info: RecordingInfo,
    span: tuple[float, float],
    whole: bool,
    sound_options: RecordingOptions,
) -> tuple[Row, list[str]]:
    """Return (the row, which of COUNTED it is)."""
    start, stop = span
    segment = () if whole else (start, stop - start)
    samples, rate, peak, clipped = audio_io.measure(data, *segment)
    is_counted = (peak <= SILENT, clipped > CLIPPED, not whole)
    counted = [what for what, is_so in zip(COUNTED, is_counted, strict=False) if is_so]
    content = _content(data) if whole else b""
    if whole and sound_options.rate in (0, rate) and not (sound_options.mono and info.channels > 1):
        audio = content
    else:
        samples = audio_io.resample(samples, rate, sound_options.rate or rate)
        rate = sound_options.rate or rate
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
