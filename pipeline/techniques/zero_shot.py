"""The source's network without any training."""

from __future__ import annotations

from pipeline.config.registry import register
from pipeline.core.contracts import Technique


@register("technique", "zero_shot")
class ZeroShot(Technique):
    """Test the source's backbone and head as they are.

    For objectives whose head is transferred: it shows where adaptation starts.
    """

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)
