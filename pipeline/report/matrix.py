"""The matrix sources x targets x techniques x label fractions: one cell for the seeds of each, with
its gain over scratch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from pipeline.metrics import catalog
from pipeline.metrics.metric import UNBOUNDED
from pipeline.report import results, stats
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

Estimate = tuple[float | None, float | None, float | None]
"""(middle, low, high)."""

CellKey = tuple[str, str, str, str, str]
"""(source, backbone, target, technique with its options, label fraction)."""

SCRATCH = "none"
"""The source of trials that start from random weights: what the others of their backbone, target
and label fraction are held against. It is shown under this name wherever a source is named.
"""

COUNTERPARTS = {"random_probe": "linear_probe"}
"""Techniques without a source that are held against another technique instead of scratch: a probe
of random features says what a probe of pretrained ones is worth. The counterpart is that of the
source with the best validation value for the same backbone, target and labels.
"""

ONE_SEED = "one seed, whose spread is unknown"
T_INTERVAL = "95 % Student's t over seeds (test predictions not at hand), not enough for a verdict"

WINS, LOSES, NOT_SHOWN, TOO_FEW = "wins", "loses", "not shown", "too few to tell"
REFERENCE, FAILED, UNCOMPARED = "reference", "failed", "not compared"
COMPARED = (WINS, LOSES, NOT_SHOWN)
"""Verdicts of a comparison that was made; these are what Holm's correction counts."""
MIN_SEEDS = 2
"""Paired seeds below which nothing is a win or a loss: one says nothing of the spread between
seeds. In comparisons without any true difference one seed gave 19 % (seed deviation .01) to 50 %
(.02) wins and losses.
"""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """The final trials of one (source, backbone, target, technique, label fraction), on the test
    split.

    ``mean [low, high]`` is the primary metric over seeds; ``gain [gain_low, gain_high]`` is
    positive when better than scratch, whatever the metric's direction. What could not be computed
    is None. ``interval`` says how both intervals were made.

    ``verdict``: "wins" or "loses" where the gain's interval excludes zero, "not shown" where it
    holds zero (which does not say that there is no difference); "too few to tell" where the test
    units are too few for a verdict (``evidence``), "not compared" below two paired seeds, without
    scratch to compare with, or without test predictions; "reference" for scratch, "failed" without
    a finished trial. ``gain_p`` is the p value of a gain of zero, ``gain_p_holm`` the same
    corrected for all comparisons of the job.

    ``against`` names what the gain is over where that is not scratch. ``baseline_gain`` is the gain
    over the best scratch network (by validation) of the same target and label fraction, whose
    backbone is ``baseline``: with several backbones, gains are measured against different scratch
    networks.
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
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    seconds: float | None
    params_trained: int | None
    n_train: int | None
    n_test: int | None
    hyper_parameters: str
    verdict: str
    interval: str = ""
    code_mark: str = ""
    """The mark of a cell whose trials were made by other code or versions than those of now, or by
    different ones (`pipeline.report.code_versions`).
    """
    paired_seeds: int | None = None
    gain_p: float | None = None
    gain_p_holm: float | None = None
    evidence: str = ""
    against: str = ""
    baseline: str = ""
    baseline_gain: float | None = None
    baseline_low: float | None = None
    baseline_high: float | None = None
    compared_with: tuple[CellKey, ...] = ()
    """Keys (`cell_key`) of the cells that its gains are over: what it is held against, and the best
    scratch network.
    """

    @property
    def transfers(self) -> bool:
        """Whether a source is held against scratch, and it could be told which is better."""
        return self.source != SCRATCH and self.verdict in COMPARED

    @property
    def survives(self) -> bool:
        """Whether a win or a loss stands after Holm's correction."""
        return (
            self.verdict in (WINS, LOSES)
            and self.gain_p_holm is not None
            and self.gain_p_holm < SIGNIFICANT
        )


