"""Test rows that also stand in a source: by content, by the record that they were cut from, by
their people; and how much is read to look for them.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.config.schema import Job
from pipeline.data import manifests
from pipeline.io import storage
from pipeline.prepare.cohorts import definition
from pipeline.train.progress import Progress
from pipeline.transfer import job_state, overlap, stages


def test_rows_that_name_files_count_as_the_files(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.wav").write_bytes(bytes(1000 + i % 2 * 1000))
    paths = [*(str(tmp_path / f"{i}.wav") for i in range(40)), str(tmp_path / "gone.wav"), None]

    def rows(values: list, kind: pa.DataType) -> manifests.Selection:
        pq.write_table(pa.table({"sound": pa.array(values, kind)}), tmp_path / "rows.parquet")
        return manifests.Selection(
            manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))
        )

    assert (
        1000 * 42
        < overlap.bytes_to_read(rows(paths, pa.string()), "audio", {"audio": "sound"})
        < 2000 * 42
    )
    assert overlap.bytes_to_read(rows(paths[-1:], pa.string()), "image", {"image": "sound"}) == 0
    held = rows([b"abc"] * 42, pa.binary())
    assert overlap.bytes_to_read(held, "audio", {"audio": "sound"}) == held.manifest.num_bytes
    texts = rows(["a text"] * 42, pa.string())
    assert overlap.bytes_to_read(texts, "text", {"text": "sound"}) == texts.manifest.num_bytes


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.struct([("bytes", pa.null()), ("path", pa.string())]),
    ],
    ids=str,
)
def test_any_type_of_text_that_names_files_counts_as_the_files(tmp_path, kind):
    (tmp_path / "a.wav").write_bytes(bytes(1000))
    values = [str(tmp_path / "a.wav")] * 40 + ["a\0b.wav"] * 2
    cells = [{"path": value} for value in values] if pa.types.is_struct(kind) else values
    pq.write_table(pa.table({"sound": pa.array(cells, kind)}), tmp_path / "rows.parquet")
    rows = manifests.Selection(
        manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))
    )
    assert overlap.bytes_to_read(rows, "audio", {"audio": "sound"}) == 1000 * 42


# ---------------------------------------------------------------- records that were cut, and people

COLUMNS = {"times": "times", "variables": "variables", "values": "values"}


def stays(count: int, first: int = 0, shift: float = 0.0) -> pa.Table:
    """Records of 10 to 19 events; three records in a row are of one patient. ``shift`` makes other
    records of the same ids.
    """
    draw = np.random.default_rng(first)
    rows = []
    for i in range(first, first + count):
        n = 10 + i % 10
        times = np.sort(draw.uniform(0, 100, n)).astype(np.float32) + np.float32(shift)
        rows.append(
            {
                "entity": 200_000 + i,
                "patient": 7_000 + i // 3,
                "times": [-3.0, *times.tolist()],
                "variables": ["hr", *(["hr", "bp"][k % 2] for k in range(n))],
                "values": [1.0, *draw.normal(size=n).tolist()],
                "events": n + 1,
                "label": i % 2,
                "split": ("train", "validation", "test")[i // 3 % 3],
            }
        )
    kinds = {
        "times": pa.list_(pa.float32()),
        "values": pa.list_(pa.float32()),
        "events": pa.int32(),
    }
    table = pa.Table.from_pylist(rows)
    for name, kind in kinds.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table


def record_job(
    folder, source: pa.Table, target: pa.Table, group=("patient", "patient"), **fields
) -> job_state.JobState:
    """A source that forecasts on records, and a target that classifies others."""
    for name, table in (("source", source), ("target", target)):
        pq.write_table(table, folder / f"{name}.parquet")
    modality = {"events": {"hours": 200, "min_rows": 1}}
    job = {
        "name": "toy",
        "storage": str(folder / "runs"),
        "sources": {
            "stays": {
                "data": {
                    "train": str(folder / "source.parquet"),
                    "modality": modality,
                    "columns": COLUMNS,
                    "group": group[0],
                    "validation_fraction": 0.0,
                },
                "backbone": {"events/gru": {"width": 16}},
                "objective": "forecast",
                "train": {"steps": 1, "global_batch": 4},
            }
        },
        "targets": {
            "task": {
                "data": {
                    "uri": str(folder / "target.parquet"),
                    "split_column": "split",
                    "modality": modality,
                    "group": group[1],
                    "columns": {**COLUMNS, "label": "label"},
                },
                "objective": "classification",
                **fields,
            }
        },
    }
    return stages.check(Job.model_validate(job), Progress(Console(quiet=True)))


def looked(state: job_state.JobState) -> overlap.Overlap:
    return overlap.find_overlap(
        state.targets["task"], state.sources, storage.join(state.job.root, "signs")
    )


def cut(table: pa.Table, hours: float = 48.0, history: bool = True) -> pa.Table:
    return definition.truncate_events(table, np.full(len(table), hours), history)[0]


@pytest.mark.parametrize("history", [True, False])
def test_cut_records_are_known_by_their_id_before_they_were_cut(tmp_path, history):
    whole, new = stays(60), stays(60, first=1000)
    target = pa.concat_tables([cut(whole.slice(0, 18), history=history), new])
    state = record_job(tmp_path, whole, target, group=(None, None))
    test = np.flatnonzero(np.array(target["split"].to_pylist()) == "test")
    known = int((test < 18).sum())
    assert 0 < known < len(test)
    found = looked(state)
    assert found.notes == (
        f"task: 0 of {len(test)} test rows are also in source stays, {known} more as another "
        "cut of the same record (column entity)",
    )
    assert len(found.test) == len(test)
    left = looked(record_job(tmp_path, whole, target, group=(None, None), drop_overlap="exact"))
    assert len(left.test) == len(test) - known and not any(
        "200" in note or "7000" in note for note in left.notes
    )


def test_each_fold_leaves_out_what_a_source_has_trained_on(tmp_path):
    known, new = stays(18), stays(42, first=1000)
    target = pa.concat_tables([known, new])
    job = record_job(tmp_path, known, target, drop_overlap="exact").job.model_dump(mode="json")
    job["targets"]["task"]["folds"] = 3
    job["targets"]["task"]["data"]["split_column"] = None
    state = stages.check(Job.model_validate(job), Progress(Console(quiet=True)))
    left: list[int] = []
    for stage in state.targets.values():
        found = overlap.find_overlap(stage, state.sources, storage.join(state.job.root, "signs"))
        assert len(found.test) < len(stage.splits.test)
        left += found.test.ids(np.arange(len(found.test))).tolist()
    assert sorted(left) == list(range(18, 60))


def test_the_same_ids_of_another_collection_are_no_same_records(tmp_path):
    state = record_job(tmp_path, stays(60), cut(stays(60, shift=0.5)), group=(None, None))
    assert looked(state).notes == ()


def test_test_rows_of_people_whose_other_rows_a_source_learned_from_are_counted(tmp_path):
    """No row is the same: other stays of the same patients."""
    whole = stays(60)
    first = np.array([i % 3 == 0 for i in range(60)])
    source, target = (
        whole.filter(pa.array(first)),
        pa.concat_tables([whole.filter(pa.array(~first)), stays(60, first=1000)]),
    )
    target = target.set_column(
        target.column_names.index("patient"), "patient", target["patient"].cast(pa.string())
    )
    state = record_job(tmp_path, source, target)
    test = [
        row for row in target.select(["split", "patient"]).to_pylist() if row["split"] == "test"
    ]
    known = sum(int(row["patient"]) < 7_020 for row in test)
    assert 0 < known < len(test)
    message = (
        f"task: {known} of {len(test)} test rows are of a group that is also in the training "
        "rows of source stays (group: patient)"
    )
    found = looked(state)
    assert found.notes == (message,) and len(found.test) == len(test)
    for mode, left in (("exact", len(test)), ("group", len(test) - known)):
        state = record_job(tmp_path, source, target, drop_overlap=mode)
        found = looked(state)
        assert len(found.test) == left and message in found.notes, mode
        assert not any(row["patient"] in note for row in test for note in found.notes), (
            "no patient's id is shown"
        )
    assert (
        found.notes[-1]
        == f"task: {known} of {len(test)} test rows left out because they or their group "
        "are also in a source (drop_overlap: group)"
    )


def test_groups_are_compared_where_both_sides_name_one(tmp_path):
    whole = stays(60)
    first = pa.array([i % 3 == 0 for i in range(60)])
    source, target = whole.filter(first), whole.filter(pc.invert(first))
    state = record_job(tmp_path, source, target, group=(None, "patient"))
    assert looked(state).notes == ()
    named = source.rename_columns(
        ["subject" if name == "patient" else name for name in source.column_names]
    )
    assert (
        "(group: patient here, subject there)"
        in looked(record_job(tmp_path, named, target, group=("subject", "patient"))).notes[0]
    )
    state = record_job(tmp_path, source, target, group=(None, "patient"), drop_overlap="group")
    assert (
        "task: source stays names no group: of its rows only equal ones can be left out"
        in looked(state).notes
    )
    assert not any("checkpoint" in note for note in looked(state).notes)
    stage = state.sources["stays"]
    continued = stage.spec.model_copy(update={"init": "bundle:other"})
    state.sources["stays"] = replace(stage, spec=continued)
    assert any("continues from a checkpoint, and what" in note for note in looked(state).notes)
    keys = {
        mode: record_job(tmp_path, source, target, drop_overlap=mode).targets["task"].key
        for mode in ("none", "exact", "group")
    }
    assert len(set(keys.values())) == 3
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.drop_overlap: group leaves out rows whose group is in a "
        r"source, and data\.group names no",
    ):
        record_job(tmp_path, source, target, group=(None, None), drop_overlap="group")


def test_groups_are_compared_where_only_a_further_corpus_of_the_source_names_one(tmp_path):
    """The first corpus need not have the column at all."""
    people, others = stays(30), stays(60, first=1000)
    target = stays(60, shift=0.5)
    pq.write_table(others.drop_columns(["patient"]), tmp_path / "other.parquet")
    doubles = people.set_column(
        people.column_names.index("patient"), "patient", people["patient"].cast(pa.float64())
    )
    job = record_job(tmp_path, doubles, target, drop_overlap="group").job.model_dump(mode="json")
    data = job["sources"]["stays"]["data"]
    alone = {"group": data.pop("group"), "train": data.pop("train")}
    further = {
        name: value
        for name, value in data.items()
        if name in ("modality", "validation_fraction", "test_fraction")
    }
    job["sources"]["stays"]["data"] = {
        **data,
        "train": str(tmp_path / "other.parquet"),
        "more": [{**further, **alone}],
    }
    found = looked(stages.check(Job.model_validate(job), Progress(Console(quiet=True))))
    known, test = 9, 18  # of the first 30 records, and of all 60
    assert (
        found.notes[0]
        == f"task: {known} of {test} test rows are of a group that is also in the training "
        "rows of source stays (group: patient)"
    )
    assert (
        found.notes[1]
        == "task: 1 of 2 corpora of source stays names no group: of its rows only equal ones can "
        "be left out"
    )
    assert len(found.test) == test - known


def test_rows_whose_group_is_nan_share_none(tmp_path):
    """Files of pandas have NaN where a group is missing."""
    nan = float("nan")
    for name, values in {"test": [1.0, 2.0, nan, nan], "source": [2.0, 3.0, nan]}.items():
        pq.write_table(pa.table({"group": pa.array(values)}), tmp_path / f"{name}.parquet")
    test, source = (
        manifests.Selection(manifests.build(str(tmp_path / f"{name}.parquet"), "parquet", ""))
        for name in ("test", "source")
    )
    found = overlap.in_groups(test, "group", source, "group")
    assert found.tolist() == [False, True, False, False]
