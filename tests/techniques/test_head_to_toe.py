"""Head2Toe reads every layer, ranks features by a group lasso and solves a head on the best ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract_rows import BACKBONES, MODALITIES, OBJECTIVES, classified
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from toys import image_rows, image_splits, job_of, net_task, shared_of, take, trial_of, weights

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.batch import Batch
from pipeline.core.contracts import Task
from pipeline.objectives.classification import Classification
from pipeline.techniques.head_to_toe import LayersBackbone
from pipeline.transfer import cached_heads, solved_heads

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
EACH = pytest.mark.parametrize("kind", KINDS)


def head_to_toe(**options):
    kind = registry.get("technique", "head_to_toe")
    return kind(kind.options_class(**options))


@torch.no_grad()
def pooled(backbone: nn.Module, rows, numbers) -> torch.Tensor:
    return backbone.eval()(take(rows, numbers)).pooled


# ---------------------------------------------------------------- features of all layers


@EACH
def test_features_are_the_outputs_of_all_layers(kind):
    """Against hooks of torch: the mean over real positions of what each layer returns."""
    task, rows = classified(KINDS[kind])
    batch, seen, lengths = take(rows, range(4)), {}, {}

    def note(name):
        def hook(module, inputs, output):
            found = output[0] if type(output) is tuple else output
            seen[name] = found
            if isinstance(found, PackedSequence):
                seen[name], lengths[name] = pad_packed_sequence(found, batch_first=True)

        return hook

    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
    hooks = [
        module.register_forward_hook(note(name))
        for name, module in task.backbone.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        features = task.eval().backbone(batch, want=("tokens",))
    for hook in hooks:
        hook.remove()
    before = weights(task.backbone)
    backbone = LayersBackbone(task.backbone)
    found = pooled(backbone, rows, range(4))
    assert found.shape == (4, backbone.pooled_dim)
    parts = found.split([task.backbone.pooled_dim, *backbone.widths.values()], 1)
    own = F.layer_norm(features.pooled, features.pooled.shape[1:])
    torch.testing.assert_close(parts[0], own, rtol=1e-5, atol=1e-5)
    compared = 0
    for name, part in zip(backbone.widths, parts[1:], strict=True):
        output = seen.get(name)
        if not part.any():  # not called, or it is not known which positions are real, or whose
            assert output is None or features.mask is not None
            continue
        output = output.unflatten(0, (4, -1)) if len(output) > 4 else output  # of channels
        if isinstance(task.backbone.get_submodule(name), nn.modules.conv._ConvNd):
            output = output.movedim(1, -1)
        means = []
        for i, values in enumerate(output):
            real = values.reshape(-1, values.shape[-1])
            if name in lengths:
                real = values[: lengths[name][i]]
            elif features.mask is not None and output.dim() > 2:
                real = values[features.mask[i]]
            means.append(real.mean(0))
        want = F.layer_norm(torch.stack(means), (len(part[0]),))
        torch.testing.assert_close(part, want, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared >= 2
    assert {f"base.{name}" for name in before} == set(backbone.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "timm/vgg11" else ())
        for name in sorted({*KINDS.values(), *BACKBONES})
    ],
)
def test_features_of_a_row_do_not_depend_on_the_rows_beside_it(name):
    """Padding is left out: features are kept, and the same rows are predicted in other batches."""
    task, rows = classified(name)
    backbone = LayersBackbone(task.backbone)
    together = pooled(backbone, rows, range(8))
    alone = torch.cat([pooled(backbone, rows, [i]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-3)


def test_a_part_of_a_row_is_the_same_beside_as_many_rows_as_it_has_positions():
    """torchaudio's conformer calls its attention with positions first: (N, B, C)."""
    task, rows = classified("torchaudio/conformer")
    backbone = LayersBackbone(task.backbone)
    assert "conformer.conformer_layers.0.self_attn" in backbone.widths
    generator = torch.Generator().manual_seed(0)
    count = task.backbone(take(rows, range(1)), want=("tokens",)).tokens.shape[1]
    one = take(rows, range(1))
    frames = torch.randn(count + 1, *one["mel"].shape[1:], generator=generator)

    def found(size):
        data = {name: tensor.expand(size, *tensor.shape[1:]) for name, tensor in one.data.items()}
        data["mel"] = frames[:size]
        batch = Batch(np.arange(size), torch.zeros(size, dtype=torch.long), data)
        with torch.no_grad():
            return backbone.eval()(batch).pooled[:4]

    torch.testing.assert_close(found(count), found(count + 1), rtol=1e-3, atol=1e-3)
    starts = np.cumsum([task.backbone.pooled_dim, *backbone.widths.values()])
    start = starts[list(backbone.widths).index("conformer.conformer_layers.0.self_attn")]
    assert found(4)[:, start].all(), "its positions are known"


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_module_that_reads_no_row_is_no_part_of_any(length):
    """As the position bias of swin v2 and of maxvit: a table of the same length beside any rows."""
    backbone = net_task().backbone
    backbone.position = nn.Linear(2, 6)

    def read_no_row(module, inputs, output):
        module.position(torch.ones(length, 4, 4, 2))

    backbone.register_forward_hook(read_no_row)
    rows = image_rows(4)
    found = LayersBackbone(backbone)
    for numbers in ([0], range(2), range(4)):
        assert not pooled(found, rows, numbers)[:, -6:].any()
    torch.testing.assert_close(pooled(found, rows, range(2))[:1], pooled(found, rows, [0]))


