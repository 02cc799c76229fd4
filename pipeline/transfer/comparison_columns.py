"""Columns of results rows that compare trials: gains over scratch and over baselines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from pipeline.core.metrics.catalog import metric
from pipeline.report import matrix, results, stats
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.transfer.grid import SCRATCH, Trial

RowsBySeed = dict[tuple[Any, ...], dict[int, ResultRow]]
"""Test rows of one metric by what they have in common, and by seed."""


def diverged_trials(rows: Iterable[ResultRow]) -> set[str]:
    """Return the ids of trials whose primary test value is NaN: their networks diverged.

    As in the report, no gain is over one of them.
    """
    primary: dict[str, ResultRow] = {}
    for row in rows:
        if row.split == "test" and row.metric:
            primary.setdefault(row.trial_id, row)
    return {name for name, row in primary.items() if math.isnan(row.value or 0.0)}


def fill_comparison(rows: list[ResultRow], entries: list[matrix.MatrixEntry]) -> list[ResultRow]:
    """Fill in the columns that come from the comparison of an entry with scratch.

    They are the number of paired seeds, the corrected p value (primary metric only) and the gain
    over the target's best scratch network, paired by seed (`_paired_rows`). Only test rows of
    trials with a source have them.
    """
    by_key = {entry.key: entry for entry in entries}
    diverged = diverged_trials(rows)
    scratch_rows: RowsBySeed = defaultdict(dict)
    for row in rows:
        is_scratch = row.is_tested and matrix.entry_key(row).is_scratch
        if is_scratch and row.trial_id not in diverged:
            key = (row.backbone, row.target, row.label_fraction, row.metric, row.fold)
            scratch_rows[key][row.seed] = row
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        if entry is None or not row.is_tested or row.source == SCRATCH or row.is_of_subgroup:
            out.append(row)
            continue
        key = (entry.best_scratch, row.target, row.label_fraction, row.metric, row.fold)
        compared = _paired_rows(row, entry, scratch_rows.get(key, {}))
        out.append(
            replace(
                row,
                paired_seeds=entry.paired_seeds,
                gain_p_holm=entry.gain_p_holm if row.metric == entry.metric else None,
                baseline_gain=_signed_gain(row, compared),
            )
        )
    return out


def fill_best_baseline(
    rows: list[ResultRow],
    entries: list[matrix.MatrixEntry],
    predictions: Callable[[str, int], stats.RunPredictions | None],
) -> list[ResultRow]:
    """Fill in the gain over the target's best baseline with the same label fraction.

    It is paired by seed (`_paired_rows`).
    """
    by_key = {entry.key: entry for entry in entries if entry.best_baseline}
    diverged = diverged_trials(rows)
    baseline_rows: RowsBySeed = defaultdict(dict)
    for row in rows:
        is_baseline = row.backbone == results.NO_BACKBONE
        if row.is_tested and is_baseline and row.trial_id not in diverged:
            technique = results.technique(row)
            key = (row.target, row.label_fraction, technique, row.fold, row.metric)
            baseline_rows[key][row.seed] = row
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        if entry is None or not row.is_tested:
            out.append(row)
            continue
        key = (row.target, row.label_fraction, entry.best_baseline, row.fold, row.metric)
        compared = _paired_rows(row, entry, baseline_rows.get(key, {}))
        gain, low, high = _gain_over(predictions, row, compared)
        out.append(
            replace(
                row,
                best_baseline=entry.best_baseline,
                best_baseline_gain=gain,
                best_baseline_low=low,
                best_baseline_high=high,
            )
        )
    return out


def gain_over_scratch(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    row: ResultRow,
    scratch: Sequence[Trial],
    records: dict[str, TrialRecord],
) -> dict[str, float]:
    """Return the columns of the gain of a test row over scratch.

    There are none where scratch has no row of this metric.

    Args:
        scratch: The scratch trial with the same seed. Of a row that has no seed (a soup), those
            with each seed.
    """
    scratch_rows = [
        replace(other, trial_folder=one.folder, seed=one.seed)
        for one in scratch
        for other in records[one.id].rows
        if other.split == "test" and other.metric == row.metric
    ]
    scratch_value = _mean_value(scratch_rows)
    if scratch_value is None or row.value is None or row.metric is None:
        return {}
    names = ("gain", "gain_low", "gain_high")
    estimate = zip(names, _gain_over(predictions, row, scratch_rows), strict=True)
    known = {name: value for name, value in estimate if value is not None}
    return {"scratch_value": scratch_value, **known}


def _paired_rows(
    row: ResultRow, entry: matrix.MatrixEntry, by_seed: Mapping[int, ResultRow]
) -> list[ResultRow]:
    """Return the rows that a row is compared with.

    It is the one with the same seed. A single trial that trains nothing (a source's network, a
    soup, an ensemble) is compared with every seed, as in the report.
    """
    has_no_seed = entry.n_seeds == 1 and row.params_trained == 0
    if has_no_seed and len(by_seed) >= matrix.MIN_SEEDS:
        return list(by_seed.values())
    return [by_seed[row.seed]] if row.seed in by_seed else []


def _gain_over(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    row: ResultRow,
    others: Sequence[ResultRow],
) -> matrix.Estimate:
    """Return (gain, low, high) of a trial's row over the mean of other trials, each with its seed.

    What cannot be computed is None.
    """
    gain = _signed_gain(row, others)
    if gain is None or row.metric is None:
        return None, None, None
    if row.is_of_label or row.is_of_subgroup:
        # the report has its interval over all seeds
        return gain, None, None
    scorer = metric(row.metric)
    own_run = predictions(row.folder, row.seed)
    other_runs = [predictions(other.folder, other.seed) for other in others]
    known_runs = [run for run in other_runs if run is not None]
    can_resample = scorer.units is not None or scorer.resampled is not None
    if not can_resample or own_run is None or len(known_runs) < len(others):
        return gain, None, None
    own_runs = [replace(own_run, seed=run.seed) for run in known_runs]
    comparison = stats.compare(scorer, own_runs, known_runs)
    return comparison.value, comparison.low, comparison.high


def _signed_gain(row: ResultRow, others: Sequence[ResultRow]) -> float | None:
    """Return by how much a row is better than the mean of others; None where a value is missing."""
    mean = _mean_value(others)
    if row.value is None or mean is None:
        return None
    return (row.value - mean) * (1 if row.higher_is_better else -1)


def _mean_value(rows: Sequence[ResultRow]) -> float | None:
    """Return the mean of the rows' values; None where there are none, or one is missing."""
    values = [row.value for row in rows if row.value is not None]
    return fmean(values) if values and len(values) == len(rows) else None
