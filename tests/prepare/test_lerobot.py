"""LeRobot data sets, written by hand in both layouts as LeRobot's own code lays them out: rows,
frames of videos, and metadata that is not true.
"""

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import encoded, read, reasons, summary, write

from pipeline.prepare.engine.write import verify
from pipeline.prepare.readers import parquet

prepare = partial(conftest.prepare, "lerobot")

FPS, FRONT = 10, "observation.images.front"
LENGTHS = (6, 4, 5)
TASKS = {0: "pick the cube", 1: "open the drawer"}
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]},
    "observation.force": {"dtype": "float32", "shape": [1]},
    "action": {"dtype": "float32", "shape": [2], "names": None},
    "next.reward": {"dtype": "float32", "shape": [1]},
    "next.done": {"dtype": "bool", "shape": [1]},
    FRONT: {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]},
    "observation.wide": {"dtype": "float32", "shape": [2, 2]},
    **{
        name: {"dtype": "int64", "shape": [1]}
        for name in ("frame_index", "episode_index", "index", "task_index")
    },
    "timestamp": {"dtype": "float32", "shape": [1]},
}


def grey(number: int, step: int) -> int:
    """The brightness of a frame, by which it is known again after a lossy codec."""
    return 20 + 60 * number + 10 * step


def video(path: Path, levels: list[int], gop: int = 4) -> None:
    """An mp4 of plain frames at FPS, with a key frame every ``gop``."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": str(gop), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in levels:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((48, 64, 3), level, dtype=np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())


def steps(number: int, first: int) -> pd.DataFrame:
    """The rows of an episode as LeRobot has them; features of shape [1] are plain numbers."""
    n = LENGTHS[number]
    state = [np.array([100 * number + i, i, -i], dtype=np.float32) for i in range(n)]
    return pd.DataFrame(
        {
            "observation.state": state,
            "observation.force": np.arange(n, dtype=np.float32) / 4,
            "action": [np.array([i, number], dtype=np.float32) for i in range(n)],
            "next.reward": np.full(n, 0.5, dtype=np.float32),
            "next.done": np.arange(n) == n - 1,
            "timestamp": (np.arange(n) / FPS).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, number),
            "index": first + np.arange(n),
            "task_index": np.full(n, number % 2),
        }
    )


def info(version: str, **more) -> str:
    paths = (
        {
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        }
        if version < "v3"
        else {
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        }
    )
    return json.dumps(
        {
            "codebase_version": version,
            "robot_type": "so100",
            "fps": FPS,
            "total_episodes": 3,
            "total_frames": sum(LENGTHS),
            "chunks_size": 1000,
            "splits": {"train": "0:2", "test": "2:3"},
            **paths,
            "features": FEATURES,
            **more,
        }
    )


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def v21(tmp_path):
    root, first = tmp_path / "v21", 0
    for number, length in enumerate(LENGTHS):
        steps(number, first).to_parquet(
            write(root / f"data/chunk-000/episode_{number:06d}.parquet", ""), index=False
        )
        video(
            root / f"videos/chunk-000/{FRONT}/episode_{number:06d}.mp4",
            [grey(number, i) for i in range(length)],
        )
        first += length
    write(root / "meta/info.json", info("v2.1"))
    write(
        root / "meta/episodes.jsonl",
        lines(
            [
                {"episode_index": i, "tasks": [TASKS[i % 2]], "length": n}
                for i, n in enumerate(LENGTHS)
            ]
        ),
    )
    write(
        root / "meta/tasks.jsonl",
        lines([{"task_index": i, "task": task} for i, task in TASKS.items()]),
    )
    write(
        root / "meta/episodes_stats.jsonl",
        lines([{"episode_index": i, "stats": {}} for i in range(3)]),
    )
    return root


def episodes_table(**changed) -> pd.DataFrame:
    """meta/episodes of v3: two episodes in the first file and video, the third in files of its
    own.
    """
    ends = np.cumsum(LENGTHS)
    table = {
        "episode_index": [0, 1, 2],
        "tasks": [[TASKS[i % 2]] for i in range(3)],
        "length": list(LENGTHS),
        "data/chunk_index": [0] * 3,
        "data/file_index": [0, 0, 1],
        "dataset_from_index": [0, *ends[:2]],
        "dataset_to_index": ends,
        f"videos/{FRONT}/chunk_index": [0] * 3,
        f"videos/{FRONT}/file_index": [0, 0, 1],
        f"videos/{FRONT}/from_timestamp": [0.0, LENGTHS[0] / FPS, 0.0],
        f"videos/{FRONT}/to_timestamp": [
            LENGTHS[0] / FPS,
            sum(LENGTHS[:2]) / FPS,
            LENGTHS[2] / FPS,
        ],
        "stats/action/mean": [[0.0, 0.0]] * 3,
        "meta/episodes/chunk_index": [0] * 3,
        "meta/episodes/file_index": [0] * 3,
    }
    return pd.DataFrame({**table, **changed})


@pytest.fixture
def v30(tmp_path):
    root = tmp_path / "v30"
    frames = [steps(0, 0), steps(1, LENGTHS[0]), steps(2, sum(LENGTHS[:2]))]
    for file, held in enumerate(([0, 1], [2])):
        pd.concat([frames[i] for i in held]).to_parquet(
            write(root / f"data/chunk-000/file-{file:03d}.parquet", ""),
            index=False,
            row_group_size=6,
        )
        video(
            root / f"videos/{FRONT}/chunk-000/file-{file:03d}.mp4",
            [grey(i, step) for i in held for step in range(LENGTHS[i])],
        )
    write(root / "meta/info.json", info("v3.0"))
    write(root / "meta/stats.json", "{}")
    episodes_table().to_parquet(
        write(root / "meta/episodes/chunk-000/file-000.parquet", ""), index=False
    )
    # The text is the index
    pd.DataFrame({"task_index": list(TASKS)}, index=pd.Index(list(TASKS.values()))).to_parquet(
        root / "meta/tasks.parquet"
    )
    return root


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("layout", ["v21", "v30"])
def test_rows_of_both_layouts(layout, request, tmp_path):
    done = prepare(request.getfixturevalue(layout), tmp_path / "out")
    rows = {row["episode"]: row for row in read(tmp_path / "out")}
    assert sorted(rows) == [f"episode_{i:06d}" for i in range(3)] and done["rows"] == {
        "test": 1,
        "train": 2,
    }
    for number, length in enumerate(LENGTHS):
        assert rows[f"episode_{number:06d}"] == {
            "episode": f"episode_{number:06d}",
            "task": TASKS[number % 2],
            "embodiment": "so100",
            "observations": [[100 * number + i, i, -i, i / 4] for i in range(length)],
            "actions": [[i, number] for i in range(length)],
            "rewards": [0.5] * length,
            "terminated": True,
            "truncated": False,
            "steps": length,
            "split": "test" if number == 2 else "train",
        }
    found = summary(tmp_path / "out")
    assert found["notes"]["cameras left out (--set images= takes one)"] == FRONT and found["notes"][
        "steps"
    ] == {"test": 5, "train": 10}
    assert (
        found["classes"]["train"]["labels"] == {TASKS[0]: 1, TASKS[1]: 1}
        and verify(str(tmp_path / "out")) == done
    )


def test_the_layouts_give_the_same_bytes_whatever_the_parts_and_row_groups(
    v21, v30, tmp_path, monkeypatch
):
    prepare(v21, tmp_path / "a", "split=train", rows_per_part=1)
    prepare(v30, tmp_path / "b", "split=train", rows_per_part=1)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 1)
    prepare(v30, tmp_path / "c", "split=train", rows_per_part=1)
    found = [
        [pq.read_table(file) for file in sorted((tmp_path / out).glob("*.parquet"))]
        for out in "abc"
    ]
    assert len(found[0]) == 3 and all(
        a.equals(b) and b.equals(c) for a, b, c in zip(*found, strict=True)
    )
    prepare(v30, tmp_path / "d", "split=train")
    assert pa.concat_tables(found[0]).to_pylist() == read(tmp_path / "d")
    # Episodes are 6, 4 and 5 steps of six float32 and one more
    prepare(v30, tmp_path / "e", "split=train", part_mb=250 / 2**20)
    assert [len(pq.read_table(file)) for file in sorted((tmp_path / "e").glob("*.parquet"))] == [
        2,
        1,
    ] and read(tmp_path / "e") == read(tmp_path / "d")


@pytest.mark.parametrize("layout", ["v21", "v30"])
def test_frames_are_those_of_each_rows_time(layout, request, tmp_path):
    prepare(request.getfixturevalue(layout), tmp_path / "out", f"images={FRONT}", resize=24)
    for row in read(tmp_path / "out"):
        number = int(row["episode"][-6:])
        assert len(row["images"]) == row["steps"] == LENGTHS[number]
        for step, data in enumerate(row["images"]):
            with PIL.Image.open(io.BytesIO(data)) as image:
                assert image.format == "JPEG" and image.size == (32, 24)
                assert abs(np.asarray(image).mean() - grey(number, step)) < 4, (number, step)


def test_a_row_that_is_late_has_the_nearest_frame_and_one_without_any_is_reported(v21, tmp_path):
    file = v21 / "data/chunk-000/episode_000001.parquet"
    steps(1, 6).assign(timestamp=np.array([0.04, 0.06, 0.24, 0.33], dtype=np.float32)).to_parquet(
        file, index=False
    )
    steps(0, 0).assign(timestamp=(np.arange(6) / 5).astype(np.float32)).to_parquet(
        v21 / "data/chunk-000/episode_000000.parquet", index=False
    )
    prepare(v21, tmp_path / "out", f"images={FRONT}", "split=train")
    found = {
        row["episode"]: [
            np.asarray(PIL.Image.open(io.BytesIO(data))).mean() for data in row["images"]
        ]
        for row in read(tmp_path / "out")
    }
    assert np.allclose(found["episode_000001"], [grey(1, i) for i in (0, 1, 2, 3)], atol=4)
    assert reasons(summary(tmp_path / "out")) == {
        "episode 0": "episode_000000.mp4: no frame within 0.05 s of 0.600 s; the nearest is at "
        "0.500 s"
    }


def test_images_in_the_table_are_kept_as_they_are_or_made_smaller(v30, tmp_path):
    about = json.loads((v30 / "meta/info.json").read_text())
    about["features"][FRONT]["dtype"] = "image"
    write(v30 / "meta/info.json", json.dumps(about))
    for file, held in enumerate(([0, 1], [2])):
        path = v30 / f"data/chunk-000/file-{file:03d}.parquet"
        rows = [
            {"bytes": encoded(10 * i + step, form="PNG"), "path": None}
            for i in held
            for step in range(LENGTHS[i])
        ]
        table = pq.read_table(path)
        pq.write_table(table.append_column(FRONT, pa.array(rows)), path)
    prepare(v30, tmp_path / "out", f"images={FRONT}")
    assert {row["episode"]: row["images"] for row in read(tmp_path / "out")}["episode_000002"] == [
        encoded(20 + step, form="PNG") for step in range(5)
    ]
    prepare(v30, tmp_path / "small", f"images={FRONT}", resize=16, quality=80)
    assert all(
        PIL.Image.open(io.BytesIO(data)).size == (21, 16)
        for row in read(tmp_path / "small")
        for data in row["images"]
    )


def test_frames_need_the_times_of_their_rows(v21, tmp_path):
    for file in (v21 / "data").rglob("*.parquet"):
        pd.read_parquet(file).drop(columns="timestamp").to_parquet(file, index=False)
    with pytest.raises(
        ValueError,
        match=r"episode_00000\d\.parquet: no column 'timestamp', by which the frames of "
        r"observation\.images\.front are found",
    ):
        prepare(v21, tmp_path / "out", f"images={FRONT}")
    prepare(v21, tmp_path / "out")
    assert len(read(tmp_path / "out")) == 3


def test_one_split_for_all_does_not_ask_what_the_ranges_are(v30, tmp_path):
    about = json.loads((v30 / "meta/info.json").read_text())
    write(
        v30 / "meta/info.json",
        json.dumps({**about, "splits": {"seen": "all", "train": "0:9", "test": "2:3"}}),
    )
    assert prepare(v30, tmp_path / "out", "split=validation")["rows"] == {"validation": 3}


def test_features_and_robot_may_be_named(v30, tmp_path):
    about = json.loads((v30 / "meta/info.json").read_text())
    write(
        v30 / "meta/info.json",
        json.dumps({**about, "robot_type": None, "splits": {"train": "0:2"}}),
    )
    prepare(v30, tmp_path / "out", "observations=observation.force", "actions=")
    rows = read(tmp_path / "out")
    assert (
        rows[0]["observations"][:2] == [[0], [0.25]]
        and "actions" not in rows[0]
        and rows[0]["embodiment"] == ""
    )
    assert summary(tmp_path / "out")["notes"]["episodes in no range of splits, taken as train"] == 1
    prepare(v30, tmp_path / "named", "embodiment=arm")
    assert {row["embodiment"] for row in read(tmp_path / "named")} == {"arm"}


# ---------------------------------------------------------------- metadata and rows that disagree


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"length": [6, 7, 5], "dataset_to_index": [6, 13, 15]},
            "4 rows in data/chunk-000/file-000.parquet, but its length in the metadata is 7",
        ),
        (
            {"length": [6, 3, 5]},
            "dataset_from_index 6 to dataset_to_index 10 are 4 rows, but its length in the "
            "metadata is 3",
        ),
        (
            {"dataset_from_index": [0, 7, 10], "dataset_to_index": [6, 11, 15]},
            "index goes from 6 to 9 in data/chunk-000/file-000.parquet, but the metadata has "
            "rows 7 to 10",
        ),
        (
            {"data/file_index": [0, 1, 1]},
            "no row of it in data/chunk-000/file-001.parquet, but its length in the metadata is 4",
        ),
        ({"data/file_index": [0, 3, 1]}, "no file data/chunk-000/file-003.parquet"),
    ],
)
def test_an_episode_of_v3_whose_metadata_is_not_true_is_left_out_naming_both_numbers(
    v30, tmp_path, changed, said
):
    episodes_table(**changed).to_parquet(
        v30 / "meta/episodes/chunk-000/file-000.parquet", index=False
    )
    prepare(v30, tmp_path / "out")
    assert (
        reasons(summary(tmp_path / "out")) == {"episode 1": said}
        and len(read(tmp_path / "out")) == 2
    )
    with pytest.raises(
        ValueError,
        match=r"1 of 3 .*--max-bad 0 .*: episode 1: ",
    ):
        prepare(v30, tmp_path / "strict", max_bad=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rows: rows[:-1],
            "3 rows in data/chunk-000/episode_000001.parquet, but its length in the metadata is 4",
        ),
        (lambda rows: rows.assign(frame_index=[0, 1, 3, 2]), "frame_index is 3 in step 2"),
        (
            lambda rows: rows.assign(timestamp=[0, 0.1, 0.1, 0.2]),
            "timestamp does not ascend in data/chunk-000/episode_000001.parquet, at step 2",
        ),
        (
            lambda rows: rows.assign(action=[[1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0]]),
            "action of 1 numbers in step 2, where 2 are needed",
        ),
        (lambda rows: rows.assign(action=1.5), "action of 1 number in step 0, where 2 are needed"),
        (
            lambda rows: rows.assign(**{"observation.force": [0, 1, np.nan, np.nan]}),
            r"observation.force 0 is no number in step 2 (2 such steps)",
        ),
        (
            lambda rows: rows.assign(task_index=7),
            "task_index 7 is not one of the 2 tasks of meta/tasks",
        ),
        (
            lambda rows: rows.assign(episode_index=0),
            "no row of it in data/chunk-000/episode_000001.parquet, but its length in the "
            "metadata is 4",
        ),
    ],
)
def test_an_episode_of_v2_that_cannot_be_used_is_left_out(v21, tmp_path, change, said):
    file = v21 / "data/chunk-000/episode_000001.parquet"
    change(pd.read_parquet(file)).to_parquet(file, index=False)
    prepare(v21, tmp_path / "out")
    assert len(read(tmp_path / "out")) == 2
    assert list(reasons(summary(tmp_path / "out"))) == ["episode 1"] and reasons(
        summary(tmp_path / "out")
    )["episode 1"].startswith(said)


def test_videos_that_are_missing_or_broken(v21, tmp_path):
    (v21 / f"videos/chunk-000/{FRONT}/episode_000000.mp4").unlink()
    prepare(v21, tmp_path / "out", f"images={FRONT}")
    assert reasons(summary(tmp_path / "out")) == {
        "episode 0": f"no file videos/chunk-000/{FRONT}/episode_000000.mp4"
    }
    write(v21 / f"videos/chunk-000/{FRONT}/episode_000001.mp4", b"no video")
    prepare(v21, tmp_path / "two", f"images={FRONT}", max_bad=0.9)
    assert reasons(summary(tmp_path / "two"))["episode 1"].startswith(
        "episode_000001.mp4: cannot be decoded"
    )
    assert len(read(tmp_path / "two")) == 1


# ---------------------------------------------------------------- data sets that are none


@pytest.mark.parametrize(
    ("change", "pairs", "said"),
    [
        (
            {"meta/info.json": None},
            [],
            r"no meta/info\.json; name the folder of a LeRobot data set",
        ),
        (
            {"meta/info.json": info("v1.6")},
            [],
            r"codebase_version 'v1\.6', which is not one of v2\.0, v2\.1 and v3\.0",
        ),
        (
            {"meta/info.json": info("v2.1", splits={"seen": "0:3"})},
            [],
            r"split 'seen': '0:3' is no range of episodes .*--set split=train",
        ),
        (
            {"meta/info.json": info("v2.1", splits={"train": "0:2", "test": "1:3"})},
            [],
            r"split 'test': '1:3' overlaps the range of train; correct .*split=train",
        ),
        ({"meta/info.json": info("v2.1", fps=None)}, [], r"meta/info\.json has no fps"),
        (
            {"meta/episodes.jsonl": None},
            [],
            r"no meta/episodes\.jsonl, which a data set of layout v2 has",
        ),
        ({"meta/episodes.jsonl": "{\n"}, [], r"meta/episodes\.jsonl:1: not JSON"),
        (
            {"meta/episodes.jsonl": '{"episode_index": 0}\n'},
            [],
            "an object with episode_index and length is needed",
        ),
        (
            {"meta/episodes.jsonl": lines([{"episode_index": 0, "length": 6}] * 2)},
            [],
            "episode 0 occurs twice in the metadata",
        ),
        (
            {},
            ["images=observation.images.top"],
            "no camera 'observation.images.top' for --set images; did you mean "
            "observation.images.front",
        ),
        (
            {},
            ["observations=observation.sate"],
            "'observation.sate' for --set observations is not there.*did you mean "
            "observation.state",
        ),
        (
            {},
            ["observations=observation.wide"],
            r"'observation.wide' for --set observations is float32 of shape \[2, 2\], where "
            r"rows of numbers are needed",
        ),
    ],
)
def test_what_is_no_lerobot_data_set_gives_one_clear_message(v21, tmp_path, change, pairs, said):
    for name, text in change.items():
        (v21 / name).unlink() if text is None else write(v21 / name, text)
    with pytest.raises(ValueError, match=said):
        prepare(v21, tmp_path / "out", *pairs)


def test_sizes_of_images_need_a_camera_and_videos_need_the_extra(v21, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name a camera: --set images="):
        prepare(v21, tmp_path / "out", resize=16)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="robotics"):
        prepare(v21, tmp_path / "out", f"images={FRONT}")
    prepare(v21, tmp_path / "out")


def test_a_data_set_on_s3(v30, tmp_path, s3_server):
    import boto3

    for file in v30.rglob("*.*"):
        if file.is_file():
            boto3.client("s3").upload_file(str(file), "bucket", f"lerobot/{file.relative_to(v30)}")
    prepare(v30, tmp_path / "local", f"images={FRONT}")
    prepare(f"{s3_server}/lerobot", tmp_path / "remote", f"images={FRONT}")
    assert (
        read(tmp_path / "local") == read(tmp_path / "remote")
        and len(read(tmp_path / "remote")) == 3
    )
