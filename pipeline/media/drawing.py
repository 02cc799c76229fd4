"""Predictions drawn on pictures: boxes with captions, masks with a key of their colours."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

MIN_SIDE, MAX_SIDE = 480, 1600
"""Pixels of the longer side: a smaller picture is enlarged, so that captions can be read, and a
larger one is made smaller.
"""
TEXT_PIXELS, PADDING = 14, 3
MAX_KEYS = 12
"""How many classes the key of a mask names, those with the most pixels."""


def colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class: hues by the golden ratio, so that neighbours differ."""
    hue = (0.03 + number * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _sized(picture: np.ndarray) -> PIL.Image.Image:
    """Return a picture (H, W, 3) uint8, enlarged by a whole number or made smaller."""
    image = PIL.Image.fromarray(picture)
    side = max(image.size)
    if side < MIN_SIDE:
        times = -(-MIN_SIDE // side)
        size = image.width * times, image.height * times
        return image.resize(size, PIL.Image.Resampling.NEAREST)
    image.thumbnail((MAX_SIDE, MAX_SIDE))  # which enlarges nothing
    return image


def draw_boxes(
    picture: np.ndarray, corners: np.ndarray, captions: Sequence[str], classes: Sequence[int]
) -> np.ndarray:
    """Draw boxes with captions; the first ones lie on top.

    Args:
        picture: (H, W, 3) uint8.
        corners: (k, 4) x0 y0 x1 y1 as shares of the picture.
        captions: (k,) texts.
        classes: (k,) numbers, each of which has its colour.

    Returns:
        (h, w, 3) uint8, of MIN_SIDE to about MAX_SIDE pixels.
    """
    image = _sized(picture)
    canvas, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(TEXT_PIXELS)
    width = max(2, max(image.size) // 300)
    scale = np.array([image.width, image.height] * 2)
    boxes = np.asarray(corners, dtype=np.float64).reshape(-1, 4).clip(0, 1) * scale
    drawn = list(zip(boxes.tolist(), captions, classes, strict=True))
    for (left, top, right, bottom), caption, number in reversed(drawn):
        right, bottom = max(left, right), max(top, bottom)
        canvas.rectangle((left, top, right, bottom), outline=colour(number), width=width)
        wide = font.getlength(caption) + 2 * PADDING
        high = TEXT_PIXELS + 2 * PADDING
        x = min(left, max(0.0, image.width - wide))
        y = top - high if top >= high else top
        canvas.rectangle((x, y, x + wide, y + high), fill=colour(number))
        canvas.text(
            (x + PADDING, y + PADDING),
            caption,
            fill=(0, 0, 0),
            font=font,
        )
    return np.asarray(image)


def lay_masks(
    picture: np.ndarray, masks: Sequence[np.ndarray], classes: Sequence[int]
) -> np.ndarray:
    """Lay the colours of objects over a picture (H, W, 3) uint8; the first ones lie on top.

    Args:
        masks: (H, W) bool each.
        classes: (k,) numbers, each of which has its colour.
    """
    out = picture.copy()
    for mask, number in reversed(list(zip(masks, classes, strict=True))):
        own_colour = np.array(colour(number), dtype=np.uint8)
        out[mask] = picture[mask] // 2 + own_colour // 2
    return out


def draw_mask(picture: np.ndarray, mask: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Lay the colours of a mask over a picture, and write below it which class each one is.

    Args:
        picture: (H, W, 3) uint8.
        mask: (h, w) uint8 class numbers of the whole picture, at any resolution.
        names: (C,) names of the classes.

    Returns:
        (h, w, 3) uint8: as wide as MIN_SIDE to MAX_SIDE say, and higher by the key.
    """
    image = _sized(picture)
    classes = np.asarray(PIL.Image.fromarray(mask).resize(image.size, PIL.Image.Resampling.NEAREST))
    colours = np.array([colour(number) for number in range(256)], dtype=np.uint8)
    laid_over = PIL.Image.blend(image, PIL.Image.fromarray(colours[classes]), 0.5)
    pixels = np.bincount(classes.reshape(-1), minlength=256)
    present = [int(number) for number in np.argsort(-pixels, kind="stable") if pixels[number]]
    lines = [
        (number, f"{names[number]} {100 * pixels[number] / classes.size:.0f} %")
        for number in present[:MAX_KEYS]
    ]
    if len(present) > MAX_KEYS:
        lines.append((present[MAX_KEYS], f"and {len(present) - MAX_KEYS} more classes"))
    high, font = TEXT_PIXELS + 2 * PADDING, PIL.ImageFont.load_default(TEXT_PIXELS)
    page = PIL.Image.new("RGB", (image.width, image.height + high * len(lines)), "white")
    page.paste(laid_over, (0, 0))
    canvas = PIL.ImageDraw.Draw(page)
    for place, (number, text) in enumerate(lines):
        y = image.height + place * high
        canvas.rectangle((0, y, high, y + high), fill=colour(number))
        canvas.text(
            (high + PADDING, y + PADDING),
            text,
            fill=(0, 0, 0),
            font=font,
        )
    return np.asarray(page)


def png(pixels: np.ndarray) -> bytes:
    """Return the bytes of a PNG file of (H, W) or (H, W, 3) uint8."""
    sink = io.BytesIO()
    PIL.Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    """Return the bytes of a JPEG file of a picture (H, W, 3) uint8."""
    sink = io.BytesIO()
    PIL.Image.fromarray(picture).save(sink, "JPEG", quality=92)
    return sink.getvalue()
