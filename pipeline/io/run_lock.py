"""Let only one command work in a folder at a time, by a lease in the folder that it renews.

Two runs of a job at once would train into the same folders and write the same table. The outputs of
`prepare`, `predict` and `embed` have such a lease too. A lease is a small JSON file, so it works on
S3 too. The lease of a run that was killed is taken over when its process has ended (same machine)
or when nothing has renewed it for a while, and nothing does so while it is watched. A run renews
its lease in a file of its own beside it, and never writes the lease itself again.

Entering is exclusive: the lease is written only where none is (a hard link locally, a conditional
put on S3). Taking over is exclusive too: a run that wants to replace a dead lease first makes a
claim in the same way, a file named by the dead lease's id. For a store without conditional writes
there is `_enter_without_conditions`, and the run says so.

While the lease is held the process is inside its fence (`write_fence`): every write below the root
checks that the lease is still ours.
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
from pipeline.io.wording import plural

RENEW_SECONDS, STALE_SECONDS = 20.0, 90.0
WATCH_SECONDS, CLOCK_SECONDS = 1.5 * RENEW_SECONDS, 3600.0
"""How long a run of another machine is watched that seems dead by its last renewal, and the most
that the clocks of two machines may differ.
"""
SWEEP_SECONDS = 3600.0
"""Age at which what killed writers left is removed when a run begins.

It is removed at once where their process is known to have ended.
"""
TURNS_SECONDS = 60.0
"""How long a run tries to enter while several start at once."""
Lease = dict[str, Any]
"""``id``, ``host``, ``pid``, ``process_began``, ``machine``, and ``time`` (last renewal)."""
_RENEWAL_PREFIX = f"{write_fence.LEASE_PREFIX}-alive-"
"""Prefix of the file, named by the lease's id, that says when the run renewed its lease."""


class BusyError(ValueError):
    """Another run of the job is at work."""


