"""Every score equals its definition, written here a second time and slowly, or scikit-learn."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from scipy.special import logsumexp

from pipeline.config import registry
from pipeline.core.contracts.score import Score, interval_of_halves, score
from pipeline.core.groups import random_half
from pipeline.transfer import scoring
from pipeline.transfer.scores import leep as leep_file
from pipeline.transfer.scores.cka import cka
from pipeline.transfer.scores.distances import frechet, mmd, proxy_a
from pipeline.transfer.scores.gbc import gbc
from pipeline.transfer.scores.h_score import h_score
from pipeline.transfer.scores.knn import knn
from pipeline.transfer.scores.leep import leep, nce, nleep
from pipeline.transfer.scores.logme import logme
from pipeline.transfer.scores.transrate import transrate

SHAPES = pytest.mark.parametrize(("n", "d"), [(60, 7), (90, 30), (40, 120)])


def rows(n: int, d: int, classes: int = 3, signal: float = 1.0, seed: int = 0):
    """Features of unequal scales with a part that tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    scales = np.exp(rng.normal(size=d))
    found = rng.normal(size=(n, d)) * scales + signal * rng.normal(size=(classes, d))[labels]
    return (found + rng.normal(size=d)).astype(np.float32), labels


def probabilities(n: int, z: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(z, 0.3), size=n)


# ---------------------------------------------------------------- LogME


def logme_by_svd(f: np.ndarray, y: np.ndarray) -> float:
    """The evidence over a grid of t, from the singular values of the features themselves."""
    f, n = f.astype(np.float64), len(f)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma, z2 = s**2, (u.T @ y) ** 2
    rest = np.maximum((y**2).sum(0) - z2.sum(0), 0.0) if len(s) < n else 0.0
    t = sigma.max() * np.logspace(-10, 4, 561)[:, None]
    scale = ((1 / (t + sigma)) @ z2 + rest / t) / n
    logdet = np.log(t + sigma).sum(1, keepdims=True) + (n - len(s)) * np.log(t)
    value = -0.5 * (np.log(2 * np.pi * scale) + logdet / n + 1)
    out = []
    for column in value.T:
        k = int(np.clip(column.argmax(), 1, len(column) - 2))
        left, best, right = column[k - 1 : k + 2]
        bend = left - 2 * best + right
        peak = best - (left - right) ** 2 / (8 * bend) if bend < 0 else best
        out.append(column.max() if column.max() > best else peak)
    return float(np.mean(out))


@SHAPES
@pytest.mark.parametrize("signal", [0.0, 1.0, 5.0])
def test_logme_through_the_gram_matrix_is_that_of_the_singular_values(n, d, signal):
    features, labels = rows(n, d, signal=signal)
    want = logme_by_svd(features, np.eye(3)[labels])
    assert logme(features, labels) == pytest.approx(want, abs=1e-9)


def test_logme_of_collinear_features_and_a_perfect_fit():
    features, labels = rows(80, 10)
    doubled = np.concatenate([features, features[:, :4]], axis=1)
    assert logme(doubled, labels) == pytest.approx(
        logme_by_svd(doubled, np.eye(3)[labels]), abs=1e-9
    )
    told = np.concatenate([features, np.eye(3, dtype=np.float32)[labels]], axis=1)
    want = logme_by_svd(told, np.eye(3)[labels])
    assert logme(told, labels) == pytest.approx(want, abs=1e-9) and want > 5


def test_logme_of_numbers_is_that_of_standardised_numbers():
    features, _ = rows(70, 12)
    weights = np.random.default_rng(3).normal(size=(12, 2))
    y = features @ weights + np.random.default_rng(4).normal(size=(70, 2))
    want = logme_by_svd(features, (y - y.mean(0)) / y.std(0))
    assert logme(features, y) == pytest.approx(want, abs=1e-9)
    assert logme(features, 40 * y + 7) == pytest.approx(want, abs=1e-9), "of any unit"
    one = logme_by_svd(features, ((y - y.mean(0)) / y.std(0))[:, :1])
    assert logme(features, y[:, 0]) == pytest.approx(one, abs=1e-9)
    assert np.isnan(logme(features, np.ones(70)))


# ---------------------------------------------------------------- by classes


def leep_by_loops(theta: np.ndarray, y: np.ndarray) -> float:
    n, total = len(y), 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(theta.shape[1]):
            joint = sum(theta[j, z] for j in range(n) if y[j] == y[i])
            likelihood += joint / theta[:, z].sum() * theta[i, z]
        total += np.log(likelihood)
    return total / n


