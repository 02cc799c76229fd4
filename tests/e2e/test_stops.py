"""Stopped runs: Ctrl-C in each stage, kill -9 in the fan-out; and trials on several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import TINY, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LONG = (
    "--set",
    "sources.garments.train={steps: 4000, global_batch: 16, checkpoint_every_steps: 5}",
)
MANY = (
    "--set",
    "fanout.seeds=12",
    "--set",
    "targets.shoes.techniques=[scratch, full]",
    "--set",
    "targets.reviews.techniques=[scratch, full]",
)


def begin(folder: Path, tiny_data: Path, *words: str) -> subprocess.Popen:
    """A run in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tiny_data),
        start_new_session=True,
    )


def until(process: subprocess.Popen, found, what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(0.05)


def ctrl_c(process: subprocess.Popen) -> str:
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 130, output[-3000:]
    assert (
        "stopped; what is finished is kept, the same command goes on from here" in output
        and "Traceback" not in output
    ), output[-3000:]
    return output


def terminated(
    process: subprocess.Popen,
    line: str = "stopped; what is finished is kept, the same command goes on from here",
) -> str:
    """SIGTERM to the command alone, as kubelet, Slurm and systemd send it: one line, no trace,
    143.
    """
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 143, output[-3000:]
    assert (
        output.count(line) == 1 and "Traceback" not in output and "SIGTERM received" not in output
    ), output[-3000:]
    return output


@pytest.fixture(scope="module")
def sources(tmp_path_factory, onetomany_on_ray):
    """A folder whose sources are trained."""
    folder = tmp_path_factory.mktemp("sources")
    assert onetomany_on_ray("pretrain", TINY, cwd=folder).returncode == 0
    return folder


def records(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in (folder / "runs/tiny/trials").glob("*/record.json")
    }


def test_ctrl_c_in_pretraining_is_clean_and_goes_on(tmp_path, tiny_data, onetomany_on_ray):
    process = begin(tmp_path, tiny_data, "pretrain", str(TINY), *LONG)
    until(
        process,
        lambda: list(
            tmp_path.glob("runs/tiny/sources/garments-*/checkpoints/step-*/manifest.json")
        ),
        "checkpoint",
    )
    ctrl_c(process)
    point = max(
        int(path.parent.name.removeprefix("step-"))
        for path in tmp_path.glob("runs/tiny/sources/garments-*/checkpoints/step-*/manifest.json")
    )
    assert not (tmp_path / "runs/tiny/.run.json").exists()
    process = begin(tmp_path, tiny_data, "pretrain", str(TINY), *LONG)

    def steps() -> list[int]:
        (log,) = tmp_path.glob("runs/tiny/sources/garments-*/log/metrics.jsonl")
        return [
            json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")
        ]

    until(process, lambda: steps() and steps()[-1] > point, "step after the resume point")
    ctrl_c(process)
    assert steps() == sorted(steps())


def test_ctrl_c_and_a_killed_driver_in_the_fan_out_lose_nothing(
    sources, tiny_data, onetomany_on_ray
):
    for stop in (ctrl_c, lambda process: (os.kill(process.pid, signal.SIGKILL), process.wait())):
        before = len(records(sources))
        process = begin(sources, tiny_data, "run", str(TINY), *MANY)
        until(process, lambda before=before: len(records(sources)) >= before + 4, "finished trial")
        stop(process)
        kept = records(sources)
        assert before + 4 <= len(kept) < 48
    done = onetomany_on_ray("run", TINY, *MANY, cwd=sources)
    assert done.returncode == 0, done.stderr[-3000:]
    after = records(sources)
    assert len(after) == 48 and all(after[path] == time for path, time in kept.items()), (
        "what was finished was not run again"
    )
    rows = pq.read_table(sources / "runs/tiny/results.parquet").to_pylist()
    assert (
        len({row["trial_id"] for row in rows if row["status"] == "done" and row["split"] == "test"})
        == 48
    )


def test_sigterm_in_pretraining_ends_as_ctrl_c_does_and_goes_on(tmp_path, tiny_data):
    process = begin(tmp_path, tiny_data, "pretrain", str(TINY), *LONG)
    until(
        process,
        lambda: list(
            tmp_path.glob("runs/tiny/sources/garments-*/checkpoints/step-*/manifest.json")
        ),
        "checkpoint",
    )
    terminated(process)
    assert not (tmp_path / "runs/tiny/.run.json").exists()

    def newest() -> str:
        return max(
            path.parent.name
            for path in tmp_path.glob(
                "runs/tiny/sources/garments-*/checkpoints/step-*/manifest.json"
            )
        )

    point = newest()
    process = begin(tmp_path, tiny_data, "pretrain", str(TINY), *LONG)
    until(process, lambda: newest() > point, "further checkpoint")
    terminated(process)


def test_sigterm_in_the_fan_out_ends_as_ctrl_c_does(sources, tiny_data):
    before = len(records(sources))
    process = begin(sources, tiny_data, "run", str(TINY), "--set", "fanout.seeds=14", *MANY[2:])
    until(process, lambda: len(records(sources)) >= before + 2, "finished trial")
    terminated(process)
    assert not (sources / "runs/tiny/.run.json").exists()


def test_sigterm_in_prepare_ends_as_ctrl_c_does_and_goes_on(tmp_path, tiny_data, onetomany_on_ray):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(
            "\n\n".join(f"paragraph {i} of {number}, with some words in it" for i in range(20_000))
        )
    words = ["prepare", "text", str(texts), "-o", str(tmp_path / "out"), "--part-mb", "0.5"]
    process = begin(tmp_path, tiny_data, *words)

    # Unlike glob, walk passes over a folder that is gone by the time it is looked into.
    def has_shard():
        below = os.walk(tmp_path / "out")
        return any(name.endswith(".parquet") for _, _, names in below for name in names)

    until(process, has_shard, "part")
    terminated(process, "error: stopped; the same command goes on from here")
    done = onetomany_on_ray(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_fine_tune_goes_on_in_the_middle(sources, tiny_data, onetomany_on_ray):
    """kill -9 of the driver while a trial trains: the next run takes it up at its resume point, and
    it ends as if nothing had happened.
    """
    words = [
        "run",
        str(TINY),
        "--set",
        "targets.shoes.techniques=[scratch]",
        "--set",
        "targets.reviews.techniques=[scratch]",
        "--set",
        "fanout.seeds=1",
        "--set",
        "targets.shoes.train={steps: 3000, global_batch: 16, checkpoint_every_steps: 20, "
        "eval_every_steps: 1000}",
    ]
    process = begin(sources, tiny_data, *words)
    until(
        process,
        lambda: list(sources.glob("runs/tiny/trials/*/checkpoints/step-*/manifest.json")),
        "resume point of a trial",
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = onetomany_on_ray(*words, cwd=sources)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in records(sources)]
    (resumed,) = [record for record in found if record["rows"][0]["steps"] == 3000]
    assert resumed["resumed_from"] >= 20 and not list(
        sources.glob("runs/tiny/trials/*/checkpoints")
    )


def test_two_runs_of_one_job_at_once_are_refused(sources, tiny_data, onetomany_on_ray):
    process = begin(sources, tiny_data, "run", str(TINY), "--set", "fanout.seeds=13")
    until(process, (sources / "runs/tiny/.run.json").exists, "lease")
    second = onetomany_on_ray("run", TINY, cwd=sources)
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr
    ctrl_c(process)


def test_trials_on_two_ranks_give_the_rows_of_one(sources, onetomany_on_ray):
    """``workers: 2``: the same loop under Ray Train in a driver. A frozen backbone's rows differ by
    the order of float sums alone; where batch norm trains, each rank has its own half of the batch,
    as under any DDP.
    """
    words = (
        "--set",
        "targets.shoes.techniques=[scratch, full, linear_probe]",
        "--set",
        "targets.reviews.techniques=[scratch]",
        "--set",
        "targets.shoes.train={steps: 4, global_batch: 8, augment: false}",
        "--set",
        "targets.shoes.metric=loss",
        "--set",
        "fanout.seeds=1",
    )
    found = {}
    for workers in (0, 2):
        done = onetomany_on_ray(
            "run", TINY, *words, "--set", f"targets.shoes.workers={workers}", cwd=sources
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [
            row
            for row in pq.read_table(sources / "runs/tiny/results.parquet").to_pylist()
            if row["target"] == "shoes" and row["metric"] == "loss"
        ]
        ids = {path.parent.name for path in records(sources)}
        mine = [
            row
            for row in rows
            if row["split"] == "test" and row["trial_id"] in ids and row["steps"] == 4
        ]
        newest = sorted(mine, key=lambda row: row["started_at"])[-3:]
        found[workers] = {(row["source"], row["technique"]): row["value"] for row in newest}
    assert (
        set(found[0])
        == {("none", "scratch"), ("garments", "full"), ("garments", "linear_probe")}
        == set(found[2])
    )
    for cell, value in found[0].items():
        assert found[2][cell] == pytest.approx(
            value, rel=1e-4 if cell[1] == "linear_probe" else 0.1
        ), cell


def test_elastic_ranks_take_what_there_is(onetomany_on_ray, tmp_path):
    done = onetomany_on_ray(
        "pretrain", TINY, "--set", "sources.garments.workers=[1, 2]", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (manifest,) = tmp_path.glob("runs/tiny/sources/garments-*/bundle/manifest.json")
    assert json.loads(manifest.read_text())["training"]["ranks"] in (1, 2)


def test_a_run_that_loses_its_lease_stops_with_one_line_and_writes_nothing_more(
    tmp_path, tiny_data
):
    """As when it slept for longer than a lease lives, and a run on another machine took over."""
    process = begin(tmp_path, tiny_data, "run", str(TINY), *LONG)
    until(
        process,
        lambda: list(
            tmp_path.glob("runs/tiny/sources/garments-*/checkpoints/step-*/manifest.json")
        ),
        "checkpoint",
    )
    lease = tmp_path / "runs/tiny/.run.json"
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
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "Traceback" not in output, output[-3000:]
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        line for line in output.splitlines() if "no longer holds the lease" in line
    ]
    assert (
        "(process 12 on elsewhere has it now), so it stops and writes nothing more; what it "
        "finished is kept" in output
    )
    assert written == times_of_files() and json.loads(lease.read_text()) == other
