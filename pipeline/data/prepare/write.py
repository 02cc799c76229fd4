"""From an index of rows to parts on disk: in parallel, each written whole, with checksums; what is there already is kept.

A part's rows follow from the index alone, so a run that was killed and goes on writes the same bytes. Rows of a split stand in a random
but fixed order: a block of them is a fair sample of the classes, which training that streams blocks relies on. Only rows of a tar.gz
stay with their archive, in a random order there: it can be read from its start alone, so that each part costs a pass over its archive.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import folders, registry, storage
from pipeline.data.loader import threaded_map
from pipeline.data.prepare import summary
from pipeline.data.prepare.files import GZIPPED, Reader, absolute
from pipeline.data.prepare.importing import Importer, Index, few
from pipeline.data.prepare.pixels import BrokenImageError, examine
from pipeline.data.stream import map_items
from pipeline.job import spec_hash
from pipeline.rng import mix, row_keys

PART_BYTES, GROUP_BYTES = 96 << 20, 8 << 20
"""About so many bytes of images in a part, and in a row group of it (what a reader takes at once)."""
MANIFEST, BEGUN = "_manifest.json", "_prepare.json"
"""Names that begin with an underscore are passed over where the folder is read as data."""
FORMAT_VERSION = 1
BYTES_A_PIXEL = 0.4
"""A JPEG at quality 92, for the size of parts when images are made smaller."""


@dataclass(frozen=True)
class Settings:
    """What holds for every importer. ``max_bad``: the share of rows that may be broken."""

    resize: int | None = None
    quality: int | None = None
    rows_per_part: int | None = None
    max_bad: float = 0.01

    def __post_init__(self):
        for name, low, high in (("resize", 16, 16384), ("quality", 1, 100), ("rows_per_part", 1, 1 << 31), ("max_bad", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: from {low} to {high}")


@dataclass(frozen=True)
class Part:
    """One file to write: rows ``order[start:stop]`` of the index."""

    name: str
    split: str
    start: int
    stop: int


class Preparation:
    """All parts of one source, and which are left to write.

    Raises ValueError for a source that is not what the importer reads, and for an output folder that holds something else.
    """

    def __init__(self, name: str, source: str, output: str, options: Any = None, settings: Settings | None = None):
        self.name, self.source, self.output, self.settings = name, absolute(source), absolute(output), settings or Settings()
        if f"{self.output}/".startswith(f"{self.source}/"):
            raise ValueError(f"{self.output} lies in {self.source}: the parts would become part of what they are made of; give a folder outside")
        self.importer: Importer = registry.get("importer", name)(options)
        self.index: Index = self.importer.index(self.source)
        self.order = _order(self.index.rows)
        self.parts = _parts(self.index.rows.select(["split", "_size"]).take(pa.array(self.order)), self.settings)
        s = self.settings
        self.key = spec_hash(FORMAT_VERSION, name, self.importer.options, s.resize, s.quality, s.rows_per_part, self.index.mark, self.index.info,
                             _digest(self.index.rows))
        self._check_output()

    def _check_output(self) -> None:
        begun = storage.join(self.output, BEGUN)
        if storage.exists(begun):
            if storage.read_json(begun)["key"] != self.key:
                raise ValueError(f"{self.output} holds parts of another source or of other options (see {BEGUN} there); give an empty folder")
        elif others := [uri for uri in storage.list_files(self.output) if not uri.rpartition("/")[2].startswith(".")]:
            raise ValueError(f"{self.output} holds other files ({few(name.rpartition('/')[2] for name in others)}); give an empty folder")

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """What was recorded of each part that stands: one without its record, or of another size than it says, is not whole."""
        files = set(storage.list_files(self.output))

        def record(part: Part) -> dict[str, Any] | None:
            uri = storage.join(self.output, part.name)
            if not {uri, self._record_uri(part)} <= files:
                return None
            found = storage.read_json(self._record_uri(part))
            return found if storage.size(uri) == found["size"] else None

        return {part.name: found for part, found in zip(self.parts, threaded_map(record, self.parts), strict=True) if found}

    @property
    def todo(self) -> list[Part]:
        return [part for part in self.parts if part.name not in self.records]

    def _record_uri(self, part: Part) -> str:
        return storage.join(self.output, "_parts", part.name.removesuffix(".parquet") + ".json")

    @property
    def is_done(self) -> bool:
        return not self.todo and storage.exists(storage.join(self.output, MANIFEST))

    def run(self, tell: Callable[[str, bool], None] = lambda line, final: None, cpus: float = 1.0) -> dict[str, Any]:
        """Write what is missing, as Ray tasks where Ray runs; the manifest, last. Raises ValueError when more rows are broken than ``max_bad`` allows."""
        broken = [row for part in self.parts if part.name in self.records for row in self.records[part.name]["broken"]]
        self._check_budget(broken)
        if self.is_done:
            return folders.open_folder(self.output, MANIFEST)
        storage.write_json(storage.join(self.output, BEGUN), {"key": self.key, "importer": self.name, "source": self.source,
                                                              "options": self.importer.options.model_dump(mode="json")})
        todo = self.todo
        work = partial(_write_part, self.importer, self.settings, self.schema, self.output)
        done = sum(part.stop - part.start for part in self.parts if part.name in self.records)
        for part, (record, error) in zip(todo, map_items(work, self._jobs(todo), cpus=cpus), strict=True):
            if error:
                raise ValueError(error)
            uri = storage.join(self.output, part.name)
            if not storage.exists(uri):
                raise ValueError(f"{uri}: a worker has written it on another machine; give an output that all machines share, such as s3://")
            self.records[part.name] = record
            storage.write_json(self._record_uri(part), record)
            broken += record["broken"]
            self._check_budget(broken)
            done += part.stop - part.start
            tell(f"prepare {self.name}: {done}/{len(self.order)} rows  {len(broken)} broken", done == len(self.order))
        return self._finish(broken)

    def told(self) -> str:
        """What stands in the output, in a line."""
        done = folders.open_folder(self.output, MANIFEST)
        rows = ", ".join(f"{split} {n}" for split, n in done["rows"].items())
        return f"{self.output}: {rows} rows in {len(done['files'])} parts, {done['broken']} broken files left out; see _summary.md there"

    def _jobs(self, parts: list[Part]) -> Iterator[tuple[str, pa.Table]]:
        for part in parts:
            yield part.name, self.index.rows.take(pa.array(self.order[part.start:part.stop]))

    @property
    def schema(self) -> pa.Schema:
        kept = [field for field in self.index.rows.schema if not field.name.startswith("_")]
        made = [pa.field("image", pa.binary()), *kept, *self.index.extra, pa.field("width", pa.int64()), pa.field("height", pa.int64()),
                pa.field("sha256", pa.string())]
        about = {"importer": self.name, **self.index.info}
        return pa.schema(made, metadata={"onetomany": json.dumps(about, ensure_ascii=False)})

    def _check_budget(self, broken: list[dict[str, str]]) -> None:
        total, share = len(self.order), self.settings.max_bad
        if len(broken) > (max(1, share * total) if share else 0):
            named = "; ".join(f"{row['path']}: {row['reason']}" for row in broken[:3])
            raise ValueError(f"{len(broken)} of {total} rows are broken, more than --max-bad {share:g} allows. First ones: {named}")

    def _finish(self, broken: list[dict[str, str]]) -> dict[str, Any]:
        found = summary.summarise(self.output, [part.name for part in self.parts], self.importer.label, broken, self.index.notes)
        storage.write_json(storage.join(self.output, "_summary.json"), found)
        storage.write_bytes(storage.join(self.output, "_summary.md"), summary.markdown(f"{self.name}: {self.source}", found).encode())
        manifest = folders.sealed({
            "format_version": FORMAT_VERSION, "importer": self.name,
            "options": self.importer.options.model_dump(mode="json"), "source": self.source, "key": self.key,
            "resize": self.settings.resize, "quality": self.settings.quality, "rows": found["rows"], "broken": len(broken), "about": self.index.info,
            "columns": {field.name: str(field.type) for field in self.schema},
            "files": {part.name: {name: self.records[part.name][name] for name in ("sha256", "size", "rows")} | {"split": part.split} for part in self.parts}})
        storage.write_json(storage.join(self.output, MANIFEST), manifest)
        return manifest


def verify(output: str) -> dict[str, Any]:
    """Read every part and compare its SHA-256 with the manifest, which is returned. Raises StorageError naming the first that differs."""
    manifest = folders.open_folder(output, MANIFEST)
    try:
        folders.verify_folder(output, manifest)
    except storage.StorageError as error:
        raise storage.StorageError(f"{error}: remove that file and give the same prepare command, which then writes it alone") from None
    return manifest


def _order(rows: pa.Table) -> np.ndarray:
    """Places of the rows by split, those of a tar.gz together, then at random: a function of the paths alone."""
    numbered = rows.select(["split", "path", "_uri"]).append_column("at", pa.array(np.arange(len(rows))))
    by_path = numbered.sort_by([("split", "ascending"), ("path", "ascending")])
    places = by_path["at"].to_numpy()
    coded = by_path["split"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    streams = pa.array(uri if uri.lower().endswith(GZIPPED) else "" for uri in by_path["_uri"].to_pylist()).dictionary_encode().indices.to_numpy()
    keys = row_keys(mix(*b"prepare"), np.zeros(1, dtype=np.int64), np.arange(len(rows)))
    return places[np.lexsort((keys, streams, coded))]


def _parts(rows: pa.Table, settings: Settings) -> list[Part]:
    """Even parts of each split; ``rows`` are in order."""
    sizes, splits = rows["_size"].to_numpy().astype(np.float64), np.array(rows["split"].to_pylist())
    if settings.resize:
        sizes = np.minimum(sizes, BYTES_A_PIXEL * 1.4 * settings.resize ** 2)
    out: list[Part] = []
    names, starts = np.unique(splits, return_index=True)
    for split, start, stop in zip(names, starts, [*starts[1:], len(splits)], strict=True):
        rows_here = int(stop - start)
        by_bytes = max(1, min(rows_here, round(float(sizes[start:stop].sum()) / PART_BYTES)))
        count = -(-rows_here // settings.rows_per_part) if settings.rows_per_part else by_bytes
        cuts = [int(start) + rows_here * i // count for i in range(count + 1)]
        out += [Part(f"{split}-{i:05d}-of-{count:05d}.parquet", str(split), cuts[i], cuts[i + 1]) for i in range(count)]
    return out


def _digest(rows: pa.Table) -> str:
    """SHA-256 of an index, wherever its files lie."""
    sink = io.BytesIO()
    plain = rows.drop_columns(["_uri"]).combine_chunks()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain, max_chunksize=1 << 16)
    return hashlib.sha256(sink.getbuffer()).hexdigest()


def _write_part(importer: Importer, settings: Settings, schema: pa.Schema, output: str, job: tuple[str, pa.Table]) -> tuple[dict[str, Any], str]:
    """Read, examine and write one part: (its record, ""), or what stops the run as a text (Ray would wrap the error in its own)."""
    name, rows = job
    reader = Reader()
    try:
        out, broken = _rows(importer, settings, reader, rows)
        data = _parquet(out, schema)
        storage.write_bytes(storage.join(output, name), data)
    except (ValueError, storage.StorageError) as error:
        return {}, str(error)
    finally:
        reader.close()
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "rows": len(out), "broken": broken}, ""


def _rows(importer: Importer, settings: Settings, reader: Reader, rows: pa.Table) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    def read(row: dict[str, Any]) -> tuple[dict[str, Any], bytes, str]:
        try:
            return row, reader(row["_uri"], row["_member"], row["_offset"], row["_size"]), ""
        except BrokenImageError as error:
            return row, b"", str(error)

    listed, out, broken = rows.to_pylist(), {}, []
    one_way = any(row["_uri"].lower().endswith(GZIPPED) for row in listed)
    places = sorted(range(len(listed)), key=lambda i: (listed[i]["_uri"], listed[i]["_offset"])) if one_way else range(len(listed))
    for i, (row, data, reason) in zip(places, threaded_map(read, (listed[i] for i in places), 1 if one_way else 4), strict=True):
        try:
            if reason:
                raise BrokenImageError(reason)
            picture = examine(data, settings.resize, settings.quality)
            made = importer.complete(row, picture)
        except BrokenImageError as error:
            broken.append({"path": row["path"], "split": row["split"], "reason": str(error)})
            continue
        width, height = picture.size
        out[i] = {**made, "image": picture.data, "width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}
    return [out[i] for i in sorted(out)], broken


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    table = pa.Table.from_pylist(rows, schema=schema)
    group = max(1, min(len(rows), round(len(rows) * GROUP_BYTES / max(1, table.nbytes))))
    sink = io.BytesIO()
    texts = [field.name for field in schema if pa.types.is_string(field.type) and field.name != "sha256"]
    pq.write_table(table, sink, row_group_size=group, compression="none", use_dictionary=texts)  # pyright: ignore[reportArgumentType] - encoded images do not get smaller
    return sink.getvalue()
