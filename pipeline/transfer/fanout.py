"""Fan-out: many trials at once on Ray Tune. The one place that runs Ray Tune.

Trials are grouped into work items: one trial, or all trials of one frozen backbone on one target,
whose heads train together. A work item writes each trial's record when it ends, so an interrupted
fan-out continues with the trials that have none.
"""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import ray
import torch
from ray import cloudpickle, tune
from ray.exceptions import GetTimeoutError, RayError
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher, create_searcher

from pipeline.config.schema import Fanout, Job
from pipeline.core.metrics.catalog import metric
from pipeline.data.stream import map_items
from pipeline.io import checksums, heartbeat, storage, write_fence
from pipeline.io.threads import threaded_map
from pipeline.report.trial_record import TrialRecord
from pipeline.train import launch
from pipeline.train.progress import Progress, duration
from pipeline.train.ranks import Ranks
from pipeline.transfer import baseline_trials, cached_heads, trial
from pipeline.transfer.grid import SCRATCH, Trial, folders
from pipeline.transfer.heartbeat_board import HeartbeatBoard
from pipeline.transfer.scoring import SourceTargetPair
from pipeline.transfer.trial import Shared

RUNGS = {"grace_period": 20, "reduction_factor": 2, "max_t": 100}
"""ASHA halves the trials of an entry at 20, 40 and 80 percent of their steps, however often they
validate.
"""
SEARCHED_METRIC = "value"
"""The result that a searcher maximises."""
MAX_STACKED_TRIALS = 64
"""Most heads that train together: with more work items, more workers are busy."""


@dataclass(frozen=True)
class HeartbeatSender:
    """Sends the heartbeats of the process that runs a work item."""

    board: Any
    actor_id: str
    item_index: int
    every_seconds: float

    def listener(self) -> Callable[[], None]:
        """Return a function for `heartbeat.listening`, which sends a beat every few seconds."""
        last_sent = float("-inf")

        def send() -> None:
            nonlocal last_sent
            if time.monotonic() - last_sent > self.every_seconds:
                last_sent = time.monotonic()
                self.board.beat.remote(self.actor_id, self.item_index)

        return send


def _register_process(
    board: Any, item_index: int, every_seconds: float, waits_for_ranks: bool
) -> HeartbeatSender:
    """Register this process as the one that runs a work item."""
    context = ray.get_runtime_context()
    sender = HeartbeatSender(board, str(context.get_actor_id()), item_index, every_seconds)
    # pickled: a handle would make the actor of `HeartbeatBoard` import Ray Tune, and torch with it
    actor = cloudpickle.dumps(context.current_actor)
    board.begin.remote(sender.actor_id, actor, item_index, waits_for_ranks)
    return sender


class Watchdog:
    """Kills the processes of trials that hang or take too long.

    It runs outside of them, since a process that hangs in C code does not react to anything.
    """

    def __init__(self, work: list[WorkItem], spec: Fanout, progress: Progress):
        minutes = spec.silence_timeout_minutes
        self.max_silence_seconds = None if minutes is None else 60 * minutes
        limit = spec.trial_timeout_minutes
        # heads that train together share the time that each of them alone would have
        self.limits: dict[int, float] = {}
        if limit is not None:
            self.limits = {i: 60 * limit * len(item.trials) for i, item in enumerate(work)}
        self.work, self.spec, self.progress = work, spec, progress
        self.reasons: dict[int, str] = {}
        waits = [
            *self.limits.values(),
            *([self.max_silence_seconds] if self.max_silence_seconds is not None else []),
        ]
        self.look_every_seconds = min([5.0, *(seconds / 5 for seconds in waits)])
        self.board = launch.start_actor(HeartbeatBoard)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.max_silence_seconds is not None or self.limits:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        with suppress(RayError):
            ray.kill(self.board)  # pyright: ignore[reportArgumentType] - Ray's stub of actors

    def ended(self, index: int) -> None:
        self.board.end.remote(index)

    def _watch(self) -> None:
        while not self._ended.wait(self.look_every_seconds):
            try:
                overdue = ray.get(
                    self.board.overdue.remote(self.max_silence_seconds, self.limits), timeout=30
                )
            except (RayError, GetTimeoutError):
                continue
            for index, actor, why in overdue:
                reason = self._reason(index, why)
                self.reasons[index] = reason
                self.progress.note(f"warning: {self._name(index)}: {reason}")
                with suppress(RayError, ValueError):
                    ray.kill(cloudpickle.loads(actor), no_restart=True)

    def _reason(self, index: int, why: str) -> str:
        if why == "time":
            item = self.work[index]
            for_each = f" for each of {len(item.trials)} heads" if item.is_stack else ""
            return (
                f"ran longer than {self.spec.trial_timeout_minutes:g} minutes{for_each} "
                "(fanout.trial_timeout_minutes), and its process was ended"
            )
        return (
            f"took no step and read no batch for {self.spec.silence_timeout_minutes:g} minutes "
            "(fanout.silence_timeout_minutes), and its process was ended"
        )

    def _name(self, index: int) -> str:
        item = self.work[index]
        others = f" and {len(item.trials) - 1} more" if len(item.trials) > 1 else ""
        return f"trial {item.first.name}{others}"


