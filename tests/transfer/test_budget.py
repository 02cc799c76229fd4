"""A budget of trials: what is spent, which pairs of source and technique go on, and that a job that
was killed decides the same.
"""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.schema import ComponentConfig, Train
from pipeline.transfer import budget
from pipeline.transfer.budget import Contest, Learned, Pair, Size

SOURCES, TECHNIQUES = ("a", "b", "c"), ("full", "lora", "linear_probe", "bitfit", "lp_ft")


def pair(target: str, source: str, technique: str) -> Pair:
    entry = f"{source}|{target}|{technique}"
    return Pair(
        tuple(
            SimpleNamespace(id=f"{entry}|{rung}", source=source, technique=technique, entry=entry)
            for rung in range(len(budget.RUNGS))
        )  # type: ignore[arg-type]
    )


def contest(target: str = "task", sources=SOURCES, techniques=TECHNIQUES, seeds: int = 3):
    pairs = tuple(itertools.starmap(pair, itertools.product([target], sources, techniques)))
    return Contest(target, "1.0", pairs, Size(len(pairs), Fraction(seeds)))


def run(contests, spendings, value) -> tuple[budget.Decision, list[str]]:
    """Decide, run what is waited for, and decide again until nothing waits; and what ran."""
    values, order = {}, []
    while (found := budget.decide(contests, spendings, values)).waiting:
        order += [one.id for one in found.waiting]
        values |= {one.id: value(one.id) for one in found.waiting}
    return found, order


def spend(allowed: int, *contests: Contest, seeds: int = 3) -> list[budget.Spending]:
    return budget.share_out(allowed, [one.size for one in contests], seeds)


def random_values(seed: int):
    """A value for each trial that depends on nothing but its id and the seed."""
    return lambda name: float(np.random.default_rng([seed, *name.encode()]).normal())


def kept(found: budget.Decision, *contests: Contest) -> list[str]:
    return [one.entry for each in contests for one in each.pairs if one.entry not in found.cut]


# ---------------------------------------------------------------- how much is spent


@pytest.mark.parametrize("allowed", [*range(18, 60, 5), 75, 100, 500])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_more_than_the_budget_is_spent(allowed, seeds):
    """Counted from the trials that run, not from what the plan says of itself."""
    contests = [
        contest("first", seeds=seeds),
        contest("second", SOURCES[:1], TECHNIQUES[:2], seeds),
        contest("third", (), (), seeds),
    ]
    spendings = spend(allowed, *contests, seeds=seeds)
    found, ran = run(contests, spendings, random_values(0))
    search = sum(budget.RUNGS[int(name[-1])] for name in ran)
    final = len(kept(found, *contests)) * seeds
    assert search + final + seeds * len(contests) == sum(one.cost for one in spendings) <= allowed


def test_a_larger_budget_leaves_more_in_the_table_and_the_largest_cuts_nothing():
    one = contest()
    finalists = [spend(allowed, one)[0].finalists for allowed in range(8, 49)]
    assert finalists == sorted(finalists) and finalists[0] == 1
    (whole,) = spend(3 + 45, one)
    assert whole.finalists == 15 and whole.rungs == (0, 0) and whole.cost == 48
    found, ran = run([one], [whole], random_values(0))
    assert not ran and not found.cut


def test_a_rung_that_would_cut_nothing_is_left_out():
    for allowed in range(8, 48):
        (one,) = spend(allowed, contest())
        counts = [count for count in (*one.rungs, one.finalists) if count]
        assert counts[0] == 15
        assert all(a > b for a, b in itertools.pairwise(counts)), (allowed, one)


