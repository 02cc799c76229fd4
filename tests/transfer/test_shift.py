"""Shift between two samples: against scikit-learn, SciPy and published numbers; equal samples show
none, and one that is made is named.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from toys import image_files, job_of, shared_of

from pipeline.config import registry
from pipeline.data import manifests
from pipeline.report import shift as shown
from pipeline.report.shift import Drift, Estimate, Shift
from pipeline.transfer import measured_shift, shift
from pipeline.transfer.scoring import Pair, score_pair


@pytest.mark.parametrize(("n", "width"), [(60, 7), (12, 40)])
def test_the_linear_classifier_is_ridge_regression(n, width):
    draw = np.random.default_rng(0)
    x, y = draw.normal(3, 2, (n, width)), draw.normal(size=(n, 2))
    tried = draw.normal(size=(5, width))
    penalty = shift.RIDGE * ((x - x.mean(0)) ** 2).sum() / width
    expected = Ridge(alpha=penalty).fit(x, y).predict(tried)
    assert shift.linear(x, y, tried) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (5, 10), (81, 263), (10, 10)])
def test_the_interval_of_a_share_is_wilsons(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert shift.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_change_of_shares_is_newcombes():
    """Newcombe 1998, table II, method 10: 56/70 and 48/80."""
    found = shift.share_change(56, 70, 48, 80)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_equal_samples_are_not_told_apart():
    """Over 200 pairs the interval misses chance in about 5 %."""
    misses = 0
    for seed in range(200):
        both = np.random.default_rng(seed).normal(size=(240, 5))
        found = shift.told_apart(both[:120], both[120:], seed)
        misses += not found.low <= 0.5 <= found.high
    assert misses <= 20


def test_shifted_samples_are_told_apart_as_well_as_they_can_be():
    """Two normal distributions 2 apart: Bayes' accuracy is that of half the distance."""
    draw = np.random.default_rng(0)
    rows, others = draw.normal(size=(2000, 4)), draw.normal(size=(3000, 4))
    rows[:, 1] += 2
    found = shift.told_apart(rows, others)
    assert found.low < stats.norm.cdf(1) < found.high
    assert found.value == shift.told_apart(rows, others).value, "the same each time"
    with pytest.raises(ValueError, match="fewer than 20 rows"):
        shift.told_apart(rows[:19], others)


def test_label_shift_is_over_the_classes_that_both_have():
    found = shift.label_shift({"cat": 30, "dog": 70, "fox": 900}, {"dog": 500, "cat": 500, "ox": 3})
    assert {*found} == {"cat", "dog"}
    assert found["cat"].value == pytest.approx(-0.2) and found["dog"].value == pytest.approx(0.2)
    expected = shift.share_change(30, 100, 500, 1000, level=0.975)
    assert found["cat"] == expected, "two classes hold together"
    assert shift.label_shift({"cat": 3}, {"ox": 3}) == {}


def test_a_head_that_means_the_same_loses_nothing_and_one_that_means_the_opposite_does():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    features = draw.normal(size=(400, 3)) + 4 * labels[:, None]
    same = np.eye(2)[labels]
    found = shift.concept_shift(features, labels, same)
    assert found.low <= 0 <= found.high or found.value == 0
    opposite = shift.concept_shift(features, labels, 1 - same)
    assert opposite.low > 0.95
    with pytest.raises(ValueError, match="two classes"):
        shift.concept_shift(features, np.zeros(400, dtype=int), same)


def test_drift_of_features_is_that_of_scipy_corrected_together():
    draw = np.random.default_rng(0)
    n, m = 150, 220
    numbers = np.r_[draw.normal(size=n), draw.normal(0.8, size=m)]
    numbers[[3, 200]] = np.nan
    equal = draw.normal(size=n + m)
    kinds = np.r_[draw.integers(0, 3, n), draw.integers(1, 4, m)]
    few = np.where(np.arange(n + m) < 30, 1.0, np.nan)
    found = shift.feature_drift(
        [("equal", equal), ("age", numbers), ("unit", kinds), ("few", few)], n
    )
    known = {one.feature: one for one in found}
    assert [one.size for one in found] == sorted((one.size for one in found), reverse=True)
    assert {*known} == {"equal", "age", "unit"}, "too few rows are not compared"
    tests = {
        "equal": stats.ks_2samp(equal[:n], equal[n:]),
        "age": stats.ks_2samp(*(one[np.isfinite(one)] for one in (numbers[:n], numbers[n:]))),
    }
    counts = np.array([np.bincount(one, minlength=4) for one in (kinds[:n], kinds[n:])])
    p = [tests["equal"].pvalue, tests["age"].pvalue, stats.chi2_contingency(counts).pvalue]
    corrected = stats.false_discovery_control(p)
    assert [known[name].p for name in ("equal", "age", "unit")] == pytest.approx(corrected)
    assert known["age"].size == pytest.approx(tests["age"].statistic)
    shares = counts / counts.sum(1, keepdims=True)
    middle = shares.mean(0)
    divergence = np.mean([stats.entropy(one, middle, base=2) for one in shares])
    assert known["unit"].size == pytest.approx(divergence)
    assert known["age"].is_large and known["unit"].is_large and not known["equal"].is_large


