"""Plain tables to features: kinds over the whole table, missing values, what is noted and what is
refused; CSV, Parquet and pandas agree.
"""

import gzip
import io
import json
import math
from decimal import Decimal
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import parts, read, reasons, summary, write

from pipeline.prepare.engine.write import verify

prepare = partial(conftest.prepare, "table")

HEAD = "stay,patient,age,sex,unit,lab,died\n"
BODY = "1,7,54,f,2,0.5,0\n2,7,,m,1,<0.1,1\n3,8,61.5,?,1,ERROR,0\n4,9,NA,f,2,1e-3,1\n"
ROLES = ("label=died", "id=stay", "group=patient")


def by(output, key: str = "stay") -> list[dict]:
    return sorted(read(output), key=lambda row: row[key])


def notes(output) -> dict:
    return summary(output)["notes"]


def test_numbers_and_categories(tmp_path):
    source = write(tmp_path / "a.csv", HEAD + BODY)
    done = prepare(source, tmp_path / "out", *ROLES, "numeric=lab", "categorical=unit")
    rows = by(tmp_path / "out")
    own = [(row["died"], row["stay"], row["patient"], row["split"]) for row in rows]
    assert own == [(0, 1, 7, "train"), (1, 2, 7, "train"), (0, 3, 8, "train"), (1, 4, 9, "train")]
    assert [row["features"] for row in rows] == [
        {"age": 54.0, "sex": "f", "unit": "2", "lab": 0.5},
        {"age": None, "sex": "m", "unit": "1", "lab": None},
        {"age": 61.5, "sex": None, "unit": "1", "lab": None},
        {"age": None, "sex": "f", "unit": "2", "lab": 0.001},
    ]
    schema = pq.read_schema(tmp_path / "out/train-00000-of-00001.parquet")
    kinds = pa.struct(
        [("age", pa.float64()), ("sex", pa.string()), ("unit", pa.string()), ("lab", pa.float64())]
    )
    assert schema.field("features").type == kinds and schema.field("died").type == pa.int64()
    assert json.loads(schema.metadata[b"onetomany"])["categorical"] == ["sex", "unit"]
    assert notes(tmp_path / "out") == {
        "numeric features": 2,
        "categorical features": 2,
        "values missing": {"age": 2, "sex": 1},
        "values that are no number, now null": {"lab": 2},
    }
    assert done["rows"] == {"train": 4} and verify(str(tmp_path / "out")) == done
    assert summary(tmp_path / "out")["classes"] == {"train": {"labels": {"0": 2, "1": 2}}}


def test_without_a_word_on_it_a_column_with_texts_is_categorical(tmp_path):
    prepare(write(tmp_path / "a.csv", HEAD + BODY), tmp_path / "out", *ROLES)
    assert [row["features"]["lab"] for row in by(tmp_path / "out")] == [
        "0.5",
        "<0.1",
        "ERROR",
        "1e-3",
    ]
    assert (
        notes(tmp_path / "out")[
            "whole numbers with few values (if they are codes: --set categorical=)"
        ]
        == "unit"
    )


def test_kinds_follow_from_all_files(tmp_path):
    """A text in the last row of the last file makes its column categorical in the first one too."""
    write(tmp_path / "in/train.csv", "a,b,y\n1,1,0\n2,2,1\n")
    write(tmp_path / "in/test.tsv", "y\tb\ta\n1\t3\tx\n0\t007\t5\n")
    done = prepare(tmp_path / "in", tmp_path / "out", "label=y")
    assert done["rows"] == {"test": 2, "train": 2} and len(done["files"]) == 2
    found = {(row["split"], row["y"]): row["features"] for row in read(tmp_path / "out")}
    assert found == {
        ("train", 0): {"b": "1", "a": "1"},
        ("train", 1): {"b": "2", "a": "2"},
        ("test", 1): {"b": "3", "a": "x"},
        ("test", 0): {"b": "007", "a": "5"},
    }, "leading zeros are a code"


