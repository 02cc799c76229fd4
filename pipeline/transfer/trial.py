"""One trial: the training loop of pretraining on the rows of a target.

It starts from the weights of a source or from random ones. This module does not use Ray.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.provenance import ProvenanceRecord
from pipeline.config.schema import Target, Train, with_hyper_parameters
from pipeline.core.contracts import (
    Backbone,
    Ensemble,
    FinishedTrial,
    Objective,
    Task,
    Technique,
    adapts_at_test,
    trains,
)
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    is_calibrated,
    reads_texts,
    rollout_metrics,
    target_metrics,
    transfers_head,
)
from pipeline.core.contracts.technique_capabilities import (
    LABELLED_SOURCE,
    adapts_without_labels,
    describes_classes,
    keeps_modules,
    reads_source,
)
from pipeline.core.metrics.catalog import Predictions, metric
from pipeline.core.metrics.label_sets import scored
from pipeline.core.rng import mix
from pipeline.core.specs import NO_OBJECTIVE, Architecture, ModalitySpec, ObjectiveSpec, Spec
from pipeline.data.manifests import Selection
from pipeline.data.plan import Plan
from pipeline.data.stream import (
    Decoder,
    Rows,
    check_bad_row_budget,
    eval_batches,
    plan_of,
    rows_per_item,
)
from pipeline.io import atomic_folder, checksums, file_identity, heartbeat, storage, write_fence
from pipeline.io.file_identity import FileIdentity
from pipeline.io.json_values import JsonObject
from pipeline.io.threads import threaded_map
from pipeline.io.wording import plural
from pipeline.report import results, stats
from pipeline.report.results import SOURCE_VALIDATION, VALIDATION, ResultRow
from pipeline.report.trial_folder import uri_of_bundle
from pipeline.report.trial_record import TrialRecord, curve_of
from pipeline.train import evaluate, experiment, loop, resume_history, streams
from pipeline.train.experiment import Experiment
from pipeline.train.pretrain import device_name, shuffle_of, steps_of
from pipeline.train.ranks import Ranks, default_device
from pipeline.train.row_checks import Finding
from pipeline.transfer import label_sets
from pipeline.transfer.grid import (
    SCRATCH,
    BackboneGroup,
    Trial,
    fraction_text,
    label_subset,
    made_by,
    trial_made_by,
)

EVAL_ROWS = 256
"""Rows of a batch in validation and test."""
MAX_ERROR_CHARACTERS = 2000
"""An error is cut at this length in a trial's record."""
AT_THRESHOLD = (
    "f1_at_threshold",
    "precision_at_threshold",
    "sensitivity_at_threshold",
    "specificity_at_threshold",
)
"""Metrics of test rows only, because their threshold is chosen on the validation rows."""
RECORD, PREDICTIONS = "record.json", "predictions.npz"
WHEN_DAMAGED = "the trial counts as not done, and the next run makes it again"
"""What happens to a trial with a damaged file."""


@dataclass
class TargetData:
    """A target as one backbone group reads it: decoded splits, and the fitted objective."""

    spec: Target
    objective: ObjectiveSpec
    train: Rows
    validation: Rows
    test: Rows
    labels: np.ndarray | None
    """(n_train,) class numbers, for stratified label fractions and scores."""
    groups: np.ndarray | None
    """(n_test,) group numbers of the test rows, in the order of their ids."""
    split_text: str
    arch: Architecture
    """The architecture of the backbone group, for the input as this target is read."""
    modality: ModalitySpec
    key: str = ""
    """Key of how the rows are read. Results that were computed from the rows once are stored under
    it.
    """
    reads: tuple[FileIdentity, ...] = ()
    """Files that trials read, where the rows are not in memory or a technique reads them again. No
    record is written when one of them has changed.
    """
    findings: tuple[Finding, ...] = ()
    """Findings about its rows from before training, for terminal and report."""
    unlabelled: Rows | None = None
    """Rows of ``targets.x.unlabelled``."""
    num_left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of rows of each split that were left out before any was decoded."""

    def check_bad_rows(
        self, split: str, bad: Iterable[tuple[int, str]], num_drawn: int | None = None
    ) -> None:
        """Raise TooManyBadRowsError where too many rows of a split are bad.

        Args:
            split: train, validation or test.
            bad: Row id and reason of those that could not be read.
            num_drawn: As in `check_bad_row_budget`.
        """
        rows: Rows = getattr(self, split)
        budget, left_out = self.spec.data.max_bad_rows, self.num_left_out.get(split, 0)
        check_bad_row_budget(bad, len(rows), budget, rows.selection, left_out, num_drawn)

    @property
    def without_labels(self) -> Rows:
        """Rows that techniques read without labels: those given for it, or the training rows."""
        return streams.unlabelled(self.train) if self.unlabelled is None else self.unlabelled

    @property
    def in_memory(self) -> bool:
        return self.train.arrays is not None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the primary one first."""
        kind = registry.get("objective", self.objective.name)
        options = kind.options_class(**self.objective.options)
        declared = target_metrics(kind, options, self.objective.state)
        primary = (
            self.spec.metric
            if self.spec.metric and self.spec.metric not in self.test_metrics
            else declared[0]
        )
        return (primary, *(name for name in declared if name != primary))

    @property
    def test_metrics(self) -> tuple[str, ...]:
        """Names of metrics of test rows only, the one that the target names first."""
        kind = registry.get("objective", self.objective.name)
        options = kind.options_class(**self.objective.options)
        declared = rollout_metrics(kind, options, self.objective.state)
        return tuple(sorted(declared, key=lambda name: name != self.spec.metric))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of entity types, or of classes or labels in the order of the scores' columns."""
        state = self.objective.state
        return tuple(map(str, state.get("types", state.get("labels", ()))))


