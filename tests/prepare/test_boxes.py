"""Pascal VOC, YOLO, CVAT and Label Studio: the boxes that COCO's file gives, written in their layouts."""

import io
import itertools
import json
import re
import unicodedata

import numpy as np
import PIL.Image
import pytest
from prepare import conftest
from prepare.conftest import encoded, read, reasons, summary, tar, write
from pycocotools import mask as coco_mask

from pipeline.prepare.importers import labelstudio as label_studio
from pipeline.prepare.readers.picture_check import resize_nearest

CLASSES = ("bird", "boat", "cat")
SIZE = (40, 30)
OBJECTS = {
    "train": {"a": [(0, 4.0, 6.0, 10.0, 12.0), (2, 0.0, 0.0, 40.0, 30.0)], "b": []},
    "val": {"c": [(1, 30.0, 20.0, 10.0, 10.0)]},
}
"""(class, x, y, width, height) in pixels by split and image."""


def prepare(name, source, output, *pairs, **settings):
    conftest.prepare(name, source, output, *pairs, **settings)
    return {row["path"].rpartition("/")[2]: row for row in read(output)}


def pictures():
    for number, (split, name) in enumerate(
        (split, name) for split, images in OBJECTS.items() for name in images
    ):
        yield split, name, encoded(number, SIZE)


def coco(root):
    for split, name, data in pictures():
        write(root / split / f"{name}.jpg", data)
    for split, images in OBJECTS.items():
        listed = [
            {"id": i, "file_name": f"{name}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for i, name in enumerate(images)
        ]
        boxes = [
            {"id": 10 * i + j, "image_id": i, "category_id": label, "bbox": box}
            for i, objects in enumerate(images.values())
            for j, (label, *box) in enumerate(objects)
        ]
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
        found = {"images": listed, "annotations": boxes, "categories": categories}
        write(root / f"annotations/instances_{split}.json", json.dumps(found))
    return root


def annotation(name, objects, origin=1):
    listed = "".join(
        f"<object><name>{CLASSES[label]}</name><difficult>{int(label == 2)}</difficult><bndbox>"
        f"<xmin>{x + origin:g}</xmin><ymin>{y + origin:g}</ymin><xmax>{x + w:g}</xmax>"
        f"<ymax>{y + h:g}</ymax></bndbox></object>"
        for label, x, y, w, h in objects
    )
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{listed}</annotation>"


def voc(root, origin=1):
    for split, name, data in pictures():
        write(root / f"JPEGImages/{name}.jpg", data)
        write(root / f"Annotations/{name}.xml", annotation(name, OBJECTS[split][name], origin))
    for split, images in OBJECTS.items():
        write(root / f"ImageSets/Main/{split}.txt", "".join(f"{name}\n" for name in images))
        write(root / f"ImageSets/Main/cat_{split}.txt", "".join(f"{name} -1\n" for name in images))
    write(root / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    return root


def lines(objects):
    width, height = SIZE
    return "".join(
        f"{label} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
        for label, x, y, w, h in objects
    )


def yolo(root, image="images/{split}/{name}.jpg", text="labels/{split}/{name}.txt"):
    for split, name, data in pictures():
        write(root / image.format(split=split, name=name), data)
        if objects := OBJECTS[split][name]:
            write(root / text.format(split=split, name=name), lines(objects))
    write(root / "data.yaml", f"path: elsewhere\ntrain: images/train\nnames: {list(CLASSES)}\n")
    return root


def cvat(root):
    images = "".join(
        f'<image id="{number}" name="{name}.jpg" subset="{split}" width="{SIZE[0]}" '
        f'height="{SIZE[1]}">'
        + "".join(
            f'<box label="{CLASSES[label]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}" />'
            for label, x, y, w, h in OBJECTS[split][name]
        )
        + "</image>"
        for number, (split, name, _) in enumerate(pictures())
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    for _, name, data in pictures():
        write(root / f"images/{name}.jpg", data)
    write(
        root / "annotations.xml",
        f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
        f"{images}</annotations>",
    )
    return root


def percent(x, y, w, h):
    return {
        "x": 100 * x / SIZE[0],
        "y": 100 * y / SIZE[1],
        "width": 100 * w / SIZE[0],
        "height": 100 * h / SIZE[1],
    }


def result(kind, names, value):
    return {
        "type": kind,
        "original_width": SIZE[0],
        "original_height": SIZE[1],
        "value": {**value, kind: list(names)},
    }


def labelstudio(root):
    tasks = []
    for number, (split, name, data) in enumerate(pictures()):
        write(root / f"media/{split}/{name}.jpg", data)
        results = [
            result("rectanglelabels", [CLASSES[label]], percent(*box))
            for label, *box in OBJECTS[split][name]
        ]
        url = f"/data/upload/3/0a1b2c3{number}-{name}.jpg"
        tasks.append({"id": number, "data": {"image": url}, "annotations": [{"result": results}]})
    write(root / "project.json", json.dumps(tasks))
    return root


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, row in wanted.items():
        for column in ("labels", "label_names", "crowd", "split", "image", "width", "sha256"):
            assert found[name][column] == row[column], (name, column)
        assert np.allclose(found[name]["boxes"] or 0, row["boxes"] or 0, atol=1e-4), name


@pytest.mark.parametrize("settings", [{}, {"resize": 16}], ids=["as they are", "resized"])
def test_the_rows_are_those_of_coco(tmp_path, settings):
    wanted = prepare("coco", coco(tmp_path / "coco"), tmp_path / "c", **settings)
    found = prepare("voc", voc(tmp_path / "voc"), tmp_path / "v", "difficult=count", **settings)
    same(found, wanted)
    assert found["a.jpg"]["difficult"] == [False, True]
    for name, make in (("yolo", yolo), ("cvat", cvat), ("labelstudio", labelstudio)):
        same(prepare(name, make(tmp_path / name), tmp_path / f"{name}-out", **settings), wanted)
    assert {name: row["split"] for name, row in wanted.items()} == {
        "a.jpg": "train",
        "b.jpg": "train",
        "c.jpg": "validation",
    }


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("{split}/images/{name}.jpg", "{split}/labels/{name}.txt"),
        ("{split}/{name}.jpg", "{split}/{name}.txt"),
        ("images/{split}/images/{name}.jpg", "images/{split}/labels/{name}.txt"),
        ("images/{split}2017/{name}.jpg", "labels/{split}2017/{name}.txt"),
        ("train/images/{split}/{name}.jpg", "train/labels/{split}/{name}.txt"),
        ("obj_{split}_data/{name}.jpg", "obj_{split}_data/{name}.txt"),
    ],
    ids=["Roboflow", "beside", "folders of one name", "years", "in a folder called train", "CVAT"],
)
def test_yolo_layouts(tmp_path, image, text):
    wanted = prepare("coco", coco(tmp_path / "coco"), tmp_path / "c")
    same(prepare("yolo", yolo(tmp_path / "yolo", image, text), tmp_path / "y"), wanted)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("annotations/instances_val2017.json", "validation"),
        ("annotations/instances_minival2014.json", "minival"),
        ("annotations/instances_default.json", "train"),
        ("valid/_annotations.coco.json", "validation"),
        ("test/instances.json", "test"),
    ],
)
def test_the_split_of_cocos_files_is_told_by_their_name_or_folder(tmp_path, path, split):
    root = coco(tmp_path / "coco")
    for path_of_images in root.glob("*/*.jpg"):
        write(root / "images" / path_of_images.name, path_of_images.read_bytes())
    file = write(root / path, (root / "annotations/instances_train.json").read_text())
    pattern = f"*/{file.name}"
    prepare("coco", root, tmp_path / "out", f"annotations={pattern}", "images=images")
    assert {row["split"] for row in read(tmp_path / "out")} == {split}


