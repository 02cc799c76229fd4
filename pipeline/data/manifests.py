"""Which rows there are (files, row groups, schema and fingerprint, read from footers only), and
which split each row is in.

Everything that is read is Parquet: image folders, JSON Lines, CSV and plain text are converted to
Parquet once (`to_parquet`). A row id is the row's position in the sorted files of its manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import registry
from pipeline.config.registry import nearest
from pipeline.config.schema import Data, spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import file_columns, readable_columns
from pipeline.data import to_parquet
from pipeline.data.to_parquet import Origin
from pipeline.io import file_identity, storage
from pipeline.io.file_identity import FileIdentity


@dataclass(frozen=True)
class Group:
    """A row group of a Parquet file: where it is, its rows, and its uncompressed bytes."""

    file: int
    number: int
    rows: int
    size: int


@dataclass(frozen=True)
class Manifest:
    """Files and row groups in order. `fingerprint` changes when the content does."""

    files: tuple[str, ...]
    groups: tuple[Group, ...]
    schema: pa.Schema = field(compare=False)
    fingerprint: str
    identities: tuple[FileIdentity | None, ...] = field(default=(), compare=False)
    """Identities of `files` when the manifest was built; None for files that this project wrote
    itself.
    """
    origins: tuple[Origin | None, ...] = field(default=(), compare=False)
    """What the rows of each of `files` were brought in from; None for files of the user."""

    @cached_property
    def starts(self) -> np.ndarray:
        """(groups + 1,) row id of every group's first row."""
        return np.concatenate([[0], np.cumsum([g.rows for g in self.groups])]).astype(np.int64)

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @property
    def size(self) -> int:
        return sum(group.size for group in self.groups)

    def open(self, file: int) -> BinaryIO:
        """Open one of `files` by its index.

        Raises ChangedFileError when its content is not what it was when the manifest was built.
        """
        known = self.identities[file] if self.identities else None
        return (
            storage.open_read(self.files[file])
            if known is None
            else file_identity.open_unchanged(known)
        )

    def name(self, file: int = 0) -> str:
        """Return what one of `files` is called in messages."""
        origin = self.origins[file] if self.origins else None
        return storage.without_secrets(origin.name if origin else self.files[file])

    def location(self, row: int) -> str:
        """Return file and number of a row id, for messages; of a folder of images the row's own
        file.
        """
        file = self.groups[int(np.searchsorted(self.starts, row, side="right")) - 1].file
        origin = self.origins[file] if self.origins else None
        if origin and origin.column:
            named = Reader(self, [origin.column]).take(np.array([row])).column(0)[0]
            return storage.without_secrets(str(named))
        return f"{self.name(file)} row {row - self._file_start(file)}"

    def _file_start(self, file: int) -> int:
        return int(self.starts[next(i for i, g in enumerate(self.groups) if g.file == file)])


@dataclass(frozen=True)
class Selection:
    """Some rows of a manifest. `rows`: sorted row ids; None: all rows."""

    manifest: Manifest
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.rows if self.rows is None else len(self.rows)

    def ids(self, indices: np.ndarray) -> np.ndarray:
        return indices if self.rows is None else self.rows[indices]

    @property
    def boundaries(self) -> np.ndarray:
        """Index of the first row of every row group within the selection; empty groups are left
        out.
        """
        if self.rows is None:
            return self.manifest.starts
        return np.unique(np.searchsorted(self.rows, self.manifest.starts))

    def keep(self, mask: np.ndarray) -> Selection:
        ids = np.arange(self.manifest.rows) if self.rows is None else self.rows
        return Selection(self.manifest, ids[mask])


def build(uris: str | list[str], form: str, imports_uri: str) -> Manifest:
    """Build the manifest of files, folders and globs.

    Raises ValueError for no files, an unreadable file or different schemas.
    """
    return build_with_named(uris, form, imports_uri)[0]


def build_with_named(
    uris: str | list[str],
    form: str,
    imports_uri: str,
    mode: file_identity.Mode = "content",
    text_columns: Collection[str] = (),
    empty_texts: Collection[str] = (),
) -> tuple[Manifest, tuple[FileIdentity, ...]]:
    """Build a manifest, and return it with the images or recordings that its rows name.

    `mode`: how files are identified (`file_identity`). `text_columns` and
    `empty_texts`: see `to_parquet`.
    """
    found = to_parquet.to_parquet(
        [uris] if isinstance(uris, str) else uris,
        form,
        imports_uri,
        mode,
        text_columns,
        empty_texts,
    )
    files, fingerprint = found.files, found.fingerprint
    groups, schema, digest = [], None, hashlib.sha256()
    for number, file in enumerate(files):
        metadata = _footer(file)
        written = metadata.schema.to_arrow_schema().remove_metadata()
        here = pa.schema([field.with_type(_without_views(field.type)) for field in written])
        schema = schema or here
        if not here.equals(schema):
            raise ValueError(
                f"{file}: its schema differs from that of {files[0]}: {_difference(schema, here)}"
            )
        if fingerprint is None:
            content = found.own[number].content if found.own else file_identity.fingerprint(file)
            name = PurePosixPath(storage.without_query(file)).name
            digest.update(f"{name} {content}".encode())
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            if group.num_rows:
                groups.append(Group(number, i, group.num_rows, group.total_byte_size))
    assert schema is not None
    made = Manifest(
        tuple(files),
        tuple(groups),
        schema,
        fingerprint or digest.hexdigest()[:16],
        found.own,
        (found.origin,) * len(files),
    )
    return made, found.named


