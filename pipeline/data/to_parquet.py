"""Convert folders of images and of sound, JSON Lines, CSV and plain text to Parquet, once, keyed
by their content.

JSON Lines, CSV and text may be compressed (.jsonl.zst, .csv.gz, .txt.gz): they are read as a
stream, never whole.
"""

from __future__ import annotations

import io
import logging
import os
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
CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
LISTED = {"images", "audio"}
"""Kinds whose rows name files: the Parquet file holds their URIs."""
UNPACKED = {"parquet", *LISTED}
"""Kinds that are not read if compressed as a whole: these files are compressed inside."""
LONGEST_SECONDS = 30.0
"""Longer recordings are cut where they are quietest."""
AUDIO_VERSION = 1
PREPARED = "_manifest.json"
"""What `onetomany prepare` leaves with its shards, with the SHA-256 of each."""
ABOUT = "onetomany"
"""Where its shards say what their columns mean, in the metadata of Parquet."""
PREPARED_FIELDS = ("format_version", "importer", "resize", "quality", "broken")
"""Fields that tell it from other programs' files of that name. A flipped bit changes at most one
of them.
"""
TEXTS = {"text", "paragraphs", "documents"}
"""Kinds of plain text: a row is a line, a paragraph between blank lines, or a file. Their column
`text` is binary, so that a row that is not UTF-8 is reported where it is read, and does not affect
others. Of several files, each of which is a row, there are also `label` (the folder's name) and
`id` (the path).
"""
TEXT_VERSION = 2
CSV_VERSION = 3
"""Changes when the same files become other rows, so that they are converted again."""
GROUP_ROWS, GROUP_BYTES = 1024, 64 << 20
"""Most rows of a row group of text; it ends earlier once it has so many bytes."""
CHUNK_BYTES, LINE_BYTES = 16 << 20, 64 << 20
"""JSON Lines are read in chunks of so many bytes, or more for a longer line, up to the second
number, which also limits every row of text.
"""
MARK = b"\xef\xbb\xbf"
WIDE = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""


def kind_of(file: str) -> str:
    """Return the kind of a file by its name, or ""."""
    path = PurePosixPath(storage.file_name(file).lower())
    packed = path.suffix in CODECS
    kind = FORMATS.get(path.with_suffix("").suffix if packed else path.suffix, "")
    return "" if packed and kind in UNPACKED else kind


class _Unpacked(io.RawIOBase):
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


def open_unpacked(file: str) -> BinaryIO:
    """Open a file, decompressed if its suffix says so."""
    codec = CODECS.get(PurePosixPath(storage.file_name(file).lower()).suffix)
    return io.BufferedReader(_Unpacked(file, codec), 1 << 20) if codec else storage.open_read(file)


def expand(uris: list[str], form: str) -> list[tuple[str, str]]:
    """Return (file, root) of every file, each once, sorted.

    In folders hidden files, those of unknown kind and, if a form is given, those of another one are
    left out.
    """
    out, of_form = [], "text" if form in TEXTS else form
    for uri in uris:
        found = [uri] if storage.is_dir(uri) else storage.glob(uri)
        if not found:
            raise ValueError(f"{uri}: no such file, folder or glob")
        for entry in found:
            if storage.is_dir(entry):
                inside = [
                    f
                    for f in storage.list_files(entry)
                    if not any(
                        p.startswith((".", "_")) for p in PurePosixPath(f[len(entry) :]).parts
                    )
                ]
                out += [
                    (entry, f)
                    for f in inside
                    if kind_of(f) and (form == "auto" or kind_of(f) == of_form)
                ]
            else:
                out.append(("", entry))
    return sorted({file: root for root, file in reversed(out)}.items())


class Origin(NamedTuple):
    """How messages name imported rows."""

    name: str
    """The file, or files and folders, that hold them."""
    column: str
    """The column that names the file of each row; empty: there is none."""


