"""What every registered modality, backbone, objective and technique promises, tried on the rows of
`contract_rows`. A component that has no rows there fails.
"""

import itertools
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from contract_rows import BACKBONES, MODALITIES, OBJECTIVES, N, classified
from declared_types import undeclared
from toys import (
    add_streams,
    image_rows,
    label_state,
    make_run,
    net_task,
    take,
    task_of,
    weights,
)

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.registry import Options
from pipeline.core.contracts import Batch, RawRows, Task, Technique, trains
from pipeline.core.contracts.objective_capabilities import (
    CachedHead,
    CouplesRows,
    Postprocesses,
    UpdatesAfterStep,
)
from pipeline.core.contracts.technique_capabilities import (
    AddsModules,
    keeps_modules,
    reads_source,
)
from pipeline.core.metrics.catalog import metric
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.objectives.classification import Classification
from pipeline.train import loop

LARGE = ("timm/vgg11",)
"""Half a gigabyte of weights."""
FEW = 20
"""A library with no more architectures lists them itself, and each is tried."""


@pytest.mark.parametrize(
    ("kind", "tried"),
    [
        ("modality", MODALITIES),
        ("objective", OBJECTIVES),
        ("model", {name.partition("/")[0] for name in BACKBONES}),
    ],
)
def test_every_piece_has_rows(kind, tried):
    assert set(registry.names(kind)) - set(tried) == set(), "contract_rows.py has no rows of these"


@pytest.mark.parametrize("library", registry.names("model"))
def test_every_architecture_of_a_short_list_has_rows(library):
    known = registry.architectures(library)
    if len(known) <= FEW:
        assert {f"{library}/{name}" for name in known} - BACKBONES.keys() == set()


class Case:
    """A backbone with a classification head, its rows and one batch of them."""

    def __init__(self, name: str):
        self.name = name
        self.task, self.rows = classified(name)
        self.batch = take(self.rows, np.arange(4))

    @property
    def backbone(self):
        return self.task.backbone


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in BACKBONES
    ],
)
def case(request):
    torch.manual_seed(0)
    return Case(request.param)


# ---------------------------------------------------------------- backbones


def test_layers_cover_every_parameter_exactly_once(case):
    named = [name for names in case.backbone.layers().values() for name in names]
    assert sorted(named) == sorted(name for name, _ in case.backbone.named_parameters())
    assert all(case.backbone.layers().values()) and len(case.backbone.layers()) >= 3
    layers = case.task.layers()
    assert list(layers)[-1] == "head" and "head" not in case.backbone.layers()
    assert sorted(name for names in layers.values() for name in names) == sorted(
        name for name, _ in case.task.named_parameters()
    )


def test_layers_go_from_input_to_output(case):
    """A layer's modules are all called before the next layer's."""
    calls: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: calls.setdefault(name, []).append(len(calls))
        )
        for name, module in case.backbone.named_modules()
        if name
    ]
    with torch.no_grad():
        case.backbone.eval()(case.batch)
    for hook in hooks:
        hook.remove()
    order = {name: i for i, name in enumerate(calls)}
    spans = []
    for layer, names in case.backbone.layers().items():
        owners = {name.rpartition(".")[0] for name in names}
        places = [order[owner] for owner in owners if owner in order]
        if places:
            spans.append((min(places), max(places), layer))
    assert len(spans) >= len(case.backbone.layers()) - 1
    for (_, last, before), (first, _, after) in itertools.pairwise(spans):
        assert last < first, f"{before} is not done when {after} begins"


@torch.no_grad()
def test_features_have_the_declared_shapes(case):
    found = case.backbone.eval()(case.batch, want=("tokens",))
    assert (
        found.pooled.shape == (4, case.backbone.pooled_dim) and found.pooled.dtype == torch.float32
    )
    if case.backbone.token_dim is not None:
        assert found.tokens.shape[0] == 4 and found.tokens.shape[2] == case.backbone.token_dim
        assert found.mask is None or found.mask.shape == found.tokens.shape[:2]
    if case.backbone.feature_map_specs:
        staged = case.backbone(case.batch, want=("stages",))
        torch.testing.assert_close(staged.pooled, found.pooled)
        assert list(staged.stages) == [stage.name for stage in case.backbone.feature_map_specs]
        size = case.batch["image"].shape[-1]
        for stage in case.backbone.feature_map_specs:
            shape = staged.stages[stage.name].shape
            assert shape[:2] == (4, stage.channels)
            # Inception's convolutions without padding lose a border at every layer
            assert shape[2] == shape[3] and math.floor(size / stage.stride * 0.45) <= shape[
                2
            ] <= math.ceil(size / stage.stride)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_in_evaluation(case):
    case.task.eval()
    whole, part = case.backbone(case.batch).pooled, case.backbone(take(case.rows, [2])).pooled
    assert (whole[2:3] - part).abs().max() < 1e-4 * whole.abs().max()


