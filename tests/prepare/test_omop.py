"""OMOP's tables: small ones by hand with what is odd, and the demo of MIMIC-III written as OMOP by
pandas, against rows that pandas makes.
"""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import demo_table, prepare_and_read, read, summary

from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine import records
from pipeline.prepare.importers import omop

prepare = partial(conftest.prepare, "omop")
DEMO = pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
TABLES = {
    "PERSON": """person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime
1,8532,2060,1,1,
2,8507,2050,,,
3,0,2070,5,5,2070-05-05 10:00:00
""",
    "VISIT_OCCURRENCE": """visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,visit_end_date,visit_end_datetime,discharged_to_concept_id
10,1,9201,2100-01-02,2100-01-02 08:00:00,2100-01-05,2100-01-05 20:00:00,0
11,1,9201,2100-01-20,2100-01-20 00:00:00,2100-01-22,,4216643
12,1,9202,2100-01-10,2100-01-10 08:00:00,2100-01-10,2100-01-10 09:00:00,0
20,2,262,2100-03-01,2100-03-01 12:00:00,2100-03-04,2100-03-04 06:00:00,
30,9,9201,2100-03-01,2100-03-01 12:00:00,2100-03-04,2100-03-04 06:00:00,
31,3,9201,2100-03-04,2100-03-04 12:00:00,2100-03-01,2100-03-01 06:00:00,
""",
    "MEASUREMENT": """person_id,measurement_concept_id,measurement_date,measurement_datetime,value_as_number,value_as_concept_id,unit_concept_id,measurement_source_concept_id
1,100,2100-01-02,2100-01-02 09:30:00,80,,8483,
1,100,2100-01-02,2100-01-02 09:30:00,80,,8483,
1,100,2100-01-02,2100-01-02 10:00:00,1.3,,8484,
1,100,2100-01-02,2100-01-02 11:00:00,7,,0,
1,100,2100-01-02,2100-01-02 11:00:00,,,0,
1,101,2100-01-03,,,45877985,,
1,0,2100-01-03,2100-01-03 07:00:00,5,,,102
1,0,2100-01-03,2100-01-03 07:00:00,5,,,0
1,100,,,5,,,
,100,2100-01-03,2100-01-03 07:00:00,5,,,
2,999,2100-03-01,2100-03-01 13:00:00,6,,,
8,100,2100-03-01,2100-03-01 13:00:00,6,,,
""",
    "OBSERVATION": """person_id,observation_concept_id,observation_date,observation_datetime,value_as_number,value_as_string
1,103,2100-01-02,2100-01-02 12:00:00,,former smoker
""",
    "CONDITION_OCCURRENCE": """person_id,condition_concept_id,condition_start_date,condition_start_datetime
1,200,2100-01-02,2100-01-02 00:00:00
1,200,2099-06-01,
""",
    "DEATH": """person_id,death_date,death_datetime
1,2100-01-22,
2,2100-03-10,2100-03-10 12:00:00
""",
    "CONCEPT": """concept_id\tconcept_name\tvocabulary_id\tconcept_code
100\tHeart rate\tLOINC\t8867-4
101\tCulture\tLOINC\t600-7
102\tLocal\tSITE\tX1
103\tSmoking\tSNOMED\t365981007
200\tHypertension\tSNOMED\t38341003
8483\tper minute\tUCUM\t/min
8484\tper second\tUCUM\t/s
9201\tInpatient Visit\tVisit\tIP
45877985\tNo growth\tLOINC\tLA13
""",
}
SOME = {"max_bad": 0.9}


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "omop"
    source.mkdir()
    for name, text in TABLES.items():
        (source / f"{name}.csv").write_text(text)
    return source


def triples(row: dict) -> list[tuple]:
    pairs = zip(row["times"], row["variables"], row["values"], strict=True)
    return [(round(time, 3), name, round(value, 3)) for time, name, value in pairs]