def test_roboflows_annotations_are_beside_the_images_of_each_split(tmp_path):
    published = coco(tmp_path / "coco")
    root = tmp_path / "roboflow"
    for split, name, data in pictures():
        write(root / split / f"{name}.jpg", data)
        annotations = (published / f"annotations/instances_{split}.json").read_text()
        write(root / split / "_annotations.coco.json", annotations)
    wanted = prepare("coco", published, tmp_path / "c")
    same(prepare("coco", root, tmp_path / "r"), wanted)


def test_archives_years_and_edges_from_zero(tmp_path):
    wanted = prepare("coco", coco(tmp_path / "coco"), tmp_path / "c")
    root = voc(tmp_path / "VOC2007", origin=0)
    members = {
        f"VOCdevkit/{path.relative_to(tmp_path)}": path.read_bytes()
        for path in sorted(root.rglob("*.*"))
    }
    packed = write(tmp_path / "voc.tar", tar(members))
    same(prepare("voc", packed, tmp_path / "v", "origin=0", "difficult=count"), wanted)


def rows_of_voc(root, tmp_path):
    """The image, the split and the names of each row, by path."""
    prepare("voc", root, tmp_path / "out")
    rows = read(tmp_path / "out")
    return {row["path"]: (row["image"], row["split"], row["label_names"]) for row in rows}


@pytest.mark.parametrize("form", ["coco", "yolo", "cvat", "labelstudio"])
def test_names_of_images_may_be_composed_differently(tmp_path, form):
    """macOS writes é as e and an accent, the annotations may have one letter."""
    make = {"coco": coco, "yolo": yolo, "cvat": cvat, "labelstudio": labelstudio}[form]
    root = make(tmp_path / form)
    for path in [*root.glob("**/a.jpg"), *root.glob("**/a.txt")]:
        path.rename(path.with_stem(unicodedata.normalize("NFD", "é")))
    for path in (*root.glob("**/*.json"), *root.glob("*.xml")):
        path.write_text(path.read_text().replace("a.jpg", "é.jpg"))
    row = prepare(form, root, tmp_path / "out")["é.jpg"]
    assert row["label_names"] == ["bird", "cat"]


def test_masks_of_voc_are_no_photographs(tmp_path):
    root = voc(tmp_path / "voc")
    for folder in ("SegmentationClass", "SegmentationObject"):
        write(root / folder / "a.png", encoded(9, SIZE, "PNG", "L"))
    wanted = prepare("coco", coco(tmp_path / "coco"), tmp_path / "c")
    same(prepare("voc", root, tmp_path / "v", "difficult=count"), wanted)


def test_difficult_objects_of_voc_are_crowds(tmp_path):
    found = prepare("voc", voc(tmp_path / "voc"), tmp_path / "v")
    assert found["a.jpg"]["crowd"] == found["a.jpg"]["difficult"] == [False, True]
    notes = summary(tmp_path / "v")["notes"]
    assert notes["difficult objects"] == 1


