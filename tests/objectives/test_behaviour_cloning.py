"""Behaviour cloning: losses against torch.distributions, chunks against a loop, metrics against
sklearn, and episodes against a bare loop.
"""

import math

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as theirs
import torch
from torch import distributions as dist
from torch import nn
from toys import Net, rows_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Backbone, Batch, Features, RawRows, Task
from pipeline.core.contracts.objective_capabilities import CountsRows, TransfersHead
from pipeline.core.metrics.catalog import metric
from pipeline.core.nn import action_heads
from pipeline.core.specs import Architecture, ObjectiveSpec
from pipeline.data import manifests
from pipeline.data.stream import Decoder, Rows
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.objectives import behaviour_cloning
from pipeline.objectives.behaviour_cloning import (
    BehaviourCloning,
    BehaviourCloningOptions,
    Pilot,
    worst_return,
)
from pipeline.simulation.environment import World, make
from pipeline.simulation.rollout import Episode
from pipeline.train import evaluate

COLUMNS = {"observations": "seen", "actions": "done", "embodiment": "robot", "task": "what"}
OPTIONS = BehaviourCloningOptions()


class Steps(Backbone):
    """A causal backbone: token t is of the mean of the observations up to t and of the actions
    before t, through a layer of each space.
    """

    causal = True

    def __init__(self, inputs, width: int = 6, window: int = 100):
        nn.Module.__init__(self)
        self.pooled_dim = self.token_dim = width
        self.arch = Architecture("toys/steps", {"window": window}, inputs)
        self.encoders = nn.ModuleDict(
            {
                name: nn.Linear(space["observation"], width)
                for name, space in inputs["spaces"].items()
            }
        )
        self.action_encoders = nn.ModuleDict(
            {
                name: nn.Linear(space["action"], width, bias=False)
                for name, space in inputs["spaces"].items()
            }
        )
        self.tasks = nn.Embedding(inputs["tasks"] + 1, width)

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        mask, tokens = batch["mask"], 0
        for number, (name, space) in enumerate(self.arch.inputs["spaces"].items()):
            x = self.encoders[name](batch["observations"][..., : space["observation"]])
            if "actions" in batch.data:
                x = (
                    x
                    + nn.functional.pad(
                        self.action_encoders[name](batch["actions"][..., : space["action"]]),
                        (0, 0, 1, 0),
                    )[:, :-1]
                )
            tokens = tokens + x * (batch["space"] == number)[:, None, None]
        tokens = (tokens + self.tasks(batch["task"])[:, None]) * mask[..., None]
        tokens = torch.tanh(tokens.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None])
        return Features(tokens.mean(1), tokens, mask)

    def layers(self):
        return {"all": [name for name, _ in self.named_parameters()]}


class Plain(Backbone):
    """Token t is the standardised observation itself."""

    causal = True

    def __init__(self, inputs):
        nn.Module.__init__(self)
        self.pooled_dim = self.token_dim = max(
            space["observation"] for space in inputs["spaces"].values()
        )
        self.arch = Architecture("toys/plain", {"window": 1}, inputs)
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        return Features(batch["observations"].mean(1), batch["observations"], batch["mask"])

    def layers(self):
        return {"all": ["nothing"]}


ROBOTS = {"arm": (3, 2), "leg": (5, 4)}
CLASSES = ("back", "left", "right")


def episodes(n: int = 12, discrete: bool = False, seed: int = 0) -> pa.Table:
    """Episodes of 1 to 9 steps of two robots in turn; actions follow from the observations. Classes
    are the largest of the first three numbers.
    """
    rng = np.random.default_rng(seed)
    rows = {"seen": [], "done": [], "robot": [], "what": []}
    for i in range(n):
        name = ("arm", "leg")[i % 2]
        observation, action = ROBOTS[name]
        seen = rng.normal(2.0, 3.0, (1 + (i * 4) % 9, observation)).astype(np.float32)
        law = np.random.default_rng(7).normal(size=(observation, action))
        rows["seen"].append(seen.tolist())
        rows["done"].append(
            [CLASSES[k] for k in seen[:, :3].argmax(1)]
            if discrete
            else (5 + seen @ law).astype(np.float32).tolist()
        )
        rows["robot"].append(name)
        rows["what"].append(("reach", "push", "")[i % 3])
    of = pa.string() if discrete else pa.list_(pa.float32())
    return pa.table(
        {
            "seen": pa.array(rows["seen"], pa.list_(pa.list_(pa.float32()))),
            "done": pa.array(rows["done"], pa.list_(of)),
            "robot": rows["robot"],
            "what": rows["what"],
        }
    )


def case(
    discrete: bool = False,
    seed: int = 0,
    table: pa.Table | None = None,
    columns=COLUMNS,
    width: int = 6,
    **options,
) -> tuple[Task, Rows]:
    table = episodes(discrete=discrete) if table is None else table
    chosen = BehaviourCloningOptions(**options)
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, columns, "toys/steps")
    )
    state = BehaviourCloning.fit(chosen, table, columns)
    arrays, bad = Decoder(modality, "behaviour_cloning", state, columns)(table)
    assert not any(bad)
    torch.manual_seed(seed)
    backbone = Steps(modality.inputs(), width)
    return Task(backbone, BehaviourCloning(backbone, chosen, state)), rows_of(
        modality, arrays, "behaviour_cloning", state
    )


def take(rows: Rows, places) -> Batch:
    places = np.asarray(places)
    assert rows.arrays is not None
    return Batch(
        places,
        torch.zeros(len(places), dtype=torch.int64),
        rows.modality.collate({name: array[places] for name, array in rows.arrays.items()}),
    )


HEADS = [
    {"head": "mse"},
    {"head": "gaussian"},
    {"head": "mixture", "components": 3},
    {"head": "categorical"},
]
each_head = pytest.mark.parametrize(
    "options",
    [{**head, "chunk": chunk} for head in HEADS for chunk in (1, 4)],
    ids=lambda o: f"{o['head']}-{o['chunk']}",
)


# ---------------------------------------------------------------- losses


