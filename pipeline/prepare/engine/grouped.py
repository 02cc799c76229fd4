"""Importers of long tables of events, of any length, to one row an entity (an ICU stay, a
machine).

They read their source twice. First every table is read, in parallel byte ranges, and its events are
partitioned into buckets by a hash of their group (a patient), in scratch files beside the output.
Then every bucket, which fits in memory, becomes a shard: its events are sorted by entity and time,
and duplicates dropped. This is the partition phase of a Grace hash join (Kitsuregawa et al. 1983).
The scratch files are kept while the run lasts, so a run that was killed goes on.

A spilling sort by duckdb was tried (2026-11-30, version 2.0.1): of 4 million events in 300 buckets
it takes 4.7 s of processor time where this takes 1.4 s, and it runs in one process, while the byte
ranges here are read by as many machines as there are and are kept one by one.

Messages, lists and summaries hold positions of rows and reasons, never ids or values.
"""

from __future__ import annotations

import io
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import arrow_lists
from pipeline.core.rng import mix, row_keys
from pipeline.io import atomic_folder, checksums, storage
from pipeline.prepare.engine.importing import Info, InvalidRow, Notes
from pipeline.prepare.engine.inputs import InputSplit
from pipeline.prepare.engine.shard_tasks import (
    SCANS,
    Amounts,
    BudgetCheck,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    ShardTask,
    name_shards,
    run_tasks,
)
from pipeline.prepare.engine.table_importer import MAX_NAMED
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import Column, RowCounts, batches

BUCKET_BYTES, RANGE_BYTES = 64 << 20, 128 << 20
"""Approximate bytes of source text in a bucket, and in what one task of the first pass reads."""
FLUSH_EVENTS = 1 << 20
"""Events that are held in memory before they are partitioned."""
GROUP_EVENTS, GROUP_ROWS = 1 << 19, 16384
"""Most events (about), and most rows, of a row group."""
MAX_NAMED_VARIABLES = 400
"""The summary counts variables one by one up to this many (all drugs count as one)."""
MIN_EVENTS = 5
"""A variable with fewer events in a split is not named: it may tell of one patient."""
COUNTED = "events of "
"""What stands before the names of variables in the summary."""
EVENT = np.dtype([("row", "<i4"), ("hours", "<f4"), ("variable", "<i4"), ("value", "<f4")])
DUPLICATE, NOT_FINITE = "duplicate", "out of range"
COLUMNS = (
    pa.field("times", pa.list_(pa.float32())),
    pa.field("variables", pa.list_(pa.string())),
    pa.field("values", pa.list_(pa.float32())),
    pa.field("events", pa.int32()),
)


@dataclass(frozen=True)
class EventTables:
    """The tables of events.

    Attributes:
        pieces: for each task, the input splits that it reads.
        fingerprint: changes when any file does.
        notes: counts for the summary.
    """

    pieces: list[list[InputSplit]]
    fingerprint: str
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True)
class Entities:
    """The table of entities, one row each.

    Attributes:
        rows: `entity`, `patient`, static features, outcomes and `split`: all columns but the
            events.
        keys: what `events` needs to find an event's row; it is sent to tasks.
        group: the column whose rows are kept in one shard.
        invalid: rows that cannot be used: path, split and reason.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
    """

    rows: pa.Table
    keys: Any
    group: str = "entity"
    invalid: list[InvalidRow] = field(default_factory=list)
    notes: Notes = field(default_factory=dict)
    info: Info = field(default_factory=dict)


class Events(NamedTuple):
    """A block of n events.

    Attributes:
        rows: (n,) positions in the table of entities.
        hours: (n,) since the entity's start.
        codes: (n,) positions in `names`.
        names: of the variables.
        values: (n,) numbers.
    """

    rows: np.ndarray
    hours: np.ndarray
    codes: np.ndarray
    names: list[str]
    values: np.ndarray

    def filter(self, kept: np.ndarray) -> Events:
        """Return the events where (n,) `kept` is true."""
        rows, hours, codes = self.rows[kept], self.hours[kept], self.codes[kept]
        return Events(rows, hours, codes, self.names, self.values[kept])


