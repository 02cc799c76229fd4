"""Verification learns real pictures: held-out rows of the classes that it was trained to tell
apart.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import SAMPLES

JOB = """
name: garments
sources:
  classes:
    data: &garments
      uri: garments.parquet
      where: {label: [1, 3, 5, 7, 8, 9]}
      modality: {image: {size: 28, channels: 1}}
      columns: {image: image, label: label}
      validation_fraction: 0.1
    backbone: timm/resnet10t
    objective: classification
    train: {steps: 40, global_batch: 64, lr: 2e-3}
targets:
  same_class:
    data:
      <<: *garments
      modality: image
      columns: {image: image, identity: label}
      test_fraction: 0.2
    objective: {verification: {width: 64}}
    train: {steps: 60, global_batch: 64, lr: 2e-3}
techniques: [full]
fanout: {seeds: 1}
"""


@pytest.mark.slow
def test_pairs_of_known_classes_are_told_apart(onetomany_here, tmp_path):
    job = tmp_path / "garments.yaml"
    job.write_text(JOB)
    rows = pq.read_table(SAMPLES / "fashion_mnist_6000.parquet").slice(0, 2400)
    pq.write_table(rows, tmp_path / "garments.parquet")
    done = onetomany_here("run", job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "runs/garments/results.parquet").to_pylist()
    (rate,) = {
        row["value"]
        for row in rows
        if row["split"] == "test" and row["metric"] == "eer" and row["technique"] == "full"
    }
    assert rate < 0.2  # chance is 0.5
    words = ("predict", "runs/garments", "garments.parquet", "-o", "found")
    done = onetomany_here(*words, "--target", "same_class", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.array(pq.read_table(tmp_path / "found")["embedding"].to_pylist())
    assert found.shape == (2400, 64)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
