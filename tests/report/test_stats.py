import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.core.metrics import catalog
from pipeline.report import stats
from pipeline.report.stats import RunPredictions

ACCURACY, LOSS = catalog.metric("accuracy"), catalog.metric("loss")


def answers(hits: np.ndarray) -> catalog.Predictions:
    """Two-class predictions that are right exactly where ``hits`` says so."""
    label = np.zeros(len(hits), np.int64)
    scores = np.stack([hits, 1 - hits], axis=1).astype(np.float32)
    return {
        "scores": scores,
        "label": label,
        "loss": np.where(hits, 0.1, 2.0),
        "count": np.ones(len(hits)),
    }


def losses(values: np.ndarray) -> catalog.Predictions:
    return {"loss": np.asarray(values, np.float64), "count": np.ones(len(values))}


def run(predictions, seed=0, rows=None, groups=None) -> RunPredictions:
    n = len(predictions["loss"])
    return RunPredictions(
        np.arange(n) if rows is None else np.asarray(rows), predictions, seed, groups
    )


def gain(*sides, **options) -> tuple[float, float, float]:
    found = stats.compare(*sides, **options)
    return found.value, found.low, found.high


def test_accuracy_interval_agrees_with_the_normal_approximation():
    hits = np.random.default_rng(0).random(2000) < 0.8
    low, high = stats.interval(ACCURACY, answers(hits), draws=4000)
    p = hits.mean()
    half = 1.959964 * math.sqrt(p * (1 - p) / len(hits))
    assert low == pytest.approx(p - half, abs=0.1 * half)
    assert high == pytest.approx(p + half, abs=0.1 * half)


def test_kinds_of_units_and_single_units_are_drawn_from_the_same_distribution():
    """The multinomial over equal units against a plain resampling of indices."""
    hits = np.random.default_rng(1).random(300) < 0.7
    rng = np.random.default_rng(2)
    plain = np.percentile(hits[rng.integers(0, 300, (4000, 300))].mean(1), (2.5, 97.5))
    assert stats.interval(ACCURACY, answers(hits), draws=4000) == pytest.approx(
        tuple(plain), abs=0.008
    )


def test_interval_of_continuous_units_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).gamma(2.0, size=400)
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, random_state=0
    ).confidence_interval
    ours = stats.interval(LOSS, losses(values), draws=4000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_interval_of_a_ratio_follows_its_counts():
    """Perplexity of rows with unequal token counts: final(sum / sum), as an independent loop
    computes it.
    """
    rng = np.random.default_rng(4)
    count = rng.integers(1, 50, 200).astype(float)
    total = count * rng.gamma(2.0, size=200)
    draws = [rng.integers(0, 200, 200) for _ in range(3000)]
    plain = np.percentile([math.exp(total[i].sum() / count[i].sum()) for i in draws], (2.5, 97.5))
    ours = stats.interval(catalog.metric("perplexity"), {"loss": total, "count": count}, draws=3000)
    assert ours == pytest.approx(tuple(plain), rel=0.03)


def test_metric_without_units_is_recomputed():
    hits = np.random.default_rng(5).random(400) < 0.8
    with_units = stats.interval(ACCURACY, answers(hits))
    calls = []

    def value(p):
        calls.append(len(p["label"]))
        return ACCURACY.value(p)

    without = stats.interval(catalog.Metric("accuracy", True, value), answers(hits))
    assert without == pytest.approx(with_units, abs=0.015)
    assert len(calls) <= stats.RECOMPUTED_DRAWS + 1 and set(calls) == {400}


def test_recomputed_metric_resamples_whole_groups():
    sizes = []
    metric = catalog.Metric(
        "count", True, lambda p: sizes.append(len(p["label"])) or float(p["label"].mean())
    )
    groups = np.array([0] * 10 + [1] * 30)
    low, high = stats.interval(metric, {"label": np.arange(40.0) >= 10}, groups=groups)
    assert set(sizes) == {20, 40, 60}
    assert (low, high) == (0.0, 1.0)


def test_same_seed_same_interval_and_another_seed_another():
    p = losses(np.random.default_rng(6).random(100))
    assert (
        stats.interval(LOSS, p, seed=1)
        == stats.interval(LOSS, p, seed=1)
        != stats.interval(LOSS, p, seed=2)
    )


def test_groups_widen_the_interval_by_the_design_effect():
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(40), 25)
    values = rng.normal(size=40)[
        groups
    ]  # rows of a group are copies: the design effect is the group's size
    shuffled = rng.permutation(1000)
    narrow = stats.interval(LOSS, losses(values))
    wide = stats.interval(LOSS, losses(values[shuffled]), groups=groups[shuffled])
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(5.0, rel=0.2)
    assert stats.mean_interval(LOSS, [run(losses(values), groups=groups)])[1:] == pytest.approx(
        wide, rel=0.15
    )


