"""Whole runs of a small job without Ray: its stages in this process, from a bundle that is there
already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from toys import label_state, task_of

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.core.specs import ModalitySpec
from pipeline.data.stream import DataWorkers
from pipeline.report.results import ResultRow
from pipeline.train import launch, pretrain, source
from pipeline.train.progress import Progress
from pipeline.train.ranks import Ranks
from pipeline.transfer import baseline_trials, fanout, inference, job_state, stages, trial

COLUMNS = {"image": "picture", "label": "class"}
MODALITY = ModalitySpec("image", {"size": 32, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})


class Silent(Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(Console(quiet=True))
        self.lines: list[str] = []

    def update(self, line: str, final: bool = False) -> None:
        pass

    def note(self, line: str) -> None:
        self.lines.append(line)


def saved_vit(folder: Path, seed: int = 1, mean: float = 0.5) -> str:
    """The name of a ViT's bundle; another mean of the pixels is another backbone group."""
    task = task_of(
        "timm/test_vit", {"channels": 3, "size": 32}, "classification", label_state(), seed=seed
    )
    modality = dataclasses.replace(MODALITY, state={**MODALITY.state, "mean": [mean] * 3})
    bundle.save(str(folder), task, modality, training={"transfer": ""}, metrics={})
    return f"bundle:{folder}"


def trials_in_this_process(monkeypatch) -> list[str]:
    """Trials run one after the other, without Ray Tune, and so do scores; the ids of the trials
    that ran.
    """
    ran: list[str] = []

    def run(name, wanted, shared, spec, progress, anew=(), wait=None):
        for one in wanted:
            if one.id in anew or fanout.unfinished(shared.root, one, spec):
                ran.append(one.id)
                if one.is_baseline:
                    baseline_trials.run(one, shared)
                else:
                    trial.run(one, shared, Ranks())
        return [trial.read_record(shared.root, one.folder) for one in wanted]

    def for_pairs(function, pairs, shared, spec, wait=None):
        return [function(pair, shared) for pair in pairs]

    monkeypatch.setattr(fanout, "run", run)
    monkeypatch.setattr(fanout, "for_pairs", for_pairs)
    return ran


def sources_in_this_process(monkeypatch) -> None:
    """Sources are trained by one rank, without Ray Train; rows are decoded as they are needed."""

    def run(stage, progress, verbose, wait=None):
        if stage.done:
            return {**launch.source_metadata(stage), "cached": True}
        if stage.splits is None:
            return {**pretrain.import_checkpoint(stage), "bundle": stage.bundle_uri}
        fitted = source.prepare_source(stage)
        work = pretrain.rank_job(stage, fitted, DataWorkers(1), threads=1)
        progress.note(f"{stage.name}: {work.split_text}")
        for finding in fitted.findings:
            progress.note(finding.line(stage.name))
        data = work.data.model_copy(update={"decode": "train"})
        spec = work.spec.model_copy(update={"data": data})
        pretrain.train_rank(dataclasses.replace(work, spec=spec), Ranks())
        return launch.source_metadata(stage)

    monkeypatch.setattr(launch, "run_source", run)


def without_ray(monkeypatch) -> None:
    """Whatever a command does, it does in this process."""
    resources = {"CPU": 2.0, "GPU": 0.0, "object_store_memory": 1 << 30, "nodes": 1.0}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(launch, "start", lambda address, verbose: None)
    monkeypatch.setattr(launch, "cluster_resources", lambda: resources)
    monkeypatch.setattr(launch, "cluster", lambda wait=None: launch.Cluster([(2.0, 0.0)], 1 << 30))
    monkeypatch.setattr(inference, "map_blocks", lambda work, items, workers: map(work, items))
    sources_in_this_process(monkeypatch)
    trials_in_this_process(monkeypatch)


def job_of(
    folder: Path,
    sources: dict[str, Any],
    paths: dict[str, str],
    techniques: Sequence[str] = ("scratch", "full", "lp_ft"),
    target_names: Sequence[str] = ("task",),
    **fan,
) -> Job:
    """A job of sources and targets; a source that is a text is a bundle's URI."""
    sources = {
        name: {"backbone": of} if isinstance(of, str) else of for name, of in sources.items()
    }
    target = {
        "data": {**paths, "modality": "image", "columns": COLUMNS},
        "objective": "classification",
        "train": {"steps": 3, "global_batch": 12, "lr": 0.01, "eval_every_steps": 3},
    }
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": sources,
            "targets": dict.fromkeys(target_names, target),
            "techniques": list(techniques),
            "fanout": {"seeds": 2, **fan},
        }
    )


def changed(job: Job, **parts) -> Job:
    return Job.model_validate({**job.model_dump(mode="json"), **parts})


def primary(rows: list[ResultRow], **where) -> list[ResultRow]:
    """Test rows of the primary metric."""
    return [
        row
        for row in rows
        if row.split == "test"
        and row.metric == "accuracy"
        and all(getattr(row, k) == v for k, v in where.items())
    ]


def prepared(job: Job, *remake: str) -> job_state.JobState:
    return stages.check(job, Silent(), remake=remake)


def run_through(job: Job, *remake: str) -> tuple[job_state.JobState, list[ResultRow]]:
    state = prepared(job, *remake)
    return state, stages.collect(state, stages.finetune(state, stages.prepare_shared(state)))
