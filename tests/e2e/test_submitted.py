"""One local cluster of two nodes. A job file that is submitted runs there, its log is followed, its
exit code comes back, and no secret of the environment stays behind. In the end the cluster dies
node by node.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest

from cluster import local
from cluster import submit as submit_module
from cluster.local import local_cluster
from cluster.submit import SubmitError
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


ENTRY = """
import os, sys, time
import ray
import cluster

print("greeting", os.environ["GREETING"], "with", *sys.argv[1:], flush=True)
for line in range(4):
    print("line", line, flush=True)
    time.sleep(1)

@ray.remote(scheduling_strategy="SPREAD")
def where():
    import cluster  # shipped to the workers too
    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), cluster.__file__

ray.init(address="auto")
places = ray.get([where.remote() for _ in range(4)])
print("nodes", len({node for node, _ in places}))
code = {os.path.dirname(os.path.dirname(file)) for _, file in places}
print("copies of the code", len(code), os.getcwd() in code, os.path.exists("job.yaml"))
sys.exit(7)
"""

SLEEPER = """
import time
for second in range(600):
    print("tick", second, flush=True)
    time.sleep(1)
"""


def test_a_job_on_two_nodes_is_followed_to_its_exit_code(two_nodes, tmp_path):
    (tmp_path / "job.yaml").write_text(f"name: tiny\nstorage: {tmp_path}\n")
    (tmp_path / "entry.py").write_text(ENTRY)
    said: list[tuple[float, str]] = []
    code = submit_module.submit(
        tmp_path / "job.yaml",
        two_nodes.job_address,
        overrides=["seed=1"],
        env={"GREETING": "hello"},
        python_module="entry",
        include=["entry.py"],
        echo=lambda line: said.append((time.monotonic(), line)),
    )
    lines = [line for _, line in said]
    assert code == 7, "\n".join(lines)
    assert "greeting hello with run job.yaml --address auto --set seed=1" in lines
    times = {line: when for when, line in said}
    assert times["line 3"] - times["line 0"] > 1, "the log came in one piece"
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(4)]
    assert "nodes 2" in lines
    assert "copies of the code 2 True True" in lines
    assert any("must be one disk that all 2 nodes share" in line for line in lines)


def test_ctrl_c_leaves_the_job_running(two_nodes, tmp_path):
    (tmp_path / "job.yaml").write_text("name: sleeper\nstorage: s3://nowhere/runs\n")
    (tmp_path / "entry.py").write_text(SLEEPER)
    program = (
        "import sys; from functools import partial; from pathlib import Path; from "
        "cluster.submit import submit\n"
        f"sys.exit(submit(Path('job.yaml'), {two_nodes.job_address!r}, submission_id='sleeper',"
        " python_module='entry', include=['entry.py'], echo=partial(print, flush=True)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    client = submit_module._connect(two_nodes.job_address)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("tick"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 130
        assert "no longer following; sleeper goes on" in rest and "ray job stop --address" in rest
        assert client.get_job_info("sleeper").status == "RUNNING"
        with pytest.raises(SubmitError, match="already exists"):
            submit_module.submit(
                tmp_path / "job.yaml",
                two_nodes.job_address,
                submission_id="sleeper",
                python_module="entry",
                echo=lambda _: None,
            )
    finally:
        process.kill()
        process.wait()
        client.stop_job("sleeper")
    deadline = time.monotonic() + 30
    while not client.get_job_info("sleeper").status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert client.get_job_info("sleeper").status == "STOPPED"


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


def test_a_submitted_job_leaves_no_secret_on_the_cluster(done, two_nodes, s3_server):
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


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses that these processes accept connections on, IPv4 ones in IPv6 form too."""
    found = set()
    for process in processes:
        try:
            sockets = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {
            c.laddr.ip.removeprefix("::ffff:") for c in sockets if c.status == psutil.CONN_LISTEN
        }
    return found


def test_nodes_on_loopback_die_one_by_one_and_leave_nothing(two_nodes):
    """The last test of this file, since it ends the cluster."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        processes = two_nodes.processes()
        assert local.alive_nodes(two_nodes) == 2
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        assert listening(processes) and all(
            address in ("127.0.0.1", "::1") for address in listening(processes)
        )
        two_nodes.kill_node(1)
        assert two_nodes.nodes[0].poll() is None and two_nodes.nodes[1].poll() is not None
        assert {process.name() for process in two_nodes.processes()} >= {"gcs_server", "raylet"}
        two_nodes.stop()
        assert not any(
            process.is_running() and process.status() != "zombie" for process in processes
        )
        assert not two_nodes.temp_dir.exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
