"""Runs a trial of a baseline: a model without a network, on the rows of a target.

It reads the same labelled rows as any other trial with its seed and label fraction, is validated,
calibrated and tested in the same way, and leaves the same results. This module does not use Ray.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Arrays, Baseline, BaselineRows, Batch, LabelKind, Setting
from pipeline.core.contracts.objective_capabilities import (
    PredictsFromScores,
    is_calibrated,
    predicts_actions,
    predicts_from_scores,
)
from pipeline.core.metrics.catalog import Predictions, metric
from pipeline.core.ragged import concatenate_padded, pad
from pipeline.core.rng import mix
from pipeline.data.loader import Loader
from pipeline.data.manifests import Reader
from pipeline.data.plan import Item
from pipeline.data.stream import Rows
from pipeline.io import file_identity, heartbeat
from pipeline.io.wording import plural
from pipeline.report.trial_record import TrialRecord
from pipeline.train import evaluate
from pipeline.transfer import trial as trials
from pipeline.transfer.grid import Trial, label_subset
from pipeline.transfer.trial import Shared, TrialSummary

BLOCK_ROWS = 512
"""Rows that are read at once."""
MIN_PROBABILITY = 1e-6
"""Probabilities are at least this, and at most 1 minus it, so that logarithms are finite."""

Scores = Callable[[Any], np.ndarray]
"""Computes (n, C) float32 from inputs of n rows: logarithms of probabilities, log odds, numbers, or
vectors.
"""


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split that can be read."""

    ids: np.ndarray
    """(n,) int64."""
    inputs: Any
    """What `Baseline.inputs` returned, of all rows."""
    labels: np.ndarray
    """As the objective encodes them."""
    bad: tuple[tuple[int, str], ...]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """Further tensors that the objective reads (`PredictsActions`), rows first."""


def baseline_of(trial: Trial) -> Baseline:
    """Return the baseline with the options that the job gives it."""
    kind = registry.get("baseline", trial.technique.name)
    return kind(kind.options_class(**trial.technique.options))


def run(trial: Trial, shared: Shared) -> TrialRecord:
    """Fit each setting, keep the best on validation, and test it once.

    Returns:
        The record, which has been written.

    Raises:
        TooManyBadRowsError: More rows of a streamed target cannot be decoded than its budget
            allows.
    """
    began = time.time()
    data = shared.targets[trial.target, trial.backbone_key]
    baseline, seed = baseline_of(trial), mix(shared.seed, trial.seed)
    objective = bundle.build_task(data.arch, data.objective, seed=0).objective
    assert predicts_from_scores(objective)
    rows = data.train.subset(label_subset(data.train, data.labels, trial.label_fraction, seed))
    train = read(rows, baseline, objective)
    data.check_bad_rows("train", train.bad, len(rows))
    validation = read(data.validation, baseline, objective)
    data.check_bad_rows("validation", validation.bad)
    chosen = choose(baseline, objective, train, validation, data.metrics, mix(seed, 5) % (1 << 32))
    calibrated = objective  # another name, since `is_calibrated` narrows its type
    if is_calibrated(calibrated):
        calibrated.calibrate(chosen.predictions)
    test = read(data.test, baseline, objective)
    data.check_bad_rows("test", test.bad)
    predictions = predict(objective, chosen.scores(test.inputs), test)
    predictions, frames = roll_out(baseline, chosen.scores, objective, predictions, data.test)
    notes = [f"{trial.technique}: no network, fitted on {plural(len(train.ids), 'row')}"]
    if test.bad:
        notes.append(f"{plural(len(test.bad), 'test row')} could not be read")
    summary = TrialSummary(
        seconds=time.time() - began,
        device="cpu",
        n_train=len(train.ids),
        settings={**chosen.setting, **trials.calibration_of(objective)},
        transfer="; ".join(notes),
    )
    record = trials.make_record(trial, shared, None, began, summary, chosen.metrics, predictions)
    file_identity.check_unchanged(data.reads)
    return trials.write_results(trial, shared, record, predictions, None, frames)


# ---------------------------------------------------------------- rows


