"""Bi-tuning: fine-tuning with two contrastive losses beside the task's own (Zhong et al. 2020)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Batch, Technique
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    has_one_class,
    mixes_inputs,
)
from pipeline.core.latest_call import LatestCall
from pipeline.core.nn.domain_adaptation import (
    DomainFeatures,
    TaskWithModule,
    rows_of_all_ranks,
    share_of_global_loss,
)
from pipeline.core.nn.losses import without_autocast


class BiTuningOptions(LayerOptions):
    classifier: float = Field(
        1.0, ge=0, description="weight of the contrastive cross-entropy of the classifier's scores"
    )
    projector: float = Field(
        1.0, ge=0, description="weight of the categorical contrastive loss of the projections"
    )
    temperature: float = Field(
        0.07, gt=0, description="divisor of the cosine similarities of projections"
    )
    width: int = Field(128, ge=1, description="width of the projections")


def contrastive_cross_entropy(scores: Tensor, label: Tensor) -> Tensor:
    """Return the mean loss of finding the rows of a class among all rows by its scores, ().

    The cross-entropy asks which class a row has; this one asks which rows have a class.

    Args:
        scores: (N, C) logits.
        label: (N,) class numbers.
    """
    by_class = scores.log_softmax(0).T  # of each class over the rows
    is_member = label[None, :] == torch.arange(scores.shape[1], device=label.device)[:, None]
    members = is_member.sum(1)
    of_class = -(by_class * is_member).sum(1) / members.clamp(min=1)
    return of_class[label].mean()  # a term a row, which is the same for rows of one class


def categorical_contrastive(projections: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Return the mean loss of finding a row's class among the other rows by cosine similarity, ().

    Rows whose class no other row has take no part.

    Args:
        projections: (N, P).
        label: (N,) class numbers.
    """
    unit = F.normalize(projections, dim=-1)
    with without_autocast(unit):  # a bfloat16 product has errors of the size of a temperature
        similar = unit @ unit.T / temperature
    is_self = torch.eye(len(label), dtype=torch.bool, device=label.device)
    logs = similar - similar.masked_fill(is_self, -torch.inf).logsumexp(1, keepdim=True)
    is_partner = (label[:, None] == label[None, :]) & ~is_self
    partners = is_partner.sum(1)
    of_row = -(logs * is_partner).sum(1) / partners.clamp(min=1)
    return of_row.sum() / (partners > 0).sum().clamp(min=1)


@register("technique", "bi_tuning", options=BiTuningOptions)
class BiTuning(Technique):
    """Fine-tune everything with two losses that bring rows of a class together (Zhong et al. 2020).

    Both are added to the task's own loss. In the contrastive cross-entropy the scores of a class
    find its rows among all rows of the batch. In the categorical contrastive loss a row finds the
    other rows of its class, by a projection that is dropped at the end. Rows are compared with
    those of the global batch; the paper compares them with a queue of a momentum encoder. The
    classifier's scores have no temperature, since its weights learn their scale.

    For classification. It assumes batches with several rows of a class. It helps with few labels
    and with sources that were trained without labels (contrastive, masked), whose features are not
    grouped by class yet. It hurts, or does nothing, in small batches and with hundreds of classes.
    Micro-batches are refused.

    Raises:
        ValueError: the target is not classification, or its options mix rows.
    """

    gathers_rows = True

    def search_space(self):
        return {"lr": (0.1, 10.0), "classifier": (0.1, 3.0), "projector": (0.1, 3.0)}

    def wrap(self, task):
        objective = task.objective
        if not has_one_class(objective) or not has_cached_head(objective):
            raise ValueError(
                "bi_tuning compares the rows of a class, and a row of "
                f"{objective.registered_name} has no single one: use it with classification"
            )
        if mixes_inputs(objective.options):
            raise ValueError(
                "bi_tuning needs the class of a row, and the options mixup and cutmix of "
                f"{objective.registered_name} mix rows: leave them out"
            )
        self.calls = LatestCall(task.backbone)
        projector = nn.Linear(task.backbone.pooled_dim, self.options.width)
        return TaskWithModule(task.backbone, objective, projector)

    def finish(self, task):
        self.calls.remove()
        return task.plain() if isinstance(task, TaskWithModule) else task

    def penalty(self, task, batch, streams):
        assert isinstance(task, TaskWithModule)
        features = self._features(task, batch)
        scores = rows_of_all_ranks(features.scores(task.objective))
        projections = rows_of_all_ranks(task.added(features.pooled).float())
        own_label = batch["label"].float() if len(batch) else features.pooled.new_zeros(0)
        label = rows_of_all_ranks(own_label).long()
        if len(label) < 2:
            return features.pooled.sum() * 0.0
        total = self.options.classifier * contrastive_cross_entropy(scores, label)
        contrastive = categorical_contrastive(projections, label, self.options.temperature)
        return share_of_global_loss(total + self.options.projector * contrastive)

    def _features(self, task: TaskWithModule, batch: Batch) -> DomainFeatures:
        """Return what the loss has used; (0, D) features where this rank has no row."""
        if not len(batch):
            return DomainFeatures.of(task, batch)
        return DomainFeatures(batch, self.calls.take().features.pooled.float())