@dataclass
class Shared:
    """The data that all trials read, put into the object store once and read without a copy."""

    job: str
    root: str
    seed: int
    backbone_groups: dict[str, BackboneGroup]
    weights: dict[str, dict[str, np.ndarray]]
    parents: dict[str, str]
    targets: dict[tuple[str, str], TargetData]
    keep_bundles: bool
    source_keys: dict[str, str] = field(default_factory=dict)
    spec_hash: str | None = None
    """Hash of the job."""
    git_sha: str | None = None
    """The commit of this code, where it is in a Git checkout."""
    run: str | None = None
    """Random id of this run, written into each record to tell its trials from earlier ones."""
    heads: dict[str, tuple[ObjectiveSpec, dict[str, np.ndarray]]] = field(default_factory=dict)
    """Objective and head's tensors of each source, for objectives that reuse them."""
    fences: tuple[write_fence.Fence, ...] = ()
    """Locks of this run: a trial checks that they are still held before it writes."""
    parent_weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each source's weights, which a trial records as the weights it started from.
    """
    keep_changes_alone: bool = False
    """Whether bundles hold what differs from the bundle of their source."""
    remake: bool = False
    """Whether resume points of other code or versions are dropped, since trials are made again."""
    source_rows: dict[str, tuple[Selection, dict[str, str]]] = field(default_factory=dict)
    """Training rows of each source with their columns, where a technique reads them."""
    source_reads: dict[str, tuple[FileIdentity, ...]] = field(default_factory=dict)
    """Files of these rows, by source. They too are as they were when a record is written."""
    source_validation: dict[str, Selection] = field(default_factory=dict)
    """Validation rows of each source, with the same columns."""


@dataclass(frozen=True)
class TrialSummary:
    """What a trial reports of its training. Baselines and trials that failed report less of it."""

    steps: int | None = None
    stopped_at: int | None = None
    """The step after which ``train.patience`` ended it; None: it did not."""
    seconds: float | None = None
    device: str | None = None
    n_train: int | None = None
    """Training rows whose labels were used."""
    params_trained: int | None = None
    layers_trained: str | None = None
    padding_share: float | None = None
    """Share of positions that are padding (0 to 1), where batches are cut by cost."""
    start_weights: str | None = None
    """Hash of the weights that it started with."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were chosen or fitted on validation rows."""
    curve: Sequence[Mapping[str, Any]] = ()
    """Step and metrics of each validation."""
    kept_step: int | None = None
    skipped_steps: int = 0
    resumed_from: int = 0
    transfer: str = ""
    """Which tensors were copied from the source, and other notes."""
    begun_by: Sequence[ProvenanceRecord] = ()
    """Other code and versions that trained earlier parts of it."""


def is_without_labels(trial: Trial) -> bool:
    """Return whether a trial trains and no label of its target may be read before the test."""
    return trial.label_fraction == 0 and trains(trial.technique_object)


def data_of(trial: Trial, shared: Shared) -> TargetData:
    """Return the target of a trial, with the validation rows by which the trial is chosen.

    They are those of the target. Where no label of the target may be read they are those of the
    source, or none if it has none.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    if not is_without_labels(trial):
        return data
    selection = shared.source_validation.get(trial.source)
    if selection is None:
        return replace(data, validation=data.validation.subset(np.zeros(0, dtype=np.int64)))
    return replace(data, validation=_labelled_source(trial, shared, selection, training=False))


def _labelled_source(
    trial: Trial, shared: Shared, selection: Selection, training: bool = True
) -> Rows:
    """Return rows of a source with their labels as the target numbers them.

    Rows of a class that the target lacks are left out.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    _, columns = shared.source_rows[trial.source]
    objective, _ = shared.heads[trial.source]
    match = label_sets.compare(objective.state, data.objective.state)
    decoder = Decoder(
        data.train.modality,
        objective.name,
        objective.state,
        columns,
        training=training,
        relabel=label_sets.Relabel(match),
    )
    return Rows(label_sets.shared_rows(selection, columns, objective, match), decoder)


def folder_uri(shared: Shared, trial: Trial) -> str:
    """Return the URI of a trial's folder."""
    return storage.join(shared.root, trial.folder)


def checkpoint_folder(shared: Shared, trial: Trial) -> str:
    """Return the folder of a trial's resume points."""
    return experiment.checkpoint_folder(folder_uri(shared, trial))


def read_record(root: str, folder: str) -> TrialRecord | None:
    """Return the record of a trial, or None where it is missing or, with a warning, damaged.

    Args:
        root: The folder of the job.
        folder: That of the trial, relative to it.
    """
    uri = storage.join(root, folder, RECORD)
    stored = checksums.document_or_none(uri, WHEN_DAMAGED)
    if stored is None:
        return None
    try:
        record = TrialRecord.from_json(stored)
    except ValueError as error:
        checksums.notify(f"{uri} is damaged: {error}: {WHEN_DAMAGED}")
        return None
    rows = tuple(row.as_read_in(root, folder) for row in record.rows)
    return replace(record, rows=rows)


