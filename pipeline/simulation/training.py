"""An expert for the tasks that have no analytic one: trained by PPO (`ppo`) in the world that it is
for, in one process on one core.

`train` gives a `Trained`, which is kept as one safetensors file and acts by numpy alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.core.rng import mix
from pipeline.io import storage
from pipeline.simulation.environment import World, make
from pipeline.simulation.ppo import Bounds, Ppo, Settings, mean_actions, scaled

EXPERT, TRAINING = "onetomany-expert-1", "onetomany-training-1"
"""What the bytes of `Trained`, and of a checkpoint, say they are."""


@dataclass
class TrainedPolicy:
    """A policy that `train` made. Acts without torch and without chance.

    `weights`: name -> float32 array; linear layers as torch names them in a Sequential, 0.weight
    (out, in), 0.bias (out,), with tanh between. `mean`, `std` (O,) float64 of the observations met;
    `low`, `high` (A,) float64, the bounds of actions, which the network calls -1 and 1. `curve` (n,
    3) float64: steps of the world so far, and mean return and mean length of the episodes that
    ended since the entry before (NaN: none). Those had noise in their actions, for exploration, and
    were cut where environments were made anew: `act` does better. `facts`: world (text), others
    (texts), env_steps, seed, settings.
    """

    weights: dict[str, np.ndarray]
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    curve: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bounds = Bounds(self.low, self.high)

    def act(self, env: Any, observation: np.ndarray) -> np.ndarray:
        """The action (A,) float32 in the environment's units for an observation (O,). `env` is not
        looked at; other experts need it.

        Raises ValueError for an observation of another shape than those trained on.
        """
        if np.shape(observation) != self.mean.shape:
            raise ValueError(
                f"this expert was trained on observations of shape {self.mean.shape}, got one "
                f"of {np.shape(observation)}: use it in its "
                f"own world, {self.metadata.get('world')}"
            )
        return self._bounds.units(
            mean_actions(self.weights, scaled(observation, self.mean, self.std))
        )

    def to_bytes(self) -> bytes:
        """One safetensors file."""
        arrays = {f"actor.{name}": value for name, value in self.weights.items()} | {
            name: getattr(self, name) for name in _ARRAYS
        }
        return _save(arrays, EXPERT, self.metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainedPolicy:
        """What `to_bytes` wrote; ValueError for anything else."""
        arrays, metadata = _load(data, EXPERT, "not an expert that `train` made")
        try:
            weights = {
                f"{layer}.{part}": arrays[f"actor.{layer}.{part}"]
                for layer in ("0", "2", "4")
                for part in ("weight", "bias")
            }
            return cls(weights, **{name: arrays[name] for name in _ARRAYS}, metadata=metadata)
        except KeyError as error:
            raise ValueError(
                f"not a whole expert, without {error}: delete its file and train again"
            ) from error


_ARRAYS = ("mean", "std", "low", "high", "curve")


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
    """A policy for `world` with its dynamics, after `env_steps` steps in it (rounded up to whole
    iterations). A line to `progress` at each block.

    `others`, worlds with the same observations and actions, are met in turn with it: an expert of
    one world alone often fails where a mass or a friction differs by a tenth, and one of many
    worlds holds in what lies between them (domain randomisation, Peng et al. 2018).

    The same arguments give the same policy on the same machine; `world.seed` has no part in it, as
    every episode draws another. `checkpoint` is a file's URI, written whole after each block of
    iterations: where it is there, training goes on from it, and a finished one gives its policy at
    once.

    Raises ValueError for env_steps below 1, for a world whose observations or actions are not
    vectors of numbers, for others that have different ones, and for a checkpoint of other
    arguments; `make` raises it for a world that cannot be made.
    """
    if env_steps < 1:
        raise ValueError(
            f"env_steps is {env_steps}: give at least 1, for Hopper-v5 about a million"
        )
    settings = settings or Settings()
    worlds = [world, *others]
    _check_spaces(worlds)
    other_worlds = [replace(each, seed=0).text() for each in worlds]
    metadata = {
        "world": other_worlds[0],
        "others": other_worlds[1:],
        "env_steps": env_steps,
        "seed": seed,
        "settings": asdict(settings),
    }
    ppo = Ppo(
        lambda k: make(replace(worlds[k % len(worlds)], seed=mix(seed, k))),
        -(-env_steps // (settings.environments * settings.horizon)),
        seed,
        settings,
    )
    if checkpoint is not None and storage.exists(checkpoint):
        _restore(ppo, storage.read_bytes(checkpoint), metadata, checkpoint)
        progress(f"{world.id}: training goes on from {ppo.steps} steps, found in {checkpoint}")
    while ppo.iteration < ppo.iterations:
        ppo.block()
        steps, reward, length = ppo.curve[-1]
        progress(
            f"{world.id}: {steps:.0f} of {env_steps} steps, "
            + (
                "no episode ended yet"
                if np.isnan(reward)
                else f"episodes with exploration return {reward:.1f} in {length:.0f} steps"
            )
        )
        if checkpoint is not None:
            storage.write_bytes(checkpoint, _save(ppo.state(), TRAINING, metadata))
    weights = {name: value.copy() for name, value in ppo.network.actor().items()}
    return TrainedPolicy(
        weights,
        ppo.observations.mean.copy(),
        ppo.observations.std,
        ppo.bounds.low,
        ppo.bounds.high,
        np.array(ppo.curve),
        metadata,
    )


def _check_spaces(worlds: list[World]) -> None:
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
                f"{world.id} has other observations or actions than {worlds[0].id}: train an "
                "expert for each"
            )
        first = spaces


def _restore(ppo: Ppo, data: bytes, metadata: dict[str, Any], where: str) -> None:
    arrays, found = _load(data, TRAINING, f"{where} is no training's checkpoint")
    other = [
        f"{name} {found.get(name)!r} there and {metadata[name]!r} here"
        for name in metadata
        if found.get(name) != metadata[name]
    ]
    if other:
        raise ValueError(
            f"{where} is the checkpoint of another training ({'; '.join(other)}): delete it, "
            "or name another file"
        )
    try:
        ppo.restore(arrays)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{where} is not a whole checkpoint ({error}): delete it to train from the start"
        ) from error


def _save(arrays: dict[str, np.ndarray], kind: str, metadata: dict[str, Any]) -> bytes:
    """A safetensors file that says it is of `kind`. One note holds all: several would come in an
    order that changes.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    about = {"kind": kind, "facts": metadata}
    return save(arrays, {"onetomany": json.dumps({**about, "sha256": _checksum(arrays, about)})})


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _load(data: bytes, kind: str, wrong: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of what `_save` wrote; ValueError beginning with `wrong` for anything
    else.
    """
    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get("onetomany", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{wrong} ({error}): delete it and train again") from error
    stated = about.pop("sha256", None)  # files of earlier versions have none
    if stated is not None and stated != _checksum(arrays, about):
        raise ValueError(
            f"{wrong} (it is damaged: its content does not have the SHA-256 that it states): "
            "delete it and train again"
        )
    if about.get("kind") != kind:
        raise ValueError(
            f"{wrong} (its kind is {about.get('kind')}, expected {kind}): delete it and train again"
        )
    return arrays, about["facts"]
