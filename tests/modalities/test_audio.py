"""Sound: recordings and pieces of them as soundfile gives them, bad ones with a reason; features
and augmentation from the rows' keys alone.
"""

import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from toys import sound_file as saved

from pipeline.core.capabilities import measures_throughput
from pipeline.core.contracts import Batch
from pipeline.core.nn import conv_arithmetic
from pipeline.core.ragged import ragged
from pipeline.io import s3, storage
from pipeline.media import audio_io
from pipeline.media import spectrogram as ops
from pipeline.modalities.audio import Audio, AudioOptions, AudioState

MEL = {"features": "mel", "mean": [-6.0] * 80, "std": [3.0] * 80}
WAVE = {"features": "wave", "normalize": True}


def noise(seconds: float = 0.5, rate: int = 16000, seed: int = 0, channels: int = 1) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .uniform(-0.4, 0.4, (round(seconds * rate), channels))
        .astype(np.float32)
    )


def read(values, kind=None, start=None, seconds=None, state=MEL, **options):
    columns, table = {"audio": "sound"}, {"sound": pa.array(values, kind)}
    for role, column in (("start", start), ("seconds", seconds)):
        if column is not None:
            columns[role], table[role] = role, pa.array(column, pa.float64())
    arrays, bad = Audio(AudioOptions(**options), state).decode(pa.table(table), columns)
    assert (
        list(arrays) == ["audio"]
        and arrays["audio"].dtype == object
        and all(row.dtype == np.int16 for row in arrays["audio"])
    )
    assert all(
        (len(row) == 0) == bool(reason) for row, reason in zip(arrays["audio"], bad, strict=True)
    )
    return arrays["audio"], bad


# ---------------------------------------------------------------- decode


def test_throughput_is_in_seconds_of_sound_without_padding():
    modality = Audio(AudioOptions(rate=8000), MEL)
    files = [saved(noise(seconds, seed=i)) for i, seconds in enumerate((0.5, 1.5))]
    arrays, _ = modality.decode(pa.table({"sound": files}), {"audio": "sound"})
    batch = Batch(np.arange(2), torch.zeros(2), modality.collate(arrays))
    assert modality.throughput(batch) == pytest.approx(2.0, abs=1e-3)
    assert measures_throughput(modality) and modality.throughput_unit == "s of sound"


def test_samples_are_those_of_soundfile():
    files = [
        saved(noise(0.3 + 0.1 * i, seed=i), form=form)
        for i, form in enumerate(("WAV", "FLAC", "AIFF"))
    ]
    found, bad = read(files)
    assert bad == [""] * 3 and [len(row) for row in found] == [4800, 6400, 8000]
    for row, data in zip(found, files, strict=True):
        assert np.array_equal(row, soundfile.read(io.BytesIO(data), dtype="int16")[0])


@pytest.mark.parametrize(
    ("rate", "channels", "form", "subtype"),
    [
        (8000, 1, "WAV", "PCM_U8"),
        (44100, 5, "WAV", "PCM_24"),
        (48000, 2, "WAV", "FLOAT"),
        (11025, 1, "FLAC", "PCM_16"),
        (48000, 1, "OGG", "OPUS"),
        (22050, 2, "OGG", "VORBIS"),
        (16000, 2, "MP3", "MPEG_LAYER_III"),
    ],
)
def test_any_rate_channels_and_kind_become_mono_at_one_rate(rate, channels, form, subtype):
    time = np.arange(rate) / rate
    tone = np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * channels, 1)
    found, bad = read([saved(tone, rate, form, subtype)])
    assert bad == [""] and abs(len(found[0]) - 16000) <= 2
    want = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found[0])) / 16000)
    assert np.abs(found[0] / 32768 - want)[1600:-1600].max() < 0.03