def read_records(root: str, folders: Mapping[str, str]) -> dict[str, TrialRecord]:
    """Return a dict from trial id to record, for the trials that have one.

    Several are read at the same time. A damaged record is left out with a warning.

    Args:
        root: The folder of the job.
        folders: Folder of each trial, relative to that of the job, by trial id.
    """
    records = zip(
        folders,
        threaded_map(lambda folder: read_record(root, folder), folders.values()),
        strict=True,
    )
    return {trial_id: record for trial_id, record in records if record is not None}


def is_complete(root: str, folder: str, record: TrialRecord) -> bool:
    """Return whether the predictions that the record names exist and are undamaged.

    Damaged ones cause a warning.
    """
    return PREDICTIONS not in record.files or _predictions(root, folder, record) is not None


def _predictions(root: str, folder: str, record: TrialRecord | None) -> bytes | None:
    """Return the bytes of a trial's predictions, or None where they are missing or damaged.

    Damaged ones cause a warning. Predictions of an old record, which has no checksums, are not
    checked.
    """
    uri = storage.join(root, folder, PREDICTIONS)
    entry = record.files.get(PREDICTIONS) if record is not None else None
    try:
        data = storage.read_bytes(uri)
        if entry is not None:
            checksums.check_bytes(uri, data, entry)
    except storage.NotFoundError:
        if entry is not None:
            checksums.notify(f"{uri} is gone: {WHEN_DAMAGED}")
        return None
    except storage.DamagedError as error:
        checksums.notify(f"{error}: {WHEN_DAMAGED}")
        return None
    return data


class BuiltBackbone:
    """A backbone with the weights that several trials start from, and a hash of these so far."""

    def __init__(self, backbone: Backbone):
        self.backbone, self.digest = backbone, hashlib.sha256()
        _add_weights(self.digest, "backbone", backbone)


