"""Domain adaptation: each technique's defining property, on rows of every modality."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from contract_rows import BACKBONES, N, wake
from torch.nn import functional as F
from toys import (
    add_streams,
    assert_a_killed_run_ends_as_a_whole_one,
    furthest,
    image_rows,
    label_state,
    make_run,
    net_task,
    rows_of,
    task_of,
    weights,
    without_labels,
)

from pipeline.config import registry
from pipeline.core.contracts import Batch, Task
from pipeline.core.contracts.technique_capabilities import adapts_without_labels
from pipeline.core.nn import domain_adaptation, domain_losses
from pipeline.data.stream import Rows, eval_batches
from pipeline.techniques import tent
from pipeline.techniques.adabn import AdaBN
from pipeline.techniques.cdan import CDAN, ConditionalClassifier
from pipeline.techniques.coral import Coral
from pipeline.techniques.dan import DAN
from pipeline.techniques.dann import DANN
from pipeline.techniques.full import Full
from pipeline.techniques.mcd import MCD
from pipeline.techniques.pooled import Pooled, PooledOptions
from pipeline.techniques.pseudo_labels import PseudoLabelOptions, PseudoLabels
from pipeline.techniques.tent import Tent, TentOptions, entropy
from pipeline.train import evaluate, loop, streams
from pipeline.train.ranks import Ranks

TRAINED = (
    "dann",
    "cdan",
    "coral",
    "dan",
    "jan",
    "mcc",
    "mcd",
    "pseudo_labels",
    "fixmatch",
    "pooled",
)
ONE_OF_EACH = {
    "image": "timm/resnet10t",
    "text": "transformers/bert",
    "audio": "torchaudio/deepspeech2",
    "events": "events/gru",
    "series": "hf/patchtst",
    "table": "table/ft_transformer",
    "trajectory": "policy/mlp",
}
"""A backbone of every modality."""
EVERY_MODALITY = pytest.mark.parametrize("world", ONE_OF_EACH, indirect=True)


# ---------------------------------------------------------------- closed forms


def features(n: int, seed: int, width: int = 5) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()


def test_a_reversed_gradient_is_minus_lambda_times_the_plain_one():
    x = features(4, 0).requires_grad_()
    weight = features(5, 1)
    (plain,) = torch.autograd.grad((x @ weight.T).tanh().sum(), x)
    reverse = domain_losses.reversed_gradient(x, 0.7)
    assert torch.equal(reverse, x)
    (turned,) = torch.autograd.grad((reverse @ weight.T).tanh().sum(), x)
    assert torch.allclose(turned, -0.7 * plain, rtol=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_dann_turns_the_gradient_of_the_domain_loss_by_its_schedule(progress):
    """Of the backbone, and not that of the domain classifier."""
    technique = DANN()
    torch.manual_seed(0)
    task = technique.wrap(net_task())
    assert isinstance(task, domain_adaptation.TaskWithModule)
    source, target = (batch_of(image_rows(8, seed=seed)) for seed in (1, 2))
    technique.at_step(round(10 * progress), 10)
    factor = 2 / (1 + math.exp(-10 * progress)) - 1
    loss = technique.alignment(task, *pair(task, source, target))
    plain = 0.0
    for batch, truth in ((source, 1.0), (target, 0.0)):
        pooled = task.backbone(batch).pooled
        logits = task.added(F.layer_norm(pooled, pooled.shape[-1:]))
        plain = (
            plain + F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth)) / 2
        )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for module, scale in ((task.backbone, -factor), (task.added, 1.0)):
        names = list(module.parameters())
        got = torch.autograd.grad(loss, names, retain_graph=True)
        want = torch.autograd.grad(plain, names, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, scale * b, atol=1e-6)


def test_coral_is_the_closed_form():
    source, target = features(7, 0), features(9, 1)
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (source, target)]
    want = np.square(covariances[0] - covariances[1]).sum() / (4 * 5**2)
    assert domain_losses.coral(source, target).item() == pytest.approx(want, rel=1e-5)


def test_the_discrepancy_is_a_loop_over_pairs():
    source, target = features(5, 0), features(6, 1)
    rows = torch.cat([source, target])
    square = [[float((a - b).square().sum()) for b in rows] for a in rows]
    mean = sum(map(sum, square)) / (11 * 10)

    def kernel(i: int, j: int) -> float:
        return sum(math.exp(-square[i][j] / (2 * width * mean)) for width in domain_losses.KERNELS)

    here, there = range(5), range(5, 11)
    want = sum(kernel(i, j) for i in here for j in here if i != j) / (5 * 4)
    want += sum(kernel(i, j) for i in there for j in there if i != j) / (6 * 5)
    want -= 2 * sum(kernel(i, j) for i in here for j in there) / (5 * 6)
    assert domain_losses.joint_mmd([source], [target]).item() == pytest.approx(want, rel=1e-4)


def test_the_joint_discrepancy_multiplies_the_kernels():
    source, target = (features(5, 0), features(5, 2, 3)), (features(6, 1), features(6, 3, 3))
    joined = [torch.cat(pair) for pair in zip(source, target, strict=True)]
    kernel = domain_losses.gaussian_kernels(joined[0]) * domain_losses.gaussian_kernels(joined[1])
    want = domain_losses.kernel_mmd(kernel, 5)
    assert domain_losses.joint_mmd(source, target).item() == pytest.approx(want.item(), rel=1e-6)


def test_entropies_are_those_of_the_probabilities():
    scores = features(6, 0)
    chances = scores.softmax(-1).numpy()
    assert np.allclose(
        domain_losses.entropies(scores), -(chances * np.log(chances)).sum(1), rtol=1e-5
    )
    each = scores.sigmoid().numpy()
    want = -(each * np.log(each) + (1 - each) * np.log(1 - each)).sum(1)
    assert np.allclose(domain_losses.label_set_entropies(scores), want, rtol=1e-5)


def test_class_confusion_is_the_paper_s_formula():
    scores, temperature = features(8, 0, 3), 2.5
    chances = (scores / temperature).softmax(-1).numpy()
    entropy = -(chances * np.log(chances)).sum(1)
    row_weights = 1 + np.exp(-entropy)
    row_weights = 8 * row_weights / row_weights.sum()
    confusion = np.zeros((3, 3))
    for j in range(3):
        for k in range(3):
            confusion[j, k] = sum(row_weights[i] * chances[i, j] * chances[i, k] for i in range(8))
    confusion /= confusion.sum(1, keepdims=True)
    want = sum(confusion[j, k] for j in range(3) for k in range(3) if j != k) / 3
    got = domain_losses.class_confusion(scores, temperature)
    assert got.item() == pytest.approx(want, rel=1e-5)
    certain = torch.eye(3).repeat(4, 1) * 200
    assert domain_losses.class_confusion(certain).item() < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        domain_losses.coral,
        lambda one, other: domain_losses.joint_mmd([one], [other]),
        lambda one, other: domain_losses.joint_mmd([one, one.softmax(-1)], [other, other]),
        lambda one, other: domain_losses.class_confusion(one),
        lambda one, other: ConditionalClassifier(5, 5, hidden=3, most=20).products(one, other),
    ],
    ids=["coral", "mmd", "joint_mmd", "class_confusion", "cdan"],
)
def test_distances_keep_their_digits_under_autocast(loss):
    """In bf16 the distance of two close domains would be nothing but rounding."""
    one = features(32, 0).float()
    other = one + 0.01
    torch.manual_seed(0)
    want = loss(one, other)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(one, other)
    assert found.dtype == torch.float32 and torch.equal(found, want)


def test_random_products_estimate_the_inner_products_of_whole_ones():
    """Of CDAN: with wide features the products are random, and their inner products unbiased."""
    torch.manual_seed(0)
    whole = ConditionalClassifier(6, 4, hidden=3, most=100)
    drawn = ConditionalClassifier(6, 4, hidden=3, most=20)
    drawn.of_features, drawn.of_classes = torch.randn(6, 200_000), torch.randn(4, 200_000)
    pooled, chances = torch.randn(3, 6), torch.rand(3, 4)
    one, other = (made.products(pooled, chances) for made in (whole, drawn))
    assert one.shape == (3, 24) and torch.allclose(one @ one.T, other @ other.T, atol=0.3)


# ---------------------------------------------------------------- rows of every modality


class World:
    """A task with rows of two domains; the labels are those of three classes in turn."""

    def __init__(self, modality: str):
        name = ONE_OF_EACH[modality]
        make_sample, options = BACKBONES[name]
        sample = make_sample()
        reads = sample.fitted(name)
        arrays, bad = reads.decode(sample.table, sample.columns)
        assert not any(bad)
        labels = {"label": np.arange(N) % 3}
        self.rows = rows_of(reads, {**arrays, **labels}, "classification", label_state())
        self.source = self.rows.subset(np.arange(0, N))
        self.inputs = Rows(self.rows.selection, self.rows.decoder, dict(arrays))
        self.make = partial(
            task_of, name, reads.inputs(), "classification", label_state(), seed=1, **options
        )

    def task(self) -> Task:
        task = self.make()
        wake(task)
        return task

    def batch(self) -> Batch:
        return batch_of(self.rows)


@pytest.fixture(scope="module")
def world(request):
    return World(request.param)


def batch_of(rows: Rows) -> Batch:
    (loaded,) = eval_batches(rows, len(rows))
    return evaluate.device_preprocessing(rows)(loaded.batch, False)


def pair(task: Task, source: Batch, target: Batch):
    return [domain_adaptation.DomainFeatures.of(task, batch) for batch in (source, target)]


def adapting_run(technique, rows: Rows, source: Rows, task: Task, *, labelled=True, **words):
    """A run with the streams that the technique names; ``task`` is wrapped here."""
    torch.manual_seed(3)
    rows = rows if labelled else without_labels(rows)
    run = make_run(rows, technique.wrap(task), technique=technique, **words)
    add_streams(run, rows, source, labelled)
    return run


@pytest.mark.parametrize(
    ("world", "labelled"),
    [*((modality, False) for modality in ONE_OF_EACH), ("image", True)],
    indirect=["world"],
)
@pytest.mark.parametrize("name", TRAINED)
def test_a_technique_trains_with_and_without_labels_of_the_target(world, name, labelled):
    """And leaves a task with the names that it got, whose modules are all trained."""
    kind, modality = registry.get("technique", name), type(world.rows.modality)
    technique = kind()
    objective = registry.get("objective", "classification")
    if name == "fixmatch" and modality.registered_name != "image":
        with pytest.raises(ValueError, match="needs a weak and a strong view of a row"):
            technique.check_target(objective, modality)
        return
    technique.check_target(objective, modality)
    task = world.task()
    before = weights(task)
    logs: list = []
    run = adapting_run(
        technique, world.rows, world.source, task, labelled=labelled, steps=2, lr=1e-2, warmup=0.0
    )
    run.on_log = logs.append
    added = set(weights(run.task)) - set(before)
    start = weights(run.task)
    outcome = loop.fit(run)
    assert outcome.skipped_steps == 0 and all(math.isfinite(log["loss"]) for log in logs)
    done = weights(run.task)
    trained = added & set(dict(run.task.named_parameters()))
    moved = [name for name in trained if not torch.equal(start[name], done[name])]
    assert sorted(moved) == sorted(trained)
    after = weights(technique.finish(run.task))
    assert set(after) == set(before)
    assert any(not torch.equal(after[k], before[k]) for k in before if k.startswith("backbone."))
    assert not torch.equal(after["objective.head.weight"], before["objective.head.weight"])


def test_strong_views_are_made_of_rows_without_labels_alone():
    rows = image_rows(8)
    technique = registry.get("technique", "fixmatch")()
    prepare = evaluate.training_preprocessing(rows, net_task().objective, technique)
    for given, has_view in ((rows, False), (without_labels(rows), True)):
        (loaded,) = eval_batches(given, 8)
        batch = prepare(loaded.batch, True)
        assert ("view0" in batch.data) == has_view
    task = net_task()
    weak = domain_adaptation.DomainFeatures.of(task, batch)
    technique.alignment(task, None, weak).backward()
    assert weak.pooled.grad_fn is None, "its activations would be kept beside the strong view's"
    assert task.objective.head.weight.grad is not None


# ---------------------------------------------------------------- what moves, what does not


def test_pooling_with_weight_zero_is_full_fine_tuning():
    rows, source = image_rows(24), image_rows(24, seed=1)
    runs = [
        adapting_run(technique, rows, source, net_task(norm="batch"), lr=0.01)
        for technique in (Full(), Pooled(PooledOptions(weight=0.0)), Pooled())
    ]
    for run in runs:
        loop.fit(run)
    plain, none, pooled = (weights(run.task) for run in runs)
    assert furthest(plain, none) == 0.0 and furthest(plain, pooled) > 1e-4


def test_pooling_is_the_sum_of_both_losses():
    task, technique = net_task(), Pooled(PooledOptions(weight=0.5))
    source, batch = batch_of(image_rows(8, seed=1)), batch_of(image_rows(8))
    penalty = technique.penalty(task, batch, {"labelled_source": source})
    losses, count, _ = task(source)
    assert penalty.item() == pytest.approx(0.5 * (losses / count).item(), rel=1e-6)


def test_pseudo_labels_are_confident_predictions():
    """Rows below the threshold have no loss; the others that of their likeliest class."""
    task = net_task()
    with torch.no_grad():
        task.objective.head.weight.mul_(8)
    batch = batch_of(without_labels(image_rows(12)))
    target = domain_adaptation.DomainFeatures.of(task, batch)
    scores = target.scores(task.objective)
    confidence, label = scores.softmax(-1).max(-1)
    threshold = float(confidence.detach().median())
    technique = PseudoLabels(PseudoLabelOptions(threshold=threshold, ramp=0.5))
    technique.at_step(1, 4)
    sure = confidence >= threshold
    want = 0.5 * (F.cross_entropy(scores, label, reduction="none") * sure).sum() / 12
    assert 0 < int(sure.sum()) < 12
    assert technique.alignment(task, None, target).item() == pytest.approx(want.item(), rel=1e-6)


@EVERY_MODALITY
def test_two_heads_disagree_more_and_the_backbone_less(world):
    """MCD: the gradient of the alignment is minus that of the discrepancy for the heads, and that
    of the discrepancy for the backbone.
    """
    technique = MCD()
    torch.manual_seed(0)
    task = technique.wrap(world.task()).eval()
    target = domain_adaptation.DomainFeatures.of(task, world.batch())
    heads = (task.objective, task.added)
    one, other = (head.scores(target.pooled).softmax(-1) for head in heads)
    discrepancy = (one - other).abs().mean()
    loss = technique.alignment(task, None, target)
    assert loss.item() == pytest.approx(-discrepancy.item(), rel=1e-5) and loss.item() < 0
    for module, sign in ((task.objective, -1), (task.added, -1), (task.backbone, 1)):
        parameters = list(module.parameters())
        got, want = (
            torch.autograd.grad(
                value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for value in (loss, discrepancy)
        )
        assert any(gradient.any() for gradient in want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, sign * b)


def test_equal_heads_part_though_the_first_is_all_zeros():
    task = net_task()
    torch.nn.init.zeros_(task.objective.head.weight)
    second = MCD().wrap(task).added
    assert second.head.weight.std() > 0


def shifted(rows: Rows, scale: float = 0.5) -> Rows:
    assert rows.arrays is not None
    darker = (rows.arrays["image"] * scale).astype(np.uint8)
    return Rows(rows.selection, rows.decoder, {**rows.arrays, "image": darker})


def inputs_of(rows: Rows, size: int = 8):
    ready = evaluate.device_preprocessing(rows)
    return lambda: (ready(one.batch, False) for one in eval_batches(without_labels(rows), size))


def test_adabn_takes_the_statistics_of_the_targets_rows():
    task = net_task(norm="batch")
    before, rows = weights(task), shifted(image_rows(32))
    technique = AdaBN()
    adapted = technique.prepare(technique.wrap(task), inputs_of(rows))
    norm = adapted.backbone.norm
    whole = adapted.backbone.stem(batch_of(rows)["image"].flatten(1))
    assert torch.allclose(norm.running_mean, whole.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, whole.var(0), rtol=1e-4)
    after = weights(adapted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {f"backbone.norm.{n}" for n in ("running_mean", "running_var")} | {
        "backbone.norm.num_batches_tracked"
    }
    with pytest.raises(ValueError, match="toys/net has no batch norm"):
        technique.wrap(net_task(norm="layer"))


def test_batch_norms_read_all_rows_however_they_are_sorted(monkeypatch):
    """Two halves that lie far apart: most of the variance is between them."""
    monkeypatch.setattr(streams, "unlabelled", without_labels)
    rows = image_rows(512)
    assert rows.arrays is not None
    image = rows.arrays["image"].copy()
    image[256:] = 255 - image[256:] // 8
    rows = Rows(rows.selection, rows.decoder, {**rows.arrays, "image": image})
    ready = evaluate.device_preprocessing(rows)
    for technique in (AdaBN(), Tent(TentOptions(lr=1e-9))):
        task = net_task(norm="batch")
        inputs = partial(streams.test_inputs, rows, ready, Ranks(), 256)
        adapt = technique.prepare if isinstance(technique, AdaBN) else technique.at_test
        norm = adapt(task, inputs).backbone.norm
        whole = task.backbone.stem(batch_of(rows)["image"].flatten(1))
        assert torch.allclose(norm.running_mean, whole.mean(0), atol=1e-4)
        assert torch.allclose(norm.running_var, whole.var(0), rtol=1e-3)
        inputs = partial(streams.test_inputs, rows.subset(np.arange(257)), ready, Ranks(), 256)
        adapt(net_task(norm="batch"), inputs)  # no batch of one row, which has no variance


def test_a_norm_that_reads_nothing_keeps_its_statistics():
    """As the encoder of a kind of rows that are not among those without labels."""
    task = net_task(norm="batch")
    task.backbone.unread = torch.nn.BatchNorm1d(4)
    task.backbone.unread.running_mean.fill_(3.0)
    task.backbone.unread.running_var.fill_(5.0)
    ended = AdaBN().prepare(task, inputs_of(image_rows(32)))
    assert (ended.backbone.norm.running_mean != 0).all()
    assert (ended.backbone.unread.running_mean == 3.0).all()
    assert (ended.backbone.unread.running_var == 5.0).all()


@pytest.mark.parametrize("sizes", [(512, 256), (257, 256), (3, 256), (1, 256), (0, 256), (21, 4)])
def test_rows_without_labels_come_mixed_and_each_once(monkeypatch, sizes):
    monkeypatch.setattr(streams, "unlabelled", without_labels)
    n, most = sizes
    rows = image_rows(max(n, 1)).subset(np.arange(n))
    ready = evaluate.device_preprocessing(rows)
    once = [one.rows.tolist() for one in streams.test_inputs(rows, ready, Ranks(), most)]
    assert sorted(row for part in once for row in part) == rows.selection.ids(np.arange(n)).tolist()
    assert all(min(n, 2) <= len(part) <= most for part in once)
    assert len(once) < 2 or all(max(part) - min(part) >= len(part) for part in once)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_tent_changes_norms_alone_and_lowers_the_entropy(norm):
    task, rows = net_task(norm=norm), shifted(image_rows(32))
    before = weights(task)
    technique = Tent(TentOptions(lr=0.01, passes=3))
    with torch.no_grad():
        first = float(entropy(task.eval(), batch_of(rows)))
    adapted = technique.at_test(technique.wrap(task), inputs_of(rows))
    with torch.no_grad():
        last = float(entropy(adapted, batch_of(rows)))
    assert last < first
    after = weights(adapted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.norm.") for name in changed)
    assert {"backbone.norm.weight", "backbone.norm.bias"} <= changed
    assert all(parameter.requires_grad for parameter in adapted.parameters())


@pytest.mark.parametrize(("norm", "most"), [("layer", 3), ("batch", 8)])
def test_tent_holds_the_activations_of_few_rows_where_no_norm_reads_the_batch(
    monkeypatch, norm, most
):
    rows, found = shifted(image_rows(16)), []
    for part_rows in (100, 3):
        monkeypatch.setattr(tent, "PART_ROWS", part_rows)
        technique, task = Tent(TentOptions(lr=0.01)), net_task(norm=norm)
        sizes = []

        def noted(task, batch, into=sizes):
            into.append(len(batch))
            return entropy(task, batch)

        monkeypatch.setattr(tent, "entropy", noted)
        found.append(weights(technique.at_test(technique.wrap(task), inputs_of(rows))))
    assert max(sizes) == most
    assert furthest(*found) < 1e-6


@EVERY_MODALITY
def test_tent_finds_the_norms_of_other_libraries(world):
    task = world.task()
    before, batch = weights(task), world.batch()
    technique = Tent(TentOptions(lr=0.01, passes=3))
    if "norm" not in str(task.backbone).lower():
        with pytest.raises(ValueError, match="has no norm with parameters"):
            technique.wrap(task)
        return
    with torch.no_grad():
        first = float(entropy(task.eval(), batch))
    adapted = technique.at_test(technique.wrap(task), lambda: iter([batch]))
    with torch.no_grad():
        assert float(entropy(adapted.eval(), batch)) < first
    changed = {k for k, v in weights(adapted).items() if not torch.equal(before[k], v)}
    linear = {
        f"{name}.{own}"
        for name, module in task.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.GRU))
        for own, _ in module.named_parameters(recurse=False)
    }
    assert changed and not changed & linear


@EVERY_MODALITY
def test_adabn_takes_the_statistics_that_torch_does(world):
    """Of every batch norm of a modality's backbone; one without any is refused."""
    task, technique = world.task(), AdaBN()
    norms = [m for m in task.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        with pytest.raises(ValueError, match="has no batch norm"):
            technique.wrap(task)
        return
    batch, before = world.batch(), weights(task)
    found = weights(technique.prepare(technique.wrap(world.task()), lambda: iter([batch])))
    task.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        task.backbone(batch)
    for name, value in weights(task).items():
        if "running" in name:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
            assert not torch.equal(found[name], before[name])
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], before[name]), name


