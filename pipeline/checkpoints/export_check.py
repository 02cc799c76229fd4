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


def require(found: Comparison, uri: str) -> Comparison:
    """Return the comparison if the difference is within `TOLERANCE`.

    Raises:
        BundleError: The difference is larger or no number.
    """
    allowed = TOLERANCE * max(1.0, found.largest)
    if not found.difference <= allowed:  # NaN too
        remedy = "Take --kind bundle, and report this"
        if found.unit:
            remedy = (
                "Where the label's mean is large beside its deviation, float32 cannot hold it: "
                "take --kind bundle, onnx or torch-export, or train on the difference to the mean; "
                "else report this"
            )
        raise BundleError(
            f"{uri}: the export gives other numbers than the bundle: {found.what} differ by up to "
            f"{found.difference:.3g}{found.unit} on {found.rows} random rows, at most "
            f"{allowed:.2g} is allowed; nothing was written. {remedy}"
        )
    return found


# ---------------------------------------------------------------- rows


def random_batch(
    modality: Modality, rows: int = ROWS, seed: int = SEED, length: float = 1.0
) -> Batch | None:
    """Return finished rows as a backbone reads them, the same for the same seed.

    ``length`` is a share of the usual one. None for a modality whose rows cannot be made up.
    """
    if not isinstance(modality, MakesRandomRows):
        return None
    made = modality.random_rows(rows, np.random.default_rng(seed), length)
    return modality.finish(Batch(np.arange(rows), torch.arange(rows), made))


# ---------------------------------------------------------------- what is compared


def compare_outputs(
    ours: Tensor,
    theirs: Tensor,
    what: str,
    mask: Tensor | None = None,
    scale: tuple[float, float] = PLAIN,
) -> Comparison:
    """Return the comparison of two tensors, where ``mask`` is true.

    Args:
        ours: What the bundle gives.
        theirs: What the export gives.
        what: What both are, in words.
        mask: Which positions count, where there are positions.
        scale: Deviation and mean of the label, in whose unit both are (`output_scale`). Deviations
            are compared then: the mean would hide any error where it is large, and a small
            deviation too.

    Raises:
        BundleError: Their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise BundleError(
            f"the export gives {what} of shape {tuple(theirs.shape)}, the bundle "
            f"{tuple(ours.shape)}"
        )
    rows = len(ours)
    if mask is not None and ours.dim() == 3:
        ours, theirs = ours[mask], theirs[mask]
    deviation, mean = scale
    ours, theirs = ((one.double() - mean) / deviation for one in (ours, theirs))
    unit = "" if scale == PLAIN else " standard deviations of the label"
    return Comparison(float((ours - theirs).abs().max()), float(ours.abs().max()), rows, what, unit)


def _features(backbone: Backbone, batch: Batch) -> Tensor:
    """Return a backbone's pooled features."""
    return backbone(batch).pooled.float()


@torch.no_grad()
def logits(task: Task, batch: Batch) -> Tensor | None:
    """Return what transformers calls logits; None where the states are compared (`ExportsHead`)."""
    objective = task.objective
    return objective.logits(task.backbone, batch) if exports_head(objective) else None