def test_bad_rows_have_their_reason_and_spoil_no_other():
    wrong = noise()
    wrong[100] = np.nan
    cut = saved(noise(2.0))[:-16000]
    values = [
        saved(noise()),
        b"",
        None,
        b"no sound at all" * 9,
        saved(noise(0)),
        saved(wrong, subtype="FLOAT"),
        cut,
        saved(noise(0.02)),
        saved(noise(3.0)),
        saved(np.zeros(8000, dtype=np.float32)),
        saved(np.ones((8000, 1), dtype=np.float32) * 3, subtype="FLOAT"),
    ]
    found, bad = read(values, pa.binary(), max_seconds=2.5)
    assert [bool(reason) for reason in bad] == [False, *[True] * 8, False, False]
    for reason, text in zip(
        bad[1:9],
        [
            "the audio is empty (0 bytes)",
            "the audio is null",
            "no sound file that libsndfile reads",
            "no samples",
            "1 of 8000 samples are not numbers",
            "1.50 s of sound, its header promises 2.00 s: the file was cut off",
            "0.02 s, shorter than one window of 0.025 s",
            "3.00 s long, more than 2.5 s: cut long recordings (a folder read as format: "
            "audio is cut at silence, and start and seconds name a piece), or "
            "raise the modality's max_seconds",
        ],
        strict=True,
    ):
        assert text in reason
    assert not found[9].any() and set(found[10].tolist()) == {32767}


def test_a_recording_in_integer_scale_is_a_bad_row():
    found, bad = read([saved(noise() * 20_000, subtype="FLOAT"), saved(noise())], pa.binary())
    assert (
        "floating-point numbers up to" in bad[0]
        and "in integer scale" in bad[0]
        and len(found[0]) == 0
        and bad[1] == ""
        and len(found[1]) == 8000
    )


@pytest.mark.parametrize("kind", ["bytes", "hub", "path", "hub path"])
def test_bytes_paths_and_cells_of_the_hub(tmp_path, kind):
    data = saved(noise())
    (tmp_path / "a.wav").write_bytes(data)
    path = str(tmp_path / "a.wav")
    value = {
        "bytes": data,
        "path": path,
        "hub": {"bytes": data, "path": "elsewhere.wav"},
        "hub path": {"bytes": None, "path": path},
    }[kind]
    found, bad = read([value])
    assert bad == [""] and np.array_equal(
        found[0], soundfile.read(io.BytesIO(data), dtype="int16")[0]
    )


def test_a_file_that_is_not_there_is_no_bad_row(tmp_path):
    with pytest.raises(storage.StorageError, match=r"gone\.wav"):
        read([str(tmp_path / "gone.wav")])


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_start_and_seconds_name_a_piece(tmp_path, form):
    whole = noise(4.0)
    path = str(tmp_path / "a")
    Path(path).write_bytes(saved(whole, form=form))
    all_of_it = read([path])[0][0]
    found, bad = read(
        [path] * 6,
        start=[0.0, 1.5, 3.0, None, 2.0, float("nan")],
        seconds=[1.0, 0.5, None, 1.0, 5.0, None],
    )
    assert bad == ["", "", "", "", "a piece from 2 s on, 5 s long, of a recording of 4.00 s", ""]
    for row, (start, stop) in zip(
        found, [(0, 1), (1.5, 2), (3, 4), (0, 4), (0, 0), (0, 4)], strict=True
    ):
        assert np.array_equal(row, all_of_it[round(16000 * start) : round(16000 * stop)])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.5], "a value of type float is not a recording: files' bytes"),
        ([0], "a value of type int is not a recording"),
        ([[0.1, 0.2]], "a value of type list is not a recording"),
        ([[]], "a value of type list is not a recording"),
        ([True], "type bool"),
        (
            [{"array": [0.1, 0.2], "sampling_rate": 16000}],
            r"a struct of array, sampling_rate is not a file: structs of bytes and path are read",
        ),
        ([{"path": None, "bytes": None}], "the audio is null"),
        ([{"path": None, "bytes": b""}], "the audio is"),
    ],
)
def test_columns_that_hold_no_files_are_told_as_what_they_are(values, says):
    found, bad = read(values)
    assert says in bad[0] and len(found[0]) == 0
    assert Audio(AudioOptions(), MEL).costs(pa.table({"x": values}), {"audio": "x"}).tolist() == [
        0.0
    ]


def test_times_that_are_none():
    for start, seconds, text in (
        (-1.0, 1.0, "start: -1.0 is not a time in seconds"),
        (0.0, float("inf"), "seconds: inf is not a time"),
        (0.0, 0.0, "0 s long"),
    ):
        _, bad = read([saved(noise())], start=[start], seconds=[seconds])
        assert text in bad[0]