def test_memory_is_bounded(monkeypatch):
    p = losses(np.random.default_rng(8).random(500))
    whole = stats.interval(LOSS, p)
    monkeypatch.setattr(stats, "MAX_UNITS_IN_MEMORY", 1500)  # three draws a chunk
    assert stats.interval(LOSS, p) == pytest.approx(whole, abs=1e-12)
    monkeypatch.setattr(stats, "MAX_UNITS_SAMPLED", 1)
    assert stats.resampled_totals(
        np.random.default_rng(0).random((50, 2)), 1000, np.random.default_rng(0)
    ).shape == (stats.RECOMPUTED_DRAWS, 2)


def test_no_rows_give_nan():
    assert all(math.isnan(x) for x in stats.interval(LOSS, losses(np.zeros(0))))


def test_uncounted_draws_are_left_out():
    p = {
        "loss": np.array([1.0, 0.0]),
        "count": np.array([1.0, 0.0]),
    }  # a draw of the second row alone has nothing to divide by
    assert stats.interval(LOSS, p) == (1.0, 1.0)


@pytest.mark.parametrize("df", [1, 2, 5, 10, 11, 17, 30, 200])
def test_t_interval_agrees_with_scipy(df):
    from scipy.stats import t

    values = np.random.default_rng(df).normal(size=df + 1)
    low, high = t.interval(0.95, df, values.mean(), values.std(ddof=1) / math.sqrt(df + 1))
    assert stats.t_interval(list(values)) == pytest.approx((values.mean(), low, high), abs=1e-9)


def test_mean_is_over_seeds_and_one_seed_resamples_units_only():
    rng = np.random.default_rng(9)
    runs = [run(losses(rng.normal(s, 1, 200)), s) for s in range(3)]
    mean, low, high = stats.mean_interval(LOSS, runs)
    assert mean == pytest.approx(np.mean([r.predictions["loss"].mean() for r in runs]))
    assert low < mean < high and high - low > 2  # seeds differ by 1: far more than the units' 0.07
    one = stats.mean_interval(LOSS, runs[:1])
    assert one[1:] == pytest.approx(stats.interval(LOSS, runs[0].predictions), abs=0.02)
    with pytest.raises(ValueError, match="no runs"):
        stats.mean_interval(LOSS, [])


def test_an_interval_of_a_share_ends_where_shares_do():
    runs = [run(answers(np.arange(20) < right), seed) for seed, right in enumerate((20, 20, 12))]
    mean, low, high = stats.mean_interval(ACCURACY, runs)
    assert mean == pytest.approx(52 / 60)
    assert low < 0.6
    assert high == 1.0, "Student's widening for 3 seeds goes beyond"
    assert stats.mean_interval(LOSS, runs)[2] > LOSS.value(runs[2].predictions), (
        "a loss has no greatest value"
    )
    assert catalog.metric("auroc/fluid", ["fluid"]).bounds({}) == (0.0, 1.0)
    assert catalog.metric("kappa").bounds({}) == (-1.0, 1.0)


def test_rows_are_paired_by_id_not_by_place():
    rng = np.random.default_rng(10)
    base = rng.normal(size=300)
    order = rng.permutation(300)
    ours = run(losses(base - 0.1), rows=np.arange(300))
    shuffled = run(losses(base[order]), rows=order)
    value, low, high = gain(LOSS, [ours], [shuffled])
    assert (value, low, high) == pytest.approx(
        (0.1, 0.1, 0.1)
    )  # every unit gains exactly 0.1: no spread is left


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(11)
    base = rng.normal(size=400)
    ours = [run(losses(base - 0.1 + rng.normal(0, 0.1, 400)), s) for s in range(3)]
    scratch = [run(losses(base + rng.normal(0, 0.1, 400)), s) for s in range(3)]
    _, low, high = gain(LOSS, ours, scratch)
    a, b = stats.mean_interval(LOSS, ours), stats.mean_interval(LOSS, scratch)
    assert high - low < 0.5 * ((a[2] - a[1]) + (b[2] - b[1])) / 2
    assert low > 0


