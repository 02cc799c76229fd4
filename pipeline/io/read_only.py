"""Stores that are only read: http://, https://, hf://, gs:// and az://, behind one small contract.

`storage` and `file_identity` ask a `Store` for what they read. Writing needs more than such a store
promises (a lock, files that appear whole), so it is refused with one error, by `s3.split`.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import NamedTuple, Protocol

from pipeline.io import s3
from pipeline.io.range_reader import RangeReader
from pipeline.io.s3 import Uri


class Place(NamedTuple):
    """What a store says of a file or folder without sending it.

    Attributes:
        size: Bytes of the file; 0 for a folder.
        stamp: While it is the same, the content is taken to be the same (an ETag, say).
        is_folder: Whether it is a folder.
        modified_s: Time of change in seconds since 1970; none where the store does not say.
        only_whole: Whether the store sends this file only as a whole.
    """

    size: int
    stamp: str
    is_folder: bool = False
    modified_s: float | None = None
    only_whole: bool = False


class Store(Protocol):
    """What is asked of a store. Errors are OSErrors or those of its client (`s3.is_transient`)."""

    def look(self, uri: str) -> Place:
        """Return what is at a URI.

        Raises:
            FileNotFoundError: Nothing is there.
        """
        ...

    def read(self, uri: str, start: int, end: int, known: Place) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive) of a file.

        Raises:
            s3.StorageError: The file is no longer the one that ``known`` describes.
        """
        ...

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        """Return the full URIs of the files below a folder; none where there is no folder."""
        ...


def store_of(uri: Uri) -> Store:
    """Return the store of a URI."""
    return store_of_module(s3.READ_ONLY[os.fspath(uri).partition("://")[0]], os.getpid())


@functools.cache
def store_of_module(module: str, process: int) -> Store:
    """Return what a module's ``store()`` returns, which is imported when needed.

    Each process has its own: sockets do not survive a fork.
    """
    return importlib.import_module(module).store()


def look(uri: Uri) -> Place:
    """Return what is at a URI.

    Raises:
        s3.NotFoundError: Nothing is there. s3.StorageError: It cannot be known.
    """
    return s3.call("look at", uri, store_of(uri).look, os.fspath(uri))


def read_range(uri: Uri, start: int, end: int, known: Place | None = None) -> bytes:
    """Return bytes ``start`` to ``end`` (exclusive, at most the size) of a file.

    Args:
        known: The file as it must still be; none: as it is now.
    """
    known = known or look(uri)
    end = min(end, known.size)
    if start >= end:
        return b""
    data = s3.call(
        "read",
        uri,
        store_of(uri).read,
        os.fspath(uri),
        start,
        end,
        known,
    )
    if len(data) != end - start:
        raise s3.StorageError(
            f"cannot read {os.fspath(uri)}: {len(data)} of {end - start} bytes came; run again"
        )
    return data


def list_files(uri: Uri, recursive: bool) -> list[str]:
    """Return the full URIs of the files below a folder."""
    return s3.call("list", uri, store_of(uri).list_files, os.fspath(uri), recursive)


class Reader(RangeReader):
    """Seekable reads of one file, each range retried, all of the file that was first opened."""

    def __init__(self, uri: Uri):
        self.place = look(uri)
        super().__init__(os.fspath(uri), self.place.size)
        if self.place.is_folder:
            raise s3.StorageError(f"{self.uri} is a folder; name a file in it")
        self._whole: bytes | None = None

    def read_range(self, start: int, stop: int) -> bytes:
        if not self.place.only_whole:
            return read_range(self.uri, start, stop, self.place)
        if self._whole is None:
            self._whole = read_range(self.uri, 0, self.size, self.place)
        return self._whole[start:stop]
