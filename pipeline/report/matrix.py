"""The matrix of sources, targets, techniques and label fractions.

An entry holds the final trials of one combination, one for each seed, and its gain over scratch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import registry
from pipeline.core.contracts import adapts_at_test
from pipeline.core.metrics import catalog
from pipeline.core.metrics.metric import UNBOUNDED
from pipeline.report import folds, results, stats
from pipeline.report.blocks import decimal_places
from pipeline.report.results import NO_BACKBONE, VALIDATION, ResultRow
from pipeline.report.stats import RunPredictions

Estimate = tuple[float | None, float | None, float | None]
"""(middle, low, high)."""


class EntryKey(NamedTuple):
    """What the trials of an entry have in common; they differ in their seeds."""

    source: str
    backbone: str
    target: str
    technique: str
    """The technique with its options."""
    label_fraction: str

    @property
    def is_scratch(self) -> bool:
        """Whether the entry is trained from random weights."""
        return self.source == SCRATCH and self.technique == SCRATCH_TECHNIQUE

    @property
    def is_baseline(self) -> bool:
        """Whether the entry is a model without a network."""
        return self.source == SCRATCH and self.backbone == NO_BACKBONE


SCRATCH = "none"
"""The source of trials that start from random weights. The other trials of the same backbone,
target and label fraction are compared with them. It has this name wherever a source is shown.
"""

SCRATCH_TECHNIQUE = "scratch"

COUNTERPARTS = {"random_probe": "linear_probe"}
"""Techniques without a source that are compared with another technique instead of scratch.

