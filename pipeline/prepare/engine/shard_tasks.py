"""The contract of importers, and how their work is cut into shards and run.

An `Importer` plans its source: the `ShardTask` that it returns knows the shards to write and how
one of them is made. `run_tasks` runs what can be done in parallel: scans of a source, and shards.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipeline.config.registry import Options
from pipeline.data.stream import map_items
from pipeline.data.to_parquet import ABOUT
from pipeline.io import storage
from pipeline.prepare.engine.importing import Info, InvalidRow, Notes

PART_BYTES = 96 << 20
"""Approximate bytes of files or of text in a shard."""
SCANS = "_survey"
"""Folder below the output for the results of scans, while the run lasts."""


@dataclass(frozen=True)
class Settings:
    """Settings of every importer.

    Attributes:
        resize: shorter side of images, in pixels; only downwards.
        quality: of JPEG; images are then encoded again.
        rows_per_part: rows of a shard.
        max_bad: share of rows that may be invalid.
        part_mb: MiB of files or text in a shard.
    """

    resize: int | None = None
    quality: int | None = None
    rows_per_part: int | None = None
    max_bad: float = 0.01
    part_mb: float | None = None

    def __post_init__(self):
        for name, low, high in (
            ("resize", 16, 16384),
            ("quality", 1, 100),
            ("rows_per_part", 1, 1 << 31),
            ("max_bad", 0, 1),
            ("part_mb", 1e-6, 1 << 16),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: from {low:g} to {high}")
        if self.part_mb is not None and self.rows_per_part is not None:
            raise ValueError(
                f"--part-mb {self.part_mb:g} and --rows-per-part {self.rows_per_part}: both "
                "say how large a part is; give one"
            )

    @property
    def part_bytes(self) -> int:
        return round(self.part_mb * 2**20) if self.part_mb else PART_BYTES

    def num_parts(self, rows: int, num_bytes: float) -> int:
        """Return into how many shards so many rows, of so many bytes in all, are cut."""
        if self.rows_per_part:
            return -(-rows // self.rows_per_part)
        return max(1, min(rows, round(num_bytes / self.part_bytes)))

    def reject(self, names: Iterable[str], reason: str) -> None:
        """Raise ValueError for the first of some settings that is given without an effect."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {value}: {reason}")


@dataclass(frozen=True)
class OutputShard:
    """One file to write, of the rows (or input splits) from `start` to `stop`."""

    name: str
    split: str
    start: int
    stop: int


Amounts = dict[str, dict[str, float]]
"""What is added up, by name and split."""


@dataclass(frozen=True)
class ShardResult:
    """A shard that was made.

    Attributes:
        file: Parquet, which is moved to its place.
        rows: how many it holds.
        invalid: rows that were left out: path, split, reason, and `pieces` for one of so many
            segments that a recording was cut into.
        amounts: what the importer adds up, by name and split.
    """

    file: Path
    rows: int
    invalid: list[InvalidRow]
    amounts: Amounts = field(default_factory=dict)


BudgetCheck = Callable[[list[str], int, int], None]
"""Takes the first invalid rows and the numbers of invalid and of all; ValueError if too many."""
ProgressCallback = Callable[[str, bool], None]


class Importer(ABC):
    """A publisher's format.

    An importer derives from the base class of its kind of data, which implements `plan`:
    `ImageImporter`, `AudioImporter`, `TableImporter`, `EpisodeImporter`, or `GroupedImporter` for
    tables of events.

    Attributes:
        label: the column whose values the summary counts, or "".
        reads_files: the source is a place of files (not the name of a simulation).
    """

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    label: str = ""
    reads_files: ClassVar[bool] = True

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    @property
    def components(self) -> tuple[tuple[str, str], ...]:
        """The (kind, name) of the registered components whose code makes the rows."""
        return (("importer", self.registered_name),)

    @abstractmethod
    def plan(self, source: str, settings: Settings) -> ShardTask:
        """Cut `source` into shards. Raises ValueError for files that are not in this format."""


