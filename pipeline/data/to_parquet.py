"""Convert folders of images and sound, JSON Lines, CSV and plain text to Parquet.

A conversion is kept by a hash of the content, and so done once. JSON Lines, CSV and text may be
compressed (.jsonl.zst, .csv.gz, .txt.gz). They are read as a stream, never whole.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.json as pajson
import pyarrow.parquet as pq

from pipeline.config.schema import spec_hash
from pipeline.core.arrow_compute import pc
from pipeline.data.csv_tables import CsvFile
from pipeline.io import atomic_folder, checksums, s3, storage
from pipeline.io import file_identity as identity
from pipeline.io.file_identity import FileIdentity
from pipeline.io.threads import threaded_map
from pipeline.io.wording import plural

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
AUDIO_SUFFIXES = {
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".au",
    ".caf",
    ".w64",
}
FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    **dict.fromkeys(IMAGE_SUFFIXES, "images"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
}
NO_DATA_SUFFIXES = {"", ".md", ".rst", ".html", ".yaml", ".yml", ".py", ".md5", ".sha256", ".crc"}
"""Suffixes of files that often lie beside data and have no rows."""
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
NAMED_FILE_KINDS = {"images", "audio"}
"""Kinds whose rows name files: the Parquet file has their URIs."""
INTERNALLY_COMPRESSED = {"parquet", *NAMED_FILE_KINDS}
"""Kinds of files that are compressed inside, and are not read if compressed once more."""
TABLE_RECORDS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""Folders in which table formats record which files of a table are valid."""
LONGEST_SECONDS = 30.0
"""Longer recordings are cut where they are quietest."""
AUDIO_VERSION = 1
PREPARED_MANIFEST = "_manifest.json"
"""The manifest that `onetomany prepare` writes beside its shards, with the SHA-256 of each."""
ABOUT = "onetomany"
"""Key of Parquet's metadata in which shards of `prepare` describe their columns."""
PREPARED_FIELDS = ("format_version", "importer", "resize", "quality", "broken")
"""Fields by which this manifest is known from other programs' files of that name. A flipped bit
changes at most one of them.
"""
TEXT_KINDS = {"text", "paragraphs", "documents"}
"""Kinds of plain text: a row is a line, a paragraph between blank lines, or a file.

Their column `text` is binary: a row that is not UTF-8 is reported where it is read, and the others
are read. Where each of several files is a row, there are also columns `label` (the folder's name)
and `id` (the path).
"""
TEXT_VERSION = 2
JSON_VERSION = 3
CSV_VERSION = 4
"""Changes when the same files become other rows, so that they are converted again."""
GROUP_ROWS, GROUP_BYTES = 1024, 64 << 20
"""Most rows of a row group of text, and the bytes from which on it ends earlier."""
CHUNK_BYTES, LINE_BYTES = 16 << 20, 64 << 20
"""JSON Lines are read in chunks of CHUNK_BYTES, or more for a longer line. No line and no row of
text may have more than LINE_BYTES.
"""
NO_WHOLE_TYPE = (
    "its whole numbers fit neither int64 (-2^63 to 2^63 - 1) nor uint64 (0 to 2^64 - 1): write "
    "them as texts"
)
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""


def kind_of(file: str) -> str:
    """Return the kind of a file by its name, or ""."""
    path = PurePosixPath(storage.file_name(file).lower())
    is_compressed = path.suffix in CODECS
    kind = FORMATS.get(path.with_suffix("").suffix if is_compressed else path.suffix, "")
    return "" if is_compressed and kind in INTERNALLY_COMPRESSED else kind


class _Decompressed(io.RawIOBase):
    """A compressed file as a stream of its content.

    Raises ValueError, with the file, where it is damaged or ends too early.
    """

    def __init__(self, file: str, codec: str):
        self._file, self._codec = file, codec
        self._under = storage.open_read(file)
        self._stream: Any = pa.CompressedInputStream(self._under, codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except storage.StorageError:
            raise
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{self._file}: not readable as {self._codec}: {error}; the file is damaged or "
                "was cut off, fetch it again"
            ) from None

    def close(self) -> None:
        self._under.close()
        super().close()


def open_decompressed(file: str) -> BinaryIO:
    """Open a file, decompressed if its suffix says so."""
    codec = CODECS.get(PurePosixPath(storage.file_name(file).lower()).suffix)
    return (
        io.BufferedReader(_Decompressed(file, codec), 1 << 20) if codec else storage.open_read(file)
    )


