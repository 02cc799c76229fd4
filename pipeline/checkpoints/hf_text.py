"""Read and write folders of transformers (config, weights and tokenizer), and write those of timm.

Families are BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), DistilBERT (Sanh et al. 2019),
GPT-2 (Radford et al. 2019) and, for recordings (`hf_speech`), wav2vec 2.0 (Baevski et al. 2020).
Names of backbone tensors are ``model.`` and transformers' own; heads have transformers' names in
the folder and the objectives' names here.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import (
    load,
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from tokenizers import Tokenizer, normalizers, processors
from torch import Tensor

from pipeline.checkpoints import bundle, classifier_export, hf_speech
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import hf_config, registry
from pipeline.config.hf_config import HfConfig
from pipeline.core.contracts import Task
from pipeline.core.contracts.objective_capabilities import (
    TransformersHead,
    output_scale,
    transformers_head,
)
from pipeline.core.specs import Architecture, ModalitySpec, State
from pipeline.io import storage
from pipeline.io.json_values import as_object
from pipeline.media import tokenization

FAMILIES = {
    "bert": ("Bert", "bert."),
    "roberta": ("Roberta", "roberta."),
    "distilbert": ("DistilBert", "distilbert."),
    "gpt2": ("GPT2", "transformer."),
    "wav2vec2": ("Wav2Vec2", hf_speech.PREFIX),
}
"""For each family the prefix of its classes, and of its tensors where a model has a head."""
MASKED = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "cls.predictions.decoder",
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
    "distilbert": (
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector.bias",
        "vocab_projector",
    ),
}
"""For each family the parts of its masked-language-model head.

They are the dense layer, the layer norm, the bias, and the output that is tied to the embedding.
"""
HEADS = (
    "cls.",
    "lm_head.",
    "classifier.",
    "pre_classifier.",
    "qa_outputs.",
    "score.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "quantizer.",
    "project_hid.",
    "project_q.",
    "projector.",
)
POOLS = {"bert": "pooler", "roberta": "pooler", "distilbert": "first", "gpt2": "last"}
"""The feature that ForSequenceClassification of each family reads."""
SEQUENCE = "ForSequenceClassification"
"""The class of a linear head on one feature of a row."""
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MAX_HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file, by its format."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a folder, under the backbone's names.

    Attributes:
        ignored_prefixes: Of tensors that the backbone need not have.
        heads: Tensors of each head under the objective's names, by objective.
        labels: What the rows of a head stand for, where it has one row a label.
        no_head_reasons: Why there is no head, by the name of the objective.
        notes: Sentences on what is not read as the folder says.
    """

    arch: Architecture
    modality: ModalitySpec
    tensors: dict[str, Tensor]
    ignored_prefixes: tuple[str, ...]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    labels: tuple[str, ...] | None = None
    no_head_reasons: dict[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- reading


def read(folder: str, config: HfConfig, names_only: bool = False) -> Checkpoint:
    """Return the checkpoint in a folder.

    Args:
        config: The content of the folder's config.json.
        names_only: As in `read_safetensors`.

    Raises:
        BundleError: Something is missing or does not fit; the message says what to do.
    """
    family = _family(folder, config)
    try:
        built = hf_config.plain(family, config)
    except ValueError as error:
        raise BundleError(f"{storage.join(folder, CONFIG)}: {error}") from None
    weights = weight_files(folder)
    if family == "wav2vec2":
        return _speech(folder, config, built, _weights(folder, weights, names_only))
    if not storage.exists(storage.join(folder, TOKENIZER)):
        raise BundleError(
            f"hf:{folder}: {TOKENIZER} is missing; save the model again with transformers' "
            "save_pretrained, and its tokenizer"
        )
    tensors = _current_names(_weights(folder, weights, names_only), FAMILIES[family][1])
    if family == "roberta" and "pooler.dense.weight" not in tensors:
        # RobertaForSequenceClassification has its pooler in the classifier
        tensors = {
            name.replace("classifier.dense.", "pooler.dense."): tensor
            for name, tensor in tensors.items()
        }
    state = tokenizer_state(folder)
    embedding = tensors.get(_embedding(family))
    rows = config.get("vocab_size", 0) if embedding is None else embedding.shape[0]
    if state["vocabulary"] > rows:
        raise BundleError(
            f"hf:{folder}: its tokenizer has {state['vocabulary']} tokens, the embedding of "
            f"its model has {rows}: they do not belong together, or the model was not resized "
            "(resize_token_embeddings) after tokens were added"
        )
    length = min(_positions(family, config), 512)
    modality = ModalitySpec("text", {"length": length}, state)
    inputs = bundle.build_modality(modality).inputs()
    arch = Architecture(f"transformers/{family}", {"config": built}, inputs)
    heads, labels, no_head_reasons = _heads(family, config, tensors)
    masks = tuple(
        f"model.{name}" for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))
    )
    prefixes = tuple(f"model.{head}" for head in ("pooler.", *HEADS))
    ignored_prefixes = (*prefixes, "model.embeddings.position_ids", *masks)
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint(arch, modality, named, ignored_prefixes, heads, labels, no_head_reasons)


