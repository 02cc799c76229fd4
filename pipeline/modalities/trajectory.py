"""Episodes of robots and simulators: observations, actions, and optionally a task and frames."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any, NotRequired, TypedDict

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list, is_number
from pipeline.core.contracts import Arrays, Modality
from pipeline.core.inputs import SpaceInputs, TrajectoryInputs
from pipeline.core.ragged import ragged
from pipeline.core.specs import State
from pipeline.media import image_io
from pipeline.media.episodes import (
    CLASSES,
    NONE,
    Episodes,
    SpaceState,
    StepValues,
    first_of_rows,
    texts,
)

MAX_NAMED = 8
WARN_SHARE_OUT_OF_RANGE = 0.01
"""Share of clipped observations from which ``coverage`` mentions them."""
MAX_DEVIATIONS = 10.0
"""Standardised observations are clipped to this many standard deviations, as a diverged simulation
would give any number.
"""
CHANNELS = 3
RANDOM_STEPS = 12
"""Steps of the longest episode that is made up."""
NUMBERS = {"observations": "observation", "actions": "action", "executed": "action"}
"""Roles that hold numbers, and the statistics of a space that belong to each."""
BLOCK = 1 << 14
"""Numbers that are standardised at a time: few enough for a core's cache, many enough for one call.
"""
BY_WIDTH = re.compile(r"o\d+[ac]\d+(_\d+)?")
"""Names of spaces that were given by their widths alone."""


class TrajectoryOptions(Options):
    images: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="pixels a side of the frames (column images), squashed into a square; none: "
        "there are none",
    )


class TrajectoryState(TypedDict):
    """State of `Trajectory`."""

    spaces: dict[str, SpaceState]
    tasks: list[str]
    chosen: NotRequired[dict[str, str]]
    """Width of observations to the space of rows without a name whose actions are classes."""


@register("modality", "trajectory", options=TrajectoryOptions)
class Trajectory(Modality):
    """Episodes of T steps: action t is taken after observation t.

    Columns, by role:

    - ``observations``: T lists of numbers
    - ``actions``: T lists of numbers, or T class names (texts; whole numbers are their own names)
    - ``executed``: the actions that were really taken, if they are not those to learn. Example: an
      expert's answers to the states that another policy visited.
    - ``images``: T frames, as JPEG or PNG bytes
    - ``embodiment``: the name of the robot; ``task``: that of the task

    A *space* is the observations and actions of one robot, with their own mean and standard
    deviation. A corpus may have rows of several. The column ``embodiment`` names the space
    (characters other than letters, digits, _ and - become _). Without it the widths do: o9a1, or
    o24c4 with four classes. A row without a name belongs to the space that is named by its widths,
    else to the only space with these widths.

    Tensors, with O and A the widths of the widest space. What a row lacks is 0.

    - ``observations`` (B, T, O) float32, standardised and clipped to 10 deviations; ``mask`` (B,
      T), true where there is a step
    - ``actions`` and ``executed`` (B, T, A) float32, if there is such a column: standardised by the
      deviations of actions, or one-hot for classes; ``action_std`` (B, A): those deviations
    - ``space`` (B,) int64; ``task`` (B,) int64: 1 + the index among the known tasks, 0 for others
    - with option images ``images`` (B, T, 3, size, size) uint8
    """

    state: TrajectoryState
    roles = ("observations",)
    optional_roles = ("actions", "executed", "task", "embodiment", "images", "steps")
    fit_roles = ("observations", "actions", "executed", "task", "embodiment")
    strata = ("task", "embodiment")
    cost_role = "steps"
    cost_unit = "steps"

    def __init__(self, options: Any, state: State):
        super().__init__(options, state)
        self.spaces: dict[str, Space] = {
            name: Space(name, **properties) for name, properties in state.get("spaces", {}).items()
        }
        self.names: tuple[str, ...] = tuple(self.spaces)
        """Names of the spaces, in the order of their numbers."""
        self.tasks: tuple[str, ...] = tuple(state.get("tasks", ()))

    @classmethod
    def fit(cls, options, table, columns, backbone) -> TrajectoryState:
        """Find the spaces, with their statistics, and the tasks.

        Raises ValueError when no row can be read, and where there are frames without option images
        or the other way round.
        """
        cls._check_frames(options, columns)
        rows = Episodes.read(table, columns)
        if not rows.good.any():
            raise ValueError(
                f"column {columns['observations']}: none of the first {len(table)} rows can be "
                f"read: {[*rows.reasons, 'no rows'][0]}"
            )
        return {
            "spaces": rows.spaces(np.flatnonzero(rows.good)),
            "tasks": sorted(set(texts(table, columns, "task")) - {""}),
        }

    @staticmethod
    def _check_frames(options: Any, columns: dict[str, str]) -> None:
        given = "images" in columns
        if given != (options.images is not None):
            raise ValueError(
                "images: "
                + (
                    f"column {columns['images']} holds frames and the modality reads none: set "
                    f"{{trajectory: {{images: 96}}}} (pixels a "
                    "side), or leave the column out"
                    if given
                    else "the modality is to read frames, and no column has them: name it in "
                    "data.columns"
                )
            )

    def required_type(self, role, kind) -> str:
        if role != "observations":
            return ""
        deep = kind.value_type.value_type if is_list(kind) and is_list(kind.value_type) else None
        if deep is None or not is_number(deep):
            return "lists, one entry a step, of lists of numbers"
        return ""

    def inputs(self) -> TrajectoryInputs:
        spaces: dict[str, SpaceInputs] = {
            name: {
                "observation": space.observation,
                "action": space.action,
                "discrete": space.discrete is not None,
            }
            for name, space in self.spaces.items()
        }
        size = self.options.images
        return {
            "spaces": spaces,
            "tasks": len(self.tasks),
            "images": None if size is None else [CHANNELS, size, size],
        }

    def coverage(self, table, columns) -> str:
        """Describe which spaces and tasks of these rows are known, and which are new."""
        rows = Episodes.read(table, columns)
        space_index, missing, _ = self._resolve_spaces(rows)
        parts = [
            _describe_names(
                "robot",
                Counter(self.names[i] for i in space_index.tolist() if i >= 0),
                Counter(map(rows.name, missing.tolist())),
            )
        ]
        for i, space in enumerate(self.spaces.values()):
            members = np.flatnonzero(space_index == i)
            unknown = rows.classes(members) - set(space.discrete or ()) if rows.discrete else ()
            parts += (
                [f"{space.name} lacks the classes {', '.join(sorted(unknown)[:MAX_NAMED])}"]
                if unknown
                else []
            )
            clipped = space.share_out_of_range(rows.observations, members)
            if clipped >= WARN_SHARE_OUT_OF_RANGE:
                parts.append(
                    f"{clipped:.0%} of the numbers that {space.name} observes lie beyond "
                    f"{MAX_DEVIATIONS:g} of its deviations, and are cut there"
                )
        tasks = Counter(text for text in texts(table, columns, "task") if text)
        if tasks:
            known = Counter({text: count for text, count in tasks.items() if text in self.tasks})
            parts.append(_describe_names("task", known, tasks - known))
        return "; ".join(parts)

    def extend_state(self, table, columns) -> TrajectoryState:
        """Append the spaces and tasks of these rows that the state lacks.

        Rows without a name whose classes are not all known make a new space.
        """
        self._check_frames(self.options, columns)
        rows = Episodes.read(table, columns)
        _, missing, chosen = self._resolve_spaces(rows)
        tasks = sorted(set(texts(table, columns, "task")) - {"", *self.tasks})
        new = rows.spaces(missing, self.names)
        chosen |= {
            str(properties["observation"]): name
            for name, properties in new.items()
            if properties["discrete"] and BY_WIDTH.fullmatch(name)
        }
        if not new and not tasks and chosen == self.state.get("chosen", {}):
            return self.state
        state: TrajectoryState = {
            **self.state,
            "spaces": {**self.state["spaces"], **new},
            "tasks": [*self.tasks, *tasks],
        }
        if chosen:
            state["chosen"] = chosen
        return state

    def _resolve_spaces(self, rows: Episodes) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        """Find the space of each row, with a choice for rows of classes that have no name.

        Returns:
            (B,) number of each row's space or -1; the usable rows whose spaces the state lacks; and
            for each width of observations the space of rows without a name whose actions are
            classes: the one first assigned, else the last one that has all their classes, else a
            new one.
        """
        space_index, _, missing = self._space_of_rows(rows)
        chosen, before = dict(self.state.get("chosen", {})), space_index.copy()
        for i, space in enumerate(self.spaces.values()):
            members = np.flatnonzero((before == i) & (rows.robot < 0))
            if rows.discrete and (classes := rows.classes(members)) - set(space.discrete or ()):
                fits = [
                    name
                    for name in self._by_width(space.observation, CLASSES)
                    if classes <= set(self.spaces[name].discrete or ())
                ]
                space_index[members] = self.names.index(fits[-1]) if fits else -1
                if fits:
                    chosen[str(space.observation)] = fits[-1]
                else:
                    missing = np.union1d(missing, members)
        return space_index, missing, chosen

    def _by_width(self, observation: int, action: int) -> list[str]:
        """List the spaces, named by their widths, that rows without a name may belong to."""
        return [
            name
            for name, space in self.spaces.items()
            if space.fits(observation, action) and BY_WIDTH.fullmatch(name)
        ]

    def _space_of_rows(self, rows: Episodes) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Find the space of each row.

        Returns:
            (B,) number of each row's space or -1; "" or why each row cannot be read; and the rows
            whose space the state lacks.
        """
        space_index, reasons, missing = np.full(len(rows.reasons), -1), list(rows.reasons), []
        good, resolved = rows.good.tolist(), {}
        for i, key in enumerate(
            zip(
                rows.robot.tolist(),
                rows.widths.tolist(),
                rows.action_widths.tolist(),
                strict=True,
            )
        ):
            if good[i]:
                if key not in resolved:
                    resolved[key] = self._space_of(
                        rows.robots[key[0]] if key[0] >= 0 else "", *key[1:]
                    )
                name, reasons[i] = resolved[key]
                if not reasons[i]:
                    space_index[i] = self.names.index(name)
                elif not name:
                    missing.append(i)
        return space_index, reasons, np.array(missing, dtype=np.int64)

    def _space_of(self, robot: str, observation: int, action: int) -> tuple[str, str]:
        """Return (name of the space, reason why its rows cannot be read); no name for a missing
        space.

        ``action``: how many numbers, or NONE, CLASSES.
        """
        of_actions = {NONE: "", CLASSES: " and actions that are classes"}.get(
            action, f" and actions of {action} numbers"
        )
        described = f"observations of {observation} numbers{of_actions}"
        fits = [name for name, space in self.spaces.items() if space.fits(observation, action)]
        if robot:
            if robot not in self.spaces:
                return "", f"embodiment {robot} is not known; {nearest(robot, self.spaces)}"
            return (
                robot,
                "" if robot in fits else f"{self.spaces[robot].text()}, the row has {described}",
            )
        own = self._by_width(observation, action)
        # a name says how many classes there are, not which: ``extend_state`` has chosen
        if action == CLASSES and own:
            return self.state.get("chosen", {}).get(str(observation), own[-1]), ""
        if len(own or fits) == 1:
            return (own or fits)[0], ""
        if fits:
            return (
                "",
                f"{len(fits)} spaces have {described} ({', '.join(fits[:MAX_NAMED])}): column "
                "embodiment must tell which",
            )
        return "", f"no space has {described}: " + "; ".join(
            space.text() for space in list(self.spaces.values())[:MAX_NAMED]
        )

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        """Return the rows as they are in their columns, classes as numbers, ``space``, ``task``,
        frames.

        Nothing is copied; numbers are standardised by ``collate``.
        """
        if self.options.images is not None and columns.get("images") not in table.column_names:
            raise ValueError(
                f"images: frames of {self.options.images} pixels are to be read, and no column "
                "has them: name it in data.columns, or by --column images=NAME"
            )
        rows = Episodes.read(table, columns)
        space_index, reasons, _ = self._space_of_rows(rows)
        taken = {
            role: numbers
            for role, numbers in (("actions", rows.actions), ("executed", rows.executed))
            if numbers is not None
        }
        codes = {
            role: self._action_codes(role, numbers, space_index, reasons)
            for role, numbers in taken.items()
            if numbers.classes is not None
        }
        frames = (
            self._frames(table[columns["images"]], rows, reasons)
            if self.options.images is not None
            else None
        )
        space_index[[bool(reason) for reason in reasons]] = -1
        out: Arrays = {
            "observations": ragged(
                rows.observations.rows(rows.observations.values, space_index >= 0)
            )
        }
        out |= {
            role: ragged(numbers.rows(codes.get(role, numbers.values), space_index >= 0))
            for role, numbers in taken.items()
        }
        if frames is not None:
            out["images"] = ragged(
                frame if i >= 0 else frame[:0]
                for frame, i in zip(frames, space_index.tolist(), strict=True)
            )
        task_numbers = {text: number for number, text in enumerate(self.tasks, 1)}
        out["task"] = np.array(
            [task_numbers.get(text, 0) for text in texts(table, columns, "task")], dtype=np.int64
        )
        out["space"] = np.maximum(space_index, 0)
        return out, reasons

    def _action_codes(
        self, role: str, actions: StepValues, space_index: np.ndarray, reasons: list[str]
    ) -> np.ndarray:
        """Return (steps,) float32, the place of each action among the classes of its space.

        A row with an unknown action gets a reason; an unknown executed action is -1.
        """
        assert actions.classes is not None
        table = np.full(
            (len(self.names) + 1, len(actions.classes) + 1),
            -1.0,
            dtype=np.float32,
        )
        for i in np.unique(space_index[space_index >= 0]).tolist():
            class_numbers = {
                text: number
                for number, text in enumerate(self.spaces[self.names[i]].discrete or ())
            }
            table[i, :-1] = [class_numbers.get(text, -1) for text in actions.classes]
        codes = table[np.repeat(space_index, np.diff(actions.ends)), actions.values]
        for i, at in first_of_rows(codes < 0, actions.ends) if role == "actions" else ():
            if not reasons[i]:
                text = actions.classes[actions.values[at]]
                space = self.spaces[self.names[space_index[i]]]
                reasons[i] = (
                    f"actions: step {at - actions.ends[i]} is {text!r}, which is not a class of "
                    f"space {space.name}; {nearest(text, space.discrete or ())}"
                )
        return codes

    def _frames(self, column: Any, rows: Episodes, reasons: list[str]) -> list[np.ndarray]:
        """Decode the frames of each row, (T * 3 * size * size) uint8; a broken one gives the row a
        reason.
        """
        size, out = self.options.images, []
        for i, value in enumerate(column):
            files = value.as_py() if not reasons[i] else None
            steps = int(rows.steps[i])
            if not reasons[i] and len(files or ()) != steps:
                reasons[i] = (
                    f"the episode has {len(files or ())} images and {steps} observations: an "
                    "image belongs to every observation"
                )
            frames = np.zeros((0 if reasons[i] else steps, CHANNELS, size, size), dtype=np.uint8)
            for t, data in enumerate(files if files and not reasons[i] else ()):
                try:
                    frames[t] = image_io.resize(
                        image_io.pixels(data or b"", CHANNELS), size, "squash"
                    ).numpy()
                except (
                    RuntimeError,
                    ValueError,
                ) as error:
                    # torchvision raises RuntimeError for bytes that are not an image
                    reasons[i] = (
                        f"images: step {t}: "
                        f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}"
                    )
                    break
            out.append(frames.reshape(-1))
        return out

    def random_rows(self, rows, rng, length=1.0):
        """Return episodes of the spaces in turn, with what was executed at each step."""
        table: dict[str, list[Any]] = {"observations": [], "executed": [], "embodiment": []}
        if self.options.images is not None:
            table["images"] = []
        is_discrete = self.spaces[self.names[0]].discrete is not None
        alike = [one for one in self.spaces.values() if (one.discrete is not None) == is_discrete]
        for row in range(rows):
            space = alike[row % len(alike)]
            longest = max(1, int(length * RANDOM_STEPS))
            steps = longest if row == 0 else int(rng.integers(1, longest + 1))
            table["embodiment"].append(space.name)
            table["observations"].append(rng.standard_normal((steps, space.observation)).tolist())
            if space.discrete is not None:
                table["executed"].append([str(rng.choice(space.discrete)) for _ in range(steps)])
            else:
                table["executed"].append(rng.standard_normal((steps, space.action)).tolist())
            if "images" in table:
                frames = rng.integers(0, 256, (steps, 8, 8, CHANNELS), dtype=np.uint8)
                table["images"].append([_png(frame) for frame in frames])
        decoded, reasons = self.decode(pa.table(table), {name: name for name in table})
        assert not any(reasons), reasons
        return self.collate(decoded)

    def costs(self, table, columns) -> np.ndarray:
        """Return (B,) float64 steps of each row, from column ``steps`` or the number of
        observations.

        0 where neither can be read.
        """
        column = columns.get("steps")
        if column in table.column_names:
            return np.maximum(
                pc.fill_null(pc.cast(table[column], pa.float64()), 0.0).to_numpy(), 0.0
            )
        return (
            pc.fill_null(pc.list_value_length(table[columns["observations"]]), 0)
            .to_numpy()
            .astype(np.float64)
        )  # pyright: ignore[reportAttributeAccessIssue]

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        """Standardise and pad: each number is read once, from its row, and written once, to the
        batch.
        """
        space_index, rows = arrays["space"].tolist(), len(arrays["space"])
        spaces = [self.spaces[self.names[i]] for i in space_index]
        steps = np.array(
            [
                len(row) // space.observation
                for row, space in zip(arrays["observations"], spaces, strict=True)
            ],
            dtype=np.int64,
        )
        most = max(1, int(steps.max(initial=0)))
        own: dict[str, np.ndarray] = {"mask": np.arange(most) < steps[:, None]}
        most_acts = max((space.action for space in self.spaces.values()), default=0)
        for name, what in [(name, what) for name, what in NUMBERS.items() if name in arrays]:
            width = max((getattr(space, what) for space in self.spaces.values()), default=0)
            own[name] = out = np.zeros((rows, most, width), dtype=np.float32)
            flat = out.reshape(rows, most * width)
            for i, (row, space) in enumerate(zip(arrays[name], spaces, strict=True)):
                own_width = getattr(space, what)
                if what == "action" and space.discrete is not None:
                    places = np.arange(len(row)) * width + row.astype(np.int64)
                    flat[i, places[row >= 0]] = 1.0
                elif own_width == width:
                    space.standardise(row, what, flat[i, : len(row)])
                elif len(row):
                    out[i, : len(row) // own_width, :own_width] = space.standardise(
                        row, what, np.empty_like(row)
                    ).reshape(-1, own_width)
        if "actions" in own:
            own["action_std"] = np.ones((rows, most_acts), dtype=np.float32)
            for i, space in enumerate(spaces):
                own["action_std"][i, : len(space.action_std)] = space.action_std
        if "images" in arrays:
            size = self.options.images
            own["images"] = np.zeros((rows, most, CHANNELS, size, size), dtype=np.uint8)
            for i, row in enumerate(arrays["images"]):
                own["images"][i, : steps[i]] = row.reshape(-1, CHANNELS, size, size)
        return {name: torch.from_numpy(array) for name, array in own.items()} | super().collate(
            {name: array for name, array in arrays.items() if name not in own}
        )

    def observe(self, space: str, observations: np.ndarray) -> np.ndarray:
        """Standardise (n, O) observations of a space, given in the environment's units.

        Raises ValueError for an unknown space or another width.
        """
        of_space, values = self._space(space), np.ascontiguousarray(observations, dtype=np.float32)
        if values.ndim != 2 or values.shape[1] != of_space.observation:
            raise ValueError(
                f"space {space} has observations of {of_space.observation} numbers, these are of "
                f"shape {values.shape}"
            )
        return of_space.standardise(
            values.reshape(-1), "observation", np.empty(values.size, dtype=np.float32)
        ).reshape(values.shape)

    def act(self, space: str, actions: np.ndarray) -> np.ndarray:
        """Convert a policy's actions to the environment's units, the reverse of standardising.

        Args:
            space: Name of the space.
            actions: (n, A) standardised actions, or (n,) classes.

        Returns:
            (n, A) float32 in the environment's units, not clipped; or (n,) int64 places among the
            space's ``discrete`` names, which are sorted.

        Raises:
            ValueError: an unknown space, or another shape.
        """
        of_space, values = self._space(space), np.asarray(actions)
        if values.ndim != (2 if of_space.discrete is None else 1) or (
            of_space.discrete is None and values.shape[1] != of_space.action
        ):
            raise ValueError(f"{of_space.text()}; these actions are of shape {values.shape}")
        return (
            values.astype(np.int64)
            if of_space.discrete is not None
            else (values * of_space.action_std + of_space.action_mean).astype(np.float32)
        )

    def _space(self, name: str) -> Space:
        if name not in self.spaces:
            raise ValueError(f"unknown space {name!r}; {nearest(name, self.spaces)}")
        return self.spaces[name]


