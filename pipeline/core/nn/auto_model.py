"""Build models of transformers of any family from plain configurations.

What is known of a family is what transformers itself says: its configuration class, the class of
its plain model and its feature extractor.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from pipeline.config import hf_config
from pipeline.core.inputs import Inputs

OFF = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "use_cache": False,
    "do_mask_input": False,
}
"""Settings that are changed: DDP waits for the gradient of every parameter, masks come from the
modality or the objective, and no text is continued."""
SERIES_INPUT = "past_values"
"""Main input of models of regular series."""
EXTRACTOR_TYPE = "feature_extractor_type"
"""Key of preprocessor_config.json with the name of the class."""
EXTRACTORS = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor"}
"""Extractors of published checkpoints that are not the ones of transformers' mapping."""


@cache
def _declared(kind: Any) -> frozenset[str]:
    """Return the keys that say how models of a configuration class are built.

    They are those that the class declares beyond those of every model, and those that the model's
    code reads without their being declared (position_buckets of DeBERTa-v2).
    """
    from transformers import PreTrainedConfig

    common = {one.name for one in fields(PreTrainedConfig)}
    declared = {one.name for one in fields(kind)} | set(getattr(kind, "attribute_map", ()))
    module: Any = inspect.getmodule(model_class(kind()))
    code = inspect.getsource(module)
    read = {a or b for a, b in re.findall(r"config\.([a-z]\w*)|config, \"([a-z]\w*)\"", code)}
    return frozenset((declared | read) - common)


def plain_config(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that say how the model is built.

    Raises ValueError for a model_type that transformers does not have, and for values that are not
    plain (`hf_config.plain_keys`).
    """
    from transformers import CONFIG_MAPPING

    return hf_config.plain_keys(model_type, given, _declared(CONFIG_MAPPING[model_type]))


def configuration(model_type: str, given: Mapping[str, Any], inputs: Inputs) -> Any:
    """Build a configuration from plain keys; the rows say what is left out.

    Raises ValueError where the class refuses them.
    """
    from transformers import CONFIG_MAPPING

    kind, plain = CONFIG_MAPPING[model_type], plain_config(model_type, given)
    if unknown := sorted(set(given) - set(plain)):
        raise ValueError(
            f"hf/{model_type}: config: {', '.join(unknown)}: {kind.__name__} of transformers has "
            "no such key that says how the model is built"
        )
    usual: dict[str, Any] = {}
    if "vocabulary" in inputs:
        usual = {"vocab_size": inputs["vocabulary"], "pad_token_id": inputs["specials"][0]}
    if "size" in inputs:
        usual = {"image_size": inputs["size"], "num_channels": inputs["channels"]}
    if "steps" in inputs:
        usual = {"context_length": inputs["steps"], "num_input_channels": inputs["channels"]}
    known = _declared(kind)
    try:
        config = kind(**{key: value for key, value in usual.items() if key in known} | plain)
    except Exception as error:  # each class checks its own values, in its own ways
        raise ValueError(f"hf/{model_type}: config: {' '.join(str(error).split())[:300]}") from None
    for key, value in OFF.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def has_decoder(model_type: str) -> bool:
    """Return whether models of a family have an encoder and a decoder."""
    from transformers import CONFIG_MAPPING

    return bool(CONFIG_MAPPING[model_type]().is_encoder_decoder)


def model_class(config: Any) -> Any:
    """Return transformers' class of the plain model of a configuration.

    Raises ValueError where it has none.
    """
    from transformers.models.auto import modeling_auto as auto

    mappings: list[Any] = [auto.MODEL_MAPPING]
    # of the family's default, since an encoder that was saved alone says False
    if type(config)().is_encoder_decoder:
        mappings.insert(0, auto.MODEL_FOR_TEXT_ENCODING_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            return cast("tuple[Any, ...]", kind)[0] if isinstance(kind, tuple) else kind
    import transformers

    # SigLIP's texts are in no mapping
    named: Any = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}Model", None)
    if named is None:
        raise ValueError(f"transformers has no plain model of {type(config).__name__}")
    return named


class MaskedHead(NamedTuple):
    """A family's head for masked tokens: a linear layer, an activation and a layer norm, before an
    output of the token embedding's shape.
    """

    model: Any
    """transformers' class of the model with this head."""
    dense: str
    """Name of the linear layer in it."""
    norm: str
    """Name of the layer norm in it."""
    bias: str | None
    """Name of the output's bias in its state; None: it has none."""
    activation: str
    """Name of transformers.activations."""
    norm_eps: float


def masked_head(config: Any) -> MaskedHead | None:
    """Return the head for masked tokens of a configuration's family.

    None where transformers has no class with one, or one of another form.
    """
    from transformers import activations
    from transformers.models.auto import modeling_auto as auto

    mapping: Any = auto.MODEL_FOR_MASKED_LM_MAPPING
    if type(config) not in mapping:
        return None
    kind = mapping[type(config)]
    random: Any = torch.random
    with torch.device("meta"), random.fork_rng(devices=[]):
        model = kind(config)
    shape = model.get_input_embeddings().weight.shape
    base = f"{model.base_model_prefix}."
    own = {name: one for name, one in model.named_modules() if not name.startswith(base)}
    norms = [name for name, one in own.items() if isinstance(one, nn.LayerNorm)]
    layers = {name: one for name, one in own.items() if isinstance(one, nn.Linear)}
    dense = [name for name, one in layers.items() if one.weight.shape != shape]
    if len(norms) != 1 or len(dense) != 1:
        return None
    state = model.state_dict().items()
    biases = [name for name, t in state if not name.startswith(base) and t.shape == shape[:1]]
    classes: dict[str, Any] = vars(activations)["ACT2CLS"]
    activations_used = (
        name for module in own.values() for name in classes if type(module) is classes[name]
    )
    # RoBERTa and its like call the function GELU and have no module for it
    activation = next(activations_used, "gelu")
    bias = biases[0] if biases else None
    return MaskedHead(kind, dense[0], norms[0], bias, activation, own[norms[0]].eps)


def output_is_embedding(config: Any) -> bool:
    """Return whether the output layer of a family's language model is its token embedding."""
    return bool(getattr(config, "tie_word_embeddings", True))


def pooling_arguments(kind: Any, pooler: bool) -> dict[str, bool]:
    """Return the argument of a class that says whether its own pooling layer is built."""
    takes = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": pooler} if takes else {}


def create(config: Any, pooler: bool) -> Any:
    """Build the model with random weights, of an encoder-decoder its encoder."""
    kind = model_class(config)
    return encoder_of(kind(config, **pooling_arguments(kind, pooler)))


def encoder_of(model: Any) -> Any:
    """Return a model, of an encoder-decoder its encoder, with what is never trained as buffers."""
    if getattr(model, "decoder", None) is not None and model.config.is_encoder_decoder:
        model = model.get_encoder()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)
    return model


