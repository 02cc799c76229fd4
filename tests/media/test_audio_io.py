"""Sound files as they come: of every kind, cut off, empty, with samples that are no numbers;
resampled, encoded, cut at silence.
"""

import io
import struct
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from scipy import signal
from toys import sound_file as saved

from pipeline.media import audio_header, audio_io
from pipeline.media.audio_io import BrokenAudioError, LongAudioError

RATE = 16000


def tone(
    seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0, amplitude: float = 0.5
) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_24"),
    ("CAF", "PCM_16"),
    ("AU", "PCM_16"),
    ("AU", "ULAW"),
    ("NIST", "PCM_16"),
    ("NIST", "ULAW"),
    ("AIFF", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]
CLOSE = {"PCM_U8": 1.01 / 128, "ULAW": 2e-2, "VORBIS": 3e-2, "OPUS": 3e-2, "MPEG_LAYER_III": 3e-2}


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("seconds", [1.0, 0.5])
@pytest.mark.parametrize(("form", "subtype"), KINDS)
def test_every_kind_decodes_to_its_samples(form, subtype, seconds):
    samples = tone(seconds)
    data = saved(samples, form=form, subtype=subtype)
    found, rate = audio_io.decode(data)
    assert rate == RATE and found.dtype == np.float32 and found.shape == samples.shape
    middle = slice(800, -800)  # lossy codecs ring at the ends
    assert np.abs(found - samples)[middle].max() < CLOSE.get(subtype, 1 / 32768)
    info = audio_io.inspect(data)
    assert (info.rate, info.channels, info.frames, info.seconds) == (
        RATE,
        1,
        len(samples),
        seconds,
    ) and info.subtype == subtype
    assert audio_io.inspect(io.BytesIO(data)) == info


def test_channels_that_cancel_each_other_are_refused():
    """Their mean is silence. Unlike channels, one that is silent and silence are none of these."""
    rng = np.random.default_rng(0)
    one, other = rng.uniform(-0.5, 0.5, (2, 1000))
    for inverted in (-one, -0.98 * one + 0.01 * other):
        with pytest.raises(audio_io.BrokenAudioError, match="channels cancel each other"):
            audio_io.decode(saved(np.stack([one, inverted], axis=1)))
    for fine in (other, 0 * one, one, -0.5 * one):
        assert len(audio_io.decode(saved(np.stack([one, fine], axis=1)))[0]) == 1000
    audio_io.decode(saved(np.zeros((1000, 2))))
    offset = np.array([0.02, -0.02])
    audio_io.decode(saved(np.tile(offset, (1000, 1))))
    audio_io.decode(saved(0.01 * one[:, None] + offset))


def test_channels_are_averaged():
    channels = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 5)).astype(np.float32)
    found, _ = audio_io.decode(saved(channels, subtype="FLOAT"))
    assert (
        np.allclose(found, channels.mean(1), atol=1e-7)
        and audio_io.inspect(saved(channels)).channels == 5
    )


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")],
)
def test_a_piece_is_what_lies_there(form, subtype):
    data = saved(np.random.default_rng(0).normal(0, 0.1, 10 * RATE), form=form, subtype=subtype)
    whole, _ = audio_io.decode(data)
    for start, seconds in ((0.0, 2.0), (3.25, 1.5), (9.5, 0.5), (4.0, None)):
        found, _ = audio_io.decode(data, start, seconds)
        first = round(start * RATE)
        want = whole[first:] if seconds is None else whole[first : first + round(seconds * RATE)]
        assert found.shape == want.shape and np.abs(found - want).max() < 1e-6


def test_a_piece_of_a_long_file_is_read_by_itself():
    class Counting(io.BytesIO):
        count = 0

        def readinto(self, buffer):
            found = super().readinto(buffer)
            self.count += found
            return found

    for form in ("WAV", "FLAC"):
        file = Counting(saved(np.random.default_rng(0).normal(0, 0.1, 300 * RATE), form=form))
        audio_io.decode(file, 200.0, 1.0)
        assert file.count < 200_000 < len(file.getvalue()) / 20


