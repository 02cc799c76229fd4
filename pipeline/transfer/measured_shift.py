"""Measures the shift of a target against one source, and of its test rows against its training
rows, in the features of the source's network. `pipeline.transfer.shift` has the comparisons.

The first is measured with the scores, before any trial, and reads no test row. The second reads
labels of test rows and is measured when the trials have ended.
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

MOST_ROWS = 1000
"""Rows of each side that are compared, evenly spread."""
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
    """(n, Z) what its head says of the target's labelled rows."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows of a target of which the labels may be read."""

    features: np.ndarray
    """(n, D), in the source's network."""
    labels: np.ndarray | None
    """(n,) class numbers where rows have one class; None otherwise."""
    names: tuple[str, ...]
    """Classes by number."""
    groups: np.ndarray | None = None
    """(n,) groups, where the target names any."""
    missing: str = ""
    """Why there are no labels, or nothing that the source's head says of them."""
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
    roles = (*kind.roles, *kind.optional_roles)
    names = [*dict.fromkeys(columns[role] for role in roles if role in columns)]
    labels = kind.encode(manifests.read_columns(selection, names), columns, state)["label"]
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
    found = groups_of(selection, column)
    return None if found is None else len(np.unique(found))


def shift_from_source(
    data: TargetData,
    source: SourceSide,
    labelled: LabelledRows,
    backbone: Backbone,
    device: torch.device,
) -> Shift:
    """Return the shift of a target's training rows against a source.

    All labels of the training rows are counted for the shares of classes, also where trials may use
    a few of them, but none where they may use none.
    """
    found = Shift(f"source {source.name}", "training rows")
    group = group_column(data)
    if group or source.group:
        found = replace(found, counted=NOTE_GROUPS if source.group else NOTE_UNGROUPED_SOURCE)
    own = group_count(data.train.selection, group) if source.label_counts else None
    found = _with_labels(found, data, source.label_counts, own, source.group_count)
    found = _with_concept(found, source, labelled)
    if source.features is None or source.rows is None:
        return _with_missing(found, "covariate", "the source's rows are not there")
    train = _spread(data.train)
    known = None if labelled.ids is None else (labelled.ids, labelled.features)
    ids, of_train = _features(backbone, train, device, known)
    groups = groups_of(train.selection, group, ids)
    found = _with_covariate(found, (of_train, groups), (source.features, source.groups))
    own_rows = (train.selection, data.spec.data.columns)
    return replace(found, drift=drift(train.modality, own_rows, source.rows, (group, source.group)))


def train_test_shift(
    data: TargetData, source: str, backbone: Backbone, device: torch.device
) -> Shift:
    """Return the shift of a target's test rows against its training rows.

    Labels of test rows are read, so nothing may be chosen after it.

    Args:
        source: Whose network the backbone is.
    """
    train, test = (_spread(rows) for rows in (data.train, data.test))
    group = group_column(data)
    found = Shift("its own training rows", "test rows", features_of=source, within_target=True)
    if group:
        found = replace(found, counted=NOTE_GROUPS)
    sides = []
    for rows in (train, test):
        ids, features = _features(backbone, rows, device)
        sides.append((features, groups_of(rows.selection, group, ids), ids))
    (of_train, train_groups, train_ids), (of_test, test_groups, test_ids) = sides
    found = _with_covariate(found, (of_test, test_groups), (of_train, train_groups))
    columns = data.spec.data.columns
    rows, others = (test.selection, columns), (train.selection, columns)
    found = replace(found, drift=drift(train.modality, rows, others, (group, group)))
    if data.labels is None or data.labels.ndim != 1 or not data.label_names:
        why = "rows have no single class"
        return _with_missing(_with_missing(found, "labels", why), "concept", why)
    if not any(data.spec.label_fractions):
        why = NO_LABELS
        return _with_missing(_with_missing(found, "labels", why), "concept", why)
    of_all = _class_labels(data, data.test.selection)
    changes = shift.label_shift(
        class_counts(of_all, data.label_names),
        class_counts(data.labels, data.label_names),
        group_count(data.test.selection, group),
        group_count(data.train.selection, group),
    )
    found = replace(found, labels=changes)
    train_labels = _class_labels(data, train.selection, train_ids)
    test_labels = _class_labels(data, test.selection, test_ids)
    try:
        concept = _concept_within(
            (of_train, train_labels), (of_test, test_labels, test_groups), len(data.label_names)
        )
    except ValueError as error:
        return _with_missing(found, "concept", str(error))
    return replace(found, concept=concept)


def group_column(data: TargetData) -> str | None:
    """Return the column of a target's groups; packed rows have none."""
    group = data.spec.data.group
    schema = data.train.selection.manifest.schema if group else None
    return group if schema is not None and group in schema.names else None