def is_plain(model: Any) -> bool:
    """Return whether transformers' class of the configuration builds this model.

    It does not where that class has a decoder too (Whisper, BART).
    """
    return type(model) is model_class(model.config)


def hidden_states(model: Any, output: Any) -> torch.Tensor:
    """Return a model's last states: (B, N, D), or (B, C, h, w) maps of images.

    Models of series give (B, channels, patches, D), which are concatenated to (B, patches,
    channels * D), as their heads for classification read them.
    """
    hidden = output.last_hidden_state
    is_by_channel = model.main_input_name == SERIES_INPUT and hidden.dim() == 4
    return hidden.transpose(1, 2).flatten(2) if is_by_channel else hidden


def is_auto(model: Any) -> bool:
    """Return whether ``transformers.AutoModel`` opens a folder of this model as its class."""
    from transformers.models.auto import modeling_auto as auto

    mapping: Any = auto.MODEL_MAPPING
    kind = cast("Any", type(model.config))
    return kind in mapping and type(model) is mapping[kind]


def positions(model: Any) -> int | None:
    """Return the tokens of the longest row; None for a model without a limit."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from the one after padding
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and module.padding_idx is not None:
            return most - module.padding_idx - 1
    return most


def extractor_class(config: Any, named: str | None) -> Any:
    """Return transformers' class of the feature extractor for a model.

    Args:
        named: Its name in the checkpoint's preprocessor_config.json, if it has one.

    Raises:
        ValueError: transformers has none of that name, or none for the model.
    """
    import transformers
    from transformers.models.auto import feature_extraction_auto

    by_type: dict[str, str] = vars(feature_extraction_auto)["FEATURE_EXTRACTOR_MAPPING_NAMES"]
    name = named or EXTRACTORS.get(config.model_type) or by_type.get(config.model_type)
    known = {*EXTRACTORS.values(), *by_type.values()}
    if name not in known:
        raise ValueError(
            f"{config.model_type}: transformers has no feature extractor {name or 'for it'}"
        )
    return getattr(transformers, str(name))


AST_FRAMES_PER_SECOND = 100
"""Of the spectrograms of the Audio Spectrogram Transformer, which ``max_length`` counts."""


def longest_seconds(extractor: Any) -> float | None:
    """Return after how many seconds a feature extractor cuts a recording; None: never."""
    if type(extractor).__name__ == "ASTFeatureExtractor":
        return extractor.max_length / AST_FRAMES_PER_SECOND
    if isinstance(getattr(extractor, "chunk_length", None), int):  # Whisper
        return float(extractor.chunk_length)
    samples = getattr(extractor, "nb_max_samples", None)  # CLAP
    return None if samples is None else samples / extractor.sampling_rate


def extractor_keys(kind: Any) -> frozenset[str]:
    """Return the keys that a feature extractor is built from."""
    return frozenset(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
