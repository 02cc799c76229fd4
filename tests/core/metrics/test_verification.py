"""Metrics of pairs of rows against scikit-learn's ROC curve, on all rows and on resamples."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from pipeline.core.metrics import verification
from pipeline.core.metrics.catalog import metric
from pipeline.report import stats

NAMES = ("eer", "min_dcf")


def people(n: int = 40, count: int = 6, noise: float = 1.2, seed: int = 0):
    """Rows of people, near to each other by person; identities are numbers in no order."""
    rng = np.random.default_rng(seed)
    person = rng.integers(0, count, n)
    rows = rng.normal(size=(count, 8))[person] + noise * rng.normal(size=(n, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return {"embedding": rows.astype(np.float32), "identity": (person * 7919) % 101}


def expected(p, weight) -> dict[str, float]:
    """By scikit-learn; ``weight`` (n, n) is how often each pair counts."""
    first, second = np.triu_indices(len(p["identity"]), 1)
    rows = p["embedding"].astype(np.float64)
    scores = (rows[first] * rows[second]).sum(1)
    is_genuine = p["identity"][first] == p["identity"][second]
    often = weight[first, second]
    counted = often > 0
    accepted, found, _ = roc_curve(
        is_genuine[counted], scores[counted], sample_weight=often[counted], drop_intermediate=False
    )
    curve = interp1d(accepted, found)
    return {
        "eer": brentq(lambda rate: 1 - rate - curve(rate), 0, 1),
        "min_dcf": min(1 - found + 99 * accepted),
    }


@pytest.mark.parametrize("noise", [0.4, 1.2, 5.0])
def test_values_equal_scikit_learn(noise):
    p = people(noise=noise)
    found = {name: metric(name).value(p) for name in NAMES}
    assert found == pytest.approx(expected(p, np.ones((40, 40))), abs=1e-6)
    assert 0 < found["eer"] < 0.6


def test_a_row_drawn_twice_is_not_compared_with_itself():
    p = people()
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=5)
    for name in NAMES:
        wanted = [expected(p, np.outer(row, row))[name] for row in counts]
        np.testing.assert_allclose(metric(name).resampled(p, counts), wanted, atol=1e-6)


def test_rows_of_a_group_count_as_often_as_it_is_drawn():
    """Copies of a person would be genuine pairs of the highest scores."""
    p = people()
    unit = np.unique(p["identity"], return_inverse=True)[1]
    draws = np.array([[2, 1, 0, 1, 2, 0], [1, 1, 1, 1, 1, 1], [0, 3, 1, 0, 1, 1]])
    counts = draws[:, unit]
    is_one = unit[:, None] == unit
    for name in NAMES:
        wanted = [
            expected(p, np.where(is_one, row[:, None], np.outer(row, row)))[name] for row in counts
        ]
        found = metric(name).resampled({**p, "unit": unit}, counts)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    low, high = stats.interval(metric("eer"), p, groups=p["identity"], draws=200)
    assert 0 < low < metric("eer").value(p) < high < 0.5


def test_the_interval_of_groups_is_that_of_groups(monkeypatch):
    """Where the metric did not know the groups, squares of counts would make it wider."""
    p = people(n=120, count=40)
    groups = p["identity"] = np.random.default_rng(2).permutation(np.repeat(np.arange(40), 3))
    with_units = np.diff(stats.interval(metric("eer"), p, groups=groups, draws=200))
    without = metric("eer")
    monkeypatch.setattr(without, "compares_rows", False)
    assert with_units < 0.9 * np.diff(stats.interval(without, p, groups=groups, draws=200))


def test_pairs_are_resampled_as_often_as_what_is_computed_anew():
    """1000 draws of the pairs of 600 rows took 8 seconds for each run of a report."""
    sizes, eer = [], metric("eer")

    def counted(p, counts):
        sizes.append(len(counts))
        return eer.resampled(p, counts)

    low, high = stats.interval(replace(eer, resampled=counted), people())
    assert sum(sizes) == stats.RECOMPUTED_DRAWS and low < eer.value(people()) < high


def test_many_rows_have_the_value_of_some_of_their_pairs(monkeypatch):
    p = people(n=300)
    whole = {name: metric(name).value(p) for name in NAMES}
    pairs = verification.ranked_pairs(p["embedding"], p["identity"])
    assert len(pairs.scores) == 300 * 299 / 2
    assert (pairs.is_genuine == (p["identity"][pairs.first] == p["identity"][pairs.second])).all()
    assert len({frozenset(pair) for pair in zip(pairs.first, pairs.second, strict=True)}) == 44_850
    monkeypatch.setattr(verification, "MAX_PAIRS", 5_000)
    some = {name: metric(name).value(p) for name in NAMES}
    assert some["eer"] == pytest.approx(whole["eer"], abs=0.02) and some != whole
    assert some == {name: metric(name).value(p) for name in NAMES}
    pairs = verification.ranked_pairs(p["embedding"], p["identity"])
    assert pairs.is_genuine.sum() == 5_000 and len(pairs.scores) == 10_000
    assert (pairs.is_genuine == (p["identity"][pairs.first] == p["identity"][pairs.second])).all()


def test_rows_of_one_identity_and_broken_embeddings_have_no_value():
    p = people(8)
    one, all_new = ({**p, "identity": ids} for ids in (np.zeros(8, int), np.arange(8)))
    broken = {**p, "embedding": np.where(np.arange(8)[:, None] == 3, np.nan, p["embedding"])}
    single = {name: array[:1] for name, array in p.items()}
    for name in NAMES:
        values = [metric(name).value(rows) for rows in (one, all_new, broken, single)]
        assert np.isnan(values).all()


def test_errors_are_shares_and_better_low():
    for name in NAMES:
        assert metric(name).fixed_bounds == (0.0, 1.0) and not metric(name).higher_is_better
        assert metric(name).compares_rows and math.isclose(metric(name).value(people(noise=0)), 0)
