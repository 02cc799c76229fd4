"""Facts of rows: numbers standardised by hand, texts by name, gaps kept apart from zeros."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.media.deviation import rounded_mean
from pipeline.media.static_features import MAX_DEVIATIONS, StaticFeatures

KIND = pa.struct(
    {
        "age": pa.float64(),
        "beds": pa.int32(),
        "sex": pa.string(),
        "codes": pa.list_(pa.string()),
        "smoker": pa.bool_(),
    }
)
LISTED = pa.list_(pa.string())
ROWS = [
    {"age": 20.0, "beds": 1, "sex": "f", "codes": ["a", "b"], "smoker": True},
    {"age": 40.0, "beds": None, "sex": "m", "codes": [], "smoker": False},
    {"age": None, "beds": 3, "sex": "f", "codes": ["a", "a", None], "smoker": None},
    None,
]


def facts(rows=ROWS, kind=KIND, min_rows=1):
    return StaticFeatures(
        StaticFeatures.fit(pa.chunked_array([pa.array(rows, kind)]), "static", min_rows)
    )


def test_numbers_are_standardised_and_gaps_are_told_apart_from_means():
    found = facts().decode(pa.array(ROWS, KIND), 4, "static")
    ages, beds = (
        np.array(two, float).clip(*np.quantile(two, (0.001, 0.999))).std()
        for two in ([20, 40], [1, 3])
    )
    # Means are 30 and 2
    np.testing.assert_allclose(
        found["numbers"],
        [[-10 / ages, -1 / beds], [10 / ages, 0], [0, 1 / beds], [0, 0]],
        rtol=1e-6,
    )
    assert found["numbers_known"].tolist() == [
        [True, True],
        [True, False],
        [False, True],
        [False, False],
    ]


def test_texts_are_places_in_a_vocabulary_of_field_and_text():
    one = facts()
    assert one.state["codes"] == [
        "codes=a",
        "codes=b",
        "sex=f",
        "sex=m",
        "smoker=false",
        "smoker=true",
    ]
    found = [row.tolist() for row in one.decode(pa.array(ROWS, KIND), 4, "static")["codes"]]
    assert found == [[1, 2, 3, 6], [4, 5], [1, 3], []]


def test_a_category_is_one_value_however_it_is_written():
    """pandas writes 1 as 1.0 where a value is missing; Parquet has bools, CSV has their names."""
    kind = pa.struct([("type", pa.string()), ("sick", pa.string()), ("codes", LISTED)])
    rows = [
        {"type": "1.0", "sick": "True", "codes": ["410.0"]},
        {"type": "1", "sick": "true", "codes": ["410"]},
        {"type": "007", "sick": "0.50", "codes": None},
    ]
    codes = ["codes=410", "codes=410.0", "sick=0.50", "sick=true", "type=007", "type=1"]
    assert facts(rows, kind).state["codes"] == codes, "codes in lists stay as they are"
    bools = pa.array([{"sick": True}, {"sick": False}])
    assert [one.tolist() for one in facts(rows, kind).decode(bools, 2, "s")["codes"]] == [[4], []]
    # a state of an earlier version has the spelling of its rows
    state = {**StaticFeatures.empty_state(), "codes": ["codes=410.0", "sick=True", "type=1.0"]}
    earlier = StaticFeatures(state)
    found = [one.tolist() for one in earlier.decode(pa.array(rows, kind), 3, "s")["codes"]]
    assert found == [[1, 2, 3], [2, 3], []]
    assert earlier.coverage(pa.array(rows[:1], kind), "s") == ""
    both = StaticFeatures({**StaticFeatures.empty_state(), "codes": ["type=1", "type=1.0"]})
    found = [one.tolist() for one in both.decode(pa.array(rows[:2], kind), 2, "s")["codes"]]
    assert found == [[2], [1]], "each spelling that was trained keeps its own place"
    features = dict(facts(rows, kind).features(pa.array(rows, kind), "s", 1))
    assert features["s.type"].tolist() == [0, 0, 1] and features["s.sick"].tolist() == [0, 0, 1]


def test_rare_texts_are_not_known():
    # A stands twice in the third row, which is one row
    assert facts(min_rows=2).state["codes"] == [
        "codes=a",
        "sex=f",
    ]


def test_fields_are_known_by_name_in_any_order_and_types_may_differ():
    other = pa.array(
        [{"sex": "m", "age": 50, "weight": 3.0}, {"sex": "x", "age": None, "weight": None}],
        pa.struct(
            {
                "sex": pa.dictionary(pa.int8(), pa.string()),
                "weight": pa.float32(),
                "age": pa.int64(),
            }
        ),
    )
    found = facts().decode(other, 2, "static")
    # 50 is 20 above the mean; the quantiles are 20.02 and 39.98
    np.testing.assert_allclose(found["numbers"], [[20 / 9.98, 0], [0, 0]], rtol=1e-6)
    assert [row.tolist() for row in found["codes"]] == [[4], []]
    assert (
        facts().coverage(other, "static")
        == "numbers of static left out: weight; not there: beds; 1 of 2 texts of static are unknown"
    )
    assert facts().coverage(pa.array(ROWS, KIND), "static") == ""


def test_a_number_that_few_rows_have_is_not_known_and_one_far_out_moves_little():
    """Its mean would be that patient's own value."""
    rows = [{"age": float(i), "height": 170.1234 if i == 3 else None} for i in range(20)]
    state = facts(rows, pa.struct({"age": pa.float64(), "height": pa.float64()}), min_rows=10).state
    assert state["numbers"] == ["age"] and "170" not in str(state)
    ages = np.append(np.arange(5000.0) % 80, 1e9)
    one = facts([{"age": age} for age in ages], pa.struct({"age": pa.float64()}), min_rows=10).state
    assert one["mean"][0] < 50 and one["std"][0] < 50


