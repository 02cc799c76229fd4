"""Export of a bundle, by one of the kinds in ``pipeline/checkpoints/exports/``."""

from __future__ import annotations

from pipeline.checkpoints import bundle, graph
from pipeline.checkpoints.exports import hugging_face
from pipeline.config import registry
from pipeline.io import storage


def export_bundle(uri: str, output: str, kind: str, backbone_only: bool) -> str:
    """Export a bundle.

    Every export is read again and compared with the bundle on random rows before it is moved to its
    place. The result has the largest difference.

    Args:
        uri: Place of the bundle.
        output: Folder, or file for a state dict.
        kind: A registered kind of export.
        backbone_only: Whether the head is left out.

    Raises:
        ValueError: The kind or a file's suffix is unknown, or an export exists already.
        BundleError: The bundle cannot be written so, or the export gives other numbers.
    """
    if kind not in registry.entries("export"):
        kinds = registry.nearest(kind, registry.names("export"))
        raise ValueError(f"--kind {kind}: {kinds}")
    storage.refuse_read_only(output)
    return registry.get("export", kind)(bundle.load(uri), output, backbone_only)


def usual_kind(uri: str) -> str:
    """Return the kind of export to offer for a bundle: one that surely works for it.

    A folder that transformers or timm opens, else a copy of the bundle.
    """
    manifest = _manifest(uri)
    return "hugging-face" if manifest and hugging_face.is_known(manifest) else "bundle"


def can_be_graph(uri: str) -> bool:
    """Return whether the head of a bundle has outputs for ``--kind onnx``, which may still fail."""
    manifest = _manifest(uri)
    return manifest is not None and graph.has_outputs(manifest)


def _manifest(uri: str) -> bundle.Manifest | None:
    """Return the manifest of a bundle; None where it is gone or damaged: the command says so."""
    try:
        return bundle.read_manifest(uri)
    except (bundle.BundleError, storage.StorageError):
        return None