class ImportedFiles(NamedTuple):
    """The Parquet files that hold the rows of some files."""

    files: list[str]
    fingerprint: str | None = None
    """Hash of the content, wherever it lies; None where the Parquet files are the source."""
    own: tuple[FileIdentity, ...] = ()
    """The Parquet files, where they are the source."""
    named: tuple[FileIdentity, ...] = ()
    """The images or recordings of a folder, which the rows name and which are read in training."""
    origin: Origin | None = None
    """What was brought in; None where the Parquet files are the source."""


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
        uris: files, folders and globs.
        form: of the files, or auto.
        imports_uri: where conversions are kept.
        mode: how files are identified (`file_identity`).
        text_columns: of CSV: columns that are texts in the training rows, where they may be numbers
            alone in these files.
        empty_texts: of CSV: columns in which an empty field is an empty text. In all others it is
            null.

    Raises:
        ValueError: no files, mixed kinds, an empty file, or one that is cut off or has a row above
            the limit (with file and line).
        ChangedFileError: a file changes during the conversion.
    """
    pairs = expand(uris, form)
    kinds = {form} if form != "auto" else {kind_of(f) for f, _ in pairs}
    if not pairs and form != "auto":
        raise ValueError(
            f"{', '.join(uris)}: no file of format {form} in there; a folder's files are told "
            "by their names, name others by a glob"
        )
    if not pairs or kinds == {""}:
        raise ValueError(
            f"{', '.join(uris)}: no files of a known kind ({', '.join(sorted(FORMATS))}, and "
            f"compressed {', '.join(CODECS)}); {_remedy(pairs)}"
        )
    if len(kinds) > 1:
        raise ValueError(_several_kinds(uris, pairs))
    kind, fingerprint, listed = kinds.pop(), None, []
    files = [file for file, _ in pairs]
    has_labels = kind == "documents" and len(files) > 1
    if kind in LISTED:
        listed = _listed(pairs, mode)
        cut = [AUDIO_VERSION, LONGEST_SECONDS] if kind == "audio" else []
        read = [file.identity for file in listed]
        key = spec_hash(kind, [[file.uri, file.mark] for file in listed], *cut)
        fingerprint = spec_hash(kind, [[file.name, file.label, file.mark] for file in listed], *cut)
    else:
        for file in files:
            # An empty image or document is one bad row, an empty table is a mistake
            if kind != "documents" and storage.size(file) == 0:
                raise ValueError(
                    f"{file}: the file is empty (0 bytes); remove it or write it again"
                )
        if has_labels:
            listed = _listed(pairs, mode)
            read = [file.identity for file in listed]
            names = [[file.name, file.label] for file in listed]
        else:
            read = identity.identify(files, mode)
            names = [[PurePosixPath(storage.without_query(file.uri)).name] for file in read]
        if kind == "parquet":
            _check_prepared(read)
            return ImportedFiles(files, own=tuple(read))
        key = spec_hash(
            kind,
            [[*name, file.content] for name, file in zip(names, read, strict=True)],
            *([TEXT_VERSION] if kind in TEXTS else []),
            *([CSV_VERSION, sorted(text_columns), sorted(empty_texts)] if kind == "csv" else []),
        )
    folder = storage.join(imports_uri, key)
    if checksums.intact_folder(folder, "the files are brought in again") is None:
        with storage.scratch_folder() as scratch:
            path = Path(scratch, "rows.parquet")
            with s3.naming("write", path, only_full_disk=True):
                if kind in LISTED:
                    pq.write_table(
                        _recordings(listed) if kind == "audio" else _pictures(listed),
                        path,
                        row_group_size=GROUP_ROWS,
                    )
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
        fingerprint,
        named=tuple(read) if kind in LISTED else (),
        origin=Origin(
            files[0] if len(files) == 1 else ", ".join(uris),
            {"images": "image", "audio": "audio"}.get(kind, ""),
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
    return "set data.format"


def _several_kinds(uris: list[str], pairs: list[tuple[str, str]]) -> str:
    """Return what to do about files of several kinds, with one that is probably a stray one."""
    counts = Counter(kind_of(file) for file, _ in pairs)
    common = max(counts, key=lambda kind: (kind in LISTED, bool(kind), counts[kind]))
    rare = min((kind for kind in counts if kind != common), key=counts.__getitem__)
    number = counts[rare]
    stray = next(file for file, _ in pairs if kind_of(file) == rare)
    others = f" and {number - 1} more" if number > 1 else ""
    advice = "name one kind by a glob"
    if common and any(root for _, root in pairs):
        advice += f", or say format: {common}, which leaves the other files of a folder out"
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
                f"that {PREPARED} in its folder states; remove the file and give the same prepare "
                f"command, which then writes it alone (or remove {PREPARED}, where you changed it "
                "yourself)"
            )


def _prepared_files(folder: str) -> dict[str, Any]:
    """Return what the manifest of `onetomany prepare` in a folder says of its shards; empty
    without one.

    Other programs use that name too: only a manifest with our fields is checked against its
    checksum.
    """
    uri = storage.join(folder, PREPARED)
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
    return atomic_folder.open_folder(folder, PREPARED).get("files", {})


# ---------------------------------------------------------------- a row for each file


class _File(NamedTuple):
    """A file, its path below the given folder (or below what the given files share), and its
    folder's name.
    """

    identity: FileIdentity
    name: str
    label: str

    @property
    def uri(self) -> str:
        return self.identity.uri

    @property
    def mark(self) -> str:
        """Changes with the file's content."""
        return self.identity.content