@dataclass(frozen=True)
class WorkItem:
    """What one Tune trial runs: one of our trials, or several whose heads train together."""

    trials: tuple[Trial, ...]
    is_stack: bool
    """Whether the heads of the trials train together."""

    @property
    def first(self) -> Trial:
        return self.trials[0]


def group_into_work_items(trials: list[Trial], shared: Shared) -> list[WorkItem]:
    """Group heads on one frozen backbone; every other trial is a work item of its own.

    Random backbones differ by seed, so their heads are grouped by seed. Single trials come first,
    since they take longest.
    """
    frozen: dict[tuple, list[Trial]] = defaultdict(list)
    single: list[WorkItem] = []
    for one in trials:
        if one.is_baseline:
            single.append(WorkItem((one,), False))
        elif one.technique_object.frozen and shared.targets[one.target, one.backbone_key].in_memory:
            weights = one.seed if one.source == SCRATCH else None
            technique = (str(one.technique), str(one.technique_object.options))
            key = (one.source, weights, one.backbone_key, one.target, technique, one.stage)
            frozen[key].append(one)
        else:
            single.append(WorkItem((one,), False))
    stacks: list[WorkItem] = []
    unstacked: list[WorkItem] = []
    for group in frozen.values():
        for start in range(0, len(group), MAX_STACKED_TRIALS):
            members = group[start : start + MAX_STACKED_TRIALS]
            if cached_heads.can_stack(members, shared):
                stacks.append(WorkItem(tuple(members), True))
            else:
                unstacked += [WorkItem((one,), False) for one in members]
    return [*single, *stacks, *unstacked]


class _TuneConfig(TypedDict):
    """Config of one Ray Tune trial, which runs one work item."""

    item_index: int
    """Index of the work item."""
    threads: int
    workers: int
    """Ranks of each trial; 0: it runs in the process of the work item."""
    cpus: float
    """CPUs of each rank."""
    gpus: float
    """GPUs of each rank."""


