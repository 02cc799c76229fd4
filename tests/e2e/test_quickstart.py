"""The main job's target that wins, on a Ray of its own, with its runs on an S3 server.

On Ray every domain takes the same way, and all five would take five minutes of the long tier:
`test_wheel.py` plans the whole job, and other tests run recordings, pictures, stays and robots.
What is around a run stays outside: packages named like this project's in the current folder, and a
secret key in the environment.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.io import storage
from tests.e2e.canaries import (
    SECRETS,
    files_that_hold_a_secret,
    holds_a_secret,
    objects_that_hold_a_secret,
)
from tests.e2e.conftest import ROOT, with_packages_of_its_own

pytestmark = [pytest.mark.ray(own=True), pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ray_folder():
    """A folder with a short name, since Ray's socket paths may have 107 characters."""
    folder = tempfile.mkdtemp(prefix="o2m")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_packages_of_its_own(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def done(s3_server, onetomany_alone, folder, ray_folder):
    words = ("run", ROOT / "jobs/quickstart.yaml", "--set", f"storage={s3_server}/quick")
    words += ("--only", "text", "--set", "targets.restaurants.label_fractions=[1.0]")
    env = {**SECRETS, "RAY_TMPDIR": str(ray_folder)}
    done = onetomany_alone(*words, cwd=folder, env=env, timeout=880)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_the_quickstart_wins_somewhere_and_hides_no_loss(done, s3_server):
    with storage.open_read(f"{s3_server}/quick/quickstart/results.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    tested = [row for row in rows if row["split"] == "test" and row["metric"] == "accuracy"]
    assert {row["target"] for row in tested} == {"restaurants"}
    assert {row["seed"] for row in tested} == {0, 1, 2} and {
        row["technique"] for row in tested
    } == {"scratch", "linear_probe", "full"}
    shown = done.stdout
    assert re.search(r"\]  wins\b", shown), "an interval of a gain that excludes zero"
    entries = {
        (row["target"], row["source"], row["technique"], row["label_fraction"]) for row in tested
    }
    lines = [
        line
        for line in shown.splitlines()
        if re.search(r"\d \[\d", line) and "95 %" not in line and line.startswith(" ")
    ]
    assert len(lines) == len(entries), "each entry has its line, whether it won or lost"
    for technique in ("linear_probe", "full"):
        gains = [row["gain"] for row in tested if row["technique"] == technique]
        (line,) = [line for line in lines if re.search(rf"\b{technique}\b", line)]
        gain = re.search(r"([+-]\d\.(\d+)) \[", line)
        assert gain and gain[1] == f"{sum(gains) / len(gains):+.{len(gain[2])}f}", line


def test_a_run_on_s3_leaves_nothing_here_and_takes_no_package_of_the_current_folder(done, folder):
    assert "was taken" not in done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {"pipeline", "cluster"}


def test_a_run_leaves_no_secret(done, s3_server, folder, ray_folder):
    """Not in Ray's logs, in the results or in what was printed."""
    assert list(ray_folder.rglob("logs/raylet.out")), "Ray's session is not where it is looked for"
    assert files_that_hold_a_secret(ray_folder) == []
    assert objects_that_hold_a_secret(f"{s3_server}/quick") == []
    assert files_that_hold_a_secret(folder) == []
    assert not holds_a_secret(done.stdout + done.stderr)