@pytest.mark.parametrize("folder", ["", "deep/"], ids=["beside", "deeper"])
def test_files_of_one_name_in_several_splits_of_voc(tmp_path, folder):
    root = tmp_path / "voc"
    for number, split in enumerate(("train", "valid", "test")):
        write(root / f"{folder}{split}/0001.jpg", encoded(number, SIZE))
        objects = [(number, 1.0, 2.0, 3.0, 4.0)]
        write(root / f"{folder}{split}/0001.xml", annotation("0001", objects))
    assert rows_of_voc(root, tmp_path) == {
        f"{folder}train/0001.jpg": (encoded(0, SIZE), "train", ["bird"]),
        f"{folder}valid/0001.jpg": (encoded(1, SIZE), "validation", ["boat"]),
        f"{folder}test/0001.jpg": (encoded(2, SIZE), "test", ["cat"]),
    }
    (root / f"{folder}train/0001.jpg").unlink()
    (root / f"{folder}test/0001.jpg").unlink()
    with pytest.raises(ValueError, match=r"test/0001\.xml and .*train/0001\.xml are both of"):
        prepare("voc", root, tmp_path / "v")


def test_the_folder_of_an_image_tells_its_split_where_voc_has_no_lists(tmp_path):
    root = tmp_path / "voc"
    for number, split in enumerate(("train", "test")):
        write(root / split / f"{number}.jpg", encoded(number, SIZE))
        write(root / f"Annotations/{number}.xml", annotation(number, []))
    found = prepare("voc", root, tmp_path / "v")
    assert {name: row["split"] for name, row in found.items()} == {
        "0.jpg": "train",
        "1.jpg": "test",
    }


def test_images_that_no_list_of_voc_names_are_left_out_and_counted(tmp_path):
    root = voc(tmp_path / "voc")
    for name in ("b 1", "held out"):
        write(root / f"JPEGImages/{name}.jpg", encoded(7, SIZE))
        write(root / f"Annotations/{name}.xml", annotation(name, []))
    write(root / "ImageSets/Main/val.txt", "c  1\nb 1\n")
    found = prepare("voc", root, tmp_path / "v")
    assert {name: row["split"] for name, row in found.items()} == {
        "a.jpg": "train",
        "b.jpg": "train",
        "c.jpg": "validation",
        "b 1.jpg": "validation",
    }
    notes = summary(tmp_path / "v")["notes"]
    assert notes["images that ImageSets/Main does not list, left out"] == 1
    for split in ("train", "val", "trainval"):
        write(root / f"ImageSets/Main/{split}.txt", "other\n")
    with pytest.raises(ValueError, match="name none of its annotations"):
        prepare("voc", root, tmp_path / "w")


@pytest.mark.parametrize("numbers", [2, 3])
def test_keypoints_behind_a_box_are_no_polygon(tmp_path, numbers):
    wanted = prepare("coco", coco(tmp_path / "coco"), tmp_path / "c")
    root = yolo(tmp_path / "yolo")
    for path in root.glob("labels/*/*.txt"):
        points = " ".join(["0.1"] * 2 * numbers)
        path.write_text("".join(f"{line} {points}\n" for line in path.read_text().splitlines()))
    with (root / "data.yaml").open("a") as file:
        file.write(f"kpt_shape: [2, {numbers}]\n")
    same(prepare("yolo", root, tmp_path / "y"), wanted)
    write(root / "labels/train/a.txt", "0 0.1 0.1 0.2 0.2 0.3 0.3\n")
    with pytest.raises(ValueError, match=rf"is not CLASS X Y.* and {2 * numbers} numbers"):
        prepare("yolo", root, tmp_path / "z")


def test_splits_of_yolo_that_no_folder_tells_are_refused(tmp_path):
    root = yolo(tmp_path / "yolo", "images/{name}.jpg", "labels/{name}.txt")
    found = prepare("yolo", root, tmp_path / "y")
    assert {row["split"] for row in found.values()} == {"train"}
    with (root / "data.yaml").open("a") as file:
        file.write("val: val.txt\n")
    with pytest.raises(ValueError, match=r"of which split is images/a\.jpg.*'val': 'val.txt'"):
        prepare("yolo", root, tmp_path / "z")


@pytest.mark.parametrize("held_out", ["valid.txt", "rest.txt"])
def test_lists_of_darknet_tell_the_splits(tmp_path, held_out):
    root = yolo(tmp_path / "yolo", "obj/{name}.jpg", "obj/{name}.txt")
    (root / "data.yaml").unlink()
    write(root / "obj.names", "\n".join(CLASSES))
    write(root / "obj.data", f"classes = 3\ntrain = data/train.txt\nvalid = data/{held_out}\n")
    write(root / "train.txt", "data/obj/a.jpg\ndata/obj/b.jpg\n")
    write(root / held_out, "data/obj/c.jpg\n")
    found = prepare("yolo", root, tmp_path / "y")
    assert {name: row["split"] for name, row in found.items()} == {
        "a.jpg": "train",
        "b.jpg": "train",
        "c.jpg": "validation",
    }
    (root / "obj").rename(root / "obj_train_data")
    for name in ("train.txt", held_out):
        write(root / name, (root / name).read_text().replace("/obj/", "/obj_train_data/"))
    moved = prepare("yolo", root, tmp_path / "moved")
    assert {name: row["split"] for name, row in moved.items()}["c.jpg"] == "validation"
    (root / "obj_train_data").rename(root / "train")
    write(root / held_out, "data/train/c.jpg\n")
    with pytest.raises(ValueError, match="folder of train, and a list names it for validation"):
        prepare("yolo", root, tmp_path / "z")
    (root / "train").rename(root / "obj")
    write(root / held_out, "data/obj/b.jpg\n")
    write(root / "train.txt", "data/obj/a.jpg\ndata/obj/b.jpg\n")
    with pytest.raises(ValueError, match=r"obj/b\.jpg for .*another list for"):
        prepare("yolo", root, tmp_path / "z")
    write(root / held_out, "")
    with pytest.raises(ValueError, match=r"of which split is obj/c\.jpg"):
        prepare("yolo", root, tmp_path / "z")