def test_gain_is_positive_when_better_in_either_direction():
    good, bad = np.arange(200) < 180, np.arange(200) < 120
    for metric in (ACCURACY, LOSS):
        value, low, high = gain(metric, [run(answers(good))], [run(answers(bad))])
        assert 0 < low <= value <= high
        value, low, high = gain(metric, [run(answers(bad))], [run(answers(good))])
        assert low <= value <= high < 0


def test_gain_pairs_seeds_and_uses_the_common_ones():
    p = {s: losses(np.full(50, float(s))) for s in range(4)}
    ours = [run(losses(p[s]["loss"] - 1), s) for s in (0, 1, 2)]
    scratch = [run(p[s], s) for s in (3, 2, 1)]
    assert gain(LOSS, ours, scratch) == pytest.approx(
        (1, 1, 1)
    )  # seeds differ, but each pair differs by 1
    with pytest.raises(ValueError, match="no seed in common"):
        gain(LOSS, ours[:1], scratch)
    with pytest.raises(ValueError, match="not distinct"):
        gain(LOSS, [ours[0], ours[0]], scratch)


def test_gain_uses_the_rows_in_common():
    ours = run(losses(np.array([1.0, 2.0, 3.0, 99.0])), rows=[0, 1, 2, 3])
    scratch = run(losses(np.array([99.0, 4.0, 3.0, 2.0])), rows=[7, 2, 1, 0])
    assert gain(LOSS, [ours], [scratch]) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="no test row in common"):
        gain(LOSS, [ours], [run(losses(np.ones(2)), rows=[8, 9])])
    with pytest.raises(ValueError, match="are twice"):
        gain(LOSS, [ours], [run(losses(np.ones(2)), rows=[1, 1])])
    assert list(stats.common_rows([ours, scratch])) == [0, 1, 2]


def test_groups_are_paired_with_the_rows_of_their_run():
    rng = np.random.default_rng(12)
    groups = np.repeat(np.arange(30), 10)
    effect = rng.normal(0.5, 1, 30)[groups]
    backwards = np.arange(300)[::-1]
    scratch = [run(losses(np.zeros(300)), s, groups=groups) for s in (1, 2)]
    ours = [
        run(losses(-effect[::-1]), s, backwards, groups[::-1]) for s in (0, 1, 2)
    ]  # the first seed has no pair
    plain = gain(LOSS, [replace(one, groups=None) for one in ours], scratch)
    grouped = gain(LOSS, ours, scratch)
    assert grouped[0] == plain[0]
    assert (grouped[2] - grouped[1]) / (plain[2] - plain[1]) == pytest.approx(
        math.sqrt(10), rel=0.25
    )


@pytest.mark.parametrize(("across_seeds", "across_units"), [(0.1, 0.1), (0.01, 0.5), (0.03, 0.5)])
def test_coverage_is_near_nominal_with_three_seeds(across_seeds, across_units):
    """With no true gain, about 95 % of the intervals hold zero, whichever noise is larger (the
    plain bootstrap: 75 %).
    """
    rng, held = np.random.default_rng(13), 0
    repeats = 150
    for i in range(repeats):
        shared = rng.normal(
            0, across_units, 200
        )  # some rows are easier for one method than for the other
        ours = [
            run(losses(shared + rng.normal(0, across_seeds) + rng.normal(0, 0.05, 200)), s)
            for s in range(3)
        ]
        zero = [run(losses(np.zeros(200)), s) for s in range(3)]
        _, low, high = gain(LOSS, ours, zero, draws=200, seed=i)
        held += low <= 0 <= high
    assert 0.89 <= held / repeats <= 1.0


def seeds_of(
    gains: np.ndarray, shared: np.ndarray, rng: np.random.Generator
) -> list[RunPredictions]:
    """One run a seed: losses of the rows that all seeds share, a gain of its own for each seed, and
    a little noise.
    """
    return [
        run(losses(shared + gain + rng.normal(0, 0.05, len(shared))), seed)
        for seed, gain in enumerate(gains)
    ]