def build_task(
    trial: Trial,
    shared: Shared,
    technique: Technique | None = None,
    built: BuiltBackbone | None = None,
) -> tuple[Task, str, str]:
    """Build the task that a trial starts with.

    Args:
        technique: The trial's technique, which may keep what it reads of finished trials; None: a
            new one.
        built: Its backbone, where another trial has built it: a large one takes a second.

    Returns:
        The task, a description of the tensors that came from the source, and a hash of its weights.

    Raises:
        ValueError: The trial uses no label of the target, and the source's head lacks some.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    seed = mix(shared.seed, trial.seed)
    objective = objective_of(trial, shared)
    if built is None:
        task = bundle.build_task(data.arch, objective, seed=seed, head_seed=mix(seed, 1))
    else:
        task = bundle.add_head(built.backbone, objective, mix(seed, 1))
    if trial.combines_trials:
        records = [_record_of_member(shared, one) for one in trial.members]
        technique = technique or trial.technique_object
        task.load_state_dict(technique.after_fanout([_finished(one) for one in records]))
        counts = Counter(results.technique(one.rows[0]) for one in records)
        parts = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        num_labelled = len(labelled_rows(trial, shared))
        most = max(len(labelled_rows(one, shared)) for one in trial.members)
        if num_labelled > most:
            parts += f"; {num_labelled} labelled rows in all, at most {most} of one trial"
        return task, f"weights made of finished trials ({parts})", weights_hash(task)
    if trial.source == SCRATCH:
        return task, "new backbone and head (scratch)", weights_hash(task, built)
    backbone_note = "the backbone of another trial"
    if built is None:
        weights = _tensors(shared.weights[trial.source])
        backbone_note = bundle.transfer(task.backbone, weights, trial.source).text()
    num_kept, head_note = 0, "new head"
    technique = trial.technique_object
    is_untrained = not trains(technique)
    uses_no_labels = is_untrained or is_without_labels(trial)
    if transfers_head(task.objective):
        source_objective, arrays = shared.heads[trial.source]
        num_kept, head_note = bundle.carry_tensors(
            task.objective, source_objective, _tensors(arrays)
        )
    elif is_untrained or adapts_without_labels(technique):
        num_kept, head_note = _start_head(trial, shared, task.objective, technique)
        if uses_no_labels and 0 < num_kept < len(data.label_names):
            num_kept, head_note = 0, f"it lacks some of the target's labels; {head_note}"
    if uses_no_labels and not num_kept:
        raise ValueError(
            f"{trial.technique.name}: nothing of the head of source {trial.source} fits this "
            f"target ({head_note}): it can only be fine-tuned"
        )
    return task, f"{backbone_note}; {head_note}", weights_hash(task, built)


def _start_head(
    trial: Trial, shared: Shared, objective: Objective, technique: Technique
) -> tuple[int, str]:
    """Load the head that a source gives without training.

    It has the source's weights of labels with the same names, or weights that are computed from
    texts about the classes.

    Returns:
        How many labels have weights, and a description of what was done.
    """
    source_objective, arrays = shared.heads[trial.source]
    if describes_classes(technique) and _reads_texts(source_objective):
        source = source_task(trial, shared)
        assert source is not None
        return label_sets.head_of_texts(objective, source.objective, technique.class_texts)
    return label_sets.carry_head(objective, source_objective, _tensors(arrays))


def _reads_texts(objective: ObjectiveSpec) -> bool:
    has_objective = objective.name != NO_OBJECTIVE.name
    return has_objective and reads_texts(registry.get("objective", objective.name))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def source_task(trial: Trial, shared: Shared) -> Task | None:
    """Return the source's network with its own head; None where it has no head (a checkpoint).

    Its backbone is built for the input of the target.
    """
    objective, head = shared.heads.get(trial.source, (NO_OBJECTIVE, {}))
    if objective.name == NO_OBJECTIVE.name:
        return None
    task = bundle.build_task(
        shared.targets[trial.target, trial.backbone_key].arch, objective, seed=0
    )
    bundle.transfer(task.backbone, _tensors(shared.weights[trial.source]), trial.source)
    task.objective.load_state_dict(_tensors(head))
    return task.eval()


def _record_of_member(shared: Shared, member: Trial) -> TrialRecord:
    record = read_record(shared.root, member.folder)
    if record is None:
        raise ValueError(f"trial {member.name} has no record, so it cannot be combined")
    return record


def _finished(record: TrialRecord) -> FinishedTrial:
    """Return a finished trial for `Technique.after_fanout`. Its weights are read when needed."""
    row = record.rows[0]

    def weights() -> dict[str, torch.Tensor]:
        if record.status != "done" or row.bundle_uri is None:
            raise ValueError(
                f"{row.technique} seed {row.seed} (trial {record.trial_id}), whose weights are "
                "needed, failed or kept no bundle"
            )
        return bundle.load(row.bundle_uri).tensors

    return FinishedTrial(
        technique=row.technique,
        seed=row.seed,
        hyper_parameters=row.settings,
        validation=record.validation,
        weights=weights,
    )


def weights_hash(task: Task, built: BuiltBackbone | None = None) -> str:
    """Return a hash of a network's parameters and buffers, of 12 hex digits.

    Args:
        built: Its backbone, which need not be read again.
    """
    digest = (built or BuiltBackbone(task.backbone)).digest.copy()
    _add_weights(digest, "objective", task.objective)
    return digest.hexdigest()[:12]


def _add_weights(digest: Any, name: str, part: torch.nn.Module) -> None:
    """Add the parameters and buffers of a part of a network to a hash, by their full names."""
    for own_name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name}.{own_name}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def without_failed_members(trial: Trial, shared: Shared) -> tuple[Trial, list[str]]:
    """Return a trial without those of its members that failed, and a note that names these.

    Raises:
        ValueError: Fewer than two remain.
    """
    records = read_records(shared.root, {one.id: one.folder for one in trial.members})
    failed = [one for one in trial.members if one.id in records and _has_failed(records[one.id])]
    if not failed:
        return trial, []
    members = tuple(one for one in trial.members if one not in failed)
    names = ", ".join(f"{one.technique.name} seed {one.seed}" for one in failed)
    if len(members) < 2:
        raise ValueError(
            f"{trial.technique.name} combines at least two trials, and {len(members)} of the "
            f"{len(trial.members)} that it takes ended well (failed or diverged: {names})"
        )
    return replace(trial, members=members), [f"left out, as they failed: {names}"]


def _has_failed(record: TrialRecord) -> bool:
    """Return whether a trial failed, or its primary metric on validation rows is NaN."""
    values = [row.value for row in record.rows if row.split == "validation"]
    return record.failed or (bool(values) and values[0] is not None and math.isnan(values[0]))


def labelled_rows(trial: Trial, shared: Shared) -> np.ndarray:
    """Return the positions of the training rows whose labels a trial uses.

    Those of a trial that combines others are the rows of all of them together. Below a label
    fraction of 1 each seed has other rows.
    """
    if trial.combines_trials:
        return np.unique(np.concatenate([labelled_rows(one, shared) for one in trial.members]))
    if is_without_labels(trial) or not trains(trial.technique_object):
        return np.zeros(0, dtype=np.int64)
    data = shared.targets[trial.target, trial.backbone_key]
    seed = mix(shared.seed, trial.seed)
    return label_subset(data.train, data.labels, trial.label_fraction, seed)


def objective_of(trial: Trial, shared: Shared) -> ObjectiveSpec:
    """Return the objective of a trial; where it has class weights, with the trial's own counts.

    The labelled rows may have other shares of the classes than all training rows: 20 labels per
    class are balanced already.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    state = data.objective.state
    if data.labels is None or "counts" not in state:
        return data.objective
    rows = labelled_rows(trial, shared)
    if len(rows) in (0, len(data.labels)):
        return data.objective
    counts = np.bincount(data.labels[rows], minlength=len(state["counts"]))
    return replace(data.objective, state={**state, "counts": counts.tolist()})


