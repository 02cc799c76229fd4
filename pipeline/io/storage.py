"""Files in local folders and on s3:// behind one small interface: read, write, list, remove;
`folders` builds on it.

A URI is a plain path, file:///path or s3://bucket/key. A reader sees a written file whole, or the
one before, or nothing; I/O errors that may pass are retried (`s3`). Every function raises
`StorageError` when that fails for good; docstrings name only what comes on top.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pipeline.io import processes, s3, write_fence
from pipeline.io.s3 import DamagedError as DamagedError
from pipeline.io.s3 import NotFoundError as NotFoundError
from pipeline.io.s3 import StorageError as StorageError
from pipeline.io.s3 import Uri
from pipeline.io.s3 import is_transient as is_transient
from pipeline.io.s3 import retry as retry

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MIB = 2**20
READERS = 16
"""So many files are asked for at once by `at_once`."""
Item = TypeVar("Item")
Result = TypeVar("Result")

# --- names and filesystems ---


def is_remote(uri: Uri) -> bool:
    """Whether `uri` is on S3; an error for a scheme other than file:// and s3://."""
    return s3.split(uri)[0]


def join(uri: Uri, *parts: str) -> str:
    """`uri` and `parts` with one slash between each."""
    head, tail = os.fspath(uri), "/".join(part.strip("/") for part in parts if part.strip("/"))
    head = head if head.endswith("://") else head.rstrip("/") or head[:1]
    return head + ("/" if head and tail and not head.endswith("/") else "") + tail


def filesystem(uri: Uri) -> tuple[AbstractFileSystem, str]:
    """(fsspec filesystem, path in it) for libraries that want one; this one retries by itself,
    inside botocore.
    """
    import fsspec

    remote, path = s3.split(uri)
    return (
        (s3.client(s3.ATTEMPTS), path)
        if remote
        else (fsspec.filesystem("file"), os.path.abspath(path))
    )


def at_once(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``work`` on each item, several at once; results in the order of the items.

    For many small reads, each of which waits for an answer of the store. The first error, in the
    order of the items, is raised.
    """
    every = list(items)
    if len(every) <= 1:
        return [work(item) for item in every]
    with ThreadPoolExecutor(min(READERS, len(every))) as pool:
        return list(pool.map(work, every))


# --- files ---


def _info(uri: Uri) -> dict[str, Any]:
    """{size, type: file or directory, on S3 ETag}; type none and no more when nothing is there."""
    remote, path = s3.split(uri)
    try:
        if remote:
            return s3.on_s3("look at", uri, "info")
        status = s3.call("look at", uri, os.stat, path)
        return {"size": status.st_size, "type": "directory" if os.path.isdir(path) else "file"}
    except StorageError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return {"type": "none", "error": error}
        raise


def exists(uri: Uri) -> bool:
    """Whether a file or folder is there; an error when that cannot be known (403, server down)."""
    return _info(uri)["type"] != "none"


def is_dir(uri: Uri) -> bool:
    """Whether a folder is there (on S3: a bucket, or a prefix with keys below it)."""
    return _info(uri)["type"] == "directory"


def size(uri: Uri) -> int:
    """Bytes in a file."""
    return file_info(uri)["size"]


def file_info(uri: Uri) -> dict[str, Any]:
    """{size, on S3 ETag} of a file; an error for a folder and for nothing there."""
    info = _info(uri)
    if info["type"] == "directory":
        raise StorageError(f"{os.fspath(uri)} is a folder; name a file in it")
    if info["type"] == "none":
        raise info["error"]
    return info


def open_read(uri: Uri) -> BinaryIO:
    """A binary, seekable, buffered file object (pyarrow takes it); on S3 its reads are retried
    too.
    """
    remote, path = s3.split(uri)
    return (
        io.BufferedReader(s3.Reader(uri), _MIB)
        if remote
        else s3.call("read", uri, open, path, "rb")
    )


def read_bytes(uri: Uri) -> bytes:
    """All bytes of a file."""
    remote, path = s3.split(uri)
    if remote:  # max_concurrency=1, else s3fs asks for the size first: one more request
        return s3.on_s3("read", uri, "cat_file", max_concurrency=1)
    return s3.call("read", uri, Path(path).read_bytes)


def write_bytes(uri: Uri, data: bytes) -> None:
    """Write a file so that a reader sees the old one or all of the new. Makes parent folders.

    Raises fence.LostLeaseError when the file lies in the folder of a run that lost its lease.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri)
    if remote:
        s3.on_s3("write", uri, "pipe_file", data)
    else:
        s3.call("write", uri, write_local, Path(path), data)


def create(uri: Uri, data: bytes) -> bool:
    """Write a file only where nothing is there: true when this call made it, false when something
    was there.

    Of several processes that call it at once, one gets true. On S3 that is so where the server
    keeps conditional writes (`keeps_conditions`). Makes parent folders.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri)
    made = (
        s3.create_key(uri, data)
        if remote
        else s3.call("write", uri, _create_local, Path(path), data)
    )
    if made:
        return True
    with suppress(NotFoundError):  # an answer that got lost on the way: what is there may be ours
        return read_bytes(uri) == data
    return False


def _create_local(path: Path, data: bytes) -> bool:
    """A hard link is made only where nothing is there, and what it shows is whole at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        _write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (
                errno.EPERM,
                errno.ENOTSUP,
                errno.EOPNOTSUPP,
                errno.ENOSYS,
                errno.EMLINK,
            ):
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
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def keeps_conditions(folder: Uri) -> bool:
    """Whether `create` is exclusive here: always so locally, on S3 where the server refuses a
    second conditional put.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        _write_new(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(uri: Uri) -> Any:
    """The value in a JSON file. Raises DamagedError when it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"cannot read {os.fspath(uri)}: it is not JSON ({error}); write it again"
        ) from error


