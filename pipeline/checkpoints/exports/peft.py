"""An adapter alone, as the library peft writes it.

A bundle holds merged weights. Its change from the bundle that it started from is taken apart again:
a change of rank r is the product of two matrices, which is what LoRA's adapter is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from pipeline.checkpoints import (
    bundle,
    classifier_export,
    differences,
    export_check,
    export_folder,
    hf_auto,
)
from pipeline.config.registry import register

ADAPTED = ("Linear", "Conv1d", "Conv2d", "Conv1D")
"""Classes of modules that peft's LoRA takes."""


@register("export", "peft")
def export(saved: bundle.Bundle, output: str, backbone_only: bool) -> str:
    """The adapter of a fine-tune by LoRA and its head, without the base: PeftModel.from_pretrained
    on the source's bundle, exported as hugging-face with --backbone-only.
    """
    export_folder.refuse_added_modules(saved)
    base = _base(saved)
    backbone: Any = base.backbone()
    if saved.manifest.arch.library == "hf":
        hf_auto.require_plain(saved, backbone)
    factors, others = _factors(saved, base)
    if others or not factors:
        what = f"{others[0]} and {len(others) - 1} more" if len(others) > 1 else "".join(others)
        raise bundle.BundleError(
            f"{saved.uri} is {base.uri} changed by more than an adapter of low rank "
            f"({what or 'no weight of the backbone differs'}): take --kind hugging-face"
        )
    tensors, config = _adapter(saved, backbone.model, factors)

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        head = ""
        if not backbone_only and saved.manifest.has_head:
            save_file(saved.head_tensors(), folder / classifier_export.HEAD)
            objective = bundle.without_folders("objective", saved.manifest.objective)
            labels = {"labels": objective.state.get("labels")}
            text = json.dumps({**objective.to_json(), **labels}, indent=2)
            (folder / "head.json").write_text(text, encoding="utf-8")
            head = f", the head's tensors in {classifier_export.HEAD}"
        count = sum(tensor.numel() for tensor in tensors.values())
        description = (
            f"adapter of {len(factors)} modules with {count} parameters{head}; its base: onetomany "
            f"export {base.uri} BASE --kind hugging-face --backbone-only"
        )
        return description, _compare(saved, backbone, folder)

    return export_folder.commit(saved, output, backbone_only, write)


def _base(saved: bundle.Bundle) -> bundle.Bundle:
    """Return the bundle that this one was fine-tuned from.

    Raises:
        BundleError: It started from nothing, or from a model of another library.
    """
    if saved.manifest.arch.library not in classifier_export.LIBRARIES:
        raise bundle.BundleError(
            f"{saved.uri}: peft's adapters go into a model of timm or transformers, this is "
            f"{saved.manifest.arch.name}: take --kind onnx"
        )
    place = saved.manifest.base["uri"] if saved.manifest.base else saved.manifest.parent
    if place is None or not bundle.exists(place):
        raise bundle.BundleError(
            f"{saved.uri}: the bundle that it was fine-tuned from is needed to tell its adapter "
            f"apart, and there is none at {place or 'any place that it names'}: take --kind "
            "hugging-face"
        )
    return bundle.load(place)


def _factors(
    saved: bundle.Bundle, base: bundle.Bundle
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Return the two factors of each changed weight, and what else of the backbone has changed."""
    kept = differences.reduce(saved.backbone_tensors(), base.backbone_tensors())
    names = [
        name.removesuffix(differences.LEFT) for name in kept if name.endswith(differences.LEFT)
    ]
    factors = {
        name: (kept[name + differences.LEFT], kept[name + differences.RIGHT]) for name in names
    }
    ends = (differences.LEFT, differences.RIGHT)
    return factors, [name for name in kept if not name.endswith(ends)]


def _adapter(
    saved: bundle.Bundle, model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors and the configuration of peft's adapter.

    Raises:
        BundleError: A weight is not that of a module that peft takes.
    """
    from peft import LoraConfig

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for weight, (left, right) in factors.items():
        name = weight.removeprefix("model.").removesuffix(".weight")
        module: Any = model.get_submodule(name) if weight.endswith(".weight") else None
        kind = type(module).__name__
        if kind not in ADAPTED or getattr(module, "groups", 1) != 1:
            raise bundle.BundleError(
                f"{saved.uri}: {weight} is adapted, and peft's LoRA has no adapter for it "
                f"({kind}): take --kind hugging-face"
            )
        if kind == "Conv1D":  # GPT-2's, whose weight is (input, output)
            transposed, left, right = True, right.T, left.T
        if kind.startswith("Conv") and kind != "Conv1D":
            right = right.reshape(len(right), *module.weight.shape[1:])
            left = left.reshape(*left.shape, *[1] * (module.weight.dim() - 2))
        place = f"base_model.model.{name}"
        tensors[f"{place}.lora_A.weight"] = right.contiguous()
        tensors[f"{place}.lora_B.weight"] = left.contiguous()
        ranks[name] = len(right)
    largest = max(ranks.values())
    untyped: Any = LoraConfig
    config = untyped(
        r=largest,
        lora_alpha=largest,  # the factors are the change: alpha / r is 1
        target_modules=sorted(ranks),
        rank_pattern={name: rank for name, rank in sorted(ranks.items()) if rank != largest},
        alpha_pattern={name: rank for name, rank in sorted(ranks.items()) if rank != largest},
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    described: dict[str, object] = config.to_dict()
    # peft turns the names into a set, which JSON does not have
    return tensors, {**described, "target_modules": sorted(ranks), "peft_type": "LORA"}


@torch.no_grad()
def _compare(saved: bundle.Bundle, backbone: Any, folder: Path) -> export_check.Comparison:
    """Compare the base with the adapter that peft reads from the folder with the bundle."""
    from peft import PeftModel

    batch = export_check.random_batch(saved.modality())
    assert batch is not None
    ours = saved.backbone()(batch).pooled.float()
    untyped: Any = PeftModel
    adapted = untyped.from_pretrained(backbone.model, str(folder))
    backbone.model = adapted.merge_and_unload()
    return export_check.compare_outputs(ours, backbone(batch).pooled.float(), "features")
