"""Manifests of recordings: pieces and further fields, where recordings lie, and lines that cannot
be used.
"""

import json
import uuid

import pyarrow.parquet as pq
import pytest
from prepare.conftest import prepare_and_read, reasons, write
from prepare.speech import bad, index, librispeech, manifest, samples, sound

from pipeline.io import storage
from pipeline.prepare.engine.write import Preparation, Settings, verify


def test_manifests_of_every_split_with_pieces_and_further_fields(tmp_path):
    write(tmp_path / "wav/a.wav", sound(1, 2.0, form="WAV"))
    write(tmp_path / "wav/b.flac", sound(2, 1.0))
    write(
        tmp_path / "lists/train_manifest.json",
        "\ufeff"
        + "".join(
            json.dumps(row) + "\r\n"
            for row in [
                {
                    "audio_filepath": "../wav/a.wav",
                    "offset": 0.5,
                    "duration": 0.75,
                    "text": "Grüße",
                    "speaker": 7,
                    "label": "hi",
                    "lang": "de",
                    "start": 1,
                    "snr": 3,
                },
                {
                    "audio_filepath": str(tmp_path / "wav/b.flac"),
                    "duration": 1.04,
                    "text": "",
                    "label": 5,
                    "snr": 2.5,
                    "split": "x",
                    "_x": True,
                    "tags": ["a"],
                },
            ]
        ),
    )
    manifest(
        tmp_path / "lists",
        [{"audio_filepath": "../wav/b.flac", "offset": 0.2, "text": "rest"}],
        "dev_manifest.jsonl",
    )
    write(tmp_path / "lists/notes.json", "{}")
    rows, found = prepare_and_read(
        "manifest", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", max_bad=0
    )
    rows = {row["transcript"]: row for row in rows}
    piece, whole, rest = rows["Grüße"], rows[""], rows["rest"]
    assert (
        piece["split"],
        piece["speaker"],
        piece["label"],
        piece["lang"],
        piece["start"],
        piece["snr"],
    ) == ("train", "7", "hi", "de", 1, 3.0)
    assert (piece["recording_start"], piece["seconds"]) == (0.5, 0.75) and (
        rest["split"],
        rest["recording_start"],
        rest["seconds"],
    ) == ("validation", 0.2, 0.8)
    assert (
        samples(piece["audio"]) == samples((tmp_path / "wav/a.wav").read_bytes())[8000:20000]
    ).all()
    assert whole["audio"] == (tmp_path / "wav/b.flac").read_bytes(), (
        "a duration that is rounded is that of the file"
    )
    assert (
        whole["label"],
        whole["snr"],
        whole["manifest_split"],
        whole["manifest_x"],
        whole["tags"],
        whole["speaker"],
    ) == ("5", 2.5, "x", True, '["a"]', None)
    assert found["notes"]["manifests"] == 2 and found["classes"]["train"]["labels"] == {
        "hi": 1,
        "5": 1,
    }


def test_one_manifest_alone_and_one_without_texts(tmp_path):
    write(tmp_path / "wav/a.wav", sound(1, form="WAV"))
    rows, _ = index(
        "manifest",
        manifest(tmp_path, [{"audio_filepath": "wav/a.wav", "duration": None}], "test.jsonl"),
    )
    assert [(row["split"], row["_uri"]) for row in rows] == [
        ("test", str(tmp_path / "wav/a.wav"))
    ] and not {"transcript", "speaker"} & rows[0].keys()
    assert index("manifest", tmp_path / "test.jsonl", "split=train")[0][0]["split"] == "train"
    manifest(tmp_path / "lists", [{"audio_filepath": "a.wav"}], "dev.jsonl")
    for root in ("wav", str(tmp_path / "wav")):
        rows, _ = index("manifest", tmp_path, f"root={root}", "manifests=lists/dev.jsonl")
        assert [(row["split"], row["path"]) for row in rows] == [("validation", "wav/a.wav")]
    with pytest.raises(
        ValueError, match=r"no dev\.json in .*; did you mean lists/dev\.jsonl or test\.jsonl"
    ):
        index("manifest", tmp_path, "manifests=dev.json")


def test_a_recording_outside_that_changes_makes_another_source(tmp_path):
    write(tmp_path / "wav/a.wav", sound(1, form="WAV"))
    source = manifest(tmp_path / "lists", [{"audio_filepath": str(tmp_path / "wav/a.wav")}])
    before = index("manifest", source)[1].fingerprint
    assert index("manifest", source)[1].fingerprint == before
    write(tmp_path / "wav/a.wav", sound(2, 0.7, form="WAV"))
    assert index("manifest", source)[1].fingerprint != before


