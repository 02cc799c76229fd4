"""Logs of sensors to windows: where they are cut, their labels, what is left out, and splits."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import read, splits_of_a_job, summary

prepare = partial(conftest.prepare, "series")


def log(count: int, **columns) -> pd.DataFrame:
    """Steps of two channels: x counts them, y has a missing number at step 2."""
    steps = np.arange(count)
    y = np.where(steps == 2, np.nan, -steps / 4)
    return pd.DataFrame({"t": steps / 10, "x": steps * 1.0, "y": y, **columns})


def cut(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """First and last x of each recording's windows."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        x = row["series"]["x"]
        assert len(x) == len(row["series"]["y"])
        out.setdefault(row["recording"], []).append((x[0], x[-1]))
    return out


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_windows_of_each_recording(tmp_path, form):
    """None crosses recordings; CSV and Parquet give the same."""
    table = pd.concat(
        [log(10, run="a", who="p"), log(3, run="b", who="p"), log(5, run="c", who="q")]
    )
    file = tmp_path / f"log.{form}"
    table.to_csv(file, index=False) if form == "csv" else table.to_parquet(file)
    pairs = ("channels=x,y", "recording=run", "order=t", "subject=who", "window=4", "stride=3")
    prepare(file, tmp_path / "out", *pairs)
    found = read(tmp_path / "out")
    assert cut(found) == {"a": [(0, 3), (3, 6), (6, 9)], "c": [(0, 3)]}
    assert [row["start"] for row in found] == [0, 3, 6, 0]
    assert [row["subject"] for row in found] == ["p", "p", "p", "q"]
    assert [row["step"] for row in found] == [0.1] * 4
    assert found[0]["series"] == {"x": [0, 1, 2, 3], "y": [0, -0.25, None, -0.75]}
    notes = summary(tmp_path / "out")["notes"]
    assert notes["steps in no window"] == 4 and notes["median step of t"] == "0.1"
    assert splits_of_a_job(tmp_path, "series", "series") == {"train": 4}


def test_recordings_as_rows_and_labels_of_folders(tmp_path):
    """Also where folders of splits lie above or below those of labels."""
    for name, count in (("walk/1", 4), ("test/walk/2", 6), ("run/train/1", 5)):
        file = tmp_path / f"logs/{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        log(count).to_csv(file, index=False)
    prepare(tmp_path / "logs", tmp_path / "out", "channels=x,y", "window=0", "label_folders=true")
    found = {row["recording"]: row for row in read(tmp_path / "out")}
    assert {name: len(row["series"]["x"]) for name, row in found.items()} == {
        "walk/1": 4,
        "test/walk/2": 6,
        "run/train/1": 5,
    }
    assert [(row["label"], row["split"]) for _, row in sorted(found.items())] == [
        ("run", "train"),
        ("walk", "test"),
        ("walk", "train"),
    ]
    with pytest.raises(ValueError, match=r"1\.csv: it lies in no folder below the source"):
        prepare(tmp_path / "logs/run", tmp_path / "no", "channels=x", "label_folders=true")


@pytest.mark.parametrize(
    ("take", "labels", "values"),
    [
        ("last", {0: "b", 3: "a", 6: "c"}, {0: 2, 3: 5, 6: 8}),
        ("most", {0: "a", 3: "a", 6: "c"}, None),
        ("same", {3: "a"}, None),
    ],
)
def test_labels_and_values_of_windows(tmp_path, take, labels, values):
    """A window without one is left out: the last has none in most of its steps."""
    move = ["a", "a", "b", "a", "a", "a", " c", "", "c", None, "", None]
    table = log(12, move=move, value=np.r_[0:9.0, [np.nan] * 3])
    table.to_parquet(tmp_path / "log.parquet")
    pairs = ("channels=x,y", "window=3", f"take={take}")
    prepare(tmp_path / "log.parquet", tmp_path / "out", *pairs, "label=move")
    assert {row["start"]: row["label"] for row in read(tmp_path / "out")} == labels
    notes = summary(tmp_path / "out")["notes"]
    assert notes["windows without a label or value, left out"] == 1
    assert notes.get("windows with several labels or values, left out", 0) == 3 - len(labels)
    if values is not None:
        prepare(tmp_path / "log.parquet", tmp_path / "value", *pairs, "value=value")
        assert {row["start"]: row["value"] for row in read(tmp_path / "value")} == values


