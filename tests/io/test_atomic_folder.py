"""pipeline.io.atomic_folder: a folder whole or absent, locally and on S3, also when its writer is
killed; about 10 s.
"""

import ctypes
import errno
import hashlib
import json
import os
import threading
import uuid

import pytest
from faults import Flaky, run_python

from pipeline.io import atomic_folder, s3, storage
from pipeline.io.storage import NotFoundError, StorageError


def whole_folder(uri):
    """{name: bytes} of a committed folder that verifies, or None."""
    try:
        manifest = atomic_folder.open_folder(uri)
    except NotFoundError:
        return None
    atomic_folder.verify_folder(uri, manifest)
    return {name: storage.read_bytes(storage.join(uri, name)) for name in manifest["files"]}


def test_commit_open_verify_fetch(root, tmp_path):
    uri, source = storage.join(root, "bundle"), tmp_path / "weights"
    with pytest.raises(NotFoundError, match=r"no complete folder at .*bundle"):
        atomic_folder.open_folder(uri)
    source.write_bytes(b"w" * 100_000)
    files = {"config.json": b"{}", "deep/weights.bin": source, "old": b"old"}
    written = atomic_folder.commit_folder(uri, files, {"kind": "bundle"})
    assert atomic_folder.open_folder(uri) == written and written["kind"] == "bundle"
    digest = hashlib.sha256(b"w" * 100_000).hexdigest()
    entry = dict(written["files"]["deep/weights.bin"])
    etag = entry.pop("etag", None)
    assert entry == {"sha256": digest, "size": 100_000} and (etag is not None) == storage.is_remote(
        uri
    )
    assert not source.exists()  # it was handed over
    expected = [
        f"{uri}/{name}" for name in ("config.json", "deep/weights.bin", "manifest.json", "old")
    ]
    assert storage.list_files(uri) == expected and storage.list_files(root) == expected

    atomic_folder.commit_folder(uri, {"config.json": b"[]"}, {"kind": "second"})
    assert (
        whole_folder(uri) == {"config.json": b"[]"}
        and atomic_folder.open_folder(uri)["kind"] == "second"
    )
    assert not storage.exists(uri + "/old")

    fetched = atomic_folder.fetch_folder(uri, tmp_path / "cache/copy")
    assert whole_folder(str(fetched)) == {"config.json": b"[]"}
    assert storage.is_remote(uri) == (fetched == tmp_path / "cache/copy")
    assert [path.name for path in tmp_path.rglob(".*.tmp-*")] == []


def test_flipped_bit_is_found(root, tmp_path):
    uri = storage.join(root, "bundle")
    atomic_folder.commit_folder(uri, {"good": b"good", "bad/weights": bytes(1000)}, {})
    manifest = atomic_folder.open_folder(uri)
    atomic_folder.verify_folder(uri, manifest)
    storage.write_bytes(uri + "/bad/weights", bytes(500) + b"\x01" + bytes(499))
    for check in (
        lambda: atomic_folder.verify_folder(uri, manifest),
        lambda: atomic_folder.fetch_folder(uri, tmp_path / "copy"),
    ):
        with pytest.raises(StorageError, match="bad/weights is damaged"):
            check()
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".*"))
    storage.remove_tree(uri + "/bad/weights")
    with pytest.raises(NotFoundError, match="bad/weights"):
        atomic_folder.verify_folder(uri, manifest)


def test_manifest_is_not_trusted(root, tmp_path):
    uri = storage.join(root, "bundle")
    entry = {"sha256": "0" * 64, "size": 1}
    for files in ({"../../escape": entry}, {"/etc/x": entry}, {"a": {"size": 1}}, ["a"], None):
        # Whoever forges names can seal them too
        storage.write_json(uri + "/manifest.json", atomic_folder.with_checksum({"files": files}))
        with pytest.raises(StorageError, match="bundle: "):
            atomic_folder.verify_folder(uri, atomic_folder.open_folder(uri))
        with pytest.raises(StorageError, match="bundle: "):
            atomic_folder.fetch_folder(uri, tmp_path / "copy")
    storage.write_json(uri + "/manifest.json", [])
    with pytest.raises(StorageError, match="is not a manifest"):
        atomic_folder.open_folder(uri)
    for name in ("../x", "/x", "", "a//b", "manifest.json", "./a"):
        with pytest.raises(StorageError, match="cannot name a file"):
            atomic_folder.commit_folder(uri, {name: b""}, {})


class Broken(dict):
    """Files of a commit that fails after the first `count`."""

    count = 0

    def items(self):  # type: ignore[override]
        for number, item in enumerate(super().items()):
            if number == self.count:
                raise PermissionError(errno.EACCES, "no")
            yield item


