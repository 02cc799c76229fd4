"""Metrics by name: ours, and those of plugins.

Importing this needs no torch, so names, bounds and directions are known where a job is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import registry
from pipeline.core.metrics import (
    classes,
    dense,
    label_sets,
    likelihood,
    policies,
    regression,
    retrieval,
    text,
    verification,
)
from pipeline.core.metrics.metric import Metric, PerLabel, Predictions

__all__ = ["Metric", "PerLabel", "Predictions", "find", "for_role", "metric", "per_label"]

OURS = (
    classes,
    dense,
    label_sets,
    likelihood,
    policies,
    regression,
    retrieval,
    text,
    verification,
)
"""Modules of our metrics, imported here so that their code is part of what every result records."""


def metric(name: str, labels: Sequence[str] = ()) -> Metric:
    """Return a metric by its name.

    Args:
        name: Such as ``accuracy``; ``auroc/Effusion`` is that of one label (or type of entity).
        labels: Names of the labels, in the order of the predictions' columns.

    Raises:
        ValueError: there is no such metric; the nearest names are given.
    """
    of, _, label = name.partition("/")
    found = per_label(of) if label else None
    if found is not None:
        return found.of(label, list(labels).index(label) if label in labels else None)
    return registry.get("metric", name)


def find(name: str) -> Metric | None:
    """Return a metric over all labels by its name; None where there is none of that name."""
    return registry.get("metric", name) if name in registry.entries("metric") else None


def per_label(name: str) -> PerLabel | None:
    """Return the metric of single labels that is called so, such as ``auroc``."""
    every = (registry.get("metric", one).per_label for one in registry.entries("metric"))
    return next((one for one in every if one is not None and one.name == name), None)


def for_role(role: str) -> list[str]:
    """Return the names of the metrics that may judge any target with a column of this role."""
    every = registry.entries("metric")
    return [name for name in every if registry.get("metric", name).for_role == role]
