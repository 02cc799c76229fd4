"""Heads on frozen features as the convex problem that they are: solved, not trained by steps.

The mean loss of all rows plus an L2 penalty on the weights is minimised by L-BFGS, for a list of
penalties from the strongest to the weakest. Where the loss is quadratic in the weights (squared
error, so ridge regression) a linear system gives the minimum. No learning rate, batch or order
enters. Labels of a set are problems of their own: a penalty is what each of them has alone, however
many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pipeline.core.batch import Batch
from pipeline.core.contracts import Objective
from pipeline.core.contracts.objective_capabilities import has_classes
from pipeline.core.metrics.catalog import metric

DOUBLE_VALUES = 2**27
"""Features of up to so many values (1 GiB) are solved in float64, larger ones in float32."""
MAX_ITERATIONS = 500
TOLERANCE = 1e-7
"""Of the gradient's largest value, in float64: weights are then right to four digits and more."""
MOST_WEIGHTS = 4096
"""Heads of up to so many weights are tried for a closed form; their matrix takes 128 MiB."""


@dataclass(frozen=True)
class Solution:
    """The head of one penalty."""

    penalty: float
    head: Objective
    iterations: int
    """1 for a closed form."""
    metrics: dict[str, float]
    """Validation metrics."""
    solver: str = "lbfgs"
    """lbfgs, or ridge: the closed form of a squared error."""


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
    quadratic = _quadratic(own, inputs, rows, alive)
    for penalty in sorted(penalties, reverse=True):
        if quadratic:
            quadratic.minimise(own, penalty)
            iterations = 1
        else:
            iterations = _minimise(own, inputs, rows, penalty, alive)
        solved = copy.deepcopy(head).to(features.device)
        solved.load_state_dict({name: t.float() for name, t in own.state_dict().items()})
        solver = "ridge" if quadratic else "lbfgs"
        found.append(Solution(penalty, solved, iterations, validate(solved), solver))
    return found


@dataclass(frozen=True)
class _Quadratic:
    """A mean loss that is quadratic in the P weights of a head: its gradient is H w + g."""

    matrix: Tensor
    """H (P, P)."""
    offset: Tensor
    """g (P,)."""

    def minimise(self, head: Objective, penalty: float) -> None:
        """Set the weights to the minimum with an L2 penalty, which biases are free of."""
        sizes = [torch.full_like(p, float(p.dim() > 1)) for p in head.parameters()]
        matrix = self.matrix + penalty * torch.diag(parameters_to_vector(sizes))
        vector_to_parameters(torch.linalg.solve(matrix, -self.offset), head.parameters())


def _quadratic(
    head: Any, inputs: Tensor, rows: Batch, alive: Callable[[], None]
) -> _Quadratic | None:
    """Return the mean loss as a quadratic function of the weights; None where it is not one.

    It is one where the gradient is linear, which is tried at three points. The head's weights are
    the same afterwards.
    """
    start = parameters_to_vector(head.parameters()).detach()
    count = len(start)
    if count > MOST_WEIGHTS or inputs.dtype != torch.float64:
        return None

    def gradient(weights: Tensor) -> Tensor:
        alive()
        vector_to_parameters(weights, head.parameters())
        total, number, _ = head.head_loss(inputs, rows)
        found = torch.autograd.grad(total / number, list(head.parameters()))
        return parameters_to_vector(found).detach()

    generator = torch.Generator().manual_seed(0)
    way = torch.randn(count, generator=generator, dtype=start.dtype).to(start.device)
    offset, once, twice = (gradient(scale * way) for scale in (0.0, 1.0, 2.0))
    bend = (twice - 2 * once + offset).abs().max()
    is_linear = bool(bend <= 1e-9 * once.abs().max())
    found = None
    if is_linear:
        columns = [gradient(one) - offset for one in torch.eye(count).to(start)]
        found = _Quadratic(torch.stack(columns, 1), offset)
    vector_to_parameters(start, head.parameters())
    return found


def _minimise(
    head: Any, inputs: Tensor, rows: Batch, penalty: float, alive: Callable[[], None]
) -> int:
    """Minimise in place; returns the number of iterations."""
    parameters, labels = list(head.parameters()), _labels_a_row(head, rows)
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
        loss = labels * total.to(inputs.dtype) / count + penalty / 2 * squares
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the head is {loss.item()} at penalty {penalty:g}"
            )
        loss.backward()
        return loss

    optimizer.step(closure)
    return int(optimizer.state[parameters[0]]["n_iter"])


def _labels_a_row(head: Any, rows: Batch) -> int:
    """Return over how many independent labels the loss of a row is the mean."""
    if not has_classes(head):
        return 1
    labels = rows[head.class_tensor]
    return labels.shape[1] if labels.dim() > 1 else 1


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
