"""The door by which what the program wrote is read back: nothing comes through that is not what was
written.

Everything carries a SHA-256: a JSON document its own (`write_document`), bytes and files that of
their folder's manifest (`keep_bytes`, `folders.commit_folder`). Damage is a `DamagedError`, one
line that names the file. What can be made again is made again by whoever asked for it, and `tell`
says so in the terminal.

A document that an earlier version wrote has no checksum. It is read as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.io import atomic_folder, file_identity, storage
from pipeline.io.s3 import Uri
from pipeline.io.storage import DamagedError

log = logging.getLogger(__name__)
_SEAL = "content_sha256"
"""The field of a document that holds the SHA-256 of all others."""
_CONTENT = "content"
"""The file in a folder of `keep_bytes`."""


# ---------------------------------------------------------------- documents


def write_document(uri: Uri, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its content, atomically."""
    storage.write_json(uri, atomic_folder.with_checksum(value, _SEAL))


def read_document(uri: Uri) -> dict[str, Any]:
    """A JSON object as `write_document` wrote it. Raises NotFoundError, and DamagedError where it
    is not that.
    """
    found = storage.read_json(uri)
    if not isinstance(found, dict):
        raise DamagedError(f"{uri} is damaged: it is no JSON object")
    if _has_broken_seal(found):
        raise DamagedError(
            f"{uri} is damaged: its content does not have the SHA-256 that it states"
        )
    return {name: value for name, value in found.items() if name != _SEAL}


def _has_broken_seal(found: Mapping[str, Any]) -> bool:
    if _SEAL in found:
        return found[_SEAL] != atomic_folder.with_checksum(found, _SEAL)[_SEAL]
    # a flipped bit in the name of the seal must not make the document look like one of an earlier
    # version
    digest_length = 64
    return any(
        len(name) == len(_SEAL) and isinstance(value, str) and len(value) == digest_length
        for name, value in found.items()
    )


def document_or_none(uri: Uri, remedy: str) -> dict[str, Any] | None:
    """A document, or none where nothing is there or it is damaged; damage is told with what happens
    now (``remedy``).
    """
    try:
        return read_document(uri)
    except storage.NotFoundError:
        return None
    except DamagedError as error:
        notify(f"{error}: {remedy}")
        return None


def is_damaged(uri: Uri) -> bool:
    """Whether a document is there and is not what was written."""
    try:
        read_document(uri)
    except storage.NotFoundError:
        return False
    except DamagedError:
        return True
    return False


# ---------------------------------------------------------------- bytes and folders


def keep_bytes(uri: Uri, data: bytes) -> None:
    """Keep bytes in a folder of their own, with a manifest; what was kept there before is
    replaced.
    """
    atomic_folder.commit_folder(uri, {_CONTENT: data}, {})


def read_kept(uri: Uri) -> bytes:
    """What `keep_bytes` kept. Raises NotFoundError, and DamagedError where it is not that."""
    return read_file(uri, atomic_folder.open_folder(uri), _CONTENT)


def kept_bytes(uri: Uri, remedy: str) -> bytes | None:
    """What `keep_bytes` kept, or none where nothing is there or it is damaged, which is told with
    what happens now.
    """
    try:
        return read_kept(uri)
    except storage.NotFoundError:
        return None
    except DamagedError as error:
        notify(f"{error}: {remedy}")
        return None


def read_file(uri: Uri, manifest: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a file that a folder's manifest names. Raises DamagedError where they are not
    those that were written.
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
    found = atomic_folder.entry_of_bytes(data)
    if (found["sha256"], found["size"]) != (entry.get("sha256"), entry.get("size")):
        raise DamagedError(atomic_folder.describe_damage(uri, found, entry))


def check_folder(uri: Uri, manifest: Mapping[str, Any]) -> None:
    """Compare every file with the manifest of its folder. Raises DamagedError naming the first that
    differs or is gone.

    A local file is read once: what was read is remembered while its times of change, size and inode
    stay (`identity`). An object on S3 is known by its ETag. Where the manifest has none, as those
    of earlier versions, it is read, several at once.
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
    storage.at_once(lambda one: atomic_folder.verify_file(*one), to_read)


def intact_folder(uri: Uri, remedy: str) -> dict[str, Any] | None:
    """The manifest of a folder whose files are as they were written, or none where there is none or
    a damaged one.

    Damage is told with what happens now (``remedy``).
    """
    try:
        manifest = atomic_folder.open_folder(uri)
        check_folder(uri, manifest)
    except storage.NotFoundError:
        return None
    except DamagedError as error:
        notify(f"{error}: {remedy}")
        return None
    return manifest


def is_same(content: str, entry: Mapping[str, Any]) -> bool:
    """Whether what `identity` read of a file is what its entry says. Of a large file whose entry is
    older than digests of pieces the size decides.
    """
    is_old_large = (
        content.startswith(f"{entry['size']}-sha256-pieces:") and "sha256_pieces" not in entry
    )
    return is_old_large or content in _contents(entry)


def _contents(entry: Mapping[str, Any]) -> set[str]:
    """What `identity` calls the content of a file with this entry."""
    size = entry["size"]
    found = {f"{size}-sha256:{entry['sha256']}"}
    if "sha256_pieces" in entry:
        found.add(f"{size}-sha256-pieces:{entry['sha256_pieces']}")
    if "etag" in entry:
        found.add(f"{size}-etag:{entry['etag']}")
    return found


# ---------------------------------------------------------------- what is told

_LISTENERS: list[Callable[[str], object]] = []
_ALREADY_SENT: set[str] = set()


@contextlib.contextmanager
def notifications_to(listener: Callable[[str], object]) -> Iterator[None]:
    """Within this block what `tell` says goes to ``listener``, each line once."""
    _LISTENERS.append(listener)
    _ALREADY_SENT.clear()
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def notify(line: str) -> None:
    """Say a line to who listens, else to the log. A line that was said before is not repeated."""
    if line in _ALREADY_SENT:
        return
    _ALREADY_SENT.add(line)
    if _LISTENERS:
        _LISTENERS[-1](f"warning: {line}")
    else:
        log.warning("%s", line)