def test_leep_is_its_definition():
    _, labels = rows(50, 4)
    theta = probabilities(50)
    assert leep(theta, labels) == pytest.approx(leep_by_loops(theta, labels), abs=1e-12)
    assert leep(theta, labels * 5 + 2) == pytest.approx(leep(theta, labels), abs=1e-12)


def test_nce_is_minus_the_conditional_entropy():
    from sklearn.metrics import mutual_info_score

    _, labels = rows(60, 4)
    theta = probabilities(60)
    share = np.bincount(labels) / 60
    entropy = -(share * np.log(share)).sum()
    want = mutual_info_score(theta.argmax(1), labels) - entropy
    assert nce(theta, labels) == pytest.approx(want, abs=1e-9)
    assert nce(np.eye(3)[labels], labels) == pytest.approx(0.0, abs=1e-12)


def test_nleep_clusters_as_scikit_learns_mixture_does(monkeypatch):
    from scipy.cluster.vq import kmeans2
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    features, labels = rows(200, 12, signal=2.0)
    found = PCA(0.8, svd_solver="full").fit(features.astype(np.float64))
    x = leep_file.principal_components(features)
    want = found.transform(features.astype(np.float64))
    assert np.abs(x) == pytest.approx(np.abs(want), abs=1e-9) and x.shape == want.shape
    scaled = x / x.std()
    _, member = kmeans2(scaled, 15, minit="++", rng=np.random.default_rng(0))
    groups = [scaled[member == k] for k in range(15)]
    monkeypatch.setattr(leep_file, "TOLERANCE", 0.0)
    monkeypatch.setattr(leep_file, "ROUNDS", 30)
    theirs = GaussianMixture(
        15,
        covariance_type="diag",
        tol=0.0,
        max_iter=29,
        weights_init=[len(group) / 200 for group in groups],
        means_init=[group.mean(0) for group in groups],
        precisions_init=[1 / (group.var(0) + 1e-6) for group in groups],
    )
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(scaled)
    mixed = theirs.predict_proba(scaled)
    assert leep_file.cluster(x, 15) == pytest.approx(mixed, abs=1e-6)
    value, low, high = nleep(features, labels)
    assert value == pytest.approx(leep_by_loops(mixed, labels), abs=1e-6) and low < value < high


@SHAPES
def test_h_score_is_that_of_scikit_learns_shrunk_covariance(n, d):
    from sklearn.covariance import ledoit_wolf

    features, labels = rows(n, d)
    f = features.astype(np.float64)
    f -= f.mean(0)
    covariance, shrinkage = ledoit_wolf(f, assume_centered=True)
    between = sum(
        (labels == c).mean() * np.outer(f[labels == c].mean(0), f[labels == c].mean(0))
        for c in range(3)
    )
    want = np.trace(np.linalg.solve(covariance, (1 - shrinkage) * between))
    assert h_score(features, labels) == pytest.approx(want, abs=1e-6)


@SHAPES
def test_transrate_is_a_difference_of_log_determinants(n, d):
    features, labels = rows(n, d)
    z = features.astype(np.float64)
    z -= z.mean(0)
    z /= np.sqrt(np.trace(np.cov(z, rowvar=False, bias=True)))

    def rate(part):
        eigenvalues = np.linalg.eigvalsh(part.T @ part / (len(part) * 1e-4))
        return 0.5 * np.log(1 + np.maximum(eigenvalues, 0)).sum()

    want = rate(z) - sum((labels == c).mean() * rate(z[labels == c]) for c in range(3))
    assert transrate(features, labels) == pytest.approx(want, abs=1e-6)
    assert transrate(30 * features + 4, labels) == pytest.approx(want, abs=1e-4), "of any scale"


@SHAPES
def test_gbc_sums_the_overlap_of_pairs(n, d):
    from sklearn.decomposition import PCA

    features, labels = rows(n, d)
    size = min(64, n, d)
    x = PCA(size, svd_solver="full").fit_transform(features.astype(np.float64))
    floor = 1e-4 * (x**2).sum() / n / size
    total = 0.0
    for a in range(3):
        for b in range(3):
            if a == b:
                continue
            (m1, v1), (m2, v2) = (
                (x[labels == c].mean(0), x[labels == c].var(0) + floor) for c in (a, b)
            )
            s = np.diag((v1 + v2) / 2)
            apart = (m1 - m2) @ np.linalg.inv(s) @ (m1 - m2) / 8
            logs = np.log(v1).sum() + np.log(v2).sum()
            total += np.exp(-apart - 0.5 * (np.linalg.slogdet(s)[1] - 0.5 * logs))
    assert gbc(features, labels) == pytest.approx(-total, abs=1e-6)


