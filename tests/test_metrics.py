"""Metrics against scikit-learn and their formulas; units give the value back."""

import math

import numpy as np
import pytest
import sklearn.metrics as theirs

from pipeline.metrics import METRICS, metric


def predictions(n=200, classes=5, seed=0, skill=1.0, labels=None):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n) if labels is None else np.asarray(labels)
    scores = rng.normal(size=(len(label), classes)).astype(np.float32)
    scores[np.arange(len(label)), label] += skill
    return {"scores": scores, "label": label.astype(np.int64), "loss": rng.gamma(2.0, size=len(label)), "row": np.arange(len(label))}


def softmax(scores):
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("skill", [0.0, 1.5])
def test_metrics_equal_scikit_learn(classes, skill):
    p = predictions(classes=classes, skill=skill)
    y, guess = p["label"], p["scores"].argmax(1)
    chance = softmax(p["scores"].astype(np.float64))
    want = {
        "accuracy": theirs.accuracy_score(y, guess),
        "macro_f1": theirs.f1_score(y, guess, average="macro"),
        "balanced_accuracy": theirs.balanced_accuracy_score(y, guess),
        "auroc": theirs.roc_auc_score(y, chance[:, 1]) if classes == 2 else theirs.roc_auc_score(y, chance, multi_class="ovr", average="macro"),
        "top5_accuracy": theirs.top_k_accuracy_score(y, p["scores"], k=5, labels=range(classes)) if classes > 5 else 1.0,
    }
    assert {name: metric(name).value(p) for name in want} == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("labels", "guesses"), [([0, 1, 1, 1], [0, 1, 2, 1]), ([0, 0, 1, 1], [0, 1, 1, 1]), ([2, 2, 2], [2, 2, 2])])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_a_class_without_rows_is_no_class_with_a_score_of_nought(labels, guesses):
    """A small test split, or a resample of it, may miss a class; a class that is only predicted lowers the others' precision."""
    p = {"scores": np.eye(4, dtype=np.float32)[guesses], "label": np.array(labels)}
    assert metric("balanced_accuracy").value(p) == pytest.approx(theirs.balanced_accuracy_score(labels, guesses))
    assert metric("macro_f1").value(p) == pytest.approx(theirs.f1_score(labels, guesses, average="macro"))


def test_loss_is_the_mean_and_perplexity_its_exponential():
    p = predictions()
    assert metric("loss").value(p) == pytest.approx(p["loss"].mean())
    assert metric("perplexity").value(p) == pytest.approx(math.exp(p["loss"].mean()))


def test_rows_with_counts_are_weighed_by_them():
    """A language model's row holds a sum of losses and how many there are."""
    p = {"loss": np.array([6.0, 1.0, 0.0]), "count": np.array([3.0, 1.0, 0.0])}
    assert metric("loss").value(p) == pytest.approx(7 / 4) and metric("perplexity").value(p) == pytest.approx(math.exp(7 / 4))


def test_a_huge_loss_has_a_perplexity_and_not_an_error():
    assert metric("perplexity").value({"loss": np.array([1e4])}) == math.exp(700)


@pytest.mark.parametrize("name", [name for name, of in METRICS.items() if of.units])
def test_units_give_the_value(name):
    of, p = metric(name), predictions(classes=7)
    units = of.units(p)
    assert units.shape == (200, 2) and units.dtype == np.float64
    assert of.of_units(units) == pytest.approx(of.value(p), abs=1e-12)
    half = {key: array[:100] for key, array in p.items()}
    assert of.of_units(units[:100]) == pytest.approx(of.value(half), abs=1e-12)  # a unit belongs to its row


@pytest.mark.parametrize("name", [name for name, of in METRICS.items() if of.units])
def test_nothing_counted_is_not_a_number(name):
    p = {key: array[:0] for key, array in predictions().items()}
    assert math.isnan(metric(name).value(p)) and math.isnan(metric(name).of_units(np.zeros((0, 2))))


def test_directions():
    assert {name for name, of in METRICS.items() if not of.higher_is_better} == {"loss", "perplexity"}


def test_an_unknown_metric_is_named_with_its_nearest():
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'; did you mean accuracy"):
        metric("acuracy")
