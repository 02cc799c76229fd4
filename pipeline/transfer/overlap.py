"""Test rows of a target that are also in the training rows of its sources, or of the target itself.

They are counted and reported, and left out where the job says so (``drop_overlap``). Rows are
compared by their content, by the record that they were cut from, and by their group (patient,
speaker) where both sides name one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.config.schema import spec_hash
from pipeline.core import arrow_lists
from pipeline.core.capabilities import CutFromRecords, file_columns, finds_near_rows
from pipeline.data import duplicates, manifests
from pipeline.data.manifests import Selection
from pipeline.io import file_identity
from pipeline.train.fit_components import sample
from pipeline.train.source import SourceStage, data_key
from pipeline.transfer.targets import TargetStage

MAX_ROWS = 200_000
"""Most rows that are read only to count overlap. ``drop_overlap`` reads all that it needs."""
MAX_BYTES = 4 << 30
"""Most bytes that are read only to count overlap."""


@dataclass(frozen=True)
class Overlap:
    """The overlap of a target's test rows with training rows."""

    notes: tuple[str, ...]
    """Sentences for terminal and report."""
    test: Selection
    """The test rows that are kept."""


def key(target: TargetStage, sources: dict[str, SourceStage]) -> str:
    """Return a hash of all that the left-out rows depend on, or "" where none are left out."""
    if target.spec.drop_overlap == "none":
        return ""
    mode, spec = target.spec.drop_overlap, target.spec.data
    compared_sources = []
    for _, stage in sorted(sources.items()):
        if stage.splits and stage.spec.data:
            roles = compared_roles(spec.modality.name, spec.columns, stage.spec.data.columns)
            record = record_column(spec.modality.name, target.splits.test, stage.splits.train)
            compared_sources.append(
                [
                    data_key(stage.spec.data),
                    stage.splits.fingerprint,
                    *roles[1:],
                    *([record] if record else []),
                ]
            )
    kind = registry.get("modality", spec.modality.name)
    near = kind.near_search.settings if mode == "near" and finds_near_rows(kind) else ()
    validation = ["validation"] if _validates_on_sources(target) else []
    return spec_hash(mode, duplicates.VERSION, *near, compared_sources, *validation)


def compared_roles(modality: str, *columns: dict[str, str]) -> tuple[str, ...]:
    """Return the roles by which rows are compared: the input itself, and the second text of pairs.

    Many pairs share their first text, so the second is compared where both sides have pairs.

    Args:
        columns: The column of each role, for each of the data sets that are compared.
    """
    kind = registry.get("modality", modality)
    may_have_pairs = "text_pair" in kind.optional_roles
    if may_have_pairs and all("text_pair" in of_data_set for of_data_set in columns):
        return (*kind.roles, "text_pair")
    return kind.roles


def record_column(modality: str, *selections: Selection) -> str:
    """Return the column with the id of the record that each row was cut from.

    Returns "" where not all rows have it.
    """
    kind = registry.get("modality", modality)
    name = kind.record_column if isinstance(kind, CutFromRecords) else ""
    is_everywhere = all(name in selection.manifest.schema.names for selection in selections)
    return name if is_everywhere else ""


def in_groups(test: Selection, group: str, others: Selection, other_group: str) -> np.ndarray:
    """Return (n,) whether the group (patient, speaker) of each test row is also in the other rows.

    Null and NaN are no group.
    """
    _, other_groups = manifests.codes_of(manifests.read_columns(others, [other_group])[other_group])
    other_names = set(map(manifests.value_text, other_groups.to_pylist()))
    codes, groups = manifests.codes_of(manifests.read_columns(test, [group])[group])
    is_shared = [manifests.value_text(value) in other_names for value in groups.to_pylist()]
    is_shared.append(False)  # for rows without a group, whose code is -1
    return np.array(is_shared)[codes]


