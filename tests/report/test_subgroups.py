"""Parts of the test rows by their own columns: what is scored, what is only counted, and what is
never told.
"""

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as theirs
from toys import image_files, job_of, result_rows, shared_of, trial_of
from written_reports import report_texts

from pipeline.core.metrics import catalog
from pipeline.data.manifests import Selection, build
from pipeline.report import blocks, matrix, per_label, plots, results, stats, subgroups
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions
from pipeline.transfer import targets
from pipeline.transfer import trial as one_trial

SEXES, UNITS = ("female", "male"), {"MICU": 60, "SICU": 90, "CCU": 12, "CSRU": 3}
N = 400


def people(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    unit = np.repeat([*UNITS, "NICU"], [*UNITS.values(), N - sum(UNITS.values())]).astype(object)
    return {
        "sex": np.array(SEXES, dtype=object)[rng.integers(0, 2, N)],
        "unit": rng.permutation(unit),
    }


def run_of(
    seed: int = 0, skill: float = 1.0, groups: np.ndarray | None = None, hours: int = 0
) -> RunPredictions:
    """Predictions that are better for women; nobody in NICU is positive."""
    message = people()
    rng = np.random.default_rng([seed, int(10 * skill)])
    shape = (N, hours) if hours else (N,)
    label = (np.random.default_rng(5).random(shape) < 0.3).astype(np.int64)
    label[message["unit"] == "NICU"] = 0
    better = np.where(message["sex"] == "female", 2.0, 0.5).reshape(-1, *[1] * (len(shape) - 1))
    scores = rng.normal(size=(*shape, 2)).astype(np.float32)
    scores[..., 1] += skill * better * (label - 0.5)
    return RunPredictions(
        np.arange(N),
        {"scores": scores, "label": label, "loss": np.ones(N)},
        seed,
        groups,
        ("alive", "dead"),
        message,
    )


def value(run: RunPredictions, where: np.ndarray) -> float:
    p = run.predictions
    return theirs.roc_auc_score(p["label"][where], p["scores"][where, 1] - p["scores"][where, 0])


# ---------------------------------------------------------------- columns


@pytest.fixture
def selection(tmp_path):
    table = pa.table(
        {
            "sex": pa.array(["f", "m", None, "f"]).dictionary_encode(),
            "age": [1, 2, 3, 3],
            "codes": [["a"]] * 4,
            "many": ["x", "y", "z", "w"],
            "static": pa.array(
                [
                    {"Gender": "female", "CareUnit": {"name": "MICU"}},
                    {"Gender": None, "CareUnit": {"name": "CCU"}},
                    None,
                    {"Gender": "male", "CareUnit": None},
                ]
            ),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    return Selection(build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path)))


def test_columns_and_fields_of_structs_are_read(selection):
    found = subgroups.read(
        selection, ["sex", "age", "static.Gender", "static.CareUnit.name"], "targets.t.subgroups"
    )
    unknown = subgroups.UNKNOWN
    assert {name: texts.tolist() for name, texts in found.items()} == {
        "sex": ["f", "m", unknown, "f"],
        "age": ["1", "2", "3", "3"],
        "Gender": ["female", unknown, unknown, "male"],
        "name": ["MICU", "CCU", unknown, unknown],
    }
    part = Selection(selection.manifest, np.array([1, 3]))
    assert subgroups.read(part, ["sex"], "p")["sex"].tolist() == ["m", "f"]
    run = subgroups.with_subgroups(
        RunPredictions(np.array([3]), {"loss": np.ones(1)}, 0),
        part,
        subgroups.read(part, ["sex"], "p"),
    )
    assert run.subgroups["sex"].tolist() == ["f"] and subgroups.read(selection, [], "p") == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["gender"],
            r"targets\.t\.subgroups: the test rows have no column 'gender'; columns are sex, age",
        ),
        (["codes"], "codes holds list<"),
        (["static"], r"static holds struct<.*of a struct name the field: static\.FIELD"),
        (["static.Sex"], "static has no field 'Sex'"),
        (["sex.x"], "sex has no field 'x'"),
        (["sex", "sex"], "sex is named twice"),
    ],
)
def test_columns_that_tell_no_parts_are_refused(selection, columns, message):
    with pytest.raises(ValueError, match=message):
        subgroups.read(selection, columns, "targets.t.subgroups")


