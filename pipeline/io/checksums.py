"""Write files with checksums, and find out when they are read whether they are damaged.

A JSON document holds its own SHA-256 (`write_document`); those of other files are in the manifest
of their folder (`write_checked`, `atomic_folder.commit_folder`). Damage raises a `DamagedError`
whose message names the file in one line. Where the caller can make the content again it does so,
and `notify` says so in the terminal.

A document of an earlier version has no checksum and is read as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pipeline.io import atomic_folder, file_identity, storage
from pipeline.io.s3 import Uri
from pipeline.io.storage import DamagedError
from pipeline.io.threads import threaded_map

log = logging.getLogger(__name__)
Content = TypeVar("Content")
_CHECKSUM_FIELD = "content_sha256"
"""The field of a document that holds the SHA-256 of all others."""
_CONTENT = "content"
"""The name of the file in a folder of `write_checked`."""


# ---------------------------------------------------------------- documents


def write_document(uri: Uri, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its content, atomically."""
    storage.write_json(uri, atomic_folder.with_checksum(value, _CHECKSUM_FIELD))


def read_document(uri: Uri) -> dict[str, Any]:
    """Return a JSON object that `write_document` wrote.

    Raises:
        NotFoundError: Nothing is there.
        DamagedError: It is not what was written.
    """
    document = storage.read_json(uri)
    if not isinstance(document, dict):
        raise DamagedError(f"{uri} is damaged: it is no JSON object")
    if _has_wrong_checksum(document):
        raise DamagedError(
            f"{uri} is damaged: its content does not have the SHA-256 that it states"
        )
    return {name: value for name, value in document.items() if name != _CHECKSUM_FIELD}


def _has_wrong_checksum(document: Mapping[str, Any]) -> bool:
    """Return whether the checksum of a document is wrong, or its field's name seems damaged."""
    if _CHECKSUM_FIELD in document:
        expected = atomic_folder.with_checksum(document, _CHECKSUM_FIELD)
        return document[_CHECKSUM_FIELD] != expected[_CHECKSUM_FIELD]
    # a flipped bit in the name of the field must not make the document look like one of an earlier
    # version, which has no checksum
    digest_length = 64
    return any(
        len(name) == len(_CHECKSUM_FIELD) and isinstance(value, str) and len(value) == digest_length
        for name, value in document.items()
    )


def document_or_none(uri: Uri, remedy: str) -> dict[str, Any] | None:
    """Return a document, or None where nothing is there or where it is damaged.

    Args:
        remedy: What happens now, for the notification about damage.
    """
    return _intact_or_none(read_document, uri, remedy)


def _intact_or_none(read: Callable[[Uri], Content], uri: Uri, remedy: str) -> Content | None:
    """Return what ``read`` returns; None where it is missing, or with a warning where damaged."""
    try:
        return read(uri)
    except storage.NotFoundError:
        return None
    except DamagedError as error:
        notify(f"{error}: {remedy}")
        return None


def is_damaged(uri: Uri) -> bool:
    """Return whether a document is there and is not what was written."""
    try:
        read_document(uri)
    except storage.NotFoundError:
        return False
    except DamagedError:
        return True
    return False


# ---------------------------------------------------------------- bytes and folders


def write_checked(uri: Uri, data: bytes) -> None:
    """Write bytes with their checksum, in place of earlier ones.

    They are a file in a folder of its own, whose manifest has the checksum.
    """
    atomic_folder.commit_folder(uri, {_CONTENT: data}, {})


def read_checked(uri: Uri) -> bytes:
    """Return what `write_checked` wrote.

    Raises:
        NotFoundError: Nothing is there.
        DamagedError: It is not what was written.
    """
    return read_file(uri, atomic_folder.open_folder(uri), _CONTENT)


def read_checked_or_none(uri: Uri, remedy: str) -> bytes | None:
    """Return what `write_checked` wrote, or None where nothing is there or where it is damaged.

    Args:
        remedy: What happens now, for the notification about damage.
    """
    return _intact_or_none(read_checked, uri, remedy)


