"""pipeline.storage: the same promises on a local folder and on an S3 server; about 20 s."""

import ctypes
import errno
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.storage import NotFoundError, StorageError

REPOSITORY = Path(storage.__file__).parents[1]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty place of one's own; on S3 the listing shows nothing there yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"


@pytest.fixture
def fast(monkeypatch):
    """The pauses that the module's own retries ask for, without waiting for them."""
    pauses, real = [], storage.retry
    monkeypatch.setattr(storage, "retry", lambda fn, *args, **kw: real(fn, *args, sleep=pauses.append, **kw))
    return pauses


def run_python(source: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


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
    with pytest.raises(StorageError, match=r"gs:// is not supported; use a folder, file:// or s3://"):
        storage.filesystem("gs://b/k")
    with pytest.raises(StorageError, match=r"write s3://bucket/key"):
        storage.read_bytes(Path("s3://bucket/key"))  # pathlib makes it s3:/bucket/key
    for nowhere in ("", "s3://", "s3:///key"):
        with pytest.raises(StorageError, match="names no place"):
            storage.exists(nowhere)


def test_filesystem_is_one_per_process_and_environment(s3_server, monkeypatch):
    first, path = storage.filesystem(s3_server + "/a/b")
    assert path == "bucket/a/b" and storage.filesystem("s3://other")[0] is first
    assert b"testing" not in pickle.dumps(first)  # a pickled filesystem carries no keys
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert storage.filesystem(s3_server)[0] is not first
    local, path = storage.filesystem("x/y")
    assert local.protocol[0] == "file" and path == os.path.abspath("x/y")


# --- files, locally and on S3 ---


def test_bytes_json_and_sizes(root):
    uri = storage.join(root, "deep/er/file.bin")
    assert not storage.exists(uri)
    for data in (b"one", b"", b"three" * 1000):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data and storage.size(uri) == len(data)
    assert storage.exists(uri) and storage.exists(root) and storage.is_dir(root) and not storage.is_dir(uri)
    storage.write_json(storage.join(root, "value.json"), {"ключ": [1, 2.5, None]})
    assert storage.read_json(storage.join(root, "value.json")) == {"ключ": [1, 2.5, None]}
    with pytest.raises(StorageError, match=r"file\.bin: it is not JSON"):
        storage.read_json(uri)
    with pytest.raises(StorageError, match="is a folder"):
        storage.size(root)


def test_missing_file_is_named(root):
    uri = storage.join(root, "absent.bin")
    for read in (storage.read_bytes, storage.open_read, storage.size, storage.fingerprint):
        with pytest.raises(NotFoundError, match=r"absent\.bin: .*; check the") as caught:
            read(uri)
        assert isinstance(caught.value, StorageError) and isinstance(caught.value, FileNotFoundError)
    assert not storage.is_dir(uri) and storage.list_files(uri) == [] and storage.glob(root + "/*") == []
    storage.remove_tree(uri)


def test_open_read_seeks(root):
    data = random.Random(0).randbytes(3 * 2**20 + 17)
    uri = storage.join(root, "big.bin")
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as file:
        assert file.seek(-5, io.SEEK_END) == len(data) - 5 and file.read(100) == data[-5:] and file.read(1) == b""
        file.seek(2**20 - 3)
        assert file.read(2**21) == data[2**20 - 3 : 2**20 - 3 + 2**21] and file.tell() == 2**20 - 3 + 2**21
        file.seek(0)
        assert file.read() == data


def test_open_read_serves_pyarrow(root):
    table = pa.table({"row": list(range(1000))})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=100)
    storage.write_bytes(storage.join(root, "t.parquet"), sink.getvalue())
    with storage.open_read(storage.join(root, "t.parquet")) as file:
        assert pq.ParquetFile(file).read_row_group(7)["row"].to_pylist() == list(range(700, 800))


