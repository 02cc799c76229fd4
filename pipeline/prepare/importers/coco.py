"""COCO instances (Lin et al. 2014): boxes, crowds, and masks of polygons or run lengths."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field, StrictFloat, StrictInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

from pipeline.config.registry import Options, register
from pipeline.io import storage
from pipeline.media import drawing, instance_masks
from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    Index,
    Row,
    file_row,
    first_existing,
    first_few,
    index_table,
    split_of,
    split_of_folders,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import (
    BrokenImageError,
    Picture,
    resize_nearest,
)

IGNORED = 255
"""Class of pixels that no metric counts: crowds."""
NO_SPLIT_NAMES = ("default", "instances", "annotations")
"""First words of files that name no split: instances_default.json of CVAT, instances.json."""
BESIDE_IMAGES = "_annotations.coco.json"
"""The annotations of a split in an export of Roboflow, in one folder with the images."""
COLUMNS = {
    "image_id": pa.int64(),
    **boxes.COLUMNS,
    **boxes.SIZE_COLUMNS,
    boxes.SEGMENTATIONS: pa.string(),
    "_objects": pa.string(),
}
"""``_objects``: JSON of [objects, shift], as `semantic` takes them; null where no mask is drawn."""


class CocoImage(TypedDict):
    """What is read of an image in a file of annotations."""

    id: int
    file_name: Annotated[str, AfterValidator(archives.plain_name)]
    width: int
    height: int


class CocoAnnotation(TypedDict):
    """What is read of an object; box [x, y, width, height] in pixels."""

    id: NotRequired[Any]
    image_id: int
    category_id: int
    bbox: Annotated[list[StrictFloat], Field(min_length=4, max_length=4)]
    area: NotRequired[float | None]
    iscrowd: NotRequired[int | None]
    segmentation: NotRequired[Any]


class CocoCategory(TypedDict):
    """A class of objects."""

    id: StrictInt
    name: Any


class CocoFile(TypedDict):
    """A file of annotations."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


COCO_FILE = TypeAdapter(CocoFile)


class CocoOptions(Options):
    annotations: str = Field(
        "annotations/instances_*.json",
        description="JSON files below SOURCE, a glob; each is a split, by its name "
        "(instances_train2017.json: train) or its folder (valid/_annotations.coco.json, which is "
        "found by itself)",
    )
    images: str = Field(
        "",
        description="folder, zip or tar of the images below SOURCE; empty, for "
        "instances_NAME.json: NAME, images/NAME, NAME.zip, images or SOURCE itself; for "
        "_annotations.coco.json: its folder",
    )
    masks: Literal["none", "semantic", "instance"] = Field(
        "none",
        description="semantic: a column mask, PNG of one class number a pixel, 0 for nothing, 255 "
        "for crowds; instance: also a column masks, the mask of each box as COCO's run lengths",
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse",
        description="skip: leave out and count images without a file, and annotations that name "
        "no image or no category",
    )


