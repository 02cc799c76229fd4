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
    program.
    """
    if saved.manifest.base is not None:
        return _export_whole(saved, output)
    with storage.scratch_folder() as scratch:
        folder = atomic_folder.fetch_folder(saved.uri, Path(scratch, "copy"))
        compared = export_check.compare_tensors(
            saved, load_file(Path(folder, "weights.safetensors"))
        )
        export_check.require(compared, saved.uri)
        atomic_folder.commit_folder(
            output,
            {"weights.safetensors": Path(folder, "weights.safetensors").read_bytes()},
            saved.manifest.to_json(),
        )
    return (
        f"{output}: bundle of {saved.manifest.arch.name}, {len(saved.tensors)} tensors; "
        f"{compared.text()}"
    )


def _export_whole(saved: bundle.Bundle, output: str) -> str:
    """Write a bundle that holds what differs from another one with all of its weights."""
    manifest = replace(saved.manifest, base=None)
    with storage.scratch_folder() as scratch:
        path = Path(scratch, "weights.safetensors")
        save_file(saved.tensors, path)
        atomic_folder.commit_folder(output, {"weights.safetensors": path}, manifest.to_json())
    compared = export_check.compare_tensors(saved, bundle.load(output).tensors)
    export_check.require(compared, saved.uri)
    return (
        f"{output}: bundle of {saved.manifest.arch.name}, {len(saved.tensors)} tensors; "
        f"{compared.text()}"
    )
