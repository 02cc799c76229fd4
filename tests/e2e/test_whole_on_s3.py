"""The whole spine with data and runs on an S3 server (moto's, on loopback). On Ray the quickstart
does the same (test_quickstart.py).
"""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from pipeline.io import storage
from tests.e2e.conftest import SMALL


@pytest.mark.slow
def test_everything_on_s3(s3_server, tiny_data, onetomany_here, tmp_path):
    data, runs = f"{s3_server}/tiny-data", f"{s3_server}/runs"
    for file in tiny_data.iterdir():
        if file.is_file():
            storage.write_bytes(f"{data}/{file.name}", file.read_bytes())
    words = ("--set", f"storage={runs}", "--set", "sources.garments.train.checkpoint_every_steps=1")
    done = onetomany_here("run", SMALL, *words, cwd=tmp_path, env={"TINY_DATA": data})
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []  # nothing was left on this machine
    with storage.open_read(f"{runs}/small/results.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    assert {row["target"] for row in rows if row["status"] == "done"} == {"shoes"}
    names = storage.list_files(f"{runs}/small")
    for needed in (
        "/report.html",
        "/bundle/weights.safetensors",
        "/log/metrics.jsonl",
        "/record.json",
    ):
        assert any(name.endswith(needed) for name in names), needed
    assert not any("/checkpoints/" in name for name in names)  # cleared once the bundle is there
    again = onetomany_here("run", SMALL, *words, cwd=tmp_path, env={"TINY_DATA": data})
    assert (
        again.returncode == 0 and "done before" in again.stderr and "nothing to run" in again.stderr
    )
