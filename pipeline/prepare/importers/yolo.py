"""YOLO (Redmon et al. 2016; of Darknet and Ultralytics): boxes in a text for each image."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pydantic import Field

from pipeline.config.registry import MaskOptions, register
from pipeline.io.threads import threaded_map
from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.annotated_images import ImagesByName, bounds
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    SPLITS,
    Index,
    Row,
    file_row,
    first_few,
    index_table,
    split_of_folder,
    split_of_folders,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import Picture

ROUNDING = 1e-4
"""Share of an image by which publishers' rounding puts boxes outside."""
MAX_COORDINATE = 2.0
"""A larger number is no share of an image: it is in pixels."""
DATA_LINE = re.compile(r"^\s*(train|valid|test)\s*=\s*(\S.*?)\s*$", re.MULTILINE)
"""A list of images that Darknet's obj.data names."""
DARKNET_FOLDER = re.compile(r"\bobj_([a-z]+)_data/", re.IGNORECASE)
STATED = ("train", "val", "valid", "test")
"""Keys of places of images, in a .yaml (val) or in obj.data (valid)."""

COLUMNS = {**boxes.COLUMNS, "_polygons": pa.list_(pa.list_(pa.float64()))}


class YoloOptions(MaskOptions):
    names: str = Field(
        "",
        description="the file below SOURCE that names the classes: a .yaml with `names`, or one "
        "name a line; empty: the .yaml, classes.txt or obj.names that is there",
    )


