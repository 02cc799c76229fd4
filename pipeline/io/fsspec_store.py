"""Base class of the stores that are read through fsspec: gs:// and az://."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.io.read_only import Place
from pipeline.io.s3 import StorageError

Result = TypeVar("Result")


class FsspecStore:
    """A `read_only.Store` of buckets or containers.

    Attributes:
        uri_format: How a URI is written.
        library: The filesystem's package.
        extra: The extra of this package that installs it.
        fix: What to do about an error.
        client: The filesystem.
    """

    uri_format: str
    library: str
    extra: str
    fix: str

    def __init__(self):
        try:
            self.client = self.connect()
        except ImportError:
            # worded as in pipeline.config.extras, which this layer may not import
            raise StorageError(
                f"{self.uri_format.partition('://')[0]}:// needs {self.library}, which is not "
                f"installed: uv pip install -e '.[{self.extra}]' (without a GPU add "
                "--torch-backend cpu; without a clone: pip install "
                f"'onetomany[{self.extra}]')"
            ) from None

    def connect(self) -> Any:
        """Return the filesystem.

        Raises:
            ImportError: Its package is missing.
        """
        raise NotImplementedError

    def stamp(self, info: dict[str, Any]) -> str:
        """Return a file's version (`Place.stamp`: an ETag, a generation) from fsspec's info."""
        raise NotImplementedError

    def read_range(self, path: str, start: int, end: int, stamp: str) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive) of the version with this ``stamp``.

        Raises:
            FileNotFoundError: That version is gone.
        """
        raise NotImplementedError

    def find(self, path: str, recursive: bool) -> list[str]:
        """Return BUCKET/KEY of the objects below a folder; others may be among them.

        Raises:
            FileNotFoundError: There is no such bucket.
        """
        raise NotImplementedError

    def look(self, uri: str) -> Place:
        path = self._path(uri)
        info = self._call(uri, lambda: self.client.info(path))
        if info["type"] == "directory":
            return Place(0, "", is_folder=True)
        return Place(info["size"], self.stamp(info))

    def read(self, uri: str, start: int, end: int, known: Place) -> bytes:
        path = self._path(uri)
        try:
            return self._call(uri, lambda: self.read_range(path, start, end, known.stamp))
        except FileNotFoundError as error:
            raise StorageError(f"{uri} was changed while it was read; run again") from error

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        path, scheme = self._path(uri), uri.partition("://")[0]
        try:
            found = self._call(uri, lambda: self.find(path, recursive))
        except FileNotFoundError:
            return []
        return [
            f"{scheme}://{name}"
            for name in found
            if name.startswith(f"{path}/") and not name.endswith("/")
        ]

    def _path(self, uri: str) -> str:
        """Return BUCKET/KEY."""
        path = uri.partition("://")[2].rstrip("/")
        if not path or path.startswith("/") or "@" in path.partition("/")[0]:
            raise StorageError(f"{uri!r} names no place; write {self.uri_format}")
        return path

    def _call(self, uri: str, request: Callable[[], Result]) -> Result:
        """Call the client, which repeats its requests by itself; what it raises is final."""
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:
            # of any kind: gcsfs raises HttpError, OSError, and errors of requests and google.auth,
            # adlfs those of azure.core, which go on with the answer's XML
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise StorageError(
                f"cannot read {uri}: {reason} ({self.library} has tried several times); {self.fix}"
            ) from error
