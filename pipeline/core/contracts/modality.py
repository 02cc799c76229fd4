"""What a modality promises: how a row becomes tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config.registry import Options
from pipeline.core.batch import Batch
from pipeline.core.ragged import lengths, padded

Arrays = dict[str, np.ndarray]
"""Decoded rows: every array has the rows as its first dimension. Rows that differ in length are an
object array of 1-D arrays (``ragged``).
"""


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
