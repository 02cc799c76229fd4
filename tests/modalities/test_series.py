"""Regular series: channels by name, missing numbers, windows of long rows, augmentation."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from contract_rows import windows
from toys import rows_of, take

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.specs import ModalitySpec
from pipeline.modalities.series import Series

COLUMNS = {"series": "x"}
STATE = {"mean": [1.0, 0.0], "std": [2.0, 1.0], "names": ["a", "b"]}
STEPS = [[1, 10], [3, 11], [5, 12], [7, 13], [9, 14]]
BY_NAME = {"b": [10, 11, 12, 13, 14], "c": ["other"], "a": [1, 3, 5, 7, 9]}


def series(state=None, **options) -> Series:
    return bundle.build_modality(ModalitySpec("series", options, state or STATE))


def finished(modality, values, training=False, seed=0):
    table = pa.table({"x": values})
    arrays, bad = modality.decode(table, COLUMNS)
    assert not any(bad), bad
    return take(rows_of(modality, arrays), np.arange(len(table)), training=training, seed=seed)


def test_lists_of_steps_and_structs_of_channels_are_the_same():
    """Channels are matched by name, whatever their order; others are left out."""
    plain = series({"mean": STATE["mean"], "std": STATE["std"]}, length=6)
    expected = finished(plain, [STEPS])
    found = finished(series(length=6), [BY_NAME])
    assert torch.equal(expected["series"], found["series"])
    assert found["series"][0, :5, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found["known"][0, :, 0].tolist() == [True] * 5 + [False]
    _, (reason,) = plain.decode(pa.table({"x": [BY_NAME]}), COLUMNS)
    assert "in the order of the source's channels, which have no names" in reason


def test_state_is_that_of_the_known_numbers():
    table = pa.table({"x": [[[1.0, np.nan], [3.0, 5.0]], [[5.0, None]]]})
    state = Series.fit(registry.get("modality", "series").options_class(), table, COLUMNS, "")
    assert state == {"mean": [3.0, 5.0], "std": [pytest.approx(np.sqrt(8 / 3), rel=1e-6), 1.0]}


def test_rows_at_another_sampling_rate_are_bad():
    """As far as they have a column of steps; bundles without one, such as older ones, read all."""
    table = pa.table({"x": [STEPS] * 5, "t": [0.02, 0.0204, 0.01, None, 0.02]})
    columns = {**COLUMNS, "step": "t"}
    state = Series.fit(registry.get("modality", "series").options_class(), table, columns, "")
    assert state["step"] == 0.02
    _, bad = series(state).decode(table, columns)
    assert [reason[:45] for reason in bad] == [
        "",
        "",
        "its steps are 0.01 apart (t), and 0.02 in the",
        "its step (t) is missing, so its sampling rate",
        "",
    ]
    assert "prepare series --set step=0.02" in bad[2]
    without = {name: value for name, value in state.items() if name != "step"}
    assert not any(series(without).decode(table, columns)[1])
    assert not any(series(state).decode(table, COLUMNS)[1])
    assert "known steps are 0.02 apart, and those of" in series(state).coverage(table, COLUMNS)
    assert series(state).required_type("step", pa.string()) == "numbers"
    with pytest.raises(ValueError, match="column t: it holds null without a positive number"):
        unknown = table.set_column(1, "t", pa.nulls(5))
        Series.fit(registry.get("modality", "series").options_class(), unknown, columns, "")


@pytest.mark.parametrize(
    ("missing", "filled"),
    [("mean", [1.0, 0.0, 1.0, 2.0, 1.0]), ("last", [1.0, 0.0, 0.0, 2.0, 2.0])],
)
def test_missing_numbers_are_filled_in(missing, filled):
    """By the row's mean of the channel, or by the last number; before the first by the mean."""
    made = series({"mean": [0.0], "std": [1.0]}, length=5, missing=missing)
    batch = finished(made, [[None, 0.0, np.nan, 2.0]])
    assert batch["series"][0, :, 0].tolist() == filled
    assert batch["known"][0, :, 0].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(("cut", "first"), [("first", 0.0), ("middle", 1.0), ("last", 2.0)])
def test_a_part_of_a_long_row_is_read(cut, first):
    made = series(length=3, cut=cut)
    assert finished(made, [STEPS_BY_NAME])["series"][0, :, 0].tolist() == [
        first,
        first + 1,
        first + 2,
    ]
    said = f"1 of 1 rows have more than 3 steps; option cut says which are read ({cut})"
    assert made.coverage(pa.table({"x": [STEPS_BY_NAME]}), COLUMNS) == said


STEPS_BY_NAME = {name: BY_NAME[name] for name in ("a", "b")}


