"""Batches of rows of similar length, cut by cost, for rows of which some cost much more than
others (audio by seconds).

Rows are sorted by cost within a window and cut into buckets of similar cost, once. A bucket's
batches have as many rows as fit into `batch_cost` when each is padded to the bucket's longest. So
an epoch has the same number of batches however they are shuffled, and what a step reads is a pure
function of (rows, seed, step). Each epoch shuffles the windows, the rows within a bucket and the
batches within a window.

A window is the whole corpus, or (`blocks`) some row groups, so that rows are read close to each
other: windows hold the same groups in all epochs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.rng import mix
from pipeline.data.plan import DEFAULT_SHARDS, Plan, Shuffle

WIDTH = 0.92
"""A bucket's cheapest row costs at least this share of its dearest one, unless the bucket would
then hold fewer than LEAST batches. A row that would add two batches to a bucket does not join it:
one long row would split up all others.
"""
LEAST = 2
PART_WIDTH, PART_LEAST, PART_BATCHES = 0.94, 1, 24
"""WIDTH and LEAST of windows that are a part of the rows, and how many batches such a window
holds, up to `most_rows`. With LibriSpeech's lengths 4.4 to 4.7 % is then padding, and three rows of
ten are batched with the same ones in all epochs, as all are in fairseq. 0.92 and 2 would take 64
batches for that, and their memory.
"""
WINDOW_ROWS = 16384
"""Approximate rows of a window of row groups, unless those are fewer than PART_BATCHES batches."""


class _Window(NamedTuple):
    rows: np.ndarray
    """Row indices, sorted by cost."""
    buckets: np.ndarray
    """(buckets + 1,) offsets of the buckets in `rows`."""
    batches: tuple[np.ndarray, ...]
    """For each bucket (batches + 1,) offsets of its batches, from the bucket's first row."""


