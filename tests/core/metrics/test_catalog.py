"""Metrics against scikit-learn and their formulas; units give the value back."""

import math
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics as theirs
import torch

from pipeline.config import registry
from pipeline.core.metrics import calibration, catalog, classes
from pipeline.core.metrics.catalog import metric
from pipeline.core.metrics.label_sets import scored
from pipeline.report import stats

METRICS = {name: metric(name) for name in registry.names("metric")}


def predictions(n=200, classes=5, seed=0, skill=1.0, labels=None):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n) if labels is None else np.asarray(labels)
    scores = rng.normal(size=(len(label), classes)).astype(np.float32)
    scores[np.arange(len(label)), label] += skill
    return {
        "scores": scores,
        "label": label.astype(np.int64),
        "loss": rng.gamma(2.0, size=len(label)),
        "row": np.arange(len(label)),
    }


def label_sets(n=120, labels=6, seed=0, skill=1.0, step=None, share=None):
    """Predictions of several labels a row; ``step`` rounds the scores, so that many are equal."""
    rng = np.random.default_rng([seed, 7])
    truth = rng.random((n, labels)) < (np.linspace(0.05, 0.6, labels) if share is None else share)
    scores = rng.normal(size=(n, labels)) + skill * (truth - 0.5)
    scores = np.round(scores / step) * step if step else scores
    return {
        "scores": scores.astype(np.float32),
        "labels": truth.astype(np.uint8),
        "loss": rng.gamma(2.0, size=n),
    }


def repeated(p, counts):
    """The rows of one resample, each as often as it was drawn."""
    return {name: np.repeat(array, counts, axis=0) for name, array in p.items()}


def everything(n=200, classes=7):
    """Predictions with all that any metric reads."""
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(1, 50, (n, classes)) for name in ("intersection", "actual")}
    texts = {"exact": rng.integers(0, 2, n), "f1": rng.random(n), "bytes": rng.integers(1, 900, n)}
    heard = {
        "word_errors": rng.integers(0, 9, n),
        "char_errors": rng.integers(0, 40, n),
        "chars": rng.integers(1, 90, n),
    }
    return {
        "labels": label_sets(n, classes)["labels"],
        **predictions(n, classes),
        **texts,
        **heard,
        **entities(n, classes),
        **pixels,
        **policies(n),
        "prediction": rng.normal(size=n),
        "value": rng.normal(size=n),
        "threshold": np.full(n, 0.2),
    }


def policies(n=200, seed=0):
    """Errors of actions, and what an episode of each row's world came to: the policy's own, the
    demonstration's and a random policy's.
    """
    rng = np.random.default_rng([seed, 5])
    episodes = {
        f"{who}{name}": values
        for who in ("", "expert_", "random_")
        for name, values in (
            ("success", rng.integers(0, 2, n).astype(float)),
            ("return", rng.normal(size=n)),
            ("steps", rng.integers(1, 400, n).astype(float)),
        )
    }
    numbers = 3 * rng.integers(1, 9, n)
    return {
        **episodes,
        "squared_error": rng.gamma(2.0, size=n) * numbers,
        "action_numbers": numbers,
    }


def entities(n=200, types=7, seed=0):
    """Counts of entities by row and type, and of words."""
    rng = np.random.default_rng([seed, 3])
    hits = rng.poisson(0.4, (n, types))
    words = rng.integers(1, 40, n)
    return {
        "hits": hits,
        "guessed": hits + rng.poisson(0.2, (n, types)),
        "actual": hits + rng.poisson(0.3, (n, types)),
        "words": words,
        "right": rng.binomial(words, 0.8),
    }


def softmax(scores):
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("skill", [0.0, 1.5])
def test_metrics_equal_scikit_learn(classes, skill):
    p = predictions(classes=classes, skill=skill)
    y, guess = p["label"], p["scores"].argmax(1)
    want = {
        "accuracy": theirs.accuracy_score(y, guess),
        "top5_accuracy": theirs.top_k_accuracy_score(y, p["scores"], k=5, labels=range(classes))
        if classes > 5
        else 1.0,
    }
    assert {name: metric(name).value(p) for name in want} == pytest.approx(want, abs=1e-6)


def test_loss_is_the_mean_and_perplexity_its_exponential():
    p = predictions()
    assert metric("loss").value(p) == pytest.approx(p["loss"].mean())
    assert metric("perplexity").value(p) == pytest.approx(math.exp(p["loss"].mean()))


