"""One training run of a source or of a trial, assembled the same way for both.

`run` reads downward: the technique, the validation, the log, the loop, the technique's end. Sources
and trials differ in the weights that a task starts with, in how its rows are read, and in what is
written at the end; this stays with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch

from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Train
from pipeline.core.capabilities import measures_throughput
from pipeline.core.contracts import Batch, Task, Technique, trains
from pipeline.core.contracts.objective_capabilities import couples_rows
from pipeline.core.contracts.technique_capabilities import (
    ChoosesOnValidation,
    prepares_on_target,
)
from pipeline.core.metrics.catalog import metric
from pipeline.core.rng import mix
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.manifests import LeftOut
from pipeline.data.plan import Plan
from pipeline.data.stream import LoadedBatch, Rows, check_bad_row_budget, train_batches
from pipeline.io import heartbeat, storage
from pipeline.train import evaluate, loop, resume_history, streams
from pipeline.train.log import LogRecord, MetricsLog, RowTrace, with_numbers
from pipeline.train.loop import TrainingOutcome
from pipeline.train.ranks import Ranks


@dataclass(frozen=True)
class Experiment:
    """Everything that one training run is made of; the same on every rank."""

    task: Task
    """Backbone and objective with the weights that training starts from."""
    technique: Technique
    technique_seed: int
    """Seed of the random numbers with which the technique initialises what it adds."""
    train: Train
    steps: int
    seed: int
    """Seed of the random numbers that are drawn in training."""
    rows: Rows
    """The training rows of all ranks."""
    plan: Plan
    """The order in which the training rows are read."""
    validation: Rows
    """The validation rows of all ranks; where there are none, the last weights are kept."""
    metrics: tuple[str, ...]
    """Metrics of the validation rows; the first one decides which weights are kept."""
    eval_batch: int
    """Rows of a validation batch."""
    max_bad_rows: float
    """Share of a split's rows that may be bad before the run stops."""
    folder: str
    """Where resume points (``checkpoints/``) and traces of rows are written."""
    log_folder: str
    num_left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of rows of each split that were left out before; they count against the same
    budget.
    """
    split_rows: int | None = None
    """Number of training rows that ``max_bad_rows`` is a share of, where the run is trained on a
    part of them (few labels); None: all of ``rows``.
    """
    left_out: Sequence[LeftOut] = ()
    """The rows that were left out before, of all splits, for ``quarantine.jsonl``."""
    read: Callable[..., Iterator[LoadedBatch]] = train_batches
    """Reads and decodes training rows (`train_batches`, or it with arguments set)."""
    threads: int = 1
    """For decoding validation rows."""
    decode_validation_bytes: int = 0
    """A rank's validation rows are decoded once, where they take no more bytes than this."""
    stream_rows: dict[str, Rows] = field(default_factory=dict)
    """Rows that the technique may read beside the training rows, by stream
    (``Technique.streams``).
    """
    stream_batch: int | None = None
    """Rows of a batch of a stream; None: as many as in a training batch."""
    has_labels: bool = True
    """Whether the training rows have labels. Without labels they are the stream "target"."""
    extra_metrics: dict[str, Callable[[Task], float]] = field(default_factory=dict)
    """Further numbers to compute at every validation, by name."""
    restart_if_damaged: bool = False
    """Whether training starts again from step 0 where every resume point is damaged."""
    on_start: Callable[[int, list[str]], None] = lambda step, damaged: None
    """Called on rank 0, before anything is logged, with the step at which training starts and a
    line for each damaged resume point."""
    on_record: Callable[[LogRecord], None] = lambda record: None
    """Called on rank 0 with each record of the log."""
    on_validation: Callable[[int, int, dict[str, float]], None] = lambda step, steps, metrics: None
    """Called with the step, the number of all steps, and the metrics."""
    on_step: Callable[[], None] = heartbeat.beat
    """Called at every step."""


class RunMetadata(TypedDict):
    """What the records of sources and trials have in common, in JSON."""

    steps: int
    params_trained: int
    layers_trained: str
    skipped_steps: int
    resumed_from: int
    curve: list[loop.Metrics]
    """Step and metrics of each validation."""
    kept_step: int
    """The step whose weights were kept."""
    padding_share: NotRequired[float]
    """Share of positions that are padding (0 to 1), where batches are cut by cost."""
    chosen: NotRequired[dict[str, Any]]
    """What the technique chose (`ChoosesOnValidation`)."""
    stopped_at: NotRequired[int]
    """The step at which training stopped early (``train.patience``)."""


@dataclass(frozen=True)
class Finished:
    """The result of a training run."""

    task: Task
    """The task as the technique returns it, with adapters merged into the weights."""
    outcome: TrainingOutcome
    metrics: dict[str, float]
    """Validation metrics of the weights that were kept."""
    metadata: RunMetadata
    bad_rows: dict[tuple[str, int], str]
    """(split, row) to the reason why it could not be used, of all ranks."""
    warning: str
    """The objective's newest warning, or an empty string."""
    damaged: list[str]
    """A line for each damaged resume point that was skipped."""


