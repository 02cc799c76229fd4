"""Masked autoencoding of images without labels: MAE (He et al., CVPR 2022).

Shapes: B rows, N patches of an image, H hidden ones, V visible ones, p pixels a patch's side.
"""

from __future__ import annotations

import torch
from pydantic import Field
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.contracts.backbone_capabilities import patch_size
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

MASK_STREAM = 1 << 16
"""Random stream of the masks, apart from the modality's crops, which follow from the same keys."""


class MAEOptions(Options):
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that are hidden")
    norm_pixels: bool = Field(
        True,
        description="predict each patch less its own mean, divided by its own standard deviation; "
        "false: plain pixels",
    )
    depth: int = Field(4, ge=1, description="decoder blocks; the paper: 8")
    width: int = Field(
        256, ge=4, description="decoder width, a multiple of heads and of 4; the paper: 512"
    )
    heads: int = Field(8, ge=1, description="decoder attention heads; the paper: 16")


@register("objective", "mae", options=MAEOptions)
class MAE(PositionLosses):
    """Masked autoencoder pretraining: a small decoder predicts the pixels of hidden patches.

    It needs images alone, and a plain vision transformer (``timm/vit_*``, ``timm/deit_*``). Use it
    to pretrain one without labels: a step is cheaper than one of ``dino``, and full fine-tuning
    gains more by it than a linear probe. He et al. 2022, "Masked Autoencoders Are Scalable Vision
    Learners".

    The backbone reads the visible patches alone. The loss of a patch is its mean squared error
    over channels and pixels; patches count once each. Which patches are hidden follows from the
    row's key.
    """

    metrics = ("loss",)
    positions: Tensor

    def __init__(self, backbone: Backbone, options: MAEOptions, state: State):
        super().__init__(backbone, options, state)
        name = backbone.arch.name
        inputs = backbone.arch.inputs
        patch = patch_size(backbone)
        if patch is None or backbone.token_dim is None:
            raise ValueError(
                f"{name}: mae hides patches, which takes a plain vision transformer "
                "(timm/vit_*, timm/deit_*); simclr and dino take any image backbone"
            )
        size = inputs["size"]
        width = options.width
        if size % patch or size < 2 * patch:
            raise ValueError(
                f"{name}: images of {size} px are not a whole number of patches of {patch} px, two "
                f"or more a side; set the modality's size to a multiple of {patch}"
            )
        if width % 4 or width % options.heads:
            raise ValueError(
                f"mae.width {width} must be a multiple of 4 and of mae.heads {options.heads}"
            )
        self.patch = patch
        self.side = size // patch
        count = self.side**2
        self.hidden = min(count - 1, max(1, round(options.mask_ratio * count)))
        self.enter = nn.Linear(backbone.token_dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        blocks = (Block(width, options.heads, qkv_bias=True) for _ in range(options.depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, patch * patch * inputs["channels"])
        positions = build_sincos2d_pos_embed([self.side, self.side], width)
        self.register_buffer("positions", positions, persistent=False)

    def masks(self, keys: Tensor) -> Tensor:
        """Return (B, N) true where a patch is hidden, the same number in each row.

        Args:
            keys: (B,) the rows' keys.
        """
        noise = uniform(keys, self.side**2, stream=MASK_STREAM)
        patches = noise.topk(self.hidden, dim=1).indices
        mask = torch.zeros_like(noise, dtype=torch.bool)
        return mask.scatter(1, patches, True)

    def patches(self, image: Tensor) -> Tensor:
        """Return the targets (B, N, p * p * C) of images (B, C, H, W)."""
        b, c = image.shape[:2]
        grid = image.float().view(
            b,
            c,
            self.side,
            self.patch,
            self.side,
            self.patch,
        )
        grid = grid.permute(0, 2, 4, 3, 5, 1)
        patches = grid.flatten(3).flatten(1, 2)
        if not self.options.norm_pixels:
            return patches
        mean = patches.mean(-1, keepdim=True)
        variance = patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def order(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (B, V, 1) of visible and (B, H, 1) of hidden patches, each in order.

        Their numbers are known, so this does not wait for the device as reading the mask would.
        """
        order = mask.byte().argsort(dim=1, stable=True).unsqueeze(2)
        num_visible = mask.shape[1] - self.hidden
        visible, hidden = order.split((num_visible, self.hidden), dim=1)
        return visible, hidden

    def decoded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the pixels (B, H, p * p * C) of the hidden patches, in their order.

        Args:
            tokens: (B, prefix + V, D) the backbone's, the visible patches behind prefix tokens.
            mask: (B, N) true where a patch is hidden.
        """
        b, n = mask.shape
        x = self.enter(tokens)
        prefix = x.shape[1] - (n - self.hidden)
        visible, hidden = (places.expand(-1, -1, x.shape[2]) for places in self.order(mask))
        blank = self.mask_token.to(x.dtype).expand(b, n, -1)
        grid = blank.scatter(1, visible, x[:, prefix:])
        grid = grid + self.positions.to(x.dtype)
        inputs = torch.cat([x[:, :prefix], grid], dim=1)
        decoded = self.norm(self.blocks(inputs))
        of_hidden = decoded[:, prefix:].gather(1, hidden)
        return self.pixels(of_hidden)

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B, H) losses of the hidden patches; all of them count."""
        mask = self.masks(batch.keys)
        features = backbone(batch, token_mask=mask, want=("tokens",))
        assert features.tokens is not None
        target = self.patches(batch["image"])
        hidden = self.order(mask)[1].expand(-1, -1, target.shape[2])
        predicted = self.decoded(features.tokens, mask).float()
        difference = predicted - target.gather(1, hidden)
        losses = difference.square().mean(-1)
        # a pooling layer with weights is part of the graph: DDP waits for every gradient
        losses = losses + 0.0 * features.pooled.sum()
        return losses, torch.ones_like(losses), {}
