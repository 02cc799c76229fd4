"""Which code and library versions made the trials of a job.

Trials that other code or versions made than those of now are marked in the report, and so are
comparisons between trials of different code or versions.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config import provenance
from pipeline.config.provenance import Provenance
from pipeline.io.wording import plural
from pipeline.report.matrix import EntryKey, MatrixEntry, entry_key
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord

OTHER = "made by other code or versions"
MIXED = "compares trials of different code or versions"
SIGNS = {OTHER: "†", MIXED: "‡"}
"""The marks of an entry, each with its sign."""
NOT_RECORDED = "not recorded"
MAX_REASONS = 4


@dataclass(frozen=True)
class TrialProvenance:
    """The code and versions that made a trial; ``made`` is None where they were not recorded.

    ``changes`` describes, in words, how they differ from the code and versions of now. It is empty
    where nothing differs.
    """

    made: Provenance | None
    changes: tuple[str, ...] = ()

    def columns(self) -> dict[str, str | None]:
        """Return the columns ``versions`` and ``made_by`` of the results table."""
        if self.made is None:
            return {"versions": None, "made_by": None}
        return {
            "versions": json.dumps(self.made.versions, sort_keys=True),
            "made_by": self.made.hash,
        }


def provenance_of_record(
    record: TrialRecord, now: Provenance, source: str, weights: str | None
) -> TrialProvenance:
    """Return the code and versions that made the trial of a record.

    Args:
        record: The record of the trial.
        now: The code and versions of now.
        source: Name of the trial's source.
        weights: SHA-256 of the source's weights as they are now; None for scratch, or where the
            source has no weights yet.
    """
    made = record.made
    changes = provenance.changes(made, now)
    for metadata in record.begun_by:
        begun = provenance.changes(provenance.from_metadata(metadata), now)
        changes += (f"begun by other code or versions ({', '.join(begun)})",) if begun else ()
    started_from = record.parent_weights
    if weights and started_from and started_from != weights:
        changes += (f"source {source} was made anew since",)
    return TrialProvenance(made, changes)


def mark_entries(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    trial_provenance: Mapping[str, TrialProvenance],
) -> list[MatrixEntry]:
    """Return the entries with their ``code_mark``, which is empty where nothing differs.

    An entry is MIXED where its trials and those that its gains are over
    (``MatrixEntry.compared_with``) were not all made by the same code and versions. These others
    are scratch of the same backbone, the best scratch network, and for a random probe the linear
    probe. Otherwise an entry is OTHER where one of its own trials was made by other code or
    versions than those of now.
    """
    trials: dict[EntryKey, list[str]] = defaultdict(list)
    for row in rows:
        ids = trials[entry_key(row)]
        if row.is_tested and row.trial_id in trial_provenance and row.trial_id not in ids:
            ids.append(row.trial_id)
    out: list[MatrixEntry] = []
    for entry in entries:
        own = trials[entry.key]
        against = [trial_id for key in entry.compared_with for trial_id in trials[key]]
        made = [trial_provenance[trial_id].made for trial_id in (*own, *against)]
        if any(provenance.differences(made[0], other) for other in made[1:]):
            out.append(replace(entry, code_mark=MIXED))
        elif any(trial_provenance[trial_id].changes for trial_id in own):
            out.append(replace(entry, code_mark=OTHER))
        else:
            out.append(entry)
    return out


def describe_changes(
    trial_provenance: Mapping[str, TrialProvenance], are_remade: bool = False
) -> list[str]:
    """Return a sentence on the trials of other code or versions, and one for each reason.

    Returns an empty list where there are no such trials.

    Args:
        are_remade: Whether they are made again; otherwise they are used as they are.
    """
    changed = [made for made in trial_provenance.values() if made.changes]
    if not changed:
        return []
    by_reason: Counter[str] = Counter()
    for made in changed:
        more = len(made.changes) - MAX_REASONS
        reason = ", ".join(made.changes[:MAX_REASONS])
        by_reason[f"{reason} and {more} more" if more > 0 else reason] += 1
    used = "are used as they are; --remake changed makes them anew"
    return [
        f"{len(changed)} of {len(trial_provenance)} trials were made by other code or versions "
        f"than those of now and {'are made anew' if are_remade else used}",
        *(f"{plural(count, 'trial')}: {reason}" for reason, count in by_reason.most_common()),
    ]


def versions_table(rows: Sequence[ResultRow]) -> list[list[str]]:
    """Return (library, versions) for each library.

    Where trials were made with several versions of a library, each has its number of trials.
    """
    trials = {row.trial_id: row.versions for row in rows}
    if not trials:
        return []
    counts: dict[str, Counter[str]] = {name: Counter() for name in provenance.LIBRARIES}
    for text in trials.values():
        versions: dict[str, str] = json.loads(text) if text else {}
        for name, count in counts.items():
            count[versions.get(name, NOT_RECORDED)] += 1
    out: list[list[str]] = []
    for name, count in counts.items():
        several = len(count) > 1
        version_texts = [
            f"{version} ({plural(number, 'trial')})" if several else version
            for version, number in count.most_common()
        ]
        out.append([name, ", ".join(version_texts)])
    return out
