"""Prepared episodes as a LeRobot data set (github.com/huggingface/lerobot), layout v3.0.

Written as LeRobot 0.6 itself writes: ``meta/info.json``, ``stats.json``, ``tasks.parquet`` and
``episodes/``, and ``data/`` with one row a step. Frames lie in the rows as they are (dtype
``image``), not as video, which would lose some of each.

Policies are written by `pipeline.checkpoints.exports.lerobot`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checkpoints import export_folder
from pipeline.core.arrow_compute import pc
from pipeline.core.sampling import evenly_spread
from pipeline.data.manifests import SPLITS
from pipeline.io import atomic_folder, storage
from pipeline.media import image_io
from pipeline.prepare.engine.episodes import VECTORS, as_matrix
from pipeline.prepare.engine.importing import first_few
from pipeline.prepare.engine.write import MANIFEST
from pipeline.prepare.readers.lerobot_layout import ENDS, INFO, PATHS, Feature
from pipeline.prepare.readers.parquet import open_parquet

KIND = "lerobot"
"""Name of this kind of export."""
STATE, ACTION, REWARD = "observation.state", "action", "next.reward"
CAMERA = "observation.images.camera"
"""Name of the camera, where the folder does not say another one."""
WRITTEN = ("task", "embodiment", "observations", "actions", "rewards", "images", *ENDS.values())
"""Columns that have a place in a LeRobot data set."""
IMPLIED = ("episode", "steps", "split")
"""Columns that follow from the order and number of episodes and steps."""
DATA_PATH = PATHS[3][0]
FILES_PER_CHUNK = 1000
"""Files in a folder, LeRobot's default."""
FILE_MB = 100
"""Size at which LeRobot begins a new file, in MiB."""
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MEASURED_FRAMES = 100
"""Frames of an episode that its image statistics are computed from, evenly spaced."""

Statistics = dict[str, np.ndarray]
"""min, max, mean, std and quantiles of a column, (W,) or for images (3, 1, 1), and count (1,)."""


def export(source: str, output: str, fps: float | None = None) -> str:
    """Write the episodes of a prepared folder as a LeRobot data set.

    ``observation.state`` are the observations; ``next.done`` and ``next.truncated`` are true at the
    last step of an episode that ended so. Splits become the ranges of episodes of
    ``meta/info.json``, in the order train, validation, test.

    Args:
        source: A folder of `prepare` with one episode a row.
        output: The new folder.
        fps: Steps a second. None: what the folder says.

    Returns:
        What was written, and which columns have no place there.

    Raises:
        ValueError: There is something at ``output``, or LeRobot has no place for such episodes:
            actions that are names of classes, several robots, images that are not RGB, steps a
            second that are unknown or no whole number, or observations, actions or images whose
            shape differs between episodes.
    """
    storage.refuse_read_only(output)
    if storage.exists(output):
        raise ValueError(f"{output} is there already; give a new folder, or remove it first")
    manifest = _manifest(source)
    about, columns = manifest.get("about") or {}, manifest["columns"]
    rate = _steps_per_second(source, fps, about)
    with storage.scratch_folder() as scratch:
        folder = Path(scratch, "folder")
        written = _Dataset(folder, rate, about)
        for row, split in _rows(source, manifest["files"]):
            written.add(row, split)
        written.finish()
        # no place of this machine: it is uploaded with the rest
        origin = {"kind": KIND, "sha256_of_source": manifest["sha256"]}
        export_folder.move_into_place(folder, output, origin)
    left_out = [name for name in columns if name not in (*WRITTEN, *IMPLIED)]
    return (
        f"{output}: LeRobot data set v3.0, {len(written.episodes)} episodes of "
        f"{written.frames} steps at {rate} a second"
        + (f"; without {first_few(left_out)}, which have no place there" if left_out else "")
    )


def is_prepared(source: str) -> bool:
    """Return whether a place is a folder of `prepare`."""
    return storage.exists(storage.join(source, MANIFEST))


def _manifest(source: str) -> dict[str, Any]:
    """Return the manifest of a prepared folder. Raises ValueError for one without episodes."""
    what = "a folder that `onetomany prepare` wrote with one episode a row"
    manifest = atomic_folder.open_folder(source, MANIFEST)
    columns = manifest["columns"]
    if columns.get("observations") != str(VECTORS):
        raise ValueError(
            f"{source}: no column observations with a list of numbers a step; --kind {KIND} takes "
            f"{what}; there are {first_few(columns)}"
        )
    if columns.get("actions", str(VECTORS)) != str(VECTORS):
        raise ValueError(f"{source}: actions are names of classes; those of LeRobot are numbers")
    return manifest