def _listed(pairs: list[tuple[str, str]], mode: identity.Mode) -> list[_File]:
    plain = [storage.without_query(file) for file, _ in pairs]
    loose = [name.split("/")[:-1] for name, (_, root) in zip(plain, pairs, strict=True) if not root]
    shared = next(
        (i for i, names in enumerate(zip(*loose, strict=False)) if len(set(names)) > 1),
        min(map(len, loose), default=0),
    )
    uris = [
        file if storage.is_remote(file) else os.path.abspath(s3.split(file)[1]) for file, _ in pairs
    ]
    out = []
    known = identity.identify(uris, mode)
    for file, (_, root), found in zip(plain, pairs, known, strict=True):
        name = file[len(root) :].lstrip("/") if root else "/".join(file.split("/")[shared:])
        label = PurePosixPath(storage.without_query(found.uri)).parent.name
        out.append(_File(found, name, label))
    return out


def _pictures(found: list[_File]) -> pa.Table:
    return pa.table(
        {"image": [file.uri for file in found], "label": [file.label for file in found]}
    )


def _recordings(found: list[_File]) -> pa.Table:
    """Make a row for each recording or segment of one, in order.

    Columns: `audio` (URI), `label` (the folder's name), `recording` (path below the given folder),
    `start` and `seconds`, which are null for a broken file (reported where it is read).
    """
    from pipeline.media import audio_io  # here: only folders of sound need its library

    def pieces(file: _File) -> list[tuple[float | None, float | None]]:
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
        for file, parts in zip(found, threaded_map(pieces, found), strict=True)
        for start, seconds in parts
    ]
    table = {
        "audio": [file.uri for file, _, _ in rows],
        "label": [file.label for file, _, _ in rows],
        "recording": [file.name for file, _, _ in rows],
    }
    return pa.table(
        {
            **table,
            "start": pa.array([start for _, start, _ in rows], pa.float64()),
            "seconds": pa.array([seconds for _, _, seconds in rows], pa.float64()),
        }
    )


def _write_documents(listed: list[_File], path: Path) -> None:
    """Write files of text, one a row, with the name of each one's folder and its path."""
    schema = pa.schema([("text", pa.binary()), ("label", pa.string()), ("id", pa.string())])
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
    if kind not in TEXTS:  # these look at their first bytes as they read them
        for file in files:
            with open_unpacked(file) as handle:
                _checked_start(file, handle.read(len(MARK)))
    if kind == "csv":
        tables = csv_tables_of(files, text_columns=text_columns, empty_texts=empty_texts)
    else:
        read = {
            "jsonl": _json_lines,
            "text": _lines,
            "paragraphs": _paragraphs,
            "documents": _document,
        }[kind]
        tables = ((file, read(file)) for file in files)
    writer = None
    for file, tables_of_file in tables:
        for table in tables_of_file:
            writer = writer or pq.ParquetWriter(path, table.schema)
            if not table.schema.equals(writer.schema):
                raise ValueError(
                    f"{file}: its columns ({_columns(table.schema)}) differ from those of "
                    f"{files[0]} ({_columns(writer.schema)})"
                )
            if len(table):
                writer.write_table(table, row_group_size=GROUP_ROWS)
    assert writer is not None
    writer.close()


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def csv_tables_of(
    files: list[str],
    delimiter: str = "",
    text_columns: Collection[str] = (),
    empty_texts: Collection[str] = (),
) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """Yield each CSV file with its tables, which are read block by block.

    A column that has codes (007) in one of the files is a column of texts in all of them. An empty
    field is null, as pandas has it.

    Args:
        files: Files with the same columns.
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
        readers.append(CsvFile(partial(open_unpacked, file), file, delimiter=mark))
    code_columns = frozenset[str]().union(*(reader.code_columns for reader in readers))
    for file, reader in zip(files, readers, strict=True):
        tables = reader.tables(code_columns | (reader.number_columns & set(text_columns)))
        yield file, (_empty_as_null(table, empty_texts) for table in tables)


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
    """Raise ValueError where something else than the delimiter parts the fields of the first two
    lines.
    """
    with open_unpacked(file) as handle:
        first, second = handle.readline(LINE_BYTES), handle.readline(LINE_BYTES)
    if delimiter.encode() in first or b'"' in first:
        return
    for other, plural in DELIMITERS.items():
        count = first.count(other.encode())
        if count and count == second.count(other.encode()):
            name = "tab" if other == "\t" else f"'{other}'"
            raise ValueError(
                f"{file}: its fields are separated by {plural}, and those of such a file by "
                f"{DELIMITERS[delimiter]}; write it anew: onetomany prepare csv {file} -o FOLDER "
                f"--set delimiter={name}"
            )


def _json_lines(file: str) -> Iterator[pa.Table]:
    """Yield the rows of a JSON Lines file, chunk by chunk.

    The columns come from a first pass over all of it, since a chunk only knows its own.
    """
    schema = None
    for number, chunk in _chunks(file):
        found = pa.struct(list(_parsed(file, number, chunk, None).schema))
        try:
            schema = found if schema is None else _wider(schema, found)
        except ValueError as error:
            raise ValueError(f"{file}: {error} (lines from {number} on)") from None
    if schema is None:
        raise ValueError(f"{file}: no line holds an object; remove it or write it again")
    for number, chunk in _chunks(file):
        yield _parsed(file, number, chunk, pa.schema(list(schema)))


def _chunks(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, whole lines) of a file, about CHUNK_BYTES at a time,
    without blank chunks.
    """
    number = 1
    with open_unpacked(file) as handle:
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
        raise ValueError(
            f"{file}: not readable as jsonl, one object a line: "
            f"{str(error).splitlines()[0]}{after}; correct the line, or let onetomany prepare text "
            "leave it out and list it"
        ) from None


