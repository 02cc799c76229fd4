"""Folders of sound brought into Parquet: a row a recording, or a piece of one; long, broken and
empty files; on S3.
"""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from pipeline.config.schema import Data
from pipeline.data import manifests as m
from pipeline.data import to_parquet as made
from pipeline.io import storage
from pipeline.modalities.audio import Audio, AudioOptions

MEL = {"features": "mel", "mean": [0.0] * 80, "std": [1.0] * 80}


@pytest.fixture
def imports(tmp_path):
    return str(tmp_path / "imports")


def sound(
    path: Path,
    seconds: float,
    rate: int = 8000,
    pauses: tuple[float, ...] = (),
    seed: int = 0,
    **words,
) -> Path:
    samples = (
        np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
    )
    for at in pauses:
        samples[round((at - 0.3) * rate) : round((at + 0.3) * rate)] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **words)
    return path


def rows_of(uri, imports, form: str = "auto") -> dict:
    built = m.build(str(uri), form, imports)
    return m.read_columns(m.Selection(built), built.schema.names).to_pydict()


def test_a_folder_gives_a_row_a_recording(tmp_path, imports):
    folder = tmp_path / "words"
    for name, seconds in (
        ("yes/b.flac", 1.5),
        ("no/a.wav", 1.0),
        ("no/deep/c.ogg", 0.5),
        ("yes/d.MP3", 2.0),
        ("yes/e.opus", 1.0),
    ):
        sound(
            folder / name,
            seconds,
            **(
                {"format": "MP3"}
                if name.endswith("MP3")
                else {"format": "OGG", "subtype": "OPUS"}
                if "opus" in name
                else {}
            ),
        )
    (folder / "yes/.hidden.wav").write_bytes(b"")
    (folder / "README.md").write_text("no sound")
    found = rows_of(folder, imports)
    assert list(found) == ["audio", "label", "recording", "start", "seconds"]
    assert found["recording"] == [
        "no/a.wav",
        "no/deep/c.ogg",
        "yes/b.flac",
        "yes/d.MP3",
        "yes/e.opus",
    ]
    assert found["audio"] == [str(folder / name) for name in found["recording"]]
    assert found["label"] == ["no", "deep", "yes", "yes", "yes"] and found["start"] == [0.0] * 5
    assert found["seconds"] == pytest.approx([1.0, 0.5, 1.5, 2.0, 1.0], abs=0.01)
    assert rows_of(str(folder / "*" / "*.wav"), imports)["label"] == ["no"]
    assert rows_of(folder / "yes" / "b.flac", imports)["recording"] == ["b.flac"]


def test_a_long_recording_is_cut_at_silence(tmp_path, imports):
    path = sound(tmp_path / "x" / "long.flac", 80.0, pauses=(21.0, 26.0, 50.0))
    sound(tmp_path / "x" / "short.wav", 30.0)
    found = rows_of(tmp_path / "x", imports)
    assert found["recording"] == ["long.flac"] * 3 + ["short.wav"]
    ends = [
        start + seconds for start, seconds in zip(found["start"], found["seconds"], strict=True)
    ]
    assert found["start"][:3] == pytest.approx([0.0, ends[0], ends[1]]) and ends[
        2:
    ] == pytest.approx([80.0, 30.0])
    assert 25.7 < ends[0] < 26.3 or 20.7 < ends[0] < 21.3
    assert 49.7 < ends[1] < 50.3 and max(found["seconds"]) <= 30.0
    table = m.Reader(
        m.build(str(tmp_path / "x"), "audio", imports), ["audio", "start", "seconds"]
    ).take(np.arange(4))
    arrays, bad = Audio(AudioOptions(rate=8000), MEL).decode(
        table, {"audio": "audio", "start": "start", "seconds": "seconds"}
    )
    assert bad == [""] * 4
    whole, _ = soundfile.read(path, dtype="int16")
    assert np.array_equal(np.concatenate(list(arrays["audio"][:3])), whole)


