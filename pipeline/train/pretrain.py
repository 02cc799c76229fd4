"""What the ranks of a source run: the plan of its rows, the loop, and at the end its bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from pipeline.checkpoints import bundle, pretrained
from pipeline.config.schema import FULL, ComponentConfig, Data, Train
from pipeline.core.contracts import Task
from pipeline.core.rng import mix
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.manifest import Selection
from pipeline.data.plan import Mixture, Plan, Shuffle
from pipeline.data.stream import (
    DataWorkers,
    Decoder,
    Place,
    Rows,
    plan_of,
    rows_an_item,
)
from pipeline.io import file_identity, storage, write_fence
from pipeline.io.file_identity import FileIdentity
from pipeline.train import checkpoint, experiment, loop, online_probe
from pipeline.train.experiment import Experiment, Finished
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
    technique: ComponentConfig = FULL
    """Which weights train, and how."""


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
        technique=spec.technique,
    )
    rows = Rows(fitted.train, decoder_of(fitted), costs=fitted.costs)
    plan, text = order_of(work, rows, 1), fitted.text
    if isinstance(plan, BucketPlan):
        text += (
            f"; {plan.batches_an_epoch:.0f} batches an epoch of up to {plan.batch_cost:g} "
            f"{rows.modality.cost_unit}, {plan.padding():.1%} of them padding"
        )
    technique = experiment.technique_of(spec.technique)
    return replace(work, steps=technique.steps(steps_of(spec.train, plan)), split_text=text)


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


def train_rank(
    work: RankJob,
    ranks: Ranks,
    on_progress: Callable[[dict[str, Any]], None] = lambda record: None,
    held: Rows | None = None,
) -> dict[str, Any]:
    """Pretrain on one of several ranks; rank 0 writes the log and the bundle.

    Args:
        on_progress: Called on rank 0 with each record of the log.
        held: The training rows where they were decoded before (`decoded`).

    Returns:
        The metadata that the bundle and the report show.
    """
    began = time.time()
    made = experiment_of(work, ranks, on_progress, held)
    finished = experiment.run(made, ranks)
    metadata = metadata_of(work, made, finished, ranks, began)
    if ranks.first:
        file_identity.check_unchanged(work.reads)
        finished.task.objective.after_training(finished.task.backbone)
        write(work, finished, metadata)
    return metadata


def experiment_of(
    work: RankJob, ranks: Ranks, on_progress: Callable[[dict[str, Any]], None], held: Rows | None
) -> Experiment:
    """A source's training run as one of its ranks sees it."""
    train, fitted = work.train, work.fitted
    decoder = decoder_of(fitted)
    rows = held or Rows(fitted.train, decoder, costs=fitted.costs)
    task = start_task(work)
    left_out = list(fitted.left_out)
    extra_metrics = {}
    if fitted.probe:
        cast = partial(loop.autocast, train, ranks.device)
        knn = online_probe.probe_evaluator(
            fitted.probe, rows.modality, ranks, cast, left_out.extend
        )
        extra_metrics[online_probe.METRIC] = knn
    validation = Rows(fitted.validation, replace(decoder, training=False))
    objective = task.objective
    return Experiment(
        task=task,
        technique=experiment.technique_of(work.technique),
        technique_seed=mix(work.seed, 4),
        train=train,
        steps=work.steps,
        seed=work.seed,
        rows=rows,
        plan=order_of(work, rows, rows_an_item(rows, work.shards)),
        place=work.place,
        threads=work.threads,
        workers=work.workers,
        validation=validation if len(validation) else None,
        eval_batch=train.micro_batch or -(-train.global_batch // ranks.count),
        decode_validation_bytes=VALIDATION_BYTES,
        metrics=type(objective).source_metrics(objective.options, objective.state),
        extra_metrics=extra_metrics,
        max_bad_rows=work.max_bad_rows,
        lost=fitted.lost,
        quarantined=tuple(left_out),
        folder=work.uri,
        log_folder=storage.join(work.uri, "log"),
        on_record=on_progress,
    )


def start_task(work: RankJob) -> Task:
    """The task with the weights that it starts from; a resume point, if there is one, has its own."""
    task = bundle.build_task(work.fitted.arch, work.fitted.objective, seed=work.seed)
    if work.fitted.initial and not checkpoint.newest(experiment.checkpoints_of(work.uri)):
        task.load_state_dict(bundle.load(work.fitted.initial).tensors)
    return task


def metadata_of(
    work: RankJob, made: Experiment, finished: Finished, ranks: Ranks, began: float
) -> dict[str, Any]:
    """What the bundle and the report say of a source's training."""
    fitted, outcome = work.fitted, finished.outcome
    return {
        "source": work.name,
        "backbone": fitted.arch["name"],
        "objective": fitted.objective["name"],
        "rows": len(made.rows),
        "seconds": round(outcome.seconds, 2),
        "rows_per_second": round(outcome.rows_per_second, 1),
        "wait_share": round(outcome.wait_share, 4),
        "bad_rows": len(finished.bad_rows) + len(fitted.left_out),
        "ranks": ranks.count,
        "device": device_name(ranks.device),
        "metrics": finished.metrics,
        "transfer": fitted.moved,
        "splits": work.split_text,
        "warning": finished.warning,
        "findings": [list(finding) for finding in fitted.findings],
        "started_at": began,
        "spec_hash": work.key,
        **finished.metadata(),
    }


def write(work: RankJob, finished: Finished, metadata: dict[str, Any]) -> None:
    """Write the bundle, then remove what only an unfinished source needs."""
    bundle.save(
        storage.join(work.uri, "bundle"),
        finished.task,
        work.fitted.modality,
        parent=work.fitted.start,
        training=metadata,
        spec_hash=work.key,
        metrics=finished.metrics,
        made_by=work.made_by,
    )
    checkpoint.clear(experiment.checkpoints_of(work.uri))
    if work.fitted.initial:
        storage.remove_tree(work.fitted.initial)


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
