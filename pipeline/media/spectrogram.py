"""Batched operations on sound that lies on the device: log-mel spectrograms, speed, noise,
SpecAugment. Nothing here draws a random number.

Sound is (B, n) float32 from -1 to 1, its rows padded with zeros to the longest, ``lengths`` (B,)
their samples. No row sees another, nor how far it was padded: what it gives is the same in any
batch. ``u`` stands for numbers uniform in [0, 1), which pipeline.core.rng makes of the rows' keys.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as nn
from torchaudio import functional as F

FLOOR = 1e-6
"""Added to a mel bin's power before its logarithm: about what the rounding to 16 bits leaves in
it.
"""
EPSILON = 1e-7
"""Added to a recording's variance: transformers' feature extractor of wav2vec 2.0 has the same."""


def floats(samples: Tensor) -> Tensor:
    """float32 from -1 to 1 of int16."""
    return samples.float() * (1 / 32768)


def within(lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool, true where a row is."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def window_samples(rate: int, window: float, hop: float) -> tuple[int, int]:
    """Samples of a window and from one to the next, of seconds."""
    return round(rate * window), round(rate * hop)


@lru_cache(32)
def _filters(bins: int, rate: int, mels: int, device: str) -> Tensor:
    return F.melscale_fbanks(bins, 0.0, rate / 2, mels, rate, norm=None, mel_scale="htk").to(device)


def fft_size(window: int) -> int:
    """The power of two that a window is padded to, as Kaldi has it: without it the lowest of 80
    filters would hold no frequency at 16 kHz.
    """
    return 1 << (window - 1).bit_length()


def log_mel(x: Tensor, rate: int, window: int, hop: int, mels: int) -> Tensor:
    """(B, T, mels) float32 logarithms of mel-scaled power: Hann windows of ``window`` samples every
    ``hop``, the first one at the row's beginning.

    T = (n - window) // hop + 1, 1 at least. As torchaudio's ``MelSpectrogram`` (power 2, HTK's mel
    scale, no centre padding), each window seeing its own samples only. Float32 also inside
    autocast.
    """
    size = fft_size(window)
    left = (size - window) // 2
    x = nn.pad(x, (left, size - window - left + max(0, window - x.shape[1])))
    with torch.autocast(x.device.type, enabled=False):
        shape = torch.hann_window(window, device=x.device)
        power = F.spectrogram(
            x.float(), 0, shape, size, hop, window, power=2.0, normalized=False, center=False
        )
        return (
            (power.transpose(1, 2) @ _filters(size // 2 + 1, rate, mels, str(x.device))) + FLOOR
        ).log()


def standardized(x: Tensor, lengths: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1 over its own samples, 0 behind its end."""
    inside = within(lengths, x.shape[1])
    count = lengths.clamp(min=1)[:, None]
    centred = (x - (x * inside).sum(1, keepdim=True) / count) * inside
    return centred * ((centred**2).sum(1, keepdim=True) / count + EPSILON).rsqrt()


def speed(x: Tensor, lengths: Tensor, percent: int) -> tuple[Tensor, Tensor]:
    """Rows played at ``percent`` of their speed, pitch and all (Ko et al. 2015), and their new
    lengths, ceil(lengths * 100 / percent). Float32 also inside autocast and where convolutions may
    use TF32, as they may on a GPU: it has 10 bits of the 24 that sound has.
    """
    common = gcd(percent, 100)
    old, new = percent // common, 100 // common
    lengths = -(-lengths * new // old)
    if old != new:
        cudnn = torch.backends.cudnn
        kept = {
            name: getattr(cudnn, name)
            for name in ("enabled", "benchmark", "benchmark_limit", "deterministic")
        }
        with cudnn.flags(**kept, allow_tf32=False), torch.autocast(x.device.type, enabled=False):
            x = F.resample(x.float(), old, new)
    return x * within(lengths, x.shape[1]), lengths


def noisy(x: Tensor, lengths: Tensor, noise: Tensor, decibels: Tensor) -> Tensor:
    """Rows with ``noise`` (B, n), of any scale, at a ratio of ``decibels`` (B,) between their power
    and its.
    """
    inside = within(lengths, x.shape[1])
    noise = noise * inside
    power, theirs = (x**2).sum(1), (noise**2).sum(1)
    scale = (power / theirs.clamp(min=1e-12) * 10 ** (-decibels / 10)).sqrt()
    return x + noise * scale[:, None]


def bands(u: Tensor, lengths: Tensor, size: int, most: Tensor) -> Tensor:
    """(B, size) bool, true under any of M bands: widths uniform in 0..``most`` (B,) whole numbers,
    starts uniform in what ``lengths`` (B,) leaves them (SpecAugment, Park et al. 2019, section 2).
    ``u``: (B, M, 2).
    """
    widths = torch.minimum((u[..., 0] * (most[:, None] + 1)).floor(), lengths[:, None])
    starts = (u[..., 1] * (lengths[:, None] - widths + 1)).floor()
    places = torch.arange(size, device=u.device)
    return ((places >= starts[..., None]) & (places < (starts + widths)[..., None])).any(1)
