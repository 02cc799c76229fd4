"""YOLO (Redmon et al. 2016; the layout of Darknet and Ultralytics): boxes in a text file for each
image, in shares of the image.
"""

from __future__ import annotations

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

ROUNDING = 1e-4
"""Share of an image by which publishers' rounding puts boxes outside."""
FARTHEST = 2.0
"""A larger number is no share of an image: it is in pixels."""


COLUMNS = {**boxes.COLUMNS, "_polygons": pa.list_(pa.list_(pa.float64()))}


class YoloOptions(MaskOptions):
    names: str = Field(
        "",
        description="the file below SOURCE that names the classes: a .yaml with `names`, or one "
        "name a line; empty: the .yaml, classes.txt or obj.names that is there",
    )


@register("importer", "yolo", options=YoloOptions)
class Yolo(ImageImporter):
    """images/SPLIT/NAME.jpg with labels/SPLIT/NAME.txt, SPLIT/images with SPLIT/labels, or images
    with label files (.txt) beside them, in a folder or archive. Folders called train, valid, test
    or the like tell the splits, else all rows are in train; the places that a .yaml states are not
    read, but one that states several needs such folders.

    A line is `CLASS X Y WIDTH HEIGHT` (centre and size in shares of the image), or `CLASS X1 Y1 X2
    Y2 X3 Y3 ...` for a polygon, whose bounds are taken; where the .yaml has `kpt_shape`, keypoints
    follow the box and are left out. Columns: `boxes` (list of [x, y, width, height] in pixels of
    the written image), `labels` (the numbers of the classes), `label_names`, `crowd` (false) and,
    where asked for, `masks`, one for each box. Images without a label file have no boxes, but some
    image of each split must have one. Boxes are dropped and clipped as by `coco`.
    """

    label = "label_names"

    def index(self, source: str) -> Index:
        found = archives.listing(source).without_common_folder(keep=("images", *SPLITS))
        texts = {
            entry.name: entry for entry in found.entries if entry.name.lower().endswith(".txt")
        }
        files = [texts.get(_text_of(image.name)) for image in found.images]
        reader = archives.Reader()

        def read(entry: archives.Entry | None) -> str:
            return _decoded(reader.entry(entry)) if entry is not None else ""

        try:
            name, stated = self._stated(source, found, reader)
            contents = list(threaded_map(read, files))
        finally:
            reader.close()
        if found.images and not any(files):
            raise ValueError(
                f"{source}: no image has a label file, such as "
                f"{_text_of(found.images[0].name)} for {found.images[0].name}"
            )
        names, keypoints = _names(stated, f"{source}: {name}"), _keypoints(stated, source, name)
        splits = _splits(found.images, files, stated, source, name)
        rows, counts = [], Counter[str]()
        counts["images without a label file"] = files.count(None)
        for image, split, text in zip(found.images, splits, contents, strict=True):
            kept = []
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                where = f"{source}: {_text_of(image.name)}:{number}"
                label, box = _parsed(line, where, names, keypoints)
                inside = boxes.clipped(box, 1.0, 1.0, counts, ROUNDING)
                if inside is not None:
                    kept.append((label, inside, self._polygon(line, where)))
            counts["images without a box"] += not kept
            rows.append(
                place(
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
            table(rows, COLUMNS, source),
            found.mark,
            (boxes.MASKS,) if self.options.masks == "instance" else (),
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info={
                "categories": [{"id": i, "name": names[i]} for i in sorted(names)],
                "box_format": "xywh in pixels",
            },
        )

    def _stated(
        self, source: str, found: archives.Listing, reader: archives.Reader
    ) -> tuple[str, dict[str, Any]]:
        """Return the name of the file with the names of the classes, and what it states."""
        wanted = self.options.names
        there = {entry.name: entry for entry in found.entries}
        usual = [
            name
            for name in there
            if PurePosixPath(name).suffix in (".yaml", ".yml")
            or PurePosixPath(name).name in ("classes.txt", "obj.names")
        ]
        if wanted and wanted not in there:
            raise ValueError(f"{source}: no file {wanted} there (--set names=)")
        if not wanted and len(usual) != 1:
            there_is = f"there are {preview(usual)}" if usual else "no .yaml and no classes.txt"
            raise ValueError(
                f"{source}: which file names the classes? {there_is}; say --set names=FILE"
            )
        name = wanted or usual[0]
        text = _decoded(reader.entry(there[name]))
        if PurePosixPath(name).suffix not in (".yaml", ".yml"):
            listed = [line.strip() for line in text.rstrip().splitlines()]
            if "" in listed:
                raise ValueError(
                    f"{source}: {name}: line {listed.index('') + 1} of the names is blank, and the "
                    "number of a class is that of its line; name it, or remove the line"
                )
            return name, {"names": listed}
        try:
            stated = yaml.safe_load(text)
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
        out = {**row, "boxes": boxes.scaled(row["boxes"], *picture.size)}
        if self.options.masks == "none":
            return out
        polygons = [
            [(np.array(shares).reshape(-1, 2) * picture.seen).reshape(-1).tolist()]
            for shares in row["_polygons"]
        ]
        masks = boxes.written_masks(polygons, picture.seen, out["boxes"], picture.size)
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


def _splits(
    images: list[archives.Entry],
    texts: list[archives.Entry | None],
    stated: dict[str, Any],
    source: str,
    name: str,
) -> list[str]:
    """Return the split of each image."""
    splits = [split_of_folders(image.name) for image in images]
    places = {key: stated[key] for key in ("train", "val", "test") if stated.get(key)}
    unclear = [image.name for image, split in zip(images, splits, strict=True) if not split]
    if unclear and any(one != places.get("train") for one in places.values()):
        raise ValueError(
            f"{source}: {name} states the splits {places}, but no folder of {preview(unclear)} is "
            "called train, val or test; move these images and their texts into such folders"
        )
    splits = [split or "train" for split in splits]
    without = set(splits) - {
        split for split, text in zip(splits, texts, strict=True) if text is not None
    }
    if without:
        raise ValueError(
            f"{source}: no image of {' and '.join(sorted(without))} has a text with its boxes; "
            f"add the texts, or move the images out of {source}"
        )
    return splits


def _parsed(
    line: str, where: str, names: dict[int, str], keypoints: int = 0
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
    if max(map(abs, numbers)) > FARTHEST:
        raise ValueError(
            f"{where}: {line.strip()[:80]!r} has numbers beyond the image, as if in pixels; write "
            "shares of its width and height, from 0 to 1"
        )
    if is_box:
        x, y, width, height = numbers
        return int(label), [x - width / 2, y - height / 2, width, height]
    across, down = numbers[::2], numbers[1::2]
    left, top = min(across), min(down)
    return int(label), [left, top, max(across) - left, max(down) - top]


def _text_of(image: str) -> str:
    """Return the name of the text with the boxes of an image."""
    path = PurePosixPath(image).with_suffix(".txt")
    parts = list(path.parts)
    for at in range(len(parts) - 2, -1, -1):  # the folder next to the file counts
        if parts[at] == "images":
            parts[at] = "labels"
            break
    return str(PurePosixPath(*parts))
