"""What a modality, a backbone, an objective and a technique promise each other.

Shapes: B rows of a batch, D features, N tokens or positions, C channels or classes, H and W height
and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.registry import Options
from pipeline.core.batch import Batch
from pipeline.core.ragged import lengths, padded

__all__ = [
    "Arrays",
    "Backbone",
    "Batch",
    "FeatureMapSpec",
    "Features",
    "Modality",
    "Objective",
    "Phase",
    "RawRows",
    "Task",
    "Technique",
    "View",
]

Arrays = dict[str, np.ndarray]
"""Decoded rows: every array has the rows as its first dimension. Rows that differ in length are an
object array of 1-D arrays (``ragged``).
"""


@dataclass(frozen=True)
class Features:
    """What a backbone gives: ``pooled`` (B, D), ``tokens`` (B, N, D) with ``mask`` (B, N, true
    where real), ``stages`` (named maps).
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    stages: dict[str, Tensor] = field(default_factory=dict)
    latent: Tensor | None = None


@dataclass(frozen=True)
class RawRows:
    """Rows as they stand in their files, for what numbers cannot tell (text): ``table`` holds the
    columns that modality and objective read (a pyarrow table), ``columns`` names the column of each
    role, ``modality`` is the one that decoded them.
    """

    table: Any
    columns: dict[str, str]
    modality: Modality


