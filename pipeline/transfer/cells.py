"""The matrix sources x targets x techniques x label fractions: one cell for the seeds of each, with its gain over scratch."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.transfer import results, stats
from pipeline.transfer.stats import Run

Row = dict[str, Any]
Estimate = tuple[float | None, float | None, float | None]
"""(middle, low, high)."""

SCRATCH = "none"
"""The source of trials that start from random weights: what the others of their backbone, target and label fraction are held against."""

BOOTSTRAP = "95 % paired bootstrap over test units and seeds"
BOOTSTRAP_GROUPS = "95 % paired bootstrap over test groups and seeds"
ONE_SEED = "one seed: its spread is unknown"
T_INTERVAL = "95 % Student's t over seeds (test predictions not at hand)"

WINS, LOSES, EVEN = "wins", "loses", "no difference"
REFERENCE, FAILED, UNCOMPARED = "reference", "failed", "not compared"


@dataclass(frozen=True)
class Cell:
    """The final trials of one (source, backbone, target, technique, label fraction), on the test split.

    ``mean [low, high]`` is the primary metric over seeds; ``gain [gain_low, gain_high]`` is positive when better than scratch,
    whatever the metric's direction. What could not be computed is None. ``verdict``: "wins" or "loses" where the gain's
    interval excludes zero, else "no difference"; "reference" for scratch, "failed" without a finished trial, "not compared"
    without scratch to compare with, or without an interval. ``interval`` says how both intervals were made.
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
    made: str = ""
    """Where its trials were made by other code or versions than those of now, or by different ones: how it is marked (`transfer.origins`)."""


