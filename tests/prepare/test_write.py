"""Parts: what they hold, the same bytes however often a run is killed, and nothing done twice."""

import gzip
import io
import json
import os
import shutil
import uuid
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare.conftest import (
    encoded,
    parts,
    prepare,
    prepare_killed,
    read,
    reasons,
    splits_of_a_job,
    summary,
    tar,
    write,
)
from prepare.speech import sound
from pycocotools import mask as reference
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import provenance, registry
from pipeline.config.registry import Options
from pipeline.data import manifests
from pipeline.io import checksums, storage
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.shard_tasks import (
    Importer,
    ShardResult,
    ShardTask,
    group_neighbours,
    sum_by_split,
)
from pipeline.prepare.engine.write import BEGUN, MANIFEST, Preparation, Settings, verify

ROOT = Path(cli.__file__).parents[1]
SOURCES = {
    "imagefolder": "folder",
    "imagenet": "imagenet",
    "webdataset": "webdataset",
    "chestxray14": "chest",
    "coco": "coco",
}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", SOURCES)
def test_a_job_reads_what_every_importer_of_images_writes(name, request, tmp_path):
    done = prepare(name, request.getfixturevalue(SOURCES[name]), tmp_path / "out", rows_per_part=2)
    assert splits_of_a_job(tmp_path, "image", "image") == done["rows"]
    rows = read(tmp_path / "out")
    for row in rows:
        with PIL.Image.open(io.BytesIO(row["image"])) as image:
            assert image.size == (row["width"], row["height"])
    assert len({row["sha256"] for row in rows}) == len(rows)
    assert all(entry["rows"] <= 2 for entry in done["files"].values())
    assert not any(name.startswith("_") for name in rows[0])


def test_images_are_the_publishers_bytes_and_labels_are_theirs(folder, tmp_path):
    prepare("imagefolder", folder, tmp_path / "out")
    for row in read(tmp_path / "out"):
        assert row["image"] == (folder / row["path"]).read_bytes()
        split, label, _ = row["path"].split("/")
        assert (row["split"], row["label"]) == (
            {"train": "train", "val": "validation"}[split],
            label,
        )


def test_rows_of_a_part_are_a_mixture_of_the_classes(tmp_path):
    for i in range(200):
        write(tmp_path / f"set/{'ab'[i // 100]}/{i:03d}.jpg", encoded(0))
    prepare("imagefolder", tmp_path / "set", tmp_path / "out", rows_per_part=50)
    for file in (tmp_path / "out").glob("*.parquet"):
        assert 10 < Counter(pq.read_table(file)["label"].to_pylist())["a"] < 40


def test_rows_of_gzipped_tars_are_those_of_folders_and_each_part_reads_on(
    chest, tmp_path, monkeypatch
):
    """As the NIH gives them: images_001.tar.gz, in which lies images/."""
    prepare("chestxray14", chest, tmp_path / "plain")
    for folder in sorted(chest.glob("images_*")):
        write(
            chest / f"{folder.name}.tar.gz",
            gzip.compress(
                tar(
                    {
                        f"images/{file.name}": file.read_bytes()
                        for file in sorted(folder.rglob("*.png"))
                    }
                )
            ),
        )
        shutil.rmtree(folder)
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: pytest.fail("unpacked anew"))
    prepare("chestxray14", chest, tmp_path / "packed")
    for place in ("plain", "packed"):
        assert len(list((tmp_path / place).glob("*.parquet"))) == 2
    one, two = (
        {row["path"]: row for row in read(tmp_path / place)} for place in ("plain", "packed")
    )
    assert one == two and len(one) == 6


def test_a_part_of_a_gzipped_tar_is_one_pass_over_one_archive_and_yet_a_mixture(tmp_path):
    for label in ("cat", "dog"):
        write(
            tmp_path / f"set/{label}.tar.gz",
            gzip.compress(tar({f"{i:02d}.jpg": encoded(i) for i in range(20)})),
        )
    prepare("imagefolder", tmp_path / "set", tmp_path / "out", rows_per_part=10)
    found = [
        pq.read_table(file).to_pylist() for file in sorted((tmp_path / "out").glob("*.parquet"))
    ]
    assert [{row["label"] for row in part} for part in found] == [
        {"cat"},
        {"cat"},
        {"dog"},
        {"dog"},
    ]
    assert sorted(row["path"] for part in found for row in part) == [
        f"{label}/{i:02d}.jpg" for label in ("cat", "dog") for i in range(20)
    ]
    assert all(paths != sorted(paths) for part in found if (paths := [row["path"] for row in part]))