@register("importer", "coco", options=CocoOptions)
class Coco(ImageImporter):
    """COCO: images with boxes, classes and masks.

    It reads annotations/instances_NAME.json with the images in NAME/, images/NAME/, NAME.zip or
    images/.

    It also reads exports of Roboflow: train/, valid/ and test/, each with images and
    _annotations.coco.json.

    Columns: `boxes` (list of [x, y, width, height] in pixels of the written image), `labels`
    (category ids, unchanged), `label_names`, `crowd` (one for each box), `image_id` and, where
    asked for, `mask` or `masks` (one for each box). Images without boxes are kept. A box that is
    not finite, has no area or lies outside the image is dropped; one that is partly outside is
    clipped; both are counted. In `mask` smaller objects are drawn over larger ones, and all over
    crowds; a class is the category's id, or that plus 1 where an id is 0.
    """

    label = "label_names"

    def index(self, source: str) -> Index:
        files = self._annotation_files(source)
        rows, fingerprints, counts, categories = [], [], Counter(), {}
        for uri in files:
            # Not kept: a second copy of COCO's 450 MB takes 2.2 GB
            ours = {one["id"]: str(one["name"]) for one in _read(uri)["categories"]}
            clash = [i for i in ours.keys() & categories.keys() if ours[i] != categories[i]]
            if clash:
                raise ValueError(
                    f"{uri}: category {clash[0]} is {ours[clash[0]]!r} here and "
                    f"{categories[clash[0]]!r} in {files[0]}"
                )
            categories |= ours
        shift = int(0 in categories)
        if self.options.masks == "semantic" and (
            wrong := [i for i in categories if not 0 <= i + shift < IGNORED]
        ):
            raise ValueError(
                f"{files[0]}: category ids that a mask of 8 bits cannot hold: {first_few(wrong)}"
            )
        for uri in files:
            name = re.sub(r"^instances?_", "", PurePosixPath(uri).stem)
            listed = archives.listing(self._images(source, uri, name))
            fingerprints.append(listed.fingerprint)
            folder = posixpath.relpath(posixpath.dirname(uri), source)
            split = _split(name, folder)
            rows += self._rows(_read(uri), uri, _by_name(listed), split, categories, counts)
        splits_of: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for row in rows:
            splits_of[row["path"], row["_uri"], row["_offset"]].append(row["split"])
        twice = [
            f"{path} ({', '.join(dict.fromkeys(splits))})"
            for (path, *_), splits in splits_of.items()
            if len(splits) > 1
        ]
        if twice:
            raise ValueError(
                f"{source}: images that two of the annotation files name: {first_few(twice)}; an "
                "image belongs to one split: pass --set annotations=NAME.json"
            )
        extra = {
            "none": (),
            "semantic": (pa.field("mask", pa.binary()),),
            "instance": (boxes.MASKS,),
        }[self.options.masks]
        info = boxes.info_of(categories)
        for category in info["categories"] if self.options.masks == "semantic" else ():
            category["mask_value"] = category["id"] + shift
        return Index(
            index_table(rows, COLUMNS, source),
            " ".join(fingerprints),
            extra,
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info=info,
        )

    def _annotation_files(self, source: str) -> list[str]:
        given = self.options.annotations
        is_default = given == CocoOptions.model_fields["annotations"].default
        patterns = [given, f"*/{BESIDE_IMAGES}"] if is_default else [given]
        for pattern in patterns:
            if files := storage.glob(storage.join(source, pattern)):
                return files
        raise ValueError(
            f"{source}: no {' and no '.join(patterns)} there; pass --set annotations=NAME.json"
        )

    def _images(self, source: str, uri: str, name: str) -> str:
        """Return where the images of a file of annotations are."""
        if not self.options.images and PurePosixPath(uri).name == BESIDE_IMAGES:
            return posixpath.dirname(uri)
        candidates = (
            [self.options.images]
            if self.options.images
            else [name, f"images/{name}", f"{name}.zip", f"{name}.tar", "images"]
        )
        found = first_existing(source, *candidates)
        if found is None and self.options.images:
            raise ValueError(f"{source}: no {self.options.images} there (--set images=)")
        return found or source

    def _rows(
        self,
        data: CocoFile,
        uri: str,
        images: dict[str, archives.Entry],
        split: str,
        categories: dict[int, str],
        counts: Counter[str],
    ) -> list[Row]:
        self._count_faults(data, uri, images, categories, counts)
        by_image: dict[int, list[CocoAnnotation]] = defaultdict(list)
        for annotation in data["annotations"]:
            if annotation["category_id"] in categories:
                by_image[annotation["image_id"]].append(annotation)
        rows = []
        for image in data["images"]:
            if image["file_name"] not in images:
                continue
            kept = _kept(by_image[image["id"]], image, counts)
            counts["images without a box"] += not kept
            rows.append(
                file_row(
                    images[image["file_name"]],
                    split,
                    image_id=image["id"],
                    boxes=[box for _, box in kept],
                    labels=[annotation["category_id"] for annotation, _ in kept],
                    label_names=[categories[annotation["category_id"]] for annotation, _ in kept],
                    crowd=[bool(annotation.get("iscrowd")) for annotation, _ in kept],
                    _width=image["width"],
                    _height=image["height"],
                    **self._segmentations(kept, categories),
                )
            )
        return rows

    def _count_faults(
        self,
        data: CocoFile,
        uri: str,
        images: dict[str, archives.Entry],
        categories: dict[int, str],
        counts: Counter[str],
    ) -> None:
        """Refuse or count annotations and images that refer to nothing."""
        listed = {image["id"] for image in data["images"]}
        annotations = data["annotations"]
        without_image = [a.get("id") for a in annotations if a["image_id"] not in listed]
        what = "annotations that name an image which is not listed"
        self._refuse_or_count(without_image, what, "annotation ids", uri, counts)
        unnamed = [a.get("id") for a in annotations if a["category_id"] not in categories]
        what = "annotations of a category that is not listed"
        self._refuse_or_count(unnamed, what, "annotation ids", uri, counts)
        names = [image["file_name"] for image in data["images"]]
        missing = [name for name in names if name not in images]
        what = "images without a file"
        remedy = "say where they are with --set images=, correct the file"
        self._refuse_or_count(missing, what, "files", uri, counts, remedy)

    def _segmentations(
        self,
        kept: list[tuple[CocoAnnotation, list[float]]],
        categories: dict[int, str],
    ) -> dict[str, str]:
        """Return the columns from which an image's masks are drawn, as JSON."""
        if self.options.masks == "instance":
            outlines = [annotation.get("segmentation") for annotation, _ in kept]
            return {boxes.SEGMENTATIONS: json.dumps(outlines)}
        if self.options.masks == "semantic":
            objects = [
                [
                    annotation["category_id"],
                    bool(annotation.get("iscrowd")),
                    annotation.get("area") or box[2] * box[3],
                    annotation.get("segmentation"),
                ]
                for annotation, box in kept
            ]
            return {"_objects": json.dumps([objects, int(0 in categories)])}
        return {}

    def _refuse_or_count(
        self,
        wrong: list[Any],
        what: str,
        names: str,
        uri: str,
        counts: Counter[str],
        remedy: str = "correct the file",
    ) -> None:
        if wrong and self.options.missing == "refuse":
            raise ValueError(
                f"{uri}: {what} ({names} {first_few(wrong)}); {remedy}, or leave them out with "
                "--set missing=skip"
            )
        if wrong:
            counts[f"{what}, left out"] += len(wrong)

    def postprocess(self, row: Row, picture: Picture) -> Row:
        out = boxes.resize(row, picture)
        if row["_objects"] is None:
            return out
        objects, shift = json.loads(row["_objects"])
        try:
            mask = semantic(objects, shift, row["_height"], row["_width"])
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BrokenImageError(f"its mask cannot be drawn: {error}") from None
        return {**out, "mask": drawing.png(resize_nearest(mask, picture.size))}


