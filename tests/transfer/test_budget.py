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
from pipeline.transfer.budget import Bracket, BracketSize, Contender, History

SOURCES, TECHNIQUES = ("a", "b", "c"), ("full", "lora", "linear_probe", "bitfit", "lp_ft")


def pair(target: str, source: str, technique: str) -> Contender:
    entry = f"{source}|{target}|{technique}"
    return Contender(
        tuple(
            SimpleNamespace(id=f"{entry}|{rung}", source=source, technique=technique, entry=entry)
            for rung in range(len(budget.RUNGS))
        )  # type: ignore[arg-type]
    )


def bracket(target: str = "task", sources=SOURCES, techniques=TECHNIQUES, seeds: int = 3):
    pairs = tuple(itertools.starmap(pair, itertools.product([target], sources, techniques)))
    return Bracket(target, "1.0", pairs, BracketSize(len(pairs), Fraction(seeds)))


def with_solved_heads(technique: str = "linear_probe") -> Bracket:
    """A bracket in which the pairs of a technique have one trial for all rungs."""
    pairs = tuple(
        Contender((one.rungs[0],) * 2) if one.technique == technique else one
        for one in bracket().pairs
    )
    solved = sum(one.is_solved for one in pairs)
    return Bracket("task", "1.0", pairs, BracketSize(15, Fraction(3), Fraction(1), solved))


def run(brackets, allocations, value) -> tuple[budget.Decision, list[str]]:
    """Decide, run what is waited for, and decide again until nothing waits; and what ran."""
    values, order = {}, []
    while (found := budget.decide(brackets, allocations, values)).waiting:
        order += [one.id for one in found.waiting]
        values |= {one.id: value(one.id) for one in found.waiting}
    return found, order


def spend(allowed: int, *brackets: Bracket, seeds: int = 3) -> list[budget.Allocation]:
    return budget.allocate(allowed, [one.size for one in brackets], seeds)


def random_values(seed: int):
    """A value for each trial that depends on nothing but its id and the seed."""
    return lambda name: float(np.random.default_rng([seed, *name.encode()]).normal())


def kept(found: budget.Decision, *brackets: Bracket) -> list[str]:
    return [one.entry for each in brackets for one in each.pairs if one.entry not in found.cut]


# ---------------------------------------------------------------- how much is spent


@pytest.mark.parametrize("allowed", [*range(21, 60, 5), 75, 100, 500])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_more_than_the_budget_is_spent(allowed, seeds):
    """Counted from the trials that run, not from what the plan says of itself."""
    brackets = [
        bracket("first", seeds=seeds),
        bracket("second", SOURCES[:1], TECHNIQUES[:2], seeds),
        bracket("third", (), (), seeds),
    ]
    allocations = spend(allowed, *brackets, seeds=seeds)
    found, ran = run(brackets, allocations, random_values(0))
    search = sum(budget.RUNGS[int(name[-1])] for name in ran)
    final = len(kept(found, *brackets)) * seeds
    assert search + final + seeds * len(brackets) == sum(one.cost for one in allocations) <= allowed


def test_a_larger_budget_leaves_more_in_the_table_and_the_largest_cuts_nothing():
    one = bracket()
    finalists = [spend(allowed, one)[0].finalists for allowed in range(10, 49)]
    assert finalists == sorted(finalists) and finalists[0] == 1
    (whole,) = spend(3 + 45, one)
    assert whole.finalists == 15 and whole.rungs == (0, 0) and whole.cost == 48
    found, ran = run([one], [whole], random_values(0))
    assert not ran and not found.cut


def test_a_rung_that_would_cut_nothing_is_left_out():
    for allowed in range(10, 48):
        (one,) = spend(allowed, bracket())
        counts = [count for count in (*one.rungs, one.finalists) if count]
        assert counts[0] == 15
        assert all(a > b for a, b in itertools.pairwise(counts)), (allowed, one)


@pytest.mark.parametrize(
    ("left", "rungs", "finalists"),
    [
        (7, (15, 2), 1),
        (8, (15, 3), 1),
        (10, (15, 5), 1),
        (13, (15, 8), 1),
        (14, (15, 6), 2),  # 6 is the middle of 15 and 2: each rung keeps about 40 %
        (18, (15, 7), 3),
        (20, (15, 9), 3),
        (44, (0, 15), 9),  # 14 after the first rung would cost more than 15 without it
        (45, (0, 0), 15),
    ],
)
def test_how_many_of_fifteen_pairs_are_tried_at_each_rung(left, rungs, finalists):
    """By hand, with 3 seeds; the first rung costs 15 / 9 trials, and the second one each."""
    (one,) = spend(left + 3, bracket())
    assert (one.rungs, one.finalists) == (rungs, finalists)
    assert float(one.cost) == pytest.approx(3 + rungs[0] / 9 + rungs[1] + 3 * finalists)