def expand(uris: list[str], form: str) -> list[tuple[str, str]]:
    """Return (file, root) of every file, each once, sorted.

    Of folders, hidden files are left out, and so are files of unknown kind or, if a form is given,
    of another one.
    """
    out: list[tuple[str, str]] = []
    for uri in uris:
        if storage.is_dir(uri):
            out += [(file, uri) for file in _files_of_folder(uri, form)]
            continue
        files = storage.glob(uri)
        if not files:
            raise ValueError(f"{uri}: no such file, folder or glob")
        out += [(file, "") for file in files]
    return sorted(dict(reversed(out)).items())


def _table_format(parts: tuple[str, ...]) -> str:
    """Return the table format whose record of valid files a file belongs to, or ""."""
    if "metadata" in parts[:-1] and parts[-1].endswith(".metadata.json"):
        return "Iceberg"
    return next((TABLE_RECORDS[part] for part in parts if part in TABLE_RECORDS), "")


def _files_of_folder(folder: str, form: str) -> list[str]:
    wanted_kind = "text" if form in TEXT_KINDS else form
    files = []
    unknown, hidden = Counter[str](), 0
    for file in storage.list_files(folder):
        parts = PurePosixPath(file[len(folder) :]).parts
        table = _table_format(parts)
        if table and wanted_kind in ("auto", "parquet"):
            raise ValueError(
                f"{folder}: it is a table of {table}, whose folder may still have files with rows "
                "that were deleted or replaced: write the table out as plain Parquet, or name the "
                "files that count"
            )
        is_hidden = any(part.startswith((".", "_")) for part in parts)
        kind = kind_of(file)
        if kind and not is_hidden and (form == "auto" or kind == wanted_kind):
            files.append(file)
        elif not kind and not is_hidden:
            unknown[PurePosixPath(parts[-1].lower()).suffix] += 1
        # tables have files of their writers there, such as _SUCCESS and _manifest.json
        is_marked = any(part.startswith("_") for part in parts) and not parts[-1].startswith(".")
        hidden += is_marked and kind in ("text", *NAMED_FILE_KINDS)
    unread = {suffix: unknown[suffix] for suffix in sorted(unknown.keys() - NO_DATA_SUFFIXES)}
    if files and unread:
        shown = ", ".join(f"{count} {suffix}" for suffix, count in unread.items())
        checksums.notify(
            f"{storage.without_secrets(folder)}: {plural(sum(unread.values()), 'file')} of unknown "
            f"kind left out ({shown}): convert them if they are data"
        )
    if files and hidden:
        checksums.notify(
            f"{storage.without_secrets(folder)}: {plural(hidden, 'file')} left out, as names that "
            "begin with _ are hidden: rename the folders or files if they are data"
        )
    return files


class Origin(NamedTuple):
    """How messages name imported rows."""

    name: str
    """The file, or the files and folders."""
    column: str
    """The column that names the file of each row; "": there is none."""
    kind: str
    """What the files are: images, audio, text, csv, ..."""


class ImportedFiles(NamedTuple):
    """The Parquet files of some files' rows."""

    files: list[str]
    given: tuple[FileIdentity, ...]
    """The given files."""
    fingerprint: str | None = None
    """Hash of the content; None where the given files are Parquet."""
    origin: Origin | None = None
    """The given files in words; None where they are Parquet."""

    @property
    def named(self) -> tuple[FileIdentity, ...]:
        """The images or recordings that the rows name, and that are read in training."""
        return self.given if self.origin and self.origin.kind in NAMED_FILE_KINDS else ()


