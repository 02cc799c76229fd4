"""LogME is the maximum of the evidence, kNN is scikit-learn's, and both rank a good source above a
bad one. Scores of a source and a target read the rows that they may, and what is not defined has no
value.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from contract_rows import OBJECTIVES
from scipy.optimize import minimize
from toys import image_files, image_rows, job_of, label_state, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.specs import NO_OBJECTIVE, ObjectiveSpec
from pipeline.report.source_scores import PairScores
from pipeline.train import online_probe
from pipeline.transfer import measured_shift, scoring, trial
from pipeline.transfer.scores.knn import knn
from pipeline.transfer.scores.leep import leep, nce
from pipeline.transfer.scores.logme import logme
from pipeline.transfer.scoring import SourceTargetPair, score_pair


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
            for start in ((3.0, 1.0), (6.0, 2.0))
        ]
        found.append(-min(t.fun for t in tries) / len(y))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("n", "d", "signal"),
    [(60, 20, 0.5), (80, 10, 3.0), (40, 39, 0.5), (40, 120, 1.0), (30, 30, 0.0)],
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
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    for classes, k in ((2, 1), (3, 5), (4, 7)):
        features, labels = data(90, 6, classes, signal=1.0, seed=classes)
        kept = (labels > 0) | (np.arange(90) % 3 == 0)  # the first class is rare
        features, labels = features[kept], labels[kept]
        nearest = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
        theirs = cross_val_predict(nearest, features, labels, cv=LeaveOneOut())
        want = balanced_accuracy_score(labels, theirs)
        assert knn(features, labels, k) == pytest.approx(want, abs=1e-9)


def test_knn_over_several_blocks_and_with_few_rows():
    """Rows are compared 1024 at a time; none is its own neighbour."""
    features, labels = data(2100, 5, signal=2.0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = unit @ unit.T
    np.fill_diagonal(near, -2)
    is_right = labels[near.argmax(1)] == labels
    want = np.mean([is_right[labels == label].mean() for label in range(3)])
    assert knn(features, labels, 1) == pytest.approx(
        want, abs=1.5 / 2100
    )  # equal similarities may fall either way
    assert (
        knn(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), np.array([0, 0, 1, 1]), 50) == 0.0
    )  # the three others outvote it
    assert knn(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), np.array([0, 0, 1, 1]), 1) == 1.0


def values(found: PairScores) -> dict[str, float | None]:
    return {name: score.value for name, score in found.scores.items()}


def test_a_source_is_scored_on_a_target(tmp_path, monkeypatch):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    pair = SourceTargetPair(
        "src", key, "task", (data_.validation.selection, data_.spec.data.columns)
    )
    found = score_pair(pair, shared)
    assert not found.error and values(score_pair(pair, shared)) == values(found)
    assert PairScores.from_json(json.loads(json.dumps(found.to_json()))) == found
    backbone = bundle.build_backbone(shared.backbone_groups[key].arch)
    bundle.transfer(
        backbone, {n: torch.from_numpy(a) for n, a in shared.weights["src"].items()}, "src"
    )
    pooled = online_probe.features(backbone, data_.train, torch.device("cpu"))[0].numpy()
    assert values(found)["knn"] == knn(pooled, data_.labels)
    assert values(found)["logme"] == pytest.approx(logme(pooled, data_.labels))
    monkeypatch.setattr(scoring, "SCORE_ROWS", 20)
    spread = np.unique(np.linspace(0, 59, 20).astype(int))
    fewer = score_pair(pair, shared)
    assert values(fewer)["knn"] == pytest.approx(knn(pooled[spread], data_.labels[spread]))
    assert (fewer.rows, found.rows, found.source_rows) == (20, 60, 24)


def test_scores_that_are_defined_have_an_interval_and_others_a_reason(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    found = score_pair(SourceTargetPair("src", key, "task"), shared)
    for name, score in found.scores.items():
        if score.value is None:
            assert score.reason and score.low is None
        else:
            assert score.low <= score.value <= score.high and score.seconds > 0, name
    undefined = {name for name, score in found.scores.items() if score.value is None}
    distances = {"frechet", "mmd", "proxy_a"}
    assert distances <= undefined, "a checkpoint's rows are not there"
    assert undefined <= {*distances, "leep", "nce"}
    # rows of a group are no evidence for each other: here each class is a group
    data_ = shared.targets["task", key]
    of_group = data_.spec.data.model_copy(update={"group": data_.spec.data.columns["label"]})
    data_.spec = data_.spec.model_copy(update={"data": of_group})
    found = score_pair(SourceTargetPair("src", key, "task"), shared)
    assert found.scores["knn"].value is None, "no neighbour of another group has a row's class"
    groups = len(np.unique(data_.labels))
    assert found.scores["logme"].value is not None and found.scores["logme"].low is None
    assert found.scores["logme"].reason == f"{groups} groups; an interval needs 10"


def test_labels_of_one_class_have_no_score(tmp_path):
    """Else LEEP and GBC were at their best, 0, and kNN at 1 for every source."""
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    shared.targets["task", key].train.arrays["label"][:] = 1
    found = score_pair(SourceTargetPair("src", key, "task"), shared)
    of_labels = [name for name, score in scoring.scores().items() if "labels" in score.inputs]
    assert len(of_labels) == 9 and {found.scores[name].value for name in of_labels} == {None}


def test_a_class_of_few_rows_leaves_a_reason_in_place_of_the_interval(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    labels = shared.targets["task", key].train.arrays["label"]
    labels[:] = 1
    labels[:2] = 0
    found = score_pair(SourceTargetPair("src", key, "task"), shared).scores["knn"]
    assert found.value is not None and found.low is None
    assert found.reason == (
        "undefined on a random half of the rows: labels of one class alone, or rows that the score "
        "cannot distinguish"
    )


def test_the_classes_of_the_source_are_those_of_its_head(tmp_path):
    """LEEP reads what the source's own head says of the target's rows."""
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    spec = ObjectiveSpec("classification", {"norm": False}, label_state(5))
    task = bundle.build_task(data_.arch, spec, seed=3)
    head = {name: tensor.numpy() for name, tensor in task.objective.state_dict().items()}
    shared.heads["src"] = (spec, head)
    backbone = bundle.build_backbone(data_.arch)
    bundle.transfer(
        backbone, {n: torch.from_numpy(a) for n, a in shared.weights["src"].items()}, "src"
    )
    pooled = online_probe.features(backbone, data_.train, torch.device("cpu"))[0].numpy()
    logits = pooled.astype(np.float64) @ head["head.weight"].T + head["head.bias"]
    theta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = values(score_pair(SourceTargetPair("src", key, "task"), shared))
    assert found["leep"] == pytest.approx(leep(theta, data_.labels), abs=1e-6)
    assert found["nce"] == pytest.approx(nce(theta, data_.labels), abs=1e-6)
    shared.heads["src"] = (ObjectiveSpec("simclr", {}, {}), {})
    without = score_pair(SourceTargetPair("src", key, "task"), shared).scores["leep"]
    assert (without.value, without.reason) == (
        None,
        "the source predicts no single class of a row (it is of simclr)",
    )
    shared.heads["src"] = (NO_OBJECTIVE, {})  # as those of a checkpoint from a hub
    without = score_pair(SourceTargetPair("src", key, "task"), shared)
    assert without.scores["logme"].value is not None, without.error
    reason = "the source is a checkpoint without classes of its own"
    assert without.scores["leep"].reason == reason


def test_where_no_label_may_be_used_only_distances_are_defined(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    data_.spec = data_.spec.model_copy(update={"label_fractions": [0]})
    rows = (data_.test.selection, data_.spec.data.columns)
    found = score_pair(SourceTargetPair("src", key, "task", rows), shared)
    defined = {name for name, score in found.scores.items() if score.value is not None}
    assert defined == {"frechet", "mmd", "proxy_a"} and found.rows == 60
    assert found.scores["logme"].reason == "label_fractions: 0 allows no label"


def test_scores_are_computed_once_for_the_same_weights_rows_and_labels(tmp_path, monkeypatch):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    data_.key, shared.source_keys["src"] = "rows", "source"
    pair, passes = SourceTargetPair("src", key, "task"), []
    compute = scoring.features_of_ids

    def counted(*args):
        passes.append(1)
        return compute(*args)

    monkeypatch.setattr(scoring, "features_of_ids", counted)
    found = score_pair(pair, shared)
    assert score_pair(pair, shared) == found and len(passes) == 1, "one pass for all scores"
    changes = [
        lambda: shared.source_keys.update(src="another"),
        lambda: shared.parent_weights.update(src="other weights"),
        lambda: setattr(data_, "key", "other rows"),
        lambda: setattr(
            data_, "spec", data_.spec.model_copy(update={"label_fractions": [0.5, 1.0]})
        ),
    ]
    for number, change in enumerate(changes):
        change()
        score_pair(pair, shared)
        assert len(passes) == 2 + number
    next(iter(shared.weights["src"].values()))[...] = np.nan
    shared.parent_weights.update(src="damaged")
    assert score_pair(pair, shared).error and score_pair(pair, shared).error
    assert len(passes) == 4 + len(changes) - 1, "a failure is not kept"


@pytest.mark.parametrize("name", ["clm", "detection", "ctc"])
def test_a_target_without_classes_has_distances_alone(tmp_path, name):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    data_ = shared.targets["task", key]
    data_.objective = dataclasses.replace(data_.objective, name=name)
    rows = (data_.test.selection, data_.spec.data.columns)
    found = score_pair(SourceTargetPair("src", key, "task", rows), shared)
    defined = {name for name, score in found.scores.items() if score.value is not None}
    assert defined == {"frechet", "mmd", "proxy_a"}
    assert f"{name} gives neither rows nor their positions" in found.scores["logme"].reason


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
    allowed = scoring.rows_of_every_fraction(shared, data_)
    assert len(allowed) == rows
    for fraction in fractions:
        trial_rows = trial.resolve_training(
            trial_of(job, shared, "full", fraction=fraction), shared
        )[1]
        assert set(data_.train.subset(allowed).selection.ids(np.arange(rows))) <= set(
            trial_rows.selection.ids(np.arange(len(trial_rows)))
        )
    want = values(score_pair(SourceTargetPair("src", key, name), shared))
    data_.labels = data_.labels.copy()  # what the fractions are drawn by
    data_.train.arrays["label"][np.setdiff1d(np.arange(60), allowed)] = (
        2  # labels of rows that may not be read
    )
    assert values(score_pair(SourceTargetPair("src", key, name), shared)) == want


def test_shares_and_rows_per_class_have_only_the_rows_that_both_have():
    """Of 10 and 50 rows of two classes: 3 per class, or 1 and 5. Neither has all of the other's."""
    rows, labels = image_rows(60, classes=2), np.repeat([0, 1], [10, 50])
    spec = SimpleNamespace(label_fractions=[3, 0, 0.1])
    shared, data_ = SimpleNamespace(seed=0), SimpleNamespace(train=rows, labels=labels, spec=spec)
    allowed = scoring.rows_of_every_fraction(shared, data_)
    assert np.bincount(labels[allowed]).tolist() == [1, 3]


