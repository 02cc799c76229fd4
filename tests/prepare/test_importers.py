"""Each importer's index: every row with its labels and split, and what is wrong in a publisher's
files told before an image is read.
"""

import gzip
import json
import shutil
import unicodedata
import zipfile
from collections import Counter

import numpy as np
import pytest
from prepare import conftest
from prepare.conftest import WNIDS, encoded, tar, write
from prepare.speech import index
from pydantic import model_validator
from toys import image_file

from pipeline.config import registry
from pipeline.prepare.engine import importing
from pipeline.prepare.readers import archives


def counts(rows: list[dict], column: str) -> Counter:
    return Counter((row["split"], row[column]) for row in rows)


# ---------------------------------------------------------------- image folders

FOLDER = {
    ("train", "cat"): 4,
    ("train", "dog"): 4,
    ("validation", "cat"): 2,
    ("validation", "dog"): 2,
}


def test_image_folders_with_and_without_splits_in_folder_tar_and_zip(folder, tmp_path):
    assert counts(index("imagefolder", folder)[0], "label") == FOLDER
    assert counts(index("imagefolder", folder / "train")[0], "label") == {
        ("train", "cat"): 4,
        ("train", "dog"): 4,
    }
    members = {
        f"animals/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted(folder.rglob("*.jpg"))
    }
    assert (
        counts(index("imagefolder", write(tmp_path / "a.tar", tar(members)))[0], "label") == FOLDER
    )
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in {
            **members,
            "__MACOSX/animals/._x.jpg": b"",
            "animals/.DS_Store": b"",
        }.items():
            archive.writestr(name, data)
    assert counts(index("imagefolder", tmp_path / "a.zip")[0], "label") == FOLDER


def test_a_split_alone_below_a_top_folder_keeps_its_name(folder, tmp_path):
    members = {
        f"animals/v1/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted((folder / "val").rglob("*.jpg"))
    }
    assert counts(index("imagefolder", write(tmp_path / "val.tar", tar(members)))[0], "label") == {
        ("validation", "cat"): 2,
        ("validation", "dog"): 2,
    }


@pytest.mark.parametrize(
    "names",
    [("Train", "VAL"), ("TRAINING", "Valid"), ("train", "Validation"), ("train2017", "val_2017")],
)
def test_folders_of_splits_may_be_written_in_any_case_and_have_a_year(folder, tmp_path, names):
    members = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.jpg"))
    }
    cased = {
        name.replace("train/", f"{names[0]}/").replace("val/", f"{names[1]}/"): data
        for name, data in members.items()
    }
    for pairs in ((), ("layout=split/class",)):
        assert (
            counts(index("imagefolder", write(tmp_path / "a.tar", tar(cased)), *pairs)[0], "label")
            == FOLDER
        )
    alone = {
        f"animals/v1/{name}": data for name, data in cased.items() if name.startswith(names[1])
    }
    assert counts(index("imagefolder", write(tmp_path / "b.tar", tar(alone)))[0], "label") == {
        ("validation", "cat"): 2,
        ("validation", "dog"): 2,
    }


def test_scans_of_12_bits_that_resize_makes_nearly_black_are_reported(folder, tmp_path):
    scan = np.linspace(0, 4095, 40 * 40).reshape(40, 40).astype(np.uint16)
    for split, number in (("train", 0), ("train", 1), ("val", 0)):
        write(folder / split / "cat" / f"scan{number}.png", image_file(scan + number))
    assert "warnings" not in conftest.prepare("imagefolder", folder, tmp_path / "whole")
    manifest = conftest.prepare("imagefolder", folder, tmp_path / "small", resize=20)
    assert "written with 8 bits: train 2, validation 1; they are" in manifest["warnings"][0]
    assert manifest["warnings"][0] in (tmp_path / "small" / "_summary.md").read_text()


def test_class_folders_composed_differently_are_one_class(tmp_path):
    """macOS writes é as e and an accent."""
    for split, form in (("train", "NFC"), ("val", "NFD")):
        write(tmp_path / split / unicodedata.normalize(form, "café") / "1.jpg", encoded(1))
    rows, _ = index("imagefolder", tmp_path)
    assert {(row["split"], row["label"]) for row in rows} == {
        ("train", "café"),
        ("validation", "café"),
    }