@contextlib.contextmanager
def hold(root: str, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the lease of the folder ``root`` and stay inside its fence until the block ends.

    The main thread is interrupted when the lease goes to another run in the meantime.

    Args:
        note: Called with a line on how the lease is kept where the store has no conditional writes.

    Raises:
        BusyError: Another run has the lease; the message names it. write_fence.LostLeaseError: The
            lease went to another run.
    """
    lease = _new_lease()
    if storage.keeps_conditions(root):
        _enter(root, lease, note)
    else:
        note(
            f"{root}: this store has no conditional writes; runs that start at the same time "
            "find out by listing which one is first, which needs listings that show a write at "
            "once"
        )
        _enter_without_conditions(root, lease, note)
    ended, lost = threading.Event(), threading.Event()
    holder = threading.current_thread()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            # an error: the next renewal, or the run itself, will say what is wrong
            with contextlib.suppress(storage.StorageError):
                # a run that was taken for dead does not take the lease back
                if not is_held(root, lease):
                    lost.set()
                    if not ended.is_set():
                        _interrupt(holder)
                    return
                # the lease itself is never written again: between the look and the write another
                # run may have taken it over, and this one would take it back
                storage.write_json(_renewal_uri(root, lease["id"]), _now(lease))

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        with write_fence.guarded_by([write_fence.Fence(root, lease["id"])]):
            _sweep(root, lease, note)
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
            storage.remove_tree(_renewal_uri(root, lease["id"]))
        with contextlib.suppress(storage.StorageError):
            if is_held(root, lease):
                storage.remove_tree(write_fence.lease_uri(root))


def _interrupt(holder: threading.Thread) -> None:
    """Stop the thread that holds the lease, as Ctrl-C does.

    A command in the background of a script ignores Ctrl-C, and is stopped by SIGTERM if it handles
    that (`signals.install`). Only the main thread can be stopped so. Others are stopped by the
    fence.
    """
    if holder is not threading.main_thread() or holder.ident is None:
        return
    ignores_ctrl_c = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if not ignores_ctrl_c:
        signal.pthread_kill(holder.ident, signal.SIGINT)
    elif callable(signal.getsignal(signal.SIGTERM)):
        signal.pthread_kill(holder.ident, signal.SIGTERM)


def _sweep(root: str, lease: Lease, note: Callable[[str], None]) -> None:
    """Remove what killed writers and runs left. The lease is ours: no other run renews one here."""
    try:
        removed = storage.sweep(root, SWEEP_SECONDS) + storage.sweep_scratch(SWEEP_SECONDS)
        for claim in _claims(root):
            if not _is_alive(claim):
                storage.remove_tree(claim["uri"])
        for uri in storage.list_files(root, recursive=False):
            name = uri.rpartition("/")[2]
            if name.startswith(_RENEWAL_PREFIX) and uri != _renewal_uri(root, lease["id"]):
                storage.remove_tree(uri)
    except storage.StorageError as error:
        note(f"warning: what killed writers left cannot be removed: {error}")
        return
    if removed:
        files = plural(len(removed), "unfinished file")
        note(f"{root}: removed {files} of writers that were killed")


# ---------------------------------------------------------------- getting in


def _enter(root: str, lease: Lease, note: Callable[[str], None]) -> None:
    """Write our lease where there is none, or where the one that is there is dead."""
    uri = write_fence.lease_uri(root)
    for _ in _turns(root):
        if storage.create(uri, storage.encode(_now(lease))):
            if is_held(root, lease):  # a server may keep conditions less strictly than it says
                return
            continue
        current_lease = write_fence.read_lease(root)
        if current_lease is None:  # it was released in this moment
            continue
        if _holder_is_alive(root, current_lease, note):
            raise _busy(root, current_lease)
        if _take_over(root, current_lease, lease):
            return


def _take_over(root: str, dead: Lease, lease: Lease) -> bool:
    """Replace a dead lease by ours. Return false when another run was quicker.

    One run alone makes the claim on a dead lease, and removes it only after the dead lease was
    replaced. So a run that has made a claim and then still finds the dead lease is the only one to
    replace it. A run that died with its claim leaves it behind, and that claim is claimed in turn.
    """
    dead_claims: list[str] = []
    blocking = dead
    while True:
        claim = storage.join(root, f"{write_fence.LEASE_PREFIX}-claim-{blocking['id']}.json")
        if storage.create(claim, storage.encode(_now(lease))):
            break
        other = _read(claim)
        if other is None:
            return False
        if _is_alive(other):
            raise _busy(root, other)
        dead_claims.append(claim)
        blocking = other
    current_lease = write_fence.read_lease(root)
    is_still_there = current_lease is not None and current_lease["id"] == dead["id"]
    if is_still_there:
        storage.write_json(write_fence.lease_uri(root), _now(lease))
        for uri in dead_claims:
            storage.remove_tree(uri)
    storage.remove_tree(claim)
    return is_still_there and is_held(root, lease)


def _enter_without_conditions(root: str, lease: Lease, note: Callable[[str], None]) -> None:
    """Enter by claims that all runs list, for stores without conditional writes.

    A claim is visible before its run looks at those of others, and stays until its run has written
    the lease. So of two runs that claim at once at least one sees the other's claim. A run that
    sees one steps back and tries again a little later.
    """
    claim = storage.join(root, f"{write_fence.LEASE_PREFIX}-claim-{lease['id']}.json")
    try:
        for _ in _turns(root):
            storage.write_json(claim, _now(lease))
            others = [one for one in _claims(root) if one["id"] != lease["id"] and _is_alive(one)]
            current_lease = write_fence.read_lease(root)
            if current_lease is not None and _holder_is_alive(root, current_lease, note):
                raise _busy(root, current_lease)
            if not others:
                storage.write_json(write_fence.lease_uri(root), _now(lease))
                return
            storage.remove_tree(claim)
    finally:
        storage.remove_tree(claim)


def _claims(root: str) -> list[Lease]:
    """Return all claims in the folder, each with its ``uri``."""
    names = (
        uri
        for uri in storage.list_files(root, recursive=False)
        if f"/{write_fence.LEASE_PREFIX}-claim-" in uri
    )
    return [{**claim, "uri": uri} for uri in names if (claim := _read(uri)) is not None]


def _turns(root: str) -> Iterator[None]:
    """Yield once for every try, with random pauses between them.

    Raises:
        BusyError: They have taken longer than TURNS_SECONDS.
    """
    chance = random.SystemRandom()  # the global generator belongs to training
    began, pause = time.monotonic(), 0.02
    while time.monotonic() - began < TURNS_SECONDS:
        yield
        time.sleep(chance.uniform(0.1, 1.0) * pause)
        pause = min(1.0, 2 * pause)
    raise BusyError(
        f"{root}: other runs of this job are starting at this moment; give the command again "
        "when they have ended"
    )


def _busy(root: str, current_lease: Lease) -> BusyError:
    """Return the error for a folder whose lease another run holds."""
    advice = ""
    if not _is_of_this_machine(current_lease):
        advice = (
            f"; if it was killed or its machine failed, its folder is free {STALE_SECONDS:.0f} s "
            "after it last renewed its lease"
        )
    return BusyError(
        f"{root}: another run is at work already (process {current_lease.get('pid')} on "
        f"{current_lease.get('host')}); wait for it, stop it, or give this one another folder (a "
        f"job: another name or storage){advice}"
    )


# ---------------------------------------------------------------- leases


def _new_lease() -> Lease:
    """Return a lease of this process."""
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "machine": processes.machine(),
    }


def _now(lease: Lease) -> Lease:
    """Return the lease with the time of now."""
    return {**lease, "time": time.time()}


def _read(uri: str) -> Lease | None:
    """Return a lease or claim, or None where the file is gone."""
    try:
        return write_fence.parse_lease(uri, storage.read_bytes(uri))
    except storage.NotFoundError:
        return None


def is_held(root: str, lease: Lease) -> bool:
    """Return whether the lease of the folder is ours."""
    current_lease = write_fence.read_lease(root)
    return current_lease is not None and current_lease["id"] == lease["id"]


def _renewal_uri(root: str, lease_id: str) -> str:
    """Return the place of the file in which a run renews its lease."""
    return storage.join(root, f"{_RENEWAL_PREFIX}{lease_id}.json")


def _holder_is_alive(root: str, current_lease: Lease, note: Callable[[str], None]) -> bool:
    """Return whether the run that has the lease lives.

    On this machine its process decides, elsewhere the time since its last renewal. The clocks of
    two machines may differ, so that a run is watched for a while before it is taken for dead.
    """
    if _is_of_this_machine(current_lease):
        return _is_alive(current_lease)
    uri = _renewal_uri(root, current_lease["id"])
    renewed = _read(uri)
    newest = max(one.get("time", 0.0) for one in (current_lease, renewed or {}))
    if _is_alive({**current_lease, "time": newest}):
        return True
    if time.time() - newest > CLOCK_SECONDS:
        return False
    note(
        f"{root}: waiting {WATCH_SECONDS:.0f} s to see whether process {current_lease.get('pid')} "
        f"on {current_lease.get('host')} still works on this job"
    )
    time.sleep(WATCH_SECONDS)
    return _read(uri) not in (None, renewed)


def _is_alive(lease: Lease) -> bool:
    """Return whether the run of a lease or claim lives.

    On this machine its process decides, elsewhere the time since its last renewal.
    """
    if not _is_of_this_machine(lease):
        return time.time() - lease.get("time", 0.0) < STALE_SECONDS
    return not processes.has_ended(int(lease["pid"]), lease["process_began"])


def _is_of_this_machine(lease: Lease) -> bool:
    """Return whether a lease was written on this machine."""
    if "machine" in lease:
        return lease["machine"] == processes.machine()
    # earlier versions named the host and the namespace alone
    namespace = processes.process_namespace()
    is_same_namespace = lease.get("pid_namespace", namespace) == namespace
    return lease.get("host") == socket.gethostname() and is_same_namespace