def run_work_item(
    config: _TuneConfig,
    shared_reference: list[Any],
    work: list[WorkItem],
    asha: bool,
    board: Any = None,
    heartbeat_seconds: float = 60.0,
) -> None:
    """Run a work item as one Tune trial.

    An error goes into the records of its trials and stops no other trial.

    Args:
        shared_reference: Ray's reference to what all trials share. It is in a list, because Ray
            Tune puts its parameters into the object store, which takes no bare reference.
        asha: Whether validations are reported to the scheduler.
        board: The `HeartbeatBoard` that gets heartbeats; None: no watchdog.
    """
    sender = None
    if board is not None:
        sender = _register_process(
            board, config["item_index"], heartbeat_seconds, config["workers"] > 0
        )
    shared: Shared = ray.get(shared_reference[0])
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    if asha:
        gc.collect()  # a stopped trial left its network in a traceback, which is free only now
    item = work[config["item_index"]]
    torch.set_num_threads(config["threads"])
    started = time.time()

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        name = shared.targets[item.first.target, item.first.backbone_key].metrics[0]
        sign = 1.0 if metric(name).higher_is_better else -1.0
        tune.report(
            {
                "signed_metric": sign * metrics[name],
                "percent": 100 * step / steps,
                "step": step,
                "validation": metrics,
                "seconds": time.time() - started,
            }
        )

    notes: list[str] = []
    try:
        with (
            write_fence.guarded_by(shared.fences),
            checksums.notifications_to(notes.append),
            heartbeat.listening(sender.listener() if sender else lambda: None),
        ):
            records = _records(
                item,
                shared,
                shared_reference[0],
                config,
                report if asha else lambda step, steps, metrics: None,
                sender,
            )
    finally:
        release_memory()
    # Keep what a first trial leaves (imported modules, shared data) out of all later collections,
    # which take 0.01 instead of 0.2 seconds then. Its network is freed. Once only: reference cycles
    # in what is frozen are never freed.
    if not gc.get_freeze_count():
        gc.freeze()
    failed = sum(record.failed for record in records)
    tune.report(
        {
            "signed_metric": 0.0,
            "done_trials": len(item.trials),
            "failed_trials": failed,
            "finished": True,
            **({"notes": notes} if notes else {}),
        }
    )


def run_rank(config: dict[str, Any], ranks: Ranks) -> TrialRecord:
    """One rank of a trial under Ray Train."""
    sender: HeartbeatSender | None = config["sender"]
    with heartbeat.listening(sender.listener() if sender else lambda: None):
        heartbeat.beat()  # the rank is placed; from here on silence counts
        return trial.run(config["trial"], config["shared"], ranks)


def _records(
    item: WorkItem,
    shared: Shared,
    reference: Any,
    config: _TuneConfig,
    report: trial.Report,
    sender: HeartbeatSender | None,
) -> list[TrialRecord]:
    """Run the trials of a work item and return their records.

    Raises:
        LostLeaseError: the run has lost the lock of its folder.
    """
    write_fence.check(shared.root)  # before hours of training, not after them
    try:
        if item.first.is_baseline:
            return [baseline_trials.run(item.first, shared)]
        if item.is_stack:
            return cached_heads.run(list(item.trials), shared)
        if config["workers"]:
            where = storage.join(trial.folder_uri(shared, item.first), "ray")
            job = {"trial": item.first, "shared": reference, "sender": sender}
            return [
                launch.run_ranks(
                    run_rank,
                    job,
                    config["workers"],
                    config["cpus"],
                    config["gpus"],
                    where,
                    f"trial-{item.first.id}",
                )
            ]
        return [trial.run(item.first, shared, report=report)]
    except Exception as error:  # it is in the rows of these trials, the others go on
        write_fence.check(shared.root)
        return [
            trial.failed_record(one, shared, error)
            for one in item.trials
            if record_of_this_run(shared, one) is None
        ]