def resolve_training(trial: Trial, shared: Shared) -> tuple[Train, Rows, int]:
    """Return the training settings of a trial, its labelled rows and its number of steps.

    The batch is never larger than the rows. With a frozen backbone rows are not augmented; where
    its features are cached, all rows cost the same, so a ``batch_cost`` becomes a number of rows.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    technique = trial.technique_object
    train, rows = data.spec.train, data.train
    if not trains(technique):
        batch = min(train.global_batch, len(rows))
        return train.model_copy(update={"global_batch": batch}), rows, 0
    if is_without_labels(trial):
        rows = data.without_labels
    else:
        rows = rows.subset(labelled_rows(trial, shared))
    train = with_hyper_parameters(train, trial.train_settings)
    batch = train.global_batch
    changes: dict[str, Any] = {}
    if technique.frozen:
        changes["augment"] = False
        if train.batch_cost is not None and _caches_features(data):
            assert data.train.costs is not None
            mean_cost = max(float(data.train.costs.mean()), 1e-9)
            batch = max(1, round(train.batch_cost / mean_cost))
            changes["batch_cost"] = None
    train = train.model_copy(update={**changes, "global_batch": min(batch, len(rows))})
    steps = steps_of(train, order_of(trial, shared, train, rows))
    return train, rows, technique.steps(steps)


def _caches_features(data: TargetData) -> bool:
    """Return whether the features of a frozen backbone are computed once for all trials."""
    objective = registry.get("objective", data.objective.name)
    return data.in_memory and not data.spec.workers and has_cached_head(objective)


def order_of(trial: Trial, shared: Shared, train: Train, rows: Rows) -> Plan:
    """Return the order in which a trial reads its training rows.

    It is made as that of a source is, but rows in memory are fully permuted unless the job states
    another order.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    objective = registry.get("objective", data.objective.name)
    options = objective.options_class(**data.objective.options)
    shards = streams.canonical_shards(train, data.spec.workers, options)
    shuffle = shuffle_of(data.spec.data, rows.selection)
    if data.in_memory and data.spec.data.shuffle == "auto":
        shuffle = "rows"
    return plan_of(
        rows,
        mix(shared.seed, trial.seed, 2),
        train.global_batch,
        train.batch_cost,
        shards=shards,
        shuffle=shuffle,
        # the order does not depend on it
        item_rows=256 if data.in_memory else rows_per_item(rows, shards),
    )


Report = Callable[[int, int, dict[str, float]], None]
"""Called with the step, the total number of steps, and the validation metrics."""


def run(
    trial: Trial,
    shared: Shared,
    ranks: Ranks | None = None,
    report: Report = lambda step, steps, metrics: None,
    on_step: Callable[[], None] = heartbeat.beat,
) -> TrialRecord:
    """Train and validate, and write the record. A final trial is also tested, once.

    A trial that was killed continues from its newest resume point. The resume points are removed
    when the record is written.

    Returns:
        The record.

    Raises:
        TooManyBadRowsError: More rows of a streamed target cannot be decoded than its budget
            allows.
    """
    ranks = ranks or Ranks(device=default_device())
    began = time.time()
    trial, failed_members = without_failed_members(trial, shared)
    data, folder = data_of(trial, shared), folder_uri(shared, trial)
    technique = trial.technique_object  # one for the whole trial: it may have a state
    train, rows, steps = resolve_training(trial, shared)
    if reads_source(technique):
        technique.read_source(source_task(trial, shared))
    task, transfer_note, start_hash = build_task(trial, shared, technique)
    plan = order_of(trial, shared, train, rows)
    history = history_of(folder, [trial], shared, plan)
    if ranks.is_first:
        history.drop_incompatible(shared.remake)
    has_labels = not is_without_labels(trial)
    finished = experiment.run(
        Experiment(
            task=task,
            technique=technique,
            technique_seed=mix(shared.seed, trial.seed, 4),
            train=train,
            steps=steps,
            seed=mix(shared.seed, trial.seed, 3),
            rows=rows,
            plan=plan,
            validation=data.validation,
            metrics=data.metrics,
            eval_batch=EVAL_ROWS,
            max_bad_rows=data.spec.data.max_bad_rows,
            # rows without labels are another set, of which none was left out
            num_left_out=data.num_left_out if has_labels else {},
            split_rows=len(data.train) if has_labels else None,
            folder=folder,
            log_folder=folder,
            stream_rows=_stream_rows(trial, shared),
            # few labels make a small batch, and alignment needs a large one
            stream_batch=with_hyper_parameters(data.spec.train, trial.train_settings).global_batch,
            has_labels=has_labels,
            restart_if_damaged=True,
            on_start=history.start,
            on_validation=report,
            on_step=on_step,
        ),
        ranks,
    )
    task, test, frames = finished.task, None, None
    if trial.stage == "final":
        may_calibrate = trial.label_fraction != 0 or is_without_labels(trial)
        task, test, frames = predict_test(task, technique, data, train, ranks, may_calibrate)
    bad_rows = {row: why for (split, row), why in finished.bad_rows.items() if split == "train"}
    rows_left_out = _rows_left_out(data, test, rows, bad_rows)
    notes = [transfer_note, *failed_members, *rows_left_out, *finished.damaged]
    num_labelled = len(labelled_rows(trial, shared))
    ran = finished.metadata
    summary = TrialSummary(
        steps=ran["steps"],
        stopped_at=ran.get("stopped_at"),
        seconds=finished.outcome.seconds_before + time.time() - began,
        device=device_name(ranks.device),
        n_train=num_labelled - len(bad_rows) if num_labelled else 0,
        params_trained=ran["params_trained"],
        layers_trained=ran["layers_trained"],
        padding_share=ran.get("padding_share"),
        start_weights=start_hash,
        settings={**ran.get("chosen", {}), **calibration_of(task.objective)},
        curve=ran["curve"],
        kept_step=ran["kept_step"],
        skipped_steps=ran["skipped_steps"],
        resumed_from=ran["resumed_from"],
        transfer="; ".join(notes),
        begun_by=history.others,
    )
    record = make_record(trial, shared, train, began, summary, finished.metrics, test)
    if ranks.is_first:
        reads = [*data.reads]
        if {"source", LABELLED_SOURCE} & {*technique.streams()}:
            reads += shared.source_reads.get(trial.source, ())
        file_identity.check_unchanged(reads)
        is_kept = shared.keep_bundles and trial.stage == "final" and not isinstance(task, Ensemble)
        return write_results(trial, shared, record, test, task if is_kept else None, frames)
    return record


