"""MEDS: the demo of MIMIC-III written as MEDS by pandas and checked by the `meds` package's
schemas, against rows that pandas makes; and small folders by hand for what is odd.
"""

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import meds
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import demo_table, read, splits_of_a_job, summary
from stage_runs import without_ray
from typer.testing import CliRunner

from pipeline import cli
from pipeline.prepare.engine import grouped, records

prepare = partial(conftest.prepare, "meds")
DEMO = pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
COLUMNS = ["subject_id", "time", "code", "numeric_value", "text_value"]


def at(day: int, hour: float = 0.0) -> pd.Timestamp:
    return pd.Timestamp(2100, 1, 1) + pd.Timedelta(days=day - 1, hours=hour)


def write_meds(
    folder: Path,
    events: pd.DataFrame,
    splits: dict[int, str] | None = None,
    labels: pd.DataFrame | None = None,
    files: int = 1,
) -> Path:
    """Write a MEDS folder, every file checked by the standard's own schema."""
    events = events.sort_values(["subject_id", "time"], na_position="first", kind="stable")
    for number in range(files):
        own = events[events["subject_id"] % files == number]
        save(folder / f"data/part{number}/0.parquet", aligned(meds.DataSchema, own[COLUMNS]))
    codes = pa.table({"code": sorted(events["code"].unique())})
    save(folder / meds.code_metadata_filepath, meds.CodeMetadataSchema.align(codes))
    about = {"dataset_name": "by hand", "license": "ODbL", "meds_version": "0.4.1"}
    (folder / meds.dataset_metadata_filepath).write_text(json.dumps(about))
    meds.DatasetMetadataSchema.validate(about)
    if splits is not None:
        table = pa.table({"subject_id": list(splits), "split": list(splits.values())})
        save(folder / meds.subject_splits_filepath, meds.SubjectSplitSchema.align(table))
    if labels is not None:
        save(folder / "tasks/task/0.parquet", aligned(meds.LabelSchema, labels))
    return folder


def aligned(schema, table: pd.DataFrame) -> pa.Table:
    """The table in the types of the standard, checked by it."""
    kinds = schema.schema()
    fields = [pa.field(name, kinds.field(name).type) for name in table.columns]
    return schema.align(pa.Table.from_pandas(table, pa.schema(fields), preserve_index=False))


def save(file: Path, table: pa.Table) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=5000)
    return file


def frame(rows: list[tuple]) -> pd.DataFrame:
    """(subject, time, code, number, text) to a table of events."""
    out = pd.DataFrame(rows, columns=COLUMNS)
    out["numeric_value"] = out["numeric_value"].astype("float64")
    out["text_value"] = out["text_value"].astype("object")
    out["time"] = out["time"].astype("datetime64[us]")
    return out


EVENTS = [
    (1, None, "GENDER//F", None, None),
    (1, None, "HEIGHT", 164.0, None),
    (1, None, "SMOKING", None, "never"),
    (1, at(1) - pd.Timedelta(days=40 * 365.2425), "MEDS_BIRTH", None, None),
    (1, at(1, 8), "HR", 80.0, None),
    (1, at(1, 9), "HR", None, None),
    (1, at(1, 9), "HR", None, "<40"),
    (1, at(1, 10), "ICD//I10", None, None),
    (1, at(1, 10), "RHYTHM", None, " sinus  rhythm "),
    (1, at(1, 10), "NOTE", None, "the patient " * 20),
    (1, at(2), "HR", 90.0, None),
    (1, at(2) + pd.Timedelta(microseconds=1), "HR", 200.0, None),
    (1, at(400), "HR", 70.0, None),
    (2, at(1, 1), "HR", 60.0, None),
    (2, at(3), "MEDS_DEATH", None, None),
    (3, at(1), "HR", 50.0, None),
    (4, None, "GENDER//M", None, None),
]
SPLITS = {1: "train", 2: "tuning", 3: "held_out", 4: "train"}
LABELS = pd.DataFrame(
    {
        "subject_id": [2, 1, 1],
        "prediction_time": pd.Series([at(2), at(400), at(2)]).astype("datetime64[us]"),
        "boolean_value": [True, True, False],
    }
)