@pytest.mark.parametrize("of_all", [True, False])
def test_one_bad_score_is_a_reason_beside_the_others(tmp_path, monkeypatch, of_all):
    """It runs out of memory on all rows or on halves of them, and is not kept: it may work again."""
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    shared.targets["task", key].key, shared.source_keys["src"] = "rows", "source"
    known = scoring.scores()

    def broken(features, labels):
        if of_all or len(labels) < 60:
            raise TypeError("no memory")
        return 0.5

    worse = {**known, "knn": dataclasses.replace(known["knn"], function=broken)}
    monkeypatch.setattr(scoring, "scores", lambda: worse)
    pair = SourceTargetPair("src", key, "task")
    found = score_pair(pair, shared)
    assert not found.error and found.scores["logme"].value is not None
    bad = found.scores["knn"]
    assert bad.reason.endswith("TypeError: no memory")
    assert (bad.value, bad.low) == (None if of_all else 0.5, None)
    monkeypatch.setattr(scoring, "scores", lambda: known)
    again = score_pair(pair, shared)
    assert again.scores["knn"].low is not None and not again.scores["knn"].reason
    monkeypatch.setattr(scoring, "scores", lambda: worse)
    assert score_pair(pair, shared).scores["knn"].value == again.scores["knn"].value, "kept now"


