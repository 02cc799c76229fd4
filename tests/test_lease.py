"""One run of a job at a time: a lease that is held is refused to others, one whose run is gone is taken over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from faults import run_python

from pipeline import lease, storage
from pipeline.lease import BusyError


def held(root: str) -> dict | None:
    uri = storage.join(root, ".run.json")
    return storage.read_json(uri) if storage.exists(uri) else None


def left_behind(root: str, **change) -> dict:
    """A lease as a run leaves it that never came to its end; by default of this living process."""
    found = {"id": "1", "host": socket.gethostname(), "pid": os.getpid(), "process_began": psutil.Process().create_time(), "time": time.time(), **change}
    storage.write_json(storage.join(root, ".run.json"), found)
    return found


def test_a_second_run_is_refused_and_told_who_is_at_work(root):
    with lease.hold(root):
        mine = held(root)
        assert mine is not None and (mine["pid"], mine["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(BusyError) as caught, lease.hold(root):
            pytest.fail("two runs at once")
        assert str(caught.value).startswith(f"{root}: a run of this job is at work already (process {os.getpid()} on {socket.gethostname()})")
        assert held(root) == mine, "the one that was refused leaves the lease alone"
        with lease.hold(root + "-other"):
            pass  # another job is not concerned


def test_it_is_released_afterwards(root):
    for _ in range(2):
        with lease.hold(root):
            assert held(root) is not None
        assert held(root) is None
    with pytest.raises(KeyboardInterrupt), lease.hold(root):
        raise KeyboardInterrupt
    assert held(root) is None
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    with lease.hold(root):
        pass


DIES = """
    import os, sys
    from pipeline import lease

    with lease.hold(sys.argv[1]):
        print(os.getpid(), flush=True)
        os._exit(9)
"""


def test_the_lease_of_a_run_that_was_killed_is_taken_over(root):
    """At once, long before it would be stale: its process is gone."""
    dead = run_python(DIES, root)
    assert dead.returncode == 9, dead.stderr
    left = held(root)
    assert left is not None and left["pid"] == int(dead.stdout) and time.time() - left["time"] < lease.STALE_SECONDS
    with lease.hold(root):
        now = held(root)
        assert now is not None and now["pid"] == os.getpid()
    assert held(root) is None


LIVES = """
    import sys
    from pipeline import lease

    with lease.hold(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_living_process_of_this_host_holds_it_however_old_the_lease_is(tmp_path):
    import textwrap

    root = str(tmp_path / "job")
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(LIVES), root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parents[1])
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        left_behind(root, pid=other.pid, process_began=psutil.Process(other.pid).create_time(), time=time.time() - 3600)
        with pytest.raises(BusyError, match=rf"process {other.pid} on "), lease.hold(root):
            pytest.fail("two runs at once")
    finally:
        other.communicate("", timeout=30)
    with lease.hold(root):
        pass


def test_a_number_that_went_to_another_process_is_not_the_run(root):
    left_behind(root, process_began=psutil.Process().create_time() - 5000)
    with lease.hold(root):
        pass
    left_behind(root, process_began=psutil.Process().create_time() + 0.3)  # the clock of the system was set a little
    with pytest.raises(BusyError), lease.hold(root):
        pytest.fail("two runs at once")


def test_of_another_host_a_fresh_lease_is_obeyed_and_a_stale_one_taken_over(root):
    there = {"host": "elsewhere", "pid": 12}
    left_behind(root, **there, time=time.time() - lease.STALE_SECONDS + 30)
    with pytest.raises(BusyError, match=r"process 12 on elsewhere"), lease.hold(root):
        pytest.fail("two runs at once")
    left_behind(root, **there, time=time.time() - lease.STALE_SECONDS - 1)
    with lease.hold(root):
        mine = held(root)
        assert mine is not None and mine["host"] == socket.gethostname()
    assert held(root) is None


def test_a_lease_is_renewed_while_the_run_lives(tmp_path, monkeypatch):
    """Else another host would take it over after a while. A write that fails in between is no matter."""
    assert lease.RENEW_SECONDS * 3 < lease.STALE_SECONDS, "three renewals may fail"
    written, real, failed = threading.Semaphore(0), storage.write_json, []

    def write(uri, value):
        if written.acquire(blocking=False) and not failed:
            failed.append(1)
            written.release()
            raise storage.StorageError("the server is down for a moment")
        real(uri, value)
        written.release()

    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(lease.storage, "write_json", write)
    root = str(tmp_path / "job")
    with lease.hold(root):
        first = held(root)
        for _ in range(500):
            now = held(root)
            if failed and now and first and now["time"] > first["time"]:
                break
            time.sleep(0.01)
        assert failed and now and first and now["time"] > first["time"] and now["id"] == first["id"]
    assert held(root) is None
