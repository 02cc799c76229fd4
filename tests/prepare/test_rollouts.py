"""Simulated demonstrations: what a row says happened can be made again, on any number of workers,
and simulators that diverge are counted.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces
from prepare.conftest import read, splits_of_a_job, summary
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import plugins
from pipeline.objectives.behaviour_cloning import BehaviourCloning
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.write import Preparation, Settings, verify
from pipeline.simulation import experts, training
from pipeline.simulation.environment import World, make
from pipeline.simulation.trained_policy import Settings as PpoSettings
from pipeline.simulation.trained_policy import TrainedPolicy

PENDULUM = "InvertedDoublePendulum-v5"
SHORT = ("expert=lqr", "max_steps=12")


def prepared(output, *pairs: str, source: str = PENDULUM, **settings) -> Preparation:
    return Preparation(
        "rollouts",
        source,
        str(output),
        importing.options_of("rollouts", list(pairs)),
        Settings(**settings),
    )


def prepare(output, *pairs: str, source: str = PENDULUM, **settings) -> dict:
    return prepared(output, *pairs, source=source, **settings).run()


def notes(output) -> dict:
    return summary(output)["notes"]


def hashes(output) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(output).glob("*.parquet"))
    }


# ---------------------------------------------------------------- rows


def test_rows_are_what_happens_in_the_environment(tmp_path):
    """Played again by a bare loop over gymnasium's own environment: the same observations and
    rewards follow from the world and the actions.
    """
    done = prepare(
        tmp_path / "out", *SHORT, "episodes=5", "validation_episodes=1", "test_episodes=2"
    )
    assert (
        done["rows"] == {"test": 2, "train": 5, "validation": 1}
        and verify(str(tmp_path / "out")) == done
    )
    assert done["about"]["fps"] == 20
    rows = read(tmp_path / "out")
    assert {row["episode"] for row in rows} == {
        *(f"train-{i:06d}" for i in range(5)),
        "validation-000000",
        "test-000000",
        "test-000001",
    }
    for row in rows:
        world = json.loads(row["environment"])
        assert (world["id"], world["steps"], world["dynamics"], world["skill"]) == (
            PENDULUM,
            12,
            {},
            "",
        ) and row["embodiment"] == "InvertedDoublePendulum"
        env = gymnasium.make(PENDULUM, max_episode_steps=12)
        seen, _ = env.reset(seed=world["seed"])
        total, terminated, truncated = 0.0, False, False
        for observation, action, reward in zip(
            row["observations"], row["actions"], row["rewards"], strict=True
        ):
            assert np.array_equal(np.float32(seen), np.float32(observation))
            seen, given, terminated, truncated, _ = env.step(np.float32(action))
            assert np.float32(given) == np.float32(reward)
            total += float(given)
        assert (row["terminated"], row["truncated"], row["steps"]) == (
            terminated,
            truncated,
            len(row["rewards"]),
        ) and terminated | truncated
        assert np.isclose(row["return"], total) and row["success"] == (not terminated)
        assert row["random_return"] < row["return"] and 0 < row["random_steps"] <= 12
    assert len({row["environment"] for row in rows}) == len(rows), "no world stands in two splits"
    assert notes(tmp_path / "out")["expert's success"] == {
        "test": 1.0,
        "train": 1.0,
        "validation": 1.0,
    }
    assert notes(tmp_path / "out")["steps"] == {"test": 24, "train": 60, "validation": 12}
    for message, column in (
        ("expert's return, mean", "return"),
        ("random policy's return, mean", "random_return"),
    ):
        assert np.isclose(
            notes(tmp_path / "out")[message]["train"],
            np.mean([row[column] for row in rows if row["split"] == "train"]),
            atol=1e-3,
        )


def test_an_episode_follows_from_seed_split_and_number_alone(tmp_path):
    prepare(tmp_path / "few", *SHORT, "episodes=3", "test_episodes=1", "dynamics=mass=0.5..2")
    prepare(
        tmp_path / "more",
        *SHORT,
        "episodes=7",
        "test_episodes=2",
        "dynamics=mass=0.5..2",
        rows_per_part=2,
    )
    prepare(tmp_path / "other", *SHORT, "episodes=3", "dynamics=mass=0.5..2", "seed=1")
    few, more, other = (
        {row["episode"]: row for row in read(tmp_path / name)} for name in ("few", "more", "other")
    )
    assert all(more[name] == row for name, row in few.items()) and len(more) == 9
    assert not {row["environment"] for row in few.values()} & {
        row["environment"] for row in other.values()
    }


def test_dynamics_are_given_or_drawn_for_each_episode(tmp_path):
    prepare(tmp_path / "out", *SHORT, "episodes=6", "dynamics=mass=0.5..2, gear=0.45,latency=0..2")
    found = [json.loads(row["environment"])["dynamics"] for row in read(tmp_path / "out")]
    masses = [one["mass"] for one in found]
    assert all(one["gear"] == 0.45 and one["latency"] in (0, 1, 2) for one in found)
    assert len(set(masses)) == 6 and 0.5 <= min(masses) < 1 < max(masses) <= 2
    world = World.parse(read(tmp_path / "out")[0]["environment"])
    env, plain = make(world), make(World(world.id, world.steps, world.seed))
    assert np.allclose(
        env.unwrapped.model.body_mass, plain.unwrapped.model.body_mass * world.dynamics["mass"]
    )


def test_episodes_are_shared_out_evenly_among_skills(tmp_path):
    done = prepare(
        tmp_path / "out",
        "expert=reach",
        "episodes=7",
        "test_episodes=2",
        "skills=reach,mirror,half",
        "max_steps=75",
        source="onetomany/Reach-v0",
    )
    rows = {row["episode"]: row for row in read(tmp_path / "out")}
    skills = {
        name: (row["task"], json.loads(row["environment"])["skill"]) for name, row in rows.items()
    }
    assert skills == {
        **{f"train-{i:06d}": (("reach", "mirror", "half")[i % 3],) * 2 for i in range(7)},
        "test-000000": ("reach",) * 2,
        "test-000001": ("mirror",) * 2,
    }
    found = summary(tmp_path / "out")
    assert found["classes"]["train"]["labels"] == {"half": 2, "mirror": 2, "reach": 3} and done[
        "rows"
    ] == {"test": 2, "train": 7}
    assert set(found["notes"]["expert's success at mirror"]) == {"test", "train"} and set(
        found["notes"]["expert's success at half"]
    ) == {"train"}
    rate = np.mean(
        [
            row["success"]
            for row in rows.values()
            if row["task"] == "reach" and row["split"] == "train"
        ]
    )
    assert np.isclose(found["notes"]["expert's success at reach"]["train"], rate, atol=1e-3)
    for pairs, said in (
        (["skills=reach,mirrored"], "no skill 'mirrored'; did you mean mirror"),
        ([], "no skill ''"),
    ):
        with pytest.raises(ValueError, match=said):
            prepared(tmp_path / "none", "expert=reach", *pairs, source="onetomany/Reach-v0")
    with pytest.raises(ValueError, match="one is trained for one skill, not for reach,mirror"):
        prepared(
            tmp_path / "none", "expert=ppo", "skills=reach,mirror", source="onetomany/Reach-v0"
        )


def test_what_is_executed_is_noisy_and_what_is_recorded_is_the_experts_own(tmp_path):
    """The regulator is linear in the state: its own actions are the same multiple of the observed
    positions in both, noise or not.
    """
    prepare(tmp_path / "clean", *SHORT, "episodes=4")
    prepare(tmp_path / "noisy", *SHORT, "episodes=4", "explore=0.2")
    clean, noisy = read(tmp_path / "clean"), read(tmp_path / "noisy")

    def fitted(rows: list[dict]) -> tuple[np.ndarray, float]:
        seen = np.concatenate([row["observations"] for row in rows])
        state = np.stack(
            [
                seen[:, 0],
                np.arctan2(seen[:, 1], seen[:, 3]),
                np.arctan2(seen[:, 2], seen[:, 4]),
                *seen[:, 5:8].T,
            ],
            axis=1,
        )
        actions = np.concatenate([row["actions"] for row in rows])[:, 0]
        inside = np.abs(actions) < 0.999  # others are cut at the motor's bounds
        gain, *_ = np.linalg.lstsq(state[inside], actions[inside], rcond=None)
        return gain, float(np.abs(state[inside] @ gain - actions[inside]).max())

    (gain, left), (same, left_of_noisy) = fitted(clean), fitted(noisy)
    assert left < 1e-4 and left_of_noisy < 1e-4 and np.allclose(gain, same, atol=1e-2)
    assert (
        clean[0]["observations"][0] == noisy[0]["observations"][0]
        and clean[0]["observations"][-1] != noisy[0]["observations"][-1]
    )
    assert all(row["executed"] == row["actions"] for row in clean) and all(
        row["executed"] != row["actions"] for row in noisy
    )
    for row in noisy:  # played again: what is seen follows from what was executed
        env = gymnasium.make(PENDULUM, max_episode_steps=12)
        seen = [
            env.reset(seed=json.loads(row["environment"])["seed"])[0],
            *(env.step(np.float32(action))[0] for action in row["executed"]),
        ]
        assert (
            np.array_equal(np.float32(seen[:-1]), np.float32(row["observations"]))
            and np.abs(row["executed"]).max() <= 1
        )


def test_only_train_episodes_are_noisy(tmp_path):
    """What test rows say of the expert is the expert's own, which the policy is compared with."""
    pairs = (*SHORT, "episodes=2", "validation_episodes=2", "test_episodes=2")
    prepare(tmp_path / "clean", *pairs)
    prepare(tmp_path / "noisy", *pairs, "explore=0.3")
    clean, noisy = (
        {row["episode"]: row for row in read(tmp_path / name)} for name in ("clean", "noisy")
    )
    assert {name for name in clean if clean[name] == noisy[name]} == {
        "validation-000000",
        "validation-000001",
        "test-000000",
        "test-000001",
    }
    assert all(
        noisy[name]["executed"] != noisy[name]["actions"]
        for name in ("train-000000", "train-000001")
    )