def release_memory() -> None:
    """Return freed memory to the device and to the system.

    One process runs many trials. Python would keep networks in reference cycles until its next
    collection, and glibc what each trial used.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another system's C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class GroupedASHA(TrialScheduler):
    """ASHA (Li et al. 2020) within each entry.

    Only trials of one source, target, technique and label fraction compete. A trial whose metric is
    not finite (the training diverged) is stopped from the first rung on, unless none of the others
    has a finite one.
    """

    def __init__(self, entries: dict[int, str]):
        super().__init__()
        self.entries = entries
        self.groups: dict[str, TrialScheduler] = {}
        self.with_values: set[str] = set()
        """Entries of which a trial has had a finite metric."""
        self._metric, self._mode = "signed_metric", "max"
        self._order = FIFOScheduler()

    def set_search_properties(self, metric, mode, **spec):
        return True

    def _of(self, trial) -> TrialScheduler:
        entry = self.entries[trial.config["item_index"]]
        if entry not in self.groups:
            self.groups[entry] = ASHAScheduler(
                time_attr="percent",
                metric="signed_metric",
                mode="max",
                stop_last_trials=False,
                **RUNGS,
            )
        return self.groups[entry]

    def on_trial_add(self, tune_controller, trial):
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller, trial):
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller, trial, result):
        if result.get("finished"):
            return TrialScheduler.CONTINUE
        entry = self.entries[trial.config["item_index"]]
        if math.isfinite(result["signed_metric"]):
            self.with_values.add(entry)
            return self._of(trial).on_trial_result(tune_controller, trial, result)
        is_judged = result["percent"] >= RUNGS["grace_period"] and entry in self.with_values
        return TrialScheduler.STOP if is_judged else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result):
        if not result.get("finished"):
            value = result["signed_metric"]
            ranked = value if math.isfinite(value) else math.nan  # ASHA leaves NaN out of its rungs
            last = {**result, "signed_metric": ranked}
            self._of(trial).on_trial_complete(tune_controller, trial, last)

    def on_trial_remove(self, tune_controller, trial):
        self._of(trial).on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller, **kwargs):
        return self._order.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return f"ASHA in {len(self.groups)} entries"


def build_searcher(
    name: str,
    domains: Mapping[str, tuple[float, float] | int],
    points: Sequence[Mapping[str, float]],
    seed: int,
) -> Searcher:
    """Build a searcher of Ray Tune.

    It proposes by its model as soon as it knows the value of one point.

    Args:
        name: optuna (tree-structured Parzen estimator, Bergstra et al. 2011), hyperopt (the same
            estimator, each name independently of the others) or bayesopt (Gaussian process).
        domains: For each name the ends of a range, or a number of choices, which are numbered.
        points: What it proposes first.
        seed: Seed of its random numbers.
    """
    options: dict[str, Any]
    if name == "optuna":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True)
        options = {"sampler": sampler}
    elif name == "hyperopt":
        options = {"random_state_seed": seed, "n_initial_points": 1}
    else:
        options = {"random_search_steps": 0, "skip_duplicate": False, "patience": sys.maxsize}
    out: Any = create_searcher(
        name, points_to_evaluate=[dict(point) for point in points], **options
    )
    space = {
        key: tune.choice(list(range(ends))) if isinstance(ends, int) else tune.uniform(*ends)
        for key, ends in domains.items()
    }
    out.set_search_properties(SEARCHED_METRIC, "max", space)
    if name == "bayesopt":  # its own may not propose an end of a range twice
        from bayes_opt import BayesianOptimization

        out.optimizer = BayesianOptimization(
            None, domains, random_state=seed, verbose=0, allow_duplicate_points=True
        )
    return out


class ProgressCallback(tune.Callback):
    """Shows progress, and removes a trial's bundle as soon as a better one of its entry exists."""

    def __init__(
        self,
        name: str,
        work: list[WorkItem],
        shared: Shared,
        progress: Progress,
        keep: str,
        on_end: Callable[[int], None] = lambda item_index: None,
        num_done_before: int = 0,
    ):
        self.num_done_before = num_done_before
        """Trials of the same fan-out that are done already, and are not part of the work."""
        self.name, self.work, self.shared = name, work, shared
        self.progress, self.keep, self.on_end = progress, keep, on_end
        self.total = sum(len(item.trials) for item in work)
        self.done = self.failed = self.pruned = 0
        self.began = self.last_end = time.time()
        self.best: dict[str, TrialRecord] = {}
        self.ended_items: set[int] = set()
        """Work items that have ended: Tune calls back before it changes their status."""

    def __getstate__(self):
        """Tune pickles its callbacks; this one is never restored, and a terminal has no pickle."""
        return {}

    def _line(self, trials: list[Any], final: bool = False) -> None:
        ended = self.done + self.failed + self.pruned
        running = sum(
            len(self.work[one.config["item_index"]].trials)
            for one in trials
            if one.status == "RUNNING" and one.config["item_index"] not in self.ended_items
        )
        rest = ""
        if 0 < ended < self.total:
            seconds_each = (self.last_end - self.began) / ended
            eta = seconds_each * (self.total - ended) - (time.time() - self.last_end)
            rest = f"  ETA {duration(eta)}" if eta > 0 else ""  # after that, no estimate
        pruned = f", {self.pruned} pruned" if self.pruned else ""
        num_before = self.num_done_before
        before = f", {num_before} done before" if num_before else ""
        self.progress.update(
            f"{self.name}: trials {num_before + ended}/{num_before + self.total}{before}  "
            f"{running} running, {self.failed} failed{pruned}{rest}",
            final,
        )

    def on_trial_start(self, iteration, trials, trial, **info):
        self._line(trials)

    def on_step_end(self, iteration, trials, **info):
        self._line(trials)

    def _ended(self, trials: list[Any], one: Any) -> None:
        item = self.work[one.config["item_index"]]
        self.ended_items.add(one.config["item_index"])
        self.on_end(one.config["item_index"])
        last, self.last_end = one.last_result or {}, time.time()
        if last.get("finished"):
            for line in last.get("notes", ()):
                self.progress.note(line)
            self.failed += last["failed_trials"]
            self.done += last["done_trials"] - last["failed_trials"]
            prune_bundles(self.shared.root, list(item.trials), self.keep, self.best)
        elif one.status == "ERROR":
            self.failed += len(item.trials)
        else:
            self.pruned += len(item.trials)
        self.progress.on_end(item.trials)
        self._line(trials, self.done + self.failed + self.pruned == self.total)

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._ended(trials, trial)

    def on_trial_error(self, iteration, trials, trial, **info):
        self._ended(trials, trial)


