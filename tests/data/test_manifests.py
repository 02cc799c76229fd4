"""Which rows there are and in which split: real files of every format, whole, broken and in odd
company.
"""

import dataclasses
import decimal
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from pipeline.config.schema import Data, spec_hash
from pipeline.data import manifests as m
from pipeline.data import to_parquet as made
from pipeline.io import checksums, file_identity, storage

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)


def write(path: Path, frame: pd.DataFrame, group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=group)
    return path


def people(start: int, stop: int) -> pd.DataFrame:
    """Rows numbered from start: every fourth one shares a person, the number tells the row."""
    number = np.arange(start, stop)
    return pd.DataFrame(
        {
            "number": number,
            "text": [f"text {n}" for n in number],
            "label": number % 3,
            "person": [f"p{n // 4}" for n in number],
            "flag": number % 2 == 0,
            "weight": (number % 4) / 2,
            "kind": ["ab"[n % 2] for n in number],
        }
    )


@pytest.fixture
def files(tmp_path):
    """Three files of 20, 13 and 30 rows in groups of 7, written in another order than that of their
    names.
    """
    bounds = {"b.parquet": (20, 33), "c.parquet": (33, 63), "a.parquet": (0, 20)}
    for name, (start, stop) in bounds.items():
        write(tmp_path / "rows" / name, people(start, stop))
    return tmp_path / "rows"


@pytest.fixture
def imports(tmp_path):
    return str(tmp_path / "imports")


@pytest.fixture
def split(imports):
    """Splits of a data spec; the modality is only a name here, but for recordings."""

    def split(
        need_test: bool = False,
        roles: tuple[str, ...] = (),
        fold: m.Fold | None = None,
        needed: tuple[str, ...] = (),
        **fields,
    ) -> m.Splits:
        data = Data.model_validate({"modality": "text", **fields})
        return m.splits(data, roles, "targets.t", imports, need_test, fold, needed)

    return split


def values(selection: m.Selection, name: str) -> list:
    return m.read_columns(selection, [name])[name].to_pylist()


def numbers(selection: m.Selection) -> list[int]:
    return values(selection, "number")


def parts_of(splits: m.Splits) -> list[m.Selection]:
    return [splits.train, splits.validation, splits.test]


# ---------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    "named",
    [
        "{0}",
        "{0}/",
        "{0}/*.parquet",
        "{0}/[abc].parquet",
        "file://{0}",
        "file://{0}/*.parquet",
        "{0}/c.parquet {0}/b.parquet {0}/a.parquet",
        "{0} {0}/a.parquet",
        "{0}/a.parquet {0}/*.parquet",
    ],
)
def test_files_folders_and_globs_give_each_row_once_in_the_order_of_names(files, imports, named):
    built = m.build(named.format(files).split(), "auto", imports)
    assert [Path(file).name for file in built.files] == ["a.parquet", "b.parquet", "c.parquet"]
    assert built.num_rows == 63
    assert [g.num_rows for g in built.row_groups] == [7, 7, 6, 7, 6, 7, 7, 7, 7, 2]
    groups_of_files = [
        (file, group) for file, count in enumerate((3, 2, 5)) for group in range(count)
    ]
    assert [(g.file, g.index_in_file) for g in built.row_groups] == groups_of_files
    assert built.starts.tolist() == [0, 7, 14, 20, 27, 33, 40, 47, 54, 61, 63]
    assert built.num_bytes > 0
    assert numbers(m.Selection(built)) == list(range(63))


def test_only_footers_are_read(files, imports):
    """Damaged data pages are no matter for the manifest: it is built from the end of each file."""
    for file in files.iterdir():
        content = bytearray(file.read_bytes())
        footer = int.from_bytes(content[-8:-4], "little") + 8
        content[4:-footer] = bytes(len(content) - footer - 4)
        file.write_bytes(content)
    assert m.build(str(files), "auto", imports).num_rows == 63


def test_files_are_opened_several_at_once(files, imports, monkeypatch):
    """On a remote store each takes a moment."""
    barrier, open_read = threading.Barrier(3, timeout=20), storage.open_read

    def open_together(*words):
        barrier.wait()
        return open_read(*words)

    monkeypatch.setattr(storage, "open_read", open_together)
    built = m.build(str(files), "auto", imports)
    assert numbers(m.Selection(built)) == list(range(63))


def test_files_of_a_glob_are_not_looked_at_one_by_one(files, monkeypatch):
    looked, call = [], storage.s3.call

    def noted(what, uri, *rest):
        looked.extend([uri] if what == "look at" else [])
        return call(what, uri, *rest)

    monkeypatch.setattr(storage.s3, "call", noted)
    assert len(made.expand([str(files / "*.parquet")], "auto")) == 3
    assert looked == [str(files / "*.parquet")]


def test_a_row_group_that_may_not_fit_into_memory_is_named(files, imports, monkeypatch):
    said: list[str] = []
    with checksums.notifications_to(said.append):
        m.build(str(files), "auto", imports)
        monkeypatch.setattr(m, "LARGE_GROUP_BYTES", 100)
        m.build(str(files / "a.parquet"), "auto", imports)
    assert len(said) == 1
    assert said[0].startswith(f"warning: {files}/a.parquet: a row group of it has 0.0 GiB, and ")


def test_files_of_unknown_kind_in_a_folder_are_told_of(files, imports):
    said: list[str] = []
    known = ("README.md", "LICENSE", "_SUCCESS", "_temporary/x.parquet", ".git/x.parquet")
    for name in ("x.HEIC", "deep/y.heic", "z.parquet.gz", ".hidden.m4a", *known):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"?")
    with checksums.notifications_to(said.append):
        assert m.build(str(files), "auto", imports).num_rows == 63
        m.build(str(files / "*.parquet"), "auto", imports)
    left_out = "3 files of unknown kind left out (1 .gz, 2 .heic): convert them if they are data"
    assert said == [f"warning: {files}: {left_out}"]


def test_media_in_hidden_folders_are_told_of(tmp_path, imports):
    for name in ("cat/a.png", "_unknown_/b.png", "_unknown_/c.png", "_manifest.json"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"?")
    said: list[str] = []
    with checksums.notifications_to(said.append):
        assert m.build(str(tmp_path / "p"), "auto", imports).num_rows == 1
    assert len(said) == 1 and "/p: 2 files left out, as names that begin with _ are" in said[0]


def test_the_place_of_a_row_names_its_file_and_its_row_in_it(files, imports):
    built = m.build(str(files), "auto", imports)
    assert built.location(0) == f"{files}/a.parquet row 0"
    assert built.location(19) == f"{files}/a.parquet row 19"
    assert built.location(20) == f"{files}/b.parquet row 0"
    assert built.location(62) == f"{files}/c.parquet row 29"


def test_fingerprint_follows_the_content_not_the_folder(files, imports, tmp_path):
    first = m.build(str(files), "auto", imports)
    assert m.build(str(files / "*.parquet"), "auto", imports).fingerprint == first.fingerprint
    moved = files.rename(tmp_path / "moved")
    assert m.build(str(moved), "auto", imports).fingerprint == first.fingerprint
    content = bytearray((moved / "b.parquet").read_bytes())
    content[20] ^= 1
    (moved / "b.parquet").write_bytes(content)
    assert m.build(str(moved), "auto", imports).fingerprint != first.fingerprint
    (moved / "b.parquet").unlink()
    assert m.build(str(moved), "auto", imports).fingerprint != first.fingerprint


def test_a_manifest_travels(files, imports):
    built = m.build(str(files), "auto", imports)
    again = pickle.loads(pickle.dumps(built))
    assert again == built and again.schema == built.schema
    assert again.starts.tolist() == built.starts.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.assign(label=frame.label == 1),
            "column 'label' is int64 there and bool here",
        ),
        (
            lambda frame: frame.assign(text=frame.text.str.encode("utf-8")),
            "column 'text' is (large_)?string there and binary here",
        ),
        (
            lambda frame: frame.assign(label=frame.label.astype(str)),
            "column 'label' is int64 there and (large_)?string here",
        ),
        (
            lambda frame: frame.drop(columns="label"),
            "column 'label' is int64 there and absent here",
        ),
        (lambda frame: frame.assign(more=1), "column 'more' is absent there and int64 here"),
    ],
)
def test_files_whose_schemas_differ_are_refused_by_column(files, imports, change, message):
    write(files / "d.parquet", change(people(63, 70)))
    with pytest.raises(ValueError, match=message) as caught:
        m.build(str(files), "auto", imports)
    assert str(caught.value).startswith(
        f"{files}/d.parquet: its schema differs from that of {files}/a.parquet: "
    )


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (pa.array([1, 2], pa.int32()), pa.array([3, None], pa.int64()), pa.int64()),
        (pa.array([1, 2]), pa.array([0.5, None]), pa.float64()),
        (pa.nulls(2), pa.array(["a", "b"]), pa.string()),
        (pa.array(["a", "b"]), pa.nulls(2), pa.string()),
        (pa.array(["a", "b"]), pa.array(["c", None], pa.large_string()), pa.large_string()),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", None]), pa.string()),
        (
            pa.array([[1], [2, 3]], pa.list_(pa.int32())),
            pa.array([[4], None], pa.list_(pa.float32())),
            pa.list_(pa.float64()),
        ),
        (
            pa.array(
                [{"bytes": b"x", "path": None}] * 2, pa.struct({"bytes": "binary", "path": "null"})
            ),
            pa.array([{"bytes": None, "path": "y"}] * 2),
            pa.struct({"bytes": "binary", "path": "string"}),
        ),
    ],
)
def test_shards_may_have_other_widths_and_orders_of_columns(tmp_path, imports, first, second, kind):
    """As pandas and Spark write them: a shard without a value, or with a missing whole number."""
    numbered = pa.field("number", pa.int64(), nullable=False)
    pq.write_table(pa.table({"value": first, "number": [0, 1]}), tmp_path / "a.parquet")
    other = pa.table(
        [pa.array([2, 3]), second], schema=pa.schema([numbered, ("value", second.type)])
    )
    pq.write_table(other, tmp_path / "b.parquet")
    built = m.build(str(tmp_path / "*.parquet"), "auto", imports)
    assert built.schema.field("value").type == kind
    values = [*first.to_pylist(), *second.to_pylist()]
    got = m.Reader(built, ["number", "value"]).take(np.array([3, 0, 2, 1]))
    assert got["value"].to_pylist() == [values[i] for i in (3, 0, 2, 1)]
    assert got["number"].to_pylist() == [3, 0, 2, 1]
    whole = m.read_columns(m.Selection(built), ["value", "number"])
    assert whole["value"].to_pylist() == values and whole["number"].to_pylist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([{"Age": 1.0}] * 2), pa.array([{"age": 1.0}] * 2)),
        (pa.array([[{"age": 1.0}]] * 2), pa.array([[{"age": 1.0, "sex": 0}]] * 2)),
        (pa.array([["a"]] * 2), pa.array([[b"a"]] * 2)),
        (pa.array([2**63] * 2, pa.uint64()), pa.array([1] * 2)),
        (pa.array([1] * 2, pa.int8()), pa.array([2**63] * 2, pa.uint64())),
    ],
)
def test_shards_that_arrow_would_merge_with_loss_are_refused(tmp_path, imports, first, second):
    """A field of another name is null in half of the rows."""
    for name, column in (("a", first), ("b", second)):
        pq.write_table(pa.table({"value": column}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: its schema differs .* column 'value' is"):
        m.build(str(tmp_path / "*.parquet"), "auto", imports)


def test_metadata_of_a_schema_is_no_difference(files, imports):
    table = pa.Table.from_pandas(people(63, 70)).replace_schema_metadata(
        {"written by": "somebody else"}
    )
    pq.write_table(table, files / "d.parquet")
    assert m.build(str(files), "auto", imports).num_rows == 70


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty (0 bytes)"),
        (b"PAR1", "not a readable Parquet file"),
        (b"text, not parquet" * 9, "not a readable Parquet file"),
        (None, "not a readable Parquet file"),
    ],
    ids=["zero bytes", "four bytes", "text", "truncated"],
)
def test_a_broken_file_is_named(files, imports, content, message):
    whole = (files / "b.parquet").read_bytes()
    (files / "b.parquet").write_bytes(whole[:-50] if content is None else content)
    with pytest.raises(ValueError) as caught:
        m.build(str(files), "auto", imports)
    assert str(caught.value).startswith(f"{files}/b.parquet: ") and message in str(caught.value)


