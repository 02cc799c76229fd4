"""Tables with one row a step, cut into episodes.

Rows of a log are contiguous and in the order of time, so a table of any length is read in one pass
with one episode in memory. To group them by pandas or duckdb would hold or sort the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes
from pipeline.prepare.engine.episodes import Episode, UnusableError, matrix, number_problem
from pipeline.prepare.engine.importing import NO_SPLIT, SPLITS
from pipeline.prepare.engine.inputs import InputSplit
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import ByteRange, Column, RowCounts, batches

NUMBER = r"^\s*[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|inf)\s*$"
WHOLE = r"^\s*[+-]?\d{1,18}(\.0*)?\s*$"
ZEROS = r"^(-?)\+?(\d{1,18})\.0*$"
"""Whole numbers in a column of floats: class 0.0 is class 0, and so is -0.0."""
TRUE, FALSE = ("true", "1", "1.0", "t", "yes"), ("false", "0", "0.0", "f", "no", "")


@dataclass(frozen=True)
class ColumnRoles:
    """What the columns of a table are.

    Attributes:
        observations, actions: names of their columns.
        discrete: actions are classes; None: there are none.
        listed: columns of lists of numbers.
        names: of integer codes of classes.
        low, high: bounds of each action, or one for all.
        episode, order, reward, done, task, embodiment, split: names of single columns, or "".
        moments: the order is by times, not by numbers.
    """

    observations: tuple[str, ...]
    actions: tuple[str, ...] = ()
    discrete: bool | None = None
    listed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    episode: str = ""
    order: str = ""
    moments: bool = False
    reward: str = ""
    done: str = ""
    task: str = ""
    embodiment: str = ""
    split: str = ""

    def columns(self) -> dict[str, Column]:
        """Return the columns to read. Raises ValueError for a column with two kinds."""
        out: dict[str, str] = {}
        texts = [self.episode, self.done, self.task, self.embodiment, self.split]
        for name, kind in [
            *((name, "text") for name in texts),
            (self.order, "moment" if self.moments else "number"),
            (self.reward, "number"),
            *((name, "number") for name in self.observations),
            *((name, "text" if self.discrete else "number") for name in self.actions),
        ]:
            kind = "numbers" if name in self.listed else kind
            if name and out.setdefault(name, kind) != kind:
                raise ValueError(
                    f"column {name!r} is named twice, once as a {out[name]} and once as a "
                    f"{kind}; name it once"
                )
        return {name: Column(kind) for name, kind in out.items()}


@dataclass(frozen=True)
class CutRules:
    """How logs are cut into episodes.

    Attributes:
        steps: of an episode; 0: all of the log.
        validation, test: the last shares of a log's rows.
        open: an episode without an end may be used.
        task, embodiment: of all episodes, where no column has them.
    """

    steps: int = 0
    validation: float = 0.0
    test: float = 0.0
    open: bool = False
    task: str = ""
    embodiment: str = ""

    def bounds(self, length: int) -> list[tuple[int, str]]:
        """Return [(end row, split)] of a log of so many rows: first train, then validation, then
        test.
        """
        test, both = round(length * self.test), round(length * (self.test + self.validation))
        return [(length - both, "train"), (length - test, "validation"), (length, "test")]


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of one episode.

    Attributes:
        log: name of its log.
        number: in the log.
        first: its first row in the file, counted from 1.
        rows: the steps.
        last: its log ends with it.
        split: of the episode, or "".
    """

    log: str
    number: int
    first: int
    rows: pa.Table
    last: bool
    split: str


def tables(
    input_split: InputSplit, columns: dict[str, Column], opener: Opener
) -> Iterator[pa.Table]:
    """Yield the rows of a file in batches; numbers are float64, NaN where there is none.

    Raises ValueError for a line that is no row, since it may belong to any episode.
    """
    tally = RowCounts()
    for batch in batches(ByteRange("", (input_split.entry,)), columns, opener, tally):
        if tally.bad:
            break
        yield pa.table(
            {
                name: _numbers(batch[name])
                if columns[name].kind in ("number", "moment")
                else batch[name]
                for name in columns
            }
        )
    if tally.bad:
        raise ValueError(
            f"{tally.listed[0]}; {tally.bad} such lines, and no telling which episode they are "
            "of: repair the file"
        )


