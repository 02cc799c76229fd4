"""Recordings to parts: which bytes stay, what is resampled and cut, what is broken, and the same
bytes however often a run is killed.
"""

import gzip
import hashlib
import io
import tracemalloc
import wave as wavefile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from prepare.conftest import parts, prepare_and_read, prepare_killed, read, reasons, tar, write
from prepare.speech import librispeech, manifest, samples, sound, wave
from scipy.signal import resample_poly

from pipeline import cli
from pipeline.io import storage
from pipeline.prepare.engine import audio, importing, row_groups
from pipeline.prepare.engine.write import MANIFEST, Preparation, Settings, verify
from pipeline.prepare.readers import archives

ROOT = Path(cli.__file__).parents[1]


def listed(root, **sounds: bytes) -> Path:
    """A manifest of recordings without transcripts."""
    for name, data in sounds.items():
        write(root / f"{name}.bin.wav", data)
    return manifest(root, [{"audio_filepath": f"{name}.bin.wav"} for name in sounds])


# ---------------------------------------------------------------- what is written


def test_recordings_keep_the_publishers_bytes_where_nothing_changes(tmp_path):
    sounds = {
        "flac": sound(1),
        "wav8": sound(2, form="WAV", subtype="PCM_U8", rate=8000),
        "wav24": sound(3, form="WAV", subtype="PCM_24"),
        "stereo": sound(4, channels=2, form="WAV", rate=44100),
        "mp3": sound(5, form="MP3", rate=32000),
        "float": sound(6, form="WAV", subtype="FLOAT"),
        "five": sound(7, form="WAV", channels=5),
    }
    rows, found = prepare_and_read(
        "manifest", listed(tmp_path / "in", **sounds).parent, tmp_path / "out", "rate=0"
    )
    assert {row["path"].split(".")[0]: row["audio"] for row in rows} == sounds
    for row in rows:
        with soundfile.SoundFile(io.BytesIO(row["audio"])) as file:
            assert (row["rate"], row["channels"], row["seconds"]) == (
                file.samplerate,
                file.channels,
                file.frames / file.samplerate,
            )
        assert (
            row["sha256"] == hashlib.sha256(row["audio"]).hexdigest()
            and row["recording_start"] == 0
        )
    assert found["notes"]["written anew as FLAC"] == {} and not any(
        name.startswith("_") for name in rows[0]
    )


def test_rate_and_mono_write_anew_once_and_only_what_differs(tmp_path):
    t = np.arange(44100) / 44100
    tone = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.1 * np.sin(2 * np.pi * 440 * t)], 1)
    source = listed(
        tmp_path / "in", tone=wave(tone, 44100), same=sound(1), stereo=sound(2, channels=2)
    ).parent
    rows = {
        row["path"].split(".")[0]: row
        for row in prepare_and_read(
            "manifest", source, tmp_path / "out", "rate=16000", "mono=true"
        )[0]
    }
    assert rows["same"]["audio"] == (source / "same.bin.wav").read_bytes()
    for name in ("tone", "stereo"):
        with soundfile.SoundFile(io.BytesIO(rows[name]["audio"])) as file:
            assert (file.samplerate, file.channels, file.format, file.subtype) == (
                16000,
                1,
                "FLAC",
                "PCM_16",
            )
    assert (rows["tone"]["rate"], rows["tone"]["channels"], rows["tone"]["seconds"]) == (
        44100,
        2,
        1.0,
    )
    made, wanted = samples(rows["tone"]["audio"]) / 32768, resample_poly(tone.mean(1), 160, 441)
    assert np.abs(made - wanted)[800:-800].max() < 2e-3
    assert (
        rows["tone"]["sha256"] == hashlib.sha256((source / "tone.bin.wav").read_bytes()).hexdigest()
    )
    stereo = soundfile.read(source / "stereo.bin.wav", dtype="float64")[0]
    assert (
        np.abs(samples(rows["stereo"]["audio"]) / 32768 - stereo.mean(1)).max()
        <= 0.5 / 32768 + 1e-6
    )
    with pytest.raises(ValueError, match="rate=10: from 1000 to 1000000"):
        prepare_and_read("manifest", source, tmp_path / "none", "rate=10")


def test_sixteen_bits_stay_exact_when_written_anew(tmp_path):
    """A piece of a WAV file of 16 bits."""
    values = np.random.default_rng(0).integers(-32768, 32768, 48000).astype(np.int16)
    write(tmp_path / "in/a.wav", wave(values))
    manifest(
        tmp_path / "in", [{"audio_filepath": "a.wav", "offset": 1.0, "duration": 0.5, "text": "x"}]
    )
    (row,) = prepare_and_read("manifest", tmp_path / "in", tmp_path / "out")[0]
    assert (samples(row["audio"]) == values[16000:24000]).all()
    assert (row["recording_start"], row["seconds"]) == (1.0, 0.5)


