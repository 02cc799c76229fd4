"""Training an expert: what it learns, that a stop changes nothing, its file."""

import sys
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from pipeline.io import storage
from pipeline.simulation.environment import World, make
from pipeline.simulation.ppo import Training, TrainingEnvironment
from pipeline.simulation.trained_policy import Bounds, Settings, TrainedPolicy
from pipeline.simulation.training import train

PENDULUM = World("InvertedPendulum-v5", steps=300, seed=0, dynamics={})
QUICK = Settings(environments=4, horizon=32, epochs=2, minibatch=32, width=16, block=2)
STEPS = 5 * 4 * 32 + 1  # six iterations: three blocks


class StoppedError(Exception):
    pass


def returns(world, policy, seeds):
    env = make(world)
    found = []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        found.append(0.0)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy(env, observation))
            found[-1] += float(reward)
            ended = terminated or truncated
    env.close()
    return found


class Counting(gymnasium.Env):
    """Nothing to do, a reward of 1 a step; over after five steps, as an end or as a time limit."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, limit, broken=False):
        self.limit, self.broken, self.t, self.seeds = limit, broken, 0, []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 5
        return (
            np.full(1, np.nan if self.broken and over else 0.0, np.float32),
            1.0,
            over and not self.limit,
            over and self.limit,
            {},
        )


# --- what it learns ---


@pytest.mark.slow
def test_the_pendulum_is_balanced():
    random = np.random.default_rng(0)
    expert = train(
        PENDULUM, env_steps=12_000, seed=0, settings=Settings(horizon=64, lr=1e-3, block=12)
    )
    assert (
        np.mean(returns(PENDULUM, lambda env, observation: random.uniform(-3, 3, 1), range(20)))
        < 20
    )
    assert np.mean(returns(PENDULUM, expert.act, range(100, 110))) >= 290
    assert expert.curve[0, 1] < 60 < expert.curve[-1, 1]


@pytest.mark.slow
def test_the_hopper_stands_up():
    """Seen: a return of 338, and of 25 with random actions. A million steps are trained by
    tests/benchmarks/hopper.py.
    """
    world, draw = World("Hopper-v5", steps=1000, seed=0, dynamics={}), np.random.default_rng(0)
    random = returns(world, lambda env, observation: draw.uniform(-1, 1, 3), range(20))
    expert = train(world, env_steps=40_000, seed=0)
    assert np.mean(returns(world, expert.act, range(100, 110))) > 5 * np.mean(random)


@pytest.mark.slow
def test_what_is_learned_depends_on_the_dynamics_and_on_the_seed_of_training_alone():
    plain, same, other, heavy = (
        train(
            World("InvertedPendulum-v5", steps=300, seed=seed, dynamics=dynamics),
            env_steps=300,
            seed=training,
            settings=QUICK,
        )
        for seed, dynamics, training in ((0, {}, 0), (1, {}, 0), (0, {}, 1), (0, {"mass": 3.0}, 0))
    )
    assert all(np.array_equal(plain.weights[name], same.weights[name]) for name in plain.weights)
    assert not np.array_equal(plain.weights["2.weight"], other.weights["2.weight"])
    assert not np.array_equal(plain.std, heavy.std)


def test_other_worlds_are_met_in_turn(monkeypatch):
    met = []
    monkeypatch.setattr(
        "pipeline.simulation.training.make",
        lambda world: met.append((world.dynamics.get("mass", 1.0), world.seed)) or make(world),
    )
    others = [
        World("InvertedPendulum-v5", steps=300, seed=0, dynamics={"mass": mass})
        for mass in (2.0, 3.0, 4.0, 5.0)
    ]
    expert = train(PENDULUM, env_steps=500, seed=0, settings=QUICK, others=others)
    assert [mass for mass, _ in met[-8:]] == [1, 2, 3, 4, 5, 1, 2, 3]
    assert len({seed for _, seed in met[-8:]}) == 8, (
        "noise on observations, which comes from a world's seed, would be the same in all"
    )
    assert [World.parse(text).dynamics["mass"] for text in expert.metadata["others"]] == [
        2,
        3,
        4,
        5,
    ]
    with pytest.raises(
        ValueError, match="Hopper-v5 has other observations or actions than InvertedPendulum-v5"
    ):
        train(
            PENDULUM,
            env_steps=500,
            seed=0,
            settings=QUICK,
            others=[World("Hopper-v5", steps=300, seed=0, dynamics={})],
        )


@pytest.mark.slow
def test_a_time_limit_is_no_end():
    """A reward of 1 for ever is worth 1 / (1 - gamma) = 5; for five steps, 3.4 to 1, 2.2 on
    average.
    """
    values = {}
    for limit in (True, False):
        settings = Settings(environments=2, horizon=64, gamma=0.8, lr=3e-3, width=16)
        training = trained(lambda k, limit=limit: Counting(limit), 60, settings)
        values[limit] = value_of_zero(training.arrays) * np.sqrt(training.arrays["returns.var"])
        assert training.curve[-1][1:] == (5, 5)
    assert values[True] == pytest.approx(5, rel=0.1)
    assert values[False] == pytest.approx(
        np.mean([(1 - 0.8**k) / 0.2 for k in range(1, 6)]), rel=0.15
    )


def trained(make, iterations, settings=QUICK):
    training = Training(make, iterations, 0, settings)
    while training.iteration < iterations:
        training.block()
    return training


def value_of_zero(arrays):
    """The value network's output for normalised observations of 0."""
    x = np.zeros(1, np.float32)
    for layer in ("mlp_extractor.value_net.0", "mlp_extractor.value_net.2"):
        x = np.tanh(arrays[f"policy.{layer}.weight"] @ x + arrays[f"policy.{layer}.bias"])
    return float((arrays["policy.value_net.weight"] @ x + arrays["policy.value_net.bias"])[0])