STAY = [
    (-5144.0, "SNOMED/38341003", 1.0),
    (0.0, "Visit/IP", 1.0),
    (1.5, "LOINC/8867-4: /min", 80.0),
    (2.0, "LOINC/8867-4: /s", 1.3),
    (3.0, "LOINC/8867-4", 1.0),
    (3.0, "LOINC/8867-4: number", 7.0),
    (4.0, "SNOMED/365981007: former smoker", 1.0),
    (16.0, "SNOMED/38341003", 1.0),
    (23.0, "SITE/X1: number", 5.0),
    (40.0, "LOINC/600-7: LOINC/LA13", 1.0),
]
"""Visit 10; a day counts from its end, 24:00 of 1 June 2099 and of 2 and 3 January 2100."""


def test_visits_with_outcomes(folder, tmp_path):
    rows, found = prepare_and_read("omop", folder, tmp_path / "out", **SOME)
    by_visit = {row["entity"]: row for row in rows}
    assert by_visit.keys() == {10, 11, 20}
    first, last, other = (by_visit[visit] for visit in (10, 11, 20))
    assert triples(first) == STAY
    assert first["static"] == {
        "Age": pytest.approx(40.0, abs=0.01),
        "Gender": "female",
        "Visit": "Visit/IP",
    }
    assert (first["patient"], first["hospital_death"], first["death_hours"]) == (1, 0, 496.0)
    assert first["discharge_hours"] == 84.0
    assert first["readmission_days"] == pytest.approx(14 + 4 / 24)
    assert (last["hospital_death"], last["death_hours"], last["discharge_hours"]) == (1, 72, 72)
    assert last["readmission_days"] is None
    assert len(last["times"]) == len(STAY) + 2, "the visits on 10 and 20 January; no death"
    assert "death" not in last["variables"]
    assert (other["hospital_death"], other["death_hours"]) == (0, 216.0)
    assert triples(other) == [(0.0, "concept/262", 1.0), (1.0, "concept/999: number", 6.0)]
    assert other["static"]["Age"] == pytest.approx(49.66, abs=0.05)
    reasons = {row["path"]: row["reason"] for row in found["broken"]["files"]}
    assert reasons == {
        "VISIT_OCCURRENCE.csv:row 5": "no such person in table person",
        "VISIT_OCCURRENCE.csv:row 6": "its end is before its start",
    }
    dropped = found["notes"]["events dropped by reason"]
    assert dropped[f"measurement: {omop.NO_CONCEPT}"] == 1
    assert dropped[f"measurement: {omop.NO_TIME}"] == 1
    assert dropped[f"measurement: {omop.NO_PERSON}"] == 1
    assert dropped[f"measurement: {records.NO_ROWS}"] == 1
    assert found["notes"]["events dropped: duplicate"] == {"train": 2}


VISITS = "visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,\
visit_end_date,visit_end_datetime\n"


def test_a_death_on_the_day_after_discharge_is_none_in_the_hospital(folder, tmp_path):
    """Of a visit that ends on 5 January; its last day counts as a whole."""
    (folder / "VISIT_OCCURRENCE.csv").write_text(
        VISITS
        + "1,1,9201,2100-01-01,,2100-01-05,\n2,2,9201,2100-01-01,,2100-01-05,\n"
        + "3,3,9201,2100-01-01,,2100-01-05,2100-01-05 12:00:00\n"
    )
    (folder / "DEATH.csv").write_text(
        "person_id,death_date,death_datetime\n1,2100-01-05,\n2,2100-01-06,\n"
        "3,2100-01-05,2100-01-05 12:00:00\n"
    )
    rows, _ = prepare_and_read("omop", folder, tmp_path / "out", **SOME)
    outcomes = {row["entity"]: (row["hospital_death"], row["death_hours"]) for row in rows}
    assert outcomes == {1: (1, 120.0), 2: (0, 144.0), 3: (1, 108.0)}


def test_readmission_is_the_next_visit_after_the_end(folder, tmp_path):
    """Not intensive care within the visit, nor a visit of no length itself."""
    times = {
        "20,2,9201": (1, 11),
        "21,2,32037": (3, 4),
        "22,2,9201": (20, 25),
        "10,1,9201": (3, 3),
        "11,1,9201": (5, 6),
        "30,3,9201": (1, 5),
    }
    visits = [
        f"{name}," + ",".join(f"2100-01-{day:02},2100-01-{day:02} 10:00:00" for day in days)
        for name, days in times.items()
    ]
    (folder / "VISIT_OCCURRENCE.csv").write_text(VISITS + "\n".join(visits))
    rows, _ = prepare_and_read("omop", folder, tmp_path / "out", **SOME)
    days = {row["entity"]: row["readmission_days"] for row in rows}
    assert days == {20: 9.0, 21: 16.0, 22: None, 10: 2.0, 11: None, 30: None}


