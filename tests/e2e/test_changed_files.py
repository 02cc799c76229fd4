"""A file that changes while a run reads it ends the run with one line, and leaves no bundle
behind.
"""

import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
JOB = """
name: toy
sources:
  corpus:
    data:
      train: rows.parquet
      modality: {image: {size: 28, channels: 1}}
      columns: {image: image, label: label}
      validation_fraction: 0.1
      decode: workers
    backbone: timm/test_resnet
    objective: classification
    train: {steps: 100000, global_batch: 16}
"""


def test_a_table_that_is_replaced_while_it_is_read_ends_the_run(
    tiny_data, tmp_path, onetomany_on_ray
):
    rows, job = tmp_path / "rows.parquet", tmp_path / "job.yaml"
    shutil.copy(tiny_data / "images.parquet", rows)
    job.write_text(JOB)

    def replace_the_table() -> None:
        while not list(tmp_path.glob("runs/toy/sources/*/log/metrics.jsonl")):
            time.sleep(0.2)
        table = pq.read_table(rows)
        pq.write_table(table.take(pa.array(np.arange(len(table))[::-1])), rows, row_group_size=64)

    threading.Thread(target=replace_the_table, daemon=True).start()
    done = onetomany_on_ray("pretrain", job, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert f"{rows} was changed while it was in use" in errors[0], done.stderr
    assert not list(tmp_path.glob("runs/toy/sources/*/bundle"))