def _speech(
    folder: str, config: HfConfig, built: dict[str, Any], tensors: dict[str, Tensor]
) -> Checkpoint:
    """Return a wav2vec 2.0 checkpoint.

    A model that was trained without masks (mask_time_prob: 0) has no embedding for them, and one
    that was published without it gets a new one.
    """
    tensors = _current_names(tensors, hf_speech.PREFIX)
    try:
        modality = hf_speech.modality(folder)
        declared = declared_heads("wav2vec2")
        heads, labels, no_head_reasons = hf_speech.heads(folder, config, tensors, declared)
    except ValueError as error:
        raise BundleError(f"hf:{error}") from None
    arch = Architecture(
        "transformers/wav2vec2", {"config": built}, bundle.build_modality(modality).inputs()
    )
    ignored_prefixes = (*(f"model.{head}" for head in HEADS), "model.masked_spec_embed")
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return Checkpoint(arch, modality, named, ignored_prefixes, heads, labels, no_head_reasons)


def _family(folder: str, config: HfConfig) -> str:
    """Return the family of a configuration. Raise BundleError for one that cannot be read."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BundleError(
            f"hf:{folder}: model_type {family!r} has no adapter; families are "
            f"{', '.join(FAMILIES)}. Image models are read as timm writes "
            "them (timm.models.save_for_hf: config.json with its architecture), or as init: "
            "file:PATH beside backbone: timm/NAME"
        )
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise BundleError(
            f"hf:{folder}: position_embedding_type {positions!r} in {CONFIG}: transformers "
            "computes absolute positions only; take another model"
        )
    for key in ("is_decoder", "add_cross_attention"):
        if config.get(key) and family != "gpt2":
            raise BundleError(
                f"hf:{folder}: {CONFIG} says {key}: true; a {family} is read as an encoder, "
                "take a checkpoint of one"
            )
    return family


def weight_files(folder: str) -> list[str]:
    """Return the files that hold a folder's weights.

    They are ``model.safetensors``, or the shards that its index names.

    Raises:
        BundleError: A file is missing, or the index is none.
    """
    whole, index = storage.join(folder, MODEL), storage.join(folder, INDEX)
    if storage.exists(whole):
        return [whole]
    if not storage.exists(index):
        raise BundleError(
            f"hf:{folder}: {MODEL} is missing; save the model again with transformers' "
            "save_pretrained (safetensors)"
        )
    where = as_object(as_object(storage.read_json(index)).get("weight_map"))
    names = {name for name in where.values() if isinstance(name, str)}
    are_shards = all(name.endswith(".safetensors") and "/" not in name for name in names)
    if not where or not are_shards or not all(isinstance(name, str) for name in where.values()):
        raise BundleError(
            f"{index}: no index of shards (weight_map: tensor names to .safetensors files of "
            "this folder); save the model again"
        )
    shards = [storage.join(folder, name) for name in sorted(names)]
    if absent := [shard for shard in shards if not storage.exists(shard)]:
        raise BundleError(
            f"{absent[0]} is missing: {INDEX} names {len(shards)} shards, {len(absent)} of "
            "them are not there; copy the whole folder"
        )
    return shards


def read_weights(folder: str, names_only: bool = False) -> dict[str, Tensor]:
    """Return the tensors in a folder's weight files. Raises BundleError as `weight_files` does."""
    return _weights(folder, weight_files(folder), names_only)


