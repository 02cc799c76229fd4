"""Operations on batches of pictures against torchvision's, one picture at a time; each row the same
in any batch.
"""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from pipeline.core.rng import uniform
from pipeline.media import image_ops as ops


def pictures(n: int = 6, size: int = 40, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """(n, C, size, size) uint8: soft colours with a few hard edges."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.nn.functional.interpolate(
        torch.rand(n, channels, 6, 6, generator=generator), size=(size, size), mode="bicubic"
    ).clamp(0, 1)
    soft[:, :, size // 3 : size // 2, size // 4 : size // 2] = torch.rand(
        n, channels, 1, 1, generator=generator
    )
    return (soft * 255).round().to(torch.uint8)


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, n))


def window(left, top, width, height, mirrored) -> ops.CropWindow:
    left, top, width, height = (
        torch.tensor(v, dtype=torch.float32) for v in (left, top, width, height)
    )
    return ops.CropWindow(left, top, width, height, torch.tensor(mirrored))


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [12, 40, 56])
def test_windows_of_whole_pixels_are_torchvisions_resized_crops(size):
    """Shrunk (antialiased), of the same size and grown."""
    x = pictures(4)
    corners = [(0, 0, 40, 40), (4, 6, 30, 20), (10, 0, 16, 40), (8, 20, 12, 12)]
    left, top, width, height = map(list, zip(*corners, strict=True))
    found = ops.resize_antialiased(
        x, window(left, top, width, height, [False, True, False, True]), size
    )
    for i, (left, top, width, height) in enumerate(corners):
        want = F.resized_crop(x[i].float(), top, left, height, width, [size, size], antialias=True)
        want = want.flip(-1) if i % 2 else want
        # Torchvision cuts first and so never sees the pixel beyond the window
        edge = 1 + size // min(width, height)
        inner = (slice(None), slice(edge, -edge), slice(edge, -edge)) if i else ...
        torch.testing.assert_close(found[i][inner], want[inner], atol=0.02, rtol=0)


def test_outside_the_picture_is_the_fill_and_of_a_mask_the_ignored_class():
    x = torch.full((1, 3, 20, 20), 200, dtype=torch.uint8)
    wide = window([-10.0], [-10.0], [40.0], [40.0], [False])
    found = ops.resize_antialiased(x, wide, 40, torch.tensor([10.0, 20.0, 30.0]))
    assert torch.equal(found[0, :, 10:30, 10:30], torch.full((3, 20, 20), 200.0))
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[10:30, 10:30] = True
    assert torch.equal(found[0][:, ~inside], torch.tensor([[10.0], [20.0], [30.0]]).expand(3, 1200))
    mask = ops.resample_mask(torch.full((1, 20, 20), 7, dtype=torch.uint8), wide, 40)
    assert torch.equal(mask[0] == 7, inside) and torch.equal(mask[0] == ops.IGNORED, ~inside)


def test_random_windows_lie_where_they_should():
    u = uniform(keys(2000), 5)
    crop = ops.crop_window(u, 100, (0.1, 0.5), True)
    share = crop.width * crop.height / 1e4
    assert 0.099 < share.min() < 0.12 and 0.48 < share.max() < 0.501
    assert (crop.width / crop.height).log().abs().max() < np.log(4 / 3) + 1e-5
    assert (
        crop.left.min() >= 0
        and crop.top.min() >= 0
        and (crop.left + crop.width).max() < 100.01
        and (crop.top + crop.height).max() < 100.01
    )
    zoomed = ops.zoom_window(u, 100, (0.5, 2.0), True)
    assert (
        50 <= zoomed.width.min() < 52
        and 195 < zoomed.width.max() <= 200.01
        and torch.equal(zoomed.width, zoomed.height)
    )
    ends = zoomed.left, zoomed.left + zoomed.width
    grown = zoomed.width <= 100
    assert (
        (ends[0][grown] >= 0).all()
        and (ends[1][grown] <= 100.01).all()
        and (ends[0][~grown] <= 0).all()
        and (ends[1][~grown] >= 99.99).all()
    )
    for found in (crop, zoomed):
        assert 0.45 < found.mirrored.float().mean() < 0.55
    assert not ops.crop_window(u, 100, (0.1, 0.5), False).mirrored.any()


def test_boxes_are_cut_at_the_edges_and_lost_when_little_is_left():
    frame = torch.tensor([[100.0, 50.0, 0.0, 25.0], [-200.0, 200.0, 150.0, -50.0]])
    shares = torch.tensor(
        [
            [
                [0.1, 0.2, 0.5, 0.6],
                [0.0, 0.0, 1.0, 1.0],
                [0.3, 0.3, 0.3, 0.8],
                [-0.5, 0.5, 0.5, 1.5],
            ],
            [
                [0.25, 0.25, 0.75, 0.75],
                [0.0, 0.0, 0.27, 0.27],
                [0.5, 0.5, 0.76, 0.76],
                [0.0, 0.0, 0.0, 0.0],
            ],
        ]
    )
    boxes = ops.move_boxes(shares, frame, 100)
    # The second: 4 of 54 pixels each way are left
    want = [
        [[10, 35, 50, 55], [0, 25, 100, 75], [0, 0, 0, 0], [0, 50, 50, 75]],
        [[0, 0, 100, 100], [0, 0, 0, 0], [0, 50, 50, 100], [0, 0, 0, 0]],
    ]
    torch.testing.assert_close(boxes, torch.tensor(want, dtype=torch.float32), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("change", "theirs", "amounts"),
    [
        (ops.brightness, F.adjust_brightness, [0.0, 0.4, 1.0, 1.7]),
        (ops.contrast, F.adjust_contrast, [0.0, 0.4, 1.0, 1.7]),
        (ops.saturation, F.adjust_saturation, [0.0, 0.4, 1.0, 1.7]),
        (ops.hue, F.adjust_hue, [-0.5, -0.13, 0.0, 0.31]),
    ],
)
def test_colours_change_as_torchvision_changes_them(change, theirs, amounts, channels):
    x = pictures(4, channels=channels) / 255
    x[3, :, :10] = 0.5  # grey has no hue
    found = change(x, torch.tensor(amounts).view(-1, 1, 1, 1))
    for i, amount in enumerate(amounts):
        torch.testing.assert_close(found[i], theirs(x[i], amount), atol=2e-6, rtol=0)


def test_jitter_does_the_four_in_the_rows_own_order():
    x, u = pictures(40, size=16) / 255, uniform(keys(40), 8)
    found = ops.colour_jitter(x, u, 0.6)
    orders = set()
    for i, row in enumerate(u.tolist()):
        order = tuple(int(k) for k in np.argsort(row[4:8]))
        orders.add(order)
        factors = [1 + 0.6 * (2 * v - 1) for v in row[:3]] + [(2 * row[3] - 1) * 0.15]
        want = x[i]
        for kind in order:
            want = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[
                kind
            ](want, factors[kind])
        torch.testing.assert_close(found[i], want, atol=1e-5, rtol=0)
    assert len(orders) > 12


@pytest.mark.parametrize("size", [24, 64, 224])
def test_blur_is_torchvisions_with_a_sigma_a_row(size):
    x, sigma = pictures(4, size=size) / 255, torch.tensor([0.1, 0.5, 1.3, 2.0])
    found = ops.blur(x, sigma)
    for i in range(4):
        want = F.gaussian_blur(x[i], [2 * max(1, size // 20) + 1] * 2, [float(sigma[i])] * 2)
        torch.testing.assert_close(found[i], want, atol=1e-5, rtol=0)


def test_solarize_and_grey_are_torchvisions():
    x = pictures(4) / 255
    torch.testing.assert_close(ops.solarize(x), F.solarize(x, 0.5))
    torch.testing.assert_close(ops.grey(x), F.rgb_to_grayscale(x))


# ---------------------------------------------------------------- RandAugment


@pytest.mark.parametrize("magnitude", [3, 9, 30])
def test_randaugment_is_torchvisions_operations_row_by_row(magnitude):
    """torchvision's own table and its own way to apply it (private there), with what each row
    drew.
    """
    from torchvision.transforms import InterpolationMode, v2

    x, u = pictures(120, size=24), uniform(keys(120), 4)
    fill = [10.0, 20.0, 30.0]
    found = ops.rand_augment(x, u, magnitude, fill)
    theirs = v2.RandAugment()
    names = [
        "Brightness",
        "Color",
        "Contrast",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
        "Identity",
        "Posterize",
        "Solarize",
        "AutoContrast",
        "Equalize",
    ]
    assert sorted(names) == sorted(theirs._AUGMENTATION_SPACE)
    seen = set()
    for i, row in enumerate(u.tolist()):
        want = x[i]
        for which, sign in zip(row[:2], row[2:], strict=True):
            name = names[int(which * len(names))]
            ranges, signed = theirs._AUGMENTATION_SPACE[name]
            span = ranges(31, 24, 24)
            amount = 0.0 if span is None else float(span[magnitude])
            amount = -amount if signed and sign < 0.5 else amount
            want = theirs._apply_image_or_video_transform(
                want, name, amount, InterpolationMode.BILINEAR, {torch.Tensor: fill}
            )
            seen.add((name, signed and sign < 0.5))
        apart = (found[i].int() - torch.as_tensor(want).int()).abs()
        # A level that was rounded otherwise, then sharpened or posterised
        assert (apart > 1).float().mean() < 0.01, i
    assert len(seen) == 14 + 9


def test_still_operations_move_nothing():
    """A dark picture with one bright pixel: it stays where it is, whatever is drawn."""
    x = torch.full((200, 3, 16, 16), 40, dtype=torch.uint8)
    x[:, :, 5, 9] = 250
    found = ops.rand_augment(x, uniform(keys(200), 4), 20, [0.0] * 3, still=True).float().mean(1)
    away = (found - found[:, :1, :1]).abs().flatten(1)
    # Posterised or levelled out in the others, never elsewhere
    assert (away.argmax(1) == 5 * 16 + 9).float().mean() > 0.8
    away[:, 5 * 16 + 9] = 0
    # Sharpness reaches one pixel far, and may be drawn twice
    near = [y * 16 + x for y in range(3, 8) for x in range(7, 12)]
    away[:, near] = 0
    assert away.max() == 0


# ---------------------------------------------------------------- a row sees no other row


@pytest.mark.parametrize("size", [20, 64])
def test_rows_are_the_same_bits_in_any_batch(size):
    n = 14
    x, k = pictures(n, size=size), keys(n)

    def all_of(rows) -> list[torch.Tensor]:
        part, u = x[rows], uniform(k[rows], 8)
        crop, zoom = (
            ops.crop_window(u, size, (0.2, 1.0), True),
            ops.zoom_window(u, size, (0.6, 1.6), True),
        )
        return [
            ops.resize_antialiased(part, crop, size),
            ops.resize_antialiased(part, crop, size // 2),
            ops.resize_antialiased(part, zoom, size, torch.ones(3)),
            ops.resize_bilinear(part, crop, size),
            ops.shift_pixels(part, u, 4, True),
            ops.colour_jitter(part / 255, u, 0.8),
            ops.blur(part / 255, u[:, 0] + 0.2),
            ops.rand_augment(part, u[:, :4], 9, [0.0] * 3),
            ops.resample_mask(part[:, 0], zoom, size),
            ops.change_rows(part / 255, u[:, 0] < 0.5, lambda rows, _: ops.solarize(rows)),
        ]

    whole = all_of(torch.arange(n))
    for places in ([5], [0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [13, 2, 8]):
        for a, b in zip(all_of(torch.tensor(places)), whole, strict=True):
            assert torch.equal(a, b[places])
