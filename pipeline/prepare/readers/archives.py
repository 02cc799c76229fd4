"""Find a publisher's files in folders, zip and tar archives, and tars within tars.

Archives are read in place, never extracted. They are not trusted: names that lead outside, links,
and members that unpack to more than they may are refused. fsspec's archive file systems do not
check these, do not look into inner tars, and are not safe to read from several threads. Measured
with fsspec 2026.9.0 on 1,500 members of 20 kB: zips are read equally fast (0.14 s), tars three
times slower (0.25 s where this takes 0.08 s), and a member ``../../out.jpg`` is listed like any
other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import re
import stat
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Container
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self, cast

import pyarrow as pa

from pipeline.data.to_parquet import IMAGE_SUFFIXES
from pipeline.io import file_identity, s3, storage
from pipeline.io.range_reader import RangeReader
from pipeline.io.threads import threaded_map
from pipeline.prepare.readers.picture_check import BrokenImageError

GZIPPED = (".tar.gz", ".tgz")
"""Can only be read from their start: each shard of their rows costs one pass."""
ARCHIVES = (".tar", ".zip", *GZIPPED)
COMPRESSED = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAX_FILE_BYTES = 256 << 20
"""Largest file; a zip member that claims to be larger is not decompressed."""


class Entry(NamedTuple):
    """One file and where its bytes are.

    Attributes:
        name: path below the source, by `plain_name`.
        uri: the file or archive.
        member: name in a zip, or "".
        offset: in a tar; -1: a whole file.
        size: in bytes.
    """

    name: str
    uri: str
    member: str
    offset: int
    size: int

    @classmethod
    def of_file(cls, name: str, uri: str, size: int | None = None) -> Entry:
        """Return a file that lies in no archive; its size is looked up where it is not given."""
        return cls(name, uri, "", -1, storage.size(uri) if size is None else size)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()

    @property
    def suffix_or_name(self) -> str:
        """What a file is counted by: its suffix, or its name where it has none."""
        return self.suffix or posixpath.basename(self.name)

    @property
    def is_image(self) -> bool:
        return self.suffix in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        entries: sorted by name.
        empty: folders without files.
        fingerprint: a digest of names and contents (ETags on S3).
    """

    entries: list[Entry]
    empty: list[str] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def images(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_image]

    def others(self) -> dict[str, int]:
        """Count the files that are no images, by suffix."""
        left = [entry for entry in self.entries if not entry.is_image]
        return dict(Counter(entry.suffix_or_name for entry in left))

    def without_common_folder(self, keep: Container[str] = ()) -> Listing:
        """Drop the folder that holds all files from their names (train2017.zip holds train2017/).

        Repeats for deeper folders, up to one of `keep`.
        """
        folders = [posixpath.dirname(entry.name) for entry in self.entries] or [""]
        shared = posixpath.commonpath(folders)
        shared = "/".join(takewhile(lambda name: name not in keep, shared.split("/")))
        cut = len(shared) + 1 if shared else 0
        return replace(
            self,
            entries=[entry._replace(name=entry.name[cut:]) for entry in self.entries],
            empty=[name[cut:] for name in self.empty],
        )


# ---------------------------------------------------------------- listing


