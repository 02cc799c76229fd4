import csv
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.io import storage
from pipeline.report import results
from pipeline.report.results import ResultRow

DESIGN = """job source backbone target objective technique hyper_parameters seed label_fraction
trial_id trial_stage status error metric value value_low value_high interval higher_is_better split n_train n_eval n_units
params_trained steps seconds device bundle_uri parent_uri scratch_value gain gain_low gain_high score_name score_value spec_hash git_sha started_at
split_origin paired_seeds gain_p_holm baseline_gain current versions made_by drawn layers_trained modality source_scores
best_baseline best_baseline_gain best_baseline_low best_baseline_high fold trial_name trial_folder"""


def columns(trial_id="a", metric="accuracy", value=0.5, **more):
    return {
        "job": "j",
        "source": "s",
        "backbone": "timm/resnet18",
        "target": "t",
        "objective": "classification",
        "technique": "full",
        "hyper_parameters": "{}",
        "seed": 0,
        "label_fraction": "1.0",
        "trial_id": trial_id,
        "trial_stage": "final",
        "status": "done",
        "metric": metric,
        "value": value,
        "split": "test",
        "higher_is_better": True,
        **more,
    }


def row(*args, **more):
    return ResultRow.from_columns(columns(*args, **more))


def test_columns_are_the_public_ones():
    assert results.SCHEMA.names == DESIGN.split()
    assert results.SCHEMA.field("started_at").type == pa.timestamp("us", tz="UTC")


def test_round_trip(tmp_path):
    uri = str(tmp_path / "job")
    assert results.read(uri) == []
    started = datetime(2025, 5, 1, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=2)))
    results.append(uri, [row(n_eval=np.int64(7), seconds=np.float64(1.5), started_at=started)])
    results.append(uri, [])
    results.append(uri, [row("b", label_fraction="5/class")])
    read = results.read(uri)
    assert [r.trial_id for r in read] == ["a", "b"]
    assert list(read[0].columns()) == results.SCHEMA.names
    assert read[0].started_at == started and read[0].started_at.utcoffset() == timedelta(0)
    assert read[0].n_eval == 7 and read[0].error is None and read[1].label_fraction == "5/class"
    assert pq.read_schema(tmp_path / "job" / results.FILE).equals(results.SCHEMA)


@pytest.mark.parametrize(
    ("metric", "label", "subgroup"),
    [
        (None, False, False),
        ("auroc", False, False),
        ("auroc/Effusion", True, False),
        ("auroc/a@b", True, False),
        ("auroc@sex=f", False, True),
        ("auroc@dose=5 mg/ml", False, True),
    ],
)
def test_a_metric_says_whether_it_is_of_a_label_or_of_a_subgroup(metric, label, subgroup):
    found = ResultRow(metric=metric)
    assert (found.is_of_label, found.is_of_subgroup) == (label, subgroup)


def test_trials_are_listed_for_people(tmp_path):
    """With the values of the primary metric, the folder and the bundle, sorted by name."""
    names = {"a": "t/s/full/1.0/seed1", "b": "t/s/full/1.0/seed0"}
    folder = "trials/t/s/full/labels-1.0/seed1-a"
    rows = [
        row("a", trial_name=names["a"], bundle_uri=f"runs/j/{folder}/bundle", trial_folder=folder),
        row("a", "loss", 2.0, trial_name=names["a"]),
        row("a", value=0.75, split="validation", trial_name=names["a"]),
        row("b", None, None, status="failed", error="boom", split=None, trial_name=names["b"]),
    ]
    results.append(str(tmp_path), rows, current={"a", "b"})
    with open(tmp_path / "trials.csv", newline="") as file:
        second, first = csv.DictReader(file)
    assert first == {
        "name": names["a"],
        "status": "done",
        "current": "True",
        "metric": "accuracy",
        "validation": "0.75",
        "test": "0.5",
        "folder": folder,
        "bundle": f"runs/j/{folder}/bundle",
    }
    assert (second["name"], second["status"], second["test"]) == (names["b"], "failed", "")
    results.remove(str(tmp_path), ["b"])
    assert names["b"] not in (tmp_path / "trials.csv").read_text()
    old = str(tmp_path / "old")
    results.append(old, [row("c")])
    assert "\nc,done," in (tmp_path / "old" / "trials.csv").read_text(), "it has no name yet"
    assert ",trials/c," in (tmp_path / "old" / "trials.csv").read_text()


