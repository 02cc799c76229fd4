"""MIMIC-IV's tables: small ones by hand, and the demo of MIMIC-III (its stays of MetaVision) written
in the layout of MIMIC-IV, checked against plain SQL (DuckDB) and against `prepare mimic3`.
"""

import os
from functools import partial
from pathlib import Path

import duckdb
import pytest
from prepare import conftest
from prepare.conftest import entity_events, entity_rows, summary, write
from prepare.test_mimic3 import DEMO, STREAMS, TABLES, f

from pipeline.prepare.clinical import plausible

prepare = partial(conftest.prepare, "mimic4")
HAND = {
    "hosp/patients": """subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod
1,F,60,2100,2014 - 2016,
2,M,91,2150,2011 - 2013,2150-06-25
""",
    "hosp/admissions": """subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,hospital_expire_flag
1,100,2101-01-01 08:00:00,2101-01-10 12:00:00,,EW EMER.,0
1,101,2102-03-01 00:00:00,2102-03-04 12:00:00,2102-03-04 13:00:00,URGENT,1
2,200,2150-06-01 10:00:00,2150-06-20 23:00:00,,ELECTIVE,0
""",
    "hosp/diagnoses_icd": """subject_id,hadm_id,seq_num,icd_code,icd_version
1,100,2,4019,9
1,100,1,V4511  ,9
1,101,1,I214,10
1,101,2,V4511,10
2,200,1,E8881,9
2,200,2,E8881,10
2,200,3,I10,
""",
    "hosp/labevents": """labevent_id,subject_id,hadm_id,specimen_id,itemid,charttime,storetime,value,valuenum,valueuom
1,1,101,1,50912,2102-03-01 02:00:00,2102-03-01 03:30:00,1.5,1.5,mg/dL
2,1,101,1,50912,2102-03-01 05:00:00,2102-03-01 04:00:00,1.6,1.6,mg/dL
3,1,101,1,50912,2102-03-01 06:00:00,,1.7,1.7,mg/dL
4,1,,2,50912,2102-03-02 06:00:00,2102-03-02 07:00:00,1.8,1.8,mg/dL
5,1,,3,50912,2101-02-02 06:00:00,2101-02-02 07:00:00,1.9,1.9,mg/dL
6,1,101,4,50931,2102-03-02 06:00:00,2102-03-02 07:00:00,___,,mg/dL
7,1,101,5,51003,2102-03-04 11:00:00,2102-03-04 12:30:00,<0.01,,ng/mL
""",
    "hosp/prescriptions": """subject_id,hadm_id,pharmacy_id,starttime,stoptime,drug_type,drug
1,101,1,2102-03-01 08:00:00,2102-03-03 00:00:00,MAIN,Heparin
1,101,2,2102-03-02 00:00:00,2102-03-03 00:00:00,MAIN,Aspirin
""",
    "icu/icustays": """subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los
1,100,1000,Neuro Stepdown,Surgical Intensive Care Unit (SICU),2101-01-01 10:00:00,2101-01-03 10:00:00,2
1,101,1010,Medical Intensive Care Unit (MICU),Medical Intensive Care Unit (MICU),2102-03-01 01:00:00,2102-03-04 12:00:00,3
2,200,2000,Cardiac Vascular Intensive Care Unit (CVICU),Coronary Care Unit (CCU),2150-06-02 00:00:00,2150-06-05 00:00:00,3
2,200,,Coronary Care Unit (CCU),Coronary Care Unit (CCU),2150-06-02 00:00:00,2150-06-05 00:00:00,3
""",
    "icu/chartevents": """subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning
1,101,1010,7,2102-03-01 02:00:00,2102-03-01 09:00:00,220045,101,101,bpm,1
1,101,1010,7,2102-03-01 06:00:00,2102-03-01 08:00:00,220621,300,300,mg/dL,1
1,101,1010,7,2102-03-01 06:00:00,2102-03-01 08:00:00,225664,200,200,mg/dL,1
1,101,1010,7,2102-03-01 06:00:00,,220274,7.2,7.2,,0
""",
    "icu/outputevents": """subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valueuom
2,200,2000,7,2150-06-02 03:00:00,2150-06-02 04:00:00,226559,150,ml
""",
    "icu/inputevents": """subject_id,hadm_id,stay_id,starttime,endtime,storetime,itemid,amount,amountuom,statusdescription
2,200,2000,2150-06-02 00:00:00,2150-06-02 12:00:00,2150-06-02 13:00:00,225158,250,ml,FinishedRunning
2,200,2000,2150-06-02 00:00:00,2150-06-02 13:00:00,2150-06-02 13:00:00,225158,500,ml,Rewritten
""",
    "icu/d_items": "itemid,label,linksto,unitname\n225158,NaCl 0.9%,inputevents,mL\n",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,starttime,endtime,itemid,value\n",
}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hand")
    for name, text in HAND.items():
        write(root / f"in/{name}.csv", text)
    prepare(root / "in", root / "out", max_bad=0.5)
    return root / "out"


