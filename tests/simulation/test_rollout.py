"""Episodes are those of a bare loop, whatever stands beside them; experts do what they are for;
what goes wrong is marked.
"""

import gymnasium
import mujoco
import numpy as np
import pytest

from pipeline.simulation import experts
from pipeline.simulation import rollout as rollouts
from pipeline.simulation.environment import World, make
from pipeline.simulation.experts import LQR, Random, demonstrations, expert
from pipeline.simulation.rollout import rollout

PENDULUM = "InvertedDoublePendulum-v5"
SHIFTED = {"mass": 2.5, "gear": 0.45, "damping": 3.0}


class Law:
    """A linear policy, row by row."""

    def __init__(self, gain):
        self.gain = gain

    def begin(self, worlds):
        self.count = len(worlds)

    def act(self, observations, rewards):
        assert len(observations) == len(rewards) == self.count
        return [None if one is None else self.gain @ one for one in observations]


def law(seed=0):
    return Law(np.random.default_rng(seed).normal(size=(1, 9)))


def bare(world, policy):
    """Gymnasium's own loop."""
    env = gymnasium.make(world.id, max_episode_steps=world.steps)
    observation, _ = env.reset(seed=world.seed)
    total, steps = 0.0, 0
    while True:
        observation, reward, terminated, truncated, _ = env.step(
            np.clip(policy.gain @ observation.astype(np.float32), -1, 1).astype(np.float32)
        )
        total, steps = total + reward, steps + 1
        if terminated or truncated:
            return total, steps, terminated


def test_episodes_are_those_of_a_bare_loop():
    worlds = [World(PENDULUM, 40, seed) for seed in range(6)]
    for world, episode in zip(worlds, rollout(worlds, law()), strict=True):
        total, steps, terminated = bare(world, law())
        assert episode.rewards.sum() == pytest.approx(total, abs=1e-9)
        assert (len(episode.rewards), episode.terminated, episode.success) == (
            steps,
            terminated,
            not terminated,
        )
        assert (
            episode.observations.shape == (steps, 9)
            and episode.actions.shape == (steps, 1)
            and np.abs(episode.actions).max() <= 1
        )


def test_what_stands_beside_a_world_changes_nothing():
    worlds = [
        World(PENDULUM, 60, seed, SHIFTED if seed % 2 else {"noise": 0.01}) for seed in range(8)
    ]
    together = rollout(worlds, law())
    for world, episode in zip(worlds[::-1], rollout(worlds[::-1], law()), strict=True):
        assert np.array_equal(
            episode.observations, together[world.seed].observations
        ) and np.array_equal(episode.rewards, together[world.seed].rewards)


@pytest.mark.parametrize(
    ("dynamics", "least"), [({}, 1.0), (SHIFTED, 0.8)], ids=["nominal", "shifted"]
)
def test_lqr_balances_its_own_world(dynamics, least):
    worlds = [World(PENDULUM, 400, seed, dynamics) for seed in range(10)]
    found = demonstrations(worlds, [expert("lqr", world) for world in worlds])
    assert np.mean([one.success for one in found]) >= least and {
        len(one.rewards) for one in found if one.success
    } == {400}
    random = demonstrations(worlds, [Random(world) for world in worlds])
    assert max(len(one.rewards) for one in random) < 30 and not any(one.success for one in random)


def test_lqr_of_another_world_falls():
    worlds = [World(PENDULUM, 400, seed, SHIFTED) for seed in range(5)]
    assert (
        max(len(one.rewards) for one in demonstrations(worlds, [LQR(World(PENDULUM, 400, 0))] * 5))
        < 100
    )


