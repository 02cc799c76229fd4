"""Importers of text and tables, which read their source twice: a scan, then the rows.

The scan finds what only all of the source tells: column types, repeated ids, duplicate documents.
It counts rows and invalid ones, so that the budget is checked before a shard is written. Its
results are kept beside the shards while the run lasts, so that a run that was killed does not scan
again.
"""

from __future__ import annotations

import io
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io import checksums, storage
from pipeline.prepare.engine.importing import Info, Notes, Row
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, find_inputs, whole_files
from pipeline.prepare.engine.row_groups import RowGroups, by_split, lengths, tables_of
from pipeline.prepare.engine.shard_tasks import (
    SCANS,
    BudgetCheck,
    Importer,
    OutputShard,
    ProgressCallback,
    Settings,
    ShardResult,
    ShardTask,
    group_neighbours,
    run_tasks,
    sum_by_split,
)
from pipeline.prepare.readers.archives import Opener

MAX_NAMED = 3
PLAIN = "plain"
"""Name of the array that holds, as JSON, the scan results that are not arrays."""
Scan = dict[str, Any]
"""The result of scanning an input split: NumPy arrays, and values that JSON can hold."""


@dataclass(frozen=True)
class InferredSchema:
    """What the scans of all input splits come to.

    Attributes:
        columns: of the rows, without `split`.
        scan_results: for each input split, what reading its rows needs to know.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
        dropped: rows that were left out on purpose, to be listed.
    """

    columns: list[pa.Field]
    scan_results: Sequence[Any]
    notes: Notes = field(default_factory=dict)
    info: Info = field(default_factory=dict)
    dropped: pa.Table | None = None