@torch.no_grad()
@each_head
def test_losses_are_those_of_distributions_step_by_step(options):
    """Over rows, steps and places of chunks in a loop; the actions are read from the table, not
    from the batch.
    """
    task, rows = case(options["head"] == "categorical", **options)
    task.eval()
    table, batch, k = (
        episodes(discrete=options["head"] == "categorical"),
        take(rows, np.arange(12)),
        options.get("components", 1),
    )
    tokens = task.backbone(batch, want=("tokens",)).tokens.double()
    total, count, squares, numbers = 0.0, 0, np.zeros(12), np.zeros(12)
    for i, (done, robot) in enumerate(
        zip(table["done"].to_pylist(), table["robot"].to_pylist(), strict=True)
    ):
        space, decoder = (
            rows.modality.state["spaces"][robot],
            task.objective.decoders[robot].double(),
        )
        width = space["action"]
        for t in range(len(done)):
            out = decoder(tokens[i, t]).view(options["chunk"], -1)
            for h in range(min(options["chunk"], len(done) - t)):
                of = out[h]
                if options["head"] == "categorical":
                    goal = torch.tensor(space["discrete"].index(done[t + h]))
                    total -= float(dist.Categorical(logits=of).log_prob(goal))
                    error = float(of.argmax() != goal)
                else:
                    goal = (
                        torch.tensor(done[t + h]).double()
                        - torch.tensor(space["action_mean"]).double()
                    ) / torch.tensor(space["action_std"]).double()
                    mean = of[:width]
                    if options["head"] == "mse":
                        total += float((of - goal).square().mean())
                    elif options["head"] == "gaussian":
                        total -= float(dist.Normal(mean, std(of[width:])).log_prob(goal).sum())
                    else:
                        means, stds = (
                            of[k : k + k * width].view(k, width),
                            std(of[k + k * width :]).view(k, width),
                        )
                        message = dist.MixtureSameFamily(
                            dist.Categorical(logits=of[:k]),
                            dist.Independent(dist.Normal(means, stds), 1),
                        )
                        total -= float(message.log_prob(goal))
                        mean = means[of[:k].argmax()]
                    # In the action's own units
                    error = float(
                        ((mean - goal) * torch.tensor(space["action_std"])).square().sum()
                    )
                count += 1
                if h == 0:
                    squares[i] += error
                    numbers[i] += 1 if options["head"] == "categorical" else width
    task.float()
    found, many, logs = task(batch)
    assert found.item() == pytest.approx(total, rel=1e-5) and many == count
    predicted = {
        name: tensor.numpy()
        for name, tensor in task.objective.predict(task.backbone, batch).items()
    }
    np.testing.assert_allclose(predicted["squared_error"], squares, rtol=1e-4)
    assert predicted["action_numbers"].tolist() == numbers.tolist()
    assert metric("action_error").value(predicted) == pytest.approx(
        squares.sum() / numbers.sum(), rel=1e-5
    )
    assert metric("loss").value(predicted) == pytest.approx(total / count, rel=1e-5)
    assert set(logs) == set(BehaviourCloning.log_names) and (
        options["chunk"] > 1 or options["head"] != "categorical" or logs["error"] == squares.sum()
    )


def std(raw: torch.Tensor) -> torch.Tensor:
    low, high = action_heads.LOG_STD
    return (low + (high - low) * (torch.tanh(raw) + 1) / 2).exp()


@torch.no_grad()
def test_deviations_stay_within_their_bounds():
    """A demonstration that is met exactly gains no more than the bound allows."""
    target = torch.zeros(1, 2)
    exact = action_heads.losses("gaussian", torch.tensor([[0.0, 0.0, -1e9, -1e9]]), target, 1)
    assert exact.item() == pytest.approx(
        2 * (action_heads.LOG_STD[0] + 0.5 * math.log(2 * math.pi)), rel=1e-6
    )


def test_in_training_densities_are_weighed_by_the_told_variance_which_gets_no_gradient_by_it():
    """beta-NLL by torch.distributions, with the gradient of its weights left out; evaluation has
    none.
    """
    torch.manual_seed(0)
    out, target, beta = torch.randn(7, 6, requires_grad=True), torch.randn(7, 3), 0.5
    mean, deviation = out[:, :3], std(out[:, 3:])
    want = -(dist.Normal(mean, deviation).log_prob(target) * deviation.detach() ** (2 * beta)).sum(
        -1
    )
    found = action_heads.losses("gaussian", out, target, 1, beta)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(one.sum(), out, retain_graph=True)[0] for one in (found, want))
    )
    message = torch.randn(7, 2 * (1 + 2 * 3), requires_grad=True)
    logits, deviation = message[:, :2], std(message[:, 8:]).view(7, 2, 3)
    weight = torch.exp(2 * beta * (logits.softmax(-1) * deviation.log().mean(-1)).sum(-1)).detach()
    plain, weighed = (action_heads.losses("mixture", message, target, 2, b) for b in (0.0, beta))
    torch.testing.assert_close(weighed, plain * weight)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(one.sum(), message, retain_graph=True)[0]
            for one in (weighed, plain * weight)
        )
    )
    (task, rows), (bare, _) = (case(head="gaussian", beta=b) for b in (0.5, 0.0))
    batch = take(rows, np.arange(12))
    assert (
        task.eval()(batch)[0]
        == bare.eval()(batch)[0]
        == bare.train()(batch)[0]
        != task.train()(batch)[0]
    )


@torch.no_grad()
@each_head
def test_padding_and_neighbours_change_nothing_and_parts_make_the_whole(options):
    task, rows = case(options["head"] == "categorical", **options)
    task.eval()
    batch = take(rows, np.arange(12))
    total, count, logs = task(batch)
    parts = [task(part) for part in batch.split(5)]
    assert (
        sum(p[0] for p in parts).item() == pytest.approx(total.item(), rel=1e-5)
        and sum(p[1] for p in parts) == count
    )
    assert sum(p[2]["error"] for p in parts).item() == pytest.approx(logs["error"].item(), rel=1e-5)
    noise = {
        name: torch.where(batch["mask"][..., None], batch[name], torch.rand_like(batch[name]) * 9)
        for name in ("observations", "actions")
    }
    torch.testing.assert_close(task(batch.replace(**noise))[0], total)
    found, alone = (
        task.objective.predict(task.backbone, take(rows, places))
        for places in (np.arange(12), [7, 2])
    )
    for name, tensor in alone.items():
        wide = found[name][[7, 2]]
        torch.testing.assert_close(
            tensor,
            wide[:, : tensor.shape[1]] if tensor.dim() > 1 else wide,
            equal_nan=True,
            rtol=1e-4,
            atol=1e-5,
        )
    empty = Batch(
        batch.rows[:2],
        batch.keys[:2],
        {**take(rows, [0, 1]).data, "mask": torch.zeros(2, 5, dtype=torch.bool)},
    )
    assert task(empty)[:2] == (0, 0)


