"""What the report tells of policies in the simulator: means by number of demonstrations beside
expert and chance, and pictures where there are some.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
from toys import image_files, job_of, shared_of, trial_of

from pipeline.io import storage
from pipeline.objectives.classification import Classification
from pipeline.report import blocks, matrix, rollouts
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions
from pipeline.transfer import trial

WORLDS = 12


def message(technique, source, fraction, n_train, seed, success, rollout_frames=None):
    """A results row and the predictions of a trial that succeeds in so many of the worlds."""
    name = f"{technique}-{source}-{fraction}-{seed}"
    done = (np.arange(WORLDS) < success).astype(float)
    arrays = {
        "success": done,
        "return": 10 * done + seed,
        "steps": 5 + done,
        "expert_success": np.ones(WORLDS),
        "expert_return": np.full(WORLDS, 11.0),
        "expert_steps": np.full(WORLDS, 6.0),
        "diverged": np.zeros(WORLDS),
    }
    row = ResultRow(
        **{
            "trial_id": name,
            "trial_stage": "final",
            "status": "done",
            "target": "robot",
            "source": source,
            "backbone": "policy/mlp",
            "technique": technique,
            "label_fraction": fraction,
            "seed": seed,
            "split": "test",
            "metric": "success",
            "value": success / WORLDS,
            "higher_is_better": True,
            "n_train": n_train,
            "hyper_parameters": "{}",
            "n_eval": WORLDS,
        }
    )
    return row, RunPredictions(np.arange(WORLDS), arrays, seed, rollout_frames=rollout_frames)


def shown(*trials):
    rows, runs = [row for row, _ in trials], {row.trial_id: run for row, run in trials}
    found = matrix.matrix_entries(rows, runs)
    return rollouts.rollout_blocks("robot", found, runs)


def test_policies_stand_behind_expert_and_chance_by_how_much_they_saw():
    out = shown(
        message("zero_shot", "sim", "0 rows", 0, 0, 1),
        *(message("full", "sim", "5 rows", 5, seed, 9) for seed in range(2)),
        *(message("scratch", "none", "5 rows", 5, seed, 3) for seed in range(2)),
        message("full", "sim", "1 rows", 1, 0, 6),
    )
    table = next(block for block in out if isinstance(block, blocks.Table))
    lines = {str(line[0]): line[1:] for line in table.rows}
    assert list(lines) == [
        "expert",
        "sim · zero_shot",
        "sim · full, 1 episode",
        "sim · full, 5 episodes",
        "none · scratch, 5 episodes",
    ]
    means = {name: [float(str(value).split()[0]) for value in line] for name, line in lines.items()}
    assert means["expert"] == [1.0, 11.0, 6.0] and means["sim · full, 5 episodes"] == pytest.approx(
        [0.75, 8.0, 5.75], abs=0.01
    )
    assert (
        means["none · scratch, 5 episodes"][0] == 0.25
        and "random" not in lines
        and "diverged" not in blocks.markdown("", out)
    )


def test_backbones_are_named_where_there_are_several():
    first, second = (
        message("scratch", "none", "5 rows", 5, 0, 9),
        message("scratch", "none", "5 rows", 5, 1, 3),
    )
    second = replace(second[0], backbone="policy/transformer"), second[1]
    table = next(block for block in shown(first, second) if isinstance(block, blocks.Table))
    assert [str(line[0]) for line in table.rows] == [
        "expert",
        "none · scratch (policy/mlp), 5 episodes",
        "none · scratch (policy/transformer), 5 episodes",
    ]


def test_an_expert_without_a_known_success_is_shown_by_its_return():
    row, run = message("full", "sim", "1 rows", 1, 0, 6)
    run.predictions["expert_success"], run.predictions["success"] = (
        np.full(WORLDS, np.nan),
        np.full(WORLDS, np.nan),
    )
    table = next(block for block in shown((row, run)) if isinstance(block, blocks.Table))
    expert = next(line for line in table.rows if line[0] == "expert")
    assert str(expert[1]) == blocks.DASH and float(str(expert[2]).split()[0]) == 11.0


def test_episodes_that_diverged_are_counted():
    row, run = message("full", "sim", "1 rows", 1, 0, 6)
    run.predictions["diverged"][:2] = 1
    assert "In 2 episodes the simulation diverged" in blocks.markdown("", shown((row, run)))


def test_nothing_is_told_of_targets_without_a_simulator():
    row, run = message("full", "sim", "1 rows", 1, 0, 6)
    run.predictions.pop("return")
    assert rollouts.rollout_blocks("robot", [], {row.trial_id: run}) == [] == shown((row, run))


def test_pictures_are_of_the_untrained_and_of_the_fewest_demonstrations():
    rollout_frames = np.random.default_rng(0).integers(0, 255, (4, 8, 10, 3), dtype=np.uint8)
    out = shown(
        message("zero_shot", "sim", "0 rows", 0, 0, 1, rollout_frames),
        message("full", "sim", "1 rows", 1, 0, 6, rollout_frames),
        message("full", "sim", "5 rows", 5, 0, 9, rollout_frames),
    )
    figure = next(block for block in out if isinstance(block, blocks.Figure))
    text = blocks.html_page("t", "e", out)
    assert (
        "Pictures of episodes: sim · zero_shot, sim · full, 1 episode" in text
        and text.count("<image") == 8
        and "first test world" in str(figure)
    )
    assert not [
        block
        for block in shown(message("full", "sim", "1 rows", 1, 0, 6))
        if isinstance(block, blocks.Figure)
    ]


def test_a_trial_keeps_its_pictures_beside_its_predictions(tmp_path, monkeypatch):
    paths = image_files(tmp_path, {"train": 24, "validation": 9, "test": 9})
    pictures = np.arange(9 * 2 * 4 * 5 * 3, dtype=np.uint8).reshape(9, 2, 4, 5, 3)

    class Acting(Classification):
        """A class of its own: whether a class has a capability is remembered by Python 3.11."""

        @classmethod
        def rollout_metrics(cls, *_):
            return ("accuracy",)

        def rollout_evaluation(self, backbone, predictions, rows):
            return predictions, pictures[0]

    monkeypatch.setattr("pipeline.objectives.classification.Classification", Acting)
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    record = trial.run(trial_of(job, shared, "full"), shared)
    run = trial.read_predictions(shared.root, record.rows[0].folder, 0)
    assert (
        run is not None
        and np.array_equal(run.rollout_frames, pictures[0])
        and "film" not in run.predictions
        and len(run.rows) == 9
    )
    with np.load(
        io.BytesIO(
            storage.read_bytes(storage.join(shared.root, record.rows[0].folder, "predictions.npz"))
        )
    ) as kept:
        assert all(len(kept[name]) == 9 for name in run.predictions)
