"""Commit folders in one step, so that they are complete or absent, with every file's SHA-256.

A reader sees the complete committed folder, or the one before it, or none. The manifest holds the
checksums, so that a flipped bit is found. Errors are those of `storage`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.io import file_identity, s3, storage, write_fence
from pipeline.io.s3 import DamagedError, NotFoundError, StorageError, Uri

Files = Mapping[str, bytes | Path]


def with_checksum(manifest: Mapping[str, Any], key: str = "sha256") -> dict[str, Any]:
    """Return a manifest with the SHA-256 of its own content (canonical JSON) under ``key``."""
    plain = {name: value for name, value in manifest.items() if name != key}
    canonical = json.dumps(
        json.loads(json.dumps(plain)),
        sort_keys=True,
        separators=(",", ":"),
    )
    return {**plain, key: hashlib.sha256(canonical.encode()).hexdigest()}


def _check_names(uri: Uri, names: Iterable[str], manifest_name: str = "") -> None:
    """Raise StorageError for a name that is no relative path inside the folder."""
    for name in names:
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or "\\" in name
        if outside or str(path) != name or name in ("", ".", manifest_name):
            raise StorageError(
                f"{os.fspath(uri)}: {name!r} cannot name a file in it; use a relative name "
                "without '..'"
            )


def entries(uri: Uri, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``manifest["files"]``, checked, because a manifest is data from outside.

    Raises:
        DamagedError: An entry lacks its size or SHA-256.
        StorageError: A name leads out of the folder.
    """
    found = manifest.get("files")
    if not isinstance(found, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("size"), int)
        for entry in found.values()
    ):
        raise DamagedError(
            f"{os.fspath(uri)}: its manifest lacks sizes and checksums of files; write the "
            "folder again"
        )
    _check_names(uri, found)
    return found


def commit_folder(
    uri: Uri, files: Files, manifest: Mapping[str, Any], manifest_name: str = "manifest.json"
) -> dict[str, Any]:
    """Write a folder that a reader sees complete or not at all.

    A folder that was committed at ``uri`` before is replaced: locally in one step, on S3 with a
    moment of absence. A local folder with files but no manifest is refused. On S3 such files are
    what a killed commit left, and are overwritten.

    Args:
        uri: The folder.
        files: Name in the folder (with slashes, where it has subfolders) to bytes, or to a local
            file that is handed over: it is moved or streamed, never read whole into memory, gone
            after a success and untouched after a failure.
        manifest: What else the manifest says.
        manifest_name: The manifest's file name.

    Returns:
        The manifest as it was written, with ``files`` and its own checksum.

    Raises:
        write_fence.LostLeaseError: The folder belongs to a run that lost its lease. Nothing is
            changed.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri, below_root=True)
    _check_names(uri, files, manifest_name)
    storage.encode(manifest)  # TypeError now, before anything is touched
    if remote:
        whole = _commit_s3(os.fspath(uri), files, manifest, manifest_name)
    else:
        final = Path(os.path.realpath(path))
        whole = s3.call("commit", uri, _commit_local, final, files, manifest, manifest_name)
    for source in files.values():
        if not isinstance(source, bytes):
            with suppress(OSError):
                os.unlink(source)
    return whole


def _commit_local(
    final: Path, files: Files, manifest: Mapping[str, Any], manifest_name: str
) -> dict[str, Any]:
    """Commit a local folder by way of a temporary one that is then moved into place."""
    _refuse_foreign(final, manifest_name)
    temporary = storage.beside(final)
    try:
        temporary.mkdir(parents=True)
        staged = {name: _stage(source, temporary / name) for name, source in files.items()}
        whole = with_checksum({**manifest, "files": staged})
        for folder in {(temporary / name).parent for name in files}:
            storage.sync_folder(folder)
        storage.write_local(temporary / manifest_name, storage.encode(whole))
        write_fence.check(final)  # writing the files may have taken long
        _swap_in(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return whole


def _stage(source: bytes | Path, target: Path) -> dict[str, Any]:
    """Write one file to disk and return its entry.

    A local file is hard-linked where that works, so that a failure leaves the source as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        target.write_bytes(source)
    else:
        try:
            if os.path.islink(source):  # Hugging Face's cache links into a store that others share
                raise OSError
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    os.chmod(target, _usual_mode())
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return entry_of_bytes(source) if isinstance(source, bytes) else entry_of_file(target)


