"""Tables that look right and are not: ids, words for nothing, times, splits and types that would be
taken for something else without a word.
"""

import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare.conftest import LONG_HEAD, prepare, prepare_long, read, reasons, summary, write
from prepare.test_cohorts import rows as event_rows
from prepare.test_cohorts import stay
from prepare.test_mimic3 import TABLES

from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine import importing
from pipeline.prepare.readers import csv_blocks
from pipeline.prepare.readers.archives import Entry, Opener

# ---------------------------------------------------------------- long tables


@pytest.mark.parametrize("order", ["id first", "text first"])
def test_words_for_nothing_are_texts_where_texts_are_meant(order, tmp_path):
    """A variable called NA and a drug called nan stay; no number and no time is made of them."""
    lines = [
        "1,0,NA,140",
        "1,1,nan,1",
        "1,2,Na,NULL",
        "1,NA,Na,1",
        ",3,Na,1",
        "1,4,,1",
        "NULL,5,Na,1",
    ]
    lines += [] if order == "id first" else ["1,6,Na,<5"]
    prepare_long(tmp_path, LONG_HEAD + "\n".join(lines) + "\n")
    (row,) = read(tmp_path / "out")
    assert (
        row["variables"] == ["NA", "nan", *(["Na"] if order == "text first" else [])]
        and row["entity"] == "1"
    )
    dropped = summary(tmp_path / "out")["notes"]["events dropped by reason"]
    dropped.pop(plausible.CENSORED, None)
    assert dropped == {
        "events: no value": 1,
        "events: no time": 1,
        "events: no such entity": 2,
        "events: no variable": 1,
    }


def test_facts_keep_their_words(tmp_path):
    people = "entity,drug,age\n1,nan,NA\n2,,50\n3,Heparin,\n"
    prepare_long(tmp_path, LONG_HEAD + "1,0,x,1\n", "static=drug,age", people=people)
    assert {row["entity"]: row["static"] for row in read(tmp_path / "out")} == {
        "1": {"drug": "nan", "age": None},
        "2": {"drug": None, "age": 50.0},
        "3": {"drug": "Heparin", "age": None},
    }


def test_ids_of_csv_are_texts(tmp_path):
    """001 and 01 are two, 20 digits are all kept, and a group is a text as well."""
    long = "12345678901234567890"
    people = f"entity,who\n001,07\n01,7\n {long},7\n"
    events = f"{LONG_HEAD}001,0,x,1\n01,0,x,2\n{long},0,x,3\n{long[:-1]}1,0,x,4\n"
    prepare_long(tmp_path, events, "group=who", people=people, max_bad=0)
    assert {row["entity"]: (row["patient"], row["values"]) for row in read(tmp_path / "out")} == {
        "001": ("07", [1]),
        "01": ("7", [2]),
        long: ("7", [3]),
    }


def test_ids_of_parquet_are_whole_numbers_or_texts(tmp_path):
    events, pairs = (
        LONG_HEAD + "1,0,x,1\n2,0,x,2\n",
        (f"entities={tmp_path}/people.parquet", "group=who"),
    )
    people = {"entity": [1.0, 2.0, None], "who": pa.array([1, 1, 1], pa.uint64())}
    pq.write_table(pa.table(people), tmp_path / "people.parquet")
    prepare_long(tmp_path, events, *pairs)
    assert {row["entity"]: row["values"] for row in read(tmp_path / "out")} == {1: [1], 2: [2]}
    assert reasons(summary(tmp_path / "out")) == {"people.parquet:row 3": "no entity id"}
    for bad in (
        pa.array([1.5, 2.0]),
        pa.array([0, 1], pa.timestamp("us")),
        pa.array([2**63 + 1, 1], pa.uint64()),
        pa.array([b"a", b"b"]),
    ):
        for column, option in (("entity", "entity"), ("who", "group")):
            people = {"entity": [1, 2], "who": [1, 2], column: bad}
            pq.write_table(pa.table(people), tmp_path / "people.parquet")
            said = rf"column '{column}' for --set {option} has the type {str(bad.type)[:6]}"
            with pytest.raises(ValueError, match=rf"people\.parquet: {said}"):
                prepare_long(tmp_path, events, *pairs)


@pytest.mark.parametrize(
    ("usable", "max_bad", "said"),
    [
        (0, 0.01, r"none of 3 entities can be used. First one: people\.csv:row 1: no start"),
        (0, 1, "none of 3 entities can be used"),
        (1, 0.01, r"3 of 4 rows are broken.*people\.csv:row 2: no start"),
    ],
)
def test_a_start_in_another_format_is_reported(usable, max_bad, said, tmp_path, monkeypatch):
    lines = ["9,2101-06-01 00:00:00"] * usable + [f"{i},01/06/2101 SECRET" for i in range(3)]
    people = "entity,begin\n" + "\n".join(lines) + "\n"
    events = LONG_HEAD + "1,2101-06-01 06:30:00,HR,80\n9,2101-06-01 06:30:00,HR,80\n"
    pairs = ("unit=timestamp", "start=begin")
    monkeypatch.setattr(
        "pipeline.prepare.engine.grouped.partition_events",
        lambda *_: pytest.fail("events were read before the entities were judged"),
    )
    with pytest.raises(ValueError, match=said) as message:
        prepare_long(tmp_path, events, *pairs, people=people, max_bad=max_bad)
    assert "SECRET" not in str(message.value)


