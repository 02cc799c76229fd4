"""Every family of image backbones that is named in the README, and timm's own rules as the
reference for what is put into another shape.
"""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer
from toys import label_state, task_of

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture, ModalitySpec

FAMILIES = {
    "vgg11": 32,
    "vgg11_bn": 32,
    "resnet18": 64,
    "inception_v3": 75,
    "inception_v4": 75,
    "inception_resnet_v2": 75,
    "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "convnext_atto": 64,
    "efficientnet_b0": 64,
    "tf_efficientnet_lite0": 64,
    "swin_tiny_patch4_window7_224": 64,
    "densenet121": 64,
    "pit_ti_224": 224,
}
"""A small one of each family, and a size that is small for it."""
VGG = ("vgg11", "vgg11_bn")
"""133 million parameters: half a gigabyte, and seconds to draw them."""
LARGE = (
    *VGG,
    "inception_v4",
    "inception_resnet_v2",
    "densenet121",
    "deit_tiny_distilled_patch16_224",
    "efficientnet_b0",
)
LIGHT = [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in FAMILIES]
"""With weights; by shapes alone every family is in the quick tests."""
EACH = pytest.mark.parametrize("name", FAMILIES)
VIEWS = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224")


def build(name: str, size: int, channels: int = 3, seed: int = 0, **options):
    return bundle.build_backbone(
        Architecture(f"timm/{name}", options, {"channels": channels, "size": size}), seed
    ).eval()


def hollow(name: str, size: int, channels: int = 3):
    """Without memory: shapes alone."""
    with torch.device("meta"):
        return build(name, size, channels)


def images(n: int = 2, size: int = 64, channels: int = 3, device: str = "cpu") -> Batch:
    pixels = torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(size))
    return Batch(np.arange(n), torch.arange(n), {"image": pixels.to(device)})


def shaken(backbone):
    """Biases, norms and scales start as noughts and ones, under which mix-ups do not show."""
    generator = torch.Generator().manual_seed(1)
    for name, p in backbone.named_parameters():
        if p.dim() < 2 or name.endswith(("token", "pos_embed", "bias_table")):
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return backbone


# ---------------------------------------------------------------- shapes, at every size


@EACH
@pytest.mark.parametrize(
    "sizes",
    [((96, 1),), pytest.param(((64, 3), (128, 1), (192, 3), (224, 3)), marks=pytest.mark.slow)],
    ids=["one", "more"],
)
@torch.no_grad()
def test_pooled_tokens_and_stages_have_their_shapes_at_every_size(name, sizes):
    for size, channels in sizes:
        if size < FAMILIES[name] or (name == "pit_ti_224" and size != 224):
            continue
        backbone = hollow(name, size, channels)
        found = backbone(images(2, size, channels, "meta"), want=("stages",))
        assert found.pooled.shape == (2, backbone.pooled_dim)
        assert (found.tokens is None) == (backbone.token_dim is None)
        assert found.tokens is None or (found.tokens.shape[0], found.tokens.shape[2]) == (
            2,
            backbone.token_dim,
        )
        assert (
            list(found.stages) == [stage.name for stage in backbone.feature_map_specs]
            and len(found.stages) >= 3
        )
        strides = [stage.stride for stage in backbone.feature_map_specs]
        assert strides == sorted(strides) and strides[-1] in (16, 32)
        for stage in backbone.feature_map_specs:
            b, c, h, w = found.stages[stage.name].shape
            # Inception's convolutions without padding lose a border at every layer
            assert (
                (b, c) == (2, stage.channels)
                and h == w
                and math.floor(size / stage.stride * 0.45) <= h <= math.ceil(size / stage.stride)
            )


@pytest.mark.parametrize("name", LIGHT)
@torch.no_grad()
def test_stages_are_what_the_named_modules_of_the_plain_model_give(name):
    """And the pooled features are the same with them as without."""
    backbone, batch, seen = shaken(build(name, FAMILIES[name])), images(2, FAMILIES[name]), {}
    modules = dict(backbone.model.named_modules())
    hooks = [
        modules[s.name].register_forward_hook(lambda m, a, out, at=s.name: seen.update({at: out}))
        for s in backbone.feature_map_specs
        if s.name in modules
    ]
    found = backbone(batch, want=("stages",))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found.pooled, backbone(batch).pooled)
    assert torch.equal(backbone(batch).pooled, backbone(batch).pooled)
    reference = timm.create_model(
        name,
        num_classes=0,
        **({"img_size": FAMILIES[name]} if backbone.token_dim or name.startswith("swin") else {}),
        **({"aux_logits": False} if name == "inception_v3" else {}),
    ).eval()
    reference.load_state_dict(
        {n.removeprefix("model."): t for n, t in backbone.state_dict().items()}
    )
    torch.testing.assert_close(
        found.pooled,
        reference.forward_head(reference.forward_features(batch["image"]), pre_logits=True),
    )
    for stage in backbone.feature_map_specs:
        if not torch.is_tensor(out := seen.get(stage.name)):
            continue
        ours = found.stages[stage.name]
        if out.dim() == 3:  # (B, prefix + N, D)
            out = out[:, -ours.shape[2] * ours.shape[3] :].mT.reshape(ours.shape)
        torch.testing.assert_close(
            ours, out if out.shape == ours.shape else out.permute(0, 3, 1, 2)
        )
    assert len(seen) >= 3