def test_a_column_of_people_is_refused_and_not_told(selection, monkeypatch):
    monkeypatch.setattr(subgroups, "MAX_VALUES", 3)
    with pytest.raises(
        ValueError,
        match="many has 4 different values among the test rows, and a table of subgroups takes 3",
    ) as error:
        subgroups.read(selection, ["many"], "p")
    assert not re.search(r"\b[xyzw]\b", str(error.value))


# ---------------------------------------------------------------- parts and rows


def test_parts_are_scored_where_there_is_enough_to_score():
    found = {
        part.name: part for part in subgroups.split_by_subgroup(run_of(), catalog.metric("auroc"))
    }
    assert list(found) == [
        "sex=female",
        "sex=male",
        "unit=MICU",
        "unit=NICU",
        "unit=SICU",
        "unit: others",
    ]
    assert [name for name, part in found.items() if not part.scored] == [
        "unit=NICU",
        "unit: others",
    ]  # nobody positive; 15 rows
    assert {name: found[f"unit={name}"].units for name in ("MICU", "SICU")} == {
        "MICU": 60,
        "SICU": 90,
    }
    assert found["unit=NICU"].positives == 0
    assert (
        found["unit: others"].units == 15
    )  # the 3 of one unit would be told by what the others lack: they stand with the next smallest
    patients = run_of(groups=np.arange(N) // 10)  # 40 of them: no unit of few rows has 20
    found = {
        part.name: part for part in subgroups.split_by_subgroup(patients, catalog.metric("auroc"))
    }
    assert found["sex=male"].units == 40 and found["sex=male"].scored
    small = np.isin(patients.subgroups["unit"], ["CCU", "CSRU"])
    assert found["unit: others"].units == len(np.unique(patients.groups[small]))
    assert not {
        "unit=CCU",
        "unit=CSRU",
    } & set(found)


def test_values_of_single_people_are_not_named():
    """An age that one row has, in a column of few values, and a column in which each value is one
    patient's.
    """
    rare = run_of()
    ages = np.where(np.arange(N) == 7, "63.4", np.where(np.arange(N) < 200, "young", "old")).astype(
        object
    )
    names = [
        part.name
        for part in subgroups.split_by_subgroup(
            replace(rare, subgroups={"age": ages}), catalog.metric("auroc")
        )
    ]
    assert names == [
        "age=old",
        "age: others",
    ]  # one alone is not hidden by its size: the smaller of the two others goes with it
    ids = replace(
        run_of(groups=np.arange(N) // 40),
        subgroups={"id": (np.arange(N) // 40).astype(str).astype(object)},
    )
    assert [
        (part.name, part.units)
        for part in subgroups.split_by_subgroup(ids, catalog.metric("auroc"))
    ] == [("id: others", 10)]


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_are_the_metric_of_the_part_with_its_own_interval(grouped):
    run = run_of(groups=np.arange(N) // 4 if grouped else None)
    primary = ResultRow(
        metric="auroc",
        value=0.5,
        trial_id="t",
        split="test",
        gain=0.1,
        gain_low=0.0,
        gain_high=0.2,
        scratch_value=0.4,
        n_eval=N,
        n_units=N,
        seed=3,
    )
    rows = subgroups.result_rows(run, primary)
    assert [row.metric for row in rows] == [
        "auroc@sex=female",
        "auroc@sex=male",
        "auroc@unit=MICU",
        "auroc@unit=SICU",
    ]
    for row in rows:
        column, _, name = row.metric.partition("@")[2].partition("=")
        where = run.subgroups[column] == name
        assert row.value == pytest.approx(value(run, where))
        assert row.value_low < row.value < row.value_high
        part = {key: array[where] for key, array in run.predictions.items()}
        assert (row.value_low, row.value_high) == stats.interval(
            catalog.metric("auroc"), part, groups=run.groups[where] if grouped else None
        )
        assert row.n_eval == where.sum()
        assert row.n_units == (len(np.unique(run.groups[where])) if grouped else where.sum())
        assert row.gain is row.gain_low is row.gain_high is row.scratch_value is None
        assert row.seed == 3
    assert rows[0].value > rows[1].value + 0.1


def test_a_part_without_a_macro_average_is_only_counted():
    truth = np.zeros((60, 2), np.uint8)
    truth[:25, 0] = truth[5:30, 1] = 1
    p = {
        "scores": np.random.default_rng(0).normal(size=(60, 2)),
        "labels": truth,
        "min_positives": np.full(60, 1, np.int32),
    }
    run = RunPredictions(
        np.arange(60),
        p,
        0,
        labels=("a", "b"),
        subgroups={"half": np.repeat(["first", "second"], 30).astype(object)},
    )
    found = subgroups.split_by_subgroup(run, catalog.metric("macro_auroc"))
    assert [(part.name, part.scored, part.positives) for part in found] == [
        ("half=first", True, None),
        ("half=second", False, None),
    ]


# ---------------------------------------------------------------- the report


def table(
    made: dict[tuple[str, str], list[RunPredictions]], metric: str = "auroc"
) -> tuple[list[dict], dict[str, RunPredictions]]:
    rows, runs = [], {}
    for (source, technique), seeds in made.items():
        for run in seeds:
            of_trial = result_rows(source, technique, run, metric, "auprc", "brier")
            rows += [*of_trial, *subgroups.result_rows(run, of_trial[0])]
            runs[of_trial[0].trial_id] = run
    return rows, runs


MADE = {
    ("none", "scratch"): [run_of(s, 0.4) for s in range(3)],
    ("src", "full"): [run_of(s, 1.5) for s in range(3)],
}


def test_the_report_has_a_line_for_each_part_and_hides_small_ones():
    rows, runs = table(MADE)
    entries = matrix.matrix_entries(rows, runs)
    assert {entry.metric for entry in entries} == {
        "auroc"
    }  # rows of parts are not taken for the primary one
    heading, text, listed = subgroups.subgroup_blocks("t", entries, runs)
    assert heading.text == "Subgroups"
    assert "src · full" in text.text
    assert "fewer than 20 test rows" in text.text
    assert listed.header == [
        "Subgroup",
        "Test rows",
        "Positives",
        "auroc",
        "auroc, scratch",
        "gain",
    ]
    lines = {line[0]: line[1:] for line in listed.rows}
    ours = MADE["src", "full"]
    assert lines["unit: others"] == ["15", "–", "–", "–", "–"]
    assert lines["unit=NICU"][1:3] == ["–", "–"]
    assert not {"unit=CSRU", "unit=CCU"} & set(lines)
    for name in ("all test rows", "sex=female", "unit=SICU"):
        column, _, kind = name.partition("=")
        where = ours[0].subgroups[column] == kind if kind else np.ones(N, bool)
        size, positives, mine, scratch, gain = lines[name]
        assert size == str(where.sum())
        assert positives == str(ours[0].predictions["label"][where].sum())
        assert float(mine.lines[0]) == pytest.approx(
            np.mean([value(run, where) for run in ours]), abs=0.01
        )
        assert float(scratch.lines[0]) == pytest.approx(
            np.mean([value(run, where) for run in MADE["none", "scratch"]]), abs=0.01
        )
        assert float(gain.lines[0]) == pytest.approx(
            float(mine.lines[0]) - float(scratch.lines[0]), abs=0.02
        )
        assert "[" in gain.lines[1]
    assert subgroups.subgroup_blocks("t", entries, {}) == []
    bare = {
        key: RunPredictions(run.rows, run.predictions, run.seed, labels=run.labels)
        for key, run in runs.items()
    }
    assert subgroups.subgroup_blocks("t", entries, bare) == []


def test_few_positives_are_hidden_too():
    assert [subgroups.format_size(count) for count in (0, 1, 4, 5, 1234, None)] == [
        "0",
        "<5",
        "<5",
        "5",
        "1,234",
        "–",
    ]


def test_two_classes_have_all_metrics_and_a_calibration_curve_in_the_report(tmp_path):
    rows, runs = table(MADE)
    entries = matrix.matrix_entries(rows, runs)
    out = per_label.label_blocks("t", entries, rows, runs)
    assert [block.text for block in out if isinstance(block, blocks.Heading)] == [
        "All metrics",
        "Calibration",
        "Confusion matrix",
    ]
    listed = next(block for block in out if isinstance(block, blocks.Table))
    assert [line[0] for line in listed.rows] == [
        "auroc ↑",
        "auprc ↑",
        "brier ↓",
    ]
    assert listed.header == ["Metric", "src", "scratch", "gain"]
    brier = [
        np.mean([catalog.metric("brier").value(run.predictions) for run in MADE[key]])
        for key in (("src", "full"), ("none", "scratch"))
    ]
    assert [float(value.lines[0]) for value in listed.rows[2][1:]] == pytest.approx(
        [*brier, brier[1] - brier[0]], abs=0.002
    )
    figure = next(block for block in out if isinstance(block, blocks.Figure))
    shown = figure.numbers.rows
    assert len(shown) == 20
    assert {line[0] for line in shown} == {"src · full · 100 %", "scratch"}
    assert all(line[3] == "120" for line in shown)
    rates = [float(line[2].split()[0]) for line in shown[:10]]
    assert np.mean(rates) == pytest.approx(
        100 * MADE["src", "full"][0].predictions["label"].mean(), abs=0.1
    )
    assert rates[-1] > rates[0]
    markdown, html = report_texts(tmp_path, rows, runs)
    assert (
        "### Subgroups" in markdown
        and "| unit: others | 15 |" in markdown
        and "predicted probability of dead" in html
    )
    assert "#0101" not in html and "#0102" not in html


def test_predictions_at_positions_have_them_without_a_confusion_matrix():
    made = {
        ("none", "scratch"): [run_of(0, 0.4, hours=4)],
        ("src", "full"): [run_of(0, 1.5, hours=4)],
    }
    rows, runs = table(made)
    entries = matrix.matrix_entries(rows, runs)
    assert [
        block.text
        for block in per_label.label_blocks("t", entries, rows, runs)
        if isinstance(block, blocks.Heading)
    ] == ["All metrics", "Calibration"]
    listed = subgroups.subgroup_blocks("t", entries, runs)[2]
    assert listed.rows[0][:3] == [
        "all test rows",
        "400",
        str(made["src", "full"][0].predictions["label"].sum()),
    ]


def test_the_curve_reaches_as_far_as_its_points():
    svg = plots.reliability(
        {"ours": [(0.05, 0.1, 40), (0.2, 0.3, 40)], "scratch": [(0.1, 0.1, 80)]}, "dead <b>"
    )
    assert "dead &lt;b&gt;" in svg and "0.3" in svg and "0.8" not in re.sub("<[^>]*>", " ", svg)


# ---------------------------------------------------------------- from trials


def test_a_job_names_columns_of_its_test_rows(tmp_path):
    paths = image_files(tmp_path / "data", {"train": 36, "validation": 18, "test": 60}, classes=2)
    table = pq.read_table(paths["test"])
    pq.write_table(
        table.append_column("sex", pa.array(["female", "male", "male"] * 20)), paths["test"]
    )
    job = job_of(tmp_path, paths, subgroups=["sex"], metric="auroc")
    stage = targets.plan_target(job, "task")
    shared = shared_of(tmp_path, job, paths)
    plain = trial_of(job_of(tmp_path, paths, metric="auroc"), shared, "full")
    one = trial_of(job, shared, "full")
    assert one.id == plain.id  # a table more trains nothing anew
    record = one_trial.run(one, shared)
    run = one_trial.read_predictions(shared.root, one.folder, 0)
    message = subgroups.with_subgroups(
        run, stage.splits.test, subgroups.read(stage.splits.test, ["sex"], "p")
    )
    rows = subgroups.result_rows(message, record.rows[0])
    assert [row.metric for row in rows] == ["auroc@sex=female", "auroc@sex=male"]
    assert [row.n_eval for row in rows] == [20, 40]
    assert rows[1].value == pytest.approx(value(message, np.arange(60) % 3 > 0))
    results.append(str(tmp_path), [*record.rows, *rows])
    assert [row.metric for row in results.read(str(tmp_path))][-2:] == [
        "auroc@sex=female",
        "auroc@sex=male",
    ]
    with pytest.raises(
        ValueError, match=r"targets\.task\.subgroups: the test rows have no column 'ward'"
    ):
        targets.plan_target(job_of(tmp_path, paths, subgroups=["ward"]), "task")