def read_safetensors(uri: str, names_only: bool = False) -> dict[str, Tensor]:
    """Return the tensors in a file.

    A local file is mapped into memory: names and shapes are read now, values when they are used.

    Args:
        names_only: Whether names and shapes are enough. Of a remote file only the header is then
            read, and the tensors hold zeros.
    """
    if not names_only or not storage.is_remote(uri):
        return storage.read_as(uri, lambda path: load_file(path), load)
    with storage.open_read(uri) as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
        size = file.seek(0, os.SEEK_END)
    # a file of the same size whose other bytes are a hole: it takes no room on disk or in memory
    with storage.scratch_folder() as folder:
        path = folder / MODEL
        path.write_bytes(length + header)
        os.truncate(path, size)
        return load_file(path)  # stays mapped when the file is removed


def _weights(folder: str, files: list[str], names_only: bool) -> dict[str, Tensor]:
    """Return the tensors in some weight files."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= read_safetensors(file, names_only)
        except SafetensorError as error:
            raise BundleError(f"{file}: not a safetensors file ({error}); copy it again") from error
    if files[0] != storage.join(folder, MODEL):
        named = storage.read_json(storage.join(folder, INDEX))["weight_map"]
        if absent := [name for name in named if name not in tensors]:
            raise BundleError(
                f"{storage.join(folder, named[absent[0]])} lacks {absent[0]}, which {INDEX} "
                "promises there; copy the whole folder again"
            )
    return tensors


def _current_names(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under transformers' current names, without the family's prefix.

    Older checkpoints such as bert-base-uncased say LayerNorm.gamma and LayerNorm.beta.
    """

    def current(name: str) -> str:
        name = name.removeprefix(prefix).replace("LayerNorm.gamma", "LayerNorm.weight")
        return name.replace("LayerNorm.beta", "LayerNorm.bias")

    return {current(name): tensor for name, tensor in tensors.items()}


def _embedding(family: str) -> str:
    """Return the name of a family's token embedding."""
    return "wte.weight" if family == "gpt2" else "embeddings.word_embeddings.weight"


def _positions(family: str, config: HfConfig) -> int:
    """Return the longest row.

    RoBERTa counts positions from after its padding's number (fairseq).
    """
    most = config.get("max_position_embeddings") or config.get("n_positions") or 512
    return most - config.get("pad_token_id", 1) - 1 if family == "roberta" else most


