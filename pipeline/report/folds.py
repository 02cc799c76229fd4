"""Cross-validation: pools the test rows of a target's folds, so that intervals are over all rows.

Each row is tested once with each seed, by the network of the fold that holds it out. The pooled
predictions of a seed stand for one run on all rows. Two techniques are paired by row, and so by
fold. The intervals leave out that the networks of two folds share most of their training rows:
nobody has an unbiased estimate of that (Bengio and Grandvalet, JMLR 5, 2004). A metric of the
pooled rows compares scores of several networks; for ranks (AUROC) it tends to be a little lower
than the mean over folds (Airola et al., Computational Statistics & Data Analysis 55, 2011).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean

import numpy as np

from pipeline.core.groups import num_units
from pipeline.core.metrics import catalog
from pipeline.core.metrics.catalog import Predictions
from pipeline.core.ragged import concatenate_padded
from pipeline.report import results
from pipeline.report.results import ResultRow
from pipeline.report.shift import Shift
from pipeline.report.source_scores import PairScores, ScoreValue
from pipeline.report.stats import RunPredictions

MAX_GROUPS_PER_FOLD = 1 << 40
"""Added to group numbers once per fold: they begin at 0 in each, and no group is in two folds."""


def pool(
    rows: Sequence[ResultRow], runs: Mapping[str, RunPredictions]
) -> tuple[list[ResultRow], dict[str, RunPredictions]]:
    """Return results rows and test predictions with those of a seed's folds as one final trial.

    Its value is that of the pooled predictions. Where there are none, or the networks of two folds
    have different labels, it is the mean over folds. A seed that lacks one of the target's folds
    becomes one failed trial: its value on the other folds would be that of easier or harder rows.
    Rows of searches and of targets without folds do not change.
    """
    out: list[ResultRow] = []
    final: dict[tuple[tuple[str, ...], int], list[ResultRow]] = defaultdict(list)
    folds_of: dict[str, set[int]] = defaultdict(set)
    errors: dict[tuple[tuple[str, ...], int, int | None], str] = {}
    for row in rows:
        if row.fold is None:
            out.append(row)
            continue
        technique = results.technique(row)
        entry = row.source, row.backbone, row.target, technique, row.label_fraction
        folds_of[row.target].add(row.fold)
        if row.trial_stage == "final":
            final[entry, row.seed].append(row)
        else:
            out.append(row)
        if row.status == "failed":
            seed = row.seed if row.trial_stage == "final" else None
            errors.setdefault((entry, row.fold, seed), row.error or "no error was recorded")
    pooled_runs: dict[str, RunPredictions] = {}
    for (entry, seed), of_seed in final.items():
        done = [row for row in of_seed if row.status == "done"]
        missing_folds = sorted(folds_of[of_seed[0].target] - {row.fold or 0 for row in done})
        if not missing_folds:
            out += _pool_seed(done, runs, pooled_runs)
            continue
        why = [
            f"fold {fold} of seed {seed}: "
            + errors.get((entry, fold, seed), errors.get((entry, fold, None), "not run yet"))
            for fold in missing_folds
        ]
        out.append(_failed(of_seed, "; ".join(why)))
    return out, {**runs, **pooled_runs}


def _failed(rows: list[ResultRow], why: str) -> ResultRow:
    """Return the row of a seed that lacks a fold."""
    first = rows[0]
    return ResultRow(
        job=first.job,
        source=first.source,
        backbone=first.backbone,
        target=first.target,
        objective=first.objective,
        technique=first.technique,
        hyper_parameters=first.hyper_parameters,
        seed=first.seed,
        label_fraction=first.label_fraction,
        trial_id="+".join(dict.fromkeys(row.trial_id for row in rows)),
        trial_stage=first.trial_stage,
        status="failed",
        error=why,
    )


def _pool_seed(
    done: list[ResultRow],
    runs: Mapping[str, RunPredictions],
    pooled_runs: dict[str, RunPredictions],
) -> list[ResultRow]:
    """Return the rows of a seed that has all folds, one for each split and metric.

    Its pooled predictions are added to ``pooled_runs``.
    """
    fold_of_trial = {row.trial_id: row.fold or 0 for row in done}
    trial_ids = sorted(fold_of_trial, key=lambda trial_id: fold_of_trial[trial_id])
    name = "+".join(trial_ids)
    run_of_fold = [
        (fold_of_trial[trial_id], runs[trial_id]) for trial_id in trial_ids if trial_id in runs
    ]
    has_same_labels = len({run.labels for _, run in run_of_fold}) == 1
    pooled_run = None
    if len(run_of_fold) == len(trial_ids) and has_same_labels:
        pooled_run = pooled_runs[name] = _pool_runs(run_of_fold, done[0].seed)
    rows_of_metric: dict[tuple[str | None, str | None], list[ResultRow]] = defaultdict(list)
    for row in sorted(done, key=lambda row: row.fold or 0):
        rows_of_metric[row.split, row.metric].append(row)
    return [_pool_rows(in_folds, name, pooled_run) for in_folds in rows_of_metric.values()]


def _pool_rows(rows: list[ResultRow], name: str, run: RunPredictions | None) -> ResultRow:
    """Return the row of a split and a metric, which is that of all folds.

    Args:
        rows: Those of the folds that have this metric. A rare label may be in some folds only.
        name: Name of the pooled trial.
        run: Its predictions on all test rows; None where there are none.
    """
    first = rows[0]
    value = _mean([row.value for row in rows])
    n_eval = sum(row.n_eval or 0 for row in rows)
    n_units = sum(row.n_units or 0 for row in rows)
    if first.split == "test" and run is not None:
        # the metric of a subgroup is no registered one; another may have no value on these rows,
        # or read an array that they lack
        with suppress(KeyError, ValueError):
            value = catalog.metric(first.metric or "", run.labels).value(run.predictions)
            n_eval = len(run.rows)
            n_units = num_units(n_eval, run.groups)
    trained, steps = _mean([row.n_train for row in rows]), _mean([row.steps for row in rows])
    return replace(
        first,
        trial_id=name,
        fold=None,
        value=value,
        value_low=None,
        value_high=None,
        n_eval=n_eval,
        n_units=n_units,
        n_train=None if trained is None else round(trained),
        steps=None if steps is None else round(steps),
        seconds=_mean([row.seconds for row in rows]),
        bundle_uri=next((row.bundle_uri for row in rows if row.bundle_uri), None),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def _pool_runs(run_of_fold: Sequence[tuple[int, RunPredictions]], seed: int) -> RunPredictions:
    """Return the predictions of several folds, by row."""
    runs = [run for _, run in run_of_fold]
    rows = np.concatenate([run.rows for run in runs])
    order = np.argsort(rows, kind="stable")

    def by_row(arrays: list[np.ndarray]) -> np.ndarray:
        return concatenate_padded(arrays)[order]

    predictions: Predictions = {
        name: by_row([run.predictions[name] for run in runs]) for name in runs[0].predictions
    }
    groups = [
        run.groups + fold * MAX_GROUPS_PER_FOLD
        for fold, run in run_of_fold
        if run.groups is not None
    ]
    subgroups = {name: by_row([run.subgroups[name] for run in runs]) for name in runs[0].subgroups}
    return RunPredictions(
        rows[order],
        predictions,
        seed,
        by_row(groups) if len(groups) == len(runs) else None,
        runs[0].labels,
        subgroups,
        runs[0].rollout_frames,
    )


def pool_scores(
    scores: Mapping[str, PairScores], name_in_job: Mapping[str, str]
) -> dict[str, PairScores]:
    """Return the scores of sources by ``source|target``, those of a target's folds as their mean.

    A score that one of the folds does not have is not defined. Bounds are means too: the training
    rows of the folds are nearly the same. A shift names the fold of its rows: that from the source
    is of the first fold, that between test and training rows is of each.

    Args:
        scores: ``source|target`` to scores.
        name_in_job: Name of each target to that which its folds share.
    """
    by_pair: dict[tuple[str, str], list[PairScores]] = defaultdict(list)
    for pair in scores.values():
        by_pair[pair.source, name_in_job.get(pair.target, pair.target)].append(pair)
    return {
        f"{source}|{target}": _mean_scores(pairs, target)
        for (source, target), pairs in by_pair.items()
    }


def _mean_scores(pairs: list[PairScores], target: str) -> PairScores:
    first = pairs[0]
    shifts = [
        shift if pair.target == target else _of_fold(shift, pair.target)
        for pair in pairs
        for shift in pair.shifts
        if pair is first or shift.within_target
    ]
    if len(pairs) == 1:
        return replace(first, target=target, shifts=tuple(shifts))
    means: dict[str, ScoreValue] = {}
    for name in first.scores:
        of_folds = [pair.scores[name] for pair in pairs if name in pair.scores]
        score = next((score for score in of_folds if score.value is None), of_folds[0])
        if score.value is None or len(of_folds) < len(pairs):
            means[name] = replace(score, value=None, low=None, high=None)
            continue
        are_bounded = all(score.low is not None and score.high is not None for score in of_folds)
        means[name] = replace(
            score,
            value=_mean([score.value for score in of_folds]),
            low=_mean([score.low for score in of_folds]) if are_bounded else None,
            high=_mean([score.high for score in of_folds]) if are_bounded else None,
            seconds=_mean([score.seconds for score in of_folds]),
        )
    return replace(
        first,
        target=target,
        scores=means,
        rows=round(fmean(pair.rows for pair in pairs)),
        seconds=fmean(pair.seconds for pair in pairs),
        error="; ".join(dict.fromkeys(pair.error for pair in pairs if pair.error)),
        shifts=tuple(shifts),
    )


def _of_fold(shift: Shift, target: str) -> Shift:
    """Return a shift whose rows are named as those of a fold.

    Args:
        target: The fold's name: ``birds.fold2``.
    """
    return replace(shift, rows=f"{shift.rows} of fold {target.rpartition('.fold')[2]}")
