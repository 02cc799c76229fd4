"""Diagnosis codes of the patient's next admission, from the ICU stay before it: labels for
pretraining that need no annotation.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import lengths
from pipeline.prepare.cohorts.definition import (
    BenchmarkCohort,
    column_array,
    labels_of_codes,
    numbers,
    plain_code,
)


class NextCodesOptions(Options):
    characters: int = Field(
        3,
        ge=1,
        le=5,
        description="how many leading characters of an ICD-9 code make a label; an E code has one "
        "more. 3 is the category (428, V45, E888)",
    )
    exclude: Literal["benchmark", "none"] = Field(
        "none",
        description="benchmark: MIMIC-III stays as Harutyunyan et al. 2019: adults, one ICU stay "
        "in the admission and no move between ICUs; none: all stays",
    )


@register("cohort", "next_codes", options=NextCodesOptions)
class NextCodes(BenchmarkCohort):
    """`labels`: categories of the ICD-9 codes of the patient's next admission, sorted (as in
    Doctor AI, Choi et al. 2016).

    Stays without a next admission, or whose next one has no codes, are left out. Events of the
    whole ICU stay are inputs, with the codes of earlier admissions.
    """

    label = "labels"

    def own_needs(self, names: list[str]) -> dict[str, str]:
        return {
            "next_icd9": "the next admission's ICD-9 codes, the labels",
            "icu_hours": "length of the ICU stay, whose events are inputs",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        counts = lengths(column_array(table, "next_icd9"))
        return [
            (np.isnan(numbers(table, "icu_hours")), "length of stay unknown"),
            (counts <= 0, "no next admission with codes"),
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return numbers(table, "icu_hours")

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        codes, characters = column_array(table, "next_icd9"), self.options.characters
        return {"labels": labels_of_codes(codes, partial(_leading, characters=characters))}


def _leading(code: str, characters: int) -> str:
    """Return the first characters of an ICD-9 code, and one more of an E code (E888)."""
    plain = plain_code(code)
    return plain[: characters + plain.startswith("E")]
