"""Pascal VOC (Everingham et al. 2010): boxes in an XML file for each image."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    SPLITS,
    Index,
    Row,
    place,
    preview,
    split_of_folders,
    table,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import Picture

COLUMNS = {
    **boxes.COLUMNS,
    "difficult": pa.list_(pa.bool_()),
    "_width": pa.int64(),
    "_height": pa.int64(),
}
MASKS = ("SegmentationClass", "SegmentationObject")
"""Folders of pictures that are named like the photographs."""


class VocObject(NamedTuple):
    """An object of an annotation; box [x, y, width, height] in pixels."""

    name: str
    box: list[float]
    difficult: bool


class VocOptions(Options):
    origin: int = Field(
        1,
        ge=0,
        le=1,
        description="1: the first pixel is 1 and the last one belongs to the box, as in Pascal VOC "
        "itself; 0: numbers are edges, from 0 on",
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: leave out and count annotations without an image"
    )


@register("importer", "voc", options=VocOptions)
class Voc(ImageImporter):
    """Annotations/NAME.xml with JPEGImages/NAME.jpg (or images beside or elsewhere, found by name)
    in a folder or archive, several years too. ImageSets/Main/train.txt, val.txt and test.txt tell
    the splits, and images that none of them lists are left out and counted. Where there are no
    lists, folders called train, valid, test or the like tell them, else all rows are in train.

    Columns: `boxes` (list of [x, y, width, height] in pixels of the written image), `labels`
    (numbers of the classes in the order of their names), `label_names`, `crowd` (false) and
    `difficult`, one each a box. Images without boxes are kept. Boxes are dropped and clipped as by
    `coco`.
    """

    label = "label_names"

    def index(self, source: str) -> Index:
        found = archives.listing(source)
        files = [entry for entry in found.entries if _is_annotation(entry)]
        same_stem: dict[str, list[archives.Entry]] = defaultdict(list)
        for entry in found.images:
            if PurePosixPath(entry.name).parent.name not in MASKS:
                same_stem[PurePosixPath(entry.name).stem].append(entry)
        reader = archives.Reader()
        try:
            listed = _splits(found, reader)
            texts = list(threaded_map(reader.entry, files))
        finally:
            reader.close()
        read = [
            _objects(data, f"{source}: {entry.name}", self.options.origin)
            for entry, data in zip(files, texts, strict=True)
        ]
        names = sorted({one.name for _, objects in read for one in objects})
        rows, counts, lost = [], Counter[str](), []
        taken: dict[str, str] = {}
        for entry, ((width, height), objects) in zip(files, read, strict=True):
            path = PurePosixPath(entry.name)
            lists = next((listed[at] for at in map(str, path.parents) if at in listed), None)
            if lists is not None and path.stem not in lists:
                counts["images that ImageSets/Main does not list, left out"] += 1
                continue
            image = _image_of(path, same_stem[path.stem])
            if image is None:
                lost.append(entry.name)
                continue
            if image.name in taken:
                raise ValueError(
                    f"{source}: {taken[image.name]} and {entry.name} are both of {image.name}; "
                    "remove one of them, or add its own image beside it"
                )
            taken[image.name] = entry.name
            by_folder = split_of_folders(image.name) or split_of_folders(entry.name) or "train"
            kept = [
                (box, one)
                for one in objects
                if (box := boxes.clipped(one.box, width, height, counts)) is not None
            ]
            counts["images without a box"] += not kept
            rows.append(
                place(
                    image,
                    by_folder if lists is None else lists[path.stem],
                    boxes=[box for box, _ in kept],
                    labels=[names.index(one.name) for _, one in kept],
                    label_names=[one.name for _, one in kept],
                    crowd=[False for _ in kept],
                    difficult=[one.difficult for _, one in kept],
                    _width=width,
                    _height=height,
                )
            )
        if lost and self.options.missing == "refuse":
            raise ValueError(
                f"{source}: annotations without an image of their name (or with several): "
                f"{preview(lost)}; add the images, or leave them out with --set missing=skip"
            )
        if lost:
            counts["annotations without an image, left out"] = len(lost)
        if files and not rows and not lost:
            raise ValueError(f"{source}: the lists in ImageSets/Main name none of its annotations")
        return Index(
            table(rows, COLUMNS, source),
            found.mark,
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info={
                "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
                "box_format": "xywh in pixels",
            },
        )

    def postprocess(self, row: Row, picture: Picture) -> Row:
        width, height = row["_width"], row["_height"]
        boxes.check_size(picture, width, height)
        across, down = picture.size[0] / width, picture.size[1] / height
        return {**row, "boxes": boxes.scaled(row["boxes"], across, down)}


def _objects(data: bytes, where: str, origin: int) -> tuple[tuple[int, int], list[VocObject]]:
    """Return ((width, height) of the image, its objects)."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # entities may expand without end
        raise ValueError(f"{where}: an annotation with a document type; remove that line")
    try:
        root = ElementTree.fromstring(data)
        size = (_whole(root, "size/width"), _whole(root, "size/height"))
        objects = []
        for one in root.iterfind("object"):
            left, top, right, bottom = (
                float(one.findtext(f"bndbox/{edge}") or "")
                for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [left - origin, top - origin, right - left + origin, bottom - top + origin]
            name = (one.findtext("name") or "").strip()
            if not name:
                raise ValueError("an object without a name")
            objects.append(VocObject(name, box, one.findtext("difficult") == "1"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{where}: no Pascal VOC annotation (size, and name and bndbox of each object): "
            f"{error}; correct or remove it"
        ) from None
    return size, objects


def _whole(root: ElementTree.Element, path: str) -> int:
    number = int(root.findtext(path) or "0")
    if number <= 0:
        raise ValueError(f"{path} is {number}")
    return number


def _splits(found: archives.Listing, reader: archives.Reader) -> dict[str, dict[str, str]]:
    """Return, for each folder of a year, the split of each name that its ImageSets/Main lists.

    Of trainval.txt only what no other list has is taken, as train.
    """
    lists = {}
    for entry in found.entries:
        listed = re.fullmatch(r"(?:(.*)/)?ImageSets/Main/(\w+)\.txt", entry.name)
        if listed is not None and (listed[2] == "trainval" or listed[2].lower() in SPLITS):
            lists[listed[1] or ".", listed[2]] = reader.entry(entry).decode("utf-8-sig")
    stems = {PurePosixPath(entry.name).stem for entry in found.entries if _is_annotation(entry)}
    out: dict[str, dict[str, str]] = defaultdict(dict)
    for (folder, name), text in sorted(lists.items(), key=lambda one: one[0][1] == "trainval"):
        for line in filter(None, map(str.strip, text.splitlines())):
            stem = line if line in stems else line.split()[0]  # a number may stand behind it
            out[folder].setdefault(stem, SPLITS.get(name.lower(), "train"))
    return out


def _is_annotation(entry: archives.Entry) -> bool:
    return entry.name.lower().endswith(".xml")


def _image_of(path: PurePosixPath, same_stem: list[archives.Entry]) -> archives.Entry | None:
    """Return the image of an annotation; none where there is none, or which it is is not clear.

    Args:
        same_stem: the images whose name is the annotation's, without suffixes.
    """
    near = (path.parent, path.parent.parent / "JPEGImages", path.parent.parent / "images")
    groups = [
        *([one for one in same_stem if PurePosixPath(one.name).parent == at] for at in near),
        [one for one in same_stem if PurePosixPath(one.name).parent.parent == path.parent.parent],
        same_stem,
    ]
    first = next(filter(None, groups), [])
    return first[0] if len(first) == 1 else None