def bytes_to_read(selection: Selection, modality: str, columns: dict[str, str]) -> int:
    """Return roughly how many bytes of the rows are read.

    Where a column of images or recordings holds paths, the size is estimated from a few files.
    """
    of_files = file_columns(registry.get("modality", modality), columns)
    if not of_files or not len(selection):
        return selection.manifest.num_bytes
    name = of_files[0]
    kind = selection.manifest.schema.field(name).type
    may_be_uris = arrow_lists.is_text(kind) or pa.types.is_struct(kind)
    if not may_be_uris:
        return selection.manifest.num_bytes
    cells = sample(selection, [name], 16)[name].to_pylist()
    if any(isinstance(cell, dict) and cell.get("bytes") for cell in cells):
        return selection.manifest.num_bytes
    uris = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    identities = file_identity.identify([uri for uri in uris if uri], "stat", absent_ok=True)
    texts = [file.content.partition("-")[0] for file in identities]  # the size, or ABSENT
    sizes = [int(text) for text in texts if text != file_identity.ABSENT]
    return len(selection) * sum(sizes) // max(1, len(sizes))


def find_overlap(target: TargetStage, sources: dict[str, SourceStage], folder: str) -> Overlap:
    """Compare the test rows with the training rows of every source and of the target itself.

    Validation rows of a source count where trials are chosen and calibrated on them.

    Test rows are left out for all sources alike, so that their trials are compared on the same
    rows.

    Args:
        folder: Where the signatures by which rows are compared are kept.

    Raises:
        ValueError: No test row would be kept.
    """
    name, mode, test = target.name, target.spec.drop_overlap, target.splits.test
    columns, notes = target.spec.data.columns, []
    is_left_out = np.zeros(len(test), dtype=bool)
    for source_name, stage in sources.items():
        if stage.splits is None or stage.spec.data is None:
            if mode != "none":
                notes.append(
                    f"{name}: source {source_name} is a checkpoint, and what it was trained on is "
                    "not known here: none of its rows can be left out"
                )
            continue
        if mode != "none" and stage.checkpoint_name:
            notes.append(
                f"{name}: source {source_name} continues from a checkpoint, and what that was "
                "trained on is not known here: none of those rows can be left out"
            )
        shared, new_notes = _shared_groups(target, source_name, stage)
        notes += new_notes
        if mode == "group":
            is_left_out |= shared
    for where, rows, other_columns in _rows_of_sources(target, sources):
        duplicated, new_notes = _duplicates(
            target, rows, other_columns, where, folder, mode == "none", is_source=True
        )
        notes += new_notes
        if mode != "none":
            is_left_out |= duplicated
    own = "its own training rows"
    notes += _duplicates(target, target.splits.train, columns, own, folder, True)[1]
    if target.unlabelled is not None and target.spec.unlabelled is not None:
        rows = target.unlabelled.train
        given = target.spec.unlabelled.columns or columns
        present = {
            role: column for role, column in given.items() if column in rows.manifest.schema.names
        }
        notes += _duplicates(target, rows, present, "its rows without labels", folder, True)[1]
    if mode == "none":
        return Overlap(tuple(notes), test)
    if is_left_out.all():
        raise ValueError(
            f"targets.{name}.drop_overlap: all {len(test)} test rows are also in a source and "
            "none is left; take another test split"
        )
    they = "they or their group" if mode == "group" else "they"
    notes.append(
        f"{name}: {is_left_out.sum()} of {len(test)} test rows left out because {they} are also "
        f"in a source (drop_overlap: {mode})"
    )
    return Overlap(tuple(notes), test.keep(~is_left_out) if is_left_out.any() else test)


def _validates_on_sources(target: TargetStage) -> bool:
    """Return whether trials are chosen on validation rows of their source."""
    return 0 in target.spec.label_fractions


def _rows_of_sources(
    target: TargetStage, sources: dict[str, SourceStage]
) -> list[tuple[str, Selection, dict[str, str]]]:
    """Return the rows of sources that test rows are compared with.

    Returns:
        Tuples of a description, the rows, and the column of each role.
    """
    out: list[tuple[str, Selection, dict[str, str]]] = []
    for name, stage in sources.items():
        if stage.splits is None or stage.spec.data is None:
            continue
        columns = stage.spec.data.columns
        out.append((f"source {name}", stage.splits.train, columns))
        if _validates_on_sources(target) and len(stage.splits.validation):
            out.append((f"the validation rows of source {name}", stage.splits.validation, columns))
    return out


