"""What ``doctor`` looks at: this machine, its cluster, and a job's data, storage and resources."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from typing import NamedTuple

import psutil
import torch

from pipeline import storage
from pipeline.bundle import versions
from pipeline.job import Job
from pipeline.train import launch
from pipeline.train.progress import Progress
from pipeline.transfer import dry_run, fanout, stages

EXTRAS = {"beam": "flashlight", "robotics": "mujoco", "video": "av"}
"""Extras of pyproject.toml, and a module of each."""


class Line(NamedTuple):
    mark: str
    what: str
    found: str
    advice: str = ""


def examine(job: Job | None, address: str | None) -> list[Line]:
    """One line a check: ok, warn or FAIL, what was found and what to do."""
    lines = _machine()
    found, have = _ray(address)
    lines += found
    if job is not None:
        lines += _job(job)
        if have is not None:
            lines += _resources(job, *have)
    return lines


def _judged(good: bool, what: str, found: str, advice: str) -> Line:
    """Fine, or a warning with what to do."""
    return Line("ok" if good else "warn", what, found, "" if good else advice)


def _machine() -> list[Line]:
    python = platform.python_version()
    right = (3, 11) <= sys.version_info[:2] <= (3, 12)
    memory = psutil.virtual_memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    disk = shutil.disk_usage(os.getcwd())
    found = versions()
    lines = [Line("ok" if right else "FAIL", "Python", python, "" if right else "use 3.11 or 3.12"),
             Line("ok", "libraries", ", ".join(f"{k} {found[k]}" for k in ("torch", "ray", "timm", "transformers"))),
             _judged((os.cpu_count() or 1) > 1, "CPU cores", str(os.cpu_count()), "two or more let data workers run beside training"),
             _judged(memory.available > 4 << 30, "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
                     "the quickstart wants 4 GiB free"),
             _judged(disk.free > 5 << 30, "disk here", f"{disk.free / 2**30:.1f} GiB free", "runs and Ray's spill want some GiB")]
    if shm is not None:
        lines.append(_judged(shm.total > 0.25 * memory.total, "/dev/shm", f"{shm.total / 2**30:.1f} GiB",
                             "Ray's object store falls back to disk: give the container --shm-size"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(Line("ok", "GPUs", ", ".join(names) + (", bf16" if torch.cuda.is_bf16_supported() else ", no bf16 (fp32 is used)")))
    else:
        lines.append(Line("ok", "GPUs", "none; everything runs on the CPU"))
    missing = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module) is None]
    found_extras = f"not installed: {', '.join(missing)}" if missing else "all there"
    lines.append(Line("ok", "extras", found_extras, f"uv sync --extra {missing[0]}" if missing else ""))
    return lines


def _ray(address: str | None) -> tuple[list[Line], tuple[launch.Nodes, float] | None]:
    """What Ray says, and the nodes with their object store when it answers."""
    what = f"Ray ({address or os.environ.get('RAY_ADDRESS') or 'started here'})"
    try:
        launch.start(address, verbose=False)
        have = launch.resources()
        text = f"{have['nodes']:g} nodes, {have['CPU']:g} CPU, {have['GPU']:g} GPU, {have['object_store_memory'] / 2**30:.1f} GiB object store"
        return [Line("ok", what, text)], (launch.nodes(), have["object_store_memory"])
    except launch.ClusterError as error:
        return [Line("FAIL", what, str(error)[:300], "see there")], None
    finally:
        launch.stop()


def _resources(job: Job, have: launch.Nodes, object_store_bytes: float) -> list[Line]:
    """Whether the cluster can ever give what the sources and the trials ask for."""
    lines, cpus, gpus = [], sum(node[0] for node in have), sum(node[1] for node in have)
    for name, spec in job.sources.items():
        mine = launch.share(spec, cpus, gpus, object_store_bytes)
        try:
            found = launch.check_fits(spec, mine, have, f"sources.{name}") if spec.data is not None else []
            lines += [Line("warn", f"source {name}", text.removeprefix("warning: ")) for text in found]
            if spec.data is not None and not found:
                lines.append(Line("ok", f"source {name}", f"{spec.workers} ranks of {mine.cpus:g} CPU and {mine.gpus:g} GPU"))
        except launch.ClusterError as error:
            lines.append(Line("FAIL", f"source {name}", str(error)))
    try:
        fanout.check_fits(job, have)
    except launch.ClusterError as error:
        lines.append(Line("FAIL", "fan-out", str(error)))
    return lines


def _job(job: Job) -> list[Line]:
    lines = []
    try:
        storage.check_writable(job.root)
        lines.append(Line("ok", "storage", job.root))
    except storage.StorageError as error:
        return [Line("FAIL", "storage", str(error), "choose another with --set storage=...")]
    try:
        state = stages.check(job, Progress())
    except (ValueError, storage.StorageError) as error:
        return [*lines, *(Line("FAIL", "job", text) for text in str(error).splitlines())]
    return [*lines, *(Line("ok", "job", text) for text in dry_run.describe(state))]
