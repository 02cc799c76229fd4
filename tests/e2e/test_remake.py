"""A technique that is edited between two runs: what it made is used and marked, and made anew on
request alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import ROOT, SMALL, environment

WITHOUT_RAY = """\
import pytest, stage_runs
from pipeline import cli
stage_runs.without_ray(pytest.MonkeyPatch())
cli.app()
"""


@pytest.mark.slow
def test_an_edited_technique(tiny_data, tmp_path, onetomany_here):
    """Each run after the first is a process of its own, since a process keeps the code that it has
    imported.
    """
    code = tmp_path / "code"
    for package in ("pipeline", "cluster"):
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    work = tmp_path / "work"
    work.mkdir()

    def command(*words: str) -> str:
        path = os.pathsep.join(map(str, (code, ROOT / "tests")))
        done = subprocess.run(
            [sys.executable, "-P", "-c", WITHOUT_RAY, "run", str(SMALL), *words],
            cwd=work,
            capture_output=True,
            text=True,
            env=environment(tiny_data, {"PYTHONPATH": path}),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    def started() -> dict[str, object]:
        table = pq.read_table(Path(work, "runs/small/results.parquet"))
        return dict(
            zip(table["technique"].to_pylist(), table["started_at"].to_pylist(), strict=True)
        )

    assert onetomany_here("run", SMALL, cwd=work).returncode == 0
    first = started()
    technique = code / "pipeline/techniques/scratch.py"
    before = technique.read_text()
    assert "class Scratch(Technique):\n" in before
    technique.write_text(
        before.replace("class Scratch(Technique):\n", "class Scratch(Technique):\n    more = 1\n")
    )
    assert "1 trial: technique scratch changed" in command("--dry-run")
    message = command()
    assert "nothing to run" in message and "scratch †" in message and "full ‡" not in message, (
        "they share no code that differs"
    )
    assert started() == first
    assert "†" not in command("--remake", "changed")
    again = started()
    assert again["full"] == first["full"] and again["scratch"] > first["scratch"]  # type: ignore[operator]
