"""Compare an export with its bundle by running both on the same random rows.

Rows go through the bundle's own modality where files can be made up (images, recordings). Tokens,
events and tables are drawn from what the bundle knows. The exported side is read from the written
files, by the classes that its user would take.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from pipeline.checkpoints import bundle, classifier_export, exported_classifier
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.core.contracts import Backbone, Batch, Modality, Task
from pipeline.core.contracts.objective_capabilities import exports_head

ROWS, SEED = 4, 0
TOLERANCE = 1e-4
"""Largest difference that an export may have, relative to the bundle's largest absolute value.

That value counts as 1 at least. Float32 arithmetic in another order gives about 1e-6.
"""
TOKENS = 24
"""Tokens of the longest random text."""
SECONDS = 0.5
"""Length of the random recordings.

All have the same length, because some published models give other numbers on padded rows.
"""


@dataclass(frozen=True)
class Comparison:
    """Result of comparing an export with its bundle.

    Attributes:
        difference: Largest absolute difference.
        largest: The bundle's largest absolute value.
        rows: Number of rows; 0 where tensors were compared.
        what: What was compared, in words.
    """

    difference: float
    largest: float
    rows: int
    what: str

    def text(self) -> str:
        """Return the comparison as one line."""
        if not self.rows:
            return f"compared with the bundle: {self.what}"
        return (
            f"compared with the bundle on {self.rows} random rows: largest difference of "
            f"{self.what} {self.difference:.1e} (values up to {self.largest:.2g})"
        )


def require(found: Comparison, uri: str) -> Comparison:
    """Return the comparison if the difference is within `TOLERANCE`.

    Raises:
        BundleError: The difference is larger or no number.
    """
    allowed = TOLERANCE * max(1.0, found.largest)
    if not found.difference <= allowed:  # NaN too
        raise BundleError(
            f"{uri}: the export gives other numbers than the bundle: {found.what} differ by up to "
            f"{found.difference:.3g} on {found.rows} random rows, at most {allowed:.2g} is "
            "allowed; nothing was written. Take --kind bundle, and report this"
        )
    return found


# ---------------------------------------------------------------- rows


def random_batch(modality: Modality, rows: int = ROWS, seed: int = SEED) -> Batch | None:
    """Return finished rows as a backbone reads them, the same for the same seed.

    None for a modality whose rows cannot be made up.
    """
    rng = np.random.default_rng(seed)
    makers = {
        "image": _images,
        "text": _texts,
        "audio": _recordings,
        "table": _table_rows,
        "events": _events,
    }
    make = makers.get(modality.registered_name)
    if make is None:
        return None
    batch = Batch(np.arange(rows), torch.arange(rows), make(modality, rows, rng))
    return modality.finish(batch)


def _decoded(modality: Modality, table: pa.Table) -> dict[str, Tensor]:
    """Return the decoded rows of a table."""
    arrays, reasons = modality.decode(table, {name: name for name in table.column_names})
    if wrong := next(filter(None, reasons), ""):
        raise BundleError(f"random rows for the comparison cannot be decoded: {wrong}")
    return modality.collate(arrays)


def _images(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return decoded images of random pixels."""
    from PIL import Image

    side = modality.options.size
    files: list[bytes] = []
    for _ in range(rows):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(sink, "PNG")
        files.append(sink.getvalue())
    return _decoded(modality, pa.table({"image": files}))