# ---------------------------------------------------------------- cutting


def bursts(lengths: list[float], rate: int = 8000) -> np.ndarray:
    """Noise of so many seconds each, with 0.3 s of silence between."""
    random, gap = np.random.default_rng(0), np.zeros(round(0.3 * rate))
    return np.concatenate(
        [
            part
            for seconds in lengths
            for part in (0.3 * random.standard_normal(round(seconds * rate)), gap)
        ]
    ).clip(-1, 1)


def test_a_long_recording_is_cut_where_it_is_silent(tmp_path):
    whole = (bursts([2.2, 1.4, 2, 1.9, 2.3, 0.8, 2.1, 1.5]) * 32767).astype(np.int16)
    source = listed(tmp_path / "in", long=wave(whole, 8000), short=sound(1, 5.0, 8000)).parent
    rows, found = prepare_and_read("manifest", source, tmp_path / "out", "longest=6")
    pieces = sorted(
        (row for row in rows if row["path"].startswith("long")),
        key=lambda row: row["recording_start"],
    )
    assert len(pieces) > 3 and all(
        row["seconds"] <= 6 and row["path"] == "long.bin.wav" for row in pieces
    )
    assert (np.concatenate([samples(row["audio"]) for row in pieces]) == whole).all(), (
        "nothing is lost, nothing stands twice"
    )
    for row in pieces[1:]:
        at = round(row["recording_start"] * 8000)
        assert not whole[at - 80 : at + 80].any(), "cut within speech"
    assert found["notes"]["cut out of longer recordings"] == {"train": len(pieces)} and found[
        "rows"
    ] == {"train": len(pieces) + 1}
    assert (
        len({row["sha256"] for row in pieces}) == len(pieces) and found["duplicates"]["files"] == 0
    )
    even = [
        row
        for row in prepare_and_read(
            "manifest", source, tmp_path / "even", "longest=6", "cut=windows"
        )[0]
        if row["path"].startswith("long")
    ]
    assert max(row["seconds"] for row in even) - min(
        row["seconds"] for row in even
    ) < 0.001 and len(even) == -(-len(whole) // 48000)


def test_the_last_line_tells_rows_of_cut_recordings_without_dropped_ones(tmp_path):
    source = listed(tmp_path / "in", long=wave(bursts([3, 3, 3]), 8000), broken=b"x").parent
    work = Preparation("manifest", str(source), str(tmp_path / "out"), None, Settings(max_bad=0.5))
    work.options.__dict__["longest"] = 4.0
    work.run()
    assert "train 3 rows in 1 part, left out: 1 broken" in work.describe()


def test_a_long_recording_with_a_transcript_is_broken_with_advice(tmp_path):
    write(tmp_path / "in/a.wav", sound(1, 3.0, form="WAV"))
    write(tmp_path / "in/b.wav", sound(2, 3.0, form="WAV"))
    manifest(
        tmp_path / "in",
        [{"audio_filepath": "a.wav", "text": "long"}, {"audio_filepath": "b.wav", "text": " "}],
    )
    rows, found = prepare_and_read("manifest", tmp_path / "in", tmp_path / "out", "longest=2")
    assert reasons(found) == {
        "a.wav": "3.0 s with a transcript, longer than longest=2: align and cut it, or raise "
        "--set longest"
    }
    assert {row["path"] for row in rows} == {"b.wav"} and len(rows) == 2


def long_file(path: Path, minutes: int, rate: int = 8000) -> Path:
    """Bursts of 1.7 s with silence between, over and over."""
    once = (bursts([1.7] * 30, rate) * 32767).astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wavefile.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        for _ in range(minutes):
            file.writeframesraw(once)
    return path


@pytest.mark.parametrize("minutes", [30, pytest.param(120, marks=pytest.mark.slow)])
def test_hours_in_one_file_are_cut_in_bounded_memory(tmp_path, monkeypatch, minutes):
    """What Python holds: a minute as floating-point numbers, and row groups; the file itself has 29
    or 115 MB.
    """
    path = long_file(tmp_path / "in/long.wav", minutes)
    if minutes < 120:
        monkeypatch.setattr(audio, "STREAMED", 1 << 20)
        monkeypatch.setattr(row_groups, "GROUP_BYTES", 1 << 20)
    assert path.stat().st_size > audio.STREAMED
    manifest(tmp_path / "in", [{"audio_filepath": "long.wav"}])
    monkeypatch.setattr(archives.Reader, "__call__", lambda *a: pytest.fail("read whole"))
    tracemalloc.start()
    Preparation("manifest", str(tmp_path / "in"), str(tmp_path / "out")).run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file = pq.ParquetFile(next((tmp_path / "out").glob("*.parquet")))
    rows = file.read(["recording_start", "seconds"])
    starts, seconds = np.array(rows["recording_start"]), np.array(rows["seconds"])
    assert (
        seconds.sum() == pytest.approx(60 * minutes)
        and seconds.max() <= 30
        and np.allclose(starts[1:], (starts + seconds)[:-1])
    )
    assert file.metadata.num_row_groups > 3 and peak < (12 << 20) + 4 * row_groups.GROUP_BYTES, (
        f"{peak >> 20} MiB"
    )


def test_most_of_a_long_recording_is_cut_in_bounded_memory_too(tmp_path, monkeypatch):
    path = long_file(tmp_path / "in/long.wav", 20)
    monkeypatch.setattr(audio, "STREAMED", 1 << 20)
    read, real = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **other: (
            read.append(len(found := real(self, frames, **other))) or found
        ),
    )
    manifest(tmp_path / "in", [{"audio_filepath": path.name, "offset": 61.0, "duration": 1000.0}])
    rows = sorted(
        prepare_and_read("manifest", tmp_path / "in", tmp_path / "out")[0],
        key=lambda row: row["recording_start"],
    )
    assert (
        rows[0]["recording_start"] == 61
        and sum(row["seconds"] for row in rows) == pytest.approx(1000)
        and max(row["seconds"] for row in rows) <= 30
    )
    assert max(read) <= 60 * 8000, "a minute at a time"


