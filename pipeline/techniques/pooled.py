"""Training on the rows of source and target together."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts.technique_capabilities import LABELLED_SOURCE
from pipeline.core.nn.domain_adaptation import DomainAdaptation, DomainFeatures


class PooledOptions(LayerOptions):
    weight: float = Field(
        1.0,
        ge=0,
        description="weight of the mean loss of the source's rows, relative to that of the "
        "target's; 0 is full fine-tuning",
    )


@register("technique", "pooled", options=PooledOptions)
class Pooled(DomainAdaptation):
    """Fine-tune every layer on labelled rows of the target and of the source at the same time.

    A step takes a batch of each. At label fraction 0 it trains on the source alone; adaptation has
    to do better than this. (The weighted combination of Ben-David et al., A Theory of Learning from
    Different Domains, Machine Learning 2010.)

    It assumes that one function fits both domains. It helps with few labels of the target and a
    source that is much like it. Nothing of the source is forgotten. It hurts where the same inputs
    have other labels: each label of the target then competes with many of the source.
    """

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "weight": (0.1, 10.0),
        }

    def streams(self):
        return (LABELLED_SOURCE,) if self.options.weight else ()

    def check_target(self, objective, modality):
        self.check_labels_are_named(objective)

    def alignment(self, task, source, target):
        raise NotImplementedError("pooling compares no domains")

    def penalty(self, task, batch, streams):
        if not self.options.weight:
            return None
        source = DomainFeatures.of(task, streams[LABELLED_SOURCE])
        return self.options.weight * self.source_loss(task, source)
