"""Tiny configurations of families of transformers, by model_type: rows, keys, and options of the
backbone.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    rows: str
    """text, image, audio or series."""
    config: dict[str, Any]
    processor: dict[str, Any] = {}
    """Keys of the feature extractor, of models that read spectrograms."""


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
ENCODER = {**SIZES, "vocab_size": 400, "max_position_embeddings": 40}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
OPT = {key: value for key, value in ENCODER.items() if key != "intermediate_size"}
DECODER = {**ENCODER, **SPECIALS, "num_key_value_heads": 1, "head_dim": 8}
GEMMA = {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 8}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "window_size": 4,
}
SPEECH = {
    **SIZES,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
SEQUENCES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 400,
    **SPECIALS,
    "decoder_start_token_id": 2,
}
PATCHES = {
    "context_length": 32,
    "num_input_channels": 3,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 400}

FAMILIES: dict[str, Family] = {
    "albert": Family("text", {**ENCODER, "embedding_size": 12}),
    "bart": Family("text", {**SEQUENCES, "max_position_embeddings": 40}),
    "camembert": Family("text", {**ENCODER, "pad_token_id": 0}),
    "clip_text_model": Family("text", {**ENCODER, **SPECIALS}),
    "deberta": Family("text", DEBERTA),
    "deberta-v2": Family(
        "text",
        {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "electra": Family("text", {**ENCODER, "embedding_size": 12}),
    "eurobert": Family("text", {**DECODER, "mask_token_id": 4}),
    "gemma": Family("text", DECODER),
    "gemma2": Family("text", GEMMA),
    "gemma3_text": Family("text", GEMMA),
    "gpt_neox": Family("text", {**ENCODER, **SPECIALS}),
    "llama": Family("text", DECODER),
    "mistral": Family("text", DECODER),
    "modernbert": Family("text", {**ENCODER, **SPECIALS, "local_attention": 8}),
    "mpnet": Family("text", {**ENCODER, "pad_token_id": 0}),
    "mt5": Family("text", T5),
    "nomic_bert": Family("text", ENCODER),
    "opt": Family("text", {**OPT, **SPECIALS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi3": Family("text", {**ENCODER, **SPECIALS, "num_key_value_heads": 1}),
    "qwen2": Family("text", {**ENCODER, **SPECIALS, "num_key_value_heads": 1}),
    "qwen3": Family("text", DECODER),
    "roformer": Family("text", {**ENCODER, "embedding_size": 16}),
    "siglip_text_model": Family("text", {**ENCODER, **SPECIALS}),
    "t5": Family("text", T5),
    "xlm-roberta": Family("text", {**ENCODER, "pad_token_id": 0}),
    "beit": Family("image", VISION),
    "clip_vision_model": Family("image", VISION),
    "convnext": Family("image", STAGES),
    "convnextv2": Family("image", STAGES),
    "deit": Family("image", VISION),
    "dinov2": Family("image", {key: VISION[key] for key in VISION if key != "intermediate_size"}),
    "dinov3_vit": Family("image", {**VISION, "num_register_tokens": 2}),
    "ijepa": Family("image", VISION),
    "mobilenet_v2": Family("image", {"depth_multiplier": 0.1}),
    "pvt_v2": Family("image", {"image_size": 32, **STAGES, "num_attention_heads": [1, 1, 2, 2]}),
    "regnet": Family(
        "image", {**STAGES, "hidden_sizes": [8, 16, 16, 24], "embedding_size": 8, "groups_width": 4}
    ),
    "resnet": Family("image", {**STAGES, "embedding_size": 8, "layer_type": "basic"}),
    "segformer": Family("image", {**STAGES, "num_attention_heads": [1, 1, 2, 2]}),
    "siglip_vision_model": Family("image", VISION),
    "swin": Family("image", SWIN),
    "swinv2": Family("image", SWIN),
    "vit": Family("image", VISION),
    "audio-spectrogram-transformer": Family(
        "audio",
        {**SIZES, "max_length": 128, "num_mel_bins": 32},
        {"max_length": 128, "num_mel_bins": 32},
    ),
    "hubert": Family("audio", SPEECH),
    "unispeech-sat": Family("audio", SPEECH),
    "wav2vec2-bert": Family(
        "audio",
        {**SIZES, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5},
    ),
    "wavlm": Family("audio", {**SPEECH, "num_buckets": 16, "max_bucket_distance": 40}),
    "whisper": Family("audio", {**SEQUENCES, "max_source_positions": 50}, {"chunk_length": 1}),
    "patchtst": Family(
        "series",
        {**PATCHES, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
    ),
    "patchtsmixer": Family("series", {**PATCHES, "num_layers": 2}),
}
