"""DINO: the loss is the paper's, the teacher is a moving average that is saved and resumed, and
every rank has the same one.
"""

import math

import numpy as np
import pytest
import torch
from looks import SIZE, Conv, check_ranks, check_resume, looks, run_of, some, task
from toys import furthest, task_of, weights

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import CouplesRows
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.objectives.dino import DINO, Head, as_buffers
from pipeline.train import loop

SMALL = {"prototypes": 12, "hidden": 10, "bottleneck": 6, "local_crops": 3, "local_size": 8}
"""On images of 8 px a small view is a look at its own noise."""
IMAGE = ModalitySpec("image", {"size": 64, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})


def dino(**options):
    return task("dino", **{**SMALL, **options})


def entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def as_written(objective, backbone, batch: Batch, views: int, temperature: float):
    """Algorithm 1 of Caron et al. 2021, with multi-crop: losses (B,), the teacher's answers (2, B,
    K) and its cosines (2, B, K).
    """

    def out(net, head, name):
        return (
            head(net(batch.replace(image=batch[name])).pooled).detach().numpy().astype(np.float64)
        )

    student = [out(backbone, objective.head, f"view{v}") for v in range(views)]
    teacher = np.stack(
        [out(objective.teacher_backbone, objective.teacher_head, f"view{v}") for v in range(2)]
    )
    answers = softmax((teacher - objective.center.numpy()) / temperature)
    losses, pairs = 0.0, 0
    for g in range(2):
        for v in range(views):
            if v != g:
                losses = losses - (answers[g] * np.log(softmax(student[v] / 0.1))).sum(-1)
                pairs += 1
    return losses / pairs, answers, teacher


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("crops", [0, 3])
def test_the_loss_is_the_papers(crops):
    made = dino(local_crops=crops, freeze_prototypes=0.0)
    objective, batch = made.objective, some(5, made.objective.views())
    # A student that differs from its teacher, and a centre that is not zero
    loop.fit(run_of(made, steps=3))
    before = objective.center.clone()
    assert len(made.objective.views()) == 2 + crops and objective.center.abs().max() > 0
    temperature = float(objective.temperature())
    want, answers, cosines = as_written(objective, made.backbone, batch, 2 + crops, temperature)
    total, count, logs = made(batch)
    assert float(total.detach()) == pytest.approx(want.sum(), rel=1e-4) and count == 5
    assert float(logs["teacher_entropy"]) == pytest.approx(
        sum(entropy(p) for p in answers.reshape(10, -1)) / 2, rel=1e-4
    )
    assert float(logs["batch_entropy"]) == pytest.approx(
        5 * entropy(answers.mean((0, 1))), rel=1e-4
    )
    assert torch.allclose(
        objective.center.double(),
        0.9 * before.double() + 0.1 * torch.from_numpy(cosines.mean((0, 1))),
        atol=1e-6,
    )
    want, _, _ = as_written(objective, made.backbone, batch, 2 + crops, temperature)
    assert np.allclose(
        objective.predict(made.backbone, batch)["loss"].detach().numpy(), want, rtol=1e-4
    )


def test_the_centre_and_statistics_stand_still_in_evaluation():
    made = task("dino", norm="batch", **SMALL)
    loop.fit(run_of(made, steps=2))
    made.eval()
    before = weights(made)
    made.objective.predict(made.backbone, some(5, made.objective.views()))
    assert furthest(before, weights(made)) == 0.0


def test_the_entropies_tell_of_collapse():
    made = dino()
    batch = some(6, made.objective.views())
    collapsed = batch.replace(
        **{name: tensor[:1].expand_as(tensor) for name, tensor in batch.data.items()}
    )
    _, count, logs = made(batch)
    rows, mean = (float(logs[name] / count) for name in ("teacher_entropy", "batch_entropy"))
    assert 0 < rows < mean <= math.log(12) + 1e-6, (
        "the mean of different answers is less sure than each of them"
    )
    _, _, logs = made(collapsed)
    views = float(logs["batch_entropy"] - logs["teacher_entropy"]) / 6
    assert views < 0.5 * (mean - rows), (
        "the same answer to every row: what is left is between the two views"
    )


def test_prototypes_are_directions_and_stand_still_at_first():
    made = dino(freeze_prototypes=0.5)
    objective, batch = made.objective, some(5, made.objective.views())
    cosines = objective.head(torch.randn(50, 8))
    assert cosines.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        scaled = Head(8, objective.options)
        scaled.load_state_dict(objective.head.state_dict())
        scaled.prototypes *= 3
    x = torch.randn(4, 8)
    assert torch.allclose(scaled(x), objective.head(x), atol=1e-6), (
        "weight norm: their lengths do not count"
    )
    made(batch)[0].backward()
    assert (
        objective.head.prototypes.grad.abs().max() == 0
        and objective.head.mlp[0].weight.grad.abs().max() > 0
    )
    objective.progress.fill_(0.5)
    made(batch)[0].backward()
    assert objective.head.prototypes.grad.abs().max() > 0


def test_the_teachers_temperature_rises():
    objective = dino(temperature_warmup=0.4).objective
    found = []
    for share in (0.0, 0.2, 0.4, 1.0):
        objective.progress.fill_(share)
        found.append(float(objective.temperature()))
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert float(dino(temperature_warmup=0.0).objective.temperature()) == pytest.approx(0.07)


# ---------------------------------------------------------------- the teacher


