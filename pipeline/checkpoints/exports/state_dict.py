"""One file of tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from pipeline.checkpoints import bundle, classifier_export, export_check, export_folder
from pipeline.config.registry import register
from pipeline.io import storage


@register("export", "state-dict")
def export(saved: bundle.Bundle, output: str, backbone_only: bool) -> str:
    """The weights as one .safetensors, .pt or .pth file: safetensors or torch.load.

    With a head there is also a file that describes it, and for a linear head on timm or
    transformers the code that loads it. The layer norm before such a head has no parameters, so the
    tensors alone would not show that it exists.
    """
    export_folder.refuse_added_modules(saved)
    if not output.endswith((".safetensors", ".pt", ".pth")):
        raise ValueError(f"{output}: a state dict is a .safetensors, .pt or .pth file")
    name = output.rpartition("/")[2]
    stem = name.rpartition(".")[0]
    with_head = saved.manifest.has_head and not backbone_only
    beside: dict[str, str] = {}
    if with_head:
        tensors, beside = _with_norm(saved, stem)
    elif backbone_only:
        tensors = {
            one.removeprefix("model."): tensor for one, tensor in saved.backbone_tensors().items()
        }
    else:
        tensors = saved.tensors
    places_beside = {output.removesuffix(name) + other: text for other, text in beside.items()}
    for taken in filter(storage.exists, (output, *places_beside)):
        raise ValueError(f"{taken} is there already; give another name, or remove it first")
    with storage.scratch_folder() as scratch:
        place = Path(scratch, name)
        _write_tensors(place, tensors)
        for other, text in beside.items():
            Path(scratch, other).write_text(text, encoding="utf-8")
        if f"{stem}_classifier.json" in beside:
            compared = export_check.compare_classifier(saved, place)
        elif backbone_only:
            compared = export_check.compare_backbone(saved, export_check.read_state_dict(place))
        else:
            compared = export_check.compare_tensors(saved, export_check.read_state_dict(place))
        export_check.require(compared, saved.uri)
        storage.write_bytes(output, place.read_bytes())
        for other, text in places_beside.items():
            storage.write_bytes(other, text.encode())
    also = (
        f", with {' and '.join(sorted(beside))} beside it, which say how the head is built"
        if beside
        else ""
    )
    return f"{output}: {len(tensors)} tensors{also}; {compared.text()}"


def _with_norm(saved: bundle.Bundle, stem: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a task, with its norm as ones and zeros, and further text files."""
    task, modality = saved.task(), saved.modality()
    tensors = dict(saved.tensors)
    head = getattr(task.objective, "head", None)
    if classifier_export.has_norm(task) and isinstance(head, torch.nn.Linear):
        tensors |= {
            f"objective.norm.{part}": tensor
            for part, tensor in classifier_export.norm_tensors(task).items()
        }
    if classifier_export.is_exportable(task):
        tensors |= {
            f"objective.head.{part}": tensor
            for part, tensor in classifier_export.linear_tensors(task).items()
        }
        spec = classifier_export.describe(task, modality)
        return tensors, {
            f"{stem}_classifier.json": json.dumps(spec, indent=2, ensure_ascii=False),
            f"{stem}_classifier.py": classifier_export.code(),
        }
    manifest = saved.manifest
    description = {  # it leaves the machine, so it names files without their folders
        "arch": manifest.arch.to_json(),
        "modality": bundle.without_folders("modality", manifest.modality).to_json(),
        "objective": bundle.without_folders("objective", manifest.objective).to_json(),
    }
    return tensors, {f"{stem}_model.json": json.dumps(description, indent=2, ensure_ascii=False)}


def _write_tensors(place: Path, tensors: dict[str, Tensor]) -> None:
    if place.suffix == ".safetensors":
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            place,
            metadata={"format": "pt"},
        )
    else:
        torch.save(tensors, place)