class BucketPlan(Plan):
    """A `Plan` whose global batches cost about `batch_cost` (rows times the longest of them), or
    hold one row that costs more.

    Args:
        costs: (rows,) cost of each row, in the unit of `batch_cost`; 0: unknown.
        window_rows: rows of a window (`blocks`), all of which a reader holds at once; up to
            `most_rows` where PART_BATCHES batches take them.

    Raises:
        ValueError: costs of another number, negative, not finite or all 0; a `batch_cost` that is
            not above zero.
    """

    def __init__(
        self,
        costs: np.ndarray,
        batch_cost: float,
        seed: int,
        *,
        shards: int = DEFAULT_SHARDS,
        shuffle: Shuffle = "rows",
        boundaries: np.ndarray | None = None,
        item_rows: int = 256,
        window_rows: int = WINDOW_ROWS,
        most_rows: int = 0,
    ):
        if not batch_cost > 0:
            raise ValueError(f"batch_cost {batch_cost:g} must be above 0")
        if shuffle == "none":
            raise ValueError(
                "shuffle: none keeps the order of the rows, and batch_cost sorts them by "
                "their length; leave one of them out"
            )
        costs = np.asarray(costs, dtype=np.float64)
        if not np.isfinite(costs).all() or (costs < 0).any():
            row = int(np.flatnonzero(~np.isfinite(costs) | (costs < 0))[0])
            raise ValueError(f"row {row} costs {costs[row]}: a cost is a number from 0 on")
        if len(costs) and not costs.any():
            raise ValueError(
                f"all {len(costs)} rows cost 0, so that batch_cost cannot cut them: no column and "
                "no header of theirs tells what they cost; look at the first of them, name a "
                "column that tells, or say global_batch"
            )
        super().__init__(
            len(costs),
            seed,
            1,
            shards=shards,
            shuffle=shuffle,
            boundaries=boundaries,
            item_rows=item_rows,
        )
        self.shards, self.batch_cost, self.costs = min(shards, len(costs)), batch_cost, costs
        self.window_rows = max(
            window_rows, min(most_rows, int(PART_BATCHES * batch_cost / costs.mean()))
        )
        self.windows = [self._window(rows) for rows in self._cut(seed)]
        self.batches_an_epoch = float(
            sum(len(bounds) - 1 for window in self.windows for bounds in window.batches)
        )
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def _cut(self, seed: int) -> list[np.ndarray]:
        """Return the rows of each window."""
        if self.shuffle != "blocks":
            return [np.arange(self.rows)]
        groups = np.random.default_rng(mix(seed, 4)).permutation(len(self.boundaries) - 1)
        sizes = np.diff(self.boundaries)[groups]
        number = (np.cumsum(sizes) - sizes) // self.window_rows
        bounds = self.boundaries.tolist()
        return [
            np.concatenate(
                [np.arange(bounds[g], bounds[g + 1]) for g in np.sort(groups[number == n]).tolist()]
            )
            for n in np.unique(number)
        ]

    @property
    def held_rows(self) -> int:
        """Return of how many rows a reader needs the row groups at once, to read each group once.

        An item of a shard covers the rows of all shards, and parts of two windows. 0 where the
        window is the whole corpus and not held.
        """
        largest = max(len(window.rows) for window in self.windows)
        return (
            min(self.rows, 2 * largest + self.shards * self.item_rows)
            if self.shuffle == "blocks"
            else 0
        )

    def _window(self, rows: np.ndarray) -> _Window:
        width, least = (WIDTH, LEAST) if len(rows) == self.rows else (PART_WIDTH, PART_LEAST)
        rows = rows[np.argsort(self.costs[rows], kind="stable")]
        costs, buckets, batches, start = self.costs[rows], [0], [], 0
        while start < len(rows):
            stop = int(np.searchsorted(costs, costs[start] / width, side="right"))
            while (
                stop < len(rows)
                and stop - start < least * self._rows_of(costs[stop - 1])
                and (
                    not costs[stop - 1]
                    or self._parts(costs[start : stop + 1]) <= self._parts(costs[start:stop]) + 1
                )
            ):
                stop += 1
            parts = self._parts(costs[start:stop])
            if 0 < len(rows) - stop < least * self._rows_of(costs[-1]):
                joined = self._parts(costs[start:])
                if joined <= parts + self._parts(costs[stop:]) + 1:
                    stop, parts = len(rows), joined
            batches.append(
                np.array([(stop - start) * i // parts for i in range(parts + 1)], dtype=np.int64)
            )
            buckets.append(stop)
            start = stop
        return _Window(rows, np.array(buckets, dtype=np.int64), tuple(batches))

    def _parts(self, costs: np.ndarray) -> int:
        """Return the batches of a bucket of rows, by cost."""
        return -(-len(costs) // self._rows_of(costs[-1]))

    def _rows_of(self, longest: float) -> int:
        """Return how many rows a batch has in which each is padded to the longest one."""
        return (
            self.rows
            if longest <= 0
            else max(1, min(self.rows, int(self.batch_cost / longest + 1e-9)))
        )

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ((rows,) row indices in the order of an epoch, (batches + 1,) offsets of its
        batches).
        """
        rows, sizes = [], []
        for w in np.random.default_rng(mix(self.seed, epoch, 5)).permutation(len(self.windows)):
            window, parts = self.windows[w], []
            for b, bounds in enumerate(window.batches):
                inside = window.rows[window.buckets[b] : window.buckets[b + 1]]
                inside = inside[
                    np.random.default_rng(mix(self.seed, epoch, int(w), b)).permutation(len(inside))
                ]
                parts += np.split(inside, bounds[1:-1])
            order = np.random.default_rng(mix(self.seed, epoch, int(w), 1 << 20)).permutation(
                len(parts)
            )
            rows += [parts[i] for i in order]
            sizes += [len(parts[i]) for i in order]
        return np.concatenate(rows), np.concatenate([[0], np.cumsum(sizes)])

    def start(self, step: int) -> int:
        epoch, batch = divmod(step, int(self.batches_an_epoch))
        return epoch * self.rows + int(self._epoch(epoch)[1][batch])

    def sequence(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, positions = np.divmod(np.arange(start, stop) * self.shards + shard, self.rows)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._epoch(int(epoch))[0][positions[here]]
        return indices, epochs

    def padding(self, epoch: int = 0) -> float:
        """Return the share of an epoch's padded batches that is padding; 0 where nothing costs
        anything.
        """
        rows, starts = self._epoch(epoch)
        costs = self.costs[rows]
        whole = float((np.maximum.reduceat(costs, starts[:-1]) * np.diff(starts)).sum())
        return max(0.0, 1 - float(costs.sum()) / whole) if whole else 0.0
