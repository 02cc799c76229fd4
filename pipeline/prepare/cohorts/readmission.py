"""Readmission to hospital within 30 days of discharge, from the whole ICU stay."""

from __future__ import annotations

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


@register("cohort", "readmission", options=ReadmissionOptions)
class Readmission(BenchmarkCohort):
    """`label`: 1 where the patient's next admission begins at most 30 days after hospital
    discharge, else 0.

    Patients who died in hospital are left out. Death after discharge is not known and counts as no
    readmission. Events of the whole ICU stay are inputs. Not a task of Harutyunyan et al. 2019.
    """

    def own_needs(self, names: list[str]) -> dict[str, str]:
        return {
            "hospital_death": "death in the hospital, which leaves no readmission",
            stay_hours(names): "length of the ICU stay, else of the hospital stay, whose events "
            "are inputs",
            "readmission_days": "days from discharge to the next admission, the label",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        death = numbers(table, "hospital_death")
        return [
            (death == 1, "died in the hospital"),
            (death != 0, "outcome unknown"),
            (np.isnan(numbers(table, stay_hours(table.column_names))), "length of stay unknown"),
            (numbers(table, "readmission_days") < 0, "next admission before discharge"),
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return numbers(table, stay_hours(table.column_names))

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        soon = numbers(table, "readmission_days") <= self.options.days + EPS
        return {"label": pa.array(soon.astype(np.int64), pa.int64())}
