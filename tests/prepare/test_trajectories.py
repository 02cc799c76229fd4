"""Plain tables to episodes: what is one, where logs are cut, shares of time, and every kind of
episode that is left out.
"""

import gzip
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import read, summary, write
from typer.testing import CliRunner

from pipeline import cli
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.write import verify
from pipeline.prepare.readers import csv_blocks

prepare = partial(conftest.prepare, "trajectories")

ROLES = ("observations=x,y", "actions=move", "episode=run", "order=t")
HEAD = "run,t,x,y,move,paid,over\n"
BODY = "a,0,1,2,left,0,false\na,1,3,4,left,0.5,false\na,2,5,6,right,1,true\nb,0,7,8,right,2,false\nb,5,9,10,left,3,true\n"


def reasons(output) -> dict[str, str]:
    """Why each episode was left out, by its name."""
    found = conftest.reasons(summary(output))
    return {path.rpartition("episode ")[2].split()[0]: why for path, why in found.items()}


def ends(row: dict) -> tuple[bool, bool]:
    return row["terminated"], row["truncated"]


def numbers(count: int, **columns) -> pd.DataFrame:
    """A log of so many steps: time, two observations and a continuous action."""
    steps = np.arange(count)
    return pd.DataFrame(
        {"t": steps, "x": steps * 1.0, "y": steps * 0.5, "u": np.sin(steps), **columns}
    )


def test_rows_of_a_step_become_one_row_an_episode(tmp_path):
    source, names = (
        write(tmp_path / "a.csv", HEAD + BODY),
        ("embodiment_name=rover", "task_name=park"),
    )
    done = prepare(source, tmp_path / "out", *ROLES, "reward=paid", "done=over", *names)
    same = {"task": "park", "embodiment": "rover", "terminated": True, "truncated": False}
    assert read(tmp_path / "out") == [
        {
            **same,
            "episode": "a",
            "observations": [[1, 2], [3, 4], [5, 6]],
            "actions": ["left", "left", "right"],
            "rewards": [0, 0.5, 1],
            "steps": 3,
            "split": "train",
        },
        {
            **same,
            "episode": "b",
            "observations": [[7, 8], [9, 10]],
            "actions": ["right", "left"],
            "rewards": [2, 3],
            "steps": 2,
            "split": "train",
        },
    ]
    schema = pq.read_schema(tmp_path / "out/train-00000-of-00001.parquet")
    assert (
        schema.field("observations").type.value_type.value_type == pa.float32()
        and schema.field("steps").type == pa.int64()
    )
    assert json.loads(schema.metadata[b"onetomany"])["classes"] == ["left", "right"]
    assert summary(tmp_path / "out")["classes"] == {
        "train": {"labels": {"left": 3, "right": 2}, "rows_without": 0}
    }
    assert (
        summary(tmp_path / "out")["notes"]["steps"] == {"train": 5}
        and verify(str(tmp_path / "out")) == done
    )


def test_csv_gzip_zstandard_and_parquet_are_the_same(tmp_path):
    text = (HEAD + BODY).encode()
    write(tmp_path / "a.csv", text)
    write(tmp_path / "b.csv.gz", gzip.compress(text))
    write(tmp_path / "c.csv.zst", pa.compress(text, codec="zstd", asbytes=True))
    pd.read_csv(tmp_path / "a.csv").to_parquet(tmp_path / "d.parquet", row_group_size=2)
    found = []
    for name in ("a.csv", "b.csv.gz", "c.csv.zst", "d.parquet"):
        prepare(tmp_path / name, tmp_path / f"out_{name}", *ROLES, "reward=paid", "done=over")
        found.append(read(tmp_path / f"out_{name}"))
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 2


