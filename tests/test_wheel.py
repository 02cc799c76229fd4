"""What is installed without a clone: the wheel holds the command and the quickstart's samples."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
hatchling = pytest.importorskip("hatchling", reason="builds the wheel")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs; the libraries are those of these tests."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def call(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_quickstart_needs_no_clone(installed, tmp_path):
    shown = call(installed, "-m", "pipeline", "quickstart", "--dry-run", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for target in ("clothing", "restaurants", "new_speaker", "new_stays", "real_walls"):
        assert f"target {target} at " in shown.stdout
    assert re.search(r"in all: \d+ trials, \d+ steps", shown.stdout), "its cost"
    assert not list(tmp_path.rglob("*.*")), "a dry run writes nothing"
    program = (
        "from pathlib import Path\nfrom pipeline.config import samples\n"
        "print(samples.quickstart())\nprint(samples.copy_quickstart(Path('quickstart')))"
    )
    packed, copied = call(installed, "-c", program, cwd=tmp_path).stdout.split()
    assert Path(packed) == installed / "pipeline" / "samples" / "quickstart.yaml"
    assert (tmp_path / copied).is_file() and (tmp_path / "quickstart/data/README.md").is_file()
    assert not list((installed / "pipeline" / "samples").rglob("*.png"))