def test_networks_without_norms_are_refused():
    task = net_task()
    task.backbone.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="toys/net has no norm with parameters"):
        Tent().wrap(task)


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("dann", "behaviour_cloning", "reads the labels of the source, and those of behaviour_cl"),
        ("cdan", "ctc", "reads the labels of the source"),
        ("mcc", "multilabel", "compares the probabilities of exclusive classes"),
        ("tent", "ctc", "lowers the entropy of predicted classes"),
        ("pooled", "tagging", "reads the labels of the source"),
    ],
)
def test_objectives_that_do_not_suit_are_refused(name, objective, message):
    technique = registry.get("technique", name)()
    kind, image = registry.get("objective", objective), registry.get("modality", "image")
    with pytest.raises(ValueError, match=message):
        technique.check_target(kind, image)


def test_features_alone_are_aligned_for_any_objective():
    for kind in (DANN, Coral, DAN):
        options = kind.options_class(source_weight=0.0)
        assert kind(options).streams() == ("source", "target")
        kind(options).check_target(
            registry.get("objective", "ctc"), registry.get("modality", "audio")
        )
    with pytest.raises(ValueError, match="compares predicted classes, and ctc predicts none"):
        CDAN(CDAN.options_class(source_weight=0.0)).check_target(
            registry.get("objective", "ctc"), registry.get("modality", "audio")
        )