def test_object_replaced_while_read_is_an_error(s3_server, fast):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    storage.write_bytes(uri, b"a" * 2**21)
    with storage.open_read(uri) as file:
        assert file.read(1) == b"a"
        storage.write_bytes(uri, b"b" * 2**21)
        with pytest.raises(StorageError, match=f"{uri}.*no longer exists"):
            file.read()
    assert not fast


def test_reading_all_takes_few_requests(s3_server, monkeypatch):
    uri, calls = f"{s3_server}/{uuid.uuid4().hex}", []
    storage.write_bytes(uri, bytes(3 * 2**20))
    reader: Any = storage.open_read(uri)
    with reader as file:
        real = file.raw._file.read
        monkeypatch.setattr(file.raw._file, "read", lambda count: calls.append(count) or real(count))
        assert len(file.read()) == 3 * 2**20 and calls == [3 * 2**20]


def test_fingerprint_changes_with_content(root):
    uri = storage.join(root, "f")
    seen = set()
    for data in (b"a", b"b", b"bb"):
        storage.write_bytes(uri, data)
        seen.add(storage.fingerprint(uri))
        assert storage.fingerprint(uri) == f"{len(data)}-{storage.checksum_or_etag(uri)}"
    assert len(seen) == 3


def test_fingerprint_of_a_large_file_reads_its_ends(tmp_path):
    path, seen = tmp_path / "large", set()
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
        for position in (None, 0, 65 * 2**20 - 1, 30 * 2**20):
            if position is not None:
                file.seek(position)
                file.write(b"x")
                file.flush()
            seen.add(storage.fingerprint(str(path)))
    assert len(seen) == 3 and all(":" in value and value.startswith(f"{65 * 2**20}-ends") for value in seen)


# --- listing ---