def test_columns_worth_a_note(tmp_path):
    rows = [
        f"{i},,same,{i % 3},name{i},{i / 7},{'nan ' if i == 3 else 'inf' if i == 4 else i}"
        for i in range(1500)
    ]
    source = write(tmp_path / "a.csv", "n,empty,one,code,name,x,odd\n" + "\n".join(rows) + "\n")
    prepare(source, tmp_path / "out")
    assert notes(tmp_path / "out") == {
        "numeric features": 5,
        "categorical features": 2,
        "values missing": {"empty": 1500, "odd": 1},
        "values that are no number, now null": {"odd": 1},
        "columns without a value": "empty",
        "columns with one value": "one",
        "whole numbers with few values (if they are codes: --set categorical=)": "code",
        "categories with more than 1000 values (names? --set drop=)": "name",
    }
    found = sorted(read(tmp_path / "out"), key=lambda row: row["features"]["n"])
    assert [row["features"]["odd"] for row in found[2:6]] == [2.0, None, None, 5.0] and found[
        0
    ].keys() == {"features", "split"}
    order = [row["features"]["n"] for row in read(tmp_path / "out")]
    assert order == sorted(order), "predictions of rows without a label stand in their order"
    prepare(source, tmp_path / "labelled", "label=code")
    order = [row["features"]["n"] for row in read(tmp_path / "labelled")]
    assert order != sorted(order), "labelled rows of a part are mixed"
    prepare(source, tmp_path / "again")
    assert parts(tmp_path / "again") == parts(tmp_path / "out")


def test_columns_can_be_chosen_dropped_and_renamed_by_names(tmp_path):
    source = write(tmp_path / "a.csv", HEAD + BODY)
    prepare(source, tmp_path / "a", *ROLES, "columns=sex,age")
    assert list(by(tmp_path / "a")[0]["features"]) == ["sex", "age"]
    prepare(source, tmp_path / "b", *ROLES, "drop=sex,lab")
    assert list(by(tmp_path / "b")[0]["features"]) == ["age", "unit"]
    bare = write(tmp_path / "b.csv", BODY)
    prepare(bare, tmp_path / "c", *ROLES, "names=stay,patient,age,sex,unit,lab,died")
    prepare(source, tmp_path / "d", *ROLES)
    assert read(tmp_path / "c") == read(tmp_path / "d")


def test_ids_of_csv_that_only_look_like_numbers_are_texts(tmp_path):
    rows = ["+491,12e5,1.0,0.5,0", "+492,1200000,,1e5,1", "+491,99,3.0,2,1"]
    source = write(tmp_path / "a.csv", "\n".join(["phone,hex,stay,x,y", *rows]) + "\n")
    for column, wanted in (
        ("phone", ["+491", "+491", "+492"]),
        ("hex", ["1200000", "12e5", "99"]),
        ("stay", [1, 3, None]),
    ):
        prepare(source, tmp_path / column, "columns=x", f"group={column}", "label=y")
        found = [row[column] for row in read(tmp_path / column)]
        assert sorted(found, key=lambda one: (one is None, one)) == wanted


def test_numbers_with_a_comma_are_noted(tmp_path):
    rows = ["54;27,3;1.234,5;1,234.5;a,b;1,2", "61;8,25;7,5;12,000.25;c;3", "70;;8;9;d;4"]
    source = write(tmp_path / "a.csv", "\n".join(["age;bmi;dose;cost;name;code", *rows]) + "\n")
    prepare(source, tmp_path / "out", "delimiter=;")
    (noted,) = [text for what, text in notes(tmp_path / "out").items() if "with a comma" in what]
    assert noted == "bmi, dose, cost, code"


