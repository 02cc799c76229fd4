"""Behaviour cloning: a policy that does what the demonstrations do (Pomerleau 1989).

It is tried in the simulator where the rows name their world. Shapes: B rows of a batch, n worlds
or rows of a table, T steps, H actions of a chunk, A numbers or classes of an action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.core.inputs import SpaceInputs
from pipeline.core.nn import action_heads
from pipeline.core.ragged import ragged
from pipeline.media.episodes import SpaceState
from pipeline.simulation.environment import World, check_spaces, make
from pipeline.simulation.rollout import has_success_criterion, rollout

REFERENCE_ROLES = ("return", "success", "steps", "random_return", "random_success", "random_steps")
"""Columns of an episode: what its expert, and a random policy in its place, reached."""
MIN_SHARE = 1e-6
"""Shares of classes are at least this, so that logarithms are finite."""
FRAMES = 6
"""Pictures of an episode, where pictures can be made."""
CHECKED_ROWS = 64
"""Rows whose worlds are looked at to know whether success is defined in them."""
EPISODE_METRICS = ("success", "return", "steps")
"""What an episode is measured by."""


class BehaviourCloningOptions(Options):
    head: Literal["auto", "mse", "gaussian", "mixture", "categorical"] = Field(
        "auto",
        description="how an action is predicted. Numbers: mse, gaussian (mean and deviation) or "
        "mixture of Gaussians (where demonstrations differ); class names: categorical. auto: mse "
        "or categorical",
    )
    components: int = Field(5, ge=2, le=64, description="mixture: how many Gaussians")
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="gaussian, mixture, training only: log densities are weighted by the "
        "predicted variance to this power (beta-NLL, Seitzer et al. 2022; 0.5 there); 0: plain "
        "likelihood, which neglects what is hard to predict",
    )
    chunk: int = Field(
        1,
        ge=1,
        le=1000,
        description="every step predicts this many actions, its own and those that follow (action "
        "chunks of ACT)",
    )
    ensemble: float | None = Field(
        0.01,
        ge=0,
        description="chunks in a rollout: an action is the mean of all its predictions, weighted "
        "by exp(-ensemble i), where i = 0 is the oldest (ACT's m); none: the newest prediction "
        "alone",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the decoders")


class _Losses(NamedTuple):
    """Losses and errors of the rows of one space."""

    losses: Tensor
    """(n, T, H) loss of each action of a chunk."""
    counted: Tensor
    """(n, T, H) which places of chunks count."""
    errors: Tensor
    """(n, T, H) squared errors in an action's own units, averaged over its numbers.

    Of classes 1 where the class is wrong.
    """


class BehaviourCloningState(TypedDict):
    """State of `BehaviourCloning`."""

    kind: action_heads.Kind
    """Kind of the actions: discrete or continuous."""
    columns: list[str]
    """The optional roles that the rows have."""
    labels: NotRequired[list[str]]
    """Names of discrete actions, in the modality's order."""
    judged: NotRequired[bool]
    """Whether success is defined in the rows' worlds, where they have any."""