def test_only_successes_are_kept_when_asked_and_the_experts_rate_is_of_all(tmp_path):
    pairs = ("expert=random", "max_steps=8", "episodes=20")
    prepare(tmp_path / "all", *pairs)
    prepare(tmp_path / "kept", *pairs, "keep=success", rows_per_part=3)
    every, kept = read(tmp_path / "all"), read(tmp_path / "kept")
    assert kept == [row for row in every if row["success"]] and 0 < len(kept) < len(every) == 20
    for out in ("all", "kept"):
        assert notes(tmp_path / out)["expert's success"] == {"train": len(kept) / 20}
        assert np.isclose(
            notes(tmp_path / out)["expert's return, mean"]["train"],
            np.mean([row["return"] for row in every]),
            atol=1e-3,
        )
    assert notes(tmp_path / "kept")["episodes left out, in which the expert failed"] == {
        "train": 20 - len(kept)
    }
    assert every[0]["return"] == every[0]["random_return"], "the expert is the random policy here"


def test_success_that_is_not_known_is_empty_and_cannot_be_kept(tmp_path):
    pairs, source = ("expert=random", "max_steps=5", "episodes=2"), "MountainCarContinuous-v0"
    prepare(tmp_path / "out", *pairs, source=source)
    assert all(
        row["success"] is None and row["random_success"] is None and row["random_steps"] == 5
        for row in read(tmp_path / "out")
    )
    found = summary(tmp_path / "out")
    assert (
        found["classes"] == {}
        and not [name for name in found["notes"] if "success" in name]
        and "expert's return, mean" in found["notes"]
    )
    with pytest.raises(
        ValueError,
        match=r"keep=success: what success is in MountainCarContinuous-v0 is not known; known: "
        r"onetomany/Reach, .*CartPole.*Hopper",
    ):
        prepared(tmp_path / "none", *pairs, "keep=success", source=source)


