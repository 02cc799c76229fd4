"""Tables with one row a step, cut into episodes.

Rows of a log are contiguous and in the order of time, so a table of any length is read with one
episode in memory, once its few columns that tell where to cut it have been read. To group rows by
pandas or duckdb would hold or sort the whole table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes
from pipeline.prepare.engine.episodes import Episode, UnusableError, as_matrix, number_problem
from pipeline.prepare.engine.importing import (
    NO_SPLIT,
    SPLITS,
    check_columns,
    first_few,
    parse_names,
)
from pipeline.prepare.engine.inputs import InputSplit
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import Column, RowCounts, batches, read_schema

NUMBER = r"^\s*[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|inf)\s*$"
"""With inf, which makes an episode invalid; nan is a missing number."""
NOT_A_NUMBER = "texts that are no number, taken as missing"
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
        noun: what errors call an episode.
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
    noun: str = "episode"

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

    def __post_init__(self):
        if self.test + self.validation >= 1:
            raise ValueError(
                f"--set test_share={self.test:g} and validation_share={self.validation:g} leave "
                "no train steps; give less than 1 in all"
            )

    def bounds(self, length: int) -> list[tuple[int, str]]:
        """Return [(end row, split)] of a log: first train, then validation, then test."""
        test, both = round(length * self.test), round(length * (self.test + self.validation))
        return [(length - both, "train"), (length - test, "validation"), (length, "test")]


class EpisodeRows(NamedTuple):
    """Which rows of a file are one episode.

    Attributes:
        log: name of its log.
        number: in the log.
        start, stop: its rows in the file, counted from 0.
        last: whether it is the last one of its log.
        split: of the episode, or "".
    """

    log: str
    number: int
    start: int
    stop: int
    last: bool
    split: str


def read_tables(
    input_split: InputSplit,
    columns: dict[str, Column],
    opener: Opener,
    counts: Counter[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield the rows of a file in batches; numbers are float64, NaN where there is none.

    A text in a column of numbers (ERR, 20,5) is NaN, too, and added to `counts`. Raises ValueError
    for a line that is no row, since it may belong to any episode.
    """
    tally = RowCounts()
    of_numbers = [name for name, one in columns.items() if one.kind in ("number", "moment")]
    for batch in batches(input_split, columns, opener, tally):
        if tally.bad:
            break
        for name in of_numbers:
            place = batch.column_names.index(name)
            batch = batch.set_column(place, name, _numbers(batch[name], counts))
        yield batch
    if tally.bad:
        raise ValueError(
            f"{tally.listed[0]}; {tally.bad} such lines, which cannot be assigned to an episode or "
            "recording: repair the file"
        )


def _numbers(column: Any, counts: Counter[str] | None) -> pa.Array:
    array = column.combine_chunks()
    if pa.types.is_string(array.type):
        good = pc.match_substring_regex(array, NUMBER)
        if counts is not None:
            counts[NOT_A_NUMBER] += pc.sum(pc.invert(good)).as_py() or 0
        array = pc.utf8_trim_whitespace(pc.if_else(good, array, None))
    return array.cast(pa.float64(), safe=False).fill_null(float("nan"))


