"""Images that an export of an annotation tool names, with their boxes, masks and tags."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    Index,
    InvalidRow,
    Row,
    file_row,
    first_few,
    index_table,
    invalid_row,
    split_of_folders,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import Picture

TAG_COLUMNS = {"tags": pa.list_(pa.string()), "tag": pa.string()}
COLUMNS = {**boxes.COLUMNS, **TAG_COLUMNS, **boxes.SIZE_COLUMNS}
UNKNOWN = 0
"""Width and height of an image without boxes, where the export does not state them."""


class AnnotatedObject(NamedTuple):
    """An object in an image."""

    name: str
    """Its class."""
    box: list[float]
    """[x, y, width, height] in pixels."""
    segmentation: Any = None
    """Its mask, as `instance_masks.mask_of` takes it; None where it has a box alone."""


@dataclass(frozen=True)
class AnnotatedImage:
    """What an export says of an image.

    Attributes:
        names: of the file, as far as the export knows it: paths below the source, or their ends,
            of which the first that is there counts.
        where: the place in the export, for messages.
        size: (width, height) in pixels, `UNKNOWN` where it is not stated.
        objects: the annotated objects.
        tags: classes of the image as a whole.
        split: "" where the export tells none.
        problem: why the image cannot be used, "" where it can.
    """

    names: tuple[str, ...]
    where: str
    size: tuple[int, int] = (UNKNOWN, UNKNOWN)
    objects: list[AnnotatedObject] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    split: str = ""
    problem: str = ""


class AnnotatedImagesImporter(ImageImporter):
    """Base class for exports of annotation tools, with the options `missing` and `masks`.
    Examples: `cvat`, `labelstudio`.

    Columns: `boxes` (list of [x, y, width, height] in pixels of the written image), `labels`
    (numbers of the classes), `label_names`, `crowd` (false) and, where asked for, `masks`, one for
    each box; `tags` (the classes of the image as a whole) and `tag` (its class where it has one
    alone, else null). Boxes are dropped and clipped as by `coco`. An image that the export does not
    name is left out and counted.
    """

    label = "label_names"

    @abstractmethod
    def read(
        self,
        source: str,
        listing: archives.Listing,
        counts: Counter[str],
    ) -> tuple[list[AnnotatedImage], list[str]]:
        """Return (annotated images, the names of the classes in the order of their numbers).

        Classes that are not named follow, by name. What is left out is added to `counts`. Raises
        ValueError for a file that the tool did not export.
        """

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        counts = Counter[str]()
        annotated, listed = self.read(source, listing, counts)
        used = {one.name for image in annotated for one in image.objects}
        names = [*listed, *sorted(used - set(listed))]
        files = ImagesByName(listing.images)
        taken: dict[str, str] = {}
        rows, missing_images = [], []
        invalid: list[InvalidRow] = []
        for one in annotated:
            image = files.find(one.names)
            if image is None:
                missing_images.append(f"{one.names[-1]} ({one.where})")
                continue
            if image.name in taken:
                raise ValueError(
                    f"{source}: {taken[image.name]} and {one.where} are both of {image.name}; "
                    "remove one of them"
                )
            taken[image.name] = one.where
            if one.problem:
                invalid.append(invalid_row(image.name, _split(image, one), one.problem))
            else:
                rows.append(_row(image, one, names, counts))
        if missing_images and self.options.missing == "refuse":
            raise ValueError(
                f"{source}: images that are named but not there (or several times): "
                f"{first_few(missing_images)}; add them below {source}, or leave them out with "
                "--set missing=skip"
            )
        counts["images that are named but not there, left out"] = len(missing_images)
        counts["images that the export does not name, left out"] = len(listing.images) - len(taken)
        has_masks = self.options.masks == "instance"
        kinds = {**COLUMNS, boxes.SEGMENTATIONS: pa.string()} if has_masks else COLUMNS
        return Index(
            index_table(rows, kinds, source),
            listing.fingerprint,
            (boxes.MASKS,) if has_masks else (),
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **+counts},
            info=boxes.info_of(dict(enumerate(names))),
            invalid=invalid,
        )

    def postprocess(self, row: Row, picture: Picture) -> Row:
        if (row["_width"], row["_height"]) == (UNKNOWN, UNKNOWN):
            return {**row, "masks": []}
        return boxes.resize(row, picture)


def polygon(name: str, points: Sequence[Sequence[float]]) -> AnnotatedObject:
    """Return the object that a polygon of points (x, y) encloses."""
    return AnnotatedObject(name, bounds(points), [[number for point in points for number in point]])


def bounds(points: Iterable[Sequence[float]]) -> list[float]:
    """Return the box [x, y, width, height] around points (x, y)."""
    across, down = zip(*points, strict=True)
    left, top = min(across), min(down)
    return [left, top, max(across) - left, max(down) - top]


def rotated(box: list[float], degrees: float, pivot: tuple[float, float]) -> list[float]:
    """Return the bounds of a box [x, y, width, height] that is turned clockwise about a point."""
    x, y, width, height = box
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [
        (x + a * width - pivot[0], y + b * height - pivot[1]) for a in (0, 1) for b in (0, 1)
    ]
    return bounds(
        (pivot[0] + across * cos - down * sin, pivot[1] + across * sin + down * cos)
        for across, down in corners
    )


def around_ellipse(
    center: tuple[float, float], radii: tuple[float, float], degrees: float
) -> list[float]:
    """Return the bounds of an ellipse that is turned clockwise about its center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across = math.hypot(radii[0] * cos, radii[1] * sin)
    down = math.hypot(radii[0] * sin, radii[1] * cos)
    return [center[0] - across, center[1] - down, 2 * across, 2 * down]


class ImagesByName:
    """Images by the name that an export or a list has of them."""

    def __init__(self, images: list[archives.Entry]):
        self.by_path = {image.name: image for image in images}
        self.by_end: dict[str, list[archives.Entry]] = defaultdict(list)
        for image in images:
            parts = PurePosixPath(image.name).parts
            for at in range(len(parts)):
                self.by_end["/".join(parts[at:])].append(image)

    def find(self, names: Iterable[str]) -> archives.Entry | None:
        """Return the image whose path is or ends with the first of the names that one image has."""
        for name in map(archives.plain_name, names):
            if name in self.by_path:
                return self.by_path[name]
            found = self.by_end.get(name, [])
            if len(found) == 1:
                return found[0]
        return None


def _split(image: archives.Entry, one: AnnotatedImage) -> str:
    return one.split or split_of_folders(image.name) or "train"


def _row(
    image: archives.Entry,
    one: AnnotatedImage,
    names: list[str],
    counts: Counter[str],
) -> Row:
    width, height = one.size
    kept = [
        found._replace(box=box)
        for found in one.objects
        if (box := boxes.clip(found.box, width, height, counts)) is not None
    ]
    counts["images without a box"] += not kept
    segmentations = json.dumps([found.segmentation for found in kept])
    return file_row(
        image,
        _split(image, one),
        **{boxes.SEGMENTATIONS: segmentations},
        boxes=[found.box for found in kept],
        labels=[names.index(found.name) for found in kept],
        label_names=[found.name for found in kept],
        crowd=[False for _ in kept],
        tags=one.tags,
        tag=one.tags[0] if len(one.tags) == 1 else None,
        _width=width,
        _height=height,
    )
