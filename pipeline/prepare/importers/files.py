"""A table (CSV, TSV, JSON Lines or Parquet) that names image or audio files, one a row."""

from __future__ import annotations

import hashlib
import posixpath
import unicodedata
from collections import defaultdict
from itertools import chain
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import RecordingOptions, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_text
from pipeline.data import manifests
from pipeline.io import file_identity, storage
from pipeline.prepare.engine import audio, images
from pipeline.prepare.engine.audio import (
    AudioImporter,
    AudioShardTask,
    recording_row,
    recordings_table,
)
from pipeline.prepare.engine.images import ImageImporter, ImageShardTask
from pipeline.prepare.engine.importing import (
    NO_SPLIT,
    SPLITS,
    Index,
    InvalidRow,
    Notes,
    Row,
    check_columns,
    file_row,
    first_few,
    index_table,
    invalid_row,
    kind_of_files,
)
from pipeline.prepare.engine.located import existing_files
from pipeline.prepare.engine.shard_tasks import Importer
from pipeline.prepare.readers.archives import Entry

TAKEN = {
    "image": ("path", "split", "image", *images.MEASURED),
    "audio": ("path", "split", "audio", *audio.MEASURED),
}
"""Columns that every row has: a column of the table with such a name becomes table_NAME."""


def column_name(name: str, what: str) -> str:
    """Return what a table's column is called in the result; `what`: image or audio."""
    return f"table_{name}" if name in TAKEN[what] else name


class FilesOptions(RecordingOptions):
    column: str = Field(
        "", description="the column that names the files; empty: the one whose values end like them"
    )
    root: str = Field(
        "", description="folder that relative names begin in; empty: the folder of the table"
    )
    suffix: str = Field(
        "", description="what the names in the column lack, such as .png where they are ids"
    )
    label: str = Field("", description="the column whose values the summary counts")
    split_column: str = Field("", description="the column that tells each row's split")


@register("importer", "files", options=FilesOptions)
class Files(Importer):
    """Image or audio files that a table names, with all columns of the table.

    It reads a CSV, TSV, JSON Lines or Parquet file with a column that names image or audio files,
    by paths relative to its folder (or --set root=), absolute paths or URIs.

    Columns: `image` or `audio` (the file's bytes), `path`, `split`, and all other columns of the
    table. Invalid rows: no file of that name, an empty name, or a file that cannot be decoded.
    """

    def plan(self, source: str, settings: Any) -> Any:
        rows = _read(source)
        column = self.options.column or _column_of(rows, source)
        check_columns(
            source,
            rows.column_names,
            ("column", column),
            ("label", self.options.label),
            ("split_column", self.options.split_column),
        )
        if self.options.suffix:
            ids = pc.cast(rows[column], pa.string())
            files = pc.binary_join_element_wise(ids, self.options.suffix, "")
            rows = rows.set_column(rows.column_names.index(column), column, files)
        if _what(rows[column]) == "audio":
            return AudioShardTask(Sounds(self.options, rows, column), source, settings)
        return ImageShardTask(Pictures(self.options, rows, column), source, settings)


def _read(source: str) -> pa.Table:
    """Read the whole table."""
    if storage.is_dir(source):
        raise ValueError(
            f"{source}: a folder; name the table that lists the files, or use importer imagefolder"
        )
    with storage.scratch_folder() as scratch:
        manifest = manifests.build(source, "auto", str(scratch))
        return manifests.read_columns(manifests.Selection(manifest), manifest.schema.names)


def _other_spellings(name: str) -> list[str]:
    """Return the names that a relative path of Windows or macOS may have elsewhere.

    Windows has backslashes between folders. macOS writes é as e and an accent (NFD).
    """
    if storage.is_absolute(name):
        return []
    path = name.strip().replace("\\", "/")
    composed, decomposed = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return [
        other for other in dict.fromkeys((path, composed, decomposed)) if other not in ("", name)
    ]


def _what(names: pa.ChunkedArray) -> str:
    """Return image or audio where nearly all of a column's texts end like such files, else ""."""
    return kind_of_files(filter(None, names.to_pylist())) if is_text(names.type) else ""


def _column_of(rows: pa.Table, source: str) -> str:
    found = [name for name in rows.column_names if _what(rows[name])]
    if len(found) != 1:
        which = f"several columns name files ({', '.join(found)})" if found else "no column does"
        of_ids = "" if found else " (of ids without a suffix also --set suffix=.png or the like)"
        raise ValueError(
            f"{source}: which column names image or audio files? {which}: pass --set column=NAME"
            f"{of_ids}; columns are {', '.join(rows.column_names)}"
        )
    return found[0]