def test_pieces_of_a_recording_on_s3_are_read_by_ranges(s3_server, monkeypatch):
    whole = noise(200.0)
    uri = f"{s3_server}/test-audio/long.wav"
    storage.write_bytes(uri, saved(whole))
    taken, inner = [], s3.Reader.readinto
    monkeypatch.setattr(
        s3.Reader, "readinto", lambda self, buffer: taken.append(n := inner(self, buffer)) or n
    )
    found, bad = read([uri] * 2, start=[150.0, 0.0], seconds=[1.0, 2.0], max_seconds=5.0)
    assert bad == ["", ""] and sum(taken) < 5 << 20 and len(saved(whole)) > 6 << 20
    for row, start, stop in zip(found, (150, 0), (151, 2), strict=True):
        assert np.abs(row / 32768 - whole[16000 * start : 16000 * stop, 0]).max() < 2 / 32768
    taken.clear()
    # Told by its header
    assert "200.00 s long" in read([uri], max_seconds=5.0)[1][0] and sum(taken) < 3 << 20


def test_an_io_error_of_s3_is_no_bad_row(s3_server, monkeypatch, fast):
    uri = f"{s3_server}/test-audio/failing.flac"
    storage.write_bytes(uri, saved(noise(400.0, 8000), 8000, "FLAC"))

    def failing(self, buffer, inner=s3.Reader.readinto):
        if self._position > 1 << 20:
            raise storage.StorageError("cannot read: the server went away")
        return inner(self, buffer)

    monkeypatch.setattr(s3.Reader, "readinto", failing)
    with pytest.raises(storage.StorageError, match="went away"):
        read([uri], start=[1.0], seconds=[398.0], max_seconds=1000)


# ---------------------------------------------------------------- costs


def test_costs_are_seconds(tmp_path):
    (tmp_path / "a.flac").write_bytes(saved(noise(2.0), form="FLAC"))
    path = str(tmp_path / "a.flac")
    table = pa.table(
        {
            "sound": [path] * 6,
            "from": pa.array([None, 0.5, 0.5, None, 9.0, 0.0]),
            "long": pa.array([None, None, 1.25, 7.0, None, float("nan")]),
        }
    )
    modality, columns = Audio(AudioOptions(), MEL), {"audio": "sound"}
    assert modality.costs(table, columns).tolist() == [2.0] * 6
    assert modality.costs(table, {**columns, "start": "from"}).tolist() == [
        2.0,
        1.5,
        1.5,
        2.0,
        0.0,
        2.0,
    ]
    assert modality.costs(table, {**columns, "start": "from", "seconds": "long"}).tolist() == [
        2.0,
        1.5,
        1.25,
        7.0,
        0.0,
        2.0,
    ]
    assert modality.costs(table.select(["long"]), {"seconds": "long"}).tolist() == [
        0.0,
        0.0,
        1.25,
        7.0,
        0.0,
        0.0,
    ]
    mixed = pa.table(
        {"sound": pa.array([saved(noise(1.0, 8000), 8000), b"broken", None, b""], pa.binary())}
    )
    found = modality.costs(mixed, columns)
    assert found.dtype == np.float64 and found.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert modality.costs(mixed.slice(0, 0), columns).shape == (0,)
    whole = pa.table({"sound": [path] * 3, "long": pa.array([3, 2, None])})
    assert modality.costs(whole, {**columns, "seconds": "long"}).tolist() == [3.0, 2.0, 2.0]


def test_costs_hold_no_second_copy_of_files():
    table = pa.table({"sound": [saved(noise(4.0, seed=i)) for i in range(100)]})
    before, tracking = pa.total_allocated_bytes(), []
    inspect = audio_io.inspect

    def tracked(file):
        tracking.append(pa.total_allocated_bytes() - before)
        return inspect(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_io, "inspect", tracked)
        tracemalloc.start()
        assert Audio(AudioOptions(), MEL).costs(table, {"audio": "sound"}).tolist() == [4.0] * 100
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert max(tracking) < table.nbytes / 4 and peak < table.nbytes / 2


# ---------------------------------------------------------------- fit and inputs


