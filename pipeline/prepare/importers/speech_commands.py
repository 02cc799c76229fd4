"""Speech Commands (Warden 2018): clips of one second, in one folder a word."""

from __future__ import annotations

import hashlib
import posixpath
import re
from typing import Literal

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.media import audio_io
from pipeline.prepare.engine.audio import (
    AudioImporter,
    audio_entries,
    count_other_files,
    lines_of,
    recording_row,
    recordings_table,
)
from pipeline.prepare.engine.importing import (
    Index,
    InvalidRow,
    Row,
    chosen_names,
    first_few,
    invalid_row,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import BrokenImageError

NOISE = "_background_noise_"
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
MAX_CLIPS = 2**27 - 1
"""In the publisher's hash: more than a word will ever have."""
SHARES = {"validation": 10.0, "test": 10.0}
"""Percent of the speakers, and of the noise, that are held out."""
WINDOW_SECONDS = 1.0


class SpeechCommandsOptions(Options):
    words: str = Field(
        "",
        description="the words to tell apart, such as yes,no,up,down; others become unknown=; "
        "empty: every folder is a label",
    )
    unknown: str = Field(
        "_unknown_",
        description="label of the other words, where words= names some; none: leave them out",
    )
    silence: str = Field(
        "",
        description="label of one-second windows of _background_noise_, such as _silence_; empty: "
        "it is left out",
    )
    split: Literal["official", "hash", "train", "validation", "test"] = Field(
        "official",
        description="official: by validation_list.txt and testing_list.txt; hash: by the "
        "publisher's hash of the speaker, which those lists follow; or all rows in one split, "
        "such as the publisher's separate test set",
    )
    rate: int = Field(
        0,
        ge=0,
        description="samples a second to write, as FLAC; 0: clips keep the publisher's bytes",
    )


@register("importer", "speech_commands", options=SpeechCommandsOptions)
class SpeechCommands(AudioImporter):
    """Speech Commands: recordings of single words, one second long.

    It reads WORD/SPEAKER_nohash_NUMBER.wav with validation_list.txt and testing_list.txt: a folder,
    or the publisher's tar.gz.

    Columns:

    - `audio`, `seconds`, `rate`, `channels`, `sha256`
    - `label`: the word, or as `words=` and `silence=` say; `word`
    - `speaker`: the group of a job; null for noise
    - `recording_start` of windows of noise: the first eight tenths of each file are train, then
      validation, then test

    Invalid rows: listed names without their clip.
    """

    label = "label"

    def index(self, source: str) -> Index:
        listing = archives.listing(source).without_common_folder()
        words: dict[str, list[archives.Entry]] = {}
        for entry in audio_entries(listing):
            folder = posixpath.dirname(entry.name)
            if not folder or "/" in folder:
                raise ValueError(
                    f"{source}: {entry.name} does not lie as WORD/FILE; move it, or give the "
                    "folder that holds the words"
                )
            words.setdefault(folder, []).append(entry)
        noise = words.pop(NOISE, [])
        bare = sorted({name for name in listing.empty if "/" not in name} - {NOISE})
        if bare:
            raise ValueError(
                f"{source}: folders of words without recordings: {first_few(bare)}; fill or "
                "remove them"
            )
        split_of, unlisted = self._splits(source, listing, words)
        labels = self._labels(source, words)
        rows: list[Row] = []
        for word, entries in words.items():
            for entry in entries if labels[word] else ():
                columns = {"label": labels[word], "word": word, "speaker": _speaker(entry.name)}
                rows.append(recording_row(entry, split_of[entry.name], **columns))
        quiet, wrong = self._noise(noise) if self.options.silence else ([], [])
        invalid = [*unlisted, *wrong]
        types: dict[str, pa.DataType] = dict.fromkeys(("label", "word", "speaker"), pa.string())
        return Index(
            recordings_table(rows + quiet, types, source, invalid),
            listing.fingerprint,
            invalid=invalid,
            info={"labels": sorted({row["label"] for row in rows + quiet})},
            notes={
                "split": self.options.split,
                "words": len(words),
                "files of background noise": len(noise),
                "clips of other words left out": sum(map(len, words.values())) - len(rows),
                "files left out": count_other_files(listing, *LISTS.values()),
            },
        )

    def _labels(
        self,
        source: str,
        words: dict[str, list[archives.Entry]],
    ) -> dict[str, str]:
        """Return each word's label, "" to leave it out. Raises ValueError for a missing word."""
        wanted = chosen_names("words", self.options.words, words, source)
        other = "" if self.options.unknown == "none" else self.options.unknown
        return {word: word if not wanted or word in wanted else other for word in words}

    def _splits(
        self,
        source: str,
        listing: archives.Listing,
        words: dict[str, list[archives.Entry]],
    ) -> tuple[dict[str, str], list[InvalidRow]]:
        """Return (the split of every clip, listed names without a clip).

        Raises ValueError where the lists are missing, or share a clip.
        """
        names = [entry.name for entries in words.values() for entry in entries]
        if self.options.split == "hash":
            return {name: _hashed(name) for name in names}, []
        if self.options.split != "official":
            return {name: str(self.options.split) for name in names}, []
        lists = {entry.name: entry for entry in listing.entries if entry.name in LISTS.values()}
        missing = [name for name in LISTS.values() if name not in lists]
        if missing:
            raise ValueError(
                f"{source}: {first_few(missing)} not there; put the publisher's lists beside the "
                "words, or pass --set split=hash or split=train"
            )
        out: dict[str, str] = dict.fromkeys(names, "train")
        invalid: list[InvalidRow] = []
        for split, file in LISTS.items():
            for line in lines_of([lists[file]]):
                name = posixpath.normpath(line.text.strip().replace("\\", "/"))
                if name not in out:
                    reason = line.reason or f"no recording {name}"
                    invalid.append(invalid_row(line.location, split, reason))
                elif out[name] not in ("train", split):
                    raise ValueError(
                        f"{source}: {name} stands in both lists; a clip lies in one split"
                    )
                else:
                    out[name] = split
        return out, invalid

    def _noise(self, entries: list[archives.Entry]) -> tuple[list[Row], list[InvalidRow]]:
        """Return (a row for each second of noise, unusable files). Splits are cut by time."""
        windows, rows, invalid = [], [], []
        with archives.Reader() as reader:
            for entry in sorted(entries, key=lambda entry: (entry.uri, entry.offset)):
                try:
                    count = int(audio_io.inspect(reader.entry(entry)).seconds / WINDOW_SECONDS)
                    windows += [(entry, i, count) for i in range(count)]
                except (audio_io.BrokenAudioError, BrokenImageError) as error:
                    invalid.append(invalid_row(entry.name, "train", str(error)))
        for entry, i, count in windows:
            split = (
                self.options.split
                if self.options.split not in ("official", "hash")
                else _held_out((100.0 * (i + 0.5) / count + sum(SHARES.values())) % 100)
            )
            start, label = i * WINDOW_SECONDS, self.options.silence
            window = recording_row(entry, split, start=start, seconds=WINDOW_SECONDS, label=label)
            rows.append({**window, "word": None, "speaker": None})
        return rows, invalid


def _speaker(name: str) -> str | None:
    found = re.match(r"(.+)_nohash_", posixpath.basename(name))
    return found[1] if found else None


def _held_out(percent: float) -> str:
    """Return the split of a percentage from 0 to 100: validation, then test, then train."""
    if percent < SHARES["validation"]:
        return "validation"
    return "test" if percent < sum(SHARES.values()) else "train"


def _hashed(name: str) -> str:
    """Return the split of a clip by `which_set` of the data set's README: a hash of the speaker.

    Speakers so stay in one split as clips are added.
    """
    digest = hashlib.sha1(re.sub(r"_nohash_.*$", "", posixpath.basename(name)).encode()).hexdigest()
    return _held_out(int(digest, 16) % (MAX_CLIPS + 1) * (100.0 / MAX_CLIPS))
