"""The baseline of behaviour cloning: actions of the demonstrated steps that look most alike."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from toys import TRAJECTORY_COLUMNS, episodes, rows_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job, Target
from pipeline.core.batch import Batch
from pipeline.core.metrics.catalog import metric
from pipeline.core.specs import Architecture
from pipeline.data.stream import Decoder, Rows
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.objectives.behaviour_cloning import BehaviourCloning, BehaviourCloningOptions
from pipeline.simulation.environment import World
from pipeline.simulation.rollout import rollout
from pipeline.train import evaluate
from pipeline.transfer import baseline_trials, grid

CLASSES = ("back", "left", "right")


def baseline(name: str = "nearest_steps", **options):
    kind = registry.get("baseline", name)
    return kind(kind.options_class(**options))


def in_classes(table: pa.Table) -> pa.Table:
    """The episodes with a class an action: the largest of an observation's numbers."""
    named = [[CLASSES[int(np.argmax(o))] for o in row] for row in table["observations"].to_pylist()]
    place = table.column_names.index("actions")
    return table.set_column(place, "actions", pa.array(named, pa.list_(pa.string())))


def case(
    tables: list[pa.Table], columns=TRAJECTORY_COLUMNS, **options: Any
) -> tuple[Any, Any, list[Rows]]:
    """An objective whose state is fitted on the first table, and the rows of each."""
    chosen = BehaviourCloningOptions(**options)
    state_of = Trajectory.fit(TrajectoryOptions(), tables[0], columns, "policy/mlp")
    modality = Trajectory(TrajectoryOptions(), state_of)
    state = BehaviourCloning.fit(chosen, tables[0], columns)
    arch = Architecture("policy/mlp", {"width": 8}, modality.inputs())
    backbone = bundle.build_backbone(arch, seed=0)
    parts = []
    for table in tables:
        arrays, bad = Decoder(modality, "behaviour_cloning", state, columns)(table)
        assert not any(bad)
        parts.append(rows_of(modality, arrays, "behaviour_cloning", state))
    return backbone, BehaviourCloning(backbone, chosen, state).eval(), parts


def steps_of(table: pa.Table, robot: str, task: str) -> tuple[np.ndarray, np.ndarray]:
    """The observations and actions of a robot and a task, one row a step."""
    rows = [r for r in table.to_pylist() if (r["embodiment"], r["task"]) == (robot, task)]
    seen, done = ([one for r in rows for one in r[name]] for name in ("observations", "actions"))
    return np.array(seen), np.array(done)


@pytest.mark.parametrize("discrete", [False, True], ids=["numbers", "classes"])
def test_they_are_those_of_scikit_learn(discrete):
    tables = [episodes(24), episodes(12, seed=1)]
    if discrete:
        tables = [in_classes(table) for table in tables]
    _, objective, (rows, others) = case(tables)
    one = baseline(neighbours=[3])
    train, test = (baseline_trials.read(each, one, objective) for each in (rows, others))
    names = ("macro_f1", "accuracy") if discrete else ("action_error", "loss")
    chosen = baseline_trials.choose(one, objective, train, test, names, 0)
    found = chosen.scores(test.inputs)
    place = 0
    for row in tables[1].to_pylist():
        seen, done = np.array(row["observations"]), np.array(row["actions"])
        mine = found[place : place + len(seen)]
        place += len(seen)
        if not row["task"]:
            continue
        learned, labels = steps_of(tables[0], row["embodiment"], row["task"])
        scaler = StandardScaler().fit(learned)
        if discrete:
            model = KNeighborsClassifier(3).fit(scaler.transform(learned), labels)
            expected = model.predict_proba(scaler.transform(seen))
            known = rows.modality.spaces[row["embodiment"]].discrete
            columns = [known.index(name) for name in model.classes_]
            np.testing.assert_allclose(mine[:, columns], expected, atol=1e-5)
            continue
        model = KNeighborsRegressor(3).fit(scaler.transform(learned), labels)
        expected = model.predict(scaler.transform(seen))
        acted = rows.modality.act(row["embodiment"], mine[:, : done.shape[1]])
        np.testing.assert_allclose(acted, expected, rtol=1e-4, atol=1e-4)
    assert place == len(found)