@pytest.mark.parametrize(
    ("features", "subtype"), [("mel", "PCM_16"), ("wave", "FLOAT"), ("plain wave", "PCM_24")]
)
def test_the_code_beside_an_export_prepares_a_recording(tmp_path, monkeypatch, features, subtype):
    sound = saved(noise(0.7, channels=2), subtype=subtype)
    (tmp_path / "recording.wav").write_bytes(sound)
    state: AudioState = {"features": "wave", "normalize": features == "wave"}
    if features == "mel":
        state = {"features": "mel", "mean": [-3.0] * 40, "std": [2.0] * 40}
    modality = Audio(AudioOptions(mels=40), state)
    table = pa.table({"audio": [str(tmp_path / "recording.wav")]})
    arrays, bad = modality.decode(table, {"audio": "audio"})
    batch = modality.finish(Batch(np.arange(1), torch.zeros(1), modality.collate(arrays)))
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in batch.data.items()}
    inputs = {name: {"type": kind} for name, kind in types.items()}
    names = {"np": np, "graph": {"inputs": inputs, "modality": {"state": state}}}
    monkeypatch.chdir(tmp_path)
    exec(modality.preparation_code(), names)
    assert bad == [""] and names["inputs"].keys() == batch.data.keys()
    for name, tensor in batch.data.items():
        np.testing.assert_allclose(names["inputs"][name], tensor.numpy(), atol=2e-3)


def test_fitted_mean_and_deviation_are_those_of_the_frames():
    files = [saved(noise(0.5 + 0.05 * i, seed=i)) for i in range(20)] + [b"broken"]
    state = Audio.fit(
        AudioOptions(),
        pa.table({"x": pa.array(files, pa.binary())}),
        {"audio": "x"},
        "torchaudio/conformer",
    )
    mels = torch.cat(
        [
            ops.log_mel(
                ops.floats(
                    torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="int16")[0])[None]
                ),
                16000,
                400,
                160,
                80,
            )[0]
            for data in files[:20]
        ]
    )
    assert state["features"] == "mel"
    assert np.allclose(state["mean"], mels.mean(0), atol=1e-4) and np.allclose(
        state["std"], mels.std(0).clamp(min=1.0), atol=1e-3
    )
    one = Audio(AudioOptions(), state)
    batch = Batch(
        np.arange(20),
        torch.arange(20),
        one.collate(one.decode(pa.table({"x": files[:20]}), {"audio": "x"})[0]),
    )
    done = one.finish(batch)
    inside = done["mel"][done["mask"]]
    assert inside.mean(0).abs().max() < 1e-3 and inside.std(0).max() < 1.1


def test_a_silent_bin_has_no_tiny_deviation():
    state = Audio.fit(
        AudioOptions(),
        pa.table({"x": [saved(np.zeros(8000, dtype=np.float32))]}),
        {"audio": "x"},
        "torchaudio/conformer",
    )
    assert (
        state["std"] == [1.0] * 80 and state["mean"] == [pytest.approx(np.log(1e-6), abs=1e-3)] * 80
    )


@pytest.mark.parametrize(
    ("features", "backbone", "want"),
    [
        ("auto", "torchaudio/deepspeech2", "mel"),
        ("auto", "wavenet/wavenet", "wave"),
        ("auto", "transformers/wav2vec2", "wave"),
        ("mel", "wavenet/wavenet", "mel"),
        ("wave", "torchaudio/conformer", "wave"),
    ],
)
def test_features_follow_from_the_backbone_unless_they_are_said(features, backbone, want):
    options = AudioOptions(features=features)
    state = Audio.fit(options, pa.table({"x": [saved(noise())]}), {"audio": "x"}, backbone)
    if want == "wave":
        masks = AudioOptions(features=features, time_masks=3)
        with pytest.raises(ValueError, match="time_masks 3 has no effect where the backbone reads"):
            Audio.fit(masks, pa.table({"x": []}), {"audio": "x"}, backbone)
    modality = Audio(options, state)
    assert state["features"] == want == modality.inputs()["features"]
    assert (
        modality.inputs()
        == {
            "mel": {
                "features": "mel",
                "rate": 16000,
                "channels": 80,
                "convolutions": [[400, 160, 0]],
            },
            "wave": {
                "features": "wave",
                "rate": 16000,
                "channels": 1,
                "convolutions": [],
                **({} if "wavenet" in backbone else {"scale": "variance 1"}),
            },
        }[want]
    )


