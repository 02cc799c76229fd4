"""DELTA weighs filters by what the loss loses without them, and pulls their outputs back."""

import copy
from typing import Any

import pytest
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from torch import nn
from toys import image_rows, make_run, net_task, take, weights

from pipeline.config import registry
from pipeline.core.contracts import Task
from pipeline.core.nn.filter_maps import FilterMaps, filter_count
from pipeline.techniques.delta import WeighedTask, filter_distance
from pipeline.train import loop

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
EACH = pytest.mark.parametrize("kind", KINDS)


def delta(**options):
    kind = registry.get("technique", "delta")
    return kind(kind.options_class(**{"maps": 2, "rows": 4, **options}))


def weighed(used, task: Task, batch) -> WeighedTask:
    """The task after the last step of the head alone."""
    found = used.wrap(task)
    assert isinstance(found, WeighedTask)
    task.backbone.requires_grad_(False)
    found.eval()
    used.at_step(used.phases(10)[0].steps - 2, 10)
    found(batch)
    assert used.penalty(found, batch, {}) is None and not found.filter_weights(), "too early"
    used.at_step(used.phases(10)[0].steps - 1, 10)
    found(batch)
    assert used.penalty(found, batch, {}) is None, "the head trains alone"
    task.backbone.requires_grad_(True)
    return found


def moved(module: nn.Module, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def silenced(task: Task, name: str, filter_number: int) -> Task:
    """A copy in which a filter gives 0: its row of the weight and its bias are 0."""
    found = copy.deepcopy(task)
    module: Any = found.backbone.get_submodule(name)
    with torch.no_grad():
        if type(module).__name__ == "Conv1D":
            module.weight[:, filter_number] = 0.0
        else:
            module.weight[filter_number] = 0.0
        if module.bias is not None:
            module.bias[filter_number] = 0.0
    return found


def last_column_is_zero(module: nn.Module, number: int):
    """A hook that sets one output of a recurrent layer to 0 at every position."""

    def hook(module, inputs, output):
        rows = output[0].data.clone() if hasattr(output[0], "batch_sizes") else output[0].clone()
        rows[..., number] = 0.0
        is_packed = hasattr(output[0], "batch_sizes")
        return (output[0]._replace(data=rows) if is_packed else rows, *output[1:])

    return module.register_forward_hook(hook)


# ---------------------------------------------------------------- weights of filters


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind != "text" else ()) for kind in KINDS],
)
def test_a_filter_weighs_by_the_loss_without_it(kind):
    """Against a network in which the filter's own weights are 0, in each compared layer."""
    task, rows = classified(KINDS[kind])
    plain = copy.deepcopy(task).eval()
    batch = take(rows, range(4))
    found = weighed(delta(), task, batch).filter_weights()
    assert 1 <= len(found) <= 2

    @torch.no_grad()
    def loss(one: Task) -> float:
        total, count, _ = one(batch)
        return float(total / count)

    for name, own in found.items():
        module = plain.backbone.get_submodule(name)
        gains = []
        for number in range(len(own)):
            if isinstance(module, nn.RNNBase):
                hook = last_column_is_zero(module, number)
                gains.append(loss(plain))
                hook.remove()
            else:
                gains.append(loss(silenced(plain, name, number)))
        want = (torch.tensor(gains) - loss(plain)).softmax(0)
        assert torch.allclose(own, want, atol=1e-6), name
        assert own.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert own.max() - own.min() > 1e-6, "filters differ"


def test_the_last_module_of_a_block_is_not_the_projection_of_its_shortcut():
    task, rows = classified("timm/resnet10t")
    used, batch = delta(maps=4, attention=False), take(rows, range(2))
    wrapped = used.wrap(task).eval()
    used.at_step(0, 10)
    wrapped(batch)
    used.penalty(wrapped, batch, {})
    assert list(wrapped.filter_weights()) == [
        "model.layer1.0.conv2",
        "model.layer2.0.conv2",
        "model.layer3.0.conv2",
        "model.layer4.0.conv2",
    ]


def test_without_attention_all_filters_weigh_the_same_from_the_first_step():
    task, batch = net_task(), take(image_rows(8), range(8))
    used = delta(attention=False)
    assert [phase.name for phase in used.phases(10)] == ["full"]
    wrapped = used.wrap(task)
    used.at_step(0, 10)
    wrapped(batch)
    assert used.penalty(wrapped, batch, {}).item() == pytest.approx(0.0, abs=1e-12)
    for own in wrapped.filter_weights().values():
        assert torch.allclose(own, torch.full_like(own, 1 / len(own)))


