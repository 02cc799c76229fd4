"""What an action changes, and which action was done, without rewards or a task (forward and inverse
dynamics, Pathak et al. 2017, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.nn import action_heads

STILL = 1e-3
"""Root mean square of a number's change, in deviations of the number itself, below which it counts
as standing still.
"""
ACTS = ("actions", "executed")
"""Tensors of actions. What changes the world is what was executed, where that is told."""
MOST_STEPS = 1e6
"""The deviations of changes are means over all steps so far, and from so many on over about the
last so many.
"""


class DynamicsOptions(Options):
    forward: float = Field(
        1.0,
        ge=0,
        description="weight of telling, from what is known at a step and its action, how the "
        "observation changes by the next; "
        "0: not told",
    )
    inverse: float = Field(
        1.0,
        ge=0,
        description="weight of telling a step's action from the observations up to the next step; "
        "0: not told",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the heads")


@register("objective", "dynamics", options=DynamicsOptions)
class Dynamics(Objective):
    """Two heads of each space on a causal backbone's tokens, for every step that has a next one in
    its row.

    ``forward_heads.<space>``: from token t and action t (as it was executed, where rows tell), the
    change of the observation from t to t + 1, each number in its own changes' deviation (a running
    mean over the training rows, ``changes.<space>``); squared error averaged over the observation's
    numbers. ``inverse_heads.<space>``: from tokens t and t + 1 that action: of numbers the squared
    error averaged over them, of classes the cross entropy. The pass for it is given no actions at
    all: where a backbone reads earlier actions, token t + 1 would hold the answer. Such
    representations keep what can be controlled (Pathak et al. 2017), and serve imitation with few
    demonstrations (Brandfonbrener et al. 2023, "Inverse Dynamics Pretraining Learns Good
    Representations for Multitask Imitation").

    Logged, as means over steps: ``forward_error`` and ``inverse_error``, the squared errors (of
    classes the share that is wrong), beside ``forward_zero`` and ``inverse_zero``, those of telling
    no change and the mean action (of classes those of a guess). Raises ValueError for a backbone
    that is none of policies, and where both weights are 0.
    """

    roles = ("actions",)
    metrics = ("loss",)
    log_names = ("forward_error", "forward_zero", "inverse_error", "inverse_zero")

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError where no row has an action."""
        name = columns["actions"]
        action_heads.kind_of(table[name], name)
        if not action_heads.counts(table[name]).any():
            raise ValueError(f"column {name}: none of {len(table)} training rows has an action")
        return {}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        name = columns.get("actions", "")
        if name not in table.column_names:
            return [""] * len(table)
        return [
            "" if many else f"{name} holds no action" for many in action_heads.counts(table[name])
        ]

    def __init__(self, backbone: Backbone, options: DynamicsOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs, width = backbone.arch["inputs"], backbone.token_dim
        if "spaces" not in inputs or width is None or not backbone.causal:
            raise ValueError(
                f"{backbone.arch['name']} is no policy: dynamics takes a causal backbone of "
                "trajectories, such as policy/transformer"
            )
        if not options.forward and not options.inverse:
            raise ValueError(
                "options forward and inverse of dynamics are both 0: nothing is left to learn"
            )
        self.spaces: dict[str, dict[str, Any]] = inputs["spaces"]
        self.remembers = any(
            name.startswith("action_encoders.") for name, _ in backbone.named_parameters()
        )
        """Whether the backbone reads earlier actions."""
        sizes = {
            name: (space["observation"], space["action"]) for name, space in self.spaces.items()
        }
        if options.forward:
            self.forward_heads = nn.ModuleDict(
                {
                    name: _head(width + action, width, numbers)
                    for name, (numbers, action) in sizes.items()
                }
            )
            self.changes = nn.ModuleDict(
                {name: Deviation(numbers) for name, (numbers, _) in sizes.items()}
            )
        if options.inverse:
            self.inverse_heads = nn.ModuleDict(
                {name: _head(2 * width, width, action) for name, (_, action) in sizes.items()}
            )

    def _tokens(self, backbone: Backbone, batch: Batch) -> Tensor:
        tokens = backbone(batch, want=("tokens",)).tokens
        assert tokens is not None
        return F.dropout(tokens, self.options.dropout, self.training)

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B, T - 1) losses, which steps count, and the logged parts of each step."""
        if "actions" not in batch.data:
            raise ValueError(
                "dynamics tells of actions, and these rows have none: say --column actions=NAME"
            )
        options = self.options
        unseen = Batch(
            batch.rows,
            batch.keys,
            {name: tensor for name, tensor in batch.data.items() if name not in ACTS},
            batch.shards,
        )
        alike = not self.remembers
        blind = self._tokens(backbone, unseen) if options.inverse or alike else None
        seeing = blind if alike else self._tokens(backbone, batch) if options.forward else None
        known = batch["mask"][:, 1:] & batch["mask"][:, :-1]
        parts = {
            name: torch.zeros(known.shape, device=known.device)
            for name in (*self.log_names, "loss")
        }
        for number, (name, space) in enumerate(self.spaces.items()):
            rows = (batch["space"] == number).nonzero()[:, 0]
            if not len(rows):
                continue
            acts = batch.data.get("executed", batch["actions"])[rows, :-1, : space["action"]]
            if space["discrete"]:  # a class that nobody teaches was executed
                known[rows] &= acts.any(-1)
            there = known[rows]
            if seeing is not None and options.forward:
                seen = batch["observations"][rows, :, : space["observation"]]
                change = self.changes[name](seen[:, 1:] - seen[:, :-1], there)
                predicted = self.forward_heads[name](
                    torch.cat([seeing[rows, :-1], acts.to(seeing.dtype)], -1)
                ).float()
                error = (predicted - change).square().mean(-1)
                parts["loss"][rows] = parts["loss"][rows] + options.forward * error
                parts["forward_error"][rows], parts["forward_zero"][rows] = (
                    error.detach(),
                    change.square().mean(-1),
                )
            if blind is not None and options.inverse:
                predicted = self.inverse_heads[name](
                    torch.cat([blind[rows, :-1], blind[rows, 1:]], -1)
                ).float()
                head = "categorical" if space["discrete"] else "mse"
                found = action_heads.losses(head, predicted, acts, 1)
                parts["loss"][rows] = parts["loss"][rows] + options.inverse * found
                wrong = (predicted.argmax(-1) != acts.argmax(-1)).float()
                parts["inverse_error"][rows] = wrong if space["discrete"] else found.detach()
                parts["inverse_zero"][rows] = (
                    torch.full_like(wrong, 1 - 1 / space["action"])
                    if space["discrete"]
                    else acts.square().mean(-1)
                )
        parts = {name: value.masked_fill(~known, 0.0) for name, value in parts.items()}
        return parts.pop("loss"), known, parts

    def loss(self, backbone: Backbone, batch: Batch):
        losses, known, logs = self._rows(backbone, batch)
        total = losses.sum()
        for parameter in (
            *backbone.parameters(),
            *self.parameters(),
        ):  # of spaces that this batch has no row of: DDP waits for every gradient
            total = total + 0.0 * parameter.sum() if parameter.requires_grad else total
        return total, known.sum().float(), {name: value.sum() for name, value in logs.items()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (B,), summed over the steps that have a next one, and ``count`` (B,), how many
        those are.
        """
        losses, known, _ = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": known.sum(1).float()}


class Deviation(nn.Module):
    """Changes (n, T, O) in their root mean square, number by number: in training the mean is first
    brought up to date with those that count (n, T).
    """

    def __init__(self, numbers: int):
        super().__init__()
        self.register_buffer("square", torch.ones(numbers))
        self.register_buffer("steps", torch.zeros(()))
        self.square: Tensor
        self.steps: Tensor

    @torch.no_grad()
    def forward(self, change: Tensor, there: Tensor) -> Tensor:
        change = change.float()
        if self.training and (count := there.sum()) > 0:
            self.steps.copy_((self.steps + count).clamp(max=MOST_STEPS))
            mean = change.square().masked_fill(~there[..., None], 0.0).sum((0, 1)) / count
            self.square.lerp_(mean, (count / self.steps).clamp(max=1.0))
        return change / self.square.sqrt().clamp(min=STILL)


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))
