"""Read, write, list and remove files in local folders and on S3, behind one small interface.

A URI is a plain path, file:///path, s3://bucket/key, or one of a store that is only read
(`read_only`). A reader sees the whole new file, the whole old one, or none. I/O errors that may
pass are retried (`s3`). Every function raises `StorageError` when an error remains, and so do those
that write to a store that is only read; the docstrings name only further errors. `atomic_folder`
builds on this.

s3fs reads and writes S3. fsspec's local files are not used: they show before they are on the disk.
Nor are its globs, which read a failing server as an empty folder and refuse ``**.parquet``.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from pipeline.io import processes, read_only, s3, write_fence
from pipeline.io.s3 import DamagedError as DamagedError
from pipeline.io.s3 import NotFoundError as NotFoundError
from pipeline.io.s3 import StorageError as StorageError
from pipeline.io.s3 import Uri
from pipeline.io.s3 import is_transient as is_transient
from pipeline.io.s3 import retry as retry
from pipeline.io.threads import threaded_map

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
_MIB = 2**20
PARTS = {"chunksize": 5 * _MIB, "max_concurrency": 4}
"""Options of s3fs: 42 MiB in memory for files of any size, where its defaults take 1 GB."""
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

# --- names and filesystems ---


def is_remote(uri: Uri) -> bool:
    """Return whether a URI is on S3 or in a store that is only read. Unknown schemes are an
    error.
    """
    return s3.is_read_only(uri) or s3.split(uri)[0]


def is_address(uri: Uri) -> bool:
    """Return whether a URI is a file on a web server, which may have a query (``?``)."""
    return os.fspath(uri).startswith(("http://", "https://"))


def is_absolute(name: str) -> bool:
    """Return whether a name is an absolute path or a URI, and no path below some folder."""
    return name.startswith("/") or "://" in name


def file_name(uri: Uri) -> str:
    """Return a URI with its file name, and thus its suffix, at the end."""
    return urlsplit(os.fspath(uri)).path if is_address(uri) else os.fspath(uri)


def without_query(uri: Uri) -> str:
    """Return a URI without the query of an address, which may be a signature of the hour."""
    text = os.fspath(uri)
    return text.partition("?")[0] if is_address(text) else text


def without_secrets(text: str) -> str:
    """Return a text without the user names, passwords and queries of addresses in it.

    A question mark in the name of a file or of an object on S3 is a part of the name.
    """
    text = re.sub(r"(\w://)[^/\s\"<]+@", r"\1***@", text)
    return re.sub(r"(\b(?!s3:|file:)\w+://[^\s?\"<]*)\?[^\s\"<`]*[^\s\"<`,;:.]", r"\1?***", text)


def join(uri: Uri, *parts: str) -> str:
    """Return ``uri`` and ``parts`` with one slash between each."""
    head = os.fspath(uri)
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    head = head if head.endswith("://") else head.rstrip("/") or head[:1]
    return head + ("/" if head and tail and not head.endswith("/") else "") + tail


def absolute(uri: Uri) -> str:
    """Return the same place for processes that run in another folder."""
    if is_remote(uri):
        return os.fspath(uri).rstrip("/")
    return os.path.abspath(s3.split(uri)[1])


def filesystem(uri: Uri) -> tuple[AbstractFileSystem, str]:
    """Return an fsspec filesystem and the path in it, for libraries that want one.

    This filesystem retries by itself, inside botocore.
    """
    import fsspec

    remote, path = s3.split(uri)
    if remote:
        return s3.client(s3.ATTEMPTS), path
    return fsspec.filesystem("file"), os.path.abspath(path)


# --- files ---


def _info(uri: Uri) -> dict[str, Any]:
    """Return {size, type and, on S3, ETag} of a place.

    The type is "file", "directory", or "none" where nothing is there; then ``error`` says so.
    """
    try:
        if s3.is_read_only(uri):
            place = read_only.look(uri)
            return {"size": place.size, "type": "directory" if place.is_folder else "file"}
        remote, path = s3.split(uri)
        if remote:
            return s3.on_s3("look at", uri, "info")
        status = s3.call("look at", uri, os.stat, path)
        return {"size": status.st_size, "type": "directory" if os.path.isdir(path) else "file"}
    except StorageError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return {"type": "none", "error": error}
        raise


def exists(uri: Uri) -> bool:
    """Return whether a file or folder is there.

    Raises:
        StorageError: It cannot be known (403, server down).
    """
    return _info(uri)["type"] != "none"


def is_dir(uri: Uri) -> bool:
    """Return whether a folder is there (on S3: a bucket, or a prefix with keys below it)."""
    return _info(uri)["type"] == "directory"


def size(uri: Uri) -> int:
    """Return the size of a file in bytes."""
    return file_info(uri)["size"]


def file_info(uri: Uri) -> dict[str, Any]:
    """Return the size of a file and, on S3, its ETag. A folder or a missing file is an error."""
    info = _info(uri)
    if info["type"] == "directory":
        raise StorageError(f"{os.fspath(uri)} is a folder; name a file in it")
    if info["type"] == "none":
        raise info["error"]
    return info


def open_read(uri: Uri, buffer_bytes: int = _MIB) -> BinaryIO:
    """Open a file for reading: binary, seekable and buffered, as pyarrow takes it.

    In remote stores the reads are retried too, and ask for ``buffer_bytes`` at a time.
    """
    if s3.is_read_only(uri):
        return io.BufferedReader(read_only.Reader(uri), buffer_bytes)
    remote, path = s3.split(uri)
    if remote:
        return io.BufferedReader(s3.Reader(uri), buffer_bytes)
    return s3.call("read", uri, open, path, "rb")


def read_bytes(uri: Uri) -> bytes:
    """Return all bytes of a file."""
    if s3.is_read_only(uri):
        with open_read(uri) as file:
            return file.read()
    remote, path = s3.split(uri)
    if remote:  # max_concurrency=1, else s3fs asks for the size first: one more request
        return s3.on_s3("read", uri, "cat_file", max_concurrency=1)
    return s3.call("read", uri, Path(path).read_bytes)


def read_as(
    uri: Uri,
    load_path: Callable[[str], T],
    load_bytes: Callable[[bytes], T],
) -> T:
    """Load a file: by ``load_path`` where it is local, so that it can be memory-mapped, else by
    ``load_bytes``.
    """
    if is_remote(uri):
        return load_bytes(read_bytes(uri))
    return s3.call("read", uri, load_path, s3.split(uri)[1])


def read_range(uri: Uri, start: int, end: int) -> bytes:
    """Return bytes ``start`` to ``end`` (exclusive, at most the size) of a file."""
    if s3.is_read_only(uri):
        return read_only.read_range(uri, start, end)
    remote, path = s3.split(uri)
    if remote:
        return s3.on_s3("read", uri, "cat_file", start=start, end=end) if start < end else b""
    return s3.call("read", uri, _read_range_local, path, start, end)


def _read_range_local(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def download(uri: Uri, target: Path) -> None:
    """Write a file's bytes to a local one, which may then be half-written after an error."""
    if s3.is_read_only(uri):
        with open_read(uri) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 8 * _MIB)
    else:
        s3.on_s3("read", uri, "get_file", str(target), **PARTS)