def triples(row: dict) -> list[tuple]:
    assert row["events"] == len(row["times"])
    pairs = zip(row["times"], row["variables"], row["values"], strict=True)
    return [(round(time, 6), name, value) for time, name, value in pairs]


# ---------------------------------------------------------------- by hand


def test_a_row_a_label(tmp_path):
    """Events up to and including the prediction time, and none a microsecond later."""
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS, LABELS)
    prepare(folder, tmp_path / "out", f"labels={folder}/tasks/task")
    rows = {(row["patient"], row["prediction_time"]): row for row in read(tmp_path / "out")}
    assert len(rows) == 3
    first = rows[1, at(2).to_pydatetime()]
    assert triples(first) == [
        (-16.0, "HR: number", 80.0),
        (-15.0, "HR", 1.0),
        (-15.0, "HR: number", 40.0),
        (-14.0, "ICD//I10", 1.0),
        (-14.0, "NOTE", 1.0),
        (-14.0, "RHYTHM: sinus rhythm", 1.0),
        (0.0, "HR: number", 90.0),
    ]
    static = first["static"]
    assert static["codes"] == ["GENDER//F", "SMOKING: never"] and static["HEIGHT"] == 164.0
    assert static["Age"] == pytest.approx(40 + 1 / 365.2425)
    assert (first["label"], first["split"], first["entity"]) == (0, "train", 1)
    late = rows[1, at(400).to_pydatetime()]
    assert triples(late) == [(0.0, "HR: number", 70.0)], "a year is the most that history has"
    other = rows[2, at(2).to_pydatetime()]
    assert triples(other) == [(-23.0, "HR: number", 60.0)]
    assert (other["label"], other["split"]) == (1, "validation")
    assert other["static"] == {"Age": None, "HEIGHT": None, "codes": []}
    notes = summary(tmp_path / "out")["notes"]
    assert notes["subjects without label rows, left out"] == 2
    assert notes["static measurements"] == 4
    dropped = notes["events dropped by reason"]
    assert dropped[f"data: {records.NO_ROWS}"] == 1 and dropped[records.LONG_TEXT] == 1
    assert dropped[f"data: {records.OUTSIDE}"] == 3, "birth, the microsecond, death"


def test_without_labels_a_row_ends_with_the_last_event(tmp_path):
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS)
    manifest = prepare(folder, tmp_path / "out", "history=48")
    rows = {row["patient"]: row for row in read(tmp_path / "out")}
    assert manifest["rows"] == {"test": 1, "train": 1, "validation": 1}
    assert "label" not in rows[1] and "prediction_time" not in rows[1]
    assert triples(rows[1]) == [(0.0, "HR: number", 70.0)]
    assert triples(rows[2]) == [(-47.0, "HR: number", 60.0), (0.0, "MEDS_DEATH", 1.0)]
    assert summary(tmp_path / "out")["notes"]["subjects without timed events, left out"] == 1