A probe of random features shows how much of a linear probe's result is due to pretraining. Among
the entries of the counterpart with the same backbone, target and labels, the one of the source with
the best validation value is taken.
"""

ONE_SEED = "one seed, whose spread is unknown"
T_INTERVAL = "95 % Student's t over seeds (test predictions are missing), not enough for a verdict"

WINS, LOSES, NOT_SHOWN, TOO_FEW = "wins", "loses", "not shown", "too few to tell"
REFERENCE, FAILED, UNCOMPARED = "reference", "failed", "not compared"
SINGLE_SEED = "one seed"
SEARCH_NOISE = "search noise"
"""In place of a win or a loss where the variance of choosing hyper-parameters is unknown."""
BASELINE = "baseline"
COMPARED = (WINS, LOSES, NOT_SHOWN)
"""Verdicts of a comparison that was made. Holm's correction counts these."""
MIN_SEEDS = 2
"""A win or a loss needs this number of paired seeds, because one does not show the spread between
seeds. In comparisons without any true difference one seed gave 19 % (seed deviation .01) to 50 %
(.02) wins and losses.
"""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class GainEstimate:
    """The gain of an entry over another one, positive when better, whatever the metric's direction.

    Attributes:
        value: The gain; None where it could not be computed.
        low: Lower bound of its 95 % interval, or None.
        high: Upper bound.
        seeds: Number of paired seeds.
        p_value: Of the hypothesis that the gain is zero.
        evidence: The test units, where they are too few for a verdict; otherwise "".
        unknown_choice: Why it is unknown how much the choice of hyper-parameters varies; otherwise
            "". The interval leaves this variance out.
        how: A description of how the interval was made.
        predicted: Whether it was computed from test predictions.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    p_value: float | None = None
    evidence: str = ""
    unknown_choice: str = ""
    how: str = ""
    predicted: bool = False

    @property
    def verdict(self) -> str:
        """The verdict on it before any correction, as in `MatrixEntry`; "" without a gain."""
        if self.value is None:
            return ""
        if not self.predicted:
            return UNCOMPARED
        return verdict(self.low, self.high, self.seeds, not self.evidence, self.unknown_choice)


@dataclass(frozen=True)
class MatrixEntry:
    """The final trials of one (source, backbone, target, technique, label fraction), on test rows.

    ``mean [low, high]`` is the primary metric over seeds, and None where it could not be computed.
    ``interval`` describes how its interval and that of the gain over scratch were made.

    ``verdict`` is one of:

    - "wins" or "loses": the interval of the gain excludes zero.
    - "not shown": the interval contains zero. This does not prove that there is no difference.
    - "too few to tell": there are too few test units for a verdict.
    - "one seed": there is one paired seed, whose spread is unknown.
    - "search noise": the interval excludes zero, but it leaves out how much the choice of
      hyper-parameters varies, which is unknown (`GainEstimate.unknown_choice`).
    - "not compared": there is no paired seed, no scratch trial to compare with, or there are no
      test predictions.
    - "reference": the entry is scratch.
    - "baseline": the entry is a model without a network.
    - "failed": no trial finished.

    ``gain_p_holm`` is the p value of ``over_scratch``, corrected for all comparisons of the job.

    ``against`` names the entry that ``over_scratch`` is over where that is not scratch.
    ``over_best_scratch`` is the gain over the best scratch network (by validation) of the same
    target and label fraction, and ``best_scratch`` is its backbone. With several backbones,
    ``over_scratch`` is measured against different networks and ``over_best_scratch`` against a
    single one (`comparable_across_backbones`).

    ``best_baseline`` names the model without a network that is the best by validation at the same
    target and label fraction, and ``over_best_baseline`` is the gain over it.
    """

    source: str
    backbone: str
    target: str
    technique: str
    label_fraction: str
    metric: str
    higher_is_better: bool
    n_seeds: int
    n_failed: int
    mean: float | None
    low: float | None
    high: float | None
    seconds: float | None
    params_trained: int | None
    layers_trained: str
    """The layers that the trials trained; "" where it is not known."""
    n_train: int | None
    n_test: int | None
    hyper_parameters: str
    verdict: str
    interval: str = ""
    code_mark: str = ""
    """The mark of an entry whose trials were made by other code or versions than those of now, or
    by different ones (`pipeline.report.code_versions`).
    """
    over_scratch: GainEstimate = GainEstimate()
    paired_seeds: int | None = None
    gain_p_holm: float | None = None
    against: str = ""
    best_scratch: str = ""
    over_best_scratch: GainEstimate = GainEstimate()
    validation: float | None = None
    """Mean validation value of its final trials, larger is better; None where there is none on rows
    of the target.
    """
    best_baseline: str = ""
    over_best_baseline: GainEstimate = GainEstimate()
    trial_ids: tuple[str, ...] = ()
    """Its finished final trials, one for each seed; those of folds are pooled (`folds.pool`)."""
    compared_with: tuple[EntryKey, ...] = ()
    """Keys (`entry_key`) of the entries that its gains are over: the one of ``over_scratch``, the
    best scratch network and the best baseline.
    """

    @property
    def gain(self) -> float | None:
        """The gain over scratch, or None."""
        return self.over_scratch.value

    @property
    def gain_low(self) -> float | None:
        """Lower bound of its 95 % interval."""
        return self.over_scratch.low

    @property
    def gain_high(self) -> float | None:
        """Upper bound of its 95 % interval."""
        return self.over_scratch.high

    @property
    def key(self) -> EntryKey:
        """What `entry_key` returns for its rows."""
        return EntryKey(
            self.source, self.backbone, self.target, self.technique, self.label_fraction
        )

    @property
    def technique_name(self) -> str:
        """The technique without its options."""
        return self.technique.partition(" (")[0]

    @property
    def registered_technique(self) -> Any:
        """The technique's class; None where no technique of that name is registered now."""
        is_registered = self.technique_name in registry.entries("technique")
        return registry.get("technique", self.technique_name) if is_registered else None

    @property
    def combines_trials(self) -> bool:
        """Whether it is an average or an ensemble of trials."""
        technique = self.registered_technique
        return technique is not None and technique.starts_from == "trials"

    @property
    def adapts_at_test(self) -> bool:
        """Whether it was validated as the source's network, and adapted to the test rows later."""
        technique = self.registered_technique
        return technique is not None and adapts_at_test(technique)

    @property
    def transfers(self) -> bool:
        """Whether the entry has a source and was compared with scratch."""
        return self.source != SCRATCH and self.verdict in COMPARED

    @property
    def is_baseline(self) -> bool:
        """Whether the entry is a model without a network."""
        return self.key.is_baseline

    @property
    def survives(self) -> bool:
        """Whether the entry is a win or a loss also after Holm's correction."""
        return (
            self.verdict in (WINS, LOSES)
            and self.gain_p_holm is not None
            and self.gain_p_holm < SIGNIFICANT
        )


