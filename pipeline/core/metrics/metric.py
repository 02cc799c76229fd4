"""What a metric is, and the decorators that make one of a function over predictions.

A ratio of sums over test units (accuracy, loss) gives each unit's numerator and denominator, and a
metric that follows from how often each unit was drawn takes those counts: both make bootstrap
intervals cheap. Any other is computed anew for every resample.

    @register("metric", "wer")
    @ratio(higher_is_better=False, bounds=NOT_NEGATIVE)
    def wer(p: Predictions) -> np.ndarray:
        return np.stack([p["word_errors"], p["words"]], axis=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Predictions = dict[str, np.ndarray]
"""Named arrays with the n test units first.

=====================  =============================================================================
classes                ``scores`` (n, C) logits, ``label`` (n,); of two classes the second is the
                       positive one; ``threshold`` (n,), the probability from which a row is called
                       so, where one was chosen
hourly                 the same at M positions: ``scores`` (n, M, C), ``label`` (n, M), -1 where a
                       row has no more positions
several labels a row   ``scores`` and ``labels`` (n, L), 0 or 1; ``min_positives`` (n,), how many
                       positives a label needs to be part of a macro average (1 without it)
entities               ``hits``, ``guessed`` and ``actual`` (n, T) by type
numbers                ``prediction`` and ``value`` (n,), in the unit of the label
identities             ``embedding`` (n, E) and ``identity`` (n,); rows are compared in pairs
captions               ``image_embedding`` and ``caption_embedding`` (n, D), ``image_number`` and
                       ``caption_number`` (n,), see `pipeline.core.metrics.retrieval`
words                  ``right`` of ``words`` (n,)
answers                ``exact`` and ``f1`` (n,), 0 to 1
language models        ``loss`` (n,), a sum of nats, over ``count`` tokens and ``bytes`` (n,)
transcripts            ``word_errors`` of ``words`` and ``char_errors`` of ``chars`` (n,)
samples                ``loss`` (n,), a sum of nats, over ``count`` samples
boxes, masks           see `pipeline.core.metrics.coco_ap`
policies               ``squared_error``, summed over ``action_numbers`` (n,); of an episode a row
                       ``success`` (0, 1 or NaN), ``return`` and ``steps``, also of the
                       demonstration (``expert_``) and of a random policy (``random_``)