def test_events_by_hand(by_hand):
    """A laboratory value counts from its result, in chartevents too; without a hadm_id it belongs to
    the admission that holds its time.
    """
    found = entity_rows(by_hand)
    assert {stay: entity_events(row) for stay, row in found.items()} == {
        1000: [],
        1010: f(
            (1, "HR", 101),
            (2.5, "Creatinine", 1.5),
            (4, "Creatinine", 1.6),
            (5, "Creatinine", 1.7),
            (5, "Glucose", 200),
            (5, "pH", 7.2),
            (7, "Glucose", 300),
            (7, "drug: Heparin", 1),
            (23, "drug: Aspirin", 1),
            (30, "Creatinine", 1.8),
        ),
        2000: f((3, "Urine", 150), (12, "input: NaCl 0.9%", 250)),
    }
    notes = summary(by_hand)["notes"]
    assert notes["laboratory values without a storetime, taken at their charttime"] == 2
    assert notes["events dropped by reason"] == {
        "inputevents: rewritten": 1,
        "labevents: no number": 1,
        "labevents: outside the stay": 2,
    }
    assert [row["reason"] for row in summary(by_hand)["broken"]["files"]] == ["no stay_id"]


def test_facts_and_outcomes_by_hand(by_hand):
    """Codes stand by their version: V4511 is another condition in ICD-9 than in ICD-10. Care units
    and emergencies have their names of MIMIC-III.
    """
    found = entity_rows(by_hand)
    assert {stay: row["static"] for stay, row in found.items()} == {
        stay: dict(
            zip(
                (
                    "Age",
                    "Gender",
                    "CareUnit",
                    "AdmissionType",
                    "previous_codes",
                    "previous_icd10",
                ),
                facts,
                strict=True,
            )
        )
        for stay, facts in {
            1000: (61, "female", "Neuro Stepdown", "EMERGENCY", [], []),
            1010: (62, "female", "MICU", "URGENT", ["V4511", "4019"], []),
            2000: (91, "male", "CSRU", "ELECTIVE", [], []),
        }.items()
    }
    names = ("icd9", "icd10", "next_icd9", "next_icd10")
    assert {stay: tuple(row[name] for name in names) for stay, row in found.items()} == {
        1000: (["V4511", "4019"], None, None, ["I214", "V4511"]),
        1010: (None, ["I214", "V4511"], None, None),
        2000: (["E8881"], ["E8881"], None, None),
    }
    names = ("hospital_death", "death_hours", "death_days", "icu_hours", "transfers")
    assert {stay: tuple(row[name] for name in names) for stay, row in found.items()} == {
        1000: (0, None, None, 48, 1),
        1010: (1, 84, None, 83, 0),
        2000: (0, None, 5, 72, 1),
    }


@pytest.mark.parametrize(
    ("command", "tables", "message"),
    [
        ("mimic4", TABLES, "MIMIC-III .*a column icustay_id.*run onetomany prepare mimic3"),
        ("mimic3", HAND, "MIMIC-IV .*a column stay_id.*run onetomany prepare mimic4"),
    ],
)
def test_a_folder_of_the_other_data_set_is_named(tmp_path, command, tables, message):
    for name, text in tables.items():
        write(tmp_path / f"in/{name}.csv", text)
    with pytest.raises(ValueError, match=message):
        conftest.prepare(command, tmp_path / "in", tmp_path / "out")