def test_coco_boxes_and_masks_move_with_their_image(coco, tmp_path):
    prepare("coco", coco, tmp_path / "whole", "masks=semantic")
    prepare("coco", coco, tmp_path / "small", "masks=semantic", resize=16)
    whole, small = (
        {row["image_id"]: row for row in read(tmp_path / place)} for place in ("whole", "small")
    )
    assert {(row["width"], row["height"]) for row in small.values()} == {(21, 16)}
    sx, sy = 21 / 40, 16 / 30
    assert np.allclose(small[1]["boxes"], np.array(whole[1]["boxes"]) * (sx, sy, sx, sy))
    masks = {
        place: {i: np.asarray(PIL.Image.open(io.BytesIO(row["mask"]))) for i, row in rows.items()}
        for place, rows in (("whole", whole), ("small", small))
    }
    annotations = json.loads((coco / "annotations/instances_train2017.json").read_text())[
        "annotations"
    ]
    wanted = np.zeros((30, 40), dtype=np.uint8)
    wanted[reference.decode(reference.frPyObjects(annotations[1]["segmentation"], 30, 40)) == 1] = (
        255
    )
    wanted[
        reference.decode(reference.frPyObjects(annotations[0]["segmentation"], 30, 40))[:, :, 0]
        == 1
    ] = 90
    assert (masks["whole"][1] == wanted).all()
    assert masks["small"][1].shape == (16, 21) and set(np.unique(masks["small"][1])) == {0, 90, 255}
    assert (masks["whole"][9] == 1).all() and not masks["whole"][3].any()
    about = json.loads(
        pq.read_schema(next((tmp_path / "whole").glob("train*.parquet"))).metadata[b"onetomany"]
    )
    assert about["categories"] == [
        {"id": 1, "name": "person", "mask_value": 1},
        {"id": 90, "name": "toothbrush", "mask_value": 90},
    ]


@pytest.mark.parametrize("settings", [{}, {"resize": 16}])
def test_the_detection_objective_reads_coco(coco, tmp_path, settings):
    """Boxes as shares of their image are the annotations' own, whatever the size the images were
    written in.
    """
    prepare("coco", coco, tmp_path / "out", **settings)
    found = pq.read_table(next((tmp_path / "out").glob("train*.parquet")))
    objective = registry.get("objective", "detection")
    columns = {name: name for name in ("image", "boxes", "labels", "crowd", "width", "height")}
    state = objective.fit(
        objective.options_class(box_format="xywh", relative=False), found, columns
    )
    assert state["values"] == [1, 90] and objective.invalid_label_reasons(
        found, columns, state
    ) == ["", "", ""]
    arrays, row = objective.encode(found, columns, state), found["image_id"].to_pylist().index(1)
    assert np.allclose(
        arrays["boxes"][row, :2],
        [[4.5 / 40, 6 / 30, 14.5 / 40, 18 / 30], [3 / 40, 5 / 30, 30 / 40, 20 / 30]],
        atol=1e-6,
    )
    assert arrays["labels"][row, :3].tolist() == [1, 0, -1] and arrays["crowd"][
        row, :2
    ].tolist() == [False, True]


def test_an_image_of_another_size_than_its_annotations_is_left_out(coco, tmp_path):
    write(coco / "train2017/000002.jpg", encoded(2, size=(30, 40)))
    done = prepare("coco", coco, tmp_path / "out")
    assert done["rows"] == {"train": 2, "validation": 1}
    assert reasons(summary(tmp_path / "out")) == {
        "000002.jpg": "the image is 30 x 40 pixels, its annotations are for 40 x 30"
    }


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [30, 40], "counts": "o" * 40 + "0"},
        {"size": [30], "counts": [1200]},
        {"size": [30, 40], "counts": [1 << 70]},
        {"counts": [1200]},
        [[1, 1, 1e12, 1, 1, 9]],
        [["a"] * 6],
    ],
)
def test_a_mask_that_cannot_be_drawn_is_one_broken_row(coco, tmp_path, segmentation):
    path = coco / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["segmentation"] = segmentation
    path.write_text(json.dumps(data))
    assert prepare("coco", coco, tmp_path / "out", "masks=semantic")["rows"] == {
        "train": 2,
        "validation": 1,
    }
    ((path, reason),) = reasons(summary(tmp_path / "out")).items()
    assert path == "000001.jpg" and reason.startswith("its mask cannot be drawn")


