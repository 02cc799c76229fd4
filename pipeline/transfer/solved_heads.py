"""Heads on frozen features as the convex problem that they are: solved, not trained by steps.

The mean loss of all rows plus an L2 penalty on the weights is minimised by L-BFGS, for a list of
penalties from the strongest to the weakest. No learning rate, batch or order enters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.core.batch import Batch
from pipeline.core.contracts import Objective
from pipeline.core.metrics.catalog import metric

DOUBLE_VALUES = 2**27
"""Features of up to so many values (1 GiB) are solved in float64, larger ones in float32."""
MAX_ITERATIONS = 500
TOLERANCE = 1e-7
"""Of the gradient's largest value, in float64: weights are then right to four digits and more."""


@dataclass(frozen=True)
class Solution:
    """The head of one penalty."""

    penalty: float
    head: Objective
    iterations: int
    metrics: dict[str, float]
    """Validation metrics."""


def solve(
    head: Objective,
    features: Tensor,
    tensors: dict[str, Tensor],
    penalties: Sequence[float],
    validate: Callable[[Objective], dict[str, float]],
    alive: Callable[[], None],
) -> list[Solution]:
    """Solve a head for every penalty, from the strongest to the weakest.

    Args:
        head: An objective with a head on pooled features (`CachedHead`), whose weights are the
            start of the first penalty; each solution is the start of the next.
        features: (n, D) pooled features.
        tensors: The rows' other tensors.
        penalties: Factors of half the weights' squared length, beside the mean loss. Biases are
            not penalised. A penalty is 1 / (C n) in scikit-learn's terms.
        validate: Gives the validation metrics of a head.
        alive: Called at every evaluation of the loss.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    kind = torch.float64 if features.numel() <= DOUBLE_VALUES else torch.float32
    own = copy.deepcopy(head).to(features.device, kind).train()
    rows = Batch(np.zeros(len(features), dtype=np.int64), torch.zeros(0), tensors)
    inputs, found = features.to(kind), []
    for penalty in sorted(penalties, reverse=True):
        iterations = _minimise(own, inputs, rows, penalty, alive)
        solved = copy.deepcopy(head).to(features.device)
        solved.load_state_dict({name: t.float() for name, t in own.state_dict().items()})
        found.append(Solution(penalty, solved, iterations, validate(solved)))
    return found


def _minimise(
    head: Any, inputs: Tensor, rows: Batch, penalty: float, alive: Callable[[], None]
) -> int:
    """Minimise in place; returns the number of iterations."""
    parameters = list(head.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        alive()
        optimizer.zero_grad()
        total, count, _ = head.head_loss(inputs, rows)
        squares = sum(p.square().sum() for p in parameters if p.dim() > 1)
        loss = total.to(inputs.dtype) / count + penalty / 2 * squares
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the head is {loss.item()} at penalty {penalty:g}"
            )
        loss.backward()
        return loss

    optimizer.step(closure)
    return int(optimizer.state[parameters[0]]["n_iter"])


def best(solutions: Sequence[Solution], primary: str) -> Solution:
    """Return the solution with the best primary metric; of equals, that with the lowest loss, then
    the strongest penalty.
    """
    sign = -1.0 if metric(primary).higher_is_better else 1.0

    def order(solution: Solution) -> tuple[float, float]:
        value = solution.metrics[primary]
        loss = solution.metrics.get("loss", 0.0)
        return (float("inf") if np.isnan(value) else sign * value, loss)

    return min(solutions, key=order)
