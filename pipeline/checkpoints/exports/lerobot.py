"""A policy folder of LeRobot (github.com/huggingface/lerobot), with the plugin that opens it.

None of LeRobot 0.6's own policy classes is exactly one of these networks: ``act``,
``gaussian_actor`` and ``tdmpc`` have a LayerNorm in every layer, ``vqbet`` takes actions from a
codebook, ``diffusion`` and the vision-language models denoise actions or write them as tokens. So
the folder has a type of its own, whose network is the graph of ``--kind torch-export``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from pipeline.checkpoints import export_check, export_folder, exported_policy, graph
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.checkpoints.exported_policy import PolicySpec, PolicySteps
from pipeline.config.registry import register
from pipeline.core.nn.action_heads import temporal_ensemble

OBJECTIVE = "behaviour_cloning"
TYPE, PACKAGE = "onetomany", "lerobot_policy_onetomany"
"""Name of the policy type, and of the plugin: LeRobot imports packages whose names begin so."""
TRIED = "0.6.1"
"""The version of LeRobot that opened such folders."""
STATE, ACTION = "observation.state", "action"
WORLDS, STEPS = 3, 12
"""Made-up episodes of the comparison: how many, and their steps."""

PYPROJECT = f"""[project]
name = "{PACKAGE}"
version = "1.0"
description = "Opens policies of One to Many in LeRobot"

