"""Labels of classification, in whatever type a column holds them."""

import pyarrow as pa
import pytest

from pipeline.objectives.classification import Classification, ClassificationOptions

COLUMNS = {"label": "kind"}
OPTIONS = ClassificationOptions()


def dictionary(*chunks: list) -> pa.ChunkedArray:
    """A pandas categorical as it comes out of Parquet: every chunk has its own dictionary."""
    return pa.chunked_array([pa.array(chunk).dictionary_encode() for chunk in chunks])


@pytest.mark.parametrize(("first", "second", "known"), [(["dog", "cat", "dog"], ["bee", "dog"], ["bee", "cat", "dog"]), ([7, 5], [5, 6], [5, 6, 7])])
def test_labels_stored_as_a_dictionary_are_those_of_their_values(first, second, known):
    plain, coded = pa.table({"kind": [*first, *second]}), pa.table({"kind": dictionary(first, second)})
    state = Classification.fit(OPTIONS, coded, COLUMNS)
    assert state == Classification.fit(OPTIONS, plain, COLUMNS) == {"values": known, "labels": [str(v) for v in known]}
    found = Classification.encode(coded, COLUMNS, state)["label"]
    assert found.tolist() == [known.index(v) for v in (*first, *second)] == Classification.encode(plain, COLUMNS, state)["label"].tolist()


def test_names_stored_as_a_dictionary():
    table = pa.table({"kind": dictionary([1, 0], [1]), "name": dictionary(["dog", "cat"], ["dog"])})
    assert Classification.fit(OPTIONS, table, {"label": "kind", "label_name": "name"}) == {"values": [0, 1], "labels": ["cat", "dog"]}


def test_unknown_and_missing_labels_of_a_dictionary_are_told():
    state = Classification.fit(OPTIONS, pa.table({"kind": dictionary(["cat", "dog"])}), COLUMNS)
    with pytest.raises(ValueError, match="column kind: label 'dgo' never stands in the training rows; did you mean dog"):
        Classification.encode(pa.table({"kind": dictionary(["cat"], ["dgo"])}), COLUMNS, state)
    with pytest.raises(ValueError, match="column kind: 1 training rows have no label"):
        Classification.fit(OPTIONS, pa.table({"kind": dictionary(["cat", None], ["dog"])}), COLUMNS)


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([None, None]), pa.array([1, 2]).dictionary_encode()])
def test_labels_of_another_type_than_in_training_are_told(column):
    state = Classification.fit(OPTIONS, pa.table({"kind": ["cat", "dog"]}), COLUMNS)
    with pytest.raises(ValueError, match=r"column kind: it holds (int64|null) values, but the labels of the training rows are like 'cat'"):
        Classification.encode(pa.table({"kind": column}), COLUMNS, state)