def test_image_folders_that_are_not_as_said(folder):
    write(folder / "train/cat/notes.txt", "mine")
    assert index("imagefolder", folder)[1].notes["files left out"] == {".txt": 1}
    with pytest.raises(ValueError, match=r"do not lie as CLASS/FILE: .*\(12 in all\)"):
        index("imagefolder", folder, "layout=class")
    (folder / "train/bird").mkdir()
    with pytest.raises(ValueError, match="class folders without images: train/bird"):
        index("imagefolder", folder)
    write(folder / "train/bird/notes.txt", "no bird")
    with pytest.raises(ValueError, match="class folders without images: train/bird"):
        index("imagefolder", folder)


# ---------------------------------------------------------------- ImageNet


def test_imagenet_from_a_tar_of_tars_and_the_devkits_ground_truth(imagenet):
    rows, found = index("imagenet", imagenet)
    ordered = sorted(WNIDS)
    assert counts(rows, "wnid") == {
        **{("train", wnid): 3 - i for i, wnid in enumerate(ordered)},
        **{("validation", wnid): 2 for wnid in ordered},
    }
    assert all(
        row["label"] == ordered.index(row["wnid"]) and row["label_name"] == WNIDS[row["wnid"]]
        for row in rows
    )
    assert found.info == {"labels": [WNIDS[wnid] for wnid in ordered], "wnids": ordered}
    of_validation = {
        row["path"][-10:-5]: row["wnid"] for row in rows if row["split"] == "validation"
    }
    assert [of_validation[f"{i:05d}"] for i in range(1, 7)] == [
        list(WNIDS)[i - 1] for i in (1, 2, 3, 3, 2, 1)
    ], "numbers are the devkit's, not the sorted ones"


def test_imagenet_from_folders_and_kaggles_files(imagenet, tmp_path):
    rows, _ = index("imagenet", imagenet)
    wanted = counts(rows, "wnid")
    kaggle = tmp_path / "kaggle"
    lines = ["ImageId,PredictionString"]
    reader = archives.Reader()
    for row in rows:
        data, name = (
            reader(row["_uri"], row["_member"], row["_offset"], row["_size"]),
            row["path"].rpartition("/")[2],
        )
        if row["split"] == "train":
            write(kaggle / "ILSVRC/Data/CLS-LOC/train" / row["wnid"] / name, data)
        else:
            write(kaggle / "ILSVRC/Data/CLS-LOC/val" / name, data)
            lines.append(f"{name[:-5]},{row['wnid']} 1 2 3 4 ")
    write(kaggle / "LOC_val_solution.csv", "\n".join(lines))
    write(
        kaggle / "LOC_synset_mapping.txt",
        "".join(f"{wnid} {WNIDS[wnid]}, another word\n" for wnid in sorted(WNIDS)),
    )
    again, _ = index("imagenet", kaggle)
    assert counts(again, "wnid") == wanted
    assert {(row["wnid"], row["label"], row["label_name"]) for row in again} == {
        (row["wnid"], row["label"], row["label_name"]) for row in rows
    }
    per_class = tmp_path / "tars"
    for wnid in WNIDS:
        write(per_class / f"train/{wnid}.tar", tar({f"{wnid}_1.JPEG": encoded(1)}))
        write(per_class / f"val/{wnid}/ILSVRC2012_val_00000001.JPEG", encoded(2))
    assert counts(index("imagenet", per_class)[0], "label") == {
        (split, i): 1 for split in ("train", "validation") for i in range(3)
    }
    assert counts(index("imagenet", per_class, "val=none")[0], "label_name") == {
        ("train", wnid): 1 for wnid in WNIDS
    }


