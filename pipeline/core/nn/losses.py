"""Losses for imbalanced classes: class weights and the focal loss. For training; evaluation is
never weighted. And what several losses need: full precision inside autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def without_autocast(rows: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``rows``.

    Autocast computes matrix products in bf16 whatever the dtype of the inputs. Small differences of
    large products (distances) are then lost, and cosines have errors as large as a temperature.
    """
    return torch.autocast(rows.device.type, enabled=False)


def balanced_class_weights(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return (C,) float32 weights rows / (classes x rows of the class) (King and Zeng 2001).

    Every class then has the same weight, and all training rows together the same as before. A class
    without rows has weight 0.
    """
    total = sum(counts)
    return torch.tensor(
        [total / (len(counts) * count) if count else 0.0 for count in counts], device=device
    )


def at_least_float32(scores: Tensor) -> Tensor:
    """Return scores in float32 where they are in a lower precision; float64 stays."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def cross_entropies(
    scores: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Return (K,) cross entropies of scores (K, C) with labels (K,), times (1 - p) ** gamma.

    p is the probability of the true class (focal loss, Lin et al. 2017). ``weight`` (C,) is that of
    the row's class; ``smoothing`` is label smoothing.
    """
    losses = F.cross_entropy(
        scores, label, weight=_like(weight, scores), reduction="none", label_smoothing=smoothing
    )
    if not gamma:
        return losses
    log_probability = scores.log_softmax(-1).gather(-1, label[..., None])[..., 0]
    return losses * _focal_factor(log_probability, gamma)


def _like(weight: Tensor | None, scores: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(scores.dtype)


def binary_cross_entropies(
    scores: Tensor, label: Tensor, pos_weight: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """Return the same for independent binary labels: scores and float labels of any shape.

    ``pos_weight`` weights positives.
    """
    losses = F.binary_cross_entropy_with_logits(
        scores, label, reduction="none", pos_weight=_like(pos_weight, scores)
    )
    if not gamma:
        return losses
    log_probability = -F.binary_cross_entropy_with_logits(scores, label, reduction="none")
    return losses * _focal_factor(log_probability, gamma)


def _focal_factor(log_probability: Tensor, gamma: float) -> Tensor:
    """Return (1 - p) ** gamma from log p.

    p is kept below 1: where it is 1 in float32, the gradient with gamma < 1 would be infinite.
    """
    return (1 - log_probability.exp()).clamp(min=1e-6) ** gamma
