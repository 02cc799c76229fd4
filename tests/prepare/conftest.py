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


def question(name: str, text: str, answer: str, start: int) -> dict:
    """A question of SQuAD with one answer, which begins at a character of the context."""
    answers = [{"text": answer, "answer_start": start}]
    return {"id": name, "question": text, "answers": answers}


def squad_file(context: str, questions: list[dict]) -> dict:
    """SQuAD's file of one paragraph."""
    paragraphs = [{"context": context, "qas": questions}]
    return {"version": "v2.0", "data": [{"title": "A", "paragraphs": paragraphs}]}


LONG_HEAD = "entity,time,variable,value\n"


def prepare_long(folder: Path, events: str, *pairs: str, people: str = "", **settings) -> dict:
    """Run the importer `events` on a long table, and one of its entities if it is given.

    They are written to long.csv and people.csv of the folder, and the rows to its folder out.
    """
    if people:
        pairs = (f"entities={write(folder / 'people.csv', people)}", *pairs)
    return prepare("events", write(folder / "long.csv", events), folder / "out", *pairs, **settings)


def summary(output) -> dict:
    return json.loads(Path(output, "_summary.json").read_text())


def reasons(found: dict) -> dict[str, str]:
    """Why each row that a summary lists was left out, by its path."""
    return {row["path"]: row["reason"] for row in found["broken"]["files"]}


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
    return write_imagenet(tmp_path / "imagenet")


def write_imagenet(root: Path) -> Path:
    """A tar of tars for training with 3, 2 and 1 images of the sorted classes, and a tar of six
    flat validation images with the devkit's ground truth.
    """
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
    lines = [
        f"{name},{found},{i},{patient},{age},{sex},PA,2682,2749,"
        for i, (name, found, patient, age, sex) in enumerate(rollouts)
    ]
    write(root / "Data_Entry_2017.csv", "\n".join([header, *lines]) + "\n")
    sixteen_bits = io.BytesIO()
    levels = (np.arange(30 * 40, dtype=np.uint16) * 50).reshape(30, 40)
    PIL.Image.fromarray(levels).save(sixteen_bits, "PNG")
    for i, (name, *_) in enumerate(rollouts):
        data = encoded(i, form="PNG", mode="L") if i else sixteen_bits.getvalue()
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
    return write_coco(tmp_path / "coco")


def write_coco(root: Path) -> Path:
    """Three images of train (one without boxes) and one of val; category ids with a hole; polygons,
    a crowd of run lengths.
    """
    crowd = np.zeros((30, 40), dtype=int)
    crowd[5:20, 3:30] = 1
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 90, "name": "toothbrush"},
    ]
    run_lengths = {"size": [30, 40], "counts": rle(crowd)}
    nan = float("nan")
    objects = [
        (1, 90, [4.5, 6.0, 10.0, 12.0], 120, [[4.5, 6.0, 14.5, 6.0, 14.5, 18.0, 4.5, 18.0]]),
        (1, 1, [3, 5, 27, 15], 405, run_lengths),
        (2, 1, [30, 20, 20, 20], 100, [[30, 20, 40, 20, 40, 30, 30, 30]]),
        (2, 1, [1, 1, 0, 5], 0, [[1, 1, 1, 6, 1, 3]]),
        (2, 1, [50, 1, 5, 5], 25, [[50, 1, 55, 1, 55, 6]]),
        (2, 90, [nan, 1, 5, 5], 25, [[1, 1, 6, 1, 6, 6]]),
        (9, 1, [0, 0, 40, 30], 1200, [[0, 0, 40, 0, 40, 30, 0, 30]]),
    ]
    names = ("image_id", "category_id", "bbox", "area", "segmentation")
    annotations = [
        {"id": number, "iscrowd": int(one[-1] is run_lengths), **dict(zip(names, one, strict=True))}
        for number, one in enumerate(objects, 11)
    ]
    for split, ids in (("train2017", (1, 2, 3)), ("val2017", (9,))):
        found = {
            "images": [
                {"id": i, "file_name": f"{i:06d}.jpg", "width": 40, "height": 30} for i in ids
            ],
            "annotations": [one for one in annotations if one["image_id"] in ids],
            "categories": categories,
        }
        write(root / f"annotations/instances_{split}.json", json.dumps(found))
        for i in ids:
            write(root / split / f"{i:06d}.jpg", encoded(i))
    return root


def as_float32(*events: tuple) -> list[tuple]:
    """(time, name, value) of events as files of prepared rows hold them."""
    return [
        (np.float32(time).item(), name, np.float32(value).item()) for time, name, value in events
    ]
