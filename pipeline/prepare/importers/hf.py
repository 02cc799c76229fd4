"""Data sets of Hugging Face's library `datasets` (Lhoest et al. 2021): on the hub or on disk."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import extras
from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.rng import mix, row_keys
from pipeline.io import file_identity, storage
from pipeline.media import audio_io
from pipeline.prepare.engine import audio, images
from pipeline.prepare.engine.importing import SPLITS, Row, invalid_row, parse_names
from pipeline.prepare.engine.row_groups import RowGroups
from pipeline.prepare.engine.shard_tasks import (
    BudgetCheck,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    ShardTask,
    name_shards,
)
from pipeline.prepare.readers.picture_check import BrokenImageError, examine

BATCH_ROWS = 128
"""Rows that are read and checked at a time."""
COUNTED_ROWS = 16384
"""Rows that are counted at a time."""
SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder of `save_to_disk` is known."""
MEASURED = {"": {}, "Image": images.MEASURED, "Audio": audio.MEASURED}
"""What is written beside an image or a recording."""


class HfOptions(Options):
    config: str = Field("", description="the configuration (subset), where there are several")
    splits: str = Field("", description="the splits to write, with commas; empty: all")
    revision: str = Field("", description="branch, tag or commit on the hub; empty: main")
    streaming: bool = Field(
        False,
        description="read rows as they come, without a copy in the cache; they keep their order",
    )
    column: str = Field(
        "", description="the column of images or recordings; empty: the only one there is"
    )
    label: str = Field(
        "", description="the column whose values the summary counts; empty: the only ClassLabel"
    )


@register("importer", "hf", options=HfOptions)
class Hf(Importer):
    """A data set of Hugging Face.

    It reads the name of a data set on the hub, a folder that `save_to_disk` wrote, or a folder of
    files that `load_dataset` reads. What the library has in its cache is not fetched again.

    Columns: those of the data set, and `split`.

    - Each field of a struct becomes a column (objects_bbox).
    - Numbers of classes (ClassLabel) become their names, -1 null.
    - The column of images becomes `image`, with path, width, height and sha256. That of recordings
      becomes `audio`, with recording_start, seconds, rate, channels and sha256. Recordings are not
      cut. A column of the data set with such a name becomes dataset_NAME.
    - Invalid rows: an image or recording that is missing or cannot be decoded.
    - Streamed rows are not compared with those of an earlier run: give revision.
    """

    reads_files = False

    def plan(self, source: str, settings: Settings) -> HfTask:
        return HfTask(self, source, settings)


# ---------------------------------------------------------------- opening


def _open_dataset(source: str, options: HfOptions) -> dict[str, Any]:
    """Return the data sets of the splits that are asked for, by the publisher's names."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source}: the library datasets is not installed: {extras.install('datasets')}"
        ) from None
    place = os.path.abspath(source) if os.path.exists(source) else source
    is_saved = any(os.path.exists(os.path.join(place, name)) for name in SAVED)
    if is_saved and (options.streaming or options.config or options.revision):
        raise ValueError(
            f"{source}: a folder of save_to_disk has no config, no revision and no streaming; "
            "leave them out"
        )
    try:
        if is_saved:
            found: Any = datasets.load_from_disk(place)
        else:
            found = datasets.load_dataset(
                place,
                options.config or None,
                revision=options.revision or None,
                streaming=options.streaming,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: datasets cannot load it: {error}") from error
    if not isinstance(found, dict):
        found = {str(found.split or "train"): found}
    wanted = parse_names(options.splits)
    for name in wanted:
        if name not in found:
            raise ValueError(f"{source}: no split {name!r}; {nearest(name, list(found))}")
    return {name: one for name, one in found.items() if not wanted or name in wanted}


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class _OutputColumn:
    """A column of the result.

    Attributes:
        name: in the result.
        source: its name in the data set, and those of fields in structs.
        feature: of `datasets`; none where the values stay as they are.
        type: of the values that are written.
    """

    name: str
    source: tuple[str, ...]
    feature: Any
    type: pa.DataType


def _feature_type(feature: Any) -> str:
    return type(feature).__name__


def _item(feature: Any) -> Any:
    """Return the feature of a list's items; none for what is no list."""
    if isinstance(feature, list):
        return feature[0]
    return feature.feature if _feature_type(feature) in ("List", "LargeList", "Sequence") else None