def cells(rows: list[Row], runs: dict[str, Run]) -> list[Cell]:
    """One Cell for each (source, backbone, target, technique, label fraction) of ``rows``, which are results rows.

    ``runs`` maps trial ids to test predictions. Where those of a cell or of its scratch are missing, its intervals are
    Student's t over seeds, and ``interval`` says so. A cell whose trials all failed, in search or finally, is there too.
    Sorted by target, label fraction, then gain with the largest first (scratch stands at zero, what has no gain comes last).
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in results.filled(rows):
        groups[cell_key(row)].append(row)
    trials = {key: found for key, group in groups.items() if (found := _final_trials(group)) is not None}
    out = []
    for key, (done, failed) in trials.items():
        source, backbone, target, _, fraction = key
        scratch = next((t[0] for k, t in trials.items() if k[0] == SCRATCH and k[3] == "scratch" and (k[1], k[2], k[4]) == (backbone, target, fraction)), [])
        out.append(_cell(key, done, failed, [] if source == SCRATCH else scratch, runs, groups[key]))
    return sorted(out, key=_order)


def fraction_order(label_fraction: str) -> tuple[int, float, str]:
    """Sort key of label fractions: rows per class or rows alone first, then shares, each from small to large."""
    number = label_fraction.removesuffix("/class").removesuffix(" rows")
    try:
        return int(number == label_fraction), float(number), label_fraction
    except ValueError:
        return 2, 0.0, label_fraction


def cell_key(row: Row) -> tuple[str, str, str, str, str]:
    """(source, backbone, target, technique with its options, label fraction) of a results row."""
    source, backbone, target, fraction = (str(row.get(n) or "") for n in ("source", "backbone", "target", "label_fraction"))
    return source, backbone, target, results.technique(row) if row.get("technique") else "", fraction


def _order(cell: Cell) -> tuple:
    gain = cell.gain if cell.gain is not None else 0.0 if cell.verdict == REFERENCE else -math.inf
    return cell.target, fraction_order(cell.label_fraction), -gain, cell.verdict == REFERENCE, cell.source, cell.backbone, cell.technique


def _final_trials(group: list[Row]) -> tuple[list[Row], int] | None:
    """(the primary test row of each finished final trial, how many failed); None for a cell that has no final trial yet.

    A cell whose search trials all failed has no final trials, and still counts: they are its failures.
    """
    final = [row for row in group if row["trial_stage"] == "final"]
    primary: dict[str, Row] = {}
    for row in final:
        if row["status"] == "done" and row["split"] == "test" and row["metric"]:
            primary.setdefault(row["trial_id"], row)
    failed = {row["trial_id"] for row in final if row["status"] == "failed"} - set(primary)
    if not final and all(row["status"] != "done" for row in group):
        failed = {row["trial_id"] for row in group if row["status"] == "failed"}
    return (list(primary.values()), len(failed)) if primary or failed else None


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def _whole(rows: list[Row], name: str) -> int | None:
    mean = _mean(rows, name)
    return None if mean is None else round(mean)


def _finite(values: Estimate) -> Estimate:
    middle, low, high = (float(v) if v is not None and math.isfinite(v) else None for v in values)
    return middle, low, high


def _cell(key: tuple, done: list[Row], failed: int, scratch: list[Row], runs: dict[str, Run], group: list[Row]) -> Cell:
    source, backbone, target, technique, fraction = key
    first = done[0] if done else group[0]
    name = done[0]["metric"] if done else next((row["metric"] for row in group if row["metric"]), "")
    done = [row for row in done if row["metric"] == name]
    scratch = [row for row in scratch if row["metric"] == name]
    higher = bool(first.get("higher_is_better")) if done else True
    value, gain, how = _estimates(name, higher, done, scratch, runs)
    if not done:
        verdict = FAILED
    elif source == SCRATCH and technique == "scratch":
        verdict = REFERENCE
    elif gain[1] is None or gain[2] is None:
        verdict = UNCOMPARED
    else:
        verdict = WINS if gain[1] > 0 else LOSES if gain[2] < 0 else EVEN
    return Cell(
        source=source, backbone=backbone, target=target, technique=technique, label_fraction=fraction, metric=name, higher_is_better=higher,
        n_seeds=len(done), n_failed=failed, mean=value[0], low=value[1], high=value[2], gain=gain[0], gain_low=gain[1], gain_high=gain[2],
        seconds=_mean(done, "seconds"), params_trained=_whole(done, "params_trained"), n_train=_whole(done, "n_train"), n_test=_whole(done, "n_eval"),
        hyper_parameters=first.get("hyper_parameters") or "{}", verdict=verdict, interval=how)


def _estimates(name: str, higher: bool, done: list[Row], scratch: list[Row], runs: dict[str, Run]) -> tuple[Estimate, Estimate, str]:
    """((mean, low, high), (gain, low, high), how): from predictions where all are at hand, else over seeds."""
    none: Estimate = (None, None, None)
    if not done:
        return none, none, ""
    metric = metrics.METRICS.get(name)
    ours = [runs[row["trial_id"]] for row in done if row["trial_id"] in runs]
    theirs = [runs[row["trial_id"]] for row in scratch if row["trial_id"] in runs]
    if metric is not None and len(ours) == len(done) and len(theirs) == len(scratch):
        try:
            value = stats.mean_interval(metric, ours)
            gain = stats.gain(metric, ours, theirs) if theirs and _seeds(done) & _seeds(scratch) else none
            return _finite(value), _finite(gain), _how(ours, theirs)
        except (KeyError, ValueError) as error:  # predictions without what the metric reads, or rows that cannot be paired
            why = f"{T_INTERVAL}: {error}"
    else:
        why = T_INTERVAL
    by_seed = {row["seed"]: row["value"] for row in scratch if row["value"] is not None}
    middle, *ends = stats.t_interval([row["value"] for row in done if row["value"] is not None])
    value = (middle, *np.clip(ends, *(metric.bounds if metric else (-math.inf, math.inf))))
    sign = 1 if higher else -1
    differences = [sign * (row["value"] - by_seed[row["seed"]]) for row in done if row["value"] is not None and row["seed"] in by_seed]
    gain = _finite(stats.t_interval(differences)) if differences else none
    if len(done) == 1:
        return (_finite(value)[0], done[0].get("value_low"), done[0].get("value_high")), gain, ONE_SEED
    return _finite(value), gain, why


def _seeds(rows: list[Row]) -> set:
    return {row["seed"] for row in rows}


def _how(ours: list[Run], theirs: list[Run]) -> str:
    everyone = [*ours, *theirs]
    how = BOOTSTRAP_GROUPS if all(run.groups is not None for run in everyone) else BOOTSTRAP
    most, common = max(len(run.rows) for run in everyone), len(stats.common_rows(everyone))
    if common < most:
        how += f", on the {common} of {most} rows that all of them have"
    return f"{how}; {ONE_SEED}" if len(ours) == 1 else how
