"""The source stage: its key, what is fitted on the corpus, and what one rank runs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import bundle, folders, registry, starts, storage
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection, Splits
from pipeline.data.plan import Plan
from pipeline.data.stream import DataWorkers, Decoder, Place, Rows, check_budget, map_items, train_batches
from pipeline.job import STARTS, Job, Source, Train, spec_hash
from pipeline.rng import mix
from pipeline.techniques.rates import Full
from pipeline.train import checkpoint, evaluate, loop
from pipeline.train.log import MetricsLog
from pipeline.train.loop import Ranks

STAGE_VERSION = 1
"""Raised when the code of a stage changes what it makes from the same job."""
FIT_ROWS, FIT_TEXT_BYTES = 2048, 64 << 20
ROWS_SHUFFLE_BYTES = 256 << 20
WHERE_NOT_WHAT = {"uri", "train", "validation", "test"}
HOW_NOT_WHAT = {"log_every_steps", "checkpoint_every_steps", "trace_rows"}


def data_key(data: Any) -> dict[str, Any]:
    """The part of a data spec that a key depends on: not where the files lie (their fingerprint counts)."""
    return data.model_dump(mode="json", exclude=WHERE_NOT_WHAT | {"decode", "max_bad_rows"})


@dataclass(frozen=True)
class SourceStage:
    """A source of a job before anything runs: its rows, its key and its folder. ``splits`` is none for a checkpoint."""

    job: Job
    name: str
    spec: Source
    splits: Splits | None
    key: str

    @property
    def uri(self) -> str:
        return storage.join(self.job.root, "sources", f"{self.name}-{self.key}")

    @property
    def bundle_uri(self) -> str:
        start = self.spec.backbone.name
        if self.splits is None and start.startswith("bundle:"):
            return start.partition(":")[2]
        return storage.join(self.uri, "bundle")

    @property
    def done(self) -> bool:
        return bundle.exists(self.bundle_uri)

    @property
    def packed(self) -> bool:
        return self.spec.objective is not None and registry.get("objective", self.spec.objective.name).packed


def stage(job: Job, name: str) -> SourceStage:
    """Raises ValueError for data that cannot be used (missing column, empty split, differing schema)."""
    spec = job.sources[name]
    splits = None
    if spec.data is not None:
        assert spec.objective is not None
        modality, objective = registry.get("modality", spec.data.modality.name), registry.get("objective", spec.objective.name)
        roles = (*modality.roles, *objective.roles)
        splits = manifests.splits(spec.data, roles, f"sources.{name}", storage.join(job.root, "imports"), need_test=False)
    what = spec.model_dump(mode="json", exclude={"data", "workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "train"})
    key = spec_hash(STAGE_VERSION, what, spec.train.model_dump(mode="json", exclude=HOW_NOT_WHAT), job.seed,
                    [data_key(spec.data), splits.fingerprint] if spec.data and splits else None)
    return SourceStage(job, name, spec, splits, key)


@dataclass(frozen=True)
class Fitted:
    """What was fitted on the corpus, and the rows as training reads them (packed ones for language models)."""

    arch: dict[str, Any]
    modality: dict[str, Any]
    objective: dict[str, Any]
    columns: dict[str, str]
    train: Selection
    validation: Selection
    start: str | None
    text: str


def sample(selection: Selection, columns: list[str], rows: int) -> pa.Table:
    """Up to ``rows`` rows, evenly spread."""
    n = len(selection)
    places = np.unique(np.linspace(0, n - 1, min(rows, n)).astype(np.int64))
    return manifests.Reader(selection.manifest, columns).take(selection.ids(places))


def fit(stage: SourceStage) -> Fitted:
    """Fit modality and objective on the training rows and pack documents, once: the result lies in the stage's folder."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    text = spec.init or (spec.backbone.name if spec.backbone.name.startswith(STARTS) else None)
    start = starts.read(text, spec.backbone.name) if text else None
    modality = fit_modality(stage, start)
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    columns = spec.data.columns
    needed = [columns[role] for role in ("label", "label_name") if role in columns] if objective.roles else []
    state = objective.fit(options, manifests.read_columns(splits.train, needed), columns) if needed else {}
    arch = start.arch if start and start.arch else {
        "name": spec.backbone.name, "options": dict(spec.backbone.options), "inputs": bundle.build_modality(modality).inputs()}
    train, validation = splits.train, splits.validation
    note = splits.sizes()
    if objective.packed:
        train, validation = (pack(stage, name, selection, modality) for name, selection in (("train", train), ("validation", validation)))
        columns = {"tokens": "tokens", "segments": "segments"}
        note += f"; packed into {len(train)} and {len(validation)} rows of {bundle.build_modality(modality).inputs()['length']} tokens"
    return Fitted(arch, modality, {"name": spec.objective.name, "options": options.model_dump(), "state": state}, columns, train, validation, text, note)


