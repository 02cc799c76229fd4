"""Compare an export with its bundle by running both on the same random rows.

The bundle's own modality makes the rows up (`MakesRandomRows`). The exported side is read from the
written files, by the classes that its user would take.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.checkpoints import classifier_export, exported_classifier
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.core.capabilities import MakesRandomRows
from pipeline.core.contracts import Backbone, Batch, Modality, Task
from pipeline.core.contracts.backbone_capabilities import model_inputs
from pipeline.core.contracts.objective_capabilities import exports_head, output_scale
from pipeline.core.nn import auto_model

ROWS, SEED = 4, 0
TOLERANCE = 1e-4
"""Largest difference that an export may have, relative to the bundle's largest absolute value.

That value counts as 1 at least. Float32 arithmetic in another order gives about 1e-6.
"""

PLAIN = (1.0, 0.0)
"""The scale of outputs that have no unit of their own."""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing an export with its bundle.

    Attributes:
        difference: Largest absolute difference.
        largest: The bundle's largest absolute value.
        rows: Number of rows; 0 where tensors were compared.
        what: What was compared, in words.
        unit: What both numbers are counted in; "" for plain numbers.
    """

    difference: float
    largest: float
    rows: int
    what: str
    unit: str = ""

    def text(self) -> str:
        """Return the comparison as one line."""
        if not self.rows:
            return f"compared with the bundle: {self.what}"
        return (
            f"compared with the bundle on {self.rows} random rows: largest difference of "
            f"{self.what} {self.difference:.1e}{self.unit} (values up to {self.largest:.2g})"
        )


def require(comparison: Comparison, uri: str) -> Comparison:
    """Return the comparison if the difference is within `TOLERANCE`.

    Raises:
        BundleError: The difference is larger or no number.
    """
    allowed = TOLERANCE * max(1.0, comparison.largest)
    if not comparison.difference <= allowed:  # NaN too
        remedy = "Take --kind bundle, and report this"
        if comparison.unit:
            remedy = (
                "Where the label's mean is large beside its deviation, float32 cannot hold it: "
                "take --kind bundle, onnx or torch-export, or train on the difference to the mean; "
                "else report this"
            )
        raise BundleError(
            f"{uri}: the export gives other numbers than the bundle: {comparison.what} differ by "
            f"up to {comparison.difference:.3g}{comparison.unit} on {comparison.rows} random rows, "
            f"at most {allowed:.2g} is allowed; nothing was written. {remedy}"
        )
    return comparison


# ---------------------------------------------------------------- rows


def random_batch(
    modality: Modality, rows: int = ROWS, seed: int = SEED, length: float = 1.0
) -> Batch | None:
    """Return finished rows as a backbone reads them, the same for the same seed.

    ``length`` is a share of the usual one. None for a modality whose rows cannot be made up.
    """
    if not isinstance(modality, MakesRandomRows):
        return None
    arrays = modality.random_rows(rows, np.random.default_rng(seed), length)
    return modality.finish(Batch(np.arange(rows), torch.arange(rows), arrays))


# ---------------------------------------------------------------- what is compared


def compare_outputs(
    ours: Tensor,
    exported: Tensor,
    what: str,
    mask: Tensor | None = None,
    scale: tuple[float, float] = PLAIN,
) -> Comparison:
    """Return the comparison of two tensors, where ``mask`` is true.

    Args:
        ours: What the bundle gives.
        exported: What the export gives.
        what: What both are, in words.
        mask: Which positions count, where there are positions.
        scale: Deviation and mean of the label, in whose unit both are (`output_scale`). Deviations
            are compared then: the mean would hide any error where it is large, and a small
            deviation too.

    Raises:
        BundleError: Their shapes differ.
    """
    if ours.shape != exported.shape:
        raise BundleError(
            f"the export gives {what} of shape {tuple(exported.shape)}, the bundle "
            f"{tuple(ours.shape)}"
        )
    rows = len(ours)
    if mask is not None and ours.dim() == 3:
        ours, exported = ours[mask], exported[mask]
    deviation, mean = scale
    both = (ours.detach(), exported.detach())
    ours, exported = ((values.double() - mean) / deviation for values in both)
    unit = "" if scale == PLAIN else " standard deviations of the label"
    return Comparison(
        float((ours - exported).abs().max()), float(ours.abs().max()), rows, what, unit
    )


