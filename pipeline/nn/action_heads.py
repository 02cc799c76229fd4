"""Actions of trajectories: how columns hold them, and what heads tell of them.

Shapes: B rows, T steps of an episode, A numbers or classes of an action, H actions of a chunk, K
components. Numbers are standardised, classes are one-hot.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list

LOG_STD = (-5.0, 2.0)
"""Bounds of the logarithm of a standardised action's deviation: below, a few exact demonstrations
would drive the density to infinity.
"""
Kind = Literal["continuous", "discrete"]


# ---------------------------------------------------------------- columns


def kind_of(column: pa.ChunkedArray, name: str) -> Kind:
    """``continuous``: a list of numbers a step; ``discrete``: a class name (text, whole number or
    truth value) a step, as modality trajectory reads them. Raises ValueError for a column of
    another type.
    """
    inner = _value_type(column.type)
    deep = _value_type(inner) if inner is not None else None
    if deep is not None and (pa.types.is_floating(deep) or pa.types.is_integer(deep)):
        return "continuous"
    if inner is not None and any(
        fits(_plain(inner))
        for fits in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_integer,
            pa.types.is_boolean,
        )
    ):
        return "discrete"
    raise ValueError(
        f"column {name} holds {column.type}: actions are, a step, a list of numbers "
        "(continuous) or a class name (discrete)"
    )


def _value_type(kind: pa.DataType) -> pa.DataType | None:
    return kind.value_type if is_list(kind) else None


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def names_of(column: pa.ChunkedArray) -> list[str]:
    """The class names of all rows, as texts, sorted: the order that modality trajectory gives
    them.
    """
    flat = pc.cast(pc.list_flatten(column), pa.string())
    return sorted(name for name in flat.unique().to_pylist() if name is not None)


def counts(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64 actions of each row; 0 for a row that is null."""
    # pyright: ignore
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


# ---------------------------------------------------------------- heads and chunks


def temporal_ensemble(plans: list[np.ndarray], rate: float | None) -> np.ndarray:
    """(n, A) the action of now from the chunks (n, H, A) of the last steps, the oldest first and
    the last one made now: their predictions of it, weighed by exp(-rate i), i = 0 for the oldest,
    as ACT's code has it; without a rate the newest alone.
    """
    said = np.stack([plan[:, len(plans) - 1 - place] for place, plan in enumerate(plans)])
    if rate is None:
        return said[-1]
    weights = np.exp(-rate * np.arange(len(said)))
    return np.einsum("i,ina->na", weights / weights.sum(), said).astype(np.float32)


def chunks(actions: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, T, size, A) of actions (B, T, A): at each step its own and those that follow; (B, T,
    size) which lie within the row's mask (B, T).
    """
    ahead = F.pad(actions, (0, 0, 0, size - 1)).unfold(1, size, 1).movedim(-1, 2)
    there = F.pad(mask, (0, size - 1), value=False).unfold(1, size, 1)
    return ahead, there & mask[..., None]


def head_of(asked: str, discrete: bool) -> str:
    """The head of a space: spaces of the other kind than the option's (those of a source) have the
    automatic one.
    """
    if discrete:
        return "categorical"
    return "mse" if asked in ("auto", "categorical") else asked


def output_width(head: str, action: int, components: int) -> int:
    """Numbers that tell of one action."""
    return {
        "mse": action,
        "gaussian": 2 * action,
        "mixture": components * (1 + 2 * action),
        "categorical": action,
    }[head]


def _bounded(raw: Tensor) -> Tensor:
    low, high = LOG_STD
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1)


def _mixture(out: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """(..., K) logits, (..., K, A) means and (..., K, A) logarithms of deviations."""
    logits, rest = out[..., :components], out[..., components:].unflatten(-1, (2, components, -1))
    return logits, rest[..., 0, :, :], _bounded(rest[..., 1, :, :])


def _log_densities(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(..., A) of each number by itself."""
    return (
        -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)
    )


def losses(head: str, out: Tensor, target: Tensor, components: int, beta: float = 0.0) -> Tensor:
    """(...) losses of what a head tells (..., outputs) of actions (..., A): of mse the squared
    error averaged over an action's numbers, else the negative log-likelihood in nats.

    ``beta``: densities are weighed by the variance that is told, to this power and as a constant
    (beta-NLL, Seitzer et al. 2022): without it what is told badly gets a large variance and is
    learned no more. Of a mixture the variance is the geometric mean over numbers and components.
    """
    if head == "mse":
        return (out - target).square().mean(-1)
    if head == "categorical":
        return -(out.log_softmax(-1) * target).sum(-1)
    if head == "gaussian":
        mean, raw = out.chunk(2, -1)
        log_std = _bounded(raw)
        return -(
            _log_densities(target, mean, log_std) * torch.exp(2 * beta * log_std.detach())
        ).sum(-1)
    logits, mean, log_std = _mixture(out, components)
    shares = logits.log_softmax(-1)
    found = -torch.logsumexp(
        shares + _log_densities(target[..., None, :], mean, log_std).sum(-1), -1
    )
    return found * torch.exp(2 * beta * (shares.exp() * log_std.mean(-1)).sum(-1).detach())


def likeliest(head: str, out: Tensor, components: int) -> Tensor:
    """(..., A) the action that a policy takes, standardised; of classes their scores."""
    if head == "gaussian":
        return out.chunk(2, -1)[0]
    if head == "mixture":
        logits, mean, _ = _mixture(out, components)
        return mean.take_along_dim(logits.argmax(-1)[..., None, None], -2)[..., 0, :]
    return out
