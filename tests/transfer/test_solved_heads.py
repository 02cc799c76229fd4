"""A head on frozen features is the solution of its convex problem, as scikit-learn finds it."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pydantic
import pytest
import torch
from contract_rows import MODALITIES, classified
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn import functional as F
from toys import image_splits, job_of, net_task, shared_of, take, trial_of

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Task
from pipeline.objectives.multilabel import Multilabel
from pipeline.objectives.regression import Regression
from pipeline.techniques.linear_probe import PENALTIES, LinearProbe, ProbeOptions
from pipeline.transfer import cached_heads, solved_heads
from pipeline.transfer import trial as one_trial

N, D = 300, 16
PLAIN = Regression.options_class(norm=False)


def features(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator) * torch.linspace(0.2, 3, D)


def labels(found: torch.Tensor, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    scores = found @ torch.randn(D, classes, generator=generator)
    return scores + 2 * torch.randn(N, classes, generator=generator)


def solve(head, tensors, penalties, validate=lambda head: {"accuracy": 0.0}):
    return solved_heads.solve(head, features(), tensors, penalties, validate, lambda: None)


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_classes_are_multinomial_logistic_regression(penalty):
    """scikit-learn's C is 1 / (penalty x rows)."""
    label = labels(features(), 3).argmax(1)
    found = solve(net_task(classes=3).objective, {"label": label}, [penalty])[0]
    inputs = F.layer_norm(features(), (D,)).double().numpy()
    theirs = LogisticRegression(C=1 / (penalty * N), tol=1e-12, max_iter=100_000)
    theirs.fit(inputs, label.numpy())
    head = found.head.head
    assert np.abs(head.weight.detach().numpy() - theirs.coef_).max() < 1e-4
    ours = F.softmax(head(F.layer_norm(features(), (D,))), 1).detach().numpy()
    assert np.abs(ours - theirs.predict_proba(inputs)).max() < 1e-4


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_labels_are_one_logistic_regression_each(penalty):
    """The loss is a mean over L labels, and each label has the whole penalty all the same."""
    table = (labels(features(), 4) > 0).to(torch.uint8)
    backbone = net_task().backbone
    state = {"labels": list("abcd"), "separator": "|", "positives": [1] * 4, "rows": N}
    head = Multilabel(backbone, Multilabel.options_class(), state)
    found = solve(head, {"labels": table}, [penalty])[0]
    inputs = F.layer_norm(features(), (D,)).double().numpy()
    for k in range(4):
        theirs = LogisticRegression(C=1 / (penalty * N), tol=1e-12, max_iter=100_000)
        theirs.fit(inputs, table[:, k].numpy())
        own = found.head.head
        assert np.abs(own.weight[k].detach().numpy() - theirs.coef_[0]).max() < 1e-4
        assert abs(float(own.bias[k].detach()) - theirs.intercept_[0]) < 1e-4


@pytest.mark.parametrize("kind", MODALITIES)
@pytest.mark.parametrize("penalty", [1.0, 1e-3, 1e-6])
def test_a_squared_error_is_ridge_regression(kind, penalty):
    """Of the features of every modality, often more than rows; in units of the deviation."""
    task, rows = classified(MODALITIES[kind][1])
    with torch.no_grad():
        pooled = task.eval().backbone(take(rows, range(8))).pooled
    value = torch.linspace(-3, 4, 8).square()
    state = {"mean": float(value.mean()), "std": float(value.std())}
    head = Regression(task.backbone, PLAIN, state)
    scaled = (value.double() - state["mean"]) / state["std"]
    found = solved_heads.solve(
        head, pooled, {"value": scaled}, [penalty], lambda head: {}, lambda: None
    )[0]
    theirs = Ridge(alpha=penalty * 8 / 2, solver="svd").fit(pooled.double(), scaled)
    own = found.head.head
    assert np.abs(own.weight.detach().numpy()[0] - theirs.coef_).max() < 1e-6
    assert abs(float(own.bias.detach()) - theirs.intercept_) < 1e-6
    assert found.solver == "ridge" and found.iterations == 1


def test_ridge_regression_on_many_rows():
    backbone = net_task().backbone
    value = labels(features(), 1)[:, 0].double()
    head = Regression(backbone, PLAIN, {"mean": 1.0, "std": 2.0})
    before = head.head.weight.detach().clone()
    found = solve(head, {"value": value}, [10.0, 1e-2, 1e-6])
    assert torch.equal(head.head.weight, before)
    for one in found:
        theirs = Ridge(alpha=one.penalty * N / 2, solver="svd")
        theirs.fit(features().double(), value)
        assert np.abs(one.head.head.weight.detach().numpy()[0] - theirs.coef_).max() < 1e-6
        assert abs(float(one.head.head.bias.detach()) - theirs.intercept_) < 1e-6


