"""Trajectories: spaces and their statistics against numpy on plain lists, rows that cannot be read
with the place that is wrong, growth by a target's rows.
"""

import io
import json
import math
from itertools import pairwise

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from toys import TRAJECTORY_COLUMNS, episodes

from pipeline.config import registry
from pipeline.data import manifests
from pipeline.data.stream import Decoder, Rows, plan_of, train_batches
from pipeline.media.episodes import Episodes, cleaned
from pipeline.modalities.trajectory import MAX_DEVIATIONS, Trajectory, TrajectoryOptions

VECTORS, NAMES = pa.list_(pa.list_(pa.float32())), pa.list_(pa.string())
COLUMNS = {
    "observations": "observations",
    "actions": "actions",
    "embodiment": "embodiment",
    "task": "task",
}


def table(*rows, actions=VECTORS, **more):
    """Rows of (observations, actions), and further columns."""
    return pa.table(
        {
            "observations": pa.array([row[0] for row in rows], VECTORS),
            "actions": pa.array([row[1] for row in rows], actions),
            **more,
        }
    )


def walk(steps: int, observation: int = 3, action: int = 2, seed: int = 0, shift: float = 0.0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(5 + shift, 2, (steps, observation)).tolist(),
        rng.normal(-1 + shift, 0.5, (steps, action)).tolist(),
    )


def steered(names: str, observation: int = 3, seed: int = 0):
    return np.random.default_rng(seed).normal(0, 1, (len(names), observation)).tolist(), list(names)


def made(rows: pa.Table, **options) -> Trajectory:
    options = TrajectoryOptions(**options)
    return Trajectory(
        options, json.loads(json.dumps(Trajectory.fit(options, rows, COLUMNS, "policy/mlp")))
    )


def read(modality: Trajectory, rows: pa.Table):
    arrays, bad = modality.decode(rows, COLUMNS)
    return modality.collate(arrays), bad


# ---------------------------------------------------------------- what is fitted and decoded


def test_steps_are_standardised_by_the_statistics_of_all_steps():
    """Against float64 numpy over the concatenated steps; a row that is longer counts more."""
    rows = [walk(7, seed=1), walk(40, seed=2, shift=3.0), walk(1, seed=3)]
    modality = made(table(*rows))
    seen, done = (np.concatenate([np.array(row[k]) for row in rows]) for k in (0, 1))
    properties = modality.state["spaces"]["o3a2"]
    for key, want in {
        "observation_mean": seen.mean(0),
        "observation_std": seen.std(0),
        "action_mean": done.mean(0),
        "action_std": done.std(0),
    }.items():
        np.testing.assert_allclose(properties[key], want, rtol=2e-6, err_msg=key)
    assert (
        properties["observation"],
        properties["action"],
        properties["discrete"],
        modality.state["tasks"],
    ) == (
        3,
        2,
        None,
        [],
    )
    batch, bad = read(modality, table(*rows))
    assert (
        bad == ["", "", ""]
        and batch["observations"].shape == (3, 40, 3)
        and batch["actions"].shape == (3, 40, 2)
    )
    assert (
        batch["mask"].sum(1).tolist() == [7, 40, 1]
        and batch["space"].tolist() == [0, 0, 0]
        and batch["task"].tolist() == [0, 0, 0]
    )
    for i, (one, two) in enumerate(rows):
        n = len(one)
        np.testing.assert_allclose(
            batch["observations"][i, :n],
            (np.array(one) - seen.mean(0)) / seen.std(0),
            rtol=1e-4,
            atol=1e-5,
        )
        np.testing.assert_allclose(
            batch["actions"][i, :n],
            (np.array(two) - done.mean(0)) / done.std(0),
            rtol=1e-4,
            atol=1e-5,
        )
        assert (
            not batch["observations"][i, n:].any()
            and not batch["actions"][i, n:].any()
            and batch["mask"][i].tolist() == [t < n for t in range(40)]
        )


