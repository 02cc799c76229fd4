"""Average precision against COCO's own tools, on random sets with crowds, empty images and classes
that are missing on either side.
"""

import contextlib
import io
from typing import Any

import faster_coco_eval
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.core.metrics.coco_ap import SIZES, average_precision, of_class

Found = dict[str, np.ndarray]
SIDE = 260.0
"""Pixels of images with objects of all sizes."""


def case(
    seed: int,
    images: int = 6,
    classes: int = 4,
    detections: int = 12,
    boxes: int = 7,
    size: float = 200.0,
) -> Found:
    """Detections near the boxes, far from them, and none; some images without boxes, some without
    detections.
    """
    rng = np.random.default_rng(seed)

    def corners(shape):
        low, side = rng.uniform(0, 0.7, (*shape, 2)), rng.uniform(0.05, 0.5, (*shape, 2))
        return np.concatenate([low, np.minimum(low + side, 1)], axis=-1) * size

    truth = np.where(
        rng.random((images, boxes)) < 0.6, rng.integers(0, classes, (images, boxes)), -1
    )
    truth[rng.random(images) < 0.15] = -1
    true_boxes = corners((images, boxes))
    copied = rng.integers(0, boxes, (images, detections))
    near = np.take_along_axis(true_boxes, copied[..., None], 1) + rng.normal(
        0, rng.uniform(0, 0.02) * size, (images, detections, 4)
    )
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2] + 1)
    guess = np.where(
        rng.random((images, detections)) < 0.7,
        np.take_along_axis(truth, copied, 1),
        rng.integers(0, classes + 1, (images, detections)),
    )
    guess[rng.random(images) < 0.15] = -1
    return {
        "boxes": np.where(
            rng.random((images, detections, 1)) < 0.75, near, corners((images, detections))
        ),
        "classes": guess,
        "scores": np.where(guess >= 0, rng.random((images, detections)), 0),
        "true_boxes": true_boxes,
        "true_classes": truth,
        "true_crowd": rng.random((images, boxes)) < 0.2,
    }


def with_masks(found: Found) -> tuple[Found, list[list[Any]], list[list[Any]]]:
    """Ellipses in all boxes, in square images: what the metric reads of them, and the
    run lengths of detections and of truth.
    """
    grid = np.arange(SIDE) + 0.5

    def ellipses(boxes):
        x0, y0, x1, y1 = np.moveaxis(boxes[..., None, None], -3, 0)
        across = (grid - (x0 + x1) / 2) / (x1 - x0) * 2
        down = (grid[:, None] - (y0 + y1) / 2) / (y1 - y0) * 2
        return across**2 + down**2 <= 1

    guessed, true = ellipses(found["boxes"]), ellipses(found["true_boxes"])
    runs = [
        [
            [coco_mask.encode(np.asfortranarray(one, np.uint8)) for one in of_image]
            for of_image in of
        ]
        for of in (guessed, true)
    ]
    numbers = {
        "mask_areas": guessed.sum((-1, -2)),
        "true_mask_areas": true.sum((-1, -2)),
        "mask_intersections": np.einsum(
            "ndhw,nmhw->ndm", guessed.astype(np.float32), true.astype(np.float32)
        ).astype(np.int32),
    }
    return {**found, **numbers}, runs[0], runs[1]


def shares(found: Found) -> Found:
    """Boxes as shares of square images, whose size is told."""
    size = np.full((len(found["scores"]), 2), SIDE)
    scaled = {name: found[name] / SIDE for name in ("boxes", "true_boxes")}
    return {**found, **scaled, "image_size": size}


def reference(found: Found, fast: bool = False, only: int | None = None) -> tuple[float, float]:
    """(mAP@[.5:.95], mAP@.5) by pycocotools or faster-coco-eval; NaN where they say -1.

    Of the class ``only`` alone where it is given.
    """
    stats = every_reference(found, fast, only)
    return stats[0], stats[1]


