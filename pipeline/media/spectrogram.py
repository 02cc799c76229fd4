"""Batched operations on sound on the device: log-mel spectrograms, speed, noise, SpecAugment.

Sound is (B, n) float32 from -1 to 1, padded with zeros, ``lengths`` (B,) the samples of each row. A
row's output depends neither on other rows nor on the padding. Nothing here draws a random number:
``u`` are uniform numbers in [0, 1), made from the rows' keys by pipeline.core.rng.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-6
"""Added to a mel bin's power before the logarithm: about the power of rounding to 16 bits."""
EPSILON = 1e-7
"""Added to a recording's variance, as by transformers' feature extractor of wav2vec 2.0."""


def floats(samples: Tensor) -> Tensor:
    """Convert int16 to float32 from -1 to 1."""
    return samples.float() * (1 / 32768)


def within(lengths: Tensor, width: int) -> Tensor:
    """Return (B, width) bool, true within each row's length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def window_samples(rate: int, window: float, hop: float) -> tuple[int, int]:
    """Convert window and hop from seconds to samples."""
    return round(rate * window), round(rate * hop)


@lru_cache(32)
def _filters(bins: int, rate: int, mels: int, device: str) -> Tensor:
    filters = torchaudio.functional.melscale_fbanks(
        bins, 0.0, rate / 2, mels, rate, norm=None, mel_scale="htk"
    )
    return filters.to(device)


def fft_size(window: int) -> int:
    """Return the power of two that a window is padded to, as in Kaldi.

    Otherwise the lowest of 80 filters would hold no frequency at 16 kHz.
    """
    return 1 << (window - 1).bit_length()


def log_mel(x: Tensor, rate: int, window: int, hop: int, mels: int) -> Tensor:
    """Compute (B, T, mels) float32 logarithms of mel-scaled power.

    Hann windows of ``window`` samples every ``hop``, from the row's beginning on: T = (n - window)
    // hop + 1, at least 1. As torchaudio's ``MelSpectrogram`` (power 2, HTK's mel scale, no centre
    padding). Float32 also inside autocast.
    """
    size = fft_size(window)
    left = (size - window) // 2
    x = F.pad(x, (left, size - window - left + max(0, window - x.shape[1])))
    with torch.autocast(x.device.type, enabled=False):
        shape = torch.hann_window(window, device=x.device)
        power = torchaudio.functional.spectrogram(
            x.float(), 0, shape, size, hop, window, power=2.0, normalized=False, center=False
        )
        filters = _filters(size // 2 + 1, rate, mels, str(x.device))
        return (power.transpose(1, 2) @ filters + FLOOR).log()


def standardized(x: Tensor, lengths: Tensor) -> Tensor:
    """Scale each row to mean 0 and variance 1 over its own samples, 0 after its end."""
    inside = within(lengths, x.shape[1])
    count = lengths.clamp(min=1)[:, None]
    centred = (x - (x * inside).sum(1, keepdim=True) / count) * inside
    return centred * ((centred**2).sum(1, keepdim=True) / count + EPSILON).rsqrt()


def speed(x: Tensor, lengths: Tensor, percent: int) -> tuple[Tensor, Tensor]:
    """Play rows at ``percent`` of their speed, changing the pitch (Ko et al. 2015).

    Returns the rows and their new lengths, ceil(lengths * 100 / percent). Float32 also inside
    autocast and where convolutions may use TF32, as on a GPU: it has 10 of the 24 bits of sound.
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
            x = torchaudio.functional.resample(x.float(), old, new)
    return x * within(lengths, x.shape[1]), lengths


def noisy(x: Tensor, lengths: Tensor, noise: Tensor, decibels: Tensor) -> Tensor:
    """Add ``noise`` (B, n), of any scale, at a signal-to-noise ratio of ``decibels`` (B,)."""
    inside = within(lengths, x.shape[1])
    noise = noise * inside
    power, noise_power = (x**2).sum(1), (noise**2).sum(1)
    scale = (power / noise_power.clamp(min=1e-12) * 10 ** (-decibels / 10)).sqrt()
    return x + noise * scale[:, None]


def bands(u: Tensor, lengths: Tensor, size: int, most: Tensor) -> Tensor:
    """Return (B, size) bool, true under any of M bands (SpecAugment, Park et al. 2019, section 2).

    Widths are uniform integers in 0..``most`` (B,), starts uniform in the rest of ``lengths`` (B,).
    ``u``: (B, M, 2).
    """
    widths = (u[..., 0] * (most[:, None] + 1)).floor()
    widths = torch.minimum(widths, lengths[:, None])
    starts = (u[..., 1] * (lengths[:, None] - widths + 1)).floor()
    stops = starts + widths
    places = torch.arange(size, device=u.device)
    is_covered = (places >= starts[..., None]) & (places < stops[..., None])  # (B, M, size)
    return is_covered.any(1)
