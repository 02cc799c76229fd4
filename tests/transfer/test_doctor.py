"""What ``doctor`` says of a driver and of the CUDA that torch was built for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from pipeline.transfer import doctor
from pipeline.transfer.doctor import OLDEST_DRIVER, driver_line

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("driver", "cuda", "mark"),
    [
        ("580.65.06", "13.0", "ok"),
        ("580.95.05", "13.0", "ok"),
        ("595.91.07", "13.2", "ok"),
        ("580.65.05", "13.0", "FAIL"),
        ("550.54.15", "13.0", "FAIL"),
        ("470.256.02", "12.8", "FAIL"),
        ("550.54", "12.8", "ok"),
        ("535.104.05", "11.8", "ok"),
        ("999.1.1", "14.0", "ok"),
        (None, "13.0", "ok"),
        (None, None, "ok"),
        ("580.65.06", None, "warn"),
    ],
)
def test_a_driver_that_cannot_run_the_build_of_torch_is_a_failure(driver, cuda, mark):
    line = driver_line(driver, cuda)
    assert line.mark == mark
    assert (driver or "none") in line.found and (cuda or "") in line.found
    if mark == "FAIL":
        assert (
            OLDEST_DRIVER[cuda.partition(".")[0]] in line.advice
            and "update the driver" in line.advice
        )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("580.95.05\n580.95.05\n", "580.95.05"),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 "
            "UTC 2024\nGCC version: gcc 11.4.0\n",
            "550.54.15",
        ),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", None),
        ("", None),
    ],
)
def test_the_driver_is_read_from_what_nvidia_prints(monkeypatch, tmp_path, text, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if version is None and Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver, which is read where nvidia-smi says nothing")
    assert doctor.nvidia_driver() == version


def test_doctor_has_a_line_for_the_driver():
    assert "NVIDIA driver" in [line.what for line in doctor.check_machine()]


def test_a_warning_about_the_job_is_marked_as_one(monkeypatch, tmp_path):
    lines = ["2 sources", "warning: source a: train.patience is ignored"]
    monkeypatch.setattr(doctor.stages, "check", lambda *given: None)
    monkeypatch.setattr(doctor.dry_run, "describe", lambda *given: lines)
    job: Any = SimpleNamespace(root=str(tmp_path))
    storage, *found = doctor.check_job(job)
    assert storage.mark == "ok"
    assert [(line.mark, line.found) for line in found] == [
        ("ok", "2 sources"),
        ("warn", "source a: train.patience is ignored"),
    ]


@pytest.mark.parametrize(
    ("version", "mark"),
    [
        ((3, 10), "FAIL"),
        *[((3, minor), "ok") for minor in (11, 12, 13, 14)],
        ((3, 15), "FAIL"),
    ],
)
def test_doctor_takes_the_versions_of_python_that_the_package_takes(monkeypatch, version, mark):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = SpecifierSet(project["requires-python"]).contains(f"{version[0]}.{version[1]}.0")
    monkeypatch.setattr(doctor.sys, "version_info", version)
    (line,) = [line for line in doctor.check_machine() if line.what == "Python"]
    assert line.mark == mark == ("ok" if stated else "FAIL")
    assert line.advice == ("" if stated else "use 3.11 to 3.14")


def test_the_clouds_that_ship_here_say_the_least_driver_of_the_locked_build():
    """The CUDA of the locked wheels is told by NVIDIA's runtime, which torch's build asks for."""
    lock = (ROOT / "requirements.lock").read_text()
    major = re.search(r"^nvidia-cuda-runtime==(\d+)\.", lock, re.MULTILINE)
    assert major is not None
    for name in ("aws.yaml", "gcp.yaml", "Dockerfile", "README.md"):
        assert OLDEST_DRIVER[major.group(1)] in (ROOT / "cluster" / name).read_text(), name
