"""pipeline.io.storage: the same promises on a local folder and on an S3 server."""

import errno
import io
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import Flaky, run_python

from pipeline.io import atomic_folder, file_identity, storage
from pipeline.io.storage import NotFoundError, StorageError
from pipeline.io.threads import threaded_map

# --- names ---


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (("s3://b/p/", "x", "/y/z"), "s3://b/p/x/y/z"),
        (("s3://", "b"), "s3://b"),
        (("s3://b", "", "k"), "s3://b/k"),
        (("runs", "job"), "runs/job"),
        (("/", "a"), "/a"),
        (("", "a", "b"), "a/b"),
        (("file:///d/", "a"), "file:///d/a"),
        (("a",), "a"),
    ],
)
def test_join(parts, whole):
    assert storage.join(*parts) == whole


def test_schemes():
    assert storage.is_remote("s3://b/k")
    assert not any(storage.is_remote(uri) for uri in ("runs/x", "file:///x", Path("/x"), "a:b/c"))
    with pytest.raises(
        StorageError, match=r"ftp:// is not supported; use a folder, file:// or s3://"
    ):
        storage.filesystem("ftp://b/k")
    with pytest.raises(StorageError, match=r"write s3://bucket/key"):
        storage.read_bytes(Path("s3://bucket/key"))  # pathlib makes it s3:/bucket/key
    for nowhere in ("", "s3://", "s3:///key"):
        with pytest.raises(StorageError, match="names no place"):
            storage.exists(nowhere)


# --- files, locally and on S3 ---


def test_bytes_json_and_sizes(root):
    uri = storage.join(root, "deep/er/file.bin")
    assert not storage.exists(uri)
    for data in (b"one", b"", b"three" * 1000):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data and storage.size(uri) == len(data)
    assert (
        storage.exists(uri)
        and storage.exists(root)
        and storage.is_dir(root)
        and not storage.is_dir(uri)
    )
    storage.write_json(storage.join(root, "value.json"), {"ключ": [1, 2.5, None]})
    assert storage.read_json(storage.join(root, "value.json")) == {"ключ": [1, 2.5, None]}
    with pytest.raises(StorageError, match=r"file\.bin: it is not JSON"):
        storage.read_json(uri)
    with pytest.raises(StorageError, match="is a folder"):
        storage.size(root)


def test_missing_file_is_named(root):
    uri = storage.join(root, "absent.bin")
    for read in (storage.read_bytes, storage.open_read, storage.size, file_identity.fingerprint):
        with pytest.raises(NotFoundError, match=r"absent\.bin: .*; check the") as caught:
            read(uri)
        assert isinstance(caught.value, StorageError) and isinstance(
            caught.value, FileNotFoundError
        )
    assert (
        not storage.is_dir(uri)
        and storage.list_files(uri) == []
        and storage.glob(root + "/*") == []
    )
    storage.remove_tree(uri)


def test_open_read_seeks(root):
    data = random.Random(0).randbytes(3 * 2**20 + 17)
    uri = storage.join(root, "big.bin")
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as file:
        assert (
            file.seek(-5, io.SEEK_END) == len(data) - 5
            and file.read(100) == data[-5:]
            and file.read(1) == b""
        )
        file.seek(2**20 - 3)
        assert (
            file.read(2**21) == data[2**20 - 3 : 2**20 - 3 + 2**21]
            and file.tell() == 2**20 - 3 + 2**21
        )
        file.seek(0)
        assert file.read() == data


def test_fingerprint_changes_with_content(root):
    uri = storage.join(root, "f")
    seen = set()
    for data in (b"a", b"b", b"bb"):
        storage.write_bytes(uri, data)
        seen.add(file_identity.fingerprint(uri))
        assert file_identity.fingerprint(uri).startswith(f"{len(data)}-")
    assert len(seen) == 3


# --- listing ---


