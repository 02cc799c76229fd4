"""Promise 10: test rows of a target that also stand in its sources, or among its own training rows:
counted, told, and left out where the job says so.

Rows are compared by what they hold, by the record that they were cut from, and by their group
(patient, speaker) where both sides name one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.config.schema import spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import CutFromRecords
from pipeline.data import duplicates
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection
from pipeline.io import file_identity
from pipeline.train.fit import sample
from pipeline.train.source import SourceStage, data_key
from pipeline.transfer.targets import TargetStage

MOST_ROWS, MOST_BYTES = 200_000, 4 << 30
"""What is read only to be counted; ``drop_overlap`` reads whatever it takes."""


@dataclass(frozen=True)
class Overlap:
    """What was found, in sentences, and the test rows that stay."""

    notes: tuple[str, ...]
    test: Selection


def key(target: TargetStage, sources: dict[str, SourceStage]) -> str:
    """What the rows that are left out depend on; nothing where none are."""
    mode, spec = target.spec.drop_overlap, target.spec.data
    held = []
    for _, stage in sorted(sources.items()):
        if stage.splits and stage.spec.data:
            roles = compared(spec.modality.name, spec.columns, stage.spec.data.columns)
            record = record_column(spec.modality.name, target.splits.test, stage.splits.train)
            held.append(
                [
                    data_key(stage.spec.data),
                    stage.splits.fingerprint,
                    *roles[1:],
                    *([record] if record else []),
                ]
            )
    return (
        ""
        if mode == "none"
        else spec_hash(
            mode, duplicates.VERSION, duplicates.NEAR_BITS, duplicates.NEAR_CORRELATION, held
        )
    )


def compared(modality: str, *columns: dict[str, str]) -> tuple[str, ...]:
    """Roles by which rows are the same: the input itself (of records its times, variables and
    values), and the second text where the rows of both sides are pairs (many pairs share their
    first).
    """
    kind = registry.get("modality", modality)
    pairs = [
        role
        for role in ("text_pair",)
        if role in kind.optional_roles and all(role in named for named in columns)
    ]
    return (*kind.roles, *pairs)


def record_column(modality: str, *selections: Selection) -> str:
    """The column with the id of the record that each row was cut from, where all have it; else
    nothing.
    """
    kind = registry.get("modality", modality)
    name = kind.record_column if isinstance(kind, CutFromRecords) else ""
    is_everywhere = all(name in selection.manifest.schema.names for selection in selections)
    return name if is_everywhere else ""


def in_groups(test: Selection, group: str, others: Selection, other_group: str) -> np.ndarray:
    """(n,) which test rows have a group (a patient, a speaker) that also stands in the other rows.
    Null is no group.
    """
    there = {
        manifests.value_text(value)
        for value in pc.unique(
            manifests.read_columns(others, [other_group])[other_group]
        ).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        if value is not None
    }
    # pyright: ignore
    coded = pc.dictionary_encode(manifests.read_columns(test, [group])[group].combine_chunks())
    known = np.array(
        [*(manifests.value_text(value) in there for value in coded.dictionary.to_pylist()), False]
    )  # the last one is for nulls
    return known[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _bytes(selection: Selection, modality: str, columns: dict[str, str]) -> int:
    """About so many bytes are read of the rows; where a column of images or recordings holds the
    places of their files, as a few of them tell.
    """
    named = columns[registry.get("modality", modality).roles[0]]
    kind = selection.manifest.schema.field(named).type if len(selection) else pa.null()
    may_be_places = arrow_lists.is_text(kind) or pa.types.is_struct(kind)
    if modality == "text" or not may_be_places:
        return selection.manifest.size
    cells = sample(selection, [named], 16)[named].to_pylist()
    if any(isinstance(cell, dict) and cell.get("bytes") for cell in cells):
        return selection.manifest.size
    places = [cell.get("path") if isinstance(cell, dict) else cell for cell in cells]
    held = [
        file.content.partition("-")[0]
        for file in file_identity.identify(
            [place for place in places if place], "stat", absent_ok=True
        )
    ]
    sizes = [int(size) for size in held if size != file_identity.ABSENT]
    return len(selection) * sum(sizes) // max(1, len(sizes))


def find_overlap(target: TargetStage, sources: dict[str, SourceStage], folder: str) -> Overlap:
    """Compare the test rows with the training rows of every source and of the target itself; what
    rows are compared by is kept under the folder.

    Test rows are left out for all sources alike, so that their trials are compared on the same
    rows. Raises ValueError when none would stay.
    """
    name, mode, test = target.name, target.spec.drop_overlap, target.splits.test
    modality = target.spec.data.modality.name
    notes, gone = [], np.zeros(len(test), dtype=bool)
    group = target.spec.data.group
    others: list[tuple[str, Selection, dict[str, str]]] = []
    for source_name, stage in sources.items():
        if stage.splits is not None and stage.spec.data is not None:
            others.append((f"source {source_name}", stage.splits.train, stage.spec.data.columns))
            shared = np.zeros(len(test), dtype=bool)
            corpora = [stage.spec.data, *stage.spec.data.more]
            grouped = [
                (rows, data.group)
                for rows, data in zip(stage.splits.trains, corpora, strict=True)
                if data.group
            ]
            if group:
                for rows, theirs in grouped:
                    shared |= in_groups(test, group, rows, theirs)
            if shared.any():
                theirs = " or ".join(dict.fromkeys(theirs for _, theirs in grouped))
                named = group if group == theirs else f"{group} here, {theirs} there"
                notes.append(
                    f"{name}: {shared.sum()} of {len(test)} test rows are of a group that also "
                    "stands in the training rows of source "
                    f"{source_name} (group: {named})"
                )
            if mode == "group":
                gone |= shared
                if not grouped:
                    notes.append(
                        f"{name}: source {source_name} names no group: of its rows only equal "
                        "ones can be left out"
                    )
                elif len(grouped) < len(corpora):
                    without = len(corpora) - len(grouped)
                    names = (
                        "names no group: of its rows"
                        if without == 1
                        else "name no group: of their rows"
                    )
                    notes.append(
                        f"{name}: {without} of {len(corpora)} corpora of source {source_name} "
                        f"{names} only equal ones can be left out"
                    )
        elif mode != "none":
            notes.append(
                f"{name}: source {source_name} is a checkpoint, and what it was trained on is "
                "not known here: none of its rows can be left out"
            )
    others.append(("its own training rows", target.splits.train, target.spec.data.columns))
    for where, selection, columns in others:
        ours = where.startswith("its own")
        if (mode == "none" or ours) and (
            max(len(selection), len(test)) > MOST_ROWS
            or _bytes(selection, modality, columns) > MOST_BYTES
        ):
            notes.append(
                f"{name}: too many rows to look for its test rows in {where}"
                + ("" if ours else "; drop_overlap: exact or near reads them all")
            )
            continue
        roles = compared(modality, target.spec.data.columns, columns)
        record = record_column(modality, test, selection)
        mine, theirs = (
            duplicates.row_signatures(
                rows,
                modality,
                tuple(named[role] for role in roles),
                folder,
                (named.get("start"), named.get("seconds")),
                record,
            )
            for rows, named in ((test, target.spec.data.columns), (selection, columns))
        )
        same = duplicates.exact_duplicates(mine, theirs)
        cut = duplicates.same_record(mine, theirs) & ~same
        like = duplicates.near_duplicates(mine, theirs) & ~same
        if same.any() or cut.any() or like.any():
            description = f"{same.sum()} of {len(test)} test rows also stand in {where}"
            description += (
                f", {cut.sum()} more as another cut of the same record (column {record})"
                if cut.any()
                else ""
            )
            description += f", {like.sum()} more nearly so (perceptual hash)" if like.any() else ""
            notes.append(f"{name}: {description}")
        if mode != "none" and not ours:
            gone |= same | cut | like if mode == "near" else same | cut
    if mode != "none":
        if gone.all():
            raise ValueError(
                f"targets.{name}.drop_overlap: all {len(test)} test rows also stand in a "
                "source and none is left; take another test split"
            )
        also = "or their group also" if mode == "group" else "also"
        notes.append(
            f"{name}: {gone.sum()} of {len(test)} test rows left out because they {also} stand "
            f"in a source (drop_overlap: {mode})"
        )
    return Overlap(tuple(notes), test.keep(~gone) if gone.any() else test)