def test_a_random_episode_that_diverged_has_no_figures(tmp_path, monkeypatch):
    """The expert's own is a row all the same; the mean is of the others."""
    real = experts.demonstrations

    def shown(worlds, acting, explore=0.0):
        found = real(worlds, acting, explore)
        if isinstance(acting[0], experts.Random) and worlds[0].seed == seeds["train-000001"]:
            found[0].diverged = "step 2: bad"
        return found

    prepare(tmp_path / "whole", *SHORT, "episodes=3")
    whole = {row["episode"]: row for row in read(tmp_path / "whole")}
    seeds = {name: json.loads(row["environment"])["seed"] for name, row in whole.items()}
    monkeypatch.setattr(experts, "demonstrations", shown)
    prepare(tmp_path / "out", *SHORT, "episodes=3")
    blind = dict.fromkeys(("random_return", "random_success", "random_steps"))
    assert {row["episode"]: row for row in read(tmp_path / "out")} == {
        **whole,
        "train-000001": {**whole["train-000001"], **blind},
    }
    message = notes(tmp_path / "out")
    assert message["episodes in which the random policy's simulation diverged"] == {
        "train": 1
    } and message["random policy's success"] == {"train": 0.0}
    assert np.isclose(
        message["random policy's return, mean"]["train"],
        np.mean([whole[f"train-00000{i}"]["random_return"] for i in (0, 2)]),
        atol=1e-3,
    )


