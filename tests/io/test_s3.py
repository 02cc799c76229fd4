"""pipeline.io.s3 through pipeline.io.storage: retries, answers of a bad server, one client a
process.
"""

import errno
import os
import pickle
import random
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from faults import Flaky, run_python

from pipeline.io import s3, storage
from pipeline.io.storage import StorageError

# --- retries ---


def client_error(code, status):
    from botocore.exceptions import ClientError

    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


def test_retry_sleeps_longer_each_time():
    from botocore.exceptions import EndpointConnectionError, IncompleteReadError, ReadTimeoutError

    pauses = []
    flaky = Flaky(
        ConnectionResetError(),
        OSError(errno.EIO, "bad"),
        TimeoutError(),
        client_error("SlowDown", 503),
    )
    assert (
        storage.retry(flaky, value=7, first_delay_s=0.1, sleep=pauses.append) == 7
        and flaky.calls == 5
    )
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


# --- bad servers ---


@contextmanager
def s3_answers(monkeypatch, *answers):
    """A server that gives these (status, body) in turn, the last one for ever; yields the list of
    requests seen.
    """
    seen, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            seen.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            # "|": cut short
            self.send_header("Content-Length", str(len(body.rstrip(b"|")) + 3 * body.count(b"|")))
            self.close_connection = b"|" in body
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body.rstrip(b"|"))

        do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815 - http.server names them

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield seen
    server.shutdown()
    server.server_close()


def xml(code):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} said</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (404, "NoSuchKey"), (404, "NoSuchBucket")]
)
def test_403_and_404_fail_at_once(monkeypatch, fast, status, code):
    with s3_answers(monkeypatch, (status, xml(code))) as seen:
        for call in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
            seen.clear()
            with pytest.raises(
                StorageError, match=f"s3://bucket/some/key: {code} said; check"
            ) as caught:
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
        for call in (
            storage.read_bytes,
            storage.list_files,
            lambda uri: storage.glob(uri + "/*"),
            storage.exists,
        ):
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
    with pytest.raises(StorageError, match="tried 5 times"):
        storage.read_bytes("s3://bucket/key")
    assert len(fast) == 4


def test_denied_bucket_is_named(monkeypatch):
    with (
        s3_answers(monkeypatch, (403, xml("AccessDenied"))),
        pytest.raises(StorageError, match=r"s3://bucket/k.*policy"),
    ):
        storage.check_writable("s3://bucket/k")


# --- a good server ---


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
        monkeypatch.setattr(
            file.raw._file, "read", lambda count: calls.append(count) or real(count)
        )
        assert len(file.read()) == 3 * 2**20 and calls == [3 * 2**20]


def test_long_listings_take_several_pages(s3_server, monkeypatch):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    for number in range(5):
        storage.write_bytes(f"{root}/{number}", b"")
    client, pages = s3.client(), []
    real = client.call_s3
    monkeypatch.setattr(
        client, "call_s3", lambda *args, **kw: pages.append(1) or real(*args, MaxKeys=2, **kw)
    )
    assert (
        storage.list_files(root) == [f"{root}/{number}" for number in range(5)] and len(pages) == 3
    )


# --- processes and threads ---


def test_filesystem_is_one_per_process_and_environment(s3_server, monkeypatch):
    first, path = storage.filesystem(s3_server + "/a/b")
    assert path == "bucket/a/b" and storage.filesystem("s3://other")[0] is first
    assert b"testing" not in pickle.dumps(first)  # a pickled filesystem carries no keys
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert storage.filesystem(s3_server)[0] is not first
    local, path = storage.filesystem("x/y")
    assert local.protocol[0] == "file" and path == os.path.abspath("x/y")


FORKED = """
    import os, sys
    from pipeline.io import storage
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
