"""Folders of transformers for speech: wav2vec 2.0, its preprocessor and its CTC labels.

wav2vec 2.0 is by Baevski et al. (2020). `hf_text` reads and writes the folders; this module knows
their JSON files, in both directions. Errors are ValueErrors that begin with the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.hf_config import HfConfig
from pipeline.core.contracts import Modality
from pipeline.core.contracts.objective_capabilities import (
    TransformersHead,
    output_scale,
    transformers_head,
)
from pipeline.core.specs import ModalitySpec
from pipeline.io import storage
from pipeline.io.json_values import Json, JsonObject, as_object

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
VOCABULARY, TOKENIZER_CONFIG = "vocab.json", "tokenizer_config.json"
FILES = (PREPROCESSOR, PROCESSOR, VOCABULARY, TOKENIZER_CONFIG)
PREFIX = "wav2vec2."
BLANK, PAD, SPACE = "<blank>", "<pad>", "|"
"""What stands for no label (here and in transformers), and for the space in transformers."""
EXTRACTOR = "Wav2Vec2FeatureExtractor"


# ---------------------------------------------------------------- reading


def modality(folder: str) -> ModalitySpec:
    """Return the audio modality of a folder's feature extractor.

    It has the extractor's sampling rate, and whether recordings are normalised.

    Raises:
        ValueError: The feature extractor is missing or of another kind.
    """
    extractor_config = read_processor(folder, "feature_extractor")
    if not extractor_config:
        raise ValueError(
            f"{folder}: {PREPROCESSOR} is missing, which says the rate of the samples; save the "
            "model again with its feature extractor (transformers' AutoFeatureExtractor, "
            "save_pretrained)"
        )
    rate = extractor_config.get("sampling_rate")
    normalize = extractor_config.get("do_normalize", True)
    kind = extractor_config.get("feature_extractor_type", EXTRACTOR)
    size = extractor_config.get("feature_size", 1)
    reads_samples = kind == EXTRACTOR and size == 1
    if not reads_samples or not isinstance(rate, int) or not isinstance(normalize, bool):
        raise ValueError(
            f"{folder}: {PREPROCESSOR} is not that of a model of samples (feature_extractor_type "
            f"{kind}, feature_size {size}, sampling_rate {rate}, do_normalize {normalize}); "
            f"wav2vec 2.0 has a {EXTRACTOR} of feature_size 1"
        )
    return ModalitySpec(
        "audio",
        {"rate": rate, "features": "wave", "normalize": normalize},
        {"features": "wave", "normalize": normalize},
    )


def heads(
    folder: str,
    config: HfConfig,
    tensors: dict[str, Tensor],
    declared: Mapping[str, TransformersHead],
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...] | None, dict[str, str]]:
    """Return the heads of a folder's checkpoint.

    Args:
        declared: Heads for which transformers has a class of wav2vec 2.0, by objective.

    Returns:
        The tensors of each head under our names, by objective; the labels of the CTC head; and for
        other objectives why there is no head.
    """
    tensors_of: dict[str, dict[str, Tensor]] = {}
    no_head_reasons: dict[str, str] = {}
    labels = None
    for objective, head in declared.items():
        if not head.tensors:
            continue
        if any(theirs not in tensors for _, theirs in head.tensors):
            no_head_reasons[objective] = f"the checkpoint holds none of Wav2Vec2{head.model}"
            continue
        own = {ours: tensors[theirs] for ours, theirs in head.tensors}
        if head.model == "ForCTC":
            named = _labels(folder, config, len(tensors["lm_head.weight"]))
            if isinstance(named, str):
                no_head_reasons[objective] = named
                continue
            labels, rows = tuple(named), torch.tensor([*named.values()])
            own = {name: tensor[rows] for name, tensor in own.items()}
        tensors_of[objective] = own
    return tensors_of, labels, no_head_reasons


def _labels(folder: str, config: HfConfig, count: int) -> dict[str, int] | str:
    """Return our labels, the blank first, with their rows in the CTC head, or why there are none.

    Special tokens other than the blank are left out, because no transcript holds them.
    """
    numbers = read_object(folder, VOCABULARY)
    if not numbers:
        return f"the folder has no {VOCABULARY}"
    vocabulary = {
        token: number
        for token, number in numbers.items()
        if isinstance(number, int) and 0 <= number < count
    }
    if len(vocabulary) < len(numbers):
        return f"its {VOCABULARY} does not say what the {count} rows of its output stand for"
    token_config = read_object(folder, "special_tokens_map.json") | read_object(
        folder, TOKENIZER_CONFIG
    )
    blank = config.get("pad_token_id", 0)
    delimiter = _token(token_config, "word_delimiter_token", SPACE)
    named = {number: " " if token == delimiter else token for token, number in vocabulary.items()}
    usual_tokens = (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    special = {_token(token_config, role, usual) for role, usual in usual_tokens}
    labels = {BLANK: blank}
    for number, token in sorted(named.items()):
        if number != blank and token not in special:
            labels[token] = number
    return labels


def _token(token_config: JsonObject, role: str, usual: str) -> str | None:
    """Return a special token by its role."""
    value = token_config.get(role, usual)
    token = value.get("content") if isinstance(value, dict) else value
    return token if isinstance(token, str) else None


def read_object(folder: str, name: str) -> JsonObject:
    """Return a JSON object of the folder; empty where the file is missing."""
    path = storage.join(folder, name)
    content: Json = storage.read_json(path) if storage.exists(path) else {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: not a JSON object; save the model again with transformers' save_pretrained"
        )
    return content


def read_processor(folder: str, part: str) -> HfConfig:
    """Return the content of preprocessor_config.json, or the part of processor_config.json."""
    return read_object(folder, PREPROCESSOR) or as_object(read_object(folder, PROCESSOR).get(part))


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Folder:
    """A model of transformers, to be written as a folder.

    Attributes:
        kind: Name of its class.
        config: Its configuration.
        tensors: Its weights.
        files: Further JSON files beside them.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    files: dict[str, JsonObject] = field(default_factory=dict[str, JsonObject])


