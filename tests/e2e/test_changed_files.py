"""A file that changes while a run reads it ends the run with one line, and leaves no bundle
behind.
"""

import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
JOB = """
name: toy
sources:
  corpus:
    data: {train: rows.parquet, modality: {image: {size: 28, channels: 1}}, columns: {image: image, label: label}, validation_fraction: 0.1, decode: workers}
    backbone: timm/test_resnet
    objective: classification
    train: {steps: 100000, global_batch: 16}
"""


def test_a_table_that_is_replaced_while_it_is_read_ends_the_run(tiny_data, tmp_path):
    rows, job = tmp_path / "rows.parquet", tmp_path / "job.yaml"
    shutil.copy(tiny_data / "images.parquet", rows)
    job.write_text(JOB)
    command = [sys.executable, "-P", "-m", "pipeline.cli", "pretrain", str(job)]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(tiny_data),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while running.poll() is None and not list(
            tmp_path.glob("runs/toy/sources/*/log/metrics.jsonl")
        ):
            time.sleep(0.5)
        table = pq.read_table(rows)
        pq.write_table(table.take(pa.array(np.arange(len(table))[::-1])), rows, row_group_size=64)
        said = running.communicate(timeout=300)[0]
    finally:
        running.kill()
    errors = [
        line for line in said.splitlines() if line.startswith("error: ")
    ]  # lines of the raylet may follow it
    assert running.returncode == 1 and len(errors) == 1, said
    assert f"{rows} was changed while it was in use" in errors[0], said
    assert "Traceback" not in said and not list(tmp_path.glob("runs/toy/sources/*/bundle"))