@pytest.mark.parametrize(
    ("given", "backbone", "want"),
    [
        (None, "transformers/wav2vec2", True),
        (None, "wavenet/wavenet", False),
        (True, "wavenet/wavenet", True),
        (False, "transformers/wav2vec2", False),
    ],
)
def test_waves_are_normalised_unless_they_are_for_wavenet(given, backbone, want):
    options = AudioOptions(features="wave", normalize=given)
    modality = Audio(options, Audio.fit(options, pa.table({"x": []}), {"audio": "x"}, backbone))
    x = (1000 * noise(0.5)[:, 0]).astype(np.int16)
    done = modality.finish(
        Batch(np.arange(1), torch.arange(1), modality.collate({"audio": ragged([x])}))
    )["wave"]
    assert (
        torch.allclose(done[0].std(), torch.tensor(1.0), atol=1e-3)
        if want
        else torch.equal(done[0], torch.from_numpy(x).float() / 32768)
    )


def test_features_are_fitted_on_all_of_the_sample_and_not_on_its_beginning(monkeypatch):
    """A corpus of two rooms, one after the other; the second is 40 dB quieter."""
    rows = [saved(noise(1.0))] * 60 + [saved(noise(1.0) / 100)] * 60
    monkeypatch.setattr("pipeline.modalities.audio.FIT_SECONDS", 20.0)
    means = [
        np.mean(
            Audio.fit(
                AudioOptions(), pa.table({"x": part}), {"audio": "x"}, "torchaudio/conformer"
            )["mean"]
        )
        for part in (rows, rows[:60], rows[60:])
    ]
    assert abs(means[0] - (means[1] + means[2]) / 2) < 0.3 * (means[1] - means[2])


def test_nothing_to_fit_on():
    with pytest.raises(
        ValueError, match=r"column x: none of 2 recordings can be decoded: no sound file"
    ):
        Audio.fit(
            AudioOptions(),
            pa.table({"x": [b"broken", b"too"]}),
            {"audio": "x"},
            "torchaudio/conformer",
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hop": 0.05}, "hop: 0.05 s from one frame to the next"),
        ({"noise_snr": [30.0, 10.0]}, "noise_snr: "),
        ({"mels": 300}, "mels: 300 bins of a window of"),
    ],
)
def test_options_that_make_no_sense(options, text):
    with pytest.raises(ValueError, match=text):
        Audio(AudioOptions(**options), {"features": "mel"})


# ---------------------------------------------------------------- on the device

LENGTHS = (8000, 401, 12000, 400, 5000, 9000)


def batch_of(modality: Audio, lengths=LENGTHS, keys=None) -> Batch:
    rows = [(20000 * noise(n / 16000, seed=n)[:, 0]).astype(np.int16) for n in lengths]
    keys = torch.arange(len(rows)) * 7919 + 3 if keys is None else keys
    data = {**modality.collate({"audio": ragged(rows)}), "label": torch.arange(len(rows))}
    return Batch(np.arange(len(rows)), keys, data, np.zeros(len(rows), dtype=np.int64))


def rows_of(batch: Batch, name: str) -> list[torch.Tensor]:
    return [row[inside] for row, inside in zip(batch[name], batch["mask"], strict=True)]


STRONG = {"speed": 0.1, "noise": 0.5, "frequency_masks": 2, "time_masks": 3, "time_share": 0.3}
EACH = pytest.mark.parametrize(("state", "name"), [(MEL, "mel"), (WAVE, "wave")])


@EACH
def test_finish_gives_features_and_a_mask(state, name):
    modality = Audio(AudioOptions(), state)
    done = modality.finish(batch_of(modality))
    assert (
        set(done.data) == {name, "mask", "audio_lengths", "label"}
        and done[name].dtype == torch.float32
    )
    counts = [conv_arithmetic.count(n, modality.inputs()["convolutions"]) for n in LENGTHS]
    assert done["mask"].sum(1).tolist() == counts and done["mask"].shape[1] == max(counts)
    assert all(
        mask[:n].all() and not mask[n:].any() for mask, n in zip(done["mask"], counts, strict=True)
    )
    assert not done[name][~done["mask"]].any() and torch.isfinite(done[name]).all()
    assert modality.finish(done) is done and done.shards is not None
    if name == "mel":
        x = ops.floats(batch_of(modality)["audio"])[:1, :8000]
        assert torch.allclose(
            done["mel"][0, : counts[0]], (ops.log_mel(x, 16000, 400, 160, 80)[0] + 6) / 3, atol=1e-5
        )


