"""Local folders and s3:// behind one small interface: read, write, list, commit a folder whole, verify it, retry.

A URI is a plain path, file:///path or s3://bucket/key on any server that speaks S3 (AWS, MinIO, Ceph), with endpoint,
keys and region from the usual AWS_* variables. Three promises are kept here: a reader sees a committed file or folder
whole, or the one before, or nothing; a flipped bit is found (SHA-256 of every file stands in the manifest); an I/O error
that may pass is retried with growing pauses, one that will not (403, 404, disk full) fails at once. Every function
raises `StorageError` when that fails for good; docstrings name only what comes on top.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Uri = str | os.PathLike[str]
Files = Mapping[str, bytes | Path]
Result = TypeVar("Result")
log = logging.getLogger(__name__)

ATTEMPTS = 5
_MIB = 2**20
_PARTS = {"chunksize": 5 * _MIB, "max_concurrency": 4}  # 42 MiB in memory at any size; s3fs's defaults take 1 GB
_JITTER = random.SystemRandom()  # the global generator belongs to training: drawing from it would break bitwise resume
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_PERMANENT_NUMBERS = _FULL | {errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.EFBIG, errno.ELOOP}
_CLIENTS = {"botocore", "aiobotocore", "boto3", "aiohttp", "urllib3"}  # their errors are not OSErrors
_TRANSIENT_NAMES = {
    *("ConnectionError", "HTTPClientError", "ResponseParserError", "IncompleteReadError", "FlexibleChecksumError"),
    *("IncompleteRead", "ClientPayloadError", "ClientConnectionError"),
}
_TRANSIENT_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "TooManyRequests"}
_FIXES = (  # kind of error, what to do about a local path, about S3
    (FileNotFoundError, "check the path", "check the bucket, the key and AWS_ENDPOINT_URL"),
    (PermissionError, "give this user access to it", "check AWS_ACCESS_KEY_ID, its secret and the bucket's policy"),
    ((NotADirectoryError, FileExistsError), "a part of the path is a file, so choose another folder", "choose another key"),
    (IsADirectoryError, "name a file, not a folder", "name a file, not a folder"),
    (Exception, "check the path", "check the address and the AWS_* variables"),
)
_FILESYSTEMS: dict[tuple[Any, ...], Any] = {}


class StorageError(OSError):
    """Reading or writing failed for good. The message names the URI, the cause and the fix."""


class NotFoundError(StorageError, FileNotFoundError):
    """The file, folder or bucket is not there (so `except FileNotFoundError` works too)."""


# --- errors and retries ---


def _is_client_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later: connection, timeout, 5xx, SlowDown, EIO; not 403, 404, disk full."""
    if isinstance(error, (StorageError, *_PERMANENT)) or type(error).__name__ == "FileExpired":  # replaced while read
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_NUMBERS
    response = getattr(error, "response", None)
    if _is_client_error(error) and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    return _is_client_error(error) and any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)


def retry(
    fn: Callable[..., Result],
    *args: Any,
    attempts: int = ATTEMPTS,
    first_delay_s: float = 0.2,
    sleep: Callable[[float], object] = time.sleep,
    **kw: Any,
) -> Result:
    """`fn(*args, **kw)`, called again after a transient I/O error (`is_transient`), up to `attempts` calls in all.

    The pause after call n is between half and all of first_delay_s * 2 ** (n - 1). The last error is raised as it is.
    """
    for attempt in itertools.count(1):
        try:
            return fn(*args, **kw)
        except Exception as error:
            if attempt >= attempts or not is_transient(error):
                raise
            delay_s = first_delay_s * 2 ** (attempt - 1) * _JITTER.uniform(0.5, 1.0)
            log.warning("attempt %d of %d failed, next in %.1f s: %r", attempt, attempts, delay_s, error)
        sleep(delay_s)
    raise AssertionError("unreachable")


