"""StochNorm: batch norms that use running statistics at random (Kou et al. 2020)."""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Technique


class StochNormOptions(LayerOptions):
    p: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability that a channel is normalised by its running statistics in a "
        "training step (in the authors' code p is that of the batch's); 0: plain batch norm",
    )

    @model_validator(mode="after")
    def _mixes_statistics(self):
        if self.freeze_norm_stats:
            raise ValueError(
                "stoch_norm mixes the statistics of the batch with the running ones, and with "
                "frozen statistics there is nothing to mix; leave freeze_norm_stats out"
            )
        return self


@register("technique", "stoch_norm", options=StochNormOptions)
class StochNorm(Technique):
    """Fine-tune everything; each channel of a batch norm uses its running statistics at random.

    In every training step a channel is normalised by the mean and variance of the batch, or with
    probability p by the running ones of the batches before (Kou et al. 2020). After training they
    are ordinary batch norms.

    For networks with batch norms: convolutional networks of timm (images) and PatchTST (series). It
    assumes that the source's statistics roughly suit the target. It helps with small batches and
    few labels. It hurts where the target is very different, until the running statistics have
    adapted.

    Raises:
        ValueError: the network has no batch norm.
    """

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "p": (0.25, 0.5, 0.75),
        }

    def wrap(self, task):
        self.norms = [
            one for one in task.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)
        ]
        if not self.norms:
            raise ValueError(
                f"stoch_norm changes batch norms, and {task.backbone.arch.name} has none: give the "
                "target techniques of its own, or take a backbone that has them"
            )
        for norm in self.norms:
            norm.forward = partial(mixed_norm, norm, self.options.p)  # type: ignore[method-assign]
        return task

    def finish(self, task):
        for norm in self.norms:
            del norm.forward
        return task


def mixed_norm(norm: nn.Module, p: float, inputs: Tensor) -> Tensor:
    """Return what a batch norm makes of inputs (B, C, ...), by batch or running statistics.

    Which one is drawn for each channel. The running statistics are those before this batch, as in
    the authors' code. An activation within the norm (timm's BatchNormAct2d) is elementwise, so the
    choice may be made after it.
    """
    plain = type(norm).forward
    if not norm.training or p == 0:
        return plain(norm, inputs)
    buffers = dict(norm._buffers)
    # a copy: this batch changes the running statistics, which the gradient needs as they were
    norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    norm.training = False
    try:
        by_running = plain(norm, inputs)
    finally:
        norm.training = True
        norm._buffers.update(buffers)
    by_batch = plain(norm, inputs)
    shape = (1, inputs.shape[1], *[1] * (inputs.dim() - 2))
    is_running = torch.rand(shape, device=inputs.device) < p
    return torch.where(is_running, by_running, by_batch)
