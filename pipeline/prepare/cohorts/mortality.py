"""In-hospital mortality, from the first hours of the ICU stay."""

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


class MortalityOptions(BenchmarkOptions):
    outcome: str = Field(
        "",
        description="the column of death (0 or 1); empty: hospital_death, else in_hospital_death",
    )
    hours: float = Field(
        48.0,
        gt=0,
        description="events of so many first hours are inputs; shorter stays are left out",
    )


@register("cohort", "mortality", options=MortalityOptions)
class Mortality(BenchmarkCohort):
    """`label`: 1 for death in hospital, else 0 (Harutyunyan et al. 2019, Scientific Data 6:96;
    Silva et al. 2012 for PhysioNet 2012).

    Rows of MIMIC and eICU: `hospital_death`, stays of at least `hours` by `icu_hours`; of OMOP
    (exclude=none) the same of hospital visits, by `discharge_hours`. Rows of PhysioNet 2012:
    `in_hospital_death`; the challenge selected stays of 48 hours and more itself and gives no
    length of the ICU stay, so none is left out by length. Option `exclude` concerns
    `hospital_death` alone, not another column that --set outcome= names.

    A stay with `death_hours` before the prediction time is left out: its label is already known.
    The benchmark's own code keeps those (times of death and of ICU discharge do not always agree).
    """

    def excludes(self, names: list[str]) -> bool:
        return super().excludes(names) and self._column(names) == "hospital_death"

    def own_needs(self, names: list[str]) -> dict[str, str]:
        column = self._column(names)
        if column != "hospital_death":
            return {column: "death in the hospital, the label"}
        return {
            column: "death in the hospital, the label (in_hospital_death in PhysioNet 2012; else "
            "--set outcome=)",
            stay_hours(names): "length of the ICU stay, else of the hospital stay",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        hours, names = self.options.hours - EPS, table.column_names
        out = [(~np.isin(self._death(table), (0, 1)), "outcome unknown")]
        if stay_hours(names) in names:
            stay = numbers(table, stay_hours(names))
            out += [
                (np.isnan(stay), "length of stay unknown"),
                (stay < hours, f"stay shorter than {self.options.hours:g} hours"),
            ]
        if "death_hours" in names:
            died = numbers(table, "death_hours")
            out.append((died < hours, "died before the prediction time"))
        return out

    def window(self, table: pa.Table) -> np.ndarray:
        return np.full(len(table), self.options.hours)

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        return {"label": pa.array(self._death(table), pa.int64())}

    def _death(self, table: pa.Table) -> np.ndarray:
        return numbers(table, self._column(table.column_names))

    def _column(self, names: list[str]) -> str:
        return self.options.outcome or (
            "in_hospital_death"
            if "in_hospital_death" in names and "hospital_death" not in names
            else "hospital_death"
        )
