"""Metrics by name, computed by torchmetrics from gathered predictions.

A metric that is a ratio of sums over test units (accuracy, loss, perplexity) also gives each unit's (numerator, denominator),
which makes bootstrap intervals cheap; the others are computed anew for every resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.registry import nearest

Predictions = dict[str, np.ndarray]
"""Named arrays with the test units first: ``scores`` (n, classes) logits, ``label`` (n,), ``loss`` (n,), ``count`` (n,)."""


@dataclass(frozen=True)
class Metric:
    """``value`` of predictions; ``units`` (n, 2) numerators and denominators when value = final(sum / sum)."""

    name: str
    higher_is_better: bool
    value: Callable[[Predictions], float]
    units: Callable[[Predictions], np.ndarray] | None = None
    final: Callable[[float], float] = float

    def of_units(self, units: np.ndarray) -> float:
        """The value from (n, 2) units; NaN when nothing was counted."""
        total = units.sum(0)
        return self.final(float(total[0] / total[1])) if total[1] else float("nan")


def _ratio(name: str, higher: bool, units: Callable[[Predictions], np.ndarray], final: Callable[[float], float] = float) -> Metric:
    def value(p: Predictions) -> float:
        total = units(p).sum(0)
        return final(float(total[0] / total[1])) if total[1] else float("nan")

    return Metric(name, higher, value, units, final)


def _hits(k: int):
    def units(p: Predictions) -> np.ndarray:
        scores, label = torch.as_tensor(p["scores"]), torch.as_tensor(p["label"])
        if not len(label):
            return np.zeros((0, 2))
        hits = (scores.topk(min(k, scores.shape[1]), dim=1).indices == label[:, None]).any(1)
        return np.stack([hits.numpy().astype(np.float64), np.ones(len(hits))], axis=1)

    return units


def _loss_units(p: Predictions) -> np.ndarray:
    count = p["count"] if "count" in p else np.ones(len(p["loss"]))
    return np.stack([p["loss"], count], axis=1).astype(np.float64)


def _classes(function: str, **kw):
    """A torchmetrics function by name; the package takes seconds to import, so it is not imported before it is needed."""

    def value(p: Predictions) -> float:
        from torchmetrics.functional import classification

        scores, label = torch.as_tensor(p["scores"]).float(), torch.as_tensor(p["label"]).long()
        return float(getattr(classification, function)(scores, label, num_classes=scores.shape[1], **kw))

    return value


def _balanced(p: Predictions) -> float:
    """Mean recall over the classes that have rows. torchmetrics' macro accuracy counts one that was only predicted as 0; scikit-learn does not."""
    from torchmetrics.functional import classification

    scores, label = torch.as_tensor(p["scores"]).float(), torch.as_tensor(p["label"]).long()
    recall = classification.multiclass_recall(scores, label, num_classes=scores.shape[1], average="none")
    return float(recall[label.unique()].mean())


METRICS: dict[str, Metric] = {m.name: m for m in (
    _ratio("accuracy", True, _hits(1)),
    _ratio("top5_accuracy", True, _hits(5)),
    Metric("macro_f1", True, _classes("multiclass_f1_score", average="macro")),
    Metric("balanced_accuracy", True, _balanced),
    Metric("auroc", True, lambda p: _classes("multiclass_auroc", average="macro")({**p, "scores": torch.as_tensor(p["scores"]).softmax(1).numpy()})),
    _ratio("loss", False, _loss_units),
    _ratio("perplexity", False, _loss_units, lambda mean: math.exp(min(mean, 700.0))),
)}


def metric(name: str) -> Metric:
    """A metric by name. Raises ValueError with the nearest names."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]
