"""Adapters start from nothing, train as peft's own do, move nothing else, and end in the weights
under the plain task's names.
"""

from __future__ import annotations

import copy
import io
import math
import pkgutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import hf_families
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from techniques.test_bottleneck import assert_a_block_that_goes_past_is_named
from timm.models import beit
from torch import nn
from toys import (
    SMALL,
    assert_a_killed_run_ends_as_a_whole_one,
    furthest,
    image_rows,
    kill_at,
    label_state,
    make_run,
    net_task,
    take,
    task_of,
    text_modality,
    text_rows,
    trial_of,
    weights,
)

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.core.contracts import Batch, Task
from pipeline.core.contracts.technique import whole_layer
from pipeline.core.nn import auto_model
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.io import storage
from pipeline.techniques.full import Full
from pipeline.techniques.linear_probe import LinearProbe
from pipeline.techniques.peft import (
    ADDED,
    AdaptedTask,
    Lora,
    LoraOptions,
    adaptable_weights,
    choose_weights,
    submodules_read_without_call,
)
from pipeline.train import loop, optim
from pipeline.train.ranks import Ranks
from pipeline.transfer import fanout, grid, targets, trial

IMAGE = {"channels": 3, "size": 32}
FAMILIES = ["timm/test_efficientnet", "timm/tf_mobilenetv3_small_minimal_100"]
"""Depthwise convolutions, which are left alone, and those padded as TensorFlow does. test_adapters
has the others.
"""


PLUG = {"lora": {"rank": 4, "lr_scale": 2.0}}
IN_4_BITS = {"quantize": "nf4"}
NEEDS_LIBRARY = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quantized)"
)


def lora(**options) -> Lora:
    return Lora(LoraOptions(**{"lr_scale": 1.0, **options}))


def made(name: str, seed: int = 0, n: int = 8, **options) -> tuple[Task, Batch]:
    """A task in evaluation mode and rows that it reads."""
    if name.startswith("transformers"):
        modality = text_modality(name)
        task = task_of(
            name, modality.inputs(), "classification", label_state(), seed, **{**SMALL, **options}
        )
        return task.eval(), take(text_rows(n, modality), range(n))
    return task_of(name, IMAGE, "classification", label_state(), seed).eval(), take(
        image_rows(n, size=32, channels=3), range(n)
    )


def wrapped(task: Task, technique: Lora | None = None, seed: int = 0) -> AdaptedTask:
    torch.manual_seed(seed)
    found = (technique or lora()).wrap(task)
    assert isinstance(found, AdaptedTask)
    return found.eval()


def added(task: AdaptedTask) -> list[str]:
    """Names of the adapters' parameters."""
    layers = task.layers()
    return [name for layer in layers if layer.endswith(f"/{ADDED}") for name in layers[layer]]


def shaken(task: AdaptedTask) -> AdaptedTask:
    """Adapters as if they had been trained."""
    with torch.no_grad():
        for name in added(task):
            task.get_parameter(name).add_(0.05 * torch.randn_like(task.get_parameter(name)))
    return task


@torch.no_grad()
def scores(task: Task, batch: Batch) -> torch.Tensor:
    return task.objective.predict(task.backbone, batch)["scores"]


def state_of(task: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in task.state_dict().items()]