def test_long_rows_are_standardised_as_short_ones():
    """Numbers are done in blocks: the place of a step within its row, and of the row among others,
    does not matter.
    """
    modality = made(table(walk(3000, 7, 3), walk(2000, 7, 3, seed=1)))
    rows = [walk(n, 7, 3, seed=n) for n in (9000, 1, 5, 4000)]
    batch, _ = read(modality, table(*rows))
    for i, row in enumerate(rows):
        for name, given in zip(("observation", "action"), row, strict=True):
            mean, std = (
                np.array(modality.state["spaces"]["o7a3"][f"{name}_{key}"])
                for key in ("mean", "std")
            )
            np.testing.assert_allclose(
                batch[f"{name}s"][i, : len(given)],
                (np.array(given) - mean) / std,
                rtol=1e-4,
                atol=2e-5,
            )


def test_what_does_not_vary_and_what_has_blown_up_stay_within_bounds():
    still = [[3.0, 1e9]] * 5
    modality = made(table((still, [[2.0]] * 5), (still, [[2.0]] * 3 + [[2.0]] * 2)))
    assert modality.state["spaces"]["o2a1"]["observation_std"] == [1.0, 1.0] and modality.state[
        "spaces"
    ]["o2a1"]["action_std"] == [1.0]
    batch, _ = read(
        modality, table(([[3.0, 1e9], [4.5, 1e9], [-1e30, 3e38]], [[2.0], [1e6], [-4.0]]))
    )
    assert batch["observations"][0].tolist() == [
        [0, 0],
        [1.5, 0],
        [-MAX_DEVIATIONS, MAX_DEVIATIONS],
    ]
    assert batch["actions"][0].tolist() == [[0], [1e6 - 2], [-6]]  # what is to be done is never cut


def test_several_spaces_in_one_corpus():
    rows = episodes(9)
    modality = made(rows)
    assert modality.names == ("arm", "cart") and modality.tasks == ("push", "reach")
    spaces = {
        name: {"observation": o, "action": a, "discrete": False}
        for name, o, a in (("arm", 3, 2), ("cart", 2, 1))
    }
    assert modality.inputs() == {"spaces": spaces, "tasks": 2, "images": None}
    batch, bad = read(modality, rows)
    assert (
        not any(bad)
        and batch["space"].tolist() == [0, 1] * 4 + [0]
        and batch["task"].tolist() == [1, 2, 0] * 3
    )
    cart = batch["space"] == 1
    assert (
        not batch["observations"][cart][..., 2:].any()
        and not batch["actions"][cart][..., 1:].any()
        and batch["observations"].shape[2] == 3
    )
    for number, name in enumerate(modality.names):
        mine = rows.filter(pa.array([value == name for value in rows["embodiment"].to_pylist()]))
        alone, _ = read(made(mine), mine)
        width = modality.spaces[name].observation
        here = batch["observations"][batch["space"] == number][
            batch["mask"][batch["space"] == number]
        ][:, :width]
        torch.testing.assert_close(here, alone["observations"][alone["mask"]], rtol=0, atol=0)


def test_spaces_without_a_name_are_told_by_their_widths():
    rows = table(
        walk(4, 9, 1),
        walk(4, 11, 3),
        walk(6, 9, 1, seed=4),
        embodiment=pa.array([None, "", None], pa.string()),
    )
    assert made(rows).names == ("o11a3", "o9a1")
    assert read(made(rows), rows)[0]["space"].tolist() == [1, 0, 1]
    assert made(table(steered("abca", 24), steered("d", 24), actions=NAMES)).names == ("o24c4",)
    modality = made(table(walk(4), walk(4), embodiment=["arm", "leg"]))
    batch, bad = read(modality, table(walk(4), walk(4), embodiment=["leg", None]))
    assert batch["space"][0] == 1 and bad[0] == ""
    assert (
        bad[1]
        == "2 spaces have observations of 3 numbers and actions of 2 numbers (arm, leg): column "
        "embodiment must tell which"
    )
    # The only one with these widths
    assert read(made(table(walk(4), embodiment=["arm"])), table(walk(4)))[1] == [""]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("UR5 e/left.arm", "UR5_e_left_arm"),
        ("train", "train_"),
        ("to", "to_"),
        ("keys", "keys_"),
        ("training", "training_"),
        (" so-100 ", "so-100"),
        ("ärm", "_rm"),
        ("", ""),
    ],
)
def test_names_of_robots_may_name_a_module(text, name):
    assert cleaned(text) == name
    if name:
        torch.nn.ModuleDict({name: torch.nn.Linear(1, 1)})