def test_a_gain_varies_with_seeds_and_with_rows():
    """Against the same numbers computed here from the cited formula: variance between seeds / S +
    covariance over rows, Satterthwaite's degrees.
    """
    from scipy.stats import t

    rng = np.random.default_rng(20)
    shared, gains = rng.normal(-0.4, 1.0, 250), rng.normal(0, 0.1, 4)
    ours, zero = (
        seeds_of(gains, shared, rng),
        [run(losses(np.zeros(250)), seed) for seed in range(4)],
    )
    each = -np.array([one.predictions["loss"] for one in ours])
    covariance = np.cov(each) / 250
    between, over_rows = each.mean(1).var(ddof=1) / 4, covariance[~np.eye(4, dtype=bool)].mean()
    degrees = (between + over_rows) ** 2 / (between**2 / 3 + over_rows**2 / 249)
    half = t.ppf(0.975, degrees) * math.sqrt(between + over_rows)
    found = stats.compare(LOSS, ours, zero, draws=8000)
    assert found.seeds == 4 and found.value == pytest.approx(each.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.04)
    assert found.p_value == pytest.approx(
        2 * t.sf(found.value / math.sqrt(between + over_rows), degrees), rel=0.3
    )


def test_the_p_value_and_the_interval_say_the_same():
    rng = np.random.default_rng(21)
    for _ in range(40):
        shared, gains = rng.normal(0.1, 1.0, 60), rng.normal(0, 0.2, 3)
        found = stats.compare(
            LOSS,
            seeds_of(gains, shared, rng),
            [run(losses(np.zeros(60)), seed) for seed in range(3)],
            draws=200,
        )
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)


def test_seeds_that_agree_by_chance_do_not_make_the_interval_vanish():
    """Each seed is right on one row more, another row each time: rows alone explain more spread
    than the seeds show.
    """
    wrong = np.arange(100) < 70
    ours = []
    for seed in range(3):
        better = wrong.copy()
        better[80 + seed] = True
        ours.append(run(answers(better), seed))
    found = stats.compare(ACCURACY, ours, [run(answers(wrong), seed) for seed in range(3)])
    assert found.value == pytest.approx(0.01) and found.low < 0 < found.high


def test_one_pair_of_seeds_has_no_p_value_and_an_interval_over_rows_alone():
    hits = np.random.default_rng(22).random((2, 300)) < [[0.9], [0.6]]
    found = stats.compare(
        ACCURACY, [run(answers(hits[0]), 0), run(answers(hits[0]), 1)], [run(answers(hits[1]), 1)]
    )
    assert found.seeds == 1
    assert math.isnan(found.p_value)
    assert 0.2 < found.low < found.value < found.high < 0.4


