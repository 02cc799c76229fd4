"""The one training loop: pretraining and every fine-tune, on one process or under DDP.

It runs to a step count. Losses are sums: gradients are divided by the global count after the
reduction, so that neither padding nor short or unequal batches bias them. A non-finite step is
skipped on all ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.registry import LayerOptions
from pipeline.config.schema import Train
from pipeline.core.contracts import Batch, Phase, Task, Technique, layer_rates
from pipeline.core.contracts.objective_capabilities import UpdatesAfterStep
from pipeline.core.contracts.technique_capabilities import (
    FollowsProgress,
    adds_penalty,
    gathers_rows,
    reads_gradients,
)
from pipeline.core.metrics.catalog import metric
from pipeline.core.nn.all_gather import all_reduce_sum
from pipeline.core.rng import mix
from pipeline.data.stream import LoadedBatch
from pipeline.io import heartbeat
from pipeline.train import checkpoint, optim
from pipeline.train.checkpoint import ResumePoint, TrainingState
from pipeline.train.log import LogRecord, with_numbers
from pipeline.train.ranks import Ranks

Metrics = dict[str, Any]
"""Validation metrics by name. A stack of heads (`pipeline.transfer.cached_heads`) has a list with
the metrics of each head under ``heads``.
"""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Keeper(Protocol):
    """Decides which weights are kept, by the validation metrics."""

    def update(self, step: int, metrics: Metrics, task: nn.Module) -> None: ...
    def restore(self, task: nn.Module) -> None: ...
    def start_phase(self) -> None: ...
    @property
    def is_exhausted(self) -> bool: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class KeepBest:
    """Keep the weights of the best validation, or the newest with ``keep: last``.

    A value that equals the best one is no improvement: the earlier weights are kept, and the
    validation counts towards ``patience``. Hugging Face's Trainer and Lightning do the same.

    Args:
        primary: Name of the metric that decides.
        keep: best or last.
        patience: Validations in a row without a better value after which training may stop; None:
            any number.
    """

    def __init__(self, primary: str, keep: str, patience: int | None = None):
        self.primary, self.keeps_last, self.patience = primary, keep == "last", patience
        self.higher_is_better = metric(primary).higher_is_better
        self.step, self.metrics, self.weights = -1, {}, None
        self.best, self.stale = float("nan"), 0

    def update(self, step, metrics, task):
        if self.should_keep(step, metrics) and not self.keeps_last:
            self.weights = {
                name: tensor.detach().cpu().clone() for name, tensor in task.state_dict().items()
            }

    def should_keep(self, step: int, metrics: Metrics) -> bool:
        """Record a validation, and return whether its weights should be kept."""
        value = metrics[self.primary]
        is_first = np.isnan(self.best)
        is_better = is_first or (value > self.best if self.higher_is_better else value < self.best)
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.best = value
        is_taken = is_better or self.keeps_last
        if is_taken:
            self.step, self.metrics = step, dict(metrics)
        return is_taken

    def restore(self, task):
        if self.weights is not None:
            task.load_state_dict(self.weights)

    def start_phase(self):
        """Start counting validations without a better value from 0."""
        self.stale = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether ``patience`` validations in a row brought no better value."""
        return self.patience is not None and self.stale >= self.patience

    def state_dict(self):
        names = ("step", "metrics", "weights", "best", "stale")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        # resume points written before `patience` existed have no best value
        self.best = state["metrics"].get(self.primary, float("nan"))
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class TrainingRun:
    """Everything that one training run is made of."""

    task: Task
    technique: Technique
    train: Train
    steps: int
    seed: int
    batches: Callable[[range], Iterator[LoadedBatch]]
    """The rank's batches of a range of steps (data/stream)."""
    preprocess: Callable[[Batch, bool], Batch]
    """Augments (when true) and normalises a batch on the device."""
    keeper: Keeper
    evaluate: Callable[[Any], Metrics] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    checkpoint_folder: str | None = None
    """Folder of resume points; None: the run cannot be resumed."""
    streams: dict[str, Callable[[range], Iterator[LoadedBatch]]] = field(default_factory=dict)
    """Further batches for ``Technique.penalty``, by name (``Technique.streams``)."""
    has_labels: bool = True
    """Whether the batches have labels. Without labels they are the penalty's stream "target", and
    the penalty is the whole loss.
    """
    on_log: Callable[[LogRecord], None] = lambda record: None
    on_eval: Callable[[int, Metrics], None] = lambda step, metrics: None
    on_rows: Callable[[int, np.ndarray], None] | None = None
    """Called with the row ids of every step (``train.trace_rows``)."""
    on_bad_rows: Callable[[str, list[tuple[int, str]]], None] = lambda split, bad: None
    """Called with rows that could not be decoded, and why; the split is "train" or a stream."""
    throughput_unit: str = "rows"
    """What ``count_units_of`` counts in a batch, for the throughput of the log."""
    count_units_of: Callable[[Batch], float] = len
    clock: Callable[[], float] = time.perf_counter
    on_step: Callable[[], None] = heartbeat.beat
    """Called at every step, so that a watchdog sees that the run does not hang."""
    restart_if_damaged: bool = False
    """Start again from step 0 where every resume point is damaged, instead of raising an error."""
    on_start: Callable[[int, list[str]], None] = lambda step, notes: None
    """Called before anything is logged with the step at which training starts (0, or that of the
    resume point) and a line for each damaged resume point that was skipped.
    """


