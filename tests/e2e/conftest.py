"""Small real data for whole runs (cut from the samples that ship with the project), and the command
as users call it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "jobs" / "data"
TINY = Path(__file__).with_name("tiny.yaml")
SMALL = Path(__file__).with_name("small.yaml")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """images.parquet (300 Fashion-MNIST rows), stories.txt and reviews.parquet (sentiment
    sentences).
    """
    folder = tmp_path_factory.mktemp("tiny")
    images = pq.read_table(SAMPLES / "fashion_mnist_6000.parquet")
    labels = images["label"].to_numpy()
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:30] for c in range(10)]))
    pq.write_table(images.take(pa.array(keep)), folder / "images.parquet", row_group_size=64)
    reviews = pq.read_table(SAMPLES / "sentiment_sentences.parquet").slice(0, 400)
    pq.write_table(reviews, folder / "reviews.parquet")
    (folder / "stories.txt").write_text("\n".join(reviews["text"].to_pylist()), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def onetomany(tiny_data):
    """Run the command in a process of its own: ``onetomany("run", job, ..., cwd=)``; returns the
    completed process.
    """

    def call(
        *words: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 280
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", *map(str, words)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(tiny_data, env),
        )

    return call


def environment(tiny_data: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    found = {**os.environ, "TINY_DATA": str(tiny_data), "PYTHONPATH": str(ROOT), **(extra or {})}
    found.pop("RAY_ADDRESS", None)
    return found
