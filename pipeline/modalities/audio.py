"""Recordings, or pieces of them, for backbones that read samples or log-mel spectrograms.

Data workers decode files to int16 samples at one rate. Noise, speed changes, spectrograms and
SpecAugment are computed on the device.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypedDict

import numpy as np
import pyarrow as pa
import soundfile
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.registry import Options, register, wanted_inputs
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import holds_files, is_number
from pipeline.core.contracts import Arrays, Batch, Modality
from pipeline.core.inputs import AudioInputs
from pipeline.core.nn import conv_arithmetic
from pipeline.core.ragged import ragged
from pipeline.core.rng import uniform
from pipeline.core.specs import State
from pipeline.io import storage
from pipeline.io.threads import threaded_map
from pipeline.media import audio_io, perceptual_hash, spectrogram
from pipeline.media.audio_io import BrokenAudioError, LongAudioError

SPEED, NOISE, WHITE, MASKS = 0, 1, 2, 3
"""Streams of a row's key."""
FIT_SECONDS = 1800.0
"""Seconds of sound that ``fit`` reads."""
MIN_STD = 1.0
"""Smallest standard deviation of a mel bin. The log power of white noise has 1.28; without a limit,
a bin in which the source is silent (8 kHz telephony) would make a target's sound there a hundred
deviations loud.
"""
WHOLE_FILE_BYTES = 4 << 20
"""Files of at most this many bytes are read whole, by one request on S3."""
RANDOM_SECONDS = 0.5
"""Length of recordings that are made up."""
MASK_OPTIONS = ("frequency_masks", "frequency_width", "time_masks", "time_width", "time_share")
"""Options of SpecAugment."""
NO_SOUND = np.zeros(0, dtype=np.int16)
NEAR_RATE, NEAR_DECIBELS = 8000, 60.0
"""Samples a second, and how far below its loudest bin a recording is looked at, where recordings
are compared: what is above half the rate or nearly silent changes with each compression.
"""

PREPARATION = """
import soundfile

samples, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)
assert rate == {rate}, "resample it to {rate} samples a second first"
wave = np.rint(samples.mean(1) * 32768).clip(-32768, 32767)  # 16 bits
wave = (wave / 32768).astype(np.float32)
"""
"""Code that reads a recording outside of this package."""
PREPARED_WAVE = """
{normalize}inputs = {{"wave": wave[None], "mask": np.ones((1, len(wave)), bool)}}
"""
NORMALIZE = "wave = (wave - wave.mean()) / np.sqrt(wave.var() + {epsilon})\n"
PREPARED_MEL = """
import torch
import torchaudio

spectrogram = torchaudio.transforms.MelSpectrogram(
    {rate}, n_fft={size}, win_length={window}, hop_length={hop}, n_mels={mels}, center=False
)  # Hann windows, power 2, HTK's mel scale; no padding but that of a window to n_fft
padded = np.pad(wave, ({left}, {right}))
mel = np.log(spectrogram(torch.from_numpy(padded)).numpy().T + {floor})
state = graph["modality"]["state"]
mel = (mel - np.array(state["mean"])) / np.array(state["std"])
inputs = {{"mel": mel[None], "mask": np.ones((1, len(mel)), bool)}}
"""
PREPARED_INPUTS = """
inputs["audio_lengths"] = np.array([len(wave)])
inputs = {name: inputs[name].astype(one["type"]) for name, one in graph["inputs"].items()}
# several recordings: pad with 0 behind the shorter ones, where mask is False
"""


