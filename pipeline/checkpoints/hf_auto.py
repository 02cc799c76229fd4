"""Read and write folders of any encoder or decoder of transformers, for backbones of library hf.

`hf_text` reads the families that objectives know more of. Here transformers itself loads the
weights into its class, so files with older names are read as it reads them. The folder's processor
says how rows are read: mean, standard deviation, size and crop of images; the sampling rate of
recordings; the tokenizer of texts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline.checkpoints import bundle, classifier_export, export_check, hf_speech, hf_text
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.hf_config import HfConfig
from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import transformers_head
from pipeline.core.nn import auto_model
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.io import storage
from pipeline.io.json_values import JsonObject, as_object

TOWERS = {"image": "vision_config", "text": "text_config", "audio": "audio_config"}
"""The part of a configuration that describes the network of a modality's rows, by modality."""
INPUTS = {"pixel_values": "image", "input_ids": "text", auto_model.SERIES_INPUT: "series"}
"""The modality of a class's rows, by the name of its main input; others read recordings."""
SIZES = (
    "vocab_size",
    "pad_token_id",
    "image_size",
    "num_channels",
    "context_length",
    "num_input_channels",
)
"""Keys of a configuration that otherwise follow from the rows."""
MAX_TOKENS = 512
"""Most tokens of a row, where the job does not say more."""
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""Pillow's filters that the image modality has."""
BEFORE_CROP = 224 / 256
"""ConvNeXt's share of the resized image that is kept, where its file does not say it."""
LEVELS = 255
"""Largest level of a pixel."""


# ---------------------------------------------------------------- reading


def tower(config: HfConfig, wanted: str | None) -> HfConfig:
    """Return the configuration of the network that is the backbone, with its model_type.

    Of a model of several networks (CLIP, Gemma 3) that is the one of the wanted modality; without
    a wish the one of images or sounds in a model that pairs them with texts, else that of texts.

    Raises:
        ValueError: The model_type is unknown, or the model reads no such rows.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    name = config.get("model_type")
    families = registry.architectures("hf")
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"model_type {name!r}: {registry.nearest(str(name), families)}")
    parts = {key: config[part] for key, part in TOWERS.items() if as_object(config.get(part))}
    if not parts:
        return config
    pairs = name in auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES or "audio" in parts
    usual = next((key for key in parts if key != "text"), "text") if pairs else "text"
    modality = wanted or usual
    if modality not in parts:
        raise ValueError(f"{name} has networks of {', '.join(parts)}, none of {modality}")
    whole: Any = CONFIG_MAPPING[name]
    kind: Any = whole.sub_configs.get(TOWERS[modality])
    model_type = parts[modality].get("model_type") or getattr(kind, "model_type", None)
    return {**parts[modality], "model_type": model_type}


def modality_name(config: HfConfig, wanted: str | None = None) -> str | None:
    """Return the modality of the rows that a folder's model reads; None for an unknown model."""
    from transformers import CONFIG_MAPPING

    try:
        name = tower(config, wanted)["model_type"]
        reads = auto_model.model_class(CONFIG_MAPPING[name]()).main_input_name
    except (ValueError, KeyError):
        return None
    return INPUTS.get(reads, "audio")


