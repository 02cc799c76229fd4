"""The source's network tried as it is, its head carried over, and scratch with a larger budget."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_runs import prepared, primary, without_ray
from toys import image_splits, job_of, shared_of, trial_of
from transfer.test_stages import Silent

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.core.specs import ObjectiveSpec
from pipeline.objectives.classification import Classification
from pipeline.objectives.clip import CLIP, CLIPOptions
from pipeline.report import matrix
from pipeline.techniques.zero_shot import ZeroShotOptions
from pipeline.transfer import dry_run, grid, stages, targets, trial

SAMPLES = Path(__file__).parents[2] / "jobs" / "data"


paths = image_splits(30, 12, 12)


class KeepsHead(Classification):
    """Starts with its source's head, tensor by tensor."""

    def is_transferable(self, options, name):
        return True

    @classmethod
    def unseen_inputs(cls, source_inputs, target_inputs):
        return ""


class RollsOut(Classification):
    """Has further metrics of test rows."""

    raw_roles = ("label",)

    @classmethod
    def rollout_metrics(cls, options, state):
        return ("answer_f1", "exact_match")

    def rollout_evaluation(self, backbone, predictions, raw_rows):
        rows = predictions["row"]
        exact = (rows == rows).astype(float) * len(raw_rows.table) / 12
        return {**predictions, "f1": np.full(len(rows), 0.25), "exact": exact}, None


@pytest.fixture
def carried(monkeypatch):
    monkeypatch.setattr("pipeline.objectives.classification.Classification", KeepsHead)


def world(tmp_path, paths, **change):
    job = job_of(tmp_path, paths)
    job = job.model_validate({**job.model_dump(mode="json"), **change})
    return job, shared_of(tmp_path, job, paths, keep_bundles=True)


def test_zero_shot_is_the_source_itself(tmp_path, paths, carried):
    job, shared = world(tmp_path, paths)
    one = trial_of(job, shared, "zero_shot", fraction=0)
    record = trial.run(one, shared)
    row = next(r for r in record.rows if r.split == "test")
    assert (row.steps, row.n_train, row.params_trained, row.label_fraction) == (0, 0, 0, "0/class")
    kept = bundle.load(row.bundle_uri)
    assert all(
        torch.equal(kept.tensors[f"backbone.{name}"], torch.from_numpy(array))
        for name, array in shared.weights["src"].items()
    )
    assert all(
        torch.equal(kept.tensors[f"objective.{name}"], torch.from_numpy(array))
        for name, array in shared.heads["src"][1].items()
    )
    assert "head: 2 tensors kept, 0 new, 0 dropped" in record.transfer and [
        point.step for point in record.curve
    ] == [0]


def test_zero_shot_is_tried_once_whatever_the_labels_and_seeds(tmp_path, paths, carried):
    job, shared = world(tmp_path, paths, techniques=["scratch", "full", "zero_shot"])
    job = job.model_copy(
        update={
            "targets": {
                "task": job.targets["task"].model_copy(update={"label_fractions": [0.5, 1.0]})
            }
        }
    )
    found = grid.planned_entries(job, "task", list(shared.backbone_groups.values()), {"src"})
    assert [(source, component.name, fraction) for _, source, component, fraction in found] == [
        ("none", "scratch", 0.5),
        ("src", "full", 0.5),
        ("none", "scratch", 1.0),
        ("src", "full", 1.0),
        ("src", "zero_shot", 0),
    ]


def test_a_head_is_carried_by_name_and_shape_alone(tmp_path, paths, carried):
    job, shared = world(tmp_path, paths)
    theirs, head = shared.heads["src"]
    start, moved, _ = trial.build_task(trial_of(job, shared, "full"), shared)
    assert "head: 2 tensors kept" in moved and torch.equal(
        start.objective.state_dict()["head.weight"], torch.from_numpy(head["head.weight"])
    )
    fresh = trial.build_task(trial_of(job, shared, "scratch"), shared)[0].objective.state_dict()[
        "head.bias"
    ]
    shared.heads["src"] = (
        theirs,
        {
            "head.weight": head["head.weight"],
            "head.bias": np.zeros(7, np.float32),
            "old": np.zeros(1, np.float32),
        },
    )
    start, moved, _ = trial.build_task(trial_of(job, shared, "full"), shared)
    assert "head: 1 tensors kept, 1 new (head.bias), 2 dropped (head.bias, old)" in moved
    assert torch.equal(start.objective.state_dict()["head.bias"], fresh)
    shared.heads["src"] = (ObjectiveSpec("multilabel"), head)
    assert (
        "new head: the source's objective was multilabel"
        in trial.build_task(trial_of(job, shared, "full"), shared)[1]
    )
    with pytest.raises(
        ValueError,
        match=r"zero_shot: nothing of the head of source src fits this target \(new head: the "
        r"source's objective was multilabel\)",
    ):
        trial.build_task(trial_of(job, shared, "zero_shot", fraction=0), shared)