def test_wherever_blocks_of_a_table_end_the_rows_are_the_same(tmp_path, monkeypatch):
    rows = pd.concat(
        [numbers(n, run=name) for name, n in (("a", 40), ("b", 1), ("c", 90), ("d", 7))]
    )
    rows.to_parquet(tmp_path / "a.parquet")
    columns = ("observations=x,y", "actions=u", "episode=run", "order=t")
    pairs = (*columns, "episode_steps=16", "test_share=0.25")
    found = []
    for size in (1, 16, 41, 16384):
        monkeypatch.setattr(csv_blocks, "BATCH_ROWS", size)
        prepare(tmp_path / "a.parquet", tmp_path / f"out{size}", *pairs)
        found.append((tmp_path / f"out{size}/all-00000-of-00001.parquet").read_bytes())
    assert found[0] == found[1] == found[2] == found[3]
    lengths = {(row["episode"], row["split"]): row["steps"] for row in read(tmp_path / "out1")}
    assert lengths == {
        ("a-00000", "train"): 16,
        ("a-00001", "train"): 14,
        ("a-00002", "test"): 10,
        ("b-00000", "train"): 1,
        # round(22.5) is 22
        **{(f"c-{i:05d}", "train"): n for i, n in enumerate((16, 16, 16, 16, 4))},
        ("c-00005", "test"): 16,
        ("c-00006", "test"): 6,
        ("d-00000", "train"): 5,
        ("d-00001", "test"): 2,
    }
    whole = rows[rows.run == "c"].x.astype(np.float32).tolist()
    episodes_of_c = [row for row in read(tmp_path / "out1") if row["episode"].startswith("c")]
    assert [step[0] for row in episodes_of_c for step in row["observations"]] == whole


def test_a_log_is_cut_by_shares_of_time_and_into_episodes(tmp_path):
    numbers(100).to_csv(tmp_path / "drive.csv", index=False)
    columns = ("observations=x,y", "actions=u")
    cuts = ("order=t", "episode_steps=30", "test_share=0.25", "validation_share=0.1")
    prepare(tmp_path / "drive.csv", tmp_path / "out", *columns, *cuts)
    found = [
        (row["episode"], row["split"], row["observations"][0][0], row["steps"], *ends(row))
        for row in read(tmp_path / "out")
    ]
    assert found == [
        ("drive-00000", "train", 0, 30, False, True),
        ("drive-00001", "train", 30, 30, False, True),
        ("drive-00002", "train", 60, 5, False, True),
        ("drive-00003", "validation", 65, 10, False, True),
        ("drive-00004", "test", 75, 25, False, True),
    ]
    prepare(tmp_path / "drive.csv", tmp_path / "whole", *columns)
    assert [(row["episode"], row["steps"], row["split"]) for row in read(tmp_path / "whole")] == [
        ("drive", 100, "train")
    ]


def test_a_split_column_cuts_where_it_changes(tmp_path):
    log = numbers(10, part=["train"] * 4 + ["Val"] * 3 + ["testing"] * 3)
    log.to_csv(tmp_path / "a.csv", index=False)
    pairs = ("observations=x", "split_column=part")
    prepare(tmp_path / "a.csv", tmp_path / "out", *pairs, "episode_steps=3")
    assert [(row["split"], row["steps"]) for row in read(tmp_path / "out")] == [
        ("train", 3),
        ("train", 1),
        ("validation", 3),
        ("test", 3),
    ]
    assert "actions" not in read(tmp_path / "out")[0]
    numbers(4, part=["train"] * 2 + ["extra"] * 2).to_csv(tmp_path / "a.csv", index=False)
    prepare(tmp_path / "a.csv", tmp_path / "odd", *pairs)
    assert reasons(tmp_path / "odd") == {"a-00001": importing.NO_SPLIT}


def test_done_ends_episodes_of_a_log_without_an_episode_column(tmp_path):
    numbers(7, over=[0, 0, 1, 0, 1, 0, 0]).to_parquet(tmp_path / "a.parquet")
    pairs = ("observations=x", "actions=u", "done=over")
    prepare(tmp_path / "a.parquet", tmp_path / "out", *pairs, "open=allow")
    found = [(row["steps"], *ends(row)) for row in read(tmp_path / "out")]
    assert found == [(3, True, False), (2, True, False), (2, False, True)]
    prepare(tmp_path / "a.parquet", tmp_path / "strict", *pairs)
    assert [row["steps"] for row in read(tmp_path / "strict")] == [3, 2]
    assert "open=allow" in reasons(tmp_path / "strict")["a-00002"]