class TableImporter(Importer):
    """Base class for text and tables. Examples: `csv`, `text`, `squad`.

    Attributes:
        suffixes: of the files, without that of compression, where each is read whole.
        amounts: what the summary adds up: {word: the column whose lengths are added}.
        shuffles_rows: shuffle the rows of a shard in a fixed order, since files are often sorted by
            class; otherwise they keep the order of the files.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    amounts: ClassVar[dict[str, str]] = {}
    shuffles_rows: bool = False

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        """Find the files and cut them up; those with `suffixes`, each whole, unless overridden.

        Returns:
            (the input splits in reading order, the same at every call; a fingerprint that changes
                when the files do; notes for the summary).
        """
        o = self.options
        by_rows = "all" if getattr(o, "split_column", "") else ""
        listed = find_inputs(source, self.suffixes, o.split or by_rows)
        return whole_files(listed), listed.fingerprint, listed.notes

    @abstractmethod
    def rows(self, reading: SplitReader) -> Iterator[Row | pa.Table]:
        """Yield the valid rows of an input split, in order: dicts, or tables of many.

        Invalid rows go to `reading.bad`. Raises ValueError for a file that is not in the
        publisher's format.
        """

    def scan(self, reading: SplitReader) -> Scan:
        """Return what `infer_schema` must know of an input split; always the number of `rows`."""
        rows = self.rows(reading)
        return {"rows": sum(1 if isinstance(row, dict) else len(row) for row in rows)}

    def why_no_rows(self, scans: list[Scan]) -> str:
        """Return the message where the scans found no row, not even an invalid one."""
        return "no rows in the layout that this importer reads; see onetomany prepare NAME --list"

    @abstractmethod
    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        """Combine the scans of all input splits; `before` of each is the lines that precede it.

        Raises ValueError where the files do not go together.
        """

    def plan(self, source: str, settings: Settings) -> TableShardTask:
        return TableShardTask(self, source, settings)


# ---------------------------------------------------------------- the two passes


class TableShardTask(ShardTask):
    """The shards of text and tables: neighbouring input splits, up to about `part_mb` of text."""

    noun, without_images = "rows", "reads text, not images"
    makes_parts_of = "files and ranges of bytes"

    def __init__(self, importer: TableImporter, source: str, settings: Settings):
        super().__init__(importer, settings)
        self.input_splits, fingerprint, self._found_notes = importer.input_splits(
            source, settings.part_bytes
        )
        self.label = importer.label
        self.shards = group_neighbours(
            [input_split.split for input_split in self.input_splits],
            [input_split.size for input_split in self.input_splits],
            settings.part_bytes,
        )
        self.key = (
            fingerprint,
            [
                [input_split.name, input_split.split, input_split.start, input_split.stop]
                for input_split in self.input_splits
            ],
            [[shard.start, shard.stop] for shard in self.shards],
        )
        self._inferred_schema: InferredSchema | None = None
        self._before: list[int] = []
        self._read: list[int] = []

    @property
    def inferred_schema(self) -> InferredSchema:
        assert self._inferred_schema is not None, "before_shards() comes first"
        return self._inferred_schema

    def before_shards(
        self,
        output: str,
        check: BudgetCheck,
        report_progress: ProgressCallback,
        cpus: float,
    ) -> None:
        """Scan the source, shard by shard; scans that were kept are not repeated.

        Raises ValueError when there are more invalid rows than allowed.
        """
        uris = [
            storage.join(output, SCANS, shard.name.removesuffix(".parquet") + ".scan")
            for shard in self.shards
        ]
        jobs = [
            (uri, self.input_splits[shard.start : shard.stop])
            for uri, shard in zip(uris, self.shards, strict=True)
            if checksums.read_checked_or_none(uri, "this part is scanned again") is None
        ]
        for number, _ in enumerate(run_tasks(partial(scan_shard, self.importer), jobs, cpus), 1):
            report_progress(
                f"prepare {self.importer.registered_name}: scanned "
                f"{len(uris) - len(jobs) + number}/{len(uris)} parts",
                number == len(jobs),
            )
        scans = [scan for uri in uris for scan in _load(uri)]
        self._before, lines = [], Counter()
        for input_split, scan in zip(self.input_splits, scans, strict=True):
            self._before.append(lines[input_split.entry])
            lines[input_split.entry] += scan["lines"]
            scan["before"] = self._before[-1]
        self._read = [scan["rows"] + scan["broken"] for scan in scans]
        self.total = sum(self._read)
        if not self.total:
            raise ValueError(
                f"{self.input_splits[0].entry.uri}: {self.importer.why_no_rows(scans)}"
            )
        examples = [
            SplitReader(input_split, Opener(), before=before).location(
                int(at) if at.isdigit() else at
            )
            + f": {reason}"
            for input_split, scan, before in zip(
                self.input_splits, scans, self._before, strict=True
            )
            for at, reason in scan["examples"]
        ]
        check(examples, sum(scan["broken"] for scan in scans), self.total)
        self._inferred_schema = self.importer.infer_schema(self.input_splits, scans)
        self.notes = {**self._found_notes, **self.inferred_schema.notes}
        self.info = self.inferred_schema.info
        self.label = self.importer.label

    @property
    def columns(self) -> list[pa.Field]:
        return [*self.inferred_schema.columns, pa.field("split", pa.string())]

    @property
    def make_shard(self) -> Callable[[Any, Path], ShardResult]:
        return partial(_make, self.importer, self.schema)

    def payload(self, shard: OutputShard) -> Any:
        own = slice(shard.start, shard.stop)
        scan_results = self.inferred_schema.scan_results[own]
        return list(zip(self.input_splits[own], self._before[own], scan_results, strict=True))

    def source_rows(self, shard: OutputShard) -> int:
        return sum(self._read[shard.start : shard.stop])

    def after_shards(self, output: str) -> None:
        """Write the list of dropped rows."""
        if self.inferred_schema.dropped is not None:
            sink = io.BytesIO()
            pq.write_table(self.inferred_schema.dropped, sink, compression="zstd")
            storage.write_bytes(storage.join(output, "_dropped.parquet"), sink.getvalue())


def first_invalid(input_splits: list[InputSplit], scans: list[Scan]) -> str:
    """Return place and reason of the first invalid row of all scans, "" where there is none."""
    for input_split, scan in zip(input_splits, scans, strict=True):
        for row, reason in scan["examples"][:1]:
            return f"{input_split.name}: {row}: {reason}"
    return ""


def scan_shard(importer: TableImporter, uri: str, input_splits: list[InputSplit]) -> None:
    """Scan the input splits of a shard and keep the results at `uri`, without pickling."""
    plain: list[Scan] = []
    arrays: dict[str, np.ndarray] = {}
    with Opener() as opener:
        for number, input_split in enumerate(input_splits):
            reading = SplitReader(input_split, opener, most=MAX_NAMED)
            scan = importer.scan(reading)
            scan |= {
                "lines": reading.lines,
                "broken": reading.num_invalid,
                "examples": [
                    (row["path"].removeprefix(f"{input_split.name}:"), row["reason"])
                    for row in reading.listed
                ],
            }
            own = {name: value for name, value in scan.items() if isinstance(value, np.ndarray)}
            arrays |= {f"{number}/{name}": array for name, array in own.items()}
            plain.append({name: value for name, value in scan.items() if name not in own})
    sink = io.BytesIO()
    arrays[PLAIN] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    np.savez(sink, allow_pickle=False, **arrays)
    checksums.write_checked(uri, sink.getvalue())


def _load(uri: str) -> list[Scan]:
    """Read the results that `scan_shard` kept, one for each input split."""
    with np.load(io.BytesIO(checksums.read_checked(uri)), allow_pickle=False) as stored:
        out: list[Scan] = json.loads(stored[PLAIN].tobytes())
        for name in stored.files:
            if name != PLAIN:
                number, _, key = name.partition("/")
                out[int(number)][key] = stored[name]
    return out


def _make(
    importer: TableImporter,
    schema: pa.Schema,
    payload: list[tuple[InputSplit, int, Any]],
    scratch: Path,
) -> ShardResult:
    """Write a shard's rows to Parquet, with one row group (or what is shuffled) in memory."""
    path, invalid = scratch / "part.parquet", []
    counts = Counter[tuple[str, str]]()
    with Opener() as opener, RowGroups(path, schema, importer.shuffles_rows) as writer:
        for input_split, before, scan_result in payload:
            reading = SplitReader(input_split, opener, scan_result, before, most=1 << 62)
            rows = (_with_split(row, input_split.split) for row in importer.rows(reading))
            for block in tables_of(rows, schema):
                for split, here in by_split(block).items() if importer.amounts else ():
                    for name, column in importer.amounts.items():
                        counts[split, name] += int(lengths(here[column]).sum())
                writer.add(block)
            invalid += reading.listed
    amounts = sum_by_split((name, split, count) for (split, name), count in sorted(counts.items()))
    return ShardResult(path, writer.rows, invalid, amounts)


def _with_split(row: Row | pa.Table, split: str) -> Row | pa.Table:
    """Return a row, or a table of rows, with the column `split`: its own, or that of the file."""
    if isinstance(row, dict):
        return {"split": split, **row}
    if "split" in row.column_names:
        return row
    return row.append_column("split", pa.array([split] * len(row), pa.string()))