@dataclass
class TrainingOutcome:
    """The result of a run; the weights are in the task."""

    steps: int
    seconds: float
    """Seconds of training, before and after the resume point."""
    rows_per_second: float
    wait_share: float
    skipped_steps: int
    curve: list[Metrics]
    """Step and metrics of each validation."""
    params_trained: int
    layers_trained: str
    resumed_from: int
    seconds_before: float = 0.0
    """Seconds of training before the resume point."""
    stopped_at: int = 0
    """The step at which training stopped early (``train.patience``); 0: it did not."""


class _PhaseState:
    """The wrapped module, the optimiser and the parameters of one phase."""

    def __init__(self, run: TrainingRun, phase: Phase):
        task, train = run.task, run.train
        layers = task.layers()
        self.task = task
        options = run.technique.options
        self.freeze_norm_stats = (
            isinstance(options, LayerOptions) and options.freeze_norm_stats
        ) or phase.lr_scale == 0
        rates = layer_rates(run.technique, layers, phase.name)
        rates = optim.apply_rates(task, layers, rates, self.freeze_norm_stats)
        # a stack of heads (`pipeline.transfer.cached_heads`) has a learning rate for each head
        own_groups = getattr(task, "groups", None)
        if own_groups is None:
            self.groups = optim.parameter_groups(task, rates, train)
        else:
            self.groups = own_groups(rates, train)
        for group in self.groups:
            group["peak"] *= phase.lr_scale
        self.params = [p for group in self.groups for p in group["params"]]
        if not self.params:
            raise ValueError(
                f"technique {run.technique.registered_name}, phase {phase.name}: nothing is "
                "left to train"
            )
        self.optimizer = optim.build_optimizer(self.groups, train)
        self.module: nn.Module = task
        if train.compile:
            self.module = torch.compile(task)  # type: ignore[assignment]
        if run.ranks.count > 1:  # for each phase: DDP does not reduce layers that are thawed later
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.statistics = [buffer for buffer in task.buffers() if buffer.is_floating_point()]
        self.backups = [buffer.clone() for buffer in self.statistics]

    def train_mode(self) -> None:
        """Put modules into training or evaluation mode, as the phase trains them."""
        optim.train_mode(self.task, freeze_norm_stats=self.freeze_norm_stats)

    @torch.no_grad()
    def restore_norm_statistics(self) -> None:
        """Undo an update that made running norm statistics NaN or infinite.

        A running average never recovers from such a value by itself.
        """
        if not self.statistics:
            return
        norms = torch.stack(torch._foreach_norm(self.statistics, 1))
        is_finite = torch.isfinite(norms).tolist()
        for finite, current, backup in zip(is_finite, self.statistics, self.backups, strict=True):
            if finite:
                backup.copy_(current)
            else:
                current.copy_(backup)

    def restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Put the optimiser into the state of a resume point.

        Raises ValueError where other code wrote it, which grouped the parameters in another way.
        """
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(group["params"]) for group in self.groups]:
            raise ValueError(
                "the resume point was written by another version of the code, which grouped the "
                "parameters in another way (learning rate, weight decay): start again with "
                "--remake changed"
            )
        self.optimizer.load_state_dict(saved)

    def set_rates(self, phase: Phase, step: int, step_in_phase: int, train: Train) -> None:
        """Set learning rate and weight decay of every group for a step."""
        if phase.factor:
            lr_factor = phase.factor(step_in_phase, phase.steps)
        else:
            lr_factor = optim.lr_factor(step_in_phase, phase.steps, train)
        for group, at_start in zip(self.optimizer.param_groups, self.groups, strict=True):
            multipliers = optim.multipliers(at_start["train"], step)
            group["lr"] = group["peak"] * lr_factor * multipliers.lr
            group["weight_decay"] = at_start["weight_decay"] * multipliers.weight_decay

    def no_sync(self, last: bool):
        """Return a context in which gradients are not reduced, except for the last micro-batch."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()


