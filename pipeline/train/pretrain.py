"""What the ranks of a source run: the plan of its rows, the loop, and at the end its bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from pipeline.checkpoints import bundle, pretrained
from pipeline.config.schema import Data, Train
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.manifest import Selection
from pipeline.data.plan import Mixture, Plan, Shuffle
from pipeline.data.stream import (
    DataWorkers,
    Decoder,
    Place,
    Rows,
    check_bad_row_budget,
    plan_of,
    rows_an_item,
    train_batches,
)
from pipeline.io import file_identity, storage, write_fence
from pipeline.io.file_identity import FileIdentity
from pipeline.techniques.rates import Full
from pipeline.train import checkpoint, evaluate, loop, online_probe
from pipeline.train.log import MetricsLog, RowTrace
from pipeline.train.loop import Ranks
from pipeline.train.row_checks import Finding
from pipeline.train.source import (
    FittedSource,
    SourceStage,
    canonical_shards,
    check_plan,
    checkpoint_parts,
    made_by,
    mixture,
)

ROWS_SHUFFLE_BYTES = 256 << 20
VALIDATION_BYTES = 512 << 20
"""A rank's share of the validation rows is decoded once when it takes no more than this."""


@dataclass(frozen=True)
class RankJob:
    """All that a rank needs, plain enough to be sent to it."""

    name: str
    uri: str
    key: str
    seed: int
    train: Train
    steps: int
    fitted: FittedSource
    shards: int
    shuffle: str
    place: Place
    max_bad_rows: float
    workers: DataWorkers
    threads: int
    split_text: str
    mixture: Mixture | None = None
    """Ranges and weights of the corpora, where they have weights."""
    reads: tuple[FileIdentity, ...] = ()
    """Files that are read in training: no bundle is written when one of them has changed."""
    fences: tuple[write_fence.Fence, ...] = ()
    """The run that the rank belongs to: it writes while that run holds its lease."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """What the bundle's manifest says of the code that made it."""


def steps_of(train: Train, plan: Plan) -> int:
    """Optimiser steps of a run; one epoch when nothing was said."""
    return train.steps if train.steps is not None else plan.steps(train.epochs or 1.0)


def shuffle_of(data: Data, rows: Selection) -> Shuffle:
    """The order in which the training rows of a source or of a target are shuffled, when they are
    read from files.

    A full permutation of files that are larger than memory would read them many times an epoch.
    """
    if data.shuffle != "auto":
        return data.shuffle
    return "rows" if rows.manifest.size <= ROWS_SHUFFLE_BYTES else "blocks"


def rank_job(
    stage: SourceStage, fitted: FittedSource, workers: DataWorkers, threads: int
) -> RankJob:
    spec = stage.spec
    assert spec.data is not None
    shards = canonical_shards(spec)
    shuffle = shuffle_of(spec.data, fitted.train)
    place: Place = "workers" if spec.data.decode == "auto" else spec.data.decode
    check_plan(stage, fitted.corpora)
    made = made_by(spec, fitted.arch).metadata()["made_by"] | (
        {"begun_by": list(fitted.begun_by)} if fitted.begun_by else {}
    )
    work = RankJob(
        stage.name,
        stage.uri,
        stage.key,
        stage.seed,
        spec.train,
        0,
        fitted,
        shards,
        shuffle,
        place,
        spec.data.max_bad_rows,
        workers,
        threads,
        fitted.text,
        mixture(spec, fitted.corpora),
        reads=stage.reads,
        fences=write_fence.current_fences(),
        made_by=made,
    )
    rows = Rows(fitted.train, decoder_of(fitted), costs=fitted.costs)
    plan, text = order_of(work, rows, 1), fitted.text
    if isinstance(plan, BucketPlan):
        text += (
            f"; {plan.batches_an_epoch:.0f} batches an epoch of up to {plan.batch_cost:g} "
            f"{rows.modality.cost_unit}, {plan.padding():.1%} of them padding"
        )
    return replace(work, steps=steps_of(spec.train, plan), split_text=text)


def order_of(work: RankJob, rows: Rows, item_rows: int) -> Plan:
    """The order in which a source's rows are read, ``item_rows`` at a time."""
    return plan_of(
        rows,
        work.seed,
        work.train.global_batch,
        work.train.batch_cost,
        shards=work.shards,
        shuffle=work.shuffle,  # type: ignore[arg-type]
        item_rows=item_rows,
        mixture=work.mixture,
    )


def decoder_of(fitted: FittedSource) -> Decoder:
    return Decoder(
        bundle.build_modality(fitted.modality),
        fitted.objective["name"],
        fitted.objective["state"],
        fitted.columns,
    )


def decoded(work: RankJob) -> Rows | None:
    """The training rows decoded once, for ``decode: memory``: the driver does it, and all ranks
    read them from shared memory.
    """
    if work.place != "memory":
        return None
    return Rows(work.fitted.train, decoder_of(work.fitted), costs=work.fitted.costs).in_memory(
        work.max_bad_rows, keep_bad=True, lost=work.fitted.lost
    )