def semantic(objects: list[Any], shift: int, height: int, width: int) -> np.ndarray:
    """Draw objects (category id, is crowd, area, segmentation) as classes, (height, width) uint8.

    Crowds come first, then large to small objects.
    """
    out = np.zeros((height, width), dtype=np.uint8)
    for category, crowd, _, segmentation in sorted(objects, key=lambda o: (not o[1], -o[2])):
        if not segmentation:
            raise ValueError("an annotation has a box, but no polygon or mask")
        drawn = instance_masks.mask_of(segmentation, height, width)
        out[drawn] = IGNORED if crowd else category + shift
    return out


def _read(uri: str) -> CocoFile:
    try:
        data = COCO_FILE.validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, first["loc"])))
        # the input is then all that lacks the key, or the whole file
        has_no_value = first["type"] in ("missing", "json_invalid")
        got = "" if has_no_value else f" (got {repr(first['input'])[:100]})"
        raise ValueError(
            f"{uri}: {f'{place}: ' if place else ''}{first['msg']}{got}; correct the file"
        ) from None
    for name, key in (("images", "id"), ("images", "file_name"), ("categories", "id")):
        counts = Counter(item[key] for item in data[name])
        doubled = [value for value, count in counts.items() if count > 1]
        if doubled:
            raise ValueError(f"{uri}: {name} with the same {key}: {first_few(doubled)}")
    return data


def _split(name: str, folder: str) -> str:
    """Return the split that a word of a file's name tells, else its folder below the source, else
    the name's first word (minival2014), unless that says nothing.
    """
    first = re.split(r"[^a-zA-Z]", name)[0].lower()
    own = "" if first in NO_SPLIT_NAMES else first
    return split_of(name) or split_of_folders(f"{folder}/{name}") or own or "train"


def _by_name(listed: archives.Listing) -> dict[str, archives.Entry]:
    """Return entries by their name, and by the name below the one folder that holds them all."""
    short = listed.without_common_folder()
    return {entry.name: entry for entry in short.images} | {
        entry.name: entry for entry in listed.images
    }


def _kept(
    annotations: list[CocoAnnotation],
    image: CocoImage,
    counts: Counter[str],
) -> list[tuple[CocoAnnotation, list[float]]]:
    """Return usable annotations with their box [x, y, width, height], clipped to the image."""
    out = []
    for annotation in annotations:
        kept = boxes.clip(annotation["bbox"], image["width"], image["height"], counts)
        if kept is not None:
            out.append((annotation, kept))
    return out
