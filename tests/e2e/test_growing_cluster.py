"""A cluster whose head has no CPUs and whose workers come when they are asked for, as AWS and GCP
files here make one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from growing import GrowingCluster

from tests.e2e.conftest import SMALL

pytestmark = [pytest.mark.ray(own=True), pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
WORKERS = {
    "cpu": {
        "resources": {"CPU": 2, "object_store_memory": 200 << 20},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
}


@pytest.fixture(scope="module")
def growing():
    cluster = GrowingCluster(
        {"CPU": 0}, {name: dict(spec) for name, spec in WORKERS.items()}, autoscaler_v2=True
    )
    cluster.start()
    yield cluster
    cluster.shutdown()


def submitted(onetomany_alone, cluster, job: Path, tmp_path: Path, *words: str):
    env = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **cluster.handle.env,
    }
    return onetomany_alone(
        "submit",
        job,
        "--address",
        cluster.handle.job_address,
        "--env",
        "TINY_DATA",
        "--set",
        f"storage={tmp_path}/runs",
        *words,
        cwd=tmp_path,
        env=env,
        timeout=600,
    )


def shrinks_to_nothing(cluster) -> bool:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if "ALIVE" not in cluster.workers():
            return True
        time.sleep(1)
    return False


def test_a_job_makes_a_cluster_without_cpus_grow_and_it_shrinks_again(
    growing, onetomany_alone, tiny_data, tmp_path
):
    """With elastic ranks, their workers of Ray Data, and two trials at once."""
    assert growing.workers() == []
    words = ("sources.garments.workers=[1, 2]", "sources.garments.data.decode=workers")
    words = [word for one in words for word in ("--set", one)]
    done = submitted(onetomany_alone, growing, SMALL, tmp_path, *words)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "asks the cluster for 2 x 1 CPU, and waits until the nodes are there" in done.stdout
    rows = pq.read_table(tmp_path / "runs/small/results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    assert len({row["trial_id"] for row in rows}) == 2
    assert growing.workers() != [], "nodes came for the job; some may have gone again"
    assert shrinks_to_nothing(growing)


def test_what_no_declared_node_can_hold_is_refused_before_anything_starts(
    growing, onetomany_alone, tmp_path
):
    words = ("--address", growing.handle.address, "--set", "sources.garments.cpus_per_worker=3")
    done = onetomany_alone("run", SMALL, *words, cwd=tmp_path, env=growing.handle.env)
    assert done.returncode == 1
    assert (
        "sources.garments: the cluster can grow to" in done.stderr
        and "it can never be met" in done.stderr
    )
