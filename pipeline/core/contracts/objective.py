"""What an objective is: one kind of task, with its head, its loss and its predictions.

An objective is one file in ``pipeline/objectives/``; the registry finds it by its decorator. This
one predicts a number a row, as ``regression`` does with more options. It is complete: a job may say
``objective: number`` once the file is there::

    import numpy as np
    from pydantic import Field
    from torch import nn
    from torch.nn import functional as F

    from pipeline.config.registry import Options, register
    from pipeline.core.contracts import Objective


    class NumberOptions(Options):
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")


    @register("objective", "number", options=NumberOptions)
    class Number(Objective):
        "One number a row, from the pooled features, by squared error in its own deviations."

        roles = ("target",)
        metrics = ("loss",)

        @classmethod
        def fit(cls, options, table, columns):
            numbers = table[columns["target"]].to_numpy()
            return {"mean": float(numbers.mean()), "std": float(numbers.std())}

        @classmethod
        def encode(cls, table, columns, state):
            if columns.get("target") not in table.column_names:  # new rows have no target
                return {}
            numbers = table[columns["target"]].to_numpy()
            return {"target": ((numbers - state["mean"]) / state["std"]).astype(np.float32)}

        def __init__(self, backbone, options, state):
            super().__init__(backbone, options, state)
            self.head = nn.Linear(backbone.pooled_dim, 1)

        def predict(self, backbone, batch):
            pooled = F.dropout(backbone(batch).pooled, self.options.dropout, self.training)
            value = self.head(pooled)[:, 0].float()
            if "target" not in batch.data:
                return {"value": value}
            return {"value": value, "loss": (value - batch["target"]).square()}

        def loss(self, backbone, batch):
            losses = self.predict(backbone, batch)["loss"]
            return losses.sum(), losses.new_full((), float(len(losses))), {}

What only some objectives need (a head on cached features, a teacher, calibration, episodes in a
simulator) is a protocol of one or two members in ``objective_capabilities``: an objective has the
capability by having the members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from pipeline.config.registry import Registered
from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone
from pipeline.core.contracts.modality import Arrays, Modality
from pipeline.core.specs import State

if TYPE_CHECKING:
    import pyarrow as pa

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(sum of the losses, how many there are, further sums to log), each of shape ()."""


@dataclass(frozen=True)
class RawRows:
    """Rows as they are stored, for what tensors do not hold (texts, simulated worlds)."""

    table: Any
    """A pyarrow table with the columns of ``UsesRawRows.raw_roles``."""
    columns: dict[str, str]
    """The column of each role."""
    modality: Modality
    """The one that decoded the rows."""


class Objective(nn.Module, Registered, ABC):
    """Head, loss and predictions of one kind of task, for sources and targets alike."""

    roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that it reads beside the modality's. Written out: read without an import."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that it reads where the job names a column for them. Written out likewise."""
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of metrics of its predictions, the primary one first."""
    log_names: tuple[str, ...] = ()
    """Keys of the further sums that ``loss`` returns."""
    packed: ClassVar[bool] = False
    """True: it reads documents that the modality has packed into rows of one length."""

    options: Any
    state: State
    """What was fitted on the training rows (label names): JSON, kept in the bundle."""

    @classmethod
    def fit(cls, options: Any, table: pa.Table, columns: dict[str, str]) -> State:
        """Return the state: what must be known of the training rows' own columns.

        Args:
            options: an instance of ``options_class``.
            table: all training rows, the columns of ``roles`` and ``optional_roles``.
            columns: the column of each role.

        Raises:
            ValueError: the rows cannot be learned from (a single class, a wrong type).
        """
        return {}

    @classmethod
    def encode(cls, table: pa.Table, columns: dict[str, str], state: State) -> Arrays:
        """Turn the roles' columns into arrays, rows first. Empty for new rows without labels.

        Raises:
            ValueError: a value that the state does not know.
        """
        return {}

    @abstractmethod
    def __init__(self, backbone: Backbone, options: Any, state: State):
        """Make what is trained beside the backbone.

        Raises:
            ValueError: the backbone lacks what the objective needs (tokens, feature maps).
        """
        super().__init__()
        self.options, self.state = options, state
        self.names_taken_over: frozenset[str] = frozenset()
        """Its tensors that a source's head was loaded into, by their names here."""

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch) -> Loss:
        """Return (sum of the losses, their count, further sums to log).

        The loop divides the sum by the global count. The backbone may be run several times, on
        masked or cropped inputs.
        """

    @abstractmethod
    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return what the metrics read, each tensor with first dimension B.

        Batches of new rows hold no label tensors: what needs them (``loss``) is then left out.
        """