def test_texts_among_the_numbers_of_csv(folder, tmp_path):
    """A bound is its number; what is no number is counted, and the event stays without one."""
    plain, _ = prepare_and_read("omop", folder, tmp_path / "plain", **SOME)
    file = folder / "MEASUREMENT.csv"
    text = file.read_text()
    assert ",80," in text and ",1.3," in text
    file.write_text(text.replace(",80,", ",>80,").replace(",1.3,", ",\\N,"))
    rows, found = prepare_and_read("omop", folder, tmp_path / "out", **SOME)
    by_visit = {row["entity"]: triples(row) for row in rows}
    bare = [(2.0, "LOINC/8867-4", 1.0) if time == 2.0 else (time, *rest) for time, *rest in STAY]
    assert by_visit[10] == bare
    assert by_visit[20] == triples(next(row for row in plain if row["entity"] == 20))
    dropped = found["notes"]["events dropped by reason"]
    assert dropped[records.NO_NUMBER] == 1 and dropped[plausible.CENSORED] == 2


def test_any_form_of_the_tables_gives_the_same_rows(folder, tmp_path):
    """Parquet with lower-case names, and gzip with upper-case columns, as CSV."""
    prepare(folder, tmp_path / "csv", **SOME)
    other = tmp_path / "parquet"
    other.mkdir()
    for name in TABLES:
        table = pd.read_csv(folder / f"{name}.csv", sep="\t" if name == "CONCEPT" else ",")
        for column in table.columns:
            if column.endswith(("_date", "_datetime")):
                table[column] = pd.to_datetime(table[column])
        if name == "DEATH":
            table.columns = table.columns.str.upper()
            table.to_csv(other / "Death.csv.gz", index=False)
        else:
            table.to_parquet(other / f"{name.lower()}.parquet")
    prepare(other, tmp_path / "out", **SOME)
    assert read(tmp_path / "out") == read(tmp_path / "csv")


def as_parquet(folder: Path, other: Path, zone: str, without: str = "") -> Path:
    """Write tables as Parquet with columns of days, and times with a zone but in table `without`."""
    other.mkdir()
    for name in TABLES:
        table = pd.read_csv(folder / f"{name}.csv", sep="\t" if name == "CONCEPT" else ",")
        for column in table.columns:
            if column.endswith(("_date", "_datetime")):
                times = pd.to_datetime(table[column])
                zoned = times if name == without else times.dt.tz_localize(zone)
                table[column] = zoned if column.endswith("time") else times.dt.date
        table.to_parquet(other / f"{name.lower()}.parquet")
    return other


def test_days_beside_times_in_utc(folder, tmp_path):
    """As Spark writes them; tables with and without a zone are not mixed."""
    prepare(folder, tmp_path / "csv", **SOME)
    prepare(as_parquet(folder, tmp_path / "utc", "UTC"), tmp_path / "out", **SOME)
    assert read(tmp_path / "out") == read(tmp_path / "csv")
    for table in ("VISIT_OCCURRENCE", "DEATH", "MEASUREMENT"):
        mixed = as_parquet(folder, tmp_path / table, "UTC", table)
        with pytest.raises(ValueError, match=f"those of {table.lower()}.parquet have none"):
            prepare(mixed, tmp_path / f"{table}_out", **SOME)


def test_times_in_another_zone_are_refused(folder, tmp_path):
    """A day without a time of day would begin in the evening before, and not count from its end."""
    zoned = as_parquet(folder, tmp_path / "berlin", "Europe/Berlin")
    with pytest.raises(ValueError, match="in the zone Europe/Berlin"):
        prepare(zoned, tmp_path / "out", **SOME)


