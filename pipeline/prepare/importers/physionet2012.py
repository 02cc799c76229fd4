"""PhysioNet / Computing in Cardiology Challenge 2012: two days of an intensive care stay, and
whether the patient left hospital alive.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine.grouped import (
    Entities,
    Events,
    EventTables,
    GroupedImporter,
    ValidRows,
    variable_codes,
)
from pipeline.prepare.engine.importing import InvalidRow, Row, invalid_row, preview
from pipeline.prepare.engine.inputs import EXPANSION
from pipeline.prepare.readers.archives import Entry, Opener, has_suffix, listing
from pipeline.prepare.readers.csv_blocks import (
    ByteRange,
    Column,
    RowCounts,
    batches,
    split_table,
    stem,
    whole,
)

RECORD = re.compile(r"(?:^|/)set-([a-z])/(\d+)\.txt$")
OUTCOMES = re.compile(r"(?:^|/)outcomes-([a-z])\.(?:txt|csv)$")
TABLE = re.compile(r"(?:^|/)(events|records)_([a-z])\.(?:parquet|csv|csv\.gz)$")
FILES_A_RANGE = 500
DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType", "Weight")
FACTS = ("Age", "Gender", "Height", "Weight", "CareUnit")
GENDERS, UNITS = {0.0: "female", 1.0: "male"}, {1.0: "CCU", 2.0: "CSRU", 3.0: "MICU", 4.0: "SICU"}
"""Coronary, cardiac surgery recovery, medical and surgical intensive care, under MIMIC's names."""
LABELS = {
    "In-hospital_death": "in_hospital_death",
    "Length_of_stay": "length_of_stay",
    "Survival": "survival",
    "SAPS-I": "saps",
    "SOFA": "sofa",
}
SPLITS = ("train", "validation", "test")
LINE = "not TIME,PARAMETER,VALUE"


class Physionet2012Options(Options):
    split: str = Field(
        "a:train,b:test,c:test",
        description="which set is which split; a set that is not named is left out",
    )