def test_no_two_episodes_begin_alike():
    envs = []
    trained(lambda k: envs.append(Counting(True)) or envs[-1], 4)
    seeds = [seed for env in envs for seed in env.seeds]
    assert len(seeds) == len(set(seeds)) > 100


def test_a_simulation_that_blows_up_is_cut():
    training = trained(lambda k: Counting(True, broken=True), 4)
    assert all(np.isfinite(array).all() for array in training.arrays.values())
    assert training.curve[-1][1:] == (4, 5)


def test_a_state_that_mujoco_calls_bad_cuts_an_episode_as_in_a_rollout():
    """MuJoCo starts anew after a bad state: what is seen is finite then, and an ordinary step
    without that. It is no end: without rewards to come, that would pay where rewards are negative.
    """
    env, done, ended = make(PENDULUM), [], []
    step = env.unwrapped.step

    def blow(action):
        done.append(action)
        if len(done) == 3:
            env.unwrapped.data.qvel[:] = 1e20
        return step(action)

    env.unwrapped.step = blow
    training = TrainingEnvironment(env, 0, ended)
    training.reset()
    steps = [training.step(np.zeros(1)) for _ in range(3)]
    assert [(ended, cut) for _, _, ended, cut, _ in steps] == [(False, False)] * 2 + [(False, True)]
    assert steps[2][1] == 0 and ended == [(2.0, 3.0)]
    training.reset()
    assert not training.step(np.zeros(1))[3], "a warning is of its own episode alone"
    assert all(np.isfinite(observation).all() for observation, *_ in steps)


def test_the_process_keeps_its_own_random_state_and_no_folder_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trained(lambda k: Counting(True), 1)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not list(tmp_path.glob("SB3*"))


# --- stopping and going on ---


@pytest.mark.parametrize("after", [1, 2])
def test_a_stop_changes_nothing(root, after):
    train_pendulum = partial(train, PENDULUM, env_steps=STEPS, seed=3, settings=QUICK)
    whole = train_pendulum()
    heard = []

    def stop(text):
        heard.append(text)
        if len(heard) == after + 1:
            raise StoppedError

    checkpoint = f"{root}/a/training"
    with pytest.raises(StoppedError):
        train_pendulum(checkpoint=checkpoint, progress=stop)
    heard.clear()
    again = train_pendulum(checkpoint=checkpoint, progress=heard.append)
    assert again.to_bytes() == whole.to_bytes()
    assert f"from {after * 256} steps" in heard[0] and len(heard) == 1 + 3 - after
    assert whole.curve.shape == (3, 3) and whole.curve[:, 0].tolist() == [256, 512, 768]
    heard.clear()
    finished = train_pendulum(checkpoint=checkpoint, progress=heard.append)
    assert finished.to_bytes() == whole.to_bytes()
    assert len(heard) == 1, "a finished training is not repeated"


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    file = str(tmp_path / "training")
    train(PENDULUM, env_steps=100, seed=3, settings=QUICK, checkpoint=file)
    with pytest.raises(
        ValueError,
        match=r"training is the checkpoint of another training \(seed 3 there and 4 here\): "
        r"delete it",
    ):
        train(PENDULUM, env_steps=100, seed=4, settings=QUICK, checkpoint=file)
    with pytest.raises(ValueError, match="env_steps 100 there and 101 here"):
        train(PENDULUM, env_steps=101, seed=3, settings=QUICK, checkpoint=file)
    data = storage.read_bytes(file)
    for broken in (b"", data[:-20], save({"a": np.zeros(1)})):
        storage.write_bytes(file, broken)
        with pytest.raises(ValueError, match=r"is not a checkpoint of a training .*delete it"):
            train(PENDULUM, env_steps=100, seed=3, settings=QUICK, checkpoint=file)


