"""The loss and what follows from it."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import (
    NOT_NEGATIVE,
    Bounds,
    Predictions,
    numerator_denominator,
    ratio,
)


def _mean_loss(p: Predictions) -> np.ndarray:
    losses = p["loss"]
    count = p["count"] if "count" in p else np.ones(len(losses))
    return numerator_denominator(losses, count)


def _loss_bounds(p: Predictions) -> Bounds:
    """That of densities (policies that predict numbers) may be negative, and has no least value."""
    return 0.0 if p["loss"].min(initial=0) >= 0 else -math.inf, math.inf


@register("metric", "loss")
@ratio(higher_is_better=False, bounds=_loss_bounds)
def loss(p: Predictions) -> np.ndarray:
    """Mean loss per unit that the objective counts: a token, sample, row or number. Lower is
    better.
    """
    return _mean_loss(p)


@register("metric", "perplexity")
@ratio(
    higher_is_better=False, bounds=(1.0, math.inf), final=lambda mean: math.exp(min(mean, 700.0))
)
def perplexity(p: Predictions) -> np.ndarray:
    """Perplexity: the exponential of the mean loss per token (nats). Lower is better."""
    return _mean_loss(p)


@register("metric", "bits_per_sample")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def bits_per_sample(p: Predictions) -> np.ndarray:
    """Mean bits per audio sample, of 8 without a model where there are 256 levels (van den Oord et
    al. 2016). Lower is better.
    """
    return _mean_loss(p) / np.array([math.log(2), 1.0])


@register("metric", "bits_per_byte")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def bits_per_byte(p: Predictions) -> np.ndarray:
    """Mean bits per UTF-8 byte of the text, comparable between tokenizers, as perplexity is not.
    Lower is better. There is no value for rows whose bytes were not counted.
    """
    num_bytes = p["bytes"] if "bytes" in p else np.zeros(len(p["loss"]))
    return numerator_denominator(p["loss"] / math.log(2), num_bytes)
