"""Sound on the device: log-mels as torchaudio's and as the formula's, speed, noise, bands; no row
sees another or its padding.
"""

import numpy as np
import pytest
import torch
import torchaudio

from pipeline.core.nn import conv_arithmetic
from pipeline.media import spectrogram as ops

RATE, WINDOW, HOP = 16000, 400, 160


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def padded(rows: list[torch.Tensor], more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    out = torch.zeros(len(rows), int(lengths.max()) + more)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


# ---------------------------------------------------------------- log-mels


@pytest.mark.parametrize(
    ("rate", "window", "hop", "mels"),
    [(16000, 400, 160, 80), (8000, 200, 80, 40), (22050, 551, 220, 64), (16000, 512, 128, 80)],
)
def test_log_mels_are_those_of_torchaudio(rate, window, hop, mels):
    x = noise(3, rate)
    size = ops.fft_size(window)
    left = (size - window) // 2
    want = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=size, win_length=window, hop_length=hop, n_mels=mels, center=False
    )(torch.nn.functional.pad(x, (left, size - window - left)))
    found = ops.log_mel(x, rate, window, hop, mels)
    assert found.shape == (3, conv_arithmetic.count(rate, [(window, hop, 0)]), mels)
    assert torch.allclose(found, (want.transpose(1, 2) + 1e-6).log(), atol=1e-5)