@each_head
def test_every_parameter_gets_a_gradient_also_of_spaces_that_are_not_there(options):
    task, rows = case(options["head"] == "categorical", **options)
    batch = take(rows, np.arange(12))
    task(batch)[0].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()] == []
    task.zero_grad()
    task(take(rows, [0, 2]))[0].backward()  # arms alone
    still = {name for name, p in task.named_parameters() if not p.grad.any()}
    assert {
        "objective.decoders.leg.weight",
        "backbone.encoders.leg.weight",
    } <= still and "objective.decoders.arm.weight" not in still


@torch.no_grad()
def test_what_comes_later_changes_no_prediction():
    task, rows = case(chunk=3)
    batch = take(rows, [8])
    del batch.data["graded"]
    later = torch.arange(batch["mask"].shape[1])[None, :, None] >= 3
    changed = batch.replace(
        observations=torch.where(later, 9.0, batch["observations"]),
        actions=torch.where(later, 9.0, batch["actions"]),
    )
    a, b = (task.eval().objective.predict(task.backbone, one)["action"] for one in (batch, changed))
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.isclose(a[:, 3:5, :2], b[:, 3:5, :2]).any()


def test_dropout_is_for_training_alone():
    task, rows = case(dropout=0.5)
    batch = take(rows, np.arange(12))
    a, b = (task.train()(batch)[0] for _ in range(2))
    c, d = (task.eval()(batch)[0] for _ in range(2))
    assert a != b and c == d and a != c


