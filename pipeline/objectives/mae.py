"""Masked autoencoding of images without labels: MAE (He et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.rng import uniform

MASK_STREAM = 1 << 16
"""Keeps masks apart from the modality's crops, which follow from the same keys."""


class MAEOptions(Options):
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are hidden")
    norm_pixels: bool = Field(
        True,
        description="predict each patch less its own mean, by its own deviation; false: plain "
        "pixels",
    )
    depth: int = Field(4, ge=1, description="decoder blocks; the paper: 8")
    width: int = Field(
        256, ge=4, description="decoder width, a multiple of heads and of 4; the paper: 512"
    )
    heads: int = Field(8, ge=1, description="decoder attention heads; the paper: 16")


@register("objective", "mae", options=MAEOptions)
class MAE(Objective):
    """The backbone reads the visible patches alone; a small decoder predicts the pixels of the
    hidden ones. The loss of a patch is its mean squared error, over channels and pixels; patches
    count once each. Which patches are hidden follows from the row's key.
    """

    metrics = ("loss",)
    positions: Tensor

    def __init__(self, backbone: Backbone, options: MAEOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        patch, inputs = getattr(backbone, "patch", None), backbone.arch["inputs"]
        if patch is None or backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch['name']}: mae hides patches, which takes a plain vision "
                "transformer (timm/vit_*, timm/deit_*); "
                "simclr and dino take any image backbone"
            )
        size, width = inputs["size"], options.width
        if size % patch or size < 2 * patch:
            raise ValueError(
                f"{backbone.arch['name']}: images of {size} px are no whole number of patches "
                f"of {patch} px, two or more a side; "
                f"set the modality's size to a multiple of {patch}"
            )
        if width % 4 or width % options.heads:
            raise ValueError(
                f"mae.width {width} must be a multiple of 4 and of mae.heads {options.heads}"
            )
        self.patch, self.side = patch, size // patch
        count = self.side**2
        self.hidden = min(count - 1, max(1, round(options.mask_ratio * count)))
        self.enter = nn.Linear(backbone.token_dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, options.heads, qkv_bias=True) for _ in range(options.depth))
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch * patch * inputs["channels"])
        self.register_buffer(
            "positions", build_sincos2d_pos_embed([self.side, self.side], width), persistent=False
        )

    def masks(self, keys: Tensor) -> Tensor:
        """(B, N) true where a patch is hidden, from (B,) keys; the same number in each row."""
        noise = uniform(keys, self.side**2, stream=MASK_STREAM)
        places = noise.topk(self.hidden, dim=1).indices
        return torch.zeros_like(noise, dtype=torch.bool).scatter(1, places, True)

    def patches(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, p * p * C) targets: pixels, normalised patch by patch where asked
        for.
        """
        b, c = image.shape[:2]
        parts = (
            image.float()
            .view(b, c, self.side, self.patch, self.side, self.patch)
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        if self.options.norm_pixels:
            parts = (parts - parts.mean(-1, keepdim=True)) / (
                parts.var(-1, keepdim=True) + 1e-6
            ).sqrt()
        return parts

    def order(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, visible, 1) and (B, hidden, 1) places of the patches, each in order; without waiting
        for the device, as reading the mask would.
        """
        return (
            mask.byte()
            .argsort(dim=1, stable=True)
            .unsqueeze(2)
            .split((mask.shape[1] - self.hidden, self.hidden), dim=1)
        )  # type: ignore[return-value]

    def decoded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, hidden, p * p * C) pixels of the hidden patches in their order, from (B, prefix +
        visible, D) tokens and the (B, N) mask.
        """
        b, n = mask.shape
        x = self.enter(tokens)
        prefix = x.shape[1] - (n - self.hidden)
        visible, hidden = (places.expand(-1, -1, x.shape[2]) for places in self.order(mask))
        whole = self.mask_token.to(x.dtype).expand(b, n, -1).scatter(1, visible, x[:, prefix:])
        whole = torch.cat([x[:, :prefix], whole + self.positions.to(x.dtype)], dim=1)
        return self.pixels(self.norm(self.blocks(whole))[:, prefix:].gather(1, hidden))

    def _rows(self, backbone: Backbone, batch: Batch) -> Tensor:
        """(B, hidden) losses."""
        mask = self.masks(batch.keys)
        features = backbone(batch, token_mask=mask, want=("tokens",))
        assert features.tokens is not None
        target = self.patches(batch["image"])
        target = target.gather(1, self.order(mask)[1].expand(-1, -1, target.shape[2]))
        losses = (self.decoded(features.tokens, mask).float() - target).square().mean(-1)
        return (
            losses + 0.0 * features.pooled.sum()
        )  # a pooling layer with weights takes part: DDP waits for every parameter's gradient

    def loss(self, backbone: Backbone, batch: Batch):
        losses = self._rows(backbone, batch)
        return losses.sum(), losses.new_full((), float(losses.numel())), {}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        losses = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": losses.new_full((len(batch),), float(self.hidden))}