def extractor_config(config: Any, reader: Modality) -> JsonObject:
    """Return the content of preprocessor_config.json for a model that reads samples."""
    options: Any = reader.options
    normalize = options.normalize
    if normalize is None:
        normalize = reader.state.get("normalize", True)
    return {
        "feature_extractor_type": EXTRACTOR,
        "feature_size": 1,
        "sampling_rate": options.rate,
        "do_normalize": normalize,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.feat_extract_norm == "layer",
    }


def export_folder(backbone: Any, objective: Any, reader: Modality) -> Folder:
    """Return a wav2vec 2.0 backbone as a folder, with its head where an ``objective`` is given.

    Raises:
        ValueError: transformers has no class for the head.
    """
    config = copy.deepcopy(backbone.model.config)
    tensors = {name: tensor.detach() for name, tensor in backbone.model.state_dict().items()}
    files: dict[str, JsonObject] = {PREPROCESSOR: extractor_config(config, reader)}
    if objective is None:
        return Folder("Wav2Vec2Model", config, tensors, files)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    own = {key: tensor.detach() for key, tensor in objective.state_dict().items()}
    exported = transformers_head(objective)
    assert exported is not None
    kind = f"Wav2Vec2{exported.model}"
    if exported.model == "ForPreTraining":
        o = objective.options
        config.num_codevector_groups = o.groups
        config.num_codevectors_per_group = o.entries
        config.codevector_dim = o.code_width
        config.proj_codevector_dim = o.width
        config.num_negatives = o.negatives
        config.contrastive_logits_temperature = o.temperature
        config.diversity_loss_weight = o.diversity
        config.feat_quantizer_dropout = o.dropout
        config.mask_time_prob = o.mask_start * o.mask_length
        config.mask_time_length = o.mask_length
        tensors |= {theirs: own[ours] for ours, theirs in exported.tensors}
        return Folder(kind, config, tensors, files)
    if getattr(objective.options, "norm", False):
        raise ValueError(
            "the head has a layer norm before its linear layer, Wav2Vec2ForCTC of "
            "transformers has none. Train with objective option norm: "
            "false to export it, or give --backbone-only for the plain model"
        )
    if exported.model == "ForCTC":
        vocabulary = _vocabulary(objective)
        config.vocab_size, config.pad_token_id = len(vocabulary), 0
        config.bos_token_id = config.eos_token_id = None
        config.final_dropout = objective.options.dropout
        files |= {
            VOCABULARY: vocabulary,
            TOKENIZER_CONFIG: {
                "tokenizer_class": "Wav2Vec2CTCTokenizer",
                "processor_class": "Wav2Vec2Processor",
                "pad_token": PAD,
                "word_delimiter_token": SPACE,
                "replace_word_delimiter_char": " ",
                "bos_token": None,
                "eos_token": None,
                "unk_token": "<unk>",
                "do_lower_case": False,
            },
        }
        files[PREPROCESSOR]["processor_class"] = "Wav2Vec2Processor"
        tensors |= {theirs: own[ours] for ours, theirs in exported.tensors}
        return Folder(kind, config, tensors, files)
    labels: list[str] = objective.state["labels"]
    width = config.hidden_size
    config.classifier_proj_size, config.use_weighted_layer_sum = width, False
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = exported.problem_type
    # the class's projector comes before the mean over frames: the identity changes nothing
    tensors |= {"projector.weight": torch.eye(width), "projector.bias": torch.zeros(width)}
    divisor = objective.state.get("temperature", 1.0)
    scale, mean = output_scale(objective)
    tensors["classifier.weight"] = own["head.weight"] / divisor * scale
    tensors["classifier.bias"] = own["head.bias"] / divisor * scale + mean
    return Folder(kind, config, tensors, files)


def _vocabulary(objective: Any) -> JsonObject:
    """Return a dict from token to row of a CTC head.

    Raises:
        ValueError: transformers cannot read the head: its labels are sub-words, or one of them is
            the sign for the space, or it has layers that transformers' head lacks.
    """
    if objective.state.get("units", "characters") != "characters":
        raise ValueError(
            "Wav2Vec2CTCTokenizer of transformers joins characters, this head's labels are "
            "sub-words. Train with objective option units: characters to export it, or give "
            "--backbone-only for the plain model"
        )
    parts = [part for part in objective.children() if next(part.parameters(), None) is not None]
    if not all(isinstance(part, (nn.Linear, nn.Dropout)) for part in parts):
        raise ValueError(
            "the head has convolutions before its linear layer, Wav2Vec2ForCTC of transformers has "
            "none. Train with objective option convolutions: 0 to export it, or give "
            "--backbone-only for the plain model"
        )
    labels = objective.state["labels"]
    # transformers 5.23 forgets another word_delimiter_token when it reads the tokenizer
    if SPACE in labels:
        raise ValueError(
            f"{SPACE!r} is one of this head's labels, and Wav2Vec2CTCTokenizer of transformers "
            "writes the space so. Train with objective option punctuation: drop to export it, or "
            "give --backbone-only for the plain model"
        )
    theirs: dict[str, str] = {BLANK: PAD, " ": SPACE}
    return {theirs.get(label) or label: number for number, label in enumerate(labels)}