@pytest.mark.parametrize(
    ("column", "values", "wanted", "kind"),
    [
        ("boolean_value", [True, False, True], {0, 1}, pa.int64()),
        ("integer_value", [3, 1, 2], {1, 2, 3}, pa.int64()),
        ("float_value", [0.5, 1.5, 2.5], {0.5, 1.5, 2.5}, pa.float64()),
        ("categorical_value", ["home", "ward", "home"], {"home", "ward"}, pa.string()),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_kinds_of_labels(tmp_path, column, values, wanted, kind, form):
    labels = LABELS[["subject_id", "prediction_time"]].assign(**{column: values})
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS, labels)
    file = folder / "tasks/task/0.parquet"
    if form == "csv":
        file = tmp_path / "labels.csv"
        labels.to_csv(file, index=False)
    prepare(folder, tmp_path / "out", f"labels={file}")
    assert {row["label"] for row in read(tmp_path / "out")} == wanted
    part = next((tmp_path / "out").glob("train*.parquet"))
    assert pq.read_schema(part).field("label").type == kind


def test_other_names_of_splits_and_none(tmp_path):
    """Names of other publishers count as they do in every importer; without the file all train."""
    names = {1: "train", 2: "dev", 3: "test", 4: "train"}
    folder = write_meds(tmp_path / "meds", frame(EVENTS), names)
    assert prepare(folder, tmp_path / "a")["rows"] == {"test": 1, "train": 1, "validation": 1}
    (folder / meds.subject_splits_filepath).unlink()
    assert prepare(folder, tmp_path / "b")["rows"] == {"train": 3}
    write_meds(folder, frame(EVENTS), {2: "train"})
    assert prepare(folder, tmp_path / "c")["rows"] == {"train": 1}
    notes = summary(tmp_path / "c")["notes"]
    assert notes["rows of subjects without a split, left out"] == 2


def test_numbers_and_dates_of_other_widths(tmp_path):
    """What writers such as polars make: nanoseconds, float64, categories, no text column."""
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS, LABELS)
    file = folder / "data/part0/0.parquet"
    table = pq.read_table(file)
    prepare(folder, tmp_path / "a", f"labels={folder}/tasks")
    odd = pa.table(
        {
            "code": table["code"].dictionary_encode(),
            "time": table["time"].cast(pa.timestamp("ms"), safe=False).cast(pa.timestamp("ns")),
            "numeric_value": table["numeric_value"].cast(pa.float64()),
            "subject_id": table["subject_id"].cast(pa.int32()),
            "text_value": table["text_value"].cast(pa.string()),
            "hadm_id": table["subject_id"],
        }
    )
    save(file, odd)
    prepare(folder, tmp_path / "b", f"labels={folder}/tasks")
    assert [len(row["times"]) for row in read(tmp_path / "b")] == [
        len(row["times"]) + (row["label"] == 0)  # the microsecond is lost in milliseconds
        for row in read(tmp_path / "a")
    ]
    save(file, odd.drop_columns(["text_value", "numeric_value"]))
    prepare(folder, tmp_path / "c", f"labels={folder}/tasks")
    assert {value for row in read(tmp_path / "c") for value in row["values"]} == {1.0}


def test_a_file_without_rows(tmp_path):
    """Also before the others, and with no row group at all."""
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS, LABELS)
    prepare(folder, tmp_path / "a", f"labels={folder}/tasks")
    schema = pq.read_schema(folder / "data/part0/0.parquet")
    save(folder / "data/a/0.parquet", schema.empty_table())
    with pq.ParquetWriter(folder / "data/b.parquet", schema):
        pass
    prepare(folder, tmp_path / "b", f"labels={folder}/tasks")
    assert read(tmp_path / "b") == read(tmp_path / "a")


def test_a_label_after_one_without_a_value_is_kept(tmp_path):
    """Of the same subject and time; a third one is the same again."""
    labels = LABELS.iloc[[2, 2, 2]].assign(boolean_value=["", "True", "False"])
    file = tmp_path / "labels.csv"
    labels.to_csv(file, index=False)
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS)
    prepare(folder, tmp_path / "out", f"labels={file}", max_bad=0.9)
    assert [row["label"] for row in read(tmp_path / "out")] == [1]
    listed = summary(tmp_path / "out")["broken"]["files"]
    assert {row["path"]: row["reason"] for row in listed} == {
        "labels.csv:row 1": "no boolean_value",
        "labels.csv:row 3": "the same subject and time again",
    }


# ---------------------------------------------------------------- errors


def broken(folder: Path, change) -> Path:
    """Change the one data file of a folder."""
    file = folder / "data/part0/0.parquet"
    save(file, change(pq.read_table(file)))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("code"), "0.parquet: no column 'code'"),
        (lambda t: t.drop_columns("time"), "0.parquet: no column 'time'"),
        (
            lambda t: t.set_column(1, "time", t["time"].cast(pa.int64())),
            "column 'time' has the type int64, where MEDS has timestamp",
        ),
        (
            lambda t: t.set_column(1, "time", t["time"].cast(pa.timestamp("us", "UTC"))),
            "has the type timestamp.us, tz=UTC., where MEDS has timestamp.us. without a zone",
        ),
        (
            lambda t: t.set_column(0, "subject_id", t["subject_id"].cast(pa.string())),
            "column 'subject_id' has the type string, where MEDS has int64; convert it",
        ),
        (
            lambda t: t.set_column(3, "numeric_value", pa.array(["1"] * len(t))),
            "column 'numeric_value' has the type string, where MEDS has float",
        ),
    ],
)
def test_data_that_are_not_meds(tmp_path, change, message):
    folder = broken(write_meds(tmp_path / "meds", frame(EVENTS)), change)
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "out")


