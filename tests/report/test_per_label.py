"""Classes and labels one by one: result rows of a multi-label target, the confusion matrix and the
table of labels in the report.
"""

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.special
import sklearn.metrics as theirs
from toys import image_files, job_of, result_rows, shared_of, trial_of
from written_reports import report_texts

from pipeline.config.schema import Job
from pipeline.core.metrics import catalog, coco_ap
from pipeline.report import blocks, matrix, per_label, results
from pipeline.report.stats import RunPredictions
from pipeline.transfer import cached_heads, targets
from pipeline.transfer import trial as one_trial
from tests.core.metrics.test_coco_ap import case, with_masks

NAMES = ("coat", "bag & belt", "shoe")


def classes(n: int, names, seed: int, skill: float) -> RunPredictions:
    truth = np.random.default_rng(3).integers(0, len(names), n)
    scores = (
        np.random.default_rng([seed, int(10 * skill)])
        .normal(size=(n, len(names)))
        .astype(np.float32)
    )
    scores[np.arange(n), truth] += skill
    return RunPredictions(
        np.arange(n),
        {"scores": scores, "label": truth, "loss": np.zeros(n)},
        seed,
        labels=tuple(names),
    )


def findings(n: int, names, seed: int, skill: float, least: int = 1) -> RunPredictions:
    truth = np.random.default_rng(3).random((n, len(names))) < np.linspace(0.05, 0.5, len(names))
    scores = np.random.default_rng([seed, int(10 * skill)]).normal(size=truth.shape) + skill * truth
    predictions = {
        "scores": scores.astype(np.float32),
        "labels": truth.astype(np.uint8),
        "loss": np.zeros(n),
        "min_positives": np.full(n, least, np.int32),
    }
    return RunPredictions(np.arange(n), predictions, seed, labels=tuple(names))


def table(
    metric: str, made: dict[tuple[str, str], list[RunPredictions]]
) -> tuple[list[dict], dict[str, RunPredictions]]:
    """Results rows and predictions of (source, technique) pairs, a run a seed."""
    rows, runs = [], {}
    for (source, technique), seeds in made.items():
        for run in seeds:
            rows += result_rows(source, technique, run, metric)
            runs[rows[-1].trial_id] = run
    return rows, runs


def said(rows, runs) -> list[blocks.Block]:
    entries = matrix.matrix_entries(rows, runs)
    return per_label.label_blocks(
        "t", [entry for entry in entries if entry.mean is not None], rows, runs
    )


# ---------------------------------------------------------------- the report's blocks


def test_the_confusion_matrix_is_that_of_the_best_entry():
    made = {
        ("none", "scratch"): [classes(90, NAMES, s, 0.2) for s in (0, 1)],
        ("src", "full"): [classes(90, NAMES, s, 1.5) for s in (0, 1)],
        ("src", "linear_probe"): [classes(90, NAMES, s, 0.6) for s in (0, 1)],
    }
    heading, heat, *_ = said(*table("accuracy", made))
    assert heading.text == "Confusion matrix" and isinstance(heat, blocks.Heatmap)
    best = made["src", "full"]
    want = sum(
        theirs.confusion_matrix(run.predictions["label"], run.predictions["scores"].argmax(1))
        for run in best
    )
    assert np.allclose(heat.shares, want / want.sum(1, keepdims=True))
    assert "src · full" in heat.caption
    assert "2 seeds together" in heat.caption
    assert heat.names == [
        f"{name} ({size // 2})" for name, size in zip(NAMES, want.sum(1), strict=True)
    ]


def test_the_confusion_matrix_is_that_at_the_decision_threshold():
    run = classes(90, NAMES[:2], 0, 1.0)
    run.predictions["threshold"] = np.full(90, 0.12)
    shown = said(*table("accuracy", {("src", "full"): [run]}))
    [heat] = [block for block in shown if isinstance(block, blocks.Heatmap)]
    probability = scipy.special.softmax(run.predictions["scores"], axis=1)[:, 1]
    want = theirs.confusion_matrix(run.predictions["label"], probability >= 0.12, normalize="true")
    assert np.allclose(heat.shares, want)
    assert "one seed, at the decision threshold. Per cent" in heat.caption


def test_a_share_that_is_not_zero_is_not_shown_as_zero():
    shares = (0, 0.0001, 0.005, 0.0051, 0.996)
    assert [blocks.format_percent(share) for share in shares] == ["·", "<1", "<1", "1", "100"]