@pytest.mark.parametrize("name", VIEWS)
@torch.no_grad()
def test_transformers_take_images_of_other_sizes_too(name):
    """Crops of several sizes through one model: what timm's own model of that size gives with the
    same weights.
    """
    backbone = shaken(build(name, 128))
    batch = images(2, 96)
    other = build(name, 96)
    moved = bundle.transfer(other, backbone.state_dict(), "the other size")
    # A window that shrinks with the map is another network: only the shape is the same
    if name.startswith("swin"):
        assert backbone(batch).pooled.shape == other(batch).pooled.shape
        return
    assert any("resampled from 8 x 8 to 6 x 6" in text for text in moved.changed)
    torch.testing.assert_close(backbone(batch).pooled, other(batch).pooled)


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("inception_v3", 72, 75),
        ("vit_tiny_patch16_224", 28, 32),
        pytest.param("inception_v4", 64, 75, marks=pytest.mark.slow),
        pytest.param("inception_resnet_v2", 64, 75, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 75, 76, marks=pytest.mark.slow),
    ],
)
def test_a_size_that_a_model_cannot_take_is_refused_with_the_next_that_it_can(name, size, least):
    with pytest.raises(
        ValueError,
        match=rf"timm/{name} takes no images of {size} pixels a side \(.+\); the next size that "
        rf"it takes is {least}: ",
    ):
        build(name, size)


def test_models_that_cannot_be_backbones_and_options_they_lack_are_refused():
    with pytest.raises(
        ValueError,
        match=r"timm/crossvit_tiny_240 cannot be a backbone here: its forward_features gives "
        r"several tensors",
    ):
        build("crossvit_tiny_240", 240)
    with pytest.raises(ValueError, match=r"timm/vgg11 has no drop_path: leave it out"):
        build("vgg11", 32, drop_path=0.1)
    with pytest.raises(
        ValueError, match=r"timm/resnet18 reads images; these rows are vocabulary, length"
    ):
        bundle.build_backbone(Architecture("timm/resnet18", {}, {"vocabulary": 10, "length": 8}))


# ---------------------------------------------------------------- layers


@EACH
@torch.no_grad()
def test_layers_cover_every_parameter_once_from_stem_to_head(name):
    size = 224 if name == "pit_ti_224" else 96  # whose shapes are known from the test above
    backbone = hollow(name, size, 1)
    layers = backbone.layers()
    assert (
        sorted(n for names in layers.values() for n in names)
        == sorted(n for n, _ in backbone.named_parameters())
        and len(layers) >= 4
    )
    first = backbone.model.pretrained_cfg["first_conv"]
    assert f"model.{first}.weight" in next(iter(layers.values()))
    calls: dict[str, int] = {}
    for module_name, module in backbone.named_modules():
        module.register_forward_pre_hook(
            lambda m, args, at=module_name: (calls.setdefault(at, len(calls)), None)[1]
        )
    backbone(images(1, size, 1, "meta"))
    places = [
        [calls[owner] for owner in {n.rpartition(".")[0] for n in names} if owner in calls]
        for names in layers.values()
    ]
    for before, after in itertools.pairwise(filter(None, places)):
        assert max(before) < min(after)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", LIGHT)
