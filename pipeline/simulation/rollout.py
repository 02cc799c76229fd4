"""Roll out a policy in many worlds in step, so that a network is called once a step for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipeline.io import heartbeat
from pipeline.simulation.environment import OWN_ENVIRONMENTS, World, make, simulator
from pipeline.simulation.pictures import picture

UPRIGHT = ("InvertedPendulum", "InvertedDoublePendulum", "CartPole")
WALKERS = ("Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid")
TARGETS_TO_REACH = {"Reacher": ("fingertip", "target", 0.02), "Pusher": ("object", "goal", 0.05)}
"""Environments of gymnasium with a known criterion of success, without versions. TARGETS_TO_REACH
has a body, the body where it should be, and the tolerance in metres.
"""
WITH_CRITERION = (
    *(ident.partition("-")[0] for ident in OWN_ENVIRONMENTS),
    *UPRIGHT,
    *WALKERS,
    *TARGETS_TO_REACH,
)
SUCCESS_KEYS = ("success", "is_success")
"""Names of success in an environment's `info`; the second is that of gymnasium-robotics, LeRobot
and stable-baselines3.
"""
MIN_SPEED = 0.5
"""Metres a second over a whole episode that a walker or hopper needs for success."""
FAR = 1e6
"""A simulation with larger observations or rewards has diverged."""


class Policy(Protocol):
    def begin(self, worlds: Sequence[World]) -> None:
        """Reset the policy: episodes begin in these worlds."""

    def act(self, observations: list[np.ndarray | None], rewards: list[float]) -> list[Any]:
        """Return an action for each world, in its units or as the number of a class.

        None for a world that has ended, whose observation is None.
        """
        ...


@dataclass
class Episode:
    """One episode of T steps.

    Attributes:
        world: where it took place.
        observations: (T, O) float32, each before its action.
        actions: (T, A) float32 or (T,) int64, of the policy, clipped to the bounds.
        rewards: (T,) float64.
        terminated, truncated: how it ended.
        success: None where there is no criterion.
        diverged: why the simulation failed, or "".
        frames: small (H, W, 3) uint8 pictures.
        executed: in demonstrations, what was done where `actions` are labels.
    """

    world: World
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    success: bool | None
    diverged: str = ""
    frames: list[np.ndarray] = field(default_factory=list)
    executed: np.ndarray | None = None


@dataclass
class _Running:
    env: Any
    observation: np.ndarray | None
    start: float
    observations: list[np.ndarray] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    diverged: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)


def has_success_criterion(ident: str) -> bool:
    """Whether `succeeded` knows what success is in an environment."""
    return ident.partition("-")[0] in WITH_CRITERION


def rollout(
    worlds: Sequence[World],
    policy: Policy,
    frames: int = 0,
    start: Callable[[list[Any]], None] | None = None,
) -> list[Episode]:
    """Roll out one episode in each world.

    An episode depends on its own world and the policy alone, whatever is rolled out beside it.
    Actions are clipped to the bounds.

    Args:
        worlds: where to act.
        policy: what acts.
        frames: take a picture of the first world every so many steps, where that is possible; 0:
            none.
        start: is called with the environments before the first step (experts read their state).

    Raises:
        ValueError: a world that cannot be made.
    """
    running = []
    try:
        for world in worlds:
            env = make(world)
            running.append(_Running(env, None, 0.0))
            observation, _ = env.reset(seed=world.seed)
            running[-1].observation = np.asarray(observation, dtype=np.float32)
            running[-1].start = _distance_along_x(env)
        if start is not None:
            start([episode.env for episode in running])
        policy.begin(worlds)
        while any(episode.observation is not None for episode in running):
            heartbeat.beat()  # long trials in a simulator are no silence
            chosen = policy.act(
                [episode.observation for episode in running],
                [episode.rewards[-1] if episode.rewards else 0.0 for episode in running],
            )
            for episode, action in zip(running, chosen, strict=True):
                if episode.observation is not None:
                    _step(episode, action, frames if episode is running[0] else 0)
        return [_to_episode(episode, world) for episode, world in zip(running, worlds, strict=True)]
    finally:
        for episode in running:
            episode.env.close()


def _step(episode: _Running, action: Any, frames: int) -> None:
    action = _clip_action(
        episode.env.action_space,
        _action_number(episode.env, action) if isinstance(action, str) else action,
    )
    number = len(episode.actions)
    if frames and number % frames == 0:
        episode.frames += picture(episode.env)
    episode.observations.append(episode.observation)  # type: ignore[arg-type]
    episode.actions.append(action)
    if np.isfinite(action).all():
        observation, reward, episode.terminated, episode.truncated, episode.info = episode.env.step(
            action
        )
        observation = np.asarray(observation, dtype=np.float32)
        episode.diverged = divergence(episode.env, observation, float(reward))
    else:
        observation, reward, episode.diverged = None, 0.0, "the policy's action is not finite"
    if episode.diverged:
        episode.rewards.append(0.0)
        episode.diverged, episode.observation = f"step {number}: {episode.diverged}", None
        return
    episode.rewards.append(float(reward))
    episode.observation = None if episode.terminated or episode.truncated else observation


def _action_number(env: Any, name: str) -> int:
    """Return the number of a class by its name. Raises ValueError for an unknown name."""
    names = list(
        getattr(env.unwrapped, "classes", None)
        or map(str, range(getattr(env.action_space, "n", 0)))
    )
    if name not in names:
        raise ValueError(
            f"action {name!r}: the environment has {', '.join(names) or 'numbers, and no names'}"
        )
    return names.index(name)


def _clip_action(space: Any, action: Any) -> Any:
    """Convert a policy's action to the environment's: (A,) float32 within the bounds, or a class's
    number.

    Raises ValueError for an action of another shape.
    """
    if space.shape:
        array = np.asarray(action, dtype=np.float32)
        if array.shape != space.shape:
            if array.size != int(np.prod(space.shape)):
                raise ValueError(
                    f"the policy's action {action!r}: the environment takes "
                    f"{int(np.prod(space.shape))} numbers"
                )
            array = array.reshape(space.shape)
        return np.minimum(np.maximum(array, space.low), space.high)  # np.clip takes twice as long
    if np.size(action) != 1 or not 0 <= int(np.ravel(action)[0]) < space.n:
        raise ValueError(
            f"the policy's action {action!r}: the environment takes one of {space.n} classes, "
            "numbered from 0"
        )
    return int(np.ravel(action)[0])


def divergence(env: Any, observation: np.ndarray, reward: float) -> str:
    """Return why the simulation has diverged with this step, or ""."""
    warning = _mujoco_warning(
        env
    )  # first: after a bad state MuJoCo starts again, and all is finite again
    if warning:
        return f"MuJoCo warns of {warning}"
    least, most = float(observation.min(initial=0)), float(observation.max(initial=0))
    if not (math.isfinite(reward) and math.isfinite(least) and math.isfinite(most)):
        return f"{'the reward' if not math.isfinite(reward) else 'an observation'} is not finite"
    far = max(abs(reward), -least, most)
    return f"an observation or reward of {far:.3g}, which is beyond {FAR:.0e}" if far > FAR else ""


def _mujoco_warning(env: Any) -> str:
    """Return what MuJoCo warns of in this episode: bad positions, velocities, accelerations,
    controls.
    """
    data = getattr(env.unwrapped, "data", None)
    if data is None or not data.warning.number.any():
        return ""
    bad = {
        "mjWARN_BADQPOS": "positions",
        "mjWARN_BADQVEL": "velocities",
        "mjWARN_BADQACC": "accelerations",
        "mjWARN_BADCTRL": "controls",
    }
    kinds = simulator().mjtWarning
    warnings = [
        what for name, what in bad.items() if data.warning[int(getattr(kinds, name))].number
    ]
    return f"bad {' and '.join(warnings)}" if warnings else ""


def _to_episode(episode: _Running, world: World) -> Episode:
    discrete = not episode.env.action_space.shape
    success = succeeded(
        world, episode.env, episode.info, episode.terminated, len(episode.rewards), episode.start
    )
    return Episode(
        world,
        np.array(episode.observations, dtype=np.float32),
        np.array(episode.actions, dtype=np.int64 if discrete else np.float32),
        np.array(episode.rewards, dtype=np.float64),
        bool(episode.terminated) and not episode.diverged,
        bool(episode.truncated) and not episode.diverged,
        success and not episode.diverged,
        episode.diverged,
        episode.frames,
    )


def succeeded(
    world: World, env: Any, info: dict[str, Any], terminated: bool, steps: int, start: float
) -> bool | None:
    """Whether an episode succeeded; None where that is not defined.

    | environment | success |
    |---|---|
    | this package's, and others that report it | what the last step's `info` says: SUCCESS_KEYS |
    | InvertedPendulum, InvertedDoublePendulum, CartPole | not fallen before the time limit |
    | Hopper, Walker2d, HalfCheetah, Ant, Humanoid | the same, and MIN_SPEED metres a second |
    | Reacher | the fingertip within 2 cm of the target in the end |
    | Pusher | the object within 5 cm of the goal in the end |
    | others | None: MountainCar ends where it succeeds, Swimmer is too slow for MIN_SPEED |
    """
    reported = [bool(info[key]) for key in SUCCESS_KEYS if key in info]
    if world.id in OWN_ENVIRONMENTS or reported:
        return any(reported)
    name = world.id.partition("-")[0]
    if name in WALKERS:
        return not terminated and _distance_along_x(env) - start >= MIN_SPEED * steps * float(
            env.unwrapped.dt
        )
    if name in TARGETS_TO_REACH:
        body, goal, near = TARGETS_TO_REACH[name]
        return bool(
            np.linalg.norm(env.unwrapped.get_body_com(body) - env.unwrapped.get_body_com(goal))
            < near
        )
    return not terminated if name in UPRIGHT else None


def _distance_along_x(env: Any) -> float:
    """Return metres along the first axis; 0 where the environment has none."""
    data = getattr(env.unwrapped, "data", None)
    return float(data.qpos[0]) if data is not None and len(data.qpos) else 0.0
