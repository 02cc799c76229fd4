"""COCO's masks without its C code: run lengths, their compressed text, and polygons as its own
rasteriser fills them.

The definitions are those of cocoapi's common/maskApi.c (rleFrString, rleFrPoly, rleDecode); tests
compare with pycocotools bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FARTHEST = 1 << 20
"""An edge takes memory by its length in pixels."""


def counts_of(text: str | bytes) -> list[int]:
    """Run lengths from compressed text: 5 bits a character, differences to the run before the last
    from the third on.
    """
    data = text.encode() if isinstance(text, str) else text
    counts: list[int] = []
    at = 0
    while at < len(data):
        value, shift, more = 0, 0, True
        while more:
            if at == len(data):
                raise ValueError("the compressed RLE ends in the middle of a number")
            bits = data[at] - 48
            value |= (bits & 0x1F) << shift
            more, at, shift = bool(bits & 0x20), at + 1, shift + 5
            if not more and bits & 0x10:
                value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def from_runs(counts: list[int], height: int, width: int) -> np.ndarray:
    """(height, width) bool from run lengths in column order, zeros first. Raises ValueError when
    they are not as many as the pixels.
    """
    lengths = np.asarray(counts, dtype=np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(
            f"run lengths of {int(lengths.sum())} pixels for an image of {height * width}"
        )
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def from_polygon(points: list[float], height: int, width: int) -> np.ndarray:
    """(height, width) bool of one polygon [x0, y0, x1, y1, ...] in pixels: its edge is drawn five
    times finer, and columns filled between crossings.
    """
    scale = 5.0
    xy = np.trunc(scale * np.asarray(points, dtype=np.float64).reshape(-1, 2) + 0.5).astype(
        np.int64
    )
    ends = np.roll(xy, -1, axis=0)
    us, vs = zip(
        *(_edge(*start, *end) for start, end in zip(xy.tolist(), ends.tolist(), strict=True)),
        strict=True,
    )
    u, v = np.concatenate(us), np.concatenate(vs)
    moved = np.flatnonzero(u[1:] != u[:-1]) + 1
    left = np.where(u[moved] < u[moved - 1], u[moved], u[moved] - 1)
    x = (left + 0.5) / scale - 0.5
    kept = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    y = (np.minimum(v[moved], v[moved - 1]) + 0.5) / scale - 0.5
    y = np.ceil(np.clip(y, 0, height)).astype(np.int64)
    flips = np.bincount(x[kept].astype(np.int64) * height + y[kept], minlength=height * width + 1)[
        : height * width
    ]
    return (np.cumsum(flips) % 2 == 1).reshape(width, height).T


def _edge(xs: int, ys: int, xe: int, ye: int) -> tuple[np.ndarray, np.ndarray]:
    """All points of an edge along its longer side, in its direction."""
    dx, dy = abs(xe - xs), abs(ye - ys)
    flip = (dx >= dy and xs > xe) or (dx < dy and ys > ye)
    if flip:
        xs, ys, xe, ye = xe, ye, xs, ys
    along = np.arange(max(dx, dy) + 1)
    along = along[::-1] if flip else along
    if dx >= dy:
        slope = (ye - ys) / dx if dx else 0.0
        return along + xs, np.trunc(ys + slope * along + 0.5).astype(np.int64)
    return np.trunc(xs + (xe - xs) / dy * along + 0.5).astype(np.int64), along + ys


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool of an annotation's segmentation: polygons (their union), run lengths or
    compressed ones. Raises ValueError for another size.
    """
    if isinstance(segmentation, list):
        out = np.zeros((height, width), dtype=bool)
        for points in segmentation:
            if len(points) < 6 or len(points) % 2:
                raise ValueError(f"a polygon of {len(points)} numbers")
            if not (np.abs(points) < FARTHEST).all():
                raise ValueError(
                    f"a polygon with a number that is not finite, or beyond {FARTHEST} pixels"
                )
            out |= from_polygon(points, height, width)
        return out
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"a mask of {segmentation['size'][1]} x {segmentation['size'][0]} pixels for an "
            f"image of {width} x {height}"
        )
    counts = segmentation["counts"]
    return from_runs(counts if isinstance(counts, list) else counts_of(counts), height, width)