def every_reference(
    found: Found,
    fast: bool = False,
    only: int | None = None,
    masks: tuple[list[list[Any]], list[list[Any]]] | None = None,
) -> list[float]:
    """Their mAP@[.5:.95], @.5, @.75, and @[.5:.95] of small, medium and large objects.

    Of masks, where the run lengths of detections and of truth are given.
    """
    truth: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k} for k in range(1, 12)],
        "info": {},
    }
    guesses = []
    for image in range(len(found["scores"])):
        truth["images"].append({"id": image + 1, "width": 200, "height": 200})
        for place, (box, kind, crowd) in enumerate(
            zip(
                found["true_boxes"][image],
                found["true_classes"][image],
                found["true_crowd"][image],
                strict=True,
            )
        ):
            if kind >= 0:
                w, h = box[2:] - box[:2]
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": image + 1,
                        "category_id": int(kind) + 1,
                        "bbox": [*box[:2].tolist(), float(w), float(h)],
                        "area": float(w * h),
                        "iscrowd": int(crowd),
                    }
                )
                if masks is not None:
                    drawn = masks[1][image][place]
                    area = int(coco_mask.area(drawn))
                    truth["annotations"][-1] |= {"segmentation": drawn, "area": area}
        for place, (box, kind, score) in enumerate(
            zip(found["boxes"][image], found["classes"][image], found["scores"][image], strict=True)
        ):
            if kind >= 0:
                guesses.append(
                    {
                        "image_id": image + 1,
                        "category_id": int(kind) + 1,
                        "score": float(score),
                        "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    }
                )
                if masks is not None:
                    del guesses[-1]["bbox"]
                    guesses[-1]["segmentation"] = masks[0][image][place]
    with contextlib.redirect_stdout(io.StringIO()):
        of, evaluation = (
            (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster) if fast else (COCO, COCOeval)
        )
        coco: Any = of()
        coco.dataset = truth
        coco.createIndex()
        if not guesses:
            assert masks is None, "of the values by size nothing is said here"
            is_known = any(not a["iscrowd"] for a in truth["annotations"])
            return [0.0 if is_known else float("nan")] * 6
        kind = "bbox" if masks is None else "segm"
        check: Any = evaluation(coco, coco.loadRes(guesses), kind)
        if only is not None:
            check.params.catIds = [only + 1]
        check.evaluate()
        check.accumulate()
        check.summarize()
    six = np.array(check.stats[:6], dtype=float)
    six[six < 0] = np.nan
    return six.tolist()


def ours(found: Found, counts: np.ndarray | None = None) -> np.ndarray:
    """(R, 2)."""
    return np.stack(
        [
            average_precision(found, counts=counts),
            average_precision(found, np.array([0.5]), counts),
        ],
        axis=1,
    )


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_reference_tools(seed):
    found = case(seed, images=1 + seed % 9, classes=1 + seed % 5)
    mine = ours(found)[0]
    np.testing.assert_allclose(mine, reference(found), atol=1e-6)
    np.testing.assert_allclose(mine, reference(found, fast=True), atol=1e-6)
    np.testing.assert_array_equal(
        mine, ours(found, np.ones((1, len(found["scores"])), dtype=int))[0]
    )


def test_cases_are_worth_comparing():
    """Neither trivial nor all alike: crowds, images without boxes, and values over the whole
    range.
    """
    found = [case(seed) for seed in range(50)]
    values = np.array([ours(f)[0, 0] for f in found])
    assert np.nanmin(values) < 0.2 and np.nanmax(values) > 0.5
    without = [
        abs(ours({**f, "true_crowd": np.zeros_like(f["true_crowd"])})[0, 0] - v)
        for f, v in zip(found, values, strict=True)
    ]
    assert sum(np.array(without) > 1e-3) > 25
    assert any((f["true_classes"] < 0).all(1).any() for f in found)


@pytest.mark.parametrize("seed", range(10))
def test_counts_equal_the_images_drawn(seed):
    """A resample of images, by how often each was drawn, equals the tool's value on the set in
    which they truly stand so often.
    """
    found = case(100 + seed, images=8)
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(0, 8, 8), minlength=8) for _ in range(4)])
    mine = ours(found, counts)
    for row, count in zip(mine, counts, strict=True):
        np.testing.assert_allclose(
            row,
            reference({name: np.repeat(array, count, axis=0) for name, array in found.items()}),
            atol=1e-6,
        )