@pytest.mark.parametrize(
    ("folder", "said"),
    [("eval", "for validation or for test.*Rename the folder"), ("more", "of which split is")],
)
def test_a_folder_beside_train_that_tells_no_split_is_refused(tmp_path, folder, said):
    root = yolo(tmp_path / "yolo")
    for kind in ("images", "labels"):
        (root / kind / "val").rename(root / kind / folder)
    with pytest.raises(ValueError, match=said):
        prepare("yolo", root, tmp_path / "y")


def test_a_split_of_yolo_without_texts_is_refused(tmp_path):
    root = yolo(tmp_path / "yolo")
    (root / "labels/val/c.txt").unlink()
    with pytest.raises(ValueError, match="no image of validation has a text"):
        prepare("yolo", root, tmp_path / "y")


def test_numbers_of_classes_are_those_of_their_lines(tmp_path):
    root = tmp_path / "yolo"
    write(root / "train/a.jpg", encoded(1, SIZE))
    write(root / "train/a.txt", "\ufeff1 0.5 0.5 0.5 0.5\n")
    write(root / "classes.txt", "\ufeffbird\nboat\n\n")
    prepare("yolo", root, tmp_path / "y")
    about = json.loads((tmp_path / "y/_manifest.json").read_text())["about"]
    assert [one["name"] for one in about["categories"]] == ["bird", "boat"]
    for names in ("bird\n\nboat\n", "\nbird\nboat\n"):
        write(root / "classes.txt", names)
        with pytest.raises(ValueError, match=r"classes\.txt: line \d of the names is blank"):
            prepare("yolo", root, tmp_path / "z")


@pytest.mark.parametrize("names", ["[no, Yes, 007]", "{0: no, 1: Yes, 2: 007}"])
def test_names_of_classes_in_a_yaml_are_texts(tmp_path, names):
    root = yolo(tmp_path / "yolo")
    write(root / "data.yaml", f"names: {names}\n")
    found = prepare("yolo", root, tmp_path / "y")
    assert found["a.jpg"]["label_names"] == ["no", "007"]
    assert found["c.jpg"]["label_names"] == ["Yes"]


def test_polygons_names_by_line_and_boxes_outside(tmp_path):
    root = tmp_path / "yolo"
    write(root / "train/a.jpg", encoded(1, SIZE))
    write(root / "train/a.txt", "1 0.25 0.5 0.5 0.5 0.5 1\n0 1.0 0.5 0.5 0.5\n\n0 2 2 0.1 0.1\n")
    write(root / "train/classes.txt", "bird\nboat\n")
    row = prepare("yolo", root, tmp_path / "y")["a.jpg"]
    assert row["label_names"] == ["boat", "bird"]
    assert np.allclose(row["boxes"], [[10, 15, 10, 15], [30, 7.5, 10, 15]])
    notes = summary(tmp_path / "y")["notes"]
    assert notes["boxes outside the image, dropped"] == 1
    assert notes["boxes partly outside the image, cut"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("3 0.5 0.5 0.1 0.1", r"a\.txt:1: '3 0\.5.*of a class from 0 to 2"),
        ("0.5 0.5 0.5 0.1 0.1", "neither CLASS X Y"),
        ("0 0.5 0.5 0.1", "neither CLASS X Y"),
        ("bird 0.5 0.5 0.1 0.1", "neither CLASS X Y"),
        ("0 20 15 40 30", "as if in pixels"),
    ],
)
def test_lines_that_are_none_of_yolo(tmp_path, line, said):
    root = yolo(tmp_path / "yolo")
    write(root / "labels/train/a.txt", line)
    with pytest.raises(ValueError, match=said):
        prepare("yolo", root, tmp_path / "y")


