"""Training by batches of about one cost: stopped and resumed bit for bit, the same global batches
at any number of ranks.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from toys import furthest, kill_at, make_run, rows_of, task_of, weights

from pipeline.core.ragged import ragged
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.stream import Rows, plan_of, train_batches
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.train import loop

RATE, COST, STEPS = 4000, 0.8, 24


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Recordings of 0.02 to 0.3 s."""
    rng = np.random.default_rng(0)
    sounds = ragged(
        [
            rng.integers(-8000, 8000, int(size)).astype(np.int16)
            for size in rng.integers(0.02 * RATE, 0.3 * RATE, 60)
        ]
    )
    modality = Audio(
        AudioOptions(rate=RATE, window=0.01, speed=0.1, noise=0.5),
        {"features": "wave", "normalize": False},
    )
    return replace(
        rows_of(modality, {"audio": sounds}, "next_sample"),
        costs=np.array([len(one) / RATE for one in sounds]),
    )


def plan(rows: Rows) -> BucketPlan:
    found = plan_of(rows, 3, 8, COST)
    assert isinstance(found, BucketPlan) and 10 < found.batches_per_epoch < 20, (
        "two epochs are begun"
    )
    return found


def run_of(rows: Rows, folder) -> loop.TrainingRun:
    options = {
        "layers": 2,
        "stacks": 1,
        "residual": 4,
        "skip": 4,
        "pool": 10,
        "frame_layers": 1,
        "frame_kernel": 3,
    }
    task = task_of(
        "wavenet/wavenet",
        rows.modality.inputs(),
        "next_sample",
        seed=1,
        options={"crop": 0.05, "hidden": 8},
        **options,
    )
    run = make_run(
        rows,
        task,
        steps=STEPS,
        keep="last",
        checkpoints=str(folder),
        augment=True,
        lr=0.01,
        checkpoint_every_steps=5,
    )
    return replace(run, batches=partial(train_batches, rows, plan(rows)))


def traced(run: loop.TrainingRun) -> dict[int, list[int]]:
    trace: dict[int, list[int]] = {}
    run.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())
    return trace


def test_a_run_by_cost_that_was_stopped_goes_on_bit_for_bit(rows, tmp_path):
    """Within the first epoch, so that the second one too is planned by the process that goes on."""
    whole = run_of(rows, tmp_path / "whole")
    seen = traced(whole)
    loop.fit(whole)
    assert {len(ids) for ids in seen.values()} > {3, 4}, "batches of several sizes"
    first = run_of(rows, tmp_path / "parts")
    before = traced(first)
    kill_at(first, 12)
    torch.manual_seed(12345)  # the process that goes on has a random state of its own
    second = run_of(rows, tmp_path / "parts")
    after = traced(second)
    assert loop.fit(second).resumed_from == 10 and set(after) == set(range(10, STEPS))
    assert furthest(weights(second.task), weights(whole.task)) == 0.0
    assert {**{step: ids for step, ids in before.items() if step < 10}, **after} == seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_parts_of_the_same_global_batches(rows, ranks):
    """From the first step and from a later one: rows, their keys and their sound."""
    for steps in (range(STEPS), range(7, 20)):
        one = list(train_batches(rows, plan(rows), steps))
        parts = [
            list(train_batches(rows, plan(rows), steps, rank=rank, ranks=ranks))
            for rank in range(ranks)
        ]
        for step, whole in enumerate(one):
            mine = [part[step].batch for part in parts]
            assert sorted(np.concatenate([batch.rows for batch in mine])) == sorted(
                whole.batch.rows
            )
            place = {int(row): i for i, row in enumerate(whole.batch.rows)}
            for batch in mine:
                for i, row in enumerate(batch.rows):
                    at, size = place[int(row)], int(batch["audio_lengths"][i])
                    assert (
                        batch.keys[i] == whole.batch.keys[at]
                        and whole.batch["audio_lengths"][at] == size
                    )
                    assert torch.equal(batch["audio"][i, :size], whole.batch["audio"][at, :size])