def test_a_damaged_footer_is_named(files, imports):
    content = bytearray((files / "b.parquet").read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    content[-8 - size : -8] = os.urandom(1) * size
    (files / "b.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable Parquet file"):
        m.build(str(files), "auto", imports)


def test_no_files_are_an_error(tmp_path, imports):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.bin").write_bytes(b"x")
    for uri in ("nowhere", "nowhere/*.parquet", "empty", "other"):
        with pytest.raises(ValueError, match=uri.split("/")[0]):
            m.build(str(tmp_path / uri), "auto", imports)


def test_files_of_several_kinds_are_refused(files, imports):
    (files / "x.csv").write_text("a\n1\n")
    with pytest.raises(
        ValueError,
        match=r"files of several kinds \(csv, parquet\); .*x\.csv is csv; name one kind by a glob, or "
        "set format: parquet",
    ):
        m.build(str(files), "auto", imports)


@pytest.mark.parametrize(
    ("record", "table"),
    [
        ("_delta_log/00000000000000000000.json", "Delta Lake"),
        (".hoodie/hoodie.properties", "Hudi"),
        ("metadata/v2.metadata.json", "Iceberg"),
    ],
)
def test_folders_of_table_formats_are_refused(files, imports, record, table):
    """Rows that were deleted or replaced are still in files beside the valid ones."""
    (files / record).parent.mkdir()
    (files / record).write_text("{}")
    with pytest.raises(ValueError, match=rf"{files}: it is a table of {table}, .* plain Parquet"):
        m.build(str(files), "auto", imports)
    assert m.build(str(files / "*.parquet"), "auto", imports).num_rows == 63


# ---------------------------------------------------------------- rows

ORDERS = st.lists(st.integers(0, 62), max_size=80)


@given(rows=ORDERS, cache=st.sampled_from([0, 600, 1 << 20]))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_take_equals_pandas_in_any_order(files, imports, rows, cache):
    reader = m.Reader(m.build(str(files), "auto", imports), ["text", "label"], cache_bytes=cache)
    expected = people(0, 63)[["text", "label"]].iloc[rows]
    middle = len(rows) // 2
    # The cache is warm from the second on
    for half in (expected.iloc[:middle], expected.iloc[middle:], expected):
        got = reader.take(half.index.to_numpy(dtype=np.int64))
        assert got.column_names == ["text", "label"]
        assert got.to_pydict() == {name: half[name].tolist() for name in half}


def test_the_reader_reads_a_group_once_and_keeps_no_more_than_its_cache(
    files, imports, monkeypatch
):
    reads = []
    original = pq.ParquetFile.read_row_group

    def read(self, number, columns):
        reads.append((number, tuple(columns)))
        return original(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    built = m.build(str(files), "auto", imports)
    reader = m.Reader(built, ["text"])
    for _ in range(3):
        reader.take(np.array([3, 30, 4, 60, 31]))
    assert sorted(reads) == [(0, ("text",)), (1, ("text",)), (3, ("text",))], (
        "one column of three groups, each once"
    )
    tight = m.Reader(built, ["text"], cache_bytes=1)
    last = tight.take(np.arange(63)).slice(61)
    assert tight.bytes_in_cache == last.combine_chunks().nbytes, "one row group"
    reads.clear()
    tight.take(np.array([62, 0, 62]))
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("taken", "copied"),
    [
        (range(7), False),
        (range(2, 7), False),
        (range(1, 3), True),
        ((0, 1, 2, 4, 5), True),
        ((6, 5, 4, 3), True),
    ],
)
def test_most_of_a_row_group_is_not_copied(files, imports, taken, copied):
    """Of files' bytes it would be twice in memory. A small part is, so that it does not keep all of
    them there.
    """
    reader = m.Reader(m.build(str(files), "auto", imports), ["text"])
    group = reader._table(0)["text"].chunk(0)
    found = reader.take(np.array(taken))["text"]
    assert found.to_pylist() == [f"text {i}" for i in taken]
    assert (found.chunk(0).buffers()[2].address != group.buffers()[2].address) == copied


def test_rows_of_a_table_above_two_gibibytes_are_taken_chunk_by_chunk(monkeypatch):
    """Arrow would join its chunks first, and cannot: here none is joined with another."""
    chunks = [[{"bytes": bytes([i, j])} for j in range(5)] for i in range(4)]
    table = pa.table({"image": pa.chunked_array(chunks), "number": list(range(20))})
    sizes: list[int] = []
    take = m.arrow_lists.take

    def noted(part, places):
        sizes.append(part["image"].num_chunks)
        return take(part, places)

    monkeypatch.setattr(m.arrow_lists, "take", noted)
    monkeypatch.setattr(m, "LARGE_GROUP_BYTES", 0)
    for places in ([0, 6, 7, 19], [19, 3, 3, 11, 0], []):
        sizes.clear()
        got = m._take(table, np.array(places, dtype=np.int64))
        assert got.to_pylist() == [table.to_pylist()[i] for i in places]
        assert sizes[:4] == [1] * 4


def test_a_row_group_that_arrow_cannot_read_is_named(files, imports, monkeypatch):
    """As structs of more than 2 GiB, for which a test has no memory."""
    reader = m.Reader(m.build(str(files), "auto", imports), ["number"])

    def fail(*args, **kwargs):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(
        ValueError,
        match=rf"{files}/b\.parquet: Arrow cannot read row group 1 \(Nested data.*row_group_size",
    ):
        reader.take(np.array([28]))


def test_read_columns_equals_pandas(files, imports):
    built = m.build(str(files), "auto", imports)
    expected = people(0, 63)
    for rows in (None, np.array([0, 5, 19, 20, 62]), np.zeros(0, dtype=np.int64)):
        got = m.read_columns(m.Selection(built, rows), ["label", "text"])
        frame = expected if rows is None else expected.iloc[rows]
        assert got.to_pydict() == {"label": frame.label.tolist(), "text": frame.text.tolist()}


def test_columns_stored_as_dictionaries_come_as_values(tmp_path, imports, split):
    """Pandas categoricals, with other categories and nulls in the second file."""
    for name, values in (("a", list("abab") * 5), ("b", [*"cdc", None, *"aaaaaa"])):
        write(
            tmp_path / "rows" / f"{name}.parquet",
            pd.DataFrame({"kind": pd.Categorical(values), "number": range(len(values))}),
        )
    selection = m.Selection(m.build(str(tmp_path / "rows"), "auto", imports))
    column = m.read_columns(selection, ["kind"])["kind"]
    assert column.type in (pa.string(), pa.large_string())
    assert column.to_pylist() == [*"abab" * 5, *"cdc", None, *"aaaaaa"]
    got = split(uri=str(tmp_path / "rows"), group="kind", test_fraction=0.5, validation_fraction=0)
    assert len(got.train) + len(got.test) == 30
    got = split(uri=str(tmp_path / "rows"), where={"kind": ["a"]}, validation_fraction=0)
    assert len(got.train) == 16


@given(mask=st.lists(st.booleans(), min_size=63, max_size=63), second=st.integers(0, 63))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_boundaries_of_a_selection_mark_its_row_groups(files, imports, mask, second):
    built = m.build(str(files), "auto", imports)
    kept = m.Selection(built).keep(np.array(mask))
    kept = kept.keep(np.arange(len(kept)) < second)
    rows = np.flatnonzero(mask)[:second]
    assert len(kept) == len(rows) and kept.ids(np.arange(len(kept))).tolist() == rows.tolist()
    assert numbers(kept) == rows.tolist()
    groups = np.searchsorted(built.starts, rows, side="right")
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1), len(rows)] if len(rows) else [0]
    assert kept.row_group_starts.tolist() == edges


def test_files_without_rows_are_no_matter(files, imports):
    pq.write_table(pq.read_table(files / "a.parquet").slice(0, 0), files / "aa.parquet")
    built = m.build(str(files), "auto", imports)
    assert built.num_rows == 63
    assert numbers(m.Selection(built)) == list(range(63))
    assert built.location(20) == f"{files}/b.parquet row 0"
    assert m.Reader(built, ["number"]).take(np.array([62, 20])).to_pydict() == {"number": [62, 20]}


# ---------------------------------------------------------------- splits


def test_a_declared_split_column_is_obeyed(tmp_path, split):
    frame = people(0, 60)
    frame["part"] = ["train", "dev", "test", "train", "unused", "train"] * 10
    write(tmp_path / "a.parquet", frame)
    got = split(uri=str(tmp_path / "a.parquet"), split_column="part", need_test=True)
    for name, values in (("train", ["train"]), ("validation", ["dev"]), ("test", ["test"])):
        assert numbers(getattr(got, name)) == frame.number[frame.part.isin(values)].tolist(), name
    assert got.sizes() == (
        "train 30, validation 10, test 10 rows (split by column part); 10 rows are in no split by part: "
        "it holds train (30 rows), dev (10 rows), test (10 rows), unused (10 rows)"
    )


def test_fractions_and_seeds_of_splits_that_a_column_gives_are_refused(tmp_path, split):
    frame = people(0, 60)
    frame["part"] = ["train", "dev", "test"] * 20
    frame["half"] = ["train", "test"] * 30
    uri = str(write(tmp_path / "a.parquet", frame))
    for field in ("validation_fraction", "test_fraction"):
        name = field.removesuffix("_fraction")
        message = f"targets.t.data.{field}: column part names 20 {name} rows, so no others are held"
        with pytest.raises(ValueError, match=message):
            split(uri=uri, split_column="part", **{field: 0.2})
    with pytest.raises(ValueError, match=r"targets\.t\.data\.split_seed: no rows are held out by"):
        split(uri=uri, split_column="part", split_seed=1)
    nothing = split(uri=uri, split_column="part", validation_fraction=0, test_fraction=0)
    assert len(nothing.train) == len(nothing.validation) == len(nothing.test) == 20
    drawn = split(uri=uri, split_column="half", validation_fraction=0.2, split_seed=1)
    assert len(drawn.test) == 30 and 0 < len(drawn.validation) < 15


def test_a_value_of_the_split_column_is_one_split_alone(tmp_path, split):
    """Published validation rows taken for the test are not the validation rows as well, though
    nothing else is said of these.
    """
    kinds = ["train"] * 60 + ["validation"] * 40
    write(tmp_path / "a.parquet", pd.DataFrame({"label": 0, "kind": kinds}))
    fields = {"uri": str(tmp_path / "a.parquet"), "split_column": "kind", "need_test": True}
    taken = {"test": ["validation"]}
    got = split(split_values=taken, validation_fraction=0.2, **fields)
    train, validation, test = (set(part.all_ids.tolist()) for part in parts_of(got))
    assert test == set(range(60, 100)) and train | validation == set(range(60))
    assert train and validation and not train & validation
    with pytest.raises(
        ValueError, match="split_values: validation is named twice; a row is in one split"
    ):
        split(split_values={**taken, "validation": ["validation"]}, **fields)


def test_split_values_may_be_named_and_be_numbers(tmp_path, split):
    frame = people(0, 60).assign(fold=np.arange(60) % 5)
    write(tmp_path / "a.parquet", frame)
    got = split(
        uri=str(tmp_path / "a.parquet"),
        split_column="fold",
        split_values={"train": ["0", "1"], "validation": ["2"], "test": ["4"]},
        need_test=True,
    )
    assert numbers(got.train) == frame.number[frame.fold < 2].tolist()
    assert numbers(got.validation) == frame.number[frame.fold == 2].tolist()
    assert numbers(got.test) == frame.number[frame.fold == 4].tolist()


def test_a_split_column_without_training_rows_names_what_it_holds(files, split):
    with pytest.raises(
        ValueError,
        match=r"targets\.t\.data\.split_column: no row of kind is \['train'\]; "
        r"it holds a \(32 rows\), b \(31 rows\); set split_values",
    ):
        split(uri=str(files), split_column="kind")


def test_a_missing_validation_part_is_held_out_of_train_alone(tmp_path, split):
    frame = people(0, 400)
    frame["part"] = np.where(frame.number % 4 == 0, "test", "train")
    write(tmp_path / "a.parquet", frame)
    got = split(
        uri=str(tmp_path / "a.parquet"),
        split_column="part",
        validation_fraction=0.2,
        need_test=True,
    )
    assert numbers(got.test) == frame.number[frame.part == "test"].tolist()
    others = sorted(numbers(got.train) + numbers(got.validation))
    assert others == frame.number[frame.part == "train"].tolist()
    assert 30 <= len(got.validation) <= 90
    assert got.origin == "column part; validation: random 0.2 of train by hash of the row"


def test_declared_files_are_obeyed(files, split):
    got = split(
        train=str(files / "a.parquet"),
        validation=[str(files / "b.parquet")],
        test=str(files / "c.parquet"),
        need_test=True,
    )
    rows = [list(range(20)), list(range(20, 33)), list(range(33, 63))]
    assert [numbers(part) for part in parts_of(got)] == rows
    assert got.origin == "validation files; test files"


