"""Check configurations of transformers that come from outside: plain keys, and no absurd sizes.

A config.json can make transformers fetch or import code: ``auto_map`` names a Python file,
``attn_implementation`` and ``kernel_config`` name kernels of the hub, ``quantization_config`` names
further packages. So only the keys listed here reach a configuration class. They say how a model of
one of our families is built, and each has a plain value (a number, true or false, a word, a list of
numbers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from pipeline.io.json_values import Json

HfConfig = dict[str, Any]
"""The content of a JSON file of transformers (config.json, preprocessor_config.json). Each family
of models has keys of its own.
"""

_SPECIAL = (
    "pad_token_id bos_token_id eos_token_id tie_word_embeddings initializer_range use_cache "
    "is_decoder add_cross_attention"
)
_ENCODER = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "hidden_act hidden_dropout_prob attention_probs_dropout_prob "
    "max_position_embeddings type_vocab_size layer_norm_eps classifier_dropout"
)
KEYS: dict[str, frozenset[str]] = {
    family: frozenset(f"{own} {_SPECIAL}".split())
    for family, own in {
        "bert": _ENCODER,
        "roberta": _ENCODER,
        "distilbert": "vocab_size max_position_embeddings sinusoidal_pos_embds n_layers n_heads "
        "dim hidden_dim dropout attention_dropout activation qa_dropout seq_classif_dropout "
        "hidden_size num_attention_heads num_hidden_layers",
        "gpt2": "vocab_size n_positions n_embd n_layer n_head n_inner activation_function "
        "resid_pdrop embd_pdrop attn_pdrop layer_norm_epsilon summary_type "
        "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
        "scale_attn_weights scale_attn_by_inverse_layer_idx "
        "reorder_and_upcast_attn hidden_size max_position_embeddings num_attention_heads "
        "num_hidden_layers",
        "wav2vec2": "vocab_size hidden_size num_hidden_layers num_attention_heads "
        "intermediate_size hidden_act hidden_dropout activation_dropout attention_dropout "
        "feat_proj_dropout feat_quantizer_dropout final_dropout layerdrop layer_norm_eps "
        "feat_extract_norm feat_extract_activation conv_dim conv_stride conv_kernel conv_bias "
        "num_conv_pos_embeddings num_conv_pos_embedding_groups do_stable_layer_norm "
        "apply_spec_augment mask_time_prob mask_time_length mask_time_min_masks mask_feature_prob "
        "mask_feature_length mask_feature_min_masks num_codevectors_per_group "
        "num_codevector_groups contrastive_logits_temperature num_negatives codevector_dim "
        "proj_codevector_dim diversity_loss_weight ctc_loss_reduction ctc_zero_infinity "
        "use_weighted_layer_sum classifier_proj_size tdnn_dim tdnn_kernel tdnn_dilation "
        "xvector_output_dim add_adapter adapter_kernel_size adapter_stride num_adapter_layers "
        "output_hidden_size adapter_attn_dim",
    }.items()
}
"""Keys of each family that say how its model is built."""
CHANGES = ("auto_map", "quantization_config")
"""Keys with which the weights mean something else than for the family's own class.

A folder that has one of them is refused.
"""
LAYERS, WIDTH, LENGTH, VOCABULARY = 512, 1 << 16, 1 << 20, 1 << 23
"""Most layers and heads, the widest layer, the longest row and the largest vocabulary."""
BOUNDS = {
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_adapter_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), LENGTH),
    "vocab_size": VOCABULARY,
    "type_vocab_size": WIDTH,
}
LISTED = 64
"""Most entries of a list (convolutions)."""
PARAMETERS = 20_000_000_000
"""Most parameters of a model of these families. The largest published one has 1.6 billion."""
_WORD = re.compile(r"[A-Za-z0-9_]+")


def plain(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain part of a configuration; other keys are left out.

    Args:
        family: One of `KEYS`.
        config: The configuration, as JSON.

    Raises:
        ValueError: A key in `CHANGES`, a value of another kind, or a size beyond its bound.
    """
    _refuse_other_code(family, config)
    out = {key: config[key] for key in config if key in KEYS[family]}
    for key, value in out.items():
        _check(key, value)
    count = _parameters(family, out)
    if count > PARAMETERS:
        raise ValueError(
            f"it describes a model of {count:.2g} parameters, more than {PARAMETERS:.2g}: no "
            "model of this family has so many"
        )
    return out