def validation_interval(train: Train, steps: int) -> int:
    """Return the number of steps between two validations of a run of ``steps``."""
    return train.eval_every_steps or max(1, steps // 5)


def autocast(train: Train, device: torch.device):
    """Return the autocast context of ``train.precision``; auto is bf16 where the GPU supports it.

    Older GPUs (V100, T4) only emulate bf16, which is slower than fp32 and less precise.

    Raises:
        ValueError: The GPU does not support bf16, which the job asks for.
    """
    is_cuda = device.type == "cuda"
    has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if train.precision == "bf16" and is_cuda and not has_bf16:
        raise ValueError("train.precision: this GPU has no bf16; use auto or fp32")
    is_bf16 = train.precision == "bf16" or (train.precision == "auto" and has_bf16)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16)


def fit(run: TrainingRun) -> TrainingOutcome:
    """Train to ``run.steps``, from the newest resume point if there is one.

    When it returns, the task has the weights that the keeper chose.

    Raises:
        NonFiniteError: ``max_bad_steps`` steps in a row were not finite; names the rows of the
            last.
        ValueError: ``micro_batch`` is set and the technique's penalty compares the rows of a whole
            batch.
    """
    train, task, ranks, device = run.train, run.task, run.ranks, run.ranks.device
    if train.micro_batch and gathers_rows(run.technique):
        raise ValueError(
            f"train.micro_batch: {run.technique.registered_name} compares the rows of a whole "
            "batch, which micro-batches would cut: leave it out"
        )
    if train.changes and train.changes[-1].step >= run.steps:
        raise ValueError(
            f"train.changes: step {train.changes[-1].step} is never reached: the training has "
            f"{run.steps} steps"
        )
    phases = run.technique.phases(run.steps)
    phase_ends = np.cumsum([p.steps for p in phases])
    phase_starts = np.concatenate([[0], phase_ends]).tolist()
    assert phase_starts[-1] == run.steps, f"phases last {phase_starts[-1]}, the run {run.steps}"

    # ---- once: device, memory format, resume point (rank 0 reads it for all)
    task.to(device)
    if train.compile:
        # trials share a process, and from the eighth compilation on dynamo would run eagerly
        torch._dynamo.reset()
    if train.channels_last:
        task.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - it takes it
    torch.manual_seed(mix(run.seed, ranks.rank, 77))
    saved, damaged = None, []
    if run.checkpoint_folder:
        saved, damaged = checkpoint.load(run.checkpoint_folder, ranks, run.restart_if_damaged)
    start = saved["step"] if saved else 0
    run.on_start(start, damaged)
    average = optim.weight_average(task, run.technique, train, run.steps)
    if saved:
        task.load_state_dict(saved["task"])
        run.keeper.load_state_dict(saved["keeper"])
        if average:
            assert saved["ema"] is not None
            average.average = {name: tensor.to(device) for name, tensor in saved["ema"].items()}
        if saved["bad_rows"]:
            run.on_bad_rows("train", list(saved["bad_rows"].items()))
    assert start < run.steps, "a run of zero steps trains nothing"

    eval_every = validation_interval(train, run.steps)
    progress = _Progress(run, saved, damaged)
    state: _PhaseState | None = None
    phase_number = -1
    stopped_at = 0
    stream = run.batches(range(start, run.steps))
    extra_streams = {name: read(range(start, run.steps)) for name, read in run.streams.items()}

    step = start
    try:
        for step in range(start, run.steps):
            # ---- a new phase: freeze, thaw, wrap, new optimiser
            if state is None or step == phase_starts[phase_number + 1]:
                phase_number = int(np.searchsorted(phase_starts, step, side="right")) - 1
                state = _PhaseState(run, phases[phase_number])
                if step == phase_starts[phase_number]:
                    run.keeper.start_phase()
                if saved and step == start:
                    if saved["phase"] == phase_number:
                        state.restore_optimizer(saved["optimizer"])
                    checkpoint.restore_rng(saved, run.seed, ranks)
            phase = phases[phase_number]
            step_in_phase = step - phase_starts[phase_number]
            state.set_rates(phase, step, step_in_phase, train)

            # ---- one step
            batch, extra_batches, waited = _next_batches(run, stream, extra_streams, progress)
            if isinstance(run.technique, FollowsProgress):
                run.technique.at_step(step, run.steps)
            sums = _backward(run, state, batch, extra_batches, progress.names)
            if reads_gradients(run.technique):
                run.technique.read_gradients(task, phase.name, step_in_phase)
            norm = _step(state, sums, ranks, train, task, progress)
            warning = None
            if isinstance(task.objective, UpdatesAfterStep):
                warning = task.objective.after_step(task.backbone, step, run.steps)
            if average:
                if average.statistics:  # one that is not finite would stay in the average
                    state.restore_norm_statistics()
                average.update(task, step)
            progress.add(batch, sums, waited, warning)
            if run.on_rows:
                run.on_rows(step, batch.rows)
            run.on_step()

            # ---- rare: log, check for trouble, validate, save
            steps_done = step + 1
            is_last = steps_done == run.steps
            logs = steps_done % train.log_every_steps == 0 or is_last
            validates = bool(run.evaluate) and (steps_done % eval_every == 0 or is_last)
            saves = progress.should_save(steps_done)
            if device.type == "cpu" or logs or validates or saves:
                state.restore_norm_statistics()
                progress.check_finite(steps_done)
            if logs:
                run.on_log(progress.record(steps_done, phase, state, norm))
            if validates:
                metrics = _evaluated(run, average, steps_done)
                state.train_mode()
                progress.add_validation(steps_done, metrics)
                run.on_eval(steps_done, metrics)
                # a technique is stopped early only in its last phase
                may_stop = train.patience is not None and phase_starts[-2] < steps_done < run.steps
                if may_stop and _agree_with_rank_zero(run.keeper.is_exhausted, ranks):
                    stopped_at = steps_done
                    break
            if saves:
                progress.save(steps_done, phase_number, state, average)
    finally:
        for opened in (stream, *extra_streams.values()):
            close = getattr(opened, "close", None)
            if close:
                close()
    if average:
        average.swap(task)
    if run.evaluate:
        run.keeper.restore(task)
    seconds = run.clock() - progress.began
    trained = _layers_trained(run, phases)
    layers, parameters = task.layers(), dict(task.named_parameters())
    return TrainingOutcome(
        steps=step + 1,
        seconds=progress.seconds_before + seconds,
        rows_per_second=ranks.count * progress.rows / max(seconds, 1e-9),
        wait_share=progress.waited / max(seconds, 1e-9),
        skipped_steps=int(progress.num_bad_steps),
        curve=progress.curve,
        params_trained=sum(parameters[name].numel() for one in trained for name in layers[one]),
        layers_trained=optim.describe_layers(layers, trained),
        resumed_from=start,
        seconds_before=progress.seconds_before,
        stopped_at=stopped_at,
    )


