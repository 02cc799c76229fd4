"""Weights as what differs from those of a base.

Tensors that are equal are left out. A change of a matrix that has a low rank (an adapter that was
merged) is kept as two factors. So many fine-tunes of one base take little room beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix: TypeAlias = "NDArray[np.float64]"

LEFT, RIGHT = "#left", "#right"
"""Endings of the names of two factors, whose product is added to the base's tensor."""
MAX_RANK = 128
"""Changes of a higher rank are kept whole."""
TOLERANCE = 5e-7
"""Largest error of a product, relative to the largest weight: that of float32 itself."""


def reduce(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``restore`` needs beside the base to give the tensors again.

    Equal tensors come out bit for bit, factors within `TOLERANCE`.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before = base.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            kept[name] = tensor
            continue
        if torch.equal(tensor, before):
            continue
        factors = _factors(tensor, before)
        if factors is None:
            kept[name] = tensor
        else:
            kept[name + LEFT], kept[name + RIGHT] = factors
    return kept


def restore(kept: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors again: those of the base, changed, and those that the base lacks."""
    restored: dict[str, Tensor] = {}
    for name, before in base.items():
        left, right = kept.get(name + LEFT), kept.get(name + RIGHT)
        if left is not None and right is not None:
            restored[name] = _changed(before, left, right)
        else:
            restored[name] = kept.get(name, before)
    others = (name for name in kept if not name.endswith((LEFT, RIGHT)))
    return restored | {name: kept[name] for name in others if name not in restored}


def _changed(before: Tensor, left: Tensor, right: Tensor) -> Tensor:
    change = (left.double() @ right.double()).reshape(before.shape)
    return (before.double() + change).to(before.dtype)


def _factors(tensor: Tensor, before: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (rows, r) and (r, columns) whose product is the change, or None where they would not
    be smaller or not exact.
    """
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    if not bool(torch.isfinite(tensor).all() and torch.isfinite(before).all()):
        return None
    change: Matrix = (tensor.double() - before.double()).flatten(1).numpy()
    rows, columns = change.shape
    rank = min(rows * columns // (2 * (rows + columns)), MAX_RANK)
    if rank < 1:
        return None
    basis = _largest_directions(change, rank)
    u, values, vectors = np.linalg.svd(basis.T @ change, full_matrices=False)
    largest = float(tensor.abs().max())
    # float32 rounds every weight: that alone has singular values about so large
    noise = float(np.finfo(np.float32).eps) * largest * max(rows, columns) ** 0.5
    count = int((values > noise).sum())
    left = _tensor(basis @ (u[:, :count] * values[:count]), tensor.dtype)
    right = _tensor(vectors[:count], tensor.dtype)
    error = (_changed(before, left, right) - tensor).abs().max()
    return (left, right) if float(error) <= TOLERANCE * largest else None


def _tensor(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    return torch.tensor(matrix, dtype=dtype)


def _largest_directions(matrix: Matrix, rank: int) -> Matrix:
    """Return (rows, rank) orthonormal columns that span the largest directions of a matrix (Halko
    et al. 2011, algorithm 4.4).
    """
    sample = np.random.default_rng(0).standard_normal((matrix.shape[1], rank))
    basis = np.linalg.qr(matrix @ sample)[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    return basis