def _has_classes(feature: Any) -> bool:
    """Return whether numbers of classes are in the values of a feature."""
    if isinstance(feature, dict):
        return any(map(_has_classes, feature.values()))
    item = _item(feature)
    return _feature_type(feature) == "ClassLabel" or (item is not None and _has_classes(item))


def _named_type(feature: Any, stored: Any) -> pa.DataType:
    """Return the Arrow type of a feature's values once its classes have names."""
    if _feature_type(feature) == "ClassLabel":
        return pa.string()
    if isinstance(feature, dict):
        types = {name: _named_type(one, stored.field(name).type) for name, one in feature.items()}
        return pa.struct(types)
    item = _item(feature)
    return stored if item is None else pa.list_(_named_type(item, stored.value_type))


def _with_class_names(feature: Any, value: Any) -> Any:
    """Return a value with the names of its classes; -1 stands for no class."""
    if value is None:
        return None
    if _feature_type(feature) == "ClassLabel":
        return None if value == -1 else feature.int2str(value)
    if isinstance(feature, dict):
        return {name: _with_class_names(one, value[name]) for name, one in feature.items()}
    item = _item(feature)
    return value if item is None else [_with_class_names(item, one) for one in value]


def _plain(stored: Any) -> pa.DataType:
    """Return an Arrow type with plain lists: no extension, no lists of a fixed length."""
    stored = getattr(stored, "storage_type", stored)
    if pa.types.is_fixed_size_list(stored) or pa.types.is_list(stored):
        return pa.list_(_plain(stored.value_type))
    return stored


def _columns(
    features: Mapping[str, Any],
    types: Any,
    taken: set[str],
    at: tuple[str, ...] = (),
) -> Iterator[_OutputColumn]:
    """Yield the columns of features; structs become a column for each field."""
    for name, feature in features.items():
        source, stored = (*at, name), types.field(name).type
        if isinstance(feature, dict):
            yield from _columns(feature, stored, taken, source)
            continue
        own = "_".join(source)
        plain = _plain(stored)
        has_classes = _has_classes(feature)
        yield _OutputColumn(
            f"dataset_{own}" if own in taken else own,
            source,
            feature if has_classes else None,
            _named_type(feature, plain) if has_classes else plain,
        )


def _values(block: pa.Table, column: _OutputColumn) -> pa.ChunkedArray:
    """Return the values of a column of the result."""
    values: Any = block[column.source[0]]
    for name in column.source[1:]:
        values = pc.struct_field(values, name)
    if column.feature is not None:
        named = [_with_class_names(column.feature, value) for value in values.to_pylist()]
        return pa.chunked_array([pa.array(named, column.type)])
    if isinstance(values.type, pa.ExtensionType):
        storage_type = values.type.storage_type
        values = pa.chunked_array([chunk.storage for chunk in values.chunks], storage_type)
    return values.cast(column.type)


# ---------------------------------------------------------------- shards