def test_pieces_of_a_longer_episode_need_no_end_of_their_own(tmp_path):
    numbers(5, run="a", over=[False] * 4 + [True]).to_parquet(tmp_path / "a.parquet")
    pairs = ("observations=x", "episode=run", "done=over", "episode_steps=2")
    prepare(tmp_path / "a.parquet", tmp_path / "out", *pairs)
    found = [(row["steps"], *ends(row)) for row in read(tmp_path / "out")]
    assert found == [(2, False, True), (2, False, True), (1, True, False)]


# ---------------------------------------------------------------- columns


def test_columns_are_named_by_spans_and_by_how_they_begin(tmp_path):
    rows = pd.DataFrame(
        {f"S{i}": [float(i)] * 2 for i in range(1, 13)}
        | {"q_b": [0.5, 0.5], "q_a": [0.25, 0.25], "q_t": [0, 1], "u1": [1.5, 2], "u2": [1, 2]}
    )
    rows.to_parquet(tmp_path / "a.parquet")
    pairs = ("observations=S2..S11,q_*", "actions=u*", "order=q_t")
    prepare(tmp_path / "a.parquet", tmp_path / "out", *pairs)
    row = read(tmp_path / "out")[0]
    assert row["observations"][0] == [*range(2, 12), 0.5, 0.25], (
        "q_t is the order and so no observation"
    )
    assert row["actions"] == [[1.5, 1], [2, 2]]
    for pairs, said in (
        (["observations=S1..S14"], "no column 'S13' for --set observations; did you mean"),
        (["observations=S1,S1"], "names column 'S1' twice"),
        (["observations=z*"], "no column begins with 'z'"),
        (["observations=S1", "order=q"], "no column 'q' for --set order"),
        (["actions=u1"], "observations= is missing"),
        (["observations=S1", "actions=u1", "order=u1", "discrete=true"], "named twice"),
    ):
        with pytest.raises(ValueError, match=said.replace("*", r"\*")):
            prepare(tmp_path / "a.parquet", tmp_path / "none", *pairs)


@pytest.mark.parametrize(
    ("values", "pairs", "want"),
    [
        (["go", "stop"], [], ["go", "stop"]),
        ([3, 1], [], ["3", "1"]),
        ([0, 1], ["action_names=go,stop"], ["go", "stop"]),
        ([1.0, 0.0], ["action_names=go,stop"], ["stop", "go"]),
        ([0.5, 1.0], [], [[0.5], [1.0]]),
        ([3, 1], ["discrete=false"], [[3], [1]]),
        ([3, 1], ["action_low=-5"], [[3], [1]]),
        ([True, False], [], ["true", "false"]),
    ],
)
def test_actions_are_classes_or_numbers(tmp_path, values, pairs, want):
    rows = numbers(2, act=values)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_csv(tmp_path / "b.csv", index=False)
    prepare(tmp_path / "a.parquet", tmp_path / "parquet", "observations=x", "actions=act", *pairs)
    prepare(tmp_path / "b.csv", tmp_path / "csv", "observations=x", "actions=act", *pairs)
    assert read(tmp_path / "parquet")[0]["actions"] == want
    found = read(tmp_path / "csv")[0]["actions"]
    assert [one.lower() if isinstance(one, str) else one for one in found] == want


def test_fractions_after_whole_numbers_are_no_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "BATCH_ROWS", 2)
    numbers(4, act=[0, 1, 1, 0]).to_csv(write(tmp_path / "logs/a.csv", ""), index=False)
    numbers(4, act=[0, 1, 0.5, 2]).to_csv(tmp_path / "logs/b.csv", index=False)
    pairs = ("observations=x", "actions=act")
    with pytest.raises(
        ValueError,
        match=r"^b\.csv: act is '0\.5', while it began with whole numbers .* --set discrete=false "
        r".* --set discrete=true",
    ):
        prepare(tmp_path / "logs", tmp_path / "none", *pairs)
    found = {}
    for choice in ("false", "true"):
        prepare(tmp_path / "logs", tmp_path / choice, *pairs, f"discrete={choice}")
        found[choice] = [action for row in read(tmp_path / choice) for action in row["actions"]]
    assert found == {
        "false": [[0], [1], [1], [0], [0], [1], [0.5], [2]],
        "true": ["0", "1", "1", "0", "0", "1", "0.5", "2"],
    }


