"""The order of rows as properties of a pure function (design, promises 1 and 2). Neither Ray nor
files are needed.
"""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import plan as module
from pipeline.data.plan import CHUNK, Plan

RANKS = (1, 2, 3, 4, 8)
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Else no small plan would come to the end of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 24)
        yield


@st.composite
def plans(draw, max_rows: int = 300, mixed: bool | None = False) -> Plan:
    """Any plan: rows, row groups of any size (also single rows), global batch, shards, kind of
    shuffle, item length; with or without a mixture of corpora of any size, or (``mixed`` none) one
    of both.
    """
    sizes = draw(
        st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(
            lambda sizes: sum(sizes) <= max_rows
        )
    )
    rows, bounds = sum(sizes), np.concatenate([[0], np.cumsum(sizes)])
    mixture = None
    if draw(st.booleans()) if mixed is None else mixed:
        cuts = [
            *sorted(draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3)) | {0}),
            len(sizes),
        ]
        ends = [int(bounds[cut]) for cut in cuts]
        mixture = tuple(
            (start, stop, draw(st.sampled_from([0.1, 0.25, 1 / 3, 1.0])))
            for start, stop in pairwise(ends)
        )
    return Plan(
        rows,
        draw(st.integers(0, 1 << 32)),
        draw(st.integers(1, rows)),
        shards=draw(st.integers(1, 16)),
        shuffle=draw(st.sampled_from(["rows", "blocks", "none"])),
        boundaries=bounds,
        item_rows=draw(st.integers(1, 50)),
        mixture=mixture,
    )


either = plans(mixed=None)


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
    assert epochs.tolist() == [
        position // plan.rows
        for position in range(step * plan.global_batch, (step + 1) * plan.global_batch)
    ]


# ---------------------------------------------------------------- ranks


@given(either, st.integers(0, 20), st.sampled_from(RANKS))
@quick
def test_ranks_share_out_the_global_batch(plan, step, ranks):
    """Merged by position, the ranks' parts are the global batch of one rank, row for row."""
    if ranks > plan.shards:
        with pytest.raises(
            ValueError, match=f"{ranks} ranks are more than the {plan.shards} canonical shards"
        ):
            plan.batch(step, 0, ranks)
        return
    whole, whole_epochs = plan.batch(step)
    merged, merged_epochs = np.full(plan.global_batch, -1), np.full(plan.global_batch, -1)
    first = step * plan.global_batch
    for rank in range(ranks):
        shards, places = plan.positions(step, rank, ranks)
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
        owned = [plan.shards_of_rank(rank, ranks) for rank in range(ranks)]
        assert sorted(shard for part in owned for shard in part) == list(range(plan.shards))
        assert all(owned), "no rank is idle"


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(0, 100),
    st.integers(0, 30),
    st.sampled_from([1, 2, 4, 8]),
)
@quick
def test_equal_parts_when_ranks_divide_shards_and_shards_divide_the_batch(
    shards, per_shard, more_rows, step, ranks
):
    plan = Plan(shards * per_shard + more_rows, 5, shards * per_shard, shards=shards)
    if shards % ranks == 0:
        assert {len(plan.batch(step, rank, ranks)[0]) for rank in range(ranks)} == {
            plan.global_batch // ranks
        }


@given(either, st.integers(1, 12))
@quick
def test_every_rank_has_a_part_in_every_step(plan, steps):
    """The number of steps is arithmetic; what could differ is a rank without rows in a step, which
    must not happen either.
    """
    for ranks in (ranks for ranks in RANKS if ranks <= plan.shards):
        for rank in range(ranks):
            parts = [len(plan.batch(step, rank, ranks)[0]) for step in range(steps)]
            read = sum(item.stop - item.start for item in plan.items(0, steps, rank, ranks))
            assert min(parts) >= 1
            assert read == sum(parts), (
                "what a rank reads is what its steps take, no more and no less"
            )


# ---------------------------------------------------------------- items: what is read


def read(
    plan: Plan, first: int, last: int, rank: int, ranks: int
) -> dict[int, list[tuple[int, int]]]:
    """Shard to its (row, epoch) pairs, in the order in which the items bring them."""
    out: dict[int, list[tuple[int, int]]] = {
        shard: [] for shard in plan.shards_of_rank(rank, ranks)
    }
    for item in plan.items(first, last, rank, ranks):
        assert 0 < item.stop - item.start <= plan.item_rows
        indices, epochs = plan.sequence(item.shard, item.start, item.stop)
        assert len(indices) == len(epochs) == item.stop - item.start
        out[item.shard] += list(zip(indices.tolist(), epochs.tolist(), strict=True))
    return out