def test_missing_files_and_wrong_labels(tmp_path):
    folder = write_meds(tmp_path / "meds", frame(EVENTS), SPLITS, LABELS)
    with pytest.raises(ValueError, match=r"no data/.*parquet there, where MEDS has its events"):
        prepare(folder / "metadata", tmp_path / "out")
    with pytest.raises(ValueError, match="a column of the label table; name that too"):
        prepare(folder, tmp_path / "out", "label=float_value")
    with pytest.raises(ValueError, match="no_such"):
        prepare(folder, tmp_path / "out", f"labels={folder}/no_such")

    def label(table: pa.Table, message: str, *options: str) -> None:
        file = save(tmp_path / "labels.parquet", table)
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "out", f"labels={file}", *options, max_bad=0)

    table = pa.Table.from_pandas(LABELS, preserve_index=False)
    label(table.drop_columns("prediction_time"), "no column 'prediction_time'")
    label(table, "no column 'float_value'", "label=float_value")
    label(table.drop_columns("boolean_value"), "holds the label, and with values there are none")
    label(
        table.append_column("integer_value", pa.array([1, 2, 3])),
        "with values there are boolean_value, integer_value; name it: --set label=boolean_value",
    )
    label(
        table.set_column(1, "prediction_time", pa.array(["2100-01-02"] * 3)),
        "column 'prediction_time' has the type string, where MEDS has timestamp",
    )
    early = pa.array([at(1) - pd.Timedelta(days=1), at(400), at(2)], pa.timestamp("us"))
    label(
        table.set_column(1, "prediction_time", early),
        "labels.parquet:row 1: its subject has no event at or before the prediction time",
    )
    label(
        table.set_column(0, "subject_id", pa.array([77, 1, 1])),
        "labels.parquet:row 1: no such subject in the data",
    )
    label(
        table.set_column(1, "prediction_time", pa.array([at(2)] * 3, pa.timestamp("us"))),
        "labels.parquet:row 3: the same subject and time again",
    )
    label(
        table.set_column(2, "boolean_value", pa.array([True, None, False])),
        "labels.parquet:row 2: no boolean_value",
    )
    save(
        folder / meds.subject_splits_filepath,
        pa.table({"subject_id": [1, 2], "split": ["fold one", "train"]}),
    )
    with pytest.raises(
        ValueError, match="splits called fold one; in MEDS they are called train, tuning"
    ):
        prepare(folder, tmp_path / "out")
    save(
        folder / meds.subject_splits_filepath,
        pa.table({"subject_id": [1, 1], "split": ["held_out", "train"]}),
    )
    with pytest.raises(ValueError, match="row 2 gives a subject another split"):
        prepare(folder, tmp_path / "out")
    (folder / meds.subject_splits_filepath).unlink()
    (folder / meds.dataset_metadata_filepath).write_text("{")
    with pytest.raises(ValueError, match=r"dataset\.json: not JSON"):
        prepare(folder, tmp_path / "out")


# ---------------------------------------------------------------- real records


def demo_tables() -> dict[str, pd.DataFrame]:
    names = ("patients", "admissions", "labevents", "diagnoses_icd", "chartevents_vitals")
    return {name: demo_table(name) for name in names}


