"""What techniques of domain adaptation have in common: rows of the source with their labels, rows
of the target without any, and a penalty that compares the two.

The loss of a step is that of the target's labelled rows (none at label fraction 0), plus
``source_weight`` times that of the source's labelled rows, plus ``weight`` times the penalty. All
of them are means over the rows of all ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Modality, Objective, Task, Technique
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    has_classes,
    has_one_class,
    names_labels,
)
from pipeline.core.contracts.technique_capabilities import LABELLED_SOURCE
from pipeline.core.nn.all_gather import all_gather_rows, all_reduce_sum, rank_and_count
from pipeline.core.nn.domain_losses import entropies, label_set_entropies

ADDED = "adaptation"
"""Layer of the modules that a technique adds for training."""


class DomainAdaptation(Technique, ABC):
    """Fine-tune every layer on labelled rows of target and source, with a penalty on both.

    Options are ``weight``, of the penalty, and ``source_weight``, of the loss of the source's
    labelled rows; 0: they are read without labels, or not at all.

    A search draws ``lr`` alone. Without labels of the target it chooses on the source's validation
    rows, which are best with no penalty at all.
    """

    gathers_rows = True
    compares_domains = True
    """Whether the penalty reads rows of the source, with labels or without."""
    needs_classes = False
    """Whether the penalty reads predictions: rows need one class or a set of labels."""
    needs_one_class = False
    """Whether it reads the probabilities of exclusive classes."""

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.progress = 0.0

    @abstractmethod
    def alignment(
        self, task: Task, source: DomainFeatures | None, target: DomainFeatures
    ) -> Tensor:
        """Return the penalty of a batch of each domain.

        Use `mean_over_ranks` and `rows_of_all_ranks`, so that it is that of all ranks' batches.
        ``source`` is None where ``source_weight`` is 0 and domains are not compared.
        """

    def streams(self) -> tuple[str, ...]:
        if self.options.source_weight:
            return (LABELLED_SOURCE, "target")
        return ("source", "target") if self.compares_domains else ("target",)

    def finish(self, task: Task) -> Task:
        """Drop the module that ``wrap`` added."""
        return task.plain() if isinstance(task, TaskWithModule) else task

    def at_step(self, step: int, steps: int) -> None:
        self.progress = step / steps

    def ramp(self) -> float:
        """Return 2 / (1 + exp(-10 progress)) - 1: from 0 at the start to about 1 (DANN)."""
        return 2.0 / (1.0 + math.exp(-10.0 * self.progress)) - 1.0

    def check_labels_are_named(self, objective: type[Objective]) -> None:
        """Raise ValueError where labels of a source cannot be read as the target's."""
        if not (names_labels(objective) and has_cached_head(objective)):
            raise ValueError(
                f"reads the labels of the source, and those of {objective.registered_name} have "
                "no names by which two data sets could be compared (where there is an option "
                "source_weight, 0 reads them without labels)"
            )

    def check_target(self, objective: type[Objective], modality: type[Modality]) -> None:
        if self.options.source_weight:
            self.check_labels_are_named(objective)
        if self.needs_one_class and not has_one_class(objective):
            raise ValueError(
                f"compares the probabilities of exclusive classes, and {objective.registered_name} "
                "predicts none: use dann, coral or dan"
            )
        if self.needs_classes and not has_classes(objective):
            raise ValueError(
                f"compares predicted classes, and {objective.registered_name} predicts none for a "
                "row: use dann, coral or dan"
            )

    def penalty(self, task: Task, batch: Batch, streams: Mapping[str, Batch]) -> Tensor | None:
        *of_source, _ = self.streams()
        source = DomainFeatures.of(task, streams[of_source[0]]) if of_source else None
        target = DomainFeatures.of(task, streams["target"])
        total = self.options.weight * self.alignment(task, source, target)
        if self.options.source_weight:
            assert source is not None
            total = total + self.options.source_weight * self.source_loss(task, source)
        return total

    def source_loss(self, task: Task, source: DomainFeatures) -> Tensor:
        """Return the mean loss of the source's labelled rows."""
        assert has_cached_head(task.objective)
        if not len(source.batch):
            # take part in the sum of counts, for which the other ranks wait
            all_reduce_sum(torch.zeros((), device=source.pooled.device))
            return source.pooled.sum() * 0.0
        losses, count, _ = task.objective.head_loss(source.pooled, source.batch)
        return losses / all_reduce_sum(count).clamp(min=1.0)