@dataclass(frozen=True)
class _Trials:
    """What is known of a cell before it is compared: results rows and test predictions of its final
    trials.
    """

    key: CellKey
    done: list[ResultRow]
    failed: int
    group: list[ResultRow]

    @property
    def metric(self) -> str:
        return next((row.metric for row in (*self.done[:1], *self.group) if row.metric), "")

    @property
    def rows(self) -> list[ResultRow]:
        """Test rows of the primary metric, one a seed."""
        return [row for row in self.done if row.metric == self.metric]

    @property
    def technique(self) -> str:
        """The technique's name without its options."""
        return self.group[0].technique

    def validation(self) -> float:
        """Mean validation value of the final trials, larger is better; minus infinity where there
        is none.
        """
        found: dict[str, float] = {}
        for row in self.group:
            if row.trial_stage == "final" and row.split == "validation" and row.value is not None:
                found.setdefault(row.trial_id, row.value if row.higher_is_better else -row.value)
        return fmean(found.values()) if found else -math.inf

    def choice(self) -> _Choice:
        """What choosing the hyper-parameters in a search added to the variance."""
        searched = [
            row
            for row in self.group
            if row.trial_stage == "search"
            and row.status == "done"
            and row.split == "validation"
            and row.metric
        ]
        if not searched:
            return _Choice()
        if all(row.metric != self.metric for row in searched):
            return _Choice(unknown=f"which was judged by {searched[0].metric}")
        draws: dict[str, dict[str, float]] = defaultdict(dict)
        for row in searched:
            if row.metric != self.metric or row.value is None or not math.isfinite(row.value):
                continue
            draws[_draw(row)][row.trial_id] = row.value if row.higher_is_better else -row.value
        if len(draws) < 2:
            return _Choice()
        again = [list(values.values()) for values in draws.values() if len(values) > 1]
        if len(again) < 2:
            return _Choice(unknown="whose settings were tried with one seed")
        return _Choice(stats.choice_variance(again))


@dataclass(frozen=True)
class _Choice:
    """The variance that choosing the hyper-parameters added: nothing where there was nothing to
    choose from.

    ``unknown`` says why the search does not tell the variance, which then is not counted. A search
    tells it of the metric that its validations measured, in that metric's unit, and of settings
    that were tried with several seeds.
    """

    variance: float = 0.0
    unknown: str = ""


def _draw(row: ResultRow) -> str:
    """The setting that a search trial was given, the same for every seed; rows that do not state it
    stand alone.

    What ran (``hyper_parameters``) does not serve here: the steps of epochs, for one, differ from
    seed to seed where the rows of a label fraction and their costs do.
    """
    return row.drawn or row.trial_id


def matrix_cells(rows: list[ResultRow], runs: dict[str, RunPredictions]) -> list[Cell]:
    """One Cell for each (source, backbone, target, technique, label fraction) of ``rows``, which
    are results rows.

    ``runs`` maps trial ids to test predictions. Where those of a cell or of its scratch are
    missing, its intervals are Student's t over seeds, and ``interval`` says so. A cell whose trials
    all failed, in search or finally, is there too. Sorted by target, label fraction, then gain with
    the largest first (scratch stands at zero, what has no gain comes last).
    """
    groups: dict[CellKey, list[ResultRow]] = defaultdict(list)
    for row in rows:
        groups[cell_key(row)].append(row)
    found: list[_Trials] = []
    for key, group in groups.items():
        final = _final_trials(group)
        if final is not None:
            found.append(_Trials(key, *final, group))
    out = [_cell(one, _reference(one, found), _best_scratch(one, found), runs) for one in found]
    return sorted(_corrected(out), key=_order)


def _corrected(found: list[Cell]) -> list[Cell]:
    """The cells with their p values corrected for the number of comparisons (`stats.holm`)."""
    compared = [
        place
        for place, cell in enumerate(found)
        if cell.verdict in COMPARED and cell.gain_p is not None
    ]
    corrected = stats.holm([found[place].gain_p or 0.0 for place in compared])
    out = list(found)
    for place, p_value in zip(compared, corrected, strict=True):
        out[place] = replace(out[place], gain_p_holm=p_value)
    return out


