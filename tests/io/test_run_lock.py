"""One run of a job at a time: a lease that is held is refused to others, one whose run is gone is
taken over.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from faults import run_python

from pipeline.io import atomic_folder, run_lock, s3, signals, storage, write_fence
from pipeline.io.run_lock import BusyError
from pipeline.report import results
from pipeline.train import checkpoint
from pipeline.train.log import MetricsLog
from pipeline.train.ranks import Ranks
from tests.benchmarks.lease_rounds import rounds


def held(root: str) -> dict | None:
    uri = storage.join(root, ".run.json")
    return storage.read_json(uri) if storage.exists(uri) else None


def renewed(root: str, lease_id: str) -> dict | None:
    uri = storage.join(root, f".run-alive-{lease_id}.json")
    return storage.read_json(uri) if storage.exists(uri) else None


def left_behind(root: str, **change) -> dict:
    """A lease as a run leaves it that never came to its end; by default of this living process."""
    found = {
        "id": "1",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "time": time.time(),
        **change,
    }
    storage.write_json(storage.join(root, ".run.json"), found)
    return found


def test_a_second_run_is_refused_and_told_who_is_at_work(root):
    with run_lock.hold(root):
        mine = held(root)
        assert mine is not None and (mine["pid"], mine["host"]) == (
            os.getpid(),
            socket.gethostname(),
        )
        with pytest.raises(BusyError) as caught, run_lock.hold(root):
            pytest.fail("two runs at once")
        assert str(caught.value).startswith(
            f"{root}: another run is at work already (process {os.getpid()} on "
            f"{socket.gethostname()})"
        )
        assert held(root) == mine, "the one that was refused leaves the lease alone"
        with run_lock.hold(root + "-other"):
            pass  # another job is not concerned


def test_the_lock_is_released_afterwards(root):
    for _ in range(2):
        with run_lock.hold(root):
            assert held(root) is not None
        assert held(root) is None
    with pytest.raises(KeyboardInterrupt), run_lock.hold(root):
        raise KeyboardInterrupt
    assert held(root) is None
    assert not any(thread.name == "lease" for thread in threading.enumerate())
    with run_lock.hold(root):
        pass


DIES = """
    import os, sys
    from pipeline.io import run_lock as lease

    with lease.hold(sys.argv[1]):
        print(os.getpid(), flush=True)
        os._exit(9)
"""


def test_the_lease_of_a_run_that_was_killed_is_taken_over(root):
    """At once, long before it would be stale: its process is gone."""
    dead = run_python(DIES, root)
    assert dead.returncode == 9, dead.stderr
    left = held(root)
    assert (
        left is not None
        and left["pid"] == int(dead.stdout)
        and time.time() - left["time"] < run_lock.STALE_SECONDS
    )
    with run_lock.hold(root):
        now = held(root)
        assert now is not None and now["pid"] == os.getpid()
    assert held(root) is None


LIVES = """
    import sys
    from pipeline.io import run_lock as lease

    with lease.hold(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_living_process_of_this_host_holds_it_however_old_the_lease_is(tmp_path):
    import textwrap

    root = str(tmp_path / "job")
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LIVES), root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        left_behind(
            root,
            pid=other.pid,
            process_began=psutil.Process(other.pid).create_time(),
            time=time.time() - 3600,
        )
        with pytest.raises(BusyError, match=rf"process {other.pid} on "), run_lock.hold(root):
            pytest.fail("two runs at once")
    finally:
        other.communicate("", timeout=30)
    with run_lock.hold(root):
        pass


def test_a_number_that_went_to_another_process_is_not_the_run(root):
    left_behind(root, process_began=psutil.Process().create_time() - 5000)
    with run_lock.hold(root):
        pass
    # The clock of the system was set a little
    left_behind(root, process_began=psutil.Process().create_time() + 0.3)
    with pytest.raises(BusyError), run_lock.hold(root):
        pytest.fail("two runs at once")


