"""What a look at a sample of the rows tells before any training: texts that are cut off, names that
only one side of a transfer has.

Each finding is a sentence for the terminal, the report and ``--dry-run``; some are warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.checkpoints import bundle
from pipeline.core.capabilities import ComparesFeatureNames, TruncatesLongRows, TruncationStats
from pipeline.core.contracts import Modality, Objective
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection
from pipeline.train import fit

SAMPLE_ROWS, SAMPLE_BYTES = 2048, 4 << 20
"""So many rows of a split are looked at, and of large ones so many that they have about so many
bytes in their files: counting tokens takes seconds.
"""
FEWEST_ROWS = 16
WARN_SHARE = 0.01
"""A warning where more than one per cent of a split's words or tokens is never read: below it the
few longest texts alone are cut.
"""


class Finding(NamedTuple):
    """One sentence, whether it is a warning, and whether the terminal has it too; the report has
    all.
    """

    text: str
    is_warning: bool = False
    in_terminal: bool = True

    def line(self, name: str) -> str:
        """For the terminal, about the source or target ``name``."""
        return f"{'warning: ' if self.is_warning else ''}{name}: {self.text}"


def findings_from_metadata(metadata: Mapping[str, Any]) -> list[Finding]:
    """The findings among a source's facts, as its bundle keeps them.

    Each is the list of a Finding's fields. Bundles of imported checkpoints that an earlier version
    wrote hold the sentence alone.
    """
    found = []
    for kept in metadata.get("findings", ()):
        found.append(Finding(kept) if isinstance(kept, str) else Finding(*kept))
    return found


def truncated_texts(
    modality: Modality,
    objective: type[Objective],
    splits: dict[str, Selection],
    columns: dict[str, str],
) -> list[Finding]:
    """The share of each split that its modality cuts off, in one sentence; nothing where nothing is
    cut, or documents are packed without loss.
    """
    if objective.packed or not isinstance(modality, TruncatesLongRows):
        return []
    parts, largest = [], 0.0
    for name, selection in splits.items():
        found, rows = _truncation(modality, selection, columns)
        if found is None or not found.lost:
            continue
        largest = max(largest, found.share)
        estimated = (
            f", estimated from {rows:,} of {len(selection):,} rows" if rows < len(selection) else ""
        )
        parts.append(
            f"{name} {100 * found.share:.1f} % ({found.lost:,} of {found.units:,} "
            f"{found.unit}, in {found.cut:,} of {found.rows:,} rows{estimated})"
        )
    if not parts:
        return []
    length = modality.inputs().get("length")
    description = (
        f"texts are cut at length {length}, and what lies beyond is never read: {'; '.join(parts)}"
    )
    is_warning = largest > WARN_SHARE
    return [
        Finding(
            description
            + (
                "; raise data.modality.text.length, or cut the texts into rows"
                if is_warning
                else ""
            ),
            is_warning,
        )
    ]


def _truncation(
    modality: TruncatesLongRows, selection: Selection, columns: dict[str, str]
) -> tuple[TruncationStats | None, int]:
    """What is cut of a sample of the rows, and how many rows that sample has."""
    if not len(selection):
        return None, 0
    bytes_a_row = max(1, selection.manifest.size // max(1, selection.manifest.rows))
    rows = min(SAMPLE_ROWS, max(FEWEST_ROWS, SAMPLE_BYTES // bytes_a_row))
    names = [columns[role] for role in ("text", "text_pair") if role in columns]
    table = fit.sample(selection, names, rows)
    return modality.truncation(table, columns), len(table)


def unshared_names(
    modality: dict[str, Any], objective: type[Objective], rows: Selection, columns: dict[str, str]
) -> list[Finding]:
    """The complete lists of variables, fields and categories that a source knows and these rows
    lack, and the other way round.

    The terminal has them in short (``Modality.coverage``).
    """
    reads = bundle.build_modality(modality)
    if not isinstance(reads, ComparesFeatureNames) or not len(rows):
        return []
    table = fit.sample(rows, fit.fitted_columns(type(reads), objective, columns), fit.FIT_ROWS)
    sampled = f" (of {len(table):,} of {len(rows):,} rows)" if len(table) < len(rows) else ""
    return [
        Finding(one.text() + sampled, in_terminal=False)
        for one in reads.name_differences(table, columns)
    ]


def null_labels(
    objective: type[Objective], splits: dict[str, Selection], columns: dict[str, str]
) -> list[Finding]:
    """How many rows have a null where the objective takes that for an answer of its own (no label,
    no answer).
    """
    if not objective.null_label_means or not objective.roles:
        return []
    name = columns[objective.roles[0]]
    counts = {
        split: manifests.read_columns(rows, [name])[name].null_count
        for split, rows in splits.items()
        if len(rows)
    }
    if not any(counts.values()):
        return []
    description = ", ".join(
        f"{count:,} of {len(splits[split]):,} {split} rows"
        for split, count in counts.items()
        if count
    )
    return [
        Finding(
            f"column {name} is null in {description}, which counts as "
            f"{objective.null_label_means}; "
            "if it is not known there, leave these rows out"
        )
    ]
