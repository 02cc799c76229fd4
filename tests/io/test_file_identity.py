"""What identifies a file: all of its bytes, read once; and what happens when it changes, or when
the cache is damaged.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from pipeline.io import file_identity, storage

LARGE = file_identity.PIECE_BYTES + (3 << 20)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONETOMANY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "identity-1.sqlite"


def old(path, seconds: float = 100.0):
    """Set the time of change of a file back, as of one that was written long ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))


@pytest.fixture
def reads(monkeypatch):
    """Files that are truly read, one entry a reading."""
    seen, whole, piece = [], file_identity.hash_whole, file_identity.hash_piece
    monkeypatch.setattr(
        file_identity, "hash_whole", lambda uri, stamp: (seen.append(uri), whole(uri, stamp))[1]
    )
    monkeypatch.setattr(
        file_identity, "hash_piece", lambda uri, number: (seen.append(uri), piece(uri, number))[1]
    )
    return seen


@pytest.fixture
def aged(monkeypatch):
    """As if every file had been left alone for long before it is read."""
    monkeypatch.setattr(file_identity, "GRAIN_SECONDS", -1e6)


@pytest.mark.slow
def test_every_byte_of_a_large_file_counts(tmp_path):
    path, seen = tmp_path / "large", []
    with open(path, "wb") as file:
        file.truncate(LARGE)
    for place in (
        None,
        0,
        20 << 20,
        file_identity.PIECE_BYTES - 1,
        file_identity.PIECE_BYTES,
        LARGE - 1,
    ):
        if place is not None:
            with open(path, "r+b") as file:
                file.seek(place)
                file.write(b"x")
        seen.append(file_identity.fingerprint(path))
    assert len(set(seen)) == 6
    assert all(one.startswith(f"{LARGE}-sha256-pieces:") for one in seen)


def test_a_file_of_one_piece_has_its_plain_sha256(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"abc" * 1000)
    assert file_identity.fingerprint(path) == f"3000-sha256:{storage.sha256(path)[0]}"


def test_a_copy_is_the_same_and_order_is_kept(tmp_path):
    names = [tmp_path / f"{i}.bin" for i in range(300)]
    for i, name in enumerate(names):
        name.write_bytes(b"%d" % i)
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    first = [file.content for file in file_identity.identify(map(str, names))]
    second = [
        file.content
        for file in file_identity.identify(str(tmp_path / "copy" / name.name) for name in names)
    ]
    assert first == second and len(set(first)) == 300
    assert [
        file.uri for file in file_identity.identify([str(names[2]), str(names[1]), str(names[2])])
    ] == [str(names[i]) for i in (2, 1, 2)]


def test_a_file_is_read_once(tmp_path, reads, aged, own_cache):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = file_identity.fingerprint(path)
    assert file_identity.fingerprint(path) == first and reads == [str(path)]
    path.write_bytes(b"two")
    assert file_identity.fingerprint(path) != first and len(reads) == 2
    assert own_cache.stat().st_mode & 0o077 == 0, "others may not write what is believed"
    assert str(path).encode() not in own_cache.read_bytes(), "names of files stay private"