@register("importer", "yolo", options=YoloOptions)
class Yolo(ImageImporter):
    """Images with boxes or masks in the format of YOLO.

    It reads images/SPLIT/NAME.jpg with labels/SPLIT/NAME.txt, SPLIT/images with SPLIT/labels, or
    images with label files (.txt) beside them, in a folder or archive.

    Folders called train, valid, test, obj_train_data or the like tell the splits. So do lists of
    images: train.txt, valid.txt, or those that obj.data or the .yaml names. Without any all rows
    are in train. An image is refused if nothing says its split while that of others is known, or if
    several splits are stated.

    A line of a label file is one of these:

    - CLASS X Y WIDTH HEIGHT: centre and size, as shares of the image
    - CLASS X1 Y1 X2 Y2 X3 Y3 ...: a polygon, of which the bounds are taken
    - If the .yaml has kpt_shape, keypoints follow the box. They are left out.

    Columns, one for each box: `boxes` (a list of [x, y, width, height] in pixels of the written
    image), `labels` (numbers of the classes), `label_names`, `crowd` (false), and `masks` if asked
    for. Boxes are dropped and clipped as by coco. Images without a label file have no boxes, but
    some image of each split must have one.
    """

    label = "label_names"

    def index(self, source: str) -> Index:
        listing = archives.listing(source).without_common_folder(keep=("images", *SPLITS))
        texts = {
            entry.name: entry for entry in listing.entries if entry.name.lower().endswith(".txt")
        }
        files = [texts.get(_text_of(image.name)) for image in listing.images]
        labels = {entry.name for entry in files if entry is not None}
        with archives.Reader() as reader:

            def read(entry: archives.Entry | None) -> str:
                return _decoded(reader.entry(entry)) if entry is not None else ""

            name, stated = self._stated(source, listing, reader)
            lists = {
                entry.name: (split, read(entry))
                for entry in listing.entries
                if entry.name not in labels and (split := _split_of_list(entry, stated))
            }
            contents = list(threaded_map(read, files))
        if listing.images and not any(files):
            raise ValueError(
                f"{source}: no image has a label file, such as "
                f"{_text_of(listing.images[0].name)} for {listing.images[0].name}"
            )
        names, keypoints = _names(stated, f"{source}: {name}"), _keypoints(stated, source, name)
        splits = _splits(source, listing.images, _listed(source, listing.images, lists), stated)
        _check_texts(source, splits, files)
        rows, counts = [], Counter[str]()
        counts["images without a label file"] = files.count(None)
        for image, split, text in zip(listing.images, splits, contents, strict=True):
            kept = []
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                where = f"{source}: {_text_of(image.name)}:{number}"
                label, box = _parsed(line, where, names, keypoints)
                inside = boxes.clip(box, 1.0, 1.0, counts, ROUNDING)
                if inside is not None:
                    kept.append((label, inside, self._polygon(line, where)))
            counts["images without a box"] += not kept
            rows.append(
                file_row(
                    image,
                    split,
                    boxes=[box for _, box, _ in kept],
                    labels=[label for label, _, _ in kept],
                    label_names=[names[label] for label, _, _ in kept],
                    crowd=[False for _ in kept],
                    _polygons=[polygon for _, _, polygon in kept],
                )
            )
        return Index(
            index_table(rows, COLUMNS, source),
            listing.fingerprint,
            (boxes.MASKS,) if self.options.masks == "instance" else (),
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info=boxes.info_of(names),
        )

    def _stated(
        self,
        source: str,
        listing: archives.Listing,
        reader: archives.Reader,
    ) -> tuple[str, dict[str, Any]]:
        """Return the name of the file with the names of the classes, and what it states."""
        wanted = self.options.names
        by_name = {entry.name: entry for entry in listing.entries}
        usual = [
            name
            for name in by_name
            if PurePosixPath(name).suffix in (".yaml", ".yml")
            or PurePosixPath(name).name in ("classes.txt", "obj.names")
        ]
        if wanted and wanted not in by_name:
            raise ValueError(f"{source}: no file {wanted} there (--set names=)")
        if not wanted and len(usual) != 1:
            there_is = f"there are {first_few(usual)}" if usual else "no .yaml and no classes.txt"
            raise ValueError(
                f"{source}: which file names the classes? {there_is}; pass --set names=FILE"
            )
        name = wanted or usual[0]
        text = _decoded(reader.entry(by_name[name]))
        if PurePosixPath(name).suffix not in (".yaml", ".yml"):
            listed = [line.strip() for line in text.rstrip().splitlines()]
            if "" in listed:
                raise ValueError(
                    f"{source}: {name}: line {listed.index('') + 1} of the names is blank, and the "
                    "number of a class is that of its line; name it, or remove the line"
                )
            data = [entry for entry in listing.entries if entry.suffix == ".data"]
            texts = [_decoded(reader.entry(entry)) for entry in data]
            return name, {"names": listed, **dict(DATA_LINE.findall("\n".join(texts)))}
        try:
            stated = yaml.safe_load(text)
            if isinstance(stated, dict) and "names" in stated:
                # as texts: to YAML, a class called no or on is a boolean
                stated["names"] = yaml.load(text, yaml.BaseLoader)["names"]
        except yaml.YAMLError as error:
            raise ValueError(f"{source}: {name}: {error}") from None
        return name, stated if isinstance(stated, dict) else {}

    def _polygon(self, line: str, where: str) -> list[float] | None:
        """Return the points of a line's polygon as it has them; none where masks are not wanted."""
        if self.options.masks == "none":
            return None
        numbers = [float(word) for word in line.split()[1:]]
        if len(numbers) < 6:
            raise ValueError(
                f"{where}: {line.strip()[:80]!r} is a box, and masks=instance needs polygons; "
                "leave --set masks out, or take the label files of the segmentation "
                "export"
            )
        return numbers

    def postprocess(self, row: Row, picture: Picture) -> Row:
        out = {**row, "boxes": boxes.scale(row["boxes"], *picture.size)}
        if self.options.masks == "none":
            return out
        polygons = [
            [(np.array(shares).reshape(-1, 2) * picture.upright_size).reshape(-1).tolist()]
            for shares in row["_polygons"]
        ]
        masks = boxes.encode_masks(polygons, picture.upright_size, out["boxes"], picture.size)
        return {**out, "masks": masks}


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")


def _names(stated: dict[str, Any], where: str) -> dict[int, str]:
    """Return the names of the classes by their numbers."""
    try:
        listed = stated["names"]
        pairs = enumerate(listed) if isinstance(listed, list) else listed.items()
        return {int(number): str(one) for number, one in pairs}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where} has no list or mapping `names` of the classes ({error})"
        ) from None


def _keypoints(stated: dict[str, Any], source: str, name: str) -> int:
    """Return how many numbers of keypoints follow each box."""
    if "kpt_shape" not in stated:
        return 0
    try:
        points, each = map(int, stated["kpt_shape"])
    except (TypeError, ValueError):
        raise ValueError(
            f"{source}: {name}: kpt_shape is {stated['kpt_shape']!r}; write [POINTS, 2 or 3], or "
            "remove it where the texts have no keypoints"
        ) from None
    return points * each


def _split_of_list(entry: archives.Entry, stated: dict[str, Any]) -> str:
    """Return the split whose images a file lists, by its name or as it is stated; "" for none."""
    path = PurePosixPath(entry.name)
    if path.suffix.lower() != ".txt":
        return ""
    keys = [
        key
        for key in STATED
        if isinstance(stated.get(key), str) and PurePosixPath(stated[key]).name == path.name
    ]
    return SPLITS[keys[0]] if keys else split_of_folder(path.stem)


