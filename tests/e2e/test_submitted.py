"""`onetomany submit` of a real job file to a cluster of two nodes: it runs there, its log is
followed, its exit code comes back, and no secret of the environment stays behind.
"""

from __future__ import annotations

import os
import shutil

import pyarrow.parquet as pq
import pytest

from cluster.local import local_cluster
from pipeline.io import storage
from tests.e2e.canaries import (
    SECRETS,
    data_on_s3,
    files_that_hold_a_secret,
    holds_a_secret,
    objects_that_hold_a_secret,
)
from tests.e2e.conftest import ROOT, SMALL

pytestmark = [pytest.mark.ray(own=True), pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two_nodes(s3_server):
    """Its nodes have the key in their environment, as they have it from a Kubernetes Secret."""
    with pytest.MonkeyPatch.context() as environment:
        for name, secret in SECRETS.items():
            environment.setenv(name, secret)
        with local_cluster(2, cpus_per_node=1, object_store_mib=300) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def submit(two_nodes, s3_server, tiny_data, onetomany_alone, tmp_path_factory):
    """A function that submits the small job, with data and results on S3, from a folder that has
    the key in its `.env`.
    """
    folder = tmp_path_factory.mktemp("submitted")
    shutil.copy(SMALL, folder)
    (folder / ".env").write_text("\n".join(f"{name}={value}" for name, value in SECRETS.items()))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    data = data_on_s3(s3_server, tiny_data)
    env = {"PYTHONPATH": path, "TINY_DATA": data, **two_nodes.env}
    words = ("--address", two_nodes.job_address, "--env", "TINY_DATA")
    words += ("--set", f"storage={s3_server}/submitted", "--set", "sources.garments.workers=2")
    words += ("--set", "sources.garments.data.decode=workers")

    def call(*more: str):
        return onetomany_alone(
            "submit", "small.yaml", *words, *more, cwd=folder, env=env, timeout=500
        )

    return call


@pytest.fixture(scope="module")
def done(submit):
    return submit()


def test_a_job_file_runs_on_the_cluster_to_its_table_and_its_exit_code(done, s3_server):
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "submitted small-" in done.stdout
    assert "fine-tune: trials 2/2" in done.stdout
    assert "succeeded" in done.stdout
    with storage.open_read(f"{s3_server}/submitted/small/results.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    assert {row["technique"] for row in rows} == {"scratch", "full"}


def test_it_leaves_no_secret_on_the_cluster(done, two_nodes, s3_server):
    """Not in Ray's logs, in the package, in the results or in what was printed."""
    assert list(two_nodes.temp_dir.rglob("logs/raylet.out"))
    assert list(two_nodes.temp_dir.rglob("job-driver-*.log"))
    package = list(two_nodes.temp_dir.rglob("working_dir_files/*/small.yaml"))
    assert package, "the package is not where it is looked for"
    assert files_that_hold_a_secret(two_nodes.temp_dir) == []
    assert objects_that_hold_a_secret(f"{s3_server}/submitted") == []
    assert not holds_a_secret(done.stdout + done.stderr)


def test_a_mistake_is_found_before_it_is_sent(submit):
    wrong = submit("--set", "sources.garments.worker=2")
    assert wrong.returncode == 2
    assert "did you mean workers" in wrong.stderr and "submitted" not in wrong.stdout
