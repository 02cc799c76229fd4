"""Makes the zip that `onetomany submit` ships to a cluster.

It has the job file, the files that it names by a path relative to itself, those that `include`
names, and this project's code. Nothing else of the folder is shipped, and never a secret. Ray could
package the folder itself, but it silently leaves out what .gitignore names (data sets, most often),
takes everything else, and finds out about the size only after the upload.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

# A checkout, or site-packages: both packages stand side by side in it
CODE = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "cluster")
IGNORE_FILE = ".onetomanyignore"
SECRETS = (
    *(
        ".env*",
        ".aws",
        ".azure",
        ".gcloud",
        ".kube",
        ".docker",
        ".ssh",
        ".gnupg",
        ".netrc",
        "_netrc",
        ".npmrc",
        ".pypirc",
    ),
    *(
        ".git-credentials",
        "id_rsa*",
        "id_dsa*",
        "id_ecdsa*",
        "id_ed25519*",
        "*.pem",
        "*.p12",
        "*.pfx",
        "*.keystore",
    ),
    *(
        "credentials",
        "credentials*.json",
        "service-account*.json",
        "service_account*.json",
        "secrets",
        "secrets.*",
    ),
)
"""Names of files and folders that are never shipped, whoever asks for them. Case does not
matter.
"""
EXCLUDES = (
    *(".git", ".venv", "venv", "node_modules", "*.egg-info", ".DS_Store", IGNORE_FILE),
    *("__pycache__", "*.pyc", ".*_cache", ".cache", ".hypothesis", ".ipynb_checkpoints"),
)
"""Names of files and folders that are of no use elsewhere."""
# Ray's DASHBOARD_CLIENT_MAX_SIZE, a constant; the 500 MiB in its documentation is another limit
MAX_PACKAGE_MIB = 100


class SubmitError(RuntimeError):
    """The job could not be submitted or followed. The message says what to do."""


@dataclass
class Package:
    """The files that are shipped."""

    files: dict[str, Path] = field(default_factory=dict)
    """Names in the zip, each with the file on this machine."""
    left_out: list[str] = field(default_factory=list)
    """Names of files that were asked for and are not shipped."""

    def size_bytes(self) -> int:
        """Return the bytes of all files before compression."""
        return sum(file.stat().st_size for file in self.files.values())

    def listing(self) -> Iterator[str]:
        """Yield a line for each file with its size, then those left out, then the sum."""
        for name in sorted(self.files):
            yield f"{_size(self.files[name].stat().st_size)}  {name}"
        for name in self.left_out:
            yield f"{'left out':>10}  {name}"
        yield f"{_size(self.size_bytes())}  in {len(self.files)} files, before compression"


def _size(count: int) -> str:
    """Return a number of bytes as text of 10 characters."""
    if count < 2**10:
        return f"{count:>8} B"
    if count < 2**20:
        return f"{count / 2**10:>6.1f} KiB"
    return f"{count / 2**20:>6.1f} MiB"


def collect(
    job_file: Path,
    named: Iterable[str] = (),
    *,
    root: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ship_code: bool = True,
) -> Package:
    """Return the files that a job needs on another machine.

    Args:
        job_file: The job file.
        named: Files, folders and globs that the job names, relative to the job file.
        root: The folder that all must be in, and whose structure is kept; None: that of the job
            file.
        include: Further files, folders and globs, relative to the root.
        exclude: Shell patterns of names of files and folders that are not shipped. A pattern with
            a slash is one of paths below the root. Those of the root's `.onetomanyignore`, one per
            line, are added.
        ship_code: Whether this project's packages are added.

    Raises:
        SubmitError: A named file is not below the root, looks like a secret or is left out by a
            pattern; a link leads out of the root; or the job names a file in a folder with the
            name of one of the packages.
    """
    job_file = Path(os.path.abspath(job_file))
    root = Path(os.path.abspath(root or job_file.parent))
    walk = _Walk(root, (*EXCLUDES, *_ignored(root), *exclude))
    walk.add(job_file, "the job file")
    for pattern in named:
        walk.add_matching(job_file.parent, pattern, "the job")
    for pattern in include:
        walk.add_matching(root, pattern, "--include")
    package = Package(dict(sorted(walk.files.items())), sorted(set(walk.left_out)))
    for name in PACKAGES if ship_code else ():
        if any(file.startswith(f"{name}/") for file in package.files):
            raise SubmitError(
                f"{root / name} would hide the Python package {name}: rename the folder that "
                "the job names"
            )
        code = _Walk(CODE, EXCLUDES)
        code.add(CODE / name, "this project")
        package.files |= code.files
    return package


def _ignored(root: Path) -> list[str]:
    """Return the patterns of the root's ignore file: one per line, # begins a comment."""
    file = root / IGNORE_FILE
    if not file.is_file():
        return []
    lines = [line.strip().rstrip("/") for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


class _Walk:
    """Collects files below a root by their names there."""

    def __init__(self, root: Path, excludes: Sequence[str]) -> None:
        self.root, self.excludes = root, excludes
        self.files: dict[str, Path] = {}
        self.left_out: list[str] = []

    def add_matching(self, folder: Path, pattern: str, who: str) -> None:
        """Add the file, the folder or what the glob matches, by a path relative to `folder`."""
        place = Path(os.path.abspath(folder / pattern))
        if os.path.lexists(place):
            self.add(place, who)
            return
        matches = sorted(glob.glob(str(place), recursive=True))
        if not matches:
            raise SubmitError(f"{who} names {pattern}, and nothing like it is in {folder}")
        for match in matches:
            self.add(Path(match), who, is_chosen=False)

    def add(self, place: Path, who: str, is_chosen: bool = True) -> None:
        """Add a file, or the files in a folder.

        Args:
            place: The file or folder.
            who: Who names it, for errors.
            is_chosen: Whether it was named itself. It is then an error if it may not be shipped;
                otherwise it is left out.
        """
        if not place.is_relative_to(self.root):
            raise SubmitError(
                f"{who} names {place}, which is not below {self.root}, the folder that is shipped "
                "from. Put it there, or on s3:// or a disk that the cluster shares, and name it by "
                "that place"
            )
        name = PurePosixPath(*place.relative_to(self.root).parts)
        parts = (name, *name.parents)
        secret = next((part.name for part in parts if _matches(part, SECRETS)), None)
        excluded = next((part for part in parts if _matches(part, self.excludes)), None)
        if (secret or excluded) and not is_chosen:
            self.left_out.append(str(name))
            return
        if secret:
            raise SubmitError(
                f"{who} names {name}, and {secret} looks like a secret, which is never "
                "shipped: rename it if it is none"
            )
        if excluded:
            raise SubmitError(
                f"{who} names {name}, and --exclude or {IGNORE_FILE} leaves {excluded} out: "
                "change one of them"
            )
        self._walk(place, name, frozenset())

    def _walk(self, place: Path, name: PurePosixPath, above: frozenset[str]) -> None:
        """Collect files in the order of their names.

        A link is followed if it stays below the root and does not lead to a folder above it.
        """
        real = os.path.realpath(place)
        if not Path(real).is_relative_to(os.path.realpath(self.root)):
            raise SubmitError(
                f"{place} is a link that leads to {real}, out of the folder that is shipped from. "
                "Copy the file there, or put it on s3:// or a disk that the cluster shares, and "
                "name it by that place"
            )
        if place.is_file():
            self.files[str(name)] = place
        elif place.is_dir() and real not in above:
            for entry in sorted(os.listdir(place)):
                if _matches(name / entry, SECRETS) or _matches(name / entry, self.excludes):
                    self.left_out.append(str(name / entry))
                else:
                    self._walk(place / entry, name / entry, above | {real})


def _matches(name: PurePosixPath, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches the last part of a name, or with a slash the full name."""
    full_name, last_part = f"/{name}".lower(), name.name.lower()
    return any(
        fnmatch.fnmatch(full_name if "/" in pattern else last_part, _anchored(pattern.lower()))
        for pattern in patterns
    )


def _anchored(pattern: str) -> str:
    """Return a pattern with a slash as one that begins at the root."""
    return pattern if "/" not in pattern or pattern.startswith("/") else f"/{pattern}"


def write_zip(package: Package, archive: Path) -> Path:
    """Write the zip. Equal files give an equal zip, which Ray does not upload again.

    Raises:
        SubmitError: It is too large for Ray.
    """
    size_mib = package.size_bytes() / 2**20
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
        f"the package has {size_mib:.0f} MiB, and Ray takes less than {MAX_PACKAGE_MIB}; the "
        f"largest files: {named}. Put data on s3:// or a shared disk and name it there in the job, "
        "or exclude what the job does not read"
    )
