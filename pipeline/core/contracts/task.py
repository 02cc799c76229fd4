"""Backbone and objective together: what is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone
from pipeline.core.contracts.objective import Loss, Objective
from pipeline.core.contracts.objective_capabilities import (
    averages_predictions,
    couples_rows,
    is_calibrated,
)


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

    def undecayed_parameters(self) -> set[str]:
        """Return the names of parameters that must have no weight decay although they are matrices.

        Those that the backbone names, and what multiplies weights, which does nothing at 1, not at
        0: scales of IA3, lengths of DoRA.
        """
        return {f"backbone.{name}" for name in self.backbone.undecayed_parameters()}


class Ensemble(Task):
    """Several tasks that predict together, for validation and test; it is not trained or saved.

    It takes the memory and the time of all its members.

    Raises:
        ValueError: the objective's predictions cannot be averaged.
    """

    def __init__(self, members: Sequence[Task]):
        super().__init__(members[0].backbone, _AveragedObjective(members))

    @property
    def member_objective(self) -> Objective:
        """The objective whose predictions are averaged."""
        assert isinstance(self.objective, _AveragedObjective)
        return self.objective.tasks()[0].objective


class _AveragedObjective(Objective):
    """The objective of an ensemble: it averages what the members predict.

    Only the average is calibrated, never a member.
    """

    def __init__(self, members: Sequence[Task]):
        lead = members[0].objective
        if not averages_predictions(lead):
            raise ValueError(f"the predictions of {lead.registered_name} cannot be averaged")
        super().__init__(members[0].backbone, lead.options, lead.state)
        self.members = nn.ModuleList(members)
        self._average = copy.deepcopy(lead)

    def loss(self, backbone: Backbone, batch: Batch) -> Loss:
        raise NotImplementedError("an ensemble is not trained")

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        found = [one.objective.predict(one.backbone, batch) for one in self.tasks()]
        return self._average.average(found)

    def tasks(self) -> list[Task]:
        """Return the members."""
        return [one for one in self.members if isinstance(one, Task)]

    @property
    def needs_calibration(self) -> bool:
        return is_calibrated(self._average)

    def calibrate(self, predictions: dict[str, np.ndarray]) -> None:
        """Calibrate the averaged predictions of the validation rows."""
        average = self._average
        assert is_calibrated(average)
        average.calibrate(predictions)
        self.state = self._average.state
