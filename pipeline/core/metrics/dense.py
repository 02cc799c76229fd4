"""Metrics of boxes and of masks."""

from __future__ import annotations

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics import coco_ap
from pipeline.core.metrics.metric import SHARE, Predictions, mean_where, pairs, ratio, resampled


@register("metric", "map")
@resampled(bounds=SHARE)
def mean_average_precision(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """COCO's mean average precision, over classes and IoU thresholds from 0.5 to 0.95."""
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS, counts)


@register("metric", "map50")
@resampled(bounds=SHARE)
def mean_average_precision_50(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean average precision over classes at an IoU of 0.5 (COCO's AP50)."""
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS[:1], counts)


@register("metric", "miou")
@resampled(bounds=SHARE)
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
    return pairs(p["intersection"].sum(1), p["actual"].sum(1))