def test_imagenet_from_the_files_of_2012_alone(imagenet):
    """The devkit of 2012 says its order in MATLAB's meta.mat, where inner synsets, which are no
    classes, follow the leaves.
    """
    from scipy.io import savemat

    before, _ = index("imagenet", imagenet)
    shutil.rmtree(imagenet / "devkit")
    kind = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("num_children", object),
    ]
    leaves = [
        (i, wnid, f"{name}, another word", 0) for i, (wnid, name) in enumerate(WNIDS.items(), 1)
    ]
    meta = imagenet / "ILSVRC2012_devkit_t12/data/meta.mat"
    savemat(meta, {"synsets": np.array([*leaves, (4, "n00001740", "entity", 3)], dtype=kind)})
    after, info = index("imagenet", imagenet)
    assert after == before and len(info.info["labels"]) == len(WNIDS)
    meta.write_bytes(b"no MATLAB file")
    with pytest.raises(ValueError, match=r"not the devkit's meta\.mat"):
        index("imagenet", imagenet)


def test_imagenet_files_that_do_not_fit(imagenet, tmp_path):
    truth = imagenet / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n2\n3\n")
    with pytest.raises(
        ValueError, match=r"no class for ILSVRC2012_val_00000004\.JPEG.*00000006\.JPEG"
    ):
        index("imagenet", imagenet)
    truth.write_text("1\n2\n3\n4\n2\n1\n")
    with pytest.raises(
        ValueError, match=r"numbers that the devkit's map_clsloc\.txt or meta\.mat does not have: 4"
    ):
        index("imagenet", imagenet)
    truth.write_text("1\n2\n3\n3\n2\none\n")
    with pytest.raises(ValueError, match=r"meta\.mat does not have: one"):
        index("imagenet", imagenet)
    solution = write(imagenet / "LOC_val_solution.csv", "ImageId,Prediction\n")
    with pytest.raises(ValueError, match="no column 'PredictionString'; did you mean Prediction"):
        index("imagenet", imagenet)
    solution.write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001\nILSVRC2012_val_00000002,fox 1 2 3 4\n"
    )
    with pytest.raises(
        ValueError,
        match="no WordNet id: ILSVRC2012_val_00000001: '', ILSVRC2012_val_00000002: 'fox'",
    ):
        index("imagenet", imagenet)
    solution.unlink()
    shutil.rmtree(imagenet / "devkit")
    with pytest.raises(
        ValueError, match=r"which meta\.mat or map_clsloc\.txt says: put one of them"
    ):
        index("imagenet", imagenet)
    truth.unlink()
    with pytest.raises(
        ValueError, match=r"without class folders need LOC_val_solution\.csv.*val=none"
    ):
        index("imagenet", imagenet)
    write(imagenet / "synset_words.txt", "n01440764 tench\nn02100735 setter\n")
    with pytest.raises(ValueError, match="does not name: n02119789"):
        index("imagenet", imagenet, "val=none")
    write(imagenet / "cats/cat/1.jpg", encoded(1))
    with pytest.raises(ValueError, match=r"not in a folder called by a WordNet id .*: cat/1\.jpg"):
        index("imagenet", imagenet, "val=none", "train=cats")
    write(
        imagenet / "empty.tar",
        tar({"n01440764.tar": tar({"n01440764_1.JPEG": encoded(1)}), "n02100735.tar": tar({})}),
    )
    with pytest.raises(ValueError, match="class folders without images: n02100735"):
        index("imagenet", imagenet, "val=none", "train=empty.tar")
    with pytest.raises(ValueError, match="neither training nor validation images"):
        index("imagenet", tmp_path / "nothing")


# ---------------------------------------------------------------- WebDataset


def test_webdataset_shards(webdataset):
    rows, found = index("webdataset", webdataset)
    assert counts(rows, "label") == {
        ("train", 0): 4,
        ("train", 1): 2,
        ("validation", 0): 1,
        ("validation", 1): 1,
    }
    assert json.loads(rows[0]["json"]) == {"name": "class 0", "id": 0}
    ranged, _ = index(
        "webdataset",
        webdataset / "train-{000..001}.tar",
        "label=json.name",
        "label_name=json.id",
        "split=test",
    )
    assert counts(ranged, "label") == {("test", "class 0"): 4, ("test", "class 1"): 2}
    assert {row["label_name"] for row in ranged} == {"0", "1", "2"}
    assert len(index("webdataset", f"{webdataset}/train-*.tar")[0]) == 6
    assert found.notes["samples without an image, left out"] == 0


