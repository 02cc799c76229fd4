"""Models of transformers: BERT, RoBERTa, DistilBERT, GPT-2, and wav2vec 2.0 for speech.

Devlin et al. 2019, Liu et al. 2019, Sanh et al. 2019, Radford et al. 2019, Baevski et al. 2020.
Built from sizes given in the job, or from a whole configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import hf_config
from pipeline.config.registry import Options, nearest, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import AudioInputs, TextInputs
from pipeline.core.nn import conv_arithmetic
from pipeline.core.nn.masked import pool_tokens, row_norm
from pipeline.core.specs import Architecture

ARCHITECTURES = ["bert", "roberta", "distilbert", "gpt2", "wav2vec2"]
MODALITY = {
    "bert": "text",
    "roberta": "text",
    "distilbert": "text",
    "gpt2": "text",
    "wav2vec2": "audio",
}

WANTS = {"gpt2": {"tokenizer": "bpe"}, "wav2vec2": {"features": "wave"}}
"""Byte-level BPE as published; samples, not spectrograms."""

BLOCKS = {
    "bert": "encoder.layer.",
    "roberta": "encoder.layer.",
    "distilbert": "transformer.layer.",
    "gpt2": "h.",
}
"""Prefix of a block's number in the names of its parameters."""

POOLERS = ("bert", "roberta")
"""Families with a pooler of their own."""