def technique_of(config: ComponentConfig) -> Technique:
    """Return a technique with the options of the job."""
    kind = registry.get("technique", config.name)
    return kind(kind.options_class(**config.options))


def checkpoint_folder(folder: str) -> str:
    """Return the folder of a run's resume points."""
    return storage.join(folder, resume_history.CHECKPOINTS)


def run(experiment: Experiment, ranks: Ranks) -> Finished:
    """Train from the newest resume point, if there is one, and validate; called by every rank.

    Raises:
        TooManyBadRowsError: More rows of a split are bad than the budget allows.
        NonFiniteError: Too many steps in a row were not finite.
    """
    train, technique, rows = experiment.train, experiment.technique, experiment.rows
    objective = experiment.task.objective
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.technique_seed)
        task = technique.wrap(experiment.task)

    preprocess = evaluate.device_preprocessing(rows, objective)
    if prepares_on_target(technique):
        target = experiment.stream_rows["target"]
        inputs = partial(streams.test_inputs, target, preprocess, ranks, experiment.eval_batch)
        task = technique.prepare(task.to(ranks.device), inputs)
    record = _Record(experiment, ranks)
    validate = _validator(experiment, ranks, preprocess, record.bad_rows)
    # without labels the validation rows are the source's: the network is best before it adapts
    is_last = couples_rows(objective) or not experiment.has_labels
    patience = None if is_last else train.patience
    keep = "last" if is_last else train.keep
    keeper = loop.KeepBest(experiment.metrics[0], keep, patience)
    batches = partial(
        experiment.read,
        rows,
        experiment.plan,
        rank=ranks.rank,
        ranks=ranks.count,
        pin=ranks.device.type == "cuda",
    )
    seed = mix(experiment.seed, 5)
    extra_streams = streams.technique_streams(
        technique,
        experiment.stream_rows,
        seed,
        train,
        ranks,
        batch=experiment.stream_batch,
        known=() if experiment.has_labels else ("target",),
    )
    unit, count_units_of = "rows", len
    if measures_throughput(rows.modality):
        unit, count_units_of = rows.modality.throughput_unit, rows.modality.throughput
    training_run = loop.TrainingRun(
        task=task,
        technique=technique,
        train=train,
        steps=experiment.steps,
        seed=experiment.seed,
        batches=batches,
        streams=extra_streams,
        has_labels=experiment.has_labels,
        preprocess=evaluate.training_preprocessing(rows, objective, technique),
        keeper=keeper,
        evaluate=validate,
        ranks=ranks,
        checkpoint_folder=checkpoint_folder(experiment.folder),
        restart_if_damaged=experiment.restart_if_damaged,
        on_start=record.start,
        on_log=record.write,
        on_eval=record.validated,
        on_rows=RowTrace(experiment.folder, ranks.rank) if train.trace_rows else None,
        on_bad_rows=record.bad_rows.add,
        on_step=experiment.on_step,
        throughput_unit=unit,
        count_units_of=count_units_of,
    )
    with record:
        train_or_evaluate = loop.fit if trains(technique) else loop.evaluate_untrained
        outcome = train_or_evaluate(training_run)
        if outcome.stopped_at:
            why = f"no better {experiment.metrics[0]} in {train.patience} validations"
            record.write({"step": outcome.steps, "steps": experiment.steps, "stopped": why})
        metrics, chosen = keeper.metrics, {}
        if isinstance(technique, ChoosesOnValidation):
            goodness = goodness_of(technique, validate, experiment.metrics[0])
            task, chosen = technique.choose(task, goodness)
            metrics = validate(task) if validate else metrics
    return Finished(
        task=technique.finish(task),
        outcome=outcome,
        metrics=metrics,
        metadata=_metadata(outcome, keeper.step, experiment.plan, chosen),
        bad_rows=record.bad_rows.reasons,
        warning=record.warning,
        damaged=record.damaged,
    )


def _metadata(
    outcome: TrainingOutcome, kept_step: int, plan: Plan, chosen: dict[str, Any]
) -> RunMetadata:
    metadata: RunMetadata = {
        "steps": outcome.steps,
        "params_trained": outcome.params_trained,
        "layers_trained": outcome.layers_trained,
        "skipped_steps": outcome.skipped_steps,
        "resumed_from": outcome.resumed_from,
        "curve": outcome.curve,
        "kept_step": kept_step,
    }
    if isinstance(plan, BucketPlan):
        metadata["padding_share"] = round(plan.padding(), 4)
    if chosen:
        metadata["chosen"] = chosen
    if outcome.stopped_at:
        metadata["stopped_at"] = outcome.stopped_at
    return metadata


def goodness_of(
    technique: Technique, validate: Callable[[Task], dict[str, float]] | None, primary: str
) -> Callable[[Task], float]:
    """Return a function that computes the primary validation metric, negated if lower is better."""
    sign = 1.0 if metric(primary).higher_is_better else -1.0

    def goodness(task: Task) -> float:
        if validate is None:
            raise ValueError(
                f"technique {technique.registered_name} chooses on validation rows, and there are "
                "none"
            )
        value = sign * validate(task)[primary]
        return -math.inf if math.isnan(value) else value

    return goodness


