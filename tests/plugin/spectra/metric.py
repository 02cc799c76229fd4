"""Root mean squared error of brightness, and the geometric mean of the classes' recalls."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import NOT_NEGATIVE, SHARE, Predictions, plain, ratio


@register("metric", "brightness_error")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE, final=math.sqrt)
def brightness_error(p: Predictions) -> np.ndarray:
    error = (p["prediction"] - p["value"]) ** 2
    return np.stack([error, np.ones(len(error))], axis=1).astype(np.float64)


@register("metric", "gmean")
@plain(bounds=SHARE, for_role="label")
def gmean(p: Predictions) -> float:
    """Kubat and Matwin 1997; of the classes that the rows have."""
    right, label = p["scores"].argmax(1) == p["label"], p["label"]
    recalls = [right[label == value].mean() for value in np.unique(label)]
    return float(np.prod(recalls) ** (1 / len(recalls))) if recalls else math.nan
