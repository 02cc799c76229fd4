"""The metadata of a LeRobot data set (github.com/huggingface/lerobot), layouts v2.0, v2.1 and
v3.0.

v2: meta/episodes.jsonl and tasks.jsonl; one Parquet file and one video a camera for each episode.
v3: meta/episodes/chunk-*/file-*.parquet and tasks.parquet; Parquet files and videos that hold many
episodes each, whose rows and seconds the metadata names.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io import storage
from pipeline.prepare.engine.importing import SPLITS, Row, first_few, read_lines
from pipeline.prepare.readers.archives import Entry, listing
from pipeline.prepare.readers.parquet import open_parquet

INFO = "meta/info.json"
PATHS = {
    2: (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    3: (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}
"""Paths of data and videos, unless meta/info.json has others."""
ENDS = {"next.done": "terminated", "next.truncated": "truncated"}
"""Features that are true at an episode's last step if it ended so, and columns that say it."""


@dataclass(frozen=True)
class EpisodeInfo:
    """An episode in the metadata.

    Attributes:
        rows: (first row in the data set, row after the last), where it is known (v3).
        video: (file, second at which the episode begins in it) of the wanted camera.
    """

    number: int
    length: int
    tasks: tuple[str, ...]
    data: Entry
    rows: tuple[int, int] | None = None
    video: tuple[str, float] | None = None


class Feature(TypedDict):
    """A column, or a camera, in meta/info.json."""

    dtype: str
    shape: list[int]
    names: NotRequired[Any]


@dataclass(frozen=True)
class Layout:
    """The data set.

    Attributes:
        info: what meta/info.json says.
        features: by their name.
        tasks: texts by index.
        missing: (episode, reason) of those without a file.
    """

    version: str
    info: dict[str, Any]
    features: dict[str, Feature]
    tasks: dict[int, str]
    episodes: list[EpisodeInfo]
    fingerprint: str
    missing: list[tuple[int, str]] = field(default_factory=list)

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        """Names of the features that are videos or images."""
        return [name for name, of in self.features.items() if of["dtype"] in ("video", "image")]


def read_layout(source: str, camera: str) -> Layout:
    """Read the metadata below `source`.

    `camera`: the feature whose files are wanted, if it is a video. Raises ValueError for a folder
    that is no LeRobot data set, another version, and incomplete or contradictory metadata.
    """
    if not storage.exists(storage.join(source, INFO)):
        raise ValueError(
            f"{source}: no {INFO}; name the folder of a LeRobot data set, in which meta/ and "
            "data/ lie"
        )
    info = storage.read_json(storage.join(source, INFO))
    version = str(info.get("codebase_version", ""))
    major = int(found[1]) if (found := re.fullmatch(r"v?([23])\.\d+", version)) else 0
    if not major:
        raise ValueError(
            f"{source}: {INFO} says codebase_version {version!r}, which is not one of v2.0, v2.1 "
            "and v3.0; convert it with LeRobot's own scripts"
        )
    if missing_keys := [name for name in ("features", "fps") if not info.get(name)]:
        raise ValueError(f"{source}: {INFO} has no {missing_keys[0]}; download it again")
    camera = camera if info["features"].get(camera, {}).get("dtype") == "video" else ""
    files = listing(source)
    by_name = {entry.name: entry for entry in files.entries}
    records = list(
        _lines(source, "meta/episodes.jsonl", by_name) if major == 2 else _tables(source, by_name)
    )
    tasks = _tasks(source, by_name)
    episodes, missing, seen = [], [], set[int]()
    for record in sorted(records, key=lambda record: record["episode_index"]):
        number = record["episode_index"]
        if number in seen:
            raise ValueError(
                f"{source}: episode {number} occurs twice in the metadata (meta/episodes); "
                "download it again"
            )
        seen.add(number)
        data, video = _paths(info, major, record, camera)
        absent = [path for path in (data, video[0] if video else data) if path not in by_name]
        if absent:
            missing.append((number, f"no file {absent[0]}"))
            continue
        rows = None
        if major == 3:
            rows = int(record["dataset_from_index"]), int(record["dataset_to_index"])
        length, its_tasks = int(record["length"]), tuple(record.get("tasks") or ())
        its_video = (by_name[video[0]].uri, video[1]) if video else None
        episodes.append(EpisodeInfo(number, length, its_tasks, by_name[data], rows, its_video))
    return Layout(version, info, info["features"], tasks, episodes, files.fingerprint, missing)


