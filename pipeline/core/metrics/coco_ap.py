"""Average precision of boxes and of instance masks as COCO defines it (Lin et al. 2014).

The same as pycocotools' COCOeval, kinds "bbox" and "segm", with 100 detections an image and objects
of all sizes or of one. Detections are matched with objects once an image. A bootstrap resample only
changes how often each image counts, so its precision-recall curve needs no new matching. IoU does
not depend on the unit of the axes, so boxes may be pixels or shares of their image. pycocotools
keeps the matches of an image in Python lists and faster-coco-eval in C++ objects without fields, so
neither can be resampled without matching anew. The tests compare this module with both.
"""

from __future__ import annotations

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Least and greatest area of an object of each size, in pixels of its image."""

IMAGES_AT_ONCE = 128
"""Images matched at once: their IoU (images, 100, boxes) and the loops over it fit in the cache."""
CELLS_AT_ONCE = 8_000_000
"""Drawn detections (resamples x detections of a class) held at once."""


def average_precision(
    found: dict[str, np.ndarray],
    thresholds: np.ndarray = IOU_THRESHOLDS,
    counts: np.ndarray | None = None,
    *,
    masks: bool = False,
    size: str | None = None,
) -> np.ndarray:
    """Return the mean average precision over classes and ``thresholds``, one for each resample.

    Args:
        found: ``boxes`` (n, D, 4) corners x0 y0 x1 y1, D at most 100; ``scores`` (n, D);
            ``classes`` (n, D), -1 for no detection; and the truth: ``true_boxes`` (n, M, 4),
            ``true_classes`` (n, M), -1 for no box; ``true_crowd`` (n, M). A crowd may be matched by
            any number of detections, which then count neither as hits nor as errors. Of masks, in
            pixels: ``mask_areas`` (n, D), ``true_mask_areas`` (n, M) and ``mask_intersections``
            (n, D, M). For sizes of boxes, which are then shares of their image, ``image_size``
            (n, 2): its height and width in pixels.
        thresholds: (T,) of IoU.
        counts: (R, n) how often each image counts; None for once.
        masks: Match masks, not boxes.
        size: One of `SIZES`: other objects then count neither as hits nor as misses, nor do
            detections of another size that match none. The size of an object is the area of its
            mask, where it has one, else that of its box.

    Returns:
        (R,). Classes whose objects are all crowds or of other sizes are left out; NaN where no
        class is left.
    """
    n = len(found["scores"])
    if counts is None:
        counts = np.ones((1, n), dtype=np.int64)
    counts = np.asarray(counts).astype(np.int64)
    sureness = np.where(found["classes"] >= 0, found["scores"], -np.inf)
    order = np.argsort(-sureness, axis=1, kind="stable")
    scores, classes = (np.take_along_axis(found[name], order, 1) for name in ("scores", "classes"))
    is_uncounted = found["true_crowd"].astype(bool)
    is_other_size = np.zeros(classes.shape, dtype=bool)
    if size is not None:
        of_detections, of_truth = (_outside(areas, size) for areas in _pixels(found, masks))
        is_uncounted = is_uncounted | of_truth
        is_other_size = np.take_along_axis(of_detections, order, 1)
    hit, ignored = _matched(order, classes, found, is_uncounted, thresholds, masks)
    ignored |= ~hit & is_other_size
    image, slot = np.nonzero(classes >= 0)
    # ties stay in the order of images, as in COCOeval
    by_score = np.argsort(-scores[image, slot], kind="stable")
    image, slot = image[by_score], slot[by_score]
    kinds, hit, ignored = classes[image, slot], hit[:, image, slot], ignored[:, image, slot]
    real = (found["true_classes"] >= 0) & ~is_uncounted
    total, present = np.zeros(len(counts)), np.zeros(len(counts), dtype=np.int64)
    for kind in np.unique(found["true_classes"][real]):
        objects_of = counts @ (real & (found["true_classes"] == kind)).sum(1)
        at = np.flatnonzero(kinds == kind)
        total += _average_precision_of_class(
            counts, image[at], hit[:, at], ignored[:, at], objects_of
        ).sum(1)
        present += objects_of > 0
    return np.where(present > 0, total / np.maximum(present, 1) / len(thresholds), np.nan)


def of_class(found: dict[str, np.ndarray], kind: int) -> dict[str, np.ndarray]:
    """Return the detections and boxes of one class alone; the other places hold none.

    Classes do not mix where boxes are matched, so `average_precision` of it is that of the class.
    """
    kept = {name: np.where(found[name] == kind, kind, -1) for name in ("classes", "true_classes")}
    return {**found, **kept}


def _pixels(found: dict[str, np.ndarray], masks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas of detections (n, D) and of objects (n, M), in pixels of their image."""
    pixels = found["image_size"].astype(np.float64).prod(1)[:, None]
    of_boxes, of_true_boxes = (
        _box_areas(found[name].astype(np.float64)) * pixels for name in ("boxes", "true_boxes")
    )
    of_true_masks = found.get("true_mask_areas")
    of_truth = of_true_boxes if of_true_masks is None else of_true_masks
    return (found["mask_areas"] if masks else of_boxes), of_truth


def _outside(areas: np.ndarray, size: str) -> np.ndarray:
    least, most = SIZES[size]
    return (areas < least) | (areas > most)