def test_lists_and_globs(root):
    names = [
        "a.txt",
        "b[1].txt",
        "d/a.txt",
        "d/e/a.txt",
        "d/e/c.json",
        "d/.hidden/a.txt",
        "dd/z.txt",
    ]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")

    def relative(found):
        assert found == sorted(found)
        return [uri.removeprefix(root + "/") for uri in found]

    assert relative(storage.list_files(root)) == sorted(names)
    assert relative(storage.list_files(root + "/", recursive=False)) == ["a.txt", "b[1].txt"]
    assert relative(storage.list_files(root + "/d")) == sorted(
        name for name in names if name.startswith("d/")
    )
    assert storage.list_files(root + "/a.txt") == [root + "/a.txt"]
    assert relative(storage.glob(root + "/*.txt")) == ["a.txt", "b[1].txt"]
    assert relative(storage.glob(root + "/**/*.txt")) == [
        "a.txt",
        "b[1].txt",
        "d/a.txt",
        "d/e/a.txt",
        "dd/z.txt",
    ]
    assert relative(storage.glob(root + "/d*/?.txt")) == ["d/a.txt", "dd/z.txt"]
    assert relative(storage.glob(root + "/[!a]*.txt")) == ["b[1].txt"]
    assert relative(storage.glob(root + "/d/.hidden/*")) == ["d/.hidden/a.txt"]
    assert relative(storage.glob(root + "/d/e/a.txt")) == ["d/e/a.txt"]
    assert relative(storage.glob(root + "/d/**")) == ["d/a.txt", "d/e/a.txt", "d/e/c.json"]
    storage.remove_tree(root + "/d")
    assert relative(storage.list_files(root)) == ["a.txt", "b[1].txt", "dd/z.txt"]
    storage.remove_tree(root + "/a.txt")
    assert not storage.exists(root + "/a.txt") and storage.exists(root + "/dd")