def test_hash_splits_cover_each_row_once_near_their_shares(tmp_path, split):
    write(tmp_path / "a.parquet", people(0, 4000), 512)
    got = split(
        uri=str(tmp_path / "a.parquet"), validation_fraction=0.1, test_fraction=0.2, need_test=True
    )
    parts = [numbers(part) for part in parts_of(got)]
    assert sorted(np.concatenate(parts)) == list(range(4000))
    assert abs(len(got.test) / 4000 - 0.2) < 0.025
    assert abs(len(got.validation) / 3200 - 0.1) < 0.025  # four standard errors
    assert (
        got.origin
        == "test: random 0.2 of train by hash of the row; validation: random 0.1 of train by "
        "hash of the row"
    )
    assert max(np.diff(parts[2])) < 60 and parts[2] != list(
        range(parts[2][0], parts[2][0] + len(parts[2]))
    ), "scattered, not a block"


@pytest.mark.parametrize("group", [None, "person"])
def test_another_split_seed_holds_out_other_rows(tmp_path, split, group):
    write(tmp_path / "a.parquet", people(0, 2000), 512)

    def by(**seed):
        return split(
            uri=str(tmp_path / "a.parquet"),
            validation_fraction=0.2,
            test_fraction=0.3,
            group=group,
            need_test=True,
            **seed,
        )

    plain, zero, one, again = by(), by(split_seed=0), by(split_seed=1), by(split_seed=1)
    assert numbers(plain.test) == numbers(zero.test) and plain.origin == zero.origin
    assert numbers(one.test) == numbers(again.test) != numbers(zero.test)
    assert "(split_seed 1)" in one.origin and one.fingerprint != zero.fingerprint
    parts = [set(numbers(part)) for part in parts_of(one)]
    assert set.union(*parts) == set(range(2000)) and sum(map(len, parts)) == 2000
    shared = len(set(numbers(zero.test)) & parts[2]) / 2000
    assert abs(shared - 0.09) < 0.06, "independent of the other: both hold 0.3 x 0.3 of the rows"


def test_a_split_seed_that_nothing_would_read_is_refused(split):
    with pytest.raises(ValueError, match="no rows are held out by validation_fraction"):
        split(train="a", validation="b", test="c", split_seed=1)


# ---------------------------------------------------------------- folds


def fold_numbers(classes, groups, count: int, seed: int = 0) -> np.ndarray:
    """Folds of rows, their random order equal for the rows of a group."""
    order = np.random.default_rng(seed).random(len(classes))
    if groups is not None:
        _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
        order = order[first][unit]
    return m.fold_of_rows(np.asarray(classes), groups, order, count)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=5),
    count=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_folds_deal_out_each_class_within_one_row(sizes, count, seed):
    """As scikit-learn's stratified folds do."""
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    folds = fold_numbers(classes, None, count, seed)
    table = np.array([np.bincount(classes[folds == k], minlength=len(sizes)) for k in range(count)])
    assert (table.sum(0) == sizes).all(), "every row is in one fold"
    assert np.ptp(table, axis=0).max() <= 1 and np.ptp(table.sum(1)) <= 1
    theirs = [
        np.bincount(classes[test], minlength=len(sizes))
        for _, test in StratifiedKFold(count).split(classes, classes)
    ]
    assert (np.sort(table, axis=0) == np.sort(theirs, axis=0)).all()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=6, max_size=40), count=st.integers(2, 5))
def test_folds_of_groups_have_the_sizes_of_scikit_learns(sizes, count):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    folds = fold_numbers(np.zeros(len(groups), dtype=int), groups, count)
    theirs = [len(test) for _, test in GroupKFold(count).split(groups, groups=groups)]
    assert sorted(np.bincount(folds, minlength=count)) == sorted(theirs)
    assert all(len(set(folds[groups == group])) == 1 for group in np.unique(groups))


@pytest.mark.parametrize("seed", range(5))
def test_folds_of_groups_have_like_shares_of_each_class(seed):
    """Nearly as even as scikit-learn's, which tries each fold for each group."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, 60)
    groups = np.repeat(np.arange(60), sizes)
    leaning = rng.random(60)[groups]  # the rows of a group are alike
    classes = (rng.random(len(groups)) < 0.4 * leaning).astype(int)
    folds = fold_numbers(classes, groups, 5, seed)

    def unevenness(tests) -> float:
        shares = [np.bincount(classes[test], minlength=2) / np.bincount(classes) for test in tests]
        return float(np.std(shares, axis=0).max())

    theirs = StratifiedGroupKFold(5).split(classes, classes, groups)
    ours = unevenness([np.flatnonzero(folds == k) for k in range(5)])
    assert ours <= 1.5 * unevenness([test for _, test in theirs])
    assert all(len(set(folds[groups == group])) == 1 for group in range(60))


def test_folds_do_not_depend_on_the_order_in_which_shares_are_added():
    """Rounded sums break ties by it, and so by the machine."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), rng.integers(1, 8, 40))
        classes, order = rng.integers(0, 6, len(groups)), groups / 40
        found = m.fold_of_rows(classes, groups, order, 5)
        renamed = rng.permutation(6)[classes]
        assert (m.fold_of_rows(renamed, groups, order, 5) == found).all(), seed


@pytest.mark.parametrize("group", [None, "person"])
def test_each_row_is_tested_in_one_fold(tmp_path, split, group):
    write(tmp_path / "a.parquet", people(0, 120), 16)

    def by(number: int, **seed):
        return split(
            uri=str(tmp_path / "a.parquet"),
            columns={"label": "label"},
            roles=("label",),
            group=group,
            validation_fraction=0.2,
            need_test=True,
            fold=m.Fold(number, 5),
            **seed,
        )

    parts = [by(number) for number in range(1, 6)]
    assert sorted(row for part in parts for row in numbers(part.test)) == list(range(120))
    for part in parts:
        rows = np.concatenate([numbers(one) for one in parts_of(part)])
        assert sorted(rows) == list(range(120))
        counts = np.bincount(np.array(numbers(part.test)) % 3)
        assert np.ptp(counts) <= (0 if group is None else 2), counts
    assert len({part.origin for part in parts}) == 1, "folds are one target in a table"
    assert len({tuple(numbers(part.validation)) for part in parts}) == 5
    shares = "equal" if group is None else "as equal as its groups allow"
    assert all(f", with shares of each class {shares}" in part.origin for part in parts)
    assert numbers(by(1).test) == numbers(parts[0].test) != numbers(by(1, split_seed=1).test)


def test_too_few_groups_or_rows_of_a_class_for_the_folds_are_refused(tmp_path, split):
    frame = people(0, 40)
    frame["label"] = ["rare"] * 3 + ["common"] * 37
    write(tmp_path / "a.parquet", frame)
    uri = str(tmp_path / "a.parquet")
    fold = {"need_test": True, "fold": m.Fold(1, 5), "uri": uri}
    stratified = {"columns": {"label": "label"}, "roles": ("label",)}
    with pytest.raises(ValueError, match=r"targets.t.folds: .*class rare of label is in 3 rows"):
        split(**fold, **stratified)
    with pytest.raises(ValueError, match="class rare of label is in 1 groups: ask for fewer"):
        split(**fold, **stratified, group="person")
    with pytest.raises(ValueError, match="12 folds need as many groups, and there are 10 groups"):
        split(**fold | {"fold": m.Fold(1, 12)}, group="person")
    assert len(split(**fold, group="person").test) == 8


def test_a_label_that_is_a_number_has_no_classes_to_share(tmp_path, split):
    frame = people(0, 40)
    frame["label"] = np.linspace(0, 1, 40)
    write(tmp_path / "a.parquet", frame)
    parts = [
        split(
            uri=str(tmp_path / "a.parquet"),
            columns={"label": "label"},
            roles=("label",),
            need_test=True,
            fold=m.Fold(number, 4, by_class=False),
            validation_fraction=0.2,
        )
        for number in range(1, 5)
    ]
    assert sorted(row for part in parts for row in numbers(part.test)) == list(range(40))
    assert not any("class" in part.origin for part in parts)


def test_hash_splits_stay_when_other_options_change(tmp_path, split):
    write(tmp_path / "a.parquet", people(0, 1000), 100)
    uri = str(tmp_path / "a.parquet")
    base = split(uri=uri, validation_fraction=0.1, test_fraction=0.2, need_test=True)
    again = split(test_fraction=0.2, validation_fraction=0.1, uri=[uri])
    assert list(map(numbers, parts_of(again))) == list(map(numbers, parts_of(base)))
    assert again.fingerprint == base.fingerprint
    more = split(uri=uri, validation_fraction=0.3, test_fraction=0.2)
    assert numbers(more.test) == numbers(base.test), "validation does not move test"
    assert set(numbers(base.validation)) < set(numbers(more.validation)), (
        "a larger share holds the smaller one"
    )
    larger = split(uri=uri, validation_fraction=0.1, test_fraction=0.4)
    assert set(numbers(base.test)) < set(numbers(larger.test))
    fewer = split(uri=uri, validation_fraction=0.1, test_fraction=0.2, where={"kind": ["a"]})
    assert numbers(fewer.test) == [n for n in numbers(base.test) if n % 2 == 0], (
        "a filter moves no row to another split"
    )
    assert numbers(fewer.validation) == [n for n in numbers(base.validation) if n % 2 == 0]


@pytest.mark.parametrize(
    ("column", "fields"),
    [
        *((column, {"group": column}) for column in ("person", "label", "weight", "flag")),
        ("person", {"columns": {"image_id": "person"}}),
    ],
)
def test_a_group_never_crosses_splits(tmp_path, split, column, fields):
    frame = people(0, 800).assign(
        label=lambda f: f.number % 50, weight=lambda f: (f.number % 80) / 7
    )
    write(tmp_path / "a.parquet", frame.sample(frac=1, random_state=0), 64)
    got = split(
        uri=str(tmp_path / "a.parquet"), validation_fraction=0.4, test_fraction=0.3, **fields
    )
    found = [set(values(part, column)) for part in parts_of(got)]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert sum(map(len, parts_of(got))) == 800
    if column != "flag":
        assert all(found)
        assert f"by hash of {column}" in got.origin


def test_a_patient_on_both_sides_of_a_random_split_is_a_warning(tmp_path, split):
    frame = people(0, 800)
    frame["speaker"] = [person if int(person[1:]) % 2 else None for person in frame.person]
    frame["entity"] = frame.number
    uri = str(tmp_path / "a.parquet")

    def warnings(change=None, **fields) -> tuple[str, ...]:
        write(tmp_path / "a.parquet", frame.rename(columns=change or {}), 64)
        drawn = {"validation_fraction": 0, "test_fraction": 0.3}
        return split(**{"uri": uri, **drawn, **fields}).shared_groups

    write(tmp_path / "a.parquet", frame, 64)
    got = split(uri=uri, validation_fraction=0, test_fraction=0.3)
    test, train = (values(rows, "speaker") for rows in (got.test, got.train))
    shared = sum(speaker in set(train) - {None} for speaker in test)
    assert 0 < shared < len(test)
    (warning,) = got.shared_groups
    assert warning.startswith(f"{shared} of the {len(test)} test rows, held out at random, have")
    assert warning.endswith("say data.group: speaker to keep such rows in one split")
    (warning,) = warnings({"person": "patient"})
    assert "data.group: patient" in warning, "patients may have several recordings"
    (warning,) = warnings(test_fraction=0, validation_fraction=0.2)
    assert " validation rows, held out at random" in warning
    (warning,) = warnings(test_fraction=0.3, validation_fraction=0.2)
    assert " test rows and " in warning and " validation rows, held out at random" in warning
    assert warnings(fold=m.Fold(1, 4, by_class=False), test_fraction=0)
    assert warnings(more=[{"uri": uri, "modality": "text", "test_fraction": 0.3}])
    assert not warnings(group="speaker") and not warnings(test_fraction=0)
    assert not warnings(columns={"label": "speaker"}), "the speaker is to be recognised"
    assert not warnings({"speaker": "who"}), "no row shares its entity"
    frame["speaker"] = "p1"
    assert not warnings(), "a single speaker cannot be shared out"
    frame["speaker"] = [["p1"]] * len(frame)
    assert not warnings()


