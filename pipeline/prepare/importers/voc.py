"""Pascal VOC (Everingham et al. 2010): boxes in an XML file for each image, masks in a PNG."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import MaskOptions, register
from pipeline.io.threads import threaded_map
from pipeline.media.instance_masks import RunLengths
from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    SPLITS,
    Index,
    Row,
    file_row,
    first_few,
    index_table,
    split_of_folders,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import BrokenImageError, Picture

COLUMNS = {**boxes.COLUMNS, "difficult": pa.list_(pa.bool_()), **boxes.SIZE_COLUMNS}
MASK_COLUMNS = {"_numbers": pa.list_(pa.int64()), "_mask_png": pa.binary()}
"""Where masks are asked for: the objects' numbers, from 1, and the PNG that shows them."""
OBJECTS = "SegmentationObject"
MASK_FOLDERS = ("SegmentationClass", OBJECTS)
"""Folders of pictures that are named like the photographs."""


class VocObject(NamedTuple):
    """An object of an annotation; box [x, y, width, height] in pixels."""

    name: str
    box: list[float]
    difficult: bool
    number: int
    """Its place in the annotation, from 1."""


class VocOptions(MaskOptions):
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
    difficult: Literal["ignore", "count"] = Field(
        "ignore",
        description="ignore: difficult objects are crowds, which count neither as hits nor as "
        "misses, as in Pascal VOC's own evaluation; count: they are objects like all others",
    )


@register("importer", "voc", options=VocOptions)
class Voc(ImageImporter):
    """Pascal VOC: images with boxes, classes and masks.

    It reads Annotations/NAME.xml with JPEGImages/NAME.jpg, in a folder or archive, several years
    too. Images may also be beside the annotations or elsewhere: they are found by name.

    - ImageSets/Main/train.txt, val.txt and test.txt tell the splits. Images that no list names are
      left out and counted.
    - Without lists, folders called train, valid, test or the like tell them. Without these all rows
      are in train.

    Columns, one for each box:

    - `boxes`: a list of [x, y, width, height] in pixels of the written image. They are dropped and
      clipped as by coco. Images without boxes are kept.
    - `labels` (numbers of the classes, in the order of their names) and `label_names`
    - `difficult`, and `crowd`, which is true if the object is difficult. A job that reads the
      column crowd neither trains on difficult objects nor counts them. Detections in them are
      judged by COCO's rule for crowds.
    - `masks`, with masks=instance: of SegmentationObject/NAME.png, whose pixels have the number of
      their object in the annotation. Images without such a file are left out and counted. The lists
      of ImageSets/Segmentation then tell the splits, if there are any.
    """

    label = "label_names"

    def index(self, source: str) -> Index:
        listing = archives.listing(source)
        files = [entry for entry in listing.entries if _is_annotation(entry)]
        same_stem: dict[str, list[archives.Entry]] = defaultdict(list)
        for entry in listing.images:
            if PurePosixPath(entry.name).parent.name not in MASK_FOLDERS:
                same_stem[PurePosixPath(entry.name).stem].append(entry)
        has_masks = self.options.masks == "instance"
        ignores_difficult = self.options.difficult == "ignore"
        with archives.Reader() as reader:
            lists_of = "Segmentation"
            listed = _splits(listing, reader, lists_of) if has_masks else {}
            if not listed:
                lists_of = "Main"
                listed = _splits(listing, reader, lists_of)
            texts = list(threaded_map(reader.entry, files))
            masks = _masks_of(source, listing, files, reader) if has_masks else {}
        read = [
            _objects(data, f"{source}: {entry.name}", self.options.origin)
            for entry, data in zip(files, texts, strict=True)
        ]
        names = sorted({one.name for _, objects in read for one in objects})
        rows, counts, missing_images = [], Counter[str](), []
        taken: dict[str, str] = {}
        for entry, ((width, height), objects) in zip(files, read, strict=True):
            path = PurePosixPath(entry.name)
            lists = next((listed[at] for at in map(str, path.parents) if at in listed), None)
            if lists is not None and path.stem not in lists:
                counts[f"images that ImageSets/{lists_of} does not list, left out"] += 1
                continue
            if has_masks and entry.name not in masks:
                counts[f"images without a PNG in {OBJECTS}, left out"] += 1
                continue
            image = _image_of(path, same_stem[path.stem])
            if image is None:
                missing_images.append(entry.name)
                continue
            if image.name in taken:
                raise ValueError(
                    f"{source}: {taken[image.name]} and {entry.name} are both of {image.name}; "
                    "remove one of them, or add its own image beside it"
                )
            taken[image.name] = entry.name
            kept = [
                (box, one)
                for one in objects
                if (box := boxes.clip(one.box, width, height, counts)) is not None
            ]
            counts["images without a box"] += not kept
            counts["difficult objects"] += sum(one.difficult for _, one in kept)
            rows.append(
                file_row(
                    image,
                    _split_of(image, entry) if lists is None else lists[path.stem],
                    boxes=[box for box, _ in kept],
                    labels=[names.index(one.name) for _, one in kept],
                    label_names=[one.name for _, one in kept],
                    crowd=[one.difficult and ignores_difficult for _, one in kept],
                    difficult=[one.difficult for _, one in kept],
                    _numbers=[one.number for _, one in kept],
                    _mask_png=masks.get(entry.name),
                    _width=width,
                    _height=height,
                )
            )
        if missing_images and self.options.missing == "refuse":
            raise ValueError(
                f"{source}: annotations without an image of their name (or with several): "
                f"{first_few(missing_images)}; add the images, or leave them out with --set "
                "missing=skip"
            )
        if missing_images:
            counts["annotations without an image, left out"] = len(missing_images)
        if files and not rows and not missing_images:
            raise ValueError(
                f"{source}: the lists in ImageSets/{lists_of} name none of its annotations"
            )
        return Index(
            index_table(rows, COLUMNS | MASK_COLUMNS if has_masks else COLUMNS, source),
            listing.fingerprint,
            (boxes.MASKS,) if has_masks else (),
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info=boxes.info_of(dict(enumerate(names))),
        )

    def postprocess(self, row: Row, picture: Picture) -> Row:
        out = boxes.resize(row, picture)
        if self.options.masks == "instance":
            out["masks"] = _masks(row, out["boxes"], picture)
        return out