@pytest.mark.parametrize(
    ("left", "rungs", "finalists"),
    [
        (5, (15, 0), 1),  # one pair at a third alone has nobody to be compared with
        (6, (15, 4), 1),  # 4 is the middle of 15 and 1: each rung keeps about a quarter
        (7, (15, 7), 1),
        (8, (0, 15), 1),  # 10 after the first rung would cost what 15 cost without it
        (10, (15, 7), 2),
        (44, (0, 15), 13),
        (45, (0, 0), 15),
    ],
)
def test_how_many_of_fifteen_pairs_are_tried_at_each_rung(left, rungs, finalists):
    """By hand, with 3 seeds; the first rung costs 15 / 9 trials, and the second a third each."""
    (one,) = spend(left + 3, contest())
    assert (one.rungs, one.finalists) == (rungs, finalists)
    assert float(one.cost) == pytest.approx(3 + rungs[0] / 9 + rungs[1] / 3 + 3 * finalists)


def test_what_a_target_leaves_over_is_spent_on_the_next():
    """With 9 trials a target spends 8; the 10 that are then left do for two in full."""
    (alone,) = spend(12, contest())
    first, second = spend(2 * 12, contest("first"), contest("second"))
    assert first == alone and (first.rungs, first.finalists) == ((0, 15), 1)
    assert (second.rungs, second.finalists) == ((15, 7), 2)


def test_a_budget_that_is_too_small_says_how_much_is_needed():
    one = contest()
    message = (
        "fanout.select.budget: 7 trials are too few for this job: scratch takes 3, and 4.667 more "
        "are needed to try every source with every technique at 1/9 of the steps and the best of "
        "each target and label fraction in full with 3 seeds: give at least 8, or fewer "
        "techniques, sources, label fractions or seeds"
    )
    with pytest.raises(budget.BudgetError) as caught:
        spend(7, one)
    assert str(caught.value) == message
    assert spend(8, one)[0].finalists == 1


def test_techniques_that_take_more_steps_cost_more():
    plain, long = contest(), contest()
    long = Contest("task", "1.0", long.pairs, Size(15, Fraction(3), Fraction(2)))
    assert spend(30, long)[0].rungs != spend(30, plain)[0].rungs
    assert spend(30, long)[0].cost <= 30
    assert budget.relative_cost(ComponentConfig(name="scratch", options={"budget": 2.0})) == 2


@pytest.mark.parametrize(
    ("train", "rung", "drawn"),
    [
        ({"steps": 60}, 0, {"steps": 6}),
        ({"steps": 60}, 1, {"steps": 20}),
        ({"steps": 9}, 0, {"steps": 1}),
        ({"epochs": 9.0}, 0, {"epochs": 1.0}),
        ({"epochs": 2.0}, 1, {"epochs": 0.666667}),
        ({}, 1, {"epochs": 0.333333}),
    ],
    ids=str,
)
def test_a_rung_is_a_trial_of_a_part_of_the_steps(train, rung, drawn):
    assert budget.shortened(Train(**train), rung) == drawn


# ---------------------------------------------------------------- which pairs go on


@pytest.mark.parametrize("seed", range(20))
def test_the_best_by_value_goes_on_at_every_rung(seed):
    """Of the first target, where nothing is learned yet, and elsewhere where several go on."""
    contests = [contest("first"), contest("second")]
    value = random_values(seed)
    spendings = spend(26, *contests)
    assert [(one.rungs, one.finalists) for one in spendings] == 2 * [((15, 7), 2)]
    found, ran = run(contests, spendings, value)
    for one, spending in zip(contests, spendings, strict=True):
        inside = [p for p in one.pairs if p.rungs[0].id in ran]
        for rung in range(2):
            entered = [p for p in inside if p.rungs[rung].id in ran]
            best = max(entered, key=lambda p: value(p.rungs[rung].id))
            if one.target == "first" or spending.goes_on(rung) > 1:
                assert best.rungs[rung].id not in found.reasons
    assert len(kept(found, *contests)) == sum(one.finalists for one in spendings)


@pytest.mark.parametrize("seed", range(10))
def test_a_better_value_never_cuts_a_pair_that_went_on(seed):
    contests = [contest("first"), contest("second")]
    spendings, value = spend(26, *contests), random_values(seed)
    found, _ = run(contests, spendings, value)
    for entry in kept(found, *contests):
        raised, _ = run(
            contests,
            spendings,
            lambda name, entry=entry: value(name) + 5 * name.startswith(f"{entry}|"),
        )
        assert entry not in raised.cut