def test_the_folder_of_a_webdataset_shard_tells_its_split(webdataset, tmp_path):
    shutil.move(webdataset, tmp_path / "dev/val-shards")
    for shard in (tmp_path / "dev/val-shards").glob("*.tar"):
        shard.rename(shard.with_name(f"part-{shard.name.partition('-')[2][:3]}{shard.stem[0]}.tar"))
    rows, _ = index("webdataset", tmp_path / "dev/val-shards")
    assert {row["split"] for row in rows} == {"validation"}


def test_webdataset_shards_may_be_gzipped(webdataset):
    wanted = counts(index("webdataset", webdataset)[0], "label")
    for shard in webdataset.glob("*.tar"):
        write(webdataset / f"{shard.name}.gz", gzip.compress(shard.read_bytes()))
        shard.unlink()
    assert counts(index("webdataset", webdataset)[0], "label") == wanted


def test_webdataset_captions_and_samples_of_other_parts(tmp_path):
    members = {
        "a.jpg": encoded(1),
        "a.txt": "a caption é".encode(),
        "b.txt": b"without a picture",
        "c.PNG": encoded(2, form="PNG"),
        "c.seg.npy": b"x",
        "c.gif": encoded(3, form="GIF"),
    }
    write(tmp_path / "s/0.tar", tar(members))
    rows, found = index("webdataset", tmp_path / "s", "label=")
    assert [(row["key"], row["text"], row["path"]) for row in rows] == [
        ("a", "a caption é", "0.tar/a.jpg"),
        ("c", None, "0.tar/c.PNG"),
    ]
    assert "label" not in rows[0]
    assert found.notes == {
        "shards": 1,
        "samples without an image, left out": 1,
        "parts left out": {"seg.npy": 1, "gif": 1},
    }
    with pytest.raises(
        ValueError, match=r"0\.tar:a: no part cls for the label \(it has jpg, txt\)"
    ):
        index("webdataset", tmp_path / "s")
    with pytest.raises(ValueError, match=r"write cls, txt or json\.FIELD"):
        index("webdataset", tmp_path / "s", "label=name")
    write(tmp_path / "j/0.tar", tar({"a.jpg": encoded(1), "a.json": b"{}"}))
    with pytest.raises(ValueError, match=r"0\.tar:a: its json has no 'name'"):
        index("webdataset", tmp_path / "j", "label=json.name")
    with pytest.raises(ValueError, match=r"shards that are not there: .*1\.tar, .*2\.tar"):
        index("webdataset", tmp_path / "s/{0..2}.tar", "label=")
    with pytest.raises(ValueError, match=r"no \.tar shards"):
        index("webdataset", tmp_path / "nothing")
    with pytest.raises(ValueError, match="two parts jpg"):
        index(
            "webdataset",
            write(tmp_path / "two.tar", tar({"a.jpg": encoded(1), "a.JPG": encoded(2)})),
        )


# ---------------------------------------------------------------- ChestX-ray14


def test_chestxray14_keeps_findings_patients_and_the_official_lists(chest):
    rows, found = index("chestxray14", chest)
    by_name = {row["path"].rpartition("/")[2]: row for row in rows}
    assert by_name["00000001_000.png"]["findings"] == ["Cardiomegaly", "Effusion"]
    assert by_name["00000001_001.png"]["findings"] == [], "No Finding"
    assert {
        name: (row["split"], row["patient_id"], row["age"], row["sex"])
        for name, row in by_name.items()
    } == {
        "00000001_000.png": ("train", 1, 58, "M"),
        "00000001_001.png": ("train", 1, 59, "M"),
        "00000002_000.png": ("train", 2, 81, "F"),
        "00000003_000.png": ("train", 3, 74, "F"),
        "00000004_000.png": ("test", 4, 66, "M"),
        "00000004_001.png": ("test", 4, 66, "M"),
    }
    assert found.notes["patients"] == 4 and found.notes["split"] == "the official lists"
    assert {row["split"] for row in index("chestxray14", chest, "lists=none")[0]} == {"train"}