@pytest.mark.parametrize(
    ("old_root", "recorded", "read"),
    [
        ("/old/j", "/old/j/sources/photos-1a/bundle", "{root}/sources/photos-1a/bundle"),
        ("s3://b/j", "s3://b/j/sources/photos-1a/bundle", "{root}/sources/photos-1a/bundle"),
        ("/old/j", "/other/j/sources/photos-1a/bundle", "/other/j/sources/photos-1a/bundle"),
        ("/old/j", "/old/k/sources/photos-1a/bundle", "/old/k/sources/photos-1a/bundle"),
        ("/old/j", "/models/j/bundle", "/models/j/bundle"),
    ],
)
def test_the_bundle_of_a_source_is_read_where_the_jobs_folder_is(
    tmp_path, old_root, recorded, read
):
    """Those of other jobs, also of one with the same name, and places stay where they are."""
    root, trial_id = str(tmp_path), "0123456789ab"
    own = f"{old_root}/trials/{trial_id}/bundle"
    results.append(root, [row(trial_id, bundle_uri=own, parent_uri=recorded)])
    found = results.read(root)[0]
    assert found.parent_uri == read.format(root=root)
    assert found.bundle_uri == f"{root}/trials/{trial_id}/bundle"


def test_rows_of_a_trial_replace_all_its_earlier_ones(tmp_path):
    """It was made again, or the job no longer names a subgroup."""
    uri = str(tmp_path)
    subgroup = row(metric="accuracy@sex=female", value=0.6)
    search = row(trial_stage="search", value=0.5)
    results.append(uri, [row(value=0.1), subgroup, search, row("b"), row(value=0.2)])
    results.append(uri, [row(value=0.3), row(split="validation", value=0.4)], current={"a", "b"})
    found = [(r.trial_id, r.metric, r.split, r.trial_stage, r.value) for r in results.read(uri)]
    assert found == [
        ("a", "accuracy", "test", "search", 0.5),
        ("b", "accuracy", "test", "final", 0.5),
        ("a", "accuracy", "test", "final", 0.3),
        ("a", "accuracy", "validation", "final", 0.4),
    ]


def test_a_failure_is_superseded_by_the_rerun_that_is_done(tmp_path):
    failed = row("a", None, None, status="failed", error="boom", split=None)
    results.append(
        str(tmp_path), [failed, row("b", None, None, status="failed", error="bang", split=None)]
    )
    results.append(str(tmp_path), [row("a")])
    assert [(r.trial_id, r.status) for r in results.read(str(tmp_path))] == [
        ("b", "failed"),
        ("a", "done"),
    ]


