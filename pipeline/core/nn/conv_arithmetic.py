"""Positions of the frames of a chain of convolutions.

``convolutions`` are (kernel, stride, padding on each side), from the samples to the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Convolutions = Sequence[Sequence[int]]


def count(lengths: Any, convolutions: Convolutions) -> Any:
    """Return how many frames so many samples give (Dumoulin and Visin 2016, relation 6).

    Takes and returns an int, an integer array or tensor; 0 for inputs shorter than the kernels.
    """
    for kernel, stride, padding in convolutions:
        is_positive = lengths > 0
        lengths = (lengths + 2 * padding - kernel) // stride + 1
        lengths = lengths * is_positive
        lengths = lengths.clip(0) if hasattr(lengths, "clip") else max(0, lengths)
    return lengths


def stride(convolutions: Convolutions) -> int:
    """Return the samples from one frame to the next."""
    return (
        int(np.prod([step for _, step, _ in convolutions], dtype=np.int64)) if convolutions else 1
    )


def field(convolutions: Convolutions) -> int:
    """Return the receptive field of a frame in samples."""
    reach = 1
    for kernel, step, _ in reversed(list(convolutions)):
        reach = (reach - 1) * step + kernel
    return reach


def first(convolutions: Convolutions) -> int:
    """Return the first sample that frame 0 depends on; negative where there is padding."""
    start, step = 0, 1
    for _, own, padding in convolutions:
        start -= padding * step
        step *= own
    return start


def seconds(frames: np.ndarray, convolutions: Convolutions, rate: int) -> np.ndarray:
    """Return the times at which frames start, each one stride long and centred on its field."""
    begin = first(convolutions) + (field(convolutions) - stride(convolutions)) / 2
    return np.maximum(0.0, (begin + np.asarray(frames) * stride(convolutions)) / rate)
