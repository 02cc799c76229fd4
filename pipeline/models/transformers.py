"""BERT (Devlin et al. 2019) and GPT-2 (Radford et al. 2019) of transformers, from a size given in the job."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.contracts import Backbone, Batch, Features
from pipeline.registry import Options, register

ARCHITECTURES = ["bert", "gpt2"]


class TransformersOptions(Options):
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(256, ge=8, description="width")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    intermediate: int | None = Field(None, ge=8, description="width of the feed-forward part; none: 4 x hidden")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of hidden states and attention")
    positions: int | None = Field(None, ge=8, description="longest sequence; none: the modality's length")
    config: dict | None = Field(None, description="a whole transformers configuration (from a config.json); the sizes above are then ignored")
    pool: Literal["auto", "mean", "first", "last"] = Field("auto", description="pooled feature; auto: mean of the tokens, or the last one of a causal model")


@register("model", "transformers", options=TransformersOptions)
class Transformers(Backbone):
    """Input ``tokens`` (B, N) with ``mask`` (B, N), or with ``segments`` (B, N) when documents are packed: then positions restart
    and attention stays within a document."""

    def __init__(self, architecture: str, options: TransformersOptions, inputs: dict[str, Any]):
        super().__init__(architecture, options, inputs)
        if "vocabulary" not in inputs:
            raise ValueError(f"transformers/{architecture} reads text; these rows are {', '.join(inputs) or 'something else'}")
        if options.config is None and options.hidden % options.heads:
            raise ValueError(f"transformers/{architecture}: heads {options.heads} must divide hidden {options.hidden}")
        self.architecture, self.options = architecture, options
        self.causal = architecture == "gpt2"
        self.model: Any = _build(architecture, options, inputs)
        self.arch = {"name": f"transformers/{architecture}", "options": options.model_dump(), "inputs": dict(inputs)}
        self.pooled_dim = self.token_dim = self.model.config.hidden_size
        if inputs["vocabulary"] > self.embedding().num_embeddings:
            raise ValueError(f"the tokenizer has {inputs['vocabulary']} tokens, the embedding of {architecture} {self.embedding().num_embeddings}")
        if inputs["length"] > self.model.config.max_position_embeddings:
            raise ValueError(f"rows of {inputs['length']} tokens are longer than the {self.model.config.max_position_embeddings} positions of {architecture}")
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
        if self.causal:
            words["use_cache"] = False
        hidden = self.model(**words).last_hidden_state
        return Features(_pool(hidden, mask, self.pool), tokens=hidden, mask=mask)

    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {"embeddings": []}
        blocks = "h." if self.causal else "encoder.layer."
        for name, _ in self.model.named_parameters():
            if name.startswith(blocks):
                number = int(name[len(blocks):].split(".")[0])
                out.setdefault(f"block{number:02d}", []).append(f"model.{name}")
            elif name.startswith("ln_f."):
                out.setdefault("norm", []).append(f"model.{name}")
            else:
                out["embeddings"].append(f"model.{name}")
        return out


def _build(architecture: str, options: TransformersOptions, inputs: dict[str, Any]) -> nn.Module:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    if options.config is not None:
        return BertModel(BertConfig(**options.config), add_pooling_layer=False) if architecture == "bert" else GPT2Model(GPT2Config(**options.config))
    positions = options.positions or inputs["length"]
    inner = options.intermediate or 4 * options.hidden
    if architecture == "bert":
        return BertModel(BertConfig(
            vocab_size=inputs["vocabulary"], hidden_size=options.hidden, num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=inner, max_position_embeddings=positions, pad_token_id=0, hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout), add_pooling_layer=False)
    return GPT2Model(GPT2Config(
        vocab_size=inputs["vocabulary"], n_embd=options.hidden, n_layer=options.layers, n_head=options.heads, n_inner=inner,
        n_positions=positions, resid_pdrop=options.dropout, embd_pdrop=options.dropout, attn_pdrop=options.dropout,
        bos_token_id=2, eos_token_id=3))


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