def test_a_table_without_times_of_results_is_refused(tmp_path):
    for name, text in HAND.items():
        write(tmp_path / f"in/{name}.csv", text.replace("storetime", "stored"))
    with pytest.raises(ValueError, match=r"labevents\.csv: no column 'storetime'"):
        prepare(tmp_path / "in", tmp_path / "out", max_bad=0.5)


# ---------------------------------------------------------------- the demo


SUBSET = """subject_id IN (
    SELECT subject_id FROM '{demo}/icustays.parquet' WHERE dbsource = 'metavision'
    GROUP BY subject_id ORDER BY count(*) DESC, subject_id LIMIT 6)"""
LAYOUT = {
    "hosp/patients": """
        SELECT p.subject_id, gender, if(age > 89, 91, age) AS anchor_age, anchor_year,
            '2008 - 2010' AS anchor_year_group, dod::DATE AS dod
        FROM patients p JOIN (
            SELECT a.subject_id, year(min(admittime)) AS anchor_year,
                date_diff('year', min(dob), min(admittime)) AS age
            FROM admissions a JOIN patients q ON q.subject_id = a.subject_id GROUP BY a.subject_id
        ) b ON b.subject_id = p.subject_id""",
    "hosp/admissions": "SELECT * EXCLUDE (diagnosis, religion) RENAME (ethnicity AS race) FROM "
    "admissions",
    "hosp/labevents": """
        SELECT row_number() OVER () AS labevent_id, subject_id, hadm_id, 1 AS specimen_id, itemid,
            charttime, charttime + to_minutes(itemid % 180 - 20) AS storetime, value, valuenum,
            valueuom, flag FROM labevents""",
    "hosp/prescriptions": "SELECT *, startdate + INTERVAL 1 DAY AS starttime FROM prescriptions",
    "hosp/diagnoses_icd": """
        SELECT subject_id, hadm_id, seq_num, icd9_code AS icd_code, 9 + hadm_id % 2 AS icd_version
        FROM diagnoses_icd""",
    "icu/icustays": """
        SELECT subject_id, hadm_id, icustay_id AS stay_id,
            'Intensive Care Unit (' || first_careunit || ')' AS first_careunit,
            'Intensive Care Unit (' || last_careunit || ')' AS last_careunit, intime, outtime, los
        FROM icustays""",
    "icu/chartevents": """
        SELECT subject_id, hadm_id, icustay_id AS stay_id, charttime, charttime AS storetime,
            itemid, valuenum::VARCHAR AS value, valuenum, NULL::VARCHAR AS valueuom, 0 AS warning
        FROM chartevents_vitals""",
}
"""Tables of MIMIC-IV made of those of MIMIC-III. Results are there up to 160 minutes after their
charttime; half of the admissions count as coded in ICD-10. Drugs start at the end of their day.
"""
BACK = {
    "icustays": "SELECT * RENAME (stay_id AS icustay_id) FROM '{0}/icu/icustays.csv.gz'",
    "admissions": "FROM '{0}/hosp/admissions.csv.gz'",
    "chartevents_vitals": "FROM '{0}/icu/chartevents.csv.gz'",
    "labevents": "SELECT * REPLACE (greatest(charttime, storetime) AS charttime, value::VARCHAR AS "
    "value) FROM '{0}/hosp/labevents.csv.gz'",
    "prescriptions": "SELECT * REPLACE (starttime - INTERVAL 1 DAY AS startdate) FROM "
    "'{0}/hosp/prescriptions.csv.gz'",
}
"""What STREAMS reads, from the tables of MIMIC-IV."""