def _next_batches(
    run: TrainingRun,
    stream: Iterator[LoadedBatch],
    extra_streams: Mapping[str, Iterator[LoadedBatch]],
    progress: _Progress,
) -> tuple[Batch, dict[str, Batch], float]:
    """Return the next batch of each stream and the seconds waited; report rows not decoded."""
    batch, bad, waited = next(stream)
    if bad:
        progress.bad_rows.update(bad)
        run.on_bad_rows("train", bad)
    extra_batches: dict[str, Batch] = {}
    for name, extra_stream in extra_streams.items():
        loaded = next(extra_stream)
        extra_batches[name] = loaded.batch
        waited += loaded.wait_seconds
        if loaded.bad:
            run.on_bad_rows(name, loaded.bad)
    return batch, extra_batches, waited


class _Progress:
    """Progress of a run, and its sums since the last log line."""

    def __init__(self, run: TrainingRun, saved: ResumePoint | None, damaged: list[str]):
        device = run.ranks.device
        slow_average = optim.describe_slow_average(run.train, run.steps)
        self.run, self.warning = run, ""
        self.start_warnings = [*damaged, *([slow_average] if slow_average else [])]
        self.start = saved["step"] if saved else 0
        self.curve = saved["curve"] if saved else []
        self.bad_rows = dict(saved["bad_rows"]) if saved else {}
        self.seconds_before = saved["seconds"] if saved else 0.0
        self.names = ("loss", "count", *run.task.objective.log_names)
        self.window = torch.zeros(len(self.names), device=device)
        self.bad_steps_in_a_row = torch.zeros((), device=device)
        self.num_bad_steps = torch.full((), float(saved["skipped"] if saved else 0), device=device)
        self.recent: deque[np.ndarray] = deque(maxlen=run.train.max_bad_steps)
        self.rows = self.rows_logged = 0
        self.units = self.units_logged = 0.0
        self.waited = self.waited_logged = 0.0
        self.began = self.logged_at = self.saved_at = run.clock()

    def add(self, batch: Batch, sums: Tensor, waited: float, warning: str | None) -> None:
        """Count a step."""
        self.recent.append(batch.rows)
        self.rows += len(batch)
        self.units += self.run.count_units_of(batch)
        self.waited += waited
        self.window += sums
        self.warning = warning or self.warning

    def check_finite(self, steps_done: int) -> None:
        """Raise NonFiniteError after too many non-finite steps in a row."""
        train, rank = self.run.train, self.run.ranks.rank
        if int(self.bad_steps_in_a_row) < train.max_bad_steps:
            return
        rows = np.concatenate(list(self.recent))[:50].tolist()
        raise NonFiniteError(
            f"loss or gradient was not finite in {int(self.bad_steps_in_a_row)} steps in a row up "
            f"to step {steps_done}; lower train.lr, check the inputs. Row ids of the last batches "
            f"(rank {rank}): {rows}"
        )

    def record(self, steps_done: int, phase: Phase, state: _PhaseState, norm: Tensor) -> LogRecord:
        """Return the log record of the steps since the last one."""
        run, now = self.run, self.run.clock()
        seconds = max(now - self.logged_at, 1e-9)
        sums = dict(zip(self.names, self.window.tolist(), strict=True))
        count = sums.pop("count")
        record: LogRecord = {
            "step": steps_done,
            "steps": run.steps,
            "phase": phase.name,
            "lr": state.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "rows_per_second": run.ranks.count * (self.rows - self.rows_logged) / seconds,
            "wait_share": (self.waited - self.waited_logged) / seconds,
            "skipped_steps": int(self.num_bad_steps),
            "eta_seconds": (now - self.began)
            / (steps_done - self.start)
            * (run.steps - steps_done),
        }
        if run.throughput_unit != "rows":
            rate = run.ranks.count * (self.units - self.units_logged) / seconds
            record["unit"], record["units_per_second"] = run.throughput_unit, rate
        if self.start:
            record["resumed_from"] = self.start
        means = {name: value / count if count else float("nan") for name, value in sums.items()}
        record = with_numbers(record, means)
        warnings = [*self.start_warnings, *([self.warning] if self.warning else [])]
        if warnings:
            record["warning"] = "; ".join(warnings)
        self.window.zero_()
        self.logged_at, self.rows_logged, self.waited_logged = now, self.rows, self.waited
        self.units_logged = self.units
        return record

    def add_validation(self, steps_done: int, metrics: Metrics) -> None:
        """Add a validation to the curve.

        After a resume, points of steps that are repeated are dropped first.
        """
        self.curve = [point for point in self.curve if point["step"] < steps_done]
        self.curve.append({"step": steps_done, **metrics})

    def should_save(self, steps_done: int) -> bool:
        """Whether a resume point is written after this step, the same on every rank."""
        run, train = self.run, self.run.train
        if not run.checkpoint_folder or steps_done == run.steps:
            return False
        if steps_done % (train.checkpoint_every_steps or 1000) == 0:
            return True
        minutes = train.checkpoint_every_minutes
        # all ranks must take the same decision, which costs a broadcast
        ask_every = 1 if run.ranks.count == 1 else min(10, train.log_every_steps)
        if minutes is None or steps_done % ask_every:
            return False
        return _agree_with_rank_zero(run.clock() - self.saved_at >= 60 * minutes, run.ranks)

    def save(
        self,
        steps_done: int,
        phase: int,
        phase_state: _PhaseState,
        average: optim.WeightAverage | None,
    ) -> None:
        """Write a resume point."""
        run = self.run
        assert run.checkpoint_folder is not None
        state: TrainingState = {
            "step": steps_done,
            "phase": phase,
            "task": run.task.state_dict(),
            "optimizer": phase_state.optimizer.state_dict(),
            "ema": average.average if average else None,
            "keeper": run.keeper.state_dict(),
            "curve": self.curve,
            "skipped": int(self.num_bad_steps),
            "seconds": self.seconds_before + run.clock() - self.began,
        }
        checkpoint.save(run.checkpoint_folder, run.ranks, state, self.bad_rows)
        self.saved_at = run.clock()


