"""What a score was worth, on matrices of which the answer is known."""

from dataclasses import replace

import pytest

from pipeline.report import score_audit
from pipeline.report.blocks import Bullets, Details, Table, Text
from pipeline.report.matrix import MatrixEntry
from pipeline.report.source_scores import PairScores, ScoreValue

ENTRY = MatrixEntry(
    source="a",
    backbone="timm/test_vit",
    target="one",
    technique="full",
    label_fraction="1.0",
    metric="accuracy",
    higher_is_better=True,
    n_seeds=3,
    n_failed=0,
    mean=0.5,
    low=0.49,
    high=0.51,
    seconds=20.0,
    params_trained=100,
    layers_trained="all",
    n_train=100,
    n_test=100,
    hyper_parameters="{}",
    verdict="wins",
)
MEANS = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}


def matrix(means=MEANS, targets=("one",), techniques=("full", "lora"), **more) -> list[MatrixEntry]:
    return [
        replace(
            ENTRY,
            source=source,
            target=target,
            technique=technique,
            mean=mean,
            low=mean - 0.01,
            high=mean + 0.01,
            **more,
        )
        for target in targets
        for technique in techniques
        for source, mean in means.items()
    ]


def scored(values, targets=("one",), higher=True, name="logme") -> dict[str, PairScores]:
    return {
        f"{source}|{target}": PairScores(
            source,
            target,
            {name: ScoreValue(value, higher_is_better=higher, seconds=0.1)},
            seconds=0.3,
        )
        for target in targets
        for source, value in values.items()
    }


def only(entries, scores, **more) -> score_audit.Audit:
    (found,) = score_audit.audits(entries, scores, {"one": "image", "two": "image", **more})
    return found


def test_a_score_in_the_same_order_has_tau_1_and_no_regret():
    found = only(matrix(), scored({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}))
    assert (found.tau, found.top_1, found.top_3) == (pytest.approx(1.0), 0.0, 0.0)
    assert found.chance == pytest.approx(0.15) and found.pairs == 4 and found.misled == ()
    assert found.seconds == pytest.approx(0.4) and found.trial_seconds == 20.0


def test_a_score_in_the_reverse_order_has_tau_minus_1_and_misleads():
    found = only(matrix(), scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}))
    assert found.tau == pytest.approx(-1.0)
    assert found.top_1 == pytest.approx(0.3) and found.top_3 == pytest.approx(0.1)
    (line,) = found.misled
    assert "its first choice d reached accuracy 0.6 where a reached 0.9" in line


def test_a_distance_is_turned_and_so_is_a_metric_of_which_less_is_better():
    order = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert only(matrix(), scored(order, higher=False)).tau == pytest.approx(1.0)
    losses = matrix(dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)), higher_is_better=False)
    found = only(losses, scored(order, higher=False))
    assert found.tau == pytest.approx(1.0) and found.top_1 == 0.0
    worst = only(losses, scored(order))
    assert worst.top_1 == pytest.approx(0.3) and "d reached accuracy 0.4" in worst.misled[0]


def test_exchanges_at_the_top_count_most():
    """The weights are 1 / (1 + rank), added for both sources of a pair (Vigna 2015)."""
    above = only(matrix(), scored({"a": 3.0, "b": 4.0, "c": 2.0, "d": 1.0})).tau
    below = only(matrix(), scored({"a": 4.0, "b": 3.0, "c": 1.0, "d": 2.0})).tau
    assert above == pytest.approx(kendall("abcd", "bacd")) and above < below < 1
    assert below == pytest.approx(kendall("abcd", "abdc"))


def kendall(ours: str, theirs: str) -> float:
    """The weighted tau of two orders without ties, averaged over the ranks of either."""
    taus = []
    for ranks in (ours, theirs):
        agreed = total = 0.0
        for i, a in enumerate(ours):
            for b in ours[i + 1 :]:
                weight = sum(1 / (1 + ranks.index(one)) for one in (a, b))
                total += weight
                agreed += weight if theirs.index(a) < theirs.index(b) else -weight
        taus.append(agreed / total)
    return sum(taus) / 2


