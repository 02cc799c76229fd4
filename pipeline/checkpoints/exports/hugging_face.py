"""A folder of transformers or timm."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints import export_check, export_folder, hf_auto, hf_text
from pipeline.checkpoints.bundle import Bundle, Manifest
from pipeline.config import registry
from pipeline.config.registry import register
from pipeline.core.contracts.objective_capabilities import transformers_head
from pipeline.core.nn import auto_model


def is_known(manifest: Manifest) -> bool:
    """Return whether `export` surely holds a bundle: an image classifier, or a linear head of texts
    in a family that transformers has, or on a model of library hf without a decoder.

    It may hold others.
    """
    library, _, family = manifest.arch.name.partition("/")
    objective = manifest.objective.name
    if manifest.technique is not None or objective == "none":
        return False
    head = transformers_head(registry.get("objective", objective))
    if head is None or head.linear_on is None:
        return False
    if library == "timm":
        return head.linear_on == "pooled"
    if library == "hf":
        return manifest.modality.options.get("fit") != "pad" and not auto_model.has_decoder(family)
    is_text = library == "transformers" and manifest.modality.name == "text"
    return is_text and family in hf_text.FAMILIES


@register("export", "hugging-face")
def export(saved: Bundle, output: str, backbone_only: bool) -> str:
    """A folder with label names and tokenizer: transformers' Auto classes, or timm.create_model
    ("local-dir:FOLDER", pretrained=True).
    """
    export_folder.refuse_added_modules(saved)

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        writer = hf_auto if saved.manifest.arch.library == "hf" else hf_text
        text = writer.write(saved, folder, backbone_only)
        if not backbone_only and saved.manifest.objective.options.get("beam"):
            text += "; beam search and its language model are not part of it"
        return text, export_check.compare_folder(saved, folder, backbone_only)

    return export_folder.commit(saved, output, backbone_only, write)
