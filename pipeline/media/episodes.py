"""Columns of episodes as arrays: observations and actions, why a row cannot be read, and
statistics.

Nothing is copied where the columns hold float32 without nulls, and nothing is done step by step.
Rows are B episodes of T steps each.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
from torch import nn

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import (
    filled,
    floats,
    is_class_name,
    is_list,
    is_number,
    joined,
    lengths,
)
from pipeline.media.deviation import divisors, rounded_mean

NONE, CLASSES = -1, -2
"""Widths of actions: there is no column; they are names of classes."""


@dataclass(frozen=True)
class StepValues:
    """The values of a column of episodes.

    ``values`` are those of all rows in one array: float32 numbers, or the numbers of ``classes``,
    -1 for null. Row i has those from ``ends[i]`` to ``ends[i + 1]``.
    """

    values: np.ndarray
    ends: np.ndarray
    classes: list[str] | None = None

    def rows(self, values: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Cut values like these into one array for each row; empty for rows that are not kept."""
        spans = itertools.pairwise(self.ends.tolist())
        for (start, stop), is_kept in zip(spans, kept.tolist(), strict=True):
            yield values[start : stop if is_kept else start]


class SpaceState(TypedDict):
    """Widths of a robot's observations and actions, and their statistics over all steps."""

    observation: int
    """Length of an observation."""
    action: int
    """Length of an action, or number of classes."""
    discrete: list[str] | None
    """Names of the classes, where actions are classes."""
    observation_mean: list[float]
    observation_std: list[float]
    action_mean: list[float]
    action_std: list[float]


