"""The answer of somebody who does not look at the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier, DummyRegressor

from pipeline.config.registry import register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting


@register("baseline", "majority")
class Majority(Baseline):
    """The share of each class or label among the labelled training rows, or their mean number.

    For demonstrations it is the mean action, which the policy takes at every step.

    A model that is no better has learned nothing.
    """

    label_kinds = ("classes", "label_sets", "numbers", "position_classes", "actions")

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, 1) zeros."""
        return np.zeros((rows.count, 1))

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        if label_kind in ("numbers", "actions"):
            return DummyRegressor(strategy="mean")
        return DummyClassifier(strategy="prior")
