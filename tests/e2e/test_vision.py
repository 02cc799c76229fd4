"""Images from their publishers' files to rows of the results table: ImageNet's folders,
ChestX-ray14's lists, COCO's annotations.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import write

from pipeline.prepare.engine.importing import options_of
from pipeline.prepare.engine.write import Preparation

JOB = Path(__file__).with_name("vision.yaml")
WNIDS = ("n01440764", "n02100735", "n02119789")

pytestmark = pytest.mark.timeout(600)


encoded = partial(conftest.encoded, size=(48, 40))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """30 + 9 images of three synsets, 40 films of 20 patients, 16 + 4 images with two objects
    each.
    """
    root, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    for k, wnid in enumerate(WNIDS):
        for i in range(13):
            write(
                root / "imagenet" / ("train" if i < 10 else "val") / wnid / f"{wnid}_{i}.JPEG",
                encoded(100 * k + i),
            )
    lines, lists = (
        [
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient "
            "Gender,View Position"
        ],
        {"train_val": [], "test": []},
    )
    for i in range(40):
        name, found = (
            f"{i // 2:08d}_{i % 2:03d}.png",
            ("No Finding", "Effusion", "Mass|Effusion", "Mass")[(i // 2) % 4],
        )
        lines.append(f"{name},{found},{i % 2},{i // 2},058Y,M,PA")
        lists["train_val" if i < 28 else "test"].append(name)
        write(root / "chest/images" / name, encoded(1000 + i, form="PNG", mode="L"))
    write(root / "chest/Data_Entry_2017.csv", "\n".join(lines) + "\n")
    for name, images in lists.items():
        write(root / f"chest/{name}_list.txt", "\n".join(images))
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    for split, numbers in (("train2017", range(1, 17)), ("val2017", range(17, 21))):
        annotations = []
        for i in numbers:
            write(root / "coco" / split / f"{i:06d}.jpg", encoded(2000 + i))
            for k, category in enumerate((1, 90)):
                x, y = (int(rng.integers(0, most)) for most in (20, 16))
                annotations.append(
                    {
                        "id": 2 * i + k,
                        "image_id": i,
                        "category_id": category,
                        "bbox": [x, y, 20, 16],
                        "area": 320,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + 20, y, x + 20, y + 16, x, y + 16]],
                    }
                )
        images = [
            {"id": i, "file_name": f"{i:06d}.jpg", "width": 48, "height": 40} for i in numbers
        ]
        write(
            root / f"coco/annotations/instances_{split}.json",
            json.dumps({"images": images, "annotations": annotations, "categories": categories}),
        )
    return root


@pytest.fixture(scope="module")
def done(published, command, tmp_path_factory) -> Path:
    """The folder of the job, its sources and targets prepared and run once."""
    where = tmp_path_factory.mktemp("run")
    for name, kind, *words in (
        ("imagenet", "imagenet"),
        ("chest", "chestxray14"),
        ("coco", "coco", "masks=semantic"),
        ("instances", "coco", "masks=instance"),
    ):
        Preparation(
            kind,
            str(published / {"instances": "coco"}.get(name, name)),
            str(where / "prepared" / name),
            options_of(kind, words),
        ).run()
    ended = command("run", JOB, cwd=where, env={"PREPARED": str(where / "prepared")})
    assert ended.returncode == 0, ended.stderr[-4000:]
    return where / "runs" / "vision"


def test_every_publisher_has_its_rows_in_the_table(done):
    rows = pq.read_table(done / "results.parquet").to_pylist()
    assert all(row["status"] == "done" for row in rows)
    tested = [row for row in rows if row["split"] == "test"]
    metrics = {
        name: {row["metric"] for row in tested if row["target"] == name}
        for name in ("findings", "objects", "masks", "instances")
    }
    assert (
        {"macro_auroc", "auroc/Mass", "auroc/Effusion"} <= metrics["findings"]
        and {"map", "map50"} <= metrics["objects"]
        and {"miou", "iou/class 1"} <= metrics["masks"]
        and {"mask_map", "mask_map50", "mask_map_small", "map"} <= metrics["instances"]
    )
    assert {(row["target"], row["source"], row["technique"]) for row in tested} == {
        ("findings", "imagenet", "linear_probe"),
        ("findings", "none", "scratch"),
        ("objects", "imagenet", "full"),
        ("objects", "none", "scratch"),
        ("masks", "imagenet", "full"),
        ("masks", "none", "scratch"),
        ("instances", "imagenet", "full"),
        ("instances", "none", "scratch"),
    }
    assert {row["target"]: row["n_eval"] for row in tested} == {
        "findings": 12,
        "objects": 4,
        "masks": 4,
        "instances": 4,
    }, "the official list, the published validation images"
    assert {row["n_units"] for row in tested if row["target"] == "findings"} == {6}, (
        "resampled by patient"
    )