class AudioOptions(Options):
    rate: int = Field(
        16000,
        ge=4000,
        le=96000,
        description="samples a second that recordings of any rate are resampled to",
    )
    features: Literal["auto", "mel", "wave"] = Field(
        "auto",
        description="mel: log-mel spectrograms; wave: the samples themselves; auto: wave for "
        "backbones that read samples (WaveNet, wav2vec 2.0)",
    )
    mels: int = Field(80, ge=8, le=512, description="mel bins")
    window: float = Field(
        0.025,
        ge=0.002,
        le=1,
        description="seconds that a frame sees; shorter recordings are bad rows",
    )
    hop: float = Field(0.01, ge=0.001, le=1, description="seconds from one frame to the next")
    normalize: bool | None = Field(
        None,
        description="wave: mean 0 and variance 1 in each recording (wav2vec 2.0 base); none: yes, "
        "but not for WaveNet, whose mu-law wants -1 to 1",
    )
    max_seconds: float = Field(
        40.0,
        gt=0,
        le=3600,
        description="longer rows are bad: cut long recordings (an audio folder's are, at silence); "
        "lowered to what the backbone reads, such as Whisper's 30 s",
    )
    speed: float = Field(
        0.0,
        ge=0,
        le=0.5,
        multiple_of=0.01,
        description="training: played slower by this share (whole percent), as it is, or faster "
        "(0.1: 0.9, 1 and 1.1), pitch and all",
    )
    noise: float = Field(
        0.0, ge=0, le=1, description="training: share of the rows with white noise"
    )
    noise_snr: list[float] = Field(
        [10.0, 40.0],
        min_length=2,
        max_length=2,
        description="its signal-to-noise ratio in dB, uniform between these",
    )
    frequency_masks: int = Field(
        2,
        ge=0,
        le=16,
        description="training, mel: SpecAugment's bands of masked mel bins; 0 is off",
    )
    frequency_width: float = Field(
        0.2, gt=0, le=1, description="largest share of the mel bins under one of them"
    )
    time_masks: int = Field(
        2,
        ge=0,
        le=64,
        description="training, mel: SpecAugment's stretches of masked frames; 0 is off",
    )
    time_width: float = Field(
        0.5, gt=0, le=60, description="largest length of one of them in seconds"
    )
    time_share: float = Field(
        0.15, gt=0, le=1, description="largest share of a row's frames under one of them"
    )


class AudioState(TypedDict, total=False):
    """State of `Audio`."""

    features: Literal["wave", "mel"]
    normalize: bool
    """Of features ``wave``: whether the backbone wants each recording standardised."""
    mean: list[float]
    """Of features ``mel``: mean of each bin."""
    std: list[float]
    """Of features ``mel``: standard deviation of each bin."""