def _footer(file: str) -> pq.FileMetaData:
    try:
        with storage.open_read(file) as handle:
            return pq.read_metadata(handle)
    except storage.StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file}: not a readable Parquet file ({str(error).splitlines()[0]}); remove it or "
            "write it again"
        ) from None


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Return the type with plain texts and bytes for views, of which Arrow cannot take rows;
    reading casts to it.
    """
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind.fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_field.with_type(_without_views(kind.value_type))
        return pa.list_(inner) if pa.types.is_list(kind) else pa.large_list(inner)
    return kind


def _difference(a: pa.Schema, b: pa.Schema) -> str:
    for name in dict.fromkeys([*a.names, *b.names]):
        first, second = (s.field(name).type if name in s.names else "absent" for s in (a, b))
        if first != second:
            return f"column {name!r} is {first} there and {second} here"
    return "the order of the columns"


READER_BYTES = 256 << 20
GROUP_BYTES, MOST_PACKED = 512 << 20, 200
"""A row group that takes more than so many bytes in memory may take at most so many times what it
has in its file.
"""


class Reader:
    """Takes rows by id, caching the row groups last read (at most `cache_bytes`)."""

    def __init__(self, manifest: Manifest, columns: list[str], cache_bytes: int = READER_BYTES):
        self.manifest, self.columns, self.cache_bytes = manifest, columns, cache_bytes
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        self._held = 0

    def _group(self, g: int) -> pa.Table:
        if g in self._groups:
            self._groups.move_to_end(g)
            return self._groups[g]
        group = self.manifest.groups[g]

        def read():
            with self.manifest.open(group.file) as handle:
                file = pq.ParquetFile(handle)
                _check_group(
                    handle, file, group.number, self.columns, self.manifest.files[group.file]
                )
                return file.read_row_group(group.number, columns=self.columns)

        table = cast_to_schema(storage.retry(read), self.manifest.schema)
        self._groups[g], self._held = table, self._held + table.nbytes
        while self._held > self.cache_bytes and len(self._groups) > 1:
            _, old = self._groups.popitem(last=False)
            self._held -= old.nbytes
        return table

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return the table of the given row ids, in their order."""
        groups, first, which = np.unique(
            np.searchsorted(self.manifest.starts, rows, side="right") - 1,
            return_index=True,
            return_inverse=True,
        )
        # Groups in the order in which they come: rows that come group by group are copied once
        seen = np.argsort(first)
        order, parts = np.argsort(np.argsort(seen)[which], kind="stable"), []
        for g, inside in (
            zip(
                groups[seen],
                np.split(rows[order], np.cumsum(np.bincount(which)[seen])[:-1]),
                strict=True,
            )
            if len(rows)
            else ()
        ):
            inside = inside - self.manifest.starts[g]
            group = self._group(int(g))
            # a slice is not copied; of a small part a copy is better, since a slice keeps the whole
            # group in memory
            is_contiguous_part = len(inside) * 2 >= len(group) and (np.diff(inside) == 1).all()
            parts.append(
                group.slice(int(inside[0]), len(inside))
                if is_contiguous_part
                else arrow_lists.take(group, inside)
            )
        table = (
            pa.concat_tables(parts)
            if parts
            else self.manifest.schema.empty_table().select(self.columns)
        )
        return table if (np.diff(order) == 1).all() else arrow_lists.take(table, np.argsort(order))


def _check_group(
    handle: BinaryIO, file: pq.ParquetFile, number: int, columns: list[str] | None, name: str
) -> None:
    """Check a row group before it is read.

    Raises ValueError where repeated or compressed values would take more than `GROUP_BYTES` in
    memory: a few kilobytes can stand for gigabytes. Real bytes, however many, are read.
    """
    group, wanted = file.metadata.row_group(number), set(columns) if columns is not None else None
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [
        chunk
        for chunk in chunks
        if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
    ]
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > GROUP_BYTES and unpacked > MOST_PACKED * packed:
        raise ValueError(_too_large(name, number, unpacked, packed))
    coded = [
        chunk
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY"
        and any("DICTIONARY" in kind for kind in chunk.encodings)
    ]
    suspect = [
        chunk
        for chunk in coded
        if chunk.num_values * chunk.total_uncompressed_size > GROUP_BYTES
        and "." not in chunk.path_in_schema
    ]
    if suspect:
        with_codes = pq.ParquetFile(
            handle, read_dictionary=[chunk.path_in_schema for chunk in suspect]
        )
        expanded = 0
        for chunk in suspect:
            column = with_codes.read_row_group(number, columns=[chunk.path_in_schema]).column(0)
            expanded += sum(_expanded_bytes(part) for part in column.chunks)
        if expanded > GROUP_BYTES and expanded > MOST_PACKED * packed:
            raise ValueError(_too_large(name, number, expanded, packed))


def _expanded_bytes(part: pa.Array) -> int:
    """Return the bytes of a dictionary's values, written out for each row."""
    if not pa.types.is_dictionary(part.type):
        return part.nbytes
    sizes = pc.fill_null(pc.binary_length(part.dictionary), 0).to_numpy(zero_copy_only=False)
    indices = pc.drop_null(part.indices).to_numpy(zero_copy_only=False)
    return (
        int(
            np.bincount(indices, minlength=len(sizes))[: len(sizes)].astype(np.int64)
            @ sizes.astype(np.int64)
        )
        if len(sizes)
        else 0
    )


def _too_large(name: str, number: int, size: int, packed: int) -> str:
    return (
        f"{name}: row group {number} would take {size / (1 << 30):.1f} GiB in memory and "
        f"{packed} bytes of the file, more than {MOST_PACKED} times as "
        "much: this looks like a decompression bomb; if the rows are real, write smaller row groups"
    )


