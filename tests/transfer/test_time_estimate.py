"""The estimate of a dry run: steps are measured on the job's own networks and rows, and counted as a
run takes them.
"""

from __future__ import annotations

import re

import pytest
import torch

from pipeline.config.schema import Job
from pipeline.transfer import preflight, time_estimate

# fixtures
from tests.transfer.test_preflight import COLUMNS, checked, with_source, written
from tests.transfer.test_targets import job_of, models, texts  # noqa: F401


def estimate(job: Job) -> list[str]:
    state, workloads = checked(job), {}
    preflight.check_rows(state, workloads)
    return time_estimate.describe(state, workloads)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(time_estimate.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("objective", ["mlm", "classification"])
def test_real_steps_are_measured(tmp_path, objective):
    (line,) = estimate(with_source(tmp_path, written(tmp_path / "rows.parquet"), objective))
    assert re.fullmatch(
        r"estimate for this machine, from \d+ measured steps: source src \d+s, in all about \d+s, "
        "beside starting Ray and decoding",
        line,
    )


def test_a_source_takes_its_steps_and_validations(tmp_path, monkeypatch, two_cores):
    """Two steps of 8 rows, and 24 validation rows twice, each a third of a training row."""
    monkeypatch.setattr(time_estimate, "_step_seconds", lambda load, task, part, train: 30.0)
    (line,) = estimate(with_source(tmp_path, written(tmp_path / "rows.parquet")))
    assert "from 2 measured steps: source src 4m00s, in all about 4m00s" in line, (
        "30 s for 4 rows are 60 s for 8"
    )


@pytest.mark.parametrize(
    ("techniques", "text"), [(("scratch", "full"), "1m10s"), (("scratch", "linear_probe"), "46s")]
)
def test_trials_take_steps_validations_and_a_test(
    tmp_path,
    monkeypatch,
    two_cores,
    models,  # noqa: F811
    texts,  # noqa: F811
    techniques,
    text,
):
    """10 steps of 4 rows, 48 rows validated five times and tested once, and a second to begin;
    features of a frozen backbone are computed once for 240 rows.
    """
    monkeypatch.setattr(time_estimate, "_step_seconds", lambda load, task, part, train: 1.0)
    job = job_of(
        tmp_path,
        models["bert"],
        texts,
        "classification",
        COLUMNS,
        techniques=techniques,
        fan={"seeds": 2},
        train={"steps": 10, "global_batch": 4},
    )
    (line,) = estimate(job)
    assert f": trials {text} (2 at once), in all about {text}, " in line


def test_a_network_that_is_too_large_to_try_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(time_estimate, "MOST_PARAMETERS", 10)
    job = with_source(tmp_path, written(tmp_path / "rows.parquet"))
    assert estimate(job) == [
        "no estimate of the time: source src (the network is too large to be tried here)"
    ]
