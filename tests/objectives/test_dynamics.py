"""Forward and inverse dynamics: losses against a loop, no answer within what is told from, and that
both are learned.
"""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import Net

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch, Task
from pipeline.core.nn import all_gather
from pipeline.core.specs import Architecture, ObjectiveSpec
from pipeline.data.stream import Decoder
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.objectives.dynamics import MAX_STEPS, STILL, Dynamics, DynamicsOptions, RunningScale

COLUMNS = {"observations": "seen", "actions": "done", "embodiment": "robot"}
CLASSES = ("left", "right", "wait")
SHIFT = {"left": -1.0, "right": 1.0, "wait": 0.0}


def walks(n: int = 16, discrete: bool = False, seed: int = 0) -> pa.Table:
    """Places that the actions move, slowly in the second number, and a third that stands still; the
    second robot has one number more. The first row has one step, the others 3 to 8; actions are by
    chance.
    """
    rng = np.random.default_rng(seed)
    seen, done = [], []
    for i in range(n):
        steps, extra = 1 if i == 0 else 3 + i % 6, i % 2
        acts = (
            [CLASSES[k] for k in rng.integers(0, 3, steps)]
            if discrete
            else rng.normal(size=(steps, 2)).tolist()
        )
        moves = np.array([[SHIFT[a], SHIFT[a]] for a in acts] if discrete else acts)
        moves = moves * [1.0, 0.01]
        places = np.concatenate([rng.normal(0, 0.5, (1, 2)), moves[:-1]]).cumsum(0)
        seen.append(np.concatenate([places, np.full((steps, 1 + extra), 4.0)], 1).tolist())
        done.append(acts)
    kind = pa.string() if discrete else pa.list_(pa.float32())
    return pa.table(
        {
            "seen": pa.array(seen, pa.list_(pa.list_(pa.float32()))),
            "done": pa.array(done, pa.list_(kind)),
            "robot": [("arm", "leg")[i % 2] for i in range(n)],
        }
    )


def case(
    architecture: str = "mlp", discrete: bool = False, n: int = 16, **options
) -> tuple[Task, Batch, Trajectory]:
    table = walks(n, discrete)
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, COLUMNS, "")
    )
    chosen = DynamicsOptions(**options)
    state = Dynamics.fit(chosen, table, COLUMNS)
    arrays, bad = Decoder(modality, "dynamics", state, COLUMNS)(table)
    assert not any(bad)
    more = {"mlp": {"window": 2}, "transformer": {"heads": 2}}[architecture]
    arch = Architecture(f"policy/{architecture}", {"width": 16, **more}, modality.inputs())
    task = bundle.build_task(arch, ObjectiveSpec("dynamics", options, state), seed=3)
    return (
        task,
        Batch(np.arange(n), torch.zeros(n, dtype=torch.int64), modality.collate(arrays)),
        modality,
    )


every = pytest.mark.parametrize(
    ("architecture", "discrete"), [("mlp", False), ("transformer", False), ("transformer", True)]
)