def still(task: Task) -> list[str]:
    """Parameters without a gradient, or with one that is zero or not finite."""
    return [
        name
        for name, p in task.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]


def test_every_parameter_gets_a_gradient(case):
    case.task.train()
    case.task.zero_grad()
    total, count, logs = case.task(case.batch)
    assert count == 4 and torch.isfinite(total) and set(logs) == set(case.task.objective.log_names)
    total.backward()
    without = still(case.task)
    if without:  # what stands in the place of hidden tokens
        tokens = case.backbone(case.batch, want=("tokens",)).tokens
        hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        hidden[:, 1] = True
        case.backbone(case.batch, token_mask=hidden).pooled.sum().backward()
        without = still(case.task)
    case.task.zero_grad()
    assert without == []


class Upper(Technique):
    """The upper half of the layers moves."""

    registered_name, options_class = "upper", Options

    def rates(self, layers, phase):
        return {name: float(i >= len(layers) // 2) for i, name in enumerate(layers)}


@pytest.mark.parametrize("technique", [registry.get("technique", "linear_probe"), Upper])
def test_frozen_layers_and_their_statistics_do_not_move(case, technique):
    """Over steps of the loop, with weight decay; frozen modules are in evaluation mode, the others
    train.
    """
    before = weights(case.task)
    modes: dict[str, bool] = {}
    run = make_run(
        case.rows,
        case.task,
        steps=2,
        technique=technique(),
        global_batch=4,
        weight_decay=0.1,
        lr=1e-2,
        warmup=0.0,
    )
    run.on_log = lambda log: modes.update(
        {name: module.training for name, module in case.task.named_modules()}
    )
    loop.fit(run)
    layers = case.task.layers()
    rates = run.technique.rates(layers, "all")
    owner = {name: layer for layer, names in layers.items() for name in names}
    after = weights(case.task)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = {name for name in owner if rates[owner[name]] > 0}
    assert changed & set(owner) == trained
    for name, module in case.task.named_modules():
        prefix = f"{name}." if name else ""
        own = [prefix + p for p, _ in module.named_parameters()]
        moves = any(rates[owner[p]] > 0 for p in own)
        assert not own or modes[name] == moves
        if own and not moves:
            assert not any(prefix + b in changed for b, _ in module.named_buffers())
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert prefix + "running_mean" in changed
    for p in case.task.parameters():
        p.requires_grad_(True)
    case.task.load_state_dict(before)


def test_heads_swap(case):
    """The same backbone under a head for other labels; its own weights stay where they are."""
    places = {name: p.data_ptr() for name, p in case.backbone.named_parameters()}
    swapped = Task(
        case.backbone, Classification(case.backbone, Classification.options_class(), label_state(5))
    )
    total, _, _ = swapped.train()(case.batch.replace(label=torch.tensor([4, 3, 0, 1])))
    total.backward()
    assert swapped.objective.predict(case.backbone, case.batch)["scores"].shape == (4, 5)
    assert all(p.grad is not None for p in swapped.objective.parameters())
    assert places == {name: p.data_ptr() for name, p in case.backbone.named_parameters()}
    swapped.zero_grad()


def test_arch_rebuilds_it_from_a_seed(case):
    assert (
        Architecture.from_json(json.loads(json.dumps(case.backbone.arch.to_json())))
        == case.backbone.arch
    )
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a = bundle.build_backbone(case.backbone.arch, seed=5)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the caller's generator
    assert {n: t.shape for n, t in a.state_dict().items()} == {
        n: t.shape for n, t in case.backbone.state_dict().items()
    }
    assert (type(a), a.arch, a.pooled_dim, a.token_dim, a.feature_map_specs) == (
        type(case.backbone),
        case.backbone.arch,
        case.backbone.pooled_dim,
        case.backbone.token_dim,
        case.backbone.feature_map_specs,
    )
    b, other = (bundle.build_backbone(case.backbone.arch, seed=seed) for seed in (5, 6))
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert any(
        not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True)
    )


def test_names_and_outputs_survive_a_bundle(case, tmp_path):
    case.task.eval()
    modality = ModalitySpec(
        case.rows.modality.registered_name,
        case.rows.modality.options.model_dump(),
        case.rows.modality.state,
    )
    bundle.save(str(tmp_path / "bundle"), case.task, modality, columns={"label": "label"})
    found = bundle.load(str(tmp_path / "bundle"))
    again = found.task()
    assert not again.training and list(again.state_dict()) == list(case.task.state_dict())
    with torch.no_grad():
        a, b = (task.objective.predict(task.backbone, case.batch) for task in (case.task, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    twin = bundle.build_backbone(found.manifest.arch, seed=3)
    moved = bundle.transfer(twin, found.backbone_tensors(), "bundle")
    assert not moved.new and not moved.dropped and set(moved.kept) == set(twin.state_dict())
    assert bundle.load(str(tmp_path / "bundle")).modality().inputs() == case.rows.modality.inputs()


# ---------------------------------------------------------------- objectives


@pytest.fixture(params=registry.names("objective"))
def objective(request):
    """A task with the smallest backbone that the objective takes, its rows and their sample."""
    return OBJECTIVES[request.param].build(request.param)


def test_loss_is_a_sum_with_its_count(objective):
    """Parts of a batch give parts of its sum, which is what lets the loop divide by the global
    count.
    """
    task, rows = objective.task, objective.rows
    task.eval()
    batch = take(rows, np.arange(6), objective=task.objective)
    total, count, logs = task(batch)
    assert total.shape == count.shape == () and count > 0 and torch.isfinite(total)
    assert set(logs) == set(task.objective.log_names) and all(
        value.shape == () for value in logs.values()
    )
    if not isinstance(task.objective, CouplesRows):
        parts = [task(part) for part in batch.split(2)]
        torch.testing.assert_close(sum(p[0] for p in parts), total, rtol=1e-4, atol=1e-4)
        assert sum(p[1] for p in parts) == count
        for name in logs:
            torch.testing.assert_close(
                sum(p[2][name] for p in parts), logs[name], rtol=1e-6, atol=0
            )


def test_an_objective_trains_everything_it_made(objective):
    task, rows = objective.task, objective.rows
    task.train()
    if isinstance(task.objective, UpdatesAfterStep):
        task.objective.after_step(task.backbone, 0, 1)  # what stands still at first moves now
    task(take(rows, np.arange(6), objective=task.objective))[0].backward()
    left = still(task)
    unused = tuple(f"backbone.{part}" for part in objective.unused)
    assert [name for name in left if not name.startswith(unused or (" ",))] == []
    assert all(any(name.startswith(part) for name in left) for part in unused)


def test_an_empty_batch_gives_zeros_and_touches_every_parameter(objective):
    """A rank whose rows were all undecodable takes part in the reduction."""
    task, rows = objective.task, objective.rows
    batch = take(rows, np.arange(2), objective=task.objective)
    empty = Batch(
        batch.rows[:0], batch.keys[:0], {name: tensor[:0] for name, tensor in batch.data.items()}
    )
    total, count, _ = task(empty)
    total.backward()
    assert (
        total == 0
        and count == 0
        and all(p.grad is not None and not p.grad.any() for p in task.parameters())
    )


@torch.no_grad()
def test_predictions_are_by_row_and_give_the_metrics(objective):
    task, rows = objective.task, objective.rows
    task.eval()
    batch = take(rows, np.arange(6), objective=task.objective)
    found = task.objective.predict(task.backbone, batch)
    assert all(len(tensor) == 6 for tensor in found.values())
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    if isinstance(task.objective, Postprocesses):
        sample = objective.sample
        raw = RawRows(sample.table.slice(0, 6), sample.columns, rows.modality)
        arrays = task.objective.postprocess(arrays, raw)
    values = {name: metric(name).value(arrays) for name in task.objective.metrics}
    assert all(math.isfinite(value) for value in values.values()) and "loss" in values
    total, count, _ = task(batch)
    assert values["loss"] == pytest.approx(float(total / count), rel=1e-4)
    if not isinstance(task.objective, CouplesRows):
        part = task.objective.predict(task.backbone, take(rows, [4, 1], objective=task.objective))
        for name, tensor in part.items():
            whole = found[name][[4, 1]]
            if whole.ndim > 1:  # steps are padded to the longest row of a batch
                beyond = whole[:, tensor.shape[1] :].nan_to_num()
                assert set(beyond.unique().tolist()) in (set(), {0}, {-1})
                whole = whole[:, : tensor.shape[1]]
            torch.testing.assert_close(tensor, whole, rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.no_grad()
def test_no_metric_of_a_broken_network_is_a_number(objective):
    """The largest of scores that are NaN would name a class, a tag, an answer."""
    task, rows = objective.task, objective.rows
    task.eval()
    for parameter in task.parameters():
        parameter.fill_(math.nan)
    found = task.objective.predict(
        task.backbone, take(rows, np.arange(6), objective=task.objective)
    )
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    if isinstance(task.objective, Postprocesses):
        raw = RawRows(objective.sample.table.slice(0, 6), objective.sample.columns, rows.modality)
        arrays = task.objective.postprocess(arrays, raw)
    values = {name: metric(name).value(arrays) for name in task.objective.metrics}
    assert all(math.isnan(value) for value in values.values()), values


@torch.no_grad()
def test_a_head_on_cached_features_is_the_same_head(objective):
    task, rows = objective.task, objective.rows
    if not isinstance(task.objective, CachedHead):
        pytest.skip("it needs more than pooled features")
    task.eval()
    batch = take(rows, np.arange(6))
    pooled = task.backbone(batch).pooled
    cached, whole = task.objective.head_loss(pooled, batch), task(batch)
    assert cached[1] == whole[1] and cached[2] == whole[2]
    torch.testing.assert_close(cached[0], whole[0])
    a, b = task.objective.head_predict(pooled, batch), task.objective.predict(task.backbone, batch)
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name]) for name in a)


def test_an_objective_can_be_written_down(objective):
    """Options and state are JSON, and build the same again."""
    task = objective.task
    head = task.objective
    spec = ObjectiveSpec.from_json(
        json.loads(
            json.dumps(
                ObjectiveSpec(head.registered_name, head.options.model_dump(), head.state).to_json()
            )
        )
    )
    again = bundle.build_task(task.backbone.arch, spec)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in task.state_dict().items()
    }
    assert head.metrics and all(metric(name) for name in head.metrics)
    assert head.state == {} or not undeclared(head.state, type(head), "state")