def test_lqr_linearises_as_mujoco_does_and_stabilises_what_is_unstable():
    """MuJoCo's own mjd_transitionFD refuses the Runge-Kutta integrator: with Euler's and tiny steps
    it gives the same, and the loop is closed stably.
    """
    for ident, unstable in (("InvertedPendulum-v5", 1), (PENDULUM, 2)):
        law, model = (
            LQR(World(ident, 100, 0, SHIFTED)),
            make(World(ident, 100, 0, SHIFTED)).unwrapped.model,
        )
        n = 2 * model.nv
        span, tiny = model.opt.timestep * make(World(ident, 100, 0)).unwrapped.frame_skip, 1e-4
        model.opt.integrator, model.opt.timestep = mujoco.mjtIntegrator.mjINT_EULER, tiny
        a, b = np.zeros((n, n)), np.zeros((n, model.nu))
        mujoco.mjd_transitionFD(model, mujoco.MjData(model), 1e-6, True, a, b, None, None)
        whole, pushed = np.eye(n), np.zeros((n, model.nu))
        for _ in range(round(span / tiny)):
            whole, pushed = a @ whole, a @ pushed + b
        assert np.allclose(law.transition, whole, atol=0.02 * np.abs(whole).max()) and np.allclose(
            law.control, pushed, atol=0.02 * np.abs(pushed).max()
        )
        assert (np.abs(np.linalg.eigvals(law.transition)) > 1.001).sum() == unstable
        assert np.abs(np.linalg.eigvals(law.transition - law.control @ law.gain)).max() < 0.999


def test_lqr_balances_the_single_pendulum_and_pays_less_than_other_gains():
    """Of the linear model, the price of the regulator from a start is lower than that of gains
    beside it.
    """
    world = World("InvertedPendulum-v5", 100, 0)
    law = LQR(world)
    found = demonstrations([world], [law])[0]
    assert found.success and len(found.rewards) == 100

    def price(gain):
        x, total = np.array([0.1, 0.1, 0.0, 0.0]), 0.0
        for _ in range(2000):
            u = -gain @ x
            total += float(x @ np.diag([0.3, 10.0, 0.0, 0.0]) @ x + 10.0 * u @ u)
            x = law.transition @ x + law.control @ u
        return total

    nudges = np.random.default_rng(0).normal(scale=0.02, size=(20, 1, 4)) * np.abs(law.gain)
    assert price(law.gain) < min(price(law.gain + nudge) for nudge in nudges)


def test_noisy_demonstrations_keep_the_expert_s_own_actions_as_labels():
    world = World(PENDULUM, 50, 1)
    noisy, clean = (demonstrations([world], [LQR(world)], explore)[0] for explore in (0.1, 0.0))
    assert np.array_equal(noisy.observations[0], clean.observations[0]) and np.array_equal(
        noisy.actions[0], clean.actions[0]
    )
    assert not np.allclose(noisy.observations[1], clean.observations[1])
    assert (
        np.array_equal(clean.executed, clean.actions)
        and not np.allclose(noisy.executed, noisy.actions)
        and noisy.executed.dtype == np.float32
    )
    env = make(world)
    seen = [env.reset(seed=1)[0], *(env.step(action)[0] for action in noisy.executed)]
    assert (
        np.array_equal(np.float32(seen[:-1]), noisy.observations)
        and np.abs(noisy.executed).max() <= 1
    )
    again = demonstrations([world], [LQR(world)], 0.1)[0]
    assert np.array_equal(noisy.observations, again.observations)


def test_lqr_is_solved_once_for_the_same_dynamics(monkeypatch):
    met = []
    monkeypatch.setattr(experts, "make", lambda world: met.append(world.dynamics) or make(world))
    dynamics = {"mass": 1.2345, "gear": 0.9}
    first, noisy, other = (
        LQR(World(PENDULUM, 9, seed, given))
        for seed, given in enumerate((dynamics, {"noise": 0.1, **dynamics}, {"mass": 1.2346}))
    )
    assert (
        met == [dynamics, {"mass": 1.2346}]
        and np.array_equal(first.gain, noisy.gain)
        and not np.array_equal(first.gain, other.gain)
    )


def test_an_expert_that_is_none_is_named():
    with pytest.raises(ValueError, match="unknown expert 'lqrr'; did you mean lqr"):
        expert("lqrr", World(PENDULUM, 1, 0))
    with pytest.raises(
        ValueError,
        match="expert lqr balances InvertedPendulum and InvertedDoublePendulum, not Hopper-v5",
    ):
        expert("lqr", World("Hopper-v5", 1, 0))


class Broken(gymnasium.Wrapper):
    """Whose third observation is not finite."""

    count = 0

    def step(self, action):
        observation, *rest = super().step(action)
        self.count += 1
        return (observation * np.nan if self.count == 3 else observation, *rest)