@EACH
@pytest.mark.parametrize("training", [False, True])
def test_a_row_is_the_same_alone_and_in_any_batch(state, name, training):
    modality = Audio(AudioOptions(**STRONG), state)
    work = (lambda b: modality.finish(modality.augment(b))) if training else modality.finish
    whole = batch_of(modality)
    together = rows_of(work(whole), name)
    for i in range(len(LENGTHS)):
        alone = work(batch_of(modality, LENGTHS[i : i + 1], whole.keys[i : i + 1]))
        assert alone["mask"].all() and torch.allclose(
            rows_of(alone, name)[0], together[i], atol=1e-5
        )
    for part, rows in zip(whole.split(3), ((0, 1, 2), (3, 4, 5)), strict=True):
        assert all(
            torch.allclose(a, together[i], atol=1e-5)
            for a, i in zip(rows_of(work(part), name), rows, strict=True)
        )


@EACH
def test_augmentation_follows_from_the_key(state, name):
    modality = Audio(AudioOptions(**STRONG), state)
    first, again = (modality.augment(batch_of(modality)) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first.data)
    other = modality.augment(batch_of(modality, keys=torch.arange(len(LENGTHS)) + 10**9))
    assert (
        sum(
            a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(rows_of(first, name), rows_of(other, name), strict=True)
        )
        <= 2
    )
    assert not first[name][~first["mask"]].any() and torch.isfinite(first[name]).all()


def test_silence_and_rows_of_no_samples_stay_finite():
    for state in (MEL, WAVE):
        modality = Audio(AudioOptions(**STRONG), state)
        rows = [
            np.zeros(0, dtype=np.int16),
            np.zeros(8000, dtype=np.int16),
            np.full(4000, 5, dtype=np.int16),
        ]
        for some in (rows, rows[:1]):
            batch = Batch(
                np.arange(len(some)),
                torch.arange(len(some)),
                modality.collate({"audio": ragged(some)}),
            )
            for done in (modality.finish(batch), modality.augment(batch)):
                values = done[state["features"]]
                assert (
                    torch.isfinite(values).all()
                    and values.shape[1] > 0
                    and not done["mask"][0].any()
                    and not values[0].any()
                )


def test_three_speeds():
    modality = Audio(AudioOptions(speed=0.1, frequency_masks=0, time_masks=0), MEL)
    done = modality.augment(batch_of(modality, (16000,) * 300, torch.arange(300)))
    found, count = done["audio_lengths"].unique(return_counts=True)
    assert found.tolist() == [14546, 16000, 17778] and count.min() > 70
    plain = modality.finish(batch_of(modality, (16000,)))
    same = (done["audio_lengths"] == 16000).nonzero()[0, 0]
    assert torch.allclose(rows_of(done, "mel")[same], plain["mel"][0], atol=1e-5)
    short = modality.augment(batch_of(modality, (410,) * 50, torch.arange(50)))
    assert short["mask"].any(1).all()  # nothing becomes too short to be a frame


