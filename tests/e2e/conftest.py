"""Small real data for whole runs (cut from the samples that ship with the project), and the
command.

`onetomany` calls it in this process. `onetomany_here` does so without Ray, whatever the verb, and
`onetomany_on_ray` on the Ray that the tests share. `onetomany_alone` starts a process, for what
only a process shows.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_runs import without_ray

from pipeline.data import manifests

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


class Ended(NamedTuple):
    """What a call of the command left, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def onetomany(tiny_data):
    """Run the command in this process: ``onetomany("run", job, ..., cwd=, env=)``."""
    from typer.testing import CliRunner

    from pipeline import cli

    def call(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Ended:
        with pytest.MonkeyPatch.context() as place:
            place.chdir(cwd)
            for name, value in {"TINY_DATA": str(tiny_data), **(env or {})}.items():
                place.setenv(name, value)
            ended = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)
        return Ended(ended.exit_code, ended.stdout, ended.stderr)

    return call


@pytest.fixture(scope="session")
def onetomany_on_ray(onetomany, start_ray):
    """The same on the Ray that the tests share."""

    def call(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Ended:
        start_ray()
        return onetomany(*words, cwd=cwd, env=env)

    return call


@pytest.fixture(scope="session")
def onetomany_alone(tiny_data):
    """The same in a process of its own, which starts Ray where it needs it."""

    def call(
        *words: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 280
    ) -> Ended:
        ended = subprocess.run(
            command_line(*words),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(tiny_data, env),
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return call


@pytest.fixture(scope="session")
def onetomany_here(onetomany):
    """The same without Ray: sources and trials one after the other, in this process, on one
    rank.
    """

    def call(*words: object, cwd: Path, env: dict[str, str] | None = None) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            without_ray(patch)
            return onetomany(*words, cwd=cwd, env=env)

    return call


def read_few_rows(patch: pytest.MonkeyPatch, few: dict[str, int]) -> None:
    """Read at most so many rows of each split of any data, evenly spaced."""
    real = manifests.splits

    def splits(*words, **options):
        found = real(*words, **options)
        thin, masks = {}, {}
        for name, most in few.items():
            rows = getattr(found, name)
            masks[name] = np.arange(len(rows)) % max(1, -(-len(rows) // most)) == 0
            thin[name] = rows.keep(masks[name])
        of_corpus = np.split(masks["train"], np.cumsum(found.corpus_sizes)[:-1])
        thin["corpus_sizes"] = tuple(int(mask.sum()) for mask in of_corpus)
        thin["train_by_corpus"] = tuple(
            map(manifests.Selection.keep, found.train_by_corpus, of_corpus)
        )
        return dataclasses.replace(found, **thin)

    patch.setattr(manifests, "splits", splits)


@pytest.fixture(scope="module")
def command(onetomany_here):
    """The command for whole jobs, without Ray."""
    return onetomany_here


def with_packages_of_its_own(folder: Path) -> Path:
    """Put a `pipeline` and a `cluster` into the folder, which no run there may take."""
    for name in ("pipeline", "cluster"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "raise SystemExit('the package in the current folder was taken')\n"
        )
    return folder


def command_line(*words: object) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.cli", *map(str, words)]


def environment(tiny_data: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a command in a process of its own; without RAY_ADDRESS in ``extra`` it
    starts its own Ray.
    """
    found = {**os.environ, "TINY_DATA": str(tiny_data), "PYTHONPATH": str(ROOT)}
    found.pop("RAY_ADDRESS", None)
    return found | (extra or {})


@pytest.fixture(scope="module")
def run_job(command, tmp_path_factory):
    """Run a job file with variables set. Returns the folder of the job and all that was printed."""

    def call(job: Path, **variables: object) -> tuple[Path, str]:
        where = tmp_path_factory.mktemp("run")
        env = {name: str(value) for name, value in variables.items()}
        ended = command("run", job, cwd=where, env=env)
        assert ended.returncode == 0, ended.stderr[-4000:]
        return where / "runs" / job.stem, ended.stdout + ended.stderr

    return call


def result_rows(done: Path) -> list[dict]:
    """The results of a job's folder."""
    return pq.read_table(done / "results.parquet").to_pylist()


def best_bundle(done: Path, target: str, technique: str) -> str:
    """The first bundle that a technique has left of a target."""
    return next(
        row["bundle_uri"]
        for row in result_rows(done)
        if row["target"] == target and row["technique"] == technique and row["bundle_uri"]
    )
