"""Transferability scores: how well a source's features fit a target, before any fine-tuning."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.registry import register
from pipeline.core.contracts.objective_capabilities import has_classes
from pipeline.core.metrics.ranking import weighted_auroc
from pipeline.core.rng import mix
from pipeline.train.online_probe import KNN, neighbours
from pipeline.transfer.cached_heads import features
from pipeline.transfer.grid import label_subset
from pipeline.transfer.trial import Shared, TargetData

SCORE_ROWS = 2000


@register("score", "logme", title="LogME")
def logme(found: np.ndarray, labels: np.ndarray) -> float:
    """Return the log of the maximum evidence per row, averaged over classes. Higher is better.

    The score is LogME (You et al., ICML 2021). The evidence is that of y ~ N(0, (t I + F F') /
    alpha). The best alpha of every t is known, so only t is searched. The published fixed point
    gave NaN or -inf in 117 of 300 random cases, nearly all with D > n, and stopped at the lower of
    two maxima in others.

    Args:
        found: (n, D) features.
        labels: (n,) class numbers, or (n, L) 0 or 1. Of the latter, labels that all rows or no row
            has are left out.

    Returns:
        The score, NaN where no label is left.
    """
    f = found.astype(np.float64)
    n = len(f)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = s**2  # (r,)
    one_hot = labels[:, None] == np.unique(labels) if labels.ndim == 1 else _varying_columns(labels)
    y = one_hot.astype(np.float64)  # (n, C)
    if not y.shape[1]:
        return float("nan")
    z2 = (u.T @ y) ** 2  # (r, C)
    # (C,) what no direction explains
    rest = np.maximum(y.sum(0) - z2.sum(0), 0.0) if len(s) < n else 0.0
    t = max(float(sigma.max()), 1e-30) * np.logspace(-10, 4, 561)[:, None]
    scale = ((1 / (t + sigma)) @ z2 + rest / t) / n  # (T, C) 1 / alpha
    logdet = np.log(t + sigma).sum(1, keepdims=True) + (n - len(s)) * np.log(t)
    value = -0.5 * (np.log(2 * np.pi * scale) + logdet / n + 1)
    top = value.argmax(0).clip(1, len(t) - 2)
    left, best, right = (np.take_along_axis(value, (top + k)[None], 0)[0] for k in (-1, 0, 1))
    bend = left - 2 * best + right
    # the peak of the parabola through the three
    downward = np.where(bend < 0, bend, -1.0)
    peak = best - np.where(bend < 0, (left - right) ** 2 / (8 * downward), 0.0)
    return float(np.where(value.max(0) > best, value.max(0), peak).mean())


def _varying_columns(labels: np.ndarray) -> np.ndarray:
    """Return the columns of (n, L) labels that contain both 0 and 1."""
    return labels[:, labels.any(0) & ~labels.all(0)]


@register("score", "knn", title="kNN")
def knn(found: np.ndarray, labels: np.ndarray, k: int = KNN) -> float:
    """Return the leave-one-out accuracy of the k nearest rows by cosine. Higher is better.

    The prediction of a row is the most frequent class of its neighbours. For (n, L) labels, 0 or 1,
    the score is the macro AUROC of the number of neighbours with each label, because an accuracy
    would be high for rare labels whatever the features are. It is NaN where no label varies.

    Args:
        found: (n, D) features.
        labels: (n,) class numbers, or (n, L) 0 or 1.
        k: Number of neighbours.
    """
    y = torch.from_numpy(labels.astype(np.int64))
    nearest = y[neighbours(found, k)]
    if y.dim() == 1:
        return float((nearest.mode(1).values == y).double().mean())
    everyone = np.ones((len(found), 1))
    areas = [
        weighted_auroc(vote, label, everyone)[0]
        for vote, label in zip(nearest.sum(1).numpy().T, (y.numpy() > 0).T, strict=True)
    ]
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan")


def fewest_labels(shared: Shared, data: TargetData) -> np.ndarray:
    """Return the positions of training rows in the target's smallest label fraction.

    They are drawn as in the trials of seed 0. The fractions of one seed are nested, so every trial
    of that seed may use these rows.
    """
    seed = mix(shared.seed, 0)
    subsets = [
        label_subset(data.train, data.labels, fraction, seed)
        for fraction in data.spec.label_fractions
        if fraction
    ]
    return min(subsets, key=len, default=np.zeros(0, dtype=np.int64))


def score(
    shared: Shared,
    source: str,
    base_key: str,
    target: str,
    names: tuple[str, ...] | None = None,
) -> dict[str, float]:
    """Return the scores of a source on at most SCORE_ROWS training rows of a target, evenly spread.

    Only rows are read that the trials with the fewest labels may use too (`fewest_labels`). A
    choice of sources by all labels would help trials that may use only 5 % of them. Each score is a
    function of features (n, D) and of class numbers (n,) or label sets (n, L), and higher is
    better.

    Args:
        names: Names of registered scores; none: all.

    Raises:
        ValueError: There are no labels, or a feature is not finite.
    """
    data = shared.targets[target, base_key]
    objective = registry.get("objective", data.objective.name)
    lacks_labels = "label" in objective.roles and data.labels is None
    if not has_classes(objective) or lacks_labels:
        raise ValueError(
            f"targets.{target}: scores need labels, the objective {data.objective.name} has none"
        )
    backbone = bundle.build_backbone(data.arch)
    bundle.transfer(
        backbone, {n: torch.from_numpy(a) for n, a in shared.weights[source].items()}, source
    )
    allowed = fewest_labels(shared, data)
    places = allowed[
        np.unique(np.linspace(0, len(allowed) - 1, min(SCORE_ROWS, len(allowed))).astype(np.int64))
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, rest = features(backbone, data.train.subset(places), device)
    wrong = int((~torch.isfinite(found).all(1)).sum())
    if wrong:
        raise ValueError(
            f"targets.{target}: the features of source {source} are not finite for {wrong} of "
            f"{len(found)} rows; its weights are damaged, or it was trained until they overflowed"
        )
    # of the rows that could be decoded
    labels = rest[objective.class_tensor].cpu().numpy()
    pooled = found.cpu().numpy()
    wanted = names or tuple(registry.entries("score"))
    return {name: registry.get("score", name)(pooled, labels) for name in wanted}