def test_the_teacher_is_the_average_of_what_the_student_was():
    made = dino(momentum=0.7)
    run, steps = run_of(made, steps=5), 5
    seen = []
    run.on_rows = lambda step, rows: seen.append(weights(made))
    start = weights(made)
    loop.fit(run)
    want = {
        name: tensor.double()
        for name, tensor in start.items()
        if name.startswith(("backbone.", "objective.head."))
    }
    for step, now in enumerate(seen):
        momentum = 1 - 0.3 * (math.cos(math.pi * step / steps) + 1) / 2
        want = {
            name: momentum * tensor + (1 - momentum) * now[name] for name, tensor in want.items()
        }
    found = weights(made)
    for name, tensor in want.items():
        teacher = found[
            name.replace("backbone.", "objective.teacher_backbone.")
            if name.startswith("backbone.")
            else name.replace(".head.", ".teacher_head.")
        ]
        assert torch.allclose(teacher.double(), tensor, atol=1e-6), name
    assert furthest(found, start) > 1e-3


def test_the_teacher_is_in_the_state_and_in_no_layer():
    made = dino()
    named, state = dict(made.named_parameters()), made.state_dict()
    assert not [name for name in named if "teacher" in name]
    for name in made.backbone.state_dict():
        assert f"objective.teacher_backbone.{name}" in state
    assert "objective.center" in state and "objective.progress" in state
    assert sorted(name for names in made.layers().values() for name in names) == sorted(named)
    assert not any(tensor.requires_grad for name, tensor in made.named_buffers())


def test_a_copy_of_buffers_gives_what_its_module_gives():
    backbone = task_of("timm/test_resnet", {"channels": 3, "size": 64}, "simclr").backbone.eval()
    made = as_buffers(backbone)
    batch = Batch(np.arange(2), torch.arange(2), {"image": torch.randn(2, 3, 64, 64)})
    assert torch.equal(made(batch).pooled, backbone(batch).pooled) and not list(made.parameters())
    assert made.state_dict().keys() == backbone.state_dict().keys() and list(backbone.parameters())


def test_the_teacher_starts_as_the_student_also_after_a_checkpoint_was_loaded():
    made, other = dino(), dino(seed=5)
    # As bundle.transfer does, after the teacher was made
    made.backbone.load_state_dict(other.backbone.state_dict())
    made(some(4, made.objective.views()))
    assert furthest(weights(made.objective.teacher_backbone), weights(other.backbone)) == 0.0


@pytest.mark.parametrize("carry", ["teacher", "student"])
def test_what_the_bundle_carries(carry):
    made = dino(carry=carry, momentum=0.9)
    loop.fit(run_of(made, steps=3))
    teacher, student = weights(made.objective.teacher_backbone), weights(made.backbone)
    assert furthest(teacher, student) > 1e-4
    made.objective.after_training(made.backbone)
    assert furthest(weights(made.backbone), teacher if carry == "teacher" else student) == 0.0


def test_a_bundle_holds_the_teacher(tmp_path):
    made = task_of(
        "timm/test_vit",
        {"channels": 3, "size": 64},
        "dino",
        options={**SMALL, "local_size": None},
        seed=3,
    )
    views = looks_of(made)
    made(views)
    made.objective.after_step(made.backbone, 0, 4)
    bundle.save(str(tmp_path / "kept"), made, IMAGE)
    again = bundle.load(str(tmp_path / "kept")).task()
    assert (
        furthest(weights(again), weights(made)) == 0.0 and float(again.objective.progress) == 0.25
    )
    made.eval()
    assert torch.equal(
        again.objective.predict(again.backbone, views)["loss"],
        made.objective.predict(made.backbone, views)["loss"],
    )


def looks_of(made) -> Batch:
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return looks(
        Batch(np.arange(3), torch.arange(3) * 7919, {"image": image}), made.objective.views()
    )


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet"])
def test_small_views_go_through_the_backbone_in_their_size(name):
    made = task_of(name, {"channels": 3, "size": 64}, "dino", options={**SMALL, "local_size": None})
    sizes = []
    made.backbone.register_forward_pre_hook(
        lambda module, inputs: sizes.append(tuple(inputs[0]["image"].shape))
    )
    made(looks_of(made))[0].backward()
    small = made.objective.views()[2]
    assert small.size == (32 if name.endswith("vit") else 27) and small.area == (0.05, 0.4)
    assert sizes == [(6, 3, 64, 64), (9, 3, small.size, small.size)]
    assert [n for n, p in made.named_parameters() if p.grad is None] == []


def test_a_size_that_the_backbone_does_not_take_is_refused():
    with pytest.raises(
        ValueError,
        match=r"timm/test_vit does not take dino's small views of 40 px .*set another "
        r"dino\.local_size",
    ):
        task_of(
            "timm/test_vit",
            {"channels": 3, "size": 64},
            "dino",
            options={**SMALL, "local_size": 40},
        )
    task_of(
        "timm/test_vit",
        {"channels": 3, "size": 64},
        "dino",
        options={**SMALL, "local_crops": 0, "local_size": 40},
    )


def test_rows_that_are_no_images_are_refused():
    backbone = Conv()
    backbone.arch = Architecture("toys/words", {}, {"vocabulary": 9})
    with pytest.raises(
        ValueError, match="toys/words: dino compares views of images; these rows are vocabulary"
    ):
        DINO(backbone, DINO.options_class(), {})


def test_labels_are_not_asked_for():
    assert DINO.roles == () and isinstance(DINO, CouplesRows) and SIZE == 8


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(team):
    """Teacher and centre too."""
    check_ranks(team, "dino", **SMALL, momentum=0.9)


def test_a_run_that_was_stopped_ends_the_same(tmp_path):
    check_resume(tmp_path, "dino", **SMALL, momentum=0.9)
