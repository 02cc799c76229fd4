"""Sound files to mono samples and back: WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF and whatever else
libsndfile reads, at any rate and with any number of channels.

Channels are averaged. libsndfile accepts fewer samples than the header promises, and treats a
failed read as the end of the file. Both are checked here: a truncated file raises BrokenAudioError,
and an I/O error is raised as such.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile

from pipeline.media import audio_header

RATES = (1000, 1_000_000)
"""Samples a second that a recording may have. The rate of a broken header could need a resampling
filter of any size.
"""
MAX_DENOMINATOR = 1000
"""Largest denominator of the ratio of two rates. Where the exact one is larger (22,255 Hz of old
Macintoshes), the nearest ratio is used, which is at most 0.001 % off.
"""
KINDS = {
    b"RIFF": "WAV",
    b"RF64": "WAV",
    b"fLaC": "FLAC",
    b"OggS": "OGG",
    b"FORM": "AIFF",
    b"riff": "W64",
    b"caff": "CAF",
    b".snd": "AU",
    b"NIST": "SPHERE",
}
"""First bytes of each kind of file."""
FLAC_LENGTH = slice(21, 26)
"""Where a FLAC file holds its number of samples, in 36 bits (RFC 9639, section 8.2)."""
KNOWN_BYTES = 1 << 16
"""A FLAC file whose samples were counted is recognised by its size and this many bytes of its
beginning and end.
"""
_counted: dict[bytes, bytes] = {}
"""The bytes at FLAC_LENGTH of files whose samples were counted, by the hash of these."""
OVERHANG_SECONDS = 0.1
"""A piece may end this far after its recording: manifests round their seconds."""
HOP_SECONDS, QUIET_SECONDS = 0.02, 0.2
"""``pieces`` looks at every 0.02 s for the quietest 0.2 s."""
BLOCK_HOPS = 3000
"""Hops that are read at a time: a minute."""
MAX_ENERGY = 1e6
"""Energies are clipped to this: sums with larger ones would lose what is quiet. Full scale has at
most 1.
"""
UP_TO_16_BITS = {"PCM_16", "PCM_S8", "PCM_U8"}
"""Subtypes of up to 16 bits a sample."""
FULL_SCALE = {
    "ULAW": 32124 / 32768,
    "ALAW": 32256 / 32768,
    "PCM_U8": 127 / 128,
    "PCM_S8": 127 / 128,
}
"""Largest sample of a subtype where it is below 0.9999: 32767 of 32768 is 0.99997."""
MIN_MEAN_ENERGY = 0.02
"""Below this the channels cancel each other. It is n times the energy of the mean of n channels,
divided by the mean energy of a channel: n for equal channels, 1 for unrelated ones, 0 for two of
which one is the other inverted.
"""
SMALLEST_STEP = 1 / 32768
"""Of samples of 16 bits. Below it there is no sound that could be cancelled."""
MAX_PEAK = 16.0
"""Times full scale that samples of a floating-point file may reach. Beyond it the file is probably
in integer scale (32768 is full there) and nearly all of it would be clipped.
"""
Sound = bytes | BinaryIO


class BrokenAudioError(ValueError):
    """The bytes are not a sound file, or not a whole one."""


class LongAudioError(BrokenAudioError):
    """A recording is longer than was asked for."""


@dataclass(frozen=True)
class RecordingInfo:
    """The header of a sound file.

    ``rate`` in samples a second, ``frames`` (samples of each channel), ``seconds``, and
    libsndfile's names of the format and the type of its samples (WAV and PCM_24, OGG and VORBIS).
    """

    rate: int
    channels: int
    frames: int
    format: str
    subtype: str

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


class _CheckedFile:
    """A file for libsndfile, whose callbacks cannot raise.

    An error is kept, reads return nothing from then on, and ``check`` raises it. It seeks only when
    it reads, so that finding the size does not cost a buffered file on S3 its buffer. ``length``
    replaces the bytes at FLAC_LENGTH, if given.
    """

    def __init__(self, data: Sound):
        self._file = io.BytesIO(data) if isinstance(data, bytes) else data
        self._at, self.size = 0, self._file.seek(0, io.SEEK_END)
        self.length = b""
        self._error: BaseException | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        at, count = self._at, 0
        try:
            if self._error is None and 0 <= at < self.size:  # a damaged header leads anywhere
                self._file.seek(at)
                # every binary file has it
                count = self._file.readinto(buffer)  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException as error:
            # of any kind: cffi would print it and go on; ``check`` raises it later
            self._error = error
        for place, byte in enumerate(self.length, FLAC_LENGTH.start):
            if at <= place < at + count:
                buffer[place - at : place - at + 1] = bytes([byte])
        self._at += count
        return count


class _Forward(soundfile.SoundFile):
    """A file that is read to its end only, since soundfile seeks after every read of a seekable
    one.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def opened(data: Sound | _CheckedFile) -> Iterator[soundfile.SoundFile]:
    """Open a sound file for reading.

    Raises BrokenAudioError for bytes that are not sound, also while reading; I/O errors unchanged.
    """
    file = data if isinstance(data, _CheckedFile) else _CheckedFile(data)
    file.length = file.length or _flac_length(file)
    file.seek(0)
    try:
        # soundfile calls only these methods of a file
        with soundfile.SoundFile(file) as sound:  # pyright: ignore[reportArgumentType]
            if not RATES[0] <= sound.samplerate <= RATES[1]:
                raise BrokenAudioError(
                    f"its header says {sound.samplerate} samples a second; between {RATES[0]} "
                    f"and {RATES[1]} are read"
                )
            yield sound
    except soundfile.LibsndfileError as error:
        file.check()
        raise BrokenAudioError(_explain_error(file, error)) from None
    except BrokenAudioError:
        file.check()  # an I/O error is the cause: the file itself may be whole
        raise
    file.check()