def to_parquet(
    uris: list[str],
    form: str,
    imports_uri: str,
    mode: identity.Mode = "content",
    text_columns: Collection[str] = (),
    empty_texts: Collection[str] = (),
) -> ImportedFiles:
    """Return the given files as Parquet: unchanged, or converted below `imports_uri`.

    Args:
        uris: Files, folders and globs.
        form: Kind of the files, or auto.
        imports_uri: Folder of conversions.
        mode: How files are identified (`file_identity`).
        text_columns: Columns of CSV that are texts in the training rows. They are texts here too,
            even if these files have only numbers in them.
        empty_texts: Columns of CSV in which an empty field is an empty text; in others it is null.

    Raises:
        ValueError: There are no files or several kinds, or a file is empty, cut off, or has a row
            above the limit.
        ChangedFileError: A file changes during the conversion.
    """
    pairs = expand(uris, form)
    kinds = {form} if form != "auto" else {kind_of(f) for f, _ in pairs}
    if not pairs and form != "auto":
        raise ValueError(
            f"{', '.join(uris)}: no file of format {form} in there; files of a folder are "
            "recognised by their suffix, name others by a glob"
        )
    if not pairs or kinds == {""}:
        raise ValueError(
            f"{', '.join(uris)}: no files of a known kind ({', '.join(sorted(FORMATS))}, and "
            f"compressed {', '.join(CODECS)}); {_remedy(pairs)}"
        )
    if len(kinds) > 1:
        raise ValueError(_several_kinds(uris, pairs))
    kind, fingerprint = kinds.pop(), None
    listed: list[_File] = []
    files = [file for file, _ in pairs]
    has_labels = kind == "documents" and len(files) > 1
    if kind in NAMED_FILE_KINDS:
        listed = _identified_files(pairs, mode)
        cut = [AUDIO_VERSION, LONGEST_SECONDS] if kind == "audio" else []
        read = [file.identity for file in listed]
        key = spec_hash(kind, [[file.uri, file.content] for file in read], *cut)
        contents = [[file.name, file.label, file.identity.content] for file in listed]
        fingerprint = spec_hash(kind, contents, *cut)
    else:
        if has_labels:
            listed = _identified_files(pairs, mode)
            read = [file.identity for file in listed]
            names = [[file.name, file.label] for file in listed]
        else:
            read = identity.identify(files, mode)
            empty = next((file.uri for file in read if file.size == 0), "")
            # an empty image or document is one bad row, an empty table is a mistake
            if empty and kind != "documents":
                raise ValueError(
                    f"{empty}: the file is empty (0 bytes); remove it or write it again"
                )
            names = [[PurePosixPath(storage.without_query(file.uri)).name] for file in read]
        if kind == "parquet":
            _check_prepared(read)
            return ImportedFiles(files, tuple(read))
        key = spec_hash(
            kind,
            [[*name, file.content] for name, file in zip(names, read, strict=True)],
            *([TEXT_VERSION] if kind in TEXT_KINDS else []),
            *([JSON_VERSION] if kind == "jsonl" else []),
            *([CSV_VERSION, sorted(text_columns), sorted(empty_texts)] if kind == "csv" else []),
        )
    folder = storage.join(imports_uri, key)
    if checksums.intact_folder(folder, "the files are brought in again") is None:
        with storage.scratch_folder() as scratch:
            path = Path(scratch, "rows.parquet")
            with s3.naming("write", path, only_full_disk=True):
                if kind == "audio":
                    pq.write_table(_audio_table(listed), path, row_group_size=GROUP_ROWS)
                elif kind == "images":
                    rows = [{"image": file.uri, "label": file.label} for file in listed]
                    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=GROUP_ROWS)
                elif has_labels:
                    _write_documents(listed, path)
                else:
                    _write(kind, files, path, text_columns, empty_texts)
            identity.check_unchanged(read)
            atomic_folder.commit_folder(
                folder, {"rows.parquet": path}, {"kind": kind, "format_version": 1}
            )
    return ImportedFiles(
        [storage.join(folder, "rows.parquet")],
        tuple(read),
        fingerprint,
        Origin(
            files[0] if len(files) == 1 else ", ".join(uris),
            {"images": "image", "audio": "audio"}.get(kind, "id" if has_labels else ""),
            kind,
        ),
    )


def _remedy(pairs: list[tuple[str, str]]) -> str:
    """Return what to do about files of no known kind, by the suffix of the first."""
    suffix = PurePosixPath(storage.file_name(pairs[0][0]).lower()).suffix if pairs else ""
    if suffix in (".xlsx", ".xls", ".ods"):
        return "save the sheet as CSV"
    if suffix in (".pkl", ".pickle", ".npy", ".npz", ".feather", ".arrow", ".h5", ".pt"):
        return "write it as Parquet, for example with pandas: DataFrame.to_parquet"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"):
        return "unpack it, or let onetomany prepare read it (see prepare --list)"
    return "say what they are by data.format (predict and embed: --input-format)"


