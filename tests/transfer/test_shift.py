"""Shift between two samples: against scikit-learn, SciPy and published numbers; equal samples show
none, and one that is made is named.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from toys import image_files, image_rows, job_of, net_task, shared_of

from pipeline.config import registry
from pipeline.core.specs import ObjectiveSpec
from pipeline.data import manifests
from pipeline.data.stream import Decoder, Rows
from pipeline.report import shift as shown
from pipeline.report.shift import Drift, Estimate, Shift
from pipeline.transfer import measured_shift, scoring, shift
from pipeline.transfer.scoring import SourceTargetPair, score_pair


@pytest.mark.parametrize(("n", "width"), [(60, 7), (12, 40)])
def test_the_linear_classifier_is_ridge_regression(n, width):
    draw = np.random.default_rng(0)
    x, y = draw.normal(3, 2, (n, width)), draw.normal(size=(n, 2))
    tried = draw.normal(size=(5, width))
    penalty = shift.RIDGE * ((x - x.mean(0)) ** 2).sum() / width
    expected = Ridge(alpha=penalty).fit(x, y).predict(tried)
    assert shift.ridge_predictions(x, y, tried) == pytest.approx(expected, abs=1e-8)


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
        found = shift.domain_classifier_accuracy(both[:120], both[120:], seed=seed)
        misses += not found.low <= 0.5 <= found.high
    assert misses <= 20


def test_shifted_samples_are_told_apart_as_well_as_they_can_be():
    """Two normal distributions 2 apart: Bayes' accuracy is that of half the distance."""
    draw = np.random.default_rng(0)
    rows, others = draw.normal(size=(2000, 4)), draw.normal(size=(3000, 4))
    rows[:, 1] += 2
    found = shift.domain_classifier_accuracy(rows, others)
    assert found.low < stats.norm.cdf(1) < found.high
    assert found.value == shift.domain_classifier_accuracy(rows, others).value, "the same each time"
    with pytest.raises(ValueError, match="fewer than 20 rows"):
        shift.domain_classifier_accuracy(rows[:19], others)


