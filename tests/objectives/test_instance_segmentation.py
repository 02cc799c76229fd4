"""Instance segmentation: columns to masks, the mask loss and the pasting against torchvision's,
predictions in the pixels of the stored image, and that it learns.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection import roi_heads
from torchvision.ops import box_convert, box_iou

from pipeline.config import registry
from pipeline.core.contracts import Batch, RawRows, Task
from pipeline.core.metrics.catalog import metric
from pipeline.core.nn import box_detectors
from pipeline.data.stream import Decoder
from pipeline.media import image_io, instance_masks
from pipeline.objectives import instance_segmentation
from pipeline.objectives.instance_segmentation import (
    InstanceSegmentation,
    InstanceSegmentationOptions,
)
from pipeline.train import loop
from tests import toys

SIDE = 96
COLUMNS = {"image": "image", "boxes": "boxes", "labels": "labels", "masks": "masks"}
STATE: dict[str, Any] = {
    "values": ["cat", "dog"],
    "labels": ["cat", "dog"],
    "box_format": "xyxy",
    "relative": True,
    "max_boxes": 4,
}


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return toys.image_file(pixels)


def blob(width: int, height: int, box: list[float]) -> np.ndarray:
    """An ellipse in a box in shares of the image, (height, width) bool, with a corner cut off."""
    x = (np.arange(width) + 0.5) / width
    y = ((np.arange(height) + 0.5) / height)[:, None]
    left, top, right, bottom = box
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return (across**2 + down**2 <= 1) & (across + down < 0.9)


BOXES = [
    [[0.1, 0.2, 0.5, 0.8], [0.3, 0.1, 0.9, 0.9]],
    [],
    [[0.05, 0.05, 0.95, 0.6]],
    [[0.2, 0.2, 0.8, 0.8], [0.1, 0.6, 0.4, 0.9], [0.5, 0.0, 1.0, 0.5]],
]
SIZES = [(80, 60), (50, 50), (64, 120), (100, 70)]
"""Width and height of the pictures."""


def table_of(**more: Any) -> pa.Table:
    """Four pictures of other sizes, one of them without objects."""
    masks = [
        [instance_masks.packed(blob(*size, box)) for box in of_row]
        for size, of_row in zip(SIZES, BOXES, strict=True)
    ]
    columns = {
        "image": [picture(*size) for size in SIZES],
        "boxes": pa.array(BOXES, pa.list_(pa.list_(pa.float64()))),
        "labels": pa.array([["cat", "dog"], [], ["dog"], ["cat"] * 3], pa.list_(pa.string())),
        "masks": pa.array(masks, pa.list_(instance_masks.RLE)),
    }
    return pa.table({**columns, **more})


def task_of(backbone: str = "test_resnet", **options: Any) -> Task:
    return toys.task_of(
        f"timm/{backbone}",
        {"channels": 3, "size": SIDE},
        "instance_segmentation",
        STATE,
        options={"channels": 64, "mask_convs": 1, "anchor": 4.0, **options},
    )


def rows_of(table: pa.Table, fit: str = "pad", mean: float = 0.5, **options: Any):
    kind = registry.get("modality", "image")
    modality = kind(
        kind.options_class(size=SIDE, fit=fit, **options), {"mean": [mean] * 3, "std": [0.2] * 3}
    )
    arrays, bad = Decoder(modality, "instance_segmentation", STATE, COLUMNS)(table)
    assert bad == [""] * len(table)
    return toys.rows_of(modality, arrays, "instance_segmentation", STATE)


def batch_of(table: pa.Table | None = None, **options: Any) -> Batch:
    rows = rows_of(table_of() if table is None else table, **options)
    return toys.take(rows, range(len(rows)))


def without_objects() -> pa.Table:
    table = table_of()
    names = ("boxes", "labels", "masks")
    return table_of(**{name: pa.array([[]] * 4, table.schema.field(name).type) for name in names})


# ---------------------------------------------------------------- columns


def test_masks_become_run_lengths_and_new_rows_have_none():
    table = table_of()
    options = InstanceSegmentationOptions()
    state = InstanceSegmentation.fit(options, table, COLUMNS)
    assert state["labels"] == ["cat", "dog"]
    assert InstanceSegmentation.invalid_label_reasons(table, COLUMNS, state) == [""] * 4
    found = InstanceSegmentation.encode(table, COLUMNS, state)
    assert found["image_size"].tolist() == [[height, width] for width, height in SIZES]
    for runs, (width, height), of_row in zip(found["mask_runs"], SIZES, BOXES, strict=True):
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(len(of_row), width, height)
        for mask, box in zip(flat, of_row, strict=True):
            assert (blob(width, height, box) == mask.T).all() and mask.any()
    new = table.select(["image"])
    assert InstanceSegmentation.encode(new, COLUMNS, state) == {}
    assert InstanceSegmentation.invalid_label_reasons(new, COLUMNS, state) == [""] * 4
    labels_alone = InstanceSegmentation.encode(table.drop_columns(["image"]), COLUMNS, state)
    assert labels_alone["image_size"].tolist() == [[60, 80], [0, 0], [120, 64], [70, 100]]


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (None, "its masks are null; an image without objects has an empty list"),
        ([], "1 boxes, but 0 masks"),
        ([None], "mask 1 of 1 is null"),
        ([{"size": [50, 50], "counts": "PSn"}], "mask 1 of 1: the compressed RLE ends in the mid"),
        (
            [instance_masks.packed(np.ones((40, 50), bool))],
            "mask 1 of 1: a mask of 50 x 40 pixels for an image of 50 x 50",
        ),
        ([instance_masks.packed(np.zeros((50, 50), bool))], "mask 1 of 1 covers no pixel"),
        ([instance_masks.packed(np.eye(50, dtype=bool))], ""),
    ],
)
def test_rows_whose_masks_cannot_be_used_are_refused_with_the_reason(masks, reason):
    table = table_of().slice(1, 1)
    columns = {
        "boxes": pa.array([[[0.1, 0.1, 0.9, 0.9]]]),
        "labels": pa.array([["dog"]]),
        "masks": pa.array([masks], pa.list_(instance_masks.RLE)),
    }
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    [found] = InstanceSegmentation.invalid_label_reasons(table, COLUMNS, STATE)
    assert found.startswith(reason) and bool(found) == bool(reason)
    encoded = InstanceSegmentation.encode(table, COLUMNS, STATE)
    assert (encoded["labels"][0, 0] == -1) == bool(reason)
    assert (len(encoded["mask_runs"][0]) == 0) == bool(reason)


def test_a_column_that_holds_no_masks_is_refused():
    table = table_of(masks=[[[1.0, 2.0]]] * 4)
    with pytest.raises(
        ValueError, match=r"column masks: list<.*> holds no masks; .*masks=instance"
    ):
        InstanceSegmentation.fit(InstanceSegmentationOptions(), table, COLUMNS)


# ---------------------------------------------------------------- masks in the input


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_masks_lie_where_their_boxes_are(fit):
    """At any aspect of the image, and as the semantic masks of the modality are resized."""
    batch = batch_of(fit=fit)
    for row, (size, of_row) in enumerate(zip(SIZES, BOXES, strict=True)):
        places = torch.arange(len(of_row))
        masks = instance_segmentation.input_masks(batch, row, places)
        assert masks.shape == (len(of_row), SIDE, SIDE)
        for mask, box, written in zip(masks, batch["boxes"][row], of_row, strict=False):
            ys, xs = np.nonzero(mask.numpy())
            inner = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            x0, y0, x1, y1 = box.tolist()
            assert inner[0] >= x0 - 1.5 and inner[1] >= y0 - 1.5
            assert inner[2] <= x1 + 1.5 and inner[3] <= y1 + 1.5
            share = blob(*size, written).mean()
            frame = batch["frame"][row]
            pixels = float(frame[0] * frame[1])
            assert mask.sum().item() / pixels == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
def test_masks_move_with_their_image(crop):
    """A picture in which the object alone is white: augmentation moves pixels and mask alike."""
    box = [0.25, 0.2, 0.7, 0.75]
    files, masks = [], []
    for width, height in SIZES:
        mask = blob(width, height, box)
        files.append(toys.image_file(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255))
        masks.append([instance_masks.packed(mask)])
    table = pa.table(
        {
            "image": files,
            "boxes": [[box]] * 4,
            "labels": [["cat"]] * 4,
            "masks": pa.array(masks, pa.list_(instance_masks.RLE)),
        }
    )
    rows = rows_of(table, mean=0.0, crop=crop, flip=True)
    array = rows.arrays
    assert array is not None
    data = rows.modality.collate({name: values for name, values in array.items()})
    mirrored = 0
    for seed in range(4):
        batch = Batch(np.arange(4), torch.arange(4) + 100 * seed, dict(data))
        moved = rows.modality.augment(batch)
        mirrored += int((moved["frame"][:, 0] < 0).sum())
        for row in range(4):
            found = instance_segmentation.input_masks(moved, row, torch.tensor([0]))[0]
            is_white = moved["image"][row, 0] > 127
            overlap = (found & is_white).sum() / (found | is_white).sum()
            assert overlap > 0.93, (seed, row, overlap)
    assert 0 < mirrored < 16


# ---------------------------------------------------------------- loss


def test_the_mask_loss_is_torchvision_s(monkeypatch):
    """On the regions of one image, given torchvision's own function the same logits and masks."""
    task, batch = task_of().eval(), batch_of(table_of().slice(3, 1))
    detector, seen = task.objective.detector, {}
    scores, regions = detector.mask_scores, detector.region_losses
    monkeypatch.setattr(detector, "mask_scores", lambda *a: seen.setdefault("scores", scores(*a)))
    monkeypatch.setattr(
        detector, "region_losses", lambda *a: seen.setdefault("regions", regions(*a))
    )
    _, _, logs = task(batch)
    _, (boxes, matched, labels) = seen["regions"]
    is_object = labels[0] > 0
    assert 5 < is_object.sum() < len(is_object)
    masks = instance_segmentation.input_masks(batch, 0, torch.arange(3))
    objects = [torch.tensor([0, 0, 0])]  # of one class
    of_image = [boxes[0][is_object]], [masks], objects, [matched[0][is_object]]
    expected = roi_heads.maskrcnn_loss(seen["scores"], *of_image)
    assert logs["mask"].item() == pytest.approx(expected.item(), abs=1e-6) and expected > 0


