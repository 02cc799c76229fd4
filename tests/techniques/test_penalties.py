"""Penalties are what their papers say, in value and gradient, for every modality."""

import copy
import math

import numpy as np
import pytest
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from torch import nn
from torch.nn import functional as F
from toys import (
    furthest,
    image_rows,
    image_splits,
    job_of,
    kill_at,
    label_state,
    make_run,
    net_task,
    shared_of,
    take,
    task_of,
    trial_of,
    weights,
)

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Task, Technique
from pipeline.core.latest_call import LatestCall
from pipeline.core.specs import NO_OBJECTIVE, ObjectiveSpec
from pipeline.data.stream import Rows
from pipeline.objectives.classification import Classification
from pipeline.techniques.bss import smallest_squares
from pipeline.techniques.distillation import divergence, feature_distance
from pipeline.train import loop
from pipeline.transfer import trial

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
EACH = pytest.mark.parametrize("kind", KINDS)
WITH_BATCH_NORMS = ["timm/resnet10t", "timm/test_efficientnet", "hf/patchtst"]
"""Plain norms, norms with an activation within, and norms of sequences."""


def with_batch_norms(name: str) -> tuple[Task, Rows]:
    """A task whose backbone has batch norms, and its rows."""
    if name == "hf/patchtst":
        return classified(name)
    task = task_of(name, {"channels": 3, "size": 32}, "classification", label_state(), seed=1)
    return task, image_rows(8, size=32, channels=3)


def technique(name: str, **options) -> Technique:
    kind = registry.get("technique", name)
    return kind(kind.options_class(**options))


def source_of(task: Task, labels: list[str], seed: int = 5) -> Task:
    """The task's backbone with a head for other labels, as a source."""
    backbone = copy.deepcopy(task.backbone)
    torch.manual_seed(seed)
    state = {"values": labels, "labels": labels}
    return Task(backbone, Classification(backbone, Classification.options_class(), state)).eval()


def moved(task: Task, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in task.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def gradients(task: Task) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in task.named_parameters()
    }


def penalised(used: Technique, task: Task, batch) -> torch.Tensor:
    """The penalty of a batch, after the loss has run as in the loop."""
    task(batch)
    found = used.penalty(task, batch, {})
    assert found is not None and found.shape == ()
    return found


# ---------------------------------------------------------------- gradients by finite differences


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    a.requires_grad_(True)
    check = torch.autograd.gradcheck
    assert check(lambda x: smallest_squares(x, 1), (a,))
    assert check(lambda x: smallest_squares(x, 3), (a,))
    assert check(lambda x: feature_distance(x, b), (a,))
    for is_one_class in (True, False):
        assert check(lambda x, one=is_one_class: divergence(x, b, 2.0, one), (a,))