def test_classes_are_one_hot_by_their_sorted_names():
    rows = table(steered("cab"), steered("bb", seed=1), actions=NAMES)
    modality = made(rows)
    assert (
        modality.state["spaces"]["o3c3"]["discrete"] == ["a", "b", "c"]
        and modality.state["spaces"]["o3c3"]["action_mean"] == []
    )
    assert modality.inputs()["spaces"]["o3c3"] == {"observation": 3, "action": 3, "discrete": True}
    batch, bad = read(modality, rows)
    assert batch["actions"].tolist() == [
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
        [[0, 1, 0], [0, 1, 0], [0, 0, 0]],
    ] and not any(bad)
    rows = rows.append_column("embodiment", pa.array(["arm", "leg"])).take([0, 1, 1])
    batch, bad = read(made(rows), rows)
    assert (
        not any(bad)
        and batch["actions"].shape == (3, 3, 3)
        and batch["actions"][1].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    )


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int64()),
        pa.large_list(pa.int8()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_classes_may_be_whole_numbers_or_dictionaries(kind):
    values = [[2, 0], [1, 2]] if pa.types.is_integer(kind.value_type) else [["2", "0"], ["1", "2"]]
    rows = table((steered("ab")[0], values[0]), (steered("ab")[0], values[1]), actions=kind)
    modality = made(pa.concat_tables([rows.slice(0, 1), rows.slice(1, 1)]))
    assert modality.state["spaces"]["o3c3"]["discrete"] == ["0", "1", "2"]
    assert read(modality, rows)[0]["actions"].argmax(-1).tolist() == [[2, 0], [1, 2]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float64())),
        pa.large_list(pa.large_list(pa.float32())),
        pa.list_(pa.list_(pa.float32(), 3)),
        pa.list_(pa.list_(pa.int16())),
        pa.list_(pa.large_list(pa.float16())),
    ],
)
def test_columns_may_be_lists_of_any_kind(kind):
    given = [[[1, 2, 3], [4, 5, 7]], [[0, 1, 2]], [[9, 9, 9]], None]
    rows = pa.table(
        {
            "observations": pa.array(given, kind)
            if "float16" not in str(kind) and "halffloat" not in str(kind)
            else pa.array(
                [
                    None if row is None else [list(map(np.float16, step)) for step in row]
                    for row in given
                ],
                kind,
            )
        }
    )
    modality = made(rows)
    batch, bad = read(modality, rows.slice(1))
    assert (
        bad == ["", "", "the observations are null"]
        and modality.names == ("o3a0",)
        and "actions" not in batch
    )
    steps = np.array([[1, 2, 3], [4, 5, 7], [0, 1, 2], [9, 9, 9]], dtype=float)
    np.testing.assert_allclose(
        batch["observations"][:2, 0],
        ((steps - steps.mean(0)) / steps.std(0))[2:],
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_row_is_the_same_wherever_it_stands():
    """Slices, several chunks and bad neighbours of other widths: every offset is counted from the
    row itself.
    """
    rows = [
        walk(5, seed=1),
        ([[1.0], [2.0, 3.0]], [[1.0, 1.0]] * 2),
        walk(3, seed=2),
        (None, [[0.5, 0.5]]),
        ([], []),
        walk(6, 5, 2, seed=3),
        walk(4, seed=4),
    ]
    whole = table(*rows)
    modality = made(table(*(rows[i] for i in (0, 2, 5, 6))))
    arrays, bad = modality.decode(whole, COLUMNS)
    assert [bool(reason) for reason in bad] == [False, True, False, True, True, False, False]
    for cut in (
        whole.slice(2),
        pa.concat_tables([whole.slice(0, 3), whole.slice(3)]),
        whole.take(pa.array([6, 1, 0, 3, 5])),
    ):
        found, reasons = modality.decode(cut, COLUMNS)
        where = {json.dumps(row): i for i, row in enumerate(whole.to_pylist())}
        for i, row in enumerate(cut.to_pylist()):
            j = where[json.dumps(row)]
            assert reasons[i] == bad[j] and found["space"][i] == arrays["space"][j]
            for name in ("observations", "actions"):
                np.testing.assert_array_equal(found[name][i], arrays[name][j])
    assert all(len(arrays[name][i]) == 0 for name in ("observations", "actions") for i in (1, 3, 4))


# ---------------------------------------------------------------- rows that cannot be read

GOOD = walk(4)
NAN = math.nan


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (([[1, 2, 3], [1, NAN, 3]], [[1, 2]] * 2), "observations: step 1, number 1 is nan"),
        (([[1, 2, 3], [1, 2, -math.inf]], [[1, 2]] * 2), "observations: step 1, number 2 is -inf"),
        (([[1, 2, None]], [[1, 2]]), "observations: step 0, number 2 is nan"),
        (([[1, 2, 3]] * 3, [[1, 2], [1, 2], [math.inf, 2]]), "actions: step 2, number 0 is inf"),
        (
            ([[1, 2, 3]] * 3, [[1, 2]] * 2),
            "the episode has 3 observations and 2 actions: an action belongs to every observation",
        ),
        (([[1, 2, 3], [1, 2]], [[1, 2]] * 2), "observations: step 1 has 2 numbers, step 0 has 3"),
        (([[1, 2, 3]] * 3, [[1, 2], [1, 2], [1]]), "actions: step 2 has 1 numbers, step 0 has 2"),
        (([[1, 2, 3], None], [[1, 2]] * 2), "observations: step 1 is null"),
        (([None, [1, 2, 3]], [[1, 2]] * 2), "observations: step 0 is null"),
        (([[], []], [[1, 2]] * 2), "observations: step 0 has no numbers"),
        (([], []), "the episode has no steps"),
        ((None, [[1, 2]]), "the observations are null"),
        (([[1, 2, 3]], None), "the actions are null"),
        (
            ([[1, 2, 3, 4]], [[1, 2]]),
            "no space has observations of 4 numbers and actions of 2 numbers: space o3a2 has "
            "observations of 3 numbers and actions of 2",
        ),
        (
            ([[1, 2, 3]], [[1, 2, 3]]),
            "no space has observations of 3 numbers and actions of 3 numbers",
        ),
    ],
)
def test_a_bad_row_names_its_place_and_leaves_the_others(row, reason):
    modality = made(table(GOOD, walk(9, seed=5)))
    batch, bad = read(modality, table(GOOD, row, GOOD))
    assert bad[0] == bad[2] == "" and bad[1].startswith(reason)
    assert (
        batch["mask"].sum(1).tolist() == [4, 0, 4]
        and not batch["observations"][1].any()
        and not batch["actions"][1].any()
    )
    alone, _ = read(modality, table(GOOD))
    for name in ("observations", "actions"):
        assert torch.equal(batch[name][2], alone[name][0]) and torch.equal(
            batch[name][0], alone[name][0]
        )