@pytest.mark.parametrize("named_by", ["recording", "audio"])
def test_pieces_of_one_recording_stay_in_one_split(tmp_path, split, named_by):
    frame = people(0, 800)
    frame["audio"] = [f"/nowhere/{number // 8}.wav" for number in frame.number]
    if named_by == "recording":
        frame["recording"] = [path.removeprefix("/nowhere/") for path in frame.audio]
    write(tmp_path / "a.parquet", frame.sample(frac=1, random_state=0), 64)
    fields = {"modality": "audio", "columns": {"audio": "audio"}}
    pieces = {"uri": str(tmp_path / "a.parquet"), **fields}
    drawn = split(validation_fraction=0.4, test_fraction=0.3, **pieces)
    fold = split(fold=m.Fold(2, 4, by_class=False), **pieces)
    for got in (drawn, fold):
        recordings = [set(values(part, "audio")) for part in parts_of(got)]
        assert all(recordings) and sum(map(len, recordings)) == 100
        assert f"by hash of {named_by}" in got.origin
    grouped = split(group="person", test_fraction=0.3, **pieces)
    assert "by hash of person" in grouped.origin, "a group decides alone"
    with pytest.raises(
        ValueError, match=f"101 folds need as many values of {named_by}, and there are 100"
    ):
        split(fold=m.Fold(1, 101, by_class=False), **pieces)
    write(tmp_path / "b.parquet", people(0, 800).assign(audio=lambda f: f.number.astype(str)))
    whole = split(uri=str(tmp_path / "b.parquet"), test_fraction=0.3, **fields)
    by_row = split(uri=str(tmp_path / "b.parquet"), test_fraction=0.3)
    assert numbers(whole.test) == numbers(by_row.test), "each recording is one row"
    assert (drawn.drawn_by, whole.drawn_by, grouped.drawn_by) == ((named_by,), ("",), ("",))
    write(tmp_path / "c.parquet", frame[:16])
    few = {"uri": str(tmp_path / "c.parquet"), **fields}
    reason = f"the validation split is empty .*; the rows have 2 values of {named_by}, .*split_seed"
    with pytest.raises(ValueError, match=reason):
        split(need_test=True, validation_fraction=0.01, test_fraction=0.01, **few)


def test_a_group_split_does_not_depend_on_the_order_of_rows(tmp_path, split):
    frame = people(0, 800)
    write(tmp_path / "a.parquet", frame)
    write(tmp_path / "b.parquet", frame[::-1], 33)
    tests = [
        split(uri=str(tmp_path / name), group="person", test_fraction=0.3).test
        for name in ("a.parquet", "b.parquet")
    ]
    assert sorted(numbers(tests[0])) == sorted(numbers(tests[1])) != []


def test_rows_without_a_group_stand_each_for_itself(tmp_path, split):
    frame = people(0, 400)
    frame.loc[::5, "person"] = None
    write(tmp_path / "a.parquet", frame)
    got = split(
        uri=str(tmp_path / "a.parquet"), group="person", validation_fraction=0.3, test_fraction=0.3
    )
    people_of = [values(part, "person") for part in parts_of(got)]
    nulls = [found.count(None) for found in people_of]
    assert all(10 < count < 60 for count in nulls) and sum(nulls) == 80
    assert not any(
        {*a} & {*b} - {None} for a, b in zip(people_of, people_of[1:] + people_of[:1], strict=True)
    )
    declared = frame.assign(part=np.where(frame.number < 200, "train", "test"))
    fields = {"group": "person", "split_column": "part", "validation_fraction": 0.1}
    got = split(uri=str(write(tmp_path / "a.parquet", declared)), need_test=True, **fields)
    assert len(got.test) == 200
    uri = str(write(tmp_path / "none.parquet", frame.assign(person=None)))
    assert len(split(uri=uri, group="person", validation_fraction=0.3).validation) > 50


def test_units_of_rows_are_their_groups():
    found = m.group_numbers(pa.chunked_array([["a", None, "b"], [None, "a"]])).tolist()
    assert found[0] == found[4] and len({*found}) == 4
    assert len({*m.group_numbers(pa.chunked_array([pa.nulls(3)])).tolist()}) == 3


def test_declared_splits_whose_groups_cross_are_refused(files, split):
    write(files / "test" / "t.parquet", people(18, 24))  # person p4 stands in rows 16 to 19
    with pytest.raises(ValueError) as caught:
        split(train=str(files / "a.parquet"), test=str(files / "test"), group="person")
    assert str(caught.value).startswith(
        "targets.t.data.group: 1 of 6 values of person is in more than one split: "
        f"{files / 'a.parquet'} row 16 is in train, and {files / 'test' / 't.parquet'} row 0, "
        "which has the same value, is in test. Rows of a group must be in one split"
    )


def test_a_split_column_that_cuts_through_people_is_refused_without_naming_one(tmp_path, split):
    frame = people(0, 60).assign(part=["train", "dev", "test", "train", "train", "train"] * 10)
    frame["person"] = "CANARY-" + frame.person
    write(tmp_path / "a.parquet", frame)
    with pytest.raises(ValueError) as caught:
        split(uri=str(tmp_path / "a.parquet"), split_column="part", group="person", need_test=True)
    crossing = sorted(
        person for person, parts in frame.groupby("person").part if parts.nunique() > 1
    )
    message = str(caught.value)
    assert message.startswith(
        f"targets.t.data.group: {len(crossing)} of 15 values of person are in more than one split: "
    )
    assert "CANARY" not in message, "an error names rows by their position, never a person"
    whole = frame.assign(
        part=np.where(frame.number < 20, "train", np.where(frame.number < 40, "dev", "test"))
    )
    write(tmp_path / "a.parquet", whole)
    got = split(
        uri=str(tmp_path / "a.parquet"), split_column="part", group="person", need_test=True
    )
    assert got.origin == "column part; no person in two splits"


@pytest.mark.parametrize(
    "kind",
    [
        pa.float64(),
        pa.int32(),
        pa.string(),
        pa.decimal128(24, 2),
        pa.large_string(),
        pa.string_view(),
    ],
    ids=str,
)
def test_people_stored_as_another_type_cross_splits_all_the_same(tmp_path, split, kind):
    """pandas makes doubles of whole numbers where one is missing."""
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    pq.write_table(pa.table({"p": pa.array(range(8), pa.int64())}), files["train"])
    numbers = pa.array([3, None, *range(20, 26)], pa.int64())
    ids = (
        numbers.cast(pa.string()).cast(kind)
        if kind in (pa.string_view(), pa.large_string())
        else numbers.cast(kind, safe=False)
    )
    pq.write_table(pa.table({"p": ids}), files["test"])
    with pytest.raises(
        ValueError,
        match=r"targets\.t\.data\.group: 1 of 14 values of p is in more than one split",
    ):
        split(group="p", validation_fraction=0.0, **files)
    others = pa.array([None, *range(20, 27)], pa.int64()).cast(pa.float64())
    pq.write_table(pa.table({"p": others}), files["test"])
    split(group="p", validation_fraction=0.0, **files)


def test_people_stored_as_another_type_fall_into_one_split_by_hash(tmp_path, split):
    found = []
    for name, kind in (("a", pa.int64()), ("b", pa.float64())):
        ids = pa.array(range(200), pa.int64()).cast(kind)
        pq.write_table(pa.table({"p": ids}), tmp_path / f"{name}.parquet")
        uri = str(tmp_path / f"{name}.parquet")
        got = split(uri=uri, group="p", test_fraction=0.3, validation_fraction=0.0)
        found.append(got.test.all_ids.tolist())
    assert found[0] == found[1] and 0 < len(found[0]) < 200


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12"),
        (12.0, "12"),
        ("12", "12"),
        (12.5, "12.5"),
        (True, "true"),
        (b"ab", "ab"),
        (float("inf"), "inf"),
        (decimal.Decimal("12.00"), "12"),
        (decimal.Decimal("12.50"), "12.50"),
        (decimal.Decimal("NaN"), "NaN"),
        ("012", "012"),
    ],
)
def test_one_text_for_what_tables_store_as_different_types(value, text):
    assert m.value_text(value) == text


# ---------------------------------------------------------------- joined corpora


def more(**fields) -> dict:
    return {"modality": "text", **fields}


def test_joined_corpora_follow_each_other_with_their_own_splits_and_filters(
    files, tmp_path, split, imports
):
    other = people(100, 160).assign(part=["train", "dev", "test"] * 20)
    write(tmp_path / "other.parquet", other, 11)
    columns = {"text": "text", "label": "label"}
    drawn = {"validation_fraction": 0.2, "test_fraction": 0.2}
    fields = {"uri": str(files), "where": {"kind": ["a"]}, "columns": columns, **drawn}
    second = more(uri=str(tmp_path / "other.parquet"), split_column="part")
    got = split(need_test=True, roles=("text", "label"), more=[second], **fields)
    alone = split(**fields)
    for name, value in (("train", "train"), ("validation", "dev"), ("test", "test")):
        joined, first = getattr(got, name), getattr(alone, name)
        texts = [*values(first, "text"), *other.text[other.part == value]]
        assert values(joined, "text") == texts and len(joined) == len(texts)
        ids = joined.all_ids
        assert (np.diff(ids) > 0).all()
        assert (ids[: len(first)] == first.all_ids).all(), "the first one's ids stay"
        mixed = np.random.default_rng(0).permutation(len(joined))
        taken = m.Reader(joined.manifest, ["text"]).take(joined.ids(mixed))["text"]
        assert taken.to_pylist() == [texts[i] for i in mixed]
        assert joined.row_group_starts[0] == 0 and joined.row_group_starts[-1] == len(joined)
        last = other.number[other.part == value].max() - 100
        place = f"{tmp_path / 'other.parquet'} row {last}"
        assert joined.manifest.location(int(ids[-1])) == place
    assert got.origin.startswith("corpus 1: test: random 0.2 of train")
    assert got.origin.endswith("; corpus 2: column part")
    assert pickle.loads(pickle.dumps(got)).fingerprint == got.fingerprint != alone.fingerprint
    again = split(
        uri=str(files),
        validation_fraction=0,
        columns=columns,
        more=[more(uri=str(files), validation_fraction=0)],
    )
    assert again.train.row_ids is None and len(again.train) == 2 * 63
    assert again.origin == "each of 2 corpora: as given"


def test_training_rows_are_told_by_corpus_in_the_order_of_the_job_file(files, tmp_path, split):
    write(tmp_path / "other.parquet", people(100, 160).assign(part=["train", "dev", "test"] * 20))
    write(
        tmp_path / "empty" / "empty.parquet",
        people(0, 0).astype({"text": str, "person": str, "kind": str}),
    )
    got = split(
        uri=str(files),
        validation_fraction=0.2,
        columns={"text": "text"},
        need_test=False,
        more=[
            more(uri=str(tmp_path / "other.parquet"), split_column="part"),
            more(uri=str(tmp_path / "empty"), validation_fraction=0),
            more(train=str(files / "b.parquet"), validation_fraction=0),
        ],
    )
    assert got.corpus_sizes[1:] == (20, 0, 13) and sum(got.corpus_sizes) == len(got.train)
    ends = np.cumsum(got.corpus_sizes)
    held = values(got.train, "text")
    assert held[ends[0] : ends[1]] == [f"text {n}" for n in range(100, 160, 3)]
    assert held[ends[2] :] == [f"text {n}" for n in range(20, 33)]
    assert split(uri=str(files), validation_fraction=0).corpus_sizes == (63,)
    with pytest.raises(
        ValueError,
        match=r"targets\.t\.data\.more\.0: this corpus has weight 2 and no training row to draw; "
        r"leave it out, or look at its "
        r"splits and where \(train 0, validation 0",
    ):
        split(uri=str(files), weight=1.0, more=[more(uri=str(tmp_path / "empty"), weight=2.0)])


def test_a_joined_corpus_may_bring_training_rows_alone(files, split):
    got = split(
        train=str(files / "a.parquet"),
        validation=str(files / "b.parquet"),
        columns={"text": "text"},
        more=[more(train=str(files / "c.parquet"), validation_fraction=0)],
    )
    assert [len(s) for s in (got.train, got.validation, got.test)] == [20 + 30, 13, 0]
    assert got.validation.manifest.files == (str(files / "b.parquet"),)


