"""LogME is the maximum of the evidence, kNN is scikit-learn's, and both rank a good source above a
bad one.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import minimize
from toys import image_files, job_of, shared_of, trial_of

from pipeline.config.schema import Job
from pipeline.transfer import scores, trial
from pipeline.transfer.scores import knn, logme


def data(n: int, d: int, classes: int = 3, signal: float = 1.0, seed: int = 0):
    """Features with a part that tells the class, of unequal scales as a network's are."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    features = (
        rng.normal(size=(n, d)) * np.exp(rng.normal(size=d))
        + signal * rng.normal(size=(classes, d))[labels]
    )
    return features.astype(np.float32), labels


def evidence(features: np.ndarray, y: np.ndarray, log_alpha: float, log_beta: float) -> float:
    """log p(y | F, alpha, beta) as the density of y ~ N(0, I / beta + F F^T / alpha): no fixed
    point, no SVD, no posterior mean.
    """
    from scipy.stats import multivariate_normal

    covariance = np.eye(len(y)) / np.exp(log_beta) + features @ features.T / np.exp(log_alpha)
    return float(multivariate_normal.logpdf(y, np.zeros(len(y)), covariance))


def maximum(features: np.ndarray, labels: np.ndarray) -> float:
    found = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        tries = [
            minimize(
                lambda x, y=y: -evidence(features.astype(np.float64), y, *x),
                start,
                method="Nelder-Mead",
                options={"xatol": 1e-7, "fatol": 1e-9, "maxiter": 2000},
            )
            for start in ((0.0, 0.0), (3.0, 1.0), (3.0, 5.0), (6.0, 2.0))
        ]
        found.append(-min(t.fun for t in tries) / len(y))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("n", "d", "signal"),
    [(60, 4, 1.0), (60, 20, 0.5), (80, 10, 3.0), (40, 39, 0.5), (40, 120, 1.0), (30, 30, 0.0)],
)
def test_logme_is_the_maximum_of_the_evidence(n, d, signal):
    features, labels = data(n, d, signal=signal)
    assert logme(features, labels) == pytest.approx(maximum(features, labels), abs=1e-4)


def test_logme_of_more_directions_than_rows():
    """The wide case: a part of the prior is never seen by the data and must not enter."""
    features, labels = data(40, 60, signal=0.0)
    wide = np.concatenate([features[:, :30], np.zeros((40, 50), np.float32)], axis=1)
    assert logme(wide, labels) == pytest.approx(logme(features[:, :30], labels), abs=1e-6)
    assert np.isfinite(logme(features, labels))


def test_logme_of_few_rows_is_a_number():
    """A small target on wide features is the common case: the published fixed point gave NaN or
    -inf for a third of these.
    """
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n, d, classes = int(rng.integers(6, 80)), int(rng.integers(4, 600)), int(rng.integers(2, 6))
        features, labels = data(n, d, classes, float(rng.choice([0, 0.3, 1, 10])), seed)
        assert -10 < logme(np.maximum(features, 0) if seed % 2 else features, labels) < 10


def test_logme_does_not_depend_on_the_basis_or_the_names_of_labels():
    features, labels = data(60, 8)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    assert logme(features @ turn, labels) == pytest.approx(logme(features, labels), abs=1e-5)
    assert logme(features, labels * 7 + 3) == pytest.approx(logme(features, labels), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_scores_grow_with_what_features_tell(seed):
    found = [data(300, 16, signal=signal, seed=seed) for signal in (0.0, 0.5, 2.0)]
    for score in (logme, knn):
        values = [score(*pair) for pair in found]
        assert values == sorted(values) and values[2] > values[0] + 0.1


@pytest.mark.parametrize("case", ["constant", "nought", "perfect", "one row a class", "duplicates"])
def test_logme_of_odd_features_is_a_number(case):
    labels = np.arange(30) % 3
    features = {
        "constant": np.ones((30, 5)),
        "nought": np.zeros((30, 5)),
        "perfect": np.eye(3)[labels],
        "one row a class": np.eye(3),
        "duplicates": np.repeat(np.eye(3)[labels], 4, 1),
    }[case]
    value = logme(features.astype(np.float32), labels[: len(features)])
    assert np.isfinite(value)


def test_knn_is_scikit_learns_leave_one_out():
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    for classes, k in ((2, 1), (3, 5), (4, 7)):
        features, labels = data(90, 6, classes, signal=1.0, seed=classes)
        theirs = cross_val_score(
            KNeighborsClassifier(k, metric="cosine", algorithm="brute"),
            features,
            labels,
            cv=LeaveOneOut(),
        ).mean()
        assert knn(features, labels, k) == pytest.approx(theirs, abs=1e-9)


def test_knn_over_several_blocks_and_with_few_rows():
    """Rows are compared 1024 at a time; none is its own neighbour."""
    features, labels = data(2100, 5, signal=2.0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, -2)
    want = (labels[near.argmax(1)] == labels).mean()
    assert knn(features, labels, 1) == pytest.approx(
        want, abs=1.5 / 2100
    )  # equal similarities may fall either way
    assert (
        knn(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), np.array([0, 0, 1, 1]), 50) == 0.0
    )  # the three others outvote it
    assert knn(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), np.array([0, 0, 1, 1]), 1) == 1.0