def _matched(
    order: np.ndarray,
    classes: np.ndarray,
    found: dict[str, np.ndarray],
    is_uncounted: np.ndarray,
    thresholds: np.ndarray,
    masks: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with objects, as COCOeval does: greedily, in the order of their scores.

    One loop over the places of detections does all images and thresholds at once. Classes do not
    mix, as the IoU across them is -1.

    Args:
        order: (n, D) detections of each image, the surest first.
        classes: (n, D) in that order.
        is_uncounted: (n, M) objects that are crowds or of another size. A detection is matched
            with one of these only if it matches no counted object.

    Returns:
        (T, n, D) in that order, whether each detection hits an object of its class, and whether it
        matches one that does not count.
    """
    n, d = classes.shape
    hit = np.zeros((len(thresholds), n, d), dtype=bool)
    ignored = np.zeros((len(thresholds), n, d), dtype=bool)
    limit = np.minimum(thresholds, 1 - 1e-10)[:, None, None]
    for start in range(0, n, IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        true_classes, crowd = found["true_classes"][part], found["true_crowd"][part].astype(bool)
        is_used = (true_classes >= 0).any(0)
        width = int(np.flatnonzero(is_used).max(initial=-1)) + 1
        depth = int((classes[part] >= 0).sum(1).max(initial=0))
        if not width or not depth:
            continue
        true_classes, crowd = true_classes[:, :width], crowd[:, :width]
        uncounted = is_uncounted[part, :width]
        iou_inputs = {name: array[part] for name, array in found.items() if name in _IOU_INPUTS}
        iou = _iou(iou_inputs, order[part, :depth], crowd, masks)
        is_other_class = classes[part, :depth, None] != true_classes[:, None, :]
        iou[is_other_class | (true_classes[:, None, :] < 0)] = -1.0
        free = np.ones((len(thresholds), *crowd.shape), dtype=bool)
        for place in range(depth):
            overlap = iou[:, place]
            can_match = (overlap >= limit) & (free | crowd)
            is_hit = _match_best(np.where(can_match & ~uncounted, overlap, -1.0), free)
            is_unmatched = ~is_hit[..., None]
            is_ignored = _match_best(
                np.where(can_match & uncounted & is_unmatched, overlap, -1.0), free
            )
            hit[:, part, place] = is_hit
            ignored[:, part, place] = is_ignored
    return hit, ignored


_IOU_INPUTS = (
    "boxes",
    "true_boxes",
    "mask_areas",
    "true_mask_areas",
    "mask_intersections",
)
"""Arrays that `_iou` reads."""


def _match_best(iou: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Match a detection of each image with the object that it overlaps most, if with any.

    Args:
        iou: (T, n, M), -1 for what it cannot match.
        free: (T, n, M) objects that are not matched yet, from which these are removed.

    Returns:
        (T, n) whether it is matched.
    """
    best = iou.shape[-1] - 1 - iou[..., ::-1].argmax(-1)  # of equals COCOeval takes the last
    is_matched = np.take_along_axis(iou, best[..., None], -1)[..., 0] > 0
    at, image = np.nonzero(is_matched)
    free[at, image, best[at, image]] = False
    return is_matched


def _iou(
    found: dict[str, np.ndarray], order: np.ndarray, crowd: np.ndarray, masks: bool
) -> np.ndarray:
    """Return the intersection over union of detections and objects, (n, D, M).

    Where the object is a crowd, the union is the area of the detection.

    Args:
        order: (n, D) which detections.
        crowd: (n, M) of the first objects.
    """
    width = crowd.shape[1]
    if masks:
        intersection = np.take_along_axis(found["mask_intersections"], order[:, :, None], 1)
        intersection = intersection[:, :, :width].astype(np.float64)
        detection_area = np.take_along_axis(found["mask_areas"], order, 1).astype(np.float64)
        object_area = found["true_mask_areas"][:, :width].astype(np.float64)
    else:
        a = np.take_along_axis(found["boxes"], order[:, :, None], 1).astype(np.float64)
        b = found["true_boxes"][:, :width].astype(np.float64)
        low = np.maximum(a[:, :, None, :2], b[:, None, :, :2])
        high = np.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
        intersection = np.maximum(high - low, 0).prod(-1)
        detection_area, object_area = _box_areas(a), _box_areas(b)
    union = np.where(
        crowd[:, None, :],
        detection_area[:, :, None],
        detection_area[:, :, None] + object_area[:, None, :] - intersection,
    )
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _box_areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _average_precision_of_class(
    counts: np.ndarray, image: np.ndarray, hit: np.ndarray, ignored: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """Return the average precision of one class, (R, T).

    Precision is interpolated at 101 recalls. It only rises at a hit, so the curve is looked at
    there alone, each hit standing for the recalls that it is the first to reach.

    Args:
        counts: (R, n) how often each image counts.
        image: (N,) image of each detection, by falling score.
        hit, ignored: (T, N) as `_matched` returns them.
        objects: (R,) number of objects in each resample.
    """
    out = np.zeros((len(counts), len(hit)))
    size = max(1, CELLS_AT_ONCE // max(1, len(image)))
    for start in range(0, len(counts), size):
        part = slice(start, start + size)
        drawn = counts[part][:, image]
        num_objects = np.maximum(objects[part], 1)[:, None]
        so_far = drawn.cumsum(1)
        for t in range(len(hit)):
            at = np.flatnonzero(hit[t])
            if not len(at):
                continue
            hits, seen = drawn[:, at].cumsum(1), so_far[:, at]
            ignored_at = np.flatnonzero(ignored[t])
            if len(ignored_at):
                nothing = np.zeros((len(drawn), 1), dtype=drawn.dtype)
                before = np.concatenate([nothing, drawn[:, ignored_at].cumsum(1)], axis=1)
                seen = seen - before[:, np.searchsorted(ignored_at, at)]
            precision = hits / (seen + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(RECALLS, hits / num_objects, side="right")
            num_reached = np.diff(reached, axis=1, prepend=0)
            out[part, t] = (precision * num_reached).sum(1) / len(RECALLS)
        out[part] *= (objects[part] > 0)[:, None]
    return out