def _masks_of(
    source: str,
    listing: archives.Listing,
    files: list[archives.Entry],
    reader: archives.Reader,
) -> dict[str, bytes]:
    """Return the PNG of objects of each annotation that has one, by the annotation's name.

    It lies in the folder SegmentationObject beside that of the annotation.
    """
    by_name = {entry.name: entry for entry in listing.images}
    pictures: dict[str, archives.Entry] = {}
    for entry in files:
        path = PurePosixPath(entry.name)
        picture = by_name.get(str(path.parent.parent / OBJECTS / f"{path.stem}.png"))
        if picture is not None:
            pictures[entry.name] = picture
    if not pictures:
        raise ValueError(
            f"{source}: no annotation has a PNG in {OBJECTS}, which masks=instance needs; leave "
            "--set masks out"
        )
    return dict(zip(pictures, threaded_map(reader.entry, pictures.values()), strict=True))


def _masks(row: Row, written_boxes: list[list[float]], picture: Picture) -> list[RunLengths]:
    """Return the mask of each box in the size of the written image.

    Raises:
        BrokenImageError: the PNG is broken, of another size, or its numbers are not those of the
            annotation's objects: most pixels of one lie outside of its box.
    """
    from pipeline.media.image_io import class_numbers  # here: it imports torchvision

    width, height = row["_width"], row["_height"]
    out = []
    try:
        numbers = class_numbers(row["_mask_png"])
        if numbers.shape != (height, width):
            raise ValueError(f"it has {numbers.shape[1]} x {numbers.shape[0]} pixels")
        given = zip(row["_numbers"], row["boxes"], written_boxes, strict=True)
        for number, (x, y, w, h), written in given:
            mask = numbers == number
            inside = mask[int(y) : math.ceil(y + h), int(x) : math.ceil(x + w)]
            if inside.sum() < mask.sum() / 2:
                raise ValueError(f"most pixels of object {number} lie outside of its box")
            out.append(boxes.encode_mask(mask, written, picture.size))
    except ValueError as error:
        raise BrokenImageError(f"its PNG in {OBJECTS}: {error}") from None
    return out


def _objects(
    data: bytes,
    where: str,
    origin: int,
) -> tuple[tuple[int, int], list[VocObject]]:
    """Return ((width, height) of the image, its objects)."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # entities may expand without end
        raise ValueError(f"{where}: an annotation with a document type; remove that line")
    try:
        root = ElementTree.fromstring(data)
        size = (_whole(root, "size/width"), _whole(root, "size/height"))
        objects = []
        for number, one in enumerate(root.iterfind("object"), 1):
            left, top, right, bottom = (
                float(one.findtext(f"bndbox/{edge}") or "")
                for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [left - origin, top - origin, right - left + origin, bottom - top + origin]
            name = (one.findtext("name") or "").strip()
            if not name:
                raise ValueError("an object without a name")
            is_difficult = one.findtext("difficult") == "1"
            objects.append(VocObject(name, box, is_difficult, number))
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


def _splits(
    listing: archives.Listing,
    reader: archives.Reader,
    task: str,
) -> dict[str, dict[str, str]]:
    """Return the split of each name in the ImageSets/`task` of each year's folder.

    Of trainval.txt only what no other list has is taken, as train.
    """
    lists = {}
    for entry in listing.entries:
        listed = re.fullmatch(rf"(?:(.*)/)?ImageSets/{task}/(\w+)\.txt", entry.name)
        if listed is not None and (listed[2] == "trainval" or listed[2].lower() in SPLITS):
            text = reader.entry(entry).decode("utf-8-sig")
            lists[listed[1] or ".", listed[2]] = archives.plain_name(text)
    stems = {PurePosixPath(entry.name).stem for entry in listing.entries if _is_annotation(entry)}
    out: dict[str, dict[str, str]] = defaultdict(dict)
    for (folder, name), text in sorted(lists.items(), key=lambda one: one[0][1] == "trainval"):
        for line in filter(None, map(str.strip, text.splitlines())):
            stem = line if line in stems else line.split()[0]  # a number may stand behind it
            out[folder].setdefault(stem, SPLITS.get(name.lower(), "train"))
    return out


def _split_of(image: archives.Entry, annotation: archives.Entry) -> str:
    """Return the split that a folder of the image tells, else one of its annotation, else train."""
    return split_of_folders(image.name) or split_of_folders(annotation.name) or "train"


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
