"""Objects of Google Cloud Storage, gs://BUCKET/KEY, through gcsfs (extra `gcs`).

Credentials are Google's usual ones (``GOOGLE_APPLICATION_CREDENTIALS``, `gcloud auth
application-default login`, the machine's own). Objects are only read: that a lock and a folder
commit keep their promises there has not been tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.io.read_only import Place, Store
from pipeline.io.s3 import StorageError

Result = TypeVar("Result")
INSTALL = "uv sync --extra gcs (without a clone: pip install 'onetomany[gcs]')"
"""As `pipeline.config.extras` says it, which this layer does not know."""


def store() -> Store:
    """Return the store of this process."""
    return Buckets()


class Buckets:
    """A `Store` of buckets, through one of fsspec's filesystems.

    Attributes:
        form: How a URI is written.
        library: The filesystem's package.
        fix: What to do about an error.
        client: The filesystem.
    """

    form = "gs://BUCKET/KEY"
    library = "gcsfs"
    fix = "check the bucket and Google's credentials"

    def __init__(self):
        self.client = self.connect()

    def connect(self) -> Any:
        """Return the filesystem; raise StorageError where its package is missing."""
        try:
            from gcsfs import core
        except ImportError:
            raise StorageError(f"gs:// needs gcsfs, which is not installed: {INSTALL}") from None
        # the plain client: the other one asks by gRPC what kind of bucket it is, for a minute where
        # that is closed
        return core.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)

    def stamp(self, info: dict[str, Any]) -> str:
        """Return what changes with the content: each version of an object has a generation."""
        return f"generation {info['generation']}"

    def read_range(self, path: str, start: int, end: int, stamp: str) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive) of the version with this stamp.

        Raises:
            FileNotFoundError: That version is gone.
        """
        generation = stamp.rpartition(" ")[2]
        return self.client.cat_file(path, start=start, end=end, generation=generation)

    def look(self, uri: str) -> Place:
        path = self._path(uri)
        info = self._asked(uri, lambda: self.client.info(path))
        if info["type"] == "directory":
            return Place(0, "", is_folder=True)
        return Place(info["size"], self.stamp(info))

    def read(self, uri: str, start: int, end: int, known: Place) -> bytes:
        path = self._path(uri)
        try:
            return self._asked(uri, lambda: self.read_range(path, start, end, known.stamp))
        except FileNotFoundError as error:
            raise StorageError(f"{uri} was changed while it was read; run again") from error

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        path, scheme = self._path(uri), uri.partition("://")[0]
        try:
            found = self._asked(uri, lambda: self.find(path, recursive))
        except FileNotFoundError:
            return []
        return [
            f"{scheme}://{name}"
            for name in found
            if name.startswith(f"{path}/") and not name.endswith("/")
        ]

    def find(self, path: str, recursive: bool) -> list[str]:
        """Return BUCKET/KEY of the objects below a folder; others may be among them.

        Raises:
            FileNotFoundError: There is no such bucket.
        """
        depth = None if recursive else 1
        found = self.client.find(path, maxdepth=depth, detail=True, update_cache=False)
        return [name for name, info in found.items() if info["type"] == "file"]

    def _path(self, uri: str) -> str:
        """Return BUCKET/KEY."""
        path = uri.partition("://")[2].rstrip("/")
        if not path or path.startswith("/") or "@" in path.partition("/")[0]:
            raise StorageError(f"{uri!r} names no place; write {self.form}")
        return path

    def _asked(self, uri: str, ask: Callable[[], Result]) -> Result:
        """Call the client, which repeats its requests by itself; what it raises is final."""
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:
            # of any kind: gcsfs raises HttpError, OSError, and errors of requests and google.auth,
            # adlfs those of azure.core, which go on with the answer's XML
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise StorageError(
                f"cannot read {uri}: {reason} ({self.library} has tried several times); {self.fix}"
            ) from error
