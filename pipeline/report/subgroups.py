"""Metrics of a target for subgroups of its test rows, such as sex, age band or care unit.

The subgroups are the values of columns of the rows (``Target.subgroups``). They are computed from
the kept predictions, so naming another column trains nothing again.

A small subgroup gives a useless estimate and may reveal something about a single person. One with
fewer than 20 units (rows, or groups such as patients where they are declared) or without both
classes is shown with its size only. Those with fewer than 5 units are shown together, without
their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.groups import count_units
from pipeline.core.metrics import catalog
from pipeline.core.metrics.catalog import Metric, Predictions
from pipeline.data.manifests import Selection, read_columns
from pipeline.report import per_label, stats
from pipeline.report.blocks import DASH, Block, Heading, Table, Text, Value, decimal_places
from pipeline.report.matrix import MatrixEntry
from pipeline.report.plots import entry_label
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

MIN_UNITS, HIDDEN_BELOW, MAX_VALUES = 20, 5, 20
UNKNOWN = "not recorded"


def read(selection: Selection, columns: Sequence[str], job_field: str) -> dict[str, np.ndarray]:
    """Read the subgroup columns of a selection.

    Args:
        selection: The test rows.
        columns: Names of columns. The field of a struct is named with dots, ``static.Gender``.
        job_field: Where the columns are named, for error messages.

    Returns:
        Column, or the field's own name, to (n,) texts, one for each row.

    Raises:
        ValueError: A column is missing, holds lists, or has more than 20 different values. The
            message contains no value of a row.
    """
    out: dict[str, np.ndarray] = {}
    for name in columns:
        root, *fields = name.split(".") if name not in selection.manifest.schema.names else [name]
        if root not in selection.manifest.schema.names:
            raise ValueError(
                f"{job_field}: the test rows have no column {root!r}; columns are "
                f"{', '.join(selection.manifest.schema.names)}"
            )
        values, at = read_columns(selection, [root])[root], root
        for field in fields:
            if not pa.types.is_struct(values.type) or values.type.get_field_index(field) < 0:
                raise ValueError(
                    f"{job_field}: {at} has no field {field!r}; it holds {values.type}"
                )
            values, at = pc.struct_field(values, field), f"{at}.{field}"
        if pa.types.is_nested(values.type):
            raise ValueError(
                f"{job_field}: {name} holds {values.type}; a subgroup is one text or number a row "
                f"(of a struct name the field: {name}.FIELD)"
            )
        texts = np.array(
            [UNKNOWN if value is None else str(value) for value in values.to_pylist()], dtype=object
        )
        if (many := len(set(texts))) > MAX_VALUES:
            raise ValueError(
                f"{job_field}: {name} has {many} different values among the test rows, and a table "
                f"of subgroups takes {MAX_VALUES}: give a column of "
                "bands or kinds"
            )
        if at.rpartition(".")[2] in out:
            raise ValueError(f"{job_field}: {at.rpartition('.')[2]} is named twice")
        out[at.rpartition(".")[2]] = texts
    return out


def with_subgroups(
    run: RunPredictions, selection: Selection, texts_of_column: dict[str, np.ndarray]
) -> RunPredictions:
    """Return the run with the subgroup values that ``read`` returned, in the order of its rows."""
    where = np.searchsorted(selection.all_ids, run.rows)
    return replace(run, subgroups={name: texts[where] for name, texts in texts_of_column.items()})


# ---------------------------------------------------------------- parts


@dataclass(frozen=True)
class Subgroup:
    """A part of the test rows.

    ``where`` (n,) bool selects its rows and ``units`` is the number of its groups or rows.
    ``positives`` is the number of positive rows where there are two classes. ``scored`` is whether
    a metric is shown for it.
    """

    name: str
    where: np.ndarray
    units: int
    positives: int | None
    scored: bool


def split_by_subgroup(run: RunPredictions, metric: Metric) -> list[Subgroup]:
    """Return a subgroup for each value of each subgroup column.

    Values with fewer than 5 units are merged into one subgroup without their names. Where these
    have fewer than 5 units together, the next smallest ones are merged with them. A subgroup is
    ``scored`` when it has enough units and the metric has a value on it.
    """
    out: list[Subgroup] = []
    for column, texts in run.subgroups.items():
        of_column = sorted(
            (_subgroup(f"{column}={value}", texts == value, run, metric) for value in set(texts)),
            key=lambda subgroup: (subgroup.units, subgroup.name),
        )
        small, where = 0, np.zeros(len(texts), dtype=bool)
        while small < len(of_column) and (
            of_column[small].units < HIDDEN_BELOW
            or (small and count_units(where, run.groups) < HIDDEN_BELOW)
        ):
            where = where | of_column[small].where
            small += 1
        out += sorted(of_column[small:], key=lambda subgroup: subgroup.name)
        out += [_subgroup(f"{column}: others", where, run, metric)] if small else []
    return out


def _subgroup(name: str, where: np.ndarray, run: RunPredictions, metric: Metric) -> Subgroup:
    p = _select_rows(run.predictions, where)
    units = count_units(where, run.groups)
    is_binary = "label" in p and "scores" in p and p["scores"].shape[-1] == 2
    label = p["label"] if is_binary else None
    both = label is None or ((label == 1).any() and (label == 0).any())
    return Subgroup(
        name,
        where,
        units,
        None if label is None else int((label == 1).sum()),
        bool(units >= MIN_UNITS and both and _has_value(metric, p)),
    )


def _has_value(metric: Metric, p: Predictions) -> bool:
    try:
        return bool(np.isfinite(metric.value(p)))
    except ValueError:  # no label has as many positives as a macro average needs
        return False


def _select_rows(p: Predictions, where: np.ndarray) -> Predictions:
    return {name: array[where] for name, array in p.items()}


def select_subgroup(run: RunPredictions, where: np.ndarray) -> RunPredictions:
    """Return the run with only the rows ``where``, (n,) bool, is true."""
    return RunPredictions(
        run.rows[where],
        _select_rows(run.predictions, where),
        run.seed,
        None if run.groups is None else run.groups[where],
        run.labels,
    )


# ---------------------------------------------------------------- results rows


def result_rows(run: RunPredictions, row: ResultRow) -> list[ResultRow]:
    """Return a results row for each scored subgroup, made from the ``row`` of the primary metric.

    The metric of such a row is named ``auroc@sex=female``.
    """
    metric = catalog.metric(row.metric or "")
    out: list[ResultRow] = []
    for subgroup in split_by_subgroup(run, metric):
        if subgroup.scored:
            selected = select_subgroup(run, subgroup.where)
            low, high = stats.interval(metric, selected.predictions, groups=selected.groups)
            out.append(
                replace(
                    row,
                    gain=None,
                    gain_low=None,
                    gain_high=None,
                    scratch_value=None,
                    metric=f"{row.metric}@{subgroup.name}",
                    value=metric.value(selected.predictions),
                    value_low=low,
                    value_high=high,
                    n_eval=len(selected.rows),
                    n_units=subgroup.units,
                )
            )
    return out


# ---------------------------------------------------------------- the report


def subgroup_blocks(
    target: str,
    done: Sequence[MatrixEntry],
    runs: Mapping[str, RunPredictions],
) -> list[Block]:
    """Return the table of subgroups for the best finished entry with a source, and for scratch.

    Returns no block where no subgroups were named or test predictions are missing.
    """
    compared = per_label.best_entry(done, runs)
    if compared is None or not all(run.subgroups for run in compared[1]):
        return []
    best, ours, scratch = compared
    metric = catalog.metric(best.metric)
    everyone = _subgroup(
        "all test rows",
        np.ones(len(ours[0].rows), dtype=bool),
        ours[0],
        metric,
    )
    shown = [everyone, *split_by_subgroup(ours[0], metric)]
    if not all(np.array_equal(run.rows, ours[0].rows) for run in ours):
        return []
    paired = per_label.have_common_seed(ours, scratch) and all(
        np.array_equal(run.rows, ours[0].rows) for run in scratch
    )
    selected: dict[str, list[RunPredictions]] = {}
    comparisons: dict[str, per_label.Comparison] = {}
    for subgroup in shown:
        if subgroup.scored or subgroup is everyone:
            of_ours = [select_subgroup(run, subgroup.where) for run in ours]
            of_scratch = [select_subgroup(run, subgroup.where) for run in scratch if paired]
            selected[subgroup.name] = of_ours + of_scratch
            comparisons[subgroup.name] = per_label.compare(metric, of_ours, of_scratch)
    digits = decimal_places([comparison.bounds[0] for comparison in comparisons.values()])
    unit = "Test rows" if ours[0].groups is None else "Test groups"
    head = [
        "Subgroup",
        unit,
        *(["Positives"] if everyone.positives is not None else []),
        best.metric,
        *([f"{best.metric}, scratch", "gain"] if paired else []),
    ]
    body: list[list[str | Value]] = []
    for subgroup in shown:
        line: list[str | Value] = [subgroup.name, format_size(subgroup.units)]
        if subgroup.name in comparisons:
            if subgroup.positives is not None:
                line.append(format_size(subgroup.positives))
            of_runs = selected[subgroup.name]
            enough = all(stats.evidence(run, metric.name).enough for run in of_runs)
            line += comparisons[subgroup.name].cells(digits, enough, best)
        body.append(line + [DASH] * (len(head) - len(line)))
    caption = (
        f"{target}: {entry_label(best)} of labels{' and scratch' if paired else ''}, "
        f"{best.metric} with 95 % intervals. A subgroup with fewer than "
        f"{MIN_UNITS} {unit.lower()}, or without both classes, is not "
        f"scored.{per_label.GAIN_LEGEND if paired else ''}"
    )
    return [Heading("Subgroups", 3), Text(caption), Table(head, body)]


def format_size(count: int | None) -> str:
    if count is None:
        return DASH
    return f"<{HIDDEN_BELOW}" if 0 < count < HIDDEN_BELOW else f"{count:,}"
