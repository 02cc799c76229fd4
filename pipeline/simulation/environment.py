"""Simulated worlds: an environment of gymnasium, or of this package, with given dynamics.

A policy that was trained with some dynamics can so be tried with others. A world is data: its text
is stored in the rows that were made in it, and makes it again.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import extras, plugins
from pipeline.config.registry import nearest
from pipeline.core.rng import mix

MULTIPLIERS = ("mass", "friction", "damping", "gear")
"""Factors for body masses and inertias; sliding, torsional and rolling friction; joint damping;
and actuator gears. 1: as published.
"""
FIELDS = {
    "mass": ("body_mass", "body_inertia"),
    "friction": ("geom_friction",),
    "damping": ("dof_damping",),
    "gear": ("actuator_gear",),
}
"""The arrays of a MuJoCo model that each of them multiplies."""
ADDED = ("latency", "noise")
"""Delay of actions in whole steps, and standard deviation of Gaussian noise on observations. 0: as
published.
"""
OWN_ENVIRONMENTS = {
    "onetomany/Reach-v0": "reach:Reach",
    "onetomany/Push-v0": "push:Push",
    "onetomany/WallFollowing-v0": "range_world:RangeWorld",
}
"""Environments of this package, and the module and class of each."""
PLAIN_ID = re.compile(r"([A-Za-z0-9_-]+/)?[A-Za-z0-9_.-]+")
"""Ids that rows may name, as gymnasium registers them: namespace/Name-v0. A colon would import the
module before it.
"""
MAX_STEPS = 1_000_000
"""Longest episode of a world that a row names."""
NEEDED = f"simulation needs gymnasium, MuJoCo and stable-baselines3: {extras.install('robotics')}"


@dataclass(frozen=True)
class World:
    """An environment and its dynamics. Raises ValueError for values that are not allowed.

    Attributes:
        id: of the environment.
        steps: an episode is truncated after so many.
        seed: of the episode's start and of noise.
        dynamics: see MULTIPLIERS and ADDED; others are as published.
        skill: for environments with several.
    """

    id: str
    steps: int
    seed: int
    dynamics: Mapping[str, float] = field(default_factory=dict)
    skill: str = ""

    def __post_init__(self):
        for name, value in self.dynamics.items():
            if name not in (*MULTIPLIERS, *ADDED):
                raise ValueError(f"dynamics {name}: {nearest(name, (*MULTIPLIERS, *ADDED))}")
            if (
                not math.isfinite(value)
                or value < 0
                or (name in MULTIPLIERS and value == 0)
                or (name == "latency" and value != int(value))
            ):
                raise ValueError(
                    f"dynamics {name}={value}: "
                    + {
                        "latency": "a whole number of steps from 0",
                        "noise": "a deviation from 0",
                    }.get(name, "a multiplier above 0")
                )
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: an episode has at least 1")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: a whole number from 0")

    def text(self) -> str:
        """Return canonical JSON, which `parse` reads. It never names the module of `module:id`."""
        ident = self.id.rpartition(":")[2]
        return json.dumps({**asdict(self), "id": ident}, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> World:
        """Read the world of a row.

        Raises ValueError for a text that is no world, and for an id that would import a module
        (module:Env): rows are data, and may only name installed environments by their registered
        ids.
        """
        try:
            stated = json.loads(text)
            ident = str(stated["id"])
            if not PLAIN_ID.fullmatch(ident):
                raise ValueError(
                    f"id {ident[:80]!r} is not a plain id of a registered environment, such as "
                    "Hopper-v5; rows cannot name code"
                )
            if int(stated["steps"]) > MAX_STEPS:
                raise ValueError(f"steps {stated['steps']}: an episode has at most {MAX_STEPS}")
            return cls(
                str(stated["id"]),
                int(stated["steps"]),
                int(stated["seed"]),
                {str(k): float(v) for k, v in stated.get("dynamics", {}).items()},
                str(stated.get("skill", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{text[:200]!r} is not a world: {error!r}; rollouts write JSON with id, steps, "
                "seed and dynamics"
            ) from None


def sample_dynamics(ranges: Mapping[str, float | Sequence[float]], seed: int) -> dict[str, float]:
    """Draw dynamics from ranges.

    Numbers are kept; (low, high) is drawn log-uniformly for multipliers, and uniformly for latency
    (whole steps) and noise. All come from one stream: a value depends on the names of the others.
    Raises ValueError for an invalid range.
    """
    rng = np.random.default_rng(mix(seed, 0xD1A))
    out = {}
    for name, value in sorted(ranges.items()):
        if isinstance(value, int | float):
            out[name] = float(value)
            continue
        is_range = len(value) == 2 and value[0] <= value[1]
        if not is_range or (name in MULTIPLIERS and value[0] <= 0):
            raise ValueError(
                f"dynamics {name}={tuple(value)}: a range is (low, high), for multipliers above 0"
            )
        low, high = value
        if name in MULTIPLIERS:
            out[name] = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        elif name == "latency":
            out[name] = float(rng.integers(int(low), int(high) + 1))
        else:
            out[name] = float(rng.uniform(low, high))
    return out


def check_environment_id(ident: str) -> None:
    """Raise ValueError for an environment that is not registered by exactly this name.

    An id without its version would mean another environment with another release of gymnasium.
    """
    # module:id is registered by its module, when it is made
    if ident not in OWN_ENVIRONMENTS and ":" not in ident and not is_registered(ident):
        raise _not_installed(ident)


def make(world: World) -> Any:
    """Make an environment with the world's dynamics; it is to be reset with the world's seed.

    Raises ValueError for an unknown id (with the nearest ones), a skill or dynamics that the
    environment does not have, and where gymnasium is missing.
    """
    gymnasium = _library("gymnasium")
    try:
        if world.id in OWN_ENVIRONMENTS:
            own = class_of(OWN_ENVIRONMENTS[world.id])
            env = gymnasium.wrappers.TimeLimit(own(world), world.steps)
        elif world.skill:
            raise ValueError(f"{world.id} has no skill {world.skill!r}; leave skill out")
        else:
            is_registered(world.id)  # imports the plugins where gymnasium does not know it
            env = gymnasium.make(world.id, disable_env_checker=True, max_episode_steps=world.steps)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"{world.id}: {NEEDED} ({error})") from None
    except gymnasium.error.UnregisteredEnv:
        raise _not_installed(world.id) from None
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"{world.id}: {error}") from None
    _silence_warnings(env)
    _change_dynamics(env, world)
    latency, noise = int(world.dynamics.get("latency", 0)), world.dynamics.get("noise", 0.0)
    return _DelayedActions(env, latency, noise, world.seed) if latency or noise else env


def check_spaces(env: Any, ident: str) -> None:
    """Raise ValueError for observations or actions that are neither one vector nor one class."""
    seen, done = env.observation_space, env.action_space
    if len(seen.shape or ()) != 1:
        raise ValueError(
            f"{ident}: observations of shape {seen.shape}, where rows of numbers are needed"
        )
    is_vector = hasattr(done, "low") and len(done.shape) == 1
    is_class = done.shape == () and getattr(done, "start", None) == 0
    if not is_vector and not is_class:
        raise ValueError(
            f"{ident}: actions {done}, where a row of numbers or a class from 0 is needed"
        )


def multipliers_without_effect(env: Any, dynamics: Mapping[str, float]) -> list[str]:
    """Return those of the multipliers that change nothing in a MuJoCo model, with the reason."""
    model = getattr(env.unwrapped, "model", None)
    if model is None or not dynamics:
        return []
    reasons = {
        "friction": _frictionless(model),
        "damping": "" if model.dof_damping.any() else "no joint of it is damped",
    }
    return [f"{name} ({reasons[name]})" for name in dynamics if reasons.get(name)]


def _frictionless(model: Any) -> str:
    """Return why no contact of a MuJoCo model has friction, or an empty string."""
    meets = (model.geom_contype[:, None] & model.geom_conaffinity) != 0
    meets = (meets | meets.T) & (model.geom_bodyid[:, None] != model.geom_bodyid)
    if not meets.any():
        return "nothing in it touches"
    # a contact takes condim from the geom of higher priority, else the larger of the two
    ahead = model.geom_priority[:, None] - model.geom_priority
    own = np.broadcast_to(model.geom_condim[:, None], meets.shape)
    equal = np.maximum(own, own.T)
    condim = np.where(ahead > 0, own, np.where(ahead < 0, own.T, equal))
    return "" if (condim[meets] > 1).any() else "its contacts have condim 1, without friction"


def is_registered(ident: str) -> bool:
    """Whether gymnasium knows an environment, if need be by importing the plugins in use."""
    known = _library("gymnasium").registry
    if ident not in known:
        for plugin in plugins.active():
            importlib.import_module(plugin.module)
    return ident in known


def is_part_of_gymnasium(ident: str) -> bool:
    """Whether an environment comes with gymnasium itself."""
    known = _library("gymnasium").registry
    entry_point = known[ident].entry_point if is_registered(ident) else ""
    module = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return module.startswith("gymnasium.")


def code_of(env: Any) -> str:
    """Return the SHA-256 of the file that defines an environment of somebody else's.

    It is empty for those of gymnasium and of this package, which have versions.
    """
    kind = type(env.unwrapped)
    if kind.__module__.partition(".")[0] in ("gymnasium", "pipeline"):
        return ""
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()


def _not_installed(ident: str) -> ValueError:
    known = [*_library("gymnasium").registry, *OWN_ENVIRONMENTS]
    return ValueError(
        f"environment {ident!r} is not installed; {nearest(ident, known)} (if it is your own, add "
        "the file that registers it to `plugins`, or give --plugin FILE)"
    )


def simulator() -> Any:
    """Return the module mujoco. Raises ValueError if it is not installed."""
    return _library("mujoco")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(NEEDED) from None


def class_of(place: str) -> Any:
    """Return a class of this package by its module and name, ``push:Push``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"pipeline.simulation.{module}"), name)