def test_texts_that_are_no_numbers_are_missing_and_counted(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text('x\n20\n"20,5"\nNA\nERR\n')
    prepare(file, tmp_path / "out", "channels=x", "window=4")
    assert read(tmp_path / "out")[0]["series"]["x"] == [20, None, None, None]
    notes = summary(tmp_path / "out")["notes"]
    assert notes["texts that are no number, taken as missing"] == 2


def test_no_window_crosses_a_gap_or_a_cut_by_time(tmp_path):
    table = log(20)
    table.loc[8:, "t"] += 0.1
    table.loc[[3, 11], "x"] = np.inf, np.nan
    table["t"] = pd.to_datetime(table["t"], unit="s")
    table.to_parquet(tmp_path / "drive.parquet")
    pairs = ("channels=x,y", "order=t", "window=4", "stride=2")
    prepare(tmp_path / "drive.parquet", tmp_path / "gaps", *pairs)
    starts = [row["start"] for row in read(tmp_path / "gaps")]
    assert starts == [0, 2, 4, 8, 10, 12, 14, 16]
    assert read(tmp_path / "gaps")[0]["series"]["x"] == [0, 1, 2, None]
    notes = summary(tmp_path / "gaps")["notes"]
    assert (
        notes["gaps, which no window crosses"] == notes["infinite numbers, taken as missing"] == 1
    )
    assert notes["median step of t in seconds"] == "0.1"
    assert read(tmp_path / "gaps")[0]["step"] == 0.1
    prepare(tmp_path / "drive.parquet", tmp_path / "out", *pairs, "gap=0", "test_share=0.25")
    found = read(tmp_path / "out")
    assert {(row["recording"], row["split"]) for row in found} == {
        ("drive-00000", "train"),
        ("drive-00001", "test"),
    }
    assert [row["start"] for row in found] == [*range(0, 12, 2), 0]
    assert splits_of_a_job(tmp_path, "series", "series") == {"train": 6, "test": 1}


def test_recordings_at_several_rates_are_resampled_to_the_slowest(tmp_path):
    """A step has the mean of its rows and the last one's label; a slower recording is left out."""
    slow = pd.DataFrame({"run": "slow", "t": [0.0, 0.2, 0.4, 0.61], "x": [1.0, 2.0, 3.0, 4.0]})
    fast_times = [5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 6.0, 6.1]
    fast = pd.DataFrame({"run": "fast", "t": fast_times, "x": [1, 3, np.inf, 5, 7, np.nan, 8, 10]})
    slower = pd.DataFrame({"run": "slower", "t": [0.0, 0.5, 1.0], "x": [1.0, 2.0, 3.0]})
    table = pd.concat([slow.assign(move="a"), fast.assign(move=list("abababab"))])
    table.to_csv(tmp_path / "log.csv", index=False)
    pairs = ("channels=x", "recording=run", "order=t", "label=move", "window=2")
    prepare(tmp_path / "log.csv", tmp_path / "out", *pairs, "step=0.2")
    found = [(row["recording"], row["series"]["x"], row["label"]) for row in read(tmp_path / "out")]
    assert found == [("slow", [1, 2], "a"), ("slow", [3, 4], "a"), ("fast", [2, 5], "b")]
    assert {row["step"] for row in read(tmp_path / "out")} == {0.2}
    notes = summary(tmp_path / "out")["notes"]
    assert notes["median step of t"] == "0.2"
    assert notes["gaps, which no window crosses"] == notes["steps in no window"] / 2 == 1
    assert notes["infinite numbers, taken as missing"] == 1
    both = pd.concat([table, slower.assign(move="a")])
    both["t"] = pd.to_datetime(both["t"], unit="s")
    both.to_parquet(tmp_path / "times.parquet")
    prepare(tmp_path / "times.parquet", tmp_path / "again", *pairs, "step=0.2", max_bad=0.7)
    assert read(tmp_path / "again") == read(tmp_path / "out")
    (broken,) = summary(tmp_path / "again")["broken"]["files"]
    assert broken["reason"] == "its median step of t is 2.5 times that of --set step="


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "--set channels= is missing"),
        (["channels=x", "step=0.1"], "name that: --set order="),
        (["channels=x,z"], "no column 'z' for --set channels"),
        (["channels=x,run", "recording=run"], "names column 'run', which another option names"),
        (["channels=x,word", "window=4"], r"channels without any number: word; leave them out"),
        (
            ["channels=x,y", "order=back"],
            r"no recording is valid; invalid: 1, the first one: log\.csv: rows 1 to 12: back does "
            "not ascend at step 1",
        ),
        (
            ["channels=x", "window=4", "split_column=sides"],
            r"no window of 4 steps is left; the longest .* has 3 steps .*; invalid: "
            r"1, the first one: log\.csv: rows 4 to 12: its split is not one of",
        ),
        (
            ["channels=x", "window=50"],
            "no window of 50 steps is left; .* has 12 steps .steps in no window: 12",
        ),
        (["channels=x", "window=0", "label=empty"], "no recording is left; the longest recording"),
        (["channels=x", "recording=run", "window=2"], "the recording of row 9 has rows further up"),
        (["channels=x", "value=y", "take=most"], "take=most is for classes"),
        (["channels=x", "window=0", "stride=2"], "has no effect with window=0"),
        (["channels=x", "gap=1"], "the median step itself is no gap"),
        (["channels=x", "label=word", "label_folders=true"], "both labels"),
        (["channels=x", "test_share=0.5", "split=train"], "both say what a step's split is"),
        (["channels=x", "test_share=0.5", "validation_share=0.5"], "leave no train steps"),
    ],
)
def test_what_cannot_be_cut_is_reported(tmp_path, pairs, said):
    table = log(
        12, run=["a"] * 4 + ["b"] * 4 + ["a"] * 4, word="none", empty="", back=range(12, 0, -1)
    )
    table["sides"] = ["train"] * 3 + ["left"] * 9
    table.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(ValueError, match=said):
        prepare(tmp_path / "log.csv", tmp_path / "out", *pairs)