def test_failed_commit_leaves_sources_and_no_leftovers(root, tmp_path):
    uri, source = storage.join(root, "bundle"), tmp_path / "source"
    source.write_bytes(b"precious")
    files = Broken({"a": source, "b": b"b"})
    files.count = 1
    with pytest.raises(OSError):
        atomic_folder.commit_folder(uri, files, {})
    with pytest.raises(StorageError, match="absent"):
        atomic_folder.commit_folder(uri, {"a": source, "b": tmp_path / "absent"}, {})
    with pytest.raises(TypeError):
        atomic_folder.commit_folder(uri, {"a": source}, {"value": object()})
    assert whole_folder(uri) is None and source.read_bytes() == b"precious"
    assert not list(tmp_path.rglob(".*.tmp-*"))


def test_failed_local_commit_keeps_the_old_folder(tmp_path):
    uri = str(tmp_path / "bundle")
    atomic_folder.commit_folder(uri, {"a": b"old"}, {})
    with pytest.raises(StorageError, match=r"cannot commit .*bundle"):
        atomic_folder.commit_folder(uri, Broken({"a": b"new"}), {})
    assert whole_folder(uri) == {"a": b"old"} and os.listdir(tmp_path) == ["bundle"]


def test_flaky_disk_during_commit(tmp_path, monkeypatch, fast):
    flaky, real = (
        Flaky(OSError(errno.EIO, "stale handle"), OSError(errno.EIO, "stale handle")),
        os.fsync,
    )
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flaky(), real(descriptor)))
    (tmp_path / "source").write_bytes(b"s")
    atomic_folder.commit_folder(str(tmp_path / "bundle"), {"a": tmp_path / "source"}, {})
    assert whole_folder(str(tmp_path / "bundle")) == {"a": b"s"} and len(fast) == 2


@pytest.mark.parametrize("exchange", [True, False])
def test_swap_with_and_without_exchange(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic_folder, "_exchange", lambda left, right: False)
    uri = str(tmp_path / "bundle")
    for value in (b"1", b"2", b"3"):
        atomic_folder.commit_folder(uri, {"a": value}, {})
        assert whole_folder(uri) == {"a": value} and os.listdir(tmp_path) == ["bundle"]
    if not exchange:  # the second rename fails: the old folder comes back
        real, calls = os.rename, []

        def second_fails(source, target):
            calls.append(source)
            if len(calls) == 3:
                raise PermissionError(errno.EACCES, "no")
            real(source, target)

        monkeypatch.setattr(os, "rename", second_fails)
        with pytest.raises(StorageError):
            atomic_folder.commit_folder(uri, {"a": b"4"}, {})
        assert whole_folder(uri) == {"a": b"3"} and os.listdir(tmp_path) == ["bundle"]


def test_folder_of_others_is_not_replaced(tmp_path, s3_server):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    with pytest.raises(StorageError, match="could lose work"):
        atomic_folder.commit_folder(str(tmp_path / "work"), {"a": b""}, {})
    remote = f"{s3_server}/{uuid.uuid4().hex}"
    storage.write_bytes(remote + "/other", b"theirs")
    atomic_folder.commit_folder(remote, {"a": b"1"}, {})
    with pytest.raises(StorageError, match="could lose work"):
        atomic_folder.fetch_folder(remote, tmp_path / "work")
    assert (tmp_path / "work/thesis.txt").read_text() == "years"
    atomic_folder.commit_folder(remote, {"b": b"2"}, {})
    assert storage.list_files(remote) == [
        f"{remote}/{name}" for name in ("b", "manifest.json", "other")
    ]


def test_linked_source_is_copied(tmp_path):
    (tmp_path / "store").write_bytes(b"shared")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    atomic_folder.commit_folder(str(tmp_path / "bundle"), {"a": tmp_path / "link"}, {})
    (tmp_path / "store").write_bytes(b"edited")
    assert whole_folder(str(tmp_path / "bundle")) == {"a": b"shared"}