def test_glob_without_wildcards_gives_the_file_or_folder_itself(root, tmp_path, monkeypatch):
    storage.write_bytes(storage.join(root, "images/a.jpg"), b"x")
    for there in (f"{root}/images", f"{root}/images/a.jpg", f"{root}/images/"):
        assert storage.glob(there) == [there]
    assert storage.glob(f"{root}/image") == storage.glob(f"{root}/images/a") == []
    assert storage.glob(f"{root}/image*") == []  # wildcards find files only
    (tmp_path / "data/images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert storage.glob("data/images") == ["data/images"] and storage.glob(Path("data")) == ["data"]
    if storage.is_remote(root):
        with pytest.raises(NotFoundError, match="s3://no-such-bucket"):
            storage.glob("s3://no-such-bucket/x")


def test_local_glob_keeps_the_form_of_the_pattern(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.x").touch()
    monkeypatch.chdir(tmp_path)
    assert storage.glob("d/*.x") == storage.glob("*/*.x") == ["d/a.x"] and storage.glob(
        "./d/*"
    ) == ["./d/a.x"]
    assert storage.glob(f"file://{tmp_path}/*/a.x") == [f"file://{tmp_path}/d/a.x"]


def test_linked_folders_are_listed_and_circles_end(tmp_path):
    (tmp_path / "data/real").mkdir(parents=True)
    (tmp_path / "data/real/f").touch()
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/link").symlink_to(tmp_path / "data/real")
    (tmp_path / "shown/circle").symlink_to(tmp_path / "shown")
    assert storage.list_files(str(tmp_path / "shown")) == [str(tmp_path / "shown/link/f")]


def test_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "f").touch()
    real, denied = os.scandir, PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(
        os, "scandir", lambda path: Flaky(denied)() if "closed" in path else real(path)
    )
    for look in (storage.list_files, lambda uri: storage.glob(uri + "/**/f")):
        with pytest.raises(StorageError, match="Permission denied; give this user access"):
            look(str(tmp_path))


def test_whole_buckets_and_disks_are_not_removed(s3_server):
    for uri in (s3_server, s3_server + "/", "/", "file:///"):
        with pytest.raises(StorageError, match="whole bucket or disk"):
            storage.remove_tree(uri)
        with pytest.raises(StorageError, match="whole bucket or disk"):
            atomic_folder.commit_folder(uri, {}, {})
    with pytest.raises(NotFoundError, match="s3://no-such-bucket"):
        storage.list_files("s3://no-such-bucket/x")


# --- killed writers and places that cannot be written ---


def test_killed_write_leaves_the_old_file_and_sweep_clears_up(tmp_path):
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")
    source = (
        "import os, sys; from pipeline.io import file_identity as identity; from pipeline.io "
        "import storage; os.replace = lambda *_: os._exit(9); "
    )
    assert run_python(source + "storage.write_bytes(sys.argv[1], b'new')", uri).returncode == 9
    assert storage.read_bytes(uri) == b"old" and len(os.listdir(tmp_path)) == 2
    assert storage.list_files(str(tmp_path)) == [uri]
    (tmp_path / ".job.tmp-0123/deep").mkdir(parents=True)
    for number, name in enumerate((".job.tmp-0123/deep/file", ".env", "x.tmp-1")):
        (tmp_path / name).write_bytes(bytes(number))
        os.utime(tmp_path / name, (0, 0))
    # Its process is gone; who wrote the others, all too young, nobody knows
    (left,) = storage.sweep(str(tmp_path), 3600)
    assert Path(left).name.startswith(".state.json.tmp-")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        writing = tmp_path / storage.beside(tmp_path / "x").name.replace(
            f"-{os.getpid()}-", f"-{living.pid}-"
        )
        writing.write_bytes(b"")
        assert storage.sweep(str(tmp_path), 3600) == [] and writing.exists(), (
            "a living process is writing it"
        )
        living.kill()
    assert storage.sweep(str(tmp_path), 3600) == [str(writing)]
    (deep := tmp_path / "job/trials/a").mkdir(parents=True)
    (deep / writing.name).write_bytes(b"")
    assert storage.sweep(str(tmp_path), 3600) == [str(deep / writing.name)], "however deep"
    shutil.rmtree(tmp_path / "job")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    fresh = tmp_path / ".live.tmp-1"
    fresh.mkdir()
    os.utime(fresh, (0, 0))
    (fresh / "growing").write_bytes(b"")
    os.utime(fresh, (0, 0))
    removed = storage.sweep(str(tmp_path / "job"), 3600)  # beside a folder
    assert len(removed) == 1 and sorted(os.listdir(tmp_path)) == [
        ".env",
        ".live.tmp-1",
        "state.json",
        "x.tmp-1",
    ]
    os.utime(fresh / "growing", (time.time() - 100, time.time() - 100))
    assert storage.sweep(str(tmp_path), 50) == [str(fresh)]  # in a folder
    assert storage.sweep("s3://bucket/key", 0) == []


def test_what_a_process_was_writing_goes_when_it_has_ended_though_nobody_has_asked_for_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        name = storage.beside(tmp_path / "x").name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
        (tmp_path / name).write_bytes(b"")
        assert storage.sweep(str(tmp_path), 3600) == [str(tmp_path / name)]


def test_several_files_are_asked_for_at_once_and_answers_come_in_order():
    all_wait = threading.Barrier(8)

    def answer(number: int) -> int:
        all_wait.wait(timeout=30)  # one after the other, nobody would ever come to the end
        return 10 * number

    assert list(threaded_map(answer, range(8))) == [10 * number for number in range(8)]
    with pytest.raises(ZeroDivisionError):
        list(threaded_map(lambda number: 1 // number, [2, 0, 1]))
    assert list(threaded_map(answer, [])) == []


def test_check_writable(root):
    storage.check_writable(root)
    assert storage.list_files(root) == []


def test_unwritable_places_are_named(tmp_path, s3_server):
    (tmp_path / "file").touch()
    places = [
        (f"{tmp_path}/file", "choose another folder"),
        (f"{tmp_path}/file/below", "choose another folder"),
        ("/proc/nowhere", "check the path"),
        ("s3://no-such-bucket/key", "bucket does not exist; check the bucket"),
    ]
    for uri, reason in places:
        with pytest.raises(StorageError, match=f"cannot write {uri}/.*{reason}"):
            storage.check_writable(uri)


def test_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Flaky(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device; free space") as caught:
        storage.write_bytes(str(tmp_path / "f"), b"x")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_imports_stay_on_floor_0():
    source = (
        "import sys; from pipeline.io import atomic_folder as folders; from pipeline.io import "
        "storage; storage.exists('/'); "
    )
    heavy = (
        "sorted({'torch', 'ray', 's3fs', 'botocore', 'fsspec', 'numpy', 'pyarrow'} & "
        "set(sys.modules))"
    )
    done = run_python(source + f"print({heavy})")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
