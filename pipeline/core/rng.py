"""Random numbers as pure functions of a key, on any device.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). A row's key comes from (seed, epoch, row), and its
k-th uniform number is a hash of (key, k). No state is kept, so what is random about a row does not
depend on the rank, the batch or the step that it is in.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """Return the lowest 64 bits of a whole number as a signed one."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(*parts: int) -> int:
    """Return one 63-bit seed from several integers."""
    z = 0
    for part in parts:
        z = (z + _GAMMA + part) & _MASK
        z = ((z ^ (z >> 30)) * _M1) & _MASK
        z = ((z ^ (z >> 27)) * _M2) & _MASK
        z ^= z >> 31
    return z >> 1


def row_keys(seed: int, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the (B,) int64 keys of rows in their epochs."""
    with np.errstate(over="ignore"):
        z = (
            np.uint64(mix(seed))
            + rows.astype(np.uint64) * np.uint64(_GAMMA)
            + epochs.astype(np.uint64) * np.uint64(_M1)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
        return (z ^ (z >> np.uint64(31))).view(np.int64)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right logically, where torch's shift is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Return (B, count) float32 in [0, 1) from (B,) int64 keys.

    Args:
        stream: Separates uses of the same key.
    """
    numbers = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    index = numbers + (stream << 40)
    z = keys[:, None] + index[None, :] * _signed(_GAMMA)
    z = (z ^ _shift(z, 30)) * _signed(_M1)
    z = (z ^ _shift(z, 27)) * _signed(_M2)
    z = z ^ _shift(z, 31)
    return _shift(z, 40).to(torch.float32) * (1.0 / (1 << 24))
