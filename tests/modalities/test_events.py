"""Event records: known variables by name, windows, standardised values, bad rows with a reason that
tells no value.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import EVENT_COLUMNS, event_rows, stays

from pipeline.core.contracts import Batch
from pipeline.modalities.events import Events, EventsOptions

LISTS = {
    "times": pa.list_(pa.float32()),
    "variables": pa.list_(pa.string()),
    "values": pa.list_(pa.float32()),
}
COLUMNS = {role: role for role in LISTS}
STATE = {"variables": ["HR", "Temp"], "mean": [100.0, 37.0], "std": [20.0, 0.5]}


def table(*rows):
    return pa.table(
        {
            role: pa.array([row[i] for row in rows], kind)
            for i, (role, kind) in enumerate(LISTS.items())
        }
    )


def decoded(*rows, state=STATE, **options):
    modality = Events(EventsOptions(**options), state)
    arrays, bad = modality.decode(table(*rows), COLUMNS)
    return modality, arrays, bad


def test_a_row_is_sorted_clipped_standardised_and_cut_to_its_window():
    _, arrays, bad = decoded(
        (
            [3.0, 1.0, 48.0, -0.5, 2.0],
            ["Temp", "HR", "HR", "HR", "Height"],
            [38.0, 500.0, 90.0, 90.0, 180.0],
        )
    )
    assert bad == [""]
    np.testing.assert_allclose(arrays["times"][0], [1, 3])
    assert arrays["variables"][0].tolist() == [0, 1]
    np.testing.assert_allclose(arrays["values"][0], [8, 2])  # (500 - 100) / 20 is clipped


def test_hours_before_the_start_are_read_on_request():
    _, arrays, _ = decoded(([-2.0, -0.5, 0.0], ["HR"] * 3, [100.0] * 3), before=1)
    np.testing.assert_allclose(arrays["times"][0], [-0.5, 0])


def test_the_order_of_events_and_variables_does_not_matter():
    rng = np.random.default_rng(0)
    times, names, values = (
        rng.uniform(0, 40, 30),
        rng.choice(["HR", "Temp"], 30),
        rng.normal(60, 20, 30),
    )
    order = rng.permutation(30)
    _, one, _ = decoded((times, names.tolist(), values))
    _, two, _ = decoded((times[order], names[order].tolist(), values[order]))
    for role in COLUMNS:
        np.testing.assert_array_equal(one[role][0], two[role][0])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            ([1.0], ["HR", "HR"], [1.0]),
            "an event is a time, a variable and a value, and the row has 1 times, 2 "
            "variables, 1 values",
        ),
        ((None, ["HR"], [1.0]), "null times"),
        (([1.0, 2.0], ["HR", None], [712.25, 1.0]), "1 of its 2 events have no variable"),
        (([1.0], ["HR"], [float("nan")]), "1 of its 1 events have no value"),
        (([float("inf")], ["HR"], [712.25]), "have no time"),
        (([1.0], ["HR"], [None]), "have no value"),
    ],
)
def test_a_bad_row_has_a_reason_without_its_values_and_leaves_the_others(row, reason):
    good = ([1.0], ["HR"], [120.0])
    _, arrays, bad = decoded(good, row, good)
    assert reason in bad[1] and bad[0] == bad[2] == "" and "712" not in bad[1]
    assert [len(one) for one in arrays["times"]] == [1, 0, 1]
    np.testing.assert_allclose(arrays["values"][2], [1])


def test_a_row_without_events_is_a_row():
    modality, arrays, bad = decoded(([], [], []), ([5.0], ["HR"], [100.0]))
    assert bad == ["", ""]
    batch = modality.collate(arrays)
    assert (
        batch["mask"].tolist() == [[False], [True]]
        and batch["codes"].shape == (2, 1)
        and batch["numbers"].shape == (2, 0)
    )
    assert modality.collate({name: array[:1] for name, array in arrays.items()})["times"].shape == (
        1,
        1,
    )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.0]), "it holds double; times are lists of numbers"),
        (pa.array([["a"]]), "it holds list<.*string>"),
    ],
)
def test_a_column_of_another_kind_is_refused(column, message):
    with pytest.raises(ValueError, match=message):
        Events(EventsOptions(), STATE).decode(
            table(([1.0], ["HR"], [1.0])).set_column(0, "times", column), COLUMNS
        )


def test_fit_keeps_what_enough_rows_have_and_is_what_numpy_says():
    rows = stays(40)
    options = EventsOptions(hours=12, min_rows=5)
    state = Events.fit(options, rows, EVENT_COLUMNS, "events/gru")
    flat = [
        (t, v, x)
        for row in rows.to_pylist()
        for t, v, x in zip(row["times"], row["variables"], row["values"], strict=True)
        if t < 12
    ]
    assert state["variables"] == sorted({v for _, v, _ in flat})
    # No quantile: the rarest value may be one patient's
    assert set(state) == {
        "variables",
        "mean",
        "std",
        "static",
    }
    for name, mean, std in zip(*(state[key] for key in ("variables", "mean", "std")), strict=True):
        values = np.array([x for _, v, x in flat if v == name], dtype=np.float64)
        clipped = values.clip(*np.quantile(values, (0.001, 0.999)))
        np.testing.assert_allclose([mean, std], [clipped.mean(), clipped.std()], rtol=1e-6)
    rare = pa.table({**{name: rows[name] for name in rows.column_names}})
    rare = rare.set_column(
        rare.column_names.index("variables"),
        "variables",
        pa.array(
            [
                ["rare" if i < 4 and k == 0 else v for k, v in enumerate(row)]
                for i, row in enumerate(rows["variables"].to_pylist())
            ]
        ),
    )
    assert "rare" not in Events.fit(options, rare, EVENT_COLUMNS, "")["variables"]
    assert (
        len(
            Events.fit(EventsOptions(min_rows=1, max_variables=2), rows, EVENT_COLUMNS, "")[
                "variables"
            ]
        )
        == 2
    )


def test_fit_of_rows_that_cannot_be_used_says_so():
    with pytest.raises(
        ValueError,
        match="no variable is in 10 of 1 rows in hours 0 to 48: lower min_rows",
    ):
        Events.fit(EventsOptions(), table(([1.0], ["HR"], [1.0])), COLUMNS, "")
    with pytest.raises(ValueError, match="none of the first 1 rows can be read: an event is"):
        Events.fit(EventsOptions(), table(([1.0], [], [1.0])), COLUMNS, "")


def test_what_is_known_of_other_rows_is_reported():
    rows = table(
        ([1.0, 2.0, 3.0], ["HR", "drug: x", "note: Mr S"], [1.0, 1.0, 1.0]),
        ([1.0, 1.0], ["Temp", "drug: x"], [37.0, 1.0]),
    )
    assert (
        Events(EventsOptions(min_rows=2), STATE).coverage(rows, COLUMNS)
        == "2 of 4 variables are known (40.0% of the events); left out: drug: x, 1 others"
    )
    assert Events(EventsOptions(), STATE).check_known_share(rows, COLUMNS) == 0.4
    others = table(([1.0, 2.0], ["hr", "Mr S"], [1.0, 1.0]), ([1.0], ["hr"], [37.0]))
    message = r"none of the values .* names are hr \(did you mean HR\?\); the source"
    with pytest.raises(ValueError, match=message):
        Events(EventsOptions(min_rows=2), STATE).check_known_share(others, COLUMNS)


def test_static_features_that_no_column_is_named_for_are_reported():
    """As where `predict` reads rows with a bundle that holds no names of columns."""
    static = {"numbers": ["Age"], "mean": [60.0], "std": [10.0], "codes": []}
    modality = Events(EventsOptions(), {**STATE, "static": static})
    rows = table(([1.0], ["HR"], [1.0]))
    said = "the network knows static features, but no column is named for those of these rows"
    assert said in modality.coverage(rows, COLUMNS)
    facts = pa.array([{"Age": 50.0}])
    known = modality.coverage(rows.append_column("facts", facts), {**COLUMNS, "static": "facts"})
    assert said not in known


def test_events_at_hours_that_are_not_read_are_reported():
    rows = table(
        ([-1.0, 0.0, 47.9], ["HR"] * 3, [1.0] * 3), ([48.0, 2000.0], ["Temp", "HR"], [37.0, 1.0])
    )
    known = "2 of 2 variables are known (100.0% of the events)"
    first_days = Events(EventsOptions(), STATE)
    assert first_days.coverage(rows, COLUMNS) == (
        f"{known}; 60.0% of the events are not in hours 0 to 48, and not read"
    )
    whole_stays = Events(EventsOptions(before=1, hours=2001), STATE)
    assert whole_stays.coverage(rows, COLUMNS) == known


def test_rows_of_which_nothing_is_read_are_refused():
    """Also rows that end at hour 0 where hours from 0 on are read."""
    later = table(([1.0, 2.0], ["HR"] * 2, [1.0] * 2))
    with pytest.raises(ValueError, match=r"column times: hours -24 to 0\.5 are read, .* no event"):
        Events(EventsOptions(before=24, hours=0.5), STATE).check_known_share(later, COLUMNS)
    ends_at_0 = table(*(([-5.0, 0.0], ["Temp", "HR"], [1.0, 2.0]) for _ in range(10)))
    message = r"hours 0 to 48 are read, .* events at hour 0 and before alone; .*before: 720"
    with pytest.raises(ValueError, match=message):
        Events.fit(EventsOptions(), ends_at_0, COLUMNS, "events/gru")
    with pytest.raises(ValueError, match=message):
        Events(EventsOptions(), STATE).check_known_share(ends_at_0, COLUMNS)
    state = Events.fit(EventsOptions(before=24, hours=1), ends_at_0, COLUMNS, "events/gru")
    assert state["variables"] == ["HR", "Temp"]
    at_0 = table(*(([0.0], ["HR"], [1.0]) for _ in range(10)))
    assert Events.fit(EventsOptions(), at_0, COLUMNS, "events/gru")["variables"] == ["HR"]
    assert Events(EventsOptions(), STATE).check_known_share(table(([], [], [])), COLUMNS) == 1.0


def test_the_code_beside_an_export_prepares_records_as_the_modality_does():
    rows = event_rows(8)
    modality, records = rows.modality, stays(8).to_pylist()
    records[2] |= {"times": [5.0, -1.0, 2.0, 1.0], "variables": ["v0", "v1", "v1", "other"]}
    records[2] |= {"values": [1e9, 3.0, 4.0, 5.0]}
    arrays, _ = modality.decode(pa.Table.from_pylist(records), EVENT_COLUMNS)
    expected = modality.collate(arrays)
    described = {
        "modality": {"state": modality.state, "options": modality.options.model_dump()},
        "inputs": dict.fromkeys(expected),
    }
    given, _, code = modality.preparation_code().partition("\n")
    names = {"np": np, "graph": described, "records": records}
    exec(code, names)
    assert names["inputs"].keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(names["inputs"][name], tensor.numpy(), rtol=1e-5)
    exec(f"{given}\n{code}", names)
    assert len(names["inputs"]["times"]) == 1


def test_costs_are_events_from_the_column_or_the_lists():
    modality = Events(EventsOptions(), STATE)
    rows = table(([1.0, 2.0], ["HR"] * 2, [1.0] * 2), (None, None, None))
    assert modality.costs(rows, COLUMNS).tolist() == [3, 1]
    assert modality.costs(
        rows.append_column("events", pa.array([7, None])), {**COLUMNS, "events": "events"}
    ).tolist() == [8, 1]


def test_drop_leaves_out_a_share_by_the_rows_keys():
    modality, arrays, _ = decoded(
        (np.linspace(0, 40, 2000), ["HR"] * 2000, np.full(2000, 100.0)), drop=0.25
    )
    batch = Batch(np.arange(1), torch.tensor([5]), modality.collate(arrays))
    kept = modality.augment(batch)["mask"]
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.equal(kept, modality.augment(batch)["mask"])
    assert not torch.equal(
        kept, modality.augment(Batch(batch.rows, torch.tensor([6]), batch.data))["mask"]
    )


def test_numbers_that_are_large_beside_their_deviation_or_small_are_standardised():
    """A time in seconds, an amount in millionths: neither digits nor the unit count."""
    rng = np.random.default_rng(0)
    units = {"time": 1.7e9 + rng.normal(0, 20, 50), "amount": rng.normal(3e-7, 1e-7, 50)}
    kinds = {"times": np.float64, "values": np.float64}
    names = [[name] * 50 for name in units]
    rows = pa.table(
        {
            "times": [np.arange(50, dtype=kinds["times"]) / 2] * 2,
            "variables": names,
            "values": [*units.values()],
        }
    )
    options = EventsOptions(min_rows=1)
    modality = Events(options, Events.fit(options, rows, COLUMNS, "events/gru"))
    arrays, _ = modality.decode(rows, COLUMNS)
    for given, found in zip(units.values(), arrays["values"], strict=True):
        clipped = given.clip(*np.quantile(given, (0.001, 0.999)))
        want = (given - clipped.mean()) / clipped.std()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=1e-4)
