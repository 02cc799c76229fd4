"""Behaviour cloning: a policy that does what the demonstrations do (Pomerleau 1989), tried in the
simulator where the rows name their world.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.nn import action_heads
from pipeline.simulation.environment import World, make
from pipeline.simulation.rollout import has_success_criterion, rollout

COMPARED = ("return", "success", "steps", "random_return", "random_success", "random_steps")
"""Columns of an episode that tell what its expert, and a random policy in its place, reached; the
policy's own are told beside them.
"""
FRAMES = 6
"""Pictures of an episode, where pictures can be made."""
TRIED = 64
"""Rows whose worlds are looked at to know whether success is known in them."""
REACHED = ("success", "return", "steps")


class BehaviourCloningOptions(Options):
    head: Literal["auto", "mse", "gaussian", "mixture", "categorical"] = Field(
        "auto",
        description="what is told of an action. Numbers: mse, gaussian (mean and deviation) or "
        "mixture of Gaussians (where demonstrations differ); "
        "class names: categorical. auto: mse or categorical",
    )
    components: int = Field(5, ge=2, le=64, description="mixture: how many Gaussians")
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="gaussian, mixture, training only: densities are weighed by the told variance "
        "to this power (beta-NLL, "
        "Seitzer et al. 2022; 0.5 there); 0: plain likelihood, which neglects what is hard to tell",
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
        description="chunks in a rollout: an action is the mean of all predictions of it, weighed "
        "by exp(-ensemble i), "
        "i = 0 being the oldest (ACT's m); none: the newest prediction alone",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the decoders")


@register("objective", "behaviour_cloning", options=BehaviourCloningOptions)
class BehaviourCloning(Objective):
    """A linear decoder of each space (``decoders.<space>``) on a causal backbone's tokens: from
    what is known at step t, the actions t to t + chunk - 1 (action chunks, Zhao et al. 2023,
    "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware"). Places beyond an
    episode's end count for nothing.

    Actions are standardised numbers or one-hot classes (modality trajectory). The loss is summed
    over the places of chunks that lie within their episode: mse, squared errors averaged over an
    action's numbers; gaussian and mixture, the negative log-density in nats of independent numbers
    (mixture density networks, Bishop 1994), the logarithm of a deviation kept within
    ``action_heads.LOG_STD`` by a tanh, in training weighed (``beta``); categorical, the cross entropy.
    Policies are deterministic: the mean, the mean of the likeliest component, the likeliest class.

    ``auto`` takes mse for numbers, which did best for a deterministic expert.
    InvertedDoublePendulum-v5, an MLP, 100 demonstrations of an LQR expert and 1500 steps, then 5
    demonstrations under other dynamics and 300 steps; mean steps of 400 in 20 worlds, one seed,
    before and after: mse 400 and 381, gaussian 259 and 382 (18 and 14 with beta 0), mixture 72 and
    87 (12 and 12). A likelihood is for demonstrations that differ where observations are alike.

    Predictions are of each step's own action. Of numbers: ``squared_error`` in their own units, so
    that sources of other deviations compare (losses are standardised), summed over
    ``action_numbers``. Of classes: ``scores`` (B, T, C) NaN behind a row's end and ``label`` (B, T)
    -1 there; where spaces have other classes, a class is its place in its own space;
    ``squared_error`` is how many are wrong. State: ``kind`` (continuous or discrete), ``labels``
    (class names, in the modality's order), ``columns`` (the optional ones that the rows have) and
    ``has_success_criterion`` (whether it is known what success is in their worlds).

    Where rows have ``environment``, ``rollout_evaluation`` puts the policy into each test row's
    world, with its seed and dynamics, and tells success, return and steps beside the expert's and a
    random policy's. Raises ValueError for a backbone that is none of policies, and for a head that
    does not suit the actions.
    """

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
    metrics = ("loss", "action_error")
    log_names = ("error",)
    transfers_head = True
    whole_rows = True
    output_types = {
        "actions": pa.list_(pa.list_(pa.float32())),
        "prediction": pa.list_(pa.string()),
        "probabilities": pa.list_(pa.list_(pa.float32())),
    }

    @classmethod
    def target_metrics(cls, options, state):
        """Of numbers a source is judged by its loss, which is standardised: of several robots none
        counts more by its units.
        """
        return (
            ("action_error", "loss")
            if state["kind"] == "continuous"
            else ("macro_f1", "accuracy", "loss")
        )

    @classmethod
    def test_metrics(cls, options, state):
        """Success (where it is known what that is), return and steps of the policy's own episodes,
        of the experts' and of random ones; () without ``environment``.
        """
        if "environment" not in state["columns"]:
            return ()
        metric_names = REACHED if state.get("judged", True) else REACHED[1:]
        return (
            *metric_names,
            *(f"expert_{name}" for name in metric_names if name in state["columns"]),
            *(f"random_{name}" for name in metric_names if f"random_{name}" in state["columns"]),
        )

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError where no row has an action, and for a head of the other kind of
        actions.
        """
        name = columns["actions"]
        kind, present_roles = (
            action_heads.kind_of(table[name], name),
            [role for role in cls.optional_roles if role in columns],
        )
        if not action_heads.counts(table[name]).any():
            raise ValueError(f"column {name}: none of {len(table)} training rows has an action")
        if options.head != "auto" and (options.head == "categorical") != (kind == "discrete"):
            fine = "categorical" if kind == "discrete" else "mse, gaussian or mixture"
            raise ValueError(
                f"option head of behaviour_cloning: {options.head} does not suit column "
                f"{name}, whose actions are "
                f"{'class names' if kind == 'discrete' else 'numbers'}: say {fine}, or leave it out"
            )
        state = {"kind": kind, "columns": present_roles}
        if columns.get("environment") in table.column_names:
            worlds = _worlds(
                table[columns["environment"]].drop_null().slice(0, TRIED), columns["environment"]
            )
            present_roles = columns.get("success") in table.column_names and table[
                columns["success"]
            ].null_count < len(table)
            state["judged"] = present_roles or all(
                has_success_criterion(world.id) for world in worlds
            )
        return (
            state
            if kind == "continuous"
            else {**state, "labels": action_heads.names_of(table[name])}
        )

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """``graded`` (B,) int64: how many actions each row tells; nothing for new rows to predict.
        The actions themselves are the modality's.
        """
        name = columns.get("actions", "")
        if name not in table.column_names:
            return {}
        if (kind := action_heads.kind_of(table[name], name)) != state["kind"] and len(table):
            raise ValueError(
                f"column {name} holds {kind} actions, and the training rows hold "
                f"{state['kind']} ones"
            )
        if kind == "discrete" and (
            new := sorted(set(action_heads.names_of(table[name])) - set(state["labels"]))
        ):
            raise ValueError(
                f"column {name}: action {new[0]!r} never stands in the training rows; "
                f"{nearest(new[0], state['labels'])}"
            )
        return {"graded": action_heads.counts(table[name])}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        name = columns.get("actions", "")
        if name not in table.column_names:
            return [""] * len(table)
        reasons = [
            "" if many else f"{name} holds no action" for many in action_heads.counts(table[name])
        ]
        if pc.list_flatten(table[name]).null_count:
            for row, steps in enumerate(table[name].to_pylist()):
                reasons[row] = reasons[row] or (
                    f"{name} lacks the action of a step" if None in steps else ""
                )
        return reasons

    @classmethod
    def check_test(cls, options, table, columns, state):
        """The worlds of the test rows are read, and one of each kind is made: an environment that
        is not installed is told before anything is trained.
        """
        tried = set()
        if "environment" not in state["columns"]:
            return
        for world in _worlds(table[columns["environment"]], columns["environment"]):
            if (key := (world.id, world.skill, tuple(sorted(world.dynamics)))) not in tried:
                tried.add(key)
                make(world).close()

    def __init__(self, backbone: Backbone, options: BehaviourCloningOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs = backbone.arch["inputs"]
        if "spaces" not in inputs or backbone.token_dim is None or not backbone.causal:
            raise ValueError(
                f"{backbone.arch['name']} is no policy: behaviour_cloning takes a causal "
                "backbone of trajectories, such as policy/mlp"
            )
        if inputs.get("images") and "environment" in state["columns"]:
            raise ValueError(
                f"{backbone.arch['name']} reads images, and a rollout gives observations "
                "alone: leave the column environment out of data.columns, "
                "or images out"
            )
        self.spaces: dict[str, dict[str, Any]] = inputs["spaces"]
        self.heads = {
            name: action_heads.head_of(options.head, space["discrete"])
            for name, space in self.spaces.items()
        }
        output_widths = {
            name: action_heads.output_width(self.heads[name], space["action"], options.components)
            for name, space in self.spaces.items()
        }
        self.remembers = any(
            name.startswith("action_encoders.") for name, _ in backbone.named_parameters()
        )
        """Whether the backbone reads earlier actions."""
        self.decoders = nn.ModuleDict(
            {
                name: nn.Linear(backbone.token_dim, options.chunk * many)
                for name, many in output_widths.items()
            }
        )
        self.widest = max(
            (
                space["action"]
                for space in self.spaces.values()
                if space["discrete"] == (state["kind"] == "discrete")
            ),
            default=1,
        )

    def is_transferable(self, options, name):
        """Decoders mean the same where they tell of as many actions by a head of the same kind."""
        theirs, space = BehaviourCloningOptions(**options), self.spaces[name.split(".")[1]]
        head = action_heads.head_of(self.options.head, space["discrete"])
        return (
            theirs.chunk == self.options.chunk
            and action_heads.head_of(theirs.head, space["discrete"]) == head
            and (head != "mixture" or theirs.components == self.options.components)
        )

    @classmethod
    def unseen_inputs(cls, theirs, mine):
        new = [name for name in mine["spaces"] if name not in theirs["spaces"]]
        return (
            f"its rows are of space {', '.join(new)}, which no row of the source is of"
            if new
            else ""
        )

    # ---------------------------------------------------------------- tokens to actions

    def decoded(self, tokens: Tensor, space: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Of each space that is there: its name, its rows (n,) and what its decoder tells of them,
        (n, T, chunk, outputs) float32.
        """
        tokens = F.dropout(tokens, self.options.dropout, self.training)
        out = []
        for number, name in enumerate(self.spaces):
            rows = (space == number).nonzero()[:, 0]
            if len(rows):
                out.append(
                    (
                        name,
                        rows,
                        self.decoders[name](tokens[rows])
                        .float()
                        .unflatten(-1, (self.options.chunk, -1)),
                    )
                )
        return out

    def _decode_actions(self, backbone: Backbone, batch: Batch) -> list[tuple[str, Tensor, Tensor]]:
        tokens = backbone(batch, want=("tokens",)).tokens
        assert tokens is not None
        return self.decoded(tokens, batch["space"])

    def _losses(
        self, name: str, out: Tensor, acts: Tensor, std: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(n, T, chunk) losses, which places count, and squared errors averaged over an action's
        numbers, in their own units by their deviations ``std`` (n, A) (of classes: 1 where it is
        wrong).
        """
        target, known = action_heads.chunks(
            acts[..., : self.spaces[name]["action"]], mask, self.options.chunk
        )
        head = self.heads[name]
        found = action_heads.losses(
            head, out, target, self.options.components, self.options.beta if self.training else 0.0
        )
        best = action_heads.likeliest(head, out, self.options.components)
        if head == "categorical":
            error = (best.argmax(-1) != target.argmax(-1)).float()
        else:
            error = ((best - target) * std[:, None, None, : best.shape[-1]]).square().mean(-1)
        return found.masked_fill(~known, 0.0), known, error.masked_fill(~known, 0.0)

    def loss(self, backbone: Backbone, batch: Batch):
        mask = batch["mask"]
        total, count, error = (
            torch.zeros((), device=mask.device),
            torch.zeros((), device=mask.device),
            torch.zeros((), device=mask.device),
        )
        for name, rows, out in self._decode_actions(backbone, batch):
            losses, known, errors = self._losses(
                name, out, batch["actions"][rows], batch["action_std"][rows], mask[rows]
            )
            total, count, error = (
                total + losses.sum(),
                count + known.sum(),
                error + errors.detach().sum(),
            )
        for parameter in (
            *backbone.parameters(),
            *self.parameters(),
        ):  # of spaces that this batch has no row of: DDP waits for every gradient
            total = total + 0.0 * parameter.sum() if parameter.requires_grad else total
        return total, count, {"error": error}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """See the class; with actions also ``loss``, a sum over ``count`` places (B,). Without
        ``graded`` (new rows) ``action`` (B, T, A) standardised, NaN behind a row's end. ``space``
        and ``task`` (B,) int64 as in the batch.
        """
        mask, device = batch["mask"], batch["mask"].device
        graded, discrete = "actions" in batch.data, self.state["kind"] == "discrete"
        if self.remembers and not graded and "executed" not in batch.data:
            raise ValueError(
                f"{backbone.arch['name']} reads the actions before each step, and these rows "
                "have none: say --column actions=NAME, or executed"
            )
        out = {"space": batch["space"], "task": batch["task"]}
        sums = {
            name: torch.zeros(len(batch), device=device)
            for name in ("loss", "count", "squared_error", "action_numbers")
            if graded
        }
        best = torch.full(
            (*mask.shape, self.widest), -torch.inf if discrete else 0.0, device=device
        )
        for name, rows, of in self._decode_actions(backbone, batch):
            width = self.spaces[name]["action"]
            best[rows, :, :width] = action_heads.likeliest(
                self.heads[name], of[:, :, 0], self.options.components
            )
            if graded:
                losses, known, errors = self._losses(
                    name, of, batch["actions"][rows], batch["action_std"][rows], mask[rows]
                )
                numbers = 1 if discrete else width
                for key, value in (
                    ("loss", losses.sum((1, 2))),
                    ("count", known.sum((1, 2)).float()),
                    ("squared_error", errors[:, :, 0].sum(1) * numbers),
                    ("action_numbers", known[:, :, 0].sum(1).float() * numbers),
                ):
                    sums[key][rows] = value
        best = best.masked_fill(~mask[..., None], torch.nan)
        if discrete:
            out["scores"] = best
            if graded:
                out["label"] = torch.where(mask, batch["actions"].argmax(-1), -1)
        elif "graded" not in batch.data:
            out["action"] = best
        return {**out, **sums}

    # ----------------------------------------------------- what is written, and episodes of its own

    def output_columns(self, found, raw_rows):
        """Lists, one entry a step. Of numbers: ``actions``, in the environment's own units. Of
        classes: ``prediction``, names, and ``probabilities`` (of each class of the row's space).
        """
        modality: Any = raw_rows.modality
        known = modality.state["spaces"]
        out: dict[str, np.ndarray] = {}
        for row, number in enumerate(found["space"]):
            space = list(known)[int(number)]
            of = found["scores" if "scores" in found else "action"][
                row, :, : self.spaces[space]["action"]
            ]
            of = of[~np.isnan(of).any(1)]
            if "scores" in found:
                chance = torch.from_numpy(of).softmax(-1).numpy()
                values = {
                    "prediction": [known[space]["discrete"][k] for k in chance.argmax(1)]
                    if len(chance)
                    else [],
                    "probabilities": chance.tolist(),
                }
            else:
                values = {
                    "actions": np.asarray(modality.act(space, of), dtype=np.float32).tolist()
                    if len(of)
                    else []
                }
            for name, value in values.items():
                out.setdefault(name, np.empty(len(found["space"]), dtype=object))[row] = value
        return out

    def rollout_evaluation(self, backbone, found, raw_rows):
        """With ``environment``: an episode of the policy in each row's world, and arrays (n,)
        float64 ``success`` (0 or 1, NaN where it is not known what that is), ``return``, ``steps``,
        the same of ``expert_`` and ``random_`` from the rows' columns, ``most_steps`` (after which
        a world ends an episode) and ``diverged`` (0 or 1): a simulation that went wrong is no
        success, its return that until then. ``rollout_frames`` has FRAMES pictures of the first
        world where they can be made, black behind an episode's end.

        All rows go in step, one forward pass a step, in float32 on the backbone's device. The pass
        always holds all rows, also ended ones, so that what a row does never follows from when
        others end.
        """
        if "environment" not in raw_rows.columns:
            return found
        worlds = _worlds(
            raw_rows.table[raw_rows.columns["environment"]], raw_rows.columns["environment"]
        )
        self.eval()
        pilot = Pilot(backbone.eval(), self, raw_rows.modality, found["space"], found["task"])
        episodes = rollout(
            worlds,
            pilot,
            start=pilot.meet,
            frames=max(1, max(world.steps for world in worlds) // FRAMES),
        )
        out: dict[str, np.ndarray] = {
            "diverged": np.array([bool(one.diverged) for one in episodes], dtype=np.float64)
        }
        out["return"] = np.array([np.sum(one.rewards, dtype=np.float64) for one in episodes])
        out["steps"] = np.array([len(one.rewards) for one in episodes], dtype=np.float64)
        out["most_steps"] = np.array([world.steps for world in worlds], dtype=np.float64)
        out["success"] = np.array([one.success for one in episodes], dtype=np.float64) * (
            1 - out["diverged"]
        )
        if rollout_frames := episodes[0].frames[:FRAMES]:
            self.rollout_frames = np.stack(
                [
                    *rollout_frames,
                    *[np.zeros_like(rollout_frames[0])] * (FRAMES - len(rollout_frames)),
                ]
            )
        for role in COMPARED:
            if role in raw_rows.columns:
                out[role if role.startswith("random_") else f"expert_{role}"] = _numbers(
                    raw_rows.table[raw_rows.columns[role]]
                )
        return {**found, **out}


class Pilot:
    """A trained policy as pipeline.simulation's ``Policy``: it holds what it has seen and done in
    each world, standardised, and reads as much of it as its backbone was trained to (``window``
    observations, or ``context`` steps).

    ``space`` and ``task`` (n,) int64: of each world the place of its space among the modality's,
    and of its task. Raises ValueError in ``act`` for a world whose observations are not those of
    its space.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: BehaviourCloning,
        modality: Any,
        space: np.ndarray,
        task: np.ndarray,
    ):
        self.backbone, self.objective, self.modality = backbone, objective, modality
        names = list(objective.spaces)
        self.rows = {
            name: np.flatnonzero(space == number)
            for number, name in enumerate(names)
            if (space == number).any()
        }
        self.known: dict[str, dict[str, Any]] = {
            name: modality.state["spaces"][name] for name in self.rows
        }
        self.device = next(backbone.parameters()).device
        self.fixed = {
            name: torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self.device)
            for name, array in (("space", space), ("task", task))
        }
        self.bounds: list[tuple[Any, Any]] = [(-np.inf, np.inf)] * len(space)
        self.begin(())

    def meet(self, environments: list[Any]) -> None:
        """Told of the worlds' environments before the first step: what is done, and remembered,
        lies within the bounds of their actions.
        """
        self.bounds = [
            (one.action_space.low, one.action_space.high)
            if one.action_space.shape
            else (-np.inf, np.inf)
            for one in environments
        ]

    def begin(self, worlds: Sequence[World]) -> None:
        options, spaces = self.backbone.arch["options"], self.objective.spaces.values()
        reach = options[
            "context" if self.backbone.arch["name"].endswith("/transformer") else "window"
        ]
        self.widths = (
            max(space["observation"] for space in spaces),
            max(space["action"] for space in spaces),
        )
        self.seen: deque[np.ndarray] = deque(maxlen=reach)
        self.done: deque[np.ndarray] = deque(maxlen=reach)
        self.plans: deque[np.ndarray] = deque(maxlen=self.objective.options.chunk)

    def act(self, observations: list[np.ndarray | None], rewards: Any) -> list[Any]:
        """One action a world, in the environment's own units or as a class's name; None for worlds
        that have ended.
        """
        n = len(observations)
        now = self.seen[-1].copy() if self.seen else np.zeros((n, self.widths[0]), dtype=np.float32)
        for name, rows in self.rows.items():
            given = {int(row): one for row in rows if (one := observations[row]) is not None}
            if given:
                now[list(given), : self.known[name]["observation"]] = self.modality.observe(
                    name, np.stack(list(given.values()))
                )
        self.seen.append(now)
        self.done.append(np.zeros((n, self.widths[1]), dtype=np.float32))
        self.plans.append(self._plan(n))
        value = action_heads.temporal_ensemble(list(self.plans), self.objective.options.ensemble)
        out: list[Any] = [None] * n
        for name, rows in self.rows.items():
            space, width = self.known[name], self.objective.spaces[name]["action"]
            chosen = value[rows, :width]
            place = chosen.argmax(1)
            # names of classes: the environment may count them otherwise than the rows that were
            # learned from
            acted = (
                [space["discrete"][k] for k in place]
                if space["discrete"]
                else self.modality.act(name, chosen)
            )
            if not space["discrete"]:
                acted = np.stack(
                    [
                        np.clip(action, *self.bounds[row])
                        for row, action in zip(rows, acted, strict=True)
                    ]
                )
                chosen = (acted - np.array(space["action_mean"])) / np.array(space["action_std"])
            for row, action in zip(rows, acted, strict=True):
                out[row] = action if observations[row] is not None else None
            self.done[-1][rows, :width] = np.eye(width)[place] if space["discrete"] else chosen
        return out

    @torch.no_grad()
    def _plan(self, n: int) -> np.ndarray:
        """(n, chunk, A) what the newest token tells of this action and those that follow: numbers,
        or chances of classes.
        """
        held = {
            "observations": np.stack(self.seen, 1),
            "actions": np.stack(self.done, 1),
            "mask": np.ones((n, len(self.seen)), dtype=bool),
        }
        batch = Batch(
            np.arange(n),
            torch.zeros(n, dtype=torch.int64, device=self.device),
            {
                **{name: torch.from_numpy(array).to(self.device) for name, array in held.items()},
                **self.fixed,
            },
        )
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.backbone(self.modality.finish(batch), want=("tokens",)).tokens
            assert tokens is not None
            outputs = self.objective.decoded(tokens[:, -1:], self.fixed["space"])
        out = np.zeros((n, self.objective.options.chunk, self.widths[1]), dtype=np.float32)
        for name, rows, of in outputs:
            best = action_heads.likeliest(
                self.objective.heads[name], of[:, 0], self.objective.options.components
            )
            best = best.softmax(-1) if self.objective.heads[name] == "categorical" else best
            out[rows.cpu().numpy(), :, : best.shape[-1]] = best.cpu().numpy()
        return out


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) float64 of numbers or truths; NaN where there is none."""
    plain = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    return plain.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _worlds(column: pa.ChunkedArray, name: str) -> list[World]:
    """Raises ValueError for a row without a world that can be read."""
    out = []
    for row, text in enumerate(column.to_pylist()):
        try:
            out.append(World.parse(text or ""))
        except ValueError as error:
            raise ValueError(f"column {name}, row {row} of the split: {error}") from None
    return out
