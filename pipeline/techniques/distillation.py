"""Techniques that read the source's network: distillation and those that keep its head."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Batch, HeadFirst, Objective, Task, Technique
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    has_classes,
    has_one_class,
    mixes_inputs,
    tensors_beside_features,
)
from pipeline.core.latest_call import LatestCall
from pipeline.core.nn.all_gather import all_reduce_sum

# ---------------------------------------------------------------- distances to a teacher


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of features (B, D), each row in units of its deviation, ().

    The units make one weight fit every backbone.
    """
    width = student.shape[-1:]
    return (F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float, is_one_class: bool) -> Tensor:
    """Return the mean Kullback-Leibler divergence of scores (B, C) from a teacher's, ().

    Both are divided by the temperature, and the result is multiplied by its square, so that its
    gradient does not depend on it (Hinton et al. 2015).

    Args:
        is_one_class: Whether a row has one of C classes, or any of C labels (the mean over them).
    """
    student, teacher = student / temperature, teacher / temperature
    if is_one_class:
        log_ratio = teacher.log_softmax(-1) - student.log_softmax(-1)
        rows = (teacher.softmax(-1) * log_ratio).sum(-1)
    else:
        yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        rows = (yes + no).mean(-1)
    return temperature**2 * rows.mean()


def scores_of(head: Objective, pooled: Tensor, batch: Batch) -> Tensor:
    """Return the scores (B, C) of a head on pooled features, without any label."""
    assert has_cached_head(head)
    labels = tensors_beside_features(head)
    data = {name: tensor for name, tensor in batch.data.items() if name not in labels}
    return head.head_predict(pooled, Batch(batch.rows, batch.keys, data, batch.shards))["scores"]


def check_has_classes(name: str, whose: str, head: Objective) -> None:
    """Raise ValueError where a head has no scores of classes or labels."""
    if not has_classes(head) or not has_cached_head(head):
        raise ValueError(
            f"{name} compares scores of classes or labels, and {whose} objective is "
            f"{head.registered_name}: use it with classification or multilabel"
        )


# ---------------------------------------------------------------- distillation


class DistillationOptions(LayerOptions):
    features: float = Field(
        1.0, ge=0, description="weight of the squared distance of pooled features to the source's"
    )
    logits: float = Field(
        0.0,
        ge=0,
        description="weight of the divergence of scores from those of the source's own head, which "
        "must know all labels of the target",
    )
    temperature: float = Field(2.0, gt=0, description="that scores are divided by")


@register("technique", "distillation", options=DistillationOptions)
class Distillation(Technique):
    """Fine-tune everything with the source's network as a teacher, on the target's rows.

    The penalty is the distance of the pooled features to those of the source (Romero et al. 2015);
    each row's features are first standardised. The option `logits` adds the
    divergence from the scores of the source's head (Hinton et al. 2015), matched to the target's
    labels by name.

    It assumes that the source's features of a row are worth keeping. It helps with few labels. It
    keeps the network's function near the source's, while l2_sp keeps its weights near. It hurts
    where the target needs other features. Each step costs a forward pass of a second backbone, and
    its memory.

    Raises:
        ValueError: the scores are wanted, and the source has no head, lacks labels of the target,
            or is of classification where the target is of multilabel, or the other way round.
    """

    source: Task | None = None

    def read_source(self, source):
        self.source = source

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "features": (0.1, 10.0),
        }

    def wrap(self, task):
        if not self.options.features and not self.options.logits:
            raise ValueError("distillation: features and logits are both 0: give one a weight")
        self.calls = LatestCall(task.backbone)
        # teachers are no modules of the task: they are neither trained nor in resume points
        if self.options.logits:
            self.columns = self._columns(task)
            assert self.source is not None
            self.head = copy.deepcopy(self.source.objective).eval().requires_grad_(False)
        self.teacher = copy.deepcopy(task.backbone).eval().requires_grad_(False)
        return task

    def _columns(self, task: Task) -> list[int]:
        """Return the place of each of the target's labels among the source's."""
        if self.source is None:
            raise ValueError(
                "distillation: logits: the source has no head, since it is a checkpoint: leave the "
                "weight of logits out"
            )
        check_has_classes("distillation", "the target's", task.objective)
        check_has_classes("distillation", "the source's", self.source.objective)
        if has_one_class(self.source.objective) != has_one_class(task.objective):
            raise ValueError(
                f"distillation: logits: the source's {self.source.objective.registered_name} and "
                f"the target's {task.objective.registered_name} turn scores into probabilities in "
                "different ways: leave the weight of logits out"
            )
        labels = task.objective.state["labels"]
        source_labels = self.source.objective.state["labels"]
        unknown = [label for label in labels if label not in source_labels]
        if unknown:
            raise ValueError(
                f"distillation: logits: the source's head does not know {len(unknown)} of the "
                f"target's labels ({', '.join(map(str, unknown[:4]))}): use lwf, or leave the "
                "weight of logits out"
            )
        return [source_labels.index(label) for label in labels]

    def finish(self, task):
        self.calls.remove()
        return task

    def penalty(self, task, batch, streams):
        call, options = self.calls.take(), self.options
        pooled = call.features.pooled
        with torch.no_grad():
            teacher = call.repeat(self.teacher.to(pooled.device)).pooled
        total = options.features * feature_distance(pooled.float(), teacher.float())
        if options.logits:
            scores = scores_of(task.objective, pooled, call.batch).float()
            with torch.no_grad():
                teacher_scores = scores_of(self.head.to(pooled.device), teacher, call.batch).float()
            teacher_scores = teacher_scores[:, self.columns]
            is_one_class = has_one_class(task.objective)
            distance = divergence(scores, teacher_scores, options.temperature, is_one_class)
            total = total + options.logits * distance
        return total


