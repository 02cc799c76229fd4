"""Common Voice (Ardila et al. 2020): clips of volunteers who read sentences."""

from __future__ import annotations

import posixpath
from collections import Counter

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, nearest, register
from pipeline.io import storage
from pipeline.prepare.engine.audio import (
    AudioImporter,
    audio_entries,
    count_other_files,
    drop_repeated_keys,
    recording_row,
    recordings_table,
)
from pipeline.prepare.engine.importing import (
    SPLITS,
    Index,
    InvalidRow,
    Notes,
    Row,
    first_few,
    parse_names,
)
from pipeline.prepare.engine.inputs import InputSplit, SplitReader
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.dialect import Dialect

NEEDED = ("client_id", "path", "sentence")
TEXTS = (
    "age",
    "gender",
    "accent",
    "accents",
    "variant",
    "locale",
    "segment",
    "sentence_id",
    "sentence_domain",
)
NUMBERS = ("up_votes", "down_votes")
"""Further columns of the publisher's tables, in one release or another."""


class CommonVoiceOptions(Options):
    lists: str = Field(
        "train,dev,test",
        description="tables to read: train, dev, test, and validated, other, invalidated, which "
        "become training rows",
    )
    language: str = Field(
        "", description="the language's folder, such as sw; empty: all that are there"
    )
    rate: int = Field(
        0,
        ge=0,
        description="samples a second to write, as FLAC (16000 for most backbones); 0: clips keep "
        "the publisher's MP3",
    )
    longest: float = Field(
        30.0,
        ge=1,
        description="seconds; a longer clip is broken, for it cannot be cut apart from its "
        "sentence",
    )


@register("importer", "commonvoice", options=CommonVoiceOptions)
class CommonVoice(AudioImporter):
    """Mozilla Common Voice: recordings of read sentences in many languages.

    It reads LANGUAGE/clips/*.mp3 with LANGUAGE/train.tsv, dev.tsv and test.tsv: folders, or the
    publisher's tar.gz. (Gunzip a large one first: it is decompressed again for each shard.) A clip
    in two tables stays where it is held out.

    Columns: `audio`, `transcript` (the sentence), `speaker` (client_id, the group of a job),
    `language` (the folder), `age`, `gender`, `accents`, `up_votes` and `down_votes` if the tables
    have them, `seconds`, `rate`, `channels`, `sha256`.

    Invalid rows: a line with another number of cells than the header, and one whose clip is
    missing. Clips in no table are counted.
    """

    label = "language"

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        tables = self._tables(source, listing)
        clips = {entry.name: entry for entry in audio_entries(listing)}
        rows, invalid, columns = [], [], {}
        for entry, language in tables:
            more, wrong, names = _read(entry, language, clips)
            rows, invalid = rows + more, invalid + wrong
            columns |= {name: pa.int64() if name in NUMBERS else pa.string() for name in names}
        good, doubled = drop_repeated_keys(rows, lambda row: row["path"])
        overlap = Counter(row["split"] for row in doubled) if self._overlaps else Counter()
        invalid = invalid if self._overlaps else [*invalid, *doubled]
        kinds = {**dict.fromkeys(("transcript", "speaker", "language"), pa.string()), **columns}
        unnamed = clips.keys() - {row["path"] for row in rows}
        notes: Notes = {"clips that no table read names": len(unnamed)}
        if overlap:
            notes["rows of a table whose clip another one has"] = dict(overlap)
        notes["files left out"] = count_other_files(listing, ".tsv")
        return Index(
            recordings_table(good, kinds, source, invalid),
            listing.fingerprint,
            invalid=invalid,
            notes=notes,
        )

    @property
    def _listed(self) -> list[str]:
        return [name.removesuffix(".tsv") for name in parse_names(self.options.lists)]

    @property
    def _overlaps(self) -> bool:
        """Whether tables may share clips: validated, other and invalidated do."""
        return not set(self._listed) <= set(SPLITS)

    def _tables(self, source: str, listing: archives.Listing) -> list[tuple[archives.Entry, str]]:
        """Return the chosen tables and their language. Raises ValueError for a missing one."""
        tables = {entry.name: entry for entry in listing.entries if entry.suffix == ".tsv"}
        languages: dict[str, str] = {}
        for folder in sorted(
            {posixpath.dirname(posixpath.dirname(entry.name)) for entry in audio_entries(listing)}
            & {posixpath.dirname(name) for name in tables}
        ):
            language = posixpath.basename(folder) or posixpath.basename(storage.absolute(source))
            if language in languages:
                raise ValueError(
                    f"{source}: {language} is there twice: {languages[language]} and {folder}; "
                    "give one release at a time"
                )
            languages[language] = folder
        if not languages:
            raise ValueError(f"{source}: no LANGUAGE/clips with LANGUAGE/train.tsv beside it")
        wanted = self.options.language
        if wanted and wanted not in languages:
            raise ValueError(
                f"--set language={wanted}: not in {source}; {nearest(wanted, languages)}"
            )
        if not self._listed:
            raise ValueError("--set lists=: name one table at least, such as train")
        out = []
        for language, folder in languages.items() if not wanted else [(wanted, languages[wanted])]:
            for name in self._listed:
                path = posixpath.join(folder, f"{name}.tsv")
                if path not in tables:
                    beside = [one for one in tables if posixpath.dirname(one) == folder]
                    listed = [posixpath.basename(one)[:-4] for one in beside]
                    raise ValueError(
                        f"{source}: no {path}; pass --set lists= with those that are there: "
                        f"{first_few(sorted(listed))}"
                    )
                out.append((tables[path], language))
        return out


def _read(
    table: archives.Entry,
    language: str,
    clips: dict[str, archives.Entry],
) -> tuple[list[Row], list[InvalidRow], list[str]]:
    """Return (rows, invalid rows, which of TEXTS and NUMBERS there are).

    Cells are not quoted: a quotation mark is part of a sentence.
    """
    folder, name = posixpath.split(table.name)
    split = SPLITS.get(name[:-4], "train")
    rows = []
    with Opener() as opener:
        reading = SplitReader(InputSplit(table.name, split, table), opener, most=1 << 62)
        records = list(Dialect("tab", "").rows(reading))
    if not records:
        raise ValueError(f"{table.name}: an empty table; download it again")
    header = records[0][1]
    for column in NEEDED:
        if column not in header:
            raise ValueError(f"{table.name}: no column {column!r}; {nearest(column, header)}")
    for number, fields in records[1:]:
        row = dict(zip(header, fields, strict=True))
        path = f"{folder}/clips/{row['path']}".lstrip("/")
        if path not in clips:
            reading.bad(number, f"a transcript without its recording: no {path}")
            continue
        kept: Row = {column: row[column] or None for column in TEXTS if column in row}
        kept |= {
            column: int(row[column]) if row[column].isdecimal() else None
            for column in NUMBERS
            if column in row
        }
        kept |= {"transcript": row["sentence"].strip(), "speaker": row["client_id"]}
        rows.append(recording_row(clips[path], split, language=language, **kept))
    return rows, reading.listed, [column for column in (*TEXTS, *NUMBERS) if column in header]