def write_bytes(uri: Uri, data: bytes) -> None:
    """Write a file so that a reader sees the old one or all of the new one. Makes parent folders.

    Raises:
        write_fence.LostLeaseError: The file is in the folder of a run that lost its lease.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri)
    if remote:
        s3.on_s3("write", uri, "pipe_file", data)
    else:
        s3.call("write", uri, write_local, Path(path), data)


def write_file(uri: Uri, source: Path) -> None:
    """Write the bytes of a local file, as `write_bytes` does, without holding them in memory."""
    write_fence.check(uri)
    remote, path = s3.split(uri)
    if remote:
        # S3 takes 10,000 parts at most
        chunk_bytes = max(PARTS["chunksize"], -(-source.stat().st_size // 9_000))
        parts = {**PARTS, "chunksize": chunk_bytes}
        s3.call(
            "write",
            uri,
            lambda: s3.client().put_file(os.fspath(source), path, **parts),
        )
    else:
        s3.call("write", uri, _copy_local, source, Path(path))


def create(uri: Uri, data: bytes) -> bool:
    """Write a file only where nothing is there. Makes parent folders.

    Of several processes that call this at the same time, one gets true. On S3 that holds where the
    server supports conditional writes (`keeps_conditions`).

    Returns:
        True when this call wrote the file, false when something was already there.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri)
    if remote:
        created = s3.create_key(uri, data)
    else:
        created = s3.call("write", uri, _create_local, Path(path), data)
    if created:
        return True
    with suppress(NotFoundError):  # an answer that got lost on the way: what is there may be ours
        return read_bytes(uri) == data
    return False


