"""Objects of Google Cloud Storage, gs://BUCKET/KEY, through gcsfs (extra `gcs`).

Credentials are Google's usual ones (``GOOGLE_APPLICATION_CREDENTIALS``, `gcloud auth
application-default login`, the machine's own). Objects are only read: that a lock and a folder
commit keep their promises there has not been tried.
"""

from __future__ import annotations

from typing import Any

from pipeline.io.fsspec_store import FsspecStore
from pipeline.io.read_only import Store


def store() -> Store:
    """Return the store of this process."""
    return _Buckets()


class _Buckets(FsspecStore):
    """A `Store` of all buckets."""

    uri_format = "gs://BUCKET/KEY"
    library = "gcsfs"
    extra = "gcs"
    fix = "check the bucket and Google's credentials"

    def connect(self) -> Any:
        from gcsfs import core

        # the plain client: the other one asks by gRPC what kind of bucket it is, for a minute where
        # that is closed
        return core.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)

    def stamp(self, info: dict[str, Any]) -> str:
        return f"generation {info['generation']}"  # each version of an object has its own

    def read_range(self, path: str, start: int, end: int, stamp: str) -> bytes:
        generation = stamp.rpartition(" ")[2]
        return self.client.cat_file(path, start=start, end=end, generation=generation)

    def find(self, path: str, recursive: bool) -> list[str]:
        depth = None if recursive else 1
        found = self.client.find(path, maxdepth=depth, detail=True, update_cache=False)
        return [name for name, info in found.items() if info["type"] == "file"]
