"""Proximal policy optimisation (Schulman et al. 2017) by stable-baselines3, resumable exactly.

The library has the algorithm. This module lets a training be saved after each block of iterations
as plain arrays (no pickle), and gives the same policy, bit for bit on the same machine, whether it
was stopped there or not: every block makes new environments and draws from (seed, iteration).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from pipeline.core.rng import mix
from pipeline.simulation.rollout import divergence
from pipeline.simulation.trained_policy import MAX_DEVIATIONS, Bounds, Settings

EPSILON = 1e-8
"""Added to a variance before its square root is taken, as VecNormalize does."""
ACTOR = {"0": "mlp_extractor.policy_net.0", "2": "mlp_extractor.policy_net.2", "4": "action_net"}
"""Linear layers of the policy network, and their names in the library's policy."""
STATISTICS = {
    f"{name}.{part}": (own, part)
    for name, own in (("observations", "obs_rms"), ("returns", "ret_rms"))
    for part in ("mean", "var", "count")
}
"""Running statistics, and where VecNormalize has them."""
ADAM = ("step", "exp_avg", "exp_avg_sq")


class TrainingEnvironment(gymnasium.Env):
    """An environment as the library wants it.

    Actions are those of the network (`Bounds`), a diverged simulation truncates the episode,
    and every episode begins from a seed of its own.

    Args:
        env: what `make` gave: vectors as observations (O,) and as continuous actions (A,).
        seed: of the episodes' starts.
        ended: takes (return, length) of each episode that ends.
    """

    def __init__(self, env: Any, seed: int, ended: list[tuple[float, float]]):
        self.env, self.ended = env, ended
        self.rng = np.random.default_rng(seed)
        self.bounds = Bounds(env.action_space.low, env.action_space.high)
        farthest = np.where(self.bounds.is_scaled, 1.0, MAX_DEVIATIONS).astype(np.float32)
        self.action_space = Box(-farthest, farthest)  # the library wants finite bounds
        self.observation_space = Box(-np.inf, np.inf, env.observation_space.shape, np.float64)
        self.observation = np.zeros(env.observation_space.shape)
        self.total, self.length = 0.0, 0

    def reset(
        self,
        *,
        seed: int | None = None,
        options: Any = None,
    ) -> tuple[np.ndarray, dict]:
        """Begin another episode; the library's `seed` is not used."""
        self.total, self.length = 0.0, 0
        self.observation, _ = self.env.reset(seed=int(self.rng.integers(2**31)))
        return self.observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take one step; one that diverges truncates the episode, without a reward.

        Termination would pay where rewards are negative: nothing more would be lost.
        """
        units = self.bounds.units(action)
        observation, reward, terminated, truncated, _ = self.env.step(units)
        if divergence(self.env, observation, reward):
            observation, reward, terminated, truncated = self.observation, 0.0, False, True
        self.observation = observation
        self.total, self.length = self.total + float(reward), self.length + 1
        if terminated or truncated:
            self.ended.append((self.total, float(self.length)))
        return observation, float(reward), bool(terminated), bool(truncated), {}

    def close(self) -> None:
        self.env.close()


class Training:
    """A training of so many iterations.

    Args:
        make: gives the k-th environment of the training, fresh. A block takes the next
            `settings.environments` numbers.
        iterations: how many there are in all; the learning rate falls to zero over them.
        seed: of everything random.
        settings: hyper-parameters.
    """

    def __init__(self, make: Callable[[int], Any], iterations: int, seed: int, settings: Settings):
        self.make, self.iterations, self.seed, self.settings = make, iterations, seed, settings
        self.iteration = 0
        self.curve: list[tuple[float, float, float]] = []
        """Per block: steps so far, mean return and mean length of its episodes (none: NaN)."""
        self.arrays: dict[str, np.ndarray] = {}
        """Network, optimiser and running statistics after the last block."""

    @property
    def steps(self) -> int:
        """Steps in the world so far."""
        return self.iteration * self.settings.steps

    def block(self) -> None:
        """Run iterations up to the next multiple of `settings.block`, or to the last one."""
        block = self.settings.block
        last = min(self.iterations, (self.iteration // block + 1) * block)
        ended: list[tuple[float, float]] = []
        with _library_state_kept():
            ppo = self.assemble(ended)
            try:
                ppo.learn((last - self.iteration) * self.settings.steps, log_interval=None)
                self.arrays = _arrays_of(ppo)
            finally:
                ppo.env.close()
        self.iteration = last
        reward, length = np.mean(ended, axis=0) if ended else (np.nan, np.nan)
        self.curve.append((float(self.steps), float(reward), float(length)))

    def assemble(self, ended: list[tuple[float, float]]) -> Any:
        """Return the library's PPO with new environments, in the state after the last block."""
        s, begin = self.settings, self.iteration
        first = begin // s.block * s.environments

        def environment(k: int) -> TrainingEnvironment:
            return TrainingEnvironment(self.make(first + k), mix(self.seed, begin, k), ended)

        def learning_rate(_: float) -> float:
            done = max(0, ppo.num_timesteps // s.steps - 1) if ppo else 0
            return s.lr * (1 - (begin + done) / self.iterations)

        ppo: Any = None
        venv = DummyVecEnv([lambda k=k: environment(k) for k in range(s.environments)])
        ppo = PPO(
            "MlpPolicy",
            VecNormalize(
                venv,
                clip_obs=MAX_DEVIATIONS,
                clip_reward=MAX_DEVIATIONS,
                gamma=s.gamma,
                epsilon=EPSILON,
            ),
            learning_rate=learning_rate,
            n_steps=s.horizon,
            batch_size=s.minibatch,
            n_epochs=s.epochs,
            gamma=s.gamma,
            gae_lambda=s.gae,
            clip_range=s.clip,
            vf_coef=s.value_weight,
            max_grad_norm=s.max_grad_norm,
            policy_kwargs={"net_arch": [s.width, s.width], "log_std_init": s.log_std},
            seed=mix(self.seed, begin) % 2**32,
            device="cpu",
        )
        ppo.set_logger(Logger(None, []))  # its own makes a folder among the temporary files
        if self.arrays:
            _restore(ppo, self.arrays)
        return ppo

    def state(self) -> dict[str, np.ndarray]:
        """Return all that a training needs to go on after a block, as arrays."""
        curve = np.array(self.curve, np.float64).reshape(-1, 3)
        return self.arrays | {"iteration": np.array([self.iteration]), "curve": curve}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave. Raises KeyError when something is missing."""
        arrays = dict(arrays)
        self.iteration = int(arrays.pop("iteration")[0])
        self.curve = [(a, b, c) for a, b, c in arrays.pop("curve").tolist()]
        self.arrays = arrays

    def actor(self) -> dict[str, np.ndarray]:
        """Return the policy network's weights, named 0.weight to 4.bias as in a Sequential."""
        parts = [(layer, own, part) for layer, own in ACTOR.items() for part in ("weight", "bias")]
        return {
            f"{layer}.{part}": self.arrays[f"policy.{own}.{part}"] for layer, own, part in parts
        }

    def observation_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (O,) of the observations met."""
        return self.arrays["observations.mean"], np.sqrt(self.arrays["observations.var"] + EPSILON)


def _arrays_of(ppo: Any) -> dict[str, np.ndarray]:
    """Return copies of the weights, the optimiser's state and the running statistics."""
    out = {
        f"policy.{name}": value.numpy().copy() for name, value in ppo.policy.state_dict().items()
    }
    for number, state in ppo.policy.optimizer.state_dict()["state"].items():
        out |= {f"adam.{number}.{name}": state[name].numpy().copy() for name in ADAM}
    for name, (own, part) in STATISTICS.items():
        out[name] = np.array(getattr(getattr(ppo.env, own), part), np.float64)
    return out


def _restore(ppo: Any, arrays: dict[str, np.ndarray]) -> None:
    """Put back what `_arrays_of` gave. Raises KeyError when something is missing."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].copy())

    ppo.policy.load_state_dict({name: tensor(f"policy.{name}") for name in ppo.policy.state_dict()})
    optimizer = ppo.policy.optimizer
    state_dict = optimizer.state_dict()
    numbers = state_dict["param_groups"][0]["params"]
    state_dict["state"] = {i: {name: tensor(f"adam.{i}.{name}") for name in ADAM} for i in numbers}
    for state in state_dict["state"].values():
        state["step"] = state["step"].reshape(())
    optimizer.load_state_dict(state_dict)
    for name, (own, part) in STATISTICS.items():
        statistics = getattr(ppo.env, own)
        setattr(
            statistics,
            part,
            arrays[name].reshape(np.shape(getattr(statistics, part))).copy(),
        )


@contextmanager
def _library_state_kept() -> Iterator[None]:
    """Run the library on one thread, and leave the process's own random states alone."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads(threads)
