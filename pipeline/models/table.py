"""FT-Transformer (Gorishniy et al., NeurIPS 2021): a row of a table as a set of tokens, one for
each number and each category.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import TableInputs
from pipeline.core.specs import Architecture

ARCHITECTURES = ["ft_transformer"]
MODALITY = "table"


class FTTransformerOptions(Options):
    width: int = Field(192, ge=8, description="channels of a token; 192 is the paper's default")
    layers: int = Field(3, ge=1, le=24, description="blocks")
    heads: int = Field(8, ge=1, description="heads of attention")
    hidden: float = Field(
        4 / 3, gt=0, description="width of the feed-forward part, as a multiple of width"
    )
    attention_dropout: float = Field(0.2, ge=0, lt=1, description="dropout of attention weights")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout within the feed-forward part")


@register("model", "table", options=FTTransformerOptions)
class FTTransformer(Backbone):
    """FT-Transformer for rows of a table (modality ``table``).

    Use it for tables of numbers and categories; compare it with ``baselines: [boosted_trees]``,
    which is hard to beat. Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular
    Data".

    The tokens of a row are [CLS], one for each number x_k (x_k W_k + b_k), and one for each
    category, which has a vector of its own (section 3.3 of the paper). Missing numbers and unknown
    categories have no token. The blocks have their norms first (pre-norm; the first block has no
    first norm) and ReGLU.

    - ``pooled`` (B, width): ReLU(LayerNorm([CLS])), which the paper's linear head reads
    - ``tokens`` (B, 1 + K + C, width) with their mask, for K numbers and C categories

    Raises ValueError for rows of another kind, and where heads do not divide width.
    """

    def __init__(self, architecture: str, options: FTTransformerOptions, inputs: TableInputs):
        super().__init__(architecture, options, inputs)
        name = f"table/{architecture}"
        if inputs.get("features") != "table":
            raise ValueError(
                f"{name} reads rows of a table (modality table); these rows give "
                f"{', '.join(inputs) or 'something else'}"
            )
        if options.width % options.heads:
            raise ValueError(
                f"{name}: width {options.width} is not divided by heads {options.heads}"
            )
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.pooled_dim = self.token_dim = options.width
        self.embed = Tokens(inputs["numbers"], inputs["codes"], options.width)
        self.blocks = nn.ModuleList(Block(options, first=not i) for i in range(options.layers))
        self.norm = nn.LayerNorm(options.width)

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if token_mask is not None:
            raise ValueError(f"{self.arch.name} cannot leave tokens out")
        x, mask = self.embed(batch)
        for block in self.blocks:
            x = block(x, mask)
        return Features(F.relu(self.norm(x[:, 0])), tokens=x, mask=mask)

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            part, number, *_ = name.split(".")
            out.setdefault(f"block{number.zfill(2)}" if part == "blocks" else part, []).append(name)
        return out


class Tokens(nn.Module):
    """Make (B, 1 + K + C, width) tokens and (B, 1 + K + C) bool, true for those that exist.

    Weights start uniform within 1 / sqrt(width), as in the authors' code.
    """

    def __init__(self, numbers: int, codes: int, width: int):
        super().__init__()
        self.cls, self.weight, self.bias = (
            nn.Parameter(torch.empty(n, width)) for n in (1, numbers, numbers)
        )
        self.codes = nn.Embedding(codes + 1, width, padding_idx=0)
        for tensor in (self.cls, self.weight, self.bias, self.codes.weight):
            nn.init.uniform_(tensor, -(width**-0.5), width**-0.5)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        codes, known = batch["codes"], batch["numbers_known"]
        x = torch.cat(
            [
                self.cls.expand(codes.shape[0], 1, -1),
                batch["numbers"][..., None] * self.weight + self.bias,
                self.codes(codes),
            ],
            1,
        )
        return x, torch.cat([known.new_ones(codes.shape[0], 1), known, codes > 0], 1)


class Block(nn.Module):
    def __init__(self, options: FTTransformerOptions, first: bool):
        super().__init__()
        width, hidden = options.width, round(options.width * options.hidden)
        self.norm1 = nn.Identity() if first else nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(
            width, options.heads, options.attention_dropout, batch_first=True
        )
        self.norm2 = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 2 * hidden)
        self.leave = nn.Linear(hidden, width)
        self.drop = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.norm1(x)
        attended, _ = self.attention(
            hidden, hidden, hidden, key_padding_mask=~mask, need_weights=False
        )
        x = x + attended
        value, gate = self.enter(self.norm2(x)).chunk(2, -1)
        return x + self.leave(self.drop(value * F.relu(gate)))