def test_training_takes_other_parts_and_changes_the_channels():
    made = series(length=3, crop=True)
    starts = {
        finished(made, [STEPS_BY_NAME], True, seed)["series"][0, 0, 0].item() for seed in range(20)
    }
    assert starts == {0.0, 1.0, 2.0}
    changed = series({"mean": [0.0], "std": [2.0]}, length=2000, jitter=0.5)
    noise = finished(changed, [[0.0] * 2000], True)["series"]
    assert abs(noise.mean()) < 0.05 and noise.std().item() == pytest.approx(0.5, rel=0.05)
    scaled = series(length=5, scale=0.2)
    plain = finished(scaled, [STEPS_BY_NAME] * 50)["series"]
    rows = finished(scaled, [STEPS_BY_NAME] * 50, True)["series"]
    factors = rows[:, 1:, 0] / plain[:, 1:, 0]
    assert torch.allclose(factors, factors[:, :1].expand(-1, 4), atol=1e-5)
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2
    assert torch.equal(finished(scaled, [STEPS_BY_NAME] * 50, True)["series"], rows)


def test_numbers_that_are_large_beside_their_deviation_keep_it():
    values = 1.7e9 + np.arange(100) / 8
    table = pa.table({"x": [values.tolist()]})
    state = Series.fit(registry.get("modality", "series").options_class(), table, COLUMNS, "")
    assert state["std"] == [pytest.approx(values.std(), rel=1e-5)]
    found = finished(series(state, length=100), [values.tolist()])["series"][0, :, 0]
    np.testing.assert_allclose(found, (values - values.mean()) / values.std(), atol=1e-4)


def test_most_steps_say_how_many_channels_there_are():
    table = pa.table({"x": [[[1.0, 2.0]], *[[[1.0, 2.0, 3.0]]] * 9]})
    state = Series.fit(registry.get("modality", "series").options_class(), table, COLUMNS, "")
    assert state["mean"] == [1.0, 2.0, 3.0]


def test_an_empty_batch_has_its_shapes():
    made = series(length=5, crop=True, jitter=0.5, scale=0.5)
    column = pa.array([], pa.list_(pa.list_(pa.float64())))
    arrays, _ = made.decode(pa.table({"x": column}), COLUMNS)
    ids = np.zeros(0, dtype=np.int64)
    batch = Batch(ids, torch.zeros(0, dtype=torch.int64), made.collate(arrays))
    batch = made.finish(made.augment(batch))
    assert batch["series"].shape == batch["known"].shape == (0, 5, 2)
    assert batch["series"].dtype == torch.float32 and batch["known"].dtype == torch.bool


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[1.0, 2.0], [3.0]], "step 1 has 1 numbers, and 2 channels were expected"),
        ([], "the series has no steps"),
        (None, "the series is null"),
        ([[1.0, np.inf]], "the series holds an infinite number"),
    ],
)
def test_a_bad_row_says_why(value, reason):
    made = series({"mean": STATE["mean"], "std": STATE["std"]})
    _, bad = made.decode(pa.table({"x": [value, STEPS]}), COLUMNS)
    assert bad == [reason, ""]


def test_channels_of_unequal_length_are_bad():
    _, bad = series().decode(pa.table({"x": [{"a": [1, 2], "b": [1]}]}), COLUMNS)
    assert bad == ["channels of one row have 1 and 2 steps"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (pa.string(), "a struct of lists of numbers, one for each of the channels a, b"),
        (pa.list_(pa.float32()), "one for each of the channels a, b"),
        (pa.struct({"a": pa.string()}), "field a is none"),
        (pa.struct({"a": pa.list_(pa.int16())}), ""),
    ],
)
def test_columns_of_another_type_are_reported(kind, says):
    found = series().required_type("series", kind)
    assert says in found and bool(says) == bool(found)


def test_channels_that_differ_are_named():
    table = pa.table({"x": [{"a": [1.0], "z": [1.0]}]})
    assert series().coverage(table, COLUMNS) == (
        "channels that these rows lack (1): b; unknown channels, left out (1): z; 1 of 1 rows have "
        "fewer than 128 steps, and missing numbers behind them"
    )
    assert [one.names for one in series().name_differences(table, COLUMNS)] == [("b",), ("z",)]
    means = dict(series().single_features(pa.table({"x": [STEPS_BY_NAME]}), COLUMNS))
    assert means["a (mean)"].tolist() == [5.0]
    assert means["a (standard deviation)"].tolist() == [pytest.approx(np.sqrt(8))]


def test_rows_that_are_nearly_the_same_are_found():
    """Another gain, offset and a little noise; not another row."""
    sample, rng = windows(), np.random.default_rng(0)
    rows = [row["heart"] for row in sample.table["signal"].to_pylist()]
    noise = np.concatenate(rows).std() * 0.01
    changed = [(3 * np.array(row) + 7 + 3 * noise * rng.standard_normal(len(row))) for row in rows]
    one, other = (
        Series.near_signatures(pa.table({"x": part}), COLUMNS) for part in (rows, changed)
    )
    search = Series.near_search
    assert search.alike(one, other).all()
    shifted = {name: np.roll(array, 1, 0) for name, array in other.items()}
    assert not search.alike(one, shifted).any()