def test_heads_are_new_where_the_objective_carries_none(tmp_path, paths):
    job, shared = world(tmp_path, paths)
    start, moved, _ = trial.build_task(trial_of(job, shared, "full"), shared)
    theirs = torch.from_numpy(shared.heads["src"][1]["head.weight"])
    assert moved.endswith("; new head") and not torch.equal(
        start.objective.state_dict()["head.weight"], theirs
    )


def test_zero_shot_needs_a_head_that_is_carried(tmp_path, paths, monkeypatch):
    monkeypatch.delattr(Classification, "head_options")
    job = job_of(tmp_path, paths)
    job = job.model_validate(
        {**job.model_dump(mode="json"), "techniques": ["scratch", "zero_shot"]}
    )
    with pytest.raises(
        ValueError,
        match=r"techniques: zero_shot tries the source's own head, and classification starts with "
        r"a new one: leave it out",
    ):
        shared_of(tmp_path, job, paths)


def test_texts_about_the_classes_are_the_head_of_a_source_with_captions(tmp_path, paths):
    job, shared = world(tmp_path, paths)
    options = CLIPOptions(width=16, layers=1, heads=2)
    captions = pa.table({"caption": [f"a photo of class {number}" for number in range(3)]})
    state = CLIP.fit(options, captions, {"caption": "caption"})
    spec = ObjectiveSpec("clip", options.model_dump(), state)
    theirs = bundle.build_task(next(iter(shared.targets.values())).arch, spec, seed=5).objective
    shared.heads["src"] = (spec, {name: t.numpy() for name, t in theirs.state_dict().items()})
    for technique, prompt in (
        ("zero_shot", "a photo of a {}"),
        ({"zero_shot": {"prompt": "{}, in grey"}}, "{}, in grey"),
    ):
        one = trial_of(job, shared, technique, fraction=0)
        start, moved, _ = trial.build_task(one, shared)
        texts = [prompt.replace("{}", f"class {number}") for number in range(3)]
        assert moved.endswith(f"; head: 3 classes by texts such as {texts[0]!r}")
        head = start.objective.state_dict()
        torch.testing.assert_close(head["head.weight"], theirs.head_of_texts(texts))
        assert not head["head.bias"].any()
    assert trial.build_task(trial_of(job, shared, "full"), shared)[1].endswith("; new head")


def test_a_prompt_has_one_place_for_the_name():
    for prompt in ("a photo", "{} or {}", "{name}"):
        with pytest.raises(ValueError, match="prompt"):
            ZeroShotOptions(prompt=prompt)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_texts_name_pictures_of_which_only_captions_were_seen(tmp_path, monkeypatch):
    """Ten kinds of garments, of which 0.768 were named right (2026-12-01); chance is 0.1."""
    table = pq.read_table(SAMPLES / "fashion_mnist_6000.parquet")
    table = table.take(np.random.default_rng(0).permutation(len(table)))
    templates = ("a photo of a {}", "the {} of a shop", "{}, in grey", "one {}")
    captions = [
        templates[row % 4].format(name) for row, name in enumerate(table["label_name"].to_pylist())
    ]
    table = table.append_column("caption", pa.array(captions))
    paths = {}
    for name, start, stop in (("seen", 0, 5000), ("train", 5000, 5200), ("test", 5200, 5700)):
        paths[name] = str(tmp_path / f"{name}.parquet")
        pq.write_table(table[start:stop], paths[name])
    job = Job.model_validate(
        {
            "name": "captions",
            "storage": str(tmp_path / "runs"),
            "sources": {
                "captions": {
                    "data": {
                        "train": paths.pop("seen"),
                        "modality": {"image": {"size": 32, "channels": 1}},
                        "columns": {"image": "image", "caption": "caption"},
                    },
                    "backbone": "timm/test_resnet",
                    "objective": {"clip": {"width": 64, "layers": 2, "heads": 2, "length": 12}},
                    "train": {"steps": 120, "global_batch": 64, "lr": 3e-3},
                }
            },
            "targets": {
                "garments": {
                    "data": {
                        **paths,
                        "modality": "image",
                        "columns": {"image": "image", "label": "label", "label_name": "label_name"},
                    },
                    "objective": "classification",
                    "label_fractions": [1],
                    "train": {"steps": 1},
                }
            },
            "techniques": ["zero_shot"],
            "fanout": {"seeds": 1},
        }
    )
    without_ray(monkeypatch)
    state = prepared(job)
    stages.pretrain(state)
    found = stages.finetune(state, stages.prepare_shared(state))
    (row,) = primary(stages.collect(state, found), technique="zero_shot")
    print(f"accuracy {row.value:.3f} on {row.n_eval} pictures")
    assert row.value > 0.6