@pytest.mark.parametrize(
    ("written", "years"),
    [
        ("058Y", 58),
        ("007M", 0),
        ("025M", 2),
        ("013D", 0),
        ("000Y", 0),
        ("57", 57),
        ("", None),
        ("old", None),
    ],
)
def test_chestxray14_ages_are_years(chest, written, years):
    """The table of 2017 has ages of children in months and days; a 7-month-old is not seven."""
    table = chest / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("081Y", written))
    assert [row["age"] for row in index("chestxray14", chest)[0] if row["patient_id"] == 2] == [
        years
    ]


def test_chestxray14_files_that_do_not_fit(chest):
    table, test = chest / "Data_Entry_2017.csv", chest / "test_list.txt"
    text, listed = table.read_text(), test.read_text()
    test.write_text(listed.replace("00000004_001.png", ""))
    with pytest.raises(
        ValueError, match=r"csv: neither official list names the images of line 7; use the lists"
    ):
        index("chestxray14", chest)
    (chest / "train_val_list.txt").write_text(
        (chest / "train_val_list.txt").read_text() + "00000004_001.png\n"
    )
    with pytest.raises(
        ValueError,
        match=r"csv: 1 patient has images in both official lists: those of lines 6, 7; a patient's",
    ):
        index("chestxray14", chest)
    test.write_text(listed)
    with pytest.raises(
        ValueError, match=r"test_list\.txt: the other list names the images of line 2 too"
    ):
        index("chestxray14", chest)
    test.unlink()
    with pytest.raises(ValueError, match=r"test_list\.txt is not there"):
        index("chestxray14", chest)
    table.write_bytes(text.replace("PA,", "P\xc4,").encode("latin-1"))
    with pytest.raises(ValueError, match=r"Data_Entry_2017\.csv:\d+: .*not UTF-8 text"):
        index("chestxray14", chest)
    table.write_text(text.replace("Patient ID", "Patient"))
    with pytest.raises(ValueError, match="no column 'Patient ID'; did you mean Patient"):
        index("chestxray14", chest)
    table.write_text(text.replace("Hernia|Mass", "Hernja|Mass"))
    with pytest.raises(
        ValueError, match=r"csv:6: 'Hernja' is not one of the 14 findings; did you mean Hernia"
    ):
        index("chestxray14", chest)
    table.write_text(text)
    (chest / "images_001/images/00000001_000.png").unlink()
    with pytest.raises(ValueError, match=r"csv: the images of line 2 are not below .*missing=skip"):
        index("chestxray14", chest, "lists=none")
    rows, found = index("chestxray14", chest, "lists=none", "missing=skip")
    assert len(rows) == 5 and found.notes["rows of the CSV without an image"] == 1


