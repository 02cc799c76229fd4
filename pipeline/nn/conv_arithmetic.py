"""Where the frames of a chain of convolutions lie: ``convolutions`` are (kernel, stride, padding on
each side), from the samples to the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Convolutions = Sequence[Sequence[int]]


def count(lengths: Any, convolutions: Convolutions) -> Any:
    """How many frames so many samples give: an int, an array or a tensor of whole numbers, and the
    same back (Dumoulin and Visin 2016, relation 6).

    Zero for inputs shorter than the kernels reach.
    """
    for kernel, stride, padding in convolutions:
        there = lengths > 0
        lengths = (lengths + 2 * padding - kernel) // stride + 1
        lengths = (lengths * there).clip(0) if hasattr(lengths, "clip") else max(0, lengths * there)
    return lengths


def stride(convolutions: Convolutions) -> int:
    """Samples from one frame to the next."""
    return (
        int(np.prod([step for _, step, _ in convolutions], dtype=np.int64)) if convolutions else 1
    )


def field(convolutions: Convolutions) -> int:
    """Samples that one frame sees: its receptive field."""
    reach = 1
    for kernel, step, _ in reversed(list(convolutions)):
        reach = (reach - 1) * step + kernel
    return reach


def first(convolutions: Convolutions) -> int:
    """The sample that frame 0 begins to see: negative where there is padding."""
    start, step = 0, 1
    for _, own, padding in convolutions:
        start -= padding * step
        step *= own
    return start


def seconds(frames: np.ndarray, convolutions: Convolutions, rate: int) -> np.ndarray:
    """Times at which frames begin, were each as long as the way to the next one and centred on what
    it sees.
    """
    begin = first(convolutions) + (field(convolutions) - stride(convolutions)) / 2
    return np.maximum(0.0, (begin + np.asarray(frames) * stride(convolutions)) / rate)