def test_fetch_again_reads_only_the_manifest(s3_server, tmp_path, monkeypatch):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    atomic_folder.commit_folder(uri, {"a": b"1"}, {})
    atomic_folder.fetch_folder(uri, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(s3.client(), "get_file", lambda *args, **kw: pytest.fail("downloaded again"))
        atomic_folder.fetch_folder(uri, tmp_path / "copy")
    (tmp_path / "copy/a").write_bytes(b"?")  # damaged here: fetched anew
    assert whole_folder(str(atomic_folder.fetch_folder(uri, tmp_path / "copy"))) == {"a": b"1"}
    atomic_folder.commit_folder(uri, {"a": b"2"}, {})
    assert whole_folder(str(atomic_folder.fetch_folder(uri, tmp_path / "copy"))) == {"a": b"2"}


# --- killed writers ---


KILLED_LOCALLY = """
    # Commits over an old folder, killed at its n-th file operation for n = 1, 2, ...; prints what a reader sees.
    import json, os, pathlib, sys
    from pipeline.io import atomic_folder as folders; from pipeline.io import storage
    root, first = sys.argv[1], sys.argv[2] == "first"
    for n in range(1, 1000):
        uri = f"{root}/{n}/bundle"
        os.makedirs(f"{root}/{n}")
        pathlib.Path(f"{root}/{n}/source").write_bytes(b"new")
        if not first:
            folders.commit_folder(uri, {"a": b"old", "d/b": b"old"}, {})
        child = os.fork()
        if child == 0:
            left = [n]
            def count(event, arguments):
                if event == "open" or event.startswith("os."):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
            sys.addaudithook(count)
            folders.commit_folder(uri, {"a": b"new", "d/b": pathlib.Path(f"{root}/{n}/source")}, {})
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen = "nothing"
        if storage.exists(uri):
            manifest = folders.open_folder(uri)
            folders.verify_folder(uri, manifest)
            seen = "+".join(sorted({storage.read_bytes(f"{uri}/{name}").decode() for name in manifest["files"]}))
        print(json.dumps([code, seen]))
        if code == 0:
            break
"""


@pytest.mark.parametrize("first", [True, False])
def test_killed_local_commit_shows_nothing_or_a_whole_folder(tmp_path, first):
    done = run_python(KILLED_LOCALLY, str(tmp_path), "first" if first else "second")
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    before = "nothing" if first else "old"
    states = [state for _, state in seen]
    assert len(seen) > 15 and [code for code, _ in seen] == [9] * (len(seen) - 1) + [0]
    # Before, then after; never a mixture
    assert states == sorted(states, key=["nothing", "old", "new"].index)
    assert set(states) == {before, "new"} and states.count(before) > 10


KILLED_ON_S3 = """
    # As above, killed with k of 3 files uploaded.
    import os, sys
    from pipeline.io import atomic_folder as folders; from pipeline.io import storage
    class Dying(dict):
        def items(self):
            for number, item in enumerate(super().items()):
                if number == int(sys.argv[2]):
                    os._exit(9)
                yield item
    folders.commit_folder(sys.argv[1], Dying(a=b"new", b=b"new", c=b"new"), {})
"""


def test_killed_commit_on_s3_shows_nothing(s3_server):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    atomic_folder.commit_folder(uri, {"a": b"old", "b": b"old"}, {})
    assert run_python(KILLED_ON_S3, uri, "2").returncode == 9
    assert storage.read_bytes(uri + "/a") == b"new" and storage.read_bytes(uri + "/b") == b"new"
    with pytest.raises(NotFoundError, match="no complete folder"):
        atomic_folder.open_folder(uri)
    atomic_folder.commit_folder(uri, {"a": b"newer", "c": b"newer"}, {})
    assert whole_folder(uri) == {"a": b"newer", "c": b"newer"}


def test_reader_never_sees_a_gap_or_a_mixture(tmp_path):
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system cannot exchange two folders")
    uri, stop = str(tmp_path / "bundle"), threading.Event()
    atomic_folder.commit_folder(uri, {"a": b"0", "b": b"0"}, {})

    def write():
        for number in range(20):
            atomic_folder.commit_folder(
                uri, {"a": str(number).encode(), "b": str(number).encode()}, {}
            )
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not stop.is_set():
        atomic_folder.open_folder(uri)
        reads += 1
    writer.join()
    assert reads > 20 and whole_folder(uri) == {"a": b"19", "b": b"19"}


# --- memory ---


MEMORY = """
    import pathlib, sys, tracemalloc
    from pipeline.io import atomic_folder as folders; from pipeline.io import storage
    uri, source, copy = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    storage.check_writable(uri)  # what importing and connecting takes is not counted
    tracemalloc.start()
    folders.commit_folder(uri, {"weights": source}, {})
    folders.fetch_folder(uri, copy)
    print(tracemalloc.get_traced_memory()[1])
"""


def test_large_files_are_not_read_whole(root, tmp_path):
    num_bytes, source = 64 * 2**20, tmp_path / "sparse"
    with open(source, "wb") as file:
        file.truncate(num_bytes)
    # in a process of its own, since moto holds its objects in this one
    done = run_python(MEMORY, root + "/bundle", str(source), str(tmp_path / "copy"))
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert 2**20 < peak < (52 if storage.is_remote(root) else 16) * 2**20
    storage.remove_tree(root)


def test_a_changed_manifest_is_found(root):
    uri = storage.join(root, "sealed")
    atomic_folder.commit_folder(uri, {"a": b"1"}, {"mean": 0.25})
    assert atomic_folder.open_folder(uri)["mean"] == 0.25
    manifest = storage.read_json(uri + "/manifest.json")
    for forged in (
        {**manifest, "mean": 0.26},
        {k: v for k, v in manifest.items() if k != "sha256"},
    ):
        storage.write_json(uri + "/manifest.json", forged)
        with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
            atomic_folder.open_folder(uri)
