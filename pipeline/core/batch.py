"""A batch of rows, as all parts of the pipeline use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    For dense tasks on images some tensors have fixed names.

    - ``boxes`` (B, M, 4) float32: corners x0 y0 x1 y1. Until the modality's ``finish`` they are
      shares of the row's own image, and pixels of the input after it. A box without area is none.
    - ``mask`` (B, H, W): the class number of each pixel of the input.
    - ``frame`` (B, 4) float32: width, height, left and top of the whole image in pixels of the
      input.

    Attributes:
        rows: (B,) int64 row ids of the manifest, on the host.
        keys: (B,) int64: a random key of each row, from (seed, epoch, row). All that is random
            about a row (crop, mask) depends on its key alone, and not on the number of ranks.
        data: Named tensors, each with first dimension B.
        shards: (B,) the canonical shard of each row, where a plan made the batch.
    """

    rows: np.ndarray
    keys: Tensor
    data: dict[str, Tensor]
    shards: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name]

    def replace(self, **tensors: Tensor) -> Batch:
        """Return the batch with other or further tensors."""
        return Batch(self.rows, self.keys, {**self.data, **tensors}, self.shards)

    def partners(self) -> Tensor:
        """Return another row for each row, for pairings such as mixup.

        It is the next row of the same canonical shard; the last row has the first one. So pairs are
        the same at any number of ranks. Without shards, all rows count as one.

        Returns:
            (B,) int64 on the device of the keys.
        """
        shards = self.shards if self.shards is not None else np.zeros(len(self), dtype=np.int64)
        order = np.argsort(shards, kind="stable")
        out = np.empty(len(self), dtype=np.int64)
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            out[part] = np.roll(part, -1)
        return torch.as_tensor(out).to(self.keys.device)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        move = {name: tensor.to(device, non_blocking=True) for name, tensor in self.data.items()}
        return Batch(self.rows, self.keys.to(device, non_blocking=True), move, self.shards)

    def pin(self) -> Batch:
        """Return the batch in pinned memory."""
        return Batch(
            self.rows,
            self.keys.pin_memory(),
            {name: t if t.is_cuda else t.pin_memory() for name, t in self.data.items()},
            self.shards,
        )

    def split(self, size: int | None) -> list[Batch]:
        """Return micro-batches of at most ``size`` rows, in order and as even as possible.

        Batch norm allows no part of a single row. So where 2 does not divide the rows, one part has
        3 rows. Without a size the batch itself is returned.
        """
        if size is None or len(self) <= size:
            return [self]
        count = -(-len(self) // size)
        if size > 1:
            count = min(count, len(self) // 2)
        return self.parts(count)

    def predict_in_parts(
        self, predict: Callable[[Batch], dict[str, Tensor]], size: int
    ) -> dict[str, Tensor]:
        """Predict at most ``size`` rows at a time, and return the predictions of all rows."""
        parts = [predict(part) for part in self.split(size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def empty(self) -> Batch:
        """Return a batch with the same tensors and no rows."""
        return Batch(
            self.rows[:0],
            self.keys[:0],
            {name: tensor[:0] for name, tensor in self.data.items()},
            None if self.shards is None else self.shards[:0],
        )

    def parts(self, count: int) -> list[Batch]:
        """Cut the batch into ``count`` parts, in order and as even as possible."""
        cuts = [len(self) * i // count for i in range(count + 1)]
        return [
            Batch(
                self.rows[i:j],
                self.keys[i:j],
                {n: t[i:j] for n, t in self.data.items()},
                None if self.shards is None else self.shards[i:j],
            )
            for i, j in pairwise(cuts)
        ]