def _backward(
    run: TrainingRun,
    state: _PhaseState,
    batch: Batch,
    extra_batches: dict[str, Batch],
    names: tuple[str, ...],
) -> Tensor:
    """Run forward and backward on each micro-batch; the last one reduces gradients over ranks.

    The extra batches are cut into as many parts as ``batch``. Where a part or one of its extra
    parts is empty there is no penalty: the mean of no rows is NaN. A penalty that gathers rows of
    all ranks is computed even then, because the other ranks wait for this one.

    Returns:
        (len(names),) sums over all ranks: losses, number of losses, then what the objective logs.
    """
    train, device = run.train, run.ranks.device
    sums = torch.zeros(len(names), device=device)
    zero = sums.new_zeros(())
    gathers = gathers_rows(run.technique)
    parts = batch.split(train.micro_batch)
    extra_parts = {name: extra.parts(len(parts)) for name, extra in extra_batches.items()}
    for number, part in enumerate(parts, 1):
        part = run.preprocess(part.to(device), train.augment)
        streams = {
            name: run.preprocess(parts_of_stream[number - 1].to(device), train.augment)
            for name, parts_of_stream in extra_parts.items()
        }
        with state.no_sync(number == len(parts)), autocast(train, device):
            if run.has_labels:
                total, count, logs = state.module(part)
            else:
                total, count, logs = state.module(part.empty())
                count, streams = count + len(part), {**streams, "target": part}
            has_rows = all(map(len, (part, *streams.values())))
            penalty = None
            if adds_penalty(run.technique) and (gathers or has_rows):
                penalty = run.technique.penalty(run.task, part, streams)
            # the sum over ranks is divided by the count of all of them
            weight = all_reduce_sum(count) if gathers else count
            objective = total if penalty is None else total + penalty * weight
            objective.backward()
            # without labels the penalty is the loss
            total = total if run.has_labels else objective
        logged = (logs.get(name, zero).float() for name in names[2:])
        sums += torch.stack([total.detach().float(), count.float(), *logged])
    if run.ranks.count > 1:
        dist.all_reduce(sums)
    return sums


