"""One run of a job at a time: a lease in the job's folder, renewed while the run lives.

Two runs at once would train into the same folders and write the same table. A lease is a small JSON
file, so it works on S3 too; a run that was killed leaves one that is taken over when its process is
gone (same machine) or nothing has renewed it for a while. A run renews its lease in a file of its
own, beside the lease, which it never writes again.

Getting in is exclusive: the file is made only where none is (a hard link locally, a conditional put
on S3). Taking over is exclusive too: who wants the place of a dead lease first makes a claim, a
file named by the dead lease's id, in the same way. A store without conditional writes is used with
`_enter_without_conditions`, and the run says so.

While the lease is held the process is inside its `fence`: every write under the root checks that
the lease is still ours.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from pipeline.io import processes, storage, write_fence

RENEW_SECONDS, STALE_SECONDS = 20.0, 90.0
SWEEP_SECONDS = 3600.0
"""What killed writers left goes when a run begins: at once where their process is known to be gone,
else when it is so old.
"""
TURNS_SECONDS = 60.0
"""So long a run tries to get in where several start at once."""
Lease = dict[str, Any]
"""``id``, ``host``, ``pid``, ``process_began``, ``machine`` and ``time``, when it was made or
renewed.
"""
_RENEWAL_PREFIX = f"{write_fence.LEASE_PREFIX}-alive-"
"""Beside the lease lies a file with this name and the lease's id: it says when the run renewed its
lease.
"""


class BusyError(ValueError):
    """Another run of the job is at work."""


@contextlib.contextmanager
def hold(root: str, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the lease of the folder ``root`` and stay inside its fence.

    ``note`` is told how the lease is kept where the store has no conditional writes. Raises
    BusyError naming who has it, and fence.LostLeaseError when it went to another run in the
    meantime: the main thread is interrupted then.
    """
    mine = _new_lease()
    if storage.keeps_conditions(root):
        _enter(root, mine)
    else:
        note(
            f"{root}: this store has no conditional writes; runs that start at once find out "
            "by listing who is first, "
            "which needs listings that show a write at once"
        )
        _enter_without_conditions(root, mine)
    ended, lost = threading.Event(), threading.Event()
    holder = threading.current_thread()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(
                storage.StorageError
            ):  # the next one, or the run itself, will say what is wrong
                if not _is_held(
                    root, mine
                ):  # a run that was taken for dead does not take the lease back
                    lost.set()
                    if not ended.is_set():
                        _interrupt(holder)
                    return
                # the lease itself is never written again: between the look and the write another
                # run may have taken it over, and this one would take it back
                storage.write_json(_renewal_uri(root, mine["id"]), _now(mine))

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        with write_fence.guarded_by([write_fence.Fence(root, mine["id"])]):
            _sweep(root, mine, note)
            yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise write_fence.LostLeaseError(
                write_fence.describe_loss(root, write_fence.read_lease(root))
            ) from None
        raise
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(storage.StorageError):
            storage.remove_tree(_renewal_uri(root, mine["id"]))
        with contextlib.suppress(storage.StorageError):
            if _is_held(root, mine):
                storage.remove_tree(write_fence.lease_uri(root))


def _interrupt(holder: threading.Thread) -> None:
    """Stop the thread that holds the lease, as Ctrl-C does. Only the main thread can be stopped so:
    others are stopped by the fence.
    """
    if holder is threading.main_thread() and holder.ident is not None:
        signal.pthread_kill(holder.ident, signal.SIGINT)


def _sweep(root: str, mine: Lease, note: Callable[[str], None]) -> None:
    """Remove what writers and runs left that were killed. The lease is ours, so renewals of other
    runs are of no use.
    """
    try:
        removed = storage.sweep(root, SWEEP_SECONDS) + storage.sweep_scratch(SWEEP_SECONDS)
        for claim in _claims(root):
            if not _is_alive(claim):
                storage.remove_tree(claim["uri"])
        for uri in storage.list_files(root, recursive=False):
            name = uri.rpartition("/")[2]
            if name.startswith(_RENEWAL_PREFIX) and uri != _renewal_uri(root, mine["id"]):
                storage.remove_tree(uri)
    except storage.StorageError as error:
        note(f"warning: what killed writers left cannot be removed: {error}")
        return
    if removed:
        note(
            f"{root}: {len(removed)} unfinished file{'s' if len(removed) > 1 else ''} of "
            "writers that were killed removed"
        )


# ---------------------------------------------------------------- getting in


def _enter(root: str, mine: Lease) -> None:
    """Make the lease ours where none is, or where the one that is there is dead."""
    uri = write_fence.lease_uri(root)
    for _ in _turns(root):
        if storage.create(uri, storage.encode(_now(mine))):
            if _is_held(root, mine):  # a server may keep conditions less strictly than it says
                return
            continue
        held = write_fence.read_lease(root)
        if held is None:  # it was released in this moment
            continue
        if _holder_is_alive(root, held):
            raise _busy(root, held)
        if _take_over(root, held, mine):
            return