def test_sums_and_counts_add_up_over_ranks():
    """Rows on two ranks, one with an image without objects alone."""
    task, table = task_of().eval(), table_of()
    whole = batch_of(table)
    total, count, logs = task(whole)
    halves = [task(part) for part in whole.split(2)]
    assert count == 4 == sum(h[1] for h in halves)
    assert sum(h[0] for h in halves).item() == pytest.approx(total.item(), rel=1e-4)
    for name in task.objective.log_names:
        assert sum(h[2][name] for h in halves).item() == pytest.approx(
            logs[name].item(), rel=1e-4, abs=1e-6
        ), name


@pytest.mark.parametrize(("backbone", "objects"), [("test_resnet", True), ("test_vit", False)])
def test_every_parameter_is_in_the_graph(backbone, objects):
    """DDP waits for all of them, also where no image of a rank has an object."""
    task = task_of(backbone)
    total, _, logs = task(batch_of(table_of() if objects else without_objects()))
    total.backward()
    assert torch.isfinite(total) and (logs["mask"] > 0) == objects
    assert [
        name
        for name, p in task.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ] == []


def test_bf16():
    task, batch = task_of().eval(), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, count, logs = task(batch)
        with torch.no_grad():
            found = task.objective.predict(task.backbone, batch)
    exact = task(batch)
    assert total.dtype == torch.float32 and count == 4
    assert logs["mask"].item() == pytest.approx(exact[2]["mask"].item(), rel=0.1)
    assert found["true_mask_areas"].sum() == sum(
        int(blob(*size, box).sum()) for size, row in zip(SIZES, BOXES, strict=True) for box in row
    )