def test_a_source_without_a_value_is_in_no_order_and_never_first():
    found = only(matrix(), scored({"a": None, "b": 3.0, "c": 2.0, "d": 1.0}))
    assert found.tau == pytest.approx(1.0) and found.pairs == 3
    assert found.top_1 == pytest.approx(0.1), "the best source is still a"
    undefined = only(matrix(), scored(dict.fromkeys("abcd")))
    assert (undefined.tau, undefined.top_1, undefined.pairs) == (None, None, 0)
    assert score_audit.blocks_of_audits([undefined]) == []


def test_an_interval_needs_enough_pairs_and_holds_tau():
    few = only(matrix(), scored({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}))
    assert few.low is None and few.high is None
    targets = ("one", "two", "three")
    values = {"a": 3.0, "b": 4.0, "c": 2.0, "d": 1.0}
    found = only(matrix(targets=targets), scored(values, targets), three="image")
    assert found.low is not None and found.high is not None
    assert -1 <= found.low < found.tau < found.high <= 1.0


def test_the_interval_is_over_the_sources_of_all_label_fractions():
    """With few labels two sources are there, in the right order; the others are the wrong ones."""
    targets = ("one", "two", "three")
    two = {source: MEANS[source] for source in "ab"}
    entries = matrix(two, targets, label_fraction="0.1") + matrix(targets=targets)
    values = {"a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0}
    found = only(entries, scored(values, targets), three="image")
    assert found.low is not None and found.tau is not None
    assert found.low < found.tau < 1


def test_of_many_targets_the_interval_is_over_targets():
    """Half of them in the same order, half in the reverse: tau is 0 and may be either."""
    targets = tuple(f"t{k}" for k in range(20))
    right, wrong = (
        {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0},
        {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0},
    )
    scores = {**scored(right, targets[::2]), **scored(wrong, targets[1::2])}
    (found,) = score_audit.audits(matrix(targets=targets), scores, dict.fromkeys(targets, "text"))
    assert found.tau == pytest.approx(0.0)
    # of means of 20 signs: 1.96 / sqrt(20) to either side
    assert found.low == pytest.approx(-0.44, abs=0.07)
    assert found.high == pytest.approx(0.44, abs=0.07)


def test_techniques_that_train_nothing_or_were_not_tried_with_all_do_not_count():
    entries = [*matrix(), replace(ENTRY, source="d", technique="extra", mean=0.99)]
    entries += [
        replace(entry, technique="zero_shot", mean=1 - (entry.mean or 0), params_trained=0)
        for entry in matrix(techniques=("full",))
    ]
    (outcome,) = score_audit.outcomes(entries)
    assert outcome.means == pytest.approx(MEANS) and outcome.best == "a"
    assert score_audit.outcomes(matrix({"a": 0.5})) == [], "one source is no choice"


def test_a_loss_within_the_noise_does_not_mislead():
    close = {"a": 0.705, "b": 0.70, "c": 0.70, "d": 0.70}
    assert only(matrix(close), scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})).misled == ()


def test_equal_scores_choose_none_of_their_sources():
    """The regret of a draw among them, which no line blames on the first of them by name."""
    found = only(matrix(), scored({"a": 2.0, "b": 2.0, "c": 2.0, "d": 2.0}))
    assert found.top_1 == pytest.approx(found.chance) == pytest.approx(0.15)
    # three of four without repetition: a is missing from one of four draws, and b is .1 worse
    assert found.top_3 == pytest.approx(0.1 / 4) and found.misled == ()
    partly = only(matrix(), scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 3.0}))
    assert partly.top_1 == pytest.approx(0.25) and partly.misled == ()
    assert partly.top_3 == pytest.approx(0.1)
    assert only(matrix(), scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})).misled != ()


