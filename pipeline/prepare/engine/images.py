"""Images of an index to shards: decode each once, resize it where asked, and measure it."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.prepare.engine.importing import Index, Row, invalid_row
from pipeline.prepare.engine.indexed import IndexShardTask, load_rows
from pipeline.prepare.engine.row_groups import RowGroups, tables_of
from pipeline.prepare.engine.shard_tasks import Amounts, Importer, Settings, ShardResult
from pipeline.prepare.engine.summary import DARK_IMAGES
from pipeline.prepare.readers.archives import Reader
from pipeline.prepare.readers.picture_check import BrokenImageError, Picture, examine

MEASURED = {"width": pa.int64(), "height": pa.int64(), "sha256": pa.string()}
"""What is written beside each image."""
BYTES_PER_PIXEL = 0.4
"""Of a JPEG at quality 92, to estimate the size of shards when images are resized."""


class ImageImporter(Importer):
    """Base class for image data sets. Examples: `imagefolder`, `coco`."""

    label = "label"
    shows_paths = True
    """Whether the summary may show paths: not where they name patients."""

    @abstractmethod
    def index(self, source: str) -> Index:
        """List every row of `source` without reading an image.

        Raises ValueError for files that are not in the publisher's format.
        """

    def postprocess(self, row: Row, picture: Picture) -> Row:
        """Return the row's columns once its image is known: boxes and masks are scaled with it.

        Raises BrokenImageError for a row that cannot be used.
        """
        return row

    def name_of(self, row: Row) -> str:
        """Return what messages call a row of the index: its path, unless that names a patient."""
        return row["path"]

    def plan(self, source: str, settings: Settings) -> ImageShardTask:
        return ImageShardTask(self, source, settings)


class ImageShardTask(IndexShardTask):
    """The shards of an index of images."""

    measures = tuple(MEASURED)

    @property
    def shows_paths(self) -> bool:
        return self.importer.shows_paths

    @property
    def depends(self) -> tuple[Any, ...]:
        return self.settings.resize, self.settings.quality

    def sizes(self) -> np.ndarray:
        sizes, side = super().sizes(), self.settings.resize
        return np.minimum(sizes, BYTES_PER_PIXEL * 1.4 * side**2) if side else sizes

    @property
    def columns(self) -> list[pa.Field]:
        return [
            pa.field("image", pa.binary()),
            *self.kept,
            *self.index.extra,
            *(pa.field(name, kind) for name, kind in MEASURED.items()),
        ]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer, self.settings, self.schema)


def _make(
    importer: ImageImporter,
    settings: Settings,
    schema: pa.Schema,
    rows: pa.Table,
    scratch: Path,
) -> ShardResult:
    """Read, check and write one shard."""
    path, out, invalid = scratch / "part.parquet", {}, []
    dark = Counter[str]()
    with Reader() as reader:
        for i, row, data in load_rows(
            rows.to_pylist(),
            lambda row: reader(row["_uri"], row["_member"], row["_offset"], row["_size"]),
        ):
            try:
                if isinstance(data, BrokenImageError):
                    raise data
                picture = examine(data, settings.resize, settings.quality)
                columns = importer.postprocess(row, picture)
            except BrokenImageError as error:
                invalid.append(invalid_row(importer.name_of(row), row["split"], str(error)))
                continue
            dark[row["split"]] += picture.is_dark
            out[i] = {**columns, **picture_columns(picture, data)}
    with RowGroups(path, schema, holds_files=True) as writer:
        for block in tables_of([out[i] for i in sorted(out)], schema):
            writer.add(block)
    return ShardResult(path, writer.rows, invalid, dark_images(dark))


def dark_images(by_split: Counter[str]) -> Amounts:
    """Return what the summary says of 16-bit images that `--resize` made nearly black."""
    counts: dict[str, float] = dict(+by_split)
    return {DARK_IMAGES: counts} if counts else {}


def picture_columns(picture: Picture, data: bytes) -> Row:
    """Return the columns `image` and MEASURED. `data`: the publisher's file."""
    width, height = picture.size
    sha256 = hashlib.sha256(data).hexdigest()
    return {"image": picture.data, "width": width, "height": height, "sha256": sha256}
