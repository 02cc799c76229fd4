"""Which layers a technique moves, and how fast: on a small backbone of every family."""

from __future__ import annotations

import copy
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from contract_rows import BACKBONES, N, wake
from timm import layers
from timm.models.nfnet import NormFreeBlock
from toys import image_rows, kill_at, label_state, make_run, net_task, rows_of, task_of, weights

from pipeline.config import registry
from pipeline.config.registry import LayerOptions
from pipeline.core.contracts import Task, Technique, layer_rates, trains
from pipeline.core.contracts.technique import whole_layer
from pipeline.core.contracts.technique_capabilities import reads_source
from pipeline.core.nn.norms import norm_parameters
from pipeline.data.stream import Rows
from pipeline.techniques.full import Full
from pipeline.techniques.gradual_unfreezing import slanted_triangular
from pipeline.train import loop, optim

FAMILIES = [name for name in BACKBONES if name != "timm/vgg11"]
"""Backbones of every modality, without a large one that adds nothing."""
SGD = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "clip_norm": None,
    "warmup": 0.0,
    "schedule": "constant",
}


@cache
def _built(name: str) -> tuple[Task, Rows]:
    make_sample, options = BACKBONES[name]
    sample = make_sample()
    modality = sample.fitted(name)
    arrays, _ = modality.decode(sample.table, sample.columns)
    rows = rows_of(modality, {**arrays, "label": np.arange(N) % 3}, "classification", label_state())
    task = task_of(name, modality.inputs(), "classification", label_state(), seed=1, **options)
    wake(task)
    return task, rows


def built(name: str) -> tuple[Task, Rows]:
    """A task with weights of its own, and its eight rows."""
    task, rows = _built(name)
    return copy.deepcopy(task), rows


def trained(name: str, technique: Technique, steps: int = 1, **train) -> tuple[dict, dict, Task]:
    """Weights before and after steps of SGD."""
    task, rows = built(name)
    torch.manual_seed(0)
    task = technique.wrap(task)
    before = weights(task)
    loop.fit(make_run(rows, task, steps=steps, technique=technique, lr=0.01, **{**SGD, **train}))
    return before, weights(task), task


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in after if not torch.equal(after[name], before[name])}


# ---------------------------------------------------------------- options of every technique


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_s_step_is_decayed_by_its_distance_from_the_head(name):
    """lr x decay^(L + 1 - l) for layer l of L, the head being layer L + 1 (Bao et al. 2022)."""
    start, plain, task = trained(name, Full())
    _, slowed, _ = trained(name, Full(LayerOptions(layer_decay=0.5)))
    layers = task.layers()
    for depth, names in enumerate(layers.values()):
        rate = 0.5 ** (len(layers) - 1 - depth)
        for one in names:
            step = plain[one] - start[one]
            torch.testing.assert_close(slowed[one] - start[one], rate * step, rtol=1e-3, atol=2e-7)
    assert any(not torch.equal(plain[one], slowed[one]) for one in plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_layers_stay_with_their_buffers(name):
    layers = built(name)[0].layers()
    own = [layer for layer in layers if layer != "head"]
    for freeze, frozen in ((1, own[:1]), (own[1], own[:2])):
        if len(frozen) == len(own):
            continue
        before, after, task = trained(name, Full(LayerOptions(freeze=freeze)))
        still = {one for layer in frozen for one in layers[layer]}
        parameters = {one for one, _ in task.named_parameters()}
        assert moved(before, after) & parameters and not moved(before, after) & still
        owners = {one.rpartition(".")[0] for one in still}
        free = {one.rpartition(".")[0] for one in parameters - still}
        buffers = {one for one in moved(before, after) - parameters}
        assert not {one for one in buffers if one.rpartition(".")[0] in owners - free}


def test_running_statistics_stay_while_the_rest_of_a_norm_trains():
    name, statistics = "timm/resnet10t", re.compile("running_(mean|var)|num_batches")
    before, after, _ = trained(name, Full(), steps=2)
    assert any(statistics.search(one) for one in moved(before, after))
    frozen = Full(LayerOptions(freeze_norm_stats=True))
    task, rows = built(name)
    before = weights(task)
    run = make_run(
        rows, task, steps=4, technique=frozen, lr=0.01, validation=rows, eval_every_steps=2
    )
    loop.fit(run)
    changed = moved(before, weights(task))
    assert not any(statistics.search(one) for one in changed)
    assert {one for one, _ in task.named_parameters()} <= changed


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (2, "full: freeze: 2 must leave a layer of the backbone to train: it has 2, stem to block"),
        (0, "full: freeze: 0 must leave"),
        ("stam", "full: freeze: the backbone has no layer 'stam'; did you mean stem"),
        ("block", "full: freeze: 'block' must leave a layer"),
        ("head", "full: freeze: the backbone has no layer 'head'"),
    ],
)
def test_layers_that_cannot_be_frozen_are_named(freeze, message):
    with pytest.raises(ValueError, match=message):
        layer_rates(Full(LayerOptions(freeze=freeze)), net_task().layers(), "all")