def _wider(a: pa.DataType, b: pa.DataType, name: str = "") -> pa.DataType:
    """Return the type that holds the values of both, as a chunk with both kinds of lines would
    have.

    Raises ValueError, with the column, if there is none.
    """
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    # Strings, some of which are dates
    if pa.string() in (a, b) and any(pa.types.is_timestamp(kind) for kind in (a, b)):
        return pa.string()
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(_wider(a.value_type, b.value_type, name))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        ours, theirs = ({field.name: field.type for field in kind} for kind in (a, b))
        return pa.struct(
            {
                key: _wider(
                    ours.get(key, pa.null()),
                    theirs.get(key, pa.null()),
                    f"{name}.{key}".lstrip("."),
                )
                for key in ours | theirs
            }
        )
    raise ValueError(f"column {name!r} is {a} in some lines and {b} in others")


def _lines(file: str) -> Iterator[pa.Table]:
    """Yield the non-blank lines of a text file, one a row."""
    return _grouped(line.rstrip(b"\r\n") for line in _read_lines(file) if not _blank(line))


def _paragraphs(file: str) -> Iterator[pa.Table]:
    """Yield the paragraphs between blank lines, one a row, with their line breaks."""

    def found() -> Iterator[bytes]:
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
                    "blank lines separate documents (or say format: text)"
                )
            if blank and lines:
                yield b"".join(lines).rstrip(b"\r\n")
                lines, size = [], 0
        if lines:
            yield b"".join(lines).rstrip(b"\r\n")

    return _grouped(found())


def _document(file: str) -> Iterator[pa.Table]:
    """Yield a whole file as one row."""
    return _grouped(iter([_read_document(file)]))


def _read_document(file: str) -> bytes:
    """Return the content of a file of text. Raises ValueError for a very large one."""
    with open_unpacked(file) as handle:
        data = handle.read(LINE_BYTES + 1)
    if len(data) > LINE_BYTES:
        raise ValueError(
            f"{file}: the document is larger than {LINE_BYTES >> 20} MiB; cut it up, or say "
            "format: text (a line is a document) or paragraphs"
        )
    return _checked_start(file, data)


def _blank(line: bytes) -> bool:
    return not line.strip() or (len(line) < 64 and not line.decode("utf-8", "replace").strip())


def _checked_start(file: str, start: bytes) -> bytes:
    """Return a file's first bytes without the byte order mark of UTF-8.

    Raises ValueError for UTF-16, and for archives and spreadsheets.
    """
    if start.startswith(b"PK\x03"):
        raise ValueError(
            f"{file}: its content is a spreadsheet or zip archive, not text: save the sheet as "
            "CSV, or unpack it"
        )
    if start.startswith(WIDE):
        raise ValueError(
            f"{file}: the file is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
        )
    return start.removeprefix(MARK)


def _read_lines(file: str) -> Iterator[bytes]:
    with open_unpacked(file) as handle:
        number = 1
        while line := handle.readline(LINE_BYTES):
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(
                    f"{file}:{number}: the line is longer than {LINE_BYTES >> 20} MiB; a text file "
                    "has one document a line, or say format: paragraphs or documents"
                )
            yield _checked_start(file, line) if number == 1 else line
            number += 1


def _grouped(rows: Iterator[bytes]) -> Iterator[pa.Table]:
    """Yield tables of bounded size, at least one."""
    held: list[bytes] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row)
        if size >= GROUP_BYTES or len(held) >= 64 * GROUP_ROWS:
            yield pa.table({"text": pa.array(held, pa.binary())})
            held, size = [], 0
    yield pa.table({"text": pa.array(held, pa.binary())})