def test_a_whole_number_is_one_class_however_it_is_written(tmp_path):
    write(tmp_path / "logs/a.csv", "x,act\n1,0\n2,+1.0\n3,-0.0\n4,1.\n")
    numbers(3, act=[1.0, 0.0, 2.0]).to_parquet(tmp_path / "logs/b.parquet")
    prepare(tmp_path / "logs", tmp_path / "out", "observations=x", "actions=act")
    assert [row["actions"] for row in read(tmp_path / "out")] == [
        ["0", "1", "0", "1"],
        ["1", "0", "2"],
    ]
    assert summary(tmp_path / "out")["notes"]["classes of actions"] == 3


def test_parquet_may_hold_lists(tmp_path):
    actions = pa.array([[0.5], [1.0]], pa.list_(pa.float32(), 1))
    table = pa.table({"o": [[1.0, 2.0], [3.0, 4.0]], "u": actions})
    pq.write_table(table, tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "out", "observations=o", "actions=u")
    (row,) = read(tmp_path / "out")
    assert (row["observations"], row["actions"]) == ([[1, 2], [3, 4]], [[0.5], [1]])


def test_order_may_be_times_with_parts_of_a_second(tmp_path):
    lines = [f"2024-05-01 10:00:00.{i}00,{i}\n" for i in range(1, 6)]
    source = write(tmp_path / "a.csv", "when,x\n" + "".join(lines))
    prepare(source, tmp_path / "out", "observations=x", "order=when")
    times = pd.to_datetime(["2024-05-01 10:00:00.1", "2024-05-01 10:00:00.2"]).tz_localize("UTC")
    pd.DataFrame({"when": times, "x": [1.0, 2]}).to_parquet(tmp_path / "b.parquet")
    prepare(tmp_path / "b.parquet", tmp_path / "two", "observations=x", "order=when")
    assert [row["steps"] for out in ("out", "two") for row in read(tmp_path / out)] == [5, 2]
    # Ascending in UTC alone
    lines = [f"2024-05-01T10:00:00.{i}00+0{5 - i}:00,{i}\n" for i in range(1, 6)]
    source = write(tmp_path / "c.csv", "when,x\n" + "".join(lines))
    prepare(source, tmp_path / "three", "observations=x", "order=when")
    assert [row["steps"] for row in read(tmp_path / "three")] == [5]


def test_names_of_episodes_in_several_files(tmp_path):
    for name in ("a", "b"):
        numbers(4, run=[0, 0, 1, 1]).to_csv(write(tmp_path / f"logs/{name}.csv", ""), index=False)
    prepare(tmp_path / "logs", tmp_path / "out", "observations=x", "episode=run")
    assert [row["episode"] for row in read(tmp_path / "out")] == [
        "a.csv/0",
        "a.csv/1",
        "b.csv/0",
        "b.csv/1",
    ]
    assert "stand in several files" in str(summary(tmp_path / "out")["notes"])
    prepare(tmp_path / "logs", tmp_path / "whole", "observations=x")
    assert [row["episode"] for row in read(tmp_path / "whole")] == ["a", "b"]


# ---------------------------------------------------------------- what cannot be used