def test_a_simulator_that_diverges_is_marked_counted_and_not_used(tmp_path):
    pairs = ("expert=random", "max_steps=30", "episodes=4", "dynamics=gear=1..1e14", "seed=3")
    with pytest.raises(
        ValueError,
        match=r"of 4 .*--max-bad 0\.01 .*: episode train-00000\d: the simulator diverged: ",
    ):
        prepare(tmp_path / "strict", *pairs)
    prepare(tmp_path / "out", *pairs, max_bad=0.9)
    found = summary(tmp_path / "out")
    count = found["broken"]["rows"]
    assert 0 < count < 4 and len(read(tmp_path / "out")) == 4 - count
    assert found["notes"]["episodes in which the simulator diverged"] == {"train": count}
    assert all(np.isfinite(row["observations"]).all() for row in read(tmp_path / "out"))
    with pytest.raises(ValueError, match="no episode is left of 2"):
        prepare(
            tmp_path / "none",
            "expert=random",
            "max_steps=30",
            "episodes=2",
            "dynamics=gear=1e14",
            max_bad=1,
        )


def test_an_expert_is_trained_stays_beside_the_rows_and_may_be_named_for_others(
    tmp_path, monkeypatch
):
    pairs, source = ("episodes=2", "max_steps=20", "dynamics=mass=0.8..1.2"), "InvertedPendulum-v5"
    with monkeypatch.context() as patch:
        met = []
        patch.setattr(
            training, "make", lambda world: met.append(world.dynamics["mass"]) or make(world)
        )
        prepare(tmp_path / "a", "expert=ppo", "expert_steps=2048", *pairs, source=source)
        assert len(set(met)) == 8 and 0.8 <= min(met) < max(met) <= 1.2
    kept = tmp_path / "a/_expert.safetensors"
    assert not (tmp_path / "a/_survey").exists()
    prepare(tmp_path / "b", f"expert={kept}", *pairs, source=source)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    trained = TrainedPolicy.from_bytes(kept.read_bytes())
    for row in read(tmp_path / "a"):
        assert np.allclose(
            row["actions"],
            [trained.act(None, np.array(seen, dtype=np.float32)) for seen in row["observations"]],
            atol=1e-6,
        )
    monkeypatch.setattr(training, "train", lambda *given, **named: pytest.fail("trained anew"))
    shutil.rmtree(tmp_path / "a/_parts")
    (tmp_path / "a/_manifest.json").unlink()
    prepare(tmp_path / "a", "expert=ppo", "expert_steps=2048", *pairs, source=source)
    for other, expert, said in (
        (
            PENDULUM,
            kept,
            "was trained in InvertedPendulum-v5, while InvertedDoublePendulum-v5 is asked for",
        ),
        (
            "InvertedPendulum-v4",
            kept,
            "was trained in InvertedPendulum-v5, while InvertedPendulum-v4 is asked for",
        ),
        (source, tmp_path / "no.safetensors", "no such file for --set expert"),
        ("CartPole-v1", kept, "was trained in InvertedPendulum-v5, while CartPole-v1 is asked for"),
    ):
        with pytest.raises(ValueError, match=said):
            prepared(tmp_path / "c", f"expert={expert}", source=other)
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not an expert"):
        prepared(tmp_path / "c", f"expert={tmp_path / 'bad.safetensors'}", source=source)