def test_larger_images_are_made_smaller_once_and_smaller_ones_kept(folder, tmp_path):
    write(folder / "train/cat/large.png", encoded(9, size=(400, 300), form="PNG"))
    prepare("imagefolder", folder, tmp_path / "out", resize=64, quality=None)
    for row in read(tmp_path / "out"):
        if row["path"].endswith("large.png"):
            assert (row["width"], row["height"]) == (85, 64) and row["image"].startswith(
                b"\xff\xd8"
            )
        else:
            assert row["image"] == (folder / row["path"]).read_bytes()


# ---------------------------------------------------------------- broken files, duplicates


def test_broken_files_are_listed_up_to_a_budget(folder, tmp_path):
    write(folder / "train/cat/cut.jpg", encoded(5)[:300])
    write(folder / "train/dog/empty.jpg", b"")
    with pytest.raises(
        ValueError,
        match=r"2 of 14 rows are broken, more than --max-bad 0.01 allows. First ones: "
        r"train/(cat/cut|dog/empty)\.jpg: ",
    ):
        prepare("imagefolder", folder, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    done = prepare("imagefolder", folder, tmp_path / "out", max_bad=0.2)
    assert (done["rows"], done["broken"]) == ({"train": 8, "validation": 4}, 2)
    found = reasons(summary(tmp_path / "out"))
    assert set(found) == {"train/cat/cut.jpg", "train/dog/empty.jpg"}
    assert (
        "train/dog/empty.jpg: the file is empty (0 bytes)"
        in (tmp_path / "out/_summary.md").read_text()
    )
    with pytest.raises(ValueError, match="more than --max-bad 0 allows"):
        prepare("imagefolder", folder, tmp_path / "out", max_bad=0)


def test_one_broken_file_of_few_is_forgiven_unless_none_may_be(folder, tmp_path):
    write(folder / "train/cat/cut.jpg", encoded(5)[:300])
    assert prepare("imagefolder", folder, tmp_path / "out")["broken"] == 1
    with pytest.raises(ValueError, match="1 of 13 rows are broken"):
        prepare("imagefolder", folder, tmp_path / "none", max_bad=0)


def test_exact_duplicates_and_classes_are_counted(folder, tmp_path):
    data = (folder / "train/cat/0.jpg").read_bytes()
    for place in ("train/cat/again.jpg", "train/dog/again.jpg", "val/cat/again.jpg"):
        write(folder / place, data)
    prepare("imagefolder", folder, tmp_path / "out")
    found = summary(tmp_path / "out")
    same = found["duplicates"]
    assert (
        same["files"],
        same["rows_beyond_the_first"],
        same["within"],
        same["across"],
        same["with_different_labels"],
    ) == (1, 3, {"train": 1}, {"train and validation": 1}, 1)
    assert same["examples"] == [
        [
            "train: train/cat/0.jpg",
            "train: train/cat/again.jpg",
            "train: train/dog/again.jpg",
            "validation: val/cat/again.jpg",
        ]
    ]
    assert found["classes"] == {
        "train": {"labels": {"cat": 5, "dog": 5}},
        "validation": {"labels": {"cat": 3, "dog": 2}},
    }
    assert (
        found["sizes"]["width"]["0"] == 40
        and found["sizes"]["width"]["100"] == 43
        and found["sizes"]["height"]["50"] == 30
    )
    text = (tmp_path / "out/_summary.md").read_text()
    assert "| cat | 5 | 3 |" in text and "across splits: train and validation 1" in text


def test_lists_of_labels_are_counted_one_by_one_and_no_patient_is_named(chest, tmp_path):
    images = chest / "images_002/images"
    shutil.copy(images / "00000001_001.png", images / "00000003_000.png")
    prepare("chestxray14", chest, tmp_path / "out")
    written = (tmp_path / "out/_summary.json").read_text()
    found = summary(tmp_path / "out")
    assert found["duplicates"]["files"] == 1
    assert "0000000" not in written + (tmp_path / "out/_summary.md").read_text()
    assert found["classes"] == {
        "train": {"labels": {"Cardiomegaly": 1, "Effusion": 1, "Hernia": 1}, "rows_without": 2},
        "test": {"labels": {"Hernia": 1, "Mass": 2, "Nodule": 1}, "rows_without": 0},
    }
    assert "| (no label) | 0 | 2 |" in (tmp_path / "out/_summary.md").read_text()


# ---------------------------------------------------------------- resuming


def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    prepare("imagefolder", folder, tmp_path / "whole", rows_per_part=2, resize=20)
    prepare_killed("imagefolder", folder, tmp_path / "out", at=3, rows_per_part=2, resize=20)
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
    assert len(kept) == 3 and len(list((tmp_path / "out/_parts").iterdir())) == 2
    work = Preparation(
        "imagefolder",
        str(folder),
        str(tmp_path / "out"),
        None,
        Settings(rows_per_part=2, resize=20),
    )
    assert len(work.todo) == 4
    work.run()
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert sum(kept[name] == (tmp_path / "out" / name).stat().st_mtime_ns for name in kept) == 2, (
        "what was whole is not written again"
    )
    assert verify(str(tmp_path / "out"))["files"] == verify(str(tmp_path / "whole"))["files"]


def _change_in_place(file: Path, change) -> None:
    """Write a file anew with the times of before, as a tool that keeps times does."""
    before = file.stat()
    file.write_bytes(change(file.read_bytes()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_folder_is_known_by_what_its_files_hold(tmp_path):
    """A label that was changed in place is another source, though size and time of change are the
    same; a copy is the same source.
    """
    source = tmp_path / "source"
    write(source / "train.csv", "value,label\n" + "1,a\n2,b\n" * 20)
    prepare("table", source, tmp_path / "out", "label=label")
    shutil.copytree(source, tmp_path / "copy")
    os.utime(tmp_path / "copy/train.csv", ns=(1, 1))
    assert Preparation(
        "table",
        str(tmp_path / "copy"),
        str(tmp_path / "out"),
        importing.options_of("table", ["label=label"]),
    ).is_done
    _change_in_place(source / "train.csv", lambda data: data.replace(b"1,a", b"1,b"))
    with pytest.raises(ValueError, match="another source"):
        prepare("table", source, tmp_path / "out", "label=label")


def test_recordings_that_a_manifest_names_elsewhere_are_known_by_content(tmp_path):
    recording = write(tmp_path / "elsewhere/a.flac", sound(1, 1.0))
    write(
        tmp_path / "source/train_manifest.json",
        json.dumps({"audio_filepath": str(recording), "duration": 1.0}) + "\n",
    )
    prepare("manifest", tmp_path / "source", tmp_path / "out")
    os.utime(recording, ns=(1, 1))
    assert Preparation("manifest", str(tmp_path / "source"), str(tmp_path / "out")).is_done
    _change_in_place(recording, lambda data: data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    with pytest.raises(ValueError, match="another source"):
        Preparation("manifest", str(tmp_path / "source"), str(tmp_path / "out"))


def test_a_run_that_is_complete_reads_no_image(folder, tmp_path, monkeypatch):
    first = prepare("imagefolder", folder, tmp_path / "out", rows_per_part=3)
    before = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    monkeypatch.setattr("pipeline.prepare.engine.write.write_shard", None)
    assert prepare("imagefolder", folder, tmp_path / "out", rows_per_part=3) == first
    assert {
        file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()
    } == before


def test_a_tampered_part_is_found_and_written_again(folder, tmp_path):
    prepare("imagefolder", folder, tmp_path / "out", rows_per_part=3)
    good = parts(tmp_path / "out")
    name = sorted(good)[1]
    data = bytearray(good[name])
    data[len(data) // 2] ^= 1
    (tmp_path / "out" / name).write_bytes(bytes(data))
    with pytest.raises(
        storage.StorageError,
        match=f"{name} is damaged.*remove that file and give the same prepare command",
    ):
        verify(str(tmp_path / "out"))
    (tmp_path / "out" / name).unlink()
    prepare("imagefolder", folder, tmp_path / "out", rows_per_part=3)
    assert parts(tmp_path / "out") == good
    verify(str(tmp_path / "out"))


def test_a_folder_of_another_source_or_other_options_is_refused(folder, tmp_path):
    prepare("imagefolder", folder, tmp_path / "out")
    for change in ({"resize": 20}, {"quality": 80}, {"rows_per_part": 1}):
        with pytest.raises(ValueError, match="another source, of other options"):
            prepare("imagefolder", folder, tmp_path / "out", **change)
    with pytest.raises(ValueError, match="another source, of other options"):
        prepare("imagefolder", folder / "train", tmp_path / "out")
    write(folder / "train/cat/new.jpg", encoded(77))
    with pytest.raises(ValueError, match="another source, of other options"):
        prepare("imagefolder", folder, tmp_path / "out")
    with pytest.raises(ValueError, match="give a folder outside"):
        prepare("imagefolder", folder, folder / "out")
    write(tmp_path / "mine/thesis.txt", "x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.txt\)"):
        prepare("imagefolder", folder, tmp_path / "mine")


def test_an_incomplete_folder_is_not_completed_by_other_code(folder, tmp_path):
    """Its rows would follow two rules; one that is complete stays as it is."""
    out = tmp_path / "out"
    prepare("imagefolder", folder, out, rows_per_part=3)
    begun = str(out / BEGUN)
    stated = checksums.read_document(begun)
    checksums.write_document(begun, {**stated, "code": "that of an earlier version"})
    prepare("imagefolder", folder, out, rows_per_part=3)
    (out / MANIFEST).unlink()
    (out / next(iter(parts(out)))).unlink()
    with pytest.raises(ValueError, match="is incomplete, and another version of the code made"):
        prepare("imagefolder", folder, out, rows_per_part=3)
    checksums.write_document(begun, stated)
    prepare("imagefolder", folder, out, rows_per_part=3)


def test_a_changed_cohort_definition_changes_the_code_hash():
    kind = registry.get("importer", "cohort")
    cohort = kind(kind.options_class(task="mortality"))
    assert "cohort mortality" in provenance.code_of((), cohort.components)


def test_a_folder_whose_columns_meant_something_else_is_refused(coco, tmp_path):
    prepare("coco", coco, tmp_path / "out")
    for path in (coco / "annotations").glob("*.json"):
        path.write_text(
            path.read_text().replace(
                '"categories": [', '"categories": [{"id": 5, "name": "airplane"}, '
            )
        )
    with pytest.raises(ValueError, match="another source"):
        prepare("coco", coco, tmp_path / "out")


def test_a_source_and_an_output_on_s3(folder, tmp_path, s3_server):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    for file in folder.rglob("*.jpg"):
        storage.write_bytes(f"{root}/raw/{file.relative_to(folder)}", file.read_bytes())
    storage.write_bytes(
        f"{root}/raw/test.tar", tar({f"cat/{i}.jpg": encoded(50 + i) for i in range(3)})
    )
    done = prepare("imagefolder", f"{root}/raw", f"{root}/out", rows_per_part=3)
    assert done["rows"] == {"train": 8, "validation": 4, "test": 3}
    assert verify(f"{root}/out") == done
    assert prepare("imagefolder", f"{root}/raw", f"{root}/out", rows_per_part=3) == done
    assert manifests.build(f"{root}/out", "auto", str(tmp_path)).num_rows == 15


@pytest.mark.parametrize(
    "wrong",
    [{"resize": 8}, {"quality": 0}, {"quality": 101}, {"rows_per_part": 0}, {"max_bad": 1.5}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')} .*: from "):
        Settings(**wrong)


# ---------------------------------------------------------------- on Ray, from the command line


@pytest.mark.slow  # the engine is that of tables (test_tables), which starts Ray in the quick run
@pytest.mark.ray
def test_on_ray_every_importer_of_images_writes_the_same_bytes(
    ray_here, hide_ray, request, tmp_path
):
    run = CliRunner().invoke
    for name, source in SOURCES.items():
        source = request.getfixturevalue(source)
        pairs = ["masks=semantic"] if name == "coco" else []
        with hide_ray():
            here = prepare(
                name,
                source,
                tmp_path / f"{name}-here",
                *pairs,
                rows_per_part=2,
                resize=24,
                quality=90,
            )
        line = [
            "prepare",
            name,
            str(source),
            "-o",
            str(tmp_path / f"{name}-ray"),
            "--rows-per-part",
            "2",
            "--resize",
            "24",
            "--quality",
            "90",
        ]
        done = run(cli.app, [*line, *(part for pair in pairs for part in ("--set", pair))])
        assert done.exit_code == 0, done.output
        assert storage.read_json(tmp_path / f"{name}-ray" / MANIFEST)["files"] == here["files"]
        assert parts(tmp_path / f"{name}-ray") == parts(tmp_path / f"{name}-here")
        assert (
            run(cli.app, ["prepare", "--verify", "-o", str(tmp_path / f"{name}-ray")]).exit_code
            == 0
        )
    write(tmp_path / "bad/cat/1.jpg", b"x")
    write(tmp_path / "bad/dog/1.jpg", b"y")
    done = run(
        cli.app, ["prepare", "imagefolder", str(tmp_path / "bad"), "-o", str(tmp_path / "bad-out")]
    )
    assert done.exit_code == 2 and "2 of 2 rows are broken" in done.output


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["prepare", "coca", "a", "-o", "b"], "unknown importer 'coca'"),
        (["prepare", "coco", "a"], "onetomany prepare NAME SOURCE -o OUTPUT"),
        (
            ["prepare", "coco", "nothing-here", "-o", "b"],
            "nothing-here: no annotations/instances_*.json and no */_annotations.coco.json there",
        ),
        (
            ["prepare", "--verify", "-o", "nothing-here"],
            "there is no complete folder at nothing-here",
        ),
    ],
)
def test_the_command_line_tells_what_is_wrong(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_the_command_line_lists_the_importers():
    done = CliRunner().invoke(cli.app, ["prepare", "--list"])
    assert done.exit_code == 0 and all(
        f"{name} " in done.output for name in registry.names("importer")
    )
    assert "coco\n" not in CliRunner().invoke(cli.app, ["prepare", "imagenet", "--list"]).output


# ---------------------------------------------------------------- the contract


class Squares(Importer):
    """Numbers and their squares: the least that an importer is."""

    options_class = Options
    registered_name = "squares"
    label = "even"
    reads_files = False
    components = ()  # it is not registered

    def plan(self, source, settings):
        return SquaresWork(self, int(source), settings)


class SquaresWork(ShardTask):
    noun = "numbers"

    def __init__(self, importer, count, settings):
        super().__init__(importer, settings)
        self.shards = group_neighbours(
            ["train"] * count, [1.0] * count, 1 << 20, settings.rows_per_part or 0
        )
        self.key, self.total = (count,), count

    @property
    def columns(self):
        return [
            pa.field(name, kind)
            for name, kind in (
                ("path", pa.string()),
                ("square", pa.int64()),
                ("even", pa.bool_()),
                ("split", pa.string()),
            )
        ]

    @property
    def make_shard(self):
        return partial(squares_of, self.schema)

    def payload(self, part):
        return list(range(part.start, part.stop))


def squares_of(schema, numbers, scratch):
    good = [n for n in numbers if n != 13]
    rows = [{"path": str(n), "square": n * n, "even": n % 2 == 0, "split": "train"} for n in good]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), scratch / "part.parquet")
    broken = [
        {"path": str(n), "split": "train", "reason": "bad luck"} for n in numbers if n not in good
    ]
    return ShardResult(
        scratch / "part.parquet", len(rows), broken, sum_by_split([("sum", "train", sum(good))])
    )


def test_an_importer_is_one_class_with_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "get", lambda kind, name: Squares)
    done = Preparation(
        "squares", "20", str(tmp_path / "out"), None, Settings(rows_per_part=8, max_bad=0.1)
    ).run()
    assert done["rows"] == {"train": 19} and done["broken"] == 1 and len(done["files"]) == 3
    assert [row["square"] for row in read(tmp_path / "out")] == [
        n * n for n in range(20) if n != 13
    ]
    found = summary(tmp_path / "out")
    assert found["notes"] == {"sum": {"train": sum(range(20)) - 13}}
    assert found["classes"]["train"]["labels"] == {"False": 9, "True": 10}
    with pytest.raises(
        ValueError,
        match=r"1 of 20 rows are broken, more than --max-bad 0 allows\. First ones: 13: bad luck",
    ):
        Preparation("squares", "20", str(tmp_path / "none"), None, Settings(max_bad=0)).run()


def test_every_importer_keeps_the_contract():
    for name in registry.names("importer"):
        assert issubclass(registry.get("importer", name), Importer), name
