"""Columns with the boxes of objects: their classes, and what of each row can be learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import torch
from torchvision.ops import box_convert

from pipeline.config.registry import BoxOptions, nearest
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list, is_number
from pipeline.media import drawing, image_io


class BoxState(TypedDict):
    """State of objectives that learn boxes."""

    values: list[Any]
    """The classes as the column has them: numbers or texts."""
    labels: list[str]
    """Names of the classes."""
    box_format: str
    """Option ``box_format``."""
    relative: bool
    """Option ``relative``."""
    max_boxes: int
    """Option ``max_boxes``."""


class Boxes(NamedTuple):
    """The boxes of one row, or why they cannot be used."""

    corners: np.ndarray
    """(k, 4) x0 y0 x1 y1 as shares of the image."""
    labels: np.ndarray
    """(k,) class numbers."""
    crowd: np.ndarray
    """(k,) which are crowd regions."""
    reason: str = ""


NO_BOXES = Boxes(
    np.zeros((0, 4)),
    np.zeros(0, np.int64),
    np.zeros(0, bool),
)


def fit_state(options: BoxOptions, table: pa.Table, columns: dict[str, str]) -> BoxState:
    """Return the state: the classes that option ``names`` names, or the sorted values of the rows.

    Raises:
        ValueError: columns without lists, a class without a name, boxes in pixels without the
            image's size, or boxes that are shares of it where pixels are expected.
    """
    for role in ("width", "height"):
        if not options.relative and role not in columns:
            raise ValueError(
                f"objective.relative is false: boxes in pixels need a {role} column (columns: "
                f"{{{role}: NAME}}); boxes that are shares of the image need relative: true"
            )
    column = columns["labels"]
    labels = _flattened(table, column, 1, "classes, one for each box")
    values_of_rows = pc.unique(labels).drop_null().to_pylist()
    if options.names is None:
        values = sorted(values_of_rows)
        names = [str(value) for value in values]
    else:
        values, names = _named_classes(options.names, values_of_rows, column)
    if not values:
        raise ValueError(f"column {column}: the training rows hold no box")
    if values_of_rows and not options.relative:
        numbers = _flattened(table, columns["boxes"], 2, "4 numbers for each box")
        largest = pc.max(numbers).as_py() if is_number(numbers.type) else None
        if largest is not None and largest <= 1:
            raise ValueError(
                f"objective.relative is false, but no number in column {columns['boxes']} is above "
                "1: these boxes are shares of their images, not pixels; set relative: true"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"column {column}: two classes have the same name")
    return {
        "values": values,
        "labels": names,
        "box_format": options.box_format,
        "relative": options.relative,
        "max_boxes": options.max_boxes,
    }


def _flattened(table: pa.Table, column: str, levels: int, what: str) -> Any:
    """Return the values of a column of lists, or of lists of lists (two levels).

    Raises ValueError for a column of another type.
    """
    values = table[column]
    for _ in range(levels):
        if not is_list(values.type):
            kind = table.schema.field(column).type
            raise ValueError(f"column {column}: {kind} where a row has a list of {what}")
        values = pc.list_flatten(values)
    return values


def _named_classes(
    names: list[str] | dict[int | str, str], of_rows: list[Any], column: str
) -> tuple[list[Any], list[str]]:
    """Return the values and names of the classes that option ``names`` names.

    Args:
        of_rows: the values of the training rows.

    Raises:
        ValueError: no class, a name for no number, a value without a name, or a list of names for
            classes that are numbered from 1.
    """
    pairs = [*(names.items() if isinstance(names, dict) else enumerate(names))]
    if not pairs:
        raise ValueError(
            "objective.names: no class is named; leave it out to take the values of the training "
            "rows"
        )
    are_texts = bool(of_rows) and isinstance(of_rows[0], str)
    wrong = [key for key, _ in pairs if not are_texts and not str(key).isdecimal()]
    if wrong:
        raise ValueError(
            f"objective.names: {wrong[0]!r} is not a class number, and column {column} holds "
            "numbers; write number: name"
        )
    values = [name if are_texts else int(key) for key, name in pairs]
    doubt = doubt_numbers(names, of_rows, column)
    if doubt and max(of_rows) == len(names):
        raise ValueError(
            f"{doubt}; one has class {len(names)}, which is past the end of the list: write the "
            f"number of each name, {{1: {names[0]}, ...}}"
        )
    unknown = sorted(set(of_rows) - set(values))
    if unknown:
        raise ValueError(
            f"column {column}: class {unknown[0]!r} of the training rows has no name in "
            f"objective.names; {nearest(str(unknown[0]), [str(value) for value in values])}"
        )
    return values, [name for _, name in pairs]


def doubt_numbers(
    names: list[str] | dict[int | str, str] | None, of_rows: list[Any], column: str
) -> str:
    """Say that a list of class names may be numbered from 1; "" where it cannot.

    A list is numbered from 0. That no training row has class 0 may be chance.

    Args:
        of_rows: the values of the training rows in ``column``.
    """
    are_numbers = bool(of_rows) and not isinstance(of_rows[0], str)
    if not isinstance(names, list) or not are_numbers or 0 in of_rows:
        return ""
    return (
        "objective.names: a list is numbered from 0, and no training row has class 0 in column "
        f"{column} (the lowest is {min(of_rows)})"
    )


def image_sizes(table: pa.Table, columns: dict[str, str]) -> np.ndarray:
    """Return (n, 2) height and width of the upright images in pixels, from their headers.

    Zeros where an image cannot be read, or the table has no images.
    """
    out = np.zeros((len(table), 2), np.int64)
    if columns.get("image") in table.column_names:
        for row, image in enumerate(table[columns["image"]]):
            out[row] = (image_io.upright_size(image.as_py()) or (0, 0))[::-1]
    return out


def pad_boxes(rows: Iterable[Boxes], max_boxes: int) -> dict[str, np.ndarray]:
    """Return ``boxes`` (n, M, 4), ``labels`` (n, M; -1: none) and ``crowd`` (n, M)."""
    listed = list(rows)
    n = len(listed)
    boxes = np.zeros((n, max_boxes, 4), np.float32)
    labels = np.full((n, max_boxes), -1, np.int64)
    crowd = np.zeros((n, max_boxes), bool)
    for row, of_row in enumerate(listed):
        k = len(of_row.labels)
        boxes[row, :k], labels[row, :k], crowd[row, :k] = of_row[:3]
    return {"boxes": boxes, "labels": labels, "crowd": crowd}


def parse_boxes(
    table: pa.Table, columns: dict[str, str], state: BoxState, check_size: bool = False
) -> Iterator[Boxes]:
    """Yield the boxes of each row; with a reason it has none.

    Args:
        check_size: whether boxes in pixels are refused where the image has another size than its
            row says, for which its header is read.
    """
    reads_image = check_size and not state["relative"]
    roles = ("boxes", "labels", "crowd", "width", "height", *(["image"] if reads_image else []))
    given = [role for role in roles if columns.get(role) in table.column_names]
    values = {role: table[columns[role]].to_pylist() for role in given}
    index = {value: i for i, value in enumerate(state["values"])}
    for i in range(len(table)):
        row = {role: values[role][i] for role in given}
        try:
            yield _boxes(row, index, state)
        except ValueError as error:
            yield NO_BOXES._replace(reason=str(error))


def _boxes(row: dict[str, Any], index: dict[Any, int], state: BoxState) -> Boxes:
    """Read the boxes of one row.

    Args:
        row: the value of each role.
        index: the class number of each value.

    Raises:
        ValueError: what is wrong with them.
    """
    boxes = row["boxes"]
    labels = row["labels"]
    if boxes is None or labels is None:
        raise ValueError("its boxes or labels are null; an image without objects has empty lists")
    crowd = row.get("crowd") or [False] * len(boxes)
    if not len(boxes) == len(labels) == len(crowd):
        flags = f" and {len(crowd)} crowd flags" if row.get("crowd") else ""
        raise ValueError(f"{len(boxes)} boxes, but {len(labels)} labels{flags}")
    if len(boxes) > state["max_boxes"]:
        raise ValueError(f"{len(boxes)} boxes, more than objective.max_boxes={state['max_boxes']}")
    unknown = [label for label in labels if label not in index]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is not one of the {len(index)} classes of the training rows"
        )
    if any(box is None or len(box) != 4 for box in boxes):
        raise ValueError("a box is not 4 numbers")
    given = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners = box_convert(torch.from_numpy(given), state["box_format"], "xyxy").numpy()
    if not state["relative"]:
        width, height = _size_of(row)
        corners = corners / [width, height, width, height]
    inside = corners.clip(0, 1)
    _check_boxes(given, corners, inside, state)
    numbers = np.array([index[label] for label in labels], dtype=np.int64)
    return Boxes(inside, numbers, np.array(crowd, dtype=bool))


def _size_of(row: dict[str, Any]) -> tuple[float, float]:
    """Return width and height that boxes in pixels are of.

    Raises:
        ValueError: there is no size, or it is that of the picture before it is turned upright.
    """
    width = row["width"]
    height = row["height"]
    if not (width and height and width > 0 and height > 0):
        raise ValueError(f"boxes in pixels, but the image is {width} x {height}")
    wide, high = image_io.upright_size(row.get("image")) or (width, height)
    # the image may have been resized since: boxes as shares of it stay right
    distance_upright = abs(width * high - height * wide)
    distance_turned = abs(width * wide - height * high)
    if distance_turned <= max(width, height, wide, high) < distance_upright:
        raise ValueError(
            f"boxes in pixels of an image of {width} x {height}, but upright (EXIF) the image is "
            f"{wide} x {high}"
        )
    return width, height


def _check_boxes(
    given: np.ndarray, corners: np.ndarray, inside: np.ndarray, state: BoxState
) -> None:
    """Raise ValueError for a box that is not finite, has no area or lies outside its image.

    Args:
        given: (k, 4) boxes as the column has them.
        corners: (k, 4) as shares of the image.
        inside: (k, 4) cut at the image's edge.
    """
    for written, shares, cut in zip(given, corners, inside, strict=True):
        shown = np.array2string(written, precision=6, separator=", ")
        if not np.isfinite(written).all():
            raise ValueError(f"box {shown} is not finite")
        if not (shares[2:] > shares[:2]).all():
            raise ValueError(f"box {shown} has no area (read as {state['box_format']})")
        if not (cut[2:] > cut[:2]).all():
            unit = "shares of it" if state["relative"] else "pixels"
            raise ValueError(f"box {shown} lies outside its image (read as {unit})")


# ---------------------------------------------------------------- predictions


def output_columns(predictions: dict[str, np.ndarray], labels: list[str]) -> dict[str, np.ndarray]:
    """Return lists of a row, the surest first: ``boxes``, ``scores`` and ``labels`` (class names).

    Args:
        predictions: ``boxes`` (n, D, 4), ``scores`` (n, D) and ``classes`` (n, D; -1: none).
        labels: names of the classes.
    """
    names = np.array(labels, dtype=object)
    n = len(predictions["scores"])
    columns = {name: np.empty(n, dtype=object) for name in ("boxes", "scores", "labels")}
    for row, classes in enumerate(predictions["classes"]):
        real = classes >= 0
        columns["boxes"][row] = predictions["boxes"][row][real].tolist()
        columns["scores"][row] = predictions["scores"][row][real].tolist()
        columns["labels"][row] = names[classes[real]].tolist()
    return columns


def draw(
    picture: np.ndarray, columns: dict[str, Any], names: list[str], min_score: float
) -> np.ndarray:
    """Draw the boxes of a row on its picture, the surest ones on top.

    Args:
        picture: (H, W, 3) uint8.
        columns: what `output_columns` returns for the row.
        names: of all classes.
        min_score: boxes with a lower score are not drawn.
    """
    scores = np.array(columns["scores"])
    boxes = np.array(columns["boxes"]).reshape(-1, 4)
    is_drawn = scores >= min_score
    labels = [name for name, drawn in zip(columns["labels"], is_drawn, strict=True) if drawn]
    pairs = zip(labels, scores[is_drawn], strict=True)
    captions = [f"{name} {score:.2f}" for name, score in pairs]
    classes = [names.index(name) for name in labels]
    return drawing.draw_boxes(picture, boxes[is_drawn], captions, classes)