@dataclass(frozen=True)
class _EntryTrials:
    """The trials of an entry before it is compared with another one.

    ``done`` are test rows of finished final trials, ``failed`` is the number of failed trials, and
    ``group`` are all results rows of the entry.
    """

    key: EntryKey
    done: list[ResultRow]
    failed: int
    group: list[ResultRow]

    @property
    def metric(self) -> str:
        rows = [*self.done[:1], *self.group]
        return next((row.metric for row in rows if row.metric), "")

    @property
    def rows(self) -> list[ResultRow]:
        """Test rows of the primary metric, one for each seed."""
        return [row for row in self.done if row.metric == self.metric]

    @property
    def technique(self) -> str:
        """The technique's name without its options."""
        return self.group[0].technique

    @property
    def has_no_seed(self) -> bool:
        """Whether it is one trial that trains nothing: a source's network, a soup, an ensemble."""
        return len(self.rows) == 1 and self.rows[0].params_trained == 0

    def validation(self) -> float:
        """Return the mean validation value of the final trials, where larger is better.

        It is minus infinity where there is none on rows of the target. Trials whose value is NaN
        count as failed.
        """
        values: dict[str, float] = {}
        for row in self.group:
            if row.trial_stage == "final" and row.split == VALIDATION and row.value is not None:
                values.setdefault(row.trial_id, row.value if row.higher_is_better else -row.value)
        finished = [value for value in values.values() if not math.isnan(value)]
        return fmean(finished) if finished else -math.inf

    def choice(self) -> _SearchVariance:
        """Return the variance that choosing the hyper-parameters in a search added."""
        searched = [
            row
            for row in self.group
            if row.trial_stage == "search"
            and row.status == "done"
            and row.is_validation
            and row.metric
        ]
        if not searched:
            return _SearchVariance()
        if all(row.metric != self.metric for row in searched):
            return _SearchVariance(unknown=f"which was judged by {searched[0].metric}")
        # each fold has a search of its own; that they agree by chance is not counted on
        of_folds: dict[int | None, list[ResultRow]] = defaultdict(list)
        for row in searched:
            if row.metric == self.metric and row.value is not None and math.isfinite(row.value):
                of_folds[row.fold].append(row)
        choices = [_choice(in_fold) for in_fold in of_folds.values()] or [_SearchVariance()]
        unknown = next((choice.unknown for choice in choices if choice.unknown), "")
        return _SearchVariance(fmean(choice.variance for choice in choices), unknown)


@dataclass(frozen=True)
class _SearchVariance:
    """The variance that choosing the hyper-parameters added, 0 where there was no choice.

    The variance can be estimated for the metric that the validations of the search measured, and
    from settings that were tried with several seeds. Otherwise ``unknown`` gives the reason, and
    the variance is not counted.
    """

    variance: float = 0.0
    unknown: str = ""


def _choice(searched: list[ResultRow]) -> _SearchVariance:
    """Return the variance that a choice among these trials of a search added."""
    # By the sampled setting, which is the same for all seeds. `hyper_parameters` is not: the
    # steps of an epoch, for one, differ between seeds where the rows of a label fraction do.
    draws: dict[str, dict[str, float]] = defaultdict(dict)
    for row in searched:
        value = row.value or 0.0
        draws[row.drawn or row.trial_id][row.trial_id] = value if row.higher_is_better else -value
    if len(draws) < 2:
        return _SearchVariance()
    repeated = [list(values.values()) for values in draws.values() if len(values) > 1]
    if len(repeated) < 2:
        return _SearchVariance(unknown="whose settings were tried with one seed")
    return _SearchVariance(stats.choice_variance(repeated))


