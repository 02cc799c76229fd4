"""Episodes of a robot as rows: the columns that every importer of them writes, and the parts of a
source whose episodes are known before they are read (those of a LeRobot data set; those that are to
be simulated).

One row is one episode, whole: a plan that shuffles or splits rows keeps it together, and k rows are
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
from pipeline.prepare.engine.shard_tasks import (
    BudgetCheck,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    ShardTask,
    added,
    neighbours,
)
from pipeline.prepare.engine.table_importer import RowGroups

VECTORS = pa.list_(pa.list_(pa.float32()))
"""(T, O) observations or (T, A) actions of a row."""


class UnusableError(ValueError):
    """An episode that is left out, with the reason."""


@dataclass(frozen=True)
class Episode:
    """T steps: ``observations`` (T, O) float32, in whose place ``actions`` (T, A) float32 or T
    names of classes were taken; ``rewards`` (T,) float32 and ``images`` T encoded files where there
    are such. ``terminated``: it ended by itself; ``truncated``: it was cut, by a time limit or
    where its log ends. ``executed``: what was done, like ``actions``, where those are labels.
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


def fields(
    discrete: bool | None, rewards: bool, images: bool = False, executed: bool = False
) -> list[pa.Field]:
    """The columns of an episode, without ``split``. ``discrete``: actions are names of classes;
    None: there are none.
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


def row(episode: Episode, split: str, more: dict[str, pa.Array] | None = None) -> pa.Table:
    """The episode as a table of one row; ``more``: further columns, arrays of one value."""
    e = episode
    columns: dict[str, Any] = {
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
    """One row that is the list of them."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _vectors(steps: np.ndarray) -> pa.Array:
    """(T, n) numbers as one row of T lists."""
    count, width = steps.shape
    flat = pa.array(np.ascontiguousarray(steps, dtype=np.float32).reshape(-1))
    return _listed(
        pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * width), flat)
    )


def matrix(column: Any, what: str, width: int = 0) -> np.ndarray:
    """A column of lists of numbers, or of numbers, as (T, n) float64, NaN where there is none.
    ``width``: the n that it must have.

    Raises UnusableError for lists of differing lengths, and for another width, naming both.
    """
    held = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_nested(held.type):
        if width > 1:
            raise UnusableError(f"{what} of 1 number in step 0, where {width} are needed")
        return (
            held.cast(pa.float64(), safe=False)
            .fill_null(float("nan"))
            .to_numpy(zero_copy_only=False)[:, None]
        )
    held = held.cast(pa.list_(pa.float64()))
    widths = pc.list_value_length(held).fill_null(0).to_numpy()
    first = width or int(widths[0])
    if (widths != first).any() or not first:
        at = int(np.argmax(widths != first))
        raise UnusableError(
            f"{what} of {widths[at]} numbers in step {at}, where "
            + (f"{first} are needed" if width else f"step 0 has {first}")
        )
    return (
        held.flatten()
        .fill_null(float("nan"))
        .to_numpy(zero_copy_only=False)
        .reshape(len(held), first)
    )


def number_problem(steps: np.ndarray, what: str, names: Sequence[str] = ()) -> str:
    """Why numbers (T, n) or (T,) of an episode cannot be used, or "": the first that is none, or is
    infinite, by its step and column. ``names``: of columns.
    """
    with np.errstate(over="ignore"):
        found = np.argwhere(~np.isfinite(steps.astype(np.float32, copy=False)))
    if not len(found):
        return ""
    step, place = int(found[0][0]), int(found[0][1]) if steps.ndim > 1 else 0
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
    """What there is to write. ``items``: what makes each episode, in order, those of a split
    together; ``splits``: theirs; ``sizes``: about how many bytes each becomes. ``columns``: as they
    are written, without ``split``. ``mark``: changes when the source does. ``broken``: episodes
    known to be unusable (path, split, reason). ``notes`` and ``info`` as in ``Index``.
    """

    items: list[Any]
    splits: list[str]
    sizes: np.ndarray
    columns: list[pa.Field]
    mark: str
    notes: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    broken: list[dict[str, str]] = field(default_factory=list)


