"""Conditional adversarial domain adaptation (Long et al. 2018)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.contracts import Task
from pipeline.core.nn.all_gather import all_reduce_sum
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    DomainClassifier,
    TaskWithModule,
    layer_normed,
    prediction_entropies,
)
from pipeline.core.nn.domain_losses import reversed_gradient
from pipeline.core.nn.losses import without_autocast


class CDANOptions(AdaptationOptions):
    hidden: int = Field(256, ge=1, description="hidden units of the domain classifier")
    entropy: bool = Field(
        True, description="rows count by 1 + exp(-entropy of their prediction) (CDAN+E)"
    )
    most_products: int = Field(
        4096,
        ge=1,
        description="if features x classes is more than this, so many random products replace them",
    )


class ConditionalClassifier(DomainClassifier):
    """A domain classifier of the products of features and predictions.

    Args:
        width: Features D.
        classes: C.
        hidden: Hidden units.
        most: Where D x C is larger, both are multiplied by fixed random matrices to this width.
    """

    of_features: Tensor
    of_classes: Tensor

    def __init__(self, width: int, classes: int, hidden: int, most: int):
        is_random = width * classes > most
        super().__init__(most if is_random else width * classes, hidden)
        if is_random:
            self.register_buffer("of_features", torch.randn(width, most))
            self.register_buffer("of_classes", torch.randn(classes, most))
        self.is_random = is_random

    def products(self, features: Tensor, chances: Tensor) -> Tensor:
        """Return the products of features (B, D) and probabilities (B, C)."""
        if not self.is_random:
            return (features[:, :, None] * chances[:, None]).flatten(1)
        most = self.of_features.shape[1]
        with without_autocast(features):
            drawn = (features.float() @ self.of_features) * (chances.float() @ self.of_classes)
        return drawn / most**0.5


@register("technique", "cdan", options=CDANOptions)
class CDAN(DomainAdaptation):
    """Adversarial alignment of features together with what is predicted of them.

    As `dann`, but the domain classifier sees the products of features and class probabilities, so
    that classes are aligned one by one. Rows with a confident prediction count more. (Long et al.,
    Conditional Adversarial Domain Adaptation, NeurIPS 2018.)

    It assumes that predictions on the target are right more often than not. It helps where there
    are several classes. It hurts where the first predictions are wrong: wrong classes are then
    aligned.
    """

    needs_classes = True

    def wrap(self, task):
        options = self.options
        classes = len(task.objective.state["labels"])
        added = ConditionalClassifier(
            task.backbone.pooled_dim, classes, options.hidden, options.most_products
        )
        return TaskWithModule(task.backbone, task.objective, added)

    def alignment(self, task, source, target):
        assert source is not None and isinstance(task, TaskWithModule)
        classifier = task.added
        assert isinstance(classifier, ConditionalClassifier)
        factor = self.ramp()
        total = torch.zeros((), device=source.pooled.device)
        for rows, is_source in ((source, True), (target, False)):
            scores = rows.scores(task.objective).detach()
            chances = rows.probabilities(task.objective).detach()
            features = classifier.products(layer_normed(rows.pooled), chances)
            losses = classifier.losses(reversed_gradient(features, factor), is_source)
            weights = self._weights(task, scores)
            total_weight = all_reduce_sum(weights.sum()).clamp(min=1e-6)
            total = total + (weights * losses).sum() / total_weight / 2
        return total

    def _weights(self, task: Task, scores: Tensor) -> Tensor:
        """Return (B,) weights of rows by the entropy of their prediction."""
        if not self.options.entropy:
            return torch.ones(len(scores), device=scores.device)
        return 1 + torch.exp(-prediction_entropies(task.objective, scores))