def test_what_a_named_robot_cannot_be_is_reported():
    modality = made(table(walk(4), walk(5, 4, 1), embodiment=["arm", "leg"]))
    _, bad = read(
        modality, table(walk(4), walk(4), walk(4, 4, 1), embodiment=["amr", "leg", "leg"])
    )
    assert bad == [
        "embodiment amr is not known; did you mean arm?",
        "space leg has observations of 4 numbers and actions of 1 numbers, the row has "
        "observations of 3 numbers and actions of 2 numbers",
        "",
    ]


def test_an_unknown_class_is_told_with_its_step():
    modality = made(table((steered("abc")[0], ["left", "right", "stop"]), actions=NAMES))
    _, bad = read(
        modality,
        table(
            (steered("abc")[0], ["left", "rigth", "up"]),
            (steered("a")[0], [None]),
            (steered("a")[0], ["stop"]),
            actions=NAMES,
        ),
    )
    assert bad == [
        "actions: step 1 is 'rigth', which is not a class of space o3c3; did you mean right?",
        "actions: step 0 is null",
        "",
    ]
    _, bad = read(modality, table(GOOD))
    assert bad[0] == (
        "no space has observations of 3 numbers and actions of 2 numbers: space o3c3 has "
        "observations of 3 numbers and actions of 3 classes"
    )
    _, bad = read(made(table(GOOD)), table(steered("ab"), actions=NAMES))
    assert bad[0].startswith("no space has observations of 3 numbers and actions that are classes")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "observations",
            pa.array([[1.0]]),
            "column observations: it holds list<.*double>; observations are lists, one entry "
            "a step, of lists of numbers$",
        ),
        ("observations", pa.array(["a"]), "it holds string"),
        ("observations", pa.array([[["a"]]]), "of lists of numbers$"),
        (
            "actions",
            pa.array([[0.5]]),
            "column actions: it holds list<.*double>; actions are lists, one entry a step, of "
            "lists of numbers or of class names$",
        ),
        ("actions", pa.array([[["left"]]]), "of lists of numbers or of class names"),
    ],
)
def test_a_column_of_another_kind_is_refused(column, values, message):
    rows = table(([[1.0, 2.0, 3.0]], [[1.0, 2.0]]))
    with pytest.raises(ValueError, match=message):
        read(made(rows), rows.set_column(rows.column_names.index(column), column, values))


