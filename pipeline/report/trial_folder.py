"""Where a trial lies in the folder of its job: under names that a person can read.

``trials/clothing/garments/full/labels-0.05/seed0-3f2a9c0b71de``: target, source, technique, labels,
and the seed with the trial's id. The id tells trials apart that differ in anything else, such as
hyper-parameters, so a name may be shortened, and its characters replaced. Earlier versions
used ``trials/3f2a9c0b71de``: such trials are read from there and not moved.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection

from pipeline.io import storage

TRIALS, SOURCES = "trials", "sources"
BUNDLE = "bundle"
"""The folder of the trained network in that of its trial."""
MAX_CHARACTERS = 48
"""Of each name, so that a path is never too long (Windows: 260 characters, S3: 1024 bytes)."""
ID = "[0-9a-f]{12}"
_LEAF = rf"(?:search-)?seed\d+-({ID})"
_NAMED = rf"(?:[^/]+/){{4}}{_LEAF}"
_RESERVED = rf"(?i:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?|{ID}"
"""Names of devices on Windows, and what could be a folder of an older version."""


def name_folder(
    target: str,
    source: str,
    technique: str,
    labels: str,
    seed: int,
    stage: str,
    trial_id: str,
    ids_in_old_layout: Collection[str] = (),
) -> str:
    """Return the folder of a trial, relative to that of its job.

    Args:
        target: The target's name.
        source: That of the source, or of the backbone where there is no source.
        technique: The technique with its options: ``lp_ft(probe_share=0.3)``.
        labels: The label fraction as tables show it: "0.05", "25/class".
        seed: The trial's seed.
        stage: "search" or "final".
        trial_id: 12 hex digits.
        ids_in_old_layout: Ids of trials that lie where an older version laid them.
    """
    if trial_id in ids_in_old_layout:
        return old_layout_folder(trial_id)
    names = (target, source, technique, f"labels-{labels.replace('/', '-per-')}")
    search = "search-" if stage == "search" else ""
    return "/".join((TRIALS, *map(safe_name, names), f"{search}seed{seed}-{trial_id}"))


def safe_name(text: str) -> str:
    """Return a name of ASCII letters, digits, ``-``, ``_`` and ``.``, which every file system and
    S3 take. Accents are left out. A name without such a character is replaced by its hash.
    """
    decomposed = unicodedata.normalize("NFKD", storage.without_secrets(text))
    letters = "".join(one for one in decomposed if not unicodedata.combining(one))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", letters)
    plain = plain.strip("-._")[:MAX_CHARACTERS].rstrip("-._")
    if not plain:
        return f"name-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return f"_{plain}" if re.fullmatch(_RESERVED, plain) else plain


def old_layout_folder(trial_id: str) -> str:
    """Return the folder of a trial of an older version, relative to that of its job."""
    return storage.join(TRIALS, trial_id)


def ids_in_old_layout(root: str) -> frozenset[str]:
    """Return the ids of the trials that an older version laid into the folder of a job."""
    names = storage.list_folders(storage.join(root, TRIALS))
    return frozenset(name for name in names if re.fullmatch(ID, name))


def find_all(root: str) -> dict[str, str]:
    """Return a dict from trial id to folder, for all trials in the folder of a job."""
    place = storage.join(root, TRIALS)
    folders: dict[str, str] = {}
    for uri in storage.list_files(place):
        inside = uri[len(place) :].lstrip("/")
        if match := re.match(rf"({ID})/|{_NAMED}/", inside):
            folders[match[1] or match[2]] = storage.join(TRIALS, match[0])
    return folders


def uri_of_bundle(root: str, folder: str) -> str:
    """Return the place of a trial's bundle, in the folder of the job that is read.

    Records and tables state the place where it was written, which is another one once the folder of
    the job was moved or copied.

    Args:
        root: The folder of the job.
        folder: That of the trial, relative to it.
    """
    return storage.join(root, folder, BUNDLE)


def uri_of_parent(root: str, bundle_uri: str, parent_uri: str) -> str:
    """Return the place of the bundle of a trial's source, in the folder of the job that is read.

    A source's bundle that lies outside of the folder in which the trial was written, such as that
    of another job, stays where it is.

    Args:
        root: The folder of the job.
        bundle_uri: The trial's bundle, at its place when it was written.
        parent_uri: That of its source, likewise.
    """
    written = split_bundle(bundle_uri)
    if written is None or not parent_uri.startswith(storage.join(written[0], SOURCES, "")):
        return parent_uri
    return storage.join(root, parent_uri[len(written[0]) :].lstrip("/"))


def split_bundle(uri: str) -> tuple[str, str] | None:
    """Return the job's folder and the trial's id of a trial's bundle; None for another bundle."""
    match = re.fullmatch(rf"(.+)/{TRIALS}/(?:{_NAMED}|({ID}))/{BUNDLE}/?", uri)
    return None if match is None else (match[1], match[2] or match[3])


def remove(root: str, folder: str) -> None:
    """Remove the folder of a trial, and the folders above it that are then empty."""
    storage.remove_tree(storage.join(root, folder))
    above = folder.rpartition("/")[0]
    while above and storage.remove_empty_folder(storage.join(root, above)):
        above = above.rpartition("/")[0]
