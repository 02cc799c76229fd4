"""Domain-adversarial training of features (Ganin et al. 2016)."""

from __future__ import annotations

import torch
from pydantic import Field

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    DomainClassifier,
    TaskWithModule,
    layer_normed,
    mean_over_ranks,
)
from pipeline.core.nn.domain_losses import reversed_gradient


class DANNOptions(AdaptationOptions):
    hidden: int = Field(256, ge=1, description="hidden units of the domain classifier")


@register("technique", "dann", options=DANNOptions)
class DANN(DomainAdaptation):
    """Adversarial alignment: features from which a classifier cannot tell source from target.

    The classifier is trained to tell them apart. Its gradient is reversed before it reaches the
    backbone, and multiplied by a factor that rises from 0 to 1 in the course of training. (Ganin et
    al., Domain-Adversarial Training of Neural Networks, JMLR 2016.)

    It assumes that the labels depend on the features alike in both domains, and that both have
    about the same share of each class. It helps where the inputs look different and the task is the
    same. It hurts where the shares differ or a domain has classes of its own: rows of different
    classes are then aligned (Zhao et al. 2019). CDAN aligns class by class.
    """

    def wrap(self, task):
        width = task.backbone.pooled_dim
        return TaskWithModule(
            task.backbone, task.objective, DomainClassifier(width, self.options.hidden)
        )

    def alignment(self, task, source, target):
        assert source is not None and isinstance(task, TaskWithModule)
        classifier = task.added
        assert isinstance(classifier, DomainClassifier)
        factor = self.ramp()
        total = torch.zeros((), device=source.pooled.device)
        for rows, is_source in ((source, True), (target, False)):
            features = reversed_gradient(layer_normed(rows.pooled), factor)
            total = total + mean_over_ranks(classifier.losses(features, is_source)) / 2
        return total