# ---------------------------------------------------------------- broken ones, levels, speakers


def test_broken_recordings_are_listed_with_their_reason(tmp_path):
    good = sound(1, form="WAV")
    bad = {
        "empty": (b"", "empty (0 bytes)"),
        "no_sound": (b"RIFFnothing at all", "broken WAV file"),
        "cut": (good[:-4000], "its header promises 0.50 s"),
        "no_samples": (wave(np.zeros(0)), "no samples"),
        "nan": (
            wave(np.array([0, np.nan, 0.1]), subtype="FLOAT"),
            "1 of 3 samples are not numbers",
        ),
        "flac_cut": (sound(2)[:5000], "cut off"),
    }
    source = listed(
        tmp_path / "in", good=good, **{name: data for name, (data, _) in bad.items()}
    ).parent
    with pytest.raises(ValueError, match=r"of 7 .*--max-bad 0\.01 "):
        prepare_and_read("manifest", source, tmp_path / "out")
    rows, found = prepare_and_read("manifest", source, tmp_path / "out", max_bad=0.9)
    message = reasons(found)
    assert [row["path"] for row in rows] == ["good.bin.wav"] and len(message) == len(bad)
    for name, (_, reason) in bad.items():
        assert reason in message[f"{name}.bin.wav"]


def test_a_bad_stretch_of_a_long_recording_is_one_broken_piece(tmp_path):
    values = bursts([3] * 8)
    values[60000] = np.inf
    source = listed(tmp_path / "in", long=wave(values, 8000, subtype="FLOAT")).parent
    rows, found = prepare_and_read("manifest", source, tmp_path / "out", "longest=4")
    ((path, reason),) = reasons(found).items()
    assert (
        len(rows) == 7
        and path.startswith("long.bin.wav from 6.")
        and "1 of 2" in reason
        and "at 7.500 s" in reason
    )


def test_broken_pieces_count_against_pieces_and_broken_files_against_files(tmp_path):
    """Three of 200 pieces are no reason to stop where two in a hundred may be broken; nor do the
    pieces hide that a third of the files is broken.
    """
    values = bursts([3] * 200)
    for at in (60_000, 600_000, 1_200_000):
        values[at] = np.inf
    source = listed(
        tmp_path / "in", long=wave(values, 8000, subtype="FLOAT"), short=sound(1, 1.0, 8000)
    ).parent
    rows, found = prepare_and_read("manifest", source, tmp_path / "out", "longest=4", max_bad=0.02)
    assert len(rows) == 198 and len(found["broken"]["files"]) == 3
    again = Preparation(
        "manifest",
        str(source),
        str(tmp_path / "out"),
        importing.options_of("manifest", ["longest=4"]),
        Settings(max_bad=0.02),
    )
    assert again.is_done and again.run()["broken"] == 3
    with pytest.raises(ValueError, match=r"3 of 201 .*--max-bad 0\.01 "):
        prepare_and_read("manifest", source, tmp_path / "strict", "longest=4", max_bad=0.01)
    with pytest.raises(ValueError, match=r"3 of 201 .*--max-bad 0 "):
        prepare_and_read("manifest", source, tmp_path / "none", "longest=4", max_bad=0)
    source = listed(
        tmp_path / "in",
        **{f"no{i}": b"no sound" for i in range(2)},
        long=wave(values, 8000, subtype="FLOAT"),
        short=sound(1, 1.0, 8000),
    ).parent
    with pytest.raises(ValueError, match=r"2 of 4 .*--max-bad 0\.02 "):
        prepare_and_read("manifest", source, tmp_path / "files", "longest=4", max_bad=0.02)


