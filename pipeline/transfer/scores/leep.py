"""What a source's own classes, or clusters of its features, tell of the target's classes.

All three join soft or hard source classes with the target's classes: LEEP, NCE and N-LEEP.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from pipeline.config.registry import register
from pipeline.core.contracts.score import Estimate, interval_of_halves, score
from pipeline.core.groups import random_half

NO_MORE_THAN_0 = (-math.inf, 0.0)
ENERGY = 0.8
"""Share of the variance that the principal components of N-LEEP keep (Li et al. 2021)."""
CLUSTERS_A_CLASS, ROWS_A_CLUSTER = 5, 10
"""Clusters of N-LEEP, at most so many rows fewer."""
ROUNDS, TOLERANCE, MIN_VARIANCE = 100, 1e-3, 1e-6


@register("score", "leep", title="LEEP")
@score(tasks=("classes",), bounds=NO_MORE_THAN_0)
def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log-likelihood of the labels given the source's class probabilities.

    Higher is better, 0 is the best: log sum_z p(y | z) p(z | x), where p(y | z) is counted on the
    same rows (Nguyen et al., ICML 2020). The source must predict one of several classes.

    It needs classes, and a source with a head for classes. Use it for two tasks of
    classification with related labels.

    Args:
        probabilities: (n, Z) of the source's classes.
        labels: (n,) class numbers.
    """
    return _mean_log_likelihood(probabilities.astype(np.float64), labels)


@register("score", "nce", title="NCE")
@score(tasks=("classes",), bounds=NO_MORE_THAN_0)
def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return minus the conditional entropy of the labels given the source's likeliest class.

    In nats; higher is better, 0 is the best (negative conditional entropy, Tran et al., ICCV 2019).

    It needs classes, and a source with a head for classes. Use it in place of ``leep``
    where the source's probabilities are not to be trusted: its likeliest class alone counts.

    Args:
        probabilities: (n, Z) of the source's classes.
        labels: (n,) class numbers.
    """
    num_classes = probabilities.shape[1]
    hard = np.arange(num_classes) == probabilities.argmax(1)[:, None]
    hard = hard.astype(float)
    return _mean_log_likelihood(hard, labels)


@register("score", "nleep", title="N-LEEP")
@score(tasks=("classes",), bounds=NO_MORE_THAN_0)
def nleep(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> float | Estimate:
    """Return LEEP with clusters of the features in place of the source's classes.

    Higher is better. It can be used for sources without classes too (Li et al., CVPR 2021). The
    clusters are a mixture of Gaussians with diagonal covariances on the principal components that
    keep 80 % of the variance, five for each class where there are enough rows.

    It needs classes. Use it in place of ``leep`` where the source has no head for classes.

    Args:
        features: (n, D) features.
        labels: (n,) class numbers.
        groups: (n,) group of each row, for the interval; None: each row is independent.

    Returns:
        (value, low, high), NaN where the features do not vary. The interval is that of the same
        clusters on other rows.
    """
    x = principal_components(features)
    if not x.shape[1]:
        return float("nan")
    wanted = CLUSTERS_A_CLASS * len(np.unique(labels))
    theta = cluster(x, max(2, min(wanted, len(x) // ROWS_A_CLUSTER)))
    value = _mean_log_likelihood(theta, labels)

    def value_of_half(rng: np.random.Generator) -> float:
        places = random_half(len(labels), rng, groups)
        return _mean_log_likelihood(theta[places], labels[places])

    return value, *interval_of_halves(value, value_of_half)


def _mean_log_likelihood(theta: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of log sum_z p(y | z) p(z | x), from (n, Z) probabilities p(z | x)."""
    _, y = np.unique(labels, return_inverse=True)
    joint = np.zeros((y.max() + 1, theta.shape[1]))
    np.add.at(joint, y, theta / len(y))
    given = joint / np.maximum(joint.sum(0), 1e-300)  # (C, Z) p(y | z)
    likelihood = (given[y] * theta).sum(1)
    return float(np.log(np.maximum(likelihood, 1e-300)).mean())


def principal_components(features: np.ndarray) -> np.ndarray:
    """Return (n, K) coordinates of the rows on the fewest components with the share `ENERGY`."""
    f = features.astype(np.float64)
    f -= f.mean(0)
    if f.shape[1] > len(f):
        variances, u = np.linalg.eigh(f @ f.T)
        coordinates = u * np.sqrt(np.maximum(variances, 0.0))
    else:
        variances, v = np.linalg.eigh(f.T @ f)
        coordinates = f @ v
    order = np.argsort(-variances)
    shares = np.cumsum(np.maximum(variances[order], 0.0))
    if not shares[-1] > 0:
        return f[:, :0]
    kept = int(np.searchsorted(shares, ENERGY * shares[-1])) + 1
    return coordinates[:, order[:kept]]


def cluster(x: np.ndarray, clusters: int) -> np.ndarray:
    """Return (n, K) probabilities of the components of a Gaussian mixture fitted to the rows.

    Expectation-maximisation from the clusters of k-means, with a fixed seed.
    """
    x = x / x.std()
    start = _distant_rows(x, clusters, np.random.default_rng(0))
    _, member = kmeans2(x, start, minit="matrix")
    found = (np.arange(clusters) == member[:, None]).astype(np.float64)
    before = -np.inf
    for _ in range(ROUNDS):
        weight, mean, variance = _maximise(x, found)
        found, likelihood = _expect(x, weight, mean, variance)
        if abs(likelihood - before) < TOLERANCE:
            break
        before = likelihood
    return found


def _distant_rows(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, D) rows as k-means++ draws them (Arthur and Vassilvitskii 2007).

    SciPy draws the same rows, and computes the distances to all earlier ones for each of them.
    """
    drawn = [int(rng.integers(len(x)))]
    nearest = np.full(len(x), np.inf)
    while len(drawn) < count:
        to_last = cdist(x[drawn[-1:]], x, metric="sqeuclidean")[0]
        nearest = np.minimum(nearest, to_last)
        chances = (nearest / nearest.sum()).cumsum()
        drawn.append(int(np.searchsorted(chances, rng.uniform())))
    return x[drawn]


def _maximise(x: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (K,) weights, (K, D) means and (K, D) variances from (n, K) probabilities."""
    count = found.sum(0) + 10 * np.finfo(float).eps
    mean = found.T @ x / count[:, None]
    variance = found.T @ x**2 / count[:, None] - mean**2
    return count / len(x), mean, np.maximum(variance, 0.0) + MIN_VARIANCE


def _expect(
    x: np.ndarray, weight: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return (n, K) probabilities of the components, and the mean log likelihood of the rows."""
    precision = 1 / variance
    constants = (mean**2 * precision).sum(1)
    distance = x**2 @ precision.T - 2 * x @ (mean * precision).T + constants
    constant = np.log(2 * np.pi * variance).sum(1)
    joint = np.log(weight) - 0.5 * (distance + constant)
    most = joint.max(1, keepdims=True)
    total = most + np.log(np.exp(joint - most).sum(1, keepdims=True))
    return np.exp(joint - total), float(total.mean())
