"""Data directories of Kaldi (kaldi-asr.org/doc/data_prep.html), which ESPnet, k2 and WeNet use too:
a folder a set with wav.scp, and segments, text, utt2spk and spk2gender where there are any.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import RecordingOptions, nearest, register
from pipeline.prepare.engine.audio import (
    AudioImporter,
    Line,
    count_other_files,
    drop_repeated_keys,
    join_transcripts,
    lines_of,
    recording_row,
    recordings_table,
    segment_of,
    unnamed_sounds,
)
from pipeline.prepare.engine.importing import (
    SPLITS,
    Index,
    InvalidRow,
    Row,
    invalid_row,
    split_of_file,
)
from pipeline.prepare.engine.located import locate
from pipeline.prepare.readers import archives

TABLES = ("wav.scp", "segments", "text", "utt2spk", "spk2gender")
FLAC = re.compile(r"flac (?=.*(-c|-\w*c\w*|--stdout)\b)(?:--?\w+ )+(?P<path>\S+\.flac) \|")
"""flac -c -d -s PATH | gives the samples of the file: its path is taken. No command is ever run."""
KALDI_SPLITS = {**SPLITS, "eval": "test"}
SHORT_SPLITS = {"tr": "train", "dt": "validation", "et": "test"}
"""Splits by the first word of a name of several (dt05_real, et05_simu). Alone or further on, tr and
et may be languages (test_tr, test/tr).
"""
IS_COMMAND = "a command, and commands are not run: write its output to a file, and name that"
TO_THE_END = -1.0
"""A segment that ends here ends with its recording."""


class KaldiOptions(RecordingOptions):
    sets: str = Field(
        "",
        description="folders to read, below SOURCE, such as data/train,data/test; empty: all that "
        "hold a wav.scp",
    )
    split: str = Field(
        "",
        description="the split of all; empty: from the folder's name (train_clean, tr_no_dev, dev, "
        "test_other, eval1); a folder that is read alone and tells none is train",
    )
    root: str = Field(
        ".",
        description="folder that the paths in wav.scp are relative to (the one that Kaldi was run "
        "in), below SOURCE or absolute",
    )


@register("importer", "kaldi", options=KaldiOptions)
class Kaldi(AudioImporter):
    """Recordings with texts, in data directories of Kaldi.

    It reads a data directory (wav.scp, segments, text, utt2spk, spk2gender), or a folder or archive
    with several, such as data/train and data/test. Without segments each recording is an utterance.
    A segment is written as 16-bit FLAC.

    Columns: `audio`, `utterance`, `transcript` (if there is a file text), `speaker` (of utt2spk;
    the group of a job), `gender` (of spk2gender), `recording_start`, `seconds`, `rate`, `channels`,
    `sha256`.

    Invalid rows:

    - an entry of wav.scp that is a command, other than flac -c -d FILE | (commands are not run)
    - a recording that is missing, or an utterance or segment a second time
    - a segment of no recording, or with wrong times
    - an utterance without transcript in a folder with a file text, or a transcript without its
      utterance
    """

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        sets = self._sets(source, listing)
        tables = {entry.name: entry for entry in listing.entries}
        invalid: list[InvalidRow] = []
        named: list[tuple[Line, str]] = []
        owners: list[tuple[str, str]] = []
        for folder, split in sets.items():
            wav = _Table(tables, folder, "wav.scp", split, invalid)
            for name, line in wav.items():
                path = path_of_entry(line.text)
                if path is None:
                    invalid.append(invalid_row(line.location, split, IS_COMMAND))
                else:
                    named.append((line, path))
                    owners.append((folder, name))
        where, fingerprint = locate(source, listing, named, self.options.root)
        files: dict[str, dict[str, archives.Entry]] = {folder: {} for folder in sets}
        for (folder, name), (line, _), (entry, reason) in zip(owners, named, where, strict=True):
            if entry is None:
                invalid.append(invalid_row(line.location, sets[folder], reason))
            else:
                files[folder][name] = entry
        rows = [
            row
            for folder, split in sets.items()
            for row in _utterances(tables, folder, split, files[folder], invalid)
        ]
        good, doubled = drop_repeated_keys(rows, segment_of)
        invalid += doubled
        columns = {
            name: pa.string()
            for name in ("utterance", "transcript", "speaker", "gender")
            if any(row[name] is not None for row in good)
        }
        return Index(
            recordings_table(good, columns, source, invalid),
            fingerprint,
            invalid=invalid,
            notes={
                "sets": len(sets),
                "recordings that no line names": unnamed_sounds(listing, rows),
                "files left out": count_other_files(listing, *TABLES),
            },
        )

    def _sets(self, source: str, listing: archives.Listing) -> dict[str, str]:
        """Return the split of each data directory. Raises ValueError for a missing one."""
        directories = [
            posixpath.dirname(entry.name)
            for entry in listing.entries
            if posixpath.basename(entry.name) == "wav.scp"
        ]
        if not directories:
            raise ValueError(
                f"{source}: no wav.scp there; a data directory of Kaldi has one, with the path of "
                "each recording"
            )
        wanted = [name.strip().strip("/") for name in self.options.sets.split(",") if name.strip()]
        for name in wanted:
            if name not in directories:
                raise ValueError(
                    f"--set sets={self.options.sets}: no {name}/wav.scp in {source}; "
                    f"{nearest(name, directories)}"
                )
        folders = wanted or directories
        if self.options.split:
            return {folder: self.options.split for folder in folders}
        base = posixpath.basename(source.rstrip("/"))
        splits = {folder: _split_of(folder or base) for folder in folders}
        unclear = [folder for folder, split in splits.items() if not split]
        if not unclear:
            return splits
        if len(folders) == 1:
            # the words after "no" are of other sets: all_no_test
            name = re.sub("no_?[a-z]+", "", (folders[0] or base).lower())
            return {folders[0]: split_of_file(name)}
        raise ValueError(
            f"{source}: the name of {unclear[0] or base} tells no split, as train, dev, test and "
            "eval do; rename it, prepare it alone (--set sets=), or give all the same --set split="
        )


def _split_of(folder: str) -> str:
    """Return the split in a folder's name, else in that of the folder above, else "".

    The last word counts: train_dev is held out. A word after "no" does not: tr_no_dev is for
    training.
    """
    names = [re.findall("[a-z]+", name) for name in reversed(folder.lower().split("/"))]
    for words in names:
        for before, word in reversed(list(pairwise(["", *words]))):
            split = KALDI_SPLITS.get(word.removesuffix("set"), "")
            if split and before != "no":
                return split
    for words in names:
        if len(words) > 1 and words[0] in SHORT_SPLITS:
            return SHORT_SPLITS[words[0]]
    return ""


class _Table:
    """The lines of one table of a data directory, by their first field."""

    def __init__(
        self,
        tables: dict[str, archives.Entry],
        folder: str,
        name: str,
        split: str,
        invalid: list[InvalidRow],
    ):
        entry = tables.get(posixpath.join(folder, name))
        self.exists = entry is not None
        self.lines: dict[str, Line] = {}
        for line in lines_of([entry] if entry is not None else []):
            key, rest = _first_field(line.text)
            reason = line.reason
            if key in self.lines and not reason:
                reason = f"a second line for {key}, after {self.lines[key].location}"
            if reason:
                invalid.append(invalid_row(line.location, split, reason))
            else:
                self.lines[key] = line._replace(text=rest.strip())

    def items(self) -> Iterator[tuple[str, Line]]:
        yield from self.lines.items()

    def get(self, key: str | None) -> str | None:
        return self.lines[key].text if key in self.lines else None


def _first_field(text: str) -> tuple[str, str]:
    """Return the first field of a line and the rest, between which are spaces or tabs."""
    first, *rest = re.split(r"[ \t]+", text.strip(), maxsplit=1)
    return first, "".join(rest)


def path_of_entry(text: str) -> str | None:
    """Return the file that an entry of wav.scp names, None for a command."""
    if not text.endswith("|"):
        return text
    found = FLAC.fullmatch(" ".join(text.split()))
    return found["path"] if found else None


def _utterances(
    tables: dict[str, archives.Entry],
    folder: str,
    split: str,
    files: dict[str, archives.Entry],
    invalid: list[InvalidRow],
) -> list[Row]:
    """Return a row for each utterance of a data directory; invalid ones are added to `invalid`."""
    segments = _Table(tables, folder, "segments", split, invalid)
    texts = _Table(tables, folder, "text", split, invalid)
    speakers = _Table(tables, folder, "utt2spk", split, invalid)
    genders = _Table(tables, folder, "spk2gender", split, invalid)
    rows: dict[str, Row] = {}
    for name, (entry, start, seconds) in _pieces(segments, split, files, invalid).items():
        speaker = speakers.get(name)
        rows[name] = recording_row(
            entry,
            split,
            start=start,
            seconds=seconds,
            utterance=name,
            transcript=None,
            speaker=speaker,
            gender=genders.get(speaker),
        )
    if not texts.exists:
        return list(rows.values())
    good, wrong = join_transcripts(
        rows,
        {name: [line] for name, line in texts.items()},
        lambda _: split,
        posixpath.join(folder, "text"),
    )
    invalid += wrong
    return good


def _pieces(
    segments: _Table,
    split: str,
    files: dict[str, archives.Entry],
    invalid: list[InvalidRow],
) -> dict[str, tuple[archives.Entry, float | None, float | None]]:
    """Return (file, start, seconds) of each utterance; None: from the start, to the end."""
    if not segments.exists:
        return {name: (entry, None, None) for name, entry in files.items()}
    found = {}
    for name, line in segments.items():
        recording, rest = _first_field(line.text)
        times = _times(rest)
        if times is None:
            reason = "not UTTERANCE RECORDING START END, in seconds"
        elif recording not in files:
            reason = f"segment of recording {recording}, which is not in wav.scp or cannot be used"
        elif times[0] < 0 or (times[1] != TO_THE_END and times[1] <= times[0]):
            reason = f"a segment from {times[0]:g} to {times[1]:g} seconds"
        else:
            start, end = times
            found[name] = files[recording], start, None if end == TO_THE_END else end - start
            continue
        invalid.append(invalid_row(line.location, split, reason))
    return found


def _times(text: str) -> tuple[float, float] | None:
    """Return start and end of a segment, None for a text that is not two numbers."""
    try:
        start, end = map(float, text.split())
    except ValueError:
        return None
    return (start, end) if math.isfinite(start) and math.isfinite(end) else None