def plain_name(name: str) -> str:
    """Return a name with its letters composed (NFC): macOS writes é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def listing(uri: str) -> Listing:
    """List all files below a folder or in a zip, tar or tar.gz.

    Archives in a folder, and tars in a tar, are listed as folders of their name without suffix.

    Raises:
        ValueError: nothing there, another compression, a damaged archive, or a name or link in it
            that leads outside.
    """
    uri = storage.absolute(uri)
    if storage.is_dir(uri):
        return _folder(uri)
    if not storage.exists(uri):
        raise ValueError(f"{uri}: no such file or folder")
    if not has_suffix(uri, *ARCHIVES, *COMPRESSED):
        raise ValueError(f"{uri}: neither a folder nor a .zip or .tar file")
    return _archive(uri, "")


def has_suffix(uri: str, *suffixes: str) -> bool:
    """Return whether a file has one of some suffixes; the query of an address is no part of it."""
    return storage.file_name(uri).lower().endswith(suffixes)


def is_gzipped(uri: str) -> bool:
    """Return whether an archive can only be read from its start."""
    return has_suffix(uri, *GZIPPED)


def _folder(uri: str) -> Listing:
    files = [file for file in storage.list_files(uri) if not _hidden(file[len(uri) :])]
    on_s3 = storage.is_remote(uri) and not s3.is_read_only(uri)
    objects = s3.on_s3("list", uri, "find", detail=True) if on_s3 else {}
    known = {f"s3://{path}": info for path, info in objects.items()}
    contents = {} if on_s3 else {file.uri: file.content for file in file_identity.identify(files)}

    def look(file: str) -> tuple[list[Entry], str, list[str]]:
        name = plain_name(file[len(uri) :].lstrip("/"))
        if has_suffix(file, *ARCHIVES, *COMPRESSED):
            found = _archive(file, re.sub(r"(\.tar)?\.\w+$", "/", name), contents.get(file))
            return found.entries, found.fingerprint, found.empty
        info = known.get(file)
        if info is not None:
            file_identity.of_object(file, info["size"], info["ETag"])
            return [Entry.of_file(name, file, info["size"])], info["ETag"], []
        content = contents.get(file) or file_identity.fingerprint(file)
        return [Entry.of_file(name, file)], content, []

    entries, digest, empty = [], hashlib.sha256(), []
    if not storage.is_remote(uri):
        empty = _empty_folders(s3.split(uri)[1])
    for found, fingerprint, bare in threaded_map(look, files):
        entries += found
        empty += bare
        digest.update(f"{[entry.name for entry in found]} {fingerprint}".encode())
    _refuse_doubled(
        entries, uri, "such as in an archive and in a folder of its name; remove one of them"
    )
    return Listing(sorted(entries), sorted(empty), digest.hexdigest())


def _hidden(name: str) -> bool:
    return "/." in f"/{name}" or "__MACOSX" in name


def _empty_folders(root: str) -> list[str]:
    walk = os.walk(root, followlinks=True)
    return [
        plain_name(Path(folder).relative_to(root).as_posix())
        for folder, folders, names in walk
        if folder != root
        and not [name for name in (*folders, *names) if not _hidden(name)]
        and not _hidden(str(Path(folder).relative_to(root)))
    ]


def _refuse_doubled(entries: list[Entry], uri: str, fix: str) -> None:
    name, count = next(iter(Counter(entry.name for entry in entries).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"{uri}: {name} stands in it {count} times; {fix}")


def _archive(uri: str, prefix: str, content: str | None = None) -> Listing:
    """List the members of an archive, with `prefix` before their names.

    `content`: the archive's fingerprint, where it is already known.
    """
    if has_suffix(uri, *COMPRESSED):
        raise ValueError(
            f"{uri}: of compressed tars only .tar.gz is read; decompress it first (bunzip2, "
            "unxz, unzstd: it stays a tar)"
        )
    with closing(open_archive(uri)) as handle:
        if is_gzipped(uri):
            with gzip.GzipFile(fileobj=handle) as unpacked:
                files, folders = _tar(uri, cast(BinaryIO, unpacked), uri)
        else:
            files, folders = (_zip if has_suffix(uri, ".zip") else _tar)(uri, handle, uri)
    _refuse_doubled(files, uri, "write the archive again")
    held = {
        folder.as_posix()
        for parent in {posixpath.dirname(entry.name) for entry in files}
        for folder in PurePosixPath(parent, "x").parents
    }
    entries = [
        entry._replace(name=prefix + entry.name) for entry in files if not _hidden(entry.name)
    ]
    empty = [prefix + name for name in sorted(set(folders) - held)] + (
        [prefix.rstrip("/")] if prefix and not files else []
    )
    return Listing(sorted(entries), empty, content or file_identity.fingerprint(uri))


def open_archive(uri: str) -> BinaryIO:
    """Open an archive, remote ones with a large buffer: the headers of a tar are far apart."""
    return storage.open_read(uri, 16 << 20)


def _inside(name: str, where: str) -> str:
    """Return the member's normalised name. Raises ValueError if it leads out of the archive."""
    path = name.replace("\\", "/")
    if (
        path.startswith("/")
        or ".." in path.split("/")
        or re.match(r"[A-Za-z]:", name)
        or "\0" in name
    ):
        raise ValueError(
            f"{where}: member {name!r} leads outside of the archive; such an archive is not to "
            "be trusted: download it again or pack it anew"
        )
    return plain_name(posixpath.normpath(path))


