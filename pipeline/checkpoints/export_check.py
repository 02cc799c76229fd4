"""Comparison of an export with its bundle: both are run on the same seeded random rows, and the
largest difference is told.

Rows go through the bundle's own modality where files can be made up (images, recordings); tokens,
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
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints import bundle, classifier_export, exported_classifier
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.core.contracts import Backbone, Batch, Modality, Task

ROWS, SEED = 4, 0
TOLERANCE = 1e-4
"""Largest difference that an export may have, as a share of the bundle's largest absolute value (at
least 1): float32 arithmetic in another order gives some 1e-6.
"""
TOKENS = 24
"""Tokens of the longest random text."""
SECONDS = 0.5
"""Length of the random recordings; all are as long, since some published models give other numbers
on padded rows.
"""


@dataclass(frozen=True)
class Comparison:
    """Largest absolute difference of (``rows``) rows' ``what``, and the bundle's largest absolute
    value. ``rows`` 0: tensors were compared.
    """

    difference: float
    largest: float
    rows: int
    what: str

    def text(self) -> str:
        if not self.rows:
            return f"compared with the bundle: {self.what}"
        return (
            f"compared with the bundle on {self.rows} random rows: largest difference of "
            f"{self.what} {self.difference:.1e} "
            f"(values up to {self.largest:.2g})"
        )


def require(found: Comparison, uri: str) -> Comparison:
    """Raises BundleError where an export differs from its bundle by more than ``TOLERANCE``, or
    gives what is no number.
    """
    allowed = TOLERANCE * max(1.0, found.largest)
    if not found.difference <= allowed:  # NaN too
        raise BundleError(
            f"{uri}: the export gives other numbers than the bundle: {found.what} differ by up "
            f"to {found.difference:.3g} on {found.rows} "
            f"random rows, at most {allowed:.2g} is allowed; nothing was written. Take --kind "
            "bundle, and report this"
        )
    return found


# ---------------------------------------------------------------- rows


def random_batch(modality: Modality, rows: int = ROWS, seed: int = SEED) -> Batch | None:
    """Finished rows as a backbone reads them, the same for the same seed; None for a modality that
    no rows can be made up for.
    """
    rng = np.random.default_rng(seed)
    make = {
        "image": _images,
        "text": _texts,
        "audio": _recordings,
        "table": _facts,
        "events": _events,
    }.get(modality.registered_name)
    if make is None:
        return None
    batch = Batch(np.arange(rows), torch.arange(rows), make(modality, rows, rng))
    return modality.finish(batch)


def _decoded(modality: Modality, table: pa.Table) -> dict[str, Tensor]:
    arrays, reasons = modality.decode(table, {name: name for name in table.column_names})
    if wrong := next(filter(None, reasons), ""):
        raise BundleError(f"random rows for the comparison cannot be decoded: {wrong}")
    return modality.collate(arrays)


def _images(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    from PIL import Image

    side, files = modality.options.size, []
    for _ in range(rows):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(sink, "PNG")
        files.append(sink.getvalue())
    return _decoded(modality, pa.table({"image": files}))


def _recordings(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    import soundfile

    files = []
    for _ in range(rows):
        sink = io.BytesIO()
        samples = (0.2 * rng.standard_normal(int(SECONDS * modality.options.rate))).clip(-1, 1)
        soundfile.write(sink, samples, modality.options.rate, "PCM_16", format="WAV")
        files.append(sink.getvalue())
    return _decoded(modality, pa.table({"audio": files}))


def _texts(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Tokens of all the vocabulary but its special ones, in the frame that the modality gives its
    rows; rows of several lengths.
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
    return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}


def _fact_columns(
    static_features: Any, rows: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Values for every known number, and a known text of each field."""
    state, out = static_features.state, []
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