class _BadRows:
    """Undecodable rows of all ranks, each once: told to the log, held against the budget by every
    rank alike.
    """

    def __init__(self, work: RankJob, ranks: Ranks):
        self.work, self.ranks = work, ranks
        self.new: list[tuple[str, int, str]] = []
        self.found: dict[tuple[str, int], str] = {}

    def add(self, split: str, bad: list[tuple[int, str]]) -> None:
        self.new += [(split, row, reason) for row, reason in bad]

    def gather(self, log: MetricsLog | None) -> None:
        """Called by every rank at the same steps. Raises TooManyBadRowsError on all of them or on
        none.
        """
        everyone: list[Any] = [self.new]
        if self.ranks.count > 1:
            everyone = [None] * self.ranks.count
            torch.distributed.all_gather_object(everyone, self.new)
        self.new = []
        fresh = {
            (split, row): reason
            for part in everyone
            for split, row, reason in part
            if (split, row) not in self.found
        }
        if not fresh:
            return
        self.found |= fresh
        selections = {"train": self.work.fitted.train, "validation": self.work.fitted.validation}
        if log:
            log.quarantine(
                [
                    {
                        "split": split,
                        "row": row,
                        "place": selections[split].manifest.place(row),
                        "reason": reason,
                    }
                    for (split, row), reason in fresh.items()
                ]
            )
        for split, selection in selections.items():
            check_bad_row_budget(
                [(row, reason) for (s, row), reason in self.found.items() if s == split],
                len(selection),
                self.work.max_bad_rows,
                selection,
                self.work.fitted.lost if split == "train" else 0,
            )


