"""Which machine this is, and whether a process of it has ended.

Leases and the names of unfinished files say who wrote them. Whether that writer is gone can only be
asked on the machine where it ran, and only where process numbers mean the same.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

CLOCK_SECONDS = 1.0
"""The clock of a machine may be set a little, so that a process seems to have begun at another
time.
"""


def machine() -> str:
    """A name for this machine since it was started, and for the space of its process numbers: 16
    letters.

    Two machines may have the same host name, and two containers of one machine each a process with
    our number. The number of the first process namespace is the same on all machines, so the id
    of the start of the machine goes into the name too.
    """
    started = ""
    with suppress(OSError):  # no Linux
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    text = f"{socket.gethostname()} {started} {process_namespace() or 0}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def process_namespace() -> int | None:
    """The number of the space of process numbers; none where the system does not tell it."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def has_ended(number: int, began: float | None = None) -> bool:
    """Whether the process of this number has ended, here on this machine.

    A process that has ended and that its parent has not asked for yet (a zombie) has ended: in a
    container whose first process asks for none it stays in the list for ever.

    Args:
        number: The process number.
        began: When the process began, by `psutil`; a number that went to another process since
            then is not it.
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