def _listed(
    source: str,
    images: list[archives.Entry],
    lists: dict[str, tuple[str, str]],
) -> dict[str, str]:
    """Return the split of each image that a list names.

    Args:
        lists: the split and the text of each list, by its name.

    Raises:
        ValueError: two lists name an image for different splits.
    """
    by_name, splits = ImagesByName(images), dict[str, str]()
    for name, (split, text) in lists.items():
        for line in filter(None, map(str.strip, text.splitlines())):
            parts = PurePosixPath(line.replace("\\", "/")).parts
            image = by_name.find("/".join(parts[at:]) for at in range(len(parts)))
            if image is not None and splits.setdefault(image.name, split) != split:
                raise ValueError(
                    f"{source}: {name} names {line} for {split}, and another list for "
                    f"{splits[image.name]}; remove it from one of them"
                )
    return splits


def _splits(
    source: str,
    images: list[archives.Entry],
    listed: dict[str, str],
    stated: dict[str, Any],
) -> list[str]:
    """Return the split of each image, by a list, else by its folder.

    Raises ValueError where there are several splits and nothing tells an image's, or where its list
    and its folder tell different ones.
    """
    splits: list[str] = []
    for image in images:
        of_list, of_folder = listed.get(image.name, ""), split_of_folders(image.name)
        if of_list and of_folder and of_list != of_folder:
            raise ValueError(
                f"{source}: {image.name} lies in a folder of {of_folder}, and a list names it for "
                f"{of_list}; move it, or correct the list"
            )
        splits.append(of_list or split_of_folders(DARKNET_FOLDER.sub(r"\1/", image.name)))
    places = {key: stated[key] for key in STATED if stated.get(key)}
    is_split = any(splits) or any(place != places.get("train") for place in places.values())
    unclear = [image.name for image, split in zip(images, splits, strict=True) if not split]
    if unclear and is_split:
        stated_too = f" The splits {places} are stated." if places else ""
        raise ValueError(
            f"{source}: of which split is {first_few(unclear)}? No folder is called train, val or "
            f"test, and no list (train.txt, val.txt, test.txt) names it.{stated_too} Move these "
            "images and their texts into such folders, or add lists"
        )
    return [split or "train" for split in splits]


def _check_texts(source: str, splits: list[str], texts: list[archives.Entry | None]) -> None:
    """Raise ValueError for a split of which no image has a text with its boxes."""
    with_texts = {split for split, text in zip(splits, texts, strict=True) if text is not None}
    if without := set(splits) - with_texts:
        raise ValueError(
            f"{source}: no image of {' and '.join(sorted(without))} has a text with its boxes; "
            f"add the texts, or move the images out of {source}"
        )


def _parsed(
    line: str,
    where: str,
    names: dict[int, str],
    keypoints: int = 0,
) -> tuple[int, list[float]]:
    """Return (class, box [x, y, width, height] in shares of the image) of a line.

    Args:
        keypoints: numbers of keypoints that follow the box.
    """
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = -1.0, []
    if keypoints and len(numbers) == 4 + keypoints:
        numbers = numbers[:4]
    is_box = len(numbers) == 4
    is_polygon = not keypoints and len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (is_box or is_polygon) or label not in names:
        wanted = (
            f"not CLASS X Y WIDTH HEIGHT and {keypoints} numbers of keypoints"
            if keypoints
            else "neither CLASS X Y WIDTH HEIGHT nor a polygon"
        )
        raise ValueError(
            f"{where}: {line.strip()[:80]!r} is {wanted}, of a class from 0 to "
            f"{max(names, default=-1)}; correct it"
        )
    if max(map(abs, numbers)) > MAX_COORDINATE:
        raise ValueError(
            f"{where}: {line.strip()[:80]!r} has numbers beyond the image, as if in pixels; write "
            "shares of its width and height, from 0 to 1"
        )
    if is_box:
        x, y, width, height = numbers
        return int(label), [x - width / 2, y - height / 2, width, height]
    return int(label), bounds(zip(numbers[::2], numbers[1::2], strict=True))


def _text_of(image: str) -> str:
    """Return the name of the text with the boxes of an image."""
    path = PurePosixPath(image).with_suffix(".txt")
    parts = list(path.parts)
    for at in range(len(parts) - 2, -1, -1):  # the folder next to the file counts
        if parts[at] == "images":
            parts[at] = "labels"
            break
    return str(PurePosixPath(*parts))
