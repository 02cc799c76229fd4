"""Measures the shift of a target against a source, and of its test rows against its training rows.

Both are measured in the features of the source's network, by the comparisons of
`pipeline.transfer.shift`. The shift against a source is measured with the scores, before any trial,
and reads no test row. That of the test rows reads their labels, so it is measured when the trials
have ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.config import registry
from pipeline.core.capabilities import has_single_features
from pipeline.core.contracts import Backbone, Modality
from pipeline.core.sampling import evenly_spread
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.stream import Rows
from pipeline.report.shift import Drift, Estimate, Shift
from pipeline.train import fit_components
from pipeline.train.online_probe import features_of_ids
from pipeline.transfer import shift
from pipeline.transfer.trial import TargetData

MAX_ROWS = 1000
"""Most rows of each side that are compared; they are evenly spread."""
CheckedRows = tuple[Selection, dict[str, str]]
NO_LABELS = "label_fractions: 0 allows no label of the target"
NOTE_GROUPS = "each group is one observation"
NOTE_UNGROUPED_SOURCE = (
    "rows of the source count as independent, since its data.group names no column: intervals may "
    "be too narrow"
)


@dataclass(frozen=True)
class SourceSide:
    """What is known of a source."""

    name: str
    rows: CheckedRows | None = None
    """Training rows with their columns; None for a checkpoint."""
    group: str | None = None
    """Column of these rows that names their group."""
    features: np.ndarray | None = None
    """(m, D) features of such rows, in its own network."""
    groups: np.ndarray | None = None
    """(m,) their groups, where it names any."""
    label_counts: dict[str, int] = field(default_factory=dict)
    """Class to number of training rows, where rows have one class."""
    group_count: int | None = None
    """Number of groups of these training rows, where it names any."""
    label_names: tuple[str, ...] = ()
    """Classes of its head."""
    probabilities: np.ndarray | None = None
    """(n, Z) probabilities that its head predicts for the target's labelled rows."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows of a target whose labels may be read."""

    features: np.ndarray
    """(n, D), in the source's network."""
    labels: np.ndarray | None
    """(n,) class numbers where rows have one class; None otherwise."""
    names: tuple[str, ...]
    """Classes by number."""
    groups: np.ndarray | None = None
    """(n,) groups, where the target names any."""
    missing: str = ""
    """Why there are no labels, or no predictions of the source's head."""
    ids: np.ndarray | None = None
    """(n,) ids of the rows, where features are those of rows."""


