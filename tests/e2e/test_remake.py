"""A technique that is edited between two runs: what it made is used and marked, and made anew on
request alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import ROOT, SMALL

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_an_edited_technique(onetomany_alone, ray_address, tmp_path):
    code = tmp_path / "code"
    for package in ("pipeline", "cluster"):
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    work = tmp_path / "work"
    work.mkdir()

    def command(*words: str) -> str:
        env = {"PYTHONPATH": str(code), "RAY_ADDRESS": ray_address}
        done = onetomany_alone("run", SMALL, *words, cwd=work, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    def started() -> dict[str, object]:
        table = pq.read_table(Path(work, "runs/small/results.parquet"))
        return dict(
            zip(table["technique"].to_pylist(), table["started_at"].to_pylist(), strict=True)
        )

    command()
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
    message = command("--remake", "changed")
    assert "†" not in message and "trials 2/2, 1 done before" in message
    again = started()
    assert again["full"] == first["full"] and again["scratch"] > first["scratch"]  # type: ignore[operator]
