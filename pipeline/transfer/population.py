"""Population-based training (Jaderberg et al. 2017): settings that change in a training's course.

The members of a population train with one seed. At a quarter, a half and three quarters of the
training the worst are replaced by children of the best. A child has its parent's settings, and
another learning rate or weight decay from there on (``train.changes``).

The paper copies the parent's weights. Here a child is trained from the first step: up to its
change it repeats its parent, step by step. So a trial stays a function of its settings, and can be
resumed, tried again with further seeds and compared with scratch. The price is that a child costs a
whole training. A member that is replaced was trained to its end too, and may still be the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config.schema import (
    MIN_POPULATION_TRIALS,
    Change,
    Target,
    Train,
    round_hyper_parameter,
)
from pipeline.core.rng import mix
from pipeline.transfer import grid
from pipeline.transfer.grid import HyperParameters, SearchSpace

CHANGED = ("lr", "weight_decay")
"""Settings that can change in a training. Children inherit all others."""
POINTS = 3
"""How often members are replaced."""
FACTORS = (0.8, 1.2)
"""A child has its parent's value times one of these, as in the paper."""
TRIES = 20
"""How often a child is made anew that has the settings of another one."""
RESAMPLED = 0.25
"""Probability that a child's value is drawn anew instead, as in Ray Tune."""
Curve = Mapping[int, float]
"""The primary metric on validation rows by the number of steps taken, larger is better."""


def problems(name: str, target: Target) -> list[str]:
    """Return what keeps a target's training from being searched in this way."""
    train, out = target.train, list[str]()
    place = f"targets.{name}.train"
    if train.patience is not None:
        out.append(f"{place}.patience: searcher pbt compares whole trainings: leave it out")
    if train.changes:
        out.append(f"{place}.changes: searcher pbt finds them: leave them out")
    if train.steps is not None and train.steps <= POINTS:
        out.append(f"{place}.steps: {train.steps}: searcher pbt needs at least {POINTS + 1}")
    elif train.eval_every_steps is not None:
        where = f"{place}.eval_every_steps: searcher pbt needs a validation in each quarter"
        if train.steps is None:
            out.append(f"{where}: leave it out, or give steps instead of epochs")
        elif train.eval_every_steps > (most := train.steps // (POINTS + 1)):
            out.append(f"{where}: at most {most}")
    return out


def sizes(trials: int) -> tuple[int, int]:
    """Return the size of a population, and how many of its members are replaced at each point.

    Together with the children there are ``trials`` trainings. About a quarter of the members is
    replaced.
    """
    replaced = max(1, trials // MIN_POPULATION_TRIALS)
    return trials - POINTS * replaced, replaced


def settings_to_try(
    space: SearchSpace,
    drawn: Sequence[HyperParameters],
    train: Train,
    curve_of: Callable[[HyperParameters], Curve | None],
) -> list[HyperParameters]:
    """Return the settings that are known so far: the first members, then children.

    Args:
        drawn: Random draws; the first of them are the first members.
        train: The target's settings.
        curve_of: Returns the curve of a setting's training; {}: it failed; None: it has not ended.
    """
    names = [name for name in CHANGED if name in space.values]
    if not space.is_stated:
        names = [name for name in names if name == "lr"]  # others are options of the technique
    if not names:
        return grid.without_repeats(drawn)
    size, replaced = sizes(len(drawn))
    members = grid.without_repeats(drawn[:size])
    tried = list(members)
    replaced = min(replaced, len(members) // 2)
    last_step = 0
    for point in range(1, POINTS + 1):
        curves = [curve_of(member) for member in members]
        if any(curve is None for curve in curves):
            break
        step = _validated_step([curve for curve in curves if curve], point)
        if step <= last_step:
            continue
        last_step = step
        values = [curve.get(step, -math.inf) if curve else -math.inf for curve in curves]
        ranked = sorted(range(len(members)), key=lambda i: values[i], reverse=True)
        best = [members[i] for i in ranked[:replaced] if values[i] > -math.inf]
        if not best:
            break
        generator = np.random.default_rng(mix(space.seed, point))
        for i in ranked[len(ranked) - replaced :]:
            for _ in range(TRIES):
                parent = best[int(generator.integers(len(best)))]
                members[i] = _child(parent, step, names, space, train, generator)
                if members[i] not in tried:
                    break
            tried.append(members[i])
    return grid.without_repeats(tried)


def _validated_step(curves: Sequence[Curve], point: int) -> int:
    """Return the last step with a validation in the first ``point`` quarters; 0: there is none."""
    steps = sorted({step for curve in curves for step in curve})
    return max((step for step in steps if step * (POINTS + 1) <= steps[-1] * point), default=0)


def _child(
    parent: HyperParameters,
    step: int,
    names: Sequence[str],
    space: SearchSpace,
    train: Train,
    generator: np.random.Generator,
) -> HyperParameters:
    """Return a parent's settings with other values of the named ones from a step on."""
    change: dict[str, Any] = {"step": step}
    for name in names:
        value = _value(parent, name, train)
        if value > 0:  # a weight decay of 0 stays
            change[name] = round_hyper_parameter(name, _perturbed(value, name, space, generator))
    stated = Change.model_validate(change).model_dump(exclude_none=True)
    return {**parent, "changes": [*parent.get("changes", ()), stated]}


def _value(settings: HyperParameters, name: str, train: Train) -> float:
    """Return the value that settings have at the end of a training."""
    values = [settings.get(name, getattr(train, name))]
    values += [change[name] for change in settings.get("changes", ()) if name in change]
    return values[-1]


def _perturbed(
    value: float, name: str, space: SearchSpace, generator: np.random.Generator
) -> float:
    """Return another value of a range, or a neighbour of it among choices."""
    scale = 1.0 if space.is_stated else space.lr
    values = [scale * one for one in space.values[name]]
    is_range = space.is_range(name)
    if generator.random() < RESAMPLED:
        return grid.draw_value(values, is_range, generator)
    if is_range:
        low, high = values
        others = [min(max(value * factor, low), high) for factor in FACTORS]
    else:
        ordered = sorted(values)
        place = int(np.argmin([abs(one - value) for one in ordered]))
        others = ordered[max(place - 1, 0) : place + 2]
    others = [one for one in others if one != value] or [value]
    return others[int(generator.integers(len(others)))]
