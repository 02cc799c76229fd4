"""How a corpus is read: the modality that is fitted on some of its rows, or that a checkpoint
brings, completed by what these rows have besides.
"""

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
    extends_state,
    file_roles,
    ineffective_options,
    reports_coverage,
)
from pipeline.core.contracts import Modality, Objective
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import ModalitySpec, State
from pipeline.data import manifests
from pipeline.data.manifests import Selection, Splits
from pipeline.io import checksums, file_identity, storage

FIT_ROWS, FIT_TEXT_BYTES = 2048, 64 << 20


def options_by_content(kind: str, component: ComponentConfig) -> dict[str, Any]:
    """Return the options of a modality or objective, with what a place holds instead of the place:
    a tokenizer is the same wherever its folder lies.

    Raises StorageError when nothing is there.
    """
    places = registry.path_options(kind, component.name)

    def held(place: str, names: tuple[str, ...]) -> str:
        files = [storage.join(place, name) for name in names] or [place]
        return spec_hash(
            [
                file_identity.fingerprint(file)
                if file == files[0] or storage.exists(file)
                else None
                for file in files
            ]
        )

    return {
        name: held(value, places[name]) if value and name in places else value
        for name, value in component.options.items()
    }


def sample(
    selection: Selection, columns: list[str], rows: int, strata: list[str] | None = None
) -> pa.Table:
    """Up to ``rows`` rows, evenly spread. With ``strata``, columns of which every value (together)
    is to be there, drawn from a fixed seed, since what comes in turn may be missed by even steps,
    and one more row of each value that was not drawn, ``rows`` of those at most.
    """
    n = len(selection)
    places = evenly_spread(n, rows)
    if strata and n > rows:
        coded = [
            manifests.group_numbers(column.cast(pa.string()).fill_null(""))
            for column in manifests.read_columns(selection, strata).itercolumns()
        ]
        _, first, which = np.unique(np.stack(coded), axis=1, return_index=True, return_inverse=True)
        places = np.random.default_rng(0).choice(n, rows, replace=False)
        missed = np.delete(first, np.unique(which.reshape(-1)[places]))
        places = np.union1d(places, missed[:rows])
    return manifests.Reader(selection.manifest, columns).take(selection.ids(places))


def fit_modality(
    spec: Source,
    rows: Selection,
    start: pretrained.PretrainedCheckpoint | None,
    place: str,
    path: str,
    most_rows: int | None = None,
) -> tuple[ModalitySpec, str]:
    """The source's modality as it stands in its bundle, and in words what a checkpoint's knows of
    its training ``rows`` (`extend_modality`). ``place``: the source in the job file; ``path``:
    where what was fitted is kept. ``most_rows``: an estimate from so many rows, of which nothing is
    kept. Raises ValueError where the job contradicts the checkpoint.
    """
    assert spec.data is not None
    component, objective = (
        spec.data.modality,
        registry.get("objective", spec.objective.name) if spec.objective else Objective,
    )
    if start and start.modality:
        if start.modality.name != component.name:
            raise ValueError(
                f"{place}: {start.origin} reads {start.modality.name}, the data are "
                f"{component.name}"
            )
        theirs = start.modality.options
        own, named = (
            registry.get("modality", component.name).target_options,
            options_by_content("modality", component),
        )
        # A checkpoint brings its own tokenizer
        given = {
            k: component.options[k]
            for k, v in named.items()
            if k not in own
            and theirs.get(
                k, v if k not in registry.path_options("modality", component.name) else None
            )
            != v
        }
        if problem := ineffective_options(registry.get("modality", component.name), named, theirs):
            raise ValueError(f"{place}.data.modality: {problem}")
        if given:
            raise ValueError(
                f"{place}.data.modality: {given} contradicts {start.origin} ({theirs}); leave "
                "it out"
            )
        return extend_modality(
            replace(start.modality, options={**theirs, **named}), rows, objective, spec.data.columns
        )
    if (fitted := checksums.document_or_none(path, "it is fitted again")) is not None:
        return ModalitySpec.from_json(fitted), ""
    kind = registry.get("modality", component.name)
    options = kind.options_class(**component.options)
    names = fitted_columns(kind, objective, spec.data.columns)
    most = FIT_ROWS
    if objective.packed:  # a tokenizer wants many documents, as many as a bounded memory holds
        per_row = max(1, rows.manifest.num_bytes // max(1, rows.manifest.num_rows))
        most = max(FIT_ROWS, FIT_TEXT_BYTES // per_row)
    most = min(most, most_rows or most)
    state = kind.fit(
        options,
        sample(rows, names, most, strata_of(kind, spec.data.columns)),
        spec.data.columns,
        spec.backbone.name,
    )
    stated = {**options.model_dump(), **options_by_content("modality", component)}
    found = ModalitySpec(component.name, stated, state)
    if most_rows is None:
        checksums.write_document(path, found.to_json())
    return found, ""


def label_columns(spec: Source | Target) -> list[str]:
    """Return the columns that an objective is fitted on: not those of files (masks)."""
    assert spec.data is not None and spec.objective is not None
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    modality = registry.get("modality", spec.data.modality.name)
    files = file_roles(modality)
    roles = (*objective.roles, *objective.optional_roles)
    return [columns[role] for role in roles if role in columns and role not in files]


def fit_objective(spec: Source | Target, splits: Splits) -> State:
    """What the objective learns of the training rows' own columns.

    Of all training rows, at smaller label fractions too: all of them have the same classes, and
    heads of regression the same mean and deviation.
    """
    assert spec.data is not None and spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    table = manifests.read_columns(splits.train, label_columns(spec))
    return objective.fit(options, table, spec.data.columns)


def extend_modality(
    modality: ModalitySpec, rows: Selection, objective: type[Objective], columns: dict[str, str]
) -> tuple[ModalitySpec, str]:
    """Extend a fitted modality by a sample of other rows than it was fitted on (`ExtendsState`).

    Returns:
        The modality, and a description of what it knew of these rows before (`ReportsCoverage`).

    Raises:
        ValueError: It knows nothing of these rows.
    """
    reads = bundle.build_modality(modality)
    if not extends_state(reads) and not reports_coverage(reads):
        return modality, ""
    table = sample(
        rows,
        fitted_columns(type(reads), objective, columns),
        FIT_ROWS,
        strata_of(type(reads), columns),
    )
    check_known_share(reads, table, columns)
    state = reads.extend_state(table, columns) if extends_state(reads) else reads.state
    coverage = reads.coverage(table, columns) if reports_coverage(reads) else ""
    return replace(modality, state=state), coverage


def fitted_roles(modality: type[Modality]) -> tuple[str, ...]:
    """Return the roles that a modality is fitted on, where the objective does not predict them."""
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
    return list(dict.fromkeys(columns[role] for role in roles if role in columns))


def strata_of(modality: type[Modality], columns: dict[str, str]) -> list[str]:
    """Return the columns of which every value must be in the sample (`ExtendsState.strata`)."""
    roles = modality.strata if extends_state(modality) else ()
    return [columns[role] for role in roles if role in columns]
