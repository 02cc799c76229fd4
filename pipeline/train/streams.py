"""Batches that techniques read beside those that a trial is trained on.

`Technique.streams` names further training batches, `PreparesOnTarget` reads rows of the target
before training, `AdaptsAtTest.at_test` the test rows. None of them sees a label of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.config.schema import Train
from pipeline.core.batch import Batch
from pipeline.core.contracts import Technique
from pipeline.core.contracts.objective_capabilities import mixes_inputs
from pipeline.core.contracts.technique_capabilities import LABELLED_SOURCE
from pipeline.core.rng import mix
from pipeline.data.manifests import Reader
from pipeline.data.plan import DEFAULT_SHARDS
from pipeline.data.stream import (
    LoadedBatch,
    Rows,
    eval_batches,
    plan_of,
    rows_per_item,
    train_batches,
)
from pipeline.train.ranks import Ranks


def canonical_shards(train: Train, most_ranks: int, objective: Any) -> int:
    """Return the number of canonical shards (`Plan`), which decides the order of rows.

    An objective that mixes inputs (mixup) pairs rows of one shard, so each shard then has at least
    two rows of every forward pass.

    Args:
        objective: Its options.
    """
    if train.canonical_shards is not None:
        return train.canonical_shards
    shards = DEFAULT_SHARDS
    if mixes_inputs(objective):
        passes = -(-train.global_batch // (train.micro_batch or train.global_batch))
        shards = max(1, min(shards, train.global_batch // passes // 2))
    return max(shards, most_ranks)


def unlabelled(rows: Rows) -> Rows:
    """Return the same rows without labels."""
    decoder = replace(rows.decoder, objective=None, objective_state={}, relabel=None)
    if rows.arrays is None or not len(rows):
        return replace(rows, decoder=decoder, arrays=None)
    first = rows.selection.ids(np.arange(1))
    table = Reader(rows.selection.manifest, decoder.column_names()).take(first)
    inputs, _ = decoder(table)
    arrays = {name: array for name, array in rows.arrays.items() if name in inputs}
    return replace(rows, decoder=decoder, arrays=arrays)


def technique_streams(
    technique: Technique,
    rows: Mapping[str, Rows],
    seed: int,
    train: Train,
    ranks: Ranks,
    *,
    batch: int | None = None,
    known: tuple[str, ...] = (),
) -> dict[str, Callable[[range], Iterator[LoadedBatch]]]:
    """Return the streams that a technique names, as functions of a range of steps.

    Args:
        rows: The rows of each available stream.
        seed: Gives each stream an order of its own, the same after a restart and on any number of
            ranks.
        ranks: Each rank reads its part of every batch.
        batch: Rows of a batch, or all where there are fewer; None: ``global_batch``.
        known: Streams that the run has already.

    Raises:
        ValueError: A stream has no rows.
    """
    out = {}
    for number, name in enumerate(technique.streams()):
        if name in known:
            continue
        if name not in rows:
            raise ValueError(
                f"{technique.registered_name} reads the rows of stream {name!r}, and there are "
                f"only {', '.join(sorted(rows))}: a source that is a checkpoint has no rows"
            )
        part = rows[name] if name == LABELLED_SOURCE else unlabelled(rows[name])
        shards = train.canonical_shards or DEFAULT_SHARDS
        plan = plan_of(
            part,
            mix(seed, number),
            min(batch or train.global_batch, len(part)),
            shards=shards,
            item_rows=rows_per_item(part, shards),
        )
        is_cuda = ranks.device.type == "cuda"
        out[name] = partial(
            train_batches, part, plan, rank=ranks.rank, ranks=ranks.count, pin=is_cuda
        )
    return out


def test_inputs(
    rows: Rows, preprocess: Callable[[Batch, bool], Batch], ranks: Ranks, size: int
) -> Iterator[Batch]:
    """Yield preprocessed batches of all rows without labels, the same ones on every rank.

    Files are often sorted by class, while batch norms and entropies need batches of all classes. So
    rows come in one fixed random order, in batches of nearly equal size.

    Args:
        preprocess: As in `TrainingRun`.
        size: Most rows of a batch.
    """
    plain, n = unlabelled(rows), len(rows)
    order = np.random.default_rng(mix(n)).permutation(n)
    for part in np.array_split(order, -(-n // size)) if n else ():
        for loaded in eval_batches(plain.subset(part), size):
            if len(loaded.batch):
                yield preprocess(loaded.batch.to(ranks.device), False)
