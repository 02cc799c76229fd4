"""A secret key in the environment of a run is found nowhere afterwards: not in Ray's logs, the
results or the package.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import pytest

from cluster.local import local_cluster
from pipeline.io import storage
from tests.e2e.conftest import SMALL

pytestmark = [pytest.mark.ray(own=True), pytest.mark.slow, pytest.mark.timeout(600)]

SECRETS = {
    name: f"canary-{uuid.uuid4().hex}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
}
"""Made anew for each run of the tests, so that they stand in no source file that travels."""


@pytest.fixture
def data_on_s3(s3_server, tiny_data) -> str:
    uri = f"{s3_server}/secrets-data"
    storage.write_bytes(f"{uri}/images.parquet", (tiny_data / "images.parquet").read_bytes())
    return uri


@pytest.fixture
def ray_folder():
    """A folder with a short name, since Ray's socket paths may have 107 characters."""
    folder = tempfile.mkdtemp(prefix="o2m")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


def files_that_hold_a_secret(folder: Path) -> list[str]:
    """The regular files below the folder in which one of SECRETS stands, also those in hidden
    folders.
    """
    wanted = [secret.encode() for secret in SECRETS.values()]
    found = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.is_file() and any(secret in path.read_bytes() for secret in wanted):
                found.append(str(path.relative_to(folder)))
    return found


def objects_that_hold_a_secret(uri: str) -> list[str]:
    """The same for everything that the run wrote on S3."""
    wanted = [secret.encode() for secret in SECRETS.values()]
    names = storage.list_files(uri)
    assert any(name.endswith("report.html") for name in names), names
    return [name for name in names if any(secret in storage.read_bytes(name) for secret in wanted)]


def test_a_run_leaves_no_secret_in_rays_session_or_in_its_results(
    data_on_s3, s3_server, onetomany_alone, ray_folder, tmp_path
):
    shutil.copy(SMALL, tmp_path / "job.yaml")
    runs = f"{s3_server}/secrets-run"
    env = {**SECRETS, "TINY_DATA": data_on_s3, "RAY_TMPDIR": str(ray_folder)}
    done = onetomany_alone("run", "job.yaml", "--set", f"storage={runs}", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    logs = list(ray_folder.rglob("logs/raylet.out"))
    assert logs, "the run's Ray session is not where it is looked for"
    assert files_that_hold_a_secret(ray_folder) == []
    assert objects_that_hold_a_secret(runs) == []
    assert files_that_hold_a_secret(tmp_path) == []
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())


def test_a_submitted_job_leaves_no_secret_on_the_cluster(
    data_on_s3, s3_server, onetomany_alone, tmp_path, monkeypatch
):
    """The cluster's nodes have the key in their environment, as they have it from a Kubernetes
    Secret.
    """
    shutil.copy(SMALL, tmp_path / "job.yaml")
    (tmp_path / ".env").write_text(
        "\n".join(f"{name}={secret}" for name, secret in SECRETS.items())
    )
    runs = f"{s3_server}/secrets-submitted"
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    with local_cluster(1, cpus_per_node=2, object_store_mib=300) as cluster:
        words = ("--address", cluster.job_address, "--env", "TINY_DATA", "--set", f"storage={runs}")
        done = onetomany_alone(
            "submit", "job.yaml", *words, cwd=tmp_path, env={"TINY_DATA": data_on_s3, **cluster.env}
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert list(cluster.temp_dir.rglob("logs/raylet.out")) and list(
            cluster.temp_dir.rglob("job-driver-*.log")
        )
        assert list(cluster.temp_dir.rglob("working_dir_files/*/job.yaml")), (
            "the package is not where it is looked for"
        )
        assert files_that_hold_a_secret(cluster.temp_dir) == []
    assert objects_that_hold_a_secret(runs) == []
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