# ---------------------------------------------------------------- the start, the layers, the end


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "rank": 4, "dropout": 0.3}, {"dora": True}], ids=str
)
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_start_from_nothing_and_end_in_the_weights(name, options):
    task, batch = made(name)
    plain, names, before = scores(task, batch), state_of(task), weights(task)
    own_layers = set(task.layers())
    technique = lora(**options)
    adapted = wrapped(task, technique)
    assert torch.equal(scores(adapted, batch), plain)
    layers = adapted.layers()
    assert list(layers)[-1] == "head" and {whole_layer(layer) for layer in layers} == own_layers
    assert sorted(n for names in layers.values() for n in names) == sorted(
        n for n, _ in adapted.named_parameters()
    )
    assert all(
        ("lora_" in n) == layer.endswith(f"/{ADDED}")
        for layer, names in layers.items()
        for n in names
    )
    want = scores(shaken(adapted), batch)
    assert (want - plain).abs().max() > 1e-3
    ended = technique.finish(adapted)
    assert type(ended) is Task and state_of(ended) == names
    assert (scores(ended, batch) - want).abs().max() < 1e-5
    moved = {n for n, tensor in ended.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved and all(n.endswith(".weight") and n.startswith("backbone.") for n in moved)


@pytest.mark.parametrize(
    ("name", "options", "alpha_over"),
    [("transformers/bert", {}, 8), ("transformers/gpt2", {"rslora": True}, math.sqrt(8))],
)
def test_the_update_is_the_paper_s(name, options, alpha_over):
    """W + alpha / rank B A (Hu et al. 2022, section 4.1), alpha / sqrt(rank) in rsLoRA."""
    task, _ = made(name)
    before = weights(task)
    adapted = shaken(wrapped(task, lora(alpha=4.0, **options)))
    now = weights(adapted)
    after = weights(adapted.merged())
    changed = 0
    for name in [
        n.removesuffix(".lora_A.default.weight") for n in now if n.endswith("lora_A.default.weight")
    ]:
        update = (
            4.0
            / alpha_over
            * now[f"{name}.lora_B.default.weight"]
            @ now[f"{name}.lora_A.default.weight"]
        )
        found = after[f"{name}.weight"] - before[f"{name}.weight"]
        assert (
            (found.T if "gpt2" in task.backbone.arch.name else found) - update
        ).abs().max() < 1e-6
        changed += 1
    assert changed == (12 if "bert" in task.backbone.arch.name else 8)  # of 2 blocks


def test_the_seed_makes_the_adapters_and_nothing_else_does():
    a, b, c = (weights(wrapped(made("transformers/bert")[0], seed=seed)) for seed in (1, 1, 2))
    assert furthest(a, b) == 0.0
    differ = {name for name in a if not torch.equal(a[name], c[name])}
    assert differ == {name for name in a if "lora_A" in name}


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("transformers/bert", {"query", "key", "value"}),
        ("transformers/roberta", {"query", "key", "value"}),
        ("transformers/distilbert", {"q_lin", "k_lin", "v_lin"}),
        ("transformers/gpt2", {"c_attn"}),
        ("timm/test_vit", {"qkv"}),
        ("timm/cait_xxs24_224", {"q", "k", "v", "qkv"}),
        ("timm/pvt_v2_b0", {"q", "kv"}),
        ("timm/swin_tiny_patch4_window7_224", {"qkv"}),
    ],
)
def test_attention_is_found_by_name(name, endings):
    inputs = (
        text_modality(name).inputs() if name.startswith("transformers") else {**IMAGE, "size": 224}
    )
    options = SMALL if name.startswith("transformers") else {}
    with torch.device("meta"):
        task = task_of(name, inputs, "classification", label_state(), **options)
        adapted = lora(modules="attention").wrap(task)
    assert isinstance(adapted, AdaptedTask)
    assert {found.rpartition(".")[2] for found in adapted.adapters()} == endings
    assert all("att" in found for found in adapted.adapters())


WITHOUT_ATTENTION = {"convnext", "convnextv2", "mobilenet_v2", "patchtsmixer", "regnet", "resnet"}


@pytest.mark.parametrize("family", sorted(set(hf_families.FAMILIES) - WITHOUT_ATTENTION))
def test_attention_of_families_of_transformers_is_found_by_name(family):
    config = auto_model.configuration(family, hf_families.FAMILIES[family].config, {})
    with torch.device("meta"):
        model = auto_model.model_class(config)(config)
    found = [target.module for target in choose_weights(model, "attention")]
    assert found and all("att" in name.lower() for name in found)


def test_depthwise_convolutions_and_embeddings_are_left_alone():
    backbone = net_task().backbone
    backbone.grouped, backbone.depthwise = (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
    )
    backbone.attention, backbone.words = nn.MultiheadAttention(4, 2), nn.Embedding(4, 4)
    assert [target.name for target in adaptable_weights(backbone)] == [
        "stem",
        "block",
        "grouped",
        "attention.in_proj_weight",
        "attention.out_proj",
    ]


# ---------------------------------------------------------------- errors


