"""eICU's tables: small ones by hand in its layout, and real records of PhysioNet 2012 written in it
and checked against plain SQL (DuckDB). eICU itself is not tried: only who signed its agreement may.
"""

import gzip
import os
import re
from functools import partial
from pathlib import Path

import duckdb
import pytest
from prepare import conftest
from prepare.conftest import as_float32 as f
from prepare.conftest import entity_events, entity_rows, summary

from pipeline.prepare.clinical import plausible

prepare = partial(conftest.prepare, "eicu")
TABLES = {
    "patient": """patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,admissionheight,admissionweight,hospitaladmitoffset,hospitaldischargeoffset,hospitaldischargestatus,unittype,unitadmitsource,unitvisitnumber,unitstaytype,unitdischargeoffset,unitdischargestatus,uniquepid
70002,7001,Female,> 89,Caucasian,59,61.2,162.6,-600,6000,Expired,Cardiac ICU,Emergency Department,2,readmit,3000,Expired,002-1
70001,7001,Female,> 89,Caucasian,59,17.5,0.00,-600,6000,Expired,MICU,Emergency Department,1,admit,600,Alive,002-1
80001,8001,Male,64,,73,1.75,80,-5,2880,Alive,Med-Surg ICU,,1,admit,1440,Alive,010-9
80002,8002,Unknown,,,73,72,72,0,,,SICU,Floor,1,stepdown/other,60,,010-10
80002,8002,Unknown,,,73,,,0,,,SICU,Floor,1,stepdown/other,60,,010-10
80003,8003,Male,50,,73,,,0,10,Alive,SICU,Floor,1,admit,-1,Alive,010-11
80004,8001,Male,64,,73,,,0,10,Alive,SICU,Floor,1,admit,,Alive,010-9
80005,8005,Male,50,,73,,,0,10,Alive,SICU,Floor,1,admit,60,Alive,
""",
    "vitalPeriodic": """vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,etco2,systemicsystolic,systemicdiastolic,systemicmean,pasystolic,st1
1,70001,5,,97,80,,,31,,,,40,0.2
2,70001,10,98.6,,,18,7,,120,60,80,,
3,70001,600,37,,500,,,,,,,,
4,70001,601,,,81,,,,,,,,
5,70001,-601,,,82,,,,,,,,
6,99999,5,,,83,,,,,,,,
7,70002,,,,84,,,,,,,,
8,80001,-5,,,x,,,,,,,,
""",
    "vitalAperiodic": """vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,noninvasivemean,paop
1,70001,12,118,61,79,15
""",
    "lab": """labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem,labmeasurenameinterface,labresultrevisedoffset
1,80001,30,1,creatinine,88.42,88.42,umol/L,umol/L,60
2,80001,30,3,WBC x 1000,14.3,14.3  ,K/mcL,k/mm cu,60
3,80001,30,7,pH,735,735,"","",20
4,80001,30,1,ammonia,100,100,mcg/dL,mcg/dL,30
5,80001,30,1,BUN,8,8,furlong,furlong,30
6,80001,30,1,Ferritin,8,8,ng/mL,ng/mL,30
7,80001,30,1,glucose,,>600,mg/dL,mg/dL,30
8,80001,1430,1,sodium,140,140,mmol/L,mmol/L,1450
9,80001,30,1,LACTATE,2,2,"",mmol/L,30
""",
    "nurseCharting": """nursingchartid,patientunitstayid,nursingchartoffset,nursingchartentryoffset,nursingchartcelltypecat,nursingchartcelltypevallabel,nursingchartcelltypevalname,nursingchartvalue
1,70002,60,75,Scores,Glasgow coma score,GCS Total,13
2,70002,60,75,Scores,Glasgow coma score,Motor,6
3,70002,60,75,Vital Signs,Temperature,Temperature (F),98.6
4,70002,60,75,Vital Signs,Temperature,Temperature (C),37
5,70002,60,75,Other Vital Signs and Infusions,"Eye, Ear, Nose",Value,WDL
6,70002,60,75,Vital Signs,Heart Rate,Heart Rate,ok
""",
    "respiratoryCharting": """respchartid,patientunitstayid,respchartoffset,respchartentryoffset,respcharttypecat,respchartvaluelabel,respchartvalue
1,70002,60,60,respFlowSettings,FiO2,80%
2,70002,60,66,respFlowSettings,PEEP,5
3,70002,60,60,respFlowCareData,O2 Device,Bi-PAP
4,70002,60,,respFlowSettings,FIO2 (%),0.5
""",
    "intakeOutput": """intakeoutputid,patientunitstayid,intakeoutputoffset,intaketotal,outputtotal,dialysistotal,nettotal,intakeoutputentryoffset,cellpath,celllabel,cellvaluenumeric,cellvaluetext
1,80001,120,0,0,0,0,180,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|URINE,URINE,125.0,125
2,80001,120,0,0,0,0,120,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Chest  Tube,Chest  Tube,40,40
3,80001,120,0,0,0,0,120,flowsheet|Flowsheet Cell Labels|I&O|Intake (ml)|Crystalloids (ml)|NS,NS,250,250
4,80001,120,0,0,0,0,120,flowsheet|Flowsheet Cell Labels|I&O|Intake (ml)|Crystalloids (ml)|NS,NS,-250,-250
5,80001,120,0,0,0,0,120,flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight (kg),Bodyweight (kg),81.5,81.5
6,80001,120,0,0,0,0,120,flowsheet|Flowsheet Cell Labels|I&O|Weight|Bodyweight (lb),Bodyweight (lb),179.7,179.7
7,80001,240,0,0,0,0,240,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Foley catheter,Foley catheter,300,300
8,80001,300,0,0,0,0,300,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Output (mL)-Urethral Catheter,Output (mL)-Urethral Catheter,50,50
9,80001,360,0,0,0,0,360,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Straight  cath UOP,Straight  cath UOP,60,60
10,80001,420,0,0,0,0,420,flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Foley PACU,Foley PACU,70,70
11,80001,480,0,0,0,0,480,"flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Urine, L neph:","Urine, L neph:",80,80
""",
    "infusionDrug": """infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,volumeoffluid,patientweight
1,70002,90,Norepinephrine (mcg/min),7.5,,,,
2,70002,120,Norepinephrine (mcg/min),0,,,,
3,70002,150,Norepinephrine (mcg/min),OFF,,,,
""",
    "medication": """medicationid,patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,drugname,drughiclseqno,dosage,prn,drugstopoffset,gtc
1,80001,60,30,No,No,ASPIRIN  81 MG,1820,81,No,2739,0
2,80001,60,90,No,No,,926,50 ML,No,2739,0
3,80001,60,90,No,Yes,LISINOPRIL,132,5,No,2739,0
4,80001,60,0,No,No,LISINOPRIL,132,5,No,2739,0
5,80001,60,90,No,No,,,5,No,2739,0
""",
    "diagnosis": 'diagnosisid,patientunitstayid,diagnosisoffset,icd9code\n1,80001,5,"038.9, A41.9"\n',
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The rows of the tables, under the names of the publisher: one is compressed, one in other
    letters.
    """
    root = tmp_path_factory.mktemp("eicu") / "in"
    root.mkdir()
    for name, text in TABLES.items():
        (root / f"{name}.csv").write_text(text)
    (root / "lab.csv.gz").write_bytes(gzip.compress((root / "lab.csv").read_bytes()))
    (root / "lab.csv").unlink()
    (root / "vitalAperiodic.csv").rename(root / "VITALAPERIODIC.csv")
    prepare(root, root.parent / "out", max_bad=0.9)
    return root.parent / "out"


def test_events_by_hand(prepared):
    """A result counts from when it was entered, missing cells are no events, units are converted,
    and each row that is left out is counted once.
    """
    found = entity_rows(prepared)
    assert sorted(found) == [70001, 70002, 80001, 80002]
    assert entity_events(found[70001]) == f(
        (5 / 60, "HR", 80),
        (5 / 60, "SpO2", 97),
        (10 / 60, "CVP", 7),
        (10 / 60, "DiasABP", 60),
        (10 / 60, "MAP", 80),
        (10 / 60, "RespRate", 18),
        (10 / 60, "SysABP", 120),
        (10 / 60, "Temp", 37),
        (12 / 60, "NIDiasABP", 61),
        (12 / 60, "NIMAP", 79),
        (12 / 60, "NISysABP", 118),
        (10, "Temp", 37),
    )
    assert entity_events(found[70002]) == f(
        (1, "FiO2", 50),
        (1, "FiO2", 80),
        (1.1, "PEEP", 5),
        (1.25, "GCS", 13),
        (1.25, "GCS_motor", 6),
        (1.25, "Temp", 37),
        (1.5, "infusion: Norepinephrine (mcg/min)", 7.5),
        (2, "infusion: Norepinephrine (mcg/min)", 0),
    )
    assert entity_events(found[80001]) == f(
        (0.5, "Ammonia", 58.72),
        (0.5, "Glucose", 600),
        (0.5, "Lactate", 2),
        (0.5, "pH", 7.35),
        (1, "Creatinine", 88.42 * 0.01131),
        (1, "WBC", 14.3),
        (1, "drug: ASPIRIN 81 MG", 1),
        (1.5, "drug: HICL 926", 1),
        (2, "Weight", 81.5),
        (2, "input: NS", 250),
        (2, "output: Chest Tube", 40),
        (3, "Urine", 125),
        (4, "Urine", 300),
        (5, "Urine", 50),
        (6, "Urine", 60),
        (7, "output: Foley PACU", 70),
        (8, "Urine", 80),
    )
    notes = summary(prepared)["notes"]
    assert notes["events dropped by reason"] == {
        f"lab: BUN {plausible.OTHER_UNIT}": 1,
        "infusiondrug: no number": 1,
        "intakeoutput: out of range": 1,
        "intakeoutput: unknown item": 1,
        "lab: outside the stay": 1,
        "lab: unknown item": 1,
        "medication: cancelled": 1,
        "medication: no drug": 1,
        "medication: no time": 1,
        "nursecharting: no number": 1,
        "nursecharting: unknown item": 2,
        "respiratorycharting: unknown item": 1,
        "vitalperiodic: no number": 1,
        "vitalperiodic: no such stay": 1,
        "vitalperiodic: no time": 1,
        "vitalperiodic: out of range": 1,
        "vitalperiodic: outside the stay": 2,
        plausible.CONVERTED: 2,
        plausible.CENSORED: 1,
    }


def test_stays_by_hand(prepared):
    """Age above 89, heights and weights (swapped, metres, a weight twice, of 0 kg), outcomes, what
    is not known, and rows that cannot be used, named by position.
    """
    found = entity_rows(prepared)
    assert [found[stay]["static"] for stay in sorted(found)] == [
        {
            "Age": age,
            "Gender": gender,
            "CareUnit": unit,
            "AdmissionSource": source,
            "Height": height,
            "Weight": weight,
        }
        for age, gender, unit, source, height, weight in [
            (90, "female", "MICU", "Emergency Department", None, None),
            (90, "female", "CCU", "Emergency Department", 162.6, 61.2),
            (64, "male", "Med-Surg ICU", None, 175, 80),
            (None, None, "SICU", "Floor", None, 72),
        ]
    ]
    columns = (
        *("patient", "hospital", "hospital_death", "icu_death", "death_hours", "icu_hours"),
        *("discharge_hours", "stay_type", "stays_in_admission", "transfers"),
    )
    assert [tuple(found[stay][name] for name in columns) for stay in sorted(found)] == [
        ("002-1", 59, 1, 0, 100, 10, 100, "admit", 2, 0),
        ("002-1", 59, 1, 1, 50, 50, 100, "readmit", 2, 0),
        ("010-9", 73, 0, 0, None, 24, 48, "admit", 2, 0),
        ("010-10", 73, None, None, None, 1, None, "stepdown/other", 1, 0),
    ]
    about = summary(prepared)
    assert about["notes"]["ages above 89, taken as 90"] == 2 and about["notes"]["hospitals"] == 2
    mended = {name: count for name, count in about["notes"].items() if "eight" in name}
    assert mended == {
        "heights and weights that were swapped": 1,
        "heights in metres, converted": 1,
        "heights that are the weight again, left out": 1,
        "weights of at most 20 kg, left out": 1,
    }
    assert [(row["path"], row["reason"]) for row in about["broken"]["files"]] == [
        ("patient.csv:row 5", "the same patientunitstayid again"),
        ("patient.csv:row 6", "its end is before its start"),
        ("patient.csv:row 7", "no unitdischargeoffset"),
        ("patient.csv:row 8", "no uniquepid"),
    ]
    files = [file for file in prepared.rglob("*") if file.suffix in (".json", ".md")]
    words = {word for file in files for word in re.findall(r"\d+-?\d+", file.read_text())}
    assert files and not words & {"002-1", "010-9", *map(str, [*found, 7001, 8001])}


def test_labels_and_hospitals_of_a_cohort(prepared, tmp_path):
    """`prepare cohort` reads the rows as those of mimic3, and keeps the hospital to split by."""
    wanted = ("task=mortality", "hours=9", "exclude=none")
    conftest.prepare("cohort", prepared, tmp_path / "cohort", *wanted)
    rows = entity_rows(tmp_path / "cohort")
    assert {stay: (row["label"], row["hospital"]) for stay, row in rows.items()} == {
        70001: (1, 59),
        70002: (1, 59),
        80001: (0, 73),
    }


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            ["ICUSTAYS", "PATIENTS", "CHARTEVENTS"],
            "give them to onetomany prepare mimic3 or mimic4",
        ),
        (["person", "measurement"], "give them to onetomany prepare omop"),
        (["lab", "hospital"], r"no table patient .*and there are lab$"),
        (["patient", "diagnosis"], r"no table of events .*and there are patient$"),
        (["lab", "a/lab", "patient"], r"table lab stands there twice \((a/)?lab.csv, (a/)?lab"),
    ],
)
def test_folders_of_something_else(tmp_path, tables, message):
    for name in tables:
        file = tmp_path / f"in/{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------- real records

LABS = {
    **{"albumin": "Albumin g/dL", "alkaline phos.": "ALP Units/L", "ALT (SGPT)": "ALT Units/L"},
    **{"AST (SGOT)": "AST Units/L", "bicarbonate": "HCO3 mmol/L", "BUN": "BUN mg/dL"},
    **{"creatinine": "Creatinine mg/dL", "glucose": "Glucose mg/dL"},
    **{
        "Hct": "HCT %",
        "lactate": "Lactate mmol/L",
        "magnesium": "Mg mg/dL",
        "O2 Sat (%)": "SaO2 %",
    },
    **{"paCO2": "PaCO2 mm Hg", "paO2": "PaO2 mm Hg", "pH": "pH ", "potassium": "K mmol/L"},
    **{"platelets x 1000": "Platelets K/mcL", "sodium": "Na mmol/L", "WBC x 1000": "WBC K/mcL"},
    **{"total bilirubin": "Bilirubin mg/dL", "total cholesterol": "Cholesterol mg/dL"},
    **{"troponin - I": "TroponinI ng/mL", "troponin - T": "TroponinT ng/mL"},
}
WIDE = {
    "vitalPeriodic": {
        "temperature": "Temp",
        "heartrate": "HR",
        "respiration": "RespRate",
        "systemicsystolic": "SysABP",
        "systemicdiastolic": "DiasABP",
        "systemicmean": "MAP",
    },
    "vitalAperiodic": {
        "noninvasivesystolic": "NISysABP",
        "noninvasivediastolic": "NIDiasABP",
        "noninvasivemean": "NIMAP",
    },
}
SAMPLE = "recordid % 191 = 0"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Records of PhysioNet 2012 in eICU's layout, by DuckDB."""
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("needs the folder that ONETOMANY_DATA names")
    root = tmp_path_factory.mktemp("records")
    source = Path(os.environ["ONETOMANY_DATA"], "healthcare", "physionet2012")
    duckdb.sql(f"""create or replace temp table original as select recordid, minute,
        parameter::varchar p, value::double v, row_number() over () as place
        from '{source}/events_a.parquet' where {SAMPLE}""")
    duckdb.sql(f"""create or replace temp table person as select *, "In-hospital_death" died
        from '{source}/records_a.parquet' where {SAMPLE}""")
    labs = [(item, *text.split(" ", 1)) for item, text in LABS.items()]
    duckdb.sql("create or replace temp table named (labname varchar, p varchar, unit varchar)")
    duckdb.executemany("insert into named values (?, ?, ?)", labs)
    cells = {
        table: ", ".join(f"max(v) filter (p = '{p}') as {name}" for name, p in columns.items())
        for table, columns in WIDE.items()
    }
    wide = """select row_number() over () id, recordid patientunitstayid, minute observationoffset,
        {} from (select *, row_number() over (partition by recordid, minute, p) again from original)
        where p in {} group by recordid, minute, again"""
    fluid = "flowsheet|Flowsheet Cell Labels|I&O|"
    tables = {
        "patient": """select recordid patientunitstayid, recordid patienthealthsystemstayid,
            case Gender when 0 then 'Female' when 1 then 'Male' end gender, recordid % 7 hospitalid,
            case when Age > 89 then '> 89' else Age::int::varchar end age, Height admissionheight,
            Weight admissionweight, 0 hospitaladmitoffset, 'MICU' unittype, 2880 unitdischargeoffset,
            1440 * Length_of_stay hospitaldischargeoffset, '002-' || recordid uniquepid,
            if(died = 1, 'Expired', 'Alive') hospitaldischargestatus, 'Alive' unitdischargestatus
            from person""",
        **{name: wide.format(cells[name], tuple(WIDE[name].values())) for name in WIDE},
        "lab": """select place labid, recordid patientunitstayid, minute - 20 labresultoffset,
            labname, v labresult, unit labmeasurenamesystem, minute labresultrevisedoffset
            from original join named using (p)""",
        "nurseCharting": """select place nursingchartid, recordid patientunitstayid,
            minute nursingchartoffset, minute nursingchartentryoffset,
            'Glasgow coma score' nursingchartcelltypevallabel,
            'GCS Total' nursingchartcelltypevalname, v nursingchartvalue
            from original where p = 'GCS'""",
        "respiratoryCharting": """select place respchartid, recordid patientunitstayid,
            minute respchartoffset, minute respchartentryoffset, 'FiO2' respchartvaluelabel,
            v respchartvalue from original where p = 'FiO2'""",
        "intakeOutput": f"""select place intakeoutputid, recordid patientunitstayid,
            minute intakeoutputoffset, minute intakeoutputentryoffset, v cellvaluenumeric,
            if(p = 'Urine', '{fluid}Output (ml)|Urine', '{fluid}Weight|Bodyweight (kg)') cellpath
            from original where p in ('Urine', 'Weight')""",
    }
    for name, sql in tables.items():
        duckdb.sql(f"copy ({sql}) to '{root}/{name}.csv.gz' (header, compression gzip)")
    return root


def test_rows_of_real_records_equal_sql(records, tmp_path):
    """Every event and stay, against the records themselves and the ranges of the data file."""
    prepare(records, tmp_path / "out")
    ranges = f"read_csv('{plausible.CLINICAL}/ranges.csv', comment='#', header=true)"
    wanted: dict[int, list[tuple]] = {}
    for record, *event in duckdb.sql(f"""
        with clean as (select recordid, minute, p, case
            when p in ('FiO2', 'SaO2') and v > 0 and v <= 1.1 then v * 100
            when p = 'Temp' and v >= 79 then (v - 32) * 5 / 9
            when p = 'pH' and v between 630 and 850 then v / 100
            when p = 'pH' and v between 63 and 85 then v / 10 else v end v from original)
        select distinct recordid, (minute / 60)::float, p,
            least(greatest(v, valid_low), valid_high)::float
        from clean join {ranges} r on r.variable = p
        where v between outlier_low and outlier_high and p <> 'MechVent' order by all
        """).fetchall():
        wanted.setdefault(record, []).append(tuple(event))
    found = entity_rows(tmp_path / "out")
    assert {stay: entity_events(row) for stay, row in found.items()} == wanted
    assert len(found) > 20 and sum(map(len, wanted.values())) > 8000
    for record, age, died, days in duckdb.sql(
        "select recordid, Age, died, Length_of_stay from person"
    ).fetchall():
        own = found[record]
        assert own["static"]["Age"] == (90 if age > 89 else age)
        assert own["hospital_death"] == died and own["discharge_hours"] == 24 * days
    assert {name for events in wanted.values() for _, name, _ in events} == {
        *(text.split(" ")[0] for text in LABS.values()),
        *(name for columns in WIDE.values() for name in columns.values()),
        *("GCS", "FiO2", "Urine", "Weight"),
    }