def test_silent_and_clipped_recordings_are_kept_and_counted(tmp_path):
    loud = np.sin(np.arange(8000) / 5) * 3
    by_split = {
        "train": {
            "quiet": np.full(8000, 20, dtype=np.int16),
            "loud": loud.clip(-1, 1),
            "fine": loud / 10,
        },
        "dev": {"zero": np.zeros(800)},
        "test": {
            "law": loud.clip(-1, 1),
            "one_of_two": np.stack([loud.clip(-1, 1), np.zeros(8000)], 1),
        },
    }
    for split, sounds in by_split.items():
        for name, values in sounds.items():
            write(
                tmp_path / f"in/{name}.wav",
                wave(values, subtype="ULAW" if name == "law" else "PCM_16"),
            )
        manifest(
            tmp_path / "in",
            [{"audio_filepath": f"{name}.wav", "text": "x"} for name in sounds],
            f"{split}_manifest.json",
        )
    rows, found = prepare_and_read("manifest", tmp_path / "in", tmp_path / "out")
    assert (
        len(rows) == 6
        and found["notes"]["silent"] == {"train": 1, "validation": 1}
        and found["notes"]["clipped"] == {"train": 1, "test": 2}
    )
    text = (tmp_path / "out/_summary.md").read_text()
    assert (
        "- silent: train 1, validation 1" in text
        and "- clipped: test 2, train 1" in text
        and "- cut out of longer recordings: none" in text
    )


def test_hours_and_speakers_are_counted_and_those_in_two_splits_told(tmp_path):
    number = 0
    for split, speakers in (("train", "aaab"), ("dev", "bc"), ("test", "ad")):
        rows = []
        for speaker in speakers:
            number += 1
            write(tmp_path / f"in/{number}.wav", sound(number, number / 4, form="WAV"))
            rows.append({"audio_filepath": f"{number}.wav", "text": "x", "speaker": speaker})
        manifest(tmp_path / "in", rows, f"{split}_manifest.json")
    work = Preparation("manifest", str(tmp_path / "in"), str(tmp_path / "out"))
    work.run()
    found = storage.read_json(tmp_path / "out/_summary.json")
    assert (
        found["recordings"]["train"]["hours"] == round((1 + 2 + 3 + 4) / 4 / 3600, 4)
        and found["recordings"]["train"]["seconds"]["100"] == 1.0
    )
    assert {
        split: (one["speakers"], one["rows_a_speaker"])
        for split, one in found["recordings"].items()
    } == {"train": (2, [1, 3]), "validation": (2, [1, 1]), "test": (2, [1, 1])}
    assert found["speakers"] == {
        "rows": {
            "a": {"test": 1, "train": 3},
            "b": {"train": 1, "validation": 1},
            "c": {"validation": 1},
            "d": {"test": 1},
        },
        "in_two_splits": {
            "speakers": 2,
            "across": {"test and train": 1, "train and validation": 1},
            "examples": ["a", "b"],
        },
    }
    said = "2 speakers stand in two splits (test and train 1, train and validation 1)"
    assert (
        f"warning: {said}" in work.describe()
        and f"Warning: {said}" in (tmp_path / "out/_summary.md").read_text()
    )
    assert "| train | 0.0007 |" in (tmp_path / "out/_summary.md").read_text()


def test_equal_recordings_with_different_transcripts_are_counted(tmp_path):
    for name in "ab":
        write(tmp_path / f"in/{name}.wav", sound(1, form="WAV"))
    manifest(tmp_path / "in", [{"audio_filepath": f"{name}.wav", "text": name} for name in "ab"])
    same = prepare_and_read("manifest", tmp_path / "in", tmp_path / "out")[1]["duplicates"]
    assert (same["files"], same["rows_beyond_the_first"], same["with_different_labels"]) == (
        1,
        1,
        1,
    )


