"""Decompensation: death within the next 24 hours, predicted every hour of the ICU stay."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import BenchmarkOptions, register
from pipeline.prepare.cohorts.definition import (
    BenchmarkCohort,
    first_event,
    last_hour,
    list_array,
    numbers,
    prediction_hours,
)


class DecompensationOptions(BenchmarkOptions):
    first: float = Field(4.0, ge=0, description="the first hour at which a prediction is made")
    every: float = Field(1.0, gt=0, description="hours between predictions")
    horizon: float = Field(24.0, gt=0, description="hours within which death counts")


@register("cohort", "decompensation", options=DecompensationOptions)
class Decompensation(BenchmarkCohort):
    """`label_times`: hours from the fourth one on, after the first event, until ICU discharge or
    death; `label_values`: 1 where death comes less than 24 hours later (exactly 24 hours: 0), else
    0 (Harutyunyan et al. 2019, Scientific Data 6:96; their code, unlike their text, begins after
    hour 4: first=5).

    Events are kept up to the last of these hours: a model that predicts at an hour must not look
    beyond it.
    """

    label = "label_values"

    def own_needs(self, names: list[str]) -> dict[str, str]:
        return {
            "hospital_death": "death in the hospital",
            "death_hours": "hours from ICU admission to death",
            "icu_hours": "length of the ICU stay",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        death, lived, stay = (
            numbers(table, name) for name in ("hospital_death", "death_hours", "icu_hours")
        )
        counts, _ = self._hours(table)
        return [
            (~np.isin(death, (0, 1)), "outcome unknown"),
            ((death == 1) & np.isnan(lived), "hour of death unknown"),
            (np.isnan(stay), "length of stay unknown"),
            (np.isinf(first_event(table)), "no events in the window"),
            (counts == 0, "no hour to predict at"),
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return last_hour(*self._hours(table))

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        counts, hours = self._hours(table)
        dies = np.repeat(self._lived(table), counts) - hours < self.options.horizon
        return {
            "label_times": list_array(counts, hours, pa.float32()),
            "label_values": list_array(counts, dies.astype(np.int8), pa.int8()),
        }

    def _lived(self, table: pa.Table) -> np.ndarray:
        """Return (B,) hours from ICU admission to death in hospital; inf for survivors."""
        return np.where(
            numbers(table, "hospital_death") == 1, numbers(table, "death_hours"), np.inf
        )

    def _hours(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        last = np.fmin(numbers(table, "icu_hours"), self._lived(table))
        return prediction_hours(first_event(table), self.options.first, last, self.options.every)