def history_of(
    folder: str, trials: list[Trial], shared: Shared, plan: Plan | None = None
) -> resume_history.ResumeHistory:
    """Return the history of the resume points of trials that differ only in seeds and settings.

    Args:
        plan: The order of their rows, where it may differ from that of the resume points.
    """
    first = trials[0]
    spec = shared.targets[first.target, first.backbone_key].spec
    now = made_by(spec, shared.backbone_groups[first.backbone_key], first.technique)
    weights = shared.parent_weights.get(first.source)
    # the other settings of a plan are part of a trial's id
    order = f"{plan.rows} rows, shuffled by {plan.shuffle}" if plan else ""
    ids = [trial.id for trial in trials]
    return resume_history.ResumeHistory(folder, now, weights, ids, order)


def _stream_rows(trial: Trial, shared: Shared) -> dict[str, Rows]:
    """Return the rows that the trial's technique may read (``Technique.streams``)."""
    data = shared.targets[trial.target, trial.backbone_key]
    out = {"target": data.train if data.unlabelled is None else data.unlabelled}
    if trial.source in shared.source_rows:
        selection, columns = shared.source_rows[trial.source]
        out["source"] = Rows(selection, Decoder(data.train.modality, None, {}, columns))
        if LABELLED_SOURCE in trial.technique_object.streams():
            out[LABELLED_SOURCE] = _labelled_source(trial, shared, selection)
    return out


def predict_test(
    task: Task,
    technique: Technique,
    data: TargetData,
    train: Train,
    ranks: Ranks,
    may_calibrate: bool,
) -> tuple[Task, Predictions, np.ndarray | None]:
    """Adapt to the test rows, calibrate on the validation rows, then predict each test row once.

    Args:
        technique: Its technique, which may adapt it to the test rows.
        may_calibrate: False where the labels of the validation rows may not be used.

    Returns:
        The task as it was tested, the predictions of all ranks, and pictures of a policy's first
        episode, where there are some.
    """
    preprocess = evaluate.device_preprocessing(data.test, task.objective)
    autocast = partial(loop.autocast, train, ranks.device)
    inputs = partial(streams.test_inputs, data.test, preprocess, ranks, EVAL_ROWS)
    if adapts_at_test(technique):
        task = technique.at_test(task, inputs)
    objective: Any = task.objective
    if may_calibrate and is_calibrated(objective) and len(data.validation):
        batches = _batches(data.validation, ranks)
        validation = evaluate.predictions(task, batches, preprocess, ranks, autocast())
        validation = evaluate.Postprocessor(data.validation)(task.objective, validation)
        objective.calibrate(evaluate.gather_predictions(validation, ranks))
    bad: list[tuple[int, str]] = []
    batches = _batches(data.test, ranks)
    test = evaluate.predictions(task, batches, preprocess, ranks, autocast(), bad.extend)
    # each rank has read a part of the rows, and the budget is of all of them
    bad = list(itertools.chain.from_iterable(evaluate.gather_objects(bad, ranks)))
    data.check_bad_rows("test", bad)
    test, frames = evaluate.Postprocessor(data.test).rollout_evaluation(task, test)
    return task, evaluate.gather_predictions(test, ranks), frames


def _rows_left_out(
    data: TargetData, test: Predictions | None, rows: Rows, bad_rows: Mapping[int, str]
) -> list[str]:
    """Return sentences on the test and training rows that could not be read.

    Args:
        bad_rows: Id of each such training row, with the reason.
    """
    notes = []
    if test is not None and len(test["row"]) < len(data.test):
        missing = len(data.test) - len(test["row"])
        notes.append(f"{plural(missing, 'test row')} could not be read")
    if bad_rows:
        row, reason = min(bad_rows.items())
        first = f"{rows.selection.manifest.location(row)}: {reason}"
        more = ", ..." if len(bad_rows) > 1 else ""
        notes.append(f"{plural(len(bad_rows), 'training row')} left out ({first}{more})")
    return notes


def _batches(rows: Rows, ranks: Ranks):
    part = rows.part(ranks.rank, ranks.count)
    return eval_batches(part, EVAL_ROWS, pin=ranks.device.type == "cuda")


