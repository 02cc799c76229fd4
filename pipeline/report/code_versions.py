"""What made a job's trials, and how that is told: which are of other code or versions than now, and
which comparisons mix them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import provenance
from pipeline.config.provenance import Provenance
from pipeline.report.matrix import Cell, CellKey, cell_key
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord

OTHER = "made by other code or versions"
MIXED = "compares trials of different code or versions"
SIGNS = {OTHER: "†", MIXED: "‡"}
"""How a cell is marked, in words and by a sign."""
NOT_RECORDED = "not recorded"
MAX_REASONS = 4


@dataclass(frozen=True)
class TrialProvenance:
    """What made a trial. ``changes``: in words, how that differs from what would make it now; empty
    where nothing does.
    """

    made: Provenance | None
    changes: tuple[str, ...] = ()

    def columns(self) -> dict[str, str | None]:
        """The two columns of the results table."""
        if self.made is None:
            return {"versions": None, "made_by": None}
        return {
            "versions": json.dumps(self.made.versions, sort_keys=True),
            "made_by": self.made.hash,
        }


def provenance_of_record(
    record: TrialRecord, now: Provenance, source: str, weights: str | None
) -> TrialProvenance:
    """What made the trial of a record.

    Args:
        now: What would make it now.
        weights: The SHA-256 of its source's weights as they are now; none for scratch, or where
            there are none yet.
    """
    made = record.made
    found = provenance.changes(made, now)
    for metadata in record.begun_by:
        begun = provenance.changes(provenance.from_metadata(metadata), now)
        found += (f"begun by other code or versions ({', '.join(begun)})",) if begun else ()
    started_from = record.parent_weights
    if weights and started_from and started_from != weights:
        found += (f"source {source} was made anew since",)
    return TrialProvenance(made, found)


def mark_cells(
    cells: Sequence[Cell],
    rows: Sequence[ResultRow],
    trial_provenance: Mapping[str, TrialProvenance],
) -> list[Cell]:
    """The cells, each with ``made``: empty, or how it is marked.

    A cell is mixed where two of its trials, or one of them and one of those that its gains are over
    (``Cell.compared_with``: scratch of its own and of the best backbone, for a random probe the
    linear probe), were made by different code or versions; else it is of other code where one of
    its own trials was not made as it would be now.
    """
    trials: dict[CellKey, list[str]] = defaultdict(list)
    for row in rows:
        is_tested = row.trial_stage == "final" and row.status == "done" and row.split == "test"
        if (
            is_tested
            and row.trial_id in trial_provenance
            and row.trial_id not in trials[cell_key(row)]
        ):
            trials[cell_key(row)].append(row.trial_id)
    out: list[Cell] = []
    for cell in cells:
        own = trials[cell.source, cell.backbone, cell.target, cell.technique, cell.label_fraction]
        against = [one for key in cell.compared_with for one in trials[key]]
        made = [trial_provenance[one].made for one in (*own, *against)]
        if any(provenance.differences(made[0], other) for other in made[1:]):
            out.append(replace(cell, made=MIXED))
        elif any(trial_provenance[one].changes for one in own):
            out.append(replace(cell, made=OTHER))
        else:
            out.append(cell)
    return out


def describe_changes(trial_provenance: Mapping[str, TrialProvenance]) -> list[str]:
    """A sentence on the trials that were not made as they would be now, and one for each reason;
    none where there are none.
    """
    changed = [origin for origin in trial_provenance.values() if origin.changes]
    if not changed:
        return []
    by_reason = Counter(_short(origin.changes) for origin in changed)
    head = (
        f"{len(changed)} of {len(trial_provenance)} trials were made by other code or versions "
        "than those "
        "of now and are used as they are"
    )
    return [
        f"{head}; --remake changed makes them anew",
        *(f"{_trials(count)}: {reason}" for reason, count in by_reason.most_common()),
    ]


def _short(changes: Sequence[str]) -> str:
    more = f" and {len(changes) - MAX_REASONS} more" if len(changes) > MAX_REASONS else ""
    return ", ".join(changes[:MAX_REASONS]) + more


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def versions_table(rows: Sequence[ResultRow]) -> list[list[str]]:
    """For each library the versions that trials were made with, and for how many: (library,
    versions).
    """
    trials = {row.trial_id: row.versions for row in rows}
    found: dict[str, Counter[str]] = {name: Counter() for name in provenance.LIBRARIES}
    for text in trials.values():
        versions: dict[str, str] = json.loads(text) if text else {}
        for name, count in found.items():
            count[versions.get(name, NOT_RECORDED)] += 1
    out: list[list[str]] = []
    for name, count in found.items():
        several = len(count) > 1
        version_texts = [
            f"{version} ({_trials(number)})" if several else version
            for version, number in count.most_common()
        ]
        out.append([name, ", ".join(version_texts)])
    return out if trials else []
