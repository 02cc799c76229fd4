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
from pipeline.config.schema import Data, changed_fields, spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import columns_of, file_columns, readable_columns
from pipeline.data import to_parquet
from pipeline.data.to_parquet import ImportedFiles, Origin
from pipeline.io import checksums, file_identity, storage
from pipeline.io.file_identity import FileIdentity
from pipeline.io.threads import threaded_map


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: where it is, its rows, and its uncompressed bytes."""

    file: int
    index_in_file: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Files and row groups in order. `fingerprint` changes when the content does."""

    files: tuple[str, ...]
    row_groups: tuple[RowGroup, ...]
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
        """(row groups + 1,) row id of every row group's first row; last the number of rows."""
        num_rows = [group.num_rows for group in self.row_groups]
        return np.concatenate([[0], np.cumsum(num_rows)]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        """Uncompressed bytes of all row groups."""
        return sum(group.num_bytes for group in self.row_groups)

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
        """Return file and number of a row id, for messages; of a folder of images, recordings or
        texts the row's own file.
        """
        file = self.row_groups[int(np.searchsorted(self.starts, row, side="right")) - 1].file
        origin = self.origins[file] if self.origins else None
        if origin and origin.column:
            table = Reader(self, [origin.column]).take(np.array([row]))
            return storage.without_secrets(str(table.column(0)[0]))
        return f"{self.name(file)} row {row - self._file_start(file)}"

    def _file_start(self, file: int) -> int:
        files = [group.file for group in self.row_groups]
        return int(self.starts[files.index(file)])


@dataclass(frozen=True)
class Selection:
    """Some rows of a manifest. `row_ids`: sorted row ids; None: all rows."""

    manifest: Manifest
    row_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.num_rows if self.row_ids is None else len(self.row_ids)

    def ids(self, indices: np.ndarray) -> np.ndarray:
        """Return the row ids at some indices of the selection."""
        return indices if self.row_ids is None else self.row_ids[indices]

    @property
    def all_ids(self) -> np.ndarray:
        """(n,) row ids, sorted."""
        return np.arange(len(self)) if self.row_ids is None else self.row_ids

    @property
    def row_group_starts(self) -> np.ndarray:
        """Index of the first row of every row group within the selection; empty groups are left
        out.
        """
        if self.row_ids is None:
            return self.manifest.starts
        return np.unique(np.searchsorted(self.row_ids, self.manifest.starts))

    def keep(self, mask: np.ndarray) -> Selection:
        """Return the rows where (n,) ``mask`` is true."""
        return Selection(self.manifest, self.all_ids[mask])


def build(uris: str | list[str], form: str, imports_uri: str) -> Manifest:
    """Build the manifest of files, folders and globs.

    Raises ValueError for no files, an unreadable file or schemas that do not fit together.
    """
    return build_with_files(uris, form, imports_uri)[0]


def build_with_files(
    uris: str | list[str],
    form: str,
    imports_uri: str,
    mode: file_identity.Mode = "content",
    text_columns: Collection[str] = (),
    empty_texts: Collection[str] = (),
) -> tuple[Manifest, ImportedFiles]:
    """Build a manifest, and return it with the files that it is built from.

    Args:
        mode: How files are identified (`file_identity`).
        text_columns: See `to_parquet`.
        empty_texts: See `to_parquet`.
    """
    converted = to_parquet.to_parquet(
        [uris] if isinstance(uris, str) else uris,
        form,
        imports_uri,
        mode,
        text_columns,
        empty_texts,
    )
    files, fingerprint = converted.files, converted.fingerprint
    row_groups, schema, digest = [], None, hashlib.sha256()
    footers = threaded_map(_footer, files)  # a remote store takes a moment for each
    for number, (file, metadata) in enumerate(zip(files, footers, strict=True)):
        stored = metadata.schema.to_arrow_schema().remove_metadata()
        own_schema = pa.schema([field.with_type(_without_views(field.type)) for field in stored])
        schema = _common_schema(schema or own_schema, own_schema, file, files[0])
        if fingerprint is None:
            known = converted.given[number].content if converted.origin is None else None
            content = known or file_identity.fingerprint(file)
            name = PurePosixPath(storage.without_query(file)).name
            digest.update(f"{name} {content}".encode())
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            if group.num_rows:
                row_groups.append(RowGroup(number, i, group.num_rows, group.total_byte_size))
    assert schema is not None
    largest = max(row_groups, key=lambda group: group.num_bytes, default=None)
    if largest is not None and largest.num_bytes > LARGE_GROUP_BYTES:
        name, size = storage.without_secrets(files[largest.file]), largest.num_bytes / (1 << 30)
        checksums.notify(
            f"{name}: a row group of it has {size:.1f} GiB, and each process that reads rows holds "
            "whole row groups in memory; write the file with smaller ones (pyarrow and pandas: "
            "row_group_size=1000)"
        )
    manifest = Manifest(
        files=tuple(files),
        row_groups=tuple(row_groups),
        schema=schema,
        fingerprint=fingerprint or digest.hexdigest()[:16],
        identities=converted.given if converted.origin is None else (),
        origins=(converted.origin,) * len(files),
    )
    return manifest, converted


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
    """Return the type with plain texts and bytes in place of Arrow's view types, whose rows Arrow
    cannot take. Reading casts to it.
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


def _common_schema(schema: pa.Schema, own_schema: pa.Schema, file: str, first: str) -> pa.Schema:
    """Return a schema for the rows of earlier files and of this one. Reading casts to it.

    The columns of a file may stand in another order, have another width, or have no value (null);
    numbers may be whole in some files.

    Raises ValueError where a column is missing or of another kind.
    """
    if own_schema.equals(schema):
        return schema
    fields: list[tuple[str, pa.DataType]] = []
    for name in dict.fromkeys([*schema.names, *own_schema.names]):
        ours, theirs = (
            one.field(name).type if name in one.names else None for one in (schema, own_schema)
        )
        common = None if ours is None or theirs is None else _common_type(ours, theirs)
        if common is None:
            raise ValueError(
                f"{file}: its schema differs from that of {first}: column {name!r} is "
                f"{ours or 'absent'} there and {theirs or 'absent'} here"
            )
        fields.append((name, common))
    return pa.schema(fields)


def _common_type(ours: pa.DataType, theirs: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both, or None where there is none."""
    if ours == theirs:
        return ours
    if pa.types.is_dictionary(ours) or pa.types.is_dictionary(theirs):
        ours, theirs = map(_plain_type, (ours, theirs))
    if not _is_same_kind(ours, theirs):
        return None
    schemas = [pa.schema([("column", kind)]) for kind in (ours, theirs)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except pa.ArrowException:
        return None


def _is_same_kind(ours: pa.DataType, theirs: pa.DataType) -> bool:
    """Return whether a type may hold the values of both.

    Arrow would merge two kinds with loss. In structs with different fields, a renamed field is null
    in half of the rows. uint64 beside signed integers becomes int64, which ends at 2^63 - 1.
    """
    if pa.types.is_struct(ours) and pa.types.is_struct(theirs):
        names = {field.name for field in ours}
        return names == {field.name for field in theirs} and all(
            _is_same_kind(ours.field(name).type, theirs.field(name).type) for name in names
        )
    if pa.types.is_fixed_size_list(ours) and pa.types.is_fixed_size_list(theirs):
        return ours.list_size == theirs.list_size
    if arrow_lists.is_list(ours) and arrow_lists.is_list(theirs):
        return _is_same_kind(ours.value_type, theirs.value_type)
    if pa.uint64() in (ours, theirs):
        return not any(map(pa.types.is_signed_integer, (ours, theirs)))
    return {_type_family(ours), _type_family(theirs)} != {"text", "bytes"}


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a dictionary's values, or the type itself."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


READER_BYTES, LARGE_GROUP_BYTES = 256 << 20, 2 << 30
"""Row groups that a reader keeps, and the size of a row group from which on there is a warning.
Arrow's texts and bytes end there, too.
"""
MAX_UNPACKED_BYTES, MAX_COMPRESSION_RATIO = 512 << 20, 200
"""A row group larger than the first in memory is refused if it is also more than the second times
its size in the file: it is probably a decompression bomb.
"""


class Reader:
    """Takes rows by id, caching the row groups last read (at most `cache_bytes`)."""

    def __init__(self, manifest: Manifest, columns: list[str], cache_bytes: int = READER_BYTES):
        self.manifest, self.columns, self.cache_bytes = manifest, columns, cache_bytes
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        """Row groups by number, the one used last at the end."""
        self.bytes_in_cache = 0

    def _table(self, number: int) -> pa.Table:
        """Return a row group of the manifest by its number."""
        if number in self._tables:
            self._tables.move_to_end(number)
            return self._tables[number]
        group = self.manifest.row_groups[number]

        def read():
            with self.manifest.open(group.file) as handle:
                file = pq.ParquetFile(handle)
                _check_group(
                    handle, file, group.index_in_file, self.columns, self.manifest.files[group.file]
                )
                try:
                    return file.read_row_group(group.index_in_file, columns=self.columns)
                except pa.ArrowNotImplementedError as error:  # structs or lists above 2 GiB
                    raise ValueError(
                        f"{self.manifest.name(group.file)}: Arrow cannot read row group "
                        f"{group.index_in_file} ({error}): write the file with smaller ones "
                        "(pyarrow and pandas: row_group_size=1000)"
                    ) from None

        schema, table = self.manifest.schema, storage.retry(read)
        table = table.select([name for name in schema.names if name in table.column_names])
        table = cast_to_schema(table, schema, self.manifest.name(group.file))
        self._tables[number] = table
        self.bytes_in_cache += table.nbytes
        while self.bytes_in_cache > self.cache_bytes and len(self._tables) > 1:
            _, oldest = self._tables.popitem(last=False)
            self.bytes_in_cache -= oldest.nbytes
        return table

    def take(self, rows: np.ndarray) -> pa.Table:
        """Return the table of the given row ids, in their order."""
        if not len(rows):
            return self.manifest.schema.empty_table().select(self.columns)
        group_of_row = np.searchsorted(self.manifest.starts, rows, side="right") - 1
        groups, first, which = np.unique(group_of_row, return_index=True, return_inverse=True)
        # row groups in the order in which they come: rows that come group by group are copied once
        seen = np.argsort(first)
        position_of_group = np.argsort(seen)
        order = np.argsort(position_of_group[which], kind="stable")
        ends = np.cumsum(np.bincount(which)[seen])
        parts = []
        for number, ids in zip(groups[seen], np.split(rows[order], ends[:-1]), strict=True):
            inside = ids - self.manifest.starts[number]
            group = self._table(int(number))
            # a slice is not copied; of a small part a copy is better, since a slice keeps the whole
            # group in memory
            is_contiguous_part = len(inside) * 2 >= len(group) and (np.diff(inside) == 1).all()
            parts.append(
                group.slice(int(inside[0]), len(inside))
                if is_contiguous_part
                else _take(group, inside)
            )
        table = pa.concat_tables(parts)
        is_in_order = (np.diff(order) == 1).all()
        return table if is_in_order else _take(table, np.argsort(order))


def _take(table: pa.Table, places: np.ndarray) -> pa.Table:
    """Return the rows of a table at some indices.

    Arrow joins the chunks of a column first, which fails above 2 GiB of texts or bytes. So of a
    large table the rows of each chunk are taken alone.
    """
    if table.nbytes < LARGE_GROUP_BYTES:
        return arrow_lists.take(table, places)
    chunks = [pa.Table.from_batches([batch]) for batch in table.to_batches()]
    starts = np.cumsum([0, *map(len, chunks)])
    chunk_of_place = np.searchsorted(starts, places, side="right") - 1
    taken = [
        arrow_lists.take(chunk, places[chunk_of_place == number] - starts[number])
        for number, chunk in enumerate(chunks)
    ]
    table, order = pa.concat_tables(taken), np.argsort(chunk_of_place, kind="stable")
    is_in_order = (np.diff(order) == 1).all()
    return table if is_in_order else arrow_lists.take(table, np.argsort(order))


def _check_group(
    handle: BinaryIO, file: pq.ParquetFile, number: int, columns: list[str] | None, name: str
) -> None:
    """Check a row group before it is read.

    Raises ValueError where repeated or compressed values would take more than `MAX_UNPACKED_BYTES`
    in memory: a few kilobytes can stand for gigabytes. Real bytes, however many, are read.
    """
    group, wanted = file.metadata.row_group(number), set(columns) if columns is not None else None
    chunks = [
        chunk
        for chunk in map(group.column, range(group.num_columns))
        if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
    ]
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_COMPRESSION_RATIO * packed:
        raise ValueError(_too_large(name, number, unpacked, packed))
    suspect = [
        chunk.path_in_schema
        for chunk in chunks
        if chunk.physical_type == "BYTE_ARRAY"
        and any("DICTIONARY" in kind for kind in chunk.encodings)
        and chunk.num_values * chunk.total_uncompressed_size > MAX_UNPACKED_BYTES
        and "." not in chunk.path_in_schema
    ]
    if suspect:
        with_codes = pq.ParquetFile(handle, read_dictionary=suspect)
        expanded = 0
        for name_of_column in suspect:
            column = with_codes.read_row_group(number, columns=[name_of_column]).column(0)
            expanded += sum(map(_expanded_bytes, column.chunks))
        if expanded > MAX_UNPACKED_BYTES and expanded > MAX_COMPRESSION_RATIO * packed:
            raise ValueError(_too_large(name, number, expanded, packed))


def _expanded_bytes(part: pa.Array) -> int:
    """Return the bytes of a dictionary's values, written out for each row."""
    if not pa.types.is_dictionary(part.type):
        return part.nbytes
    sizes = pc.fill_null(pc.binary_length(part.dictionary), 0)
    size_of_rows = sizes.take(pc.drop_null(part.indices)).cast(pa.int64())
    return pc.sum(size_of_rows).as_py() or 0


def _too_large(name: str, number: int, size: int, packed: int) -> str:
    return (
        f"{name}: row group {number} would take {size / (1 << 30):.1f} GiB in memory and "
        f"{packed} bytes of the file, more than {MAX_COMPRESSION_RATIO} times as "
        "much: this looks like a decompression bomb; if the rows are real, write smaller row groups"
    )


def cast_to_schema(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """Cast a table to the schema: files of one data set or of joined corpora may hold text or
    numbers in another width, or no value.

    Raises ValueError, with the file's ``name`` and the column, for a value that does not fit.
    """
    wanted = pa.schema([schema.field(name).remove_metadata() for name in table.column_names])
    if table.schema.equals(wanted):
        return table
    columns: list[pa.ChunkedArray] = []
    for column, kind in zip(wanted.names, wanted.types, strict=True):
        try:
            columns.append(table[column].cast(kind))
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{name}: column {column!r} does not fit {kind}, its type over all "
                f"files ({str(error).splitlines()[0]}): write the files with one type"
            ) from None
    return pa.table(columns, schema=wanted)


def read_columns(selection: Selection, columns: list[str]) -> pa.Table:
    """Read whole columns of a selection (labels, splits, groups); dictionaries are decoded."""
    if not columns:
        return pa.table({})

    def read(number: int) -> pa.Table:
        with selection.manifest.open(number) as handle:
            file = pq.ParquetFile(handle)
            for group in range(file.num_row_groups):
                _check_group(handle, file, group, columns, selection.manifest.files[number])
            table = pq.read_table(handle, columns=columns)
        return cast_to_schema(table, selection.manifest.schema, selection.manifest.name(number))

    filled = sorted({group.file for group in selection.manifest.row_groups})
    parts = list(threaded_map(read, filled))
    table = _plain_columns(
        pa.concat_tables(parts)
        if parts
        else selection.manifest.schema.empty_table().select(columns)
    )
    return table if selection.row_ids is None else _take(table, selection.row_ids)


def _plain_columns(table: pa.Table) -> pa.Table:
    return table.cast(
        pa.schema([field.with_type(_plain_type(field.type)) for field in table.schema])
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
    corpus_sizes: tuple[int, ...] = ()
    """Number of training rows of each corpus, in the order of the job file and of `train`."""
    train_by_corpus: tuple[Selection, ...] = ()
    """The training rows of each corpus, with all their columns. Where corpora are joined, `train`
    has only the columns that are read.
    """
    reads: tuple[FileIdentity, ...] = ()
    """All files that are read in training: Parquet files, and those that their rows name."""
    left_out: tuple[LeftOut, ...] = ()
    unused: str = ""
    """How many rows the split column puts into no split, with its values, and how many values of
    `where` no row has; "": none.
    """
    drawn_by: tuple[str, ...] = ()
    """The column, other than the group, that the drawn splits of each corpus keep together; "":
    none.
    """
    empty_draws: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why splits have no row although they are drawn, by split."""
    shared_groups: tuple[str, ...] = ()
    """Warnings about patients, speakers or the like with rows on both sides of a random split."""

    @property
    def fingerprint(self) -> str:
        """Hash of the files, numbers of rows and draws of all splits: part of a stage's key."""
        # left out where it is empty: fingerprints of earlier versions do not have it
        return spec_hash(
            [s.manifest.fingerprint for s in (self.train, self.validation, self.test)],
            [len(s) for s in (self.train, self.validation, self.test)],
            *([self.drawn_by] if any(self.drawn_by) else []),
        )

    def by_name(self) -> dict[str, Selection]:
        """Return the splits by name: train, validation, test."""
        return {name: getattr(self, name) for name in SPLITS}

    def sizes(self) -> str:
        """Return a sentence with the rows of each split, and where the splits come from."""
        by = "split by " if self.origin.startswith("column ") else ""
        return (
            f"train {len(self.train)}, validation {len(self.validation)}, test {len(self.test)} "
            f"rows ({by}{self.origin}){'; ' if self.unused else ''}{self.unused}"
        )


def codes_of(values: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return (n,) codes of groups or labels, -1 for null and NaN, and the values."""
    return arrow_lists.dictionary_codes(arrow_lists.nan_as_null(values))


def group_numbers(values: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) int64: one number for all rows of a group; rows without one (null) each get
    their own.
    """
    codes, dictionary = codes_of(values)
    numbers = codes.astype(np.int64)
    is_null = numbers < 0
    numbers[is_null] = len(dictionary) + np.arange(is_null.sum())
    return numbers


def _share(values: pa.ChunkedArray | None, ids: np.ndarray, salt: str) -> np.ndarray:
    """Return (n,) numbers in [0, 1), equal for equal groups; each row without a group gets its
    own.
    """
    from pipeline.core.rng import mix, row_keys

    keys = row_keys(mix(*salt.encode()), np.zeros(1, dtype=np.int64), ids)
    leading_53_bits = keys.view(np.uint64) >> np.uint64(11)
    own = leading_53_bits.astype(np.float64) / float(1 << 53)
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
        f"{at}.columns: role {role!r} has no column; add {{{role}: NAME}}; columns are "
        f"{', '.join(manifest.schema.names)}"
        for role in roles
        if role not in data.columns
    ]
    wanted = [
        *((f"columns.{role}", name) for role, name in data.columns.items()),
        *(("where", name) for name in data.where),
    ]
    if data.split_column:
        wanted.append(("split_column", data.split_column))
    if data.group:
        wanted.append(("group", data.group))
    known = manifest.schema.names
    problems += [
        f"{at}.{field}: {manifest.name()} has no column {column!r}; {nearest(column, known)}"
        for field, column in wanted
        if column not in known
    ]
    problems += [
        f"{at}.{field}: {manifest.name()} has {known.count(column)} columns {column!r}; rename all "
        "but one"
        for field, column in wanted
        if known.count(column) > 1
    ]
    problems += [
        f"{at}.{field}: column {column!r} of {manifest.name()} holds {kind}, and one value a row "
        "is needed here"
        for field, column in wanted
        if known.count(column) == 1
        and not field.startswith("columns.")
        and pa.types.is_nested(kind := manifest.schema.field(column).type)
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


MAX_NAME_CHARACTERS = 120
"""Characters of a file's name that an error shows."""
MAX_DISTINCT_VALUES, MAX_SHOWN_VALUES = 50, 10
"""A column with more distinct values than the first may identify people: an error gives only their
number. Of other columns it shows up to the second number of values.
"""


def _where(
    selection: Selection,
    data: Data,
    at: str,
    found: dict[str, set[str]],
) -> Selection:
    """Return the rows that `where` keeps, and add the values that rows have to ``found``.

    Raises ValueError if there are none, with the values that exist.
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
        texts = [value_text(value) for value in held_values.to_pylist()]
        found.setdefault(name, set()).update(kept.intersection(texts))
        # the last entry is for nulls, whose code is -1
        matches = np.array([*(text in kept for text in texts), False])[codes]
        mask &= matches
        if not matches.any():
            # values that the job file states may come from the environment and be secret
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


def _describe_missing(data: Data, found: Mapping[str, set[str]]) -> list[str]:
    """Describe how many values of `where` no row has: they may be misspelt.

    Args:
        found: The values that rows have, by column, of all splits.
    """
    out: list[str] = []
    for name, held in found.items():
        missing = [value for value in data.where[name] if value_text(value) not in held]
        if missing:
            # the values may come from the environment and be secret
            out.append(
                f"no row has {len(missing)} of the {len(data.where[name])} values of where.{name}"
            )
    return out


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
    is_present = codes >= 0
    counts = np.bincount(codes[is_present], minlength=len(values))
    nulls = f", {(~is_present).sum()} nulls" if not is_present.all() else ""
    description = f"it holds {len(counts)} distinct values in {is_present.sum()} rows{nulls}"
    if name == data.group or not 0 < len(counts) <= MAX_DISTINCT_VALUES or counts.min() < 2:
        return description
    if data.group:
        groups = group_numbers(read_columns(selection, [data.group])[data.group])
        pairs = np.unique(np.stack([codes[is_present], groups[is_present]]), axis=1)
        groups_of_each = np.bincount(pairs[0], minlength=len(counts))
        if groups_of_each.min() < 2:
            return description
    order = np.argsort(-counts, kind="stable")[:MAX_SHOWN_VALUES]
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
    """Return train, validation and test rows of a data spec.

    Rows of further corpora (`more`) come after those of the first.

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
    groups = [corpus.group for corpus in (data, *data.more)]
    for i, group in enumerate(groups[1:]):
        if group != groups[0] and (need_test or groups[0]):
            raise ValueError(
                f"{at}.more.{i}.group: it is {group or 'not given'}, that of the first rows "
                f"{groups[0] or 'is not given'}; joined corpora are grouped by one column: name "
                "the same column for each"
            )
    out = parts[0]
    if len(parts) > 1:
        columns = [*data.columns.values(), *([data.group] if data.group else [])]
        text_roles = ("text", "text_pair") if data.modality.name == "text" else ()
        texts = frozenset(data.columns.get(role, "") for role in text_roles)
        out = _joined(parts, columns, at, texts)
    for name, is_read in (("train", True), ("validation", need_test), ("test", need_test)):
        if is_read and not len(getattr(out, name)):
            reason = out.empty_draws.get(name)
            why = f"{out.sizes()}; {reason}" if reason else out.sizes()
            remedy = "another split_seed" if reason else f"{name}_fraction"
            raise ValueError(
                f"{at}: the {name} split is empty ({why}); give {name} files, a "
                f"split_column or {remedy}"
            )
    for i, (weight, rows) in enumerate(zip(data.weights, out.corpus_sizes, strict=True)):
        if weight is not None and not rows:
            raise ValueError(
                f"{at}{f'.more.{i - 1}' if i else ''}: this corpus has weight {weight:g} and no "
                "training row to draw; leave it out, or look at its splits and where "
                f"({parts[i].sizes()})"
            )
    for group in dict.fromkeys(filter(None, groups)):
        grouped = [part for part, own in zip(parts, groups, strict=True) if own == group]
        _check_no_group_in_two_splits(grouped, group, at)
    return out


SHARE_UNIT = 1 << 25
"""All rows of a class as a share in whole numbers. Products of two shares can be added over some
thousand classes without overflow.
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
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    num_classes = int(classes.max()) + 1
    rows = np.zeros((len(first), num_classes), dtype=np.int64)
    np.add.at(rows, (group_of_row, classes), 1)
    # whole numbers: rounded sums would break ties differently on another machine
    shares = rows * SHARE_UNIT // np.maximum(rows.sum(axis=0), 1)
    fold_shares = np.zeros((count, rows.shape[1]), dtype=np.int64)
    fold_rows = np.zeros(count, dtype=np.int64)
    fold_of_group = np.zeros(len(first), dtype=np.int64)
    for group in np.lexsort((order[first], -rows.sum(axis=1))):
        fold = np.lexsort((fold_rows, fold_shares @ shares[group]))[0]
        fold_of_group[group] = fold
        fold_shares[fold] += shares[group]
        fold_rows[fold] += rows[group].sum()
    return fold_of_group[group_of_row]


SEGMENT_ROLES = ("start", "seconds")
"""Roles of a row that is a segment of a longer recording."""


def recording_column(modality: Any, columns: Mapping[str, str], manifest: Manifest) -> str | None:
    """Return the column that names each row's recording.

    It is ``recording``, as in a folder of recordings, else the column of paths. None where rows are
    no recordings, or have them inside.
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
    """Return the column whose equal values a drawn split keeps together.

    It is the group, else the column of the role ``image_id`` (captions of one image), else that of
    recordings, where several rows are segments of one. None: rows are independent.
    """
    if column := data.group or data.columns.get("image_id"):
        return column
    kind = registry.get("modality", data.modality.name)
    name = recording_column(kind, data.columns, manifest)
    if name is None:
        return None
    recordings = pc.drop_null(read_columns(Selection(manifest), [name])[name])
    return name if pc.count_distinct(recordings).as_py() < len(recordings) else None


GROUP_COLUMNS = (
    "patient",
    "patient_id",
    "subject",
    "subject_id",
    "speaker",
    "entity",
    "recording",
)
"""Columns that importers write to say which rows belong together, the largest groups first."""


def _describe_shared_group(
    rows: Selection,
    train: Selection,
    held_out: Mapping[str, Selection],
    data: Data,
    unit_column: str | None,
) -> str:
    """Describe the rows held out at random whose patient (speaker, ...) is also trained on.

    Args:
        rows: The rows before the draw.
        train: Those that are left to train on.
        held_out: Those that were drawn, by split.
        unit_column: The column that the draw kept together.

    Returns:
        A sentence about the first of GROUP_COLUMNS with such rows, or "". A column with a role,
        such as the label of speaker identification, or with fewer than three values, is no group.
    """
    schema = rows.manifest.schema
    possible = set(schema.names) - {unit_column, *data.columns.values()}
    for name in GROUP_COLUMNS:
        if name not in possible or pa.types.is_nested(schema.field(name).type):
            continue
        is_trained = np.isin(rows.all_ids, train.all_ids)
        codes, values = codes_of(read_columns(rows, [name])[name])
        is_shared = (codes >= 0) & np.isin(codes, codes[is_trained])
        shared_ids = rows.all_ids[is_shared]
        counts = {split: np.isin(of.all_ids, shared_ids).sum() for split, of in held_out.items()}
        shares = " and ".join(
            f"{count:,} of the {len(held_out[split]):,} {split} rows"
            for split, count in counts.items()
            if count
        )
        if len(values) > 2 and shares:
            return (
                f"{shares}, held out at random, have the same {name} as a training row, so metrics "
                f"may be too good for new ones: say data.group: {name} to keep such rows in one "
                "split"
            )
    return ""


def _is_in_fold(
    selection: Selection,
    data: Data,
    roles: tuple[str, ...],
    at: str,
    fold: Fold,
    unit_column: str | None,
) -> np.ndarray:
    """Return (n,) bool: whether a row is in a fold.

    Folds have equal shares of each class, where the role ``label`` has classes. Rows with one value
    of ``unit_column`` are in one fold.

    Raises ValueError where there are too few groups, or rows of a class, for so many folds.
    """
    label = data.columns["label"] if fold.by_class and "label" in roles else None
    table = read_columns(selection, [name for name in (label, unit_column) if name])
    group = table[unit_column] if unit_column else None
    groups = None if group is None else group_numbers(group)
    ids = selection.all_ids
    unit, units = "rows", ids
    if groups is not None:
        unit, units = "groups" if data.group else f"values of {unit_column}", groups
    num_units = len(np.unique(units))
    classes = np.zeros(len(selection), dtype=np.int64)
    problem = f"there are {num_units} {unit}" if num_units < fold.of else ""
    if label is not None and not problem:
        codes, values = codes_of(table[label])
        # rows without a label are a class of their own; whether they are allowed is checked later
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
    kind = registry.get("modality", data.modality.name)
    empty_texts = {*readable_columns(kind, data.columns), *_columns_asked_for_empty(data)}
    files_named_by_rows: dict[tuple[str, ...], tuple[FileIdentity, ...]] = {}
    files_of_split: dict[str, tuple[FileIdentity, ...]] = {}
    found_values: dict[str, set[str]] = {}

    def build_one(
        split: str, uris: str | list[str], text_columns: Collection[str] = ()
    ) -> Selection:
        manifest, imported = build_with_files(
            uris, data.format, imports_uri, data.identity, text_columns, empty_texts
        )
        files_of_split[split] = imported.given
        files_named_by_rows[manifest.files] = imported.named
        _check_columns(manifest, data, roles, at)
        return _where(Selection(manifest), data, at, found_values)

    train = build_one("train", data.uri if data.uri is not None else data.train or [])
    manifest = train.manifest
    given: dict[str, Selection] = {}
    descriptions: list[str] = []
    unused = ""
    if data.split_column:
        given, unused = _declared_splits(train, data, data.split_column, at)
        _check_fractions(given, data, at)
        train = given["train"]
        descriptions.append(f"column {data.split_column}")
    for name in ("validation", "test"):
        files = getattr(data, name)
        if files is not None:
            # 07 makes a column of the training rows texts: then 10 in a small test file is one too
            texts = [field.name for field in manifest.schema if pa.types.is_string(field.type)]
            given[name] = build_one(name, files, texts)
            descriptions.append(f"{name} files")
    _check_no_file_is_trained_on(files_of_split, at)
    unused = "; ".join([*([unused] if unused else []), *_describe_missing(data, found_values)])
    fractions = {"test": data.test_fraction, "validation": data.validation_fraction}
    to_draw = {
        name: fraction for name, fraction in fractions.items() if fraction > 0 and name not in given
    }
    if fold is None and not to_draw and "split_seed" in changed_fields(data):
        raise ValueError(
            f"{at}.split_seed: no rows are held out by validation_fraction or test_fraction: "
            "leave it out"
        )
    unit_column = _split_unit(data, manifest) if fold is not None or to_draw else None
    by_hash = f"by hash of {unit_column or 'the row'}"
    seed = f" (split_seed {data.split_seed})" if data.split_seed else ""
    undrawn = train
    if fold is not None:
        to_draw.pop("test", None)
        in_fold = _is_in_fold(train, data, roles, at, fold, unit_column)
        given["test"], train = train.keep(in_fold), train.keep(~in_fold)
        share = "as equal as its groups allow" if unit_column else "equal"
        is_stratified = fold.by_class and "label" in roles
        classes = f", with shares of each class {share}" if is_stratified else ""
        descriptions.append(f"test: each of {fold.of} folds {by_hash}{classes}{seed}")
    empty_draws: dict[str, str] = {}
    for name, fraction in to_draw.items():
        drawn, remaining = _draw_split(train, name, fraction, data, unit_column, fold)
        if unit_column and len(train) and not (len(drawn) and len(remaining)):
            empty_split = name if len(remaining) else "train"
            empty_draws[empty_split] = _why_empty(train, unit_column)
        given[name], train = drawn, remaining
        descriptions.append(f"{name}: random {fraction:g} of train {by_hash}{seed}")
    shared_group = ""
    if data.group:
        descriptions.append(f"no {data.group} in two splits")
    elif len(train) < len(undrawn):
        by_fold = [] if fold is None else ["test"]
        held_out = {name: given[name] for name in (*to_draw, *by_fold)}
        shared_group = _describe_shared_group(undrawn, train, held_out, data, unit_column)
    empty = Selection(manifest, np.zeros(0, dtype=np.int64))
    parts = {name: given.get(name, empty) for name in SPLITS} | {"train": train}
    columns = file_columns(kind, data.columns)
    parts, reads = _with_all_files(parts, files_named_by_rows, columns, data.identity)
    left_out: list[LeftOut] = []
    for name in SPLITS:
        parts[name], unlabelled = _drop_unlabelled(parts[name], name, data, needed)
        left_out += unlabelled
    if left_out:
        rows = "row" if len(left_out) == 1 else "rows"
        descriptions.append(f"{len(left_out)} {rows} without a label left out")
    return Splits(
        **parts,
        origin="; ".join(descriptions) or "as given",
        corpus_sizes=(len(parts["train"]),),
        train_by_corpus=(parts["train"],),
        reads=reads,
        left_out=tuple(left_out),
        unused=unused,
        drawn_by=(unit_column if unit_column and not data.group else "",),
        empty_draws=empty_draws,
        shared_groups=(shared_group,) if shared_group else (),
    )


def _check_no_file_is_trained_on(
    files_of_split: Mapping[str, tuple[FileIdentity, ...]], at: str
) -> None:
    """Raise ValueError where a file of validation or test rows is also one of training rows."""
    trained = {file.uri for file in files_of_split["train"]}
    for name, files in files_of_split.items():
        both = [file.uri for file in files if file.uri in trained]
        if name != "train" and both:
            raise ValueError(
                f"{at}.{name}: {len(both)} of its {len(files)} files are also in train, such as "
                f"{storage.without_secrets(both[0])}: leave them out of one of the two"
            )


def _declared_splits(
    selection: Selection, data: Data, split_column: str, at: str
) -> tuple[dict[str, Selection], str]:
    """Return the splits that a column declares, and a description of the rows in none of them.

    Raises ValueError where no row is in the training split.
    """
    declared = read_columns(selection, [split_column])[split_column]
    names = pc.cast(declared, pa.string())
    given: dict[str, Selection] = {}
    for split in SPLITS:
        values = pa.array(data.values_of(split), pa.string())
        mask = pc.is_in(names, value_set=values).to_numpy(zero_copy_only=False)
        if mask.any():
            given[split] = selection.keep(mask)
    num_unused = len(selection) - sum(map(len, given.values()))
    description = ""
    if num_unused or "train" not in given:
        codes, values = arrow_lists.dictionary_codes(declared)
        description = _describe_values(codes, values.to_pylist(), split_column, selection, data)
    if "train" not in given:
        # values that the job file states may come from the environment and be secret
        stated = data.values_of("train")
        asked = stated if stated in ([], ["train"]) else "one that split_values.train states"
        raise ValueError(
            f"{at}.split_column: no row of {split_column} is {asked}; {description}; set "
            "split_values"
        )
    if not num_unused:
        return given, ""
    rows = "row is" if num_unused == 1 else "rows are"
    return given, f"{num_unused} {rows} in no split by {split_column}: {description}"


def _check_fractions(given: Mapping[str, Selection], data: Data, at: str) -> None:
    """Raise ValueError for a fraction of a split that `split_column` gives."""
    for name in ("validation", "test"):
        field = f"{name}_fraction"
        is_stated = getattr(data, field) > 0 and field in changed_fields(data)
        if is_stated and name in given:
            raise ValueError(
                f"{at}.{field}: column {data.split_column} names {len(given[name])} {name} rows, "
                "so no others are held out: leave it out"
            )


def _draw_split(
    train: Selection,
    name: str,
    fraction: float,
    data: Data,
    unit_column: str | None,
    fold: Fold | None,
) -> tuple[Selection, Selection]:
    """Return the rows of a split that is drawn by hash, and the training rows that remain."""
    units = read_columns(train, [unit_column])[unit_column] if unit_column else None
    salt = f"{name} {data.split_seed}" if data.split_seed else name
    salt += f" fold {fold.number}" if fold else ""
    is_drawn = _share(units, train.all_ids, salt) < fraction
    return train.keep(is_drawn), train.keep(~is_drawn)


def _why_empty(train: Selection, unit_column: str) -> str:
    """Describe why a drawn split has no rows: few values, whose rows stay together."""
    units = read_columns(train, [unit_column])[unit_column]
    count = pc.count_distinct(pc.drop_null(units)).as_py()
    values = "value" if count == 1 else "values"
    return (
        f"the rows have {count} {values} of {unit_column}, and rows of one value stay in one split"
    )


def _with_all_files(
    parts: dict[str, Selection],
    files_named_by_rows: Mapping[tuple[str, ...], tuple[FileIdentity, ...]],
    columns: tuple[str, ...],
    mode: file_identity.Mode,
) -> tuple[dict[str, Selection], tuple[FileIdentity, ...]]:
    """Add the files that rows name to the fingerprints of splits (`with_named_files`).

    Args:
        files_named_by_rows: Those that were identified while a manifest was built, by its files.

    Returns:
        The splits, and all files that are read.
    """
    reads = [
        file
        for part in parts.values()
        for file in (*part.manifest.identities, *files_named_by_rows[part.manifest.files])
        if file is not None
    ]
    to_identify = [
        name for name, part in parts.items() if not files_named_by_rows[part.manifest.files]
    ]
    identified, named_files = with_named_files([parts[name] for name in to_identify], columns, mode)
    parts = parts | dict(zip(to_identify, identified, strict=True))
    return parts, tuple(dict.fromkeys((*reads, *named_files)))


def _columns_asked_for_empty(data: Data) -> list[str]:
    """Return the columns of which the job file asks for rows with an empty text."""
    columns = [name for name, values in data.where.items() if "" in values]
    is_split = any("" in values for values in data.split_values.values())
    return [*columns, data.split_column] if data.split_column and is_split else columns


def _drop_unlabelled(
    selection: Selection, split: str, data: Data, needed: tuple[str, ...]
) -> tuple[Selection, list[LeftOut]]:
    """Return the rows that have a label, and the others, as long as these are within the budget of
    bad rows. Else all rows are returned: the objective then says what is wrong.
    """
    names = columns_of(needed, data.columns)
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
    names_by_selection = [_named_files(selection, columns) for selection in selections]
    every_name = sorted(set().union(*names_by_selection))
    try:
        known = {
            file.uri: file for file in file_identity.identify(every_name, mode, absent_ok=True)
        }
    except storage.StorageError as error:
        raise _with_row(error, every_name, selections, columns) from error
    contents: dict[tuple[str, ...], list[str]] = {}
    for selection, names in zip(selections, names_by_selection, strict=True):
        contents.setdefault(selection.manifest.files, []).extend(
            known[name].content for name in names
        )
    # selections of one manifest share the new one too
    manifests: dict[int, Manifest] = {}
    for manifest in (selection.manifest for selection in selections):
        manifests[id(manifest)] = manifest
        if contents[manifest.files]:
            fingerprint = spec_hash(manifest.fingerprint, contents[manifest.files])
            manifests[id(manifest)] = replace(manifest, fingerprint=fingerprint)
    return [
        Selection(manifests[id(selection.manifest)], selection.row_ids) for selection in selections
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
    is_long = len(name) > MAX_NAME_CHARACTERS
    short = f"{name[:MAX_NAME_CHARACTERS]}... ({len(name)} letters)" if is_long else name
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
    values = _plain_type(kind)
    if not pa.types.is_struct(values):
        return arrow_lists.is_text(values)
    index = values.get_field_index("path")
    return index >= 0 and arrow_lists.is_text(values.field(index).type)


def _named_files(selection: Selection, columns: tuple[str, ...]) -> list[str]:
    """Return the files that some rows name, each once, in the order of the rows."""
    files: dict[str, None] = {}
    for name in columns:
        kind = selection.manifest.schema.field(name).type
        if len(selection) and _can_name_files(kind):
            files |= dict.fromkeys(
                filter(None, pc.unique(read_columns(selection, [name])[name]).to_pylist())
                if arrow_lists.is_text(kind)
                else _paths_of(selection, name)
            )
    return list(files)


def _paths_of(selection: Selection, name: str) -> list[str]:
    """Return the paths of structs without bytes.

    Reads a row group at a time: the bytes may take gigabytes.
    """
    ids, out = selection.all_ids, []
    reader = Reader(selection.manifest, [name])
    for start, stop in pairwise(selection.row_group_starts.tolist()):
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


def _joined(
    parts: list[Splits],
    columns: list[str],
    at: str,
    texts: frozenset[str],
) -> Splits:
    """Join each split of several corpora to one selection, in the order of the job file."""
    job_fields = [at, *(f"{at}.more.{i}" for i in range(len(parts) - 1))]
    joined: dict[str, Selection] = {}
    for name in SPLITS:
        selections = [getattr(part, name) for part in parts]
        filled = [i for i, selection in enumerate(selections) if len(selection)] or [0]
        joined[name] = _concatenated(
            [selections[i] for i in filled], columns, [job_fields[i] for i in filled], texts
        )
    origin = "; ".join(f"corpus {i + 1}: {part.origin}" for i, part in enumerate(parts))
    if len({part.origin for part in parts}) == 1:
        origin = f"each of {len(parts)} corpora: {parts[0].origin}"
    reads = tuple(dict.fromkeys(file for part in parts for file in part.reads))
    return Splits(
        **joined,
        origin=origin,
        corpus_sizes=tuple(len(part.train) for part in parts),
        train_by_corpus=tuple(part.train for part in parts),
        reads=reads,
        left_out=tuple(row for part in parts for row in part.left_out),
        unused="; ".join(dict.fromkeys(part.unused for part in parts if part.unused)),
        drawn_by=tuple(column for part in parts for column in part.drawn_by),
        empty_draws={name: why for part in parts for name, why in part.empty_draws.items()},
        shared_groups=tuple(text for part in parts for text in part.shared_groups),
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
        if {_type_family(selection.manifest.schema.field(name).type) for selection in selections}
        == {"text", "bytes"}
    }
    for selection, job_field in zip(selections, job_fields, strict=True):
        for name in dict.fromkeys(columns):
            theirs, ours = selection.manifest.schema.field(name).type, first.schema.field(name).type
            if _type_family(theirs) != _type_family(ours) and name not in as_bytes:
                raise ValueError(
                    f"{job_field}: column {name!r} is {theirs} in "
                    f"{selection.manifest.name()} and {ours} in {first.name()}; joined corpora "
                    "need columns of the same type: write one of them anew"
                )
    if len(selections) == 1:
        return selections[0]
    manifests = [selection.manifest for selection in selections]
    first_files = np.cumsum([0, *(len(manifest.files) for manifest in manifests[:-1])])
    first_rows = np.cumsum([0, *(manifest.num_rows for manifest in manifests[:-1])])
    schema = _plain_columns(first.schema.empty_table().select(list(dict.fromkeys(columns)))).schema
    schema = pa.schema(
        [field.with_type(pa.binary()) if field.name in as_bytes else field for field in schema]
    )
    joined = Manifest(
        files=tuple(file for manifest in manifests for file in manifest.files),
        row_groups=tuple(
            replace(group, file=int(group.file + first_file))
            for manifest, first_file in zip(manifests, first_files, strict=True)
            for group in manifest.row_groups
        ),
        schema=schema,
        fingerprint=spec_hash([manifest.fingerprint for manifest in manifests]),
        identities=tuple(
            identity
            for manifest in manifests
            for identity in (manifest.identities or (None,) * len(manifest.files))
        ),
        origins=tuple(
            origin
            for manifest in manifests
            for origin in (manifest.origins or (None,) * len(manifest.files))
        ),
    )
    if all(selection.row_ids is None for selection in selections):
        return Selection(joined)
    ids = [
        selection.all_ids + first_row
        for selection, first_row in zip(selections, first_rows, strict=True)
    ]
    return Selection(joined, np.concatenate(ids))


def _type_family(data_type: pa.DataType) -> str:
    """Return one word for types whose values can be cast to each other without loss of meaning."""
    if pa.types.is_dictionary(data_type):
        return _type_family(data_type.value_type)
    if pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        return f"list of {_type_family(data_type.value_type)}"
    named = {
        "text": (pa.types.is_string, pa.types.is_large_string),
        "bytes": (pa.types.is_binary, pa.types.is_large_binary),
        "whole number": (pa.types.is_integer,),
        "number": (pa.types.is_floating,),
    }
    for word, tests in named.items():
        if any(test(data_type) for test in tests):
            return word
    return str(data_type)


def _check_no_group_in_two_splits(parts: list[Splits], group: str, at: str) -> None:
    """Raise ValueError where a value of the group (a patient) is in two splits, also of two
    corpora that are grouped by one column.

    Null is no group. The error counts values and names one row of each split by its position: it
    never holds a value, which may identify a patient.
    """
    # value of the group: the split where it was first found, and the row
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
            f"{'is' if many == 1 else 'are'} in more than one split: {location} is in {split}, and "
            f"{other_location}, which has the same value, is in {other}. Rows of a group must be "
            f"in one split: use a split_column that keeps each {group} together, or leave the "
            f"splits out to have them made by hash of {group}"
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