def test_all_tables_of_a_section_are_of_the_best_network():
    """A model without a network that is better has its own row in the matrix."""
    made = {
        ("src", "full"): [classes(90, NAMES, s, 1.0) for s in (0, 1)],
        ("none", "bag_of_words"): [classes(90, NAMES, s, 3.0) for s in (0, 1)],
    }
    rows, runs = table("accuracy", made)
    rows = [replace(row, backbone="none") if row.source == "none" else row for row in rows]
    _, heat, *_ = said(rows, runs)
    assert "src · full" in heat.caption


def test_the_best_entry_is_chosen_on_validation_rows():
    made = {
        ("src", "full"): [classes(90, NAMES, s, 1.5) for s in (0, 1)],
        ("src", "linear_probe"): [classes(90, NAMES, s, 0.6) for s in (0, 1)],
    }
    rows, runs = table("accuracy", made)
    entries = [
        replace(entry, validation=0.9 if entry.technique == "linear_probe" else 0.8)
        for entry in matrix.matrix_entries(rows, runs)
    ]
    _, heat, *_ = per_label.label_blocks("t", entries, rows, runs)
    assert "src · linear_probe" in heat.caption


def test_values_on_rows_of_a_source_choose_no_entry():
    """With 0 labels a network is validated on its source's rows, which are easier to predict."""
    made = {
        ("src", "full"): [classes(90, NAMES, s, 1.0) for s in (0, 1)],
        ("src", "linear_probe"): [classes(90, NAMES, s, 1.5) for s in (0, 1)],
        ("src", "dann"): [classes(90, NAMES, s, 0.6) for s in (0, 1)],
    }
    rows, runs = table("accuracy", made)
    values = {"full": 0.8, "linear_probe": 0.7, "dann": 0.99}
    own = [
        replace(row, label_fraction="0/class") if row.technique == "dann" else row for row in rows
    ]
    own += [
        replace(
            row,
            value=values[row.technique],
            split="source_validation" if row.technique == "dann" else "validation",
        )
        for row in own
    ]
    entries = {entry.technique: entry for entry in matrix.matrix_entries(own, runs)}
    assert entries["dann"].validation is None and entries["full"].validation == 0.8
    _, heat, *_ = said(own, runs)
    assert "src · full" in heat.caption


def test_each_class_has_what_was_found_of_it_beside_scratch():
    made = {
        ("none", "scratch"): [classes(300, NAMES, s, 0.2) for s in (0, 1)],
        ("src", "full"): [classes(300, NAMES, s, 1.5) for s in (0, 1)],
    }
    listed = next(
        block
        for block in said(*table("accuracy", made))
        if isinstance(block, blocks.Table) and block.header[0] == "Class"
    )
    assert sorted(line[0] for line in listed.rows) == sorted(NAMES)
    changes = []
    for name, size, ours, scratch, change in listed.rows:
        found = []
        for key in (("src", "full"), ("none", "scratch")):
            recalls = [
                theirs.recall_score(
                    run.predictions["label"], run.predictions["scores"].argmax(1), average=None
                )[NAMES.index(name)]
                for run in made[key]
            ]
            found.append(np.mean(recalls))
        truth = made["src", "full"][0].predictions["label"]
        assert size == str((truth == NAMES.index(name)).sum())
        for value, want in zip((ours, scratch, change), (*found, found[0] - found[1]), strict=True):
            assert float(value.lines[0]) == pytest.approx(want, abs=0.0051)
        changes.append(found[0] - found[1])
    assert changes == sorted(changes, reverse=True), "the largest change first"


def test_many_classes_have_a_calibration_curve_and_errors_beside_scratch():
    made = {
        ("none", "scratch"): [classes(300, NAMES, s, 0.2) for s in (0, 1)],
        ("src", "full"): [classes(300, NAMES, s, 1.5) for s in (0, 1)],
    }
    out = said(*table("accuracy", made))
    at = next(i for i, block in enumerate(out) if getattr(block, "text", "") == "Calibration")
    figure, errors = out[at + 1 : at + 3]
    assert "the likeliest class" in figure.caption and figure.svg.startswith("<svg")
    assert errors.header == ["", "scratch", "src · full", "Gain"]
    for line, name in zip(errors.rows, ("ece", "brier"), strict=True):
        for value, key in zip(line[1:3], (("none", "scratch"), ("src", "full")), strict=True):
            want = np.mean([catalog.metric(name).value(run.predictions) for run in made[key]])
            assert float(value.lines[0]) == pytest.approx(want, abs=0.0051)
    assert figure.numbers.header[0] == "Model"


