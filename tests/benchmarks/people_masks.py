"""Write instance masks of people in COCO128, for jobs/vision/instances_small.yaml.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/people_masks.py FOLDER

COCO128 there has boxes, and the class of each pixel. The mask of a person is made of both: the
person pixels in its box. People whose boxes meet are crowds, since nobody can tell whose pixels
they are. Images in which no person stands apart are left out.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.media import instance_masks

PERSON_LABEL, PERSON_PIXEL = 0, 1
SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "boxes": pa.list_(pa.list_(pa.float64())),
        "labels": pa.list_(pa.string()),
        "crowd": pa.list_(pa.bool_()),
        "masks": pa.list_(instance_masks.RLE),
    }
)


def person_masks(image: dict[str, Any], is_person: np.ndarray) -> dict[str, list[Any]]:
    """Return boxes, labels, crowds and masks (run lengths) of the people of an image.

    Args:
        image: A row of COCO128, with boxes as shares of the image (centre and size).
        is_person: (H, W) bool.
    """
    height, width = is_person.shape
    boxes = zip(image["boxes_cxcywh_norm"], image["labels"], strict=True)
    people = [box for box, label in boxes if label == PERSON_LABEL]
    out: dict[str, list[Any]] = {"boxes": [], "labels": [], "crowd": [], "masks": []}
    for x, y, w, h in people:
        rows = slice(int((y - h / 2) * height), int((y + h / 2) * height + 1))
        columns = slice(int((x - w / 2) * width), int((x + w / 2) * width + 1))
        mask = np.zeros_like(is_person)
        mask[rows, columns] = is_person[rows, columns]
        if not mask.any():
            continue
        num_meeting = sum(
            abs(x - x2) < (w + w2) / 2 and abs(y - y2) < (h + h2) / 2 for x2, y2, w2, h2 in people
        )
        out["boxes"].append([x, y, w, h])
        out["labels"].append("person")
        out["crowd"].append(num_meeting > 1)  # each meets itself
        out["masks"].append(instance_masks.packed(mask))
    return out


def write_masks(data: Path, folder: Path) -> None:
    """Write train.parquet and val.parquet: the images in which a person stands apart."""
    for split in ("train", "val"):
        pixels = pq.read_table(data / f"semantic_masks_{split}.parquet").to_pylist()
        class_images = {row["image_id"]: row["mask"] for row in pixels}
        rows = []
        for image in pq.read_table(data / f"{split}.parquet").to_pylist():
            if image["image_id"] not in class_images:
                continue
            classes = np.asarray(PIL.Image.open(io.BytesIO(class_images[image["image_id"]])))
            people = person_masks(image, classes == PERSON_PIXEL)
            if not all(people["crowd"]):
                rows.append({"image": image["image"], **people})
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{split}.parquet")


def main() -> None:
    """Write the two files into the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_masks(Path(os.environ["ONETOMANY_DATA"], "vision/coco128_detection"), folder)


if __name__ == "__main__":
    main()