def read(rows: Rows, baseline: Baseline, objective: Any) -> SplitRows:
    """Read a split as the baseline does, some rows at a time."""
    ids, inputs, labels, bad = [], [], [], []
    tensors: dict[str, list[np.ndarray]] = {}
    read_column = _ColumnReader(rows)
    for block_ids, arrays, reasons in _blocks(rows):
        heartbeat.beat()
        bad += [(int(row), why) for row, why in zip(block_ids, reasons, strict=True) if why]
        good = np.array([not why for why in reasons], dtype=bool)
        arrays = {name: array[good] for name, array in arrays.items()}
        ids.append(block_ids[good])
        if predicts_actions(objective):
            batch = {name: t.numpy() for name, t in rows.modality.collate(arrays).items()}
            actions = batch[objective.label_tensor]
            arrays[objective.label_tensor] = np.where(batch["mask"][..., None], actions, np.nan)
            for name in objective.action_tensors:
                tensors.setdefault(name, []).append(batch[name])
        labels.append(arrays.pop(objective.label_tensor))
        columns = partial(read_column, ids[-1])
        count, positions = len(ids[-1]), None
        if objective.label_kind == "position_classes":
            labels[-1] = pad(labels[-1], fill=-1)
        if _has_positions(objective):
            positions = _is_labelled(labels[-1])
            count = int(positions.sum())
        block = BaselineRows(count, arrays, rows.modality, columns, positions)
        inputs.append(baseline.inputs(block))
    all_tensors = {name: np.concatenate(parts) for name, parts in tensors.items()}
    return SplitRows(
        np.concatenate(ids), _joined(inputs), concatenate_padded(labels), tuple(bad), all_tensors
    )


def _blocks(rows: Rows) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], list[str]]]:
    """Yield ids, decoded arrays, and for each row "" or why it cannot be read."""
    loader = Loader(rows.selection, rows.decoder) if rows.arrays is None else None
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(rows))
        if loader is not None:
            block = loader(Item(-1, start, stop))
            yield block.rows, block.arrays, list(block.bad)
        else:
            assert rows.arrays is not None
            arrays = {name: array[start:stop] for name, array in rows.arrays.items()}
            yield rows.selection.ids(np.arange(start, stop)), arrays, [""] * (stop - start)


class _ColumnReader:
    """Reads the columns of a modality as they are stored, but no labels."""

    def __init__(self, rows: Rows):
        self.manifest = rows.selection.manifest
        roles = (*rows.modality.roles, *rows.modality.optional_roles)
        given = rows.decoder.columns
        self.columns = {role: given[role] for role in roles if role in given}
        self.readers: dict[str, Reader] = {}

    def __call__(self, ids: np.ndarray, role: str) -> Any:
        if role not in self.columns:
            return None
        name = self.columns[role]
        if role not in self.readers:
            self.readers[role] = Reader(self.manifest, [name])
        return self.readers[role].take(ids)[name]


def _joined(parts: list[Any]) -> Any:
    """Return lists or arrays of rows as one."""
    if isinstance(parts[0], list):
        return list(itertools.chain.from_iterable(parts))
    return np.concatenate(parts)


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Chosen:
    """The setting with the best validation value, and its model."""

    setting: Setting
    scores: Scores
    metrics: dict[str, float]
    predictions: Predictions
    """Predictions of the validation rows."""


def _has_positions(objective: PredictsFromScores) -> bool:
    """Return whether each position of a row has a label of its own."""
    return objective.label_kind in ("position_classes", "actions")


def _is_labelled(labels: np.ndarray) -> np.ndarray:
    """Return (n, M) bool, which positions of the rows have a label: a class, or an action."""
    return labels >= 0 if labels.ndim == 2 else ~np.isnan(labels[..., 0])


def choose(
    baseline: Baseline,
    objective: PredictsFromScores,
    train: SplitRows,
    validation: SplitRows,
    metrics: tuple[str, ...],
    seed: int,
) -> Chosen:
    """Fit every setting and return the best one on validation; of equal ones the first."""
    transformer = baseline.transformer()
    transform = transformer.fit(train.inputs).transform if transformer else lambda rows: rows
    train_inputs, validation_inputs = transform(train.inputs), transform(validation.inputs)
    sign = 1 if metric(metrics[0]).higher_is_better else -1
    fitted: Any = objective  # its protocol does not name the state, which every objective has
    has_classes = objective.label_kind in ("classes", "position_classes")
    classes = len(fitted.state["labels"]) if has_classes else 0
    labels = train.labels
    if _has_positions(objective):
        labels = labels[_is_labelled(labels)]
    best, best_value = None, -np.inf
    for setting in baseline.settings():
        heartbeat.beat()
        scores = fit(baseline, setting, seed, objective.label_kind, train_inputs, labels, classes)
        predictions = predict(objective, scores(validation_inputs), validation)
        values = evaluate.compute_metrics(predictions, metrics)
        value = np.nan_to_num(sign * values[metrics[0]], nan=-np.inf)
        if best is None or value > best_value:
            best, best_value = (setting, scores, values, predictions), value
    assert best is not None, f"{baseline.registered_name} has no setting"
    setting, scores, values, predictions = best
    return Chosen(setting, lambda rows: scores(transform(rows)), values, predictions)