def _numbers(column: Any) -> pa.Array:
    array = column.combine_chunks()
    if pa.types.is_string(array.type):
        good = pc.match_substring_regex(array, NUMBER)
        array = pc.utf8_trim_whitespace(pc.if_else(good, array, None))
    return array.cast(pa.float64(), safe=False).fill_null(float("nan"))


def lengths(input_split: InputSplit, roles: ColumnRoles, opener: Opener) -> list[int]:
    """Return the number of rows of each log of a file: a pass over one column."""
    name = roles.episode or roles.observations[0]
    out: list[int] = []
    for _, a, b, is_new in _runs(
        tables(input_split, {name: roles.columns()[name]}, opener), roles.episode
    ):
        out += [0] if is_new else []
        out[-1] += b - a
    return out


def _runs(source: Iterator[pa.Table], column: str) -> Iterator[tuple[pa.Table, int, int, bool]]:
    """Yield runs of rows with one id in `column`: (table, start, stop, whether a new log begins).

    Without a column all rows are one log.
    """
    before: Any = source  # what no id is
    for table in source:
        if not len(table):
            continue
        cuts = [0, len(table)]
        if column:
            codes, _ = dictionary_codes(table[column])
            cuts[1:1] = (np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist()
        for a, b in pairwise(cuts):
            own = table[column][a].as_py() if column else None
            yield table, a, b, own != before
            before = own


class EpisodeCutter:
    """Cuts rows into episodes.

    `counted`: rows of each log, needed where shares of a log are cut. Raises ValueError for a log
    whose rows are not contiguous, or that has no name.
    """

    def __init__(
        self,
        input_split: InputSplit,
        name: str,
        roles: ColumnRoles,
        rules: CutRules,
        counted: list[int] | None,
    ):
        self.input_split = input_split
        self.name = name
        self.roles = roles
        self.rules = rules
        self.counted = counted
        self.held: list[pa.Table] = []
        self.seen: set[str] = set()
        self.log, self.row = "", 1
        self.at = self.size = self.number = self.logs = 0
        self.ends = False
        self.split = ""

    def run(self, source: Iterator[pa.Table]) -> Iterator[EpisodeRows]:
        current, done, splits = None, np.zeros(0, dtype=bool), None
        for table, a, b, is_new in _runs(source, self.roles.episode):
            if table is not current:
                current = table
                done = (
                    _true(table[self.roles.done])
                    if self.roles.done and not self.roles.episode
                    else np.zeros(len(table), dtype=bool)
                )
                splits = (
                    [_split(text) for text in table[self.roles.split].to_pylist()]
                    if self.roles.split
                    else None
                )
            if is_new:
                yield from self._flush(True)
                self._begin(table[self.roles.episode][a].as_py() if self.roles.episode else None)
            yield from self._feed(table, a, b, done, splits)
        yield from self._flush(True)

    def _begin(self, own: str | None) -> None:
        """Begin another log."""
        if self.roles.episode and (own is None or not own.strip()):
            raise ValueError(
                f"{self.input_split.name}: no episode in row {self.row} (column "
                f"{self.roles.episode!r}); fill it or remove the row"
            )
        self.log = (own or "").strip() or self.name
        if self.log in self.seen:
            raise ValueError(
                f"{self.input_split.name}: the rows of episode {self.log} do not stand together: "
                f"others lie before row {self.row}; sort the table by {self.roles.episode}"
                + (f" and {self.roles.order}" if self.roles.order else "")
            )
        self.seen.add(self.log)
        self.at = self.number = 0
        self.bounds = self.rules.bounds(self.counted[self.logs]) if self.counted is not None else []
        self.logs += 1

    def _feed(
        self, table: pa.Table, a: int, b: int, done: np.ndarray, splits: list[str] | None
    ) -> Iterator[EpisodeRows]:
        while a < b:
            if self.ends or (splits is not None and self.held and splits[a] != self.split):
                yield from self._flush(False)
            if not self.held:
                self.split = (
                    splits[a]
                    if splits is not None
                    else next((name for stop, name in self.bounds if self.at < stop), "")
                )
            stop = min(b, a + self.rules.steps - self.size) if self.rules.steps else b
            stop = min(
                stop, a + next((end - self.at for end, _ in self.bounds if self.at < end), b - a)
            )
            if done[a:stop].any():
                stop = a + int(np.argmax(done[a:stop])) + 1
            if splits is not None:
                stop = next((i for i in range(a, stop) if splits[i] != self.split), stop)
            self.held.append(table.slice(a, stop - a))
            self.size, self.at = self.size + stop - a, self.at + stop - a
            # a cut waits for the next row: only then it is known not to be where the log ends
            self.ends = bool(
                self.size == self.rules.steps
                or done[stop - 1]
                or any(self.at == end for end, _ in self.bounds)
            )
            a = stop

    def _flush(self, last: bool) -> Iterator[EpisodeRows]:
        if self.held:
            yield EpisodeRows(
                self.log,
                self.number,
                self.row,
                pa.concat_tables(self.held).combine_chunks(),
                last,
                self.split,
            )
            self.row, self.number = self.row + self.size, self.number + 1
        self.held, self.size, self.ends = [], 0, False


def _split(text: str | None) -> str:
    """Return the split that a text names; other texts come with a question mark before them."""
    found = (text or "").strip().lower()
    return SPLITS.get(found, f"?{found}")


def _true(column: Any) -> np.ndarray:
    lowered = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    return np.asarray(
        pc.is_in(lowered, value_set=pa.array(TRUE)).combine_chunks().to_numpy(zero_copy_only=False)
    )


# ---------------------------------------------------------------- one episode


def episode(stretch: EpisodeRows, roles: ColumnRoles, rules: CutRules, name: str) -> Episode:
    """Check the steps of an episode and return it. Raises UnusableError with the reason."""
    rows = stretch.rows
    if stretch.split.startswith("?"):
        raise UnusableError(NO_SPLIT if len(stretch.split) > 1 else "no split")
    terminated = _ended(rows, stretch, roles, rules)
    _check_order(rows, roles)
    observations = _steps(rows, roles.observations, roles, "observation")
    if why := number_problem(
        observations,
        "observation",
        roles.observations if observations.shape[1] == len(roles.observations) else (),
    ):
        raise UnusableError(why)
    actions = (
        None
        if roles.discrete is None
        else _classes(rows, roles)
        if roles.discrete
        else _vector_actions(rows, roles)
    )
    rewards = rows[roles.reward].to_numpy() if roles.reward else None
    if rewards is not None and (why := number_problem(rewards, "reward")):
        raise UnusableError(why)
    task, embodiment = (
        _one(rows, column, what) if column else fixed
        for column, what, fixed in (
            (roles.task, "task", rules.task),
            (roles.embodiment, "embodiment", rules.embodiment),
        )
    )
    return Episode(
        name,
        observations.astype(np.float32),
        actions,
        terminated,
        not terminated,
        rewards,
        None,
        task,
        embodiment,
    )


def _ended(rows: pa.Table, stretch: EpisodeRows, roles: ColumnRoles, rules: CutRules) -> bool:
    """Whether the episode ended by itself."""
    if not roles.done:
        return False
    done = _true(rows[roles.done])
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(rows[roles.done])).fill_null("")
    known = np.asarray(pc.is_in(texts, value_set=pa.array((*TRUE, *FALSE))).to_numpy())
    if not known.all():
        raise UnusableError(
            f"{roles.done} is {texts[int(np.argmin(known))].as_py()!r} in step "
            f"{int(np.argmin(known))}, neither true nor false"
        )
    if done[:-1].any():
        raise UnusableError(
            f"{roles.done} is true in step {int(np.argmax(done))} of {len(done)}, before its "
            "last one"
        )
    if not done[-1] and stretch.last and not rules.open:
        raise UnusableError(
            f"it has no end: {roles.done} is not true in its last row (--set open=allow takes "
            "it as cut off there)"
        )
    return bool(done[-1])