def matrix_entries(rows: list[ResultRow], runs: dict[str, RunPredictions]) -> list[MatrixEntry]:
    """Return one MatrixEntry for each (source, backbone, target, technique, label fraction).

    Args:
        rows: Results rows. Those of a target's folds are pooled (`folds.pool`).
        runs: Trial id to test predictions. Where those of an entry or of its scratch are missing,
            its intervals are Student's t over seeds, and ``interval`` says so.

    Returns:
        The entries, also those whose trials all failed in the search or in the final runs. They are
        sorted by target, label fraction and value (`by_value`).
    """
    rows, runs = folds.pool(rows, runs)
    groups: dict[EntryKey, list[ResultRow]] = defaultdict(list)
    for row in rows:
        groups[entry_key(row)].append(row)
    all_trials: list[_EntryTrials] = []
    for key, group in groups.items():
        final = _final_trials(group)
        if final is not None:
            all_trials.append(_EntryTrials(key, *final, group))
    out = [_entry(trials, all_trials, runs) for trials in all_trials]
    return sorted(_corrected(out), key=_sort_key)


def by_target(entries: Iterable[MatrixEntry]) -> dict[str, list[MatrixEntry]]:
    """Return the entries of each target."""
    out: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        out[entry.target].append(entry)
    return out


def decimals_by_target(entries: Iterable[MatrixEntry]) -> dict[str, int]:
    """Return how many decimals the values of each target are shown with."""
    return {
        target: decimal_places([(entry.low, entry.high) for entry in group])
        for target, group in by_target(entries).items()
    }


def has_several_backbones(entries: Iterable[MatrixEntry]) -> bool:
    """Return whether the entries have several backbones; baselines have none."""
    return len({entry.backbone for entry in entries if not entry.is_baseline}) > 1


def comparable_across_backbones(entries: Sequence[MatrixEntry]) -> list[MatrixEntry]:
    """Return the entries with gains that can be compared between backbones.

    Where a target has several scratch networks at a label fraction, ``over_scratch`` and the
    verdict are those over the best of them by validation, and the others are no reference.
    """
    networks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        if entry.verdict == REFERENCE and entry.n_seeds:
            networks[entry.target, entry.label_fraction].add(entry.backbone)
    several = {key for key, backbones in networks.items() if len(backbones) > 1}
    return _corrected(
        [
            _judged_by_best_scratch(entry)
            if entry.source != SCRATCH and (entry.target, entry.label_fraction) in several
            else entry
            for entry in entries
        ]
    )


def _judged_by_best_scratch(entry: MatrixEntry) -> MatrixEntry:
    gain = entry.over_best_scratch
    return replace(
        entry,
        over_scratch=gain,
        gain_p_holm=None,
        paired_seeds=gain.seeds,
        verdict=FAILED if entry.verdict == FAILED else gain.verdict or UNCOMPARED,
    )


def _corrected(entries: list[MatrixEntry]) -> list[MatrixEntry]:
    """Return the entries with p values corrected for the number of comparisons (`stats.holm`)."""
    p_values = {
        index: entry.over_scratch.p_value
        for index, entry in enumerate(entries)
        if entry.verdict in COMPARED and entry.over_scratch.p_value is not None
    }
    corrected = stats.holm(list(p_values.values()))
    out = list(entries)
    for index, p_value in zip(p_values, corrected, strict=True):
        out[index] = replace(out[index], gain_p_holm=p_value)
    return out


def _reference(trials: _EntryTrials, alike: list[_EntryTrials]) -> _EntryTrials | None:
    """Return the trials that an entry is compared with.

    They are those of scratch with the same backbone, or those of the technique's counterpart
    (COUNTERPARTS).

    Args:
        trials: The entry's own.
        alike: All trials with the same target and labels.
    """
    alike = [other for other in alike if other.key.backbone == trials.key.backbone]
    if trials.key.source != SCRATCH:
        return next((other for other in alike if other.key.is_scratch), None)
    counterpart = COUNTERPARTS.get(trials.technique)
    candidates = [
        other
        for other in alike
        if other.key.source != SCRATCH and other.technique == counterpart and other.done
    ]
    return _best_by_validation(candidates)


