"""CVAT (docs.cvat.ai: "CVAT for image"): boxes, polygons and tags in one XML file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Literal

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.engine.annotated_images import (
    AnnotatedImage,
    AnnotatedImagesImporter,
    bounds,
    rotated,
)
from pipeline.prepare.engine.importing import preview, split_of_folder
from pipeline.prepare.readers import archives

NO_SUBSET = "default"
"""CVAT's name of the subset of images that nobody put into one."""


class CvatOptions(Options):
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: leave out and count images that are named but not there"
    )


@register("importer", "cvat", options=CvatOptions)
class Cvat(AnnotatedImagesImporter):
    """annotations.xml of the format "CVAT for images 1.1", with the images below the same folder or
    in the same archive (CVAT's dialog: Save images). The attribute `subset` of an image tells its
    split, else a folder called train, valid, test or the like, else all rows are in train.

    Columns: `boxes`, `labels` (numbers in the order of the task's labels), `label_names`, `crowd`;
    `tags` and `tag` (the image's own). Of polygons and of rotated boxes the bounds are taken; other
    shapes are left out and counted.
    """

    def read(
        self, source: str, found: archives.Listing, counts: Counter[str]
    ) -> tuple[list[AnnotatedImage], list[str]]:
        files = [entry for entry in found.entries if entry.name.lower().endswith(".xml")]
        if len(files) != 1:
            what = f"{len(files)} .xml files ({preview(one.name for one in files)})"
            raise ValueError(
                f"{source}: {what if files else 'no .xml file'}; give the folder or zip of one "
                "export of the format CVAT for images 1.1"
            )
        reader = archives.Reader()
        try:
            data = reader.entry(files[0])
        finally:
            reader.close()
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
        return [_image(one, where, counts) for one in images], list(dict.fromkeys(names))


def _image(image: ElementTree.Element, where: str, counts: Counter[str]) -> AnnotatedImage:
    name = image.get("name", "")
    where = f"{where}: image {name}"
    objects: list[tuple[str, list[float]]] = []
    tags = []
    try:
        size = int(image.attrib["width"]), int(image.attrib["height"])
        for shape in image:
            if shape.tag == "tag":
                tags.append(shape.attrib["label"])
            elif shape.tag == "box":
                objects.append((shape.attrib["label"], _box(shape, counts)))
            elif shape.tag == "polygon":
                points = [
                    [float(number) for number in point.split(",")]
                    for point in shape.attrib["points"].split(";")
                ]
                objects.append((shape.attrib["label"], bounds(points)))
                counts["polygons, whose bounds are taken"] += 1
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
    return AnnotatedImage(names, where, size, objects, tags, split)


def _box(shape: ElementTree.Element, counts: Counter[str]) -> list[float]:
    left, top, right, bottom = (float(shape.attrib[edge]) for edge in ("xtl", "ytl", "xbr", "ybr"))
    box = [left, top, right - left, bottom - top]
    degrees = float(shape.get("rotation", "0"))
    if not degrees:
        return box
    counts["rotated boxes, whose bounds are taken"] += 1
    return rotated(box, degrees, ((left + right) / 2, (top + bottom) / 2))
