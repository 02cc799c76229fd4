"""Deep CORAL: the covariances of both domains are aligned (Sun and Saenko 2016)."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.nn.domain_adaptation import (
    DomainAdaptation,
    layer_normed,
    rows_of_all_ranks,
    share_of_global_loss,
)
from pipeline.core.nn.domain_losses import coral


class CoralOptions(AdaptationOptions):
    weight: float = Field(
        10.0,
        gt=0,
        description="weight of the distance between the covariances, which is at most about 0.5 "
        "for features that are normalised by row",
    )


@register("technique", "coral", options=CoralOptions)
class Coral(DomainAdaptation):
    """Penalise the distance between the covariances of source and target features.

    It is ||C_s - C_t||^2 / (4 D^2) over the rows of the whole batch, of features that are
    normalised by row, as the head reads them. (Sun and Saenko, Deep CORAL, ECCV workshops 2016.)

    It assumes that the domains differ in scale and correlation of the features. It helps when the
    shift is small. It needs no second network and hardly any tuning. It hurts little: with batches
    far smaller than the number of features the covariances are noise, and it does nothing.
    """

    def alignment(self, task, source, target):
        assert source is not None
        of_source, of_target = (
            rows_of_all_ranks(layer_normed(rows.pooled)) for rows in (source, target)
        )
        if min(len(of_source), len(of_target)) < 2:
            return (of_source.sum() + of_target.sum()) * 0.0
        return share_of_global_loss(coral(of_source, of_target))
