"""Full fine-tuning: every layer is trained."""

from __future__ import annotations

from pipeline.config.registry import register
from pipeline.core.contracts import Technique


@register("technique", "full")
class Full(Technique):
    """Train every layer from the first step on."""
