"""A verified copy of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)

from pipeline.checkpoints import bundle, export_check
from pipeline.config.registry import register
from pipeline.io import atomic_folder, storage


@register("export", "bundle")
def export(saved: bundle.Bundle, output: str, backbone_only: bool) -> str:
    """A verified copy of the folder, whole where it held what differs from another one: this
    program. It keeps the places of its parent and of large language models: ``push`` removes them.
    """
    manifest = replace(saved.manifest, base=None)
    with storage.scratch_folder() as scratch:
        path = Path(scratch, "weights.safetensors")
        save_file(saved.tensors, path)
        compared = export_check.compare_tensors(saved, load_file(path))
        export_check.require(compared, saved.uri)
        atomic_folder.commit_folder(output, {"weights.safetensors": path}, manifest.to_json())
    return (
        f"{output}: bundle of {saved.manifest.arch.name}, {len(saved.tensors)} tensors; "
        f"{compared.text()}"
    )
