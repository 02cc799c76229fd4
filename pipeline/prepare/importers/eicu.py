"""The eICU Collaborative Research Database 2.0: one row a unit stay, with all events up to its end.

Tables and columns are those of github.com/MIT-LCP/eicu-code (Pollard et al. 2018, The eICU
Collaborative Research Database, doi 10.1038/sdata.2018.178). This was tried on other real records
in that layout, not on eICU itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config.registry import register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes, filled
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine.grouped import (
    Entities,
    EventReader,
    Events,
    EventTables,
    GroupedImporter,
)
from pipeline.prepare.engine.importing import Notes, first_reason, invalid_rows, is_repeated
from pipeline.prepare.engine.inputs import plain_suffix
from pipeline.prepare.engine.records import index_in_sorted
from pipeline.prepare.readers.archives import Entry, Opener, listing
from pipeline.prepare.readers.csv_blocks import (
    SUFFIXES,
    Column,
    find_tables,
    read_table,
    split_table,
    table_name,
)

OFFSETS = {
    "vitalperiodic": ("observationoffset",),
    "vitalaperiodic": ("observationoffset",),
    "lab": ("labresultoffset", "labresultrevisedoffset"),
    "nursecharting": ("nursingchartoffset", "nursingchartentryoffset"),
    "respiratorycharting": ("respchartoffset", "respchartentryoffset"),
    "intakeoutput": ("intakeoutputoffset", "intakeoutputentryoffset"),
    "infusiondrug": ("infusionoffset",),
    "medication": ("drugstartoffset", "drugorderoffset"),
}
"""Tables of events and the columns of their times, in minutes since admission to the unit.

The latest of a row counts: a result that was drawn earlier than it was entered was not known.
"""
CHARTS = {
    "nursecharting": (
        "nursingchartcelltypevallabel",
        "nursingchartcelltypevalname",
        "nursingchartvalue",
    ),
    "respiratorycharting": ("respchartvaluelabel", "respchartvalue"),
}
"""Tables of charted texts: the columns that together name an item, then that of its value."""
OTHER_DATABASES = {"icustays": "mimic3 or mimic4", "person": "omop"}
"""Tables that eICU does not have, and what reads the databases that do."""
PATIENT = {
    "patientunitstayid": Column("id"),
    "patienthealthsystemstayid": Column("id"),
    "uniquepid": Column("text"),
    "hospitalid": Column("id"),
    "gender": Column("text"),
    "age": Column("number"),
    "admissionheight": Column("number", False),
    "admissionweight": Column("number", False),
    "hospitaladmitoffset": Column("id"),
    "hospitaldischargeoffset": Column("id"),
    "hospitaldischargestatus": Column("text"),
    "unittype": Column("text"),
    "unitadmitsource": Column("text", False),
    "unitstaytype": Column("text", False),
    "unitdischargeoffset": Column("id"),
    "unitdischargestatus": Column("text"),
}
GENDERS = {"female": "female", "male": "male"}
STATUSES = {"alive": 0, "expired": 1}
CARE_UNITS = {"Cardiac ICU": "CCU", "CSICU": "CSRU", "CTICU": "CSRU"}
"""Types of units that MIMIC-III has under another name."""
OLDEST = 90
"""The age of patients above 89, whose age eICU does not give."""
FLUIDS = {"intake (ml)": "input: ", "output (ml)": "output: "}
"""What fluids are called that `eicu_items.csv` does not name."""
URINE = re.compile(
    r"output \(ml\)\|"
    r"(foley(?!.*(pacu|or|ir))"
    r"|output.*(urinary catheter|urethral catheter|external urethral)"
    r"|urinary catheter output"
    r"|urine output \(ml\))",
    re.IGNORECASE,
)
"""Beginnings of further names of urine in intakeOutput, as in pivoted-uo.sql of eicu-code.