@register("modality", "audio", options=AudioOptions)
class Audio(Modality):
    """Recordings as int16 mono samples at ``rate``.

    The column of role ``audio`` holds the bytes of files, URIs, or structs as in Hugging Face's
    Audio.

    - With ``start`` (seconds) a row is the part of its recording from there on. It is ``seconds``
      long, or without ``seconds`` goes to the end.
    - A row without ``start`` is the whole recording.
    - Floating-point samples beyond full scale (1) are clipped to it, as where soundfile or ffmpeg
      write 16 bits. ``prepare`` counts such recordings as clipped.

    Tensors: ``audio``, ragged from ``decode``, and (B, n) with ``audio_lengths`` (B,) after
    ``collate``. ``augment`` and ``finish`` replace ``audio`` by one of

    - ``mel`` (B, T, mels) float32, standardised by bin, with ``mask`` (B, T), true where a frame
      covers samples of the row only;
    - ``wave`` (B, n) float32 with ``mask`` (B, n), true for the row's samples.

    Both are 0 where the mask is false. ``audio_lengths`` (B,) are then the lengths after
    augmentation.
    """

    state: AudioState
    roles = ("audio",)
    optional_roles = ("start", "seconds")
    file_roles = ("audio",)
    near_search = perceptual_hash.PerceptualSearch("perceptual hash of log-mel spectrograms")
    target_options = (
        "max_seconds",
        "speed",
        "noise",
        "noise_snr",
        *MASK_OPTIONS,
    )
    cost_role = "seconds"
    cost_unit = "seconds"

    def __init__(self, options: Any, state: State):
        super().__init__(options, state)
        self.window, self.hop = spectrogram.window_samples(
            options.rate, options.window, options.hop
        )
        if self.hop > self.window:
            raise ValueError(
                f"hop: {options.hop:g} s from one frame to the next, each {options.window:g} s "
                "wide, would pass over samples; make window larger"
            )
        if not -20 <= options.noise_snr[0] <= options.noise_snr[1] <= 100:
            raise ValueError(
                f"noise_snr: {options.noise_snr} must be the least and the greatest ratio in "
                "dB, between -20 and 100"
            )
        if self.features == "mel" and options.mels > spectrogram.fft_size(self.window) // 2:
            raise ValueError(
                f"mels: {options.mels} bins of a window of {options.window:g} s at "
                f"{options.rate} Hz, which tells "
                f"{spectrogram.fft_size(self.window) // 2} frequencies; take fewer, or a larger "
                "window"
            )

    @property
    def features(self) -> str:
        return self.state.get("features") or ("wave" if self.options.features == "wave" else "mel")

    @classmethod
    def ineffective_options(cls, stated, inherited=None) -> str:
        options = AudioOptions.model_construct(**{**(inherited or {}), **stated})
        if "noise_snr" in stated and not options.noise:
            return (
                f"noise_snr {stated['noise_snr']} has no effect without noise: leave it out, or "
                "give noise, the share of the rows with noise"
            )
        return _ineffective_masks(stated) if options.features == "wave" else ""

    @classmethod
    def fit(cls, options, table, columns, backbone) -> AudioState:
        """Choose the features and measure mean and standard deviation of each mel bin.

        The features follow from the options, else from what the backbone wants. Raises ValueError
        when no row can be decoded, or where the options have masks for mel bins and the backbone
        reads samples.
        """
        wanted = wanted_inputs(backbone)
        features = options.features
        if features == "auto":
            features = wanted.get("features", "mel")
        if features == "wave":
            stated = {name: getattr(options, name) for name in options.model_fields_set}
            if problem := _ineffective_masks(stated):
                raise ValueError(problem)
            normalize = options.normalize
            if normalize is None:
                normalize = wanted.get("normalize", True)
            return {"features": "wave", "normalize": normalize}
        modality, bad, seconds = cls(options, {"features": "mel"}), [], 0.0
        count = 0
        sums = torch.zeros(options.mels, dtype=torch.float64)
        squares = torch.zeros(options.mels, dtype=torch.float64)
        # rows from all over the sample, until FIT_SECONDS are read
        for i in np.random.default_rng(0).permutation(len(table)):
            arrays, reasons = modality.decode(table.slice(i, 1), columns)
            bad += reasons
            for row in arrays["audio"][[not reason for reason in reasons]]:
                mel = spectrogram.log_mel(
                    spectrogram.floats(torch.from_numpy(row)[None]),
                    options.rate,
                    modality.window,
                    modality.hop,
                    options.mels,
                )[0].double()
                count = count + len(mel)
                sums = sums + mel.sum(0)
                squares = squares + (mel**2).sum(0)
                seconds += len(row) / options.rate
            if seconds >= FIT_SECONDS:
                break
        if not count:
            raise ValueError(
                f"column {columns['audio']}: none of {len(bad)} recordings can be decoded: "
                f"{bad[0] if bad else 'no rows'}"
            )
        mean = sums / count
        std = (squares / count - mean**2).clamp(min=MIN_STD**2).sqrt()
        return {
            "features": "mel",
            "mean": [round(value, 5) for value in mean.tolist()],
            "std": [round(value, 5) for value in std.tolist()],
        }

    def required_type(self, role, kind) -> str:
        if role == "audio":
            return (
                ""
                if holds_files(kind)
                else "recordings: their files' bytes (binary), their paths (string), or structs "
                "of bytes and path"
            )
        return "" if is_number(kind) else "seconds, a number without leading zeros"

    def inputs(self) -> AudioInputs:
        if self.features == "wave":
            wave: AudioInputs = {
                "features": "wave",
                "rate": self.options.rate,
                "channels": 1,
                "convolutions": [],
            }
            if self._normalizes():
                wave["scale"] = "variance 1"
            return wave
        return {
            "features": "mel",
            "rate": self.options.rate,
            "channels": self.options.mels,
            "convolutions": [list(one) for one in self._convolutions()],
        }

    def _normalizes(self) -> bool:
        return (
            self.state.get("normalize", True)
            if self.options.normalize is None
            else self.options.normalize
        )

    def _convolutions(self) -> tuple[tuple[int, int, int], ...]:
        return ((self.window, self.hop, 0),) if self.features == "mel" else ()

    # ------------------------------------------------------------ in the data workers

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        samples = [NO_SOUND] * len(table)
        bad = [""] * len(table)
        uncut = {"start", "seconds"} <= columns.keys()
        for i, value, start, seconds in _rows(table, columns):
            try:
                samples[i] = self._samples(value, start, seconds, uncut)
            except ValueError as error:  # BrokenAudioError is one
                bad[i] = (str(error).splitlines() or [type(error).__name__])[0][:300]
        return {"audio": ragged(samples)}, bad

    def _samples(self, value: Any, start: Any, seconds: Any, uncut: bool) -> np.ndarray:
        """Decode one row to (n,) int16. Raises ValueError with the reason why it cannot be decoded.

        ``uncut``: rows come from a folder whose long recordings are cut into pieces, so a long row
        without ``start`` is a broken file.
        """
        begin, length = _number(start, "start"), _number(seconds, "seconds")
        rate, most = self.options.rate, self.options.max_seconds
        with _sound(value, whole=not begin) as file:
            try:
                samples, own = audio_io.decode(
                    file, begin or 0.0, None if begin is None else length, most, rate
                )
            except LongAudioError as error:
                if uncut and begin is None:
                    # reads the whole file, and raises the reason where it is broken
                    audio_io.pieces(file, None, max(1.0, most))
                raise ValueError(
                    f"{error}: cut long recordings (a folder read as format: audio is cut at "
                    "silence, and start and seconds name a piece), or raise the modality's "
                    "max_seconds"
                ) from None
        if own != rate:
            samples = audio_io.resample(samples, own, rate)
        if len(samples) < self.window:
            raise ValueError(
                f"{len(samples) / rate:g} s, shorter than one window of {self.options.window:g} s"
            )
        return samples if samples.dtype == np.int16 else audio_io.pcm(samples)

    @classmethod
    def near_signatures(cls, table, columns):
        """Return the perceptual hashes of the log-mel spectrograms, as pictures of one size.

        Zeros for what is not a recording. The loudness does not count.
        """
        side = perceptual_hash.SIDE
        options = AudioOptions.model_validate(
            {"rate": NEAR_RATE, "mels": side, "max_seconds": 3600.0}
        )
        modality = cls(options, {})
        sounds, reasons = modality.decode(table, columns)
        pictures = np.zeros((len(table), side, side), dtype=np.uint8)
        for i in np.flatnonzero([not reason for reason in reasons]):
            samples = spectrogram.floats(torch.from_numpy(sounds["audio"][i]))[None]
            mel = spectrogram.log_mel(samples, NEAR_RATE, modality.window, modality.hop, side)
            decibels = 10 / math.log(10) * mel.transpose(1, 2)
            picture = F.adaptive_avg_pool1d(decibels, side)[0]
            above = 1 + (picture - picture.max()) / NEAR_DECIBELS
            pictures[i] = (255 * above.clamp(min=0)).round().byte().numpy()
        return perceptual_hash.signatures(pictures)

    def costs(self, table, columns) -> np.ndarray:
        """Return (B,) float64 seconds of each row.

        From the column ``seconds`` where it has a number, else from the file's header; 0 where
        neither can be read, or ``columns`` has no role ``audio``.
        """
        column = columns.get("seconds")
        out = (
            np.zeros(len(table))
            if column not in table.column_names
            else pc.cast(table[column], pa.float64()).to_numpy()
        )
        known = np.isfinite(out) & (out > 0)
        out = np.where(known, out, 0.0)
        if "audio" in columns and not known.all():
            unknown = np.flatnonzero(~known)
            values = table[columns["audio"]]
            starts = _times(table, columns, "start")
            # in threads, since files may lie on slow servers
            out[unknown] = list(
                threaded_map(lambda i: self._measured(values[i], starts[i]), unknown.tolist())
            )
        return out

    def _measured(self, cell: pa.Scalar, start: Any) -> float:
        try:
            with _sound(cell.as_py(), whole=False) as file:
                return max(0.0, audio_io.inspect(file).seconds - (_number(start, "start") or 0.0))
        except ValueError:  # decode tells what is wrong
            return 0.0

    # ------------------------------------------------------------ on the device

    def random_rows(self, rows, rng, length=1.0):
        """Return noise of one length: some published models give other numbers on padded rows."""
        files: list[bytes] = []
        for _ in range(rows):
            sink = io.BytesIO()
            count = int(length * RANDOM_SECONDS * self.options.rate)
            samples = (0.2 * rng.standard_normal(count)).clip(-1, 1)
            soundfile.write(sink, samples, self.options.rate, "PCM_16", format="WAV")
            files.append(sink.getvalue())
        return self.collate(self.decode(pa.table({"audio": files}), {"audio": "audio"})[0])

    def preparation_code(self) -> str:
        """Return code that makes samples or log-mels of a file (`PreparesInputs`)."""
        options = self.options
        code = PREPARATION.format(rate=options.rate)
        if self.features == "wave":
            normalize = NORMALIZE.format(epsilon=spectrogram.EPSILON)
            code += PREPARED_WAVE.lstrip().format(normalize=normalize if self._normalizes() else "")
        else:
            size = spectrogram.fft_size(self.window)
            left = (size - self.window) // 2
            code += PREPARED_MEL.format(
                rate=options.rate,
                size=size,
                window=self.window,
                hop=self.hop,
                mels=options.mels,
                left=left,
                right=size - self.window - left,
                floor=spectrogram.FLOOR,
            )
        return code + PREPARED_INPUTS.lstrip()

    throughput_unit = "s of sound"

    def throughput(self, batch: Batch) -> float:
        """Return the seconds of the recordings, without padding."""
        return float(batch["audio_lengths"].sum()) / self.options.rate

    def augment(self, batch: Batch) -> Batch:
        """Change speed, add noise and, for mel features, apply SpecAugment, filling masks with the
        mean.
        """
        options, lengths = self.options, batch["audio_lengths"]
        x = spectrogram.floats(batch["audio"])
        if options.speed:
            x, lengths = self._change_speed(x, lengths, uniform(batch.keys, 1, SPEED)[:, 0])
        if options.noise:
            x = self._add_noise(x, lengths, batch.keys)
        batch = self._compute_features(batch, x, lengths)
        return self._apply_masks(batch) if self.features == "mel" else batch

    def _change_speed(self, x: Tensor, lengths: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Play each row at one of three speeds.

        A row keeps its speed if it would become shorter than a window or longer than
        ``max_seconds``.
        """
        percents = torch.tensor(
            [
                round(100 * (1 + change))
                for change in (-self.options.speed, 0.0, self.options.speed)
            ],
            device=x.device,
        )

        def new_lengths(chosen: Tensor) -> Tensor:
            return -(-lengths * 100 // chosen)  # rounded up

        chosen = percents[(u * 3).long()]
        is_too_short = lengths * 100 < self.window * percents[-1]
        is_too_long = new_lengths(chosen) > int(self.options.max_seconds * self.options.rate)
        chosen = torch.where(is_too_short | is_too_long, percents[1], chosen)
        new = new_lengths(chosen)
        out = x.new_zeros((len(x), max(1, int(new.max()))))
        for percent in chosen.unique().tolist():
            rows = (chosen == percent).nonzero()[:, 0]
            part, _ = spectrogram.speed(
                x[rows, : int(lengths[rows].max())],
                lengths[rows],
                percent,
            )
            out[rows, : part.shape[1]] = part
        return out, new

    def _add_noise(self, x: Tensor, lengths: Tensor, keys: Tensor) -> Tensor:
        """Add uniform white noise to a share of the rows."""
        u = uniform(keys, 2, NOISE)
        rows = (u[:, 0] < self.options.noise).nonzero()[:, 0]
        if not len(rows):
            return x
        low, high = self.options.noise_snr
        noise = uniform(keys[rows], x.shape[1], WHITE) - 0.5
        decibels = low + (high - low) * u[rows, 1]
        noisy = spectrogram.noisy(x[rows], lengths[rows], noise, decibels)
        return x.index_copy(0, rows, noisy)

    def _apply_masks(self, batch: Batch) -> Batch:
        options, mel, mask = self.options, batch["mel"], batch["mask"]
        number = options.frequency_masks + options.time_masks
        if not number:
            return batch
        u = uniform(batch.keys, 2 * number, MASKS).view(len(batch), number, 2)
        counts = mask.sum(1)
        bins = torch.full_like(counts, options.mels)
        frequency = spectrogram.bands(
            u[:, : options.frequency_masks],
            bins,
            options.mels,
            (bins * options.frequency_width).floor(),
        )
        longest = torch.full_like(counts, round(options.time_width / options.hop))
        time = spectrogram.bands(
            u[:, options.frequency_masks :],
            counts,
            mel.shape[1],
            torch.minimum((counts * options.time_share).floor(), longest),
        )
        return batch.replace(mel=mel.masked_fill(frequency[:, None] | time[..., None], 0.0))

    def finish(self, batch: Batch) -> Batch:
        """Compute the features, unless ``augment`` has done so."""
        return (
            self._compute_features(
                batch, spectrogram.floats(batch["audio"]), batch["audio_lengths"]
            )
            if "audio" in batch.data
            else batch
        )

    def _compute_features(self, batch: Batch, x: Tensor, lengths: Tensor) -> Batch:
        if self.features == "wave":
            x = F.pad(x, (0, max(0, self.window - x.shape[1])))  # rows of no samples alone
            mask = spectrogram.within(lengths, x.shape[1])
            features = {
                "wave": spectrogram.standardized(x, lengths) if self._normalizes() else x,
                "mask": mask,
            }
        else:
            mel = spectrogram.log_mel(
                x, self.options.rate, self.window, self.hop, self.options.mels
            )
            mask = spectrogram.within(
                conv_arithmetic.count(lengths, self._convolutions()), mel.shape[1]
            )
            assert "mean" in self.state and "std" in self.state
            mean, std = (
                torch.tensor(levels, device=x.device)
                for levels in (self.state["mean"], self.state["std"])
            )
            features = {
                "mel": ((mel - mean) / std).masked_fill(~mask[..., None], 0.0),
                "mask": mask,
            }
        kept = {name: tensor for name, tensor in batch.data.items() if name != "audio"}
        return Batch(
            batch.rows, batch.keys, {**kept, "audio_lengths": lengths, **features}, batch.shards
        )


# ---------------------------------------------------------------- columns


def _ineffective_masks(stated: Mapping[str, Any]) -> str:
    """Describe an option of SpecAugment that recordings read as samples would ignore; "" for none.

    Masks may be switched off (0).
    """
    for name in MASK_OPTIONS:
        if stated.get(name):
            return (
                f"{name} {stated[name]} has no effect where the backbone reads samples (features: "
                "wave), as SpecAugment masks mel bins: leave it out"
            )
    return ""


def _rows(table: pa.Table, columns: dict[str, str]) -> Iterator[tuple[int, Any, Any, Any]]:
    """Yield (place, audio, start, seconds) of each row as Python values, None without such a
    column.
    """
    start, seconds = (_times(table, columns, role) for role in ("start", "seconds"))
    for i, value in enumerate(table[columns["audio"]]):
        yield i, value.as_py(), start[i], seconds[i]


def _times(table: pa.Table, columns: dict[str, str], role: str) -> list[Any]:
    return (
        table[columns[role]].to_pylist()
        if columns.get(role) in table.column_names
        else [None] * len(table)
    )


def _number(value: Any, role: str) -> float | None:
    """Return the seconds in a cell, None for null and for NaN, which pandas writes for null.

    Raises ValueError for a value that is not a time.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise ValueError(f"{role}: {value!r} is not a time in seconds")
    return float(value)


@contextmanager
def _sound(value: Any, whole: bool) -> Iterator[bytes | BinaryIO]:
    """Open a recording: its bytes, or the open file behind a path, of which parts are read by
    ranges.

    A cell may hold bytes, a path, or the struct of both of a Hugging Face data set. Raises
    BrokenAudioError for an empty cell and for any other type.
    """
    if isinstance(value, dict):
        if not {"bytes", "path"} & {*value}:
            raise BrokenAudioError(
                f"a struct of {', '.join(value)} is not a file: structs of bytes and path are "
                "read, as of Hugging Face's Audio(decode=False)"
            )
        value = value.get("bytes") or value.get("path")
    if value is not None and not isinstance(value, (bytes, str)):
        raise BrokenAudioError(
            f"a value of type {type(value).__name__} is not a recording: files' bytes, their "
            "paths or structs of both are read"
        )
    if not value:
        raise BrokenAudioError(
            "the audio is empty (0 bytes)" if value is not None else "the audio is null"
        )
    if not isinstance(value, str):
        yield value
        return
    with storage.open_read(value) as file:
        small = whole and file.seek(0, io.SEEK_END) <= WHOLE_FILE_BYTES
        file.seek(0)
        yield file.read() if small else file
