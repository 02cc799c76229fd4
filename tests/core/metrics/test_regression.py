"""Metrics of numbers against scikit-learn and scipy, on all rows and on resamples."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as theirs

from pipeline.core.metrics.catalog import metric

NAMES = ("mae", "rmse", "r2", "spearman")


def numbers(n: int = 60, seed: int = 0, step: float | None = None, shift: float = 0.0):
    """Values and predictions of some skill; `step` rounds both, so that many are equal."""
    rng = np.random.default_rng(seed)
    value = shift + 10 * rng.normal(size=n)
    prediction = value + 6 * rng.normal(size=n)
    if step:
        value, prediction = (np.round(one / step) * step for one in (value, prediction))
    return {"prediction": prediction, "value": value}


def expected(value: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    return {
        "mae": theirs.mean_absolute_error(value, prediction),
        "rmse": theirs.root_mean_squared_error(value, prediction),
        "r2": theirs.r2_score(value, prediction, force_finite=False),
        "spearman": float(scipy.stats.spearmanr(value, prediction).statistic),
    }


@pytest.mark.parametrize("step", [None, 5.0])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_metrics_equal_scikit_learn_and_scipy(step, shift):
    p = numbers(step=step, shift=shift)
    found = {name: metric(name).value(p) for name in NAMES}
    assert found == pytest.approx(expected(p["value"], p["prediction"]), rel=1e-9)


@pytest.mark.parametrize("step", [None, 5.0])
def test_resamples_are_the_metric_of_the_repeated_rows(step):
    p = numbers(40, step=step)
    rng = np.random.default_rng(1)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=8)
    wanted = [expected(*(np.repeat(p[n], row) for n in ("value", "prediction"))) for row in counts]
    for name in ("r2", "spearman"):
        found = metric(name).resampled(p, counts)
        np.testing.assert_allclose(found, [one[name] for one in wanted], rtol=1e-9)


def test_rows_with_one_value_have_no_r2_and_no_rank():
    p = {"prediction": np.array([1.0, 2.0, 4.0]), "value": np.full(3, 0.1)}
    assert math.isnan(metric("r2").value(p)) and math.isnan(metric("spearman").value(p))
    assert metric("mae").value(p) == pytest.approx((0.9 + 1.9 + 3.9) / 3)
    counts = np.array([[3, 0, 0], [1, 2, 0]])
    varied = {"prediction": p["prediction"], "value": np.array([1.0, 2.0, 3.0])}
    assert np.isnan(metric("r2").resampled(varied, counts)).tolist() == [True, False]
    assert np.isnan(metric("spearman").resampled(varied, counts)).tolist() == [True, False]


def test_a_prediction_that_is_no_number_has_no_rank():
    p = numbers(5)
    p["prediction"][2] = np.nan
    assert all(math.isnan(metric(name).value(p)) for name in NAMES)


def test_errors_are_better_low_and_bounded_by_nought():
    assert [metric(name).higher_is_better for name in NAMES] == [False, False, True, True]
    bounds = {name: metric(name).fixed_bounds for name in NAMES}
    assert bounds["mae"] == bounds["rmse"] == (0.0, math.inf)
    assert bounds["r2"] == (-math.inf, 1.0) and bounds["spearman"] == (-1.0, 1.0)
