"""Batch spectral shrinkage: the smallest singular values of features are pressed down."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Technique
from pipeline.core.latest_call import LatestCall
from pipeline.core.nn.domain_adaptation import rows_of_all_ranks, share_of_global_loss


class BSSOptions(LayerOptions):
    weight: float = Field(
        0.001, ge=0, description="weight of the squares of the smallest singular values"
    )
    smallest: int = Field(1, ge=1, description="how many of the smallest singular values count")


@register("technique", "bss", options=BSSOptions)
class BSS(Technique):
    """Fine-tune everything and penalise the smallest singular values of the batch's features.

    The penalty is the sum of the squares of the smallest singular values of a batch's pooled
    features (B, D), times a weight (Chen et al. 2019, "Catastrophic forgetting meets negative
    transfer"; their weight and number are the defaults).

    It assumes that directions with small singular values are the source's own and do not serve the
    target. It helps with few labels, where such directions would be fitted to noise. It changes
    little with many labels. It hurts where the weight is too large: the smallest values are pressed
    down however large they are, and their squares grow with the features and with the batch. A
    batch is that of all ranks, so there are no micro-batches.
    """

    gathers_rows = True

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "weight": (1e-4, 0.01),
        }

    def wrap(self, task):
        self.calls = LatestCall(task.backbone)
        return task

    def finish(self, task):
        self.calls.remove()
        return task

    def penalty(self, task, batch, streams):
        if len(batch):
            pooled = self.calls.take().features.pooled.float()
        else:  # the other ranks wait for this one all the same
            device = next(task.parameters()).device
            pooled = torch.zeros(0, task.backbone.pooled_dim, device=device)
        squares = smallest_squares(rows_of_all_ranks(pooled), self.options.smallest)
        return share_of_global_loss(self.options.weight * squares)


def smallest_squares(features: Tensor, count: int) -> Tensor:
    """Return the sum of the squares of the smallest singular values of features (B, D), ()."""
    if not torch.isfinite(features).all():
        return features.sum()  # not finite either: the step is skipped, where svdvals would raise
    values = torch.linalg.svdvals(features if features.dtype == torch.float64 else features.float())
    return values[-count:].square().sum()