def class_counts(labels: np.ndarray | None, names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows of each class by its name; {} where rows have no single class."""
    if labels is None or labels.ndim != 1 or not names:
        return {}
    counts = np.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=False))


def class_counts_of_rows(
    selection: Selection, columns: dict[str, str], objective: str, state: Any
) -> dict:
    """Return the number of rows of each class of a source's training rows (`class_counts`)."""
    kind = registry.get("objective", objective)
    if "label" not in kind.roles or "label" not in columns or not state.get("labels"):
        return {}
    labels = fit_components.encode_labels(objective, state, selection, columns)["label"]
    return class_counts(labels, tuple(map(str, state["labels"])))


def groups_of(
    selection: Selection, column: str | None, ids: np.ndarray | None = None
) -> np.ndarray | None:
    """Return the (n,) groups of rows; None where no column names them.

    Args:
        ids: Of the rows; None: all of the selection.
    """
    if not column:
        return None
    ids = selection.all_ids if ids is None else ids
    return manifests.group_numbers(manifests.Reader(selection.manifest, [column]).take(ids)[column])


def group_count(selection: Selection, column: str | None) -> int | None:
    """Return the number of groups of a selection; None where no column names them."""
    groups = groups_of(selection, column)
    return None if groups is None else len(np.unique(groups))


def shift_from_source(
    data: TargetData,
    source: SourceSide,
    labelled: LabelledRows,
    backbone: Backbone,
    device: torch.device,
) -> Shift:
    """Return the shift of a target's training rows against a source.

    The shares of classes are counted on all training rows, also where trials may use the labels of
    only some of them. Where trials may use no labels, none are counted.
    """
    measured = Shift(f"source {source.name}", "training rows")
    group = group_column(data)
    if group or source.group:
        note = NOTE_GROUPS if source.group else NOTE_UNGROUPED_SOURCE
        measured = replace(measured, counted=note)
    num_groups = group_count(data.train.selection, group) if source.label_counts else None
    measured = _with_labels(measured, data, source.label_counts, num_groups, source.group_count)
    measured = _with_concept(measured, source, labelled)
    if source.features is None or source.rows is None:
        return _with_missing(measured, "the source's rows are not there", "covariate")
    train = _spread(data.train)
    known = None if labelled.ids is None else (labelled.ids, labelled.features)
    ids, of_train = features_of_rows(backbone, train, device, known)
    groups = groups_of(train.selection, group, ids)
    measured = _with_covariate(measured, (of_train, groups), (source.features, source.groups))
    own_rows = (train.selection, data.spec.data.columns)
    drifts = drift(train.modality, own_rows, source.rows, (group, source.group))
    return replace(measured, drift=drifts)


def train_test_shift(
    data: TargetData, source: str, backbone: Backbone, device: torch.device
) -> Shift:
    """Return the shift of a target's test rows against its training rows.

    Labels of test rows are read, so nothing may be chosen after it.

    Args:
        source: Name of the source whose network the backbone is.
    """
    train, test = (_spread(rows) for rows in (data.train, data.test))
    group = group_column(data)
    measured = Shift("its own training rows", "test rows", features_of=source, within_target=True)
    if group:
        measured = replace(measured, counted=NOTE_GROUPS)
    sides = []
    for rows in (train, test):
        ids, features = features_of_rows(backbone, rows, device)
        sides.append((features, groups_of(rows.selection, group, ids), ids))
    (of_train, train_groups, train_ids), (of_test, test_groups, test_ids) = sides
    measured = _with_covariate(measured, (of_test, test_groups), (of_train, train_groups))
    columns = data.spec.data.columns
    rows, others = (test.selection, columns), (train.selection, columns)
    measured = replace(measured, drift=drift(train.modality, rows, others, (group, group)))
    if data.labels is None or data.labels.ndim != 1 or not data.label_names:
        why = "rows have no single class"
        return _with_missing(measured, why, "labels", "concept")
    if not any(data.spec.label_fractions):
        return _with_missing(measured, NO_LABELS, "labels", "concept")
    all_test_labels = _class_labels(data, data.test.selection)
    changes = shift.label_shift(
        class_counts(all_test_labels, data.label_names),
        class_counts(data.labels, data.label_names),
        group_count(data.test.selection, group),
        group_count(data.train.selection, group),
    )
    measured = replace(measured, labels=changes)
    train_labels = _class_labels(data, train.selection, train_ids)
    test_labels = _class_labels(data, test.selection, test_ids)
    try:
        concept = _concept_within(
            (of_train, train_labels), (of_test, test_labels, test_groups), len(data.label_names)
        )
    except ValueError as error:
        return _with_missing(measured, str(error), "concept")
    return replace(measured, concept=concept)


def group_column(data: TargetData) -> str | None:
    """Return the column of a target's groups; packed rows have none."""
    group = data.spec.data.group
    schema = data.train.selection.manifest.schema if group else None
    return group if schema is not None and group in schema.names else None


def _class_labels(
    data: TargetData, selection: Selection, ids: np.ndarray | None = None
) -> np.ndarray:
    """Return the (n,) class numbers of rows."""
    rows = selection if ids is None else Selection(selection.manifest, ids)
    objective, columns = data.objective, data.spec.data.columns
    return fit_components.encode_labels(objective.name, objective.state, rows, columns)["label"]


def _concept_within(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    classes: int,
) -> Estimate:
    """Compare a head fitted to test rows with one fitted to training rows, on the test rows.

    Both are fitted to the same number of rows: more rows alone make a better head.

    Returns:
        The accuracy of the first head minus that of the second.

    Args:
        train: (n, D) features and (n,) class numbers of training rows.
        test: (m, D) features, (m,) class numbers and (m,) groups of test rows.
    """
    x, y = train
    features, labels, groups = test
    count = min(len(y), len(labels) * (shift.FOLDS - 1) // shift.FOLDS)
    of_test = evenly_spread(len(labels), count * shift.FOLDS // (shift.FOLDS - 1))
    of_train = evenly_spread(len(y), count)
    x, y = x[of_train].astype(np.float64), np.eye(classes)[y[of_train]]
    features, labels = features[of_test], labels[of_test]
    by_training_rows = shift.ridge_predictions(x, y, features.astype(np.float64))
    groups = None if groups is None else groups[of_test]
    return shift.concept_shift(features, labels, by_training_rows, groups)


def _spread(rows: Rows) -> Rows:
    """Return at most MAX_ROWS rows, evenly spread."""
    n = len(rows)
    return rows if n <= MAX_ROWS else rows.subset(evenly_spread(n, MAX_ROWS))


def features_of_rows(
    backbone: Backbone,
    rows: Rows,
    device: torch.device,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of rows and their features, in the order of ids. Labels are not read.

    Args:
        known: Ids and features that are computed already, also of other rows.
    """
    decoder = replace(rows.decoder, objective=None, objective_state={}, relabel=None)
    rows = replace(rows, decoder=decoder)
    wanted = rows.selection.all_ids
    ids, parts = [], []
    if known is not None:
        is_wanted = np.isin(known[0], wanted)
        ids, parts = [known[0][is_wanted]], [known[1][is_wanted]]
        rows = rows.subset(np.flatnonzero(~np.isin(wanted, known[0])))
    if len(rows):
        new_ids, features, _ = features_of_ids(backbone, rows, device)
        is_finite = torch.isfinite(features).all(1).cpu().numpy()
        ids.append(new_ids[is_finite])
        parts.append(features.cpu().numpy()[is_finite])
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    return all_ids[order], np.concatenate(parts)[order]


def _with_missing(measured: Shift, reason: str, *what: str) -> Shift:
    return replace(measured, missing={**measured.missing, **dict.fromkeys(what, reason)})


_Side = tuple[np.ndarray, np.ndarray | None]
"""(n, D) features, and (n,) groups where there are any."""


def _with_covariate(measured: Shift, rows: _Side, others: _Side) -> Shift:
    """Add how well a classifier distinguishes two samples, or why it is not known."""
    try:
        accuracy = shift.domain_classifier_accuracy(rows[0], others[0], rows[1], others[1])
    except ValueError as error:
        return _with_missing(measured, str(error), "covariate")
    return replace(measured, covariate=accuracy)


def _with_labels(
    measured: Shift,
    data: TargetData,
    others: Mapping[str, int],
    groups: int | None,
    other_groups: int | None,
) -> Shift:
    """Add the change of each class's share against other rows, or why it is not known.

    Args:
        others: Class to number of the other rows.
        groups: Number of groups of the target's training rows.
        other_groups: Number of groups of the other rows.
    """
    if not any(data.spec.label_fractions):
        return _with_missing(measured, NO_LABELS, "labels")
    own_counts = class_counts(data.labels, data.label_names)
    changes = shift.label_shift(own_counts, others, groups, other_groups)
    if changes:
        return replace(measured, labels=changes)
    return _with_missing(
        measured, "rows have no single class on both sides with the same names", "labels"
    )


def _with_concept(measured: Shift, source: SourceSide, labelled: LabelledRows) -> Shift:
    """Add how much better a head fitted to the labelled rows is than the source's head.

    Only rows of classes that both sides have are used.
    """
    shared = [name for name in labelled.names if name in source.label_names]
    if source.probabilities is None or labelled.labels is None or len(shared) < 2:
        why = labelled.missing or "the source's head does not predict the same classes"
        return _with_missing(measured, why, "concept")
    source_columns = [source.label_names.index(name) for name in shared]
    shared_number = np.full(len(labelled.names), -1)
    shared_number[[labelled.names.index(name) for name in shared]] = np.arange(len(shared))
    labels = shared_number[labelled.labels]
    is_shared = labels >= 0
    try:
        estimate = shift.concept_shift(
            labelled.features[is_shared],
            labels[is_shared],
            source.probabilities[is_shared][:, source_columns],
            None if labelled.groups is None else labelled.groups[is_shared],
        )
    except ValueError as error:
        return _with_missing(measured, str(error), "concept")
    return replace(measured, concept=estimate)


def drift(
    modality: Modality,
    rows: CheckedRows,
    others: CheckedRows,
    groups: tuple[str | None, str | None] = (None, None),
) -> tuple[Drift, ...]:
    """Compare the single features of rows, where the modality has them.

    Args:
        groups: Column of the groups of both sides, where they name any.
    """
    if not has_single_features(modality):
        return ()
    columns = {
        role: name
        for role, name in rows[1].items()
        if role in fit_components.fitted_roles(type(modality)) and role in others[1]
    }
    tables = [
        _read(selection, {name: of_side[role] for role, name in columns.items()})
        for selection, of_side in (rows, others)
    ]
    both = pa.concat_tables(tables, promote_options="permissive")
    counts = None
    if any(groups):
        counts = (_observations(rows[0], groups[0]), _observations(others[0], groups[1]))
    return shift.feature_drift(modality.single_features(both, columns), len(tables[0]), counts)


def _observations(selection: Selection, group: str | None) -> int:
    """Return the number of independent observations among the compared rows of a side.

    These are groups, or rows where no column names groups.
    """
    ids = selection.ids(evenly_spread(len(selection), MAX_ROWS))
    groups = groups_of(selection, group, ids)
    return len(ids) if groups is None else len(np.unique(groups))


def _read(selection: Selection, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of at most MAX_ROWS rows, under other names.

    Args:
        columns: The column's own name by its new name.
    """
    ids = selection.ids(evenly_spread(len(selection), MAX_ROWS))
    names = [*dict.fromkeys(columns.values())]
    table = manifests.Reader(selection.manifest, names).take(ids)
    return pa.table({new: table[name] for new, name in columns.items()})