def make_record(
    trial: Trial,
    shared: Shared,
    train: Train | None,
    began: float,
    summary: TrialSummary,
    validation: dict[str, float],
    test: Predictions | None,
    status: str = "done",
    error: str | None = None,
) -> TrialRecord:
    """Make the record of a trial: its results rows, its curve and the settings that were used.

    The rows have no gains yet: these are computed when all trials have ended.

    Args:
        train: Its training settings; None for a baseline.
        began: When it began, in seconds since 1970.
        summary: What it reports of its training.
        test: Predictions of the test rows; None: they were not read.
        status: "done", "failed" or "pruned".
        error: Why it failed or was stopped.
    """
    # without the validation rows of a source, which may be what cannot be read
    data = shared.targets[trial.target, trial.backbone_key]
    error = None if error is None else storage.without_secrets(error)
    parent = shared.parents.get(trial.source)
    template = ResultRow(
        job=shared.job,
        source=trial.source,
        backbone=trial.backbone,
        target=trial.target,
        objective=data.objective.name,
        technique=trial.technique.name,
        hyper_parameters=json.dumps(_all_settings(trial, train, data, summary), sort_keys=True),
        seed=trial.seed,
        label_fraction=fraction_text(trial.label_fraction, data.spec.objective.name),
        trial_id=trial.id,
        trial_stage=trial.stage,
        status=status,
        error=error,
        n_train=summary.n_train,
        params_trained=summary.params_trained,
        layers_trained=summary.layers_trained,
        steps=summary.steps,
        seconds=summary.seconds,
        device=summary.device,
        parent_uri=None if parent is None else storage.without_secrets(parent),
        spec_hash=shared.spec_hash,
        git_sha=shared.git_sha,
        started_at=datetime.fromtimestamp(began, UTC),
        modality=data.spec.data.modality.name,
        fold=data.spec.fold,
        trial_folder=trial.folder,
    )
    rows = _test_rows(data, template, test) if test else []
    if validation:
        split = SOURCE_VALIDATION if is_without_labels(trial) else VALIDATION
        rows += _validation_rows(data_of(trial, shared), template, validation, split)
    made = trial_made_by(trial, data.spec, shared.backbone_groups[trial.backbone_key])
    return TrialRecord(
        trial_id=trial.id,
        cell=trial.entry,
        status=status,
        error=error,
        rows=tuple(rows or [template]),
        validation=validation,
        curve=curve_of(summary.curve),
        transfer=summary.transfer,
        kept_step=summary.kept_step,
        skipped_steps=summary.skipped_steps,
        resumed_from=summary.resumed_from,
        parent_weights=shared.parent_weights.get(trial.source),
        run=shared.run,
        made_by=made.made_by,
        versions=made.versions,
        begun_by=tuple(summary.begun_by),
    )


def _all_settings(
    trial: Trial, train: Train | None, data: TargetData, summary: TrialSummary
) -> JsonObject:
    """Return the settings of a trial as the results table has them."""
    settings: JsonObject = dict(trial.hyper_parameters)
    if train is not None:
        settings |= _training_settings(train, data, summary)
    settings |= summary.settings
    if summary.stopped_at:
        settings["stopped_at"] = summary.stopped_at
    if trial.technique.options:
        settings["technique"] = trial.technique.options
    return settings


def _training_settings(train: Train, data: TargetData, summary: TrialSummary) -> JsonObject:
    """Return the settings of the training loop that a record lists."""
    settings: JsonObject = {
        "lr": train.lr,
        "global_batch": train.global_batch,
        "weight_decay": train.weight_decay,
        "optimizer": train.optimizer,
        "steps": summary.steps,
        "start_weights": summary.start_weights,
    }
    if train.batch_cost:
        settings |= {
            "batch_cost": train.batch_cost,
            "global_batch": None,
            "padding_share": summary.padding_share,
        }
    if "normalization" in data.objective.state:
        settings["normalization"] = data.objective.state["normalization"]
    return settings


def _test_rows(data: TargetData, template: ResultRow, test: Predictions) -> list[ResultRow]:
    """Return a results row for each metric of the test rows, with its interval."""
    groups = groups_of(data, test)
    num_rows = len(test["row"])
    rows: list[ResultRow] = []
    for name, value in compute_test_metrics(data, test).items():
        scorer = metric(name, data.label_names)
        low, high = stats.interval(scorer, test, groups=groups)
        row = replace(
            template,
            metric=name,
            value=value,
            value_low=low,
            value_high=high,
            higher_is_better=scorer.higher_is_better,
            split="test",
            n_eval=num_rows,
            n_units=num_rows if groups is None else len(np.unique(groups)),
            interval="95% bootstrap over test " + ("rows" if groups is None else "groups"),
        )
        rows.append(row)
    return rows


def _validation_rows(
    data: TargetData, template: ResultRow, validation: Mapping[str, float], split: str
) -> list[ResultRow]:
    """Return a results row for each metric of the validation rows, the primary one first."""
    return [
        replace(
            template,
            metric=name,
            value=validation[name],
            higher_is_better=metric(name, data.label_names).higher_is_better,
            split=split,
            n_eval=len(data.validation),
        )
        for name in data.metrics
    ]


def compute_test_metrics(data: TargetData, test: Predictions) -> dict[str, float]:
    """Return the test values by metric, the primary one first.

    After them come the values of single labels (``auroc/Effusion``) where a metric averages over
    labels: of every label that some test rows have and some do not.

    Raises:
        ValueError: No label has as many positive rows as the average needs.
    """
    if "min_positives" in test:
        scored(test, strict=True)
    names = (*data.test_metrics, *data.metrics)
    if data.spec.metric in data.metrics:
        names = (*data.metrics, *data.test_metrics)
    if "threshold" in test:
        names = (*names, *AT_THRESHOLD)
    values = evaluate.compute_metrics(test, names)
    for per_label in (metric(name).per_label for name in data.metrics):
        if per_label is not None:
            of_labels = per_label.values(test, data.label_names)
            values |= {f"{per_label.name}/{label}": value for label, value in of_labels.items()}
    return values


