"""Means over the real positions of padded rows: pooled tokens, and norms of signals."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pool_tokens(hidden: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Return (B, D), one vector a row of (B, N, D) tokens.

    Args:
        mask: (B, N) bool, true for real tokens.
        pool: "mean" of the real tokens, the "first" or the "last" one of them.
    """
    if pool == "first":
        return hidden[:, 0]
    if pool == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def row_norm(x: Tensor, norm: nn.GroupNorm, lengths: Tensor) -> Tensor:
    """Apply a group norm with one channel a group to (B, C, T), with statistics of each row's own
    steps.

    Computed in float32, returned in the input's type.

    Args:
        lengths: (B,) steps of each row.
    """
    steps = torch.arange(x.shape[2], device=x.device)
    real = (steps < lengths[:, None])[:, None]
    count, wide = lengths.clamp(min=1)[:, None, None], x.float()
    centred = wide - (wide * real).sum(2, keepdim=True) / count
    variance = (centred * real).square().sum(2, keepdim=True) / count
    scale = norm.weight[:, None] * (variance + norm.eps).rsqrt()
    return (centred * scale + norm.bias[:, None]).to(x.dtype)
