"""CVAT (docs.cvat.ai: "CVAT for image"): boxes, polygons, masks and tags in one XML file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.config.registry import MaskOptions, register
from pipeline.media import instance_masks
from pipeline.prepare.engine.annotated_images import (
    AnnotatedImage,
    AnnotatedImagesImporter,
    AnnotatedObject,
    around_ellipse,
    polygon,
    rotated,
)
from pipeline.prepare.engine.importing import first_few, split_of_folder
from pipeline.prepare.readers import archives

NO_SUBSET = "default"
"""CVAT's name of the subset of images that nobody put into one."""


class CvatOptions(MaskOptions):
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: leave out and count images that are named but not there"
    )


@register("importer", "cvat", options=CvatOptions)
class Cvat(AnnotatedImagesImporter):
    """Images with boxes or masks, as CVAT exports them.

    annotations.xml of the format "CVAT for images 1.1", with the images below the same folder or
    in the same archive (CVAT's dialog: Save images). The attribute `subset` of an image tells its
    split, else a folder called train, valid, test or the like, else all rows are in train.

    Columns: `boxes`, `labels` (numbers in the order of the task's labels), `label_names`, `crowd`;
    `tags` and `tag` (the image's own). Of polygons, masks, ellipses and rotated boxes the bounds
    are taken; other shapes are left out and counted. With masks=instance also `masks`, of the
    polygons and masks. An image with an object that has only a box or ellipse is then left out, and
    counted: its mask is not known. So is always an image with a mask that cannot be read, since an
    object without its label would count as background.
    """

    def read(
        self,
        source: str,
        listing: archives.Listing,
        counts: Counter[str],
    ) -> tuple[list[AnnotatedImage], list[str]]:
        files = [entry for entry in listing.entries if entry.name.lower().endswith(".xml")]
        if len(files) != 1:
            what = f"{len(files)} .xml files ({first_few(one.name for one in files)})"
            raise ValueError(
                f"{source}: {what if files else 'no .xml file'}; give the folder or zip of one "
                "export of the format CVAT for images 1.1"
            )
        data = archives.read_entry(files[0])
        where = f"{source}: {files[0].name}"
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # entities may expand without end
            raise ValueError(f"{where}: a document type; remove that line")
        try:
            root = ElementTree.fromstring(data)
        except ElementTree.ParseError as error:
            raise ValueError(f"{where} is no XML: {error}; export it again") from None
        images = root.findall("image")
        if root.tag != "annotations" or not images:
            raise ValueError(
                f"{where} holds no images of CVAT (<annotations> with <image>); export the task as "
                "CVAT for images 1.1"
            )
        names = [text for one in root.iterfind("meta//labels/label/name") if (text := one.text)]
        annotated = [_image(one, where, counts) for one in images]
        return annotated, list(dict.fromkeys(names))


def _image(
    image: ElementTree.Element,
    where: str,
    counts: Counter[str],
) -> AnnotatedImage:
    name = image.get("name", "")
    where = f"{where}: image {name}"
    objects: list[AnnotatedObject] = []
    tags = []
    problem = ""
    try:
        size = int(image.attrib["width"]), int(image.attrib["height"])
        for shape in image:
            if shape.tag == "tag":
                tags.append(shape.attrib["label"])
            elif shape.tag == "box":
                objects.append(AnnotatedObject(shape.attrib["label"], _box(shape, counts)))
            elif shape.tag == "polygon":
                points = [
                    [float(number) for number in point.split(",")]
                    for point in shape.attrib["points"].split(";")
                ]
                objects.append(polygon(shape.attrib["label"], points))
                counts["polygons, whose bounds are taken"] += 1
            elif shape.tag == "mask":
                try:
                    masked = _masked(shape, size)
                except ValueError as error:
                    problem = f"a mask of {shape.attrib['label']} cannot be read: {error}"
                    continue
                if masked is None:
                    counts["masks without a pixel, left out"] += 1
                else:
                    objects.append(masked)
                    counts["masks, whose bounds are taken"] += 1
            elif shape.tag == "ellipse":
                objects.append(AnnotatedObject(shape.attrib["label"], _ellipse(shape)))
                counts["ellipses, whose bounds are taken"] += 1
            else:
                counts[f"shapes of kind {shape.tag}, left out"] += 1
    except KeyError as error:
        raise ValueError(f"{where}: no attribute {error}; export it again") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; export it again") from None
    subset = image.get("subset", "")
    split = split_of_folder(subset)
    if subset and not split and subset.lower() != NO_SUBSET:
        raise ValueError(
            f"{where}: subset {subset!r} names no split; call it Train, Validation or Test in CVAT"
        )
    names = (f"{subset}/{name}", name) if subset else (name,)
    return AnnotatedImage(names, where, size, objects, tags, split, problem)


def _box(shape: ElementTree.Element, counts: Counter[str]) -> list[float]:
    left, top, right, bottom = (float(shape.attrib[edge]) for edge in ("xtl", "ytl", "xbr", "ybr"))
    box = [left, top, right - left, bottom - top]
    degrees = float(shape.get("rotation", "0"))
    if not degrees:
        return box
    counts["rotated boxes, whose bounds are taken"] += 1
    return rotated(box, degrees, ((left + right) / 2, (top + bottom) / 2))


def _ellipse(shape: ElementTree.Element) -> list[float]:
    x, y, across, down = (float(shape.attrib[name]) for name in ("cx", "cy", "rx", "ry"))
    return around_ellipse((x, y), (across, down), float(shape.get("rotation", "0")))


def _masked(shape: ElementTree.Element, size: tuple[int, int]) -> AnnotatedObject | None:
    """Return the object of a <mask>, whose run lengths go along the rows of its own rectangle.

    They alternate between background and object, and begin with background. Returns none for a
    mask without a pixel. Raises ValueError for other lengths.
    """
    left, top, wide, high = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
    width, height = size
    if not (0 <= left < left + wide <= width and 0 <= top < top + high <= height):
        raise ValueError(
            f"{wide} x {high} pixels at {left}, {top} of an image of {width} x {height}"
        )
    runs = [int(number) for number in shape.attrib["rle"].split(",")]
    if min(runs) < 0 or sum(runs) != wide * high:
        raise ValueError(f"run lengths of {sum(runs)} pixels for {wide} x {high}")
    mask = np.zeros((height, width), bool)
    is_object = np.arange(len(runs)) % 2 == 1
    mask[top : top + high, left : left + wide] = np.repeat(is_object, runs).reshape(high, wide)
    if not mask.any():
        return None
    box = [float(left), float(top), float(wide), float(high)]
    return AnnotatedObject(shape.attrib["label"], box, instance_masks.packed(mask))