def prune_bundles(
    root: str,
    trials: list[Trial],
    keep: str,
    best: dict[str, TrialRecord],
) -> None:
    """Remove the bundles of trials that another seed of their entry beats on validation."""
    if keep != "best":
        return
    records = trial.read_records(root, folders(trials))
    for one in trials:
        record = records.get(one.id)
        if record is None or record.status != "done" or not record.rows[0].bundle_uri:
            continue
        old = best.get(one.entry)
        loser: TrialRecord | None = record
        if old is None or is_better(record, old):
            best[one.entry], loser = record, old
        uri = loser.rows[0].bundle_uri if loser is not None else None
        if loser is not None and uri and loser.trial_id != best[one.entry].trial_id:
            storage.remove_tree(uri)


def is_better(a: TrialRecord, b: TrialRecord) -> bool:
    """Return whether record a beats b on the primary validation metric.

    Of equal ones, and of records without validation rows, the one with the smaller seed is better.
    The result must not depend on the order in which trials end: two equal ones could otherwise each
    be removed for the other.
    """
    row = next((row for row in a.rows if row.is_validation), None)
    if row is None:
        return a.rows[0].seed < b.rows[0].seed

    def rank(record: TrialRecord) -> tuple[bool, float, int]:
        value = record.validation[row.metric or ""] * (1 if row.higher_is_better else -1)
        return not math.isnan(value), 0.0 if math.isnan(value) else value, -record.rows[0].seed

    return rank(a) > rank(b)


def run(
    name: str,
    trials: list[Trial],
    shared: Shared,
    spec: Fanout,
    progress: Progress,
    rerun_ids: Collection[str] = (),
    wait: bool | None = None,
) -> list[TrialRecord]:
    """Run the trials that have no record yet.

    Args:
        rerun_ids: Ids of trials that are run again although they have a record.
        wait: Whether to wait for nodes that are not there yet (`launch.cluster`).

    Returns:
        The records of all trials, in their order; that of a failed one has its error.

    Raises:
        KeyboardInterrupt: the run was stopped; finished trials keep their records.
    """
    old = trial.read_records(shared.root, folders(one for one in trials if one.id in rerun_ids))
    progress.add_trials(trials, {name: record.run for name, record in old.items()})
    lacking = unfinished_of(shared.root, [one for one in trials if one.id not in rerun_ids], spec)
    to_run = [one for one in trials if one.id in rerun_ids or one.id in lacking]
    work = group_into_work_items(to_run, shared)
    num_done_before = len(trials) - len(to_run)
    running = {one.id for one in to_run}
    progress.on_end([one for one in trials if one.id not in running])
    for workers, part in by_num_workers(work, shared).items():
        _tune(name, part, shared, spec, workers, progress, wait, num_done_before)
        num_done_before += sum(len(item.trials) for item in part)
    records = trial.read_records(shared.root, folders(trials))
    for one in trials:
        assert one.id in records, f"trial {one.id} ended without a record"
    return [records[one.id] for one in trials]


