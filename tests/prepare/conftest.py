"""Small publishers' layouts, written with Pillow and the standard library; each is told what it
holds.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import Data
from pipeline.data import manifests
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.write import Preparation, Settings

WNIDS = {"n02119789": "kit fox", "n01440764": "tench", "n02100735": "English setter"}
"""In the devkit's order, which is not the sorted one."""


def encoded(number: int, size=(40, 30), form="JPEG", mode="RGB", **options) -> bytes:
    """An image that no other number gives."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    sink = io.BytesIO()
    PIL.Image.fromarray(pixels).save(sink, form, **options)
    return sink.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tar(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def read(output) -> list[dict]:
    """All rows of an output, in the order of its parts."""
    return [
        row
        for file in sorted(Path(output).glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def prepare(name: str, source, output, *pairs: str, **settings) -> dict:
    """Run an importer with options (``key=value``) and settings. Returns its manifest."""
    return Preparation(
        name,
        str(source),
        str(output),
        importing.options_of(name, list(pairs)),
        Settings(**settings),
    ).run()


def prepare_and_read(name: str, source, output, *pairs: str, **settings) -> tuple[list[dict], dict]:
    """Run an importer. Returns the rows in the order of the parts, and the summary."""
    prepare(name, source, output, *pairs, **settings)
    return read(output), summary(output)


def summary(output) -> dict:
    return json.loads(Path(output, "_summary.json").read_text())


def parts(output) -> dict[str, bytes]:
    """The bytes of each part."""
    return {file.name: file.read_bytes() for file in sorted(Path(output).glob("*.parquet"))}


def entity_rows(output) -> dict:
    """Rows by entity."""
    found = read(output)
    by_entity = {row["entity"]: row for row in found}
    assert len(by_entity) == len(found), "an entity stands twice"
    return by_entity


def entity_events(row: dict) -> list[tuple]:
    """The (time, variable, value) triples of a row."""
    assert row["events"] == len(row["times"]) == len(row["variables"]) == len(row["values"])
    return list(zip(row["times"], row["variables"], row["values"], strict=True))


def demo_table(name: str):
    """A table of MIMIC-III's demo by pandas, its times without their zone."""
    import pandas as pd

    file = Path(os.environ["ONETOMANY_DATA"]) / f"healthcare/mimic3_demo/{name}.parquet"
    table = pd.read_parquet(file)
    for column in table.select_dtypes("datetimetz"):
        table[column] = table[column].dt.tz_localize(None)
    return table


def splits_of_a_job(
    tmp_path: Path, modality: str, role: str, column: str = "", folder: str = "out"
) -> dict[str, int]:
    """Rows of each split that a job reads from an output below `tmp_path`, whose `role` is in a
    column of that name or of another.
    """
    data = Data.model_validate(
        {
            "uri": str(tmp_path / folder),
            "split_column": "split",
            "modality": modality,
            "columns": {role: column or role},
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
        }
    )
    found = manifests.splits(data, (role,), "sources.a", str(tmp_path / "imports"), False)
    counts = {split: len(getattr(found, split)) for split in ("train", "validation", "test")}
    return {split: count for split, count in counts.items() if count}


KILLED = """
    import os, signal
    from prepare.conftest import prepare
    from pipeline.prepare.engine import {module}
    real, calls = {module}.{name}, []

    def killed(*arguments):
        calls.append(1)
        done = real(*arguments)
        if len(calls) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    {module}.{name} = killed
    prepare(*{arguments!r}, **{settings!r})
"""


def prepare_killed(
    name: str, source, output, *pairs: str, at: int, function="write.write_shard", **settings
) -> None:
    """Run an importer in a process that is killed when so many calls of a function of the engine
    have returned: a part is there then, its record is not.
    """
    module, _, called = function.partition(".")
    program = textwrap.dedent(KILLED).format(
        module=module,
        name=called,
        at=at,
        arguments=(name, str(source), str(output), *pairs),
        settings=settings,
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def folder(tmp_path):
    """SPLIT/CLASS/FILE: cats and dogs, four each in train, two in val."""
    root = tmp_path / "folder"
    for s, (split, count) in enumerate((("train", 4), ("val", 2))):
        for c, label in enumerate(("cat", "dog")):
            for i in range(count):
                write(
                    root / split / label / f"{i}.jpg",
                    encoded(100 * s + 10 * c + i, size=(40 + i, 30)),
                )
    return root


@pytest.fixture
def imagenet(tmp_path):
    """A tar of tars for training with 3, 2 and 1 images of the sorted classes, and a tar of six
    flat validation images with the devkit's ground truth.
    """
    root = tmp_path / "imagenet"
    number = iter(range(1000))
    tars = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": encoded(next(number)) for i in range(3 - k)})
        for k, wnid in enumerate(sorted(WNIDS))
    }
    write(root / "ILSVRC2012_img_train.tar", tar(tars))
    write(
        root / "ILSVRC2012_img_val.tar",
        tar({f"ILSVRC2012_val_{i:08d}.JPEG": encoded(next(number)) for i in range(1, 7)}),
    )
    write(
        root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
        "1\n2\n3\n3\n2\n1\n",
    )
    write(
        root / "devkit/data/map_clsloc.txt",
        "".join(
            f"{wnid} {i} {name.replace(' ', '_')}\n"
            for i, (wnid, name) in enumerate(WNIDS.items(), 1)
        ),
    )
    return root