@torch.no_grad()
@every
def test_the_loss_is_what_a_loop_finds(architecture, discrete):
    """From the tokens of two passes, one of them without actions, and the rows of the table."""
    task, batch, modality = case(architecture, discrete, forward=0.7, inverse=2.0)
    head, table = task.objective, walks(discrete=discrete)
    for deviation in head.changes.values():
        deviation.square.copy_(torch.rand_like(deviation.square) + 0.1)
    task.eval()
    seeing = task.backbone(batch, want=("tokens",)).tokens
    blind = task.backbone(
        Batch(
            batch.rows, batch.keys, {name: t for name, t in batch.data.items() if name != "actions"}
        ),
        want=("tokens",),
    ).tokens
    assert torch.equal(seeing, blind) == (architecture == "mlp")
    want = dict.fromkeys((*Dynamics.log_names, "loss"), 0.0)
    count = 0
    for i, (places, done, robot) in enumerate(
        zip(
            table["seen"].to_pylist(),
            table["done"].to_pylist(),
            table["robot"].to_pylist(),
            strict=True,
        )
    ):
        space = modality.state["spaces"][robot]
        mean, deviation = (torch.tensor(space[f"observation_{key}"]) for key in ("mean", "std"))
        for t in range(len(places) - 1):
            now, then = ((torch.tensor(places[k]) - mean) / deviation for k in (t, t + 1))
            change = (then - now) / head.changes[robot].square.sqrt()
            action = (
                torch.eye(3)[space["discrete"].index(done[t])]
                if discrete
                else (
                    (torch.tensor(done[t]) - torch.tensor(space["action_mean"]))
                    / torch.tensor(space["action_std"])
                )
            )
            message = head.forward_heads[robot](torch.cat([seeing[i, t], action]))
            answer = head.inverse_heads[robot](torch.cat([blind[i, t], blind[i, t + 1]]))
            error = float((message - change).square().mean())
            inverse = float(
                torch.nn.functional.cross_entropy(answer, action.argmax())
                if discrete
                else (answer - action).square().mean()
            )
            want["loss"] += 0.7 * error + 2.0 * inverse
            want["forward_error"] += error
            want["forward_zero"] += float(change.square().mean())
            want["inverse_error"] += (
                float(answer.argmax() != action.argmax()) if discrete else inverse
            )
            want["inverse_zero"] += 2 / 3 if discrete else float(action.square().mean())
            count += 1
    total, many, logs = task(batch)
    assert total.item() == pytest.approx(want.pop("loss"), rel=1e-5) and many == count
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(want, rel=1e-4)
    found = task.objective.predict(task.backbone, batch)
    assert found["loss"].sum().item() == pytest.approx(total.item(), rel=1e-5) and found[
        "count"
    ].tolist() == [len(p) - 1 for p in table["seen"].to_pylist()]
    parts = [task(part) for part in batch.split(5)]
    assert (
        sum(p[0] for p in parts).item() == pytest.approx(total.item(), rel=1e-5)
        and sum(p[1] for p in parts) == many
    )


@torch.no_grad()
@every
def test_padding_and_other_rows_change_nothing(architecture, discrete):
    task, batch, _ = case(architecture, discrete)
    task.eval()
    noise = {
        name: torch.where(batch["mask"][..., None], batch[name], torch.rand_like(batch[name]) * 9)
        for name in ("observations", "actions")
    }
    torch.testing.assert_close(task(batch.replace(**noise))[0], task(batch)[0])
    found = task.objective.predict(task.backbone, batch)
    alone = task.objective.predict(
        task.backbone,
        Batch(
            batch.rows[7:8],
            batch.keys[7:8],
            {name: t[7:8, :5] if t.dim() > 1 else t[7:8] for name, t in batch.data.items()},
        ),
    )
    assert batch["mask"][7].sum() == 4
    torch.testing.assert_close(alone["loss"][0], found["loss"][7])
    # The row of one step
    total, count, _ = task(
        Batch(batch.rows[:1], batch.keys[:1], {name: t[:1] for name, t in batch.data.items()})
    )
    assert total == 0 and count == 0