class EventReader:
    """One pass over an input split of a table of events.

    Rows that are left out are counted once, by their first reason.

    Attributes:
        input_split: what is read.
        table: the name of its table.
        keys: `Entities.keys`.
        tally: counts of rows and of invalid lines.
        dropped: how many rows are left out, by `table: reason`.
        good: (n,) bool, which rows of a batch are still valid.
    """

    def __init__(
        self,
        input_split: InputSplit,
        opener: Opener,
        keys: Any = None,
        tally: RowCounts | None = None,
        dropped: Counter[str] | None = None,
    ):
        self.input_split, self.table = input_split, input_split.name
        self.opener, self.keys = opener, keys
        self.tally = tally if tally is not None else RowCounts()
        self.dropped = dropped if dropped is not None else Counter[str]()
        self.good = np.empty(0, dtype=bool)

    def batches(self, columns: dict[str, Column]) -> Iterator[pa.Table]:
        """Yield the rows as `csv_blocks.batches` does."""
        return batches(self.input_split, columns, self.opener, self.tally)

    def count(self, reason: str, rows: int) -> None:
        """Count rows that are left out."""
        self.dropped[f"{self.table}: {reason}"] += rows

    def begin(self, rows: int) -> None:
        """Start a batch: all of its rows are valid."""
        self.good = np.ones(rows, dtype=bool)

    def drop(self, reason: str, bad: np.ndarray) -> None:
        """Leave out the rows where `bad`, (n,) bool, is true; count those not dropped before."""
        self.count(reason, int(np.count_nonzero(self.good & bad)))
        self.good &= ~bad

    def drop_by_code(self, reasons: Sequence[str], codes: np.ndarray) -> None:
        """Drop the rows whose code is not 0; it counts by `reasons`."""
        for code, reason in enumerate(reasons):
            if code:
                self.drop(reason, codes == code)


def variable_codes(column: Any, prefix: str = "") -> tuple[list[str], np.ndarray]:
    """Return the distinct names in a column of texts, and (n,) the index of each, -1 for none."""
    codes, dictionary = arrow_lists.dictionary_codes(column)
    names = [str(name) for name in dictionary.to_pylist()]
    if "" in names:
        codes = np.where(codes == names.index(""), -1, codes)
    return [f"{prefix}{name}" for name in names], codes


class GroupedImporter(Importer):
    """Base class for long tables of events. Examples: `events`, `mimic3`."""

    kept_reasons: ClassVar[tuple[str, ...]] = ()
    """Names in `EventReader.dropped` of events that are kept: each is a note of its own."""

    @abstractmethod
    def sources(self, source: str, cut_bytes: int) -> EventTables:
        """Find the tables below `source`; the result is the same at every call.

        Raises ValueError for a table that is missing, saying what it is needed for.
        """

    @abstractmethod
    def entities(self, source: str) -> Entities:
        """Return all entities, in an order that does not depend on how the tables are stored."""

    @abstractmethod
    def events(self, reader: EventReader) -> Iterator[Events]:
        """Yield the valid events of an input split, in blocks; the others are counted."""

    def derived(
        self,
        rows: np.ndarray,
        hours: np.ndarray,
        codes: np.ndarray,
        values: np.ndarray,
        names: list[str],
    ) -> Events | None:
        """Return events computed from those of a bucket, such as a sum of scores; None by default.

        The arguments are the bucket's events, sorted by row and time.
        """
        return None

    def plan(self, source: str, settings: Settings) -> GroupedShardTask:
        return GroupedShardTask(self, source, settings)


