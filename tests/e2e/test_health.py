"""Records of patients from the command line: every kind of target has its rows, and nothing that a
run leaves tells of a patient.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import stays

JOB = Path(__file__).with_name("health.yaml")
NAME, NOTE, VALUE, DRUG = "canary-patient", "canary of a note", 712.8315, "drug: canaryol"
"""Planted in the rows: ids of patients, a text that one patient has, a value that one event has, a
drug that one patient was given.
"""
PLANTED = [
    NAME.encode(),
    NOTE.encode(),
    b"712.83",
    DRUG.encode(),
    struct.pack("<f", VALUE),
    struct.pack("<d", VALUE),
]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def health_data(tmp_path_factory) -> Path:
    folder, table, rng = tmp_path_factory.mktemp("health"), stays(240), np.random.default_rng(1)
    rows = table.to_pylist()
    for i, row in enumerate(rows):
        sick = row["label"]
        row["values"] = [
            value + (2.0 if sick and name == "v0" else 0.0)
            for name, value in zip(row["variables"], row["values"], strict=True)
        ]
        row |= {
            "entity": f"{NAME}-stay-{i}",
            "patient": f"{NAME}-{i // 2}",
            "labels": [name for name in ("a", "b", "c") if rng.random() < 0.4],
        }
        row["label_times"] = [float(hour) for hour in range(4, 20)]
        row["label_values"] = [float(sick and hour > 12) for hour in range(4, 20)]
        row["static"]["codes"] = row["static"]["codes"] + ([NOTE] if i == 5 else [])
    rows[7]["values"][3], rows[8]["variables"][2] = VALUE, DRUG
    rows[9]["values"][0] = float("nan")  # a bad row
    kinds = {field.name: field.type for field in table.schema} | {
        "entity": pa.string(),
        "labels": pa.list_(pa.string()),
        "label_times": pa.list_(pa.float32()),
        "label_values": pa.list_(pa.float32()),
    }
    pq.write_table(
        pa.table(
            {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
        ),
        folder / "stays.parquet",
        row_group_size=32,
    )
    return folder


@pytest.fixture(scope="module")
def done(health_data, run_job):
    """(the folder of the job, all that it printed), run once."""
    return run_job(JOB, HEALTH_DATA=health_data)


def test_every_target_has_its_entries_and_metrics(done):
    rows = pq.read_table(done[0] / "results.parquet").to_pylist()
    assert all(row["status"] == "done" for row in rows)
    metrics = {
        name: {row["metric"] for row in rows if row["target"] == name and row["split"] == "test"}
        for name in ("mortality", "hourly", "phenotypes")
    }
    assert {
        "auroc",
        "auprc",
        "min_precision_sensitivity",
        "brier",
        "ece",
        "precision_at_threshold",
        "sensitivity_at_threshold",
    } <= metrics["mortality"]
    assert any(name == "auroc@Gender=female" for name in metrics["mortality"])
    assert {"auroc", "auprc", "loss"} <= metrics["hourly"] and {
        "macro_auroc",
        "auroc/a",
    } <= metrics["phenotypes"]
    sources = {name: {row["source"] for row in rows if row["target"] == name} for name in metrics}
    assert sources == {
        "mortality": {"forecast", "masked", "none"},
        "hourly": {"forecast", "none"},
        "phenotypes": {"forecast", "masked", "none"},
    }
    report = (done[0] / "report.md").read_text()
    assert "Gender" in report and "1 row left out" in done[1]


def test_nothing_that_a_run_leaves_tells_of_a_patient(done, health_data):
    folder, printed = done
    held = (
        (health_data / "stays.parquet").read_bytes(),
        str(pq.read_table(health_data / "stays.parquet").to_pylist()).encode(),
    )
    assert all(any(planted in text for text in held) for planted in PLANTED[:4]), (
        "the search finds what is there"
    )
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {
        "results.parquet",
        "report.html",
        "report.md",
        "weights.safetensors",
        "predictions.npz",
    } <= {file.name for file in files}
    texts = {"printed": printed.encode()} | {str(file): file.read_bytes() for file in files}
    texts |= {
        f"{file} as rows": str(pq.read_table(file).to_pylist()).encode()
        for file in files
        if file.suffix == ".parquet"
    }
    for file in folder.rglob("*.npz"):  # its bytes are compressed
        with np.load(file) as arrays:
            values = {name: array.tolist() for name, array in arrays.items()}
        texts[f"{file} as arrays"] = str(values).encode()
    found = [
        (name, planted) for name, text in texts.items() for planted in PLANTED if planted in text
    ]
    assert not found


def test_a_bundle_predicts_new_patients_without_naming_them(done, health_data, command, tmp_path):
    bundle = next(
        row["bundle_uri"]
        for row in pq.read_table(done[0] / "results.parquet").to_pylist()
        if row["target"] == "mortality" and row["technique"] == "full" and row["bundle_uri"]
    )
    table = pq.read_table(health_data / "stays.parquet").drop_columns(
        ["label", "labels", "label_times", "label_values"]
    )
    pq.write_table(table, tmp_path / "new.parquet")
    ended = command(
        "predict",
        bundle,
        tmp_path / "new.parquet",
        "-o",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert not [
        planted for planted in PLANTED[:4] if planted in (ended.stdout + ended.stderr).encode()
    ]