def test_a_zone_of_a_column_that_is_not_read_does_no_harm(folder, tmp_path):
    prepare(folder, tmp_path / "csv", **SOME)
    table = pd.read_csv(folder / "OBSERVATION.csv")
    (folder / "OBSERVATION.csv").unlink()
    for column in ("observation_date", "observation_datetime"):
        table[column] = pd.to_datetime(table[column])
    table["loaded_at"] = table["observation_datetime"].dt.tz_localize("Europe/Berlin")
    table.to_parquet(folder / "observation.parquet")
    prepare(folder, tmp_path / "out", **SOME)
    assert read(tmp_path / "out") == read(tmp_path / "csv")


def test_visits_that_nothing_needs_are_not_read(folder, tmp_path):
    tables = "tables=condition_occurrence,measurement"
    options = ("rows=persons", tables, "conditions=start")
    with_visits, _ = prepare_and_read("omop", folder, tmp_path / "a", *options)
    (folder / "VISIT_OCCURRENCE.csv").write_text("visit_occurrence_id,note\n1,no times here\n")
    without, _ = prepare_and_read("omop", folder, tmp_path / "b", *options)
    assert without == with_visits


def test_ids_of_64_bits_in_a_table_that_is_read_as_texts(folder, tmp_path):
    """As in the demo of MIMIC-IV; a number that no 64 bits hold is no id."""
    long, longer = "-9123456789012345678", "9223372036854775808"
    for file in folder.glob("*.csv"):
        text = re.sub(r"(?m)^1,", f"{long},", file.read_text())
        if file.stem == "VISIT_OCCURRENCE":
            text = re.sub(r"(?m)^(\d+),1,", rf"\1,{long},", text)
        if file.stem == "MEASUREMENT":
            text = text.replace(",7,,0,", ",abc,,0,") + f"{longer},100,2100-01-03,,5,,,\n"
        file.write_text(text)
    rows, found = prepare_and_read("omop", folder, tmp_path / "out", **SOME)
    own = next(row for row in rows if row["entity"] == 10)
    assert own["patient"] == int(long)
    assert triples(own) == [one for one in STAY if one[1] != "LOINC/8867-4: number"]
    assert found["notes"]["events dropped by reason"][f"measurement: {omop.NO_PERSON}"] == 2


def with_visits_of_conditions(folder: Path) -> None:
    """Visit 10 ends 84 hours after its start, and so after the end of the condition's day."""
    file = folder / "CONDITION_OCCURRENCE.csv"
    header, first, second = file.read_text().splitlines()
    lines = f"{header},visit_occurrence_id", f"{first},10", f"{second},7"
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(("options", "hour"), [((), 84.0), (("conditions=start",), 16.0)])
def test_a_condition_counts_from_the_end_of_its_visit(folder, tmp_path, options, hour):
    """A diagnosis that is coded at discharge, and dated at admission, tells what follows."""
    with_visits_of_conditions(folder)
    rows, found = prepare_and_read("omop", folder, tmp_path / "out", *options, **SOME)
    by_visit = {row["entity"]: triples(row) for row in rows}
    old = (-5144.0, "SNOMED/38341003", 1.0)
    name = old[1]
    assert [one for one in by_visit[10] if one[1] == name] == [old, (hour, name, 1.0)]
    assert found["notes"].get(omop.NO_VISIT, 0) == (0 if options else 1), "of visit 7"


def test_the_last_event_of_a_person_may_be_the_end_of_a_visit(folder, tmp_path):
    """Hour 0 is the last event: without a cohort nothing else would cut what was known later."""
    for name in ("MEASUREMENT", "OBSERVATION", "DEATH"):
        file = folder / f"{name}.csv"
        file.write_text(file.read_text().splitlines()[0])
    with_visits_of_conditions(folder)
    options = ("rows=persons", "tables=condition_occurrence,measurement")
    rows, _ = prepare_and_read("omop", folder, tmp_path / "out", *options)
    (own,) = rows
    assert triples(own) == [(-5228.0, "SNOMED/38341003", 1.0), (0.0, "SNOMED/38341003", 1.0)]


