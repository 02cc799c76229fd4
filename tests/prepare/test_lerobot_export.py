"""Prepared episodes as a LeRobot data set: read back by the importer, by ``datasets`` and pandas in
the way that LeRobot itself reads (release 0.6.1, which opened such folders on 2026-12-01 with equal
statistics; its package wants Python 3.12), and what is refused.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import encoded, read

from pipeline.api import export, push
from pipeline.checkpoints.export_folder import EXPORTED
from pipeline.io import atomic_folder, storage
from pipeline.prepare import lerobot_export
from pipeline.prepare.engine.episodes import Episode, episode_row
from pipeline.prepare.engine.write import MANIFEST

FRONT = "observation.images.front"
FPS = 25
prepare = partial(conftest.prepare, "lerobot")


def episode(number: int, steps: int = 4, **changed) -> Episode:
    """An episode whose numbers no other one has."""
    rng = np.random.default_rng(number)
    values = {
        "name": f"episode_{number:06d}",
        "observations": rng.standard_normal((steps, 3)).astype(np.float32),
        "actions": rng.standard_normal((steps, 1)).astype(np.float32),
        "terminated": number % 2 == 0,
        "truncated": number % 3 == 0,
        "rewards": rng.standard_normal(steps).astype(np.float32),
        "images": [encoded(100 * number + step, size=(12, 8)) for step in range(steps)],
        "task": ["pick the cube", "", "open the drawer"][number % 3],
        "embodiment": "so100",
    }
    return Episode(**{**values, **changed})


def prepared(folder: Path, episodes: list[tuple[Episode, str]], **about) -> str:
    """A folder of `prepare` with these episodes, one a file."""
    files, more = {}, {"executed": pa.array([[1.0]])}
    folder.mkdir()
    for place, (one, split) in enumerate(episodes):
        name = f"{split}-{place:05d}.parquet"
        table = episode_row(one, split, more)
        pq.write_table(table, folder / name)
        files[name] = {"split": split}
    columns = {field.name: str(field.type) for field in table.schema}
    manifest = {"about": {"fps": FPS, **about}, "columns": columns, "files": files}
    storage.write_json(str(folder / MANIFEST), atomic_folder.with_checksum(manifest))
    return str(folder)


EPISODES = [
    (episode(2, steps=6), "test"),
    (episode(0), "train"),
    (episode(1, steps=3), "train"),
]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A data set of two files: a file takes one episode, or two of little size."""
    monkeypatch.setattr(lerobot_export, "FILE_MB", 0.006)
    names = ["a", "b", "c"]
    source = prepared(tmp_path / "in", EPISODES, images=FRONT, observations=names)
    text = export(source, str(tmp_path / "out"), kind="lerobot")
    assert "3 episodes of 13 steps at 25 a second; without executed" in text
    return tmp_path / "out"


def test_episodes_are_read_back_as_they_were(written, tmp_path):
    prepare(written, tmp_path / "again", f"images={FRONT}")
    found = {row["episode"]: row for row in read(tmp_path / "again")}
    expected = {one.name: episode_row(one, split).to_pylist()[0] for one, split in EPISODES}
    assert found == expected
    assert len(list((written / "data/chunk-000").iterdir())) == 2


def test_the_folder_names_no_place_of_this_machine(written):
    described = json.loads((written / EXPORTED).read_text())
    assert str(written.parent) not in json.dumps(described) and described["sha256_of_source"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lerobot", {"target": "task"}, "leave --target, --backbone-only and --plugin out"),
        ("lerobot", {"backbone_only": True}, "leave --target, --backbone-only and --plugin out"),
        ("lerobot", {"plugins": ["mine.py"]}, "leave --target, --backbone-only and --plugin out"),
        ("onnx", {"fps": 10}, "a network has no steps a second: leave --fps out"),
    ],
)
def test_options_that_a_kind_does_not_read_are_refused(kind, options, message, tmp_path):
    if kind == "lerobot":  # a prepared folder
        (tmp_path / lerobot_export.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path), str(tmp_path / "out"), kind=kind, **options)