def test_rows_with_counts_are_weighed_by_them():
    """A language model's row holds a sum of losses and how many there are."""
    p = {"loss": np.array([6.0, 1.0, 0.0]), "count": np.array([3.0, 1.0, 0.0])}
    assert metric("loss").value(p) == pytest.approx(7 / 4) and metric("perplexity").value(
        p
    ) == pytest.approx(math.exp(7 / 4))


def test_bits_per_byte_is_the_same_whatever_the_tokens():
    """Two tokenizers, a document of 40 bytes read with 0.5 bits each: the loss in nats, over 10
    tokens or over 25.
    """
    nats = 20 * math.log(2)
    coarse = {
        "loss": np.array([nats]),
        "count": np.array([10.0]),
        "bytes": np.array([40.0], np.float32),
    }
    fine = {
        "loss": np.array([nats / 4, 3 * nats / 4]),
        "count": np.array([5.0, 20.0]),
        "bytes": np.array([10.0, 30.0], np.float32),
    }
    assert (
        metric("bits_per_byte").value(coarse)
        == pytest.approx(0.5, abs=1e-12)
        == metric("bits_per_byte").value(fine)
    )
    assert metric("perplexity").value(coarse) != pytest.approx(metric("perplexity").value(fine))
    # Rows packed before bytes were counted
    assert math.isnan(
        metric("bits_per_byte").value({"loss": np.array([1.0]), "count": np.array([1.0])})
    )


def test_metrics_of_entities_words_and_answers_are_their_formulas():
    p = entities()
    hits, precision, recall = (
        p["hits"].sum(),
        p["hits"].sum() / p["guessed"].sum(),
        p["hits"].sum() / p["actual"].sum(),
    )
    assert (
        metric("entity_f1").value(p) == pytest.approx(2 * precision * recall / (precision + recall))
        and hits > 0
    )
    assert metric("word_accuracy").value(p) == pytest.approx(p["right"].sum() / p["words"].sum())
    q = {"exact": np.array([1.0, 0, 0]), "f1": np.array([1.0, 0.5, 0])}
    assert metric("exact_match").value(q) == pytest.approx(1 / 3) and metric("answer_f1").value(
        q
    ) == pytest.approx(0.5)


def test_metrics_of_policies_are_means_over_numbers_and_over_episodes():
    p = policies()
    assert metric("action_error").value(p) == pytest.approx(
        p["squared_error"].sum() / p["action_numbers"].sum()
    )
    for name in (
        "success",
        "return",
        "steps",
        "expert_success",
        "expert_return",
        "expert_steps",
        "random_success",
        "random_return",
        "random_steps",
    ):
        assert (
            metric(name).value(p) == pytest.approx(p[name].mean())
            and metric(name).units(p)[:, 1].tolist() == [1.0] * 200
        )


def test_a_huge_loss_has_a_perplexity_and_not_an_error():
    assert metric("perplexity").value({"loss": np.array([1e4])}) == math.exp(700)


@pytest.mark.parametrize("name", [name for name, of in METRICS.items() if of.units])
def test_units_give_the_value(name):
    of, p = metric(name), everything()
    units = of.units(p)
    assert units.shape == (200, 2) and units.dtype == np.float64
    assert of.of_units(units) == pytest.approx(of.value(p), abs=1e-12)
    half = {key: array[:100] for key, array in p.items()}
    # A unit belongs to its row
    assert of.of_units(units[:100]) == pytest.approx(of.value(half), abs=1e-12)


@pytest.mark.parametrize("name", [name for name, of in METRICS.items() if of.units])
def test_nothing_counted_is_not_a_number(name):
    p = {key: array[:0] for key, array in everything().items()}
    assert math.isnan(metric(name).value(p)) and math.isnan(metric(name).of_units(np.zeros((0, 2))))


def test_directions():
    assert {name for name, of in METRICS.items() if not of.higher_is_better} == {
        "loss",
        "perplexity",
        "bits_per_byte",
        "bits_per_sample",
        "wer",
        "cer",
        "brier",
        "ece",
        "action_error",
        "mae",
        "rmse",
        "eer",
        "min_dcf",
    }


def test_an_unknown_metric_is_named_with_its_nearest():
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'; did you mean accuracy"):
        metric("acuracy")


# ------------------------------------------ two classes, probabilities, and several positions a row