def test_weights_that_are_not_finite_have_no_score(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 24})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    next(iter(shared.weights["src"].values()))[...] = np.nan
    found = score_pair(SourceTargetPair("src", next(iter(shared.backbone_groups)), "task"), shared)
    assert "the features of source src are not finite for 60 of 60 rows" in found.error
    assert set(values(found).values()) == {None}


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
        pair = SourceTargetPair("src", next(iter(shared.backbone_groups)), "task")
        found.append(values(score_pair(pair, shared)))
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


# ---------------------------------------------------------------- every kind of target

OF_CLASSES = {"cka", "gbc", "h_score", "knn", "logme", "nleep", "transrate"}
DEFINED = {
    "classification": OF_CLASSES,
    "tagging": OF_CLASSES,
    "hourly": OF_CLASSES,
    "multilabel": {"cka", "knn", "logme"},
    "behaviour_cloning": {"cka", "logme"},
    "regression": {"cka", "logme"},
}
"""Objective to the scores that are defined without a source's rows and classes."""


@pytest.mark.parametrize("name", registry.names("objective"))
def test_every_kind_of_target_has_the_scores_that_are_defined_for_it(name, monkeypatch):
    monkeypatch.setattr(measured_shift, "drift", lambda *_: ())  # reads files, and here are none
    built = OBJECTIVES[name].build(name)
    backbone, objective = built.task.backbone, built.task.objective
    data_ = SimpleNamespace(
        objective=ObjectiveSpec(name, objective.options.model_dump(), objective.state),
        arch=backbone.arch,
        train=built.rows,
        test=built.rows,
        labels=None,
        label_names=(),
        spec=SimpleNamespace(
            label_fractions=[1.0],
            data=SimpleNamespace(columns=built.rows.decoder.columns, group=None),
        ),
    )
    weights = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
    shared = SimpleNamespace(
        seed=0,
        heads={},
        targets={("task", "key"): data_},
        weights={"src": weights},
        source_keys={},
    )
    found = score_pair(SourceTargetPair("src", "key", "task"), shared)  # type: ignore[arg-type]
    assert not found.error
    defined = {name for name, score in found.scores.items() if score.value is not None}
    assert defined == DEFINED.get(name, set())
    assert not any("shift" in one.missing for one in found.shifts), "rows of any kind are compared"
    kinds = scoring.label_kinds(type(objective), objective.state)
    read_here = {
        name: one
        for name, one in scoring.scores().items()
        if {*one.inputs} <= {"features", "labels"}
    }
    allowed = {name for name, one in read_here.items() if any(map(one.takes, kinds))}
    assert defined == allowed, "what the job file is checked by"


def test_labels_of_words_are_scored_by_the_features_of_words():
    built = OBJECTIVES["tagging"].build("tagging")
    ids, found, labelled, labels, row = scoring.features_of_positions(
        built.task.objective, built.task.backbone, built.rows, torch.device("cpu")
    )
    tags = built.rows.arrays["tags"]
    words = built.rows.arrays["words"]
    read = [tags[i, word] for i in range(len(words)) for word in words[i] if word >= 0]
    assert len(found) == len(built.rows) and len(labelled) == len(labels)
    assert sorted(labels.tolist()) == sorted(tag for tag in read if tag >= 0)
    places = np.searchsorted(built.rows.selection.ids(np.arange(len(words))), ids)
    assert sorted(places) == list(range(len(words)))
    tagged = [sum(tags[i, word] >= 0 for word in words[i] if word >= 0) for i in places]
    assert np.bincount(row).tolist() == tagged, "each word is of its row"
