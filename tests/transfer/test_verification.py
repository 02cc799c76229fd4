"""Verification as a job has it: tested on identities that no training row has."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import image_files, job_of, shared_of, trial_of

from pipeline.config import registry
from pipeline.config.schema import ComponentConfig
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.transfer import baseline_trials, grid, targets, trial

IMAGES = {"modality": "image", "columns": {"image": "picture", "identity": "class"}}


def values(record, split: str = "test") -> dict[str, float]:
    return {row.metric: row.value for row in record.rows if row.split == split}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures; those of the test split are of new identities."""
    folder = tmp_path_factory.mktemp("verification")
    paths = image_files(folder, {"train": 30, "validation": 12, "test": 12})
    test = pq.read_table(paths["test"]).to_pydict()
    test["class"] = [f"new {name}" for name in test["class"]]
    pq.write_table(pa.table(test), paths["test"])
    job = job_of(
        folder,
        paths,
        train={"steps": 2},
        objective="verification",
        data={**paths, **IMAGES},
        label_fractions=[4, 1.0],
    )
    return job, shared_of(folder, job, paths)


def test_rows_of_new_identities_are_tested_in_pairs(world):
    job, shared = world
    (data,) = shared.targets.values()
    assert (data.test.arrays["label"] == -1).all() and (data.train.arrays["label"] >= 0).all()
    one = trial_of(job, shared, "full", fraction=4)
    record = trial.run(one, shared)
    assert record.rows[0].n_train == 12, "four rows of each identity"
    found = values(record)
    assert list(found) == ["eer", "min_dcf"] and 0 <= found["eer"] <= 1
    row = next(row for row in record.rows if row.split == "test")
    assert row.value_low <= row.value <= row.value_high and row.n_units == 12
    written = trial.read_predictions(shared.root, one.folder, 0).predictions
    np.testing.assert_allclose(np.linalg.norm(written["embedding"], axis=1), 1, rtol=1e-5)
    assert len(np.unique(written["identity"])) == 3


def test_the_embedding_of_a_source_is_tried_as_it_is(world):
    """Its identities are left behind: the target has others, or others in the same places."""
    job, shared = world
    found = trial.run(trial_of(job, shared, "zero_shot"), shared)
    task, text, _ = trial.build(trial_of(job, shared, "zero_shot"), shared)
    theirs = shared.heads["src"][1]
    own = task.objective.state_dict()
    assert np.array_equal(own["projection.weight"], theirs["projection.weight"])
    assert not np.array_equal(own["identities"], theirs["identities"])
    assert "head: 2 tensors kept" in text and np.isfinite(values(found)["eer"])


@pytest.mark.slow
def test_every_technique_works_or_says_why_not(world):
    """None reads scores of classes that are not there."""
    job, shared = world
    refused = {}
    for name in registry.names("technique"):
        component = ComponentConfig(name=name)
        if grid.combines_trials(component):
            continue
        try:
            stage = job.model_copy(
                update={
                    "techniques": [component],
                    "targets": {
                        "task": job.targets["task"].model_copy(update={"techniques": [component]})
                    },
                }
            )
            targets.stage(stage, "task")
            found = values(trial.run(trial_of(job, shared, name), shared))
            assert np.isfinite(found["eer"]), name
        except ValueError as error:
            refused[name] = str(error)
    assert {"full", "linear_probe", "lora", "scratch", "zero_shot", "l2_sp"} & set(refused) == set()
    assert {"bi_tuning", "tent", "distillation", "co_tuning", "pseudo_labels"} <= set(refused)
    assert all("verification" in why for why in refused.values()), refused


# ---------------------------------------------------------------- real speakers

SPLITS = {
    "train": ["george", "jackson", "lucas", "nicolas"],
    "test": ["theo", "yweweler"],
}


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Spoken digits of four speakers to train on, and of two others to test on."""
    folder, paths = tmp_path_factory.mktemp("speakers"), {}
    table = pq.read_table(f"{os.environ['ONETOMANY_DATA']}/speech/fsdd/fsdd.parquet")
    take, speaker = (table[name].to_numpy() for name in ("take", "speaker"))
    parts = {
        "train": np.isin(speaker, SPLITS["train"]) & (take >= 10),
        "validation": np.isin(speaker, SPLITS["train"]) & (take < 4),
        "test": np.isin(speaker, SPLITS["test"]) & (take < 12),
    }
    for name, kept in parts.items():
        paths[name] = str(folder / f"{name}.parquet")
        pq.write_table(table.filter(pa.array(kept)), paths[name])
    columns = {"audio": "audio", "identity": "speaker"}
    options = AudioOptions(rate=8000, mels=40)
    train = pq.read_table(paths["train"])
    name, backbone = "torchaudio/deepspeech2", {"layers": 1, "hidden": 64, "channels": 16}
    modality = Audio(options, Audio.fit(options, train, columns, name))
    job = job_of(
        folder,
        paths,
        train={"steps": 150, "global_batch": 32, "lr": 2e-3},
        objective="verification",
        data={**paths, "modality": "audio", "columns": columns},
    )
    source = (
        Architecture(name, backbone, modality.inputs()),
        ModalitySpec("audio", options.model_dump(), modality.state),
    )
    return job, shared_of(folder, job, paths, source=source)


@pytest.mark.slow
@pytest.mark.data
def test_new_speakers_are_told_apart_after_training(speakers):
    """Measured: equal error rate ... untrained, ... trained, ... of log-mel statistics."""
    job, shared = speakers
    untrained = values(trial.run(trial_of(job, shared, "zero_shot"), shared))
    trained = values(trial.run(trial_of(job, shared, "scratch"), shared))
    group = next(iter(shared.backbone_groups.values()))
    job = job.model_copy(update={"baselines": "auto"})
    (one,) = grid.baseline_trials(job, "task", group, "data key")[:1]
    assert one.technique.name == "log_mel_cosine"
    record = baseline_trials.run(one, shared)
    statistics = values(record)
    print(untrained, trained, statistics, json.loads(record.rows[0].hyper_parameters))
    assert trained["eer"] < 0.2 and trained["eer"] < untrained["eer"] - 0.1
    assert statistics["eer"] < 0.5
