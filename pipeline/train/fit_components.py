"""The modality of a corpus: fitted on its rows, or a checkpoint's that is extended to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.checkpoints import bundle, pretrained
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Source, Target, spec_hash
from pipeline.core.capabilities import (
    check_known_share,
    columns_of,
    extends_state,
    file_roles,
    ineffective_options,
    reports_coverage,
)
from pipeline.core.contracts import Arrays, Modality, Objective
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import ModalitySpec, State
from pipeline.data import manifests
from pipeline.data.manifests import Selection, Splits
from pipeline.io import checksums, file_identity, storage

FIT_ROWS, FIT_TEXT_BYTES = 2048, 64 << 20


def options_by_content(kind: str, component: ComponentConfig) -> dict[str, Any]:
    """Return the options of a component with a hash of content in place of paths.

    The same tokenizer in another folder is then the same option.

    Raises StorageError when a path does not exist.
    """
    paths = registry.path_options(kind, component.name)

    def content_hash(path: str, names: tuple[str, ...]) -> str:
        files = [storage.join(path, name) for name in names] or [path]
        required, *optional = files
        hashes: list[str | None] = [file_identity.fingerprint(required)]
        for file in optional:
            exists = file == required or storage.exists(file)
            hashes.append(file_identity.fingerprint(file) if exists else None)
        return spec_hash(hashes)

    return {
        name: content_hash(value, paths[name]) if value and name in paths else value
        for name, value in component.options.items()
    }


def sample(
    selection: Selection, columns: list[str], rows: int, strata: list[str] | None = None
) -> pa.Table:
    """Return up to ``rows`` rows, evenly spread.

    With ``strata`` (columns) the rows are drawn at random with a fixed seed, and one row is added
    for each combination of their values that was missed, at most ``rows`` of them. Even steps could
    miss all rows of a value where values alternate.
    """
    n = len(selection)
    indices = evenly_spread(n, rows)
    if strata and n > rows:
        codes = [
            manifests.group_numbers(column.cast(pa.string()).fill_null(""))
            for column in manifests.read_columns(selection, strata).itercolumns()
        ]
        _, first, which = np.unique(np.stack(codes), axis=1, return_index=True, return_inverse=True)
        indices = np.random.default_rng(0).choice(n, rows, replace=False)
        missed = np.delete(first, np.unique(which.reshape(-1)[indices]))
        indices = np.union1d(indices, missed[:rows])
    return manifests.Reader(selection.manifest, columns).take(selection.ids(indices))


def fit_modality(
    spec: Source,
    rows: Selection,
    checkpoint: pretrained.PretrainedCheckpoint | None,
    place: str,
    path: str,
    most_rows: int | None = None,
) -> tuple[ModalitySpec, str]:
    """Return a source's modality: the checkpoint's, or one that is fitted on the training rows.

    Args:
        checkpoint: The checkpoint that it starts from; None: there is none.
        place: The source in the job file, for errors.
        path: Where the fitted state is kept, so that a restart does not fit again.
        most_rows: Fit on at most so many rows and keep nothing: an estimate for ``--dry-run``.

    Returns:
        The modality as its bundle has it, and a description of what a checkpoint's modality knows
        of these rows (`extend_modality`), "" without a checkpoint.

    Raises:
        ValueError: The job contradicts the checkpoint.
    """
    assert spec.data is not None
    component, columns = spec.data.modality, spec.data.columns
    objective = registry.get("objective", spec.objective.name) if spec.objective else Objective
    if checkpoint and checkpoint.modality:
        modality = _checkpoint_modality(component, checkpoint.modality, checkpoint.origin, place)
        return extend_modality(modality, rows, objective, columns)
    kind = registry.get("modality", component.name)
    if problem := ineffective_options(kind, component.options):
        raise ValueError(f"{place}.data.modality: {problem}")
    saved = checksums.document_or_none(path, "it is fitted again")
    if saved is not None:
        return ModalitySpec.from_json(saved), ""
    options = kind.options_class(**component.options)
    most = FIT_ROWS
    if objective.packed:  # a tokenizer needs many documents, as many as a bounded memory holds
        bytes_per_row = max(1, rows.manifest.num_bytes // max(1, rows.manifest.num_rows))
        most = max(FIT_ROWS, FIT_TEXT_BYTES // bytes_per_row)
    most = min(most, most_rows or most)
    names = fitted_columns(kind, objective, columns)
    table = sample(rows, names, most, strata_of(kind, columns))
    state = kind.fit(options, table, columns, spec.backbone.name)
    stated = {**options.model_dump(), **options_by_content("modality", component)}
    fitted = ModalitySpec(component.name, stated, state)
    if most_rows is None:
        checksums.write_document(path, fitted.to_json())
    return fitted, ""


def _checkpoint_modality(
    component: ComponentConfig, modality: ModalitySpec, origin: str, place: str
) -> ModalitySpec:
    """Return a checkpoint's modality with the options that the job states.

    Raises ValueError where the job contradicts the checkpoint, named ``origin``.
    """
    if modality.name != component.name:
        raise ValueError(f"{place}: {origin} reads {modality.name}, the data are {component.name}")
    theirs = modality.options
    stated = options_by_content("modality", component)
    kind = registry.get("modality", component.name)
    if problem := ineffective_options(kind, stated, theirs):
        raise ValueError(f"{place}.data.modality: {problem}")
    paths = registry.path_options("modality", component.name)
    contradictions: dict[str, Any] = {}
    for name, value in stated.items():
        if name in kind.target_options:
            continue
        # an option that the checkpoint does not have is free, but its tokenizer is its own
        default = None if name in paths else value
        if theirs.get(name, default) != value:
            contradictions[name] = component.options[name]
    if contradictions:
        raise ValueError(
            f"{place}.data.modality: {contradictions} contradicts {origin} ({theirs}); leave it out"
        )
    return replace(modality, options={**theirs, **stated})


def label_columns(spec: Source | Target) -> list[str]:
    """Return the columns that an objective is fitted on: not those of files (masks)."""
    assert spec.data is not None and spec.objective is not None
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    modality = registry.get("modality", spec.data.modality.name)
    files = file_roles(modality)
    roles = (*objective.roles, *objective.optional_roles)
    return columns_of([role for role in roles if role not in files], columns)


def encode_labels(objective: str, state: State, rows: Selection, columns: dict[str, str]) -> Arrays:
    """Return the labels of rows as an objective encodes them."""
    kind = registry.get("objective", objective)
    names = columns_of((*kind.roles, *kind.optional_roles), columns)
    return kind.encode(manifests.read_columns(rows, names), columns, state)


def fit_objective(spec: Source | Target, splits: Splits) -> State:
    """Return the state of an objective, fitted on the label columns of all training rows.

    All label fractions share it: they have the same classes, or mean and deviation of regression.
    """
    assert spec.data is not None and spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    table = manifests.read_columns(splits.train, label_columns(spec))
    return objective.fit(options, table, spec.data.columns)


def extend_modality(
    modality: ModalitySpec, rows: Selection, objective: type[Objective], columns: dict[str, str]
) -> tuple[ModalitySpec, str]:
    """Extend a fitted modality with a sample of other rows than it was fitted on (`ExtendsState`).

    Returns:
        The modality, and a description of how much of these rows it knew (`ReportsCoverage`).

    Raises:
        ValueError: It knows nothing of these rows.
    """
    built = bundle.build_modality(modality)
    if not extends_state(built) and not reports_coverage(built):
        return modality, ""
    names = fitted_columns(type(built), objective, columns)
    table = sample(rows, names, FIT_ROWS, strata_of(type(built), columns))
    check_known_share(built, table, columns)
    state = built.extend_state(table, columns) if extends_state(built) else built.state
    coverage = built.coverage(table, columns) if reports_coverage(built) else ""
    return replace(modality, state=state), coverage


def fitted_roles(modality: type[Modality]) -> tuple[str, ...]:
    """Return the roles that a modality is fitted on, unless the objective predicts them."""
    if extends_state(modality):
        return modality.fit_roles
    return (*modality.roles, *modality.optional_roles)


def fitted_columns(
    modality: type[Modality], objective: type[Objective], columns: dict[str, str]
) -> list[str]:
    """Return the columns that a modality is fitted on.

    A modality that names its own roles (`ExtendsState`) reads those even where the objective
    predicts them; of others, what is predicted (a mask that moves with its image) is left out.
    """
    roles = fitted_roles(modality)
    if not extends_state(modality):
        roles = [
            role for role in roles if role not in (*objective.roles, *objective.optional_roles)
        ]
    return columns_of(roles, columns)


def strata_of(modality: type[Modality], columns: dict[str, str]) -> list[str]:
    """Return the columns whose values must all be in the sample (`ExtendsState.strata`)."""
    roles = modality.strata if extends_state(modality) else ()
    return columns_of(roles, columns)
