"""Existing checkpoints to start from: a bundle, a weights file, a Hugging Face folder, a hub name.

Weights are safetensors, or state dicts opened with ``weights_only=True``: no code is run.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from pipeline import bundle, folders, storage
from pipeline.bundle import BundleError

HEADS = ("model.fc.", "model.head.", "model.head_dist.", "model.classifier.", "model.last_linear.", "model.pooler.", "model.cls.", "model.lm_head.",
         "model.embeddings.position_ids", "model.head.fc.", "model.AuxLogits.")
"""Prefixes of what a checkpoint may hold beyond the backbone: classifiers, poolers, language-model heads."""


@dataclass(frozen=True)
class Start:
    """Tensors under the backbone's own names; ``arch`` and ``modality`` when the checkpoint tells them."""

    origin: str
    tensors: dict[str, Tensor]
    arch: dict[str, Any] | None = None
    modality: dict[str, Any] | None = None
    bundle: bundle.Bundle | None = None
    drop: tuple[str, ...] = field(default=HEADS)


def fingerprint(text: str) -> str:
    """What a checkpoint holds, whatever its place: its prefix with the checksum of a bundle or the fingerprints of files.

    A hub name stands for itself. Raises BundleError or StorageError when nothing is there.
    """
    prefix, _, uri = text.partition(":")
    if prefix == "bundle":
        return f"bundle:{folders.open_folder(uri)['sha256']}"
    if prefix == "file":
        return f"file:{storage.fingerprint(uri)}"
    if prefix == "hf" and storage.is_dir(uri):
        found = [storage.join(uri, name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
        return "hf:" + " ".join(storage.fingerprint(file) for file in found if storage.exists(file))
    return text


def read(text: str, architecture: str | None = None) -> Start:
    """Open ``bundle:URI``, ``file:PATH``, ``hf:FOLDER``, ``hf-hub:NAME`` or ``timm-hub:NAME``. Raises BundleError with what to do."""
    prefix, _, uri = text.partition(":")
    if prefix == "bundle":
        found = bundle.load(uri)
        return Start(text, found.backbone_tensors(), found.manifest["arch"], found.manifest["modality"], found, drop=())
    if prefix == "file":
        return Start(text, _named(_tensors(uri), architecture or ""))
    if prefix == "hf":
        return _hugging_face(uri)
    if prefix == "timm-hub":
        return _timm_hub(uri)
    if prefix == "hf-hub":
        return replace(_hugging_face(_hub_folder(uri)), origin=text)
    raise BundleError(f"{text}: a checkpoint is named bundle:URI, file:PATH, hf:FOLDER, hf-hub:NAME or timm-hub:NAME")


def _tensors(uri: str) -> dict[str, Tensor]:
    try:
        data = storage.read_bytes(uri)
        if uri.endswith(".safetensors"):
            return load_safetensors(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except storage.StorageError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for a file that is none of theirs
        raise BundleError(f"{uri}: not a safetensors file or state dict that can be opened without running code "
                          f"({type(error).__name__}: {str(error)[:200]})") from error
    for key in ("state_dict", "model", "model_state", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BundleError(f"{uri}: the file holds no state dict (names to tensors)")
    return found


def _named(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Names as the backbone has them: wrappers' prefixes off, in whatever order, ``model.`` in front."""
    prefixes = ("module.", "_orig_mod.", "backbone.", "model.", f"{architecture.rpartition('/')[2]}.", "transformer.")
    beside = ("cls.", "lm_head.", "objective.")
    while wrapper := next((p for p in prefixes if any(n.startswith(p) for n in tensors) and all(n.startswith((p, *beside)) for n in tensors)), None):
        tensors = {name.removeprefix(wrapper): t for name, t in tensors.items() if not name.startswith("objective.")}
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _published(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(tensors under today's names, names to drop): bert-base-uncased says LayerNorm.gamma and .beta, gpt2 stores its causal masks."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors, tuple(name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias")))


def _hugging_face(folder: str) -> Start:
    path = storage.join(folder, "config.json")
    if not storage.exists(path):
        raise BundleError(f"hf:{folder}: no config.json in this folder; a Hugging Face folder has config.json, model.safetensors and tokenizer.json")
    config = json.loads(storage.read_bytes(path))
    family = config.get("model_type")
    if family not in ("bert", "gpt2"):
        raise BundleError(f"hf:{folder}: model_type {family!r} has no adapter; families are bert and gpt2")
    for needed in ("model.safetensors", "tokenizer.json"):
        if not storage.exists(storage.join(folder, needed)):
            raise BundleError(f"hf:{folder}: {needed} is missing; save the model again with transformers' save_pretrained (safetensors)")
    from tokenizers import Tokenizer

    text = storage.read_bytes(storage.join(folder, "tokenizer.json")).decode()
    tokenizer = Tokenizer.from_str(text)
    names = (("[PAD]", "<pad>", "<|endoftext|>"), ("[UNK]", "<unk>", "<|endoftext|>"), ("[CLS]", "<s>", "<|endoftext|>"),
             ("[SEP]", "</s>", "<|endoftext|>"), ("[MASK]", "<mask>", "<|endoftext|>"))
    specials = [next((i for n in group if (i := tokenizer.token_to_id(n)) is not None), None) for group in names]
    if None in specials:
        raise BundleError(f"hf:{folder}: its tokenizer lacks special tokens (pad, unk, cls, sep, mask found: {specials})")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    length = min(config.get("max_position_embeddings") or config.get("n_positions") or 512, 512)
    state = {"tokenizer": tokenizer.to_str(), "vocabulary": tokenizer.get_vocab_size(), "specials": specials}
    modality = {"name": "text", "options": {"length": length}, "state": state}
    inputs = {"vocabulary": state["vocabulary"], "length": length, "specials": specials}
    arch = {"name": f"transformers/{family}", "options": {"config": config}, "inputs": inputs}
    tensors, masks = _published(_named(_tensors(storage.join(folder, "model.safetensors")), arch["name"]))
    return Start(f"hf:{folder}", tensors, arch, modality, drop=(*HEADS, *masks))


def _hub_folder(name: str) -> str:
    """The hub's folder of a model on this machine, fetched when it is not there yet. Raises BundleError without a network."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "tokenizer.json"])
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(f"hf-hub:{name}: the model cannot be had from the hub ({type(error).__name__}: {str(error)[:160]}). Without a network, "
                          "copy its config.json, model.safetensors and tokenizer.json into a folder and give hf:FOLDER") from error


def _timm_hub(name: str) -> Start:
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(f"timm-hub:{name}: the weights cannot be had from the hub ({type(error).__name__}: {str(error)[:160]}). Without a network, "
                          f"download them elsewhere and give backbone timm/{name.split('.')[0]} with init: file:PATH") from error
    config: Any = model.pretrained_cfg
    size, mean, std = config["input_size"], list(config["mean"]), list(config["std"])
    modality = {"name": "image", "options": {"size": size[1], "channels": size[0]}, "state": {"mean": mean, "std": std}}
    arch = {"name": f"timm/{name.split('.')[0]}", "options": {}, "inputs": {"channels": size[0], "size": size[1]}}
    return Start(f"timm-hub:{name}", {f"model.{n}": t for n, t in model.state_dict().items()}, arch, modality)


def described(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arch and modality of a timm model whose weights file says nothing of its input: timm's own configuration does.

    Raises BundleError for other libraries, where data or a self-describing checkpoint must tell.
    """
    library, _, architecture = name.partition("/")
    if library != "timm":
        raise BundleError(f"{name}: a weights file does not tell its input; use hf:FOLDER or bundle:URI, or give the source data")
    import timm

    config = timm.models.get_pretrained_cfg(architecture)
    if config is None:
        raise BundleError(f"{name}: timm has no input configuration for it; give the source data")
    size = config.input_size
    modality = {"name": "image", "options": {"size": size[1], "channels": size[0]}, "state": {"mean": list(config.mean), "std": list(config.std)}}
    return {"name": name, "options": options, "inputs": {"channels": size[0], "size": size[1]}}, modality