def read(
    folder: str, config: HfConfig, wanted: str | None = None, names_only: bool = False
) -> hf_text.Checkpoint:
    """Return the checkpoint in a folder.

    Args:
        config: The content of the folder's config.json.
        wanted: The modality that the job says, for a model of several networks.
        names_only: As in `hf_text.read_safetensors`. A checkpoint with a head is read whole all the
            same: the head's outputs are compared with those of transformers' class.

    Raises:
        BundleError: Something is missing or does not fit; the message says what to do.
    """
    try:
        part = tower(config, wanted)
        family = part["model_type"]
        plain = auto_model.plain_config(family, part)
        model_config = auto_model.configuration(family, plain, {})
        model_class = auto_model.model_class(model_config)
    except (ValueError, KeyError) as error:
        reason = error.args[0] if error.args else error
        raise BundleError(f"{storage.join(folder, hf_text.CONFIG)}: {reason}") from None
    has_head = _class_with_head(config)[1] is not None
    tensors = hf_text.read_weights(folder, names_only and not has_head)
    modality_of_rows = INPUTS.get(model_class.main_input_name, "audio")
    modality, options = _modality(folder, modality_of_rows, model_config)
    loaded, missing, unexpected = _load(folder, model_class, model_config, tensors)
    model = auto_model.encoder_of(loaded)
    if modality.name == "text":
        modality = ModalitySpec("text", {"length": _length(model)}, modality.state)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    prefix = "encoder." if model is not loaded else ""
    fresh = {f"model.{name.removeprefix(prefix)}" for name in missing}
    if unknown := sorted(
        name for name in fresh & set(state) if not name.startswith(MAY_BE_MISSING)
    ):
        raise BundleError(
            f"hf:{folder}: the file of weights lacks {len(unknown)} tensors of "
            f"{model_class.__name__} ({', '.join(unknown[:4])}): it is not a complete "
            "checkpoint of it"
        )
    dropped = {f"model.{name}": tensors[name] for name in unexpected if name in tensors}
    inputs = bundle.build_modality(modality).inputs()
    # keys that the configuration lacks have transformers' defaults, not the rows' sizes
    stated = {key: getattr(model_config, key) for key in SIZES if key in model_config.to_dict()}
    arch = Architecture(f"hf/{family}", {"config": {**stated, **plain}, **options}, inputs)
    kept = {name: tensor for name, tensor in state.items() if name not in fresh}
    linear = _linear_head(config, model_config, tensors, arch, modality, kept)
    heads: dict[str, dict[str, Tensor]] = {}
    labels = None
    if linear is not None:
        arch, labels = linear.arch, linear.labels
        heads[linear.objective] = linear.tensors
    no_head_reasons: dict[str, str] = {}
    language = _language_head(config, model_config, tensors, arch, modality, kept)
    if language is not None and language.reason:
        no_head_reasons[language.objective] = language.reason
    elif language is not None:
        heads[language.objective] = language.tensors
    has_own_output = "output.weight" in heads.get("clm", {})
    if not has_own_output:
        arch = _with_tied_output(arch, model_config)
    return hf_text.Checkpoint(
        arch,
        modality,
        kept | dropped,
        ignored_prefixes=(*MAY_BE_MISSING, *(name for name in dropped if name not in state)),
        heads=heads,
        labels=labels,
        no_head_reasons={
            name: no_head_reasons.get(name, _why_new(name))
            for name in registry.names("objective")
            if name not in heads and transformers_head(registry.get("objective", name)) is not None
        },
    )


MAY_BE_MISSING = ("model.pooler.", "model.masked_spec_embed")
"""Prefixes of tensors that a file of weights may lack.

A pooler (roberta-base) and the embedding of hidden frames (wav2vec2-base-960h).
"""
HEADED = {
    "ForClassification": "classification",
    "ForTimeSeriesClassification": "classification",
    "ForRegression": "regression",
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForTokenClassification": "tagging",
    "ForQuestionAnswering": "qa",
    "ForMaskedLM": "mlm",
    "ForCausalLM": "clm",
    "LMHeadModel": "clm",
}
"""Ends of the names of transformers' classes with a head, and its objective."""
LANGUAGE_OBJECTIVES = ("mlm", "clm")
"""Objectives of language models; the heads of the others are a linear layer."""
WITH_LABELS = ("classification", "multilabel", "tagging")
"""Objectives whose head has a row for each label."""
LAST = ("classifier", "score", "qa_outputs", "head.linear", "head.projection")
"""Names of the linear layer that gives their scores."""
SCORES = ("logits", "prediction_logits", "prediction_outputs", "regression_outputs")
"""Names of the scores in the output of transformers' classes; question answering has two,
start_logits and end_logits.
"""
POOLS = ("auto", "first", "mean", "pooler", "last")
"""Ways to pool that are tried, in this order."""
EQUAL = 1e-4
"""Largest difference of scores from those of transformers' class, relative to the largest one."""


