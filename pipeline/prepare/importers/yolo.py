"""YOLO (Redmon et al. 2016; the layout of Darknet and Ultralytics): boxes in a text file for each
image, in shares of the image.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import yaml
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.data.loader import threaded_map
from pipeline.prepare.engine import boxes
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import SPLITS, Index, place, preview, table
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import Picture

ROUNDING = 1e-4
"""Share of an image by which publishers' rounding puts boxes outside."""


class YoloOptions(Options):
    names: str = Field(
        "",
        description="the file below SOURCE that names the classes: a .yaml with `names`, or one "
        "name a line; empty: the .yaml, classes.txt or obj.names that is there",
    )


@register("importer", "yolo", options=YoloOptions)
class Yolo(ImageImporter):
    """images/SPLIT/NAME.jpg with labels/SPLIT/NAME.txt, SPLIT/images with SPLIT/labels, or images
    with texts beside them, in a folder or archive. Folders called train, valid, test or the like
    tell the splits, else all rows are in train; the places that a .yaml states are not read.

    A line is `CLASS X Y WIDTH HEIGHT` (centre and size in shares of the image), or `CLASS X1 Y1 X2
    Y2 X3 Y3 ...` for a polygon, whose bounds are taken. Columns: `boxes` (list of [x, y, width,
    height] in pixels of the written image), `labels` (the numbers of the classes), `label_names`
    and `crowd` (false), one each a box. Images without a text have no boxes. Boxes are dropped and
    clipped as by `coco`.
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
            return reader.entry(entry).decode("utf-8", "replace") if entry is not None else ""

        try:
            names = self._names(source, found, reader)
            contents = list(threaded_map(read, files))
        finally:
            reader.close()
        if found.images and not any(files):
            raise ValueError(
                f"{source}: no image has a text with its boxes, such as "
                f"{_text_of(found.images[0].name)} for {found.images[0].name}"
            )
        rows, counts = [], Counter[str]()
        for image, text in zip(found.images, contents, strict=True):
            kept = []
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                where = f"{source}: {_text_of(image.name)}:{number}"
                label, box = _parsed(line, where, names)
                inside = boxes.clipped(box, 1.0, 1.0, counts, ROUNDING)
                if inside is not None:
                    kept.append((label, inside))
            counts["images without a box"] += not kept
            rows.append(
                place(
                    image,
                    _split_of(image.name),
                    boxes=[box for _, box in kept],
                    labels=[label for label, _ in kept],
                    label_names=[names[label] for label, _ in kept],
                    crowd=[False for _ in kept],
                )
            )
        return Index(
            table(rows, boxes.COLUMNS, source),
            found.mark,
            notes={"boxes": sum(len(row["boxes"]) for row in rows), **counts},
            info={
                "categories": [{"id": i, "name": names[i]} for i in sorted(names)],
                "box_format": "xywh in pixels",
            },
        )

    def _names(
        self, source: str, found: archives.Listing, reader: archives.Reader
    ) -> dict[int, str]:
        """Return the names of the classes by their numbers."""
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
        text = reader.entry(there[name]).decode("utf-8", "replace")
        if PurePosixPath(name).suffix not in (".yaml", ".yml"):
            return dict(enumerate(filter(None, map(str.strip, text.splitlines()))))
        try:
            stated = yaml.safe_load(text)
            listed = stated["names"]
            pairs = enumerate(listed) if isinstance(listed, list) else listed.items()
            return {int(number): str(one) for number, one in pairs}
        except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{source}: {name} has no list or mapping `names` of the classes ({error})"
            ) from None

    def postprocess(self, row: dict[str, Any], picture: Picture) -> dict[str, Any]:
        return {**row, "boxes": boxes.scaled(row["boxes"], *picture.size)}


def _parsed(line: str, where: str, names: dict[int, str]) -> tuple[int, list[float]]:
    """Return (class, box [x, y, width, height] in shares of the image) of a line."""
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = -1.0, []
    is_box, is_polygon = len(numbers) == 4, len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (is_box or is_polygon) or label not in names:
        raise ValueError(
            f"{where}: {line.strip()[:80]!r} is neither CLASS X Y WIDTH HEIGHT nor a polygon, of a "
            f"class from 0 to {max(names, default=-1)}; correct it"
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


def _split_of(name: str) -> str:
    """Return the split that a folder of a file's path names, else train."""
    folders = PurePosixPath(name).parent.parts
    return next((SPLITS[one.lower()] for one in folders if one.lower() in SPLITS), "train")
