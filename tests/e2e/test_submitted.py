"""`onetomany submit` of a real job file to a cluster of two nodes: it runs there, its log is
followed, its exit code comes back.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.local import local_cluster
from tests.e2e.conftest import SMALL

pytestmark = [pytest.mark.ray(own=True), pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two_nodes():
    with local_cluster(2, cpus_per_node=1, object_store_mib=300) as cluster:
        yield cluster


def test_a_job_file_runs_on_the_cluster_to_its_table_and_its_exit_code(
    two_nodes, onetomany_alone, tiny_data, tmp_path
):
    env = {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ),
        **two_nodes.env,
    }
    words = (
        "--address",
        two_nodes.job_address,
        "--env",
        "TINY_DATA",
        "--set",
        f"storage={tmp_path}/runs",
        "--set",
        "sources.garments.workers=2",
    )
    done = onetomany_alone("submit", SMALL, *words, cwd=tmp_path, env=env, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (
        "submitted small-" in done.stdout
        and "fine-tune: trials 2/2" in done.stdout
        and "succeeded" in done.stdout
    )
    rows = pq.read_table(tmp_path / "runs/small/results.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"done"}
    assert {row["technique"] for row in rows} == {"scratch", "full"}
    bad = onetomany_alone(
        "submit",
        SMALL,
        *words,
        "--set",
        "targets.shoes.workers=400",
        cwd=tmp_path,
        env=env,
        timeout=300,
    )
    assert bad.returncode == 1 and "it can never be met" in bad.stdout, bad.stdout[-3000:]
    wrong = onetomany_alone(
        "submit", SMALL, *words, "--set", "sources.garments.worker=2", cwd=tmp_path, env=env
    )
    assert (
        wrong.returncode == 2
        and "did you mean workers" in wrong.stderr
        and "submitted" not in wrong.stdout
    ), "a mistake is found before it is sent"