def test_a_large_head_of_a_squared_error_is_solved_by_steps(monkeypatch):
    monkeypatch.setattr(solved_heads, "MAX_WEIGHTS", D)
    value = labels(features(), 1)[:, 0]
    head = Regression(net_task().backbone, PLAIN, {"mean": 0.0, "std": 1.0})
    found = solve(head, {"value": value}, [1e-2])[0]
    theirs = Ridge(alpha=1e-2 * N / 2).fit(features().double(), value.double())
    assert found.solver == "lbfgs"
    assert np.abs(found.head.head.weight.detach().numpy()[0] - theirs.coef_).max() < 1e-5


class LineHead(torch.nn.Module):
    """A linear head with a loss of its residuals, and a parameter that the loss does not read."""

    registered_name = "line"

    def __init__(self, loss):
        super().__init__()
        self.head, self.loss = torch.nn.Linear(D, 1), loss
        self.unread = torch.nn.Parameter(torch.ones(2))

    def head_loss(self, pooled, rows):
        residuals = self.head(pooled)[:, 0] - rows["value"].to(pooled.dtype)
        return self.loss(residuals, torch.zeros_like(residuals)), torch.tensor(float(N)), {}


def huber(residuals: np.ndarray) -> np.ndarray:
    sizes = np.abs(residuals)
    return np.where(sizes < 1, residuals**2 / 2, sizes - 0.5)


@pytest.mark.parametrize("shift", [200.0, 0.0])
def test_a_robust_loss_is_no_ridge_regression(shift):
    """Its gradient is constant far from the rows' values, so that it looks linear there."""
    found = features().double()
    value = found @ torch.linspace(-1, 1, D).double() + shift + labels(features(), 1)[:, 0] / 20
    loss = partial(F.smooth_l1_loss, reduction="sum")
    solved = solve(LineHead(loss), {"value": value}, [1e-3])[0]

    def objective(weights):
        residuals = found.numpy() @ weights[:-1] + weights[-1] - value.numpy()
        return huber(residuals).mean() + 1e-3 / 2 * (weights[:-1] ** 2).sum()

    theirs = minimize(objective, np.append(np.linspace(-1, 1, D), shift), tol=1e-12)
    assert solved.solver == "lbfgs"
    weight = solved.head.head.weight.detach().numpy()[0]
    assert np.abs(weight - theirs.x[:-1]).max() < 1e-3
    assert abs(float(solved.head.head.bias.detach()) - theirs.x[-1]) < 1e-3


def test_a_parameter_that_the_loss_does_not_read_is_left_alone():
    value = labels(features(), 1)[:, 0]
    loss = partial(F.mse_loss, reduction="sum")
    solved = solve(LineHead(loss), {"value": value}, [1e-2])[0]
    theirs = Ridge(alpha=1e-2 * N / 2).fit(features().double(), value.double())
    assert np.abs(solved.head.head.weight.detach().numpy()[0] - theirs.coef_).max() < 1e-5
    assert solved.head.unread.tolist() == [1.0, 1.0]


def test_the_start_does_not_matter_and_is_left_alone():
    label = labels(features(), 3).argmax(1)
    heads = [net_task(seed, classes=3).objective for seed in (0, 1)]
    before = heads[0].head.weight.detach().clone()
    first, other = (solve(head, {"label": label}, [1e-2])[0] for head in heads)
    torch.testing.assert_close(first.head.head.weight, other.head.head.weight, atol=1e-4, rtol=0)
    assert torch.equal(heads[0].head.weight, before)


def test_penalties_go_from_strong_to_weak_and_the_best_on_validation_is_taken():
    label = labels(features(), 3).argmax(1)
    scores = {1.0: 0.5, 0.1: 0.9, 0.01: 0.9, 0.001: math.nan}
    losses = {1.0: 0.1, 0.1: 0.4, 0.01: 0.3, 0.001: 0.1}
    given = iter(sorted(scores, reverse=True))

    def validate(head):
        penalty = next(given)
        return {"accuracy": scores[penalty], "loss": losses[penalty]}

    found = solve(net_task(classes=3).objective, {"label": label}, list(scores), validate)
    assert [one.penalty for one in found] == [1.0, 0.1, 0.01, 0.001]
    lengths = [float(one.head.head.weight.detach().norm()) for one in found]
    assert lengths == sorted(lengths)
    assert solved_heads.best(found, "accuracy").penalty == 0.01
    assert solved_heads.best(found, "loss").penalty == 1.0