CLINICAL = (
    "auroc",
    "auprc",
    "min_precision_sensitivity",
    "brier",
    "ece",
    "loss",
    "f1_at_threshold",
    "precision_at_threshold",
    "sensitivity_at_threshold",
    "specificity_at_threshold",
)


def risks(n=200, seed=0, skill=1.0, step=None, share=0.2, threshold=0.3):
    """Predictions of two classes, the second rare; ``step`` rounds the scores, so that many are
    equal.
    """
    label = (np.random.default_rng([seed, 1]).random(n) < share).astype(np.int64)
    label[:2] = 0, 1
    p = predictions(n, 2, seed, skill, label[:n])
    p["scores"] = np.round(p["scores"] / step).astype(np.float32) * step if step else p["scores"]
    return {**p, "threshold": np.full(n, threshold)}


def clinical_of_theirs(p):
    y, chance = p["label"], softmax(p["scores"].astype(np.float64))[:, 1]
    called = chance >= p["threshold"]
    both = 0 < y.sum() < len(y)
    precision, sensitivity, _ = (
        theirs.precision_recall_curve(y, chance) if both else ([np.nan], [np.nan], 0)
    )
    bins = [
        np.flatnonzero((chance >= k / 15) & ((chance < (k + 1) / 15) | (k == 14)))
        for k in range(15)
    ]

    def share(part, whole):
        return part.sum() / whole.sum() if whole.any() else np.nan

    return {
        "auroc": theirs.roc_auc_score(y, chance) if both else np.nan,
        "auprc": theirs.average_precision_score(y, chance) if both else np.nan,
        "min_precision_sensitivity": np.minimum(precision, sensitivity).max(),
        "brier": theirs.brier_score_loss(y, chance),
        "loss": p["loss"].mean(),
        "ece": sum(len(b) / len(y) * abs(y[b].mean() - chance[b].mean()) for b in bins if len(b)),
        "f1_at_threshold": theirs.f1_score(y, called, zero_division=np.nan),
        "precision_at_threshold": share(called & (y == 1), called),
        "sensitivity_at_threshold": share(called & (y == 1), y == 1),
        "specificity_at_threshold": share(~called & (y == 0), y == 0),
    }


def test_fifty_random_cases_of_two_classes_equal_scikit_learn():
    """Ties, few rows, rare and common positives; and their resamples equal scikit-learn's on
    repeated rows.
    """
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 120))
        p = risks(
            n,
            seed,
            rng.choice([0, 1, 3]),
            rng.choice([None, 0.5, 4.0]),
            rng.choice([0.05, 0.5, 0.9]),
            rng.choice([0.05, 0.5, 0.8]),
        )
        want = clinical_of_theirs(p)
        assert {name: metric(name).value(p) for name in want} == pytest.approx(
            want, abs=1e-6, nan_ok=True
        )
        counts = rng.multinomial(n, np.full(n, 1 / n), size=6)
        each = [clinical_of_theirs(repeated(p, row)) for row in counts]
        for name in CLINICAL:
            of = metric(name)
            found = (
                of.resampled(p, counts)
                if of.resampled
                else [of.of_units(repeated({"u": of.units(p)}, row)["u"]) for row in counts]
            )
            assert found == pytest.approx([one[name] for one in each], abs=1e-6, nan_ok=True), name


def test_the_positive_class_is_the_second():
    """AUROC is the same from either side, the area under the precision-recall curve is not."""
    p = risks(share=0.1)
    turned = {**p, "scores": p["scores"][:, ::-1], "label": 1 - p["label"]}
    assert metric("auroc").value(p) == pytest.approx(metric("auroc").value(turned), abs=1e-12)
    assert metric("auprc").value(turned) > metric("auprc").value(p) + 0.2
    assert metric("ece").value(p) == pytest.approx(metric("ece").value(turned), abs=0.05)
    assert metric("brier").value(p) == pytest.approx(metric("brier").value(turned), abs=1e-12)