def _steps_per_second(source: str, fps: float | None, about: dict[str, Any]) -> int:
    """Return the steps a second that are given, else those of the folder."""
    found = fps if fps is not None else about.get("fps")
    if found is None:
        raise ValueError(f"{source} does not say how many steps a second has; pass --fps 10")
    if found <= 0 or found != int(found):
        said = f"--fps {found:g}" if fps is not None else f"{source} has {found:g} steps a second"
        raise ValueError(f"{said}: LeRobot takes a whole number above 0; pass --fps 10")
    return int(found)


def _rows(source: str, files: dict[str, Any]) -> Iterator[tuple[pa.Table, str]]:
    """Yield each episode as a table of one row, and its split, those of a split together."""
    for name in sorted(files, key=lambda name: (SPLITS.index(files[name]["split"]), name)):
        with storage.open_read(storage.join(source, name)) as handle:
            for batch in open_parquet(handle, name).iter_batches(batch_size=1):
                yield pa.Table.from_batches([batch]), files[name]["split"]


class _Dataset:
    """The files of a data set, written episode by episode."""

    def __init__(self, folder: Path, fps: int, about: dict[str, Any]):
        self.folder = folder
        self.fps = fps
        self.about = about
        self.features: dict[str, Feature] = {}
        self.robot: str | None = None
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.statistics: list[dict[str, Statistics]] = []
        self.splits: list[str] = []
        self.frames = 0
        self.file_number = -1
        self.writer: pq.ParquetWriter | None = None
        self.path = folder

    def add(self, row: pa.Table, split: str) -> None:
        """Write the steps of an episode."""
        name = row["episode"][0].as_py()
        try:
            columns = self._columns(row)
        except (ValueError, OSError) as error:
            raise ValueError(f"episode {name}: {error}") from None
        robot = row["embodiment"][0].as_py() or "unknown"
        if self.robot not in (None, robot):
            raise ValueError(
                f"episode {name} is of robot {robot}, others are of {self.robot}: a LeRobot data "
                "set is of one; prepare them apart"
            )
        self.robot = robot
        number, steps = len(self.episodes), len(columns["timestamp"])
        table = pa.table(
            {name: _column(values, self.features[name]) for name, values in columns.items()}
        )
        chunk, file = self._write(table)
        self.statistics.append(
            {name: _measured(values, self.features[name]) for name, values in columns.items()}
        )
        self.splits.append(split)
        self.episodes.append(
            {
                "episode_index": number,
                "tasks": [row["task"][0].as_py() or ""],
                "length": steps,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + steps,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self.frames += steps

    def _columns(self, row: pa.Table) -> dict[str, Any]:
        """Return the columns of an episode's steps, arrays (T, ...) or T files of images.

        Those of the first episode define ``features``. Raises ValueError where others differ.
        """
        observations = as_matrix(pc.list_flatten(row["observations"]), "observations")
        steps = len(observations)
        out: dict[str, Any] = {STATE: observations.astype(np.float32)}
        if "actions" in row.column_names:
            out[ACTION] = as_matrix(pc.list_flatten(row["actions"]), "actions").astype(np.float32)
        if "rewards" in row.column_names:
            out[REWARD] = pc.list_flatten(row["rewards"]).to_numpy().astype(np.float32)
        for name, ended in ENDS.items():
            out[name] = (np.arange(steps) == steps - 1) & row[ended][0].as_py()
        if "images" in row.column_names:
            out[self.about.get("images") or CAMERA] = row["images"][0].as_py()
        task = self.tasks.setdefault(row["task"][0].as_py() or "", len(self.tasks))
        out |= {
            "timestamp": (np.arange(steps) / self.fps).astype(np.float32),
            "frame_index": np.arange(steps),
            "episode_index": np.full(steps, len(self.episodes)),
            "index": self.frames + np.arange(steps),
            "task_index": np.full(steps, task),
        }
        for name, values in out.items():
            feature = self._feature(name, values)
            if self.features.setdefault(name, feature) != feature:
                raise ValueError(
                    f"{name} is of shape {feature['shape']}, in the first episode it is "
                    f"{self.features[name]['shape']}"
                )
            if len(values) != steps:
                raise ValueError(f"it has {steps} observations and {len(values)} of {name}")
        return out

    def _feature(self, name: str, values: Any) -> Feature:
        if isinstance(values, list):
            return {
                "dtype": "image",
                "shape": _image_shape(values),
                "names": ["height", "width", "channels"],
            }
        shape = list(values.shape[1:]) or [1]
        role = {STATE: "observations", ACTION: "actions"}.get(name, "")
        names = _names(self.about, role)
        is_of_each = len(names) == shape[0]
        return {"dtype": str(values.dtype), "shape": shape, "names": names if is_of_each else None}

    def _write(self, table: pa.Table) -> tuple[int, int]:
        """Write an episode as a row group, and return its chunk and file."""
        writer = self.writer
        if writer is None or self.path.stat().st_size + table.nbytes > FILE_MB * 2**20:
            writer = self._next_file(table.schema)
        writer.write_table(table)
        return divmod(self.file_number, FILES_PER_CHUNK)

    def _next_file(self, schema: pa.Schema) -> pq.ParquetWriter:
        self._close()
        self.file_number += 1
        chunk, file = divmod(self.file_number, FILES_PER_CHUNK)
        self.path = self.folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = pq.ParquetWriter(self.path, schema)
        return self.writer

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def finish(self) -> None:
        """Write what the files of ``meta/`` say of all episodes."""
        import pandas as pd

        self._close()
        meta = self.folder / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for episode, statistics in zip(self.episodes, self.statistics, strict=True):
            row = dict(episode)
            for name, measured in statistics.items():
                row |= {
                    f"stats/{name}/{which}": value.tolist() for which, value in measured.items()
                }
            rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), meta / "episodes/chunk-000/file-000.parquet")
        index = pd.Index(list(self.tasks), name="task")
        pd.DataFrame({"task_index": list(self.tasks.values())}, index).to_parquet(
            meta / "tasks.parquet"
        )
        combined = {
            name: {
                which: value.tolist()
                for which, value in _combined([one[name] for one in self.statistics]).items()
            }
            for name in self.features
        }
        storage.write_json(str(meta / "stats.json"), combined)
        storage.write_json(str(self.folder / INFO), self._info())

    def _info(self) -> dict[str, Any]:
        ranges, first = {}, 0
        for split, members in groupby(self.splits):
            last = first + len(list(members))
            ranges[split] = f"{first}:{last}"
            first = last
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot,
            "total_episodes": len(self.episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": FILE_MB,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": ranges,
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self.features,
        }