@pytest.mark.parametrize(
    ("start", "seconds", "text"),
    [
        (2.0, None, "a piece from 2 s on of a recording of 1.00 s"),
        (0.5, 1.0, "a piece from 0.5 s on, 1 s long, of a recording of 1.00 s"),
        (-1.0, None, "from -1 s on"),
        (0.0, 0.0, "0 s long"),
        (1.0, None, "from 1 s on"),
    ],
)
def test_a_piece_must_lie_in_its_recording(start, seconds, text):
    with pytest.raises(BrokenAudioError, match=text):
        audio_io.decode(saved(tone()), start, seconds)


def test_a_piece_may_end_a_rounding_behind_the_end():
    assert len(audio_io.decode(saved(tone()), 0.5, 0.55)[0]) == RATE // 2


def test_what_is_too_long_is_not_read(monkeypatch):
    data = saved(tone(10))
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(LongAudioError, match=r"10\.00 s long, more than 9 s"):
        audio_io.decode(data, max_seconds=9)
    monkeypatch.undo()
    assert (
        len(audio_io.decode(data, max_seconds=10)[0]) == 10 * RATE
        and len(audio_io.decode(data, 1.0, 9.0, max_seconds=9)[0]) == 9 * RATE
    )


# ---------------------------------------------------------------- broken files


def refused(data: bytes, text: str) -> None:
    for work in (audio_io.decode, audio_io.inspect):
        with pytest.raises(BrokenAudioError, match=text):
            work(data)


def wav(samples: int, promised: int) -> bytes:
    data = bytearray(saved(tone(samples / RATE)))
    data[40:44] = struct.pack("<I", promised)
    return bytes(data)


def test_no_file_and_no_samples():
    refused(b"", "empty \\(0 bytes\\)")
    advice = "no sound file that libsndfile reads .*; convert M4A, .*ffmpeg -i in.m4a"
    refused(b"no sound" * 100, advice)
    refused(b"\0\0\0\x20ftypM4A " + bytes(100), advice)
    refused(saved(tone()[:0]), "no samples")
    refused(saved(tone(), form="FLAC")[:30], "broken FLAC file, cut off or without samples")
    refused(saved(tone())[:30], "broken WAV file")


def test_a_header_that_promises_more_samples_than_there_are():
    refused(
        wav(RATE, 2 * RATE * 10),
        r"1\.00 s of sound, its header promises 10\.00 s: the file was cut off",
    )
    assert len(audio_io.decode(wav(RATE, 2 * RATE))[0]) == RATE
    little = (
        struct.pack("<4s5I", b"dns.", 24, 4 * RATE, 3, RATE, 1)
        + (tone() * 32767).astype("<i2").tobytes()
    )
    refused(little, r"1\.00 s of sound, its header promises 2\.00 s")
    aiff = saved(tone(2), form="AIFF")
    refused(aiff[: -2 * RATE], r"1\.00 s of sound, its header promises 2\.00 s")


