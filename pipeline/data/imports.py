"""Image folders, JSON Lines, CSV and plain text brought into Parquet, once, keyed by what was found."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from pipeline import folders, storage
from pipeline.job import spec_hash

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
FORMATS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv",
           ".txt": "text", ".text": "text", **dict.fromkeys(IMAGE_SUFFIXES, "images")}
GROUP_ROWS = 1024


def _expand(uris: list[str]) -> list[tuple[str, str]]:
    """(file, root) of every file, each once, sorted; hidden files and files of unknown kind in folders are left out."""
    out = []
    for uri in uris:
        found = [uri] if storage.is_dir(uri) else storage.glob(uri)
        if not found:
            raise ValueError(f"{uri}: no such file, folder or glob")
        for entry in found:
            if storage.is_dir(entry):
                inside = [f for f in storage.list_files(entry) if not any(p.startswith((".", "_")) for p in PurePosixPath(f[len(entry):]).parts)]
                out += [(entry, f) for f in inside if PurePosixPath(f).suffix.lower() in FORMATS]
            else:
                out.append(("", entry))
    return sorted({file: root for root, file in reversed(out)}.items())


def to_parquet(uris: list[str], form: str, imports_uri: str) -> list[str]:
    """Parquet files that hold the rows of the given files: themselves, or an import of them under ``imports_uri``.

    Raises ValueError for no files, kinds that are mixed, an empty file or text that is not UTF-8 (file and line named).
    """
    pairs = _expand(uris)
    kinds = {form} if form != "auto" else {FORMATS.get(PurePosixPath(f).suffix.lower(), "") for f, _ in pairs}
    if not pairs or kinds == {""}:
        raise ValueError(f"{', '.join(uris)}: no files of a known kind ({', '.join(sorted(FORMATS))}); set data.format")
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(uris)}: files of several kinds ({', '.join(sorted(k or 'unknown' for k in kinds))}); name one kind by a glob")
    kind = kinds.pop()
    for file, _ in pairs:
        if storage.size(file) == 0 and kind != "images":  # an empty image is one bad row, an empty table is a mistake
            raise ValueError(f"{file}: the file is empty (0 bytes); remove it or write it again")
    if kind == "parquet":
        return [file for file, _ in pairs]
    if kind == "images":
        key = spec_hash(kind, [[f, storage.size(f)] for f, _ in pairs])
    else:
        key = spec_hash(kind, [[PurePosixPath(f).name, storage.fingerprint(f)] for f, _ in pairs])
    folder = storage.join(imports_uri, key)
    if not storage.exists(storage.join(folder, "manifest.json")):
        _import(kind, pairs, folder)
    return [storage.join(folder, "rows.parquet")]


def _import(kind: str, pairs: list[tuple[str, str]], folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "rows.parquet")
        if kind == "images":
            files = [file for file, _ in pairs]
            labels = [PurePosixPath(file).parent.name for file in files]
            pq.write_table(pa.table({"image": files, "label": labels}), path, row_group_size=GROUP_ROWS)
        else:
            writer = None
            for file, _ in pairs:
                for table in _tables(kind, file):
                    writer = writer or pq.ParquetWriter(path, table.schema)
                    if not table.schema.equals(writer.schema):
                        raise ValueError(f"{file}: its columns ({_columns(table.schema)}) differ from those of {pairs[0][0]} ({_columns(writer.schema)})")
                    writer.write_table(table, row_group_size=GROUP_ROWS)
            assert writer is not None
            writer.close()
        folders.commit_folder(folder, {"rows.parquet": path}, {"kind": kind, "format_version": 1})


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _tables(kind: str, file: str):
    with storage.open_read(file) as handle:
        if kind == "text":
            yield from _lines(handle, file)
            return
        try:
            if kind == "csv":
                tab = PurePosixPath(file).suffix.lower() == ".tsv"
                options = pacsv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True)
                yield pacsv.read_csv(handle, parse_options=options)
            else:
                yield pajson.read_json(handle)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file}: not readable as {kind}: {str(error).splitlines()[0]}") from None


def _lines(handle, file: str):
    """Non-empty lines of a text file, one a row, in tables of bounded size."""
    lines: list[str] = []
    for number, raw in enumerate(handle, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line); convert the file") from None
        if line.strip():
            lines.append(line)
        if len(lines) >= 64 * GROUP_ROWS:
            yield pa.table({"text": lines})
            lines = []
    yield pa.table({"text": pa.array(lines, pa.string())})