=====================  =============================================================================
"""

Bounds = tuple[float, float]
"""The least and the greatest value; an interval ends there."""
SHARE: Bounds = (0.0, 1.0)
NOT_NEGATIVE: Bounds = (0.0, math.inf)
UNBOUNDED: Bounds = (-math.inf, math.inf)

Units = Callable[[Predictions], np.ndarray]
"""Predictions to (n, 2) numerators and denominators."""
Resampled = Callable[[Predictions, np.ndarray], np.ndarray]
"""Predictions and counts (R, n), how often each row was drawn in each of R resamples, to (R,)
values, NaN where a resample has none. Where whole groups are drawn, predictions of metrics that
compare rows have ``unit`` (n,) too, the number of each row's group.
"""


@dataclass(frozen=True)
class PerLabel:
    """The metric of one label that a macro average is made of; ``auroc`` in ``auroc/Effusion``.

    Either ``units`` or ``resampled`` is given. They are those of `Metric` with the column of the
    label in the predictions' arrays as a last argument.
    """

    name: str
    units: Callable[[Predictions, int], np.ndarray] | None = None
    resampled: Callable[[Predictions, np.ndarray, int], np.ndarray] | None = None
    bounds: Bounds = SHARE

    def of(self, label: str, column: int | None) -> Metric:
        """Return the metric of a label; its value raises ValueError without a column."""
        name = f"{self.name}/{label}"

        def known() -> int:
            if column is None:
                raise ValueError(
                    f"metric {name}: it is not known which column of the predictions is this "
                    "label's"
                )
            return column

        units, values = self.units, self.resampled
        if units is not None:
            found = ratio(bounds=self.bounds, column=column)(lambda p: units(p, known()))
        else:
            assert values is not None, f"{self.name} needs units or resampled"
            found = resampled(bounds=self.bounds, column=column)(
                lambda p, counts: values(p, counts, known())
            )
        found.name = name
        return found

    def values(self, p: Predictions, labels: Sequence[str]) -> dict[str, float]:
        """Return the value of every label that has one.

        A label without both classes among the rows has no ranking, and a type of entity that is
        neither there nor found no F1.
        """
        found = {label: self.of(label, k).value(p) for k, label in enumerate(labels)}
        return {label: value for label, value in found.items() if not math.isnan(value)}


@dataclass
class Metric:
    """A number that predictions are judged by. `ratio`, `resampled` and `plain` make one."""

    name: str
    higher_is_better: bool
    value: Callable[[Predictions], float]
    units: Units | None = None
    """Set where value = final(sum of numerators / sum of denominators)."""
    final: Callable[[float], float] = float
    resampled: Resampled | None = None
    limits: Bounds | Callable[[Predictions], Bounds] = UNBOUNDED
    """The bounds, or a function that finds those of given predictions."""
    per_label: PerLabel | None = None
    """What it averages, where each label also has a value of its own."""
    for_role: str = ""
    """A target whose objective reads this column role (``label``) may be judged by it, also where
    the objective does not list it.
    """
    reads_order: bool = False
    """Whether it takes classes in their order as steps of a scale."""
    compares_rows: bool = False
    """Whether it reads pairs of rows, of which n rows have n (n - 1) / 2."""

    @property
    def registered_name(self) -> str:
        return self.name

    @registered_name.setter
    def registered_name(self, name: str) -> None:  # `register` names it
        self.name = name

    @property
    def fixed_bounds(self) -> Bounds | None:
        """The bounds where they do not depend on the predictions."""
        return None if callable(self.limits) else self.limits

    def bounds(self, p: Predictions) -> Bounds:
        """Return the least and the greatest value that rows such as these can have."""
        return self.limits(p) if callable(self.limits) else self.limits

    def of_units(self, units: np.ndarray) -> float:
        """Return the value from (n, 2) units; NaN when nothing was counted."""
        total = units.sum(0)
        return self.final(float(total[0] / total[1])) if total[1] else float("nan")


def ratio(
    higher_is_better: bool = True,
    bounds: Bounds | Callable[[Predictions], Bounds] = UNBOUNDED,
    final: Callable[[float], float] = float,
    per_label: PerLabel | None = None,
    for_role: str = "",
    column: int | None = None,
) -> Callable[[Units], Metric]:
    """Make a metric of a function that gives each unit's numerator and denominator, (n, 2).

    Args:
        bounds: The least and greatest value, or a function of predictions that finds them.
        final: What the ratio of the sums is put through.
        per_label: The metric of one label, where this one is over all labels.
        for_role: See `Metric.for_role`.
        column: The only column of ``scores`` that it reads; None: all.
    """

    def make(units: Units) -> Metric:
        def checked(p: Predictions) -> np.ndarray:
            return np.where(rows_with_nan(p, column)[:, None], np.nan, units(p))

        def value(p: Predictions) -> float:
            return made.of_units(checked(p))

        made = Metric(
            name="",
            higher_is_better=higher_is_better,
            value=value,
            units=checked,
            final=final,
            limits=bounds,
            per_label=per_label,
            for_role=for_role,
        )
        return made

    return make


def resampled(
    higher_is_better: bool = True,
    bounds: Bounds | Callable[[Predictions], Bounds] = UNBOUNDED,
    per_label: PerLabel | None = None,
    for_role: str = "",
    reads_order: bool = False,
    compares_rows: bool = False,
    column: int | None = None,
) -> Callable[[Resampled], Metric]:
    """Make a metric of a function over counts: predictions and (R, n) to (R,). See `ratio`."""

    def make(values: Resampled) -> Metric:
        def checked(p: Predictions, counts: np.ndarray) -> np.ndarray:
            wrong = rows_with_nan(p, column)
            found = values(p, counts)
            if not wrong.any():
                return found
            has_wrong = counts[:, wrong].any(1)
            return np.where(has_wrong, np.nan, found)

        def value(p: Predictions) -> float:
            num_rows = len(next(iter(p.values())))
            once = np.ones((1, num_rows), dtype=np.int64)
            return float(checked(p, once)[0])

        return Metric(
            name="",
            higher_is_better=higher_is_better,
            value=value,
            resampled=checked,
            limits=bounds,
            per_label=per_label,
            for_role=for_role,
            reads_order=reads_order,
            compares_rows=compares_rows,
        )

    return make


def plain(
    higher_is_better: bool = True,
    bounds: Bounds | Callable[[Predictions], Bounds] = UNBOUNDED,
    for_role: str = "",
) -> Callable[[Callable[[Predictions], float]], Metric]:
    """Make a metric of a function from predictions to its value. See `ratio`."""

    def make(value: Callable[[Predictions], float]) -> Metric:
        def checked(p: Predictions) -> float:
            return math.nan if rows_with_nan(p).any() else value(p)

        return Metric("", higher_is_better, checked, limits=bounds, for_role=for_role)

    return make


# ---------------------------------------------------------------- for the functions themselves


MADE_FROM_SCORES = ("intersection", "hits", "word_errors", "exact", "true_classes")
"""Predictions that an objective makes from scores that it does not keep: of pixels, words,
transcripts, answers and boxes. The loss of such a row is NaN where one of the scores was.
"""


def rows_with_nan(p: Predictions, column: int | None = None) -> np.ndarray:
    """Return (n,) bool: labelled rows with a NaN score, as a diverged network gives.

    Where scores are not kept (`MADE_FROM_SCORES`): rows with a NaN loss.

    A metric over them is NaN. The largest score of such a row would still name a class.
    """
    n = len(next(iter(p.values())))
    scores, label = p.get("scores"), p.get("label", p.get("labels"))
    if "loss" in p and any(name in p for name in MADE_FROM_SCORES):
        return np.isnan(p["loss"])
    if scores is None or label is None or not n:
        return np.zeros(n, dtype=bool)
    wrong: np.ndarray = np.isnan(scores)
    if label.ndim < scores.ndim:  # a class, at each of several positions or for the row
        wrong = wrong.any(-1) & (label >= 0)
    elif column is not None:
        wrong = wrong[:, column]
    return np.asarray(wrong.reshape(n, -1).any(1))


def numerator_denominator(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return units (n, 2) of two arrays (n,)."""
    return np.stack([part, whole], axis=1).astype(np.float64)


