"""Fan-out: many trials at once on Ray Tune. The one place that runs Ray Tune.

Trials are grouped into units: one trial, or all trials of one frozen backbone on one target, whose
heads train together. A unit writes each trial's record when it ends, so an interrupted fan-out
continues with the trials that have none.
"""

from __future__ import annotations

import ctypes
import gc
import math
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
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

from pipeline.config.schema import Fanout, Job
from pipeline.core.metrics.catalog import metric
from pipeline.data.stream import map_items
from pipeline.io import checksums, heartbeat, storage, write_fence
from pipeline.io.threads import threaded_map
from pipeline.report.shift import Shift
from pipeline.report.source_scores import PairScores
from pipeline.report.trial_record import TrialRecord
from pipeline.train import launch
from pipeline.train.progress import Progress, duration
from pipeline.train.ranks import Ranks
from pipeline.transfer import baseline_trials, cached_heads, trial
from pipeline.transfer.grid import SCRATCH, Trial, folders
from pipeline.transfer.pulses import Pulses
from pipeline.transfer.scoring import Pair, score_pair, shift_of_test
from pipeline.transfer.trial import Shared

RUNGS = {"grace_period": 20, "reduction_factor": 2, "max_t": 100}
"""ASHA halves the trials of an entry at 20, 40 and 80 percent of their steps, however often they
validate.
"""
UNIT_TRIALS = 64
"""Heads trained together at most: more units keep more workers busy."""


@dataclass(frozen=True)
class Pulse:
    """Sends heartbeats of the process of a unit."""

    pulses: Any
    actor_id: str
    unit: int
    every_seconds: float

    def listener(self) -> Callable[[], None]:
        """For `heartbeat.listening`: send some of the beats on, without waiting."""
        last_beat = float("-inf")

        def heard() -> None:
            nonlocal last_beat
            if time.monotonic() - last_beat > self.every_seconds:
                last_beat = time.monotonic()
                self.pulses.beat.remote(self.actor_id, self.unit)

        return heard


def _begin(pulses: Any, unit: int, every_seconds: float, waits_for_ranks: bool) -> Pulse:
    """Register this process as the one that runs a unit."""
    context = ray.get_runtime_context()
    pulse = Pulse(pulses, str(context.get_actor_id()), unit, every_seconds)
    # pickled: a handle would make the actor of `Pulses` import Ray Tune, and torch with it
    actor = cloudpickle.dumps(context.current_actor)
    pulses.begin.remote(pulse.actor_id, actor, unit, waits_for_ranks)
    return pulse


class Watchdog:
    """Kills the processes of trials that hang or take too long.

    It runs outside of them, since a process that hangs in C code does not react to anything.
    """

    def __init__(self, work: list[Unit], spec: Fanout, progress: Progress):
        minutes = spec.silence_timeout_minutes
        self.silence = None if minutes is None else 60 * minutes
        limit = spec.trial_timeout_minutes
        # heads that train together share the time that each of them alone would have
        self.limits: dict[int, float] = {}
        if limit is not None:
            self.limits = {i: 60 * limit * len(unit.trials) for i, unit in enumerate(work)}
        self.work, self.spec, self.progress = work, spec, progress
        self.reasons: dict[int, str] = {}
        waits = [*self.limits.values(), *([self.silence] if self.silence is not None else [])]
        self.look_every_seconds = min([5.0, *(seconds / 5 for seconds in waits)])
        self.pulses = launch.start_actor(Pulses)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.silence is not None or self.limits:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        with suppress(RayError):
            ray.kill(self.pulses)  # pyright: ignore[reportArgumentType] - Ray's stub of actors

    def ended(self, unit: int) -> None:
        self.pulses.end.remote(unit)

    def _watch(self) -> None:
        while not self._ended.wait(self.look_every_seconds):
            try:
                found = ray.get(self.pulses.overdue.remote(self.silence, self.limits), timeout=30)
            except (RayError, GetTimeoutError):
                continue
            for unit, actor, why in found:
                reason = self._reason(unit, why)
                self.reasons[unit] = reason
                self.progress.note(f"warning: {self._name(unit)}: {reason}")
                with suppress(RayError, ValueError):
                    ray.kill(cloudpickle.loads(actor), no_restart=True)

    def _reason(self, unit: int, why: str) -> str:
        if why == "time":
            together = (
                f" for each of {len(self.work[unit].trials)} heads"
                if self.work[unit].together
                else ""
            )
            return (
                f"ran longer than {self.spec.trial_timeout_minutes:g} minutes{together} "
                "(fanout.trial_timeout_minutes), and its process was ended"
            )
        return (
            f"took no step and read no batch for {self.spec.silence_timeout_minutes:g} minutes "
            "(fanout.silence_timeout_minutes), and its process was ended"
        )

    def _name(self, unit: int) -> str:
        first = self.work[unit].first
        others = (
            f" and {len(self.work[unit].trials) - 1} more"
            if len(self.work[unit].trials) > 1
            else ""
        )
        return f"trial {first.name}{others}"