[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
packages = ["{PACKAGE}"]
"""

README = f"""# {{name}}, a policy for LeRobot

Written by One to Many, and opened by LeRobot {TRIED}. The policy type `{TYPE}` is in the package
`{PACKAGE}` of this folder. One installed copy opens all such folders:

    pip install ./{{folder}}

LeRobot's commands then take `--policy.path=./{{folder}}`. In Python:

```python
import {PACKAGE}
from lerobot.policies.factory import make_pre_post_processors

policy = {PACKAGE}.OneToManyPolicy.from_pretrained("./{{folder}}")
before, after = make_pre_post_processors(policy.config, "./{{folder}}")
policy.reset()  # where an episode begins
action = after(policy.select_action(before({{observation}})))
```

- `{STATE}`: {{numbers}} numbers in the robot's own units. `{ACTION}`: {{actions}} numbers.
{{more}}- Each call of `select_action` is one step. It remembers the last {{reach}} steps and the
  actions it gave, until `reset`. It does not know the bounds of the robot's actions.
- The network is a program of torch.export, the tensor `program` of `model.safetensors`. It runs
  on the CPU, and cannot be trained further.
"""


@register("export", "lerobot")
def export(saved: Bundle, output: str, backbone_only: bool) -> str:
    """A policy of one robot that LeRobot opens, in a folder with the plugin that it needs:
    ``pip install OUTPUT``.
    """
    name, space = _space(saved, backbone_only)
    traced = graph.trace(saved, False)

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        program = _bytes(traced.program, folder / "program.pt2")
        spec = _spec(saved, space, list(traced.samples[0][0]))
        save_file({"program": program}, folder / "model.safetensors")
        _write_json(folder / "config.json", _config(spec, len(program)))
        for when, steps in _processors().items():
            place = folder / f"policy_{when}.json"
            _write_json(place, {"name": place.stem, "steps": steps})
        package = folder / PACKAGE
        package.mkdir()
        sources = Path(exported_policy.__file__).parent
        for file, source in (("__init__", "exported_lerobot"), ("exported_policy",) * 2):
            text = (sources / f"{source}.py").read_text(encoding="utf-8")
            (package / f"{file}.py").write_text(text, encoding="utf-8")
        (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
        text = _readme(saved, spec, Path(output).name)
        (folder / "README.md").write_text(text, encoding="utf-8")
        steps = PolicySteps(exported_policy.load_graph(program), spec)
        return f"policy of LeRobot, type {TYPE}", _compare(saved, name, steps)

    return export_folder.commit(saved, output, backbone_only, write)


def _space(saved: Bundle, backbone_only: bool) -> tuple[str, Any]:
    """Return the one space of a policy, with its name. Raises BundleError for other networks."""
    name = saved.manifest.objective.name
    if backbone_only or name != OBJECTIVE:
        what = "a backbone alone" if backbone_only else f"a network of {name}"
        raise BundleError(
            f"{saved.uri}: --kind lerobot writes policies of {OBJECTIVE}, and this is {what}: "
            "take --kind torch-export or onnx"
        )
    spaces = saved.manifest.modality.state["spaces"]
    if len(spaces) > 1:
        raise BundleError(
            f"{saved.uri}: a policy of LeRobot is of one robot, this one is of {len(spaces)} "
            f"({', '.join(spaces)}): take --kind torch-export or onnx"
        )
    [(name, space)] = spaces.items()
    if saved.manifest.modality.options.get("images"):
        raise BundleError(
            f"{saved.uri}: it reads camera frames, which a graph cannot take yet: --kind bundle "
            "copies it"
        )
    if space["discrete"]:
        raise BundleError(
            f"{saved.uri}: actions are names of classes; those of LeRobot are numbers: take "
            "--kind torch-export or onnx"
        )
    return name, space


def _bytes(program: Any, file: Path) -> Tensor:
    """Return the bytes (N,) uint8 of a program, for which a file is written and removed."""
    torch.export.save(program, file)
    content = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    file.unlink()
    return torch.as_tensor(content.copy())


def _spec(saved: Bundle, space: Any, inputs: list[str]) -> PolicySpec:
    manifest = saved.manifest
    options = manifest.arch.options
    of_objective = saved.task().objective.options
    is_transformer = manifest.arch.name.endswith("/transformer")
    return {
        "inputs": inputs,
        "reach": options["context" if is_transformer else "window"],
        "ensemble": of_objective.ensemble,
        "chunk": of_objective.chunk,
        "tasks": manifest.modality.state["tasks"],
        "observation_mean": space["observation_mean"],
        "observation_std": space["observation_std"],
        "action_mean": space["action_mean"],
        "action_std": space["action_std"],
    }


def _config(spec: PolicySpec, program_bytes: int) -> dict[str, Any]:
    """Return config.json: LeRobot's own fields, and those of the plugin."""
    return {
        "type": TYPE,
        "n_obs_steps": 1,  # older ones are remembered
        "input_features": {STATE: {"type": "STATE", "shape": [len(spec["observation_mean"])]}},
        "output_features": {ACTION: {"type": "ACTION", "shape": [len(spec["action_mean"])]}},
        "device": "cpu",
        "program_bytes": program_bytes,
        **spec,
    }


def _processors() -> dict[str, list[dict[str, Any]]]:
    """Return the steps that LeRobot runs before and after a policy; they change no numbers."""

    def step(name: str, **config: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": config}

    on_cpu = step("device_processor", device="cpu", float_dtype=None)
    rename = step("rename_observations_processor", rename_map={})
    return {
        "preprocessor": [rename, step("to_batch_processor"), on_cpu],
        "postprocessor": [on_cpu],
    }


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(saved: Bundle, spec: PolicySpec, folder: str) -> str:
    observation, more = f'"{STATE}": state', ""
    if spec["tasks"]:
        observation += ', "task": name'
        more += f"- `task`: one of {', '.join(spec['tasks'])}; any other counts as none.\n"
    return README.format(
        name=saved.manifest.arch.name,
        folder=folder,
        observation="{" + observation + "}",
        numbers=len(spec["observation_mean"]),
        actions=len(spec["action_mean"]),
        more=more,
        reach=spec["reach"],
    )


@torch.no_grad()
def _compare(saved: Bundle, name: str, steps: PolicySteps) -> export_check.Comparison:
    """Compare the actions, chosen step by step, with the bundle's on the whole episodes.

    They are compared as they are standardised, so that each number of an action counts alike.
    """
    spec, modality, task = steps.spec, saved.modality(), saved.task().eval()
    objective: Any = task.objective
    rng = np.random.default_rng(export_check.SEED)
    mean, std = np.array(spec["observation_mean"]), np.array(spec["observation_std"])
    noise = rng.standard_normal((STEPS, WORLDS, len(mean)))
    states = (mean + noise * std).astype(np.float32)
    tasks = [*spec["tasks"], *[""] * WORLDS][:WORLDS]
    acted = [steps.act(torch.as_tensor(state), tasks) for state in states]
    exported = (torch.stack(acted, 1) - steps.action_mean) / steps.action_std
    observe: Any = getattr(modality, "observe")  # noqa: B009
    inputs: dict[str, Tensor] = {
        "observations": torch.as_tensor(np.stack([observe(name, one) for one in states], 1)),
        "executed": exported,
        "mask": torch.ones(WORLDS, STEPS, dtype=torch.bool),
        "task": torch.tensor([spec["tasks"].index(one) + 1 if one else 0 for one in tasks]),
        "space": torch.zeros(WORLDS, dtype=torch.int64),
    }
    told = objective.raw_outputs(task.backbone, graph.as_batch(inputs))["actions"].numpy()
    ours: list[np.ndarray] = []
    for step in range(STEPS):
        plans = [told[:, at] for at in range(max(0, step + 1 - spec["chunk"]), step + 1)]
        ours.append(temporal_ensemble(plans, spec["ensemble"]))
    what = f"actions, in their deviations, in {WORLDS} episodes of {STEPS} steps,"
    compared = export_check.compare_outputs(torch.as_tensor(np.stack(ours, 1)), exported, what)
    return export_check.require(compared, saved.uri)
