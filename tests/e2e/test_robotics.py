"""Policies from the command line: demonstrations in simulation, pretraining on two ranks, k
demonstrations of another world, episodes in it, the report.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.prepare.engine.importing import options_of
from pipeline.prepare.engine.write import Preparation

JOB = Path(__file__).with_name("robotics.yaml")
PENDULUM = "InvertedDoublePendulum-v5"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    lqr = [
        "expert=lqr",
        "explore=0.1",
        "max_steps=60",
        "validation_episodes=2",
        "test_episodes=4",
        "keep=success",
    ]
    walls = [
        "expert=wall",
        "episodes=6",
        "validation_episodes=2",
        "test_episodes=2",
        "max_steps=200",
    ]
    for name, source, words in (
        ("nominal", PENDULUM, [*lqr, "episodes=24"]),
        ("walls", "onetomany/WallFollowing-v0", walls),
        ("shifted", PENDULUM, [*lqr, "episodes=6", "dynamics=mass=2.5,gear=0.45,damping=3"]),
    ):
        Preparation("rollouts", source, str(folder / name), options_of("rollouts", words)).run()
    return folder


@pytest.fixture(scope="module")
def done(rollouts, run_job):
    """(the folder of the job, all that it printed), run once."""
    return run_job(JOB, ROLLOUTS=rollouts)


def test_policies_are_tried_in_each_test_world(done, rollouts):
    rows = [
        row
        for row in pq.read_table(done[0] / "results.parquet").to_pylist()
        if row["target"] == "shifted" and row["split"] == "test"
    ]
    assert all(row["status"] == "done" for row in rows)
    first = {row["trial_id"]: row for row in reversed(rows)}.values()
    assert {row["metric"] for row in first} == {"steps"} and {
        row["label_fraction"] for row in first
    } == {"0 rows", "1 rows", "2 rows"}
    shown = pq.read_table(rollouts / "shifted", filters=[("split", "=", "test")])
    message = {row["metric"]: row["value"] for row in rows}
    assert message["expert_steps"] == np.mean(shown["steps"].to_numpy()) == 60
    assert message["random_return"] == pytest.approx(np.mean(shown["random_return"].to_numpy()))
    assert {"success", "return", "action_error", "expert_success", "random_steps"} <= set(message)
    zero = [row for row in first if row["technique"] == "zero_shot"]
    assert (
        len(zero) == 1
        and zero[0]["n_train"] == zero[0]["steps"] == 0
        and zero[0]["source"] == "nominal"
    )
    budget = [row for row in first if '"technique": {"budget": 2' in row["hyper_parameters"]]
    assert len(budget) == 4 and {row["steps"] for row in budget} == {8}


def test_what_transfers_to_another_robot_is_reported(done):
    rows = [
        row
        for row in pq.read_table(done[0] / "results.parquet").to_pylist()
        if row["target"] == "other_robot" and row["split"] == "test"
    ]
    assert {row["source"] for row in rows} == {"nominal", "dynamics", "none"} and all(
        row["status"] == "done" for row in rows
    )
    assert next(row["metric"] for row in rows) == "success" and {"macro_f1", "accuracy"} <= {
        row["metric"] for row in rows
    }
    moved = [
        record
        for record in map(Path.read_text, done[0].glob("trials/**/record.json"))
        if "decoders.o24c4" in record
    ]
    assert any("encoders.o24c4 new" in record and "trunk kept" in record for record in moved), (
        "without embodiment a space has the name of its widths"
    )


def test_the_report_shows_policies_beside_expert_and_chance(done):
    for name in ("report.md", "report.html"):
        text = (done[0] / name).read_text()
        assert (
            "In the simulator" in text
            and "expert" in text
            and "random" in text
            and "zero_shot" in text
        )
    # The walls are drawn without a graphics driver
    assert (done[0] / "report.html").read_text().count("Pictures of episodes") >= 1


def test_a_bundle_tells_the_actions_of_new_episodes(done, rollouts, command, tmp_path):
    bundle = next(
        path.parent for path in sorted(done[0].glob("sources/nominal-*/bundle/manifest.json"))
    )
    table = pq.read_table(rollouts / "shifted", filters=[("split", "=", "test")]).drop_columns(
        ["actions"]
    )
    pq.write_table(table, tmp_path / "new.parquet")
    ended = command(
        "predict", bundle, tmp_path / "new.parquet", "-o", tmp_path / "out", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = pq.read_table(tmp_path / "out")
    assert found.schema.field("actions").type == pa.list_(pa.list_(pa.float32()))
    assert [len(row) for row in found["actions"].to_pylist()] == table["steps"].to_pylist()