def _explain_error(file: _CheckedFile, error: soundfile.LibsndfileError) -> str:
    file.seek(0)
    start = file.read(12)
    if not start:
        return "the file is empty (0 bytes)"
    kind = KINDS.get(start[:4], "MP3" if start[:3] == b"ID3" else "")
    message = error.error_string.strip().rstrip(".")
    return (
        f"broken {kind} file, cut off or without samples ({message})"
        if kind
        else f"no sound file that libsndfile reads ({message}); convert M4A, AAC, WMA and video: "
        "ffmpeg -i in.m4a -vn out.flac"
    )


def _flac_length(file: _CheckedFile) -> bytes:
    """Return what the bytes at FLAC_LENGTH should be where the file does not say its length.

    A writer into a pipe does not know it, and libsndfile cannot seek in such a file. The samples
    are counted once in a process, for all pieces of the recording. Other files give b"".
    """
    file.seek(0)
    start = file.read(FLAC_LENGTH.stop)
    if start[:4] != b"fLaC" or len(start) < FLAC_LENGTH.stop:
        return b""
    if start[21] & 15 or any(start[22:]):  # it says its length
        return b""
    ends = hashlib.sha256(f"{file.size} ".encode())
    for at in (0, max(0, file.size - KNOWN_BYTES)):
        file.seek(at)
        ends.update(file.read(KNOWN_BYTES))
    if ends.digest() not in _counted:
        file.seek(0)
        _counted[ends.digest()] = _count(file, start)
    return _counted[ends.digest()]


def _count(file: _CheckedFile, start: bytes) -> bytes:
    frames = 0
    try:
        with _Forward(file) as sound:  # pyright: ignore[reportArgumentType] - as in ``opened``
            while count := len(sound.read(1 << 20, dtype="int16", always_2d=True)):
                frames += count
    except soundfile.LibsndfileError as error:
        file.check()
        raise BrokenAudioError(_explain_error(file, error)) from None
    file.check()
    return bytes([start[21] | frames >> 32]) + struct.pack(">I", frames & 0xFFFFFFFF)


def _frames(sound: soundfile.SoundFile) -> int:
    if not 0 < sound.frames < 1 << 60:
        raise BrokenAudioError("no samples")
    return sound.frames


def _header_length_ratio(file: _CheckedFile) -> float:
    """Return ``audio_header.length_ratio`` of a file.

    Raises BrokenAudioError for MP3 of unknown length, and for OGG of several recordings.
    """
    if audio_header.is_joined(file):
        raise BrokenAudioError(
            "several recordings joined in one OGG file, of which only the first would be read; "
            "write them as one: ffmpeg -i in.ogg out.flac"
        )
    if audio_header.has_unknown_length(file):
        raise BrokenAudioError(
            "MP3 of a varying bit rate without a table of its length, so that its end would be "
            "lost; write it again: ffmpeg -i in.mp3 -c copy out.mp3"
        )
    return audio_header.length_ratio(file)


