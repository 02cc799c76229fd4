"""Boxes and masks that move with their image, and random views: what was painted must lie where box
and mask say, in every draw.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.contracts import Batch, View
from pipeline.modalities.image import Image, ImageOptions

STATE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.5]}
SIZE = 96
CROPS = ("none", "shift", "resized")


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, n))


def painted(n: int, seed: int = 0) -> Batch:
    """Images letterboxed into the input (each its own frame), with a white rectangle, its box in
    shares of the image and its mask; a second box is none.
    """
    rng = np.random.default_rng(seed)
    image, mask = np.zeros((n, 3, SIZE, SIZE), np.uint8), np.full((n, SIZE, SIZE), 255, np.uint8)
    boxes, frames = np.zeros((n, 3, 4), np.float32), np.zeros((n, 4), np.float32)
    for i in range(n):
        width, height = (SIZE, int(rng.integers(60, SIZE + 1)))[:: 1 if i % 2 else -1]
        left, top = (SIZE - width) // 2, (SIZE - height) // 2
        x0, y0 = int(rng.integers(0, width - 24)), int(rng.integers(0, height - 24))
        x1, y1 = int(rng.integers(x0 + 16, width + 1)), int(rng.integers(y0 + 16, height + 1))
        mask[i, top : top + height, left : left + width] = 0
        mask[i, top + y0 : top + y1, left + x0 : left + x1] = 1
        image[i][:, mask[i] == 1] = 255
        boxes[i, 0] = x0 / width, y0 / height, x1 / width, y1 / height
        frames[i] = width, height, left, top
    found = {"image": image, "mask": mask, "boxes": boxes, "frame": frames}
    return Batch(
        np.arange(n),
        keys(n, seed),
        {name: torch.from_numpy(array) for name, array in found.items()},
    )


def modality(**options) -> Image:
    return Image(
        ImageOptions(**{"size": SIZE, "fit": "pad", **options}),
        {"mean": [0.0] * 3, "std": [1.0] * 3},
    )


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    both = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def bounds(where: torch.Tensor) -> torch.Tensor:
    ys, xs = where.nonzero(as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@pytest.mark.parametrize("crop", CROPS)
def test_boxes_and_masks_move_with_what_was_painted(crop):
    n, kind = 200, modality(crop=crop, scale=[0.5, 2.0])
    before = painted(n)
    after = kind.finish(kind.augment(before))
    found, lost = [], 0
    for i in range(n):
        white = after["image"][i, 0] > 0.5
        agrees = (white == (after["mask"][i] == 1)).float().mean()
        assert agrees > 0.97, "the mask is where the picture is"
        box = after["boxes"][i, 0]
        if not box.any():
            lost += 1
            continue
        found.append(iou(box, bounds(white)))
    # Slivers of few pixels at the edge
    assert (
        np.median(found) > 0.97 and np.mean(np.array(found) > 0.9) > 0.97 and min(found) > 0.75
    ), sorted(found)[:5]
    assert lost < n / 5 and (crop == "resized" or lost <= 4) and not after["boxes"][:, 1:].any()
    assert after["boxes"].min() >= 0 and after["boxes"].max() <= SIZE


@pytest.mark.parametrize("crop", CROPS)
def test_frame_stays_the_way_from_shares_to_pixels(crop):
    """Evaluation's own formula, left + share * width, gives the corners in training too, mirrored
    or not.
    """
    kind = modality(crop=crop, scale=[0.5, 2.0])
    before = painted(50)
    after = kind.finish(kind.augment(before))
    frame, shares = after["frame"], before["boxes"][:, 0]
    x = (frame[:, 2:3] + shares[:, 0::2] * frame[:, 0:1]).sort(1).values.clamp(0, SIZE)
    y = (frame[:, 3:4] + shares[:, 1::2] * frame[:, 1:2]).clamp(0, SIZE)
    real = after["boxes"][:, 0].any(1)
    torch.testing.assert_close(
        after["boxes"][real, 0],
        torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)[real],
        atol=1e-3,
        rtol=0,
    )
    mirrored = frame[:, 0] < 0
    assert 0.3 < mirrored.float().mean() < 0.7
    assert not (modality(crop=crop, flip=False).augment(before)["frame"][:, 0] < 0).any()


def test_whole_pixel_moves_are_torchvisions():
    """Flip alone, against torchvision's flip of image, boxes and mask."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    before = painted(30)
    kind = modality(crop="none")
    moved = kind.augment(before)
    after, plain = kind.finish(moved), kind.finish(before)
    for i in range(30):
        flipped = moved["frame"][i, 0] < 0
        boxes = tv_tensors.BoundingBoxes(
            plain["boxes"][i, :1],
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(SIZE, SIZE),
        )  # pyright: ignore
        image, mask = before["image"][i], tv_tensors.Mask(before["mask"][i])
        if flipped:
            image, boxes, mask = (
                F.horizontal_flip(image),
                F.horizontal_flip(boxes),
                F.horizontal_flip(mask),
            )
        assert torch.equal(moved["image"][i], image) and torch.equal(
            after["mask"][i], mask.as_subclass(torch.Tensor)
        )
        torch.testing.assert_close(
            after["boxes"][i, :1], boxes.as_subclass(torch.Tensor), atol=1e-3, rtol=0
        )


