"""Episodes of a robot as rows: the columns of all importers of episodes, and a base class for
those that know their episodes before reading them (LeRobot data sets, simulation).

One row is one whole episode: a plan that shuffles or splits rows keeps it together, and k rows are
k demonstrations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import filled, floats
from pipeline.prepare.engine.importing import Info, InvalidRow, Notes
from pipeline.prepare.engine.row_groups import RowGroups
from pipeline.prepare.engine.shard_tasks import (
    Amounts,
    BudgetCheck,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    ShardTask,
    group_neighbours,
    sum_by_split,
)

VECTORS = pa.list_(pa.list_(pa.float32()))
"""Observations (T, O) or actions (T, A) of a row."""


class UnusableError(ValueError):
    """An episode is left out; the message is the reason."""


@dataclass(frozen=True)
class Episode:
    """One episode of T steps.

    Attributes:
        name: of the episode.
        observations: (T, O) float32.
        actions: (T, A) float32, or T names of classes; None where there are none.
        terminated: the episode ended by itself.
        truncated: it was cut, by a time limit or at the end of its log.
        rewards: (T,) float32.
        images: T encoded files.
        task, embodiment: names of the task and of the robot.
        executed: what was done, like `actions`, where `actions` are labels.
    """

    name: str
    observations: np.ndarray
    actions: np.ndarray | list[str] | None
    terminated: bool
    truncated: bool
    rewards: np.ndarray | None = None
    images: list[bytes] | None = None
    task: str = ""
    embodiment: str = ""
    executed: np.ndarray | list[str] | None = None


def episode_fields(
    discrete: bool | None,
    rewards: bool,
    images: bool = False,
    executed: bool = False,
) -> list[pa.Field]:
    """Return the columns of an episode, without `split`.

    `discrete`: actions are names of classes; None: there are no actions.
    """
    names = [] if discrete is None else ["actions", "executed"] if executed else ["actions"]
    actions = [pa.field(name, pa.list_(pa.string()) if discrete else VECTORS) for name in names]
    return [
        pa.field("episode", pa.string()),
        pa.field("task", pa.string()),
        pa.field("embodiment", pa.string()),
        pa.field("observations", VECTORS),
        *actions,
        *([pa.field("rewards", pa.list_(pa.float32()))] if rewards else []),
        *([pa.field("images", pa.list_(pa.binary()))] if images else []),
        pa.field("terminated", pa.bool_()),
        pa.field("truncated", pa.bool_()),
        pa.field("steps", pa.int64()),
    ]


def episode_row(
    episode: Episode,
    split: str,
    more: dict[str, pa.Array] | None = None,
) -> pa.Table:
    """Return the episode as a table of one row; `more`: further columns, arrays of one value."""
    e = episode
    columns: dict[str, object] = {
        "episode": [e.name],
        "task": [e.task],
        "embodiment": [e.embodiment],
        "observations": _vectors(e.observations),
    }
    for name, acts in (("actions", e.actions), ("executed", e.executed)):
        if acts is not None:
            columns[name] = (
                _vectors(acts)
                if isinstance(acts, np.ndarray)
                else pa.array([acts], pa.list_(pa.string()))
            )
    if e.rewards is not None:
        columns["rewards"] = _listed(pa.array(e.rewards.astype(np.float32, copy=False)))
    if e.images is not None:
        columns["images"] = pa.array([e.images], pa.list_(pa.binary()))
    columns |= {
        "terminated": [e.terminated],
        "truncated": [e.truncated],
        "steps": pa.array([len(e.observations)], pa.int64()),
    }
    return pa.table({**columns, **(more or {}), "split": [split]})


def _listed(values: pa.Array) -> pa.Array:
    """One row that is the list of the values."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _vectors(steps: np.ndarray) -> pa.Array:
    """(T, n) numbers as one row of T lists."""
    count, width = steps.shape
    flat = pa.array(np.ascontiguousarray(steps, dtype=np.float32).reshape(-1))
    return _listed(
        pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * width), flat)
    )


def as_matrix(column: Any, what: str, width: int = 0) -> np.ndarray:
    """Convert a column of lists of numbers, or of numbers, to (T, n) float64, NaN for missing
    ones.

    Args:
        column: the lists or numbers.
        what: their name for errors.
        width: the n that is required; 0: any.

    Raises:
        UnusableError: lists of different lengths, or of another width.
    """
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_nested(lists.type):
        if width > 1:
            raise UnusableError(f"{what} of 1 number in step 0, where {width} are needed")
        return floats(lists, np.float64)[:, None]
    lists = lists.cast(pa.list_(pa.float64()))
    widths = filled(pc.list_value_length(lists), 0)
    first = width or int(widths[0])
    if (widths != first).any() or not first:
        at = int(np.argmax(widths != first))
        raise UnusableError(
            f"{what} of {widths[at]} numbers in step {at}, where "
            + (f"{first} are needed" if width else f"step 0 has {first}")
        )
    return floats(lists.flatten(), np.float64).reshape(len(lists), first)


