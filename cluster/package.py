"""What `onetomany submit` ships to a cluster: one zip with the job file's folder and this project's code.

Ray could package the folder itself, but it leaves out what .gitignore names (data sets, most often) without a word, and
finds out about the size after the upload.
"""

from __future__ import annotations

import fnmatch
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CODE = Path(__file__).resolve().parent.parent  # a checkout, or site-packages: both packages stand side by side in it
PACKAGES = ("pipeline", "cluster")
EXCLUDES = (
    *(".git", ".venv", "venv", ".env", "node_modules", "*.egg-info", ".DS_Store"),
    *("__pycache__", "*.pyc", ".*_cache", ".cache", ".hypothesis", ".ipynb_checkpoints"),
    *("*.pt", "*.pth", "*.ckpt", "/runs", "/mlruns", "/wandb", "/lightning_logs"),
)
MAX_PACKAGE_MIB = 100  # Ray's DASHBOARD_CLIENT_MAX_SIZE, a constant; the 500 MiB in its documentation is another limit


class SubmitError(RuntimeError):
    """The job could not be submitted or followed. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """What is shipped: `files` maps names in the zip to files here; `left_out` names what an exclude matched."""

    files: dict[str, Path]
    left_out: list[str]


def collect(root: Path, exclude: Sequence[str] = (), ship_code: bool = True) -> Package:
    """The files to ship from `root`, and this project's two packages unless `root` is a checkout with its own."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    _walk(root, PurePosixPath(), (*EXCLUDES, *exclude), files, left_out, frozenset())
    for name in PACKAGES if ship_code else ():
        if f"{name}/__init__.py" in files:
            continue  # a checkout: what stands there is what runs
        if any(file.startswith(f"{name}/") for file in files):
            raise SubmitError(f"{root / name} would hide the Python package {name}: rename it, or exclude it")
        _walk(CODE / name, PurePosixPath(name), EXCLUDES, files, [], frozenset())
    return Package(files, left_out)


def _walk(
    folder: Path,
    inside: PurePosixPath,
    excludes: Sequence[str],
    files: dict[str, Path],
    left_out: list[str],
    above: frozenset[str],
) -> None:
    """Collect in name order. Links are followed (data often is one), except to a folder that we are already in."""
    above |= {os.path.realpath(folder)}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = inside / entry.name
        if any(fnmatch.fnmatch(f"/{path}" if "/" in pattern else entry.name, pattern) for pattern in excludes):
            left_out.append(str(path))
        elif entry.is_file():
            files[str(path)] = Path(entry.path)
        elif entry.is_dir() and os.path.realpath(entry.path) not in above:
            _walk(Path(entry.path), path, excludes, files, left_out, above)


def write_zip(package: Package, archive: Path) -> Path:
    """Equal files give an equal zip, which the cluster then already has: no clock times in it."""
    size_mib = sum(file.stat().st_size for file in package.files.values()) / 2**20
    if size_mib <= 20 * MAX_PACKAGE_MIB:  # beyond it no compression helps, and trying takes minutes
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
            for name, file in package.files.items():
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                info.external_attr = (file.stat().st_mode & 0o777) << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                with open(file, "rb") as source, out.open(info, "w", force_zip64=True) as target:
                    while chunk := source.read(2**20):
                        target.write(chunk)
        size_mib = archive.stat().st_size / 2**20
    if size_mib < MAX_PACKAGE_MIB:
        return archive
    largest = sorted(package.files.items(), key=lambda item: -item[1].stat().st_size)[:3]
    named = ", ".join(f"{name} ({file.stat().st_size / 2**20:.0f} MiB)" for name, file in largest)
    raise SubmitError(
        f"the package has {size_mib:.0f} MiB, and Ray takes less than {MAX_PACKAGE_MIB}; the largest files: {named}. "
        "Put data on s3:// or a shared disk and name it there in the job, or exclude what the job does not read"
    )