def test_a_part_of_a_layer_is_as_deep_as_the_layer():
    layers = {
        "stem": ["backbone.a"],
        "stem/biases": ["backbone.b"],
        "block/biases": ["backbone.c"],
        "block": [],
        "extra": ["helper.d"],
        "head": ["objective.e"],
    }
    found = layer_rates(Full(LayerOptions(layer_decay=0.5)), layers, "all")
    expected = {
        "stem": 0.25,
        "stem/biases": 0.25,
        "block/biases": 0.5,
        "block": 1.0,
        "extra": 1.0,
        "head": 1.0,
    }
    assert found == expected
    frozen = layer_rates(Full(LayerOptions(freeze=1)), layers, "all")
    assert {name for name, rate in frozen.items() if rate == 0} == {"stem", "stem/biases"}


def wrapped(technique: Technique) -> Task:
    if reads_source(technique):
        technique.read_source(net_task())
    task = net_task(norm="batch")
    return technique.wrap(task) if trains(technique) else task


def test_every_technique_that_trains_the_backbone_has_them():
    """Techniques of which no layer of the backbone learns have none of these options to ignore."""
    own = set(net_task().backbone.layers())
    for name in registry.names("technique"):
        kind = registry.get("technique", name)
        technique = kind()
        layers = wrapped(technique).layers()
        moving = {
            layer
            for phase in technique.phases(40)
            for layer, rate in technique.rates(layers, phase.name).items()
            if rate and layers[layer] and whole_layer(layer) in own
        }
        tunes = bool(moving) and kind.starts_from == "source"
        assert isinstance(technique.options, LayerOptions) == tunes, name
        if not tunes:
            continue
        technique = kind(kind.options_class(freeze=1))
        for phase in technique.phases(40):
            rates = layer_rates(technique, layers, phase.name)
            assert not any(rate for layer, rate in rates.items() if layer.startswith("stem")), name


def test_layers_are_described_by_runs():
    layers = {name: ["x"] for name in ("a", "b", "b/biases", "c", "c/biases", "d", "head")}
    layers["e"] = []
    assert optim.describe_layers(layers, set(layers) - {"e"}) == "all layers"
    assert optim.describe_layers(layers, {"b", "c", "d", "head"}) == "b to d, head"
    assert optim.describe_layers(layers, {"a", "c", "head"}) == "a, c, head"
    assert (
        optim.describe_layers(layers, {"b/biases", "c/biases", "head"}) == "biases of b to c, head"
    )


def test_what_was_trained_is_recorded():
    run = make_run(image_rows(16), net_task(), steps=2, technique=Full(LayerOptions(freeze=1)))
    outcome = loop.fit(run)
    assert outcome.layers_trained == "block, head"


# ---------------------------------------------------------------- gradual unfreezing


def test_slanted_triangular_rates_are_the_paper_s():
    """Equation 3 of Howard and Ruder (2018), with its T, cut_frac and ratio."""
    steps, cut_share, ratio = 200, 0.1, 32.0
    cut = math.floor(steps * cut_share)
    for t in range(steps):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_share - 1))
        expected = (1 + p * (ratio - 1)) / ratio
        found = slanted_triangular(t, steps, cut=cut_share, ratio=ratio)
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_thawed_from_the_top_at_falling_rates(name):
    technique = registry.get("technique", "gradual_unfreezing")()
    layers = built(name)[0].layers()
    own = [layer for layer in layers if layer != "head"]
    phases = technique.phases(100)
    assert [phase.name[0] for phase in phases] == ["0", "1", "2", "3", "4"]
    assert [phase.steps for phase in phases] == [12, 13, 13, 12, 50]
    thawed = []
    for phase in phases:
        rates = technique.rates(layers, phase.name)
        open_layers = [layer for layer in own if rates[layer]]
        assert open_layers == own[len(own) - len(open_layers) :], "from the top"
        thawed.append(len(open_layers))
        assert rates["head"] == 1.0
        assert all(
            any(rates[layer] == pytest.approx(2.6**-power) for power in range(1, 5))
            for layer in open_layers
        )
    assert thawed[0] == 0 and thawed[-1] == len(own) and thawed == sorted(thawed)
    rates = list(rates.values())
    assert rates == sorted(rates)