def _create_local(path: Path, data: bytes) -> bool:
    """Write a local file only where nothing is there.

    A hard link is made only where nothing is there, and the file it shows is complete at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        _write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            try:  # a filesystem without hard links
                _write_new(path, data)
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _write_new(path: Path, data: bytes) -> None:
    """Write a new local file and flush it to disk. An existing file is an error."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def keeps_conditions(folder: Uri) -> bool:
    """Return whether `create` is exclusive in this folder.

    Local folders always are; on S3 it depends on whether the server refuses a second conditional
    put.
    """
    if not is_remote(folder):
        return True
    probe = join(folder, f".run-probe-{uuid.uuid4().hex[:12]}")
    try:
        return s3.create_key(probe, b"first") and not s3.create_key(probe, b"second")
    except s3.NoConditionsError:
        return False
    finally:
        s3.remove_key(probe)


def write_local(path: Path, data: bytes) -> None:
    """Write a local file by way of a temporary one that then takes its place."""
    with _replacing(path) as temporary:
        _write_new(temporary, data)


def _copy_local(source: Path, path: Path) -> None:
    """Copy a local file by way of a temporary one that then takes the other's place."""
    with _replacing(path) as temporary, open(source, "rb") as data, open(temporary, "xb") as file:
        shutil.copyfileobj(data, file, _MIB)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a local file; at the end of the block it takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(uri: Uri) -> Any:
    """Return the value in a JSON file. Raise DamagedError when the file is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"cannot read {os.fspath(uri)}: it is not JSON ({error}); write it again"
        ) from error


def write_json(uri: Uri, value: Any) -> None:
    """Write a value as JSON, atomically. Raise TypeError for a value that JSON has no form for."""
    write_bytes(uri, encode(value))


def encode(value: Any) -> bytes:
    """Return a value as the bytes of an indented JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def sha256(uri: Uri) -> tuple[str, int]:
    """Return the SHA-256 of a file in hex, and its size in bytes. The file is read in chunks."""

    def read() -> tuple[str, int]:
        digest, count = hashlib.sha256(), 0
        with open_read(uri) as file:
            while chunk := file.read(4 * _MIB):
                digest.update(chunk)
                count += len(chunk)
        return digest.hexdigest(), count

    return s3.call("read", uri, read)


# --- listing and removing ---


def _list_local(uri: str, path: str, recursive: bool) -> list[str]:
    def failed(error: OSError) -> None:  # os.walk would pass over it in silence
        raise error

    if not os.path.isdir(path):
        return []
    found: list[str] = []
    for folder, subfolders, names in os.walk(path, onerror=failed, followlinks=True):
        here, inside = os.path.realpath(folder) + "/", os.path.relpath(folder, path)

        def is_entered(name: str, folder: str = folder, here: str = here) -> bool:
            target = os.path.realpath(os.path.join(folder, name)) + "/"
            is_link_upwards = here.startswith(target)
            return recursive and not is_link_upwards and not _is_leftover(name)

        subfolders[:] = filter(is_entered, subfolders)
        below = join(uri, "" if inside == "." else inside)
        found += [join(below, name) for name in names if not _is_leftover(name)]
    return found