# ---------------------------------------------------------------- the source's head is kept


class TwoHeadedTask(Task):
    """A task that keeps the source's head beside its own; both are trained."""

    def __init__(self, task: Task, old: Objective):
        super().__init__(task.backbone, task.objective)
        self.old = old

    def layers(self) -> dict[str, list[str]]:
        layers = super().layers()
        head = layers.pop("head")
        layers["old_head"] = [f"old.{name}" for name, _ in self.old.named_parameters()]
        return {**layers, "head": head}

    def is_probing(self) -> bool:
        """Return whether the new head is trained alone."""
        return not any(parameter.requires_grad for parameter in self.old.parameters())


class _KeepsHead(HeadFirst):
    """Train the source's head beside the new one, and drop it at the end."""

    source: Task | None = None
    calls: LatestCall

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "weight": (0.1, 10.0),
        }

    def read_source(self, source: Task | None) -> None:
        self.source = source

    def source_head(self) -> Objective:
        """Return the source's head. Raises ValueError where it has none of classes or labels."""
        if self.source is None:
            raise ValueError(
                f"{self.registered_name} keeps the source's head, and this source has none, since "
                "it is a checkpoint: use distillation or l2_sp"
            )
        check_has_classes(self.registered_name, "the source's", self.source.objective)
        return self.source.objective

    def finish(self, task):
        self.calls.remove()
        return Task(task.backbone, task.objective)


class LwFOptions(LayerOptions):
    weight: float = Field(1.0, ge=0, description="weight of the old head's divergence")
    temperature: float = Field(2.0, gt=0, description="that scores are divided by")
    probe_share: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="share of the steps that train the new head alone before everything is trained",
    )


@register("technique", "lwf", options=LwFOptions)
class LwF(_KeepsHead):
    """Fine-tune everything so that the source's own task is still solved on the target's rows.

    Learning without forgetting (Li and Hoiem 2016). The source's head is kept in addition to the
    new one. Its scores for the target's rows should not change much: their divergence from the
    scores of the source's network is a penalty. The new head is trained alone first. Then both
    heads are trained. The source's head is dropped at the end, and the bundle has the target's
    network.

    It needs a source's head of classes or labels. It assumes that the source's labels say something
    about the target's rows. It helps with few labels and related label sets. It hurts, or does
    nothing, where the source's head is undecided on the target's rows. Each step costs a forward
    pass of a second backbone, and its memory.

    Raises:
        ValueError: the source has no head, or none of classes or labels.
    """

    def wrap(self, task):
        old = copy.deepcopy(self.source_head())
        assert self.source is not None
        self.teacher = self.source.eval().requires_grad_(False)
        self.calls = LatestCall(task.backbone)
        return TwoHeadedTask(task, old)

    def penalty(self, task, batch, streams):
        assert isinstance(task, TwoHeadedTask)
        call = self.calls.take()
        if task.is_probing():
            return None
        pooled = call.features.pooled
        source = self.teacher.to(pooled.device)
        with torch.no_grad():
            source_pooled = call.repeat(source.backbone).pooled
            teacher_scores = scores_of(source.objective, source_pooled, call.batch)
        scores = scores_of(task.old, pooled, call.batch)
        temperature, is_one_class = self.options.temperature, has_one_class(task.old)
        distance = divergence(scores.float(), teacher_scores.float(), temperature, is_one_class)
        return self.options.weight * distance