def test_zoom_is_torchvisions_resize_and_pad():
    """Every draw of scale and place, the image against torchvision's resize of it cut or padded by
    hand.
    """
    from torchvision.transforms.v2 import functional as F

    from pipeline.core.rng import uniform
    from pipeline.media import image_ops as ops

    before, kind = painted(12), modality(crop="resized", flip=False, scale=[0.5, 0.5])
    after = kind.augment(before)
    window = ops.zoom_window(uniform(before.keys, 4), SIZE, (0.5, 0.5), False)
    for i in range(12):
        left, top = -window.left[i] / 2, -window.top[i] / 2
        small = F.resize(before["image"][i], [SIZE // 2, SIZE // 2], antialias=True).float()
        x, y = int(left.round()), int(top.round())
        part = after["image"][i][:, y : y + SIZE // 2, x : x + SIZE // 2].float()
        assert (part - small).abs().mean() < 8  # up to half a pixel apart
        assert abs(float(after["image"][i].float().sum() - small.sum())) < 0.04 * float(small.sum())


def test_at_evaluation_only_finish_moves_boxes():
    before = painted(4)
    after = modality().finish(before)
    for i in range(4):
        torch.testing.assert_close(
            after["boxes"][i, 0], bounds(before["mask"][i] == 1), atol=1e-3, rtol=0
        )
    assert torch.equal(after["frame"], before["frame"]) and torch.equal(
        after["mask"], before["mask"]
    )


def test_squashed_images_need_no_frame_and_padded_ones_do():
    before = painted(2)
    bare = Batch(before.rows, before.keys, {name: before[name] for name in ("image", "boxes")})
    boxes = modality(fit="squash").finish(bare)["boxes"]
    torch.testing.assert_close(boxes[:, 0], before["boxes"][:, 0] * SIZE)
    with pytest.raises(KeyError, match="frame"):
        modality().finish(bare)


def test_randaugment_moves_nothing_under_boxes_and_masks():
    """Object and background stay of one colour each, up to their edge."""
    before = painted(80)
    after = modality(crop="none", flip=False, randaugment=30).augment(before)
    assert (
        torch.equal(after["mask"], before["mask"])
        and sum((a != b).any() for a, b in zip(after["image"], before["image"], strict=True)) > 20
    )
    white = (before["mask"] == 1).float()[:, None]
    # Pixels near an edge may be sharpened
    near = (
        torch.nn.functional.max_pool2d(white, 5, 1, 2)[:, 0]
        - 1
        + torch.nn.functional.max_pool2d(1 - white, 5, 1, 2)[:, 0]
        > 0
    )
    for image, part, edge in zip(after["image"], white[:, 0] > 0, near, strict=True):
        for where in (part & ~edge, ~part & ~edge):
            assert (image[:, where] == image[:, where][:, :1]).all()


def test_what_lies_outside_is_the_mean_colour():
    kind = Image(ImageOptions(size=SIZE, fit="pad", crop="resized", scale=[0.5, 0.5]), STATE)
    after = kind.finish(kind.augment(painted(20)))
    outside = after["mask"] == 255
    # Pixels at its edge are blended with what is inside
    edge = torch.nn.functional.max_pool2d((~outside).float()[:, None], 5, 1, 2)[:, 0] > 0
    letterbox = after["image"].permute(0, 2, 3, 1)[outside & ~edge]
    black = torch.tensor([-m / s for m, s in zip(STATE["mean"], STATE["std"], strict=True)])
    # Painted's own padding is black
    either = (letterbox.abs().amax(1) < 0.01) | ((letterbox - black).abs().amax(1) < 0.01)
    assert either.all() and (letterbox.abs().amax(1) < 0.01).float().mean() > 0.5


FULL = {"crop": "resized", "colour": 0.5, "randaugment": 9}


@pytest.mark.parametrize("options", [{}, {"crop": "shift"}, FULL])
@pytest.mark.parametrize("dense", [True, False])
def test_rows_are_the_same_at_any_number_of_ranks_and_differ_by_key(options, dense):
    kind, whole = modality(**options), painted(12)
    if not dense:
        whole = Batch(whole.rows, whole.keys, {"image": whole["image"]})

    def done(batch: Batch) -> Batch:
        return kind.finish(kind.augment(batch))

    found = done(whole)
    for parts in (whole.split(6), whole.split(5), whole.split(1)):
        made = [done(part) for part in parts]
        assert all(
            torch.equal(torch.cat([part[name] for part in made]), found[name])
            for name in found.data
        )
    other = done(Batch(whole.rows, keys(12, 9), whole.data))
    assert all((other["image"][i] != found["image"][i]).any() for i in range(12))
    twins = done(
        Batch(
            whole.rows,
            whole.keys[:1].expand(12),
            {name: tensor[:1].expand(12, *tensor.shape[1:]) for name, tensor in whole.data.items()},
        )
    )
    assert (twins["image"] == twins["image"][0]).all(), "one key, one draw"


def test_without_boxes_nothing_else_changes():
    """colour and randaugment off: the same pixels as before these options came; on: other pixels in
    the same window.
    """
    batch = painted(8)
    batch = Batch(batch.rows, batch.keys, {"image": batch["image"]})
    plain, full = (
        modality(crop="resized", **more).augment(batch)["image"] for more in ({}, {"colour": 0.5})
    )
    assert plain.dtype == full.dtype == torch.uint8 and not torch.equal(plain, full)
    bright = plain.float().mean(1) > 200
    assert full.float().mean(1)[bright].mean() > full.float().mean(1)[~bright].mean() + 50


# ---------------------------------------------------------------- views


def photos(n: int, size: int = SIZE, channels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(3)
    soft = torch.nn.functional.interpolate(
        torch.rand(n, channels, 8, 8, generator=generator), size=(size, size), mode="bicubic"
    ).clamp(0, 1)
    return Batch(np.arange(n), keys(n), {"image": (soft * 255).round().to(torch.uint8)})


BARE = View(jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_their_size_and_differ_from_each_other(channels):
    kind = Image(
        ImageOptions(size=SIZE, channels=channels),
        {"mean": [0.5] * channels, "std": [0.2] * channels},
    )
    batch = photos(10, channels=channels)
    found = kind.finish(
        kind.views(batch, (View(), View(solarize=0.2), View(size=48, area=(0.05, 0.3))))
    )
    assert [tuple(found[f"view{i}"].shape) for i in range(3)] == [
        (10, channels, SIZE, SIZE)
    ] * 2 + [(10, channels, 48, 48)]
    assert torch.equal(found["image"], kind.finish(batch)["image"]), "the input itself stays"
    for i in range(3):
        assert (
            found[f"view{i}"].dtype == torch.float32
            and torch.isfinite(found[f"view{i}"]).all()
            and found[f"view{i}"].abs().max() <= 2.5001
        )
    twice = kind.views(batch, (View(), View()))
    assert all((twice["view0"][i] != twice["view1"][i]).any() for i in range(10)), (
        "a stream of its own for each view"
    )
    again = kind.views(Batch(batch.rows, keys(10, 5), batch.data), (View(),))
    assert all((twice["view0"][i] != again["view0"][i]).any() for i in range(10))
    for parts in (batch.split(5), batch.split(3), batch.split(1)):
        made = [kind.views(part, (View(), View())) for part in parts]
        assert all(
            torch.equal(torch.cat([part[name] for part in made]), twice[name])
            for name in ("view0", "view1")
        )


def test_views_are_made_in_full_precision_under_autocast():
    kind, batch = Image(ImageOptions(size=SIZE), STATE), photos(4)
    plain = kind.views(batch, (View(blur=1.0),))["view0"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kind.views(batch, (View(blur=1.0),))["view0"]
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_a_views_window_has_the_area_that_it_names():
    """Coordinates as colours tell which window was taken."""
    size, n = 64, 300
    ramp = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = (
        torch.arange(size)[None, None, :] * 4,
        torch.arange(size)[None, :, None] * 4,
    )
    kind = Image(ImageOptions(size=size), {"mean": [0.0] * 3, "std": [1.0] * 3})
    out = (
        kind.views(
            Batch(np.arange(n), keys(n), {"image": ramp}),
            (replace(BARE, size=32, area=(0.1, 0.4)),),
        )["view0"]
        * 255
        / 4
    )
    width, height = (
        (out[:, 0, 16, 26] - out[:, 0, 16, 6]).abs() / 20 / 2,
        (out[:, 1, 26, 16] - out[:, 1, 6, 16]) / 20 / 2,
    )
    area = width * height
    assert (
        0.09 < area.min() < 0.12
        and 0.37 < area.max() < 0.41
        and (width / height).min() > 0.73
        and (width / height).max() < 1.36
    )
    mirrored = out[:, 0, 16, 26] < out[:, 0, 16, 6]
    assert 0.4 < mirrored.float().mean() < 0.6


def test_each_change_of_a_view_happens_as_often_as_it_says():
    kind, batch = (
        Image(ImageOptions(size=32, flip=False), {"mean": [0.0] * 3, "std": [1.0] * 3}),
        photos(300, 32),
    )
    plain = kind.views(batch, (BARE,))["view0"]
    for name, share in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.5), ("solarize", 0.3)):
        found = kind.views(batch, (replace(BARE, **{name: share}),))["view0"]
        changed = (found - plain).abs().flatten(1).amax(1) > 1e-4
        assert abs(changed.float().mean() - share) < 0.09, name
        if name == "grey":
            same = (found[:, 0] - found[:, 1]).abs().flatten(1).amax(1) < 1e-6
            assert torch.equal(same, changed)
        if name == "solarize":
            torch.testing.assert_close(
                found[changed],
                torch.where(plain[changed] >= 0.5, 1 - plain[changed], plain[changed]),
            )
    weak, strong = (
        (kind.views(batch, (replace(BARE, jitter=1.0, strength=s),))["view0"] - plain).abs().mean()
        for s in (0.2, 1.0)
    )
    assert strong > 2.5 * weak > 0
