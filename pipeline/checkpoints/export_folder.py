"""An exported folder: written aside, compared with its bundle, and then moved to its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.checkpoints import bundle, export_check, graph
from pipeline.io import atomic_folder, places, storage

EXPORTED = "onetomany.json"
"""File of an exported folder with its origin and the checksum of each file."""

Write = Callable[[Path], tuple[str, export_check.Comparison]]
"""Writes the files of an export into a folder. Returns what it wrote in words, and the comparison
with the bundle."""


def refuse_added_modules(saved: bundle.Bundle) -> None:
    """Raise BundleError for a network that holds the modules of a technique.

    No class of another library builds it.
    """
    technique = saved.manifest.technique
    if technique is not None:
        written = (
            ", --kind onnx or torch-export writes the whole network as a graph"
            if graph.has_outputs(saved.manifest)
            else ""
        )
        raise bundle.BundleError(
            f"{saved.uri} was fine-tuned with {technique.name}, whose modules are part of its "
            f"network, so it is no {saved.manifest.arch.name} that another library could open: "
            f"`onetomany predict` reads it, --kind bundle copies it{written}; or export another "
            "technique's"
        )


def commit(saved: bundle.Bundle, output: str, backbone_only: bool, write: Write) -> str:
    """Write a folder, with a file that says where it comes from.

    Args:
        saved: The bundle.
        output: The new folder.
        backbone_only: Whether the head is left out.
        write: Writes the other files.

    Returns:
        What was written, in words, with the largest difference.

    Raises:
        ValueError: There is an export already.
        BundleError: The export gives other numbers than the bundle.
    """
    if storage.exists(storage.join(output, EXPORTED)) or (
        storage.exists(output) and not storage.is_dir(output)
    ):
        raise ValueError(f"{output} is there already; give a new folder, or remove it first")
    metadata: dict[str, object] = {
        "kind": "export",
        "bundle": places.without_places(saved.uri),  # the folder may be published
        "sha256_of_bundle": saved.manifest.sha256,
        "backbone_only": backbone_only,
        "versions": bundle.versions(),
    }
    with storage.scratch_folder() as scratch:
        folder = Path(scratch, "folder")
        folder.mkdir()
        text, compared = write(folder)
        export_check.require(compared, saved.uri)
        metadata["largest_difference"] = compared.difference
        metadata["compared_rows"] = compared.rows
        move_into_place(folder, output, metadata)
    return f"{output}: {text}; {compared.text()}"


def move_into_place(folder: Path, output: str, metadata: Mapping[str, object]) -> None:
    """Commit the files of a local folder, with the file `EXPORTED` that holds the metadata."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    atomic_folder.commit_folder(output, files, metadata, EXPORTED)
