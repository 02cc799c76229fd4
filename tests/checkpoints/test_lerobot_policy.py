"""`export --kind lerobot` of a bundle: a folder that LeRobot opens as a policy."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_rows import OBJECTIVES
from safetensors.torch import load_file
from toys import episodes, task_of

import pipeline
from pipeline.checkpoints import bundle, exported_policy
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.specs import ModalitySpec
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.objectives.behaviour_cloning import Pilot

PYTHON = os.environ.get("ONETOMANY_LEROBOT_PYTHON")
"""An interpreter that has LeRobot, which needs Python 3.12."""
STEPS, WORLDS = 30, 3
KINDS = {
    "mlp": ("policy/mlp", {"window": 4}, {"chunk": 3}),
    "newest": ("policy/mlp", {}, {"chunk": 2, "ensemble": None}),
    "transformer": ("policy/transformer", {}, {"chunk": 2}),
}


def saved(folder: Path, task, modality) -> str:
    spec = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    bundle.save(str(folder / "b"), task, spec)
    return str(folder / "b")


def policy(folder: Path, kind: str, robots=("arm",)):
    """A bundle of a policy, its modality and its task."""
    architecture, options, objective = KINDS[kind]
    table = episodes(8, robots=robots)
    columns = {name: name for name in ("observations", "actions", "embodiment", "task")}
    read = TrajectoryOptions()
    modality = Trajectory(read, Trajectory.fit(read, table, columns, architecture))
    state = {"kind": "continuous", "columns": []}
    task = task_of(
        architecture,
        modality.inputs(),
        "behaviour_cloning",
        state,
        options=objective,
        width=16,
        **options,
    )
    return saved(folder, task.eval(), modality), modality, task


def made_up() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    rows = {"states": rng.normal(3, 4, (STEPS, WORLDS, 3)).astype(np.float32)}
    return rows | {"tasks": np.array(["reach", "unknown", "push"])}


def of_bundle(modality, task, rows) -> np.ndarray:
    """What the bundle's policy does in a rollout, (T, B, A)."""
    numbers = [
        modality.tasks.index(one) + 1 if one in modality.tasks else 0 for one in rows["tasks"]
    ]
    pilot = Pilot(
        task.backbone, task.objective, modality, np.zeros(WORLDS, dtype=int), np.array(numbers)
    )
    return np.array([pilot.act(list(state), None) for state in rows["states"]])


@pytest.mark.parametrize(
    "kind",
    ["mlp", *(pytest.param(one, marks=pytest.mark.slow) for one in ("newest", "transformer"))],
)
def test_a_policy_folder_acts_as_the_bundle_in_a_rollout(kind, tmp_path):
    """Also beyond the steps that it remembers, and after a reset."""
    uri, modality, task = policy(tmp_path, kind)
    folder = tmp_path / "out"
    said = pipeline.export(uri, str(folder), kind="lerobot")
    assert "policy of LeRobot, type onetomany" in said
    assert "largest difference of actions" in said and "3 episodes of 12 steps" in said
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "onetomany" and config["tasks"] == ["push", "reach"]
    assert config["input_features"] == {"observation.state": {"type": "STATE", "shape": [3]}}
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [2]}}
    program = load_file(folder / "model.safetensors")["program"]
    assert len(program) == config["program_bytes"]
    for name in ("lerobot_policy_onetomany/__init__.py", "pyproject.toml", "README.md"):
        assert "tmp" not in (folder / name).read_text()
    steps = exported_policy.PolicySteps(exported_policy.load_graph(program), config)
    rows = made_up()
    ours = of_bundle(modality, task, rows)
    for _ in range(2):
        steps.reset()
        theirs = [steps.act(torch.from_numpy(one), rows["tasks"]) for one in rows["states"]]
        np.testing.assert_allclose(np.stack(theirs), ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 1e-2
    steps.reset()
    chunk = steps.chunk(torch.from_numpy(rows["states"][0]), rows["tasks"])
    np.testing.assert_allclose(chunk[:, 0], ours[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"1 observations, the step before had 3: call reset\(\)"):
        steps.act(torch.zeros(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "newest", "transformer"])
def test_lerobot_itself_gives_the_actions_of_the_bundle(kind, tmp_path):
    python = PYTHON or (sys.executable if importlib.util.find_spec("lerobot") else None)
    if python is None:
        pytest.skip("LeRobot is not installed: it needs Python 3.12; ONETOMANY_LEROBOT_PYTHON")
    uri, modality, task = policy(tmp_path, kind)
    pipeline.export(uri, str(tmp_path / "out"), kind="lerobot")
    rows = made_up()
    np.savez(tmp_path / "rows.npz", **rows)
    script = str(Path(__file__).with_name("lerobot_policy_check.py"))
    places = [str(tmp_path / name) for name in ("out", "rows.npz", "result.npz")]
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, script, *places], check=True, env=environment, cwd=tmp_path)
    result = np.load(tmp_path / "result.npz")
    ours = of_bundle(modality, task, rows)
    print(f"{kind}: largest difference {np.abs(result['actions'] - ours).max():.1e}")
    np.testing.assert_allclose(result["actions"], ours, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result["again"], result["actions"])


def test_other_networks_are_refused(tmp_path):
    uri, _, _ = policy(tmp_path, "mlp", robots=("arm", "cart"))
    refusals = [(uri, {}, "is of one robot, this one is of 2 (arm, cart): take --kind torch")]
    refusals.append((uri, {"backbone_only": True}, "and this is a backbone alone"))
    refusals.append((uri, {"fps": 10}, "a network has no steps a second: leave --fps out"))
    for place, options, message in refusals:
        with pytest.raises((BundleError, ValueError)) as raised:
            pipeline.export(place, str(tmp_path / "out"), kind="lerobot", **options)
        assert message in str(raised.value)
    built = OBJECTIVES["classification"].build("classification")
    uri = saved(tmp_path / "other", built.task, built.rows.decoder.modality)
    with pytest.raises(BundleError, match="this is a network of classification"):
        pipeline.export(uri, str(tmp_path / "out"), kind="lerobot")
    assert not (tmp_path / "out").exists()
