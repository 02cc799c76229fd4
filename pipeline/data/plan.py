"""The order in which rows are read, as a pure function of (rows, seed, epoch, global batch). No
Ray, no torch.

Positions count rows over all epochs: global batch t is positions [tG, (t+1)G), so every batch is
full, also across the end of an epoch, and every epoch covers each row exactly once. Position P
belongs to canonical shard P mod C. A rank owns the shards s with s mod ranks == rank: the global
batch is the same for any number of ranks up to C, the number of steps is arithmetic, and a rank
reads only its own shards. When ranks divide C and C divides G all ranks hold equally many rows.

Within an epoch the shards are consecutive parts of one shuffled order: `rows` permutes all rows;
`blocks` permutes the row groups and the rows inside each (shards then interleave C row groups),
which never needs more than C groups at a time.

A mixture draws from several corpora by weights. Each corpus is then an endless sequence of its own,
in which each of its epochs covers each of its rows exactly once, and a row's epoch is that of its
corpus. Which corpus a position of a shard draws from follows from (seed, shard, chunk of CHUNK
positions): every chunk has the same numbers of draws, so the state of a corpus's sequence at any
position is closed form, too. An epoch of the plan is then as many positions as there are rows in
all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from pipeline.core.rng import mix

Shuffle = Literal["rows", "blocks", "none"]
DEFAULT_SHARDS = 8
"""Least number of canonical shards of a job's plans: up to so many ranks can share a batch."""
CHUNK = 4096
"""Positions of a shard in which each corpus of a mixture has exactly its share. Weights are rounded
to parts of a chunk.
"""
Mixture = tuple[tuple[int, int, float], ...]
"""(first row index, one past the last, weight) of every corpus, in the order of their rows."""


@dataclass(frozen=True)
class Item:
    """Positions [start, stop) of one shard's sequence: what a data worker decodes at once.

    ``shard`` -1: row indices [start, stop), for evaluation.
    """

    shard: int
    start: int
    stop: int


class Order:
    """An endless sequence of shuffled epochs over rows 0 .. rows-1, dealt to shards.

    `boundaries`: as in Plan.
    """

    def __init__(self, rows: int, seed: int, shards: int, shuffle: Shuffle, boundaries: np.ndarray):
        self.rows, self.seed, self.shards, self.boundaries = rows, seed, shards, boundaries
        self.shuffle: Shuffle = shuffle
        self._epoch_order = lru_cache(maxsize=3)(self._make_order)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_epoch_order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch_order = lru_cache(maxsize=3)(self._make_order)

    # ------------------------------------------------ one epoch's order

    def _make_order(self, epoch: int):
        generator = np.random.default_rng(mix(self.seed, epoch))
        if self.shuffle == "none":
            return np.arange(self.rows)
        if self.shuffle == "rows":
            return generator.permutation(self.rows)
        blocks = generator.permutation(len(self.boundaries) - 1)
        sizes = np.diff(self.boundaries)[blocks]
        return blocks, np.concatenate([[0], np.cumsum(sizes)])

    def order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return (stop - start,) row indices at positions [start, stop) of an epoch's shuffled
        order.
        """
        epoch_order = self._epoch_order(epoch)
        if isinstance(epoch_order, np.ndarray):
            return epoch_order[start:stop]
        blocks, starts = epoch_order
        out = []
        for i in range(int(np.searchsorted(starts, start, side="right")) - 1, len(blocks)):
            if starts[i] >= stop:
                break
            low, high = self.boundaries[blocks[i]], self.boundaries[blocks[i] + 1]
            generator = np.random.default_rng(mix(self.seed, epoch, int(blocks[i]), 1))
            block = generator.permutation(high - low) + low
            out.append(block[max(start - starts[i], 0) : stop - starts[i]])
        return np.concatenate(out) if out else np.zeros(0, dtype=np.int64)

    # ------------------------------------------------ shards

    def _count_before(self, position: int, shard: int) -> int:
        """Return how many positions below `position` belong to the shard."""
        return (position - shard + self.shards - 1) // self.shards

    def sequence(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) row indices and (n,) epochs of positions [start, stop) of a shard's
        sequence.
        """
        indices, epochs = [], []
        while start < stop:
            position = start * self.shards + shard
            epoch = position // self.rows
            first = self._count_before(epoch * self.rows, shard)
            last = self._count_before((epoch + 1) * self.rows, shard)
            offset = sum(
                self._count_before((epoch + 1) * self.rows, s)
                - self._count_before(epoch * self.rows, s)
                for s in range(shard)
            )
            end = min(stop, last)
            indices.append(self.order(epoch, offset + start - first, offset + end - first))
            epochs.append(np.full(end - start, epoch, dtype=np.int64))
            start = end
        if not indices:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(indices), np.concatenate(epochs)


