"""LibriSpeech (Panayotov et al. 2015, openslr.org/12): utterances of read books."""

from __future__ import annotations

import posixpath
import re
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.io import storage
from pipeline.prepare.engine.audio import (
    AudioImporter,
    Line,
    audio_entries,
    count_other_files,
    drop_repeated_keys,
    join_transcripts,
    lines_of,
    recording_row,
    recordings_table,
)
from pipeline.prepare.engine.importing import SPLITS, Index, Row, chosen_names, first_few
from pipeline.prepare.readers import archives

TRANSCRIPTS = ".trans.txt"
COLUMNS = {
    name: pa.string()
    for name in ("utterance", "transcript", "speaker", "chapter", "subset", "gender")
}


class LibriSpeechOptions(Options):
    subsets: str = Field(
        "",
        description="those to read, such as train-clean-100,dev-clean; empty: all that are there",
    )
    rate: int = Field(
        0,
        ge=0,
        description="samples a second to write, as FLAC; 0: recordings keep the publisher's bytes",
    )
    longest: float = Field(
        40.0,
        ge=1,
        description="seconds; a longer recording is broken, for it cannot be cut apart from its "
        "transcript (the longest has 35)",
    )


@register("importer", "librispeech", options=LibriSpeechOptions)
class LibriSpeech(AudioImporter):
    """LibriSpeech: English audiobooks with their texts.

    It reads LibriSpeech/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac with
    SPEAKER-CHAPTER.trans.txt beside it: folders, or the publisher's train-clean-100.tar.gz and
    others. (Gunzip large ones first: a tar.gz is decompressed again for each shard.) Subsets called
    train-, dev- and test- are the splits.

    Columns: `audio`, `utterance`, `transcript`, `speaker` (the group of a job), `chapter`,
    `subset`, `gender` (from SPEAKERS.TXT, else null), `seconds`, `rate`, `channels`, `sha256`.

    Invalid rows: a transcript without its recording, and a recording without transcript or with
    two.
    """

    label = "subset"

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        base = (
            re.sub(r"(\.tar)?\.\w+$", "", posixpath.basename(storage.file_name(source).rstrip("/")))
            if archives.has_suffix(source, *archives.ARCHIVES)
            else posixpath.basename(storage.absolute(source))
        )
        transcripts = [entry for entry in listing.entries if entry.name.endswith(TRANSCRIPTS)]
        read = [*audio_entries(listing), *transcripts]
        by_subset = {entry.name: _place(entry.name, base) for entry in read}
        strange = [name for name, parts in by_subset.items() if parts is None]
        if strange:
            raise ValueError(
                f"{source}: files that do not lie as SUBSET/SPEAKER/CHAPTER/FILE, SUBSET called "
                f"train-, dev- or test-: {first_few(strange)}; move them, or use importer manifest "
                "for other layouts"
            )
        subsets = {parts[0] for parts in by_subset.values() if parts}
        wanted = chosen_names("subsets", self.options.subsets, subsets, source)
        taken = {
            name: parts
            for name, parts in by_subset.items()
            if parts and (not wanted or parts[0] in wanted)
        }
        texts = [entry for entry in transcripts if entry.name in taken]
        if not texts:
            raise ValueError(
                f"{source}: no SPEAKER-CHAPTER{TRANSCRIPTS} there; recordings without "
                "transcripts are read by importer manifest"
            )
        genders = _genders(
            [entry for entry in listing.entries if posixpath.basename(entry.name) == "SPEAKERS.TXT"]
        )
        found_rows = [
            _row(e, taken[e.name], genders) for e in audio_entries(listing) if e.name in taken
        ]
        rows, doubled = drop_repeated_keys(
            found_rows, lambda row: (row["subset"], row["utterance"])
        )
        said: dict[Any, list[Line]] = {}
        for line in lines_of(texts):
            name, _, text = line.text.strip().partition(" ")
            lines = said.setdefault((taken[line.file][0], name), [])
            lines.append(line._replace(text=text.strip()))
        good, wrong = join_transcripts(
            {(row["subset"], row["utterance"]): row for row in rows},
            said,
            lambda key: _split(key[0]),
            f"SPEAKER-CHAPTER{TRANSCRIPTS}",
        )
        invalid = [*doubled, *wrong]
        empty = [name for name in listing.empty if not wanted or set(wanted) & set(name.split("/"))]
        return Index(
            recordings_table(good, COLUMNS, source, invalid),
            listing.fingerprint,
            invalid=invalid,
            notes={
                "speakers of a known gender": len(genders),
                "files left out": count_other_files(listing, TRANSCRIPTS, "SPEAKERS.TXT"),
                **({"empty folders": first_few(empty)} if empty else {}),
            },
        )


def _place(name: str, base: str) -> tuple[str, str, str] | None:
    """Return (subset, speaker, chapter) of a file, or None for other files.

    `base`: the subset, where the source is one itself.
    """
    parts = [base, *name.split("/")][-4:]
    if len(parts) < 4 or not _split(parts[0]):
        return None
    return parts[0], parts[1], parts[2]


def _split(subset: str) -> str:
    return SPLITS.get(subset.partition("-")[0], "")


def _row(
    entry: archives.Entry,
    parts: tuple[str, str, str],
    genders: dict[str, str],
) -> Row:
    """Make a row; paths are those below LibriSpeech/, in folders and archives alike."""
    subset, speaker, chapter = parts
    file = posixpath.basename(entry.name)
    return recording_row(
        entry._replace(name="/".join((*parts, file))),
        _split(subset),
        utterance=posixpath.splitext(file)[0],
        speaker=speaker,
        chapter=chapter,
        subset=subset,
        gender=genders.get(speaker),
    )


def _genders(entries: list[archives.Entry]) -> dict[str, str]:
    """Return M or F by speaker, from lines such as `14 | F | train-clean-360 | 25.03 | Name`.

    Lines that begin with a semicolon are comments.
    """
    out: dict[str, str] = {}
    for line in lines_of(entries):
        cells = [cell.strip() for cell in line.text.split("|")]
        if not line.text.startswith(";") and len(cells) >= 3:
            out[cells[0]] = cells[1]
    return out