@pytest.mark.parametrize("allowed", range(10, 50))
def test_solved_heads_are_compared_with_all_steps_by_the_trial_that_they_have(allowed):
    """Beside them as many other pairs as the budget pays for, at least two."""
    one = with_solved_heads()
    allocations = spend(allowed, one)
    found, ran = run([one], allocations, random_values(allowed))
    assert len(ran) == len(set(ran)) == len(found.tried) == allocations[0].num_search_trials
    costs = [
        budget.RUNGS[0] if "linear_probe" in name else budget.RUNGS[int(name[-1])] for name in ran
    ]
    final = kept(found, one)
    assert sum(costs) + 3 * len(final) + 3 == allocations[0].cost <= allowed
    stepped = sum(cost for cost, name in zip(costs, ran, strict=True) if "linear_probe" not in name)
    assert stepped + 3 * sum("linear_probe" not in entry for entry in final) <= (
        allocations[0].stepped_cost
    )
    if all(allocations[0].rungs):
        assert sum(name.endswith("1") for name in ran) == allocations[0].rungs[1] - 3 >= 2
        cut_early = [name for name, why in found.reasons.items() if "rung 1" in why]
        assert not any("linear_probe" in name for name in cut_early)


def test_with_solved_heads_every_technique_is_compared_with_all_steps_at_a_quarter_of_the_cost():
    """12 of 48 trials: four networks, which were three without their own place for solved heads."""
    one = with_solved_heads()
    _, ran = run([one], spend(12, one), lambda name: float("linear_probe" in name))
    compared = {name.split("|")[2] for name in ran if name.endswith("1")}
    assert compared == {"full", "lora", "bitfit", "lp_ft"}


def test_what_a_target_leaves_over_is_spent_on_the_next():
    """With 8 trials a target spends 7.67, and with 8.33 that are then left 7.67; 0.67 more do."""
    (alone,) = spend(11, bracket())
    *first, last = spend(3 * 11, bracket("first"), bracket("second"), bracket("third"))
    assert first == [alone, alone] and (alone.rungs, alone.finalists) == ((15, 3), 1)
    assert (last.rungs, last.finalists) == ((15, 4), 1)


def test_a_budget_that_is_too_small_says_how_much_is_needed():
    one = bracket()
    message = (
        "fanout.select.budget: 9 trials are too few for this job: scratch takes 3, and 6.667 more "
        "are needed to try every source with every technique with 1/9 of the steps, 2 of them with "
        "all, and the best of each target and label fraction with 3 seeds: give at least 10, or "
        "fewer techniques, sources, label fractions or seeds"
    )
    with pytest.raises(budget.BudgetError) as caught:
        spend(9, one)
    assert str(caught.value) == message
    assert spend(10, one)[0].finalists == 1


def test_techniques_that_take_more_steps_cost_more():
    plain, long = bracket(), bracket()
    long = Bracket("task", "1.0", long.pairs, BracketSize(15, Fraction(3), Fraction(2)))
    assert spend(30, long)[0].rungs != spend(30, plain)[0].rungs
    assert spend(30, long)[0].cost <= 30
    assert budget.relative_cost(ComponentConfig(name="scratch", options={"budget": 2.0})) == 2


@pytest.mark.parametrize(
    ("train", "rung", "drawn"),
    [
        ({"steps": 60}, 0, {"steps": 6}),
        ({"steps": 60}, 1, {}),
        ({"steps": 9}, 0, {"steps": 1}),
        ({"epochs": 9.0}, 0, {"epochs": 1.0}),
        ({"epochs": 2.0}, 0, {"epochs": 0.222222}),
        ({}, 0, {"epochs": 0.111111}),
    ],
    ids=str,
)
def test_a_rung_is_a_trial_of_a_part_of_the_steps(train, rung, drawn):
    assert budget.shortened(Train(**train), rung) == drawn


# ---------------------------------------------------------------- which pairs go on


@pytest.mark.parametrize("seed", range(20))
def test_the_best_by_value_goes_on_at_every_rung(seed):
    brackets = [bracket("first"), bracket("second")]
    allocations, value = spend(26, *brackets), random_values(seed)
    found, ran = run(brackets, allocations, value)
    for one in brackets:
        for rung in range(2):
            entered = [p for p in one.pairs if p.rungs[rung].id in ran]
            best = max(entered, key=lambda p: value(p.rungs[rung].id))
            assert best.rungs[rung].id not in found.reasons
    assert len(kept(found, *brackets)) == sum(one.finalists for one in allocations)


