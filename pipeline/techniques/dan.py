"""Maximum mean discrepancy with several kernels, of features alone or together with predictions
(Long et al. 2015, 2017).
"""

from __future__ import annotations

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    DomainFeatures,
    layer_normed,
    rows_of_all_ranks,
    share_of_global_loss,
)
from pipeline.core.nn.domain_losses import joint_mmd


@register("technique", "dan", options=AdaptationOptions)
class DAN(DomainAdaptation):
    """Penalise the maximum mean discrepancy of source and target features.

    The unbiased estimate over the whole batch, with a sum of five Gaussian kernels around the mean
    distance of rows. (Long et al., Learning Transferable Features with Deep Adaptation Networks,
    ICML 2015.) Only the pooled features, which the head reads, are aligned. The paper aligns
    several layers, the head's output among them, and also fits a weight to each kernel. `jan`
    aligns the predictions too.

    It assumes about the same share of each class in both domains. It helps where adversarial
    training is unstable: there is no second network. It hurts with small batches (the estimate is
    noise) and where the shares of the classes differ.
    """

    def layers(self, task, rows: DomainFeatures):
        """Return the (B, D) outputs that are aligned together."""
        return [layer_normed(rows.pooled)]

    def alignment(self, task, source, target):
        assert source is not None
        of_source, of_target = (
            [rows_of_all_ranks(layer) for layer in self.layers(task, rows)]
            for rows in (source, target)
        )
        if min(len(of_source[0]), len(of_target[0])) < 2:
            return sum(layer.sum() for layer in (*of_source, *of_target)) * 0.0
        return share_of_global_loss(joint_mmd(of_source, of_target))


@register("technique", "jan", options=AdaptationOptions)
class JAN(DAN):
    """Penalise the discrepancy of features and predictions together.

    As `dan`, with the product of the kernels of features and of class probabilities. So their joint
    distribution is aligned. (Long et al., Deep Transfer Learning with Joint Adaptation Networks,
    ICML 2017.)

    It assumes that predictions on the target are right more often than not. It helps where classes
    lie apart; it hurts where the first predictions are wrong.
    """

    needs_classes = True

    def layers(self, task, rows):
        return [layer_normed(rows.pooled), rows.probabilities(task.objective)]
