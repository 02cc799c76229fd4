"""What a transferability score is: how well a source fits a target, before any fine-tuning.

A score is a function of what a source's network makes of rows. Its parameters without a default
say what it reads (`INPUTS`), and `score` says the rest::

    from pipeline.config.registry import register
    from pipeline.core.contracts.score import score


    @register("score", "margin", title="Margin")
    @score(tasks=("classes",))
    def margin(features, labels):
        "How much farther the other class means are than a row's own."
        ...

A plain function of ``features`` and ``labels`` is a score of classes and label sets, the higher the
better. One that compares rows with each other has a parameter ``groups=None`` too (`GROUPS`).
A score that cannot be computed from the rows at hand returns NaN, which is shown as
"undefined" and never ranked before a number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

ScoreTask = Literal["classes", "label sets", "numbers"]
"""Of a target's rows: (n,) class numbers; (n, L) 0 or 1; (n,) or (n, T) real numbers."""
INPUTS = ("features", "labels", "probabilities", "source_features")
"""Parameters of scores: (n, D) features of the target's rows, their labels, (n, Z) probabilities of
the source's own classes for the same rows, and (m, D) features of the source's training rows.
"""
GROUPS = ("groups", "source_groups")
"""Further parameters, which are None by default: (n,) and (m,) group numbers of the target's and of
the source's rows, such as patients or speakers; for labels of words or hours, their row. Rows of
one group are alike: a score must not compare them. None: each row is independent.
"""
Estimate = tuple[float, float, float]
"""(value, low, high) of a score that makes its own 95 % interval."""
UNBOUNDED = (-math.inf, math.inf)
HALVES = 10
"""Halves of the rows from which an interval is made."""


@dataclass
class Score:
    """A transferability score. `score` makes one of a function."""

    function: Callable[..., float | Estimate]
    tasks: tuple[ScoreTask, ...] = ("classes", "label sets")
    higher_is_better: bool = True
    bounds: tuple[float, float] = UNBOUNDED
    registered_name: str = ""
    options_class: Any = None

    def __post_init__(self):
        unknown = set(self.inputs) - set(INPUTS)
        if unknown or not self.inputs:
            raise ValueError(
                f"score {self.function.__name__}: parameters without a default are among "
                f"{', '.join(INPUTS)}, not {', '.join(sorted(unknown)) or 'none'}"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads, in the order of its parameters."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(one.name for one in parameters if one.default is one.empty)

    def takes(self, kind: ScoreTask | None) -> bool:
        """Return whether it is defined for targets with such labels; one without labels for all."""
        return "labels" not in self.inputs or kind in self.tasks

    def of(self, given: Mapping[str, Any]) -> float | Estimate:
        """Return its value from all inputs that there are, and the groups where it reads them."""
        parameters = inspect.signature(self.function).parameters
        groups = {name: given.get(name) for name in GROUPS if name in parameters}
        return self.function(*(given[name] for name in self.inputs), **groups)

    def __call__(self, *args: Any, **options: Any) -> float | Estimate:
        return self.function(*args, **options)


def score(
    tasks: tuple[ScoreTask, ...] = ("classes", "label sets"),
    higher_is_better: bool = True,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Callable[[Callable[..., float | Estimate]], Score]:
    """Make a score of a function.

    Args:
        tasks: Kinds of labels that it takes. One that reads no labels takes every target.
        higher_is_better: False for a distance.
        bounds: The least and the greatest value that it can have.
    """

    def make(function: Callable[..., float | Estimate]) -> Score:
        return Score(function, tasks, higher_is_better, bounds)

    return make


def interval_of_halves(
    value: float, value_of_half: Callable[[np.random.Generator], float]
) -> tuple[float, float]:
    """Return the 95 % interval of a score over rows, NaN where a half of them has no value.

    The spread over random halves of the rows without repetition is that of the score of all rows
    (Politis and Romano 1994): rows that are drawn twice would be their own neighbours. Where rows
    have groups, halves of the groups are drawn (`pipeline.core.groups.random_half`).

    Args:
        value: The score of all rows.
        value_of_half: Returns the score of a half that it draws.
    """
    import numpy as np
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    rng = np.random.default_rng(0)
    found = np.array([value_of_half(rng) for _ in range(HALVES)])
    if not np.isfinite(found).all():
        return math.nan, math.nan
    half_width = float(special.stdtrit(HALVES - 1, 0.975) * found.std(ddof=1))
    return value - half_width, value + half_width