def test_a_broken_image_of_chestxray14_is_named_by_its_line(chest, tmp_path):
    (chest / "images_001/images/00000001_000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"line 2 of the table: ") as caught:
        conftest.prepare("chestxray14", chest, tmp_path / "out", max_bad=0)
    assert "00000001" not in str(caught.value)


def test_no_error_about_chestxray14_names_an_image_or_a_patient(chest):
    """The name of an image begins with the patient's number."""
    table, test, train = (
        chest / name for name in ("Data_Entry_2017.csv", "test_list.txt", "train_val_list.txt")
    )
    written = {file: file.read_text() for file in (table, test, train)}
    image = chest / "images_001/images/00000001_000.png"

    def error_after(change) -> str:
        change()
        with pytest.raises(ValueError) as caught:
            index("chestxray14", chest)
        for file, text in written.items():
            file.write_text(text)
        return str(caught.value).replace(str(chest), "")

    errors = [
        error_after(lambda: test.write_text("\n\n00000004_000.png")),
        error_after(lambda: test.write_text(f"{written[test]}\n00000001_000.png")),
        error_after(
            lambda: (
                test.write_text("00000004_000.png"),
                train.write_text(written[train] + "00000004_001.png\n"),
            )
        ),
        error_after(lambda: write(chest / "again" / image.name, image.read_bytes())),
    ]
    (chest / "again" / image.name).unlink()
    errors.append(error_after(image.unlink))
    assert not [error for error in errors if "0000000" in error or ".png" in error]
    assert "an image is there twice, in again and in images_001/images" in errors[3]


# ---------------------------------------------------------------- COCO


def test_coco_boxes_ids_crowds_and_empty_images(coco):
    rows, found = index("coco", coco)
    by_id = {row["image_id"]: row for row in rows}
    assert {i: row["split"] for i, row in by_id.items()} == {
        1: "train",
        2: "train",
        3: "train",
        9: "validation",
    }
    assert (by_id[1]["boxes"], by_id[1]["labels"], by_id[1]["crowd"]) == (
        [[4.5, 6, 10, 12], [3, 5, 27, 15]],
        [90, 1],
        [False, True],
    )
    assert by_id[1]["label_names"] == ["toothbrush", "person"]
    assert (by_id[2]["boxes"], by_id[2]["labels"]) == ([[30, 20, 10, 10]], [1]), (
        "cut to the image of 40 x 30; three that cannot be used are dropped"
    )
    assert (by_id[3]["boxes"], by_id[3]["labels"]) == ([], [])
    assert found.notes == {
        "boxes": 4,
        "boxes partly outside the image, cut": 1,
        "boxes without area, dropped": 1,
        "boxes outside the image, dropped": 1,
        "boxes that are not finite, dropped": 1,
        "images without a box": 1,
    }
    assert found.info["categories"] == [
        {"id": 1, "name": "person"},
        {"id": 90, "name": "toothbrush"},
    ]


@pytest.mark.parametrize("place", ["images/train2017", "train2017.zip", "images"])
def test_coco_images_elsewhere(coco, place):
    names = sorted((coco / "train2017").iterdir())
    if place.endswith(".zip"):
        with zipfile.ZipFile(coco / place, "w") as archive:
            for name in names:
                archive.write(name, f"train2017/{name.name}")
    else:
        for name in names:
            write(coco / place / name.name, name.read_bytes())
    shutil.rmtree(coco / "train2017")
    rows, _ = index("coco", coco, "annotations=annotations/instances_train2017.json")
    assert [row["image_id"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "split"),
    [("pets_val", "validation"), ("image_info_test-dev2017", "test"), ("minival2014", "minival")],
)
def test_a_word_of_a_coco_files_name_tells_its_split(coco, name, split):
    (coco / "annotations/instances_train2017.json").rename(coco / f"annotations/{name}.json")
    rows, _ = index("coco", coco, f"annotations=annotations/{name}.json", "images=train2017")
    assert [row["split"] for row in rows] == [split] * 3


def test_coco_files_that_do_not_fit(coco):
    path = coco / "annotations/instances_train2017.json"
    good = json.loads(path.read_text())

    def refused(match: str, *pairs: str, **changes) -> None:
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(ValueError, match=match) as caught:
            index("coco", coco, *pairs)
        assert len(str(caught.value).splitlines()) == 1

    box = good["annotations"][0]
    stray = [{**box, "id": 100 + i, "image_id": 77} for i in range(7)]
    refused(
        r"name an image which is not listed \(annotation ids 100, 101, 102, 103, 104, \.\.\. "
        r"\(7 in all\)\)",
        annotations=[box, *stray],
    )
    found = index("coco", coco, "missing=skip")[1]
    assert found.notes["annotations that name an image which is not listed, left out"] == 7
    refused(
        r"a category that is not listed \(annotation ids 11\)",
        annotations=[{**box, "category_id": 2}],
    )
    assert (
        index("coco", coco, "missing=skip")[1].notes[
            "annotations of a category that is not listed, left out"
        ]
        == 1
    )
    refused(
        r"images without a file \(files gone\.jpg\); say where they are with --set images=, ",
        images=[*good["images"], {"id": 5, "file_name": "gone.jpg", "width": 4, "height": 4}],
    )
    assert len(index("coco", coco, "missing=skip")[0]) == 4
    refused(r"images with the same id: 1", images=[*good["images"], good["images"][0]])
    refused(
        r"instances_[a-z0-9]*\.json: annotations\[0\]\.bbox: Field required; correct the file$",
        annotations=[{k: v for k, v in box.items() if k != "bbox"}],
    )
    refused(
        r"annotations\[0\]\.bbox: List should have at least 4 items.*, not 3 \(got \[1, 2, 3\]\);",
        annotations=[{**box, "bbox": [1, 2, 3]}],
    )
    refused(
        r"images\[0\]\.id: Input should be a valid integer, .* \(got 'a'\);",
        images=[{**good["images"][0], "id": i} for i in ("a", 1.5)],
    )
    refused(
        r"images\[0\]\.width: Input should be a valid integer \(got None\);",
        images=[{**good["images"][0], "width": None}],
    )
    refused(r"categories: Input should be a valid array \(got None\);", categories=None)
    refused(
        "category 90 is 'toothbrush' here and 'brush' in",
        categories=[{"id": 1, "name": "person"}, {"id": 90, "name": "brush"}],
    )
    refused(
        "cannot hold: 300",
        "masks=semantic",
        categories=[*good["categories"], {"id": 300, "name": "x"}],
    )


@pytest.mark.parametrize(
    ("second", "splits"), [("train2014", "train"), ("val2014", "train, validation")]
)
def test_coco_images_of_two_files_are_refused(coco, second, splits):
    annotations = coco / "annotations"
    (coco / "train2017").rename(coco / "images")
    shutil.copy(annotations / "instances_train2017.json", annotations / f"instances_{second}.json")
    with pytest.raises(
        ValueError,
        match=rf"two of the annotation files name: 000001\.jpg \({splits}\), 000002\.jpg .*; an "
        r"image belongs to one split: pass --set annotations=",
    ):
        index("coco", coco)
    assert len(index("coco", coco, "annotations=annotations/instances_*2017.json")[0]) == 4


def test_coco_images_of_one_name_in_folders_of_two_splits_are_two_images(coco):
    path = coco / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("000009.jpg", "000001.jpg"))
    write(coco / "val2017/000001.jpg", (coco / "val2017/000009.jpg").read_bytes())
    rows, _ = index("coco", coco)
    assert [(row["image_id"], row["split"]) for row in rows if row["path"] == "000001.jpg"] == [
        (1, "train"),
        (9, "validation"),
    ]


