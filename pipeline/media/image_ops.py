"""Batched image operations on the device: windows, colour, blur, RandAugment.

Images are (B, C, S, S). A parameter that differs from row to row is a tensor with first dimension
B. A row's pixels do not depend on the other rows. Nothing here draws a random number: ``u`` are
uniform numbers in [0, 1), made from the rows' keys by pipeline.core.rng.

The colour changes are those of torchvision.transforms.v2.functional, which takes one factor for a
whole batch: here each row has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

IGNORED = 255
"""Class of a mask's pixels outside the image."""
VISIBLE = 0.1
"""Share of a box that must be left in the input for it to remain a box."""
GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), as in torchvision and Pillow."""


# ---------------------------------------------------------------- geometry


@dataclass(frozen=True)
class CropWindow:
    """The part of each (S, S) image that becomes the new image, in pixels.

    ``left``, ``top``, ``width`` and ``height`` (B,) float32, which may reach outside the image, and
    ``mirrored`` (B,) bool.
    """

    left: Tensor
    top: Tensor
    width: Tensor
    height: Tensor
    mirrored: Tensor

    def centres(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the centres of the new pixels along x and along y, (B, size) each."""
        down = (torch.arange(size, device=self.left.device) + 0.5) / size
        across = torch.where(self.mirrored[:, None], 1 - down, down)
        x = self.left[:, None] + across * self.width[:, None]
        y = self.top[:, None] + down * self.height[:, None]
        return x, y


def crop_window(u: Tensor, side: int, area: tuple[float, float], flip: bool) -> CropWindow:
    """Draw a random resized crop (Szegedy et al. 2015).

    The aspect ratio is from 3/4 to 4/3. A crop that is wider or higher than the image is cut to it.

    Args:
        u: (B, 5) uniform numbers.
        side: Pixels a side of the images.
        area: Smallest and largest share of the image's area.
        flip: Whether every second image, on average, is mirrored.
    """
    share = area[0] + (area[1] - area[0]) * u[:, 0]
    ratio = torch.exp((u[:, 1] * 2 - 1) * math.log(4 / 3))
    width = (share * ratio).sqrt().clamp(max=1) * side
    height = (share / ratio).sqrt().clamp(max=1) * side
    left = (side - width) * u[:, 2]
    top = (side - height) * u[:, 3]
    mirrored = (u[:, 4] < 0.5) & flip
    return CropWindow(left, top, width, height, mirrored)


def zoom_window(u: Tensor, side: int, zoom: tuple[float, float], flip: bool) -> CropWindow:
    """Draw a scale jitter (Ghiasi et al. 2021, "Simple copy-paste").

    The image keeps its aspect ratio, and is cropped or padded to the input at a random place.

    Args:
        u: (B, 4) uniform numbers.
        side: Pixels a side of the images.
        zoom: Smallest and largest factor of the size; the factor is log-uniform.
        flip: Whether every second image, on average, is mirrored.
    """
    low, high = math.log(zoom[0]), math.log(zoom[1])
    width = side * torch.exp(-(low + (high - low) * u[:, 0]))
    left = (side - width) * u[:, 1]
    top = (side - width) * u[:, 2]
    mirrored = (u[:, 3] < 0.5) & flip
    return CropWindow(left, top, width, width, mirrored)


def shift_window(u: Tensor, side: int, reach: float, flip: bool) -> CropWindow:
    """Draw a shift by up to ``reach`` pixels in each direction.

    Args:
        u: (B, 4) uniform numbers.
        side: Pixels a side of the images.
        reach: In pixels.
        flip: Whether every second image, on average, is mirrored.
    """
    full_side = torch.full_like(u[:, 0], float(side))
    return CropWindow(
        (2 * u[:, 1] - 1) * reach,
        (2 * u[:, 2] - 1) * reach,
        full_side,
        full_side,
        (u[:, 3] < 0.5) & flip,
    )


