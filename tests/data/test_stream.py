"""The stream gives the plan's batches wherever rows are decoded, leaves out what is broken, and
reads nothing that it skips.
"""

import gc
import os
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.contracts import Modality
from pipeline.core.rng import row_keys
from pipeline.data import manifests as m
from pipeline.data import stream
from pipeline.data.loader import row_bytes
from pipeline.data.plan import Item, Plan
from pipeline.data.stream import DataWorkers, Decoder, Loader, Rows, TooManyBadRowsError
from pipeline.io.threads import threaded_map

N = 150
DECODED: list[int] = []
"""Numbers that this process has decoded, in any order."""


class Squares(Modality):
    """Column ``text`` holds "12" or, for a row that cannot be decoded, "bad 12"; "stop 12" raises,
    as a fault of the program would.
    """

    roles = ("text",)
    seconds = 0.0

    @classmethod
    def fit(cls, options, table, columns, backbone):
        return {}

    def decode(self, table, columns):
        words = [text.split() for text in table[columns["text"]].to_pylist()]
        if any(word[0] == "stop" for word in words):
            raise RuntimeError("a fault in decode")
        time.sleep(self.state.get("seconds", 0))
        number = np.array([int(word[-1]) for word in words])
        DECODED.extend(number.tolist())
        bad = [f"{word[-1]} is bad" if word[0] == "bad" else "" for word in words]
        pixels = (number[:, None, None] * np.arange(6).reshape(2, 3) % 251).astype(np.uint8)
        return {"pixels": pixels, "square": (number**2).astype(np.int32)}, bad


def make(
    folder, change: dict[int, str] | None = None, seconds: float = 0.0, objective: str | None = None
) -> Rows:
    """N rows in three files with groups of 16; ``change`` is put in place of the texts of some
    rows.
    """
    texts = [str(i) for i in range(N)]
    for row, text in (change or {}).items():
        texts[row] = text
    frame = pd.DataFrame({"text": texts, "label": [("odd", "even")[i % 2 == 0] for i in range(N)]})
    folder.mkdir(exist_ok=True)
    for name, start, stop in (("a", 0, 40), ("b", 40, 101), ("c", 101, N)):
        pq.write_table(
            pa.Table.from_pandas(frame[start:stop], preserve_index=False),
            folder / f"{name}.parquet",
            row_group_size=16,
        )
    built = m.build([str(folder / f"{name}.parquet") for name in "abc"], "auto", str(folder))
    state = {"values": ["even", "odd"], "labels": ["even", "odd"]} if objective else {}
    decoder = Decoder(
        Squares(None, {"seconds": seconds} if seconds else {}),
        objective,
        state,
        {"text": "text", "label": "label"},
    )
    return Rows(m.Selection(built), decoder)


@pytest.fixture
def rows(tmp_path):
    DECODED.clear()
    return make(tmp_path / "rows")


def plan_of(
    rows: Rows, batch: int = 12, shuffle="rows", shards: int = 6, seed: int = 3, item_rows: int = 5
) -> Plan:
    return Plan(
        len(rows),
        seed,
        batch,
        shards=shards,
        shuffle=shuffle,
        boundaries=rows.selection.row_group_starts,
        item_rows=item_rows,
    )


def check(loaded, rows: Rows, plan: Plan, steps: range, rank: int = 0, ranks: int = 1) -> None:
    """Batches against what the plan and plain arithmetic say, number by number."""
    loaded = list(loaded)
    assert len(loaded) == len(steps)
    for step, (batch, bad, waited) in zip(steps, loaded, strict=True):
        indices, epochs = plan.batch(step, rank, ranks)
        ids = rows.selection.ids(indices)
        assert batch.rows.tolist() == ids.tolist() and batch.rows.dtype == np.int64
        assert (
            batch.keys.tolist() == row_keys(plan.seed, epochs, ids).tolist()
            and batch.keys.dtype == torch.int64
        )
        assert (
            batch["square"].tolist() == (ids**2).tolist() and batch["square"].dtype == torch.int32
        )
        assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (len(ids), 2, 3)
        assert (
            batch["pixels"].tolist()
            == (ids[:, None, None] * np.arange(6).reshape(2, 3) % 251).tolist()
        )
        assert bad == [] and waited >= 0