def test_a_writer_into_a_pipe_does_not_know_the_length():
    for unknown in (0xFFFFFFFF, 0x7FFFF000):
        assert len(audio_io.decode(wav(RATE, unknown))[0]) == RATE
    for form, at, unknown in (
        ("AU", 8, b"\xff" * 4),
        ("CAF", saved(tone(), form="CAF").index(b"data") + 4, b"\xff" * 8),
    ):
        data = bytearray(saved(tone(), form=form))
        data[at : at + len(unknown)] = unknown
        assert audio_header.length_ratio(io.BytesIO(data)) == 1
    assert len(audio_io.decode(bytes(data[:at]) + saved(tone(), form="CAF")[at:])[0]) == RATE
    flac = bytearray(saved(tone(3), form="FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    assert audio_io.inspect(bytes(flac)).frames == 3 * RATE
    assert np.array_equal(
        audio_io.decode(bytes(flac))[0], audio_io.decode(saved(tone(3), form="FLAC"))[0]
    )


@pytest.mark.parametrize(
    ("form", "subtype", "kept"),
    [
        *(
            (form, subtype, kept)
            for form, subtype in KINDS
            if form != "MP3"
            for kept in (0.5, 0.9, 0.999)
        ),
        ("MP3", "MPEG_LAYER_III", 0.5),
    ],
)
def test_a_file_that_was_cut_off_is_reported(form, subtype, kept):
    data = saved(
        np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32),
        form=form,
        subtype=subtype,
    )
    with pytest.raises(BrokenAudioError, match="cut off"):
        audio_io.decode(data[: int(kept * len(data))])


@pytest.mark.parametrize(
    ("was", "now", "times"),
    [
        ("", "", 2),
        ("pcm", "pcm,embedded-shorten-v2.00", 1),
        ("   1024", "   none", 1),
        ("   1024", "9999999", 1),
        ("   1024", "     -9", 1),
        ("i 1000", "i many", 1),
        ("sample_count", "count", 1),
        ("channel_count -i 1", "channel_count -i 2", 4),
        ("channel_count -i 1\n", "", 2),
        ("n_bytes -i 2", "n_bytes", 1),
    ],
)
def test_what_a_sphere_header_promises(was, now, times):
    """Nothing, where it makes no sense, and of samples that shorten compressed."""
    head = (
        "NIST_1A\n   1024\nchannel_count -i 1\nsample_count -i 1000\nsample_n_bytes -i "
        "2\nsample_coding -s3 pcm\nend_head\n"
    )
    assert (
        audio_header.length_ratio(
            io.BytesIO(head.replace(was, now).encode().ljust(1024) + bytes(1000))
        )
        == times
    )


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"RI",
        b"RIFF",
        b"RIFF" + bytes(1 << 20),
        b"FORM1234AIFF",
        b"riff" + bytes(500),
        b"caff" + bytes(300),
        b".snd" + b"\xff" * 9,
        b".snd",
        b"NIST",
        b"NIST_1A\n",
        b"OggS",
        b"ID3",
        b"ID3\4\0\0\x7f\x7f\x7f\x7f",
        b"\xff\xf3\x88",
        b"\xff\xfb",
    ],
)
def test_scraps_promise_nothing(start):
    assert audio_header.length_ratio(io.BytesIO(start)) in (
        1,
        float("inf"),
    ) and not audio_header.has_unknown_length(io.BytesIO(start))
    refused(start, "empty|broken|no sound file")


def test_a_varying_rate_of_mp3_without_a_table_is_refused():
    """libsndfile takes the file's size by its first frame's rate for its length: 20 s become 48 s,
    40 s 14 s.
    """
    samples = np.concatenate(
        [np.zeros(10 * RATE), np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE)]
    ).astype(np.float32)
    out = {mode: io.BytesIO() for mode in ("VARIABLE", "CONSTANT")}
    for mode, file in out.items():
        soundfile.write(file, samples, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    for tag in (b"", b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128)):
        varying, constant = (tag + file.getvalue() for file in out.values())
        assert len(audio_io.decode(varying)[0]) == len(audio_io.decode(constant)[0]) == 20 * RATE
        # Without the first frame, which is the table
        bare, even = (
            tag + file.getvalue()[file.getvalue().index(b"\xff\xf3", 100) :]
            for file in out.values()
        )
        refused(
            bare, "varying bit rate without a table of its length.*ffmpeg -i in.mp3 -c copy out.mp3"
        )
        with pytest.raises(BrokenAudioError, match="varying bit rate"):
            audio_io.pieces(bare, None, 5.0)
        assert audio_io.inspect(even).seconds == pytest.approx(20, abs=0.2)
        # A table that does not say how many frames there are
        holed = varying.replace(b"Xing\0\0\0\x0f", b"Xing\0\0\0\x0e")
        assert holed != varying
        refused(holed, "varying bit rate")


