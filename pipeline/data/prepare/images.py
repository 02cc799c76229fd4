"""From an index of images to parts.

Rows of a split stand in a random but fixed order: a block of them is a fair sample of the classes, which training that streams blocks relies on.
Only rows of a tar.gz stay with their archive, in a random order there: it can be read from its start alone, so that each part costs a pass over it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.loader import threaded_map
from pipeline.data.prepare.files import GZIPPED, Reader
from pipeline.data.prepare.importing import Importer, Index
from pipeline.data.prepare.parts import Made, Part, Settings, Work
from pipeline.data.prepare.pixels import BrokenImageError, examine
from pipeline.rng import mix, row_keys

GROUP_BYTES = 8 << 20
"""About so many bytes of images in a row group: what a reader takes at once."""
BYTES_A_PIXEL = 0.4
"""A JPEG at quality 92, for the size of parts when images are made smaller."""


class ImageWork(Work):
    """The parts of an index of images."""

    noun = "files"

    def __init__(self, name: str, importer: Importer, source: str, settings: Settings):
        self.name, self.importer, self.settings = name, importer, settings
        self.index: Index = importer.index(source)
        self.order = _order(self.index.rows)
        self.parts = _parts(self.index.rows.select(["split", "_size"]).take(pa.array(self.order)), settings)
        s, sized = settings, [settings.part_mb] if settings.part_mb else []
        self.key = (s.resize, s.quality, s.rows_per_part, self.index.mark, self.index.info, _digest(self.index.rows), *sized)
        self.label, self.notes, self.info, self.total = importer.label, self.index.notes, self.index.info, len(self.order)

    @property
    def schema(self) -> pa.Schema:
        kept = [field for field in self.index.rows.schema if not field.name.startswith("_")]
        made = [pa.field("image", pa.binary()), *kept, *self.index.extra, pa.field("width", pa.int64()), pa.field("height", pa.int64()),
                pa.field("sha256", pa.string())]
        about = {"importer": self.name, **self.index.info}
        return pa.schema(made, metadata={"onetomany": json.dumps(about, ensure_ascii=False)})

    @property
    def make(self) -> Callable[[Any, Path], Made]:
        return partial(_make, self.importer, self.settings, self.schema)

    def payload(self, part: Part) -> pa.Table:
        return self.index.rows.take(pa.array(self.order[part.start:part.stop]))

    def weight(self, part: Part) -> int:
        return part.stop - part.start


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
        by_bytes = max(1, min(rows_here, round(float(sizes[start:stop].sum()) / settings.part_bytes)))
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


def _make(importer: Importer, settings: Settings, schema: pa.Schema, rows: pa.Table, scratch: Path) -> Made:
    """Read, examine and write one part."""
    reader = Reader()
    try:
        out, broken = _rows(importer, settings, reader, rows)
        return Made(_parquet(out, schema), len(out), broken)
    finally:
        reader.close()


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