def _check_order(rows: pa.Table, roles: ColumnRoles) -> None:
    if not roles.order:
        return
    times = rows[roles.order].to_numpy()
    if np.isnan(times).any():
        raise UnusableError(f"no {roles.order} in step {int(np.argmax(np.isnan(times)))}")
    back = np.diff(times) <= 0
    if back.any():
        at = int(np.argmax(back)) + 1
        raise UnusableError(
            f"{roles.order} does not ascend at step {at}: {times[at]:.10g} after "
            f"{times[at - 1]:.10g}"
        )


def _steps(rows: pa.Table, columns: tuple[str, ...], roles: ColumnRoles, what: str) -> np.ndarray:
    """Return columns of numbers, or one column of lists, as (T, n) float64."""
    if columns[0] not in roles.listed:
        return np.stack([rows[name].to_numpy() for name in columns], axis=1)
    return matrix(rows[columns[0]], what)


def _vector_actions(rows: pa.Table, roles: ColumnRoles) -> np.ndarray:
    actions = _steps(rows, roles.actions, roles, "action")
    names = roles.actions if actions.shape[1] == len(roles.actions) else ()
    if why := number_problem(actions, "action", names):
        raise UnusableError(why)
    limits: tuple[tuple[str, tuple[float, ...], Callable[..., np.ndarray]], ...] = (
        ("action_low", roles.low, np.less),
        ("action_high", roles.high, np.greater),
    )
    for option, bound, is_out in limits:
        if bound and len(bound) not in (1, actions.shape[1]):
            raise ValueError(
                f"--set {option} has {len(bound)} numbers, actions have {actions.shape[1]}; "
                "give one for all, or one for each"
            )
        if bound and (out := np.argwhere(is_out(actions, np.array(bound)))).size:
            step, place = (int(i) for i in out[0])
            limit = np.broadcast_to(np.array(bound), actions.shape[1])[place]
            raise UnusableError(
                f"action {names[place] if names else place} is {actions[step, place]:g} in step "
                f"{step}, {'below' if option == 'action_low' else 'above'} {option}={limit:g}"
            )
    return actions.astype(np.float32)


