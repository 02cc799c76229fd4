"""Which code and library versions have worked on a source or trial that is not complete yet.

A killed run continues from its resume points, even where the code or a library has changed since.
So that a result never mixes versions unnoticed, its folder lists those that worked in it, and the
complete result says which ones began it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import provenance
from pipeline.config.provenance import Provenance, ProvenanceRecord
from pipeline.io import checksums, storage
from pipeline.train import checkpoint

FILE = "made_by.json"
"""In the folder of a source, trial or stack of heads: what worked in it, oldest first."""
CHECKPOINTS = "checkpoints"
"""In the same folder: its resume points."""
_PARTS = (CHECKPOINTS, "initial", "tokens")
"""What a killed run leaves for the next one to continue from."""
_NOT_RECORDED: ProvenanceRecord = {"made_by": None, "versions": {}}
"""Stands for code and versions that were not recorded (`provenance.from_metadata`)."""


def read_provenance(folder: str) -> list[ProvenanceRecord]:
    """Code and versions that have worked in a folder (`Provenance.metadata`), oldest first.

    Parts without a record (it is damaged, or they are older than the record) count as made by
    something that was not recorded.
    """
    remedy = "what code began it is not known any more"
    kept = checksums.document_or_none(storage.join(folder, FILE), remedy)
    if kept is not None:
        return kept.get("begun_by", [])
    has_parts = any(storage.is_dir(storage.join(folder, part)) for part in _PARTS)
    return [_NOT_RECORDED] if has_parts else []


def changed_since(folder: str, now: Provenance) -> list[ProvenanceRecord]:
    """Return the code and versions that worked in a folder before and differ from ``now``."""
    return _others(read_provenance(folder), now)


def _others(found: list[ProvenanceRecord], now: Provenance) -> list[ProvenanceRecord]:
    return [
        metadata
        for metadata in found
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
    checkpoint.clear(storage.join(folder, CHECKPOINTS))
    storage.remove_tree(storage.join(folder, FILE))


# ---------------------------------------------------------------- trials and stacks of heads


def drop_incompatible(folder: str, now: Provenance, weights: str | None, remake: bool) -> None:
    """Remove resume points that a trial or stack of heads must not continue from.

    That is those trained from other weights of the source, since the result would name the present
    weights; and, where results of other versions are to be remade, those of other versions.

    Args:
        weights: SHA-256 of the source's present weights; None for scratch.
        remake: Whether what other code or versions made is to be made again.
    """
    if not storage.is_dir(storage.join(folder, CHECKPOINTS)):
        return
    found = read_provenance(folder)
    is_of_other_weights = any(
        "parent_weights" in metadata and metadata["parent_weights"] != weights for metadata in found
    )
    if is_of_other_weights:
        checksums.notify(
            f"{folder}: its resume points were trained from other weights of the source "
            "than those of now: training starts again from step 0"
        )
    if is_of_other_weights or (remake and _others(found, now)):
        clear(folder)


def record_start(
    folder: str, now: Provenance, weights: str | None, step: int, trials: list[str]
) -> list[ProvenanceRecord]:
    """Record that ``now`` trains a trial or stack of heads from ``step`` on.

    What worked there before counts only where training continues from its resume point; at step 0
    nothing of it is used.

    Args:
        weights: SHA-256 of the source's present weights; None for scratch.
        trials: Ids of the trials that the resume points belong to.

    Returns:
        Other code and versions that have made the resume point.
    """
    before = read_provenance(folder) if step else []
    others = _others(before, now)
    begun_by = before
    if len(others) == len(before):
        begun_by = [*before, {**now.metadata(), "parent_weights": weights}]
    checksums.write_document(storage.join(folder, FILE), {"begun_by": begun_by, "trials": trials})
    return others


@dataclass
class ResumeHistory:
    """What made the resume points of a trial, or of a stack of heads."""

    folder: str
    now: Provenance
    weights: str | None
    """SHA-256 of the source's present weights; None for scratch."""
    trials: list[str]
    """Ids of the trials that the resume points belong to."""
    others: list[ProvenanceRecord] = field(default_factory=list)
    """Other code and versions that made the resume point that training continues from."""
    damaged: list[str] = field(default_factory=list)
    """A line for each damaged resume point that was passed over."""

    def drop_incompatible(self, remake: bool) -> None:
        drop_incompatible(self.folder, self.now, self.weights, remake)

    def start(self, step: int, damaged: list[str]) -> None:
        """Record that training starts at ``step``; called once by rank 0."""
        self.damaged = damaged
        self.others = record_start(self.folder, self.now, self.weights, step, self.trials)


def trials_of(folder: str) -> list[str]:
    """Ids of the trials that the resume points in a folder belong to, as far as it is known."""
    kept = checksums.document_or_none(
        storage.join(folder, FILE), "its trials are not known any more"
    )
    return (kept or {}).get("trials", [])
