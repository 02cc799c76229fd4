"""Weight soups: the mean of the weights of several fine-tuned models (Wortsman et al. 2022)."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Technique


class SoupOptions(Options):
    of: str = Field("full", description="the technique whose seeds are averaged")


@register("technique", "soup", options=SoupOptions)
class Soup(Technique):
    """Average the weights of all seeds of another technique."""

    starts_from = "trials"

    def phases(self, steps):
        return ()

    def after_fanout(self, trials):
        found = [trial.weights() for trial in trials if trial.technique == self.options.of]
        return {name: sum(weights[name] for weights in found) / len(found) for name in found[0]}