@register("objective", "behaviour_cloning", options=BehaviourCloningOptions)
class BehaviourCloning(Objective):
    """Behaviour cloning: predict the actions of demonstrations from what is known before them.

    It needs demonstrations (modality ``trajectory``) and a ``policy/...`` backbone. Use it to
    imitate an expert whose actions are recorded; demonstrations of what to do after a mistake
    help, as the policy meets states that the expert never saw (Ross et al. 2011).

    What is predicted: from what is known at step t, the actions t to t + ``chunk`` - 1 (action
    chunks, Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware").
    Each space has a linear decoder (``decoders.<space>``) on the tokens of a causal backbone. Steps
    beyond an episode's end do not count.

    Heads (option ``head``). Actions are standardised numbers or one-hot classes (modality
    trajectory). The loss is summed over the predicted steps.

    - ``mse``: the squared error, averaged over the numbers of an action. The policy is the
      prediction.
    - ``gaussian`` and ``mixture``: the negative log density, in nats, of independent numbers
      (mixture density networks, Bishop 1994). A tanh keeps the logarithm of a deviation
      between -5 and 2. In training the density is weighted (``beta``). The policy is the mean, or
      the mean of the likeliest component.
    - ``categorical``: the cross entropy. The policy is the likeliest class.

    ``auto`` takes mse for numbers. It did best for a deterministic expert; use a likelihood if
    demonstrations differ although observations are alike. Measured on InvertedDoublePendulum-v5: an
    MLP, 100 demonstrations of an LQR expert and 1500 steps, then 5 demonstrations under other
    dynamics and 300 steps. Mean steps of 400 in 20 worlds, one seed, before and after: mse 400 and
    381, gaussian 259 and 382 (18 and 14 with beta 0), mixture 72 and 87 (12 and 12).

    Predictions are of each step's own action.

    - Numbers: ``squared_error`` in their own units, summed over ``action_numbers``. So sources with
      other deviations can be compared, which losses cannot: they are standardised.
    - Classes: ``scores`` (B, T, A), NaN behind a row's end, and ``label`` (B, T), -1 there. Where
      spaces have other classes, a class is its index in its own space. ``squared_error`` is how
      many are wrong.

    If rows have ``environment``, the policy also acts in the simulated world of each test row, with
    the row's seed and dynamics. Success, return and steps are reported, beside those of the expert
    and of a random policy.
    """

    state: BehaviourCloningState
    roles = ("actions",)
    optional_roles = (
        "environment",
        "return",
        "success",
        "steps",
        "random_return",
        "random_success",
        "random_steps",
    )
    raw_roles = optional_roles
    position_labels = ("classes", "numbers")
    position_features = ("tokens",)
    metrics = ("loss", "action_error")
    log_names = ("error",)
    label_fraction_unit = "rows"
    label_kind = "actions"
    label_tensor = "actions"
    action_tensors = ("action_std", "space", "task")
    output_types = {
        "actions": pa.list_(pa.list_(pa.float32())),
        "prediction": pa.list_(pa.string()),
        "probabilities": pa.list_(pa.list_(pa.float32())),
    }

    @classmethod
    def target_metrics(cls, options, state: BehaviourCloningState):
        """Judge numbers by their error in their own units, classes by their F1.

        A source is judged by its loss, which is standardised: of several robots none counts more
        by its units.
        """
        if state["kind"] == "continuous":
            return ("action_error", "loss")
        return ("macro_f1", "accuracy", "loss")

    @classmethod
    def rollout_metrics(cls, options, state: BehaviourCloningState):
        """Return those of the policy's own episodes, the experts' and random ones.

        Success only where it is defined; () without ``environment``.
        """
        columns = state["columns"]
        if "environment" not in columns:
            return ()
        own = EPISODE_METRICS if state.get("judged", True) else EPISODE_METRICS[1:]
        expert = tuple(f"expert_{name}" for name in own if name in columns)
        random = tuple(f"random_{name}" for name in own if f"random_{name}" in columns)
        return (*own, *expert, *random)

    @classmethod
    def fit(cls, options, table, columns) -> BehaviourCloningState:
        """Find out the kind of the actions, their class names and the optional columns.

        Raises:
            ValueError: no row has an action, or the head is for the other kind of actions.
        """
        name = columns["actions"]
        kind = action_heads.kind_of_training_rows(table, name)
        _check_head(options, kind, name)
        given = [role for role in cls.optional_roles if role in columns]
        state: BehaviourCloningState = {"kind": kind, "columns": given}
        environment = columns.get("environment", "")
        success = columns.get("success", "")
        if environment in table.column_names:
            worlds = _worlds(table[environment].drop_null().slice(0, CHECKED_ROWS), environment)
            is_given = success in table.column_names and table[success].null_count < len(table)
            state["judged"] = is_given or all(has_success_criterion(world.id) for world in worlds)
        if kind == "discrete":
            state["labels"] = action_heads.class_names(table[name])
        return state

    @classmethod
    def encode(cls, table, columns, state: BehaviourCloningState) -> Arrays:
        """Return ``graded`` (n,) int64: how many actions each row has; nothing for new rows.

        The actions themselves are the modality's.
        """
        name = columns.get("actions", "")
        if name not in table.column_names:
            return {}
        kind = action_heads.kind_of(table[name], name)
        if kind != state["kind"] and len(table):
            raise ValueError(
                f"column {name} holds {kind} actions, and the training rows hold {state['kind']} "
                "ones"
            )
        if kind == "discrete":
            known = state.get("labels", [])
            new = sorted(set(action_heads.class_names(table[name])) - set(known))
            if new:
                raise ValueError(
                    f"column {name}: action {new[0]!r} is in no training row "
                    f"({len(known)} actions known); {nearest(new[0], known)}"
                )
        return {"graded": action_heads.num_actions(table[name])}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: BehaviourCloningState):
        """Name rows without an action, or without that of some step."""
        name, reasons = columns.get("actions", ""), action_heads.missing_reasons(table, columns)
        if name not in table.column_names or not pc.list_flatten(table[name]).null_count:
            return reasons
        for row, steps in enumerate(table[name].to_pylist()):
            if not reasons[row] and None in steps:
                reasons[row] = f"{name} lacks the action of a step"
        return reasons

    @classmethod
    def check_test(cls, options, table, columns, state: BehaviourCloningState):
        """Read all worlds, and make one of each kind: its environment must be installed.

        Its actions must be of the same kind as those of the rows.
        """
        if "environment" not in state["columns"]:
            return
        name = columns["environment"]
        checked = set()
        for world in _worlds(table[name], name):
            kind = (world.id, world.skill, tuple(sorted(world.dynamics)))
            if kind not in checked:
                checked.add(kind)
                env = make(world)
                env.close()
                check_spaces(env, world.id)
                kind_of_world = "continuous" if env.action_space.shape else "discrete"
                if kind_of_world != state["kind"]:
                    raise ValueError(
                        f"column {name}: {world.id} takes {kind_of_world} actions, and the "
                        f"training rows hold {state['kind']} ones"
                    )

    def __init__(
        self, backbone: Backbone, options: BehaviourCloningOptions, state: BehaviourCloningState
    ):
        """Raise ValueError for a backbone that is no policy, and images in a rollout."""
        super().__init__(backbone, options, state)
        name = backbone.arch.name
        inputs = backbone.arch.inputs
        if "spaces" not in inputs or backbone.token_dim is None or not backbone.causal:
            raise ValueError(
                f"{name} is not a policy: behaviour_cloning takes a causal backbone of "
                "trajectories, such as policy/mlp"
            )
        if inputs.get("images") and "environment" in state["columns"]:
            raise ValueError(
                f"{name} reads images, and a rollout gives observations alone: leave the column "
                "environment out of data.columns, or images out"
            )
        self.spaces: dict[str, SpaceInputs] = inputs["spaces"]
        self.heads = {
            space: action_heads.head_of(options.head, of_space["discrete"])
            for space, of_space in self.spaces.items()
        }
        parameters = [parameter for parameter, _ in backbone.named_parameters()]
        self.reads_actions = any(name.startswith("action_encoders.") for name in parameters)
        """Whether the backbone reads earlier actions."""
        self.decoders = nn.ModuleDict()
        for space, of_space in self.spaces.items():
            outputs = action_heads.output_width(
                self.heads[space], of_space["action"], options.components
            )
            self.decoders[space] = nn.Linear(backbone.token_dim, options.chunk * outputs)
        is_discrete = state["kind"] == "discrete"
        widths = [s["action"] for s in self.spaces.values() if s["discrete"] == is_discrete]
        self.widest = max(widths, default=1)

    def is_transferable(self, options, name):
        """Decoders mean the same where they predict as many actions by a head of one kind."""
        their_options = BehaviourCloningOptions(**options)
        space = self.spaces[name.split(".")[1]]
        head = action_heads.head_of(self.options.head, space["discrete"])
        their_head = action_heads.head_of(their_options.head, space["discrete"])
        if their_options.chunk != self.options.chunk or their_head != head:
            return False
        return head != "mixture" or their_options.components == self.options.components

    @classmethod
    def unseen_inputs(cls, source_inputs, target_inputs):
        known = source_inputs["spaces"]
        new = [name for name in target_inputs["spaces"] if name not in known]
        if not new:
            return ""
        return f"its rows are of space {', '.join(new)}, which no row of the source is of"

    # ---------------------------------------------------------------- tokens to actions

    def decoded(self, tokens: Tensor, space: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Decode tokens (B, T, D) of rows that belong to spaces (B,).

        Returns:
            Of each space that is there its name, its rows (n,), and its decoder's output
            (n, T, H, outputs) float32.
        """
        tokens = F.dropout(tokens, self.options.dropout, self.training)
        decoded = []
        for number, name in enumerate(self.spaces):
            rows = (space == number).nonzero()[:, 0]
            if len(rows):
                output = self.decoders[name](tokens[rows]).float()
                decoded.append((name, rows, output.unflatten(-1, (self.options.chunk, -1))))
        return decoded

    def labelled_positions(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens (m, D) of all steps, their own actions, and (m,) their rows.

        Actions are standardised numbers (m, A), padded to the widest space, or classes (m,). Rows
        are places in the batch.
        """
        tokens, is_step = features.tokens, batch["mask"]
        assert tokens is not None
        actions = batch["actions"][is_step]
        labels = actions.argmax(-1) if self.state["kind"] == "discrete" else actions.float()
        return tokens[is_step].float(), labels, is_step.nonzero()[:, 0]

    def _outputs(self, backbone: Backbone, batch: Batch) -> list[tuple[str, Tensor, Tensor]]:
        tokens = backbone(batch, want=("tokens",)).tokens
        assert tokens is not None
        return self.decoded(tokens, batch["space"])

    def raw_outputs(self, backbone, batch):
        """`actions` (B, T, H, A): at each step the likeliest next H actions, standardised.

        Times `action_std` plus `action_mean` of the row's space they are in the environment's own
        units. Of classes they are scores, one for each of `discrete`. Where there are several
        spaces, the input `space` is the row's place among `spaces`, and each row's actions are
        followed by zeros up to the widest space's.
        """
        tokens = backbone(batch, want=("tokens",)).tokens
        decoded: dict[int, Tensor] = {}
        for number, (name, decoder) in enumerate(self.decoders.items()):
            of_space = self.spaces[name]
            if of_space["discrete"] != (self.state["kind"] == "discrete"):
                continue
            output = decoder(tokens).float().unflatten(-1, (self.options.chunk, -1))
            best = action_heads.most_likely_action(
                self.heads[name], output, self.options.components
            )
            decoded[number] = F.pad(best, (0, self.widest - of_space["action"]))
        if len(self.spaces) == 1:
            return {"actions": decoded[0]}
        zeros = torch.zeros_like(next(iter(decoded.values())))
        return {"actions": action_heads.pick_space(decoded, batch["space"], zeros)}

    def _losses(self, head: str, name: str, output: Tensor, rows: Tensor, batch: Batch) -> _Losses:
        """Return the losses of the rows (n,) of space ``name``, by the output of a head."""
        options = self.options
        acts = batch["actions"][rows]
        std = batch["action_std"][rows]
        acts = acts[..., : self.spaces[name]["action"]]
        target, counted = action_heads.action_chunks(acts, batch["mask"][rows], output.shape[2])
        beta = options.beta if self.training else 0.0
        losses = action_heads.losses(head, output, target, options.components, beta)
        best = action_heads.most_likely_action(head, output, options.components)
        if head == "categorical":
            is_wrong = best.argmax(-1) != target.argmax(-1)
            errors = is_wrong.float()
        else:
            std = std[:, None, None, : best.shape[-1]]
            in_units = (best - target) * std
            errors = in_units.square().mean(-1)
        losses = losses.masked_fill(~counted, 0.0)
        errors = errors.masked_fill(~counted, 0.0)
        return _Losses(losses, counted, errors)

    def loss(self, backbone: Backbone, batch: Batch):
        total = torch.zeros((), device=batch["mask"].device)
        count = torch.zeros_like(total)
        error = torch.zeros_like(total)
        for name, rows, output in self._outputs(backbone, batch):
            of_space = self._losses(self.heads[name], name, output, rows, batch)
            total = total + of_space.losses.sum()
            count = count + of_space.counted.sum()
            error = error + of_space.errors.detach().sum()
        total = action_heads.with_all_gradients(total, backbone, self)
        return total, count, {"error": error}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return what the class describes, with ``space`` and ``task`` (B,) of the batch.

        With actions also ``loss``, a sum over ``count`` actions (B,). For new rows ``action``
        (B, T, A) standardised, NaN behind a row's end.
        """
        has_actions = "actions" in batch.data
        if self.reads_actions and not has_actions and "executed" not in batch.data:
            raise ValueError(
                f"{backbone.arch.name} reads the actions before each step, and these rows have "
                "none: give --column actions=NAME, or executed"
            )
        return self._predictions(batch, self._outputs(backbone, batch), self.heads)

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what ``predict`` does, of the actions (B, T, A) of any model.

        They are standardised numbers, or shares of classes. ``actions`` is NaN behind a row's end.
        ``loss`` is NaN where that of networks is of something else than a step's own action: of a
        density (head gaussian or mixture), or of a chunk.
        """
        mask = ~batch["actions"].isnan().any(-1)
        known = {"mask": mask, "graded": mask.sum(1)}
        batch = Batch(batch.rows, batch.keys, {**batch.data, **known})
        is_discrete = self.state["kind"] == "discrete"
        head = "categorical" if is_discrete else "mse"
        if is_discrete:
            scores = scores.clamp(MIN_SHARE, 1.0).log()
        outputs = []
        for number, name in enumerate(self.spaces):
            rows = (batch["space"] == number).nonzero()[:, 0]
            if len(rows):
                width = self.spaces[name]["action"]
                outputs.append((name, rows, scores[rows][:, :, None, :width].float()))
        heads = dict.fromkeys(self.spaces, head)
        predictions = self._predictions(batch, outputs, heads)
        if self.options.chunk > 1 or any(self.heads[name] != head for name, _, _ in outputs):
            predictions["loss"] = torch.full_like(predictions["loss"], torch.nan)
        return predictions

    def _predictions(
        self, batch: Batch, outputs: list[tuple[str, Tensor, Tensor]], heads: dict[str, str]
    ) -> dict[str, Tensor]:
        """Return the predictions of decoded outputs.

        Args:
            outputs: Of each space its name, its rows and its decoder's output (``decoded``).
            heads: The kind of head of each space.
        """
        mask = batch["mask"]
        has_actions = "actions" in batch.data
        is_discrete = self.state["kind"] == "discrete"
        predictions = {"space": batch["space"], "task": batch["task"]}
        if has_actions:
            for name in ("loss", "count", "squared_error", "action_numbers"):
                predictions[name] = torch.zeros(len(batch), device=mask.device)
        padding = -torch.inf if is_discrete else 0.0
        best = torch.full((*mask.shape, self.widest), padding, device=mask.device)
        for name, rows, output in outputs:
            width = self.spaces[name]["action"]
            own_action = output[:, :, 0]
            components = self.options.components
            best[rows, :, :width] = action_heads.most_likely_action(
                heads[name], own_action, components
            )
            if not has_actions:
                continue
            of_space = self._losses(heads[name], name, output, rows, batch)
            numbers = 1 if is_discrete else width
            num_steps = of_space.counted[:, :, 0].sum(1).float()
            predictions["loss"][rows] = of_space.losses.sum((1, 2))
            predictions["count"][rows] = of_space.counted.sum((1, 2)).float()
            predictions["squared_error"][rows] = of_space.errors[:, :, 0].sum(1) * numbers
            predictions["action_numbers"][rows] = num_steps * numbers
        best = best.masked_fill(~mask[..., None], torch.nan)
        if is_discrete:
            predictions["scores"] = best
            if has_actions:
                predictions["label"] = torch.where(mask, batch["actions"].argmax(-1), -1)
        elif "graded" not in batch.data:
            predictions["action"] = best
        return predictions

    # ---------------------------------------------------------------- written columns, episodes

    def output_columns(self, predictions, raw_rows):
        """Return lists, one entry a step.

        Of numbers ``actions``, in the environment's own units. Of classes ``prediction``, their
        names, and ``probabilities`` (of each class of the row's space).
        """
        modality: Any = raw_rows.modality
        spaces = modality.state["spaces"]
        n = len(predictions["space"])
        names = list(spaces)
        columns: dict[str, np.ndarray] = {}
        for row, number in enumerate(predictions["space"]):
            space = names[int(number)]
            width = self.spaces[space]["action"]
            if "scores" in predictions:
                scores = _without_padding(predictions["scores"][row, :, :width])
                of_row = _named_actions(scores, spaces[space]["discrete"])
            else:
                acts = _without_padding(predictions["action"][row, :, :width])
                own_units = modality.act(space, acts) if len(acts) else acts
                of_row = {"actions": np.asarray(own_units, dtype=np.float32).tolist()}
            for name, value in of_row.items():
                columns.setdefault(name, np.empty(n, dtype=object))[row] = value
        return columns

    def rollout_evaluation(self, backbone, predictions, raw_rows):
        """With ``environment``: run an episode of the policy in each row's world.

        Adds arrays (n,) float64: ``success`` (0 or 1, NaN where it is not defined), ``return``,
        ``steps``, the same of ``expert_`` and ``random_`` from the rows' columns, ``most_steps``
        (after which a world ends an episode) and ``diverged`` (0 or 1). An episode whose
        simulation diverged is no success, and has the lowest return (`worst_return`). The
        pictures are FRAMES of the first world, black behind an episode's end.

        All worlds go in step, one forward pass a step, in float32 on the backbone's device. The
        pass always holds all worlds, also ended ones, so that what one does never follows from
        when others end.
        """
        if "environment" not in raw_rows.columns:
            return predictions, None
        self.eval()
        space, task = predictions["space"], predictions["task"]
        pilot = Pilot(backbone.eval(), self, raw_rows.modality, space, task)
        return _rollout_metrics(pilot, predictions, raw_rows)

    def rollout_scores(
        self,
        scores: Callable[[Arrays], np.ndarray],
        predictions: dict[str, np.ndarray],
        rows: Any,
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """With ``environment``: as ``rollout_evaluation``, of actions of any model."""
        if "environment" not in rows.columns:
            return predictions, None
        space, task = predictions["space"], predictions["task"]
        pilot = StepPilot(scores, self, rows.modality, space, task)
        return _rollout_metrics(pilot, predictions, rows)


class Actor:
    """Base of the policies that a rollout asks for actions, in the units of each world.

    `Pilot` is that of a network of this package, `StepPilot` that of any model of single steps.

    Args:
        model: What chooses, see the classes.
        space: (n,) int64, of each world the index of its space among the modality's.
        task: (n,) int64, of each world the index of its task.
    """

    def __init__(
        self,
        model: Any,
        objective: BehaviourCloning,
        modality: Any,
        space: np.ndarray,
        task: np.ndarray,
    ):
        self.model = model
        self.objective = objective
        self.modality = modality
        self.space = np.asarray(space, dtype=np.int64)
        self.task = np.asarray(task, dtype=np.int64)
        self.rows: dict[str, np.ndarray] = {}
        for number, name in enumerate(objective.spaces):
            rows = np.flatnonzero(self.space == number)
            if len(rows):
                self.rows[name] = rows
        known = modality.state["spaces"]
        self.known: dict[str, SpaceState] = {name: known[name] for name in self.rows}
        self.action_width = max(space["action"] for space in objective.spaces.values())
        self.bounds: list[tuple[Any, Any]] = [(-np.inf, np.inf)] * len(self.space)
        self.begin(())

    def begin(self, worlds: Sequence[World]) -> None:
        """Forget everything seen and done."""

    def act(self, observations: list[np.ndarray | None], rewards: Any) -> list[Any]:
        """Return an action a world, in the environment's units or as a class's name.

        None for worlds that have ended.
        """
        raise NotImplementedError

    def set_bounds(self, environments: list[Any]) -> None:
        """Keep actions, done and remembered, within the bounds of the worlds' environments."""
        spaces = [environment.action_space for environment in environments]
        for name, rows in self.rows.items():
            width = self.objective.spaces[name]["action"]
            wrong = [spaces[row] for row in rows if spaces[row].shape not in ((), (width,))]
            if wrong:
                raise ValueError(
                    f"space {name} has actions of {width} numbers, its environment takes {wrong[0]}"
                )
        unbounded = (-np.inf, np.inf)
        self.bounds = [(space.low, space.high) if space.shape else unbounded for space in spaces]

    def _actions(
        self, observations: list[np.ndarray | None], value: np.ndarray
    ) -> tuple[list[Any], np.ndarray]:
        """Return an action a world, None where it has ended, and (n, A) as they are remembered.

        Args:
            value: (n, A) standardised numbers, or scores of classes.
        """
        out: list[Any] = [None] * len(observations)
        remembered = np.zeros((len(observations), self.action_width), dtype=np.float32)
        for name, rows in self.rows.items():
            acted, of_space = self._actions_of_space(name, rows, value[rows])
            remembered[rows, : of_space.shape[1]] = of_space
            for row, action in zip(rows, acted, strict=True):
                out[row] = action if observations[row] is not None else None
        return out, remembered

    def _actions_of_space(
        self, name: str, rows: np.ndarray, value: np.ndarray
    ) -> tuple[Sequence[Any] | np.ndarray, np.ndarray]:
        space = self.known[name]
        width = self.objective.spaces[name]["action"]
        chosen = value[:, :width]
        if space["discrete"]:
            # by name: the environment may number classes otherwise than the training rows
            classes = chosen.argmax(1)
            names = [space["discrete"][k] for k in classes]
            one_hot = np.eye(width)[classes]
            return names, one_hot
        wanted = self.modality.act(name, chosen)
        pairs = zip(rows, wanted, strict=True)
        acted = np.stack([np.clip(action, *self.bounds[row]) for row, action in pairs])
        mean = np.array(space["action_mean"])
        std = np.array(space["action_std"])
        return acted, (acted - mean) / std


class StepPilot(Actor):
    """The simulator's ``Policy`` for a model that reads the newest observation alone.

    It takes decoded rows of one step each, without actions, to standardised actions (n, A), or to
    shares of classes.
    """

    model: Callable[[Arrays], np.ndarray]

    def begin(self, worlds: Sequence[World]) -> None:
        self.seen = [np.zeros(0, dtype=np.float32)] * len(self.space)

    def act(self, observations: list[np.ndarray | None], rewards: Any) -> list[Any]:
        pairs = zip(observations, self.seen, strict=True)
        self.seen = [
            last if observation is None else np.asarray(observation, dtype=np.float32).reshape(-1)
            for observation, last in pairs
        ]
        value = self.model(
            {"observations": ragged(self.seen), "space": self.space, "task": self.task}
        )
        return self._actions(observations, value)[0]


class Pilot(Actor):
    """The simulator's ``Policy`` for a trained network.

    It remembers the standardised observations and actions of each world, as many as its backbone
    reads (``window`` observations, or ``context`` steps).

    ``act`` raises ValueError for a world whose observations are not those of its space.
    """

    model: Backbone

    def begin(self, worlds: Sequence[World]) -> None:
        """Forget everything seen and done."""
        self.device = next(self.model.parameters()).device
        fixed = {"space": self.space, "task": self.task}
        self.fixed = {
            name: torch.from_numpy(array).to(self.device) for name, array in fixed.items()
        }
        options = self.model.arch.options
        spaces = self.objective.spaces.values()
        is_transformer = self.model.arch.name.endswith("/transformer")
        reach = options["context" if is_transformer else "window"]
        self.observation_width = max(space["observation"] for space in spaces)
        self.seen: deque[np.ndarray] = deque(maxlen=reach)
        self.done: deque[np.ndarray] = deque(maxlen=reach)
        self.plans: deque[np.ndarray] = deque(maxlen=self.objective.options.chunk)

    def act(self, observations: list[np.ndarray | None], rewards: Any) -> list[Any]:
        n = len(observations)
        self.seen.append(self._observe(observations))
        self.done.append(np.zeros((n, self.action_width), dtype=np.float32))
        self.plans.append(self._plan(n))
        value = action_heads.temporal_ensemble(list(self.plans), self.objective.options.ensemble)
        out, self.done[-1] = self._actions(observations, value)
        return out

    def _observe(self, observations: list[np.ndarray | None]) -> np.ndarray:
        """Return standardised observations (n, O); of ended worlds their last ones."""
        if self.seen:
            now = self.seen[-1].copy()
        else:
            now = np.zeros((len(observations), self.observation_width), dtype=np.float32)
        for name, rows in self.rows.items():
            given = {int(row): one for row in rows if (one := observations[row]) is not None}
            if given:
                width = self.known[name]["observation"]
                observed = self.modality.observe(name, np.stack(list(given.values())))
                now[list(given), :width] = observed
        return now

    @torch.no_grad()
    def _plan(self, n: int) -> np.ndarray:
        """Return (n, H, A): this action and those that follow, from the newest token.

        Standardised numbers, or probabilities of classes.
        """
        objective = self.objective
        arrays = {
            "observations": np.stack(self.seen, 1),
            "actions": np.stack(self.done, 1),
            "mask": np.ones((n, len(self.seen)), dtype=bool),
        }
        data = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        keys = torch.zeros(n, dtype=torch.int64, device=self.device)
        batch = Batch(np.arange(n), keys, {**data, **self.fixed})
        with torch.autocast(self.device.type, enabled=False):
            inputs = self.modality.finish(batch)
            tokens = self.model(inputs, want=("tokens",)).tokens
            assert tokens is not None
            decoded = objective.decoded(tokens[:, -1:], self.fixed["space"])
        plan = np.zeros((n, objective.options.chunk, self.action_width), dtype=np.float32)
        for name, rows, output in decoded:
            head = objective.heads[name]
            best = action_heads.most_likely_action(head, output[:, 0], objective.options.components)
            if head == "categorical":
                best = best.softmax(-1)
            width = best.shape[-1]
            plan[rows.cpu().numpy(), :, :width] = best.cpu().numpy()
        return plan


def _rollout_metrics(
    pilot: Actor, predictions: dict[str, np.ndarray], raw_rows: Any
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Return the predictions with the pilot's episodes, and pictures of the first world."""
    name = raw_rows.columns["environment"]
    worlds = _worlds(raw_rows.table[name], name)
    longest = max(world.steps for world in worlds)
    steps_a_frame = max(1, longest // FRAMES)
    episodes = rollout(worlds, pilot, start=pilot.set_bounds, frames=steps_a_frame)
    diverged = np.array([bool(episode.diverged) for episode in episodes], dtype=np.float64)
    success = np.array([episode.success for episode in episodes], dtype=np.float64)
    measured: dict[str, np.ndarray] = {
        "diverged": diverged,
        "return": np.array([np.sum(one.rewards, dtype=np.float64) for one in episodes]),
        "steps": np.array([len(one.rewards) for one in episodes], dtype=np.float64),
        "most_steps": np.array([world.steps for world in worlds], dtype=np.float64),
        "success": success * (1 - diverged),
    }
    for role in REFERENCE_ROLES:
        if role in raw_rows.columns:
            column = role if role.startswith("random_") else f"expert_{role}"
            measured[column] = _numbers(raw_rows.table[raw_rows.columns[role]])
    random_return = measured.get("random_return", np.zeros(0))
    returns = measured["return"]
    returns[diverged > 0] = worst_return(returns, diverged > 0, random_return)
    return {**predictions, **measured}, _pictures(episodes[0].frames[:FRAMES])


def worst_return(returns: np.ndarray, diverged: np.ndarray, random_return: np.ndarray) -> float:
    """Return the return of episodes whose simulation diverged: the lowest that is known.

    What they got until then would be better than any other return where rewards are negative, and
    a mean without them would be over the worlds that are easy for this policy. Failed units are
    given the worst score of all, as in clinical trials (Lachin, Controlled Clinical Trials 20(5),
    1999).

    Args:
        returns: (n,) of the episodes, those that diverged up to then.
        diverged: (n,) bool.
        random_return: Those of random actions, NaN where not known.

    Returns:
        NaN where all episodes diverged and no return of random actions is known.
    """
    others = np.concatenate([returns[~diverged], random_return[~np.isnan(random_return)]])
    return float(min(others.min(), returns.min())) if len(others) else float("nan")


def _check_head(options: BehaviourCloningOptions, kind: str, name: str) -> None:
    """Raise ValueError where the head is for the other kind of actions."""
    if options.head == "auto":
        return
    is_discrete = kind == "discrete"
    if (options.head == "categorical") == is_discrete:
        return
    description = "class names" if is_discrete else "numbers"
    usable = "categorical" if is_discrete else "mse, gaussian or mixture"
    raise ValueError(
        f"option head of behaviour_cloning: {options.head} does not suit column {name}, whose "
        f"actions are {description}: set {usable}, or leave it out"
    )


def _without_padding(steps: np.ndarray) -> np.ndarray:
    """Return the steps (T, A) that hold no NaN."""
    return steps[~np.isnan(steps).any(1)]


def _named_actions(scores: np.ndarray, names: list[str]) -> dict[str, list[Any]]:
    """Return names and probabilities of the classes with scores (T, A)."""
    probabilities = torch.from_numpy(scores).softmax(-1).numpy()
    predicted = [names[k] for k in probabilities.argmax(1)] if len(probabilities) else []
    return {"prediction": predicted, "probabilities": probabilities.tolist()}


def _pictures(frames: list[np.ndarray]) -> np.ndarray | None:
    """Return FRAMES pictures (F, H, W, 3), black behind the last one; None without any."""
    if not frames:
        return None
    black = np.zeros_like(frames[0])
    return np.stack([*frames, *[black] * (FRAMES - len(frames))])


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) float64 of numbers or bools; NaN where there is none."""
    plain = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    return plain.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _worlds(column: pa.ChunkedArray, name: str) -> list[World]:
    """Return the world of each row.

    Raises:
        ValueError: a row without a world that can be read.
    """
    worlds = []
    for row, text in enumerate(column.to_pylist()):
        try:
            worlds.append(World.parse(text or ""))
        except ValueError as error:
            raise ValueError(f"column {name}, row {row} of the split: {error}") from None
    return worlds