@dataclass(frozen=True)
class Episodes:
    """The columns of a table as arrays.

    (B,) ``steps``, ``widths`` of observations, ``action_widths`` (or NONE, CLASSES), ``robot``
    (place of the embodiment among ``robots``, or -1) and ``reasons`` ("" for a row that can be
    read).
    """

    reasons: list[str]
    steps: np.ndarray
    widths: np.ndarray
    action_widths: np.ndarray
    observations: StepValues
    actions: StepValues | None
    executed: StepValues | None
    robot: np.ndarray
    robots: list[str]

    @classmethod
    def read(cls, table: pa.Table, columns: dict[str, str]) -> Episodes:
        """Read the columns of roles observations, actions, executed and embodiment.

        Raises ValueError for columns of another type.
        """
        reasons = [""] * len(table)
        steps, widths, observations = _numbers(
            table, columns["observations"], "observations", reasons
        )
        action_widths = np.full(len(table), NONE)
        by_role: dict[str, StepValues] = {}
        roles = [
            role for role in ("actions", "executed") if columns.get(role) in table.column_names
        ]
        # where nothing was executed beside the actions to be learned, these were
        if len(roles) == 2 and table[columns["executed"]].null_count:
            name, kind = columns["executed"], table.schema.field(columns["executed"]).type
            # columns of two kinds: the rows get a reason below
            with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                executed = pc.if_else(
                    pc.is_null(table[name]), table[columns["actions"]].cast(kind), table[name]
                )  # pyright: ignore[reportAttributeAccessIssue]
                table = table.set_column(table.schema.get_field_index(name), name, executed)
        for role in roles:
            kind = table.schema.field(columns[role]).type
            read = _numbers if is_list(kind) and is_list(kind.value_type) else _classes
            num_steps, num_numbers, by_role[role] = read(table, columns[role], role, reasons)
            for i in np.flatnonzero(num_steps != steps).tolist():
                reasons[i] = reasons[i] or (
                    f"the episode has {steps[i]} observations and {num_steps[i]} {role}: an action "
                    "belongs to every observation; leave out a last observation that has none"
                )
            if len(by_role) == 1:
                action_widths = num_numbers
            for i in np.flatnonzero(num_numbers != action_widths).tolist():
                reasons[i] = (
                    reasons[i]
                    or f"{role} are {_kind(num_numbers[i])}, actions are "
                    f"{_kind(action_widths[i])}: they are of one kind"
                )
        names = [cleaned(text) for text in texts(table, columns, "embodiment")]
        robots = sorted(set(names) - {""})
        numbers = {text: number for number, text in enumerate(robots)}
        robot = np.array([numbers.get(text, -1) for text in names], dtype=np.int64)
        return cls(
            reasons,
            steps,
            widths,
            action_widths,
            observations,
            by_role.get("actions"),
            by_role.get("executed"),
            robot,
            robots,
        )

    @property
    def acts(self) -> StepValues | None:
        """The actions, or what was executed where there are none."""
        return self.executed if self.actions is None else self.actions

    @property
    def good(self) -> np.ndarray:
        return np.array([not reason for reason in self.reasons], dtype=bool)

    @property
    def discrete(self) -> bool:
        return self.acts is not None and self.acts.classes is not None

    def classes(self, rows: np.ndarray) -> set[str]:
        """Return the names of the classes that the actions of some rows have."""
        if not len(rows):
            return set()
        acts = self.acts
        assert acts is not None and acts.classes is not None
        numbers = {
            place
            for i in rows.tolist()
            for place in np.unique(acts.values[acts.ends[i] : acts.ends[i + 1]]).tolist()
        }
        return {acts.classes[place] for place in numbers}

    def name(self, row: int) -> str:
        """Return the name of a row's space, without the number of its classes."""
        action = int(self.action_widths[row])
        return (
            self.robots[self.robot[row]]
            if self.robot[row] >= 0
            else f"o{self.widths[row]}" + ("c" if action == CLASSES else f"a{max(0, action)}")
        )

    def spaces(
        self,
        among: np.ndarray,
        taken: tuple[str, ...] = (),
    ) -> dict[str, SpaceState]:
        """Return the spaces of some rows, by name, with their statistics over all steps.

        Where rows of one name differ in their widths, the most frequent widths count. A name made
        of widths that is ``taken`` continues with _2.
        """
        named: dict[str, list[int]] = {}
        for i in among.tolist():
            named.setdefault(self.name(i), []).append(i)
        out: dict[str, SpaceState] = {}
        for name, members in sorted(named.items()):
            rows = np.array(members)
            (width, action), _ = Counter(
                zip(self.widths[rows].tolist(), self.action_widths[rows].tolist(), strict=True)
            ).most_common(1)[0]
            rows = rows[(self.widths[rows] == width) & (self.action_widths[rows] == action)]
            discrete = sorted(self.classes(rows)) if action == CLASSES else None
            metadata: dict[str, Any] = {
                "observation": width,
                "action": max(0, action) if discrete is None else len(discrete),
                "discrete": discrete,
            }
            metadata |= _statistics(self.observations, rows, "observation", width) | _statistics(
                self.acts, rows, "action", action
            )
            space_name = (
                f"{name}{metadata['action']}"
                if action == CLASSES and self.robot[rows[0]] < 0
                else name
            )
            numbered = (f"{space_name}_{number}" for number in itertools.count(2))
            names = itertools.chain([space_name], numbered)
            free = next(text for text in names if text not in {*taken, *out})
            out[free] = cast("SpaceState", metadata)
        return out


def _kind(width: int) -> str:
    return "classes" if width == CLASSES else f"{max(0, width)} numbers a step"


def _statistics(
    numbers: StepValues | None, rows: np.ndarray, what: str, width: int
) -> dict[str, list[float]]:
    """Return mean and standard deviation of some rows' steps, in float64; 1 for a constant."""
    if numbers is None or width <= 0:
        return {f"{what}_{key}": [] for key in ("mean", "std")}
    parts = [
        numbers.values[numbers.ends[i] : numbers.ends[i + 1]].reshape(-1, width)
        for i in rows.tolist()
    ]
    count = sum(len(part) for part in parts)
    mean = np.sum([part.sum(0, dtype=np.float64) for part in parts], axis=0) / count
    squares = np.sum([np.square(part - mean).sum(0) for part in parts], axis=0)
    std = np.sqrt(squares / count)
    size = np.max([np.abs(part).max(0) for part in parts], axis=0)
    std = divisors(std, size)
    return {
        f"{what}_mean": list(map(rounded_mean, mean.tolist(), std.tolist())),
        f"{what}_std": [float(f"{value:.7g}") for value in std.tolist()],
    }