def cast_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table to the schema: files of joined corpora may hold text or whole numbers in
    another width.
    """
    wanted = pa.schema([schema.field(name).remove_metadata() for name in table.column_names])
    return table if table.schema.equals(wanted) else table.cast(wanted)


def read_columns(selection: Selection, columns: list[str]) -> pa.Table:
    """Read whole columns of a selection (labels, splits, groups); dictionaries are decoded."""
    if not columns:
        return pa.table({})
    parts = []
    filled = {g.file for g in selection.manifest.groups}
    for number in range(len(selection.manifest.files)):
        if number in filled:
            with selection.manifest.open(number) as handle:
                file = pq.ParquetFile(handle)
                for group in range(file.num_row_groups):
                    _check_group(handle, file, group, columns, selection.manifest.files[number])
                parts.append(
                    cast_to_schema(
                        pq.read_table(handle, columns=columns), selection.manifest.schema
                    )
                )
    table = _plain_columns(
        pa.concat_tables(parts)
        if parts
        else selection.manifest.schema.empty_table().select(columns)
    )
    return table if selection.rows is None else table.take(pa.array(selection.rows))


def _plain_columns(table: pa.Table) -> pa.Table:
    return table.cast(
        pa.schema(
            [
                field.with_type(field.type.value_type)
                if pa.types.is_dictionary(field.type)
                else field
                for field in table.schema
            ]
        )
    )


class LeftOut(NamedTuple):
    """A row that is not used, although it is in a split or would have been in one."""

    split: str
    row: int
    place: str
    """File and number of the row."""
    reason: str


@dataclass(frozen=True)
class Splits:
    """The selections of a data spec, and a description of where the splits come from."""

    train: Selection
    validation: Selection
    test: Selection
    origin: str
    corpora: tuple[int, ...] = ()
    """Training rows of each corpus, in the order of the job file and of `train`."""
    trains: tuple[Selection, ...] = ()
    """The training rows of each corpus, with all of its columns; a joined `train` has only those
    that are read.
    """
    reads: tuple[FileIdentity, ...] = ()
    """All files that are read in training: Parquet files, and those that their rows name."""
    left_out: tuple[LeftOut, ...] = ()
    unused: str = ""
    """How many rows the split column puts into no split, and its values; "": none."""
    drawn_by: tuple[str, ...] = ()
    """The column, other than the group, that the drawn splits of each corpus keep together; "":
    none.
    """
    empty_draws: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why splits have no row although they are drawn, by split."""

    @property
    def fingerprint(self) -> str:
        # left out where it is empty: fingerprints of earlier versions do not have it
        return spec_hash(
            [s.manifest.fingerprint for s in (self.train, self.validation, self.test)],
            [len(s) for s in (self.train, self.validation, self.test)],
            *([self.drawn_by] if any(self.drawn_by) else []),
        )

    def by_name(self) -> dict[str, Selection]:
        return {name: getattr(self, name) for name in SPLITS}

    def sizes(self) -> str:
        return (
            f"train {len(self.train)}, validation {len(self.validation)}, test {len(self.test)} "
            f"rows ({self.origin}){'; ' if self.unused else ''}{self.unused}"
        )