def test_of_more_classes_the_brier_score_is_brier_s_and_the_calibration_error_the_likeliest_class_s():
    from torchmetrics.functional.classification import multiclass_calibration_error

    p = predictions(300, 4)
    chance = softmax(p["scores"].astype(np.float64))
    assert metric("brier").value(p) == pytest.approx(
        ((chance - np.eye(4)[p["label"]]) ** 2).sum(1).mean(), abs=1e-9
    )
    want = multiclass_calibration_error(
        torch.from_numpy(chance), torch.from_numpy(p["label"]), 4, n_bins=15
    ).item()
    assert metric("ece").value(p) == pytest.approx(want, abs=1e-6)
    assert metric("auprc").value(p) == pytest.approx(
        np.mean([theirs.average_precision_score(p["label"] == k, chance[:, k]) for k in range(4)]),
        abs=1e-9,
    )


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_kappa_equals_scikit_learn(classes):
    """Linear weights; in resamples too, which may miss classes."""
    p = predictions(80, classes, seed=classes)
    counts = np.random.default_rng(1).multinomial(80, np.full(80, 1 / 80), size=20)

    def kappa(q):
        return theirs.cohen_kappa_score(
            q["label"], q["scores"].argmax(1), weights="linear", labels=range(classes)
        )

    assert metric("kappa").value(p) == pytest.approx(kappa(p), abs=1e-9)
    assert metric("kappa").resampled(p, counts) == pytest.approx(
        [kappa(repeated(p, row)) for row in counts], abs=1e-9
    )
    assert math.isnan(
        metric("kappa").value({"scores": np.eye(3)[[1, 1]], "label": np.array([1, 1])})
    )


def hourly(n=30, classes=2, most=9, seed=0):
    """Predictions at 0 to ``most`` positions a row, what is behind a row's last one NaN and -1, as
    evaluation pads them.
    """
    rng = np.random.default_rng([seed, 5])
    known = np.arange(most) < rng.integers(0, most + 1, n)[:, None]
    label = np.where(known, rng.integers(0, classes, (n, most)), -1)
    scores = np.where(
        known[..., None],
        rng.normal(size=(n, most, classes)) + (np.arange(classes) == label[..., None]),
        np.nan,
    ).astype(np.float32)
    return {
        "scores": scores,
        "label": label,
        "loss": rng.gamma(2.0, size=n) * known.sum(1),
        "count": known.sum(1).astype(float),
        "threshold": np.full(n, 0.4),
    }


def flat(p):
    """Every position as a row of its own."""
    known = p["label"] >= 0
    return {
        "scores": p["scores"][known],
        "label": p["label"][known],
        "loss": np.zeros(known.sum()),
        "threshold": np.full(known.sum(), 0.4),
    }


@pytest.mark.parametrize(
    "name",
    [
        "auroc",
        "auprc",
        "min_precision_sensitivity",
        "brier",
        "ece",
        "accuracy",
        "macro_f1",
        "balanced_accuracy",
        "kappa",
        "f1_at_threshold",
        "precision_at_threshold",
        "sensitivity_at_threshold",
        "specificity_at_threshold",
    ],
)
@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_of_positions_are_those_of_all_of_them_together(name, classes):
    """A resample draws rows with all of their positions."""
    p, of = hourly(classes=classes), metric(name)
    assert of.value(p) == pytest.approx(of.value(flat(p)), abs=1e-12)
    counts = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=8)
    found = (
        of.resampled(p, counts)
        if of.resampled
        else [of.of_units(np.repeat(of.units(p), row, axis=0)) for row in counts]
    )
    assert found == pytest.approx([of.value(flat(repeated(p, row))) for row in counts], abs=1e-12)