def test_a_backbone_without_such_modules_is_told_with_those_that_it_has():
    with pytest.raises(
        ValueError,
        match=r"toys/net has no module for attention.*1 x stem \(Linear\), 1 x block \(Linear\)\. "
        r"Give modules: all",
    ):
        lora(modules="attention").wrap(net_task())
    with pytest.raises(
        ValueError,
        match=r"transformers/bert has no module ending with qkv, fc1\..*2 x query \(Linear\)",
    ):
        lora(modules=["query", "qkv", "fc1"]).wrap(made("transformers/bert")[0])
    assert wrapped(
        made("transformers/bert")[0], lora(modules=["query", "attention.output.dense"])
    ).adapters() == [
        f"model.encoder.layer.{i}.attention.{part}"
        for i in (0, 1)
        for part in ("self.query", "output.dense")
    ]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("timm.models.beit.Attention", {"qkv"}),
        ("timm.models.eva.EvaAttention", {"qkv"}),
        ("timm.models.swin_transformer_v2.WindowAttention", {"qkv"}),
        (
            "transformers.models.wavlm.modeling_wavlm.WavLMAttention",
            {"q_proj", "k_proj", "v_proj", "out_proj"},
        ),
        ("torch.nn.TransformerEncoderLayer", {"linear1", "linear2", "norm1", "norm2"}),
        ("timm.models.vision_transformer.Attention", set()),
        ("timm.layers.PatchEmbed", set()),
        ("transformers.models.t5.modeling_t5.T5DenseActDense", set()),
        ("transformers.models.bert.modeling_bert.BertSelfAttention", set()),
    ],
)
def test_submodules_read_without_call(kind, parts):
    assert submodules_read_without_call(pkgutil.resolve_name(kind)) == parts


class BeitAttention(beit.Attention):
    """For the blocks of timm's ViT, which say more to their attention than BEiT's."""

    def forward(self, x, **words):
        return super().forward(x)


def test_a_weight_that_is_read_without_a_call_is_adapted():
    """timm's BEiT multiplies by the weight of qkv and never calls it."""
    rows = image_rows(16, size=32, channels=3)
    task, batch = made("timm/test_vit")
    width = task.backbone.get_submodule("model.blocks.0.attn.qkv").in_features
    for block in task.backbone.get_submodule("model.blocks"):
        block.attn = BeitAttention(width, num_heads=2)
    task.eval()
    plain = scores(task, batch)
    adapted = wrapped(copy.deepcopy(task))
    assert torch.equal(scores(adapted, batch), plain)
    assert not torch.allclose(scores(shaken(adapted), batch), plain, atol=1e-3)
    run = make_run(rows, lora().wrap(task), steps=3, technique=lora(), lr=0.01)
    start = weights(run.task)
    loop.fit(run)
    moved = {
        name for name, value in weights(run.task).items() if not torch.equal(value, start[name])
    }
    assert any("qkv" in name and "lora_B" in name for name in moved)
    tuned = scores(run.task.eval(), batch)
    torch.testing.assert_close(scores(lora().finish(run.task).eval(), batch), tuned)


def test_adapters_that_a_block_goes_past_are_told_at_the_first_batch():
    assert_a_block_that_goes_past_is_named(lora())
    task, _ = made("timm/test_vit")
    rows = image_rows(16, size=32, channels=3)
    loop.fit(make_run(rows, lora().wrap(task), steps=2, technique=lora()))


# ---------------------------------------------------------------- training


def adapted_run(
    task: Task | None = None, technique: Lora | None = None, **words
) -> loop.TrainingRun:
    technique = technique or lora()
    torch.manual_seed(5)
    task = technique.wrap(task or net_task(norm="batch", dropout=0.4))
    return make_run(
        image_rows(48),
        task,
        **{"technique": technique, "steps": 6, "lr": 0.01, "warmup": 0.0, **words},
    )


