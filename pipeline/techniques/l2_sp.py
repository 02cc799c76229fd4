"""L2-SP: fine-tuning close to the starting point (Li et al. 2018)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Task, Technique


class L2SPOptions(LayerOptions):
    weight: float = Field(
        0.01, ge=0, description="weight of half the squared distance to the source's weights"
    )
    head_weight: float = Field(
        0.01, ge=0, description="weight of half the squared norm of a head that starts new"
    )


@register("technique", "l2_sp", options=L2SPOptions)
class L2SP(Technique):
    """Fine-tune everything with a pull back to the source's weights.

    The penalty is weight / 2 times the squared distance of the backbone to its start, plus
    head_weight / 2 times the squared norm of the head (Li et al. 2018, equation 5). Tensors that
    the head takes over from the source are pulled to their own start.

    It assumes that good weights lie near those of the source. It helps with few labels and a source
    that suits the target. It hurts where the target is far from the source, because the weights
    must then change much. ``train.weight_decay`` also applies, and pulls the weights towards zero.
    The paper has no other weight decay: set ``weight_decay: 0``.
    """

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "weight": (0.001, 1.0),
        }

    def wrap(self, task):
        self.start = {
            name: p.detach().clone() for name, p in task.backbone.named_parameters("backbone")
        }
        head = dict(task.objective.named_parameters("objective"))
        kept = {f"objective.{name}" for name in task.objective.names_taken_over}
        self.head_start = {
            name: p.detach().clone() if name in kept else torch.zeros_like(p)
            for name, p in head.items()
        }
        return task

    def penalty(self, task, batch, streams):
        weight, head_weight = self.options.weight, self.options.head_weight
        backbone = squared_distance(task, self.start)
        head = squared_distance(task, self.head_start)
        return weight / 2 * backbone + head_weight / 2 * head


def squared_distance(task: Task, start: dict[str, Tensor]) -> Tensor:
    """Return the squared distance of the named parameters to where they started, ().

    ``start`` follows the parameters to their device.
    """
    total = torch.zeros((), device=next(task.parameters()).device)
    for name in start:
        now = task.get_parameter(name)
        start[name] = start[name].to(now)
        total = total + (now - start[name]).square().sum()
    return total
