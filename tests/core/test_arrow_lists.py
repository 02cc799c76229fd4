"""Columns of lists: rows by place as ``pyarrow.Table.take`` gives them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core import arrow_lists


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Long lists of lists with nulls at every depth, beside short ones, lists of texts and plain
    columns, in chunks with dictionaries of their own.
    """
    rng = np.random.default_rng(0)

    def episode(i: int, steps: int) -> list | None:
        return (
            None
            if i == 3
            else [
                None
                if i == 5 and t == 2
                else [None if i == 7 else float(x) for x in rng.normal(0, 1, 11)]
                for t in range(steps)
            ]
        )

    parts = []
    for start in (0, 20):
        rows = range(start, start + 20)
        parts.append(
            pa.table(
                {
                    "long": pa.array(
                        [episode(i, 0 if i == 9 else 150 + i) for i in rows],
                        pa.list_(pa.list_(pa.float32())),
                    ),
                    "large": pa.array(
                        [episode(i, 120) for i in rows], pa.large_list(pa.list_(pa.float64()))
                    ),
                    "short": pa.array([[[i, i]] for i in rows]),
                    "words": pa.array([["a"] * (i % 4) for i in rows]),
                    "named": pa.array([f"{start} {i % 3}" for i in rows]).dictionary_encode(),
                    "number": np.arange(start, start + 20),
                }
            )
        )
    return pa.concat_tables(parts)


@pytest.mark.parametrize(
    "places",
    [
        [],
        [0],
        [39, 0, 3, 5, 7, 9, 20, 19],
        [*range(5, 30)],
        [4, 5, 6, 38, 39, 1, 1, 2],
        [*range(39, -1, -1)],
    ],
)
def test_rows_are_taken_as_pyarrow_takes_them(table, places):
    found = arrow_lists.take(table, np.array(places, dtype=np.int64))
    wanted = table.take(pa.array(places, pa.int64()))
    found.validate(full=True)
    assert found.schema == wanted.schema and found.to_pylist() == wanted.to_pylist()
    part = table.slice(2, 15)  # a stretch of a table has offsets
    inside = np.array([p for p in places if p < 15], dtype=np.int64)
    assert (
        arrow_lists.take(part, inside).to_pylist()
        == part.take(pa.array(inside, pa.int64())).to_pylist()
    )


def test_what_is_taken_holds_no_more_than_its_rows(table):
    assert (
        arrow_lists.take(table, np.array([1, 30, 2])).get_total_buffer_size()
        < table.get_total_buffer_size() / 5
    )


def test_numbers_and_lengths_have_nan_and_minus_one_for_null():
    assert arrow_lists.lengths(pa.array([[1, 2], None, []])).tolist() == [2, -1, 0]
    assert np.array_equal(
        arrow_lists.floats(pa.array([1, None, 3])),
        np.array([1, np.nan, 3], dtype=np.float32),
        equal_nan=True,
    )
    assert arrow_lists.floats(pa.array([1.5, 2.5], pa.float64())).dtype == np.float32
    assert arrow_lists.joined(
        pa.chunked_array([], pa.int64())
    ).to_pylist() == [] and arrow_lists.joined(pa.chunked_array([[1], [2]])).to_pylist() == [1, 2]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.uint32(), pa.int64()])
def test_codes_of_every_type_of_index_have_minus_one_for_null(kind):
    values = pa.array([f"v{i}" for i in range(128)])
    column = pa.DictionaryArray.from_arrays(pa.array([127, None, 0], kind), values)
    codes, distinct = arrow_lists.dictionary_codes(column)
    assert codes.tolist() == [127, -1, 0] and distinct.equals(values)
    assert np.where(codes < 0, len(distinct), codes).tolist() == [127, 128, 0], "no overflow"