def _is_scratch(key: CellKey) -> bool:
    return key[0] == SCRATCH and key[3] == "scratch"


def _reference(one: _Trials, found: list[_Trials]) -> _Trials | None:
    """What a cell is held against: scratch of the same backbone, target and labels, or its
    technique's counterpart.
    """
    source, backbone, target, _, fraction = one.key
    alike = [
        other
        for other in found
        if (other.key[1], other.key[2], other.key[4]) == (backbone, target, fraction)
    ]
    if source != SCRATCH:
        return next((other for other in alike if _is_scratch(other.key)), None)
    counterpart = COUNTERPARTS.get(one.technique)
    candidates = [
        other
        for other in alike
        if other.key[0] != SCRATCH and other.technique == counterpart and other.done
    ]
    return max(candidates, key=_Trials.validation, default=None)


def _best_scratch(one: _Trials, found: list[_Trials]) -> _Trials | None:
    """The scratch network of any backbone with the best validation value for the target and label
    fraction of a cell.
    """
    if one.key[0] == SCRATCH:
        return None
    candidates = [
        other
        for other in found
        if _is_scratch(other.key)
        and other.done
        and (other.key[2], other.key[4]) == (one.key[2], one.key[4])
    ]
    if len(candidates) > 1:
        candidates = [other for other in candidates if math.isfinite(other.validation())]
    return max(candidates, key=_Trials.validation, default=None)


def fraction_order(label_fraction: str) -> tuple[int, float, str]:
    """Sort key of label fractions: rows per class or rows alone first, then shares, each from small
    to large.
    """
    number = label_fraction.removesuffix("/class").removesuffix(" rows")
    try:
        return int(number == label_fraction), float(number), label_fraction
    except ValueError:
        return 2, 0.0, label_fraction


def cell_key(row: ResultRow) -> CellKey:
    """The key of the cell that a results row belongs to."""
    return (
        row.source,
        row.backbone,
        row.target,
        results.technique(row) if row.technique else "",
        row.label_fraction,
    )


def _order(cell: Cell) -> tuple[object, ...]:
    of_scratch = cell.gain is not None and not cell.against
    gain = (cell.gain or 0.0) if of_scratch else 0.0 if cell.verdict == REFERENCE else -math.inf
    return (
        cell.target,
        fraction_order(cell.label_fraction),
        -gain,
        cell.verdict == REFERENCE,
        cell.source,
        cell.backbone,
        cell.technique,
    )


def _final_trials(group: list[ResultRow]) -> tuple[list[ResultRow], int] | None:
    """(the primary test row of each finished final trial, how many failed); None for a cell that
    has no final trial yet.

    A cell whose search trials all failed has no final trials, and still counts: they are its
    failures.
    """
    final = [row for row in group if row.trial_stage == "final"]
    primary: dict[str, ResultRow] = {}
    for row in final:
        if row.status == "done" and row.split == "test" and row.metric:
            primary.setdefault(row.trial_id, row)
    failed = {row.trial_id for row in final if row.status == "failed"} - set(primary)
    if not final and all(row.status != "done" for row in group):
        failed = {row.trial_id for row in group if row.status == "failed"}
    return (list(primary.values()), len(failed)) if primary or failed else None


