"""Pretraining of a source: what its ranks are given, what each of them runs, the bundle at the end.

A source without data is an existing checkpoint: it is read into a bundle, and nothing is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipeline.checkpoints import bundle, pretrained
from pipeline.config.provenance import MadeBy
from pipeline.config.schema import Data, Source, Train
from pipeline.core.capabilities import is_costed
from pipeline.core.contracts import Task
from pipeline.core.contracts.objective_capabilities import replaces_backbone, source_metrics
from pipeline.core.rng import mix
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.manifests import Selection
from pipeline.data.plan import Plan, Shuffle
from pipeline.data.stream import (
    DataWorkers,
    DecodeAt,
    Decoder,
    Rows,
    plan_of,
    rows_per_item,
    train_batches,
)
from pipeline.io import file_identity, storage, write_fence
from pipeline.io.file_identity import FileIdentity
from pipeline.train import experiment, loop, online_probe
from pipeline.train.experiment import Experiment, Finished
from pipeline.train.log import LogRecord
from pipeline.train.ranks import Ranks
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
    """What every rank of a source is given; it can be sent to another process."""

    name: str
    uri: str
    key: str
    seed: int
    spec: Source
    reads: tuple[FileIdentity, ...]
    """Files that are read in training. Where one of them has changed, no bundle is written."""
    fitted: FittedSource
    workers: DataWorkers
    threads: int
    made_by: MadeBy
    """The code that makes the bundle, for its manifest."""
    fences: tuple[write_fence.Fence, ...]
    """Fences of the rank's run: the rank may write while that run has its lease."""
    steps: int = 0
    split_text: str = ""

    @property
    def data(self) -> Data:
        """The data of the source; a source without data is never given to ranks."""
        assert self.spec.data is not None
        return self.spec.data

    @property
    def place(self) -> DecodeAt:
        """Where training rows are decoded."""
        return "workers" if self.data.decode == "auto" else self.data.decode


def rank_job(
    stage: SourceStage, fitted: FittedSource, workers: DataWorkers, threads: int
) -> RankJob:
    """Return what every rank of a source is given.

    Raises ValueError where the rows do not fill a batch.
    """
    spec = stage.spec
    check_plan(stage, fitted.corpus_sizes)
    code = made_by(spec, fitted.arch).made_by
    if fitted.begun_by:
        code["begun_by"] = list(fitted.begun_by)
    work = RankJob(
        name=stage.name,
        uri=stage.uri,
        key=stage.key,
        seed=stage.seed,
        spec=spec,
        reads=stage.reads,
        fitted=fitted,
        workers=workers,
        threads=threads,
        made_by=code,
        fences=write_fence.current_fences(),
    )
    rows = training_rows(work)
    plan, description = order_of(work, rows, 1), fitted.description
    if isinstance(plan, BucketPlan):
        assert is_costed(rows.modality)
        description += (
            f"; {plan.batches_per_epoch:.0f} batches an epoch of up to {plan.batch_cost:g} "
            f"{rows.modality.cost_unit}, {plan.padding():.1%} of them padding"
        )
    steps = experiment.technique_of(spec.technique).steps(steps_of(spec.train, plan))
    return replace(work, steps=steps, split_text=description)


def steps_of(train: Train, plan: Plan) -> int:
    """Return the optimiser steps of a run: those of the job, or of one epoch."""
    return train.steps if train.steps is not None else plan.steps(train.epochs or 1.0)


def shuffle_of(data: Data, rows: Selection) -> Shuffle:
    """Return how training rows that are read from files are shuffled.

    With a full permutation, files that are larger than memory would be read many times per epoch.
    """
    if data.shuffle != "auto":
        return data.shuffle
    return "rows" if rows.manifest.num_bytes <= ROWS_SHUFFLE_BYTES else "blocks"


