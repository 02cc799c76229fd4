"""Event rows to cohorts through the engine: what is written and what is not, counts, errors, many
parts, and a definition of one's own in one file.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import parts, read, summary
from prepare.test_cohorts import SCHEMA, drawn, reference, rows, stay

from pipeline.prepare.cohorts import phenotyping
from pipeline.prepare.cohorts.definition import invalid_row_reasons
from pipeline.prepare.engine import importing, row_groups
from pipeline.prepare.engine.write import Preparation, verify

SMALL = 2000 / 2**20
"""MiB: parts of a few rows."""
CANARY = 123.456789
"""Hours of a death: no value of a patient may stand anywhere but in the rows themselves."""


prepare = partial(conftest.prepare, "cohort")


def write(path: Path, table: pa.Table, group: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def stays(tmp_path):
    """200 stays of train in two files, 60 of test; the folder also holds what prepare writes beside
    its parts.
    """
    made = [one | {"split": "train" if i < 200 else "test"} for i, one in enumerate(drawn(260))]
    folder = tmp_path / "rows"
    for name, held in (
        ("train-00000-of-00002", made[:100]),
        ("train-00001-of-00002", made[100:200]),
        ("test-00000-of-00001", made[200:]),
    ):
        write(folder / f"{name}.parquet", rows(*held))
    (folder / "_manifest.json").write_text("{}")
    write(folder / "_dropped.parquet", pa.table({"reason": ["a"]}))
    return folder, made


@pytest.mark.parametrize("task", ["mortality", "decompensation", "phenotyping"])
def test_a_cohort_in_many_parts_with_its_counts(task, stays, tmp_path):
    folder, made = stays
    done = prepare(folder, tmp_path / "out", f"task={task}", part_mb=SMALL)
    wanted = {one["entity"]: (label, one) for one in made if (label := reference(task, one))}
    found = read(tmp_path / "out")
    assert (
        len(done["files"]) > 4
        and {row["entity"] for row in found} == set(wanted)
        and len(found) == len(wanted)
    )
    assert done["read"] == 260 and done["broken"] == 0 and verify(str(tmp_path / "out")) == done
    assert done["rows"] == dict(sorted(Counter(one["split"] for _, one in wanted.values()).items()))
    for row in found:
        label, one = wanted[row["entity"]]
        label = {name: value for name, value in label.items() if name != "until"}
        own = {name: one[name] for name in ("split", "patient", "static")} | label
        assert {name: row[name] for name in own} == own
    message = summary(tmp_path / "out")
    assert message["notes"]["rows of the cohort"] == len(wanted) and sum(
        message["notes"]["rows left out"].values()
    ) == 260 - len(wanted)
    assert message["notes"]["events"] == {
        split: sum(row["events"] for row in found if row["split"] == split)
        for split in ("test", "train")
    }
    column = next(name for name in ("label", "label_values", "labels") if name in found[0])
    counted = Counter(
        str(value)
        for row in found
        if row["split"] == "test"
        for value in np.atleast_1d(np.array(row[column], dtype=object))
    )
    assert message["classes"]["test"]["labels"] == counted
    assert "hospital_death" not in done["columns"]
    assert "hospital_death" in message["notes"]["columns not written (outcomes)"]
    assert prepare(folder, tmp_path / "out", f"task={task}", part_mb=SMALL) == done, (
        "a run that is complete does nothing"
    )


def test_reasons_are_counted(tmp_path):
    table = rows(
        stay(1),
        stay(2, hours=10.0),
        stay(3, hours=47.0),
        stay(4, age=3.0),
        stay(5, times=(50.0,)),
        stay(6),
    )
    done = prepare(write(tmp_path / "a.parquet", table), tmp_path / "out", "task=mortality")
    assert done["rows"] == {"train": 2} and summary(tmp_path / "out")["notes"]["rows left out"] == {
        "no events in the window": 1,
        "stay shorter than 48 hours": 2,
        "younger than 18": 1,
    }
    assert "3 dropped" not in (tmp_path / "out/_summary.md").read_text()
    message = Preparation(
        "cohort",
        str(tmp_path / "a.parquet"),
        str(tmp_path / "out"),
        importing.options_of("cohort", ["task=mortality"]),
    ).describe()
    assert "train 2 rows" in message and "left out: 0 broken, 4 dropped" in message


def test_other_events_behind_the_prediction_time_give_the_same_bytes(stays, tmp_path):
    folder, _ = stays
    draw = np.random.default_rng(0)
    other = tmp_path / "other"
    for file in sorted(folder.glob("t*.parquet")):
        changed = []
        for one in pq.read_table(file).to_pylist():
            late = [i for i, t in enumerate(one["times"]) if t > 48]
            order = draw.permutation(late).tolist()
            for name in ("variables", "values"):
                one[name] = [one[name][i] for i in [*range(len(one[name]) - len(late)), *order]]
            changed.append(one)
        write(other / file.name, rows(*changed))
    assert [
        pq.read_table(folder / name)["variables"].equals(pq.read_table(other / name)["variables"])
        for name in parts(other)
    ].count(False) > 1
    prepare(folder, tmp_path / "a", "task=mortality")
    prepare(other, tmp_path / "b", "task=mortality")
    assert parts(tmp_path / "a") == parts(tmp_path / "b") != {}


def test_rows_do_not_depend_on_how_the_source_is_cut(stays, tmp_path):
    _, made = stays
    one = write(tmp_path / "one.parquet", rows(*made), group=1000)
    two = write(tmp_path / "two.parquet", rows(*made), group=7)
    prepare(one, tmp_path / "a", "task=decompensation")
    prepare(two, tmp_path / "b", "task=decompensation")
    assert parts(tmp_path / "a") == parts(tmp_path / "b") != {}


def test_broken_rows_are_listed_by_their_place_alone(tmp_path):
    good = [stay(i) for i in range(100)]
    bad = stay(777, died=CANARY) | {"values": [CANARY]}
    source = write(tmp_path / "a.parquet", rows(*good[:13], bad, *good[13:]))
    done = prepare(source, tmp_path / "out", "task=mortality")
    assert done["broken"] == 1 and done["rows"] == {"train": 100}
    (broken,) = invalid_row_reasons(rows(bad))
    assert summary(tmp_path / "out")["broken"]["files"] == [
        {
            "path": "a.parquet:14",
            "split": "train",
            "reason": broken,
        }
    ]
    with pytest.raises(ValueError, match="1 of 101 rows are broken") as message:
        prepare(source, tmp_path / "none", "task=mortality", max_bad=0)
    assert f"a.parquet:14: {broken}" in str(message.value)
    prepare(source, tmp_path / "cut", "task=mortality", part_mb=SMALL)
    assert [row["path"] for row in summary(tmp_path / "cut")["broken"]["files"]] == [
        "a.parquet:14"
    ], "the row's place in its file, whatever is read at a time"


def test_no_value_of_a_patient_stands_beside_the_rows(tmp_path):
    """Of a patient who is left out nothing is left, of one who stays nothing but the rows."""
    names = [
        {"variables": ["CANARY"] * 3, "icd9": ["CANARY"]},
        {"values": [CANARY] * 2, "icd9": ["CANARY"]},
    ]
    source = write(
        tmp_path / "a.parquet",
        rows(
            *(stay(987654321 + i, hours=CANARY - 100, **other) for i, other in enumerate(names)),
            stay(1, died=CANARY),
        ),
    )
    prepare(source, tmp_path / "out", "task=mortality", max_bad=0.5)
    for file in (tmp_path / "out").rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert not any(
            canary in data
            for canary in (
                b"CANARY",
                b"123.456",
                b"23.456",
                b"98765432",
                np.float64(CANARY).tobytes(),
                np.float32(CANARY).tobytes(),
                np.int64(987654321).tobytes(),
            )
        ), file
    assert b"CANARY" in source.read_bytes(), "the search finds what is there"


@pytest.mark.parametrize(
    ("pairs", "change", "said"),
    [
        ([], {}, r"--set task=NAME is needed; tasks: decompensation, length_of_stay, mortality"),
        (["task=mort"], {}, "unknown cohort 'mort'; did you mean mortality"),
        (
            ["task=mortality", "hors=3"],
            {},
            "--set hors=3: neither prepare cohort nor its task mortality has an option "
            "'hors'; did you mean hours",
        ),
        (["task=mortality", "hours=long"], {}, "--set hours=long: input should be a valid number"),
        (
            ["task=mortality", "exclude=some"],
            {},
            "--set exclude=some: input should be 'benchmark' or 'none'",
        ),
        (["hours=3"], {}, "--set hours=.*: an option of no task"),
        (
            ["task=decompensation"],
            {"drop": "death_hours"},
            r"no column death_hours \(hours from ICU admission to death\), which task "
            r"decompensation needs; columns there: entity",
        ),
        (
            ["task=mortality"],
            {"drop": "transfers"},
            r"no column transfers \(moved between ICUs, which the benchmark leaves out\)",
        ),
        (["task=mortality"], {"drop": "static"}, r"no column static.Age \(age at admission"),
        (["task=mortality"], {"drop": "times"}, r"no column times \(hours of events\)"),
        (
            ["task=mortality", "exclude=none"],
            {"hours": 5.0},
            "no row belongs to the cohort mortality: stay shorter than 48 hours 2",
        ),
    ],
)
def test_what_is_wrong_is_reported(pairs, change, said, tmp_path):
    table = rows(*(stay(i, hours=change.get("hours", 60.0)) for i in range(2)))
    if "drop" in change:
        table = table.drop_columns(change["drop"])
    write(tmp_path / "a.parquet", table)
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "a.parquet", tmp_path / "out", *pairs)


def test_a_long_table_is_no_event_rows(tmp_path):
    names = ("entity", "times", "variables", "values", "in_hospital_death")
    write(tmp_path / "a.parquet", pa.table({name: ["a"] for name in names}))
    message = "column times is string, no list; give event rows, one an entity"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "a.parquet", tmp_path / "out", "task=mortality")
    write(tmp_path / "b/a.parquet", rows(stay()))
    write(tmp_path / "b/b.parquet", rows(stay()).drop_columns("icd9"))
    with pytest.raises(ValueError, match=r"b.parquet: other columns than a.parquet"):
        prepare(tmp_path / "b", tmp_path / "out", "task=mortality")


def test_an_option_left_out_counts_as_its_default_and_history_can_be_cut(tmp_path):
    source = write(
        tmp_path / "a.parquet", rows(stay(1, times=(-2.0, 1.0)), stay(2, transfers=True))
    )
    assert prepare(source, tmp_path / "a", "task=mortality", "exclude=none", "history=false")[
        "rows"
    ] == {"train": 2}
    assert [row["times"] for row in read(tmp_path / "a")] == [[1.0], [0.5, 1.5, 30.0]]
    about = json.loads(
        pq.read_schema(tmp_path / "a/train-00000-of-00001.parquet").metadata[b"onetomany"]
    )
    assert (
        about["task"] == "mortality"
        and about["options"] == {"outcome": "", "hours": 48.0, "exclude": "none"}
        and about["history"] is False
    )


def test_a_definition_of_a_plugin(tmp_path):
    """On rows with no column of MIMIC-III but the lists."""
    table = pa.table(
        {
            "entity": ["a", "b"],
            "times": [[1.0, 9.0, 25.0], [1.0]],
            "variables": [["x", "y", "z"], ["x"]],
            "values": [[1.0, 2.0, 3.0], [4.0]],
            "events": [3, 1],
        }
    )
    source, plugin = write(tmp_path / "a.parquet", table), Path(__file__).parents[1] / "plugin"
    words = ("prepare", "cohort", str(source), "-o", str(tmp_path / "out"), "--set", "task=busy")
    options = ("--set", "least=2", "--plugin", str(plugin / "spectra"))
    subprocess.run([sys.executable, "-m", "pipeline", *words, *options], check=True)
    found = [(row["entity"], row["times"], row["label"]) for row in read(tmp_path / "out")]
    assert found == [("a", [1.0, 9.0], 1), ("b", [1.0], 0)]


STAYS = """
    create table stays as
    with a as (select *, lead(admittime) over (partition by subject_id order by admittime) later from '{demo}/admissions.parquet'),
         s as (select *, count(*) over (partition by hadm_id) many, epoch(outtime - intime) / 3600 as icu from '{demo}/icustays.parquet')
    select s.icustay_id id, hospital_expire_flag died, epoch(deathtime - s.intime) / 3600 lived, icu, epoch(later - dischtime) / 86400 again, s.hadm_id,
           (select min(t) from unnest(times) u(t) where t >= 0) as began
    from s join a using (hadm_id) join '{demo}/patients.parquet' p on p.subject_id = s.subject_id join '{rows}/*.parquet' r on r.entity = s.icustay_id
    where many = 1 and first_careunit = last_careunit and first_wardid = last_wardid and date_diff('day', dob, s.intime::date) / 365.2425 >= 18"""
LABELS = {
    "mortality": "select id, died from stays where icu >= 48 and began <= 48",
    "readmission": "select id, coalesce(again <= 30, false)::int from stays where died = 0 and "
    "began <= icu",
    "decompensation": """select id, list(if(died = 1 and lived - t < 24, 1, 0) order by t) from stays, range(4, 5000) g(t)
        where t <= if(died = 1, least(icu, lived), icu) and t > began group by id""",
    "length_of_stay": """select id, list(case when d < 8 then floor(d) when d < 14 then 8 else 9 end::int order by t)
        from (select id, (icu - t) / 24 d, t from stays, range(4, 5000) g(t) where t <= icu and t > began) group by id""",
}


@pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
def test_labels_of_the_mimic3_demo_are_those_of_plain_sql(tmp_path):
    """Of its raw tables; from the event rows comes only when each stay's first event was."""
    demo = Path(os.environ["ONETOMANY_DATA"], "healthcare", "mimic3_demo")
    Preparation(
        "mimic3", str(demo), str(tmp_path / "rows"), importing.options_of("mimic3", [])
    ).run()
    connection = duckdb.connect()
    connection.execute(STAYS.format(demo=demo, rows=tmp_path / "rows"))
    for task, query in LABELS.items():
        prepare(tmp_path / "rows", tmp_path / task, f"task={task}")
        found = {
            row["entity"]: row.get("label", row.get("label_values"))
            for row in read(tmp_path / task)
        }
        assert found == dict(connection.execute(query).fetchall()) and len(found) > 50, task
    codes = connection.execute(f"""select id, list(distinct icd9_code) from stays left join '{demo}/diagnoses_icd.parquet' using (hadm_id)
        where began <= icu group by id""").fetchall()
    prepare(tmp_path / "rows", tmp_path / "phenotyping", "task=phenotyping")
    groups = phenotyping.phenotypes()
    assert {row["entity"]: row["labels"] for row in read(tmp_path / "phenotyping")} == {
        entity: sorted({groups[code][0] for code in found if code in groups})
        for entity, found in codes
    }