def test_persons_and_labels(folder, tmp_path):
    rows, _ = prepare_and_read("omop", folder, tmp_path / "a", "rows=persons", "history=1000")
    by_person = {row["patient"]: row for row in rows}
    assert by_person.keys() == {1, 2, 3, 8, 9}, "with an event, a visit among them"
    assert by_person[1]["variables"][-1] == "death" and by_person[1]["times"][-1] == 0.0
    labels = pd.DataFrame(
        {
            "subject_id": [1, 1, 2],
            "prediction_time": pd.to_datetime(
                ["2100-01-02 11:00", "2100-01-03 00:00", "2100-03-02 00:00"]
            ),
            "categorical_value": ["a", "b", "c"],
        }
    )
    labels.to_parquet(tmp_path / "labels.parquet")
    rows, found = prepare_and_read(
        "omop", folder, tmp_path / "b", f"labels={tmp_path}/labels.parquet"
    )
    by_label = {row["label"]: row for row in rows}
    early = [(round(hour - 3, 3), name, value) for hour, name, value in STAY[:6]]
    assert triples(by_label["a"]) == early
    assert triples(by_label["b"])[-1] == (0.0, "SNOMED/38341003", 1.0)
    assert found["notes"]["persons without label rows, left out"] == 3
    assert "hospital_death" not in rows[0]


def test_a_cohort_of_visits(folder, tmp_path):
    """Mortality by the cohorts that there are: stays of two days and more, cut at two days."""
    prepare(folder, tmp_path / "rows", **SOME)
    options = ("task=mortality", "exclude=none")
    conftest.prepare("cohort", tmp_path / "rows", tmp_path / "out", *options)
    rows = {row["entity"]: row for row in read(tmp_path / "out")}
    assert {entity: row["label"] for entity, row in rows.items()} == {10: 0, 11: 1, 20: 0}
    assert all(max(row["times"]) <= 48 for row in rows.values())
    assert "hospital_death" not in rows[10]
    options = ("task=readmission", "exclude=none")
    conftest.prepare("cohort", tmp_path / "rows", tmp_path / "again", *options)
    labels = {row["entity"]: row["label"] for row in read(tmp_path / "again")}
    assert labels == {10: 1, 20: 0}


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("PERSON", None, "no table person .*which is needed for age and sex; there are"),
        ("VISIT_OCCURRENCE", None, "no table visit_occurrence .*rows=persons needs none"),
        ("MEASUREMENT", ("measurement_date,", "when,"), "no column 'measurement_date'"),
        ("VISIT_OCCURRENCE", ("visit_end_date,", "until,"), "no column 'visit_end_date'"),
        ("VISIT_OCCURRENCE", (",9201,", ",5,"), None),
        ("MEASUREMENT", ("09:30:00", "09:30:00Z"), "some of its times have a zone"),
        (
            "OBSERVATION",
            ("12:00:00", "12:00:00Z"),
            "OBSERVATION.csv: column 'observation_datetime': some",
        ),
    ],
)
def test_tables_that_are_missing_or_wrong(folder, tmp_path, table, change, message):
    file = folder / f"{table}.csv"
    if change is None:
        file.unlink()
    else:
        file.write_text(file.read_text().replace(*change))
    if message is None:
        assert prepare(folder, tmp_path / "out", "visits=5", **SOME)["rows"] == {"train": 2}
        message = r"no visit has one of the concepts --set visits=32037; there are 5 \(4\)"
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "other", "visits=32037", **SOME)
        return
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "out", **SOME)