class HfTask(ShardTask):
    """The shards of a data set: its rows in a fixed shuffled order, streamed ones in their own."""

    noun = "rows"

    def __init__(self, importer: Hf, source: str, settings: Settings):
        super().__init__(importer, settings)
        options = importer.options
        self.datasets = _open_dataset(source, options)
        self.names = {name: SPLITS.get(name.strip().lower(), name) for name in self.datasets}
        if len(set(self.names.values())) < len(self.names):
            raise ValueError(
                f"{source}: {', '.join(self.names)} are the same splits under two names; pass "
                "--set splits=NAME,NAME"
            )
        first = next(iter(self.datasets.values()))
        if any(one.features is None for one in self.datasets.values()):
            raise ValueError(
                f"{source}: its columns are not known before it is read; leave out streaming"
            )
        for name, one in self.datasets.items():
            if one.features != first.features:
                raise ValueError(
                    f"{source}: split {name} has other columns than the first one; pass --set "
                    "splits=NAME to write splits apart"
                )
        self._read_features(source, first.features)
        self.order: dict[str, np.ndarray] = {}
        fingerprints, spans = [], []
        for name, one in self.datasets.items():
            if options.streaming:
                settings.reject(
                    ("rows_per_part", "part_mb"), "of a streamed data set the parts are its own"
                )
                cuts, fingerprint = list(range(one.num_shards + 1)), f"{source} {options.revision}"
            else:
                zero = np.zeros(1, dtype=np.int64)
                keys = row_keys(mix(*b"prepare"), zero, np.arange(len(one)))
                self.order[name] = np.argsort(keys, kind="stable")
                cuts, fingerprint = _cuts(one, settings), _fingerprint(one, self.media)
            fingerprints.append([name, fingerprint])
            spans += [(name, start, stop) for start, stop in pairwise(cuts)]
        if not spans:
            raise ValueError(f"{source}: no rows")
        renamed = [(self.names[name], start, stop) for name, start, stop in spans]
        self.shards = name_shards(renamed)
        self.publisher = {
            shard.name: name for shard, (name, _, _) in zip(self.shards, spans, strict=True)
        }
        self.key = (fingerprints, str(first.features), settings.resize, settings.quality, spans)
        self.rows = {name: len(order) for name, order in self.order.items()}
        self.total = sum(self.rows.values())

    def _read_features(self, source: str, features: Any) -> None:
        """Find the column of images or recordings, the label, and the columns to write."""
        options = self.importer.options
        media = [name for name, one in features.items() if _feature_type(one) in ("Image", "Audio")]
        if options.column and options.column not in media:
            raise ValueError(
                f"{source}: {options.column!r} is no column of images or recordings; "
                f"{nearest(options.column, media) if media else 'there is none'}"
            )
        if len(media) > 1 and not options.column:
            raise ValueError(
                f"{source}: several columns have images or recordings ({', '.join(media)}); pass "
                "--set column=NAME"
            )
        self.media = options.column or next(iter(media), "")
        self.what = _feature_type(features[self.media]) if self.media else ""
        if self.what != "Image":
            self.settings.reject(("resize", "quality"), "there are no images; leave it out")
        taken = {"split", *MEASURED[self.what]}
        taken |= {"path", self.what.lower()} if self.what else set()
        others = {name: one for name, one in features.items() if name != self.media}
        self.kept = list(_columns(others, features.arrow_schema, taken))
        doubled = [name for name, n in Counter(one.name for one in self.kept).items() if n > 1]
        if doubled:
            raise ValueError(
                f"{source}: two of its columns would be called {doubled[0]} (a field of a struct "
                "becomes STRUCT_FIELD, a column with a name that is taken dataset_NAME); rename "
                "one of them"
            )
        classes = {
            one.name: one.feature.names
            for one in self.kept
            if _feature_type(one.feature) == "ClassLabel"
        }
        self.label = options.label or (next(iter(classes)) if len(classes) == 1 else "")
        names = [one.name for one in self.kept]
        if self.label and self.label not in names:
            raise ValueError(f"{source}: no column {self.label!r}; {nearest(self.label, names)}")
        self.measures = tuple(MEASURED[self.what])
        self.info = {"classes": classes}

    def before_shards(
        self,
        output: str,
        check: BudgetCheck,
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        """Count the rows of streamed splits whose number the data set does not tell."""
        for name, one in self.datasets.items():
            if name not in self.rows:
                stated = (one.info.splits or {}).get(name)
                blocks = one.with_format("arrow").iter(batch_size=COUNTED_ROWS)
                known = stated.num_examples if stated is not None else 0
                self.rows[name] = known or sum(len(block) for block in blocks)
        self.total = sum(self.rows.values())

    @property
    def columns(self) -> list[pa.Field]:
        media = [(self.what.lower(), pa.binary()), ("path", pa.string())] if self.what else []
        kept = [(one.name, one.type) for one in self.kept]
        more = [("split", pa.string()), *MEASURED[self.what].items()]
        return [pa.field(name, kind) for name, kind in (*media, *kept, *more)]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.media, self.what, self.kept, self.settings, self.schema)

    def payload(self, shard: OutputShard) -> Any:
        """Return (the rows as a data set, their split, their names)."""
        name = self.publisher[shard.name]
        found = self.datasets[name]
        if name not in self.order:
            part = found.shard(num_shards=found.num_shards, index=shard.start)
            return part, shard.split, f"{name}/{shard.start}"
        numbers = self.order[name][shard.start : shard.stop]
        return found.select(numbers), shard.split, [f"{name}/{number}" for number in numbers]

    def source_rows(self, shard: OutputShard) -> int:
        name = self.publisher[shard.name]
        if name in self.order:
            return super().source_rows(shard)
        parts = self.datasets[name].num_shards  # of unknown size: shares that add up
        return self.rows[name] * shard.stop // parts - self.rows[name] * shard.start // parts