def test_an_expert_of_one_skill_is_not_taken_for_another(tmp_path):
    source, file = "onetomany/Reach-v0", tmp_path / "_expert.safetensors"
    world = World(source, 75, 0, {"mass": 2.0}, "mirror")
    file.write_bytes(
        training.train(
            world,
            env_steps=1,
            seed=0,
            settings=PpoSettings(environments=1, horizon=8, epochs=1, minibatch=8),
        ).to_bytes()
    )
    prepare(tmp_path / "out", f"expert={file}", "skills=mirror", "episodes=1", source=source)
    for skills in ("reach", "mirror,reach"):
        with pytest.raises(
            ValueError,
            match=r"was trained in onetomany/Reach-v0 \(skill mirror\), while onetomany/Reach-v0 "
            r"\(skill reach\) is asked for",
        ):
            prepared(
                tmp_path / "none", f"expert={file}", f"skills={skills}", "episodes=2", source=source
            )


# ---------------------------------------------------------------- runs


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    pairs = (*SHORT, "episodes=6", "test_episodes=2")
    whole = prepare(tmp_path / "whole", *pairs, rows_per_part=2)
    work, made = prepared(tmp_path / "out", *pairs, rows_per_part=2), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = type(work.task).source_rows
        patch.setattr(
            type(work.task),
            "source_rows",
            lambda self, part: (
                (_ for _ in ()).throw(KeyboardInterrupt)
                if len(made) > 1
                else made.append(part) or real(self, part)
            ),
        )
        work.run()
    assert 0 < len(hashes(tmp_path / "out")) < 4
    assert prepare(tmp_path / "out", *pairs, rows_per_part=2) == whole and hashes(
        tmp_path / "out"
    ) == hashes(tmp_path / "whole")
    with pytest.raises(ValueError, match="another source"):
        prepare(tmp_path / "out", *pairs, source="InvertedPendulum-v5", rows_per_part=2)


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_seeds_give_the_same_bytes_on_ray(ray_here, hide_ray, tmp_path):
    pairs = (*SHORT, "episodes=10", "test_episodes=3", "dynamics=mass=0.5..2", "explore=0.1")
    with hide_ray():
        here = prepare(tmp_path / "here", *pairs, rows_per_part=2)
    assert prepare(tmp_path / "there", *pairs, rows_per_part=2) == here
    assert (
        hashes(tmp_path / "here") == hashes(tmp_path / "there")
        and len(hashes(tmp_path / "there")) == 7
    )


def test_a_job_reads_the_rows(tmp_path):
    done = prepare(tmp_path / "out", *SHORT, "episodes=5", "test_episodes=2")
    assert splits_of_a_job(tmp_path, "table", "features", "observations") == done["rows"]


# ----------------------------------------------- what is wrong is told before anything is simulated