def test_lists_and_globs(root):
    names = ["a.txt", "b[1].txt", "d/a.txt", "d/e/a.txt", "d/e/c.json", "d/.hidden/a.txt", "dd/z.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"x")

    def relative(found):
        assert found == sorted(found)
        return [uri.removeprefix(root + "/") for uri in found]

    assert relative(storage.list_files(root)) == sorted(names)
    assert relative(storage.list_files(root + "/", recursive=False)) == ["a.txt", "b[1].txt"]
    assert relative(storage.list_files(root + "/d")) == sorted(name for name in names if name.startswith("d/"))
    assert storage.list_files(root + "/a.txt") == [root + "/a.txt"]
    assert relative(storage.glob(root + "/*.txt")) == ["a.txt", "b[1].txt"]
    assert relative(storage.glob(root + "/**/*.txt")) == ["a.txt", "b[1].txt", "d/a.txt", "d/e/a.txt", "dd/z.txt"]
    assert relative(storage.glob(root + "/d*/?.txt")) == ["d/a.txt", "dd/z.txt"]
    assert relative(storage.glob(root + "/[!a]*.txt")) == ["b[1].txt"]
    assert relative(storage.glob(root + "/d/.hidden/*")) == ["d/.hidden/a.txt"]
    assert relative(storage.glob(root + "/d/e/a.txt")) == ["d/e/a.txt"]
    assert relative(storage.glob(root + "/d/**")) == ["d/a.txt", "d/e/a.txt", "d/e/c.json"]
    storage.remove_tree(root + "/d")
    assert relative(storage.list_files(root)) == ["a.txt", "b[1].txt", "dd/z.txt"]
    storage.remove_tree(root + "/a.txt")
    assert not storage.exists(root + "/a.txt") and storage.exists(root + "/dd")


def test_local_glob_keeps_the_form_of_the_pattern(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.x").touch()
    monkeypatch.chdir(tmp_path)
    assert storage.glob("d/*.x") == storage.glob("*/*.x") == ["d/a.x"] and storage.glob("./d/*") == ["./d/a.x"]
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
    monkeypatch.setattr(os, "scandir", lambda path: Flaky(denied)() if "closed" in path else real(path))
    for look in (storage.list_files, lambda uri: storage.glob(uri + "/**/f")):
        with pytest.raises(StorageError, match="Permission denied; give this user access"):
            look(str(tmp_path))


def test_long_listings_take_several_pages(s3_server, monkeypatch):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    for number in range(5):
        storage.write_bytes(f"{root}/{number}", b"")
    client, pages = storage._s3(), []
    real = client.call_s3
    monkeypatch.setattr(client, "call_s3", lambda *args, **kw: pages.append(1) or real(*args, MaxKeys=2, **kw))
    assert storage.list_files(root) == [f"{root}/{number}" for number in range(5)] and len(pages) == 3


def test_whole_buckets_and_disks_are_not_removed(s3_server):
    for uri in (s3_server, s3_server + "/", "/", "file:///"):
        with pytest.raises(StorageError, match="whole bucket or disk"):
            storage.remove_tree(uri)
        with pytest.raises(StorageError, match="whole bucket or disk"):
            storage.commit_folder(uri, {}, {})
    with pytest.raises(NotFoundError, match="s3://no-such-bucket"):
        storage.list_files("s3://no-such-bucket/x")


# --- retries ---


class Flaky:
    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self, value=1):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return value


def client_error(code, status):
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def test_retry_sleeps_longer_each_time():
    from botocore.exceptions import EndpointConnectionError, IncompleteReadError, ReadTimeoutError

    pauses = []
    flaky = Flaky(ConnectionResetError(), OSError(errno.EIO, "bad"), TimeoutError(), client_error("SlowDown", 503))
    assert storage.retry(flaky, value=7, first_delay_s=0.1, sleep=pauses.append) == 7 and flaky.calls == 5
    for pause, longest in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert longest / 2 <= pause <= longest
    for error in (
        EndpointConnectionError(endpoint_url="x"),
        ReadTimeoutError(endpoint_url="x"),
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        client_error("x", 500),
    ):
        assert storage.retry(Flaky(error), sleep=pauses.append) == 1
    many = Flaky(*[OSError(errno.EIO, str(number)) for number in range(9)])
    with pytest.raises(OSError, match="2"):
        storage.retry(many, attempts=3, sleep=pauses.append)
    assert many.calls == 3


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(), PermissionError(), IsADirectoryError(), NotADirectoryError(), FileExistsError(),
        OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only"), ValueError(), StorageError("done already"),
        client_error("AccessDenied", 403), client_error("NoSuchKey", 404), KeyError("ConnectionError"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_will_not_pass_is_not_retried(error):
    flaky = Flaky(error)
    with pytest.raises(type(error)):
        storage.retry(flaky, sleep=lambda delay_s: pytest.fail("slept"))
    assert flaky.calls == 1


def test_jitter_leaves_the_random_state_alone():
    state = random.getstate()
    storage.retry(Flaky(OSError()), sleep=lambda delay_s: None)
    assert random.getstate() == state


@contextmanager
def s3_answers(monkeypatch, *answers):
    """A server that gives these (status, body) in turn, the last one for ever; yields the list of requests seen."""
    seen, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            seen.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.rstrip(b"|")) + 3 * body.count(b"|")))  # "|": cut short
            self.close_connection = b"|" in body
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body.rstrip(b"|"))

        do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield seen
    server.shutdown()
    server.server_close()


def xml(code):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} said</Message></Error>".encode()


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchKey"), (404, "NoSuchBucket")])
def test_403_and_404_fail_at_once(monkeypatch, fast, status, code):
    with s3_answers(monkeypatch, (status, xml(code))) as seen:
        for call in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
            seen.clear()
            with pytest.raises(StorageError, match=f"s3://bucket/some/key: {code} said; check") as caught:
                call("s3://bucket/some/key")
            assert isinstance(caught.value, FileNotFoundError) == (status == 404)
            assert len(seen) == 1 and not fast


