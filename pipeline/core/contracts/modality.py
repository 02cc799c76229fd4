"""How rows of a table become tensors: the contract of every file in ``pipeline/modalities/``.

A complete small modality, for rows that hold a fixed number of sensor samples::

    import numpy as np
    from pydantic import Field

    from pipeline.config.registry import Options, register
    from pipeline.core.contracts import Modality


    class SensorOptions(Options):
        length: int = Field(100, ge=1, description="samples a row")


    @register("modality", "sensor", options=SensorOptions)
    class Sensor(Modality):
        roles = ("signal",)

        @classmethod
        def fit(cls, options, table, columns, backbone):
            rows = [row for row in table[columns["signal"]].to_pylist() if row is not None]
            values = np.concatenate(rows)
            return {"mean": float(values.mean()), "std": float(values.std())}

        def decode(self, table, columns):
            signal = np.zeros((len(table), self.options.length), dtype=np.float32)
            errors = [""] * len(table)
            for i, row in enumerate(table[columns["signal"]].to_pylist()):
                if row is None or len(row) != self.options.length:
                    errors[i] = f"a row is a list of {self.options.length} numbers"
                else:
                    signal[i] = row
            return {"signal": signal}, errors

        def inputs(self):
            return {"channels": 1, "length": self.options.length}

        def finish(self, batch):
            signal = (batch["signal"] - self.state["mean"]) / self.state["std"]
            return batch.replace(signal=signal)

Rows pass through in this order: ``decode`` in a data worker, ``collate`` on the host, then on the
device ``augment`` (training only) and ``finish``. What only some modalities offer (costs, random
views, token packing, ...) is a protocol in ``capabilities``: a modality has it by defining it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config.registry import Registered
from pipeline.core.batch import Batch
from pipeline.core.inputs import Inputs
from pipeline.core.ragged import lengths, pad
from pipeline.core.specs import State

Arrays = dict[str, np.ndarray]
"""Decoded rows. Every array has the rows as its first dimension; rows of different lengths are an
object array of 1-D arrays (`pipeline.core.ragged`)."""


@dataclass(frozen=True)
class View:
    """One random view of an image (SimCLR, Chen et al. 2020, appendix A; BYOL, Grill et al. 2020,
    table 6)."""

    size: int | None = None
    """Pixels a side; None: the size of the input."""
    area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the crop, as shares of the image."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    strength: float = 1.0
    """Scales the strength of the jitter."""
    grey: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0
    """Probabilities of greyscale, Gaussian blur and solarisation."""


class Modality(Registered, ABC):
    """How a row becomes tensors.

    Args:
        options: An instance of the registered options class.
        state: What ``fit`` returned for the source's rows: JSON, stored in every bundle.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that every table must have; the first one is the input itself."""
    optional_roles: ClassVar[tuple[str, ...]] = ()
    """Column roles that are read where a table has them."""
    target_options: ClassVar[tuple[str, ...]] = ()
    """Options that a target may set differently from its source: they change how rows are read, not
    what was fitted."""

    def __init__(self, options: Any, state: State):
        self.options, self.state = options, state

    @classmethod
    @abstractmethod
    def fit(cls, options: Any, table: Any, columns: dict[str, str], backbone: str) -> State:
        """Compute the state (statistics, vocabulary) from a sample of the training rows.

        Args:
            options: The options of the job file.
            table: A pyarrow table of the sampled rows.
            columns: Role to column name.
            backbone: Name of the backbone, such as ``timm/resnet18``. What inputs it wants is in
                `pipeline.config.registry.wanted_inputs`.
        """

    def required_type(self, role: str, kind: Any) -> str:
        """Describe the column type that a role needs, where an Arrow type cannot hold it; else "".

        Used before rows are read. ``decode`` reports what only the values show.
        """
        return ""

    @abstractmethod
    def decode(self, table: Any, columns: dict[str, str]) -> tuple[Arrays, list[str]]:
        """Decode rows to arrays.

        Returns:
            The arrays, and for each row "" or the reason why it cannot be decoded; the arrays of
            such a row hold zeros.
        """

    def inputs(self) -> Inputs:
        """Return what a backbone must know to be built: channels and size, or vocabulary."""
        return {}

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        """Turn the arrays of one batch into host tensors.

        A ragged array ``name`` becomes (B, n), padded with zeros, and ``name_lengths`` (B,).
        """
        out: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            is_ragged = array.dtype == object
            out[name] = pad(array) if is_ragged else array
            if is_ragged:
                out[f"{name}_lengths"] = lengths(array)
        return {name: torch.as_tensor(np.ascontiguousarray(array)) for name, array in out.items()}

    def augment(self, batch: Batch) -> Batch:
        """Augment a training batch on the device, with random numbers from ``batch.keys`` alone."""
        return batch

    def finish(self, batch: Batch) -> Batch:
        """Make the final tensors on the device (uint8 pixels to normalised floats).

        Deterministic; used in training and evaluation.
        """
        return batch