def _call(action: str, uri: Uri, fn: Callable[..., Result], *args: Any, **kw: Any) -> Result:
    """`fn(*args, **kw)` with retries; an I/O error that remains becomes a StorageError naming `uri`."""
    try:
        return retry(fn, *args, **kw)
    except Exception as error:
        if isinstance(error, StorageError) or not (isinstance(error, OSError) or _is_client_error(error)):
            raise
        text, number = os.fspath(uri), getattr(error, "errno", None)
        cause = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().rstrip(".")
        filename = getattr(error, "filename", None)
        if isinstance(filename, str) and filename not in f"{text} {cause}":
            cause += f" ({filename})"
        fix = next(fixes[text.startswith("s3://")] for kinds, *fixes in _FIXES if isinstance(error, kinds))
        if number in _FULL:
            fix = "free space there or choose another storage"
        elif is_transient(error):
            fix = f"tried {ATTEMPTS} times, so {fix} and run again"
        failure = (NotFoundError if isinstance(error, FileNotFoundError) else StorageError)(
            f"cannot {action} {text}: {cause}; {fix}"
        )
        failure.errno = number
        raise failure from error


# --- names and filesystems ---


def _split(uri: Uri, below_root: bool = False) -> tuple[bool, str]:
    """(is on S3, path): bucket/key there, else a local path. below_root: for what replaces or removes."""
    text = os.fspath(uri)
    scheme, colon, rest = text.partition(":/")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        remote, path = False, os.path.expanduser(text)
    elif scheme not in ("s3", "file"):
        raise StorageError(f"{text}: {scheme}:// is not supported; use a folder, file:// or s3://")
    elif not rest.startswith("/"):
        raise StorageError(f"{text}: a slash is lost, as pathlib does; write {scheme}://{rest}")
    else:
        remote, path = scheme == "s3", rest[1:].rstrip("/") if scheme == "s3" else rest[1:]
    if not path or (remote and path.startswith("/")):
        raise StorageError(f"{text!r} names no place; use a folder, file:///path or s3://bucket/key")
    if below_root and ("/" not in path if remote else os.path.abspath(path) == "/"):
        raise StorageError(f"{text} is a whole bucket or disk; name a folder in it")
    return remote, path


def is_remote(uri: Uri) -> bool:
    """Whether `uri` is on S3; an error for a scheme other than file:// and s3://."""
    return _split(uri)[0]


def join(uri: Uri, *parts: str) -> str:
    """`uri` and `parts` with one slash between each."""
    head, tail = os.fspath(uri), "/".join(part.strip("/") for part in parts if part.strip("/"))
    head = head if head.endswith("://") else head.rstrip("/") or head[:1]
    return head + ("/" if head and tail and not head.endswith("/") else "") + tail


