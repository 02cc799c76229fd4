"""Small files that would take gigabytes: each is refused in one line, within a bound on memory."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import run_python

from pipeline.data import csv_tables, manifests, to_parquet
from pipeline.prepare.readers import archives

MEBIBYTE = 1 << 20

READ = """
import resource, sys
import numpy as np
from pipeline.data import to_parquet as imports; from pipeline.data import manifests
from pipeline.data.manifests import Reader, Selection
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = manifests.build([sys.argv[1]], "auto", sys.argv[2])
    if sys.argv[3] == "columns":
        manifests.read_columns(Selection(found), [found.schema.names[0]])
    else:
        Reader(found, [found.schema.names[0]]).take(np.arange(4))
    said = "read"
except ValueError as error:
    said = str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
print(said)
"""


def tried(path, folder, how: str = "rows") -> tuple[int, str]:
    """(MiB that reading took at its peak, what it said)."""
    done = run_python(READ, str(path), str(folder / "imports"), how)
    grew, said = done.stdout.strip().split("\n", 1)
    return int(grew), said


def dictionary_bomb(path, rows: int = 100_000, letters: int = 30_000) -> None:
    """One long text in every row: Parquet stores it once."""
    column = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(rows, dtype=np.int32)), pa.array(["x" * letters], pa.large_string())
    )
    pq.write_table(
        pa.table({"text": column.cast(pa.dictionary(pa.int32(), pa.string()))}),
        path,
        store_schema=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "columns"])
def test_one_value_stored_once_for_many_rows_is_refused(how, tmp_path):
    """50 KB of Parquet took 2.7 GiB."""
    dictionary_bomb(tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    grew, said = tried(tmp_path / "bomb.parquet", tmp_path, how)
    assert "bomb.parquet: row group 0 would take 2.8 GiB in memory" in said and "\n" not in said
    assert grew < 400


@pytest.mark.slow
def test_texts_that_repeat_as_real_ones_do_are_read(tmp_path):
    names = [f"class {i}" for i in range(50)]
    pq.write_table(pa.table({"text": names * 20_000}), tmp_path / "labels.parquet")
    for how in ("rows", "columns"):
        assert tried(tmp_path / "labels.parquet", tmp_path, how)[1] == "read"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "opening", "said"),
    [
        ("field.csv", b'text\n"', "a row is longer than 64 MiB"),
        ("field.jsonl", b'{"text": "', "the line is longer than 64 MiB"),
        ("field.txt", b"", "the line is longer than 64 MiB"),
    ],
)
def test_one_field_of_hundreds_of_megabytes_is_refused(name, opening, said, tmp_path):
    """One of 300 MB took 3 GiB."""
    with open(tmp_path / name, "wb") as file:
        file.write(opening)
        for _ in range(200):
            file.write(b"a" * MEBIBYTE)
    grew, message = tried(tmp_path / name, tmp_path)
    assert said in message and "\n" not in message
    assert grew < 1200


def test_a_member_of_a_zip_that_unpacks_to_too_much_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.jpg", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(MEBIBYTE))
    assert (tmp_path / "bomb.zip").stat().st_size < MEBIBYTE
    code = (
        "import resource, sys\nfrom pipeline.prepare.readers import archives as files\nbefore = "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    files.Reader()(sys.argv[1], 'bomb.jpg', -1, 1000)\nexcept ValueError as "
        "error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    said, grew = run_python(code, str(tmp_path / "bomb.zip")).stdout.strip().split("\n")
    assert said == "it unpacks to more than an image has" and int(grew) < 700


def test_limits_are_what_the_errors_say():
    assert (
        to_parquet.LINE_BYTES == csv_tables.ROW_BYTES == 64 * MEBIBYTE
        and archives.MAX_FILE_BYTES == 256 * MEBIBYTE
    )
    assert manifests.MAX_UNPACKED_BYTES <= 512 * MEBIBYTE