def list_files(uri: Uri, recursive: bool = True) -> list[str]:
    """Return the full URIs of all files below a folder, sorted.

    A file gives itself. A missing folder gives none, a missing bucket is an error. Links to folders
    are followed; half-written files (``.*.tmp-*``) are left out.
    """
    text = os.fspath(uri)
    if s3.is_read_only(uri):
        paths = read_only.list_files(uri, recursive)
    elif is_remote(uri):
        paths = s3.list_keys(s3.split(uri)[1], recursive)
    else:
        paths = s3.call("list", uri, _list_local, text, s3.split(uri)[1], recursive)
    return sorted(paths) or ([text] if _info(uri)["type"] == "file" else [])


def list_folders(uri: Uri) -> list[str]:
    """Return the names of the folders in a folder, sorted; [] where there is no such folder.

    Names that begin with a dot are left out.
    """
    if not is_dir(uri):
        return []
    files, path = filesystem(uri)
    names = [
        entry["name"].rstrip("/").rpartition("/")[2]
        for entry in files.ls(path, detail=True)
        if entry["type"] == "directory"
    ]
    return sorted(name for name in names if not name.startswith("."))


def glob(pattern: Uri) -> list[str]:
    """Return the full URIs of the files (not folders) that match a pattern, sorted.

    The wildcards are ``*``, ``?`` and ``[...]`` within a name, and ``**/`` for any folders. Names
    that begin with a dot match only a pattern that spells the dot out. Text without a wildcard
    gives itself when a file or a folder is there.
    """
    text = os.fspath(pattern)
    wildcards = "[*]" if is_address(text) else "[*?[]"  # a query begins with "?"
    if not re.search(wildcards, text):
        # where nothing is there: no files, or an error for a bucket that does not exist
        info = file_info(text) if is_address(text) else _info(text)
        return [text] if info["type"] != "none" else list_files(text)
    folder = re.split(r"[*?[]", text, maxsplit=1)[0].rpartition("/")[0]
    root = folder or ("/" if text.startswith("/") else ".")
    rest = text[len(folder) :].lstrip("/")
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", rest):
        is_set = token.startswith("[") and token.endswith("]")
        expression += meanings.get(token) or (
            token.replace("[!", "[^") if is_set else re.escape(token)
        )
    found = []
    for uri in list_files(root, recursive="/" in rest or "**" in rest):
        name = uri[len(root) :].lstrip("/")
        if re.fullmatch(expression, name) and ("/." in f"/{rest}" or "/." not in f"/{name}"):
            found.append(join(folder, name) if folder else uri.removeprefix("./"))
    return sorted(found)


