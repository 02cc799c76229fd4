"""Minimum class confusion (Jin et al. 2020)."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    rows_of_all_ranks,
    share_of_global_loss,
)
from pipeline.core.nn.domain_losses import class_confusion


class MCCOptions(AdaptationOptions):
    temperature: float = Field(
        2.5, gt=0, description="divisor of the scores, because networks are too confident"
    )


@register("technique", "mcc", options=MCCOptions)
class MCC(DomainAdaptation):
    """Minimum class confusion: penalise the class confusion of a batch of the target.

    The confusion of two classes is the product of their probabilities over the batch. Rows with a
    confident prediction count more. The domains are not aligned, so they may have different shares
    of the classes. With ``source_weight: 0`` no row of the source is read. (Jin et al., Minimum
    Class Confusion for Versatile Domain Adaptation, ECCV 2020.)

    It assumes a batch with several rows of most classes. It helps also if the target has only some
    of the source's classes. It hurts with many classes and small batches, and where the source's
    predictions are mostly wrong: it makes them confident.
    """

    compares_domains = False
    needs_one_class = True

    def alignment(self, task, source, target):
        scores = rows_of_all_ranks(target.scores(task.objective))
        if not len(scores):
            return target.pooled.sum() * 0.0
        return share_of_global_loss(class_confusion(scores, self.options.temperature))