def test_fit_of_rows_that_cannot_be_used_says_so():
    with pytest.raises(
        ValueError,
        match="column observations: none of the first 2 rows can be read: the episode has no steps",
    ):
        made(table(([], []), (None, None)))
    with pytest.raises(ValueError, match="none of the first 0 rows can be read: no rows"):
        made(table())


def test_bad_rows_are_left_out_of_the_statistics():
    assert (
        made(
            table(GOOD, ([[NAN, 2.0, 3.0]], [[1.0, 2.0]]), ([[1.0, 2.0, 3.0]] * 2, [[1.0, 2.0]]))
        ).state
        == made(table(GOOD)).state
    )


# ---------------------------------------------------------------- frames


def frame(number: int, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    PIL.Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    ).save(sink, kind)
    return sink.getvalue()


def test_frames_stand_beside_their_steps():
    columns = {**COLUMNS, "images": "images"}
    frames = [
        [frame(i) for i in range(3)],
        [frame(9)],
        [frame(1), b"none", frame(2)],
        [frame(1)],
        [frame(1), None],
    ]
    steps = [3, 1, 3, 2, 2]
    rows = table(*(walk(n, seed=n) for n in steps), images=pa.array(frames, pa.list_(pa.binary())))
    options = TrajectoryOptions(images=8)
    modality = Trajectory(options, Trajectory.fit(options, rows, columns, "policy/mlp"))
    assert modality.inputs()["images"] == [3, 8, 8]
    arrays, bad = modality.decode(rows, columns)
    assert (
        bad[:2] == ["", ""]
        and bad[2].startswith("images: step 1: ")
        and bad[3].startswith("the episode has 1 images and 2 observations")
    )
    assert bad[4].startswith("images: step 1: ")
    batch = modality.collate(arrays)
    assert (
        batch["images"].shape == (5, 3, 3, 8, 8)
        and batch["images"].dtype == torch.uint8
        and not batch["images"][2:].any()
    )
    image = registry.get("modality", "image")
    for i, t in ((0, 0), (0, 2), (1, 0)):
        whole = image(image.options_class(size=8, fit="squash"), {}).decode(
            pa.table({"image": [frames[i][t]]}), {"image": "image"}
        )[0]["image"][0]
        assert np.array_equal(batch["images"][i, t], whole)
    assert (
        not batch["images"][1, 1:].any()
        and batch["observations"][0].any()
        and not batch["observations"][2].any()
    )