def _check_length(ratio: float, rate: int, frames: int) -> None:
    if ratio == np.inf:
        raise BrokenAudioError(
            f"the file ends without OGG's last page, after {frames / rate:.2f} s of sound: it was "
            "cut off, or its writer was stopped (to take it as it is: ffmpeg -i in.ogg -c copy "
            "out.ogg)"
        )
    if round(frames * ratio) > frames:
        raise BrokenAudioError(_truncated_message(frames / rate, frames * ratio / rate))


def _truncated_message(seconds: float, promised: float) -> str:
    return f"{seconds:.2f} s of sound, its header promises {promised:.2f} s: the file was cut off"


def inspect(data: Sound) -> RecordingInfo:
    """Read the header of a sound file.

    Raises:
        BrokenAudioError: not a sound file; no samples, or fewer than the header promises where that
            shows without decoding (not for FLAC and MP3); MP3 of unknown length; OGG of several
            recordings.
    """
    file = _CheckedFile(data)
    ratio = _header_length_ratio(file)
    with opened(file) as sound:
        info = RecordingInfo(
            sound.samplerate, sound.channels, _frames(sound), sound.format, sound.subtype
        )
        _check_length(ratio, info.rate, info.frames)
    return info


def decode(
    data: Sound,
    start: float = 0.0,
    seconds: float | None = None,
    max_seconds: float | None = None,
    sixteen_at: int | None = None,
) -> tuple[np.ndarray, int]:
    """Decode a recording, or ``seconds`` of it from ``start`` (seconds) on.

    Returns:
        (n,) float32 mono samples from -1 to 1 (floating-point files may hold more), and their rate.
        Mono files of up to 16 bits at the rate ``sixteen_at`` give int16, as ``pcm`` makes of their
        floats.

    Raises:
        BrokenAudioError: not a sound file, no samples, fewer samples than the header promises, a
            piece after the recording's end, samples that are not finite or above 16 times full
            scale, channels that cancel each other.
        LongAudioError: more than ``max_seconds``; raised before they are read.
    """
    _, samples, rate, _ = _read(data, start, seconds, max_seconds, sixteen_at)
    return samples, rate


def measure(
    data: Sound, start: float = 0.0, seconds: float | None = None
) -> tuple[np.ndarray, int, float, float]:
    """Decode as ``decode``, and also return the ``level`` of the channels that were averaged."""
    channels, samples, rate, subtype = _read(data, start, seconds, None)
    return samples, rate, *level(channels, subtype)


