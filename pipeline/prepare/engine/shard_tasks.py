"""The contract of importers, and the one way in which their work is cut up and run.

An `Importer` plans its source: the `Work` that it gives knows the parts to write and how one of
them is made. `run_tasks` runs what is to be run in parallel: passes over a source and parts alike.
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
from pipeline.io import storage

PART_BYTES = 96 << 20
"""About so many bytes of files or of text in a part."""
SCANS = "_survey"
"""Below the output: what passes over the source have found, while the run lasts."""


@dataclass(frozen=True)
class Settings:
    """What holds for every importer. ``max_bad``: the share of rows that may be broken."""

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

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise ValueError for the first of some settings that is given, though it means
        nothing.
        """
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {value}: {reason}")


@dataclass(frozen=True)
class OutputShard:
    """One file to write: ``start`` to ``stop`` of what its source is cut into (rows of an index;
    pieces of tables).
    """

    name: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class ShardResult:
    """A part as Parquet (in memory, or a file that is moved away), its rows, those that were left
    out (``pieces``: one of so many that a recording was cut into), and what its importer adds up,
    by split.
    """

    data: bytes | Path
    rows: int
    broken: list[dict[str, str]]
    amounts: dict[str, dict[str, int]] = field(default_factory=dict)


BudgetCheck = Callable[[list[str], int, int], None]
"""Takes the first broken rows in words, how many there are and of how many; raises ValueError when
that is more than may be.
"""
ProgressCallback = Callable[[str, bool], None]


class Importer(ABC):
    """A publisher's format: what its files become.

    An importer derives from the base class of its kind of data, which has `plan`: `ImageImporter`,
    `AudioImporter`, `TableImporter`, `EpisodeImporter`, or `GroupedImporter` for tables of events.

    Attributes:
        label: the column whose values the summary counts, or "".
        reads_files: the source is a place of files (and not the name of a simulation).
    """

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    label: str = ""
    reads_files: ClassVar[bool] = True

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    @abstractmethod
    def plan(self, source: str, settings: Settings) -> ShardTask:
        """Cut `source` into parts. Raises ValueError for files that are not in this format."""


class ShardTask(ABC):
    """A source cut into parts, and how one of them is made.

    What it holds but `parts` and `key` is known after `begin`.

    Attributes:
        noun: what broken rows are called.
        measures: columns that the summary measures.
        parts: the files to write.
        key: what the rows depend on beyond the importer's name and options.
        total: how many rows of the source there are, broken ones included.
        broken: rows that cannot become part of a part, known from the publisher's lists.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
    """

    noun: str = "files"
    measures: tuple[str, ...] = ()
    shards: list[OutputShard]
    key: tuple[Any, ...]

    def __init__(self, importer: Any, settings: Settings):
        self.importer, self.settings = importer, settings
        self.label: str = importer.label
        self.total = 0
        self.broken: Sequence[dict[str, str]] = ()
        self.notes: dict[str, Any] = {}
        self.info: dict[str, Any] = {}

    def begin(
        self, output: str, check: BudgetCheck, report_progress: ProgressCallback, cpus: float
    ) -> None:
        """Learn what is to be known of all of the source before the first part is made."""
        return

    @property
    @abstractmethod
    def columns(self) -> list[pa.Field]:
        """Columns of every part."""

    @property
    def schema(self) -> pa.Schema:
        """The columns, with what they mean beside them."""
        about = {"importer": self.importer.registered_name, **self.info}
        return pa.schema(self.columns, {"onetomany": json.dumps(about, ensure_ascii=False)})

    @property
    @abstractmethod
    def make(self) -> Callable[[Any, Path], ShardResult]:
        """What makes a part of its payload, with a folder for large files; it is sent to tasks."""

    @abstractmethod
    def payload(self, shard: OutputShard) -> Any:
        """What `make` needs for a part."""

    def weight(self, shard: OutputShard) -> int:
        """Rows of the source that stand in a part."""
        return shard.stop - shard.start

    def shown(self, amounts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What the summary tells of the sums over all parts."""
        return amounts

    def end(self, output: str) -> None:
        """Write what is to be written when all parts are there."""
        return


# ---------------------------------------------------------------- cutting up


def named(spans: list[tuple[str, int, int]]) -> list[OutputShard]:
    """Parts of (split, start, stop), numbered within their split."""
    counts, seen, out = Counter(split for split, _, _ in spans), Counter[str](), []
    for split, start, stop in spans:
        name = f"{split}-{seen[split]:05d}-of-{counts[split]:05d}.parquet"
        out.append(OutputShard(name, split, start, stop))
        seen[split] += 1
    return out


def neighbours(
    splits: Sequence[str], sizes: Sequence[float], most: float, rows: int = 0
) -> list[OutputShard]:
    """Put neighbouring items of one split into one part, up to `most` bytes, or so many `rows`."""
    spans: list[tuple[str, int, int]] = []
    held = 0.0
    for i, (split, size) in enumerate(zip(splits, sizes, strict=True)):
        begins = not spans or split != spans[-1][0]
        is_full = not begins and (i - spans[-1][1] >= rows if rows else held + size > most)
        if begins or is_full:
            spans.append((split, i, i + 1))
            held = size
        else:
            spans[-1] = (split, spans[-1][1], i + 1)
            held += size
    return named(spans)


def added(counts: Iterable[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """Sums by name and split of (name, split, count), in the order in which they come."""
    out: dict[str, dict[str, Any]] = {}
    for name, split, count in counts:
        held = out.setdefault(name, {})
        held[split] = held.get(split, 0) + count
    return out


# ---------------------------------------------------------------- running


def run_tasks(
    function: Callable[[str, Any], Any], jobs: Iterable[tuple[str, Any]], cpus: float
) -> Iterator[Any]:
    """Run `function(uri, payload)` for each job (uri, payload), as Ray tasks where Ray runs.

    Yields:
        What it returns, in order, once the file at `uri` that it has written is there.

    Raises:
        ValueError: what a task found wrong, also with a file that it could not read or write.
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
