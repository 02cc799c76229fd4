"""Columns of results rows that compare trials: gains over scratch and over baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.core.metrics.catalog import metric
from pipeline.report import matrix, results, stats
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.transfer.grid import SCRATCH, Trial


def with_comparison(rows: list[ResultRow], entries: list[matrix.MatrixEntry]) -> list[ResultRow]:
    """Fill in the columns that need the comparison of whole entries.

    They are the number of paired seeds, the corrected p value (primary metric only) and the gain
    over the target's best scratch network with the same seed. Only test rows of trials with a
    source have them.
    """
    by_key = {
        (entry.source, entry.backbone, entry.target, entry.technique, entry.label_fraction): entry
        for entry in entries
    }
    tested = [row for row in rows if is_tested(row)]
    scratch = {
        (row.backbone, row.target, row.label_fraction, row.metric, row.seed, row.fold): row.value
        for row in tested
        if row.source == SCRATCH and results.technique(row) == "scratch"
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = by_key.get(matrix.entry_key(row))
        if (
            not is_tested(row)
            or entry is None
            or row.source == SCRATCH
            or "@" in (row.metric or "")
        ):
            out.append(row)
            continue
        best = scratch.get(
            (entry.baseline, row.target, row.label_fraction, row.metric, row.seed, row.fold)
        )
        baseline_gain = (
            None
            if best is None or row.value is None
            else (row.value - best) * (1 if row.higher_is_better else -1)
        )
        gain_p_holm = entry.gain_p_holm if row.metric == entry.metric else None
        out.append(
            replace(
                row,
                paired_seeds=entry.paired_seeds,
                gain_p_holm=gain_p_holm,
                baseline_gain=baseline_gain,
            )
        )
    return out


def with_best_baseline(
    rows: list[ResultRow],
    entries: list[matrix.MatrixEntry],
    predictions: Callable[[str, int], stats.RunPredictions | None],
) -> list[ResultRow]:
    """Fill in the gain over the target's best baseline, with the same label fraction and seed."""
    best = {
        (entry.source, entry.backbone, entry.target, entry.technique, entry.label_fraction): entry
        for entry in entries
        if entry.best_baseline
    }
    of_baselines = {
        (
            row.target,
            row.label_fraction,
            results.technique(row),
            row.seed,
            row.fold,
            row.metric,
        ): row
        for row in rows
        if is_tested(row) and row.backbone == results.NO_BACKBONE
    }
    out: list[ResultRow] = []
    for row in rows:
        entry = best.get(matrix.entry_key(row))
        if entry is None or not is_tested(row):
            out.append(row)
            continue
        seed_and_fold = row.seed, row.fold
        key = (row.target, row.label_fraction, entry.best_baseline, *seed_and_fold, row.metric)
        gain, low, high = _gain_over(predictions, row, of_baselines.get(key))
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


def is_tested(row: ResultRow) -> bool:
    """Return whether a row is the test result of a final trial."""
    return (
        row.trial_stage == "final"
        and row.split == "test"
        and bool(row.metric)
        and row.status == "done"
    )


def gain_over_scratch(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    one: Trial,
    against: Trial,
    row: ResultRow,
    records: dict[str, TrialRecord],
) -> dict[str, float]:
    theirs = next(
        (r.value for r in records[against.id].rows if r.split == "test" and r.metric == row.metric),
        None,
    )
    if theirs is None or row.value is None or row.metric is None:
        return {}
    found = _gain_over(predictions, row, replace(row, trial_folder=against.folder, value=theirs))
    names = ("gain", "gain_low", "gain_high")
    known = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    return {"scratch_value": theirs, **known}


def _gain_over(
    predictions: Callable[[str, int], stats.RunPredictions | None],
    row: ResultRow,
    other: ResultRow | None,
) -> matrix.Estimate:
    """Return (gain, low, high) of a trial's row over that of another trial with the same seed.

    What cannot be computed is None.
    """
    if other is None or row.value is None or other.value is None or row.metric is None:
        return None, None, None
    gain = (row.value - other.value) * (1 if row.higher_is_better else -1)
    if "/" in row.metric or "@" in row.metric:
        # of one label or subgroup: the report has its interval over all seeds
        return gain, None, None
    of = metric(row.metric)
    ours, theirs = (predictions(each.folder, each.seed) for each in (row, other))
    can_resample = of.units is not None or of.resampled is not None
    if not can_resample or ours is None or theirs is None:
        return gain, None, None
    return stats.gain(of, [ours], [theirs])
