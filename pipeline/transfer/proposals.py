"""The settings that a search tries, generation by generation.

With a ``fanout.searcher`` of Ray Tune (optuna, hyperopt, bayesopt) those of a generation are
proposed from the validation values of the earlier ones. They are a pure function of these values
and of the job's seed, so that a job that was killed continues with the settings that it had.

Population-based training (pbt) has a module of its own, `pipeline.transfer.population`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from pipeline.config import extras
from pipeline.config.schema import ComponentConfig, Job, Target
from pipeline.core.rng import mix
from pipeline.transfer import fanout, grid, population
from pipeline.transfer.grid import HyperParameters, SearchSpace, Trial

GENERATIONS = 4
"""Parts of a search that learns, as equal as they can be. The trials of each run side by side."""
BAYESOPT_VERSION = "1.4.3"
"""The version of bayesian-optimization that Ray Tune calls; later ones have another interface."""
Drawn = tuple[tuple[str, Any], ...]
"""For each name a value of its range, or the index of a choice."""


def check_installed(searcher: str) -> None:
    """Check that the library of a searcher is there.

    Raises:
        ValueError: It is not installed, or in a version that Ray Tune cannot call.
    """
    for module in extras.EXTRAS.get(searcher, ()):
        if find_spec(module) is None:
            raise ValueError(
                f"fanout.searcher: {searcher} is not installed: {extras.install(searcher)}, or use "
                "random"
            )
    if searcher == "bayesopt" and (found := version("bayesian-optimization")) != BAYESOPT_VERSION:
        raise ValueError(
            f"fanout.searcher: Ray Tune calls version {BAYESOPT_VERSION} of bayesian-optimization, "
            f"and {found} is installed: {extras.install(searcher)}, or use optuna"
        )


def search_trials(
    job: Job,
    target: Target,
    technique: ComponentConfig,
    in_memory: bool,
    make: Callable[[HyperParameters], Trial],
    values: Mapping[str, float | None],
    curves: Mapping[str, population.Curve],
) -> list[Trial]:
    """Return the search trials of an entry, as far as they are known.

    Random draws are all known at once (`grid.draws`). With another searcher the first generation
    consists of the first random draws, and each further one is known when all trials of the earlier
    ones have ended. A setting that is drawn or proposed twice is tried once. There are no trials
    where nothing is searched.

    Args:
        in_memory: Whether the rows of the target are held in memory.
        make: Makes the trial of a setting.
        values: Value of each trial on validation rows, by its id, larger is better; None: it failed
            or has no value. Trials that have not ended are left out.
        curves: The same at each validation of the trial's training; pbt reads it.
    """
    drawn = grid.draws(job, target, technique, in_memory)
    if drawn == [{}]:
        return []
    if job.fanout.searcher == "random":
        return [make(setting) for setting in grid.without_repeats(drawn)]
    space = grid.search_space(job, target, technique, in_memory)
    if job.fanout.searcher == "pbt":
        settings = population.settings_to_try(
            space, drawn, target.train, lambda setting: curves.get(make(setting).id)
        )
        return [make(setting) for setting in settings]
    first, *further = _sizes(len(drawn))
    settings = grid.without_repeats(drawn[:first])
    out = [make(setting) for setting in settings]
    for generation, size in enumerate(further, 1):
        if any(one.id not in values for one in out):
            break
        values_so_far = [values[one.id] for one in out]
        proposed = propose(job.fanout.searcher, space, settings, values_so_far, size, generation)
        settings = grid.without_repeats([*settings, *proposed])
        out = [make(setting) for setting in settings]
    return out


def _sizes(trials: int) -> list[int]:
    """Return how many settings each generation has; one that would have none is left out."""
    parts = np.array_split(np.arange(trials), GENERATIONS)
    return [len(part) for part in parts if len(part)]


def propose(
    searcher: str,
    space: SearchSpace,
    tried: Sequence[HyperParameters],
    values: Sequence[float | None],
    count: int,
    generation: int,
) -> list[HyperParameters]:
    """Propose the settings of a generation from those that were tried.

    Args:
        tried: The settings of earlier generations, in their order.
        values: The validation value of each, larger is better; None: it failed or has none.
        count: How many settings to propose.
        generation: Its number, which enters the seed.
    """
    ranges = tuple(
        (name, tuple(map(float, choices)) if space.is_range(name) else len(choices))
        for name, choices in sorted(space.values.items())
    )
    known = tuple(
        (tuple(sorted(space.from_hyper_parameters(hyper).items())), value)
        for hyper, value in zip(tried, values, strict=True)
    )
    proposed = ask(searcher, ranges, known, count, mix(space.seed, generation) % 2**32)
    return [
        space.to_hyper_parameters(
            {
                name: value if space.is_range(name) else space.values[name][value]
                for name, value in drawn
            }
        )
        for drawn in proposed
    ]


@lru_cache(maxsize=4096)  # a command asks again whenever trials have ended
def ask(
    name: str,
    ranges: tuple[tuple[str, tuple[float, ...] | int], ...],
    known: tuple[tuple[Drawn, float | None], ...],
    count: int,
    seed: int,
) -> list[Drawn]:
    """Ask a searcher of Ray Tune for values.

    It gets the earlier trials as if it had proposed them. A failed trial counts as the worst. So
    does a proposal that has not run yet, so that those of a generation differ ("constant liar",
    Ginsbourger et al. 2010).

    Args:
        name: optuna, hyperopt or bayesopt.
        ranges: For each name the ends of a range, which is searched on a logarithmic scale, or a
            number of choices.
        known: What earlier trials drew (of choices the indices), each with its validation value.
            Those that lack a name, because the search could not have drawn the job's own value,
            are left out.
    """
    searched = {key: ends for key, ends in ranges if isinstance(ends, int) or ends[0] < ends[1]}
    fixed = [
        (key, ends[0]) for key, ends in ranges if not isinstance(ends, int) and key not in searched
    ]
    if not searched:
        return [tuple(fixed)] * count
    tried = [
        (dict(drawn), value) for drawn, value in known if searched.keys() <= dict(drawn).keys()
    ]
    if name == "hyperopt":
        tried.reverse()  # Ray Tune numbers its points from the last, and hyperopt forgets the first
    points = [
        {key: _to_searched(drawn[key], ends) for key, ends in searched.items()}
        for drawn, _ in tried
    ]
    domains = {
        key: ends if isinstance(ends, int) else (math.log(ends[0]), math.log(ends[1]))
        for key, ends in searched.items()
    }
    searcher = fanout.build_searcher(name, domains, points, seed)
    values = _without_outliers([value for _, value in tried])
    worst = min(values, default=0.0)
    out: list[Drawn] = []
    for number, value in enumerate([*values, *[worst] * count]):
        suggested = searcher.suggest(str(number))
        assert isinstance(suggested, dict), f"{name} proposed {suggested}"
        searcher.on_trial_complete(str(number), {fanout.SEARCHED_METRIC: value})
        if number >= len(tried):
            found = [(key, _from_searched(suggested[key], ends)) for key, ends in searched.items()]
            out.append((*fixed, *found))
    return out


def _without_outliers(values: Sequence[float | None]) -> list[float]:
    """Return values that a Gaussian process can be fitted to.

    None of them is farther below the median than three times what the best is above it. The loss of
    a training that diverged would hide all other differences. A failed trial has the smallest.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return [0.0] * len(values)
    middle, best = median(known), max(known)
    lowest = max(min(known), middle - 3 * (best - middle))
    failed = lowest if lowest < best else best - 1
    return [
        failed if value is None or not math.isfinite(value) else max(value, lowest)
        for value in values
    ]


def _to_searched(value: float, ends: tuple[float, ...] | int) -> float:
    """Return the index of a choice, or the logarithm of a value of a range."""
    return value if isinstance(ends, int) else math.log(value)


def _from_searched(value: float, ends: tuple[float, ...] | int) -> float:
    """Undo `_to_searched`; a rounded value is put back into its range."""
    if isinstance(ends, int):
        return value
    low, high = ends
    return min(max(math.exp(value), low), high)
