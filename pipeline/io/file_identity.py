"""Identify files by their content, and find out whether it has changed.

The keys of all stages depend on these identities. A local file is identified by the SHA-256 of all
of its bytes. It is read once: its digest is remembered in the user's cache folder by path, size,
times of change and inode (`_Memory`). A file in a store that is only read (`read_only`) is
identified in the same way, and remembered by a stamp of the store, such as an ETag. An object on S3
is identified by its ETag. With the mode ``stat`` no file is read: it is identified by its size and
time of change, or by the stamp of the store.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import sqlite3
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from pipeline.io import read_only, s3, storage
from pipeline.io.threads import threaded_map

Mode = Literal["content", "stat"]
log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
"""Large files are hashed in pieces of this size, by several threads.

A file of one piece is identified by its plain SHA-256, a larger one by the SHA-256 of the digests
of its pieces.
"""
READ_BYTES = 1 << 20
FILES_PER_TASK = 64
GRAIN_SECONDS = 2.0
"""Two changes of a file within this time may have the same time of change (2 s on FAT).

Only a file that had been left alone for so long before it was read is remembered.
"""
SAVE_SECONDS, PROGRESS_AFTER_SECONDS = 5.0, 2.0
LISTED_FILES = 10
"""Number of objects in one S3 folder from which on the folder is listed instead."""
ABSENT = "absent"
NUL = "\0"
"""A character that no file name holds."""
_FORMAT = 1
_RECORDED: list[list[FileIdentity]] = []
"""Lists of the `recorded_identities` blocks that are open."""
_PROGRESS: ContextVar[Callable[[str], object] | None] = ContextVar(
    "identity_progress", default=None
)


class ChangedFileError(storage.StorageError):
    """A file holds something else than when the run was planned."""


class FileIdentity(NamedTuple):
    """A file as it was when it was identified.

    Attributes:
        uri: The file.
        content: Its size and what identifies its bytes: ``12-sha256:...``, on S3 ``12-etag:...``,
            with the mode ``stat`` ``12-stat:...``; ``absent`` when there is no file.
        stamp: Size, times of change and inode; on S3 the content. While it is the same, the content
            is taken to be the same.
    """

    uri: str
    content: str
    stamp: str

    @property
    def size(self) -> int | None:
        """Its bytes; None where there is no file."""
        return None if self.content == ABSENT else int(self.content.partition("-")[0])


# ---------------------------------------------------------------- identify and compare


def identify(
    uris: Iterable[str], mode: Mode = "content", absent_ok: bool = False
) -> list[FileIdentity]:
    """Return the identities of files in the order given.

    Files that are not remembered are read, by several threads.

    Args:
        mode: "content" to read local files, "stat" to trust their size and time of change.
        absent_ok: Give the content ``absent`` to a file that is not there.

    Raises:
        StorageError: A folder, or a file that is not there or cannot be read.
        ChangedFileError: A file changes while it is read.
    """
    wanted = [os.fspath(uri) for uri in uris]
    unique = list(dict.fromkeys(wanted))
    local, on_s3, elsewhere = _by_store(unique)
    stamps = _stamps_of_local(local, absent_ok) | _stamps_elsewhere(elsewhere, absent_ok)
    contents = _by_stat(stamps) if mode == "stat" else _by_content(stamps)
    identities = {
        uri: FileIdentity(uri, contents[uri], stamp.text) for uri, stamp in stamps.items()
    }
    for uri, content in _etags(on_s3, absent_ok).items():
        identities[uri] = FileIdentity(uri, content, content)
    _record([file for uri, file in identities.items() if not storage.is_scratch(uri)])
    return [identities[uri] for uri in wanted]


def of_object(uri: str, size: int, etag: str) -> FileIdentity:
    """Return the identity of an object on S3 that was listed, as `identify` would."""
    content = _etag_text(size, etag)
    identity = FileIdentity(uri, content, content)
    _record([identity])
    return identity


def _record(files: list[FileIdentity]) -> None:
    """Add files to the lists of the `recorded_identities` blocks that are open."""
    for recorded in _RECORDED:
        recorded += files


def fingerprint(uri: str | os.PathLike[str], mode: Mode = "content") -> str:
    """Return the content of one file, as in `FileIdentity`. Raises as `identify` does."""
    return identify([os.fspath(uri)], mode)[0].content


def check_unchanged(files: Iterable[FileIdentity]) -> None:
    """Raise ChangedFileError, naming the file, when one holds something else than before.

    A file with other times of change but the same content (it was copied, or touched) is unchanged.
    """
    recorded = {file.uri: file for file in files}
    local, on_s3, elsewhere = _by_store(list(recorded))
    stamps = _stamps_of_local(local, absent_ok=True) | _stamps_elsewhere(elsewhere, absent_ok=True)
    now = {uri: stamp.text for uri, stamp in stamps.items()} | _etags(on_s3, absent_ok=True)
    for uri, stamp in now.items():
        if stamp != recorded[uri].stamp:
            _check_content(recorded[uri])


def open_unchanged(file: FileIdentity) -> BinaryIO:
    """Open a file for reading (`storage.open_read`).

    Raises:
        ChangedFileError: It holds something else by now.
    """
    handle = storage.open_read(file.uri)
    try:
        if _stamp_of_open(handle) != file.stamp:
            _check_content(file)
    except BaseException:
        handle.close()
        raise
    return handle


def _by_store(uris: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the local files, those on S3, and those in stores that are only read."""
    elsewhere = [uri for uri in uris if s3.is_read_only(uri)]
    others = [uri for uri in uris if not s3.is_read_only(uri)]
    on_s3 = [uri for uri in others if storage.is_remote(uri)]
    return [uri for uri in others if not storage.is_remote(uri)], on_s3, elsewhere


