"""The small tables of MIMIC-III and MIMIC-IV: one row an intensive care stay with its static
features and outcomes.

Dates are shifted into the years 2100 to 2200, for each patient by another amount. Patients above 89
were born 300 years before their first stay in MIMIC-III (Johnson et al. 2016, MIMIC-III, a freely
accessible critical care database, doi 10.1038/sdata.2016.35), and are 91 in MIMIC-IV (Johnson et
al. 2023, MIMIC-IV, a freely accessible electronic health record dataset, doi
10.1038/s41597-022-01899-x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.prepare.engine.importing import InvalidRow, Notes, invalid_row
from pipeline.prepare.engine.inputs import plain_suffix
from pipeline.prepare.readers.archives import Entry, Listing, Opener
from pipeline.prepare.readers.csv_blocks import (
    COLUMN_TYPES,
    SUFFIXES,
    Column,
    RowCounts,
    check_zones,
    read_schema,
    read_table,
    table_name,
)

NEEDED = {
    "chartevents": "vital signs",
    "labevents": "laboratory values",
    "icustays": "one row a stay",
    "admissions": "outcomes and admission times",
    "patients": "age and sex",
}
OLDEST, SHIFTED = 150, 91.4
"""Nobody is older; ages above 89 are given as their median (documentation of PATIENTS)."""
YEAR = 365.2425 * 86400
COLUMNS_READ = {
    "patients": {"subject_id": "id", "gender": "text"},
    "admissions": {
        "subject_id": "id",
        "hadm_id": "id",
        "admittime": "time",
        "dischtime": "time",
        "deathtime": "time",
        "hospital_expire_flag": "id",
        "admission_type": "text?",
    },
    "icustays": {
        "subject_id": "id",
        "hadm_id": "id",
        "intime": "time",
        "outtime": "time",
        "dbsource": "text?",
        "first_careunit": "text?",
        "last_careunit": "text?",
        "first_wardid": "id?",
        "last_wardid": "id?",
    },
    "diagnoses_icd": {"hadm_id": "id", "seq_num": "id?"},
}
"""Columns of the small tables and their kinds; those with a question mark may be missing. Each data
set has more of its own (`DataSet.columns`).
"""
OUTCOMES = {
    "hospital_death": pa.int64(),
    "death_hours": pa.float64(),
    "death_days": pa.int64(),
    "icu_hours": pa.float64(),
    "discharge_hours": pa.float64(),
    "icd9": pa.list_(pa.string()),
    "icd10": pa.list_(pa.string()),
    "readmission_days": pa.float64(),
    "next_icd9": pa.list_(pa.string()),
    "next_icd10": pa.list_(pa.string()),
    "care_unit": pa.string(),
    "dbsource": pa.string(),
    "stays_in_admission": pa.int64(),
    "transfers": pa.int64(),
}
FACTS = {
    "Age": pa.float64(),
    "Gender": pa.string(),
    "CareUnit": pa.string(),
    "Source": pa.string(),
    "AdmissionType": pa.string(),
    "previous_codes": pa.list_(pa.string()),
    "previous_icd10": pa.list_(pa.string()),
}
"""Static features."""


@dataclass(frozen=True)
class DataSet:
    """What MIMIC-III and MIMIC-IV have of their own.

    Attributes:
        title: its name.
        command: the importer that reads it.
        optional: tables that may be missing and what they are for; those without a text have no
            times, or names of `items.csv`.
        columns: further columns of `COLUMNS_READ`.
        stay_id: the column of ICUSTAYS that identifies a stay.
        age: SQL of the years at a stay, of patient p, admission a and stay s.
        code: SQL of a diagnosis.
        version: SQL of the code's version of the ICD.
        death_days: SQL of the days from the discharge of admission a to the death of patient p.
        without: names of FACTS and OUTCOMES that it does not have.
        drug_time: the column of PRESCRIPTIONS with a drug's start.
        has_drug_days: whether that is a day, which counts from its end. Of the starts in MIMIC-IV's
            demo 2.6 % are at 00:00, so that this is a time there.
        result_time: the column of LABEVENTS and CHARTEVENTS with the time at which a result was
            known, or "".
    """

    title: str
    command: str
    optional: dict[str, str]
    columns: dict[str, dict[str, str]]
    stay_id: str
    age: str
    code: str
    version: str
    death_days: str
    without: tuple[str, ...]
    drug_time: str
    has_drug_days: bool
    result_time: str

    @property
    def facts(self) -> list[pa.Field]:
        """Return the static features."""
        return [pa.field(name, kind) for name, kind in FACTS.items() if name not in self.without]

    @property
    def outcomes(self) -> list[pa.Field]:
        """Return the outcomes."""
        return [pa.field(name, kind) for name, kind in OUTCOMES.items() if name not in self.without]

    @property
    def schema(self) -> pa.Schema:
        """Return the columns of a stay."""
        ids = [pa.field("entity", pa.int64()), pa.field("patient", pa.int64())]
        static = pa.field("static", pa.struct(self.facts))
        return pa.schema([*ids, static, *self.outcomes, pa.field("split", pa.string())])


MIMIC3 = DataSet(
    title="MIMIC-III",
    command="mimic3",
    optional={
        "outputevents": "urine",
        "inputevents_cv": "inputs of CareVue",
        "inputevents_mv": "inputs of MetaVision",
        "inputevents": "inputs",
        "prescriptions": "drugs",
        "diagnoses_icd": "diagnoses of this and of earlier admissions",
        "d_items": "names of inputs",
        "procedures_icd": "",
        "d_labitems": "",
        "d_icd_diagnoses": "",
        "d_icd_procedures": "",
    },
    columns={
        "patients": {"dob": "time"},
        "icustays": {"icustay_id": "id"},
        "diagnoses_icd": {"icd9_code": "text"},
    },
    stay_id="icustay_id",
    age=f"(s.intime - p.dob) / {YEAR}::DOUBLE",
    code="icd9_code",
    version="9",
    death_days="NULL",
    without=("death_days", "icd10", "next_icd10", "previous_icd10"),
    drug_time="startdate",
    has_drug_days=True,
    result_time="",
)
MIMIC4 = DataSet(
    title="MIMIC-IV",
    command="mimic4",
    optional={
        "outputevents": "urine",
        "inputevents": "inputs",
        "prescriptions": "drugs",
        "diagnoses_icd": "diagnoses of this and of earlier admissions",
        "d_items": "names of inputs",
    },
    columns={
        "patients": {"anchor_age": "id", "anchor_year": "id", "dod": "time?"},
        "icustays": {"stay_id": "id"},
        "diagnoses_icd": {"icd_code": "text", "icd_version": "id"},
    },
    stay_id="stay_id",
    age="p.anchor_age + year(make_timestamp(a.admittime * 1000000)) - p.anchor_year",
    code="icd_code",
    version="icd_version",
    death_days="p.dod // 86400 - a.dischtime // 86400",
    without=("Source", "dbsource"),
    drug_time="starttime",
    has_drug_days=False,
    result_time="storetime",
)


class Stays(NamedTuple):
    """The valid stays.

    Attributes:
        rows: as in `DataSet.schema`, sorted by patient and start.
        times: (n, 3) int64 seconds: admission to hospital, to intensive care, discharge from it.
        admissions: (n,) hadm_id.
        invalid: invalid stays: path, split and reason.
        notes: counts for the summary.
        zoned: whether the times had a zone in the tables (`csv_blocks.RowCounts`).
    """

    rows: pa.Table
    times: np.ndarray
    admissions: np.ndarray
    invalid: list[InvalidRow]
    notes: Notes
    zoned: set[bool]


def find_tables(data_set: DataSet, found: Listing, source: str) -> dict[str, list[Entry]]:
    """Find each table's files by its lower-case name.

    Raises ValueError for a missing table, and for those of the other data set.
    """
    tables: dict[str, list[Entry]] = {}
    for entry in found.entries:
        if plain_suffix(entry.name) in SUFFIXES:
            name = table_name(entry)
            name = "chartevents" if name.startswith("chartevents_") else name
            if name in NEEDED or name in data_set.optional:
                tables.setdefault(name, []).append(entry)
    if "icustays" in tables:
        _check_data_set(data_set, tables["icustays"][0], source)
    for name, purpose in NEEDED.items():
        if name not in tables:
            raise ValueError(
                f"{source}: no table {name.upper()} (.csv, .csv.gz or .parquet), which is needed "
                f"for {purpose}; there are {', '.join(sorted(tables)) or 'none'}"
            )
    for name, entries in tables.items():
        if len(entries) > 1 and name != "chartevents":
            raise ValueError(
                f"{source}: table {name.upper()} stands there {len(entries)} times "
                f"({', '.join(entry.name for entry in entries)}); keep one"
            )
    return tables


def _check_data_set(data_set: DataSet, icustays: Entry, source: str) -> None:
    """Raise ValueError where ICUSTAYS is that of the other data set."""
    other = MIMIC4 if data_set is MIMIC3 else MIMIC3
    with Opener() as opener:
        names = {name.strip().lower() for name in read_schema(icustays, opener).names}
    if other.stay_id in names and data_set.stay_id not in names:
        raise ValueError(
            f"{source}: this is {other.title} ({icustays.name} has a column {other.stay_id}), and "
            f"{data_set.command} reads {data_set.title}; run onetomany prepare {other.command}"
        )


def missing_tables(data_set: DataSet, tables: dict[str, list[Entry]]) -> dict[str, str]:
    """Return tables that are not there, and what is then lacking."""
    of_systems = {"inputevents_cv", "inputevents_mv"}
    has_systems = "inputevents" not in tables and of_systems.intersection(tables)
    unasked = {"inputevents"} if has_systems else of_systems
    return {
        name.upper(): purpose
        for name, purpose in data_set.optional.items()
        if purpose and name not in tables and name not in unasked
    }


STAYS = r"""
WITH patient AS (  -- ids are unique, else the last row counts
  SELECT *, CASE upper(gender) WHEN 'F' THEN 'female' WHEN 'M' THEN 'male' END AS sex
  FROM patients WHERE subject_id IS NOT NULL
  QUALIFY row_number() OVER (PARTITION BY subject_id ORDER BY place DESC) = 1
),
admission AS (  -- of repeated ids the first row counts, as for stays
  SELECT *, CASE
    WHEN admittime IS NULL OR dischtime IS NULL THEN 'its admission has no admittime or dischtime'
    WHEN dischtime < admittime THEN 'discharge before admission'
    WHEN deathtime < admittime THEN 'death before admission'
    WHEN coalesce(hospital_expire_flag, -1) NOT IN (0, 1) THEN 'no hospital_expire_flag'
    ELSE '' END AS wrong
  FROM admissions WHERE hadm_id IS NOT NULL
  QUALIFY row_number() OVER (PARTITION BY hadm_id ORDER BY place) = 1
),
valid AS (SELECT * FROM admission WHERE wrong = ''),
checked AS (
  SELECT s.*, p.sex, {age} AS years, {death_days} AS death_days,
    -- MIMIC-IV writes Medical Intensive Care Unit (MICU)
    coalesce(nullif(regexp_extract(s.first_careunit, '\(([^()]+)\)$', 1), ''), s.first_careunit)
      AS unit_name,
    CASE unit_name WHEN 'CVICU' THEN 'CSRU' ELSE unit_name END AS care_unit,
    CASE
    WHEN s.{stay_id} IS NULL THEN 'no {stay_id}'
    WHEN s.intime IS NULL OR s.outtime IS NULL THEN 'no intime or outtime'
    WHEN s.outtime < s.intime THEN 'outtime before intime'
    WHEN p.subject_id IS NULL THEN 'no such patient in PATIENTS'
    WHEN a.hadm_id IS NULL THEN 'no such admission in ADMISSIONS'
    WHEN a.wrong <> '' THEN a.wrong
    WHEN a.subject_id IS DISTINCT FROM s.subject_id
      THEN 'its patient is not that of its admission'
    -- within a day: a birth is a day, whose zone is not compared
    WHEN years < -86400 / {year}::DOUBLE THEN 'born after the stay began'
    ELSE '' END AS wrong
  FROM icustays s
  LEFT JOIN patient p ON p.subject_id = s.subject_id
  LEFT JOIN admission a ON a.hadm_id = s.hadm_id
),
stay AS (
  SELECT * REPLACE (CASE
    WHEN row_number() OVER (PARTITION BY {stay_id}, wrong ORDER BY place) > 1 AND wrong = ''
    THEN 'the same {stay_id} again' ELSE wrong END AS wrong)
  FROM checked
),
in_admission AS (
  SELECT hadm_id, count(DISTINCT coalesce({stay_id}, -1)) AS stays FROM icustays GROUP BY hadm_id
),
diagnosis AS (  -- each code once, with its smallest seq_num
  SELECT hadm_id, {code} AS code, {version} AS version, min(coalesce(seq_num, 1 << 30)) AS seq
  FROM diagnoses_icd WHERE {code} <> '' GROUP BY ALL
),
codes AS (
  SELECT hadm_id, list(code ORDER BY seq, code) FILTER (version = 9) AS icd9,
    list(code ORDER BY seq, code) FILTER (version = 10) AS icd10
  FROM diagnosis GROUP BY hadm_id
),
codes_in_order AS (
  SELECT v.hadm_id, v.subject_id, v.dischtime, d.code, d.version, row_number() OVER (
    ORDER BY v.admittime, v.dischtime, v.hadm_id, d.seq, d.code, d.version) AS rank
  FROM valid v JOIN diagnosis d ON d.hadm_id = v.hadm_id
),
earlier AS (  -- of admissions that ended before this one began
  SELECT hadm_id, list(code ORDER BY rank) FILTER (version = 9) AS icd9,
    list(code ORDER BY rank) FILTER (version = 10) AS icd10
  FROM (
    SELECT v.hadm_id, c.code, c.version, min(c.rank) AS rank FROM valid v
    JOIN codes_in_order c ON c.subject_id = v.subject_id AND c.hadm_id <> v.hadm_id
      AND c.dischtime <= v.admittime
    GROUP BY ALL
  ) GROUP BY hadm_id
),
next_admission AS (
  SELECT v.hadm_id, min(n.admittime) AS began,
    first(n.hadm_id ORDER BY n.admittime, n.dischtime, n.hadm_id) AS next
  FROM valid v JOIN valid n ON n.subject_id = v.subject_id AND n.hadm_id <> v.hadm_id
    AND n.admittime >= v.dischtime
  GROUP BY v.hadm_id
)
SELECT
  s.wrong, s.place, s.hadm_id, a.admittime, s.intime, s.outtime,
  s.{stay_id} AS entity,
  s.subject_id AS patient,
  CASE WHEN s.years > {oldest} THEN {shifted}::DOUBLE WHEN s.years < 0 THEN 0 ELSE s.years END
    AS "Age",
  s.sex AS "Gender",
  s.care_unit AS "CareUnit",
  s.dbsource AS "Source",
  CASE WHEN a.admission_type IN ('EW EMER.', 'DIRECT EMER.') THEN 'EMERGENCY'
    ELSE a.admission_type END AS "AdmissionType",
  coalesce(e.icd9, []) AS previous_codes,
  coalesce(e.icd10, []) AS previous_icd10,
  a.hospital_expire_flag AS hospital_death,
  (a.deathtime - s.intime) / 3600 AS death_hours,
  s.death_days,
  (s.outtime - s.intime) / 3600 AS icu_hours,
  (a.dischtime - s.intime) / 3600 AS discharge_hours,
  c.icd9,
  c.icd10,
  (l.began - a.dischtime) / 86400 AS readmission_days,
  n.icd9 AS next_icd9,
  n.icd10 AS next_icd10,
  s.care_unit,
  s.dbsource,
  i.stays AS stays_in_admission,
  (coalesce(s.first_careunit <> s.last_careunit, false)
    OR coalesce(s.first_wardid <> s.last_wardid, false))::BIGINT AS transfers,
  'train' AS split