def test_of_many_classes_the_commonest_confusions_are_listed():
    names = [f"class {k}" for k in range(30)]
    run = classes(600, names, 0, 2.0)
    truth = run.predictions["label"]
    run.predictions["scores"][truth == 7] = np.eye(30, dtype=np.float32)[12]
    heading, _, listed, *_ = said(*table("accuracy", {("src", "full"): [run]}))
    assert heading.text == "Commonest confusions" and len(listed.rows) == per_label.MAX_PAIRS
    assert listed.rows[0] == ["class 7", "class 12", f"{(truth == 7).sum():.1f}", "100.0 %"]


def test_the_table_of_labels_has_ours_beside_scratch():
    names = ("Mass", "Edema", "Effusion")
    made = {
        ("none", "scratch"): [findings(300, names, s, 0.3, 20) for s in (0, 1, 2)],
        ("src", "full"): [findings(300, names, s, 1.8, 20) for s in (0, 1, 2)],
    }
    _, text, listed = said(*table("macro_auroc", made))
    assert "at least 20 test rows" in text.text and "and scratch, mean over 3 seeds" in text.text
    assert listed.header == [
        "Label",
        "Test rows",
        "AUROC",
        "AUROC, scratch",
        "AUROC, gain",
        "AP",
        "AP, scratch",
        "AP, gain",
    ]
    truth = made["src", "full"][0].predictions["labels"]
    assert [line[:2] for line in listed.rows] == [
        [names[k], str(truth[:, k].sum())] for k in (2, 1, 0)
    ]  # the commonest first
    for k, line in zip((2, 1, 0), listed.rows, strict=True):
        ours, scratch = (
            np.mean(
                [
                    theirs.roc_auc_score(
                        run.predictions["labels"][:, k], run.predictions["scores"][:, k]
                    )
                    for run in made[key]
                ]
            )
            for key in (("src", "full"), ("none", "scratch"))
        )
        assert float(line[2].lines[0]) == pytest.approx(ours, abs=0.006)
        assert float(line[3].lines[0]) == pytest.approx(scratch, abs=0.006)
        assert float(line[4].lines[0]) == pytest.approx(ours - scratch, abs=0.006)
        low, mark = re.match(r"\[([+-]\d\.\d+), \+\d\.\d+\] ([▲○?])$", line[4].lines[1]).groups()
        word = (
            "too few to tell"
            if truth[:, k].sum() < 10
            else "wins"
            if float(low) > 0
            else "not shown"
        )
        assert line[4].tone == word and mark == blocks.MARKS[word]
    assert listed.rows[0][4].tone == "wins"


def test_scratch_is_no_probe_of_random_weights():
    made = {
        ("none", "random_probe"): [findings(200, NAMES, 0, 0.9)],
        ("none", "scratch"): [findings(200, NAMES, 0, 0.3)],
        ("src", "linear_probe"): [findings(200, NAMES, 0, 1.8)],
    }
    rows, runs = table("macro_auroc", made)
    shown = next(block for block in said(rows, runs) if isinstance(block, blocks.Table))
    [scratch] = made["none", "scratch"]
    for line in shown.rows:
        want = catalog.metric(f"auroc/{line[0]}", NAMES).value(scratch.predictions)
        assert float(line[list(shown.header).index("AUROC, scratch")].lines[0]) == pytest.approx(
            want, abs=0.05
        )
    verdicts = {entry.technique: entry.verdict for entry in matrix.matrix_entries(rows, runs)}
    assert verdicts["scratch"] == matrix.REFERENCE
    assert verdicts["random_probe"] == matrix.SINGLE_SEED


def test_labels_are_compared_with_scratch_where_scratch_is_the_better():
    made = {
        ("none", "scratch"): [findings(200, ("a", "b"), 0, 1.8)],
        ("src", "full"): [findings(200, ("a", "b"), 0, 1.2)],
        ("src", "linear_probe"): [findings(200, ("a", "b"), 0, 0.3)],
    }
    _, text, listed = said(*table("macro_auroc", made))
    assert "src · full" in text.text
    assert "and scratch" in text.text
    assert float(listed.rows[0][4].lines[0]) < 0


