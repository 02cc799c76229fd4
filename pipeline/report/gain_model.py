"""An additive mixed model of gains: random effects of source, technique and target.

    gain = mean + source + technique + target + rest,    measured gain = gain + error

The effects of the sources are normal around zero with one spread, and so are those of the
techniques, those of the targets and the rest, which is what a pair does beyond its parts. The
variance of each error is known. Given the spreads, effects and gains are the best linear unbiased
predictions (Henderson 1975; Robinson, Statistical Science 6, 1991), also of pairs that were never
measured: the effect of an unknown source, technique or target is then drawn from its distribution.

With two or three sources a single estimate of their spread is often zero, and intervals that trust
it are far too narrow. The spreads are therefore not fixed at the maximum of the restricted
likelihood (REML; Patterson and Thompson, Biometrika 58, 1971): all results are averages over it,
with Gelman's half-Cauchy prior (Bayesian Analysis 1, 2006). Its scale is the root mean square of
the measured gains with the deviations of their errors added: where gains are mostly error it is too
large by up to sqrt(2), which makes intervals wider, never narrower.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

GRID = np.concatenate([[0.0], np.geomspace(1e-3, 30, 40)])
"""Spreads, in sizes of the gains, among which those with any weight are looked for."""
SWEEPS = 5
POINTS = 7
"""Values of each spread that the average is over."""
LOG_LIKELIHOOD_CUTOFF = 6.0
"""Spreads whose likelihood is smaller by a factor of exp(6) are left out."""
Levels = tuple[Hashable, ...]
"""The level of each factor: source, technique, target."""


@dataclass(frozen=True)
class Posterior:
    """Gains of pairs, as the measurements let one expect them."""

    means: np.ndarray
    """(n,)"""
    covariance: np.ndarray
    """(n, n)"""
    shrinkage: np.ndarray
    """(n,) how far a measured gain is shrunk towards the sum of its effects, from 0 to 1.

    It is 1 where the gain was not measured.
    """
    components: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(m,) weights, (m, n) means and (m, n) deviations of the normal distributions whose mixture
    this is, one for each combination of spreads."""

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the (n,) lower and upper bounds, by bisection of the mixture's distribution."""
        weights, means, deviations = self.components
        bounds: list[np.ndarray] = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            low: np.ndarray = (means - 10 * deviations).min(0)
            high: np.ndarray = (means + 10 * deviations).max(0)
            for _ in range(60):
                middle: np.ndarray = (low + high) / 2
                below: np.ndarray = weights @ special.ndtr((middle - means) / deviations) < share
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            bounds.append((low + high) / 2)
        return bounds[0], bounds[1]


