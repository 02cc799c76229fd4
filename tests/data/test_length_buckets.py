"""Batches cut by cost: each row once an epoch, alike in length, the same at any number of ranks,
bounded.
"""

import hashlib
import pickle

import numpy as np
import pytest

from pipeline.data import stream
from pipeline.data.length_buckets import MIN_COST_RATIO, BucketPlan
from pipeline.data.plan import Plan


def lengths(rows: int = 4000, seed: int = 0) -> np.ndarray:
    """Seconds as LibriSpeech's training utterances have them: most of 11 to 17, a tail of short
    ones, 12.2 on average.
    """
    rng = np.random.default_rng(seed)
    return np.where(
        rng.random(rows) < 0.65,
        rng.triangular(11, 15.5, 17, rows),
        rng.triangular(1.4, 9, 13, rows),
    ).round(3)


def batches(plan: BucketPlan, epoch: int = 0, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
    n = int(plan.batches_per_epoch)
    return [plan.batch(step, rank, ranks)[0] for step in range(epoch * n, (epoch + 1) * n)]


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_every_epoch_covers_each_row_once(shuffle):
    costs = lengths(997)
    plan = BucketPlan(
        costs, 120, 3, shuffle=shuffle, boundaries=np.array([*range(0, 997, 50), 997])
    )
    orders = []
    for epoch in range(3):
        found = batches(plan, epoch)
        assert sorted(np.concatenate(found)) == list(range(997))
        assert {
            int(e) for step in range(len(found)) for e in plan.batch(epoch * len(found) + step)[1]
        } == {epoch}
        orders.append(np.concatenate(found).tolist())
    assert orders[0] != orders[1] != orders[2]
    assert [b.tolist() for b in batches(plan, 1)] != [b.tolist() for b in batches(plan, 0)]
    assert {tuple(sorted(b)) for b in batches(plan, 0)} != {
        tuple(sorted(b)) for b in batches(plan, 1)
    }, "other rows come together"


def test_no_batch_costs_more_than_it_may():
    costs = lengths()
    plan = BucketPlan(costs, 160, 1)
    found = batches(plan)
    padded = np.array([len(b) * costs[b].max() for b in found])
    assert padded.max() <= 160 and padded.mean() > 0.85 * 160
    assert len(found) == plan.batches_per_epoch == plan.steps(1.0) and plan.steps(0.5) == -(
        -len(found) // 2
    )


@pytest.mark.parametrize("budget", [100, 320, 1280])
def test_padding_is_small_and_told_rightly(budget):
    costs = lengths(20000)
    plan = BucketPlan(costs, budget, 1)
    found = batches(plan)
    seen = 1 - costs.sum() / sum(len(b) * costs[b].max() for b in found)
    assert plan.padding() == pytest.approx(seen, abs=1e-12) and seen < 0.05
    size = round(len(costs) / len(found))
    order = np.random.default_rng(0).permutation(len(costs))
    naive = 1 - costs.sum() / sum(
        len(part) * costs[part].max() for part in np.array_split(order, len(costs) // size)
    )
    assert naive > 0.2, "what batches of rows in any order would have"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_out_the_same_batches(ranks):
    plan = BucketPlan(lengths(500), 100, 5)
    whole = batches(plan)
    parts = [batches(plan, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, rows in enumerate(whole):
        mine = [parts[rank][step] for rank in range(ranks)]
        assert sorted(np.concatenate(mine)) == sorted(rows)
        assert 8 % ranks or max(map(len, mine)) - min(map(len, mine)) <= 1, (
            "evenly, where the ranks divide the shards"
        )


@pytest.mark.parametrize("ranks", [1, 2])
def test_items_bring_what_the_batches_need_from_any_step(ranks):
    plan = BucketPlan(lengths(300), 60, 5, item_rows=7)
    n = int(plan.batches_per_epoch)
    for first, last in ((0, n), (n // 2, 2 * n + 3), (n, n + 1)):
        for rank in range(ranks):
            held: dict[int, list[int]] = {}
            for item in plan.items(first, last, rank, ranks):
                held.setdefault(item.shard, []).extend(
                    plan.sequence(item.shard, item.start, item.stop)[0].tolist()
                )
            for step in range(first, last):
                indices, (shards, _) = (
                    plan.batch(step, rank, ranks)[0],
                    plan.positions(step, rank, ranks),
                )
                assert [held[int(shard)].pop(0) for shard in shards] == indices.tolist()
            assert not any(held.values()), "nothing is read that no batch needs"


def test_a_plan_by_cost_is_the_same_after_pickling_and_for_the_same_seed():
    costs = lengths(300)
    plan = BucketPlan(costs, 60, 5)
    plan.batch(3)
    sent = pickle.loads(pickle.dumps(plan))
    for step in (0, 17, 99):
        assert (
            plan.batch(step)[0].tolist()
            == sent.batch(step)[0].tolist()
            == BucketPlan(costs, 60, 5).batch(step)[0].tolist()
        )
    assert plan.batch(0)[0].tolist() != BucketPlan(costs, 60, 6).batch(0)[0].tolist()


def test_blocks_are_read_close_together():
    """What a stretch of steps reads lies in few row groups, each epoch in other ones first."""
    bounds = np.arange(0, 2001, 20)
    plan = BucketPlan(lengths(2000), 120, 5, shuffle="blocks", boundaries=bounds, window_rows=200)
    assert len(plan.windows) == 10
    for epoch in range(2):
        found = batches(plan, epoch)
        near = [
            len({int(r) // 20 for b in found[i : i + 8] for r in b})
            for i in range(0, len(found) - 8, 8)
        ]
        assert max(near) <= 20 and len({int(r) // 20 for b in found for r in b}) == 100
    assert set(batches(plan, 0)[0] // 20) != set(batches(plan, 1)[0] // 20)


@pytest.mark.parametrize("cost", [480, 1500, 3200])
def test_windows_hold_enough_batches_for_little_padding(cost):
    """Rows of 213 kB, as LibriSpeech's are, in row groups of 8 MB and windows as ``stream.plan_of``
    asks for them.
    """
    rows, group, few, most = (
        28_539,
        39,
        stream.WINDOW_BYTES // 213_000,
        stream.WINDOW_MOST_BYTES // 213_000,
    )
    bounds = np.array([*range(0, rows, group), rows])
    plan = BucketPlan(
        lengths(rows), cost, 1, shuffle="blocks", boundaries=bounds, window_rows=few, most_rows=most
    )
    assert (
        few <= plan.window_rows < most
        and len(plan.windows) > 4
        and max(plan.padding(epoch) for epoch in range(2)) < 0.05
    )
    assert max(len(window.rows) for window in plan.windows) <= plan.window_rows + group
    found = batches(plan, 0)
    assert sorted(np.concatenate(found)) == list(range(rows))
    same = {tuple(sorted(b)) for b in found} & {tuple(sorted(b)) for b in batches(plan, 1)}
    assert sum(map(len, same)) < 0.4 * rows, "rows that meet the same ones in the next epoch"


def test_plans_with_one_window_are_what_they_were():
    """Those of earlier versions, which runs are resumed from."""
    costs, bounds = lengths(500), np.array([*range(0, 500, 30), 500])
    for shuffle in ("rows", "blocks"):
        plan = BucketPlan(
            costs, 100, 5, shuffle=shuffle, boundaries=bounds, window_rows=945, most_rows=10_000
        )
        found = batches(plan, 0) + batches(plan, 1)
        assert (
            hashlib.sha256(repr([b.tolist() for b in found]).encode()).hexdigest()[:16]
            == "78aa0027be47d04f"
        )


def test_rows_that_are_longer_than_a_batch_stand_alone():
    costs = np.array([1.0] * 40 + [50.0, 70.0])
    found = batches(BucketPlan(costs, 10, 0))
    assert [b.tolist() for b in sorted(found, key=lambda b: costs[b].max())[-2:]] == [[40], [41]]
    assert max(len(b) for b in found) == 10


@pytest.mark.parametrize(
    "long", [[60.0], [7200.0], [7200.0] * 2, [40.0] * 3, [35.0, 33.0, 38.0, 39.0]]
)
def test_a_few_long_rows_do_not_cut_up_the_others(long):
    costs = np.random.default_rng(0).uniform(1, 15, 10_000)
    usual, plan = BucketPlan(costs, 200, 0), BucketPlan(np.concatenate([costs, long]), 200, 0)
    assert usual.batches_per_epoch < plan.batches_per_epoch <= usual.batches_per_epoch + len(long)
    assert sum(len(b) == 1 for b in batches(plan)) <= len(long) and plan.padding() < 0.05
    assert sorted(np.concatenate(batches(plan))) == list(range(10_000 + len(long)))
    assert len(batches(BucketPlan(np.concatenate([costs[:20], long]), 200, 0))) <= 4 + len(long), (
        "20 more, if a long row cut them"
    )


def test_rows_of_unknown_cost_and_few_rows():
    costs = np.array([0.0] * 20 + [4.0] * 9)
    assert sorted(np.concatenate(batches(BucketPlan(costs, 10, 0)))) == list(range(29))
    assert max(len(b) for b in batches(BucketPlan(costs, 10, 0))) == 2, (
        "each may be as long as the longest"
    )
    one = BucketPlan(np.array([3.0]), 10, 0)
    assert one.batch(4)[0].tolist() == [0] and one.batch(4)[1].tolist() == [4]


def test_a_bucket_is_narrow_where_rows_are_many():
    costs = lengths(20000)
    window = BucketPlan(costs, 100, 0).windows[0]
    for start, stop in zip(window.buckets[:-2], window.buckets[1:-1], strict=True):
        here = costs[window.rows[start:stop]]
        assert here.min() >= MIN_COST_RATIO * here.max() - 1e-9 or stop - start <= 3 * int(
            100 / here.max()
        )


@pytest.mark.parametrize(
    ("costs", "cost", "shuffle", "says"),
    [
        ([1.0, float("nan")], 10, "rows", "row 1 costs nan"),
        ([1.0, -2.0], 10, "rows", "row 1 costs -2.0"),
        ([1.0], 0, "rows", "batch_cost 0 must be above 0"),
        ([0.0, 0.0], 5, "rows", "all 2 rows cost 0"),
        ([1.0], 5, "none", "shuffle: none keeps the order"),
        ([], 5, "rows", "no rows to train on"),
    ],
)
def test_what_cannot_be_cut_is_refused(costs, cost, shuffle, says):
    with pytest.raises(ValueError, match=says):
        BucketPlan(np.array(costs), cost, 0, shuffle=shuffle)


def test_plans_of_rows_count_their_steps():
    assert Plan(100, 0, 32).steps(1.0) == 4 and Plan(96, 0, 32).steps(1 / 3) == 1


def test_rows_of_one_length_have_no_padding():
    assert str(BucketPlan(np.full(14, 0.8), 10, 0).padding()) == "0.0", "and not -0.0"
