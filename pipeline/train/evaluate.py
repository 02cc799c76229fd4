"""Exact evaluation: each row once at any number of ranks, metrics from the gathered predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.capabilities import makes_views
from pipeline.core.contracts import Batch, Ensemble, Objective, RawRows, Task, Technique
from pipeline.core.contracts.objective_capabilities import (
    Postprocesses,
    UsesRawRows,
    compares_views,
    rescales_scores,
    rolls_out,
)
from pipeline.core.metrics.catalog import Predictions, metric
from pipeline.core.ragged import concatenate_padded
from pipeline.data.manifests import Reader
from pipeline.data.stream import LoadedBatch, Rows, eval_batches
from pipeline.train.ranks import Ranks

OnBad = Callable[[list[tuple[int, str]]], None]
"""Called with rows that could not be decoded, and why."""


def _ignore_bad_rows(bad: list[tuple[int, str]]) -> None:
    """Do nothing: bad rows in memory were reported when they were decoded."""


@torch.no_grad()
def predictions(
    task: Task,
    batches: Iterator[LoadedBatch],
    preprocess: Callable[[Batch, bool], Batch],
    ranks: Ranks,
    autocast: Any,
    on_bad: OnBad = _ignore_bad_rows,
) -> Predictions:
    """Predict this rank's rows, ordered by row id. The task stays in evaluation mode.

    Returns:
        What the objective predicts, each array rows first, and ``row``, the ids.
    """
    task.eval()
    # values of regression in their own unit may lose their differences in float32
    keeps_float64 = rescales_scores(
        task.member_objective if isinstance(task, Ensemble) else task.objective
    )
    parts: list[Predictions] = []
    for batch, bad, _ in batches:
        if bad:
            on_bad(bad)
        if not len(batch):
            continue
        with autocast:
            out = task.objective.predict(task.backbone, preprocess(batch.to(ranks.device), False))
        parts.append(
            {
                "row": batch.rows,
                **{name: _as_array(tensor, keeps_float64) for name, tensor in out.items()},
            }
        )
    return _by_row(concatenate(parts))


def _as_array(tensor: Tensor, keeps_float64: bool) -> np.ndarray:
    """Return a prediction as an array, floating point numbers as float32 or ``keeps_float64``."""
    is_kept = keeps_float64 and tensor.dtype == torch.float64
    if tensor.is_floating_point() and not is_kept:
        tensor = tensor.float()
    return tensor.cpu().numpy()


def concatenate(parts: list[Predictions]) -> Predictions:
    """Concatenate predictions along rows (`concatenate_padded`)."""
    names = parts[0] if parts else ()
    return {name: concatenate_padded([part[name] for part in parts]) for name in names}


class Postprocessor:
    """Adds to predictions what needs the stored columns of the rows or a simulator."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self._reader: Reader | None = None

    def __call__(self, objective: Objective, predictions: Predictions) -> Predictions:
        """Return the predictions as the objective's metrics read them."""
        if not predictions or not isinstance(objective, Postprocesses):
            return predictions
        return objective.postprocess(predictions, self.raw_rows(objective, predictions["row"]))

    def rollout_evaluation(
        self, task: Task, predictions: Predictions
    ) -> tuple[Predictions, np.ndarray | None]:
        """Return the postprocessed predictions of test rows, and pictures of a policy.

        Where the objective trains a policy, its own episodes are run in the simulator.
        """
        predictions = self(task.objective, predictions)
        if not predictions or not rolls_out(task.objective):
            return predictions, None
        raw_rows = self.raw_rows(task.objective, predictions["row"])
        return task.objective.rollout_evaluation(task.backbone, predictions, raw_rows)

    def raw_rows(self, objective: Any, ids: np.ndarray) -> RawRows:
        """Return the columns of rows that the objective reads beside its predictions."""
        decoder, manifest = self.rows.decoder, self.rows.selection.manifest
        if not isinstance(objective, UsesRawRows):
            return RawRows(pa.table({}), decoder.columns, decoder.modality)
        if self._reader is None:
            known = manifest.schema.names
            names = [name for name in decoder.column_names(objective.raw_roles) if name in known]
            self._reader = Reader(manifest, names)
        return RawRows(self._reader.take(ids), decoder.columns, decoder.modality)


def gather_objects(mine: Any, ranks: Ranks) -> list[Any]:
    """Return the objects of all ranks, the same list on every rank. Every rank must call it."""
    if ranks.count == 1:
        return [mine]
    everyone: list[Any] = [None] * ranks.count
    dist.all_gather_object(everyone, mine)
    return everyone


def gather_predictions(mine: Predictions, ranks: Ranks) -> Predictions:
    """Return the predictions of all ranks, ordered by row id. Every rank must call it."""
    return _by_row(concatenate([part for part in gather_objects(mine, ranks) if part]))


def _by_row(predictions: Predictions) -> Predictions:
    if not predictions:
        return {}
    order = np.argsort(predictions["row"], kind="stable")
    return {name: array[order] for name, array in predictions.items()}


def compute_metrics(predictions: Predictions, names: tuple[str, ...]) -> dict[str, float]:
    """Return metric values by name. Raises ValueError when nothing was predicted."""
    if not predictions:
        raise ValueError("no row of the split could be evaluated")
    return {name: metric(name).value(predictions) for name in names}


def evaluator(
    rows: Rows,
    names: tuple[str, ...],
    preprocess: Callable[[Batch, bool], Batch],
    ranks: Ranks,
    autocast: Callable[[], Any],
    batch_rows: int,
    threads: int = 1,
    on_bad: OnBad = _ignore_bad_rows,
) -> Callable[[Task], dict[str, float]]:
    """Return a function that evaluates a task on the rows of all ranks, the same on every rank.

    Args:
        rows: This rank's part of the rows (`Rows.part`).
        threads: For decoding.
        on_bad: Called with rows that could not be decoded.
    """
    postprocess = Postprocessor(rows)

    def evaluate(task: Task) -> dict[str, float]:
        is_cuda = ranks.device.type == "cuda"
        batches = eval_batches(rows, batch_rows, threads=threads, pin=is_cuda)
        mine = predictions(task, batches, preprocess, ranks, autocast(), on_bad)
        mine = postprocess(task.objective, mine)
        return compute_metrics(gather_predictions(mine, ranks), names)

    return evaluate


def training_preprocessing(
    rows: Rows, objective: Objective, technique: Technique
) -> Callable[[Batch, bool], Batch]:
    """Return `device_preprocessing`, which also adds the views that the technique compares.

    Rows with labels have no use for them, and get none.
    """
    preprocess, modality = device_preprocessing(rows, objective), rows.modality
    if not compares_views(technique):
        return preprocess
    assert makes_views(modality), "Technique.check_target refuses other modalities"
    views = technique.views()

    def with_views(batch: Batch, training: bool) -> Batch:
        if len(batch) == 0 or "label" in batch.data:
            return preprocess(batch, training)
        with torch.no_grad():
            return preprocess(modality.views(batch, views), training)

    return with_views


def device_preprocessing(
    rows: Rows, objective: Objective | None = None
) -> Callable[[Batch, bool], Batch]:
    """Return the function that augments and normalises a batch on the device.

    Where the objective compares views, the function makes those in place of the augmented rows.
    """
    modality = rows.modality
    views = objective.views() if compares_views(objective) else ()

    def preprocess(batch: Batch, training: bool) -> Batch:
        if len(batch) == 0:
            return batch
        with torch.no_grad():
            if views:
                assert makes_views(modality)
                return modality.views(batch, views)
            return modality.finish(modality.augment(batch) if training else batch)

    return preprocess
