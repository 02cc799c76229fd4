"""Forward and inverse dynamics of trajectories, without rewards or a task.

Forward: what an action changes; inverse: which action was done (Pathak et al. 2017, section 2.2).
Shapes: B rows, T steps, O numbers of an observation, A numbers or classes of an action.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.inputs import SpaceInputs
from pipeline.core.nn import action_heads, all_gather
from pipeline.core.specs import State

STILL = 1e-3
"""Root mean square of a number's change, in its standard deviations, below which it is constant."""
ACTION_TENSORS = ("actions", "executed")
"""Tensors of actions. What changes the world is what was executed, where rows have that."""
MAX_STEPS = 1e6
"""Deviations of changes are means over all steps so far, and later over about the last so many."""


class DynamicsOptions(Options):
    forward: float = Field(
        1.0,
        ge=0,
        description="weight of predicting, from a step's token and action, how the observation "
        "changes by the next step; 0: not predicted",
    )
    inverse: float = Field(
        1.0,
        ge=0,
        description="weight of predicting a step's action from the observations up to the next "
        "step; 0: not predicted",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the heads")


@register("objective", "dynamics", options=DynamicsOptions)
class Dynamics(Objective):
    """Forward and inverse dynamics: predict the next observation, and the action between two steps.

    It needs episodes with actions, not rewards or an expert, and a ``policy/...`` backbone. Use
    it to pretrain on random or mixed behaviour of a robot.

    Each space has two heads on a causal backbone's tokens, for every step that has a next one.

    ``forward_heads.<space>`` predicts the change of the observation from t to t + 1, from token t
    and action t (as it was executed, where rows have that). Each number's change is divided by
    the deviation of its changes, a running mean over the rows of earlier training steps
    (``changes.<space>``). The loss is the squared error, averaged over the observation's numbers.

    ``inverse_heads.<space>`` predicts that action from tokens t and t + 1. The loss is the squared
    error averaged over the action's numbers, or the cross entropy of its classes. The backbone
    gets no actions in this pass: where it reads earlier ones, token t + 1 would hold the answer.

    Such representations keep what can be controlled (Pathak et al. 2017), and serve imitation
    with few demonstrations (Brandfonbrener et al. 2023, "Inverse Dynamics Pretraining Learns Good
    Representations for Multitask Imitation").

    Logged, as means over steps: ``forward_error`` and ``inverse_error``, the squared errors (of
    classes the share that is wrong), beside ``forward_zero`` and ``inverse_zero``, those of
    predicting no change and the mean action (of classes those of a guess).
    """

    roles = ("actions",)
    metrics = ("loss",)
    log_names = ("forward_error", "forward_zero", "inverse_error", "inverse_zero")

    @classmethod
    def fit(cls, options, table, columns):
        """Raise ValueError where no row has an action; there is no state."""
        action_heads.kind_of_training_rows(table, columns["actions"])
        return {}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Name rows without an action."""
        return action_heads.missing_reasons(table, columns)

    def __init__(self, backbone: Backbone, options: DynamicsOptions, state: State):
        """Raise ValueError for a backbone that is not a policy, and where both weights are 0."""
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        width = backbone.token_dim
        if "spaces" not in inputs or width is None or not backbone.causal:
            raise ValueError(
                f"{backbone.arch.name} is not a policy: dynamics takes a causal backbone of "
                "trajectories, such as policy/transformer"
            )
        if not options.forward and not options.inverse:
            raise ValueError(
                "options forward and inverse of dynamics are both 0: nothing is left to learn"
            )
        self.spaces: dict[str, SpaceInputs] = inputs["spaces"]
        names = [name for name, _ in backbone.named_parameters()]
        self.reads_actions = any(name.startswith("action_encoders.") for name in names)
        """Whether the backbone reads earlier actions."""
        if options.forward:
            self.forward_heads = nn.ModuleDict()
            self.changes = nn.ModuleDict()
            for name, space in self.spaces.items():
                numbers = space["observation"]
                self.forward_heads[name] = _head(width + space["action"], width, numbers)
            for name, space in self.spaces.items():
                self.changes[name] = RunningScale(space["observation"])
        if options.inverse:
            self.inverse_heads = nn.ModuleDict()
            for name, space in self.spaces.items():
                self.inverse_heads[name] = _head(2 * width, width, space["action"])

    def _tokens(self, backbone: Backbone, batch: Batch) -> Tensor:
        tokens = backbone(batch, want=("tokens",)).tokens
        assert tokens is not None
        return F.dropout(tokens, self.options.dropout, self.training)

    def _both_tokens(self, backbone: Backbone, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return the tokens of passes with and without actions, each where it is needed."""
        options = self.options
        kept = {name: t for name, t in batch.data.items() if name not in ACTION_TENSORS}
        without_actions = Batch(batch.rows, batch.keys, kept, batch.shards)
        if not self.reads_actions:  # one pass serves both
            tokens = self._tokens(backbone, without_actions)
            return tokens, tokens
        blind = self._tokens(backbone, without_actions) if options.inverse else None
        seeing = self._tokens(backbone, batch) if options.forward else None
        return seeing, blind

    def _forward_parts(
        self, name: str, tokens: Tensor, observations: Tensor, acts: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (n, T - 1) squared errors of the predicted change, and of predicting none."""
        difference = observations[:, 1:] - observations[:, :-1]
        change = self.changes[name](difference, counted)
        inputs = torch.cat([tokens[:, :-1], acts.to(tokens.dtype)], -1)
        predicted = self.forward_heads[name](inputs).float()
        error = (predicted - change).square().mean(-1)
        zero_error = change.square().mean(-1)
        return error, zero_error

    def _inverse_parts(
        self, name: str, tokens: Tensor, acts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (n, T - 1) losses of the predicted action, its errors and those of a guess."""
        space = self.spaces[name]
        inputs = torch.cat([tokens[:, :-1], tokens[:, 1:]], -1)
        predicted = self.inverse_heads[name](inputs).float()
        if not space["discrete"]:
            losses = action_heads.losses("mse", predicted, acts, 1)
            return losses, losses.detach(), acts.square().mean(-1)
        losses = action_heads.losses("categorical", predicted, acts, 1)
        wrong = (predicted.argmax(-1) != acts.argmax(-1)).float()
        return losses, wrong, torch.full_like(wrong, 1 - 1 / space["action"])

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (B, T - 1) losses, which steps count, and the logged parts of each step."""
        if "actions" not in batch.data:
            raise ValueError(
                "dynamics predicts actions, and these rows have none: give --column actions=NAME"
            )
        options = self.options
        seeing, blind = self._both_tokens(backbone, batch)
        counted = batch["mask"][:, 1:] & batch["mask"][:, :-1]
        names = (*self.log_names, "loss")
        parts = {name: torch.zeros(counted.shape, device=counted.device) for name in names}
        for number, (name, space) in enumerate(self.spaces.items()):
            rows = (batch["space"] == number).nonzero()[:, 0]
            if not len(rows):
                continue
            executed = batch.data.get("executed", batch["actions"])
            acts = executed[rows, :-1, : space["action"]]
            if space["discrete"]:  # a class that no training row has was executed
                counted[rows] &= acts.any(-1)
            loss = parts["loss"][rows]
            if seeing is not None and options.forward:
                seen = batch["observations"][rows, :, : space["observation"]]
                error, zero = self._forward_parts(name, seeing[rows], seen, acts, counted[rows])
                loss = loss + options.forward * error
                parts["forward_error"][rows] = error.detach()
                parts["forward_zero"][rows] = zero
            if blind is not None and options.inverse:
                losses, error, zero = self._inverse_parts(name, blind[rows], acts)
                loss = loss + options.inverse * losses
                parts["inverse_error"][rows] = error
                parts["inverse_zero"][rows] = zero
            parts["loss"][rows] = loss
        parts = {name: value.masked_fill(~counted, 0.0) for name, value in parts.items()}
        return parts.pop("loss"), counted, parts

    def loss(self, backbone: Backbone, batch: Batch):
        losses, counted, logs = self._rows(backbone, batch)
        total = action_heads.with_all_gradients(losses.sum(), backbone, self)
        logs = {name: value.sum() for name, value in logs.items()}
        return total, counted.sum().float(), logs

    def after_step(self, backbone: Backbone, step: int, steps: int) -> None:
        """Update the deviations of changes with the rows of all ranks."""
        if self.options.forward:
            for scale in self.changes.values():
                assert isinstance(scale, RunningScale)
                scale.update()

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, summed over the steps that have a next one, and their ``count``."""
        losses, counted, _ = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": counted.sum(1).float()}


class RunningScale(nn.Module):
    """Divides changes by their root mean square, number by number, over earlier training steps.

    The rows of a training step count from the next step on. The loss of a step is then the same for
    any number of ranks and micro-batches. The first step is not scaled.
    """

    def __init__(self, numbers: int):
        super().__init__()
        self.register_buffer("square", torch.ones(numbers))
        self.register_buffer("steps", torch.zeros(()))
        self.square: Tensor
        self.steps: Tensor
        self.seen: Tensor | None = None
        """(O + 1,) this rank's sums of squares since the last `update`, and over how many steps."""

    @torch.no_grad()
    def forward(self, change: Tensor, counted: Tensor) -> Tensor:
        """Return the scaled changes; in training they are also noted for `update`.

        Args:
            change: (n, T, O).
            counted: (n, T) which steps the scale is updated with.
        """
        change = change.float()
        if self.training:
            squares = change.square().masked_fill(~counted[..., None], 0.0).sum((0, 1))
            seen = torch.cat([squares, counted.sum().float()[None]])
            self.seen = seen if self.seen is None else self.seen + seen
        return change / self.square.sqrt().clamp(min=STILL)

    @torch.no_grad()
    def update(self) -> None:
        """Update the scale with what all ranks saw since the last call. Every rank must call it."""
        seen = self.square.new_zeros(len(self.square) + 1) if self.seen is None else self.seen
        self.seen = None
        seen = all_gather.all_reduce_sum(seen)
        squares, count = seen[:-1], seen[-1]
        self.steps.copy_((self.steps + count).clamp(max=MAX_STEPS))
        share = count / self.steps.clamp(min=1)
        self.square.lerp_(squares / count.clamp(min=1), share.clamp(max=1))


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))