def _s3(attempts: int = 1) -> Any:
    """The S3 filesystem of this process and environment; one attempt a request, since `retry` makes the others.

    Keyed by process, because sockets and event loops do not survive a fork, and by environment, so that other keys or
    another endpoint take effect. Keys stay in the environment: a filesystem pickled to a worker carries none.
    """
    import s3fs

    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), attempts, environment)
    if key not in _FILESYSTEMS:
        config: dict[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": attempts}}
        if any(name.startswith("AWS_ENDPOINT_URL") for name, _ in environment):
            for option in ("request_checksum_calculation", "response_checksum_validation"):
                if f"AWS_{option.upper()}" not in os.environ:  # older MinIO and Ceph refuse botocore's new trailers
                    config[option] = "when_required"
        region = {"region_name": os.environ["AWS_REGION"]} if "AWS_REGION" in os.environ else {}  # unknown to botocore
        new = s3fs.S3FileSystem(
            config_kwargs=config, client_kwargs=region, use_listings_cache=False, skip_instance_cache=True
        )
        new.retries = 1  # s3fs's own loop would multiply with botocore's
        _FILESYSTEMS.setdefault(key, new)
    return _FILESYSTEMS[key]


def _on_s3(action: str, uri: Uri, method: str, *args: Any, **kw: Any) -> Any:
    """`filesystem.method(bucket/key, *args, **kw)`, retried."""
    return _call(action, uri, lambda: getattr(_s3(), method)(_split(uri)[1], *args, **kw))


def filesystem(uri: Uri) -> tuple[AbstractFileSystem, str]:
    """(fsspec filesystem, path in it) for libraries that want one; this one retries by itself, inside botocore."""
    import fsspec

    remote, path = _split(uri)
    return (_s3(ATTEMPTS), path) if remote else (fsspec.filesystem("file"), os.path.abspath(path))


# --- files ---


def _info(uri: Uri) -> dict[str, Any]:
    """{size, type: file or directory, on S3 ETag}; type none and no more when nothing is there."""
    remote, path = _split(uri)
    try:
        if remote:
            return _on_s3("look at", uri, "info")
        status = _call("look at", uri, os.stat, path)
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
    return _file_info(uri)["size"]


def _file_info(uri: Uri) -> dict[str, Any]:
    info = _info(uri)
    if info["type"] == "directory":
        raise StorageError(f"{os.fspath(uri)} is a folder; name a file in it")
    if info["type"] == "none":
        raise info["error"]
    return info


class _S3Reader(io.RawIOBase):
    """Seekable reads of one S3 object, each range retried. If-Match holds every range to the object first opened."""

    def __init__(self, uri: Uri):
        self._uri, self._position = uri, 0
        self._file = _on_s3("read", uri, "open", "rb", cache_type="none")
        self._size: int = _call("read", uri, lambda: self._file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise ValueError(f"{self._uri}: cannot seek to {position}")
        self._position = position
        return position

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        return self.read(max(0, self._size - self._position)) or b""

    def readinto(self, buffer: Any) -> int:
        def read_range() -> bytes:
            self._file.seek(self._position)
            return self._file.read(wanted)

        wanted = max(0, min(len(buffer), self._size - self._position))
        data = _call("read", self._uri, read_range) if wanted else b""
        if len(data) != wanted:
            raise StorageError(f"cannot read {self._uri}: {len(data)} of {wanted} bytes came; run again")
        buffer[:wanted] = data
        self._position += wanted
        return wanted


def open_read(uri: Uri) -> BinaryIO:
    """A binary, seekable, buffered file object (pyarrow takes it); on S3 its reads are retried too."""
    remote, path = _split(uri)
    return io.BufferedReader(_S3Reader(uri), _MIB) if remote else _call("read", uri, open, path, "rb")


def read_bytes(uri: Uri) -> bytes:
    """All bytes of a file."""
    remote, path = _split(uri)
    if remote:  # max_concurrency=1, else s3fs asks for the size first: one more request
        return _on_s3("read", uri, "cat_file", max_concurrency=1)
    return _call("read", uri, Path(path).read_bytes)


def write_bytes(uri: Uri, data: bytes) -> None:
    """Write a file so that a reader sees the old one or all of the new. Makes parent folders."""
    remote, path = _split(uri)
    if remote:
        _on_s3("write", uri, "pipe_file", data)
    else:
        _call("write", uri, _write_local, Path(path), data)


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_json(uri: Uri) -> Any:
    """The value in a JSON file; StorageError too when it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"cannot read {os.fspath(uri)}: it is not JSON ({error}); write it again") from error


def write_json(uri: Uri, value: Any) -> None:
    """Write a value as JSON, atomically. Raises TypeError for a value that JSON has no form for."""
    write_bytes(uri, _encode(value))


def _encode(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _sha256(uri: Uri) -> tuple[str, int]:
    """(SHA-256 in hex, bytes) of a file, read in pieces."""

    def read() -> tuple[str, int]:
        digest, count = hashlib.sha256(), 0
        with open_read(uri) as file:
            while chunk := file.read(4 * _MIB):
                digest.update(chunk)
                count += len(chunk)
        return digest.hexdigest(), count

    return _call("read", uri, read)


def checksum_or_etag(uri: Uri) -> str:
    """S3: the ETag; local: SHA-256 of the file up to 64 MiB, of its first and last 8 MiB beyond."""
    info, (remote, path) = _file_info(uri), _split(uri)
    if remote:
        return "etag:" + info["ETag"].strip('"')
    if info["size"] <= 64 * _MIB:
        return "sha256:" + _sha256(uri)[0]

    def read_ends() -> bytes:
        with open(path, "rb") as file:
            start = file.read(8 * _MIB)
            file.seek(-8 * _MIB, os.SEEK_END)
            return start + file.read()

    return "ends:" + hashlib.sha256(_call("read", uri, read_ends)).hexdigest()


def fingerprint(uri: Uri) -> str:
    """`<size in bytes>-<checksum_or_etag>`: changes when the file does and costs little."""
    return f"{size(uri)}-{checksum_or_etag(uri)}"


# --- listing and removing ---


def _list_s3(path: str, recursive: bool) -> list[str]:
    """Not by s3fs's find or glob: with a depth limit they walk with on_error="omit", so a 503 reads as an empty folder."""
    bucket, _, prefix = f"{path}/".partition("/")
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, **({} if recursive else {"Delimiter": "/"})}
    found, more = [], True
    while more:
        page = _call("list", f"s3://{path}", lambda: _s3().call_s3("list_objects_v2", **options))
        found += [f"s3://{bucket}/{entry['Key']}" for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
        more = page.get("IsTruncated", False)
        options["ContinuationToken"] = page.get("NextContinuationToken")
    return found


def _list_local(uri: str, path: str, recursive: bool) -> list[str]:
    def failed(error: OSError) -> None:  # os.walk would pass over it in silence
        raise error

    found: list[str] = []
    for folder, subfolders, names in os.walk(path, onerror=failed, followlinks=True) if os.path.isdir(path) else ():
        here, inside = os.path.realpath(folder) + "/", os.path.relpath(folder, path)
        upwards = {name for name in subfolders if here.startswith(os.path.realpath(os.path.join(folder, name)) + "/")}
        subfolders[:] = [name for name in subfolders if recursive and name not in upwards and not _is_leftover(name)]
        found += [join(uri, "" if inside == "." else inside, name) for name in names if not _is_leftover(name)]
    return found


def list_files(uri: Uri, recursive: bool = True) -> list[str]:
    """Full URIs of the files below a folder, sorted; a file gives itself, a missing folder (but no bucket) gives none.

    Links to folders are followed; half-written files (`.*.tmp-*`) are left out.
    """
    remote, path = _split(uri)
    text = os.fspath(uri)
    found = _list_s3(path, recursive) if remote else _call("list", uri, _list_local, text, path, recursive)
    return sorted(found) or ([text] if _info(uri)["type"] == "file" else [])


def glob(pattern: Uri) -> list[str]:
    """Full URIs of the files (not folders) that match, sorted: *, ?, [...] within a name, **/ for any number of folders.

    Names that begin with a dot match only a pattern that spells one out.
    """
    text = os.fspath(pattern)
    folder = re.split(r"[*?[]", text, maxsplit=1)[0].rpartition("/")[0]
    root = folder or ("/" if text.startswith("/") else ".")
    rest = text[len(folder) :].lstrip("/")
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", rest):
        is_set = token.startswith("[") and token.endswith("]")
        expression += meanings.get(token) or (token.replace("[!", "[^") if is_set else re.escape(token))
    found = []
    for uri in list_files(root, recursive="/" in rest or "**" in rest):
        name = uri[len(root) :].lstrip("/")
        if re.fullmatch(expression, name) and ("/." in f"/{rest}" or "/." not in f"/{name}"):
            found.append(join(folder, name) if folder else uri.removeprefix("./"))
    return sorted(found)


def _remove_key(uri: str) -> None:
    _on_s3("remove", uri, "rm_file")


def _remove_local(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        aside = path if _is_leftover(path.name) else _beside(path)
        os.rename(path, aside)  # gone at once for readers
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def remove_tree(uri: Uri) -> None:
    """Remove a folder with all below it, or a file; nothing there is no error. A whole bucket is refused."""
    remote, path = _split(uri, below_root=True)
    if not remote:
        return _call("remove", uri, _remove_local, Path(os.path.abspath(path)))
    keys = list_files(uri)
    for key in [key for key in keys if key.endswith(".json")]:  # manifests first: a reader never sees half a folder
        _remove_key(key)
    with ThreadPoolExecutor(8) as pool:  # one by one: stores disagree on the checksum that a bulk delete must carry
        list(pool.map(_remove_key, [key for key in keys if not key.endswith(".json")]))


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:12]}"


def _is_leftover(name: str) -> bool:
    return fnmatch.fnmatchcase(name, ".*.tmp-*")


def sweep(uri: Uri, older_than_s: float) -> list[str]:
    """Remove what killed writers left (`.*.tmp-*`) in a local folder and beside it; returns the paths removed.

    Only what nothing has written to for `older_than_s` goes. On S3 there is nothing to do: unfinished uploads are
    invisible, and a lifecycle rule of the bucket ends them.
    """
    remote, path = _split(uri)
    folder, removed = Path(os.path.abspath(path)), []
    for parent in () if remote else (folder, folder.parent):
        for entry in sorted(parent.glob(".*.tmp-*")):
            with suppress(FileNotFoundError):  # its writer, or another sweeper, was quicker
                newest_s = max(item.lstat().st_mtime for item in (entry, *entry.rglob("*")))
                if time.time() - newest_s > older_than_s:
                    _call("remove", entry, _remove_local, entry)
                    removed.append(str(entry))
    return removed


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some network filesystems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- folders that are whole or absent ---


def _check_names(uri: Uri, names: Iterable[str], manifest_name: str = "") -> None:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name in ("", ".", manifest_name) or "\\" in name:
            raise StorageError(f"{os.fspath(uri)}: {name!r} cannot name a file in it; use a relative name without '..'")


def _entries(uri: Uri, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """manifest["files"], which is data from outside: names stay in the folder, each has its size and SHA-256."""
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("size"), int)
        for entry in entries.values()
    ):
        raise StorageError(f"{os.fspath(uri)}: its manifest lacks sizes and checksums of files; write the folder again")
    _check_names(uri, entries)
    return entries