def test_smoothing_and_dropout_are_for_training_only():
    rows = image_rows(8, size=32, channels=3)
    plain, soft = (
        task_of(
            "timm/test_vit",
            rows.modality.inputs(),
            "classification",
            label_state(),
            seed=1,
            options=options,
        )
        for options in ({}, {"label_smoothing": 0.2, "dropout": 0.5})
    )
    batch = take(rows, np.arange(6))
    with torch.no_grad():
        losses = [task.eval()(batch)[0] for task in (plain, soft)]
        trained = [soft.train()(batch)[0] for _ in range(2)]
    torch.testing.assert_close(*losses)
    assert trained[0] != trained[1] and trained[0] != losses[1]


# ---------------------------------------------------------------- classification's labels

OPTIONS = Classification.options_class()


def test_labels_are_fitted_by_value_and_named():
    table = pa.table({"y": [3, 1, 3, 2], "n": ["c", "a", "c", "b"]})
    fit = Classification.fit
    assert fit(OPTIONS, table, {"label": "y"}) == {"values": [1, 2, 3], "labels": ["1", "2", "3"]}
    state = fit(OPTIONS, table, {"label": "y", "label_name": "n"})
    assert state == {"values": [1, 2, 3], "labels": ["a", "b", "c"]}
    assert Classification.encode(table, {"label": "y"}, state)["label"].tolist() == [2, 0, 2, 1]
    # New rows to predict
    assert Classification.encode(table.select(["n"]), {"label": "y"}, state) == {}


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ({"y": ["a", "a"]}, {"label": "y"}, r"the training rows hold one label only \(\['a'\]\)"),
        (
            {"y": [0, 1, 0], "n": ["a", "b", "c"]},
            {"label": "y", "label_name": "n"},
            r"column n: one label has several names: \{0: \['a', 'c'\]\}",
        ),
        (
            {"y": [0, 1, 0], "n": ["a", None, None]},
            {"label": "y", "label_name": "n"},
            r"column n: no row names label 1 \(all are null\): write its name",
        ),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(table, columns, message):
    with pytest.raises(ValueError, match=message):
        Classification.fit(OPTIONS, pa.table(table), columns)


