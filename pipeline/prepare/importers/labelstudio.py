"""Label Studio (labelstud.io/guide/export): boxes, polygons, masks and choices in JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import Field

from pipeline.config.registry import MaskOptions, register
from pipeline.media import instance_masks
from pipeline.prepare.engine.annotated_images import (
    UNKNOWN,
    AnnotatedImage,
    AnnotatedImagesImporter,
    AnnotatedObject,
    around_ellipse,
    polygon,
    rotated,
)
from pipeline.prepare.engine.importing import first_few
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.archives import IMAGE_SUFFIXES

SHAPES = ("rectanglelabels", "polygonlabels", "ellipselabels", "brushlabels")
"""Kinds of results that have a box."""


class LabelStudioOptions(MaskOptions):
    annotations: str = Field(
        "", description="the JSON file below SOURCE; empty: the only .json that is there"
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: leave out and count images that are named but not there"
    )
    image: str = Field(
        "",
        description="the field of a task's data that names its image; empty: the only one that "
        "names an image",
    )
    to_name: str = Field(
        "",
        description="the object of the labelling interface (toName) whose results are read, where "
        "there are results on several; those on others are left out and counted",
    )


@register("importer", "labelstudio", options=LabelStudioOptions)
class LabelStudio(AnnotatedImagesImporter):
    """Images with boxes or masks, as Label Studio exports them.

    The JSON of Label Studio's export (not JSON-MIN), with the images below the same folder or in
    the same archive, found by the ends of their names. Folders called train, valid, test or the
    like tell the splits, else all rows are in train. Tasks of texts: export CSV or CONLL2003, and
    use `csv` or `conll`.

    Columns: `boxes`, `labels` (numbers in the order of the names), `label_names`, `crowd`; `tags`
    and `tag` (choices). Of polygons, brush masks, ellipses and rotated boxes the bounds are taken;
    other shapes are left out and counted. With masks=instance also `masks`, of polygons and of
    brush masks. An image with an object that has only a box or ellipse is then left out, and
    counted: its mask is not known. So is always an image with a mask that cannot be read, since an
    object without its label would count as background. Choices of a region are no tags: they are
    left out and counted. Of several annotations of a task the one that is marked as ground truth is
    taken, else the first; tasks without any are left out and counted.
    """

    def read(
        self,
        source: str,
        listing: archives.Listing,
        counts: Counter[str],
    ) -> tuple[list[AnnotatedImage], list[str]]:
        by_name = {entry.name: entry for entry in listing.entries if entry.suffix == ".json"}
        wanted = [self.options.annotations] if self.options.annotations else list(by_name)
        if len(wanted) != 1 or wanted[0] not in by_name:
            raise ValueError(
                f"{source}: which file is Label Studio's export? There are "
                f"{first_few(by_name) or 'no .json files'}; pass --set annotations=FILE"
            )
        data = archives.read_entry(by_name[wanted[0]])
        where = f"{source}: {wanted[0]}"
        try:
            tasks = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}; export it again") from None
        is_export = isinstance(tasks, list) and all(
            isinstance(task, dict)
            and isinstance(task.get("data"), dict)
            and isinstance(task.get("annotations"), list)
            for task in tasks
        )
        if not is_export:
            raise ValueError(
                f"{where} is no list of tasks with `data` and `annotations`; export the project as "
                "JSON"
            )
        images = []
        for number, task in enumerate(tasks):
            at = f"{where}: task {task.get('id', number)}"
            results = _results(task["annotations"], counts)
            if results is None:
                counts["tasks without an annotation, left out"] += 1
                continue
            names = self._names(task["data"], at)
            try:
                results = self._on_one_object(results, at, counts)
                images.append(_image(names, results, at, counts))
            except (AttributeError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{at}: a result of another form ({error!r})") from None
        if self.options.to_name and not any(image.objects or image.tags for image in images):
            raise ValueError(f"{where}: no result is on {self.options.to_name} (--set to_name=)")
        return images, []

    def _names(self, data: dict[str, Any], where: str) -> tuple[str, ...]:
        """Return the names that a task's image may have.

        Raises ValueError where no field of its data names an image, or several do.
        """
        fields = [self.options.image] if self.options.image else list(data)
        names = {field: named for field in fields if (named := _names_of(data.get(field)))}
        if len(names) > 1:
            raise ValueError(
                f"{where}: {len(names)} fields of its data name images ({first_few(names)}); say "
                "which one the results are on: --set image=FIELD"
            )
        if not names:
            raise ValueError(
                f"{where}: no image in {self.options.image or 'its data'} ({first_few(data)}); of "
                "texts, export CSV or CONLL2003, and use prepare csv or conll"
            )
        return next(iter(names.values()))

    def _on_one_object(self, results: list[Any], where: str, counts: Counter[str]) -> list[Any]:
        """Return the results on the one object of the labelling interface that is read.

        Raises ValueError where there are several and none is chosen.
        """
        wanted = self.options.to_name
        objects = {result["to_name"] for result in results if result.get("to_name")}
        if not wanted and len(objects) > 1:
            raise ValueError(
                f"{where}: results on several objects ({first_few(sorted(objects))}); say which "
                "one is the image: --set to_name=NAME"
            )
        if not wanted:
            return results
        kept = [result for result in results if result.get("to_name") == wanted]
        counts["results on another object, left out"] += len(results) - len(kept)
        return kept


def _results(annotations: list[Any], counts: Counter[str]) -> list[Any] | None:
    """Return the results of a task's annotation, None where it has none."""
    finished = [one for one in annotations if not one.get("was_cancelled")]
    if not finished:
        return None
    counts["further annotations of a task, left out"] += len(finished) - 1
    true = [one for one in finished if one.get("ground_truth")]
    return (true or finished)[0]["result"]


