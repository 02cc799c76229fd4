"""Heads on frozen features, solved as convex problems instead of trained by steps.

The mean loss of all rows plus an L2 penalty on the weights is minimised by L-BFGS, for a list of
penalties from the strongest to the weakest. Where the loss is quadratic in the weights (squared
error, so ridge regression) a linear system gives the minimum. There is no learning rate, batch or
order of rows. Where rows have sets of labels, each label is a problem of its own: its penalty does
not depend on how many labels there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
SMOOTHING = 1e-4
"""Its square is added to the squared lengths of a group lasso, which then have gradients at 0."""
MAX_WEIGHTS = 4096
"""Most weights of a head for which a closed form is tried; its matrix then takes 128 MiB."""


@dataclass(frozen=True)
class Solution:
    """The head of one penalty."""

    penalty: float
    head: Objective
    iterations: int
    """1 for a closed form."""
    metrics: dict[str, float]
    """Validation metrics."""
    share: float | None = None
    """Share of the features that were kept; None: all, and none was chosen."""
    solver: str = "lbfgs"
    """lbfgs, or ridge (the closed form of a squared error)."""


def solve(
    head: Objective,
    features: Tensor,
    tensors: dict[str, Tensor],
    penalties: Sequence[float],
    validate: Callable[[Objective], dict[str, float]],
    on_step: Callable[[], None],
    kept: Tensor | None = None,
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
        on_step: Called at every evaluation of the loss.
        kept: (D,) bool, which features may have weights; None: all.

    Returns:
        A solution for each penalty, the strongest first.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    solver_head, inputs, rows = _copy_to_solve(head, features, tensors)
    solutions: list[Solution] = []
    quadratic = None
    if kept is None:
        quadratic = _quadratic(solver_head, inputs, rows, on_step)
    else:
        _zero_weights(solver_head, kept)
    for penalty in sorted(penalties, reverse=True):
        minimum = quadratic.minimum(penalty) if quadratic else None
        if minimum is not None:
            vector_to_parameters(minimum, solver_head.parameters())
            iterations, solver = 1, "ridge"
        else:
            squares = partial(_half_squares, penalty)
            iterations = _minimise(
                solver_head, inputs, rows, squares, on_step, f"penalty {penalty:g}"
            )
            solver = "lbfgs"
        solved = copy.deepcopy(head).to(features.device)
        solved.load_state_dict({name: t.float() for name, t in solver_head.state_dict().items()})
        solutions.append(Solution(penalty, solved, iterations, validate(solved), solver=solver))
    return solutions


def solve_selected(
    head: Objective,
    features: Tensor,
    tensors: dict[str, Tensor],
    selection: tuple[float, tuple[float, ...]],
    penalties: Sequence[float],
    validate: Callable[[Objective], dict[str, float]],
    on_step: Callable[[], None],
) -> list[Solution]:
    """Rank the features, then `solve` the head on each share of the best of them.

    Args:
        selection: Weight of the group lasso, and the shares (`SelectsFeatures`).
    """
    lasso, shares = selection
    lengths = feature_lengths(head, features, tensors, lasso, on_step)
    order = lengths.argsort(descending=True, stable=True)
    solutions: list[Solution] = []
    for share in shares:
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[: max(1, round(share * len(order)))]] = True
        solved = solve(head, features, tensors, penalties, validate, on_step, kept)
        solutions += [replace(solution, share=share) for solution in solved]
    return solutions


def feature_lengths(
    head: Objective,
    features: Tensor,
    tensors: dict[str, Tensor],
    lasso: float,
    on_step: Callable[[], None],
) -> Tensor:
    """Return the (D,) lengths of the weights of each feature, in a head with a group lasso.

    The lasso is ``lasso`` times the sum of the lengths.
    """
    solver_head, inputs, rows = _copy_to_solve(head, features, tensors)
    _zero_weights(solver_head, torch.ones(inputs.shape[1], dtype=torch.bool))

    def lengths() -> Tensor:
        weights = _weights_of_features(solver_head, inputs.shape[1])
        squares = [w.square().flatten(0, -2).sum(0) for w in weights]
        return (torch.stack(squares).sum(0) + SMOOTHING**2).sqrt()

    def group_lasso(parameters: Sequence[Tensor]) -> Tensor:
        return lasso * lengths().sum()

    _minimise(solver_head, inputs, rows, group_lasso, on_step, f"lasso {lasso:g}")
    return lengths().detach()


def _copy_to_solve(
    head: Objective, features: Tensor, tensors: dict[str, Tensor]
) -> tuple[Any, Tensor, Batch]:
    """Return a copy of the head to solve, the features in its precision, and the rows."""
    dtype = torch.float64 if features.numel() <= DOUBLE_VALUES else torch.float32
    solver_head = copy.deepcopy(head).to(features.device, dtype).train()
    rows = Batch(np.zeros(len(features), dtype=np.int64), torch.zeros(0), tensors)
    return solver_head, features.to(dtype), rows


def _weights_of_features(head: Objective, width: int) -> list[Tensor]:
    """Return the weights (..., D) whose last dimension is that of the features."""
    return [p for p in head.parameters() if p.dim() > 1 and p.shape[-1] == width]


def _zero_weights(head: Objective, is_trainable: Tensor) -> None:
    """Set the weights of all features to 0, and hold those of some features at 0.

    Args:
        is_trainable: (D,) bool, true for features whose weights may change.
    """
    with torch.no_grad():
        for weight in _weights_of_features(head, len(is_trainable)):
            weight.zero_()
            weight.register_hook(lambda gradient: gradient * is_trainable.to(gradient))


def _half_squares(penalty: float, parameters: Sequence[Tensor]) -> Tensor:
    """Return half the squared length of the weights, times the penalty. Biases are left out."""
    squares = [p.square().sum() for p in parameters if p.dim() > 1]
    return penalty / 2 * torch.stack(squares).sum()


@dataclass(frozen=True)
class _Quadratic:
    """A mean loss that is quadratic in the P weights of a head: its gradient is H w + g."""

    matrix: Tensor
    """H (P, P)."""
    offset: Tensor
    """g (P,)."""
    is_penalised: Tensor
    """(P,) 1 for weights, and 0 for biases, which are not penalised."""
    gradient: Callable[[Tensor], Tensor]
    """Computes the true gradient (P,) at weights (P,)."""

    def minimum(self, penalty: float) -> Tensor | None:
        """Return the weights (P,) at the minimum with an L2 penalty.

        Returns None where there is no single minimum, or the true gradient is not 0 there: a robust
        loss is quadratic in parts only, and its minimum may lie in another part.
        """
        matrix = self.matrix + penalty * torch.diag(self.is_penalised)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            return None
        weights = torch.cholesky_solve(-self.offset[:, None], factor)[:, 0]
        residual = self.gradient(weights) + penalty * self.is_penalised * weights
        tolerance = TOLERANCE * self.offset.abs().max().clamp(min=1.0)
        return weights if residual.abs().max() <= tolerance else None


def _quadratic(
    head: Any, inputs: Tensor, rows: Batch, on_step: Callable[[], None]
) -> _Quadratic | None:
    """Return the mean loss as a quadratic function of the weights; None where it is not quadratic.

    It is quadratic where the gradient is linear. This is checked at three points of a line: the
    second difference of their gradients must be zero. The head's weights do not change.
    """
    start = parameters_to_vector(head.parameters()).detach()
    count = len(start)
    if count > MAX_WEIGHTS or inputs.dtype != torch.float64:
        return None

    def gradient(weights: Tensor) -> Tensor:
        on_step()
        parameters = list(head.parameters())
        vector_to_parameters(weights, parameters)
        total, number, _ = head.head_loss(inputs, rows)
        # a parameter that the loss does not read has a gradient of zeros
        gradients = torch.autograd.grad(total / number, parameters, materialize_grads=True)
        vector_to_parameters(start, parameters)
        return parameters_to_vector(gradients).detach()

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(count, generator=generator, dtype=start.dtype).to(start.device)
    offset, at_one, at_two = (gradient(scale * direction) for scale in (0.0, 1.0, 2.0))
    second_difference = (at_two - 2 * at_one + offset).abs().max()
    if second_difference > 1e-9 * at_one.abs().max():
        return None
    columns = [gradient(unit_vector) - offset for unit_vector in torch.eye(count).to(start)]
    is_weight = [torch.full_like(p, float(p.dim() > 1)) for p in head.parameters()]
    return _Quadratic(
        torch.stack(columns, 1), offset, parameters_to_vector(is_weight).detach(), gradient
    )


def _minimise(
    head: Any,
    inputs: Tensor,
    rows: Batch,
    regulariser: Callable[[Sequence[Tensor]], Tensor],
    on_step: Callable[[], None],
    setting: str,
) -> int:
    """Minimise the mean loss of a head plus a regulariser, and return the number of iterations.

    Args:
        head: Its parameters are changed.
        regulariser: Computes what is added to the mean loss from the head's parameters.
        setting: Name of the penalty, for errors.
    """
    parameters, labels = list(head.parameters()), _labels_per_row(head, rows)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        on_step()
        optimizer.zero_grad()
        total, count, _ = head.head_loss(inputs, rows)
        loss = labels * total.to(inputs.dtype) / count + regulariser(parameters)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of the head is {loss.item()} at {setting}")
        loss.backward()
        return loss

    optimizer.step(closure)
    return int(optimizer.state[parameters[0]]["n_iter"])


def _labels_per_row(head: Any, rows: Batch) -> int:
    """Return over how many independent labels the loss of a row is the mean."""
    if not has_classes(head):
        return 1
    labels = rows[head.class_tensor]
    return labels.shape[1] if labels.dim() > 1 else 1


def best(solutions: Sequence[Solution], primary: str) -> Solution:
    """Return the solution with the best primary metric.

    Of equal ones it is that with the lowest loss, and then that with the strongest penalty.
    """
    sign = -1.0 if metric(primary).higher_is_better else 1.0

    def order(solution: Solution) -> tuple[float, float]:
        value = solution.metrics[primary]
        loss = solution.metrics.get("loss", 0.0)
        return (float("inf") if np.isnan(value) else sign * value, loss)

    return min(solutions, key=order)
