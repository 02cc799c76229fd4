"""Plain tables with one row a step (a robot's log, demonstrations) to one row an episode."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import SplitOptions, register
from pipeline.prepare.engine import episodes
from pipeline.prepare.engine.importing import Notes, check_columns, first_few, parse_names
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, find_inputs, whole_files
from pipeline.prepare.engine.table_importer import (
    InferredSchema,
    Scan,
    TableImporter,
    first_invalid,
)
from pipeline.prepare.readers import logs
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import SUFFIXES, read_schema

SINGLE = ("episode", "order", "reward", "done", "task", "embodiment", "split_column")
"""Options that name one column each."""
SAME_IDS = "ids of episodes that stand in several files, which rows name FILE/ID"


class TrajectoriesOptions(SplitOptions):
    observations: str = Field(
        "",
        description="columns of an observation, in order: x,y,z or S1..S24 or joint_*; of Parquet "
        "also one column of lists",
    )
    actions: str = Field(
        "",
        description="one column of texts or whole numbers: classes; or columns of numbers, as "
        "observations are named; empty: none",
    )
    discrete: Literal["auto", "true", "false"] = Field(
        "auto",
        description="whether one column of whole numbers is classes; auto: yes, unless it has "
        "bounds",
    )
    action_names: str = Field("", description="names of integer codes, from 0: left,straight,right")
    action_low: str = Field(
        "", description="the least that actions may be: one number, or one for each column: -1,-0.5"
    )
    action_high: str = Field("", description="the most that they may be")
    episode: str = Field(
        "", description="the column that says which episode a step is of; empty: a file is one log"
    )
    order: str = Field(
        "", description="the column of steps or times, which must ascend within an episode"
    )
    reward: str = Field("", description="the column of rewards")
    done: str = Field(
        "",
        description="the column that is true where an episode ends by itself; without an episode "
        "column it cuts the log there",
    )
    open: Literal["refuse", "allow"] = Field(
        "refuse",
        description="an episode whose last row is not done: left out, or taken as cut off there "
        "(truncated)",
    )
    task: str = Field("", description="the column of the task's name, one an episode")
    task_name: str = Field(
        "", description="the task's name for all episodes, where no column says it"
    )
    embodiment: str = Field("", description="the column of the robot's name, one an episode")
    embodiment_name: str = Field(
        "", description="the robot's name for all episodes, where no column says it"
    )
    episode_steps: int = Field(
        0,
        ge=0,
        description="cut logs into episodes of so many steps, so that shares of a log can be "
        "taken; 0: no",
    )
    test_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the last share of the steps of every log, or episode, is its test: 0.25; for "
        "whole episodes leave it out, and give the job test_fraction",
    )
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="the share before that is for validation"
    )
    split_column: str = Field(
        "", description="the column that says each step's split; a log is cut where it changes"
    )


@register("importer", "trajectories", options=TrajectoriesOptions)
class Trajectories(TableImporter):
    """Episodes of observations and actions, from tables with a row for each step.

    It reads CSV (also .gz or .zst) or Parquet, a file or a folder, and writes a row for each
    episode: `--set observations=S1..S24 --set actions=move`. A file is read by one task: cut up
    very large ones.

    - The steps of an episode must be contiguous and in order.
    - The action of a step is taken after its observation.
    - Without `--set done=` an episode is truncated where its log ends.

    Columns: episode, task, embodiment, observations (a list of lists), actions (a list of lists, or
    of names of classes), rewards, terminated, truncated, steps, split.

    Left out and counted by reason: episodes with observations, actions or rewards that are not
    finite, with actions out of bounds or of different widths, an order that does not ascend, two
    tasks or two robots, and with `--set done=` those without an end.
    """

    amounts = {"steps": "observations"}

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        if not o.observations:
            raise ValueError(
                "--set observations= is missing: name the columns that the robot observes, "
                "such as --set observations=S1..S24"
            )
        self.rules = logs.CutRules(
            o.episode_steps,
            o.validation_share,
            o.test_share,
            o.open == "allow",
            o.task_name,
            o.embodiment_name,
        )
        if sum(map(bool, (self._shares, o.split_column, o.split))) > 1:
            raise ValueError(
                "--set split=, split_column= and test_share= or validation_share= all say "
                "what a step's split is; give one of them"
            )
        for column, fixed in (("task", "task_name"), ("embodiment", "embodiment_name")):
            if getattr(o, column) and getattr(o, fixed):
                raise ValueError(
                    f"--set {column}={getattr(o, column)} and {fixed}={getattr(o, fixed)}: a "
                    "column and a name for all; give one of them"
                )
        self.low = _bounds("action_low", o.action_low)
        self.high = _bounds("action_high", o.action_high)
        self.roles = logs.ColumnRoles(())
        self.coded = False  # actions are classes because the first ones are whole numbers

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        o = self.options
        listed = find_inputs(
            source, SUFFIXES, o.split or ("all" if o.split_column or self._shares else "")
        )
        with Opener() as opener:
            self.roles = self._roles(whole_files(listed)[0], opener)
        self.label = "actions" if self.roles.discrete else "task" if o.task else ""
        return whole_files(listed), listed.fingerprint, listed.notes

    @property
    def _shares(self) -> bool:
        return self.rules.test + self.rules.validation > 0

    # ---------------------------------------------------- what the columns are, from the first file

    def _roles(self, input_split: InputSplit, opener: Opener) -> logs.ColumnRoles:
        o, names = (
            self.options,
            [name.strip() for name in read_schema(input_split.entry, opener).names],
        )
        own = {option: getattr(o, option) for option in SINGLE}
        check_columns(input_split.name, names, *own.items())
        place, taken = input_split.name, set(own.values())
        actions = logs.named_columns(o.actions, names, "actions", place, taken)
        observations = logs.named_columns(
            o.observations, names, "observations", place, {*taken, *actions}
        )
        types, first = logs.column_types(
            input_split, opener, {*actions, *observations, *filter(None, [o.order])}
        )
        listed = tuple(
            name
            for name in dict.fromkeys((*observations, *actions))
            if types.get(name) == "numbers"
        )
        for option, given in (("observations", observations), ("actions", actions)):
            if len(given) > 1 and (name := next((name for name in given if name in listed), "")):
                raise ValueError(
                    f"{input_split.name}: column {name} of --set {option} holds lists; name it "
                    "alone, or columns of one number each"
                )
        discrete = self._discrete(actions, types, first) if actions else None
        if o.action_names and not discrete:
            raise ValueError(
                "--set action_names= is for one column of integer codes: name that in --set "
                "actions="
            )
        if discrete and (self.low or self.high):
            raise ValueError(
                "--set action_low= and action_high= are bounds of numbers, while actions are "
                "classes; leave them out"
            )
        moments = logs.holds_moments(o.order, types, first)
        return logs.ColumnRoles(
            observations,
            actions,
            discrete,
            listed,
            tuple(parse_names(o.action_names)),
            self.low,
            self.high,
            o.episode,
            o.order,
            moments,
            o.reward,
            o.done,
            o.task,
            o.embodiment,
            o.split_column,
        )

    def _discrete(
        self,
        actions: tuple[str, ...],
        types: dict[str, str],
        first: dict[str, pa.Array],
    ) -> bool:
        o, column = self.options, next(iter(actions))
        kind = types[column]
        if len(actions) > 1 or kind == "numbers":
            if o.discrete == "true":
                raise ValueError(
                    f"--set discrete=true: {len(actions)} columns of actions or a column of "
                    "lists are no classes; name one column"
                )
            return False
        if o.discrete != "auto":
            return o.discrete == "true"
        values = first.get(column)
        whole = kind == "whole" or (
            kind == "text" and values is not None and logs.all_match(values, logs.WHOLE)
        )
        if o.action_names or whole:
            self.coded = not o.action_names and not (self.low or self.high)
            return bool(o.action_names) or self.coded
        return kind == "text" and not (values is not None and logs.all_match(values, logs.NUMBER))

    # ------------------------------------------------------------ the two passes

    def _episodes(
        self,
        reading: SplitReader,
        found: list[logs.EpisodeRows],
    ) -> Iterator[tuple[episodes.Episode, str]]:
        """Yield (valid episode, its split) of a file; the others go to `reading.bad`."""
        o = self.options
        is_cut = bool(
            self.rules.steps or self._shares or o.split_column or (o.done and not o.episode)
        )
        tables = logs.read_tables(reading.input_split, self.roles.columns(), reading.opener)
        for episode_rows, rows in zip(found, logs.read_episodes(found, tables), strict=True):
            log, number = episode_rows.log, episode_rows.number
            name = f"{log}-{number:05d}" if is_cut else log
            try:
                episode = logs.make_episode(rows, episode_rows, self.roles, self.rules, name)
            except logs.UnusableError as error:
                reading.bad(f"episode {name} (from row {episode_rows.start + 1})", str(error))
                continue
            yield episode, episode_rows.split or reading.input_split.split

    def scan(self, reading: SplitReader) -> Scan:
        part = reading.input_split
        episodes_of_file = logs.find_episodes(
            part, logs.log_name(part), self.roles, self.rules, reading.opener
        )
        names, widths, classes = [], dict[tuple[str, int, int], str](), set[str]()
        for found, _ in self._episodes(reading, episodes_of_file):
            names.append(found.name)
            classes |= set(found.actions) if isinstance(found.actions, list) else set()
            action = found.actions.shape[1] if isinstance(found.actions, np.ndarray) else 0
            widths.setdefault((found.embodiment, found.observations.shape[1], action), found.name)
        return {
            "rows": len(names),
            "names": names,
            "episodes": episodes_of_file,
            "classes": sorted(classes),
            "robots": [(robot, sizes, name) for (robot, *sizes), name in widths.items()],
        }

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        if not any(scan["rows"] for scan in scans):
            raise ValueError(
                f"no episode is left of {sum(scan['broken'] for scan in scans)}. First one: "
                f"{first_invalid(input_splits, scans)}"
            )
        for input_split, scan in zip(input_splits, scans, strict=True):
            if self.coded and (
                text := next(
                    (text for text in scan["classes"] if not re.match(logs.WHOLE, text)), ""
                )
            ):
                raise ValueError(
                    f"{input_split.name}: {self.roles.actions[0]} is {text!r}, while it began with "
                    "whole numbers and so was taken as classes; pass --set discrete=false where it "
                    "is numbers, --set discrete=true where it is names of classes"
                )
        _check_widths(input_splits, scans)
        names = Counter(name for scan in scans for name in scan["names"])
        doubled = sorted(name for name, count in names.items() if count > 1)
        classes = sorted({name for scan in scans for name in scan["classes"]})
        scan_results = [(scan["episodes"], bool(doubled)) for scan in scans]
        notes: Notes = {
            "columns of an observation": len(self.roles.observations),
            **({"classes of actions": len(classes)} if self.roles.discrete else {}),
        }
        if doubled:
            notes[SAME_IDS] = first_few(doubled)
        info = {
            "observations": list(self.roles.observations),
            "actions": list(self.roles.actions),
            "classes": classes,
            "episode_steps": self.rules.steps,
            "test_share": self.rules.test,
            "validation_share": self.rules.validation,
        }
        return InferredSchema(
            episodes.episode_fields(self.roles.discrete, bool(self.roles.reward)),
            scan_results,
            notes,
            info,
        )

    def rows(self, reading: SplitReader) -> Iterator[pa.Table]:
        fields, has_prefix = reading.scan_result
        prefix = f"{reading.input_split.name}/" if has_prefix else ""
        episodes_of_file = [logs.EpisodeRows(*of_episode) for of_episode in fields]
        for found, split in self._episodes(reading, episodes_of_file):
            row = episodes.episode_row(found, split)
            yield row.set_column(0, "episode", pa.array([prefix + found.name])) if prefix else row


def _check_widths(input_splits: list[InputSplit], scans: list[Scan]) -> None:
    """Raise ValueError for a robot whose observations or actions have several widths."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for input_split, scan in zip(input_splits, scans, strict=True):
        for robot, widths, name in scan["robots"]:
            episode = f"{input_split.name}: episode {name}"
            for what, width in zip(("observations", "actions"), widths, strict=True):
                first_width, its_episode = first.setdefault((robot, what), (width, episode))
                if width != first_width:
                    raise ValueError(
                        f"{episode}: {what} of {width} numbers, where {its_episode} has "
                        f"{first_width}, of the same robot; name robots by --set "
                        "embodiment=COLUMN, or prepare them apart"
                    )


# ---------------------------------------------------------------- options


def _bounds(option: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in parse_names(text))
    except ValueError:
        raise ValueError(
            f"--set {option}={text}: not numbers; write one, or one for each column of "
            "actions: -1,-0.5"
        ) from None
    if any(value != value for value in found):
        raise ValueError(f"--set {option}={text}: nan is no bound")
    return found