def _best_by_validation(candidates: list[_EntryTrials]) -> _EntryTrials | None:
    """Return the candidate with the best validation value among those of which a trial finished.

    A single one needs no such value.
    """
    finished = [candidate for candidate in candidates if candidate.done]
    if len(finished) > 1:
        finished = [candidate for candidate in finished if math.isfinite(candidate.validation())]
    return max(finished, key=_EntryTrials.validation, default=None)


def fraction_order(label_fraction: str) -> tuple[int, float, str]:
    """Return the sort key of a label fraction.

    Numbers of rows come before shares of the rows, each from small to large.
    """
    number = label_fraction.removesuffix("/class").removesuffix(" rows")
    try:
        return int(number == label_fraction), float(number), label_fraction
    except ValueError:
        return 2, 0.0, label_fraction


def most_labels_first(entries: Iterable[MatrixEntry]) -> list[str]:
    """Return the label fractions of entries, that with the most training rows first.

    A number of rows may be more or fewer than a share of them: 50 per class are more than 1 % of
    10,000 rows of ten classes. What combines trials does not count: it has the rows of all of them.
    Where all trials of a fraction failed, its training rows are estimated from those of another
    fraction of its kind; without one, shares come before numbers.
    """
    num_rows: dict[str, int] = defaultdict(int)
    for entry in entries:
        n_train = 0 if entry.combines_trials else entry.n_train or 0
        num_rows[entry.label_fraction] = max(num_rows[entry.label_fraction], n_train)

    rows_per_unit: dict[int, float] = {}  # 0: of one row per class; 1: of a share of 1
    for fraction, count in num_rows.items():
        kind, number, _ = fraction_order(fraction)
        if count and number:
            rows_per_unit[kind] = max(rows_per_unit.get(kind, 0.0), count / number)

    def most_last(fraction: str) -> tuple[float, tuple[int, float, str]]:
        order = fraction_order(fraction)
        kind, number, _ = order
        if num_rows[fraction] or not number:
            return num_rows[fraction], order
        default = math.inf if kind else 0.0
        all_rows = rows_per_unit.get(1, math.inf)
        return min(number * rows_per_unit.get(kind, default), all_rows), order

    return sorted(num_rows, key=most_last, reverse=True)


def best_on_validation(entries: Iterable[MatrixEntry]) -> MatrixEntry:
    """Return the entry with the best mean on validation rows.

    Of equals it is one network rather than several, then the one that trains the fewest parameters,
    then the first by name. Their order, usually that of their values on test rows, has no effect.

    Args:
        entries: At least one; all have a mean on validation rows.
    """
    in_order = sorted(
        entries,
        key=lambda entry: (entry.combines_trials, entry.params_trained or 0, entry.key),
    )
    return max(in_order, key=lambda entry: entry.validation or 0.0)


def by_value(entry: MatrixEntry) -> float:
    """Return a sort key that puts the best mean on test rows first and those without one last."""
    if entry.mean is None:
        return math.inf
    return -entry.mean if entry.higher_is_better else entry.mean


def entry_key(row: ResultRow) -> EntryKey:
    """Return the key of the entry that a results row belongs to."""
    return EntryKey(
        row.source,
        row.backbone,
        row.target,
        results.technique(row) if row.technique else "",
        row.label_fraction,
    )


def _sort_key(entry: MatrixEntry) -> tuple[object, ...]:
    return (
        entry.target,
        fraction_order(entry.label_fraction),
        by_value(entry),
        entry.source,
        entry.backbone,
        entry.technique,
    )


def _final_trials(group: list[ResultRow]) -> tuple[list[ResultRow], int] | None:
    """Return the primary test row of each finished final trial, and the number of failed trials.

    Returns None for an entry without a final trial yet. Where all search trials failed there are no
    final trials, and the search trials count as the failures of the entry. A trial whose value is
    NaN counts as failed where others have a value: its network diverged.
    """
    final = [row for row in group if row.trial_stage == "final"]
    primary: dict[str, ResultRow] = {}
    for row in final:
        if row.status == "done" and row.split == "test" and row.metric:
            primary.setdefault(row.trial_id, row)
    diverged = {one for one, row in primary.items() if math.isnan(row.value or 0.0)}
    if len(diverged) < len(primary):
        primary = {one: row for one, row in primary.items() if one not in diverged}
    failed = {row.trial_id for row in final if row.status == "failed"} - set(primary)
    failed |= diverged - set(primary)
    if not final and all(row.status != "done" for row in group):
        failed = {row.trial_id for row in group if row.status == "failed"}
    return (list(primary.values()), len(failed)) if primary or failed else None


