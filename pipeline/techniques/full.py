"""Full fine-tuning: every layer is trained."""

from __future__ import annotations

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Technique


@register("technique", "full", options=LayerOptions)
class Full(Technique):
    """Train every layer from the first step on.

    It assumes that the source's weights are a good start, and nothing else. It helps with many
    rows, or inputs unlike the source's. It hurts with few rows: the source's features are then
    spoiled by a new head, or fitted to noise (Kumar et al. 2022).

    With ``layer_decay`` lower layers learn more slowly (Clark et al. 2020; Bao et al. 2022). With
    ``freeze`` the lowest layers do not learn at all. Both are useful where the source's features
    suit the target and its rows are few. They do harm where the inputs differ, because then the
    lowest layers must change.
    """

    def search_space(self):
        return {"lr": (0.03, 3.0), "layer_decay": (0.65, 1.0)}
