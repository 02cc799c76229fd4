"""From a folder of somebody's own files to a report: init, run. `test_pages.py` has a table."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.e2e.conftest import SAMPLES

pytestmark = pytest.mark.slow


def short(kind: str) -> list[str]:
    """A few steps of one seed: the way is tested, not what is learned."""
    return [
        word
        for setting in (
            "sources.own.train.steps=2",
            f"targets.{kind}.train.steps=2",
            "fanout.seeds=1",
            "techniques=[full]",
        )
        for word in ("--set", setting)
    ]


def test_a_folder_of_images_is_run(onetomany_here, tmp_path):
    rows = pq.read_table(SAMPLES / "clothing_48px.parquet").to_pylist()
    for label in ("dress", "hat", "shoes"):
        some = [row["image"] for row in rows if row["label_name"] == label][:30]
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number, image in enumerate(some):
            (tmp_path / "photos" / label / f"{number}.jpg").write_bytes(image)
    assert onetomany_here("init", "photos", cwd=tmp_path).returncode == 0
    ran = onetomany_here("run", "photos.yaml", *short("label"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs/photos/report.html").exists()


def test_a_folder_of_recordings_is_run(onetomany_here, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(36):
        folder = tmp_path / "calls" / ("on", "off")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        times = np.arange(round(rng.uniform(0.4, 0.8) * 8000)) / 8000
        tone = np.sin(2 * np.pi * (300 + 300 * (number % 2)) * times)
        soundfile.write(folder / f"{number}.wav", 0.3 * tone, 8000)
    assert onetomany_here("init", "calls", cwd=tmp_path).returncode == 0
    ran = onetomany_here("run", "calls.yaml", *short("label"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs/calls/report.html").exists()
