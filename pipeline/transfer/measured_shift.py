"""Measures the shift of a target against one source, and of its test rows against its training
rows, in the features of the source's network. `pipeline.transfer.shift` has the comparisons.
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
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.stream import Rows
from pipeline.report.shift import Drift, Shift
from pipeline.train import fit_components
from pipeline.train.online_probe import features
from pipeline.transfer import shift
from pipeline.transfer.trial import TargetData

MOST_ROWS = 1000
"""Rows of each side that are compared, evenly spread."""
CheckedRows = tuple[Selection, dict[str, str]]


@dataclass(frozen=True)
class SourceSide:
    """What is known of a source."""

    name: str
    rows: CheckedRows | None = None
    """Training rows with their columns; None for a checkpoint."""
    features: np.ndarray | None = None
    """(m, D) features of such rows, in its own network."""
    label_counts: dict[str, int] = field(default_factory=dict)
    """Class to number of training rows, where rows have one class."""
    label_names: tuple[str, ...] = ()
    """Classes of its head."""
    probabilities: np.ndarray | None = None
    """(n, Z) what its head says of the target's labelled rows."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows of a target of which the labels may be read."""

    features: np.ndarray
    """(n, D)"""
    labels: np.ndarray | None
    """(n,) class numbers where rows have one class; None otherwise."""
    names: tuple[str, ...]
    """Classes by number."""


def class_counts(labels: np.ndarray | None, names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows of each class by its name; {} where rows have no single class."""
    if labels is None or labels.ndim != 1 or not names:
        return {}
    counts = np.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=False))


def counts_of(selection: Selection, columns: dict[str, str], objective: str, state: Any) -> dict:
    """Return the number of rows of each class of a source's training rows (`class_counts`)."""
    kind = registry.get("objective", objective)
    if "label" not in kind.roles or "label" not in columns or not state.get("labels"):
        return {}
    roles = (*kind.roles, *kind.optional_roles)
    names = [*dict.fromkeys(columns[role] for role in roles if role in columns)]
    labels = kind.encode(manifests.read_columns(selection, names), columns, state)["label"]
    return class_counts(labels, tuple(map(str, state["labels"])))


def measure(
    data: TargetData,
    source: SourceSide,
    labelled: LabelledRows,
    backbone: Backbone,
    device: torch.device,
) -> list[Shift]:
    """Return the shift against the source, and that of test rows against training rows.

    Nothing is chosen by it. Of test rows only the inputs are read; of training rows all labels are
    counted for the shares of classes, also where trials may use a few of them.

    Args:
        data: The target.
    """
    train, test = (_spread(rows) for rows in (data.train, data.test))
    of_train, of_test = (_features(backbone, rows, device) for rows in (train, test))
    columns = data.spec.data.columns
    own = Shift("its own training rows", f"test rows, in the features of {source.name},")
    own = _with_covariate(own, of_test, of_train)
    mine = (train.selection, columns)
    own = replace(own, drift=drift(train.modality, (test.selection, columns), mine))
    other = Shift(f"source {source.name}", "training rows")
    other = _with_labels(_with_concept(other, source, labelled), data, source)
    if source.features is None or source.rows is None:
        return [_without(other, "covariate", "the source's rows are not there"), own]
    other = _with_covariate(other, of_train, source.features)
    return [replace(other, drift=drift(train.modality, mine, source.rows)), own]


def _spread(rows: Rows) -> Rows:
    """Return at most MOST_ROWS rows, evenly spread."""
    n = len(rows)
    if n <= MOST_ROWS:
        return rows
    return rows.subset(np.unique(np.linspace(0, n - 1, MOST_ROWS).astype(np.int64)))


def _features(backbone: Backbone, rows: Rows, device: torch.device) -> np.ndarray:
    """Return the features of rows, whose labels are not read."""
    decoder = replace(rows.decoder, objective=None, objective_state={}, relabel=None)
    found, _ = features(backbone, replace(rows, decoder=decoder), device)
    return found[torch.isfinite(found).all(1)].cpu().numpy()


def _without(found: Shift, what: str, why: str) -> Shift:
    return replace(found, missing={**found.missing, what: why})


def _with_covariate(found: Shift, rows: np.ndarray, others: np.ndarray) -> Shift:
    try:
        return replace(found, covariate=shift.told_apart(rows, others))
    except ValueError as error:
        return _without(found, "covariate", str(error))


def _with_labels(found: Shift, data: TargetData, source: SourceSide) -> Shift:
    own = class_counts(data.labels, data.label_names)
    changes = shift.label_shift(own, source.label_counts)
    if changes:
        return replace(found, labels=changes)
    return _without(found, "labels", "rows have no single class on both sides with the same names")


def _with_concept(found: Shift, source: SourceSide, labelled: LabelledRows) -> Shift:
    """Compare both heads on the labelled rows of the classes that both sides have."""
    shared = [name for name in labelled.names if name in source.label_names]
    if source.probabilities is None or labelled.labels is None or len(shared) < 2:
        return _without(found, "concept", "the source's head does not predict the same classes")
    theirs = [source.label_names.index(name) for name in shared]
    ours = np.full(len(labelled.names), -1)
    ours[[labelled.names.index(name) for name in shared]] = np.arange(len(shared))
    labels = ours[labelled.labels]
    kept = labels >= 0
    try:
        estimate = shift.concept_shift(
            labelled.features[kept], labels[kept], source.probabilities[kept][:, theirs]
        )
    except ValueError as error:
        return _without(found, "concept", str(error))
    return replace(found, concept=estimate)


def drift(modality: Modality, rows: CheckedRows, others: CheckedRows) -> tuple[Drift, ...]:
    """Compare the single features of rows, where the modality has them."""
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
    return shift.feature_drift(modality.single_features(both, columns), len(tables[0]))


def _read(selection: Selection, columns: Mapping[str, str]) -> pa.Table:
    """Return columns of at most MOST_ROWS rows, under other names.

    Args:
        columns: New name to the column's own.
    """
    n = len(selection)
    at = np.unique(np.linspace(0, n - 1, min(n, MOST_ROWS)).astype(np.int64))
    names = [*dict.fromkeys(columns.values())]
    table = manifests.Reader(selection.manifest, names).take(selection.ids(at))
    return pa.table({new: table[name] for new, name in columns.items()})