@dataclass(frozen=True)
class Unit:
    """What one Tune trial runs."""

    trials: tuple[Trial, ...]
    together: bool

    @property
    def first(self) -> Trial:
        return self.trials[0]


def units(trials: list[Trial], shared: Shared) -> list[Unit]:
    """Group trials into units: heads on one frozen backbone together, all other trials alone.

    Random backbones differ by seed, so their heads are grouped by seed. Single trials come first,
    since they take longest.
    """
    frozen: dict[tuple, list[Trial]] = defaultdict(list)
    single: list[Unit] = []
    for one in trials:
        if one.is_baseline:
            single.append(Unit((one,), False))
        elif one.technique_object.frozen and shared.targets[one.target, one.backbone_key].in_memory:
            weights = one.seed if one.source == SCRATCH else None
            technique = (str(one.technique), str(one.technique_object.options))
            key = (one.source, weights, one.backbone_key, one.target, technique, one.stage)
            frozen[key].append(one)
        else:
            single.append(Unit((one,), False))
    groups = [
        Unit(tuple(g[i : i + UNIT_TRIALS]), cached_heads.can_stack(g, shared))
        for g in frozen.values()
        for i in range(0, len(g), UNIT_TRIALS)
    ]
    split = [Unit((one,), False) for unit in groups if not unit.together for one in unit.trials]
    return single + [unit for unit in groups if unit.together] + split


class _UnitConfig(TypedDict):
    """Config of one Ray Tune trial, which runs one unit.

    The unit's number, and the resources of each of our trials in it.
    """

    unit: int
    threads: int
    workers: int
    """Ranks of a trial; 0: it runs in the process of the unit."""
    cpus: float
    """CPUs of each rank."""
    gpus: float
    """GPUs of each rank."""