@pytest.mark.parametrize("head", [{"head": "auto"}, {"head": "gaussian"}, {"head": "mixture"}])
def test_a_mixture_tells_of_two_ways_where_a_mean_goes_between(head):
    """Demonstrations pass an obstacle on either side (+1 or -1, by chance): the mean is 0, the
    likeliest component is one of them.
    """
    table = pa.table(
        {
            "seen": pa.array(
                [[[float(i % 3)]] for i in range(60)], pa.list_(pa.list_(pa.float32()))
            ),
            "done": pa.array(
                [[[1.0 if i % 2 else -1.0]] for i in range(60)], pa.list_(pa.list_(pa.float32()))
            ),
        }
    )
    task, rows = case(table=table, columns={"observations": "seen", "actions": "done"}, **head)
    optimiser, batch = torch.optim.Adam(task.parameters(), 0.05), take(rows, np.arange(60))
    for _ in range(150):
        total, count, _ = task(batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    del batch.data["graded"]
    message = task.objective.predict(task.backbone, batch)["action"].abs()
    assert (message > 0.9).all() if head["head"] == "mixture" else (message < 0.3).all()


# ---------------------------------------------------------------- columns

DISCRETE = episodes(discrete=True)


def test_what_is_fitted():
    message = BehaviourCloning.fit(OPTIONS, DISCRETE, COLUMNS)
    assert message == {"kind": "discrete", "columns": [], "labels": list(CLASSES)}
    assert BehaviourCloning.target_metrics(OPTIONS, message) == ("macro_f1", "accuracy", "loss")
    worlds = {**COLUMNS, "environment": "env", "return": "r", "random_steps": "n"}
    message = BehaviourCloning.fit(OPTIONS, episodes(), worlds)
    assert message == {"kind": "continuous", "columns": ["environment", "return", "random_steps"]}
    assert (
        BehaviourCloning.target_metrics(OPTIONS, message) == ("action_error", "loss")
        and BehaviourCloning.metrics[0] == "loss"
    ), "standardised, for many robots"
    assert BehaviourCloning.rollout_metrics(OPTIONS, message) == (
        "success",
        "return",
        "steps",
        "expert_return",
        "random_steps",
    )
    assert BehaviourCloning.rollout_metrics(OPTIONS, {**message, "columns": ["return"]}) == ()
    full = BehaviourCloning.rollout_metrics(
        OPTIONS, {**message, "columns": list(BehaviourCloning.optional_roles)}
    )
    assert set(full) == {
        f"{who}{name}"
        for who in ("", "expert_", "random_")
        for name in ("success", "return", "steps")
    }
    assert (
        full[:3] == ("success", "return", "steps")
        and {*full, "action_error"} <= registry.entries("metric").keys()
    )
    for ident, names in (
        ("Hopper-v5", ("success", "return", "steps")),
        ("MountainCarContinuous-v0", ("return", "steps")),
    ):
        rows = episodes().append_column(
            "env", pa.array([World(ident, 40, 0, {}).text()] * len(episodes()))
        )
        assert (
            BehaviourCloning.rollout_metrics(
                OPTIONS, BehaviourCloning.fit(OPTIONS, rows, {**COLUMNS, "environment": "env"})
            )
            == names
        )
        # The rows know it themselves
        judged = rows.append_column("won", pa.array([True, *[None] * (len(rows) - 1)]))
        assert BehaviourCloning.fit(
            OPTIONS, judged, {**COLUMNS, "environment": "env", "success": "won"}
        )["judged"]
    rows = episodes().append_column("env", pa.nulls(len(episodes()), pa.string()))  # a real robot's
    assert BehaviourCloning.fit(OPTIONS, rows, {**COLUMNS, "environment": "env"})["judged"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["b", "a", "c"], ["a", "b", "c"]),
        (["10", "9", "x", "a"], ["10", "9", "a", "x"]),
        ([3, 10, 2], ["10", "2", "3"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_classes_stand_in_the_order_of_the_modality(names, order):
    table = pa.table(
        {
            "seen": pa.array([[[1.0, 2.0]] * len(names)], pa.list_(pa.list_(pa.float32()))),
            "done": pa.array([names]),
        }
    )
    columns = {"observations": "seen", "actions": "done"}
    assert BehaviourCloning.fit(OPTIONS, table, columns)["labels"] == order
    (space,) = Trajectory.fit(TrajectoryOptions(), table, columns, "")["spaces"].values()
    assert space["discrete"] == order


@pytest.mark.parametrize(
    ("done", "options", "message"),
    [
        (
            pa.array([[], None], pa.list_(pa.string())),
            {},
            "column done: none of 2 training rows has an action",
        ),
        (
            pa.array([1.0, 2.0]),
            {},
            "column done holds double: actions are, a step, a list of numbers",
        ),
        (pa.array([[1.0], [2.0]]), {}, r"column done holds list<.*double>: actions are, a step"),
        (
            pa.array([["a"], ["b"]]),
            {"head": "gaussian"},
            "option head of behaviour_cloning: gaussian does not suit column done, whose "
            "actions are class names",
        ),
        (
            pa.array([[[1.0]], [[2.0]]]),
            {"head": "categorical"},
            "categorical does not suit column done, whose actions are numbers: set mse, "
            "gaussian or mixture",
        ),
    ],
)
def test_columns_and_options_that_cannot_be_used_are_reported(done, options, message):
    with pytest.raises(ValueError, match=message):
        BehaviourCloning.fit(
            BehaviourCloningOptions(**options), pa.table({"done": done}), {"actions": "done"}
        )


def test_an_action_never_seen_in_training_is_named_and_rows_without_one_are_refused():
    state = BehaviourCloning.fit(OPTIONS, DISCRETE, COLUMNS)
    other = pa.table({"done": pa.array([["left", "lefft"]])})
    with pytest.raises(
        ValueError,
        match=r"column done: action 'lefft' is in no training row \(\d actions known\); did you mean "
        "left",
    ):
        BehaviourCloning.encode(other, COLUMNS, state)
    with pytest.raises(
        ValueError,
        match="column done holds continuous actions, and the training rows hold discrete ones",
    ):
        BehaviourCloning.encode(episodes(), COLUMNS, state)
    gaps = pa.table({"done": pa.array([["left"], [], None, ["left", None]])})
    assert BehaviourCloning.encode(gaps, COLUMNS, state)["graded"].tolist() == [1, 0, 0, 2]
    assert BehaviourCloning.invalid_label_reasons(gaps, COLUMNS, state) == [
        "",
        "done holds no action",
        "done holds no action",
        "done lacks the action of a step",
    ]
    without = gaps.drop_columns(["done"]).append_column("x", pa.array([1, 2, 3, 4]))
    assert (
        BehaviourCloning.encode(without, COLUMNS, state) == {}
        and BehaviourCloning.invalid_label_reasons(without, COLUMNS, state) == [""] * 4
    )


def test_backbones_that_are_no_policies_are_refused():
    with pytest.raises(ValueError, match="toys/net is not a policy"):
        BehaviourCloning(Net(), OPTIONS, {"kind": "continuous", "columns": []})
    task, _ = case()
    task.backbone.causal = False
    with pytest.raises(ValueError, match="toys/steps is not a policy"):
        BehaviourCloning(task.backbone, OPTIONS, {"kind": "continuous", "columns": []})
    task.backbone.causal, task.backbone.arch.inputs["images"] = True, [3, 64, 64]
    with pytest.raises(ValueError, match="reads images, and a rollout gives observations alone"):
        BehaviourCloning(task.backbone, OPTIONS, {"kind": "continuous", "columns": ["environment"]})


# ---------------------------------------------------------------- metrics and what is written


def learned(discrete: bool, **options) -> tuple[Task, Rows]:
    task, rows = case(discrete, table=episodes(60, discrete), width=12, **options)
    optimiser, batch = torch.optim.Adam(task.parameters(), 0.02), take(rows, np.arange(60))
    for _ in range(60):
        total, count, _ = task.train()(batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    task.eval()
    return task, rows


def test_metrics_of_classes_are_sklearns_over_all_steps():
    task, rows = learned(True)
    parts = [
        {
            "row": batch.rows,
            **{
                name: tensor.detach().numpy()
                for name, tensor in task.objective.predict(task.backbone, batch).items()
            },
        }
        for batch in (take(rows, places) for places in np.array_split(np.arange(60), 7))
    ]
    found = evaluate.concatenate(parts)
    known = found["label"] >= 0
    y = np.concatenate(
        [[CLASSES.index(one) for one in done] for done in episodes(60, True)["done"].to_pylist()]
    )
    guess = found["scores"][known].argmax(1)
    assert np.array_equal(found["label"][known], y) and np.isnan(found["scores"][~known]).all()
    values = {
        name: metric(name).value(found) for name in ("macro_f1", "accuracy", "loss", "action_error")
    }
    assert (
        values["macro_f1"] == pytest.approx(theirs.f1_score(y, guess, average="macro"))
        and values["macro_f1"] > 0.5
    )
    assert values["accuracy"] == pytest.approx(theirs.accuracy_score(y, guess)) and values[
        "action_error"
    ] == pytest.approx(1 - values["accuracy"])
    chance = torch.from_numpy(found["scores"][known]).double().softmax(-1).numpy()
    assert values["loss"] == pytest.approx(theirs.log_loss(y, chance, labels=range(3)), rel=1e-5)


def parquet(path, table: pa.Table) -> manifests.Selection:
    pq.write_table(table, path)
    return manifests.Selection(manifests.build([str(path)], "parquet", ""))


@pytest.mark.parametrize("discrete", [False, True])
def test_new_rows_are_written_in_their_own_units(tmp_path, discrete):
    """Through the reader, as ``onetomany predict`` does it; rows have no actions, and one of them
    cannot be read.
    """
    task, rows = case(discrete, head="auto", chunk=2)
    table = episodes(discrete=discrete).drop_columns(["done"])
    seen = table["seen"].to_pylist()
    seen[3] = None
    table = table.set_column(0, "seen", pa.array(seen, table["seen"].type))
    selection = parquet(tmp_path / "new.parquet", table)
    new = Rows(
        selection,
        Decoder(
            rows.modality,
            None,
            {},
            {name: column for name, column in COLUMNS.items() if name != "actions"},
        ),
    )
    new = new.in_memory(1.0, cpus=0, keep_bad=True)
    assert new.arrays is not None and len(new.bad) == 1
    with torch.no_grad():
        batch = Batch(np.arange(12), torch.zeros(12), rows.modality.collate(new.arrays))
        with pytest.raises(
            ValueError,
            match=r"toys/steps reads the actions before each step, and these rows have none: give "
            r"--column actions=NAME",
        ):
            task.objective.predict(task.backbone, batch)
        task.objective.reads_actions = False  # as one that reads observations alone
        found = {
            name: tensor.numpy()
            for name, tensor in task.eval().objective.predict(task.backbone, batch).items()
        }
        tokens = task.backbone(batch, want=("tokens",)).tokens
        task.objective.train()
    completer = evaluate.Postprocessor(new)
    raw_rows = completer.raw_rows(task.objective, selection.ids(np.arange(12)))
    written = task.objective.output_columns(found, raw_rows)
    assert set(written) == ({"prediction", "probabilities"} if discrete else {"actions"})
    for i, (steps, robot) in enumerate(zip(seen, table["robot"].to_pylist(), strict=True)):
        space = rows.modality.state["spaces"][robot]
        out = (
            task.objective.decoders[robot](tokens[i])
            .detach()
            .numpy()[: len(steps or ()), : space["action"]]
        )
        if discrete:
            assert written["prediction"][i] == [space["discrete"][k] for k in out.argmax(1)]
            np.testing.assert_allclose(
                np.array(written["probabilities"][i]).reshape(-1, 3),
                torch.from_numpy(out).softmax(1),
                rtol=1e-4,
            )
        else:
            want = out * np.array(space["action_std"]) + np.array(space["action_mean"])
            np.testing.assert_allclose(
                np.array(written["actions"][i]).reshape(want.shape), want, rtol=1e-4, atol=1e-4
            )
    kinds = BehaviourCloning.output_types
    assert (
        len(
            pa.table(
                {name: pa.array(array.tolist(), kinds[name]) for name, array in written.items()}
            )
        )
        == 12
    )


def test_a_target_of_other_spaces_keeps_the_shared_decoder():
    """Options and state are JSON; a target of other spaces keeps the decoder of the space that it
    shares.
    """
    task, rows = case(head="gaussian")
    other = {
        **rows.modality.state["spaces"],
        "hand": {**rows.modality.state["spaces"]["arm"], "action": 7},
    }
    inputs = Trajectory(
        TrajectoryOptions(),
        {**rows.modality.state, "spaces": {name: other[name] for name in ("arm", "hand")}},
    ).inputs()
    backbone = Steps(inputs)
    head = BehaviourCloning(backbone, task.objective.options, task.objective.state)
    many, message = bundle.carry_tensors(
        head,
        ObjectiveSpec("behaviour_cloning", task.objective.options.model_dump()),
        task.objective.state_dict(),
    )
    assert (
        many == 2
        and torch.equal(head.decoders["arm"].weight, task.objective.decoders["arm"].weight)
        and "2 dropped (decoders.leg" in message
    )
    assert (
        "decoders.hand.weight" in message
        and isinstance(head, TransfersHead)
        and isinstance(BehaviourCloning, CountsRows)
    )


@pytest.mark.parametrize(
    ("theirs", "mine", "kept"),
    [
        ({"head": "gaussian"}, {"head": "mse", "chunk": 2}, 0),
        ({"head": "auto"}, {"head": "mse"}, 4),
        ({"chunk": 3}, {"head": "mse", "chunk": 3}, 4),
        ({"head": "mixture", "components": 3}, {"head": "mixture", "components": 3}, 4),
        ({"head": "gaussian", "dropout": 0.2}, {"head": "gaussian"}, 4),
    ],
)
def test_a_decoder_that_means_something_else_is_new(theirs, mine, kept):
    """Deviations of a gaussian are as many numbers as the second action of a chunk."""
    source, target = case(**theirs)[0], case(**mine)[0]
    spec = ObjectiveSpec("behaviour_cloning", source.objective.options.model_dump())
    assert bundle.carry_tensors(target.objective, spec, source.objective.state_dict())[0] == kept


# ---------------------------------------------------------------- episodes


def test_chunks_are_ensembled_as_the_paper_has_it():
    """By hand, H = 3, m = 0.5: at step 3 the chunks of steps 1, 2 and 3 say something of it,
    weights 1, exp(-0.5), exp(-1) from the oldest on.
    """
    rng = np.random.default_rng(0)
    # Made at steps 0 to 3
    plans = [rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(4)]
    weights = np.exp(-0.5 * np.arange(3))
    want = (
        weights[0] * plans[1][:, 2] + weights[1] * plans[2][:, 1] + weights[2] * plans[3][:, 0]
    ) / weights.sum()
    np.testing.assert_allclose(action_heads.temporal_ensemble(plans[1:], 0.5), want, rtol=1e-6)
    np.testing.assert_allclose(action_heads.temporal_ensemble(plans[:1], 0.5), plans[0][:, 0])
    assert np.array_equal(action_heads.temporal_ensemble(plans[1:], None), plans[3][:, 0])


PENDULUM = {
    "observations": "observations",
    "actions": "actions",
    "environment": "environment",
    "return": "return",
    "success": "success",
    "steps": "steps",
    "random_return": "random_return",
    "random_success": "random_success",
    "random_steps": "random_steps",
}


def worlds(n: int, steps: int = 40) -> list[World]:
    return [World("InvertedDoublePendulum-v5", steps, 100 + seed, {}) for seed in range(n)]


def demonstrations(n: int = 3, steps: int = 40, width: int = 9) -> pa.Table:
    """Rows of worlds with an expert of noise, whose numbers are made up."""
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "observations": pa.array(
                [rng.normal(size=(5, width)).tolist() for _ in range(n)],
                pa.list_(pa.list_(pa.float32())),
            ),
            "actions": pa.array(
                [rng.normal(size=(5, 1)).tolist() for _ in range(n)],
                pa.list_(pa.list_(pa.float32())),
            ),
            "environment": [world.text() for world in worlds(n, steps)],
            "return": [float(i) for i in range(n)],
            "success": [bool(i % 2) for i in range(n)],
            "steps": pa.array([40 + i for i in range(n)], pa.int64()),
            "random_return": [0.5 * i for i in range(n)],
            "random_success": [False] * n,
            "random_steps": pa.array([7] * n, pa.int64()),
        }
    )


LAW = {1: 4.0, 6: 0.5}
"""Index in the observation and factor: the hinge's sine and the pole's velocity."""


def lawful(table: pa.Table, **options) -> tuple[Task, RawRows, dict[str, np.ndarray]]:
    """A policy that does what LAW says; statistics that change nothing."""
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, PENDULUM, "")
    )
    ((name, space),) = modality.state["spaces"].items()
    plain = {
        **space,
        **{
            f"{what}_{key}": [value] * space[what]
            for what in ("observation", "action")
            for key, value in (("mean", 0.0), ("std", 1.0))
        },
    }
    modality = Trajectory(TrajectoryOptions(), {**modality.state, "spaces": {name: plain}})
    backbone, chosen = Plain(modality.inputs()), BehaviourCloningOptions(**options)
    head = BehaviourCloning(backbone, chosen, BehaviourCloning.fit(chosen, table, PENDULUM))
    with torch.no_grad():
        for parameter in head.decoders.parameters():
            parameter.zero_()
        for place, factor in LAW.items() if space["observation"] == 9 else ():
            head.decoders[name].weight[0, place] = factor
    n = len(table)
    found = {
        "row": np.arange(n),
        "space": np.zeros(n, dtype=np.int64),
        "task": np.zeros(n, dtype=np.int64),
        "loss": np.ones(n),
    }
    return Task(backbone, head), RawRows(table.select(list(PENDULUM)), PENDULUM, modality), found