class LinearHead(NamedTuple):
    """The head of a checkpoint that is a linear layer on pooled features or on tokens."""

    objective: str
    arch: Architecture
    """With the way to pool that the head expects."""
    tensors: dict[str, Tensor]
    """By the objective's names."""
    labels: tuple[str, ...] | None
    """In the order of the head's rows; None for objectives without labels."""


def _linear_head(
    config: HfConfig,
    model_config: Any,
    tensors: dict[str, Tensor],
    arch: Architecture,
    modality: ModalitySpec,
    backbone: dict[str, Tensor],
) -> LinearHead | None:
    """Return a checkpoint's linear head; None for checkpoints of other classes.

    The head is kept only if it gives the scores of transformers' class on random rows, for one of
    the ways to pool.
    """
    model_class, objective = _class_with_head(config)
    if model_class is None or objective is None or objective in LANGUAGE_OBJECTIVES:
        return None
    last = next((name for name in LAST if f"{name}.weight" in tensors), None)
    reader: Any = bundle.build_modality(modality)
    if last is None or not hasattr(reader, "random_rows"):
        return None
    weight = tensors[f"{last}.weight"].float()
    bias = tensors.get(f"{last}.bias", torch.zeros(len(weight))).float()
    objective = _stated_objective(objective, config)
    if objective == "regression" and len(weight) > 1:
        return None  # objective regression estimates one number a row
    labels = hf_text.label_names(config, len(weight))
    config_with_labels = copy.deepcopy(model_config)
    config_with_labels.id2label = dict(enumerate(labels))
    with quiet(), torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        model = model_class.from_pretrained(
            None, config=config_with_labels, state_dict=tensors, dtype=torch.float32
        )
    rows = export_check.random_batch(reader)
    on_tokens = objective in ("tagging", "qa")
    for pool in POOLS[:1] if on_tokens else POOLS:
        pooled = arch if pool == "auto" else replace(arch, options={**arch.options, "pool": pool})
        network = _network(pooled, backbone)
        if network is None:
            continue
        with torch.no_grad():
            features = network(rows, want=("tokens",))
            output = model(**network.model_inputs(rows))
        head_inputs = features.tokens if on_tokens else features.pooled
        if head_inputs is None or head_inputs.shape[-1] != weight.shape[1]:
            continue
        scores = head_inputs @ weight.T + bias
        if objective == "qa":
            expected = torch.stack([output.start_logits, output.end_logits], -1)
        else:
            expected = next(output[name] for name in SCORES if name in output)
        if features.mask is not None and on_tokens:
            scores, expected = scores[features.mask], expected[features.mask]
        if _are_equal(scores, expected):
            head = {"head.weight": weight, "head.bias": bias}
            names = labels if objective in WITH_LABELS else None
            return LinearHead(objective, pooled, head, names)
    return None


def _stated_objective(objective: str, config: HfConfig) -> str:
    """Return the objective of a head: that of its class, or as the problem type says."""
    kinds = {"multi_label_classification": "multilabel", "regression": "regression"}
    if objective != "classification":
        return objective
    return kinds.get(str(config.get("problem_type")), objective)


def _network(arch: Architecture, backbone: dict[str, Tensor]) -> Any | None:
    """Return a backbone with its weights; None where some are lacking, or it cannot pool so."""
    try:
        network = bundle.build_backbone(arch).eval()
    except ValueError:
        return None
    names = network.state_dict().keys()
    if names - backbone.keys():
        return None
    network.load_state_dict({name: backbone[name] for name in names})
    return network