def test_joined_columns_take_the_types_of_the_first(tmp_path, split):
    first, second = people(0, 20), people(20, 40)
    pq.write_table(
        pa.table(
            {
                "text": pa.array(first.text.tolist()),
                "label": pa.array(first.label.tolist(), pa.int32()),
            }
        ),
        tmp_path / "a.parquet",
    )
    coded = pa.array(second.text.tolist(), pa.large_string()).dictionary_encode()
    pq.write_table(
        pa.table(
            {"label": pa.array(second.label.tolist(), pa.int64()), "text": coded, "more": [0] * 20}
        ),
        tmp_path / "b.parquet",
    )
    for names in (("a", "b"), ("b", "a")):
        got = split(
            uri=str(tmp_path / f"{names[0]}.parquet"),
            columns={"text": "text", "label": "label"},
            validation_fraction=0,
            more=[more(uri=str(tmp_path / f"{names[1]}.parquet"), validation_fraction=0)],
        )
        whole = m.read_columns(got.train, ["text", "label"])
        assert sorted(whole["text"].to_pylist()) == sorted([*first.text, *second.text])
        assert (
            m.Reader(got.train.manifest, ["text", "label"])
            .take(np.array([0, 39]))
            .schema.equals(whole.schema)
        )


@pytest.mark.parametrize(
    ("frame", "fields", "message"),
    [
        (
            people(0, 5).drop(columns="label"),
            {},
            r"targets\.t\.data\.more\.0\.columns\.label: .*o\.parquet has no column 'label'",
        ),
        (
            people(0, 5).astype({"label": str}),
            {},
            r"targets\.t\.data\.more\.0: column 'label' is (large_)?string in .*o\.parquet and "
            r"int64 in .*a\.parquet; ",
        ),
        (
            people(0, 5),
            {"where": {"kin": ["a"]}},
            r"targets\.t\.data\.more\.0\.where: .* has no column 'kin'; did you mean kind",
        ),
        (
            people(0, 5),
            {"split_column": "kind"},
            r"targets\.t\.data\.more\.0\.split_column: no row of kind is \['train'\]",
        ),
    ],
)
def test_corpora_that_do_not_fit_are_refused_with_their_place(
    files, tmp_path, split, frame, fields, message
):
    other = more(uri=str(write(tmp_path / "o.parquet", frame)), validation_fraction=0, **fields)
    with pytest.raises(ValueError, match=message):
        split(uri=str(files), columns={"text": "text", "label": "label"}, more=[other])


def test_people_cross_no_splits_of_joined_corpora(files, tmp_path, split):
    other = write(tmp_path / "other.parquet", people(18, 30))
    parts = {
        "train": str(files / "a.parquet"),
        "validation": str(files / "c.parquet"),
        "columns": {"text": "text"},
    }
    with pytest.raises(
        ValueError,
        match=r"data\.group: 1 of \d+ values of person is in more than one split: "
        r"\S+ row \d+ is in train",
    ):
        split(
            **parts,
            group="person",
            more=[
                more(uri=str(place), validation_fraction=0, group="person")
                for place in (other, files / "b.parquet")
            ],
        )
    with pytest.raises(
        ValueError,
        match=r"data\.more\.0\.group: it is not given, that of the first rows person; joined "
        r"corpora are grouped by one column",
    ):
        split(**parts, group="person", more=[more(uri=str(other))])
    got = split(
        uri=str(files / "b.parquet"),
        validation_fraction=0.4,
        columns={"text": "text"},
        more=[more(uri=str(files / "a.parquet"), group="person", validation_fraction=0.4)],
    )
    assert not set(values(got.train, "text")) & set(values(got.validation, "text"))
    drawn = "validation: random 0.4 of train by hash of person; no person in two splits"
    assert f"corpus 2: {drawn}" in got.origin
    with pytest.raises(
        ValueError, match=r"more\.0\.group: it is person, that of the first rows is not given"
    ):
        split(
            uri=str(files / "b.parquet"),
            test_fraction=0.3,
            columns={"text": "text"},
            need_test=True,
            more=[more(uri=str(files / "a.parquet"), group="person")],
        )


WHERE = [
    ({"kind": ["a"]}, lambda f: f.kind == "a"),
    ({"kind": ["a", "b"]}, lambda f: f.number >= 0),
    ({"label": [0, 2]}, lambda f: f.label != 1),
    ({"label": ["1"]}, lambda f: f.label == 1),
    ({"flag": [True]}, lambda f: f.flag),
    ({"flag": [False]}, lambda f: ~f.flag),
    ({"weight": [0.5, 1.5]}, lambda f: f.weight.isin([0.5, 1.5])),
    ({"weight": [1.0]}, lambda f: f.weight == 1.0),
    ({"weight": [1]}, lambda f: f.weight == 1),
    ({"kind": ["a"], "label": [1]}, lambda f: (f.kind == "a") & (f.label == 1)),
]


@pytest.mark.parametrize(("where", "mask"), WHERE, ids=[str(w[0]) for w in WHERE])
def test_where_keeps_the_rows_it_names(files, split, where, mask):
    frame = people(0, 63)
    got = split(uri=str(files), where=where, validation_fraction=0)
    assert numbers(got.train) == frame.number[mask(frame)].tolist()


def test_where_leaves_nulls_out(tmp_path, split):
    frame = people(0, 20)
    frame.loc[::2, "kind"] = None
    write(tmp_path / "a.parquet", frame)
    fields = {"uri": str(tmp_path / "a.parquet"), "validation_fraction": 0}
    assert numbers(split(where={"kind": ["b"]}, **fields).train) == list(range(1, 20, 2))
    assert numbers(split(where={"kind": ["b", "None"]}, **fields).train) == list(range(1, 20, 2))


def test_values_of_where_that_no_row_has_are_counted(tmp_path, split):
    """One of them may be misspelt: its rows would silently be missing."""
    for name, countries in (("train", ["de", "fr"]), ("test", ["de", "no"])):
        frame = people(0, 20).assign(country=countries * 10)
        write(tmp_path / f"{name}.parquet", frame)
    fields = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    got = split(where={"country": ["fr", "no"]}, validation_fraction=0, **fields)
    assert (len(got.train), len(got.test), got.unused) == (10, 10, "")
    got = split(where={"country": ["fr", "no", "CANARY"]}, validation_fraction=0, **fields)
    assert got.sizes() == (
        "train 10, validation 0, test 10 rows (test files); no row has 1 of the 3 values of "
        "where.country"
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"kind": ["c"]},
            r"targets\.t\.data\.where: no row of \S+a\.parquet has the value asked for in "
            r"column kind; it holds a \(10 rows\), b \(10 rows\)$",
        ),
        (
            {"flag": [1, "yes"]},
            r"no row of \S+ has any of the 2 values asked for in column flag; it holds "
            r"(true|false) \(10 rows\)",
        ),
        (
            {"number": [77]},
            r"no row of \S+ has the value asked for in column number; it holds 20 distinct "
            r"values in 20 rows$",
        ),
        (
            {"person": ["p99"]},
            r"no row of \S+ has the value asked for in column person; it holds 5 distinct "
            r"values in 20 rows$",
        ),
        (
            {"kind": ["a"], "flag": [False]},
            r"each of its conditions \(kind, flag\) holds for some rows of \S+, and all "
            r"together for none",
        ),
    ],
)
def test_where_that_keeps_no_row_says_what_there_is(files, split, where, message):
    """Of a group, or a column whose every row has a value of its own, only how many: these may tell
    who somebody is.
    """
    with pytest.raises(ValueError, match=message):
        split(uri=str(files / "a.parquet"), where=where, group="person", validation_fraction=0)


@pytest.mark.parametrize("by", ["where", "split_column"])
@pytest.mark.parametrize(
    ("values", "group", "message"),
    [
        # Stays of people
        (
            [f"MRN{i // 3:04}" for i in range(24)],
            [f"p{i // 6}" for i in range(24)],
            "it holds 8 distinct values in 24 rows",
        ),
        ([f"MRN{i:04}" for i in range(6)], None, "it holds 6 distinct values in 6 rows"),
        (["a", "a", "MRN0000", None], None, "it holds 2 distinct values in 3 rows, 1 nulls"),
        (["a", "b"] * 6, [f"p{i // 2}" for i in range(12)], r"it holds a \(6 rows\), b \(6 rows\)"),
        (["a", "b"] * 6, [f"p{i % 2}" for i in range(12)], "it holds 2 distinct values in 12 rows"),
    ],
    ids=["stays of people", "one row each", "one of one row", "kinds", "one group each"],
)
def test_values_that_may_name_people_are_not_told(tmp_path, split, by, values, group, message):
    table = {"text": ["x"] * len(values), "of": values, **({"p": group} if group else {})}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    fields = (
        {"where": {"of": ["CANARY"]}}
        if by == "where"
        else {"split_column": "of", "split_values": {"train": ["CANARY"]}}
    )
    with pytest.raises(ValueError, match=f"{message}(; set split_values)?$") as caught:
        split(
            uri=str(tmp_path / "a.parquet"),
            group="p" if group else None,
            validation_fraction=0.0,
            **fields,
        )
    assert "MRN" not in str(caught.value)
    assert "CANARY" not in str(caught.value), (
        "what the job file states may come from the environment, and be secret"
    )


def test_where_that_keeps_no_row_of_a_further_split_or_corpus_is_reported(files, tmp_path, split):
    write(tmp_path / "other.parquet", people(0, 8).assign(kind="z"))
    with pytest.raises(
        ValueError,
        match=r"where: no row of \S+other\.parquet has the value asked for in column kind; it "
        r"holds z \(8 rows\)",
    ):
        split(
            train=str(files / "a.parquet"),
            test=str(tmp_path / "other.parquet"),
            where={"kind": ["a"]},
        )
    with pytest.raises(
        ValueError,
        match=r"targets\.t\.data\.more\.0\.where: no row of \S+other\.parquet has the value asked "
        r"for in column kind",
    ):
        split(
            uri=str(files),
            columns={"text": "text"},
            more=[more(uri=str(tmp_path / "other.parquet"), where={"kind": ["a"]})],
        )


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_file_of_training_rows_tests_nothing(files, split, name):
    both = {"train": str(files / "*.parquet"), name: str(files / "b.parquet")}
    with pytest.raises(
        ValueError,
        match=rf"targets\.t\.data\.{name}: 1 of its 1 files are also in train, such as "
        rf"{files}/b\.parquet: leave them out of one of the two",
    ):
        split(**both)


def test_an_image_of_training_rows_tests_nothing(pets, split):
    fields = {"columns": {"image": "image"}, "modality": {"name": "image"}}
    folders = sorted(str(path) for path in Path(pets).iterdir() if path.is_dir())
    with pytest.raises(ValueError, match=r"data\.test: \d+ of its \d+ files are also in train"):
        split(roles=("image",), train=str(pets), test=folders[0], **fields)


def test_where_holds_for_every_split(files, split):
    got = split(
        train=str(files / "a.parquet"),
        validation=str(files / "b.parquet"),
        test=str(files / "c.parquet"),
        where={"kind": ["a"]},
        need_test=True,
    )
    assert all(n % 2 == 0 for part in parts_of(got) for n in numbers(part))
    assert len(got.test) == 15