@given(either, st.integers(0, 12), st.integers(0, 12), st.sampled_from(RANKS))
@quick
def test_items_bring_the_rows_of_their_steps_and_nothing_else(plan, first, more, ranks):
    last = first + more
    for rank in range(ranks) if ranks <= plan.shards else ():
        queues = read(plan, first, last, rank, ranks)
        for step in range(first, last):
            shards, _ = plan.positions(step, rank, ranks)
            got = [queues[shard].pop(0) for shard in shards.tolist()]
            indices, epochs = plan.batch(step, rank, ranks)
            assert got == list(zip(indices.tolist(), epochs.tolist(), strict=True))
        assert not any(queues.values()), "nothing is read beyond the last step"


@given(
    either, st.integers(0, 15), st.integers(1, 15), st.sampled_from(RANKS), st.sampled_from(RANKS)
)
@quick
def test_resume_at_any_position_gives_the_remaining_sequence(
    plan, first, more, ranks_before, ranks_after
):
    """Also with another number of ranks: the committed steps and the rest together are the
    uninterrupted run.
    """
    before, after = min(ranks_before, plan.shards), min(ranks_after, plan.shards)
    last = first + more

    def pairs(start, stop, ranks):
        return sorted(
            pair
            for rank in range(ranks)
            for queue in read(plan, start, stop, rank, ranks).values()
            for pair in queue
        )

    assert sorted(pairs(0, first, before) + pairs(first, last, after)) == pairs(0, last, 1)
    expected = [
        pair
        for step in range(first, last)
        for pair in zip(*(part.tolist() for part in plan.batch(step)), strict=True)
    ]
    assert pairs(first, last, after) == sorted(expected)


@given(plans(), st.integers(0, 10), st.integers(1, 10))
@quick
def test_items_come_in_the_order_of_need(plan, first, more):
    """The first position of every item is later than that of the one before: a consumer never waits
    for a far one.
    """
    starts = [item.start * plan.shards + item.shard for item in plan.items(first, first + more)]
    assert starts == sorted(starts) and len(set(starts)) == len(starts)


@given(either, st.integers(0, 15), st.integers(0, 60), st.integers(0, 60))
@quick
def test_sequence_may_be_cut_anywhere(plan, shard, a, b):
    shard, (low, high) = shard % plan.shards, sorted((a, b))
    whole, epochs = plan.sequence(shard, 0, high)
    part, part_epochs = plan.sequence(shard, low, high)
    assert part.tolist() == whole[low:].tolist()
    assert part_epochs.tolist() == epochs[low:].tolist()


# ---------------------------------------------------------------- seeds, epochs, purity


@given(either)
@quick
def test_a_pickled_or_rebuilt_plan_has_the_same_order(plan):
    plan.batch(0)  # fills the cache, which does not travel
    rebuilt = Plan(
        plan.rows,
        plan.seed,
        plan.global_batch,
        shards=plan.shards,
        shuffle=plan.shuffle,
        boundaries=plan.boundaries,
        mixture=plan.mixed
        and tuple(
            zip(
                plan.mixed.starts,
                [*plan.mixed.starts[1:], plan.rows],
                plan.mixed.draws.tolist(),
                strict=True,
            )
        ),
    )
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
    for a, b in [
        (one[0], one[1]),
        (one[1], one[2]),
        (one[0], two[0]),
        (one[1], two[0]),
        (one[0], two[1]),
    ]:
        assert (a == b).mean() < 0.05, "no more rows at the same place than by chance"


def test_unshuffled_on_one_shard_is_the_order_of_the_files():
    indices, _ = positions(Plan(60, 3, 7, shards=1, shuffle="none"), 120)
    assert indices.tolist() == [*range(60), *range(60)]


def test_golden_order():
    """Changing these numbers would make every interrupted run resume in another order: raise the
    checkpoint's version then.
    """
    plan = Plan(12, 7, 4, shards=2, shuffle="rows")
    assert [plan.batch(step)[0].tolist() for step in range(4)] == GOLDEN_ROWS
    plan = Plan(12, 7, 4, shards=2, shuffle="blocks", boundaries=np.array([0, 5, 7, 12]))
    assert [plan.batch(step)[0].tolist() for step in range(4)] == GOLDEN_BLOCKS


