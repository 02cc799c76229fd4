"""Verification as a job has it: tested on identities that no training row has."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import image_files, job_of, shared_of, trial_of

from pipeline.config.schema import ComponentConfig
from pipeline.transfer import targets, trial

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
    task, text, _ = trial.build_task(trial_of(job, shared, "zero_shot"), shared)
    theirs = shared.heads["src"][1]
    own = task.objective.state_dict()
    assert np.array_equal(own["projection.weight"], theirs["projection.weight"])
    assert not np.array_equal(own["identities"], theirs["identities"])
    assert "head: 2 tensors kept" in text and np.isfinite(values(found)["eer"])


def test_folds_are_refused(world):
    """Pairs of two folds' embeddings would be compared, which two networks made."""
    job, _ = world
    with pytest.raises(ValueError, match=r"^targets.task.folds: verification is tested on pairs"):
        targets.plan_target(
            job.model_copy(
                update={"targets": {"task": job.targets["task"].model_copy(update={"folds": 3})}}
            ),
            "task",
        )


WORKS = ("full", "linear_probe", "lora", "scratch", "zero_shot", "l2_sp", "distillation", "lp_ft")
READS_SCORES = ("bi_tuning", "tent", "co_tuning", "pseudo_labels", "mcc", "cdan")
"""Techniques that read scores of classes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", (*WORKS, *READS_SCORES))
def test_a_technique_works_or_says_why_not(world, name):
    """None reads scores of classes, which are not there."""
    job, shared = world
    component = ComponentConfig(name=name)
    target = job.targets["task"].model_copy(update={"techniques": [component]})
    alone = job.model_copy(update={"techniques": [component], "targets": {"task": target}})
    try:
        targets.plan_target(alone, "task")
        found = values(trial.run(trial_of(job, shared, name), shared))
    except ValueError as error:
        assert name not in WORKS, error
    else:
        assert name not in READS_SCORES and 0 <= found["eer"] <= 1