LARGE = Shift(
    "source corpus",
    "the training rows",
    covariate=Estimate(0.9, 0.85, 0.93),
    labels={"sick": Estimate(0.3, 0.2, 0.4), "well": Estimate(-0.01, -0.02, 0.01)},
    concept=Estimate(0.2, 0.1, 0.3),
    drift=(Drift("age", 0.4, 0.001, "numbers"), Drift("sex", 0.01, 0.6, "categories")),
    missing={},
)


def test_what_is_large_is_named_with_the_techniques_that_fit():
    found = shown.sentences("task", LARGE, ["coral", "full", "scratch"])
    covariate, labels, concept, drift = found
    assert "told apart with an accuracy of 0.90 [0.85, 0.93]" in covariate
    assert covariate.endswith(": coral") and concept.endswith(": full")
    assert "sick +0.30 [+0.20, +0.40]" in labels and "well" not in labels
    assert "1 of 2 features are distributed otherwise: age (0.40)" in drift
    small = Shift("source corpus", "the training rows", covariate=Estimate(0.55, 0.45, 0.65))
    assert shown.sentences("task", small, ["coral"]) == []


def test_shift_is_kept_as_json_and_shown():
    kept = shown.Shift.from_json(LARGE.to_json())
    assert kept == LARGE
    page = shown.blocks.markdown("x", shown.blocks_of({"task": [kept]}, ["coral"]))
    assert "## Shift" in page and "0.90 [0.85, 0.93]" in page and "1 of 2" in page
    none = Shift("source corpus", "the training rows", missing={"covariate": "no rows"})
    assert "covariate: no rows" in shown.blocks.markdown("x", shown.blocks_of({"t": [none]}, []))
    assert shown.blocks_of({}, []) == []


# ---------------------------------------------------------------- of a source and a target


def test_shift_is_measured_with_the_scores_and_reads_no_label_of_test_rows(tmp_path):
    paths = image_files(tmp_path, {"train": 60, "validation": 24, "test": 40})
    shared = shared_of(tmp_path, job_of(tmp_path, paths), paths)
    key = next(iter(shared.backbone_groups))
    data = shared.targets["task", key]
    columns = data.spec.data.columns
    labels = dict.fromkeys(data.label_names, 20) | {data.label_names[0]: 400}
    pair = Pair("src", key, "task", (data.validation.selection, columns), labels)
    source, own = score_pair(pair, shared).shifts
    assert source.others == "source src" and own.others == "its own training rows"
    assert source.covariate.low <= 0.5 <= source.covariate.high
    assert own.covariate.low <= 0.5 <= own.covariate.high, "all rows are of one distribution"
    assert source.labels[data.label_names[0]].high < -0.3 and {*source.labels} == {*labels}
    assert source.concept is not None and not own.labels and own.concept is None
    data.test.arrays["label"][:] = 0
    assert score_pair(pair, shared).shifts == (source, own)
    unreadable = replace(data.test.decoder, objective_state={})
    blind = replace(data, test=replace(data.test, arrays=None, decoder=unreadable))
    again = score_pair(pair, replace(shared, targets={("task", key): blind})).shifts
    assert again == (source, own), "their labels cannot be read at all"
    checkpoint, _ = score_pair(Pair("src", key, "task"), shared).shifts
    assert checkpoint.missing["covariate"] == "the source's rows are not there"
    assert {*checkpoint.missing} == {"covariate", "labels"} and checkpoint.concept is not None
    assert score_pair(pair, shared, ("knn",)).shifts == (), "one score alone is asked for"


def test_features_of_tables_drift_by_their_names_whatever_their_columns_are_called(tmp_path):
    draw = np.random.default_rng(0)
    made = []
    for name, shift_of_age, kinds in (("here", 0.0, "abc"), ("there", 1.5, "cba")):
        rows = [
            {"age": float(draw.normal() + shift_of_age), "dose": float(draw.normal()), "kind": kind}
            for kind in list(kinds) * 60
        ]
        pq.write_table(pa.table({name: rows}), tmp_path / f"{name}.parquet")
        found = manifests.build(str(tmp_path / f"{name}.parquet"), "auto", str(tmp_path))
        made.append((manifests.Selection(found), {"features": name}))
    table = registry.get("modality", "table")
    options = table.options_class()
    state = table.fit(options, pq.read_table(tmp_path / "here.parquet"), made[0][1], None)
    found = measured_shift.drift(table(options, state), *made)
    known = {one.feature.split(".")[1]: one for one in found}
    assert {name for name, one in known.items() if one.is_large} == {"age"}
    assert known["kind"].size == 0, "categories are the same, though they come in another order"


def test_classes_of_a_source_are_counted_by_name():
    assert measured_shift.class_counts(np.array([0, 2, 2]), ("a", "b", "c")) == {
        "a": 1,
        "b": 0,
        "c": 2,
    }
    assert measured_shift.class_counts(np.zeros((3, 2)), ("a", "b")) == {}