def same(one, other) -> None:
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.bad == b.bad
        assert a.batch.rows.tolist() == b.batch.rows.tolist()
        assert torch.equal(a.batch.keys, b.batch.keys)
        assert a.batch.data.keys() == b.batch.data.keys()
        for name in a.batch.data:
            assert a.batch[name].dtype == b.batch[name].dtype and torch.equal(
                a.batch[name], b.batch[name]
            )


def threads_of(name: str, others: Collection[threading.Thread] = ()) -> list[str]:
    """Threads of that name that are alive, after up to five seconds for them to end; without
    others that libraries keep.
    """
    for attempt in range(100):
        threads = set(threading.enumerate()) - set(others)
        alive = [thread.name for thread in threads if name in thread.name]
        if not alive:
            break
        if attempt == 4:
            gc.collect()  # seconds, beside all that other tests hold
        time.sleep(0.05)
    return alive


# ---------------------------------------------------------------- the same batches everywhere


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
@pytest.mark.parametrize("place", ["train", "memory"])
def test_batches_are_the_plans(rows, place, shuffle, ranks):
    """Over the end of an epoch too: 30 steps of 12 rows are 2.4 epochs of 150."""
    plan = plan_of(rows, shuffle=shuffle)
    if place == "memory":
        rows = rows.in_memory(0.0)
    for rank in range(ranks):
        check(
            stream.train_batches(rows, plan, range(30), rank=rank, ranks=ranks, threads=1 + rank),
            rows,
            plan,
            range(30),
            rank,
            ranks,
        )


def test_batches_of_a_selection_name_the_manifests_rows(rows):
    chosen = Rows(rows.selection.keep(np.arange(N) % 3 == 0), rows.decoder)
    plan = plan_of(chosen, shuffle="blocks")
    check(stream.train_batches(chosen, plan, range(9)), chosen, plan, range(9))
    memory = chosen.in_memory(0.0)
    check(stream.train_batches(memory, plan, range(9)), chosen, plan, range(9))
    assert all(
        row % 3 == 0
        for loaded in stream.train_batches(memory, plan, range(9))
        for row in loaded.batch.rows
    )


@pytest.mark.parametrize(
    ("batch", "shards", "item_rows"),
    [(1, 1, 1), (7, 3, 2), (50, 8, 256), (150, 8, 4), (150, 150, 1)],
)
def test_batches_of_any_shape(rows, batch, shards, item_rows):
    plan = plan_of(rows, batch=batch, shards=shards, item_rows=item_rows)
    steps = range(2, 6)
    check(stream.train_batches(rows, plan, steps, threads=2), rows, plan, steps)


def test_the_objectives_targets_come_along(tmp_path):
    rows = make(tmp_path / "rows", objective="classification")
    plan = plan_of(rows)
    for place in (rows, rows.in_memory(0.0)):
        for batch, _, _ in stream.train_batches(place, plan, range(5)):
            assert batch["label"].tolist() == (batch.rows % 2).tolist()


def test_a_loader_travels_without_what_it_has_open(rows):
    plan = plan_of(rows)
    loader = Loader(rows.selection, rows.decoder, plan)
    before = loader(Item(0, 0, 5))
    again = pickle.loads(pickle.dumps(loader))
    after = again(Item(0, 0, 5))
    assert (
        after.rows.tolist() == before.rows.tolist()
        and after.arrays["square"].tolist() == before.arrays["square"].tolist()
    )


def test_no_steps_and_too_many_ranks(rows):
    plan = plan_of(rows)
    assert list(stream.train_batches(rows, plan, range(4, 4))) == []
    with pytest.raises(ValueError, match="7 ranks are more than the 6 canonical shards"):
        list(stream.train_batches(rows, plan, range(3), rank=0, ranks=7))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("start", [1, 7, 13, 29])
def test_resume_is_the_tail_of_the_whole_run_and_decodes_nothing_else(rows, start, ranks):
    plan = plan_of(rows)
    for rank in range(ranks):
        whole = list(stream.train_batches(rows, plan, range(30), rank=rank, ranks=ranks))
        DECODED.clear()
        tail = list(stream.train_batches(rows, plan, range(start, 30), rank=rank, ranks=ranks))
        same(tail, whole[start:])
        wanted = Counter(row for loaded in tail for row in loaded.batch.rows.tolist())
        assert Counter(DECODED) == wanted, (
            "every row of the remaining steps is decoded once, and no row of the steps before"
        )