def test_gbc_of_classes_of_one_row_is_a_number():
    features, _ = rows(12, 5)
    assert np.isfinite(gbc(features, np.arange(12)))


@SHAPES
def test_cka_is_the_alignment_of_centred_kernels(n, d):
    features, labels = rows(n, d)
    middle = np.eye(n) - 1 / n

    def alignment(f, y):
        k, m = (middle @ (one @ one.T) @ middle for one in (f.astype(np.float64), y))
        return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())

    assert cka(features, labels) == pytest.approx(alignment(features, np.eye(3)[labels]), abs=1e-9)
    sets = np.stack([labels == 1, labels > 0], axis=1).astype(np.uint8)
    assert cka(features, sets) == pytest.approx(
        alignment(features, sets.astype(np.float64)), abs=1e-9
    )
    numbers = features[:, :2].astype(np.float64) ** 2
    scaled = numbers / numbers.std(0)
    assert cka(features, numbers) == pytest.approx(alignment(features, scaled), abs=1e-9)
    assert cka(scaled, scaled) == pytest.approx(1.0, abs=1e-12)


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize(("n", "m", "d"), [(80, 60, 5), (30, 50, 40), (20, 90, 30)])
def test_frechet_is_the_distance_of_two_gaussians(n, m, d):
    (x, _), (s, _) = rows(n, d, seed=1), rows(m, d, seed=2)
    mean = x.mean(0, dtype=np.float64) - s.mean(0, dtype=np.float64)
    c, c_s = (np.cov(one.astype(np.float64), rowvar=False, bias=True) for one in (x, s))
    root = scipy.linalg.sqrtm(c_s)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((root @ c @ root).real), 0)).sum()
    want = (mean @ mean + np.trace(c) + np.trace(c_s) - 2 * cross) / np.trace(c_s)
    assert frechet(x, s) == pytest.approx(want, abs=1e-6)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    moved = x + np.float32(np.sqrt(np.trace(c) / d))
    assert frechet(moved, x) == pytest.approx(1.0, abs=1e-5), "a shift by one deviation"


def test_mmd_is_the_unbiased_estimate():
    from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

    (x, _), (s, _) = rows(40, 6, seed=1), rows(30, 6, seed=2)
    x, s = x.astype(np.float64), s.astype(np.float64)
    apart = euclidean_distances(np.concatenate([x, s]), squared=True)
    gamma = 1 / (2 * np.median(apart[np.triu_indices(70, 1)]))

    def mean_of_others(one):
        kernel = rbf_kernel(one, one, gamma)
        return (kernel.sum() - np.trace(kernel)) / (len(one) * (len(one) - 1))

    want = mean_of_others(x) + mean_of_others(s) - 2 * rbf_kernel(x, s, gamma).mean()
    assert mmd(x, s) == pytest.approx(want, abs=1e-6)
    assert np.isnan(mmd(x[:1], s)) and np.isnan(mmd(np.ones((5, 2)), np.ones((5, 2))))


@pytest.mark.parametrize("d", [5, 100])
def test_proxy_a_is_that_of_scikit_learns_ridge(d):
    from sklearn.linear_model import Ridge

    (x, _), (s, _) = rows(60, d, signal=0, seed=1), rows(50, d, signal=0, seed=2)
    rng = np.random.default_rng(0)
    sides = [one[rng.permutation(len(one))[:50]].astype(np.float64) for one in (x, s)]
    both, side = np.concatenate(sides), np.repeat([1, -1], 50)
    fold, wrong = np.tile(np.arange(50) % 5, 2), 0
    for k in range(5):
        train, held = both[fold != k], both[fold == k]
        penalty = 0.01 * ((train - train.mean(0)) ** 2).sum() / d
        found = Ridge(penalty, solver="cholesky").fit(train, side[fold != k]).predict(held)
        wrong += int((np.sign(found) != side[fold == k]).sum())
    value, low, high = proxy_a(x, s)
    assert value == pytest.approx(2 * (1 - 2 * wrong / 100), abs=1e-9)
    assert low <= value <= high <= 2