def test_of_another_host_a_fresh_lease_is_obeyed_and_a_stale_one_taken_over(root, monkeypatch):
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 0.0)
    there = {"host": "elsewhere", "pid": 12}
    left_behind(root, **there, time=time.time() - run_lock.STALE_SECONDS + 30)
    with (
        pytest.raises(
            BusyError,
            match=r"process 12 on elsewhere.*if it was killed or its machine failed, its folder is "
            r"free 90 s after it last renewed its lease",
        ),
        run_lock.hold(root),
    ):
        pytest.fail("two runs at once")
    left_behind(root, **there, time=time.time() - run_lock.STALE_SECONDS - 1)
    with run_lock.hold(root):
        mine = held(root)
        assert mine is not None and mine["host"] == socket.gethostname()
    assert held(root) is None


def test_a_lease_is_renewed_while_the_run_lives(tmp_path, monkeypatch):
    """Else another host would take it over after a while. A write that fails in between is no
    matter.
    """
    assert run_lock.RENEW_SECONDS * 3 < run_lock.STALE_SECONDS, "three renewals may fail"
    written, real, failed = threading.Semaphore(0), storage.write_json, []

    def write(uri, value):
        if written.acquire(blocking=False) and not failed:
            failed.append(1)
            written.release()
            raise storage.StorageError("the server is down for a moment")
        real(uri, value)
        written.release()

    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(run_lock.storage, "write_json", write)
    root = str(tmp_path / "job")
    with run_lock.hold(root):
        first = held(root)
        assert first is not None
        for _ in range(500):
            now = renewed(root, first["id"])
            if failed and now and now["time"] > first["time"]:
                break
            time.sleep(0.01)
        assert failed and now and now["time"] > first["time"] and now["id"] == first["id"]
        assert held(root) == first, "the lease itself is never written again"
    assert held(root) is None and renewed(root, first["id"]) is None


def test_a_lease_that_another_host_renews_is_obeyed_however_old_it_is(root, monkeypatch):
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 0.0)
    old = time.time() - run_lock.STALE_SECONDS - 1
    there = left_behind(root, host="elsewhere", pid=12, time=old)
    renewal = storage.join(root, ".run-alive-1.json")
    storage.write_json(renewal, {**there, "time": time.time()})
    with pytest.raises(BusyError, match=r"process 12 on elsewhere"), run_lock.hold(root):
        pytest.fail("two runs at once")
    storage.write_json(renewal, {**there, "time": old})
    with run_lock.hold(root):
        assert renewed(root, "1") is None


@pytest.mark.parametrize("behind_s", [200.0, 3000.0])
def test_a_living_run_on_a_machine_whose_clock_is_behind_is_obeyed(root, monkeypatch, behind_s):
    """By the clock of this machine, it has not renewed its lease for minutes."""
    there = left_behind(root, host="elsewhere", pid=12, time=time.time() - behind_s)
    renewal = storage.join(root, ".run-alive-1.json")
    storage.write_json(renewal, there)

    later = {**there, "time": there["time"] + run_lock.RENEW_SECONDS}
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 2.0)
    timer = threading.Timer(0.5, storage.write_json, (renewal, later))
    timer.start()
    said: list[str] = []
    refused = pytest.raises(BusyError, match="process 12 on elsewhere")
    with refused, run_lock.hold(root, said.append):
        pytest.fail("two runs at once")
    timer.join()
    assert said == [
        f"{root}: waiting 2 s to see whether process 12 on elsewhere still works on this job"
    ]


def test_a_run_that_ended_long_ago_is_not_watched(root):
    left_behind(root, host="elsewhere", pid=12, time=time.time() - 3700)
    said: list[str] = []
    with run_lock.hold(root, said.append):
        assert said == []


def test_a_run_does_not_take_its_lease_back_in_the_moment_of_renewing_it(root, monkeypatch):
    """Another run takes the lease over after this one has looked at it and before it renews it."""
    looks, taken = run_lock.is_held, []

    def is_held(place, mine):
        found = looks(place, mine)
        if threading.current_thread().name == "lease" and not taken:
            taken.append(left_behind(place, id="other", host="elsewhere", pid=12))
        return found

    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "is_held", is_held)
    with (
        pytest.raises(write_fence.LostLeaseError, match="process 12 on elsewhere has it now"),
        run_lock.hold(root),
    ):
        threading.Event().wait(20)
        pytest.fail("nothing has stopped it")
    assert taken == [held(root)]