def test_a_simulator_that_diverges_marks_its_episode_and_no_other(monkeypatch):
    monkeypatch.setattr(
        rollouts, "make", lambda world: Broken(make(world)) if world.seed == 1 else make(world)
    )
    found = rollout([World(PENDULUM, 6, seed) for seed in range(3)], Law(np.zeros((1, 9))))
    assert found[1].diverged == "step 2: an observation is not finite" and not found[1].success
    assert (len(found[1].rewards), found[1].rewards[-1]) == (3, 0.0) and np.isfinite(
        found[1].observations
    ).all()
    assert [one.diverged for one in (found[0], found[2])] == ["", ""]


def test_mujoco_s_own_warnings_count_as_divergence():
    class Wild:
        def begin(self, worlds):
            pass

        def act(self, observations, rewards):
            return [np.array([1.0])]

    env = make(World(PENDULUM, 20, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "make", lambda world: env)
        step = env.unwrapped.step

        def blow(action):
            env.unwrapped.data.qvel[:] = 1e20
            return step(action)

        patch.setattr(env.unwrapped, "step", blow)
        found = rollout([World(PENDULUM, 20, 0)], Wild())[0]
        assert (
            found.diverged == "step 0: MuJoCo warns of bad velocities"
            and not found.success
            and not found.terminated
            and not found.truncated
        )


def test_mujoco_writes_no_log_of_its_warnings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = make(World(PENDULUM, 20, 0)).unwrapped
    plain.data.qvel[:] = 1e20
    mujoco.mj_step(plain.model, plain.data)
    assert plain.data.warning[int(mujoco.mjtWarning.mjWARN_BADQVEL)].number and not list(
        tmp_path.iterdir()
    )


class Given:
    """Always the same action."""

    def __init__(self, action):
        self.action = action

    def begin(self, worlds):
        pass

    def act(self, observations, rewards):
        return [None if one is None else self.action for one in observations]


def test_actions_are_cut_at_the_bounds_and_those_of_another_kind_refused():
    assert (
        rollout([World(PENDULUM, 3, 0)], Given(np.array([7.0])))[0].actions.tolist() == [[1.0]] * 3
    )
    with pytest.raises(ValueError, match="takes 1 numbers"):
        rollout([World(PENDULUM, 3, 0)], Given(np.zeros(2)))
    for action in (4, -1, np.zeros(2)):
        with pytest.raises(ValueError, match="takes one of 4 classes, numbered from 0"):
            rollout([World("onetomany/WallFollowing-v0", 3, 0)], Given(action))


def test_an_action_that_is_not_finite_is_the_policy_s_own_divergence():
    found = rollout([World(PENDULUM, 6, 0)], Law(np.full((1, 9), np.nan)))[0]
    assert found.diverged == "step 0: the policy's action is not finite"


def test_walkers_succeed_by_staying_up_and_getting_on():
    worlds = [World("Hopper-v5", 20, seed) for seed in range(2)]

    class Still:
        def begin(self, worlds):
            pass

        def act(self, observations, rewards):
            return [None if one is None else np.zeros(3) for one in observations]

    # It stands, and gets nowhere
    assert [(one.success, one.terminated) for one in rollout(worlds, Still())] == [
        (False, False)
    ] * 2


@pytest.mark.parametrize(
    ("ident", "steps", "action", "want"),
    [
        ("CartPole-v1", 5, 0, True),
        ("CartPole-v1", 50, 0, False),
        ("MountainCarContinuous-v0", 5, [1.0], None),
        ("Swimmer-v5", 5, [0.0, 0.0], None),
        ("Swimmer-v5", 5, [np.nan, 0.0], None),
        ("onetomany/Push-v0", 5, [np.nan, 0.0], False),
    ],
)
def test_success_is_told_where_it_is_known_what_that_is(ident, steps, action, want):
    assert rollout([World(ident, steps, 0)], Given(action))[0].success is want


@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_that_an_environment_reports_is_that_of_its_last_step(key, monkeypatch):
    """gymnasium-robotics, LeRobot's environments and stable-baselines3 call it is_success."""

    class Reporting(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.zeros(1, np.float32), 0.0, False, False, {key: np.bool_(self.steps == 3)}

    spec = gymnasium.envs.registration.EnvSpec("Own-v0", Reporting)
    monkeypatch.setitem(gymnasium.registry, "Own-v0", spec)
    worlds = [World("Own-v0", steps, 0) for steps in (2, 3, 4)]
    assert [one.success for one in rollout(worlds, Given([0.0]))] == [False, True, False]
