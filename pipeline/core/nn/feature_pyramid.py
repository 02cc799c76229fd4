"""Feature pyramids over a backbone's feature maps, for detection and segmentation.

A backbone with maps of several strides gets a Feature Pyramid Network (Lin et al. 2017); one whose
maps all have one stride (a plain ViT) gets the simple feature pyramid of its last map (Li et al.
2022, "Exploring Plain Vision Transformer Backbones for Object Detection").
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d  # pyright: ignore[reportMissingTypeStubs]
from torchvision.ops import FeaturePyramidNetwork  # pyright: ignore[reportMissingTypeStubs]
from torchvision.ops.feature_pyramid_network import (  # pyright: ignore[reportMissingTypeStubs]
    LastLevelMaxPool,
    LastLevelP6P7,
)

from pipeline.core.contracts import Backbone, FeatureMapSpec, Features


class Pyramid(nn.Module):
    """Feature maps of one width, finest first.

    ``strides`` are those of its maps in pixels of the input: of the ``wanted`` ones those that the
    backbone has (a plain ViT: its patch size times powers of two), then those that ``top`` adds:
    "p6p7" two strided convolutions (RetinaNet, FCOS), "pool" one subsampling (Faster R-CNN).
    ``out_channels`` is what torchvision's detectors ask for.

    Raises ValueError for a backbone without feature maps, or with none of the wanted strides.
    """

    def __init__(
        self,
        backbone: Backbone,
        wanted: tuple[int, ...] = (8, 16, 32),
        channels: int = 256,
        top: Literal["none", "p6p7", "pool"] = "none",
    ):
        super().__init__()
        name = backbone.arch.name
        if not backbone.feature_map_specs:
            raise ValueError(
                f"{name} gives no feature maps (stages); detection and segmentation need an "
                "image backbone such as timm/resnet50 or a ViT"
            )
        # The last one of each stride
        last = {stage.stride: stage for stage in backbone.feature_map_specs}
        self.out_channels = channels
        self.simple: SimplePyramid | None = None
        if len(last) == 1:
            self.simple = SimplePyramid(backbone.feature_map_specs[-1], wanted, channels)
            self.names, strides = (self.simple.stage,), self.simple.strides
        else:
            used = [last[stride] for stride in sorted(wanted) if stride in last]
            if not used:
                raise ValueError(
                    f"{name} has feature maps of strides {sorted(last)}, of which "
                    f"{list(wanted)} are wanted"
                )
            self.names = tuple(stage.name for stage in used)
            strides = tuple(stage.stride for stage in used)
        blocks = {
            "none": None,
            "p6p7": LastLevelP6P7(channels, channels),
            "pool": LastLevelMaxPool(),
        }[top]
        self.fpn = (
            FeaturePyramidNetwork([last[s].channels for s in strides], channels, blocks)
            if self.simple is None
            else None
        )
        self.top = blocks if self.simple is not None else None
        self.base = strides
        num_more = {"none": 0, "p6p7": 2, "pool": 1}[top]
        self.strides = strides + tuple(strides[-1] * 2 ** (i + 1) for i in range(num_more))

    def forward(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return maps (B, channels, ceil(H / stride), ceil(W / stride)) by names "0", "1", ...

        The names of those of ``top`` are torchvision's; ``size`` is the input's (H, W).
        """
        if self.simple is not None:
            maps = self.simple(features.stages[self.simple.stage])
            names = [str(i) for i in range(len(maps))]
            if self.top is not None:
                maps, names = self.top(maps, maps, names)
            return dict(zip(names, maps, strict=True))
        assert self.fpn is not None
        stages = {}
        for i, (name, stride) in enumerate(zip(self.names, self.base, strict=True)):
            grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
            x = features.stages[name]
            # Inception does not pad: its maps are a little smaller than their stride says
            if x.shape[-2:] != grid:
                x = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
            stages[str(i)] = x
        return self.fpn(stages)


class SimplePyramid(nn.Module):
    """All scales from one map (Li et al. 2022, section 3).

    Transposed convolutions for finer ones and pooling for coarser ones, then a 1x1 and a 3x3
    convolution with layer norms.
    """

    def __init__(self, stage: FeatureMapSpec, wanted: tuple[int, ...], channels: int):
        super().__init__()
        self.stage = stage.name
        powers = sorted({round(math.log2(stride / stage.stride)) for stride in wanted})
        # Patches of 14 px give the strides 7, 14 and 28
        powers = [power for power in powers if power >= 0 or stage.stride % (1 << -power) == 0]
        self.strides = tuple(
            stage.stride << power if power >= 0 else stage.stride >> -power for power in powers
        )
        self.branches = nn.ModuleList(
            self._branch(stage.channels, power, channels) for power in powers
        )

    @staticmethod
    def _branch(width: int, power: int, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for step in range(-power):
            finer = max(width // 2, 1)
            layers.append(nn.ConvTranspose2d(width, finer, 2, stride=2))
            layers += [LayerNorm2d(finer), nn.GELU()] if step < -power - 1 else []
            width = finer
        layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(power)]
        return nn.Sequential(
            *layers,
            nn.Conv2d(width, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]