def _class_with_head(config: HfConfig) -> tuple[Any, str | None]:
    """Return transformers' class of a checkpoint and the objective of its head, None if unknown."""
    import transformers

    name = (config.get("architectures") or [""])[0]
    objective = next((HEADED[end] for end in HEADED if name.endswith(end)), None)
    return getattr(transformers, name, None), objective


def _why_new(objective: str) -> str:
    """Return why an objective's head is new where the checkpoint's class has none for it."""
    if objective in LANGUAGE_OBJECTIVES:
        return "the checkpoint holds no language-model head for it"
    return "the checkpoint holds no linear layer on its features for it"


class LanguageHead(NamedTuple):
    """The head of a checkpoint of a language model."""

    objective: str
    tensors: dict[str, Tensor]
    """By the objective's names; empty where the output layer is the embedding."""
    reason: str
    """Why the head is not kept, or an empty string."""


def _language_head(
    config: HfConfig,
    model_config: Any,
    tensors: dict[str, Tensor],
    arch: Architecture,
    modality: ModalitySpec,
    backbone: dict[str, Tensor],
) -> LanguageHead | None:
    """Return a checkpoint's language-model head; None for checkpoints of other classes.

    The head is kept only if it gives the scores of transformers' class on random rows.
    """
    kind, objective = _class_with_head(config)
    if kind is None or objective not in LANGUAGE_OBJECTIVES:
        return None
    name = kind.__name__
    model, lacking = _load_language_model(kind, model_config, tensors)
    if lacking:
        reason = f"the checkpoint lacks {', '.join(lacking[:4])} of {name}"
        return LanguageHead(objective, {}, reason)
    if objective == "mlm" and auto_model.masked_head(model_config) is None:
        reason = (
            f"{name} has another head than a linear layer, an activation, a layer norm and an "
            "output"
        )
        return LanguageHead(objective, {}, reason)
    head = (
        _masked_head(model, model_config)
        if objective == "mlm"
        else _causal_head(model, model_config)
    )
    rows = export_check.random_batch(bundle.build_modality(modality))
    assert rows is not None
    arguments = {"input_ids": rows["tokens"], "attention_mask": rows["mask"].long()}
    with torch.no_grad():
        expected = model(**arguments).logits[rows["mask"]]
    del model  # frees its memory before our own copy is built
    try:
        task = bundle.build_task(arch, ObjectiveSpec(objective, {}, {})).eval()
    except ValueError as error:
        return LanguageHead(objective, {}, f"{error}")
    task.objective.load_state_dict(head)
    task.backbone.load_state_dict({key: backbone[key] for key in task.backbone.state_dict()})
    if not _gives_scores(task, rows, expected):
        reason = f"{name} makes its scores in another way than {objective}"
        return LanguageHead(objective, {}, reason)
    return LanguageHead(objective, head, "")


def _load_language_model(
    kind: Any, config: Any, tensors: dict[str, Tensor]
) -> tuple[Any, list[str]]:
    """Return transformers' model with the tensors, and the names that its head lacks."""
    with quiet(), torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        model, info = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=tensors,
            dtype=torch.float32,
            output_loading_info=True,
        )
    return model.eval(), _head_names(model, info["missing_keys"])


@torch.no_grad()
def _gives_scores(task: Any, rows: Batch, expected: Tensor) -> bool:
    """Return whether a language model's scores of the rows' tokens are the expected ones."""
    plain = Batch(rows.rows, rows.keys, {name: rows[name] for name in ("tokens", "mask")})
    scores = task.objective.logits(task.backbone, plain)[rows["mask"]]
    return _are_equal(scores, expected)


def _are_equal(scores: Tensor, expected: Tensor) -> bool:
    largest = max(1.0, float(expected.abs().max()))
    return bool((scores - expected).abs().max() <= EQUAL * largest)