def ogg_pages(data: bytes) -> list[bytes]:
    out, at = [], 0
    while at < len(data):
        stop = at + 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        out.append(data[at:stop])
        at = stop
    return out


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_recordings_joined_in_one_ogg_file_are_reported(subtype):
    """libsndfile reads the first one, without a word."""
    one, two = (saved(tone(seconds), form="OGG", subtype=subtype) for seconds in (1.0, 2.0))
    assert one[14:18] != two[14:18], "serial numbers"
    for data in (one + two, two + one, one + one + two, one + two[:-10]):
        refused(data, "several recordings joined in one OGG file")
        with pytest.raises(BrokenAudioError, match="several recordings joined"):
            audio_io.pieces(data, None, 1.0)
    refused(two[: len(two) // 2] + bytes(1 << 17), "cut off")  # room that a download has not filled


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_streams_side_by_side_in_an_ogg_file_are_no_joined_recordings(subtype):
    """All of them begin before the sound; whichever ends last. (The other stream's checksums are
    wrong, so that libsndfile passes over it.)
    """
    first, *pages = ogg_pages(saved(tone(), form="OGG", subtype=subtype))
    begin, end = (
        b"OggS\0" + bytes([flag]) + bytes(8) + b"text" + bytes(8) + b"\1\4abcd" for flag in (2, 4)
    )
    assert len(audio_io.decode(b"".join([first, begin, *pages, end]))[0]) == RATE
    refused(b"".join([first, *pages, end]), "several recordings joined")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_cut_between_pages_is_reported(subtype):
    """All of its pages are whole; that none says it is the last tells."""
    pages = ogg_pages(
        saved(np.random.default_rng(0).uniform(-0.5, 0.5, 5 * RATE), form="OGG", subtype=subtype)
    )
    assert len(pages) > 5 and [page[5] & 4 for page in pages] == [0] * (len(pages) - 1) + [4]
    for kept in (len(pages) - 1, len(pages) - 2):
        data = b"".join(pages[:kept])
        refused(
            data,
            r"ends without OGG's last page, after \d\.\d\d s of sound: it was cut off, or its "
            r"writer was stopped",
        )
        with pytest.raises(BrokenAudioError, match="ends without OGG's last page"):
            audio_io.pieces(data, None, 1.0)


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 512, 0xFFFFFFF0_00000000])
@pytest.mark.parametrize(("form", "chunk", "behind"), [("RF64", b"ds64", 16), ("W64", b"data", 16)])
def test_a_size_that_leads_before_the_file_is_a_broken_file(form, chunk, behind, size, tmp_path):
    """libsndfile would have it read there: what Python raises then is no I/O error."""
    data = bytearray(saved(tone(), form=form))
    at = data.index(chunk) + behind
    assert struct.unpack_from("<Q", data, at)[0] - 2 * RATE in (0, 24), "the size of its samples"
    data[at : at + 8] = size.to_bytes(8, "little")
    (tmp_path / "a").write_bytes(data)
    refused(bytes(data), "cut off")
    for work in (
        audio_io.decode,
        audio_io.inspect,
        lambda file: audio_io.pieces(file, None, 1.0),
    ):
        with open(tmp_path / "a", "rb") as file, pytest.raises(BrokenAudioError, match="cut off"):
            work(file)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(wrong):
    samples = tone()
    samples[[8000, 9000]] = wrong
    with pytest.raises(
        BrokenAudioError,
        match=r"2 of 16000 samples are not numbers \(NaN or infinite\), the first at 0\.500 s",
    ):
        audio_io.decode(saved(samples, subtype="FLOAT"))
    assert len(audio_io.decode(saved(samples, subtype="FLOAT"), 0.6)[0]) == 6400


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("sign", [1, -1])
def test_floating_point_samples_in_integer_scale_are_reported(subtype, sign):
    """16 times full scale is let through, as loud as nobody writes it; beyond it nearly all samples
    would be clipped. Channels may have unlike signs.
    """
    samples = np.zeros((800, 2))
    samples[5] = [20_000.0 * sign, -10_000.0 * sign]
    for data in (saved(samples, subtype=subtype), saved(samples[:, 0], subtype=subtype)):
        for work in (audio_io.decode, audio_io.measure):
            with pytest.raises(
                BrokenAudioError,
                match="floating-point numbers up to 20000, where full scale is 1: they are in "
                "integer scale",
            ):
                work(data)
    assert audio_io.decode(saved(samples / 1250, subtype=subtype))[0].shape == (800,)
    assert audio_io.measure(saved(samples[:, 0] / 1250, subtype=subtype))[2] == 16


