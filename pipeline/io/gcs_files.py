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
    return _Buckets()


def _path(uri: str) -> str:
    """Return BUCKET/KEY."""
    path = uri.partition("://")[2].rstrip("/")
    if not path or path.startswith("/"):
        raise StorageError(f"{uri!r} names no place; write gs://BUCKET/KEY")
    return path


class _Buckets:
    """A `Store` of buckets."""

    def __init__(self):
        try:
            from gcsfs import core
        except ImportError:
            raise StorageError(f"gs:// needs gcsfs, which is not installed: {INSTALL}") from None
        # the plain client: the other one asks by gRPC what kind of bucket it is, for a minute where
        # that is closed
        self._client: Any = core.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)

    def look(self, uri: str) -> Place:
        path = _path(uri)
        info = self._asked(uri, lambda: self._client.info(path))
        if info["type"] == "directory":
            return Place(0, "", is_folder=True)
        # each version of an object has a generation of its own
        return Place(info["size"], f"generation {info['generation']}")

    def read(self, uri: str, start: int, end: int, known: Place) -> bytes:
        path, generation = _path(uri), known.stamp.rpartition(" ")[2]
        try:
            return self._asked(
                uri,
                lambda: self._client.cat_file(path, start=start, end=end, generation=generation),
            )
        except FileNotFoundError as error:
            raise StorageError(f"{uri} was changed while it was read; run again") from error

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        path = _path(uri)

        def ask() -> list[str]:
            depth = None if recursive else 1
            found = self._client.find(path, maxdepth=depth, detail=True, update_cache=False)
            return [
                f"gs://{name}"
                for name, info in found.items()
                if info["type"] == "file" and name.startswith(f"{path}/") and name[-1] != "/"
            ]

        try:
            return self._asked(uri, ask)
        except FileNotFoundError:
            return []

    def _asked(self, uri: str, ask: Callable[[], Result]) -> Result:
        """Call gcsfs, which repeats its requests by itself; what it raises in the end is final."""
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:
            # of any kind: gcsfs raises HttpError, OSError, and errors of requests and google.auth
            reason = str(error).strip() or type(error).__name__
            raise StorageError(
                f"cannot read {uri}: {reason} (gcsfs has tried several times); check the bucket "
                "and Google's credentials"
            ) from error