FROM stay s
LEFT JOIN valid a ON a.hadm_id = s.hadm_id
LEFT JOIN in_admission i ON i.hadm_id = s.hadm_id
LEFT JOIN codes c ON c.hadm_id = s.hadm_id
LEFT JOIN earlier e ON e.hadm_id = s.hadm_id
LEFT JOIN next_admission l ON l.hadm_id = s.hadm_id
LEFT JOIN codes n ON n.hadm_id = l.next
ORDER BY patient, s.intime, entity, s.place
"""
"""One row for each row of ICUSTAYS: `wrong` (why it cannot be used, or ""), and the columns of
FACTS and OUTCOMES. Names in braces are for `str.format`. Care units and types of admission that
MIMIC-IV has under another name have that of MIMIC-III.

Times are in seconds. What is static is known at the stay's start: of diagnoses those of admissions
that had ended. An admission without known codes of a version has null for them, not an empty list.
"""


def read_stays(data_set: DataSet, tables: dict[str, list[Entry]]) -> Stays:
    """Return the valid stays, and why the other rows of ICUSTAYS are invalid.

    Raises ValueError where the times of ICUSTAYS or of ADMISSIONS have a zone and the others none.
    Days of birth are not compared: a few hours make no difference to an age.
    """
    counts = {name: RowCounts() for name in COLUMNS_READ}
    with Opener() as opener, duckdb.connect() as connection:
        for name, tally in counts.items():
            kinds = {**COLUMNS_READ[name], **data_set.columns.get(name, {})}
            connection.register(name, _read(name, kinds, tables, opener, tally))
        name, other = tables["icustays"][0].name, tables["admissions"][0].name
        zoned = counts["icustays"].zoned, counts["admissions"].zoned
        check_zones(name, zoned[0], other, zoned[1])
        query = STAYS.format(
            stay_id=data_set.stay_id,
            age=data_set.age,
            code=data_set.code,
            version=data_set.version,
            death_days=data_set.death_days,
            year=YEAR,
            oldest=OLDEST,
            shifted=SHIFTED,
        )
        found = connection.sql(query).to_arrow_table()
    bad = found.filter(pc.not_equal(found["wrong"], "")).sort_by("place")
    invalid = [
        invalid_row(f"{name}:row {row + 1}", "train", reason)
        for row, reason in zip(bad["place"].to_pylist(), bad["wrong"].to_pylist(), strict=True)
    ]
    good = found.filter(pc.equal(found["wrong"], "")).combine_chunks()
    facts, schema = data_set.facts, data_set.schema
    values = [good[fact.name].combine_chunks().cast(fact.type) for fact in facts]
    static = pa.StructArray.from_arrays(values, fields=facts)
    rows = good.append_column("static", static).select(schema.names).cast(schema)
    times = [good[column].to_numpy() for column in ("admittime", "intime", "outtime")]
    notes = {
        "stays": len(good),
        "patients": pc.count_distinct(good["patient"]).as_py(),
        "admissions": pc.count_distinct(good["hadm_id"]).as_py(),
    }
    return Stays(
        rows,
        np.stack(times, axis=1).astype(np.int64),
        good["hadm_id"].to_numpy().astype(np.int64),
        invalid,
        notes,
        zoned[0] | zoned[1],
    )


def _read(
    name: str,
    kinds: dict[str, str],
    tables: dict[str, list[Entry]],
    opener: Opener,
    tally: RowCounts,
) -> pa.Table:
    """Read a small table: times in seconds, rows numbered; one that is missing has no rows."""
    wanted = {
        column: Column(kind.rstrip("?"), not kind.endswith("?")) for column, kind in kinds.items()
    }
    if name in tables:
        table = read_table(name, tables[name][0], wanted, opener, tally)
    else:
        table = pa.table(
            {column: pa.array([], COLUMN_TYPES[one.kind]) for column, one in wanted.items()}
        )
    columns: dict[str, Any] = {"place": np.arange(len(table))}
    for column, one in wanted.items():
        values = table[column]
        is_code = column in ("gender", "icd9_code", "icd_code")
        values = pc.utf8_trim_whitespace(values) if is_code else values
        columns[column] = values.cast(pa.int64()) if one.kind == "time" else values
    return pa.table(columns)
