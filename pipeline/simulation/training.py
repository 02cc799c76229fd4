"""Train an expert for a task that has no analytic one, by PPO, in one process on one core.

Only training needs stable-baselines3 (extra `robotics`); what is trained acts by numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline.core.rng import mix
from pipeline.io import storage
from pipeline.simulation.environment import NEEDED, World, make
from pipeline.simulation.trained_policy import (
    TRAINING,
    Settings,
    TrainedPolicy,
    load_arrays,
    save_arrays,
)


def train(
    world: World,
    *,
    env_steps: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    checkpoint: str | None = None,
    others: Sequence[World] = (),
    settings: Settings | None = None,
) -> TrainedPolicy:
    """Train a policy for `world` with its dynamics.

    The same arguments give the same policy on the same machine; `world.seed` has no part in it, as
    every episode draws another.

    Args:
        world: where the policy is to act.
        env_steps: steps in the world, rounded up to whole iterations.
        seed: of everything random.
        progress: takes a line at each block of iterations.
        checkpoint: URI of a file that is written whole after each block. Where it is there,
            training goes on from it; a finished one gives its policy at once.
        others: worlds with the same observations and actions, which are met in turn with `world`.
            An expert of one world often fails where a mass or a friction differs by a tenth; one
            of many worlds holds in what lies between them (domain randomisation, Peng et al. 2018).
        settings: hyper-parameters.

    Raises:
        ValueError: env_steps below 1, a world whose observations or actions are not vectors of
            numbers, others that have different ones, a checkpoint of other arguments, a world that
            cannot be made (`make`), or where stable-baselines3 is not installed.
    """
    if env_steps < 1:
        raise ValueError(
            f"env_steps is {env_steps}: give at least 1, for Hopper-v5 about a million"
        )
    settings = settings or Settings()
    worlds = [world, *others]
    low, high = _action_bounds(worlds)
    texts = [replace(each, seed=0).text() for each in worlds]
    metadata = {
        "world": texts[0],
        "others": texts[1:],
        "env_steps": env_steps,
        "seed": seed,
        "settings": asdict(settings),
    }

    def environment(k: int) -> Any:
        return make(replace(worlds[k % len(worlds)], seed=mix(seed, k)))

    try:
        from pipeline.simulation.ppo import Training
    except ModuleNotFoundError as error:
        raise ValueError(f"training an expert: {NEEDED} ({error})") from None
    training = Training(environment, -(-env_steps // settings.steps), seed, settings)
    if checkpoint is not None and storage.exists(checkpoint):
        _restore(training, storage.read_bytes(checkpoint), metadata, checkpoint)
        progress(f"{world.id}: training goes on from {training.steps} steps, found in {checkpoint}")
    while training.iteration < training.iterations:
        training.block()
        steps, reward, length = training.curve[-1]
        outcome = "no episode ended yet"
        if not np.isnan(reward):
            outcome = f"episodes with exploration return {reward:.1f} in {length:.0f} steps"
        progress(f"{world.id}: {steps:.0f} of {env_steps} steps, {outcome}")
        if checkpoint is not None:
            storage.write_bytes(checkpoint, save_arrays(training.state(), TRAINING, metadata))
    mean, std = training.observation_statistics()
    return TrainedPolicy(training.actor(), mean, std, low, high, np.array(training.curve), metadata)


def _action_bounds(worlds: list[World]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest actions (A,); check that all worlds have the same spaces."""
    first: tuple[Any, Any] | None = None
    for world in worlds:
        env = make(world)
        env.close()
        spaces = env.observation_space, env.action_space
        for what, space in zip(("observations", "actions"), spaces, strict=True):
            if len(getattr(space, "shape", None) or ()) != 1 or not hasattr(space, "low"):
                raise ValueError(
                    f"{world.id} has {space} as {what}, and training needs a vector of "
                    "continuous numbers: choose another expert for it"
                )
        if first is not None and spaces != first:
            raise ValueError(
                f"{world.id} has other observations or actions than {worlds[0].id}: "
                "train an expert for each"
            )
        first = spaces
    assert first is not None
    return first[1].low.astype(np.float64), first[1].high.astype(np.float64)


def _restore(training: Any, data: bytes, metadata: dict[str, Any], where: str) -> None:
    arrays, stored = load_arrays(data, TRAINING, f"{where} is not a checkpoint of a training")
    other = [
        f"{name} {stored.get(name)!r} there and {metadata[name]!r} here"
        for name in metadata
        if stored.get(name) != metadata[name]
    ]
    if other:
        raise ValueError(
            f"{where} is the checkpoint of another training ({'; '.join(other)}): "
            "delete it, or name another file"
        )
    try:
        training.restore(arrays)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{where} is not a whole checkpoint ({error}): delete it to train from the start"
        ) from error
