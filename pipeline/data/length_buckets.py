"""Batches of rows of similar length, cut by cost, for rows of very different cost (audio).

Rows are sorted by cost within a window and cut into buckets of similar cost, once. The batches of a
bucket have as many rows as fit into `batch_cost` when each is padded to the longest row of the
bucket. So an epoch has the same number of batches however they are shuffled, and what a step reads
is a pure function of (rows, seed, step). Each epoch shuffles the windows, the rows within a bucket
and the batches within a window.

A window is the whole corpus, or with `blocks` some row groups, the same ones in all epochs: rows
that are read together are then close to each other in the files.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.rng import mix
from pipeline.data.plan import DEFAULT_SHARDS, Plan, Shuffle

MIN_COST_RATIO = 0.92
"""In a bucket the cheapest row costs at least this share of the most expensive one, unless the
bucket would then have fewer than MIN_BATCHES batches. A row that would add two batches to a bucket
starts a new one instead: a single long row must not split all others.
"""
MIN_BATCHES = 2
WINDOW_MIN_COST_RATIO, WINDOW_MIN_BATCHES, WINDOW_BATCHES = 0.94, 1, 24
"""MIN_COST_RATIO and MIN_BATCHES of windows of row groups, and the number of batches of such a
window, up to `most_rows`.

With LibriSpeech's lengths 4.4 to 4.7 % is then padding, and three rows of ten are batched with the
same ones in all epochs (in fairseq all are). With 0.92 and 2 a window would need 64 batches for
that, and their memory.
"""
WINDOW_ROWS = 16384
"""Approximate rows of a window of row groups, or more until they are WINDOW_BATCHES batches."""


class _Window(NamedTuple):
    rows: np.ndarray
    """Row indices, sorted by cost."""
    buckets: np.ndarray
    """(buckets + 1,) offsets of the buckets in `rows`."""
    batches: tuple[np.ndarray, ...]
    """For each bucket (batches + 1,) offsets of its batches, from the bucket's first row."""


class BucketPlan(Plan):
    """A `Plan` whose global batches cost about `batch_cost`: their rows times the longest of them.

    A row that costs more is a batch of its own.

    Args:
        costs: (rows,) cost of each row, in the unit of `batch_cost`; 0: unknown.
        window_rows: Rows of a window (`blocks`), all of which a reader holds at once; up to
            `most_rows` where WINDOW_BATCHES batches need them.

    Raises:
        ValueError: Costs are negative, not finite or all 0, or `batch_cost` is not above 0.
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
            raise ValueError(
                f"row {row} costs {costs[row]}: a cost must be finite and not negative"
            )
        if len(costs) and not costs.any():
            raise ValueError(
                f"all {len(costs)} rows cost 0, so batch_cost cannot cut batches: neither a column "
                "nor the headers of the files give a cost; check the first files, name a column "
                "with the cost, or use global_batch"
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
            window_rows, min(most_rows, int(WINDOW_BATCHES * batch_cost / costs.mean()))
        )
        self.windows = [self._window(rows) for rows in self._cut(seed)]
        self.batches_per_epoch = float(
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
        starts = self.boundaries.tolist()
        windows = []
        for n in np.unique(number):
            rows = [
                np.arange(starts[group], starts[group + 1])
                for group in np.sort(groups[number == n]).tolist()
            ]
            windows.append(np.concatenate(rows))
        return windows

    @property
    def held_rows(self) -> int:
        """How many rows' row groups a reader must hold to read each group once.

        An item of a shard covers the rows of all shards, and parts of two windows. 0: the window is
        the whole corpus.
        """
        if self.shuffle != "blocks":
            return 0
        largest = max(len(window.rows) for window in self.windows)
        return min(self.rows, 2 * largest + self.shards * self.item_rows)

    def _window(self, rows: np.ndarray) -> _Window:
        if len(rows) == self.rows:
            min_cost_ratio, min_batches = MIN_COST_RATIO, MIN_BATCHES
        else:
            min_cost_ratio, min_batches = WINDOW_MIN_COST_RATIO, WINDOW_MIN_BATCHES
        rows = rows[np.argsort(self.costs[rows], kind="stable")]
        costs = self.costs[rows]
        buckets, batches, start = [0], [], 0
        while start < len(rows):
            # rows of similar cost, then further ones while the bucket has too few batches
            stop = int(np.searchsorted(costs, costs[start] / min_cost_ratio, side="right"))
            while stop < len(rows):
                has_enough = stop - start >= min_batches * self._rows_of(costs[stop - 1])
                is_free = costs[stop - 1] == 0
                num_batches = self._num_batches(costs[start:stop])
                if has_enough or not (
                    is_free or self._num_batches(costs[start : stop + 1]) <= num_batches + 1
                ):
                    break
                stop += 1
            num_batches = self._num_batches(costs[start:stop])
            # too few rows for a bucket of their own join the last one
            if 0 < len(rows) - stop < min_batches * self._rows_of(costs[-1]):
                num_joined = self._num_batches(costs[start:])
                if num_joined <= num_batches + self._num_batches(costs[stop:]) + 1:
                    stop, num_batches = len(rows), num_joined
            ends = [(stop - start) * i // num_batches for i in range(num_batches + 1)]
            batches.append(np.array(ends, dtype=np.int64))
            buckets.append(stop)
            start = stop
        return _Window(rows, np.array(buckets, dtype=np.int64), tuple(batches))

    def _num_batches(self, costs: np.ndarray) -> int:
        """Return how many batches a bucket has, given its rows' costs in ascending order."""
        return -(-len(costs) // self._rows_of(costs[-1]))

    def _rows_of(self, cost: float) -> int:
        """Return how many rows a batch has in which the most expensive row has this cost."""
        if cost <= 0:
            return self.rows
        return max(1, min(self.rows, int(self.batch_cost / cost + 1e-9)))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows,) row indices in the order of an epoch, and (batches + 1,) offsets of its
        batches.
        """
        rows, sizes = [], []
        order_of_windows = np.random.default_rng(mix(self.seed, epoch, 5))
        for w in order_of_windows.permutation(len(self.windows)):
            window, batches = self.windows[w], []
            for b, offsets in enumerate(window.batches):
                bucket = window.rows[window.buckets[b] : window.buckets[b + 1]]
                generator = np.random.default_rng(mix(self.seed, epoch, int(w), b))
                bucket = bucket[generator.permutation(len(bucket))]
                batches += np.split(bucket, offsets[1:-1])
            generator = np.random.default_rng(mix(self.seed, epoch, int(w), 1 << 20))
            order = generator.permutation(len(batches))
            rows += [batches[i] for i in order]
            sizes += [len(batches[i]) for i in order]
        return np.concatenate(rows), np.concatenate([[0], np.cumsum(sizes)])

    def first_position(self, step: int) -> int:
        epoch, batch = divmod(step, int(self.batches_per_epoch))
        return epoch * self.rows + int(self._epoch(epoch)[1][batch])

    def sequence(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, positions = np.divmod(np.arange(start, stop) * self.shards + shard, self.rows)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            is_in_epoch = epochs == epoch
            indices[is_in_epoch] = self._epoch(int(epoch))[0][positions[is_in_epoch]]
        return indices, epochs

    def padding(self, epoch: int = 0) -> float:
        """Return the share of an epoch's padded batches that is padding; 0 where no row has a
        cost.
        """
        rows, starts = self._epoch(epoch)
        costs = self.costs[rows]
        largest = np.maximum.reduceat(costs, starts[:-1])
        padded = float((largest * np.diff(starts)).sum())
        return max(0.0, 1 - float(costs.sum()) / padded) if padded else 0.0