def _heads(
    family: str, config: HfConfig, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...] | None, dict[str, str]]:
    """Return the heads of a checkpoint.

    Returns:
        The tensors of each head under the objective's names, by objective; the labels of a head
        with one row a label; and for other objectives why there is no head.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    no_head_reasons: dict[str, str] = {}
    labels = None
    built = (config.get("architectures") or [""])[0]
    tied_model = "ForMaskedLM" if family in MASKED else "LMHeadModel"
    for objective, declared in declared_heads(family).items():
        if declared.model == tied_model:
            head = _tied_head(family, objective, tensors)
        elif declared.tensors:
            head = _untied_head(family, declared, built, tensors)
        else:
            continue
        if isinstance(head, str):
            no_head_reasons[objective] = head
            continue
        heads[objective] = head
        if declared.linear_on:
            labels = label_names(config, len(head["head.bias"]))
    return heads, labels, no_head_reasons


def label_names(config: HfConfig, number: int) -> tuple[str, ...]:
    """Return the names of a head's labels.

    If the configuration does not name each of them, from 0 on, and no others, they are LABEL_0,
    LABEL_1, ... as in transformers.
    """
    labels = as_object(config.get("id2label"))
    numbers = [str(i) for i in range(number)]
    if labels.keys() != set(numbers):
        return tuple(f"LABEL_{i}" for i in numbers)
    return tuple(str(labels[i]) for i in numbers)


def declared_heads(family: str) -> dict[str, TransformersHead]:
    """Return the heads for which transformers has a class of the family, by objective."""
    import transformers

    declared_by = {
        name: transformers_head(registry.get("objective", name))
        for name in registry.names("objective")
    }
    return {
        name: declared
        for name, declared in declared_by.items()
        if declared and hasattr(transformers, FAMILIES[family][0] + declared.model)
    }


def _tied_head(
    family: str,
    objective: str,
    tensors: dict[str, Tensor],
) -> dict[str, Tensor] | str:
    """Return a head whose output is the embedding, or why there is none."""
    names: dict[str, str] = {}
    output, with_bias = "lm_head", tensors
    if family in MASKED:
        names, output = _masked(family), MASKED[family][3]
        if f"{output}.bias" in tensors:
            with_bias = {names["bias"]: tensors[f"{output}.bias"], **tensors}
    if any(name not in with_bias for name in names.values()):
        return "the checkpoint holds no masked-language-model head"
    if not _is_tied(tensors.get(f"{output}.weight"), tensors.get(_embedding(family))):
        return (
            f"the checkpoint's output ({output}.weight) is not its embedding, and that of "
            f"{objective} is"
        )
    return {ours: with_bias[family_name] for ours, family_name in names.items()}


def _untied_head(
    family: str, declared: TransformersHead, built: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor] | str:
    """Return a head whose tensors have one name in all families, or why there is none.

    Args:
        built: The class that the checkpoint was saved from.
    """
    first = declared.tensors[0][1]
    # ForSequenceClassification has a classifier too
    is_other_head = first.startswith("classifier.") and not built.endswith(declared.model)
    if first not in tensors or is_other_head:
        return f"the checkpoint holds none of {FAMILIES[family][0]}{declared.model}"
    return {ours: tensors[theirs] for ours, theirs in declared.tensors}


def _masked(family: str) -> dict[str, str]:
    """Return our names of a masked-language-model head, mapped to the family's."""
    dense, norm, bias, _ = MASKED[family]
    names = {"bias": bias}
    for ours, theirs in (("transform.0", dense), ("transform.2", norm)):
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    return names


def _is_tied(output: Tensor | None, embedding: Tensor | None) -> bool:
    """Return whether an output is tied to its embedding. transformers leaves a tied one out."""
    return output is None or (embedding is not None and torch.equal(output, embedding))


def tokenizer_state(folder: str) -> State:
    """Return the text modality's state for a folder's tokenizer."""
    try:
        text, vocabulary, specials = tokenization.from_folder(folder)
    except ValueError as error:
        raise BundleError(f"hf:{error}") from None
    return {"tokenizer": text, "vocabulary": vocabulary, "specials": specials}


# ---------------------------------------------------------------- writing