def test_a_source_is_scored_on_a_target(tmp_path, monkeypatch):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    found = scores.score(shared, "src", key, "task")
    assert list(found) == ["logme", "knn"] and scores.score(shared, "src", key, "task") == found
    from pipeline.checkpoints import bundle
    from pipeline.transfer.cached_heads import features

    backbone = bundle.build_backbone(shared.backbone_groups[key].arch)
    bundle.transfer(
        backbone, {n: torch.from_numpy(a) for n, a in shared.weights["src"].items()}, "src"
    )
    pooled, _ = features(backbone, data_.train, torch.device("cpu"))
    assert found["knn"] == knn(pooled.numpy(), data_.labels) and found["logme"] == pytest.approx(
        logme(pooled.numpy(), data_.labels)
    )
    monkeypatch.setattr(scores, "SCORE_ROWS", 20)
    assert scores.score(shared, "src", key, "task", ("knn",)) == {
        "knn": pytest.approx(
            knn(
                pooled.numpy()[np.unique(np.linspace(0, 59, 20).astype(int))],
                data_.labels[np.unique(np.linspace(0, 59, 20).astype(int))],
            )
        )
    }
    data_.objective = dataclasses.replace(data_.objective, name="clm")
    with pytest.raises(ValueError, match=r"targets\.task: scores need labels, the objective clm"):
        scores.score(shared, "src", key, "task")


@pytest.mark.parametrize(
    ("fractions", "rows"), [([0.1, 1.0], 6), ([1.0], 60), ([4, 0.5], 12), ([2, 9], 6)]
)
def test_scores_read_no_label_that_the_poorest_trials_may_not(tmp_path, fractions, rows):
    """A choice of sources by all labels would help the trials that must do with a few: the rows are
    those of seed 0's smallest fraction.
    """
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    job = job_of(tmp_path, paths, label_fractions=fractions)
    shared = shared_of(tmp_path, job, paths)
    (name, key), data_ = next(iter(shared.targets.items()))
    allowed = scores.fewest_labels(shared, data_)
    assert len(allowed) == rows
    for fraction in fractions:
        trial_rows = trial.resolve_training(
            trial_of(job, shared, "full", fraction=fraction), shared
        )[1]
        assert set(data_.train.subset(allowed).selection.ids(np.arange(rows))) <= set(
            trial_rows.selection.ids(np.arange(len(trial_rows)))
        )
    want = scores.score(shared, "src", key, name)
    data_.labels = data_.labels.copy()  # what the fractions are drawn by
    data_.train.arrays["label"][np.setdiff1d(np.arange(60), allowed)] = (
        2  # labels of rows that may not be read
    )
    assert scores.score(shared, "src", key, name) == want


def test_weights_that_are_not_finite_have_no_score(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    next(iter(shared.weights["src"].values()))[...] = np.nan
    with pytest.raises(
        ValueError,
        match=r"targets\.task: the features of source src are not finite for 60 of 60 rows",
    ):
        scores.score(shared, "src", next(iter(shared.backbone_groups)), "task")


def test_a_row_that_cannot_be_decoded_as_it_is_read_shifts_no_label(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    table = pq.read_table(paths["train"])
    pictures = [
        b"no picture" if i == 5 else picture
        for i, picture in enumerate(table["picture"].to_pylist())
    ]
    pq.write_table(
        table.set_column(0, "picture", pa.array(pictures)), paths["train"], row_group_size=16
    )
    found = []
    for decode in ("memory", "train"):
        job = job_of(tmp_path, paths).model_dump(mode="json")
        job["targets"]["task"]["data"]["decode"] = decode
        shared = shared_of(tmp_path, Job.model_validate(job), paths)
        found.append(scores.score(shared, "src", next(iter(shared.backbone_groups)), "task"))
    assert found[0] == pytest.approx(found[1])


def test_scores_of_label_sets():
    """LogME is the mean over the labels that tell rows apart; kNN the macro AUROC of how many
    neighbours have a label.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    features, kinds = data(60, 12, classes=3)
    sets = np.stack([kinds == 1, kinds > 0, kinds < 0, kinds >= 0], axis=1).astype(
        np.uint8
    )  # the third never, the last always
    assert logme(features, sets) == pytest.approx(
        np.mean([logme(features, column[:, None]) for column in sets.T[:2]]), abs=1e-9
    )
    assert logme(features, np.eye(3, dtype=np.uint8)[kinds]) == pytest.approx(
        logme(features, kinds), abs=1e-9
    )
    near = (
        NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute")
        .fit(features)
        .kneighbors(features, return_distance=False)[:, 1:]
    )
    want = [roc_auc_score(column, column[near].sum(1)) for column in sets.T[:2].astype(int)]
    assert knn(features, sets) == pytest.approx(np.mean(want), abs=1e-9)
    assert np.isnan(logme(features, sets[:, 2:])) and np.isnan(knn(features, sets[:, 2:]))