@pytest.mark.parametrize("name", ["cdan", "jan", "pseudo_labels", "mcd"])
def test_label_sets_are_adapted_to(name):
    rows = image_rows(16)
    assert rows.arrays is not None
    labels = (np.arange(16)[:, None] % np.array([2, 3]) == 0).astype(np.uint8)
    arrays = {"image": rows.arrays["image"], "labels": labels}
    state = {"labels": ["a", "b"], "separator": "|", "positives": [8, 6], "rows": 16}
    rows = rows_of(rows.modality, arrays, "multilabel", state)
    plain = net_task()
    kind = registry.get("objective", "multilabel")
    task = Task(plain.backbone, kind(plain.backbone, kind.options_class(), state))
    technique = registry.get("technique", name)()
    technique.check_target(kind, type(rows.modality))
    run = adapting_run(technique, rows, rows, task, steps=2)
    run.evaluate = None
    before = weights(task)
    loop.fit(run)
    assert furthest(before, weights(technique.finish(run.task))) > 0


def test_micro_batches_are_refused():
    run = adapting_run(DANN(), image_rows(24), image_rows(24), net_task(), micro_batch=4)
    with pytest.raises(ValueError, match=r"train\.micro_batch: dann compares the rows of a whole"):
        loop.fit(run)


def test_every_trained_technique_is_tried_here():
    found = {
        name
        for name in registry.names("technique")
        if adapts_without_labels(registry.get("technique", name)())
    }
    assert found == {*TRAINED, "adabn", "tent"}
    assert {*ONE_OF_EACH} == {*registry.names("modality")}