def _head_names(model: Any, names: set[str]) -> list[str]:
    """Return those of the names that belong to the head and are not tied to the backbone."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    prefix = f"{model.base_model_prefix}."
    return sorted(name for name in names if not name.startswith(prefix) and name not in tied)


def _masked_head(model: Any, config: Any) -> dict[str, Tensor]:
    """Return a masked-language-model head under the objective's names.

    A bias that the family lacks is 0.
    """
    parts = auto_model.masked_head(config)
    assert parts is not None
    embedding = model.get_input_embeddings().weight
    head: dict[str, Tensor] = {}
    for prefix, path in (("transform.0", parts.dense), ("transform.2", parts.norm)):
        layer = model.get_submodule(path)
        head[f"{prefix}.weight"] = layer.weight.detach()
        bias = layer.bias
        zero = torch.zeros(len(layer.weight))
        head[f"{prefix}.bias"] = zero if bias is None else bias.detach()
    state = model.state_dict()
    head["bias"] = torch.zeros(len(embedding)) if parts.bias is None else state[parts.bias]
    return head


def _causal_head(model: Any, config: Any) -> dict[str, Tensor]:
    """Return a causal language model's output layer where it is not the embedding."""
    if auto_model.output_is_embedding(config):
        return {}
    return {"output.weight": model.get_output_embeddings().weight.detach()}


def _with_tied_output(arch: Architecture, config: Any) -> Architecture:
    """Tie the output layer to the token embedding for a causal model whose own is not kept.

    Other architectures are returned unchanged.
    """
    from transformers.models.auto import modeling_auto as auto

    family = arch.name.partition("/")[2]
    tied = auto_model.plain_config(family, {"tie_word_embeddings": True})
    is_causal = type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_causal or auto_model.output_is_embedding(config):
        return arch
    return replace(arch, options={**arch.options, "config": {**arch.options["config"], **tied}})


def _length(model: Any) -> int:
    """Return the tokens of a row: as many as the model has positions, and 512 at most."""
    return min(auto_model.positions(model) or MAX_TOKENS, MAX_TOKENS)


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers from printing its report of what was loaded, and its progress bar.

    What matters of it is reported by the callers.
    """
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _load(
    folder: str, kind: Any, config: Any, tensors: dict[str, Tensor]
) -> tuple[Any, set[str], set[str]]:
    """Return the model with a folder's weights, and the names that it lacks and that are left.

    Raises:
        BundleError: A tensor has another shape than the configuration says.
    """
    options = auto_model.pooling_arguments(kind, _holds_pooler(tensors))
    own_tensors = _own_part(kind, config, tensors)
    generators: Any = torch.random
    try:
        with quiet(), generators.fork_rng(devices=[]):
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=own_tensors,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except (RuntimeError, ValueError) as error:
        raise BundleError(
            f"hf:{folder}: its weights do not fit its {hf_text.CONFIG}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _holds_pooler(tensors: dict[str, Tensor]) -> bool:
    return any(".pooler." in f".{name}" for name in tensors)


def _own_part(kind: Any, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix that they have in a larger model.

    It is the prefix with which most of the class's own names are in the file (``vision_model.`` of
    CLIP's images).
    """
    with torch.device("meta"):
        names = list(kind(config).state_dict())
    probe = names[len(names) // 2]
    prefixes = {name.removesuffix(probe) for name in tensors if name.endswith(probe)}
    if not prefixes:
        return tensors
    best = max(
        sorted(prefixes), key=lambda prefix: sum(f"{prefix}{name}" in tensors for name in names)
    )
    return {name.removeprefix(best): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- how rows are read


def _modality(folder: str, name: str, config: Any) -> tuple[ModalitySpec, JsonObject]:
    """Return how the rows are read, and further options of the backbone.

    Raises:
        BundleError: The folder's processor is missing, or reads rows as no modality here does.
    """
    try:
        if name == "text":
            return ModalitySpec("text", {}, hf_text.tokenizer_state(folder)), {}
        if name == "image":
            return _image(folder, config), {}
        if name == "series":
            return _series(folder, config), {}
        return _audio(folder, config)
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f"hf:{error}") from None


def _image(folder: str, config: Any) -> ModalitySpec:
    """Return the image modality of a folder's image processor.

    Raises:
        ValueError: It is missing, or reads images that are not square.
    """
    processor = hf_speech.read_processor(folder, "image_processor")
    if not processor:
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} is missing, which says size, mean and standard "
            "deviation of the images; save the model again with its image processor "
            "(transformers' AutoImageProcessor, save_pretrained)"
        )
    channels = getattr(config, "num_channels", 3)
    side, options = _image_size(folder, processor)
    resample = processor.get("resample", 2)
    if resample not in RESAMPLING:
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} says resample {resample}: images are resized "
            "bilinearly (2) or bicubically (3) here"
        )
    mean, std = _image_statistics(folder, processor, channels)
    return ModalitySpec(
        "image",
        {"size": side, "channels": channels, **options, "interpolation": RESAMPLING[resample]},
        {"mean": mean, "std": std},
    )