def _names(about: dict[str, Any], role: str) -> list[str]:
    """Return the names of an observation's or action's numbers, as far as they are known.

    They are columns of a table, or the features of a LeRobot data set, which name their numbers.
    """
    columns = about.get(role) or []
    of_features = about.get("names") or {}
    names: list[str] = []
    for column in [columns] if isinstance(columns, str) else columns:
        of_column = of_features.get(column) or [column]
        if isinstance(of_column, dict):  # {"motors": ["elbow", ...]}, or {"delta_x": 0, ...}
            groups = [of if isinstance(of, list) else [key] for key, of in of_column.items()]
            of_column = chain.from_iterable(groups)
        names += of_column
    return names


def _image_shape(files: list[bytes]) -> list[int]:
    """Return (height, width, channels) of frames. Raises ValueError for unequal and grey ones."""
    found = set()
    for data in files:
        with PIL.Image.open(io.BytesIO(data)) as image:
            found.add((image.height, image.width, image.mode))
    if len(found) != 1 or next(iter(found))[2] != "RGB":
        seen = ", ".join(f"{width} x {height} {mode}" for height, width, mode in sorted(found))
        raise ValueError(f"images are {seen}; those of LeRobot are of one size, in colour (RGB)")
    return [*next(iter(found))[:2], 3]


def _column(values: Any, feature: Feature) -> pa.Array:
    """Return a column as the library ``datasets`` writes it for such a feature."""
    if feature["dtype"] == "image":
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        return pa.array([{"bytes": data, "path": None} for data in values], kind)
    flat = pa.array(values.reshape(-1))
    width = feature["shape"][0]
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


# ---------------------------------------------------------------- statistics


def _measured(values: Any, feature: Feature) -> Statistics:
    """Measure one episode's column: (n,) for numbers, (3, 1, 1) in [0, 1] for images."""
    if feature["dtype"] != "image":
        return _over_rows(values.reshape(len(values), -1).astype(np.float64), len(values))
    places = evenly_spread(len(values), MEASURED_FRAMES)
    frames = [image_io.pixels(values[place], 3).flatten(1).numpy() for place in places]
    found = _over_rows(np.concatenate(frames, axis=1).T / 255, len(frames))
    return {
        which: value if which == "count" else value[:, None, None] for which, value in found.items()
    }


def _over_rows(values: np.ndarray, count: int) -> Statistics:
    """Return statistics (W,) over the rows of values (N, W); ``count``: steps or frames in them."""
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([count]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def _combined(episodes: list[Statistics]) -> Statistics:
    """Combine the statistics of episodes as LeRobot does.

    Mean and standard deviation are those of all steps, quantiles the mean of the episodes' own,
    weighted by their steps.
    """
    stacked = {name: np.stack([one[name] for one in episodes]) for name in episodes[0]}
    count = stacked.pop("count")
    num_axes = stacked["mean"].ndim - 1
    shares = (count / count.sum()).reshape(-1, *[1] * num_axes)
    mean = (stacked["mean"] * shares).sum(0)
    variance = ((stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2) * shares).sum(0)
    return {
        "min": stacked["min"].min(0),
        "max": stacked["max"].max(0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count.sum(0),
        **{name: (stacked[name] * shares).sum(0) for name in QUANTILES},
    }