def test_a_field_of_another_kind_than_it_was_fitted_on_is_refused_and_no_value_is_reported():
    for field, value, message in (
        ("age", "63", "holds string here and numbers"),
        ("sex", 1.0, "holds double here and texts"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            facts().decode(pa.array([{field: value}]), 1, "facts")
        assert "63" not in str(error.value) and "column facts" in str(error.value)
    # A column of nulls is no other kind
    assert not facts().decode(pa.array([{"age": None}]), 1, "facts")["numbers_known"].any()
    large = pa.array([{"age": 9007199254740995}], pa.struct({"age": pa.int64()}))
    assert facts().decode(large, 1, "facts")["numbers"][0, 0] == MAX_DEVIATIONS


def test_numbers_far_out_and_no_numbers_are_clipped_and_missing():
    found = facts().decode(
        pa.array(
            [{"age": 1e9}, {"age": float("nan")}, {"age": float("inf")}],
            pa.struct({"age": pa.float64()}),
        ),
        3,
        "static",
    )
    assert found["numbers"][:, 0].tolist() == [MAX_DEVIATIONS, 0, 0] and found["numbers_known"][
        :, 0
    ].tolist() == [True, False, False]


def test_a_constant_number_stays_finite():
    one = facts([{"age": 7.0}] * 3, pa.struct({"age": pa.float64()}))
    assert one.decode(
        pa.array([{"age": 7.0}, {"age": 8.0}], pa.struct({"age": pa.float64()})), 2, "static"
    )["numbers"][:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.float64(), "it holds double; facts are a struct"),
        (pa.struct({"when": pa.timestamp("s")}), r"field when: it holds timestamp\[s\]"),
    ],
)
def test_another_type_is_refused_with_its_name(kind, message):
    with pytest.raises(ValueError, match=message):
        StaticFeatures.fit(pa.chunked_array([pa.array([None], kind)]), "static", 1)


@pytest.mark.parametrize(("offset", "scale"), [(1.7e9, 20.0), (3e-10, 1e-10)])
def test_numbers_that_are_large_beside_their_deviation_or_small_are_standardised(offset, scale):
    """A time in seconds, an amount in moles: neither digits nor the unit count."""
    given = offset + scale * np.random.default_rng(0).normal(size=50)
    rows = pa.array([{"x": x} for x in given.tolist()])
    one = StaticFeatures(StaticFeatures.fit(pa.chunked_array([rows]), "static", 1))
    clipped = given.clip(*np.quantile(given, (0.001, 0.999)))
    want = (given - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(one.decode(rows, 50, "static")["numbers"][:, 0], want, atol=1e-4)


def test_a_mean_keeps_seven_digits_where_no_standardised_number_shows_more():
    assert rounded_mean(64.25369123, 17.0) == 64.25369
    assert rounded_mean(1.7e9 + 0.25, 20.0) == 1.7e9 + 0.25
