"""Every method of adapters reaches every weight matrix of every family of backbones, starts from
nothing, moves nothing else, and can be merged.
"""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from techniques.test_rates import FAMILIES, built, moved
from torch import nn
from toys import (
    assert_a_killed_run_ends_as_a_whole_one,
    image_rows,
    make_run,
    net_task,
    take,
    weights,
)

from pipeline.config import registry
from pipeline.config.schema import Train
from pipeline.core.contracts import Task, Technique
from pipeline.core.contracts.technique import whole_layer
from pipeline.techniques import peft
from pipeline.techniques.peft import ADDED, AdaptedTask, AdapterTechnique, Lora, LoraOptions
from pipeline.train import loop, optim

METHODS: dict[str, dict] = {
    "lora": {},
    "lora dora": {"dora": True},
    "lora pissa": {"start": "pissa"},
    "ia3": {"lr_scale": 10.0},
    "vera": {"rank": 16, "lr_scale": 10.0},
    "oft": {},
    "loha": {},
    "lokr": {},
    "adalora": {},
}
"""Techniques of `pipeline.techniques.peft` with options that change how they compute."""
LIKE_OTHERS = (
    "events/gru",
    "events/strats",
    "hf/electra",
    "hf/hubert",
    "hf/patchtst",
    "policy/mlp",
    "policy/transformer",
    "table/ft_transformer",
    "timm/convnext_atto",
    "timm/resnet10t",
    "timm/vit_tiny_patch16_224",
    "torchaudio/deepspeech",
    "transformers/bert",
    "transformers/distilbert",
    "transformers/roberta",
    "wavenet/wavenet",
)
"""Backbones with no kind of layer that another one lacks: LoRA alone is tried on them."""
CASES = [
    (method, name)
    for method in METHODS
    for name in FAMILIES
    if method == "lora" or name not in LIKE_OTHERS
]


def made(method: str, **options) -> Technique:
    kind = registry.get("technique", method.split()[0])
    # a rate at which a step is small
    words = {"lr_scale": 1.0, **METHODS[method], **options}
    return kind(kind.options_class(**words))


def test_every_method_is_tried():
    theirs = {
        name
        for name in registry.names("technique")
        if issubclass(registry.get("technique", name), AdapterTechnique)
    }
    assert theirs == {method.split()[0] for method in METHODS}


@torch.no_grad()
def scores(task: Task, rows) -> torch.Tensor:
    task.eval()
    return task.objective.predict(task.backbone, take(rows, range(4)))["scores"]


def adapted_names(task: Task) -> set[str]:
    """Weights of linear, convolution, recurrent and attention layers, by torch's own names.

    Left out are depthwise kernels and the weight-normalised positions of wav2vec 2.0.
    """
    found = set()
    for name, module in task.backbone.named_modules():
        if hasattr(module, "parametrizations") or isinstance(module, nn.Embedding):
            continue
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1:
            continue
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D":
            own = dict(module.named_parameters(recurse=False))
            found |= {f"backbone.{name}.{one}" for one, p in own.items() if p.dim() > 1}
    return found


