"""Manifests of recordings in NeMo's format: JSON lines, one a recording or a segment."""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import RecordingOptions, register
from pipeline.io import file_identity, storage
from pipeline.prepare.engine.audio import (
    MEASURED,
    AudioImporter,
    Line,
    count_other_files,
    drop_repeated_keys,
    lines_of,
    recording_row,
    recordings_table,
    segment_of,
    unnamed_sounds,
)
from pipeline.prepare.engine.importing import (
    Index,
    InvalidRow,
    Row,
    chosen_names,
    first_few,
    invalid_row,
    split_of_file,
)
from pipeline.prepare.engine.inputs import text_problem
from pipeline.prepare.engine.located import locate
from pipeline.prepare.engine.value_types import ValueType, common_type, convert, type_of_value
from pipeline.prepare.readers import archives

SUFFIXES = (".json", ".jsonl", ".ndjson")
OWN = ("audio_filepath", "duration", "offset", "text", "speaker")
"""Fields with a meaning of their own; all others become columns."""
TAKEN = ("audio", "path", "split", "transcript", *MEASURED)
"""Columns that every row has: a field of that name becomes manifest_NAME."""
MAX_FIELDS = 200


class ManifestOptions(RecordingOptions):
    manifests: str = Field(
        "",
        description="files to read, below SOURCE, such as train_manifest.json,dev_manifest.json; "
        "empty: those with manifest in their name, else every .json and .jsonl",
    )
    split: str = Field(
        "",
        description="the split of all; empty: from the manifest's name or folder "
        "(train_manifest.json, dev.jsonl), else train",
    )
    root: str = Field(
        "",
        description="folder that audio_filepath is relative to, below SOURCE or absolute; empty: "
        "the manifest's own",
    )


@register("importer", "manifest", options=ManifestOptions)
class Manifest(AudioImporter):
    """Recordings with texts that JSON lines list, as NeMo's manifests do.

    It reads a file, or a folder or archive with several. A line has audio_filepath (relative to the
    manifest, absolute, or s3://), and if it likes offset, duration, text, speaker and any other
    fields. A line with an offset, or with a duration shorter than the file, is a segment, written
    as 16-bit FLAC.

    Columns: `audio`, `transcript` (text) and `speaker` (the group of a job) if any line has them,
    every further field under its own name, `recording_start`, `seconds`, `rate`, `channels`,
    `sha256`.

    Invalid rows: a line that is no object or names no recording, a recording that is missing or
    outside of SOURCE, a segment a second time. Recordings that no line names are counted.
    """

    label = "label"

    def index(self, source: str) -> Index:
        listing, manifests = self._manifests(source)
        invalid: list[InvalidRow] = []
        lines = [
            (line, split, fields)
            for entry, split in manifests
            for line, fields in self._objects(entry, split, invalid)
        ]
        where, fingerprint = locate(
            source,
            listing,
            [(line, fields["audio_filepath"]) for line, _, fields in lines],
            self.options.root,
        )
        types: dict[str, ValueType] = {}
        rows = []
        for (line, split, fields), (entry, reason) in zip(lines, where, strict=True):
            if entry is None:
                invalid.append(invalid_row(line.location, split, reason))
                continue
            extra = {_column(name): value for name, value in fields.items() if name not in OWN}
            for name, value in extra.items():
                known = types.get(name, ValueType.NULL)
                types[name] = common_type(known, type_of_value(value))
            rows.append(
                extra
                | recording_row(
                    entry,
                    split,
                    start=_number(fields.get("offset")),
                    seconds=_number(fields.get("duration")),
                    transcript=fields.get("text"),
                    speaker=None if fields.get("speaker") is None else str(fields["speaker"]),
                )
            )
        if len(types) > MAX_FIELDS:
            raise ValueError(
                f"{source}: {len(types)} different fields, more than {MAX_FIELDS}: "
                f"{first_few(types)}; are the fields' names data?"
            )
        good, doubled = drop_repeated_keys(rows, segment_of)
        own = {
            name: pa.string()
            for name in ("transcript", "speaker")
            if any(row[name] is not None for row in good)
        }
        columns = own | {name: types[name].column_type for name in sorted(types)}
        for row in good:
            row |= {name: convert(row.get(name), value_type) for name, value_type in types.items()}
        invalid += doubled
        return Index(
            recordings_table(good, columns, source, invalid),
            fingerprint,
            invalid=invalid,
            notes={
                "manifests": len(manifests),
                "recordings that no line names": unnamed_sounds(listing, rows),
                "files left out": count_other_files(listing, *SUFFIXES),
            },
        )

    def _manifests(self, source: str) -> tuple[archives.Listing, list[tuple[archives.Entry, str]]]:
        """Return (all files, manifests and their split). Raises ValueError for a missing one."""
        if (
            storage.exists(source)
            and not storage.is_dir(source)
            and not archives.has_suffix(source, *archives.ARCHIVES)
        ):
            entry = archives.Entry.of_file(
                posixpath.basename(storage.file_name(source)), storage.absolute(source)
            )
            listing = archives.Listing([entry], [], file_identity.fingerprint(source))
        else:
            listing = archives.listing(source)
        by_name = {entry.name: entry for entry in listing.entries if entry.suffix in SUFFIXES}
        wanted = chosen_names("manifests", self.options.manifests, by_name, source)
        named = [name for name in by_name if "manifest" in posixpath.basename(name).lower()]
        chosen = wanted or named or list(by_name)
        if not chosen:
            raise ValueError(f"{source}: no manifest ({', '.join(SUFFIXES)}) there")
        return listing, [
            (by_name[name], self.options.split or split_of_file(name)) for name in chosen
        ]

    def _objects(
        self,
        entry: archives.Entry,
        split: str,
        invalid: list[InvalidRow],
    ) -> Iterator[tuple[Line, Row]]:
        """Yield the valid lines of a manifest with their fields."""
        for line in lines_of([entry]):
            fields: Any = None
            reason = line.reason
            if not reason:
                try:
                    fields = json.loads(line.text)
                    reason = _wrong(fields)
                except (ValueError, RecursionError) as error:
                    reason = f"not JSON: {error}"
            if reason:
                invalid.append(invalid_row(line.location, split, reason))
            else:
                yield line, fields


def _wrong(fields: Any) -> str:
    """Return why a line's fields cannot be used, or ""."""
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("audio_filepath"), str)
        or not fields["audio_filepath"]
    ):
        return "no text in field 'audio_filepath'" if isinstance(fields, dict) else "no JSON object"
    for name, least in (("offset", 0.0), ("duration", 1e-6)):
        value = fields.get(name)
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < least
        ):
            return f"{name} {value!r} is no number of seconds" + (" above 0" if least else "")
    if not isinstance(fields.get("text", ""), str | None):
        return f"text {fields['text']!r:.80} is no text"
    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    return next(filter(None, (text_problem(text, name) for name, text in texts.items())), "")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _column(name: str) -> str:
    """Return the column of a field: its own name, if that is free."""
    return f"manifest_{name.lstrip('_')}" if name in TAKEN or name.startswith("_") else name
