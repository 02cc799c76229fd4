"""S3 by s3fs: what talks to the server, with its errors, retries and URIs.

A URI is a plain path, file:///path or s3://bucket/key on any server that speaks S3 (AWS, MinIO,
Ceph), with endpoint, keys and region from the usual AWS_* variables. An I/O error that may pass is
retried with growing pauses. One that will not (403, 404, disk full) raises `StorageError` at once.
This loop serves local files as well, so those of botocore and s3fs, which would multiply, are off.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.io.range_reader import RangeReader

Uri = str | os.PathLike[str]
Result = TypeVar("Result")
log = logging.getLogger(__name__)

ATTEMPTS = 5
_JITTER = random.SystemRandom()
"""Not the global generator: that belongs to training, and drawing from it would break resume."""
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded")
"""What the messages of libraries say that lose the error number."""
_PERMANENT_NUMBERS = _FULL | {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.EFBIG,
    errno.ELOOP,
}
_CLIENTS = {"botocore", "aiobotocore", "boto3", "aiohttp", "urllib3"}
"""Libraries of the S3 client, whose errors are no OSErrors."""
_TRANSIENT_NAMES = {
    "ConnectionError",
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    "FlexibleChecksumError",
    "IncompleteRead",
    "ClientPayloadError",
    "ClientConnectionError",
}
_TRANSIENT_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestTimeout",
    "TooManyRequests",
}
_FIXES = (  # kind of error, what to do about a local path, about S3, about stores only read
    (
        FileNotFoundError,
        "check the path",
        "check the bucket, the key and AWS_ENDPOINT_URL",
        "check the address",
    ),
    (
        PermissionError,
        "give this user access to it",
        "check AWS_ACCESS_KEY_ID, its secret and the bucket's policy",
        "check the address and your credentials for it",
    ),
    (
        (NotADirectoryError, FileExistsError),
        "part of it is a file, so choose another folder",
        "choose another key",
        "check the address",
    ),
    (IsADirectoryError, *["name a file, not a folder"] * 3),
    (
        Exception,
        "check the path",
        "check the address and the AWS_* variables",
        "check the address",
    ),
)
_NO_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_NO_ANSWER = "check that AWS_ENDPOINT_URL is right and that its server runs"
_CLIENT_FIXES = {
    "NoCredentialsError": _NO_KEYS,
    "PartialCredentialsError": _NO_KEYS,
    "EndpointConnectionError": _NO_ANSWER,
    "ConnectTimeoutError": _NO_ANSWER,
    "ReadTimeoutError": _NO_ANSWER,
}
"""What to do about errors of botocore, by their names."""
_FILESYSTEMS: dict[tuple[Any, ...], Any] = {}
READ_ONLY = {
    "http": "pipeline.io.http_files",
    "https": "pipeline.io.http_files",
    "hf": "pipeline.io.hub_files",
    "gs": "pipeline.io.gcs_files",
    "az": "pipeline.io.azure_files",
    "abfs": "pipeline.io.azure_files",
}
"""Schemes of the stores that are only read, each with the module of its store (`read_only`)."""


class StorageError(OSError):
    """Reading or writing failed for good. The message names the URI, the cause and the fix."""


class NoConditionsError(StorageError):
    """The server does not support conditional writes."""


class DamagedError(StorageError):
    """A file is not what was written: its checksum differs, or it cannot be read at all."""


class NotFoundError(StorageError, FileNotFoundError):
    """The file, folder or bucket is not there. ``except FileNotFoundError`` catches it too."""


# --- errors and retries ---


def _is_client_error(error: BaseException) -> bool:
    """Return whether an error comes from a library of the S3 client."""
    return type(error).__module__.partition(".")[0] in _CLIENTS


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a moment later.

    Connection errors, timeouts, 5xx and EIO may pass; 403, 404 and a full disk will not.
    """
    was_replaced_while_read = type(error).__name__ == "FileExpired"
    if isinstance(error, (StorageError, *_PERMANENT)) or was_replaced_while_read:
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_NUMBERS
    response = getattr(error, "response", None)
    if _is_client_error(error) and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return (
            status >= 500
            or status == 429
            or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
        )
    return _is_client_error(error) and any(
        kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__
    )