SAME = (
    "entity",
    "patient",
    "hospital_death",
    "death_hours",
    "icu_hours",
    "discharge_hours",
    "readmission_days",
    "care_unit",
    "stays_in_admission",
)
"""Outcomes that both data sets have."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Stays of six patients of the demo: in 3 as MIMIC-III, in 4 as MIMIC-IV, and in out3 and
    out4 as they are prepared.
    """
    root = tmp_path_factory.mktemp("demo")
    source = Path(os.environ["ONETOMANY_DATA"], "healthcare", "mimic3_demo")
    for folder in ("3", "4/hosp", "4/icu"):
        (root / folder).mkdir(parents=True)
    with duckdb.connect() as connection:
        connection.execute("SET timezone = 'UTC'")
        for file in source.glob("*.parquet"):
            if file.stem.startswith("d_"):
                continue
            columns = connection.execute(f"DESCRIBE FROM '{file}'").fetchall()
            times = ", ".join(
                f"{name}::TIMESTAMP AS {name}" for name, kind, *_ in columns if "TIME" in kind
            )
            replaced = f"REPLACE ({times})" if times else ""
            connection.execute(
                f"CREATE TABLE {file.stem} AS SELECT * {replaced} FROM '{file}' "
                f"WHERE {SUBSET.format(demo=source)}"
            )
            connection.execute(f"COPY {file.stem} TO '{root}/3/{file.name}'")
        for name, query in LAYOUT.items():
            connection.execute(f"COPY ({query}) TO '{root}/4/{name}.csv.gz'")
    conftest.prepare("mimic3", root / "3", root / "out3")
    prepare(root / "4", root / "out4", part_mb=1)
    return root


@DEMO
def test_demo_events_equal_sql(demo, tmp_path):
    with duckdb.connect() as connection:
        for name, query in BACK.items():
            connection.execute(f"COPY ({query.format(demo / '4')}) TO '{tmp_path}/{name}.parquet'")
        sql = connection.execute(
            STREAMS.format(demo=tmp_path, clinical=plausible.CLINICAL)
        ).fetchall()
    ours = [
        (stay, *event)
        for stay, row in entity_rows(demo / "out4").items()
        for event in entity_events(row)
    ]
    assert len(ours) > 5_000 and sorted(ours) == sorted(sql)


@DEMO
def test_demo_stays_equal_those_of_mimic3(demo):
    """Beside the laboratory values, which count from their results, and the codes' versions."""
    ours, theirs = entity_rows(demo / "out4"), entity_rows(demo / "out3")
    assert {row["icd9"] is None for row in ours.values()} == {True, False}
    lab = {row["variable"] for row in plausible.rows_of("items.csv") if row["table"] == "labevents"}

    def comparable(row: dict, own: tuple[str, ...]) -> dict:
        static = {name: value for name, value in row["static"].items() if name in own}
        events = [event for event in entity_events(row) if event[1] not in lab]
        return {**{name: row[name] for name in SAME}, **static, "events": events}

    facts = ("Gender", "CareUnit", "AdmissionType")
    assert {stay: comparable(row, facts) for stay, row in ours.items()} == {
        stay: comparable(row, facts) for stay, row in theirs.items()
    }
    for stay, row in ours.items():
        static, other = row["static"], theirs[stay]["static"]
        assert (row["icd9"] or row["icd10"]) == theirs[stay]["icd9"]
        previous = {*static["previous_codes"], *static["previous_icd10"]}
        assert previous == set(other["previous_codes"])
        assert abs(static["Age"] - other["Age"]) <= 2


@DEMO
def test_demo_ages_and_days_to_death_equal_sql(demo):
    sql = duckdb.sql(f"""
        SELECT stay_id, anchor_age + year(admittime) - anchor_year,
            date_diff('day', dischtime::DATE, dod::DATE), (first_careunit <> last_careunit)::INT
        FROM '{demo}/4/icu/icustays.csv.gz' s
        JOIN '{demo}/4/hosp/admissions.csv.gz' a ON a.hadm_id = s.hadm_id
        JOIN '{demo}/4/hosp/patients.csv.gz' p ON p.subject_id = s.subject_id""").fetchall()
    ours = {
        (stay, row["static"]["Age"], row["death_days"], row["transfers"])
        for stay, row in entity_rows(demo / "out4").items()
    }
    assert ours == set(sql) and len({days for _, _, days, _ in ours}) > 3