def write(saved: bundle.Bundle, folder: Path, backbone_only: bool) -> str:
    """Write a bundle as transformers' save_pretrained does, or as timm's save_for_hf.

    transformers' AutoModel classes give the bundle's scores, and its AutoTokenizer the modality's
    token ids. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the scores of an
    image classifier. A linear head that the library has no class for (one with a layer norm, or on
    the mean of the tokens) is written beside the plain model, with the code that joins them
    (``classifier_export``).

    Returns:
        What was written, in words.

    Raises:
        BundleError: The library has no class for another kind of head.
    """
    library, _, family = saved.manifest.arch.name.partition("/")
    if library == "timm":
        return _write_timm(saved, folder, backbone_only)
    if library != "transformers":
        raise BundleError(
            f"{saved.uri}: {saved.manifest.arch.name} is no model of transformers or timm; take "
            "--kind state-dict"
        )
    import transformers

    objective = saved.manifest.objective.name
    backbone_only = backbone_only or objective == "none"
    known = declared_heads(family)
    if not backbone_only and objective not in known:
        raise BundleError(
            f"{saved.uri}: transformers has no class with a head for {objective} (it has for "
            f"{', '.join(known)}); --backbone-only writes the plain model"
        )
    if backbone_only:
        backbone, head = bundle.build_backbone(saved.manifest.arch), None
        bundle.transfer(backbone, saved.backbone_tensors(), saved.uri)
    else:
        task = saved.task()
        backbone, head = task.backbone, task.objective
    if family == "wav2vec2":
        return _write_speech(saved, backbone, head, folder)
    if head is not None and (lacking := _missing_in_family(family, backbone, head)):
        return _write_with_own_head(saved, Task(backbone, head), folder, lacking)
    model: Any = backbone.model
    exported = transformers_head(head)
    name = FAMILIES[family][0] + (exported.model if exported else "Model")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    state = saved.manifest.modality.state
    tokenizer, specials = with_post_processor(
        state, words=exported is not None and exported.splits_words
    )
    note = ""
    if head is not None and exported and exported.model == SEQUENCE:
        tensors, note = _sequence(family, Task(backbone, head), tensors)
        if family == "gpt2" and specials["pad_token"] == specials["sep_token"]:
            tensors = _with_padding_token(tokenizer, specials, tensors)
            note += "; a token for padding was added, as the end of a text was that too"
    elif exported:
        tensors = _with_head(family, exported, head, tensors)
    ids = {key: tokenizer.token_to_id(token) for key, token in specials.items()}
    labels = saved.manifest.objective.state.get("labels")
    _configure(config, family, ids, tensors, exported, labels)
    if head is not None:
        attributes = cast("dict[str, Any]", vars(config))
        note += classifier_export.add_threshold(attributes, head)
    _save(getattr(transformers, name), config, tensors, folder)
    _save_tokenizer(tokenizer, specials, folder, saved.modality().inputs()["length"], config)
    return f"{name} with {sum(t.numel() for t in tensors.values())} parameters{note}"


def _missing_in_family(family: str, backbone: Any, head: Any) -> str:
    """Return what the family's own class for the objective lacks, in words.

    "" where it gives the same scores.
    """
    exported = transformers_head(head)
    if exported is None or exported.linear_on is None:
        return ""
    lacking = ["layer norm before the linear layer"] if head.options.norm else []
    if exported.model == SEQUENCE:
        pool, labels, width = POOLS[family], len(head.state["labels"]), backbone.pooled_dim
        if backbone.pool != pool:
            lacking.append(f"pool: {backbone.pool} (it reads {pool})")
        elif family == "distilbert" and 2 * labels > width:
            lacking.append(f"room for {labels} labels")
        elif family == "gpt2" and _ln_f_shift(head) is None:
            lacking.append(f"bias for {labels} labels")
    if not lacking:
        return ""
    name = FAMILIES[family][0] + exported.model
    return f"{name} of transformers has no {' and no '.join(lacking)}"


def _write_with_own_head(saved: bundle.Bundle, task: Any, folder: Path, lacking: str) -> str:
    """Write the plain model, and beside it the head, its description and the loading code."""
    text = write(saved, folder, backbone_only=True).removesuffix(", 0 labels")
    if splits_words(saved.manifest):
        write_tokenizer(saved.modality(), folder, task.backbone.model.config, words=True)
    return write_head(task, saved.modality(), folder, text, lacking)