def test_training_equals_peft_s_own():
    """get_peft_model of peft, plain AdamW and torch's backward, from the same start, rows and
    order.
    """
    modality = text_modality()
    rows = text_rows(48, modality)
    task = task_of("transformers/bert", modality.inputs(), "classification", label_state(), **SMALL)
    twin = copy.deepcopy(task)
    technique = lora(modules="attention", rank=4, alpha=12.0, lr_scale=3.0)
    torch.manual_seed(5)
    run = make_run(
        rows,
        technique.wrap(task),
        steps=8,
        technique=technique,
        lr=5e-3,
        warmup=0.0,
        schedule="constant",
        clip_norm=0.5,
        weight_decay=0.1,
    )
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["query", "key", "value"])
    # type: ignore[assignment, arg-type]
    twin.backbone.model = get_peft_model(twin.backbone.model, config)
    twin.train()
    adapters, head = [p for p in twin.backbone.parameters() if p.requires_grad], twin.objective.head
    optimizer = torch.optim.AdamW(
        [
            {"params": adapters, "lr": 1.5e-2, "weight_decay": 0.1},
            {"params": [head.weight], "weight_decay": 0.1},
            {"params": [head.bias], "weight_decay": 0.0},
        ],
        lr=5e-3,
        betas=(run.train.beta1, run.train.beta2),
    )
    for loaded in run.batches(range(8)):
        total, count, _ = twin(run.preprocess(loaded.batch, False))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    loop.fit(run)
    theirs = {
        name.replace("model.base_model.model.", "model."): tensor
        for name, tensor in weights(twin).items()
    }
    ours = weights(run.task)
    assert len(adapters) == 12
    assert max(float(ours[n].abs().max()) for n in ours if "lora_B" in n) > 1e-2
    assert furthest(ours, theirs) < 1e-6
    merged = technique.finish(run.task)
    twin.backbone.model = twin.backbone.model.merge_and_unload()
    assert furthest(weights(merged), weights(twin)) < 1e-6


def test_only_adapters_and_head_move_and_have_optimiser_state(monkeypatch):
    held, original = [], optim.build_optimizer
    monkeypatch.setattr(
        optim, "build_optimizer", lambda *args: held.append(original(*args)) or held[-1]
    )
    run = adapted_run(ema=0.9)
    before, layers = weights(run.task), run.task.layers()
    outcome = loop.fit(run)
    moving = {*added(run.task), *layers["head"]}
    after = weights(run.task)
    # Norm statistics stay, too
    assert {name for name in after if not torch.equal(after[name], before[name])} == moving
    assert (
        outcome.params_trained
        == sum(before[name].numel() for name in moving)
        == 8 * (64 + 16) + 8 * (16 + 16) + 16 * 3 + 3
    )
    named = dict(run.task.named_parameters())
    assert {id(p) for p in held[0].state} == {id(named[name]) for name in moving}
    assert {group["lr"] for group in held[0].param_groups}
    assert all(p.grad is None for p in named.values())


def test_frozen_parts_are_in_evaluation_mode_and_the_adapters_dropout_is_on():
    task = lora(dropout=0.5).wrap(net_task(norm="batch"))
    technique = lora(dropout=0.5)
    optim.apply_rates(task, task.layers(), technique.rates(task.layers(), "all"))
    stem = task.backbone.stem
    assert stem.lora_dropout["default"].training
    assert stem.lora_A["default"].training
    assert task.objective.training
    assert not stem.base_layer.training and not task.backbone.norm.training
    shaken(task)
    batch = take(image_rows(8), range(8))
    assert not torch.equal(scores(task, batch), scores(task, batch))
    task.eval()
    assert torch.equal(scores(task, batch), scores(task, batch))


def test_kept_weights_average_and_resume_go_on_bit_for_bit(tmp_path):
    def run(folder) -> loop.TrainingRun:
        return adapted_run(
            technique=lora(dropout=0.3),
            steps=12,
            validation=image_rows(20, seed=1),
            ema=0.8,
            eval_every_steps=4,
            checkpoint_every_steps=3,
            checkpoints=str(tmp_path / folder),
        )

    whole, first = run("whole"), run("parts")
    loop.fit(whole)
    kill_at(first, 8)
    torch.manual_seed(99)
    second = run("parts")
    outcome = loop.fit(second)
    assert outcome.resumed_from == 6 and furthest(weights(second.task), weights(whole.task)) == 0.0
    assert second.keeper.step == whole.keeper.step
    assert any("lora_B" in name for name in second.keeper.weights)
    assert state_of(lora().finish(second.task)) == state_of(net_task(norm="batch", dropout=0.4))


def test_bf16_trains_and_ends_in_float32_weights():
    run = adapted_run(precision="bf16", steps=10)
    outcome = loop.fit(run)
    ended = run.technique.finish(run.task)
    assert outcome.skipped_steps == 0
    assert {tensor.dtype for tensor in ended.parameters()} == {torch.float32}