def _read(
    data: Sound,
    start: float,
    seconds: float | None,
    max_seconds: float | None,
    sixteen_at: int | None = None,
) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Return (samples (n, channels), their mean (n,), rate, subtype)."""
    file = _CheckedFile(data)
    # of a later piece only the piece itself is checked: the file was when it was cut
    ratio = _header_length_ratio(file) if start == 0 else 1.0
    with opened(file) as sound:
        rate, frames, subtype = sound.samplerate, _frames(sound), sound.subtype
        _check_length(ratio, rate, frames)
        first, count = _frame_range(rate, frames, start, seconds)
        if max_seconds is not None and count > max_seconds * rate:
            raise LongAudioError(f"{count / rate:.2f} s long, more than {max_seconds:g} s")
        if first:
            sound.seek(first)
        channels = sound.read(
            count,
            dtype="int16"
            if rate == sixteen_at and sound.channels == 1 and subtype in UP_TO_16_BITS
            else "float32",
            always_2d=True,
        )
        if len(channels) < count:
            raise BrokenAudioError(
                _truncated_message((first + len(channels)) / rate, frames / rate)
            )
    samples = channels[:, 0] if channels.shape[1] == 1 else channels.mean(1)
    if samples.dtype == np.int16:
        return channels, samples, rate, subtype
    finite = np.isfinite(samples)
    if not finite.all():
        raise BrokenAudioError(
            f"{count - int(finite.sum())} of {count} samples are not numbers (NaN or infinite), "
            f"the first at {(first + int(finite.argmin())) / rate:.3f} s"
        )
    peak = float(max(channels.max(), -channels.min()))
    if peak > MAX_PEAK:
        raise BrokenAudioError(
            f"its samples are floating-point numbers up to {peak:g}, where full scale is 1: they "
            "are in integer scale; divide them by what is full there (ffmpeg -i in.wav -af "
            "volume=1/32768 out.wav)"
        )
    if channels.shape[1] > 1:
        sound = channels - channels.mean(0)  # without the offset of a converter
        energy = np.square(sound).mean()
        least = MIN_MEAN_ENERGY * energy / channels.shape[1]
        is_audible = energy > SMALLEST_STEP**2
        if is_audible and np.square(sound.mean(1)).mean() < least:
            raise BrokenAudioError(
                "its channels cancel each other in their mean, as where one is the other inverted: "
                "keep one of them (ffmpeg -i in.wav -af pan='mono|c0=c0' out.wav)"
            )
    return channels, samples, rate, subtype


def _frame_range(rate: int, frames: int, start: float, seconds: float | None) -> tuple[int, int]:
    """Return (first sample, number of samples) of a piece. Raises BrokenAudioError where it lies
    outside.
    """
    first = round(start * rate)
    count = frames - first if seconds is None else round(seconds * rate)
    if (
        start < 0
        or count <= 0
        or first + count > frames + OVERHANG_SECONDS * rate
        or first >= frames
    ):
        raise BrokenAudioError(
            f"a piece from {start:g} s on{'' if seconds is None else f', {seconds:g} s long,'} "
            f"of a recording of {frames / rate:.2f} s"
        )
    return first, min(count, frames - first)


@lru_cache(32)
def _resampler(rate: int, to: int) -> Any:
    from torchaudio.transforms import Resample  # not at the top: headers are read without torch

    if not all(RATES[0] <= either <= RATES[1] for either in (rate, to)):
        raise ValueError(
            f"from {rate} to {to} samples a second: both must lie between {RATES[0]} and {RATES[1]}"
        )
    ratio = Fraction(to, rate).limit_denominator(MAX_DENOMINATOR)
    return Resample(ratio.denominator, ratio.numerator)


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Resample to another rate: (n,) float32 to ceil(n * to / rate).

    By torchaudio's windowed sinc (Smith, "Digital audio resampling home page", 2020).
    """
    if rate == to:
        return samples
    import torch

    with torch.inference_mode():
        return _resampler(rate, to)(torch.from_numpy(np.ascontiguousarray(samples))).numpy()