@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_the_inverse_is_told_from_observations_alone(architecture):
    """No gradient reaches the actions, and other actions change nothing that it says, while the
    forward part hears of its own action.
    """
    task, batch, _ = case(architecture)
    said = {}
    for part in ("forward_heads", "inverse_heads"):
        for name, one in getattr(task.objective, part).items():
            one.register_forward_hook(
                lambda module, args, out, key=(part, name): said.update({key: out})
            )
    acts = batch["actions"].clone().requires_grad_()
    task.eval()(batch.replace(actions=acts))
    first = dict(said)
    for key, out in first.items():
        (gradient,) = torch.autograd.grad(out.sum(), acts, retain_graph=True, allow_unused=True)
        assert (gradient is None or not gradient.any()) == (key[0] == "inverse_heads")
    task(batch.replace(actions=torch.randn_like(batch["actions"])))
    assert all(
        torch.equal(said[key], out) == (key[0] == "inverse_heads") for key, out in first.items()
    )


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_the_forward_part_does_not_see_what_it_tells(architecture):
    task, batch, _ = case(architecture, inverse=0.0)
    said = {}
    for name, one in task.objective.forward_heads.items():
        one.register_forward_hook(lambda module, args, out, key=name: said.update({key: out}))
    task.eval()(batch)
    first, cut = dict(said), 3
    later = torch.arange(batch["mask"].shape[1])[None, :, None] >= cut
    task(
        batch.replace(
            observations=torch.where(later, 7.0, batch["observations"]),
            actions=torch.where(later, 7.0, batch["actions"]),
        )
    )
    for key, out in first.items():
        assert torch.equal(out[:, :cut], said[key][:, :cut]) and not torch.equal(
            out[:, cut:], said[key][:, cut:]
        )


@pytest.mark.parametrize(
    ("architecture", "discrete"),
    [
        ("mlp", False),
        pytest.param("transformer", False, marks=pytest.mark.slow),
        pytest.param("transformer", True, marks=pytest.mark.slow),
    ],
)
def test_dynamics_is_better_than_no_change_and_trains_all_of_its_heads(architecture, discrete):
    task, batch, _ = case(architecture, discrete, n=60)
    optimiser = torch.optim.Adam(task.parameters(), 1e-2)
    task.train()
    for step in range(120):
        total, count, _ = task(batch)
        optimiser.zero_grad()
        (total / count).backward()
        assert step or [
            name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()
        ] == ["backbone.tasks.weight"]  # no row has a task
        optimiser.step()
    logs = {name: value.item() for name, value in task.eval()(batch)[2].items()}
    assert (
        logs["forward_error"] < 0.3 * logs["forward_zero"]
        and logs["inverse_error"] < 0.3 * logs["inverse_zero"]
    )


@pytest.mark.parametrize(
    ("options", "heads"), [({"forward": 0.0}, "inverse_heads"), ({"inverse": 0.0}, "forward_heads")]
)
def test_a_part_without_weight_is_not_made_and_its_pass_not_run(options, heads):
    task, batch, _ = case("transformer", **options)
    assert {name.partition(".")[0] for name, _ in task.objective.named_parameters()} == {heads}
    calls = []
    task.backbone.register_forward_pre_hook(
        lambda module, args: calls.append("actions" in args[0].data)
    )
    total, _, logs = task(batch)
    total.backward()
    assert calls == [heads == "forward_heads"] and all(
        p.grad is not None for p in task.parameters()
    )
    assert {name for name, value in logs.items() if value == 0} == {
        f"{next(iter(options))}_error",
        f"{next(iter(options))}_zero",
    }


# ---------------------------------------------------------------- the changes' deviations


def test_changes_are_measured_over_all_steps_that_count():
    """Three batches of unequal length are scaled by the mean square of all real steps before;
    evaluation reads it and leaves it.
    """
    rng = np.random.default_rng(0)
    parts = [
        (
            torch.tensor(rng.normal(0, [1.0, 0.02], (2, n, 2)), dtype=torch.float32),
            torch.tensor(rng.random((2, n)) < 0.7),
        )
        for n in (4, 9, 2)
    ]
    one, seen, square = RunningScale(2).train(), [], torch.ones(2)
    for change, there in parts:
        torch.testing.assert_close(one(change, there), change / square.sqrt())
        one.update()
        seen.append(change[there])
        square = torch.cat(seen).square().mean(0)
        torch.testing.assert_close(one.square, square)
    held = one.square.clone()
    one.eval()(torch.ones(1, 3, 2) * 50, torch.ones(1, 3, dtype=torch.bool))
    one.update()
    assert torch.equal(one.square, held) and one.steps == sum(
        int(there.sum()) for _, there in parts
    )


