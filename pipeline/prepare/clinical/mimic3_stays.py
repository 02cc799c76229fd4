"""MIMIC-III's small tables: one row an intensive care stay with its static features and outcomes.

Dates are shifted into the years 2100 to 2200, for each patient by another amount; patients above 89
were born 300 years before their first stay (Johnson et al. 2016, MIMIC-III, a freely accessible
critical care database, doi 10.1038/sdata.2016.35).
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.prepare.engine.importing import InvalidRow, Notes, Row, invalid_row
from pipeline.prepare.engine.inputs import plain_suffix
from pipeline.prepare.readers.archives import Entry, Listing, Opener
from pipeline.prepare.readers.csv_blocks import (
    SUFFIXES,
    Column,
    RowCounts,
    check_zones,
    instants,
    stem,
    whole,
)

NEEDED = {
    "chartevents": "vital signs",
    "labevents": "laboratory values",
    "icustays": "one row a stay",
    "admissions": "outcomes and admission times",
    "patients": "age and sex",
}
OPTIONAL = {
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
}
"""Tables and what they are for; those with an empty text have no times, or names that
`clinical/items.csv` has.
"""
ONLY_MIMIC4 = ("procedureevents", "ingredientevents", "emar", "omr", "poe", "pharmacy")
"""Tables of MIMIC-IV that MIMIC-III does not have."""
OLDEST, SHIFTED = 150, 91.4
"""Nobody is older; ages above 89 are given as their median (documentation of PATIENTS)."""
YEAR = 365.2425 * 86400
FACTS = pa.struct(
    [
        ("Age", pa.float64()),
        ("Gender", pa.string()),
        ("CareUnit", pa.string()),
        ("Source", pa.string()),
        ("AdmissionType", pa.string()),
        ("previous_codes", pa.list_(pa.string())),
    ]
)
SCHEMA = pa.schema(
    [
        ("entity", pa.int64()),
        ("patient", pa.int64()),
        ("static", FACTS),
        ("hospital_death", pa.int64()),
        ("death_hours", pa.float64()),
        ("icu_hours", pa.float64()),
        ("discharge_hours", pa.float64()),
        ("icd9", pa.list_(pa.string())),
        ("readmission_days", pa.float64()),
        ("next_icd9", pa.list_(pa.string())),
        ("care_unit", pa.string()),
        ("dbsource", pa.string()),
        ("stays_in_admission", pa.int64()),
        ("transfers", pa.int64()),
        ("split", pa.string()),
    ]
)
GENDERS = {"F": "female", "M": "male"}


class Stays(NamedTuple):
    """The valid stays.

    Attributes:
        rows: as in SCHEMA, sorted by patient and start.
        times: (n, 3) int64 seconds: admission to hospital, to intensive care, discharge from it.
        admissions: (n,) hadm_id.
        broken: invalid stays: path, split and reason.
        notes: counts for the summary.
        zoned: whether the times had a zone in the tables (`csv_blocks.RowCounts`).
    """

    rows: pa.Table
    times: np.ndarray
    admissions: np.ndarray
    broken: list[InvalidRow]
    notes: Notes
    zoned: set[bool]


def find_tables(found: Listing, source: str) -> dict[str, list[Entry]]:
    """Find the files of each table, by its lower-case name (CHARTEVENTS may be several files).

    Raises ValueError naming what is missing.
    """
    tables: dict[str, list[Entry]] = {}
    for entry in found.entries:
        if plain_suffix(entry.name) in SUFFIXES:
            name = stem(entry)
            if name in ONLY_MIMIC4:
                raise ValueError(
                    f"{source}: this is MIMIC-IV (only it has a table {name}), and mimic3 reads "
                    "MIMIC-III, whose columns differ; convert it to MEDS or OMOP for onetomany "
                    "prepare meds or omop, or give prepare events its tables one by one"
                )
            name = "chartevents" if name.startswith("chartevents_") else name
            if name in NEEDED or name in OPTIONAL:
                tables.setdefault(name, []).append(entry)
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


def missing(tables: dict[str, list[Entry]]) -> dict[str, str]:
    """Return tables that are not there, and what is then lacking."""
    inputs = {"inputevents", "inputevents_cv", "inputevents_mv"}
    given = inputs.intersection(tables)
    unasked = (
        {"inputevents"}
        if given == inputs - {"inputevents"}
        else inputs - {"inputevents"}
        if not given or "inputevents" in given
        else {"inputevents"}
    )
    return {
        name.upper(): purpose
        for name, purpose in OPTIONAL.items()
        if purpose and name not in tables and name not in unasked
    }


class _Admission(NamedTuple):
    patient: int
    start: int
    end: int
    death: int | None
    expired: int
    type: str


def stays(tables: dict[str, list[Entry]]) -> Stays:
    """Read every stay whose times make sense; the others are listed by their row in ICUSTAYS.

    Raises ValueError where the times of ICUSTAYS have a zone and those of ADMISSIONS have none, or
    the other way round. Days of birth are not compared: a few hours make no difference to an age.
    """
    of_admissions, of_stays = RowCounts(), RowCounts()
    with closing(Opener()) as opener:
        patients, admissions, wrong = (
            _patients(tables, opener),
            *_admissions(tables, opener, of_admissions),
        )
        codes = _codes(tables, opener)
        table = _read(
            "icustays",
            tables,
            opener,
            {
                "subject_id": "id",
                "hadm_id": "id",
                "icustay_id": "id",
                "intime": "time",
                "outtime": "time",
                "dbsource": "text?",
                "first_careunit": "text?",
                "last_careunit": "text?",
                "first_wardid": "id?",
                "last_wardid": "id?",
            },
            of_stays,
        )
    check_zones(
        tables["icustays"][0].name,
        of_stays.zoned,
        tables["admissions"][0].name,
        of_admissions.zoned,
    )
    (start, started), (end, ended) = instants(table["intime"]), instants(table["outtime"])
    places, broken, seen = [], [], set[int]()
    name = tables["icustays"][0].name
    for i, row in enumerate(table.select(["subject_id", "hadm_id", "icustay_id"]).to_pylist()):
        patient, admission, stay = row["subject_id"], row["hadm_id"], row["icustay_id"]
        known = admissions.get(admission)
        checks = (
            ("no icustay_id", stay is None),
            ("the same icustay_id again", stay in seen),
            ("no intime or outtime", not (started[i] and ended[i])),
            ("outtime before intime", end[i] < start[i]),
            ("no such patient in PATIENTS", patient not in patients),
            (wrong.get(admission, "no such admission in ADMISSIONS"), known is None),
            (
                "its patient is not that of its admission",
                known is not None and known.patient != patient,
            ),
            (
                "born after the stay began",
                patient in patients
                and (born := patients[patient][1]) is not None
                and born > start[i] + 86400,
            ),
        )
        reason = next((reason for reason, is_so in checks if is_so), "")
        if reason:
            broken.append(invalid_row(f"{name}:row {i + 1}", "train", reason))
        else:
            seen.add(stay)
            places.append(i)
    order = sorted(
        places,
        key=lambda i: (table["subject_id"][i].as_py(), start[i], table["icustay_id"][i].as_py()),
    )
    rows = table.take(pa.array(order, pa.int64())).to_pylist()
    counts = Counter(
        dict(
            zip(*(table[name].to_pylist() for name in ("icustay_id", "hadm_id")), strict=True)
        ).values()
    )
    made = [
        _row(row, int(start[i]), int(end[i]), patients, admissions, codes, counts)
        for i, row in zip(order, rows, strict=True)
    ]
    times = np.array(
        [
            (admissions[row["hadm_id"]].start, start[i], end[i])
            for i, row in zip(order, rows, strict=True)
        ],
        dtype=np.int64,
    ).reshape(-1, 3)
    notes = {
        "stays": len(made),
        "patients": len({row["patient"] for row in made}),
        "admissions": len({row["hadm_id"] for row in rows}),
    }
    return Stays(
        pa.Table.from_pylist(made, schema=SCHEMA),
        times,
        np.array([row["hadm_id"] for row in rows], dtype=np.int64),
        broken,
        notes,
        of_stays.zoned | of_admissions.zoned,
    )


def _row(
    row: Row,
    start: int,
    end: int,
    patients: dict[int, tuple[str | None, int | None]],
    admissions: Any,
    codes: dict[int, list[str]],
    counts: Counter[int],
) -> Row:
    """Return a stay as in SCHEMA.

    Static features are what is known at its start: of diagnoses only those of admissions that ended
    before this one began.
    """
    number, patient = row["hadm_id"], row["subject_id"]
    own: _Admission = admissions[number]
    gender, born = patients[patient]
    others = sorted(
        (other.start, other.end, hadm) for hadm, other in admissions.of[patient] if hadm != number
    )
    earlier = [
        code for _, ended, hadm in others if ended <= own.start for code in codes.get(hadm, ())
    ]
    later = [(began, hadm) for began, _, hadm in others if began >= own.end]
    age = None if born is None else (start - born) / YEAR
    moved = [
        (row["first_careunit"], row["last_careunit"]),
        (row["first_wardid"], row["last_wardid"]),
    ]
    return {
        "entity": row["icustay_id"],
        "patient": patient,
        "static": {
            "Age": None if age is None else SHIFTED if age > OLDEST else max(0.0, age),
            "Gender": gender,
            "CareUnit": row["first_careunit"],
            "Source": row["dbsource"],
            "AdmissionType": own.type,
            "previous_codes": list(dict.fromkeys(earlier)),
        },
        "hospital_death": own.expired,
        "death_hours": None if own.death is None else (own.death - start) / 3600,
        "icu_hours": (end - start) / 3600,
        "discharge_hours": (own.end - start) / 3600,
        "icd9": _distinct(codes, number),
        "readmission_days": (later[0][0] - own.end) / 86400 if later else None,
        "next_icd9": _distinct(codes, later[0][1]) if later else None,
        "care_unit": row["first_careunit"],
        "dbsource": row["dbsource"],
        "stays_in_admission": counts[number],
        "transfers": int(any(None not in pair and pair[0] != pair[1] for pair in moved)),
        "split": "train",
    }


def _distinct(codes: dict[int, list[str]], number: int) -> list[str] | None:
    """Return an admission's codes, each once; None where none are known (not the same as no
    codes).
    """
    return list(dict.fromkeys(codes[number])) if number in codes else None


class _Admissions(dict[int, _Admission]):
    """Valid admissions by hadm_id; `of`: by patient."""

    def __init__(self):
        super().__init__()
        self.of: dict[int, list[tuple[int, _Admission]]] = {}


def _admissions(
    tables: dict[str, list[Entry]], opener: Opener, tally: RowCounts
) -> tuple[_Admissions, dict[int, str]]:
    """Return (the valid admissions, {hadm_id: reason} of the others)."""
    table = _read(
        "admissions",
        tables,
        opener,
        {
            "subject_id": "id",
            "hadm_id": "id",
            "admittime": "time",
            "dischtime": "time",
            "deathtime": "time",
            "hospital_expire_flag": "id",
            "admission_type": "text?",
        },
        tally,
    )
    (start, started), (end, ended), (death, died) = (
        instants(table[name]) for name in ("admittime", "dischtime", "deathtime")
    )
    out, wrong = _Admissions(), dict[int, str]()
    for i, row in enumerate(
        table.select(
            ["subject_id", "hadm_id", "hospital_expire_flag", "admission_type"]
        ).to_pylist()
    ):
        number = row["hadm_id"]
        checks = (
            ("no times of its admission", not (started[i] and ended[i])),
            ("discharge before admission", end[i] < start[i]),
            ("death before admission", died[i] and death[i] < start[i]),
            ("no hospital_expire_flag", row["hospital_expire_flag"] not in (0, 1)),
        )
        reason = next((reason for reason, is_so in checks if is_so), "")
        if number is None or number in out or number in wrong:
            continue
        if reason:
            wrong[number] = reason
            continue
        one = _Admission(
            row["subject_id"],
            int(start[i]),
            int(end[i]),
            int(death[i]) if died[i] else None,
            row["hospital_expire_flag"],
            row["admission_type"],
        )
        out[number] = one
        out.of.setdefault(one.patient, []).append((number, one))
    return out, wrong


def _patients(
    tables: dict[str, list[Entry]], opener: Opener
) -> dict[int, tuple[str | None, int | None]]:
    """Return sex and second of birth by subject_id."""
    table = _read("patients", tables, opener, {"subject_id": "id", "gender": "text", "dob": "time"})
    born, known = instants(table["dob"])
    return {
        number: (GENDERS.get((gender or "").strip().upper()), int(born[i]) if known[i] else None)
        for i, (number, gender) in enumerate(
            zip(table["subject_id"].to_pylist(), table["gender"].to_pylist(), strict=True)
        )
        if number is not None
    }


def _codes(tables: dict[str, list[Entry]], opener: Opener) -> dict[int, list[str]]:
    """Return the ICD-9 codes of each admission, in the order of their importance."""
    if "diagnoses_icd" not in tables:
        return {}
    table = _read(
        "diagnoses_icd", tables, opener, {"hadm_id": "id", "seq_num": "id?", "icd9_code": "text"}
    )
    rows = zip(
        *(table[name].to_pylist() for name in ("hadm_id", "seq_num", "icd9_code")), strict=True
    )
    found = sorted(
        (number, 1 << 30 if sequence is None else sequence, code.strip())
        for number, sequence, code in rows
        if number is not None and code and code.strip()
    )
    out: dict[int, list[str]] = {}
    for number, _, code in found:
        out.setdefault(number, []).append(code)
    return out


def _read(
    name: str,
    tables: dict[str, list[Entry]],
    opener: Opener,
    kinds: dict[str, str],
    tally: RowCounts | None = None,
) -> pa.Table:
    """Read a small table; a column whose kind has a question mark may be missing."""
    return whole(
        name,
        tables[name][0],
        {
            column: Column(kind.rstrip("?"), not kind.endswith("?"))
            for column, kind in kinds.items()
        },
        opener,
        tally,
    )