def test_5xx_and_a_cut_answer_are_retried(monkeypatch, fast):
    answers = [(503, xml("SlowDown")), (500, xml("InternalError")), (200, b"da|"), (200, b"data")]
    with s3_answers(monkeypatch, *answers) as seen:
        assert storage.read_bytes("s3://bucket/key") == b"data"
        assert len(seen) == 4 and len(fast) == 3


def test_5xx_for_ever_is_an_error_after_five_requests(monkeypatch, fast):
    with s3_answers(monkeypatch, (500, xml("InternalError"))) as seen:
        for call in (storage.read_bytes, storage.list_files, lambda uri: storage.glob(uri + "/*"), storage.exists):
            seen.clear()
            with pytest.raises(StorageError, match=r"s3://bucket/key: .*tried 5 times"):
                call("s3://bucket/key")
            assert len(seen) == 5, seen


def test_reads_of_an_open_file_are_retried_and_never_short(monkeypatch, fast):
    answers = [(200, b"12345678"), (503, xml("SlowDown")), (206, b"12345678"), (206, b"1234")]
    with s3_answers(monkeypatch, *answers) as seen:
        file: Any = storage.open_read("s3://bucket/key")
        assert file.read() == b"12345678" and len(seen) == 3 and len(fast) == 1
        file.seek(0)
        with pytest.raises(StorageError, match="s3://bucket/key: 4 of 8 bytes came"):
            file.raw.readall()


def test_dead_server_is_an_error(monkeypatch, fast):
    with s3_answers(monkeypatch, (200, b"")):
        pass  # its port is closed now
    with pytest.raises(StorageError, match=r"s3://bucket/key: .*tried 5 times"):
        storage.read_bytes("s3://bucket/key")
    assert len(fast) == 4


# --- folders that are whole or absent ---


def whole_folder(uri):
    """{name: bytes} of a committed folder that verifies, or None."""
    try:
        manifest = storage.open_folder(uri)
    except NotFoundError:
        return None
    storage.verify_folder(uri, manifest)
    return {name: storage.read_bytes(storage.join(uri, name)) for name in manifest["files"]}


def test_commit_open_verify_fetch(root, tmp_path):
    uri, source = storage.join(root, "bundle"), tmp_path / "weights"
    with pytest.raises(NotFoundError, match=r"no complete folder at .*bundle"):
        storage.open_folder(uri)
    source.write_bytes(b"w" * 100_000)
    files = {"config.json": b"{}", "deep/weights.bin": source, "old": b"old"}
    written = storage.commit_folder(uri, files, {"kind": "bundle"})
    assert storage.open_folder(uri) == written and written["kind"] == "bundle"
    digest = hashlib.sha256(b"w" * 100_000).hexdigest()
    assert written["files"]["deep/weights.bin"] == {"sha256": digest, "size": 100_000}
    assert not source.exists()  # it was handed over
    expected = [f"{uri}/{name}" for name in ("config.json", "deep/weights.bin", "manifest.json", "old")]
    assert storage.list_files(uri) == expected and storage.list_files(root) == expected

    storage.commit_folder(uri, {"config.json": b"[]"}, {"kind": "second"})
    assert whole_folder(uri) == {"config.json": b"[]"} and storage.open_folder(uri)["kind"] == "second"
    assert not storage.exists(uri + "/old")

    fetched = storage.fetch_folder(uri, tmp_path / "cache/copy")
    assert whole_folder(str(fetched)) == {"config.json": b"[]"}
    assert storage.is_remote(uri) == (fetched == tmp_path / "cache/copy")
    assert [path.name for path in tmp_path.rglob(".*.tmp-*")] == []