def unfinished_of(root: str, trials: list[Trial], spec: Fanout) -> set[str]:
    """Return the ids of the trials that must run (`unfinished`), read in parallel."""
    unfinished_flags = threaded_map(lambda one: unfinished(root, one, spec), trials)
    return {one.id for one, must_run in zip(trials, unfinished_flags, strict=True) if must_run}


def unfinished(root: str, one: Trial, spec: Fanout) -> bool:
    """Return whether a trial must run.

    It has no record, failed, is damaged, or was stopped early by a scheduler that the job no longer
    has.
    """
    record = trial.read_record(root, one.folder)
    if record is None or record.failed or (record.status == "pruned" and spec.scheduler != "asha"):
        return True
    return not trial.is_complete(root, one.folder, record)


def by_num_workers(work: list[WorkItem], shared: Shared) -> dict[int, list[WorkItem]]:
    """Return the work items by the number of ranks of their trials; 0: they start no ranks."""
    out: dict[int, list[WorkItem]] = defaultdict(list)
    for item in work:
        target = shared.targets[item.first.target, item.first.backbone_key]
        out[0 if item.first.is_baseline else target.spec.workers].append(item)
    return dict(sorted(out.items()))


def per_trial(spec: Fanout, nodes: launch.Nodes) -> tuple[float, float]:
    """Return the CPUs and GPUs of one trial, or of one rank of a trial."""
    cpus, gpus = spec.cpus_per_trial, spec.gpus_per_trial
    if gpus is None:
        gpus = 0.25 if any(node[1] for node in nodes) else 0.0
    if "cpus_per_trial" not in spec.model_fields_set:
        # a head node without CPUs runs no trial
        cpus = min(cpus, max((node[0] for node in nodes if node[0] > 0), default=1.0))
    return cpus, gpus


def for_pairs(
    function: Callable[..., Any],
    pairs: list[SourceTargetPair],
    shared: Shared,
    spec: Fanout,
    wait: bool | None = None,
) -> Iterator[Any]:
    """Yield what ``function(pair, shared=shared)`` returns for each pair, in order.

    Each call is a Ray task with the CPUs and GPUs of a trial. Without Ray it runs in this process.
    """
    cpus, gpus = 1.0, 0.0
    if pairs and ray.is_initialized():
        cpus, gpus = per_trial(spec, launch.cluster(wait).nodes)
    yield from map_items(partial(function, shared=shared), pairs, cpus=cpus, gpus=gpus)


def check_fits(job: Job, nodes: launch.Nodes, grows: bool = False) -> None:
    """Check that a trial of the job can run on these nodes.

    Args:
        nodes: The nodes; all that the cluster can have where it ``grows``.

    Raises:
        ClusterError: it never can.
    """
    cpus, gpus = per_trial(job.fanout, nodes)
    room = launch.capacity(nodes, cpus, gpus)
    for name, target in job.targets.items():
        needed = max(1, target.workers)
        if room < needed:
            verb = "can grow to" if grows else "has"
            ranks = f" for each of {target.workers} ranks" if target.workers else ""
            raise launch.ClusterError(
                f"targets.{name}: a trial asks for {cpus:g} CPU and {gpus:g} GPU{ranks}, the "
                f"cluster {verb} {launch.describe_nodes(nodes)}; it can "
                "never be met. Lower fanout.cpus_per_trial, fanout.gpus_per_trial or the "
                "target's workers, or join a larger cluster"
            )


def keep_keys_out_of_runtime_environments() -> None:
    """Remove AWS_* from the variables that Ray Tune copies into its actors' runtime environment.

    A runtime environment is written in clear text to logs that every user of the machine may read,
    and is shown by the dashboard. Workers do not need the copy: on a cluster that this process
    starts they inherit its environment, on one that it joins they have their node's (an instance
    role, or the environment of ``ray start``).
    """
    listed = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in listed if not name.startswith("AWS_")}