def test_resume_with_other_ranks_reads_each_remaining_row_once(rows):
    plan = plan_of(rows)
    steps = N // 12
    before = [
        row
        for rank in range(2)
        for loaded in stream.train_batches(rows, plan, range(5), rank=rank, ranks=2)
        for row in loaded.batch.rows.tolist()
    ]
    after = [
        row
        for rank in range(3)
        for loaded in stream.train_batches(rows, plan, range(5, steps), rank=rank, ranks=3)
        for row in loaded.batch.rows.tolist()
    ]
    assert len(before + after) == len(set(before + after)) == steps * 12


# ---------------------------------------------------------------- rows that cannot be decoded

BROKEN = {3: "bad 3", 41: "bad 41", 149: "bad 149"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_rows_are_left_out_and_told_with_their_reason(tmp_path, ranks):
    rows = make(tmp_path / "rows", BROKEN)
    plan = plan_of(rows, batch=50)
    got, message = [], []
    for rank in range(ranks):
        for step, (batch, bad, _) in enumerate(
            stream.train_batches(rows, plan, range(3), rank=rank, ranks=ranks)
        ):
            indices, epochs = plan.batch(step, rank, ranks)
            left = ~np.isin(indices, list(BROKEN))
            assert batch.rows.tolist() == indices[left].tolist(), "the good rows keep their order"
            assert batch.keys.tolist() == row_keys(plan.seed, epochs, indices)[left].tolist(), (
                "and their keys"
            )
            assert batch["square"].tolist() == (indices[left] ** 2).tolist()
            assert {row for row, _ in bad} == set(indices[~left].tolist())
            got, message = got + batch.rows.tolist(), message + bad
    assert sorted(message) == [(3, "3 is bad"), (41, "41 is bad"), (149, "149 is bad")]
    assert sorted(got) == sorted(set(range(N)) - set(BROKEN))


class Digits(Squares):
    """Rows have three digits in the first block that is decoded, and one in the others."""

    registered_name = "digits"

    def decode(self, table, columns):
        arrays, bad = super().decode(table, columns)
        width = 3 if len(DECODED) == len(table) else 1
        return arrays | {"digits": np.zeros((len(table), width))}, bad


def test_rows_of_another_shape_in_another_block_are_refused(rows):
    rows = replace(rows, decoder=replace(rows.decoder, modality=Digits(None, {})))
    batches = stream.train_batches(rows, plan_of(rows), range(13))
    with pytest.raises(
        ValueError, match=r"digits: a row of digits has shape \(3,\) in one block .*1"
    ):
        next(batches)


def test_a_batch_without_a_good_row_is_empty(tmp_path):
    rows = make(tmp_path / "rows", {i: f"bad {i}" for i in range(N)})
    for batch, bad, _ in stream.train_batches(rows, plan_of(rows), range(3)):
        assert len(batch) == len(batch.keys) == len(batch["square"]) == 0
        assert batch["pixels"].shape == (0, 2, 3)
        assert len(bad) == 12


def test_memory_holds_the_good_rows_and_lists_the_others(tmp_path):
    memory = make(tmp_path / "rows", BROKEN).in_memory(0.02)
    assert memory.bad == ((3, "3 is bad"), (41, "41 is bad"), (149, "149 is bad"))
    assert len(memory) == 147 and memory.arrays is not None
    assert memory.arrays["square"].tolist() == [i * i for i in range(N) if i not in BROKEN]
    assert memory.in_memory(0.0) is memory, "decoded once"
    plan = plan_of(memory)
    for batch, bad, _ in stream.train_batches(memory, plan, range(13)):
        assert batch["square"].tolist() == (batch.rows**2).tolist() and bad == []


def test_over_the_budget_is_an_error_that_names_files_rows_and_reasons(tmp_path):
    rows = make(tmp_path / "rows", BROKEN)
    with pytest.raises(TooManyBadRowsError) as caught:
        rows.in_memory(0.01)
    message = str(caught.value)
    assert message.startswith(
        "3 of 150 rows cannot be used, more than data.max_bad_rows=0.01 allows."
    )
    for place in (
        "a.parquet row 3: 3 is bad",
        "b.parquet row 1: 41 is bad",
        "c.parquet row 48: 149 is bad",
    ):
        assert place in message


def test_the_budget_counts_from_the_second_row(rows):
    check_one = [(1, "x")]
    stream.check_bad_row_budget(check_one, 10, 0.01, rows.selection)
    stream.check_bad_row_budget([(1, "x"), (2, "x")], 200, 0.01, rows.selection)
    with pytest.raises(TooManyBadRowsError, match="2 of 199 rows"):
        stream.check_bad_row_budget([(1, "x"), (2, "x")], 199, 0.01, rows.selection)
    with pytest.raises(TooManyBadRowsError, match="3 of 200 rows"):
        stream.check_bad_row_budget([(1, "x"), (2, "x")], 199, 0.01, rows.selection, num_left_out=1)
    with pytest.raises(TooManyBadRowsError, match=r"more than data\.max_bad_rows=0\.5"):
        stream.check_bad_row_budget(((i, "x") for i in range(6)), 10, 0.5, rows.selection)


def test_few_rows_of_a_split_may_hold_as_many_bad_ones_as_chance_explains(rows):
    """By hand: 12 rows of which 1 in 100 may be bad hold 3 or more in 1 of about 4,000 draws."""
    check = partial(stream.check_bad_row_budget, rows=5000, share=0.01, selection=rows.selection)
    bad = [(row, "x") for row in range(50)]
    check(bad)
    check(bad, num_drawn=5000)
    check(bad[:2], num_drawn=12)
    with pytest.raises(TooManyBadRowsError, match=r"^3 of the 12 rows drawn cannot be used"):
        check(bad[:3], num_drawn=12)
    check(bad[:1], share=0.0, num_drawn=12)


def test_the_budget_counts_a_row_once_however_often_it_is_met(rows):
    """In every epoch the same rows are bad, and its reason may be told in other words."""
    stream.check_bad_row_budget([(7, "x"), (7, "x"), (7, "y")] * 50, 10, 0.01, rows.selection)
    stream.check_bad_row_budget(
        ((row, f"epoch {epoch}") for epoch in range(9) for row in (3, 8)), 200, 0.01, rows.selection
    )
    with pytest.raises(TooManyBadRowsError, match=r"^3 of 200 rows cannot be used"):
        stream.check_bad_row_budget(
            ((row, "x") for _ in range(9) for row in (3, 8, 11)), 200, 0.01, rows.selection
        )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shuffle", ["rows", "blocks"])
def test_bad_rows_that_are_kept_in_memory_leave_the_batches_as_they_are(tmp_path, shuffle, ranks):
    """Bad rows keep their places in the plan: the same batches, and the same rows told, as when
    rows are decoded as they come.
    """
    rows = make(tmp_path / "rows", {**BROKEN, **{i: f"bad {i}" for i in range(60, 75)}})
    kept = rows.in_memory(0.2, keep_bad=True)
    assert (
        len(kept) == N
        and len(rows.in_memory(0.2)) == N - 18
        and [row for row, _ in kept.bad] == sorted([*BROKEN, *range(60, 75)])
    )
    plan = plan_of(rows, shuffle=shuffle)
    message = 0
    for rank in range(ranks):
        ours, theirs = (
            list(stream.train_batches(source, plan, range(4, 30), rank=rank, ranks=ranks))
            for source in (kept, rows)
        )
        assert [sorted(loaded.bad) for loaded in ours] == [sorted(loaded.bad) for loaded in theirs]
        same(
            [loaded._replace(bad=[]) for loaded in ours],
            [loaded._replace(bad=[]) for loaded in theirs],
        )
        message += sum(len(loaded.bad) for loaded in ours)
    assert message > 18, "in more than one epoch"


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize(
    "leave",
    ["break", *(pytest.param(way, marks=pytest.mark.slow) for way in ("close", "drop", "throw"))],
)
def test_leaving_early_stops_the_thread_and_the_decoding(rows, leave):
    others = threading.enumerate()
    rows.decoder.modality.state["seconds"] = 0.005
    plan = plan_of(rows)
    batches = stream.train_batches(rows, plan, range(2000), ahead=2, threads=2)
    next(batches)
    assert any("prefetch" in thread.name for thread in threading.enumerate())
    if leave == "close":
        batches.close()
    elif leave == "throw":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    elif leave == "break":
        for _ in batches:
            break
    del batches
    assert threads_of("prefetch") == []
    assert threads_of("ThreadPoolExecutor", others) == []
    done = len(DECODED)
    time.sleep(0.1)
    assert len(DECODED) == done < 500


def test_a_finished_run_leaves_no_thread(rows):
    assert len(list(stream.train_batches(rows, plan_of(rows), range(4)))) == 4
    assert threads_of("prefetch") == []


def test_a_fault_in_the_thread_reaches_the_consumer(tmp_path):
    rows = make(tmp_path / "rows", {77: "stop 77"})
    plan = plan_of(rows)
    step = next(step for step in range(20) if 77 in plan.batch(step)[0])
    got = []
    with pytest.raises(RuntimeError, match="a fault in decode"):
        for loaded in stream.train_batches(rows, plan, range(20)):
            got.append(loaded)
    assert len(got) <= step
    assert threads_of("prefetch") == []


def test_a_file_that_is_gone_is_an_error_not_a_bad_row(rows):
    os.remove(rows.selection.manifest.files[1])
    with pytest.raises(OSError, match=r"b\.parquet"):
        list(stream.train_batches(rows, plan_of(rows), range(13)))
    with pytest.raises(OSError, match=r"b\.parquet"):
        list(stream.eval_batches(rows, 40))


def test_prefetch_goes_a_bounded_way_ahead():
    made = []

    def numbers():
        for i in range(100):
            made.append(i)
            yield i

    got = stream.prefetched(numbers(), 3)
    assert next(got) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1, "what was taken, three that wait and one in hand"
    assert list(got) == list(range(1, 100))


def test_prefetch_raises_after_what_was_made_before_the_error():
    def numbers():
        yield 1
        yield 2
        raise KeyError("third")

    got = stream.prefetched(numbers(), 5)
    assert [next(got), next(got)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(got)
    with pytest.raises(StopIteration):
        next(got)


def test_waiting_is_measured(rows):
    rows.decoder.modality.state["seconds"] = 0.02
    start = time.perf_counter()
    waited = [
        loaded.wait_seconds
        for loaded in stream.train_batches(rows, plan_of(rows, item_rows=2), range(5))
    ]
    assert 0.02 <= sum(waited) <= time.perf_counter() - start
    batches = stream.train_batches(rows, plan_of(rows, item_rows=2), range(3), ahead=5)
    next(batches)
    start = time.perf_counter()
    assert threads_of("prefetch") == [], "while the consumer is busy the others are made"
    busy = time.perf_counter() - start
    assert busy > 0.05
    assert sum(loaded.wait_seconds for loaded in batches) < busy / 2


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 16, 50, 1000])
@pytest.mark.parametrize("memory", [False, True])
def test_evaluation_sees_each_row_exactly_once(rows, memory, size, ranks):
    rows = rows.in_memory(0.0) if memory else rows
    seen = []
    for rank in range(ranks):
        batches = list(stream.eval_batches(rows.part(rank, ranks), size))
        assert all(0 < len(loaded.batch) <= size for loaded in batches)
        assert all(len(loaded.batch) == size for loaded in batches[:-1]), (
            "only the last one is short"
        )
        for batch, bad, _ in batches:
            assert bad == []
            assert batch["square"].tolist() == (batch.rows**2).tolist()
            assert (
                batch.keys.tolist() == row_keys(0, np.zeros_like(batch.rows), batch.rows).tolist()
            )
            seen += batch.rows.tolist()
    assert seen == list(range(N))