class MixtureOrder:
    """Corpora sampled by weights, each in an order of its own.

    Within a chunk the draws of a corpus are stratified: the chunk is cut into as many equal parts
    as there are draws, and each part has one. So the share of a corpus is near its weight after any
    number of positions.
    """

    def __init__(self, mixture: Mixture, plan: Order):
        weights = np.array([weight for *_, weight in mixture], dtype=np.float64)
        starts, stops = [start for start, *_ in mixture], [stop for _, stop, _ in mixture]
        if starts != [0, *stops[:-1]] or stops[-1] != plan.rows:
            raise ValueError(
                "the corpora of a mixture must follow each other from row 0 to row "
                f"{plan.rows}: {mixture}"
            )
        self.seed, self.starts = plan.seed, starts
        self.draws = draws_per_chunk(weights)
        for number, (start, stop, weight) in enumerate(mixture, 1):
            if stop <= start:
                raise ValueError(
                    f"corpus {number} has weight {weight:g} and no rows to train on: leave it out"
                )
        self.parts = [
            Order(
                stop - start,
                mix(plan.seed, 3, c),
                plan.shards,
                plan.shuffle,
                _inside(plan.boundaries, start, stop),
            )
            for c, (start, stop, _) in enumerate(mixture)
        ]
        self._chunk = lru_cache(maxsize=2 * plan.shards)(self._make_chunk)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_chunk"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._chunk = lru_cache(maxsize=2 * self.parts[0].shards)(self._make_chunk)

    def _make_chunk(self, shard: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (CHUNK,) the corpus of each position, and (CHUNK,) the number of the draw within
        the chunk's draws from that corpus.
        """
        corpora = np.repeat(np.arange(len(self.draws)), self.draws)
        draw = np.concatenate([np.arange(count) for count in self.draws])
        generator = np.random.default_rng(mix(self.seed, shard, chunk, 2))
        place = (draw + generator.random(CHUNK)) / self.draws[corpora]
        order = np.argsort(place, kind="stable")
        return corpora[order], draw[order]

    def sequence(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `Order.sequence` returns, for the mixture."""
        n = max(0, stop - start)
        indices, epochs = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        for chunk in range(start // CHUNK, -(-stop // CHUNK) if n else 0):
            low, high = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
            corpora, draw = (
                part[low - chunk * CHUNK : high - chunk * CHUNK]
                for part in self._chunk(shard, chunk)
            )
            for c in np.unique(corpora):
                positions = np.flatnonzero(corpora == c)
                first = chunk * int(self.draws[c]) + int(draw[positions[0]])
                rows, row_epochs = self.parts[c].sequence(shard, first, first + len(positions))
                positions += low - start
                indices[positions] = rows + self.starts[c]
                epochs[positions] = row_epochs
        return indices, epochs


def draws_per_chunk(weights: np.ndarray) -> np.ndarray:
    """Return (corpora,) the number of draws from each corpus in a chunk, by weights.

    Raises ValueError for weights that are not above 0, or so small that nothing would be drawn.
    """
    is_positive = np.isfinite(weights) & (weights > 0)
    if not len(weights) or not is_positive.all():
        raise ValueError(f"weights {', '.join(f'{w:g}' for w in weights)}: each must be above 0")
    shares = weights / weights.sum()
    cuts = np.round(np.cumsum(shares) * CHUNK)
    out = np.diff([0, *cuts[:-1], CHUNK]).astype(np.int64)
    if (out < 1).any():
        c = int(out.argmin())
        raise ValueError(
            f"the weight {weights[c]:g} of corpus {c + 1} is {shares[c]:.2g} of all weights, and "
            f"the smallest share is 1 of {CHUNK}: raise it, or leave the corpus out"
        )
    return out


def _inside(boundaries: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the boundaries inside a range of rows, counted from its first."""
    return np.unique(np.clip(boundaries, start, stop)) - start


class Plan(Order):
    """Row order of one training run.

    Args:
        rows: Number of selected rows (indices 0 .. rows-1).
        boundaries: (row groups + 1,) first index of every row group, for `blocks`.
        item_rows: Rows of an item.
        mixture: Corpora as ranges of the rows, with weights; None: every row once per epoch.

    Raises:
        ValueError: There are no rows or fewer than a global batch, a corpus is empty, or its weight
            is too small for a draw.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        global_batch: int,
        *,
        shards: int = DEFAULT_SHARDS,
        shuffle: Shuffle = "rows",
        boundaries: np.ndarray | None = None,
        item_rows: int = 256,
        mixture: Mixture | None = None,
    ):
        if rows < 1:
            raise ValueError("there are no rows to train on")
        if global_batch < 1:
            raise ValueError(f"global batch {global_batch} must be at least 1")
        if rows < global_batch:
            raise ValueError(
                f"{rows} rows are fewer than one global batch of {global_batch}: lower "
                "train.global_batch or add data"
            )
        bounds = np.asarray([0, rows] if boundaries is None else boundaries, dtype=np.int64)
        if shuffle == "blocks" and (bounds[0] != 0 or bounds[-1] != rows):
            raise ValueError("boundaries must run from 0 to the number of rows")
        super().__init__(rows, seed, min(shards, global_batch), shuffle, bounds)
        self.global_batch, self.item_rows = global_batch, item_rows
        self.batches_per_epoch: float = rows / global_batch
        self.mixed = MixtureOrder(mixture, self) if mixture is not None else None

    def sequence(self, shard: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) row indices and (n,) epochs of positions [start, stop) of a shard's sequence.

        In a mixture a row's epoch is that of its corpus.
        """
        if self.mixed is not None:
            return self.mixed.sequence(shard, start, stop)
        return super().sequence(shard, start, stop)

    def shards_of_rank(self, rank: int, ranks: int) -> list[int]:
        """Return the shards of a rank. Raises ValueError for more ranks than shards."""
        if ranks > self.shards:
            raise ValueError(
                f"{ranks} ranks are more than the {self.shards} canonical shards: raise "
                f"train.canonical_shards or train.global_batch (now {self.global_batch}), or use "
                "fewer workers"
            )
        return list(range(rank, self.shards, ranks))

    def first_position(self, step: int) -> int:
        """Return the first position of global batch `step`."""
        return step * self.global_batch

    def steps(self, epochs: float) -> int:
        """Return the number of global batches of so many epochs, rounded up, at least one."""
        return max(1, int(np.ceil(epochs * self.batches_per_epoch - 1e-9)))

    def shard_positions(self, step: int, shard: int) -> tuple[int, int]:
        """Return the positions of the shard's sequence that global batch `step` takes."""
        return self._count_before(self.first_position(step), shard), self._count_before(
            self.first_position(step + 1), shard
        )

    def positions(self, step: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) shards and (n,) positions in their sequences of the rank's part of a global
        batch, in order.
        """
        rows = np.arange(self.first_position(step), self.first_position(step + 1))
        rows = rows[(rows % self.shards) % ranks == rank]
        return rows % self.shards, rows // self.shards

    def batch(
        self,
        step: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) row indices and (n,) epochs of the rank's part of a global batch, in
        order.
        """
        shards, positions = self.positions(step, rank, ranks)
        indices = np.empty(len(positions), dtype=np.int64)
        epochs = np.empty(len(positions), dtype=np.int64)
        for shard in self.shards_of_rank(rank, ranks):
            is_of_shard = shards == shard
            start, stop = self.shard_positions(step, shard)
            indices[is_of_shard], epochs[is_of_shard] = self.sequence(shard, start, stop)
        return indices, epochs

    def items(
        self, first_step: int, last_step: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[Item]:
        """Return the items that a rank reads for steps [first_step, last_step), in the order in
        which it needs them.
        """
        items = []
        for shard in self.shards_of_rank(rank, ranks):
            start, _ = self.shard_positions(first_step, shard)
            stop, _ = self.shard_positions(last_step, shard)
            while start < stop:
                end = min(stop, (start // self.item_rows + 1) * self.item_rows)
                items.append(Item(shard, start, end))
                start = end
        return iter(sorted(items, key=lambda item: item.start * self.shards + item.shard))