def test_rows_of_which_no_event_is_left_are_refused(tmp_path):
    events = LONG_HEAD + "secret,0,x,1\nsecret,0,x,1\n1,soon,x,1\n1,3,x,1e60\n"
    with pytest.raises(
        ValueError,
        match="no event is left of 4 rows: events: no such entity 2, events: no time 1, events: "
        "out of range 1; name the right",
    ):
        prepare_long(tmp_path, events, people="entity,a\n1,1\n")


@pytest.mark.parametrize(
    ("unit", "time"),
    [("seconds", 1.7e9), ("hours", -100_001), ("minutes", 6_000_060), ("days", 20_000)],
)
def test_absolute_times_as_numbers_are_refused(unit, time, tmp_path):
    with pytest.raises(
        ValueError,
        match=rf"long\.csv: 1 of 2 rows are more than 100000 hours .* unit={unit}; .*give "
        r"unit=timestamp and start=COLUMN",
    ):
        prepare_long(tmp_path, f"{LONG_HEAD}1,5,x,1\n1,{time},x,1\n", f"unit={unit}")
    prepare_long(tmp_path, LONG_HEAD + "1,-100000,x,1\n1,100000,x,1\n")
    assert read(tmp_path / "out")[0]["times"] == [-100000, 100000]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        (
            "time",
            pa.array([0], pa.timestamp("us")),
            r"column 'time' has the type timestamp\[us\], where numbers are read; .* give "
            r"unit=timestamp",
        ),
        (
            "time",
            pa.array([b"0"]),
            "column 'time' has the type binary, where numbers are read; convert it",
        ),
        (
            "variable",
            pa.array([b"\xff"]),
            "column 'variable' has the type binary, where texts are read; convert it",
        ),
        ("value", pa.array([[1.0]]), "column 'value' has the type list<.*, where numbers are read"),
    ],
)
def test_a_column_of_another_type_is_no_damaged_file(column, values, said, tmp_path):
    usual = {"entity": [1], "time": [0.0], "variable": ["x"], "value": [1.0]}
    pq.write_table(pa.table(usual | {column: values}), tmp_path / "long.parquet")
    with pytest.raises(ValueError, match=rf"long\.parquet: {said}"):
        prepare("events", tmp_path / "long.parquet", tmp_path / "out")


def test_texts_of_parquet_may_be_string_views(tmp_path):
    path = tmp_path / "long.parquet"
    texts = {"time": ["2101-10-20 19:08:00"], "name": ["HR"], "value": ["60"], "id": ["7"]}
    columns = {name: pa.array(values, pa.string_view()) for name, values in texts.items()}
    pq.write_table(pa.table(columns), path)
    assert set(pq.read_schema(path).types) == {pa.string_view()}
    kinds = {"time": "time", "name": "text", "value": "number", "id": "id"}
    wanted = {name: csv_blocks.Column(kind) for name, kind in kinds.items()}
    entry = Entry.of_file("long.parquet", str(path), path.stat().st_size)
    with Opener() as opener:
        found = csv_blocks.read_table("long", entry, wanted, opener)
    assert found.to_pylist() == [
        {"time": datetime(2101, 10, 20, 19, 8), "name": "HR", "value": "60", "id": 7}
    ]


def test_rare_variables_are_not_named_in_a_summary(tmp_path):
    counts = {"HR": 40, "five": 5, "secret a": 4, "secret b": 1}
    lines = [f"{i},{i},{name},1\n" for name, count in counts.items() for i in range(count)]
    prepare_long(tmp_path, LONG_HEAD + "".join(lines), part_mb=0.0005)
    notes = summary(tmp_path / "out")["notes"]
    shown = {name: notes[name] for name in ("events of HR", "events of five", "events")}
    assert [of_split["train"] for of_split in shown.values()] == [40, 5, 50]
    assert notes["variables with fewer than 5 events"] == {"train": 2}
    markdown = (tmp_path / "out/_summary.md").read_text()
    assert (
        "secret" not in markdown + json.dumps(notes)
        and "- variables with fewer than 5 events: train 2\n" in markdown
    )