def test_the_index_that_pandas_writes_is_no_feature(tmp_path):
    frame = pd.DataFrame({"x": [1.5, 2.5, 3.5], "y": [0, 1, 1]}, index=[7, 8, 9])
    frame.to_csv(write(tmp_path / "a.csv", ""))
    prepare(tmp_path / "a.csv", tmp_path / "a", "label=y")
    found = sorted(read(tmp_path / "a"), key=lambda row: row["features"]["x"])
    assert [row["features"] for row in found] == [{"x": 1.5}, {"x": 2.5}, {"x": 3.5}]
    noted = "row numbers in a first column without a name, left out"
    assert notes(tmp_path / "a")[noted] == "Unnamed: 0"
    prepare(tmp_path / "a.csv", tmp_path / "b", "label=y", "id=Unnamed: 0")
    assert {row["Unnamed: 0"]: row["features"]["x"] for row in read(tmp_path / "b")} == {
        7: 1.5,
        8: 2.5,
        9: 3.5,
    }
    prepare(tmp_path / "a.csv", tmp_path / "c", "label=y", "columns=x,Unnamed: 0")
    assert read(tmp_path / "c")[0]["features"].keys() == {"x", "Unnamed: 0"}
    prepare(tmp_path / "a.csv", tmp_path / "d", "label=y", "numeric=Unnamed: 0")
    assert read(tmp_path / "d")[0]["features"].keys() == {"x", "Unnamed: 0"}
    assert noted not in notes(tmp_path / "b") | notes(tmp_path / "c") | notes(tmp_path / "d")


def test_an_index_that_was_written_twice_is_no_feature_and_names_are_one(tmp_path):
    write(tmp_path / "twice.csv", ",Unnamed: 0,x,y\n0,5,1.5,0\n1,6,2.5,1\n")
    prepare(tmp_path / "twice.csv", tmp_path / "a", "label=y")
    assert read(tmp_path / "a")[0]["features"].keys() == {"x"}
    noted = "row numbers in a first column without a name, left out"
    assert notes(tmp_path / "a")[noted] == "Unnamed: 0, Unnamed: 0.1"
    write(tmp_path / "cars.csv", ",x,y\nMazda,1.5,0\nFiat,2.5,1\n")  # as R's write.csv does
    prepare(tmp_path / "cars.csv", tmp_path / "b", "label=y")
    assert read(tmp_path / "b")[0]["features"].keys() == {"Unnamed: 0", "x"}


def test_what_means_missing_can_be_said(tmp_path):
    source = write(tmp_path / "a.csv", "a,b\n-9,x\n3,unknown\n,NA\n")
    prepare(source, tmp_path / "out", "missing=,-9,unknown")
    assert sorted(
        (row["features"]["a"] is None, row["features"]["b"] or "") for row in read(tmp_path / "out")
    ) == [(False, ""), (True, "NA"), (True, "x")]


def test_labels_of_all_kinds(tmp_path):
    write(
        tmp_path / "a.csv", "x,risk,name\n" + "".join(f"{i},{i / 8},c{i % 2}\n" for i in range(9))
    )
    prepare(tmp_path / "a.csv", tmp_path / "a", "label=risk,name")
    found = read(tmp_path / "a")
    assert {(row["risk"], row["name"]) for row in found} == {
        (i / 8, f"c{i % 2}") for i in range(9)
    } and list(found[0]["features"]) == ["x"]
    assert summary(tmp_path / "a")["classes"] == {}, "numbers to estimate are no classes"
    prepare(tmp_path / "a.csv", tmp_path / "b", "label=name")
    assert summary(tmp_path / "b")["classes"] == {"train": {"labels": {"c0": 5, "c1": 4}}}


def test_a_split_column(tmp_path):
    source = write(tmp_path / "a.csv", "x,fold,y\n1,TRAIN,0\n2,val,1\n3,testing,0\n4,,1\n")
    done = prepare(source, tmp_path / "out", "label=y", "split_column=fold", max_bad=0.5)
    assert done["rows"] == {"test": 1, "train": 1, "validation": 1} and done["broken"] == 1
    assert {row["split"]: row["features"] for row in read(tmp_path / "out")} == {
        "train": {"x": 1.0},
        "validation": {"x": 2.0},
        "test": {"x": 3.0},
    }


