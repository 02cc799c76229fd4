"""Bottleneck adapters start as nothing, train alone, and are loaded again from a bundle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from techniques.test_rates import FAMILIES, built, moved
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from toys import (
    assert_a_killed_run_ends_as_a_whole_one,
    image_files,
    image_rows,
    job_of,
    label_state,
    make_run,
    net_task,
    shared_of,
    take,
    task_of,
    trial_of,
    weights,
)

from pipeline.checkpoints import bundle, export
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Task, Technique, layer_rates
from pipeline.core.nn.filter_maps import change_filters
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec, Spec
from pipeline.techniques.bottleneck import Adapter, BottleneckTask
from pipeline.train import loop, source
from pipeline.transfer import trial

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
WIDTH = 5
IMAGE = {"size": 32, "channels": 3}


def bottleneck(**options):
    kind = registry.get("technique", "bottleneck")
    return kind(kind.options_class(**{"width": WIDTH, **options}))


def wrapped(task: Task, **options) -> BottleneckTask:
    torch.manual_seed(0)
    found = bottleneck(**options).wrap(task)
    assert isinstance(found, BottleneckTask)
    return found


@torch.no_grad()
def scores(task: Task, batch) -> torch.Tensor:
    return task.eval().objective.predict(task.backbone, batch)["scores"]


def is_adapter(name: str) -> bool:
    return ".bottleneck." in name


@torch.no_grad()
def wake_adapters(task: Task) -> None:
    """Give every adapter an effect."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in task.named_parameters():
        if is_adapter(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------- the defining property


@pytest.mark.parametrize("kind", KINDS)
def test_bottleneck_starts_as_the_source_and_trains_adapters_and_head_alone(kind):
    task, rows = classified(KINDS[kind])
    batch = take(rows, range(4))
    plain, before = scores(task, batch), weights(task)
    task = wrapped(task, lr_scale=1.0)
    assert (scores(task, batch) - plain).abs().max() < 1e-6
    start = weights(task)
    used = bottleneck(lr_scale=1.0)
    run = make_run(rows, task, steps=4, technique=used, lr=0.05, warmup=0.0, weight_decay=0.1)
    outcome = loop.fit(run)
    after = weights(task)
    changed = moved(start, after)
    assert all(
        torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if not name.startswith("objective.")
    ), "buffers too"
    adapters = {name for name in after if is_adapter(name)}
    head = {f"objective.{name}" for name, _ in task.objective.named_parameters()}
    assert changed == adapters | head
    filters = [len(after[name]) for name in adapters if name.endswith(".up.bias")]
    assert len(filters) == len(task.places) >= 2
    assert sorted(filters) == sorted(task.places.values())
    count = sum(2 * WIDTH * one + WIDTH + one for one in filters)
    assert outcome.params_trained == count + sum(after[name].numel() for name in head)
    assert outcome.layers_trained.startswith("adapters of ")
    assert (scores(task, batch) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_norms_train_too_where_that_is_asked_for(kind):
    task, rows = classified(KINDS[kind])
    norms = {
        f"backbone.{name}.{one}"
        for name, module in task.backbone.named_modules()
        if type(module).__name__ in ("BatchNorm1d", "BatchNorm2d", "LayerNorm")
        for one, _ in module.named_parameters()
    }
    task = wrapped(task, norms=True)
    start, used = weights(task), bottleneck(norms=True, lr_scale=1.0, freeze_norm_stats=True)
    loop.fit(make_run(rows, task, steps=2, technique=used, lr=0.05, warmup=0.0))
    changed = moved(start, weights(task))
    head = {name for name in changed if name.startswith("objective.")}
    assert changed - head == norms | {name for name in start if is_adapter(name)}
    assert [one for one, _ in task.named_parameters() if one in norms] == [
        one for layer, names in task.layers().items() if layer.endswith("/norms") for one in names
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_its_bundle_predicts_what_it_predicted(kind, tmp_path):
    make_sample, name = MODALITIES[kind]
    task, rows = classified(name)
    options = {"activation": "gelu", "modules": "all"}
    task = wrapped(task, **options)
    wake_adapters(task)
    batch = take(rows, range(8))
    expected = scores(task, batch)
    technique = Spec("bottleneck", {"width": WIDTH, **options})
    uri = str(tmp_path / "bundle")
    sample = make_sample()
    fitted = sample.fitted(name)
    spec = ModalitySpec(sample.modality, fitted.options.model_dump(), fitted.state)
    bundle.save(uri, task, spec, technique=technique)
    found = bundle.load(uri).task()
    assert isinstance(found, BottleneckTask) and found.places == task.places
    assert torch.equal(scores(found, batch), expected)


# ---------------------------------------------------------------- every family of backbones


@pytest.mark.parametrize("modules", ["last", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_is_reached(name, modules):
    """A gradient for each one; the same with gradients and without (torch's encoder layer has
    another way then); a row is predicted alike whatever rows stand beside it."""
    task, rows = built(name)
    layers = list(task.layers())
    task = wrapped(task, modules=modules, activation="gelu")
    wake_adapters(task)
    assert [layer for layer in task.layers() if "/" not in layer] == layers
    found = sorted(one for names in task.layers().values() for one in names)
    assert found == sorted(one for one, _ in task.named_parameters())
    batch = take(rows, range(4))
    task.eval()(batch)[0].backward()
    for one, parameter in task.named_parameters():
        if is_adapter(one):
            assert parameter.grad is not None and parameter.grad.any(), one
    together = task.objective.predict(task.backbone, batch)["scores"].detach()
    torch.testing.assert_close(scores(task, batch), together, rtol=1e-4, atol=1e-5)
    alone = torch.cat([scores(task, take(rows, [i])) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    task, rows = classified(KINDS["image"])

    def run(folder):
        return make_run(
            rows,
            wrapped(copy.deepcopy(task)),
            steps=6,
            technique=bottleneck(),
            lr=0.01,
            checkpoint_every_steps=2,
            checkpoints=str(tmp_path / folder),
        )

    assert_a_killed_run_ends_as_a_whole_one(run)


def test_bottleneck_takes_objectives_that_read_more_than_pooled_features():
    for name in ("tagging", "detection", "segmentation", "ctc"):
        task, rows = OBJECTIVES[name].build(name)[:2]
        task = wrapped(task)
        start = weights(task)
        loop.fit(make_run(rows, task, steps=1, technique=bottleneck(), lr=0.01, warmup=0.0))
        changed = moved(start, weights(task))
        assert any(is_adapter(one) for one in changed)
        assert all(is_adapter(one) or one.startswith("objective.") for one in changed)


# ---------------------------------------------------------------- an adapter


def by_hand(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """x + W2 relu(W1 x + b1) + b2 for x (..., C)."""
    down, up = adapter.down, adapter.up
    hidden = (torch.einsum("wc,...c->...w", down.weight, x) + down.bias).clamp(min=0)
    return x + torch.einsum("cw,...w->...c", up.weight, hidden) + up.bias


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "gru", "packed", "attention"])
def test_outputs_go_through_it_filter_by_filter(kind):
    torch.manual_seed(0)
    adapter = Adapter(6, 3, "relu")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 7, 6)
    if kind == "linear":
        module = nn.Linear(6, 6)
        output = module(x)
        found, expected = change_filters(module, output, adapter), by_hand(adapter, output)
    elif kind == "conv1d":
        module = nn.Conv1d(6, 6, 3)
        output = module(x.mT)
        found, expected = change_filters(module, output, adapter), by_hand(adapter, output.mT).mT
    elif kind == "conv2d":
        module = nn.Conv2d(1, 6, 3)
        output = module(x[:, None])
        found = change_filters(module, output, adapter)
        expected = by_hand(adapter, output.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    elif kind == "gru":
        module = nn.GRU(6, 3, batch_first=True, bidirectional=True)
        output, last = module(x)
        found, state = change_filters(module, (output, last), adapter)
        assert state is last
        expected = by_hand(adapter, output)
    elif kind == "packed":
        module = nn.GRU(6, 6, batch_first=True)
        lengths = torch.tensor([7, 4])
        output, last = module(pack_padded_sequence(x, lengths, batch_first=True))
        found, _ = change_filters(module, (output, last), adapter)
        found, kept = pad_packed_sequence(found, batch_first=True)
        assert torch.equal(kept, lengths) and not found[1, 4:].any()
        plain, _ = pad_packed_sequence(output, batch_first=True)
        expected = by_hand(adapter, plain)
        expected[1, 4:] = 0
    else:
        module = nn.MultiheadAttention(6, 2, batch_first=True)
        output, shares = module(x, x, x)
        found, rest = change_filters(module, (output, shares), adapter)
        assert rest is shares
        expected = by_hand(adapter, output)
    torch.testing.assert_close(found, expected)


def test_an_adapter_stands_behind_the_layer_that_is_named():
    task = wrapped(net_task(), modules=["stem"])
    wake_adapters(task)
    assert list(task.places) == ["stem"]
    stem, plain = (one.backbone.get_submodule("stem") for one in (task, net_task()))
    adapter = stem.get_submodule("bottleneck")
    assert isinstance(adapter, Adapter)
    x = torch.randn(5, 64)
    torch.testing.assert_close(stem(x), by_hand(adapter, plain(x)))


def test_places_of_the_papers():
    bert, _ = classified("transformers/bert")
    block = "model.encoder.layer"
    assert list(wrapped(bert).places) == [f"{block}.{i}.output.dense" for i in (0, 1)]
    bert, _ = classified("transformers/bert")
    endings = ["attention.output.dense", "output.dense"]
    assert list(wrapped(bert, modules=endings).places) == [
        f"{block}.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")
    ]


def test_adapters_of_frozen_layers_do_not_train():
    task, _ = classified("transformers/bert")
    layers = wrapped(task).layers()
    rates = layer_rates(bottleneck(freeze="block00", lr_scale=10.0, layer_decay=0.5), layers, "all")
    assert {name: rate for name, rate in rates.items() if rate} == {
        "block01/adapters": 10.0 * 0.5 ** (len([n for n in layers if "/" not in n]) - 3),
        "head": 1.0,
    }


# ---------------------------------------------------------------- refusals


def test_modules_that_are_not_there_are_told_with_those_that_are():
    with pytest.raises(
        ValueError,
        match=r"transformers/bert has no module ending with fc1\. Its .* end with: dense, key, ",
    ):
        wrapped(classified("transformers/bert")[0], modules=["query", "fc1"])


def assert_a_block_that_goes_past_is_named(technique: Technique) -> None:
    """A forward that is replaced, so that the code of its class does not tell: as timm's BEiT, it
    multiplies by the weights of qkv and never calls it.
    """
    rows = image_rows(16, size=32, channels=3)
    task = task_of("timm/test_vit", IMAGE, "classification", label_state())
    attention: Any = task.backbone.get_submodule("model.blocks.0.attn")
    attention.forward = lambda x, **words: attention.proj(
        nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias)[..., : x.shape[-1]]
    )
    run = make_run(rows, technique.wrap(task), steps=2, technique=technique)
    with pytest.raises(
        ValueError,
        match=r"timm/test_vit uses the weights of model.blocks.0.attn.qkv without calling "
        r".*modules: \[fc1, fc2, proj\]",
    ):
        loop.fit(run)


def test_adapters_that_a_block_goes_past_are_told_at_the_first_batch():
    assert_a_block_that_goes_past_is_named(bottleneck(modules="all"))


def test_a_trial_s_bundle_gives_what_was_recorded_and_is_refused_as_a_source(tmp_path):
    paths = image_files(tmp_path, {"train": 16, "validation": 8, "test": 8})
    job = job_of(tmp_path, paths, train={"steps": 3})
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    record = trial.run(trial_of(job, shared, {"bottleneck": {"width": WIDTH}}), shared)
    row = record.rows[0]
    found = bundle.load(str(row.bundle_uri))
    technique = found.manifest.technique
    assert technique is not None and technique.name == "bottleneck"
    batch = take(next(iter(shared.targets.values())).test, range(8))
    hits = (scores(found.task(), batch).argmax(-1) == batch["label"]).float().mean()
    assert float(hits) == pytest.approx(row.value)
    spec = {"backbone": f"bundle:{row.bundle_uri}"}
    next_job = Job.model_validate({**job.model_dump(mode="json"), "sources": {"next": spec}})
    with pytest.raises(ValueError, match=r"sources\.next: bundle:.* fine-tuned with bottleneck"):
        source.plan_source(next_job, "next")


@pytest.mark.parametrize("name", ["bottleneck", "head_to_toe", "side_tuning"])
def test_networks_with_modules_of_a_technique_are_copied_and_no_other_library_s(name, tmp_path):
    arch = Architecture("timm/test_vit", {}, IMAGE)
    head = ObjectiveSpec("classification", {}, label_state())
    spec = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3})
    uri, copied = str(tmp_path / "bundle"), str(tmp_path / "copy")
    task = registry.get("technique", name)().wrap(bundle.build_task(arch, head, 0))
    wake_adapters(task)
    bundle.save(uri, task, spec, technique=Spec(name))
    export.export_bundle(uri, copied, "bundle", False)
    batch = take(image_rows(4, size=32, channels=3), range(4))
    with torch.no_grad():
        features = [
            one.eval()(batch).pooled for one in (task.backbone, bundle.load(copied).backbone())
        ]
    assert torch.equal(*features)
    message = rf"fine-tuned with {name}, whose .*--kind bundle copies it"
    for kind in ("hugging-face", "state-dict"):
        for backbone_only in (False, True):
            with pytest.raises(bundle.BundleError, match=message):
                export.export_bundle(uri, str(tmp_path / "out.pt"), kind, backbone_only)