def test_intervals_of_positions_draw_rows_and_groups():
    """Positions of one row go together, so their interval is wider than one over positions; draws
    are made in parts that fit.
    """
    p = hourly(60, most=40)
    p["label"] = np.where(p["label"] < 0, -1, np.arange(60)[:, None] % 2)
    # A row's positions are alike, and err alike
    p["scores"] += np.random.default_rng(0).normal(size=(60, 1, 1)) * [
        0,
        1,
    ]
    rows, positions = (stats.interval(metric("auroc"), q) for q in (p, flat(p)))
    assert rows[1] - rows[0] > 1.3 * (positions[1] - positions[0])
    groups = stats.interval(metric("auroc"), p, groups=np.arange(60) // 6)
    assert groups[1] - groups[0] > 0 and groups != rows


# ---------------------------------------------------------------- temperature and threshold


def test_the_temperature_is_the_one_with_the_smallest_loss():
    from scipy.optimize import minimize_scalar

    p = predictions(400, 3, skill=1.0)
    found = calibration.temperature(4 * p["scores"], p["label"])
    best = minimize_scalar(
        lambda t: theirs.log_loss(p["label"], softmax(4 * p["scores"].astype(np.float64) / t)),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert (
        found
        == pytest.approx(best.x, rel=1e-4)
        == pytest.approx(4 * calibration.temperature(p["scores"], p["label"]), rel=1e-4)
    )
    sets = label_sets(400, 5)
    found = calibration.temperature(3 * sets["scores"], sets["labels"])
    best = minimize_scalar(
        lambda t: np.logaddexp(
            0, np.where(sets["labels"], -3, 3) * sets["scores"].astype(np.float64) / t
        ).mean(),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-8},
    )
    assert found == pytest.approx(best.x, rel=1e-4)


def test_a_temperature_is_never_nought_or_endless():
    right = np.eye(3)[[0, 1, 2]]
    assert calibration.temperature(right, np.arange(3)) == pytest.approx(
        0.05
    ) and calibration.temperature(right, np.array([1, 2, 0])) == pytest.approx(20)
    assert (
        calibration.temperature(right[:0], np.zeros(0, np.int64))
        == 1
        == calibration.temperature(right * np.nan, np.arange(3))
    )
    assert calibration.sigmoid(np.array([-800.0, 0, 800])).tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("goal", ["f1", "youden"])
def test_no_other_threshold_is_better(goal):
    def worth(positive, called):
        return (
            theirs.f1_score(positive, called)
            if goal == "f1"
            else called[positive].mean() - called[~positive].mean()
        )

    for seed in range(20):
        rng = np.random.default_rng(seed)
        positive = rng.random(60) < 0.3
        positive[:2] = True, False
        chance = np.round(
            np.clip(0.3 + 0.2 * positive + rng.normal(0, 0.2, 60), 0, 1), 1 + seed % 2
        )
        found = calibration.best_threshold(chance, positive, goal)
        assert worth(positive, chance >= found) == pytest.approx(
            max(worth(positive, chance >= t) for t in np.unique(chance))
        )
        assert found not in chance or found == 0
    assert calibration.best_threshold(chance, np.zeros(60, bool), goal) == 0.5


def test_reliability_has_bins_of_equally_many_rows():
    rng = np.random.default_rng(0)
    chance = rng.random(1000)
    found = calibration.reliability(chance, rng.random(1000) < chance**2)
    assert [n for _, _, n in found] == [100] * 10 and [said for said, _, _ in found] == sorted(
        said for said, _, _ in found
    )
    assert all(true == pytest.approx(said**2, abs=0.15) for said, true, _ in found)
    assert (
        len(calibration.reliability(chance[:59], chance[:59] > 0)) == 2
        and calibration.reliability(chance[:39], chance[:39] > 0) == []
    )


# ---------------------------------------------------------------- resamples


def theirs_of(name, p):
    """scikit-learn's value of predictions; the macro averages over the labels with both classes,
    which it does not leave out by itself.
    """
    if "labels" not in p:
        y, guess = p["label"], p["scores"].argmax(1)
        if name == "auroc":
            chance = softmax(p["scores"].astype(np.float64))
            there = [k for k in range(chance.shape[1]) if 0 < (y == k).sum() < len(y)]
            return (
                np.mean([theirs.roc_auc_score(y == k, chance[:, k]) for k in there])
                if there
                else np.nan
            )
        return {
            "macro_f1": lambda: theirs.f1_score(y, guess, average="macro"),
            "balanced_accuracy": lambda: theirs.balanced_accuracy_score(y, guess),
        }[name]()
    y, scores = p["labels"].astype(bool), p["scores"]
    there = [
        k for k in range(y.shape[1]) if y[:, k].any() and (name == "macro_f1" or not y[:, k].all())
    ]
    one = {
        "macro_auroc": theirs.roc_auc_score,
        "macro_average_precision": theirs.average_precision_score,
        "macro_f1": lambda a, b: theirs.f1_score(a, b > 0),
    }[name]
    return np.mean([one(y[:, k], scores[:, k]) for k in there]) if there else np.nan


MANY = ("macro_auroc", "macro_average_precision", "macro_f1")


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy", "auroc"])
@pytest.mark.parametrize(("n", "classes"), [(1, 3), (7, 4), (40, 2), (150, 12)])
@pytest.mark.filterwarnings(
    "ignore:y_pred contains classes not in y_true", "ignore:A single label was found"
)
def test_resamples_of_classes_equal_scikit_learn_on_repeated_rows(name, n, classes):
    """12 classes in 150 rows, 4 in 7 and 3 in one: draws miss classes."""
    p = predictions(n, classes, seed=n)
    p["scores"] = np.round(p["scores"] * 2) / 2  # equal scores
    counts = np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=25)
    found = metric(name).resampled(p, counts)
    want = [theirs_of(name, repeated(p, row)) for row in counts]
    assert found.shape == (25,) and found == pytest.approx(want, abs=1e-9, nan_ok=True)
    assert metric(name).value(p) == pytest.approx(theirs_of(name, p), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(("n", "step"), [(2, None), (9, 1.0), (60, 0.5), (200, None), (200, 5.0)])
@pytest.mark.filterwarnings("ignore:No positive class found")
def test_resamples_of_label_sets_equal_scikit_learn_on_repeated_rows(name, n, step):
    p = label_sets(n, 6, seed=n, step=step)
    # Every label counts among the rows, though not in every draw
    p["labels"][0], p["labels"][1] = (
        1,
        0,
    )
    counts = np.random.default_rng(n).multinomial(n, np.full(n, 1 / n), size=25)
    found = metric(name).resampled(p, counts)
    assert found == pytest.approx(
        [theirs_of(name, repeated(p, row)) for row in counts], abs=1e-9, nan_ok=True
    )
    assert metric(name).value(p) == pytest.approx(theirs_of(name, p), abs=1e-9)


def test_micro_f1_equals_scikit_learn():
    p = label_sets(80)
    assert metric("micro_f1").value(p) == pytest.approx(
        theirs.f1_score(p["labels"], p["scores"] > 0, average="micro"), abs=1e-12
    )


def test_labels_without_both_classes_have_no_ranking():
    p = label_sets(30, 3)
    p["labels"][:, 0], p["labels"][:, 1] = 0, 1
    names = ("never", "always", "some")
    for name, other in (
        ("auroc", theirs.roc_auc_score),
        ("average_precision", theirs.average_precision_score),
    ):
        assert catalog.per_label(name).values(p, names) == {
            "some": pytest.approx(other(p["labels"][:, 2], p["scores"][:, 2]), abs=1e-9)
        }
        assert metric(f"macro_{name}").value(p) == pytest.approx(
            other(p["labels"][:, 2], p["scores"][:, 2]), abs=1e-9
        )


def test_a_macro_average_is_over_labels_with_enough_positives():
    p = label_sets(60, 4)
    p["labels"][:] = 0
    for k, positives in enumerate((2, 19, 20, 40)):
        p["labels"][:positives, k] = 1
    p["min_positives"] = np.full(60, 20, np.int32)
    assert scored(p).tolist() == [False, False, True, True]
    each = catalog.per_label("auroc").values(p, "abcd")
    assert (
        metric("macro_auroc").value(p) == pytest.approx((each["c"] + each["d"]) / 2)
        and len(each) == 4
    )
    # A draw with 15 positives keeps its label, one with 25 gains none
    counts = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=20)
    halves = [
        np.mean(
            [
                theirs.roc_auc_score(
                    np.repeat(p["labels"][:, k], c), np.repeat(p["scores"][:, k], c)
                )
                for k in (2, 3)
            ]
        )
        for c in counts
    ]
    assert metric("macro_auroc").resampled(p, counts) == pytest.approx(halves, abs=1e-9)
    p["min_positives"] += (
        # more than any label has: a validation split is then judged by all of them, test rows are
        # not
        30
    )
    with pytest.raises(
        ValueError,
        match=r"none of 4 labels has 50 positive rows .* these 60 rows \(at most 40 positive\): "
        r"lower min_positives",
    ):
        scored(p, strict=True)
    assert scored(p).all() and metric("macro_auroc").value(p) == pytest.approx(
        np.mean(list(each.values()))
    )
    with pytest.raises(
        ValueError,
        match="none of 4 labels has 1 positive rows and a negative one among these 60 rows",
    ):
        metric("macro_auroc").value({**p, "labels": p["labels"] * 0})