def test_pairs_that_failed_or_have_no_value_are_cut_first():
    one = contest()
    values = {
        p.entry: None if p.source == "a" else math.nan if p.source == "b" else 0.0
        for p in one.pairs
    }
    spendings = spend(12, one)
    found, _ = run([one], spendings, lambda name: values[name.rpartition("|")[0]])
    assert [entry[0] for entry in kept(found, one)] == ["c"]


def test_decisions_do_not_depend_on_where_a_job_was_killed():
    """With any part of the values recorded, what follows is the same."""
    contests = [contest("first"), contest("second")]
    spendings, value = spend(20, *contests), random_values(3)
    found, ran = run(contests, spendings, value)
    generator = np.random.default_rng(0)
    for _ in range(20):
        some = generator.permutation(len(ran))[: generator.integers(len(ran))]
        values = {ran[i]: value(ran[i]) for i in some}
        while (again := budget.decide(contests, spendings, values)).waiting:
            assert {one.id for one in again.waiting} <= set(ran), "nothing else is ever run"
            values |= {one.id: value(one.id) for one in again.waiting}
        assert again == found


def test_a_second_target_waits_for_the_first():
    contests = [contest("first"), contest("second")]
    found = budget.decide(contests, spend(30, *contests), {})
    assert {one.entry.split("|")[1] for one in found.waiting} == {"first"}
    assert found.rung == "first, rung 1"


def test_sources_and_techniques_that_did_well_on_earlier_targets_go_before():
    """On the second target one pair of another source has by chance a better value."""
    contests = [contest("first"), contest("second")]

    def value(name: str) -> float:
        source, target, technique, _ = name.split("|")
        if target == "first":
            return 10.0 * (source == "a") + (technique == "full")
        lucky = 0.2 * (source == "b" and technique == "full")
        return {"a": 0.0, "b": -0.1, "c": -1.0}[source] + 0.01 * (technique == "full") + lucky

    spendings = spend(20, *contests)
    assert [one.finalists for one in spendings] == [1, 1]
    found, _ = run(contests, spendings, value)
    assert kept(found, *contests) == ["a|first|full", "a|second|full"]
    alone, _ = run(contests[1:], spendings[1:], value)
    assert kept(alone, contests[1]) == ["b|second|full"], "by its own values alone"


def test_what_is_learned_is_the_mean_place_and_what_is_not_known_stands_in_the_middle():
    learned, first = Learned(), contest(sources=("a", "b"), techniques=("full",))
    learned.add(first.pairs)
    assert learned.places(pair("x", "a", "full")) == [0.0, 0.5]
    assert learned.places(pair("x", "b", "full")) == [1.0, 0.5]
    assert learned.places(pair("x", "new", "lora")) == [0.5, 0.5]


def test_every_pair_that_was_cut_has_a_reason_with_its_rung():
    one = contest()
    found, _ = run([one], spend(10, one), random_values(1))
    assert len(found.reasons) == len(found.cut) == 14
    first, second = "after rung 1 of 2 (1/9 of the steps)", "after rung 2 of 2 (1/3 of the steps)"
    assert sorted(found.reasons.values()) == sorted(
        f"cut by the budget {text}"
        for text in (
            *(f"{first}: place {i} of 15 by validation" for i in range(8, 16)),
            *(f"{second}: place {i} of 7 by validation" for i in range(2, 8)),
        )
    )
    assert all(
        text.startswith(f"cut by the budget {(first, second)[int(name[-1])]}")
        for name, text in found.reasons.items()
    )
    assert found.notes == (
        f"task at 1.0 labels: the budget trained {kept(found, one)[0].replace('|task|', ' · ')} in "
        "full and cut 14 of 15 pairs of source and technique",
    )
