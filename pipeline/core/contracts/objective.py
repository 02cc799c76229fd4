"""What an objective promises: one kind of task, with its head, loss, predictions and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.registry import Options
from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone
from pipeline.core.contracts.modality import Arrays, Modality, View


@dataclass(frozen=True)
class RawRows:
    """Rows as they stand in their files, for what numbers cannot tell (text): ``table`` holds the
    columns that modality and objective read (a pyarrow table), ``columns`` names the column of each
    role, ``modality`` is the one that decoded them.
    """

    table: Any
    columns: dict[str, str]
    modality: Modality


class Objective(nn.Module, ABC):
    """One kind of task: head, loss, prediction and metrics together. ``state`` is what was fitted
    on the training rows (label names): JSON, it travels in the bundle.
    """

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that it reads beyond the modality's, and those that it reads where they are
    given.
    """
    optional_roles: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names in pipeline.metrics.catalog, the primary one first."""
    packed: ClassVar[bool] = False
    log_names: ClassVar[tuple[str, ...]] = ()
    """Keys of the further sums that ``loss`` gives."""
    couples_rows: ClassVar[bool] = False
    """True for losses that compare the rows of a global batch with each other: they gather over
    ranks and take no micro-batches.
    """
    transfers_head: ClassVar[bool] = False
    """True: a target with the same objective starts with its source's head, tensors of the same
    name and shape that are ``carried`` (a decoder).
    """
    whole_rows: ClassVar[bool] = False
    """True: whole numbers of label_fractions are rows (demonstrations), since a row has no
    class.
    """
    fit_roles: ClassVar[tuple[str, ...] | None] = None
    """Roles whose columns are read whole for ``fit`` and checked before anything starts; none: all
    of ``roles`` and ``optional_roles``.
    """
    null_label_means: ClassVar[str] = ""
    """What a null in the column of the first role is taken for, where it is no mistake: "a row
    without labels".
    """
    label_tensors: ClassVar[tuple[str, ...]] = ("label",)
    """Tensors that ``head_loss`` and ``head_predict`` read beside the features."""
    raw_roles: ClassVar[tuple[str, ...] | None] = None
    """Roles whose columns ``postprocess`` and ``output_columns`` read; none: all."""
    output_types: ClassVar[dict[str, Any]] = {}
    """Arrow types of those columns of ``output_columns`` that hold lists: where all lists of a file
    are empty, nothing else tells.
    """
    mixes_inputs: bool = False
    """True for an objective that changes its inputs in training (mixup): features computed once are
    then not those that it trains on.
    """
    needs_calibration: bool = False
    """True where ``calibrate`` has something to do, which costs the predictions of the validation
    rows.
    """
    rollout_frames: np.ndarray | None = None
    """(F, H, W, 3) uint8 pictures of what ``rollout_evaluation`` tried first, where some could be
    made.
    """

    options: Any
    state: dict[str, Any]

    @classmethod
    def fit(cls, options: Any, table: Any, columns: dict[str, str]) -> dict[str, Any]:
        """State from the training rows' own columns (a pyarrow table of the roles' columns)."""
        return {}

    @classmethod
    def encode(cls, table: Any, columns: dict[str, str], state: dict[str, Any]) -> Arrays:
        """The roles' columns to arrays. Raises ValueError naming a value that the state does not
        know.
        """
        return {}

    def is_transferable(self, options: dict[str, Any], name: str) -> bool:
        """Whether a tensor of a source's head that was made with ``options`` means the same
        here.
        """
        return True

    @classmethod
    def unseen_inputs(cls, theirs: dict[str, Any], mine: dict[str, Any]) -> str:
        """In words, what of a target's rows a source's network cannot have learned, by what
        backbones know of their rows (``Modality.inputs``); "" nothing.
        """
        return ""

    @classmethod
    def invalid_label_reasons(
        cls, table: Any, columns: dict[str, str], state: dict[str, Any]
    ) -> list[str]:
        """For each row "" or why its labels cannot be used (a box without area): such a row is left
        out, listed and held against the budget.
        """
        return [""] * len(table)

    @classmethod
    def bind_to_backbone(cls, state: dict[str, Any], backbone: Backbone) -> dict[str, Any]:
        """The state, completed by what follows from the backbone (how long its tokens are).
        ``backbone`` may lie on the meta device.
        """
        return state

    @classmethod
    def untrainable_reasons(
        cls,
        table: Any,
        columns: dict[str, str],
        state: dict[str, Any],
        arrays: Arrays | None = None,
        seconds: Any = None,
    ) -> list[str] | None:
        """For each row "" or why it can be scored but not learned from (more letters than frames,
        by ``arrays`` or ``seconds``); None: all can.
        """
        return None

    @classmethod
    def check_test(
        cls, options: Any, table: Any, columns: dict[str, str], state: dict[str, Any]
    ) -> None:
        """Raises ValueError where the test rows' labels cannot give the metrics that the options
        ask for: told before anything is trained.
        """

    @abstractmethod
    def __init__(self, backbone: Backbone, options: Any, state: dict[str, Any]):
        super().__init__()
        self.options, self.state = options, state

    @classmethod
    def target_metrics(cls, options: Any, state: dict[str, Any]) -> tuple[str, ...]:
        """Metrics that a target is told by, the primary one first: ``metrics``, or those of what
        the state tells (how many classes).
        """
        return cls.metrics

    @classmethod
    def source_metrics(cls, options: Any, state: dict[str, Any]) -> tuple[str, ...]:
        """Metrics of a source's validation rows, the first one deciding which weights are kept."""
        return cls.metrics

    @classmethod
    def test_metrics(cls, options: Any, state: dict[str, Any]) -> tuple[str, ...]:
        """Metrics of what ``rollout_evaluation`` adds, told of test rows alone; the first one is
        then the primary one there, unless the target names another.
        """
        return ()

    def views(self) -> tuple[View, ...]:
        """Random views that the loss compares: the modality makes them (``view0``, ...) in the
        place of its augmentation, in evaluation too.
        """
        return ()

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the losses, how many there are, further sums to log). The loop divides by the
        global count.
        """

    @abstractmethod
    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """What the metrics need and ``predict`` writes; each with first dimension B."""

    def head_loss(
        self, features: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """The loss from cached pooled features (B, D), when the head needs no more; None when it
        does.
        """
        return None

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor] | None:
        return None

    def forward_without_rows(self, backbone: Backbone) -> None:
        """What a rank without rows does in the place of ``loss``: an objective with
        ``couples_rows`` takes part in its gathering.
        """

    def after_step(self, backbone: Backbone, step: int, steps: int) -> str | None:
        """Called after each of ``steps`` optimiser steps (momentum teachers, queues). What it
        returns its user is told: a codebook that collapsed.
        """

    def after_training(self, backbone: Backbone) -> None:
        """Called once before the bundle is written: a method whose teacher is what should be
        carried over puts it into the backbone.
        """

    def calibrate(self, found: dict[str, np.ndarray]) -> None:
        """Fit what turns scores into probabilities and decisions (temperature, threshold) on the
        predictions of the VALIDATION rows, once, after the best weights are chosen and before any
        test row is read. It goes into ``state``, a new one (trials share what they were built
        with), and so into the bundle; ``predict`` uses it from then on.
        """

    def postprocess(self, found: dict[str, np.ndarray], raw_rows: RawRows) -> dict[str, np.ndarray]:
        """The predictions with what only the rows' own text tells (whether an answer is right), for
        the metrics: arrays of numbers, rows first.

        Called on the host, with the rows of ``found`` in their order.
        """
        return found

    def rollout_evaluation(
        self, backbone: Backbone, found: dict[str, np.ndarray], raw_rows: RawRows
    ) -> dict[str, np.ndarray]:
        """The predictions of test rows with what takes more than a pass over them (a policy's own
        episodes in the simulator): once, after training, on the host, with the rows of ``found`` in
        their order; arrays of numbers, rows first.
        """
        return found

    def output_columns(
        self, found: dict[str, np.ndarray], raw_rows: RawRows
    ) -> dict[str, np.ndarray]:
        """What ``onetomany predict`` writes of predictions: named columns, rows first; text as
        object arrays. By default the predictions.
        """
        return found


class Task(nn.Module):
    """Backbone and objective as the one module that DDP wraps."""

    def __init__(self, backbone: Backbone, objective: Objective):
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if (
            len(batch) == 0
        ):  # a rank whose rows were all undecodable still takes part in the reduction
            zero = sum(
                ((p * 0.0).sum() for p in self.parameters() if p.requires_grad), torch.zeros(())
            )
            self.objective.forward_without_rows(self.backbone)
            return zero, torch.zeros((), device=zero.device), {}
        return self.objective.loss(self.backbone, batch)

    def layers(self) -> dict[str, list[str]]:
        """The backbone's layers and, last, ``head``: every parameter of the objective. Names are
        the task's.
        """
        out = {
            name: [f"backbone.{p}" for p in params]
            for name, params in self.backbone.layers().items()
        }
        out["head"] = [f"objective.{name}" for name, _ in self.objective.named_parameters()]
        return out