def test_labels_of_one_name_stay_apart():
    """ImageNet has two cranes; a head is carried over by name."""
    state = Classification.fit(
        OPTIONS,
        pa.table({"y": [0, 1, 2], "n": ["crane", "owl", "crane"]}),
        {"label": "y", "label_name": "n"},
    )
    assert state["labels"] == ["crane (0)", "owl", "crane (2)"]


# ---------------------------------------------------------------- techniques


@pytest.fixture(params=registry.names("technique"))
def technique(request) -> Technique:
    made = registry.get("technique", request.param)()
    if reads_source(made):
        made.read_source(net_task(norm="batch"))
    return made


def test_phases_fill_the_steps_and_rates_cover_every_layer(technique):
    layers = net_task().layers()
    for steps in (1, 2, 3, 10, 1000):
        phases = technique.phases(steps)
        assert sum(phase.steps for phase in phases) == (steps if trains(technique) else 0)
        assert all(phase.steps > 0 and phase.lr_scale >= 0 for phase in phases)
        for phase in phases:
            rates = technique.rates(layers, phase.name)
            assert (
                set(rates) == set(layers)
                and all(rate >= 0 for rate in rates.values())
                and any(rates.values())
            )


def test_a_technique_trains_what_it_says_and_nothing_else(technique):
    task = technique.wrap(net_task(norm="batch"))
    before = weights(task)
    run = make_run(
        image_rows(32), task, steps=6, technique=technique, lr=0.01, warmup=0.0, weight_decay=0.1
    )
    add_streams(run, image_rows(32), image_rows(32, seed=1))
    outcome = loop.fit(run) if trains(technique) else loop.evaluate_untrained(run)
    layers = task.layers()
    moving = {
        name
        for phase in technique.phases(6)
        for layer, rate in technique.rates(layers, phase.name).items()
        if rate > 0 and phase.lr_scale > 0
        for name in layers[layer]
    }
    after = weights(task)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed & set(dict(task.named_parameters())) == moving
    assert outcome.params_trained == sum(
        p.numel() for name, p in task.named_parameters() if name in moving
    )
    if not trains(technique):
        assert not changed and outcome.steps == 0
    elif technique.frozen:
        assert not any(name.startswith("backbone.") for name in changed)
    else:
        assert any(name.startswith("backbone.") for name in changed)