def demo_events(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """MIMIC-III's tables as MEDS events, by pandas alone."""
    patients, admissions = tables["patients"], tables["admissions"]
    labs, vitals = tables["labevents"], tables["chartevents_vitals"]
    diagnoses = tables["diagnoses_icd"].merge(admissions[["hadm_id", "dischtime"]], on="hadm_id")
    vitals = vitals[vitals["subject_id"] % 4 == 0]

    def part(table, time, code, number=np.nan, text=None):
        return pd.DataFrame(
            {
                "subject_id": table["subject_id"].astype("int64"),
                "time": pd.Series(pd.to_datetime(time), table.index).astype("datetime64[us]"),
                "code": code,
                "numeric_value": pd.Series(number, table.index, dtype="float64"),
                "text_value": pd.Series(text, table.index, dtype="object"),
            }
        )

    dead = patients[patients["dod"].notna()]
    numberless = labs["valuenum"].isna()
    return pd.concat(
        [
            part(patients, pd.NaT, "GENDER//" + patients["gender"]),
            part(patients, patients["dob"], meds.birth_code),
            part(dead, dead["dod"], meds.death_code),
            part(admissions, admissions["admittime"], "ADM//" + admissions["admission_type"]),
            part(
                labs,
                labs["charttime"],
                "LAB//" + labs["itemid"].astype(str) + "//" + labs["valueuom"].fillna("UNK"),
                labs["valuenum"],
                labs["value"].where(numberless),
            ),
            part(vitals, vitals["charttime"], "VITAL//" + vitals["vital"], vitals["valuenum"]),
            part(diagnoses, diagnoses["dischtime"], "ICD9//" + diagnoses["icd9_code"]),
        ]
    ).dropna(subset="code")


def demo_labels(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Death in hospital, predicted after a day and after two."""
    admissions = tables["admissions"]
    times = [pd.to_datetime(admissions["admittime"]) + pd.Timedelta(days=days) for days in (1, 2)]
    labels = pd.concat(
        pd.DataFrame(
            {
                "subject_id": admissions["subject_id"].astype("int64"),
                "prediction_time": time.astype("datetime64[us]"),
                "boolean_value": admissions["hospital_expire_flag"] == 1,
            }
        )
        for time in times
    )
    return labels.drop_duplicates(["subject_id", "prediction_time"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("needs the folder that ONETOMANY_DATA names")
    tables = demo_tables()
    events = demo_events(tables)
    subjects = sorted(int(one) for one in events["subject_id"].unique())
    splits = {
        subject: "held_out" if i % 5 == 0 else "tuning" if i % 5 == 1 else "train"
        for i, subject in enumerate(subjects)
    }
    folder = tmp_path_factory.mktemp("demo") / "meds"
    return write_meds(folder, events, splits, demo_labels(tables), files=3)


def reference(demo: Path, history: float) -> dict[tuple, list[tuple]]:
    """The events of each label by a merge of pandas; numbers as the rows hold them."""
    events = pd.concat(pd.read_parquet(file) for file in sorted(demo.glob("data/*/*.parquet")))
    labels = pd.read_parquet(demo / "tasks/task/0.parquet")
    events = events[events["time"].notna()]
    text = events["text_value"].str.split().str.join(" ")
    bound = pd.to_numeric(
        text.str.replace(r"(?i)^(<=?|>=?|less than|greater than|under|over)\s*", "", regex=True),
        errors="coerce",
    )
    number = events["numeric_value"].astype("float64").fillna(bound)
    text = text.where(text.str.len().between(1, 32))
    name = (events["code"] + ": " + text).fillna(events["code"])
    events = events.assign(
        name=name.where(number.isna(), events["code"] + ": number"),
        value=number.fillna(1.0).astype("float32"),
    )
    both = labels.merge(events, on="subject_id")
    hours = (both["time"] - both["prediction_time"]) / pd.Timedelta(hours=1)
    both = both.assign(hours=hours.astype("float32"))[(hours <= 0) & (hours >= -history)]
    keys = ["subject_id", "prediction_time"]
    out = {key: [] for key in labels[keys].itertuples(index=False, name=None)}
    values = ["hours", "name", "value"]
    for key, own in both.groupby(keys):
        own = own.drop_duplicates(values).sort_values(values)
        out[key] = list(own[values].itertuples(index=False, name=None))
    return out


@DEMO
def test_rows_of_real_records_equal_pandas(demo, tmp_path, monkeypatch):
    """Every event, hour, value, label and split, in several parts and pieces."""
    monkeypatch.setattr(records, "MAX_EVENTS_AT_ONCE", 5000)
    monkeypatch.setattr(grouped, "RANGE_BYTES", 1 << 18)
    task, history = demo / "tasks/task", 48.0
    prepare(
        demo, tmp_path / "out", f"labels={task}", f"history={history}", max_bad=0.5, part_mb=0.1
    )
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 4
    wanted = reference(demo, history)
    labels = pd.read_parquet(task / "0.parquet").set_index(["subject_id", "prediction_time"])
    splits = pd.read_parquet(demo / meds.subject_splits_filepath).set_index("subject_id")["split"]
    names = {"train": "train", "tuning": "validation", "held_out": "test"}
    found = read(tmp_path / "out")
    assert len(found) == len(labels) - summary(tmp_path / "out")["broken"]["rows"] > 200
    for row in found:
        key = row["patient"], pd.Timestamp(row["prediction_time"])
        events = sorted(zip(row["times"], row["variables"], row["values"], strict=True))
        assert [(np.float32(a), b, np.float32(c)) for a, b, c in events] == wanted[key]
        assert row["label"] == int(labels.loc[key, "boolean_value"])
        assert row["split"] == names[splits[row["patient"]]]
        assert all(time <= 0 for time in row["times"])
    assert sum(row["events"] for row in found) > 20_000


@DEMO
def test_later_events_change_nothing(demo, tmp_path):
    """Rows are equal, byte for byte, whatever happens after the last prediction time."""
    task = demo / "tasks/task"
    last = pd.read_parquet(task / "0.parquet").groupby("subject_id")["prediction_time"].max()
    changed = tmp_path / "changed"
    count = 0
    for file in demo.rglob("*"):
        copy = changed / file.relative_to(demo)
        if file.is_dir() or file.suffix != ".parquet" or "data" not in copy.parts:
            continue
        table = pq.read_table(file)
        events = table.to_pandas()
        later = events["time"] > events["subject_id"].map(last)
        count += later.sum()
        events.loc[later, "code"] = "LATER"
        events.loc[later, "numeric_value"] = 7.0
        save(copy, pa.Table.from_pandas(events, table.schema, preserve_index=False))
    save(changed / meds.subject_splits_filepath, pq.read_table(demo / meds.subject_splits_filepath))
    assert count > 10_000
    rows = []
    for number, folder in enumerate((demo, changed)):
        out = tmp_path / f"out{number}"
        prepare(folder, out, f"labels={task}", max_bad=0.5)
        rows.append(sorted(read(out), key=lambda row: (row["patient"], row["prediction_time"])))
    assert rows[0] == rows[1]


@DEMO
def test_no_file_beside_the_rows_holds_an_id(demo, tmp_path):
    out = tmp_path / "out"
    prepare(demo, out, f"labels={demo}/tasks/task", max_bad=0.5)
    subjects = pd.read_parquet(demo / meds.subject_splits_filepath)["subject_id"]
    words = {
        word
        for file in out.rglob("*")
        if file.suffix in (".json", ".md")
        for word in re.findall(r"\d+", file.read_text())
    }
    sizes = {str(file.stat().st_size) for file in out.rglob("*.parquet")}
    counts = {word for word in words if len(word) < 5}
    assert not (words & set(subjects.astype(str))) - sizes - counts


JOB = """
name: records
sources:
  forecast:
    data: &rows
      uri: ${ROWS}/records
      split_column: split
      modality: {events: {before: 72, hours: 1, min_rows: 5, max_variables: 20}}
      columns: &columns {times: times, variables: variables, values: values, static: static}
    backbone: {events/gru: {width: 16, bin: 24}}
    objective: forecast
    train: {steps: 2, global_batch: 8, lr: 1e-3}
targets:
  death:
    data: {<<: *rows, uri: "${ROWS}/task", columns: {<<: *columns, label: label}}
    objective: classification
    metric: auroc
    train: {steps: 2, global_batch: 8, lr: 1e-3}
techniques: [scratch, full]
fanout: {seeds: 1}
"""


@DEMO
def test_a_job_trains_on_it(demo, tmp_path, monkeypatch):
    """Pretrained on rows without labels, then trained on those with labels: two steps each."""
    prepare(demo, tmp_path / "records")
    prepare(demo, tmp_path / "task", f"labels={demo}/tasks/task", max_bad=0.5)
    rows = read(tmp_path / "task")
    assert splits_of_a_job(tmp_path, "events", "times", folder="task") == Counter(
        row["split"] for row in rows
    )
    (tmp_path / "records.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROWS", str(tmp_path))
    without_ray(monkeypatch)
    done = CliRunner().invoke(cli.app, ["run", "records.yaml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output[-2000:]
    results = pd.read_parquet(tmp_path / "runs/records/results.parquet")
    final = results[(results["metric"] == "auroc") & (results["split"] == "test")]
    assert set(final["status"]) == {"done"} and set(final["technique"]) == {"scratch", "full"}
    assert set(final["n_eval"]) == {sum(row["split"] == "test" for row in rows)}
