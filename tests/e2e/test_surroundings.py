"""What is around a run stays outside: packages named like this project's in the current folder, and a
secret key in the environment.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.e2e.canaries import (
    SECRETS,
    data_on_s3,
    files_that_hold_a_secret,
    holds_a_secret,
    objects_that_hold_a_secret,
)
from tests.e2e.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a `pipeline` and a `cluster` of its own."""
    for name in ("pipeline", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise SystemExit('the package in the current folder was taken')\n"
        )
    return tmp_path


@pytest.fixture
def ray_folder():
    """A folder with a short name, since Ray's socket paths may have 107 characters."""
    folder = tempfile.mkdtemp(prefix="o2m")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_on_a_cluster_packages_of_the_current_folder_are_not_taken(
    folder, onetomany_alone, ray_address
):
    """Neither by the command nor by Ray's workers."""
    done = onetomany_alone("run", SMALL, cwd=folder, env={"RAY_ADDRESS": ray_address})
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "runs/small/report.html").exists()
    assert "was taken" not in done.stdout + done.stderr


@pytest.mark.ray(own=True)
def test_a_run_with_a_ray_of_its_own_takes_no_packages_and_leaves_no_secret(
    folder, tiny_data, s3_server, onetomany_alone, ray_folder
):
    """The key is found nowhere afterwards: not in Ray's logs, in the results or in what was
    printed.
    """
    shutil.copy(SMALL, folder / "job.yaml")
    runs = f"{s3_server}/secrets-run"
    data = data_on_s3(s3_server, tiny_data)
    env = {**SECRETS, "TINY_DATA": data, "RAY_TMPDIR": str(ray_folder)}
    done = onetomany_alone("run", "job.yaml", "--set", f"storage={runs}", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "was taken" not in done.stdout + done.stderr
    assert list(ray_folder.rglob("logs/raylet.out")), "Ray's session is not where it is looked for"
    assert files_that_hold_a_secret(ray_folder) == []
    assert objects_that_hold_a_secret(runs) == []
    assert files_that_hold_a_secret(folder) == []
    assert not holds_a_secret(done.stdout + done.stderr)