# ---------------------------------------------------------------- predictions


def truth_as_detections(monkeypatch, task: Task) -> None:
    """The network finds every object, and its mask as a 28 x 28 picture of the true one."""
    detector = task.objective.detector

    def detections(maps, batch):
        return [
            {
                "boxes": target["boxes"],
                "labels": target["labels"],
                "scores": torch.linspace(0.9, 0.5, len(target["labels"])),
            }
            for target in box_detectors.targets_of(batch)
        ]

    def masks(maps, found, batch):
        out = []
        for row, (of_image, target) in enumerate(
            zip(found, box_detectors.targets_of(batch), strict=True)
        ):
            true = instance_segmentation.input_masks(batch, row, target["places"])
            of_boxes = torch.arange(len(true))
            out.append(
                roi_heads.project_masks_on_boxes(true, of_image["boxes"], of_boxes, 28)
                if len(true)
                else torch.zeros(0, 28, 28)
            )
        return out

    monkeypatch.setattr(detector, "detections", detections)
    monkeypatch.setattr(detector, "masks", masks)


@torch.no_grad()
def test_masks_are_compared_in_the_pixels_of_the_stored_image(monkeypatch):
    """Areas and intersections are those of pycocotools on masks that torchvision pastes."""
    task, batch = task_of().eval(), batch_of()
    truth_as_detections(monkeypatch, task)
    found = {k: v.numpy() for k, v in task.objective.predict(task.backbone, batch).items()}
    assert found["image_size"].tolist() == [[height, width] for width, height in SIZES]
    maps = task.objective.maps(task.backbone, batch)[1]
    masks = task.objective.detector.masks(
        maps, task.objective.detector.detections(maps, batch), batch
    )
    for row, ((width, height), of_row) in enumerate(zip(SIZES, BOXES, strict=True)):
        k = len(of_row)
        true = [blob(width, height, box) for box in of_row]
        assert found["true_mask_areas"][row, :k].tolist() == [int(one.sum()) for one in true]
        assert not found["true_mask_areas"][row, k:].any()
        boxes = torch.from_numpy(found["boxes"][row, :k]) * torch.tensor([width, height] * 2)
        pasted = roi_heads.paste_masks_in_image(masks[row][:, None], boxes, (height, width))
        guessed = [(one[0] > 0.5).numpy() for one in pasted]
        assert found["mask_areas"][row, :k].tolist() == [int(one.sum()) for one in guessed]
        rle = [coco_mask.encode(np.asfortranarray(one, np.uint8)) for one in guessed + true]
        for i in range(k):
            for j in range(k):
                shared = coco_mask.area(coco_mask.merge([rle[i], rle[k + j]], intersect=True))
                assert found["mask_intersections"][row, i, j] == shared
    assert metric("mask_map50").value(found) == pytest.approx(1.0)
    assert 0.6 < metric("mask_map").value(found) <= 1.0


