"""Training an expert: what it learns, that a stop changes nothing, its file, and its arithmetic
against torch.
"""

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from pipeline.io import storage
from pipeline.simulation.environment import World, make
from pipeline.simulation.ppo import (
    Adam,
    Bounds,
    Network,
    Ppo,
    Running,
    Settings,
    _Runner,
    advantages,
    mean_actions,
    scaled,
)
from pipeline.simulation.training import TrainedPolicy, train

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


def sequential(parts, net):
    """The network in torch, in float64."""
    layers = []
    for name in ("0", "2", "4"):
        weight = parts[f"{net}{name}.weight"]
        layers += [torch.nn.Linear(weight.shape[1], weight.shape[0]), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1]).double()
    model.load_state_dict(
        {
            name.removeprefix(net): torch.from_numpy(part)
            for name, part in parts.items()
            if name.startswith(net) and name[-1] in "ts"
        }
    )
    return model


def rough(observation=5, action=2, seed=0):
    """A network whose every parameter differs from its start."""
    rng = np.random.default_rng(seed)
    network = Network(observation, action, 16, -0.5, rng)
    network.vector += rng.normal(0, 0.2, len(network.vector)).astype(np.float32)
    return network


class Counting(gymnasium.Env):
    """Nothing to do, a reward of 1 a step; over after five steps, as an end or as a time limit. To
    be seen are `shown` x the steps so far.
    """

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, limit, broken=False, shown=0.0):
        self.limit, self.broken, self.shown, self.t, self.seeds = limit, broken, shown, 0, []

    def reset(self, *, seed=None, options=None):
        self.t = 0
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 5
        return (
            np.full(1, np.nan if self.broken and over else self.shown * self.t, np.float32),
            1.0,
            over and not self.limit,
            over and self.limit,
            {},
        )


# --- what it learns ---


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
def test_the_hopper_hops():
    """The figure that jobs/locomotion.yaml rests on: about four minutes of one core."""
    world = World("Hopper-v5", steps=1000, seed=0, dynamics={})
    assert (
        np.mean(returns(world, train(world, env_steps=1_000_000, seed=0).act, range(100, 110)))
        >= 1500
    )


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


def test_a_time_limit_is_no_end():
    """A reward of 1 for ever is worth 1 / (1 - gamma) = 5; for five steps, 3.4 to 1, 2.2 on
    average.
    """
    values = {}
    for limit in (True, False):
        ppo = Ppo(
            lambda k, limit=limit: Counting(limit),
            60,
            0,
            Settings(environments=2, horizon=64, gamma=0.8, lr=3e-3, width=16),
        )
        while ppo.iteration < ppo.iterations:
            ppo.block()
        values[limit] = float(
            ppo.network.values(np.zeros((1, 1), np.float32))[0] * ppo.returns.std[0]
        )
        assert ppo.curve[-1][1:] == (5, 5)
    assert values[True] == pytest.approx(5, rel=0.1)
    assert values[False] == pytest.approx(
        np.mean([(1 - 0.8**k) / 0.2 for k in range(1, 6)]), rel=0.15
    )


def test_what_follows_a_time_limit_is_valued_by_its_own_last_observation(monkeypatch):
    """And not by the next episode's first."""
    seen = []
    monkeypatch.setattr(
        "pipeline.simulation.ppo.advantages", lambda *args: seen.append(args) or advantages(*args)
    )
    ppo = Ppo(lambda k: Counting(True, shown=0.2), 1, 0, QUICK)
    network = Network(1, 1, 16, -0.5, np.random.default_rng(0))
    network.vector[:] = ppo.network.vector
    ppo.block()
    _, values, following, ended, _, _ = seen[0]
    of = network.values(np.arange(6, dtype=np.float32)[:, None] * np.float32(0.2))
    assert ended[:, 0].tolist() == [t % 5 == 4 for t in range(32)]
    assert values[:, 0] == pytest.approx(of[np.arange(32) % 5], abs=1e-6)
    assert following[:, 0] == pytest.approx(of[np.arange(32) % 5 + 1], abs=1e-6)


def test_no_two_episodes_begin_alike():
    envs = []
    ppo = Ppo(lambda k: envs.append(Counting(True)) or envs[-1], 4, 0, QUICK)
    while ppo.iteration < ppo.iterations:
        ppo.block()
    seeds = [seed for env in envs for seed in env.seeds]
    assert len(seeds) == len(set(seeds)) > 100


def test_a_simulation_that_blows_up_is_an_end():
    ppo = Ppo(lambda k: Counting(True, broken=True), 4, 0, QUICK)
    while ppo.iteration < ppo.iterations:
        ppo.block()
    assert np.isfinite(ppo.network.vector).all() and np.isfinite(ppo.observations.mean).all()
    assert ppo.curve[-1][1:] == (4, 5)


def test_a_state_that_mujoco_calls_bad_is_an_end_as_in_a_rollout():
    """MuJoCo starts anew after a bad state: what is seen is finite then, and an ordinary step
    without that.
    """
    env, done = make(PENDULUM), []
    step = env.unwrapped.step

    def blow(action):
        done.append(action)
        if len(done) == 3:
            env.unwrapped.data.qvel[:] = 1e20
        return step(action)

    env.unwrapped.step = blow
    ppo = Ppo(
        lambda k: env,
        1,
        0,
        Settings(environments=1, horizon=16, epochs=1, minibatch=8, width=16, block=1),
    )
    ppo.bounds = Bounds(np.zeros(1), np.zeros(1))
    runner = _Runner(ppo)
    batch = runner.run(np.random.default_rng(0))
    assert (
        np.flatnonzero(batch.terminated[:, 0]).tolist()[0] == 2
        and batch.rewards[2, 0] == 0
        and runner.done[0] == (2.0, 3.0)
    )
    assert np.isfinite(batch.raw).all() and not batch.terminated[3, 0], (
        "a warning is of its own episode alone"
    )