def _recordings(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return decoded recordings of noise."""
    import soundfile  # pyright: ignore[reportMissingTypeStubs]

    files: list[bytes] = []
    for _ in range(rows):
        sink = io.BytesIO()
        samples = (0.2 * rng.standard_normal(int(SECONDS * modality.options.rate))).clip(-1, 1)
        soundfile.write(sink, samples, modality.options.rate, "PCM_16", format="WAV")
        files.append(sink.getvalue())
    return _decoded(modality, pa.table({"audio": files}))


def _texts(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return rows of random tokens, of several lengths.

    They are drawn from the vocabulary without its special tokens, and framed as the modality frames
    its rows.
    """
    pad, _, cls, sep, _ = modality.state["specials"]
    special = {number for number in modality.state["specials"] if number is not None}
    words = np.array(
        [number for number in range(modality.state["vocabulary"]) if number not in special]
    )
    longest = min(TOKENS, modality.options.length)
    lengths = rng.integers(min(4, longest), longest + 1, rows)
    lengths[0] = longest
    tokens = np.full((rows, longest), pad, dtype=np.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.choice(words, length)
        tokens[row, 0], tokens[row, length - 1] = cls, sep
    mask = np.arange(longest) < lengths[:, None]
    return {"tokens": torch.as_tensor(tokens), "mask": torch.as_tensor(mask)}


def _static_rows(static_features: Any, rows: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return rows with a value for every known number, and with a known text for each field."""
    state = static_features.state
    out: list[dict[str, Any]] = []
    fields: dict[str, list[str]] = {}
    for code in state["codes"]:
        name, _, text = code.partition("=")
        fields.setdefault(name, []).append(text)
    for _ in range(rows):
        row: dict[str, Any] = {
            name: float(mean + std * rng.standard_normal())
            for name, mean, std in zip(state["numbers"], state["mean"], state["std"], strict=True)
        }
        out.append(row | {name: [str(rng.choice(texts))] for name, texts in fields.items()})
    return out


def _table_rows(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return decoded rows of a table."""
    features = _static_rows(modality.static_features, rows, rng)
    return _decoded(modality, pa.table({"features": features}))


def _events(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Return decoded rows of events."""
    state = modality.state
    table: dict[str, list[Any]] = {"times": [], "variables": [], "values": []}
    for _ in range(rows):
        count = int(rng.integers(5, 20))
        places = rng.integers(0, len(state["variables"]), count)
        table["times"].append(np.sort(rng.uniform(0, modality.options.hours, count)).tolist())
        table["variables"].append([state["variables"][place] for place in places])
        values = [
            float(state["mean"][place] + state["std"][place] * rng.standard_normal())
            for place in places
        ]
        table["values"].append(values)
    if any(modality.static_features.sizes().values()):
        table["static"] = _static_rows(modality.static_features, rows, rng)
    return _decoded(modality, pa.table(table))


# ---------------------------------------------------------------- what is compared


def _compare(ours: Tensor, theirs: Tensor, what: str, mask: Tensor | None = None) -> Comparison:
    """Return the comparison of two tensors, where ``mask`` is true."""
    if ours.shape != theirs.shape:
        raise BundleError(
            f"the export gives {what} of shape {tuple(theirs.shape)}, the bundle "
            f"{tuple(ours.shape)}"
        )
    if mask is not None and ours.dim() == 3:
        ours, theirs = ours[mask], theirs[mask]
    difference = (ours.double() - theirs.double()).abs().max()
    return Comparison(float(difference), float(ours.abs().max()), ROWS, what)


def _backbone(found: Bundle) -> Backbone:
    """Return the bundle's backbone in evaluation mode."""
    backbone = bundle.build_backbone(found.manifest.arch)
    bundle.transfer(backbone, found.backbone_tensors(), found.uri)
    return backbone.eval()


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
    twin = bundle.build_backbone(found.manifest.arch)
    twin.load_state_dict(Bundle(found.uri, found.manifest, tensors).backbone_tensors())
    return _compare(_features(_backbone(found), batch), _features(twin.eval(), batch), "features")


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
    inputs: Any = batch["image"] if config is None else _words(config, batch)
    return _compare(ours, model(inputs), "scores", batch.data.get("mask"))


def _words(config: Any, batch: Batch) -> dict[str, Tensor]:
    """Return a batch under the names that models of transformers have for it."""
    if "wave" in batch.data:
        words = {"input_values": batch["wave"]}
        # models of the other kind were trained without a mask
        if getattr(config, "feat_extract_norm", "layer") == "layer":
            words["attention_mask"] = batch["mask"].long()
        return words
    mask = batch["mask"]
    return {
        "input_ids": batch["tokens"].masked_fill(~mask, config.pad_token_id or 0),
        "attention_mask": mask.long(),
    }


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
            return _compare(_features(_backbone(found), batch), theirs, "features")
        ours = logits(found.task(), batch)
        assert ours is not None
        return _compare(ours, model(batch["image"]), "scores")
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    words = _words(model.config, batch)
    task = None if plain else found.task()
    ours = logits(task, batch) if task is not None else None
    if ours is None:
        backbone = task.backbone if task is not None else _backbone(found)
        features = backbone(batch, want=("tokens",))
        assert features.tokens is not None
        return _compare(
            features.tokens, model.base_model(**words).last_hidden_state, "states", features.mask
        )
    given = model(**words)
    if "start_logits" in given:
        theirs = torch.stack([given.start_logits, given.end_logits], -1)
    else:
        theirs = given.logits
    mask = batch.data["mask"] if "tokens" in batch.data else None
    return _compare(ours, theirs, "scores", mask)


def read_state_dict(place: Path) -> dict[str, Tensor]:
    """Read a state dict that was written."""
    if place.suffix == ".safetensors":
        return load_file(place)
    return torch.load(place, map_location="cpu", weights_only=True)