@pytest.mark.parametrize("seed", range(10))
def test_a_better_value_with_all_steps_never_cuts_a_pair_that_went_on(seed):
    brackets = [bracket("first"), bracket("second")]
    allocations, value = spend(40, *brackets), random_values(seed)
    found, _ = run(brackets, allocations, value)
    for entry in kept(found, *brackets):
        raised, _ = run(
            brackets,
            allocations,
            lambda name, entry=entry: value(name) + 5 * (name == f"{entry}|1"),
        )
        assert entry not in raised.cut


def test_short_runs_compare_sources_and_runs_with_all_steps_compare_techniques():
    """The probe is at its end after a ninth of the steps, where full fine-tuning has just begun."""
    one = bracket()

    def value(name: str) -> float:
        source, _, technique, rung = name.split("|")
        of_source = {"a": 0.02, "b": 0.05, "c": 0.0}[source]
        short = {"linear_probe": 0.8, "full": 0.1, "lora": 0.2, "lp_ft": 0.3, "bitfit": 0.4}
        return of_source + (0.9 if technique == "full" and rung == "1" else short[technique])

    found, ran = run([one], spend(13, one), value)
    with_all_steps = [name for name in ran if name.endswith("1")]
    assert with_all_steps == [
        f"b|task|{technique}|1" for technique in ("linear_probe", "bitfit", "lp_ft", "lora", "full")
    ]
    assert kept(found, one) == ["b|task|full"]


def test_a_source_is_judged_by_all_of_its_techniques():
    """By its own value alone the lucky pair would be the first of its technique."""
    pairs = bracket(techniques=TECHNIQUES[:4]).pairs
    measured = {p: {"a": 0.3, "b": 0.2, "c": 0.1}[p.source] for p in pairs}
    lucky = next(p for p in pairs if (p.source, p.technique) == ("c", "lora"))
    best = next(p for p in pairs if (p.source, p.technique) == ("a", "full"))
    measured |= {lucky: 0.31, best: 0.4}
    first = budget.rank_short_runs(measured, History())[:4]
    assert {p.source for p in first} == {"a"} and len({p.technique for p in first}) == 4


def test_pairs_that_failed_or_have_no_value_are_cut_first():
    one = bracket()
    values = {
        p.entry: None if p.source == "a" else math.nan if p.source == "b" else 0.0
        for p in one.pairs
    }
    allocations = spend(12, one)
    found, _ = run([one], allocations, lambda name: values[name.rpartition("|")[0]])
    assert [entry[0] for entry in kept(found, one)] == ["c"]
    reasons = {name[0]: text.rpartition(": ")[2] for name, text in found.reasons.items()}
    assert reasons["a"] == reasons["b"] == "no value on validation rows"


def test_short_runs_of_equal_value_are_compared_by_their_loss():
    """A ninth of the steps finds no word: each has a word error rate of 1, so their loss tells."""
    one = bracket()
    trials = {pair.rungs[0].id: pair for pair in one.pairs}
    first, second = list(trials)[:2]
    values = dict.fromkeys(trials, -1.0) | {first: None}
    # the second has no loss: its network diverged
    losses = {name: {"a": 5.0, "b": 4.0, "c": 2.0}[name[0]] for name in [*trials][2:]}
    allocations = spend(12, one)
    found = budget.decide([one], allocations, values, losses)
    assert {trial.source for trial in found.waiting} == {"c"}
    assert found.reasons[first].endswith("no value on validation rows")
    places = {name: found.reasons[name].rpartition("rank ")[2] for name in found.reasons}
    assert places[second] == f"{len(trials) - 1} of {len(trials)}"
    values[second] = -0.9
    found = budget.decide([one], allocations, values, losses)
    assert found.waiting[0] is trials[second].rungs[1], "where values differ, they count first"
    assert {trial.source for trial in found.waiting[1:]} == {"c"}, "the loss orders the others"


def test_trials_with_all_steps_of_equal_value_are_compared_by_their_loss():
    """A few validation rows are often all right, and then the loss still tells."""
    one = bracket()
    trials = {trial.id: pair for pair in one.pairs for trial in pair.rungs}
    values = {name: 1.0 - 0.1 * SOURCES.index(name[0]) for name in trials}
    for technique in ("lp_ft", "bitfit", "full", "linear_probe", "lora"):
        losses = {name: float(technique not in name) for name in trials if name.endswith("1")}
        found = budget.decide([one], spend(14, one), values, losses)
        assert kept(found, one) == [f"a|task|{technique}"]
    worse = values | {"a|task|lora|1": 0.95}
    assert kept(budget.decide([one], spend(14, one), worse, losses), one) != ["a|task|lora"]