def _png(pixels: np.ndarray) -> bytes:
    """Return pixels (H, W, 3) uint8 as a PNG file."""
    sink = io.BytesIO()
    PIL.Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


class Space:
    """A space of the state: widths, class names, and statistics as arrays."""

    def __init__(
        self,
        name: str,
        observation: int,
        action: int,
        discrete: list[str] | None,
        **statistics: list[float],
    ):
        self.name = name
        self.observation = observation
        self.action = action
        self.discrete = discrete
        self.action_mean, self.action_std = (
            np.array(statistics[f"action_{which}"], dtype=np.float32) for which in ("mean", "std")
        )
        self._blocks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for what in ("observation", "action"):
            mean, std = (
                np.array(statistics[f"{what}_{which}"], dtype=np.float64)
                for which in ("mean", "std")
            )
            times = max(1, BLOCK // max(1, len(mean)))
            self._blocks[what] = (
                np.tile(mean.astype(np.float32), times),
                np.tile((1 / std).astype(np.float32), times),
            )

    def share_out_of_range(self, observations: StepValues, rows: np.ndarray) -> float:
        """Return the share of the numbers in some rows' observations that are clipped."""
        values = np.concatenate(
            [
                observations.values[observations.ends[i] : observations.ends[i + 1]]
                for i in rows.tolist()
            ]
            or [np.zeros(0, np.float32)]
        )
        if not len(values):
            return 0.0
        standardised = self.standardise(values, "observation", np.empty_like(values))
        return float(np.mean(np.abs(standardised) >= MAX_DEVIATIONS))

    def fits(self, observation: int, action: int) -> bool:
        """Tell whether rows of these widths belong to the space; ``action``: a width, NONE or
        CLASSES.
        """
        if self.observation != observation or action == NONE:
            return self.observation == observation
        return (
            self.discrete is not None
            if action == CLASSES
            else self.discrete is None and self.action == action
        )

    def text(self) -> str:
        kind = f"{self.action} numbers" if self.discrete is None else f"{self.action} classes"
        return (
            f"space {self.name} has observations of {self.observation} numbers and actions of "
            f"{kind}"
        )

    def standardise(self, values: np.ndarray, what: str, out: np.ndarray) -> np.ndarray:
        """Standardise the numbers of consecutive steps, and return ``out``.

        Args:
            values: (n * width,) of a single row.
            what: "observation", which is clipped, or "action".
            out: Array of the same shape that is written.
        """
        mean, scale = self._blocks[what]
        for start in range(0, len(values), max(1, len(mean))):
            part = out[start : start + len(mean)]
            np.subtract(values[start : start + len(mean)], mean[: len(part)], out=part)
            np.multiply(part, scale[: len(part)], out=part)
            if what == "observation":
                # np.clip takes twice as long as all of this
                part.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS, out=part)
        return out


def _describe_names(kind: str, have: Counter, fresh: Counter) -> str:
    """Describe how many names of a kind are known, and which are new, with their rows."""
    new = [f"{name} ({count} rows)" for name, count in fresh.most_common(MAX_NAMED)]
    return f"{len(have)} of {len({*have, *fresh})} {kind}s are known" + (
        f"; new: {', '.join(new)}{', ...' if len(fresh) > MAX_NAMED else ''}" if new else ""
    )
