"""Tables, event sequences and regular series by gradient-boosted trees."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from pydantic import Field
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.core.ragged import lengths
from pipeline.media.static_features import texts_present

SUMMARIES = ("count", "last", "mean", "min", "max")
"""What is known of a variable's values in a row of events."""
SERIES_SUMMARIES = ("share", "last", "mean", "deviation", "min", "max", "roughness")
"""What is known of a channel of a row of series: the share of its steps that have a number, and of
these numbers the last one, mean, standard deviation, least, largest, and the mean absolute change
from one to the next."""


class BoostedTreesOptions(Options):
    trees: int = Field(100, ge=1, description="trees; each has the learning rate 0.1")
    depths: list[int] = Field([2, 6], min_length=1, description="largest depths of a tree")
    leaf_rows: list[int] = Field(
        [5, 20],
        min_length=1,
        description="smallest numbers of training rows of a leaf; of all pairs with depths the "
        "best on validation rows is kept",
    )


@register("baseline", "boosted_trees", options=BoostedTreesOptions)
class BoostedTrees(Baseline):
    """Histogram-based gradient boosting on the numbers and texts of a row.

    Each variable of events is summarised by its count and its last, mean, smallest and largest
    value. Each channel of series is summarised in a similar way. The trees see which values are
    missing. It is the usual model for tables (Grinsztajn et al. 2022).
    """

    roles = ("features", "times", "series")
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        pairs = product(self.options.depths, self.options.leaf_rows)
        return tuple({"depth": depth, "leaf_rows": rows} for depth, rows in pairs)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, F) float32: numbers, texts (0 or 1), and the summaries of variables or
        channels.
        """
        sizes = rows.modality.inputs()
        if "series" in rows.arrays:
            return _channel_summaries(
                rows.arrays["series"],
                rows.arrays["known"],
                sizes["channels"],
                sizes["steps"],
                rows.modality.options.cut,
            )
        parts = [
            np.where(rows.arrays["numbers_known"], rows.arrays["numbers"], np.nan),
            texts_present(rows.arrays["codes"], sizes["codes"]),
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


def _channel_summaries(
    series: np.ndarray, known: np.ndarray, channels: int, steps: int, cut: str
) -> np.ndarray:
    """Return (n, 7 * channels) float32: SERIES_SUMMARIES of each channel, NaN where it has none.

    Args:
        series: Ragged, the numbers of each row, step by step.
        known: Ragged, which of them are not missing.
        channels: Numbers of a step.
        steps: How many steps of a longer row are read.
        cut: Which ones, "first", "middle" or "last".
    """
    out = np.full(
        (len(series), channels, len(SERIES_SUMMARIES)),
        np.nan,
        dtype=np.float32,
    )
    for i, (row, is_known) in enumerate(zip(series, known, strict=True)):
        room = max(0, len(row) // channels - steps)
        start = {"first": 0, "middle": room // 2, "last": room}[cut]
        there = is_known.reshape(-1, channels)[start : start + steps]
        for channel, values in enumerate(row.reshape(-1, channels)[start : start + steps].T):
            found = values[there[:, channel]].astype(np.float64)
            out[i, channel, 0] = len(found) / len(values)
            if not len(found):
                continue
            change = np.abs(np.diff(found)).mean() if len(found) > 1 else 0.0
            least, largest = found.min(), found.max()
            mean, std = found.mean(), found.std()
            out[i, channel, 1:] = (found[-1], mean, std, least, largest, change)
    return out.reshape(len(series), -1)