def test_a_score_that_is_no_number_makes_no_rank():
    p = label_sets(30, 3)
    p["scores"][4, 1] = np.nan
    assert math.isnan(metric("macro_auroc").value(p)) and math.isnan(
        metric("macro_average_precision").value(p)
    )
    assert set(catalog.per_label("auroc").values(p, "abc")) == {"a", "c"}


def test_the_metric_of_a_label_reads_its_column():
    p, names = label_sets(50, 3), ["Mass", "Effusion", "A/B"]
    for k, name in enumerate(names):
        assert metric(f"auroc/{name}", names).value(p) == pytest.approx(
            theirs.roc_auc_score(p["labels"][:, k], p["scores"][:, k])
        )
    assert metric("auroc/Mass").higher_is_better
    with pytest.raises(ValueError, match="auroc/Mass: it is not known which column"):
        metric("auroc/Mass").value(p)
    with pytest.raises(ValueError, match="unknown metric 'recall/Mass'"):
        metric("recall/Mass", names)


def test_the_metric_of_a_type_of_entities_reads_its_column():
    p, names = entities(types=3), ["person", "location", "work/of art"]
    for k, name in enumerate(names):
        of = metric(f"entity_f1/{name}", names)
        assert of.value(p) == pytest.approx(
            2 * p["hits"][:, k].sum() / (p["guessed"][:, k] + p["actual"][:, k]).sum()
        )
        # A ratio of sums: its intervals are cheap
        assert of.higher_is_better and of.of_units(of.units(p)) == of.value(p)
    assert metric("entity_f1").per_label.name == "entity_f1"
    for name in ("hits", "guessed", "actual"):
        p[name][:, 1] = 0
    p["hits"][:, 2] = p["actual"][:, 2] = 0
    found = catalog.per_label("entity_f1").values(p, names)
    # What is found and never there is wrong; what is neither is nothing
    assert set(found) == {"person", "work/of art"} and found["work/of art"] == 0
    with pytest.raises(ValueError, match="entity_f1/person: it is not known which column"):
        metric("entity_f1/person").value(p)


