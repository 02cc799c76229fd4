"""From an index of files to shards: what image and audio importers share.

Rows of a split are shuffled in a fixed order, so that a block of rows is a fair sample of the
classes: training that streams blocks relies on it. Rows of a tar.gz stay with their archive
(shuffled inside it), since each shard costs one pass over it from its start.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_lists import dictionary_codes
from pipeline.core.rng import mix, row_keys
from pipeline.io.threads import threaded_map
from pipeline.media.audio_io import BrokenAudioError
from pipeline.prepare.engine.importing import Index, Row
from pipeline.prepare.engine.shard_tasks import OutputShard, Settings, ShardTask, name_shards
from pipeline.prepare.readers.archives import is_gzipped
from pipeline.prepare.readers.picture_check import BrokenImageError


class IndexShardTask(ShardTask):
    """The shards of an index. Subclasses say what a row becomes."""

    def __init__(self, importer: Any, source: str, settings: Settings):
        super().__init__(importer, settings)
        self.index: Index = importer.index(source)
        rows = self.index.rows
        self.order = _order(rows)
        splits = rows["split"].take(pa.array(self.order)).to_pylist()
        self.shards = _parts(splits, self.sizes()[self.order], settings)
        sized = [settings.part_mb] if settings.part_mb else []
        self.key = (
            *self.depends,
            settings.rows_per_part,
            self.index.fingerprint,
            self.index.info,
            _digest(rows),
            *sized,
        )
        self.label, self.notes, self.info = importer.label, self.index.notes, self.index.info
        self.invalid, self.total = self.index.invalid, len(self.order) + len(self.index.invalid)

    @property
    def depends(self) -> tuple[Any, ...]:
        """Settings that a row's content depends on."""
        return ()

    def sizes(self) -> np.ndarray:
        """Estimate how many bytes each row of the index becomes: (rows,) float64."""
        return self.index.rows["_size"].to_numpy().astype(np.float64)

    @property
    def kept(self) -> list[pa.Field]:
        """Columns of the index that are written."""
        return [field for field in self.index.rows.schema if not field.name.startswith("_")]

    def payload(self, shard: OutputShard) -> pa.Table:
        return self.index.rows.take(pa.array(self.order[shard.start : shard.stop]))


def _order(rows: pa.Table) -> np.ndarray:
    """Return the order of rows: by split, those of a tar.gz together, else shuffled by path."""
    numbered = rows.select(["split", "path", "_uri"]).append_column(
        "at", pa.array(np.arange(len(rows)))
    )
    by_path = numbered.sort_by([("split", "ascending"), ("path", "ascending")])
    places = by_path["at"].to_numpy()
    coded, _ = dictionary_codes(by_path["split"])
    archives = [uri if is_gzipped(uri) else "" for uri in by_path["_uri"].to_pylist()]
    streams, _ = dictionary_codes(pa.array(archives, pa.string()))
    keys = row_keys(
        mix(*b"prepare"),
        np.zeros(1, dtype=np.int64),
        np.arange(len(rows)),
    )
    return places[np.lexsort((keys, streams, coded))]


def _parts(listed: list[str], sizes: np.ndarray, settings: Settings) -> list[OutputShard]:
    """Cut each split into shards of equal size."""
    out: list[tuple[str, int, int]] = []
    names, starts = np.unique(splits := np.array(listed), return_index=True)
    for split, start, stop in zip(names, starts, [*starts[1:], len(splits)], strict=True):
        rows_here = int(stop - start)
        count = settings.num_parts(rows_here, float(sizes[start:stop].sum()))
        cuts = [int(start) + rows_here * i // count for i in range(count + 1)]
        out += [(str(split), a, b) for a, b in pairwise(cuts)]
    return name_shards(out)


def _digest(rows: pa.Table) -> str:
    """Return the SHA-256 of an index, independent of where its files are."""
    sink = io.BytesIO()
    plain = rows.drop_columns(["_uri"]).combine_chunks()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain, max_chunksize=1 << 16)
    return hashlib.sha256(sink.getbuffer()).hexdigest()


def is_one_way(rows: list[Row]) -> bool:
    """Whether the rows are in an archive that can only be read from its start."""
    return any(is_gzipped(row["_uri"]) for row in rows)


def load_rows(rows: list[Row], load: Callable[[Row], Any]) -> Iterator[tuple[int, Row, Any]]:
    """Load each row: yield (position, row, result of `load` or the error of an invalid file).

    Rows of a tar.gz come in the order of the archive; others in order, read ahead by threads.
    """

    def attempt(row: Row) -> tuple[Row, Any]:
        try:
            return row, load(row)
        except (BrokenImageError, BrokenAudioError) as error:
            return row, error

    one_way = is_one_way(rows)
    places = (
        sorted(range(len(rows)), key=lambda i: (rows[i]["_uri"], rows[i]["_offset"]))
        if one_way
        else range(len(rows))
    )
    for i, (row, found) in zip(
        places, threaded_map(attempt, (rows[i] for i in places), 1 if one_way else 4), strict=True
    ):
        yield i, row, found