def first_of_rows(wrong: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (row, place) of the first of each row's values that are ``wrong``."""
    places = np.flatnonzero(wrong)
    rows, first = np.unique(np.searchsorted(ends, places, side="right") - 1, return_index=True)
    yield from zip(rows.tolist(), places[first].tolist(), strict=True)


def _numbers(
    table: pa.Table, name: str, role: str, reasons: list[str]
) -> tuple[np.ndarray, np.ndarray, StepValues]:
    """Return (B,) steps (-1 for null), (B,) numbers a step, and the numbers.

    Rows that cannot be read get a reason. Raises ValueError for a column of another type.
    """
    column, kind = joined(table[name]), table.schema.field(name).type
    deep = kind.value_type.value_type if is_list(kind) and is_list(kind.value_type) else None
    if deep is None or not is_number(deep):
        raise ValueError(
            f"column {name}: it holds {kind}; {role} are lists, one entry a step, of lists of "
            "numbers" + (" or of class names" if role == "actions" else "")
        )
    steps = lengths(column).astype(np.int64)
    inner = pc.list_flatten(column)
    length, flat = lengths(inner), pc.list_flatten(inner)
    values = floats(flat)
    starts = np.concatenate([[0], np.cumsum(np.maximum(steps, 0))])
    widths = np.zeros(len(column), dtype=np.int64)
    widths[steps > 0] = length[starts[:-1][steps > 0]]
    alike = bool(len(length)) and length[0] >= 0 and bool((length == length[0]).all())
    ends = (
        starts * int(length[0])
        if alike
        else np.concatenate([[0], np.cumsum(np.maximum(length, 0), dtype=np.int64)])[starts]
    )
    for i in np.flatnonzero((steps <= 0) | (widths <= 0)).tolist():
        why = (
            f"the {role} are null"
            if steps[i] < 0
            else "the episode has no steps"
            if not steps[i]
            else (f"{role}: step 0 {'is null' if widths[i] < 0 else 'has no numbers'}")
        )
        reasons[i] = reasons[i] or why
    if not alike:
        for i, at in first_of_rows(length != np.repeat(widths, np.maximum(steps, 0)), starts):
            differs = (
                f"has {length[at]} numbers, step 0 has {widths[i]}"
                if length[at] >= 0
                else "is null"
            )
            reasons[i] = reasons[i] or f"{role}: step {at - starts[i]} {differs}"
    if not np.isfinite(values).all():
        for i, at in first_of_rows(~np.isfinite(values), ends):
            reasons[i] = (
                reasons[i]
                or f"{role}: step {(at - ends[i]) // widths[i]}, number "
                f"{(at - ends[i]) % widths[i]} is {values[at]}"
            )
    return steps, widths, StepValues(values, ends)


def _classes(
    table: pa.Table, name: str, role: str, reasons: list[str]
) -> tuple[np.ndarray, np.ndarray, StepValues]:
    """Do the same for lists of class names, integers or booleans, which are then the names."""
    column, kind = joined(table[name]), table.schema.field(name).type
    if not is_class_name(kind.value_type if is_list(kind) else pa.null()):
        raise ValueError(
            f"column {name}: it holds {kind}; {role} are lists, one entry a step, of lists of "
            "numbers or of class names"
        )
    steps = lengths(column).astype(np.int64)
    flat = pc.cast(pc.list_flatten(column), pa.string()).dictionary_encode()
    values = filled(flat.indices, -1)
    ends = np.concatenate([[0], np.cumsum(np.maximum(steps, 0))])
    for i in np.flatnonzero(steps < 0).tolist():
        reasons[i] = reasons[i] or f"the {role} are null"
    for i, at in first_of_rows(values < 0, ends):
        reasons[i] = reasons[i] or f"{role}: step {at - ends[i]} is null"
    return (
        steps,
        np.full(len(column), CLASSES),
        StepValues(values, ends, flat.dictionary.to_pylist()),
    )


def texts(table: pa.Table, columns: dict[str, str], role: str) -> list[str]:
    """Return (B,) texts of a role's column; "" for null, and for all rows without such a column."""
    if columns.get(role) not in table.column_names:
        return [""] * len(table)
    return pc.fill_null(pc.cast(table[columns[role]], pa.string()), "").to_pylist()


@lru_cache(maxsize=4096)
def cleaned(text: str) -> str:
    """Turn a robot's name into a name for a submodule.

    Characters other than A-Z, a-z, 0-9, _ and - become _; names that every module has (``to``,
    ``train``) get one at the end.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", text.strip())
    return f"{name}_" if name and hasattr(nn.ModuleDict(), name) else name
