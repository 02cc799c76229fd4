"""Metrics of boxes, of instance masks and of pixels."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics import coco_ap
from pipeline.core.metrics.metric import (
    SHARE,
    PerLabel,
    Predictions,
    mean_where,
    numerator_denominator,
    ratio,
    resampled,
)


@register("metric", "map")
@resampled(bounds=SHARE)
def mean_average_precision(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """COCO's mean average precision, over classes and IoU thresholds from 0.5 to 0.95 (Lin et al.
    2014).
    """
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS, counts)


@register("metric", "map50")
@resampled(bounds=SHARE)
def mean_average_precision_50(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision over classes at an IoU of 0.5 (COCO's AP50)."""
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS[:1], counts)


@register("metric", "map_small")
@resampled(bounds=SHARE)
def mean_average_precision_small(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of objects of at most 32 x 32 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, size="small")


@register("metric", "map_medium")
@resampled(bounds=SHARE)
def mean_average_precision_medium(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of objects of 32 x 32 to 96 x 96 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, size="medium")


@register("metric", "map_large")
@resampled(bounds=SHARE)
def mean_average_precision_large(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of objects of at least 96 x 96 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, size="large")


@register("metric", "mask_map")
@resampled(bounds=SHARE)
def mask_average_precision(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """COCO's mean average precision of instance masks, over IoU thresholds from 0.5 to 0.95 (Lin et
    al. 2014).
    """
    return coco_ap.average_precision(p, counts=counts, masks=True)


@register("metric", "mask_map50")
@resampled(bounds=SHARE)
def mask_average_precision_50(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of instance masks at an IoU of 0.5 (COCO's AP50)."""
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS[:1], counts, masks=True)


@register("metric", "mask_map_small")
@resampled(bounds=SHARE)
def mask_average_precision_small(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of masks of at most 32 x 32 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, masks=True, size="small")


@register("metric", "mask_map_medium")
@resampled(bounds=SHARE)
def mask_average_precision_medium(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of masks of 32 x 32 to 96 x 96 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, masks=True, size="medium")


@register("metric", "mask_map_large")
@resampled(bounds=SHARE)
def mask_average_precision_large(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision of masks of at least 96 x 96 pixels of their image."""
    return coco_ap.average_precision(p, counts=counts, masks=True, size="large")


def _iou_of_class(p: Predictions, k: int) -> np.ndarray:
    inner = p["intersection"][:, k]
    return numerator_denominator(inner, p["predicted"][:, k] + p["actual"][:, k] - inner)


@register("metric", "miou")
@resampled(bounds=SHARE, per_label=PerLabel("iou", units=_iou_of_class))
def miou(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean over classes of intersection over union, each summed over all images; a class that is
    neither there nor predicted is left out.
    """
    drawn = counts.astype(np.float64)
    inner, guessed, true = (
        drawn @ p[name].astype(np.float64) for name in ("intersection", "predicted", "actual")
    )
    union = guessed + true - inner
    return mean_where((inner / np.maximum(union, 1)).T, (union > 0).T)


@register("metric", "pixel_accuracy")
@ratio(bounds=SHARE)
def pixel_accuracy(p: Predictions) -> np.ndarray:
    """Share of pixels whose class is right."""
    return numerator_denominator(p["intersection"].sum(1), p["actual"].sum(1))