class Result(NamedTuple):
    """What became of one episode: its ``row``, or none of it where it is left out on purpose, or
    the reason why it is ``broken`` (path, split, reason). ``amounts``: what is added up over all,
    by name; ``steps`` of every row.
    """

    split: str
    row: pa.Table | None = None
    broken: dict[str, str] | None = None
    amounts: Mapping[str, float] = {}


class EpisodeImporter(Importer):
    """One format of episodes. Examples: `lerobot`, `rollouts`.

    Attributes:
        sees: ``--resize`` and ``--quality`` say how images are written.
        rows_a_part: so many episodes make a part, 0: about ``part_mb`` of them.
    """

    sees: ClassVar[bool] = False
    rows_a_part: ClassVar[int] = 0

    @abstractmethod
    def index(self, source: str, settings: Settings) -> Episodes:
        """Every episode of ``source``, the same at every call. Raises ValueError for a source that
        is not what is read.
        """

    @abstractmethod
    def episodes(self, items: list[Any], settings: Settings) -> Iterator[Result]:
        """What becomes of each of the items, in their order; in another process than ``index``."""

    def begin(self, output: str, report_progress: ProgressCallback) -> None:
        """What is to be made before the first part, in this process; ``self`` then travels to
        others.
        """
        return

    def shown(self, amounts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What the summary tells of the sums by split."""
        return amounts

    def plan(self, source: str, settings: Settings) -> EpisodeShardTask:
        return EpisodeShardTask(self, source, settings)


class EpisodeShardTask(ShardTask):
    """The parts of such a source: neighbouring episodes of a split, in their order."""

    noun = "episodes"

    def __init__(self, importer: EpisodeImporter, source: str, settings: Settings):
        if not importer.sees:
            settings.refuse(
                ("resize", "quality"),
                f"importer {importer.registered_name} writes no images; leave it out",
            )
        super().__init__(importer, settings)
        self.found = importer.index(source, settings)
        self.label = importer.label
        rows = settings.rows_per_part or (0 if settings.part_mb else importer.rows_a_part)
        self.shards = neighbours(
            self.found.splits, self.found.sizes.tolist(), settings.part_bytes, rows
        )
        self.key = (
            self.found.mark,
            settings.resize,
            settings.quality,
            [[shard.name, shard.start, shard.stop] for shard in self.shards],
        )
        self.broken, self.total = self.found.broken, len(self.found.items) + len(self.found.broken)
        self.notes, self.info = self.found.notes, self.found.info

    def begin(
        self, output: str, check: BudgetCheck, report_progress: ProgressCallback, cpus: float
    ) -> None:
        self.importer.begin(output, report_progress)

    @property
    def columns(self) -> list[pa.Field]:
        return [*self.found.columns, pa.field("split", pa.string())]

    @property
    def make(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer, self.settings, self.schema)

    def payload(self, shard: OutputShard) -> list[Any]:
        return self.found.items[shard.start : shard.stop]

    def shown(self, amounts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if not amounts.get("steps"):
            raise ValueError(
                f"no episode is left of {self.total}: all are broken or were left out; why "
                "stands in _parts of the output"
            )
        return self.importer.shown(amounts)


def _make(
    importer: EpisodeImporter,
    settings: Settings,
    schema: pa.Schema,
    items: list[Any],
    scratch: Path,
) -> ShardResult:
    """The episodes of a part as Parquet in a file: no more in memory than a row group and one
    episode.
    """
    path, rows, broken, counts = scratch / "part.parquet", 0, [], []
    with RowGroups(path, schema, False) as writer:
        for found in importer.episodes(items, settings):
            if found.broken is not None:
                broken.append(found.broken)
            elif found.row is not None:
                writer.add(found.row.select(schema.names).cast(schema))
                rows += 1
            counts += [(name, found.split, count) for name, count in found.amounts.items()]
    return ShardResult(path, rows, broken, added(counts))