def test_floating_point_samples_beyond_full_scale_are_clipped_and_counted():
    loud = tone(amplitude=3.0)
    data = saved(loud, subtype="FLOAT")
    samples, _, peak, clipped = audio_io.measure(data)
    assert np.allclose(samples, loud), "decoded as they are"
    assert peak == pytest.approx(3, rel=1e-3) and 0.7 < clipped < 0.85
    written = np.clip(loud, -1, 1)  # what soundfile writes with 16 bits
    difference = audio_io.pcm(samples).astype(int) - audio_io.pcm(written)
    assert np.abs(difference).max() <= 1


def test_a_flipped_bit_in_flac_is_reported():
    data = bytearray(saved(np.random.default_rng(0).normal(0, 0.1, 3 * RATE), form="FLAC"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(BrokenAudioError, match="broken FLAC"):
        audio_io.decode(bytes(data))


@pytest.mark.parametrize("rate", [1, 999, 1_000_001])
def test_rates_that_no_recording_has(rate):
    refused(saved(tone(), rate), f"its header says {rate} samples a second")


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("after", [0, 100, 40_000])
def test_an_io_error_is_no_broken_file(form, after):
    """libsndfile takes a read that failed for the file's end: the row would be skipped for good."""

    class Failing(io.BytesIO):
        def readinto(self, buffer):
            if self.tell() >= after:
                raise OSError("the server went away")
            return super().readinto(buffer)

    data = saved(np.random.default_rng(0).normal(0, 0.1, 10 * RATE), form=form)
    for work in (
        audio_io.decode,
        lambda file: audio_io.decode(file, 0.5, 9.0),
        lambda file: audio_io.pieces(file, None, 2.0),
    ):
        with pytest.raises(OSError, match="the server went away"):
            work(Failing(data))


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("rate", "to"),
    [
        (8000, 16000),
        (11025, 16000),
        (44100, 16000),
        (48000, 16000),
        (22050, 16000),
        (16000, 8000),
        (22255, 16000),
    ],
)
def test_resampling_keeps_tones_and_cuts_what_would_fold_back(rate, to):
    found = audio_io.resample(tone(1.0, rate, 1000.0), rate, to)
    assert found.dtype == np.float32 and abs(len(found) - to) <= 1
    middle = slice(to // 10, -to // 10)
    assert np.abs(found - tone(1.1, to, 1000.0)[: len(found)])[middle].max() < 5e-3
    if rate > to:
        high = audio_io.resample(tone(1.0, rate, 0.48 * rate), rate, to)
        assert np.abs(high[middle]).max() < 0.02 or to >= 0.96 * rate


def test_resampling_agrees_with_scipy():
    noise = signal.lfilter(
        *signal.butter(6, 0.2), np.random.default_rng(0).normal(0, 0.3, 44100)
    ).astype(np.float32)
    found, want = audio_io.resample(noise, 44100, 16000), signal.resample_poly(noise, 160, 441)
    assert (
        found.shape == want.shape
        and np.abs(found - want)[500:-500].max() < 0.01 * np.abs(want).max()
    )
    assert audio_io.resample(noise, 16000, 16000) is noise


def test_pcm_is_exact_rounded_and_clipped():
    levels = np.arange(-32768, 32768, dtype=np.int16)
    assert np.array_equal(audio_io.pcm(audio_io.decode(saved(levels))[0]), levels)
    assert audio_io.pcm(
        np.array([2.0, -2.0, 1.0, 0.4 / 32768, 0.6 / 32768], dtype=np.float32)
    ).tolist() == [32767, -32768, 32767, 0, 1]
    samples = np.array([0.5], dtype=np.float32)
    audio_io.pcm(samples)
    assert samples[0] == 0.5


@pytest.mark.parametrize(("form", "subtype"), KINDS)
def test_sixteen_bits_are_taken_as_they_are(form, subtype):
    samples = np.random.default_rng(0).uniform(-1, 1, 4000).astype(np.float32)
    rate = 16000
    both = np.stack([samples, -samples / 2], 1)
    for data, whole in (
        (saved(samples, rate, form, subtype), subtype in ("PCM_16", "PCM_U8")),
        (saved(both, rate, form, subtype), False),
    ):
        floats, plain = audio_io.decode(data)[0], audio_io.decode(data, sixteen_at=rate)[0]
        assert floats.dtype == np.float32 and plain.dtype == (np.int16 if whole else np.float32)
        assert np.array_equal(plain if whole else audio_io.pcm(plain), audio_io.pcm(floats))
        assert audio_io.decode(data, sixteen_at=8000)[0].dtype == np.float32
        piece = audio_io.decode(data, 0.05, 0.1, None, rate)[0]
        assert len(piece) == 1600 and np.array_equal(
            piece if whole else audio_io.pcm(piece),
            audio_io.pcm(audio_io.decode(data, 0.05, 0.1)[0]),
        )


def test_encoding_is_lossless():
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    data = audio_io.encode(samples, 8000)
    assert data.startswith(b"fLaC") and audio_io.inspect(data).rate == 8000
    assert np.array_equal(audio_io.pcm(audio_io.decode(data)[0]), samples)


def test_level():
    assert audio_io.level(np.array([0.25, -0.5, 0, 0], dtype=np.float32)) == (0.5, 0.0)
    assert audio_io.level(np.array([32767, -32768, 0, 0], dtype=np.int16)) == (1.0, 0.5)
    assert audio_io.level(
        np.array([[0.5, 1], [0.5, 0], [-0.5, 0], [0.5, -1]], dtype=np.float32)
    ) == (1.0, 0.5), "one channel of two"
    assert audio_io.level(np.zeros(0, dtype=np.int16)) == (0.0, 0.0) and audio_io.level(
        np.zeros(5, dtype=np.float32)
    ) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "ULAW"),
        ("WAV", "ALAW"),
        ("NIST", "ULAW"),
        ("WAV", "PCM_U8"),
        ("AIFF", "PCM_S8"),
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_24"),
    ],
)
def test_clipping_is_seen_in_samples_of_any_width_and_in_one_channel(form, subtype):
    loud, quiet = np.clip(tone(amplitude=3.0), -1, 1), tone(amplitude=0.9)
    for samples in (loud, np.stack([quiet, loud], 1), np.stack([loud, -0.5 * loud], 1)):
        found, _, peak, clipped = audio_io.measure(saved(samples, form=form, subtype=subtype))
        assert (
            peak > 0.98
            and 0.7 < clipped < 0.85
            and np.array_equal(
                found, audio_io.decode(saved(samples, form=form, subtype=subtype))[0]
            )
        )
    assert audio_io.measure(saved(quiet, form=form, subtype=subtype))[3] == 0
    assert (
        audio_io.measure(
            saved(np.concatenate([quiet, loud]), form=form, subtype=subtype), 1.0, 0.5
        )[3]
        > 0.7
    )