def entry_of_bytes(data: bytes) -> dict[str, Any]:
    """Return what a manifest says of a file with these bytes: its SHA-256 and size."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def entry_of_file(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a local file: its SHA-256 and size.

    The entry of a large file also has the digest by which `file_identity` knows it, so that nobody
    reads the file again for that.
    """
    whole, pieces = hashlib.sha256(), []
    count = os.path.getsize(path)
    with open(path, "rb") as file:
        for _ in range(-(-count // file_identity.PIECE_BYTES)):
            piece, remaining = hashlib.sha256(), file_identity.PIECE_BYTES
            while chunk := file.read(min(4 << 20, remaining)):
                whole.update(chunk)
                piece.update(chunk)
                remaining -= len(chunk)
            pieces.append(piece.digest())
    entry: dict[str, Any] = {"sha256": whole.hexdigest(), "size": count}
    if len(pieces) > 1:
        entry["sha256_pieces"] = hashlib.sha256(b"".join(pieces)).hexdigest()
    return entry


def _usual_mode() -> int:
    """Return the mode of a file that ``open`` makes here.

    Files that are handed over (those of safetensors, temporary ones) have mode 0600. With that a
    colleague of the same group could not read a bundle.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        umask = int(
            next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8
        )
    except (OSError, StopIteration):  # no Linux: it can be asked for by setting it alone
        umask = os.umask(0o077)
        os.umask(umask)
    return 0o666 & ~umask


def _refuse_foreign(final: Path, manifest_name: str) -> None:
    """Raise StorageError for a folder that has files but no manifest."""
    if final.is_dir() and not (final / manifest_name).exists() and any(final.iterdir()):
        raise StorageError(
            f"{final} has files but no {manifest_name}; replacing it could lose work: choose "
            "another"
        )


def _swap_in(temporary: Path, final: Path) -> None:
    """Move ``temporary`` to ``final``.

    A folder that is there is exchanged in one step and removed.
    """
    try:
        os.rename(temporary, final)  # nothing there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(temporary, final):
            # such as NFS: two renames, with nothing there between them
            aside = storage.beside(final)
            os.rename(final, aside)
            try:
                os.rename(temporary, final)
            except BaseException:
                os.rename(aside, final)
                raise
            temporary = aside
        shutil.rmtree(temporary, ignore_errors=True)
    storage.sync_folder(final.parent)


def _exchange(left: Path, right: Path) -> bool:
    """Exchange two paths by Linux's renameat2. Return false where there is no such call."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(left), here, os.fsencode(right), exchange) == 0


def _commit_s3(
    uri: str, files: Files, manifest: Mapping[str, Any], manifest_name: str
) -> dict[str, Any]:
    """Commit a folder on S3: the manifest is removed first and written last."""
    manifest_uri, old = storage.join(uri, manifest_name), set()
    if storage.exists(manifest_uri):
        with suppress(StorageError):  # a manifest that cannot be read is replaced all the same
            old = set(entries(uri, open_folder(uri, manifest_name)))
        s3.remove_key(manifest_uri)
    uploaded = {name: _upload(storage.join(uri, name), source) for name, source in files.items()}
    whole = with_checksum({**manifest, "files": uploaded})
    # only what the old manifest names: no other key is ours to remove
    for name in old.difference(files):
        s3.remove_key(storage.join(uri, name))
    storage.write_bytes(manifest_uri, storage.encode(whole))
    return whole


def _upload(uri: str, source: bytes | Path) -> dict[str, Any]:
    """Write one file of a folder on S3 and return its entry.

    The entry also has the object's ETag, by which `checksums.check_folder` knows the file without
    reading it.
    """
    if isinstance(source, bytes):
        storage.write_bytes(uri, source)
        return {**entry_of_bytes(source), "etag": _etag(uri)}
    entry = s3.call("read", source, entry_of_file, source)
    storage.write_file(uri, source)
    return {**entry, "etag": _etag(uri)}


def _etag(uri: str) -> str:
    """Return the ETag of an object, without quotation marks."""
    return storage.file_info(uri)["ETag"].strip('"')


def open_folder(uri: Uri, manifest_name: str = "manifest.json") -> dict[str, Any]:
    """Return the manifest of a committed folder, its own checksum verified.

    Raises:
        NotFoundError: There is no complete folder.
        DamagedError: The manifest is not what was written.
    """
    try:
        manifest = storage.read_json(storage.join(uri, manifest_name))
    except StorageError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        raise NotFoundError(f"there is no complete folder at {os.fspath(uri)}: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedError(
            f"{storage.join(uri, manifest_name)} is not a manifest (a JSON object); write the "
            "folder again"
        )
    if manifest.get("sha256") != with_checksum(manifest)["sha256"]:
        raise DamagedError(
            f"{storage.join(uri, manifest_name)} is damaged: its content does not have the "
            "SHA-256 that it states; write the folder again"
        )
    return manifest


def verify_folder(uri: Uri, manifest: Mapping[str, Any]) -> None:
    """Read every file that the manifest names and compare it with its entry.

    Raises:
        DamagedError: Names the first file that differs.
        NotFoundError: Names the first file that is missing.
    """
    for name, entry in entries(uri, manifest).items():
        verify_file(storage.join(uri, name), entry)


def verify_file(uri: str, entry: Mapping[str, Any], copy: Path | None = None) -> None:
    """Read a file, or its ``copy``, and compare it with its entry.

    Raise DamagedError if they differ.
    """
    checksum, count = storage.sha256(copy or uri)
    if (checksum, count) != (entry["sha256"], entry["size"]):
        raise DamagedError(
            describe_damage(uri, {"sha256": checksum, "size": count}, entry)
            + "; write the folder again"
        )


def describe_damage(uri: Uri, actual: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return one line on a file whose bytes are not those of its entry."""
    is_now = f"SHA-256 {actual['sha256'][:12]} and {actual['size']} bytes"
    was = f"{str(wanted.get('sha256'))[:12]} and {wanted.get('size')}"
    return f"{os.fspath(uri)} is damaged: {is_now}, its manifest says {was}"


def fetch_folder(uri: Uri, destination: Path, manifest_name: str = "manifest.json") -> Path:
    """Return a committed folder as a local one, every file compared with its manifest.

    A local folder is returned itself. A remote one is copied to ``destination``, complete or not
    at all. A ``destination`` that already holds the same folder is kept, one with other files is
    refused.
    """
    manifest, remote = open_folder(uri, manifest_name), storage.is_remote(uri)
    final = Path(os.path.realpath(destination)) if remote else Path(s3.split(uri)[1])
    if not remote:
        verify_folder(uri, manifest)
        return final
    with suppress(StorageError):
        if open_folder(final, manifest_name) == manifest:
            verify_folder(final, manifest)
            return final
    s3.call("write", final, _refuse_foreign, final, manifest_name)
    temporary = storage.beside(final)
    try:
        for name, entry in entries(uri, manifest).items():
            source, target = storage.join(uri, name), temporary / name
            s3.call("write", final, target.parent.mkdir, parents=True, exist_ok=True)
            storage.download(source, target)
            verify_file(source, entry, target)
        storage.write_bytes(temporary / manifest_name, storage.encode(manifest))
        s3.call("write", final, _swap_in, temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final
