"""Stopped runs: Ctrl-C, SIGTERM and kill -9 in each stage; and trials on several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import SMALL, command_line, environment, with_packages_of_its_own
from tests.e2e.test_lora import check_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STOPPED = "stopped; what is finished is kept, the same command goes on from here"
LONG = (
    "--set",
    "sources.garments.train={steps: 4000, global_batch: 16, checkpoint_every_steps: 5, "
    "log_every_steps: 5}",
)
WITH_RAY_DATA = ("--set", "sources.garments.data.decode=workers")
CHECKPOINTS = "runs/small/sources/garments-*/checkpoints/step-*/manifest.json"


@pytest.fixture
def begin(tiny_data, request):
    """A function that starts the command in a process group of its own, as a shell does: on the Ray
    that the tests share, or on the process's own.
    """

    started = []

    def start(folder: Path, *words: object, own_ray: bool = False) -> subprocess.Popen:
        address = {} if own_ray else {"RAY_ADDRESS": request.getfixturevalue("ray_address")}
        process = subprocess.Popen(
            command_line(*words),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(tiny_data, address),
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # the test failed
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(process: subprocess.Popen, found, what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.05)


def ctrl_c(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output[-3000:]
    assert STOPPED in output and "Traceback" not in output, output[-3000:]


def terminate(process: subprocess.Popen, line: str = STOPPED) -> None:
    """SIGTERM to the command alone, as kubelet, Slurm and systemd send it: one line, no trace,
    143.
    """
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 143, output[-3000:]
    assert (
        output.count(line) == 1 and "Traceback" not in output and "SIGTERM received" not in output
    ), output[-3000:]


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, onetomany_here):
    """A folder whose source is trained. On the shared Ray no run takes a package that lies there."""
    folder = with_packages_of_its_own(tmp_path_factory.mktemp("sources"))
    assert onetomany_here("pretrain", SMALL, cwd=folder).returncode == 0
    return folder


def records(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in (folder / "runs/small/trials").rglob("record.json")
    }


def test_stopped_pretraining_goes_on(tmp_path, begin):
    """By Ctrl-C, which its own Ray in another process group does not see, then by SIGTERM."""
    words = ("pretrain", SMALL, *LONG, "--set", "sources.garments.workers=2", *WITH_RAY_DATA)

    def newest() -> int:
        numbers = (path.parent.name.removeprefix("step-") for path in tmp_path.glob(CHECKPOINTS))
        return max(map(int, numbers), default=0)

    process = begin(tmp_path, *words, own_ray=True)
    until(process, newest, "checkpoint")
    ctrl_c(process)
    assert not (tmp_path / "runs/small/.run.json").exists()
    point = newest()
    process = begin(tmp_path, *words)
    until(process, lambda: newest() > point, "further checkpoint")
    terminate(process)
    assert not (tmp_path / "runs/small/.run.json").exists()
    (log,) = tmp_path.glob("runs/small/sources/garments-*/log/metrics.jsonl")
    lines = log.read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    assert steps[-1] > point and steps == sorted(steps)


def test_a_stopped_fan_out_loses_nothing(sources, begin, onetomany_on_ray):
    """By Ctrl-C and then by kill -9. The run that goes on asks for fewer of the seeds."""
    train = "targets.shoes.train={steps: 100, global_batch: 8}"  # the stop takes some trials' time
    words = ("run", SMALL, "--set", train, "--set")
    for stop in (ctrl_c, kill):
        before = len(records(sources))
        process = begin(sources, *words, "fanout.seeds=12")
        until(process, lambda before=before: len(records(sources)) >= before + 2, "finished trial")
        stop(process)
        kept = records(sources)
        assert before + 2 <= len(kept) < 24
        assert stop is kill or not (sources / "runs/small/.run.json").exists()
    done = onetomany_on_ray(*words, "fanout.seeds=3", cwd=sources)
    assert done.returncode == 0, done.stderr[-3000:]
    after = records(sources)
    assert all(after[path] == time for path, time in kept.items()), (
        "what was finished was not run again"
    )
    rows = pq.read_table(sources / "runs/small/results.parquet").to_pylist()
    tested = {
        row["trial_id"]
        for row in rows
        if row["current"] and row["status"] == "done" and row["split"] == "test"
    }
    assert len(tested) == 6


def test_sigterm_in_prepare_ends_as_ctrl_c_does_and_goes_on(tmp_path, begin, onetomany_on_ray):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(
            "\n\n".join(f"paragraph {i} of {number}, with some words in it" for i in range(5_000))
        )
    words = ["prepare", "text", str(texts), "-o", str(tmp_path / "out"), "--part-mb", "0.1"]
    process = begin(tmp_path, *words)

    # Unlike glob, walk passes over a folder that is gone by the time it is looked into.
    def has_shard():
        below = os.walk(tmp_path / "out")
        return any(name.endswith(".parquet") for _, _, names in below for name in names)

    until(process, has_shard, "part")
    terminate(process, "error: stopped; the same command goes on from here")
    done = onetomany_on_ray(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_fine_tune_goes_on_in_the_middle(sources, begin, onetomany_on_ray):
    """kill -9 of the driver while a trial trains: the next run takes it up at its resume point, and
    it ends as if nothing had happened.
    """
    words = (
        "run",
        SMALL,
        "--set",
        "techniques=[scratch]",
        "--set",
        "targets.shoes.train={steps: 500, global_batch: 16, checkpoint_every_steps: 20, "
        "eval_every_steps: 250}",
    )
    process = begin(sources, *words)
    until(
        process,
        lambda: list(sources.glob("runs/small/trials/**/checkpoints/step-*/manifest.json")),
        "resume point of a trial",
    )
    kill(process)
    done = onetomany_on_ray(*words, cwd=sources)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in records(sources)]
    (resumed,) = [record for record in found if record["rows"][0]["steps"] == 500]
    assert resumed["resumed_from"] >= 20 and not list(
        sources.glob("runs/small/trials/**/checkpoints")
    )


def test_trials_on_two_ranks_give_the_rows_of_one(
    sources, onetomany_here, onetomany_on_ray, tiny_data
):
    """``workers: 2``: the same loop under Ray Train in a driver. A frozen backbone's rows differ by
    the order of float sums alone; where batch norm trains (lora), each rank has its own half of the
    batch, as under any DDP. The adapters of lora are merged into the bundle, once.
    """
    words = (
        "--set",
        "techniques=[{linear_probe: {solver: sgd}}, {lora: {lr_scale: 0.5}}]",
        "--set",
        "targets.shoes.train={steps: 4, global_batch: 8, augment: false}",
        "--set",
        "targets.shoes.metric=loss",
    )
    found = {}
    for workers, command in ((0, onetomany_here), (2, onetomany_on_ray)):
        done = command(
            "run", SMALL, *words, "--set", f"targets.shoes.workers={workers}", cwd=sources
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = pq.read_table(sources / "runs/small/results.parquet").to_pylist()
        tested = [
            row
            for row in rows
            if row["metric"] == "loss" and row["split"] == "test" and row["steps"] == 4
        ]
        newest = sorted(tested, key=lambda row: row["started_at"])[-2:]
        found[workers] = {row["technique"]: row for row in newest}
    assert set(found[0]) == {"linear_probe", "lora"} == set(found[2])
    for technique, row in found[0].items():
        assert found[2][technique]["trial_id"] != row["trial_id"]
        assert found[2][technique]["value"] == pytest.approx(
            row["value"], rel=1e-4 if technique == "linear_probe" else 0.1
        ), technique
    check_bundle(
        sources / "runs/small" / found[2]["lora"]["trial_folder"], tiny_data / "images.parquet"
    )


def test_a_failing_trial_leaves_its_row_and_stops_nothing(sources, onetomany_on_ray):
    train = "{steps: 8, global_batch: 8, lr: 1e-3, max_bad_steps: 1, clip_norm: null}"
    words = ("techniques=[scratch, {lora: {lr_scale: 1e33}}]", f"targets.shoes.train={train}")
    done = onetomany_on_ray(
        "run", SMALL, *(word for one in words for word in ("--set", one)), cwd=sources
    )
    assert done.returncode == 1
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    rows = pq.read_table(sources / "runs/small/results.parquet").to_pylist()
    rows = [row for row in rows if row["steps"] == 8 or row["status"] == "failed"]
    assert {row["status"] for row in rows if row["technique"] == "scratch"} == {"done"}
    (failed,) = {row["error"] for row in rows if row["technique"] == "lora"}
    assert "NonFinite" in failed


def test_a_run_that_loses_its_lease_stops_with_one_line_and_writes_nothing_more(tmp_path, begin):
    """As when it slept for longer than a lease lives, and a run on another machine took over."""
    process = begin(tmp_path, "run", SMALL, *LONG)
    until(process, lambda: list(tmp_path.glob(CHECKPOINTS)), "checkpoint")
    lease = tmp_path / "runs/small/.run.json"
    other = {**json.loads(lease.read_text()), "id": "other", "host": "elsewhere", "pid": 12}
    lease.write_text(json.dumps(other))
    time.sleep(1)  # a write may be under way

    def times_of_files() -> dict[Path, int]:
        """Without the file in which the run renews its lease: it removes that itself."""
        found = (
            path
            for path in (tmp_path / "runs").rglob("*.json*")
            if not path.name.startswith(".run-alive-")
        )
        return {path: path.stat().st_mtime_ns for path in found}

    written = times_of_files()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "Traceback" not in output, output[-3000:]
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        line for line in output.splitlines() if "no longer holds the lease" in line
    ]
    assert "process 12 on elsewhere" in output
    assert written == times_of_files() and json.loads(lease.read_text()) == other