def speakers(draw: np.random.Generator, count: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of speakers who differ much more than the rows of each do, and whose rows these are."""
    groups = draw.integers(0, count, rows)
    return draw.normal(size=(count, 32))[groups] + 0.1 * draw.normal(size=(rows, 32)), groups


def test_speakers_of_one_population_are_not_told_apart_by_their_voices():
    """The rows of a group stay together, and a group is one observation."""
    misses, as_rows = 0, 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        (rows, of), (others, of_others) = speakers(draw, 8, 100), speakers(draw, 20, 300)
        found = shift.domain_classifier_accuracy(rows, others, of, of_others, seed)
        misses += not found.low <= 0.5 <= found.high
        as_rows += (
            shift.domain_classifier_accuracy(rows, others, seed=seed).low > shown.LARGE_ACCURACY
        )
    assert misses <= 10 and as_rows > 90, "rows that count as independent show a shift"
    rows[:, 0] += 30
    found = shift.domain_classifier_accuracy(rows, others, of, of_others)
    assert found.value == 1
    tried = 4 / (1 / 4 + 1 / 10)  # of 4 speakers and of 10
    assert (found.low, found.high) == pytest.approx(shift.wilson(tried, tried))
    with pytest.raises(ValueError, match="fewer than 4 groups"):
        shift.domain_classifier_accuracy(rows, others, of % 3, of_others)


def test_groups_that_are_rows_change_nothing_but_the_draw():
    draw = np.random.default_rng(0)
    rows, others = draw.normal(size=(400, 4)), draw.normal(0.5, size=(400, 4))
    alone = shift.domain_classifier_accuracy(rows, others)
    grouped = shift.domain_classifier_accuracy(rows, others, np.arange(400), np.arange(400))
    assert grouped.value == pytest.approx(alone.value, abs=0.05)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.1)
    right = round(alone.value * 400)
    assert (alone.low, alone.high) == pytest.approx(shift.wilson(right, 400))


def test_features_that_are_all_equal_are_at_chance():
    assert shift.domain_classifier_accuracy(np.ones((40, 3)), np.ones((60, 3))).value == 0.5


def test_groups_are_the_observations_of_shares_heads_and_drift():
    one, other = {"a": 300, "b": 700}, {"a": 100, "b": 900}
    found = shift.label_shift(one, other, 10, 20)["a"]
    assert found == shift.share_change(3, 10, 2, 20, level=0.975)
    assert (
        found.value == pytest.approx(0.2) and found.low < 0 < shift.label_shift(one, other)["a"].low
    )
    assert shift.label_shift(one, other, 5000, 5000) == shift.label_shift(one, other)
    of_three = shift.label_shift({**one, "fox": 9000}, other, 100, 20)["a"]
    assert of_three == found, "100 groups of 10,000 rows are 10 of the 1,000 that are compared"

    draw = np.random.default_rng(0)
    labels, groups = draw.integers(0, 2, 200), np.repeat(np.arange(10), 20)
    features = draw.normal(size=(200, 3)) + 4 * labels[:, None]
    known = np.eye(2)[np.where(groups < 5, labels, 1 - labels)]  # wrong for half of the groups
    rows = shift.concept_shift(features, labels, known)
    grouped = shift.concept_shift(features, labels, known, groups)
    assert grouped.value == pytest.approx(rows.value, abs=0.02)
    assert grouped.high - grouped.low > 3 * (rows.high - rows.low)

    values = np.r_[draw.normal(size=300), draw.normal(0.5, size=400)]
    kinds = np.r_[draw.integers(0, 3, 300), draw.integers(1, 4, 400)]
    known = {d.feature: d for d in shift.feature_drift([("x", values)], 300, (6, 8))}
    statistic = stats.ks_2samp(values[:300], values[300:]).statistic
    assert known["x"].size == pytest.approx(statistic)
    assert known["x"].p == pytest.approx(stats.kstwo.sf(statistic, round(48 / 14)))
    counts = np.array([np.bincount(part, minlength=4) for part in (kinds[:300], kinds[300:])])
    (of_kinds,) = shift.feature_drift([("k", kinds)], 300, (6, 8))
    assert of_kinds.p == pytest.approx(stats.chi2_contingency(counts / 50).pvalue)


def test_a_feature_that_is_missing_in_one_sample_drifts():
    draw = np.random.default_rng(0)
    known, half = draw.normal(size=500), draw.normal(size=500)
    half[draw.random(500) < 0.9] = np.nan
    gone = np.r_[known, np.full(500, np.nan)]
    found = shift.feature_drift([("lactate", gone), ("ph", np.r_[known, half])], 500)
    by_name = {one.name: one for one in found}
    assert {*by_name} == {"lactate, missing", "ph, missing", "ph"}
    assert by_name["lactate, missing"].size == 1 and by_name["lactate, missing"].is_large
    assert by_name["ph, missing"].size == pytest.approx(np.isnan(half).mean())
    words = shown.sentences("task", replace(LARGE, drift=found), [])[-1]
    assert "lactate, missing (1.00), ph, missing (0.9" in words


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
    numbers_alone = {one.name for one in found if one.kind != "missing"}
    assert numbers_alone == {"equal", "age", "unit"}, "too few rows are not compared"
    known = {one.name: one for one in found}
    tests = {
        "equal": stats.ks_2samp(equal[:n], equal[n:]),
        "age": stats.ks_2samp(*(one[np.isfinite(one)] for one in (numbers[:n], numbers[n:]))),
    }
    counts = np.array([np.bincount(one, minlength=4) for one in (kinds[:n], kinds[n:])])
    p = [tests["equal"].pvalue, tests["age"].pvalue, stats.chi2_contingency(counts).pvalue]
    for values in (numbers, few):
        missing = [
            [np.isnan(one).sum(), np.isfinite(one).sum()] for one in (values[:n], values[n:])
        ]
        p.append(stats.chi2_contingency(missing).pvalue)
    corrected = stats.false_discovery_control(p)
    names = ("equal", "age", "unit", "age, missing", "few, missing")
    assert [known[name].p for name in names] == pytest.approx(corrected)
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
    assert "tells them apart with an accuracy of 0.90 [0.85, 0.93]" in covariate
    assert "coral" not in covariate, "other shares of classes would be aligned too"
    assert concept.endswith(": full") and "or it is the other shares of classes" in concept
    assert "sick +0.30 [+0.20, +0.40]" in labels and "well" not in labels
    assert "balanced_accuracy" in labels and "class_weight: balanced" in labels
    assert labels.endswith("learn the shares from the target's labels: full")
    assert "1 of 2 comparisons of features show a difference: age (0.40)" in drift
    inputs_alone = shown.sentences("task", replace(LARGE, labels={}), ["coral", "full", "scratch"])
    assert inputs_alone[0].endswith(": coral") and "shares" not in inputs_alone[1]
    small = Shift("source corpus", "the training rows", covariate=Estimate(0.55, 0.45, 0.65))
    assert shown.sentences("task", small, ["coral"]) == []
    without_labels = shown.sentences("task", LARGE, ["coral", "mcc"])[1]
    assert without_labels.endswith("does not bring the domains together: mcc")
    of_test = shown.sentences("task", replace(LARGE, within_target=True), ["full", "mcc"])[1]
    assert of_test.endswith("trains for balanced accuracy"), (
        "test rows have no labels to learn from"
    )


def test_no_technique_that_aligns_with_a_source_is_named_for_test_rows():
    own = replace(
        LARGE, rows="test rows", others="its own training rows", features_of="corpus",
        within_target=True, labels={}, counted=measured_shift.NOTE_GROUPS,
    )  # fmt: skip
    covariate, concept, _ = shown.sentences("task", own, ["coral", "full", "tent"])
    assert covariate.startswith(
        "task: in the features of corpus, test rows and its own training rows look different"
    )
    assert covariate.endswith("techniques that adapt to the test rows: tent")
    assert "each group is one observation" in covariate
    assert "a head of the training rows is less accurate on the test rows" in concept
    assert "full" not in concept


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
    pair = SourceTargetPair("src", key, "task", (data.validation.selection, columns), labels)
    (source,) = score_pair(pair, shared).shifts
    own = scoring.shift_of_test(pair, shared)
    assert source.others == "source src" and own.others == "its own training rows"
    assert source.covariate.low <= 0.5 <= source.covariate.high
    assert own.covariate.low <= 0.5 <= own.covariate.high, "all rows are of one distribution"
    assert source.labels[data.label_names[0]].high < -0.3 and {*source.labels} == {*labels}
    assert source.concept is not None and own.concept.low <= 0 <= own.concept.high
    assert {*own.labels} == {*labels} and not own.missing
    assert all(one.low <= 0 <= one.high for one in own.labels.values())
    unreadable = replace(data.test.decoder, objective_state={})
    blind = replace(data, test=replace(data.test, arrays=None, decoder=unreadable))
    again = score_pair(pair, replace(shared, targets={("task", key): blind})).shifts
    assert again == (source,), "before the trials their labels cannot be read at all"
    alone = score_pair(replace(pair, wants_scores=False), shared)
    assert alone.shifts == (source,) and alone.scores == {}
    (checkpoint,) = score_pair(SourceTargetPair("src", key, "task"), shared).shifts
    assert checkpoint.missing["covariate"] == "the source's rows are not there"
    assert {*checkpoint.missing} == {"covariate", "labels"} and checkpoint.concept is not None


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


@pytest.mark.parametrize("planted", ["nothing", "labels", "meaning", "patients"])
def test_test_rows_that_differ_from_training_rows_are_named(tmp_path, monkeypatch, planted):
    """Other shares of classes, labels with another meaning, and patients of one population."""
    draw = np.random.default_rng(1)
    rows, labels, columns = {}, {}, {"features": "x", "label": "label"}
    for part, count in (("train", 300), ("test", 240)):
        share = 0.8 if planted == "labels" and part == "test" else 0.5
        label = (draw.random(count) < share).astype(int)
        patients = draw.integers(0, 12, count)
        x = draw.normal(size=(count, 4))
        x[:, 0] += 3 * label
        if planted == "patients":
            x += 3 * draw.normal(size=(12, 4))[patients]
        labels[part] = 1 - label if planted == "meaning" and part == "test" else label
        made = {"x": x.tolist(), "label": labels[part].astype(str), "patient": patients}
        pq.write_table(pa.table(made), tmp_path / f"{part}.parquet")
        manifest = manifests.build(str(tmp_path / f"{part}.parquet"), "auto", str(tmp_path))
        rows[part] = Rows(
            manifests.Selection(manifest), Decoder(SimpleNamespace(), None, {}, columns)
        )

    def pooled(backbone, rows, device):
        ids = rows.selection.ids(np.arange(len(rows)))
        table = manifests.Reader(rows.selection.manifest, ["x"]).take(ids)
        return ids, torch.tensor(table["x"].to_pylist()), {}

    monkeypatch.setattr(measured_shift, "features_of_ids", pooled)
    names = ("0", "1")
    spec = {"columns": columns, "group": "patient" if planted == "patients" else None}
    data = SimpleNamespace(
        **rows,
        labels=labels["train"],
        label_names=names,
        objective=ObjectiveSpec(
            "classification", {}, {"labels": list(names), "values": list(names)}
        ),
        spec=SimpleNamespace(label_fractions=[1.0], data=SimpleNamespace(**spec)),
    )
    found = measured_shift.train_test_shift(data, "src", None, torch.device("cpu"))
    words = " ".join(shown.sentences("task", found, []))
    assert ("label shift" in words) == (planted == "labels"), words
    assert ("is less accurate on" in words) == (planted == "meaning"), words
    assert not found.missing and found.concept is not None and {*found.labels} == {*names}
    if planted in ("nothing", "patients"):
        assert words == ""
    if planted == "patients":
        data.spec.data.group = None
        found = measured_shift.train_test_shift(data, "src", None, torch.device("cpu"))
        assert "look different" in " ".join(shown.sentences("task", found, []))
    data.spec.label_fractions = [0]
    found = measured_shift.train_test_shift(data, "src", None, torch.device("cpu"))
    assert {*found.missing} == {"labels", "concept"} and not found.labels


def test_sources_rows_are_as_evenly_spread_as_the_targets(tmp_path):
    """Of sorted files runs of rows would have other classes than rows that are spread."""
    pq.write_table(pa.table({"label": np.sort(np.arange(20000) % 100)}), tmp_path / "a.parquet")
    manifest = manifests.build(str(tmp_path / "a.parquet"), "auto", str(tmp_path))
    chosen = scoring.sample(manifests.Selection(manifest))
    assert len(chosen) == scoring.SOURCE_ROWS
    assert len(np.unique(chosen.ids(np.arange(len(chosen))) // 200)) == 100, "every class is there"


def test_features_that_the_scores_have_read_are_not_computed_again():
    rows, net = image_rows(20), net_task().backbone
    cpu = torch.device("cpu")
    ids, features = measured_shift.features_of_rows(net, rows, cpu)
    asked = []
    net.register_forward_hook(lambda module, inputs, out: asked.extend(inputs[0].rows.tolist()))
    some = [3, 7, 19]
    known = (np.append(ids[some], 400), np.concatenate([features[some], features[:1]]))
    again, found = measured_shift.features_of_rows(net, rows, cpu, known)
    assert sorted(asked) == np.delete(ids, some).tolist()
    assert again.tolist() == ids.tolist()
    np.testing.assert_allclose(found, features, rtol=1e-6, atol=1e-6)
    asked.clear()
    _, found = measured_shift.features_of_rows(net, rows, cpu, (ids, features))
    assert not asked and np.array_equal(found, features)
