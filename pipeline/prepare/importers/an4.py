"""AN4 (Acero and Stern 1990, Carnegie Mellon): names, addresses and numbers, spelled out."""

from __future__ import annotations

import posixpath
import re
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.engine.audio import (
    SUFFIXES,
    AudioImporter,
    Line,
    count_other_files,
    join_transcripts,
    lines_of,
    recording_row,
    recordings_table,
)
from pipeline.prepare.engine.importing import Index, Row, first_few, invalid_row
from pipeline.prepare.readers import archives

RAW = ".raw"
FORMS = (*SUFFIXES, RAW)
LISTS = {
    "train": ("etc/an4_train.fileids", "etc/an4_train.transcription"),
    "test": ("etc/an4_test.fileids", "etc/an4_test.transcription"),
}
COLUMNS = ("utterance", "transcript", "speaker")
NO_WORD = re.compile(r"<[^<>\s]*>|\+\+[^\s]*\+\+|(?<=\S)\(\d+\)")
"""<s>, </s> and <sil>; fillers such as ++NOISE++; the number of a pronunciation: A(2)."""


class An4Options(Options):
    raw: Literal["auto", "big", "little"] = Field(
        "auto",
        description="order of bytes in .raw files; auto: as the name of the folder or archive "
        "says (bigendian, littleendian), else big",
    )
    rate: int = Field(
        0, ge=0, description="samples a second to write, as FLAC; 0: 16000, as they are"
    )
    longest: float = Field(
        30.0,
        ge=1,
        description="seconds; a longer recording is broken, for it cannot be cut apart from its "
        "transcript",
    )


@register("importer", "an4", options=An4Options)
class An4(AudioImporter):
    """CMU's AN4: short recordings of spelled words and numbers.

    It reads etc/an4_train.fileids, etc/an4_train.transcription, the same of test, and wav/an4_clstk
    and wav/an4test_clstk with SPEAKER/FILE.sph, .raw or .wav: a folder, or the publisher's
    an4_sphere.tar.gz or an4_raw.bigendian.tar.gz.

    Columns: `audio` (NIST SPHERE and WAV files unchanged, .raw as FLAC), `utterance`, `transcript`
    (without <s> and </s>), `speaker` (the group of a job, by which validation rows are cut from
    train), `seconds`, `rate`, `channels`, `sha256`.

    Invalid rows: listed names without recording or transcript, and transcripts that are not listed.
    Recordings that are not listed are counted.
    """

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        ends = LISTS["train"][0]
        root = next(
            (
                entry.name.removesuffix(ends)
                for entry in listing.entries
                if entry.name.endswith(ends)
            ),
            "",
        )
        here = {
            entry.name[len(root) :]: entry._replace(name=entry.name[len(root) :])
            for entry in listing.entries
            if entry.name.startswith(root)
        }
        lists = [name for pair in LISTS.values() for name in pair]
        missing = [name for name in lists if name not in here]
        if missing:
            raise ValueError(
                f"{source}: no {first_few(missing)}; give the folder that holds etc/ and wav/, or "
                "the publisher's archive"
            )
        little = self.options.raw == "little" or (
            self.options.raw == "auto" and "littleendian" in f"{source}/{root}"
        )
        audio = _by_stem(here)
        rows: dict[Any, Row] = {}
        said: dict[Any, list[Line]] = {}
        without_audio, invalid = set(), []
        for split, (ids, transcripts) in LISTS.items():
            for line in lines_of([here[ids]]):
                name = line.text.strip()
                entry, key = audio.get(f"wav/{name}"), (split, posixpath.basename(name))
                if line.reason or entry is None:
                    without_audio.add(key)
                    reason = line.reason or f"no recording wav/{name} with {', '.join(FORMS)}"
                    invalid.append(invalid_row(line.location, split, reason))
                elif key in rows:
                    invalid.append(
                        invalid_row(line.location, split, f"{name} occurs twice in the list")
                    )
                else:
                    rows[key] = recording_row(
                        entry,
                        split,
                        layout="" if entry.suffix != RAW else "<i2" if little else ">i2",
                        utterance=key[1],
                        speaker=posixpath.basename(posixpath.dirname(name)),
                    )
            for line in lines_of([here[transcripts]]):
                name, line = _said(line)
                said.setdefault((split, name), []).append(line)
        good, wrong = join_transcripts(
            rows,
            {key: lines for key, lines in said.items() if key not in without_audio},
            lambda key: key[0],
            "the transcriptions",
        )
        invalid += wrong
        columns: dict[str, pa.DataType] = dict.fromkeys(COLUMNS, pa.string())
        unlisted = {entry.name for entry in audio.values()} - {row["path"] for row in rows.values()}
        notes = {
            "recordings that no list names": len(unlisted),
            "files left out": count_other_files(listing, RAW, *lists),
        }
        table = recordings_table(good, columns, source, invalid)
        return Index(table, listing.fingerprint, invalid=invalid, notes=notes)


def _by_stem(here: dict[str, archives.Entry]) -> dict[str, archives.Entry]:
    """Return recordings by name without suffix; of several formats the first in FORMS."""
    out: dict[str, archives.Entry] = {}
    for name, entry in here.items():
        stem = posixpath.splitext(name)[0]
        if entry.suffix in FORMS and (
            stem not in out or FORMS.index(entry.suffix) < FORMS.index(out[stem].suffix)
        ):
            out[stem] = entry
    return out


def _said(line: Line) -> tuple[str, Line]:
    """Split `<s> HELLO </s> (an251-fash-b)` into (utterance, the line with its transcript)."""
    found = re.fullmatch(r"\s*(.*?)\s*\(([^()\s]+)\)\s*", line.text)
    if found is None:
        return line.text.strip()[:80], line._replace(
            reason=line.reason or "no line that ends in (NAME)"
        )
    words = NO_WORD.sub(" ", found[1]).split()
    return found[2], line._replace(text=" ".join(words))
