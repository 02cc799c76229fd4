"""Whole runs of the command: everything once, then what is keyed, what fails, and what is made of
the bundles.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.io import run_lock
from pipeline.transfer import grid
from tests.e2e.conftest import SMALL, TINY


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The tiny job with pictures alone: a source on two ranks, and two targets."""
    spec = yaml.safe_load(TINY.read_text())
    del spec["sources"]["stories"], spec["targets"]["reviews"]
    shoes = spec["targets"]["shoes"]
    spec["targets"]["tops"] = {**shoes, "data": {**shoes["data"], "where": {"label": [0, 2, 4]}}}
    path = tmp_path_factory.mktemp("job") / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory, command, job):
    """One `run` of the job; (folder, its completed process)."""
    folder = tmp_path_factory.mktemp("ran")
    done = command("run", job, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


def table(job: Path) -> list[dict]:
    return pq.read_table(job / "results.parquet").to_pylist()


def test_every_entry_is_in_the_table(ran):
    folder, _ = ran
    rows = [
        row
        for row in table(folder / "runs/tiny")
        if row["split"] == "test" and row["metric"] == "accuracy"
    ]
    entries = {(row["target"], row["source"], row["technique"], row["seed"]) for row in rows}
    wanted = {
        (target, "none" if technique == "scratch" else "garments", technique, seed)
        for target in ("shoes", "tops")
        for technique in ("scratch", "linear_probe", "full", "lp_ft")
        for seed in (0, 1)
    }
    assert entries == wanted
    assert all(
        row["status"] == "done" and 0 <= row["value_low"] <= row["value"] <= row["value_high"] <= 1
        for row in rows
    )
    for row in rows:
        if row["source"] != "none":
            assert row["gain"] == pytest.approx(row["value"] - row["scratch_value"])
    probe, full = (
        next(r for r in rows if r["technique"] == t and r["target"] == "shoes")
        for t in ("linear_probe", "full")
    )
    assert probe["params_trained"] < full["params_trained"]


def test_rows_say_what_ran(ran):
    folder, done = ran
    rows = [
        row
        for row in table(folder / "runs/tiny")
        if row["split"] == "test" and row["metric"] == "accuracy"
    ]
    starts = {
        (r["target"], r["source"], r["technique"], r["seed"]): json.loads(r["hyper_parameters"])[
            "start_weights"
        ]
        for r in rows
    }
    # The same weights and head
    assert starts["shoes", "garments", "full", 0] == starts["shoes", "garments", "lp_ft", 0]
    # A seed is not a copy
    assert starts["shoes", "none", "scratch", 0] != starts["shoes", "none", "scratch", 1]
    assert starts["shoes", "garments", "full", 0] != starts["shoes", "none", "scratch", 0]
    # Split sizes are printed
    assert "train " in done.stderr and "validation " in done.stderr and "test " in done.stderr
    assert "tensors kept" in json.dumps(
        [
            json.loads((folder / f"runs/tiny/{r['trial_folder']}/record.json").read_text())[
                "transfer"
            ]
            for r in rows
        ]
    )


def test_logs_and_report_are_there(ran):
    folder, _ = ran
    root = folder / "runs/tiny"
    html = (root / "report.html").read_text()
    assert (
        "shoes" in html
        and "tops" in html
        and "http://" not in html.replace("http://www.w3.org", "")
    )
    logs = sorted(root.glob("sources/*/log/metrics.jsonl"))
    assert len(logs) == 1 and all(
        json.loads(line)["step"] for log in logs for line in log.read_text().splitlines()
    )
    assert len(list(root.glob("sources/*/log/tensorboard/events*"))) == 1
    assert not list(root.rglob("*.tmp-*"))


def test_a_second_run_only_reports(ran, onetomany, job):
    folder, _ = ran
    root = folder / "runs/tiny"
    before = {
        path: path.stat().st_mtime_ns
        for path in [*root.rglob("record.json"), *root.rglob("weights.safetensors")]
    }
    done = onetomany("run", job, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {
        path: path.stat().st_mtime_ns
        for path in [*root.rglob("record.json"), *root.rglob("weights.safetensors")]
    } == before
    assert (
        "all 16 trials are done; nothing to run" in done.stderr
        and "fine-tune" not in done.stderr
        and "accuracy" in done.stdout.replace("\n", "")
    )


def test_changing_one_target_reruns_it_alone(ran, onetomany_here, job):
    folder, _ = ran
    root = folder / "runs/tiny"
    before = set(root.glob("trials/**/record.json"))
    bundles = {
        path: path.stat().st_mtime_ns for path in root.glob("sources/*/bundle/weights.safetensors")
    }
    done = onetomany_here(
        "run",
        job,
        "--set",
        "targets.shoes.train.steps=5",
        "--set",
        "techniques=[scratch, full]",
        "--set",
        "fanout.seeds=1",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    new = [
        json.loads(path.read_text())["rows"][0]
        for path in set(root.glob("trials/**/record.json")) - before
    ]
    assert {row["target"] for row in new} == {"shoes"} and len(
        {row["trial_id"] for row in new}
    ) == 2
    assert {
        path: path.stat().st_mtime_ns for path in root.glob("sources/*/bundle/weights.safetensors")
    } == bundles


def test_score_ranks_sources(ran, onetomany_here, job):
    folder, _ = ran
    done = onetomany_here("score", job, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "garments" in done.stdout and "LogME" in done.stdout


def test_predict_and_export(ran, command, tiny_data, tmp_path):
    folder, _ = ran
    best = next(
        row
        for row in table(folder / "runs/tiny")
        if row["bundle_uri"]
        and row["target"] == "shoes"
        and row["technique"] == "full"
        and row["metric"] == "accuracy"
        and row["split"] == "test"
    )
    done = command(
        "predict",
        best["bundle_uri"],
        tiny_data / "images.parquet",
        "-o",
        tmp_path / "out",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = pq.read_table(sorted((tmp_path / "out").glob("part-*.parquet"))[0]).to_pylist()
    assert [row["row"] for row in found] == list(range(300))
    probabilities = np.array([row["probabilities"] for row in found])
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5) and {
        row["prediction"] for row in found
    } <= {"5", "7", "9"}
    # the same probabilities as the trial's own test predictions
    with np.load(folder / f"runs/tiny/{best['trial_folder']}/predictions.npz") as kept:
        scores = np.exp(kept["scores"] - kept["scores"].max(1, keepdims=True))
        assert np.allclose(
            probabilities[kept["row"]], scores / scores.sum(1, keepdims=True), atol=1e-4
        )
    done = command(
        "export",
        best["bundle_uri"],
        tmp_path / "weights.safetensors",
        "--kind",
        "state-dict",
        "--backbone-only",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import timm
    from safetensors.torch import load_file

    timm.create_model("test_resnet", in_chans=1, num_classes=0).load_state_dict(
        load_file(tmp_path / "weights.safetensors")
    )
    assert command("export", best["bundle_uri"], tmp_path / "copy", cwd=folder).returncode == 0
    assert json.loads((tmp_path / "copy/manifest.json").read_text())["kind"] == "bundle"


def test_two_runs_of_one_job_at_once_are_refused(onetomany_here, tmp_path):
    with run_lock.hold(str(tmp_path / "runs/small")):
        second = onetomany_here("run", SMALL, cwd=tmp_path)
    assert second.returncode == 2 and f"process {os.getpid()}" in second.stderr
    assert not list(tmp_path.glob("runs/small/*/*")), "nothing was begun"


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_with_asha_picks_on_validation(onetomany_here, onetomany_on_ray, tmp_path):
    assert onetomany_here("pretrain", SMALL, cwd=tmp_path).returncode == 0
    words = (
        "--set",
        "targets.shoes.train={steps: 5, global_batch: 8, eval_every_steps: 1}",
        "--set",
        "fanout={seeds: 1, trials: 3, search: {lr: [1.0e-4, 1.0e-2]}, scheduler: asha}",
    )
    done = onetomany_on_ray("run", SMALL, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in table(tmp_path / "runs/small") if row["metric"] in ("accuracy", None)]
    search = [row for row in rows if row["trial_stage"] == "search"]
    first, again = (
        {row["trial_id"]: row for row in search if (row["seed"] == grid.SEARCH_SEED) == is_first}
        for is_first in (True, False)
    )
    # Scratch is tuned with the same budget; the best draws that were not stopped are tried again
    assert len(first) == 6 and 0 < len(again) <= 2 * 3 * 2
    assert all(row["status"] == "done" for row in again.values())
    # Test is read by the final trials alone
    assert not [row for row in search if row["split"] == "test"]
    rates = {
        technique: sorted(
            json.loads(row["hyper_parameters"])["lr"]
            for row in first.values()
            if row["technique"] == technique
        )
        for technique in ("scratch", "full")
    }
    assert rates["scratch"] == rates["full"] and len(set(rates["full"])) == 3
    tried: dict[float, list[float]] = {}
    for row in search:
        if row["technique"] == "full" and row["status"] == "done":
            tried.setdefault(json.loads(row["hyper_parameters"])["lr"], []).append(row["value"])
    best = max(tried, key=lambda lr: (len(tried[lr]), sum(tried[lr])))
    final = {
        json.loads(row["hyper_parameters"])["lr"]
        for row in rows
        if row["trial_stage"] == "final"
        and row["technique"] == "full"
        and json.loads(row["hyper_parameters"])["lr"] in rates["full"]
    }
    assert final == {best}