def test_evaluation_with_more_ranks_than_rows(rows):
    few = rows.subset(np.array([5, 90]))
    seen = [
        row
        for rank in range(4)
        for loaded in stream.eval_batches(few.part(rank, 4), 8)
        for row in loaded.batch.rows.tolist()
    ]
    assert seen == [5, 90]
    assert list(stream.eval_batches(rows.subset(np.zeros(0, dtype=np.int64)), 8)) == []


def test_evaluation_leaves_bad_rows_out_and_tells_them(tmp_path):
    rows = make(tmp_path / "rows", BROKEN)
    loaded = [each for rank in range(3) for each in stream.eval_batches(rows.part(rank, 3), 20)]
    assert sorted(row for each in loaded for row in each.batch.rows.tolist()) == sorted(
        set(range(N)) - set(BROKEN)
    )
    assert [message for each in loaded for message in each.bad] == [
        (3, "3 is bad"),
        (41, "41 is bad"),
        (149, "149 is bad"),
    ]


def test_a_subset_is_in_ascending_order_also_in_memory(rows):
    places = np.array([140, 3, 77])
    for part in (rows.subset(places), rows.in_memory(0.0).subset(places)):
        ((batch, _, _),) = stream.eval_batches(part, 10)
        assert batch.rows.tolist() == [3, 77, 140] and batch["square"].tolist() == [9, 5929, 19600]