def _mean(rows: list[ResultRow], name: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return fmean(values) if values else None


def _mean_rounded(rows: list[ResultRow], name: str) -> int | None:
    mean = _mean(rows, name)
    return None if mean is None else round(mean)


def _finite(values: Estimate) -> Estimate:
    middle, low, high = (None if value is None else _finite_or_none(value) for value in values)
    return middle, low, high


def _entry(
    trials: _EntryTrials, all_trials: list[_EntryTrials], runs: dict[str, RunPredictions]
) -> MatrixEntry:
    """Return the matrix entry of trials: their mean, and their gains over other trials."""
    source, backbone, target, technique, fraction = trials.key
    done = trials.rows
    first = done[0] if done else trials.group[0]
    (mean, low, high), how = _mean_of(trials, runs)
    alike = [
        other
        for other in all_trials
        if (other.key.target, other.key.label_fraction) == (target, fraction)
    ]
    reference, best_scratch, best_baseline = _reference(trials, alike), None, None
    if source != SCRATCH:
        best_scratch = _best_by_validation([other for other in alike if other.key.is_scratch])
    if not trials.key.is_baseline:
        best_baseline = _best_by_validation([other for other in alike if other.key.is_baseline])
    over_scratch = _gain_of(trials, reference, runs)
    over_best_scratch = over_scratch
    if best_scratch is not reference:
        over_best_scratch = _gain_of(trials, best_scratch, runs)
    over_best_baseline = _gain_of(trials, best_baseline, runs)
    gains = (
        (reference, over_scratch),
        (best_scratch, over_best_scratch),
        (best_baseline, over_best_baseline),
    )
    compared_with = [other.key for other, gain in gains if other and gain.value is not None]
    is_compared = reference is not None and bool(reference.done) and bool(done)
    against = ""
    if reference is not None and reference.key.source != SCRATCH:
        against = f"{reference.key.technique} of {reference.key.source}"
    return MatrixEntry(
        source=source,
        backbone=backbone,
        target=target,
        technique=technique,
        label_fraction=fraction,
        metric=trials.metric,
        higher_is_better=bool(first.higher_is_better) if done else True,
        n_seeds=len(done),
        n_failed=trials.failed,
        mean=mean,
        low=low,
        high=high,
        seconds=_mean(done, "seconds"),
        params_trained=_mean_rounded(done, "params_trained"),
        layers_trained="; ".join(dict.fromkeys(row.layers_trained or "" for row in done)),
        n_train=_mean_rounded(done, "n_train"),
        n_test=_mean_rounded(done, "n_eval"),
        hyper_parameters=first.hyper_parameters or "{}",
        verdict=_verdict(trials, over_scratch),
        interval="; ".join(text for text in (how, over_scratch.how) if text),
        over_scratch=over_scratch,
        paired_seeds=over_scratch.seeds if is_compared else None,
        against=against,
        best_scratch=best_scratch.key.backbone if best_scratch is not None and done else "",
        over_best_scratch=over_best_scratch,
        validation=_finite_or_none(trials.validation()),
        trial_ids=tuple(row.trial_id for row in done),
        best_baseline=best_baseline.key.technique if best_baseline is not None and done else "",
        over_best_baseline=over_best_baseline,
        compared_with=tuple(dict.fromkeys(compared_with)),
    )


def _verdict(trials: _EntryTrials, over_scratch: GainEstimate) -> str:
    if not trials.done:
        return FAILED
    if trials.key.is_scratch:
        return REFERENCE
    if trials.key.is_baseline:
        return BASELINE
    return over_scratch.verdict or UNCOMPARED


def verdict(
    low: float | None, high: float | None, seeds: int, enough: bool, unknown_choice: str = ""
) -> str:
    """Return the verdict on a gain.

    Args:
        low: Lower bound of the gain's interval, or None.
        high: Upper bound.
        seeds: Number of paired seeds.
        enough: Whether there are enough test units.
        unknown_choice: As in `GainEstimate`.
    """
    if seeds == 1:
        return SINGLE_SEED
    if low is None or high is None or seeds < MIN_SEEDS:
        return UNCOMPARED
    if not enough:
        return TOO_FEW
    if not (low > 0 or high < 0):  # also where a bound is NaN
        return NOT_SHOWN
    if unknown_choice:
        return SEARCH_NOISE
    return WINS if low > 0 else LOSES


def _predictions(
    rows: list[ResultRow], runs: dict[str, RunPredictions]
) -> list[RunPredictions] | None:
    """Return the test predictions of all these trials, or None where some are missing."""
    predictions = [
        replace(runs[row.trial_id], seed=row.seed) for row in rows if row.trial_id in runs
    ]
    return predictions if predictions and len(predictions) == len(rows) else None


def _mean_of(trials: _EntryTrials, runs: dict[str, RunPredictions]) -> tuple[Estimate, str]:
    """Return (mean, low, high) of an entry and a description of its interval.

    It is computed from the test predictions, or by Student's t over seeds where some are missing.
    """
    rows = trials.rows
    if not rows:
        return (None, None, None), ""
    metric, predictions, why = catalog.find(trials.metric), _predictions(rows, runs), ""
    if metric is not None and predictions is not None:
        try:
            mean = _finite(stats.mean_interval(metric, predictions))
            seeds = _describe_seeds(len(predictions), "seed")
            return mean, f"mean: 95 % over {_unit_name(predictions)} {seeds}"
        # an array that the metric needs is missing, or rows cannot be paired
        except (KeyError, ValueError) as error:
            why = f": {error}"
    middle, *ends = stats.t_interval([row.value for row in rows if row.value is not None])
    if len(rows) == 1:
        bounds = rows[0].value_low, rows[0].value_high
        return (_finite((middle, None, None))[0], *bounds), f"mean: {ONE_SEED}"
    least, most = _bounds(metric)
    return _finite((middle, *np.clip(ends, least, most))), f"mean: {T_INTERVAL}{why}"


def _bounds(metric: catalog.Metric | None) -> tuple[float, float]:
    """Return the bounds of a metric where they are known without predictions."""
    bounds = metric.fixed_bounds if metric is not None else None
    return bounds if bounds is not None and np.isfinite(bounds).all() else UNBOUNDED


def is_bounded(metric: str) -> bool:
    """Return whether a metric has bounds that are known without predictions."""
    return _bounds(catalog.find(metric)) != UNBOUNDED


def _gain_of(
    trials: _EntryTrials, other: _EntryTrials | None, runs: dict[str, RunPredictions]
) -> GainEstimate:
    """Return the gain of an entry over another entry, paired on their common seeds.

    A single trial that trains nothing is paired with each seed of the other entry. It stays one
    trial: its own spread is unknown.
    """
    if other is None or not trials.done:
        return GainEstimate()
    rows, other_rows = trials.rows, [row for row in other.done if row.metric == trials.metric]
    if not trials.has_no_seed or len(other_rows) < MIN_SEEDS:
        return _paired_gain(trials, other, rows, other_rows, runs)
    repeated = [replace(rows[0], seed=row.seed) for row in other_rows]
    gain = _paired_gain(trials, other, repeated, other_rows, runs)
    if gain.value is None:
        return gain
    return replace(gain, seeds=1, how=f"{gain.how}; its one trial is paired with each seed")


def _paired_gain(
    trials: _EntryTrials,
    other: _EntryTrials,
    rows: list[ResultRow],
    other_rows: list[ResultRow],
    runs: dict[str, RunPredictions],
) -> GainEstimate:
    """Return the gain of some rows of an entry over those of another with the same seeds."""
    seeds = _seeds(rows) & _seeds(other_rows)
    if not seeds:
        return GainEstimate(
            how=f"gain: no seed in common ({len(rows)} and {len(other_rows)} seeds finished)"
            if other_rows
            else ""
        )
    rows = [row for row in rows if row.seed in seeds]
    other_rows = [row for row in other_rows if row.seed in seeds]
    metric, why = catalog.find(trials.metric), ""
    ours, others = _predictions(rows, runs), _predictions(other_rows, runs)
    if metric is not None and ours is not None and others is not None:
        choices = trials.choice(), other.choice()
        try:
            return _predicted_gain(metric, ours, others, choices)
        # an array that the metric needs is missing, or rows cannot be paired
        except (KeyError, ValueError) as error:
            why = f": {error}"
    return _gain_by_seed(rows, other_rows, metric, why)


def _predicted_gain(
    metric: catalog.Metric,
    ours: list[RunPredictions],
    others: list[RunPredictions],
    choices: Sequence[_SearchVariance],
) -> GainEstimate:
    """Return a gain from test predictions, paired by seed and row.

    Raises:
        KeyError: An array that the metric needs is missing.
        ValueError: The rows cannot be paired.
    """
    variance = sum(choice.variance for choice in choices)
    unknown_choice = next((choice.unknown for choice in choices if choice.unknown), "")
    comparison = stats.compare(metric, ours, others, choice=variance)
    return GainEstimate(
        *_finite((comparison.value, comparison.low, comparison.high)),
        seeds=comparison.seeds,
        p_value=_finite_or_none(comparison.p_value),
        evidence=_missing_evidence([*ours, *others], metric.name),
        unknown_choice=unknown_choice,
        how=_describe_interval(ours, others, comparison.seeds, unknown_choice, variance > 0),
        predicted=True,
    )


def _gain_by_seed(
    rows: list[ResultRow], other_rows: list[ResultRow], metric: catalog.Metric | None, why: str
) -> GainEstimate:
    """Return a gain from the values of the same seeds, with Student's t interval.

    Args:
        rows: One row for each seed.
        other_rows: Those of the other entry, of the same seeds.
        metric: Their metric; None where none of that name is registered.
        why: Why it is not computed from test predictions, for the description.
    """
    other_values = {row.seed: row.value for row in other_rows}
    num_seeds = len(_seeds(rows))
    sign = 1 if rows[0].higher_is_better else -1
    gains = [
        sign * (row.value - other_value)
        for row in rows
        if row.value is not None and (other_value := other_values[row.seed]) is not None
    ]
    if not gains:
        return GainEstimate(seeds=num_seeds)
    value, *ends = stats.t_interval(gains)
    least, most = _bounds(metric)
    estimate = _finite((value, *np.clip(ends, least - most, most - least)))
    how = ONE_SEED if num_seeds == 1 else f"{T_INTERVAL}{why}"
    return GainEstimate(*estimate, seeds=num_seeds, how=f"gain: {how}")


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _seeds(rows: list[ResultRow]) -> set[int]:
    return {row.seed for row in rows}


def _missing_evidence(runs: list[RunPredictions], metric: str) -> str:
    """Return a description of the test units where they are too few for a verdict, or ""."""
    least = min(
        (stats.evidence(run, metric) for run in runs),
        key=lambda evidence: (evidence.enough, evidence.count),
    )
    return "" if least.enough else least.text()


def _unit_name(runs: list[RunPredictions]) -> str:
    return "test groups" if all(run.groups is not None for run in runs) else "test units"


def _describe_seeds(count: int, noun: str) -> str:
    return f"and {count} {noun}s" if count > 1 else f"of {ONE_SEED}"


def _describe_interval(
    ours: list[RunPredictions],
    theirs: list[RunPredictions],
    seeds: int,
    unknown_choice: str,
    searched: bool,
) -> str:
    """Return a description of how the interval of a gain was made."""
    both = [*ours, *theirs]
    how = f"gain: 95 % over {_unit_name(both)} {_describe_seeds(seeds, 'paired seed')}"
    most, common = max(len(run.rows) for run in both), len(stats.common_rows(both))
    if common < most:
        how += f", on the {common} of {most} rows that all of them have"
    if unknown_choice:
        return f"{how}, without the noise of the search, {unknown_choice}"
    return f"{how} and the choice of hyper-parameters" if searched else how