GOLDEN_ROWS = [[6, 1, 5, 11], [9, 10, 8, 0], [4, 3, 7, 2], [6, 0, 4, 11]]
GOLDEN_BLOCKS = [[4, 6, 1, 10], [3, 8, 2, 7], [0, 9, 5, 11], [7, 6, 11, 2]]


# ---------------------------------------------------------------- quality of the shuffle


@pytest.mark.parametrize("shards", [1, 8])
def test_row_shuffle_displaces_rows_as_a_uniform_permutation_does(shards):
    """The mean of |place - row| / n is 1/3 for a uniform permutation; consecutive rows do not stay
    together.
    """
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
    # Chi-squared, 7 degrees of freedom, p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_block_shuffle_reads_few_groups_at_a_time_and_mixes_inside_them():
    n, group, shards = 6400, 100, 8
    displacement = []
    for seed in range(8):
        plan = Plan(
            n, seed, 80, shards=shards, shuffle="blocks", boundaries=np.arange(0, n + 1, group)
        )
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


# ---------------------------------------------------------------- mixtures

THREE = ((0, 1200, 0.5), (1200, 1230, 0.3), (1230, 2000, 0.2))


def corpus_of(plan: Plan, indices: np.ndarray) -> np.ndarray:
    assert plan.mixed is not None
    return np.searchsorted(plan.mixed.starts, indices, side="right") - 1