What a Foley catheter gave in the operating or recovery room is not among them, nor irrigation.
"""
NO_STAY = "no such stay"
NO_TIME = "no time"
OUTSIDE = "outside the stay"
UNKNOWN = "unknown item"


class Stays(NamedTuple):
    """What finds the stay of an event.

    Attributes:
        ids: (n,) int64, the sorted patientunitstayid.
        first: (n,) int64, minutes of the earliest event: the admission to the hospital, where that
            is known and was before the one to the unit.
        last: (n,) int64, minutes of the latest event: the end of the stay.
    """

    ids: np.ndarray
    first: np.ndarray
    last: np.ndarray


@register("importer", "eicu")
class Eicu(GroupedImporter):
    """eICU: stays in intensive care, of many hospitals, as events.

    It reads eICU's folder: patient, and as far as they are there vitalPeriodic, vitalAperiodic,
    lab, nurseCharting, respiratoryCharting, intakeOutput, infusionDrug, medication (.csv, .csv.gz
    or .parquet; names, headers and columns in any case and order). Other tables (diagnoses, notes,
    APACHE's scores, ...) are not read. It was tried on other real records in this layout, not on
    eICU itself.

    Columns, with the meaning that they have in mimic3:

    - entity (patientunitstayid), patient (uniquepid), hospital (hospitalid)
    - times (hours since admission to the unit), variables, values, events
    - static: Age (90 for those above 89), Gender, CareUnit, AdmissionSource, Height, Weight. Height
      and Weight that were swapped are put right, and heights in metres converted; both are counted.
    - the outcomes hospital_death, icu_death, death_hours (the discharge of those who died),
      icu_hours, discharge_hours, care_unit, stay_type, stays_in_admission, transfers (0: another
      unit is another stay)

    Rules:

    - Events from before the hospital admission or after the unit's end are left out.
    - Items are named by clinical/eicu_items.csv (urine also by the beginnings of its names, as in
      eicu-code), values checked by clinical/ranges.csv, and units of lab converted by
      clinical/units.csv. What they do not know is left out and counted.
    - Drugs are called drug: NAME (orders that were not cancelled), infusions infusion: NAME, with
      their rate, and fluids input: NAME and output: NAME, in mL.
    - A result counts from when it was entered: nothing is known earlier.
    - All rows are train: cut by patient or by hospital.
    """

    label = "hospital_death"

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._ranges = plausible.Ranges()
        self._units = plausible.Units()
        self._unit_of = plausible.units()
        self._items: dict[str, dict[str, str]] = {}
        for row in plausible.rows_of("eicu_items.csv"):
            item = row["item"].lower()
            self._items.setdefault(row["table"], {})[item] = row["variable"]

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        found = listing(source)
        self._tables = _find_tables(found.entries, source)
        pieces = [
            [part]
            for name in OFFSETS
            if name in self._tables
            for part in split_table(name, self._tables[name], cut_bytes)
        ]
        absent = [name for name in OFFSETS if name not in self._tables]
        return EventTables(
            pieces,
            f"{found.fingerprint} {plausible.fingerprint()}",
            {"tables that are not there": ", ".join(absent)} if absent else {},
        )

    # ---------------------------------------------------------------- one row a stay

    def entities(self, source: str) -> Entities:
        entry = self._tables["patient"]
        with Opener() as opener:
            table = read_table("patient", entry, PATIENT, opener)
        reasons = _unusable(table)
        stays = table.filter(pa.array(reasons == ""))
        stays = stays.sort_by("patientunitstayid").combine_chunks()
        age = plausible.numbers(stays["age"])
        height, weight, mended = _heights_and_weights(stays)
        years = np.where(age.censored, OLDEST, age.values)
        static = {
            "Age": pa.array(years, mask=np.isnan(years)),
            "Gender": _mapped(stays["gender"], GENDERS),
            "CareUnit": _care_units(stays["unittype"]),
            "AdmissionSource": stays["unitadmitsource"].combine_chunks(),
            "Height": self._ranges.fact("Height", height),
            "Weight": self._ranges.fact("Weight", weight),
        }
        outcomes = _outcomes(stays, _stays_in_admission(table, stays))
        names, columns = list(static), list(static.values())
        splits = ["train"] * len(stays)
        rows = pa.table(
            {
                "entity": stays["patientunitstayid"],
                "patient": stays["uniquepid"],
                "hospital": stays["hospitalid"],
                "static": pa.StructArray.from_arrays(columns, names),
                **outcomes,
                "split": pa.array(splits, pa.string()),
            }
        )
        info = {
            "time": "hours since admission to the unit",
            "static": names,
            "outcomes": list(outcomes),
            "units": self._unit_of,
        }
        notes = {
            "stays": len(stays),
            "patients": pc.count_distinct(stays["uniquepid"]).as_py(),
            "hospitals": pc.count_distinct(stays["hospitalid"]).as_py(),
            f"ages above 89, taken as {OLDEST}": int(np.count_nonzero(age.censored)),
            **mended,
        }
        keys = Stays(
            filled(stays["patientunitstayid"], -1),
            np.minimum(filled(stays["hospitaladmitoffset"], 0), 0),
            filled(stays["unitdischargeoffset"], 0),
        )
        invalid = invalid_rows(entry.name, "train", reasons)
        return Entities(rows, keys, "patient", invalid, notes, info)

    # ---------------------------------------------------------------- events

    def events(self, reader: EventReader) -> Iterator[Events]:
        readers = {
            "vitalperiodic": self._vital_signs,
            "vitalaperiodic": self._vital_signs,
            "lab": self._laboratory_values,
            "nursecharting": self._charted_values,
            "respiratorycharting": self._charted_values,
            "intakeoutput": self._fluids,
            "infusiondrug": self._infusions,
            "medication": self._drugs,
        }
        return readers[reader.table](reader)

    def _vital_signs(self, reader: EventReader) -> Iterator[Events]:
        """Yield the cells of a table that has a column for each variable; most are empty."""
        items = self._items[reader.table]
        columns = dict.fromkeys(items, Column("number", False))
        for batch, rows, hours in _batches(reader, columns):
            for item, variable in items.items():
                cells = batch[item].combine_chunks()
                has_value = cells.is_valid()
                here = np.asarray(has_value)
                values = cells.filter(has_value)
                codes = np.zeros(len(values), dtype=np.int64)
                yield self._plausible_events(
                    reader, rows[here], hours[here], codes, [variable], values
                )

    def _laboratory_values(self, reader: EventReader) -> Iterator[Events]:
        columns = {
            "labname": Column("text"),
            "labresult": Column("number"),
            "labresulttext": Column("text", False),
            "labmeasurenamesystem": Column("text", False),
        }
        known = self._items[reader.table]
        for batch, rows, hours in _batches(reader, columns):
            written_units = pc.fill_null(batch["labmeasurenamesystem"], "")
            item = pc.binary_join_element_wise(batch["labname"], written_units, "|")
            codes, texts = _distinct(item)
            names, factors = [], []
            for text in texts:
                lab, _, written = text.rpartition("|")
                name = known.get(lab.strip().lower(), "")
                unit = self._unit_of.get(name, "")
                names.append(name)
                factors.append(self._units.factor(written, name, unit, ""))
            number = batch["labresult"].cast(pa.string())
            values = pc.coalesce(number, batch["labresulttext"])  # such as >600
            yield self._plausible_events(reader, rows, hours, codes, names, values, factors)

    def _charted_values(self, reader: EventReader) -> Iterator[Events]:
        *labels, value = CHARTS[reader.table]
        columns = dict.fromkeys(CHARTS[reader.table], Column("text"))
        known = self._items[reader.table]
        for batch, rows, hours in _batches(reader, columns):
            item = pc.binary_join_element_wise(*(batch[label] for label in labels), "|")
            values = pc.replace_substring_regex(batch[value], r"\s*%\s*$", "")
            codes, texts = _distinct(item)
            names = [known.get(text.lower(), "") for text in texts]
            yield self._plausible_events(reader, rows, hours, codes, names, values)

    def _fluids(self, reader: EventReader) -> Iterator[Events]:
        columns = {"cellpath": Column("text"), "cellvaluenumeric": Column("number")}
        known = self._items[reader.table]
        for batch, rows, hours in _batches(reader, columns):
            item = pc.replace_substring_regex(batch["cellpath"], r"^.*\|I&O\|", "")
            codes, texts = _distinct(item)
            names = [known.get(text.lower()) or _fluid_name(text) for text in texts]
            values = batch["cellvaluenumeric"]
            yield self._plausible_events(reader, rows, hours, codes, names, values)

    def _infusions(self, reader: EventReader) -> Iterator[Events]:
        columns = {"drugname": Column("text"), "drugrate": Column("number")}
        for batch, rows, hours in _batches(reader, columns):
            codes, texts = _distinct(batch["drugname"])
            names = [f"infusion: {text}" for text in texts]
            values = batch["drugrate"]
            yield self._plausible_events(reader, rows, hours, codes, names, values)

    def _drugs(self, reader: EventReader) -> Iterator[Events]:
        """Yield orders that were not cancelled, from when they were written and the drug started.

        A start of 0 is an unknown one (MIT-LCP/eicu-code, pivoted-med.sql).
        """
        columns = {
            "drugname": Column("text"),
            "drughiclseqno": Column("id", False),
            "drugordercancelled": Column("text"),
        }
        for batch, rows, hours in _batches(reader, columns):
            number = batch["drughiclseqno"].cast(pa.string())
            other_name = pc.binary_join_element_wise("HICL", number, " ")
            codes, texts = _distinct(pc.coalesce(batch["drugname"], other_name))
            names = [f"drug: {text}" for text in texts]
            is_cancelled = filled(_mapped(batch["drugordercancelled"], {"yes": 1}), 0) == 1
            has_no_start = filled(batch["drugstartoffset"], 0) == 0
            reader.begin(len(batch))
            reader.drop("cancelled", is_cancelled)
            reader.drop(NO_TIME, has_no_start)
            reader.drop("no drug", codes < 0)
            yield Events(rows, hours, codes, names, np.ones(len(rows))).filter(reader.good)

    def _plausible_events(
        self,
        reader: EventReader,
        rows: np.ndarray,
        hours: np.ndarray,
        codes: np.ndarray,
        names: list[str],
        numbers: Any,
        unit_factors: list[float] | None = None,
    ) -> Events:
        """Return the events of known items with plausible numbers; the others are counted.

        Args:
            reader: takes the counts.
            rows, hours: (n,) stays and times of the events.
            codes: (n,) their variables as positions in `names`, -1 for none.
            names: of the variables; "" for an unknown item.
            numbers: (n,) numbers or texts.
            unit_factors: of each name what its numbers are multiplied by; NaN for an unknown unit.
        """
        found = plausible.numbers(numbers)
        factor_of_name = unit_factors or [1.0] * len(names)
        factors = np.array([*factor_of_name, 1.0])[codes]  # code -1 is the last one
        is_amount = np.array([*(": " in name for name in names), False])[codes]
        is_known = np.array([*map(bool, names), False])[codes]
        reader.begin(len(rows))
        reader.drop(UNKNOWN, ~is_known)
        reader.drop(plausible.OUT_OF_RANGE, is_amount & (found.values < 0))
        plausible.drop_unusable(reader, found, factors, codes, names)
        events = Events(rows, hours, codes, names, found.values * factors).filter(reader.good)
        return plausible.canonical(events, self._ranges, reader)


# ---------------------------------------------------------------- tables


def _find_tables(entries: list[Entry], source: str) -> dict[str, Entry]:
    """Find the tables by their lower-case names.

    Raises ValueError where a table stands there twice, or table patient or all events are missing.
    """
    tables = find_tables(entries, ("patient", *OFFSETS), source)
    if "patient" in tables and len(tables) > 1:
        return tables
    present = {table_name(entry) for entry in entries if plain_suffix(entry.name) in SUFFIXES}
    for name, others in OTHER_DATABASES.items():
        if name in present:
            raise ValueError(
                f"{source}: these are not eICU's tables; give them to onetomany prepare {others}"
            )
    missing = "of events" if "patient" in tables else "patient"
    raise ValueError(
        f"{source}: no table {missing} (.csv, .csv.gz or .parquet); tables of eICU are patient, "
        f"{', '.join(OFFSETS)}, and there are {', '.join(sorted(tables)) or 'none'}"
    )


def _unusable(table: pa.Table) -> np.ndarray:
    """Return (n,) texts: why a row of table patient cannot be used, or ""."""
    stay = filled(table["patientunitstayid"], -1)
    end = table["unitdischargeoffset"]
    return first_reason(
        (table["patientunitstayid"].is_null().to_numpy(), "no patientunitstayid"),
        (is_repeated(stay), "the same patientunitstayid again"),
        (table["uniquepid"].is_null().to_numpy(), "no uniquepid"),
        (end.is_null().to_numpy(), "no unitdischargeoffset"),
        (filled(end, 0) < 0, "its end is before its start"),
    )


def _heights_and_weights(stays: pa.Table) -> tuple[np.ndarray, np.ndarray, Notes]:
    """Return (heights in cm, weights in kg, counts of those that are not as they were entered).

    Some hospitals entered a height in the place of the weight, a weight twice, or metres. The rules
    are those of eicu-code (pivoted-weight.sql), for adults.
    """
    height = plausible.numbers(stays["admissionheight"]).values
    weight = plausible.numbers(stays["admissionweight"]).values
    may_be_weight = (height > 25) & (height <= 100)
    apart = np.abs(height - weight)  # NaN where one is not there: no rule for both is met
    swapped = may_be_weight & (weight >= 100) & (apart >= 20)
    weight_twice = may_be_weight & (apart < 20)
    in_metres = (height > 0.3) & (height <= 2.5)
    too_light = weight <= 20
    rules = {
        "heights and weights that were swapped": swapped,
        "heights in metres, converted": in_metres,
        "heights that are the weight again, left out": weight_twice,
        "weights of at most 20 kg, left out": too_light,
    }
    notes = {name: int(np.count_nonzero(here)) for name, here in rules.items() if here.any()}
    return (
        np.select([swapped, in_metres, weight_twice], [weight, height * 100, np.nan], height),
        np.select([swapped, too_light], [height, np.nan], weight),
        notes,
    )


def _stays_in_admission(table: pa.Table, stays: pa.Table) -> pa.Array:
    """Return how many stays there are in the admission of each, null where it has none.

    Those of table patient that cannot be used count too, as in mimic3. `stays`: the others.
    """
    ids = [filled(table[name], -1) for name in ("patienthealthsystemstayid", "patientunitstayid")]
    distinct = np.unique(np.stack(ids), axis=1)
    admissions, counts = np.unique(distinct[0], return_counts=True)
    own = stays["patienthealthsystemstayid"].combine_chunks()
    at = np.searchsorted(admissions, filled(own, -1))
    return pa.array(counts[at], mask=np.asarray(own.is_null()))


def _outcomes(stays: pa.Table, stays_in_admission: pa.Array) -> dict[str, pa.Array]:
    """Return the outcomes of stays, null where they are not known."""
    hospital_death = _mapped(stays["hospitaldischargestatus"], STATUSES)
    icu_death = _mapped(stays["unitdischargestatus"], STATUSES)
    icu_hours = _hours(stays["unitdischargeoffset"])
    discharge_hours = _hours(stays["hospitaldischargeoffset"])
    died_in_unit = pc.equal(icu_death, 1).fill_null(False)
    died_later = pc.equal(hospital_death, 1).fill_null(False)
    hours_to_later_death = pc.if_else(died_later, discharge_hours, None)
    none = np.zeros(len(stays), dtype=np.int64)
    return {
        "hospital_death": hospital_death,
        "icu_death": icu_death,
        "death_hours": pc.if_else(died_in_unit, icu_hours, hours_to_later_death),
        "icu_hours": icu_hours,
        "discharge_hours": discharge_hours,
        "care_unit": _care_units(stays["unittype"]),
        "stay_type": stays["unitstaytype"].combine_chunks(),
        "stays_in_admission": stays_in_admission,
        "transfers": pa.array(none),
    }


def _batches(
    reader: EventReader,
    columns: dict[str, Column],
) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """Yield (rows of a table that belong to a stay, their stays, their hours) in batches."""
    stays = reader.keys
    offsets = OFFSETS[reader.table]
    needed = dict.fromkeys(("patientunitstayid", *offsets), Column("id"))
    for batch in reader.batches({**needed, **columns}):
        latest = pc.max_element_wise(*(batch[name] for name in offsets))
        minutes = filled(latest, 0)
        row = index_in_sorted(stays.ids, filled(batch["patientunitstayid"], -1))
        is_before = minutes < stays.first[row]
        is_after = minutes > stays.last[row]
        reader.begin(len(batch))
        reader.drop(NO_STAY, row < 0)
        reader.drop(NO_TIME, latest.is_null().to_numpy())
        reader.drop(OUTSIDE, is_before | is_after)
        good = reader.good
        rows = batch.filter(pa.array(good))
        yield rows, row[good], minutes[good] / 60


# ---------------------------------------------------------------- columns


def _spaced(texts: Any) -> Any:
    """Return texts as one array, with single spaces."""
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(array, r"\s+", " "))


def _distinct(texts: Any) -> tuple[np.ndarray, list[str]]:
    """Return ((n,) positions among the distinct texts, -1 for null; those, with single spaces)."""
    codes, distinct = dictionary_codes(_spaced(texts))
    return codes, distinct.to_pylist()


def _mapped(texts: Any, meanings: dict[str, Any]) -> pa.Array:
    """Return what texts mean, in any case; null for those that have no meaning."""
    lower = pc.utf8_lower(_spaced(texts)).to_pylist()
    known = [meanings.get(text) for text in lower]
    kind = pa.scalar(next(iter(meanings.values()))).type
    return pa.array(known, kind)


def _care_units(unit_types: Any) -> pa.Array:
    names = _spaced(unit_types).to_pylist()
    own = [CARE_UNITS.get(name, name) for name in names]
    return pa.array(own, pa.string())


def _hours(minutes: Any) -> pa.Array:
    exact = minutes.combine_chunks().cast(pa.float64())
    return pc.divide(exact, 60.0)


def _fluid_name(item: str) -> str:
    """Return the name of a fluid, such as Intake (ml)|Crystalloids (ml)|NS; "" for other items."""
    if URINE.match(item):
        return "Urine"
    kind, _, rest = item.partition("|")
    prefix = FLUIDS.get(kind.lower(), "")
    return f"{prefix}{rest.rpartition('|')[2].strip()}" if prefix and rest else ""