@torch.no_grad()
def compare_tensors(found: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """Compare tensors under the bundle's own names.

    They must be equal bit for bit, and a backbone that holds them must give the same features.

    Raises:
        BundleError: A tensor is missing or differs.
    """
    wrong = [
        name
        for name, tensor in found.tensors.items()
        if name not in tensors or not torch.equal(tensor, tensors[name])
    ]
    if wrong:
        raise BundleError(
            f"{found.uri}: {len(wrong)} tensors of the export differ from the bundle's (first: "
            f"{wrong[0]}); nothing was written"
        )
    modality = found.modality()
    batch = random_batch(modality)
    same = f"all {len(found.tensors)} tensors are the same bit for bit"
    if batch is None:
        return Comparison(0.0, 0.0, 0, same)
    twin = Bundle(found.uri, found.manifest, tensors)
    ours, theirs = (_features(one.backbone(), batch) for one in (found, twin))
    return compare_outputs(ours, theirs, "features")


@torch.no_grad()
def compare_backbone(found: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """Compare a plain state dict under the model library's names, loaded into its model."""
    ours = {f"backbone.{name}": tensor for name, tensor in found.backbone_tensors().items()}
    theirs = {f"backbone.model.{name}": tensor for name, tensor in tensors.items()}
    return compare_tensors(Bundle(found.uri, found.manifest, ours), theirs)


@torch.no_grad()
def compare_classifier(found: Bundle, place: Path) -> Comparison:
    """Compare an exported folder or state dict that ``exported_classifier.load`` opens."""
    task, model = found.task(), exported_classifier.load(place)
    batch = random_batch(found.modality())
    assert batch is not None
    ours = logits(task, batch)
    assert ours is not None
    config: Any = model.model.config if "image" not in batch.data else None
    inputs: Any = model_inputs(task.backbone, batch)
    if inputs is None:
        inputs = batch["image"] if config is None else transformers_inputs(config, batch)
    else:  # what a user gives it; further arguments are the export's own
        inputs = {name: one for name, one in inputs.items() if isinstance(one, Tensor)}
    scale = output_scale(task.objective)
    return compare_outputs(ours, model(inputs), "scores", batch.data.get("mask"), scale)


def transformers_inputs(config: Any, batch: Batch) -> dict[str, Tensor]:
    """Return a batch under the names that models of transformers have for it."""
    if "wave" in batch.data:
        words = {"input_values": batch["wave"]}
        # models of the other kind were trained without a mask
        if getattr(config, "feat_extract_norm", "layer") == "layer":
            words["attention_mask"] = batch["mask"].long()
        return words
    mask = batch["mask"]
    words = {
        "input_ids": batch["tokens"].masked_fill(~mask, config.pad_token_id or 0),
        "attention_mask": mask.long(),
    }
    if getattr(config, "type_vocab_size", 1) > 1:
        words["token_type_ids"] = batch["types"]
    return words


@torch.no_grad()
def compare_folder(found: Bundle, folder: Path, backbone_only: bool) -> Comparison:
    """Compare a folder as `hf_text.write` leaves it, opened by timm or transformers."""
    if (folder / classifier_export.CODE).exists():
        return compare_classifier(found, folder)
    batch = random_batch(found.modality())
    assert batch is not None
    plain = backbone_only or found.manifest.objective.name == "none"
    if found.manifest.arch.name.startswith("timm/"):
        import timm

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if plain:
            theirs = model.forward_head(model.forward_features(batch["image"]), pre_logits=True)
            return compare_outputs(_features(found.backbone(), batch), theirs, "features")
        task = found.task()
        ours = logits(task, batch)
        assert ours is not None
        scale = output_scale(task.objective)
        return compare_outputs(ours, model(batch["image"]), "scores", scale=scale)
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    named = model_inputs(found.backbone(), batch)
    words = transformers_inputs(model.config, batch) if named is None else named
    task = None if plain else found.task()
    ours = logits(task, batch) if task is not None else None
    if ours is None:
        backbone = task.backbone if task is not None else found.backbone()
        features = backbone(batch, want=("tokens",))
        given = (model.base_model if named is None else model)(**words)
        if features.tokens is None:
            own = given.get("pooler_output")
            pooled = given.last_hidden_state.mean((2, 3)) if own is None else own.flatten(1)
            return compare_outputs(features.pooled, pooled, "features")
        states = auto_model.hidden_states(model, given)
        return compare_outputs(features.tokens, states, "states", features.mask)
    given = model(**words)
    if "start_logits" in given:
        theirs = torch.stack([given.start_logits, given.end_logits], -1)
    else:
        theirs = given.logits
    mask = batch.data["mask"] if "tokens" in batch.data else None
    assert task is not None
    return compare_outputs(ours, theirs, "scores", mask, output_scale(task.objective))


def read_state_dict(place: Path) -> dict[str, Tensor]:
    """Read a state dict that was written."""
    if place.suffix == ".safetensors":
        return load_file(place)
    return torch.load(place, map_location="cpu", weights_only=True)