def _refuse_other_code(family: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a key in `CHANGES`."""
    if wrong := [key for key in CHANGES if config.get(key)]:
        raise ValueError(
            f"{wrong[0]}: the model is computed by other code than {family}'s own, and none from "
            f"outside is run; take a plain {family} checkpoint"
        )


def _check(key: str, value: Json) -> None:
    """Raise ValueError for a value that is not plain, or for a size beyond its bound."""
    many = value if isinstance(value, list | tuple) else [value]
    if len(many) > LISTED or not all(
        one is None or isinstance(one, int | float | str | bool) for one in many
    ):
        raise ValueError(
            f"{key}: {_short(value)} is no plain value (a number, true or false, a word, a "
            f"list of up to {LISTED} numbers)"
        )
    for one in many:
        if isinstance(one, str) and not _WORD.fullmatch(one):
            raise ValueError(f"{key}: {_short(one)} is no plain word")
        whole = (
            key in BOUNDS
            or key.endswith("_size")
            or key in ("dim", "hidden_dim", "n_embd", "n_inner")
        )
        if isinstance(one, float) and (whole or not math.isfinite(one)):
            raise ValueError(f"{key}: {_short(one)} is no {'whole ' if whole else ''}number")
        most = BOUNDS.get(key, WIDTH if isinstance(one, int) and not key.endswith("_id") else None)
        if most is None or isinstance(one, bool) or not isinstance(one, int | float):
            continue
        if not -1 <= one <= most:
            raise ValueError(
                f"{key}: {_short(one)} is beyond every model of this kind (at most {most})"
            )


def _short(value: Any) -> str:
    """Return a value as text, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _parameters(family: str, config: Mapping[str, Any]) -> float:
    """Return about how many parameters the configuration's model has.

    Sizes that it does not give are taken as the family's defaults.
    """

    def size(*names: str, usual: int) -> int:
        found = next((config[name] for name in names if isinstance(config.get(name), int)), None)
        return usual if found is None else max(0, found)

    width, layers = (
        size("hidden_size", "dim", "n_embd", usual=768),
        size("num_hidden_layers", "n_layers", "n_layer", usual=12),
    )
    inner = size("intermediate_size", "hidden_dim", "n_inner", usual=4 * width)
    embedded = size("vocab_size", usual=30000) + size(
        "max_position_embeddings", "n_positions", usual=512
    )
    convolved = 0
    if family == "wav2vec2":
        channels: list[int] = config.get("conv_dim") or []
        kernels: list[int] = config.get("conv_kernel") or []
        convolved = sum(
            a * b * kernel
            for a, b, kernel in zip(channels, channels[1:], kernels[1:], strict=False)
        )
        convolved += width * width * size("num_conv_pos_embeddings", usual=128)
    return float(embedded * width + layers * (4 * width * width + 2 * width * inner) + convolved)


# ---------------------------------------------------------------- any family

USUAL_KEYS = frozenset(
    (
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "is_encoder_decoder",
    )
)
"""Keys that configurations of any family may have beside those that their class declares."""
NEVER = re.compile(
    "auto_map|quantization|implementation|kernel_config|backbone|name_or_path|fusion|pretrained"
)
"""Keys that name code or weights of others."""
LABELS = frozenset(
    ["architectures", "id2label", "label2id", "problem_type", "transformers_version", "dtype"]
)
"""Keys that say nothing of how a backbone is built."""
DEPTH = 3
"""Most levels of objects in a configuration (positions by kind of layer)."""
NUMBERED = re.compile("layers?$|^depths?$|_depth$|blocks?$|heads$|^num_stages$")
"""Keys that count layers or heads."""


def plain_keys(
    family: str,
    config: Mapping[str, Any],
    declared: frozenset[str],
) -> dict[str, Any]:
    """Return the plain part of a configuration of any family; keys that it does not know are left
    out.

    Args:
        family: Its model_type, for messages.
        config: The configuration, as JSON.
        declared: Keys that its class declares.

    Raises:
        ValueError: A key in `CHANGES`, a value of another kind, or a size beyond every model.
    """
    _refuse_other_code(family, config)
    known = (declared | USUAL_KEYS) - LABELS
    out = {key: config[key] for key in config if key in known and not NEVER.search(key)}
    for key, value in out.items():
        _check_any(key, value, DEPTH)
    return out


def _check_any(key: str, value: Any, depth: int) -> None:
    """Raise ValueError for a value that is not plain, or for a number beyond every model."""
    if isinstance(value, dict) and depth:
        for inner, one in cast("dict[Any, Any]", value).items():
            if not _WORD.fullmatch(str(inner)) or NEVER.search(str(inner)):
                raise ValueError(f"{key}: {_short(inner)} is no plain key")
            _check_any(str(inner), one, depth - 1)
        return
    if isinstance(value, list | tuple):
        entries = cast("list[Any]", value)
        if len(entries) > LAYERS:
            raise ValueError(f"{key}: {len(entries)} entries, more than {LAYERS}")
        for one in entries:
            _check_any(key, one, depth - 1 if isinstance(one, list | dict) else depth)
        return
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if not re.fullmatch(r"[A-Za-z0-9_.\- ]{0,100}", value):
            raise ValueError(f"{key}: {_short(value)} is no plain word")
        return
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}: {_short(value)} is no plain value")
    most = LAYERS if NUMBERED.search(key) else VOCABULARY
    if isinstance(value, int) and not key.endswith("_id") and abs(value) > most:
        raise ValueError(
            f"{key}: {_short(value)} is beyond every model of this kind (at most {most})"
        )
