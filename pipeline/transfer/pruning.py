"""Stale trials: trials in the results table and the storage that the job no longer has.

A trial is stale when it is no longer part of the job as its file is now, because of another
setting, seed, technique, source or target, or changed data. Its rows and its bundle are kept until
the user asks to prune them, since another job may start from them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.checkpoints import bundle
from pipeline.config.schema import CHECKPOINT_PREFIXES
from pipeline.io import checksums, storage
from pipeline.io.wording import plural
from pipeline.report import plots, results, trial_folder
from pipeline.report.matrix import SCRATCH, entry_key
from pipeline.report.results import ResultRow
from pipeline.train import resume_history

USES_FILE = "uses.json"
"""File in a job's folder with the bundles and checkpoints that its sources start from, so that no
other job prunes them.
"""
STACKS = "stacks"
"""Folder in a job's folder with the resume points of heads that train together."""
MAX_ENTRIES = 6


@dataclass(frozen=True)
class StaleTrials:
    """What pruning would remove.

    ``rows`` is the number of rows in results.parquet. ``trials`` are the trials whose folders
    (record, predictions, bundle, log) would be removed: id to folder in that of the job.
    """

    rows: int
    trials: Mapping[str, str]
    entries: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)
    """Users of a trial's bundle, by trial id. These trials are kept."""
    stacks: tuple[str, ...] = ()
    """Names of the folders with resume points of heads that would train together."""

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.trials or self.stacks)

    def lines(self) -> list[str]:
        """Return lines on what is removed and what is kept."""
        if self.is_empty:
            out = ["nothing is stale: every trial that is kept belongs to the job"]
        else:
            out = [
                f"stale: {plural(self.rows, 'row')} of {results.FILE} and the folders of "
                f"{plural(len(self.trials), 'trial')}, with their bundles",
                *self.entries,
            ]
        if self.stacks:
            stacks = plural(len(self.stacks), "stack")
            out.append(f"stale: resume points of {stacks} of heads that were killed")
        return [
            *out,
            *(f"kept: trial {name} is used by {user}" for name, user in self.kept.items()),
        ]


def describe_stale(rows: Sequence[ResultRow]) -> list[str]:
    """Return a sentence on the rows of trials that are no longer part of the job.

    Returns an empty list where there are no such rows.
    """
    stale = [row for row in rows if row.current is False]
    if not stale:
        return []
    found = _entries(stale)
    more = f" and {len(found) - MAX_ENTRIES} more" if len(found) > MAX_ENTRIES else ""
    return [
        f"{len(stale)} of the {len(rows)} rows of {results.FILE} are stale: their trials are "
        "not in the job any more, and they are in no table here "
        f"(the column current is false): {'; '.join(found[:MAX_ENTRIES])}{more}. `onetomany "
        "report JOB --prune-stale` removes them"
    ]


def _entries(rows: Iterable[ResultRow]) -> list[str]:
    """Return the entries of some rows, each with its number of trials."""
    trials = {(row.trial_id, row.trial_stage): entry_key(row) for row in rows}
    count = Counter(trials.values())
    out = []
    for (source, backbone, target, technique, fraction), number in count.items():
        named = f"scratch of {backbone}" if source == SCRATCH else source
        out.append(
            f"{target}: {named}, {technique}, {plots.labels_text(fraction)} "
            f"({plural(number, 'trial')})"
        )
    return sorted(out)


def find_stale(root: str, current: set[str], used: Mapping[str, str]) -> StaleTrials:
    """Find the stale trials of the job in the folder ``root``.

    Args:
        root: The folder of the job.
        current: Ids of all trials of the job.
        used: Users of each bundle and checkpoint, by its location (`uses`).
    """
    rows = results.read(root)
    folders = {row.trial_id: row.folder for row in rows} | trial_folder.find_all(root)
    stale_ids = folders.keys() - current
    kept = {}
    for name in sorted(stale_ids):
        inside = _place(storage.join(root, folders[name])) + "/"
        # what others recorded before the folder of the job was moved or copied
        inside_before = f"/{folders[name]}/"
        users = sorted(
            {
                user
                for place, user in used.items()
                if f"{place}/".startswith(inside) or inside_before in f"{place}/"
            }
        )
        if users:
            kept[name] = ", ".join(users)
    removed_ids = stale_ids - kept.keys()
    stale = [row for row in rows if row.trial_id in removed_ids]
    stacks = _stale_stacks(root, current)
    trials = {name: folders[name] for name in sorted(removed_ids)}
    return StaleTrials(len(stale), trials, tuple(_entries(stale)), kept, stacks)


def _stale_stacks(root: str, current: set[str]) -> tuple[str, ...]:
    """Return the stacks of heads with a trial that is no longer part of the job, or is unknown.

    Nothing can continue from their resume points.
    """
    out = []
    for name in storage.list_folders(storage.join(root, STACKS)):
        trials = resume_history.trials_of(storage.join(root, STACKS, name))
        if not trials or not set(trials) <= current:
            out.append(name)
    return tuple(out)


def prune(root: str, stale: StaleTrials) -> None:
    """Remove stale trials, the rows first, so that the table never names a missing bundle."""
    results.remove(root, stale.trials.keys())
    for folder in stale.trials.values():
        trial_folder.remove(root, folder)
    for name in stale.stacks:
        storage.remove_tree(storage.join(root, STACKS, name))


# ---------------------------------------------------------------- what other jobs use


def record_uses(root: str, sources: Mapping[str, Sequence[str]], of_part: bool = False) -> None:
    """Record in a job's folder the bundles and checkpoints that each of its sources starts from.

    Args:
        of_part: They are some of the job's sources; what is recorded of the others stays.
    """
    recorded = storage.join(root, USES_FILE)
    before = {}
    if of_part and storage.exists(recorded):
        before = checksums.read_document(recorded)
    found = {name: list(places) for name, places in sources.items()}
    checksums.write_document(recorded, {**before, **found})


def uses(root: str, own: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the users of each bundle and checkpoint that sources start from, by its location.

    The sources are those of this job and of all jobs next to it in the same storage. Of jobs that
    ran before their uses were recorded, the parents in their tables and bundles are used. Jobs in
    other places are not known.
    """
    out = {
        _place(place): f"this job's source {name}"
        for name, places in own.items()
        for place in places
    }
    storage_uri, _, mine = root.rstrip("/").rpartition("/")
    for job in storage.list_folders(storage_uri):
        if job != mine:
            out |= {
                _place(place): f"job {job}" for place in _used_by(storage.join(storage_uri, job))
            }
    return out


def _used_by(root: str) -> set[str]:
    found: set[str] = set()
    recorded = storage.join(root, USES_FILE)
    if storage.exists(recorded):
        found |= {
            place for places in checksums.read_document(recorded).values() for place in places
        }
    found |= {row.parent_uri for row in results.read(root) if row.parent_uri}
    for name in storage.list_folders(storage.join(root, "sources")):
        uri = storage.join(root, "sources", name, "bundle")
        parent = bundle.read_manifest(uri).parent if bundle.exists(uri) else None
        if parent:
            found.add(parent)
    return found


def _place(text: str) -> str:
    """Return the place of a bundle or checkpoint in a form that can be compared.

    It has no prefix such as ``bundle:``, and links in a local path are resolved.
    """
    place = text.partition(":")[2] if text.startswith(CHECKPOINT_PREFIXES) else text
    place = place.rstrip("/")
    return place if storage.is_remote(place) else os.path.realpath(place)
