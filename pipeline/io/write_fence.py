"""Keep a process from writing into a job's folder once its run has lost the lease of that folder.

A run that was taken for dead (a suspended machine, a network that was down) may wake up while
another run has begun. All that is written below a job's root goes through `storage`,
`atomic_folder` and the metrics log, and each of them calls `check` first, which is one small read.
The driver enters the fence when it takes the lease (`run_lock.hold`). Its Ray workers enter the
same fence, which travels to them with their work.

The lease may change hands between the check and the write. What is written then is one complete
file or folder, and the next check stops the run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.io import s3
from pipeline.io.s3 import StorageError, Uri

LEASE_FILE = ".run.json"
"""Name of the lease, directly below a job's root."""
LEASE_PREFIX = ".run"
"""Prefix of the files directly below the root that belong to the lease and are never fenced."""


class LostLeaseError(StorageError):
    """The run no longer holds the lease of its job's folder, so it must not write there."""


@dataclass(frozen=True)
class Fence:
    """Allow writing to the folder ``root`` while its lease has the id ``lease_id``."""

    root: str
    lease_id: str


_ENTERED: list[Fence] = []
"""Fences of this process, the newest last."""


@contextlib.contextmanager
def guarded_by(fences: Sequence[Fence]) -> Iterator[None]:
    """Hold this process to the fences until the block ends."""
    fences = list(fences)
    _ENTERED.extend(fences)
    try:
        yield
    finally:
        for fence in fences:
            _ENTERED.remove(fence)


def current_fences() -> tuple[Fence, ...]:
    """Return the fences that hold this process, to be sent along with work for other processes."""
    return tuple(_ENTERED)


def check(uri: Uri) -> None:
    """Raise LostLeaseError where ``uri`` lies in a folder whose lease this run no longer holds."""
    for fence in _ENTERED:
        if _is_below(uri, fence.root):
            holder = read_lease(fence.root)
            if holder is None or holder.get("id") != fence.lease_id:
                raise LostLeaseError(describe_loss(fence.root, holder))


def describe_loss(root: str, holder: dict[str, Any] | None) -> str:
    """Return one line for a run that lost its lease, which says who has it now."""
    why = f"its file {LEASE_FILE} is gone"
    if holder is not None:
        why = f"process {holder.get('pid')} on {holder.get('host')} has it now"
    return (
        f"{root}: this run no longer holds the lease of its folder ({why}), so it stops and writes "
        "nothing more; what it finished is kept. Give the command again when no other run is at "
        "work"
    )


def read_lease(root: str) -> dict[str, Any] | None:
    """Return the lease of a job's folder, or None where there is none.

    Raises:
        StorageError: The file is no lease.
    """
    uri = lease_uri(root)
    remote, path = s3.split(uri)
    try:
        data = (
            s3.on_s3("read", uri, "cat_file", max_concurrency=1)
            if remote
            else s3.call("read", uri, Path(path).read_bytes)
        )
    except s3.NotFoundError:
        return None
    return parse_lease(uri, data)


def lease_uri(root: str) -> str:
    """Return the place of the lease of a job's folder."""
    return f"{root.rstrip('/')}/{LEASE_FILE}"


def parse_lease(uri: str, data: bytes) -> dict[str, Any]:
    """Return a lease from the bytes of its file. Raise StorageError for what is no lease."""
    with contextlib.suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return found
    raise StorageError(
        f"{uri} is damaged, so nobody can tell who holds this folder; remove it when no run of "
        "this job is at work"
    )


def _is_below(uri: Uri, root: str) -> bool:
    """Return whether ``uri`` is the root or lies below it, and is no file of the lease itself."""
    here, there = _plain(uri), _plain(root)
    if here == there:
        return True
    if not here.startswith(there + "/"):
        return False
    return not here[len(there) + 1 :].startswith(LEASE_PREFIX)


def _plain(uri: Uri) -> str:
    """Return a URI in a form that compares equal for the same place."""
    remote, path = s3.split(uri)
    return f"s3://{path}" if remote else os.path.realpath(path)