def test_a_run_that_was_killed_and_that_its_parent_has_not_asked_for_is_dead(root):
    """The first process of many a container asks for none: the dead stay in the list of
    processes.
    """
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        began = psutil.Process(dead.pid).create_time()
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE
        left_behind(root, pid=dead.pid, process_began=began)
        with run_lock.hold(root):
            pass


def test_a_lease_of_another_machine_with_the_same_name_is_obeyed(root):
    """Its process numbers mean nothing here: none of this machine has that number."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left_behind(root, machine="0" * 16, pid=ended.pid)
    with pytest.raises(BusyError, match=rf"process {ended.pid} on "), run_lock.hold(root):
        pytest.fail("two runs at once")


@pytest.mark.parametrize("conditions", ["local", "kept", "ignored"])
def test_of_several_that_start_at_once_exactly_one_gets_in(conditions, request, tmp_path):
    """Half of the rounds find the lease of a dead run. tests/benchmarks/lease_rounds.py plays 30 of
    each.
    """
    place = (
        str(tmp_path)
        if conditions == "local"
        else f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"
    )
    assert rounds(place, 2, 4, conditions) == {1: 2}


def test_a_store_without_conditional_writes_is_named(s3_server, monkeypatch):
    real = s3.create_key

    def unconditional(uri, data):
        real(uri, data)
        return True

    monkeypatch.setattr(s3, "create_key", unconditional)
    root, said = f"{s3_server}/{uuid.uuid4().hex}", []
    with run_lock.hold(root, said.append):
        assert held(root) is not None
        with pytest.raises(BusyError, match="is at work already"), run_lock.hold(root, said.append):
            pytest.fail("two runs at once")
    assert (
        said
        == [
            f"{root}: this store has no conditional writes; runs that start at the same time "
            "find out by listing which one is first, which needs listings that show a write at "
            "once"
        ]
        * 2
    )
    assert storage.list_files(root) == []


def test_a_server_that_refuses_conditional_writes_is_used_without_them(s3_server, monkeypatch):
    def refuse(uri, data):
        raise s3.NoConditionsError("501")

    monkeypatch.setattr(s3, "create_key", refuse)
    root, said = f"{s3_server}/{uuid.uuid4().hex}", []
    with run_lock.hold(root, said.append):
        assert held(root) is not None and len(said) == 1


def test_a_claim_whose_run_died_is_claimed_in_turn(root):
    """Of a run that was killed while it took a dead lease over."""
    first = left_behind(root, id="first", process_began=psutil.Process().create_time() - 5000)
    for dead, by in (("first", "second"), ("second", "third")):
        storage.write_json(storage.join(root, f".run-claim-{dead}.json"), {**first, "id": by})
    with run_lock.hold(root):
        mine = held(root)
        assert mine is not None and mine["id"] not in ("first", "second", "third")
        assert [uri for uri in storage.list_files(root) if "/.run-claim" in uri] == []
    left_behind(root, id="first", process_began=psutil.Process().create_time() - 5000)
    storage.write_json(
        storage.join(root, ".run-claim-first.json"),
        {**first, "id": "living", "process_began": psutil.Process().create_time()},
    )
    with pytest.raises(BusyError, match="is at work already"), run_lock.hold(root):
        pytest.fail("another run is taking the lease over")


def test_a_damaged_lease_is_one_line_that_says_what_to_do(root):
    storage.write_bytes(storage.join(root, ".run.json"), b'{"id": 3')
    with (
        pytest.raises(
            storage.StorageError,
            match=r"\.run\.json is damaged, .*; remove it when no run of this job is at work$",
        ),
        run_lock.hold(root),
    ):
        pytest.fail("nobody knows who is at work")


# ---------------------------------------------------------------- the fence


def write_log(root: str) -> None:
    log = MetricsLog(storage.join(root, "log"))
    log.write({"step": 1})
    log.close()


WRITES = {
    "a file": lambda root: storage.write_bytes(storage.join(root, "a/file"), b"x"),
    "a folder": lambda root: atomic_folder.commit_folder(
        storage.join(root, "folder"), {"data": b"x"}, {}
    ),
    "the table": lambda root: results.append(
        root, [results.ResultRow(trial_id="t", status="done", trial_stage="final")]
    ),
    "a resume point": lambda root: checkpoint.save(
        storage.join(root, "checkpoints"), Ranks(), {"step": 1}
    ),
    "the log": write_log,
    "a removal": lambda root: storage.remove_tree(storage.join(root, "kept")),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_run_that_lost_its_lease_writes_nothing_more(root, what):
    storage.write_bytes(storage.join(root, "kept"), b"x")
    with pytest.raises(write_fence.LostLeaseError) as caught, run_lock.hold(root):
        left_behind(root, id="other", host="elsewhere", pid=12)  # it was taken over
        before = storage.list_files(root)
        storage.write_bytes(root + "-elsewhere", b"x")  # what lies outside is not concerned
        WRITES[what](root)
    assert str(caught.value) == (
        f"{root}: this run no longer holds the lease of its folder (process 12 on elsewhere has it "
        "now), so it stops and writes nothing more; what it finished is kept. Give the command "
        "again when no other run is at work"
    )
    assert storage.list_files(root) == before and held(root) == storage.read_json(
        storage.join(root, ".run.json")
    )


@pytest.mark.parametrize("what", WRITES)
def test_a_run_that_holds_its_lease_writes(root, what):
    storage.write_bytes(storage.join(root, "kept"), b"x")
    with run_lock.hold(root):
        before = storage.list_files(root)
        WRITES[what](root)
        assert storage.list_files(root) != before


def test_a_lease_whose_file_was_removed_is_lost(root):
    with (
        pytest.raises(write_fence.LostLeaseError, match=r"\(its file \.run\.json is gone\)"),
        run_lock.hold(root),
    ):
        storage.remove_tree(storage.join(root, ".run.json"))
        storage.write_bytes(storage.join(root, "file"), b"x")


def lose_the_lease_while_waiting(root) -> None:
    """The main thread may be waiting for a rank for hours."""
    with (
        pytest.raises(write_fence.LostLeaseError, match="elsewhere"),
        run_lock.hold(root),
    ):
        left_behind(root, id="other", host="elsewhere", pid=12)
        threading.Event().wait(60)
        pytest.fail("nothing has stopped it")
    assert not write_fence.current_fences()


def test_a_lease_that_is_lost_while_nothing_is_written_ends_the_run(root, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.05)
    lose_the_lease_while_waiting(root)


def test_a_lost_lease_ends_a_command_in_the_background_of_a_script_too(root, monkeypatch):
    """The shell lets such a command ignore Ctrl-C."""
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(signals, "_received", threading.Event())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals.install()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lose_the_lease_while_waiting(root)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.ray
def test_ray_workers_are_inside_the_fence_of_their_run(ray_here, tmp_path):
    from pipeline.data.stream import map_items

    root = str(tmp_path / "job")

    def write(name: str) -> str:
        try:
            storage.write_bytes(storage.join(root, name), b"x")
        except write_fence.LostLeaseError as error:
            return str(error)
        return "written"

    with run_lock.hold(root):
        assert list(map_items(write, ["a"])) == ["written"]
        left_behind(root, id="other", host="elsewhere", pid=12)
        (refused,) = map_items(write, ["b"])
        assert refused.startswith(f"{root}: this run no longer holds the lease")
    left_behind(root, id="third", host="elsewhere", pid=13)
    assert list(map_items(write, ["c"])) == ["written"], "outside of a run, the same worker is free"
    assert sorted(path.name for path in (tmp_path / "job").glob("?")) == ["a", "c"]
