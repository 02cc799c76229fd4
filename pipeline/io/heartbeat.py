"""Signs of life of long work, so that whoever waits for a process learns that it still goes on.

Code that takes steps or reads batches calls `beat`, which costs next to nothing when nobody
listens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Tell the listeners of this process that work goes on."""
    for listener in _listeners:
        listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Call ``listener`` at every beat of this process until the block ends. It must be quick."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
