"""A stand-in for the Hugging Face hub on loopback, for tests of what is uploaded."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Handler(BaseHTTPRequestHandler):
    """The calls of an upload, as huggingface_hub makes them for files that need no LFS."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://127.0.0.1:{self.server.server_port}/me/clothes"
        if self.server.refuses:
            answer, status = {"error": "no write access"}, 403
        elif self.path == "/api/repos/create":
            self.server.seen["created"] = json.loads(content)
            answer, status = {"url": address}, 200
        elif self.path == "/api/validate-yaml":
            self.server.seen["card"] = json.loads(content)["content"]
            answer, status = {"errors": [], "warnings": []}, 200
        elif self.path == "/api/models/me/clothes/preupload/main":
            names = [one["path"] for one in json.loads(content)["files"]]
            listed = [{"path": name, "uploadMode": "regular"} for name in names]
            answer, status = {"files": [{**one, "shouldIgnore": False} for one in listed]}, 200
        else:
            assert self.path == "/api/models/me/clothes/commit/main"
            lines = [json.loads(line) for line in content.splitlines()]
            self.server.seen["files"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.server.seen["token"] = self.headers["Authorization"]
            answer, status = {"commitUrl": f"{address}/commit/a1", "commitOid": "a1"}, 200
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@contextmanager
def hub_server() -> Iterator[ThreadingHTTPServer]:
    """Serve the repository me/clothes, where huggingface_hub looks for it. ``seen`` has what came."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.refuses = {}, False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_for_this_test")
        yield server
    server.shutdown()
    server.server_close()
