"""Rows that are read in several windows, as long texts of question answering.

Shapes: B rows of a batch, W windows of a row, R windows of all rows, N tokens of a window.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.core.batch import Batch

WINDOWS_AT_ONCE = 32
"""Most windows in one pass of a network: in evaluation, hundreds of rows have several each."""


def has_windows(batch: Batch) -> bool:
    """Return whether the rows are read in windows: then ``offsets`` are (B, W, N, 2)."""
    return "offsets" in batch.data and batch["offsets"].dim() == 4


def windows_as_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """Return the R windows of all rows as rows of their own, and which (B, W) are real."""
    real = batch["mask"].any(-1)
    row = real.nonzero()[:, 0]
    names = ("tokens", "mask", "types", "offsets")
    data = {name: batch[name][real] for name in names if name in batch.data}
    rows = batch.rows[row.cpu().numpy()]
    return Batch(rows, batch.keys[row.to(batch.keys.device)], data), real