def retry(
    fn: Callable[..., Result],
    *args: Any,
    attempts: int = ATTEMPTS,
    first_delay_s: float = 0.2,
    sleep: Callable[[float], object] = time.sleep,
    **kw: Any,
) -> Result:
    """Call ``fn(*args, **kw)``, again after each transient I/O error (`is_transient`).

    The pause after call n is between half and all of ``first_delay_s * 2 ** (n - 1)`` seconds.

    Args:
        attempts: The most calls, the first one included.

    Raises:
        Exception: The error of the last call, as it is.
    """
    for attempt in itertools.count(1):
        try:
            return fn(*args, **kw)
        except Exception as error:
            # of any kind: is_transient knows those that pass, every other is raised as it is
            if attempt >= attempts or not is_transient(error):
                raise
            delay_s = first_delay_s * 2 ** (attempt - 1) * _JITTER.uniform(0.5, 1.0)
            log.warning(
                "attempt %d of %d failed, next in %.1f s: %r", attempt, attempts, delay_s, error
            )
        sleep(delay_s)
    raise AssertionError("unreachable")


def call(action: str, uri: Uri, fn: Callable[..., Result], *args: Any, **kw: Any) -> Result:
    """Call ``fn(*args, **kw)`` with retries.

    Raises:
        StorageError: An I/O error remains; the message names ``action`` and ``uri``.
    """
    try:
        return retry(fn, *args, **kw)
    except Exception as error:
        # of any kind: botocore's have no common base; what is no I/O error is raised as it is
        if isinstance(error, StorageError) or not (
            isinstance(error, OSError) or _is_client_error(error)
        ):
            raise
        raise _failure(action, uri, error, ATTEMPTS) from error