def _facts(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    return _decoded(
        modality, pa.table({"features": _fact_columns(modality.static_features, rows, rng)})
    )


def _events(modality: Any, rows: int, rng: np.random.Generator) -> dict[str, Tensor]:
    state, table = modality.state, {"times": [], "variables": [], "values": []}
    for _ in range(rows):
        count = int(rng.integers(5, 20))
        places = rng.integers(0, len(state["variables"]), count)
        table["times"].append(np.sort(rng.uniform(0, modality.options.hours, count)).tolist())
        table["variables"].append([state["variables"][place] for place in places])
        table["values"].append(
            [
                float(state["mean"][place] + state["std"][place] * rng.standard_normal())
                for place in places
            ]
        )
    static = (
        {"static": _fact_columns(modality.static_features, rows, rng)}
        if any(modality.static_features.sizes().values())
        else {}
    )
    return _decoded(modality, pa.table({**table, **static}))


# ---------------------------------------------------------------- what is compared


def _compare(ours: Tensor, theirs: Tensor, what: str, mask: Tensor | None = None) -> Comparison:
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
    backbone = bundle.build_backbone(found.manifest.arch)
    bundle.transfer(backbone, found.backbone_tensors(), found.uri)
    return backbone.eval()


def _features(backbone: Backbone, batch: Batch) -> Tensor:
    return backbone(batch).pooled.float()


@torch.no_grad()
def logits(task: Task, batch: Batch) -> Tensor | None:
    """What transformers calls logits: (B, L), or (B, N, L) of tokens; None for an objective that
    compares something else.
    """
    name, objective, backbone = task.objective.registered_name, task.objective, task.backbone
    head: Any = objective
    if name in ("classification", "multilabel"):
        found = objective.head_predict(backbone(batch).pooled, batch)
        assert found is not None
        return found["scores"]
    if name == "ctc":
        return head.head(backbone(batch, want=("tokens",)).tokens)
    if name == "tagging":
        tokens = backbone(batch, want=("tokens",)).tokens
        assert tokens is not None
        return head.head(
            torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
            if head.options.norm
            else tokens
        )
    if name in ("mlm", "clm"):
        tokens = backbone(batch, want=("tokens",)).tokens
        hidden = head.transform(tokens) if name == "mlm" else tokens
        return torch.nn.functional.linear(
            hidden, backbone.embedding().weight, head.bias if name == "mlm" else None
        )
    if name == "qa":
        return head.head(backbone(batch, want=("tokens",)).tokens)
    return None


@torch.no_grad()
def compare_tensors(found: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """Tensors of the bundle's own names: the same ones bit for bit, and on random rows the features
    of a backbone that holds them.

    Raises BundleError where a tensor is missing or differs.
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
    twin.load_state_dict(
        {
            name.removeprefix("backbone."): tensor
            for name, tensor in tensors.items()
            if name.startswith("backbone.")
        }
    )
    return _compare(_features(_backbone(found), batch), _features(twin.eval(), batch), "features")


@torch.no_grad()
def compare_backbone(found: Bundle, tensors: dict[str, Tensor]) -> Comparison:
    """A plain state dict of the model library's own names, loaded into its model."""
    return compare_tensors(
        Bundle(
            found.uri,
            found.manifest,
            {f"backbone.{name}": tensor for name, tensor in found.backbone_tensors().items()},
        ),
        {f"backbone.model.{name}": tensor for name, tensor in tensors.items()},
    )


@torch.no_grad()
def compare_classifier(found: Bundle, place: Path) -> Comparison:
    """An exported folder or state dict that ``exported_classifier.load`` opens."""
    task, model = found.task(), exported_classifier.load(place)
    batch = random_batch(found.modality())
    assert batch is not None
    ours = logits(task, batch)
    assert ours is not None
    # pyright: ignore
    inputs: Any = batch["image"] if "image" in batch.data else _words(model.model.config, batch)
    return _compare(ours, model(inputs), "scores", batch.data.get("mask"))


def _words(config: Any, batch: Batch) -> dict[str, Tensor]:
    """A batch in the words of a model of transformers."""
    if "wave" in batch.data:
        masked = (
            getattr(config, "feat_extract_norm", "layer") == "layer"
        )  # the others were trained without a mask
        return {
            "input_values": batch["wave"],
            **({"attention_mask": batch["mask"].long()} if masked else {}),
        }
    mask = batch["mask"]
    return {
        "input_ids": batch["tokens"].masked_fill(~mask, config.pad_token_id or 0),
        "attention_mask": mask.long(),
    }


@torch.no_grad()
def compare_folder(found: Bundle, folder: Path, backbone_only: bool) -> Comparison:
    """A folder as `hf_text.write` leaves it, opened by timm or transformers."""
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
    theirs = (
        torch.stack([given.start_logits, given.end_logits], -1)
        if "start_logits" in given
        else given.logits
    )
    mask = batch.data["mask"] if "tokens" in batch.data else None
    return _compare(ours, theirs, "scores", mask)


def read_state_dict(place: Path) -> dict[str, Tensor]:
    """A written state dict, read again."""
    if place.suffix == ".safetensors":
        return load_file(place)
    return torch.load(place, map_location="cpu", weights_only=True)
