"""Tables and event sequences by gradient-boosted trees."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from pydantic import Field
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.core.ragged import lengths

SUMMARIES = ("count", "last", "mean", "min", "max")
"""What is known of a variable's values in a row of events."""


class BoostedTreesOptions(Options):
    trees: int = Field(100, ge=1, description="trees; each has the learning rate 0.1")
    depths: list[int] = Field([2, 6], min_length=1, description="largest depths of a tree")
    leaf_rows: list[int] = Field(
        [5, 20],
        min_length=1,
        description="least numbers of training rows of a leaf; of all pairs with depths the best "
        "on validation rows is kept",
    )


@register("baseline", "boosted_trees", options=BoostedTreesOptions)
class BoostedTrees(Baseline):
    """Histogram-based gradient boosting on the numbers and texts of a row.

    Of events each variable is summarised by its count, last value, mean, least and largest value. A
    missing value is known to be missing. What most people use for tables: Grinsztajn et al. 2022.
    """

    roles = ("features", "times")
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        pairs = product(self.options.depths, self.options.leaf_rows)
        return tuple({"depth": depth, "leaf_rows": rows} for depth, rows in pairs)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, F) float32: numbers, texts (0 or 1), and the summaries of the variables."""
        sizes = rows.modality.inputs()
        parts = [
            np.where(rows.arrays["numbers_known"], rows.arrays["numbers"], np.nan),
            _presence(rows.arrays["codes"], sizes["codes"]),
        ]
        if "variables" in rows.arrays:
            parts.append(
                _summaries(rows.arrays["variables"], rows.arrays["values"], sizes["variables"])
            )
        return np.concatenate(parts, axis=1).astype(np.float32)

    def transformer(self) -> KnownColumns:
        return KnownColumns()

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        # scikit-learn has no types, and early_stopping's default would make it a text
        kind: Any = HistGradientBoostingClassifier
        if label_kind == "numbers":
            kind = HistGradientBoostingRegressor
        return kind(
            max_iter=self.options.trees,
            max_depth=setting["depth"],
            min_samples_leaf=setting["leaf_rows"],
            # by itself it would hold out training rows where there are many, and fail on a class
            # of a single row
            early_stopping=False,
            random_state=seed,
        )


class KnownColumns:
    """Sets a column to 0 that no labelled training row has a value of.

    No tree can learn from it, and scikit-learn refuses a column without any value.
    """

    def fit(self, rows: np.ndarray) -> KnownColumns:
        self.known = np.isfinite(rows).any(axis=0)
        return self

    def transform(self, rows: np.ndarray) -> np.ndarray:
        return np.where(self.known, rows, np.float32(0))


def _presence(codes: np.ndarray, count: int) -> np.ndarray:
    """Return (n, count) whether a row has each text, of ragged places plus 1."""
    out = np.zeros((len(codes), count))
    for row, places in enumerate(codes):
        out[row, places - 1] = 1.0
    return out


def _summaries(variables: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return (n, 5 * count): SUMMARIES of each variable, NaN where a row does not have it.

    Args:
        variables: Ragged, the number of the variable of each event, in order of time.
        values: Ragged, its value.
        count: How many variables there are.
    """
    out = np.full((len(SUMMARIES), len(variables), count), np.nan)
    row = np.repeat(np.arange(len(variables)), lengths(variables))
    empty = [np.zeros(0)]
    variable = np.concatenate([*variables, *empty]).astype(np.int64)
    value = np.concatenate([*values, *empty])
    cell = row * count + variable
    order = np.argsort(cell, kind="stable")
    cell, value = cell[order], value[order]
    found, first, events = np.unique(cell, return_index=True, return_counts=True)
    out[0] = 0.0
    if len(found):
        flat = out.reshape(len(SUMMARIES), -1)
        flat[0, found] = events
        flat[1, found] = value[first + events - 1]
        flat[2, found] = np.add.reduceat(value, first) / events
        flat[3, found] = np.minimum.reduceat(value, first)
        flat[4, found] = np.maximum.reduceat(value, first)
    return out.transpose(1, 0, 2).reshape(len(variables), -1)