def _zip(uri: str, handle: BinaryIO, where: str) -> tuple[list[Entry], list[str]]:
    try:
        archive = zipfile.ZipFile(handle)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{where}: not a whole zip file ({error}); download it again") from None
    entries, folders = [], []
    for info in archive.infolist():
        name = _inside(info.filename, where)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(
                f"{where}: member {info.filename!r} is a link; links in archives are not "
                "followed: pack the files themselves"
            )
        if info.is_dir():
            folders.append(name)
        else:
            entries.append(Entry(name, uri, info.filename, -1, info.file_size))
    return entries, folders


def _tar(
    uri: str,
    handle: BinaryIO,
    where: str,
    start: int = 0,
    size: int | None = None,
) -> tuple[list[Entry], list[str]]:
    """List the members of a tar that lies in `size` bytes of `handle` from `start`."""
    view = io.BufferedReader(FileRange(handle, start, size)) if size is not None else handle
    entries, folders = [], []
    try:
        with tarfile.open(fileobj=view, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # else it keeps all that it has seen
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                name = _inside(member.name, where)
                if member.isdir():
                    folders.append(name)
                elif not member.isreg() or member.issparse():
                    raise ValueError(
                        f"{where}: member {member.name!r} is a link or special file; only "
                        "plain files are read: pack the files themselves"
                    )
                # It is unpacked to be passed
                elif (
                    member.size > MAX_FILE_BYTES
                    and isinstance(handle, gzip.GzipFile)
                    and not name.lower().endswith(".tar")
                ):
                    raise ValueError(
                        f"{where}: member {member.name!r} unpacks to {member.size} bytes; such "
                        "an archive is not to be trusted: gunzip it by hand"
                    )
                elif name.lower().endswith(".tar"):
                    inner, bare = _tar(
                        uri, handle, f"{where}:{name}", start + member.offset_data, member.size
                    )
                    folder = name[: -len(".tar")]
                    entries += [entry._replace(name=f"{folder}/{entry.name}") for entry in inner]
                    folders += [folder, *(f"{folder}/{bare_name}" for bare_name in bare)]
                else:
                    entries.append(Entry(name, uri, "", start + member.offset_data, member.size))
            view.seek(archive.offset)
            end = view.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{where}: not a whole tar file ({error}); download it again") from None
    # The tarfile module takes a damaged header, and a file that ends early, for the end
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise ValueError(
            f"{where}: not a whole tar file (at byte {start + archive.offset}, after "
            f"{len(entries)} files, is neither a header nor the end mark); "
            "download it again"
        )
    return entries, folders


class FileRange(RangeReader):
    """A range of a file, as a file."""

    def __init__(self, handle: BinaryIO, start: int, size: int):
        super().__init__("a part of a file", size)
        self.handle, self.start = handle, start

    def read_range(self, start: int, stop: int) -> bytes:
        self.handle.seek(self.start + start)
        return self.handle.read(stop - start)


# ---------------------------------------------------------------- reading


DAMAGED = (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, EOFError)
"""What a damaged archive or compressed file raises while it is read."""


class UnpackableError(ValueError):
    """A member of a zip that is encrypted, or compressed in a way that Python does not know."""


class Opener:
    """Opens entries as streams, and keeps archives open between them.

    A context manager, which closes the archives.
    """

    def __init__(self):
        self._zips: dict[str, zipfile.ZipFile] = {}
        self._archives: dict[str, BinaryIO] = {}
        self._handles: list[BinaryIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in (*self._zips.values(), *self._archives.values(), *self._handles):
            handle.close()
        self._zips.clear()
        self._archives.clear()
        self._handles.clear()

    def __call__(self, entry: Entry) -> BinaryIO:
        """Open an entry, decompressed if its suffix says so; the stream is for one thread."""
        handle = self.stored(entry)
        name = entry.name.lower()
        if name.endswith(".gz"):
            return io.BufferedReader(gzip.GzipFile(fileobj=handle), 1 << 20)
        if name.endswith(".zst"):
            return io.BufferedReader(
                cast(Any, pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd")),
                1 << 20,
            )
        return handle

    def stored(self, entry: Entry) -> BinaryIO:
        """Open an entry as it is in its folder or archive."""
        if entry.member:
            if entry.uri not in self._zips:
                self._handles.append(storage.open_read(entry.uri))
                self._zips[entry.uri] = zipfile.ZipFile(self._handles[-1])
            try:
                member = self._zips[entry.uri].open(entry.member)
            except (RuntimeError, NotImplementedError) as error:
                raise UnpackableError(
                    f"{entry.uri}: {entry.name} cannot be unpacked ({error}); decrypt it or "
                    "pack it anew"
                ) from None
            return io.BufferedReader(cast(Any, member), 1 << 20)
        if entry.offset < 0:
            return storage.open_read(entry.uri)
        if entry.uri not in self._archives:
            handle = open_archive(entry.uri)
            self._handles.append(handle)
            self._archives[entry.uri] = (
                cast(BinaryIO, gzip.GzipFile(fileobj=handle)) if is_gzipped(entry.uri) else handle
            )
        window = FileRange(self._archives[entry.uri], entry.offset, entry.size)
        return io.BufferedReader(window, 1 << 20)


class Reader:
    """Reads entries whole; archives stay open between them. Threads may share one.

    A context manager, which closes the archives.

    Members of a tar.gz should be read in their order: to go back, it is decompressed from its
    start.
    """

    def __init__(self):
        self._opener = Opener()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opener.__exit__(*error)

    def __call__(self, uri: str, member: str, offset: int, size: int) -> bytes:
        """Read one entry.

        Raises BrokenImageError for a cut or damaged member, StorageError for an unreadable file.
        """
        if size > MAX_FILE_BYTES:
            raise BrokenImageError(f"{size} bytes are more than an image has")
        entry = Entry(member, uri, member, offset, size)
        if member:
            data = self._unpacked(entry, "broken member of the zip", MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise BrokenImageError("it unpacks to more than an image has")
            return data
        if offset < 0:
            return storage.read_bytes(uri)
        if is_gzipped(uri):
            data = self._unpacked(entry, "the archive is damaged", size)
        else:
            data = storage.read_range(uri, offset, offset + size)
        if len(data) != size:
            raise BrokenImageError(f"the archive ends after {len(data)} of its {size} bytes")
        return data

    def entry(self, entry: Entry) -> bytes:
        return self(entry.uri, entry.member, entry.offset, entry.size)

    def _unpacked(self, entry: Entry, problem: str, most: int) -> bytes:
        """Read up to so many bytes of a member, by one thread at a time."""
        with self._lock:
            try:
                with self._opener.stored(entry) as file:
                    return file.read(most)
            except (*DAMAGED, UnpackableError) as error:
                raise BrokenImageError(f"{problem}: {error}") from None


def read_entry(entry: Entry) -> bytes:
    """Read one file, whole."""
    with Reader() as reader:
        return reader.entry(entry)