def test_a_subset_of_all_rows_copies_nothing(rows):
    """A trial with all labels reads the arrays that its target was decoded into, as all trials
    do.
    """
    memory = rows.in_memory(0.0)
    assert memory.arrays is not None
    whole, part = memory.subset(np.arange(N)), memory.subset(np.arange(N - 1))
    assert whole.arrays is not None and part.arrays is not None
    assert all(np.shares_memory(whole.arrays[name], array) for name, array in memory.arrays.items())
    assert not any(
        np.shares_memory(part.arrays[name], array) for name, array in memory.arrays.items()
    )
    assert len(rows.subset(np.arange(N))) == N and rows.subset(np.arange(N)).arrays is None


# ---------------------------------------------------------------- map_items


def test_map_items_without_ray_is_ordered_and_lazy(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    taken = []
    results = stream.map_items(lambda x: x * x, (taken.append(i) or i for i in range(100)))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) == 3
    assert list(results) == [i * i for i in range(3, 100)]
    assert list(stream.map_items(str, [])) == []


def slow_square(x: int) -> int:
    time.sleep(random.Random(x).random() * 0.05)
    if x == 13:
        raise ValueError("13 is unlucky")
    return x * x


@pytest.mark.ray
def test_map_items_on_ray_is_ordered_and_goes_a_bounded_way_ahead(ray_here):
    taken = []
    window = int(2 * ray_here.cluster_resources()["CPU"] / 0.5)
    items = (taken.append(i) or i for i in range(100, 140))
    results = stream.map_items(slow_square, items, cpus=0.5)
    assert next(results) == 10_000
    assert len(taken) <= window + 2 < 40
    assert list(results) == [i * i for i in range(101, 140)]
    assert list(stream.map_items(slow_square, [])) == []


