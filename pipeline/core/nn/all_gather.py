"""Gather rows from all ranks, for losses that compare the rows of a global batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_count() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: (0, 1) without torch.distributed."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, without a gradient. Every rank must call it, with the same shape."""
    tensor = tensor.detach().clone()
    if rank_and_count()[1] > 1:
        _all_reduce_in_place(tensor)
    return tensor


def all_gather_rows(local: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, (B_0 + B_1 + ..., ...), and the place of this rank's first row.

    ``local``: (B_r, ...) floats or whole numbers. Ranks may hold different numbers of rows, also
    none; every rank must call it. A gradient flows to this rank's own rows only, and nothing is
    sent for it: each rank computes the whole loss of all rows, so its own rows get their whole
    gradient, and the sum over ranks is the loss's. (Sending gradients back would need all ranks in
    the backward pass, where one without rows has no graph to send from.)
    """
    rank, count = rank_and_count()
    if count == 1:
        return local, 0
    sizes = torch.zeros(count, dtype=torch.int64, device=local.device)
    sizes[rank] = len(local)
    _all_reduce_in_place(sizes)
    counts = [int(size) for size in sizes]
    # a sum over zeros in place of all_gather: not all releases of gloo gather tensors on a GPU
    padded = local.new_zeros(count, max(counts), *local.shape[1:])
    padded[rank, : len(local)] = local.detach()
    _all_reduce_in_place(padded)
    rows = [local if r == rank else padded[r, : counts[r]] for r in range(count)]
    return torch.cat(rows), sum(counts[:rank])


def loss_of_own_rows(losses: Tensor, own_rows: slice) -> Tensor:
    """Return the sum of this rank's rows' losses, with the gradient of the sum of all rows' losses.

    ``losses``: (N,) or (N, ...) of all rows, computed from what `all_gather_rows` returned.
    """
    total = losses.sum()
    without_value = total - total.detach()
    return losses[own_rows].sum().detach() + without_value


def _all_reduce_in_place(tensor: Tensor) -> None:
    """Replace a tensor by its sum over ranks."""
    dist.all_reduce(tensor)  # pyright: ignore[reportUnknownMemberType]