def pcm(samples: np.ndarray) -> np.ndarray:
    """Round floats to int16, where 1 is full scale; exact for samples that came from 16 bits.

    Samples beyond full scale, which floating-point files may hold, are clipped to it, as
    ``soundfile.write`` and ffmpeg clip what they write with 16 bits. ``level`` counts them.
    """
    scaled = samples * np.float32(32768)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def encode(samples: np.ndarray, rate: int) -> bytes:
    """Encode int16 mono samples as a FLAC file."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def level(samples: np.ndarray, subtype: str = "") -> tuple[float, float]:
    """Return the peak (1 is full scale) and the share of clipped samples.

    Args:
        samples: (n,) or (n, channels), int16 or floats. Of several channels the share is that of
            the channel with the most clipped samples.
        subtype: libsndfile's, which says what full scale is; a sample that reaches it is clipped.
    """
    if not len(samples):
        return 0.0, 0.0
    full_scale = 32768 if samples.dtype == np.int16 else 1
    size = np.abs(samples.astype(np.float32) / full_scale)
    is_clipped = size >= FULL_SCALE.get(subtype, 1.0) - 1e-4
    return float(size.max()), float(is_clipped.mean(0).max())


# ---------------------------------------------------------------- pieces


def pieces(
    sound: np.ndarray | Sound,
    rate: int | None,
    max_seconds: float,
    how: Literal["silence", "windows"] = "silence",
    start: float = 0.0,
    seconds: float | None = None,
) -> list[tuple[float, float]]:
    """Cut a recording into pieces of at most ``max_seconds``; one piece where it is shorter.

    Args:
        sound: Samples, or a file, which is read a minute at a time.
        rate: Samples a second of an array; a file has its own.
        max_seconds: Of a piece, at least 1.
        how: "silence": cut where 0.2 s are quietest, in the second half of what a piece may have;
            "windows": cut into as few equal pieces as possible.
        start, seconds: The part of a file to cut.

    Returns:
        (start, stop) in seconds of each piece, each starting where the one before stops.

    Raises:
        BrokenAudioError: as ``decode``.
    """
    if not max_seconds >= 1:
        raise ValueError(f"longest: pieces of at most {max_seconds:g} s; give 1 s or more")
    if isinstance(sound, np.ndarray):
        assert rate is not None, "an array does not know its rate"
        blocks = iter([sound.astype(np.float32)])
        return _cut(blocks, len(sound), rate, max_seconds, how)
    data = _CheckedFile(sound)
    ratio = _header_length_ratio(data)
    with opened(data) as file:
        frames = _frames(file)
        _check_length(ratio, file.samplerate, frames)
        first, count = _frame_range(file.samplerate, frames, start, seconds)
        if first:
            file.seek(first)
        return [
            (start + a, start + b)
            for a, b in _cut(_blocks(file, count), count, file.samplerate, max_seconds, how)
        ]


def _blocks(sound: soundfile.SoundFile, frames: int) -> Iterator[np.ndarray]:
    """Yield blocks of whole hops, except for the last one."""
    while len(
        block := sound.read(
            min(frames, BLOCK_HOPS * _hop(sound.samplerate)), dtype="float32", always_2d=True
        )
    ):
        frames -= len(block)
        yield block.mean(1)


def _hop(rate: int) -> int:
    return max(1, round(HOP_SECONDS * rate))


def _cut(
    blocks: Iterator[np.ndarray], frames: int, rate: int, max_seconds: float, how: str
) -> list[tuple[float, float]]:
    """Return (start, stop) in seconds of each piece."""
    total = frames / rate
    parts = int(np.ceil(total / max_seconds - 1e-9))
    if parts <= 1:
        return [(0.0, total)]
    if how == "windows":
        cuts = [total * i / parts for i in range(1, parts)]
    else:
        cuts = [
            hop * _hop(rate) / rate
            for hop in _quietest_cuts(
                _energies(blocks, frames, rate), total, max_seconds, _hop(rate) / rate
            )
        ]
    return list(zip([0.0, *cuts], [*cuts, total], strict=True))


def _energies(blocks: Iterator[np.ndarray], frames: int, rate: int) -> np.ndarray:
    """Return the mean square of each hop.

    Raises BrokenAudioError where the blocks end too early.
    """
    hop, done, energies = _hop(rate), 0, []
    while done < frames:
        block = next(blocks, np.zeros(0, dtype=np.float32))
        if not len(block):
            raise BrokenAudioError(_truncated_message(done / rate, frames / rate))
        squares = block.astype(np.float64) ** 2
        energies.append(np.add.reduceat(squares, np.arange(0, len(block), hop)) / hop)
        done += len(block)
    return np.minimum(np.nan_to_num(np.concatenate(energies), nan=MAX_ENERGY), MAX_ENERGY)


def _quietest_cuts(energies: np.ndarray, total: float, max_seconds: float, hop: float) -> list[int]:
    """Return the hops at which pieces start.

    A cut is where it is quietest in the second half of the longest possible piece, at the last of
    several such places. At least a quarter of a longest piece is left after the last cut.
    """
    width = round(QUIET_SECONDS / HOP_SECONDS)
    padded = np.pad(energies, width // 2, mode="edge")
    sums = np.cumsum(np.concatenate([[0.0], padded]))
    # over the 0.2 s around the beginning of each hop
    quiet = (sums[width:] - sums[:-width])[: len(energies)]
    quiet = np.maximum(quiet, 1e-9)  # silence is silence, whatever the rounding of sums
    cuts, start = [], 0.0
    while total - start > max_seconds:
        latest = min(max_seconds, total - start - max_seconds / 4)
        first = int(np.ceil((start + max_seconds / 2) / hop))
        last = int(np.floor((start + latest) / hop + 1e-9))
        part = quiet[first : last + 1]
        cuts.append(first + len(part) - 1 - int(np.argmin(part[::-1])))
        start = cuts[-1] * hop
    return cuts
