"""Columns of results rows that compare trials: gains over scratch and over baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.core.metrics.catalog import metric
from pipeline.report import matrix, results, stats
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.transfer.grid import SCRATCH, Trial


def fill_comparison(rows: list[ResultRow], entries: list[matrix.MatrixEntry]) -> list[ResultRow]:
    """Fill in the columns that come from the comparison of an entry with scratch.

    They are the number of paired seeds, the corrected p value (primary metric only) and the gain
    over the target's best scratch network with the same seed. Only test rows of trials with a
    source have them.
    """
    by_key = {entry.key: entry for entry in entries}
    scratch_values = {
        (row.backbone, row.target, row.label_fraction, row.metric, row.seed, row.fold): row.value
        for row in rows
        if row.is_tested and row.source == SCRATCH and results.technique(row) == "scratch"
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        is_subgroup = "@" in (row.metric or "")
        if entry is None or not row.is_tested or row.source == SCRATCH or is_subgroup:
            out.append(row)
            continue
        key = (entry.best_scratch, row.target, row.label_fraction, row.metric, row.seed, row.fold)
        out.append(
            replace(
                row,
                paired_seeds=entry.paired_seeds,
                gain_p_holm=entry.gain_p_holm if row.metric == entry.metric else None,
                baseline_gain=_signed_gain(row, scratch_values.get(key)),
            )
        )
    return out


def fill_best_baseline(
    rows: list[ResultRow],
    entries: list[matrix.MatrixEntry],
    predictions: Callable[[str, int], stats.RunPredictions | None],
) -> list[ResultRow]:
    """Fill in the gain over the target's best baseline, with the same label fraction and seed."""
    by_key = {entry.key: entry for entry in entries if entry.best_baseline}
    baseline_rows = {
        (
            row.target,
            row.label_fraction,
            results.technique(row),
            row.seed,
            row.fold,
            row.metric,
        ): row
        for row in rows
        if row.is_tested and row.backbone == results.NO_BACKBONE
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        if entry is None or not row.is_tested:
            out.append(row)
            continue
        key = (
            row.target,
            row.label_fraction,
            entry.best_baseline,
            row.seed,
            row.fold,
            row.metric,
        )
        gain, low, high = _gain_over(predictions, row, baseline_rows.get(key))
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
    scratch: Trial,
    records: dict[str, TrialRecord],
) -> dict[str, float]:
    """Return the columns of the gain of a test row over scratch with the same seed.

    There are none where scratch has no row of this metric.
    """
    scratch_value = next(
        (
            other.value
            for other in records[scratch.id].rows
            if other.split == "test" and other.metric == row.metric
        ),
        None,
    )
    if scratch_value is None or row.value is None or row.metric is None:
        return {}
    scratch_row = replace(row, trial_folder=scratch.folder, value=scratch_value)
    names = ("gain", "gain_low", "gain_high")
    estimate = zip(names, _gain_over(predictions, row, scratch_row), strict=True)
    known = {name: value for name, value in estimate if value is not None}
    return {"scratch_value": scratch_value, **known}


def _gain_over(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    row: ResultRow,
    other: ResultRow | None,
) -> matrix.Estimate:
    """Return (gain, low, high) of a trial's row over that of another trial with the same seed.

    What cannot be computed is None.
    """
    gain = None if other is None else _signed_gain(row, other.value)
    if other is None or gain is None or row.metric is None:
        return None, None, None
    if "/" in row.metric or "@" in row.metric:
        # of one label or subgroup: the report has its interval over all seeds
        return gain, None, None
    scorer = metric(row.metric)
    own_run, other_run = (predictions(each.folder, each.seed) for each in (row, other))
    can_resample = scorer.units is not None or scorer.resampled is not None
    if not can_resample or own_run is None or other_run is None:
        return gain, None, None
    comparison = stats.compare(scorer, [own_run], [other_run])
    return comparison.value, comparison.low, comparison.high


def _signed_gain(row: ResultRow, other_value: float | None) -> float | None:
    """Return by how much a row is better than another value; None where one of them is missing."""
    if row.value is None or other_value is None:
        return None
    return (row.value - other_value) * (1 if row.higher_is_better else -1)