def bare(world: World) -> list[float]:
    """A loop of gymnasium and nothing else."""
    env = gymnasium.make(world.id, max_episode_steps=world.steps)
    seen, _ = env.reset(seed=world.seed)
    rewards, ended = [], False
    while not ended:
        action = np.clip(
            sum(np.float32(factor) * np.float32(seen[place]) for place, factor in LAW.items()),
            -1,
            1,
        )
        seen, reward, terminated, truncated, _ = env.step(np.array([action], dtype=np.float32))
        rewards.append(float(reward))
        ended = terminated or truncated
    env.close()
    return rewards


def test_episodes_of_a_known_law_are_those_of_a_bare_loop():
    """Exactly: products with powers of two are exact, and the sum of two numbers is rounded once,
    whatever their order.
    """
    table = demonstrations()
    task, raw_rows, found = lawful(table, head="gaussian")
    out, _ = task.objective.rollout_evaluation(task.backbone, found, raw_rows)
    each = [bare(world) for world in worlds(3)]
    assert (
        out["return"].tolist() == [float(np.sum(rewards)) for rewards in each]
        and len(set(out["return"])) == 3
    )
    assert out["steps"].tolist() == [len(rewards) for rewards in each] and max(out["steps"]) > 4
    assert out["most_steps"].tolist() == [world.steps for world in worlds(3)] and metric(
        "steps"
    ).bounds(out) == (0, out["most_steps"].mean())
    assert (
        out["expert_return"].tolist() == [0, 1, 2]
        and out["expert_success"].tolist() == [0, 1, 0]
        and out["expert_steps"].tolist() == [40, 41, 42]
    )
    assert (
        out["random_return"].tolist() == [0, 0.5, 1]
        and out["random_success"].tolist() == [0, 0, 0]
        and out["random_steps"].tolist() == [7, 7, 7]
    )
    assert out["diverged"].tolist() == [0, 0, 0] and out["loss"] is found["loss"]
    names = BehaviourCloning.rollout_metrics(task.objective.options, task.objective.state)
    assert (
        len(names) == 9
        and {name: metric(name).value(out) for name in names}["expert_return"] == 1.0
    )
    last = RawRows(raw_rows.table.slice(2, 1), PENDULUM, raw_rows.modality)
    alone, _ = task.objective.rollout_evaluation(
        task.backbone, {name: array[[2]] for name, array in found.items()}, last
    )
    assert alone["return"].tolist() == out["return"][[2]].tolist()