def read_file(uri: Uri, manifest: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of a file that a folder's manifest names.

    Raises:
        DamagedError: They are not those that were written, or the file is gone.
    """
    entry = atomic_folder.entries(uri, manifest).get(name)
    place = storage.join(uri, name)
    if entry is None:
        raise DamagedError(f"{place} is damaged: the folder's manifest does not name it")
    try:
        data = storage.read_bytes(place)
    except storage.NotFoundError as error:
        raise DamagedError(f"{place} is damaged: the file is gone") from error
    check_bytes(place, data, entry)
    return data


def check_bytes(uri: Uri, data: bytes, entry: Mapping[str, Any]) -> None:
    """Raise DamagedError when the bytes of a file are not those that its entry was made of."""
    actual = atomic_folder.entry_of_bytes(data)
    if (actual["sha256"], actual["size"]) != (entry.get("sha256"), entry.get("size")):
        raise DamagedError(atomic_folder.describe_damage(uri, actual, entry))


def check_folder(uri: Uri, manifest: Mapping[str, Any]) -> None:
    """Compare every file of a folder with the folder's manifest.

    A local file is read once: its digest is remembered while its times of change, size and inode
    stay the same (`file_identity`). An object on S3 is compared by its ETag. Where the manifest has
    none, as those of earlier versions, the objects are read, several at once.

    Raises:
        DamagedError: Names the first file that differs or is gone.
    """
    entries = atomic_folder.entries(uri, manifest)
    places = [storage.join(uri, name) for name in entries]
    to_read: list[tuple[str, Mapping[str, Any]]] = []
    for entry, file in zip(
        entries.values(), file_identity.identify(places, absent_ok=True), strict=True
    ):
        if file.content == file_identity.ABSENT:
            raise DamagedError(f"{file.uri} is damaged: the file is gone")
        if file.content not in _contents(entry):
            to_read.append((file.uri, entry))
    list(threaded_map(lambda file_of_folder: atomic_folder.verify_file(*file_of_folder), to_read))


def intact_folder(uri: Uri, remedy: str) -> dict[str, Any] | None:
    """Return the manifest of a folder whose files are as they were written, else None.

    Args:
        remedy: What happens now, for the notification about damage.
    """

    def read(uri: Uri) -> dict[str, Any]:
        manifest = atomic_folder.open_folder(uri)
        check_folder(uri, manifest)
        return manifest

    return _intact_or_none(read, uri, remedy)


def is_same(content: str, entry: Mapping[str, Any]) -> bool:
    """Return whether a content that `file_identity` found is the one that a manifest's entry says.

    Entries of older versions have no digest of pieces for a large file. Then its size decides.
    """
    is_old_large = (
        content.startswith(f"{entry['size']}-sha256-pieces:") and "sha256_pieces" not in entry
    )
    return is_old_large or content in _contents(entry)


def _contents(entry: Mapping[str, Any]) -> set[str]:
    """Return what `file_identity` may call the content of a file with this entry."""
    size = entry["size"]
    contents = {f"{size}-sha256:{entry['sha256']}"}
    if "sha256_pieces" in entry:
        contents.add(f"{size}-sha256-pieces:{entry['sha256_pieces']}")
    if "etag" in entry:
        contents.add(f"{size}-etag:{entry['etag']}")
    return contents


# ---------------------------------------------------------------- notifications

_LISTENERS: list[Callable[[str], object]] = []
_ALREADY_SENT: set[str] = set()


@contextlib.contextmanager
def notifications_to(listener: Callable[[str], object]) -> Iterator[None]:
    """Send what `notify` says in this block to ``listener``, each line once."""
    _LISTENERS.append(listener)
    _ALREADY_SENT.clear()
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def notify(line: str) -> None:
    """Send a line to the newest listener, or to the log when there is none; repeated lines are
    dropped.
    """
    if line in _ALREADY_SENT:
        return
    _ALREADY_SENT.add(line)
    if _LISTENERS:
        _LISTENERS[-1](f"warning: {line}")
    else:
        log.warning("%s", line)