def test_a_backbone_of_few_layers_has_as_many_groups():
    """No phase thaws nothing, and no rate is that of a group further down."""
    technique = registry.get("technique", "gradual_unfreezing")()
    layers = technique.wrap(net_task()).layers()
    own = [layer for layer in layers if layer != "head"]
    assert len(own) == 2
    phases = technique.phases(40)
    assert [phase.steps for phase in phases] == [10, 10, 20]
    rates = [technique.rates(layers, phase.name) for phase in phases]
    assert [[round(one[layer], 4) for layer in own] for one in rates] == [
        [0.0, 0.0],
        [0.0, 0.3846],
        [0.1479, 0.3846],
    ]


def test_the_rate_is_one_triangle_over_all_phases():
    technique = registry.get("technique", "gradual_unfreezing")()
    lrs = []
    task = technique.wrap(net_task())
    run = make_run(image_rows(32), task, steps=40, technique=technique, lr=0.1)
    run.on_log = lambda log: lrs.append(log["lr"])
    before = weights(run.task)
    outcome = loop.fit(run)
    head = [0.1 * slanted_triangular(step, 40, cut=0.1, ratio=32.0) for step in range(40)]
    # the log has the lowest rate of a phase: the lowest group's
    expected = []
    for phase in technique.phases(40):
        power = int(phase.name[0])
        expected += [rate * 2.6**-power for rate in head[len(expected) :][: phase.steps]]
    assert lrs == pytest.approx(expected)
    assert outcome.layers_trained == "all layers" and moved(before, weights(run.task))


# ---------------------------------------------------------------- surgical fine-tuning


def surgical(**options) -> Technique:
    kind = registry.get("technique", "surgical")
    return kind(kind.options_class(**options))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_named_block_and_the_head_move(name):
    layers = built(name)[0].layers()
    chosen = list(layers)[1]
    before, after, task = trained(name, surgical(layers=[chosen]))
    parameters = {one for one, _ in task.named_parameters()}
    changed = moved(before, after) & parameters
    assert changed & set(layers[chosen]) and changed <= {*layers[chosen], *layers["head"]}


@pytest.mark.parametrize("name", ["torchaudio/deepspeech2", "timm/resnet10t", "transformers/bert"])
def test_the_block_with_the_largest_relative_gradient_is_chosen(name):
    """Against gradients of the same rows by hand, at the weights before."""
    technique = surgical(probe_share=0.01, measure_steps=2)
    before, after, task = trained(name, technique, steps=10)
    layers = task.layers()
    plain, rows = built(name)
    optim.train_mode(plain, freeze_norm_stats=True)
    sums = dict.fromkeys(layers, 0.0)
    run = make_run(rows, plain, steps=2)
    for loaded in run.batches(range(2)):
        plain.zero_grad()
        plain(run.preprocess(loaded.batch, False))[0].backward()
        named = dict(plain.named_parameters())
        for layer, names in layers.items():
            grads = [named[one].grad.flatten() for one in names if named[one].grad is not None]
            held = torch.cat([named[one].flatten() for one in names])
            sums[layer] += float(torch.cat(grads).norm() / held.detach().norm())
    found = dict(zip(layers, task.gradient_sums.tolist(), strict=False))
    assert found == pytest.approx({k: v for k, v in sums.items() if k != "head"}, rel=1e-3)
    best = max(found, key=lambda layer: found[layer])
    changed = moved(before, after) & {one for one, _ in task.named_parameters()}
    assert changed & set(layers[best]) and changed <= {*layers[best], *layers["head"]}


def test_nothing_moves_while_gradients_are_measured(tmp_path):
    """And a run that was killed after it goes on with the same block."""

    def run(folder) -> loop.TrainingRun:
        technique = surgical(measure_steps=4, probe_share=0.2)
        torch.manual_seed(3)
        task = technique.wrap(net_task(norm="batch"))
        return make_run(
            image_rows(48),
            task,
            steps=12,
            technique=technique,
            lr=0.01,
            checkpoint_every_steps=3,
            checkpoints=str(tmp_path / folder),
            validation=image_rows(16, seed=1),
            eval_every_steps=2,
        )

    whole = run("whole")
    held = {}
    whole.on_log = lambda log: held.update({log["step"]: weights(whole.task)})
    outcome = loop.fit(whole)
    assert moved(held[2], held[6]) == {"gradient_sums"}
    assert outcome.layers_trained in ("stem, head", "block, head")
    assert outcome.params_trained < sum(p.numel() for p in whole.task.parameters())
    first = run("parts")
    kill_at(first, 8)
    again = run("parts")
    resumed = loop.fit(again)
    assert resumed.resumed_from == 6 and resumed.layers_trained == outcome.layers_trained
    assert not moved(weights(whole.task), weights(again.task))
    assert type(again.technique.finish(again.task)) is Task


