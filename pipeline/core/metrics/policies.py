"""Metrics of policies: errors of actions, and how episodes of their own went."""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.registry import register
from pipeline.core.metrics.metric import (
    NOT_NEGATIVE,
    SHARE,
    Bounds,
    Predictions,
    numerator_denominator,
    ratio,
    sum_known,
)

OF_EPISODES = frozenset(
    f"{whose}{what}"
    for whose in ("", "expert_", "random_")
    for what in ("success", "return", "steps")
)
"""Metrics of whole episodes, which read no single action."""


def _mean(p: Predictions, name: str) -> np.ndarray:
    """Units of a mean over the rows that have a value."""
    return sum_known(p[name], ~np.isnan(p[name]))


def _steps_bounds(p: Predictions) -> Bounds:
    """An episode has at most the steps after which its world ends it."""
    most = p.get("most_steps", ())
    return 0.0, float(np.mean(most)) if len(most) else math.inf


@register("metric", "action_error")
@ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
def action_error(p: Predictions) -> np.ndarray:
    """Mean squared error per dimension of the action. Lower is better."""
    return numerator_denominator(p["squared_error"], p["action_numbers"])


@register("metric", "success")
@ratio(bounds=SHARE)
def success(p: Predictions) -> np.ndarray:
    """Success rate: share of episodes that the simulation counts as solved."""
    return _mean(p, "success")


@register("metric", "return")
@ratio()
def mean_return(p: Predictions) -> np.ndarray:
    """Mean return: the sum of the rewards of an episode."""
    return _mean(p, "return")


@register("metric", "steps")
@ratio(bounds=_steps_bounds)
def steps(p: Predictions) -> np.ndarray:
    """Mean length of an episode in steps. More are better, as where something is kept upright.

    Where episodes end with success, judge by ``success`` or ``return``.
    """
    return _mean(p, "steps")


@register("metric", "expert_success")
@ratio(bounds=SHARE)
def expert_success(p: Predictions) -> np.ndarray:
    """Success rate of the demonstrations from the same starts, to compare `success` with."""
    return _mean(p, "expert_success")


@register("metric", "expert_return")
@ratio()
def expert_return(p: Predictions) -> np.ndarray:
    """Mean return of the demonstrations from the same starts, to compare `return` with."""
    return _mean(p, "expert_return")


@register("metric", "expert_steps")
@ratio(bounds=_steps_bounds)
def expert_steps(p: Predictions) -> np.ndarray:
    """Mean length of the demonstrations from the same starts, to compare `steps` with."""
    return _mean(p, "expert_steps")


@register("metric", "random_success")
@ratio(bounds=SHARE)
def random_success(p: Predictions) -> np.ndarray:
    """Success rate of random actions from the same starts, to compare `success` with."""
    return _mean(p, "random_success")


@register("metric", "random_return")
@ratio()
def random_return(p: Predictions) -> np.ndarray:
    """Mean return of random actions from the same starts, to compare `return` with."""
    return _mean(p, "random_return")


@register("metric", "random_steps")
@ratio(bounds=_steps_bounds)
def random_steps(p: Predictions) -> np.ndarray:
    """Mean length of episodes of random actions from the same starts, to compare `steps` with."""
    return _mean(p, "random_steps")