def commit_folder(
    uri: Uri, files: Files, manifest: Mapping[str, Any], manifest_name: str = "manifest.json"
) -> dict[str, Any]:
    """Write a folder that a reader sees whole or not at all; returns the manifest, with its "files" filled in.

    files: name in the folder (may hold slashes) -> bytes, or a local file that is handed over: moved or streamed, never
    read whole into memory, gone after a success and untouched after a failure. A folder committed at `uri` before is
    replaced: locally in one step, on S3 with a time of absence. One with files but no manifest is refused.
    """
    remote, path = _split(uri, below_root=True)
    _check_names(uri, files, manifest_name)
    _encode(manifest)  # TypeError now, before anything is touched
    if remote:
        whole = _commit_s3(os.fspath(uri), files, manifest, manifest_name)
    else:
        whole = _call("commit", uri, _commit_local, Path(os.path.realpath(path)), files, manifest, manifest_name)
    for source in files.values():
        if not isinstance(source, bytes):
            with suppress(OSError):
                os.unlink(source)
    return whole


def _commit_local(final: Path, files: Files, manifest: Mapping[str, Any], manifest_name: str) -> dict[str, Any]:
    _refuse_foreign(final, manifest_name)
    temporary = _beside(final)
    try:
        temporary.mkdir(parents=True)
        whole = {**manifest, "files": {name: _stage(source, temporary / name) for name, source in files.items()}}
        for folder in {(temporary / name).parent for name in files}:
            _sync_folder(folder)
        _write_local(temporary / manifest_name, _encode(whole))
        _swap_in(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return whole


def _stage(source: bytes | Path, target: Path) -> dict[str, Any]:
    """Put one file on disk, by a hard link where that works, so that a failure leaves the source; returns its entry."""
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
    checksum, count = (hashlib.sha256(source).hexdigest(), len(source)) if isinstance(source, bytes) else _sha256(target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return {"sha256": checksum, "size": count}


def _refuse_foreign(final: Path, manifest_name: str) -> None:
    if final.is_dir() and not (final / manifest_name).exists() and any(final.iterdir()):
        raise StorageError(f"{final} has files but no {manifest_name}, so replacing it could lose work; choose another folder")


def _swap_in(temporary: Path, final: Path) -> None:
    """Make `temporary` the folder at `final`; one there before is exchanged with it in one step, then removed."""
    try:
        os.rename(temporary, final)  # nothing there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(temporary, final):  # such as NFS: two renames, with nothing there between them
            aside = _beside(final)
            os.rename(final, aside)
            try:
                os.rename(temporary, final)
            except BaseException:
                os.rename(aside, final)
                raise
            temporary = aside
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(final.parent)


def _exchange(left: Path, right: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the system or the filesystem has none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(left), here, os.fsencode(right), exchange) == 0


def _commit_s3(uri: str, files: Files, manifest: Mapping[str, Any], manifest_name: str) -> dict[str, Any]:
    manifest_uri, old = join(uri, manifest_name), set()
    if exists(manifest_uri):
        with suppress(StorageError):  # a manifest that cannot be read is replaced all the same
            old = set(_entries(uri, open_folder(uri, manifest_name)))
        _remove_key(manifest_uri)
    whole = {**manifest, "files": {name: _upload(join(uri, name), source) for name, source in files.items()}}
    for name in old.difference(files):  # only what the old manifest names: no other key is ours to remove
        _remove_key(join(uri, name))
    write_bytes(manifest_uri, _encode(whole))
    return whole


def _upload(uri: str, source: bytes | Path) -> dict[str, Any]:
    if isinstance(source, bytes):
        write_bytes(uri, source)
        return {"sha256": hashlib.sha256(source).hexdigest(), "size": len(source)}
    checksum, count = _sha256(source)
    parts = {**_PARTS, "chunksize": max(_PARTS["chunksize"], -(-count // 9_000))}  # S3 takes 10,000 parts at most
    _call("write", uri, lambda: _s3().put_file(os.fspath(source), _split(uri)[1], **parts))
    return {"sha256": checksum, "size": count}


def open_folder(uri: Uri, manifest_name: str = "manifest.json") -> dict[str, Any]:
    """The manifest of a committed folder. Raises NotFoundError when no complete folder is there."""
    try:
        manifest = read_json(join(uri, manifest_name))
    except StorageError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        raise NotFoundError(f"there is no complete folder at {os.fspath(uri)}: {error}") from error
    if not isinstance(manifest, dict):
        raise StorageError(f"{join(uri, manifest_name)} is not a manifest (a JSON object); write the folder again")
    return manifest


def verify_folder(uri: Uri, manifest: Mapping[str, Any]) -> None:
    """Read every file that the manifest names; the error names the first one that is missing or damaged."""
    for name, entry in _entries(uri, manifest).items():
        _verify_file(join(uri, name), entry)


def _verify_file(uri: str, entry: Mapping[str, Any], copy: Path | None = None) -> None:
    checksum, count = _sha256(copy or uri)
    if (checksum, count) != (entry["sha256"], entry["size"]):
        found, wanted = f"{checksum[:12]} and {count} bytes", f"{entry['sha256'][:12]} and {entry['size']}"
        raise StorageError(f"{uri} is damaged: SHA-256 {found}, its manifest says {wanted}; write the folder again")


def fetch_folder(uri: Uri, destination: Path, verify: bool = True, manifest_name: str = "manifest.json") -> Path:
    """A committed folder as a local one: a local folder itself; one on S3 copied to `destination`, whole or not at all.

    A `destination` that holds the same folder already is kept; one with other files in it is refused.
    """
    manifest, (remote, path) = open_folder(uri, manifest_name), _split(uri)
    final = Path(os.path.realpath(destination)) if remote else Path(path)
    if not remote:
        if verify:
            verify_folder(uri, manifest)
        return final
    with suppress(StorageError):
        if open_folder(final, manifest_name) == manifest:
            if verify:
                verify_folder(final, manifest)
            return final
    _call("write", final, _refuse_foreign, final, manifest_name)
    temporary = _beside(final)
    try:
        for name, entry in _entries(uri, manifest).items():
            source, target = join(uri, name), temporary / name
            _call("write", final, target.parent.mkdir, parents=True, exist_ok=True)
            _on_s3("read", source, "get_file", str(target), **_PARTS)
            if verify:
                _verify_file(source, entry, target)
        write_bytes(temporary / manifest_name, _encode(manifest))
        _call("write", final, _swap_in, temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def check_writable(uri: Uri) -> None:
    """Write and remove a probe file, making the folder; the error says why that fails."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:12]}")
    write_bytes(probe, b"probe")
    _remove_key(probe) if is_remote(uri) else remove_tree(probe)
