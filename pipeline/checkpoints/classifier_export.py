"""What an exported classifier needs beside its backbone: head, description and loading code.

Classes of timm and transformers have no layer norm before their linear layer, and our norm has no
parameters, so weights alone cannot say that it is there. The export has it in code:
``exported_classifier`` is copied beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import exported_classifier
from pipeline.checkpoints.exported_classifier import ClassifierSpec
from pipeline.core.contracts import Modality, Objective, Task
from pipeline.core.contracts.objective_capabilities import output_scale, transformers_head
from pipeline.core.nn import auto_model

LIBRARIES = ("timm", "transformers", "hf")
CODE, SPEC, HEAD = "classifier.py", "classifier.json", "head.safetensors"
"""Files of an exported folder: the code that loads it, what the head is, and the head's tensors."""


def is_exportable(task: Task) -> bool:
    """Return whether ``exported_classifier`` can build this task.

    It can for a linear head on a model of timm or transformers, which builds it from its
    configuration: not the encoder of Whisper or BART.
    """
    backbone: Any = task.backbone
    library = backbone.arch.name.partition("/")[0]
    if library == "hf" and not auto_model.is_plain(backbone.model):
        return False
    return library in LIBRARIES and linear_on(task.objective) is not None


def linear_on(objective: Objective) -> str | None:
    """Return the features that a linear head reads, or None for another head."""
    declared = transformers_head(objective)
    return declared.linear_on if declared else None


def describe(task: Task, modality: Modality) -> ClassifierSpec:
    """Return the content of ``classifier.json``."""
    backbone, objective = task.backbone, task.objective
    model: Any = backbone
    name = objective.registered_name
    library, _, architecture = backbone.arch.name.partition("/")
    spec: ClassifierSpec = {
        "library": library,
        "architecture": architecture,
        "objective": name,
        "labels": list(objective.state["labels"]),
        "width": int(head_of(task).in_features),
        "norm": has_norm(task),
        "pool": _pool(task),
        "temperature_in_weights": temperature(task),
        "arguments": {},
        "input": {},
    }
    fitted = threshold(objective)
    if fitted is not None:
        spec["threshold"], spec["threshold_of"] = fitted
    read = modality.options.model_dump(include={"fit", "crop_share", "interpolation"})
    if library == "timm":
        spec["arguments"] = dict(model.creation_arguments)
        spec["input"] = {
            **modality.inputs(),
            **read,
            "mean": modality.state["mean"],
            "std": modality.state["std"],
        }
        return spec
    spec["config"] = model.model.config.to_dict()
    if library == "hf":
        spec["library"] = "transformers"
        # AutoModel makes more of some configurations than their encoder (T5)
        spec["class"] = type(model.model).__name__
        spec["arguments"] = auto_model.pooling_arguments(
            type(model.model), spec["pool"] == "pooler"
        )
        spec["call_arguments"] = model.call_arguments
    elif architecture in ("bert", "roberta"):
        spec["arguments"]["add_pooling_layer"] = spec["pool"] == "pooler"
    inputs = modality.inputs()
    known = ("length", "rate", "scale", "size", "steps", "channels")
    spec["input"] = {key: inputs[key] for key in known if key in inputs}
    if "steps" in inputs:
        spec["input"] |= modality.options.model_dump(include={"cut", "missing"})
        spec["input"] |= modality.state
    if "mean" in modality.state and "size" in inputs:
        spec["input"] |= {**read, "mean": modality.state["mean"], "std": modality.state["std"]}
    return spec


def _pool(task: Task) -> str | None:
    """Return which feature the head reads; None where the model library pools by itself (timm)."""
    if linear_on(task.objective) == "tokens":
        return "tokens"
    if task.backbone.arch.name.startswith("timm/"):
        return None
    return getattr(task.backbone, "pool", "mean")


def head_of(task: Task) -> Any:
    """Return the linear layer of a task's head."""
    objective: Any = task.objective
    return objective.head


def has_norm(task: Task) -> bool:
    """Return whether a layer norm without parameters comes before the linear layer."""
    return bool(getattr(task.objective.options, "norm", False))


def temperature(task: Task) -> float:
    """Return what the scores are divided by: fitted on validation rows, else 1."""
    return float(task.objective.state.get("temperature", 1.0))


def threshold(objective: Any) -> tuple[float, str] | None:
    """Return the fitted threshold, and of what it is the threshold.

    None where none was fitted: then the class with the highest score is predicted.
    """
    if "threshold" not in objective.state:
        return None
    label = objective.state["labels"][1]
    return objective.state["threshold"], f"probability (softmax) from which a row is called {label}"


def add_threshold(config: dict[str, Any], objective: Any) -> str:
    """Add ``threshold`` and ``threshold_of`` to a configuration, as `threshold` returns them.

    Returns:
        A note that the library does not use it, or "" where there is none.
    """
    fitted = threshold(objective)
    if fitted is None:
        return ""
    config["threshold"], config["threshold_of"] = fitted
    return (
        f"; a row is predicted as the second class from a probability of {fitted[0]:.4g} on "
        "(threshold in config.json); the library's own pipelines ignore it"
    )


def linear_tensors(task: Task) -> dict[str, Tensor]:
    """Return the head's ``weight`` and ``bias`` as they give the final scores.

    They are divided by the temperature, or give a number in its own unit.
    """
    head, divisor = head_of(task), temperature(task)
    scale, shift = output_scale(task.objective)
    weight = head.weight.detach().double() / divisor * scale
    bias = head.bias.detach().double() / divisor * scale + shift
    return {"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}


def norm_tensors(task: Task) -> dict[str, Tensor]:
    """Return ones and zeros in the place of the parameters that the norm does not have.

    A strict load then sees that the norm is there.
    """
    width = int(head_of(task).in_features)
    return {"weight": torch.ones(width), "bias": torch.zeros(width)} if has_norm(task) else {}


def head_tensors(task: Task) -> dict[str, Tensor]:
    """Return the head under the names of ``exported_classifier.Classifier``."""
    norm = {f"norm.{part}": tensor for part, tensor in norm_tensors(task).items()}
    head = {f"head.{part}": tensor for part, tensor in linear_tensors(task).items()}
    return norm | head


def code() -> str:
    """Return the Python source that loads an exported classifier.

    It needs nothing of this package.
    """
    return Path(exported_classifier.__file__).read_text(encoding="utf-8")
