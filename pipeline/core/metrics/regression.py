"""Metrics of one number a row: ``prediction`` and ``value`` (n,), in the unit of the label."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import (
    NOT_NEGATIVE,
    Predictions,
    counts_by_row,
    numerator_denominator,
    ratio,
    resampled,
)


def _errors(p: Predictions) -> np.ndarray:
    """Return (n,) float64 prediction minus value."""
    return p["prediction"].astype(np.float64) - p["value"].astype(np.float64)


@register("metric", "mae")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def mae(p: Predictions) -> np.ndarray:
    """Mean absolute error, in the unit of the label. Lower is better."""
    errors = np.abs(_errors(p))
    return numerator_denominator(errors, np.ones(len(errors)))


@register("metric", "rmse")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE, final=math.sqrt)
def rmse(p: Predictions) -> np.ndarray:
    """Root mean squared error, in the unit of the label. Lower is better."""
    squares = _errors(p) ** 2
    return numerator_denominator(squares, np.ones(len(squares)))


@register("metric", "r2")
@resampled(bounds=(-math.inf, 1.0))
def r2(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Coefficient of determination: 1 minus the squared error divided by that of predicting the
    mean of these rows. 0 is as good as the mean, below 0 is worse. There is no value if all rows
    have the same number.
    """
    value = p["value"].astype(np.float64)
    value = value - value.mean() if len(value) else value  # squares of large numbers lose digits
    drawn = counts.astype(np.float64)
    total = np.maximum(drawn.sum(1), 1)
    spread = drawn @ value**2 - (drawn @ value) ** 2 / total
    error = drawn @ _errors(p) ** 2
    varies = spread > 1e-12 * (drawn @ value**2)
    return np.where(varies, 1 - error / np.where(varies, spread, 1.0), np.nan)


@register("metric", "spearman")
@resampled(bounds=(-1.0, 1.0))
def spearman(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of predictions and values: equal ones have their mean rank. There
    is no value if either is the same in all rows.
    """
    drawn = counts_by_row(counts)
    x, y = (_ranks(p[name].astype(np.float64), drawn) for name in ("prediction", "value"))
    total = np.maximum(drawn.sum(0), 1)
    x, y = (ranks - (drawn * ranks).sum(0) / total for ranks in (x, y))
    squares = (drawn * x**2).sum(0) * (drawn * y**2).sum(0)
    varies = squares > 0
    products = (drawn * x * y).sum(0)
    return np.where(varies, products / np.sqrt(np.where(varies, squares, 1)), np.nan)


def _ranks(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return (n, R) the mean rank of each row among the drawn ones, from 1; NaN for values of NaN.

    Args:
        values: (n,) numbers.
        drawn: (n, R) how often each row was drawn.
    """
    if not len(values) or np.isnan(values).any():
        return np.full(drawn.shape, np.nan)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    rows = np.add.reduceat(drawn[order], starts, axis=0)
    middle = np.cumsum(rows, axis=0) - rows + (rows + 1) / 2
    run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    ranks = np.empty(drawn.shape)
    ranks[order] = middle[run]
    return ranks
