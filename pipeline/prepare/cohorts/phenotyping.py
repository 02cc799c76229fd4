"""Which of 25 conditions were coded for the admission, from the whole ICU stay."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import BenchmarkOptions, register
from pipeline.prepare.clinical import plausible
from pipeline.prepare.cohorts.definition import (
    BenchmarkCohort,
    column_array,
    labels_of_codes,
    numbers,
    plain_code,
)


class PhenotypingOptions(BenchmarkOptions):
    kinds: Literal["all", "acute", "chronic", "mixed"] = Field(
        "all", description="which of the 25 conditions are labels"
    )


@register("cohort", "phenotyping", options=PhenotypingOptions)
class Phenotyping(BenchmarkCohort):
    """`labels`: names of the conditions among the ICD-9 codes of the admission, sorted
    (Harutyunyan et al. 2019, Scientific Data 6:96; groups of codes are HCUP CCS 2015's, in
    phenotypes.csv). Codes of no group, and dots and blanks in codes, are ignored.
    """

    label = "labels"

    def own_needs(self, names: list[str]) -> dict[str, str]:
        return {
            "icd9": "the admission's ICD-9 codes, the labels",
            "icu_hours": "length of the ICU stay, whose events are inputs",
        }

    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        codes = np.asarray(column_array(table, "icd9").is_null())
        return [
            (np.isnan(numbers(table, "icu_hours")), "length of stay unknown"),
            (codes, "codes unknown"),
        ]

    def window(self, table: pa.Table) -> np.ndarray:
        return numbers(table, "icu_hours")

    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        groups = {
            code: name
            for code, (name, kind) in phenotypes().items()
            if self.options.kinds in ("all", kind)
        }
        codes = column_array(table, "icd9")
        return {"labels": labels_of_codes(codes, lambda code: groups.get(plain_code(code), ""))}


@cache
def phenotypes() -> dict[str, tuple[str, str]]:
    """Return (condition; acute, chronic or mixed) of each ICD-9 code."""
    rows = plausible.rows_of("phenotypes.csv", Path(__file__).parent)
    return {code: (row["phenotype"], row["type"]) for row in rows for code in row["codes"].split()}
