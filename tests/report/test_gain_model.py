"""The additive model of gains: closed forms, dense matrices, coverage on simulated gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pipeline.report import gain_model
from pipeline.report.gain_model import GainModel

RNG = np.random.default_rng(5)
PLACES = [("a", "u", "x"), ("a", "v", "x"), ("b", "u", "x"), ("b", "v", "y"), ("c", "u", "y")]
NEW = [("b", "u", "y"), ("c", "v", "x"), ("d", "u", "x"), ("d", "v", "z"), ("a", "w", "z")]
GAINS = np.array([0.1, 0.15, -0.02, 0.07, 0.2])
VARIANCES = np.array([0.01, 0.02, 0.005, 0.01, 0.03]) ** 1.5
SPREADS = np.array([0.08, 0.05, 0.06, 0.03])


def covariance(places, others, spreads) -> np.ndarray:
    """Of the gains of pairs, element by element: a shared level adds its spread squared."""
    out = np.zeros((len(places), len(others)))
    for (i, one), (j, other) in itertools.product(enumerate(places), enumerate(others)):
        shared = [*(a == b for a, b in zip(one, other, strict=True)), one == other]
        out[i, j] = sum(s**2 for s, same in zip(spreads, shared, strict=True) if same)
    return out


def at(spreads: np.ndarray) -> GainModel:
    """The model with spreads that are known."""
    model = GainModel(PLACES, GAINS, VARIANCES)
    model.spreads, model.weights = spreads[None], np.ones(1)
    return model


@pytest.mark.parametrize("spreads", [SPREADS, SPREADS * [0, 1, 1, 1], SPREADS * [1, 1, 1, 0]])
def test_gains_are_the_best_linear_unbiased_predictions(spreads):
    """Kriging with an unknown mean, with dense matrices: measured pairs, new ones, new levels."""
    found = at(spreads).posterior(range(len(PLACES)), NEW)
    total = covariance(PLACES, PLACES, spreads) + np.diag(VARIANCES)
    every = [*PLACES, *NEW]
    cross, inverse = covariance(every, PLACES, spreads), np.linalg.inv(total)
    ones = np.ones(len(PLACES))
    precision = ones @ inverse @ ones
    mean = ones @ inverse @ GAINS / precision
    np.testing.assert_allclose(found.means, mean + cross @ inverse @ (GAINS - mean), rtol=1e-9)
    left = 1 - cross @ inverse @ ones
    expected = covariance(every, every, spreads) - cross @ inverse @ cross.T
    expected += np.outer(left, left) / precision
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-8, atol=1e-12)
    low, high = found.interval(0.9)
    half = scipy_stats.norm.ppf(0.95) * np.sqrt(expected.diagonal())
    np.testing.assert_allclose(high - found.means, half, rtol=1e-6)
    np.testing.assert_allclose(found.means - low, half, rtol=1e-6)


def test_the_restricted_likelihood_is_that_of_error_contrasts():
    """It is the density of gains without their mean, whatever orthonormal contrasts are taken."""
    tried = RNG.uniform(0, 0.2, (6, 4))
    contrasts = np.linalg.svd(np.ones((1, len(PLACES))))[2][1:]
    expected = [
        scipy_stats.multivariate_normal.logpdf(
            contrasts @ GAINS,
            cov=contrasts @ (covariance(PLACES, PLACES, one) + np.diag(VARIANCES)) @ contrasts.T,
        )
        for one in tried
    ]
    found = GainModel(PLACES, GAINS, VARIANCES).log_restricted(tried)
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-8)


def test_balanced_groups_have_the_variance_of_the_analysis_of_variance():
    """One way, equal groups: REML of the variance between them is (MS between - MS within) / n."""
    groups, n, error = 6, 5, 0.02
    gains = RNG.normal(0, 0.1, (groups, 1)) + RNG.normal(0, 0.05, (groups, n))
    between = n * gains.mean(1).var(ddof=1)
    within = gains.var(axis=1, ddof=1).mean()
    closed = np.array([(between - within) / n, within - error**2])
    assert (closed > 0).all()
    places = [(f"g{place}",) for place in range(groups) for _ in range(n)]
    model = GainModel(places, gains.ravel(), [error**2] * groups * n)
    best = np.sqrt(closed)
    near = best * np.array([[1, 1], [1.01, 1], [0.99, 1], [1, 1.01], [1, 0.99]])
    found = model.log_restricted(near)
    assert found.argmax() == 0 and (np.diff(found[1:]) != 0).any()
    assert model.median_spreads() == pytest.approx(best, rel=0.3), "medians lie near the maximum"


def simulated(rng: np.random.Generator, sources: int, techniques: int, targets: int):
    """Return true gains, which of them are measured, and the measurements."""
    parts = [rng.normal(0, 0.05, n) for n in (sources, techniques, targets)]
    rest = rng.normal(0, 0.02, (sources, techniques, targets))
    gains = 0.05 + sum(np.ix_(*parts)) + rest
    names = [(f"s{i}", f"t{j}", f"x{k}") for i, j, k in np.ndindex(gains.shape)]
    measured = rng.permutation(gains.size) < 0.7 * gains.size
    variances = rng.uniform(0.01, 0.03, gains.size) ** 2
    return names, gains.ravel(), measured, variances


@pytest.mark.slow
def test_nine_of_ten_intervals_hold_the_gain():
    """Of pairs that were tried, of those that were not, and of a target without trials."""
    rng = np.random.default_rng(0)
    held: dict[str, list[bool]] = {"tried": [], "untried": [], "new target": []}
    for _ in range(40):
        names, gains, measured, variances = simulated(rng, 4, 4, 4)
        measured &= np.array([name[2] != "x3" for name in names])
        noisy = gains + rng.normal(0, np.sqrt(variances))
        kept = np.flatnonzero(measured)
        model = GainModel([names[i] for i in kept], noisy[kept], variances[kept])
        others = [i for i in np.flatnonzero(~measured) if names[i][2] != "x3"]
        of_new = next(i for i, name in enumerate(names) if name[2] == "x3")
        found = model.posterior(range(len(kept)), [names[i] for i in [*others, of_new]])
        low, high = found.interval(0.9)
        inside = (low <= (every := gains[[*kept, *others, of_new]])) & (every <= high)
        held["tried"] += list(inside[: len(kept)])
        held["untried"] += list(inside[len(kept) : -1])
        held["new target"].append(bool(inside[-1]))
    shares = {what: float(np.mean(one)) for what, one in held.items()}
    assert 0.86 < shares["tried"] < 0.94 and 0.84 < shares["untried"] < 0.96, shares
    assert shares["new target"] >= 0.85, shares


def test_a_larger_error_is_drawn_further():
    found = GainModel(PLACES, GAINS, [0.001, 0.001, 0.001, 0.001, 0.03]).posterior(range(5))
    assert found.shrinkage[4] > found.shrinkage[0]
    alone = GainModel(PLACES[:1], GAINS[:1], VARIANCES[:1]).posterior([0])
    np.testing.assert_allclose([alone.means[0], alone.covariance[0, 0]], [GAINS[0], VARIANCES[0]])


@pytest.mark.parametrize("variances", [[0, 0, 0, 0, 0], [0, 0.01, 0.005, 0, 0.03]])
@pytest.mark.parametrize("gains", [GAINS, GAINS * 0])
def test_a_measurement_without_error_is_kept(gains, variances):
    found = GainModel(PLACES, gains, variances).posterior(range(5), NEW)
    without = np.flatnonzero(np.array(variances) == 0)
    np.testing.assert_allclose(found.means[without], gains[without], atol=2e-3)
    assert np.isfinite(found.means).all() and np.isfinite(found.interval()).all()


def test_the_unit_of_gains_does_not_matter():
    one = GainModel(PLACES, GAINS, VARIANCES).posterior(range(5), NEW)
    other = GainModel(PLACES, GAINS * 100, VARIANCES * 1e4).posterior(range(5), NEW)
    np.testing.assert_allclose(other.means, one.means * 100)
    np.testing.assert_allclose(other.interval(), np.array(one.interval()) * 100)


def test_the_knowledge_gradient_of_two_choices_is_that_of_its_closed_form():
    """The expected rise is s f(-d / s), f(z) = z Phi(z) + phi(z) (Frazier et al. 2009)."""
    difference, change = 0.1, 0.15
    z = -difference / change
    closed = change * (z * scipy_stats.norm.cdf(z) + scipy_stats.norm.pdf(z))
    means, changes = np.array([0.3, 0.2]), np.array([0.05, 0.2])
    assert gain_model.knowledge_gradient(means, changes, 0.3) == pytest.approx(closed, rel=1e-2)
    alike = gain_model.knowledge_gradient(means, np.array([0.1, 0.1]), 0.3)
    assert alike == pytest.approx(0, abs=1e-12), "what moves all alike decides nothing"
    new = gain_model.knowledge_gradient(np.array([0.3, 0.5]), np.zeros(2), 0.3)
    assert new == pytest.approx(0.2), "a choice that there is after the trial alone"