def test_shares_of_the_image_do_as_well_as_pixels():
    found = case(3)
    scale = np.array([640.0, 480.0, 640.0, 480.0]) / 200
    wide = {**found, "boxes": found["boxes"] * scale, "true_boxes": found["true_boxes"] * scale}
    np.testing.assert_allclose(ours(found), ours(wide), atol=1e-12)


def test_nothing_to_find_has_no_value():
    found = case(1)
    assert np.isnan(ours({**found, "true_classes": np.full_like(found["true_classes"], -1)})).all()
    assert np.isnan(ours({**found, "true_crowd": np.ones_like(found["true_crowd"])})).all()
    assert (ours({**found, "classes": np.full_like(found["classes"], -1)}) == 0).all()


def test_more_images_than_are_matched_at_once(monkeypatch):
    found = case(5, images=30)
    whole = ours(found)
    monkeypatch.setattr("pipeline.core.metrics.coco_ap.IMAGES_AT_ONCE", 7)
    monkeypatch.setattr("pipeline.core.metrics.coco_ap.CELLS_AT_ONCE", 100)
    np.testing.assert_allclose(ours(found), whole, atol=1e-12)
    counts = np.random.default_rng(0).integers(0, 3, (9, 30))
    many = ours(found, counts)
    monkeypatch.undo()
    np.testing.assert_allclose(ours(found, counts), many, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_one_class_is_as_the_reference_tool_has_it(seed):
    found = case(seed)
    known = 0
    for kind in range(8):
        expected = reference(found, only=kind)
        assert ours(of_class(found, kind))[0] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        known += np.isfinite(expected[0])
    assert known > 1


@pytest.mark.parametrize("seed", range(20))
def test_boxes_by_size_are_as_the_reference_tool_has_them(seed):
    found = case(seed, images=4 + seed % 5, classes=1 + seed % 3, size=SIDE)
    expected = every_reference(found)[3:]
    found = shares(found)
    mine = [average_precision(found, size=size)[0] for size in SIZES]
    np.testing.assert_allclose(mine, expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_as_the_reference_tool_has_them(seed):
    """Crowds among them; the same on a resample of images as where they truly stand so often."""
    plain = case(seed, images=4 + seed % 5, classes=1 + seed % 3, size=SIDE)
    masked, *runs = with_masks(plain)
    found = shares(masked)

    def of(found, counts=None):
        fixed = [
            average_precision(found, counts=counts, masks=True),
            average_precision(found, np.array([0.5]), counts, masks=True),
            average_precision(found, np.array([0.75]), counts, masks=True),
        ]
        sized = [average_precision(found, counts=counts, masks=True, size=size) for size in SIZES]
        return np.stack([*fixed, *sized], axis=1)

    np.testing.assert_allclose(of(found)[0], every_reference(found, masks=tuple(runs)), atol=1e-9)
    drawn = np.random.default_rng(seed).integers(0, 3, len(found["scores"]))
    repeated = {name: np.repeat(array, drawn, axis=0) for name, array in found.items()}
    np.testing.assert_allclose(of(found, drawn[None]), of(repeated), atol=1e-12)


def test_objects_of_all_sizes_are_compared():
    values = np.array(
        [
            [average_precision(shares(case(seed, size=SIDE)), size=size)[0] for size in SIZES]
            for seed in range(20)
        ]
    )
    assert (np.isfinite(values).sum(0) > 5).all() and (np.nanstd(values, axis=0) > 0.05).all()