class GroupedShardTask(ShardTask):
    """Shards of long tables: each split is cut into buckets of about 64 MiB of text."""

    noun, without_images = "entities", "reads tables, not images"
    makes_parts_of = "about so much source text"

    def __init__(self, importer: GroupedImporter, source: str, settings: Settings):
        super().__init__(importer, settings)
        most = settings.part_bytes if settings.part_mb else BUCKET_BYTES
        self.sources = importer.sources(source, min(RANGE_BYTES, 2 * most))
        self.entities = importer.entities(source)
        rows = self.entities.rows
        if not len(rows) and not self.entities.invalid:
            raise ValueError(
                f"{source}: no entities; the table that names them is empty: download it again"
            )
        if not len(rows):
            first, count = self.entities.invalid[0], len(self.entities.invalid)
            raise ValueError(
                f"{source}: none of {count} entities can be used. First one: {first['path']}: "
                f"{first['reason']}"
            )
        self.buckets, self.shards = _buckets(
            rows,
            self.entities.group,
            sum(part.size for piece in self.sources.pieces for part in piece),
            most,
        )
        self.total, self.invalid = len(rows) + len(self.entities.invalid), self.entities.invalid
        self.key = (
            self.sources.fingerprint,
            [
                [piece[0].name, len(piece), piece[0].start, piece[0].stop]
                for piece in self.sources.pieces
            ],
            len(self.shards),
        )
        self._order = np.argsort(self.buckets, kind="stable")
        self._bounds = np.searchsorted(self.buckets[self._order], np.arange(len(self.shards) + 1))
        self._scratch: list[str] = []
        self.notes, self.info = {**self.sources.notes, **self.entities.notes}, self.entities.info

    def before_shards(
        self,
        output: str,
        check: BudgetCheck,
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        """Partition the events of every piece of every table.

        Raises ValueError where more entities or lines are invalid than allowed, or no event is
        left.
        """
        check(
            [f"{row['path']}: {row['reason']}" for row in self.invalid[:MAX_NAMED]],
            len(self.invalid),
            self.total,
        )
        self._scratch = [
            storage.join(output, SCANS, f"{i:05d}-of-{len(self.sources.pieces):05d}")
            for i in range(len(self.sources.pieces))
        ]
        jobs = [
            (storage.join(uri, "manifest.json"), piece)
            for uri, piece in zip(self._scratch, self.sources.pieces, strict=True)
            if checksums.intact_folder(uri, "this piece is read again") is None
        ]
        split = partial(
            partition_events, self.importer, self.entities.keys, self.buckets, len(self.shards)
        )
        for number, _ in enumerate(run_tasks(split, jobs, cpus), 1):
            report_progress(
                f"prepare {self.importer.registered_name}: read "
                f"{len(self._scratch) - len(jobs) + number}/{len(self._scratch)} pieces",
                number == len(jobs),
            )
        manifests = [atomic_folder.open_folder(uri) for uri in self._scratch]
        bad = sum(manifest["bad"] for manifest in manifests)
        read = sum(manifest["rows"] for manifest in manifests)
        check([place for manifest in manifests for place in manifest["listed"]], bad, read + bad)
        dropped: Counter[str] = Counter()
        for manifest in manifests:
            dropped.update(manifest["dropped"])
        reasons = self.importer.kept_reasons
        kept = {name: dropped.pop(name) for name in reasons if dropped[name]}
        if read and not any(manifest["events"] for manifest in manifests):
            why = ", ".join(f"{name} {count}" for name, count in sorted(dropped.items()) if count)
            raise ValueError(
                f"no event is left of {read} rows: {why}; name the right columns, and the "
                "right table of entities"
            )
        names = {name for manifest in manifests for name in manifest["names"]}
        self._counts = len(set(map(_kind, names))) <= MAX_NAMED_VARIABLES
        self.notes |= {
            "rows of events read": read,
            **({"lines that are no rows, left out": bad} if bad else {}),
            "events dropped by reason": dict(
                sorted((name, count) for name, count in dropped.items() if count)
            ),
            **kept,
            "variables": len(names),
        }

    @property
    def columns(self) -> list[pa.Field]:
        own = [column for column in self.entities.rows.schema if column.name != "split"]
        ids = [column for column in own if column.name in ("entity", "patient")]
        return [
            *ids,
            *COLUMNS,
            *(column for column in own if column not in ids),
            pa.field("split", pa.string()),
        ]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer, self.schema, self._scratch, self._counts)

    def payload(self, shard: OutputShard) -> Any:
        rows = self._order[shard.start : shard.stop]
        return (
            int(self.buckets[rows[0]]) if len(rows) else -1,
            shard.split,
            rows,
            self.entities.rows.take(pa.array(rows)),
        )

    def summary_amounts(self, amounts: Amounts) -> Notes:
        """Leave out the names of variables with so few events that they may tell of one patient."""
        out, rare = Amounts(), Counter[str]()
        for name, counts in amounts.items():
            limit = MIN_EVENTS if name.startswith(COUNTED) else 0
            few = [split for split, count in counts.items() if count < limit]
            rare.update(few)
            if left := {split: count for split, count in counts.items() if split not in few}:
                out[name] = left
        return {
            **out,
            **({f"variables with fewer than {MIN_EVENTS} events": dict(rare)} if rare else {}),
        }