def test_holm_agrees_with_the_definition():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert stats.holm(p_values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert stats.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and stats.holm([]) == []


@pytest.mark.parametrize("groups", [None, np.arange(40) // 2], ids=["rows", "groups"])
def test_units_that_are_all_alike_do_not_make_the_interval_vanish(groups):
    from scipy.stats import binomtest

    n = 40 if groups is None else 20
    exact = binomtest(n, n).proportion_ci(0.95, "exact")
    right, wrong = (
        [run(answers(np.full(40, hit)), seed, groups=groups) for seed in range(3)]
        for hit in (True, False)
    )
    assert stats.interval(ACCURACY, right[0].predictions, groups=groups) == pytest.approx(exact)
    assert stats.mean_interval(ACCURACY, right) == pytest.approx((1.0, *exact))
    assert stats.mean_interval(ACCURACY, wrong) == pytest.approx((0.0, 0.0, 1 - exact.low))

    same = stats.compare(ACCURACY, right, right)
    assert (same.low, same.value, same.high) == pytest.approx((exact.low - 1, 0.0, 1 - exact.low))
    assert same.p_value == 1.0
    better = stats.compare(ACCURACY, right, wrong)
    assert (better.low, better.value, better.high) == pytest.approx((2 * exact.low - 1, 1.0, 1.0))
    assert better.p_value == pytest.approx(binomtest(n, n).pvalue), "the sign test"


def test_units_that_are_all_alike_say_nothing_of_a_metric_without_bounds():
    better, worse = ([run(losses(np.full(40, of)), seed) for seed in (0, 1)] for of in (0.5, 2.0))
    assert stats.mean_interval(LOSS, worse) == (2.0, 2.0, 2.0)
    assert stats.compare(LOSS, better, worse) == stats.Gain(1.5, 1.5, 1.5, 0.0, 2)


def test_a_perfect_ranking_is_as_sure_as_its_independent_pairs():
    p = {"scores": np.arange(60.0)[:, None] * [0, 1], "label": (np.arange(60) >= 48).astype(int)}
    low, high = stats.interval(catalog.metric("auroc"), p)
    assert (low, high) == pytest.approx((0.025 ** (1 / 12), 1.0)), "12 positive rows"

    truth = np.arange(60)[:, None] >= [56, 30]
    p = {"loss": np.zeros(60), "scores": truth * 1.0, "labels": truth}
    of_labels = replace(run(p), labels=("rare", "common"))
    for label, units in (("rare", 4), ("common", 30)):
        metric = catalog.metric(f"auroc/{label}", of_labels.labels)
        low, high = stats.mean_interval(metric, [of_labels])[1:]
        assert (low, high) == pytest.approx((0.025 ** (1 / units), 1.0)), label


def test_the_choice_of_settings_widens_the_interval_where_the_search_could_have_ended_elsewhere():
    clear, open_ended = [[0.9, 0.91, 0.9], [0.5, 0.51, 0.5]], [[0.9, 0.7, 0.8], [0.85, 0.92, 0.78]]
    assert stats.choice_variance(clear) == pytest.approx(0.0)
    assert stats.choice_variance(clear[:1]) == 0.0
    assert stats.choice_variance([[0.8, 0.9], [0.8, 0.9]]) == pytest.approx(0.0), (
        "whichever is chosen, it is as good"
    )
    # two settings whose means are 0, 1 and whose noise is large: each is chosen about half the
    # time, a variance of 1/4
    assert stats.choice_variance([[-30.0, 30.0], [-29.0, 31.0]]) == pytest.approx(0.25, abs=0.01)
    rng = np.random.default_rng(23)
    ours, zero = (
        seeds_of(rng.normal(0, 0.02, 3), rng.normal(-0.3, 0.5, 200), rng),
        [run(losses(np.zeros(200)), seed) for seed in range(3)],
    )
    plain = stats.compare(LOSS, ours, zero)
    wider = stats.compare(LOSS, ours, zero, choice=stats.choice_variance(open_ended))
    assert wider.value == plain.value and wider.low < plain.low and wider.p_value > plain.p_value


@pytest.mark.parametrize("groups", [None, np.arange(40) // 4], ids=["rows", "groups"])
def test_evidence_counts_units_outside_of_the_most_frequent_class(groups):
    hits = np.ones(40, bool)
    p = {**answers(hits), "label": (np.arange(40) < 12).astype(np.int64)}
    found = stats.evidence(run(p, groups=groups))
    assert found.count == (12 if groups is None else 3)
    assert found.what.endswith(" outside of the most frequent class")
    assert found.enough == (groups is None)
    many = stats.evidence(run({**p, "label": np.minimum(np.arange(40), 30)}))
    assert many.count == 10
    plain = stats.evidence(run(losses(np.zeros(40)), groups=groups))
    assert (plain.count, plain.needed, plain.what) == (
        (40, 20, "rows") if groups is None else (10, 20, "groups")
    )
    positions = {
        "label": np.array([[0, 0, -1], [0, 1, 1], [0, -1, -1]]),
        "scores": np.zeros((3, 3, 2)),
        "loss": np.zeros(3),
    }
    assert stats.evidence(run(positions)).count == 1
    of_episodes = stats.evidence(run(positions), "success")
    assert (of_episodes.count, of_episodes.needed, of_episodes.what) == (3, 20, "rows")
    sets = {
        "labels": np.array([[1, 0], [0, 0], [0, 1], [0, 1]]),
        "scores": np.zeros((4, 2)),
        "loss": np.zeros(4),
    }
    assert stats.evidence(run(sets)).count == 3, "1 positive of one label and 2 of the other"


def test_intervals_end_at_the_bounds_of_their_metrics():
    bounded = {
        "label": np.zeros(30),
        "scores": np.zeros((30, 2)),
        "loss": np.zeros(30),
        "most_steps": np.full(30, 400.0),
    }
    for name, bounds in {
        "accuracy": (0, 1),
        "kappa": (-1, 1),
        "brier": (0, 1),
        "perplexity": (1, math.inf),
        "loss": (0, math.inf),
        "wer": (0, math.inf),
        "steps": (0, 400),
        "return": (-math.inf, math.inf),
    }.items():
        assert catalog.metric(name).bounds(bounded) == bounds, name
    assert catalog.metric("brier").bounds({"scores": np.zeros((5, 3))}) == (0, 2)
    rng = np.random.default_rng(24)
    steps = [
        {
            "loss": np.zeros(20),
            "steps": np.minimum(400, rng.normal(390 - 60 * seed, 40, 20)),
            "most_steps": np.full(20, 400.0),
        }
        for seed in range(3)
    ]
    low, high = stats.mean_interval(
        catalog.metric("steps"), [run(p, seed) for seed, p in enumerate(steps)]
    )[1:]
    assert low >= 0 and high == 400.0, "three seeds whose spread reaches beyond"
    ours, scratch = (
        [run(answers(np.arange(40) < right), seed) for seed, right in enumerate(rights)]
        for rights in ((40, 40, 8), (0, 2, 0))
    )
    assert gain(ACCURACY, ours, scratch)[2] == 1.0, "accuracies differ by at most one"


# ----------------------------------------------------- metrics that count how often a row was drawn


def label_sets(n: int, seed: int, skill: float) -> catalog.Predictions:
    """Three labels a row, of which a tenth, a third and two thirds of the rows have one; two seeds
    see the same truth.
    """
    truth = np.random.default_rng(9).random((n, 3)) < (0.1, 0.33, 0.67)
    return {
        "scores": np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
        + skill * truth,
        "labels": truth.astype(np.uint8),
        "loss": np.zeros(n),
    }


def recomputed(name: str) -> catalog.Metric:
    """The same metric without its short cut."""
    of = catalog.metric(name)
    return catalog.Metric(of.name, of.higher_is_better, of.value)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        pytest.param("macro_auroc", None, marks=pytest.mark.slow, id="macro_auroc-rows"),
        pytest.param(
            "macro_average_precision",
            np.repeat(np.arange(60), 5),
            marks=pytest.mark.slow,
            id="macro_average_precision-groups",
        ),
        pytest.param("macro_f1", None, id="macro_f1-rows"),
        pytest.param("macro_f1", np.repeat(np.arange(60), 5), id="macro_f1-groups"),
    ],
)
def test_counted_and_recomputed_intervals_agree(monkeypatch, name, groups):
    monkeypatch.setattr(stats, "RECOMPUTED_DRAWS", 1000)
    ours, scratch = (
        [
            run(label_sets(300, seed + 10 * (skill > 1), skill), seed, groups=groups)
            for seed in (0, 1)
        ]
        for skill in (1.4, 1.0)
    )
    counted, anew = catalog.metric(name), recomputed(name)
    for a, b in (
        (
            stats.interval(counted, ours[0].predictions, groups=groups),
            stats.interval(anew, ours[0].predictions, groups=groups),
        ),
        (gain(counted, ours, scratch), gain(anew, ours, scratch)),
    ):
        width = b[-1] - b[-2]
        assert width > 0.02 and a == pytest.approx(b, abs=0.1 * width)


def test_counted_draws_are_whole_groups_and_the_same_for_every_run():
    seen = []

    def resampled(p, counts):
        seen.append(counts)
        return counts @ p["loss"]

    of = catalog.Metric("total", True, lambda p: float(p["loss"].sum()), resampled=resampled)
    groups = np.array([5, 5, 2, 9, 9, 9])
    found = gain(
        of,
        [run(losses(np.arange(6.0)), groups=groups)],
        [run(losses(np.arange(6.0) - 1), groups=groups)],
    )
    assert found[0] == 6.0
    assert found[1] < found[2]
    counts = np.concatenate(seen[::2])
    assert np.array_equal(counts, np.concatenate(seen[1::2])) and counts.shape == (stats.DRAWS, 6)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 3] == counts[:, 5]).all()
    assert (counts[:, [0, 2, 3]].sum(1) == 3).all()
    assert counts.std(0).min() > 0


def test_counted_draws_hold_bounded_memory(monkeypatch):
    sizes = []
    of = catalog.Metric(
        "mean",
        True,
        lambda p: float(p["loss"].mean()),
        resampled=lambda p, counts: sizes.append(len(counts)) or counts @ p["loss"] / 500,
    )
    p = losses(np.random.default_rng(8).random(500))
    whole = stats.interval(of, p)
    assert sizes == [stats.DRAWS]
    monkeypatch.setattr(stats, "MAX_UNITS_IN_MEMORY", 1500)  # three draws a chunk
    assert stats.interval(of, p) == pytest.approx(whole, abs=1e-12) and set(sizes[1:]) == {3, 1}
    for cells, draws in (
        (500 * 700 * 3, 700),
        (1, stats.RECOMPUTED_DRAWS),
    ):  # scores of 3 classes a row: three times the work
        sizes.clear()
        monkeypatch.setattr(stats, "MAX_UNITS_SAMPLED", cells)
        stats.interval(of, {**p, "scores": np.zeros((500, 3))})
        assert sum(sizes) == draws