def _mean(rows: list[ResultRow], name: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return fmean(values) if values else None


def _whole(rows: list[ResultRow], name: str) -> int | None:
    mean = _mean(rows, name)
    return None if mean is None else round(mean)


def _finite(values: Estimate) -> Estimate:
    middle, low, high = (float(v) if v is not None and math.isfinite(v) else None for v in values)
    return middle, low, high


def _cell(
    one: _Trials,
    reference: _Trials | None,
    best_scratch: _Trials | None,
    runs: dict[str, RunPredictions],
) -> Cell:
    source, backbone, target, technique, fraction = one.key
    done, group = one.rows, one.group
    first = done[0] if done else group[0]
    higher = bool(first.higher_is_better) if done else True
    mean, how = _mean_of(one, runs)
    gain = _gain_of(one, reference, runs)
    compared = reference is not None and bool(reference.done) and bool(done)
    baseline, own = _GainEstimate(), best_scratch is None or best_scratch is reference
    if best_scratch is not None and done:
        baseline = gain if own else _gain_of(one, best_scratch, runs)
    gained_over = ((reference, gain), (best_scratch, baseline))
    compared_with = {
        other.key: None
        for other, gained in gained_over
        if other is not None and gained.estimate[0] is not None
    }
    against = (
        f"{reference.key[3]} of {reference.key[0]}"
        if reference is not None and reference.key[0] != SCRATCH
        else ""
    )
    return Cell(
        source=source,
        backbone=backbone,
        target=target,
        technique=technique,
        label_fraction=fraction,
        metric=one.metric,
        higher_is_better=higher,
        n_seeds=len(done),
        n_failed=one.failed,
        mean=mean[0],
        low=mean[1],
        high=mean[2],
        gain=gain.estimate[0],
        gain_low=gain.estimate[1],
        gain_high=gain.estimate[2],
        seconds=_mean(done, "seconds"),
        params_trained=_whole(done, "params_trained"),
        n_train=_whole(done, "n_train"),
        n_test=_whole(done, "n_eval"),
        hyper_parameters=first.hyper_parameters or "{}",
        verdict=_verdict(one, gain),
        interval="; ".join(text for text in (how, gain.how) if text),
        paired_seeds=gain.seeds if compared else None,
        gain_p=gain.p_value,
        evidence=gain.evidence,
        against=against,
        baseline=best_scratch.key[1] if best_scratch is not None and done else "",
        baseline_gain=baseline.estimate[0],
        baseline_low=baseline.estimate[1],
        baseline_high=baseline.estimate[2],
        compared_with=tuple(compared_with),
    )


@dataclass(frozen=True)
class _GainEstimate:
    """The gain of a cell over another: (gain, low, high), how it was made, its p value and on how
    many paired seeds and units it rests.

    ``evidence`` says which units are too few for a verdict, and is empty where they are enough.
    """

    estimate: Estimate = (None, None, None)
    how: str = ""
    p_value: float | None = None
    seeds: int = 0
    evidence: str = ""
    predicted: bool = False


def _verdict(one: _Trials, gain: _GainEstimate) -> str:
    if not one.done:
        return FAILED
    if _is_scratch(one.key):
        return REFERENCE
    if not gain.predicted:
        return UNCOMPARED
    _, low, high = gain.estimate
    return verdict(low, high, gain.seeds, not gain.evidence)


def verdict(low: float | None, high: float | None, seeds: int, enough: bool) -> str:
    """The verdict on a gain from its interval, the paired seeds, and whether there are enough test
    units.
    """
    if low is None or high is None or seeds < MIN_SEEDS:
        return UNCOMPARED
    if not enough:
        return TOO_FEW
    return WINS if low > 0 else LOSES if high < 0 else NOT_SHOWN


def _predictions(
    rows: list[ResultRow], runs: dict[str, RunPredictions]
) -> list[RunPredictions] | None:
    """Test predictions of all these trials; None where some are not at hand."""
    found = [runs[row.trial_id] for row in rows if row.trial_id in runs]
    return found if found and len(found) == len(rows) else None


def _mean_of(one: _Trials, runs: dict[str, RunPredictions]) -> tuple[Estimate, str]:
    """((mean, low, high), how): from predictions where all are at hand, else over seeds."""
    rows = one.rows
    if not rows:
        return (None, None, None), ""
    metric, found, why = catalog.find(one.metric), _predictions(rows, runs), ""
    if metric is not None and found is not None:
        try:
            return _finite(
                stats.mean_interval(metric, found)
            ), f"mean: 95 % over {_resampled(found)} {_seed_words(len(found), 'seed')}"
        except (
            KeyError,
            ValueError,
        ) as error:  # predictions without what the metric reads, or rows that cannot be paired
            why = f": {error}"
    mean, *ends = stats.t_interval([row.value for row in rows if row.value is not None])
    if len(rows) == 1:
        return (
            _finite((mean, None, None))[0],
            rows[0].value_low,
            rows[0].value_high,
        ), f"mean: {ONE_SEED}"
    least, most = _bounds(metric)
    return _finite((mean, *np.clip(ends, least, most))), f"mean: {T_INTERVAL}{why}"


def _bounds(metric: catalog.Metric | None) -> tuple[float, float]:
    """A metric's bounds where they are known without predictions."""
    known = metric.fixed_bounds if metric is not None else None
    return known if known is not None and np.isfinite(known).all() else UNBOUNDED


def _gain_of(one: _Trials, other: _Trials | None, runs: dict[str, RunPredictions]) -> _GainEstimate:
    """The gain of a cell over another cell, paired on their common seeds."""
    if other is None or not one.done:
        return _GainEstimate()
    rows, theirs = one.rows, [row for row in other.done if row.metric == one.metric]
    seeds = _seeds(rows) & _seeds(theirs)
    if not seeds:
        return _GainEstimate(
            how=f"gain: no seed in common ({len(rows)} and {len(theirs)} seeds finished)"
            if theirs
            else ""
        )
    rows = [row for row in rows if row.seed in seeds]
    theirs = [row for row in theirs if row.seed in seeds]
    metric, why = catalog.find(one.metric), ""
    ours, scratch = _predictions(rows, runs), _predictions(theirs, runs)
    if metric is not None and ours is not None and scratch is not None:
        choices = one.choice(), other.choice()
        try:
            found = stats.compare(
                metric, ours, scratch, choice=sum(choice.variance for choice in choices)
            )
            estimate = _finite((found.value, found.low, found.high))
            return _GainEstimate(
                estimate,
                _how(ours, scratch, found.seeds, choices),
                _number(found.p_value),
                found.seeds,
                _too_few([*ours, *scratch]),
                True,
            )
        except (KeyError, ValueError) as error:
            why = f": {error}"
    by_seed = {row.seed: row.value for row in theirs}
    sign = 1 if rows[0].higher_is_better else -1
    gains = [
        sign * (row.value - theirs_value)
        for row in rows
        if row.value is not None and (theirs_value := by_seed[row.seed]) is not None
    ]
    if not gains:
        return _GainEstimate(seeds=len(seeds))
    value, *ends = stats.t_interval(gains)
    least, most = _bounds(metric)
    estimate = _finite((value, *np.clip(ends, least - most, most - least)))
    how = ONE_SEED if len(seeds) == 1 else f"{T_INTERVAL}{why}"
    return _GainEstimate(estimate, f"gain: {how}", seeds=len(seeds))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _seeds(rows: list[ResultRow]) -> set[int]:
    return {row.seed for row in rows}


def _too_few(runs: list[RunPredictions]) -> str:
    """Which test units are too few for a verdict; empty where they are enough."""
    least = min(
        (stats.evidence(run) for run in runs), key=lambda found: (found.enough, found.count)
    )
    return "" if least.enough else least.text()


def _resampled(runs: list[RunPredictions]) -> str:
    return "test groups" if all(run.groups is not None for run in runs) else "test units"


def _seed_words(count: int, noun: str) -> str:
    return f"and {count} {noun}s" if count > 1 else f"of {ONE_SEED}"


def _how(
    ours: list[RunPredictions], theirs: list[RunPredictions], seeds: int, choices: Sequence[_Choice]
) -> str:
    """What the interval of a gain was made of, in words."""
    everyone = [*ours, *theirs]
    how = f"gain: 95 % over {_resampled(everyone)} {_seed_words(seeds, 'paired seed')}"
    most, common = max(len(run.rows) for run in everyone), len(stats.common_rows(everyone))
    if common < most:
        how += f", on the {common} of {most} rows that all of them have"
    unknown = [choice.unknown for choice in choices if choice.unknown]
    if unknown:
        return f"{how}, without the noise of the search, {unknown[0]}"
    searched = any(choice.variance for choice in choices)
    return f"{how} and the choice of hyper-parameters" if searched else how