@pytest.mark.slow
def test_lora_learns_what_full_fine_tuning_learns():
    """Sentences whose adjectives tell their class, which a linear probe of this backbone does not
    learn: validation accuracy after 150 steps.

    Measured over two seeds: full 1.0, lora 0.97 and 1.0; over three, linear probe 0.5 to 0.72.
    """
    modality = text_modality()
    rows, validation = text_rows(180, modality), text_rows(60, modality, seed=1)
    found = {}
    for name, technique in (("full", Full()), ("lora", lora()), ("probe", LinearProbe())):
        task = task_of(
            "transformers/bert",
            modality.inputs(),
            "classification",
            label_state(),
            11,
            **{**SMALL, "hidden": 32},
        )
        torch.manual_seed(1)
        run = make_run(
            rows,
            technique.wrap(task),
            steps=150,
            technique=technique,
            validation=validation,
            lr=5e-3,
            global_batch=16,
            seed=1,
        )
        loop.fit(run)
        found[name] = run.keeper.metrics["accuracy"]
    assert found["full"] > 0.95
    assert found["lora"] > found["full"] - 0.05
    assert found["probe"] < 0.8, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toys/net", "transformers/bert"])
def test_compiled_training_equals_eager_training(name):
    rows = image_rows(48) if name == "toys/net" else text_rows(48)
    runs = []
    for switch in (False, True):
        task = net_task() if name == "toys/net" else made(name)[0]
        torch.manual_seed(5)
        runs.append(
            make_run(rows, lora().wrap(task), steps=4, technique=lora(), lr=1e-3, compile=switch)
        )
        loop.fit(runs[-1])
        calls = runs[-1].task.calls
        assert calls.called >= set(runs[-1].task.adapters()) and not calls._hooks
    assert furthest(weights(runs[0].task), weights(runs[1].task)) < 1e-5


def trained(ranks: Ranks, options: dict) -> dict[str, torch.Tensor]:
    run = adapted_run(net_task(), lora(**options), ranks=ranks, micro_batch=2)
    loop.fit(run)
    return weights(run.task)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, pytest.param(IN_4_BITS, marks=NEEDS_LIBRARY)], ids=str)
def test_two_ranks_give_the_weights_of_one(team, options):
    two, one = team(trained, options), trained(Ranks(), options)
    assert furthest(*two) == 0.0 and furthest(two[0], one) < 1e-5


# ---------------------------------------------------------------- weights in 4 bits

# Dettmers et al. 2023, appendix E: quantiles of a normal distribution, scaled to [-1, 1]
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight as 4 bits hold it: blocks of 64 divided by their largest magnitude, nearest level."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = (flat[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    return (torch.tensor(NF4)[nearest] * scale).flatten()[: weight.numel()].reshape(weight.shape)


def round_linear_layers(task: Task) -> list[str]:
    """Round the weights of a backbone's linear layers in place; their names."""
    names = []
    with torch.no_grad():
        for target in adaptable_weights(task.backbone):
            if target.kind in ("Linear", "Conv1D"):
                weight = task.backbone.get_submodule(target.module).weight
                turned = target.kind == "Conv1D"
                weight.copy_(rounded(weight.T).T if turned else rounded(weight))
                names.append(target.module)
    return names


@NEEDS_LIBRARY
@pytest.mark.parametrize("name", ["transformers/bert", "transformers/gpt2", "timm/test_vit"])
def test_a_base_in_4_bits_is_the_network_of_the_rounded_weights(name):
    task, batch = made(name)
    reference, order = made(name)[0], state_of(task)
    names = round_linear_layers(reference)
    whole = {name: task.backbone.get_submodule(name).weight.numel() for name in names}
    technique = lora(**IN_4_BITS)
    adapted = wrapped(task, technique)
    layers = adapted.layers()
    assert sorted(n for names in layers.values() for n in names) == sorted(
        n for n, _ in adapted.named_parameters()
    )
    for name, count in whole.items():
        held = adapted.backbone.get_submodule(name).base_layer
        tensors = [tensor for n, tensor in held.named_parameters() if n != "bias"]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert size == math.ceil(count / 2) + 4 * math.ceil(count / 64)
        assert not any(tensor.requires_grad for tensor in held.parameters())
    # what stood in full precision is gone
    assert not {n for n, tensor in adapted.state_dict().items() if tensor.is_floating_point()} & {
        f"backbone.{name}.base_layer.weight" for name in names
    }
    assert (scores(adapted, batch) - scores(reference, batch)).abs().max() < 1e-5
    want = scores(shaken(adapted), batch)
    ended = technique.finish(adapted)
    assert type(ended) is Task and state_of(ended) == order
    assert (scores(ended, batch) - want).abs().max() < 1e-5