@pytest.mark.parametrize("shares", [(), ("test_share=0.5",)])
def test_a_recording_out_of_order_or_of_two_subjects_is_left_out_without_names(tmp_path, shares):
    """Also where order and subject change at the cut by time."""
    names = ("unit-1", "unit-2", "fine", "no")
    table = pd.concat([log(8, run=name, who=None) for name in names])
    table["t"] = [4, 5, 6, 7, 0, 1, 2, 3, *[*range(8)] * 3]
    table["who"] = [*["patient-7"] * 12, *["patient-8"] * 4, "", *["patient-9"] * 7, *[None] * 8]
    table.to_parquet(tmp_path / "log.parquet")
    pairs = ("channels=x,y", "recording=run", "order=t", "subject=who", "window=4", *shares)
    prepare(tmp_path / "log.parquet", tmp_path / "out", *pairs, max_bad=0.7)
    found = [(row["recording"].split("-")[0], row["subject"]) for row in read(tmp_path / "out")]
    assert found == [("fine", "patient-9")] * 2 + [("no", None)] * 2
    said = summary(tmp_path / "out")
    broken = said["broken"]["files"]
    assert [row["path"] for row in broken] == [
        "log.parquet:rows 1 to 8",
        "log.parquet:rows 9 to 16",
    ]
    assert "t does not ascend at step 4" in broken[0]["reason"]
    assert "2 values of subject" in broken[1]["reason"]
    assert "patient" not in str(said) and "unit" not in str(said)
    without = [name for name in said["notes"] if "without a subject" in name]
    assert [said["notes"][name] for name in without] == [1]


@pytest.mark.parametrize("pairs", [(), ("recording=run", "split_column=side")])
def test_recordings_of_one_name_in_several_files_keep_apart(tmp_path, pairs):
    sides = ["train"] * 4 + ["test"] * 4
    for name, order in (("b/1.csv", 1), ("b/1.csv.gz", -1), ("c/2.csv", 1)):
        file = tmp_path / "logs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        log(8, run="7", side=sides[::order]).to_csv(file, index=False)
    prepare(tmp_path / "logs", tmp_path / "out", "channels=x", "window=4", *pairs)
    rows = [(row["recording"], row["split"]) for row in read(tmp_path / "out")]
    per_file = 1 + ("split_column=side" in pairs)
    assert len(rows) == 6 and len(set(rows)) == len(dict(rows)) == 3 * per_file
    own = "7-0000" if pairs else ""  # otherwise the name of the file, without its suffix
    assert all(name.startswith((f"b/1.csv/{own}", "b/1.csv.gz/", "c/2.csv/")) for name, _ in rows)
    said = [v for k, v in summary(tmp_path / "out")["notes"].items() if "several files" in k]
    assert said == [1]


@pytest.mark.data
def test_windows_of_the_scitos_robot_equal_numpy(tmp_path):
    """24 sonars, and the action of each window's last step."""
    file = Path(
        os.environ["ONETOMANY_DATA"], "robotics/scitos_wall_following/wall_following.parquet"
    )
    pairs = ("channels=S1..S24", "order=step", "window=16", "stride=8", "label=action_name")
    prepare(file, tmp_path / "out", *pairs)
    table, (part,) = pd.read_parquet(file), sorted((tmp_path / "out").glob("*.parquet"))
    found = pq.read_table(part)
    assert found["label"].to_pylist() == table.action_name[15::8].tolist()
    series = found["series"].combine_chunks()
    for name in (f"S{i}" for i in range(1, 25)):
        theirs = np.lib.stride_tricks.sliding_window_view(table[name], 16)[::8]
        assert np.array_equal(np.array(series.field(name).to_pylist()), theirs)
