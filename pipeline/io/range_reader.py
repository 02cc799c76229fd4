"""A file whose bytes come in ranges, as a seekable file."""

from __future__ import annotations

import io
import os
from typing import Any


class RangeReader(io.RawIOBase):
    """Seekable reads of `size` bytes; `uri` names them in errors."""

    def __init__(self, uri: str, size: int):
        self.uri, self.size, self._position = uri, size, 0

    def read_range(self, start: int, stop: int) -> bytes:
        """Return all bytes from `start` to `stop`, which lie in the file."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise ValueError(f"{self.uri}: cannot seek to {position}")
        self._position = position
        return position

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        return self.read(max(0, self.size - self._position)) or b""

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = min(start + len(buffer), self.size)
        data = self.read_range(start, stop) if start < stop else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