@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
@pytest.mark.parametrize("options", [{}, {"head": "mixture", "chunk": 3, "ensemble": None}])
def test_what_a_policy_does_in_a_rollout_is_what_it_predicts_of_that_episode(architecture, options):
    """Of what was seen and done, read back as a row: the history that a rollout keeps is that of
    training, in two spaces and with tasks, beyond the window.
    """
    rng = np.random.default_rng(3)
    table = pa.table(
        {
            "seen": pa.array(
                [rng.normal(3, 2, (8, k)).tolist() for k in (3, 5)],
                pa.list_(pa.list_(pa.float32())),
            ),
            "done": pa.array(
                [rng.normal(-4, 5, (8, k)).tolist() for k in (2, 4)],
                pa.list_(pa.list_(pa.float32())),
            ),
            "robot": ["arm", "leg"],
            "what": ["push", ""],
        }
    )
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, COLUMNS, "")
    )
    more = {"mlp": {"window": 3}, "transformer": {"context": 8, "heads": 2}}[architecture]
    arch = Architecture(f"policy/{architecture}", {"width": 16, **more}, modality.inputs())
    state = BehaviourCloning.fit(OPTIONS, table, COLUMNS)
    task = bundle.build_task(
        arch, ObjectiveSpec("behaviour_cloning", options, state), seed=1
    ).eval()
    decoded, _ = modality.decode(table, COLUMNS)
    order = [1, 0]
    pilot = Pilot(
        task.backbone, task.objective, modality, decoded["space"][order], decoded["task"][order]
    )
    pilot.begin([])
    seen = [np.array(table["seen"][i].as_py(), dtype=np.float32) for i in order]
    acted = [pilot.act([seen[0][t], seen[1][t] if t < 6 else None], None) for t in range(8)]
    assert [one[1] is None for one in acted] == [False] * 6 + [True] * 2
    done = {1: [one[0] for one in acted], 0: [one[1] for one in acted[:6]]}
    again = table.set_column(
        0, "seen", pa.array([seen[1][:6].tolist(), seen[0].tolist()], table["seen"].type)
    )
    again = again.set_column(
        1, "done", pa.array([[one.tolist() for one in done[i]] for i in (0, 1)], table["done"].type)
    )
    arrays, bad = modality.decode(again, COLUMNS)
    assert not any(bad)
    with torch.no_grad():
        message = task.objective.predict(
            task.backbone, Batch(np.arange(2), torch.zeros(2), modality.collate(arrays))
        )
    for row, (i, width) in enumerate(((0, 2), (1, 4))):
        space = modality.state["spaces"][("arm", "leg")[i]]
        want = message["action"][row, : len(done[i]), :width].numpy() * np.array(
            space["action_std"]
        ) + np.array(space["action_mean"])
        np.testing.assert_allclose(np.stack(done[i]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_classes_are_acted_by_name_and_remembered(architecture):
    table = episodes(12, discrete=True)
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, COLUMNS, "")
    )
    more = {"mlp": {"window": 2}, "transformer": {"context": 9, "heads": 2}}[architecture]
    arch = Architecture(f"policy/{architecture}", {"width": 16, **more}, modality.inputs())
    task = bundle.build_task(
        arch,
        ObjectiveSpec("behaviour_cloning", {}, BehaviourCloning.fit(OPTIONS, table, COLUMNS)),
        seed=1,
    ).eval()
    seen = np.array(table["seen"][4].as_py(), dtype=np.float32)
    pilot = Pilot(
        task.backbone,
        task.objective,
        modality,
        np.array([modality.decode(table, COLUMNS)[0]["space"][4]]),
        np.array([2]),
    )
    pilot.begin([])
    acted = [pilot.act([one], [0.0])[0] for one in seen]
    again = table.slice(4, 1).set_column(1, "done", pa.array([acted]))
    again = again.set_column(3, "what", pa.array([modality.state["tasks"][1]]))
    with torch.no_grad():
        message = task.objective.predict(
            task.backbone,
            Batch(
                np.arange(1), torch.zeros(1), modality.collate(modality.decode(again, COLUMNS)[0])
            ),
        )
    assert [CLASSES[k] for k in message["scores"][0, : len(seen)].argmax(1)] == acted and len(
        seen
    ) > 3