def test_nothing_is_said_without_predictions_or_names():
    rows, runs = table("accuracy", {("src", "full"): [classes(40, NAMES, 0, 1.0)]})
    assert said(rows, {}) == []
    unnamed = {
        key: RunPredictions(run.rows, run.predictions, run.seed) for key, run in runs.items()
    }
    assert said(rows, unnamed) == []
    boxes = RunPredictions(
        np.arange(4),
        {"scores": np.zeros((4, 9)), "labels": np.zeros((4, 5)), "boxes": np.zeros((4, 9, 4))},
        0,
        labels=("a", "b"),
    )
    assert (
        per_label.label_blocks(
            "t",
            [c for c in matrix.matrix_entries(rows, runs) if c.mean is not None],
            rows,
            dict.fromkeys(runs, boxes),
        )
        == []
    )


def test_a_seed_that_diverged_is_in_no_table():
    """As in the matrix, where it counts as a failed trial."""
    made = {
        ("none", "scratch"): [classes(90, NAMES, s, 0.2) for s in range(3)],
        ("src", "full"): [classes(90, NAMES, s, 1.5) for s in range(3)],
    }
    rows, runs = table("accuracy", made)
    without = said([row for row in rows if row.trial_id != "src-full-0"], runs)
    made["src", "full"][0].predictions["scores"].fill(np.nan)
    assert said(*table("accuracy", made)) == without
    assert "2 seeds together" in without[1].caption


def test_both_are_written_for_readers(tmp_path):
    rows, runs = table(
        "accuracy",
        {
            ("none", "scratch"): [classes(90, NAMES, 0, 0.2)],
            ("src", "full"): [classes(90, NAMES, 0, 2.0)],
        },
    )
    markdown, html = report_texts(tmp_path, rows, runs)
    share = (runs["src-full-0"].predictions["scores"].argmax(1) == 0)[
        runs["src-full-0"].predictions["label"] == 0
    ].mean()
    assert (
        f"| coat ({(runs['src-full-0'].predictions['label'] == 0).sum()}) | {100 * share:.0f} |"
        in markdown
        and "### Confusion matrix" in markdown
    )
    assert '<table class="heat">' in html
    assert "bag &amp; belt" in html
    assert f"var(--s0) {55 * share:.0f}%" in html
    assert not re.search(r"https?:|<script", html)