def test_lists_are_no_groups_and_no_splits(tmp_path, split):
    pq.write_table(pa.table({"text": ["a"], "tags": [["x"]]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as caught:
        split(uri=str(tmp_path / "a.parquet"), group="tags", where={"tags": ["x"]})
    where, group = str(caught.value).splitlines()
    assert where.startswith("targets.t.data.where: column 'tags' of ")
    assert group.startswith("targets.t.data.group: ") and "holds list<" in group


def test_a_column_that_is_there_twice_is_named(tmp_path, split):
    (tmp_path / "a.csv").write_text("text,label,label\na,1,2\n")
    columns = {"text": "text", "label": "label"}
    with pytest.raises(
        ValueError, match=r"columns\.label: \S+a\.csv has 2 columns 'label'; rename"
    ):
        split(uri=str(tmp_path / "a.csv"), roles=("text", "label"), columns=columns)


def test_all_wrong_columns_are_told_at_once_with_the_nearest(files, split):
    with pytest.raises(ValueError) as caught:
        split(
            uri=str(files),
            roles=("text", "label"),
            columns={"text": "txt"},
            where={"kin": ["a"], "flg": [True]},
            group="persn",
            split_column="splt",
        )
    wrong = {"columns.text": "txt", "where": "kin", "split_column": "splt", "group": "persn"}
    nearest = {"txt": "text", "kin": "kind", "flg": "flag", "persn": "person"}
    message = str(caught.value)
    assert message.startswith(
        "targets.t.data.columns: role 'label' has no column; add {label: NAME}; columns are "
        "number, text, label"
    )
    for field, name in [*wrong.items(), ("where", "flg")]:
        said = f"targets.t.data.{field}: {files}/a.parquet has no column '{name}'; "
        said += f"did you mean {nearest[name]}?" if name in nearest else ""
        assert said in message
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
    ("fields", "need_test", "message"),
    [
        (
            {
                "split_column": "kind",
                "split_values": {"train": ["a"], "test": ["b"]},
                "validation_fraction": 0,
            },
            True,
            r"the validation split is empty \(train 32, validation 0, test 31 rows",
        ),
        ({}, True, "the test split is empty .*; give test files, a split_column or test_fraction"),
        ({"validation_fraction": 0, "test_fraction": 0.2}, True, "the validation split is empty"),
    ],
)
def test_an_empty_split_is_refused_with_the_sizes(files, split, fields, need_test, message):
    with pytest.raises(ValueError, match=message):
        split(uri=str(files), need_test=need_test, **fields)


def test_the_columns_of_every_split_are_checked(files, split):
    write(files / "test" / "t.parquet", people(0, 5).drop(columns="label"))
    with pytest.raises(ValueError, match=r"t\.parquet has no column 'label'"):
        split(
            train=str(files / "a.parquet"),
            test=str(files / "test"),
            roles=("label",),
            columns={"label": "label"},
        )


def test_fingerprint_of_splits_sees_what_is_in_which(files, split):
    prints = {
        split(uri=str(files), test_fraction=0.3).fingerprint,
        split(uri=str(files), test_fraction=0.5).fingerprint,
        split(uri=str(files / "a.parquet"), test_fraction=0.3).fingerprint,
    }
    assert len(prints) == 3
    by_row = split(uri=str(files), test_fraction=0.3)
    parts = (by_row.train, by_row.validation, by_row.test)
    as_before = spec_hash([s.manifest.fingerprint for s in parts], [len(s) for s in parts])
    by_recording = dataclasses.replace(by_row, drawn_by=("recording",))
    assert by_recording.fingerprint != by_row.fingerprint == as_before


# ---------------------------------------------------------------- imports of other formats


def rows_of(uri, imports: str, form: str = "auto") -> dict[str, list]:
    built = m.build(str(uri), form, imports)
    return m.read_columns(m.Selection(built), built.schema.names).to_pydict()


def test_an_image_folder_gives_paths_and_labels(tmp_path, imports):
    for name in ("cat/1.png", "cat/2.JPG", "dog/3.jpeg", "dog/notes.txt.bak", ".hidden/4.png"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(PNG)
    got = rows_of(tmp_path / "pets", imports)
    assert [Path(p).relative_to(tmp_path / "pets").as_posix() for p in got["image"]] == [
        "cat/1.png",
        "cat/2.JPG",
        "dog/3.jpeg",
    ]
    assert got["label"] == ["cat", "cat", "dog"]


@pytest.fixture
def pets(tmp_path):
    """An image folder of six: cat/0.png to dog/2.png, each of its own bytes and one size."""
    for i in range(6):
        path = tmp_path / "pets" / ("cat" if i < 3 else "dog") / f"{i % 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG + bytes([i]))
    return tmp_path / "pets"


def replace(path: Path, content: bytes) -> None:
    """Other bytes under the same name, at least a moment later."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 1000, before + 1000))


def test_a_replaced_image_of_the_same_size_is_seen(pets, imports):
    first = m.build(str(pets), "auto", imports)
    again = m.build(str(pets), "auto", imports)
    assert again.fingerprint == first.fingerprint and again.files == first.files
    replace(pets / "cat" / "1.png", PNG + b"x")
    changed = m.build(str(pets), "auto", imports)
    assert changed.fingerprint != first.fingerprint and changed.num_rows == 6
    (pets / "cat" / "1.png").unlink()
    assert m.build(str(pets), "auto", imports).fingerprint not in (
        first.fingerprint,
        changed.fingerprint,
    )


@pytest.mark.parametrize(
    "named",
    [
        "{0}",
        "{0}/",
        "file://{0}",
        "{0}/*/*.png",
        "{0}/**/*.png",
        "{0}/dog {0}/cat",
        "{0}/cat/1.png",
        "{0}/cat/1.png {0}/dog",
    ],
)
def test_images_that_are_moved_as_a_whole_keep_their_fingerprint(pets, imports, tmp_path, named):
    first = m.build(named.format(pets).split(), "auto", imports)
    (tmp_path / "other" / "place").mkdir(parents=True)
    moved = pets.rename(tmp_path / "other" / "place" / "animals")
    second = m.build(named.format(moved).split(), "auto", imports)
    assert second.fingerprint == first.fingerprint and second.files != first.files
    paths = m.read_columns(m.Selection(second), ["image"])["image"].to_pylist()
    assert all(path.startswith(f"{moved}/") and Path(path).is_file() for path in paths), (
        "the rows follow the move"
    )


def test_a_copy_of_an_image_folder_has_its_fingerprint(pets, imports, tmp_path):
    """`cp -r` gives every file another time of change."""
    first = m.build(str(pets), "auto", imports)
    shutil.copytree(pets, tmp_path / "copy", copy_function=shutil.copy)
    assert (tmp_path / "copy/cat/0.png").stat().st_mtime_ns != (
        pets / "cat/0.png"
    ).stat().st_mtime_ns
    assert m.build(str(tmp_path / "copy"), "auto", imports).fingerprint == first.fingerprint
    by_stat = [
        m.build_with_files(str(folder), "auto", imports, "stat")[0].fingerprint
        for folder in (pets, tmp_path / "copy")
    ]
    assert len({first.fingerprint, *by_stat}) == 3


def named_rows(folder: Path, values: list, kind: pa.DataType) -> Data:
    pq.write_table(
        pa.table({"picture": pa.array(values, kind), "number": range(len(values))}),
        folder / "rows.parquet",
        row_group_size=2,
    )
    return Data(
        uri=str(folder / "rows.parquet"),
        modality="image",
        columns={"image": "picture"},
        validation_fraction=0.0,
    )  # pyright: ignore


def splits_of_images(data: Data, imports: str) -> m.Splits:
    return m.splits(data, ("image",), "sources.s", imports, need_test=False)


@pytest.mark.parametrize("form", ["text", "struct", "dictionary"])
def test_files_that_a_column_names_are_part_of_the_fingerprint(pets, imports, tmp_path, form):
    paths = [*[str(path) for path in sorted(pets.rglob("*.png"))][:4], str(pets / "gone.png")]
    if form == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        inside = {"bytes": PNG, "path": "a name that is no place"}
        cells = [*({"path": path} for path in paths), inside, None]
    else:
        kind = pa.string() if form == "text" else pa.dictionary(pa.int32(), pa.string())
        cells = [*paths, None]
    data = named_rows(tmp_path, cells, kind)

    def found() -> m.Splits:
        return splits_of_images(data, imports)

    first = found()
    assert found().fingerprint == first.fingerprint
    assert [file.uri for file in first.reads] == [str(tmp_path / "rows.parquet"), *sorted(paths)]
    before = os.stat(paths[1])
    Path(paths[1]).write_bytes(PNG + b"x")
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(paths[1])
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = found()
    assert second.fingerprint != first.fingerprint
    assert second.train.manifest.fingerprint != first.train.manifest.fingerprint
    Path(paths[4]).write_bytes(PNG)
    assert found().fingerprint not in (first.fingerprint, second.fingerprint), (
        "a file that was not there"
    )
    (pets / "dog/2.png").write_bytes(b"of no row")
    third = found()
    with pytest.raises(file_identity.ChangedFileError, match=paths[1]):
        file_identity.check_unchanged(first.reads)
    file_identity.check_unchanged(third.reads)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.large_string(),
        pa.struct([("bytes", pa.null()), ("path", pa.string())]),
        pa.struct([("path", pa.large_string())]),
    ],
    ids=str,
)
def test_files_named_by_any_type_of_text_are_part_of_the_fingerprint(pets, imports, tmp_path, kind):
    paths = [str(path) for path in sorted(pets.rglob("*.png"))]
    is_struct = pa.types.is_struct(kind)
    data = named_rows(
        tmp_path, [*({"path": path} if is_struct else path for path in paths), None], kind
    )
    first = splits_of_images(data, imports)
    assert [file.uri for file in first.reads] == [str(tmp_path / "rows.parquet"), *paths]
    Path(paths[0]).write_bytes(b"another")
    assert splits_of_images(data, imports).fingerprint != first.fingerprint


def test_columns_of_views_are_read_like_others(tmp_path, split):
    """polars writes them; Arrow has no kernel that takes rows of them."""
    views = {
        "text": pa.array(["a", "b", "a", None], pa.string_view()),
        "raw": pa.array([b"x", b"y", b"z", b""], pa.binary_view()),
        "words": pa.array([["a"], [], None, ["b", "c"]], pa.list_(pa.string_view())),
        "file": pa.array(
            [{"bytes": b"x", "path": "a"}] * 4,
            pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
        ),
    }
    pq.write_table(pa.table(views), tmp_path / "a.parquet")
    got = split(
        uri=str(tmp_path / "a.parquet"),
        columns={"text": "text"},
        where={"text": ["a"]},
        validation_fraction=0.0,
    )
    for table in (
        m.read_columns(got.train, [*views]),
        m.Reader(got.train.manifest, [*views]).take(np.array([0, 2])),
    ):
        assert (
            table["text"].to_pylist() == ["a", "a"]
            and table["raw"].to_pylist() == [b"x", b"z"]
            and table["words"].to_pylist() == [["a"], None]
        )
        assert table["file"].to_pylist() == [{"bytes": b"x", "path": "a"}] * 2


def test_a_struct_that_names_no_file_is_part_of_the_table_alone(imports, tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    data = named_rows(tmp_path, [{"bytes": PNG}, {"bytes": None}], kind)
    found = splits_of_images(data, imports)
    assert [file.uri for file in found.reads] == [str(tmp_path / "rows.parquet")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_bytes_of_any_type_are_seen(kind):
    assert m.cells_with_bytes(pa.array([b"abc", b"", None], kind)).tolist() == [True, False, False]
    assert m.cells_with_bytes(pa.nulls(2)).tolist() == [False, False]


def test_a_name_with_nul_is_one_bad_row(pets, imports, tmp_path):
    paths = [str(path) for path in sorted(pets.rglob("*.png"))]
    names = [paths[0], "a\0b.png", paths[1]]
    found = splits_of_images(named_rows(tmp_path, names, pa.string()), imports)
    is_absent = [file.content == file_identity.ABSENT for file in found.reads[1:]]
    assert is_absent == [name == "a\0b.png" for name in sorted(names)]
    file_identity.check_unchanged(found.reads)


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ftp://somewhere/a.png", "ftp:// is not supported"),
        ("{folder}", "is a folder"),
        ("x" * 5000, "too long"),
    ],
)
def test_what_names_no_file_is_told_with_its_row(pets, imports, tmp_path, name, message, struct):
    paths = [*[str(path) for path in sorted(pets.rglob("*.png"))][:3], name.format(folder=pets)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.string()
    data = named_rows(tmp_path, [{"path": path} if struct else path for path in paths], kind)
    with pytest.raises(
        storage.StorageError, match=rf"rows\.parquet row 3, column 'picture': .*{message}"
    ) as caught:
        splits_of_images(data, imports)
    assert len(str(caught.value)) < 600


def test_files_of_rows_that_are_left_out_do_not_count(pets, imports, tmp_path):
    paths = [str(path) for path in sorted(pets.rglob("*.png"))]
    data = named_rows(tmp_path, paths, pa.string()).model_copy(
        update={"where": {"number": [0, 1, 2]}}
    )
    first = splits_of_images(data, imports)
    Path(paths[4]).write_bytes(b"another")
    again = splits_of_images(data, imports)
    assert again.fingerprint == first.fingerprint and len(first.reads) == 4


def test_a_table_that_changes_after_the_manifest_was_built_is_not_read(files, imports):
    built = m.build(str(files), "auto", imports)
    reader = m.Reader(built, ["number"])
    reader.take(np.array([0]))
    os.utime(files / "b.parquet")  # touched, and still the same
    assert numbers(m.Selection(built)) == list(range(63))
    write(files / "b.parquet", people(200, 213))
    for read in (
        lambda: numbers(m.Selection(built)),
        lambda: m.Reader(built, ["number"]).take(np.array([25])),
        lambda: pickle.loads(pickle.dumps(reader.manifest)).open(1),
    ):
        with pytest.raises(file_identity.ChangedFileError, match=r"b\.parquet was changed"):
            read()


def test_a_file_that_changes_while_it_is_brought_in_is_refused(tmp_path, imports, monkeypatch):
    path, read = tmp_path / "a.csv", made.csv_tables_of
    path.write_text("text,label\nx,1\n")

    def read_late(*words, **options):
        path.write_text("text,label\ny,1\n")
        return read(*words, **options)

    monkeypatch.setattr(made, "csv_tables_of", read_late)
    with pytest.raises(file_identity.ChangedFileError, match=r"a\.csv was changed"):
        m.build(str(path), "auto", imports)
    assert not os.path.exists(imports) or not os.listdir(imports)


@pytest.mark.slow
def test_a_csv_of_the_same_size_with_other_labels_is_other_data(tmp_path, imports):
    """Beyond 64 MiB only the first and last 8 MiB counted once."""
    path = tmp_path / "a.csv"
    with open(path, "wb") as file:
        file.write(b"text,label\n")
        for _ in range(67):
            file.write(b"a text of thirty-one letters   ,1\n" * 30000)
    assert path.stat().st_size > file_identity.PIECE_BYTES
    first = file_identity.fingerprint(path)
    with open(path, "r+b") as file:
        file.seek(11 + 34 * 1_000_000 + 32)
        assert file.read(1) == b"1"
        file.seek(-1, os.SEEK_CUR)
        file.write(b"0")
    assert file_identity.fingerprint(path) != first


def test_names_and_labels_of_images_are_part_of_their_fingerprint(pets, imports):
    prints = [m.build(str(pets), "auto", imports).fingerprint]
    (pets / "cat" / "0.png").rename(pets / "cat" / "00.png")
    prints.append(m.build(str(pets), "auto", imports).fingerprint)
    (pets / "cat" / "00.png").rename(pets / "dog" / "00.png")
    prints.append(m.build(str(pets), "auto", imports).fingerprint)
    prints.append(m.build(str(pets / "dog"), "auto", imports).fingerprint)
    (pets / "dog").rename(pets / "wolf")  # the same names below the folder, other labels
    prints.append(m.build(str(pets / "wolf"), "auto", imports).fingerprint)
    assert len(set(prints)) == 5


def test_relative_images_are_kept_absolute(pets, imports, monkeypatch):
    monkeypatch.chdir(pets)
    for uri in ("cat", "cat/*.png", "cat/1.png"):
        got = rows_of(uri, imports)
        assert all(
            Path(path).is_absolute() and Path(path).is_file() for path in got["image"]
        ) and set(got["label"]) == {"cat"}
    monkeypatch.chdir(pets / "dog")
    assert rows_of("1.png", imports) == {"image": [str(pets / "dog" / "1.png")], "label": ["dog"]}


def test_images_on_s3_are_known_by_their_etags(pets, imports, s3_server):
    def upload(prefix: str) -> str:
        for file in sorted(pets.rglob("*.png")):
            storage.write_bytes(f"{s3_server}/{prefix}/{file.relative_to(pets)}", file.read_bytes())
        return f"{s3_server}/{prefix}"

    here, there = upload("pets-here/pets"), upload("pets-there/animals")
    for named in ("{0}", "{0}/*/*.png", "{0}/cat/1.png {0}/dog"):
        first, second = (
            m.build(named.format(root).split(), "auto", imports) for root in (here, there)
        )
        assert first.fingerprint == second.fingerprint and first.files != second.files
    first = m.build(here, "auto", imports)
    assert m.read_columns(m.Selection(first), ["image", "label"]).slice(1, 1).to_pylist() == [
        {"image": f"{here}/cat/1.png", "label": "cat"}
    ]
    storage.write_bytes(f"{here}/cat/1.png", PNG + b"x")
    assert m.build(here, "auto", imports).fingerprint != first.fingerprint
    assert m.build(f"{here}/*/*.png", "auto", imports).fingerprint != first.fingerprint


def test_an_empty_image_is_one_bad_row_not_a_mistake(tmp_path, imports):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "pets" / "cat" / "1.png").write_bytes(PNG)
    assert len(rows_of(tmp_path / "pets", imports)["image"]) == 2


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv(tmp_path, imports, name, comma):
    frame = pd.DataFrame(
        {
            "text": ["plain", "with, comma", "with\ttab", 'with "quotes"', "two\nlines", "ünï"],
            "label": range(6),
        }
    )
    frame.to_csv(tmp_path / name, sep=comma, index=False)
    assert rows_of(tmp_path / name, imports) == {
        "text": frame.text.tolist(),
        "label": frame.label.tolist(),
    }


# Files larger than one chunk: chunks of a few hundred bytes stand for those of 16 MiB.


@pytest.fixture
def small_chunks(monkeypatch):
    from pipeline.data import csv_tables
    from pipeline.data import to_parquet as imports

    monkeypatch.setattr(imports, "CHUNK_BYTES", 300)
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 300)
    return imports


def lines_of(path: Path, rows: list) -> Path:
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return path


def test_json_lines_and_csv_are_held_a_chunk_at_a_time(tmp_path, small_chunks):
    rows = [{"text": f"ein Wörtchen {i}", "label": i % 2} for i in range(2000)]
    lines_of(tmp_path / "a.jsonl", rows)
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    csv_files = small_chunks.csv_tables_of([str(tmp_path / "a.csv")])
    json_files = small_chunks.json_tables_of([str(tmp_path / "a.jsonl")])
    for files in (json_files, csv_files):
        tables = [table for _, of_file in files for table in of_file]
        assert max(len(table) for table in tables) < 30 and len(tables) > 60
        assert pa.concat_tables(tables).to_pylist() == rows


def test_columns_of_json_lines_are_those_of_the_whole_file(tmp_path, imports, small_chunks):
    """As one chunk would have them: nulls and missing fields become typed, whole numbers fractions,
    dates strings.
    """
    rows: list[dict] = [
        {
            "id": i,
            "none": None,
            "mixed": i,
            "when": "2020-01-01",
            "list": [],
            "deep": {"a": None, "b": [i]},
        }
        for i in range(100)
    ]
    rows += [
        {
            "id": 100,
            "none": "x",
            "mixed": 1.5,
            "when": "later",
            "list": [{"y": 1}],
            "deep": {"a": {"c": True}, "d": "new"},
            "late": 7,
        }
    ]
    rows += [{"id": i} for i in range(101, 160)]
    got = rows_of(lines_of(tmp_path / "a.jsonl", rows), imports)
    for name in ("id", "none", "when", "mixed", "late"):
        assert got[name] == [row.get(name) for row in rows], name
    assert got["list"] == [row.get("list") for row in rows]
    deep = (
        [{"a": None, "b": [i], "d": None} for i in range(100)]
        + [{"a": {"c": True}, "b": None, "d": "new"}]
        + [None] * 59
    )
    assert got["deep"] == deep
    assert list(got) == ["id", "none", "mixed", "when", "list", "deep", "late"]
    whole = tmp_path / "whole.jsonl"
    small_chunks.CHUNK_BYTES = 1 << 24
    assert rows_of(lines_of(whole, rows), imports) == got


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"a": "x"}, "column 'a' is int64 in some lines and string in others (lines from "),
        ({"a": 1, "b": {"c": [True]}}, "column 'b.c' is int64 in some lines and bool in others"),
        (
            {"a": 1, "b": 3},
            "column 'b' is struct<c: list<item: int64>> in some lines and int64 in others",
        ),
    ],
)
def test_a_column_that_changes_its_type_is_named(tmp_path, imports, small_chunks, last, message):
    lines_of(tmp_path / "a.jsonl", [{"a": i, "b": {"c": [i]}} for i in range(100)] + [last])
    with pytest.raises(ValueError) as caught:
        m.build(str(tmp_path / "a.jsonl"), "auto", imports)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl: ") and message in str(
        caught.value
    ).replace("list<element:", "list<item:")


def test_a_broken_line_late_in_a_file_is_placed(tmp_path, imports, small_chunks):
    path = lines_of(tmp_path / "a.jsonl", [{"a": i} for i in range(200)])
    path.write_text(path.read_text() + '\n{"a": \n')
    with pytest.raises(
        ValueError,
        match=r"a\.jsonl: not readable as jsonl, one object a line: JSON parse error: .* "
        r"\(counted from line 1\d\d\)",
    ):
        m.build(str(path), "auto", imports)


@pytest.mark.slow
def test_long_rows(tmp_path, imports):
    """Longer than any chunk: a line of 40 MB among short ones, in both formats; blank lines are no
    rows.
    """
    rows = [
        {"text": "short", "label": 0},
        {"text": "long " * 8_000_000, "label": 1},
        {"text": "short again", "label": 2},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n" + "\n\n".join(json.dumps(row) for row in rows))
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.jsonl", "a.csv"):
        got = rows_of(tmp_path / name, imports)
        assert got["label"] == [0, 1, 2] and [len(text) for text in got["text"]] == [
            len(row["text"]) for row in rows
        ]


def test_a_line_beyond_the_largest_is_named(tmp_path, imports, small_chunks, monkeypatch):
    monkeypatch.setattr(small_chunks, "LINE_BYTES", 1000)
    monkeypatch.setattr("pipeline.data.csv_tables.ROW_BYTES", 1000)
    lines_of(tmp_path / "a.jsonl", [{"a": "x"}] * 3 + [{"a": "x" * 5000}])
    with pytest.raises(ValueError, match=r"a\.jsonl:4: the line is longer than"):
        m.build(str(tmp_path / "a.jsonl"), "auto", imports)
    (tmp_path / "a.csv").write_text('a,b\n1,"x' + "y\n" * 5000)
    with pytest.raises(
        ValueError,
        match=r"a\.csv: not readable as csv: a row is longer than .*; is a quote left open\?",
    ):
        m.build(str(tmp_path / "a.csv"), "auto", imports)


@pytest.mark.parametrize(
    ("late", "kind", "value"),
    [
        ("1.5", pa.float64(), 1.5),
        ("eleven", pa.string(), "eleven"),
        ("b\xe4d", pa.binary(), b"b\xe4d"),
        ("", pa.int64(), None),
        ("9223372036854775807", pa.int64(), 2**63 - 1),
        # ids, of which a number would lose digits
        ("007", pa.string(), "007"),
        ("-00.5", pa.string(), "-00.5"),
        (" 12345678901234567890", pa.string(), "12345678901234567890"),
    ],
)
def test_types_of_csv_columns_are_those_of_the_whole_file(
    tmp_path, imports, small_chunks, late, kind, value
):
    content = (
        "number,text,empty\n" + "".join(f"{i},line {i},\n" for i in range(200)) + f"{late},last,3\n"
    )
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    built = m.build(str(tmp_path / "a.csv"), "auto", imports)
    got = m.read_columns(m.Selection(built), ["number", "text", "empty"])
    assert got.schema.types == [kind, pa.string(), pa.int64()]
    assert got["number"].to_pylist() == [
        *pa.array(list(map(str, range(200)))).cast(kind).to_pylist(),
        value,
    ]
    assert got["empty"].to_pylist() == [None] * 200 + [3] and got["text"][-1].as_py() == "last"


def test_a_column_with_codes_in_one_csv_file_is_text_in_all(tmp_path, imports):
    (tmp_path / "a.csv").write_text("patient,hours\n7,01.5\n,0.5\n")
    (tmp_path / "b.csv").write_text("patient,hours\n007,1\nNA,2\n")
    assert rows_of(tmp_path, imports) == {
        "patient": ["7", None, "007", None],
        "hours": ["01.5", "0.5", "1", "2"],
    }


def test_ids_beyond_2_to_the_53_keep_their_digits_beside_fractions(tmp_path, imports):
    (tmp_path / "a.csv").write_text("id,x\n9007199254740993,1\n0.5,2\n")
    assert rows_of(tmp_path / "a.csv", imports)["id"] == ["9007199254740993", "0.5"]
    (tmp_path / "a.csv").write_text("id,x\n90071992547409931,1\n7,2\n")
    (tmp_path / "b.csv").write_text("id,x\n7.0,1\n,0.5\n")
    assert rows_of(tmp_path / "*.csv", imports) == {
        "id": ["90071992547409931", "7", "7.0", None],
        "x": [1.0, 2.0, 1.0, 0.5],
    }


def test_dates_of_csv_and_json_lines_stay_as_they_are_written(tmp_path, imports):
    values = ["2020-01-01", "2020-01-02T03:04:05", None]
    for name in ("a.csv", "b.csv"):
        text = "\n".join(f"{value or 'NA'},{i}:30" for i, value in enumerate(values, 10))
        (tmp_path / name).write_text(f"day,at\n{text}\n")
    (tmp_path / "b.csv").write_text("day,at\nunknown,late\n")
    assert rows_of(tmp_path / "*.csv", imports) == {
        "day": [*values, "unknown"],
        "at": ["10:30", "11:30", "12:30", "late"],
    }
    rows = [{"day": value, "days": [value], "of": {"day": value}} for value in values]
    assert rows_of(lines_of(tmp_path / "a.jsonl", rows), imports) == {
        name: [row[name] for row in rows] for name in rows[0]
    }


def test_csv_files_of_one_table_may_lack_values_and_differ_in_the_order_of_columns(
    tmp_path, imports
):
    (tmp_path / "a.csv").write_text("hours,label,text\n1,,x\n2,,y\n")
    (tmp_path / "b.csv").write_text("text,hours,label\nz,0.5,cat\n,,\n")
    assert rows_of(tmp_path, imports) == {
        "hours": [1.0, 2.0, 0.5, None],
        "label": [None, None, "cat", None],
        "text": ["x", "y", "z", None],
    }


def test_json_lines_of_one_table_may_lack_values_in_some_files(tmp_path, imports):
    lines_of(tmp_path / "a.jsonl", [{"hours": 1, "label": None, "deep": {}}, {"hours": 2}])
    lines_of(tmp_path / "b.jsonl", [{"label": "cat", "hours": 0.5, "deep": {"a": [1]}}])
    assert rows_of(tmp_path / "*.jsonl", imports) == {
        "hours": [1.0, 2.0, 0.5],
        "label": [None, None, "cat"],
        "deep": [{"a": None}, None, {"a": [1]}],
    }
    lines_of(tmp_path / "c.jsonl", [{"hours": 1, "lable": "dog", "deep": None}])
    with pytest.raises(
        ValueError,
        match=r"c\.jsonl: its columns \(.*lable: string.* differ from those of \S+a\.jsonl",
    ):
        rows_of(tmp_path / "*.jsonl", imports)
    lines_of(tmp_path / "c.jsonl", [{"hours": "many", "label": None, "deep": None}])
    with pytest.raises(
        ValueError, match=r"c\.jsonl: column 'hours' is double in some lines and string in others"
    ):
        rows_of(tmp_path / "*.jsonl", imports)


def test_large_whole_numbers_of_json_lines_keep_their_digits(tmp_path, imports):
    ids = [7, 2**63, 2**63 + 1, 2**64 - 1, None]
    rows = [{"id": i, "x": 1e30, "y": 2**63, "deep": [{"id": i, "x": 1e30}]} for i in ids]
    lines_of(tmp_path / "a.jsonl", rows)
    lines_of(tmp_path / "b.jsonl", [{"id": 8, "x": 2, "y": 0.5, "deep": None}])
    got = rows_of(tmp_path / "*.jsonl", imports)
    assert got["deep"] == [*(row["deep"] for row in rows), None]
    assert got["id"] == [*ids, 8] and got["x"] == [1e30] * 5 + [2.0]
    assert got["y"] == [float(2**63)] * 5 + [0.5]
    lines_of(tmp_path / "c.jsonl", [{"id": -1, "x": 2, "y": 1, "deep": []}])
    message = r"c\.jsonl: not readable as jsonl.*couldn't parse:-1; its whole numbers fit neither"
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / "*.jsonl", imports)


@pytest.mark.parametrize("ids", [[-1, 2**63 + 1], [1, 2**64], [-(2**63) - 1, None]])
def test_whole_numbers_that_no_type_holds_are_refused(tmp_path, imports, ids):
    """As floating-point numbers, two ids may become one."""
    for lines in ([{"id": one} for one in ids], [{"id": [{"of": ids}]}]):
        path = lines_of(tmp_path / "a.jsonl", lines)
        message = r"^\S+a\.jsonl: column 'id': its whole numbers fit neither"
        with pytest.raises(ValueError, match=message):
            rows_of(path, imports)


def test_objects_in_json_lines_have_the_same_fields_in_all_files(tmp_path, imports):
    """As in Parquet files: a renamed field would be null in all rows of a file."""
    lines_of(tmp_path / "a.jsonl", [{"x": [{"who": {"age": 1}}]}, {"x": [{"who": {"sex": 2}}]}])
    lines_of(tmp_path / "b.jsonl", [{"x": []}, {"x": [{"who": {"age": 3, "sex": None}}]}])
    assert len(rows_of(tmp_path / "*.jsonl", imports)["x"]) == 4
    lines_of(tmp_path / "c.jsonl", [{"x": [{"who": {"age": 3, "gender": 1}}]}])
    message = (
        r"c\.jsonl: the objects in column 'x\.who' have the fields age, gender, and in .*age, sex"
    )
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / "*.jsonl", imports)


def test_a_value_that_does_not_fit_the_common_type_is_placed(tmp_path, imports):
    for name, values in (("a", [0.5]), ("b", [2**53 + 1])):
        pq.write_table(pa.table({"dose": values}), tmp_path / f"{name}.parquet")
    built = m.build(str(tmp_path / "*.parquet"), "auto", imports)
    message = r"b\.parquet: column 'dose' does not fit double, .* \(Integer value 9007199254740993"
    for read in (
        lambda: m.read_columns(m.Selection(built), ["dose"]),
        lambda: m.Reader(built, ["dose"]).take(np.array([1])),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_codes_of_the_training_rows_make_a_column_of_a_test_file_texts_too(tmp_path, split):
    (tmp_path / "train.csv").write_text("text,label\n" + "a,07\nb,10\n" * 20)
    (tmp_path / "test.csv").write_text("text,label\nc,10\n")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    found = split(True, columns={"text": "text", "label": "label"}, **files)
    assert m.read_columns(found.test, ["label"])["label"].to_pylist() == ["10"]


def test_an_empty_csv_field_is_missing_but_in_columns_of_texts(tmp_path, split):
    """It is no class and no group; asked for by name, it is the empty text."""
    rows = ",cat,\nb,dog,\n" * 20 + "c,,\n"
    (tmp_path / "a.csv").write_text(f"text,label,patient\n{rows}")
    fields = {
        "uri": str(tmp_path / "a.csv"),
        "columns": {"text": "text", "label": "label"},
        "group": "patient",
        "test_fraction": 0.5,
    }
    found = split(True, ("text", "label"), needed=("label",), **fields)
    assert len(found.left_out) == 1 and len(found.train) + len(found.validation) < 40
    table = m.read_columns(m.Selection(found.train.manifest), ["text", "label", "patient"])
    assert table["text"].to_pylist() == ["", "b"] * 20 + ["c"]
    assert table["label"].to_pylist() == ["cat", "dog"] * 20 + [None]
    assert table["patient"].null_count == 41
    found = split(where={"label": [""]}, validation_fraction=0.0, **fields | {"test_fraction": 0.0})
    assert len(found.train) == 1


def test_a_csv_row_with_too_many_fields_late_in_a_file_is_named(tmp_path, imports, small_chunks):
    (tmp_path / "a.csv").write_text("a,b\n" + "1,2\n" * 300 + "1,2,3\n")
    with pytest.raises(
        ValueError,
        match=r"a\.csv: not readable as csv: CSV parse error: Row #302: Expected 2 columns, got 3",
    ):
        m.build(str(tmp_path / "a.csv"), "auto", imports)


def test_tables_without_rows(tmp_path, imports):
    (tmp_path / "a.csv").write_text("text,label\n")
    assert rows_of(tmp_path / "a.csv", imports) == {"text": [], "label": []}
    (tmp_path / "a.jsonl").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"a\.jsonl: no line holds an object"):
        m.build(str(tmp_path / "a.jsonl"), "auto", imports)


def test_many_lines_in_bounded_groups(tmp_path, imports):
    lines = [f"line {i}" for i in range(70_000)]  # more than one table of 65,536
    (tmp_path / "a.txt").write_text("\n".join(lines))
    built = m.build(str(tmp_path / "a.txt"), "auto", imports)
    assert max(g.num_rows for g in built.row_groups) == 1024
    assert m.read_columns(m.Selection(built), ["text"])["text"].to_pylist() == [
        line.encode() for line in lines
    ]


def test_a_format_may_be_named(tmp_path, imports):
    (tmp_path / "corpus.dat").write_text("one\ntwo\n")
    assert rows_of(tmp_path / "corpus.dat", imports, "text") == {"text": [b"one", b"two"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.txt", b""),
        ("a.jsonl", b""),
    ],
)
def test_broken_tables_are_named(tmp_path, imports, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        m.build(str(tmp_path / name), "auto", imports)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_tables_whose_columns_differ_are_refused_by_column(tmp_path, imports):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.csv").write_text("text,label\nx,1\n")
    (tmp_path / "t" / "b.csv").write_text("text,label\nx,one\n")
    with pytest.raises(ValueError) as caught:
        m.build(str(tmp_path / "t"), "auto", imports)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/t/b.csv: ") and "a.csv" in message
    assert "int64" in message and "string" in message, (
        "the names are the same, so the types must be told"
    )


def test_an_import_is_made_once_and_again_when_the_content_changes(tmp_path, imports):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    first = m.build(str(path), "auto", imports)
    written = os.stat(first.files[0]).st_mtime_ns
    second = m.build(str(path), "auto", imports)
    assert second.files == first.files and os.stat(first.files[0]).st_mtime_ns == written
    assert second.fingerprint == first.fingerprint
    path.write_text("one\nTWO\n")
    third = m.build(str(path), "auto", imports)
    assert third.files != first.files and third.fingerprint != first.fingerprint
    assert m.read_columns(m.Selection(third), ["text"])["text"].to_pylist() == [b"one", b"TWO"]


# ---------------------------------------------------------------- S3 and real data


def test_everything_on_s3(files, s3_server, split, imports):
    from pipeline.io import storage

    place = f"{s3_server}/test_manifest"
    for file in files.iterdir():
        storage.write_bytes(f"{place}/rows/{file.name}", file.read_bytes())
    storage.write_bytes(f"{place}/words.txt", b"one\ntwo\n")
    for uri in (
        f"{place}/rows",
        f"{place}/rows/*.parquet",
        [f"{place}/rows/{name}.parquet" for name in "bca"],
    ):
        built = m.build(uri, "auto", f"{place}/imports")
        assert built.num_rows == 63 and built.files[0] == f"{place}/rows/a.parquet"
    reader = m.Reader(built, ["number"])
    assert reader.take(np.array([62, 0, 33, 20])).to_pydict() == {"number": [62, 0, 33, 20]}
    here, there = (
        split(uri=str(files), test_fraction=0.3),
        split(uri=f"{place}/rows", test_fraction=0.3),
    )
    assert numbers(here.test) == numbers(there.test)
    assert rows_of(f"{place}/words.txt", f"{place}/imports") == {"text": [b"one", b"two"]}
    with pytest.raises((ValueError, OSError), match="nowhere"):
        m.build(f"{place}/nowhere/*.parquet", "auto", imports)


@pytest.mark.data
@pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="ONETOMANY_DATA names no data folder"
)
def test_fashion_mnist(split, imports):
    folder = Path(os.environ["ONETOMANY_DATA"], "vision", "fashion_mnist")
    got = split(
        train=str(folder / "train.parquet"),
        test=str(folder / "test.parquet"),
        columns={"image": "image", "label": "label"},
        roles=("image", "label"),
        need_test=True,
        where={"label_name": ["Sandal", "Bag"]},
    )
    frame = pd.read_parquet(folder / "train.parquet")
    wanted = frame[frame.label_name.isin(["Sandal", "Bag"])]
    assert len(got.train) + len(got.validation) == len(wanted) == 2400 and len(got.test) == 400
    rows = np.random.default_rng(0).permutation(got.train.ids(np.arange(len(got.train))))[:50]
    table = m.Reader(got.train.manifest, ["image", "label", "orig_index"]).take(rows)
    assert table["image"].to_pylist() == frame.image.iloc[rows].tolist()
    assert table["orig_index"].to_pylist() == frame.orig_index.iloc[rows].tolist()


def test_rows_whose_group_is_nan_have_no_group():
    """As one group, all of them would be in one split."""
    values = pa.chunked_array([pa.array([float("nan")] * 40 + [7.0] * 2)])
    shares = m._share(values, np.arange(42), "test")
    assert len(np.unique(shares)) == 41 and shares[40] == shares[41]
    assert len(np.unique(m.group_numbers(values))) == 41


def test_rows_whose_label_is_nan_are_of_no_class(tmp_path, split):
    """Two of them in five folds would be a class with too few rows. They may be left out."""
    labels = pa.array([float("nan")] * 2 + [0.0, 1.0] * 20)
    pq.write_table(pa.table({"label": labels}), tmp_path / "a.parquet")
    fields = {"uri": str(tmp_path / "a.parquet"), "columns": {"label": "label"}}
    found = split(roles=("label",), need_test=True, fold=m.Fold(1, 5), **fields)
    assert len(found.test) >= 8
    found = split(roles=("label",), needed=("label",), max_bad_rows=0.2, **fields)
    assert [row.reason for row in found.left_out] == [
        "it has no label (column label is null or NaN)"
    ] * 2
    assert len(found.train) + len(found.validation) == 40