def test_frames_are_given_and_asked_for_or_neither():
    rows = table(GOOD, images=pa.array([[frame(0)] * 4], pa.list_(pa.binary())))
    with pytest.raises(
        ValueError,
        match=r"column images holds frames and the modality reads none: set \{trajectory: "
        r"\{images: 96\}\}",
    ):
        Trajectory.fit(TrajectoryOptions(), rows, {**COLUMNS, "images": "images"}, "")
    with pytest.raises(ValueError, match="column im holds frames and the modality reads none"):
        made(table(GOOD)).extend_state(table(GOOD), {**COLUMNS, "images": "im"})
    with pytest.raises(ValueError, match="the modality is to read frames, and no column has them"):
        Trajectory.fit(TrajectoryOptions(images=32), rows, COLUMNS, "")
    modality = Trajectory(TrajectoryOptions(images=32), made(table(GOOD)).state)
    with pytest.raises(
        ValueError, match=r"and no column has them: name it in .* or by --column images=NAME"
    ):
        modality.decode(rows, COLUMNS)


# ---------------------------------------------------------------- what a target brings


def test_a_target_grows_what_its_source_lacks_and_nothing_else():
    source = made(episodes(8))
    target = pa.concat_tables(
        [
            episodes(4, seed=5, robots=("cart",))
            .drop_columns(["task"])
            .append_column("task", pa.array(["push", "turn", "lift", ""])),
            table(
                walk(6, 5, 4), walk(4, 5, 4, seed=2), embodiment=["UR5 e"] * 2, task=["turn"] * 2
            ),
        ],
        promote_options="default",
    )
    assert source.coverage(target, COLUMNS) == (
        "1 of 2 robots are known; new: UR5_e (2 rows); 1 of 3 tasks are known; new: turn (3 "
        "rows), lift (1 rows)"
    )
    before = json.dumps(source.state)
    state = source.extend_state(target, COLUMNS)
    assert json.dumps(source.state) == before, "trials share the source's state"
    assert list(state["spaces"]) == ["arm", "cart", "UR5_e"] and state["tasks"] == [
        "push",
        "reach",
        "lift",
        "turn",
    ]
    assert {name: state["spaces"][name] for name in ("arm", "cart")} == source.state["spaces"]
    assert state["spaces"]["UR5_e"] == made(target.slice(4)).state["spaces"]["UR5_e"]
    grown = Trajectory(source.options, state)
    batch, bad = read(grown, target)
    assert (
        not any(bad)
        and batch["space"].tolist() == [1] * 4 + [2] * 2
        and batch["task"].tolist() == [1, 4, 3, 0, 4, 4]
    )
    assert (
        grown.coverage(target, COLUMNS) == "2 of 2 robots are known; 3 of 3 tasks are known"
        and grown.extend_state(target, COLUMNS) is grown.state
    )
    assert source.extend_state(episodes(5, seed=9), COLUMNS) is source.state


def test_classes_that_a_source_lacks_make_a_space_of_their_own():
    source = made(table(steered("abcd"), actions=NAMES))
    for names, spaces in (
        ("abca", ["o3c4"]),
        ("abcde", ["o3c4", "o3c5"]),
        ("wxyz", ["o3c4", "o3c4_2"]),
    ):
        target = table(steered(names), steered(names[:1]), actions=NAMES)
        state = source.extend_state(target, COLUMNS)
        assert list(state["spaces"]) == spaces
        batch, bad = read(Trajectory(source.options, state), target)
        assert not any(bad) and batch["space"].tolist() == [len(spaces) - 1] * 2
    assert (
        source.coverage(table(steered("aexw"), actions=NAMES), COLUMNS)
        == "0 of 1 robots are known; new: o3c (1 rows)"
    )


def test_rows_without_a_name_find_the_space_that_has_their_classes():
    first = made(table(steered("abcd"), actions=NAMES))
    second = Trajectory(
        first.options, first.extend_state(table(steered("abe"), actions=NAMES), COLUMNS)
    )
    assert second.names == ("o3c4", "o3c3") and read(second, table(steered("ab"), actions=NAMES))[
        0
    ]["space"].tolist() == [1], "those that it grew for"
    back = table(steered("abcd"), steered("ab"), actions=NAMES)
    assert second.coverage(back, COLUMNS) == "1 of 1 robots are known"
    third = Trajectory(first.options, json.loads(json.dumps(second.extend_state(back, COLUMNS))))
    assert third.names == ("o3c4", "o3c3"), "no third space of the same classes"
    batch, bad = read(third, back)
    assert not any(bad) and batch["space"].tolist() == [0, 0]