def test_scratch_with_a_larger_budget_stands_beside_plain_scratch(tmp_path, paths):
    job, shared = world(tmp_path, paths, techniques=[{"scratch": {"budget": 2.5}}, "full"])
    assert [str(component) for component in grid.techniques(job, job.targets["task"])] == [
        "scratch",
        'scratch{"budget": 2.5}',
        "full",
    ]
    records = [
        trial.run(trial_of(job, shared, component), shared)
        for component in ("scratch", {"scratch": {"budget": 2.5}}, "full")
    ]
    assert [record.rows[0].steps for record in records] == [12, 30, 12]
    rows = [row for record in records for row in record.rows]
    table = {
        (entry.source, entry.technique): entry.verdict for entry in matrix.matrix_entries(rows, {})
    }
    assert (
        table.keys() == {("none", "scratch"), ("none", "scratch (budget 2.5)"), ("src", "full")}
        and table["none", "scratch"] == matrix.REFERENCE
    )
    assert matrix.REFERENCE not in (table["src", "full"], table["none", "scratch (budget 2.5)"])


def test_metrics_of_test_rows_alone_come_first_and_are_not_asked_of_validation_rows(
    tmp_path, paths, monkeypatch
):
    monkeypatch.setattr("pipeline.objectives.classification.Classification", RollsOut)
    job, shared = world(tmp_path, paths)
    record = trial.run(trial_of(job, shared, "full"), shared)
    by_split = {
        split: [row.metric for row in record.rows if row.split == split]
        for split in ("test", "validation")
    }
    assert (
        by_split["test"][:3] == ["answer_f1", "exact_match", "accuracy"]
        and by_split["validation"][0] == "accuracy"
    )
    assert {row.metric: row.value for row in record.rows if row.split == "test"}[
        "exact_match"
    ] == 1.0
    assert not {"answer_f1", "exact_match"} & set(by_split["validation"])
    data = next(iter(shared.targets.values()))
    data.spec = data.spec.model_copy(update={"metric": "exact_match"})
    assert data.test_metrics == ("exact_match", "answer_f1") and data.metrics[0] == "accuracy"
    data.spec = data.spec.model_copy(update={"metric": "macro_f1"})
    assert (
        data.metrics[0] == "macro_f1"
        and next(iter(trial.compute_test_metrics(data, {**_read(shared, record)}))) == "macro_f1"
    )


def _read(shared, record):
    return trial.read_predictions(shared.root, record.rows[0].folder, 0).predictions


def test_a_target_s_rows_may_complete_what_a_source_fitted(tmp_path, paths, monkeypatch):
    from pipeline.modalities.image import Image

    seen = []
    monkeypatch.setattr(
        Image,
        "extend_state",
        lambda self, table, columns: (
            seen.append((len(table), columns)) or {**self.state, "mean": [0.25] * 3}
        ),
        raising=False,
    )
    monkeypatch.setattr(Image, "fit_roles", ("image",), raising=False)
    monkeypatch.setattr(Image, "strata", (), raising=False)
    _, shared = world(tmp_path, paths)
    data = next(iter(shared.targets.values()))
    assert (
        data.modality.state["mean"] == [0.25] * 3
        and data.train.modality.state["mean"] == [0.25] * 3
    )
    assert (
        next(iter(shared.backbone_groups.values())).modality.state["mean"] == [0.5] * 3
        and seen[0][0] == 30
        and seen[0][1]["image"] == "picture"
    )


def test_weights_of_a_bundle_come_with_its_head(tmp_path, paths):
    _, shared = world(tmp_path, paths)
    data = next(iter(shared.targets.values()))
    task = bundle.build_task(data.arch, data.objective, seed=3)
    bundle.save(str(tmp_path / "b"), task, data.modality)
    backbone, head, manifest = targets.load_weights(str(tmp_path / "b"))
    assert set(backbone) == set(task.backbone.state_dict()) and set(head) == set(
        task.objective.state_dict()
    )
    assert manifest.objective.name == "classification"


def test_a_dry_run_counts_the_steps_of_a_budget(tmp_path, paths):
    job = job_of(tmp_path, paths)
    spec = {
        **job.model_dump(mode="json"),
        "techniques": ["scratch", {"scratch": {"budget": 5}}, "full"],
    }
    spec["sources"]["src"]["train"] = {"steps": 1, "global_batch": 16}
    job = Job.model_validate(spec)
    lines = dry_run.describe(stages.check(job, Silent()))
    assert any(
        "of 12 steps (techniques with their own number of steps: 60) on 30 rows" in line
        for line in lines
    )
    assert f"in all: {3 * job.fanout.seeds} trials, {84 * job.fanout.seeds} steps" in lines[-1]