# ---------------------------------------------------------------- resume and ranks


@pytest.mark.parametrize("name", ["dann", "mcd", "pseudo_labels"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name, labelled):
    def run_in(folder: str):
        return adapting_run(
            registry.get("technique", name)(),
            image_rows(24),
            image_rows(20, seed=1),
            net_task(dropout=0.3),
            labelled=labelled,
            steps=8,
            lr=0.01,
            checkpoint_every_steps=2,
            checkpoints=str(tmp_path / folder),
        )

    assert_a_killed_run_ends_as_a_whole_one(run_in)


def trained(ranks: Ranks, name: str, labelled: bool) -> tuple[dict[str, torch.Tensor], list]:
    """The weights and the losses of a run."""
    run = adapting_run(
        registry.get("technique", name)(),
        image_rows(24),
        image_rows(20, seed=1),
        net_task(),
        labelled=labelled,
        steps=3,
        lr=0.01,
        ranks=ranks,
        warmup=0.0,
    )
    losses: list[float] = []
    run.on_log = lambda log: losses.append(log["loss"])
    loop.fit(run)
    return weights(run.task), losses


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_give_the_weights_of_one(team, name, labelled):
    (first, losses), (second, _) = team(trained, name, labelled)
    one, wanted = trained(Ranks(), name, labelled)
    assert furthest(first, second) == 0.0
    assert furthest(first, one) < 2e-4
    assert losses == pytest.approx(wanted, abs=1e-4)