def find_episodes(
    input_split: InputSplit,
    name: str,
    roles: ColumnRoles,
    rules: CutRules,
    opener: Opener,
) -> list[EpisodeRows]:
    """Find the episodes of a file, by the columns of logs, ends and splits alone.

    A log is cut at its ends (where no column names its episodes), where its split changes, at its
    shares of splits, and every ``rules.steps`` rows from there.

    Args:
        name: of the log, where no column names it.

    Raises:
        ValueError: a log whose rows are not contiguous, or that has no name.
    """
    done = "" if roles.episode else roles.done
    cut_columns = dict.fromkeys(filter(None, (roles.episode, roles.split, done)))
    columns = roles.columns()
    rows, blocks = 0, list[pa.Table]()
    columns_read = {one: columns[one] for one in cut_columns or roles.observations[:1]}
    for table in read_tables(input_split, columns_read, opener):
        rows += len(table)
        blocks.append(pa.table({one: table[one].dictionary_encode() for one in cut_columns}))
    if not rows:
        return []
    found = pa.concat_tables(blocks).unify_dictionaries()
    cuts, splits = np.empty(0, dtype=np.int64), list[str]()
    split_codes = np.empty(0, dtype=np.int64)
    if done:
        codes, texts = dictionary_codes(found[done])
        cuts = np.flatnonzero(np.append(_true(texts), False)[codes]) + 1
    if roles.split:
        codes, texts = dictionary_codes(found[roles.split])
        splits = [_split(text) for text in [*texts.to_pylist(), None]]  # code -1 is the last one
        split_codes = np.array([splits.index(split) for split in splits])[codes]
        cuts = np.append(cuts, np.flatnonzero(np.diff(split_codes)) + 1)
    out = list[EpisodeRows]()
    for log, first, end in _logs(found, rows, name, input_split.name, roles):
        has_shares = rules.validation + rules.test > 0
        shares = rules.bounds(end - first) if has_shares else []
        bounds = [(first + stop, split) for stop, split in shares]
        inner = cuts[(cuts > first) & (cuts < end)].tolist()
        spans = pairwise(sorted({first, end, *inner, *(stop for stop, _ in bounds)}))
        starts = [row for a, b in spans for row in range(a, b, rules.steps or b - a)]
        for number, (a, b) in enumerate(pairwise([*starts, end])):
            split = next((split for stop, split in bounds if a < stop), "")
            split = splits[split_codes[a]] if splits else split
            out.append(EpisodeRows(log, number, a, b, b == end, split))
    return out


def log_name(input_split: InputSplit) -> str:
    """Return the name of the log that a file is, where no column names it."""
    return re.sub(r"(\.\w+?)(\.gz|\.zst)?$", "", input_split.name)


def _logs(
    found: pa.Table,
    rows: int,
    name: str,
    file: str,
    roles: ColumnRoles,
) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first row, row after the last) of each log of a file."""
    if not roles.episode:
        yield name, 0, rows
        return
    codes, texts = dictionary_codes(found[roles.episode])
    named, seen = [*texts.to_pylist(), None], set[str]()
    starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), rows]
    for first, end in pairwise(starts):
        log = (named[codes[first]] or "").strip()
        if not log:
            raise ValueError(
                f"{file}: no {roles.noun} in row {first + 1} (column {roles.episode!r}); fill it "
                "or remove the row"
            )
        if log in seen:
            order = f" and {roles.order}" if roles.order else ""
            raise ValueError(
                f"{file}: the {roles.noun} of row {first + 1} has rows further up, with others "
                f"between; sort the table by {roles.episode}{order}"
            )
        seen.add(log)
        yield log, first, end


def read_episodes(found: list[EpisodeRows], source: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of each episode of a file, with one of them in memory."""
    rest = pa.table({})
    for episode_rows in found:
        parts, missing = list[pa.Table](), episode_rows.stop - episode_rows.start
        while missing:
            rest = rest if len(rest) else next(source)
            parts.append(rest.slice(0, missing))
            rest = rest.slice(missing)
            missing -= len(parts[-1])
        yield pa.concat_tables(parts).combine_chunks()


def _split(text: str | None) -> str:
    """Return the split that a text names; other texts come with a question mark before them."""
    found = (text or "").strip().lower()
    return SPLITS.get(found, f"?{found}")


def checked_split(episode_rows: EpisodeRows) -> str:
    """Return the split of rows. Raises UnusableError where their text names none."""
    if episode_rows.split.startswith("?"):
        raise UnusableError(NO_SPLIT if len(episode_rows.split) > 1 else "no split")
    return episode_rows.split


def _true(column: Any) -> np.ndarray:
    lowered = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    return np.asarray(pc.is_in(lowered, value_set=pa.array(TRUE)).to_numpy(zero_copy_only=False))


# ---------------------------------------------------------------- columns