class GainModel:
    """The model, fitted to measured gains.

    Attributes:
        spreads: (m, factors + 1) standard deviations of the effects and, last, of the rest.
        weights: (m,) posterior probability of each row of ``spreads``.
    """

    def __init__(
        self, places: Sequence[Levels], gains: Sequence[float], variances: Sequence[float]
    ) -> None:
        """Fit the model.

        Args:
            places: (n) levels of each measured pair.
            gains: (n) measured gains.
            variances: (n) variances of their errors.
        """
        self.gains = np.asarray(gains, dtype=np.float64)
        v = np.asarray(variances, dtype=np.float64)
        largest = float(v.max() or self.gains @ self.gains or 1)
        self.variances = np.maximum(v, 1e-6 * largest)  # an error of zero would have all weight
        self.levels = [
            list(dict.fromkeys(place[k] for place in places)) for k in range(len(places[0]))
        ]
        num_levels = [len(one) for one in self.levels]
        self.factor = np.repeat(np.arange(len(self.levels)), num_levels)
        self.design = self._design(places)
        self.size = float(np.sqrt(np.mean(self.gains**2 + self.variances)))
        self.spreads, self.weights = self._average()

    def _design(self, places: Sequence[Levels]) -> np.ndarray:
        """Return (n, 1 + effects): a one for the mean and for each known level."""
        columns = [np.ones(len(places))]
        for k, levels in enumerate(self.levels):
            columns += [
                np.array([float(place[k] == level) for place in places]) for level in levels
            ]
        return np.stack(columns, axis=1)

    def _equations(self, spreads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mixed-model equations at one spread of the rest and many of the effects.

        They are those of effects in units of their spreads, so that a spread may be zero.

        Args:
            spreads: (m, factors + 1), all with the same last column.

        Returns:
            (m, q) units of the effects, (m, q, q) left and (m, q) right sides.
        """
        precision = 1 / (self.variances + spreads[0, -1] ** 2)
        ones = np.ones((len(spreads), 1))
        units = np.concatenate([ones, spreads[:, self.factor]], axis=1)
        left = (self.design.T * precision) @ self.design
        left = units[:, :, None] * left * units[:, None, :]
        left += np.diag([0.0] + [1.0] * len(self.factor))  # the mean has no prior
        return units, left, units * (self.design.T @ (precision * self.gains))

    def log_restricted(self, spreads: np.ndarray) -> np.ndarray:
        """Return the (m,) logarithms of the restricted likelihood, up to a constant."""
        out = np.empty(len(spreads))
        for rest in np.unique(spreads[:, -1]):
            these = spreads[:, -1] == rest
            _, left, right = self._equations(spreads[these])
            total = self.variances + rest**2
            solved = np.linalg.solve(left, right[:, :, None])[:, :, 0]
            explained = (right * solved).sum(1)
            distance = self.gains @ (self.gains / total) - explained
            log_determinant = np.log(total).sum() + np.linalg.slogdet(left)[1]
            out[these] = -0.5 * (log_determinant + distance)
        return out

    def _log_posterior(self, spreads: np.ndarray) -> np.ndarray:
        return self.log_restricted(spreads) - np.log1p((spreads / self.size) ** 2).sum(1)

    def _average(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a grid of spreads over all that have weight, and their weights."""
        scanned, best = GRID * self.size, np.full(len(self.levels) + 1, self.size)
        ranges = [(0.0, self.size)] * len(best)
        for _ in range(SWEEPS):
            for k in range(len(best)):
                tried = np.tile(best, (len(scanned), 1))
                tried[:, k] = scanned
                posterior = self._log_posterior(tried)
                best[k] = scanned[posterior.argmax()]
                near = np.flatnonzero(posterior > posterior.max() - LOG_LIKELIHOOD_CUTOFF)
                last = min(near[-1] + 1, len(scanned) - 1)
                ranges[k] = float(scanned[max(near[0] - 1, 0)]), float(scanned[last])
        # evenly spaced square roots: a spread is the more uncertain, the larger it is
        ends = [(np.sqrt(low), np.sqrt(high)) for low, high in ranges]
        roots = [low + (high - low) * (np.arange(POINTS) + 0.5) / POINTS for low, high in ends]
        grid = np.stack(np.meshgrid(*roots, indexing="ij"), axis=-1).reshape(-1, len(roots))
        log_weights = self._log_posterior(grid**2) + np.log(grid).sum(1)
        weights = np.exp(log_weights - log_weights.max())
        kept = log_weights > log_weights.max() - LOG_LIKELIHOOD_CUTOFF
        return grid[kept] ** 2, weights[kept] / weights[kept].sum()

    def median_spreads(self) -> list[float]:
        """Return the median of each factor's spread and, last, of that of the rest."""
        out: list[float] = []
        for spread in self.spreads.T:
            order = np.argsort(spread)
            half = np.searchsorted(np.cumsum(self.weights[order]), 0.5)
            out.append(float(spread[order][min(half, len(order) - 1)]))
        return out

    def posterior(self, measured: Sequence[int], unmeasured: Sequence[Levels] = ()) -> Posterior:
        """Return the gains of pairs.

        Args:
            measured: Positions of measured pairs.
            unmeasured: Other pairs, which come after them.
        """
        chosen = list(measured)
        design = np.concatenate([self.design[chosen], self._design(unmeasured)])
        unknown = self._unknown(unmeasured, len(chosen))
        gains = np.concatenate([self.gains[chosen], np.zeros(len(unmeasured))])
        variances = np.concatenate([self.variances[chosen], np.full(len(unmeasured), np.inf)])
        means, deviations = np.empty((2, len(self.weights), len(gains)))
        count = len(gains)
        covariance = np.zeros((count, count))
        share = np.zeros(count)
        for place, (weight, spreads) in enumerate(zip(self.weights, self.spreads, strict=True)):
            equations = self._equations(spreads[None])
            units: np.ndarray = equations[0][0]
            left: np.ndarray = equations[1][0]
            right: np.ndarray = equations[2][0]
            of_effects = units[:, None] * np.linalg.inv(left) * units
            parts = design @ (units * np.linalg.solve(left, right))
            # the gain of a measured pair lies between its measurement and what its parts promise
            others = 1 / (1 + spreads[-1] ** 2 / variances)
            means[place] = others * parts + (1 - others) * gains
            rest = others * spreads[-1] ** 2
            within = others[:, None] * (design @ of_effects @ design.T) * others + np.diag(rest)
            for k, same in enumerate(unknown):
                within += spreads[k] ** 2 * same
            deviations[place] = np.sqrt(within.diagonal())
            covariance += weight * (within + np.outer(means[place], means[place]))
            share += weight * others
        mean = self.weights @ means
        covariance -= np.outer(mean, mean)
        return Posterior(mean, covariance, share, (self.weights, means, deviations))

    def _unknown(self, unmeasured: Sequence[Levels], before: int) -> list[np.ndarray]:
        """Return (n, n) for each factor: which pairs share a level that no measurement has.

        ``before`` measured pairs come first, which share none.
        """
        out: list[np.ndarray] = []
        for k, levels in enumerate(self.levels):
            new = [None] * before + [p[k] if p[k] not in levels else None for p in unmeasured]
            out.append(np.array([[float(a is not None and a == b) for a in new] for b in new]))
        return out


def knowledge_gradient(means: np.ndarray, changes: np.ndarray, now: float) -> float:
    """Return how much a trial is expected to raise the gain of the best choice.

    The trial will change what is expected by ``changes`` times one standard normal number. Frazier,
    Powell and Dayanik, The Knowledge-Gradient Policy for Correlated Normal Beliefs, INFORMS Journal
    on Computing 21, 2009.

    Args:
        means: (n,) expected gain of every choice that there is after the trial.
        changes: (n,) covariance of each with the trial's result, in its standard deviations.
        now: Expected gain of the best choice before the trial.
    """
    points = special.ndtri((np.arange(2000) + 0.5) / 2000)
    return float((means + points[:, None] * changes).max(1).mean() - now)