# --- stopping and going on ---


@pytest.mark.parametrize("after", [1, 2])
def test_a_stop_changes_nothing(root, after):
    whole = train(PENDULUM, env_steps=STEPS, seed=3, settings=QUICK)
    heard = []

    def stop(text):
        heard.append(text)
        if len(heard) == after + 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(
            PENDULUM,
            env_steps=STEPS,
            seed=3,
            settings=QUICK,
            checkpoint=f"{root}/a/training",
            progress=stop,
        )
    heard.clear()
    again = train(
        PENDULUM,
        env_steps=STEPS,
        seed=3,
        settings=QUICK,
        checkpoint=f"{root}/a/training",
        progress=heard.append,
    )
    assert again.to_bytes() == whole.to_bytes()
    assert f"from {after * 256} steps" in heard[0] and len(heard) == 1 + 3 - after
    assert whole.curve.shape == (3, 3) and whole.curve[:, 0].tolist() == [256, 512, 768]
    heard.clear()
    assert (
        train(
            PENDULUM,
            env_steps=STEPS,
            seed=3,
            settings=QUICK,
            checkpoint=f"{root}/a/training",
            progress=heard.append,
        ).to_bytes()
        == whole.to_bytes()
    )
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
        with pytest.raises(ValueError, match=r"is no training's checkpoint .*delete it"):
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


def test_act_equals_the_network_in_torch():
    rng, network = np.random.default_rng(1), rough()
    mean, std = rng.normal(0, 3, 5), rng.uniform(0.1, 4, 5)
    low, high = np.array([-0.4, -1.0]), np.array([0.4, 3.0])
    expert = TrainedPolicy(network.actor(), mean, std, low, high, np.zeros((0, 3)))
    model = sequential(network.parts, "actor.")
    cut = 0
    for observation in rng.normal(0, 6, (200, 5)):
        with torch.no_grad():
            out = model(torch.from_numpy((observation - mean) / std).clamp(-10, 10))
        expected = np.clip([0.4 * out[0].item(), 1 + 2 * out[1].item()], low, high)
        cut += bool(np.isin(expected, [*low, *high]).any())
        assert expert.act(None, observation) == pytest.approx(expected, abs=1e-6)
    assert 20 < cut < 180


# --- its arithmetic ---


def test_the_gradient_is_that_of_autograd():
    rng, network, n = np.random.default_rng(2), rough(), 64
    x, actions = (
        rng.normal(size=(n, 5)).astype(np.float32),
        rng.normal(size=(n, 2)).astype(np.float32),
    )
    gains, targets = rng.normal(size=n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    before = network.log_prob(mean_actions(network.actor(), x), actions) + rng.normal(
        0, 0.3, n
    ).astype(np.float32)
    actor, critic = sequential(network.parts, "actor."), sequential(network.parts, "critic.")
    log_std = torch.from_numpy(network.parts["log_std"].copy()).double().requires_grad_()
    tx, ta, tb, tg, tt = (
        torch.from_numpy(array).double() for array in (x, actions, before, gains, targets)
    )
    density = torch.distributions.Normal(actor(tx), log_std.exp()).log_prob(ta).sum(-1) + np.log(
        2 * np.pi
    )  # two actions
    ratio = (density - tb).exp()
    assert 5 < ((ratio < 0.8) | (ratio > 1.2)).sum() < 59
    loss = (
        0.7 * (critic(tx)[:, 0] - tt).square().mean() / 2
        - torch.min(ratio * tg, ratio.clamp(0.8, 1.2) * tg).mean()
    )
    loss.backward()
    found = network.views(network.gradient(x, actions, before, gains, targets, 0.2, 0.7))
    grads = [
        (f"{net}.{name}", part.grad)
        for net, model in (("actor", actor), ("critic", critic))
        for name, part in model.named_parameters()
    ]
    expected = dict([*grads, ("log_std", log_std.grad)])
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert part is not None and found[name] == pytest.approx(part.numpy(), abs=2e-6), name


def test_adam_is_torchs():
    rng = np.random.default_rng(0)
    vector = rng.normal(size=7).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(vector.copy()))
    reference, adam = torch.optim.Adam([parameter], 0.03, eps=1e-5), Adam(7)
    for _ in range(20):
        gradient = rng.normal(size=7).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        adam.step(vector, gradient, 0.03)
    assert vector == pytest.approx(parameter.detach().numpy(), abs=1e-5)


def test_advantages_are_the_weighted_sums_of_the_paper():
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 6, 2))
    ended = np.zeros((6, 2), bool)
    ended[2, 0] = ended[5, 1] = True
    found = advantages(rewards, values, following, ended, 0.9, 0.8)
    for k in range(2):
        for t in range(6):
            expected, weight = 0.0, 1.0
            for later in range(t, 6):
                expected += weight * (
                    rewards[later, k] + 0.9 * following[later, k] - values[later, k]
                )
                weight *= 0.9 * 0.8
                if ended[later, k]:
                    break
            assert found[t, k] == pytest.approx(expected)


def test_running_statistics_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(5, 3, (100, 3)) * [1, 1, 0]
    running = Running(3)
    assert running.mean.tolist() == [0, 0, 0] and running.std.tolist() == [1, 1, 1]
    for batch in (rows[:1], rows[1:40], rows[40:]):
        running.add(batch)
    assert running.mean == pytest.approx(rows.mean(0))
    assert running.std == pytest.approx([*rows.std(0)[:2], 1])
    assert scaled(np.array([1e9, 0, 0]), running.mean, running.std)[0] == 10


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
