"""Find a publisher's text files, cut them into input splits, and read their lines.

Files may lie in folders and archives, be compressed, and be on disk or on S3. Only what has no
lines (JSON documents, Parquet inside an archive) is read whole: a split of any size takes the
memory of one row.
"""

from __future__ import annotations

import codecs
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

from pipeline.io import file_identity, storage
from pipeline.prepare.engine.importing import (
    InvalidRow,
    Notes,
    first_few,
    invalid_row,
    split_of,
    split_of_file,
    splits_in,
    without_splits,
)
from pipeline.prepare.readers.archives import (
    ARCHIVES,
    COMPRESSED,
    DAMAGED,
    GZIPPED,
    MAX_FILE_BYTES,
    Entry,
    Listing,
    Opener,
    has_suffix,
    is_gzipped,
    listing,
)

SQUEEZED = (".gz", ".zst")
TEXT_EXPANSION = 4
"""Estimated bytes of text in one byte of a compressed file, for the size of shards."""
ROW_BYTES = 32 << 20
"""A longer line, record or document is an invalid row."""
HELD_OUT_FIRST = {"test": 0, "validation": 1, "train": 2}
"""Order of splits. Of duplicate documents the first is kept, so held-out ones come first (`text`).
"""
MAX_LISTED = 1000


class InputSplit(NamedTuple):
    """A part of a file, which one call reads.

    Attributes:
        name: of the file, or of the publisher's table in it.
        split: of its rows: train, validation, test, or "" (all, or as the rows say).
        entry: the file.
        start, stop: bytes, of Parquet row groups; -1 as `stop`: to the end of the file.
        size: estimated bytes of text.
    """

    name: str
    split: str
    entry: Entry
    start: int = 0
    stop: int = -1
    size: int = 0


class InputFiles(NamedTuple):
    """The files that an importer reads.

    Attributes:
        files: each with its split, in reading order.
        others: how many files of each other suffix are left out.
        fingerprint: changes when any of the files does.
    """

    files: list[tuple[Entry, str]]
    others: dict[str, int]
    fingerprint: str

    @property
    def notes(self) -> Notes:
        """What the summary says of files that are left out, and of splits that may be wrong."""
        notes: Notes = {"files left out": self.others} if self.others else {}
        splits_of: dict[str, set[str]] = defaultdict(set)
        for entry, split in self.files:
            splits_of[without_splits(entry.name)].add(split)
        held_out: list[str] = []
        for entry, split in self.files:
            name = posixpath.basename(entry.name)
            is_by_name = split != "train" and split == split_of(name)
            # imdb_test.csv is no blood_test.csv if there is imdb_train.csv too
            is_plain = not re.search("[a-z]{2}", without_splits(name.split(".")[0]))
            is_one_of_several = len(splits_of[without_splits(entry.name)]) > 1
            means_several = len(set(splits_in(name))) > 1  # train_val.csv
            if is_by_name and (means_several or not (is_plain or is_one_of_several)):
                held_out.append(f"{entry.name} ({split})")
        if held_out:
            what = "held out by a word of the file's name (if it means no split, rename the file)"
            notes[what] = first_few(held_out)
        return notes


def plain_suffix(name: str) -> str:
    """Return the suffix without that of compression: .txt for a.txt.gz."""
    return posixpath.splitext(re.sub(r"\.(gz|zst)$", "", name.lower()))[1]