def write_head(task: Any, modality: Any, folder: Path, text: str, lacking: str) -> str:
    """Write the head, its description and the loading code beside a plain model.

    Args:
        text: What stands in the folder already, in words.
        lacking: What the library's own class lacks, in words.

    Returns:
        What was written, in words.
    """
    spec = classifier_export.describe(task, modality)
    head = classifier_export.head_tensors(task)
    save_file(head, folder / classifier_export.HEAD, metadata={"format": "pt"})
    write_json(folder / classifier_export.SPEC, spec)
    (folder / classifier_export.CODE).write_text(classifier_export.code(), encoding="utf-8")
    return (
        f"{text}, with a classifier of {len(spec['labels'])} labels beside it: {lacking}, so "
        f"load it with load() of {classifier_export.CODE} in this folder"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_speech(saved: bundle.Bundle, backbone: Any, head: Any, folder: Path) -> str:
    """Write a wav2vec 2.0 bundle."""
    import transformers

    exported = transformers_head(head)
    if exported and exported.model == SEQUENCE and head.options.norm:
        lacking = (
            "Wav2Vec2ForSequenceClassification of transformers has no layer norm before the "
            "linear layer"
        )
        return _write_with_own_head(saved, Task(backbone, head), folder, lacking)
    try:
        speech_folder = hf_speech.export_folder(backbone, head, saved.modality())
    except ValueError as error:
        raise BundleError(f"{saved.uri}: {error}") from None
    note = ""
    if head is not None:
        attributes = cast("dict[str, Any]", vars(speech_folder.config))
        note = classifier_export.add_threshold(attributes, head)
    _save(
        getattr(transformers, speech_folder.kind),
        speech_folder.config,
        speech_folder.tensors,
        folder,
    )
    for name, content in speech_folder.files.items():
        write_json(folder / name, content)
    count = sum(tensor.numel() for tensor in speech_folder.tensors.values())
    return f"{speech_folder.kind} with {count} parameters{note}"


def _configure(
    config: Any,
    family: str,
    ids: dict[str, int],
    tensors: dict[str, Tensor],
    exported: TransformersHead | None,
    labels: list[str] | None,
) -> None:
    """Complete the configuration that the bundle's backbone was built with.

    It gets the tokenizer's ids, the number of rows of the embedding and the labels of the head.
    """
    config.pad_token_id = ids["pad_token"]
    if family in ("roberta", "gpt2"):
        config.bos_token_id, config.eos_token_id = ids["cls_token"], ids["sep_token"]
    config.vocab_size = next(
        t.shape[0] for name, t in tensors.items() if name.endswith(_embedding(family))
    )
    config.tie_word_embeddings = True
    # a checkpoint's own labels are not this model's; question answering has first and last
    config.num_labels = 2
    if labels is not None and exported:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    if exported and exported.problem_type:
        config.problem_type = exported.problem_type


def _with_head(
    family: str, exported: TransformersHead, head: Any, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the model's tensors under its prefix, and the head's.

    A pooler has no place in these classes.
    """
    prefix = FAMILIES[family][1]
    out = {
        f"{prefix}{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith("pooler.")
    }
    own = {name: tensor.detach() for name, tensor in head.state_dict().items()}
    names = _masked(family).items() if exported.model == "ForMaskedLM" else exported.tensors
    return out | {theirs: own[ours] for ours, theirs in names}


def _sequence(
    family: str,
    task: Any,
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the family's ForSequenceClassification, and a note.

    They give the scores of a head that the class can hold (`_missing_in_family`).
    """
    prefix = FAMILIES[family][1]
    weight, bias = classifier_export.linear_tensors(task).values()
    out = {f"{prefix}{key}": t for key, t in tensors.items()}
    if family == "bert":
        return {**out, "classifier.weight": weight, "classifier.bias": bias}, ""
    if family == "roberta":  # the same arithmetic, with the pooler as part of the head
        for part in ("weight", "bias"):
            out[f"classifier.dense.{part}"] = out.pop(f"{prefix}pooler.dense.{part}")
        return {**out, "classifier.out_proj.weight": weight, "classifier.out_proj.bias": bias}, ""
    labels, width = weight.shape
    if family == "distilbert":
        # the class has a dense layer with ReLU in between: relu(z) - relu(-z) is z
        positive, negative = slice(labels), slice(labels, 2 * labels)
        pre = torch.zeros(width, width)
        shift = torch.zeros(width)
        post = torch.zeros(labels, width)
        pre[positive], pre[negative] = weight, -weight
        shift[positive], shift[negative] = bias, -bias
        post[:, positive], post[:, negative] = torch.eye(labels), -torch.eye(labels)
        out |= {"pre_classifier.weight": pre, "pre_classifier.bias": shift}
        out |= {"classifier.weight": post, "classifier.bias": torch.zeros(labels)}
        return out, ""
    out["score.weight"] = weight
    if not bias.any():
        return out, ""
    shift = _ln_f_shift(task.objective)
    assert shift is not None
    out[f"{prefix}ln_f.bias"] = (out[f"{prefix}ln_f.bias"].double() + shift).float()
    return out, "; the classifier's bias went into the bias of ln_f, as score has none"


def _ln_f_shift(head: Any) -> Tensor | None:
    """Return what GPT-2's last norm must add in the place of the head's bias, (D,) float64.

    ``score`` of transformers has no bias. None where no such vector exists.
    """
    weight: Tensor = head.head.weight.detach().double()
    scale, mean = output_scale(head)
    bias: Tensor = head.head.bias.detach().double() + mean / scale
    if not bias.any():
        return torch.zeros(weight.shape[1], dtype=torch.float64)
    inverse = cast(Tensor, torch.linalg.pinv(weight))  # pyright: ignore[reportUnknownMemberType]
    shift = inverse @ bias  # W d = b
    wrong = (weight @ shift - bias).abs().max() > 1e-6 * bias.abs().max()
    return None if wrong else shift


def _with_padding_token(
    tokenizer: Any, specials: dict[str, str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Add a token for padding to the tokenizer, and return the tensors with a row for it.

    GPT2ForSequenceClassification reads the last token that is no padding, so the end of a text must
    not be padding.
    """
    specials["pad_token"] = "<|pad|>"
    tokenizer.add_special_tokens([specials["pad_token"]])
    name = f"{FAMILIES['gpt2'][1]}{_embedding('gpt2')}"
    more = tokenizer.token_to_id(specials["pad_token"]) + 1 - tensors[name].shape[0]
    added_rows = (0, 0, 0, max(0, more))
    return {**tensors, name: torch.nn.functional.pad(tensors[name], added_rows)}


def _save(kind: Any, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and model.safetensors.

    Names and shapes are checked against the model's own class. Tied tensors are left out, as
    transformers does.
    """
    with torch.device("meta"):
        model = kind(config)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    # AutoModel makes a new pooler where none is given
    spare = {name for name in own if name.startswith("pooler.") and name not in tensors}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    expected = {name: shape for name, shape in own.items() if name not in tied | spare}
    assert given == expected, f"{kind.__name__}: {own} expected, {given} given"
    config.architectures, config.dtype = [kind.__name__], "float32"
    config.save_pretrained(folder)
    weights = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / MODEL, metadata={"format": "pt"})


def with_post_processor(state: State, words: bool) -> tuple[Any, dict[str, str]]:
    """Return the tokenizer with the modality's frame as its post-processor, and its special tokens.

    The frame is [CLS] a [SEP] b [SEP]. The special tokens are keyed by role.

    Args:
        words: Rows are lists of words (transformers: is_split_into_words), before each of which the
            modality puts a space where tokens include it (byte-level BPE).
    """
    tokenizer: Any = Tokenizer.from_str(state["tokenizer"])
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    roles = zip(names, state["specials"], strict=True)
    specials = {role: tokenizer.id_to_token(number) for role, number in roles if number is not None}
    cls, sep = specials["cls_token"], specials["sep_token"]
    frame = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in dict.fromkeys((cls, sep))
        ],
    )
    if "ByteLevel" in str(tokenizer.pre_tokenizer):
        # as the modality's offsets: without the space that begins a word
        frame = processors.Sequence([processors.ByteLevel(trim_offsets=True), frame])
    if words and (space := tokenization.space_before_words(tokenizer)):
        # in the normalizer: splits of words (Llama 3, Qwen) and spaces as ▁ (Gemma) come after it
        later = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), *later])
    tokenizer.post_processor = frame
    return tokenizer, specials


