"""The estimate of a dry run: steps are measured on the job's own networks and rows, and counted as a
run takes them.
"""

from __future__ import annotations

import re
import time

import pytest
import torch

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job, Train
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
    line, *_ = estimate(with_source(tmp_path, written(tmp_path / "rows.parquet"), objective))
    assert re.fullmatch(
        r"estimate for this machine, from \d+ measured steps: source src \d+s, about \d+s in "
        "total, not counting Ray's start and decoding",
        line,
    )


def test_a_source_takes_its_steps_and_validations(tmp_path, monkeypatch, two_cores):
    """Two steps of 8 rows, and 24 validation rows twice, each a third of a training row."""
    monkeypatch.setattr(time_estimate, "step_seconds", lambda *_: (30.0, 30.0))
    (line,) = estimate(with_source(tmp_path, written(tmp_path / "rows.parquet")))
    assert "from 2 measured steps: source src 4m00s, about 4m00s in total" in line, (
        "30 s for 4 rows are 60 s for 8"
    )


@pytest.mark.parametrize(
    ("techniques", "text"), [(("scratch", "full"), "1m08s"), (("scratch", "linear_probe"), "44s")]
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
    """10 steps of 4 rows, 48 rows validated five times and tested once, and 0.2 seconds to begin;
    features of a frozen backbone are computed once for 240 rows.
    """
    monkeypatch.setattr(time_estimate, "step_seconds", lambda *_: (1.0, 1.0))
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
    assert f": trials {text} (2 at once), about {text} in total, " in line


def test_what_other_programs_take_is_said_and_not_counted(tmp_path, monkeypatch, two_cores):
    monkeypatch.setattr(time_estimate, "step_seconds", lambda *_: (30.0, 75.0))
    line, busy = estimate(with_source(tmp_path, written(tmp_path / "rows.parquet")))
    assert "about 4m00s in total" in line
    assert "this one is busy, and the measured steps took 2.5 times as long" in busy


def test_a_step_on_a_cpu_has_the_processor_time_of_its_thread(tmp_path, monkeypatch, two_cores):
    """The other seconds are those in which it waited for a processor; here it sleeps."""

    def fit(run):
        run.on_step()
        time.sleep(0.5)
        run.on_step()

    monkeypatch.setattr(time_estimate.loop, "fit", fit)
    state, workloads = checked(with_source(tmp_path, written(tmp_path / "rows.parquet"))), {}
    preflight.check_rows(state, workloads)
    (load,) = workloads["sources.src"]
    task = bundle.build_task(load.arch, load.objective, seed=0)
    batch = time_estimate.batch_of(load, 4)
    worked, waited = time_estimate.step_seconds(load, task, batch, Train(steps=2))
    assert worked < 0.25 <= 0.5 <= waited


@pytest.mark.slow
def test_a_network_that_is_too_large_to_try_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(time_estimate, "MAX_PARAMETERS", 10)
    job = with_source(tmp_path, written(tmp_path / "rows.parquet"))
    assert estimate(job) == [
        "no estimate of the time: source src (the network is too large to be tried here)"
    ]


def test_tasks_of_one_network_are_measured_each(
    tmp_path,
    monkeypatch,
    models,  # noqa: F811
    texts,  # noqa: F811
):
    """Their rows may be of any length."""
    job = job_of(tmp_path, models["bert"], texts, "classification", COLUMNS).model_dump(mode="json")
    job["targets"] = {name: job["targets"]["task"] for name in ("a", "b")}
    measured = []
    monkeypatch.setattr(time_estimate, "step_seconds", lambda *_: measured.append(1) or (1.0, 1.0))
    line, *_ = estimate(Job.model_validate(job))
    assert len(measured) == 2 and "from 4 measured steps" in line


@pytest.mark.parametrize(
    ("rows_a_step", "fractions", "text"), [(16, [1.0], "1m14s"), (4, [0.5, 1.0], "1m19s")]
)
def test_batches_by_cost_have_their_rows_and_label_fractions_share_features(
    tmp_path,
    monkeypatch,
    two_cores,
    models,  # noqa: F811
    texts,  # noqa: F811
    rows_a_step,
    fractions,
    text,
):
    """Steps of 16 rows take 4 seconds, and those of 4 rows one."""
    monkeypatch.setattr(time_estimate, "step_seconds", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(time_estimate, "rows_per_step", lambda load, train: rows_a_step)
    job = job_of(
        tmp_path,
        models["bert"],
        texts,
        "classification",
        COLUMNS,
        techniques=("scratch", "linear_probe"),
        fan={"seeds": 2},
        train={"steps": 10, "global_batch": 4},
        label_fractions=fractions,
    )
    (line,) = estimate(job)
    assert f"about {text} in total, " in line


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("length"), "'length'"), (AssertionError(), "AssertionError")]
)
def test_an_estimate_refuses_no_job(tmp_path, monkeypatch, error, said):
    def step(*_):
        raise error

    monkeypatch.setattr(time_estimate, "step_seconds", step)
    assert estimate(with_source(tmp_path, written(tmp_path / "rows.parquet"))) == [
        f"no estimate of the time: source src (a step cannot be tried: {said})"
    ]