def number_problem(steps: np.ndarray, what: str, names: Sequence[str] = ()) -> str:
    """Return "", or which of the numbers (T, n) or (T,) is the first that is not finite.

    `names`: of the columns.
    """
    with np.errstate(over="ignore"):
        found = np.argwhere(~np.isfinite(steps.astype(np.float32, copy=False)))
    if not len(found):
        return ""
    step = int(found[0][0])
    place = int(found[0][1]) if steps.ndim > 1 else 0
    value = float(steps[step, place] if steps.ndim > 1 else steps[step])
    kind = (
        "no number"
        if np.isnan(value)
        else "infinite"
        if np.isinf(value)
        else "too large for float32"
    )
    steps_with = len(np.unique(found[:, 0]))
    where = "" if steps.ndim < 2 else f" {names[place] if place < len(names) else place}"
    return f"{what}{where} is {kind} in step {step}" + (
        f" ({steps_with} such steps)" if steps_with > 1 else ""
    )


# ----------------------------------------------------- episodes that are known before they are read


@dataclass(frozen=True)
class Episodes:
    """The episodes of a source.

    Attributes:
        items: what makes each episode, in order, those of a split together.
        splits: of the items.
        sizes: estimated bytes of each.
        columns: as they are written, without `split`.
        fingerprint: changes when the source does.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
        invalid: episodes known to be unusable: path, split and reason.
    """

    items: list[Any]
    splits: list[str]
    sizes: np.ndarray
    columns: list[pa.Field]
    fingerprint: str
    notes: Notes = field(default_factory=dict)
    info: Info = field(default_factory=dict)
    invalid: list[InvalidRow] = field(default_factory=list)


class Result(NamedTuple):
    """The result of one item.

    Attributes:
        split: of the item.
        row: the episode; None where it is left out on purpose, or broken.
        invalid: path, split and reason of an unusable episode.
        amounts: what is added up over all, by name; a row always has `steps`.
    """

    split: str
    row: pa.Table | None = None
    invalid: InvalidRow | None = None
    amounts: Mapping[str, float] = {}


class EpisodeImporter(Importer):
    """Base class for episodes that are known before they are read. Examples: `lerobot`,
    `rollouts`.

    Attributes:
        sees: episodes have images, which `--resize` and `--quality` apply to.
        rows_a_part: episodes of a shard; 0: about `part_mb` of them.
    """

    sees: ClassVar[bool] = False
    rows_a_part: ClassVar[int] = 0

    @abstractmethod
    def index(self, source: str, settings: Settings) -> Episodes:
        """List every episode of `source`; the result is the same at every call.

        Raises ValueError for a source that is not in this format.
        """

    @abstractmethod
    def episodes(self, items: list[Any], settings: Settings) -> Iterator[Result]:
        """Yield the result of each item, in order; runs in another process than `index`."""

    def before_shards(self, output: str, report_progress: ProgressCallback) -> None:
        """Make what all shards need, in this process; `self` is then sent to the tasks."""
        return

    def summary_amounts(self, amounts: Amounts) -> Notes:
        """Return what the summary shows of the sums by split."""
        return amounts

    def plan(self, source: str, settings: Settings) -> EpisodeShardTask:
        return EpisodeShardTask(self, source, settings)


class EpisodeShardTask(ShardTask):
    """The shards of such a source: neighbouring episodes of a split."""

    noun = "episodes"

    def __init__(self, importer: EpisodeImporter, source: str, settings: Settings):
        self.without_images = "" if importer.sees else "writes no images"
        super().__init__(importer, settings)
        self.episodes = importer.index(source, settings)
        self.label = importer.label
        rows = settings.rows_per_part or (0 if settings.part_mb else importer.rows_a_part)
        self.shards = group_neighbours(
            self.episodes.splits, self.episodes.sizes.tolist(), settings.part_bytes, rows
        )
        self.key = (
            self.episodes.fingerprint,
            settings.resize,
            settings.quality,
            [[shard.name, shard.start, shard.stop] for shard in self.shards],
        )
        self.invalid, self.total = (
            self.episodes.invalid,
            len(self.episodes.items) + len(self.episodes.invalid),
        )
        self.notes, self.info = self.episodes.notes, self.episodes.info

    def before_shards(
        self,
        output: str,
        check: BudgetCheck,
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        self.importer.before_shards(output, report_progress)

    @property
    def columns(self) -> list[pa.Field]:
        return [*self.episodes.columns, pa.field("split", pa.string())]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer, self.settings, self.schema)

    def payload(self, shard: OutputShard) -> list[Any]:
        return self.episodes.items[shard.start : shard.stop]

    def summary_amounts(self, amounts: Amounts) -> Notes:
        if not amounts.get("steps"):
            raise ValueError(
                f"no episode is left of {self.total}: all are broken or were left out; why "
                "stands in _parts of the output"
            )
        return self.importer.summary_amounts(amounts)


def _make(
    importer: EpisodeImporter,
    settings: Settings,
    schema: pa.Schema,
    items: list[Any],
    scratch: Path,
) -> ShardResult:
    """Write a shard's episodes to Parquet, with one row group and one episode in memory."""
    path, invalid, counts = scratch / "part.parquet", [], []
    with RowGroups(path, schema) as writer:
        for found in importer.episodes(items, settings):
            if found.invalid is not None:
                invalid.append(found.invalid)
            elif found.row is not None:
                writer.add(found.row.select(schema.names).cast(schema))
            counts += [(name, found.split, count) for name, count in found.amounts.items()]
    return ShardResult(path, writer.rows, invalid, sum_by_split(counts))
