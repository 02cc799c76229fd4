"""Experts that demonstrations are made by. They may read the simulator's state, which policies
that learn from them never see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from pipeline.config.registry import nearest
from pipeline.core.rng import mix
from pipeline.simulation.environment import ADDED, World, class_of, make, simulator
from pipeline.simulation.rollout import Episode, rollout


class Expert(Protocol):
    def act(self, env: Any, observation: np.ndarray) -> Any:
        """Return the action (A,) in the environment's units, or the number of a class."""
        ...


class Random:
    """Uniform actions, from the world's seed."""

    def __init__(self, world: World):
        self.rng = np.random.default_rng(mix(world.seed, 0xAC7))

    def act(self, env: Any, observation: np.ndarray) -> Any:
        space = env.action_space
        return (
            self.rng.uniform(space.low, space.high).astype(np.float32)
            if space.shape
            else int(self.rng.integers(space.n))
        )


class LQR:
    """The linear-quadratic regulator about the upright rest of a pendulum on a cart.

    u = -K x, with K from the discrete algebraic Riccati equation of the simulator's own
    linearisation of this world, so it knows the masses, gears and damping. x is (qpos, qvel).

    One step of the linearisation is one action (`frame_skip` steps of the simulator), by central
    differences of whole steps: MuJoCo's mjd_transitionFD refuses these models' RK4 integrator. Of
    150 starts, InvertedDoublePendulum stays up for 400 steps in all as published, and in 141 with
    masses x 2.5, gear x 0.45 and damping x 3: from the others the saturated motor cannot catch it
    (neither could predictive control that knows the bounds, 140). A lower cost of actions, or a
    higher one of the cart's position, loses more. Raises ValueError for a world that is no such
    pendulum.
    """

    IDS = ("InvertedPendulum", "InvertedDoublePendulum")
    WEIGHTS = 0.3, 10.0, 10.0
    """Costs of the cart's position, of each angle, and of the action; velocities cost nothing."""

    def __init__(self, world: World):
        if world.id.partition("-")[0] not in self.IDS:
            raise ValueError(f"expert lqr balances {' and '.join(self.IDS)}, not {world.id}")
        dynamics = sorted(world.dynamics.items())
        constants = tuple((name, value) for name, value in dynamics if name not in ADDED)
        self.transition, self.control, self.gain = self._solved(world.id, constants)

    @classmethod
    @lru_cache(maxsize=8)
    def _solved(
        cls, ident: str, dynamics: tuple[tuple[str, float], ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the matrices A and B of the linearisation x' = A x + B u, and the gain K.

        They are cached, since many episodes have the same dynamics.
        """
        from scipy.linalg import solve_discrete_are

        env = make(World(ident, 1, 0, dict(dynamics)))
        model, skip = env.unwrapped.model, env.unwrapped.frame_skip
        mujoco = simulator()
        data, n, m = mujoco.MjData(model), 2 * model.nv, model.nu

        def step_from(change: np.ndarray) -> np.ndarray:
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.qvel[:], data.ctrl[:] = np.split(change, [model.nq, n])
            mujoco.mj_step(model, data, skip)
            return np.concatenate([data.qpos, data.qvel])

        step = 1e-5  # from the state of rest, without an action
        changes = step * np.eye(n + m)
        slopes = [(step_from(change) - step_from(-change)) / (2 * step) for change in changes]
        transition, control = np.stack(slopes[:n], 1), np.stack(slopes[n:], 1)
        position_cost, angle_cost, action_cost = cls.WEIGHTS
        state_costs = np.diag([position_cost] + [angle_cost] * (model.nv - 1) + [0.0] * model.nv)
        action_costs = action_cost * np.eye(m)
        p = solve_discrete_are(transition, control, state_costs, action_costs)
        env.close()
        return (
            transition,
            control,
            np.linalg.solve(action_costs + control.T @ p @ control, control.T @ p @ transition),
        )

    def act(self, env: Any, observation: np.ndarray) -> np.ndarray:
        """Return the action (1,) float32, not clipped."""
        data = env.unwrapped.data
        return (-self.gain @ np.concatenate([data.qpos, data.qvel])).astype(np.float32)


EXPERTS: dict[str, Callable[[World], Expert] | str] = {
    "random": Random,
    "lqr": LQR,
    "reach": "reach:Reaching",
    "push": "push:Pushing",
    "wall": "range_world:WallFollower",
}
"""Experts by name, or where each one's class is; it is made for the world in which it acts."""


def expert(name: str, world: World) -> Expert:
    """Make an expert by name.

    Raises ValueError for an unknown name (with the nearest ones) and for a world that the expert is
    not for.
    """
    if name not in EXPERTS:
        raise ValueError(f"unknown expert {name!r}; {nearest(name, EXPERTS)}")
    made = EXPERTS[name]
    return (class_of(made) if isinstance(made, str) else made)(world)


class Demonstrator:
    """Experts as the policy of a rollout, one for each world.

    Attributes:
        explore: standard deviation of Gaussian noise on what is executed, as a share of half an
            action's range.
        clean: what the experts would have done: the labels of noisy demonstrations (DART, Laskey et
            al. 2017).
    """

    def __init__(self, experts: Sequence[Expert], explore: float = 0.0):
        self.experts, self.explore = experts, explore
        self.envs: list[Any] = []
        self.clean: list[list[Any]] = []
        self.rngs: list[np.random.Generator] = []

    def start(self, envs: list[Any]) -> None:
        self.envs = envs

    def begin(self, worlds: Sequence[World]) -> None:
        self.clean = [[] for _ in worlds]
        self.rngs = [np.random.default_rng(mix(world.seed, 0xE4)) for world in worlds]

    def act(self, observations: list[np.ndarray | None], rewards: list[float]) -> list[Any]:
        out: list[Any] = []
        for one, env, observation, clean, rng in zip(
            self.experts, self.envs, observations, self.clean, self.rngs, strict=True
        ):
            if observation is None:
                out.append(None)
                continue
            action, space = one.act(env, observation), env.action_space
            if space.shape:
                action = np.minimum(np.maximum(action, space.low), space.high).astype(np.float32)
            clean.append(action)
            if self.explore and space.shape:
                action = action + self.explore * (space.high - space.low) / 2 * rng.standard_normal(
                    space.shape
                )
            out.append(action)
        return out


def demonstrations(
    worlds: Sequence[World], experts: Sequence[Expert], explore: float = 0.0
) -> list[Episode]:
    """Roll out one episode of an expert in each world.

    The episodes' `actions` are the experts' own, also where what was `executed` had noise.
    """
    who = Demonstrator(experts, explore)
    episodes = rollout(worlds, who, start=who.start)
    for episode, clean in zip(episodes, who.clean, strict=True):
        episode.executed = episode.actions
        if len(clean):
            episode.actions = np.array(clean, dtype=episode.actions.dtype)
    return episodes