def test_broken_rows_are_told_by_place_without_their_values(tmp_path):
    body = "".join(f"{i},{i},50,f,1,0.5,{i % 2}\n" for i in range(200))
    source = write(
        tmp_path / "a.csv",
        HEAD.encode() + b"1,2,3,f,1,SECRET,\n1,2,SECRET\n1,2,3,\xff,1,1,1\n" + body.encode(),
    )
    done = prepare(source, tmp_path / "out", *ROLES, max_bad=0.02)
    assert done["broken"] == 3 and done["rows"] == {"train": 200}
    found = reasons(summary(tmp_path / "out"))
    assert {path: reason.partition(" (invalid")[0] for path, reason in found.items()} == {
        "a.csv:2": "no label (died)",
        "a.csv:3": "3 fields, where there are 7 columns",
        "a.csv:4": "not UTF-8 text",
    }
    with pytest.raises(ValueError, match=r"3 of 203 .*--max-bad 0\.01 ") as message:
        prepare(source, tmp_path / "none", *ROLES)
    assert "SECRET" not in str(message.value)
    assert not any(
        b"SECRET" in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()
    )


@pytest.mark.parametrize(
    ("text", "pairs", "said"),
    [
        ("a,b,a\n1,2,3\n", [], "a.csv:1: two columns are called 'a'"),
        ("a,b\n1,2\n", ["label=dead"], "no column 'dead' for --set label"),
        ("a,died\n1,2\n", ["label=dead"], "no column 'dead' for --set label; did you mean died"),
        ("a,b\n", [], "no rows"),
        ("", [], "a.csv: empty, not even a header"),
        ("a;b\n1;2\n", [], "one column, 'a;b'; is it ; that stands between them"),
        ("a,,b\n1,2,3\n", [], "a.csv:1: column 2 has no name"),
        ("a,b\n1,2\n", ["categorical=c"], "no column 'c' for --set categorical"),
        ("a,b\n1,2\n", ["numeric=a", "categorical=a"], "both name a"),
        ("a,b\n1,2\n", ["label=a", "drop=a"], "--set drop= names a, which is label"),
        ("a,b\n1,2\n", ["label=a", "id=b"], "no column is left for the features"),
        ("features,b\n1,2\n", ["label=features"], "column features has a name that is taken"),
        ("a,b\n1,2\n", ["encoding=utf-16"], "--set encoding=utf-16: no encoding"),
        (
            "a,b\n1,2\n",
            ["split=test", "split_column=a"],
            "--set split=test: --set split_column=a gives each row its own",
        ),
        ("a,b\n1,2\n", ["lable=b"], "importer table has no option 'lable'; did you mean label"),
    ],
)
def test_what_is_wrong_is_reported(text, pairs, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepare(write(tmp_path / "a.csv", text), tmp_path / "out", *pairs)


def test_files_of_other_columns_are_refused(tmp_path):
    write(tmp_path / "in/a.csv", "a,b\n1,2\n")
    write(tmp_path / "in/b.csv", "a,c\n1,2\n")
    with pytest.raises(
        ValueError, match=r"b.csv: other columns than a.csv: b, c in one of them alone"
    ):
        prepare(tmp_path / "in", tmp_path / "out")
    assert prepare(tmp_path / "in", tmp_path / "out", "columns=a")["rows"] == {"train": 2}


def frame(count: int = 300) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    whole = draw.integers(0, 5, count)
    return pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(count)],
            "x": np.where(draw.random(count) < 0.1, np.nan, draw.normal(size=count)),
            "whole": whole,
            "text": pd.Series(draw.choice(["a", "b b", 'c,"d"', "é"], count)).where(
                draw.random(count) > 0.1
            ),
            "y": draw.choice([0.0, 1.0], count),
        }
    )