def test_a_broken_file_is_one_bad_row(tmp_path, imports):
    folder = tmp_path / "x"
    whole = sound(folder / "a.wav", 1.0).read_bytes()
    for name, data in (("b.wav", b""), ("c.flac", b"no sound"), ("d.wav", whole[:-4000])):
        (folder / name).write_bytes(data)
    sound(folder / "e.wav", 0.0)
    sound(folder / "f.wav", 1.0)
    table = m.Reader(m.build(str(folder), "auto", imports), ["audio", "start", "seconds"]).take(
        np.arange(6)
    )
    assert table["start"].to_pylist() == [0.0, None, None, None, None, 0.0] and table[
        "seconds"
    ].to_pylist() == [1.0, None, None, None, None, 1.0]
    modality, columns = (
        Audio(AudioOptions(), MEL),
        {"audio": "audio", "start": "start", "seconds": "seconds"},
    )
    _, bad = modality.decode(table, columns)
    assert [reason[:20] for reason in bad] == [
        "",
        "the file is empty (0",
        "no sound file that l",
        "0.75 s of sound, its",
        "no samples",
        "",
    ]
    assert modality.costs(table, columns).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_long_recording_that_is_broken_is_not_called_too_long(tmp_path, imports):
    """Its header says how long it is; that it was cut off is seen only where it is cut at
    silence.
    """
    folder = tmp_path / "x"
    whole = sound(folder / "a.flac", 60.0).read_bytes()
    mp3 = sound(folder / "b.mp3", 60.0, format="MP3").read_bytes()
    (folder / "a.flac").write_bytes(whole[: len(whole) // 2])
    (folder / "b.mp3").write_bytes(mp3[: len(mp3) // 2])
    (folder / "c.flac").write_bytes(
        whole[: len(whole) // 2] + bytes(500) + whole[len(whole) // 2 + 500 :]
    )
    table = m.Reader(m.build(str(folder), "auto", imports), ["audio", "start", "seconds"]).take(
        np.arange(3)
    )
    assert table["start"].to_pylist() == [None] * 3
    modality, columns = (
        Audio(AudioOptions(), MEL),
        {"audio": "audio", "start": "start", "seconds": "seconds"},
    )
    for reason, part in zip(
        modality.decode(table, columns)[1],
        (
            "broken FLAC file, cut off",
            "its header promises 60.00 s: the file was cut",
            "broken FLAC",
        ),
        strict=True,
    ):
        assert part in reason and "longer than" not in reason and "more than" not in reason
    sound(tmp_path / "long.wav", 60.0)
    long = pa.table(
        {
            "audio": [str(tmp_path / "long.wav")],
            "start": pa.nulls(1, pa.float64()),
            "seconds": pa.nulls(1, pa.float64()),
        }
    )
    assert (
        "60.00 s long, more than 40 s: cut long recordings" in modality.decode(long, columns)[1][0]
    )


def test_the_import_is_kept_and_made_anew_for_another_file(tmp_path, imports, monkeypatch):
    sound(tmp_path / "x" / "a.wav", 1.0)
    first = m.build(str(tmp_path / "x"), "auto", imports)
    monkeypatch.setattr(made.pq, "write_table", None)
    assert m.build(str(tmp_path / "x"), "auto", imports).fingerprint == first.fingerprint
    monkeypatch.undo()
    os.utime(sound(tmp_path / "x" / "a.wav", 2.0), ns=(1, 1))
    again = m.build(str(tmp_path / "x"), "auto", imports)
    assert again.fingerprint != first.fingerprint and rows_of(tmp_path / "x", imports)[
        "seconds"
    ] == [2.0]
    monkeypatch.setattr(made, "LONGEST_SECONDS", 1.5)
    assert len(rows_of(tmp_path / "x", imports)["seconds"]) == 2
    assert m.build(str(tmp_path / "x"), "auto", imports).fingerprint != again.fingerprint


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path, imports):
    for name in ("a", "b"):
        os.utime(sound(tmp_path / name / "yes" / "x.wav", 1.0), ns=(5, 5 if name == "a" else 7))
    assert (
        m.build(str(tmp_path / "a"), "auto", imports).fingerprint
        == m.build(str(tmp_path / "b"), "auto", imports).fingerprint
    )


def test_kinds_are_not_mixed(tmp_path, imports):
    sound(tmp_path / "x" / "a.wav", 1.0)
    (tmp_path / "x" / "a.trans.txt").write_text("one")
    with pytest.raises(ValueError, match=r"files of several kinds \(audio, text\)"):
        rows_of(tmp_path / "x", imports)
    assert rows_of(tmp_path / "x", imports, "audio")["recording"] == ["a.wav"]
    # type: ignore[arg-type]
    assert Data(uri="x", format="audio", modality="audio").format == "audio"


@pytest.mark.slow
def test_two_hours_in_one_file_in_bounded_memory(tmp_path, imports):
    rng, path = np.random.default_rng(0), tmp_path / "x" / "long.wav"
    path.parent.mkdir()
    minute = (rng.uniform(-0.5, 0.5, 60 * 8000) * 32767).astype(np.int16)
    for at in (10, 28, 50):
        minute[round((at - 0.2) * 8000) : round((at + 0.2) * 8000)] = 0
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(120):
            file.write(minute)
    tracemalloc.start()
    m.build(str(tmp_path / "x"), "auto", imports)
    peak = tracemalloc.get_traced_memory()[1]
    # before Arrow's threads read: Python 3.11 crashes where one of them is at work then (gh-128679)
    tracemalloc.stop()
    found = rows_of(tmp_path / "x", imports)
    assert peak < 40 << 20 < path.stat().st_size and sum(found["seconds"]) == pytest.approx(7200)
    starts = np.array(found["start"][1:-1]) % 60
    assert (
        max(found["seconds"]) <= 30
        and np.abs(starts[:, None] - np.array([10, 28, 50])).min(1).max() < 0.3
    )


def test_folders_on_s3(s3_server, tmp_path):
    place = f"{s3_server}/test-imports-audio"
    for name, seconds in (("in/yes/a.wav", 1.0), ("in/no/b.flac", 40.0)):
        storage.write_bytes(
            f"{place}/{name}",
            sound(tmp_path / name, seconds, pauses=(20.0,) if seconds > 30 else ()).read_bytes(),
        )
    storage.write_bytes(f"{place}/in/yes/c.wav", b"broken")
    found = rows_of(f"{place}/in", f"{place}/imports")
    assert found["recording"] == ["no/b.flac", "no/b.flac", "yes/a.wav", "yes/c.wav"] and found[
        "label"
    ] == ["no", "no", "yes", "yes"]
    assert (
        found["audio"][2] == f"{place}/in/yes/a.wav"
        and found["start"][1] == pytest.approx(20.0, abs=0.2)
        and found["start"][3] is None
    )
    table = m.Reader(
        m.build(f"{place}/in", "audio", f"{place}/imports"), ["audio", "start", "seconds"]
    ).take(np.arange(4))
    arrays, bad = Audio(AudioOptions(rate=8000), MEL).decode(
        table, {"audio": "audio", "start": "start", "seconds": "seconds"}
    )
    assert [bool(reason) for reason in bad] == [False, False, False, True] and sum(
        len(row) for row in arrays["audio"]
    ) == 41 * 8000