def _agree_with_rank_zero(value: bool, ranks: Ranks) -> bool:
    """Return rank 0's value on every rank.

    Clocks differ, and so may the last bit of a metric, while all ranks must take part in a resume
    point and take the same steps.
    """
    if ranks.count == 1:
        return value
    agreed = torch.tensor([int(value)], device=ranks.device)
    dist.broadcast(agreed, src=0)
    return bool(agreed.item())


def evaluate_untrained(run: TrainingRun) -> TrainingOutcome:
    """Validate the task once, without training."""
    run.task.to(run.ranks.device)
    run.on_start(0, [])
    began, curve = run.clock(), []
    if run.evaluate:
        curve = [{"step": 0, **_evaluated(run, None, 0)}]
        run.on_eval(0, {name: value for name, value in curve[0].items() if name != "step"})
    return TrainingOutcome(
        steps=0,
        seconds=run.clock() - began,
        rows_per_second=0.0,
        wait_share=0.0,
        skipped_steps=0,
        curve=curve,
        params_trained=0,
        layers_trained="none",
        resumed_from=0,
    )


def _layers_trained(run: TrainingRun, phases: tuple[Phase, ...]) -> set[str]:
    """Return the layers that are trained in any phase."""
    layers = run.task.layers()
    return {
        layer
        for phase in phases
        for layer, rate in layer_rates(run.technique, layers, phase.name).items()
        if rate > 0 and phase.lr_scale > 0
    }