@pytest.mark.parametrize(("method", "name"), CASES)
def test_adapters_reach_every_weight_and_end_in_it(method, name):
    task, rows = built(name)
    before, plain, expected = weights(task), scores(task, rows), adapted_names(task)
    own_layers = set(task.layers())
    technique = made(method)
    torch.manual_seed(0)
    wrapped = technique.wrap(task)
    assert isinstance(wrapped, AdaptedTask)
    assert (scores(wrapped, rows) - plain).abs().max() < 1e-5, "it starts from nothing"
    layers = wrapped.layers()
    assert [whole_layer(layer) for layer in layers][-1] == "head"
    assert {whole_layer(layer) for layer in layers} == own_layers
    assert sorted(one for names in layers.values() for one in names) == sorted(
        one for one, _ in wrapped.named_parameters()
    )
    start = weights(wrapped)
    run = make_run(rows, wrapped, steps=1, technique=technique, lr=0.02, warmup=0.0)
    outcome = loop.fit(run)
    own = {one for layer in layers if layer.endswith(f"/{ADDED}") for one in layers[layer]}
    moving = {one for one in moved(start, weights(wrapped)) if not one.startswith("budget.")}
    assert moving <= own | set(layers["head"])
    assert outcome.layers_trained.startswith("adapters of ")
    unmerged = scores(wrapped, rows)
    assert (unmerged - plain).abs().max() > 1e-3
    ended = technique.finish(wrapped)
    assert type(ended) is Task and list(ended.state_dict()) == list(before)
    assert (scores(ended, rows) - unmerged).abs().max() < 1e-5
    changed = moved(before, ended.state_dict())
    if method == "oft":  # a single input cannot be rotated
        expected = {one for one in expected if before[one].flatten(1).shape[1] > 1}
    assert expected <= changed
    scaled_biases = {one for one in changed if "bias" in one.rpartition(".")[2]}
    assert changed - expected - set(layers["head"]) <= (scaled_biases if method == "ia3" else set())


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_computed_is_the_one_that_peft_s_layer_applies(method, monkeypatch):
    """The same adapters in peft's own layers and in computed weights give the same outputs."""
    found = []
    for is_computed in (False, True):
        technique = made(method)
        monkeypatch.setattr(type(technique), "replaces", lambda *_, now=is_computed: not now)
        torch.manual_seed(3)
        task = net_task()
        with torch.no_grad():  # IA3 of peft scales biases too, which are no part of a weight
            task.backbone.stem.bias.zero_()
            task.backbone.block.bias.zero_()
        task = technique.wrap(task)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer, names in task.layers().items():
                for one in names if layer.endswith(f"/{ADDED}") else ():
                    p = task.get_parameter(one)
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        hidden = task.backbone.stem(rows)
        found.append(task.backbone.block(hidden.relu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def update(method: str, **options) -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """A layer's weight before and after random adapters were merged, and peft's layer."""
    technique = made(method, **options)
    torch.manual_seed(3)
    task = technique.wrap(net_task())
    assert isinstance(task, AdaptedTask)
    with torch.no_grad():
        for layer, names in task.layers().items():
            for one in names if layer.endswith(f"/{ADDED}") else ():
                p = task.get_parameter(one)
                p.add_(0.3 * torch.randn_like(p))
    layer = task.backbone.stem
    before = net_task().backbone.stem.weight.detach()
    merged = task.merged().backbone.stem.weight.detach()
    return before, merged, layer


def held(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", "").removesuffix(".weight"): p.detach()
        for name, p in layer.named_parameters()
    }


def test_ia3_scales_rows():
    before, after, layer = update("ia3")
    torch.testing.assert_close(after, before * held(layer)["ia3_l"])


def test_vera_s_update_is_the_paper_s():
    """b * B d * A with A and B the same for all layers (Kopiczko et al. 2024, equation 2)."""
    before, after, layer = update("vera")
    own = held(layer)
    a, b = layer.vera_A["default"][:, :64], layer.vera_B["default"][:16]
    expected = own["vera_lambda_b"][:, None] * b @ (own["vera_lambda_d"][:, None] * a)
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-6)


def test_oft_keeps_angles_and_lengths():
    before, after, _ = update("oft")
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-5)


def test_loha_s_update_is_a_product_of_two_low_ranks():
    before, after, layer = update("loha", rank=2, alpha=2.0)
    own = held(layer)
    first = own["hada_w1_a"] @ own["hada_w1_b"]
    second = own["hada_w2_a"] @ own["hada_w2_b"]
    torch.testing.assert_close(after - before, first * second, rtol=1e-4, atol=1e-6)


def test_lokr_s_update_is_a_kronecker_product():
    before, after, layer = update("lokr", rank=1, alpha=1.0)
    own = held(layer)
    second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    torch.testing.assert_close(after - before, torch.kron(own["lokr_w1"], second))


def test_pissa_trains_the_largest_singular_values():
    """W = B A + the rest, whose largest singular value is W's next one (Meng et al. 2024)."""
    technique = made("lora pissa", rank=4)
    task = technique.wrap(net_task())
    weight = net_task().backbone.stem.weight.detach()
    layer = task.backbone.stem
    part = layer.get_delta_weight("default").detach()
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(part)[:4], values[:4], rtol=1e-4, atol=1e-5)
    rest = torch.linalg.svdvals(layer.base_layer.weight.detach())
    torch.testing.assert_close(rest[0], values[4], rtol=1e-4, atol=1e-5)


def test_rates_of_adapters_decay_and_freeze_with_their_layer():
    technique = made("lora", freeze="stem", lr_scale=3.0)
    task = technique.wrap(net_task())
    start = weights(task)
    loop.fit(make_run(image_rows(16), task, steps=2, technique=technique, lr=0.02, warmup=0.0))
    changed = moved(start, weights(task))
    assert changed and not any("stem" in name for name in changed)
    assert any("block.lora_B" in name for name in changed)


def test_a_run_by_computed_weights_goes_on_bit_for_bit(tmp_path):
    def run(folder) -> loop.TrainingRun:
        technique = made("lora")
        task, rows = built("events/gru")
        torch.manual_seed(5)
        return make_run(
            rows,
            technique.wrap(task),
            steps=6,
            technique=technique,
            lr=0.01,
            checkpoint_every_steps=2,
            checkpoints=str(tmp_path / folder),
        )

    assert_a_killed_run_ends_as_a_whole_one(run)


