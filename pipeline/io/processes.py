"""Identify this machine, and find out whether a process of it has ended.

Leases and the names of unfinished files say which process wrote them. Whether that process has
ended can be found out only on its own machine, and only where process numbers mean the same.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

CLOCK_SECONDS = 1.0
"""Tolerance for a process's start time, because the clock of a machine may be set a little."""


def machine() -> str:
    """Return a name of 16 letters for this machine since its start, and for its process numbers.

    Two machines may have the same host name, and two containers of one machine may each have a
    process with our number. The number of the first process namespace is the same on all machines,
    so the machine's boot id is part of the name too.
    """
    started = ""
    with suppress(OSError):  # no Linux
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    text = f"{socket.gethostname()} {started} {process_namespace() or 0}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def process_namespace() -> int | None:
    """Return the number of this process namespace, or None where the system does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def has_ended(number: int, began: float | None = None) -> bool:
    """Return whether the process of this number has ended, on this machine.

    A zombie, which has ended but was not yet waited for by its parent, counts as ended: in a
    container whose first process waits for none it stays in the list for ever.

    Args:
        number: The process number.
        began: When the process began, by ``psutil``. A number that another process has got since
            does not count.
    """
    try:
        process = psutil.Process(number)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return True
        return began is not None and abs(process.create_time() - began) >= CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # it is there, and of another user
        return False
