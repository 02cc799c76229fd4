"""Backbone and objective together: what is trained."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone
from pipeline.core.contracts.objective import Loss, Objective
from pipeline.core.contracts.objective_capabilities import couples_rows


class Task(nn.Module):
    """Backbone and objective as the one module that DDP wraps."""

    def __init__(self, backbone: Backbone, objective: Objective):
        super().__init__()
        self.backbone, self.objective = backbone, objective

    def forward(self, batch: Batch) -> Loss:
        """Return the objective's loss; zeros for an empty batch, with a gradient everywhere.

        A rank whose rows were all undecodable still takes part in the gradients' reduction.
        """
        if len(batch):
            return self.objective.loss(self.backbone, batch)
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        zero = sum(((parameter * 0.0).sum() for parameter in trained), torch.zeros(()))
        if couples_rows(self.objective):
            self.objective.forward_without_rows(self.backbone)
        return zero, torch.zeros((), device=zero.device), {}

    def layers(self) -> dict[str, list[str]]:
        """Map layer names to parameter names: the backbone's layers, then ``head``."""
        layers = {
            name: [f"backbone.{parameter}" for parameter in parameters]
            for name, parameters in self.backbone.layers().items()
        }
        layers["head"] = [f"objective.{name}" for name, _ in self.objective.named_parameters()]
        return layers