@torch.no_grad()
def test_masks_are_predicted_in_the_boxes_cut_at_the_image(monkeypatch):
    """The first picture, 80 x 60, has padding above and below, which its box reaches into."""
    task, batch = task_of().eval(), batch_of()
    reaching = {
        "boxes": torch.tensor([[4.0, 0.0, 30.0, SIDE - 4.0], [2.0, 0.0, 9.0, 3.0]]),
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.8]),
    }
    nothing = {name: tensor[:0] for name, tensor in reaching.items()}
    detector, pooled = task.objective.detector, []
    masks_of = detector.masks

    def masks(maps, detections, part):
        pooled.append(detections[0]["boxes"])
        return masks_of(maps, detections, part)

    monkeypatch.setattr(detector, "detections", lambda maps, part: [reaching, *[nothing] * 3])
    monkeypatch.setattr(detector, "masks", masks)
    predicted = task.objective.predict(task.backbone, batch)
    [boxes] = pooled
    assert len(boxes) == 1, "the second lies wholly in the padding"
    top = (SIDE - SIDE * 60 / 80) / 2
    assert boxes[0].tolist() == [4.0, top, 30.0, SIDE - max(top, 4.0)]
    again = box_detectors.to_shares(boxes[None], batch["frame"][:1].float())[0]
    torch.testing.assert_close(predicted["boxes"][0, :1], again)