@EACH
def test_l2_sp_pulls_to_the_source_with_the_paper_s_gradient(kind):
    """weight (w - w0) for the backbone, head_weight w for a new head; and by differences."""
    task, rows = classified(KINDS[kind])
    used = technique("l2_sp", weight=0.3, head_weight=0.2)
    start = weights(task)
    task = used.wrap(task)
    batch = take(rows, range(4))
    head = sum(p.square().sum() for p in task.objective.parameters())
    assert penalised(used, task, batch).item() == pytest.approx(
        0.1 * float(head.detach()), rel=1e-5
    )
    moved(task)
    value = used.penalty(task, batch, {})
    value.backward()
    found = gradients(task)
    for name, p in task.named_parameters():
        want = 0.2 * p if name.startswith("objective.") else 0.3 * (p - start[name])
        assert torch.allclose(found[name], want, atol=1e-6), name
    torch.manual_seed(1)
    way = [torch.randn_like(p) for p in task.parameters()]
    slope = sum((found[n] * w).sum() for n, w in zip(found, way, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w in zip(task.parameters(), way, strict=True):
                p.add_(sign * 0.1 * w)
            ends.append(float(used.penalty(task, batch, {})))
            for p, w in zip(task.parameters(), way, strict=True):
                p.sub_(sign * 0.1 * w)
    assert (ends[0] - ends[1]) / 0.2 == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize("name", ["behaviour_cloning", "verification"])
def test_what_is_taken_over_of_a_head_is_pulled_to_its_own_start(name):
    """What is new is pulled to zero: all of a head whose source had none, and new identities."""
    task = OBJECTIVES[name].build(name).task

    def penalty() -> float:
        used = technique("l2_sp", head_weight=1.0)
        used.wrap(task)
        return used.penalty(task, None, {}).item()

    head = dict(task.objective.named_parameters())
    squares = {name: p.detach().square().sum().item() / 2 for name, p in head.items()}
    assert penalty() == pytest.approx(sum(squares.values()), rel=1e-5)
    theirs = ObjectiveSpec(name, task.objective.options.model_dump())
    bundle.carry_tensors(task.objective, theirs, task.objective.state_dict())
    assert penalty() == pytest.approx(squares.get("identities", 0.0), rel=1e-5)


# ---------------------------------------------------------------- BSS


@EACH
@pytest.mark.parametrize("smallest", [1, 2])
def test_bss_is_the_sum_of_the_smallest_squares(kind, smallest):
    task, rows = classified(KINDS[kind])
    batch = take(rows, range(6))
    used = technique("bss", weight=0.5, smallest=smallest)
    task = used.wrap(task).eval()
    value = penalised(used, task, batch)
    with torch.no_grad():
        pooled = task.backbone(batch).pooled.double().numpy()
    squares = np.linalg.svd(pooled, compute_uv=False) ** 2
    assert value.item() == pytest.approx(
        0.5 * squares[-smallest:].sum(), rel=1e-3, abs=1e-6 * squares[0]
    )
    value.backward()
    found = gradients(task)
    assert any(found[name].any() for name in found if name.startswith("backbone."))
    assert not any(found[name].any() for name in found if name.startswith("objective."))
    used.finish(task)
    assert not task.backbone._forward_hooks


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_bss_of_features_that_are_not_finite_is_not_finite(wrong):
    features = torch.randn(4, 3)
    features[1, 1] = wrong
    assert not torch.isfinite(smallest_squares(features, 1))


# ---------------------------------------------------------------- StochNorm


@pytest.mark.parametrize("name", WITH_BATCH_NORMS)
def test_stoch_norm_without_chance_is_the_plain_norm(name):
    rows = with_batch_norms(name)[1]
    batch = take(rows, range(4))
    results = []
    for used in (technique("full"), technique("stoch_norm", p=0.0)):
        task = used.wrap(with_batch_norms(name)[0]).train()
        torch.manual_seed(0)
        total = task(batch)[0]
        total.backward()
        results.append((total, gradients(task), weights(used.finish(task))))
    assert torch.equal(results[0][0], results[1][0])
    assert furthest(results[0][1], results[1][1]) == 0.0
    assert furthest(results[0][2], results[1][2]) == 0.0


def test_stoch_norm_takes_statistics_channel_by_channel():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.normal_()
    inputs = torch.randn(4, 64, 3, 3)
    plain = copy.deepcopy(norm)
    running = copy.deepcopy(norm).eval()(inputs)  # of the batches before, as in the authors' code
    by_batch = plain(inputs)
    for p in (0.25, 1.0):
        mixed = copy.deepcopy(norm)
        used = technique("stoch_norm", p=p)
        task = net_task()
        task.backbone.norm = mixed
        used.wrap(task)
        out = mixed(inputs)
        is_running = (out == running).all((0, 2, 3))
        is_batch = (out == by_batch).all((0, 2, 3))
        assert (is_running ^ is_batch).all()
        assert abs(float(is_running.float().mean()) - p) < 0.15
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(mixed, buffer), getattr(plain, buffer))
        assert torch.equal(mixed.eval()(inputs), plain.eval()(inputs))
        plain.train()


@pytest.mark.parametrize("name", WITH_BATCH_NORMS)
def test_stoch_norm_trains_and_leaves_plain_norms(name):
    task, rows = with_batch_norms(name)
    before = list(task.state_dict())
    used = technique("stoch_norm")
    run = make_run(rows, used.wrap(task), steps=3, technique=used, global_batch=4, lr=1e-3)
    loop.fit(run)
    ended = used.finish(run.task)
    assert list(ended.state_dict()) == before and used.norms
    assert all("forward" not in vars(one) for one in ended.modules())


def test_stoch_norm_without_batch_norms_is_refused():
    with pytest.raises(ValueError, match="stoch_norm changes batch norms, and toys/net has none"):
        technique("stoch_norm").wrap(net_task())
    with pytest.raises(ValueError, match="with frozen statistics there is nothing to mix"):
        technique("stoch_norm", freeze_norm_stats=True)


# ---------------------------------------------------------------- distillation


@EACH
def test_the_same_network_has_nothing_to_learn_from_itself(kind):
    task, rows = classified(KINDS[kind])
    batch = take(rows, range(4))
    used = technique("distillation", features=1.0, logits=1.0)
    used.read_source(copy.deepcopy(task))
    task = used.wrap(task).eval()
    assert penalised(used, task, batch).item() == pytest.approx(0.0, abs=1e-6)
    moved(task)
    value = penalised(used, task, batch)
    assert value.item() > 1e-4
    value.backward()
    assert any(gradients(task)[n].any() for n in gradients(task) if n.startswith("backbone."))
    assert all(p.grad is None for p in used.teacher.parameters())


def test_scores_are_matched_by_the_names_of_labels():
    """A source that knows more labels, in another order, and otherwise says the same."""
    task = net_task()
    batch = take(image_rows(8), range(8))
    source = source_of(task, ["other", "class 2", "class 0", "class 1"])
    head, old = task.objective.head, source.objective.head
    with torch.no_grad():
        for place, row in ((1, 2), (2, 0), (3, 1)):
            old.weight[place], old.bias[place] = head.weight[row], head.bias[row]
    used = technique("distillation", features=0.0, logits=1.0)
    used.read_source(source)
    task = used.wrap(task).eval()
    assert penalised(used, task, batch).item() == pytest.approx(0.0, abs=1e-6)


def test_divergences_are_those_of_torch():
    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    want = 9 * F.kl_div(
        (a / 3).log_softmax(-1), (b / 3).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert torch.allclose(divergence(a, b, 3.0, True), want)
    p, q = (b / 3).sigmoid(), (a / 3).sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(divergence(a, b, 3.0, False), 9 * each.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "the source has no head, since it is a checkpoint"),
        (["class 0", "x"], r"does not know 2 of the target's labels \(class 1, class 2\): use lwf"),
        ("multilabel", "the source's multilabel and the target's classification turn scores into"),
    ],
)
def test_scores_of_unknown_labels_or_of_another_meaning_are_refused(source, message):
    task = net_task()
    used = technique("distillation", logits=1.0)
    if source == "multilabel":
        state = {**label_state(), "positives": [1, 1, 1], "rows": 3}
        other = registry.get("objective", source)
        used.read_source(Task(task.backbone, other(task.backbone, other.options_class(), state)))
    else:
        used.read_source(source and source_of(task, source))
    with pytest.raises(ValueError, match=message):
        used.wrap(task)