def _image(
    names: tuple[str, ...],
    results: list[Any],
    where: str,
    counts: Counter[str],
) -> AnnotatedImage:
    objects: list[AnnotatedObject] = []
    tags: list[str] = []
    problem = ""
    size = UNKNOWN, UNKNOWN
    regions = {result.get("id") for result in results if result["type"] != "choices"} - {None}
    for result in results:
        kind, value = result["type"], result.get("value", {})
        if kind == "choices":
            if result.get("id") in regions or "x" in value:
                counts["choices of a region, left out"] += 1
            else:
                tags += value["choices"]
            continue
        if kind not in SHAPES:
            counts[f"results of kind {kind}, left out"] += 1
            continue
        size = int(result["original_width"]), int(result["original_height"])
        try:
            shape = _object(kind, value, size, counts)
        except ValueError as error:
            problem = f"a result of kind {kind} cannot be read: {error}"
            continue
        if shape is not None:
            objects += [shape._replace(name=str(name)) for name in value[kind]]
    return AnnotatedImage(names, where, size, objects, tags, problem=problem)


def _object(
    kind: str,
    value: dict[str, Any],
    size: tuple[int, int],
    counts: Counter[str],
) -> AnnotatedObject | None:
    """Return an object without its name; none for a mask of which no pixel is left.

    Raises ValueError for a polygon without points, or a mask that cannot be read.
    """
    across, down = size[0] / 100, size[1] / 100  # Label Studio has percent of the image
    if kind == "brushlabels":
        painted = _painted(value, size)
        if not painted.any():  # all of it was erased again
            counts["brush masks without a pixel, left out"] += 1
            return None
        counts["brush masks, whose bounds are taken"] += 1
        mask: Any = instance_masks.packed(painted)
        return AnnotatedObject("", coco_mask.toBbox(mask).tolist(), mask)
    if kind == "polygonlabels":
        outline = polygon("", [(x * across, y * down) for x, y in value["points"]])
        counts["polygons, whose bounds are taken"] += 1
        return outline
    if kind == "ellipselabels":
        counts["ellipses, whose bounds are taken"] += 1
        center = value["x"] * across, value["y"] * down
        radii = value["radiusX"] * across, value["radiusY"] * down
        return AnnotatedObject("", around_ellipse(center, radii, value.get("rotation", 0)))
    corner = value["x"] * across, value["y"] * down
    box = [*corner, value["width"] * across, value["height"] * down]
    if value.get("rotation"):
        counts["rotated boxes, whose bounds are taken"] += 1
        box = rotated(box, value["rotation"], corner)  # Label Studio turns about the corner
    return AnnotatedObject("", box)


def _painted(value: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Return which pixels were painted, (height, width) bool."""
    if "rle" not in value:
        raise ValueError("it has no run lengths (rle)")
    width, height = size
    levels = unpack_rle_pack(bytes(value["rle"]), 4 * width * height)
    return levels[3::4].reshape(height, width) > 0  # opacity, after red, green and blue


def unpack_rle_pack(data: bytes, count: int) -> np.ndarray:
    """Unpack run lengths of the form that Label Studio's brush writes (@thi.ng/rle-pack).

    A head has the count of the words (32 bits), the bits of a word less 1 (5 bits) and four sizes
    of lengths, in bits less 1 (4 bits each). Parts follow: whether one word is repeated (1 bit),
    which size the length has (2 bits), the length less 1, and the word, or so many words.

    Args:
        count: of the words that are expected.

    Returns:
        (count,) uint8.

    Raises:
        ValueError: another count, words of other than 8 bits, or data that end too early.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def read(length: int) -> int:
        nonlocal at
        at += length
        if at > len(bits):
            raise ValueError("its run lengths end too early")
        return int(bits[at - length : at], 2)

    stated, word = read(32), read(5) + 1
    if (stated, word) != (count, 8):
        raise ValueError(
            f"run lengths of {stated} words of {word} bits, where {count} of 8 are expected: four "
            "for each pixel"
        )
    sizes = [read(4) + 1 for _ in range(4)]
    out = np.zeros(count, np.uint8)
    start = 0
    while start < count:
        is_repeated = read(1)
        stop = start + read(sizes[read(2)]) + 1
        if stop > count:
            raise ValueError("its run lengths reach beyond the image")
        out[start:stop] = read(8) if is_repeated else [read(8) for _ in range(start, stop)]
        start = stop
    return out


def _names_of(value: Any) -> tuple[str, ...]:
    """Return the names that an image may have: of a local file, an address or an upload.

    A name of an upload has eight digits before it, but only in Label Studio's folder. Other values
    have no names.
    """
    if not isinstance(value, str):
        return ()
    parts = urlsplit(value)
    local = parse_qs(parts.query).get("d", [])
    path = local[0] if local else unquote(parts.path)
    if PurePosixPath(path).suffix.lower() not in IMAGE_SUFFIXES:
        return ()
    whole = path.strip("/")
    if local:
        return (whole,)
    name = PurePosixPath(path).name
    is_upload = "/upload/" in path and re.match(r"[0-9a-f]{8}-", name)
    return (whole, name, name[9:]) if is_upload else (whole, name)