@pytest.mark.ray
def test_map_items_raises_the_error_of_an_item_at_its_place(ray_here):
    results = stream.map_items(slow_square, range(10, 16), cpus=0.5)
    assert [next(results) for _ in range(3)] == [100, 121, 144]
    with pytest.raises(ValueError, match=r"^13 is unlucky"):
        next(results)


@pytest.mark.ray
def test_ray_data_workers_give_the_same_batches(ray_here, tmp_path):
    """Rows, keys, data and bad rows of a rank that goes on from a step: from Ray Data workers as
    from this process.
    """
    rows = make(tmp_path / "rows", BROKEN, objective="classification")
    plan = plan_of(rows, shuffle="blocks", item_rows=20)
    part = partial(stream.train_batches, rows, plan, range(2, 15), rank=1, ranks=2)
    decoded_here = list(part())
    DECODED.clear()
    same(part(decode="workers", workers=DataWorkers(actors=1, cpus_per_actor=0.5)), decoded_here)
    assert DECODED == [], "nothing is decoded in this process"
    assert sum(len(loaded.bad) for loaded in decoded_here) >= 1
    assert threads_of("prefetch") == []


@pytest.mark.slow
@pytest.mark.ray
def test_an_item_stays_one_block_however_small_ray_wants_its_blocks(ray_here, rows, monkeypatch):
    """Ray cuts a block above its target in two, and then blocks and items would no longer go
    together.
    """
    context = ray_here.data.DataContext.get_current()
    monkeypatch.setattr(context, "target_max_block_size", 64)
    plan = plan_of(rows, item_rows=20)
    same(
        stream.train_batches(rows, plan, range(13), decode="workers"),
        stream.train_batches(rows, plan, range(13)),
    )