def test_modules_are_named_by_their_endings():
    found = peft.adaptable_weights(built("events/gru")[0].backbone)
    names = {target.name for target in found}
    assert {"body.gru.weight_ih_l0", "body.gru.weight_hh_l0"} <= names
    task, _ = built("events/gru")
    adapted = made("lora", modules=["weight_hh_l0"]).wrap(task)
    assert [name.split(".")[-3:-1] for name in adapted.adapters()] == [["weight_hh_l0", "0"]]
    both = made("lora", modules=["gru"]).wrap(built("events/gru")[0])
    assert len(both.adapters()) == 2


def test_adalora_takes_the_ranks_that_peft_takes():
    """peft's allocator on the same weights and gradients, step by step."""
    options = {"start_rank": 4, "rank": 2, "warm_share": 0.2, "final_share": 0.3}
    technique = made("adalora", **options)
    torch.manual_seed(2)
    task = technique.wrap(net_task())
    total = sum(phase.steps for phase in technique.phases(20))
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=total, tinit=4, tfinal=6, deltaT=1)
    theirs = RankAllocator(task.backbone, config, "default")
    generator = torch.Generator().manual_seed(0)
    layers = [task.backbone.get_submodule(name) for name in task.adapters()]
    counts = []
    for step in range(total):
        for name, p in task.backbone.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator)
                p.grad = torch.randn(p.shape, generator=generator)
        held = [layer.lora_E["default"].detach().clone() for layer in layers]
        if step < total - config.tfinal:
            _, pattern = theirs.update_and_allocate(task.backbone, step)
        elif step == total - config.tfinal:
            _, pattern = theirs.update_and_allocate(task.backbone, step, force_mask=True)
        else:
            theirs.mask_using_rank_pattern(task.backbone, pattern)
        expected = [layer.lora_E["default"].detach() != 0 for layer in layers]
        for layer, values in zip(layers, held, strict=True):
            layer.lora_E["default"].data.copy_(values)
        technique.read_gradients(task, "all", step)
        task.budget.apply_to_layers()
        found = [layer.lora_E["default"].detach() != 0 for layer in layers]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), step
        counts.append(sum(int(one.sum()) for one in found))
    assert counts[:5] == [8] * 5 and counts[-6:] == [4] * 6
    assert counts == sorted(counts, reverse=True)


def test_ranks_that_were_taken_stay_away_in_training_and_at_the_end():
    """Also from weights that are exchanged between two steps, as by an average."""
    technique = made("adalora", start_rank=4, rank=1, warm_share=0.1, final_share=0.4)
    task = technique.wrap(net_task())
    rows = image_rows(32)
    run = make_run(rows, task, steps=20, technique=technique, lr=0.05, validation=rows)
    loop.fit(run)
    values = [task.backbone.get_submodule(name).lora_E["default"] for name in task.adapters()]
    scores(task, rows)
    ranks = [int((one != 0).sum()) for one in values]
    assert sum(ranks) == len(values)
    with torch.no_grad():
        for one in values:
            one.fill_(1.0)
    scores(task, rows)
    assert [int((one != 0).sum()) for one in values] == ranks
    before = net_task().backbone.stem.weight.detach()
    ended = technique.finish(task)
    change = ended.backbone.stem.weight.detach() - before
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == ranks[0]
    assert not ended.backbone._forward_pre_hooks


@pytest.mark.parametrize(
    ("method", "name"), [("ia3", "transformers/bert"), ("lora dora", "timm/resnet10t")]
)
def test_weight_decay_leaves_what_multiplies_weights_alone(method, name):
    """With gradients of zero decay alone moves parameters: lengths and scales must not shrink."""
    task, _ = built(name)
    wrapped = made(method).wrap(task)
    train = Train(lr=0.1, weight_decay=0.5)
    rates = dict.fromkeys(dict(wrapped.named_parameters()), 1.0)
    before = weights(wrapped)
    optimizer = optim.build_optimizer(optim.parameter_groups(wrapped, rates, train), train)
    for parameter in wrapped.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scales = [n for n in before if "ia3_l" in n or "magnitude" in n]
    assert any(before[n].dim() > 1 for n in scales)
    assert not set(scales) & set(moved(before, weights(wrapped)))
    assert "objective.head.weight" in moved(before, weights(wrapped))


def test_computed_weights_have_no_dropout_in_dora_either():
    """Dropout of the unit matrix that gives a weight would drop whole columns of its update."""
    task, _ = built("events/gru")
    technique = Lora(LoraOptions(dora=True, dropout=0.5))
    wrapped = technique.wrap(task).train()
    weight = "body.gru.weight_ih_l0"
    module, _, own = weight.rpartition(".")
    computed = wrapped.backbone.get_submodule(module)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    in_training = getattr(computed, own).detach().clone()
    assert torch.equal(getattr(computed, own), in_training)
    merged = technique.finish(wrapped)
    torch.testing.assert_close(merged.backbone.get_parameter(weight), in_training)
