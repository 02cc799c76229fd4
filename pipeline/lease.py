"""One run of a job at a time: a lease in the job's folder, renewed while the run lives.

Two runs at once would train into the same folders and write the same table. A lease is a small JSON file, so it works on S3 too;
a run that was killed leaves one that is taken over when its process is gone (same host) or nothing has renewed it for a while.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil

from pipeline import storage

RENEW_SECONDS, STALE_SECONDS = 20.0, 90.0


class BusyError(ValueError):
    """Another run of the job is at work."""


@contextlib.contextmanager
def hold(root: str) -> Iterator[None]:
    """Hold the lease of the folder ``root``. Raises BusyError naming who has it."""
    uri = storage.join(root, ".run.json")
    mine = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "process_began": psutil.Process().create_time()}
    held = _read(uri)
    if held and _alive(held):
        raise BusyError(f"{root}: a run of this job is at work already (process {held['pid']} on {held['host']}); wait for it, stop it, or give this one "
                        "another name or storage")
    ended = threading.Event()

    def ours() -> bool:
        found = _read(uri)
        return found is not None and found.get("id") == mine["id"]

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(storage.StorageError):  # the next one, or the run itself, will say what is wrong
                if ours():  # a run that was taken for dead does not take the lease back
                    storage.write_json(uri, {**mine, "time": time.time()})

    storage.write_json(uri, {**mine, "time": time.time()})
    if not ours():  # of two runs that start in the same moment the later writer goes on
        raise BusyError(f"{root}: another run of this job has started in this moment; give the command again when it has ended")
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(storage.StorageError):
            if ours():
                storage.remove_tree(uri)


def _read(uri: str) -> dict[str, Any] | None:
    return storage.read_json(uri) if storage.exists(uri) else None


def _alive(held: dict[str, Any]) -> bool:
    if held.get("host") != socket.gethostname():
        return time.time() - held.get("time", 0.0) < STALE_SECONDS
    try:  # a number that went to another process since then is not the run
        return abs(psutil.Process(int(held["pid"])).create_time() - held["process_began"]) < 1.0
    except psutil.NoSuchProcess:
        return False