class ShardTask(ABC):
    """A source cut into shards, and how one of them is made.

    All but `shards` and `key` may be set by `before_shards`.

    Attributes:
        noun: what invalid rows are called.
        without_images: what the importer does instead, where `--resize` has no effect.
        makes_parts_of: what a part is made of, where it is not a number of rows.
        measures: columns that the summary measures.
        shows_paths: whether the summary may show the paths of duplicates.
        shards: the files to write.
        key: what the rows depend on besides the importer's name and options.
        label: the column whose values the summary counts, or "".
        total: number of rows of the source, invalid ones included.
        invalid: invalid rows that are known from the publisher's lists.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
    """

    noun: str = "files"
    without_images: str = ""
    makes_parts_of: str = ""
    measures: tuple[str, ...] = ()
    shows_paths: bool = True
    shards: list[OutputShard]
    key: tuple[Any, ...]

    def __init__(self, importer: Any, settings: Settings):
        name = importer.registered_name
        if self.without_images:
            reason = f"importer {name} {self.without_images}; leave it out"
            settings.reject(("resize", "quality"), reason)
        if self.makes_parts_of:
            reason = f"importer {name} makes parts of {self.makes_parts_of}; pass --part-mb"
            settings.reject(("rows_per_part",), reason)
        self.importer, self.settings = importer, settings
        self.label: str = importer.label
        self.total = 0
        self.invalid: Sequence[InvalidRow] = ()
        self.notes: Notes = {}
        self.info: Info = {}

    def before_shards(
        self,
        output: str,
        check: BudgetCheck,
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        """Learn what must be known of the whole source before the first shard is made."""
        return

    @property
    @abstractmethod
    def columns(self) -> list[pa.Field]:
        """Columns of every shard."""

    @property
    def schema(self) -> pa.Schema:
        """The columns, with what they mean as metadata."""
        about = {"importer": self.importer.registered_name, **self.info}
        return pa.schema(self.columns, {ABOUT: json.dumps(about, ensure_ascii=False)})

    @property
    @abstractmethod
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        """The function that makes a shard of (payload, scratch folder). It is sent to tasks."""

    @abstractmethod
    def payload(self, shard: OutputShard) -> Any:
        """Return what `make_shard` needs for a shard."""

    def source_rows(self, shard: OutputShard) -> int:
        """Return how many rows of the source are in a shard."""
        return shard.stop - shard.start

    def summary_amounts(self, amounts: Amounts) -> Notes:
        """Return what the summary shows of the sums over all shards."""
        return dict(amounts)

    def after_shards(self, output: str) -> None:
        """Write what is to be written once all shards are complete."""
        return


# ---------------------------------------------------------------- cutting up


def name_shards(spans: list[tuple[str, int, int]]) -> list[OutputShard]:
    """Make shards of (split, start, stop), numbered within their split."""
    counts, seen, out = Counter(split for split, _, _ in spans), Counter[str](), []
    for split, start, stop in spans:
        name = f"{split}-{seen[split]:05d}-of-{counts[split]:05d}.parquet"
        out.append(OutputShard(name, split, start, stop))
        seen[split] += 1
    return out


def group_neighbours(
    splits: Sequence[str],
    sizes: Sequence[float],
    most: float,
    rows: int = 0,
) -> list[OutputShard]:
    """Group neighbours of one split into shards of at most `most` bytes, or of `rows` items."""
    spans: list[tuple[str, int, int]] = []
    size_of_last = 0.0
    for i, (split, size) in enumerate(zip(splits, sizes, strict=True)):
        begins = not spans or split != spans[-1][0]
        is_full = not begins and (i - spans[-1][1] >= rows if rows else size_of_last + size > most)
        if begins or is_full:
            spans.append((split, i, i + 1))
            size_of_last = size
        else:
            spans[-1] = (split, spans[-1][1], i + 1)
            size_of_last += size
    return name_shards(spans)


def sum_by_split(counts: Iterable[tuple[str, str, float]]) -> Amounts:
    """Add up (name, split, count): {name: {split: sum}}, in the order of first appearance."""
    out: Amounts = {}
    for name, split, count in counts:
        sums = out.setdefault(name, {})
        sums[split] = sums.get(split, 0) + count
    return out


# ---------------------------------------------------------------- running


def run_tasks(
    function: Callable[[str, Any], Any],
    jobs: Iterable[tuple[str, Any]],
    cpus: float,
) -> Iterator[Any]:
    """Run `function(uri, payload)` for each job (uri, payload), as Ray tasks if Ray is running.

    Yields:
        What the function returns, in order, once the file at `uri` that it wrote is there.

    Raises:
        ValueError: what a task found wrong, or a file that it could not read or write.
    """
    for uri, result in map_items(partial(_task, function), jobs, cpus=cpus):
        if not storage.exists(uri):
            raise ValueError(
                f"{uri}: a worker has written it on another machine; give an output that all "
                "machines share, such as s3://"
            )
        yield result


def _task(function: Callable[[str, Any], Any], job: tuple[str, Any]) -> tuple[str, Any]:
    uri, payload = job
    try:
        return uri, function(uri, payload)
    except storage.StorageError as error:  # of errors Ray hands on a ValueError alone as it is
        raise ValueError(str(error)) from error