def test_what_is_missing_is_named(tmp_path):
    root = yolo(tmp_path / "yolo")
    (root / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"which file names the classes.*--set names=FILE"):
        prepare("yolo", root, tmp_path / "y")
    root = voc(tmp_path / "voc")
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(ValueError, match=r"without an image.*Annotations/b\.xml.*missing=skip"):
        prepare("voc", root, tmp_path / "v")
    assert prepare("voc", root, tmp_path / "v", "missing=skip").keys() == {"a.jpg", "c.jpg"}
    write(root / "Annotations/a.xml", "<annotation><size><width>4</width></size></annotation>")
    with pytest.raises(ValueError, match=r"a\.xml: no Pascal VOC annotation.*size/height"):
        prepare("voc", root, tmp_path / "w")
    write(root / "Annotations/a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>')
    with pytest.raises(ValueError, match="document type"):
        prepare("voc", root, tmp_path / "w")


def only_row(name, root, tmp_path):
    (row,) = prepare(name, root, tmp_path / "out").values()
    return row, summary(tmp_path / "out")["notes"]


def turned(x, y, width, height, degrees, pivot):
    """The bounds of a turned box, by complex numbers."""
    turn = np.exp(1j * np.radians(degrees))
    corners = np.array([complex(x + a, y + b) for a in (0, width) for b in (0, height)])
    at = complex(*pivot) + (corners - complex(*pivot)) * turn
    low = min(at.real), min(at.imag)
    return [*low, max(at.real) - low[0], max(at.imag) - low[1]]


def turned_ellipse(x, y, radii, degrees):
    """The bounds of a turned ellipse, by its points."""
    angles = np.linspace(0, 2 * np.pi, 100_000)
    points = (radii[0] * np.cos(angles) + 1j * radii[1] * np.sin(angles)) * np.exp(
        1j * np.radians(degrees)
    )
    return [
        x + points.real.min(),
        y + points.imag.min(),
        np.ptp(points.real),
        np.ptp(points.imag),
    ]


def test_other_shapes_and_tags_of_cvat(tmp_path):
    shapes = (
        '<polygon label="cat" points="5.0,6.0;15.5,6.0;9.0,20.0" />'
        '<box label="bird" xtl="10" ytl="10" xbr="20" ybr="14" rotation="30" />'
        '<ellipse label="cat" cx="20" cy="15" rx="4" ry="6" rotation="30" />'
        '<mask label="cat" rle="6" left="1" top="2" width="3" height="2" />'
        '<polyline label="cat" points="1,1;2,2" /><tag label="indoor" />'
    )
    write(
        tmp_path / "in/annotations.xml",
        f'<annotations><image id="0" name="deep/a.jpg" width="40" height="30">{shapes}</image>'
        "</annotations>",
    )
    write(tmp_path / "in/valid/deep/a.jpg", encoded(1, SIZE))
    write(tmp_path / "in/valid/b.jpg", encoded(2, SIZE))
    row, notes = only_row("cvat", tmp_path / "in", tmp_path)
    assert np.allclose(row["boxes"][0], [5, 6, 10.5, 14])
    assert np.allclose(row["boxes"][1], turned(10, 10, 10, 4, 30, (15, 12)), atol=1e-5)
    assert np.allclose(row["boxes"][2], turned_ellipse(20, 15, (4, 6), 30), atol=1e-5)
    assert (row["label_names"], row["labels"]) == (["cat", "bird", "cat"], [1, 0, 1])
    assert (row["tags"], row["tag"], row["split"]) == (["indoor"], "indoor", "validation")
    assert notes == {
        "boxes": 3,
        "polygons, whose bounds are taken": 1,
        "rotated boxes, whose bounds are taken": 1,
        "ellipses, whose bounds are taken": 1,
        "masks without a pixel, left out": 1,
        "shapes of kind polyline, left out": 1,
        "images that the export does not name, left out": 1,
    }


def test_other_results_of_label_studio(tmp_path):
    shapes = [
        result("polygonlabels", ["cat"], {"points": [[10, 20], [50, 20], [30, 80]]}),
        result("rectanglelabels", ["bird"], percent(10, 10, 10, 4) | {"rotation": 30}),
        result(
            "ellipselabels",
            ["cat"],
            {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 30},
        ),
        result("brushlabels", ["cat"], {"rle": rle_pack([0] * 4 * SIZE[0] * SIZE[1])}),
        result("keypointlabels", ["cat"], percent(1, 2, 3, 4)),
        {"type": "choices", "value": {"choices": ["indoor", "night"]}},
    ]
    tasks = [
        {
            "id": 7,
            "data": {"note": "some words", "image": "/data/local-files/?d=deep%2Fa.jpg"},
            "annotations": [
                {"result": [], "was_cancelled": True},
                {"result": []},
                {"result": shapes, "ground_truth": True},
            ],
        },
        {"id": 8, "data": {"image": "https://example.com/b.jpg"}, "annotations": []},
    ]
    write(tmp_path / "in/export.json", json.dumps(tasks))
    write(tmp_path / "in/deep/a.jpg", encoded(1, SIZE))
    row, notes = only_row("labelstudio", tmp_path / "in", tmp_path)
    assert np.allclose(row["boxes"][0], [4, 6, 16, 18])
    assert np.allclose(row["boxes"][1], turned(10, 10, 10, 4, 30, (10, 10)), atol=1e-5)
    assert np.allclose(row["boxes"][2], turned_ellipse(20, 15, (4, 6), 30), atol=1e-5)
    assert row["label_names"] == ["cat", "bird", "cat"]
    assert (row["tags"], row["tag"]) == (["indoor", "night"], None)
    assert notes == {
        "boxes": 3,
        "polygons, whose bounds are taken": 1,
        "rotated boxes, whose bounds are taken": 1,
        "ellipses, whose bounds are taken": 1,
        "brush masks without a pixel, left out": 1,
        "results of kind keypointlabels, left out": 1,
        "further annotations of a task, left out": 1,
        "tasks without an annotation, left out": 1,
    }


def test_choices_of_a_region_are_no_tags_of_the_image(tmp_path):
    box = {**percent(1, 2, 3, 4), "rectanglelabels": ["cat"]}
    of_region = {"type": "choices", "id": "A", "value": {"choices": ["occluded"]}}
    results = [
        {**result("rectanglelabels", ["cat"], box), "id": "A"},
        of_region,
        {**of_region, "id": "B", "value": {**percent(1, 2, 3, 4), "choices": ["cut"]}},
        {"type": "choices", "id": "C", "value": {"choices": ["night"]}},
    ]
    task = {"id": 1, "data": {"image": "a.jpg"}, "annotations": [{"result": results}]}
    write(tmp_path / "in/export.json", json.dumps([task]))
    write(tmp_path / "in/a.jpg", encoded(1, SIZE))
    row, notes = only_row("labelstudio", tmp_path / "in", tmp_path)
    assert (row["label_names"], row["tags"], row["tag"]) == (["cat"], ["night"], "night")
    assert notes["choices of a region, left out"] == 2


def test_tasks_of_several_images_say_which_one_is_meant(tmp_path):
    results = [
        {**result("rectanglelabels", [name], percent(1, 2, 3, 4)), "to_name": name}
        for name in ("left", "right")
    ]
    data = {"thumbnail": "a.jpg", "photograph": "b.jpg"}
    task = {"id": 1, "data": data, "annotations": [{"result": results}]}
    write(tmp_path / "in/export.json", json.dumps([task]))
    for number, name in enumerate("ab"):
        write(tmp_path / f"in/{name}.jpg", encoded(number, SIZE))
    chosen = ["image=photograph", "to_name=right"]
    for pairs, said in (
        (chosen[1:], r"2 fields.*thumbnail, photograph.*--set image="),
        (chosen[:1], r"several objects \(left, right\).*--set to_name="),
        (["image=text"], "no image in text"),
        (["image=photograph", "to_name=rigth"], "no result is on rigth"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare("labelstudio", tmp_path / "in", tmp_path / "none", *pairs)
    found = prepare("labelstudio", tmp_path / "in", tmp_path / "out", *chosen)
    assert {name: row["label_names"] for name, row in found.items()} == {"b.jpg": ["right"]}


def test_images_of_one_name_in_several_subsets_of_cvat(tmp_path):
    images = "".join(
        f'<image id="{number}" name="a.jpg" subset="{subset}" width="40" height="30">'
        f'<box label="{subset}" xtl="1" ytl="2" xbr="3" ybr="4" /></image>'
        for number, subset in enumerate(("Train", "Validation"))
    )
    for number, subset in enumerate(("Train", "Validation")):
        write(tmp_path / f"in/images/{subset}/a.jpg", encoded(number, SIZE))
    write(tmp_path / "in/annotations.xml", f"<annotations>{images}</annotations>")
    prepare("cvat", tmp_path / "in", tmp_path / "out")
    assert {
        (row["image"], row["split"], *row["label_names"]) for row in read(tmp_path / "out")
    } == {
        (encoded(0, SIZE), "train", "Train"),
        (encoded(1, SIZE), "validation", "Validation"),
    }
    write(
        tmp_path / "in/annotations.xml",
        f"<annotations>{images}</annotations>".replace("Train", "Odd"),
    )
    with pytest.raises(ValueError, match=r"subset 'Odd' names no split"):
        prepare("cvat", tmp_path / "in", tmp_path / "out-2")


def test_uploads_of_label_studio_with_the_names_of_its_media_folder(tmp_path):
    root = labelstudio(tmp_path / "in")
    for path in [*root.glob("media/*/?.jpg")]:
        (number,) = (n for n, (_, name, _) in enumerate(pictures()) if name == path.stem)
        path.rename(path.with_name(f"0a1b2c3{number}-{path.name}"))
    found = prepare("labelstudio", root, tmp_path / "out")
    assert len(found) == 3 and sum(len(row["boxes"]) for row in found.values()) == 3


def test_images_of_annotation_tools_that_are_missing_or_of_another_size(tmp_path):
    for name, make, folder in (("cvat", cvat, "images"), ("labelstudio", labelstudio, "media/val")):
        root = make(tmp_path / name)
        (root / folder / "c.jpg").unlink()
        with pytest.raises(ValueError, match=r"not there.*c\.jpg.*missing=skip"):
            prepare(name, root, tmp_path / f"{name}-1")
        found = prepare(name, root, tmp_path / f"{name}-2", "missing=skip")
        assert found.keys() == {"a.jpg", "b.jpg"}
        write(root / folder / "c.jpg", encoded(1, (SIZE[0] + 1, SIZE[1])))
        found = prepare(name, root, tmp_path / f"{name}-3", max_bad=0.5)
        assert found.keys() == {"a.jpg", "b.jpg"}, "boxes of another size are not taken"


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("cvat", "a.xml", "<annotation/>", "no images of CVAT"),
        ("cvat", "a.xml", "<annotations><image", "is no XML"),
        ("cvat", "a.xml", "<!DOCTYPE a><annotations/>", "a document type"),
        ("cvat", "a.txt", "", r"no \.xml file"),
        ("cvat", "a.xml", "<annotations><image name='a'/></annotations>", "no attribute 'width'"),
        ("labelstudio", "a.txt", "", r"There are no \.json files; pass --set annotations"),
        ("labelstudio", "a.json", "[", "is no JSON"),
        ("labelstudio", "a.json", '[{"image": "a.jpg"}]', "no list of tasks.*export.*as JSON"),
        (
            "labelstudio",
            "a.json",
            '[{"data": {"text": "words"}, "annotations": [{"result": []}]}]',
            "task 0: no image in its data.*prepare csv or conll",
        ),
        (
            "labelstudio",
            "a.json",
            '[{"data": {"image": "a.jpg"}, "annotations": [{"result": [{"type": "choices"}]}]}]',
            "task 0: a result of another form",
        ),
    ],
)
def test_what_is_no_export_of_an_annotation_tool(tmp_path, name, file, text, said):
    write(tmp_path / "in" / file, text)
    with pytest.raises(ValueError, match=said):
        prepare(name, tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------- masks

POLYGONS = {"a": [(0, [4, 6, 24, 8, 12, 26]), (2, [30.1, 20.1, 30.3, 20.1, 30.2, 20.3])], "b": []}
"""(class, points in pixels) by image; the second one is smaller than a pixel."""


def with_polygons(root, form):
    for number, name in enumerate(POLYGONS):
        write(root / f"images/train/{name}.jpg", encoded(number, SIZE))
    bounds = [
        (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))
        for _, points in POLYGONS["a"]
    ]
    if form == "coco":
        found = {
            "images": [
                {"id": i, "file_name": f"{name}.jpg", "width": SIZE[0], "height": SIZE[1]}
                for i, name in enumerate(POLYGONS)
            ],
            "annotations": [
                {
                    "id": j,
                    "image_id": 0,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": [points],
                }
                for j, ((label, points), (x0, y0, x1, y1)) in enumerate(
                    zip(POLYGONS["a"], bounds, strict=True)
                )
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
        }
        write(root / "annotations/instances_train.json", json.dumps(found))
        return root
    if form in FORMS:
        FORMS[form](root)
        return root
    for name, objects in POLYGONS.items():
        shares = [
            (label, (np.array(points).reshape(-1, 2) / SIZE).reshape(-1))
            for label, points in objects
        ]
        text = "".join(f"{label} {' '.join(f'{p:.9f}' for p in ps)}\n" for label, ps in shares)
        write(root / f"labels/train/{name}.txt", text)
    write(root / "data.yaml", json.dumps({"names": list(CLASSES)}))
    return root


def bounds_of(points):
    x, y = points[::2], points[1::2]
    return min(x), min(y), max(x) - min(x), max(y) - min(y)


def drawn(points):
    runs = coco_mask.frPyObjects([points], SIZE[1], SIZE[0])
    return coco_mask.decode(coco_mask.merge(runs))


def voc_masks(root):
    """As Pascal VOC has them: a palette's index is the number of the object in the XML."""
    for name, objects in POLYGONS.items():
        boxes = [(label, *bounds_of(points)) for label, points in objects]
        write(root / f"Annotations/{name}.xml", annotation(name, boxes))
        numbers = np.zeros(SIZE[::-1], np.uint8)
        for number, (_, points) in enumerate(objects, 1):
            numbers[drawn(points) > 0] = number
        numbers[0, :5] = 255
        image = PIL.Image.fromarray(numbers, "P")
        image.putpalette(range(256)[::-1])
        sink = io.BytesIO()
        image.save(sink, "PNG")
        write(root / f"SegmentationObject/{name}.png", sink.getvalue())
    for number, name in enumerate(("without", "unlisted")):
        write(root / f"images/train/{name}.jpg", encoded(5 + number, SIZE))
        write(root / f"Annotations/{name}.xml", annotation(name, []))
    write(root / "ImageSets/Main/val.txt", "a\nb\n")
    write(root / "ImageSets/Segmentation/train.txt", "a\nb\nwithout\n")


def cvat_masks(root):
    """Polygons, and in image m the first of them as a mask: runs along the rows of its rectangle."""
    shapes = {
        name: "".join(
            f'<polygon label="{CLASSES[label]}" '
            f'points="{";".join(f"{x},{y}" for x, y in zip(ps[::2], ps[1::2], strict=True))}" />'
            for label, ps in objects
        )
        for name, objects in POLYGONS.items()
    }
    mask = drawn(POLYGONS["a"][0][1])[5:28, 2:30]
    runs = [len([*run]) for _, run in itertools.groupby([0, *mask.reshape(-1)])]
    runs[0] -= 1
    shapes["m"] = (
        f'<mask label="bird" rle="{", ".join(map(str, runs))}" left="2" top="5" width="28" '
        'height="23" />'
    )
    images = "".join(
        f'<image id="0" name="{name}.jpg" width="{SIZE[0]}" height="{SIZE[1]}">{of_image}</image>'
        for name, of_image in shapes.items()
    )
    write(root / "images/train/m.jpg", encoded(2, SIZE))
    write(root / "annotations.xml", f"<annotations>{images}</annotations>")


def rle_pack(words):
    """Run lengths as Label Studio's brush has them, equal words repeated."""
    sizes = (3, 4, 8, 16)
    bits = f"{len(words):032b}{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for word, run in itertools.groupby(words):
        length = len([*run]) - 1
        size = next(i for i in range(4) if length < 2 ** sizes[i])
        bits += f"1{size:02b}{length:0{sizes[size]}b}{word:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def labelstudio_masks(root):
    """Polygons, and in image m the first of them as painted: red, green, blue and opacity."""
    results = {
        name: [
            result(
                "polygonlabels",
                [CLASSES[label]],
                {"points": (np.array(points).reshape(-1, 2) / SIZE * 100).tolist()},
            )
            for label, points in objects
        ]
        for name, objects in POLYGONS.items()
    }
    words = (drawn(POLYGONS["a"][0][1])[..., None] * [9, 200, 200, 255]).reshape(-1).tolist()
    results["m"] = [result("brushlabels", ["bird"], {"format": "rle", "rle": rle_pack(words)})]
    write(root / "images/train/m.jpg", encoded(2, SIZE))
    tasks = [
        {"data": {"image": f"/data/local-files/?d={name}.jpg"}, "annotations": [{"result": one}]}
        for name, one in results.items()
    ]
    write(root / "project.json", json.dumps(tasks))


FORMS = {"voc": voc_masks, "cvat": cvat_masks, "labelstudio": labelstudio_masks}


@pytest.mark.parametrize("form", ["coco", "yolo", *FORMS])
@pytest.mark.parametrize("resize", [None, 16])
def test_masks_of_objects_are_written_in_the_size_of_the_image(tmp_path, form, resize):
    source = with_polygons(tmp_path / "raw", form)
    rows = prepare(form, source, tmp_path / "out", "masks=instance", resize=resize)
    assert {name[0] for name in rows} == {*"ab", *("m" if form in ("cvat", "labelstudio") else "")}
    assert {row["split"] for row in rows.values()} == {"train"}
    row = rows["a.jpg"]
    assert row["label_names"] == ["bird", "cat"] and rows["b.jpg"]["masks"] == []
    large, small = (coco_mask.decode(rle).astype(bool) for rle in row["masks"])
    assert large.shape == small.shape == (row["height"], row["width"])
    wanted = resize_nearest(drawn(POLYGONS["a"][0][1]), (row["width"], row["height"]))
    assert (large == wanted).all() and large.sum() > 50
    if "m.jpg" in rows:
        assert rows["m.jpg"]["masks"] == row["masks"][:1]
    x, y, w, h = row["boxes"][1]
    assert np.argwhere(small).tolist() == [[int(y + h / 2), int(x + w / 2)]]
    plain = prepare(form, source, tmp_path / "plain", resize=resize)
    assert "masks" not in plain["a.jpg"]
    for name, row in rows.items():
        assert (plain[name]["boxes"], plain[name]["labels"]) == (row["boxes"], row["labels"])


def test_masks_that_are_missing_are_named(tmp_path):
    source = with_polygons(tmp_path / "yolo", "yolo")
    write(source / "labels/train/b.txt", "1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(
        ValueError, match=r"labels/train/b.txt:1: '1 0.5 .*' is a box, and masks=ins"
    ):
        prepare("yolo", source, tmp_path / "out", "masks=instance")
    source = with_polygons(tmp_path / "coco", "coco")
    text = (source / "annotations/instances_train.json").read_text()
    write(source / "annotations/instances_train.json", text.replace("segmentation", "other"))
    assert list(prepare("coco", source, tmp_path / "coco_out", "masks=instance")) == ["b.jpg"]


@pytest.mark.parametrize("masks", ["instance", "semantic"])
def test_an_image_with_an_object_of_coco_that_has_only_a_box_gets_no_mask(tmp_path, masks):
    source = with_polygons(tmp_path / "coco", "coco")
    path = source / "annotations/instances_train.json"
    found = json.loads(path.read_text())
    found["annotations"][1]["segmentation"] = []
    write(path, json.dumps(found))
    assert list(prepare("coco", source, tmp_path / "out", f"masks={masks}")) == ["b.jpg"]


def test_run_lengths_that_label_studio_s_own_converter_wrote():
    """By brush.encode_rle of label-studio-converter 0.0.59, with words that are not repeated."""
    pixels = np.zeros((3, 4, 4), np.uint8)
    pixels[1:, 1:3] = [9, 200, 7, 255]
    pixels[2, 3] = [1, 2, 3, 128]
    written = "00000030391bfe130000240c8001c0ff00240c8001c0ff9c00009032000703fc009032000703fc0010"
    found = label_studio.unpack_rle_pack(bytes.fromhex(written + "0080030200"), pixels.size)
    assert (found == pixels.reshape(-1)).all()


@pytest.mark.parametrize(
    ("form", "file", "old", "new", "reason"),
    [
        ("cvat", "annotations.xml", 'left="2"', 'left="20"', "a mask of bird .* 28 x 23 pixels at"),
        (
            "cvat",
            "annotations.xml",
            'rle="',
            'rle="1, ',
            "a mask of bird .* 645 pixels for 28 x 23",
        ),
        ("cvat", "annotations.xml", "mask ", 'box xtl="1" ytl="1" xbr="2" ybr="2" ', "no polygon"),
        ("labelstudio", "project.json", '"rle": [0, 0, 18', '"rle": [0, 0, 17', "4544 words of 8"),
        ("labelstudio", "project.json", '"rle": [0, 0, 18', '"rl": [0, 0, 18', "no run lengths"),
        ("voc", "Annotations/a.xml", "<xmin>5<", "<xmin>22<", "object 1 lie outside of its box"),
        ("voc", "Annotations/a.xml", "<width>40<", "<width>41<", "the image is 40 x 30 pixels"),
    ],
)
def test_a_mask_that_cannot_be_used_is_one_broken_row(tmp_path, form, file, old, new, reason):
    source = with_polygons(tmp_path / "raw", form)
    text = (source / file).read_text()
    assert text.count(old) == 1
    write(source / file, text.replace(old, new))
    rows = prepare(form, source, tmp_path / "out", "masks=instance", max_bad=0.5)
    found = summary(tmp_path / "out")
    assert not any("masks, whose" in note for note in found["notes"]), "counted but not taken"
    (broken,) = reasons(found).values()
    assert re.search(reason, broken)
    assert len(rows) == (1 if form == "voc" else 2)