def test_numbers_far_beyond_the_source_are_reported():
    source = made(table(walk(50, 3, 2, seed=1)))
    near, far = table(walk(50, 3, 2, seed=2)), table(walk(50, 3, 2, seed=2, shift=1e4))
    assert source.coverage(near, COLUMNS) == "1 of 1 robots are known"
    assert (
        source.coverage(far, COLUMNS)
        == "1 of 1 robots are known; 100% of the numbers that o3a2 observes lie beyond 10 of its "
        "deviations, and are cut there"
    )


def test_small_units_are_no_rounding():
    one, two = (
        np.random.default_rng(0).normal(0, 5e-7, (40, 3)),
        np.full((40, 2), 1000.0) + np.random.default_rng(1).normal(0, 1e-5, (40, 2)),
    )
    properties = made(table((one.tolist(), two.tolist()))).state["spaces"]["o3a2"]
    np.testing.assert_allclose(properties["observation_std"], one.std(0), rtol=1e-5)
    assert properties["action_std"] == [1.0, 1.0], "float32 has no more digits: that is rounding"


def test_what_was_executed_stands_beside_what_is_to_be_learned():
    rows = table(walk(6), walk(4, seed=1)).append_column(
        "executed", pa.array([walk(6, seed=8)[1], walk(4, seed=9)[1]])
    )
    columns = {**COLUMNS, "executed": "executed"}
    modality = made(rows)
    arrays, bad = modality.decode(rows, columns)
    batch, std = modality.collate(arrays), np.array(modality.state["spaces"]["o3a2"]["action_std"])
    assert not any(bad) and not torch.equal(batch["executed"], batch["actions"])
    want = (
        np.array(rows["executed"][0].as_py())
        - np.array(modality.state["spaces"]["o3a2"]["action_mean"])
    ) / std
    np.testing.assert_allclose(batch["executed"][0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch["action_std"], np.tile(std, (2, 1)), rtol=1e-6)
    short = rows.set_column(
        rows.schema.get_field_index("executed"),
        "executed",
        pa.array([walk(6, 3, 3)[1], walk(3)[1]]),
    )
    assert modality.decode(short, columns)[1] == [
        "executed are 3 numbers a step, actions are 2 numbers a step: they are of one kind",
        "the episode has 4 observations and 3 executed: an action belongs to every "
        "observation; leave out a last observation that has none",
    ]
    some = rows.set_column(
        rows.schema.get_field_index("executed"), "executed", pa.array([walk(6, seed=8)[1], None])
    )
    arrays, bad = modality.decode(some, columns)
    found = modality.collate(arrays)
    assert not any(bad) and torch.equal(found["executed"][1], found["actions"][1]), (
        "where none is told, what stands there was done"
    )
    assert torch.equal(found["executed"][0], batch["executed"][0])
    named = table(steered("abca"), actions=NAMES).append_column(
        "executed", pa.array([list("abzz")])
    )
    classes = made(named)
    arrays, bad = classes.decode(named, columns)
    assert bad == [""] and classes.collate(arrays)["executed"][0].sum(-1).tolist() == [
        1,
        1,
        0,
        0,
    ], "a class that nobody teaches is no class"


def test_new_robots_of_known_widths_are_new():
    source = made(table(walk(4), walk(4), embodiment=["arm", "leg"]))
    assert list(source.extend_state(table(walk(4), embodiment=["tail"]), COLUMNS)["spaces"]) == [
        "arm",
        "leg",
        "tail",
    ]
    unnamed = table(walk(4))
    state = source.extend_state(unnamed, COLUMNS)
    assert list(state["spaces"]) == ["arm", "leg", "o3a2"]
    assert read(Trajectory(source.options, state), unnamed)[0]["space"].tolist() == [2]


# ---------------------------------------------------------------- run time, costs, streams


def test_run_time_sees_and_does_what_rows_say():
    rows = table(walk(30, seed=1), walk(20, seed=2))
    modality = made(rows)
    batch, _ = read(modality, rows)
    seen, done = rows["observations"][0].as_py(), rows["actions"][0].as_py()
    assert np.array_equal(
        modality.observe("o3a2", np.array(seen)), batch["observations"][0].numpy()
    )
    back = modality.act("o3a2", batch["actions"][0].numpy())
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, done, rtol=1e-5, atol=1e-5)
    classes = made(table(steered("cab"), actions=NAMES))
    assert (
        classes.act("o3c3", np.array([2, 0])).tolist() == [2, 0]
        and classes.act("o3c3", np.array([1])).dtype == np.int64
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.observe("o3a3", np.zeros((1, 3))), "unknown space 'o3a3'; did you mean o3a2"),
        (
            lambda m: m.observe("o3a2", np.zeros((1, 4))),
            r"space o3a2 has observations of 3 numbers, these are of shape \(1, 4\)",
        ),
        (lambda m: m.observe("o3a2", np.zeros(3)), r"of shape \(3,\)"),
        (lambda m: m.act("o3a2", np.zeros((2, 3))), r"actions of 2 numbers; .* shape \(2, 3\)"),
        (lambda m: m.act("o3a2", np.zeros(2)), r"shape \(2,\)"),
    ],
)
def test_run_time_refuses_what_is_of_another_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call(made(table(GOOD)))