@pytest.mark.ray
@pytest.mark.slow
def test_two_executions_join_without_a_seam(ray_here, rows, monkeypatch):
    """A list of items longer than one execution takes is cut into several."""
    monkeypatch.setattr(stream, "ITEMS_PER_EXECUTION", 7)
    plan = plan_of(rows, item_rows=20)
    check(stream.train_batches(rows, plan, range(13), decode="workers"), rows, plan, range(13))


@pytest.mark.ray
def test_a_fault_in_a_data_worker_reaches_the_consumer(ray_here, tmp_path):
    rows = make(tmp_path / "rows", {77: "stop 77"})
    with pytest.raises(Exception, match="a fault in decode"):
        list(stream.train_batches(rows, plan_of(rows), range(13), decode="workers"))
    assert threads_of("prefetch") == []


@pytest.mark.ray
@pytest.mark.slow
def test_leaving_ray_data_early_frees_its_workers(ray_here, rows):
    for _ in range(2):  # the second run would wait for ever for CPUs that the first one kept
        batches = stream.train_batches(
            rows,
            plan_of(rows, item_rows=4),
            range(100),
            decode="workers",
            workers=DataWorkers(actors=2, cpus_per_actor=1.0),
        )
        next(batches)
        batches.close()
        del batches
        assert threads_of("prefetch") == []
    for _ in range(100):
        gc.collect()
        if ray_here.available_resources().get("CPU", 0) == 2:
            break
        time.sleep(0.1)
    assert ray_here.available_resources().get("CPU") == 2


@pytest.mark.ray
def test_memory_may_be_filled_by_several_processes(ray_here, tmp_path, monkeypatch):
    rows = make(tmp_path / "rows", BROKEN)
    here = rows.in_memory(0.05)
    DECODED.clear()
    monkeypatch.setattr(m.Manifest, "num_bytes", property(lambda self: 1 << 30))
    there = rows.in_memory(0.05)
    assert DECODED == []
    assert (
        there.bad == here.bad
        and there.selection.row_ids.tolist() == here.selection.row_ids.tolist()
    )
    assert all(np.array_equal(there.arrays[name], here.arrays[name]) for name in here.arrays)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_batches_are_the_same(rows):
    plan = plan_of(rows)
    for source in (rows, rows.in_memory(0.0)):
        pinned = list(stream.train_batches(source, plan, range(5), pin=True))
        assert all(loaded.batch["pixels"].is_pinned() for loaded in pinned)
        same(pinned, stream.train_batches(source, plan, range(5)))


