"""The settings that a search tries, generation by generation.

With ``fanout.searcher: optuna`` those of a generation are proposed from the validation values of
the earlier ones (tree-structured Parzen estimator, Bergstra et al. 2011). They are a pure function
of these values and of the job's seed, so that a job that was killed continues with the settings
that it had.

Population-based training (Jaderberg et al. 2017) is not offered. It copies weights between trials
and changes settings in the middle of one, while a trial here is a function of its settings: that is
why it can be resumed, repeated and compared with scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from pipeline.config import extras
from pipeline.config.schema import ComponentConfig, Job, Target
from pipeline.core.rng import mix
from pipeline.transfer import grid
from pipeline.transfer.grid import HyperParameters, SearchSpace, Trial

GENERATIONS = 4
"""Parts of a search with Optuna, as equal as they can be. The trials of each run side by side."""
Drawn = tuple[tuple[str, Any], ...]
"""For each name a value of its range, or the index of a choice."""


def library() -> Any:
    """Return Optuna. It logs no more than warnings.

    Raises:
        ValueError: It is not installed.
    """
    try:
        optuna = import_module("optuna")
    except ImportError:
        raise ValueError(
            f"fanout.searcher: optuna is not installed: {extras.install('optuna')}, or use random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def search_trials(
    job: Job,
    target: Target,
    technique: ComponentConfig,
    in_memory: bool,
    make: Callable[[HyperParameters], Trial],
    values: Mapping[str, float | None],
) -> list[Trial]:
    """Return the search trials of an entry, as far as they are known.

    Random draws are all known at once (`grid.draws`). With Optuna the first generation consists of
    the first random draws, and each further one is known when all trials of the earlier ones have
    ended. A setting that is drawn or proposed twice is tried once. There are no trials where
    nothing is searched.

    Args:
        in_memory: Whether the rows of the target are held in memory.
        make: Makes the trial of a setting.
        values: Value of each trial on validation rows, by its id, larger is better; None: it failed
            or has no value. Trials that have not ended are left out.
    """
    drawn = grid.draws(job, target, technique, in_memory)
    if drawn == [{}]:
        return []
    if job.fanout.searcher == "random":
        return [make(setting) for setting in grid.without_repeats(drawn)]
    space = grid.search_space(job, target, technique, in_memory)
    first, *further = _sizes(len(drawn))
    settings = grid.without_repeats(drawn[:first])
    out = [make(setting) for setting in settings]
    for generation, size in enumerate(further, 1):
        if any(one.id not in values for one in out):
            break
        values_so_far = [values[one.id] for one in out]
        proposed = propose(space, settings, values_so_far, size, generation)
        settings = grid.without_repeats([*settings, *proposed])
        out = [make(setting) for setting in settings]
    return out


def _sizes(trials: int) -> list[int]:
    """Return how many settings each generation has; one that would have none is left out."""
    parts = np.array_split(np.arange(trials), GENERATIONS)
    return [len(part) for part in parts if len(part)]


def propose(
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
    proposed = ask(ranges, known, count, mix(space.seed, generation) % 2**32)
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
    ranges: tuple[tuple[str, tuple[float, ...] | int], ...],
    known: tuple[tuple[Drawn, float | None], ...],
    count: int,
    seed: int,
) -> list[Drawn]:
    """Ask a study for values.

    Args:
        ranges: For each name the ends of a range, which is searched on a logarithmic scale, or a
            number of choices.
        known: What earlier trials drew (of choices the indices), each with its validation value.
    """
    optuna = library()
    distributions = {
        name: optuna.distributions.CategoricalDistribution(range(values))
        if isinstance(values, int)
        else optuna.distributions.FloatDistribution(*values, log=True)
        for name, values in ranges
    }
    # settings without a value yet count as bad, so that those of a generation differ
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for drawn, value in known:
        is_known = value is not None and math.isfinite(value)
        params = dict(drawn)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[("FAIL", "COMPLETE")[is_known]],
                value=value if is_known else None,
                params=params,
                distributions={name: distributions[name] for name in params},
            )
        )
    asked = [study.ask(distributions) for _ in range(count)]
    return [tuple(trial.params.items()) for trial in asked]