def test_costs_are_steps_from_the_column_or_the_lists():
    modality = made(table(GOOD))
    rows = table(GOOD, walk(7), (None, None))
    assert modality.costs(rows, COLUMNS).tolist() == [4, 7, 0]
    assert modality.costs(
        rows.append_column("steps", pa.array([9, None, 2])), {**COLUMNS, "steps": "steps"}
    ).tolist() == [9, 0, 2]


@pytest.mark.parametrize("cost", [None, 60.0])
def test_batches_of_a_file_are_its_rows(tmp_path, cost):
    """Through the reader, the plan and the loader, by rows or by steps; each row once an epoch, and
    as it is alone.
    """
    rows = episodes(40, seed=3)
    pa.parquet.write_table(rows, tmp_path / "rows.parquet", row_group_size=7)
    modality = made(rows)
    selection = manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "parquet", ""))
    data = Rows(selection, Decoder(modality, None, {}, TRAJECTORY_COLUMNS))
    data = data.with_costs(0) if cost else data
    plan = plan_of(data, 0, 8, cost)
    steps = int(plan.batches_per_epoch) if cost else 5
    found = [loaded.batch for loaded in train_batches(data, plan, range(steps), decode="train")]
    assert sorted(np.concatenate([batch.rows for batch in found]).tolist()) == list(range(40))
    for batch in found:
        assert cost is None or batch["mask"].numel() <= 60
        for i, row in enumerate(batch.rows.tolist()):
            alone, _ = read(modality, rows.slice(row, 1))
            n = int(alone["mask"].sum())
            assert (
                n == batch["mask"][i].sum()
                and batch["space"][i] == alone["space"][0]
                and batch["task"][i] == alone["task"][0]
            )
            assert torch.equal(
                batch["observations"][i, :n], alone["observations"][0]
            ) and torch.equal(batch["actions"][i, :n], alone["actions"][0])


def test_an_empty_table_and_an_empty_batch_have_their_shapes():
    modality = made(episodes(4))
    batch, bad = read(modality, episodes(4).slice(0, 0))
    assert (
        bad == []
        and batch["observations"].shape == (0, 1, 3)
        and batch["actions"].shape == (0, 1, 2)
        and batch["mask"].shape == (0, 1)
    )


def test_nothing_is_copied_of_plain_columns():
    rows = table(walk(100, seed=1), walk(50, seed=2))
    found = Episodes.read(rows, COLUMNS)
    held = [
        buffer
        for name in ("observations", "actions")
        for chunk in rows[name].chunks
        for buffer in chunk.buffers()
        if buffer is not None
    ]
    for numbers in (found.observations, found.actions):
        assert numbers is not None
        place = numbers.values.__array_interface__["data"][0]
        assert any(buffer.address <= place < buffer.address + buffer.size for buffer in held)
        assert [stop - start for start, stop in pairwise(numbers.ends.tolist())] == [
            100 * (len(numbers.values) // 150),
            50 * (len(numbers.values) // 150),
        ]
