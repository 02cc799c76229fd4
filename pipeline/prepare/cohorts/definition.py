"""Definition of a cohort: which rows of events belong to it, up to which hour their events may be
seen, and their labels.

Rows of events (one an ICU stay, a machine): `entity`, `patient`, `times` (list<float32>, hours
since the entity's start), `variables` (list<string>), `values` (list<float32>), `events` (int32),
`static` (struct of what is known at the start), and outcomes, of which labels are made. `select`
returns inputs from before the prediction time, labels and subgroups, and no outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.config.registry import Options
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import floats, joined
from pipeline.prepare.engine.importing import first_reason

EPS = 1e-6
"""Hours; tolerance of comparisons, as in Harutyunyan et al. 2019."""
KEPT = (
    "entity",
    "patient",
    "hospital",
    "times",
    "variables",
    "values",
    "events",
    "static",
    "split",
)
LISTS = ("times", "variables", "values")
UNSEEN = "no events in the window"
ADULT = 18
AGE_BOUNDS = (18, 45, 65, 80)
AGE_BANDS = ("0-17", "18-44", "45-64", "65-79", "80+")
"""Names of the bands between these ages."""
BENCHMARK = {
    "static.Age": "age at admission, as the benchmark has adults alone",
    "transfers": "moved between ICUs, which the benchmark leaves out",
    "stays_in_admission": "ICU stays of the admission, of which the benchmark has but one",
}
"""Columns that `benchmark_exclusions` reads, and what for."""


class CohortDefinition(ABC):
    """Base class: one cohort and its labels. Example: `mortality`.

    Its methods take a pyarrow table of B rows of events and are vectorised over it; no row may
    depend on a later one. `label`: the column of `labels` that the summary counts.
    """

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    label: str = "label"

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    @abstractmethod
    def needs(self, names: list[str]) -> dict[str, str]:
        """Return the columns that it reads (`static.Age` for a field of `static`), and what for.

        `names`: those that there are.
        """

    @abstractmethod
    def include(self, table: pa.Table) -> np.ndarray:
        """Return (B,) objects: "", or why the row does not belong (`reasons` makes them).

        The reason must not hold a value of the row.
        """

    @abstractmethod
    def window(self, table: pa.Table) -> np.ndarray:
        """Return (B,) float64, the hour up to which (inclusive) events are inputs: the last
        prediction time.

        Ignored for rows that do not belong.
        """

    @abstractmethod
    def labels(self, table: pa.Table) -> dict[str, pa.Array]:
        """Return the label columns of rows that belong; even an empty table has their types."""


class BenchmarkCohort(CohortDefinition):
    """A cohort that can leave out what Harutyunyan et al. 2019 leave out (`BenchmarkOptions`).

    A subclass has `own_needs` and `own_reasons` in place of `needs` and `include`.
    """

    @abstractmethod
    def own_needs(self, names: list[str]) -> dict[str, str]:
        """Return what `needs` returns, without what the exclusions need."""

    @abstractmethod
    def own_reasons(self, table: pa.Table) -> list[tuple[np.ndarray, str]]:
        """Return masks (B,) of rows that do not belong, each with the reason."""

    def excludes(self, names: list[str]) -> bool:
        """Return whether the exclusions apply to rows with columns of these names."""
        return self.options.exclude == "benchmark"

    def needs(self, names: list[str]) -> dict[str, str]:
        return self.own_needs(names) | (BENCHMARK if self.excludes(names) else {})

    def include(self, table: pa.Table) -> np.ndarray:
        exclusions = benchmark_exclusions(table) if self.excludes(table.column_names) else []
        return reasons(len(table), *exclusions, *self.own_reasons(table))


# ---------------------------------------------------------------- selection


def select(
    definition: CohortDefinition,
    table: pa.Table,
    history: bool = True,
) -> tuple[pa.Table, np.ndarray]:
    """Return (rows of the cohort, (B,) objects: "" or why a row of `table` is left out).

    The rows have inputs up to the window, labels and subgroups. `history`: keep events from before
    the entity's start. Raises ValueError for a definition whose window or labels do not fit.
    """
    why = definition.include(table)
    window = definition.window(table)
    if not np.isfinite(window[why == ""]).all():
        raise ValueError(
            f"cohort {definition.registered_name} gives no window for rows that it includes; "
            "let include() leave them out"
        )
    cut, seen = truncate_events(table, np.where(why == "", window, -np.inf), history)
    why = np.where((why == "") & (seen == 0), UNSEEN, why)
    kept = cut.filter(pa.array(why == ""))
    made = {**definition.labels(kept), **subgroups(kept)}
    for name, column in made.items():
        if len(column) != len(kept) or pa.types.is_null(column.type) or name in KEPT:
            raise ValueError(
                f"cohort {definition.registered_name}: its column {name} is {column.type} of "
                f"{len(column)} rows, where there are {len(kept)}; it must have a type and a name "
                f"other than {', '.join(KEPT)}"
            )
    columns = {name: kept[name] for name in KEPT if name in kept.column_names}
    return pa.table({**columns, **made}), why


def truncate_events(
    table: pa.Table,
    window: np.ndarray,
    history: bool = True,
) -> tuple[pa.Table, np.ndarray]:
    """Drop events after the window: (the table, (B,) number of events between start and window)."""
    # as float32, an event at the very end of the window may stand after it
    end = np.maximum(window + EPS, window.astype(np.float32))
    lists = {name: column_array(table, name) for name in LISTS}
    row = rows_of(lists["times"])
    times = floats(lists["times"].flatten(), np.float64)
    early = times <= end[row]
    seen = np.bincount(row[early & (times > -EPS)], minlength=len(table))
    keep = early if history else early & (times > -EPS)
    counts = np.bincount(row[keep], minlength=len(table))
    offsets, mask = pa.array(offsets_of(counts), pa.int32()), pa.array(keep)
    for name, column in lists.items():
        table = table.set_column(
            table.column_names.index(name),
            name,
            pa.ListArray.from_arrays(offsets, column.flatten().filter(mask)),
        )
    events = pa.array(counts, pa.int32())
    if "events" not in table.column_names:
        return table.append_column("events", events), seen
    return table.set_column(table.column_names.index("events"), "events", events), seen


def invalid_row_reasons(table: pa.Table) -> np.ndarray:
    """Return (B,) objects: "", or why a row is no row of events (without a value of it)."""
    lengths = [arrow_lists.lengths(column_array(table, name)) for name in LISTS]
    times = column_array(table, "times")
    has_no_time = np.zeros(len(table), dtype=bool)
    has_no_time[rows_of(times)[~np.isfinite(floats(times.flatten(), np.float64))]] = True
    empty = np.asarray(column_array(table, "entity").is_null())
    shortest, longest = np.min(lengths, axis=0), np.max(lengths, axis=0)
    unsplit = (
        np.asarray(column_array(table, "split").is_null())
        if "split" in table.column_names
        else np.zeros(len(table), dtype=bool)
    )
    return reasons(
        len(table),
        (empty, "no entity"),
        (unsplit, "no split"),
        (shortest < 0, "no times, variables or values"),
        (shortest != longest, "times, variables and values of different lengths"),
        (has_no_time, "a time that is no number"),
    )


# ---------------------------------------------------------------- columns


def column_array(table: pa.Table, name: str) -> Any:
    """Return a column (`static.Age` for a field of a struct) as one array."""
    outer, _, inner = name.partition(".")
    column = joined(table[outer])
    return pc.struct_field(column, inner) if inner else column


def names_of(schema: pa.Schema) -> list[str]:
    """Return all columns, and fields of structs as static.Age."""
    names: list[str] = []
    for field in schema:
        inner = list(field.type) if pa.types.is_struct(field.type) else []
        names += [field.name, *(f"{field.name}.{one.name}" for one in inner)]
    return names


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of numbers or bools as (B,) float64, NaN where it is null.

    Raises ValueError for other columns.
    """
    column = column_array(table, name)
    try:
        return floats(column.cast(pa.float64()), np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(f"column {name} is {column.type}, no number; give numbers") from None


def rows_of(column: Any) -> np.ndarray:
    """Return the row of each value of all lists."""
    return pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Return the offsets (B + 1,) of lists of lengths (B,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def list_array(counts: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return (B,) lists of `counts` values each, taken in order from `values`."""
    return pa.ListArray.from_arrays(
        pa.array(offsets_of(counts), pa.int32()), pa.array(values, kind)
    )


def plain_code(code: str) -> str:
    """Return an ICD code without its dot and in upper case."""
    return code.strip().replace(".", "").upper()


def labels_of_codes(column: Any, label_of: Callable[[str], str]) -> pa.Array:
    """Return (B,) lists of the distinct labels of each row's codes, sorted.

    Args:
        column: (B,) lists of codes.
        label_of: Returns the label of a code, "" for none.
    """
    codes, distinct = arrow_lists.dictionary_codes(column.flatten())
    of_codes = [label_of(code) for code in distinct.to_pylist()]
    labels = sorted({"", *of_codes})
    place = np.array([*map(labels.index, of_codes), 0])[codes]  # code -1, no code, is the last one
    pairs = np.unique(rows_of(column)[place > 0] * len(labels) + place[place > 0])
    counts = np.bincount(pairs // len(labels), minlength=len(column))
    return list_array(counts, np.array(labels)[pairs % len(labels)], pa.string())


# ---------------------------------------------------------------- what definitions share


def reasons(rows: int, *pairs: tuple[np.ndarray, str]) -> np.ndarray:
    """Return (rows,) objects: the reason of the first mask that holds, or ""."""
    return first_reason((np.zeros(rows, dtype=bool), ""), *pairs).astype(object)


def stay_hours(names: list[str]) -> str:
    """Return the column with the length of the stay: in intensive care, else in the hospital."""
    no_icu = "icu_hours" not in names and "discharge_hours" in names
    return "discharge_hours" if no_icu else "icu_hours"


def benchmark_exclusions(table: pa.Table) -> list[tuple[np.ndarray, str]]:
    """Return what Harutyunyan et al. 2019 leave out, as masks (B,) with reasons.

    They leave out moves between ICUs, admissions of several ICU stays, and children.
    """
    age, stays = numbers(table, "static.Age"), numbers(table, "stays_in_admission")
    return [
        (numbers(table, "transfers") != 0, "moved between ICUs, or not known"),
        (stays != 1, "several ICU stays in the admission, or not known"),
        (np.isnan(age), "age unknown"),
        (age < ADULT, "younger than 18"),
    ]


def first_event(table: pa.Table) -> np.ndarray:
    """Return (B,) hours of the first event at or after the start; inf where there is none."""
    times = column_array(table, "times")
    hours, row = floats(times.flatten(), np.float64), rows_of(times)
    out = np.full(len(table), np.inf)
    np.minimum.at(out, row[hours > -EPS], hours[hours > -EPS])
    return out


def prediction_hours(
    after: np.ndarray,
    first: float,
    last: np.ndarray,
    every: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the hours at which predictions are made: ((B,) how many, all of them in order).

    They are the multiples of `every` from `first` to `last` (B,), inclusive, that are later than
    the first event, `after` (B,). A row has none where either bound is not finite.
    """
    fine = np.isfinite(after) & np.isfinite(last)
    later_than_after = np.floor(np.where(fine, after, 0.0) / every) + 1
    low = np.maximum(np.ceil(first / every - EPS), later_than_after)
    high = np.floor(np.where(fine, last, -1.0) / every + EPS)
    counts = np.where(fine, np.maximum(high - low + 1, 0), 0).astype(np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return counts, (np.repeat(low, counts) + within) * every


def last_hour(counts: np.ndarray, hours: np.ndarray) -> np.ndarray:
    """Return (B,) the last of each row's hours of `prediction_hours`; NaN where it has none."""
    out, has_hours = np.full(len(counts), np.nan), counts > 0
    out[has_hours] = hours[np.cumsum(counts)[has_hours] - 1]
    return out


# ---------------------------------------------------------------- subgroups


def subgroups(table: pa.Table) -> dict[str, pa.Array]:
    """Return the known columns of subgroups as texts: sex, age_band, care_unit, dbsource."""
    out: dict[str, pa.Array] = {}
    names = names_of(table.schema)
    if "static.Gender" in names:
        out["sex"] = column_array(table, "static.Gender").cast(pa.string())
    if "static.Age" in names:
        age = numbers(table, "static.Age")
        is_known = age >= 0
        band = np.searchsorted(AGE_BOUNDS, np.where(is_known, age, 0), side="right")
        out["age_band"] = pa.array(
            np.array(AGE_BANDS)[band],
            pa.string(),
            mask=~is_known,
        )
    for name, columns in (
        ("care_unit", ("care_unit", "static.CareUnit")),
        ("dbsource", ("dbsource", "static.Source")),
    ):
        column = next((column for column in columns if column in names), None)
        if column is not None:
            out[name] = column_array(table, column).cast(pa.string())
    return out