@torch.no_grad()
def test_written_masks_are_read_by_pycocotools_and_drawn(monkeypatch):
    task, batch = task_of().eval(), batch_of()
    truth_as_detections(monkeypatch, task)
    labelled = batch
    new = Batch(batch.rows, batch.keys, {name: batch[name] for name in ("image", "frame")})
    detector = task.objective.detector
    of_truth, masks_of = detector.detections, detector.masks
    monkeypatch.setattr(detector, "detections", lambda maps, part: of_truth(maps, labelled))
    monkeypatch.setattr(
        detector, "masks", lambda maps, found, part: masks_of(maps, found, labelled)
    )
    found = {k: v.numpy() for k, v in task.objective.predict(task.backbone, new).items()}
    assert set(found) == {"boxes", "scores", "classes", "masks"}
    written = task.objective.output_columns(
        found, RawRows(table_of().select(["image"]), COLUMNS, rows_of(table_of()).modality)
    )
    assert written["labels"].tolist() == [["cat", "dog"], [], ["dog"], ["cat"] * 3]
    again = pa.array(written["masks"].tolist(), task.objective.output_types["masks"]).to_pylist()
    for rles, (width, height), of_row in zip(again, SIZES, BOXES, strict=True):
        assert len(rles) == len(of_row)
        for rle, box in zip(rles, of_row, strict=True):
            mask = coco_mask.decode(rle).astype(bool)
            true = blob(width, height, box)
            assert (mask & true).sum() / (mask | true).sum() > 0.8
    canvas = np.full((60, 80, 3), 100, dtype=np.uint8)
    of_first = {name: written[name][0] for name in written}
    drawn = task.objective.draw(canvas, of_first)
    changed = (drawn != 100).any(-1)
    scale = drawn.shape[0] // 60
    centre = blob(80, 60, BOXES[0][0])
    y, x = np.argwhere(centre)[len(np.argwhere(centre)) // 2]
    assert changed[y * scale, x * scale] and not changed[-1, 0]
    unsure = {**of_first, "scores": [0.1, 0.1]}
    assert (task.objective.draw(canvas, unsure) == 100).all()


@pytest.mark.slow
@torch.no_grad()
def test_many_images_are_predicted_in_parts(monkeypatch):
    task, batch = task_of(score_threshold=0.0).eval(), batch_of()
    whole = task.objective.predict(task.backbone, batch)
    monkeypatch.setattr(box_detectors, "IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(instance_segmentation, "PASTED_PIXELS", 30_000)
    parts = task.objective.predict(task.backbone, batch)
    assert whole.keys() == parts.keys() and (whole["mask_areas"] > 0).any()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4)


def test_raw_outputs_are_the_predictions():
    """Also the masks of boxes that stick out of a padded image."""
    task, batch = task_of(score_threshold=0.0).eval(), batch_of()
    image = batch["image"][:2]
    side = float(image.shape[-1])
    frame = torch.tensor([[side, side, 0.0, 0.0], [side - 40, side, 20.0, 0.0]])
    new = Batch(batch.rows[:2], batch.keys[:2], {"image": image, "frame": frame})
    task.objective.detector.rpn._post_nms_top_n["testing"] = 100  # seconds less
    with torch.no_grad():
        ours = task.objective.predict(task.backbone, new)
        raw = task.objective.raw_outputs(task.backbone, new)
    assert [*raw] == ["boxes", "scores", "classes", "masks"]
    for row in range(2):
        is_found, is_sure = ours["classes"][row] >= 0, raw["classes"][row] >= 0
        assert is_found.sum() == is_sure.sum() > 0
        for name, tensor in raw.items():
            torch.testing.assert_close(tensor[row][is_sure], ours[name][row][is_found])
        assert (raw["masks"][row][~is_sure] == 0).all()


# ---------------------------------------------------------------- learning


def photographs(folder: Path, images: int) -> pa.Table:
    """The first images of COCO whose objects can be told apart in their semantic mask.

    Those are images where no two boxes of a class meet: an object is what has its class in its box.
    """
    by_number = json.loads((folder / "classes.json").read_text())
    numbered = json.loads((folder / "semantic_classes.json").read_text())
    by_name = {name: int(number) for number, name in numbered.items()}
    semantic = pq.read_table(folder / "semantic_masks_train.parquet").to_pylist()
    masks = {row["image_id"]: row["mask"] for row in semantic}
    out: list[dict[str, Any]] = []
    for row in pq.read_table(folder / "train.parquet").to_pylist():
        if row["image_id"] not in masks or not 1 <= len(row["labels"]) <= 5:
            continue
        classes = image_io.class_numbers(masks[row["image_id"]])
        height, width = classes.shape
        centre = torch.tensor(row["boxes_cxcywh_norm"])
        boxes = box_convert(centre, "cxcywh", "xyxy").clamp(0, 1)
        meet = box_iou(boxes, boxes).fill_diagonal_(0) > 0
        labels = torch.tensor(row["labels"])
        names = [by_number[number] for number in row["labels"]]
        if (meet & (labels[:, None] == labels)).any() or not {*names} <= {*by_name}:
            continue
        objects = []
        for name, box in zip(names, boxes, strict=True):
            x0, y0 = (box[:2] * torch.tensor([width, height])).floor().long().tolist()
            x1, y1 = (box[2:] * torch.tensor([width, height])).ceil().long().tolist()
            inside = np.zeros((height, width), bool)
            inside[y0:y1, x0:x1] = True
            objects.append(inside & (classes == by_name[name]))
        if all(mask.sum() > 100 for mask in objects):
            packed = [instance_masks.packed(mask) for mask in objects]
            out.append(
                {"image": row["image"], "boxes": boxes.tolist(), "labels": names, "masks": packed}
            )
        if len(out) == images:
            break
    types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "masks": pa.list_(instance_masks.RLE),
        "labels": pa.list_(pa.string()),
        "image": pa.binary(),
    }
    return pa.Table.from_pylist(out, schema=pa.schema(types))