def wanted(table: pd.DataFrame) -> dict[str, dict]:
    return {
        row.pop("id"): {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in table.to_dict("records")
    }


@pytest.mark.parametrize(
    "kind", ["csv", "csv.gz", "tsv", "parquet", "parquet.gz", "dictionary", "large"]
)
def test_every_form_of_a_table_gives_what_pandas_holds(kind, tmp_path):
    table = frame()
    if "sv" in kind:
        data = table.to_csv(index=False, sep="\t" if kind == "tsv" else ",").encode()
    else:
        made = pa.Table.from_pandas(table, preserve_index=False)
        if kind == "dictionary":
            made = made.set_column(3, "text", made["text"].combine_chunks().dictionary_encode())
        if kind == "large":
            made = made.set_column(3, "text", made["text"].cast(pa.large_string())).set_column(
                2, "whole", made["whole"].cast(pa.int8())
            )
        sink = io.BytesIO()
        pq.write_table(made, sink, row_group_size=64)
        data = sink.getvalue()
    suffix = kind if "." in kind or "sv" in kind else "parquet"
    write(tmp_path / f"a.{suffix}", gzip.compress(data) if kind.endswith(".gz") else data)
    done = prepare(tmp_path / f"a.{suffix}", tmp_path / "out", "label=y", "id=id", part_mb=0.002)
    assert len(done["files"]) == (5 if kind in ("parquet", "dictionary", "large") else 1)
    expected = {
        key: (row["x"], row["whole"], row["text"], row["y"]) for key, row in wanted(table).items()
    }
    found = {
        row["id"]: (*(row["features"][name] for name in ("x", "whole", "text")), row["y"])
        for row in read(tmp_path / "out")
    }
    assert found == expected
    assert (
        notes(tmp_path / "out")[
            "whole numbers with few values (if they are codes: --set categorical=)"
        ]
        == "whole"
    )


def test_parquet_types(tmp_path):
    made = pa.table(
        {
            "flag": [True, False, None],
            "price": pa.array([Decimal("1.25"), None, Decimal("2.50")]),
            "big": pa.array([2**63 + 1, 1, 2], pa.uint64()),
            "none": pa.nulls(3),
            "half": pa.array([0.5, 1.5, math.inf], pa.float32()),
            "code": [" 1", "NA", ""],
            "y": [1.0, 0.0, 1.0],
        }
    )
    pq.write_table(made, tmp_path / "a.parquet")
    prepare(tmp_path / "a.parquet", tmp_path / "out", "label=y")
    found = sorted(read(tmp_path / "out"), key=lambda row: row["features"]["price"] or 0)
    assert [row["features"] for row in found] == [
        {"flag": "false", "price": None, "big": "1", "none": None, "half": 1.5, "code": None},
        {
            "flag": "true",
            "price": 1.25,
            "big": str(2**63 + 1),
            "none": None,
            "half": 0.5,
            "code": 1.0,
        },
        {"flag": None, "price": 2.5, "big": "2", "none": None, "half": None, "code": None},
    ]
    assert [row["y"] for row in found] == [0, 1, 1] and isinstance(found[0]["y"], int)
    pq.write_table(pa.table({"x": [0.123456789012, 2.0], "y": [0, 1]}), tmp_path / "c.parquet")
    prepare(tmp_path / "c.parquet", tmp_path / "codes", "label=y", "categorical=x")
    assert {row["features"]["x"] for row in read(tmp_path / "codes")} == {"0.123456789012", "2"}
    pq.write_table(
        made.append_column("when", pa.array([1, 2, 3], pa.timestamp("s"))), tmp_path / "b.parquet"
    )
    with pytest.raises(
        ValueError,
        match=r"b.parquet: column when is timestamp\[ms\], neither a number nor a category; .* "
        r"--set drop=when",
    ):
        prepare(tmp_path / "b.parquet", tmp_path / "none", "label=y")
    assert prepare(tmp_path / "b.parquet", tmp_path / "none", "label=y", "drop=when")["rows"] == {
        "train": 3
    }
