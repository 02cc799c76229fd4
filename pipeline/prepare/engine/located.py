"""Recordings that lines of a text file name by a path: which files are meant."""

from __future__ import annotations

import hashlib
import posixpath

from pipeline.io import file_identity, storage
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine.audio import Line
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.archives import Entry, Listing

Located = tuple[Entry | None, str]
"""A file and "", or None and why there is none."""


def locate(
    source: str,
    listing: Listing,
    named: list[tuple[Line, str]],
    root: str,
) -> tuple[list[Located], str]:
    """Find the files that lines name.

    Args:
        source: the folder, archive or text file that was given.
        found: the files below it.
        named: each line with the path that it names, absolute or relative to `root`.
        root: a folder, absolute or below `source`; "": the folder of the line's own file.

    Returns:
        (for each line its file or the reason why there is none; a fingerprint that changes when any
        of the files does).
    """
    files = _Recordings(source, listing)
    places = [files.find(line, path, root) for line, path in named]
    outside = list(dict.fromkeys(place for place in places if isinstance(place, str)))
    known = existing_files(outside)
    contents = sorted((uri, known[uri][1] if uri in known else "") for uri in outside)
    fingerprint = hashlib.sha256(f"{listing.fingerprint} {contents}".encode()).hexdigest()
    return [_located(place, known) for place in places], fingerprint


class _Recordings:
    """The files below a source, by name and by address."""

    def __init__(self, source: str, listing: Listing):
        self.source = source
        self.names = {entry.name: entry for entry in listing.entries}
        self.uris = {
            entry.uri: entry for entry in listing.entries if entry.offset < 0 and not entry.member
        }
        is_folder = storage.is_dir(source) or archives.has_suffix(source, *archives.ARCHIVES)
        self.folder = "" if is_folder else posixpath.dirname(storage.absolute(source))
        """The folder of a text file that was given alone, else ""."""

    def find(self, line: Line, path: str, root: str) -> Located | str:
        """Return the file, the address where it should be, or why it cannot be used."""
        if storage.is_absolute(path):
            return self._at(path)
        base = root or posixpath.dirname(line.file)
        inner = posixpath.normpath(
            path if storage.is_absolute(base) else posixpath.join(base, path)
        )
        if inner.split("/")[0] == "..":
            folder = base if storage.is_absolute(base) else self.source
            return (
                None,
                f"{path} leads outside of {folder}; give a SOURCE that holds both, or --set root=",
            )
        if storage.is_absolute(base):
            return self._at(storage.join(base, inner))
        for name in (inner, inner.replace("\\", "/")):
            if (entry := self.names.get(archives.plain_name(name))) is not None:
                return entry, ""
        if self.folder:
            return storage.join(self.folder, inner)
        return None, f"no recording {inner} in {self.source}"

    def _at(self, uri: str) -> Located | str:
        return (self.uris[uri], "") if uri in self.uris else uri


def _located(place: Located | str, known: dict[str, tuple[int, str]]) -> Located:
    if not isinstance(place, str):
        return place
    if place not in known:
        return None, f"no recording {place}"
    return Entry.of_file(place, place, known[place][0]), ""


def existing_files(uris: list[str]) -> dict[str, tuple[int, str]]:
    """Return (size, fingerprint) of each file that exists."""
    named = [uri for uri in uris if file_identity.NUL not in uri]
    try:
        identified = file_identity.identify(named, absent_ok=True)
    except storage.StorageError:  # a folder may be among them
        are_folders = threaded_map(storage.is_dir, named)
        others = [uri for uri, is_dir in zip(named, are_folders, strict=True) if not is_dir]
        identified = file_identity.identify(others, absent_ok=True)
    files = [file for file in identified if file.content != file_identity.ABSENT]
    sizes = threaded_map(storage.size, [file.uri for file in files])
    return {file.uri: (size, file.content) for file, size in zip(files, sizes, strict=True)}