def _class_labels(
    data: TargetData, selection: Selection, ids: np.ndarray | None = None
) -> np.ndarray:
    """Return the (n,) class numbers of rows."""
    kind = registry.get("objective", data.objective.name)
    columns = data.spec.data.columns
    names = [
        *dict.fromkeys(columns[r] for r in (*kind.roles, *kind.optional_roles) if r in columns)
    ]
    ids = selection.all_ids if ids is None else ids
    table = manifests.Reader(selection.manifest, names).take(ids)
    return kind.encode(table, columns, data.objective.state)["label"]


def _concept_within(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    classes: int,
) -> Estimate:
    """Return the accuracy on test rows of a head fitted to them minus that of one of training rows.

    Both are fitted to the same number of rows: more rows alone make a better head.

    Args:
        train: (n, D) features and (n,) class numbers of training rows.
        test: The same of test rows, and their groups.
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
    """Return at most MOST_ROWS rows, evenly spread."""
    n = len(rows)
    return rows if n <= MOST_ROWS else rows.subset(evenly_spread(n, MOST_ROWS))


def _features(
    backbone: Backbone,
    rows: Rows,
    device: torch.device,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of rows and their features, in the order of ids. Labels are not read.

    Args:
        known: Ids and features that need not be computed again; of other rows too.
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
        new, found, _ = features_of_ids(backbone, rows, device)
        fine = torch.isfinite(found).all(1).cpu().numpy()
        ids.append(new[fine])
        parts.append(found.cpu().numpy()[fine])
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    return all_ids[order], np.concatenate(parts)[order]


def _with_missing(measured: Shift, what: str, reason: str) -> Shift:
    return replace(measured, missing={**measured.missing, what: reason})


_Side = tuple[np.ndarray, np.ndarray | None]
"""(n, D) features, and (n,) groups where there are any."""


def _with_covariate(found: Shift, rows: _Side, others: _Side) -> Shift:
    try:
        return replace(
            found,
            covariate=shift.domain_classifier_accuracy(rows[0], others[0], rows[1], others[1]),
        )
    except ValueError as error:
        return _with_missing(found, "covariate", str(error))


def _with_labels(
    found: Shift,
    data: TargetData,
    others: Mapping[str, int],
    groups: int | None,
    other_groups: int | None,
) -> Shift:
    if not any(data.spec.label_fractions):
        return _with_missing(found, "labels", NO_LABELS)
    own = class_counts(data.labels, data.label_names)
    changes = shift.label_shift(own, others, groups, other_groups)
    if changes:
        return replace(found, labels=changes)
    return _with_missing(
        found, "labels", "rows have no single class on both sides with the same names"
    )


def _with_concept(found: Shift, source: SourceSide, labelled: LabelledRows) -> Shift:
    """Compare both heads on the labelled rows of the classes that both sides have."""
    shared = [name for name in labelled.names if name in source.label_names]
    if source.probabilities is None or labelled.labels is None or len(shared) < 2:
        why = labelled.missing or "the source's head does not predict the same classes"
        return _with_missing(found, "concept", why)
    theirs = [source.label_names.index(name) for name in shared]
    ours = np.full(len(labelled.names), -1)
    ours[[labelled.names.index(name) for name in shared]] = np.arange(len(shared))
    labels = ours[labelled.labels]
    kept = labels >= 0
    try:
        estimate = shift.concept_shift(
            labelled.features[kept],
            labels[kept],
            source.probabilities[kept][:, theirs],
            None if labelled.groups is None else labelled.groups[kept],
        )
    except ValueError as error:
        return _with_missing(found, "concept", str(error))
    return replace(found, concept=estimate)


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
        _read(selection, {name: theirs[role] for role, name in columns.items()})
        for selection, theirs in (rows, others)
    ]
    both = pa.concat_tables(tables, promote_options="permissive")
    counts = None
    if any(groups):
        counts = (_observations(rows[0], groups[0]), _observations(others[0], groups[1]))
    return shift.feature_drift(modality.single_features(both, columns), len(tables[0]), counts)


def _observations(selection: Selection, group: str | None) -> int:
    """Return the number of groups among the rows of a side that are compared, or of these rows."""
    ids = selection.ids(evenly_spread(len(selection), MOST_ROWS))
    found = groups_of(selection, group, ids)
    return len(ids) if found is None else len(np.unique(found))


def _read(selection: Selection, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of at most MOST_ROWS rows, under other names.

    Args:
        columns: The column's own name by its new name.
    """
    at = evenly_spread(len(selection), MOST_ROWS)
    names = [*dict.fromkeys(columns.values())]
    table = manifests.Reader(selection.manifest, names).take(selection.ids(at))
    return pa.table({new: table[name] for new, name in columns.items()})