@pytest.mark.slow
@pytest.mark.data
def test_mask_rcnn_learns_eight_photographs_from_scratch():
    """ResNet-10, 128 px: the mask loss falls, and masks of the images that it saw are found."""
    folder = Path(
        os.environ.get("ONETOMANY_DATA") or pytest.skip("ONETOMANY_DATA names no data folder"),
        "vision",
        "coco128_detection",
    )
    table = photographs(folder, 8)
    assert len(table) == 8
    options = InstanceSegmentationOptions(channels=64, mask_convs=2, anchor=4.0)
    state = InstanceSegmentation.fit(options, table, COLUMNS)
    kind = registry.get("modality", "image")
    image = kind.options_class(size=128, fit="pad", flip=False, crop="none")
    modality = kind(image, kind.fit(image, table, COLUMNS, "timm/resnet10t"))
    arrays, bad = Decoder(modality, "instance_segmentation", state, COLUMNS)(table)
    assert bad == [""] * 8
    rows = toys.rows_of(modality, arrays, "instance_segmentation", state)
    task = toys.task_of(
        "timm/resnet10t",
        modality.inputs(),
        "instance_segmentation",
        state,
        options=options.model_dump(),
    )
    batch = toys.take(rows, range(8))
    with torch.no_grad():
        before = task.eval()(batch)[2]["mask"].item() / 8
    run = toys.make_run(
        rows,
        task,
        steps=50,
        validation=rows,
        global_batch=4,
        lr=2e-3,
        keep="last",
        eval_every_steps=50,
    )
    found = loop.fit(run).curve[-1]
    with torch.no_grad():
        after = task.eval()(batch)[2]["mask"].item() / 8
    assert after < 0.75 * before
    assert found["mask_map50"] > 0.3 and found["mask_map"] > 0.1, found