# ---------------------------------------------------------------- options


def test_options_are_texts_of_known_names():
    assert importing.options_of("coco", ["masks=semantic"]).masks == "semantic"
    with pytest.raises(ValueError, match="importer coco has no option 'mask'; did you mean masks"):
        importing.options_of("coco", ["mask=semantic"])
    with pytest.raises(
        ValueError, match="masks=yes: input should be 'none', 'semantic' or 'instance'"
    ):
        importing.options_of("coco", ["masks=yes"])
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        importing.options_of("coco", ["masks"])
    with pytest.raises(ValueError, match="unknown importer 'cocoo'; did you mean coco"):
        importing.options_of("cocoo", [])


class TwoEnds(registry.Options):
    first: int = 0
    last: int = 0

    @model_validator(mode="after")
    def _check(self):
        if self.last < self.first:
            raise ValueError("last is before First")
        return self


def test_what_is_wrong_with_several_options_is_said_as_the_importer_says_it():
    with pytest.raises(ValueError, match=r"^--set: last is before First$"):
        importing.validated(TwoEnds, {"first": "2"})


def test_every_importer_says_what_it_reads_and_its_options():
    lines = importing.describe(None).splitlines()
    names = registry.names("importer")
    assert [line.split()[0] for line in lines[: len(names)]] == names
    for name in names:
        explained = importing.describe(name)
        assert explained.startswith(f"{name}\n")
        assert all(
            f"--set {field}=" in explained
            for field in registry.entry("importer", name).options.model_fields
            if field != "options"
        )


def test_the_options_of_each_cohort_are_explained():
    explained = importing.describe("cohort")
    for task in registry.names("cohort"):
        part = explained.partition(f"With --set task={task}:\n")[2].partition("With --set")[0]
        for option in registry.entry("cohort", task).options.model_fields:
            assert f"  --set {option}=" in part
    assert "  --set history=true\n" in explained  # as one writes it