@pytest.mark.parametrize(
    ("source", "pairs", "said"),
    [
        (
            "InvertedDoublPendulum-v5",
            SHORT,
            "environment 'InvertedDoublPendulum-v5' is not installed; did you mean "
            "InvertedDoublePendulum-v5",
        ),
        (
            "Hopper",
            ["expert=random"],
            "environment 'Hopper' is not installed; did you mean Hopper-v5",
        ),
        (PENDULUM, ["expert=lqrr"], "unknown expert 'lqrr'; did you mean lqr"),
        (PENDULUM, [], "--set expert= is missing"),
        (
            "Hopper-v5",
            SHORT,
            "expert lqr balances InvertedPendulum and InvertedDoublePendulum, not Hopper-v5",
        ),
        (PENDULUM, [*SHORT, "episodes=0"], "no episodes in any split"),
        (PENDULUM, [*SHORT, "dynamics=mas=2"], r"'mas' is not one of them; did you mean mass"),
        (
            PENDULUM,
            [*SHORT, "dynamics=mass=2..1"],
            r"'mass=2..1' is no number and no range; write mass=2.5 or mass=0.5..2",
        ),
        (PENDULUM, [*SHORT, "dynamics=mass=1,mass=2"], "'mass' occurs twice"),
        (PENDULUM, [*SHORT, "dynamics=mass=0..2"], "dynamics mass=0.0: a multiplier above 0"),
        (
            PENDULUM,
            [*SHORT, "dynamics=friction=0.5..2,mass=2"],
            r"friction \(nothing in it touches\) changes nothing in InvertedDoublePendulum-v5",
        ),
        (
            "Pusher-v5",
            ["expert=random", "dynamics=friction=3"],
            r"friction \(its contacts have condim 1, without friction\) changes nothing",
        ),
        (
            "Swimmer-v5",
            ["expert=random", "dynamics=damping=3"],
            r"damping \(no joint of it is damped\) changes nothing in Swimmer-v5; leave it out",
        ),
        (PENDULUM, [*SHORT, "skills=reach"], "has no skill 'reach'"),
        (PENDULUM, [*SHORT, "explore=2"], "explore=2"),
        (
            "CartPole-v1",
            ["expert=random", "explore=0.5"],
            "explore=0.5: noise of numbers, while CartPole-v1 takes classes",
        ),
    ],
)
def test_bad_worlds_and_options_give_one_clear_message(tmp_path, source, pairs, said):
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path / "out", *pairs, source=source)


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (spaces.MultiDiscrete([2, 3]), "where a row of numbers or a class from 0 is needed"),
        (spaces.MultiBinary(3), "where a row of numbers or a class from 0 is needed"),
        (spaces.Discrete(3, start=1), "where a row of numbers or a class from 0 is needed"),
        (spaces.Box(-1, 1, (2, 2)), "where a row of numbers or a class from 0 is needed"),
        (spaces.Box(-np.inf, np.inf, (2,)), "without bounds"),
    ],
)
def test_actions_that_rows_cannot_hold_are_refused(tmp_path, monkeypatch, actions, said):
    class Other(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (3,)), actions

    spec = gymnasium.envs.registration.EnvSpec("Other-v0", Other, max_episode_steps=5)
    monkeypatch.setitem(gymnasium.registry, "Other-v0", spec)
    with pytest.raises(ValueError, match=f"Other-v0: actions .*{said}"):
        prepared(tmp_path / "out", "expert=random", source="Other-v0")