@pytest.fixture
def webdataset(tmp_path):
    """Two shards of train with three samples each and one of validation with two."""
    root = tmp_path / "webdataset"
    for number, (shard, count) in enumerate(
        (("train-000", 3), ("train-001", 3), ("validation-000", 2))
    ):
        members = {}
        for i in range(count):
            members |= {
                f"{number}_{i}.jpg": encoded(10 * number + i),
                f"{number}_{i}.cls": str(i % 2).encode(),
                f"{number}_{i}.json": json.dumps({"name": f"class {i % 2}", "id": i}).encode(),
            }
        write(root / f"{shard}.tar", tar(members))
    return root


@pytest.fixture
def chest(tmp_path):
    """Six films of four patients: 8-bit and 16-bit PNG, in two folders."""
    root = tmp_path / "chest"
    rollouts = [
        ("00000001_000.png", "Cardiomegaly|Effusion", 1, "058Y", "M"),
        ("00000001_001.png", "No Finding", 1, "059Y", "M"),
        ("00000002_000.png", "No Finding", 2, "081Y", "F"),
        ("00000003_000.png", "Hernia", 3, "074Y", "F"),
        ("00000004_000.png", "Hernia|Mass|Nodule", 4, "066Y", "M"),
        ("00000004_001.png", "Mass", 4, "066Y", "M"),
    ]
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View "
        "Position,OriginalImage[Width,Height],"
    )
    write(
        root / "Data_Entry_2017.csv",
        "\n".join(
            [
                header,
                *(
                    f"{name},{found},{i},{patient},{age},{sex},PA,2682,2749,"
                    for i, (name, found, patient, age, sex) in enumerate(rollouts)
                ),
            ]
        )
        + "\n",
    )
    for i, (name, *_) in enumerate(rollouts):
        if i == 0:
            sink = io.BytesIO()
            PIL.Image.fromarray((np.arange(30 * 40, dtype=np.uint16) * 50).reshape(30, 40)).save(
                sink, "PNG"
            )
            data = sink.getvalue()
        else:
            data = encoded(i, form="PNG", mode="L")
        write(root / f"images_00{1 + i % 2}/images" / name, data)
    write(root / "train_val_list.txt", "".join(f"{name}\n" for name, *_ in rollouts[:4]))
    write(root / "test_list.txt", "\n".join(name for name, *_ in rollouts[4:]))
    return root


def rle(mask: np.ndarray) -> list[int]:
    """Run lengths of COCO, by a loop over the columns."""
    counts, last, run = [], 0, 0
    for value in mask.T.reshape(-1).tolist():
        if value != last:
            counts.append(run)
            last, run = value, 0
        run += 1
    return [*counts, run]


@pytest.fixture
def coco(tmp_path):
    """Three images of train (one without boxes) and one of val; category ids with a hole; polygons,
    a crowd of run lengths.
    """
    root = tmp_path / "coco"
    for split, names in (
        ("train2017", ("000001.jpg", "000002.jpg", "000003.jpg")),
        ("val2017", ("000009.jpg",)),
    ):
        for name in names:
            write(root / split / name, encoded(int(name[:6])))
    crowd = np.zeros((30, 40), dtype=int)
    crowd[5:20, 3:30] = 1
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 90, "name": "toothbrush"},
    ]
    images = [{"id": i, "file_name": f"{i:06d}.jpg", "width": 40, "height": 30} for i in (1, 2, 3)]
    annotations = [
        {
            "id": 11,
            "image_id": 1,
            "category_id": 90,
            "bbox": [4.5, 6.0, 10.0, 12.0],
            "area": 120,
            "iscrowd": 0,
            "segmentation": [[4.5, 6.0, 14.5, 6.0, 14.5, 18.0, 4.5, 18.0]],
        },
        {
            "id": 12,
            "image_id": 1,
            "category_id": 1,
            "bbox": [3, 5, 27, 15],
            "area": 405,
            "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": rle(crowd)},
        },
        {
            "id": 13,
            "image_id": 2,
            "category_id": 1,
            "bbox": [30, 20, 20, 20],
            "area": 100,
            "iscrowd": 0,
            "segmentation": [[30, 20, 40, 20, 40, 30, 30, 30]],
        },
        {
            "id": 14,
            "image_id": 2,
            "category_id": 1,
            "bbox": [1, 1, 0, 5],
            "area": 0,
            "iscrowd": 0,
            "segmentation": [[1, 1, 1, 6, 1, 3]],
        },
        {
            "id": 15,
            "image_id": 2,
            "category_id": 1,
            "bbox": [50, 1, 5, 5],
            "area": 25,
            "iscrowd": 0,
            "segmentation": [[50, 1, 55, 1, 55, 6]],
        },
        {
            "id": 16,
            "image_id": 2,
            "category_id": 90,
            "bbox": [float("nan"), 1, 5, 5],
            "area": 25,
            "iscrowd": 0,
            "segmentation": [[1, 1, 6, 1, 6, 6]],
        },
    ]
    write(
        root / "annotations/instances_train2017.json",
        json.dumps({"images": images, "annotations": annotations, "categories": categories}),
    )
    write(
        root / "annotations/instances_val2017.json",
        json.dumps(
            {
                "images": [{"id": 9, "file_name": "000009.jpg", "width": 40, "height": 30}],
                "categories": categories,
                "annotations": [
                    {
                        "id": 17,
                        "image_id": 9,
                        "category_id": 1,
                        "bbox": [0, 0, 40, 30],
                        "area": 1200,
                        "iscrowd": 0,
                        "segmentation": [[0, 0, 40, 0, 40, 30, 0, 30]],
                    }
                ],
            }
        ),
    )
    return root
