"""A whole run of the command with lora among the techniques: an image target and a text target,
their rows and their bundles.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from tests.e2e.conftest import TINY

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_lora_is_one_of_the_techniques(tmp_path, onetomany_here, tiny_data):
    job = tmp_path / "tiny.yaml"
    text = TINY.read_text()
    assert "[scratch, linear_probe, full, lp_ft]" in text and "seeds: 2" in text
    job.write_text(
        text.replace("full, lp_ft]", "full, lp_ft, lora]").replace("seeds: 2", "seeds: 1")
    )
    done = onetomany_here("run", job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = pq.read_table(tmp_path / "runs/tiny/results.parquet").to_pylist()
    for target, source in (("shoes", "garments"), ("reviews", "stories")):
        found = {
            row["technique"]: row
            for row in rows
            if row["target"] == target and row["split"] == "test" and row["metric"] == "accuracy"
        }
        assert (
            set(found) == {"scratch", "linear_probe", "full", "lp_ft", "lora"}
            and found["lora"]["source"] == source
        )
        assert all(row["status"] == "done" for row in found.values())
        assert found["linear_probe"]["params_trained"] < found["lora"]["params_trained"]
        starts = {
            name: json.loads(found[name]["hyper_parameters"])["start_weights"]
            for name in ("full", "lora")
        }
        assert starts["full"] == starts["lora"]  # the same backbone and head
        check_bundle(
            tmp_path / "runs/tiny" / found["lora"]["trial_folder"],
            tiny_data / ("images.parquet" if target == "shoes" else "reviews.parquet"),
        )


@torch.no_grad()
def check_bundle(trial: Path, rows: Path) -> None:
    """The bundle holds the plain task and gives, for the test rows, the scores that were
    recorded.
    """
    kept = bundle.load(str(trial / "bundle"))
    assert kept.tensors and not any("lora" in name or "base_layer" in name for name in kept.tensors)
    task, modality = kept.task(), kept.modality()
    with np.load(io.BytesIO((trial / "predictions.npz").read_bytes())) as held:
        recorded, ids = held["scores"], held["row"]
    role = modality.roles[0]  # the columns have the roles' names
    arrays, bad = modality.decode(pq.read_table(rows).take(ids.tolist()), {role: role})
    assert len(ids) > 10 and not any(bad)
    batch = modality.finish(
        Batch(ids, torch.zeros(len(ids), dtype=torch.int64), modality.collate(arrays))
    )
    assert (
        np.abs(task.objective.predict(task.backbone, batch)["scores"].numpy() - recorded).max()
        < 1e-5
    )