def order_of(work: RankJob, rows: Rows, item_rows: int | None = None) -> Plan:
    """Return the order in which a source's rows are read, ``item_rows`` at a time."""
    spec = work.spec
    shards = canonical_shards(spec)
    return plan_of(
        rows,
        work.seed,
        spec.train.global_batch,
        spec.train.batch_cost,
        shards=shards,
        shuffle=shuffle_of(work.data, work.fitted.train),
        item_rows=item_rows or rows_per_item(rows, shards),
        mixture=mixture(spec, work.fitted.corpus_sizes),
    )


def decoder_of(fitted: FittedSource) -> Decoder:
    """Return the decoder of a source's rows, with the fitted modality and objective."""
    return Decoder(
        bundle.build_modality(fitted.modality),
        fitted.objective.name,
        fitted.objective.state,
        fitted.columns,
    )


def training_rows(work: RankJob) -> Rows:
    """Return the training rows of a source, not decoded yet."""
    return Rows(work.fitted.train, decoder_of(work.fitted), costs=work.fitted.costs)


def decode_once(work: RankJob) -> Rows | None:
    """Return the decoded training rows for ``decode: memory``, else None.

    The driver decodes them, and all ranks read them from shared memory.
    """
    if work.place != "memory":
        return None
    return training_rows(work).in_memory(
        work.data.max_bad_rows, keep_bad=True, num_left_out=work.fitted.num_left_out
    )


def train_rank(
    work: RankJob,
    ranks: Ranks,
    on_progress: Callable[[LogRecord], None] = lambda record: None,
    decoded_rows: Rows | None = None,
) -> dict[str, Any]:
    """Pretrain on one of several ranks; rank 0 writes the log and the bundle.

    Args:
        on_progress: Called on rank 0 with each record of the log.
        decoded_rows: The training rows of `decode_once`.

    Returns:
        The metadata of the training, for the bundle and the report.
    """
    began, fitted = time.time(), work.fitted
    source_experiment = experiment_of(work, ranks, on_progress, decoded_rows)
    finished = experiment.run(source_experiment, ranks)
    outcome = finished.outcome
    metadata = {
        "source": work.name,
        "backbone": fitted.arch.name,
        "objective": fitted.objective.name,
        "rows": len(source_experiment.rows),
        "seconds": round(outcome.seconds, 2),
        "rows_per_second": round(outcome.rows_per_second, 1),
        "wait_share": round(outcome.wait_share, 4),
        "bad_rows": len(finished.bad_rows) + len(fitted.left_out),
        "ranks": ranks.count,
        "device": device_name(ranks.device),
        "metrics": finished.metrics,
        "transfer": fitted.transfer_note,
        "splits": work.split_text,
        "warning": finished.warning,
        "findings": [list(finding) for finding in fitted.findings],
        "started_at": began,
        "spec_hash": work.key,
        **finished.metadata,
    }
    if ranks.is_first:
        file_identity.check_unchanged(work.reads)
        write_bundle(work, finished, metadata)
    return metadata