def sum_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return units of a mean: each row's sum of the known values, and how many there are.

    Args:
        values: (n,) or (n, M), of rows or of positions in rows.
        known: The same shape, bool.
    """
    n = len(values)
    if not n:
        return np.zeros((0, 2))
    total = np.where(known, values, 0).reshape(n, -1).sum(1)
    return numerator_denominator(total, known.reshape(n, -1).sum(1))


def counts_by_row(counts: np.ndarray) -> np.ndarray:
    """Return counts (R, n) as (n, R) float64.

    The draws of a row lie together, so that rows are sorted and summed in long runs.
    """
    return np.ascontiguousarray(counts.T, dtype=np.float64)


def sum_draws(
    group: np.ndarray, drawn: np.ndarray, count: int, weight: np.ndarray | None = None
) -> np.ndarray:
    """Sum how often rows were drawn by group.

    Args:
        group: (K,) the group of each row, in [0, count).
        drawn: (K, R) float64, how often each row was drawn in each of R resamples.
        weight: (K,) what each row counts; None: 1.

    Returns:
        (count, R) float64, 0 for a group without rows.
    """
    from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs]

    rows = np.arange(len(group))
    weight = np.ones(len(group)) if weight is None else weight.astype(np.float64)
    counted = weight != 0
    pairs = group[counted], rows[counted]
    weights: Any = csr_array((weight[counted], pairs), shape=(count, len(group)))
    return weights @ drawn


def mean_where(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return (R,) means over the first axis of what is there; NaN where nothing is."""
    count = there.sum(0)
    total = np.where(there, values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def f1(hits: np.ndarray, true: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(true + guessed, 1)