def find_inputs(source: str, suffixes: tuple[str, ...], split: str = "") -> InputFiles:
    """Find the files of a folder, an archive or a glob by their suffix, or the one file that is
    named.

    Hidden files, and those whose name or folder begins with an underscore, are left out; the latter
    are counted where they have one of the suffixes.

    Args:
        source: folder, archive, glob or file; local or s3://.
        suffixes: those that are read, without that of compression.
        split: of all files; empty: as their names say (`split_of_file`).

    Raises:
        ValueError: no such file, or a name that says held out, but not for what (eval).
    """
    exists = storage.exists(source)
    is_archive = has_suffix(source, *ARCHIVES, *COMPRESSED)
    if exists and not is_archive and not storage.is_dir(source):
        entry = Entry.of_file(posixpath.basename(storage.file_name(source)), source)
        return InputFiles(
            [(entry, split or split_of_file(entry.name))], {}, file_identity.fingerprint(source)
        )
    is_glob = not exists and re.search(r"[*?[]", source)
    found = _list_glob(source) if is_glob else listing(source)
    visible = [entry for entry in found.entries if not re.search(r"(^|/)_", entry.name)]
    wanted = [entry for entry in visible if plain_suffix(entry.name) in suffixes]
    left = [entry for entry in visible if plain_suffix(entry.name) not in suffixes]
    others = Counter(entry.suffix_or_name for entry in left)
    num_of_kind = sum(plain_suffix(entry.name) in suffixes for entry in found.entries)
    if num_of_kind > len(wanted):
        others["names that begin with _"] = num_of_kind - len(wanted)
    if not wanted:
        instead = f"; there are {first_few(sorted(others))}" if others else ""
        raise ValueError(
            f"{source}: no files with "
            f"{', '.join(suffix or 'no suffix' for suffix in suffixes)} there{instead}"
        )
    listed = [(entry, split or split_of_file(entry.name)) for entry in wanted]
    return InputFiles(
        sorted(listed, key=_reading_order), dict(sorted(others.items())), found.fingerprint
    )


def _list_glob(pattern: str) -> Listing:
    """List the files that a glob names, by their names below the folder that holds them all."""
    uris = storage.glob(pattern)
    paths = [uri.rpartition("://")[2] for uri in uris]
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths]) if paths else ""
    entries = [
        Entry.of_file(path[len(folder) :].lstrip("/"), uri)
        for path, uri in zip(paths, uris, strict=True)
    ]
    return Listing(entries, [], " ".join(file.content for file in file_identity.identify(uris)))