@register("importer", "physionet2012", options=Physionet2012Options)
class Physionet2012(GroupedImporter):
    """The Challenge's folder (or archive): set-a/132539.txt, ... and Outcomes-a.txt, also b and c;
    or the same as tables, events_a.parquet (recordid, minute, parameter, value) and
    records_a.parquet (recordid, the descriptors, the outcomes).

    Columns: entity (RecordID), times, variables, values, events, static (Age, Gender, Height,
    Weight, CareUnit), the outcomes in_hospital_death, length_of_stay, survival, saps, sofa (-1 is
    null), icu_type, and set. FiO2 is in percent; implausible values are left out
    (clinical/ranges.csv): Temp below 25, a Weight of 0; a pH of 735 is 7.35. Weights after the
    first are events. Outcomes of a set without them are null.
    """

    label = "in_hospital_death"

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.splits: dict[str, str] = {}
        for pair in self.options.split.split(","):
            name, colon, split = (part.strip() for part in pair.partition(":"))
            if not colon or split not in SPLITS or name in self.splits:
                raise ValueError(
                    f"--set split={self.options.split}: write such as a:train,b:test; splits "
                    f"are {', '.join(SPLITS)}"
                )
            self.splits[name] = split

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        found = listing(source)
        self._records: dict[str, list[Entry]] = {}
        self._outcomes: dict[str, Entry] = {}
        tables: dict[tuple[str, str], Entry] = {}
        for entry in found.entries:
            name = entry.name.lower()
            if match := RECORD.search(name):
                self._records.setdefault(match[1], []).append(entry)
            elif match := OUTCOMES.search(name):
                self._outcomes[match[1]] = entry
            elif match := TABLE.search(name):
                tables[match[1], match[2]] = entry
        self._tables = {
            name: (tables["events", name], tables["records", name])
            for kind, name in tables
            if kind == "events" and ("records", name) in tables and name not in self._records
        }
        there = sorted({*self._records, *self._tables})
        if not there:
            raise ValueError(
                f"{source}: neither set-a/NUMBER.txt nor events_a.parquet with "
                "records_a.parquet there; give the Challenge's folder or archive"
            )
        wanted = [name for name in self.splits if name in there]
        if not wanted:
            raise ValueError(
                f"--set split={self.options.split}: none of these sets is there; there are "
                f"{', '.join(there)}"
            )
        self.sets = wanted
        out, notes = [], {}
        with closing(Opener()) as opener:
            for name in wanted:
                files = iter(sorted(self._records.get(name, ()), key=_place))
                while some := tuple(islice(files, FILES_A_RANGE)):
                    squeezed = EXPANSION if has_suffix(some[0].uri, "gz") else 1
                    out.append(
                        ByteRange(
                            f"set-{name}",
                            some,
                            size=max(1, squeezed * sum(entry.size for entry in some)),
                        )
                    )
                if name in self._tables:
                    out += split_table(f"set-{name}", self._tables[name][0], cut_bytes, opener)
        if left := [name for name in there if name not in wanted]:
            notes["sets left out"] = preview(left)
        if bare := [
            name for name in wanted if name in self._records and name not in self._outcomes
        ]:
            notes["sets without an Outcomes file, whose outcomes are null"] = preview(bare)
        return EventTables(out, f"{found.mark} {plausible.mark()}", notes)

    # ---------------------------------------------------------------- one row a record

    def entities(self, source: str) -> Entities:
        rows: list[Row] = []
        broken: list[InvalidRow] = []
        with closing(Opener()) as opener:
            for name in self.sets:
                found = (
                    self._of_tables(name, opener)
                    if name in self._tables
                    else self._of_files(name, opener, broken)
                )
                rows += [self._row(name, record) for record in found]
        rows.sort(key=lambda row: (row["set"], row["entity"]))
        static = pa.struct(
            [
                pa.field(name, pa.string() if name in ("Gender", "CareUnit") else pa.float64())
                for name in FACTS
            ]
        )
        fields = [
            ("entity", pa.int64()),
            ("static", static),
            *((name, pa.int64()) for name in LABELS.values()),
            ("icu_type", pa.int64()),
            ("set", pa.string()),
            ("split", pa.string()),
        ]
        table = pa.Table.from_pylist(
            rows, schema=pa.schema([pa.field(name, kind) for name, kind in fields])
        )
        keys = {
            name: np.array(
                [(row["entity"], i) for i, row in enumerate(rows) if row["set"] == name],
                dtype=np.int64,
            ).reshape(-1, 2)
            for name in self.sets
        }
        info = {
            "time": "hours since admission to intensive care",
            "static": list(FACTS),
            "outcomes": [*LABELS.values(), "icu_type"],
            "sets": self.splits,
            "units": plausible.units(),
        }
        return Entities(table, keys, "entity", broken, info=info)

    def _row(self, name: str, record: dict[str, float]) -> Row:
        known = {
            key: value
            for key, value in record.items()
            if value is not None and np.isfinite(value) and value != -1
        }
        whole_number = {
            new: int(known[old]) if old in known else None for old, new in LABELS.items()
        }
        height, weight = (self._measured(key, known.get(key)) for key in ("Height", "Weight"))
        metadata = {
            "Age": known.get("Age"),
            "Gender": GENDERS.get(known.get("Gender", -1)),
            "Height": height,
            "Weight": weight,
            "CareUnit": UNITS.get(known.get("ICUType", -1)),
        }
        return {
            "entity": int(record["RecordID"]),
            "static": metadata,
            **whole_number,
            "icu_type": int(known["ICUType"]) if "ICUType" in known else None,
            "set": name,
            "split": self.splits[name],
        }

    def _measured(self, name: str, value: float | None) -> float | None:
        """Return a static feature within its plausible range, or None."""
        low, valid_low, valid_high, high = self._ranges.known[name]
        return (
            None
            if value is None or not low <= value <= high
            else min(max(value, valid_low), valid_high)
        )

    @property
    def _ranges(self) -> plausible.Ranges:
        if not hasattr(self, "_known_ranges"):
            self._known_ranges = plausible.Ranges()
        return self._known_ranges

    def _of_files(self, name: str, opener: Opener, broken: list[InvalidRow]) -> Iterator[Row]:
        """Return the descriptors of each record (at 00:00), with its outcomes."""
        outcomes = self._outcome_rows(name, opener)
        seen: set[float] = set()
        for place, entry in enumerate(sorted(self._records[name], key=_place), 1):
            record, _, reason = _record(entry, _lines(entry, opener))
            reason = (
                "the same record again" if not reason and record["RecordID"] in seen else reason
            )
            if not reason:
                seen.add(record["RecordID"])
                yield {**record, **outcomes.get(int(record["RecordID"]), {})}
            else:
                broken.append(
                    invalid_row(
                        f"set-{name}: file {place} of {len(self._records[name])}",
                        self.splits[name],
                        reason,
                    )
                )

    def _outcome_rows(self, name: str, opener: Opener) -> dict[int, dict[str, float]]:
        if name not in self._outcomes:
            return {}
        entry = self._outcomes[name]
        table = whole(
            "outcomes",
            entry,
            {
                key: Column("number", key in ("RecordID", "In-hospital_death"))
                for key in ("RecordID", *LABELS)
            },
            opener,
        )
        columns = {key: plausible.numbers(table[key]).values for key in table.column_names}
        return {
            int(number): {key: float(columns[key][i]) for key in LABELS}
            for i, number in enumerate(columns["RecordID"])
            if np.isfinite(number)
        }

    def _of_tables(self, name: str, opener: Opener) -> Iterator[Row]:
        wanted = {
            "recordid": Column("id"),
            **{
                key: Column("number", key == "In-hospital_death")
                for key in (*DESCRIPTORS[1:], *LABELS)
            },
        }
        table = whole("records", self._tables[name][1], wanted, opener)
        columns = {
            key: plausible.numbers(table[key]).values
            for key in table.column_names
            if key != "recordid"
        }
        for i, number in enumerate(table["recordid"].to_pylist()):
            if number is not None:
                yield {
                    "RecordID": number,
                    **{key: float(column[i]) for key, column in columns.items()},
                }

    # ---------------------------------------------------------------- events

    def events(
        self,
        byte_range: ByteRange,
        opener: Opener,
        keys: Any,
        tally: RowCounts,
        dropped: Counter[str],
    ) -> Iterator[Events]:
        known = keys[byte_range.table.removeprefix("set-")]
        if stem(byte_range.entries[0]).startswith("events_"):
            columns = {
                "recordid": Column("id"),
                "minute": Column("number"),
                "parameter": Column("text"),
                "value": Column("number"),
            }
            for batch in batches(byte_range, columns, opener, tally):
                minutes = plausible.numbers(batch["minute"])
                hours = np.where(minutes.reasons == 0, minutes.values / 60, np.nan)
                records = batch["recordid"].combine_chunks().fill_null(-1).to_numpy()
                yield self._clean(
                    records,
                    hours,
                    batch["parameter"],
                    batch["value"],
                    known,
                    byte_range.table,
                    dropped,
                )
            return
        for start in range(0, len(byte_range.entries), 100):
            texts, sizes, ids = [], [], []
            for entry in byte_range.entries[start : start + 100]:
                record, body, reason = _record(entry, _lines(entry, opener))
                if reason:
                    continue
                tally.rows += len(body)
                texts += body
                sizes.append(len(body))
                ids.append(int(record["RecordID"]))
            yield self._of_lines(
                texts,
                np.repeat(np.array(ids, dtype=np.int64), sizes),
                known,
                byte_range.table,
                tally,
                dropped,
            )

    def _of_lines(
        self,
        lines: list[str],
        records: np.ndarray,
        known: np.ndarray,
        table: str,
        tally: RowCounts,
        dropped: Counter[str],
    ) -> Events:
        text = pa.array(lines, pa.string())
        good = np.asarray(pc.match_substring_regex(text, r"^\d+:\d\d,[^,]*,[^,]*$"))
        dropped[f"{table}: {LINE}"] += int(len(good) - np.count_nonzero(good))
        parts = pc.split_pattern(text.filter(pa.array(good)), ",")
        time, names, values = (pc.list_element(parts, i) for i in range(3))
        clock = pc.split_pattern(time, ":")
        hours, minutes = (
            pc.list_element(clock, i).cast(pa.int64()).to_numpy(zero_copy_only=False)
            for i in range(2)
        )
        return self._clean(
            records[good], (hours * 60 + minutes) / 60, names, values, known, table, dropped
        )

    def _clean(
        self,
        records: np.ndarray,
        hours: np.ndarray,
        names: Any,
        texts: Any,
        known: np.ndarray,
        table: str,
        dropped: Counter[str],
    ) -> Events:
        """Return the valid events: of a known record, with a name and a plausible number (-1 is
        unknown).
        """
        numbers = plausible.numbers(texts)
        vocabulary, codes = variable_codes(names)
        at = np.minimum(np.searchsorted(known[:, 0], records), max(0, len(known) - 1))
        rows = (
            np.where(known[at, 0] == records, known[at, 1], -1)
            if len(known)
            else np.full(len(records), -1)
        )
        valid = ValidRows(table, dropped)
        valid.begin(len(records))
        valid.drop("no such record", rows < 0)
        valid.drop("no variable", codes < 0)
        valid.drop("no time", ~np.isfinite(hours))
        valid.drop("unknown (-1)", numbers.values == -1)
        valid.drop_by_code(plausible.REASONS, numbers.reasons)
        good = valid.good
        values, inside = plausible.canonical(
            numbers.values[good], codes[good], vocabulary, self._ranges, dropped, table
        )
        return Events(
            rows[good][inside], hours[good][inside], codes[good][inside], vocabulary, values[inside]
        )


