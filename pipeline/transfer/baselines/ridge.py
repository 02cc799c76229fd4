"""Tables by a linear model of their columns, where a number is predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from sklearn.linear_model import Ridge as RidgeRegression

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.media.static_features import texts_present


class RidgeOptions(Options):
    penalties: list[float] = Field(
        [0.1, 1.0, 10.0, 100.0],
        min_length=1,
        description="factors of the weights' squared norm (scikit-learn's alpha); the best on "
        "validation rows is kept",
    )


@register("baseline", "ridge", options=RidgeOptions)
class Ridge(Baseline):
    """Ridge regression on the standardised numbers of a row, the texts that it has, and which
    numbers are missing.

    Strong where the effects of the columns add up, and where rows are few. Hoerl and Kennard 1970.
    """

    roles = ("features",)
    label_kinds = ("numbers",)

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"alpha": value} for value in self.options.penalties)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, F) float32: numbers, 0 (the mean) where missing; missing or not; texts."""
        numbers, known = rows.arrays["numbers"], rows.arrays["numbers_known"]
        has_text = texts_present(rows.arrays["codes"], rows.modality.inputs()["codes"])
        parts = [np.where(known, numbers, 0.0), ~known, has_text]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        return RidgeRegression(alpha=setting["alpha"])
