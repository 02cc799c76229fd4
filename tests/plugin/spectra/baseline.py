"""Spectra by their brightest band alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind


class BrightestBandOptions(Options):
    leaf_rows: int = Field(1, ge=1, description="least number of training rows of a leaf")


@register("baseline", "brightest_band", options=BrightestBandOptions)
class BrightestBand(Baseline):
    """A decision tree on the number and the intensity of the brightest band."""

    roles = ("spectrum",)
    label_kinds = ("classes", "label_sets", "numbers")

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        spectrum = rows.arrays["spectrum"]
        return np.stack([spectrum.argmax(1), spectrum.max(1)], axis=1)

    def estimator(self, setting: dict[str, Any], seed: int, label_kind: LabelKind) -> Any:
        kind = DecisionTreeRegressor if label_kind == "numbers" else DecisionTreeClassifier
        return kind(min_samples_leaf=self.options.leaf_rows, random_state=seed)