def splits_words(manifest: bundle.Manifest) -> bool:
    """Return whether a bundle's rows are lists of words (tagging)."""
    name = manifest.objective.name
    head = None if name == "none" else transformers_head(registry.get("objective", name))
    return head is not None and head.splits_words


def write_tokenizer(modality: Any, folder: Path, config: Any, words: bool) -> None:
    """Write the tokenizer of a text modality into a folder; ``words`` as `with_post_processor`."""
    tokenizer, specials = with_post_processor(modality.state, words)
    _save_tokenizer(tokenizer, specials, folder, modality.inputs()["length"], config)


def _save_tokenizer(
    tokenizer: Any, specials: dict[str, str], folder: Path, length: int, config: Any
) -> None:
    """Write the tokenizer for a class of transformers that takes tokenizer.json as it is.

    Versions 4 and 5 of transformers both read it so; the families' own classes add rules of their
    own.
    """
    tokenizer.save(str(folder / TOKENIZER))
    types = ["token_type_ids"] if getattr(config, "type_vocab_size", 1) > 1 else []
    has_prefix = getattr(tokenizer.pre_tokenizer, "add_prefix_space", False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        # without it, version 4 switches off what tokenizer.json says
        **({"add_prefix_space": True} if has_prefix else {}),
        **specials,
        "bos_token": specials["cls_token"],
        "eos_token": specials["sep_token"],
        "model_input_names": ["input_ids", *types, "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2))


def _attach_timm_classifier(backbone: Any, head: Any) -> str:
    """Give timm's model its classifier for the head's labels.

    Returns:
        Why that cannot give the head's scores, or "".
    """
    name = backbone.arch.name
    if head.options.norm:
        return f"{name} of timm has no layer norm before its classifier"
    backbone.model.reset_classifier(len(head.state["labels"]))
    last = backbone.model.get_classifier()
    is_linear = isinstance(last, torch.nn.Linear) and "bias" in dict(last.named_parameters())
    if not is_linear or last.weight.shape != head.head.weight.shape:
        return f"{name} of timm has another classifier ({last}, this head is {head.head})"
    return ""


def _write_timm(saved: bundle.Bundle, folder: Path, backbone_only: bool) -> str:
    """Write a model as timm.models.save_for_hf does.

    Raises:
        BundleError: timm has no head for the objective.
    """
    import timm

    objective = saved.manifest.objective.name
    has_head = objective != "none"
    exported = transformers_head(registry.get("objective", objective)) if has_head else None
    task = saved.task() if exported and exported.model == SEQUENCE else None
    if task is None:
        backbone: Any = bundle.build_backbone(saved.manifest.arch)
        bundle.transfer(backbone, saved.backbone_tensors(), saved.uri)
        if has_head and not backbone_only:
            raise BundleError(
                f"{saved.uri}: timm has no head for {objective}; --backbone-only writes the "
                "plain model, --kind state-dict all tensors"
            )
    else:
        backbone = task.backbone
    model, modality = backbone.model, saved.modality()
    timm_config: dict[str, Any] = {}
    note = ""
    if task is not None and not backbone_only:
        lacking = _attach_timm_classifier(backbone, task.objective)
        if lacking:
            return _write_with_own_head(saved, task, folder, lacking)
        model.get_classifier().load_state_dict(classifier_export.linear_tensors(task))
        timm_config = {"label_names": task.objective.state["labels"]}
        note = classifier_export.add_threshold(timm_config, task.objective)
    fit = modality.options.fit
    crop = {"crop": "center", "squash": "squash", "squash_crop": "squash", "pad": "border"}[fit]
    size = (modality.options.channels, modality.options.size, modality.options.size)
    # timm crops in every mode; here squash and pad do not
    crop_share = modality.options.crop_share if fit in ("crop", "squash_crop") else 1.0
    input_ = {
        "input_size": size,
        "mean": tuple(modality.state["mean"]),
        "std": tuple(modality.state["std"]),
        "interpolation": modality.options.interpolation,
        "crop_pct": crop_share,
        "crop_mode": crop,
    }
    untyped: Any = timm.models
    untyped.save_for_hf(
        model, str(folder), model_config=timm_config, safe_serialization=True, data_config=input_
    )
    return (
        f"{backbone.arch.name} with {sum(p.numel() for p in model.parameters())} parameters, "
        f"{len(timm_config.get('label_names', []))} labels{note}"
    )
