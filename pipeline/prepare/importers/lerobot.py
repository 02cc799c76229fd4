"""LeRobot data sets (v2.0, v2.1 and v3.0) to one row an episode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import registry
from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.prepare.engine.episodes import (
    Episode,
    EpisodeImporter,
    Episodes,
    Result,
    UnusableError,
    as_matrix,
    episode_fields,
    episode_row,
    number_problem,
)
from pipeline.prepare.engine.images import BYTES_PER_PIXEL
from pipeline.prepare.engine.importing import first_few, invalid_row, parse_names
from pipeline.prepare.engine.inputs import InputSplit, SplitReader
from pipeline.prepare.engine.shard_tasks import Settings
from pipeline.prepare.readers import lerobot_layout, parquet, video
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.lerobot_layout import ENDS, EpisodeInfo, Layout
from pipeline.prepare.readers.picture_check import BrokenImageError, examine

INDICES = ("episode_index", "frame_index", "index", "timestamp", "task_index")
NUMBERS = ("float", "double", "int", "uint", "bool", "half")
"""Prefixes of the dtypes of features that are numbers."""


class LerobotOptions(Options):
    observations: str = Field(
        "",
        description="features that make an observation, in order: observation.state; empty: all "
        "observation.* that are numbers, in the order of meta/info.json",
    )
    actions: str = Field("action", description="the feature that is the action; empty: none")
    images: str = Field(
        "",
        description="camera whose frames are kept: observation.images.front; videos (extra "
        "robotics) as JPEG, images as they are; empty: none",
    )
    embodiment: str = Field("", description="the robot's name; empty: robot_type of meta/info.json")
    split: Literal["", "train", "validation", "test"] = Field(
        "", description="the split of all episodes; empty: as meta/info.json has them"
    )


@register("importer", "lerobot", options=LerobotOptions)
class Lerobot(EpisodeImporter):
    """LeRobot data sets: episodes of a robot.

    SOURCE is the folder with meta/ and data/, in layout v2.0 or v2.1 (a file for each episode) or
    v3.0 (many episodes in a file). Columns of a row, which is an episode:

    - episode, embodiment, steps, split; task: its text
    - observations, actions, and rewards (next.reward) if there are any
    - terminated: next.done of the last row; truncated: next.truncated, or without that column, an
      end that is not terminated
    - images, with --set images=CAMERA: the frame nearest to each row's timestamp. Without --resize
      and --quality, stored images keep their bytes.

    Left out and counted by reason: episodes whose rows and metadata disagree (number of rows, range
    of index, widths), without their files or frames, or with values that are not finite.
    """

    label = "task"
    sees = True

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.layout = Layout("", {}, {}, {}, [], "")
        self.observed: list[str] = []

    # ------------------------------------------------------------ what there is

    def index(self, source: str, settings: Settings) -> Episodes:
        o = self.options
        layout = lerobot_layout.read_layout(source, o.images)
        self.observed = self._check(layout, source)
        if o.images and layout.features[o.images]["dtype"] == "video":
            video.import_pyav()
        if not o.images and (settings.resize or settings.quality):
            raise ValueError(
                "--resize and --quality say how images are written; name a camera: --set "
                "images=observation.images.front"
            )
        split, outside = lerobot_layout.splits_of_info(layout, o.split)
        episodes = sorted(layout.episodes, key=lambda one: (split[one.number], one.number))
        if not episodes:
            why = f"; of {len(layout.missing)} in the metadata none has its files"
            raise ValueError(f"{source}: no episodes{why if layout.missing else ''}")
        numbers = sum(map(self._width, [*self.observed, *filter(None, [o.actions])]))
        step_bytes = 4 * numbers + self._image_bytes(layout, settings)
        cameras = [name for name in layout.cameras if name != o.images]
        self.layout = replace(layout, episodes=[], missing=[])  # it travels to every task
        notes = {
            "layout": layout.version,
            **(
                {"cameras left out (--set images= takes one)": first_few(cameras)}
                if cameras
                else {}
            ),
            **({"episodes in no range of splits, taken as train": outside} if outside else {}),
        }
        info = {
            "observations": self.observed,
            "actions": o.actions,
            "images": o.images,
            "fps": layout.fps,
            "layout": layout.version,
            "names": {
                name: layout.features[name].get("names")
                for name in (*self.observed, o.actions)
                if name
            },
        }
        invalid = [
            invalid_row(f"episode {number}", split[number], why) for number, why in layout.missing
        ]
        columns = episode_fields(
            False if o.actions else None, "next.reward" in layout.features, bool(o.images)
        )
        return Episodes(
            [(one, split[one.number]) for one in episodes],
            [split[one.number] for one in episodes],
            np.array([one.length * step_bytes for one in episodes], dtype=np.float64),
            columns,
            layout.fingerprint,
            notes,
            info,
            invalid,
        )

    def _check(self, layout: Layout, source: str) -> list[str]:
        """Return the observed features. Raises ValueError for one that is no vector of numbers."""
        o, features = self.options, layout.features
        self.layout = layout
        numbers = [
            name
            for name, about in features.items()
            if str(about["dtype"]).startswith(NUMBERS) and len(about["shape"]) == 1
        ]
        named = parse_names(o.observations)
        for option, names in (
            ("observations", named),
            ("actions", [o.actions] if o.actions else []),
        ):
            for name in names:
                if name not in numbers:
                    what = (
                        f"is {features[name]['dtype']} of shape {features[name]['shape']}"
                        if name in features
                        else "is not there"
                    )
                    raise ValueError(
                        f"{source}: feature {name!r} for --set {option} {what}, where rows of "
                        f"numbers are needed; {registry.nearest(name, numbers)}"
                    )
        if o.images and o.images not in layout.cameras:
            nearest = (
                registry.nearest(o.images, layout.cameras) if layout.cameras else "it has none"
            )
            raise ValueError(f"{source}: no camera {o.images!r} for --set images; {nearest}")
        found = named or [name for name in numbers if name.startswith("observation.")]
        if not found:
            raise ValueError(
                f"{source}: no observation.* that is a row of numbers; name the features: "
                f"--set observations=; there are {first_few(numbers)}"
            )
        return found

    def _width(self, name: str) -> int:
        return int(self.layout.features[name]["shape"][0])

    def _image_bytes(self, layout: Layout, settings: Settings) -> float:
        if not self.options.images:
            return 0.0
        shape = [int(side) for side in layout.features[self.options.images]["shape"]]
        height, width = sorted(shape)[-2:]
        scale = min(1.0, settings.resize / min(height, width)) if settings.resize else 1.0
        return BYTES_PER_PIXEL * height * width * scale**2

    # ------------------------------------------------------------ the episodes of a part

    def episodes(
        self,
        items: list[tuple[EpisodeInfo, str]],
        settings: Settings,
    ) -> Iterator[Result]:
        with Opener() as opener:
            for _, group in groupby(items, key=lambda item: item[0].data.uri):
                wanted = {episode.number: (episode, split) for episode, split in group}
                left = dict(wanted)
                for number, rows in self._episodes_of_file(
                    next(iter(wanted.values()))[0], wanted, opener
                ):
                    if number not in left:
                        raise ValueError(
                            f"{wanted[number][0].data.name}: the rows of episode {number} do "
                            "not stand together; download the file again"
                        )
                    yield self._result(*left.pop(number), rows, settings)
                for episode, split in left.values():
                    file, length = episode.data.name, episode.length
                    reason = f"no row of it in {file}, but its length in the metadata is {length}"
                    yield self._left_out(episode, split, reason)

    def _episodes_of_file(
        self,
        first: EpisodeInfo,
        wanted: dict[int, Any],
        opener: Opener,
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield (number, rows) of the wanted episodes of a file, with one in memory."""
        entry = first.data
        input_split = InputSplit(
            entry.name,
            "",
            entry,
            0,
            max(1, len(parquet.row_group_bytes(entry))),
            entry.size,
        )
        with parquet.open_split(SplitReader(input_split, opener)) as file:
            names = file.schema_arrow.names
            start, stop = _groups(file.metadata, wanted)
        more = [name for name in ("next.reward", *ENDS) if name in self.layout.features]
        needed = [
            *self.observed,
            *filter(None, [self.options.actions]),
            *more,
            *self._stored_images(),
        ]
        if missing_columns := [name for name in ("episode_index", *needed) if name not in names]:
            raise ValueError(
                f"{entry.name}: no column {missing_columns[0]!r}, which meta/info.json names; "
                f"there are {first_few(names)}"
            )
        if first.video is not None and "timestamp" not in names:
            raise ValueError(
                f"{entry.name}: no column 'timestamp', by which the frames of "
                f"{self.options.images} are found; download the file again, or leave "
                f"--set images= out; there are {first_few(names)}"
            )
        held: list[pa.Table] = []
        current = -1
        reading = SplitReader(input_split._replace(start=start, stop=stop), opener)
        for _, batch in parquet.batches(
            reading, list(dict.fromkeys([*(name for name in INDICES if name in names), *needed]))
        ):
            numbers = batch["episode_index"].to_numpy()
            cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for a, b in pairwise(cuts):
                if b > a and int(numbers[a]) != current:
                    if held:
                        yield current, pa.concat_tables(held).combine_chunks()
                    held, current = [], int(numbers[a])
                if current in wanted and b > a:
                    held.append(batch.slice(a, b - a))
        if held:
            yield current, pa.concat_tables(held).combine_chunks()

    def _stored_images(self) -> list[str]:
        """The camera's column, if frames are stored in the Parquet files."""
        name = self.options.images
        return [name] if name and self.layout.features[name]["dtype"] == "image" else []

    def _left_out(self, episode: EpisodeInfo, split: str, reason: str) -> Result:
        return Result(split, invalid=invalid_row(f"episode {episode.number}", split, reason))

    def _result(
        self,
        episode: EpisodeInfo,
        split: str,
        rows: pa.Table,
        settings: Settings,
    ) -> Result:
        try:
            _check_rows(episode, rows)
            if not len(rows):
                raise UnusableError("it has no rows")
            found = self._episode(episode, rows, settings)
        except (UnusableError, BrokenImageError) as error:
            return self._left_out(episode, split, str(error))
        several = "task_index" in rows.column_names and len(pc.unique(rows["task_index"])) > 1
        amounts = {
            "steps": len(rows),
            **({"episodes of several tasks, named by their first": 1} if several else {}),
        }
        return Result(split, episode_row(found, split), amounts=amounts)

    def _episode(self, episode: EpisodeInfo, rows: pa.Table, settings: Settings) -> Episode:
        o = self.options
        parts = [as_matrix(rows[name], name, self._width(name)) for name in self.observed]
        actions = (
            as_matrix(rows[o.actions], o.actions, self._width(o.actions)) if o.actions else None
        )
        rewards = (
            as_matrix(rows["next.reward"], "next.reward", 1)[:, 0]
            if "next.reward" in self.layout.features
            else None
        )
        for name, values in [
            *zip(self.observed, parts, strict=True),
            (o.actions, actions),
            ("next.reward", rewards),
        ]:
            if values is not None and (why := number_problem(values, name)):
                raise UnusableError(why)
        ended = {
            name: bool(as_matrix(rows[name], name, 1)[-1, 0])
            for name in ENDS
            if name in self.layout.features
        }
        terminated = ended.get("next.done", False)
        robot = o.embodiment or str(self.layout.info.get("robot_type") or "")
        return Episode(
            f"episode_{episode.number:06d}",
            np.concatenate(parts, axis=1).astype(np.float32),
            actions,
            terminated,
            ended.get("next.truncated", not terminated),
            rewards,
            self._images(episode, rows, settings),
            self._task(episode, rows),
            "" if robot == "unknown" else robot,
        )

    def _task(self, episode: EpisodeInfo, rows: pa.Table) -> str:
        if "task_index" in rows.column_names and self.layout.tasks:
            number = rows["task_index"][0].as_py()
            if number not in self.layout.tasks:
                raise UnusableError(
                    f"task_index {number} is not one of the {len(self.layout.tasks)} tasks of "
                    "meta/tasks"
                )
            return self.layout.tasks[number]
        return episode.tasks[0] if episode.tasks else ""

    def _images(
        self,
        episode: EpisodeInfo,
        rows: pa.Table,
        settings: Settings,
    ) -> list[bytes] | None:
        if not self.options.images:
            return None
        if episode.video is not None:
            uri, start = episode.video
            return video.frames_at(
                uri,
                start + rows["timestamp"].to_numpy().astype(np.float64),
                0.5 / self.layout.fps,
                settings.resize,
                settings.quality,
            )
        found = rows[self.options.images].to_pylist()
        return [
            examine(
                (one.get("bytes") if isinstance(one, dict) else one) or b"",
                settings.resize,
                settings.quality,
            ).data
            for one in found
        ]


