"""Stays by whether they had many events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.cohorts.definition import CohortDefinition


class BusyOptions(Options):
    hours: float = Field(24.0, gt=0, description="events of so many first hours are inputs")
    least: int = Field(20, ge=1, description="events from which on a stay is busy")


@register("cohort", "busy", options=BusyOptions)
class Busy(CohortDefinition):
    """``label``: 1 for a stay with at least ``least`` events in all."""

    def needs(self, names: list[str]) -> dict[str, str]:
        return {"events": "number of events, the label"}

    def include(self, table: pa.Table) -> np.ndarray:
        return np.full(len(table), "", dtype=object)

    def window(self, table: pa.Table) -> np.ndarray:
        return np.full(len(table), self.options.hours)

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        busy = table["events"].to_numpy() >= self.options.least
        return {"label": pa.array(busy.astype(np.int64))}