def write_json(uri: Uri, value: Any) -> None:
    """Write a value as JSON, atomically. Raises TypeError for a value that JSON has no form for."""
    write_bytes(uri, encode(value))


def encode(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def sha256(uri: Uri) -> tuple[str, int]:
    """(SHA-256 in hex, bytes) of a file, read in pieces."""

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

    found: list[str] = []
    for folder, subfolders, names in (
        os.walk(path, onerror=failed, followlinks=True) if os.path.isdir(path) else ()
    ):
        here, inside = os.path.realpath(folder) + "/", os.path.relpath(folder, path)
        upwards = {
            name
            for name in subfolders
            if here.startswith(os.path.realpath(os.path.join(folder, name)) + "/")
        }
        subfolders[:] = [
            name
            for name in subfolders
            if recursive and name not in upwards and not _is_leftover(name)
        ]
        found += [
            join(uri, "" if inside == "." else inside, name)
            for name in names
            if not _is_leftover(name)
        ]
    return found


def list_files(uri: Uri, recursive: bool = True) -> list[str]:
    """Full URIs of the files below a folder, sorted; a file gives itself, a missing folder (but no
    bucket) gives none.

    Links to folders are followed; half-written files (`.*.tmp-*`) are left out.
    """
    remote, path = s3.split(uri)
    text = os.fspath(uri)
    found = (
        s3.list_keys(path, recursive)
        if remote
        else s3.call("list", uri, _list_local, text, path, recursive)
    )
    return sorted(found) or ([text] if _info(uri)["type"] == "file" else [])


def glob(pattern: Uri) -> list[str]:
    """Full URIs of the files (not folders) that match, sorted: *, ?, [...] within a name, **/ for
    any folders.

    Names that begin with a dot match only a pattern that spells one out. Text without a wildcard
    gives itself when a file or a folder is there.
    """
    text = os.fspath(pattern)
    if not re.search(r"[*?[]", text):
        return (
            [text] if exists(text) else list_files(text)
        )  # none; an error for a bucket that is not there
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
    """Remove a folder with all below it, or a file; nothing there is no error. A whole bucket is
    refused.

    Raises fence.LostLeaseError in the folder of a run that lost its lease.
    """
    write_fence.check(uri)
    remote, path = s3.split(uri, below_root=True)
    if not remote:
        return s3.call("remove", uri, _remove_local, Path(os.path.abspath(path)))
    keys = list_files(uri)
    for key in [
        key for key in keys if key.endswith(".json")
    ]:  # manifests first: a reader never sees half a folder
        s3.remove_key(key)
    with ThreadPoolExecutor(
        8
    ) as pool:  # one by one: stores disagree on the checksum that a bulk delete must carry
        list(pool.map(s3.remove_key, [key for key in keys if not key.endswith(".json")]))


def beside(path: Path) -> Path:
    """Where a file or folder is written before it takes its place; the name tells `sweep` who
    writes it.
    """
    return path.parent / f".{path.name}.tmp-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _machine() -> str:
    """Eight letters for this machine: names of files should not grow long."""
    return processes.machine()[:8]


_SCRATCH = ".onetomany"


def _is_leftover(name: str) -> bool:
    return fnmatch.fnmatchcase(name, ".*.tmp-*")


def _is_probe(name: str) -> bool:
    """What `check_writable` and `keeps_conditions` write and remove at once."""
    return name.startswith((".probe-", ".run-probe-"))


def _writer_is_gone(name: str) -> bool:
    """Whether the process that was writing is known to have ended; unknown for other machines and
    older names.
    """
    found = re.search(r"\.tmp-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}$", name)
    if found is None or found[1] != _machine():
        return False
    return processes.has_ended(int(found[2]))


def sweep(uri: Uri, older_than_s: float) -> list[str]:
    """Remove what killed writers left (`.*.tmp-*`) anywhere in a local folder and beside it;
    returns the paths removed.

    What a process of this machine was writing goes when that process has ended, everything else
    when nothing has written to it for `older_than_s`. On S3 there is nothing to do: unfinished
    uploads are invisible, and a lifecycle rule of the bucket ends them.
    """
    remote, path = s3.split(uri)
    folder = Path(os.path.abspath(path))
    return (
        []
        if remote
        else _remove_left(
            {*_leftovers_below(folder), *filter(_is_left, folder.parent.glob(".*"))}, older_than_s
        )
    )


def sweep_scratch(older_than_s: float) -> list[str]:
    """Remove folders of `scratch_folder` on this machine that killed processes left, as `sweep`
    does.
    """
    return _remove_left(set(Path(tempfile.gettempdir()).glob(f"{_SCRATCH}.tmp-*")), older_than_s)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what is made here and then handed on, gone at the end; `sweep_scratch` removes
    that of a killed process.
    """
    folder = beside(Path(tempfile.gettempdir(), _SCRATCH.removeprefix(".")))
    s3.call("write", folder, folder.mkdir, 0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    return _is_leftover(path.name) or _is_probe(path.name)


def _leftovers_below(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(
        folder
    ):  # links are not followed: what lies behind them is not ours
        found += [Path(here, name) for name in (*folders, *names) if _is_left(Path(name))]
        folders[:] = [name for name in folders if not _is_leftover(name)]
    return found


def sync_folder(path: Path) -> None:
    with suppress(OSError):  # some network filesystems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(uri: Uri) -> None:
    """Write and remove a probe file, making the folder; the error says why that fails."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"probe")
    s3.remove_key(probe) if is_remote(uri) else remove_tree(probe)