def test_log_mels_are_those_of_the_formula():
    """Hann window, discrete Fourier transform, triangles on HTK's mel scale, in float64."""
    x = noise(2000).double().numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    corners = 700 * (10 ** (np.linspace(0, mel(8000), 82) / 2595) - 1)
    hertz = np.arange(257) * RATE / 512
    rising = (hertz[:, None] - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - hertz[:, None]) / np.diff(corners)[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    assert (filters.sum(0) > 0).all()
    rows = []
    for start in range(0, 2000 - WINDOW + 1, HOP):
        framed = np.zeros(512)
        # Where in the 512 it lies does not change the power
        framed[:WINDOW] = x[start : start + WINDOW] * window
        rows.append(np.log((np.abs(np.fft.rfft(framed)) ** 2) @ filters + 1e-6))
    found = ops.log_mel(torch.from_numpy(x).float()[None], RATE, WINDOW, HOP, 80)[0]
    assert found.shape == (11, 80) and np.abs(found.numpy() - np.array(rows)).max() < 1e-4


@pytest.mark.parametrize(
    ("samples", "count"), [(0, 1), (1, 1), (399, 1), (400, 1), (559, 1), (560, 2), (16000, 98)]
)
def test_how_many_frames(samples, count):
    assert ops.log_mel(noise(2, samples), RATE, WINDOW, HOP, 80).shape == (2, count, 80)
    assert max(1, conv_arithmetic.count(samples, [(WINDOW, HOP, 0)])) == count


def test_a_rows_frames_do_not_see_its_padding_or_its_neighbours():
    rows = [noise(n, seed=n) for n in (5000, 400, 12345)]
    together, lengths = padded(rows, more=3000)
    together[1, 400:] = 7.0  # what lies behind the end may be anything
    found = ops.log_mel(together, RATE, WINDOW, HOP, 80)
    for i, row in enumerate(rows):
        count = conv_arithmetic.count(int(lengths[i]), [(WINDOW, HOP, 0)])
        assert torch.allclose(
            found[i, :count], ops.log_mel(row[None], RATE, WINDOW, HOP, 80)[0], atol=1e-5
        )


def test_log_mels_are_float32_inside_autocast_and_finite_on_silence():
    x = noise(2, 4000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.log_mel(x, RATE, WINDOW, HOP, 80)
    assert found.dtype == torch.float32 and torch.equal(
        found, ops.log_mel(x, RATE, WINDOW, HOP, 80)
    )
    assert torch.allclose(
        ops.log_mel(torch.zeros(1, 4000), RATE, WINDOW, HOP, 80), torch.tensor(1e-6).log()
    )


# ---------------------------------------------------------------- samples


def test_floats():
    assert ops.floats(torch.tensor([-32768, 0, 16384], dtype=torch.int16)).tolist() == [
        -1.0,
        0.0,
        0.5,
    ]


def test_standardized_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    rows = [0.3 * noise(n, seed=n) + 0.1 for n in (4000, 700, 2500)]
    want = extractor(
        [row.numpy() for row in rows], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    x, lengths = padded(rows)
    x[1, 700:] = 3.0
    found = ops.standardized(x, lengths)
    assert torch.allclose(found, want["input_values"] * want["attention_mask"], atol=1e-5)
    assert torch.equal(ops.within(lengths, 4000), want["attention_mask"].bool())
    assert torch.equal(
        ops.standardized(torch.zeros(2, 50), torch.tensor([50, 0])), torch.zeros(2, 50)
    )


@pytest.mark.parametrize("percent", [90, 95, 100, 110, 150])
def test_speed_is_torchaudios_and_sees_no_padding(percent):
    rows = [noise(n, seed=n) for n in (4000, 801, 2500)]
    x, lengths = padded(rows, more=500)
    found, new = ops.speed(x, lengths, percent)
    assert new.tolist() == [-(-len(row) * 100 // percent) for row in rows]
    for i, row in enumerate(rows):
        want, _ = torchaudio.functional.speed(row, 100, percent / 100)
        assert len(want) == new[i] and torch.allclose(found[i, : len(want)], want, atol=1e-6)
        assert not found[i, len(want) :].any()


def test_speed_is_exact_inside_autocast_and_where_convolutions_may_use_tf32(monkeypatch):
    """On a GPU, where they may unless told not to; what was set is set again."""
    cudnn, inside = torch.backends.cudnn, []
    before = [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32]
    resample = torchaudio.functional.resample
    monkeypatch.setattr(
        torchaudio.functional,
        "resample",
        lambda *a: (
            inside.append([cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32])
            or resample(*a)
        ),
    )
    x, lengths = padded([noise(4000), noise(900)])
    want, _ = ops.speed(x, lengths, 90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = ops.speed(x, lengths, 90)
    assert found.dtype == torch.float32 and torch.equal(found, want)
    assert (
        inside == [[*before[:3], False]] * 2
        and [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32] == before
    )
    assert before[0] and before[3], "as PyTorch has them"


def test_faster_is_higher():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(RATE) / RATE)[None]
    found, lengths = ops.speed(tone, torch.tensor([RATE]), 110)
    assert int(torch.fft.rfft(found[0]).abs().argmax()) * RATE / int(lengths) == pytest.approx(
        1100, abs=2
    )


def test_noise_has_its_ratio_in_each_row():
    rows = [0.3 * noise(n, seed=n) for n in (4000, 700, 2500)]
    x, lengths = padded(rows)
    decibels = torch.tensor([10.0, 0.0, 30.0])
    found = ops.noisy(x, lengths, 5 * noise(3, 4000, seed=9), decibels)
    for i, n in enumerate(lengths.tolist()):
        added = (found - x)[i, :n]
        assert 10 * torch.log10((x[i] ** 2).sum() / (added**2).sum()) == pytest.approx(
            float(decibels[i]), abs=1e-3
        )
        assert not found[i, n:].any()
    assert torch.equal(
        ops.noisy(torch.zeros(1, 100), torch.tensor([100]), noise(1, 100), torch.tensor([10.0])),
        torch.zeros(1, 100),
    )
    assert torch.equal(
        ops.noisy(torch.zeros(1, 100), torch.tensor([0]), noise(1, 100), torch.tensor([10.0])),
        torch.zeros(1, 100),
    )


def test_bands_lie_inside_and_have_every_width():
    u = noise(20000, 1, 2) + 0.5
    lengths = torch.full((20000,), 10)
    found = ops.bands(u, lengths, 14, torch.full((20000,), 4.0))
    widths = found.sum(1)
    assert not found[:, 10:].any()
    assert [round(float((widths == w).float().mean()), 1) for w in range(6)] == [0.2] * 5 + [0.0]
    starts = found.float().argmax(1)[widths == 4]
    assert (
        sorted(starts.unique().tolist()) == list(range(7))
        and torch.bincount(starts).float().std() < 60
    )
    edges = found[:, 1:10].int() - found[:, :9].int()
    assert (edges == 1).sum(1).max() == 1  # one stretch


def test_several_bands_and_rows_shorter_than_them():
    u = noise(500, 3, 2) + 0.5
    found = ops.bands(u, torch.full((500,), 100), 100, torch.full((500,), 10.0))
    each = [
        ops.bands(u[:, i : i + 1], torch.full((500,), 100), 100, torch.full((500,), 10.0))
        for i in range(3)
    ]
    assert torch.equal(found, each[0] | each[1] | each[2]) and found.sum(1).max() <= 30
    short = ops.bands(u, torch.tensor([0, 1, 2, 3, 4] * 100), 8, torch.full((500,), 50.0))
    assert not short[0::5].any() and all(not short[i::5, i:].any() for i in range(5))
    assert not ops.bands(u[:, :0], torch.full((500,), 100), 100, torch.full((500,), 10.0)).any()