def _image_size(folder: str, processor: HfConfig) -> tuple[int, JsonObject]:
    """Return the pixels of a side, and the options by which images are fitted to it.

    Raises:
        ValueError: Images are not square, or smaller or larger than the image modality takes.
    """
    size = processor.get("size")
    height, width, shortest = _sides(size)
    options: JsonObject = {"fit": "squash"}
    if processor.get("do_center_crop") and processor.get("crop_size"):
        side, other, _ = _sides(processor["crop_size"])
        resized = shortest or height
        # both sides are stated: they are resized to these, whatever the image's aspect
        is_squashed = isinstance(size, dict) and not shortest and bool(height)
        if is_squashed and height != width:
            side = None
        if not is_squashed:
            options = {"fit": "crop"}
        if side and resized and side < resized:
            options = {"fit": "squash_crop" if is_squashed else "crop"}
            options["crop_share"] = _share(side, resized)
    elif shortest:
        side = other = shortest
        kind = processor.get("image_processor_type") or processor.get(auto_model.EXTRACTOR_TYPE)
        is_convnext = (kind or "").startswith("ConvNext")
        share = processor.get("crop_pct", BEFORE_CROP if is_convnext else None)
        options = {"fit": "crop"} if share is None or side < 384 else {"fit": "squash"}
        if share is not None and side < 384:
            options["crop_share"] = float(share)
    else:
        side, other = height, width
    if not side or side != other or not 8 <= side <= 4096:
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} says size {processor.get('size')}, crop_size "
            f"{processor.get('crop_size')}: images are squares of 8 to 4096 pixels a side here"
        )
    return side, options


def _image_statistics(
    folder: str, processor: HfConfig, channels: int
) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each channel, of pixels from 0 to 1.

    Raises:
        ValueError: They are not numbers for each channel, or pixels are scaled in another way.
    """
    rescales = processor.get("do_rescale", True)
    factor = processor.get("rescale_factor", 1 / LEVELS)
    offset = processor.get("rescale_offset", False)
    if rescales and (offset or abs(factor * LEVELS - 1) > EQUAL):
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} says rescale_factor {factor}, rescale_offset "
            f"{offset}: levels of pixels are divided by {LEVELS} here; write it with do_rescale: "
            "false, and image_mean and image_std in levels from 0 to 255 that do the same"
        )
    normalizes = processor.get("do_normalize", True)
    mean: Any = processor.get("image_mean") if normalizes else [0.0] * channels
    std: Any = processor.get("image_std") if normalizes else [1.0] * channels
    if not _are_numbers(mean, channels) or not _are_numbers(std, channels):
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} says image_mean {mean}, image_std {std}: a "
            f"number for each of {channels} channels was expected"
        )
    if rescales:
        return list(mean), list(std)
    # the processor's mean and deviation are of levels from 0 to 255
    return [value / LEVELS for value in mean], [value / LEVELS for value in std]


def _share(side: int, resized: int) -> float:
    """Return the share of the resized image that is kept; ``int(side / share)`` is ``resized``."""
    share = side / resized
    return share if int(side / share) == resized else math.nextafter(share, 0.0)


def _are_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list):
        return False
    items = cast("list[Any]", values)
    return len(items) == count and all(isinstance(value, int | float) for value in items)


def _sides(size: Any) -> tuple[int | None, int | None, int | None]:
    """Return height, width and shortest edge of a processor's size; None for those it lacks."""
    if isinstance(size, int):
        return size, size, None
    stated = as_object(size)
    sides = [stated.get(key) for key in ("height", "width", "shortest_edge")]
    height, width, shortest = (side if isinstance(side, int) else None for side in sides)
    return height, width, shortest


