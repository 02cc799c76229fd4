"""The order of rows as properties of a pure function (design, promises 1 and 2). Neither Ray nor files are needed."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.plan import Plan

RANKS = (1, 2, 3, 4, 8)
quick = settings(max_examples=60, deadline=None)


@st.composite
def plans(draw, max_rows: int = 300) -> Plan:
    """Any plan: rows, row groups of any size (also single rows), global batch, shards, kind of shuffle, item length."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) <= max_rows))
    rows = sum(sizes)
    return Plan(rows, draw(st.integers(0, 1 << 32)), draw(st.integers(1, rows)), shards=draw(st.integers(1, 16)),
                shuffle=draw(st.sampled_from(["rows", "blocks", "none"])), boundaries=np.concatenate([[0], np.cumsum(sizes)]),
                item_rows=draw(st.integers(1, 50)))


def positions(plan: Plan, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices and epochs of the positions [0, last), read batch by batch."""
    batches = [plan.batch(step) for step in range(-(-last // plan.global_batch))]
    indices, epochs = (np.concatenate(part)[:last] for part in zip(*batches, strict=True))
    return indices, epochs


# ---------------------------------------------------------------- exactly once

@given(plans())
@quick
def test_every_epoch_covers_each_row_exactly_once(plan):
    indices, epochs = positions(plan, 3 * plan.rows)
    for epoch in range(3):
        here = slice(epoch * plan.rows, (epoch + 1) * plan.rows)
        assert sorted(indices[here].tolist()) == list(range(plan.rows))
        assert (epochs[here] == epoch).all()


@given(plans(), st.integers(0, 40))
@quick
def test_every_batch_is_full_also_across_the_end_of_an_epoch(plan, step):
    indices, epochs = plan.batch(step)
    assert len(indices) == len(epochs) == plan.global_batch
    assert indices.min() >= 0 and indices.max() < plan.rows
    assert epochs.tolist() == [position // plan.rows for position in range(step * plan.global_batch, (step + 1) * plan.global_batch)]


def test_a_batch_spans_two_epochs():
    plan = Plan(10, 0, 4, shards=2)
    indices, epochs = plan.batch(2)  # positions 8 to 11
    assert epochs.tolist() == [0, 0, 1, 1]
    first, _ = positions(plan, 10)
    assert set(indices[:2]) == set(range(10)) - set(first[:8].tolist())


# ---------------------------------------------------------------- ranks

@given(plans(), st.integers(0, 20), st.sampled_from(RANKS))
@quick
def test_ranks_share_out_the_global_batch(plan, step, ranks):
    """Merged by position, the ranks' parts are the global batch of one rank, row for row."""
    if ranks > plan.shards:
        with pytest.raises(ValueError, match=f"{ranks} ranks are more than the {plan.shards} canonical shards"):
            plan.batch(step, 0, ranks)
        return
    whole, whole_epochs = plan.batch(step)
    merged, merged_epochs = np.full(plan.global_batch, -1), np.full(plan.global_batch, -1)
    first = step * plan.global_batch
    for rank in range(ranks):
        shards, places = plan.places(step, rank, ranks)
        indices, epochs = plan.batch(step, rank, ranks)
        at = places * plan.shards + shards - first
        assert (np.diff(at) > 0).all(), "a rank's part is in the order of positions"
        assert (merged[at] == -1).all(), "no position belongs to two ranks"
        merged[at], merged_epochs[at] = indices, epochs
    assert merged.tolist() == whole.tolist()
    assert merged_epochs.tolist() == whole_epochs.tolist()


@given(plans(), st.sampled_from(RANKS))
@quick
def test_shards_belong_to_one_rank_each(plan, ranks):
    if ranks <= plan.shards:
        owned = [plan.owned(rank, ranks) for rank in range(ranks)]
        assert sorted(shard for part in owned for shard in part) == list(range(plan.shards))
        assert all(owned), "no rank is idle"


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(0, 100), st.integers(0, 30), st.sampled_from([1, 2, 4, 8]))
@quick
def test_equal_parts_when_ranks_divide_shards_and_shards_divide_the_batch(shards, per_shard, more_rows, step, ranks):
    plan = Plan(shards * per_shard + more_rows, 5, shards * per_shard, shards=shards)
    if shards % ranks == 0:
        assert {len(plan.batch(step, rank, ranks)[0]) for rank in range(ranks)} == {plan.global_batch // ranks}


@given(plans(), st.integers(1, 12))
@quick
def test_every_rank_has_a_part_in_every_step(plan, steps):
    """The number of steps is arithmetic; what could differ is a rank without rows in a step, which must not happen either."""
    for ranks in (ranks for ranks in RANKS if ranks <= plan.shards):
        for rank in range(ranks):
            parts = [len(plan.batch(step, rank, ranks)[0]) for step in range(steps)]
            read = sum(item.stop - item.start for item in plan.items(0, steps, rank, ranks))
            assert min(parts) >= 1
            assert read == sum(parts), "what a rank reads is what its steps take, no more and no less"


def test_steps_of_epochs_are_rounded_up():
    plan = Plan(100, 0, 32)
    assert [plan.steps(epochs) for epochs in (0.001, 0.32, 0.33, 1, 2, 3.2)] == [1, 1, 2, 4, 7, 10]
    assert Plan(96, 0, 32).steps(1) == 3
    assert Plan(96, 0, 32).steps(1 / 3) == 1  # not 2 by a rounding error


# ---------------------------------------------------------------- items: what is read

def read(plan: Plan, first: int, last: int, rank: int, ranks: int) -> dict[int, list[tuple[int, int]]]:
    """Shard to its (row, epoch) pairs, in the order in which the items bring them."""
    out: dict[int, list[tuple[int, int]]] = {shard: [] for shard in plan.owned(rank, ranks)}
    for item in plan.items(first, last, rank, ranks):
        assert 0 < item.stop - item.start <= plan.item_rows
        indices, epochs = plan.sequence(item.shard, item.start, item.stop)
        assert len(indices) == len(epochs) == item.stop - item.start
        out[item.shard] += list(zip(indices.tolist(), epochs.tolist(), strict=True))
    return out


@given(plans(), st.integers(0, 12), st.integers(0, 12), st.sampled_from(RANKS))
@quick
def test_items_bring_the_rows_of_their_steps_and_nothing_else(plan, first, more, ranks):
    last = first + more
    for rank in range(ranks) if ranks <= plan.shards else ():
        queues = read(plan, first, last, rank, ranks)
        for step in range(first, last):
            shards, _ = plan.places(step, rank, ranks)
            got = [queues[shard].pop(0) for shard in shards.tolist()]
            indices, epochs = plan.batch(step, rank, ranks)
            assert got == list(zip(indices.tolist(), epochs.tolist(), strict=True))
        assert not any(queues.values()), "nothing is read beyond the last step"


@given(plans(), st.integers(0, 15), st.integers(1, 15), st.sampled_from(RANKS), st.sampled_from(RANKS))
@quick
def test_resume_at_any_position_gives_the_remaining_sequence(plan, first, more, ranks_before, ranks_after):
    """Also with another number of ranks: the committed steps and the rest together are the uninterrupted run."""
    before, after = min(ranks_before, plan.shards), min(ranks_after, plan.shards)
    last = first + more

    def pairs(start, stop, ranks):
        return sorted(pair for rank in range(ranks) for queue in read(plan, start, stop, rank, ranks).values() for pair in queue)

    assert sorted(pairs(0, first, before) + pairs(first, last, after)) == pairs(0, last, 1)
    expected = [pair for step in range(first, last) for pair in zip(*(part.tolist() for part in plan.batch(step)), strict=True)]
    assert pairs(first, last, after) == sorted(expected)


@given(plans(), st.integers(0, 10), st.integers(1, 10))
@quick
def test_items_come_in_the_order_of_need(plan, first, more):
    """The first position of every item is later than that of the one before: a consumer never waits for a far one."""
    starts = [item.start * plan.shards + item.shard for item in plan.items(first, first + more)]
    assert starts == sorted(starts) and len(set(starts)) == len(starts)


@given(plans(), st.integers(0, 15), st.integers(0, 60), st.integers(0, 60))
@quick
def test_sequence_may_be_cut_anywhere(plan, shard, a, b):
    shard, (low, high) = shard % plan.shards, sorted((a, b))
    whole, epochs = plan.sequence(shard, 0, high)
    part, part_epochs = plan.sequence(shard, low, high)
    assert part.tolist() == whole[low:].tolist()
    assert part_epochs.tolist() == epochs[low:].tolist()


# ---------------------------------------------------------------- seeds, epochs, purity

@given(plans())
@quick
def test_a_pickled_or_rebuilt_plan_has_the_same_order(plan):
    plan.batch(0)  # fills the cache, which does not travel
    rebuilt = Plan(plan.rows, plan.seed, plan.global_batch, shards=plan.shards, shuffle=plan.shuffle, boundaries=plan.boundaries)
    for other in (pickle.loads(pickle.dumps(plan)), rebuilt):
        for step in (3, 0, 1):
            assert plan.batch(step)[0].tolist() == other.batch(step)[0].tolist()


def test_order_does_not_depend_on_what_was_asked_before():
    a, b = Plan(500, 1, 50), Plan(500, 1, 50)
    forward = [a.batch(step)[0].tolist() for step in range(60)]
    backward = [b.batch(step)[0].tolist() for step in reversed(range(60))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_seeds_and_epochs_give_different_orders(shuffle):
    def epochs(seed):
        plan = Plan(400, seed, 100, shuffle=shuffle, boundaries=np.arange(0, 401, 25))
        indices, _ = positions(plan, 1200)
        return indices.reshape(3, 400)

    one, two = epochs(0), epochs(1)
    for a, b in [(one[0], one[1]), (one[1], one[2]), (one[0], two[0]), (one[1], two[0]), (one[0], two[1])]:
        assert (a == b).mean() < 0.05, "no more rows at the same place than by chance"


def test_unshuffled_on_one_shard_is_the_order_of_the_files():
    indices, _ = positions(Plan(60, 3, 7, shards=1, shuffle="none"), 120)
    assert indices.tolist() == [*range(60), *range(60)]


def test_golden_order():
    """Changing these numbers would make every interrupted run resume in another order: raise the checkpoint's version then."""
    plan = Plan(12, 7, 4, shards=2, shuffle="rows")
    assert [plan.batch(step)[0].tolist() for step in range(4)] == GOLDEN_ROWS
    plan = Plan(12, 7, 4, shards=2, shuffle="blocks", boundaries=np.array([0, 5, 7, 12]))
    assert [plan.batch(step)[0].tolist() for step in range(4)] == GOLDEN_BLOCKS


GOLDEN_ROWS = [[6, 1, 5, 11], [9, 10, 8, 0], [4, 3, 7, 2], [6, 0, 4, 11]]
GOLDEN_BLOCKS = [[4, 6, 1, 10], [3, 8, 2, 7], [0, 9, 5, 11], [7, 6, 11, 2]]


# ---------------------------------------------------------------- quality of the shuffle

@pytest.mark.parametrize("shards", [1, 8])
def test_row_shuffle_displaces_rows_as_a_uniform_permutation_does(shards):
    """The mean of |place - row| / n is 1/3 for a uniform permutation; consecutive rows do not stay together."""
    n = 20_000
    for seed in (0, 1):
        indices, _ = positions(Plan(n, seed, 100, shards=shards), n)
        displacement = np.abs(indices - np.arange(n)).mean() / n
        assert abs(displacement - 1 / 3) < 0.01  # standard error 0.0017
        assert abs(np.abs(np.diff(indices)).mean() / n - 1 / 3) < 0.01
        assert (np.abs(np.diff(indices)) == 1).mean() < 0.001


def test_first_batches_of_a_row_shuffle_are_drawn_from_everywhere():
    n = 8000
    counts = np.zeros(8)
    for seed in range(20):
        indices, _ = Plan(n, seed, 200).batch(0)
        counts += np.bincount(indices * 8 // n, minlength=8)
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001


def test_block_shuffle_reads_few_groups_at_a_time_and_mixes_inside_them():
    n, group, shards = 6400, 100, 8
    displacement = []
    for seed in range(8):
        plan = Plan(n, seed, 80, shards=shards, shuffle="blocks", boundaries=np.arange(0, n + 1, group))
        batches = [plan.batch(step)[0] for step in range(n // 80)]
        assert max(len(np.unique(indices // group)) for indices in batches) <= 2 * shards
        displacement.append(np.abs(np.concatenate(batches) - np.arange(n)).mean() / n)
    assert abs(np.mean(displacement) - 1 / 3) < 0.04  # 64 groups, 8 seeds: standard error 0.01
    inside = plan.order(0, 0, group)
    assert sorted(inside % group) == list(range(group)) and (np.diff(inside) == 1).mean() < 0.1


@given(plans())
@quick
def test_blocks_keep_each_row_group_together(plan):
    plan.shuffle = "blocks"
    order = plan.order(0, 0, plan.rows)
    group = np.searchsorted(plan.boundaries, order, side="right") - 1
    assert (np.diff(group) != 0).sum() == len(np.unique(group)) - 1


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 0, 1), "no rows"),
    ((7, 0, 8), "7 rows are fewer than one global batch of 8"),
    ((7, 0, 0), "global batch 0"),
])
def test_impossible_plans_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 10], [0, 11]])
def test_boundaries_must_cover_the_rows(boundaries):
    with pytest.raises(ValueError, match="boundaries"):
        Plan(10, 0, 2, shuffle="blocks", boundaries=np.array(boundaries))


@pytest.mark.parametrize("call", [lambda plan: plan.owned(0, 9), lambda plan: plan.batch(0, 0, 9), lambda plan: plan.items(0, 1, 0, 9)])
def test_too_many_ranks_are_refused_with_the_numbers_and_the_fix(call):
    with pytest.raises(ValueError, match=r"9 ranks are more than the 8 canonical shards: raise train\.canonical_shards"):
        call(Plan(100, 0, 50, shards=8))


def test_shards_are_never_more_than_a_batch_has_rows():
    """Else a rank could have steps without a row."""
    assert Plan(100, 0, 3, shards=8).shards == 3
    with pytest.raises(ValueError, match=r"4 ranks .* 3 canonical shards.*global_batch \(now 3\)"):
        Plan(100, 0, 3, shards=8).batch(0, 0, 4)