def test_a_technique_that_changes_the_names_of_the_backbone_says_so(technique):
    task = net_task(norm="batch")
    before = set(task.backbone.state_dict())
    is_changed = set(technique.wrap(task).backbone.state_dict()) != before
    says_so = isinstance(technique, AddsModules) or keeps_modules(technique)
    assert is_changed == says_so


def test_a_technique_says_when_to_use_it(technique):
    """Each page of ``onetomany techniques`` has what it assumes, when it helps and hurts, a paper."""
    page = " ".join((type(technique).__doc__ or "").split())
    assert "assumes" in page and "helps" in page and "hurts" in page
    assert re.search(r"(19|20)\d\d", page) or "As `" in page


def page(kind: str, name: str) -> str:
    """The documentation that ``onetomany objectives NAME`` and the like print."""
    return " ".join(registry.entry(kind, name).documentation.split())


@pytest.mark.parametrize("kind", ["objective", "model", "score"])
def test_a_page_says_when_to_use_the_component_and_names_its_paper(kind):
    for name in registry.names(kind):
        text = page(kind, name)
        assert re.search(r"\b(Use|Take) (it|this|`)", text), f"{kind} {name}: when to use it"
        assert re.search(r"\b(19|20)\d\d\b", text), f"{kind} {name}: its paper"