@given(plans(mixed=True))
@quick
def test_a_corpus_covers_each_of_its_rows_exactly_once_in_each_of_its_epochs(plan):
    """After any number of chunks, what was drawn of a corpus are so many whole epochs, each row
    once in each, and a part of the next one.
    """
    assert plan.mixed is not None
    for chunks in (1, 2, 3):
        positions_ = chunks * module.CHUNK * plan.shards
        parts = [plan.sequence(shard, 0, positions_ // plan.shards) for shard in range(plan.shards)]
        indices, epochs = (np.concatenate(part) for part in zip(*parts, strict=True))
        corpora = corpus_of(plan, indices)
        for c, (part, start) in enumerate(zip(plan.mixed.parts, plan.mixed.starts, strict=True)):
            drawn = Counter(
                zip(indices[corpora == c].tolist(), epochs[corpora == c].tolist(), strict=True)
            )
            assert set(drawn.values()) <= {1}, "no row twice in one epoch"
            assert sum(drawn.values()) == chunks * plan.mixed.draws[c] * plan.shards, (
                "as many as its weight says"
            )
            whole, rest = divmod(sum(drawn.values()), part.rows)
            for epoch in range(whole):
                assert sorted(row for row, e in drawn if e == epoch) == list(
                    range(start, start + part.rows)
                )
            assert sum(e == whole for _, e in drawn) == rest and max(e for _, e in drawn) <= whole


@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_shares_are_kept_after_any_number_of_places_and_to_one_draw_at_the_end_of_a_chunk(
    monkeypatch, shuffle
):
    monkeypatch.setattr(module, "CHUNK", CHUNK)
    plan = Plan(
        2000,
        3,
        64,
        shards=4,
        shuffle=shuffle,
        boundaries=np.array([0, 500, 1200, 1230, 1600, 2000]),
        mixture=THREE,
    )
    weights = np.array([weight for *_, weight in THREE])
    for shard in range(4):
        indices, _ = plan.sequence(shard, 0, 3 * CHUNK)
        counts = np.cumsum(corpus_of(plan, indices)[:, None] == np.arange(3), axis=0)
        places = np.arange(1, 3 * CHUNK + 1)[:, None]
        assert np.abs(counts - places * weights).max() < 1 + 3 * weights.max() + 3, (
            "1 + corpora x share, and a draw of rounding a chunk"
        )
        for chunk in (1, 2, 3):
            assert np.abs(counts[chunk * CHUNK - 1] / chunk - CHUNK * weights).max() <= 1
    batches = np.concatenate(
        [
            np.bincount(corpus_of(plan, plan.batch(step)[0]), minlength=3)[None]
            for step in range(200)
        ]
    )
    assert np.abs(batches.mean(0) / 64 - weights).max() < 0.003
    assert (batches[:, 0] > 20).all() and (batches[:, 0] < 44).all(), "every batch is a mixture"


def test_a_small_corpus_comes_often_and_is_never_in_the_same_order(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", CHUNK)
    plan = Plan(2000, 3, 64, shards=4, mixture=THREE)
    indices, epochs = zip(*(plan.batch(step) for step in range(40)), strict=True)
    indices, epochs = np.concatenate(indices), np.concatenate(epochs)
    small = corpus_of(plan, indices) == 1
    assert epochs[small].max() == 40 * 64 * 0.3 // 30 and epochs[~small].max() <= 1, (
        "epochs are the corpus's own"
    )
    orders = [indices[small & (epochs == epoch)].tolist() for epoch in range(10)]
    assert (
        all(sorted(order) == list(range(1200, 1230)) for order in orders)
        and len({tuple(order) for order in orders}) == 10
    )


def test_a_mixture_is_no_matter_of_what_was_asked_before():
    a, b = Plan(2000, 1, 50, mixture=THREE), Plan(2000, 1, 50, mixture=THREE)
    forward = [[part.tolist() for part in a.batch(step)] for step in range(60)]
    backward = [[part.tolist() for part in b.batch(step)] for step in reversed(range(60))]
    assert forward == backward[::-1]
    far = 10**9  # closed form: no walk to get there
    assert (a.sequence(0, far, far + 50)[0] == a.sequence(0, far - 20, far + 50)[0][20:]).all()


def test_row_groups_of_a_mixture_stay_together():
    """A shard reads each corpus block by block, as it does without a mixture."""
    bounds = np.arange(0, 6401, 100)
    plan = Plan(
        6400,
        0,
        80,
        shuffle="blocks",
        boundaries=bounds,
        mixture=((0, 3200, 1.0), (3200, 6400, 3.0)),
    )
    indices, _ = plan.sequence(2, 0, 400)
    assert len(np.unique(indices // 100)) <= 400 // 100 + 4


def test_golden_mixture():
    """As `test_golden_order`; row indices and epochs of each step."""
    plan = Plan(12, 7, 6, shards=2, mixture=((0, 4, 1.0), (4, 12, 2.0)))
    assert [[part.tolist() for part in plan.batch(step)] for step in range(3)] == GOLDEN_MIXTURE


GOLDEN_MIXTURE = [
    [[2, 0, 5, 8, 11, 10], [0, 0, 0, 0, 0, 0]],
    [[6, 3, 1, 7, 4, 9], [0, 0, 0, 0, 0, 0]],
    [[9, 8, 1, 2, 7, 11], [1, 1, 1, 1, 1, 1]],
]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (((0, 50, 1.0), (50, 90, 1.0)), "follow each other from row 0 to row 100"),
        (((0, 50, 1.0), (60, 100, 1.0)), "follow each other"),
        (((1, 100, 1.0),), "follow each other"),
        (((0, 100, 1.0), (100, 100, 0.5)), r"corpus 2 has weight 0\.5 and no rows"),
        (((0, 50, 1.0), (50, 100, 0.0)), "each must be above 0"),
        (((0, 50, 1.0), (50, 100, float("nan"))), "each must be above 0"),
        (
            ((0, 50, 1.0), (50, 100, 0.001)),
            r"weight 0\.001 of corpus 2 is 0\.001 of all weights, and the smallest share is 1 "
            r"of 24",
        ),
    ],
)
def test_impossible_mixtures_are_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        Plan(100, 0, 10, mixture=mixture)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "no rows"),
        ((7, 0, 8), "7 rows are fewer than one global batch of 8"),
        ((7, 0, 0), "global batch 0"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 10], [0, 11]])
def test_boundaries_must_cover_the_rows(boundaries):
    with pytest.raises(ValueError, match="boundaries"):
        Plan(10, 0, 2, shuffle="blocks", boundaries=np.array(boundaries))


@pytest.mark.parametrize(
    "call",
    [
        lambda plan: plan.shards_of_rank(0, 9),
        lambda plan: plan.batch(0, 0, 9),
        lambda plan: plan.items(0, 1, 0, 9),
    ],
)
def test_too_many_ranks_are_refused_with_the_numbers_and_the_fix(call):
    with pytest.raises(
        ValueError,
        match=r"9 ranks are more than the 8 canonical shards: raise train\.canonical_shards",
    ):
        call(Plan(100, 0, 50, shards=8))


def test_shards_are_never_more_than_a_batch_has_rows():
    """Else a rank could have steps without a row."""
    assert Plan(100, 0, 3, shards=8).shards == 3
    with pytest.raises(ValueError, match=r"4 ranks .* 3 canonical shards.*global_batch \(now 3\)"):
        Plan(100, 0, 3, shards=8).batch(0, 0, 4)