def splits_of_info(layout: Layout, fixed: str = "") -> tuple[dict[int, str], int]:
    """Return (the split of every episode, how many are in no range of meta/info.json and so are
    train).

    `fixed`: the split of all episodes. Raises ValueError for unknown splits and overlapping ranges.
    """
    numbers = [*(one.number for one in layout.episodes), *(number for number, _ in layout.missing)]
    if fixed:
        return dict.fromkeys(numbers, fixed), 0
    ranges: list[tuple[int, int, str]] = []
    for name, text in (layout.info.get("splits") or {}).items():
        found = re.fullmatch(r"(\d+):(\d+)", str(text).strip())
        split = SPLITS.get(str(name).lower())
        if not found or not split:
            raise ValueError(
                f"{INFO}: split {name!r}: {text!r} is no range of episodes of train, "
                "validation or test; pass --set split=train"
            )
        start, stop = int(found[1]), int(found[2])
        overlapping = [other for a, b, other in ranges if max(a, start) < min(b, stop)]
        if overlapping:
            raise ValueError(
                f"{INFO}: split {name!r}: {text!r} overlaps the range of {overlapping[0]}; "
                "correct the ranges, or pass --set split=train"
            )
        ranges.append((start, stop, split))
    out = {
        number: next((split for a, b, split in ranges if a <= number < b), "") for number in numbers
    }
    return {number: split or "train" for number, split in out.items()}, sum(
        not split for split in out.values()
    )


def _paths(
    info: dict[str, Any],
    major: int,
    record: Row,
    camera: str,
) -> tuple[str, tuple[str, float] | None]:
    """Return an episode's Parquet file and (its video, the second at which it begins there)."""
    data, video = (
        info.get(name) or default
        for name, default in zip(("data_path", "video_path"), PATHS[major], strict=True)
    )
    number = record["episode_index"]
    try:
        if major == 2:
            of = {
                "episode_chunk": number // int(info.get("chunks_size") or 1000),
                "episode_index": number,
                "total_episodes": info.get("total_episodes", 0),
            }
            return data.format(**of), (
                video.format(**of, video_key=camera),
                0.0,
            ) if camera else None
        at = {name: record[f"data/{name}"] for name in ("chunk_index", "file_index")}
        if not camera:
            return data.format(**at), None
        seen = {
            name: record[f"videos/{camera}/{name}"]
            for name in ("chunk_index", "file_index", "from_timestamp")
        }
        return data.format(**at), (
            video.format(**seen, video_key=camera),
            float(seen["from_timestamp"]),
        )
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"episode {number}: where its files lie is not told: {error} in data_path, "
            f"video_path ({INFO}) or meta/episodes"
        ) from None


def _lines(source: str, name: str, by_name: dict[str, Entry]) -> Iterator[Row]:
    """Read the objects of a file of JSON lines."""
    if name not in by_name:
        raise ValueError(
            f"{source}: no {name}, which a data set of layout v2 has; download it again"
        )
    for number, line in enumerate(read_lines(by_name[name].uri), 1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}:{number}: not JSON ({error}); download it again") from None
        required = (
            ("episode_index", "length")
            if name.endswith("episodes.jsonl")
            else ("task_index", "task")
        )
        if not isinstance(found, dict) or any(key not in found for key in required):
            raise ValueError(
                f"{name}:{number}: an object with {' and '.join(required)} is needed; download it "
                "again"
            )
        yield found


def _tables(source: str, by_name: dict[str, Entry]) -> Iterator[Row]:
    """Read the rows of meta/episodes, without the statistics."""
    names = [
        name for name in by_name if name.startswith("meta/episodes/") and name.endswith(".parquet")
    ]
    if not names:
        raise ValueError(
            f"{source}: no meta/episodes/chunk-000/file-000.parquet, which a data set of "
            "layout v3 has; download it again"
        )
    for name in sorted(names):
        file = _parquet(by_name[name])
        columns = [column for column in file.schema_arrow.names if not column.startswith("stats/")]
        for required in ("episode_index", "length", "dataset_from_index", "dataset_to_index"):
            if required not in columns:
                raise ValueError(f"{name}: no column {required!r}; there are {first_few(columns)}")
        yield from file.read(columns=columns).to_pylist()


def _tasks(source: str, by_name: dict[str, Entry]) -> dict[int, str]:
    """Return the texts of tasks by index; empty where the data set names none."""
    if "meta/tasks.parquet" in by_name:
        table = _parquet(by_name["meta/tasks.parquet"]).read()
        text = next(
            (name for name in ("task", "__index_level_0__") if name in table.column_names), ""
        )
        if "task_index" not in table.column_names or not text:
            raise ValueError(
                "meta/tasks.parquet: columns task_index and task are needed; there are "
                f"{first_few(table.column_names)}"
            )
        texts = table[text].cast(pa.string()).to_pylist()
        return dict(zip(table["task_index"].to_pylist(), texts, strict=True))
    if "meta/tasks.jsonl" not in by_name:
        return {}
    rows = _lines(source, "meta/tasks.jsonl", by_name)
    return {int(row["task_index"]): str(row["task"]) for row in rows}


def _parquet(entry: Entry) -> pq.ParquetFile:
    return open_parquet(io.BytesIO(storage.read_bytes(entry.uri)), entry.name)