def _classes(rows: pa.Table, roles: ColumnRoles) -> list[str]:
    texts = pc.utf8_trim_whitespace(rows[roles.actions[0]])
    texts = pc.replace_substring_regex(
        pc.replace_substring_regex(texts, ZEROS, r"\1\2"), "^-(0+)$", r"\1"
    )
    found = texts.fill_null("").to_pylist()
    if "" in found:
        raise UnusableError(f"no action in step {found.index('')}")
    if not roles.names:
        return found
    whole = np.asarray(pc.match_substring_regex(texts, WHOLE).to_numpy())
    codes = [int(float(text)) if good else -1 for text, good in zip(found, whole, strict=True)]
    bad = next((i for i, code in enumerate(codes) if not 0 <= code < len(roles.names)), None)
    if bad is not None:
        raise UnusableError(
            f"action {found[bad]} in step {bad} is no code from 0 to {len(roles.names) - 1} of "
            "action_names"
        )
    return [roles.names[code] for code in codes]


def _one(rows: pa.Table, column: str, what: str) -> str:
    """Return the one text that all rows have."""
    found = pc.unique(rows[column].fill_null("")).to_pylist()
    if len(found) > 1:
        raise UnusableError(
            f"its rows have {len(found)} values of {what}: {found[0]!r}, {found[1]!r}"
        )
    return found[0].strip()