@contextmanager
def recorded_identities() -> Iterator[list[FileIdentity]]:
    """Collect the identities of all files that are identified in the block, by any thread.

    Files in scratch folders are left out.
    """
    recorded: list[FileIdentity] = []
    _RECORDED.append(recorded)
    try:
        yield recorded
    finally:
        _RECORDED[:] = [identities for identities in _RECORDED if identities is not recorded]


@contextmanager
def progress_to(report_progress: Callable[[str], object]) -> Iterator[None]:
    """Let `identify` call ``report_progress`` with a line when reading takes long."""
    token = _PROGRESS.set(report_progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


def _check_content(file: FileIdentity) -> None:
    """Raise ChangedFileError when the content of a file is not what it was."""
    by_stat = "-stat:" in file.content
    now = identify([file.uri], "stat" if by_stat else "content", absent_ok=True)[0]
    if now.content == file.content:
        return
    how = (
        "it is gone"
        if now.content == ABSENT
        else "it holds something else than when the run was planned"
    )
    if by_stat:
        how = (
            "its size or time of change is another one than when the run was planned "
            "(data.identity: stat)"
        )
    raise ChangedFileError(
        f"{file.uri} was changed while it was in use: {how}; leave the files of a run alone "
        "until it ends, and run again"
    )


# ---------------------------------------------------------------- local files


class _Stamp(NamedTuple):
    """What is known of a file without reading it.

    Attributes:
        size: Bytes.
        text: Size, times of change and inode of a local file; ``absent`` where there is none.
        by_stat: What stands for the content with the mode ``stat``.
        identity: What stays the same while a local file is read: size, time of change, inode.
        changed_ns: The last change, in nanoseconds since 1970.
    """

    size: int
    text: str
    by_stat: str = ABSENT
    identity: tuple[int, ...] = ()
    changed_ns: int = 0

    @property
    def is_absent(self) -> bool:
        return self.text == ABSENT


_NOT_THERE = _Stamp(-1, ABSENT)


def _stamp(status: os.stat_result) -> _Stamp:
    """Return the stamp of a local file from its status.

    The time of change of the inode is part of it, as tools that set the time of change back cannot
    set that.
    """
    size, modified_ns, changed_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return _Stamp(
        size,
        f"{size} {modified_ns} {changed_ns} {status.st_ino}",
        f"stat:{modified_ns}",
        (size, modified_ns, status.st_ino),
        max(modified_ns, changed_ns),
    )


def _stamp_elsewhere(uri: str, place: read_only.Place) -> _Stamp:
    """Return the stamp of a file in a store that is only read.

    An ETag may be the same for two files of a store, so that with the mode ``stat`` the URI counts,
    without its query: a server may sign the address of one file anew each hour.
    """
    digest = hashlib.sha256(f"{storage.without_query(uri)} {place.stamp}".encode()).hexdigest()[:32]
    changed_ns = int((place.modified_s or 0) * 1e9)
    return _Stamp(
        place.size, f"{place.size} {place.stamp}", f"stat:{digest}", changed_ns=changed_ns
    )


def _stat_file(uri: str, absent_ok: bool) -> _Stamp:
    """Return the stamp of a local file."""
    if NUL in uri:
        if absent_ok:
            return _NOT_THERE
        raise storage.StorageError(f"{uri!r} is the name of no file: it holds a NUL character")
    try:
        status = s3.call("look at", uri, os.stat, s3.split(uri)[1])
    except storage.StorageError as error:
        if absent_ok and isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return _NOT_THERE
        raise
    if stat.S_ISDIR(status.st_mode):
        raise storage.StorageError(f"{uri} is a folder; name a file in it")
    return _stamp(status)


def _stamps_of_local(uris: Sequence[str], absent_ok: bool) -> dict[str, _Stamp]:
    """Return the stamps of local files, looked up by several threads."""
    found = threaded_map(
        lambda some: [_stat_file(uri, absent_ok) for uri in some], _parted(uris, FILES_PER_TASK)
    )
    return dict(zip(uris, itertools.chain.from_iterable(found), strict=True))


def _stamps_elsewhere(uris: Sequence[str], absent_ok: bool) -> dict[str, _Stamp]:
    """Return the stamps of files in stores that are only read."""

    def look(uri: str) -> _Stamp:
        if NUL in uri and absent_ok:
            return _NOT_THERE
        try:
            place = read_only.look(uri)
        except storage.NotFoundError:
            if absent_ok:
                return _NOT_THERE
            raise
        if place.is_folder:
            raise storage.StorageError(f"{uri} is a folder; name a file in it")
        return _stamp_elsewhere(uri, place)

    return dict(zip(uris, threaded_map(look, uris), strict=True))


def _stamp_of_open(handle: BinaryIO) -> str:
    """Return the stamp of an open file."""
    raw = getattr(handle, "raw", None)
    if isinstance(raw, read_only.Reader):
        return _stamp_elsewhere(raw.uri, raw.place).text
    if isinstance(raw, s3.Reader):
        return _etag_text(raw.size, raw.etag)
    return _stamp(os.fstat(handle.fileno())).text


def _by_stat(stamps: dict[str, _Stamp]) -> dict[str, str]:
    """Return the contents of files by size and time of change alone."""
    return {
        uri: ABSENT if stamp.is_absent else f"{stamp.size}-{stamp.by_stat}"
        for uri, stamp in stamps.items()
    }


def _by_content(stamps: dict[str, _Stamp]) -> dict[str, str]:
    """Return the contents of files by their bytes, read where they are not remembered."""
    content_of = {uri: ABSENT for uri, stamp in stamps.items() if stamp.is_absent}
    present = {uri: stamp for uri, stamp in stamps.items() if not stamp.is_absent}
    if not present:
        return content_of
    with _Memory() as memory:
        places = {
            uri: uri if s3.is_read_only(uri) else os.path.abspath(s3.split(uri)[1])
            for uri in present
        }
        remembered = memory.recall({places[uri]: stamp for uri, stamp in present.items()})
        content_of |= {
            uri: remembered[place] for uri, place in places.items() if place in remembered
        }
        unread = {uri: stamp for uri, stamp in present.items() if uri not in content_of}
        read = _read(unread)
        fresh: list[tuple[str, _Stamp, str]] = []
        saved = time.monotonic()
        for uri, content, left_alone in read:
            content_of[uri] = content
            if left_alone:
                fresh.append((places[uri], present[uri], content))
            if time.monotonic() - saved > SAVE_SECONDS:
                memory.remember(fresh)
                fresh, saved = [], time.monotonic()
        memory.remember(fresh)
    return content_of


def _read(files: dict[str, _Stamp]) -> Iterator[tuple[str, str, bool]]:
    """Read files and yield (file, its content, whether it may be remembered), in order.

    A file may be remembered when nothing had changed it for GRAIN_SECONDS before. Small files are
    hashed several per task, large ones one piece per task.
    """
    _wait_for_new_large_files(files)
    began_ns, began = time.time_ns(), time.monotonic()
    total, done_files, done_bytes = sum(stamp.size for stamp in files.values()), 0, 0
    small = [uri for uri, stamp in files.items() if stamp.size <= PIECE_BYTES]
    large = [uri for uri, stamp in files.items() if stamp.size > PIECE_BYTES]

    def ended(uri: str, digest: str) -> tuple[str, str, bool]:
        nonlocal done_files, done_bytes
        stamp = files[uri]
        done_files, done_bytes = done_files + 1, done_bytes + stamp.size
        report_progress = _PROGRESS.get()
        if report_progress is not None and time.monotonic() - began > PROGRESS_AFTER_SECONDS:
            share = f"{done_files} of {len(files)} files, {done_bytes >> 20} of {total >> 20} MiB"
            report_progress(f"reading the data once, to identify them by content: {share}")
        age_ns = began_ns - stamp.changed_ns
        return uri, f"{stamp.size}-{digest}", age_ns > GRAIN_SECONDS * 1e9

    def read_small(uris: Sequence[str]) -> list[str]:
        return [s3.call("read", uri, hash_whole, uri, files[uri]) for uri in uris]

    def read_piece(piece: tuple[str, int]) -> bytes:
        uri, number = piece
        return s3.call("read", uri, hash_piece, uri, number)

    groups = _parted(small, FILES_PER_TASK)
    for group, digests in zip(groups, threaded_map(read_small, groups), strict=True):
        for uri, digest in zip(group, digests, strict=True):
            yield ended(uri, f"sha256:{digest}")
    counts = [-(-files[uri].size // PIECE_BYTES) for uri in large]
    pieces = [
        (uri, number) for uri, count in zip(large, counts, strict=True) for number in range(count)
    ]
    digests_of_pieces = threaded_map(read_piece, pieces)
    for uri, count in zip(large, counts, strict=True):
        digest = hashlib.sha256(b"".join(itertools.islice(digests_of_pieces, count))).hexdigest()
        _refuse_changed(uri, _look_anywhere(uri), files[uri])
        yield ended(uri, f"sha256-pieces:{digest}")


def _wait_for_new_large_files(files: dict[str, _Stamp]) -> None:
    """Wait until a large file that was just written is old enough to be remembered."""
    newest_ns = max(
        (stamp.changed_ns for stamp in files.values() if stamp.size > PIECE_BYTES),
        default=0,
    )
    age_seconds = (time.time_ns() - newest_ns) / 1e9
    if 0 <= age_seconds <= GRAIN_SECONDS:
        time.sleep(GRAIN_SECONDS - age_seconds + 0.01)


def hash_whole(uri: str, stamp: _Stamp) -> str:
    """Return the SHA-256 of a file in hex. Raise ChangedFileError when it changes meanwhile."""
    digest = hashlib.sha256()
    with _open(uri) as file:
        hash_bytes(file, stamp.size + 1, digest)
        now = _look_anywhere(uri) if s3.is_read_only(uri) else _stamp(os.fstat(file.fileno()))
        _refuse_changed(uri, now, stamp)
    return digest.hexdigest()


def hash_piece(uri: str, number: int) -> bytes:
    """Return the SHA-256 of one piece of a file."""
    digest = hashlib.sha256()
    with _open(uri) as file:
        file.seek(number * PIECE_BYTES)
        hash_bytes(file, PIECE_BYTES, digest)
    return digest.digest()


def _open(uri: str) -> Any:
    """Open a file for `hash_bytes`: unbuffered, but a remote one with few requests."""
    if s3.is_read_only(uri):
        return storage.open_read(uri, 8 << 20)
    return open(s3.split(uri)[1], "rb", 0)


def _look_anywhere(uri: str) -> _Stamp:
    """Return the stamp of a file, local or in a store that is only read, as it is now."""
    looked = _stamps_elsewhere if s3.is_read_only(uri) else _stamps_of_local
    return looked([uri], absent_ok=True)[uri]


def hash_bytes(file: Any, most: int, digest: Any) -> None:
    """Hash up to ``most`` bytes from the file's position on."""
    buffer = memoryview(bytearray(min(READ_BYTES, most)))
    while most > 0 and (count := file.readinto(buffer[: min(len(buffer), most)])):
        digest.update(buffer[:count])
        most -= count


def _refuse_changed(uri: str, now: _Stamp, before: _Stamp) -> None:
    """Raise ChangedFileError when two stamps of a file differ."""
    is_same = now.identity == before.identity if before.identity else now.text == before.text
    if not is_same:
        raise ChangedFileError(
            f"{uri} was changed while it was read; wait until nothing writes to it, and run again"
        )


def _parted(items: Sequence[str], size: int) -> list[Sequence[str]]:
    """Return the items in groups of ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


# ---------------------------------------------------------------- S3


def _etag_text(size: int, etag: str) -> str:
    """Return the content of an object from its size and ETag."""
    return f"{size}-etag:{etag.strip(chr(34))}"


def _etags(uris: Sequence[str], absent_ok: bool) -> dict[str, str]:
    """Return the contents of objects.

    It takes one request for each object, or one for a thousand where many lie in one folder.
    """
    folders = defaultdict(list)
    for uri in uris:
        folders[uri.rpartition("/")[0]].append(uri)
    # a key may hold an empty part (a//x.jpg), and the folder of such a key cannot be listed by its
    # name
    folders = {folder: inside for folder, inside in folders.items() if not folder.endswith("/")}
    listed = [folder for folder, inside in folders.items() if len(inside) >= LISTED_FILES]
    found: dict[str, str] = {}

    def list_folder(folder: str) -> dict[str, str]:
        path = s3.split(folder)[1]
        bucket = path.partition("/")[0]
        entries = s3.list_objects(path, recursive=False)
        return {
            f"s3://{bucket}/{entry['Key']}": _etag_text(entry["Size"], entry["ETag"])
            for entry in entries
        }

    for etags in threaded_map(list_folder, listed):
        found |= etags
    missing = [uri for uri in uris if uri not in found]

    def look(uri: str) -> str:
        if NUL in uri and absent_ok:
            return ABSENT
        try:
            info = storage.file_info(uri)
        except storage.NotFoundError:
            if absent_ok:
                return ABSENT
            raise
        return _etag_text(info["size"], info["ETag"])

    found |= dict(zip(missing, threaded_map(look, missing), strict=True))
    return {uri: found[uri] for uri in uris}


# ---------------------------------------------------------------- what was read before


def cache_folder() -> Path:
    """Return the folder of this user's caches.

    It is $ONETOMANY_CACHE, else $XDG_CACHE_HOME/onetomany, else ~/.cache/onetomany.

    Raises:
        RuntimeError: The user has no home folder.
    """
    stated = os.environ.get("ONETOMANY_CACHE", "")
    if os.path.isabs(stated):
        return Path(stated)
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return base / "onetomany"


class _Memory:
    """Remembered contents of local files, in an SQLite file that several processes may share.

    An entry is a digest of the path (file names may be private), the stamp, the content, and a
    checksum of the three. An entry with a wrong checksum is ignored, and a file that is no database
    is made anew. Where the folder cannot be written, what is read is forgotten when the call ends,
    with a warning.
    """

    def __enter__(self) -> _Memory:
        self._file: Path | None = None
        try:
            self._file = cache_folder() / f"identity-{_FORMAT}.sqlite"
        except RuntimeError as error:
            log.warning(
                "no cache folder (%s): files are read anew by the next command; set "
                "ONETOMANY_CACHE or HOME",
                error,
            )
        self._db = self._open()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(sqlite3.Error):
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
                return self._connect(str(self._file))
            except (OSError, sqlite3.OperationalError) as error:
                self._give_up(error)
            except sqlite3.DatabaseError as error:
                return self._make_anew(error)
        return self._connect(":memory:")

    @staticmethod
    def _connect(name: str) -> sqlite3.Connection:
        db = sqlite3.connect(name, timeout=20, isolation_level=None)
        # what a power cut spoils is found by its checksum, or made anew
        db.execute("PRAGMA synchronous = OFF")
        table = (
            "CREATE TABLE IF NOT EXISTS files (place BLOB PRIMARY KEY, stamp TEXT, content TEXT, "
            "seal BLOB)"
        )
        db.execute(f"{table} WITHOUT ROWID")
        return db

    def _give_up(self, error: Exception) -> None:
        """Warn that the cache cannot be used, and do without it."""
        log.warning(
            "%s cannot be used (%s): files are read anew by the next command", self._file, error
        )
        self._file = None

    def _make_anew(self, error: Exception) -> sqlite3.Connection:
        """Replace a damaged cache by an empty one."""
        assert self._file is not None
        log.warning(
            "%s is damaged (%s): it is made anew, and files are read once more", self._file, error
        )
        for name in (self._file, Path(f"{self._file}-journal")):
            with suppress(OSError):
                name.unlink()
        try:
            os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
            return self._connect(str(self._file))
        except (OSError, sqlite3.Error) as again:
            self._give_up(again)
            return self._connect(":memory:")

    def _try(self, work: Callable[[sqlite3.Connection], Any], otherwise: Any) -> Any:
        """Call ``work`` on the database.

        After an error replace the database and return ``otherwise``.
        """
        try:
            return work(self._db)
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._db.close()
            # locked for long, disk full, a filesystem without locks
            if isinstance(error, sqlite3.OperationalError):
                self._give_up(error)
                self._db = self._connect(":memory:")
            else:
                self._db = self._make_anew(error)
            return otherwise

    def recall(self, files: dict[str, _Stamp]) -> dict[str, str]:
        """Return the contents of those files, by absolute path, that are remembered with the same
        stamp.
        """
        places = {_digest(path.encode("utf-8", "surrogateescape")): path for path in files}
        keys = list(places)

        def ask(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
            rows = []
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                rows += db.execute(f"SELECT * FROM files WHERE place IN ({marks})", some).fetchall()
            return rows

        found = {}
        for place, stamp, content, seal in self._try(ask, []):
            path = places.get(place)
            is_same = path is not None and stamp == files[path].text
            if is_same and seal == _seal(place, stamp, content):
                found[path] = content
        return found

    def remember(self, entries: list[tuple[str, _Stamp, str]]) -> None:
        """Remember (absolute path, stamp, content) of files that were read."""
        if not entries:
            return
        rows = []
        for path, stamp, content in entries:
            place = _digest(path.encode("utf-8", "surrogateescape"))
            rows.append((place, stamp.text, content, _seal(place, stamp.text, content)))

        def write(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
            db.execute("COMMIT")

        self._try(write, None)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _seal(place: Any, stamp: Any, content: Any) -> bytes:
    return _digest(repr((_FORMAT, place, stamp, content)).encode())