def test_wrong_types_and_options(folder, tmp_path):
    (folder / "DEATH.csv").unlink()
    for date, kind in ((5.5, "double"), (21000122, "int64")):
        table = pa.table({"person_id": [1], "death_date": [date]})
        pq.write_table(table, folder / "death.parquet")
        message = f"column 'death_date' has the type {kind}, where times"
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "out", **SOME)
    with pytest.raises(ValueError, match="no table of events is called 'labs'; they are condition"):
        prepare(folder, tmp_path / "out", "tables=labs")
    with pytest.raises(ValueError, match=r"visits alone say nothing of what .*; name tables of e"):
        prepare(folder, tmp_path / "out", "tables=visit_occurrence")
    (folder / "procedure_occurrence.csv").unlink(missing_ok=True)
    message = "no table of events is there: --set tables wants procedure_occurrence, and there are "
    with pytest.raises(ValueError, match=f"{message}.*, or --set tables=[a-z_,]+$") as raised:
        prepare(folder, tmp_path / "out", "tables=procedure_occurrence")
    assert "procedure" not in str(raised.value).rpartition("--set tables=")[2]
    with pytest.raises(ValueError, match="visits=inpatient: write numbers of concepts"):
        prepare(folder, tmp_path / "out", "visits=inpatient")
    (folder / "death.csv").write_text(TABLES["DEATH"])
    with pytest.raises(ValueError, match="table death stands there twice"):
        prepare(folder, tmp_path / "out")


# ---------------------------------------------------------------- real records


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """MIMIC-III's demo as OMOP, by pandas: laboratory values, diagnoses, drugs, admissions."""
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("needs the folder that ONETOMANY_DATA names")
    folder = tmp_path_factory.mktemp("demo")
    names = ("patients", "admissions", "labevents", "diagnoses_icd", "prescriptions")
    patients, admissions, labs, diagnoses, drugs = (demo_table(name) for name in names)
    concepts: dict[tuple[str, str], int] = {("Visit", "IP"): 9201}

    def concept(vocabulary: str, codes: pd.Series) -> pd.Series:
        return codes.map(
            lambda code: (
                0
                if pd.isna(code) or code == ""
                else concepts.setdefault((vocabulary, str(code)), 2_000_000_000 + len(concepts))
            )
        )

    def save(name: str, columns: dict) -> None:
        pd.DataFrame(columns).to_parquet(folder / f"{name}.parquet", index=False)

    born = pd.to_datetime(patients["dob"])
    save(
        "person",
        {
            "person_id": patients["subject_id"],
            "gender_concept_id": patients["gender"].map({"F": 8532, "M": 8507}),
            "year_of_birth": born.dt.year,
            "birth_datetime": born,
        },
    )
    save(
        "visit_occurrence",
        {
            "visit_occurrence_id": admissions["hadm_id"],
            "person_id": admissions["subject_id"],
            "visit_concept_id": 9201,
            "visit_start_date": pd.to_datetime(admissions["admittime"]).dt.date,
            "visit_start_datetime": pd.to_datetime(admissions["admittime"]),
            "visit_end_date": pd.to_datetime(admissions["dischtime"]).dt.date,
            "visit_end_datetime": pd.to_datetime(admissions["dischtime"]),
            "discharged_to_concept_id": admissions["hospital_expire_flag"] * omop.DIED,
        },
    )
    time = pd.to_datetime(labs["charttime"])
    save(
        "measurement",
        {
            "person_id": labs["subject_id"],
            "measurement_concept_id": concept("LAB", labs["itemid"]),
            "measurement_date": time.dt.date,
            "measurement_datetime": time,
            "value_as_number": labs["valuenum"].astype("float64"),
            "unit_concept_id": concept("UCUM", labs["valueuom"]),
        },
    )
    coded = diagnoses.merge(admissions[["hadm_id", "admittime"]], on="hadm_id")
    save(
        "condition_occurrence",
        {
            "person_id": coded["subject_id"],
            "condition_concept_id": concept("ICD9CM", coded["icd9_code"]),
            "condition_start_date": pd.to_datetime(coded["admittime"]).dt.date,
            "visit_occurrence_id": coded["hadm_id"],
        },
    )
    save(
        "drug_exposure",
        {
            "person_id": drugs["subject_id"],
            "drug_concept_id": concept("NDC", drugs["ndc"].where(drugs["ndc"] != "0")),
            "drug_exposure_start_date": pd.to_datetime(drugs["startdate"]).dt.date,
        },
    )
    pairs = [(number, *name) for name, number in concepts.items()]
    columns = ["concept_id", "vocabulary_id", "concept_code"]
    pd.DataFrame(pairs, columns=columns).to_csv(folder / "CONCEPT.csv", sep="\t", index=False)
    return folder


