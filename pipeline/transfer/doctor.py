"""The checks of ``doctor``: this machine, its cluster, and a job's data, storage and resources."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from pipeline.checkpoints.bundle import versions
from pipeline.config import extras
from pipeline.config.schema import Job
from pipeline.io import storage
from pipeline.io.wording import plural
from pipeline.train import launch
from pipeline.train.progress import Progress
from pipeline.transfer import dry_run, fanout, stages

WARNING = "warning: "
"""What a line of another module begins with, where it warns."""


class Line(NamedTuple):
    """A line of the table that ``doctor`` prints."""

    mark: str
    """ok, warn or FAIL"""
    what: str
    """What was checked."""
    found: str
    advice: str = ""
    """What to do where it is not ok."""


def run_checks(job: Job | None, address: str | None) -> list[Line]:
    """Return one line for each check: ok, warn or FAIL, the finding, and what to do."""
    lines = check_machine()
    ray_lines, cluster = _ray(address)
    lines += ray_lines
    if job is not None:
        lines += check_job(job)
        if cluster is not None:
            lines += _resources(job, cluster)
    return lines


def _judged(good: bool, what: str, found: str, advice: str) -> Line:
    """Return ok, or a warning with what to do."""
    return Line("ok" if good else "warn", what, found, "" if good else advice)


OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
"""The oldest NVIDIA driver on Linux that runs builds for a major version of CUDA (table 2 of the
CUDA release notes).
"""

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
"""The versions that pyproject.toml allows (`requires-python`)."""


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver, such as ``580.95.05``, or None where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    module = Path("/proc/driver/nvidia/version")
    if not found.strip() and module.exists():
        found = module.read_text()
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", found)
    return version.group() if version else None


def driver_line(driver: str | None, cuda: str | None) -> Line:
    """Check whether NVIDIA's driver runs the CUDA version that torch was built for.

    Args:
        driver: Version of the driver (`nvidia_driver`), None where there is none.
        cuda: ``torch.version.cuda``, None for a build without CUDA.
    """
    if driver is None:
        return Line(
            "ok",
            "NVIDIA driver",
            "none" if cuda is None else f"none (torch is built for CUDA {cuda})",
        )
    if cuda is None:
        return Line(
            "warn",
            "NVIDIA driver",
            f"{driver}; torch is built without CUDA",
            "install a build of torch with CUDA to use the GPUs",
        )
    found = f"{driver}; torch is built for CUDA {cuda}"
    least = OLDEST_DRIVER.get(cuda.partition(".")[0])
    if least is None or _numbers(driver) >= _numbers(least):
        return Line("ok", "NVIDIA driver", found)
    return Line(
        "FAIL",
        "NVIDIA driver",
        found,
        f"the GPUs cannot be used: update the driver to {least} or newer, or take a build of "
        "torch for an older CUDA",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def check_machine() -> list[Line]:
    python = platform.python_version()
    right = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    supported = " to ".join(f"{a}.{b}" for a, b in (OLDEST_PYTHON, NEWEST_PYTHON))
    memory = psutil.virtual_memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    disk = shutil.disk_usage(os.getcwd())
    found = versions()
    lines = [
        Line("ok" if right else "FAIL", "Python", python, "" if right else f"use {supported}"),
        Line(
            "ok",
            "libraries",
            ", ".join(f"{k} {found[k]}" for k in ("torch", "ray", "timm", "transformers")),
        ),
        _judged(
            (os.cpu_count() or 1) > 1,
            "CPU cores",
            str(os.cpu_count()),
            "two or more let data workers run along with training",
        ),
        _judged(
            memory.available > 4 << 30,
            "memory",
            f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            "the quickstart needs 4 GiB free",
        ),
        _judged(
            disk.free > 5 << 30,
            "disk here",
            f"{disk.free / 2**30:.1f} GiB free",
            "runs and objects that Ray spills to disk need a few GiB",
        ),
    ]
    if shm is not None:
        lines.append(
            _judged(
                shm.total > 0.25 * memory.total,
                "/dev/shm",
                f"{shm.total / 2**30:.1f} GiB",
                "Ray's object store falls back to disk: give the container --shm-size",
            )
        )
    lines.append(driver_line(nvidia_driver(), torch.version.cuda))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        # older GPUs only emulate bf16
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no bf16 (fp32 is used)"
        lines.append(Line("ok", "GPUs", f"{', '.join(names)}, {precision}"))
    else:
        lines.append(Line("ok", "GPUs", "none; everything runs on the CPU"))
    missing = [name for name, modules in extras.EXTRAS.items() if not all(map(_is_there, modules))]
    found_extras = f"not installed: {', '.join(missing)}" if missing else "all there"
    lines.append(Line("ok", "extras", found_extras, extras.install(missing[0]) if missing else ""))
    return lines


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _ray(address: str | None) -> tuple[list[Line], launch.Cluster | None]:
    """Check that Ray works, and describe its cluster where one answers."""
    what = f"Ray ({address or os.environ.get('RAY_ADDRESS') or 'started here'})"
    try:
        launch.start(address, verbose=False)
        have = launch.cluster_resources()
        text = (
            f"{plural(int(have['nodes']), 'node')}, {have['CPU']:g} CPU, {have['GPU']:g} GPU, "
            f"{have['object_store_memory'] / 2**30:.1f} GiB object store"
        )
        cluster = launch.cluster()
        lines = [Line("ok", what, text)]
        if cluster.grows:
            nodes = launch.describe_nodes(cluster.nodes)
            lines.append(Line("ok", "autoscaler", f"can start {nodes}"))
        return lines, cluster
    except launch.ClusterError as error:
        return [Line("FAIL", what, str(error)[:300], "see the message on the left")], None
    finally:
        launch.stop()


def _resources(job: Job, cluster: launch.Cluster) -> list[Line]:
    """Check whether the cluster can ever provide the resources of the sources and trials."""
    lines = []
    for name, spec in job.sources.items():
        what = f"source {name}"
        if spec.data is None:  # nothing is trained
            continue
        rank = launch.plan_on_cluster(spec, cluster)
        nodes = launch.nodes_for(spec, cluster)
        try:
            warnings = launch.check_fits(spec, rank, nodes, f"sources.{name}", cluster.grows)
        except launch.ClusterError as error:
            lines.append(Line("FAIL", what, str(error)))
            continue
        lines += [Line("warn", what, text.removeprefix(WARNING)) for text in warnings]
        if not warnings:
            ranks = f"{spec.workers} ranks of {rank.cpus:g} CPU and {rank.gpus:g} GPU"
            lines.append(Line("ok", what, ranks))
    try:
        fanout.check_fits(job, cluster.nodes, cluster.grows)
    except launch.ClusterError as error:
        lines.append(Line("FAIL", "fan-out", str(error)))
    return lines


def check_job(job: Job) -> list[Line]:
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
    for text in dry_run.describe(state):
        mark = "warn" if text.startswith(WARNING) else "ok"
        lines.append(Line(mark, "job", text.removeprefix(WARNING)))
    return lines