# --- the expert's file ---


def test_bytes_give_the_same_expert_back(tmp_path):
    expert = train(PENDULUM, env_steps=STEPS, seed=0, settings=QUICK)
    again = TrainedPolicy.from_bytes(expert.to_bytes())
    assert again.to_bytes() == expert.to_bytes() and again.metadata == expert.metadata
    assert (
        World.parse(again.metadata["world"]) == PENDULUM
        and again.metadata["env_steps"] == STEPS
        and again.metadata["seed"] == 0
    )
    env = make(PENDULUM)
    for observation in np.random.default_rng(0).normal(0, 2, (20, 4)):
        assert np.array_equal(again.act(env, observation), expert.act(env, observation))
        assert expert.act(env, observation).dtype == np.float32 and expert.act(
            env, observation
        ).shape == (1,)
    with pytest.raises(
        ValueError, match=r"trained on observations of shape \(4,\), got one of \(3,\)"
    ):
        expert.act(env, np.zeros(3))
    for data in (b"no", expert.to_bytes()[:-8], save({"a": np.zeros(1)})):
        with pytest.raises(ValueError, match="not an expert that `train` made"):
            TrainedPolicy.from_bytes(data)


def test_act_is_the_librarys_deterministic_action():
    training = Training(lambda k: make(PENDULUM), 6, 0, QUICK)
    training.block()
    ppo = training.assemble([])
    mean, std = training.observation_statistics()
    expert = TrainedPolicy(
        training.actor(), mean, std, np.array([-3.0]), np.array([3.0]), np.zeros((0, 3))
    )
    expert.weights["4.weight"] = 100 * expert.weights["4.weight"]
    ppo.policy.action_net.weight.data *= 100  # so that some actions are cut at the bounds
    found = []
    for observation in np.random.default_rng(0).normal(0, 6, (50, 4)):  # beyond 10 deviations, too
        chosen, _ = ppo.predict(ppo.env.normalize_obs(observation), deterministic=True)
        found.append(expert.act(None, observation).item())
        assert found[-1] == pytest.approx(3 * chosen.item(), abs=1e-4)
    assert 5 < np.isin(found, [-3.0, 3.0]).sum() < 45
    ppo.env.close()


def test_actions_in_the_environments_units():
    bounds = Bounds(np.array([-0.4, 0.0, -np.inf, 0.0]), np.array([0.4, 10.0, np.inf, np.inf]))
    assert bounds.units(
        np.array([[1.0, -1.0, 7.0, 7.0], [-9.0, 0.5, -7.0, -7.0]])
    ) == pytest.approx(np.array([[0.4, 0.0, 7.0, 7.0], [-0.4, 7.5, -7.0, 0.0]]))


# --- bad input ---


def test_what_cannot_be_trained_is_said():
    with pytest.raises(ValueError, match="env_steps is 0: give at least 1"):
        train(PENDULUM, env_steps=0, seed=0)
    with pytest.raises(
        ValueError, match=r"CartPole-v1 has Discrete\(2\) as actions.*choose another expert"
    ):
        train(World("CartPole-v1", steps=10, seed=0, dynamics={}), env_steps=10, seed=0)


def test_without_the_library_training_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "pipeline.simulation.ppo", raising=False)
    with pytest.raises(ValueError, match=r"training an expert: .*uv pip install -e .*robotics"):
        train(PENDULUM, env_steps=10, seed=0)
