"""Proximal policy optimisation (PPO, Schulman et al. 2017) on one core: its networks, one iteration
of it, and its whole state.

Small tanh networks for the policy and the value, generalised advantage estimation (Schulman et al.
2016), observations and rewards normalised by running statistics. The details that matter are those
of Huang et al. 2022 ("The 37 implementation details of PPO"): orthogonal start, a standard
deviation free of the state, Adam with a rate that falls to zero. A time limit is no end of the
task: the value of the last observation stands for what would follow (Pardo et al. 2018).

Everything random comes from (seed, iteration), and environments are made anew at each block of
iterations, after which the state may be saved: a training that was stopped there and goes on gives,
bit for bit on the same machine, what it gives without a stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.rng import mix
from pipeline.simulation.rollout import divergence

LAYERS = ("0", "2", "4")
"""Names of the linear layers in torch's Sequential, between which tanh stands."""
FARTHEST = 10.0
"""Normalised observations and rewards are cut at this many standard deviations."""


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of PPO. One iteration is `environments` x `horizon` steps of the world, then
    `epochs` passes over them.
    """

    environments: int = 8
    horizon: int = 256
    epochs: int = 10
    minibatch: int = 64
    width: int = 64
    lr: float = 3e-4
    gamma: float = 0.99
    gae: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    max_grad_norm: float = 0.5
    log_std: float = -0.5
    block: int = 10
    """Iterations between two moments at which the state may be saved; environments are made anew at
    each.
    """


class Network:
    """Policy and value of normalised observations (n, O): the mean of a Gaussian over actions,
    where -1..1 are the bounds, and a value.

    Two perceptrons with two tanh layers, and `log_std` (A,), written out in numpy: at minibatches
    of 64 rows torch would spend most of the time on calling. All parameters are views of one
    float32 `vector`, `parts` names them as torch's Sequential would (actor.0.weight (out, in)).
    """

    def __init__(
        self, observation: int, action: int, width: int, log_std: float, rng: np.random.Generator
    ):
        shapes: dict[str, tuple[int, ...]] = {}
        for net, outputs in (("actor", action), ("critic", 1)):
            for layer, (a, b) in zip(
                LAYERS, ((observation, width), (width, width), (width, outputs)), strict=True
            ):
                shapes |= {f"{net}.{layer}.weight": (b, a), f"{net}.{layer}.bias": (b,)}
        self.shapes = shapes | {"log_std": (action,)}
        self.vector = np.zeros(
            sum(int(np.prod(shape)) for shape in self.shapes.values()), np.float32
        )
        self.parts = self.views(self.vector)
        self.parts["log_std"][:] = log_std
        for name, part in self.parts.items():
            if name.endswith("weight"):
                gain = (
                    2**0.5 if LAYERS[2] not in name else 0.01 if name.startswith("actor") else 1.0
                )
                part[:] = gain * _orthogonal(part.shape, rng)

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Parts of a vector as long as `vector`, by name."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            found[name] = vector[start : start + int(np.prod(shape))].reshape(shape)
            start += int(np.prod(shape))
        return found

    def actor(self) -> dict[str, np.ndarray]:
        """The actor's weights, named 0.weight to 4.bias. Views."""
        return {
            name.removeprefix("actor."): part
            for name, part in self.parts.items()
            if name.startswith("actor.")
        }

    def values(self, observations: np.ndarray) -> np.ndarray:
        """(n,) float32 values of normalised observations (n, O)."""
        return self._forward("critic", observations)[2][:, 0]

    def log_prob(self, mean: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """(n,) log-density of actions (n, A), up to a constant, which a ratio of two loses."""
        log_std = self.parts["log_std"]
        return -(((actions - mean) * np.exp(-log_std)) ** 2 / 2 + log_std).sum(-1)

    def gradient(
        self,
        x: np.ndarray,
        actions: np.ndarray,
        before: np.ndarray,
        gains: np.ndarray,
        targets: np.ndarray,
        clip: float,
        value_weight: float,
    ) -> np.ndarray:
        """Of PPO's loss, value_weight (V - target)^2 / 2 - min(r g, clip(r) g), meaned over rows, r
        the ratio of densities to exp(`before`).

        x (n, O), actions (n, A), the others (n,); returns a vector like `vector`.
        """
        found, p, n = np.empty_like(self.vector), self.parts, np.float32(len(x))
        grads = self.views(found)
        first, second, mean = self._forward("actor", x)
        scale = np.exp(-p["log_std"])
        z = (actions - mean) * scale
        ratio = np.exp(-(z * z / 2 + p["log_std"]).sum(-1) - before)
        free = np.where(
            gains > 0, ratio <= 1 + clip, ratio >= 1 - clip
        )  # elsewhere the clipped term, a constant, is the lesser
        push = (-(ratio * gains * free) / n)[:, None]
        grads["log_std"][:] = (push * (z * z - 1)).sum(0)
        self._backward("actor", grads, x, first, second, push * z * scale)
        first, second, value = self._forward("critic", x)
        self._backward(
            "critic",
            grads,
            x,
            first,
            second,
            (value - targets[:, None]) * (np.float32(value_weight) / n),
        )
        return found

    def _forward(self, net: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        p = self.parts
        first = np.tanh(x @ p[f"{net}.0.weight"].T + p[f"{net}.0.bias"])
        second = np.tanh(first @ p[f"{net}.2.weight"].T + p[f"{net}.2.bias"])
        return first, second, second @ p[f"{net}.4.weight"].T + p[f"{net}.4.bias"]

    def _backward(
        self,
        net: str,
        grads: dict[str, np.ndarray],
        x: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        out: np.ndarray,
    ) -> None:
        for layer, inputs in zip(reversed(LAYERS), (second, first, x), strict=True):
            np.matmul(out.T, inputs, out=grads[f"{net}.{layer}.weight"])
            grads[f"{net}.{layer}.bias"][:] = out.sum(0)
            if inputs is not x:
                out = (out @ self.parts[f"{net}.{layer}.weight"]) * (1 - inputs * inputs)


def _orthogonal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A matrix with orthonormal rows, or columns where there are fewer of those (Saxe et al.
    2014).
    """
    rows, columns = shape
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q = q * np.sign(np.diag(r))
    return q if rows >= columns else q.T


class Adam:
    """Adam (Kingma and Ba 2015) on one float32 vector, which `step` changes in place."""

    def __init__(self, size: int):
        self.first, self.second, self.count = (
            np.zeros(size, np.float32),
            np.zeros(size, np.float32),
            np.zeros(1, np.int64),
        )

    def step(self, vector: np.ndarray, gradient: np.ndarray, lr: float) -> None:
        """One step down the gradient, like `vector`."""
        self.count += 1
        count = int(self.count[0])
        self.first += (gradient - self.first) * np.float32(0.1)
        self.second += (gradient * gradient - self.second) * np.float32(0.001)
        size = np.float32(lr / (1 - 0.9**count))
        vector -= (
            size
            * self.first
            / (np.sqrt(self.second * np.float32(1 / (1 - 0.999**count))) + np.float32(1e-5))
        )


def mean_actions(weights: dict[str, np.ndarray], observations: np.ndarray) -> np.ndarray:
    """The actor's output (..., A) float32 for normalised observations (..., O), in numpy.
    `weights`: the actor's, named 0.weight to 4.bias.
    """
    x = observations.astype(np.float32)
    for layer in ("0", "2"):
        x = np.tanh(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return x @ weights["4.weight"].T + weights["4.bias"]


def scaled(observations: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Observations (..., O) in standard deviations from the mean, cut at `FARTHEST`, float32."""
    return np.clip((observations - mean) / std, -FARTHEST, FARTHEST).astype(np.float32)


class Bounds:
    """What the environment's actions may be, `low` and `high` (A,) float64. The network's -1..1 is
    low..high; where one is missing, its units are kept.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray):
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        both = np.isfinite(self.low) & np.isfinite(self.high)
        low, high = np.where(both, self.low, -1.0), np.where(both, self.high, 1.0)
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def units(self, actions: np.ndarray) -> np.ndarray:
        """The network's actions (..., A) in the environment's units, cut at the bounds, float32."""
        return np.clip(self._middle + self._half * actions, self.low, self.high).astype(np.float32)


class Running:
    """Mean and variance (width,) of all rows seen, merged batch by batch (Chan, Golub and LeVeque
    1983), in float64; 0 and 1 at the start.
    """

    def __init__(self, width: int):
        self.mean, self.var, self.count = np.zeros(width), np.ones(width), np.zeros(1)

    def add(self, rows: np.ndarray) -> None:
        """Take in rows (n, width)."""
        n, mean, var = len(rows), rows.mean(0, dtype=np.float64), rows.var(0, dtype=np.float64)
        total, delta = self.count + n, mean - self.mean
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.mean, self.count = self.mean + delta * n / total, total

    @property
    def std(self) -> np.ndarray:
        """(width,) standard deviations; 1 for a column that has not changed."""
        return np.where(self.var > 1e-12, np.sqrt(self.var), 1.0)


@dataclass
class Batch:
    """What one iteration met; T = horizon, N = environments."""

    raw: np.ndarray
    """(T + 1, N, O) float64, the observation before each step, and after the last."""
    actions: np.ndarray
    """(T, N, A) float32, of the network: not cut at the bounds."""
    rewards: np.ndarray
    """(T, N) float64, as the environment gave them."""
    terminated: np.ndarray
    """(T, N) bool: nothing follows."""
    ended: np.ndarray
    """(T, N) bool: terminated or out of time."""
    last: dict[tuple[int, int], np.ndarray]
    """(t, n) -> observation (O,) where time ran out: `raw` has the next episode's first in its
    place.
    """


def advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    following: np.ndarray,
    ended: np.ndarray,
    gamma: float,
    gae: float,
) -> np.ndarray:
    """Generalised advantage estimates (T, N) of rewards and values (T, N); `following` (T, N) is
    the value of what comes after each step (0 after a termination), and nothing is carried back
    over an end.
    """
    found, carried = np.zeros_like(values), np.zeros(values.shape[1])
    for t in reversed(range(len(values))):
        carried = rewards[t] + gamma * following[t] - values[t] + gamma * gae * ~ended[t] * carried
        found[t] = carried
    return found


class Ppo:
    """A training: network, optimiser, statistics and the number of iterations done, of
    `iterations`.

    `make(k)` gives the k-th environment of the training, fresh: a gymnasium one with vectors as
    observations (O,) and as continuous actions (A,). A block takes the next `environments` numbers.
    """

    def __init__(self, make: Callable[[int], Any], iterations: int, seed: int, settings: Settings):
        self.make, self.iterations, self.seed, self.settings = make, iterations, seed, settings
        env = make(0)
        self.bounds = Bounds(env.action_space.low, env.action_space.high)
        observation, action = env.observation_space.shape[0], env.action_space.shape[0]
        env.close()
        self.iteration = 0
        self.network = Network(
            observation, action, settings.width, settings.log_std, np.random.default_rng(mix(seed))
        )
        self.adam = Adam(len(self.network.vector))
        self.observations, self.returns = Running(observation), Running(1)
        self.curve: list[tuple[float, float, float]] = []
        """Per block: steps so far, mean return and mean length of the episodes that ended in it
        (none ended: NaN).
        """

    @property
    def steps(self) -> int:
        """Steps of the world so far."""
        return self.iteration * self.settings.environments * self.settings.horizon

    def block(self) -> None:
        """Run iterations up to the next multiple of `settings.block`, or to the last, in fresh
        environments.
        """
        runner = _Runner(self)
        try:
            while True:
                rng = np.random.default_rng(mix(self.seed, self.iteration))
                self._learn(runner.run(rng), rng)
                self.iteration += 1
                if self.iteration % self.settings.block == 0 or self.iteration >= self.iterations:
                    break
        finally:
            runner.close()
        reward, length = np.mean(runner.done, axis=0) if runner.done else (np.nan, np.nan)
        self.curve.append((float(self.steps), float(reward), float(length)))

    def state(self) -> dict[str, np.ndarray]:
        """All that a training needs to go on after a block, as arrays; those of the training
        itself, not copies.
        """
        return {name: getattr(owner, part) for name, owner, part in self._kept()} | {
            "iteration": np.array([self.iteration]),
            "curve": np.array(self.curve, np.float64).reshape(-1, 3),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave; KeyError when something is missing."""
        for name, owner, part in self._kept():
            getattr(owner, part)[:] = arrays[name]
        self.iteration, self.curve = (
            int(arrays["iteration"][0]),
            [(a, b, c) for a, b, c in arrays["curve"].tolist()],
        )

    def _kept(self) -> list[tuple[str, Any, str]]:
        owners = {
            "network": (self.network, ("vector",)),
            "adam": (self.adam, ("first", "second", "count")),
            "observations": (self.observations, ("mean", "var", "count")),
            "returns": (self.returns, ("mean", "var", "count")),
        }
        return [
            (f"{name}.{part}", owner, part)
            for name, (owner, parts) in owners.items()
            for part in parts
        ]

    def _learn(self, batch: Batch, rng: np.random.Generator) -> None:
        """One iteration's update, from what `_Runner.run` met with the network and the statistics
        as they are; then the latter take it in.
        """
        s, network = self.settings, self.network
        steps, count, width = batch.raw[1:].shape
        seen = self.observations.mean, self.observations.std
        x = scaled(batch.raw, *seen).reshape(-1, width)
        values = network.values(x).astype(np.float64).reshape(steps + 1, count)
        following = np.where(batch.terminated, 0.0, values[1:])
        if batch.last:
            following[tuple(np.transpose(list(batch.last)))] = network.values(
                scaled(np.stack(list(batch.last.values())), *seen)
            )
        rewards = np.clip(batch.rewards / self.returns.std, -FARTHEST, FARTHEST)
        found = advantages(rewards, values[:-1], following, batch.ended, s.gamma, s.gae)
        targets, gains = (
            (part.reshape(-1).astype(np.float32)) for part in (found + values[:-1], found)
        )
        x, actions = x[: steps * count], batch.actions.reshape(steps * count, -1)
        before = network.log_prob(mean_actions(network.actor(), x), actions)
        lr = s.lr * (1 - self.iteration / self.iterations)
        for _ in range(s.epochs):
            order = rng.permutation(steps * count)
            for start in range(0, len(order), s.minibatch):
                rows = order[start : start + s.minibatch]
                gain = gains[rows]
                gain = (gain - gain.mean()) / (gain.std() + np.float32(1e-8))
                gradient = network.gradient(
                    x[rows],
                    actions[rows],
                    before[rows],
                    gain,
                    targets[rows],
                    s.clip,
                    s.value_weight,
                )
                length = float(np.sqrt(gradient @ gradient))
                if length > s.max_grad_norm:
                    gradient *= np.float32(s.max_grad_norm / length)
                self.adam.step(network.vector, gradient, lr)
        self.observations.add(batch.raw[:-1].reshape(-1, width))


class _Runner:
    """Environments stepped side by side with a policy that explores. `done`: (return, length) of
    each episode that ended.
    """

    def __init__(self, ppo: Ppo):
        self.ppo = ppo
        self.done: list[tuple[float, float]] = []
        count = ppo.settings.environments
        begun = ppo.iteration // ppo.settings.block * count
        self.envs: list[Any] = [ppo.make(begun + k) for k in range(count)]
        self.now: np.ndarray | None = None  # (N, O) float64
        self.sums = np.zeros((len(self.envs), 2))
        self.discounted = np.zeros(len(self.envs))

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def run(self, rng: np.random.Generator) -> Batch:
        """`horizon` steps in each environment; the statistics of returns take them in."""
        ppo, s, n = self.ppo, self.ppo.settings, len(self.envs)
        if self.now is None:
            self.now = np.stack([self._fresh(env, rng) for env in self.envs])
        seen = ppo.observations.mean, ppo.observations.std
        weights, std = ppo.network.actor(), np.exp(ppo.network.parts["log_std"])
        noise = rng.standard_normal((s.horizon, n, len(std)), np.float32) * std
        batch = Batch(
            np.empty((s.horizon + 1, *self.now.shape)),
            noise,
            np.zeros((s.horizon, n)),
            np.zeros((s.horizon, n), bool),
            np.zeros((s.horizon, n), bool),
            {},
        )
        discounted = np.empty((s.horizon, n))
        for t in range(s.horizon):
            batch.raw[t] = self.now
            batch.actions[t] += mean_actions(weights, scaled(self.now, *seen))
            sent = ppo.bounds.units(batch.actions[t])
            for k, env in enumerate(self.envs):
                self._step(batch, t, k, env, sent[k], rng)
            self.discounted = self.discounted * s.gamma + batch.rewards[t]
            discounted[t] = self.discounted
            self.discounted[batch.ended[t]] = 0
        batch.raw[-1] = self.now
        ppo.returns.add(discounted.reshape(-1, 1))
        return batch

    def _step(
        self, batch: Batch, t: int, k: int, env: Any, action: np.ndarray, rng: np.random.Generator
    ) -> None:
        observation, reward, terminated, truncated, _ = env.step(action)
        if divergence(env, observation, reward):  # as bad as an end without a reward
            reward, terminated = 0.0, True
        assert self.now is not None
        batch.rewards[t, k], batch.terminated[t, k], batch.ended[t, k] = (
            reward,
            terminated,
            terminated or truncated,
        )
        self.sums[k] += reward, 1
        if terminated or truncated:
            if not terminated:
                batch.last[t, k] = np.asarray(observation, np.float64)
            self.done.append((float(self.sums[k, 0]), float(self.sums[k, 1])))
            self.sums[k] = 0
            observation = self._fresh(env, rng)
        self.now[k] = observation

    @staticmethod
    def _fresh(env: Any, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(env.reset(seed=int(rng.integers(2**31)))[0], np.float64)