def test_every_episode_that_cannot_be_used_is_counted_with_its_reason(tmp_path):
    def table(run: str, column: str = "", step: int = 0, value=None, **columns) -> pd.DataFrame:
        rows = numbers(4, run=run, paid=0.0, over=[False, False, False, True], goal="a", **columns)
        if column:
            rows[column] = rows[column].astype(object)
            rows.loc[step, column] = value
        return rows

    bad = {
        "nan": ("y", 2, float("nan"), "observation y is no number in step 2"),
        "inf": ("x", 1, float("inf"), "observation x is infinite in step 1"),
        "huge": ("x", 0, 1e39, "observation x is too large for float32 in step 0"),
        "word": ("x", 3, "broken", "observation x is no number in step 3"),
        "low": ("u", 2, -1.5, "action u is -1.5 in step 2, below action_low=-1"),
        "high": ("u", 3, 2.5, "action u is 2.5 in step 3, above action_high=2"),
        "none": ("u", 0, None, "action u is no number in step 0"),
        "back": ("t", 2, 0.5, "t does not ascend at step 2: 0.5 after 1"),
        "twice": ("t", 1, 0, "t does not ascend at step 1: 0 after 0"),
        "timeless": ("t", 3, None, "no t in step 3"),
        "paid": ("paid", 1, None, "reward is no number in step 1"),
        "open": ("over", 3, False, "it has no end: over is not true in its last row"),
        "early": ("over", 1, True, "over is true in step 1 of 4, before its last one"),
        "maybe": ("over", 1, "maybe", "over is 'maybe' in step 1, neither"),
        "goals": ("goal", 1, "b", "its rows have 2 values of task: 'a', 'b'"),
    }
    tables = [
        table("good"),
        *(table(name, *values[:3]) for name, values in bad.items()),
        table("fine"),
    ]
    pd.concat(tables).to_csv(tmp_path / "a.csv", index=False)
    columns = ("observations=x,y", "actions=u", "episode=run", "order=t", "reward=paid")
    bounds = ("action_low=-1", "action_high=2", "discrete=false")
    pairs = (*columns, "done=over", "task=goal", *bounds)
    prepare(tmp_path / "a.csv", tmp_path / "out", *pairs, max_bad=0.9)
    assert [row["episode"] for row in read(tmp_path / "out")] == ["good", "fine"]
    found = reasons(tmp_path / "out")
    assert found.keys() == bad.keys()
    for name, (*_, reason) in bad.items():
        assert found[name].startswith(reason), name
    assert sum(summary(tmp_path / "out")["broken"]["reasons"].values()) == len(bad)
    with pytest.raises(
        ValueError,
        match=r"15 of 17 .*--max-bad 0\.01 .*: a\.csv:episode nan \(from row 5\): observation y is no "
        "number",
    ):
        prepare(tmp_path / "a.csv", tmp_path / "strict", *pairs)