@EACH
def test_the_wrapped_task_is_a_head_on_all_of_them(kind):
    task, rows = classified(KINDS[kind])
    used = head_to_toe()
    names = list(task.layers())
    wrapped = used.wrap(task)
    assert list(wrapped.layers()) == names
    assert wrapped.objective.head.in_features == wrapped.backbone.pooled_dim
    assert wrapped(take(rows, range(4)))[0].isfinite()
    rates = used.rates(wrapped.layers(), "all")
    assert rates.pop("head") == 1.0 and not any(rates.values())


def test_a_head_that_reads_more_is_refused():
    task = OBJECTIVES["tagging"].build("tagging").task
    with pytest.raises(ValueError, match="that of tagging reads more than pooled ones"):
        head_to_toe().wrap(task)


# ---------------------------------------------------------------- the choice


N, D, USEFUL = 200, 40, [3, 17, 29]


def rows_with_three_useful_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator)
    label = features[:, USEFUL].argmax(1)
    backbone = net_task(width=D).backbone
    options = Classification.options_class(norm=False)
    state = {"values": [0, 1, 2], "labels": ["a", "b", "c"]}
    return Classification(backbone, options, state), features, label


def test_the_group_lasso_finds_the_useful_features():
    head, features, label = rows_with_three_useful_features()
    lengths = solved_heads.feature_lengths(head, features, {"label": label}, 0.05, lambda: None)
    assert sorted(lengths.topk(3).indices.tolist()) == USEFUL
    others = lengths[[i for i in range(D) if i not in USEFUL]]
    assert others.median() < 1e-3 < lengths[USEFUL].min(), "most others have no weight"


def test_a_larger_lasso_shortens():
    head, features, label = rows_with_three_useful_features()
    loose, tight = (
        solved_heads.feature_lengths(head, features, {"label": label}, lasso, lambda: None)
        for lasso in (1e-2, 1e-1)
    )
    assert tight.sum() < loose.sum()
    for index in USEFUL:
        assert loose[index] > tight[index]


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_head_is_scikit_learn_s_on_the_kept_features_and_0_elsewhere(penalty):
    head, features, label = rows_with_three_useful_features()
    found = solved_heads.solve_selected(
        head,
        features,
        {"label": label},
        (0.05, (3 / D, 1.0)),
        [penalty],
        lambda head: {"accuracy": 0.0},
        lambda: None,
    )
    assert [one.share for one in found] == [3 / D, 1.0]
    weight = found[0].head.head.weight.detach().numpy()
    assert sorted(np.flatnonzero(weight.any(0))) == USEFUL
    theirs = LogisticRegression(C=1 / (penalty * N), tol=1e-12, max_iter=100_000)
    theirs.fit(features[:, USEFUL].double().numpy(), label.numpy())
    assert np.abs(weight[:, USEFUL] - theirs.coef_).max() < 1e-4
    whole = solved_heads.solve(
        head, features, {"label": label}, [penalty], lambda head: {}, lambda: None
    )[0]
    torch.testing.assert_close(
        found[1].head.head.weight, whole.head.head.weight, rtol=1e-3, atol=1e-4
    )