def test_proxy_a_knows_equal_sides_from_different_ones():
    rng = np.random.default_rng(5)
    x, same, other = (rng.normal(size=(400, 8)) + shift for shift in (0, 0, 3))
    assert proxy_a(x, same)[1] < 0 and proxy_a(x, same)[0] < 0.4
    assert proxy_a(x, other)[0] > 1.9
    assert np.isnan(proxy_a(x[:9], other))
    assert np.isnan(proxy_a(np.ones((60, 3)), np.ones((60, 3)))), "a dead network is not the best"


# ---------------------------------------------------------------- rows of one group


def speakers(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """12 rows of each of some speakers of one population, and their numbers."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(count), 12)
    return (rng.normal(size=(count, 10)) * 2)[group] + rng.normal(size=(len(group), 10)), group


def test_rows_that_are_groups_change_nothing():
    (x, y), (s, _) = rows(60, 5, signal=1), rows(50, 5, signal=0, seed=2)
    each, theirs = np.random.default_rng(0).permutation(60), np.arange(50)
    assert knn(x, y, groups=each) == knn(x, y)
    assert mmd(x, s, each, theirs) == mmd(x, s)
    assert proxy_a(x, s, each, theirs) == proxy_a(x, s)
    assert random_half(7, np.random.default_rng(3)).tolist() == (
        random_half(7, np.random.default_rng(3), np.arange(7)).tolist()
    )


def test_knn_leaves_out_the_whole_group():
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    x, group = speakers(15, seed=1)
    y = np.arange(15)[group] % 2  # what the speaker is, and not what is said
    theirs = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    found = cross_val_predict(theirs, x, y, groups=group, cv=LeaveOneGroupOut())
    assert knn(x, y, groups=group) == pytest.approx(balanced_accuracy_score(y, found), abs=1e-9)
    assert knn(x, y, groups=group) < 0.7 < 0.95 < knn(x, y), "it knows speakers alone"
    assert np.isnan(knn(x, y, groups=np.zeros(len(x))))
    assert np.isnan(knn(x, group, groups=group)) and np.isnan(knn(x[::12], group[::12]))
    assert knn(x[:13], group[:13]) > 0, "one class has several rows"


def test_mmd_pairs_rows_of_different_groups():
    (x, group), (s, theirs) = speakers(5, seed=1), speakers(4, seed=2)
    both = np.concatenate([x, s])
    width = np.median([((a - b) ** 2).sum() for i, a in enumerate(both) for b in both[:i]])

    def mean(one, other, is_pair):
        return np.mean(
            [
                np.exp(-((a - b) ** 2).sum() / (2 * width))
                for i, a in enumerate(one)
                for j, b in enumerate(other)
                if is_pair(i, j)
            ]
        )

    want = mean(x, x, lambda i, j: group[i] != group[j])
    want += mean(s, s, lambda i, j: theirs[i] != theirs[j]) - 2 * mean(x, s, lambda i, j: True)
    assert mmd(x, s, group, theirs) == pytest.approx(want, abs=1e-9)
    assert np.isnan(mmd(x, s, np.zeros(len(x)), theirs))


def test_speakers_of_one_population_are_not_far_apart():
    """Means over eight draws of both sides: without groups they look like two domains."""
    found = []
    for seed in range(8):
        (x, group), (s, theirs) = speakers(10, seed), speakers(10, seed + 100)
        found.append(
            (
                proxy_a(x, s, group, theirs)[0],
                proxy_a(x, s)[0],
                proxy_a(x, s, group, theirs)[1] <= 0,
                mmd(x, s, group, theirs),
                mmd(x, s),
            )
        )
    by_group, by_row, holds_zero, mmd_by_group, mmd_by_row = np.mean(found, axis=0)
    assert abs(by_group) < 0.3 and by_row > 0.9 and holds_zero > 0.9
    assert abs(mmd_by_group) < 0.25 * mmd_by_row
    (x, group), (s, theirs) = speakers(4, 1), speakers(6, 2)
    assert np.isfinite(proxy_a(x, s, group, theirs)[0])
    assert np.isnan(proxy_a(x, s, group % 3, theirs))


# ---------------------------------------------------------------- all of them


def value_of(name: str, given: dict) -> float:
    found = registry.get("score", name).of(given)
    return found[0] if isinstance(found, tuple) else found


FEATURES = [name for name in registry.names("score") if name not in ("leep", "nce")]


@pytest.mark.parametrize("name", registry.names("score"))
def test_a_family_of_sources_of_known_quality_is_ranked(name):
    """Six sources whose features hold more and more of what decides the label, in noise; the
    source's own rows are as far from the target's as they are poor.
    """
    found = []
    for quality in (0.0, 0.3, 0.6, 1.0, 1.5, 2.5):
        rng = np.random.default_rng(7)
        labels = rng.integers(0, 4, 400)
        centers = rng.normal(size=(4, 24))
        features = rng.normal(size=(400, 24)) + quality * centers[labels]
        scores = quality * (features @ centers.T)
        theta = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
        source = rng.normal(size=(300, 24)) + quality * centers[rng.integers(0, 4, 300)]
        given = {
            "features": features.astype(np.float32),
            "labels": labels,
            "probabilities": theta,
            "source_features": (source + (2.5 - quality) * centers[0]).astype(np.float32),
        }
        found.append(value_of(name, given))
    if not registry.get("score", name).higher_is_better:
        found = [-value for value in found]
    steps = np.diff(found)
    # distances near zero, and scores near their bound, may be level
    assert (steps > -0.02 * (max(found) - min(found))).all(), found
    assert found[-1] > found[0]


@pytest.mark.parametrize("name", FEATURES)
def test_features_that_do_not_vary_give_a_number_or_nan(name):
    given = {
        "features": np.zeros((30, 5), np.float32),
        "labels": np.arange(30) % 3,
        "source_features": np.zeros((30, 5), np.float32),
    }
    assert not np.isinf(value_of(name, given))


def test_the_spread_over_halves_is_that_of_the_score():
    """Of a mean of n normal rows the interval is 1.96 deviations / sqrt(n) to either side, on
    average over data.
    """
    widths = []
    for seed in range(200):
        x = np.random.default_rng(seed).normal(size=100)
        low, high = interval_of_halves(x.mean(), lambda rng, x=x: x[random_half(100, rng)].mean())
        assert low < x.mean() < high
        widths.append((high - low) / 2)
    t = scipy.stats.t(9).ppf(0.975)
    assert np.sqrt(np.mean(np.square(widths))) == pytest.approx(t / 10, rel=0.05)


@pytest.mark.parametrize("name", ["logme", "nleep", "leep", "cka", "frechet"])
def test_copies_of_a_row_make_no_interval_narrower(name):
    """With the group of each row the interval of nine copies is that of one."""
    x, y = rows(60, 4, signal=1)
    (s, _), theta = rows(40, 4, signal=0, seed=2), np.random.default_rng(0).random((60, 3))
    given = {"features": x, "labels": y, "probabilities": theta, "source_features": s}
    one = scoring.value_of(registry.get("score", name), scoring.ScoreInputs(given))
    copies = {key: np.repeat(array, 9, 0) for key, array in given.items()}
    groups = {"groups": np.repeat(np.arange(60), 9), "source_groups": np.repeat(np.arange(40), 9)}
    nine = scoring.value_of(registry.get("score", name), scoring.ScoreInputs(copies, **groups))
    alone = scoring.value_of(registry.get("score", name), scoring.ScoreInputs(copies))
    assert nine.high - nine.low > 1.5 * (alone.high - alone.low)
    if name in ("leep", "cka", "frechet"):  # of which copies change no value
        assert (nine.value, nine.low, nine.high) == pytest.approx((one.value, one.low, one.high))
    few = scoring.ScoreInputs(given, groups=np.arange(60) % 9)
    assert scoring.value_of(registry.get("score", name), few).reason == (
        "9 groups; an interval needs 10"
    )


def test_the_value_of_few_rows_has_a_reason_in_place_of_an_interval():
    x, y = rows(9, 4, signal=1)
    found = scoring.value_of(logme, scoring.ScoreInputs({"features": x, "labels": y}))
    assert found.value is not None and found.low is None
    assert found.reason == "9 rows; an interval needs 10"


def test_a_score_says_what_it_reads_and_takes():
    plain = Score(lambda features, labels, k=3: 1.0)
    assert plain.inputs == ("features", "labels")
    assert plain.takes("classes") and plain.takes("label sets")
    assert not plain.takes("numbers") and not plain.takes(None)
    assert frechet.takes(None) and not leep.takes("label sets") and logme.takes("numbers")
    with pytest.raises(ValueError, match="score wrong: parameters without a default are among"):

        @score()
        def wrong(features, colours):
            return 0.0
