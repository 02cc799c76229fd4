"""Remaining length of the ICU stay, predicted every hour, in ten buckets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import BenchmarkOptions, register
from pipeline.prepare.cohorts.definition import (
    EPS,
    BenchmarkCohort,
    first_event,
    last_hour,
    list_array,
    numbers,
    prediction_hours,
)

DAYS = (1, 2, 3, 4, 5, 6, 7, 8, 14)
"""Bounds between the buckets, in days: bucket 8 is 8 to 14 days, 9 is 14 days and more."""


class LengthOfStayOptions(BenchmarkOptions):
    at: float = Field(
        0.0,
        ge=0,
        description="one label, at this hour (24), of stays that last so long; 0: a label every "
        "hour",
    )
    first: float = Field(4.0, ge=0, description="the first hour at which a prediction is made")
    every: float = Field(1.0, gt=0, description="hours between predictions")


@register("cohort", "length_of_stay", options=LengthOfStayOptions)
class LengthOfStay(BenchmarkCohort):
    """Remaining time in the ICU as a bucket: 0 (less than a day), 1 to 7 (days), 8 (8 to 14 days),
    9 (14 and more).

    `label_times` and `label_values` every hour from the fourth one on, after the first event, until
    ICU discharge (Harutyunyan et al. 2019, Scientific Data 6:96; their code begins after hour 4:
    first=5), or with at=24 one `label` at that hour.
    """

    def __init__(self, options: LengthOfStayOptions | None = None):
        super().__init__(options)
        self.label = "label" if self.options.at else "label_values"

    def own_needs(self, names: list[str]) -> dict[str, str]:
        return {
            "icu_hours": "length of the ICU stay, the label",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        stay, counts = numbers(table, "icu_hours"), self._hours(table)[0]
        short = (
            (stay < self.options.at - EPS, f"stay shorter than {self.options.at:g} hours")
            if self.options.at
            else (counts == 0, "no hour to predict at")
        )
        return [
            (np.isnan(stay), "length of stay unknown"),
            (np.isinf(first_event(table)), "no events in the window"),
            short,
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return (
            np.full(len(table), self.options.at)
            if self.options.at
            else last_hour(*self._hours(table))
        )

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        stay = numbers(table, "icu_hours")
        if self.options.at:
            return {"label": pa.array(_bucket(stay - self.options.at), pa.int64())}
        counts, hours = self._hours(table)
        return {
            "label_times": list_array(counts, hours, pa.float32()),
            "label_values": list_array(counts, _bucket(np.repeat(stay, counts) - hours), pa.int8()),
        }

    def _hours(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        return prediction_hours(
            first_event(table), self.options.first, numbers(table, "icu_hours"), self.options.every
        )


def _bucket(hours: np.ndarray) -> np.ndarray:
    """Return the bucket of remaining hours; lower bounds are inclusive."""
    return np.searchsorted(24.0 * np.array(DAYS), hours, side="right")
