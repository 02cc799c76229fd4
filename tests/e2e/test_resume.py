"""kill -9 in the middle of an epoch: the rerun ends with the same weights, bit for bit, and each
row once an epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from ray._private.state import actors
from safetensors.torch import load_file

from tests.e2e.conftest import TINY, command_line, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, BATCH = 60, 16
SET = [
    f"sources.garments.train={{steps: {STEPS}, global_batch: {BATCH}, checkpoint_every_steps: "
    f"7, eval_every_steps: 20, trace_rows: true, ema: 0.9}}",
    "sources.garments.backbone={timm/test_vit: {drop_path: 0.1, drop_rate: 0.1}}",
    "sources.garments.data.modality={image: {size: 32, channels: 1}}",
    "targets={}",
]


def job(folder: Path) -> Path:
    """A copy of the tiny job with its image source alone."""
    spec = yaml.safe_load(TINY.read_text())
    del spec["sources"]["stories"]
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def words(folder: Path, *more: str) -> list[object]:
    return ["pretrain", job(folder), *(word for one in (*SET, *more) for word in ("--set", one))]


def launch(folder: Path, tiny_data: Path, ray_address: str) -> subprocess.Popen:
    """The run as a process that can be killed; it joins the tests' Ray."""
    return subprocess.Popen(
        command_line(*words(folder)),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tiny_data, {"RAY_ADDRESS": ray_address}),
    )


def trace(folder: Path, rank: int = 0) -> list[dict]:
    found = list((folder / "runs/tiny/sources").glob(f"garments-*/rows-rank{rank}.jsonl"))
    lines = found[0].read_text().splitlines() if found else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:  # the line that the kill cut
            continue
    return out


def wait_for_step(folder: Path, step: int, rank: int = 0) -> dict:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        lines = trace(folder, rank)
        if lines and lines[-1]["step"] >= step:
            return lines[-1]
        time.sleep(0.005)
    raise AssertionError("the run did not come to the step in time")


def kill_all(folder: Path, process: subprocess.Popen) -> None:
    """The driver and its ranks, which would go on for a second and come to their end in it.

    The ranks stop at once, and die after the controller: one that outlives the driver by a moment
    and sees them die reserves CPUs for new ones, which nothing of a finished job gives back.
    """
    controllers = [
        one["Pid"]
        for one in actors().values()
        if one["ActorClassName"] == "TrainController" and one["State"] == "ALIVE"
    ]
    assert controllers
    ranks = [trace(folder, rank)[-1]["pid"] for rank in (0, 1)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in controllers):
        time.sleep(0.05)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not list(folder.glob("runs/tiny/sources/*/bundle/manifest.json"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "runs/tiny/sources").glob("garments-*/bundle/weights.safetensors")
    return load_file(path)


def committed(folder: Path, ranks: int) -> list[int]:
    """Row ids in the order of steps: of a step that was taken again after a restart, the last time
    counts.
    """
    steps: dict[int, dict[int, list[int]]] = {}
    for rank in range(ranks):
        for line in trace(folder, rank):
            steps.setdefault(line["step"], {})[rank] = line["rows"]
    assert sorted(steps) == list(range(STEPS))
    return [
        row for step in range(STEPS) for rank in range(ranks) for row in steps[step].get(rank, [])
    ]


def check_exactly_once(rows: list[int]) -> None:
    n = len(set(rows))
    whole = len(rows) // n
    assert whole >= 3  # the kill was in the middle of an epoch, not at its end
    for epoch in range(whole):
        # global batches run on over the end of an epoch: epoch e is rows [e n, (e + 1) n) of the
        # sequence up to the order within a batch
        counts = Counter(rows[: (epoch + 1) * n // BATCH * BATCH])
        assert max(counts.values()) - min(counts.get(row, 0) for row in set(rows)) <= 1
    assert max(Counter(rows).values()) <= whole + 1 and min(Counter(rows).values()) >= whole


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, onetomany_on_ray):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = onetomany_on_ray(*words(folder), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    check_exactly_once(committed(folder, 2))
    return weights(folder)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_data, start_ray):
    """The folder of a run that was killed with its ranks."""
    folder = tmp_path_factory.mktemp("killed")
    process = launch(folder, tiny_data, start_ray().get_runtime_context().gcs_address)
    wait_for_step(folder, 24)
    kill_all(folder=folder, process=process)
    return folder


@pytest.fixture
def killed_run(killed, tmp_path):
    """A copy of it, for one test to go on in."""
    return shutil.copytree(killed, tmp_path, dirs_exist_ok=True)


def test_driver_killed_and_then_a_train_worker(undisturbed, killed_run, onetomany_on_ray):
    def kill_a_rank() -> None:
        os.kill(wait_for_step(killed_run, 40, rank=1)["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_rank)
    killer.start()
    again = onetomany_on_ray(*words(killed_run), cwd=killed_run)
    killer.join()
    assert again.returncode == 0, again.stderr[-3000:]
    steps: dict[int, list[int]] = {}
    for line in trace(killed_run, 1):
        steps.setdefault(line["pid"], []).append(line["step"])
    first, second, third = steps.values()  # a worker each
    assert first[0] == 0
    assert 7 <= second[0] <= first[-1] + 1, "the rerun went on at a checkpoint of the killed run"
    assert second[0] < third[0] <= second[-1] + 1, "the run went on in a new worker"
    check_exactly_once(committed(killed_run, 2))
    assert equal(weights(killed_run), undisturbed)


def test_another_number_of_ranks_after_the_kill(killed_run, onetomany_on_ray):
    again = onetomany_on_ray(*words(killed_run, "sources.garments.workers=1"), cwd=killed_run)
    assert again.returncode == 0, again.stderr[-3000:]
    (manifest,) = killed_run.glob("runs/tiny/sources/*/bundle/manifest.json")
    # The workers may outlive their driver by a checkpoint
    point = json.loads(manifest.read_text())["training"]["resumed_from"]
    assert point >= 7
    first = {line["step"]: line["rows"] for line in trace(killed_run, 1) if line["step"] < point}
    steps: dict[int, list[int]] = {}
    for line in trace(killed_run, 0):
        steps[line["step"]] = line["rows"] + first.get(line["step"], [])
    rows = [row for step in range(STEPS) for row in steps[step]]
    assert all(len(steps[step]) == BATCH for step in range(STEPS))
    check_exactly_once(rows)
