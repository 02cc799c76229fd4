"""TENT: norms are trained on the test rows by the entropy of predictions (Wang et al. 2021)."""

from __future__ import annotations

import torch
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Batch, Task, Technique
from pipeline.core.contracts.objective_capabilities import has_classes
from pipeline.core.nn.domain_adaptation import prediction_entropies
from pipeline.core.nn.norm_statistics import batch_norms, measure
from pipeline.core.nn.norms import norm_parameters

PART_ROWS = 32
"""Rows of which activations are kept at the same time, where a batch may be cut."""


class TentOptions(Options):
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam for the norms")
    passes: int = Field(1, ge=1, description="passes over the test rows")


@register("technique", "tent", options=TentOptions)
class Tent(Technique):
    """Adapt the source's network to the test rows by the entropy of its predictions.

    Only scales and shifts of the norms are trained. Batch norms use the statistics of the batch
    during training, and those of all test rows afterwards. The paper predicts a batch in the step
    that adapts to it. Here all rows are predicted after the last pass. Validation metrics are those
    of the source's network. (Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization,
    ICLR 2021.)

    It assumes test rows of all classes in every batch, and predictions that are right more often
    than not. It helps against changes of the inputs alone (noise, blur, scanners). It hurts where
    one class is by far the most frequent, or with many passes: every row is then put into one
    class. Networks without norms that can be trained are refused.
    """

    def check_target(self, objective, modality):
        if not has_classes(objective):
            raise ValueError(
                f"lowers the entropy of predicted classes, and {objective.registered_name} "
                "predicts none for a row: use adabn"
            )

    def wrap(self, task):
        if not norm_parameters(task):
            raise ValueError(
                f"tent: {task.backbone.arch.name} has no norm with parameters that could be "
                "trained: use pseudo_labels"
            )
        return task

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)

    def at_test(self, task, batches):
        task.eval()
        names = norm_parameters(task)
        trained = [parameter for name, parameter in task.named_parameters() if name in names]
        wanted = {name: p.requires_grad for name, p in task.named_parameters()}
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(name in names)
        norms = batch_norms(task.backbone)
        for norm in norms:
            norm.train()
        optimizer = torch.optim.Adam(trained, lr=self.options.lr)
        for _ in range(self.options.passes):
            for batch in batches():
                # batch norms read the whole batch; elsewhere the gradients of parts add up to its
                for part in batch.split(None if norms else PART_ROWS):
                    with torch.enable_grad():
                        loss = entropy(task, part) * (len(part) / len(batch))
                        loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if norms:
            measure(task.backbone, batches())
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(wanted[name])
        return task.eval()


def entropy(task: Task, batch: Batch) -> torch.Tensor:
    """Return the mean entropy of what is predicted of a batch, in nats."""
    scores = task.objective.predict(task.backbone, batch)["scores"]
    return prediction_entropies(task.objective, scores).mean()
