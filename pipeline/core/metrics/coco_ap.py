"""Average precision of object detection as COCO defines it (Lin et al. 2014).

The same as pycocotools' COCOeval with area "all" and 100 detections an image. Boxes are matched
once an image; from how often each image counts follow the precision-recall curves of any number of
resamples. IoU does not depend on the unit of the axes, so boxes may be pixels or shares of their
image. pycocotools keeps the matches of an image in Python lists and faster-coco-eval in C++ objects
without fields, so neither can be resampled without matching anew. The tests compare this module
with both.
"""

from __future__ import annotations

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)

_IMAGES = 128
"""Images matched at once: their IoU (images, 100, boxes) and the loops over it fit in the cache."""
_CELLS = 8_000_000
"""Drawn detections (resamples x detections of a class) held at once."""


def average_precision(
    found: dict[str, np.ndarray],
    thresholds: np.ndarray = IOU_THRESHOLDS,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean average precision over classes and ``thresholds``, one for each resample.

    Args:
        found: ``boxes`` (n, D, 4) corners x0 y0 x1 y1, D at most 100; ``scores`` (n, D);
            ``classes`` (n, D), -1 for no detection; and the truth: ``true_boxes`` (n, M, 4),
            ``true_classes`` (n, M), -1 for no box; ``true_crowd`` (n, M). A crowd may be matched by
            any number of detections, which then count neither as hits nor as errors.
        thresholds: (T,) of IoU.
        counts: (R, n) how often each image counts; None for once.

    Returns:
        (R,). Classes whose boxes are all crowds are left out; NaN where no class is left.
    """
    n = len(found["scores"])
    if counts is None:
        counts = np.ones((1, n), dtype=np.int64)
    counts = np.asarray(counts).astype(np.int64)
    sureness = np.where(found["classes"] >= 0, found["scores"], -np.inf)
    order = np.argsort(-sureness, axis=1, kind="stable")
    scores, classes = (np.take_along_axis(found[name], order, 1) for name in ("scores", "classes"))
    boxes = np.take_along_axis(found["boxes"], order[:, :, None], 1)
    hit, ignored = _matched(boxes, classes, found, thresholds)
    image, slot = np.nonzero(classes >= 0)
    # ties stay in the order of images, as in COCOeval
    by_score = np.argsort(-scores[image, slot], kind="stable")
    image, slot = image[by_score], slot[by_score]
    kinds, hit, ignored = classes[image, slot], hit[:, image, slot], ignored[:, image, slot]
    real = (found["true_classes"] >= 0) & ~found["true_crowd"].astype(bool)
    total, present = np.zeros(len(counts)), np.zeros(len(counts), dtype=np.int64)
    for kind in np.unique(found["true_classes"][real]):
        boxes_of = counts @ (real & (found["true_classes"] == kind)).sum(1)
        at = np.flatnonzero(kinds == kind)
        total += _areas(counts, image[at], hit[:, at], ignored[:, at], boxes_of).sum(1)
        present += boxes_of > 0
    return np.where(present > 0, total / np.maximum(present, 1) / len(thresholds), np.nan)


def of_class(found: dict[str, np.ndarray], kind: int) -> dict[str, np.ndarray]:
    """Return the detections and boxes of one class alone; the other places hold none.

    Classes do not mix where boxes are matched, so `average_precision` of it is that of the class.
    """
    kept = {name: np.where(found[name] == kind, kind, -1) for name in ("classes", "true_classes")}
    return {**found, **kept}


def _matched(
    boxes: np.ndarray, classes: np.ndarray, found: dict[str, np.ndarray], thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with boxes, as COCOeval does: greedily, in the order of their scores.

    One loop over the places of detections does all images and thresholds at once. Classes do not
    mix, as the IoU across them is -1.

    Returns:
        (T, n, D) whether each detection hits a box of its class, and whether a crowd absorbs it.
    """
    n, d = classes.shape
    hit = np.zeros((len(thresholds), n, d), dtype=bool)
    ignored = np.zeros((len(thresholds), n, d), dtype=bool)
    limit = np.minimum(thresholds, 1 - 1e-10)[:, None, None]
    for start in range(0, n, _IMAGES):
        part = slice(start, start + _IMAGES)
        true_classes, crowd = found["true_classes"][part], found["true_crowd"][part].astype(bool)
        width = int(np.flatnonzero((true_classes >= 0).any(0)).max(initial=-1)) + 1
        depth = int((classes[part] >= 0).sum(1).max(initial=0))
        if not width or not depth:
            continue
        true_classes, crowd = true_classes[:, :width], crowd[:, :width]
        iou = _iou(
            boxes[part, :depth].astype(np.float64),
            found["true_boxes"][part, :width].astype(np.float64),
            crowd,
        )
        is_other_class = classes[part, :depth, None] != true_classes[:, None, :]
        iou[is_other_class | (true_classes[:, None, :] < 0)] = -1.0
        free = np.broadcast_to(~crowd, (len(thresholds), *crowd.shape)).copy()
        rows = np.arange(len(crowd))
        for place in range(depth):
            here = iou[:, place]
            open_iou = np.where(free & (here >= limit), here, -1.0)
            best = width - 1 - open_iou[..., ::-1].argmax(-1)  # of equals COCOeval takes the last
            ok = np.take_along_axis(open_iou, best[..., None], -1)[..., 0] > 0
            free[np.nonzero(ok)[0], np.broadcast_to(rows, ok.shape)[ok], best[ok]] = False
            hit[:, part, place] = ok
            ignored[:, part, place] = ~ok & (crowd & (here >= limit)).any(-1)
    return hit, ignored


def _iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the intersection over union of boxes (n, D, 4) and (n, M, 4), (n, D, M).

    Where the second box is a crowd, the union is the area of the first box.
    """
    low = np.maximum(a[:, :, None, :2], b[:, None, :, :2])
    high = np.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    sides = high - low
    inner = np.maximum(sides, 0).prod(-1)
    of_a: np.ndarray = (a[..., 2:] - a[..., :2]).prod(-1)
    of_b: np.ndarray = (b[..., 2:] - b[..., :2]).prod(-1)
    union = np.where(
        crowd[:, None, :], of_a[:, :, None], of_a[:, :, None] + of_b[:, None, :] - inner
    )
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def _areas(
    counts: np.ndarray, image: np.ndarray, hit: np.ndarray, ignored: np.ndarray, boxes: np.ndarray
) -> np.ndarray:
    """Return the average precision of one class, (R, T).

    Precision is interpolated at 101 recalls. It only rises at a hit, so the curve is looked at
    there alone, each hit standing for the recalls that it is the first to reach.

    Args:
        counts: (R, n) how often each image counts.
        image: (N,) image of each detection, by falling score.
        hit, ignored: (T, N) as `_matched` returns them.
        boxes: (R,) number of boxes in each resample.
    """
    out = np.zeros((len(counts), len(hit)))
    size = max(1, _CELLS // max(1, len(image)))
    for start in range(0, len(counts), size):
        part = slice(start, start + size)
        drawn, real = counts[part][:, image], np.maximum(boxes[part], 1)[:, None]
        so_far = drawn.cumsum(1)
        for t in range(len(hit)):
            at = np.flatnonzero(hit[t])
            if not len(at):
                continue
            hits, seen = drawn[:, at].cumsum(1), so_far[:, at]
            aside = np.flatnonzero(ignored[t])
            if len(aside):
                nothing = np.zeros((len(drawn), 1), dtype=drawn.dtype)
                before = np.concatenate([nothing, drawn[:, aside].cumsum(1)], axis=1)
                seen = seen - before[:, np.searchsorted(aside, at)]
            precision = hits / (seen + np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(RECALLS, hits / real, side="right")
            out[part, t] = (precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS)
        out[part] *= (boxes[part] > 0)[:, None]
    return out