def test_the_files_are_read_as_lerobot_reads_them(written):
    import datasets

    info = json.loads((written / "meta/info.json").read_text())
    numbers = {"frame_index", "episode_index", "index", "task_index"}
    assert {name: (of["dtype"], of["shape"]) for name, of in info["features"].items()} == {
        "observation.state": ("float32", [3]),
        "action": ("float32", [1]),
        "next.reward": ("float32", [1]),
        "next.done": ("bool", [1]),
        "next.truncated": ("bool", [1]),
        FRONT: ("image", [8, 12, 3]),
        "timestamp": ("float32", [1]),
        **dict.fromkeys(numbers, ("int64", [1])),
    }
    assert info["features"]["observation.state"]["names"] == ["a", "b", "c"]
    assert info["splits"] == {"train": "0:2", "test": "2:3"} and info["fps"] == FPS
    kinds = {
        name: datasets.Image()
        if of["dtype"] == "image"
        else datasets.Value(of["dtype"])
        if of["shape"] == [1]
        else datasets.Sequence(datasets.Value(of["dtype"]), length=of["shape"][0])
        for name, of in info["features"].items()
    }
    files = [str(file) for file in sorted((written / "data").glob("*/*.parquet"))]
    cache = str(written / "cache")
    rows = datasets.Dataset.from_parquet(
        files, features=datasets.Features(kinds), cache_dir=cache
    ).with_format("numpy")
    tasks = pd.read_parquet(written / "meta/tasks.parquet")
    episodes = pd.read_parquet(written / "meta/episodes/chunk-000/file-000.parquet")
    assert episodes["data/file_index"].tolist() == [0, 0, 1]
    for number, one in enumerate([EPISODES[1][0], EPISODES[2][0], EPISODES[0][0]]):
        about = episodes.iloc[number]
        part = rows[about["dataset_from_index"] : about["dataset_to_index"]]
        assert np.array_equal(part["observation.state"], one.observations)
        assert np.array_equal(part["action"], one.actions[:, 0])
        assert np.array_equal(part["index"], about["dataset_from_index"] + part["frame_index"])
        assert np.allclose(part["timestamp"], part["frame_index"] / FPS)
        is_last = part["frame_index"] == len(part["frame_index"]) - 1
        assert np.array_equal(part["next.done"], is_last & one.terminated)
        assert np.array_equal(part["next.truncated"], is_last & one.truncated)
        assert about["tasks"].tolist() == [one.task]
        assert tasks.iloc[part["task_index"][0]].name == one.task
        assert np.stack(part[FRONT]).shape == (about["length"], 8, 12, 3)
        measured = np.array(about[f"stats/{FRONT}/mean"].tolist()).ravel()
        pixels = np.stack(part[FRONT]) / 255
        assert np.allclose(measured, pixels.mean((0, 1, 2)), atol=2e-3)  # another JPEG decoder
    statistics = json.loads((written / "meta/stats.json").read_text())
    assert set(statistics) == set(info["features"])
    for name in ("observation.state", "action", "next.done", "index"):
        values = np.asarray(rows[:][name], dtype=np.float64).reshape(len(rows), -1)
        found = statistics[name]
        for which in ("min", "max", "mean", "std"):
            assert np.allclose(found[which], getattr(values, which)(0)), (name, which)
        assert found["count"] == [13] and len(found["q01"]) == values.shape[1]
    quantiles = np.average(
        [np.quantile(one.observations, 0.9, axis=0) for one, _ in EPISODES],
        axis=0,
        weights=[len(one.observations) for one, _ in EPISODES],
    )
    assert np.allclose(statistics["observation.state"]["q90"], quantiles)


@pytest.mark.parametrize(
    ("of_state", "of_action", "state", "action"),
    [
        (["x", "y"], ["grip"], ["x", "y", "observation.force"], ["grip"]),
        ({"motors": ["x", "y"]}, {"delta": 0}, ["x", "y", "observation.force"], ["delta"]),
        (None, None, None, ["action"]),
    ],
)
def test_numbers_keep_the_names_that_their_data_set_gave_them(
    of_state, of_action, state, action, tmp_path
):
    features = ["observation.state", "observation.force"]
    names = {"observation.state": of_state, "observation.force": None, "action": of_action}
    about = {"observations": features, "actions": "action", "names": names}
    source = prepared(tmp_path / "in", [(episode(0, images=None), "train")], **about)
    export(source, str(tmp_path / "out"), kind="lerobot")
    found = json.loads((tmp_path / "out/meta/info.json").read_text())["features"]
    assert found["observation.state"]["names"] == state
    assert found["action"]["names"] == action


GREY = [encoded(step, size=(12, 8), mode="L") for step in range(4)]


@pytest.mark.parametrize(
    ("episodes", "about", "fps", "message"),
    [
        ([episode(0, actions=["left"] * 4)], {}, None, "actions are names of classes"),
        ([episode(0), episode(1, embodiment="aloha")], {}, None, "of robot aloha, others are of"),
        (
            [episode(0), episode(1, actions=np.zeros((4, 2)))],
            {},
            None,
            "action is of shape [2], in",
        ),
        ([episode(0, images=GREY)], {}, None, "12 x 8 L; those of LeRobot"),
        ([episode(0)], {"fps": None}, None, "pass --fps 10"),
        ([episode(0)], {}, 12.5, "--fps 12.5: LeRobot takes a whole number above 0; pass --fps 10"),
        ([episode(0)], {"fps": 12.5}, None, "has 12.5 steps a second: LeRobot takes a whole"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_is_written(
    episodes, about, fps, message, tmp_path
):
    source = prepared(tmp_path / "in", [(one, "train") for one in episodes], **about)
    with pytest.raises(ValueError) as raised:
        export(source, str(tmp_path / "out"), kind="lerobot", fps=fps)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_export_of_episodes_is_not_pushed_as_a_network(written, tmp_path):
    with pytest.raises(ValueError, match="it is a data set; hf upload USER/NAME"):
        push(str(written), str(tmp_path / "pushed"))
    assert not (tmp_path / "pushed").exists()


def test_an_empty_and_a_taken_folder_are_refused(tmp_path):
    with pytest.raises(OSError, match="there is no complete folder at"):
        export(str(tmp_path), str(tmp_path / "out"), kind="lerobot")
    (tmp_path / lerobot_export.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="is there already"):
        export(str(tmp_path), str(tmp_path), kind="lerobot")