@NEEDS_LIBRARY
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=str)
def test_training_in_4_bits_equals_training_on_rounded_weights(options):
    """So gradients flow through the layers in 4 bits, and nothing but adapters and head moves."""
    rows = text_rows(48)
    runs = []
    for is_held in (True, False):
        task = made("transformers/bert")[0]
        if not is_held:
            round_linear_layers(task)
        technique = lora(rank=4, **options, **(IN_4_BITS if is_held else {}))
        torch.manual_seed(5)
        run = make_run(
            rows, technique.wrap(task), steps=8, technique=technique, lr=5e-3, warmup=0.0
        )
        before = weights(run.task)
        loop.fit(run)
        after = weights(run.task)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {*added(run.task), *run.task.layers()["head"]}
        runs.append(weights(technique.finish(run.task)))
    assert furthest(*runs) < 1e-5


@NEEDS_LIBRARY
def test_the_loss_falls_in_4_bits_and_in_bf16():
    for precision in ("fp32", "bf16"):
        logs: list[dict] = []
        run = adapted_run(
            net_task(), lora(**IN_4_BITS), precision=precision, steps=30, lr=0.03, log_every_steps=5
        )
        run.on_log = logs.append
        outcome = loop.fit(run)
        assert outcome.skipped_steps == 0 and logs[-1]["loss"] < 0.7 * logs[0]["loss"]
        ended = run.technique.finish(run.task)
        assert {tensor.dtype for tensor in ended.parameters()} == {torch.float32}


@NEEDS_LIBRARY
def test_loftq_starts_nearer_the_source():
    """The adapter is the best of its rank for what 4 bits leave (Eckart and Young), and several
    rounds leave less than one."""
    plain = made("transformers/bert")[0]
    left_over = {}
    for label, options, rounds in (
        ("zero", {}, 5),
        ("one", {"start": "loftq"}, 1),
        ("five", {"start": "loftq"}, 5),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.techniques.peft.LOFTQ_ROUNDS", rounds)
            adapted = wrapped(made("transformers/bert")[0], lora(alpha=4.0, **IN_4_BITS, **options))
        total = 0.0
        for name in adapted.adapters():
            layer = adapted.backbone.get_submodule(name)
            weight = plain.backbone.get_submodule(name).weight
            missing = weight - layer.base_layer.weight
            rest = missing - layer.get_delta_weight("default")
            if options:
                values = torch.linalg.svdvals(missing.detach())
                rest_norm = float(rest.detach().norm())
                assert rest_norm == pytest.approx(float(values[8:].norm()), rel=1e-3)
            total += float(rest.square().sum().detach())
        left_over[label] = total
    assert left_over["five"] < left_over["one"] < left_over["zero"]


@NEEDS_LIBRARY
def test_a_run_in_4_bits_goes_on_bit_for_bit(tmp_path):
    def run(folder) -> loop.TrainingRun:
        technique = lora(dropout=0.3, **IN_4_BITS)
        words = {"ema": 0.8, "checkpoint_every_steps": 2}
        return adapted_run(technique=technique, checkpoints=str(tmp_path / folder), **words)

    assert_a_killed_run_ends_as_a_whole_one(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "loftq"}, "set quantize: nf4 too"),
        ({"start": "loftq", "dora": True, **IN_4_BITS}, "leave start: loftq out"),
        ({"start": "pissa", **IN_4_BITS}, "set start: loftq"),
    ],
    ids=str,
)
def test_starts_that_4_bits_allow(options, message):
    with pytest.raises(ValueError, match=message):
        lora(**options)


def test_a_backbone_without_linear_layers_cannot_be_held_in_4_bits():
    with pytest.raises(ValueError, match=r"timm/test_resnet has no linear layer .*leave quantize"):
        lora(**IN_4_BITS).wrap(made("timm/test_resnet")[0])


# ---------------------------------------------------------------- trials