def _remove_local(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        aside = path if _is_leftover(path.name) else beside(path)
        os.rename(path, aside)  # gone at once for readers
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def remove_tree(uri: Uri) -> None:
    """Remove a file, or a folder with all that is below it. Nothing there is no error.

    Raises:
        StorageError: The URI is a whole bucket or disk. write_fence.LostLeaseError: It is in the
            folder of a run that lost its lease.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri, below_root=True)
    if not remote:
        return s3.call("remove", uri, _remove_local, Path(os.path.abspath(path)))
    keys = list_files(uri)
    manifests = [key for key in keys if key.endswith(".json")]
    others = [key for key in keys if not key.endswith(".json")]
    for key in manifests:  # first of all: a reader never sees half a folder
        s3.remove_key(key)
    # one by one: stores disagree on the checksum that a bulk delete must carry
    list(threaded_map(s3.remove_key, others))


def remove_empty_folder(uri: Uri) -> bool:
    """Remove a local folder that is empty, and return whether it was. S3 has no empty folders."""
    write_fence.check(uri)
    remote, path = s3.split(uri, below_root=True)
    if remote:
        return False
    try:
        os.rmdir(path)
    except OSError:  # it holds something, or is gone
        return False
    return True


def beside(path: Path) -> Path:
    """Return the temporary path at which a file or folder is written before it takes its place.

    The name says which process writes it, which `sweep` needs to know.
    """
    return path.parent / f".{path.name}.tmp-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _machine() -> str:
    """Return eight letters for this machine; file names should not grow long."""
    return processes.machine()[:8]


_SCRATCH = ".onetomany"


def _is_leftover(name: str) -> bool:
    """Return whether a name is that of an unfinished file or folder."""
    return fnmatch.fnmatchcase(name, ".*.tmp-*")


def _writer_is_gone(name: str) -> bool:
    """Return whether the process that was writing this file is known to have ended.

    It is not known for other machines and for names that older versions gave.
    """
    match = re.search(r"\.tmp-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}$", name)
    if match is None or match[1] != _machine():
        return False
    return processes.has_ended(int(match[2]))


def sweep(uri: Uri, older_than_s: float) -> list[str]:
    """Remove what killed writers left (``.*.tmp-*``) below a local folder and beside it.

    A file of a process of this machine is removed when that process has ended, any other when
    nothing has written to it for ``older_than_s`` seconds. On S3 there is nothing to do: unfinished
    uploads are invisible, and a lifecycle rule of the bucket ends them.

    Returns:
        The paths that were removed.
    """
    remote, path = s3.split(uri)
    if remote:
        return []
    folder = Path(os.path.abspath(path))
    beside_folder = filter(_is_left, folder.parent.glob(".*"))
    return _remove_left({*_leftovers_below(folder), *beside_folder}, older_than_s)


def sweep_scratch(older_than_s: float) -> list[str]:
    """Remove the `scratch_folder` folders that killed processes left on this machine.

    Returns:
        The paths that were removed.
    """
    return _remove_left(set(Path(tempfile.gettempdir()).glob(f"{_SCRATCH}.tmp-*")), older_than_s)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for files that are then handed on, and remove it at the end.

    `sweep_scratch` removes the folder of a process that was killed.
    """
    folder = beside(Path(tempfile.gettempdir(), _SCRATCH.removeprefix(".")))
    s3.call("write", folder, folder.mkdir, 0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_scratch(uri: str) -> bool:
    """Return whether a file lies in a `scratch_folder`."""
    return f"/{_SCRATCH}.tmp-" in uri


def _remove_left(entries: set[Path], older_than_s: float) -> list[str]:
    removed = []
    for entry in sorted(entries):
        with suppress(FileNotFoundError):  # its writer, or another sweeper, was quicker
            newest_s = max(item.lstat().st_mtime for item in (entry, *entry.rglob("*")))
            if _writer_is_gone(entry.name) or time.time() - newest_s > older_than_s:
                s3.call("remove", entry, _remove_local, entry)
                removed.append(str(entry))
    return removed


def _is_left(path: Path) -> bool:
    """Return whether a file is unfinished, or of `check_writable` or `keeps_conditions`."""
    return _is_leftover(path.name) or path.name.startswith((".probe-", ".run-probe-"))


def _leftovers_below(folder: Path) -> list[Path]:
    found = []
    # links are not followed: what lies behind them is not ours
    for here, folders, names in os.walk(folder):
        found += [Path(here, name) for name in (*folders, *names) if _is_left(Path(name))]
        folders[:] = [name for name in folders if not _is_leftover(name)]
    return found


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the filesystem can do so."""
    with suppress(OSError):  # some network filesystems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_read_only(uri: Uri) -> None:
    """Raise StorageError for an output in a store that is only read, before any work is done."""
    s3.split(uri)


def check_writable(uri: Uri) -> None:
    """Write and remove a probe file, making the folder. The error says why that fails."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"probe")
    s3.remove_key(probe) if is_remote(uri) else remove_tree(probe)
