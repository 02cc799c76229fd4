"""What a folder of transformers holds for speech beside its weights, both ways: wav2vec 2.0
(Baevski et al. 2020) with its preprocessor and CTC labels.

`hf_text` reads and writes the folders; here are the words of their JSON files. Errors are
ValueErrors that begin with the folder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.contracts import Modality
from pipeline.core.specs import ModalitySpec
from pipeline.io import storage

PREPROCESSOR, PROCESSOR, VOCABULARY, TOKENIZER_CONFIG = (
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.json",
    "tokenizer_config.json",
)
FILES = (PREPROCESSOR, PROCESSOR, VOCABULARY, TOKENIZER_CONFIG)
PREFIX = "wav2vec2."
OBJECTIVES = ("wav2vec2", "ctc", "classification", "multilabel", "none")
"""For whose heads transformers has a class."""
BLANK, PAD, SPACE = "<blank>", "<pad>", "|"
"""What stands for no label, here and there, and for the space there."""
EXTRACTOR = "Wav2Vec2FeatureExtractor"
QUANTIZER = (
    "quantizer.codevectors",
    "quantizer.weight_proj.weight",
    "quantizer.weight_proj.bias",
    "project_hid.weight",
    "project_hid.bias",
    "project_q.weight",
    "project_q.bias",
)
"""Names of the pretraining head, there and here."""


# ---------------------------------------------------------------- reading


def modality(folder: str) -> ModalitySpec:
    """The audio modality of a folder's feature extractor: its rate, and whether recordings are
    normalised. Raises ValueError for another kind.
    """
    extractor_config = _json(folder, PREPROCESSOR) or _json(folder, PROCESSOR).get(
        "feature_extractor"
    )
    if not isinstance(extractor_config, dict) or not extractor_config:
        raise ValueError(
            f"{folder}: {PREPROCESSOR} is missing, which says the rate of the samples; save "
            "the model again with its feature extractor "
            "(transformers' AutoFeatureExtractor, save_pretrained)"
        )
    rate, normalize, kind = (
        extractor_config.get("sampling_rate"),
        extractor_config.get("do_normalize", True),
        extractor_config.get("feature_extractor_type", EXTRACTOR),
    )
    if (
        kind != EXTRACTOR
        or extractor_config.get("feature_size", 1) != 1
        or not isinstance(rate, int)
        or not isinstance(normalize, bool)
    ):
        raise ValueError(
            f"{folder}: {PREPROCESSOR} is none of samples (feature_extractor_type {kind}, "
            f"feature_size {extractor_config.get('feature_size', 1)}, "
            f"sampling_rate {rate}, do_normalize {normalize}); wav2vec 2.0 has a {EXTRACTOR} "
            "of feature_size 1"
        )
    return ModalitySpec(
        "audio",
        {"rate": rate, "features": "wave", "normalize": normalize},
        {"features": "wave", "normalize": normalize},
    )


def heads(
    folder: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...] | None, dict[str, str]]:
    """(tensors of the heads under our objectives' names, labels of the CTC head, why there is no
    head for an objective).
    """
    found: dict[str, dict[str, Tensor]] = {}
    headless: dict[str, str] = {}
    if all(name in tensors for name in QUANTIZER):
        found["wav2vec2"] = {
            **{name: tensors[name] for name in QUANTIZER},
            "progress": torch.zeros(()),
        }
    else:
        headless["wav2vec2"] = "the checkpoint holds none of Wav2Vec2ForPreTraining"
    labels = None
    if "lm_head.weight" not in tensors:
        headless["ctc"] = "the checkpoint holds none of Wav2Vec2ForCTC"
    elif isinstance(named := _labels(folder, config, len(tensors["lm_head.weight"])), str):
        headless["ctc"] = named
    else:
        labels, rows = tuple(named), torch.tensor([*named.values()])
        found["ctc"] = {
            f"head.{part}": tensors[f"lm_head.{part}"][rows] for part in ("weight", "bias")
        }
    return found, labels, headless


def _labels(folder: str, config: dict[str, Any], count: int) -> dict[str, int] | str:
    """Our labels, the blank first, and their rows in the head: its special tokens but the blank,
    which no transcript holds, are left out. Else why not.
    """
    vocabulary, token_config = (
        _json(folder, VOCABULARY),
        {**_json(folder, "special_tokens_map.json"), **_json(folder, TOKENIZER_CONFIG)},
    )
    if not vocabulary or not all(
        isinstance(number, int) and 0 <= number < count for number in vocabulary.values()
    ):
        return (
            f"its {VOCABULARY} does not say what the {count} rows of its output stand for"
            if vocabulary
            else f"the folder has no {VOCABULARY}"
        )
    blank, delimiter = (
        config.get("pad_token_id", 0),
        _token(token_config, "word_delimiter_token", SPACE),
    )
    named = {number: " " if token == delimiter else token for token, number in vocabulary.items()}
    special = {
        _token(token_config, role, token)
        for role, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    return {
        BLANK: blank,
        **{
            token: number
            for number, token in sorted(named.items())
            if number != blank and token not in special
        },
    }


def _token(token_config: dict[str, Any], role: str, usual: str) -> str | None:
    value = token_config.get(role, usual)
    return value.get("content") if isinstance(value, dict) else value


def _json(folder: str, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is none."""
    path = storage.join(folder, name)
    found = storage.read_json(path) if storage.exists(path) else {}
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: not a JSON object; save the model again with transformers' save_pretrained"
        )
    return found


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Folder:
    """A model of transformers: the ``kind`` of its class, ``config`` and ``tensors``, and the JSON
    ``files`` beside them.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    files: dict[str, Any] = field(default_factory=dict)


def export_folder(backbone: Any, objective: Any, reader: Modality) -> Folder:
    """The folder of a wav2vec 2.0 backbone, with its head where an ``objective`` is given. Raises
    ValueError for a head that transformers has no class for.
    """
    config, tensors = (
        copy.deepcopy(backbone.model.config),
        {name: tensor.detach() for name, tensor in backbone.model.state_dict().items()},
    )
    options: Any = reader.options
    normalize = (
        reader.state.get("normalize", True) if options.normalize is None else options.normalize
    )
    files: dict[str, Any] = {
        PREPROCESSOR: {
            "feature_extractor_type": EXTRACTOR,
            "feature_size": 1,
            "sampling_rate": options.rate,
            "do_normalize": normalize,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": config.feat_extract_norm == "layer",
        }
    }
    if objective is None:
        return Folder("Wav2Vec2Model", config, tensors, files)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    own, name = (
        {key: tensor.detach() for key, tensor in objective.state_dict().items()},
        objective.registered_name,
    )
    if name == "wav2vec2":
        o = objective.options
        (
            config.num_codevector_groups,
            config.num_codevectors_per_group,
            config.codevector_dim,
            config.proj_codevector_dim,
        ) = (o.groups, o.entries, o.code_width, o.width)
        (
            config.num_negatives,
            config.contrastive_logits_temperature,
            config.diversity_loss_weight,
        ) = o.negatives, o.temperature, o.diversity
        config.feat_quantizer_dropout, config.mask_time_prob, config.mask_time_length = (
            o.dropout,
            o.mask_start * o.mask_length,
            o.mask_length,
        )
        return Folder(
            "Wav2Vec2ForPreTraining",
            config,
            {**tensors, **{key: own[key] for key in QUANTIZER}},
            files,
        )
    if getattr(objective.options, "norm", False):
        raise ValueError(
            "the head has a layer norm before its linear layer, Wav2Vec2ForCTC of "
            "transformers has none. Train with objective option norm: "
            "false to export it, or give --backbone-only for the plain model"
        )
    if name == "ctc":
        vocabulary = _vocabulary(objective)
        config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = (
            len(vocabulary),
            0,
            None,
            None,
        )
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
        return Folder(
            "Wav2Vec2ForCTC",
            config,
            {**tensors, **{f"lm_head.{part}": own[f"head.{part}"] for part in ("weight", "bias")}},
            files,
        )
    labels, width = (
        objective.state["labels"],
        config.hidden_size,
    )  # its projector comes before the mean over frames: the identity changes nothing
    config.classifier_proj_size, config.use_weighted_layer_sum = width, False
    config.id2label, config.label2id = (
        dict(enumerate(labels)),
        {label: number for number, label in enumerate(labels)},
    )
    config.problem_type = (
        "single_label_classification" if name == "classification" else "multi_label_classification"
    )
    return Folder(
        "Wav2Vec2ForSequenceClassification",
        config,
        {
            **tensors,
            "projector.weight": torch.eye(width),
            "projector.bias": torch.zeros(width),
            **{
                f"classifier.{part}": own[f"head.{part}"] / objective.state.get("temperature", 1.0)
                for part in ("weight", "bias")
            },
        },
        files,
    )


def _vocabulary(objective: Any) -> dict[str, int]:
    """Token to row of a CTC head. Raises ValueError for sub-words, an alphabet with the sign that
    stands for the space, and layers that transformers' head has not.
    """
    if objective.state.get("units", "characters") != "characters":
        raise ValueError(
            "Wav2Vec2CTCTokenizer of transformers joins characters, this head's labels are "
            "sub-words. Train with objective option units: "
            "characters to export it, or give --backbone-only for the plain model"
        )
    if any(
        not isinstance(part, (nn.Linear, nn.Dropout))
        for part in objective.children()
        if next(part.parameters(), None) is not None
    ):
        raise ValueError(
            "the head has convolutions before its linear layer, Wav2Vec2ForCTC of "
            "transformers has none. Train with objective option "
            "convolutions: 0 to export it, or give --backbone-only for the plain model"
        )
    labels = objective.state["labels"]
    if (
        SPACE in labels
    ):  # transformers 5.23 forgets another word_delimiter_token when it reads the tokenizer
        raise ValueError(
            f"{SPACE!r} is one of this head's labels, and Wav2Vec2CTCTokenizer of transformers "
            "writes the space so. Train with objective option "
            "punctuation: drop to export it, or give --backbone-only for the plain model"
        )
    return {
        PAD if label == BLANK else SPACE if label == " " else label: number
        for number, label in enumerate(labels)
    }