def _buckets(
    rows: pa.Table,
    group: str,
    size: int,
    most: int,
) -> tuple[np.ndarray, list[OutputShard]]:
    """Assign rows to buckets.

    Returns:
        ((n,) int32 bucket of each row; the shards, one a bucket, which count positions in the rows
            sorted by bucket).
    """
    splits = np.asarray(rows["split"].to_pylist(), dtype=np.str_)
    keys = rows[group].combine_chunks()
    if pa.types.is_integer(keys.type):
        hashed = row_keys(
            mix(*b"grouped"),
            np.zeros(len(rows), dtype=np.int64),
            keys.to_numpy(zero_copy_only=False),
        )
    else:
        digests = b"".join(
            blake2b(str(key).encode(), digest_size=8).digest() for key in keys.to_pylist()
        )
        hashed = np.frombuffer(digests, dtype="<i8")
    out, spans, before = np.zeros(len(rows), dtype=np.int32), [], 0
    for split in sorted(set(splits.tolist())):
        here = np.flatnonzero(splits == split)
        count = max(1, min(len(here), -(-size * len(here) // len(rows) // most)))
        bucket = (hashed[here].view(np.uint64) % np.uint64(count)).astype(np.int64)
        used, bucket = np.unique(bucket, return_inverse=True)
        out[here] = len(spans) + bucket
        ends = before + np.cumsum(np.bincount(bucket, minlength=len(used)))
        spans += [(split, start, stop) for start, stop in pairwise([before, *ends.tolist()])]
        before += len(here)
    return out, name_shards(spans)


# ---------------------------------------------------------------- the first pass


def partition_events(
    importer: GroupedImporter,
    keys: Any,
    buckets: np.ndarray,
    count: int,
    manifest: str,
    piece: list[InputSplit],
) -> None:
    """Partition the events of a piece by bucket, beside the `manifest`, which is written
    last.

    `events`: records of 16 bytes. `index.npy`: (flushes, buckets + 1) int64, the record at which
    each bucket of each flush begins.
    """
    uri = manifest.rpartition("/")[0]
    tally, dropped, vocabulary = RowCounts(), Counter[str](), dict[str, int]()
    local = None if storage.is_remote(uri) else Path(uri).parent
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local, prefix=".") as scratch, Opener() as opener:
        path, index, written = Path(scratch) / "events", [], 0
        with open(path, "wb") as file:
            events = chain.from_iterable(
                importer.events(EventReader(part, opener, keys, tally, dropped)) for part in piece
            )
            for block in _flushes(events, vocabulary, dropped, piece[0].name):
                bucket = buckets[block["row"]]
                order = np.argsort(bucket, kind="stable")
                index.append(written + np.searchsorted(bucket[order], np.arange(count + 1)))
                block[order].tofile(file)
                written += len(block)
        sink = io.BytesIO()
        np.save(sink, np.array(index, dtype=np.int64).reshape(-1, count + 1))
        about = {
            "rows": tally.rows,
            "bad": tally.bad,
            "listed": tally.listed,
            "dropped": dict(dropped),
            "names": list(vocabulary),
            "events": written,
        }
        atomic_folder.commit_folder(uri, {"events": path, "index.npy": sink.getvalue()}, about)


def _flushes(
    blocks: Iterator[Events],
    vocabulary: dict[str, int],
    dropped: Counter[str],
    table: str,
) -> Iterator[np.ndarray]:
    """Yield records of many events at a time.

    Their `variable` is an index into `vocabulary`, which grows.
    """
    waiting: list[np.ndarray] = []
    size = 0
    for block in blocks:
        used, codes = np.unique(block.codes, return_inverse=True)
        places = np.array(
            [vocabulary.setdefault(block.names[code], len(vocabulary)) for code in used],
            dtype=np.int32,
        )
        records = np.empty(len(block.rows), dtype=EVENT)
        with np.errstate(over="ignore"):
            records["row"] = block.rows
            records["hours"] = block.hours
            records["value"] = block.values
        records["variable"] = places[codes] if len(used) else 0
        good = np.isfinite(records["value"]) & np.isfinite(records["hours"])
        if not good.all():
            dropped[f"{table}: {NOT_FINITE}"] += int(len(good) - np.count_nonzero(good))
            records = records[good]
        waiting.append(records)
        size += len(records)
        if size >= FLUSH_EVENTS:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if size:
        yield np.concatenate(waiting)


# ---------------------------------------------------------------- the second pass


def _make(
    importer: GroupedImporter,
    schema: pa.Schema,
    pieces: list[str],
    counts: bool,
    payload: tuple[int, str, np.ndarray, pa.Table],
    scratch: Path,
) -> ShardResult:
    """Write the entities of a bucket to a Parquet file, with the bucket in memory."""
    bucket, split, rows, table = payload
    records, names = _bucket(pieces, bucket)
    records["row"] = np.searchsorted(rows, records["row"])
    records, num_duplicates = _sorted(records)
    hours, variables = records["hours"], records["variable"]
    derived = importer.derived(records["row"], hours, variables, records["value"], names)
    num_derived = len(derived.rows) if derived is not None else 0
    if derived is not None and num_derived:
        records, names = _with_derived(records, names, derived)
    offsets = np.searchsorted(records["row"], np.arange(len(table) + 1)).astype(np.int32)
    events = _as_columns(records, names, offsets)
    columns: dict[str, Any] = {name: table[name] for name in table.column_names} | events
    out = pa.table([columns[name] for name in schema.names], schema=schema)
    path = scratch / "part.parquet"
    group_rows = min(GROUP_ROWS, GROUP_EVENTS * len(out) // max(1, len(records)))
    pq.write_table(out, path, compression="zstd", row_group_size=max(1, group_rows))
    amounts: Amounts = {
        "events": {split: len(records)},
        f"events dropped: {DUPLICATE}": {split: num_duplicates},
        "events that follow from others": {split: num_derived},
        "entities without events": {split: int(np.count_nonzero(np.diff(offsets) == 0))},
    }
    if counts:
        per_name = np.bincount(records["variable"], minlength=len(names))
        for name, count in zip(names, per_name, strict=True):
            amounts.setdefault(f"{COUNTED}{_kind(name)}", {split: 0})[split] += int(count)
    shown = {name: count for name, count in amounts.items() if count[split] or name == "events"}
    return ShardResult(path, len(out), [], shown)


def _with_derived(
    records: np.ndarray,
    names: list[str],
    derived: Events,
) -> tuple[np.ndarray, list[str]]:
    """Return all records, sorted, and the sorted names that `variable` indexes."""
    extra = np.empty(len(derived.rows), dtype=EVENT)
    extra["row"], extra["hours"], extra["value"] = derived.rows, derived.hours, derived.values
    all_names = sorted({*names, *derived.names})
    number = {name: i for i, name in enumerate(all_names)}
    numbers = np.array([number[name] for name in names], dtype=np.int32)
    records["variable"] = numbers[records["variable"]]
    numbers = np.array([number[name] for name in derived.names], dtype=np.int32)
    extra["variable"] = numbers[derived.codes]
    return _sorted(np.concatenate([records, extra]))[0], all_names


def _as_columns(
    records: np.ndarray,
    names: list[str],
    offsets: np.ndarray,
) -> dict[str, pa.Array]:
    """Return COLUMNS of the rows whose events begin at the offsets (rows + 1,)."""
    texts = pa.array(names, pa.string())
    variables = pa.DictionaryArray.from_arrays(pa.array(records["variable"]), texts)
    values = (pa.array(records["hours"]), variables.dictionary_decode(), pa.array(records["value"]))
    starts = pa.array(offsets)
    columns: list[pa.Array] = [pa.ListArray.from_arrays(starts, column) for column in values]
    columns.append(pa.array(np.diff(offsets), pa.int32()))
    return {field.name: column for field, column in zip(COLUMNS, columns, strict=True)}


def _kind(variable: str) -> str:
    """Return the name under which the summary counts a variable: all drugs (drug: NAME) are one."""
    kind, colon, _ = variable.partition(": ")
    return f"{kind}: ..." if colon else variable


def _bucket(pieces: list[str], bucket: int) -> tuple[np.ndarray, list[str]]:
    """Read a bucket: (its records from all pieces, the sorted names of their variables)."""
    found, place, names = [np.empty(0, dtype=EVENT)], dict[str, int](), list[str]()
    for uri in pieces:
        manifest = atomic_folder.open_folder(uri)
        index = np.load(
            io.BytesIO(checksums.read_file(uri, manifest, "index.npy")), allow_pickle=False
        )
        spans = [
            (int(begin), int(end)) for begin, end in index[:, bucket : bucket + 2] if end > begin
        ]
        if not spans:
            continue
        own = manifest["names"]
        places = np.array([place.setdefault(name, len(place)) for name in own], dtype=np.int32)
        with storage.open_read(storage.join(uri, "events")) as file:
            for begin, end in spans:
                file.seek(begin * EVENT.itemsize)
                data = file.read((end - begin) * EVENT.itemsize)
                if len(data) != (end - begin) * EVENT.itemsize:
                    raise ValueError(
                        f"{uri}: its events end early; remove {SCANS} in the output and give "
                        "the same command"
                    )
                block = np.frombuffer(data, dtype=EVENT).copy()
                block["variable"] = places[block["variable"]]
                found.append(block)
    records = np.concatenate(found)
    used = np.unique(records["variable"])
    known = list(place)
    names = sorted(known[code] for code in used)
    order = {name: i for i, name in enumerate(names)}
    lookup = np.array([order.get(name, -1) for name in known], dtype=np.int32)
    records["variable"] = lookup[records["variable"]] if len(records) else records["variable"]
    return records, names


def _sorted(records: np.ndarray) -> tuple[np.ndarray, int]:
    """Sort records by row, time, variable, value: (distinct records, how many repeated)."""
    keys = tuple(records[name] for name in ("value", "variable", "hours", "row"))
    records = records[np.lexsort(keys)]
    new = np.ones(len(records), dtype=bool)
    new[1:] = records[1:] != records[:-1]
    return records[new], int(len(records) - np.count_nonzero(new))
