"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), DistilBERT (Sanh et al. 2019) and GPT-2 (Radford et al. 2019) of transformers, from sizes
given in the job or from a whole configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.contracts import Backbone, Batch, Features
from pipeline.registry import Options, register

ARCHITECTURES = ["bert", "roberta", "distilbert", "gpt2"]

BLOCKS = {"bert": "encoder.layer.", "roberta": "encoder.layer.", "distilbert": "transformer.layer.", "gpt2": "h."}
"""What stands before a block's number in the names of its parameters."""

POOLERS = ("bert", "roberta")
"""Families that have a pooler of their own."""


class TransformersOptions(Options):
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(256, ge=8, description="width")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    intermediate: int | None = Field(None, ge=8, description="width of the feed-forward part; none: 4 x hidden")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of hidden states and attention")
    positions: int | None = Field(None, ge=8, description="longest sequence; none: the modality's length")
    config: dict | None = Field(None, description="a whole transformers configuration (from a config.json); the sizes above are then ignored")
    pool: Literal["auto", "mean", "first", "last", "pooler"] = Field(
        "auto", description="pooled feature; auto: mean of the tokens, or the last one of a causal model; pooler: dense and tanh of the first token, "
                            "as BERT and RoBERTa have them")


@register("model", "transformers", options=TransformersOptions)
class Transformers(Backbone):
    """Input ``tokens`` (B, N) with ``mask`` (B, N), or with ``segments`` (B, N) when documents are packed: then positions restart
    and attention stays within a document. ``types`` (B, N) are BERT's token types, read where the configuration has more than one.

    ``model`` is transformers' own, and parameters have its names. RoBERTa counts positions from ``padding_idx + 1``.
    """

    def __init__(self, architecture: str, options: TransformersOptions, inputs: dict[str, Any]):
        super().__init__(architecture, options, inputs)
        if "vocabulary" not in inputs:
            raise ValueError(f"transformers/{architecture} reads text; these rows are {', '.join(inputs) or 'something else'}")
        if options.config is None and options.hidden % options.heads:
            raise ValueError(f"transformers/{architecture}: heads {options.heads} must divide hidden {options.hidden}")
        if options.pool == "pooler" and architecture not in POOLERS:
            raise ValueError(f"transformers/{architecture} has no pooler: set pool to mean, first or last, or leave it out")
        self.architecture, self.options = architecture, options
        self.causal = architecture == "gpt2"
        self.model: Any = _build(architecture, options, inputs)
        config = self.model.config
        self.arch = {"name": f"transformers/{architecture}", "options": options.model_dump(), "inputs": dict(inputs)}
        self.pooled_dim = self.token_dim = config.hidden_size
        self.padding: int | None = _padding(config, inputs) if architecture == "roberta" else None
        """The position of padding, where positions are counted from the one after it; none where they begin at 0."""
        reserved = 0 if self.padding is None else self.padding + 1
        self.positions: int = config.max_position_embeddings - reserved
        """Tokens of the longest sequence."""
        self.has_types = getattr(config, "type_vocab_size", 1) > 1
        self.activation: str = "gelu" if architecture == "roberta" else getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
        self.norm_eps: float = getattr(config, "layer_norm_eps", 1e-12)
        """With ``activation`` (a name of transformers.activations) that of the family's head for masked language modelling."""
        if inputs["vocabulary"] > self.embedding().num_embeddings:
            raise ValueError(f"the tokenizer has {inputs['vocabulary']} tokens, the embedding of {architecture} {self.embedding().num_embeddings}")
        if inputs["length"] > self.positions:
            raise ValueError(f"rows of {inputs['length']} tokens are longer than the {self.positions} positions of {architecture}"
                             + (f" (the first {reserved} of its {config.max_position_embeddings} are for padding)" if reserved else ""))
        self.pool = options.pool if options.pool != "auto" else ("last" if self.causal else "mean")

    def forward(self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()) -> Features:
        tokens = batch["tokens"]
        segments = batch.data.get("segments")
        words: dict[str, Any] = {"input_ids": tokens}
        if segments is not None:
            mask = segments > 0
            words |= {"attention_mask": document_mask(segments, self.causal), "position_ids": restarted_positions(segments)}
        else:
            mask = batch.data.get("mask", torch.ones_like(tokens, dtype=torch.bool))
            words["attention_mask"] = mask
        if self.padding is not None:
            places = words.get("position_ids", mask.long().cumsum(1) - 1)
            words["position_ids"] = torch.where(mask, places + self.padding + 1, self.padding)
        if self.has_types and "types" in batch.data:
            words["token_type_ids"] = batch["types"].long()
        if self.causal:
            words["use_cache"] = False
        found = self.model(**words)
        hidden = found.last_hidden_state
        return Features(found.pooler_output if self.pool == "pooler" else _pool(hidden, mask, self.pool), tokens=hidden, mask=mask)

    def advance(self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Causal models only: states (B, n, D) of ``tokens`` (B, n) at ``positions`` (B, n), which follow those in ``past``, and the new past (keys
        and values). ``mask`` (B, past + n) is true for what may be seen."""
        found = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        return found.last_hidden_state, found.past_key_values

    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {"embeddings": []}
        blocks = BLOCKS[self.architecture]
        for name, _ in self.model.named_parameters():
            if name.startswith(blocks):
                number = int(name[len(blocks):].split(".")[0])
                out.setdefault(f"block{number:02d}", []).append(f"model.{name}")
            elif name.startswith(("ln_f.", "pooler.")):
                out.setdefault("norm" if name.startswith("ln_f.") else "pooler", []).append(f"model.{name}")
            else:
                out["embeddings"].append(f"model.{name}")
        return out


def _build(architecture: str, options: TransformersOptions, inputs: dict[str, Any]) -> nn.Module:
    import transformers as hf

    configs = {"bert": hf.BertConfig, "roberta": hf.RobertaConfig, "distilbert": hf.DistilBertConfig, "gpt2": hf.GPT2Config}
    models = {"bert": hf.BertModel, "roberta": hf.RobertaModel, "distilbert": hf.DistilBertModel, "gpt2": hf.GPT2Model}
    config: Any = configs[architecture](**(options.config if options.config is not None else _sizes(architecture, options, inputs)))
    if architecture != "gpt2" and getattr(config, "is_decoder", False):
        raise ValueError(f"transformers/{architecture}: the configuration says is_decoder: true, a model that sees no future; here it is to see both sides: "
                         "take a checkpoint of an encoder, or transformers/gpt2")
    if architecture in POOLERS:
        return models[architecture](config, add_pooling_layer=options.pool == "pooler")
    return models[architecture](config)


def _sizes(architecture: str, options: TransformersOptions, inputs: dict[str, Any]) -> dict[str, Any]:
    """The options in the words of the family's configuration."""
    pad, _, cls, sep, _ = inputs["specials"]
    positions, inner, drop = options.positions or inputs["length"], options.intermediate or 4 * options.hidden, options.dropout
    if architecture == "gpt2":
        return {"vocab_size": inputs["vocabulary"], "n_embd": options.hidden, "n_layer": options.layers, "n_head": options.heads, "n_inner": inner,
                "n_positions": positions, "resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop, "bos_token_id": cls, "eos_token_id": sep}
    if architecture == "distilbert":
        return {"vocab_size": inputs["vocabulary"], "dim": options.hidden, "n_layers": options.layers, "n_heads": options.heads, "hidden_dim": inner,
                "max_position_embeddings": positions, "pad_token_id": pad, "dropout": drop, "attention_dropout": drop}
    own = {"vocab_size": inputs["vocabulary"], "hidden_size": options.hidden, "num_hidden_layers": options.layers, "num_attention_heads": options.heads,
           "intermediate_size": inner, "max_position_embeddings": positions, "pad_token_id": pad, "hidden_dropout_prob": drop,
           "attention_probs_dropout_prob": drop}
    if architecture == "roberta":  # as published: one token type, norms with 1e-5, positions behind that of padding
        own |= {"max_position_embeddings": positions + pad + 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": cls, "eos_token_id": sep}
    return own


def _padding(config: Any, inputs: dict[str, Any]) -> int:
    """RoBERTa's padding id. Raises ValueError where the tokenizer has another one: the embeddings of padding and the positions would be off."""
    if config.pad_token_id != inputs["specials"][0]:
        raise ValueError(f"the tokenizer pads with token {inputs['specials'][0]}, roberta's configuration with pad_token_id {config.pad_token_id}: "
                         "they must be the same, positions are counted from it; give the tokenizer of this checkpoint")
    return config.pad_token_id


def document_mask(segments: Tensor, causal: bool) -> Tensor:
    """(B, 1, N, N) boolean: true where a token may look. Padding looks at itself, so that no row of the softmax is empty."""
    same = segments[:, :, None] == segments[:, None, :]
    if causal:
        same = same.tril()
    return same[:, None]


def restarted_positions(segments: Tensor) -> Tensor:
    """(B, N) position of each token within its document's part of the row."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(first, places, 0).cummax(1).values


def _pool(hidden: Tensor, mask: Tensor, pool: str) -> Tensor:
    if pool == "first":
        return hidden[:, 0]
    if pool == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weight = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