def test_errors_and_codes_of_mimic_that_are_not_known(tmp_path):
    """OUTPUTEVENTS marks errors by ISERROR; an admission without rows in DIAGNOSES_ICD has no codes
    that are known.
    """
    for name, text in TABLES.items():
        write(tmp_path / f"mimic/{name}.csv", text)
    head, *lines = TABLES["OUTPUTEVENTS"].splitlines()
    write(
        tmp_path / "mimic/OUTPUTEVENTS.csv",
        "\n".join([f"{head},ISERROR", f"{lines[0]},1", f"{lines[0].replace('03:', '02:')},0"])
        + "\n",
    )
    write(
        tmp_path / "mimic/DIAGNOSES_ICD.csv", "SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n1,100,1,0389\n"
    )
    prepare("mimic3", tmp_path / "mimic", tmp_path / "out", max_bad=0.9)
    found = {row["entity"]: row for row in read(tmp_path / "out")}
    assert {i: (row["icd9"], row["next_icd9"]) for i, row in found.items()} == {
        1000: (["0389"], None),
        1001: (["0389"], None),
        1010: (None, None),
        2000: (None, None),
    }
    events = zip(found[2000]["times"], found[2000]["variables"], strict=True)
    assert [time for time, name in events if name == "Urine"] == [2]
    dropped = summary(tmp_path / "out")["notes"]["events dropped by reason"]
    assert dropped["outputevents: marked as an error"] == 1


# ---------------------------------------------------------------- plain tables


def test_more_words_mean_missing(tmp_path):
    prepare(
        "table", write(tmp_path / "a.csv", "a,b\nNULL,1\nNone,2\nN/A,3\n5,4\n"), tmp_path / "out"
    )
    assert sorted(
        (row["features"]["b"], row["features"]["a"]) for row in read(tmp_path / "out")
    ) == [(1, None), (2, None), (3, None), (4, 5.0)]


def test_a_column_with_few_texts_is_noted(tmp_path):
    note = "categories though most values are numbers (if the others mean none: --set numeric=)"
    source = write(
        tmp_path / "a.csv",
        "lab,half,code,name\n1.5,1,007,a\n2.5,x,008,b\nERROR,2,009,c\n4,y,010,1\n",
    )
    prepare("table", source, tmp_path / "out")
    assert summary(tmp_path / "out")["notes"][note] == "lab"
    for option in ("numeric=lab", "categorical=lab"):
        prepare("table", source, tmp_path / option, option)
        assert note not in summary(tmp_path / option)["notes"]


@pytest.mark.parametrize("importer", ["table", "csv"])
def test_a_split_that_is_none_is_a_broken_row(importer, tmp_path):
    source = write(tmp_path / "a.csv", "text,fold\na,Train\nb,SECRET\nc,dev\nd,testb\n")
    done = prepare(importer, source, tmp_path / "out", "split_column=fold", max_bad=0.5)
    assert done["rows"] == {"test": 1, "train": 1, "validation": 1}
    ((path, reason),) = reasons(summary(tmp_path / "out")).items()
    assert (
        path.startswith("a.csv:3")
        and reason == "its split is not one of train, validation and test"
    )
    assert not any(
        b"SECRET" in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()
    )


def test_labels_without_a_fraction_are_whole_numbers(tmp_path):
    """Of CSV as of Parquet; large whole numbers lose no digit beside them."""
    prepare(
        "table",
        write(tmp_path / "a.csv", "x,y,id\n1,1.0,9007199254740993\n2,0.0,2.0\n3,1e0,1000.0\n"),
        tmp_path / "out",
        "label=y",
        "id=id",
    )
    found = {row["features"]["x"]: (row["y"], row["id"]) for row in read(tmp_path / "out")}
    assert found == {1: (1, 9007199254740993), 2: (0, 2), 3: (1, 1000)} and all(
        type(value) is int for pair in found.values() for value in pair
    )
    assert summary(tmp_path / "out")["classes"] == {"train": {"labels": {"0": 1, "1": 2}}}
    prepare("table", write(tmp_path / "b.csv", "x,y\n1,1.0\n2,0.5\n"), tmp_path / "half", "label=y")
    assert {row["y"] for row in read(tmp_path / "half")} == {1.0, 0.5}


# ---------------------------------------------------------------- cohorts and options


def test_a_stay_without_a_split_is_a_broken_row(tmp_path):
    pq.write_table(
        event_rows(*(stay(i, split=None if i == 2 else "train") for i in range(5))),
        tmp_path / "rows.parquet",
    )
    done = prepare("cohort", tmp_path / "rows.parquet", tmp_path / "out", "task=mortality")
    assert done["rows"] == {"train": 4}
    assert list(reasons(summary(tmp_path / "out")).values()) == ["no split"]


def test_options_of_a_task_are_given_by_their_names():
    with pytest.raises(
        ValueError, match="--set options=hours=24: give the options of the task by their own names"
    ):
        importing.options_of("cohort", ["task=mortality", "options=hours=24"])
    assert importing.options_of("cohort", ["task=mortality", "hours=24"]).options == {"hours": "24"}
