"""What an exported classifier needs beside its backbone: the head's tensors, ``classifier.json``
and the code that loads both.

Classes of timm and transformers have no layer norm before their linear layer, and that norm has no
parameters, so weights alone cannot carry it. The export carries it as a module:
``exported_classifier`` is copied beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import exported_classifier
from pipeline.core.contracts import Modality, Task

OBJECTIVES = ("classification", "multilabel", "tagging")
"""Objectives whose head is a linear layer, with or without a layer norm before it."""
LIBRARIES = ("timm", "transformers")
CODE, SPEC, HEAD = "classifier.py", "classifier.json", "head.safetensors"
"""Files of an exported folder: the code that loads it, what the head is, and the head's tensors."""


def is_exportable(task: Task) -> bool:
    """Whether ``exported_classifier`` can build this task: a linear head on a model of timm or
    transformers.
    """
    library = task.backbone.arch.name.partition("/")[0]
    return library in LIBRARIES and task.objective.registered_name in OBJECTIVES


def describe(task: Task, modality: Modality) -> dict[str, Any]:
    """The content of ``classifier.json``: how the model is built, what the head reads, its labels
    and its input.
    """
    backbone, objective = task.backbone, task.objective
    model: Any = backbone
    name = objective.registered_name
    library, _, architecture = backbone.arch.name.partition("/")
    spec: dict[str, Any] = {
        "library": library,
        "architecture": architecture,
        "objective": name,
        "labels": list(objective.state["labels"]),
        "width": int(head_of(task).in_features),
        "norm": has_norm(task),
        "pool": _pool(task),
        "temperature_in_weights": temperature(task),
    }
    if "threshold" in objective.state:
        spec["threshold"] = objective.state["threshold"]
        spec["threshold_of"] = (
            f"probability (softmax) from which a row is called {objective.state['labels'][1]}"
        )
    if library == "timm":
        spec["arguments"] = dict(model.creation_arguments)
        read = modality.options.model_dump(include={"fit", "crop_share", "interpolation"})
        spec["input"] = {
            **modality.inputs(),
            **read,
            "mean": modality.state["mean"],
            "std": modality.state["std"],
        }
        return spec
    spec["config"] = model.model.config.to_dict()
    spec["arguments"] = (
        {"add_pooling_layer": spec["pool"] == "pooler"}
        if architecture in ("bert", "roberta")
        else {}
    )
    inputs = modality.inputs()
    spec["input"] = {key: inputs[key] for key in ("length", "rate", "scale") if key in inputs}
    return spec


def _pool(task: Task) -> str | None:
    """Which feature the head reads: none where the model library pools by itself (timm)."""
    if task.objective.registered_name == "tagging":
        return "tokens"
    if task.backbone.arch.name.startswith("timm/"):
        return None
    return getattr(task.backbone, "pool", "mean")


def head_of(task: Task) -> Any:
    """The linear layer of a task's head."""
    objective: Any = task.objective
    return objective.head


def has_norm(task: Task) -> bool:
    """Whether a layer norm without parameters stands before the linear layer."""
    return bool(getattr(task.objective.options, "norm", False))


def temperature(task: Task) -> float:
    """What the scores are divided by, fitted on validation rows; 1 where nothing was."""
    return float(task.objective.state.get("temperature", 1.0))


def linear_tensors(task: Task) -> dict[str, Tensor]:
    """``weight`` and ``bias`` of the head, divided by the temperature: they give the calibrated
    scores.
    """
    head, divisor = head_of(task), temperature(task)
    return {
        part: (getattr(head, part).detach().double() / divisor).float().contiguous()
        for part in ("weight", "bias")
    }


def norm_tensors(task: Task) -> dict[str, Tensor]:
    """Ones and noughts in the place of the parameters that the norm has not: a strict load then
    sees that it is there.
    """
    width = int(head_of(task).in_features)
    return {"weight": torch.ones(width), "bias": torch.zeros(width)} if has_norm(task) else {}


def head_tensors(task: Task) -> dict[str, Tensor]:
    """The head under the names of ``exported_classifier.Classifier``."""
    named = {"norm": norm_tensors(task), "head": linear_tensors(task)}
    return {
        f"{layer}.{part}": tensor
        for layer, parts in named.items()
        for part, tensor in parts.items()
    }


def code() -> str:
    """The Python file that loads an exported classifier; it needs nothing of this package."""
    return Path(exported_classifier.__file__).read_text(encoding="utf-8")
