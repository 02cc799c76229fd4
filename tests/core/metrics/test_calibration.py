"""Temperature and threshold in trials: from validation rows alone, in the bundle, and the same for
heads trained together.
"""

import dataclasses
import json

import numpy as np
import pytest
import sklearn.metrics as theirs
from toys import image_files, job_of, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.metrics import calibration
from pipeline.train.ranks import Ranks
from pipeline.transfer import cached_heads, targets
from pipeline.transfer import trial as one_trial
from pipeline.transfer.trial import AT_THRESHOLD

OF_TWO_CLASSES = [
    "accuracy",
    "macro_f1",
    "loss",
    "auroc",
    "auprc",
    "min_precision_sensitivity",
    "brier",
    "ece",
]
OPTIONS = {
    "classification": {
        "calibrate": "temperature",
        "threshold": "f1",
        "positive": "class 0",
        "class_weight": "balanced",
        "focal": 1.0,
    }
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return image_files(
        tmp_path_factory.mktemp("data"),
        {"train": 48, "validation": 40, "test": 44},
        classes=2,
        noise=0.55,
    )


@pytest.fixture(scope="module", params=["full", "linear_probe"])
def ran(request, paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    job = job_of(folder, paths, objective=OPTIONS, metric="auprc")
    shared = shared_of(folder, job, paths, keep_bundles=True)
    one = trial_of(job, shared, request.param)
    return shared, one, one_trial.run(one, shared)


def predicted(task, rows, shared):
    ready = one_trial.evaluate.device_preprocessing(rows)
    return one_trial.evaluate.predictions(
        task,
        one_trial.eval_batches(rows, 16),
        ready,
        Ranks(),
        one_trial.torch.no_grad(),
    )


def test_two_classes_have_clinical_metrics_with_intervals(ran):
    shared, one, record = ran
    rows = {row.metric: row for row in record.rows if row.split == "test"}
    run = one_trial.read_predictions(shared.root, one.folder, 0)
    p = run.predictions
    assert run.labels == ("class 1", "class 0") and next(iter(rows)) == "auprc"
    assert set(rows) == {*OF_TWO_CLASSES, *AT_THRESHOLD}
    chance = calibration.softmax(p["scores"])[:, 1]
    assert rows["auprc"].value == pytest.approx(
        theirs.average_precision_score(p["label"], chance), abs=1e-9
    )
    assert (
        rows["brier"].value == pytest.approx(theirs.brier_score_loss(p["label"], chance), abs=1e-9)
        and not rows["brier"].higher_is_better
    )
    threshold = record.rows[0].settings["threshold"]
    called = chance >= threshold
    assert rows["f1_at_threshold"].value == pytest.approx(theirs.f1_score(p["label"], called))
    assert rows["sensitivity_at_threshold"].value == pytest.approx(
        theirs.recall_score(p["label"], called)
    )
    assert rows["precision_at_threshold"].value == pytest.approx(
        theirs.precision_score(p["label"], called)
    )
    assert rows["specificity_at_threshold"].value == pytest.approx(
        theirs.recall_score(1 - p["label"], ~called)
    )
    assert all(
        row.value_low <= row.value <= row.value_high for name, row in rows.items() if name != "ece"
    )
    assert not set(AT_THRESHOLD) & {row.metric for row in record.rows if row.split == "validation"}
    json.dumps(record.to_json())


def test_they_are_those_of_the_validation_rows_and_stand_in_the_bundle(ran):
    shared, one, record = ran
    data = next(iter(shared.targets.values()))
    found = bundle.load(record.rows[0].bundle_uri)
    state = found.manifest.objective.state
    assert {name: record.rows[0].settings[name] for name in ("temperature", "threshold")} == {
        n: state[n] for n in ("temperature", "threshold")
    }
    assert "temperature" not in data.objective.state  # which other trials share
    task = found.task()
    fitted = task.objective.state
    task.objective.state = {
        name: value for name, value in fitted.items() if name not in ("temperature", "threshold")
    }
    held = predicted(task, data.validation, shared)
    assert (
        calibration.temperature(held["scores"], held["label"])
        == pytest.approx(fitted["temperature"], rel=1e-3)
        and fitted["temperature"] != 1
    )
    chance = calibration.softmax(held["scores"] / fitted["temperature"])[:, 1]
    assert calibration.best_threshold(chance, held["label"] == 1, "f1") == pytest.approx(
        fitted["threshold"], abs=1e-5
    )
    task.objective.state = fitted
    again, run = (
        predicted(task, data.test, shared),
        one_trial.read_predictions(shared.root, one.folder, 0),
    )
    assert again["scores"] == pytest.approx(run.predictions["scores"], abs=1e-4)


def test_the_test_rows_have_no_say(ran, paths, tmp_path):
    """With the test rows' labels turned round, temperature and threshold are what they were."""
    _, one, record = ran
    job = job_of(tmp_path, paths, objective=OPTIONS, metric="auprc")
    shared = shared_of(tmp_path, job, paths)
    data = next(iter(shared.targets.values()))
    data.test.arrays["label"] = 1 - data.test.arrays["label"]
    again = one_trial.run(trial_of(job, shared, one.technique.name), shared)
    a, b = (each.rows[0] for each in (record, again))
    assert [b.settings[name] for name in ("temperature", "threshold")] == [
        a.settings[name] for name in ("temperature", "threshold")
    ]
    assert a.value != b.value


def test_heads_together_are_calibrated_one_by_one(paths, tmp_path):
    job = job_of(tmp_path, paths, objective=OPTIONS)
    shared = shared_of(tmp_path, job, paths, root="together", keep_bundles=True)
    worlds = [shared, dataclasses.replace(shared, root=str(tmp_path / "alone"))]
    group = [
        trial_of(job, worlds[0], {"linear_probe": {"solver": "sgd"}}, {"lr": lr}, seed=seed)
        for lr, seed in ((0.001, 0), (0.1, 1))
    ]
    assert cached_heads.can_stack(group, worlds[0])
    together = {record.trial_id: record for record in cached_heads.run(group, worlds[0])}
    found = set()
    for one in group:
        alone = one_trial.run(one, worlds[1])
        for x, y in zip(together[one.id].rows, alone.rows, strict=True):
            assert x.metric == y.metric and x.value == pytest.approx(y.value, abs=1e-4)
        a, b = (record.rows[0] for record in (together[one.id], alone))
        for name in ("temperature", "threshold"):
            assert a.settings[name] == pytest.approx(b.settings[name], rel=1e-3)
            states = [bundle.load(row.bundle_uri).manifest.objective.state[name] for row in (a, b)]
            assert states == [a.settings[name], b.settings[name]]
        found.add(a.settings["temperature"])
    assert len(found) == 2


def test_a_search_trial_is_not_calibrated(paths, tmp_path):
    job = job_of(tmp_path, paths, objective=OPTIONS)
    shared = shared_of(tmp_path, job, paths)
    record = one_trial.run(trial_of(job, shared, "full", stage="search"), shared)
    assert "temperature" not in record.rows[0].hyper_parameters


def test_without_the_options_nothing_is_fitted(paths, tmp_path):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    record = one_trial.run(trial_of(job, shared), shared)
    tested = [row.metric for row in record.rows if row.split == "test"]
    assert tested == OF_TWO_CLASSES
    assert (
        registry.entries("metric").keys() >= set(tested)
        and "temperature" not in record.rows[0].settings
    )
    assert np.isfinite([row.value for row in record.rows]).all()


def test_metrics_of_classes_may_be_the_first_of_any_target_with_classes(paths, tmp_path):
    for name in ("kappa", "ece", "min_precision_sensitivity"):
        assert targets.plan_target(job_of(tmp_path, paths, metric=name), "task").spec.metric == name
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.metric: precision_at_threshold is not a metric of classification "
        r"\(accuracy, .*, ece\)",
    ):
        targets.plan_target(job_of(tmp_path, paths, metric="precision_at_threshold"), "task")