@dataclass(frozen=True)
class FeatureMapSpec:
    """One named feature map of a backbone, its channels and its stride in input pixels."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class View:
    """One random look at a row (SimCLR, Chen et al. 2020, appendix A; BYOL, Grill et al. 2020,
    table 6): ``size`` in pixels a side (none: the input's), the smallest and largest ``area`` of
    the crop as shares, the chances of colour jitter, blur and solarisation; ``strength`` scales the
    jitter.
    """

    size: int | None = None
    area: tuple[float, float] = (0.2, 1.0)
    jitter: float = 0.8
    strength: float = 1.0
    grey: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0


class Modality(ABC):
    """How a row becomes tensors. ``state`` is what was fitted on the source (means, vocabulary):
    JSON, it travels in the bundle.
    """

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that the modality reads, the first one being the input itself."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that it reads where an objective has them (a mask moves with its image)."""
    target_options: ClassVar[tuple[str, ...]] = ()
    """Options that a target may set otherwise than its source did: they change how rows are read,
    not what was fitted.
    """
    file_roles: ClassVar[tuple[str, ...]] = ()
    """Column roles whose values may name files (images, masks, recordings): what these files hold
    is part of every key.
    """
    record_column: ClassVar[str] = ""
    """The column in which prepared rows keep the id of the record that each was cut from: rows of
    one record are the same row, however they are cut.
    """
    packed_roles: ClassVar[tuple[str, ...]] = ()
    """Column roles of the rows that ``pack`` makes; ``tokenize`` makes the first one."""
    fitted_roles: ClassVar[tuple[str, ...]] = ()
    """Optional roles that ``fit`` and ``extend_state`` read even where an objective has them
    (actions are history and label).
    """
    strata: ClassVar[tuple[str, ...]] = ()
    """Optional roles whose every value is to be among the rows that ``fit``, ``extend_state`` and
    ``coverage`` get (robots, tasks).
    """
    unfitted_roles: ClassVar[tuple[str, ...]] = ()
    """Optional roles of which ``fit``, ``extend_state`` and ``coverage`` get no column: large ones
    (frames).
    """
    cost_role: ClassVar[str | None] = None
    """The optional role whose column tells what a row costs (audio: seconds), so that no file is
    opened for it.
    """
    cost_unit: ClassVar[str] = ""

    def __init__(self, options: Any, state: dict[str, Any]):
        self.options, self.state = options, state

    @classmethod
    @abstractmethod
    def fit(
        cls, options: Any, table: Any, columns: dict[str, str], backbone: str
    ) -> dict[str, Any]:
        """State from a sample of training rows (a pyarrow table), the column of each role and the
        backbone's name.
        """

    @classmethod
    def ineffective_options(
        cls, stated: Mapping[str, Any], inherited: Mapping[str, Any] | None = None
    ) -> str:
        """In words, which of the options that a job states would change nothing beside the others;
        "" where each has an effect.

        Args:
            stated: options as one place of the job has them.
            inherited: those of the source or checkpoint, where the job does not say them anew.
        """
        return ""

    def required_type(self, role: str, kind: Any) -> str:
        """ "" where a column of this Arrow type can hold the role, else in words what the role
        needs ("encoded images: binary, ...").

        Told before rows are read; ``decode`` says what only the values tell.
        """
        return ""

    @abstractmethod
    def decode(self, table: Any, columns: dict[str, str]) -> tuple[Arrays, list[str]]:
        """Rows to arrays, and for each row "" or the reason why it cannot be decoded (its arrays
        are then zeros).
        """

    def costs(self, table: Any, columns: dict[str, str]) -> np.ndarray | None:
        """(B,) float64, what each row costs to train on, for batches that are cut by it (audio:
        seconds; 0 where that cannot be told); None where all rows cost the same. Reads the column
        of ``cost_role`` where there is one, and else the rows themselves.
        """
        return None

    def coverage(self, table: Any, columns: dict[str, str]) -> str:
        """In words, what of these rows the fitted state knows and what it leaves out (variables of
        another hospital); "" where that is no question.
        """
        return ""

    def extend_state(self, table: Any, columns: dict[str, str]) -> dict[str, Any]:
        """The state, completed by what a target's or a continuing source's training rows have
        besides (another robot's spaces); what is known stays.
        """
        return self.state

    def encoded(self, table: Any, columns: dict[str, str]) -> tuple[np.ndarray, list[str]] | None:
        """(B,) objects, rows as their files' bytes for ``unpack`` to decode on the device, with ""
        or a reason for each; None where there is no such form.
        """
        return None

    def unpack(
        self, encoded: np.ndarray, device: torch.device
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What ``decode`` gives, made on the device of what ``encoded`` gave: tensors on the
        device, and "" or a reason for each row.
        """
        raise ValueError(f"modality {self.registered_name} is not decoded on the device")

    def inputs(self) -> dict[str, Any]:
        """What a backbone must know to be built: channels and size, or vocabulary and length."""
        return {}

    def pack(self, table: Any, columns: dict[str, str]) -> tuple[Any, list[str]]:
        """Documents to fixed rows (a pyarrow table) for objectives that are ``packed``, and for
        each document "" or the reason why it was left out. Raises ValueError where it makes no
        sense.
        """
        raise ValueError(f"modality {self.registered_name} cannot be packed")

    def tokenize(self, table: Any, columns: dict[str, str]) -> tuple[Any, list[str]] | None:
        """Rows in a form that is cheaper to decode, made once per corpus; None where the rows are
        as good as they are.

        The good rows (a pyarrow table), the modality's own column replaced by the first of
        ``packed_roles``, and for each row "" or the reason why it was left out. ``decode`` reads
        them when ``columns`` names that role alone, and gives what it gives for the rows
        themselves.
        """
        return None

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        """Arrays of one batch to host tensors: of a ragged array ``name`` (B, n) with zeros behind
        each row's end, and ``name_lengths`` (B,).
        """
        plain = {
            name: padded(array) if array.dtype == object else array
            for name, array in arrays.items()
        }
        plain |= {
            f"{name}_lengths": lengths(array)
            for name, array in arrays.items()
            if array.dtype == object
        }
        return {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in plain.items()
        }

    def augment(self, batch: Batch) -> Batch:
        """Random changes on the device, from ``batch.keys`` alone. Training only."""
        return batch

    def check(self, roles: tuple[str, ...]) -> None:
        """Raises ValueError where the options do not suit an objective that reads these roles."""
        return

    def views(self, batch: Batch, views: tuple[View, ...]) -> Batch:
        """The batch with ``view0``, ``view1``, ... beside its input: finished tensors, each with
        first dimension B, from ``batch.keys`` alone.
        """
        raise ValueError(
            f"modality {self.registered_name} has no random views: self-supervision by "
            "comparing views needs images"
        )

    def finish(self, batch: Batch) -> Batch:
        """Deterministic end on the device (uint8 to normalised floats). Training and evaluation."""
        return batch


class Backbone(nn.Module, ABC):
    """The network that is carried over."""

    pooled_dim: int
    token_dim: int | None = None
    feature_map_specs: tuple[FeatureMapSpec, ...] = ()
    causal: bool = False
    convolutions: tuple[tuple[int, int, int], ...] | None = None
    """(kernel, stride, padding) of what lies between an input's samples and ``tokens``, in that
    order (``frames``): how many tokens a row has follows from its length alone. None for inputs
    that are no signal.
    """
    arch: dict[str, Any]
    """What rebuilds it offline: ``{"name": "library/model", "options": {...}, "inputs":
    {...}}``.
    """

    @abstractmethod
    def __init__(self, architecture: str, options: Any, inputs: dict[str, Any]):
        """Random weights from torch's generator. ``inputs`` is what the modality gives. Raises
        ValueError where they do not fit.
        """
        super().__init__()

    @abstractmethod
    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        """``want`` names what is needed beyond ``pooled``: "tokens", "stages"."""

    @abstractmethod
    def layers(self) -> dict[str, list[str]]:
        """Layer name to parameter names, from input to output, covering every parameter exactly
        once.
        """

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A checkpoint's tensors, under this backbone's names, in the shapes that this input asks
        for (an embedding of positions resampled, a first layer's channels summed), and in words
        what was changed. By default nothing is.
        """
        return tensors, []

    def embedding(self) -> nn.Embedding:
        """The input embedding, for objectives that tie their output to it."""
        raise ValueError(
            f"{self.arch['name']} has no token embedding: language-model objectives need a "
            "text backbone"
        )


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


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own rates: a schedule of its own, and a fresh optimiser."""

    name: str
    steps: int
    lr_scale: float = 1.0


class Technique:
    """How a backbone is adapted, as hooks that by default do nothing (= train everything)."""

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    from_source: ClassVar[bool] = True
    """False: the backbone starts from its random initialisation."""
    needs_training: ClassVar[bool] = True
    """False: the source's network is tried as it is; one trial stands for all label fractions and
    seeds.
    """
    frozen: ClassVar[bool] = False
    """True: the backbone never moves, so that its features may be computed once."""

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    def wrap(self, task: Task) -> Task:
        return task

    def steps(self, steps: int) -> int:
        """How many it takes where the target is given so many."""
        return steps

    def phases(self, steps: int) -> tuple[Phase, ...]:
        return (Phase("all", steps),)

    def rates(self, layers: dict[str, list[str]], phase: str) -> dict[str, float]:
        """Learning-rate multiplier of every layer, 0 for frozen. Must name each layer exactly
        once.
        """
        return dict.fromkeys(layers, 1.0)

    def penalty(self, task: Task, batch: Batch) -> Tensor | None:
        """A regulariser added to the mean loss."""
        return None

    def streams(self) -> tuple[str, ...]:
        """Names of further streams that the loss reads."""
        return ()

    def finish(self, task: Task) -> Task:
        """The trained task as it is tested and kept, under the names of the one that ``wrap`` was
        given: adapters are merged into the weights.
        """
        return task

    def at_test(self, task: Task, stream: Any) -> Task:
        """Change of the task before the test rows are read (e.g. statistics of the target)."""
        return task

    def after_fanout(self, trials: list[Any]) -> list[Any]:
        """Further trials made of finished ones (soups, weight-space ensembles)."""
        return []