def test_options_of_images_are_refused(tmp_path):
    source = listed(tmp_path / "in", a=sound(1)).parent
    for wrong in ({"resize": 20}, {"quality": 90}):
        with pytest.raises(
            ValueError, match="importer manifest reads recordings, not images; leave it out"
        ):
            prepare_and_read("manifest", source, tmp_path / "out", **wrong)


# ---------------------------------------------------------------- archives


def test_pieces_of_one_member_of_a_gzipped_tar_are_read_once(tmp_path, monkeypatch):
    long = sound(1, 3.0, form="WAV")
    rows = [
        {
            "audio_filepath": f"wav/{name}.wav",
            "offset": float(i),
            "duration": 1.0,
            "text": f"{name} {i}",
        }
        for i in range(3)
        for name in "ab"
    ]
    members = {
        "train_manifest.json": "".join(f"{row}\n".replace("'", '"') for row in rows).encode(),
        "wav/a.wav": long,
        "wav/b.wav": sound(2, 3.0, form="WAV"),
    }
    for name, data in members.items():
        write(tmp_path / "plain" / name, data)
    packed = write(tmp_path / "packed/all.tar.gz", gzip.compress(tar(members)))
    wanted = {
        (row["path"], row["recording_start"]): row
        for row in prepare_and_read("manifest", tmp_path / "plain", tmp_path / "one")[0]
    }
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: pytest.fail("unpacked anew"))
    got = {
        (row["path"], row["recording_start"]): row
        for row in prepare_and_read("manifest", packed, tmp_path / "two")[0]
    }
    assert got == wanted and len(got) == 6
    write(tmp_path / "bare/all.tar", tar(members))
    members_of_tar = {
        (row["path"].removeprefix("all/"), row["recording_start"]): row["audio"]
        for row in prepare_and_read("manifest", tmp_path / "bare", tmp_path / "three")[0]
    }
    assert members_of_tar == {key: row["audio"] for key, row in wanted.items()}


# ---------------------------------------------------------------- resuming


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    librispeech(tmp_path / "in")
    prepare_and_read(
        "librispeech", tmp_path / "in", tmp_path / "whole", "rate=8000", rows_per_part=2
    )
    prepare_killed(
        "librispeech", tmp_path / "in", tmp_path / "out", "rate=8000", at=3, rows_per_part=2
    )
    assert len(parts(tmp_path / "out")) == 3
    rows, found = prepare_and_read(
        "librispeech", tmp_path / "in", tmp_path / "out", "rate=8000", rows_per_part=2
    )
    assert parts(tmp_path / "out") == parts(tmp_path / "whole") and len(rows) == 10
    assert verify(str(tmp_path / "out"))["files"] == verify(str(tmp_path / "whole"))["files"]
    assert found == storage.read_json(tmp_path / "whole/_summary.json"), (
        "counts of parts that were kept are in the sums"
    )
    assert found["notes"]["written anew as FLAC"] == {"train": 8, "validation": 2}
    with pytest.raises(ValueError, match="another source"):
        prepare_and_read(
            "librispeech", tmp_path / "in", tmp_path / "out", "rate=16000", rows_per_part=2
        )


def test_broken_rows_of_the_lists_count_in_the_budget_of_a_run_that_is_complete(tmp_path):
    librispeech(tmp_path / "in")
    for speaker, chapter in (("103", "1240"), ("26", "495")):
        next(
            (tmp_path / f"in/LibriSpeech/train-clean-100/{speaker}/{chapter}").glob("*-0000.flac")
        ).unlink()
    done = Preparation(
        "librispeech", str(tmp_path / "in"), str(tmp_path / "out"), None, Settings(max_bad=0.5)
    ).run()
    assert (done["read"], done["broken"], done["rows"]) == (10, 2, {"train": 6, "validation": 2})
    with pytest.raises(ValueError, match=r"2 of 10 .*--max-bad 0\.01 "):
        Preparation("librispeech", str(tmp_path / "in"), str(tmp_path / "out")).run()


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_recordings_become_the_same_bytes(ray_here, hide_ray, tmp_path):
    librispeech(tmp_path / "in")
    words = ("librispeech", tmp_path / "in")
    with hide_ray():
        here = prepare_and_read(*words, tmp_path / "here", "rate=8000", rows_per_part=2)
    assert prepare_and_read(*words, tmp_path / "there", "rate=8000", rows_per_part=2) == here
    assert parts(tmp_path / "here") == parts(tmp_path / "there")
    assert (
        storage.read_json(tmp_path / "here" / MANIFEST)["files"]
        == storage.read_json(tmp_path / "there" / MANIFEST)["files"]
    )
    assert read(tmp_path / "here")
