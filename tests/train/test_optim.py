"""Rates cover every parameter once, decay spares vectors, the schedule is its closed form, the
average is its formula.
"""

import copy
import math

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from toys import furthest, net_task, weights

from pipeline.config import registry
from pipeline.config.schema import Train
from pipeline.core.specs import Architecture, ObjectiveSpec
from pipeline.train import dry_checks, optim


def train(**words) -> Train:
    return Train(**words)


# ---------------------------------------------------------------- rates


def rates_of(task, **changed):
    return {**dict.fromkeys(task.layers(), 1.0), **changed}


def test_rates_freeze_and_thaw_and_put_frozen_parts_into_evaluation_mode():
    task = net_task(norm="batch", dropout=0.5)
    task.eval()
    found = optim.apply_rates(task, task.layers(), rates_of(task, stem=0.0))
    assert {name for name, p in task.named_parameters() if not p.requires_grad} == {
        f"backbone.{n}" for n in task.backbone.layers()["stem"]
    }
    assert not task.backbone.norm.training and not task.backbone.stem.training
    assert task.training and task.backbone.block.training and task.objective.training
    assert (
        found["backbone.stem.weight"] == 0.0
        and found["objective.head.weight"] == 1.0
        and set(found) == dict(task.named_parameters()).keys()
    )
    optim.apply_rates(task, task.layers(), rates_of(task, stem=0.1))
    assert all(p.requires_grad for p in task.parameters()) and task.backbone.norm.training


def test_dropout_of_a_frozen_backbone_is_off():
    task = net_task(dropout=0.5)
    optim.apply_rates(task, task.layers(), dict.fromkeys(task.layers(), 0.0) | {"head": 1.0})
    assert not task.backbone.drop.training and task.objective.training
    optim.apply_rates(task, task.layers(), rates_of(task))
    assert task.backbone.drop.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop("stem"), "4 parameters belong to no layer"),
        (
            lambda layers: layers["block"].append("backbone.stem.bias"),
            "backbone.stem.bias is in layer stem and in block",
        ),
        (
            lambda layers: layers["block"].append("backbone.gone"),
            "block names backbone.gone, which is no parameter",
        ),
    ],
)
def test_layers_that_do_not_cover_every_parameter_once_are_refused(change, message):
    task = net_task()
    layers = task.layers()
    change(layers)
    with pytest.raises(ValueError, match=message):
        optim.apply_rates(task, layers, dict.fromkeys(layers, 1.0))


def test_rates_that_do_not_name_every_layer_are_refused():
    task = net_task()
    with pytest.raises(
        ValueError, match=r"rates name \['head'\] but the layers are \['block', 'head', 'stem'\]"
    ):
        optim.apply_rates(task, task.layers(), {"head": 1.0})


# ---------------------------------------------------------------- groups and optimisers


def test_vectors_and_scalars_are_not_decayed_and_rates_scale_the_peak():
    task = net_task()
    rates = optim.apply_rates(task, task.layers(), rates_of(task, stem=0.0, block=0.1))
    found = optim.parameter_groups(task, rates, train(lr=0.5, weight_decay=0.3))
    names = {id(p): name for name, p in task.named_parameters()}
    flat = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in found
        for p in group["params"]
    }
    assert flat == {
        "backbone.block.weight": (0.05, 0.3),
        "backbone.block.bias": (0.05, 0.0),
        "objective.head.weight": (0.5, 0.3),
        "objective.head.bias": (0.5, 0.0),
    }