def in_order_of(ours: dict[str, Tensor], exported: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the exported detections of each image in the order of the bundle's nearest ones.

    They come by score, so rounding swaps detections that are as sure. Other outputs stay.
    """
    names = ("boxes", "scores", "classes")
    if any(name not in ours or ours[name].shape != exported[name].shape for name in names):
        return exported
    mine, theirs = (
        torch.cat([one["boxes"], one["scores"][..., None], one["classes"][..., None]], 2)
        for one in (ours, exported)
    )
    library: Any = optimize
    apart = torch.cdist(mine, theirs, p=torch.inf).detach().numpy()
    orders = [torch.as_tensor(library.linear_sum_assignment(of_image)[1]) for of_image in apart]
    return {
        name: torch.stack([of[order] for of, order in zip(tensor, orders, strict=True)])
        for name, tensor in exported.items()
    }


def _features(backbone: Backbone, batch: Batch) -> Tensor:
    """Return a backbone's pooled features."""
    return backbone(batch).pooled.float()


@torch.no_grad()
def logits(task: Task, batch: Batch) -> Tensor | None:
    """Return what transformers calls logits; None where the states are compared (`ExportsHead`)."""
    objective = task.objective
    return objective.logits(task.backbone, batch) if exports_head(objective) else None


@torch.no_grad()
def compare_tensors(saved: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """Compare tensors under the bundle's own names.

    They must be equal bit for bit, and a backbone that holds them must give the same features.

    Raises:
        BundleError: A tensor is missing or differs.
    """
    wrong = [
        name
        for name, tensor in saved.tensors.items()
        if name not in tensors or not torch.equal(tensor, tensors[name])
    ]
    if wrong:
        raise BundleError(
            f"{saved.uri}: {len(wrong)} tensors of the export differ from the bundle's (first: "
            f"{wrong[0]}); nothing was written"
        )
    modality = saved.modality()
    batch = random_batch(modality)
    same = f"all {len(saved.tensors)} tensors are the same bit for bit"
    if batch is None:
        return Comparison(0.0, 0.0, 0, same)
    twin = Bundle(saved.uri, saved.manifest, tensors)
    ours, exported = (_features(candidate.backbone(), batch) for candidate in (saved, twin))
    return compare_outputs(ours, exported, "features")


@torch.no_grad()
def compare_backbone(saved: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """Compare a plain state dict under the model library's names, loaded into its model."""
    ours = {f"backbone.{name}": tensor for name, tensor in saved.backbone_tensors().items()}
    exported = {
        name: tensors[plain]
        for name in ours
        if (plain := name.removeprefix("backbone.").removeprefix("model.")) in tensors
    }
    return compare_tensors(Bundle(saved.uri, saved.manifest, ours), exported)


@torch.no_grad()
def compare_classifier(saved: Bundle, place: Path) -> Comparison:
    """Compare an exported folder or state dict that ``exported_classifier.load`` opens."""
    task, model = saved.task(), exported_classifier.load(place)
    batch = random_batch(saved.modality())
    assert batch is not None
    ours = logits(task, batch)
    assert ours is not None
    config: Any = model.model.config if "image" not in batch.data else None
    inputs: Any = model_inputs(task.backbone, batch)
    if inputs is None:
        inputs = batch["image"] if config is None else transformers_inputs(config, batch)
    else:  # what a user gives it; further arguments are the export's own
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    scale = output_scale(task.objective)
    return compare_outputs(ours, model(inputs), "scores", batch.data.get("mask"), scale)


def transformers_inputs(config: Any, batch: Batch) -> dict[str, Tensor]:
    """Return a batch under the names that models of transformers have for it."""
    if "wave" in batch.data:
        arguments = {"input_values": batch["wave"]}
        # models of the other kind were trained without a mask
        if getattr(config, "feat_extract_norm", "layer") == "layer":
            arguments["attention_mask"] = batch["mask"].long()
        return arguments
    mask = batch["mask"]
    arguments = {
        "input_ids": batch["tokens"].masked_fill(~mask, config.pad_token_id or 0),
        "attention_mask": mask.long(),
    }
    if getattr(config, "type_vocab_size", 1) > 1:
        arguments["token_type_ids"] = batch["types"]
    return arguments


@torch.no_grad()
def compare_folder(saved: Bundle, folder: Path, backbone_only: bool) -> Comparison:
    """Compare a folder as `hf_text.write` leaves it, opened by timm or transformers."""
    if (folder / classifier_export.CODE).exists():
        return compare_classifier(saved, folder)
    batch = random_batch(saved.modality())
    assert batch is not None
    has_head = saved.manifest.has_head and not backbone_only
    task = saved.task() if has_head else None
    if saved.manifest.arch.name.startswith("timm/"):
        return _compare_timm(saved, task, folder, batch)
    return _compare_transformers(saved, task, folder, batch)


def _compare_timm(saved: Bundle, task: Task | None, folder: Path, batch: Batch) -> Comparison:
    """Compare a folder that timm opens: scores, or features where there is no task."""
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if task is None:
        exported = model.forward_head(model.forward_features(batch["image"]), pre_logits=True)
        return compare_outputs(_features(saved.backbone(), batch), exported, "features")
    ours = logits(task, batch)
    assert ours is not None
    scale = output_scale(task.objective)
    return compare_outputs(ours, model(batch["image"]), "scores", scale=scale)


def _compare_transformers(
    saved: Bundle, task: Task | None, folder: Path, batch: Batch
) -> Comparison:
    """Compare a folder that transformers opens: scores, or states or features without them."""
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    own_inputs = model_inputs(saved.backbone(), batch)
    inputs = transformers_inputs(model.config, batch) if own_inputs is None else own_inputs
    ours = logits(task, batch) if task is not None else None
    if ours is None:
        backbone = task.backbone if task is not None else saved.backbone()
        features = backbone(batch, want=("tokens",))
        output = (model.base_model if own_inputs is None else model)(**inputs)
        if features.tokens is None:
            pooled = output.get("pooler_output")
            if pooled is None:
                pooled = output.last_hidden_state.mean((2, 3))
            return compare_outputs(features.pooled, pooled.flatten(1), "features")
        states = auto_model.hidden_states(model, output)
        return compare_outputs(features.tokens, states, "states", features.mask)
    output = model(**inputs)
    if "start_logits" in output:
        exported = torch.stack([output.start_logits, output.end_logits], -1)
    else:
        exported = output.logits
    mask = batch.data["mask"] if "tokens" in batch.data else None
    assert task is not None
    return compare_outputs(ours, exported, "scores", mask, output_scale(task.objective))


def read_state_dict(place: Path) -> dict[str, Tensor]:
    """Read a state dict that was written."""
    if place.suffix == ".safetensors":
        return load_file(place)
    return torch.load(place, map_location="cpu", weights_only=True)
