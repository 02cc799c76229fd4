"""Masks of objects as run lengths (RLE) of COCO (Lin et al. 2014), which pycocotools reads too."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

RLE = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
"""A mask in a table: height and width of its image, and COCO's compressed run lengths."""
MAX_COORDINATE = 1 << 20
"""Farthest point of a polygon from the origin, in pixels: an edge takes memory by its length."""


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Draw an annotation's segmentation.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] in pixels (their union is drawn), or
            {"size": [height, width], "counts": run lengths, as a list or as COCO's text}.
        height, width: of the image, in pixels.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: an invalid polygon, or a mask of another size. The run lengths are added up
            here, since pycocotools leaves the pixels that they do not reach uninitialised.
    """
    if isinstance(segmentation, list):
        for points in segmentation:
            if len(points) < 6 or len(points) % 2:
                raise ValueError(f"a polygon of {len(points)} numbers")
            if not (np.abs(points) < MAX_COORDINATE).all():
                raise ValueError(
                    f"a polygon with a number that is not finite, or beyond {MAX_COORDINATE} pixels"
                )
        polygons = coco_mask.frPyObjects(segmentation, height, width) if segmentation else []
        if not polygons:
            return np.zeros((height, width), dtype=bool)
        return coco_mask.decode(coco_mask.merge(polygons)).astype(bool)
    lengths = run_lengths(segmentation, height, width)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def run_lengths(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return the run lengths of a mask, alternating background and object, in column-major order.

    Args:
        segmentation: {"size": [height, width], "counts": run lengths, as a list or as COCO's text}.
        height, width: of the image, in pixels.

    Raises:
        ValueError: a mask of another size, or run lengths that are not those of its pixels.
    """
    rows, columns = segmentation["size"]
    if (rows, columns) != (height, width):
        raise ValueError(f"a mask of {columns} x {rows} pixels for an image of {width} x {height}")
    counts = segmentation["counts"]
    lengths = np.asarray(counts if isinstance(counts, list) else unpacked(counts), np.int64)
    pixels = height * width
    if ((lengths < 0) | (lengths > pixels)).any() or lengths.sum() != pixels:
        raise ValueError(f"run lengths of {int(lengths.sum())} pixels for an image of {pixels}")
    return lengths


class RunLengths(TypedDict):
    """A mask as pycocotools and `RLE` have it: height and width, and its compressed runs."""

    size: list[int]
    counts: str


def packed(mask: np.ndarray) -> RunLengths:
    """Return the run lengths of a mask (height, width) bool as pycocotools and `RLE` have them."""
    encoded: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def unpacked(text: str | bytes) -> np.ndarray:
    """Unpack COCO's compressed run lengths (cocoapi's rleFrString), which pycocotools does not
    expose.

    A number has 5 bits a character, the lowest first; from the fourth on it is the difference to
    the run before the last. Raises ValueError for an invalid text.
    """
    characters = text.encode() if isinstance(text, str) else text
    data = np.frombuffer(characters, np.uint8) - np.int64(48)
    if ((data < 0) | (data > 63)).any():
        raise ValueError("the compressed RLE holds a character outside ASCII 48 to 111")
    ends = np.flatnonzero(data & 0x20 == 0)
    if len(data) and (not len(ends) or ends[-1] + 1 < len(data)):
        raise ValueError("the compressed RLE ends in the middle of a number")
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    lengths = ends - starts + 1
    if (lengths > 7).any():
        raise ValueError("the compressed RLE has a number of more than 35 bits")
    shifts = 5 * (np.arange(len(data)) - np.repeat(starts, lengths))
    values = np.add.reduceat((data & 0x1F) << shifts, starts) if len(data) else data
    values = values - np.where(data[ends] & 0x10, np.int64(1) << 5 * lengths, 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values
