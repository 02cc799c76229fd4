"""A classifier trained by One to Many: a timm or transformers model, a layer norm, a linear layer.

This file was written beside the weights of an export. It needs torch and safetensors, and the
``library`` of classifier.json, timm or transformers. It reads ``classifier.json`` and two
safetensors files, and runs no other code.

    from classifier import load

    model = load("FOLDER")
    model = load("weights.safetensors")  # needs weights_classifier.json beside it
    logits = model(images)  # (B, C, H, W) float, by mean and std of the json
    # texts; of a tagger, rows are lists of words: also is_split_into_words=True
    logits = model(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

Column k of the logits belongs to ``labels[k]`` of classifier.json; of a regression the one column
is the number, in its own unit. A temperature that was fitted on validation rows is already part of
the linear layer. Give recordings of unequal length one at a time where the model was trained so
(``feat_extract_norm: group`` in its configuration).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

PREFIXES = {"backbone.model.": "model.", "objective.head.": "head.", "objective.norm.": "norm."}
"""Prefixes of names in a state dict of One to Many, and what they are here."""

Arguments = dict[str, Any]
"""Keyword arguments of a class of timm or transformers."""

_OptionalFields = TypedDict(
    "_OptionalFields",
    {
        # transformers: the configuration, and the class where it is not AutoModel's
        "config": Arguments,
        "class": str,
        "call_arguments": Arguments,
        # of two classes: the probability from which a row is called the second, and this in words
        "threshold": float,
        "threshold_of": str,
    },
    total=False,
)


class ClassifierSpec(_OptionalFields):
    """The content of classifier.json."""

    library: str
    """timm or transformers."""
    architecture: str
    objective: str
    labels: list[str]
    """The columns of the logits, in their order."""
    width: int
    """Features that the head reads."""
    norm: bool
    """Whether a layer norm without parameters comes before the linear layer."""
    pool: str | None
    """The feature that the head reads: tokens, pooler, first, last or mean; None for timm's own."""
    temperature_in_weights: float
    """The calibration temperature, by which the weights are already divided."""
    arguments: Arguments
    """Arguments of the class that is built."""
    input: dict[str, Any]
    """How rows are prepared: size, mean and std of images, rate of recordings, length of texts,
    steps, mean and std of series."""


class Classifier(nn.Module):
    """Logits (B, L) of a model's pooled feature, or (B, N, L) where ``pool`` is tokens.

    Args:
        model: The timm model without its classifier, or the plain model of transformers.
        spec: The content of classifier.json.
    """

    def __init__(self, model: nn.Module, spec: ClassifierSpec):
        super().__init__()
        self.model = model
        self.library, self.pool, self.labels = spec["library"], spec["pool"], spec["labels"]
        self.call_arguments: Arguments = spec.get("call_arguments", {})
        self.norm = nn.LayerNorm(spec["width"]) if spec["norm"] else nn.Identity()
        self.head = nn.Linear(spec["width"], len(self.labels))

    def forward(self, inputs: Any, **more: Any) -> Tensor:
        """Return the logits.

        Args:
            inputs: Images (B, C, H, W), or the mapping that a tokenizer or feature extractor
                returns.
            more: Parts of that mapping by name.
        """
        return self.head(self.norm(self.features(inputs, **more)))

    def features(self, inputs: Any, **more: Any) -> Tensor:
        """Return what the head reads: (B, D), or (B, N, D) of tokens."""
        model: Any = self.model
        if self.library == "timm":
            return model.forward_head(model.forward_features(inputs), pre_logits=True)
        if isinstance(inputs, Tensor):
            inputs = {model.main_input_name: inputs}
        arguments = {**self.call_arguments, **inputs, **more}
        output = model(**arguments)
        hidden = output.last_hidden_state
        if model.main_input_name == "past_values":
            hidden = hidden.transpose(1, 2).flatten(2)  # the states of all channels at a patch
        if self.pool == "tokens":
            return hidden
        if self.pool == "pooler":
            return output.pooler_output.flatten(1)
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        if self.pool == "first":
            return hidden[:, 0]
        mask = self._mask(hidden, arguments.get("attention_mask"))
        if self.pool == "last":
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        weight = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _mask(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return (B, N), true for the states that are no padding.

        In recordings one state stands for many samples.
        """
        if attention_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if attention_mask.shape[1] != hidden.shape[1]:
            model: Any = self.model
            return model._get_feature_vector_attention_mask(hidden.shape[1], attention_mask).bool()
        return attention_mask.bool()


def build(spec: ClassifierSpec) -> Classifier:
    """Return the classifier that a classifier.json describes, with random weights."""
    if "config" not in spec:
        import timm

        model = timm.create_model(spec["architecture"], pretrained=False, **spec["arguments"])
        return Classifier(model, spec)
    import transformers

    untyped: Any = transformers
    config = untyped.AutoConfig.for_model(**spec["config"])
    if "class" in spec:
        return Classifier(getattr(untyped, spec["class"])(config, **spec["arguments"]), spec)
    return Classifier(untyped.AutoModel.from_config(config, **spec["arguments"]), spec)


def load(place: str | Path | None = None) -> Classifier:
    """Return the trained classifier in evaluation mode, on the CPU.

    Args:
        place: An exported folder, or a state dict (.safetensors, .pt or .pth) with
            NAME_classifier.json beside it. None for the folder of this file.

    Raises:
        RuntimeError: A tensor is missing, left over or of another shape.
    """
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    place = Path(place) if place is not None else Path(__file__).parent
    if place.is_dir():
        spec = json.loads((place / "classifier.json").read_text(encoding="utf-8"))
        if "class" in spec:
            return _with_head(place, spec["class"], spec)
        own = load_file(place / "model.safetensors")
        tensors = {f"model.{name}": tensor for name, tensor in own.items()}
        tensors |= load_file(place / "head.safetensors")
    else:
        beside = place.with_name(f"{place.stem}_classifier.json")
        spec = json.loads(beside.read_text(encoding="utf-8"))
        if place.suffix == ".safetensors":
            own = load_file(place)
        else:
            own = torch.load(place, map_location="cpu", weights_only=True)
        tensors = {_renamed(name): tensor for name, tensor in own.items()}
    model = build(spec)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _with_head(place: Path, class_name: str, spec: ClassifierSpec) -> Classifier:
    """Return the classifier of a folder whose model transformers itself reads by its class.

    Raises:
        RuntimeError: A tensor of the head is missing, left over or of another shape.
    """
    import transformers
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    kind: Any = getattr(transformers, class_name)
    model = Classifier(kind.from_pretrained(place, **spec["arguments"]), spec)
    keys: Any = model.load_state_dict(load_file(place / "head.safetensors"), strict=False)
    missing: list[str] = [name for name in keys.missing_keys if not name.startswith("model.")]
    if missing or keys.unexpected_keys:
        raise RuntimeError(f"{place}: the head lacks {missing}, has {keys.unexpected_keys} more")
    return model.eval()


def _renamed(name: str) -> str:
    """Return a tensor's name in this class."""
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
