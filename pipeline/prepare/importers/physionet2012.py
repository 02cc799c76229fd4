"""PhysioNet / CinC Challenge 2012: two days of an ICU stay, and whether the patient survived."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import floats
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine.grouped import (
    Entities,
    EventReader,
    Events,
    EventTables,
    GroupedImporter,
    variable_codes,
)
from pipeline.prepare.engine.importing import InvalidRow, Row, first_few, invalid_row
from pipeline.prepare.engine.inputs import TEXT_EXPANSION, InputSplit
from pipeline.prepare.engine.records import index_in_sorted
from pipeline.prepare.readers.archives import Entry, Opener, has_suffix, listing
from pipeline.prepare.readers.csv_blocks import Column, read_table, split_table

RECORD = re.compile(r"(?:^|/)set-([a-z])/(\d+)\.txt$")
OUTCOMES = re.compile(r"(?:^|/)outcomes-([a-z])\.(?:txt|csv)$")
TABLE = re.compile(r"(?:^|/)(events|records)_([a-z])\.(?:parquet|csv|csv\.gz)$")
FILES_PER_TASK = 500
DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType", "Weight")
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
    """PhysioNet/CinC Challenge 2012: the first 48 hours of stays in intensive care.

    It reads the Challenge's folder or archive: set-a/132539.txt, ... and Outcomes-a.txt, also b and
    c. Or the same as tables: events_a.parquet (recordid, minute, parameter, value) and
    records_a.parquet (recordid, the descriptors, the outcomes).

    Columns: entity (RecordID), times, variables, values, events, static (Age, Gender, Height,
    Weight, CareUnit), the outcomes in_hospital_death, length_of_stay, survival, saps, sofa (-1 is
    null), icu_type, and set. Outcomes of a set without them are null.

    - FiO2 is in percent. A pH of 735 is 7.35.
    - Implausible values are left out (clinical/ranges.csv): Temp below 25, a Weight of 0.
    - Weights after the first are events.
    """

    label = "in_hospital_death"

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._ranges = plausible.Ranges()
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
        present = sorted({*self._records, *self._tables})
        if not present:
            raise ValueError(
                f"{source}: neither set-a/NUMBER.txt nor events_a.parquet with "
                "records_a.parquet there; give the Challenge's folder or archive"
            )
        wanted = [name for name in self.splits if name in present]
        if not wanted:
            raise ValueError(
                f"--set split={self.options.split}: none of these sets is there; there are "
                f"{', '.join(present)}"
            )
        self.sets = wanted
        out, notes = [], {}
        for name in wanted:
            files = [
                InputSplit(
                    f"set-{name}",
                    "",
                    entry,
                    size=entry.size * (TEXT_EXPANSION if has_suffix(entry.uri, "gz") else 1),
                )
                for entry in sorted(self._records.get(name, ()), key=_archive_order)
            ]
            out += [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
            if name in self._tables:
                events, _ = self._tables[name]
                out += [[part] for part in split_table(f"set-{name}", events, cut_bytes)]
        if left := [name for name in present if name not in wanted]:
            notes["sets left out"] = first_few(left)
        if bare := [
            name for name in wanted if name in self._records and name not in self._outcomes
        ]:
            notes["sets without an Outcomes file, whose outcomes are null"] = first_few(bare)
        return EventTables(out, f"{found.fingerprint} {plausible.fingerprint()}", notes)

    # ---------------------------------------------------------------- one row a record

    def entities(self, source: str) -> Entities:
        rows: list[Row] = []
        invalid: list[InvalidRow] = []
        with Opener() as opener:
            for name in self.sets:
                found = (
                    _rows_of_numbers(self._tables[name][1], (*DESCRIPTORS, *LABELS), opener)
                    if name in self._tables
                    else self._of_files(name, opener, invalid)
                )
                rows += [{**record, "set": name} for record in found]
        numbers = [(name, pa.float64()) for name in (*DESCRIPTORS, *LABELS)]
        records = pa.Table.from_pylist(rows, schema=pa.schema([("set", pa.string()), *numbers]))
        records = records.sort_by([("set", "ascending"), ("RecordID", "ascending")])
        known = {
            name: pc.if_else(
                pc.and_(pc.is_finite(values), pc.not_equal(values, -1)),
                values,
                None,
            )
            for name, _ in numbers
            for values in [records[name].combine_chunks()]
        }
        facts = {
            "Age": known["Age"],
            "Gender": _decoded(known["Gender"], GENDERS),
            "Height": self._ranges.fact("Height", floats(known["Height"], np.float64)),
            "Weight": self._ranges.fact("Weight", floats(known["Weight"], np.float64)),
            "CareUnit": _decoded(known["ICUType"], UNITS),
        }
        whole_numbers = {"entity": "RecordID", **{new: old for old, new in LABELS.items()}}
        columns = {
            new: known[old].cast(pa.int64(), safe=False)
            for new, old in {**whole_numbers, "icu_type": "ICUType"}.items()
        }
        sets = records["set"].to_pylist()
        table = pa.table(
            {
                "entity": columns.pop("entity"),
                "static": pa.StructArray.from_arrays(list(facts.values()), list(facts)),
                **columns,
                "set": pa.array(sets, pa.string()),
                "split": pa.array([self.splits[name] for name in sets], pa.string()),
            }
        )
        ids, own = table["entity"].to_numpy(), np.array(sets)
        at = {name: np.flatnonzero(own == name) for name in self.sets}
        keys = {name: np.stack([ids[rows], rows], axis=1) for name, rows in at.items()}
        info = {
            "time": "hours since admission to intensive care",
            "static": list(facts),
            "outcomes": list(columns),
            "sets": self.splits,
            "units": plausible.units(),
        }
        return Entities(table, keys, "entity", invalid, info=info)

    def _of_files(self, name: str, opener: Opener, invalid: list[InvalidRow]) -> Iterator[Row]:
        """Yield the descriptors of each record (at 00:00), with its outcomes."""
        outcomes: dict[int, dict[str, float]] = {}
        if name in self._outcomes:
            found = _rows_of_numbers(self._outcomes[name], ("RecordID", *LABELS), opener)
            outcomes = {int(row.pop("RecordID")): row for row in found}
        seen: set[float] = set()
        for place, entry in enumerate(sorted(self._records[name], key=_archive_order), 1):
            record, _, reason = _record(entry, _lines(entry, opener))
            if not reason and record["RecordID"] in seen:
                reason = "the same record again"
            if not reason:
                seen.add(record["RecordID"])
                yield {**record, **outcomes.get(int(record["RecordID"]), {})}
            else:
                file = f"set-{name}: file {place} of {len(self._records[name])}"
                invalid.append(invalid_row(file, self.splits[name], reason))

    # ---------------------------------------------------------------- events

    def events(self, reader: EventReader) -> Iterator[Events]:
        if not TABLE.search(reader.input_split.entry.name.lower()):
            yield from self._of_file(reader)
            return
        columns = {
            "recordid": Column("id"),
            "minute": Column("number"),
            "parameter": Column("text"),
            "value": Column("number"),
        }
        for batch in reader.batches(columns):
            minutes = plausible.numbers(batch["minute"])
            hours = np.where(minutes.reasons == 0, minutes.values / 60, np.nan)
            numbers = batch["recordid"].combine_chunks().fill_null(-1).to_numpy()
            yield self._clean(reader, numbers, hours, batch["parameter"], batch["value"])

    def _of_file(self, reader: EventReader) -> Iterator[Events]:
        """Yield the valid events of the file of a record."""
        record, lines, reason = _record(
            reader.input_split.entry, _lines(reader.input_split.entry, reader.opener)
        )
        if reason:
            return
        reader.tally.rows += len(lines)
        text = pa.array(lines, pa.string())
        text = text.filter(pc.match_substring_regex(text, r"^\d+:\d\d,[^,]*,[^,]*$"))
        reader.count(LINE, len(lines) - len(text))
        time, names, values = (pc.list_element(pc.split_pattern(text, ","), i) for i in range(3))
        hours, minutes = (
            pc.list_element(pc.split_pattern(time, ":"), i).cast(pa.int64()).to_numpy()
            for i in range(2)
        )
        numbers = np.full(len(text), int(record["RecordID"]))
        yield self._clean(reader, numbers, (hours * 60 + minutes) / 60, names, values)

    def _clean(
        self,
        reader: EventReader,
        numbers: np.ndarray,
        hours: np.ndarray,
        names: Any,
        texts: Any,
    ) -> Events:
        """Return the valid events: of a known record, with a name and a plausible number."""
        known = reader.keys[reader.table.removeprefix("set-")]
        found = plausible.numbers(texts)
        vocabulary, codes = variable_codes(names)
        rows = np.append(known[:, 1], -1)[index_in_sorted(known[:, 0], numbers)]
        reader.begin(len(numbers))
        reader.drop("no such record", rows < 0)
        reader.drop("no variable", codes < 0)
        reader.drop("no time", ~np.isfinite(hours))
        reader.drop("unknown (-1)", found.values == -1)
        reader.drop_by_code(plausible.REASONS, found.reasons)
        events = Events(rows, hours, codes, vocabulary, found.values).filter(reader.good)
        return plausible.canonical(events, self._ranges, reader)


def _decoded(codes: pa.Array, names: dict[float, str]) -> pa.Array:
    return pa.array([names.get(code) for code in codes.to_pylist()], pa.string())


def _rows_of_numbers(
    entry: Entry,
    columns: tuple[str, ...],
    opener: Opener,
) -> Iterator[dict[str, float]]:
    """Yield the rows of a table of numbers that have a RecordID; NaN for what is no number."""
    needed = ("RecordID", "In-hospital_death")
    wanted = {name: Column("number", name in needed) for name in columns}
    table = read_table("records", entry, wanted, opener)
    values = [plausible.numbers(table[name]).values.tolist() for name in columns]
    for row in zip(*values, strict=True):
        found = dict(zip(columns, row, strict=True))
        if np.isfinite(found["RecordID"]):
            yield found


def _archive_order(entry: Entry) -> tuple[str, int, str]:
    """Sort key: the order in an archive, which may only be readable from its start."""
    return entry.uri, entry.offset, entry.name


def _lines(entry: Entry, opener: Opener) -> list[str]:
    """Return the lines of a record, an empty list if it is damaged (no message names it)."""
    try:
        with opener(entry) as handle:
            return handle.read().decode("utf-8", "replace").splitlines()
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return []


def _record(entry: Entry, lines: list[str]) -> tuple[dict[str, float], list[str], str]:
    """Return (descriptors at 00:00, lines of events, "") or ({}, [], why it is invalid)."""
    header = [part.strip() for part in lines[0].split(",")] if lines else []
    if header != ["Time", "Parameter", "Value"]:
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