def _shared_groups(
    target: TargetStage, source_name: str, stage: SourceStage
) -> tuple[np.ndarray, list[str]]:
    """Return (n,) whether each test row's group is in a source's training rows, and notes.

    Groups of a source's validation rows do not count: its network has learned nothing from them.
    """
    assert stage.splits is not None and stage.spec.data is not None
    name, test, group = target.name, target.splits.test, target.spec.data.group
    shared, notes = np.zeros(len(test), dtype=bool), []
    corpora = [stage.spec.data, *stage.spec.data.more]
    pairs = zip(stage.splits.train_by_corpus, corpora, strict=True)
    grouped = [(rows, data.group) for rows, data in pairs if data.group]
    if group:
        for rows, other_group in grouped:
            shared |= in_groups(test, group, rows, other_group)
    if shared.any():
        other_groups = " or ".join(dict.fromkeys(other_group for _, other_group in grouped))
        named = group if group == other_groups else f"{group} here, {other_groups} there"
        notes.append(
            f"{name}: {shared.sum()} of {len(test)} test rows are of a group that is also in "
            f"the training rows of source {source_name} (group: {named})"
        )
    without = len(corpora) - len(grouped)
    if target.spec.drop_overlap != "group" or not without:
        return shared, notes
    if not grouped:
        notes.append(
            f"{name}: source {source_name} names no group: of its rows only equal ones can be "
            "left out"
        )
    else:
        names = "names no group: of its rows" if without == 1 else "name no group: of their rows"
        notes.append(
            f"{name}: {without} of {len(corpora)} corpora of source {source_name} {names} only "
            "equal ones can be left out"
        )
    return shared, notes


def _duplicates(
    target: TargetStage,
    rows: Selection,
    columns: dict[str, str],
    where: str,
    folder: str,
    only_counted: bool,
    is_source: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Compare the test rows with other rows by their content.

    Args:
        target: The target, whose test rows are compared.
        rows: The other rows.
        columns: The column of each role in the other rows.
        where: Description of the other rows.
        folder: Where the signatures by which rows are compared are kept.
        only_counted: Whether nothing is left out. Large corpora are then not read.
        is_source: Whether the other rows are a source's.

    Returns:
        (n,) whether each test row is to be left out, and notes.
    """
    name, test, modality = target.name, target.splits.test, target.spec.data.modality.name
    own_columns, mode = target.spec.data.columns, target.spec.drop_overlap
    if only_counted and _is_large(test, rows, modality, columns):
        advice = "; drop_overlap: exact or near reads them all"
        note = f"{name}: too many rows to look for its test rows in {where}"
        return np.zeros(len(test), dtype=bool), [note + (advice if is_source else "")]
    roles = compared_roles(modality, own_columns, columns)
    record = record_column(modality, test, rows)

    def signatures(selection: Selection, named: dict[str, str]) -> duplicates.RowSignatures:
        read = {role: named[role] for role in (*roles, *manifests.SEGMENT_ROLES) if role in named}
        return duplicates.row_signatures(selection, modality, read, folder, record)

    tested, others = signatures(test, own_columns), signatures(rows, columns)
    is_equal = duplicates.exact_duplicates(tested, others)
    is_same_record = duplicates.same_record(tested, others) & ~is_equal
    is_near = duplicates.near_duplicates(tested, others, modality) & ~is_equal
    notes, kind = [], registry.get("modality", modality)
    method = kind.near_search.method if finds_near_rows(kind) else ""
    is_duplicate = is_equal | is_same_record
    if (is_duplicate | is_near).any():
        note = f"{name}: {is_equal.sum()} of {len(test)} test rows are also in {where}"
        if is_same_record.any():
            note += (
                f", {is_same_record.sum()} more as another cut of the same record (column {record})"
            )
        if is_near.any():
            note += f", {is_near.sum()} more nearly so ({method})"
        notes.append(note)
    return (is_duplicate | is_near if mode == "near" else is_duplicate), notes


def _is_large(test: Selection, rows: Selection, modality: str, columns: dict[str, str]) -> bool:
    """Return whether rows are too many, or take too many bytes, to be read only for counting."""
    if max(len(rows), len(test)) > MAX_ROWS:
        return True
    return bytes_to_read(rows, modality, columns) > MAX_BYTES