@torch.no_grad()
def _step(
    state: _PhaseState,
    sums: Tensor,
    ranks: Ranks,
    train: Train,
    task: Task,
    progress: _Progress,
) -> Tensor:
    """Divide gradients by the global count, clip, and step unless something is not finite.

    Nothing here waits for the device. The sums of a step that is not finite become 0.

    Returns:
        The norm of the gradients, ().
    """
    loss_sum, loss_count = sums[0], sums[1]
    to_mean = ranks.count / loss_count.clamp(min=1e-12)  # DDP has divided by the ranks
    # a stack of heads (`pipeline.transfer.cached_heads`) clips the gradients of each head
    clip = getattr(task, "clip_gradients", None)
    if clip is not None:
        norm, finite = clip(train.clip_norm, to_mean)
        coefficient = torch.ones_like(to_mean)
    else:
        norm = optim.global_norm(state.params).to(sums.device) * to_mean
        coefficient = torch.ones_like(norm)
        if train.clip_norm:
            coefficient = (train.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        finite = torch.isfinite(norm) & torch.isfinite(loss_sum)
    # fused optimisers of torch take the divisor and the skip flag as tensors, as GradScaler passes
    # them
    state.optimizer.grad_scale = 1.0 / (to_mean * coefficient)  # type: ignore[attr-defined]
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=clip is None)
    in_a_row = progress.bad_steps_in_a_row
    in_a_row.copy_(torch.where(finite, 0.0, in_a_row + 1))
    progress.num_bad_steps.add_((~finite).float())
    sums.copy_(torch.where(finite, sums, 0.0))
    return norm


def _evaluated(run: TrainingRun, average: optim.WeightAverage | None, step: int) -> Metrics:
    """Return validation metrics of the current (averaged) weights, the same on every rank."""
    assert run.evaluate is not None
    if average:
        average.swap(run.task)
    if run.ranks.count > 1:  # norm statistics are rank 0's, as DDP makes them at the next forward
        for buffer in run.task.buffers():
            dist.broadcast(buffer, 0)
    metrics = run.evaluate(run.task)
    # before the average begins (SWA), the weights are not what the technique returns
    if average is None or average.has_begun(step - 1) or step == run.steps:
        run.keeper.update(step, metrics, run.task)
    if average:
        average.swap(run.task)
    return metrics
