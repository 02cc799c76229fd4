"""What objectives with one linear layer on the features have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Loss, Objective
from pipeline.core.nn.losses import at_least_float32


def head_inputs(features: Tensor, options: Any, training: bool) -> Tensor:
    """Return features (..., D) as a linear layer reads them: after layer norm and dropout.

    Args:
        options: Those of the objective: ``norm``, a layer norm without parameters, and ``dropout``.
        training: Whether dropout is active.
    """
    if options.norm:
        features = F.layer_norm(features, features.shape[-1:])
    return F.dropout(features, options.dropout, training)


class PooledHead(Objective, ABC):
    """An objective that reads the pooled features alone, so that its head can be trained on cached
    ones.
    """

    @abstractmethod
    def scores(self, pooled: Tensor) -> Tensor:
        """Return the head's outputs (B, L) for pooled features (B, D)."""

    @abstractmethod
    def head_loss(self, features: Tensor, batch: Batch) -> Loss:
        """Return ``loss`` from pooled features (B, D)."""

    @abstractmethod
    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``predict`` from scores (B, L)."""

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        return self.predict_scores(at_least_float32(self.scores(features)), batch)

    def loss(self, backbone: Backbone, batch: Batch) -> Loss:
        return self.head_loss(backbone(batch).pooled, batch)

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        return self.head_predict(backbone(batch).pooled, batch)

    def logits(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Return the scores that ``predict`` returns, (B, L)."""
        return self.predict(backbone, batch)["scores"]
