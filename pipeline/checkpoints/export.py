"""Export of a bundle: a verified copy, one file of tensors, or a folder of transformers or timm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)

from pipeline.checkpoints import bundle, classifier_export, export_check, hf_text
from pipeline.io import atomic_folder, storage

EXPORTED = "onetomany.json"
"""File of an exported folder with its origin and the checksum of each file."""


def export_bundle(uri: str, output: str, kind: str, backbone_only: bool) -> str:
    """Export a bundle: as a verified copy, as one .safetensors or .pt file, or as a folder.

    A folder can be opened by transformers or timm. Every export is read again and compared with the
    bundle on random rows (``export_check``) before it is moved to its place. The result has the
    largest difference.

    Raises:
        ValueError: The kind or suffix is unknown, or an export exists already.
        BundleError: The other library has no class for the bundle, a technique's modules are part
            of its network, or the export gives other numbers than the bundle.
    """
    storage.refuse_read_only(output)
    found = bundle.load(uri)
    if kind == "bundle":
        return _export_copy(found, output)
    technique = found.manifest.technique
    if technique is not None and kind in ("hugging-face", "state-dict"):
        raise bundle.BundleError(
            f"{uri} was fine-tuned with {technique['name']}, whose modules are part of its "
            f"network, so it is no {found.manifest.arch.name} that another library could open: "
            "`onetomany predict` reads it, --kind bundle copies it; or export another technique's"
        )
    if kind == "hugging-face":
        return _export_folder(found, output, backbone_only)
    if kind == "state-dict":
        return _export_state_dict(found, output, backbone_only)
    raise ValueError(f"--kind {kind}: kinds are bundle, hugging-face and state-dict")


def _export_copy(found: bundle.Bundle, output: str) -> str:
    if found.manifest.base is not None:
        return _export_whole(found, output)
    with storage.scratch_folder() as scratch:
        folder = atomic_folder.fetch_folder(found.uri, Path(scratch, "copy"))
        compared = export_check.compare_tensors(
            found, load_file(Path(folder, "weights.safetensors"))
        )
        export_check.require(compared, found.uri)
        atomic_folder.commit_folder(
            output,
            {"weights.safetensors": Path(folder, "weights.safetensors").read_bytes()},
            found.manifest.to_json(),
        )
    return (
        f"{output}: bundle of {found.manifest.arch.name}, {len(found.tensors)} tensors; "
        f"{compared.text()}"
    )


def _export_whole(found: bundle.Bundle, output: str) -> str:
    """Write a bundle that holds what differs from another one with all of its weights."""
    manifest = replace(found.manifest, base=None)
    with storage.scratch_folder() as scratch:
        path = Path(scratch, "weights.safetensors")
        save_file(found.tensors, path)
        atomic_folder.commit_folder(output, {"weights.safetensors": path}, manifest.to_json())
    compared = export_check.compare_tensors(found, bundle.load(output).tensors)
    export_check.require(compared, found.uri)
    return (
        f"{output}: bundle of {found.manifest.arch.name}, {len(found.tensors)} tensors; "
        f"{compared.text()}"
    )


def _export_folder(found: bundle.Bundle, output: str, backbone_only: bool) -> str:
    if storage.exists(storage.join(output, EXPORTED)) or (
        storage.exists(output) and not storage.is_dir(output)
    ):
        raise ValueError(f"{output} is there already; give a new folder, or remove it first")
    metadata: dict[str, Any] = {
        "kind": "export",
        "bundle": found.uri,
        "sha256_of_bundle": found.manifest.sha256,
        "backbone_only": backbone_only,
        "versions": bundle.versions(),
    }
    with storage.scratch_folder() as scratch:
        folder = Path(scratch, "folder")
        folder.mkdir()
        text = hf_text.write(found, folder, backbone_only)
        compared = export_check.require(
            export_check.compare_folder(found, folder, backbone_only), found.uri
        )
        metadata["largest_difference"], metadata["compared_rows"] = (
            compared.difference,
            compared.rows,
        )
        atomic_folder.commit_folder(
            output, {path.name: path for path in sorted(folder.iterdir())}, metadata, EXPORTED
        )
    return f"{output}: {text}; {compared.text()}"


def _export_state_dict(found: bundle.Bundle, output: str, backbone_only: bool) -> str:
    """Write one file of tensors.

    With a head there is also a file that describes it, and for a linear head on timm or
    transformers the code that loads it. The layer norm before such a head has no parameters, so the
    tensors alone would not show that it exists.
    """
    if not output.endswith((".safetensors", ".pt", ".pth")):
        raise ValueError(f"{output}: a state dict is a .safetensors, .pt or .pth file")
    name = output.rpartition("/")[2]
    stem = name.rpartition(".")[0]
    with storage.scratch_folder() as scratch:
        place = Path(scratch, name)
        beside: dict[str, str] = {}
        if backbone_only or found.manifest.objective.name == "none":
            tensors = {
                one.removeprefix("backbone.").removeprefix("model."): tensor
                for one, tensor in found.backbone_tensors().items()
            }
            if not backbone_only:
                tensors = found.tensors
            _write_tensors(place, tensors)
            compare = (
                export_check.compare_backbone if backbone_only else export_check.compare_tensors
            )
            compared = compare(found, export_check.read_state_dict(place))
        else:
            tensors, beside = _with_norm(found, stem)
            _write_tensors(place, tensors)
            for other, text in beside.items():
                Path(scratch, other).write_text(text, encoding="utf-8")
            if f"{stem}_classifier.json" in beside:
                compared = export_check.compare_classifier(found, place)
            else:
                compared = export_check.compare_tensors(found, export_check.read_state_dict(place))
        export_check.require(compared, found.uri)
        storage.write_bytes(output, place.read_bytes())
        for other, text in beside.items():
            storage.write_bytes(output.removesuffix(name) + other, text.encode())
    also = (
        f", with {' and '.join(sorted(beside))} beside it, which say how the head is built"
        if beside
        else ""
    )
    return f"{output}: {len(tensors)} tensors{also}; {compared.text()}"


def _with_norm(found: bundle.Bundle, stem: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a task, with its norm as ones and zeros, and further text files."""
    task, modality = found.task(), found.modality()
    tensors = dict(found.tensors)
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
    parts = {
        "arch": found.manifest.arch,
        "modality": found.manifest.modality,
        "objective": found.manifest.objective,
    }
    description = {name: part.to_json() for name, part in parts.items()}
    return tensors, {f"{stem}_model.json": json.dumps(description, indent=2, ensure_ascii=False)}


def _write_tensors(place: Path, tensors: dict[str, Any]) -> None:
    if place.suffix == ".safetensors":
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            place,
            metadata={"format": "pt"},
        )
    else:
        torch.save(tensors, place)
