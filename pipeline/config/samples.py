"""The small job of five domains that comes with this package, and the samples that it reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.config.registry import PACKAGE
from pipeline.config.yaml_loader import relative_places

LICENCES = "data/README.md"
"""Where each sample comes from, and under which licence."""


def quickstart() -> Path:
    """Return the job's file. Its samples lie beside it.

    It is packed into this package (``samples`` in pyproject.toml's wheel); in a clone it lies in
    ``jobs``.
    """
    packed = PACKAGE / "samples" / "quickstart.yaml"
    return packed if packed.exists() else PACKAGE.parent / "jobs" / "quickstart.yaml"


def copy_quickstart(folder: Path) -> Path:
    """Copy the job, its samples and their licences to a folder, and return the job's file there.

    A file that is there already stays as it is: it may have been changed.
    """
    job = quickstart()
    for name in (*relative_places(job), LICENCES, job.name):
        copy = folder / name
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_name(f"{copy.name}.part")
        shutil.copyfile(job.parent / name, unfinished)
        os.replace(unfinished, copy)
    return folder / job.name