class DomainFeatures:
    """Pooled features of a batch, and what its head predicts of them."""

    def __init__(self, batch: Batch, pooled: Tensor):
        self.batch, self.pooled = batch, pooled

    @classmethod
    def of(cls, task: Task, batch: Batch) -> DomainFeatures:
        """Run the backbone; a batch without rows has (0, D) features."""
        if len(batch):
            return cls(batch, task.backbone(batch).pooled.float())
        device = next(task.parameters()).device
        return cls(batch, torch.zeros(0, task.backbone.pooled_dim, device=device))

    def scores(self, objective: Objective) -> Tensor:
        """Return the logits (B, C) of the head; they are not calibrated while training."""
        assert has_cached_head(objective)
        unlabelled = Batch(self.batch.rows, self.batch.keys, {}, self.batch.shards)
        return objective.head_predict(self.pooled, unlabelled)["scores"].float()

    def probabilities(self, objective: Objective) -> Tensor:
        """Return the probabilities (B, C) of classes, or (B, L) of independent labels."""
        return probabilities(objective, self.scores(objective))


def probabilities(objective: Objective, scores: Tensor) -> Tensor:
    """Return the probabilities that scores of an objective's head stand for."""
    return scores.softmax(-1) if has_one_class(objective) else scores.sigmoid()


def prediction_entropies(objective: Objective, scores: Tensor) -> Tensor:
    """Return the (B,) entropies, in nats, of what scores of an objective's head predict."""
    return entropies(scores) if has_one_class(objective) else label_set_entropies(scores)


def mean_over_ranks(losses: Tensor) -> Tensor:
    """Return this rank's share of the mean of (B,) losses over the rows of all ranks."""
    count = all_reduce_sum(torch.full((), float(len(losses)), device=losses.device))
    return losses.sum() / count.clamp(min=1.0)


def rows_of_all_ranks(local: Tensor) -> Tensor:
    """Return the rows of all ranks; gradients flow to this rank's own."""
    return all_gather_rows(local)[0]


def share_of_global_loss(loss: Tensor) -> Tensor:
    """Return this rank's share of a loss that each rank computes of all gathered rows.

    The gradient stays whole, since it flows to the rank's own rows alone.
    """
    _, count = rank_and_count()
    return loss - loss.detach() * (1 - 1 / count)


def layer_normed(features: Tensor) -> Tensor:
    """Return (B, D) features normalised by row, as heads read them: one scale for all backbones."""
    return F.layer_norm(features, features.shape[-1:])


class DomainClassifier(nn.Module):
    """Predicts from which domain a row comes: two hidden layers, one logit, source positive."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B,) logits of (B, width) features."""
        return self.body(features)[:, 0]

    def losses(self, features: Tensor, is_source: bool) -> Tensor:
        """Return (B,) losses of rows of one domain."""
        logits = self(features).float()
        return F.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, float(is_source)), reduction="none"
        )


class TaskWithModule(Task):
    """A task with a module that only its technique uses, in a layer of its own."""

    def __init__(self, backbone: Backbone, objective: Objective, added: nn.Module):
        super().__init__(backbone, objective)
        self.added = added

    def layers(self) -> dict[str, list[str]]:
        layers = super().layers()
        head = layers.pop("head")
        added = [f"added.{name}" for name, _ in self.added.named_parameters()]
        return {**layers, ADDED: added, "head": head}

    def plain(self) -> Task:
        """Return the task without it."""
        return Task(self.backbone, self.objective)
