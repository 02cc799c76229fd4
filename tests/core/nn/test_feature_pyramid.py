"""Feature pyramids over backbones of every kind: sizes, strides, and that the whole of them is
trained.
"""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Backbone, Batch, FeatureMapSpec, Features
from pipeline.core.nn.feature_pyramid import Pyramid
from pipeline.core.specs import Architecture


class Maps(Backbone):
    """Random maps of given strides and sizes."""

    def __init__(self, stages: tuple[FeatureMapSpec, ...], sizes: tuple[int, ...] = ()):
        nn.Module.__init__(self)
        self.feature_map_specs, self.sizes, self.arch = stages, sizes, Architecture("toys/maps")

    def forward(self, batch, *, token_mask=None, want=()):
        b, side = len(batch), batch["image"].shape[-1]
        sizes = self.sizes or tuple(-(-side // stage.stride) for stage in self.feature_map_specs)
        return Features(
            torch.zeros(b, 4),
            stages={
                s.name: torch.randn(b, s.channels, k, k)
                for s, k in zip(self.feature_map_specs, sizes, strict=True)
            },
        )

    def layers(self):
        return {}


def images(side: int, rows: int = 2) -> Batch:
    return Batch(np.arange(rows), torch.arange(rows), {"image": torch.randn(rows, 3, side, side)})


def stages(*pairs: tuple[int, int]) -> tuple[FeatureMapSpec, ...]:
    return tuple(
        FeatureMapSpec(f"stage{i}", channels, stride) for i, (stride, channels) in enumerate(pairs)
    )


def maps_of(backbone: Backbone, side: int, **words):
    pyramid = Pyramid(backbone, channels=32, **words)
    batch = images(side)
    return pyramid, pyramid(backbone(batch, want=("stages",)), (side, side))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_byobnet"]
)
@pytest.mark.parametrize(
    ("wanted", "top", "strides"),
    [
        ((8, 16, 32), "p6p7", (8, 16, 32, 64, 128)),
        ((4, 8, 16, 32), "pool", (4, 8, 16, 32, 64)),
        ((4, 8, 16, 32), "none", (4, 8, 16, 32)),
    ],
)
def test_real_backbones(name, wanted, top, strides):
    backbone = bundle.build_backbone(
        Architecture(f"timm/{name}", {}, {"channels": 3, "size": 160}), seed=0
    )
    pyramid, found = maps_of(backbone, 160, wanted=wanted, top=top)
    assert pyramid.strides == strides
    assert [tuple(m.shape) for m in found.values()] == [
        (2, 32, -(-160 // s), -(-160 // s)) for s in strides
    ]
    torch.stack([m.sum() for m in found.values()]).sum().backward()
    assert all(p.grad is not None for p in pyramid.parameters())


def test_maps_smaller_than_their_stride_says_lie_on_the_grid():
    """Inception does not pad: at 299 px its maps of strides 8, 16, 32 are 35, 17 and 8 wide, the
    grid 38, 19 and 10.
    """
    pyramid, found = maps_of(Maps(stages((2, 8), (8, 8), (16, 8), (32, 8)), (147, 35, 17, 8)), 299)
    assert pyramid.strides == (8, 16, 32) and [m.shape[-1] for m in found.values()] == [38, 19, 10]


def test_the_last_stage_of_a_stride_is_taken():
    assert Pyramid(
        Maps(stages((8, 4), (8, 6), (16, 8), (16, 10), (32, 12))), channels=32
    ).names == ("stage1", "stage3", "stage4")


def test_the_finest_level_depends_on_the_coarsest_stage():
    backbone = Maps(stages((8, 4), (16, 4), (32, 4)))
    pyramid, features = Pyramid(backbone, channels=32), backbone(images(64))
    changed = Features(
        features.pooled, stages={**features.stages, "stage2": features.stages["stage2"] + 1}
    )
    before, after = pyramid(features, (64, 64))["0"], pyramid(changed, (64, 64))["0"]
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("patch", "strides"),
    [(16, (4, 8, 16, 32)), (8, (4, 8, 16, 32)), (32, (4, 8, 16, 32)), (14, (7, 14, 28))],
)
def test_one_stride_gives_all_scales(patch, strides):
    side = 7 * patch  # an odd grid too
    pyramid, found = maps_of(Maps(stages((patch, 16), (patch, 16))), side, wanted=(4, 8, 16, 32))
    assert pyramid.strides == strides and [m.shape[-1] for m in found.values()] == [
        -(-side // s) for s in strides
    ]


def test_backbones_without_maps_are_refused():
    with pytest.raises(ValueError, match=r"toys/maps gives no feature maps .*timm/resnet50"):
        Pyramid(Maps(()))
    with pytest.raises(ValueError, match=r"strides \[2, 64\], of which \[8, 16, 32\] are wanted"):
        Pyramid(Maps(stages((2, 8), (64, 8))))
