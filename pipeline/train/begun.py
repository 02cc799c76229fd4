"""What made the parts of a source or trial that is not complete yet.

A killed run is gone on with from its resume points, also by code or library versions other than those that wrote them. So that a result never
mixes them without a word, its folder names what worked in it, and the complete result what began it.
"""

from __future__ import annotations

from typing import Any

from pipeline import checked, provenance, storage
from pipeline.provenance import MadeBy

FILE = "made_by.json"
"""In the folder of a source or trial: what worked in it, oldest first."""


def by(folder: str) -> list[dict[str, Any]]:
    """What has worked in a folder, as `MadeBy.facts` has it; empty where nothing has, or where that is not known any more."""
    kept = checked.document_or_none(storage.join(folder, FILE), "what code began it is not known any more")
    return (kept or {}).get("begun_by", [])


def by_others(folder: str, now: MadeBy) -> list[dict[str, Any]]:
    """Of these what differs from what works now."""
    return [facts for facts in by(folder) if provenance.changes(provenance.recorded(facts), now)]


def record(folder: str, now: MadeBy) -> list[dict[str, Any]]:
    """Record that ``now`` works in a folder; what others have worked in it before."""
    before, others = by(folder), by_others(folder, now)
    if len(others) == len(before):
        checked.write_document(storage.join(folder, FILE), {"begun_by": [*before, now.facts()]})
    return others


def forget(folder: str) -> None:
    """Remove the record: the result is complete, and says itself what made it."""
    storage.remove_tree(storage.join(folder, FILE))