# ---------------------------------------------------------------- co-tuning


class CoTuningOptions(LayerOptions):
    weight: float = Field(1.0, ge=0, description="weight of the loss of the source's labels")
    probe_share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of the steps that train the new head alone; in these steps the "
        "source's probabilities of each class's rows are averaged",
    )


class CoTunedTask(TwoHeadedTask):
    """A task with both heads, and how often each of the source's labels goes with each class.

    Both tables are buffers, so that they are part of resume points.
    """

    def __init__(self, task: Task, old: Objective, classes: int, old_classes: int):
        super().__init__(task, old)
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(classes, old_classes))
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros(classes))
        self._counted = torch.zeros(classes, old_classes + 1)  # by this rank, in this step

    @torch.no_grad()
    def count(self, label: Tensor, scores: Tensor) -> None:
        """Count rows of the classes ``label`` (B,) with the old head's scores (B, S)."""
        one_row = torch.ones_like(scores[:, :1])
        self._counted = self._counted.to(scores.device)
        self._counted.index_add_(0, label, torch.cat([scores.softmax(-1), one_row], 1))

    @torch.no_grad()
    def add_counted(self) -> None:
        """Add what all ranks have counted in a step; every rank calls it."""
        total = all_reduce_sum(self._counted.to(self.sums.device))
        self.sums += total[:, :-1]
        self.rows += total[:, -1]
        self._counted.zero_()

    def relation(self) -> Tensor:
        """Return the probabilities of the source's labels, given each class, (C, S).

        Zeros for a class that no row had.
        """
        return self.sums / self.rows.clamp(min=1)[:, None]


@register("technique", "co_tuning", options=CoTuningOptions)
class CoTuning(_KeepsHead):
    """Fine-tune everything, with the source's head trained on each class's mean source labels.

    The source's head is kept in addition to the new one. First the new head is trained alone. In
    these steps the source's probabilities are averaged over the rows of each class (You et al.
    2020, the direct approach, on augmented training rows). Then everything is trained, and the
    source's head has to predict the average of the row's class: this loss is added. The source's
    head is dropped at the end.

    The paper averages over all training rows. Here it is over those that the first steps read. If
    they are less than an epoch, a class without any of these rows adds no loss.

    For classification on a source of classification. It assumes that the classes of both are
    related. It helps with few labels, where the source's labels tell more about a row than its
    class alone. It does nothing where the source's head predicts the same for every class. It hurts
    where classes are related by chance: the backbone then has to keep what does not serve the
    target. With several ranks the rows of all are counted.

    Raises:
        ValueError: source or target is not classification, or the source has no head.
    """

    def wrap(self, task):
        old = copy.deepcopy(self.source_head())
        check_has_classes("co_tuning", "the target's", task.objective)
        for whose, head in (("the source's", old), ("the target's", task.objective)):
            if not has_one_class(head):
                raise ValueError(
                    f"co_tuning relates classes to classes, and {whose} objective is "
                    f"{head.registered_name}, whose rows have any number of labels: use lwf"
                )
        if mixes_inputs(task.objective.options):
            raise ValueError(
                "co_tuning needs the class of a row, and the options mixup and cutmix of "
                f"{task.objective.registered_name} mix rows: leave them out"
            )
        self.calls = LatestCall(task.backbone)
        classes, old_classes = (len(one.state["labels"]) for one in (task.objective, old))
        return CoTunedTask(task, old, classes, old_classes)

    def penalty(self, task, batch, streams):
        assert isinstance(task, CoTunedTask)
        call = self.calls.take()
        label = call.batch["label"]
        scores = scores_of(task.old, call.features.pooled, call.batch).float()
        if task.is_probing():
            task.count(label, scores)
            return None
        relation = task.relation()[label]
        return self.options.weight * -(relation * scores.log_softmax(-1)).sum(-1).mean()

    def read_gradients(self, task, phase, step):
        """Add up the counts of all ranks (`ReadsGradients`): those without rows take part."""
        if task.is_probing():
            task.add_counted()