# ---------------------------------------------------------------- pieces


def spoken(seconds: float, pauses: list[float], rate: int = RATE, wide: float = 0.4) -> np.ndarray:
    """Noise with quiet stretches around the given times."""
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
    for at in pauses:
        samples[round((at - wide / 2) * rate) : round((at + wide / 2) * rate)] *= 0.01
    return samples


def check_pieces(found: list[tuple[float, float]], total: float, longest: float) -> None:
    assert found[0][0] == 0 and found[-1][1] == pytest.approx(total)
    assert all(a[1] == b[0] for a, b in pairwise(found)) and all(
        0 < stop - start <= longest + 1e-6 for start, stop in found
    )


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_recordings_are_cut_in_their_pauses(rate):
    samples = spoken(60, [7.0, 14.0, 21.0, 27.0, 36.0, 41.0, 50.5], rate)
    found = audio_io.pieces(samples, rate, 10.0)
    check_pieces(found, 60.0, 10.0)
    cuts = [stop for _, stop in found[:-1]]
    assert [
        min((7, 14, 21, 27, 36, 41, 50.5), key=lambda pause: abs(pause - cut)) for cut in cuts
    ] == [7, 14, 21, 27, 36, 41, 50.5]
    assert all(
        min(abs(pause - cut) for pause in (7, 14, 21, 27, 36, 41, 50.5)) < 0.15 for cut in cuts
    )
    assert audio_io.pieces(saved(samples, rate, "FLAC"), None, 10.0) == audio_io.pieces(
        io.BytesIO(saved(samples, rate, "FLAC")), None, 10.0
    )
    assert np.allclose(audio_io.pieces(saved(samples, rate, "FLAC"), None, 10.0), found, atol=0.03)