def test_a_block_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="surgical: layers: toys/net has no layer 'blok'; did you"):
        surgical(layers=["blok"]).wrap(net_task())


@pytest.mark.parametrize("name", ["lp_ft", "delta", "lwf", "co_tuning", "wise_ft"])
def test_a_head_that_is_trained_first_has_a_step_at_least(name):
    """And leaves one; with a share of 0, where that is allowed, there is no such phase."""
    kind = registry.get("technique", name)

    def steps(share: float, run_steps: int) -> list[tuple[str, int]]:
        technique = kind(kind.options_class(probe_share=share))
        return [(phase.name, phase.steps) for phase in technique.phases(run_steps)]

    assert steps(0.3, 10) == [("probe", 3), ("full", 7)]
    assert steps(0.01, 10) == [("probe", 1), ("full", 9)]
    assert steps(0.99, 10) == [("probe", 9), ("full", 1)]
    assert steps(0.3, 1) == [("full", 1)]
    if name in ("lwf", "wise_ft"):
        assert steps(0.0, 10) == [("full", 10)]


# ---------------------------------------------------------------- biases and norms


def biases_of(task: Task) -> set[str]:
    """What torch's modules call their biases."""
    return {name for name, p in task.backbone.named_parameters() if re.search(r"bias[^.]*$", name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_bitfit_moves_biases_and_head_alone(name):
    task = built(name)[0]
    chosen = {f"backbone.{one}" for one in biases_of(task)} | set(task.layers()["head"])
    before, after, wrapped = trained(name, registry.get("technique", "bitfit")())
    parameters = {one for one, _ in wrapped.named_parameters()}
    changed = moved(before, after) & parameters
    assert changed <= chosen and len(changed) > len(task.layers()["head"])
    assert len(chosen - changed) <= 2, "keys of attention have a bias without effect"


@pytest.mark.parametrize("name", FAMILIES)
def test_norm_tuning_moves_norms_and_head_alone(name):
    task = built(name)[0]
    technique = registry.get("technique", "norm_tuning")()
    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)
    own = {
        f"backbone.{module_name}.{one}"
        for module_name, module in task.backbone.named_modules()
        if isinstance(module, kinds)
        for one, _ in module.named_parameters(recurse=False)
    }
    if not own:
        with pytest.raises(ValueError, match=f"norm_tuning: {name} has no norms: leave"):
            technique.wrap(task)
        return
    before, after, wrapped = trained(name, technique)
    parameters = {one for one, _ in wrapped.named_parameters()}
    changed = moved(before, after) & parameters
    assert changed <= own | set(task.layers()["head"]) and changed & own


def test_norms_of_timm_are_found_by_their_names():
    """Also those of no torch class; what has norm in its name and is none is left alone."""
    network = torch.nn.ModuleDict(
        {
            "rms": layers.RmsNorm2d(4),
            "act": layers.norm_act.RmsNormAct2d(4),
            "evo": layers.EvoNorm2dS0(4, groups=2),
            "conv": layers.ConvNormAct(3, 4),
            "free": NormFreeBlock(
                8, 8, skipinit=True, act_layer=torch.nn.ReLU, conv_layer=layers.ScaledStdConv2d
            ),
        }
    )
    assert "free.skipinit_gain" in dict(network.named_parameters())
    assert norm_parameters(network) == {
        *("rms.weight", "act.weight", "conv.bn.weight", "conv.bn.bias"),
        *("evo.weight", "evo.bias", "evo.v"),
    }


@pytest.mark.parametrize("technique", ["bitfit", "norm_tuning"])
def test_parts_are_recorded_and_end_in_the_plain_task(technique):
    made = registry.get("technique", technique)()
    task = made.wrap(net_task())
    outcome = loop.fit(make_run(image_rows(16), task, steps=2, technique=made))
    part = {"bitfit": "biases of stem to block", "norm_tuning": "norms of stem"}[technique]
    assert outcome.layers_trained == f"{part}, head"
    ended = made.finish(task)
    assert type(ended) is Task and list(ended.state_dict()) == list(net_task().state_dict())
