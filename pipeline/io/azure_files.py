"""Blobs of Azure Storage, az://CONTAINER/PATH (or abfs://), through adlfs (extra `azure`).

Credentials are adlfs's: ``AZURE_STORAGE_CONNECTION_STRING``, or ``AZURE_STORAGE_ACCOUNT_NAME`` with
``AZURE_STORAGE_ACCOUNT_KEY`` or ``AZURE_STORAGE_SAS_TOKEN``; with the account alone those of
`az login` or the machine's own. Tested with Azurite, not with Azure's own servers.
"""

from __future__ import annotations

from typing import Any

from pipeline.io.fsspec_store import FsspecStore
from pipeline.io.read_only import Store
from pipeline.io.s3 import StorageError

_CREDENTIALS = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with "
    "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or `az login`"
)


def store() -> Store:
    """Return the store of this process."""
    return _Containers()


class _Containers(FsspecStore):
    """A `Store` of the containers of one account."""

    uri_format = "az://CONTAINER/PATH, with the account in AZURE_STORAGE_ACCOUNT_NAME"
    library = "adlfs"
    extra = "azure"
    fix = f"check the container and the credentials: {_CREDENTIALS}"

    def connect(self) -> Any:
        from adlfs import AzureBlobFileSystem

        try:
            return AzureBlobFileSystem(use_listings_cache=False, skip_instance_cache=True)
        except ValueError as error:
            raise StorageError(f"az://: {error}; {_CREDENTIALS}") from error

    def stamp(self, info: dict[str, Any]) -> str:
        return info["etag"]

    def find(self, path: str, recursive: bool) -> list[str]:
        from azure.core.exceptions import ResourceNotFoundError
        from fsspec.asyn import sync

        container, _, folder = path.partition("/")

        async def ask() -> list[str]:  # adlfs does not look below a name that a blob has too
            async with self.client.service_client.get_container_client(container) as client:
                blobs = client.list_blobs if recursive else client.walk_blobs
                prefix = f"{folder}/" if folder else None
                found = blobs(name_starts_with=prefix, include=["metadata"])
                return [f"{container}/{blob.name}" async for blob in found if not _is_folder(blob)]

        try:
            answer: Any = sync(self.client.loop, ask)
            return answer
        except ResourceNotFoundError as error:
            raise FileNotFoundError(path) from error

    def read_range(self, path: str, start: int, end: int, stamp: str) -> bytes:
        from azure.core import MatchConditions
        from azure.core.exceptions import ResourceModifiedError, ResourceNotFoundError
        from fsspec.asyn import sync

        async def ask() -> bytes:  # adlfs's own ranges do not notice that a blob was replaced
            container, _, name = path.partition("/")
            async with self.client.service_client.get_blob_client(container, name) as blob:
                stream = await blob.download_blob(
                    start, end - start, etag=stamp, match_condition=MatchConditions.IfNotModified
                )
                return await stream.readall()

        try:
            answer: Any = sync(self.client.loop, ask)
            return answer
        except (ResourceModifiedError, ResourceNotFoundError) as error:
            raise FileNotFoundError(path) from error


def _is_folder(blob: Any) -> bool:
    """Return whether a blob only stands for a folder, as in accounts with real folders."""
    marks = {name.lower(): value for name, value in (blob.get("metadata") or {}).items()}
    return "true" in (marks.get("hdi_isfolder"), marks.get("is_directory"))