class TransformersOptions(Options):
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(256, ge=8, description="width")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    intermediate: int | None = Field(
        None, ge=8, description="width of the feed-forward part; none: 4 x hidden"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of hidden states and attention")
    positions: int | None = Field(
        None, ge=8, description="longest sequence of tokens; none: the modality's length"
    )
    conv_channels: int | None = Field(
        None,
        ge=1,
        description="wav2vec2 alone: channels of its convolutions; none: hidden, and 512 at most "
        "as published",
    )
    conv_kernels: list[int] | None = Field(
        None,
        min_length=1,
        description="wav2vec2 alone: kernels of its convolutions; none: 10, 3, 3, 3, 3, 2, 2",
    )
    conv_strides: list[int] | None = Field(
        None,
        min_length=1,
        description="wav2vec2 alone: their strides; none: 5, 2, 2, 2, 2, 2, 2, which is 320 "
        "samples",
    )
    config: dict | None = Field(
        None,
        description="a whole configuration of transformers (from a config.json), in place of the "
        "sizes above",
    )
    pool: Literal["auto", "mean", "first", "last", "pooler"] = Field(
        "auto",
        description="how the tokens of a row become one feature. auto: the mean, or the last token "
        "of a causal model; pooler: a linear layer and tanh of the first token, as in BERT and "
        "RoBERTa",
    )


@register("model", "transformers", options=TransformersOptions)
def build(architecture: str, options: TransformersOptions, inputs: Any) -> Backbone:
    """BERT, RoBERTa, DistilBERT, GPT-2 and wav2vec 2.0 of transformers, in any size.

    Devlin et al. 2019 (BERT), Liu et al. 2019 (RoBERTa), Sanh et al. 2019 (DistilBERT), Radford et
    al. 2019 (GPT-2), Baevski et al. 2020 (wav2vec 2.0).

    Take this library to train one of them from the start: packed documents run in one pass, and
    objective ``wav2vec2`` can mask frames. Library ``hf`` has all other models of transformers.

    Raises ValueError for options of another family, and for inputs that do not fit.
    """
    speech = architecture == "wav2vec2"
    others = ("positions",) if speech else ("conv_channels", "conv_kernels", "conv_strides")
    if given := [name for name in others if getattr(options, name) is not None]:
        raise ValueError(
            f"transformers/{architecture} has no {', '.join(given)}: "
            f"{'texts have' if speech else 'wav2vec2 has'} that; leave it out"
        )
    if options.config is None and options.hidden % options.heads:
        raise ValueError(
            f"transformers/{architecture}: heads {options.heads} must divide hidden "
            f"{options.hidden}"
        )
    return (Wav2Vec2 if speech else Transformers)(architecture, options, inputs)


class Transformers(Backbone):
    """Text models. Input ``tokens`` (B, N) with ``mask`` (B, N), or ``segments`` (B, N) of packed
    documents.

    In packed rows positions restart and attention stays within a document. ``types`` (B, N) are
    BERT's token types, read where the configuration has more than one. ``model`` is transformers'
    own, and its parameters keep their names. RoBERTa counts positions from ``padding_idx + 1``.
    """

    def __init__(self, architecture: str, options: TransformersOptions, inputs: TextInputs):
        super().__init__(architecture, options, inputs)
        if "vocabulary" not in inputs:
            raise ValueError(
                f"transformers/{architecture} reads text; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        if options.pool == "pooler" and architecture not in POOLERS:
            raise ValueError(
                f"transformers/{architecture} has no pooler: set pool to mean, first or last, "
                "or leave it out"
            )
        self.architecture, self.options = architecture, options
        self.causal = architecture == "gpt2"
        self.model: Any = _build(architecture, options, inputs)
        config = self.model.config
        self.arch = Architecture(f"transformers/{architecture}", options.model_dump(), dict(inputs))
        self.pooled_dim = self.token_dim = config.hidden_size
        self.padding: int | None = _padding(config, inputs) if architecture == "roberta" else None
        """Position of padding, where positions are counted from the next one; None where they start
        at 0.
        """
        reserved = 0 if self.padding is None else self.padding + 1
        self.positions: int = config.max_position_embeddings - reserved
        """Tokens of the longest sequence."""
        self.has_types = getattr(config, "type_vocab_size", 1) > 1
        self.activation: str = (
            "gelu"
            if architecture == "roberta"
            else getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
        )
        self.norm_eps: float = getattr(config, "layer_norm_eps", 1e-12)
        """With ``activation`` (a name of transformers.activations), for the family's head for
        masked language modelling.
        """
        if inputs["vocabulary"] > self.embedding().num_embeddings:
            raise ValueError(
                f"the tokenizer has {inputs['vocabulary']} tokens, the embedding of "
                f"{architecture} {self.embedding().num_embeddings}"
            )
        if inputs["length"] > self.positions:
            total = config.max_position_embeddings
            note = f" (the first {reserved} of its {total} are for padding)" if reserved else ""
            raise ValueError(
                f"rows of {inputs['length']} tokens are longer than the {self.positions} "
                f"positions of {architecture}{note}"
            )
        self.pool = options.pool if options.pool != "auto" else ("last" if self.causal else "mean")

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        tokens = batch["tokens"]
        segments = batch.data.get("segments")
        arguments: dict[str, Any] = {"input_ids": tokens}
        if segments is not None:
            mask = segments > 0
            arguments |= {
                "attention_mask": document_mask(segments, self.causal),
                "position_ids": restarted_positions(segments),
            }
        else:
            mask = batch.data.get("mask", torch.ones_like(tokens, dtype=torch.bool))
            arguments["attention_mask"] = mask
        if self.padding is not None:
            positions = arguments.get("position_ids", mask.long().cumsum(1) - 1)
            arguments["position_ids"] = torch.where(
                mask, positions + self.padding + 1, self.padding
            )
        if self.has_types and "types" in batch.data:
            arguments["token_type_ids"] = batch["types"].long()
        if self.causal:
            arguments["use_cache"] = False
        output = self.model(**arguments)
        hidden = output.last_hidden_state
        return Features(
            output.pooler_output if self.pool == "pooler" else pool_tokens(hidden, mask, self.pool),
            tokens=hidden,
            mask=mask,
        )

    def advance(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Continue a sequence, as `Continues` describes it (causal models only)."""
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )
        return output.last_hidden_state, output.past_key_values

    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {"embeddings": []}
        blocks = BLOCKS[self.architecture]
        for name, _ in self.model.named_parameters():
            layer = "embeddings"
            if name.startswith(blocks):
                layer = f"block{int(name[len(blocks) :].split('.')[0]):02d}"
            elif name.startswith("ln_f."):
                layer = "norm"
            elif name.startswith("pooler."):
                layer = "pooler"
            out.setdefault(layer, []).append(f"model.{name}")
        return out


def _build(architecture: str, options: TransformersOptions, inputs: TextInputs) -> nn.Module:
    import transformers as hf

    families = {
        "bert": (hf.BertConfig, hf.BertModel),
        "roberta": (hf.RobertaConfig, hf.RobertaModel),
        "distilbert": (hf.DistilBertConfig, hf.DistilBertModel),
        "gpt2": (hf.GPT2Config, hf.GPT2Model),
    }
    config_class, model_class = families[architecture]
    config: Any = _config(
        config_class, architecture, options, lambda: _sizes(architecture, options, inputs)
    )
    if architecture != "gpt2" and getattr(config, "is_decoder", False):
        raise ValueError(
            f"transformers/{architecture}: the configuration says is_decoder: true, a model that "
            "sees no future; here it is to see both sides: take a checkpoint of an encoder, or "
            "transformers/gpt2"
        )
    if architecture in POOLERS:
        return model_class(config, add_pooling_layer=options.pool == "pooler")
    return model_class(config)


def _config(
    kind: Any, architecture: str, options: TransformersOptions, sizes: Callable[[], dict[str, Any]]
) -> Any:
    """Build the family's configuration, from the sizes or from the plain keys of a given one.

    Raises ValueError for a configuration that the family does not accept (`hf_config`).
    """
    if options.config is None:
        return kind(**sizes())
    from transformers.activations import ACT2FN

    try:
        config = kind(**hf_config.plain(architecture, options.config))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"transformers/{architecture}: config: {' '.join(str(error).split())}"
        ) from None
    for key in ("hidden_act", "activation", "activation_function", "feat_extract_activation"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise ValueError(f"transformers/{architecture}: config: {key}: {nearest(name, ACT2FN)}")
    return config


def _sizes(architecture: str, options: TransformersOptions, inputs: TextInputs) -> dict[str, Any]:
    """Translate the options to the family's configuration."""
    pad, _, cls, sep, _ = inputs["specials"]
    positions = options.positions or inputs["length"]
    inner = options.intermediate or 4 * options.hidden
    drop = options.dropout
    if architecture == "gpt2":
        return {
            "vocab_size": inputs["vocabulary"],
            "n_embd": options.hidden,
            "n_layer": options.layers,
            "n_head": options.heads,
            "n_inner": inner,
            "n_positions": positions,
            "resid_pdrop": drop,
            "embd_pdrop": drop,
            "attn_pdrop": drop,
            "bos_token_id": cls,
            "eos_token_id": sep,
        }
    if architecture == "distilbert":
        return {
            "vocab_size": inputs["vocabulary"],
            "dim": options.hidden,
            "n_layers": options.layers,
            "n_heads": options.heads,
            "hidden_dim": inner,
            "max_position_embeddings": positions,
            "pad_token_id": pad,
            "dropout": drop,
            "attention_dropout": drop,
        }
    own = {
        "vocab_size": inputs["vocabulary"],
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "pad_token_id": pad,
        "hidden_dropout_prob": drop,
        "attention_probs_dropout_prob": drop,
    }
    # as published: one token type, norms with 1e-5, positions from the one after padding
    if architecture == "roberta":
        own |= {
            "max_position_embeddings": positions + pad + 1,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "bos_token_id": cls,
            "eos_token_id": sep,
        }
    return own


def _padding(config: Any, inputs: TextInputs) -> int:
    """Return RoBERTa's padding id.

    Raises ValueError where the tokenizer has another one, as positions are counted from it.
    """
    if config.pad_token_id != inputs["specials"][0]:
        raise ValueError(
            f"the tokenizer pads with token {inputs['specials'][0]}, roberta's configuration with "
            f"pad_token_id {config.pad_token_id}: they must be the same, positions are counted "
            "from it; give the tokenizer of this checkpoint"
        )
    return config.pad_token_id


def document_mask(segments: Tensor, causal: bool) -> Tensor:
    """Return (B, 1, N, N) bool, true where a token may attend.

    Padding attends to itself, so that no row of the softmax is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    if causal:
        same = same.tril()
    return same[:, None]


def restarted_positions(segments: Tensor) -> Tensor:
    """Return (B, N) the position of each token within its document's part of the row."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(first, places, 0).cummax(1).values


class Wav2Vec2(Backbone):
    """wav2vec 2.0 (Baevski et al. 2020). Input ``wave`` (B, n) with ``mask`` (B, n), true for
    samples.

    ``tokens`` (B, N, D) is the last hidden state. ``latent`` (B, N, C, wanted as "latent") is the
    normed output of the convolutions before its projection, which the quantiser reads;
    ``stages["convolved"]`` (wanted as "convolved") the same before its norm. ``token_mask`` (B, N)
    hides frames behind the model's ``masked_spec_embed``. ``model`` is transformers' own, and its
    parameters keep their names.

    A padded row gives the same output as alone. For ``feat_extract_norm: group`` (the published
    base models) this takes a norm over the row's own frames: they were trained on rows cut to one
    length, without an attention mask, where the norm's statistics are those of whole recordings.
    transformers includes the padding, so its padded rows differ from its single ones, and from
    these. Models built from sizes have the ``layer`` kind, as the large ones.

    LayerDrop is off, since DDP waits for every parameter's gradient, and so is the configuration's
    SpecAugment: masks come from the objective or the modality.
    """

    def __init__(self, architecture: str, options: TransformersOptions, inputs: AudioInputs):
        super().__init__(architecture, options, inputs)
        if inputs.get("features") != "wave":
            raise ValueError(
                f"transformers/{architecture} reads samples (modality audio with features: "
                "wave); these rows are "
                f"{inputs.get('features') or ', '.join(inputs) or 'something else'}"
            )
        if options.pool not in ("auto", "mean"):
            raise ValueError(
                f"transformers/{architecture} pools by the mean of its frames: set pool to "
                "mean, or leave it out"
            )
        import transformers as hf

        config: Any = _config(
            hf.Wav2Vec2Config, architecture, options, lambda: _speech_sizes(options)
        )
        if config.add_adapter:
            raise ValueError(
                f"transformers/{architecture}: the configuration says add_adapter: true, "
                "convolutions behind the encoder that change its stride: "
                "take a checkpoint without them"
            )
        config.layerdrop, config._attn_implementation = 0.0, "sdpa"
        self.architecture, self.options = architecture, options
        self.model: Any = hf.Wav2Vec2Model(config)
        self.arch = Architecture(f"transformers/{architecture}", options.model_dump(), dict(inputs))
        self.pooled_dim = self.token_dim = config.hidden_size
        self.latent_dim: int = config.conv_dim[-1]
        self.convolutions = tuple(
            (kernel, stride, 0)
            for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)
        )
        self.prenorm: bool = config.do_stable_layer_norm

    def frame_mask(self, batch: Batch) -> Tensor:
        """Return (B, N) bool, true for a row's own frames; N is 1 where no row has any."""
        assert self.convolutions is not None
        count = max(1, conv_arithmetic.count(batch["wave"].shape[1], self.convolutions))
        return (
            torch.arange(count, device=batch["mask"].device)
            < conv_arithmetic.count(batch["mask"].sum(1), self.convolutions)[:, None]
        )

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        mask, hider = self.frame_mask(batch), getattr(self.model, "masked_spec_embed", None)
        convolved = self._convolved(batch["wave"], batch["mask"].sum(1))
        hidden, latent = self.model.feature_projection(convolved)
        if token_mask is not None:
            if hider is None:
                raise ValueError(
                    f"{self.arch.name}: its configuration has mask_time_prob: 0 and so no "
                    "embedding to hide frames behind; set it to 0.065"
                )
            hidden = torch.where(token_mask[:, :, None], hider.to(hidden.dtype), hidden)
        elif hider is not None and self.training:
            hidden = hidden + 0.0 * hider.to(hidden.dtype)  # DDP waits for its gradient
        hidden = self._encoded(hidden, mask)
        return Features(
            pool_tokens(hidden, mask, "mean"),
            tokens=hidden,
            mask=mask,
            latent=latent if "latent" in want else None,
            stages={"convolved": convolved} if "convolved" in want else {},
        )

    def _convolved(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Run the convolutions on (B, n) samples; (B,) ``lengths`` of the rows.

        Returns (B, N, C).
        """
        assert self.convolutions is not None
        missing = max(0, conv_arithmetic.field(self.convolutions) - wave.shape[1])
        x = F.pad(wave, (0, missing))[:, None]
        for number, layer in enumerate(self.model.feature_extractor.conv_layers):
            if number == 0 and isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                frames = conv_arithmetic.count(lengths, self.convolutions[:1])
                x = layer.activation(row_norm(layer.conv(x), layer.layer_norm, frames))
            else:
                x = layer(x)
        return x.transpose(1, 2)

    def _encoded(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Run the context network, (B, N, D), without transformers' boolean mask.

        That one makes the host wait for the device.
        """
        encoder = self.model.encoder
        hidden = hidden.masked_fill(~mask[:, :, None], 0.0)
        hidden = hidden + encoder.pos_conv_embed(hidden)
        hidden = encoder.dropout(hidden if self.prenorm else encoder.layer_norm(hidden))
        # a row without frames attends to its padding, so that no softmax is empty
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=keys)
        return encoder.layer_norm(hidden) if self.prenorm else hidden

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {"convolutions": [], "projection": [], "positions": []}
        for name, _ in self.model.named_parameters():
            if name.startswith("feature_extractor."):
                out["convolutions"].append(f"model.{name}")
            elif name.startswith("encoder.layers."):
                out.setdefault(f"block{int(name.split('.')[2]):02d}", []).append(f"model.{name}")
            elif name.startswith("encoder.pos_conv_embed.") or (
                name.startswith("encoder.layer_norm.") and not self.prenorm
            ):
                out["positions"].append(f"model.{name}")
            elif not name.startswith("encoder."):
                out["projection"].append(f"model.{name}")
        if self.prenorm:
            out["norm"] = ["model.encoder.layer_norm.weight", "model.encoder.layer_norm.bias"]
        return out

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Rename ``weight_g`` and ``weight_v`` of the position convolution in files from before
        torch 2.1.
        """
        at, today = "model.encoder.pos_conv_embed.conv.", "parametrizations.weight.original"
        old = {f"{at}weight_g": f"{at}{today}0", f"{at}weight_v": f"{at}{today}1"}
        return {old.get(name, name): tensor for name, tensor in tensors.items()}, []


def _speech_sizes(options: TransformersOptions) -> dict[str, Any]:
    """Translate the options to wav2vec 2.0's configuration.

    Norms and biases are those of the large models, which train more stably.
    """
    kernels = options.conv_kernels or [10, 3, 3, 3, 3, 2, 2]
    strides = options.conv_strides or [5, 2, 2, 2, 2, 2, 2]
    if len(kernels) != len(strides) or min(*kernels, *strides) < 1:
        raise ValueError(
            f"transformers/wav2vec2: conv_kernels {kernels} and conv_strides {strides} must be "
            "as many, each 1 or more"
        )
    drop = options.dropout
    return {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": options.intermediate or 4 * options.hidden,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_dim": [options.conv_channels or min(512, options.hidden)] * len(kernels),
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embedding_groups": math.gcd(16, options.hidden),
        "hidden_dropout": drop,
        "attention_dropout": drop,
        "feat_proj_dropout": drop,
        "activation_dropout": 0.0,
        "final_dropout": drop,
    }