def _validator(
    experiment: Experiment,
    ranks: Ranks,
    preprocess: Callable[[Batch, bool], Batch],
    bad_rows: BadRows,
) -> Callable[[Task], dict[str, float]] | None:
    """Return a function that computes validation metrics of a task, the same on every rank."""
    if not len(experiment.validation):
        return None
    mine = experiment.validation.part(ranks.rank, ranks.count)
    limit = experiment.decode_validation_bytes
    if mine.arrays is None and limit and mine.decoder.estimate_bytes(mine.selection) <= limit:
        mine = mine.in_memory(1.0, cpus=0)
        bad_rows.add("validation", mine.bad)
    compute_metrics = evaluate.evaluator(
        mine,
        experiment.metrics,
        preprocess,
        ranks,
        partial(loop.autocast, experiment.train, ranks.device),
        experiment.eval_batch,
        experiment.threads,
        on_bad=partial(bad_rows.add, "validation"),
    )

    def validate(task: Task) -> dict[str, float]:
        metrics = compute_metrics(task)
        for name, compute in experiment.extra_metrics.items():
            metrics[name] = compute(task)
        return metrics

    return validate


class BadRows:
    """Rows that could not be used, each once.

    Every rank has those of all ranks and checks them against the budget.
    """

    def __init__(self, experiment: Experiment, ranks: Ranks):
        rows, validation = experiment.rows.selection, experiment.validation.selection
        self.selections = {
            "train": rows,
            "validation": validation,
            **{name: stream.selection for name, stream in experiment.stream_rows.items()},
        }
        self.num_rows = {name: len(selection) for name, selection in self.selections.items()}
        if experiment.split_rows is not None:
            self.num_rows["train"] = experiment.split_rows
        self.max_bad_rows, self.num_left_out = experiment.max_bad_rows, experiment.num_left_out
        self.ranks = ranks
        self.new: list[tuple[str, int, str]] = []
        self.reasons: dict[tuple[str, int], str] = {}
        """Why each bad row of all ranks cannot be used, by (split, row id)."""

    def add(self, split: str, bad: Iterable[tuple[int, str]]) -> None:
        """Add bad rows of this rank. The other ranks get them at the next ``gather``."""
        self.new += [(split, row, reason) for row, reason in bad]

    def gather(self, log: MetricsLog | None) -> None:
        """Exchange new bad rows; called by every rank at the same steps.

        Raises:
            TooManyBadRowsError: A split is over the budget; on all ranks.
        """
        everyone = evaluate.gather_objects(self.new, self.ranks)
        self.new = []
        of_all_ranks = {(split, row): reason for part in everyone for split, row, reason in part}
        fresh = {key: reason for key, reason in of_all_ranks.items() if key not in self.reasons}
        if not fresh:
            return
        self.reasons |= fresh
        if log:
            log.quarantine(
                [
                    LeftOut(split, row, self.place(split, row), reason)
                    for (split, row), reason in fresh.items()
                ]
            )
        for split, selection in self.selections.items():
            bad = [(row, reason) for (of, row), reason in self.reasons.items() if of == split]
            left_out = self.num_left_out.get(split, 0)
            num_rows, drawn = self.num_rows[split], len(selection)
            check_bad_row_budget(bad, num_rows, self.max_bad_rows, selection, left_out, drawn)

    def place(self, split: str, row: int) -> str:
        """Return the file of a row and its number in it."""
        return self.selections[split].manifest.location(row)


class _Record:
    """Passes on a run's log records, validations and bad rows."""

    def __init__(self, experiment: Experiment, ranks: Ranks):
        self.experiment, self.ranks = experiment, ranks
        self.bad_rows = BadRows(experiment, ranks)
        self.log: MetricsLog | None = None
        self.damaged: list[str] = []
        self.warning = ""

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self.log and kind is None:
            self.log.close()
        elif self.log:
            self.log.abandon()

    def start(self, step: int, damaged: list[str]) -> None:
        self.damaged = damaged
        if self.ranks.is_first:
            self.experiment.on_start(step, damaged)
            self.log = MetricsLog(self.experiment.log_folder, step)
            if self.experiment.left_out:
                self.log.quarantine(self.experiment.left_out)

    def write(self, record: LogRecord) -> None:
        self.bad_rows.gather(self.log)
        self.warning = record.get("warning", self.warning)
        if not self.log:
            return
        if self.bad_rows.reasons:
            record["bad_rows"] = len(self.bad_rows.reasons)
        self.log.write(record)
        self.experiment.on_record(record)

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        extra, steps = self.experiment.extra_metrics, self.experiment.steps
        named = {
            name if name in extra else f"validation_{name}": value
            for name, value in metrics.items()
        }
        record: LogRecord = {"step": step, "steps": steps, "validated_step": step}
        self.write(with_numbers(record, named))
        self.experiment.on_validation(step, steps, metrics)