def test_a_change_that_keeps_size_and_time_is_found(tmp_path, aged):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"1,0,1,0\n")
    before, first = path.stat(), file_identity.fingerprint(path)
    time.sleep(0.02)
    with open(path, "r+b") as file:
        file.write(b"0,0,1,1\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert file_identity.fingerprint(path) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads):
    """A second change within the clock's grain would have the same time."""
    path = tmp_path / "a"
    path.write_bytes(b"one")
    file_identity.fingerprint(path)
    file_identity.fingerprint(path)
    assert len(reads) == 2


def test_an_entry_that_was_altered_is_not_believed(tmp_path, reads, aged, own_cache):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = file_identity.fingerprint(path)
    with sqlite3.connect(own_cache) as db:
        assert db.execute("UPDATE files SET content = '3-sha256:0'").rowcount == 1
    db.close()
    assert file_identity.fingerprint(path) == first and len(reads) == 2
    assert file_identity.fingerprint(path) == first and len(reads) == 2, "the entry was mended"


@pytest.mark.parametrize("damage", [b"not a database" * 100, b"", None])
def test_a_damaged_cache_is_made_anew(tmp_path, reads, aged, own_cache, damage, caplog):
    paths = [tmp_path / str(i) for i in range(400)]
    for path in paths:
        path.write_bytes(path.name.encode())
    names = list(map(str, paths))
    first = file_identity.identify(names)
    data = bytearray(own_cache.read_bytes())
    data[4096:] = bytes(byte ^ 0x55 for byte in data[4096:])  # all pages but the first
    own_cache.write_bytes(data if damage is None else damage)
    assert file_identity.identify(names) == first and len(reads) == 800
    assert file_identity.identify(names) == first and len(reads) == 800, "it is of use again"
    assert ("made anew" in caplog.text) == (damage != b"")


def test_flipped_bits_of_the_cache_change_no_identity(tmp_path, aged, own_cache):
    import random

    names = []
    for i in range(200):
        (tmp_path / str(i)).write_bytes(b"%d" % i)
        names.append(str(tmp_path / str(i)))
    first, whole, draw = file_identity.identify(names), own_cache.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        own_cache.write_bytes(data)
        assert file_identity.identify(names) == first


def test_without_a_place_for_the_cache_files_are_read_each_time(
    tmp_path, reads, aged, monkeypatch, caplog
):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ONETOMANY_CACHE", str(tmp_path / "file"))
    (tmp_path / "a").write_bytes(b"one")
    assert (
        file_identity.fingerprint(tmp_path / "a") == file_identity.fingerprint(tmp_path / "a")
        and len(reads) == 2
    )
    assert "cannot be used" in caplog.text


def test_a_user_without_a_home_folder_reads_files_each_time(
    tmp_path, reads, aged, monkeypatch, caplog
):
    """A container under a number of a user that it has no entry for."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONETOMANY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(file_identity.Path, "home", no_home)
    (tmp_path / "a").write_bytes(b"one")
    assert (
        file_identity.fingerprint(tmp_path / "a") == file_identity.fingerprint(tmp_path / "a")
        and len(reads) == 2
    )
    assert (
        "Could not determine home directory" in caplog.text
        and "set ONETOMANY_CACHE or HOME" in caplog.text
    )


def test_a_name_with_nul_is_absent(tmp_path):
    with pytest.raises(storage.StorageError, match="is the name of no file"):
        file_identity.identify(["a\0b"])
    files = file_identity.identify(["a\0b"], absent_ok=True)
    assert files[0].content == file_identity.ABSENT
    file_identity.check_unchanged(files)


def test_processes_share_the_cache(tmp_path, aged, own_cache):
    for i in range(40):
        (tmp_path / f"{i}.bin").write_bytes(b"%d" % i)
    code = (
        "import sys; from pipeline.io import file_identity as identity; "
        "identity.GRAIN_SECONDS = -1e6\n"
        "for _ in range(5): print(identity.identify([f'{sys.argv[1]}/{i}.bin' for i in "
        "range(40)])[7].content)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = {line for process in running for line in process.communicate()[0].split()}
    assert said == {file_identity.fingerprint(tmp_path / "7.bin")} and all(
        process.returncode == 0 for process in running
    )
    with sqlite3.connect(own_cache) as db:
        assert db.execute("SELECT count(*) FROM files").fetchone() == (40,)
    db.close()


def test_the_cache_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    assert file_identity.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ONETOMANY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert file_identity.cache_folder() == tmp_path / "onetomany"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert file_identity.cache_folder() == tmp_path / "home/.cache/onetomany"


def test_stat_reads_nothing(tmp_path, reads):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    old(path)
    first = file_identity.fingerprint(path, "stat")
    assert first == f"3-stat:{path.stat().st_mtime_ns}" and not reads
    old(path)
    assert file_identity.fingerprint(path, "stat") != first


def test_what_is_no_file_is_reported(tmp_path):
    with pytest.raises(storage.NotFoundError, match="gone"):
        file_identity.identify([str(tmp_path / "gone")])
    with pytest.raises(storage.StorageError, match="is a folder"):
        file_identity.identify([str(tmp_path)])
    assert (
        file_identity.identify([str(tmp_path / "gone")], absent_ok=True)[0].content
        == file_identity.ABSENT
    )


def test_a_file_that_changes_in_use_is_an_error_that_names_it(tmp_path):
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name in names:
        storage.write_bytes(name, b"one")
    files = file_identity.identify(names)
    file_identity.check_unchanged(files)
    old(tmp_path / "b")  # touched: it still holds the same
    file_identity.check_unchanged(files)
    with file_identity.open_unchanged(files[1]) as handle:
        assert handle.read() == b"one"
    storage.write_bytes(names[1], b"two")
    for refuse in (
        lambda: file_identity.check_unchanged(files),
        lambda: file_identity.open_unchanged(files[1]),
    ):
        with pytest.raises(
            file_identity.ChangedFileError,
            match=f"^{names[1]} was changed while it was in use: it holds something else",
        ):
            refuse()
    os.remove(names[1])
    with pytest.raises(
        file_identity.ChangedFileError,
        match=f"^{names[1]} was changed while it was in use: it is gone",
    ):
        file_identity.check_unchanged(files)


def test_a_touched_file_known_by_stat_has_changed(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    files = file_identity.identify([str(tmp_path / "a")], "stat")
    file_identity.check_unchanged(files)
    old(tmp_path / "a")
    with pytest.raises(
        file_identity.ChangedFileError, match="its size or time of change is another one"
    ):
        file_identity.check_unchanged(files)


def test_a_file_that_is_written_while_it_is_hashed_is_an_error(tmp_path, monkeypatch):
    path, real = tmp_path / "a", file_identity.hash_bytes
    path.write_bytes(b"one")

    def hash_bytes(file, most, digest):
        real(file, most, digest)
        path.write_bytes(b"more than before")

    monkeypatch.setattr(file_identity, "hash_bytes", hash_bytes)
    with pytest.raises(
        file_identity.ChangedFileError, match=f"^{path} was changed while it was read"
    ):
        file_identity.fingerprint(path)


def test_long_reading_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(file_identity, "PROGRESS_AFTER_SECONDS", -1.0)
    for i in range(3):
        (tmp_path / str(i)).write_bytes(b"x")
    lines = []
    with file_identity.progress_to(lines.append):
        file_identity.identify(str(tmp_path / str(i)) for i in range(3))
    assert lines[-1].endswith("3 of 3 files, 0 of 0 MiB")
    file_identity.fingerprint(tmp_path / "0")
    assert len(lines) == 3, "outside of it nothing is shown"


def test_objects_on_s3_are_known_by_their_etags(s3_server):
    root = f"{s3_server}/identity"
    names = [f"{root}/many/{i}.bin" for i in range(file_identity.LISTED_FILES + 1)] + [
        f"{root}/one/a.bin",
        f"{root}/gone.bin",
    ]
    for name in names[:-1]:
        storage.write_bytes(name, name[-6:].encode())
    files = file_identity.identify(names, absent_ok=True)
    assert (
        files[0].content
        == file_identity.fingerprint(names[0])
        == f"6-etag:{storage.file_info(names[0])['ETag'].strip(chr(34))}"
    )
    assert files[-1].content == file_identity.ABSENT and len(
        {file.content for file in files}
    ) == len(files)
    with pytest.raises(storage.NotFoundError):
        file_identity.identify(names)
    file_identity.check_unchanged(files)
    with file_identity.open_unchanged(files[0]) as handle:
        assert handle.read() == b"/0.bin"
    storage.write_bytes(names[0], b"/1.bin")
    for refuse in (
        lambda: file_identity.check_unchanged(files),
        lambda: file_identity.open_unchanged(files[0]),
    ):
        with pytest.raises(file_identity.ChangedFileError, match=names[0]):
            refuse()


def test_keys_with_an_empty_part_are_objects_of_their_own(s3_server):
    root = f"{s3_server}/identity-slashes"
    doubled = [f"{root}//{i}.bin" for i in range(file_identity.LISTED_FILES + 1)]
    single = [f"{root}/{i}.bin" for i in range(file_identity.LISTED_FILES + 1)]
    for name in doubled:
        storage.write_bytes(name, b"a longer text")
    for name in single:
        storage.write_bytes(name, b"text")
    assert {file.content.partition("-")[0] for file in file_identity.identify(doubled)} == {"13"}
    assert {file.content.partition("-")[0] for file in file_identity.identify(single)} == {"4"}