def test_the_teacher_sees_what_the_student_saw():
    """Mixed pictures, not those of the batch."""
    rows = image_rows(16)
    backbone = net_task().backbone
    options = Classification.options_class(mixup=1.0)
    task = Task(backbone, Classification(backbone, options, label_state()))
    used = technique("distillation")
    task = used.wrap(task).train()
    batch = take(rows, range(16))
    assert penalised(used, task, batch).item() == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------- learning without forgetting


@EACH
def test_lwf_keeps_what_the_source_s_head_says(kind):
    """After a few steps the old scores are nearer to the source's than without the penalty, and
    the network that is left is a plain one.
    """
    drifts = []
    for weight in (0.0, 10.0):
        task, rows = classified(KINDS[kind])
        names = list(task.state_dict())
        source = source_of(task, ["a", "b", "c", "d"])
        batch = take(rows, range(8))
        with torch.no_grad():
            before = source.objective.predict(source.backbone, without_labels(batch))["scores"]
        used = technique("lwf", weight=weight, probe_share=0.25, freeze_norm_stats=True)
        used.read_source(source)
        wrapped = used.wrap(task)
        run = make_run(
            rows,
            wrapped,
            steps=16,
            technique=used,
            global_batch=8,
            lr=1e-3,
            warmup=0.0,
            keep="last",
        )
        outcome = loop.fit(run)
        assert outcome.params_trained == sum(p.numel() for p in wrapped.parameters())
        with torch.no_grad():
            wrapped.eval()
            after = wrapped.old.predict(wrapped.backbone, without_labels(batch))["scores"]
        drifts.append(float((after.softmax(-1) - before.softmax(-1)).abs().mean()))
        assert list(used.finish(wrapped).state_dict()) == names
    assert drifts[1] < 0.7 * drifts[0]


def without_labels(batch):
    data = {name: tensor for name, tensor in batch.data.items() if name != "label"}
    return type(batch)(batch.rows, batch.keys, data)


def test_lwf_starts_at_zero_and_trains_the_old_head_too():
    task = net_task()
    used = technique("lwf")
    used.read_source(source_of(task, ["a", "b"]))
    wrapped = used.wrap(task).eval()
    assert list(wrapped.layers())[-2:] == ["old_head", "head"]
    batch = take(image_rows(8), range(8))
    assert penalised(used, wrapped, batch).item() == pytest.approx(0.0, abs=1e-7)
    moved(wrapped)
    penalised(used, wrapped, batch).backward()
    found = gradients(wrapped)
    assert found["old.head.weight"].any() and not found["objective.head.weight"].any()
    assert all(p.grad is None for p in used.teacher.parameters())


# ---------------------------------------------------------------- co-tuning