def test_flipped_bit_is_found(root, tmp_path):
    uri = storage.join(root, "bundle")
    storage.commit_folder(uri, {"good": b"good", "bad/weights": bytes(1000)}, {})
    manifest = storage.open_folder(uri)
    storage.verify_folder(uri, manifest)
    storage.write_bytes(uri + "/bad/weights", bytes(500) + b"\x01" + bytes(499))
    for check in (lambda: storage.verify_folder(uri, manifest), lambda: storage.fetch_folder(uri, tmp_path / "copy")):
        with pytest.raises(StorageError, match="bad/weights is damaged"):
            check()
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".*"))
    storage.fetch_folder(uri, tmp_path / "copy", verify=False)
    storage.remove_tree(uri + "/bad/weights")
    with pytest.raises(NotFoundError, match="bad/weights"):
        storage.verify_folder(uri, manifest)


def test_manifest_is_not_trusted(root, tmp_path):
    uri = storage.join(root, "bundle")
    entry = {"sha256": "0" * 64, "size": 1}
    for files in ({"../../escape": entry}, {"/etc/x": entry}, {"a": {"size": 1}}, ["a"], None):
        storage.write_json(uri + "/manifest.json", {"files": files})
        with pytest.raises(StorageError, match="bundle: "):
            storage.verify_folder(uri, storage.open_folder(uri))
        with pytest.raises(StorageError, match="bundle: "):
            storage.fetch_folder(uri, tmp_path / "copy")
    storage.write_json(uri + "/manifest.json", [])
    with pytest.raises(StorageError, match="is not a manifest"):
        storage.open_folder(uri)
    for name in ("../x", "/x", "", "a//b", "manifest.json", "./a"):
        with pytest.raises(StorageError, match="cannot name a file"):
            storage.commit_folder(uri, {name: b""}, {})


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
        storage.commit_folder(uri, files, {})
    with pytest.raises(StorageError, match="absent"):
        storage.commit_folder(uri, {"a": source, "b": tmp_path / "absent"}, {})
    with pytest.raises(TypeError):
        storage.commit_folder(uri, {"a": source}, {"value": object()})
    assert whole_folder(uri) is None and source.read_bytes() == b"precious"
    assert not list(tmp_path.rglob(".*.tmp-*"))


def test_failed_local_commit_keeps_the_old_folder(tmp_path):
    uri = str(tmp_path / "bundle")
    storage.commit_folder(uri, {"a": b"old"}, {})
    with pytest.raises(StorageError, match=r"cannot commit .*bundle"):
        storage.commit_folder(uri, Broken({"a": b"new"}), {})
    assert whole_folder(uri) == {"a": b"old"} and os.listdir(tmp_path) == ["bundle"]


def test_flaky_disk_during_commit(tmp_path, monkeypatch, fast):
    flaky, real = Flaky(OSError(errno.EIO, "stale handle"), OSError(errno.EIO, "stale handle")), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flaky(), real(descriptor)))
    (tmp_path / "source").write_bytes(b"s")
    storage.commit_folder(str(tmp_path / "bundle"), {"a": tmp_path / "source"}, {})
    assert whole_folder(str(tmp_path / "bundle")) == {"a": b"s"} and len(fast) == 2


@pytest.mark.parametrize("exchange", [True, False])
def test_swap_with_and_without_exchange(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda left, right: False)
    uri = str(tmp_path / "bundle")
    for value in (b"1", b"2", b"3"):
        storage.commit_folder(uri, {"a": value}, {})
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
            storage.commit_folder(uri, {"a": b"4"}, {})
        assert whole_folder(uri) == {"a": b"3"} and os.listdir(tmp_path) == ["bundle"]


def test_folder_of_others_is_not_replaced(tmp_path, s3_server):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("years")
    with pytest.raises(StorageError, match="could lose work"):
        storage.commit_folder(str(tmp_path / "work"), {"a": b""}, {})
    remote = f"{s3_server}/{uuid.uuid4().hex}"
    storage.write_bytes(remote + "/other", b"theirs")
    storage.commit_folder(remote, {"a": b"1"}, {})
    with pytest.raises(StorageError, match="could lose work"):
        storage.fetch_folder(remote, tmp_path / "work")
    assert (tmp_path / "work/thesis.txt").read_text() == "years"
    storage.commit_folder(remote, {"b": b"2"}, {})
    assert storage.list_files(remote) == [f"{remote}/{name}" for name in ("b", "manifest.json", "other")]