# ---------------------------------------------------------------- the penalty


@EACH
def test_the_penalty_is_the_weighted_distance_to_the_source_s_maps(kind):
    task, rows = classified(KINDS[kind])
    source = copy.deepcopy(task.backbone).eval()
    batch = take(rows, range(4))
    used = delta(weight=0.5)
    wrapped = weighed(used, task, batch)
    wrapped(batch)
    assert used.penalty(wrapped, batch, {}).item() == pytest.approx(0.0, abs=1e-10)
    moved(task)
    wrapped(batch)
    value = used.penalty(wrapped, batch, {})
    names = list(wrapped.filter_weights())
    both = []
    for backbone in (wrapped.backbone, source):
        maps = FilterMaps(backbone, names)
        with torch.no_grad():
            mask = backbone(batch).mask
        both.append((maps.take(), mask))
        maps.remove()
    (mine, _), (theirs, mask) = both
    distances = []
    for name, own in wrapped.filter_weights().items():
        a, b = mine[name].values.numpy(), theirs[name].values.numpy()
        real = mine[name].mask if mask is None or a.shape[:-1] != mask.shape else mask
        if real is not None:
            a, b = a[real.numpy()], b[real.numpy()]
        channels = a.shape[-1]
        a, b = a.reshape(-1, channels), b.reshape(-1, channels)
        by_filter = ((a - b) ** 2).mean(0) * own.numpy()
        distances.append(by_filter.sum() / (b**2).mean())
    assert value.item() == pytest.approx(0.5 * sum(distances) / len(distances), rel=1e-4)
    assert value.item() > 1e-5
    value.backward()
    given = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert given and all(name.startswith("backbone.") for name in given)
    assert all(p.grad is None for p in used.teacher.parameters())


def test_its_gradient_agrees_with_finite_differences():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2))
    student.requires_grad_(True)
    own = torch.rand(5, dtype=torch.float64).softmax(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for real in (None, mask):
        assert torch.autograd.gradcheck(
            lambda x, real=real: filter_distance(x, teacher, own, real), (student,)
        )
    alone = filter_distance(student, teacher, own, mask)
    other = student.detach().clone()
    other[~mask] = 7.0
    assert torch.equal(alone.detach(), filter_distance(other, teacher, own, mask))


@EACH
def test_training_with_it_stays_nearer_to_the_source_and_leaves_a_plain_network(kind):
    apart = []
    for weight in (0.0, 30.0):
        task, rows = classified(KINDS[kind])
        names, source = list(task.state_dict()), copy.deepcopy(task.backbone).eval()
        used = delta(weight=weight, attention=False)
        torch.manual_seed(0)
        run = make_run(
            rows, used.wrap(task), steps=10, technique=used, global_batch=8, lr=3e-3, keep="last"
        )
        loop.fit(run)
        ended = used.finish(run.task).eval()
        assert type(ended) is Task and list(ended.state_dict()) == names
        assert not any(one._forward_hooks for one in ended.modules())
        filters = [n for n, one in source.named_modules() if filter_count(one) is not None]
        maps = [FilterMaps(one, filters) for one in (source, ended.backbone)]
        with torch.no_grad():
            batch = take(rows, range(8))
            for one in (source, ended.backbone):
                one(batch)
        theirs, mine = (one.take() for one in maps)
        last = list(run.task.filter_weights())[-1]
        apart.append(float((theirs[last].values - mine[last].values).square().mean()))
    assert apart[1] < 0.7 * apart[0]


def test_an_objective_that_compares_rows_is_refused():
    task = OBJECTIVES["simclr"].build("simclr").task
    with pytest.raises(ValueError, match="simclr compares the rows of all ranks: set attention: f"):
        delta().wrap(task)


def test_a_run_weighs_once_at_the_end_of_the_first_phase():
    used, task = delta(rows=8), net_task()
    wrapped = used.wrap(task)
    seen = []
    penalty = type(used).penalty

    def noted(self, task, batch, streams):
        value = penalty(self, task, batch, streams)
        seen.append((bool(task.filter_weights()), value is not None))
        return value

    used.penalty = noted.__get__(used)
    before = weights(wrapped)
    loop.fit(make_run(image_rows(32), wrapped, steps=10, technique=used, warmup=0.0))
    assert seen == [(False, False)] * 2 + [(True, False)] + [(True, True)] * 7
    assert any("weights" in name and one.any() for name, one in weights(wrapped).items())
    assert not any(one.any() for name, one in before.items() if name.startswith("weights"))