@pytest.mark.parametrize("total", [10.001, 10.5, 12.4, 12.6, 19.99, 20.0, 31.0, 57.3])
@pytest.mark.parametrize("how", ["silence", "windows"])
def test_no_piece_is_too_long_or_a_scrap(total, how):
    for samples in (spoken(total, []), np.zeros(round(total * 8000), dtype=np.float32)):
        found = audio_io.pieces(samples, 8000, 10.0, how)  # type: ignore[arg-type]
        check_pieces(found, len(samples) / 8000, 10.0)
        assert min(stop - start for start, stop in found) >= 2.4
        assert how == "silence" or len({round(stop - start, 6) for start, stop in found}) == 1


def test_what_is_short_is_one_piece():
    assert (
        audio_io.pieces(tone(2.0), RATE, 2.0)
        == [(0.0, 2.0)]
        == audio_io.pieces(saved(tone(2.0)), None, 2.0, "windows")
    )
    with pytest.raises(ValueError, match="at most 0 s"):
        audio_io.pieces(tone(), RATE, 0.0)


@pytest.mark.parametrize("how", ["silence", "windows"])
def test_a_part_of_a_recording_is_cut_as_if_it_were_all(how):
    samples = spoken(60, [7.0, 14.0, 21.0, 27.0, 36.0, 41.0, 50.5])
    data = saved(samples)
    found = audio_io.pieces(data, None, 5.0, how, 20.0, 25.0)
    assert found == [
        (20 + start, 20 + stop)
        for start, stop in audio_io.pieces(saved(samples[20 * RATE : 45 * RATE]), None, 5.0, how)
    ]
    assert audio_io.pieces(data, None, 30.0, how, 58.0) == [(58.0, 60.0)]
    for start, seconds in ((59.0, 2.0), (60.0, None), (-1.0, 2.0)):
        with pytest.raises(BrokenAudioError, match=r"of a recording of 60\.00 s"):
            audio_io.pieces(data, None, 5.0, how, start, seconds)


def test_a_flac_file_of_unknown_length_is_counted_once(monkeypatch):
    """Not once for each piece."""

    def unknown(seconds: float) -> bytes:
        flac = bytearray(
            saved(
                np.random.default_rng(round(seconds)).normal(0, 0.1, round(seconds * RATE)),
                form="FLAC",
            )
        )
        flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
        return bytes(flac)

    read, data = [], unknown(20)
    real = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **other: (
            read.append(len(found := real(self, frames, **other))) or found
        ),
    )
    for start, stop in audio_io.pieces(data, None, 5.0):
        assert len(audio_io.decode(io.BytesIO(data), start, stop - start)[0]) == round(
            stop * RATE
        ) - round(start * RATE)
    assert sum(read) <= 3 * 20 * RATE
    assert audio_io.inspect(unknown(21)).seconds == 21 and audio_io.inspect(data).seconds == 20


def test_samples_that_are_no_numbers_are_not_cut_in():
    samples = spoken(20, [8.0])
    samples[round(5.5 * RATE) : 6 * RATE] = np.nan
    assert audio_io.pieces(samples, RATE, 10.0)[0][1] == pytest.approx(8.0, abs=0.2)


def test_hours_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / "long.wav"
    minute = (spoken(60, [10.0, 28.0, 55.0], 8000) * 32767).astype(np.int16)
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(120):
            file.write(minute)
    tracemalloc.start()
    with open(path, "rb") as file:
        found = audio_io.pieces(file, None, 30.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check_pieces(found, 7200.0, 30.0)
    assert all(
        min(abs(stop % 60 - pause) for pause in (10, 28, 55)) < 0.2 for _, stop in found[:-2]
    )
    assert peak < 40 << 20 < path.stat().st_size