class _Listed:
    """The rows of a table with the files that they name."""

    registered_name = "files"
    what = ""

    def __init__(self, options: FilesOptions, rows: pa.Table, column: str):
        self.options: Any = options
        self.listed, self.column = rows, column
        self.kept = {
            name: column_name(name, self.what)
            for name in rows.column_names
            if name not in (column, options.split_column)
        }
        self.label = self.kept.get(options.label, options.label)

    def __getstate__(self) -> dict[str, object]:
        """Leave the table out: tasks get the index."""
        return {**self.__dict__, "listed": None}

    def entries(self, source: str) -> tuple[list[tuple[Entry, str, Row]], list[InvalidRow], str]:
        """Return (file, split and columns of each valid row; the invalid rows; a fingerprint)."""
        root = self.options.root or posixpath.dirname(source)
        names = self.listed[self.column].to_pylist()
        uris = [
            name if not name or storage.is_absolute(name) else storage.join(root, name)
            for name in names
        ]
        known = existing_files(sorted(set(filter(None, uris))))
        others = {
            row: [storage.join(root, other) for other in _other_spellings(names[row])]
            for row, uri in enumerate(uris)
            if uri and uri not in known
        }
        known |= existing_files(sorted(set(chain.from_iterable(others.values()))))
        for row, spelled in others.items():
            uris[row] = next((uri for uri in spelled if uri in known), uris[row])
        given = self.options.split_column
        splits = self.listed[given].to_pylist() if given else ["train"] * len(names)
        columns = self.listed.select(list(self.kept)).rename_columns(list(self.kept.values()))
        good: list[tuple[Entry, str, Row]] = []
        invalid: list[InvalidRow] = []
        for row, (name, uri, split, more) in enumerate(
            zip(names, uris, splits, columns.to_pylist() or [{}] * len(names), strict=True), 1
        ):
            named = SPLITS.get(str(split).strip().lower(), "")
            reason = "" if named else NO_SPLIT
            if uri not in known:
                reason = f"no file {uri}" if name else f"no name in column {self.column}"
            if reason:
                shown = f"{posixpath.basename(source)}: row {row}"
                invalid.append(invalid_row(shown, named or "train", reason))
            else:
                good.append((Entry.of_file(name, uri, known[uri][0]), named, more))
        if not good:
            raise ValueError(
                f"{source}: none of {len(names)} rows of column {self.column} names a file that is "
                f"there: {first_few(row['reason'] for row in invalid)}; relative names begin in "
                f"{root}, pass --set root=FOLDER for another one"
            )
        absent = 0, file_identity.ABSENT
        contents = [known.get(uri, absent)[1] for uri in uris if uri]
        fingerprint = hashlib.sha256(f"{file_identity.fingerprint(source)} {contents}".encode())
        return good, invalid, fingerprint.hexdigest()

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Return the types of the table's own columns."""
        return {new: self.listed.schema.field(old).type for old, new in self.kept.items()}


def _notes(good: list[tuple[Entry, str, Row]]) -> Notes:
    """Count the files that would be both trained on and tested."""
    splits: dict[str, set[str]] = defaultdict(set)
    for entry, split, _ in good:
        splits[entry.uri].add(split)
    shared = sum(len(found) > 1 for found in splits.values())
    return {"files that rows of several splits name": shared} if shared else {}


class Pictures(_Listed, ImageImporter):
    """The rows of a table that names images."""

    what = "image"

    def index(self, source: str) -> Index:
        good, invalid, fingerprint = self.entries(source)
        rows = [{**file_row(entry, split), **more} for entry, split, more in good]
        table = index_table(rows, self.types, source)
        return Index(table, fingerprint, notes=_notes(good), invalid=invalid)


class Sounds(_Listed, AudioImporter):
    """The rows of a table that names recordings."""

    what = "audio"

    def __init__(self, options: FilesOptions, rows: pa.Table, column: str):
        AudioImporter.__init__(self, options)
        _Listed.__init__(self, options, rows, column)

    def index(self, source: str) -> Index:
        good, invalid, fingerprint = self.entries(source)
        # a table's own column may be called start or entry, too
        rows = [{**recording_row(entry, split), **more} for entry, split, more in good]
        table = recordings_table(rows, self.types, source, invalid)
        return Index(table, fingerprint, notes=_notes(good), invalid=invalid)