def _series(folder: str, config: Any) -> ModalitySpec:
    """Return the series modality of a model.

    preprocessor_config.json, where `export` wrote it (`_write_processor`), holds mean and std.
    Otherwise numbers are read as they are.

    Raises:
        ValueError: The file does not hold a number for each channel.
    """
    channels: int = config.num_input_channels
    stored = hf_speech.read_object(folder, hf_speech.PREPROCESSOR)
    state: dict[str, Any] = {"mean": [0.0] * channels, "std": [1.0] * channels}
    state |= {key: stored[key] for key in ("mean", "std", "names") if key in stored}
    names: list[str] = state.get("names", [""] * channels)
    has_numbers = all(_are_numbers(state[key], channels) for key in ("mean", "std"))
    if len(names) != channels or not has_numbers:
        stated = [
            f"{key} {str(stored[key])[:60]}" for key in ("mean", "std", "names") if key in stored
        ]
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} has {', '.join(stated)}; each must have "
            f"{channels} values, one for each channel"
        )
    options: JsonObject = {"length": config.context_length}
    options |= {key: stored[key] for key in ("cut", "missing") if key in stored}
    return ModalitySpec("series", options, state)


def _audio(folder: str, config: Any) -> tuple[ModalitySpec, JsonObject]:
    """Return the audio modality of a folder's feature extractor, and the backbone's ``processor``.

    Raises:
        ValueError: The extractor is missing or of another kind.
    """
    if getattr(config, "conv_kernel", None) is not None:
        return hf_speech.modality(folder), {}
    content = hf_speech.read_processor(folder, "feature_extractor")
    if not content:
        raise ValueError(
            f"{folder}: {hf_speech.PREPROCESSOR} is missing, which says how spectrograms are "
            "made; save the model again with its feature extractor (transformers' "
            "AutoFeatureExtractor, save_pretrained)"
        )
    named: Any = content.get(auto_model.EXTRACTOR_TYPE)
    extractor_type: Any = auto_model.extractor_class(config, named)
    keys = auto_model.extractor_keys(extractor_type)
    plain = {key: value for key, value in content.items() if key in keys}
    extractor = extractor_type(**plain)
    options: JsonObject = {"rate": extractor.sampling_rate, "features": "wave"}
    options["normalize"] = False
    longest = auto_model.longest_seconds(extractor)
    if longest is not None:
        options["max_seconds"] = longest
    return (
        ModalitySpec("audio", options, {"features": "wave", "normalize": False}),
        {"processor": {auto_model.EXTRACTOR_TYPE: extractor_type.__name__, **plain}},
    )


# ---------------------------------------------------------------- writing


