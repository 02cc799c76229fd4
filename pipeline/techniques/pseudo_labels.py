"""Self-training: confident predictions on the target are its labels (Lee 2013)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.contracts.objective_capabilities import has_one_class
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    mean_over_ranks,
    probabilities,
)


class PseudoLabelOptions(AdaptationOptions):
    threshold: float = Field(
        0.9, gt=0, lt=1, description="probability from which a prediction counts as a label"
    )
    ramp: float = Field(
        0.5, ge=0, le=1, description="share of the steps in which the weight rises from 0"
    )


@register("technique", "pseudo_labels", options=PseudoLabelOptions)
class PseudoLabels(DomainAdaptation):
    """Train on rows of the target, with the network's own confident predictions as labels.

    Predictions above the threshold count as labels, again in every step; the others are left out.
    Labels of the target are not read. With ``source_weight: 0`` no row of the source is read
    either. (Lee, Pseudo-Label, ICML workshop 2013; confidence as in Sohn et al., FixMatch, 2020.)

    It assumes that confident predictions are right, and that the classes of the target's rows lie
    apart. It helps if the source already does well, and with many rows without labels. It hurts
    where the source is confident and wrong: the network then learns its errors.
    """

    compares_domains = False
    needs_classes = True

    def alignment(self, task, source, target):
        scores = target.scores(task.objective)
        chances = probabilities(task.objective, scores.detach())
        ramp = self.options.ramp
        factor = min(1.0, self.progress / ramp) if ramp else 1.0
        losses = class_losses if has_one_class(task.objective) else label_set_losses
        return factor * mean_over_ranks(losses(scores, chances, self.options.threshold))


def class_losses(scores: Tensor, chances: Tensor, threshold: float) -> Tensor:
    """Return (B,) cross entropies of scores (B, C) with the likeliest class, 0 where it is unsure.

    Args:
        chances: (B, C) probabilities that the labels are taken from, without gradient.
        threshold: The least probability of a label.
    """
    confidence, label = chances.max(-1)
    losses = F.cross_entropy(scores, label, reduction="none")
    return losses * (confidence >= threshold)


def label_set_losses(scores: Tensor, chances: Tensor, threshold: float) -> Tensor:
    """Return (B,) means of the losses of (B, L) labels that are sure to be there, or not to be."""
    is_sure = torch.maximum(chances, 1 - chances) >= threshold
    losses = F.binary_cross_entropy_with_logits(scores, (chances > 0.5).float(), reduction="none")
    return (losses * is_sure).mean(-1)
