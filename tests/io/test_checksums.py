"""What was written is read back as it was written, or its damage is named; what can be made again
is made again.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import manifests
from pipeline.io import atomic_folder, checksums, file_identity, storage
from pipeline.io.storage import DamagedError
from tests.benchmarks import bit_flips, killed_writers


@pytest.fixture
def message():
    lines: list[str] = []
    with checksums.notifications_to(lines.append):
        yield lines


def flip(path: Path, place: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_forty_flipped_bits_are_found_or_harmless(tmp_path, monkeypatch):
    """In everything that a job, a source and prepare write; tests/benchmarks/bit_flips.py tries
    500.
    """
    monkeypatch.setenv("ONETOMANY_CACHE", str(tmp_path / "cache"))
    wrong: list[str] = []
    table = bit_flips.flips(40, 7, tmp_path, wrong.append)
    assert not wrong and all(found.total() >= 2 for found in table.values())
    assert sum(found["detected"] for found in table.values()) >= 25


def test_ten_killed_writers_leave_whole_files_and_nothing_else(tmp_path):
    """tests/benchmarks/killed_writers.py kills 200."""
    table = killed_writers.kills(10, 3, tmp_path)
    assert all(set(found) <= {"whole", "absent"} for found in table.values()), table


def test_a_document_comes_back_as_it_was_and_its_damage_is_named(root, message):
    uri, value = (
        storage.join(root, "record.json"),
        {
            "value": 0.1 + 0.2,
            "nan": float("inf"),
            "rows": [1, None, "ä"],
            "sha256": "of something else",
        },
    )
    with pytest.raises(storage.NotFoundError):
        checksums.read_document(uri)
    assert checksums.document_or_none(uri, "it is made again") is None and not message
    checksums.write_document(uri, value)
    assert checksums.read_document(uri) == value and not checksums.is_damaged(uri)
    text = storage.read_bytes(uri)
    for damaged in (
        text.replace(b"0.30000000000000004", b"0.3000000000000001"),
        text.replace(b"content_sha256", b"contend_sha256"),
        text[:-9],
        b"[1]",
        text.replace(b"{", b"\xfb", 1),
    ):
        assert damaged != text
        storage.write_bytes(uri, damaged)
        with pytest.raises(DamagedError, match=r"record\.json"):
            checksums.read_document(uri)
        assert checksums.is_damaged(uri)
    for _ in range(2):
        assert checksums.document_or_none(uri, "it is made again") is None
    assert (
        len(message) == 1
        and message[0].startswith("warning: ")
        and message[0].endswith(": it is made again")
    ), "said once"


def test_a_document_of_an_earlier_version_is_read_as_it_is(root):
    uri = storage.join(root, "record.json")
    storage.write_json(uri, {"rows": []})
    assert checksums.read_document(uri) == {"rows": []}


def test_kept_bytes_come_back_or_are_missing(tmp_path, message):
    uri = str(tmp_path / "features")
    assert checksums.read_checked_or_none(uri, "it is made again") is None and not message
    checksums.write_checked(uri, b"numbers" * 100)
    assert checksums.read_checked_or_none(uri, "") == b"numbers" * 100
    for name in ("content", "manifest.json"):
        checksums.write_checked(uri, b"numbers" * 100)
        flip(tmp_path / "features" / name, 40)
        assert checksums.read_checked_or_none(
            uri, "it is made again"
        ) is None and message.pop().endswith(": it is made again")
        with pytest.raises(DamagedError):
            checksums.read_checked(uri)


def test_a_folder_is_read_once_and_damage_is_found_by_what_it_holds(tmp_path, monkeypatch):
    """A file of several pieces is known by the digest of its pieces, which its manifest has."""
    monkeypatch.setattr(file_identity, "PIECE_BYTES", 1000)
    monkeypatch.setattr(file_identity, "GRAIN_SECONDS", 0.0)
    uri = str(tmp_path / "folder")
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 20)
    atomic_folder.commit_folder(uri, {"large": source, "small": b"x"}, {})
    manifest = atomic_folder.open_folder(uri)
    assert (
        "sha256_pieces" in manifest["files"]["large"]
        and "sha256_pieces" not in manifest["files"]["small"]
    )
    monkeypatch.setattr(storage, "sha256", lambda uri: pytest.fail("the whole file is read again"))
    checksums.check_folder(uri, manifest)
    monkeypatch.undo()
    flip(tmp_path / "folder/large")
    with pytest.raises(DamagedError, match="folder/large is damaged: SHA-256"):
        checksums.check_folder(uri, manifest)
    (tmp_path / "folder/small").unlink()
    with pytest.raises(DamagedError):
        checksums.check_folder(uri, manifest)
    assert checksums.intact_folder(uri, "") is None
    assert (
        json.loads((tmp_path / "folder/manifest.json").read_text())["sha256"] == manifest["sha256"]
    )


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b"\xff not JSON",
        b'{"files": {"a.parquet": {"rows": 1}}, "format_version": 2, "sha256": "x"}',
    ],
)
def test_a_manifest_of_another_program_is_not_compared(tmp_path, caplog, content):
    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "_manifest.json").write_bytes(content)
    assert manifests.build(str(tmp_path), "auto", str(tmp_path / "imports")).num_rows == 2
    assert "_manifest.json is no manifest of `onetomany prepare`" in caplog.text


def test_a_flipped_bit_in_the_manifest_of_prepare_is_refused(tmp_path):
    (tmp_path / "raw.csv").write_text(
        "text,label\n" + "\n".join(f"row {i},{i % 3}" for i in range(50))
    )
    read = bit_flips.Prepare(str(tmp_path / "raw.csv"), str(tmp_path / "out"))
    read()
    path = tmp_path / "out/_manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedError, match=r"_manifest\.json"):
            manifests.build(str(tmp_path / "out"), "auto", str(tmp_path / "imports"))


def test_files_of_a_folder_on_s3_are_known_without_being_read(s3_server, tmp_path, monkeypatch):
    """Packed corpora have many small parts, and each start of a job asks whether all are whole."""
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    (tmp_path / "source").write_bytes(b"handed over")
    atomic_folder.commit_folder(uri, {"a": b"1", "deep/b": b"2", "c": tmp_path / "source"}, {})
    manifest = atomic_folder.open_folder(uri)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sha256", lambda uri: pytest.fail(f"{uri} is read"))
        checksums.check_folder(uri, manifest)
    old = {
        name: {k: v for k, v in entry.items() if k != "etag"}
        for name, entry in manifest["files"].items()
    }
    checksums.check_folder(uri, {"files": old})  # as earlier versions wrote it: its files are read
    storage.write_bytes(f"{uri}/deep/b", b"3")
    for files in (old, manifest["files"]):
        with pytest.raises(DamagedError, match="deep/b is damaged: SHA-256"):
            checksums.check_folder(uri, {"files": files})


def test_a_damaged_part_of_prepare_is_refused_by_a_job_and_made_again_by_prepare(tmp_path, message):
    (tmp_path / "raw.csv").write_text(
        "text,label\n" + "\n".join(f"row {i},{i % 3}" for i in range(50))
    )
    read = bit_flips.Prepare(str(tmp_path / "raw.csv"), str(tmp_path / "out"))
    _, rows = read()
    (part,) = (tmp_path / "out").glob("*.parquet")
    flip(part, 60)
    with pytest.raises(
        DamagedError,
        match=rf"{part.name} is not what `onetomany prepare` wrote: ",
    ):
        read()
    (tmp_path / "out/_manifest.json").unlink()  # prepare is given again, to go on
    assert read()[1] == rows and part.name in message[0] and message[0].endswith("it is made again")