def fit(
    baseline: Baseline,
    setting: Setting,
    seed: int,
    label_kind: LabelKind,
    inputs: Any,
    labels: np.ndarray,
    classes: int,
) -> Scores:
    """Fit the baseline's estimator; where rows have label sets, one estimator for each label.

    A class without a training row has the smallest probability. Where all rows have the same class
    there is nothing to fit. A fit is not interrupted: where a single one may take longer than
    ``fanout.silence_timeout_minutes``, raise that.
    """

    def estimator() -> Any:
        return baseline.estimator(setting, seed, label_kind)

    if label_kind == "numbers":
        model = estimator().fit(inputs, labels)
        return lambda rows: np.asarray(model.predict(rows), dtype=np.float32)[:, None]
    if label_kind == "actions":
        model = estimator().fit(inputs, labels)
        # scikit-learn's dummy leaves out the axis of a single number
        width = labels.shape[1]
        return lambda rows: np.asarray(model.predict(rows), np.float32).reshape(-1, width)
    if label_kind == "identities":
        model = estimator().fit(inputs, labels)
        return lambda rows: np.asarray(model.transform(rows), dtype=np.float32)
    if label_kind in ("classes", "position_classes"):
        probabilities = _probabilities(estimator, inputs, labels, classes)
        return lambda rows: np.log(probabilities(rows)).astype(np.float32)
    by_label = [_probabilities(estimator, inputs, label, 2) for label in labels.T]

    def log_odds(rows: Any) -> np.ndarray:
        logs = [np.log(probabilities(rows)) for probabilities in by_label]
        scores = [log[:, 1] - log[:, 0] for log in logs]
        return np.stack(scores, axis=1).astype(np.float32)

    return log_odds


def _probabilities(
    estimator: Callable[[], Any], inputs: Any, labels: np.ndarray, classes: int
) -> Callable[[Any], np.ndarray]:
    """Return a function of inputs to (n, classes) probabilities, none below MIN_PROBABILITY."""
    heartbeat.beat()  # there may be many labels, each with a fit of its own
    known = np.unique(labels)
    model = estimator().fit(inputs, labels) if len(known) > 1 else None

    def probabilities(rows: Any) -> np.ndarray:
        count = rows.shape[0] if hasattr(rows, "shape") else len(rows)
        out = np.zeros((count, classes))
        if model is None:
            out[:, known] = 1.0
        else:
            out[:, model.classes_] = model.predict_proba(rows)
        return out.clip(MIN_PROBABILITY, 1 - MIN_PROBABILITY)

    return probabilities


@torch.no_grad()
def predict(objective: PredictsFromScores, scores: np.ndarray, rows: SplitRows) -> Predictions:
    """Return the objective's predictions of rows, in the order of their ids."""
    order = np.argsort(rows.ids, kind="stable")
    if _has_positions(objective):
        is_labelled = _is_labelled(rows.labels)
        of_positions = np.zeros((*is_labelled.shape, scores.shape[-1]), dtype=scores.dtype)
        of_positions[is_labelled] = scores
        scores = of_positions
    labels = torch.from_numpy(np.ascontiguousarray(rows.labels[order]))
    tensors = {name: torch.from_numpy(array[order]) for name, array in rows.tensors.items()}
    batch = Batch(rows.ids[order], torch.zeros(0), {objective.label_tensor: labels, **tensors})
    predictions = objective.predict_scores(torch.from_numpy(scores[order]), batch)
    arrays = {name: tensor.numpy() for name, tensor in predictions.items()}
    return {"row": rows.ids[order], **arrays}


def roll_out(
    baseline: Baseline,
    scores: Scores,
    objective: PredictsFromScores,
    predictions: Predictions,
    rows: Rows,
) -> tuple[Predictions, np.ndarray | None]:
    """Run a policy in the world of each row.

    Returns:
        The predictions with the episodes, and pictures of the first one. They do not change, and
        there are no pictures, where the objective predicts no actions.
    """
    if not predicts_actions(objective):
        return predictions, None

    def scores_of_steps(arrays: Arrays) -> np.ndarray:
        count = len(arrays["space"])
        is_step = np.ones((count, 1), dtype=bool)
        steps = BaselineRows(count, arrays, rows.modality, lambda role: None, is_step)
        return scores(baseline.inputs(steps))

    raw_rows = evaluate.Postprocessor(rows).raw_rows(objective, predictions["row"])
    return objective.rollout_scores(scores_of_steps, predictions, raw_rows)
