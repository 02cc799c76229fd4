"""OMOP's common data model: one row a hospital visit, a label or a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import filled
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine import records
from pipeline.prepare.engine.grouped import Entities, EventReader, Events, EventTables
from pipeline.prepare.engine.importing import (
    InvalidRow,
    Notes,
    first_few,
    first_reason,
    invalid_rows,
    is_repeated,
    parse_names,
)
from pipeline.prepare.engine.inputs import InputSplit
from pipeline.prepare.engine.records import (
    DAY,
    HOUR,
    YEAR,
    RecordsImporter,
    Windows,
    index_in_sorted,
    merge_spans,
)
from pipeline.prepare.readers.archives import Opener, listing
from pipeline.prepare.readers.csv_blocks import (
    Column,
    RowCounts,
    batches,
    check_zones,
    find_tables,
    read_schema,
    read_table,
    split_table,
)

EVENTS = {
    "condition_occurrence": ("condition", "condition_start"),
    "drug_exposure": ("drug", "drug_exposure_start"),
    "measurement": ("measurement", "measurement"),
    "observation": ("observation", "observation"),
    "procedure_occurrence": ("procedure", "procedure"),
    "visit_occurrence": ("visit", "visit_start"),
}
"""Tables of events, and how the names of their columns begin: of the concept, and of the time."""
OTHERS = ("person", "death", "concept")
CONDITIONS, VISITS, DEATH = "condition_occurrence", "visit_occurrence", "death"
NO_SPANS = pa.schema([(name, pa.int64()) for name in ("person_id", "first", "last")]).empty_table()
UTC = ("UTC", "Etc/UTC", "GMT", "Z", "+00:00")
"""Zones in which a time that is unknown, 00:00, stays 00:00."""
GENDERS = {8507: "male", 8532: "female"}
DIED = 4216643
"""Concept of discharged_to_concept_id: patient died."""
NO_CONCEPT, NO_TIME, NO_PERSON = "no concept (0)", "no time", "no person_id"
NO_VISIT = "conditions without a visit, or whose visit has no end: they count from their own start"
CHARACTERS = 32
"""A text value of up to so many characters is a category."""


class OmopOptions(Options):
    rows: Literal["visits", "persons"] = Field(
        "visits",
        description="visits: one row a visit, with outcomes that cohorts make labels of; persons: "
        "one row a person, without labels, that ends with the last event",
    )
    labels: str = Field(
        "",
        description="label table with the columns of MEDS (subject_id is person_id, "
        "prediction_time, boolean_value or another value): one row a label instead",
    )
    visits: str = Field(
        "9201,262,8717,32037",
        description="visit_concept_id of the visits that are rows: inpatient, emergency and "
        "inpatient, inpatient hospital, intensive care; empty: all",
    )
    tables: str = Field(
        "condition_occurrence,drug_exposure,measurement,observation,procedure_occurrence,"
        "visit_occurrence",
        description="tables whose events are read",
    )
    conditions: Literal["visit_end", "start"] = Field(
        "visit_end",
        description="when a condition counts as known. visit_end: from the end of its visit, since "
        "many sites code diagnoses at discharge and date them at admission; start: from "
        "condition_start, if your site writes there when the condition became known",
    )
    history: float = Field(
        24.0 * 366,
        gt=0,
        le=24 * 366,
        description="hours before hour 0 from which events enter; modality events reads a year at "
        "most",
    )


class Persons(NamedTuple):
    """Of each person, by sorted id.

    Attributes:
        ids: (n,) int64.
        born: (n,) int64 microseconds since 1970; `known_birth`: (n,) bool.
        gender: (n,) texts, null where unknown.
    """

    ids: np.ndarray
    born: np.ndarray
    known_birth: np.ndarray
    gender: pa.Array


class Concepts(NamedTuple):
    """Names of concepts, such as LOINC/8867-4, by sorted id, and of units (their code alone)."""

    ids: np.ndarray
    names: pa.Array
    codes: pa.Array

    def of(self, ids: Any, column: str = "names") -> pa.Array:
        """Return (n,) texts, null for no concept (0 or null); concept/ID where it is not known."""
        number = filled(ids, 0)
        at = index_in_sorted(self.ids, number)
        known = getattr(self, column).take(pa.array(at, mask=at < 0))
        bare = pc.binary_join_element_wise("concept", pa.array(number).cast(pa.string()), "/")
        return pc.if_else(pa.array(number == 0), None, pc.coalesce(known, bare))


class VisitEnds(NamedTuple):
    """Ends of visits, (n,) int64 microseconds since 1970, by sorted visit_occurrence_id."""

    ids: np.ndarray
    ends: np.ndarray


class TimedRows(NamedTuple):
    """Rows to write, each about one person.

    Attributes:
        persons: (n,) int64 person_id.
        start, zero, end: (n,) int64 microseconds since 1970, as `Windows` takes them.
        columns: further columns; `entity` and `visit` among them where a row is a visit.
        invalid: rows that cannot be used.
    """

    persons: np.ndarray
    start: np.ndarray
    zero: np.ndarray
    end: np.ndarray
    columns: dict[str, pa.Array]
    invalid: list[InvalidRow]


@register("importer", "omop", options=OmopOptions)
class Omop(RecordsImporter):
    """Patients' events from a database of the OMOP common data model.

    It reads tables of versions 5.3 and 5.4 (CSV, also .gz or .zst, or Parquet; names and columns in
    any case): person, visit_occurrence, condition_occurrence, drug_exposure, measurement,
    observation, procedure_occurrence, death, concept.

    Columns: entity (visit_occurrence_id, or person_id), patient (person_id), times (hours; 0 is the
    visit's start, the prediction time, or the last event), variables, values, events, static (Age,
    Gender, Visit), split; of visits also the outcomes hospital_death, death_hours, discharge_hours
    and readmission_days: prepare cohort --set task=mortality --set exclude=none makes a label.
    Events of a visit reach to its end: cohorts cut them.

    Variables are VOCABULARY/CODE of the concept (concept/ID if table concept does not have it), or
    of the source's concept where it is 0: with a number VOCABULARY/CODE: UNIT, so that another unit
    is another variable, with a text or a value's concept VOCABULARY/CODE: VALUE. Events without a
    number have the value 1. A time of 00:00 is a day, and counts from its end: nothing is known
    earlier. A condition counts from the end of its visit_occurrence_id, if that is later than its
    start, unless --set conditions=start. All rows are train: cut by patient.
    """

    kept_reasons = (NO_VISIT,)

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        self.wanted = parse_names(o.tables)
        if unknown := [name for name in self.wanted if name not in EVENTS]:
            raise ValueError(
                f"--set tables={o.tables}: no table of events is called {unknown[0]!r}; they are "
                f"{', '.join(EVENTS)}"
            )
        try:
            self.kinds = [int(number) for number in parse_names(o.visits)]
        except ValueError:
            raise ValueError(
                f"--set visits={o.visits}: write numbers of concepts, such as 9201,262"
            ) from None
        self.label = self.label if self._of_persons else "hospital_death"

    @property
    def _of_persons(self) -> bool:
        return bool(self.options.labels) or self.options.rows == "persons"

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        found = listing(source)
        self._tables = find_tables(found.entries, (*EVENTS, *OTHERS), source)
        needed = {"person": "age and sex"}
        if not self._of_persons:
            needed[VISITS] = "one row a visit (--set rows=persons needs none)"
        for name, purpose in needed.items():
            if name not in self._tables:
                raise ValueError(
                    f"{source}: no table {name} (.csv, .csv.gz or .parquet), which is needed for "
                    f"{purpose}; there are {', '.join(sorted(self._tables)) or 'none'}"
                )
        taken = [name for name in self.wanted if name in self._tables]
        if self._of_persons and DEATH in self._tables:
            taken.append(DEATH)
        if not set(taken) - {VISITS, DEATH}:
            raise ValueError(self._no_events(source))
        self._parts = [
            part for name in taken for part in split_table(name, self._tables[name], cut_bytes)
        ]
        absent = [name for name in (*EVENTS, *OTHERS) if name not in self._tables]
        notes = {"tables that are not there": ", ".join(absent)} if absent else {}
        fingerprint = f"{found.fingerprint} {self.labels.fingerprint if self.labels else ''}"
        return EventTables([[part] for part in self._parts], fingerprint, notes)

    def _no_events(self, source: str) -> str:
        """Return what is wrong, and the fix, where no table of events is left to be read."""
        wanted = [name for name in self.wanted if name != VISITS]
        others = [name for name in EVENTS if name != VISITS]
        if not wanted:
            return (
                f"--set tables={self.options.tables}: visits alone say nothing of what happened in "
                f"them; name tables of events too: {', '.join(others)}"
            )
        present = [name for name in others if name in self._tables]
        instead = f", or --set tables={','.join(present)}" if present else ""
        return (
            f"{source}: no table of events is there: --set tables wants {', '.join(wanted)}, and "
            f"there are {', '.join(sorted(self._tables))}; give the folder that holds one of them "
            f"(.csv, .csv.gz or .parquet){instead}"
        )

    @property
    def _reads_visits(self) -> bool:
        is_needed = not self._of_persons or VISITS in self.wanted or self._dates_by_visit
        return is_needed and VISITS in self._tables

    @property
    def _dates_by_visit(self) -> bool:
        """Whether conditions count from the end of their visit."""
        return CONDITIONS in self.wanted and self.options.conditions == "visit_end"

    # ---------------------------------------------------------------- rows

    def entities(self, source: str) -> Entities:
        notes: Notes = {}
        self._zoned: dict[str, set[bool]] = {}
        with Opener() as opener:
            self._check_midnights(opener)
            persons = self._persons(opener)
            visits = self._visits(opener) if self._reads_visits else None
            ends = self._visit_ends(visits)
            used, spans = self._used(ends)
            if visits is not None:
                used = np.append(used, filled(visits["visit_concept_id"].unique(), -1))
            concepts = self._concepts(np.unique(used), opener)
            timed = (
                self._person_rows(spans, notes)
                if self._of_persons or visits is None
                else self._visit_rows(visits, persons, concepts, opener)
            )
        if not len(timed.persons) and not timed.invalid:
            raise ValueError(
                f"{source}: no person has an event with a time; download the tables again"
            )
        at = index_in_sorted(persons.ids, timed.persons)
        fields = {"Age": _age(persons, at, timed.zero), "Gender": persons.gender.take(_index(at))}
        columns = dict(timed.columns)
        if "visit" in columns:
            fields["Visit"] = columns.pop("visit")
        rows = pa.table(
            {
                "entity": columns.pop("entity", pa.array(timed.persons)),
                "patient": pa.array(timed.persons),
                "static": pa.StructArray.from_arrays(list(fields.values()), list(fields)),
                **columns,
                "split": pa.array(["train"] * len(timed.persons), pa.string()),
            }
        )
        info = {
            "time": "hours since the start of the visit"
            if not self._of_persons
            else "hours before the prediction time, which is 0"
            if self.labels
            else "hours before the person's last event, which is 0",
            "static": list(fields),
            "outcomes": [name for name in columns if name != "prediction_time"],
            "history": self.options.history,
            "conditions": self.options.conditions,
        }
        notes = {"persons": len(persons.ids), **{name: n for name, n in notes.items() if n}}
        windows = Windows(timed.persons, timed.start, timed.zero, timed.end)
        keys = {"windows": windows, "concepts": concepts, "ends": ends}
        return Entities(rows, keys, "patient", timed.invalid, notes, info)

    def _check_midnights(self, opener: Opener) -> None:
        """Raise ValueError for times in a zone in which an unknown time (00:00) is not 00:00 UTC.

        Texts with a zone are refused anyway: the days beside them have none.
        """
        times_read = {name: [EVENTS[name][1]] for name in self.wanted}
        times_read |= {DEATH: [DEATH]}
        times_read |= {VISITS: ["visit_start", "visit_end"]} if self._reads_visits else {}
        for name in sorted(times_read.keys() & self._tables.keys()):
            entry = self._tables[name]
            columns = {column for time in times_read[name] for column in _times(time)}
            for field in read_schema(entry, opener):
                zone = field.type.tz if pa.types.is_timestamp(field.type) else None
                if zone and zone not in UTC and field.name.strip().lower() in columns:
                    raise ValueError(
                        f"{entry.name}: column {field.name!r} has times in the zone {zone}. OMOP "
                        "writes 00:00 where the time is unknown, which would be another time in "
                        "UTC; write local times without a zone, in all tables"
                    )

    def _check_zones(self, table: str, zoned: set[bool]) -> None:
        """Raise ValueError where the times of two tables differ in whether they have a zone.

        `zoned`: as `_zones` gives it.
        """
        for other, of_other in self._zoned.items():
            check_zones(self._tables[table].name, zoned, self._tables[other].name, of_other)
        self._zoned.setdefault(table, set()).update(zoned)

    def _person_rows(self, spans: pa.Table, notes: Notes) -> TimedRows:
        """Return a row for each label that can be used, or for each person."""
        rows, invalid = self.rows_of_persons(spans, "persons", notes)
        zero = rows["prediction_time"].cast(pa.int64()).to_numpy()
        own = ["prediction_time", "label"] if self.labels else []
        columns = {name: rows[name].combine_chunks() for name in own}
        persons = rows["patient"].to_numpy()
        return TimedRows(persons, zero - self.history, zero, zero, columns, invalid)

    def _visit_rows(
        self, table: pa.Table, persons: Persons, concepts: Concepts, opener: Opener
    ) -> TimedRows:
        """Return a row for each visit that can be used, with its outcomes."""
        entry = self._tables[VISITS]
        start, started = _moments(table, "visit_start", at_end=False)
        end, ended = _moments(table, "visit_end")
        visit, person, kind = (
            filled(table[name], -1)
            for name in ("visit_occurrence_id", "person_id", "visit_concept_id")
        )
        wanted = np.isin(kind, self.kinds) if self.kinds else np.ones(len(table), dtype=bool)
        if not wanted.any():
            kinds = Counter(kind.tolist()).most_common()
            raise ValueError(
                f"{entry.name}: no visit has one of the concepts --set "
                f"visits={self.options.visits}; there are "
                f"{first_few(f'{name} ({count})' for name, count in kinds)}"
            )
        reasons = first_reason(
            (table["visit_occurrence_id"].is_null().to_numpy(), "no visit_occurrence_id"),
            (is_repeated(visit), "the same visit_occurrence_id again"),
            (index_in_sorted(persons.ids, person) < 0, "no such person in table person"),
            (~(started & ended), "no start or no end"),
            (end < start, "its end is before its start"),
        )
        invalid = invalid_rows(entry.name, "train", np.where(wanted, reasons, ""))
        kept = np.flatnonzero(wanted & (reasons == ""))
        kept = kept[np.lexsort((visit[kept], end[kept], person[kept]))]
        visit, person, start, end = visit[kept], person[kept], start[kept], end[kept]
        to = pc.coalesce(table["discharged_to_concept_id"], table["discharge_to_concept_id"])
        columns = {
            "entity": pa.array(visit),
            "visit": concepts.of(table["visit_concept_id"].combine_chunks().take(pa.array(kept))),
            **self._outcomes(person, start, end, filled(to, -1)[kept] == DIED, opener),
        }
        return TimedRows(person, start - self.history, start, end, columns, invalid)

    def _outcomes(
        self,
        person: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        discharged_dead: np.ndarray,
        opener: Opener,
    ) -> dict[str, pa.Array]:
        """Return the outcomes of visits, which are sorted by person and end.

        Where no time of death is known, a death on the day of discharge is one in the hospital, and
        counts at the end of its day, but not after the visit. The next visit is the first that
        starts after the end: one within this visit, as in intensive care, is no readmission.
        """
        ids, earliest, latest = self._deaths(opener)
        at = np.where(index_in_sorted(ids, person) < 0, len(ids), index_in_sorted(ids, person))
        began, death = (np.append(times, 0)[at] for times in (earliest, latest))
        known = (at < len(ids)) & (death >= start)
        # An end of 24:00 is before the next day, although the times are equal
        is_before = (began < end) | ((began == end) & (end % DAY != 0))
        in_hospital = discharged_dead | (known & is_before)
        death = np.where(in_hospital, np.where(known, np.minimum(death, end), end), death)
        readmission = _days_to_next(person, start, end)
        return {
            "hospital_death": pa.array(in_hospital.astype(np.int64)),
            "death_hours": pa.array((death - start) / HOUR, mask=~(known | in_hospital)),
            "discharge_hours": pa.array((end - start) / HOUR),
            "readmission_days": pa.array(readmission, mask=np.isnan(readmission)),
        }

    # ---------------------------------------------------------------- tables

    def _persons(self, opener: Opener) -> Persons:
        columns = {
            **dict.fromkeys(("person_id", "gender_concept_id", "year_of_birth"), Column("id")),
            **dict.fromkeys(("month_of_birth", "day_of_birth"), Column("id", False)),
            "birth_datetime": Column("moment", False),
        }
        table = read_table("person", self._tables["person"], columns, opener)
        table = table.filter(pc.is_valid(table["person_id"])).sort_by("person_id")
        year, month, day = (
            table[name].combine_chunks()
            for name in ("year_of_birth", "month_of_birth", "day_of_birth")
        )
        # The middle of what is not known
        months = (filled(year, 1970) - 1970) * 12 + np.clip(filled(month, 7), 1, 12) - 1
        days = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
        days += np.clip(filled(day, 15), 1, 31) - 1
        days = np.where(np.asarray(month.is_null()), days - 14, days)
        moment = _microseconds(table["birth_datetime"])
        born = np.where(np.asarray(moment.is_valid()), filled(moment, 0), days * DAY)
        known = np.asarray(moment.is_valid()) | np.asarray(year.is_valid())
        gender = [GENDERS.get(number) for number in table["gender_concept_id"].to_pylist()]
        return Persons(
            filled(table["person_id"], -1),
            born,
            known,
            pa.array(gender, pa.string()),
        )

    def _deaths(self, opener: Opener) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sorted persons who died, and the earliest and latest time of each death.

        They differ where only the day is known. Microseconds since 1970.
        """
        if DEATH not in self._tables:
            nobody = np.empty(0, dtype=np.int64)
            return nobody, nobody, nobody
        columns, tally = {"person_id": Column("id"), **_times(DEATH)}, RowCounts()
        table = read_table(DEATH, self._tables[DEATH], columns, opener, tally)
        table = table.filter(pc.is_valid(table["person_id"]))
        latest, known = _moments(table, DEATH)
        earliest, _ = _moments(table, DEATH, at_end=False)
        self._check_zones(DEATH, _zones(tally, earliest))
        ids, first = np.unique(filled(table["person_id"], -1)[known], return_index=True)
        return ids, earliest[known][first], latest[known][first]

    def _visits(self, opener: Opener) -> pa.Table:
        """Read table visit_occurrence."""
        columns = {
            **dict.fromkeys(("visit_occurrence_id", "person_id", "visit_concept_id"), Column("id")),
            **_times("visit_start"),
            **_times("visit_end"),
            "discharged_to_concept_id": Column("id", False),
            "discharge_to_concept_id": Column("id", False),
        }
        tally = RowCounts()
        table = read_table(VISITS, self._tables[VISITS], columns, opener, tally)
        times = [_moments(table, name)[0] for name in ("visit_start", "visit_end")]
        self._check_zones(VISITS, _zones(tally, np.concatenate(times)))
        return table

    def _visit_ends(self, visits: pa.Table | None) -> VisitEnds | None:
        """Return the ends of visits, from which their conditions count; None if these do not."""
        if not self._dates_by_visit:
            return None
        if visits is None:
            return VisitEnds(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        end, has_end = _moments(visits, "visit_end")
        good = has_end & np.asarray(visits["visit_occurrence_id"].combine_chunks().is_valid())
        ids, first = np.unique(filled(visits["visit_occurrence_id"], -1)[good], return_index=True)
        return VisitEnds(ids, end[good][first])

    def _used(self, ends: VisitEnds | None) -> tuple[np.ndarray, pa.Table]:
        """Read all events once.

        Returns:
            (the ids of all concepts; of each person the first and the last time).
        """
        ids, spans = [np.empty(0, dtype=np.int64)], [NO_SPANS]
        found = threaded_map(partial(_used_by, ends), self._parts, threads=4)
        for part, (concepts, span, zoned) in zip(self._parts, found, strict=True):
            self._check_zones(part.name, zoned)
            ids.append(concepts)
            spans.append(span)
        return np.concatenate(ids), merge_spans(spans)

    def _concepts(self, used: np.ndarray, opener: Opener) -> Concepts:
        """Return the names of concepts: of those that are used alone, as there are millions."""
        found = []
        if "concept" in self._tables:
            columns = {
                "concept_id": Column("id"),
                "vocabulary_id": Column("text"),
                "concept_code": Column("text"),
            }
            table = InputSplit("concept", "", self._tables["concept"])
            for batch in batches(table, columns, opener, RowCounts()):
                found.append(batch.filter(pc.is_in(batch["concept_id"], value_set=pa.array(used))))
        if not found:
            nothing = pa.array([], pa.string())
            return Concepts(np.empty(0, dtype=np.int64), nothing, nothing)
        table = pa.concat_tables(found).sort_by("concept_id").combine_chunks()
        vocabulary, code = (
            table[name].combine_chunks() for name in ("vocabulary_id", "concept_code")
        )
        return Concepts(
            filled(table["concept_id"], -1),
            pc.binary_join_element_wise(vocabulary, code, "/"),
            code,
        )

    # ---------------------------------------------------------------- events

    def events(self, reader: EventReader) -> Iterator[Events]:
        windows, concepts = reader.keys["windows"], reader.keys["concepts"]
        for batch, person, time in _timed(reader):
            time = _known_times(reader.keys["ends"], batch, time, reader)
            if reader.table == DEATH:
                codes, values = np.zeros(len(batch), dtype=np.int64), np.ones(len(batch))
                yield from windows.events(person, time, codes, [DEATH], values, reader)
                continue
            name = concepts.of(batch["concept"].combine_chunks())
            has_concept = pc.is_valid(name)
            reader.count(NO_CONCEPT, name.null_count)
            batch, name = batch.filter(has_concept), name.filter(has_concept)
            text = pc.coalesce(
                concepts.of(batch["value_as_concept_id"].combine_chunks()),
                batch["value_as_string"].combine_chunks(),
            )
            named = records.name_events(
                name,
                batch["value_as_number"],
                text,
                concepts.of(batch["unit_concept_id"].combine_chunks(), "codes"),
                CHARACTERS,
                reader.dropped,
            )
            kept = np.asarray(has_concept)
            yield from windows.events(person[kept], time[kept], *named, reader)


def _times(name: str) -> dict[str, Column]:
    return {f"{name}_date": Column("moment"), f"{name}_datetime": Column("moment", False)}


def _moments(
    table: pa.Table,
    name: str,
    at_end: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ((n,) int64 microseconds since 1970, (n,) whether there is a time).

    OMOP writes 00:00 for a time that is unknown: that is a day, which counts from its end, or with
    `at_end` false from its start.
    """
    found = pc.coalesce(*(_microseconds(table[f"{name}_{kind}"]) for kind in ("datetime", "date")))
    time = filled(found, 0)
    is_day = time % DAY == 0
    return np.where(is_day & at_end, time + DAY, time), np.asarray(found.is_valid())


def _zones(tally: RowCounts, times: np.ndarray) -> set[bool]:
    """Return whether the times of rows have a zone; an empty set for days alone, which need none.

    Args:
        tally: of the rows.
        times: (n,) int64 microseconds since 1970.
    """
    return tally.zoned if np.any(times % DAY) else set()


def _timed(reader: EventReader) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """Yield (rows, persons, times) of a piece of a table of events, in batches.

    Rows have the columns concept, unit_concept_id, value_as_number, value_as_concept_id and
    value_as_string. Those without a person or time are counted.
    """
    name, time_name = EVENTS.get(reader.table, (DEATH, DEATH))
    columns = {"person_id": Column("id"), **_times(time_name)}
    if reader.table != DEATH:
        columns |= {
            f"{name}_concept_id": Column("id"),
            f"{name}_source_concept_id": Column("id", False),
            "unit_concept_id": Column("id", False),
            "value_as_number": Column("number", False),
            "value_as_concept_id": Column("id", False),
            "value_as_string": Column("text", False),
        }
    if reader.table == CONDITIONS:
        columns["visit_occurrence_id"] = Column("id", False)
    for batch in reader.batches(columns):
        time, known = _moments(batch, time_name)
        person = batch["person_id"].combine_chunks()
        has_person = np.asarray(person.is_valid())
        reader.count(NO_PERSON, int(np.count_nonzero(~has_person)))
        reader.count(NO_TIME, int(np.count_nonzero(has_person & ~known)))
        if reader.table != DEATH:
            concept = batch[f"{name}_concept_id"]
            is_mapped = pc.not_equal(concept.fill_null(0), 0)
            concept = pc.if_else(is_mapped, concept, batch[f"{name}_source_concept_id"])
            batch = batch.append_column("concept", concept)
        good = has_person & known
        yield batch.filter(pa.array(good)), filled(person, -1)[good], time[good]


def _known_times(
    ends: VisitEnds | None,
    batch: pa.Table,
    time: np.ndarray,
    reader: EventReader,
) -> np.ndarray:
    """Return (n,) when events were known: a condition at its time (n,) or, if later, at the end of
    its visit. Conditions without such a visit are counted.
    """
    if ends is None or reader.table != CONDITIONS:
        return time
    at = index_in_sorted(ends.ids, filled(batch["visit_occurrence_id"], -1))
    reader.dropped[NO_VISIT] += int(np.count_nonzero(at < 0))
    return np.where(at < 0, time, np.maximum(time, np.append(ends.ends, 0)[at]))


def _used_by(
    ends: VisitEnds | None,
    part: InputSplit,
) -> tuple[np.ndarray, pa.Table, set[bool]]:
    """Return (concepts, first and last time of each person, timezone awareness) of a piece."""
    ids, spans = [np.empty(0, dtype=np.int64)], [NO_SPANS]
    zoned: set[bool] = set()
    with Opener() as opener:
        reader = EventReader(part, opener)
        for batch, person, time in _timed(reader):
            zoned |= _zones(reader.tally, time)
            time = _known_times(ends, batch, time, reader)
            spans.append(pa.table({"person_id": person, "first": time, "last": time}))
            spans = [merge_spans(spans)] if len(spans) > 50 else spans
            for name in ("concept", "unit_concept_id", "value_as_concept_id"):
                if name in batch.column_names:
                    ids.append(filled(batch[name].drop_null().unique(), -1))
    return np.unique(np.concatenate(ids)), merge_spans(spans), zoned


def _days_to_next(person: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return (n,) days from the end of each visit to the person's next start, NaN without one."""
    if not len(person):
        return np.empty(0)
    # One sorted key for (person, time), as in `Windows`
    times, ranks = np.unique(np.append(start, end), return_inverse=True)
    begin = np.unique(person, return_inverse=True)[1] * len(times)
    starts, ends = begin + ranks[: len(start)], begin + ranks[len(start) :]
    order = np.argsort(starts, kind="stable")
    after_itself = np.argsort(order) + 1  # a visit of no length starts at its own end
    place = np.maximum(np.searchsorted(starts[order], ends), after_itself)
    following = order[np.minimum(place, len(order) - 1)]
    is_one = (place < len(order)) & (person[following] == person)
    return np.where(is_one, (start[following] - end) / DAY, np.nan)


def _age(persons: Persons, at: np.ndarray, zero: np.ndarray) -> pa.Array:
    """Return (n,) ages in years at times, null where the birth is unknown or later."""
    if not len(persons.ids):
        return pa.nulls(len(at), pa.float64())
    age = (zero - persons.born[at]) / YEAR
    return pa.array(age, mask=(at < 0) | ~persons.known_birth[at] | (age < 0))


def _index(at: np.ndarray) -> pa.Array:
    return pa.array(at, mask=at < 0)


def _microseconds(column: Any) -> Any:
    """Return times as int64; a column that the table lacks has null times."""
    return column.cast(pa.int64()).combine_chunks()