def text_world(folder: Path):
    """What ``toys.job_of`` and ``toys.shared_of`` give for images, for sentences."""
    paths = {}
    for seed, (split, n) in enumerate({"train": 60, "validation": 24, "test": 30}.items()):
        said, labels = toys.sentences(n, seed)
        paths[split] = str(folder / f"{split}.parquet")
        pq.write_table(
            pa.table({"text": said, "label": [f"class {i}" for i in labels]}), paths[split]
        )
    modality = text_modality()
    arch = Architecture("transformers/bert", SMALL, modality.inputs())
    data = {**paths, "modality": "text", "columns": {"text": "text", "label": "label"}}
    source = {"data": data, "backbone": {"transformers/bert": SMALL}, "objective": "classification"}
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "techniques": ["scratch", "lora"],
            "sources": {"src": source},
            "targets": {
                "task": {
                    "data": data,
                    "objective": "classification",
                    "train": {"steps": 8, "global_batch": 16, "lr": 0.01},
                }
            },
        }
    )
    base = grid.backbone_groups(
        {"src": (arch, ModalitySpec("text", modality.options.model_dump(), modality.state))}
    )[0]
    held = {
        name: tensor.numpy()
        for name, tensor in bundle.build_backbone(arch, seed=77).state_dict().items()
    }
    return job, trial.Shared(
        job="toy",
        root=str(folder / "root"),
        seed=0,
        backbone_groups={base.key: base},
        weights={"src": held},
        parents={"src": "bundle:src"},
        targets={("task", base.key): targets.prepare(targets.plan_target(job, "task"), base)},
        keep_bundles=True,
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    paths = toys.image_files(folder / "data", {"train": 60, "validation": 24, "test": 30})
    job = toys.job_of(folder, paths)
    return {
        "image": (job, toys.shared_of(folder, job, paths, keep_bundles=True)),
        "text": text_world(tmp_path_factory.mktemp("text")),
    }


@pytest.fixture
def world(worlds):
    return worlds["image"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("image", {}),
        ("text", {}),
        pytest.param("image", {**IN_4_BITS, "start": "loftq"}, marks=NEEDS_LIBRARY),
        pytest.param("text", IN_4_BITS, marks=NEEDS_LIBRARY),
    ],
    ids=str,
)
def test_a_trial_s_bundle_is_the_plain_task_and_predicts_what_was_recorded(worlds, kind, options):
    job, shared = worlds[kind]
    one = trial_of(job, shared, {"lora": {**PLUG["lora"], **options}})
    record = trial.run(one, shared)
    assert record.status == "done", record.error
    test = next(row for row in record.rows if row.split == "test")
    plain, _, _ = trial.build_task(one, shared)
    kept = bundle.load(test.bundle_uri)
    assert list(kept.task().state_dict()) == list(plain.state_dict())
    data = shared.targets["task", one.backbone_key]
    found = scores(kept.task(), take(data.test, range(len(data.test))))
    with np.load(
        io.BytesIO(
            storage.read_bytes(storage.join(trial.folder_uri(shared, one), "predictions.npz"))
        )
    ) as held:
        assert np.abs(held["scores"] - found.numpy()).max() < 1e-5
    moved = {
        name
        for name, tensor in kept.backbone_tensors().items()
        if not torch.equal(tensor, torch.from_numpy(shared.weights["src"][name]))
    }
    assert moved and moved <= {name for name in shared.weights["src"] if name.endswith("weight")}
    assert test.params_trained < sum(p.numel() for p in plain.parameters()) / 2


def test_a_trial_s_seed_makes_its_adapters(world, monkeypatch):
    job, shared = world
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(
        loop,
        "fit",
        lambda run: seen.append(weights(run.task)) or (_ for _ in ()).throw(loop.NonFiniteError),
    )
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        with pytest.raises(loop.NonFiniteError):
            trial.run(trial_of(job, shared, PLUG, seed=seed), replace(shared, keep_bundles=False))
    first = [{name: tensor for name, tensor in held.items() if "lora_A" in name} for held in seen]
    assert furthest(first[0], first[1]) == 0.0 and furthest(first[0], first[2]) > 0.01


def test_lora_trials_run_one_by_one(world):
    """Only a frozen backbone's heads train together."""
    job, shared = world
    units = fanout.group_into_work_items(
        [trial_of(job, shared, PLUG, seed=seed) for seed in (0, 1)], shared
    )
    assert [(len(unit.trials), unit.is_stack) for unit in units] == [(1, False), (1, False)]