def _silence_warnings(env: Any) -> None:
    """Ignore MuJoCo's warnings, which it would write to a file; rollouts count them themselves."""
    if getattr(env.unwrapped, "model", None) is not None:
        mujoco = simulator()
        if mujoco.get_mju_user_warning() is None:
            mujoco.set_mju_user_warning(_ignored)


def _ignored(text: str) -> None:
    return


def _change_dynamics(env: Any, world: World) -> None:
    """Multiply the arrays of the MuJoCo model, and update what follows from masses."""
    # multipliers that an environment without MuJoCo applies itself
    own = getattr(env.unwrapped, "takes", ())
    wanted = {
        name: world.dynamics[name]
        for name in MULTIPLIERS
        if name not in own and world.dynamics.get(name, 1.0) != 1.0
    }
    if not wanted:
        return
    model = getattr(env.unwrapped, "model", None)
    if model is None:
        raise ValueError(
            f"{world.id} is not a MuJoCo environment: it has no {', '.join(wanted)} to multiply; "
            f"{', '.join((*own, *ADDED))} can be given"
        )
    for name, factor in wanted.items():
        for array in FIELDS[name]:
            getattr(model, array)[:] *= factor
    simulator().mj_setConst(model, env.unwrapped.data)


class _DelayedActions:
    """Delay actions by `latency` steps, and add Gaussian noise to observations.

    The first actions are zero, or class 0. The noise follows from the seed that `reset` gets;
    without one the random stream of the episode before goes on.
    """

    def __init__(self, env: Any, latency: int, noise: float, seed: int):
        self.env, self.latency, self.noise = env, latency, noise
        self.rng, self.waiting = np.random.default_rng(mix(seed, 0x0B5)), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict]:
        if options.get("seed") is not None:
            self.rng = np.random.default_rng(mix(options["seed"], 0x0B5))
        space = self.env.action_space
        self.waiting = [
            np.zeros(space.shape, dtype=space.dtype) if space.shape else 0
        ] * self.latency
        observation, info = self.env.reset(**options)
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict]:
        self.waiting.append(action)
        observation, *rest = self.env.step(self.waiting.pop(0))
        return (self._seen(observation), *rest)

    def _seen(self, observation: np.ndarray) -> np.ndarray:
        return (
            observation + self.noise * self.rng.standard_normal(observation.shape)
            if self.noise
            else observation
        )