def _several_kinds(uris: list[str], pairs: list[tuple[str, str]]) -> str:
    """Return what to do about files of several kinds, with one that is probably a stray one."""
    counts = Counter(kind_of(file) for file, _ in pairs)
    common = max(counts, key=lambda kind: (kind in NAMED_FILE_KINDS, bool(kind), counts[kind]))
    rare = min((kind for kind in counts if kind != common), key=counts.__getitem__)
    number = counts[rare]
    stray = next(file for file, _ in pairs if kind_of(file) == rare)
    others = f" and {number - 1} more" if number > 1 else ""
    advice = "name one kind by a glob"
    if common and any(root for _, root in pairs):
        advice += (
            f", or set format: {common}, which leaves the other files of a folder out "
            f"(predict and embed: --input-format {common})"
        )
    return (
        f"{', '.join(uris)}: files of several kinds "
        f"({', '.join(sorted(kind or 'unknown' for kind in counts))}); {stray}{others} "
        f"{'is' if number == 1 else 'are'} {rare or 'of no known kind'}; {advice}"
    )


def _check_prepared(files: list[FileIdentity]) -> None:
    """Compare Parquet files that `onetomany prepare` wrote with the manifest in their folder.

    Files that are identified by a time of change (data.identity: stat) or by an ETag of S3 are not
    compared, nor is one whose address has a query: a signature holds for no other file of its
    folder. Raises DamagedError for the first one with other content.
    """
    manifests: dict[str, dict[str, Any]] = {}
    for file in files:
        folder, _, name = file.uri.rpartition("/")
        has_query = storage.without_query(file.uri) != file.uri
        if "-sha256" not in file.content or has_query:
            continue
        if folder not in manifests:
            manifests[folder] = _prepared_files(folder or ".")
        entry = manifests[folder].get(name)
        if entry is not None and not checksums.is_same(file.content, entry):
            raise storage.DamagedError(
                f"{file.uri} is not what `onetomany prepare` wrote: it does not have the SHA-256 "
                f"that {PREPARED_MANIFEST} in its folder states; remove the file and give the same "
                "prepare command, which then writes it alone (or remove "
                f"{PREPARED_MANIFEST}, where you changed it yourself)"
            )


def _prepared_files(folder: str) -> dict[str, Any]:
    """Return what the manifest of `onetomany prepare` in a folder says of its shards; empty
    without one.

    Other programs use that name too: only a manifest with our fields is checked against its
    checksum.
    """
    uri = storage.join(folder, PREPARED_MANIFEST)
    try:
        is_there = storage.exists(uri)
    except storage.StorageError as error:
        # a web server may answer 403 for what is not there
        if not (storage.is_address(uri) and isinstance(error.__cause__, PermissionError)):
            raise
        is_there = False
    if not is_there:
        return {}
    content = storage.read_bytes(uri)
    known = [name for name in PREPARED_FIELDS if f'"{name}"'.encode() in content]
    if len(known) < len(PREPARED_FIELDS) - 1:
        log.warning(
            "%s is no manifest of `onetomany prepare`: the files in its folder are not compared "
            "with it",
            uri,
        )
        return {}
    return atomic_folder.open_folder(folder, PREPARED_MANIFEST).get("files", {})


# ---------------------------------------------------------------- a row for each file


class _File(NamedTuple):
    """A file that is a row, or has rows."""

    identity: FileIdentity
    name: str
    """Path below the given folder, or below the folder that the given files share."""
    label: str
    """Name of the file's folder."""

    @property
    def uri(self) -> str:
        return self.identity.uri


def _identified_files(pairs: list[tuple[str, str]], mode: identity.Mode) -> list[_File]:
    plain = [storage.without_query(file) for file, _ in pairs]
    # folders of the files that were given one by one, and how many of them all files share
    given_alone = [name for name, (_, root) in zip(plain, pairs, strict=True) if not root]
    folders = [name.split("/")[:-1] for name in given_alone]
    shared = min(map(len, folders), default=0)
    for depth, names in enumerate(zip(*folders, strict=False)):
        if len(set(names)) > 1:
            shared = depth
            break
    uris = [
        file if storage.is_remote(file) else os.path.abspath(s3.split(file)[1]) for file, _ in pairs
    ]
    files = []
    identities = identity.identify(uris, mode)
    for file, (_, root), known in zip(plain, pairs, identities, strict=True):
        parts = file.split("/")
        name = file[len(root) :].lstrip("/") if root else "/".join(parts[shared:])
        label = PurePosixPath(storage.without_query(known.uri)).parent.name
        files.append(_File(known, name, label))
    return files