def test_a_loss_that_is_not_finite_is_an_error():
    label = labels(features(), 3).argmax(1)
    broken = features()
    broken[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss of the head is nan at penalty 0\.1"):
        solved_heads.solve(
            net_task(classes=3).objective,
            broken,
            {"label": label},
            [0.1],
            lambda head: {},
            lambda: None,
        )


# ---------------------------------------------------------------- trials


paths = image_splits(64, 30, 36)


def test_a_probe_needs_no_learning_rate(paths, tmp_path, monkeypatch):
    penalties = (1.0, 0.1)
    monkeypatch.setattr("pipeline.techniques.linear_probe.PENALTIES", penalties)
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    group = [trial_of(job, shared, "linear_probe", {"lr": lr}) for lr in (1e-6, 1.0)]
    slow, fast = cached_heads.run(group, shared)
    assert slow.status == fast.status == "done", slow.error
    assert [row.value for row in slow.rows] == [row.value for row in fast.rows]
    settings = slow.rows[0].settings
    assert settings["solver"] == "lbfgs" and settings["penalty"] in penalties
    assert settings["lr"] is None and settings["optimizer"] is None
    assert settings["steps"] is None and settings["iterations"] == slow.rows[0].steps
    row = slow.rows[0]
    assert row.layers_trained == "head" and row.steps > 0 and slow.kept_step == row.steps
    kept = bundle.load(row.bundle_uri)
    source = shared.weights["src"]
    assert all(np.array_equal(source[n], t.numpy()) for n, t in kept.backbone_tensors().items())


def test_the_trial_s_head_is_scikit_learn_s(paths, tmp_path):
    """Of its own rows alone, at a label fraction; the test row's scores follow from it."""
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    one = trial_of(job, shared, {"linear_probe": {"penalty": 0.01}}, fraction=0.5)
    (record,) = cached_heads.run([one], shared)
    data = shared.targets["task", one.backbone_key]
    task = one_trial.build_task(one, shared)[0]
    _, rows, _ = one_trial.resolve_training(one, shared)
    pooled, rest = cached_heads.features(task.backbone, rows, torch.device("cpu"))
    assert len(pooled) == record.rows[0].n_train < 40
    inputs = F.layer_norm(pooled, pooled.shape[1:]).double().numpy()
    theirs = LogisticRegression(C=1 / (0.01 * len(pooled)), tol=1e-12, max_iter=100_000)
    theirs.fit(inputs, rest["label"].numpy())
    found = bundle.load(record.rows[0].bundle_uri).task()
    assert np.abs(found.objective.head.weight.detach().numpy() - theirs.coef_).max() < 1e-4
    tested, truth = cached_heads.features(task.backbone, data.test, torch.device("cpu"))
    accuracy = theirs.score(
        F.layer_norm(tested, tested.shape[1:]).double().numpy(), truth["label"].numpy()
    )
    row = next(r for r in record.rows if r.split == "test" and r.metric == "accuracy")
    assert row.value == pytest.approx(accuracy)
    assert isinstance(found, Task) and row.settings["penalty"] == 0.01


def test_random_features_are_solved_too(paths, tmp_path):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    technique = {"random_probe": {"penalty": 0.01}}
    records = cached_heads.run([trial_of(job, shared, technique, seed=1, stage="search")], shared)
    assert records[0].status == "done" and records[0].rows[0].settings["solver"] == "lbfgs"
    assert {row.split for row in records[0].rows} == {"validation"}


def test_heads_with_dropout_train_by_steps(paths, tmp_path):
    job = job_of(tmp_path, paths, objective={"classification": {"dropout": 0.5}})
    shared = shared_of(tmp_path, job, paths)
    (record,) = cached_heads.run([trial_of(job, shared, "linear_probe", stage="search")], shared)
    assert record.rows[0].steps == 12 and "solver" not in record.rows[0].settings


def test_options_say_how_the_head_is_found():
    assert LinearProbe().penalties() == PENALTIES
    assert LinearProbe(ProbeOptions(penalty=0.1)).penalties() == (0.1,)
    for options in ({"solver": "sgd"}, {"lr_scale": 100.0}):
        assert LinearProbe(ProbeOptions(**options)).penalties() == ()
    assert LinearProbe(ProbeOptions(lr_scale=100.0)).phases(5)[0].lr_scale == 100.0
    for options in ({"solver": "lbfgs", "lr_scale": 2.0}, {"solver": "sgd", "penalty": 1.0}):
        with pytest.raises(pydantic.ValidationError, match="is for solver"):
            ProbeOptions(**options)
