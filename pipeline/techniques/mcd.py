"""Maximum classifier discrepancy (Saito et al. 2018)."""

from __future__ import annotations

import copy

import torch
from pydantic import Field

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.contracts import Objective, Task
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    DomainFeatures,
    TaskWithModule,
    mean_over_ranks,
    probabilities,
)
from pipeline.core.nn.domain_losses import reversed_gradient

MIN_SPREAD = 0.01
"""Two heads that are equal never part: the gradient of their difference is 0."""


class MCDOptions(AdaptationOptions):
    source_weight: float = Field(
        1.0,
        gt=0,
        description="weight of the sum of both heads' mean losses on the source's labelled rows",
    )


@register("technique", "mcd", options=MCDOptions)
class MCD(DomainAdaptation):
    """Maximum classifier discrepancy: two heads disagree on target rows, the backbone prevents it.

    Both heads learn the source's labels. On the target's rows the heads are trained to differ (mean
    absolute difference of their probabilities), and the backbone is trained to prevent it. The
    paper alternates three kinds of steps. Here the gradient is reversed between heads and backbone,
    so that a step does all three. The first head is kept. (Saito et al., Maximum Classifier
    Discrepancy for Unsupervised Domain Adaptation, CVPR 2018.)

    It assumes that rows of the target far from the source are those on which two heads differ. It
    helps where classes must stay apart, which `dann` does not see. It hurts with few source rows,
    where the heads differ because they lack data.
    """

    needs_classes = True

    def wrap(self, task):
        second = copy.deepcopy(task.objective)
        with torch.no_grad():
            for parameter in second.parameters():
                is_matrix = parameter.dim() > 1
                spread = parameter.std().clamp(min=MIN_SPREAD) if is_matrix else 0.0
                parameter.add_(torch.randn_like(parameter) * spread)
        return TaskWithModule(task.backbone, task.objective, second)

    def source_loss(self, task, source):
        second = super().source_loss(self._with_second_head(task), source)
        return super().source_loss(task, source) + second

    def alignment(self, task, source, target):
        features = DomainFeatures(target.batch, reversed_gradient(target.pooled))
        one, other = (
            probabilities(head, features.scores(head))
            for head in (task.objective, second_head(task))
        )
        return -mean_over_ranks((one - other).abs().mean(-1))

    def penalty(self, task, batch, streams):
        total = super().penalty(task, batch, streams)
        assert total is not None
        if "target" in streams and batch is streams["target"]:
            return total
        # labelled rows of the target teach the second head, too
        return total + super().source_loss(
            self._with_second_head(task), DomainFeatures.of(task, batch)
        )

    def _with_second_head(self, task: Task) -> Task:
        return Task(task.backbone, second_head(task))


def second_head(task: Task) -> Objective:
    """Return the head that is trained beside the one that is kept."""
    assert isinstance(task, TaskWithModule) and isinstance(task.added, Objective)
    return task.added