def experiment_of(
    work: RankJob,
    ranks: Ranks,
    on_progress: Callable[[LogRecord], None],
    decoded_rows: Rows | None,
) -> Experiment:
    """Return a source's training run for one of its ranks."""
    fitted, train = work.fitted, work.spec.train
    rows = decoded_rows or training_rows(work)
    task = initial_task(work)
    objective, left_out, extra_metrics = task.objective, list(fitted.left_out), {}
    if fitted.probe:
        cast = partial(loop.autocast, train, ranks.device)
        extra_metrics[online_probe.METRIC] = online_probe.ProbeEvaluator(
            fitted.probe, rows.modality, ranks, cast, left_out.extend
        )
    return Experiment(
        task=task,
        technique=experiment.technique_of(work.spec.technique),
        technique_seed=mix(work.seed, 4),
        train=train,
        steps=work.steps,
        seed=work.seed,
        rows=rows,
        plan=order_of(work, rows),
        read=partial(
            train_batches,
            decode=work.place,
            threads=work.threads,
            workers=work.workers,
            device=ranks.device,
        ),
        threads=work.threads,
        validation=Rows(fitted.validation, replace(decoder_of(fitted), training=False)),
        eval_batch=train.micro_batch or -(-train.global_batch // ranks.count),
        decode_validation_bytes=VALIDATION_BYTES,
        metrics=source_metrics(type(objective), objective.options, objective.state),
        extra_metrics=extra_metrics,
        max_bad_rows=work.data.max_bad_rows,
        num_left_out={"train": fitted.num_left_out},
        left_out=left_out,
        folder=work.uri,
        log_folder=storage.join(work.uri, "log"),
        on_record=on_progress,
    )


def initial_task(work: RankJob) -> Task:
    """Return the task with the weights that training starts from.

    A resume point replaces them later, but techniques may keep a copy of the initial weights.
    """
    fitted = work.fitted
    task = bundle.build_task(fitted.arch, fitted.objective, seed=work.seed)
    if fitted.initial_bundle_uri:
        initial = bundle.load(fitted.initial_bundle_uri)
        task.load_state_dict(initial.tensors)
        # bundles of earlier versions do not say it
        names_taken_over = initial.manifest.training.get("names_taken_over", ())
        task.objective.names_taken_over = frozenset(names_taken_over)
    return task


def write_bundle(work: RankJob, finished: Finished, metadata: dict[str, Any]) -> None:
    """Write the bundle, then remove resume points and initial weights."""
    fitted, task = work.fitted, finished.task
    if replaces_backbone(task.objective):
        task.objective.after_training(task.backbone)
    bundle.save(
        storage.join(work.uri, "bundle"),
        task,
        fitted.modality,
        parent=fitted.checkpoint_name,
        training=metadata,
        spec_hash=work.key,
        metrics=finished.metrics,
        columns=work.data.columns,
        made_by=work.made_by,
    )
    storage.remove_tree(experiment.checkpoint_folder(work.uri))
    if fitted.initial_bundle_uri:
        storage.remove_tree(fitted.initial_bundle_uri)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU as CUDA has it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# ---------------------------------------------------------------- a source without data

UNTRAINED = {
    "steps": 0,
    "rows": 0,
    "seconds": 0.0,
    "rows_per_second": 0.0,
    "splits": "none",
    "curve": [],
    "ranks": 0,
    "device": "none",
}


def import_checkpoint(stage: SourceStage) -> dict[str, Any]:
    """Read the existing checkpoint that a source names into a bundle.

    Returns:
        The metadata of the import, for the bundle and the report.
    """
    spec = stage.spec
    metadata = {**UNTRAINED, "source": stage.name, "spec_hash": stage.key}
    if stage.is_existing_bundle:
        if spec.modality is not None:
            raise ValueError(
                f"sources.{stage.name}.modality: a bundle says how its rows are read: leave it out"
            )
        manifest = bundle.load(stage.bundle_uri).manifest
        return {
            **metadata,
            "backbone": manifest.arch.name,
            "objective": manifest.objective.name,
            "metrics": manifest.metrics,
            "transfer": "the bundle itself",
        }
    name = spec.init or spec.backbone.name
    source_checkpoint = pretrained.read(name, spec.backbone.name, spec.modality_name)
    stage.check_checkpoint()
    began = time.time()
    arch, modality = checkpoint_parts(spec, source_checkpoint, f"sources.{stage.name}")
    has_parts = source_checkpoint.arch is not None and source_checkpoint.modality is not None
    note = pretrained.describe_input(
        modality, spec.backbone.name, spec.modality, name if has_parts else ""
    )
    backbone = bundle.build_backbone(arch, stage.seed)
    transferred = source_checkpoint.load_into(backbone)
    stage.check_checkpoint()  # its file is mapped: only now has all of it been read
    metadata |= {
        "backbone": arch.name,
        "objective": "none (checkpoint)",
        "seconds": round(time.time() - began, 2),
        "metrics": {},
        "transfer": transferred.text(),
        "findings": [list(Finding(note))] if note else [],
    }
    bundle.save(
        stage.bundle_uri,
        backbone,
        modality,
        parent=name,
        training=metadata,
        spec_hash=stage.key,
        metrics={},
        made_by=made_by(spec, arch, modality.name).made_by,
    )
    return metadata
