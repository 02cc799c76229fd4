"""A policy that was trained by PPO, which acts by numpy alone, and its file.

Checkpoints of a training are files of the same form (`save_arrays`, `load_arrays`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

EXPERT, TRAINING = "onetomany-expert-1", "onetomany-training-2"
"""The kinds of files: a `TrainedPolicy`, and a checkpoint of its training."""
MAX_DEVIATIONS = 10.0
"""Normalised observations and rewards are clipped at this many standard deviations."""


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of PPO.

    One iteration takes `environments` x `horizon` steps in the world, then makes `epochs` passes
    over them. The state may be saved after every `block` iterations.
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
    value_weight: float = 0.25
    max_grad_norm: float = 0.5
    log_std: float = -0.5
    block: int = 10

    @property
    def steps(self) -> int:
        """Steps in the world of one iteration."""
        return self.environments * self.horizon


class Bounds:
    """Scale between the network's actions and the environment's.

    The network's -1 to 1 is `low` to `high` (A,); where one of the two is infinite, the network's
    actions are in the environment's units.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray):
        self.low, self.high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.is_scaled = np.isfinite(self.low) & np.isfinite(self.high)
        low = np.where(self.is_scaled, self.low, -1.0)
        high = np.where(self.is_scaled, self.high, 1.0)
        self._middle, self._half = (low + high) / 2, (high - low) / 2

    def units(self, actions: np.ndarray) -> np.ndarray:
        """Convert the network's actions (..., A) to the environment's units, clipped, float32."""
        return np.clip(self._middle + self._half * actions, self.low, self.high).astype(np.float32)


@dataclass
class TrainedPolicy:
    """A policy that `training.train` made. Acts without torch and without chance.

    Attributes:
        weights: name -> float32 array; linear layers as torch names them in a Sequential,
            0.weight (out, in), 0.bias (out,), with tanh between.
        mean, std: (O,) float64 of the observations met.
        low, high: (A,) float64 bounds of actions, which the network calls -1 and 1.
        curve: (n, 3) float64: steps so far, mean return and mean length of the episodes that ended
            since the entry before (NaN: none). Those explored, and were cut where environments
            were replaced: `act` does better.
        metadata: world (text), others (texts), env_steps, seed, settings.
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
        """Return the action (A,) float32 in the environment's units for an observation (O,).

        `env` is ignored; other experts need it. Raises ValueError for an observation of another
        shape than those trained on.
        """
        if np.shape(observation) != self.mean.shape:
            raise ValueError(
                f"this expert was trained on observations of shape {self.mean.shape}, got one of "
                f"{np.shape(observation)}: use it in its own world, {self.metadata.get('world')}"
            )
        scaled = np.clip((observation - self.mean) / self.std, -MAX_DEVIATIONS, MAX_DEVIATIONS)
        x = scaled.astype(np.float32)
        for layer in ("0", "2"):
            x = np.tanh(x @ self.weights[f"{layer}.weight"].T + self.weights[f"{layer}.bias"])
        return self._bounds.units(x @ self.weights["4.weight"].T + self.weights["4.bias"])

    def to_bytes(self) -> bytes:
        """Return the expert as one safetensors file."""
        arrays = {f"actor.{name}": value for name, value in self.weights.items()}
        return save_arrays(
            arrays | {name: getattr(self, name) for name in _ARRAYS}, EXPERT, self.metadata
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainedPolicy:
        """Read what `to_bytes` wrote. Raises ValueError for anything else."""
        arrays, metadata = load_arrays(data, EXPERT, "not an expert that `train` made")
        try:
            weights = {name: arrays[f"actor.{name}"] for name in _WEIGHTS}
            return cls(weights, **{name: arrays[name] for name in _ARRAYS}, metadata=metadata)
        except KeyError as error:
            raise ValueError(
                f"not a whole expert, without {error}: delete its file and train again"
            ) from error


_ARRAYS = ("mean", "std", "low", "high", "curve")
_WEIGHTS = [f"{layer}.{part}" for layer in ("0", "2", "4") for part in ("weight", "bias")]


def save_arrays(
    arrays: dict[str, np.ndarray],
    kind: str,
    metadata: dict[str, Any],
) -> bytes:
    """Write arrays and metadata as a safetensors file of some `kind`, with a checksum.

    The metadata is one JSON text: several entries would be written in an order that changes.
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


def load_arrays(
    data: bytes,
    kind: str,
    wrong: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and metadata of what `save_arrays` wrote.

    Raises ValueError, beginning with `wrong`, for anything else and for a file of another kind.
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