def test_widths_of_actions_that_differ(tmp_path):
    rows = {
        "run": ["a", "a", "b", "b"],
        "x": [1.0, 2, 3, 4],
        "u": [[1.0, 2], [1.0, 2], [1.0, 2], [1.0]],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    pairs = ("observations=x", "actions=u", "episode=run")
    prepare(tmp_path / "a.parquet", tmp_path / "out", *pairs)
    assert reasons(tmp_path / "out") == {"b": "action of 1 numbers in step 1, where step 0 has 2"}
    rows |= {"u": [[1.0, 2], [1.0, 2], [1.0], [1.0]], "who": ["r1", "r1", "r2", "r2"]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError,
        match=r"b\.parquet: episode b: actions of 1 numbers, where b\.parquet: episode a has 2, "
        r"of the same robot",
    ):
        prepare(tmp_path / "b.parquet", tmp_path / "two", *pairs)
    prepare(tmp_path / "b.parquet", tmp_path / "two", *pairs, "embodiment=who")
    assert [len(row["actions"][0]) for row in read(tmp_path / "two")] == [2, 1]


@pytest.mark.parametrize(
    ("text", "pairs", "said"),
    [
        (
            HEAD + BODY + "a,9,1,2,left,0,true\n",
            [],
            r"the episode of row 6 has rows further up, with others between; sort the table by run "
            r"and t",
        ),
        (
            HEAD + "a,0,1,2\n" + BODY,
            [],
            r"line 2: another number of fields than the header has; 1 such lines",
        ),
        (HEAD + BODY + ",9,1,2,left,0,true\n", [], r"no episode in row 6 \(column 'run'\)"),
        (HEAD, [], "no rows below the header"),
        (
            HEAD + "a,0,1,2,left,0,false\n",
            ["done=over"],
            r"no episode is left of 1\. First one: a\.csv: episode a .*it has no end",
        ),
        (
            HEAD + BODY,
            ["action_names=left,right", "actions=x,y"],
            "action_names= is for one column of integer codes",
        ),
        (HEAD + BODY, ["action_low=-1"], "are bounds of numbers, while actions are classes"),
        (HEAD + BODY, ["action_low=a"], "action_low=a: not numbers"),
        (
            HEAD + BODY,
            ["actions=x,y", "action_high=1,2,3"],
            "action_high has 3 numbers, actions have 2",
        ),
        (HEAD + BODY, ["test_share=0.5", "validation_share=0.5"], "leave no train steps"),
        (HEAD + BODY, ["test_share=0.5", "split=train"], "all say what a step's split is"),
        (HEAD + BODY, ["task=move", "task_name=park"], "a column and a name for all"),
        (
            HEAD + BODY,
            ["observation=x"],
            "importer trajectories has no option 'observation'; did you mean observations",
        ),
    ],
)
def test_bad_tables_and_options_give_one_clear_message(tmp_path, text, pairs, said):
    own = {pair.partition("=")[0] for pair in pairs}
    with pytest.raises(ValueError, match=said):
        prepare(
            write(tmp_path / "a.csv", text),
            tmp_path / "out",
            *(pair for pair in ROLES if pair.partition("=")[0] not in own),
            *pairs,
        )


def test_an_episode_is_named_with_its_own_file(tmp_path):
    pd.DataFrame(
        {"run": pd.Series(dtype=str), "x": pd.Series(dtype=float), "over": pd.Series(dtype=bool)}
    ).to_parquet(write(tmp_path / "odd/a.parquet", ""))
    pd.DataFrame({"run": ["a", "a"], "x": [1.0, 2.0], "over": [False, False]}).to_parquet(
        tmp_path / "odd/b.parquet"
    )
    with pytest.raises(
        ValueError,
        match=r"no episode is left of 1\. First one: b\.parquet: episode a .*it has no end",
    ):
        prepare(tmp_path / "odd", tmp_path / "out", "observations=x", "episode=run", "done=over")


def test_the_command_line_says_what_was_done(tmp_path, monkeypatch):
    for i in range(3):
        numbers(20).to_csv(write(tmp_path / f"logs/{i}.csv", ""), index=False)
    monkeypatch.setattr("pipeline.train.launch.start", lambda *given: None)
    args = ["prepare", "trajectories", str(tmp_path / "logs"), "-o", str(tmp_path / "cli")]
    said = CliRunner().invoke(cli.app, [*args, "--set", "observations=x,y", "--set", "actions=u"])
    assert said.exit_code == 0 and "train 3 rows in 1 part" in said.output
    said = CliRunner().invoke(cli.app, [*args, "--resize", "32", "--set", "observations=x"])
    assert said.exit_code == 2 and "--resize 32: importer trajectories reads text" in said.output


@pytest.mark.data
def test_the_log_of_the_scitos_robot(tmp_path):
    """5456 steps at 9 Hz; the first 75 % of time to train, the last 25 % to test, compared with the
    file's own rows.
    """
    file = Path(
        os.environ["ONETOMANY_DATA"], "robotics/scitos_wall_following/wall_following.parquet"
    )
    columns = ("observations=S1..S24", "actions=action_name", "order=step")
    cuts = ("episode_steps=40", "test_share=0.25")
    prepare(file, tmp_path / "out", *columns, *cuts, "embodiment_name=scitos")
    rows, own = read(tmp_path / "out"), pd.read_parquet(file)
    assert {
        split: sum(row["steps"] for row in rows if row["split"] == split)
        for split in ("train", "test")
    } == {"train": 4092, "test": 1364}
    assert [row["split"] for row in rows] == ["train"] * 103 + ["test"] * 35 and max(
        row["steps"] for row in rows
    ) == 40
    assert [action for row in rows for action in row["actions"]] == own.action_name.tolist()
    assert np.array_equal(
        np.concatenate([row["observations"] for row in rows]).astype(np.float32),
        own[[f"S{i}" for i in range(1, 25)]].to_numpy(),
    )
    assert all(
        row["truncated"] and not row["terminated"] and row["embodiment"] == "scitos" for row in rows
    )