def test_classes_that_the_rows_count_otherwise_than_the_world_are_done_by_their_names():
    """The world's classes are four, the demonstrations know two of them: their second one is the
    world's third (Slight-Left-Turn).
    """
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "observations": pa.array(
                [rng.uniform(0, 5, (2, 24)).tolist()], pa.list_(pa.list_(pa.float32()))
            ),
            "actions": pa.array([["Slight-Left-Turn", "Move-Forward"]]),
            "environment": [World("onetomany/WallFollowing-v0", 9, 5, {}).text()],
        }
    )
    columns = {name: name for name in table.column_names}
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, columns, "")
    )
    backbone = Plain(modality.inputs())
    head = BehaviourCloning(backbone, OPTIONS, BehaviourCloning.fit(OPTIONS, table, columns))
    (decoder,) = head.decoders.values()
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.copy_(torch.tensor([0.0, 1.0]))
    found = {"space": np.zeros(1, dtype=np.int64), "task": np.zeros(1, dtype=np.int64)}
    out, _ = head.rollout_evaluation(backbone, found, RawRows(table, columns, modality))
    env = make(World("onetomany/WallFollowing-v0", 9, 5, {}))
    env.reset(seed=5)
    rewards, ended = [], False
    while not ended:
        _, reward, terminated, truncated, _ = env.step(2)
        rewards.append(reward)
        ended = terminated or truncated
    assert out["return"].tolist() == [sum(rewards)] and out["steps"].tolist() == [len(rewards)]


def test_a_rollout_ensembles_its_chunks():
    """A chunk of three, each place of which is a constant: the first action is place 0, later ones
    are the mean of places 2, 1 and 0.
    """
    task, raw_rows, _ = lawful(demonstrations(1), chunk=3, ensemble=0.5)
    (name,) = task.objective.decoders
    with torch.no_grad():
        task.objective.decoders[name].weight.zero_()
        task.objective.decoders[name].bias.copy_(torch.tensor([1.0, 10.0, 100.0]))
    pilot = Pilot(
        task.backbone,
        task.objective,
        raw_rows.modality,
        np.zeros(1, dtype=np.int64),
        np.zeros(1, dtype=np.int64),
    )
    pilot.begin([])
    acted = [float(pilot.act([np.zeros(9, dtype=np.float32)], None)[0][0]) for _ in range(5)]
    weights = np.exp(-0.5 * np.arange(3))
    later = (weights * [100, 10, 1]).sum() / weights.sum()
    assert acted == pytest.approx(
        [1, (10 + weights[1]) / (1 + weights[1]), later, later, later], rel=1e-6
    )


@torch.no_grad()
def test_what_is_done_lies_within_the_bounds_and_is_remembered_so():
    """A policy that asks for 5, then -0.5, in a world that takes -1 to 1; the units are
    standardised with mean 0.5 and deviation 2.
    """
    table = demonstrations(1)
    modality = Trajectory(
        TrajectoryOptions(), Trajectory.fit(TrajectoryOptions(), table, PENDULUM, "")
    )
    ((name, space),) = modality.state["spaces"].items()
    modality = Trajectory(
        TrajectoryOptions(),
        {**modality.state, "spaces": {name: {**space, "action_mean": [0.5], "action_std": [2.0]}}},
    )
    task = bundle.build_task(
        Architecture("policy/transformer", {"width": 16, "heads": 2}, modality.inputs()),
        ObjectiveSpec("behaviour_cloning", {}, BehaviourCloning.fit(OPTIONS, table, PENDULUM)),
        seed=0,
    ).eval()
    pilot, env = (
        Pilot(
            task.backbone,
            task.objective,
            modality,
            np.zeros(1, dtype=np.int64),
            np.zeros(1, dtype=np.int64),
        ),
        make(worlds(1)[0]),
    )
    pilot.set_bounds([env])
    pilot.begin(worlds(1))
    held = []
    task.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: held.append(args[0]["actions"][0, :, 0].tolist()),
        with_kwargs=True,
    )
    for wanted, done in ((5.0, 1.0), (-0.5, -0.5), (-9.0, -1.0)):
        task.objective.decoders[name].weight.zero_()
        task.objective.decoders[name].bias.fill_((wanted - 0.5) / 2.0)
        assert pilot.act([np.zeros(9, dtype=np.float32)], None)[0].tolist() == pytest.approx([done])
    # (1 - 0.5) / 2, (-0.5 - 0.5) / 2; this step's own is not known
    assert held == [
        [0.0],
        [0.25, 0.0],
        [0.25, -0.5, 0.0],
    ]


