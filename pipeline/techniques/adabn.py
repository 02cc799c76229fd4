"""AdaBN: batch-norm statistics of the target (Li et al. 2017)."""

from __future__ import annotations

from pipeline.config.registry import register
from pipeline.core.contracts import Technique
from pipeline.core.nn.norm_statistics import batch_norms, measure


@register("technique", "adabn")
class AdaBN(Technique):
    """Test the source's network with the batch-norm statistics of the target's rows.

    Mean and variance of every batch norm are those of the target's rows without labels; weights and
    head are the source's, and nothing is trained. (Li et al., Revisiting Batch Normalization for
    Practical Domain Adaptation, ICLR workshops 2017.)

    It assumes that the domains differ in the scale of the features. It helps where light,
    microphone or scanner are other ones, and costs one pass over the rows. It hurts where the
    shares of the classes differ much, because the statistics depend on them too. Networks without
    batch norm are refused.
    """

    def check_target(self, objective, modality):
        """Any will do whose head is carried over."""

    def wrap(self, task):
        if not batch_norms(task.backbone):
            raise ValueError(
                f"adabn: {task.backbone.arch.name} has no batch norm, whose statistics could be "
                "measured: use tent (other norms), or dann"
            )
        return task

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)

    def prepare(self, task, batches):
        measure(task.backbone, batches())
        return task.eval()