def test_threads_keep_the_order_and_raises():
    assert list(threaded_map(lambda i: i * i, range(100), 3)) == [i * i for i in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(threaded_map(lambda i: 1 // i, [1, 0]))


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("most_rows", "most_bytes", "sizes"),
    [
        (4096, 1 << 30, [150]),
        (4096, 1, [16, 16, 8, 16, 16, 16, 13, 16, 16, 16, 1]),
        (40, 1 << 30, [40, 32, 29, 32, 17]),
        (10, 1, None),
    ],
)
def test_what_rows_cost_is_read_by_whole_row_groups_of_few_bytes(
    rows, monkeypatch, most_rows, most_bytes, sizes
):
    seen = []

    class Length(Squares):
        cost_role, cost_unit = "length", "characters"

        def costs(self, table, columns):
            seen.append(len(table))
            return np.array([len(text) for text in table["text"].to_pylist()], dtype=np.float64)

    monkeypatch.setattr(stream, "COST_ROWS", most_rows)
    monkeypatch.setattr(stream, "COST_BYTES", most_bytes)
    rows.decoder.modality = Length(None, {})
    assert rows.with_costs(cpus=0).costs.tolist() == [len(str(i)) for i in range(N)]
    assert seen == sizes or (sizes is None and max(seen) == 10)
    some = rows.subset(np.arange(3, 140, 7))
    assert some.with_costs(cpus=0).costs.tolist() == [len(str(i)) for i in range(3, 140, 7)]
    assert rows.subset(np.zeros(0, dtype=np.int64)).with_costs(cpus=0).costs.shape == (0,)


def test_windows_of_batches_by_cost_hold_no_more_than_a_reader_keeps(rows, monkeypatch):
    """Batches take their rows from anywhere in a window: one that a reader cannot hold would be
    read again and again.
    """
    costly = replace(rows, costs=np.arange(1.0, N + 1))
    assert len(stream.plan_of(costly, 0, 12, 200.0, shuffle="blocks").windows) == 1
    each = rows.selection.manifest.num_bytes // N
    monkeypatch.setattr(stream, "WINDOW_BYTES", 40 * each)
    windows = stream.plan_of(costly, 0, 12, 200.0, shuffle="blocks").windows
    assert max(len(window.rows) for window in windows) == 69, (
        "24 batches of 200 / 75.5 rows, and a group"
    )
    monkeypatch.setattr(stream, "WINDOW_MOST_BYTES", 40 * each)
    windows = stream.plan_of(costly, 0, 12, 200.0, shuffle="blocks").windows
    assert (
        len(windows) >= 2
        and max(len(window.rows) for window in windows) <= 56
        and sum(len(window.rows) for window in windows) == N
    )


@pytest.mark.parametrize(
    ("rows", "groups"), [(None, 10), (range(20), 2), (range(0, 100, 10), 10), (range(35, 45), 2)]
)
def test_bytes_of_a_row_are_those_that_a_reader_holds_for_it(rows, groups, tmp_path):
    """Row groups are read whole: few rows of many groups cost as much as all of theirs."""
    pq.write_table(
        pa.table({"text": [f"{i:1000d}" for i in range(100)]}),
        tmp_path / "even.parquet",
        row_group_size=10,
        use_dictionary=False,
    )
    held = m.build(str(tmp_path / "even.parquet"), "auto", str(tmp_path))
    count = 100 if rows is None else len(rows)
    assert row_bytes(m.Selection(held, None if rows is None else np.array(rows))) == pytest.approx(
        held.num_bytes / 10 * groups / count, rel=0.01
    )


def test_a_reader_of_batches_by_cost_reads_each_row_group_once_an_epoch(tmp_path, monkeypatch):
    """However large the batches make the windows, and without holding more than two of them and
    what an item goes over.
    """
    random_text = np.random.default_rng(0)
    table = pa.table({"text": [f"{random_text.bytes(1500).hex()} {i}" for i in range(600)]})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=8)
    rows = Rows(
        m.Selection(m.build(str(tmp_path / "long.parquet"), "auto", str(tmp_path))),
        Decoder(Squares(None, {}), None, {}, {"text": "text"}),
        costs=random_text.uniform(1, 17, 600),
    )
    each = rows.selection.manifest.num_bytes // 600
    monkeypatch.setattr(stream, "WINDOW_BYTES", 20 * each)
    monkeypatch.setattr("pipeline.data.loader.WINDOWS_BYTES", 20 * each)
    read, groups = [], pq.ParquetFile.read_row_group

    def counted(file, number, **words):
        read.append(number)
        return groups(file, number, **words)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for cost in (20.0, 60.0):
        plan = stream.plan_of(rows, 3, 0, cost, shards=4, shuffle="blocks", item_rows=5)
        loader, n = Loader(rows.selection, rows.decoder, plan), int(plan.batches_per_epoch)
        largest = max(len(window.rows) for window in plan.windows)
        assert len(plan.windows) > 3 and plan.held_rows == 2 * largest + 20
        for epoch in range(2):
            read.clear()
            for item in plan.items(epoch * n, (epoch + 1) * n):
                loader(item)
            assert max(Counter(read).values()) == 1 and (epoch or sorted(read) == list(range(75)))
            assert loader._reader.bytes_in_cache <= (plan.held_rows + 8) * each
    assert stream.plan_of(rows, 3, 0, 60.0, shards=4, item_rows=5).held_rows == 0, (
        "a window of all rows"
    )