def _take_over(root: str, dead: Lease, mine: Lease) -> bool:
    """Put our lease in the place of a dead one; false when another run was quicker.

    The claim on a dead lease is made by one run alone, and is removed only after the dead lease was
    replaced. So whoever has made a claim and then still finds the dead lease in its place is the
    only one to replace it. A run that died with its claim leaves it behind: that claim is claimed
    in turn.
    """
    left: list[str] = []
    blocking = dead
    while True:
        claim = storage.join(root, f"{write_fence.LEASE_PREFIX}-claim-{blocking['id']}.json")
        if storage.create(claim, storage.encode(_now(mine))):
            break
        other = _read(claim)
        if other is None:
            return False
        if _is_alive(other):
            raise _busy(root, other)
        left.append(claim)
        blocking = other
    held = write_fence.read_lease(root)
    is_still_there = held is not None and held["id"] == dead["id"]
    if is_still_there:
        storage.write_json(write_fence.lease_uri(root), _now(mine))
        for one in left:
            storage.remove_tree(one)
    storage.remove_tree(claim)
    return is_still_there and _is_held(root, mine)


def _enter_without_conditions(root: str, mine: Lease) -> None:
    """Get in where the store cannot make a file only where none is: by claims that all runs list.

    A claim is visible before its run looks at those of others, and stays until its run has written
    the lease. So of two runs that claim at once at least one sees the other's claim; who sees one
    steps back and tries again a little later.
    """
    claim = storage.join(root, f"{write_fence.LEASE_PREFIX}-claim-{mine['id']}.json")
    try:
        for _ in _turns(root):
            storage.write_json(claim, _now(mine))
            others = [one for one in _claims(root) if one["id"] != mine["id"] and _is_alive(one)]
            held = write_fence.read_lease(root)
            if held is not None and _holder_is_alive(root, held):
                raise _busy(root, held)
            if not others:
                storage.write_json(write_fence.lease_uri(root), _now(mine))
                return
            storage.remove_tree(claim)
    finally:
        storage.remove_tree(claim)


def _claims(root: str) -> list[Lease]:
    names = (
        uri
        for uri in storage.list_files(root, recursive=False)
        if f"/{write_fence.LEASE_PREFIX}-claim-" in uri
    )
    return [{**found, "uri": uri} for uri in names if (found := _read(uri)) is not None]


def _turns(root: str) -> Iterator[None]:
    """Tries with random pauses between them. Raises BusyError when they have taken too long."""
    chance = random.SystemRandom()  # the global generator belongs to training
    began, pause = time.monotonic(), 0.02
    while time.monotonic() - began < TURNS_SECONDS:
        yield
        time.sleep(chance.uniform(0.1, 1.0) * pause)
        pause = min(1.0, 2 * pause)
    raise BusyError(
        f"{root}: other runs of this job start in this moment; give the command again when "
        "they have ended"
    )


def _busy(root: str, held: Lease) -> BusyError:
    return BusyError(
        f"{root}: a run of this job is at work already (process {held.get('pid')} on "
        f"{held.get('host')}); wait for it, "
        "stop it, or give this one another name or storage"
    )


# ---------------------------------------------------------------- leases


def _new_lease() -> Lease:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "machine": processes.machine(),
    }


def _now(lease: Lease) -> Lease:
    return {**lease, "time": time.time()}


def _read(uri: str) -> Lease | None:
    try:
        return write_fence.parse_lease(uri, storage.read_bytes(uri))
    except storage.NotFoundError:
        return None


def _is_held(root: str, mine: Lease) -> bool:
    found = write_fence.read_lease(root)
    return found is not None and found["id"] == mine["id"]


def _renewal_uri(root: str, lease_id: str) -> str:
    return storage.join(root, f"{_RENEWAL_PREFIX}{lease_id}.json")


def _holder_is_alive(root: str, held: Lease) -> bool:
    """Whether the run that has the lease still lives, by its process or by when it renewed the
    lease.
    """
    renewed = _read(_renewal_uri(root, held["id"])) or {}
    newest = max(held.get("time", 0.0), renewed.get("time", 0.0))
    return _is_alive({**held, "time": newest})


def _is_alive(held: Lease) -> bool:
    """Whether the run of a lease or claim lives: on this machine its process, else how old it
    is.
    """
    if not _is_of_this_machine(held):
        return time.time() - held.get("time", 0.0) < STALE_SECONDS
    return not processes.has_ended(int(held["pid"]), held["process_began"])


def _is_of_this_machine(held: Lease) -> bool:
    if "machine" in held:
        return held["machine"] == processes.machine()
    # earlier versions named the host and the namespace alone
    here = processes.process_namespace()
    return held.get("host") == socket.gethostname() and held.get("pid_namespace", here) == here