def _tune(
    name: str,
    work: list[WorkItem],
    shared: Shared,
    spec: Fanout,
    workers: int,
    progress: Progress,
    wait: bool | None = None,
    num_done_before: int = 0,
) -> None:
    """Run work items as the trials of one Ray Tune run.

    Args:
        name: What the trials are for, for the progress line.
        workers: Ranks of each trial; 0: it starts no ranks.
        wait: Whether to wait for nodes that are not there yet (`launch.cluster`).
        num_done_before: Trials of the same fan-out that are done already.
    """
    keep_keys_out_of_runtime_environments()
    shared = replace(shared, run=uuid.uuid4().hex)
    on = launch.cluster(wait)
    cpus, gpus = per_trial(spec, on.nodes)
    if on.grows:
        bundle = {"CPU": cpus, "GPU": gpus}
        launch.wait_for(
            [{resource: amount for resource, amount in bundle.items() if amount}] * max(1, workers),
            name,
            progress,
        )
    # A trial that only starts ranks asks Tune for one byte of memory. If it asked for CPU, its
    # ranks could wait for ever for the CPU that it holds.
    tune_resources: dict[str, float] = (
        {"memory": 1} if workers else {"cpu": cpus, **({"gpu": gpus} if gpus else {})}
    )
    at_once = spec.max_concurrent_trials
    if workers:  # Tune does not count the ranks: limit trials to those whose ranks fit
        most = max(1, launch.capacity(on.nodes, cpus, gpus) // workers)
        at_once = min(at_once or most, most)
    asha = (
        spec.scheduler == "asha"
        and any(item.first.stage == "search" for item in work)
        and not workers
    )
    scheduler = GroupedASHA({i: item.first.entry for i, item in enumerate(work)}) if asha else None
    scratch = tempfile.mkdtemp(prefix="onetomany-tune-")
    watchdog = Watchdog(work, spec, progress)
    try:
        callback = ProgressCallback(
            name, work, shared, progress, spec.keep_bundles, watchdog.ended, num_done_before
        )
        trainable = tune.with_parameters(
            run_work_item,
            shared_reference=[ray.put(shared)],
            work=work,
            asha=asha,
            board=watchdog.board,
            heartbeat_seconds=watchdog.look_every_seconds,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune_resources),
            param_space={
                "item_index": tune.grid_search(list(range(len(work)))),
                "threads": max(1, int(cpus)),
                "workers": workers,
                "cpus": cpus,
                "gpus": gpus,
            },
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=at_once,
                scheduler=scheduler,
                trial_name_creator=lambda one: tune_name(work, one.config["item_index"]),
            ),
            run_config=tune.RunConfig(
                name="fanout", storage_path=scratch, verbose=0, callbacks=[callback]
            ),
        )
        with watchdog:
            grid = tuner.fit()
        for result in grid:
            index = result.config["item_index"]  # type: ignore[index]
            _record_lost_trials(work[index], result, shared, watchdog.reasons.get(index))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tune_name(work: list[WorkItem], index: int) -> str:
    """Return the name of a work item in Ray's logs and dashboard."""
    item = work[index]
    others = f"+{len(item.trials) - 1}" if len(item.trials) > 1 else ""
    return f"{index}-{item.first.name}{others}"


def record_of_this_run(shared: Shared, one: Trial) -> TrialRecord | None:
    """Return the record of a trial that this very run has written, None where an older one is."""
    record = trial.read_record(shared.root, one.folder)
    return record if record is not None and record.run == shared.run else None


def _record_lost_trials(
    item: WorkItem, result: Any, shared: Shared, ended_because: str | None = None
) -> None:
    """Write records of trials that could not write their own.

    The process died, was killed by the watchdog, or was stopped by the scheduler.
    """
    for one in item.trials:
        if record_of_this_run(shared, one) is not None:
            continue
        if result.error is not None and ended_because:
            trial.failed_record(one, shared, ended_because)
        elif result.error is not None:
            lines = [line for line in str(result.error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(result.error).__name__
            message = f"the trial's process died: {reason}"[: trial.MAX_ERROR_CHARACTERS]
            trial.failed_record(one, shared, message)
        else:
            last = result.metrics or {}
            trial.failed_record(
                one,
                shared,
                "stopped early by asha",
                "pruned",
                last.get("validation"),
                trial.TrialSummary(steps=last.get("step"), seconds=last.get("seconds")),
            )