def _audio_table(files: list[_File]) -> pa.Table:
    """Return a table with a row for each recording or segment of one, in order.

    Columns: `audio` (URI), `label` (the folder's name), `recording` (path below the given folder),
    `start` and `seconds`, which are null for a broken file (reported where it is read).
    """
    from pipeline.media import audio_io  # here: only folders of sound need its library

    def segments(file: _File) -> list[tuple[float | None, float | None]]:
        try:
            with storage.open_read(file.uri) as handle:
                seconds = audio_io.inspect(handle).seconds
                if seconds <= LONGEST_SECONDS:
                    return [(0.0, seconds)]
                handle.seek(0)
                return [
                    (start, stop - start)
                    for start, stop in audio_io.pieces(handle, None, LONGEST_SECONDS)
                ]
        except audio_io.BrokenAudioError:
            return [(None, None)]

    rows = [
        (file, start, seconds)
        for file, parts in zip(files, threaded_map(segments, files), strict=True)
        for start, seconds in parts
    ]
    return pa.table(
        {
            "audio": [file.uri for file, _, _ in rows],
            "label": [file.label for file, _, _ in rows],
            "recording": [file.name for file, _, _ in rows],
            "start": pa.array([start for _, start, _ in rows], pa.float64()),
            "seconds": pa.array([seconds for _, _, seconds in rows], pa.float64()),
        }
    )