# ---------------------------------------------------------------- trials


paths = image_splits(48, 24, 30)


def test_a_trial_keeps_the_backbone_and_its_bundle_predicts_what_was_recorded(paths, tmp_path):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    one = trial_of(job, shared, {"head_to_toe": {"share": 0.1, "penalty": 0.01}})
    assert cached_heads.can_stack([one], shared)
    (record,) = cached_heads.run([one], shared)
    assert record.status == "done", record.error
    row = next(r for r in record.rows if r.split == "test" and r.metric == "accuracy")
    assert row.layers_trained == "head"
    assert "; features of " in record.transfer
    assert row.settings["share"] == 0.1 and row.settings["penalty"] == 0.01
    kept = bundle.load(row.bundle_uri)
    assert kept.manifest.technique.name == "head_to_toe"
    source = shared.weights["src"]
    tensors = kept.backbone_tensors()
    assert all(np.array_equal(source[n], tensors[f"base.{n}"].numpy()) for n in source)
    task = kept.task().eval()
    assert type(task) is Task
    used = task.objective.head.weight.detach().any(0).float().mean().item()
    assert used == pytest.approx(0.1, abs=0.01)
    data = next(iter(shared.targets.values()))
    batch = take(data.test, range(len(data.test)))
    with torch.no_grad():
        found = task.objective.predict(task.backbone, batch)["scores"].argmax(-1)
    assert float((found == batch["label"]).float().mean()) == pytest.approx(row.value)


def test_the_record_says_which_layers_have_no_features():
    """It is not known which frames of a convolution of an encoder of speech are padding."""
    task, rows = classified("torchaudio/conformer")
    used = head_to_toe()
    backbone = used.wrap(task).backbone
    text = used.describe_features(backbone, pooled(backbone, rows, range(8)))
    layers, lacking = (
        len(backbone.widths),
        ["front.layers.0.convolution", "front.layers.1.convolution"],
    )
    assert text.startswith(
        f"features of {layers - 2} of {layers} layers, none of {', '.join(lacking)}"
    )
    everything = torch.ones(8, backbone.pooled_dim)
    assert (
        used.describe_features(backbone, everything) == f"features of {layers} of {layers} layers"
    )


def test_features_that_would_take_too_much_memory_are_refused(paths, tmp_path, monkeypatch):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, {"head_to_toe": {"share": 1.0, "penalty": 10.0}}, stage="search")
    task = one.technique_object.wrap(cached_heads.trials.build_task(one, shared)[0])
    # training rows twice, as a trial copies its own, and validation rows; 4 bytes a number
    size = 4 * task.backbone.pooled_dim * (48 + 48 + 24)
    monkeypatch.setattr(cached_heads, "MAX_FEATURE_BYTES", size)
    (record,) = cached_heads.run([one], shared)
    assert record.status == "done", record.error
    monkeypatch.setattr(cached_heads, "MAX_FEATURE_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"would hold {task.backbone.pooled_dim} features"):
        cached_heads.run([one], shared)


@pytest.mark.slow
def test_head_to_toe_reads_layers_that_a_probe_cannot_see(paths, tmp_path):
    """The last block gives the same for every row; the layers before it tell the classes apart."""
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    held = dict(shared.weights["src"])
    names = [name for name in held if name.startswith("model.norm.")]
    assert names
    shared.weights["src"] = {
        name: np.zeros_like(array) if name in names else array for name, array in held.items()
    }
    values = {}
    for name in ("linear_probe", "head_to_toe"):
        (record,) = cached_heads.run([trial_of(job, shared, name, stage="search")], shared)
        assert record.status == "done", record.error
        rows = [row for row in record.rows if row.metric == "accuracy"]
        values[name] = rows[0].value
    assert values["linear_probe"] < 0.5 < 0.7 < values["head_to_toe"], values
