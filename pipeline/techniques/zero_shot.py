"""The source's network without any training."""

from __future__ import annotations

from pipeline.config.registry import register
from pipeline.core.contracts import Technique


@register("technique", "zero_shot")
class ZeroShot(Technique):
    """Test the source's backbone and head as they are.

    It shows where adaptation starts. It is for objectives whose head is transferred, and for
    classification and multilabel, whose head is carried over label by label, by their names: the
    source must know every label of the target.
    """

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)
