"""Readmission to hospital within 30 days of discharge, from the whole ICU stay."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import BenchmarkOptions, register
from pipeline.prepare.cohorts.definition import (
    EPS,
    BenchmarkCohort,
    numbers,
    stay_hours,
)


class ReadmissionOptions(BenchmarkOptions):
    days: float = Field(
        30.0,
        gt=0,
        description="from hospital discharge to the next admission, this number included",
    )
    deaths: Literal["negative", "exclude", "positive"] = Field(
        "negative",
        description="patients who die within these days of discharge and are not readmitted "
        "before. negative: they count as not readmitted; exclude: they are left out; positive: "
        "they count as readmitted. The last two need rows of MIMIC-IV or OMOP, which tell of death "
        "after discharge",
    )


@register("cohort", "readmission", options=ReadmissionOptions)
class Readmission(BenchmarkCohort):
    """`label`: 1 where the patient's next admission begins at most 30 days after hospital
    discharge, else 0.

    Patients who died in hospital are left out. Death after discharge, which MIMIC-IV and OMOP tell,
    counts as no readmission unless option `deaths` says otherwise. Events of the whole ICU stay are
    inputs. Not a task of Harutyunyan et al. 2019.
    """

    def own_needs(self, names: list[str]) -> dict[str, str]:
        needs = {
            "hospital_death": "death in the hospital, which leaves no readmission",
            stay_hours(names): "length of the ICU stay, else of the hospital stay, whose events "
            "are inputs",
            "readmission_days": "days from discharge to the next admission, the label",
        }
        if self.options.deaths != "negative":
            needs[_death_column(names)] = "death after discharge"
        return needs

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        death = numbers(table, "hospital_death")
        return [
            (death == 1, "died in the hospital"),
            (death != 0, "outcome unknown"),
            (np.isnan(numbers(table, stay_hours(table.column_names))), "length of stay unknown"),
            (numbers(table, "readmission_days") < 0, "next admission before discharge"),
            (self._died(table, "exclude"), f"died within {self.options.days:g} days of discharge"),
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return numbers(table, stay_hours(table.column_names))

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        is_positive = self._readmitted(table) | self._died(table, "positive")
        return {"label": pa.array(is_positive.astype(np.int64), pa.int64())}

    def _readmitted(self, table: pa.Table) -> np.ndarray:
        return numbers(table, "readmission_days") <= self.options.days + EPS

    def _died(self, table: pa.Table, deaths: str) -> np.ndarray:
        """Return (B,) bool, who died instead of a readmission; no one if `deaths` is another."""
        if self.options.deaths != deaths:
            return np.zeros(len(table), dtype=bool)
        column = _death_column(table.column_names)
        days = numbers(table, column)
        if column == "death_hours":
            days = (days - numbers(table, "discharge_hours")) / 24
        return (days <= self.options.days + EPS) & ~self._readmitted(table)


def _death_column(names: list[str]) -> str:
    """Return the column that tells of death after discharge.

    Where stays are in intensive care (MIMIC), `death_hours` has deaths in the hospital alone.
    """
    return "death_days" if stay_hours(names) == "icu_hours" else "death_hours"