def test_results_of_a_trial_that_fails_when_it_is_made_anew_go(tmp_path):
    """Its record says that it failed, and the table says the same."""
    failed = row("a", None, None, status="failed", error="boom", split=None)
    results.append(str(tmp_path), [row("a"), row("a", "loss", 2.0), row("b")])
    results.append(str(tmp_path), [failed], current={"a", "b"})
    assert [(r.trial_id, r.status) for r in results.read(str(tmp_path))] == [
        ("b", "done"),
        ("a", "failed"),
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"acuracy": 1.0}, "no column 'acuracy'"),
        ({"valeu": 1.0}, "value"),
        ({"label_fraction": 0.05}, "label_fraction holds string, got 0.05"),
        ({"hyper_parameters": {"lr": 1}}, "hyper_parameters holds string"),
        ({"n_train": "many"}, "n_train holds int64"),
        ({"status": "finished"}, "done, failed, pruned"),
        ({"trial_stage": "test"}, "search, final"),
        ({"trial_id": None}, "needs its trial_id"),
        ({"started_at": datetime(2025, 1, 1)}, "no time zone"),
    ],
)
def test_wrong_rows_are_refused_and_nothing_is_written(tmp_path, bad, says):
    results.append(str(tmp_path), [row()])
    before = (tmp_path / results.FILE).read_bytes()
    with pytest.raises(ValueError, match=says):
        results.append(str(tmp_path), [row("b"), ResultRow.from_columns({**columns("c"), **bad})])
    assert (tmp_path / results.FILE).read_bytes() == before


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    results.append(str(tmp_path), [row()])
    monkeypatch.setattr(
        storage.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no"))
    )
    with pytest.raises(OSError):
        results.append(str(tmp_path), [row("b")])
    assert [r.trial_id for r in results.read(str(tmp_path))] == ["a"]
    assert {p.name for p in tmp_path.iterdir()} == {results.FILE, results.INDEX}


def test_older_files_are_filled_and_newer_ones_refused(tmp_path):
    old = pa.schema([f for f in results.SCHEMA if f.name != "git_sha"])
    pq.write_table(pa.Table.from_pylist([columns()], schema=old), tmp_path / results.FILE)
    assert results.read(str(tmp_path))[0].git_sha is None
    results.append(str(tmp_path), [row("b", git_sha="abc")])
    assert [r.git_sha for r in results.read(str(tmp_path))] == [None, "abc"]
    new = results.SCHEMA.append(pa.field("shiny", pa.string()))
    pq.write_table(pa.Table.from_pylist([columns()], schema=new), tmp_path / results.FILE)
    with pytest.raises(ValueError, match="shiny"):
        results.append(str(tmp_path), [row("b")])


def test_rows_of_trials_that_the_job_no_longer_has_are_marked(tmp_path):
    uri = str(tmp_path)
    results.append(uri, [row("a"), row("b")], current={"a", "b"})
    assert {r.trial_id: r.current for r in results.read(uri)} == {"a": True, "b": True}
    results.append(uri, [row("c")], current={"b", "c", "not run yet"})
    assert {r.trial_id: r.current for r in results.read(uri)} == {"a": False, "b": True, "c": True}
    results.append(uri, [], current={"a"})
    assert {r.trial_id: r.current for r in results.read(uri)} == {
        "a": True,
        "b": False,
        "c": False,
    }, "a job that is as it was before"


def test_the_run_of_a_part_leaves_rows_of_other_parts_as_they_are(tmp_path):
    uri = str(tmp_path)

    def is_of_part(one: ResultRow) -> bool:
        return one.target == "tops"

    results.append(uri, [row("a"), row("b"), row("old", target="tops")], current={"a", "old"})
    results.append(uri, [row("new", target="tops")], current={"new"}, is_of_part=is_of_part)
    found = {r.trial_id: r.current for r in results.read(uri)}
    assert found == {"a": True, "b": False, "old": False, "new": True}
    results.append(uri, [], current={"b"}, is_of_part=is_of_part)
    found = {r.trial_id: r.current for r in results.read(uri)}
    assert found == {"a": True, "b": True, "old": False, "new": False}


def test_a_table_of_before_the_column_gets_it_at_the_next_run(tmp_path):
    old = pa.schema([f for f in results.SCHEMA if f.name != "current"])
    pq.write_table(pa.Table.from_pylist([columns("a")], schema=old), tmp_path / results.FILE)
    assert results.read(str(tmp_path))[0].current is None
    results.append(str(tmp_path), [row("b")], current={"b"})
    assert [r.current for r in results.read(str(tmp_path))] == [False, True]


def test_rows_of_trials_are_removed(tmp_path):
    assert results.remove(str(tmp_path), {"a"}) == 0 and not (tmp_path / results.FILE).exists()
    results.append(str(tmp_path), [row("a"), row("b"), row("a", "loss", 1.0)])
    assert results.remove(str(tmp_path), {"a", "never run"}) == 2
    assert [r.trial_id for r in results.read(str(tmp_path))] == ["b"]