@contextmanager
def naming(action: str, uri: Uri, only_full_disk: bool = False) -> Iterator[None]:
    """Turn an I/O error of the block into a StorageError that names ``uri``.

    For work that another library does, or that must not be done twice. Errors of libraries that
    hide a full disk (torch, safetensors) are recognised too.

    Args:
        only_full_disk: Leave any other error as it is, for work that reads other files as well.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not only_full_disk:
            raise _failure(action, uri, error, 1) from error
        if not _tells_of_full_disk(error):
            raise
        raise _failure(action, uri, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1) from error


def _tells_of_full_disk(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, was caused by a full disk."""
    while error is not None:
        if is_full(error) or any(word in str(error) for word in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_full(error: BaseException) -> bool:
    """Return whether the disk is full or read-only, or the quota used up: retrying is no help."""
    return isinstance(error, OSError) and (
        error.errno in _FULL or any(word in str(error) for word in _FULL_WORDS)
    )


def _failure(action: str, uri: Uri, error: Exception, attempts: int) -> StorageError:
    """Return the StorageError that names the action, the URI, the cause and the fix."""
    text, number = os.fspath(uri), getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    cause = reason.strip().rstrip(".")
    filename = getattr(error, "filename", None)
    if isinstance(filename, str) and filename not in f"{text} {cause}":
        cause += f" ({filename})"
    column = 1 if text.startswith("s3://") else 2 if is_read_only(text) else 0
    fix = next(fixes[column] for kinds, *fixes in _FIXES if isinstance(error, kinds))
    if column == 1 and _is_client_error(error):
        fix = _CLIENT_FIXES.get(type(error).__name__, fix)
    if is_full(error):
        fix = "free space there or choose another storage"
    elif attempts > 1 and is_transient(error):
        fix = f"tried {attempts} times, so {fix} and run again"
    kind = NotFoundError if isinstance(error, FileNotFoundError) else StorageError
    failure = kind(f"cannot {action} {text}: {cause}; {fix}")
    failure.errno = number
    return failure


# --- names ---


def is_read_only(uri: Uri) -> bool:
    """Return whether a URI is in a store that is only read (`read_only`)."""
    scheme, mark, _ = os.fspath(uri).partition("://")
    return bool(mark) and scheme in READ_ONLY


def split(uri: Uri, below_root: bool = False) -> tuple[bool, str]:
    """Return whether a URI is on S3, and its path: bucket/key there, else a local path.

    Args:
        below_root: Refuse a whole bucket or disk, for what replaces or removes.

    Raises:
        StorageError: A URI in another store. Those that are only read are answered by `read_only`.
    """
    text = os.fspath(uri)
    scheme, colon, rest = text.partition(":/")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        remote, path = False, os.path.expanduser(text)
    elif scheme not in ("s3", "file", *READ_ONLY):
        raise StorageError(
            f"{text}: {scheme}:// is not supported; use a folder, file:// or s3://, or for what is "
            f"only read {' or '.join(f'{name}://' for name in READ_ONLY)}"
        )
    elif not rest.startswith("/"):
        raise StorageError(f"{text}: a slash is lost, as pathlib does; write {scheme}://{rest}")
    elif scheme in READ_ONLY:
        raise StorageError(
            f"{text}: {scheme}:// is only read, so nothing can be written there; use a folder or "
            "s3://"
        )
    else:
        remote, path = scheme == "s3", rest[1:].rstrip("/") if scheme == "s3" else rest[1:]
    if not path or (remote and path.startswith("/")):
        raise StorageError(
            f"{text!r} names no place; use a folder, file:///path or s3://bucket/key"
        )
    if below_root and ("/" not in path if remote else os.path.abspath(path) == "/"):
        raise StorageError(f"{text} is a whole bucket or disk; name a folder in it")
    return remote, path


# --- the client ---


def client(attempts: int = 1) -> Any:
    """Return the S3 filesystem of this process and environment, one attempt a request.

    `retry` makes the further attempts. There is one filesystem a process, because sockets and event
    loops do not survive a fork, and one for each set of AWS_* variables, so that other keys or
    another endpoint take effect. Keys stay in the environment: a filesystem pickled to a worker
    carries none.
    """
    import s3fs

    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), attempts, environment)
    if key not in _FILESYSTEMS:
        config: dict[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": attempts}}
        if any(name.startswith("AWS_ENDPOINT_URL") for name, _ in environment):
            # older MinIO and Ceph refuse the checksum trailers that botocore sends by itself
            for option in ("request_checksum_calculation", "response_checksum_validation"):
                if f"AWS_{option.upper()}" not in os.environ:
                    config[option] = "when_required"
        # botocore itself does not read AWS_REGION
        region = {"region_name": os.environ["AWS_REGION"]} if "AWS_REGION" in os.environ else {}
        new = s3fs.S3FileSystem(
            config_kwargs=config,
            client_kwargs=region,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        new.retries = 1  # s3fs's own loop would multiply with botocore's
        _FILESYSTEMS.setdefault(key, new)
    return _FILESYSTEMS[key]


def on_s3(action: str, uri: Uri, method: str, *args: Any, **kw: Any) -> Any:
    """Call ``filesystem.method(bucket/key, *args, **kw)`` with retries."""
    return call(
        action,
        uri,
        lambda: getattr(client(), method)(split(uri)[1], *args, **kw),
    )


class Reader(RangeReader):
    """Seekable reads of one S3 object, each range retried.

    Every range must come from the object that was first opened (If-Match).
    """

    def __init__(self, uri: Uri):
        self._file = on_s3("read", uri, "open", "rb", cache_type="none")
        super().__init__(os.fspath(uri), call("read", uri, lambda: self._file.size))
        self.etag: str = call("read", uri, lambda: self._file.details["ETag"])

    def read_range(self, start: int, stop: int) -> bytes:
        def ask() -> bytes:
            self._file.seek(start)
            return self._file.read(stop - start)

        data = call("read", self.uri, ask)
        if len(data) != stop - start:
            raise StorageError(
                f"cannot read {self.uri}: {len(data)} of {stop - start} bytes came; run again"
            )
        return data


def list_objects(path: str, recursive: bool) -> list[dict[str, Any]]:
    """Return Key, Size and ETag of the objects below bucket/prefix.

    s3fs's find and glob are not used: given a depth they walk with on_error="omit", so that a 503
    reads as an empty folder.
    """
    bucket, _, prefix = f"{path}/".partition("/")
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    if not recursive:
        options["Delimiter"] = "/"
    found: list[dict[str, Any]] = []
    more = True
    while more:
        page = call("list", f"s3://{path}", lambda: client().call_s3("list_objects_v2", **options))
        found += [entry for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
        more = page.get("IsTruncated", False)
        options["ContinuationToken"] = page.get("NextContinuationToken")
    return found


def list_keys(path: str, recursive: bool) -> list[str]:
    """Return the URIs of the objects below bucket/prefix."""
    bucket = path.partition("/")[0]
    return [f"s3://{bucket}/{entry['Key']}" for entry in list_objects(path, recursive)]


def remove_key(uri: str) -> None:
    """Remove one object."""
    on_s3("remove", uri, "rm_file")


def create_key(uri: Uri, data: bytes) -> bool:
    """Put a small object only where none is there.

    Returns:
        True when this call wrote it, false when an object was already there.

    Raises:
        NoConditionsError: The server does not support conditional writes.
    """
    bucket, _, key = split(uri)[1].partition("/")

    def put() -> bool:
        try:
            client().call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except Exception as error:
            # of any kind: s3fs makes an OSError of some of botocore's errors; others are raised
            # again
            code = _code(error)
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return False
            if code in ("NotImplemented", "501"):
                raise NoConditionsError(
                    f"cannot write {os.fspath(uri)}: the server has no conditional writes"
                ) from error
            raise
        return True

    return call("write", uri, put)


def _code(error: BaseException | None) -> str:
    """Return the S3 error code of an exception or of one that it was raised from; "" for none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""