def _run_unit(
    config: _UnitConfig,
    held: list[Any],
    work: list[Unit],
    asha: bool,
    pulses: Any = None,
    pulse_seconds: float = 60.0,
) -> None:
    """Run a unit as one Tune trial. An error goes into the trials' records and stops nothing else.

    Args:
        held: A list with the reference of what all trials share.
        work: All units, by number.
        asha: Whether validations are reported to the scheduler.
        pulses: The `Pulses` that gets heartbeats; None: no watchdog.
    """
    pulse = None
    if pulses is not None:
        pulse = _begin(pulses, config["unit"], pulse_seconds, config["workers"] > 0)
    shared: Shared = launch.get_shared(held[0])
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    gc.collect()  # a trial stopped by ASHA left its network in a traceback, which is free only now
    # Keep what exists before the first network (modules, shared data) out of all later collections,
    # which are faster then. Once only: what is frozen is never freed, so no network may be in it.
    if not gc.get_freeze_count():
        gc.freeze()
    unit = work[config["unit"]]
    torch.set_num_threads(config["threads"])
    started = time.time()

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        name = shared.targets[unit.first.target, unit.first.backbone_key].metrics[0]
        sign = 1.0 if metric(name).higher_is_better else -1.0
        tune.report(
            {
                "goodness": sign * metrics[name],
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
            heartbeat.listening(pulse.listener() if pulse else lambda: None),
        ):
            records = _records(
                unit,
                shared,
                held[0],
                config,
                report if asha else lambda step, steps, metrics: None,
                pulse,
            )
    finally:
        release_memory()
    failed = sum(record.failed for record in records)
    tune.report(
        {
            "goodness": 0.0,
            "done_trials": len(unit.trials),
            "failed_trials": failed,
            "finished": True,
            **({"notes": notes} if notes else {}),
        }
    )


def _rank_of_trial(config: dict[str, Any], ranks: Ranks) -> TrialRecord:
    """One rank of a trial under Ray Train."""
    pulse: Pulse | None = config["pulse"]
    with heartbeat.listening(pulse.listener() if pulse else lambda: None):
        heartbeat.beat()  # the rank is placed; from here on silence counts
        return trial.run(config["trial"], config["shared"], ranks)


def _records(
    unit: Unit,
    shared: Shared,
    reference: Any,
    config: _UnitConfig,
    report: trial.Report,
    pulse: Pulse | None,
) -> list[TrialRecord]:
    """Run a unit's trials and return their records.

    Raises:
        LostLeaseError: the run has lost the lock of its folder.
    """
    write_fence.check(shared.root)  # before hours of training, not after them
    try:
        if unit.first.is_baseline:
            return [baseline_trials.run(unit.first, shared)]
        if unit.together:
            return cached_heads.run(list(unit.trials), shared)
        if config["workers"]:
            where = storage.join(trial.folder(shared, unit.first), "ray")
            job = {"trial": unit.first, "shared": reference, "pulse": pulse}
            return [
                launch.run_ranks(
                    _rank_of_trial,
                    job,
                    config["workers"],
                    config["cpus"],
                    config["gpus"],
                    where,
                    f"trial-{unit.first.id}",
                )
            ]
        return [trial.run(unit.first, shared, report=report)]
    except Exception as error:  # it is in the rows of these trials, the others go on
        write_fence.check(shared.root)
        return [
            trial.failed_record(one, shared, error)
            for one in unit.trials
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

    Only trials of one source, target, technique and label fraction compete.
    """

    def __init__(self, entries: dict[int, str]):
        super().__init__()
        self.entries = entries
        self.groups: dict[str, TrialScheduler] = {}
        self._metric, self._mode = "goodness", "max"
        self._order = FIFOScheduler()

    def set_search_properties(self, metric, mode, **spec):
        return True

    def _of(self, trial) -> TrialScheduler:
        entry = self.entries[trial.config["unit"]]
        if entry not in self.groups:
            self.groups[entry] = ASHAScheduler(
                time_attr="percent", metric="goodness", mode="max", stop_last_trials=False, **RUNGS
            )
        return self.groups[entry]

    def on_trial_add(self, tune_controller, trial):
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller, trial):
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller, trial, result):
        if result.get("finished"):
            return TrialScheduler.CONTINUE
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller, trial, result):
        if not result.get("finished"):
            self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller, trial):
        self._of(trial).on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller, **kwargs):
        return self._order.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return f"ASHA in {len(self.groups)} entries"


class ProgressCallback(tune.Callback):
    """Shows progress, and removes a trial's bundle as soon as a better one of its entry exists."""

    def __init__(
        self,
        name: str,
        work: list[Unit],
        shared: Shared,
        progress: Progress,
        keep: str,
        on_end: Callable[[int], None] = lambda unit: None,
        before: int = 0,
    ):
        self.before = before
        """Trials of the same fan-out that are done already, and are not part of the work."""
        self.name, self.work, self.shared = name, work, shared
        self.progress, self.keep, self.on_end = progress, keep, on_end
        self.total = sum(len(unit.trials) for unit in work)
        self.done = self.failed = self.pruned = 0
        self.began = self.last_end = time.time()
        self.best: dict[str, TrialRecord] = {}
        self.ended_units: set[int] = set()
        """Units that have ended: Tune calls back before it changes their status from RUNNING."""

    def __getstate__(self):
        """Tune pickles its callbacks; this one is never restored, and a terminal has no pickle."""
        return {}

    def _line(self, trials: list[Any], final: bool = False) -> None:
        ended = self.done + self.failed + self.pruned
        running = sum(
            len(self.work[one.config["unit"]].trials)
            for one in trials
            if one.status == "RUNNING" and one.config["unit"] not in self.ended_units
        )
        rest = ""
        if 0 < ended < self.total:
            seconds_each = (self.last_end - self.began) / ended
            eta = seconds_each * (self.total - ended) - (time.time() - self.last_end)
            rest = f"  ETA {duration(eta)}" if eta > 0 else ""  # after that, no estimate
        pruned = f", {self.pruned} pruned" if self.pruned else ""
        before = f", {self.before} done before" if self.before else ""
        self.progress.update(
            f"{self.name}: trials {self.before + ended}/{self.before + self.total}{before}  "
            f"{running} running, {self.failed} "
            f"failed{pruned}{rest}",
            final,
        )

    def on_trial_start(self, iteration, trials, trial, **info):
        self._line(trials)

    def on_step_end(self, iteration, trials, **info):
        self._line(trials)

    def _ended(self, trials: list[Any], one: Any) -> None:
        unit = self.work[one.config["unit"]]
        self.ended_units.add(one.config["unit"])
        self.on_end(one.config["unit"])
        last, self.last_end = one.last_result or {}, time.time()
        if last.get("finished"):
            for line in last.get("notes", ()):
                self.progress.note(line)
            self.failed += last["failed_trials"]
            self.done += last["done_trials"] - last["failed_trials"]
            prune_bundles(self.shared.root, list(unit.trials), self.keep, self.best)
        elif one.status == "ERROR":
            self.failed += len(unit.trials)
        else:
            self.pruned += len(unit.trials)
        self.progress.on_end(unit.trials)
        self._line(trials, self.done + self.failed + self.pruned == self.total)

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._ended(trials, trial)

    def on_trial_error(self, iteration, trials, trial, **info):
        self._ended(trials, trial)


def prune_bundles(root: str, trials: list[Trial], keep: str, best: dict[str, TrialRecord]) -> None:
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
        if old is None or _is_better(record, old):
            best[one.entry], loser = record, old
        uri = loser.rows[0].bundle_uri if loser is not None else None
        if loser is not None and uri and loser.trial_id != best[one.entry].trial_id:
            storage.remove_tree(uri)


def _is_better(a: TrialRecord, b: TrialRecord) -> bool:
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
    anew: Collection[str] = (),
    wait: bool | None = None,
) -> list[TrialRecord]:
    """Run the trials that have no record yet.

    Args:
        anew: Ids of trials that are run again although they have a record.
        wait: Whether to wait for nodes that are not there yet (`launch.cluster`).

    Returns:
        The records of all trials, in their order; that of a failed one has its error.

    Raises:
        KeyboardInterrupt: the run was stopped; finished trials keep their records.
    """
    old = trial.read_records(shared.root, folders(one for one in trials if one.id in anew))
    progress.add_trials(trials, {name: record.run for name, record in old.items()})
    lacking = unfinished_of(shared.root, [one for one in trials if one.id not in anew], spec)
    todo = [one for one in trials if one.id in anew or one.id in lacking]
    work = units(todo, shared)
    before = len(trials) - len(todo)
    running = {one.id for one in todo}
    progress.on_end([one for one in trials if one.id not in running])
    for workers, part in units_by_workers(work, shared).items():
        _tune(name, part, shared, spec, workers, progress, wait, before)
        before += sum(len(unit.trials) for unit in part)
    records = trial.read_records(shared.root, folders(trials))
    for one in trials:
        assert one.id in records, f"trial {one.id} ended without a record"
    return [records[one.id] for one in trials]


def unfinished_of(root: str, trials: list[Trial], spec: Fanout) -> set[str]:
    """Ids of the trials that must run (`unfinished`), read in parallel."""
    found = list(threaded_map(lambda one: unfinished(root, one, spec), trials))
    return {one.id for one, is_unfinished in zip(trials, found, strict=True) if is_unfinished}


def unfinished(root: str, one: Trial, spec: Fanout) -> bool:
    """Whether a trial must run: it has no record, failed, is damaged, or was stopped early by a
    scheduler that the job no longer has.
    """
    record = trial.read_record(root, one.folder)
    if record is None or record.failed or (record.status == "pruned" and spec.scheduler != "asha"):
        return True
    return not trial.is_complete(root, one.folder, record)


def units_by_workers(work: list[Unit], shared: Shared) -> dict[int, list[Unit]]:
    out: dict[int, list[Unit]] = defaultdict(list)
    for unit in work:
        target = shared.targets[unit.first.target, unit.first.backbone_key]
        out[0 if unit.first.is_baseline else target.spec.workers].append(unit)
    return dict(sorted(out.items()))


def per_trial(spec: Fanout, have: launch.Nodes) -> tuple[float, float]:
    """CPUs and GPUs of one trial, or of one rank of a trial."""
    gpus = sum(node[1] for node in have)
    cpus, share = spec.cpus_per_trial, spec.gpus_per_trial
    if share is None:
        share = 0.25 if gpus else 0.0
    if "cpus_per_trial" not in spec.model_fields_set:
        # a head node without CPUs runs no trial
        cpus = min(cpus, max((node[0] for node in have if node[0] > 0), default=1.0))
    return cpus, share


def score_pairs(
    pairs: list[Pair], shared: Shared, spec: Fanout, wait: bool | None = None
) -> Iterator[PairScores]:
    """Yield the scores of each pair, in order."""
    yield from _of_pairs(partial(score_pair, shared=shared), pairs, spec, wait)


def shifts_of_test(
    pairs: list[Pair], shared: Shared, spec: Fanout, wait: bool | None = None
) -> Iterator[Shift]:
    """Yield for each pair the shift of the target's test rows, in order."""
    yield from _of_pairs(partial(shift_of_test, shared=shared), pairs, spec, wait)


def _of_pairs(
    function: Callable[[Pair], Any], pairs: list[Pair], spec: Fanout, wait: bool | None
) -> Iterator[Any]:
    """Yield what a function returns for each pair, as Ray tasks that each have what a trial has.

    Without Ray it runs in this process.
    """
    cpus, gpus = 1.0, 0.0
    if pairs and ray.is_initialized():
        cpus, gpus = per_trial(spec, launch.cluster(wait).nodes)
    yield from map_items(function, pairs, cpus=cpus, gpus=gpus)


def check_fits(job: Job, have: launch.Nodes, grows: bool = False) -> None:
    """Check that a trial of the job can run on these nodes.

    Args:
        have: The nodes; all that the cluster can have where it ``grows``.

    Raises:
        ClusterError: it never can.
    """
    cpus, gpus = per_trial(job.fanout, have)
    room = launch.capacity(have, cpus, gpus)
    for name, target in job.targets.items():
        needed = max(1, target.workers)
        if room < needed:
            verb = "can grow to" if grows else "has"
            ranks = f" for each of {target.workers} ranks" if target.workers else ""
            raise launch.ClusterError(
                f"targets.{name}: a trial asks for {cpus:g} CPU and {gpus:g} GPU{ranks}, the "
                f"cluster {verb} {launch.describe_nodes(have)}; it can "
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
    work: list[Unit],
    shared: Shared,
    spec: Fanout,
    workers: int,
    progress: Progress,
    wait: bool | None = None,
    before: int = 0,
) -> None:
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
        and any(unit.first.stage == "search" for unit in work)
        and not workers
    )
    scheduler = GroupedASHA({i: unit.first.entry for i, unit in enumerate(work)}) if asha else None
    scratch = tempfile.mkdtemp(prefix="onetomany-tune-")
    watchdog = Watchdog(work, spec, progress)
    try:
        show = ProgressCallback(
            name, work, shared, progress, spec.keep_bundles, watchdog.ended, before
        )
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(
                    _run_unit,
                    held=[launch.put_shared(shared)],
                    work=work,
                    asha=asha,
                    pulses=watchdog.pulses,
                    pulse_seconds=watchdog.look_every_seconds,
                ),
                tune_resources,
            ),
            param_space={
                "unit": tune.grid_search(list(range(len(work)))),
                "threads": max(1, int(cpus)),
                "workers": workers,
                "cpus": cpus,
                "gpus": gpus,
            },
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=at_once,
                scheduler=scheduler,
                trial_name_creator=lambda one: _tune_name(work, one.config["unit"]),
            ),
            run_config=tune.RunConfig(
                name="fanout", storage_path=scratch, verbose=0, callbacks=[show]
            ),
        )
        with watchdog:
            grid = tuner.fit()
        for result in grid:
            number = result.config["unit"]  # type: ignore[index]
            _record_lost_trials(work[number], result, shared, watchdog.reasons.get(number))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tune_name(work: list[Unit], number: int) -> str:
    """Return the name of a unit in Ray's logs and dashboard."""
    unit = work[number]
    others = f"+{len(unit.trials) - 1}" if len(unit.trials) > 1 else ""
    return f"{number}-{unit.first.name}{others}"


def record_of_this_run(shared: Shared, one: Trial) -> TrialRecord | None:
    """Return the record of a trial that this very run has written, None where an older one is."""
    record = trial.read_record(shared.root, one.folder)
    return record if record is not None and record.run == shared.run else None


def _record_lost_trials(
    unit: Unit, result: Any, shared: Shared, ended_because: str | None = None
) -> None:
    """Write records of trials that could not write their own.

    The process died, was killed by the watchdog, or was stopped by the scheduler.
    """
    for one in unit.trials:
        if record_of_this_run(shared, one) is not None:
            continue
        if result.error is not None and ended_because:
            trial.failed_record(one, shared, ended_because)
        elif result.error is not None:
            lines = [line for line in str(result.error).splitlines() if line.strip()]
            trial.failed_record(
                one,
                shared,
                f"the trial's process died: {lines[-1] if lines else type(result.error).__name__}"[
                    :2000
                ],
            )
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
