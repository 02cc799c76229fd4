"""Language modelling on packed documents: masked (Devlin et al. 2019; dynamic masks, Liu et al. 2019) and causal (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.contracts import Backbone, Batch, Objective
from pipeline.registry import Options, register
from pipeline.rng import uniform


class MaskedOptions(Options):
    mask_share: float = Field(0.15, gt=0, lt=1, description="share of the positions to predict; 80 % masked, 10 % random, 10 % kept")


@register("objective", "mlm", options=MaskedOptions)
class MaskedLM(Objective):
    """Every row predicts the same number of positions, so shapes are fixed and only those go through the vocabulary."""

    metrics = ("perplexity", "loss")
    log_names = ("accuracy",)
    packed = True

    def __init__(self, backbone: Backbone, options: MaskedOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        embedding = backbone.embedding()
        if backbone.causal:
            raise ValueError(f"{backbone.arch['name']} is causal: masked prediction needs a bidirectional backbone (transformers/bert), or use clm")
        width = embedding.embedding_dim
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        specials = backbone.arch["inputs"]["specials"]
        self.mask_id = specials[-1]
        self.register_buffer("specials", torch.tensor(sorted(set(specials))), persistent=False)

    def _chosen(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, k) positions, (B, k) whether they count, (B, N) tokens with the masks put in; all from the rows' keys."""
        tokens = batch["tokens"]
        n = tokens.shape[1]
        k = max(1, round(self.options.mask_share * n))
        u = uniform(batch.keys, n)
        u = torch.where(torch.isin(tokens, self.specials), 2.0, u)  # type: ignore[arg-type]
        values, places = u.topk(k, dim=1, largest=False)
        valid = values < 2.0
        how, other = uniform(batch.keys, k, stream=1), uniform(batch.keys, k, stream=2)
        vocabulary = self.bias.shape[0]
        random = (other * vocabulary).long()
        old = tokens.gather(1, places)
        new = torch.where(how < 0.8, self.mask_id, torch.where(how < 0.9, random, old))
        return places, valid, tokens.scatter(1, places, torch.where(valid, new, old))

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, k) losses, (B, k) weights, (B, k) hits."""
        places, valid, tokens = self._chosen(batch)
        hidden = backbone(batch.replace(tokens=tokens), want=("tokens",)).tokens
        assert hidden is not None
        hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        scores = F.linear(self.transform(hidden), backbone.embedding().weight, self.bias)
        target = batch["tokens"].gather(1, places)
        losses = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        weight = valid.to(losses.dtype)
        return losses * weight, weight, (scores.argmax(-1) == target) & valid

    def loss(self, backbone: Backbone, batch: Batch):
        losses, weight, hits = self._rows(backbone, batch)
        return losses.sum(), weight.sum(), {"accuracy": hits.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        losses, weight, _ = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": weight.sum(1)}


@register("objective", "clm")
class CausalLM(Objective):
    """Next-token prediction within each document; the output is tied to the input embedding."""

    metrics = ("perplexity", "loss")
    packed = True

    def __init__(self, backbone: Backbone, options: Options, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        backbone.embedding()
        if not backbone.causal:
            raise ValueError(f"{backbone.arch['name']} sees the future: causal prediction needs transformers/gpt2, or use mlm")

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = backbone(batch, want=("tokens",)).tokens
        assert hidden is not None
        segments, tokens = batch["segments"], batch["tokens"]
        scores = F.linear(hidden[:, :-1], backbone.embedding().weight)
        target = torch.where((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0), tokens[:, 1:], -100)
        losses = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none", ignore_index=-100).view_as(target)
        return losses, (target >= 0).to(losses.dtype)

    def loss(self, backbone: Backbone, batch: Batch):
        losses, weight = self._rows(backbone, batch)
        return losses.sum(), weight.sum(), {}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        losses, weight = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": weight.sum(1)}