def fit_modality(stage: SourceStage, start: starts.Start | None) -> dict[str, Any]:
    spec = stage.spec
    assert spec.data is not None and stage.splits is not None
    plug = spec.data.modality
    if start and start.modality:
        if start.modality["name"] != plug.name:
            raise ValueError(f"sources.{stage.name}: {start.origin} reads {start.modality['name']}, the data are {plug.name}")
        given = {k: v for k, v in plug.options.items() if start.modality["options"].get(k, v) != v}
        if given:
            raise ValueError(f"sources.{stage.name}.data.modality: {given} contradicts {start.origin} ({start.modality['options']}); leave it out")
        return start.modality
    path = storage.join(stage.uri, "modality.json")
    if storage.exists(path):
        return storage.read_json(path)
    kind = registry.get("modality", plug.name)
    options = kind.options_class(**plug.options)
    names = [spec.data.columns[role] for role in kind.roles]
    rows = FIT_ROWS
    if stage.packed:  # a tokenizer wants many documents, as many as a bounded memory holds
        per_row = max(1, stage.splits.train.manifest.size // max(1, stage.splits.train.manifest.rows))
        rows = max(FIT_ROWS, FIT_TEXT_BYTES // per_row)
    state = kind.fit(options, sample(stage.splits.train, names, rows), spec.data.columns, spec.backbone.name)
    found = {"name": plug.name, "options": options.model_dump(), "state": state}
    storage.write_json(path, found)
    return found


class _Pack:
    """One chunk of documents to packed rows, in a Ray task."""

    def __init__(self, selection: Selection, modality: dict[str, Any], columns: dict[str, str]):
        self.selection, self.modality, self.columns = selection, modality, columns

    def __call__(self, span: tuple[int, int]) -> pa.Table:
        modality = bundle.build_modality(self.modality)
        reader = manifests.Reader(self.selection.manifest, [self.columns[role] for role in modality.roles])
        return modality.pack(reader.take(self.selection.ids(np.arange(*span))), self.columns)


def pack(stage: SourceStage, split: str, selection: Selection, modality: dict[str, Any], chunk: int = 8192) -> Selection:
    """Tokenise a split once into Parquet shards under the stage's folder; a second call finds them there."""
    assert stage.spec.data is not None
    folder = storage.join(stage.uri, "tokens", split)
    if not storage.exists(storage.join(folder, "manifest.json")):
        spans = [(i, min(i + chunk, len(selection))) for i in range(0, len(selection), chunk)]
        work = _Pack(selection, modality, stage.spec.data.columns)
        tables = map_items(work, spans) if len(spans) > 1 else map(work, spans)
        with tempfile.TemporaryDirectory() as scratch:
            files: dict[str, Any] = {}
            for number, table in enumerate(tables):
                name = f"part-{number:05d}.parquet"
                files[name] = Path(scratch, name)
                pq.write_table(table, files[name], row_group_size=4096)
            folders.commit_folder(folder, files, {"split": split, "documents": len(selection)})
    shards = [f for f in storage.list_files(folder) if f.endswith(".parquet")]
    if not shards:
        return Selection(stage.splits.train.manifest, np.zeros(0, dtype=np.int64)) if stage.splits else selection
    return Selection(manifests.build(shards, "parquet", ""))


@dataclass(frozen=True)
class RankJob:
    """All that a rank needs, plain enough to be sent to it."""

    name: str
    uri: str
    key: str
    seed: int
    train: Train
    steps: int
    fitted: Fitted
    shards: int
    shuffle: str
    place: Place
    max_bad_rows: float
    workers: DataWorkers
    threads: int
    split_text: str


def steps_of(train: Train, plan_rows: int) -> int:
    """Optimiser steps of a run over so many rows; one epoch when nothing was said."""
    if train.steps is not None:
        return train.steps
    return max(1, int(np.ceil((train.epochs or 1.0) * plan_rows / train.global_batch - 1e-9)))


def rank_job(stage: SourceStage, fitted: Fitted, workers: DataWorkers, threads: int) -> RankJob:
    spec = stage.spec
    assert spec.data is not None
    n = len(fitted.train)
    shards = spec.train.canonical_shards or max(8, spec.worker_range[1])
    shuffle = spec.data.shuffle if spec.data.shuffle != "auto" else ("rows" if fitted.train.manifest.size <= ROWS_SHUFFLE_BYTES else "blocks")
    place: Place = "workers" if spec.data.decode == "auto" else spec.data.decode
    Plan(n, 0, spec.train.global_batch, shards=shards).owned(0, spec.worker_range[1])  # says at once what cannot work
    return RankJob(stage.name, stage.uri, stage.key, mix(stage.job.seed, *stage.name.encode()), spec.train, steps_of(spec.train, n), fitted, shards,
                   shuffle, place, spec.data.max_bad_rows, workers, threads, fitted.text)


def train_rank(work: RankJob, ranks: Ranks, on_progress: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
    """Pretrain on one of several ranks; rank 0 writes the log and the bundle. Returns the facts that the report shows."""
    train, fitted = work.train, work.fitted
    modality = bundle.build_modality(fitted.modality)
    task = bundle.build_task(fitted.arch, fitted.objective, seed=work.seed)
    moved = ""
    if fitted.start:
        start = starts.read(fitted.start, fitted.arch["name"])
        moved = bundle.transfer(task.backbone, start.tensors, start.origin, start.drop).text()
        if start.bundle:
            moved += "; " + bundle.carry_head(task, start.bundle)
    decoder = Decoder(modality, fitted.objective["name"], fitted.objective["state"], fitted.columns)
    rows = Rows(fitted.train, decoder)
    if work.place == "memory":
        rows = rows.in_memory(work.max_bad_rows)
    plan = Plan(len(rows), work.seed, train.global_batch, shards=work.shards, shuffle=work.shuffle, boundaries=rows.selection.boundaries,  # type: ignore[arg-type]
                item_rows=max(32, min(256, train.global_batch)))
    cuda = ranks.device.type == "cuda"
    batches = partial(train_batches, rows, plan, rank=ranks.rank, ranks=ranks.count, place=work.place, pin=cuda, threads=work.threads,
                      workers=work.workers)
    objective = task.objective
    validation = Rows(fitted.validation, decoder) if len(fitted.validation) else None
    if validation is not None and fitted.validation.manifest.size < ROWS_SHUFFLE_BYTES:
        validation = validation.in_memory(max(work.max_bad_rows, 0.01), spread=False)
    ready = evaluate.ready_for(rows)
    check = None
    if validation is not None:
        check = evaluate.evaluator(validation, objective.metrics, ready, ranks, lambda: loop.autocast(train, ranks.device),
                                   max(1, train.micro_batch or train.global_batch), work.threads)
    folder = storage.join(work.uri, "log")
    resume = checkpoint.newest(storage.join(work.uri, "checkpoints"))
    log = MetricsLog(folder, resume) if ranks.first else None
    found: list[dict[str, Any]] = []

    def on_log(record: dict[str, Any]) -> None:
        if log:
            log.write(record)
            on_progress(record)

    def on_eval(step: int, metrics: dict[str, Any]) -> None:
        on_log({"step": step, "steps": work.steps, **{f"validation_{k}": v for k, v in metrics.items()}})

    def bad_rows(bad: list[tuple[int, str]], seen: int) -> None:
        found.extend({"row": row, "place": fitted.train.manifest.place(row), "reason": reason} for row, reason in bad)
        if log:
            log.quarantine(found[-len(bad):])
        check_budget([(f["row"], f["reason"]) for f in found], seen, work.max_bad_rows, fitted.train)

    trace = _Trace(storage.join(work.uri, f"rows-rank{ranks.rank}.jsonl")) if train.trace_rows else None
    began = time.time()
    run = loop.Run(task=task, technique=Full(), train=train, steps=work.steps, seed=work.seed, batches=batches, ready=ready,
                   keeper=loop.KeepBest(objective.metrics[0], train.keep), evaluate=check, ranks=ranks,
                   checkpoints=storage.join(work.uri, "checkpoints"), on_log=on_log, on_eval=on_eval, on_rows=trace, bad_rows=bad_rows)
    try:
        outcome = loop.fit(run)
    finally:
        if log:
            log.close()
    facts = {"source": work.name, "backbone": fitted.arch["name"], "objective": fitted.objective["name"], "steps": outcome.steps,
             "rows": len(rows), "seconds": round(outcome.seconds, 2), "rows_per_second": round(outcome.rows_per_second, 1),
             "wait_share": round(outcome.wait_share, 4), "skipped_steps": outcome.skipped_steps, "params_trained": outcome.params_trained,
             "resumed_from": outcome.resumed_from, "bad_rows": len(found), "ranks": ranks.count, "device": device_name(ranks.device),
             "metrics": run.keeper.metrics, "kept_step": run.keeper.step, "curve": outcome.curve, "transfer": moved, "splits": work.split_text,  # type: ignore[attr-defined]
             "started_at": began, "spec_hash": work.key}
    if ranks.first:
        bundle.save(storage.join(work.uri, "bundle"), task, fitted.modality, parent=fitted.start, training=facts, spec_hash=work.key,
                    metrics=run.keeper.metrics)  # type: ignore[attr-defined]
        checkpoint.clear(storage.join(work.uri, "checkpoints"))
    return facts


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


class _Trace:
    """Appends {step, rows} lines; a resumed run appends to what is there (the last line of a step counts)."""

    def __init__(self, uri: str):
        self.uri = uri
        if storage.is_remote(uri):
            raise ValueError(f"train.trace_rows writes to a local folder; storage is {uri}")

    def __call__(self, step: int, rows: np.ndarray) -> None:
        with open(self.uri, "a") as file:
            file.write(json.dumps({"step": step, "rows": rows.tolist(), "pid": os.getpid()}) + "\n")


def import_checkpoint(stage: SourceStage) -> dict[str, Any]:
    """The bundle of a source that has no data: an existing checkpoint, brought into a bundle. Returns the report's facts."""
    spec = stage.spec
    if stage.bundle_uri == spec.backbone.name.partition(":")[2]:
        found = bundle.load(stage.bundle_uri)
        return {"source": stage.name, "backbone": found.manifest["arch"]["name"], "objective": found.manifest["objective"]["name"], "steps": 0, "rows": 0,
                "seconds": 0.0, "rows_per_second": 0.0, "metrics": found.manifest.get("metrics", {}), "transfer": "the bundle itself", "splits": "none",
                "curve": [], "ranks": 0, "device": "none", "spec_hash": stage.key}
    text = spec.init or spec.backbone.name
    start = starts.read(text, spec.backbone.name)
    began = time.time()
    arch, modality = start.arch, start.modality
    if arch is None or modality is None:
        arch, modality = starts.described(spec.backbone.name, dict(spec.backbone.options))
    backbone = bundle.build_backbone(arch)
    moved = bundle.transfer(backbone, start.tensors, start.origin, start.drop)
    facts = {"source": stage.name, "backbone": arch["name"], "objective": "none (checkpoint)", "steps": 0, "rows": 0, "rows_per_second": 0.0,
             "seconds": round(time.time() - began, 2), "metrics": {}, "transfer": moved.text(), "splits": "none", "curve": [], "ranks": 0,
             "device": "none", "spec_hash": stage.key}
    bundle.save(stage.bundle_uri, backbone, modality, parent=text, training=facts, spec_hash=stage.key, metrics={})
    return facts

