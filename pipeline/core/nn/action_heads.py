"""Actions of trajectories: how columns hold them, and what heads predict of them.

Shapes: B rows, T steps of an episode, A numbers or classes of an action, H actions of a chunk, K
components. Numbers are standardised, classes are one-hot.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_class_name, is_list, is_number
from pipeline.core.ragged import pad, ragged

LOG_STD = (-5.0, 2.0)
"""Bounds of the log standard deviation of a standardised action: below, a few exact demonstrations
would drive the density to infinity.
"""
Kind = Literal["continuous", "discrete"]


# ---------------------------------------------------------------- columns


def kind_of(column: pa.ChunkedArray, name: str) -> Kind:
    """Return ``continuous`` or ``discrete``, as modality trajectory reads a column of actions.

    Continuous: a list of numbers for each step; discrete: a class name (text, integer or boolean).
    Raises ValueError for a column of another type.
    """
    inner = column.type.value_type if is_list(column.type) else pa.null()
    if is_list(inner) and is_number(inner.value_type):
        return "continuous"
    if is_class_name(inner):
        return "discrete"
    raise ValueError(
        f"column {name} holds {column.type}: actions are, a step, a list of numbers "
        "(continuous) or a class name (discrete)"
    )


def class_names(column: pa.ChunkedArray) -> list[str]:
    """Return the class names of all rows as texts, sorted, which is the order of modality
    trajectory.
    """
    flat = pc.cast(pc.list_flatten(column), pa.string())
    return sorted(name for name in flat.unique().to_pylist() if name is not None)


def class_numbers(column: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    """Return (n, T) the place of each action's class in ``names``; -1 behind a row's last action.

    T is the number of actions of the longest row.
    """
    flat = pc.cast(pc.list_flatten(column), pa.string())
    places = pc.index_in(flat, pa.array(names, pa.string()))
    numbers = pc.fill_null(places, -1).to_numpy()
    ends = np.cumsum(num_actions(column))
    rows = np.split(numbers, ends[:-1])[: len(column)]  # of no rows there is one, empty
    return pad(ragged(rows), fill=-1)


def kind_of_training_rows(table: pa.Table, name: str) -> Kind:
    """Return `kind_of`. Raises ValueError where no row has an action."""
    kind = kind_of(table[name], name)
    if not num_actions(table[name]).any():
        raise ValueError(f"column {name}: none of {len(table)} training rows has an action")
    return kind


def missing_reasons(table: pa.Table, columns: dict[str, str]) -> list[str]:
    """Return why each row has no action; empty texts for the others, and without the column."""
    name = columns.get("actions", "")
    if name not in table.column_names:
        return [""] * len(table)
    return ["" if count else f"{name} holds no action" for count in num_actions(table[name])]


def num_actions(column: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) int64 actions of each row; 0 for null."""
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


# ---------------------------------------------------------------- heads and chunks


def temporal_ensemble(plans: list[np.ndarray], rate: float | None) -> np.ndarray:
    """Average the predictions of the current action from the last chunks (n, H, A), oldest first:
    (n, A).

    Weights are exp(-rate i), i = 0 for the oldest, as in ACT's code; without a rate the newest
    chunk counts alone.
    """
    predictions = np.stack([plan[:, len(plans) - 1 - age] for age, plan in enumerate(plans)])
    if rate is None:
        return predictions[-1]
    weights = np.exp(-rate * np.arange(len(predictions)))
    return np.einsum("i,ina->na", weights / weights.sum(), predictions).astype(np.float32)


def action_chunks(actions: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut actions (B, T, A) into (B, T, size, A): at each step its own and the following ones.

    Also returns (B, T, size) bool, true within the row's mask (B, T).
    """
    padded = F.pad(actions, (0, 0, 0, size - 1))
    ahead = padded.unfold(1, size, 1).movedim(-1, 2)
    is_inside = F.pad(mask, (0, size - 1), value=False).unfold(1, size, 1)
    return ahead, is_inside & mask[..., None]


def with_all_gradients(total: Tensor, *modules: nn.Module) -> Tensor:
    """Make every parameter part of a loss's graph, also of spaces that no row of a batch belongs
    to: DDP waits for every gradient.
    """
    for parameter in chain.from_iterable(module.parameters() for module in modules):
        if parameter.requires_grad:
            total = total + 0.0 * parameter.sum()
    return total


def head_of(asked: str, discrete: bool) -> str:
    """Return the head of a space: the option's, or the automatic one for a space of another
    kind.
    """
    if discrete:
        return "categorical"
    return "mse" if asked in ("auto", "categorical") else asked


def output_width(head: str, action: int, components: int) -> int:
    """Return how many numbers a head predicts for one action."""
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
    """Return (..., K) logits, (..., K, A) means and (..., K, A) log standard deviations."""
    logits, both = out[..., :components], out[..., components:]
    shape = (2, components, -1)
    rest = both.unflatten(-1, shape)  # pyright: ignore[reportUnknownMemberType]
    return logits, rest[..., 0, :, :], _bounded(rest[..., 1, :, :])


def _log_densities(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return (..., A) log densities of single numbers."""
    deviations = (x - mean) * torch.exp(-log_std)
    return -0.5 * deviations.square() - log_std - 0.5 * math.log(2 * math.pi)


def losses(head: str, out: Tensor, target: Tensor, components: int, beta: float = 0.0) -> Tensor:
    """Return (...) losses of predictions (..., outputs) for actions (..., A).

    The squared error averaged over an action's numbers for mse, else the negative log-likelihood in
    nats. ``beta`` weights densities by the predicted variance to this power, as a constant
    (beta-NLL, Seitzer et al. 2022): without it, what is predicted badly gets a large variance and
    is not learned further. The variance of a mixture is the geometric mean over numbers and
    components.
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
    negative = -torch.logsumexp(
        shares + _log_densities(target[..., None, :], mean, log_std).sum(-1), -1
    )
    mean_log_std = (shares.exp() * log_std.mean(-1)).sum(-1)
    return negative * torch.exp(2 * beta * mean_log_std.detach())


def pick_space(by_space: dict[int, Tensor], space: Tensor, out: Tensor) -> Tensor:
    """Return ``out`` (B, ...), where a row's ``space`` (B,) is known its tensor (B, ...) instead.

    It computes every space for every row, as a graph of fixed operators must.
    """
    space = space.view(-1, *[1] * (out.dim() - 1))
    for number, of_space in by_space.items():
        out = torch.where(space == number, of_space, out)
    return out


def most_likely_action(head: str, out: Tensor, components: int) -> Tensor:
    """Return (..., A) the action that a policy takes, standardised; for classes their scores."""
    if head == "gaussian":
        return out.chunk(2, -1)[0]
    if head == "mixture":
        logits, mean, _ = _mixture(out, components)
        likeliest = logits.argmax(-1)[..., None, None]
        return mean.take_along_dim(likeliest, -2)[..., 0, :]
    return out