@pytest.fixture
def own_cart(tmp_path, monkeypatch):
    """A copy of the plugin with an environment of its own, imported by nothing before or after.

    It has another name, because other tests of this process may have the plugin's folder on the path.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = Path(__file__).parents[1] / "plugin" / "cart_world.py"
    plugins.use([str(shutil.copy(source, tmp_path / "copied_cart.py"))])
    yield "own/Cart-v0"
    plugins.use([])
    sys.modules.pop("copied_cart", None)
    gymnasium.registry.pop("own/Cart-v0", None)


def test_rows_of_an_environment_that_was_changed_are_not_gone_on_with(tmp_path, own_cart):
    pairs = ("expert=random", "episodes=2")
    prepare(tmp_path / "out", *pairs, source=own_cart)
    with (tmp_path / "copied_cart.py").open("a") as file:
        file.write("# heavier\n")
    with pytest.raises(ValueError, match="another source"):
        prepare(tmp_path / "out", *pairs, source=own_cart)


def test_an_environment_of_a_plugin_is_made_in_prepare_and_in_a_job(tmp_path, own_cart):
    prepare(
        tmp_path / "out",
        "expert=random",
        "episodes=12",
        "test_episodes=12",
        "keep=success",
        source=own_cart,
    )
    rows = read(tmp_path / "out")
    assert rows and all(row["success"] and row["steps"] == 20 for row in rows)
    columns = {"actions": "actions", "environment": "environment"}
    state = {"kind": "continuous", "columns": ["environment"]}
    table = pq.read_table(tmp_path / "out")
    del gymnasium.registry[own_cart], sys.modules["copied_cart"]
    BehaviourCloning.check_test({}, table, columns, state)  # as in another process
    del gymnasium.registry[own_cart]
    plugins.use([])
    with pytest.raises(ValueError, match="add the file that registers it to `plugins`"):
        BehaviourCloning.check_test({}, table, columns, state)


def test_success_that_an_environment_of_its_own_does_not_report_cannot_be_kept(
    tmp_path, own_cart, monkeypatch
):
    make(World(own_cart, 1, 0)).close()
    cart = gymnasium.registry[own_cart].entry_point
    step = cart.step
    monkeypatch.setattr(cart, "step", lambda self, action: (*step(self, action)[:4], {}))
    with pytest.raises(ValueError, match="own/Cart-v0 does not say in its last step's info"):
        prepare(tmp_path / "out", "expert=random", "episodes=1", "keep=success", source=own_cart)


def test_rows_of_a_module_s_environment_name_no_module(tmp_path, monkeypatch):
    """Rows cannot name code."""

    class Own(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            return np.zeros(3, np.float32), 1.0, False, False, {"is_success": True}

    (tmp_path / "module_of_a_user.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = gymnasium.envs.registration.EnvSpec("own/Env-v0", Own, max_episode_steps=4)
    monkeypatch.setitem(gymnasium.registry, "own/Env-v0", spec)
    source = "module_of_a_user:own/Env-v0"
    prepare(tmp_path / "out", "expert=random", "episodes=1", "keep=success", source=source)
    (row,) = read(tmp_path / "out")
    assert World.parse(row["environment"]).id == "own/Env-v0"
    assert (row["embodiment"], row["steps"], row["success"]) == ("Env", 4, True)


def test_classes_of_actions_and_the_environments_own_time_limit(tmp_path):
    prepare(tmp_path / "out", "expert=random", "episodes=3", source="CartPole-v1")
    for row in read(tmp_path / "out"):
        assert set(row["actions"]) <= {"0", "1"} and row["executed"] == row["actions"]
        assert (
            len(row["actions"]) == row["steps"] and json.loads(row["environment"])["steps"] == 500
        )


def test_without_the_extra_the_command_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    said = CliRunner().invoke(
        cli.app,
        ["prepare", "rollouts", PENDULUM, "-o", str(tmp_path / "out"), "--set", "expert=lqr"],
    )
    assert said.exit_code == 2 and "robotics" in said.output and "Traceback" not in said.output
    monkeypatch.undo()
    said = CliRunner().invoke(
        cli.app,
        [
            "prepare",
            "rollouts",
            PENDULUM,
            "-o",
            str(tmp_path / "out"),
            "--set",
            "expert=lqr",
            "--resize",
            "64",
        ],
    )
    assert said.exit_code == 2 and "importer rollouts writes no images" in said.output