@EACH
def test_co_tuning_counts_the_source_s_labels_by_class(kind):
    """In the first phase; then its loss is the cross-entropy with these averages."""
    task, rows = classified(KINDS[kind])
    names = list(task.state_dict())
    source = source_of(task, ["a", "b", "c", "d"])
    batch = take(rows, range(8))
    with torch.no_grad():
        scores = source.objective.predict(source.backbone, without_labels(batch))["scores"]
    used = technique("co_tuning", probe_share=0.5, weight=0.5)
    used.read_source(source)
    wrapped = used.wrap(task)
    run = make_run(rows, wrapped, steps=6, technique=used, global_batch=8, lr=1e-3, keep="last")
    outcome = loop.fit(run)
    assert outcome.params_trained == sum(p.numel() for p in wrapped.parameters())
    probabilities, label = scores.softmax(-1), batch["label"]
    want = torch.stack([probabilities[label == k].mean(0) for k in range(3)])
    assert torch.allclose(wrapped.relation(), want, atol=1e-4)
    assert wrapped.rows.sum() == 24, "3 steps of 8 rows, and none of the later ones"
    wrapped.eval()
    value = penalised(used, wrapped, batch)
    with torch.no_grad():
        mine = wrapped.old.predict(wrapped.backbone, without_labels(batch))["scores"]
    assert value.item() == pytest.approx(0.5 * F.cross_entropy(mine, want[label]).item(), rel=1e-3)
    value.backward()
    found = gradients(wrapped)
    assert found["old.head.weight"].any() and not found["objective.head.weight"].any()
    assert list(used.finish(wrapped).state_dict()) == names


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("lwf", None, "lwf keeps the source's head, and this source has none"),
        ("lwf", "mae", r"lwf compares scores .* the source's objective is mae"),
        ("co_tuning", None, "co_tuning keeps the source's head, and this source has none"),
        ("co_tuning", "multilabel", "the source's objective is multilabel, whose rows have"),
        ("co_tuning", "mixing", "co_tuning needs the class of a row, and the options mixup"),
    ],
)
def test_heads_that_cannot_be_kept_are_refused(name, source, message):
    used, task = technique(name), net_task()
    if source == "mixing":
        used.read_source(net_task())
        task.objective.options = task.objective.options.model_copy(update={"mixup": 0.2})
    else:
        used.read_source(source and OBJECTIVES[source].build(source).task)
    with pytest.raises(ValueError, match=message):
        used.wrap(task)


# ---------------------------------------------------------------- in a run


def test_a_penalty_needs_features_that_the_loss_has_used():
    task = net_task()
    calls = LatestCall(task.backbone)
    batch = take(image_rows(4), range(4))
    task(batch)
    assert calls.take().batch is batch
    with pytest.raises(ValueError, match="the objective does not read the backbone's features"):
        calls.take()
    with torch.no_grad():
        task(batch)
    with pytest.raises(ValueError):
        calls.take()


@pytest.mark.parametrize(
    "name", ["l2_sp", "bss", "stoch_norm", "distillation", "lwf", "co_tuning", "delta", "bi_tuning"]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, name):
    rows, validation = image_rows(48), image_rows(24, seed=3)

    def made(folder):
        task, used = net_task(norm="batch", dropout=0.3), technique(name)
        if hasattr(used, "read_source"):
            used.read_source(source_of(task, ["a", "b"]))
        run = make_run(
            rows,
            used.wrap(task),
            steps=10,
            technique=used,
            validation=validation,
            lr=0.02,
            eval_every_steps=4,
            checkpoint_every_steps=3,
            checkpoints=str(tmp_path / folder),
        )
        return used, run

    used, whole = made("whole")
    want = loop.fit(whole)
    _, first = made("parts")
    kill_at(first, 7)
    torch.manual_seed(12345)
    again, rest = made("parts")
    found = loop.fit(rest)
    assert found.resumed_from == 6 and found.curve == want.curve
    assert furthest(weights(again.finish(rest.task)), weights(used.finish(whole.task))) == 0.0


paths = image_splits(30, 12, 20)


@pytest.mark.parametrize("name", ["lwf", "co_tuning", {"distillation": {"logits": 1.0}}])
def test_a_trial_gives_the_technique_its_source(tmp_path, paths, name):
    job = job_of(tmp_path, paths, train={"steps": 4})
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    record = trial.run(trial_of(job, shared, name), shared)
    row = record.rows[0]
    assert record.status == "done" and row.params_trained > 0
    kept = bundle.load(str(row.bundle_uri)).task()
    assert math.isfinite(row.value) and type(kept) is Task
    shared.heads = {"src": (NO_OBJECTIVE, {})}
    with pytest.raises(ValueError, match="since it is a checkpoint"):
        trial.run(trial_of(job, shared, name, seed=1), shared)
