"""Benchmarks that build a fan-out's parts by hand still run. Their figures are not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last_row"),
    [
        ("fanout", "peak MiB of the driver up to trial 8"),
        pytest.param("scores", "logme, large", marks=pytest.mark.data),
    ],
)
def test_a_benchmark_runs(name, last_row):
    if name == "scores" and "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA is not set")
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent.parent)}
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--quick"],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0 and last_row in done.stdout, done.stderr[-3000:]