def day_end(time: pd.Series) -> pd.Series:
    """Times of 00:00 are days, which end a day later."""
    return time.where(time != time.dt.normalize(), time + pd.Timedelta(days=1))


def reference(demo: Path) -> dict[int, list[tuple]]:
    """The events of each visit, by merges of pandas."""
    concept = pd.read_csv(demo / "CONCEPT.csv", sep="\t", dtype={"concept_code": str})
    concept = concept.set_index("concept_id")
    names = (concept["vocabulary_id"] + "/" + concept["concept_code"]).to_dict()
    units = concept["concept_code"].to_dict()
    visits = pd.read_parquet(demo / "visit_occurrence.parquet")
    ends = day_end(visits.set_index("visit_occurrence_id")["visit_end_datetime"])
    parts = []
    for table, (name, time_name) in omop.EVENTS.items():
        if not (demo / f"{table}.parquet").exists():
            continue
        own = pd.read_parquet(demo / f"{table}.parquet")
        time = pd.to_datetime(own[f"{time_name}_date"])
        if f"{time_name}_datetime" in own:
            time = own[f"{time_name}_datetime"].fillna(time)
        time = day_end(time)
        if table == omop.CONDITIONS:  # diagnoses are coded at discharge
            time = np.maximum(time, own["visit_occurrence_id"].map(ends))
        code = own[f"{name}_concept_id"].map(names)
        value = own.get("value_as_number", pd.Series(np.nan, index=own.index))
        unit = own.get("unit_concept_id", pd.Series(0, index=own.index)).map(units)
        code = code.where(value.isna(), code + ": " + unit.fillna("number"))
        columns = {"person_id": own["person_id"], "time": time, "name": code, "value": value}
        parts.append(pd.DataFrame(columns).dropna(subset=["time", "name"]).fillna({"value": 1.0}))
    events = pd.concat(parts)
    both = visits.assign(end=day_end(visits["visit_end_datetime"])).merge(events, on="person_id")
    both = both[both["time"] <= both["end"]]
    hours = (both["time"] - both["visit_start_datetime"]) / pd.Timedelta(hours=1)
    both = both.assign(hours=hours.astype("float32"), value=both["value"].astype("float32"))
    both = both[hours >= -8784]
    columns = ["hours", "name", "value"]
    return {
        visit: list(
            own.drop_duplicates(columns).sort_values(columns)[columns].itertuples(False, None)
        )
        for visit, own in both.groupby("visit_occurrence_id")
    }


@DEMO
def test_visits_of_real_records_equal_pandas(demo, tmp_path):
    prepare(demo, tmp_path / "out", part_mb=0.5, **SOME)
    rows = {row["entity"]: row for row in read(tmp_path / "out")}
    wanted = reference(demo)
    admissions = demo_table("admissions").set_index("hadm_id")
    ends = day_end(pd.to_datetime(admissions["dischtime"]))
    broken = summary(tmp_path / "out")["broken"]["rows"]
    assert len(rows) == len(admissions) - broken > 120
    for visit, row in rows.items():
        events = sorted(zip(row["times"], row["variables"], row["values"], strict=True))
        assert [(np.float32(a), b, np.float32(c)) for a, b, c in events] == wanted[visit]
        own = admissions.loc[visit]
        assert row["hospital_death"] == own["hospital_expire_flag"]
        stay = (ends[visit] - own["admittime"]) / pd.Timedelta(hours=1)
        assert row["discharge_hours"] == pytest.approx(stay)
    assert sum(row["events"] for row in rows.values()) > 50_000


@DEMO
def test_no_file_beside_the_rows_holds_an_id(demo, tmp_path):
    prepare(demo, tmp_path / "out", **SOME)
    visits = pd.read_parquet(demo / "visit_occurrence.parquet")
    ids = {str(one) for name in ("person_id", "visit_occurrence_id") for one in visits[name]}
    words = {
        word
        for file in (tmp_path / "out").rglob("*")
        if file.suffix in (".json", ".md")
        for word in re.findall(r"\d{5,}", file.read_text())
    }
    sizes = {str(file.stat().st_size) for file in (tmp_path / "out").rglob("*.parquet")}
    assert not (words & ids) - sizes
