"""Domain adaptation: align the features of the target's rows and of the source's."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Technique


class AlignmentOptions(Options):
    weight: float = Field(1.0, gt=0, description="weight of the distance between the features")


@register("technique", "mean_alignment", options=AlignmentOptions)
class MeanAlignment(Technique):
    """Penalise the distance between the means of the features (after Sun and Saenko 2016)."""

    def streams(self):
        return ("source", "target")

    def penalty(self, task, batch, streams):
        source, target = (task.backbone(streams[name]).pooled for name in self.streams())
        return self.options.weight * (source.mean(0) - target.mean(0)).square().sum()