def test_both_speeds_are_the_same_share_away():
    """Of every whole percent; other shares are refused: 0.005 would do nothing, 0.015 play 2 %
    slower and 1 % faster.
    """
    assert AudioOptions().speed == 0
    for percent in range(1, 51):
        modality = Audio(AudioOptions(speed=percent / 100, frequency_masks=0, time_masks=0), MEL)
        lengths = (
            modality.augment(batch_of(modality, (16000,) * 30, torch.arange(30)))["audio_lengths"]
            .unique()
            .tolist()
        )
        assert lengths == [-(-1_600_000 // (100 + change)) for change in (percent, 0, -percent)]
    for speed in (0.005, 0.015, 0.333):
        with pytest.raises(ValueError, match=r"multiple of 0\.01"):
            AudioOptions(speed=speed)


def test_noise_comes_to_a_share_of_the_rows_at_its_ratio():
    state = {"features": "wave", "normalize": False}
    modality = Audio(AudioOptions(noise=0.3, noise_snr=[5.0, 20.0]), state)
    batch = batch_of(modality, (4000,) * 400, torch.arange(400))
    plain, done = modality.finish(batch)["wave"], modality.augment(batch)["wave"]
    changed = ~torch.isclose(plain, done, atol=1e-7).all(1)
    assert 0.22 < changed.float().mean() < 0.38
    ratio = 10 * torch.log10((plain**2).sum(1) / ((done - plain) ** 2).sum(1))[changed]
    assert 5 <= ratio.min() < 8 and 17 < ratio.max() <= 20.01
    added = (done - plain)[changed]
    white = torch.fft.rfft(added / added.std(1, keepdim=True)).abs().square().mean(0)[1:1999]
    assert (
        white.reshape(-1, 37).mean(1).std() / white.mean() < 0.1
        and (added[0] * added[1]).mean().abs() < 0.1 * added[0].std() * added[1].std()
    )


def test_masks_of_spec_augment():
    options = AudioOptions(
        frequency_masks=1, frequency_width=0.25, time_masks=2, time_width=0.2, time_share=0.1
    )
    modality = Audio(options, {**MEL, "mean": [0.0] * 80, "std": [1.0] * 80})
    batch = batch_of(modality, (16000, 8000) * 200, torch.arange(400))
    plain, done = modality.finish(batch), modality.augment(batch)
    assert torch.equal(plain["mask"], done["mask"])
    gone = (done["mel"] == 0) & (plain["mel"] != 0)
    assert torch.equal(done["mel"][~gone], plain["mel"][~gone])
    for i, count in ((0, 98), (1, 48)):
        part = gone[i::2, :count]
        rows, bins = part.all(2), part.all(1)
        assert torch.equal(part, rows[:, :, None] | bins[:, None])
        assert 18 <= bins.sum(1).max() <= 20 and bins.sum(1).min() == 0
        assert rows.sum(1).max() <= 2 * int(0.1 * count) and rows.sum(1).max() > int(0.1 * count)
    off = Audio(AudioOptions(frequency_masks=0, time_masks=0), modality.state)
    assert torch.equal(off.augment(batch)["mel"], plain["mel"])


def test_frames_with_masks_are_shorter_than_the_least_width(monkeypatch):
    modality = Audio(
        AudioOptions(frequency_masks=0, time_masks=1, time_width=0.05, time_share=1.0),
        {**MEL, "mean": [0.0] * 80, "std": [1.0] * 80},
    )
    done = modality.augment(batch_of(modality, (16000,) * 100, torch.arange(100)))
    assert (done["mel"] == 0).all(2).sum(1).max() == 5


def test_target_options_leave_what_was_fitted():
    assert set(AudioOptions.model_fields) - set(Audio.target_options) == {
        "rate",
        "features",
        "mels",
        "window",
        "hop",
        "normalize",
    }
    assert set(Audio.target_options) < set(AudioOptions.model_fields)


# ---------------------------------------------------------------- real recordings


@pytest.mark.data
@pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
@pytest.mark.parametrize(
    ("file", "rows", "rate"), [("an4/test.parquet", 130, 16000), ("fsdd/fsdd.parquet", 300, 8000)]
)
def test_real_recordings_decode_whole(file, rows, rate):
    table = pq.read_table(Path(os.environ["ONETOMANY_DATA"], "speech", file)).slice(0, rows)
    modality = Audio(AudioOptions(), MEL)
    arrays, bad = modality.decode(table, {"audio": "audio"})
    assert bad == [""] * rows
    seconds = modality.costs(table, {"audio": "audio"})
    assert np.allclose(
        seconds, modality.costs(table, {"audio": "audio", "seconds": "duration_s"}), atol=0.01
    )
    assert np.allclose(seconds, [len(row) / 16000 for row in arrays["audio"]], atol=1e-3)
    for i in range(0, rows, 17):
        cell = table["audio"][i].as_py()
        want, own = soundfile.read(
            io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell), dtype="int16"
        )
        assert own == rate and (rate != 16000 or np.array_equal(arrays["audio"][i], want))
