"""What a modality learns of a corpus, and of other rows that come to it later: those of a target,
and of a source that continues from a bundle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from train.test_source import pretrained
from transfer.test_stages import Silent

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Job
from pipeline.data import manifests
from pipeline.modalities.trajectory import Trajectory
from pipeline.train import fit_components, source
from pipeline.transfer import stages
from pipeline.transfer.trial import TargetData

COLUMNS = {"observations": "observations", "actions": "actions"}


def robot(
    path: Path,
    observation: int,
    action: int,
    rows: int = 20,
    seed: int = 0,
    frames: bytes | None = None,
) -> str:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 12, rows)
    table = pa.table(
        {
            "observations": [rng.normal(0, 1, (n, observation)).tolist() for n in lengths],
            "actions": [rng.normal(0, 1, (n, action)).tolist() for n in lengths],
            "split": ["train"] * (rows - 8) + ["validation"] * 4 + ["test"] * 4,
        }
    )
    if frames is not None:
        table = table.append_column(
            "images", pa.array([[frames] * n for n in lengths], pa.list_(pa.binary()))
        )
    pq.write_table(table, path)
    return str(path)


def job_of(folder: Path, uri: str, backbone: Any, target: str | None = None) -> Job:
    data = {
        "split_column": "split",
        "modality": "trajectory",
        "columns": COLUMNS,
        "decode": "train",
    }
    task = {
        "data": {**data, "uri": target},
        "objective": "behaviour_cloning",
        "train": {"steps": 2, "global_batch": 4},
    }
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "targets": {"task": task} if target else {},
            "fanout": {"seeds": 1},
            "techniques": ["full"],
            "sources": {
                "src": {
                    "data": {**data, "uri": uri},
                    "backbone": backbone,
                    "objective": "behaviour_cloning",
                    "train": {"steps": 3, "global_batch": 4, "canonical_shards": 1},
                }
            },
        }
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Job, str]:
    """A policy of one robot: its job and its bundle."""
    folder = tmp_path_factory.mktemp("first")
    job = job_of(
        folder,
        robot(folder / "arm.parquet", 5, 2),
        {"policy/mlp": {"width": 16, "layers": 1}},
        robot(folder / "legs.parquet", 7, 3, seed=1),
    )
    return job, pretrained(job)[0].bundle_uri


def test_a_target_says_what_its_source_knows_of_its_rows(first):
    job, _ = first
    state = stages.check(job, Silent())
    (data,) = stages.prepare_shared(state).targets.values()
    assert isinstance(data, TargetData)
    assert "0 of 1 robots are known; new: o7a3 (12 rows)" in data.split_text, (
        "the source's state is asked, not the one that has grown"
    )
    assert (
        list(data.modality.state["spaces"]) == ["o5a2", "o7a3"]
        and "asked for" not in data.split_text
    )
    task = job.targets["task"].model_copy(update={"label_fractions": [5, 200]})
    state = stages.check(job.model_copy(update={"targets": {"task": task}}), Silent())
    stages.prepare_shared(state)
    assert any(
        note.startswith("task: 200 rows ") and "there are 12: all" in note for note in state.notes
    )


@pytest.mark.slow
def test_a_source_that_continues_on_another_robot_grows_and_keeps_what_it_has(first, tmp_path):
    _, uri = first
    before = bundle.load(uri)
    job = job_of(tmp_path, robot(tmp_path / "legs.parquet", 7, 3, seed=1), f"bundle:{uri}")
    stage = source.plan_source(job, "src")
    source.prepare_source(stage)
    initial = bundle.load(f"{stage.uri}/initial").tensors
    _, fitted, _ = pretrained(job)  # as after a restart: the text is kept with what was read
    after = bundle.load(stage.bundle_uri)
    assert list(fitted.modality.state["spaces"]) == ["o5a2", "o7a3"]
    assert (
        fitted.modality.state["spaces"]["o5a2"] == before.manifest.modality.state["spaces"]["o5a2"]
    )
    assert (
        "0 of 1 robots" in fitted.transfer_note
        and "encoders.o7a3 new" in fitted.transfer_note
        and "trunk kept" in fitted.transfer_note
    )
    assert all(torch.equal(initial[name], tensor) for name, tensor in before.tensors.items()), (
        "ranks start from what the first one had learned"
    )
    assert {name.replace("o5a2", "o7a3") for name in before.tensors} <= after.tensors.keys(), (
        "a head for each robot"
    )


@pytest.mark.parametrize("technique", ["zero_shot", "linear_probe"])
def test_a_policy_is_not_tried_as_it_is_on_a_robot_that_it_does_not_know(first, technique):
    job, _ = first
    job = job.model_copy(update={"techniques": [ComponentConfig(name=technique)]})
    with pytest.raises(
        ValueError,
        match=f"{technique} takes the source's network as it is, and its rows are of space o7a3, "
        "which no row of the source is of",
    ):
        stages.prepare_shared(stages.check(job, Silent()))


def test_every_task_stands_in_the_sample(tmp_path):
    """Skills in turn, and a step through the rows that meets one of them alone."""
    rows = 2 * 64 - 1
    skills = [["push", "pull"][i % 2] for i in range(rows)]
    skills[5] = "rare"
    pq.write_table(
        pa.table(
            {
                "number": range(rows),
                "skill": pa.array([None if i == 7 else skill for i, skill in enumerate(skills)]),
            }
        ),
        tmp_path / "a.parquet",
    )
    selection = manifests.Selection(manifests.build(str(tmp_path / "a.parquet"), "parquet", ""))
    assert set(fit_components.sample(selection, ["skill"], 64)["skill"].to_pylist()) == {"push"}, (
        "what an even step finds"
    )
    found = fit_components.sample(selection, ["number", "skill"], 64, ["skill"]).to_pydict()
    assert (
        set(found["skill"]) == {"push", "pull", "rare", None} and 64 <= len(found["number"]) <= 66
    )
    assert (
        found["number"] == sorted(set(found["number"]))
        and 20 < found["skill"].count("push") < 44
        and 20 < found["skill"].count("pull") < 44
    )
    assert len(fit_components.sample(selection, ["number"], 8, ["number"])) == 16, (
        "as many again at most, where nearly all differ"
    )
    assert len(fit_components.sample(selection, ["number"], 1000, ["skill"])) == rows


def test_frames_are_not_read_to_fit_a_modality(tmp_path, monkeypatch):
    columns = {**COLUMNS, "images": "images"}
    uri = robot(tmp_path / "seen.parquet", 5, 2, frames=b"no picture")
    objective = registry.get("objective", "behaviour_cloning")
    assert fit_components.fitted_columns(Trajectory, objective, columns) == [
        "observations",
        "actions",
    ]
    read: list[str] = []
    plain = manifests.Reader.__init__
    monkeypatch.setattr(
        manifests.Reader,
        "__init__",
        lambda self, manifest, names, *more: (
            read.extend(names),
            plain(self, manifest, names, *more),
        )[1],
    )
    job = job_of(
        tmp_path, uri, {"policy/mlp": {"width": 16, "layers": 1, "vision": "timm/test_resnet"}}
    )
    spec = json.loads(job.model_dump_json())
    spec["sources"]["src"]["data"] |= {
        "columns": columns,
        "modality": {"trajectory": {"images": 16}},
    }
    stage = source.plan_source(Job.model_validate(spec), "src")
    assert stage.splits is not None
    fit_components.fit_modality(
        stage.spec, stage.splits.train, None, "sources.src", str(tmp_path / "modality.json")
    )
    assert set(read) == {"observations", "actions"}