def test_confusion_equals_scikit_learn():
    p = predictions(60, 5, labels=np.arange(60) % 4)
    assert np.array_equal(
        classes.confusion(p),
        theirs.confusion_matrix(p["label"], p["scores"].argmax(1), labels=range(5)),
    )
    p = risks(threshold=0.12)
    called = softmax(p["scores"].astype(np.float64))[:, 1] >= 0.12
    assert np.array_equal(classes.confusion(p), theirs.confusion_matrix(p["label"], called))


def test_names_bounds_and_directions_are_known_without_torch():
    program = (
        "import sys\nfrom pipeline.config import registry\nfrom pipeline.core.metrics import catalog\n"
        "for name in registry.names('metric'):\n"
        "    of = catalog.metric(name)\n"
        "    assert of.name == name and isinstance(of.higher_is_better, bool), name\n"
        "    assert of.fixed_bounds is None or of.fixed_bounds[0] < of.fixed_bounds[1], name\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_metrics_of_any_target_with_classes_read_scores_and_labels_alone():
    p = predictions(60, 2)
    for name in catalog.for_role("label"):
        value = metric(name).value({key: p[key] for key in ("scores", "label")})
        assert math.isfinite(value), name
    assert "auroc" in catalog.for_role("label")


def test_a_score_that_is_nan_makes_every_metric_of_classes_nan():
    """The largest score of a broken network's row would still name a class."""
    p = predictions(classes=2)
    names = [name for name in catalog.for_role("label") if name != "loss"]
    names += ["accuracy", "macro_f1", "balanced_accuracy"]
    assert not [name for name in names if math.isnan(metric(name).value(p))]
    p["scores"][3, 0] = np.nan
    assert not [name for name in names if not math.isnan(metric(name).value(p))]
    counts = np.ones((2, 200), dtype=np.int64)
    counts[1, 3] = 0
    assert np.isnan(metric("kappa").resampled(p, counts)).tolist() == [True, False]
    empty = {"scores": p["scores"][:0], "label": p["label"][:0]}
    assert math.isnan(metric("min_precision_sensitivity").value(empty))
    several = label_sets()
    several["scores"][5, 1] = np.nan
    assert math.isnan(metric("macro_f1").value(several))


def test_scores_behind_the_positions_of_a_row_may_be_nan():
    scores = np.zeros((2, 3, 2), dtype=np.float32)
    label = np.array([[0, 0, 0], [0, 0, -1]])
    scores[..., 0], scores[1, 2] = 1.0, np.nan
    assert metric("accuracy").value({"scores": scores, "label": label}) == 1.0