def write(saved: bundle.Bundle, folder: Path, backbone_only: bool) -> str:
    """Write a bundle as transformers' save_pretrained does: model, configuration and processor.

    A linear head is written beside the plain model, with the code that joins them
    (``classifier_export``).

    Returns:
        What was written, in words.

    Raises:
        BundleError: transformers has no class for the backbone alone, or the head is not linear.
    """
    has_head = saved.manifest.has_head and not backbone_only
    task = saved.task() if has_head else None
    backbone: Any = task.backbone if task is not None else saved.backbone()
    require_plain(saved, backbone)
    if task is not None and not classifier_export.is_exportable(task):
        raise BundleError(
            f"{saved.uri}: the head of {saved.manifest.objective.name} is not a linear layer, and "
            f"heads of {saved.manifest.arch.name} are written as one; --backbone-only writes the "
            "plain model, --kind state-dict all tensors"
        )
    _write_processor(
        saved, backbone, folder, words=has_head and hf_text.splits_words(saved.manifest)
    )
    with quiet():
        backbone.model.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    text = f"{type(backbone.model).__name__} with {count} parameters"
    is_image = saved.manifest.modality.name == "image"
    if is_image and saved.manifest.arch.inputs.get("channels") == 1:
        text += ", whose image processor reads grey images of 8 bits (convert others to mode L)"
    if task is None:
        arguments = ", ".join(f"{name}={value}" for name, value in backbone.call_arguments.items())
        text += f", to be called with {arguments}" if arguments else ""
        return text
    lacking = "heads of this family are written with the code that joins them"
    return hf_text.write_head(task, saved.modality(), folder, text, lacking)


def require_plain(saved: bundle.Bundle, backbone: Any) -> None:
    """Raise BundleError for an encoder that transformers builds with its decoder only."""
    if not auto_model.is_plain(backbone.model):
        whole = auto_model.model_class(backbone.model.config).__name__
        raise BundleError(
            f"{saved.uri}: transformers has no class for the encoder of {whole} alone; take "
            "--kind state-dict"
        )


def _write_processor(saved: bundle.Bundle, backbone: Any, folder: Path, words: bool) -> None:
    """Write the tokenizer, or preprocessor_config.json.

    Args:
        words: Whether rows are lists of words (`hf_text.with_post_processor`).

    Raises:
        BundleError: No image processor of transformers prepares images so.
    """
    modality: Any = saved.modality()
    config = backbone.model.config
    name = saved.manifest.modality.name
    if name == "text":
        hf_text.write_tokenizer(modality, folder, config, words)
        return
    if name == "series":
        # transformers has no processor for series
        read = modality.options.model_dump(include={"cut", "missing"})
        hf_text.write_json(folder / hf_speech.PREPROCESSOR, {**read, **modality.state})
        return
    if name == "audio":
        extractor = backbone.extractor
        if extractor is not None:
            extractor.save_pretrained(folder)
            return
        extractor_config = hf_speech.extractor_config(config, modality)
        hf_text.write_json(folder / hf_speech.PREPROCESSOR, extractor_config)
        return
    options = modality.options
    side = options.size
    numbers = {value: key for key, value in RESAMPLING.items()}
    if options.fit == "pad":
        raise BundleError(
            f"{saved.uri}: its images are padded to squares (fit: pad), and no image processor of "
            "transformers does that: take --kind state-dict, or onnx, whose README has the code; "
            "or train with fit: crop or squash"
        )
    crops = options.fit in ("crop", "squash_crop")
    resized_side = int(side / options.crop_share)  # as the modality does
    resized = {"shortest_edge": resized_side}
    if options.fit == "squash_crop":
        resized = {"height": resized_side, "width": resized_side}
    hf_text.write_json(
        folder / hf_speech.PREPROCESSOR,
        {
            "image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor",
            "do_convert_rgb": options.channels == 3,
            "do_resize": True,
            "size": resized if crops else {"height": side, "width": side},
            "do_center_crop": crops,
            **({"crop_size": {"height": side, "width": side}} if crops else {}),
            "resample": numbers[options.interpolation],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(modality.state["mean"]),
            "image_std": list(modality.state["std"]),
        },
    )