def test_a_simulation_that_diverged_has_the_lowest_return_and_no_success(monkeypatch):
    """Until it diverged it had lost less than those that went on."""
    table = demonstrations(2)
    task, raw_rows, found = lawful(table)

    def made(these, policy, **also):
        return [
            Episode(
                world,
                np.zeros((3, 9)),
                np.zeros((3, 1)),
                np.array([-1.0, -2.0, -3.5] if i == 0 else [-1.0]),
                False,
                i == 0,
                True,
                "NaN" if i else "",
                [np.full((2, 4, 3), 7, dtype=np.uint8)] * 2 if not i else [],
            )
            for i, world in enumerate(these)
        ]

    monkeypatch.setattr(behaviour_cloning, "rollout", made)
    out, pictures = task.objective.rollout_evaluation(task.backbone, found, raw_rows)
    assert (
        out["success"].tolist() == [1, 0]
        and out["diverged"].tolist() == [0, 1]
        and out["return"].tolist() == [-6.5, -6.5]
    )
    # Pictures of the first alone
    assert (
        pictures.shape == (behaviour_cloning.FRAMES, 2, 4, 3)
        and (pictures[:2] == 7).all()
        and not pictures[2:].any()
    )
    assert out["success"].shape == (2,) and "film" not in out


@pytest.mark.parametrize(
    ("returns", "diverged", "random", "worst"),
    [
        ([-9.0, -1.0], [0, 1], [-40.0, np.nan], -40.0),
        ([100.0, 3.0], [0, 1], [], 3.0),
        ([-1.0, -1.0], [1, 1], [-40.0, -30.0], -40.0),
        ([-1.0, -1.0], [1, 1], [np.nan, np.nan], np.nan),
    ],
)
def test_a_diverged_episode_is_never_better_than_another(returns, diverged, random, worst):
    found = worst_return(np.array(returns), np.array(diverged) > 0, np.array(random))
    assert found == pytest.approx(worst, nan_ok=True)


def test_worlds_that_cannot_be_are_told_before_anything_is_trained():
    state = {"kind": "continuous", "columns": ["environment"]}
    table = demonstrations(3)
    BehaviourCloning.check_test(OPTIONS, table, PENDULUM, state)
    for text, message in (
        (None, "column environment, row 1 of the split"),
        ("{", "column environment, row 1 of the split"),
        (World("InvertedDoublePendulu-v5", 40, 0, {}).text(), "InvertedDouble"),
    ):
        given = [table["environment"][0].as_py(), text, table["environment"][2].as_py()]
        wrong = table.set_column(
            table.column_names.index("environment"), "environment", pa.array(given)
        )
        with pytest.raises(ValueError, match=message):
            BehaviourCloning.check_test(OPTIONS, wrong, PENDULUM, state)
        BehaviourCloning.check_test(OPTIONS, wrong, PENDULUM, {**state, "columns": []})


def test_actions_of_another_kind_or_width_than_the_world_takes_are_reported():
    """One number would be cut to a class in a world of classes, and repeated in one of three."""
    state = {"kind": "continuous", "columns": ["environment"]}
    table = pa.table({"environment": [World("CartPole-v1", 5, 0).text()]})
    with pytest.raises(ValueError, match="CartPole-v1 takes discrete actions, and the training"):
        BehaviourCloning.check_test(OPTIONS, table, PENDULUM, state)
    task, raw_rows, found = lawful(demonstrations(1))
    texts = [World("Hopper-v5", 5, 0).text()]
    place = raw_rows.table.column_names.index("environment")
    hopper = raw_rows.table.set_column(place, "environment", pa.array(texts))
    with pytest.raises(ValueError, match="space o9a1 has actions of 1 numbers, its environment"):
        task.objective.rollout_evaluation(
            task.backbone, found, RawRows(hopper, PENDULUM, raw_rows.modality)
        )


def test_a_world_that_no_row_can_be_of_is_told_before_anything_is_trained(monkeypatch):
    """Where observations are images or dictionaries, each trial would fail at its end."""

    class Seeing(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        action_space = gymnasium.spaces.Box(-1, 1, (1,))

    spec = gymnasium.envs.registration.EnvSpec("Seeing-v0", Seeing)
    monkeypatch.setitem(gymnasium.registry, "Seeing-v0", spec)
    table = pa.table({"environment": [World("Seeing-v0", 5, 0).text()]})
    state = {"kind": "continuous", "columns": ["environment"]}
    with pytest.raises(ValueError, match=r"Seeing-v0: observations of shape \(8, 8, 3\)"):
        BehaviourCloning.check_test(OPTIONS, table, PENDULUM, state)


def test_rows_of_another_environment_are_reported():
    task, raw_rows, found = lawful(demonstrations(2, width=8))
    with pytest.raises(ValueError, match="space o8a1"):
        task.objective.rollout_evaluation(task.backbone, found, raw_rows)


def test_rows_without_a_world_are_left_as_they_are():
    task, raw_rows, found = lawful(demonstrations(2))
    plain = RawRows(
        raw_rows.table, {"observations": "observations", "actions": "actions"}, raw_rows.modality
    )
    out, pictures = task.objective.rollout_evaluation(task.backbone, found, plain)
    assert out is found and pictures is None