@pytest.mark.parametrize(
    "name", ["test_vit", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_timm_backbones_decay_what_timm_decays(name):
    """Position embeddings, class tokens and bias tables are not decayed, nor are they in timm."""
    inputs = {"channels": 3, "size": 224}
    state = {"labels": ["a", "b"], "counts": [1, 1]}
    options = registry.get("objective", "classification").options_class().model_dump()
    objective = ObjectiveSpec("classification", options, state)
    task = dry_checks.build_task(Architecture(f"timm/{name}", {}, inputs), objective)
    model = task.backbone.model
    rates = dict.fromkeys(dict(task.named_parameters()), 1.0)
    groups = optim.parameter_groups(task, rates, train(weight_decay=0.5))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    theirs = param_groups_weight_decay(model, 0.5, no_weight_decay_list=model.no_weight_decay())
    expected = {id(p) for group in theirs if group["weight_decay"] for p in group["params"]}
    assert decayed - {id(task.objective.head.weight)} == expected


def test_decay_moves_matrices_alone():
    """With gradients of zero, decoupled decay is all that moves: w (1 - lr decay)."""
    task = net_task()
    before = weights(task)
    made = optim.build_optimizer(
        optim.parameter_groups(
            task, dict.fromkeys(dict(task.named_parameters()), 1.0), train(lr=0.1, weight_decay=0.5)
        ),
        train(lr=0.1),
    )
    for p in task.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, after in weights(task).items():
        torch.testing.assert_close(
            after, before[name] * (1 - 0.1 * 0.5) if after.dim() > 1 else before[name]
        )


@pytest.fixture
def filled():
    """Memory that is allocated without a fill holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_that_is_skipped_leaves_no_trace_in_the_optimiser(kind, filled):
    """Also the first one: torch's fused SGD allocates its momentum then, and leaves it unset when
    the step is not taken.
    """
    spec = train(optimizer=kind, lr=0.1, momentum=0.9)
    results = []
    for skipped_first in (False, True):
        task = net_task()
        made = optim.build_optimizer(
            optim.parameter_groups(task, dict.fromkeys(dict(task.named_parameters()), 1.0), spec),
            spec,
        )
        for gradient in ([math.nan] if skipped_first else []) + [0.5, 1.5]:
            for p in task.parameters():
                p.grad = torch.full_like(p, gradient)
            made.grad_scale, made.found_inf = (
                torch.ones(()),
                torch.tensor(float(math.isnan(gradient))),
            )
            made.step()
        results.append(weights(task))
    assert furthest(*results) == 0.0


def trained_side_by_side(momentum: float, decay: float, theirs) -> tuple[dict, dict]:
    """Weights after four steps on the same random gradients: by our SGD, and by what ``theirs``
    makes of (matrices, vectors).
    """
    spec = train(optimizer="sgd", lr=0.1, momentum=momentum, weight_decay=decay)
    a, b = net_task(), net_task()
    ours = optim.build_optimizer(
        optim.parameter_groups(a, dict.fromkeys(dict(a.named_parameters()), 1.0), spec), spec
    )
    other = theirs(*([p for p in b.parameters() if (p.dim() > 1) == big] for big in (True, False)))
    for step in range(4):
        torch.manual_seed(step)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        other.step()
    return weights(a), weights(b)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_without_decay_is_that_of_torch(momentum):
    def theirs(matrices, vectors):
        return torch.optim.SGD(
            [*matrices, *vectors],
            lr=0.1,
            momentum=momentum,
            nesterov=momentum > 0,
            fused=False,
            foreach=False,
        )

    assert furthest(*trained_side_by_side(momentum, 0.0, theirs)) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_decays_apart_from_the_gradient(momentum):
    """timm's SGDW is an implementation of its own of Loshchilov and Hutter 2019; torch's SGD (L2)
    is another thing with momentum.
    """
    from timm.optim import SGDW

    def theirs(matrices, vectors):
        groups = [
            {"params": matrices, "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return SGDW(groups, lr=0.1, momentum=momentum, nesterov=momentum > 0, foreach=False)

    def l2(matrices, vectors):
        groups = [
            {"params": matrices, "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            groups, lr=0.1, momentum=momentum, nesterov=momentum > 0, fused=False, foreach=False
        )

    assert furthest(*trained_side_by_side(momentum, 0.5, theirs)) < 1e-6
    assert (furthest(*trained_side_by_side(momentum, 0.5, l2)) > 0.05) == (momentum > 0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_search_over_decay_means_the_same_with_and_without_momentum(kind):
    """Ten steps without a gradient leave w (1 - lr decay)^10: L2 with momentum 0.9 left less than a
    third of that.
    """
    spec = train(optimizer=kind, lr=0.1, momentum=0.9, weight_decay=0.5)
    task = net_task()
    before = weights(task)
    made = optim.build_optimizer(
        optim.parameter_groups(task, dict.fromkeys(dict(task.named_parameters()), 1.0), spec), spec
    )
    for _ in range(10):
        for p in task.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
    for name, after in weights(task).items():
        torch.testing.assert_close(
            after, before[name] * (1 - 0.1 * 0.5) ** 10 if after.dim() > 1 else before[name]
        )
    assert sorted({group["weight_decay"] for group in made.param_groups}) == [0.0, 0.5]


def test_a_skipped_step_of_sgd_decays_nothing():
    spec = train(optimizer="sgd", lr=0.1, weight_decay=0.5)
    task = net_task()
    before = weights(task)
    made = optim.build_optimizer(
        optim.parameter_groups(task, dict.fromkeys(dict(task.named_parameters()), 1.0), spec), spec
    )
    for p in task.parameters():
        p.grad = torch.full_like(p, math.nan)
    made.grad_scale, made.found_inf = torch.ones(()), torch.ones(())
    made.step()
    assert furthest(weights(task), before) == 0.0


# ---------------------------------------------------------------- schedule


def test_schedule_is_linear_warm_up_then_cosine_to_zero():
    spec, steps, warm = train(warmup=0.1), 200, 20
    found = [optim.lr_factor(step, steps, spec) for step in range(steps)]
    want = [
        (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (steps - warm)))
        for s in range(steps)
    ]
    assert found == pytest.approx(want, abs=1e-12)
    assert found[0] == 0.05 and found[warm - 1] == found[warm] == 1.0 and 0 < found[-1] < 1e-4
    assert found[warm:] == sorted(found[warm:], reverse=True)


def test_schedule_equals_torch_schedulers():
    spec, steps, warm = train(warmup=0.25), 16, 4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm - 1),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warm),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [warm])
    for step in range(steps):
        assert optim.lr_factor(step, steps, spec) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-7
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ({"warmup": 0.0, "schedule": "constant"}, [1, 1, 1, 1]),
        ({"warmup": 0.5, "schedule": "constant"}, [0.5, 1, 1, 1]),
        ({"warmup": 1.0}, [0.25, 0.5, 0.75, 1]),
        ({"warmup": 0.0}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_schedule_at_its_edges(words, want):
    assert [optim.lr_factor(step, 4, train(**words)) for step in range(4)] == pytest.approx(want)


def test_schedule_of_one_step_trains():
    assert all(
        optim.lr_factor(0, 1, train(warmup=w, schedule=s)) == 1.0
        for w in (0.0, 0.1, 1.0)
        for s in ("cosine", "constant")
    )


# ---------------------------------------------------------------- norm and average


def test_global_norm_is_the_norm_of_all_gradients_laid_end_to_end():
    task = net_task()
    for p in task.parameters():
        p.grad = torch.randn_like(p)
    flat = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])
    assert optim.global_norm(list(task.parameters())) == pytest.approx(float(flat.norm()))
    assert optim.global_norm([nn.Parameter(torch.ones(2))]) == 0


def test_average_follows_its_formula_and_leaves_frozen_weights_alone():
    task = net_task()
    task.backbone.stem.weight.requires_grad_(False)
    average = optim.WeightAverage(task, lambda step: 0.2)
    want = {name: p.detach().clone() for name, p in task.named_parameters()}
    frozen = want["backbone.stem.weight"].clone()
    for step in range(4):
        with torch.no_grad():
            for p in task.parameters():
                p.add_(torch.randn_like(p))
        average.update(task, step)
        want = {name: 0.8 * want[name] + 0.2 * p.detach() for name, p in task.named_parameters()}
    want["backbone.stem.weight"] = frozen
    assert furthest(average.average, want) < 1e-6


def test_swapping_the_average_twice_changes_nothing():
    task = net_task()
    average = optim.WeightAverage(task, lambda step: 0.5)
    with torch.no_grad():
        for p in task.parameters():
            p.add_(1.0)
    live, held = weights(task), copy.deepcopy(average.average)
    places = {name: p.data_ptr() for name, p in task.named_parameters()}
    average.swap(task)
    assert furthest(weights(task), held) == 0.0
    average.swap(task)
    assert furthest(weights(task), live) == 0.0 and furthest(average.average, held) == 0.0
    # The optimiser's parameters are still these
    assert places == {name: p.data_ptr() for name, p in task.named_parameters()}
