"""What the engine (``write``) asks of a kind of source: its parts, and how one of them is made.
Images, recordings and tables differ in what a part is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

PART_BYTES = 96 << 20
"""About so many bytes of files or of text in a part."""


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


class ShardTask(ABC):
    """A source cut into parts. What it holds but parts and key is known after ``begin``."""

    noun: str
    """What broken ones are called."""
    measures: tuple[str, ...] = ()
    """Columns that the summary measures."""
    shards: list[OutputShard]
    key: tuple[Any, ...]
    """What the rows depend on beyond the importer's name and options."""
    label: str
    total: int = 0
    broken: Sequence[dict[str, str]] = ()
    """Rows that cannot become part of a part, known from the publisher's lists; ``total`` counts
    them too.
    """
    notes: dict[str, Any]
    info: dict[str, Any]

    def begin(
        self, output: str, check: BudgetCheck, report_progress: ProgressCallback, cpus: float
    ) -> None:
        """What is to be known of all of the source before the first part is made."""
        return

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Columns of every part."""

    @property
    @abstractmethod
    def make(self) -> Callable[[Any, Path], ShardResult]:
        """Makes a part of its ``payload``, with a folder for what is large; it travels to other
        processes.
        """

    @abstractmethod
    def payload(self, shard: OutputShard) -> Any:
        """What ``make`` needs for a part."""

    @abstractmethod
    def weight(self, shard: OutputShard) -> int:
        """Rows of the source that stand in a part."""

    def shown(self, amounts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """What the summary tells of the sums over all parts."""
        return amounts

    def end(self, output: str) -> None:
        """What is to be written when all parts are there."""
        return

    def clear(self, output: str) -> None:
        """What is to be removed when all is done."""
        return