def test_too_few_pairs_are_those_of_a_score_and_not_a_missing_interval():
    targets = ("one", "two", "three")
    every, some = scored(dict.fromkeys("abcd", 1.0), targets), {}
    some = scored({"a": 2.0, "b": 1.0}, name="knn")
    for place, pair in some.items():
        every[place].scores.update(pair.scores)
    found = score_audit.audits(matrix(targets=targets), every, dict.fromkeys(targets, "image"))
    tied = next(one for one in found if one.score == "logme")
    assert (tied.pairs, tied.low) == (12, None), "no interval, and not for want of pairs"
    texts = " ".join(
        block.text for block in score_audit.blocks_of_audits(found) if isinstance(block, Text)
    )
    assert "an interval needs 8: kNN 2. With so few" in texts
    assert "No score's first choice was worse than a random one" in texts


def test_metrics_of_a_modality_are_audited_apart():
    entries = [*matrix(), *matrix(targets=("two",), metric="mse", higher_is_better=False)]
    values = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    found = score_audit.audits(
        entries, scored(values, ("one", "two")), {"one": "table", "two": "table"}
    )
    assert {one.domain: one.tau for one in found} == pytest.approx(
        {"table (accuracy)": 1.0, "table (mse)": -1.0}
    )


def test_domains_are_audited_apart():
    entries = matrix(targets=("one", "two"))
    good = scored({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0})
    bad = scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, ("two",))
    found = score_audit.audits(entries, {**good, **bad}, {"one": "image", "two": "text"})
    assert {one.domain: one.tau for one in found} == pytest.approx({"image": 1.0, "text": -1.0})


def test_the_section_says_what_misled_what_is_undefined_and_what_is_too_few():
    scores = scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    for pair in scores.values():
        pair.scores["leep"] = ScoreValue(None, reason="the source predicts no classes")
        pair.scores["cka"] = ScoreValue(0.5, reason="4 groups; an interval needs 10")
    found = score_audit.blocks_of(matrix(), scores, {"one": "image"})
    table = next(block for block in found if isinstance(block, Table))
    assert [row[:3] for row in table.rows if row[1] == "LogME"] == [["image", "LogME", "-1.00"]]
    texts = " ".join(block.text for block in found if isinstance(block, Text))
    assert "an interval needs 8: LogME, Linear CKA 4. With so few" in texts
    assert "No score's first choice" not in texts
    lines = [line for block in found if isinstance(block, Bullets) for line in block.items]
    assert lines[0].startswith("LogME would have misled: on one")
    (details,) = [block for block in found if isinstance(block, Details)]
    each = next(block for block in details.blocks if isinstance(block, Table))
    assert ["LEEP ↑", "undefined", "undefined", "undefined", "undefined"] in [*map(list, each.rows)]
    without = [line for one in details.blocks if isinstance(one, Bullets) for line in one.items]
    assert "Linear CKA, a for one: 4 groups; an interval needs 10" in without
    assert score_audit.blocks_of(matrix(), {}, {}) == []


def test_sources_that_were_left_out_are_named():
    scores = scored({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "e": 0.5})
    found = score_audit.blocks_of(matrix(), scores, {"one": "image"})
    texts = [block.text for block in found if isinstance(block, Text)]
    assert "Not fine-tuned, and so not compared: e for one." in texts


def test_a_target_whose_pairs_a_budget_cut_tells_nothing_of_a_score():
    """The score puts last what is best on both, and only one was fanned out in full."""
    scores = scored({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, ("one", "two"))
    domains = {"one": "image", "two": "text"}
    found = score_audit.blocks_of(
        matrix(targets=("one", "two")), scores, domains, {("two", ENTRY.label_fraction)}
    )
    table = next(block for block in found if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["image"]
    texts = " ".join(block.text for block in found if isinstance(block, Text))
    assert "What scores were worth is not known of two at 100 % labels: a budget" in texts