def test_every_parameter_learns_and_bfloat16_runs(name):
    size = FAMILIES[name]
    task = task_of(
        f"timm/{name}", {"channels": 1, "size": size}, "classification", label_state(), seed=2
    )
    shaken(task.backbone)
    batch = images(2, size, 1).replace(label=torch.tensor([0, 2]))
    task.train()
    if name in VGG or name.startswith("inception"):
        # two rows of one pixel under batch norm, and half of the units dropped, leave nothing to
        # learn from
        task.eval()
    task(batch)[0].backward()
    assert [
        n
        for n, p in task.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == []
    task.eval()
    with torch.no_grad():
        plain = task.backbone(batch).pooled
        with torch.autocast("cpu", torch.bfloat16):
            half = task.backbone(batch).pooled.float()
    assert (half - plain).abs().max() < 0.1 * plain.abs().max() and not torch.equal(half, plain)


@torch.no_grad()
def test_stochastic_depth_is_off_unless_asked_for():
    """timm's Swin drops a tenth of its blocks by default; an option of nought is nought."""
    name, batch = "swin_tiny_patch4_window7_224", images(2, 64)
    still, moving = build(name, 64).train(), build(name, 64, drop_path=0.5).train()
    assert torch.equal(still(batch).pooled, still(batch).pooled)
    assert not torch.equal(moving(batch).pooled, moving(batch).pooled)


@torch.no_grad()
def test_outputs_survive_a_bundle(tmp_path):
    modality = ModalitySpec("image", {"size": 64}, {"mean": [0.5] * 3, "std": [0.2] * 3})
    backbone = shaken(build(VIEWS[2], 64))
    bundle.save(str(tmp_path / "swin"), backbone, modality)
    found = bundle.load(str(tmp_path / "swin"))
    again = bundle.build_backbone(found.manifest.arch, seed=9).eval()
    assert not bundle.transfer(again, found.backbone_tensors(), "swin").changed
    assert torch.equal(again(images()).pooled, backbone(images()).pooled)


# ---------------------------------------------------------------- checkpoints in another shape


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=[]
            if n in ("resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0")
            else [pytest.mark.slow],
        )
        for n in FAMILIES
    ],
)
@torch.no_grad()
def test_a_checkpoint_in_colour_sees_grey_as_before_and_the_other_way_round(name):
    size = FAMILIES[name]
    grey = images(2, size, 1)
    colour = grey.replace(image=grey["image"].expand(-1, 3, -1, -1))
    for channels, mine, theirs in ((3, grey, colour), (1, colour, grey)):
        old, new = shaken(build(name, size, channels)), build(name, size, 4 - channels, seed=5)
        moved = bundle.transfer(new, old.state_dict(), "checkpoint")
        assert len(moved.changed) == 1 and f"{channels} input channels " in moved.changed[0]
        ours, expected = new(mine).pooled, old(theirs).pooled
        assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
def test_position_embeddings_are_resampled_as_timm_does():
    for name in VIEWS[:2]:
        old, new = shaken(build(name, 224)), build(name, 64, seed=3)
        moved = bundle.transfer(new, old.state_dict(), "checkpoint")
        assert moved.changed == ("model.pos_embed: resampled from 14 x 14 to 4 x 4 patches",)
        plain = {n.removeprefix("model."): t for n, t in old.state_dict().items()}
        expected = vision_transformer.checkpoint_filter_fn(plain, new.model)["pos_embed"]
        assert torch.equal(new.state_dict()["model.pos_embed"], expected) and not torch.equal(
            expected[:, -16:], plain["pos_embed"][:, -16:]
        )
        prefix = new.model.num_prefix_tokens
        assert torch.equal(expected[:, :prefix], plain["pos_embed"][:, :prefix])
    assert (
        resample_abs_pos_embed(plain["pos_embed"], [4, 4], num_prefix_tokens=prefix).shape
        == expected.shape
    )


@torch.no_grad()
def test_windows_of_swin_are_resampled_as_timm_does():
    from timm.models import swin_transformer

    old, new = shaken(build(VIEWS[2], 224)), build(VIEWS[2], 64, seed=3)
    moved = bundle.transfer(new, old.state_dict(), "checkpoint")
    plain = {n.removeprefix("model."): t for n, t in old.state_dict().items()}
    expected = swin_transformer.checkpoint_filter_fn(plain, new.model)
    assert moved.changed and all("resampled to a window of" in text for text in moved.changed)
    assert all(
        torch.equal(t, expected[n.removeprefix("model.")]) for n, t in new.state_dict().items()
    )


def test_what_no_rule_covers_stays_refused():
    old, new = build("vit_tiny_patch16_224", 64), build("vit_tiny_patch16_224", 96)
    # 11 patches are no square
    tensors = {
        **old.state_dict(),
        "model.pos_embed": torch.zeros(1, 12, 192),
    }
    with pytest.raises(
        bundle.BundleError,
        match=r"model\.pos_embed is \(1, 12, 192\) there and \(1, 37, 192\) here",
    ):
        bundle.transfer(new, tensors, "checkpoint")
    with pytest.raises(bundle.BundleError, match=r"model\.conv1\.weight is \(64, 2, 7, 7\) there"):
        bundle.transfer(build("resnet18", 64), build("resnet18", 64, 2).state_dict(), "checkpoint")


def test_small_images_may_have_small_patches():
    backbone = bundle.build_backbone(
        Architecture("timm/vit_tiny_patch16_224", {"patch_size": 4}, {"channels": 1, "size": 32})
    )
    assert backbone.feature_map_specs[0].stride == 4 and backbone(
        images(2, 32, 1), want=("stages",)
    ).stages["blocks.0"].shape[2:] == (8, 8)
    for name, patch, message in (
        ("vit_tiny_patch16_224", 5, "takes no images of 32 pixels a side .* is 35"),
        ("resnet18", 4, "has no patch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            bundle.build_backbone(
                Architecture(f"timm/{name}", {"patch_size": patch}, {"channels": 1, "size": 32})
            )