def final(trial_id, loss, accuracy=0.5, **more):
    return [row(trial_id, "accuracy", accuracy, **more), row(trial_id, "loss", loss, **more)]


def test_duplicates_flag_equal_losses_under_different_settings():
    rows = [
        *final("a", 1 / 3, seed=0),
        *final("b", 1 / 3, seed=1),
        *final("c", 1 / 3, seed=2),
        *final("d", 0.7, seed=3),
    ]
    rows += [replace(r, split="validation") for r in rows]  # the same three trials are named once
    (sentence,) = results.duplicates(rows)
    assert (
        sentence
        == "t: test loss 0.333333 is identical in 3 trials that differ in seed: a (0); b (1); c "
        "(2)."
    )


def test_duplicates_show_a_source_that_was_never_loaded():
    rows = [
        *final("a", 0.25, source="none", technique="scratch"),
        *final("b", 0.25, source="garments", technique="full"),
    ]
    (sentence,) = results.duplicates(rows)
    assert "differ in source, technique: a (none, scratch); b (garments, full)" in sentence


def test_a_solved_head_is_the_same_with_every_seed_and_not_from_every_source():
    solved = '{"solver": "lbfgs", "penalty": 0.1}'
    seeds = [*final("a", 0.25, hyper_parameters=solved)]
    seeds += final("b", 0.25, hyper_parameters=solved, seed=1)
    assert not results.duplicates(seeds)
    other = final("c", 0.25, hyper_parameters=solved, seed=1, source="films")
    (sentence,) = results.duplicates([*seeds, *other])
    assert "identical in 3 trials that differ in source" in sentence


def test_chance_and_repeats_are_not_duplicates():
    lr = [json.dumps({"lr": x, "wd": 0}) for x in (0.1, 0.2)]
    assert not results.duplicates(
        [*final("a", 0.25, hyper_parameters=lr[0]), *final("b", 0.2500001, hyper_parameters=lr[1])]
    )
    assert not results.duplicates([row("a", seed=0), row("b", seed=1)])  # accuracy alone
    assert not results.duplicates([*final("a", 0.25), *final("b", 0.25, target="u", seed=1)])
    assert not results.duplicates([*final("a", float("nan")), *final("b", float("nan"), seed=1)])
    assert not results.duplicates([*final("a", 0.25), *final("b", 0.25, seed=1, status="pruned")])
    same = '{"wd": 0, "lr": 0.1}'
    assert not results.duplicates(
        [
            *final("a", 0.25, hyper_parameters=lr[0], trial_stage="search"),
            *final("b", 0.25, hyper_parameters=same),
        ]
    )


def test_without_loss_two_equal_metrics_are_needed():
    rows = [row("a"), row("b", seed=1), row("a", "auroc", 0.9), row("b", "auroc", 0.9, seed=1)]
    (sentence,) = results.duplicates(rows)
    assert "every test metric is identical in 2 trials that differ in seed" in sentence
    rows[-1] = replace(rows[-1], value=0.91)
    assert not results.duplicates(rows)


def test_rows_of_one_target_that_were_split_in_two_ways_are_told_apart():
    rows = [
        ResultRow(target="xray", split_origin="column split_by_patient", value=0.6),
        ResultRow(target="xray", split_origin="test: random 0.2", value=0.9),
        ResultRow(target="xray", value=0.7),
        ResultRow(target="photos", split_origin="files"),
        ResultRow(target="photos", split_origin="files"),
    ]
    message = results.disambiguate_targets(rows)
    assert [row.target for row in message] == [
        "xray [column split_by_patient]",
        "xray [test: random 0.2]",
        "xray [splits not recorded]",
        "photos",
        "photos",
    ]
    assert [row.value for row in message] == [row.value for row in rows]
    assert results.disambiguate_targets(rows[:1] + rows[3:]) == rows[:1] + rows[3:]
    assert rows[0].target == "xray"