@torch.no_grad()
def test_ranks_with_other_rows_have_one_scale_and_the_loss_of_one_rank(monkeypatch):
    """Two ranks share a batch's rows; in the second step the first rank has none."""
    whole, batch, _ = case()
    whole.train()
    ranks = [copy.deepcopy(whole) for _ in range(2)]

    def update_ranks() -> None:
        for name in ranks[0].objective.changes:
            scales = [rank.objective.changes[name] for rank in ranks]
            total = sum(scale.seen for scale in scales if scale.seen is not None)
            monkeypatch.setattr(all_gather, "all_reduce_sum", lambda _, total=total: total)
            for scale in scales:
                scale.update()
        monkeypatch.undo()

    for parts in (batch.split(8), (batch.empty(), batch)):
        losses = [rank(part)[0] for rank, part in zip(ranks, parts, strict=True)]
        assert sum(losses).item() == pytest.approx(whole(batch)[0].item(), rel=1e-5)
        whole.objective.after_step(whole.backbone, 0, 2)
        update_ranks()
    for name, scale in whole.objective.changes.items():
        for rank in ranks:
            torch.testing.assert_close(rank.objective.changes[name].square, scale.square)


def test_what_stands_still_or_is_not_there_makes_no_number_infinite():
    one = RunningScale(2).train()
    one(torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool))
    one.update()
    assert one(torch.ones(1, 1, 2) * STILL, torch.zeros(1, 1, dtype=torch.bool)).tolist() == [
        [[1, 1]]
    ]
    one.update()
    assert not one.square.any() and one.steps == 4
    one.steps.fill_(MAX_STEPS)
    one(torch.ones(1, 10, 2), torch.ones(1, 10, dtype=torch.bool))
    one.update()
    assert one.steps == MAX_STEPS and one.square[0].item() == pytest.approx(
        10 / MAX_STEPS, rel=1e-4
    )


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_learned_is_reported():
    with pytest.raises(ValueError, match="toys/net is not a policy: dynamics takes"):
        Dynamics(Net(), DynamicsOptions(), {})
    with pytest.raises(ValueError, match="forward and inverse of dynamics are both 0"):
        case(forward=0.0, inverse=0.0)
    with pytest.raises(ValueError, match="column done: none of 2 training rows has an action"):
        Dynamics.fit(
            DynamicsOptions(),
            pa.table({"done": pa.array([[], None], pa.list_(pa.string()))}),
            {"actions": "done"},
        )
    gaps = pa.table({"done": pa.array([["left"], [], None])})
    assert Dynamics.invalid_label_reasons(gaps, {"actions": "done"}, {}) == [
        "",
        "done holds no action",
        "done holds no action",
    ]
    task, batch, _ = case()
    del batch.data["actions"]
    with pytest.raises(ValueError, match="give --column actions=NAME"):
        task.objective.predict(task.backbone, batch)


@torch.no_grad()
@every
def test_what_was_executed_is_what_changes_the_world(architecture, discrete):
    """Actions to be learned may be others: they decide nothing here. A step whose class nobody
    teaches counts for nothing.
    """
    task, batch, _ = case(architecture, discrete)
    task.eval()
    executed = batch["actions"].flip(0)
    executed = torch.where(batch["mask"][..., None], executed, 0.0)
    want = task(batch.replace(actions=executed))
    found = task(batch.replace(executed=executed))
    torch.testing.assert_close(found[0], want[0])
    assert found[1] == want[1]
    none, row = executed.clone(), int((batch["mask"][:, 1] & executed[:, 0].any(-1)).nonzero()[0])
    none[row, 0] = 0.0
    assert task(batch.replace(executed=none))[1] == found[1] - int(discrete)