def resize_antialiased(
    x: Tensor, window: CropWindow, size: int, fill: Tensor | None = None
) -> Tensor:
    """Resize windows to (B, C, size, size) float32, bilinear and antialiased.

    The result is that of torchvision's ``resized_crop``. The filter is separable, so it is computed
    by two matrix products.

    Args:
        x: (B, C, S, S).
        window: The part of each image.
        size: Pixels a side of the result.
        fill: (C,) levels outside of the image; None: the image's edge goes on.
    """
    side, centres = x.shape[-1], window.centres(size)
    across, down = (
        _weights(centre, extent / size, side)
        for centre, extent in zip(centres, (window.width, window.height), strict=True)
    )
    values = (
        x.float()
        if fill is None
        else x.float()
        - fill.view(
            1,
            -1,
            1,
            1,
        )
    )
    out = _separable(values, down, across)
    if fill is None:
        return out
    columns, rows = (((centre >= 0) & (centre < side)).to(out.dtype) for centre in centres)
    inside = rows[:, None, :, None] * columns[:, None, None, :]
    return out * inside + fill.view(1, -1, 1, 1)


def _separable(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Multiply images (B, C, S, S) by a matrix (B, T, S) along each axis; return (B, C, T, T)."""
    rows, channels, side, _ = x.shape
    size = across.shape[1]
    # autocast may be on here, and bfloat16 has fewer levels than a picture
    with torch.autocast(x.device.type, enabled=False):
        half = torch.bmm(x.reshape(rows, channels * side, side), across.transpose(1, 2))
        half = (
            half.view(rows, channels, side, size)
            .transpose(1, 2)
            .reshape(rows, side, channels * size)
        )
        return torch.bmm(down, half).view(rows, size, channels, size).transpose(1, 2).contiguous()


def _weights(centres: Tensor, scale: Tensor, side: int) -> Tensor:
    """Return (B, size, side) weights of the old pixels in each new one, which sum to 1.

    They are a triangle filter, which is as wide as a new pixel where the image shrinks.
    """
    pixels = torch.arange(side, device=centres.device) + 0.5
    reach = scale.clamp(min=1)[:, None, None]
    distances = (centres[:, :, None] - pixels).abs()
    weights = (1 - distances / reach).clamp(min=0)
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-6)


def resample_mask(mask: Tensor, window: CropWindow, size: int) -> Tensor:
    """Resample a (B, S, S) mask to (B, size, size), nearest pixel, IGNORED outside the image."""
    side = mask.shape[-1]
    x, y = (centre.floor().long() for centre in window.centres(size))
    rows = torch.arange(len(mask), device=mask.device)[:, None, None]
    nearest_row = y.clamp(0, side - 1)[:, :, None]
    nearest_column = x.clamp(0, side - 1)[:, None, :]
    classes = mask[rows, nearest_row, nearest_column]
    row_inside = (y >= 0) & (y < side)
    column_inside = (x >= 0) & (x < side)
    inside = row_inside[:, :, None] & column_inside[:, None, :]
    return torch.where(inside, classes, torch.full_like(classes, IGNORED))


def move_frame(frame: Tensor, window: CropWindow, size: int) -> Tensor:
    """Return where the whole image lies after a window was taken: (B, 4) width, height, left, top.

    A mirrored image has its left edge on the right and a negative width, so that left + share *
    width holds for it too.
    """
    width, height, left, top = frame.unbind(1)
    across, down = size / window.width, size / window.height
    width = width * across
    left = (left - window.left) * across
    width = torch.where(window.mirrored, -width, width)
    left = torch.where(window.mirrored, size - left, left)
    return torch.stack([width, height * down, left, (top - window.top) * down], 1)


def _lengths(ends: Tensor) -> Tensor:
    """Return (B, M) differences of (B, M, 2) ends."""
    return ends[..., 1] - ends[..., 0]


def move_boxes(shares: Tensor, frame: Tensor, size: int) -> Tensor:
    """Convert boxes in shares of the image to (B, M, 4) corners in pixels of the input.

    They are cut at the edges of image and input. A box of which less than the share VISIBLE is left
    becomes zeros, which is not a box. Larger rests are kept, even without the box's centre:
    annotators also draw objects that the edge of a photo cuts.

    Args:
        shares: (B, M, 4) corners x0 y0 x1 y1 as shares of the whole image.
        frame: (B, 4) width, height, left and top of the image in the input (`move_frame`).
        size: Pixels a side of the input.
    """
    shares = shares.clamp(0, 1)
    width, height, left, top = frame[:, None].unbind(2)
    x = left[..., None] + shares[..., 0::2] * width[..., None]
    y = top[..., None] + shares[..., 1::2] * height[..., None]
    x = x.sort(2).values
    area = _lengths(x) * _lengths(y)
    x, y = x.clamp(0, size), y.clamp(0, size)
    visible = _lengths(x) * _lengths(y)
    is_kept = (visible > 0) & (visible >= VISIBLE * area)
    boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], 2)
    return torch.where(is_kept[..., None], boxes, torch.zeros_like(boxes))


def shift_pixels(x: Tensor, u: Tensor, reach: int, flip: bool) -> Tensor:
    """Shift images by whole pixels, repeating the border.

    Args:
        x: (B, C, S, S).
        u: (B, 3) uniform numbers.
        reach: Largest shift in each direction, in pixels.
        flip: Whether every second image, on average, is mirrored.
    """
    size = x.shape[-1]
    move = (u[:, :2] * (2 * reach + 1)).floor().long() - reach
    along = torch.arange(size, device=x.device)
    ys = (along[None] + move[:, :1]).clamp(0, size - 1)
    xs = (along[None] + move[:, 1:2]).clamp(0, size - 1)
    if flip:
        xs = torch.where(u[:, 2:3] < 0.5, xs.flip(1), xs)
    rows = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[rows, channels, ys[:, None, :, None], xs[:, None, None, :]]


def resize_bilinear(x: Tensor, window: CropWindow, size: int) -> Tensor:
    """Resize windows to (B, C, size, size) float32, bilinear without antialiasing.

    For windows that do not shrink: it costs a quarter of ``resize_antialiased``.
    """
    across, down = window.centres(size)
    across = across[:, None].expand(-1, size, -1)
    down = down[:, :, None].expand(-1, -1, size)
    grid = torch.stack([across, down], 3) * (2 / x.shape[-1]) - 1
    return F.grid_sample(
        x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def to_uint8(x: Tensor) -> Tensor:
    """Round floats from 0 to 255 to uint8."""
    return x.round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------- colour; pictures are float in [0, 1]


def _groups(kinds: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield each kind that occurs, with its rows on the device.

    Args:
        kinds: (B,) on the host, so that the loop does not wait for the device.
    """
    for kind in kinds.unique().tolist():
        yield kind, (kinds == kind).nonzero()[:, 0].to(device)


def change_rows(x: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return ``x`` (B, ...) with some rows replaced by ``change(x[rows], rows)``.

    Args:
        chosen: (B,) bool, which rows.
    """
    rows = chosen.nonzero()[:, 0]
    return x.index_copy(0, rows, change(x[rows], rows)) if len(rows) else x


def grey(x: Tensor) -> Tensor:
    """Return (B, 1, S, S) luminance."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x[:, :1], x[:, 1:2], x[:, 2:3]
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply images by a factor (B, 1, 1, 1), as adjust_brightness of torchvision."""
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend images with their mean luminance, as adjust_contrast of torchvision.

    Args:
        factor: (B, 1, 1, 1) share of the image.
    """
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return (x * factor + mean * (1 - factor)).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend images with their luminance, as adjust_saturation of torchvision.

    Args:
        factor: (B, 1, 1, 1) share of the image.
    """
    if x.shape[1] == 1:
        return x
    blended = x * factor + grey(x) * (1 - factor)
    return blended.clamp(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue, as adjust_hue of torchvision.

    Args:
        turn: (B, 1, 1, 1) share of the circle (HSV).
    """
    if x.shape[1] == 1:
        return x
    low, value = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    chroma = value - low
    red, green, blue = x.split(1, 1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(
        1,
        3,
        1,
        1,
    )
    sector = (sixth + 6 * turn + offsets) % 6
    return value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1)


def colour_jitter(x: Tensor, u: Tensor, amount: float) -> Tensor:
    """Jitter colours in an order drawn for each row (SimCLR, appendix A).

    Brightness, contrast and saturation change by factors from 1 - amount to 1 + amount, the hue by
    up to amount / 4 of the circle.

    Args:
        u: (B, 8) uniform numbers.
        amount: In the paper 0.8 times the strength.
    """
    spread = 2 * u[:, :4, None, None, None] - 1
    factor = (1 + amount * spread[:, :3]).clamp(min=0)
    amounts = torch.cat([factor, spread[:, 3:] * min(amount / 4, 0.5)], 1)
    changes = (brightness, contrast, saturation, hue)
    order = u[:, 4:8].argsort(1).cpu()
    out = x.clone()
    for place in range(len(changes)):
        for kind, rows in _groups(order[:, place], x.device):
            out[rows] = changes[kind](out[rows], amounts[rows, kind])
    return out


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Apply a Gaussian blur, with a kernel a tenth of the side wide (SimCLR, appendix A).

    It is one product with a banded matrix along each axis. The matrix also reflects the border, and
    rows with different kernels are computed together.

    Args:
        sigma: (B,) standard deviations in pixels.
    """
    side = x.shape[-1]
    radius = max(1, side // 20)
    along = torch.arange(side, device=x.device)
    deviations = torch.arange(radius + 1, device=x.device) / sigma[:, None]
    taps = torch.exp(-0.5 * deviations**2)
    total = 2 * taps.sum(1, keepdim=True) - taps[:, :1]
    beyond_radius = torch.zeros_like(taps[:, :1])
    taps = torch.cat([taps / total, beyond_radius], 1)
    new, old = along[:, None], along[None, :]
    # distances to the reflections of a pixel in both borders
    before = torch.where(old > 0, new + old, radius + 1)
    after = torch.where(old < side - 1, 2 * (side - 1) - new - old, radius + 1)
    distances = ((new - old).abs(), before, after)
    band = sum(taps[:, distance.clamp(max=radius + 1)] for distance in distances)
    assert isinstance(band, Tensor)
    return _separable(x, band, band)


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least half as bright as white."""
    return torch.where(x >= 0.5, 1 - x, x)


# ---------------------------------------------------------------- RandAugment; pictures are uint8


def _affine(
    x: Tensor,
    fill: list[float],
    *,
    shift: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    about: list[float] | None = None,
) -> Tensor:
    turned = [math.degrees(math.atan(amount)) for amount in shear]
    return TF.affine(
        x,
        angle=0,
        translate=list(shift),
        scale=1,
        shear=turned,
        center=about,
        interpolation=InterpolationMode.BILINEAR,
        fill=fill,
    )


def _shift(x: Tensor, level: float) -> int:
    """Return the pixels of a shift, which is at most 150 of 331 as in AutoAugment's code."""
    return int(150 / 331 * x.shape[-1] * level)


SIGNED: tuple[Callable[[Tensor, float, list[float]], Tensor], ...] = (
    lambda x, level, fill: TF.adjust_brightness(x, 1 + 0.9 * level),
    lambda x, level, fill: TF.adjust_saturation(x, 1 + 0.9 * level),
    lambda x, level, fill: TF.adjust_contrast(x, 1 + 0.9 * level),
    lambda x, level, fill: TF.adjust_sharpness(x, 1 + 0.9 * level),
    lambda x, level, fill: _affine(x, fill, shear=(0.3 * level, 0), about=[0, 0]),
    lambda x, level, fill: _affine(x, fill, shear=(0, 0.3 * level), about=[0, 0]),
    lambda x, level, fill: _affine(x, fill, shift=(_shift(x, level), 0)),
    lambda x, level, fill: _affine(x, fill, shift=(0, _shift(x, level))),
    lambda x, level, fill: TF.rotate(
        x, 30 * level, interpolation=InterpolationMode.BILINEAR, fill=fill
    ),
)
"""Operations whose level may be negative; the first four move nothing."""
UNSIGNED: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda x, level: x,
    lambda x, level: TF.posterize(x, round(8 - 4 * level)),
    lambda x, level: TF.solarize(x, 255 * (1 - level)),
    lambda x, level: TF.autocontrast(x),
    lambda x, level: TF.equalize(x),
)


def rand_augment(
    x: Tensor, u: Tensor, magnitude: int, fill: list[float], still: bool = False
) -> Tensor:
    """Apply two operations of RandAugment (Cubuk et al. 2020) to each row, uint8 to uint8.

    Ranges are torchvision's, of 30 for ``magnitude``. Rows with the same operation and sign are
    computed together. ``still``: only operations that move nothing, for boxes and masks. ``u``: (B,
    4).
    """
    signed = SIGNED[:4] if still else SIGNED
    operations = (u[:, :2] * (len(signed) + len(UNSIGNED))).long()
    negative = u[:, 2:] < 0.5
    kinds = (operations * 2 + negative).cpu()
    out, level = x.clone(), magnitude / 30
    for turn in range(2):
        drawn = kinds[:, turn]
        # unsigned operations have no negative kind
        drawn = torch.where(drawn < 2 * len(signed), drawn, drawn // 2 * 2)
        for kind, rows in _groups(drawn, x.device):
            operation, part = kind // 2, out[rows]
            if operation < len(signed):
                changed = signed[operation](part, -level if kind % 2 else level, fill)
            else:
                changed = UNSIGNED[operation - len(signed)](part, level)
            out[rows] = changed
    return out