def test_manifests_with_what_is_wrong_in_them(tmp_path):
    for name in "ab":
        write(tmp_path / f"in/{name}.wav", sound(ord(name), form="WAV"))
    write(tmp_path / "secret.wav", sound(1, form="WAV"))
    good = [{"audio_filepath": "a.wav", "text": "x"}, {"audio_filepath": "b.wav", "text": "y"}]
    wrong = [
        (b"no json", "not JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "no text in field 'audio_filepath'"),
        (b'{"audio_filepath": 3}', "no text in field"),
        (b'{"audio_filepath": "c.wav"}', "no recording c.wav in"),
        (b'{"audio_filepath": "../secret.wav"}', "leads outside of"),
        (b'{"audio_filepath": "/no/such.wav"}', "no recording /no/such.wav"),
        (b'{"audio_filepath": "a.wav", "duration": -1}', "duration -1 is no number"),
        (b'{"audio_filepath": "a.wav", "offset": NaN}', "offset nan is no number"),
        (b'{"audio_filepath": "a.wav", "text": 5}', "text 5 is no text"),
        (b'{"audio_filepath": "a.wav", "text": "\\u0000"}', "a NUL character in text"),
        (b'{"audio_filepath": "\xff"}', "not UTF-8 text"),
        (
            b'{"audio_filepath": "a.wav", "text": "z"}',
            "stands in test too, with another transcript ('x')",
        ),
        (b"[" * 100000, "not JSON"),
    ]
    write(tmp_path / "in/train_manifest.json", b"\n".join(line for line, _ in wrong) + b"\n")
    manifest(tmp_path / "in", good, "test_manifest.json")
    rows, found = index("manifest", tmp_path / "in")
    assert {(row["path"], row["split"], row["transcript"]) for row in rows} == {
        ("a.wav", "test", "x"),
        ("b.wav", "test", "y"),
    }
    message = sorted(
        (row["path"], row["reason"]) for row in found.invalid if row["path"] != "a.wav"
    )
    at = {int(path.rpartition(":")[2]): reason for path, reason in message} | {
        13: bad(found)["a.wav"][1]
    }
    assert len(at) == len(found.invalid) == len(wrong)
    for number, (_, reason) in enumerate(wrong, 1):
        assert reason in at[number], number


def test_a_piece_behind_its_recordings_end_is_broken(tmp_path):
    write(tmp_path / "in/a.wav", sound(1, 1.0, form="WAV"))
    manifest(
        tmp_path / "in",
        [
            {"audio_filepath": "a.wav", "offset": 0.5, "duration": 2.0, "text": "x"},
            {"audio_filepath": "a.wav", "duration": 0.5, "text": "y"},
        ],
    )
    rows, found = prepare_and_read("manifest", tmp_path / "in", tmp_path / "out")
    assert [(row["transcript"], row["seconds"]) for row in rows] == [("y", 0.5)]
    assert reasons(found) == {
        "a.wav from 0.50 s to 2.50 s": "a piece from 0.5 s on, 2 s long, of a recording of 1.00 s"
    }


def test_recordings_on_s3(tmp_path, s3_server):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    librispeech(tmp_path / "in")
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file():
            storage.write_bytes(
                f"{root}/raw/{path.relative_to(tmp_path / 'in')}", path.read_bytes()
            )
    done = Preparation(
        "librispeech", f"{root}/raw", f"{root}/out", None, Settings(rows_per_part=4)
    ).run()
    assert done["rows"] == {"train": 8, "validation": 2} and verify(f"{root}/out") == done
    name = next(
        uri for uri in storage.list_files(f"{root}/raw") if uri.endswith("26-495-0002.flac")
    )
    storage.write_bytes(
        f"{root}/m/train_manifest.json",
        json.dumps({"audio_filepath": name, "offset": 0.1, "duration": 0.1}).encode(),
    )
    work = Preparation("manifest", f"{root}/m", str(tmp_path / "out"))
    work.run()
    (row,) = pq.read_table(next((tmp_path / "out").glob("*.parquet"))).to_pylist()
    assert (samples(row["audio"]) == samples(storage.read_bytes(name))[1600:3200]).all()


def test_a_manifest_without_any_good_line_says_why(tmp_path):
    source = manifest(tmp_path, [{"audio_filepath": "a.wav"}, {"audio_filepath": "b.wav"}]).parent
    with pytest.raises(
        ValueError,
        match=r"no recording that can be used, 2 broken ones\. First ones: "
        r"train_manifest\.json:1: no recording a\.wav in .*; tr",
    ):
        index("manifest", source)