def train_rank(
    work: RankJob,
    ranks: Ranks,
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
    held: Rows | None = None,
) -> dict[str, Any]:
    """Pretrain on one of several ranks; rank 0 writes the log and the bundle. Returns the facts
    that the report shows.

    ``held``: the training rows where they were decoded before (`decoded`).
    """
    train, fitted = work.train, work.fitted
    checkpoints = storage.join(work.uri, "checkpoints")
    task = bundle.build_task(fitted.arch, fitted.objective, seed=work.seed)
    if fitted.initial and not checkpoint.newest(checkpoints):
        task.load_state_dict(bundle.load(fitted.initial).tensors)
    decoder, bad = decoder_of(fitted), _BadRows(work, ranks)
    rows = held or Rows(fitted.train, decoder, costs=fitted.costs)
    plan = order_of(work, rows, rows_an_item(rows, work.shards))
    cuda = ranks.device.type == "cuda"
    batches = partial(
        train_batches,
        rows,
        plan,
        rank=ranks.rank,
        ranks=ranks.count,
        place=work.place,
        pin=cuda,
        threads=work.threads,
        workers=work.workers,
        device=ranks.device,
    )
    objective = task.objective
    ready = evaluate.device_preprocessing(rows, objective)
    metrics_of_source = type(objective).source_metrics(objective.options, objective.state)
    check = None
    if len(fitted.validation):
        mine = Rows(fitted.validation, replace(decoder, training=False)).part(
            ranks.rank, ranks.count
        )
        if decoder.size(mine.selection) <= VALIDATION_BYTES:
            mine = mine.in_memory(1.0, cpus=0)
            bad.add("validation", list(mine.bad))
        check = evaluate.evaluator(
            mine,
            metrics_of_source,
            ready,
            ranks,
            lambda: loop.autocast(train, ranks.device),
            train.micro_batch or -(-train.global_batch // ranks.count),
            work.threads,
            part=True,
            on_bad=lambda found: bad.add("validation", found),
        )
    log: MetricsLog | None = None
    found_early: list[dict[str, Any]] = []

    def quarantine(rows: list[dict[str, Any]]) -> None:
        """Bad rows of the probe: it reads its rows before the log is opened, which waits for the
        resume point.
        """
        if log is None:
            found_early.extend(rows)
        else:
            log.quarantine(rows)

    def on_start(step: int, passed_over: list[str]) -> None:
        nonlocal log
        if ranks.first:
            log = MetricsLog(storage.join(work.uri, "log"), step)
            log.quarantine([*fitted.left_out, *found_early])

    if check and fitted.probe:
        tried = online_probe.probe_evaluator(
            fitted.probe,
            rows.modality,
            ranks,
            lambda: loop.autocast(train, ranks.device),
            quarantine,
        )
        check = _both(check, tried)

    warning = ""

    def on_log(record: dict[str, Any]) -> None:
        nonlocal warning
        bad.gather(log)
        warning = record.get("warning", warning)
        if log:
            if bad.found:
                record["bad_rows"] = len(bad.found)
            log.write(record)
            on_progress(record)

    def on_eval(step: int, metrics: dict[str, Any]) -> None:
        on_log(
            {
                "step": step,
                "steps": work.steps,
                **{
                    k if k == online_probe.METRIC else f"validation_{k}": v
                    for k, v in metrics.items()
                },
            }
        )

    trace = RowTrace(work.uri, ranks.rank) if train.trace_rows else None
    began = time.time()
    run = loop.TrainingRun(
        task=task,
        technique=Full(),
        train=train,
        steps=work.steps,
        seed=work.seed,
        batches=batches,
        ready=ready,
        keeper=loop.KeepBest(
            metrics_of_source[0], "last" if objective.couples_rows else train.keep
        ),
        evaluate=check,
        ranks=ranks,
        checkpoints=checkpoints,
        on_start=on_start,
        on_log=on_log,
        on_eval=on_eval,
        on_rows=trace,
        bad_rows=lambda found, seen: bad.add("train", found),
    )
    try:
        outcome = loop.fit(run)
    except BaseException:
        if log:
            log.abandon()
        raise
    if log:
        log.close()
    metadata = {
        "source": work.name,
        "backbone": fitted.arch["name"],
        "objective": fitted.objective["name"],
        "steps": outcome.steps,
        "rows": len(rows),
        "seconds": round(outcome.seconds, 2),
        "rows_per_second": round(outcome.rows_per_second, 1),
        "wait_share": round(outcome.wait_share, 4),
        "skipped_steps": outcome.skipped_steps,
        "params_trained": outcome.params_trained,
        "resumed_from": outcome.resumed_from,
        "bad_rows": len(bad.found) + len(fitted.left_out),
        "ranks": ranks.count,
        "device": device_name(ranks.device),
        "metrics": run.keeper.metrics,
        "kept_step": run.keeper.step,
        "curve": outcome.curve,
        "transfer": fitted.moved,
        "splits": work.split_text,  # type: ignore[attr-defined]
        "warning": warning,
        "findings": [list(finding) for finding in fitted.findings],
        "started_at": began,
        "spec_hash": work.key,
        **({"padding_share": round(plan.padding(), 4)} if isinstance(plan, BucketPlan) else {}),
    }
    if ranks.first:
        file_identity.check_unchanged(work.reads)
        objective.after_training(task.backbone)
        bundle.save(
            storage.join(work.uri, "bundle"),
            task,
            fitted.modality,
            parent=fitted.start,
            training=metadata,
            spec_hash=work.key,
            metrics=run.keeper.metrics,
            made_by=work.made_by,
        )  # type: ignore[attr-defined]
        checkpoint.clear(checkpoints)
        if fitted.initial:
            storage.remove_tree(fitted.initial)
    return metadata


def _both(
    check: Callable[[Any], dict[str, float]], tried: Callable[[Any], float]
) -> Callable[[Any], dict[str, float]]:
    """The validation metrics and, beside them, the probe's."""
    return lambda task: {**check(task), online_probe.METRIC: tried(task)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def import_checkpoint(stage: SourceStage) -> dict[str, Any]:
    """The bundle of a source that has no data: an existing checkpoint, brought into a bundle.
    Returns the report's facts.
    """
    spec = stage.spec
    if stage.bundle_uri == spec.backbone.name.partition(":")[2]:
        if spec.modality is not None:
            raise ValueError(
                f"sources.{stage.name}.modality: a bundle says how its rows are read: leave it out"
            )
        found = bundle.load(stage.bundle_uri)
        return {
            "source": stage.name,
            "backbone": found.manifest["arch"]["name"],
            "objective": found.manifest["objective"]["name"],
            "steps": 0,
            "rows": 0,
            "seconds": 0.0,
            "rows_per_second": 0.0,
            "metrics": found.manifest.get("metrics", {}),
            "transfer": "the bundle itself",
            "splits": "none",
            "curve": [],
            "ranks": 0,
            "device": "none",
            "spec_hash": stage.key,
        }
    text = spec.init or spec.backbone.name
    start = pretrained.read(text, spec.backbone.name)
    stage.check_checkpoint()
    began = time.time()
    arch, modality = checkpoint_parts(spec, start, f"sources.{stage.name}")
    checkpoint_name = text if start.arch is not None and start.modality is not None else ""
    note = pretrained.describe_input(modality, spec.backbone.name, spec.modality, checkpoint_name)
    backbone = bundle.build_backbone(arch, stage.seed)
    moved = start.load_into(backbone)
    metadata = {
        "source": stage.name,
        "backbone": arch["name"],
        "objective": "none (checkpoint)",
        "steps": 0,
        "rows": 0,
        "rows_per_second": 0.0,
        "seconds": round(time.time() - began, 2),
        "metrics": {},
        "transfer": moved.text(),
        "splits": "none",
        "curve": [],
        "ranks": 0,
        "device": "none",
        "spec_hash": stage.key,
        "findings": [list(Finding(note))] if note else [],
    }
    made = made_by(spec, arch, modality["name"])
    bundle.save(
        stage.bundle_uri,
        backbone,
        modality,
        parent=text,
        training=metadata,
        spec_hash=stage.key,
        metrics={},
        made_by=made.metadata()["made_by"],
    )
    return metadata