def check_kinds(listed: InputFiles, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError for a file of another kind: one that was named is found whatever it is."""
    for entry, _ in listed.files:
        if plain_suffix(entry.name) not in suffixes:
            raise ValueError(
                f"{entry.name}: unknown suffix; these are read: {', '.join(suffixes)} (also with "
                ".gz or .zst). If it is one of them, rename it"
            )


def _reading_order(file: tuple[Entry, str]) -> tuple[int, str, str, int, str]:
    """Sort key: by split and name; in a tar.gz, which is read from its start, by offset."""
    entry, split = file
    return (
        HELD_OUT_FIRST.get(split, 3),
        split,
        entry.uri,
        entry.offset if is_gzipped(entry.uri) else 0,
        entry.name,
    )


def whole_files(listed: InputFiles) -> list[InputSplit]:
    """Return one split for each file."""
    return [
        InputSplit(entry.name, split, entry, size=_weight(entry)) for entry, split in listed.files
    ]


def split_files(listed: InputFiles, most: int) -> list[InputSplit]:
    """Cut files into ranges of about `most` bytes; compressed ones are read whole."""
    out = []
    for entry, split in listed.files:
        is_packed = has_suffix(entry.uri, ".zip", *GZIPPED)
        count = round(entry.size / most)
        if count <= 1 or is_packed or entry.name.lower().endswith(SQUEEZED):
            out.append(InputSplit(entry.name, split, entry, size=_weight(entry)))
            continue
        cuts = [entry.size * i // count for i in range(count + 1)]
        out += [InputSplit(entry.name, split, entry, a, b, b - a) for a, b in pairwise(cuts)]
    return out


def _weight(entry: Entry) -> int:
    return entry.size * (TEXT_EXPANSION if entry.name.lower().endswith(SQUEEZED) else 1)


# ---------------------------------------------------------------- reading


@dataclass
class SplitReader:
    """One pass over an input split.

    Attributes:
        input_split: what is read.
        scan_result: what `infer_schema` found for this split; None in a scan.
        before: lines of the file before the split.
        most: how many invalid rows are listed.
        lines: how many lines begin in the split, known at the end.
        num_invalid: how many invalid rows there are.
        listed: the first of them: path, split and reason.
    """

    input_split: InputSplit
    opener: Opener
    scan_result: Any = None
    before: int = 0
    most: int = MAX_LISTED
    lines: int = 0
    num_invalid: int = 0
    listed: list[InvalidRow] = field(default_factory=list)

    def location(self, at: int | str) -> str:
        """Return file:place; a number is a line of the split, counted from 1."""
        return f"{self.input_split.name}:{at + self.before if isinstance(at, int) else at}"

    def bad(self, at: int | str, reason: str) -> None:
        """Record an invalid row."""
        self.num_invalid += 1
        if len(self.listed) < self.most:
            self.listed.append(invalid_row(self.location(at), self.input_split.split, reason))

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file.

        Raises ValueError for damaged compression, StorageError for a file that cannot be read.
        """
        try:
            with self.opener(self.input_split.entry) as handle:
                yield handle
        except storage.StorageError:
            raise
        except (*DAMAGED, OSError) as error:
            # gzip and zstd raise a plain OSError for some damage, and so does a full disk
            is_damage = re.search("compressed stream|ZSTD", str(error))
            if not isinstance(error, DAMAGED) and not is_damage:
                raise
            name = self.input_split.entry.name
            raise ValueError(f"{name}: damaged ({error}); download it again") from None

    def whole(self, most: int = MAX_FILE_BYTES) -> bytes | None:
        """Return all bytes, or None where there are more than `most`."""
        with self.open() as handle:
            data = handle.read(most + 1)
        return data if len(data) <= most else None

    def numbered(self, past_end: bool = False) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the lines that begin in the split: (number from 1, offset in the file, line).

        A line comes without its end, and is None where it is longer than ROW_BYTES.

        Args:
            past_end: go on after the split, until the caller stops.

        Raises:
            ValueError: a file in UTF-16, or whose lines end with a carriage return alone.
        """
        start, stop = self.input_split.start, self.input_split.stop
        with self.open() as handle:
            at = start
            if start:
                handle.seek(start - 1)
                at = start - 1 + _length(handle, 1 << 20)  # the rest of a line that begins before
            number = 0
            while stop < 0 or at < stop or past_end:
                begins, raw = at, handle.readline(ROW_BYTES + 1)
                if not raw:
                    return
                number += 1
                at += len(raw)
                self.lines += stop < 0 or begins < stop
                if begins == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise ValueError(
                        f"{self.input_split.name}: UTF-16; convert the file to UTF-8 (iconv -f "
                        "UTF-16 -t UTF-8)"
                    )
                if begins == 0 and not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r"):
                    raise ValueError(
                        f"{self.input_split.name}: its lines end with a carriage return alone; "
                        "convert the file (tr '\\r' '\\n')"
                    )
                if len(raw) > ROW_BYTES:
                    at += 0 if raw.endswith(b"\n") else _length(handle, 1 << 20)
                    yield number, begins, None
                    continue
                raw = raw.removeprefix(codecs.BOM_UTF8) if begins == 0 else raw
                yield number, begins, raw.rstrip(b"\r\n")


def _length(handle: BinaryIO, step: int) -> int:
    """Skip to the end of the line; return how many bytes that were."""
    count = 0
    while raw := handle.readline(step):
        count += len(raw)
        if raw.endswith(b"\n"):
            break
    return count


def decoded(raw: bytes | None, encoding: str = "utf-8") -> tuple[str, str]:
    """Return (text, "") for a line or document, or ("", why it is invalid)."""
    if raw is None:
        return "", f"longer than {ROW_BYTES >> 20} MiB"
    try:
        found = raw.decode(encoding)
    except UnicodeDecodeError as error:
        return "", f"not {encoding.upper()} text ({error.reason} at byte {error.start})"
    return found, "a NUL character in it" if "\0" in found else ""


def text_problem(text: str, what: str) -> str:
    """Return why a text from JSON is invalid, or "": it may hold what UTF-8 cannot."""
    if "\0" in text:
        return f"a NUL character in {what}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{what} is not UTF-8 text (at character {error.start})"
    return ""