def _write_documents(listed: list[_File], path: Path) -> None:
    """Write a row for each file of text, with the file's folder and path."""
    schema = pa.schema(
        [
            ("text", pa.binary()),
            ("label", pa.string()),
            ("id", pa.string()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for number, file in enumerate(listed, 1):
            text = _read_document(file.uri)
            rows.append({"text": text, "label": file.label, "id": file.name})
            size += len(text)
            if len(rows) == GROUP_ROWS or size >= GROUP_BYTES or number == len(listed):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows, size = [], 0


# ---------------------------------------------------------------- tables and text


def _write(
    kind: str,
    files: list[str],
    path: Path,
    text_columns: Collection[str],
    empty_texts: Collection[str],
) -> None:
    if kind not in TEXT_KINDS:  # texts are checked while they are read
        for file in files:
            with open_decompressed(file) as handle:
                _without_bom(file, handle.read(len(UTF8_BOM)))
    if kind == "csv":
        tables = csv_tables_of(files, text_columns=text_columns, empty_texts=empty_texts)
    elif kind == "jsonl":
        tables = json_tables_of(files)
    else:
        read = {"text": _lines, "paragraphs": _paragraphs, "documents": _document}[kind]
        tables = ((file, read(file)) for file in files)
    writer = None
    for file, tables_of_file in tables:
        for table in tables_of_file:
            writer = writer or pq.ParquetWriter(path, table.schema)
            if not table.schema.equals(writer.schema):
                raise _other_columns(file, table.schema, files[0], writer.schema)
            if len(table):
                writer.write_table(table, row_group_size=GROUP_ROWS)
    assert writer is not None
    writer.close()


def _other_columns(
    file: str, schema: pa.Schema, first: str, schema_of_first: pa.Schema
) -> ValueError:
    """Return the error about a file that has other columns than the first one."""
    columns, columns_of_first = (
        ", ".join(f"{field.name}: {field.type}" for field in one)
        for one in (schema, schema_of_first)
    )
    return ValueError(
        f"{file}: its columns ({columns}) differ from those of {first} ({columns_of_first})"
    )


def csv_tables_of(
    files: list[str],
    delimiter: str = "",
    text_columns: Collection[str] = (),
    empty_texts: Collection[str] = (),
) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """Yield each CSV file with its tables, which are read block by block.

    A column that has codes (007) or times in one of the files is a column of texts in all of them,
    so that each value stays as it is written. One that has whole numbers or no value in some files
    has the type that it has in the others. An empty field is null, as pandas has it.

    Args:
        files: Files with the same columns, in any order.
        delimiter: Separates fields; "": tabs in .tsv files, else commas.
        text_columns: Columns that are read as texts even if all files have numbers in them.
        empty_texts: Columns in which an empty field is an empty text instead.
    """
    readers = []
    for file in files:
        is_tabbed = ".tsv" in PurePosixPath(storage.file_name(file).lower()).suffixes[-2:]
        mark = delimiter or ("\t" if is_tabbed else ",")
        if not delimiter:
            _check_delimiter(file, mark)
        readers.append(CsvFile(partial(open_decompressed, file), file, delimiter=mark))
    types = _common_types(readers)
    code_columns = frozenset[str]().union(
        *(reader.code_columns | reader.time_columns for reader in readers),
        *(reader.find_code_columns(_as_floats(reader.types, types)) for reader in readers),
    )
    for file, reader in zip(files, readers, strict=True):
        codes = code_columns | (reader.number_columns & set(text_columns))
        tables = reader.tables(codes, types, list(readers[0].types))
        yield file, (_empty_as_null(table, empty_texts) for table in tables)


def _common_types(readers: list[CsvFile]) -> dict[str, pa.DataType]:
    """Return the types of columns over all files, without those of two kinds."""
    types: dict[str, set[pa.DataType]] = {}
    for reader in readers:
        for name, kind in reader.types.items():
            types.setdefault(name, set()).add(kind)
    out: dict[str, pa.DataType] = {}
    for name, kinds in types.items():
        kinds.discard(pa.null())
        if kinds == {pa.int64(), pa.float64()}:
            out[name] = pa.float64()
        elif len(kinds) == 1:
            out[name] = kinds.pop()
    return out


def _as_floats(
    own: dict[str, pa.DataType], types: dict[str, pa.DataType]
) -> dict[str, pa.DataType]:
    """Return the columns of a file that have whole numbers there and fractions in another file."""
    return {
        name: pa.float64()
        for name, kind in own.items()
        if kind == pa.int64() and types.get(name) == pa.float64()
    }


def _empty_as_null(table: pa.Table, empty_texts: Collection[str]) -> pa.Table:
    """Set empty texts to null in all columns but some."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type) and field.name not in empty_texts:
            column = table.column(index)
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, field.type), column)
            table = table.set_column(index, field.name, column)
    return table


DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def _check_delimiter(file: str, delimiter: str) -> None:
    """Raise ValueError where the first two lines are no text, or have another delimiter."""
    with open_decompressed(file) as handle:
        first, second = handle.readline(LINE_BYTES), handle.readline(LINE_BYTES)
    if b"\0" in first + second:
        raise ValueError(f"{file}: its content is binary, not text; write it as CSV in UTF-8")
    first, second = (re.sub(rb'"[^"]*"', b"", line) for line in (first, second))
    if delimiter.encode() in first:
        return
    for other, name_of_other in DELIMITERS.items():
        count = first.count(other.encode())
        if count and count == second.count(other.encode()):
            name = "tab" if other == "\t" else f"'{other}'"
            raise ValueError(
                f"{file}: its fields are separated by {name_of_other}, and those of such a file by "
                f"{DELIMITERS[delimiter]}; write it anew: onetomany prepare csv {file} -o FOLDER "
                f"--set delimiter={name}"
            )


def json_tables_of(files: list[str]) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """Yield each JSON Lines file with its tables, which are read chunk by chunk.

    A first pass over all files finds the columns, since a chunk may lack some.
    """
    columns: pa.DataType = pa.struct([])
    for file in files:
        own: pa.DataType = pa.struct([])
        for number, chunk in _chunks(file):
            kind = pa.struct(list(_schema_of(file, number, chunk)))
            try:
                own = _common_type(own, kind)
            except ValueError as error:
                raise ValueError(f"{file}: {error} (lines from {number} on)") from None
        if not own.num_fields:
            raise ValueError(f"{file}: no line holds an object; remove it or write it again")
        if file == files[0]:
            columns = schema_of_first = own
        if {field.name for field in own} != {field.name for field in columns}:
            raise _other_columns(file, pa.schema(own), files[0], pa.schema(schema_of_first))
        try:
            columns = _common_type(columns, own, is_one_file=False)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    schema = pa.schema(list(columns))
    for file in files:
        yield file, (_parsed(file, number, chunk, schema) for number, chunk in _chunks(file))


def _schema_of(file: str, number: int, chunk: bytes) -> pa.Schema:
    """Return the schema of some lines.

    Whole numbers from 2^63 on are uint64. Arrow itself takes them for floating-point numbers, in
    which two ids may become one.

    Raises ValueError for whole numbers that fit neither int64 nor uint64.
    """
    table = _parsed(file, number, chunk, None)
    schema = table.schema
    for index, field in enumerate(schema):
        kind = _with_texts(field.type)
        if any(map(_exceeds_int64, table[index].chunks)):
            rows = (json.loads(line) for line in chunk.splitlines() if line.strip())
            kind = _with_unsigned(kind, [row.get(field.name) for row in rows])
        if kind is None:
            raise ValueError(
                f"{file}: column {field.name!r}: {NO_WHOLE_TYPE} (lines from {number} on)"
            )
        schema = schema.set(index, field.with_type(kind))
    return schema


def _with_texts(kind: pa.DataType) -> pa.DataType:
    """Return a type with texts for what Arrow takes for times, so that they stay as written."""
    if pa.types.is_list(kind):
        return pa.list_(_with_texts(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_texts(field.type)) for field in kind])
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _exceeds_int64(values: Any) -> bool:
    """Return whether floating-point numbers in an array, or in its lists and objects, do so."""
    if pa.types.is_list(values.type) or pa.types.is_struct(values.type):
        parts = values.flatten()
        return any(map(_exceeds_int64, [parts] if pa.types.is_list(values.type) else parts))
    if not pa.types.is_floating(values.type):
        return False
    limits = pc.min_max(values).as_py()
    return (limits["max"] or 0) >= 2**63 or (limits["min"] or 0) <= -(2**63)


def _with_unsigned(kind: pa.DataType, values: list[Any]) -> pa.DataType | None:
    """Return a type with uint64 for whole numbers from 2^63 on, or None where they do not fit.

    Args:
        kind: Their type as Arrow finds it.
        values: The values in Python, null for None.
    """
    values = [value for value in values if value is not None]
    if pa.types.is_list(kind):
        inner = _with_unsigned(kind.value_type, [item for value in values for item in value])
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(kind):
        fields = {
            field.name: _with_unsigned(field.type, [value.get(field.name) for value in values])
            for field in kind
        }
        return None if None in fields.values() else pa.struct(fields)
    is_whole = all(isinstance(value, int) for value in values)
    if not pa.types.is_floating(kind) or not is_whole:
        return kind
    return pa.uint64() if min(values) >= 0 and max(values) < 2**64 else None


def _chunks(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, bytes) of whole lines, about CHUNK_BYTES at a time.

    Blank chunks are left out.
    """
    number = 1
    with open_decompressed(file) as handle:
        while chunk := handle.read(CHUNK_BYTES):
            lines = chunk.count(b"\n")
            if not chunk.endswith(b"\n"):
                rest = handle.readline(LINE_BYTES)
                if len(rest) == LINE_BYTES:
                    raise ValueError(
                        f"{file}:{number + lines}: the line is longer than {LINE_BYTES >> 20} "
                        "MiB; JSON Lines has one object a line"
                    )
                chunk, lines = chunk + rest, lines + 1
            if not chunk.isspace():
                yield number, chunk
            number += lines


def _parsed(file: str, number: int, chunk: bytes, schema: pa.Schema | None) -> pa.Table:
    try:
        return pajson.read_json(
            pa.BufferReader(chunk),
            pajson.ReadOptions(block_size=len(chunk) + 1),
            pajson.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowInvalid as error:
        if number == 1 and chunk.lstrip().startswith(b"["):
            raise ValueError(
                f"{file}: it holds one JSON list, and JSON Lines has one object a line; write it "
                f"anew: jq -c '.[]' {file} > rows.jsonl"
            ) from None
        after = f" (counted from line {number})" if number > 1 else ""
        reason = str(error).splitlines()[0]
        remedy = "correct the line, or let onetomany prepare text leave it out and list it"
        raise ValueError(
            f"{file}: not readable as jsonl, one object a line: {reason}{after}; "
            f"{NO_WHOLE_TYPE if 'to uint64' in reason else remedy}"
        ) from None


def _common_type(
    a: pa.DataType, b: pa.DataType, name: str = "", is_one_file: bool = True
) -> pa.DataType:
    """Return the type that Arrow gives a column with values of both types.

    Args:
        name: The column, for errors.
        is_one_file: Whether objects may lack fields, which are then null. Those of two files must
            have the same ones: a renamed field would be null in all rows of a file.

    Raises ValueError, with the column, if there is none.
    """
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} <= {pa.int64(), pa.uint64(), pa.float64()}:
        return pa.float64() if pa.float64() in (a, b) else pa.uint64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(_common_type(a.value_type, b.value_type, name, is_one_file))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        ours, theirs = ({field.name: field.type for field in kind} for kind in (a, b))
        if not is_one_file and ours and theirs and ours.keys() != theirs.keys():
            raise ValueError(
                f"the objects in column {name!r} have the fields {', '.join(theirs)}, and in the "
                f"files before {', '.join(ours)}: give all files the same fields, with null where "
                "there is no value"
            )
        return pa.struct(
            {
                key: _common_type(
                    ours.get(key, pa.null()),
                    theirs.get(key, pa.null()),
                    f"{name}.{key}".lstrip("."),
                    is_one_file,
                )
                for key in ours | theirs
            }
        )
    raise ValueError(f"column {name!r} is {a} in some lines and {b} in others")


def _lines(file: str) -> Iterator[pa.Table]:
    """Yield a row for each non-blank line of a text file."""
    return _grouped(line.rstrip(b"\r\n") for line in _read_lines(file) if not _blank(line))


def _paragraphs(file: str) -> Iterator[pa.Table]:
    """Yield a row for each paragraph between blank lines, with its line breaks."""

    def paragraphs() -> Iterator[bytes]:
        lines: list[bytes] = []
        size = 0
        for number, line in enumerate(_read_lines(file), 1):
            blank = _blank(line)
            if not blank:
                lines.append(line)
                size += len(line)
            if size > LINE_BYTES:
                raise ValueError(
                    f"{file}:{number}: the paragraph is longer than {LINE_BYTES >> 20} MiB; "
                    "blank lines separate documents (or set format: text)"
                )
            if blank and lines:
                yield b"".join(lines).rstrip(b"\r\n")
                lines, size = [], 0
        if lines:
            yield b"".join(lines).rstrip(b"\r\n")

    return _grouped(paragraphs())


def _document(file: str) -> Iterator[pa.Table]:
    """Yield a whole file as one row."""
    return _grouped(iter([_read_document(file)]))


def _read_document(file: str) -> bytes:
    """Return the content of a file of text. Raises ValueError for a very large one."""
    with open_decompressed(file) as handle:
        data = handle.read(LINE_BYTES + 1)
    if len(data) > LINE_BYTES:
        raise ValueError(
            f"{file}: the document is larger than {LINE_BYTES >> 20} MiB; cut it up, or set "
            "format: text (a line is a document) or paragraphs"
        )
    return _without_bom(file, data)


def _blank(line: bytes) -> bool:
    return not line.strip() or (len(line) < 64 and not line.decode("utf-8", "replace").strip())


def _without_bom(file: str, start: bytes) -> bytes:
    """Return a file's first bytes without the byte order mark of UTF-8.

    Raises ValueError for UTF-16, and for archives and spreadsheets.
    """
    if start.startswith(b"PK\x03"):
        raise ValueError(
            f"{file}: its content is a spreadsheet or zip archive, not text: save the sheet as "
            "CSV, or unpack it"
        )
    if start.startswith(UTF16_BOMS):
        raise ValueError(
            f"{file}: the file is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
        )
    return start.removeprefix(UTF8_BOM)


def _read_lines(file: str) -> Iterator[bytes]:
    with open_decompressed(file) as handle:
        number = 1
        while line := handle.readline(LINE_BYTES):
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(
                    f"{file}:{number}: the line is longer than {LINE_BYTES >> 20} MiB; a text file "
                    "has one document a line, or set format: paragraphs or documents"
                )
            yield _without_bom(file, line) if number == 1 else line
            number += 1


def _grouped(rows: Iterator[bytes]) -> Iterator[pa.Table]:
    """Yield tables of bounded size, at least one."""
    texts: list[bytes] = []
    size = 0
    for row in rows:
        texts.append(row)
        size += len(row)
        if size >= GROUP_BYTES or len(texts) >= 64 * GROUP_ROWS:
            yield pa.table({"text": pa.array(texts, pa.binary())})
            texts, size = [], 0
    yield pa.table({"text": pa.array(texts, pa.binary())})
