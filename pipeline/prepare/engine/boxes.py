"""Boxes and masks of objects in images, as every importer of them writes them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.media import instance_masks
from pipeline.media.instance_masks import RunLengths
from pipeline.prepare.engine.importing import Info, Row
from pipeline.prepare.readers.picture_check import BrokenImageError, Picture, resize_nearest

COLUMNS = {
    "boxes": pa.list_(pa.list_(pa.float32())),
    "labels": pa.list_(pa.int64()),
    "label_names": pa.list_(pa.string()),
    "crowd": pa.list_(pa.bool_()),
}
"""Of each row: boxes [x, y, width, height] in pixels of the written image, and for each box the
number and the name of its class, and whether it stands for a crowd.
"""
SIZE_COLUMNS = {"_width": pa.int64(), "_height": pa.int64()}
"""Columns of the index: width and height in pixels of the annotated image."""
MASKS = pa.field("masks", pa.list_(instance_masks.RLE))
"""Where masks are asked for, one for each box, of the size of the written image."""
SEGMENTATIONS = "_segmentations"
"""Column of an index where masks are asked for: as JSON, what each box's mask is drawn from."""
ROUNDING = 0.01
"""Pixels by which publishers' rounding puts boxes outside: they are clipped, but not counted."""


def info_of(names: Mapping[int, str]) -> Info:
    """Return what the manifest says of boxes, whose classes have these names by their number."""
    categories = [{"id": number, "name": names[number]} for number in sorted(names)]
    return {"categories": categories, "box_format": "xywh in pixels"}


def clip(
    box: list[float],
    width: float,
    height: float,
    counts: Counter[str],
    rounding: float = ROUNDING,
) -> list[float] | None:
    """Return a box [x, y, width, height] clipped to its image; none for an unusable one.

    Args:
        width, height: of the image, in the unit of the box.
        counts: what is dropped and cut is counted here.
        rounding: boxes that are outside by so much are not counted.
    """
    if not all(map(math.isfinite, box)):
        counts["boxes that are not finite, dropped"] += 1
        return None
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        counts["boxes without area, dropped"] += 1
        return None
    x0, x1 = max(0.0, x), min(float(width), x + w)
    y0, y1 = max(0.0, y), min(float(height), y + h)
    if x1 <= x0 or y1 <= y0:
        counts["boxes outside the image, dropped"] += 1
        return None
    counts["boxes partly outside the image, cut"] += (
        max(x0 - x, y0 - y, x + w - x1, y + h - y1) > rounding
    )
    return [x0, y0, x1 - x0, y1 - y0]


def resize(row: Row, picture: Picture) -> Row:
    """Scale a row's boxes, and draw its masks if it has any, to the size of the written image.

    Args:
        row: of the index, with `SIZE_COLUMNS`; masks are drawn from `SEGMENTATIONS`.
        picture: the written image.

    Raises:
        BrokenImageError: the image has another size than its annotations are for, or a mask cannot
            be drawn.
    """
    width, height = row["_width"], row["_height"]
    if picture.upright_size != (width, height):
        found = "{} x {}".format(*picture.upright_size)
        raise BrokenImageError(
            f"the image is {found} pixels, its annotations are for {width} x {height}"
        )
    across, down = picture.size[0] / width, picture.size[1] / height
    out = {**row, "boxes": scale(row["boxes"], across, down)}
    if row.get(SEGMENTATIONS) is not None:
        segmentations = json.loads(row[SEGMENTATIONS])
        out["masks"] = encode_masks(segmentations, (width, height), out["boxes"], picture.size)
    return out


def scale(boxes: list[Any], x: float, y: float) -> list[list[float]]:
    """Return boxes with horizontal numbers times ``x`` and vertical ones times ``y``."""
    return [[left * x, top * y, w * x, h * y] for left, top, w, h in boxes]


def encode_masks(
    segmentations: list[Any],
    size: tuple[int, int],
    boxes: list[list[float]],
    written_size: tuple[int, int],
) -> list[RunLengths]:
    """Draw the mask of each box in the size of the written image.

    Args:
        segmentations: of each box, as `instance_masks.mask_of` takes it; empty where it has none.
        size: width and height of the publisher's image.
        boxes: [x, y, width, height] in pixels of the written image.
        written_size: its width and height.

    Raises:
        BrokenImageError: which mask cannot be drawn, and why.
    """
    out = []
    for number, (segmentation, box) in enumerate(zip(segmentations, boxes, strict=True), 1):
        try:
            if not segmentation:
                raise ValueError("the object has a box, but no polygon or mask")
            mask = instance_masks.mask_of(segmentation, size[1], size[0])
            out.append(encode_mask(mask, box, written_size))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BrokenImageError(
                f"mask {number} of {len(boxes)} cannot be drawn: {error}"
            ) from None
    return out


def encode_mask(mask: np.ndarray, box: list[float], size: tuple[int, int]) -> RunLengths:
    """Return the run lengths of a mask, resized to the written image (nearest pixel).

    An object that is so small that no pixel is left of it keeps the one at the middle of its box.

    Args:
        mask: (height, width) bool, of the publisher's image.
        box: [x, y, width, height] of the object, in pixels of the written image.
        size: width and height of the written image.

    Raises:
        ValueError: the mask is empty, and its box is not small.
    """
    x, y, wide, high = box
    scale = size[0] / mask.shape[1]
    if not mask.any() and min(wide, high) >= 2 * scale:
        raise ValueError(f"a mask without a pixel, in a box of {wide:.4g} x {high:.4g} pixels")
    out = resize_nearest(mask.astype(np.uint8), size).astype(bool)
    if not out.any():
        out = out.copy()
        column = min(int(x + wide / 2), size[0] - 1)
        row = min(int(y + high / 2), size[1] - 1)
        out[row, column] = True
    return instance_masks.packed(out)
