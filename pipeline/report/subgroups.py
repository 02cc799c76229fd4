"""How well a target is predicted for parts of its test rows: by sex, age band, care unit. The parts
are columns of the rows (``Target.subgroups``).

Small parts tell little, and may tell of single people: one with fewer than 20 units (groups such as
patients, where they are declared) or without both classes is shown with its size alone, those with
fewer than 5 together, without their names. They are computed from the kept predictions: a column
more trains nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.data.manifest import Selection, read_columns
from pipeline.metrics import catalog
from pipeline.metrics.catalog import Metric, Predictions
from pipeline.report import per_label, stats
from pipeline.report.blocks import DASH, Block, Heading, Table, Text, Value, places
from pipeline.report.matrix import Cell
from pipeline.report.plots import cell_label
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

LEAST_UNITS, HIDDEN_BELOW, MOST_VALUES = 20, 5, 20
UNKNOWN = "not recorded"


def read(selection: Selection, columns: Sequence[str], place: str) -> dict[str, np.ndarray]:
    """Column to (n,) texts, its value for each row of the selection; of a struct's field,
    ``static.Gender``, under the field's own name.

    Raises ValueError for a column that is not there, holds lists, or has more than 20 different
    values; it tells no value.
    """
    out: dict[str, np.ndarray] = {}
    for name in columns:
        root, *fields = name.split(".") if name not in selection.manifest.schema.names else [name]
        if root not in selection.manifest.schema.names:
            raise ValueError(
                f"{place}: the test rows have no column {root!r}; columns are "
                f"{', '.join(selection.manifest.schema.names)}"
            )
        values, at = read_columns(selection, [root])[root], root
        for field in fields:
            if not pa.types.is_struct(values.type) or values.type.get_field_index(field) < 0:
                raise ValueError(f"{place}: {at} has no field {field!r}; it holds {values.type}")
            values, at = pc.struct_field(values, field), f"{at}.{field}"
        if pa.types.is_nested(values.type):
            raise ValueError(
                f"{place}: {name} holds {values.type}; a subgroup is one text or number a row "
                f"(of a struct name the field: {name}.FIELD)"
            )
        texts = np.array(
            [UNKNOWN if value is None else str(value) for value in values.to_pylist()], dtype=object
        )
        if (many := len(set(texts))) > MOST_VALUES:
            raise ValueError(
                f"{place}: {name} has {many} different values among the test rows, and a table "
                f"of subgroups takes {MOST_VALUES}: give a column of "
                "bands or kinds"
            )
        if at.rpartition(".")[2] in out:
            raise ValueError(f"{place}: {at.rpartition('.')[2]} stands twice")
        out[at.rpartition(".")[2]] = texts
    return out


def with_subgroups(
    run: RunPredictions, selection: Selection, found: dict[str, np.ndarray]
) -> RunPredictions:
    """The run with what ``read`` gave of its rows."""
    where = np.searchsorted(selection.ids(np.arange(len(selection))), run.rows)
    return replace(run, subgroups={name: texts[where] for name, texts in found.items()})


# ---------------------------------------------------------------- parts


@dataclass(frozen=True)
class Subgroup:
    """Some test rows: ``where`` (n,) bool, ``units`` how many groups or rows, ``positives`` where
    there are two classes.
    """

    name: str
    where: np.ndarray
    units: int
    positives: int | None
    scored: bool


def split_by_subgroup(run: RunPredictions, of: Metric) -> list[Subgroup]:
    """Every value of every column, by its name; those that fewer than 5 units have stand together
    without theirs, with the smallest others where they would be fewer than 5 still. ``scored``: it
    has enough units, and the metric a value.
    """
    out = []
    for column, texts in run.subgroups.items():
        found = sorted(
            (_subgroup(f"{column}={value}", texts == value, run, of) for value in set(texts)),
            key=lambda part: (part.units, part.name),
        )
        small, where = 0, np.zeros(len(texts), dtype=bool)
        while small < len(found) and (
            found[small].units < HIDDEN_BELOW or (small and _units(run, where) < HIDDEN_BELOW)
        ):
            where = where | found[small].where
            small += 1
        out += sorted(found[small:], key=lambda part: part.name)
        out += [_subgroup(f"{column}: others", where, run, of)] if small else []
    return out


def _units(run: RunPredictions, where: np.ndarray) -> int:
    return int(where.sum()) if run.groups is None else len(np.unique(run.groups[where]))


def _subgroup(name: str, where: np.ndarray, run: RunPredictions, of: Metric) -> Subgroup:
    p = _masked(run.predictions, where)
    units = _units(run, where)
    label = p["label"] if "label" in p and p.get("scores", np.zeros(0)).shape[-1] == 2 else None
    both = label is None or ((label == 1).any() and (label == 0).any())
    return Subgroup(
        name,
        where,
        units,
        None if label is None else int((label == 1).sum()),
        bool(units >= LEAST_UNITS and both and _has_value(of, p)),
    )


def _has_value(of: Metric, p: Predictions) -> bool:
    try:
        return bool(np.isfinite(of.value(p)))
    except ValueError:  # no label has the positives that a macro average asks for
        return False


def _masked(p: Predictions, where: np.ndarray) -> Predictions:
    return {name: array[where] for name, array in p.items()}


def select_subgroup(run: RunPredictions, where: np.ndarray) -> RunPredictions:
    """The run with those rows alone."""
    return RunPredictions(
        run.rows[where],
        _masked(run.predictions, where),
        run.seed,
        None if run.groups is None else run.groups[where],
        run.labels,
    )


# ---------------------------------------------------------------- results rows


def result_rows(run: RunPredictions, row: ResultRow) -> list[ResultRow]:
    """A results row for each part that is scored: ``auroc@sex=female`` of the primary metric's
    ``row``.
    """
    of = catalog.metric(row.metric or "")
    out: list[ResultRow] = []
    for part in split_by_subgroup(run, of):
        if part.scored:
            mine = select_subgroup(run, part.where)
            low, high = stats.interval(of, mine.predictions, groups=mine.groups)
            out.append(
                replace(
                    row,
                    gain=None,
                    gain_low=None,
                    gain_high=None,
                    scratch_value=None,
                    metric=f"{row.metric}@{part.name}",
                    value=of.value(mine.predictions),
                    value_low=low,
                    value_high=high,
                    n_eval=len(mine.rows),
                    n_units=part.units,
                )
            )
    return out


# ---------------------------------------------------------------- the report


def blocks(
    target: str, done: Sequence[Cell], rows: Sequence[ResultRow], runs: dict[str, RunPredictions]
) -> list[Block]:
    """Of the best finished cell with a source, beside scratch. Nothing where no subgroups were
    named, or test predictions are not at hand.
    """
    picked = per_label.best_cell(done, rows, runs)
    if picked is None or not all(run.subgroups for run in picked[1]):
        return []
    best, ours, scratch = picked
    of = catalog.metric(best.metric)
    every = _subgroup("all test rows", np.ones(len(ours[0].rows), dtype=bool), ours[0], of)
    shown = [every, *split_by_subgroup(ours[0], of)]
    paired = (
        bool(scratch)
        and bool({run.seed for run in ours} & {run.seed for run in scratch})
        and all(_alike(run, ours[0]) for run in scratch)
    )
    if not all(_alike(run, ours[0]) for run in ours):
        return []
    means = {
        part.name: _means(of, part, ours, scratch if paired else [])
        for part in shown
        if part.scored or part is every
    }
    digits = places([(found[0][1], found[0][2]) for found in means.values()])
    unit = "Test rows" if ours[0].groups is None else "Test groups"
    head = [
        "Subgroup",
        unit,
        *(["Positives"] if every.positives is not None else []),
        best.metric,
        *([f"{best.metric}, scratch", "gain"] if paired else []),
    ]
    body: list[list[str | Value]] = []
    for part in shown:
        line: list[str | Value] = [part.name, _size(part.units)]
        found = means.get(part.name, [])
        line += [_size(part.positives) if found else DASH] if part.positives is not None else []
        line += (
            [per_label.estimate(one, digits) for one in found]
            if found
            else [DASH] * (2 if paired else 1)
        )
        if paired:
            line.append(_gain(of, part, ours, scratch, digits) if found else DASH)
        body.append(line)
    said = (
        f"{target}: {cell_label(best)} of labels{' beside scratch' if paired else ''}, "
        f"{best.metric} with 95 % intervals. A subgroup with fewer than "
        f"{LEAST_UNITS} {unit.lower()}, or without both classes, is not "
        f"scored.{per_label.SIGNS if paired else ''}"
    )
    return [Heading("Subgroups", 3), Text(said), Table(head, body)]


def _alike(run: RunPredictions, other: RunPredictions) -> bool:
    return np.array_equal(run.rows, other.rows)


def _means(
    of: Metric, part: Subgroup, ours: list[RunPredictions], scratch: list[RunPredictions]
) -> list[tuple[float, float, float]]:
    """The mean of ours, and where there is scratch, that of scratch, on the rows of a part."""
    sides = [[select_subgroup(run, part.where) for run in side] for side in (ours, scratch) if side]
    return [stats.mean_interval(of, side) for side in sides]


def _gain(
    of: Metric,
    part: Subgroup,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
    digits: int,
) -> Value | str:
    """A table cell of the gain of ours over scratch on the rows of a part."""
    mine, theirs = ([select_subgroup(run, part.where) for run in side] for side in (ours, scratch))
    enough = all(stats.evidence(run).enough for run in (*mine, *theirs))
    return per_label.gain_estimate(stats.compare(of, mine, theirs), digits, enough)


def _size(count: int | None) -> str:
    return (
        DASH if count is None else f"<{HIDDEN_BELOW}" if 0 < count < HIDDEN_BELOW else f"{count:,}"
    )