def test_the_page_of_a_baseline_names_its_paper():
    known_to_all = {"majority"}
    for name in set(registry.names("baseline")) - known_to_all:
        assert re.search(r"\b(19|20)\d\d\b", page("baseline", name)), name


def test_scratch_may_be_given_more_steps_than_others():
    kind = registry.get("technique", "scratch")
    assert [kind(kind.options_class(budget=budget)).steps(40) for budget in (1.0, 2.5, 0.001)] == [
        40,
        100,
        1,
    ]
    assert all(
        registry.get("technique", name)().steps(40) == 40 for name in registry.names("technique")
    )


def test_scratch_is_there_and_starts_from_nothing():
    """Promise 9: every gain is measured against it."""
    assert [
        name
        for name in registry.names("technique")
        if registry.get("technique", name).starts_from == "random"
    ] == ["random_probe", "scratch"]


# ---------------------------------------------------------------- modalities


BROKEN = {"audio": b"broken", "image": b"broken", "text": b"\xff\xfe"}
"""One value of the first role that cannot be decoded."""


@pytest.mark.parametrize("name", registry.names("modality"))
def test_a_modality_fits_decodes_and_collates_by_row(name):
    make_sample, backbone = MODALITIES[name]
    sample, kind = make_sample(), registry.get("modality", name)
    table, columns, options = sample.table, sample.columns, kind.options_class(**sample.options)
    state = kind.fit(options, table, columns, backbone)
    assert json.loads(json.dumps(state)) == state and state == kind.fit(
        options, table, columns, backbone
    )
    modality = sample.fitted(backbone)
    assert json.loads(json.dumps(modality.inputs())) == modality.inputs()
    assert not undeclared(state, kind, "state")
    assert not undeclared(modality.inputs(), kind, "inputs")
    arrays, bad = modality.decode(table, columns)
    assert bad == [""] * N and all(len(array) == N for array in arrays.values())
    batch = Batch(np.arange(N), torch.arange(N), modality.collate(arrays))
    assert all(len(tensor) == N for tensor in batch.data.values())
    for done in (modality.finish(batch), modality.finish(modality.augment(batch))):
        assert all(len(tensor) == N for tensor in done.data.values())


@pytest.mark.parametrize("name", registry.names("modality"))
def test_a_row_that_cannot_be_decoded_spoils_itself_alone(name):
    make_sample, backbone = MODALITIES[name]
    sample = make_sample()
    modality, column = (
        sample.fitted(backbone),
        sample.columns[registry.get("modality", name).roles[0]],
    )
    arrays, _ = modality.decode(sample.table, sample.columns)
    values = sample.table[column].to_pylist()
    kind = pa.binary() if name in BROKEN else sample.table.schema.field(column).type
    values = [value.encode() if isinstance(value, str) else value for value in values]
    values[3] = BROKEN.get(name)
    place = sample.table.column_names.index(column)
    spoiled = sample.table.set_column(place, column, pa.array(values, kind))
    mixed, bad = modality.decode(spoiled, sample.columns)
    assert [bool(reason) for reason in bad] == [i == 3 for i in range(N)]
    for key, array in arrays.items():
        for i in range(N):
            assert i == 3 or np.array_equal(
                mixed[key][i], array[i], equal_nan=array.dtype.kind == "f"
            ), (key, i)


# ---------------------------------------------------------------- batches


def test_splitting_a_batch_keeps_every_row_once():
    batch = take(image_rows(10), np.arange(10))
    parts = batch.split(4)
    assert [len(part) for part in parts] == [3, 3, 4] and [len(p) for p in batch.split(9)] == [5, 5]
    assert batch.split(None) == [batch] and batch.split(10) == [batch]
    assert np.array_equal(np.concatenate([p.rows for p in parts]), batch.rows)
    assert all(torch.equal(torch.cat([p[name] for p in parts]), batch[name]) for name in batch.data)
    assert torch.equal(torch.cat([p.keys for p in parts]), batch.keys)
