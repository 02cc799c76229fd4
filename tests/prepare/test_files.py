"""The importer of tables that name images or recordings: where the files are looked for, which
columns are kept, and rows that cannot be used.
"""

import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare.conftest import encoded, prepare, prepare_and_read, read, reasons, write
from prepare.speech import sound


def test_images_that_a_csv_names_by_paths_below_it(tmp_path):
    for i in range(4):
        write(tmp_path / f"set/jpg/{i}.jpg", encoded(i))
    lines = ["file,width,kind,part"]
    lines += [f"jpg/{i}.jpg,{i},k{i % 2},{('training', 'Test')[i % 2]}" for i in range(4)]
    lines += ["jpg/none.jpg,7,k0,test", ",8,k1,test", "jpg/0.jpg,9,k0,other"]
    source = write(tmp_path / "set/list.csv", "\n".join(lines) + "\n")
    rows, found = prepare_and_read(
        "files", source, tmp_path / "out", "label=kind", "split_column=part", max_bad=0.5
    )
    assert {row["path"]: (row["table_width"], row["kind"], row["split"]) for row in rows} == {
        "jpg/0.jpg": (0, "k0", "train"),
        "jpg/1.jpg": (1, "k1", "test"),
        "jpg/2.jpg": (2, "k0", "train"),
        "jpg/3.jpg": (3, "k1", "test"),
    }
    by_path = {row["path"]: row for row in rows}
    assert by_path["jpg/2.jpg"]["image"] == encoded(2)
    assert (by_path["jpg/2.jpg"]["width"], by_path["jpg/2.jpg"]["height"]) == (40, 30)
    assert reasons(found) == {
        "list.csv: row 5": f"no file {tmp_path}/set/jpg/none.jpg",
        "list.csv: row 6": "no name in column file",
        "list.csv: row 7": "its split is not one of train, validation and test",
    }
    assert found["classes"]["train"]["labels"] == {"k0": 2}


def test_names_as_windows_and_macos_write_them(tmp_path):
    paths = ["jpg/0.jpg", "jpg/é.jpg", unicodedata.normalize("NFD", "jpg/ä.jpg")]
    for number, path in enumerate(paths):
        write(tmp_path / "set" / path, encoded(number))
    named = [r" jpg\0.jpg", unicodedata.normalize("NFD", "jpg/é.jpg"), "jpg/ä.jpg"]
    source = write(tmp_path / "set/list.csv", "\n".join(["file", *named]) + "\n")
    rows, _ = prepare_and_read("files", source, tmp_path / "out")
    images = {row["image"] for row in rows}
    assert images == {encoded(number) for number in range(3)}


@pytest.mark.parametrize("ids", [["0a1c", "7d"], [1, 2]])
def test_ids_without_a_suffix_name_files(tmp_path, ids):
    for number, one in enumerate(ids):
        write(tmp_path / f"images/{one}.png", encoded(number, form="PNG"))
    source = tmp_path / "train.parquet"
    pq.write_table(pa.table({"id_code": [*ids, None], "grade": [0, 4, 2]}), source)
    with pytest.raises(ValueError, match=r"no column does.*also --set suffix=\.png"):
        prepare("files", source, tmp_path / "none")
    pairs = ("column=id_code", "suffix=.png", f"root={tmp_path}/images")
    rows, found = prepare_and_read("files", source, tmp_path / "out", *pairs, max_bad=0.5)
    assert {row["path"]: (row["image"], row["grade"]) for row in rows} == {
        f"{one}.png": (encoded(number, form="PNG"), 4 * number) for number, one in enumerate(ids)
    }
    assert reasons(found) == {"train.parquet: row 3": "no name in column id_code"}


def test_files_that_rows_of_several_splits_name_are_counted(tmp_path):
    write(tmp_path / "a.png", encoded(0, form="PNG"))
    write(tmp_path / "b.png", encoded(1, form="PNG"))
    lines = ["file,part", "a.png,train", "./a.png,train", "b.png,train", "b.png,test"]
    source = write(tmp_path / "list.csv", "\n".join(lines) + "\n")
    _, found = prepare_and_read("files", source, tmp_path / "out", "split_column=part")
    assert found["notes"]["files that rows of several splits name"] == 1


def test_recordings_that_json_lines_name_below_another_folder(tmp_path):
    write(tmp_path / "wav/a.wav", sound(1, 1.0, form="WAV"))
    write(tmp_path / "wav/b.wav", sound(2, 2.5, form="WAV"))
    (tmp_path / "wav/folder.wav").mkdir()
    rows = [{"sound": "a.wav", "word": "on"}, {"sound": f"{tmp_path}/wav/b.wav", "word": "off"}]
    rows += [{"sound": "\0.wav", "word": "NUL"}, {"sound": "folder.wav", "word": "a folder"}]
    source = write(tmp_path / "lists/rows.jsonl", "\n".join(map(json.dumps, rows)))
    read_rows, found = prepare_and_read(
        "files", source, tmp_path / "out", f"root={tmp_path}/wav", "longest=2", max_bad=0.5
    )
    made = sorted((row["word"], row["recording_start"], row["seconds"]) for row in read_rows)
    assert reasons(found).keys() == {"rows.jsonl: row 3", "rows.jsonl: row 4"}
    assert made[-1] == ("on", 0.0, 1.0) and [row[0] for row in made] == ["off", "off", "on"]
    assert sum(row[2] for row in made[:2]) == pytest.approx(2.5)


def test_the_column_of_files_must_be_told_apart(tmp_path):
    write(tmp_path / "a.png", encoded(0, form="PNG"))
    table = pa.table({"image": ["a.png"], "mask": ["a.png"], "kind": [1]})
    pq.write_table(table, tmp_path / "rows.parquet")
    source = tmp_path / "rows.parquet"
    with pytest.raises(ValueError, match=r"several columns name files \(image, mask\): pass --set"):
        prepare("files", source, tmp_path / "out")
    prepare("files", source, tmp_path / "out", "column=image")
    assert [row["mask"] for row in read(tmp_path / "out")] == ["a.png"]
    with pytest.raises(ValueError, match="no column 'imag' for --set column; did you mean image"):
        prepare("files", source, tmp_path / "other", "column=imag")
    with pytest.raises(ValueError, match="none of 1 rows of column image names a file that is the"):
        prepare("files", source, tmp_path / "other", "column=image", f"root={tmp_path}/none")


def test_columns_named_like_arguments_are_kept_and_cut_nothing(tmp_path):
    write(tmp_path / "a.wav", sound(1, 1.0, form="WAV"))
    write(tmp_path / "a.jpg", encoded(1))
    source = write(tmp_path / "rows.csv", "file,start,layout,entry,end\na.wav,250,one,7,900\n")
    (row,), _ = prepare_and_read("files", source, tmp_path / "out")
    assert [row[name] for name in ("start", "layout", "entry", "end")] == [250, "one", 7, 900]
    assert (row["recording_start"], row["seconds"]) == (0.0, 1.0)
    source = write(tmp_path / "images.csv", "file,entry\na.jpg,7\n")
    (row,), _ = prepare_and_read("files", source, tmp_path / "images")
    assert row["entry"] == 7