def _place(entry: Entry) -> tuple[str, int, str]:
    """Sort key: the order in an archive, which may only be readable from its start."""
    return entry.uri, entry.offset, entry.name


def _lines(entry: Entry, opener: Opener) -> list[str]:
    """Return a record's lines, or None if it is damaged (no message names it)."""
    try:
        with opener(entry) as handle:
            return handle.read().decode("utf-8", "replace").splitlines()
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return []


def _record(entry: Entry, lines: list[str]) -> tuple[dict[str, float], list[str], str]:
    """Return (the first value of each general descriptor at 00:00, lines of events, "") of a
    record, or ({}, [], why it is invalid).
    """
    if not lines or [part.strip() for part in lines[0].split(",")] != [
        "Time",
        "Parameter",
        "Value",
    ]:
        return {}, [], "no line Time,Parameter,Value at its begin"
    out: dict[str, float] = {}
    events, at = [], 1
    while at < len(lines) and lines[at].startswith("00:00,"):
        name, _, value = lines[at].removeprefix("00:00,").partition(",")
        if name in DESCRIPTORS and name not in out:
            try:
                out[name] = float(value)
            except ValueError:
                return {}, [], f"its {name} is no number"
        else:
            events.append(lines[at])
        at += 1
    match = RECORD.search(entry.name.lower())
    if match is None or out.get("RecordID") != int(match[2]):
        return {}, [], "its RecordID is not that of its file's name"
    return out, [*events, *lines[at:]], ""
