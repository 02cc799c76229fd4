"""A folder of sentence-transformers: texts to vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import export_check, export_folder, hf_auto, hf_text
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.config.registry import register
from pipeline.core.contracts.backbone_capabilities import model_inputs
from pipeline.core.nn import auto_model

POOLING = {
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
"""The library's name of each way to pool tokens."""


@register("export", "sentence-transformers")
def export(saved: Bundle, output: str, backbone_only: bool) -> str:
    """The backbone of texts with its pooling, no head: SentenceTransformer(FOLDER).encode gives the
    vectors of `onetomany embed`.
    """
    export_folder.refuse_added_modules(saved)
    library, _, family = saved.manifest.arch.name.partition("/")
    if library not in ("transformers", "hf") or saved.manifest.modality.name != "text":
        raise BundleError(
            f"{saved.uri}: sentence-transformers reads texts with a model of transformers; this is "
            f"{saved.manifest.arch.name}: take --kind onnx"
        )
    backbone: Any = saved.backbone()
    if library == "hf" and not auto_model.is_auto(backbone.model):
        raise BundleError(
            f"{saved.uri}: sentence-transformers opens folders with transformers' AutoModel, which "
            f"has no such class for {family} alone: take --kind hugging-face or onnx"
        )
    if backbone.pool not in POOLING:
        raise BundleError(
            f"{saved.uri}: pool: {backbone.pool} is not one of sentence-transformers' ways to pool "
            f"({', '.join(POOLING)}): take --kind hugging-face or onnx"
        )

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        writer = hf_auto if library == "hf" else hf_text
        writer.write(saved, folder, backbone_only=True)
        length = saved.modality().inputs()["length"]
        parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
        modules = [
            {
                "idx": place,
                "name": str(place),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for place, (path, kind) in enumerate(parts)
        ]
        pooling = {
            "word_embedding_dimension": backbone.pooled_dim,
            **{name: pool == backbone.pool for pool, name in POOLING.items()},
        }
        (folder / "1_Pooling").mkdir()
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        _write_json(folder / "modules.json", modules)
        own = {"max_seq_length": length, "do_lower_case": False}  # its tokenizer does that
        _write_json(folder / "sentence_bert_config.json", own)
        text = f"{family} with {backbone.pool} pooling to {backbone.pooled_dim} numbers"
        return text, _compare(saved, backbone, folder)

    return export_folder.commit(saved, output, True, write)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


@torch.no_grad()
def _compare(saved: Bundle, backbone: Any, folder: Path) -> export_check.Comparison:
    """Compare the folder's model and pooling with the bundle's features.

    The library itself may not be installed: its pooling is done here, by what the folder says.
    """
    import transformers

    batch = export_check.random_batch(saved.modality())
    assert batch is not None
    untyped: Any = transformers.AutoModel
    with hf_auto.quiet():  # a pooler that is missing here is not read
        model = untyped.from_pretrained(folder).eval()
    arguments = model_inputs(backbone, batch) or export_check.transformers_inputs(
        model.config, batch
    )
    hidden = model(**arguments).last_hidden_state
    config = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    pooled = _pooled(hidden, batch["mask"], config)
    return export_check.compare_outputs(backbone(batch).pooled.float(), pooled, "features")


def _pooled(hidden: Tensor, mask: Tensor, config: dict[str, Any]) -> Tensor:
    """Return (B, D) of states (B, N, D), as the configuration of the library says."""
    if config["pooling_mode_cls_token"]:
        return hidden[:, 0]
    if config["pooling_mode_lasttoken"]:
        return hidden[torch.arange(hidden.shape[0]), mask.sum(1) - 1]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)