def _cuts(found: Any, settings: Settings) -> list[int]:
    """Return where a split is cut into shards of equal size."""
    rows = len(found)
    number = settings.num_parts(rows, found.data.nbytes * rows / max(1, len(found.data)))
    return [rows * i // number for i in range(number + 1)] if rows else []


def _fingerprint(found: Any, media: str) -> list[str]:
    """Return the contents of a split's Arrow files, and of the media that they name by path."""
    files = [one["filename"] for one in found.cache_files]
    fingerprint = [one.content for one in file_identity.identify(files)]
    if not files:
        fingerprint = [found._fingerprint]  # held in memory
    if media:
        cells = found.data.column(media)
        without = pc.invert(pc.is_valid(pc.struct_field(cells, "bytes")))
        paths = pc.struct_field(cells, "path").filter(without).drop_null().to_pylist()
        named = file_identity.identify(filter(None, paths), absent_ok=True)
        fingerprint += [one.content for one in named]
    return fingerprint


def _make(
    media: str,
    what: str,
    kept: list[_OutputColumn],
    settings: Settings,
    schema: pa.Schema,
    payload: tuple[Any, str, list[str] | str],
    scratch: Path,
) -> ShardResult:
    """Write one shard, with a row group in memory."""
    dataset, split, given = payload
    names = iter(given) if isinstance(given, list) else (f"{given}/{row}" for row in count())
    path, invalid = scratch / "part.parquet", []
    dark = Counter[str]()
    with RowGroups(path, schema) as writer:
        for block in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            paths = [next(names) for _ in range(len(block))]
            columns = {one.name: _values(block, one) for one in kept}
            columns["split"] = pa.array([split] * len(block), pa.string())
            if what:
                cells = block[media].to_pylist()
                measured, bad, num_dark = _checked(cells, paths, what, settings)
                dark[split] += num_dark
                invalid += [invalid_row(one, split, why) for one, why in bad.items()]
                good = pa.array([number for number, one in enumerate(paths) if one not in bad])
                columns = {name: values.take(good) for name, values in columns.items()}
                columns |= {
                    name: pa.array([one[name] for one in measured], schema.field(name).type)
                    for name in (what.lower(), "path", *MEASURED[what])
                }
            writer.add(pa.table([columns[name] for name in schema.names], schema=schema))
    return ShardResult(path, writer.rows, invalid, images.dark_images(dark))


def _checked(
    cells: list[Any],
    paths: list[str],
    what: str,
    settings: Settings,
) -> tuple[list[Row], dict[str, str], int]:
    """Return the columns of each valid image or recording, the reasons of the others by path, and
    the number of dark images (`Picture`).
    """
    good, bad, num_dark = [], {}, 0
    for cell, path in zip(cells, paths, strict=True):
        try:
            data = _bytes_of(cell)
            if what == "Image":
                picture = examine(data, settings.resize, settings.quality)
                columns = images.picture_columns(picture, data)
                num_dark += picture.is_dark
            else:
                columns = _recording(data)
            good.append({**columns, "path": path})
        except (BrokenImageError, audio_io.BrokenAudioError, storage.NotFoundError) as error:
            bad[path] = str(error)
    return good, bad, num_dark


def _bytes_of(cell: Any) -> bytes:
    """Return the file of a cell, which holds its bytes or its path."""
    if cell is None or (not cell["bytes"] and not cell["path"]):
        raise BrokenImageError("the cell is empty")
    return cell["bytes"] or storage.read_bytes(cell["path"])


def _recording(data: bytes) -> Row:
    info = audio_io.inspect(data)
    return {
        "audio": data,
        "recording_start": 0.0,
        "seconds": info.seconds,
        "rate": info.rate,
        "channels": info.channels,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