@pytest.mark.parametrize(
    "options", [{}, {"head": "gaussian"}, {"chunk": 3}], ids=["mse", "gaussian", "chunk"]
)
@pytest.mark.parametrize("discrete", [False, True], ids=["numbers", "classes"])
def test_actions_are_judged_as_those_of_a_network(options, discrete):
    """What a network would do, given as the actions of a baseline, has the same predictions."""
    if discrete and "head" in options:
        return
    table = in_classes(episodes(12)) if discrete else episodes(12)
    backbone, objective, (rows,) = case([table], **options)
    part = baseline_trials.read(rows, baseline("majority"), objective)
    batch = Batch(
        np.arange(len(rows)), torch.zeros(len(rows)), rows.modality.collate(dict(rows.arrays))
    )
    mask, acted = batch["mask"], torch.zeros_like(batch["actions"])
    with torch.no_grad():
        expected = objective.predict(backbone, batch)
        tokens = backbone(batch, want=("tokens",)).tokens
        for name, mine, output in objective.decoded(tokens, batch["space"]):
            width = objective.spaces[name]["action"]
            own = output[:, :, 0, :width]  # of a gaussian the means
            acted[mine, :, :width] = own.softmax(-1) if discrete else own
    found = baseline_trials.predict(objective, acted[mask].numpy(), part)
    assert set(found) == {*expected, "row"}
    same = {"squared_error", "action_numbers", "label", "space", "task"}
    if not options:
        same |= {"loss", "count"}
    else:
        assert np.isnan(found["loss"]).all(), "of a step's own action, and not of a density"
    for name in same & set(found):
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_the_mean_action_is_that_of_the_labelled_steps():
    robot = {"robots": ("cart",), "least": 4, "most": 4}
    _, objective, (rows, others) = case([episodes(10, **robot), episodes(6, seed=1, **robot)])
    one = baseline("majority")
    train, test = (baseline_trials.read(each, one, objective) for each in (rows, others))
    chosen = baseline_trials.choose(one, objective, train, test, ("action_error",), 0)
    done = np.concatenate(episodes(10, **robot)["actions"].to_pylist())
    of_test = np.concatenate(episodes(6, seed=1, **robot)["actions"].to_pylist())
    found = baseline_trials.predict(objective, chosen.scores(test.inputs), test)
    expected = np.square(of_test - done.mean(0)).mean()
    assert metric("action_error").value(found) == pytest.approx(expected, rel=1e-5)


def test_a_task_that_was_never_demonstrated_is_that_of_the_robot():
    inputs = np.array([[0, 1, 0.0], [0, 1, 1.0], [0, 2, 0.4], [1, 1, 0.4]], dtype=np.float32)
    actions = np.array([[1.0], [2.0], [3.0], [4.0]])
    fitted = baseline().estimator({"neighbours": 1}, 0, "actions").fit(inputs, actions)
    asked = np.array([[0, 1, 0.4], [0, 2, 9.0], [0, 3, 0.4], [1, 0, 0.0], [2, 1, 0.4]])
    assert fitted.predict(asked.astype(np.float32)).ravel().tolist() == [1, 3, 3, 4, 0]


class Nods:
    """A policy that acts by chance."""

    def begin(self, worlds):
        self.rng = np.random.default_rng(0)

    def act(self, observations, rewards):
        alive = [one is not None for one in observations]
        return [self.rng.uniform(-1, 1, 1).astype(np.float32) if one else None for one in alive]


def test_in_a_demonstrated_world_it_does_what_was_demonstrated():
    """Each step's nearest one is the demonstrated one itself, so episodes are the same."""
    pytest.importorskip("gymnasium")
    worlds = [World("InvertedDoublePendulum-v5", 40, 100 + seed, {}) for seed in range(3)]
    shown = rollout(worlds, Nods())
    lists = pa.list_(pa.list_(pa.float32()))
    table = pa.table(
        {
            "observations": pa.array([one.observations.tolist() for one in shown], lists),
            "actions": pa.array([one.actions.tolist() for one in shown], lists),
            "environment": [world.text() for world in worlds],
            "return": [float(one.rewards.sum()) for one in shown],
        }
    )
    columns = {name: name for name in table.column_names}
    _, objective, (rows,) = case([table], columns)
    one = baseline(neighbours=[1])
    train = baseline_trials.read(rows, one, objective)
    chosen = baseline_trials.choose(one, objective, train, train, ("action_error",), 0)
    assert chosen.metrics["action_error"] == pytest.approx(0.0, abs=1e-9)
    predictions = baseline_trials.predict(objective, chosen.scores(train.inputs), train)

    class Stored(evaluate.Postprocessor):
        def raw_rows(self, objective, ids):
            from pipeline.core.contracts.objective import RawRows

            return RawRows(table, columns, rows.modality)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "Postprocessor", Stored)
        found, _ = baseline_trials.roll_out(one, chosen.scores, objective, predictions, rows)
    assert found["steps"].tolist() == [len(one.rewards) for one in shown]
    np.testing.assert_allclose(found["return"], found["expert_return"], rtol=1e-4)
    assert len(set(found["steps"].tolist())) > 1, "one world goes on where another has ended"


def test_auto_takes_it_for_demonstrations():
    columns = {"observations": "o", "actions": "a"}
    data = {"uri": "x", "modality": "trajectory", "columns": columns}
    target = Target.model_validate({"data": data, "objective": "behaviour_cloning"})
    job = Job.model_validate(
        {"name": "j", "sources": {"s": {"backbone": "bundle:b"}}, "baselines": "auto"}
    )
    found = sorted(one.name for one in grid.baselines(job, target))
    assert found == ["majority", "nearest_steps"]
