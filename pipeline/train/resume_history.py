"""Which code and library versions have worked on a source or trial that is not complete yet.

A killed run continues from its resume points, even where the code or a library has changed since.
So that a result never mixes versions unnoticed, its folder lists them, and the complete result says
which ones began it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import provenance
from pipeline.config.provenance import Provenance, ProvenanceRecord
from pipeline.io import checksums, storage

FILE = "made_by.json"
"""In the folder of a source, trial or stack of heads: the code and versions, oldest first."""
CHECKPOINTS = "checkpoints"
"""In the same folder: its resume points."""
_PARTS = (CHECKPOINTS, "initial", "tokens")
"""Parts of the folder that the next run continues from."""
_NOT_RECORDED: ProvenanceRecord = {"made_by": None, "versions": {}}
"""Stands for code and versions that were not recorded (`provenance.from_metadata`)."""


def read_provenance(folder: str) -> list[ProvenanceRecord]:
    """Return the code and versions that worked in a folder (`Provenance.metadata`), oldest first.

    Where there are parts and no intact record, they count as made by code that was not recorded.
    """
    remedy = "what code began it is not known any more"
    document = checksums.document_or_none(storage.join(folder, FILE), remedy)
    if document is not None:
        return document.get("begun_by", [])
    has_parts = any(storage.is_dir(storage.join(folder, part)) for part in _PARTS)
    return [_NOT_RECORDED] if has_parts else []


def changed_since(folder: str, now: Provenance) -> list[ProvenanceRecord]:
    """Return the code and versions that worked in a folder before and differ from ``now``."""
    return _others(read_provenance(folder), now)


def _others(records: list[ProvenanceRecord], now: Provenance) -> list[ProvenanceRecord]:
    return [
        metadata
        for metadata in records
        if provenance.changes(provenance.from_metadata(metadata), now)
    ]


def record(folder: str, now: Provenance) -> list[ProvenanceRecord]:
    """Record that ``now`` works in the folder of a source.

    Returns:
        Other code and versions that have worked in it before.
    """
    before = read_provenance(folder)
    others = _others(before, now)
    if len(others) == len(before):
        checksums.write_document(
            storage.join(folder, FILE), {"begun_by": [*before, now.metadata()]}
        )
    return others


def clear(folder: str) -> None:
    """Remove the resume points and the record; a complete result has a record of its own."""
    storage.remove_tree(storage.join(folder, CHECKPOINTS))
    storage.remove_tree(storage.join(folder, FILE))


# ---------------------------------------------------------------- trials and stacks of heads


@dataclass
class ResumeHistory:
    """The code and versions that made the resume points of a trial or stack of heads."""

    folder: str
    now: Provenance
    weights: str | None
    """SHA-256 of the source's present weights; None for scratch."""
    trials: list[str]
    """Ids of the trials that the resume points belong to."""
    order: str = ""
    """How many training rows there are and how they are shuffled; "": it is not compared."""
    others: list[ProvenanceRecord] = field(default_factory=list)
    """Other code and versions that made the resume point that training continues from."""
    damaged: list[str] = field(default_factory=list)
    """A line for each damaged resume point that was skipped."""

    def drop_incompatible(self, remake: bool) -> None:
        """Remove resume points that training must not continue from.

        That is those trained from other weights of the source, since the result would name the
        present weights; those of another order of the rows, since some rows of the epoch would come
        twice and others never; and with ``remake`` those that other code or versions made.
        """
        if not storage.is_dir(storage.join(self.folder, CHECKPOINTS)):
            return
        records = read_provenance(self.folder)
        # what earlier versions did not record counts as unchanged
        has_other_weights = any(
            metadata.get("parent_weights", self.weights) != self.weights for metadata in records
        )
        has_other_order = bool(self.order) and any(
            metadata.get("order", self.order) != self.order for metadata in records
        )
        difference = ""
        if has_other_weights:
            difference = "from other weights of the source than those of now"
        elif has_other_order:
            difference = (
                "on rows in another order than now (data.decode, or which rows can be read, has "
                "changed)"
            )
        if difference:
            checksums.notify(
                f"{self.folder}: its resume points were trained {difference}: training starts "
                "again from step 0"
            )
        if difference or (remake and _others(records, self.now)):
            clear(self.folder)

    def start(self, step: int, damaged: list[str]) -> None:
        """Record that training starts at ``step``; called once by rank 0.

        Code and versions that worked here before count only where training continues from their
        resume point. From step 0 on nothing of theirs is used.
        """
        self.damaged = damaged
        before = read_provenance(self.folder) if step else []
        self.others = _others(before, self.now)
        begun_by = before
        if len(self.others) == len(before):
            own: ProvenanceRecord = {**self.now.metadata(), "parent_weights": self.weights}
            begun_by = [*before, {**own, "order": self.order}]
        checksums.write_document(
            storage.join(self.folder, FILE), {"begun_by": begun_by, "trials": self.trials}
        )


def trials_of(folder: str) -> list[str]:
    """Return the ids of the trials that the resume points in a folder belong to, where known."""
    remedy = "its trials are not known any more"
    document = checksums.document_or_none(storage.join(folder, FILE), remedy) or {}
    return document.get("trials", [])