# ---------------------------------------------------------------- from trials to the table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target whose rows have "a" unless their class is 0, "b" for class 2, and "rare" once in
    training alone.
    """
    folder = tmp_path_factory.mktemp("labels")
    paths = image_files(folder / "data", {"train": 48, "validation": 24, "test": 30})
    for split, path in paths.items():
        found = pq.read_table(path)
        kinds = [int(text.split()[1]) for text in found["class"].to_pylist()]
        sets = [
            ["a"] * (k != 0) + ["b"] * (k == 2) + ["rare"] * (split == "train" and i == 0)
            for i, k in enumerate(kinds)
        ]
        pq.write_table(found.append_column("sets", pa.array(sets)), path, row_group_size=16)

    def job(**objective) -> Job:
        data = job_of(folder, paths, {"eval_every_steps": 6}).model_dump(mode="json")
        data["targets"]["task"]["objective"] = objective
        if "multilabel" in objective:
            data["targets"]["task"]["data"]["columns"] = {"image": "picture", "labels": "sets"}
        return Job.model_validate(data)

    return folder, paths, job


def test_heads_of_label_sets_trained_together_equal_one_at_a_time(world):
    folder, paths, job_with = world
    job = job_with(multilabel={"pos_weight": "balanced"})
    shared = [shared_of(folder, job, paths, root=root) for root in ("together", "alone")]
    group = [
        trial_of(job, shared[0], {"linear_probe": {"solver": "sgd"}}, {"lr": lr}, fraction)
        for lr, fraction in ((0.01, 1.0), (0.1, 0.5))
    ]
    assert cached_heads.can_stack(group, shared[0])
    together = {record.trial_id: record for record in cached_heads.run(group, shared[0])}
    for one in group:
        rows, alone = together[one.id].rows, one_trial.run(one, shared[1]).rows
        assert [(row.split, row.metric) for row in rows] == [
            (row.split, row.metric) for row in alone
        ]
        for x, y in zip(rows, alone, strict=True):
            assert (x.value, x.value_low) == pytest.approx((y.value, y.value_low), abs=1e-5)


def test_rows_of_single_labels_go_into_the_table_and_not_into_the_matrix(world, tmp_path):
    _, paths, job_with = world
    job = job_with(multilabel={"min_positives": 5})
    shared = shared_of(tmp_path, job, paths)
    tries = [
        trial_of(job, shared, technique, seed=seed)
        for technique in ("scratch", "linear_probe")
        for seed in (0, 1)
    ]
    records = [one_trial.run(one, shared) for one in tries]
    tested = [row.metric for row in records[0].rows if row.split == "test"]
    assert tested == [
        "macro_auroc",
        "macro_average_precision",
        "macro_f1",
        "micro_f1",
        "loss",
        "auroc/a",
        "auroc/b",
        "average_precision/a",
        "average_precision/b",
    ]
    found = one_trial.read_predictions(shared.root, tries[0].folder, 0)
    assert found is not None and found.labels == ("a", "b", "rare")
    for row in records[0].rows[5:9]:
        name, _, label = row.metric.partition("/")
        k = found.labels.index(label)
        other = {
            "auroc": theirs.roc_auc_score,
            "average_precision": theirs.average_precision_score,
        }[name]
        assert row.value == pytest.approx(
            other(found.predictions["labels"][:, k], found.predictions["scores"][:, k]), abs=1e-9
        )
        assert row.value_low < row.value < row.value_high
        assert row.n_units == 30
        assert row.higher_is_better
    macro = records[0].rows[0]
    assert macro.value == pytest.approx(
        np.mean([row.value for row in records[0].rows if row.metric.startswith("auroc/")])
    )
    rows = [row for record in records for row in record.rows]
    results.append(str(tmp_path), rows)
    read = results.read(str(tmp_path))
    runs = {
        one.id: run
        for one in tries
        if (run := one_trial.read_predictions(shared.root, one.folder, one.seed)) is not None
    }
    entries = matrix.matrix_entries(read, runs)
    assert [entry.metric for entry in entries] == ["macro_auroc"] * 2
    assert all(entry.n_seeds == 2 and entry.low is not None for entry in entries)
    out = per_label.label_blocks("task", entries, read, runs)
    assert [line[0] for line in out[-1].rows] == ["a", "b"]


@pytest.mark.slow
def test_kept_features_follow_which_column_is_which_label(world, tmp_path):
    """The rows' labels are kept beside their features: other labels, or another order of them, are
    other rows.
    """
    _, paths, job_with = world
    found = {}
    for names in (["a", "b", "rare"], ["b", "a", "rare"]):
        job = job_with(multilabel={"labels": names})
        shared = shared_of(tmp_path, job, paths)
        shared.source_keys["src"] = "key"
        one = trial_of(job, shared, "linear_probe")
        [record] = cached_heads.run([one], shared)
        run = one_trial.read_predictions(shared.root, one.folder, 0)
        assert run is not None and run.labels == tuple(names)
        found[names[0]] = (
            dict(zip(names, run.predictions["labels"].T.tolist(), strict=True)),
            record.status,
        )
    assert found["a"] == found["b"] and found["a"][0]["a"] != found["a"][0]["b"]


def test_mixed_images_are_not_trained_from_cached_features(world):
    folder, paths, job_with = world
    plain, mixing = job_with(classification={}), job_with(classification={"mixup": 0.4})
    assert cached_heads.can_stack(
        [trial_of(plain, shared_of(folder, plain, paths))], shared_of(folder, plain, paths)
    )
    shared = shared_of(folder, mixing, paths, root="mixing")
    one = trial_of(mixing, shared)
    assert not cached_heads.can_stack([one], shared)
    assert one_trial.run(one, shared).status == "done"


def test_test_rows_must_have_the_positives_that_were_asked_for(world, tmp_path):
    """30 test rows, 20 of them with "a": one is left out after the job was checked. Search trials
    read no test rows; validation has no such label either.
    """
    _, paths, job_with = world
    job = job_with(multilabel={"min_positives": 20})
    shared = shared_of(tmp_path, job, paths)
    assert one_trial.run(trial_of(job, shared, stage="search"), shared).status == "done"
    data = next(iter(shared.targets.values()))
    with_a = np.flatnonzero(data.test.arrays["labels"][:, 0])
    data.test = data.test.subset(np.setdiff1d(np.arange(30), with_a[:1]))
    with pytest.raises(
        ValueError,
        match=r"none of 3 labels has 20 .* among these 29 rows \(at most 19 positive\)",
    ):
        one_trial.run(trial_of(job, shared), shared)


def test_too_few_positives_and_rows_a_class_of_no_class_are_told_before_anything_is_trained(world):
    _, _, job_with = world
    job = job_with(multilabel={"min_positives": 20})
    targets.plan_target(job, "task")
    job = job_with(multilabel={"min_positives": 21})
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data, test split: none of 3 labels has 21 positive rows .* these "
        r"30 \(at most 20 positive\)",
    ):
        targets.plan_target(job, "task")
    spec = job_with(multilabel={}).model_dump(mode="json")
    spec["targets"]["task"]["label_fractions"] = [5]
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.label_fractions: 5 means 5 rows a class, and a row of multilabel "
        r"has no single class",
    ):
        targets.plan_target(Job.model_validate(spec), "task")


# ---------------------------------------------------------------- boxes


def detections(seed: int, lost: float) -> RunPredictions:
    """Predictions of boxes of which about a share is lost, on the same 60 images for all seeds."""
    found = case(3, images=60)
    gone = np.random.default_rng([seed, int(100 * lost)]).random(found["classes"].shape) < lost
    found["classes"] = np.where(gone, -1, found["classes"])
    zeros = {"loss": np.zeros(60), "count": np.ones(60)}
    return RunPredictions(np.arange(60), {**found, **zeros}, seed, labels=("a", "b", "c", "d"))


def test_boxes_have_the_average_precision_of_each_class():
    made = {
        ("none", "scratch"): [detections(s, 0.8) for s in range(4)],
        ("src", "full"): [detections(s, 0.05) for s in range(4)],
    }
    heading, text, shown = said(*table("map", made))
    assert heading.text == "Average precision of each class" and "of src · full" in text.text
    assert shown.header == ["Class", "Test boxes", "AP", "AP, scratch", "Gain"]
    assert sorted(row[0] for row in shown.rows) == ["a", "b", "c", "d"]
    truth = made["src", "full"][0].predictions
    for name, count, *values, gain in shown.rows:
        kind = "abcd".index(name)
        is_real = (truth["true_classes"] == kind) & ~truth["true_crowd"]
        assert count == str(is_real.sum())
        means = [
            np.mean(
                [coco_ap.average_precision(coco_ap.of_class(run.predictions, kind)) for run in runs]
            )
            for runs in (made["src", "full"], made["none", "scratch"])
        ]
        places = len(values[0].lines[0].partition(".")[2])
        assert [value.lines[0] for value in values] == [f"{mean:.{places}f}" for mean in means]
        assert gain.lines[0] == f"{means[0] - means[1]:+.{places}f}"
    tones = {row[0]: row[4].tone for row in shown.rows}
    assert "wins" in tones.values() and set(tones.values()) <= {"wins", "not shown"}


def pixels(seed: int, right: float) -> RunPredictions:
    """Predictions of the class of 100 pixels in each of 60 images."""
    rng = np.random.default_rng([seed, int(100 * right)])
    actual = np.random.default_rng(5).multinomial(100, (0.6, 0.3, 0.1), size=60)
    inner = rng.binomial(actual, right)
    wrong = actual - inner
    predicted = inner + np.roll(wrong, 1, axis=1)
    found = {"intersection": inner, "predicted": predicted, "actual": actual}
    zeros = {"loss": np.zeros(60), "count": np.ones(60)}
    return RunPredictions(np.arange(60), {**found, **zeros}, seed, labels=("road", "sky", "car"))


def test_pixels_have_the_intersection_over_union_of_each_class():
    made = {
        ("none", "scratch"): [pixels(seed, 0.5) for seed in range(3)],
        ("src", "full"): [pixels(seed, 0.9) for seed in range(3)],
    }
    heading, text, shown = said(*table("miou", made))
    assert heading.text == "Intersection over union of each class" and "of src · full" in text.text
    assert shown.header == ["Class", "Test images", "IoU", "IoU, scratch", "Gain"]
    assert sorted(row[0] for row in shown.rows) == ["car", "road", "sky"]
    for name, count, *values, gain in shown.rows:
        column = ("road", "sky", "car").index(name)
        assert count == "60" and gain.tone == "wins"
        for value, runs in zip(values, (made["src", "full"], made["none", "scratch"]), strict=True):
            of_seeds = []
            for run in runs:
                sums = {
                    key: array.sum(0)[column]
                    for key, array in run.predictions.items()
                    if array.ndim > 1
                }
                union = sums["predicted"] + sums["actual"] - sums["intersection"]
                of_seeds.append(sums["intersection"] / union)
            places = len(value.lines[0].partition(".")[2])
            assert value.lines[0] == f"{np.mean(of_seeds):.{places}f}"


@pytest.mark.slow
def test_masks_have_the_average_precision_of_each_class():
    """Of masks, which the other network draws worse in the same boxes."""

    def run(seed: int, drawn: float) -> RunPredictions:
        made = detections(seed, 0.05)
        masked, *_ = with_masks(made.predictions)
        shared = (drawn * masked["mask_intersections"]).astype(np.int32)
        made.predictions.update({**masked, "mask_intersections": shared})
        return made

    made = {
        ("none", "scratch"): [run(s, 0.7) for s in (0, 1)],
        ("src", "full"): [run(s, 1.0) for s in (0, 1)],
    }
    _, text, shown = said(*table("mask_map", made))
    assert "each class's masks" in text.text and shown.header[1] == "Test objects"
    [ours, scratch] = [
        {
            name: np.mean(
                [
                    coco_ap.average_precision(coco_ap.of_class(r.predictions, k), masks=True)
                    for r in runs
                ]
            )
            for k, name in enumerate("abcd")
        }
        for runs in (made["src", "full"], made["none", "scratch"])
    ]
    for name, _, value, of_scratch, _ in shown.rows:
        places = len(value.lines[0].partition(".")[2])
        assert value.lines[0] == f"{ours[name]:.{places}f}"
        assert of_scratch.lines[0] == f"{scratch[name]:.{places}f}"
        assert ours[name] > scratch[name]


def numbers(seed: int, noise: float, n: int = 120) -> RunPredictions:
    """Predictions of a number whose errors are `noise`, in groups of two rows."""
    value = 50 + 10 * np.random.default_rng(3).normal(size=n)
    prediction = value + noise * np.random.default_rng(seed).normal(size=n)
    predictions = {"prediction": prediction, "value": value, "loss": np.zeros(n)}
    groups = np.arange(n) // 2
    return RunPredictions(np.arange(n), predictions, seed, groups, labels=("age & more",))


def test_numbers_are_drawn_by_their_predictions_in_bins_of_many_groups():
    made = {
        ("none", "scratch"): [numbers(s, 9.0) for s in (0, 1)],
        ("src", "full"): [numbers(s, 1.0) for s in (0, 1)],
    }
    heading, figure = said(*table("rmse", made))
    assert heading.text == "Predicted and true" and "age &amp; more" in figure.svg
    rows = figure.numbers.rows
    # 240 predictions; a bin has 20 groups of 2 rows of each of 2 seeds
    assert [row[3] for row in rows] == ["80"] * 6
    assert [row[0] for row in rows] == ["src · full · 100 %"] * 3 + ["scratch"] * 3
    best = np.concatenate([run.predictions["prediction"] for run in made["src", "full"]])
    truth = np.concatenate([run.predictions["value"] for run in made["src", "full"]])
    lowest = np.argsort(best, kind="stable")[:80]
    assert rows[0][1:3] == [f"{best[lowest].mean():.4g}", f"{truth[lowest].mean():.4g}"]


def test_numbers_beyond_all_numbers_are_left_out_of_the_drawing():
    """Ranks, and thus Spearman's correlation, know infinite predictions."""
    made = {
        ("none", "scratch"): [numbers(s, 9.0) for s in (0, 1)],
        ("src", "full"): [numbers(s, 1.0) for s in (0, 1)],
    }
    made["src", "full"][0].predictions["prediction"][:2] = -np.inf, np.inf
    _, figure = said(*table("spearman", made))
    assert sum(int(row[3]) for row in figure.numbers.rows) == 478


def test_few_numbers_are_not_drawn():
    made = {
        ("none", "scratch"): [numbers(0, 9.0, n=60)],
        ("src", "full"): [numbers(0, 1.0, n=60)],
    }
    assert said(*table("rmse", made)) == []
