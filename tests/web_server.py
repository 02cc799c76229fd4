"""A web server on loopback, for tests of what is read from one."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebServer:
    """Files by path, and how they are served; `requests` has what was asked for."""

    def __init__(self, address: str):
        self.address = address
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, bytes] = {}
        """What is sent for a path with its query, whatever range is asked for."""
        self.ranges, self.validators = True, True
        self.failures: list[int] = []
        """Statuses that the next requests get."""
        self.missing = 404
        """The status of what is not there."""
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        """Headers `Authorization` of requests for files."""

    def bytes_asked(self) -> int:
        """Return the sum of the ranges that were asked for."""
        ranges = re.findall(r"bytes=(\d+)-(\d+)", " ".join(self.requests))
        return sum(int(end) - int(start) + 1 for start, end in ranges)

    def put(self, path: str, data: bytes) -> str:
        """Serve a file and return its address."""
        self.files[path] = data
        return f"{self.address}/{path}"


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Serve files with byte ranges and ETags, which http.server's own handler does not do."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body go out together

        def do_GET(self):
            path = self.path.lstrip("/").partition("?")[0]
            served.requests.append(f"{self.path} {self.headers.get('Range', '')}")
            if served.failures:
                return self._answer(served.failures.pop(0), b"")
            if self.path in served.answers:
                return self._answer(200, served.answers[self.path])
            if path not in served.files:
                return self._answer(served.missing, b"no such file")
            served.tokens.add(self.headers.get("Authorization", ""))
            data = served.files[path]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not served.ranges or asked is None:
                return self._answer(200, data, data)
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if start >= len(data):
                return self._answer(416, b"", data, f"bytes */{len(data)}")
            return self._answer(206, data[start:end], data, f"bytes {start}-{end - 1}/{len(data)}")

        def _answer(self, status, body, file=None, content_range=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if file is not None and served.validators:
                self.send_header("ETag", f'"{hashlib.md5(file).hexdigest()}"')
            if content_range is not None:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = WebServer(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
