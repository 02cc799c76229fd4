"""MIMIC-III's tables: small ones by hand with all that is met in the large ones, and the demo's,
checked against plain SQL (DuckDB) over the raw tables.
"""

import os
import re
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import as_float32 as f
from prepare.conftest import entity_events, entity_rows, summary

from pipeline.prepare.clinical import plausible

prepare = partial(conftest.prepare, "mimic3")

DEMO = pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
TABLES = {
    # DOD is not read: it need not fit DOB
    "PATIENTS": """ROW_ID,SUBJECT_ID,GENDER,DOB,DOD
1,1,F,2050-01-01 00:00:00,2100-03-04 00:00:00-05:00
2,2,M,1850-01-01 00:00:00,
3,3,F,2080-01-01 00:00:00,
""",
    "ADMISSIONS": """SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DEATHTIME,ADMISSION_TYPE,HOSPITAL_EXPIRE_FLAG
1,100,2100-01-01 08:00:00,2100-01-10 12:00:00,,EMERGENCY,0
1,101,2100-03-01 00:00:00,2100-03-05 00:00:00,2100-03-04 12:00:00,URGENT,1
2,200,2150-06-01 10:00:00,2150-06-20 00:00:00,,ELECTIVE,0
3,300,2120-06-02 10:00:00,2120-06-01 00:00:00,,ELECTIVE,0
""",
    "ICUSTAYS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,DBSOURCE,FIRST_CAREUNIT,LAST_CAREUNIT,FIRST_WARDID,LAST_WARDID,INTIME,OUTTIME,LOS
2,200,2000,metavision,CSRU,CSRU,1,1,2150-06-02 00:00:00,2150-06-05 00:00:00,3
1,100,1001,carevue,MICU,SICU,1,2,2100-01-05 00:00:00,2100-01-07 00:00:00,2
1,100,1000,carevue,MICU,MICU,1,1,2100-01-01 10:00:00,2100-01-03 10:00:00,2
1,101,1010,metavision,CCU,CCU,7,7,2100-03-01 01:00:00,2100-03-04 12:00:00,3.5
3,300,3000,metavision,CCU,CCU,7,7,2120-06-02 11:00:00,2120-06-03 00:00:00,1
1,100,1000,carevue,MICU,MICU,1,1,2100-01-01 10:00:00,2100-01-03 10:00:00,2
2,999,2001,metavision,CSRU,CSRU,1,1,2150-06-02 00:00:00,2150-06-05 00:00:00,3
2,200,2002,metavision,CSRU,CSRU,1,1,2150-06-08 00:00:00,2150-06-07 00:00:00,3
2,200,2003,metavision,CSRU,CSRU,1,1,2150-06-08 00:00:00,,
""",
    "CHARTEVENTS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,ITEMID,CHARTTIME,VALUE,VALUENUM,VALUEUOM,ERROR
1,100,1000,211,2100-01-01 11:30:00,80,80,BPM,
1,100,1000,211,2100-01-01 11:30:00,80,80,BPM,
1,100,1000,51,2100-01-01 12:00:00,120/80,,mmHg,
1,100,1000,8368,2100-01-01 12:00:00,120/80,,mmHg,
1,100,1000,52,2100-01-01 12:00:00,120/80,,mmHg,
1,100,,211,2100-01-01 08:30:00,<90,,BPM,
1,100,,211,2100-01-01 07:30:00,90,90,BPM,
1,100,1001,678,2100-01-05 06:00:00,104,104,Deg. F,
1,100,1001,678,2100-01-05 07:00:00,37,37,Deg. F,
1,100,,211,2100-01-04 00:00:00,70,70,BPM,
1,100,1001,211,2100-01-08 00:00:00,70,70,BPM,
1,100,1001,3348,2100-01-05 06:00:00,Normal <3 secs,,,
1,100,1001,3348,2100-01-05 07:00:00,Delayed,,,
1,100,1001,3348,2100-01-05 08:00:00,Other,,,
1,100,1001,190,2100-01-05 06:00:00,.5,0.5,,
1,100,1001,198,2100-01-05 09:00:00,13,13,points,
1,100,1001,184,2100-01-05 09:00:00,4 Spontaneously,4,,
1,100,1001,454,2100-01-05 09:00:00,6 Obeys Commands,6,,
1,100,1001,723,2100-01-05 09:00:00,4 Confused,4,,
1,101,1010,220045,2100-03-01 02:00:00,ERROR,,bpm,0
1,101,1010,220045,2100-03-01 03:00:00,101,101,bpm,1
1,101,1010,220045,2100-03-01 04:00:00,4000,4000,bpm,0
1,101,1010,220045,,99,99,bpm,0
1,101,1010,,2100-03-01 05:00:00,99,99,bpm,0
1,101,1010,12345,2100-03-01 05:00:00,99,99,bpm,0
1,101,1010,226531,2100-03-01 05:00:00,200,200,lbs,0
1,101,1010,226707,2100-03-01 05:00:00,70,70,Inch,0
1,101,1010,223849,2100-03-01 05:00:00,CMV/ASSIST,,,0
1,101,1010,223849,2100-03-01 06:00:00,Standby,,,0
1,101,1010,220739,2100-03-01 05:00:00,To Speech,3,,0
1,101,1010,223900,2100-03-01 05:00:00,Oriented,5,,0
1,101,1010,223901,2100-03-01 05:00:00,Obeys,6,,0
1,101,1010,220739,2100-03-01 07:00:00,To Speech,3,,0
1,777,,220045,2100-03-01 05:00:00,99,99,bpm,0
3,300,3000,220045,2120-06-02 12:00:00,99,99,bpm,0
""",
    "LABEVENTS": """SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUE,VALUENUM,VALUEUOM
1,101,51003,2100-03-02 01:00:00,<0.01,,ng/mL
1,,50912,2100-03-02 02:00:00,1.5,1.5,mg/dL
1,,50912,2100-02-02 02:00:00,1.5,1.5,mg/dL
2,200,50931,2150-06-01 12:00:00,GREATER THAN 500,,mg/dL
2,200,51491,2150-06-03 00:00:00,6.5,6.5,units
9,,50912,2100-03-02 02:00:00,1.5,1.5,mg/dL
""",
    "OUTPUTEVENTS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,CHARTTIME,ITEMID,VALUE,VALUEUOM
2,200,2000,2150-06-02 03:00:00,226559,150,mL
2,200,2000,2150-06-02 04:00:00,226559,5000,mL
2,200,2000,2150-06-02 05:00:00,226559,,mL
2,200,2000,2150-06-02 06:00:00,40054,20,mL
""",
    "INPUTEVENTS_CV": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,CHARTTIME,ITEMID,AMOUNT,AMOUNTUOM
1,100,1000,2100-01-01 12:00:00,30018,250,ml
1,100,1000,2100-01-01 13:00:00,30018,,ml
1,100,1000,2100-01-01 14:00:00,39999,10,ml
""",
    "INPUTEVENTS_MV": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTTIME,ENDTIME,ITEMID,AMOUNT,AMOUNTUOM,STATUSDESCRIPTION
2,200,2000,2150-06-02 00:00:00,2150-06-02 12:00:00,225158,1,L,FinishedRunning
2,200,2000,2150-06-02 00:00:00,2150-06-02 13:00:00,225158,500,ml,Rewritten
2,200,2000,2150-06-02 00:00:00,2150-06-02 14:00:00,225158,0,ml,Stopped
2,200,2000,2150-06-04 00:00:00,2150-06-05 01:00:00,225158,80,ml,Stopped
""",
    "PRESCRIPTIONS": """SUBJECT_ID,HADM_ID,ICUSTAY_ID,STARTDATE,ENDDATE,DRUG
2,200,2000,2150-06-01 00:00:00,2150-06-03 00:00:00,  Heparin  Sodium
2,200,2000,2150-06-05 00:00:00,2150-06-06 00:00:00,Aspirin
2,200,2000,2150-06-02 00:00:00,2150-06-06 00:00:00,
""",
    "DIAGNOSES_ICD": "SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,100,2,4019\n1,100,1,0389\n1,101,1,41071\n1,101,2,\n2,200,1,41401\n1,100,3,4019\n",
    "PROCEDURES_ICD": "SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,100,1,9604\n",
    "D_ITEMS": "ITEMID,LABEL,DBSOURCE\n30018,.9% Normal Saline,carevue\n225158,NaCl "
    "0.9%,metavision\n",
}
SOME = {"max_bad": 0.9}


@pytest.fixture
def mimic(tmp_path) -> Path:
    root = tmp_path / "mimic"
    root.mkdir()
    for name, text in TABLES.items():
        (root / f"{name}.csv").write_text(text)
    return root


# ---------------------------------------------------------------- by hand


def test_streams(mimic, tmp_path):
    """Units, texts, pairs, items of both systems, derived sums, what is given counting once it was:
    all by hand.
    """
    prepare(mimic, tmp_path / "out", **SOME)
    found = entity_rows(tmp_path / "out")
    assert list(map(int, sorted(found))) == [1000, 1001, 1010, 2000]
    assert entity_events(found[1000]) == f(
        (-1.5, "HR", 90),
        (1.5, "HR", 80),
        (2, "DiasABP", 80),
        (2, "SysABP", 120),
        (2, "input: .9% Normal Saline", 250),
    )
    assert entity_events(found[1001]) == f(
        (-24, "HR", 70),
        (6, "CapillaryRefill", 0),
        (6, "FiO2", 50),
        (6, "Temp", 40),
        (7, "CapillaryRefill", 1),
        (7, "Temp", 37),
        (9, "GCS", 13),
        (9, "GCS_eye", 4),
        (9, "GCS_motor", 6),
        (9, "GCS_verbal", 4),
    )
    assert entity_events(found[1010]) == f(
        (4, "GCS", 14),
        (4, "GCS_eye", 3),
        (4, "GCS_motor", 6),
        (4, "GCS_verbal", 5),
        (4, "Height", 177.8),
        (4, "MechVent", 1),
        (4, "Weight", 200 * 0.45359237),
        (6, "GCS_eye", 3),
        (24, "TroponinT", 0.01),
        (25, "Creatinine", 1.5),
    )
    assert entity_events(found[2000]) == f(
        (-12, "Glucose", 500),
        (0, "drug: Heparin Sodium", 1),
        (3, "Urine", 150),
        (12, "input: NaCl 0.9%", 1000),
        (24, "UrinePH", 6.5),
    )


def test_each_dropped_event_has_one_reason(mimic, tmp_path):
    prepare(mimic, tmp_path / "out", **SOME)
    notes = summary(tmp_path / "out")["notes"]
    assert notes["events dropped by reason"] == {
        "chartevents: a pair of numbers": 1,
        "chartevents: no number": 3,
        "chartevents: marked as an error": 1,
        "chartevents: out of range": 1,
        "chartevents: no time": 1,
        "chartevents: no item id": 1,
        "chartevents: unknown item": 1,
        "chartevents: no stay": 2,
        "chartevents: outside the stay": 2,
        "labevents: outside the stay": 1,
        "labevents: no stay": 1,
        "outputevents: out of range": 1,
        "outputevents: no value": 1,
        "outputevents: unknown item": 1,
        "inputevents_cv: no value": 1,
        "inputevents_cv: unknown item": 1,
        "inputevents_mv: rewritten": 1,
        "inputevents_mv: out of range": 1,
        "inputevents_mv: outside the stay": 1,
        "prescriptions: outside the stay": 1,
        "prescriptions: no drug": 1,
        plausible.CENSORED: 3,
    }
    lost = sum(count for name, count in notes["events dropped by reason"].items() if ": " in name)
    assert notes["events dropped: duplicate"] == {"train": 1} and notes[
        "events that follow from others"
    ] == {"train": 1}
    read = sum(
        text.count("\n") - 1
        for name, text in TABLES.items()
        if "EVENTS" in name or name == "PRESCRIPTIONS"
    )
    assert notes["rows of events read"] == read == notes["events"]["train"] + lost + 1 - 1


def test_units_are_converted_or_left_out_and_counted(mimic, tmp_path):
    """VALUEUOM counts: known other units are converted, unknown ones left out under their variable;
    without a unit a value is the item's own.
    """
    head = TABLES["LABEVENTS"].splitlines()[0]
    given = [
        ("50912", 88.42, "umol/L"),
        ("50912", 1.5, "furlong"),
        ("50912", 1.25, "furlong"),
        ("50912", 1.1, "MG/DL"),
        ("50912", 1.2, ""),
        ("50912", 1.3, "None"),
        ("50889", 2, "mg/dL"),
        ("51265", 200, "G/L"),
        ("50818", 40, "MM HG"),
        ("50821", 10, "kPa"),
        ("51301", 9, "mL"),
    ]
    lines = [
        f"1,101,{item},2100-03-02 0{i // 4}:{i:02d}:00,{value},{value},{unit}"
        for i, (item, value, unit) in enumerate(given)
    ]
    (mimic / "LABEVENTS.csv").write_text("\n".join([head, *lines]) + "\n")
    chart = [
        (226531, 80, "kg"),
        (226707, 180, "cm"),
        (220045, 80, "furlong"),
        (223762, 37, "\u00b0C"),
    ]
    lines = [
        f"1,101,1010,{item},2100-03-01 05:00:00,{value},{value},{unit},0"
        for item, value, unit in chart
    ]
    (mimic / "CHARTEVENTS.csv").write_text(
        "\n".join([TABLES["CHARTEVENTS"].splitlines()[0], *lines]) + "\n"
    )
    prepare(mimic, tmp_path / "out", "inputs=false", **SOME)
    found = [
        (name, round(value, 2))
        for _, name, value in entity_events(entity_rows(tmp_path / "out")[1010])
    ]
    assert sorted(found) == sorted(
        [
            ("Creatinine", 1.0),
            ("Creatinine", 1.1),
            ("Creatinine", 1.2),
            ("Creatinine", 1.3),
            ("CRP", 20.0),
            ("Platelets", 200.0),
            ("PaCO2", 40.0),
            ("PaO2", 75.01),
            ("Weight", 80.0),
            ("Height", 180.0),
            ("Temp", 37.0),
        ]
    )
    dropped = summary(tmp_path / "out")["notes"]["events dropped by reason"]
    assert {name: count for name, count in dropped.items() if "unit" in name} == {
        f"labevents: Creatinine {plausible.OTHER_UNIT}": 2,
        f"labevents: WBC {plausible.OTHER_UNIT}": 1,
        f"chartevents: HR {plausible.OTHER_UNIT}": 1,
        plausible.CONVERTED: 5,
    }


def test_amounts_of_inputs_in_other_units_are_left_out_and_counted(mimic, tmp_path):
    """An item's amounts are in one unit: what cannot be brought to it stands in no series."""
    (mimic / "D_ITEMS.csv").write_text(
        "ITEMID,LABEL,UNITNAME\n225158,NaCl 0.9%,mL\n225152,Heparin,units\n225000,Ringer,\n"
        "225001,Albumin,L\n225002,Fentanyl,mcg\n225003,Tea,cups\n"
    )
    head = TABLES["INPUTEVENTS_MV"].splitlines()[0]
    given = [
        ("225158", 0.5, "L"),
        ("225158", 40, "cc"),
        ("225158", 30, ""),
        ("225158", 7, "mg"),
        ("225158", 8, "furlong"),
        ("225152", 5000, "Units"),
        ("225152", 3, "mL"),
        ("225152", 2, "U/hr"),
        ("225000", 20, "ml"),
        ("225000", 21, ""),
        ("225001", 1, ""),
        ("225002", 250, ""),
        ("225003", 2, ""),
    ]
    lines = [
        f"2,200,2000,2150-06-02 00:00:00,2150-06-02 {i:02d}:30:00,{item},{amount},{unit},Finished"
        for i, (item, amount, unit) in enumerate(given)
    ]
    (mimic / "INPUTEVENTS_MV.csv").write_text("\n".join([head, *lines]) + "\n")
    prepare(mimic, tmp_path / "out", **SOME)
    found = [
        (name, value)
        for _, name, value in entity_events(entity_rows(tmp_path / "out")[2000])
        if name.startswith("input: ")
    ]
    assert found == [
        ("input: NaCl 0.9%", 500),
        ("input: NaCl 0.9%", 40),
        ("input: NaCl 0.9%", 30),
        ("input: Heparin", 5000),
        ("input: Ringer", 20),
        ("input: Ringer", 21),
        ("input: Albumin", 1000),
        ("input: Fentanyl", 0.25),
    ]
    dropped = summary(tmp_path / "out")["notes"]["events dropped by reason"]
    assert {name: count for name, count in dropped.items() if "amount" in name} == {
        "inputevents_mv: amount in an unknown unit": 3,
        "inputevents_mv: amount in a unit that measures something else than its item's in "
        "D_ITEMS": 2,
    }


@pytest.mark.parametrize(
    ("zoned", "without"),
    [
        ("CHARTEVENTS", "ICUSTAYS"),
        ("LABEVENTS", "ICUSTAYS"),
        ("PRESCRIPTIONS", "ICUSTAYS"),
        ("INPUTEVENTS_MV", "ICUSTAYS"),
        ("ICUSTAYS", "ADMISSIONS"),
        ("ADMISSIONS", "ICUSTAYS"),
    ],
)
def test_tables_with_and_without_zones_are_not_mixed(mimic, tmp_path, zoned, without):
    (mimic / f"{zoned}.csv").write_text(re.sub(r"(\d\d:\d\d:\d\d)", r"\1-05:00", TABLES[zoned]))
    with pytest.raises(
        ValueError,
        match=rf"{zoned}\.csv: its times have a zone .*, and those of {without}\.csv have none",
    ):
        prepare(mimic, tmp_path / "out", **SOME)


def test_tables_whose_times_all_have_a_zone(mimic, tmp_path):
    """The hours are those of the same tables without zones; days of birth need none."""
    prepare(mimic, tmp_path / "plain", **SOME)
    for name in TABLES.keys() - {"PATIENTS"}:
        (mimic / f"{name}.csv").write_text(re.sub(r"(\d\d:\d\d:\d\d)", r"\1-05:00", TABLES[name]))
    prepare(mimic, tmp_path / "zoned", **SOME)
    plain, zoned = entity_rows(tmp_path / "plain"), entity_rows(tmp_path / "zoned")
    assert {entity: entity_events(row) for entity, row in zoned.items()} == {
        entity: entity_events(row) for entity, row in plain.items()
    }


def test_every_unit_of_the_demo_and_of_the_table_of_items_is_known():
    """Units that stand in MIMIC-III's LABEVENTS (its demo has these), and each item's own."""
    units = plausible.Units()
    rows_of_items = list(plausible.rows_of("items.csv"))
    assert all(
        units.factor(row["unit"], row["variable"], row["unit"], "") == 1 for row in rows_of_items
    )
    real = {
        "Osmolality": "MOSM/KG",
        "PT": "SECONDS",
        "PTT": "sec",
        "PaCO2": "MM HG",
        "PaO2": "mm Hg",
        "TSH": "uU/ML",
        "TotalCO2": "MEQ/L",
        "Triglycerides": "MG/DL",
        "TroponinI": "ng/ml",
        "pH": "UNITS",
        "UrinePH": "units",
        "FiO2": None,
        "INR": None,
    }
    unit_of = {row["variable"]: row["unit"] for row in rows_of_items}
    assert {
        name: units.factor(unit, name, unit_of[name], "") for name, unit in real.items()
    } == dict.fromkeys(real, 1.0)
    chart = [
        ("HR", "BPM"),
        ("RespRate", "insp/min"),
        ("RespRate", "BPM"),
        ("Temp", "Deg. F"),
        ("Temp", "Deg. C"),
        ("Temp", "?C"),
        ("TidalVolume", "ml/B"),
        ("FiO2", "torr"),
        ("GCS", "Points"),
        ("Urine", "ml"),
        ("Weight", "kg"),
    ]
    assert all(units.factor(unit, name, unit_of[name], "") == 1 for name, unit in chart)
    assert units.factor("mmol/L", "Glucose", "mg/dL", "") == pytest.approx(18.016) and np.isnan(
        units.factor("furlong", "Glucose", "mg/dL", "")
    )


def test_facts_and_outcomes(mimic, tmp_path):
    prepare(mimic, tmp_path / "out", **SOME)
    found = entity_rows(tmp_path / "out")
    years = (
        (np.datetime64("2100-01-01T10") - np.datetime64("2050-01-01T00"))
        / np.timedelta64(1, "D")
        / 365.2425
    )
    assert found[1000]["static"] == {
        "Age": pytest.approx(years),
        "Gender": "female",
        "CareUnit": "MICU",
        "Source": "carevue",
        "AdmissionType": "EMERGENCY",
        "previous_codes": [],
    }
    assert (
        found[1010]["static"]["previous_codes"] == ["0389", "4019"]
        and found[1001]["static"]["previous_codes"] == []
    )
    assert found[2000]["static"]["Age"] == 91.4 and found[2000]["static"]["Gender"] == "male"
    names = (
        "patient",
        "hospital_death",
        "death_hours",
        "icu_hours",
        "discharge_hours",
        "readmission_days",
        "care_unit",
        "dbsource",
        "stays_in_admission",
        "transfers",
    )
    assert {entity: tuple(row[name] for name in names) for entity, row in found.items()} == {
        1000: (1, 0, None, 48, 218, pytest.approx(49.5), "MICU", "carevue", 2, 0),
        1001: (1, 0, None, 48, 132, pytest.approx(49.5), "MICU", "carevue", 2, 1),
        1010: (1, 1, 83, 83, 95, None, "CCU", "metavision", 1, 0),
        2000: (2, 0, None, 72, 432, None, "CSRU", "metavision", 3, 0),
    }
    assert [found[i]["icd9"] for i in (1000, 1010, 2000)] == [
        ["0389", "4019"],
        ["41071"],
        ["41401"],
    ]
    assert [found[i]["next_icd9"] for i in (1000, 1001, 1010, 2000)] == [
        ["41071"],
        ["41071"],
        None,
        None,
    ]


def test_broken_stays_are_listed_by_place(mimic, tmp_path):
    prepare(mimic, tmp_path / "out", **SOME)
    found = summary(tmp_path / "out")
    assert [(row["path"], row["reason"]) for row in found["broken"]["files"]] == [
        ("ICUSTAYS.csv:row 5", "discharge before admission"),
        ("ICUSTAYS.csv:row 6", "the same icustay_id again"),
        ("ICUSTAYS.csv:row 7", "no such admission in ADMISSIONS"),
        ("ICUSTAYS.csv:row 8", "outtime before intime"),
        ("ICUSTAYS.csv:row 9", "no intime or outtime"),
    ]
    with pytest.raises(
        ValueError, match=r"5 of 9 rows are broken.*ICUSTAYS\.csv:row 5: discharge before admission"
    ):
        prepare(mimic, tmp_path / "out2")
    words = "".join(
        file.read_text()
        for file in (tmp_path / "out").rglob("*")
        if file.suffix in (".json", ".md")
    )
    assert not re.search(r"\b(1000|1010|2000|2003|3000)\b", words.replace('"train": 1000', "")), (
        "an id stands in a summary"
    )


@pytest.mark.parametrize("name", ["CHARTEVENTS", "LABEVENTS", "ICUSTAYS", "ADMISSIONS", "PATIENTS"])
def test_a_missing_table_is_named(mimic, tmp_path, name):
    (mimic / f"{name}.csv").unlink()
    with pytest.raises(
        ValueError,
        match=rf"no table {name} \(\.csv, \.csv\.gz or \.parquet\), which is needed for \w+",
    ):
        prepare(mimic, tmp_path / "out")


def test_tables_that_may_be_missing(mimic, tmp_path):
    for name in (
        "OUTPUTEVENTS",
        "INPUTEVENTS_CV",
        "INPUTEVENTS_MV",
        "PRESCRIPTIONS",
        "DIAGNOSES_ICD",
        "PROCEDURES_ICD",
        "D_ITEMS",
    ):
        (mimic / f"{name}.csv").unlink()
    prepare(mimic, tmp_path / "out", **SOME)
    assert set(summary(tmp_path / "out")["notes"]["tables that are not there"]) == {
        "OUTPUTEVENTS",
        "INPUTEVENTS",
        "PRESCRIPTIONS",
        "DIAGNOSES_ICD",
        "D_ITEMS",
    }
    found = entity_rows(tmp_path / "out")
    assert {(row["icd9"], row["next_icd9"]) for row in found.values()} == {(None, None)}, (
        "not known is not none"
    )
    assert entity_events(found[2000]) == f((-12, "Glucose", 500), (24, "UrinePH", 6.5))


def test_options_leave_tables_out(mimic, tmp_path):
    prepare(mimic, tmp_path / "out", "drugs=false", "inputs=false", **SOME)
    assert not [
        name
        for row in entity_rows(tmp_path / "out").values()
        for name in row["variables"]
        if ": " in name
    ]


def test_empty_tables(mimic, tmp_path):
    """Without rows CHARTEVENTS gives no events; ICUSTAYS without rows is refused."""
    header = TABLES["CHARTEVENTS"].splitlines()[0]
    (mimic / "CHARTEVENTS.csv").write_text(header + "\n")
    prepare(mimic, tmp_path / "out", **SOME)
    assert entity_events(entity_rows(tmp_path / "out")[1000]) == f(
        (2, "input: .9% Normal Saline", 250)
    )
    (mimic / "ICUSTAYS.csv").write_text(TABLES["ICUSTAYS"].splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no entities"):
        prepare(mimic, tmp_path / "out2", **SOME)
    (mimic / "CHARTEVENTS.csv").write_text("")
    (mimic / "ICUSTAYS.csv").write_text(TABLES["ICUSTAYS"])
    with pytest.raises(ValueError, match=r"CHARTEVENTS\.csv: an empty file"):
        prepare(mimic, tmp_path / "out3", **SOME)


def test_forms_of_the_tables(mimic, tmp_path):
    """Lower and upper case, columns in another order, compressed, Parquet, CHARTEVENTS in two
    files, rows in another order: the same streams.
    """
    prepare(mimic, tmp_path / "out", **SOME)
    expected = entity_rows(tmp_path / "out")
    for form in ("csv.gz", "parquet", "split"):
        root = tmp_path / form
        root.mkdir()
        for name in TABLES:
            read = pcsv.read_csv(
                mimic / f"{name}.csv",
                convert_options=pcsv.ConvertOptions(
                    column_types={"VALUE": pa.string(), "ICD9_CODE": pa.string()}
                ),
            )
            read = read.select(read.column_names[::-1])
            if name != "ICUSTAYS":
                read = read.take(pa.array(range(len(read) - 1, -1, -1)))
            lower = read.rename_columns([column.lower() for column in read.column_names])
            if form == "parquet":
                pq.write_table(lower, root / f"{name.lower()}.parquet")
            elif form == "split" and name == "CHARTEVENTS":
                pcsv.write_csv(read.slice(0, 7), root / "CHARTEVENTS_1.csv")
                pcsv.write_csv(lower.slice(7), root / "chartevents_2.csv")
            else:
                with pa.output_stream(
                    str(root / f"{name.lower()}.csv.gz"), compression="gzip"
                ) as sink:
                    pcsv.write_csv(lower, sink)
        prepare(root, tmp_path / f"out {form}", **SOME)
        assert entity_rows(tmp_path / f"out {form}") == expected


# ---------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo() -> Path:
    return Path(os.environ["ONETOMANY_DATA"], "healthcare", "mimic3_demo")


@pytest.fixture(scope="module")
def prepared(demo, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "out"
    prepare(demo, output)
    return output


STREAMS = """
with stays as (select s.*, a.admittime from '{demo}/icustays.parquet' s join '{demo}/admissions.parquet' a using (hadm_id)),
raw as (select 'chartevents' t, row_number() over () n, subject_id, hadm_id, itemid, charttime, valuenum v, null::varchar w
        from '{demo}/chartevents_vitals.parquet'
        union all select 'labevents', row_number() over (), subject_id, hadm_id, itemid, charttime, valuenum, value from '{demo}/labevents.parquet'),
items as (select * from read_csv('{clinical}/items.csv', comment='#', header=true, all_varchar=true)),
ranges as (select variable, outlier_low::double a, valid_low::double b, valid_high::double c, outlier_high::double d
           from read_csv('{clinical}/ranges.csv', comment='#', header=true, all_varchar=true)),
numbers as (select raw.*, i.variable, i.conversion, coalesce(v, try_cast(regexp_replace(w, '^(<|>|LESS THAN |GREATER THAN )\\s*', '') as double)) x
            from raw join items i on i."table" = raw.t and i.itemid::int = raw.itemid),
units as (select *, case when conversion = 'celsius' and x >= 79 then (x - 32) * 5 / 9 when conversion = 'percent' and x > 0 and x <= 1.1 then x * 100
          else x end y
          from numbers where x is not null),
good as (select u.*, case when r.variable is null then y else least(greatest(y, b), c) end z from units u left join ranges r using (variable)
         where r.variable is null or (y >= a and y <= d)),
drugs as (select 'prescriptions' t, row_number() over () n, subject_id, hadm_id, case when startdate = date_trunc('day', startdate)
          then startdate + interval 1 day else startdate end charttime,
          'drug: ' || regexp_replace(trim(drug), '\\s+', ' ', 'g') variable, 1.0::double z from '{demo}/prescriptions.parquet'),
every as (select t, n, subject_id, hadm_id, charttime, variable, z from good union all select * from drugs),
placed as (select e.*, s.icustay_id, s.intime, s.admittime, row_number() over (partition by t, n order by s.outtime) k from every e join stays s
           on case when e.hadm_id is not null then s.hadm_id = e.hadm_id else s.subject_id = e.subject_id end and s.outtime >= e.charttime),
events as (select distinct icustay_id, (epoch(charttime - intime) / 3600)::float h, variable, z::float z from placed where k = 1 and charttime >= admittime),
scores as (select icustay_id, h, 'GCS' variable, sum(z)::float z from (select icustay_id, h, variable, min(z) z from events where variable like 'GCS_%'
           group by all) group by icustay_id, h having count(*) = 3)
select * from events union all select * from scores where (icustay_id, h) not in (select icustay_id, h from events where variable = 'GCS')
"""


@DEMO
def test_demo_streams_equal_sql(demo, prepared):
    """Every event of every stay, derived by SQL from the raw tables."""
    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    sql = connection.execute(STREAMS.format(demo=demo, clinical=plausible.CLINICAL)).fetchall()
    ours = [
        (entity, *event)
        for entity, row in entity_rows(prepared).items()
        for event in entity_events(row)
    ]
    assert len(ours) > 150_000 and sorted(ours) == sorted(sql)
    counts = dict(
        connection.execute(
            f"select vital, count(*) from '{demo}/chartevents_vitals.parquet' group by vital"
        ).fetchall()
    )
    assert (
        0.97 * counts["heart_rate"]
        < sum(event[2] == "HR" for event in ours)
        <= counts["heart_rate"]
    )


@DEMO
def test_no_row_of_the_demo_is_lost_by_its_unit(prepared):
    dropped = summary(prepared)["notes"]["events dropped by reason"]
    assert not [name for name in dropped if plausible.OTHER_UNIT in name]


@DEMO
def test_demo_stays_equal_sql(demo, prepared):
    """Stays, patients and outcomes against SQL."""
    found = entity_rows(prepared)
    assert len(found) == 136 and len({row["patient"] for row in found.values()}) == 100
    sql = duckdb.sql(f"""
        with a as (select *, lead(admittime) over (partition by subject_id order by admittime) next from '{demo}/admissions.parquet')
        select icustay_id, s.subject_id, hospital_expire_flag, round(epoch(deathtime - intime) / 3600, 6), round(epoch(outtime - intime) / 3600, 6),
               round(epoch(dischtime - intime) / 3600, 6), round(epoch(next - dischtime) / 86400, 6), first_careunit, dbsource,
               count(*) over (partition by hadm_id), (first_careunit <> last_careunit or first_wardid <> last_wardid)::int, admission_type,
               case when gender = 'F' then 'female' else 'male' end, round(least(date_diff('day', dob, intime::date) / 365.2425, 300), 1)
        from '{demo}/icustays.parquet' s join a using (hadm_id) join '{demo}/patients.parquet' p on p.subject_id = s.subject_id
        order by icustay_id""").fetchall()

    def message(row: dict) -> tuple:
        numbers = [
            None if row[name] is None else round(row[name], 6)
            for name in ("death_hours", "icu_hours", "discharge_hours", "readmission_days")
        ]
        static = row["static"]
        age = 300.0 if static["Age"] == 91.4 else round(static["Age"], 1)
        return (
            row["entity"],
            row["patient"],
            row["hospital_death"],
            *numbers,
            row["care_unit"],
            row["dbsource"],
            row["stays_in_admission"],
            row["transfers"],
            static["AdmissionType"],
            static["Gender"],
            age,
        )

    ours = [message(found[entity]) for entity in sorted(found)]
    assert [row[:-1] for row in ours] == [row[:-1] for row in sql]
    assert all(
        abs(a[-1] - b[-1]) < 0.11 or (a[-1] == 300 and b[-1] >= 299)
        for a, b in zip(ours, sql, strict=True)
    )
    assert sum(row["hospital_death"] for row in found.values()) == 46
    los = dict(duckdb.sql(f"select icustay_id, los from '{demo}/icustays.parquet'").fetchall())
    assert all(abs(found[entity]["icu_hours"] / 24 - los[entity]) < 1e-3 for entity in found)


@DEMO
def test_demo_codes_equal_sql(demo, prepared):
    """Codes of this admission, and of those before it, never the other way round."""
    found = entity_rows(prepared)
    own = dict(
        duckdb.sql(
            f"select icustay_id, list(distinct icd9_code) from '{demo}/icustays.parquet' join "
            f"'{demo}/diagnoses_icd.parquet' using (hadm_id) where icd9_code is not null group by "
            "icustay_id"
        ).fetchall()
    )
    earlier = dict(
        duckdb.sql(f"""select icustay_id, list(distinct icd9_code) from '{demo}/icustays.parquet' s
        join '{demo}/admissions.parquet' a using (hadm_id)
        join '{demo}/admissions.parquet' b on b.subject_id = a.subject_id and b.dischtime <= a.admittime
        join '{demo}/diagnoses_icd.parquet' d on d.hadm_id = b.hadm_id where icd9_code is not null group by icustay_id""").fetchall()
    )
    assert {entity: row["icd9"] and set(row["icd9"]) for entity, row in found.items()} == {
        entity: own.get(entity) and set(own[entity]) for entity in found
    }
    assert {entity: set(row["static"]["previous_codes"]) for entity, row in found.items()} == {
        entity: set(earlier.get(entity, ())) for entity in found
    }
    assert 10 < sum(bool(row["static"]["previous_codes"]) for row in found.values()) < 60


@DEMO
def test_demo_messages_hold_no_ids(prepared, demo):
    """No id of a patient, admission or stay in any file beside the rows."""
    ids = {
        str(value)
        for table in ("icustays", "admissions")
        for column in ("subject_id", "hadm_id", "icustay_id")
        if column in pq.read_schema(demo / f"{table}.parquet").names
        for value in pq.read_table(demo / f"{table}.parquet")[column].to_pylist()
    }
    words = {
        word
        for file in prepared.rglob("*")
        if file.suffix in (".json", ".md")
        for word in re.findall(r"\d+", file.read_text())
    }
    sizes = {
        str(number) for number in (file.stat().st_size for file in prepared.rglob("*.parquet"))
    }
    assert not (words & ids) - sizes