def test_decisions_do_not_depend_on_where_a_job_was_killed():
    """With any part of the values recorded, what follows is the same."""
    brackets = [bracket("first"), bracket("second")]
    allocations, value = spend(24, *brackets), random_values(3)
    found, ran = run(brackets, allocations, value)
    generator = np.random.default_rng(0)
    for _ in range(20):
        some = generator.permutation(len(ran))[: generator.integers(len(ran))]
        values = {ran[i]: value(ran[i]) for i in some}
        while (again := budget.decide(brackets, allocations, values)).waiting:
            assert {one.id for one in again.waiting} <= set(ran), "nothing else is ever run"
            values |= {one.id: value(one.id) for one in again.waiting}
        assert again == found


def test_a_second_target_waits_for_the_first():
    brackets = [bracket("first"), bracket("second")]
    found = budget.decide(brackets, spend(30, *brackets), {})
    assert {one.entry.split("|")[1] for one in found.waiting} == {"first"}
    assert found.rung == "first, rung 1"


def test_sources_that_did_well_on_earlier_targets_go_before():
    """lora finds b a little better than a, which was better on every earlier target."""
    pairs = bracket(techniques=("full", "lora")).pairs
    values = {"full": {"a": 0.5, "b": 0.4, "c": 0.0}, "lora": {"a": 0.2, "b": 0.3, "c": 0.1}}
    measured = {p: values[p.technique][p.source] for p in pairs}
    earlier = History({"a": [0.0, 0.5], "b": [1.0, 0.5]})
    for history, first_of_lora in ((History(), "b"), (earlier, "a")):
        ranked = [(p.source, p.technique) for p in budget.rank_short_runs(measured, history)]
        assert ranked[:2] == [("a", "full"), (first_of_lora, "lora")]


def test_techniques_that_did_well_on_earlier_targets_go_before():
    """The best source of each is compared with all steps, where the budget allows fewer."""
    brackets = [bracket("first"), bracket("second")]

    def value(name: str) -> float:
        source, target, technique, rung = name.split("|")
        of_source = {"a": 0.02, "b": 0.01, "c": 0.0}[source]
        if rung == "1":
            return of_source + (technique == "bitfit")
        after = ("full", "lora", "bitfit", "linear_probe", "lp_ft")
        return of_source + 0.1 * (after.index(technique) if target == "second" else 0)

    allocations = [*spend(20, brackets[0]), *spend(10, brackets[1])]
    assert [one.rungs for one in allocations] == [(15, 9), (15, 2)]
    found, ran = run(brackets, allocations, value)
    second = [name for name in ran if "second" in name and name.endswith("1")]
    assert second == ["a|second|lp_ft|1", "a|second|bitfit|1"]
    assert "a|second|bitfit" in kept(found, *brackets)
    _, alone = run(brackets[1:], allocations[1:], value)
    assert "a|second|linear_probe|1" in alone, "by the short runs alone"


def test_what_is_not_known_of_earlier_targets_stands_in_the_middle():
    history = History({"a": [0.0, 0.5]}, {"full": [1.0]})
    assert history.source(pair("x", "a", "lora")) == 0.25
    assert history.technique(pair("x", "a", "full")) == 1.0
    assert history.source(pair("x", "new", "full")) == 0.5
    assert history.technique(pair("x", "a", "new")) == 0.5


def test_every_pair_that_was_cut_has_a_reason_with_its_rung():
    one = bracket()
    found, _ = run([one], spend(10, one), random_values(1))
    assert len(found.reasons) == len(found.cut) == 14
    first = "cut by the budget after rung 1 of 2 (1/9 of the steps): rank "
    second = "cut by the budget after rung 2 of 2 (all steps): rank 2 of 2"
    assert sorted(found.reasons.values()) == sorted(
        [
            *(f"{first}{i} of 15" for i in range(3, 16)),
            second,
        ]
    )
    assert [name[-1] for name, text in found.reasons.items() if text == second] == ["1"]
    assert found.notes == (
        f"task at 100 % labels: the budget trained {kept(found, one)[0].replace('|task|', ' · ')} "
        "with every seed and cut 14 of 15 pairs of source and technique",
    )