def calibration_of(objective: Objective) -> dict[str, float]:
    """Return the temperature and threshold that were fitted on the validation rows."""
    return {
        name: objective.state[name]
        for name in ("temperature", "threshold")
        if name in objective.state
    }


def groups_of(data: TargetData, test: Predictions | None) -> np.ndarray | None:
    """Return the (n,) groups of the test rows that were predicted; None: they have none."""
    if data.groups is None or test is None:
        return None
    test_ids = data.test.selection.all_ids
    return data.groups[np.searchsorted(test_ids, test["row"])]


def failed_record(
    trial: Trial,
    shared: Shared,
    error: str | Exception,
    status: str = "failed",
    validation: dict[str, float] | None = None,
    summary: TrialSummary | None = None,
) -> TrialRecord:
    """Write the record of a trial that failed, so that the results table has its row."""
    if isinstance(error, Exception):
        error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
    data = shared.targets[trial.target, trial.backbone_key]
    # not checked: it may be what failed
    train = data.spec.train.model_copy(update=trial.train_settings)
    record = make_record(
        trial,
        shared,
        None if trial.is_baseline else train,
        time.time(),
        summary or TrialSummary(),
        validation or {},
        None,
        status,
        error,
    )
    return write_results(trial, shared, record, None, None)


def write_results(
    trial: Trial,
    shared: Shared,
    record: TrialRecord,
    test: Predictions | None,
    task: Task | None,
    rollout_frames: np.ndarray | None = None,
) -> TrialRecord:
    """Write predictions, pictures (``rollout_frames``) and bundle first, and the record last.

    A trial with a record is therefore complete. Its resume points are then removed; those of a
    failed trial are kept, since the next run tries it again. Returns the record as it is written.
    """
    data = shared.targets[trial.target, trial.backbone_key]
    folder = folder_uri(shared, trial)
    if test is not None:
        arrays: dict[str, Any] = dict(test)
        if data.groups is not None:
            arrays["group"] = groups_of(data, test)
        if data.label_names:
            arrays["label_names"] = np.array(data.label_names)
        if rollout_frames is not None:
            arrays["film"] = rollout_frames
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        content = buffer.getvalue()
        storage.write_bytes(storage.join(folder, PREDICTIONS), content)
        record = replace(record, files={PREDICTIONS: atomic_folder.entry_of_bytes(content)})
    if task is not None:
        uri = uri_of_bundle(shared.root, trial.folder)
        bundle.save(
            uri,
            task,
            data.modality,
            base=_base_of(trial, shared),
            parent=shared.parents.get(trial.source),
            spec_hash=trial.id,
            metrics=record.validation,
            made_by=record.made_by,
            columns=data.spec.data.columns,
            technique=Spec.from_json(trial.drawn_technique.model_dump(mode="json"))
            if keeps_modules(trial.technique_object)
            else None,
            training={"trial": trial.entry, "seed": trial.seed},
        )
        record = replace(record, rows=tuple(replace(row, bundle_uri=uri) for row in record.rows))
    checksums.write_document(storage.join(folder, RECORD), record.to_json())
    if not record.failed:
        resume_history.clear(folder)
    return record


def _base_of(trial: Trial, shared: Shared) -> bundle.Base | None:
    """Return the bundle to which a trial's bundle holds the difference; None: it holds all weights.

    It holds all where a technique's modules stay in the network: the tensors then have other names
    than those of the source.
    """
    source = trial.source
    if keeps_modules(trial.technique_object):
        return None
    if not shared.keep_changes_alone or source not in shared.parent_weights:
        return None
    weights = _tensors(shared.weights[source])
    return bundle.Base(shared.parents[source], shared.parent_weights[source], weights)


def read_test_predictions(root: str, rows: Iterable[ResultRow]) -> dict[str, stats.RunPredictions]:
    """Return the test predictions of the finished final trials of these rows, by trial id.

    Trials whose predictions are missing or damaged are left out.

    Args:
        root: The folder of the job.
    """
    runs: dict[str, stats.RunPredictions] = {}
    for trial_id, row in {row.trial_id: row for row in rows if row.is_tested}.items():
        run = read_predictions(root, row.folder, row.seed)
        if run is not None:
            runs[trial_id] = run
    return runs


def read_predictions(root: str, folder: str, seed: int) -> stats.RunPredictions | None:
    """Return the test predictions of a finished trial, for paired intervals.

    Returns None where they are missing or, with a warning, damaged.

    Args:
        root: The folder of the job.
        folder: That of the trial, relative to it.
    """
    data = _predictions(root, folder, read_record(root, folder))
    if data is None:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    rows, groups, rollout_frames = (
        arrays.pop("row"),
        arrays.pop("group", None),
        arrays.pop("film", None),
    )
    labels = tuple(arrays.pop("label_names", np.zeros(0, str)).tolist())
    return stats.RunPredictions(rows, arrays, seed, groups, labels, rollout_frames=rollout_frames)
