"""Let SIGTERM, which clusters send before they take a machine away, end a command as Ctrl-C does.

The handler passes the signal on as SIGINT, so that whatever handles Ctrl-C at that moment (Python's
KeyboardInterrupt, Ray Train's way of ending its ranks) handles SIGTERM too. `exit_code` tells the
two apart afterwards.

A command in the background of a script ignores Ctrl-C, because the shell sets it so. It still ends
on SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

CTRL_C, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes as shells give them to a process that a signal has ended."""
_received = threading.Event()


def install() -> None:
    """Handle SIGTERM from now on. Call this once, in the main thread of a command."""
    signal.signal(signal.SIGTERM, _answer)


def _answer(number: int, frame: Any) -> None:
    """Handle SIGTERM: raise SIGINT, or KeyboardInterrupt where SIGINT is ignored."""
    if _received.is_set():  # a second one would only disturb the way out
        return
    _received.set()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def keep_signal_handler() -> Iterator[None]:
    """Keep our handler of SIGTERM through calls that install their own, as ``ray.init`` does.

    Raises:
        KeyboardInterrupt: SIGTERM came while the other handler was there. Ray's ends the process
            with SystemExit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM or before is not _answer:
            raise
        _received.set()
        raise KeyboardInterrupt from end
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code() -> int:
    """Return the exit code of a command that was stopped: 143 after SIGTERM, else 130."""
    return TERMINATED if _received.is_set() else CTRL_C