def _groups(about: Any, wanted: dict[int, Any]) -> tuple[int, int]:
    """Return the range of row groups that may hold wanted episodes, by the file's statistics."""
    low, high = min(wanted), max(wanted)
    paths = [about.schema.column(i).path for i in range(about.num_columns)]
    column = paths.index("episode_index") if "episode_index" in paths else None
    held = []
    for i in range(about.num_row_groups):
        found = about.row_group(i).column(column).statistics if column is not None else None
        if found is None or not found.has_min_max or (found.min <= high and found.max >= low):
            held.append(i)
    return (held[0], held[-1] + 1) if held else (0, 0)


def _check_rows(episode: EpisodeInfo, rows: pa.Table) -> None:
    """Raise UnusableError where an episode's rows are not those that the metadata names."""
    where = episode.data.name
    if episode.rows is not None and episode.rows[1] - episode.rows[0] != episode.length:
        raise UnusableError(
            f"dataset_from_index {episode.rows[0]} to dataset_to_index {episode.rows[1]} are "
            f"{episode.rows[1] - episode.rows[0]} rows, but its length in the metadata is "
            f"{episode.length}"
        )
    if len(rows) != episode.length:
        raise UnusableError(
            f"{len(rows)} rows in {where}, but its length in the metadata is {episode.length}"
        )
    columns = {
        name: rows[name].to_numpy()
        for name in ("index", "frame_index", "timestamp")
        if name in rows.column_names
    }
    index = columns.get("index")
    if (
        episode.rows is not None
        and index is not None
        and (index[0] != episode.rows[0] or index[-1] != episode.rows[1] - 1)
    ):
        raise UnusableError(
            f"index goes from {index[0]} to {index[-1]} in {where}, but the metadata has rows "
            f"{episode.rows[0]} to {episode.rows[1] - 1}"
        )
    frame = columns.get("frame_index")
    if frame is not None and (frame != np.arange(len(rows))).any():
        at = int(np.argmax(frame != np.arange(len(rows))))
        raise UnusableError(
            f"frame_index is {frame[at]} in step {at} of {where}, which should count from 0"
        )
    times = columns.get("timestamp")
    if times is not None and (np.isnan(times).any() or (np.diff(times) <= 0).any()):
        raise UnusableError(
            f"timestamp does not ascend in {where}, at step "
            f"{int(np.argmax(~(np.diff(times) > 0))) + 1}"
        )
