"""What pretraining without labels has in common: each position of a row has a loss, and these
losses are all that is predicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Objective


class PositionLosses(Objective, ABC):
    """An objective that predicts parts of its own input, with a loss for each position of a row.

    Positions are tokens, patches, samples or hours; a loss of whole rows has one position. An
    objective that derives from this class writes ``position_losses`` alone.
    """

    @abstractmethod
    def position_losses(
        self, backbone: Backbone, batch: Batch
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return losses, which of them count, and what is logged, each (B,) or (B, N).

        Losses and logs are 0 where they do not count, and counts are 0 or 1, in a float type.
        """

    def loss(self, backbone: Backbone, batch: Batch):
        losses, counts, logs = self.position_losses(backbone, batch)
        sums = {name: value.detach().sum() for name, value in logs.items()}
        return losses.sum(), counts.sum(), sums

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and ``count``, both (B,): sums over the positions of each row."""
        losses, counts, _ = self.position_losses(backbone, batch)
        return {"loss": _by_row(losses), "count": _by_row(counts)}


def _by_row(values: Tensor) -> Tensor:
    """Return (B,) sums of (B,) or (B, N) values."""
    return values if values.dim() == 1 else values.sum(1)