@pytest.mark.parametrize("limit", ["GROUP_ROWS", "GROUP_BYTES"])
def test_blocks_of_any_size_make_the_same_row_groups(limit, tmp_path, monkeypatch):
    table = rows(*drawn(203))
    weights = row_groups.row_bytes(table)
    monkeypatch.setattr(
        row_groups, limit, 50 if limit == "GROUP_ROWS" else int(weights.mean() * 40)
    )
    groups = []
    for size in (1, 7, 50, 203):
        with row_groups.RowGroups(tmp_path / f"{size}.parquet", SCHEMA, False) as writer:
            for start in range(0, 203, size):
                writer.add(table.slice(start, size))
        about = pq.ParquetFile(tmp_path / f"{size}.parquet").metadata
        groups.append([about.row_group(i).num_rows for i in range(about.num_row_groups)])
        assert pq.read_table(tmp_path / f"{size}.parquet").equals(table)
    assert groups == [groups[0]] * 4 and (
        groups[0] == [50, 50, 50, 50, 3] if limit == "GROUP_ROWS" else 4 <= len(groups[0]) <= 7
    )
    with row_groups.RowGroups(tmp_path / "mixed.parquet", SCHEMA, True) as writer:
        for start in range(0, 203, 7):
            writer.add(table.slice(start, 7))
    mixed = pq.read_table(tmp_path / "mixed.parquet")
    # pyright: ignore
    assert not mixed.equals(table) and mixed.take(pc.sort_indices(mixed["entity"])).equals(table)
