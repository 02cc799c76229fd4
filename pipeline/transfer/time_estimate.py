"""Estimates for ``--dry-run`` how long a job would take on this machine, from a few measured steps.

The steps are real ones, of the job's networks with random weights on rows of the job, in this
process. On a CPU the time of a step is the processor time of its thread: time that other programs
take is not part of the estimate, and a second sentence says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch

from pipeline.checkpoints import bundle
from pipeline.config.schema import FULL, Train
from pipeline.core.capabilities import can_pack, is_costed
from pipeline.core.contracts import Batch, Task
from pipeline.core.rng import row_keys
from pipeline.core.sampling import evenly_spread
from pipeline.data import manifests
from pipeline.data.stream import LoadedBatch, Rows
from pipeline.train import dry_checks, evaluate, loop
from pipeline.train.dry_checks import Workload
from pipeline.train.experiment import technique_of
from pipeline.train.progress import duration
from pipeline.train.ranks import Ranks, default_device
from pipeline.train.token_rows import PACKED
from pipeline.transfer import existing_trials, planned_trials
from pipeline.transfer.dry_run import TargetCost, describe_target, steps_of_source, validations
from pipeline.transfer.job_state import JobState

MIN_ROWS, MAX_ROWS = 4, 64
"""A measured batch grows from the first number of rows to the second, as long as it is quick."""
ENOUGH_SECONDS = 0.3
"""A step that takes this long is measured well enough."""
MAX_PARAMETERS = 500_000_000
"""Larger networks are not built for an estimate."""
FORWARD_SHARE = 1 / 3
"""Share of the forward pass in a training step: the backward pass takes about twice as long."""
BUSY = 1.5
"""The machine is busy where measured steps took this many times their processor time."""
SECONDS_PER_TRIAL = 0.2
"""Time of a trial beside its steps: it is started, its weights are read and written. Small networks
take 0.09 on two cores (tests/benchmarks/fanout.py, 2026-12-02).
"""


class Unmeasured(Exception):  # noqa: N818 - no error of the job
    """The time cannot be estimated; the message says why."""


@dataclass
class _Speeds:
    """Measured seconds of a step, once for each network and place of the job.

    The place counts, because equal networks may read other rows: recordings of a second, or of a
    minute.
    """

    steps: int = 0
    waited: float = 0.0
    """Seconds that the measured steps took."""
    worked: float = 0.0
    """Of these, the processor time of the thread (on a GPU: all)."""
    known: dict[tuple[str, str, int, int], float] = field(default_factory=dict)

    def seconds(self, place: str, load: Workload, rows: int, threads: int, train: Train) -> float:
        """Return the seconds of a training step of so many rows. Raises Unmeasured."""
        key = (place, f"{load.arch.to_json()} {load.objective.name}", rows, threads)
        if key not in self.known:
            with _threads(threads):
                self.known[key] = self._measure(load, rows, train)
        return self.known[key]

    def _measure(self, load: Workload, rows: int, train: Train) -> float:
        empty = dry_checks.build_task(load.arch, load.objective)
        if sum(parameter.numel() for parameter in empty.parameters()) > MAX_PARAMETERS:
            raise Unmeasured("the network is too large to be tried here")
        batch = batch_of(load, min(rows, MAX_ROWS))
        task, count = bundle.build_task(load.arch, load.objective, seed=0), MIN_ROWS
        while True:
            part = batch.split(count)[0]
            seconds, waited = step_seconds(load, task, part, train)
            self.steps += 2
            self.worked += seconds
            self.waited += waited
            if seconds >= ENOUGH_SECONDS or len(part) == len(batch):
                return seconds * rows / len(part)
            count *= 4


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_of(load: Workload, rows: int) -> Batch:
    """Return a batch of rows of the workload. Raises Unmeasured where none of them can be used."""
    decoder, selection = load.decoder, load.rows
    ids = selection.ids(evenly_spread(len(selection), rows))
    table = manifests.Reader(selection.manifest, decoder.column_names()).take(ids)
    if load.is_packed:
        assert can_pack(decoder.modality)
        table = decoder.modality.pack(table, decoder.columns)[0]
        decoder = load.decoder_of(PACKED)
    arrays, bad = decoder(table)
    good = np.flatnonzero([not reason for reason in bad])
    if not len(good):
        raise Unmeasured("none of the sampled rows can be used")
    repeated = np.resize(good, rows)
    keys = row_keys(
        0,
        np.zeros(rows, dtype=np.int64),
        np.arange(rows, dtype=np.int64),
    )
    tensors = decoder.modality.collate({name: array[repeated] for name, array in arrays.items()})
    return Batch(np.arange(rows, dtype=np.int64), torch.from_numpy(keys), tensors)


def step_seconds(load: Workload, task: Task, batch: Batch, train: Train) -> tuple[float, float]:
    """Return the processor time and the time of the second of two training steps on a batch."""
    technique = technique_of(FULL)
    device = default_device()
    ended: list[tuple[float, float]] = []

    def note() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        # forward, backward and optimiser all run in this thread
        ended.append((now if device.type == "cuda" else time.thread_time(), now))

    short = {
        "changes": (),
        "compile": False,
        "ema": None,
        "patience": None,
        "trace_rows": False,
    }
    loop.fit(
        loop.TrainingRun(
            task=task,
            technique=technique,
            train=train.model_copy(update=short),
            steps=2,
            seed=0,
            batches=lambda steps: (LoadedBatch(batch, [], 0.0) for _ in steps),
            preprocess=evaluate.training_preprocessing(
                Rows(load.rows, load.decoder), task.objective, technique
            ),
            keeper=loop.KeepBest("loss", "last"),
            ranks=Ranks(device=device),
            on_step=note,
        )
    )
    (began, first), (stopped, last) = ended[:2]
    return stopped - began, last - first


def describe(state: JobState, workloads: Mapping[str, Sequence[Workload]]) -> list[str]:
    """Return how long what is not done yet would take, in one sentence.

    Args:
        workloads: What is trained, by its place in the job (``sources.NAME``, ``targets.NAME``).
    """
    speeds, parts, unknown, total = _Speeds(), list[str](), list[str](), 0.0
    for name, stage in state.sources.items():
        if stage.done or stage.splits is None:
            continue
        try:
            seconds = _source_seconds(state, name, workloads.get(f"sources.{name}", ()), speeds)
        except Exception as error:  # an estimate refuses no job
            unknown.append(f"source {name} ({_reason(error)})")
            continue
        parts.append(f"source {name} {duration(seconds)}")
        total += seconds
    at_once = _trials_at_once(state)
    fanout = 0.0
    for name in state.targets:
        try:
            loads = workloads.get(f"targets.{name}", ())
            fanout += _target_seconds(state, name, loads, speeds) / at_once
        except Exception as error:  # an estimate refuses no job
            unknown.append(f"target {name} ({_reason(error)})")
    status = existing_trials.trial_status(state)
    if status:
        fanout *= sum(not is_done for _, is_done in status) / len(status)
    if fanout:
        parts.append(f"trials {duration(fanout)} ({at_once:g} at once)")
        total += fanout
    if not parts and unknown:
        return [f"no estimate of the time: {', '.join(unknown)}"]
    if not parts:
        return []
    left_out = f"; without {', '.join(unknown)}" if unknown else ""
    lines = [
        f"estimate for this machine, from {speeds.steps} measured steps: {', '.join(parts)}, "
        f"about {duration(total)} in total, not counting Ray's start and decoding{left_out}"
    ]
    if speeds.waited > BUSY * speeds.worked > 0:
        lines.append(
            "the estimate is for a machine without other work: this one is busy, and the measured "
            f"steps took {speeds.waited / speeds.worked:.1f} times as long"
        )
    return lines


def _reason(error: Exception) -> str:
    """Return why there is no estimate."""
    if isinstance(error, Unmeasured):
        return str(error)
    return f"a step cannot be tried: {str(error) or type(error).__name__}"


def _source_seconds(
    state: JobState, name: str, loads: Sequence[Workload], speeds: _Speeds
) -> float:
    """Return the seconds of a source's training. Raises Unmeasured."""
    stage = state.sources[name]
    train, steps = stage.spec.train, steps_of_source(stage)
    if not loads or stage.splits is None:
        raise Unmeasured("its checkpoint is not here yet")
    if not isinstance(steps, int):
        raise Unmeasured(f"its steps are known {steps}")
    ranks, cores = stage.spec.worker_range[1], os.cpu_count() or 1
    rows = rows_per_step(loads[0], train)
    threads = max(1, cores // ranks)
    step = speeds.seconds(f"sources.{name}", loads[0], -(-rows // ranks), threads, train)
    step *= max(1.0, ranks / cores)  # more ranks than cores share them
    validated = validations(train, steps) * len(stage.splits.validation)
    return step * (steps + FORWARD_SHARE * validated / rows)


def _target_seconds(
    state: JobState, name: str, loads: Sequence[Workload], speeds: _Speeds
) -> float:
    """Return the seconds of a target's trials, one after the other. Raises Unmeasured."""
    cost: TargetCost = describe_target(state, name, planned_trials.planned_allocations(state))
    stage, total, features = state.targets[name], 0.0, 0.0
    train, splits = stage.spec.train, stage.splits
    threads = max(1, int(state.job.fanout.cpus_per_trial))
    for group in cost.groups:
        if not loads:
            raise Unmeasured("the checkpoints of its sources are not here yet")
        if group.steps is None:
            raise Unmeasured("its steps are known when its rows have been packed or sorted")
        rows = min(rows_per_step(loads[0], train), group.rows)
        step = fmean(
            speeds.seconds(f"targets.{name}", load, rows, threads, train) for load in loads
        )
        forward = FORWARD_SHARE * step / rows
        total += group.trials * SECONDS_PER_TRIAL
        if group.is_frozen:
            all_rows = sum(map(len, splits.by_name().values()))
            features = max(features, group.networks * forward * all_rows)
            continue
        validated = validations(train, group.steps) * len(splits.validation)
        total += group.trials * (step * group.steps + forward * (validated + len(splits.test)))
    return total + features  # all trials with a frozen backbone share the features


def rows_per_step(load: Workload, train: Train) -> int:
    """Return the rows of a step over all ranks; of batches by cost, those of mean cost."""
    modality = load.decoder.modality
    if train.batch_cost is None or not is_costed(modality):
        return train.global_batch
    ids = load.rows.ids(np.arange(min(MAX_ROWS, len(load.rows))))
    table = manifests.Reader(load.rows.manifest, load.decoder.column_names()).take(ids)
    mean = float(modality.costs(table, load.decoder.columns).mean())
    return max(1, round(train.batch_cost / max(mean, 1e-9)))


def _trials_at_once(state: JobState) -> float:
    """Return how many trials run at a time; on a GPU, which they share, one."""
    fanout = state.job.fanout
    if torch.cuda.is_available():
        return 1.0
    room = max(1, int((os.cpu_count() or 1) // fanout.cpus_per_trial))
    return float(min(room, fanout.max_concurrent_trials or room))