def test_linked_source_is_copied(tmp_path):
    (tmp_path / "store").write_bytes(b"shared")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    storage.commit_folder(str(tmp_path / "bundle"), {"a": tmp_path / "link"}, {})
    (tmp_path / "store").write_bytes(b"edited")
    assert whole_folder(str(tmp_path / "bundle")) == {"a": b"shared"}


def test_fetch_again_reads_only_the_manifest(s3_server, tmp_path, monkeypatch):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    storage.commit_folder(uri, {"a": b"1"}, {})
    storage.fetch_folder(uri, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(storage._s3(), "get_file", lambda *args, **kw: pytest.fail("downloaded again"))
        storage.fetch_folder(uri, tmp_path / "copy")
    (tmp_path / "copy/a").write_bytes(b"?")  # damaged here: fetched anew
    assert whole_folder(str(storage.fetch_folder(uri, tmp_path / "copy"))) == {"a": b"1"}
    storage.commit_folder(uri, {"a": b"2"}, {})
    assert whole_folder(str(storage.fetch_folder(uri, tmp_path / "copy"))) == {"a": b"2"}


# --- killed writers ---

KILLED_LOCALLY = """
    # Commits over an old folder, killed at its n-th file operation for n = 1, 2, ...; prints what a reader sees.
    import json, os, pathlib, sys
    from pipeline import storage
    root, first = sys.argv[1], sys.argv[2] == "first"
    for n in range(1, 1000):
        uri = f"{root}/{n}/bundle"
        os.makedirs(f"{root}/{n}")
        pathlib.Path(f"{root}/{n}/source").write_bytes(b"new")
        if not first:
            storage.commit_folder(uri, {"a": b"old", "d/b": b"old"}, {})
        child = os.fork()
        if child == 0:
            left = [n]
            def count(event, arguments):
                if event == "open" or event.startswith("os."):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
            sys.addaudithook(count)
            storage.commit_folder(uri, {"a": b"new", "d/b": pathlib.Path(f"{root}/{n}/source")}, {})
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen = "nothing"
        if storage.exists(uri):
            manifest = storage.open_folder(uri)
            storage.verify_folder(uri, manifest)
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
    assert states == sorted(states, key=["nothing", "old", "new"].index)  # before, then after; never a mixture
    assert set(states) == {before, "new"} and states.count(before) > 10


KILLED_ON_S3 = """
    # As above, killed with k of 3 files uploaded.
    import os, sys
    from pipeline import storage
    class Dying(dict):
        def items(self):
            for number, item in enumerate(super().items()):
                if number == int(sys.argv[2]):
                    os._exit(9)
                yield item
    storage.commit_folder(sys.argv[1], Dying(a=b"new", b=b"new", c=b"new"), {})
"""


def test_killed_commit_on_s3_shows_nothing(s3_server):
    uri = f"{s3_server}/{uuid.uuid4().hex}"
    storage.commit_folder(uri, {"a": b"old", "b": b"old"}, {})
    assert run_python(KILLED_ON_S3, uri, "2").returncode == 9
    assert storage.read_bytes(uri + "/a") == b"new" and storage.read_bytes(uri + "/b") == b"new"
    with pytest.raises(NotFoundError, match="no complete folder"):
        storage.open_folder(uri)
    storage.commit_folder(uri, {"a": b"newer", "c": b"newer"}, {})
    assert whole_folder(uri) == {"a": b"newer", "c": b"newer"}


def test_reader_never_sees_a_gap_or_a_mixture(tmp_path):
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system cannot exchange two folders")
    uri, stop = str(tmp_path / "bundle"), threading.Event()
    storage.commit_folder(uri, {"a": b"0", "b": b"0"}, {})

    def write():
        for number in range(20):
            storage.commit_folder(uri, {"a": str(number).encode(), "b": str(number).encode()}, {})
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not stop.is_set():
        storage.open_folder(uri)
        reads += 1
    writer.join()
    assert reads > 20 and whole_folder(uri) == {"a": b"19", "b": b"19"}


def test_killed_write_leaves_the_old_file_and_sweep_clears_up(tmp_path):
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")
    source = "import os, sys; from pipeline import storage; os.replace = lambda *_: os._exit(9); "
    assert run_python(source + "storage.write_bytes(sys.argv[1], b'new')", uri).returncode == 9
    assert storage.read_bytes(uri) == b"old" and len(os.listdir(tmp_path)) == 2
    assert storage.list_files(str(tmp_path)) == [uri]
    (tmp_path / ".job.tmp-0123/deep").mkdir(parents=True)
    for number, name in enumerate((".job.tmp-0123/deep/file", ".env", "x.tmp-1")):
        (tmp_path / name).write_bytes(bytes(number))
        os.utime(tmp_path / name, (0, 0))
    assert storage.sweep(str(tmp_path), 3600) == []  # all too young: a live writer's
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    fresh = tmp_path / ".live.tmp-1"
    fresh.mkdir()
    os.utime(fresh, (0, 0))
    (fresh / "growing").write_bytes(b"")
    os.utime(fresh, (0, 0))
    removed = storage.sweep(str(tmp_path / "job"), 3600)  # beside a folder
    assert len(removed) == 2 and sorted(os.listdir(tmp_path)) == [".env", ".live.tmp-1", "state.json", "x.tmp-1"]
    os.utime(fresh / "growing", (time.time() - 100, time.time() - 100))
    assert storage.sweep(str(tmp_path), 50) == [str(fresh)]  # in a folder
    assert storage.sweep("s3://bucket/key", 0) == []


# --- places that cannot be written, memory, forks ---


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


def test_denied_bucket_is_named(monkeypatch):
    with s3_answers(monkeypatch, (403, xml("AccessDenied"))), pytest.raises(StorageError, match=r"s3://bucket/k.*policy"):
        storage.check_writable("s3://bucket/k")


def test_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Flaky(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match="No space left on device; free space") as caught:
        storage.write_bytes(str(tmp_path / "f"), b"x")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


MEMORY = """
    import pathlib, sys, tracemalloc
    from pipeline import storage
    uri, source, copy = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    storage.check_writable(uri)  # what importing and connecting takes is not counted
    tracemalloc.start()
    storage.commit_folder(uri, {"weights": source}, {})
    storage.fetch_folder(uri, copy)
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


FORKED = """
    import os, sys
    from pipeline import storage
    uri = sys.argv[1]
    storage.write_bytes(uri, b"parent")
    before = storage.filesystem(uri)[0]
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            ok = storage.read_bytes(uri) == b"parent" and storage.filesystem(uri)[0] is not before
            storage.write_bytes(f"{uri}-{number}", b"child")
            os._exit(0 if ok else 1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0], codes
    assert storage.read_bytes(uri) == b"parent" and storage.filesystem(uri)[0] is before
"""


def test_s3_works_after_fork(s3_server):
    uri = f"{s3_server}/{uuid.uuid4().hex}/f"
    done = run_python(FORKED, uri)
    assert done.returncode == 0, done.stderr
    assert len(storage.list_files(uri.removesuffix("/f"))) == 4


def test_many_threads_share_one_filesystem(s3_server):
    from concurrent.futures import ThreadPoolExecutor

    root = f"{s3_server}/{uuid.uuid4().hex}"

    def work(number):
        storage.write_bytes(f"{root}/{number:02}", bytes([number]))
        return storage.read_bytes(f"{root}/{number:02}")[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == list(range(24))


def test_imports_stay_on_floor_0():
    source = "import sys; from pipeline import storage; storage.exists('/'); "
    heavy = "sorted({'torch', 'ray', 's3fs', 'botocore', 'fsspec', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = run_python(source + f"print({heavy})")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