def named_columns(
    text: str,
    names: list[str],
    option: str,
    place: str,
    taken: set[str],
) -> tuple[str, ...]:
    """Return the columns that a text names: themselves, A1..A24 (all numbers between), joint_*
    (all with that prefix and no other role).

    Raises ValueError for one that is missing or named twice.
    """
    out: list[str] = []
    for part in parse_names(text):
        span = re.fullmatch(r"(.*?)(\d+)\.\.(.*?)(\d+)", part)
        if part in names:
            found = [part]
        elif part.endswith("*"):
            found = [
                name
                for name in names
                if name.startswith(part[:-1]) and name not in taken and name not in out
            ]
        elif span and span[1] == span[3] and int(span[2]) <= int(span[4]):
            found = [
                f"{span[1]}{str(i).zfill(len(span[2]) if span[2].startswith('0') else 0)}"
                for i in range(int(span[2]), int(span[4]) + 1)
            ]
        else:
            found = [part]
        if not found:
            raise ValueError(
                f"{place}: no column begins with {part[:-1]!r} for --set {option}={text}; "
                f"there are {first_few(names)}"
            )
        check_columns(place, names, *((option, name) for name in found))
        for name in found:
            if name in out:
                raise ValueError(f"--set {option}={text} names column {name!r} twice")
        out += found
    return tuple(out)


def column_types(
    input_split: InputSplit,
    opener: Opener,
    names: set[str],
) -> tuple[dict[str, str], dict[str, pa.Array]]:
    """Return (what each column holds, the first values of columns of texts).

    Kinds: numbers (lists of them), whole, moment, number, text; all columns of CSV are text.
    """
    if not input_split.entry.name.lower().endswith(".parquet"):
        columns = {name: Column("text") for name in sorted(names)}
        first = next(batches(input_split, columns, opener, RowCounts()), None)
        if first is None:
            raise ValueError(f"{input_split.name}: no rows below the header; leave it out")
        return dict.fromkeys(names, "text"), {name: first[name].combine_chunks() for name in names}
    found = read_schema(input_split.entry, opener)
    kinds = {
        "numbers": lambda kind: pa.types.is_nested(kind),
        "whole": pa.types.is_integer,
        "moment": pa.types.is_temporal,
        "number": lambda kind: pa.types.is_floating(kind) or pa.types.is_decimal(kind),
    }
    type_of = {name: found.field(name).type for name in names}
    types = {
        name: next((kind for kind, holds in kinds.items() if holds(type_of[name])), "text")
        for name in names
    }
    return types, {name: pa.array(["x"]) for name, kind in types.items() if kind == "text"}


def holds_moments(
    order: str,
    types: dict[str, str],
    first: dict[str, pa.Array],
) -> bool:
    """Return whether a column holds times, not numbers of steps or seconds.

    Args:
        order: its name; "" for none.
        types, first: what `column_types` found.
    """
    kind = types.get(order)
    return kind == "moment" or (kind == "text" and not all_match(first[order], NUMBER))


def all_match(values: pa.Array, pattern: str) -> bool:
    """Return whether all texts that are not null match."""
    return bool(pc.all(pc.match_substring_regex(values.drop_null(), pattern)).as_py())


# ---------------------------------------------------------------- one episode


def make_episode(
    rows: pa.Table,
    episode_rows: EpisodeRows,
    roles: ColumnRoles,
    rules: CutRules,
    name: str,
) -> Episode:
    """Check the steps of an episode and return it. Raises UnusableError with the reason."""
    checked_split(episode_rows)
    terminated = _ended(rows, episode_rows, roles, rules)
    check_order(rows, roles)
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
        one_text(rows, column, what) if column else fixed
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


def _ended(rows: pa.Table, episode_rows: EpisodeRows, roles: ColumnRoles, rules: CutRules) -> bool:
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
    if not done[-1] and episode_rows.last and not rules.open:
        raise UnusableError(
            f"it has no end: {roles.done} is not true in its last row (--set open=allow takes "
            "it as cut off there)"
        )
    return bool(done[-1])


def check_order(rows: pa.Table, roles: ColumnRoles) -> None:
    """Raise UnusableError where the order of a log's rows does not ascend."""
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


def _steps(
    rows: pa.Table,
    columns: tuple[str, ...],
    roles: ColumnRoles,
    what: str,
) -> np.ndarray:
    """Return columns of numbers, or one column of lists, as (T, n) float64."""
    if columns[0] not in roles.listed:
        return np.stack([rows[name].to_numpy() for name in columns], axis=1)
    return as_matrix(rows[columns[0]], what)


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


def one_text(rows: pa.Table, column: str, what: str) -> str:
    """Return the one text that all rows have. Raises UnusableError where there are several."""
    found = pc.unique(rows[column].fill_null("")).to_pylist()
    if len(found) > 1:
        raise UnusableError(
            f"its rows have {len(found)} values of {what}: {found[0]!r}, {found[1]!r}"
        )
    return found[0].strip()