def codes_of(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return (n,) codes of groups or labels, -1 for null and NaN, and the values."""
    return arrow_lists.dictionary_codes(arrow_lists.nan_as_null(values))


def group_numbers(values: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) int64: one number for all rows of a group; rows without one (null) each get
    their own.
    """
    codes, dictionary = codes_of(values)
    found = codes.astype(np.int64)
    alone = found < 0
    found[alone] = len(dictionary) + np.arange(alone.sum())
    return found


def _share(values: pa.ChunkedArray | None, ids: np.ndarray, salt: str) -> np.ndarray:
    """Return (n,) numbers in [0, 1), equal for equal groups; each row without a group gets its
    own.
    """
    from pipeline.core.rng import mix, row_keys

    keys = row_keys(mix(*salt.encode()), np.zeros(1, dtype=np.int64), ids)
    own = (keys.view(np.uint64) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    if values is None:
        return own
    codes, dictionary = codes_of(values)
    texts = [
        str(value) if isinstance(value, bool) else value_text(value)
        for value in dictionary.to_pylist()
    ]
    digests = [hashlib.sha256(f"{salt}{text}".encode()).hexdigest()[:13] for text in texts]
    per_value = np.array([int(digest, 16) / float(16**13) for digest in digests] + [np.nan])
    shares = per_value[codes]
    return np.where(np.isnan(shares), own, shares)


def _check_columns(manifest: Manifest, data: Data, roles: tuple[str, ...], at: str) -> None:
    problems = [
        f"{at}.columns: role {role!r} has no column; say {{{role}: NAME}}; columns are "
        f"{', '.join(manifest.schema.names)}"
        for role in roles
        if role not in data.columns
    ]
    wanted = [
        *((f"columns.{role}", name) for role, name in data.columns.items()),
        *(("where", name) for name in data.where),
    ]
    wanted += [(k, v) for k, v in (("split_column", data.split_column), ("group", data.group)) if v]
    problems += [
        f"{at}.{k}: {manifest.name()} has no column {v!r}; {nearest(v, manifest.schema.names)}"
        for k, v in wanted
        if v not in manifest.schema.names
    ]
    if problems:
        raise ValueError("\n".join(problems))


def value_text(value: Any) -> str:
    """Return one text for a value that two tables, or a table and a job file, store as different
    types.

    12, 12.0 and "12" are the same, so are True and "true", and bytes and their text.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    is_number = isinstance(value, (float, Decimal)) and math.isfinite(value)
    if is_number and value == int(value):
        return str(int(value))
    return str(value)


SHOWN_LETTERS = 120
"""Characters of a file's name that an error shows."""
MOST_VALUES, SHOWN_VALUES = 50, 10
"""A column with more distinct values than the first identifies persons or rows rather than kinds
of rows; of others so many values are shown in an error.
"""


def _where(selection: Selection, data: Data, at: str) -> Selection:
    """Return the rows that `where` keeps. Raises ValueError if there are none, with the values
    that exist.
    """
    where = data.where
    if not where or not len(selection):
        return selection
    table = read_columns(selection, list(where))
    mask = np.ones(len(table), dtype=bool)
    problems = []
    for name, values in where.items():
        kept = {value_text(value) for value in values}
        codes, held_values = arrow_lists.dictionary_codes(table[name])
        # The last one is for nulls
        named = np.array([*(value_text(one) in kept for one in held_values.to_pylist()), False])
        here = named[codes]
        mask &= here
        if not here.any():
            # what was asked for stands in the job file; it may come from the environment and be
            # secret
            asked = "the value" if len(values) == 1 else f"any of the {len(values)} values"
            held = _describe_values(codes, held_values.to_pylist(), name, selection, data)
            problems.append(
                f"{at}.where: no row of {selection.manifest.name()} has {asked} asked for in "
                f"column {name}; {held}"
            )
    if problems:
        raise ValueError("\n".join(problems))
    if not mask.any():
        raise ValueError(
            f"{at}.where: each of its conditions ({', '.join(where)}) holds for some rows of "
            f"{selection.manifest.name()}, and all together for none; leave one out"
        )
    return selection.keep(mask)


def _describe_values(
    codes: np.ndarray, values: list[Any], name: str, selection: Selection, data: Data
) -> str:
    """Describe a column's commonest values, or only how many there are if they may identify
    people.

    Values are shown where there are few, each in several rows and, in grouped data, in rows of
    several groups.

    Args:
        codes: (n,) index in `values` of each row's value, -1 for null.
    """
    is_there = codes >= 0
    counts = np.bincount(codes[is_there], minlength=len(values))
    nulls = f", {(~is_there).sum()} nulls" if not is_there.all() else ""
    in_words = f"it holds {len(counts)} distinct values in {is_there.sum()} rows{nulls}"
    if name == data.group or not 0 < len(counts) <= MOST_VALUES or counts.min() < 2:
        return in_words
    if data.group:
        groups = group_numbers(read_columns(selection, [data.group])[data.group])
        pairs = np.unique(np.stack([codes[is_there], groups[is_there]]), axis=1)
        groups_of_each = np.bincount(pairs[0], minlength=len(counts))
        if groups_of_each.min() < 2:
            return in_words
    order = np.argsort(-counts, kind="stable")[:SHOWN_VALUES]
    shown = ", ".join(f"{value_text(values[i])} ({counts[i]} rows)" for i in order)
    more = f" and {len(counts) - len(order)} more" if len(counts) > len(order) else ""
    return f"it holds {shown}{more}{nulls}"


SPLITS = ("train", "validation", "test")


class Fold(NamedTuple):
    """One of several parts of the rows, which is the test split."""

    number: int
    """From 1."""
    of: int
    by_class: bool = True
    """Whether the role ``label`` has classes, of which each fold gets an equal share; else it has
    numbers.
    """


def splits(
    data: Data,
    roles: tuple[str, ...],
    job_field: str,
    imports_uri: str,
    need_test: bool,
    fold: Fold | None = None,
    needed: tuple[str, ...] = (),
) -> Splits:
    """Return train, validation and test rows of a data spec; those of further corpora (`more`)
    come after those of the first.

    Args:
        fold: The part of the rows that is the test split (`fold_of_rows`); the data then have one
            corpus and no declared split.
        needed: Roles of which a null makes a row unusable. Within the budget of bad rows
            (``max_bad_rows``) such rows are in no split.

    Raises ValueError for a missing column, an empty split, a split value that the column does not
    have, a group in two splits, corpora that cannot be joined, or rows that cannot be cut in folds.
    """
    at = f"{job_field}.data"
    parts = [_splits(data, roles, at, imports_uri, fold, needed)]
    for i, part in enumerate(data.more):
        parts.append(
            _splits(
                part.model_copy(update={"columns": data.columns}),
                roles,
                f"{at}.more.{i}",
                imports_uri,
                needed=needed,
            )
        )
    groups = [one.group for one in (data, *data.more)]
    for i, group in enumerate(groups[1:]):
        if group != groups[0] and (need_test or groups[0]):
            raise ValueError(
                f"{at}.more.{i}.group: it is {group or 'not given'}, that of the first rows "
                f"{groups[0] or 'is not given'}; joined corpora are grouped by one column, say the "
                "same of each"
            )
    out = (
        parts[0]
        if len(parts) == 1
        else _joined(
            parts,
            [*data.columns.values(), *([data.group] if data.group else [])],
            at,
            frozenset(data.columns.get(role, "") for role in ("text", "text_pair"))
            if data.modality.name == "text"
            else frozenset(),
        )
    )
    for name, is_read in (("train", True), ("validation", need_test), ("test", need_test)):
        if is_read and not len(getattr(out, name)):
            reason = out.empty_draws.get(name)
            why = f"{out.sizes()}; {reason}" if reason else out.sizes()
            remedy = "another split_seed" if reason else f"{name}_fraction"
            raise ValueError(
                f"{at}: the {name} split is empty ({why}); give {name} files, a "
                f"split_column or {remedy}"
            )
    for i, (weight, rows) in enumerate(zip(data.weights, out.corpora, strict=True)):
        if weight is not None and not rows:
            raise ValueError(
                f"{at}{f'.more.{i - 1}' if i else ''}: this corpus has weight {weight:g} and no "
                "training row to draw; leave it out, or look at its splits and where "
                f"({parts[i].sizes()})"
            )
    for group in dict.fromkeys(filter(None, groups)):
        _check_no_group_in_two_splits(
            [part for part, own in zip(parts, groups, strict=True) if own == group], group, at
        )
    return out


WHOLE_SHARE = 1 << 25
"""All rows of a class, as a whole number; products of two shares of some thousand classes can be
added without overflow.
"""


def fold_of_rows(
    classes: np.ndarray, groups: np.ndarray | None, order: np.ndarray, count: int
) -> np.ndarray:
    """Return (n,) the fold of each row, from 0. No group is in two folds.

    Without groups the rows of each class are dealt out in turn, so that their numbers in two folds
    differ by one at most, and so do those of all rows. With groups the largest come first, and each
    goes to the fold that has the least of its classes, as shares of all rows of a class (the least
    squares of these shares; of one class it is the fold with the fewest rows).

    Args:
        classes: (n,) class number of each row, from 0.
        groups: (n,) group number of each row, from 0, or None.
        order: (n,) random numbers, equal for the rows of a group.
        count: Number of folds.
    """
    folds = np.zeros(len(classes), dtype=np.int64)
    if groups is None:
        folds[np.lexsort((order, classes))] = np.arange(len(classes)) % count
        return folds
    _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    rows = np.zeros((len(first), int(classes.max()) + 1), dtype=np.int64)
    np.add.at(rows, (unit, classes), 1)
    # sums of whole numbers: rounded ones would break ties otherwise on another machine
    shares = rows * WHOLE_SHARE // np.maximum(rows.sum(axis=0), 1)
    held_shares = np.zeros((count, rows.shape[1]), dtype=np.int64)
    held_rows = np.zeros(count, dtype=np.int64)
    fold_of_unit = np.zeros(len(first), dtype=np.int64)
    for one in np.lexsort((order[first], -rows.sum(axis=1))):
        fold = np.lexsort((held_rows, held_shares @ shares[one]))[0]
        fold_of_unit[one] = fold
        held_shares[fold] += shares[one]
        held_rows[fold] += rows[one].sum()
    return fold_of_unit[unit]


SEGMENT_ROLES = ("start", "seconds")
"""Roles of a row that is a piece of a longer recording."""


def recording_column(modality: Any, columns: Mapping[str, str], manifest: Manifest) -> str | None:
    """Return the column that tells of which recording each row is, or a piece of it.

    It is ``recording``, as a folder of recordings has it, else the column of paths. None where rows
    are no recordings, or hold them.
    """
    if not set(SEGMENT_ROLES) & set(modality.optional_roles):
        return None
    name = columns.get("recording", "recording")
    if name in manifest.schema.names:
        return name
    first = columns.get(modality.roles[0])
    has_paths = first is not None and arrow_lists.is_text(manifest.schema.field(first).type)
    return first if has_paths else None


def _split_unit(data: Data, manifest: Manifest) -> str | None:
    """Return the column whose values a drawn split keeps together: the group, else that of the
    role ``image_id`` (captions of one image), else the recording where rows are pieces of some.
    None for rows that each stand for themselves.
    """
    if column := data.group or data.columns.get("image_id"):
        return column
    kind = registry.get("modality", data.modality.name)
    name = recording_column(kind, data.columns, manifest)
    if name is None:
        return None
    recordings = pc.drop_null(read_columns(Selection(manifest), [name])[name])
    return name if pc.count_distinct(recordings).as_py() < len(recordings) else None


def _is_in_fold(
    selection: Selection,
    data: Data,
    roles: tuple[str, ...],
    at: str,
    fold: Fold,
    together: str | None,
) -> np.ndarray:
    """Return (n,) bool: whether a row is in a fold. Folds have equal shares of each class, where
    the role ``label`` has classes. Rows with one value of the column `together` are in one fold.

    Raises ValueError where there are too few groups, or rows of a class, for so many folds.
    """
    label = data.columns["label"] if fold.by_class and "label" in roles else None
    table = read_columns(selection, [name for name in (label, together) if name])
    group = table[together] if together else None
    groups = None if group is None else group_numbers(group)
    ids = np.arange(len(selection)) if selection.rows is None else selection.rows
    unit, units = ("rows", ids)
    if groups is not None:
        unit, units = "groups" if data.group else f"values of {together}", groups
    have = len(np.unique(units))
    classes = np.zeros(len(selection), dtype=np.int64)
    problem = f"there are {have} {unit}" if have < fold.of else ""
    if label is not None and not problem:
        codes, values = codes_of(table[label])
        # rows without a label come last; whether they may be there is not decided here
        classes = np.where(codes < 0, len(values), codes)
        pairs = np.unique(np.stack([classes, units]), axis=1)[0]
        least = np.bincount(pairs, minlength=len(values))[: len(values)]
        if len(least) and least.min() < fold.of:
            value = value_text(values[int(least.argmin())].as_py())
            problem = f"class {value} of {label} is in {least.min()} {unit}"
    if problem:
        raise ValueError(
            f"{at.removesuffix('.data')}.folds: {fold.of} folds need as many {unit}"
            f"{' of each class' if label else ''}, and {problem}: ask for fewer folds"
        )
    order = _share(group, ids, f"fold {data.split_seed}")
    return fold_of_rows(classes, groups, order, fold.of) == fold.number - 1


def _splits(
    data: Data,
    roles: tuple[str, ...],
    at: str,
    imports_uri: str,
    fold: Fold | None = None,
    needed: tuple[str, ...] = (),
) -> Splits:
    """Return the splits of one corpus."""
    named: dict[tuple[str, ...], tuple[FileIdentity, ...]] = {}
    kind = registry.get("modality", data.modality.name)
    empty_texts = {*readable_columns(kind, data.columns), *_columns_asked_for_empty(data)}

    def built(uris: str | list[str], text_columns: Collection[str] = ()) -> Manifest:
        manifest, listed = build_with_named(
            uris, data.format, imports_uri, data.identity, text_columns, empty_texts
        )
        named[manifest.files] = listed
        return manifest

    first = built(data.uri if data.uri is not None else data.train or [])
    _check_columns(first, data, roles, at)
    train = _where(Selection(first), data, at)
    given: dict[str, Selection] = {}
    origin = []
    unused = ""
    if data.split_column:
        declared = read_columns(train, [data.split_column])[data.split_column]
        column = pc.cast(declared, pa.string())
        whole = train
        for name in SPLITS:
            mask = pc.is_in(column, value_set=pa.array(data.values_of(name), pa.string())).to_numpy(
                zero_copy_only=False
            )
            if mask.any():
                given[name] = whole.keep(mask)
        train = given.get("train", whole.keep(np.zeros(len(whole), dtype=bool)))
        num_unused = len(whole) - sum(map(len, given.values()))
        held = ""
        if num_unused or not len(train):
            codes, values = arrow_lists.dictionary_codes(declared)
            held = _describe_values(codes, values.to_pylist(), data.split_column, whole, data)
        if num_unused:
            rows = "row is" if num_unused == 1 else "rows are"
            unused = f"{num_unused} {rows} in no split by {data.split_column}: {held}"
        if not len(train):
            # values that the job file states may come from the environment and be secret
            stated = data.values_of("train")
            asked = stated if stated in ([], ["train"]) else "one that split_values.train states"
            raise ValueError(
                f"{at}.split_column: no row of {data.split_column} is {asked}; {held}; set "
                "split_values"
            )
        origin.append(f"column {data.split_column}")
    for name in ("validation", "test"):
        files = getattr(data, name)
        if files is not None:
            # 07 makes a column of the training rows texts: then 10 in a small test file is one too
            texts = [field.name for field in first.schema if pa.types.is_string(field.type)]
            manifest = built(files, texts)
            _check_columns(manifest, data, roles, at)
            given[name] = _where(Selection(manifest), data, at)
            origin.append(f"{name} files")
    seed = f" (split_seed {data.split_seed})" if data.split_seed else ""
    fractions = {"test": data.test_fraction, "validation": data.validation_fraction}
    draws = any(fraction > 0 and name not in given for name, fraction in fractions.items())
    together = _split_unit(data, first) if fold is not None or draws else None
    if fold is not None:
        tested = _is_in_fold(train, data, roles, at, fold, together)
        given["test"], train = train.keep(tested), train.keep(~tested)
        share = "as equal as its groups allow" if together else "equal"
        is_stratified = fold.by_class and "label" in roles
        alike = f", with shares of each class {share}" if is_stratified else ""
        origin.append(
            f"test: each of {fold.of} folds by hash of {together or 'the row'}{alike}{seed}"
        )
    drawn_by = together if together and not data.group else ""
    empty_draws: dict[str, str] = {}
    for name, fraction in fractions.items():
        if name not in given and fraction > 0:
            group = read_columns(train, [together])[together] if together else None
            ids = np.arange(len(train)) if train.rows is None else train.rows
            salt = f"{name} {data.split_seed}" if data.split_seed else name
            salt += f" fold {fold.number}" if fold else ""
            held = _share(group, ids, salt) < fraction
            if group is not None and len(train) and (held.all() or not held.any()):
                count = pc.count_distinct(pc.drop_null(group)).as_py()
                values = "value" if count == 1 else "values"
                empty_draws["train" if held.all() else name] = (
                    f"the rows have {count} {values} of {together}, and rows of one value stay in "
                    "one split"
                )
            given[name], train = train.keep(held), train.keep(~held)
            origin.append(
                f"{name}: random {fraction:g} of train by hash of {together or 'the row'}{seed}"
            )
    if data.group:
        origin.append(f"no {data.group} in two splits")
    empty = Selection(first, np.zeros(0, dtype=np.int64))
    parts = [train, given.get("validation", empty), given.get("test", empty)]
    reads = [
        file
        for part in parts
        for file in (*part.manifest.identities, *named[part.manifest.files])
        if file is not None
    ]
    columns = file_columns(kind, data.columns)
    looked = [number for number, part in enumerate(parts) if not named[part.manifest.files]]
    found, more = with_named_files([parts[number] for number in looked], columns, data.identity)
    for number, selection in zip(looked, found, strict=True):
        parts[number] = selection
    left_out: list[LeftOut] = []
    for number, split in enumerate(SPLITS):
        parts[number], without = _labelled(parts[number], split, data, needed)
        left_out += without
    if left_out:
        rows = "row" if len(left_out) == 1 else "rows"
        origin.append(f"{len(left_out)} {rows} without a label left out")
    return Splits(
        parts[0],
        parts[1],
        parts[2],
        "; ".join(origin) or "as given",
        (len(parts[0]),),
        (parts[0],),
        tuple(dict.fromkeys((*reads, *more))),
        tuple(left_out),
        unused,
        (drawn_by,),
        empty_draws,
    )


def _columns_asked_for_empty(data: Data) -> list[str]:
    """Return the columns of which the job file asks for rows with an empty text."""
    columns = [name for name, values in data.where.items() if "" in values]
    is_split = any("" in values for values in data.split_values.values())
    return [*columns, data.split_column] if data.split_column and is_split else columns


def _labelled(
    selection: Selection, split: str, data: Data, needed: tuple[str, ...]
) -> tuple[Selection, list[LeftOut]]:
    """Return the rows that have a label, and the others, as long as these are within the budget of
    bad rows. Else all rows are returned: the objective then says what is wrong.
    """
    names = [data.columns[role] for role in needed if role in data.columns]
    if not names or not len(selection):
        return selection, []
    table = read_columns(selection, names)
    nulls = {name: table[name].is_null(nan_is_null=True).to_numpy() for name in names}
    lacks = np.logical_or.reduce(list(nulls.values()))
    if not 0 < lacks.sum() <= max(1, data.max_bad_rows * len(selection)):
        return selection, []
    column = next(name for name in names if nulls[name].any())
    ids = selection.ids(np.flatnonzero(lacks)).tolist()
    place = selection.manifest.location
    reason = f"it has no label (column {column} is null or NaN)"
    return selection.keep(~lacks), [LeftOut(split, row, place(row), reason) for row in ids]


def with_named_files(
    selections: list[Selection], columns: tuple[str, ...], mode: file_identity.Mode
) -> tuple[list[Selection], list[FileIdentity]]:
    """Add the content of the files that rows name to the fingerprints of their manifests; also
    return those files.

    A file is named by a text, or by the path of a struct that has no bytes (as in a Hugging Face
    data set), in one of `columns`. A missing file counts as absent; the error comes where its row
    is read. Raises StorageError, with the row, for what names no file.
    """
    names = [_named_files(selection, columns) for selection in selections]
    every_name = sorted(set().union(*names))
    try:
        known = {
            file.uri: file for file in file_identity.identify(every_name, mode, absent_ok=True)
        }
    except storage.StorageError as error:
        raise _with_row(error, every_name, selections, columns) from error
    contents: dict[tuple[str, ...], list[str]] = {}
    for selection, inside in zip(selections, names, strict=True):
        contents.setdefault(selection.manifest.files, []).extend(
            known[name].content for name in inside
        )
    made: dict[int, Manifest] = {}
    for selection in selections:
        manifest = selection.manifest
        inside = contents[manifest.files]
        made[id(manifest)] = (
            replace(manifest, fingerprint=spec_hash(manifest.fingerprint, inside))
            if inside
            else manifest
        )
    return [
        Selection(made[id(selection.manifest)], selection.rows) for selection in selections
    ], list(known.values())


def _with_row(
    error: storage.StorageError,
    names: list[str],
    selections: list[Selection],
    columns: tuple[str, ...],
) -> storage.StorageError:
    """Return the error on a file that rows name, with the first such row; a long name is cut."""
    message = str(error)
    name = max((name for name in names if name in message), key=len, default="")
    locations = (
        _location_of_name(selection, column, name) for selection in selections for column in columns
    )
    location = next((location for location in locations if location), "") if name else ""
    if not location:
        return error
    short = (
        name if len(name) <= SHOWN_LETTERS else f"{name[:SHOWN_LETTERS]}... ({len(name)} letters)"
    )
    return type(error)(f"{location}: {message.replace(name, short)}")


def _location_of_name(selection: Selection, column: str, name: str) -> str:
    """Return file, row and column where a file is first named, or ""."""
    if not len(selection) or not _can_name_files(selection.manifest.schema.field(column).type):
        return ""
    for index, value in enumerate(read_columns(selection, [column])[column].to_pylist()):
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
        if path == name:
            row = int(selection.ids(np.array([index]))[0])
            return f"{selection.manifest.location(row)}, column {column!r}"
    return ""


def _can_name_files(kind: pa.DataType) -> bool:
    """Whether values are texts, or structs whose field `path` is a text."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not pa.types.is_struct(values):
        return arrow_lists.is_text(values)
    index = values.get_field_index("path")
    return index >= 0 and arrow_lists.is_text(values.field(index).type)


def _named_files(selection: Selection, columns: tuple[str, ...]) -> list[str]:
    """Return the files that some rows name, each once, in the order of the rows."""
    found: dict[str, None] = {}
    for name in columns:
        kind = selection.manifest.schema.field(name).type
        if len(selection) and _can_name_files(kind):
            found |= dict.fromkeys(
                _texts_of(selection, name)
                if arrow_lists.is_text(kind)
                else _paths_of(selection, name)
            )
    return list(found)


def _texts_of(selection: Selection, name: str) -> list[str]:
    return [
        value for value in pc.unique(read_columns(selection, [name])[name]).to_pylist() if value
    ]


def _paths_of(selection: Selection, name: str) -> list[str]:
    """Return the paths of structs without bytes.

    Reads a row group at a time: the bytes may take gigabytes.
    """
    ids, out = selection.ids(np.arange(len(selection))), []
    reader = Reader(selection.manifest, [name])
    for start, stop in pairwise(selection.boundaries.tolist()):
        cells = reader.take(ids[start:stop])[name].combine_chunks()
        paths = pc.struct_field(cells, "path").to_pylist()
        has_bytes = np.zeros(len(paths), dtype=bool)
        if cells.type.get_field_index("bytes") >= 0:
            has_bytes = cells_with_bytes(pc.struct_field(cells, "bytes"))
        out += [path for path, inside in zip(paths, has_bytes, strict=True) if path and not inside]
    return out


def cells_with_bytes(values: pa.Array) -> np.ndarray:
    """Return (n,) bool: values that are bytes, at least one; null is none."""
    if pa.types.is_null(values.type):
        return np.zeros(len(values), dtype=bool)
    sizes = pc.fill_null(pc.binary_length(values), 0)
    return sizes.to_numpy(zero_copy_only=False) > 0


def _joined(parts: list[Splits], columns: list[str], at: str, texts: frozenset[str]) -> Splits:
    """Join each split of several corpora to one selection, in the order of the job file."""
    chosen = {
        name: [(i, found) for i, part in enumerate(parts) if len(found := getattr(part, name))]
        or [(0, getattr(parts[0], name))]
        for name in SPLITS
    }
    whole = {
        name: _concatenated(
            [selection for _, selection in found],
            columns,
            [at if i == 0 else f"{at}.more.{i - 1}" for i, _ in found],
            texts,
        )
        for name, found in chosen.items()
    }
    origin = "; ".join(f"corpus {i + 1}: {part.origin}" for i, part in enumerate(parts))
    if len({part.origin for part in parts}) == 1:
        origin = f"each of {len(parts)} corpora: {parts[0].origin}"
    reads = tuple(dict.fromkeys(file for part in parts for file in part.reads))
    return Splits(
        whole["train"],
        whole["validation"],
        whole["test"],
        origin,
        tuple(len(part.train) for part in parts),
        tuple(part.train for part in parts),
        reads,
        tuple(row for part in parts for row in part.left_out),
        "; ".join(dict.fromkeys(part.unused for part in parts if part.unused)),
        tuple(column for part in parts for column in part.drawn_by),
        {name: reason for part in parts for name, reason in part.empty_draws.items()},
    )


def _concatenated(
    selections: list[Selection],
    columns: list[str],
    job_fields: list[str],
    texts: frozenset[str] = frozenset(),
) -> Selection:
    """Concatenate the row ids, files and row groups of several manifests.

    `columns` get the types of the first one; `texts` (columns of texts, as text or as bytes that
    may not be UTF-8) become bytes where the corpora differ. Raises ValueError for a column of
    another kind in a later one (another width is no other kind).
    """
    first = selections[0].manifest
    as_bytes = {
        name
        for name in texts & {*columns}
        if {_kind(selection.manifest.schema.field(name).type) for selection in selections}
        == {"text", "bytes"}
    }
    for selection, job_field in zip(selections, job_fields, strict=True):
        for name in dict.fromkeys(columns):
            theirs, ours = selection.manifest.schema.field(name).type, first.schema.field(name).type
            if _kind(theirs) != _kind(ours) and name not in as_bytes:
                raise ValueError(
                    f"{job_field}: column {name!r} is {theirs} in "
                    f"{selection.manifest.name()} and {ours} in {first.name()}; joined corpora "
                    "need columns of the same type: write one of them anew"
                )
    if len(selections) == 1:
        return selections[0]
    manifests = [selection.manifest for selection in selections]
    files = np.cumsum([0, *(len(manifest.files) for manifest in manifests)])
    rows = np.cumsum([0, *(manifest.rows for manifest in manifests)])
    schema = _plain_columns(first.schema.empty_table().select(list(dict.fromkeys(columns)))).schema
    schema = pa.schema(
        [field.with_type(pa.binary()) if field.name in as_bytes else field for field in schema]
    )
    joined = Manifest(
        tuple(file for manifest in manifests for file in manifest.files),
        tuple(
            replace(group, file=int(group.file + files[i]))
            for i, manifest in enumerate(manifests)
            for group in manifest.groups
        ),
        schema,
        spec_hash([manifest.fingerprint for manifest in manifests]),
        tuple(
            one
            for manifest in manifests
            for one in (manifest.identities or (None,) * len(manifest.files))
        ),
        tuple(
            one
            for manifest in manifests
            for one in (manifest.origins or (None,) * len(manifest.files))
        ),
    )
    ids = [
        selection.ids(np.arange(len(selection))) + rows[i] for i, selection in enumerate(selections)
    ]
    return Selection(
        joined,
        None if all(selection.rows is None for selection in selections) else np.concatenate(ids),
    )


def _kind(of: pa.DataType) -> str:
    """Return one word for types whose values can be cast to each other without loss of meaning."""
    if pa.types.is_dictionary(of):
        return _kind(of.value_type)
    if pa.types.is_list(of) or pa.types.is_large_list(of):
        return f"list of {_kind(of.value_type)}"
    named = {
        "text": (pa.types.is_string, pa.types.is_large_string),
        "bytes": (pa.types.is_binary, pa.types.is_large_binary),
        "whole number": (pa.types.is_integer,),
        "number": (pa.types.is_floating,),
    }
    return next((word for word, tests in named.items() if any(test(of) for test in tests)), str(of))


def _check_no_group_in_two_splits(parts: list[Splits], group: str, at: str) -> None:
    """Raise ValueError where a value of the group (a patient) is in two splits, also of two
    corpora that are grouped by one column.

    Null is no group. The error counts values and names one row of each split by its position: it
    never holds a value, which may identify a patient.
    """
    # Value of the group to the split where it was first found, and the row
    first_seen: dict[str, tuple[str, str]] = {}
    crossing: dict[str, tuple[str, str, str, str]] = {}
    for name in SPLITS:
        for selection in (getattr(part, name) for part in parts):
            for value, row in _first_rows(selection, group) if len(selection) else ():
                split, location = first_seen.setdefault(
                    value, (name, selection.manifest.location(row))
                )
                if split != name:
                    crossing.setdefault(
                        value, (split, location, name, selection.manifest.location(row))
                    )
    if crossing:
        split, location, other, other_location = next(iter(crossing.values()))
        many = len(crossing)
        raise ValueError(
            f"{at}.group: {many} of {len(first_seen)} values of {group} "
            f"{'stands' if many == 1 else 'stand'} in more than one split: the value of "
            f"{location} is in {split}, and {other_location}, which is in {other}, has the same; a "
            f"group must not cross splits: take a split_column that keeps each {group} whole, or "
            f"leave the splits out to have them made by hash of {group}"
        )


def _first_rows(selection: Selection, column: str) -> list[tuple[str, int]]:
    """Return every non-null value of a column, as text, with the id of its first row."""
    coded, dictionary = codes_of(read_columns(selection, [column])[column])
    codes, first = np.unique(coded, return_index=True)
    values = dictionary.to_pylist()
    rows = selection.ids(first)
    return [
        (value_text(values[code]), int(row))
        for code, row in zip(codes, rows, strict=True)
        if code >= 0
    ]
