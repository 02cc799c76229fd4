"""From a plan to batches: rows are decoded by Ray Data workers or in this process, or in memory.

The only module that runs Ray Data. Workers read encoded files and send what the modality's `decode`
returns through the object store: uint8 pixels or token ids, never float images. Batches do not
depend on where they are decoded.
"""

from __future__ import annotations

import math
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise, tee
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.capabilities import decodes_on_device
from pipeline.core.contracts import Arrays, Batch, Modality
from pipeline.core.ragged import lengths
from pipeline.core.rng import row_keys
from pipeline.data.length_buckets import WINDOW_ROWS, BucketPlan
from pipeline.data.loader import Block, Decoder, Loader, RowCosts, row_bytes
from pipeline.data.manifests import Selection
from pipeline.data.plan import DEFAULT_SHARDS, Item, Mixture, Plan, Shuffle
from pipeline.io import heartbeat, write_fence
from pipeline.io.file_identity import ChangedFileError
from pipeline.io.threads import threaded_map

DecodeAt = Literal["memory", "workers", "train", "device"]
WINDOW_BYTES, WINDOW_MOST_BYTES = 192 << 20, 2 << 30
"""Size of the row groups from which a batch by cost takes its rows, and its upper limit where
batches are large. Each `Reader` holds two windows and what an item covers, and reads each group
once; several readers each read them. With LibriSpeech (213 kB a row) a window has 200 MB in batches
of 480 s, 0.6 GB of 1500 s, 1.3 GB of 3200 s, and each reader holds 0.7, 1.5 and 2.9 GB.
"""
ITEM_BYTES, ITEM_ROWS = 32 << 20, (32, 2048)
"""What a data worker decodes at a time: a block costs Ray Data about 10 ms of processor time
whatever its size, so small rows go in large numbers. Measured on two cores against a DataLoader, at
224 px with Ray's own number of waiting items: 8 MiB 0.51, 16 MiB 0.61, 32 MiB 0.78. At 64 px, with
other work on the machine: 256 rows 0.48, 2048 rows 0.96.
"""
IN_FLIGHT = 8
"""Items that wait at each worker, so that it never waits for the driver: 0.91 at 224 px with items
of 32 MiB (0.70 with 64 MiB).
"""
COST_ROWS, COST_BYTES = 4096, 64 << 20
"""Most rows whose headers are read in one task, and most bytes (about) where they hold their
files; at least one row group.
"""
EVAL_SAMPLES = 1 << 21
"""Padded samples of an evaluation batch of ragged rows, two minutes at 16 kHz: rows of similar
length are evaluated together.
"""
ITEMS_PER_EXECUTION = 4096
"""Items of one Ray Data execution: a new execution costs seconds, a longer list costs memory."""


class TooManyBadRowsError(ValueError):
    """More rows than allowed cannot be decoded or used for training."""


# ---------------------------------------------------------------- where rows are decoded

ERROR_COLUMN = "__refused__"
"""The only column of a block that carries a pickled error in place of decoded rows."""


class _Worker:
    """One warm process of a Ray Data pool: an item in, a block of columns out."""

    def __init__(self, work: Callable[[Item], Arrays]):
        torch.set_num_threads(1)
        self.work = work

    def __call__(self, items: dict[str, np.ndarray]) -> Arrays:
        try:
            return self.work(Item(*(int(items[name][0]) for name in Item.__dataclass_fields__)))
        except (ValueError, ChangedFileError) as error:
            # Ray Data would drop the cause of the error: send it as a block
            return {ERROR_COLUMN: np.array([pickle.dumps(error)], dtype=object)}


@dataclass(frozen=True)
class DataWorkers:
    """A rank's share of the cluster for reading and decoding."""

    actors: int = 1
    cpus_per_actor: float = 0.5
    object_store_bytes: int = 512 << 20
    gpus_per_actor: float = 0.0


