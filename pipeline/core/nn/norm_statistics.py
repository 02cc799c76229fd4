"""Mean and variance of batch norms, measured on given rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that keep running statistics."""
    return [
        one for one in module.modules() if isinstance(one, _BatchNorm) and one.track_running_stats
    ]


class _Sums:
    """Count, sum and sum of squares of all that a norm has read, by channel."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the inputs (B, C, ...) of a forward pass."""
        values = inputs[0].detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def store(self, norm: _BatchNorm) -> None:
        """Write mean and unbiased variance; those of a norm that has read nothing stay."""
        if not self.count:
            return
        assert norm.running_mean is not None and norm.running_var is not None
        mean = self.total / self.count
        spread = (self.squares - self.count * mean.square()).clamp(min=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(spread / max(1, self.count - 1))


@torch.no_grad()
def measure(backbone: Backbone, batches: Iterable[Batch]) -> None:
    """Set the statistics of every batch norm to those of all rows together.

    A norm reads what the norms before it make of a batch by the batch's own statistics. The running
    averages of torch would be those of single batches, whose variances lack what lies between them.
    """
    norms = batch_norms(backbone)
    sums_of_norms = [_Sums() for _ in norms]
    hooks = [
        norm.register_forward_pre_hook(sums)
        for norm, sums in zip(norms, sums_of_norms, strict=True)
    ]
    backbone.eval()
    for norm in norms:
        norm.train()
    for batch in batches:
        backbone(batch)
    for norm, sums, hook in zip(norms, sums_of_norms, hooks, strict=True):
        hook.remove()
        sums.store(norm)
    backbone.eval()