def map_blocks(
    work: Callable[[Item], Arrays], items: Iterable[Item], workers: DataWorkers
) -> Iterator[Arrays]:
    """Apply `work` to items in a Ray Data actor pool, in order and with bounded memory.

    Each item gives one block of columns, which should be large enough to be worth sending. `work`
    is sent once to each actor. A ValueError that it raises is raised here unchanged.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # an item stays one block: Ray would cut one above 1.5 x 128 MiB into several
    context.target_max_block_size = None
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=workers.actors * workers.cpus_per_actor, object_store_memory=workers.object_store_bytes
    )
    items = iter(items)
    while segment := list(islice(items, ITEMS_PER_EXECUTION)):
        data = ray.data.from_items(
            [asdict(item) for item in segment], override_num_blocks=len(segment)
        )
        pool = ray.data.ActorPoolStrategy(
            size=workers.actors, max_tasks_in_flight_per_actor=IN_FLIGHT
        )
        data = data.map_batches(
            _Worker,
            fn_constructor_args=(work,),
            batch_size=None,
            batch_format="numpy",
            num_cpus=workers.cpus_per_actor,
            num_gpus=workers.gpus_per_actor or None,
            compute=pool,
        )
        blocks: Any = data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=4)
        for block in blocks:
            if ERROR_COLUMN in block:
                raise pickle.loads(bytes(block[ERROR_COLUMN][0]))
            yield block


def _ray_blocks(loader: Loader, items: Iterable[Item], workers: DataWorkers) -> Iterator[Block]:
    expected, sent = tee(items)
    for item, columns in zip(expected, map_blocks(loader.columns, sent, workers), strict=True):
        block = loader.block(columns)
        assert len(block.rows) == item.stop - item.start, (
            f"{item} came as a block of {len(block.rows)} rows"
        )
        yield block


def map_items(
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[Any]:
    """Yield the results of `fn` over items, in order: by Ray tasks, or in this process if Ray is
    not running.

    Two tasks are submitted for each one that can run. As results come in order, a caller that has
    kept some of them can resume with the items left.

    Args:
        cpus: CPUs of a task.
        gpus: GPUs of a task.
    """
    import ray
    from ray.exceptions import RayTaskError

    if not ray.is_initialized():
        yield from map(fn, items)
        return
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_apply)
    window = max(2, int(2 * ray.cluster_resources().get("CPU", 1) / cpus))
    shared_fn, fences = ray.put(fn), write_fence.current_fences()
    items = iter(items)
    pending = deque(task.remote(shared_fn, item, fences) for item in islice(items, window))
    while pending:
        try:
            result = ray.get(pending.popleft())
        except RayTaskError as error:
            if isinstance(error.cause, (ValueError, ChangedFileError)):
                # the error itself, without Ray's own traceback
                raise error.cause from None
            raise
        pending.extend(task.remote(shared_fn, item, fences) for item in islice(items, 1))
        yield result


def _apply(fn, item, fences):
    torch.set_num_threads(1)
    with write_fence.guarded_by(fences):  # what a task writes belongs to the run that asked for it
        return fn(item)


# ---------------------------------------------------------------- rows of a run


@dataclass
class Rows:
    """The rows of a split and how to decode them; rows in memory are in ``arrays``."""

    selection: Selection
    decoder: Decoder
    arrays: Arrays | None = None
    bad: tuple[tuple[int, str], ...] = ()
    keeps_bad_rows: bool = False
    """Whether ``arrays`` has bad rows too, as zeros. The plan then counts them, as when rows are
    decoded during training.
    """
    costs: np.ndarray | None = None
    """The cost of each row, where batches are cut by it."""

    def __len__(self) -> int:
        return len(self.selection)

    @property
    def modality(self) -> Modality:
        """The modality that decodes the rows."""
        return self.decoder.modality

    def in_memory(
        self, max_bad: float, cpus: float = 1.0, keep_bad: bool = False, num_left_out: int = 0
    ) -> Rows:
        """Return the rows, decoded.

        Args:
            max_bad: Share of the rows that may be bad.
            cpus: CPUs of each Ray task that decodes; 0: rows are decoded in this process.
            keep_bad: Whether bad rows stay in the arrays, as zeros.
            num_left_out: As in `check_bad_row_budget`.

        Raises:
            TooManyBadRowsError: More rows are bad than allowed.
        """
        if self.arrays is not None:
            return self
        n, size = len(self.selection), 512
        loader = Loader(self.selection, self.decoder)
        items = [Item(-1, i, min(i + size, n)) for i in range(0, n, size)]
        # processes take seconds to start, which pays only for large sets of images
        use_tasks = cpus > 0 and self.selection.manifest.num_bytes > (64 << 20)
        blocks = list(map_items(loader, items, cpus=cpus) if use_tasks else map(loader, items))
        good = np.array([not reason for block in blocks for reason in block.bad], dtype=bool)
        row_ids = np.zeros(0, dtype=np.int64)
        arrays: Arrays = {}
        if blocks:
            row_ids = np.concatenate([block.rows for block in blocks])
            arrays = {
                name: np.concatenate([block.arrays[name] for block in blocks])
                for name in blocks[0].arrays
            }
        bad = tuple(
            (int(row), reason)
            for block in blocks
            for row, reason in zip(block.rows, block.bad, strict=True)
            if reason
        )
        check_bad_row_budget(bad, n, max_bad, self.selection, num_left_out)
        costs = self.costs
        if bad and not keep_bad:
            row_ids = row_ids[good]
            arrays = {name: array[good] for name, array in arrays.items()}
            costs = None if costs is None else costs[good]
        selection = Selection(self.selection.manifest, row_ids)
        return Rows(selection, self.decoder, arrays, bad, keep_bad, costs)

    def with_costs(self, cpus: float = 1.0) -> Rows:
        """Return the rows with their costs, from a column or from the rows' headers.

        Args:
            cpus: CPUs of each Ray task that reads headers; 0: they are read in this process.
        """
        work, n = RowCosts(self.selection, self.modality, self.decoder.columns), len(self)
        items = [
            Item(-1, start, stop)
            for start, stop in pairwise([0, n] if work.has_column else self._cost_cuts())
            if start < stop
        ]
        use_tasks = cpus > 0 and len(items) > 1
        costs = list(map_items(work, items, cpus=cpus) if use_tasks else map(work, items))
        return replace(self, costs=np.concatenate(costs) if costs else np.zeros(0))

    def _cost_cuts(self) -> list[int]:
        """Cut the rows into parts of up to COST_ROWS and COST_BYTES.

        A part is one or more whole row groups, or a part of a larger one.
        """
        manifest, cuts = self.selection.manifest, [0]
        most = min(COST_ROWS, COST_BYTES * manifest.num_rows // max(1, manifest.num_bytes))
        for start, stop in pairwise(self.selection.row_group_starts.tolist()):
            if cuts[-1] < start and stop - cuts[-1] > most:
                cuts.append(start)
            cuts += range(cuts[-1] + COST_ROWS, stop, COST_ROWS)
        return [*cuts, len(self)]

    def part(self, rank: int, ranks: int) -> Rows:
        """Return a rank's contiguous part of the rows, for evaluation."""
        positions = np.arange(len(self) * rank // ranks, len(self) * (rank + 1) // ranks)
        return self if ranks == 1 else self.subset(positions)

    def subset(self, indices: np.ndarray) -> Rows:
        """Return the rows at some positions, in ascending order; all rows are not copied."""
        if len(indices) == len(self):
            return self
        indices = np.sort(indices)
        selection = Selection(self.selection.manifest, self.selection.ids(indices))
        arrays = self.arrays
        if arrays is not None:
            arrays = {name: array[indices] for name, array in arrays.items()}
        costs = None if self.costs is None else self.costs[indices]
        return Rows(selection, self.decoder, arrays, costs=costs)


def rows_per_item(rows: Rows, shards: int) -> int:
    """Return how many rows a data worker decodes at a time.

    They take about ITEM_BYTES, and are at most the rows of a shard in an epoch.
    """
    bytes_per_row = max(1, rows.decoder.estimate_bytes(rows.selection) // max(1, len(rows)))
    low, high = ITEM_ROWS
    return max(low, min(high, ITEM_BYTES // bytes_per_row, len(rows) // shards))


def check_bad_row_budget(
    bad: Iterable[tuple[int, str]],
    rows: int,
    share: float,
    selection: Selection,
    num_left_out: int = 0,
    num_drawn: int | None = None,
) -> None:
    """Raise TooManyBadRowsError when more than a share of a split's rows are bad.

    One bad row is always allowed. Of rows that were drawn from the split, as few labels are, more
    may be bad than the share, but no more than chance explains.

    Args:
        bad: (row id, reason); a row may come twice.
        rows: Number of rows in the split.
        share: Allowed share.
        num_left_out: Further bad rows that were removed from the split before.
        num_drawn: Number of rows that were drawn from the split and read; None: all.
    """
    reasons = dict(bad)
    rows += num_left_out
    num_bad = len(reasons) + num_left_out
    problem = ""
    if num_bad > max(1, share * rows):
        problem = f"{num_bad} of {rows} rows cannot be used, more than"
    elif num_drawn is not None and len(reasons) > most_by_chance(share * num_drawn):
        problem = f"{len(reasons)} of the {num_drawn} rows drawn cannot be used, far more than"
    if problem:
        examples = "; ".join(
            f"{selection.manifest.location(row)}: {reason}"
            for row, reason in islice(reasons.items(), 3)
        )
        raise TooManyBadRowsError(
            f"{problem} data.max_bad_rows={share:g} allows. First ones: {examples}"
        )


def most_by_chance(expected: float) -> int:
    """Return how many rare rows a draw has at most in 99.9 % of cases, but at least one.

    Args:
        expected: Number that it has on average (of the Poisson distribution).
    """
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    return max(1, math.ceil(special.pdtrik(0.999, expected))) if expected > 0 else 1


def plan_of(
    rows: Rows,
    seed: int,
    global_batch: int,
    batch_cost: float | None = None,
    *,
    shards: int = DEFAULT_SHARDS,
    shuffle: Shuffle = "rows",
    item_rows: int = 256,
    mixture: Mixture | None = None,
) -> Plan:
    """Return the training order: batches of `global_batch` rows, or of about `batch_cost`.

    Raises ValueError as `Plan` and `BucketPlan`.
    """
    boundaries = rows.selection.row_group_starts
    if batch_cost is None:
        return Plan(
            len(rows),
            seed,
            global_batch,
            shards=shards,
            shuffle=shuffle,
            boundaries=boundaries,
            item_rows=item_rows,
            mixture=mixture,
        )
    assert rows.costs is not None and mixture is None
    bytes_per_row = max(1, row_bytes(rows.selection))
    window = max(1, WINDOW_BYTES // bytes_per_row)
    most = max(1, WINDOW_MOST_BYTES // bytes_per_row)
    return BucketPlan(
        rows.costs,
        batch_cost,
        seed,
        shards=shards,
        shuffle=shuffle,
        boundaries=boundaries,
        item_rows=item_rows,
        window_rows=min(WINDOW_ROWS, window),
        most_rows=most,
    )


class LoadedBatch(NamedTuple):
    """A batch, the rows that could not be decoded, and how long the consumer waited for it."""

    batch: Batch
    bad: list[tuple[int, str]]
    """(row id, reason)"""
    wait_seconds: float


def _collate(
    rows: Rows,
    seed: int,
    ids: np.ndarray,
    epochs: np.ndarray,
    arrays: Arrays,
    shards: np.ndarray | None = None,
) -> Batch:
    return Batch(
        ids, torch.from_numpy(row_keys(seed, epochs, ids)), rows.modality.collate(arrays), shards
    )


def batches_of_blocks(
    rows: Rows,
    plan: Plan,
    blocks: Iterator[Block],
    steps: range,
    rank: int,
    ranks: int,
    device: torch.device | None = None,
) -> Iterator[tuple[Batch, list]]:
    """Cut blocks, which come in the order of items, into batches; each array is copied once.

    Args:
        device: Where encoded rows are decoded; None: they are decoded already.

    Raises:
        ValueError: Rows of an array have other shapes in one block than in another.
    """
    # blocks of each shard that are not used up, each with the number of its rows already used
    queues: dict[int, deque[list[Any]]] = {
        shard: deque() for shard in plan.shards_of_rank(rank, ranks)
    }
    items = plan.items(steps.start, steps.stop, rank, ranks)
    for step in steps:
        shards, positions = plan.positions(step, rank, ranks)
        ids = np.empty(len(positions), dtype=np.int64)
        epochs = np.empty(len(positions), dtype=np.int64)
        good, arrays, bad = np.ones(len(positions), dtype=bool), {}, []
        for shard, shard_queue in queues.items():
            slots = np.flatnonzero(shards == shard)  # places of the batch that this shard fills
            while len(slots):
                while not shard_queue:
                    item, block = next(items), next(blocks)
                    queues[item.shard].append([block, 0])
                block, num_used = shard_queue[0]
                count = min(len(block.rows) - num_used, len(slots))
                taken = slice(num_used, num_used + count)
                filled, slots = slots[:count], slots[count:]
                for name, array in block.arrays.items():
                    if name not in arrays:
                        shape = (len(positions), *array.shape[1:])
                        arrays[name] = np.empty(shape, dtype=array.dtype)
                    shapes = arrays[name].shape[1:], array.shape[1:]
                    if shapes[0] != shapes[1]:  # numpy would repeat a row of one number
                        raise ValueError(
                            f"modality {rows.modality.registered_name}: a row of {name} has shape "
                            f"{shapes[0]} in one block of rows and {shapes[1]} in another: decode "
                            "rows of several lengths as pipeline.core.ragged.ragged does"
                        )
                    arrays[name][filled] = array[taken]
                ids[filled], epochs[filled] = block.rows[taken], block.epochs[taken]
                for slot, reason in zip(filled, block.bad[taken], strict=True):
                    if reason:
                        good[slot] = False
                        bad.append((int(ids[slot]), reason))
                shard_queue[0][1] = num_used + count
                if num_used + count == len(block.rows):
                    shard_queue.popleft()
        decoded: dict[str, Tensor] = {}
        if device is not None:
            assert decodes_on_device(rows.modality)
            decoded, reasons = rows.modality.unpack(arrays.pop("encoded"), device)
            for slot, reason in enumerate(reasons):
                if reason and good[slot]:
                    good[slot] = False
                    bad.append((int(ids[slot]), reason))
        if bad:
            ids, epochs, shards = ids[good], epochs[good], shards[good]
            arrays = {name: array[good] for name, array in arrays.items()}
            decoded = {
                name: tensor[torch.from_numpy(good).to(tensor.device)]
                for name, tensor in decoded.items()
            }
        yield _collate(rows, plan.seed, ids, epochs, arrays, shards).replace(**decoded), bad


def _from_memory(
    rows: Rows, plan: Plan, steps: range, rank: int, ranks: int
) -> Iterator[tuple[Batch, list]]:
    assert rows.arrays is not None
    reasons = dict(rows.bad) if rows.keeps_bad_rows else {}
    for step in steps:
        indices, epochs = plan.batch(step, rank, ranks)
        shards = plan.positions(step, rank, ranks)[0]
        ids, bad = rows.selection.ids(indices), []
        if reasons:
            bad = [(int(i), reasons[int(i)]) for i in ids if int(i) in reasons]
            good = np.array([int(i) not in reasons for i in ids], dtype=bool)
            indices, epochs, ids, shards = indices[good], epochs[good], ids[good], shards[good]
        arrays = {name: array[indices] for name, array in rows.arrays.items()}
        yield _collate(rows, plan.seed, ids, epochs, arrays, shards), bad


def train_batches(
    rows: Rows,
    plan: Plan,
    steps: range,
    *,
    rank: int = 0,
    ranks: int = 1,
    decode: DecodeAt = "train",
    pin: bool = False,
    threads: int = 1,
    workers: DataWorkers | None = None,
    ahead: int = 3,
    device: torch.device | None = None,
) -> Iterator[LoadedBatch]:
    """Yield the rank's part of the global batches `steps`, in order, exactly len(steps) of them.

    Rows in memory are sliced on request, unless they are pinned. A thread makes other batches.

    Args:
        decode: Where rows are decoded: by Ray Data workers, in this process ("train"), or on
            ``device``, by the thread, from files that Ray Data workers read.
        pin: Whether batches are in pinned memory, for a GPU.
        threads: For decoding in this process.
        ahead: Batches that the thread makes ahead.
    """
    if rows.arrays is not None:
        batches = _from_memory(rows, plan, steps, rank, ranks)
        if not pin:
            return _timed(batches)
    else:
        decode_device = (device or torch.device("cpu")) if decode == "device" else None
        decoder = replace(rows.decoder, keep_encoded=decode_device is not None)
        loader = Loader(rows.selection, decoder, plan)
        items = plan.items(steps.start, steps.stop, rank, ranks)
        blocks = (
            threaded_map(loader, items, threads, threads + 2)
            if decode == "train"
            else _ray_blocks(loader, items, workers or DataWorkers())
        )
        batches = batches_of_blocks(rows, plan, blocks, steps, rank, ranks, decode_device)
    if pin:
        batches = ((batch.pin(), bad) for batch, bad in batches)
    return _timed(prefetched(batches, ahead))


def eval_batches(
    rows: Rows, size: int, *, threads: int = 1, pin: bool = False
) -> Iterator[LoadedBatch]:
    """Yield each row exactly once; the last batch may be short.

    Ragged rows come in batches of similar length, not in their order.
    """
    n = len(rows)
    items = [Item(-1, start, min(start + size, n)) for start in range(0, n, size)]

    def batches():
        loader = Loader(rows.selection, rows.decoder)
        blocks = threaded_map(loader, items, threads, threads + 2) if rows.arrays is None else None
        for item in items:
            if rows.arrays is not None:
                ids = rows.selection.ids(np.arange(item.start, item.stop))
                arrays = {
                    name: array[item.start : item.stop] for name, array in rows.arrays.items()
                }
                bad = []
            else:
                assert blocks is not None
                ids, _, arrays, reasons = next(blocks)
                bad = [
                    (int(row), reason) for row, reason in zip(ids, reasons, strict=True) if reason
                ]
                if bad:
                    good = np.array([not reason for reason in reasons])
                    ids, arrays = ids[good], {name: array[good] for name, array in arrays.items()}
            for part in _batches_of_similar_length(arrays, len(ids)):
                batch = _collate(
                    rows,
                    0,
                    ids[part],
                    np.zeros(len(ids[part]), dtype=np.int64),
                    {name: array[part] for name, array in arrays.items()},
                )
                yield (batch.pin() if pin else batch), bad
                bad = []

    return _timed(batches())


def _batches_of_similar_length(arrays: Arrays, rows: int) -> list[Any]:
    """Return the positions of the rows of each batch.

    All rows are one batch. Ragged rows are cut into batches of similar length, of up to
    EVAL_SAMPLES padded samples.
    """
    ragged_arrays = [
        array
        for array in arrays.values()
        if array.dtype == object and rows and isinstance(array[0], np.ndarray)
    ]
    sizes = sum(map(lengths, ragged_arrays), np.zeros(rows, dtype=np.int64))
    if not sizes.any():
        return [slice(None)]
    order = np.argsort(sizes, kind="stable")
    out, start = [], 0
    for stop in range(1, rows + 1):
        if stop == rows or (stop + 1 - start) * sizes[order[stop]] > EVAL_SAMPLES:
            out.append(order[start:stop])
            start = stop
    return out


def _timed(batches: Iterator[tuple[Batch, list]]) -> Iterator[LoadedBatch]:
    started = time.perf_counter()
    for batch, bad in batches:
        heartbeat.beat()
        yield LoadedBatch(batch, bad, time.perf_counter() - started)
        started = time.perf_counter()


def prefetched(batches: Iterator, ahead: int) -> Iterator:
    """Yield the same batches, made up to ``ahead`` by a thread.

    Its errors are raised here. The thread ends when the iterator is closed.
    """
    out: queue.Queue = queue.Queue(maxsize=ahead)
    stop, end = threading.Event(), object()

    def put(value) -> bool:
        while not stop.is_set():
            try:
                out.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def produce():
        try:
            for value in batches:
                if not put((value, None)):
                    return
            put((end, None))
        except BaseException as error:  # handed to the consumer, whatever it is
            put((end, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = out.get()
            if error is not None:
                raise error
            if value is end:
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=10)
