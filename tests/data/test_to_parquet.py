"""Text, JSON Lines and CSV brought into Parquet: what a document is, compression, damage, rows that
are not UTF-8, limits.
"""

import bz2
import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.data import csv_tables
from pipeline.data import manifests as m
from pipeline.data import to_parquet as made
from pipeline.io import storage
from pipeline.modalities.text import Text, TextOptions


@pytest.fixture
def imports(tmp_path):
    return str(tmp_path / "imports")


def packed(data: bytes, suffix: str) -> bytes:
    """By other implementations than Arrow's where there is one in the library."""
    return gzip.compress(data) if suffix == "gz" else pa.compress(data, codec="zstd", asbytes=True)


def rows_of(uri, imports, form: str = "auto") -> dict:
    built = m.build(str(uri), form, imports)
    return m.read_columns(m.Selection(built), built.schema.names).to_pydict()


SUFFIXES = pytest.mark.parametrize("suffix", ["gz", "zst"])


# ---------------------------------------------------------------- what a document is

TEXT = b"\xef\xbb\xbfThe first line\r\nand the second.\r\n\r\n  \t\n\xc2\xa0\nAnother one\n\n\nlast \xff one\nwithout an end"


@pytest.mark.parametrize(
    ("form", "want"),
    [
        (
            "text",
            [
                b"The first line",
                b"and the second.",
                b"Another one",
                b"last \xff one",
                b"without an end",
            ],
        ),
        (
            "paragraphs",
            [
                b"The first line\r\nand the second.",
                b"Another one",
                b"last \xff one\nwithout an end",
            ],
        ),
        ("documents", [TEXT[3:]]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.text.zst", "a.TXT.GZ"])
def test_a_document_is_a_line_a_paragraph_or_a_file(tmp_path, imports, form, want, name):
    (tmp_path / name).write_bytes(
        packed(TEXT, name[-3:].lower().strip("."))
        if name[-1] in "Ztz" and name.count(".") == 2
        else TEXT
    )
    assert rows_of(tmp_path / name, imports, form) == {"text": want}


def test_a_folder_of_documents_has_one_row_a_file(tmp_path, imports):
    (tmp_path / "t" / "deep").mkdir(parents=True)
    for name, data in (
        ("b.txt", b"second\n\nfile"),
        ("a.txt.gz", gzip.compress(b"first")),
        ("deep/c.txt", b""),
        ("README.md", b"no text of it"),
    ):
        (tmp_path / "t" / name).write_bytes(data)
    # The modality tells of the empty one
    assert rows_of(tmp_path / "t", imports, "documents") == {
        "text": [b"first", b"second\n\nfile", b""],
        "label": ["t", "t", "deep"],
        "id": ["a.txt.gz", "b.txt", "deep/c.txt"],
    }
    with pytest.raises(ValueError, match=r"c\.txt: the file is empty"):
        m.build(str(tmp_path / "t"), "text", imports)


def test_the_same_file_in_another_format_is_another_import(tmp_path, imports):
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert (
        len(
            {
                m.build(str(tmp_path / "a.txt"), form, imports).fingerprint
                for form in ("text", "paragraphs", "documents")
            }
        )
        == 3
    )


# ---------------------------------------------------------------- compression


@SUFFIXES
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv"])
def test_compressed_files_hold_what_the_plain_ones_do(tmp_path, imports, kind, suffix, monkeypatch):
    monkeypatch.setattr(made, "CHUNK_BYTES", 300)
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 300)
    frame = pd.DataFrame({"text": [f"ein Wörtchen, {i}" for i in range(500)], "label": range(500)})
    data = {
        "txt": "\n".join(frame.text),
        "jsonl": frame.to_json(orient="records", lines=True, force_ascii=False),
        "csv": frame.to_csv(index=False),
        "tsv": frame.to_csv(index=False, sep="\t"),
    }[kind].encode()
    (tmp_path / f"plain.{kind}").write_bytes(data)
    (tmp_path / f"packed.{kind}.{suffix}").write_bytes(packed(data, suffix))
    got = rows_of(tmp_path / f"packed.{kind}.{suffix}", imports)
    assert got == rows_of(tmp_path / f"plain.{kind}", imports)
    assert [
        t.decode() if kind == "txt" else t for t in got["text"]
    ] == frame.text.tolist() and got.get("label", list(range(500))) == list(range(500))


@SUFFIXES
def test_a_file_of_several_members_is_read_to_its_end(tmp_path, imports, suffix):
    """As pigz, bgzip and pzstd write them, and as `cat a.gz b.gz` does."""
    (tmp_path / f"a.txt.{suffix}").write_bytes(
        b"".join(packed(f"line {i}\n".encode(), suffix) for i in range(50))
    )
    assert rows_of(tmp_path / f"a.txt.{suffix}", imports) == {
        "text": [f"line {i}".encode() for i in range(50)]
    }


@SUFFIXES
def test_folders_mix_plain_and_compressed_files_of_a_kind(tmp_path, imports, suffix):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_bytes(b"one\n")
    (tmp_path / "t" / f"b.txt.{suffix}").write_bytes(packed(b"two\n", suffix))
    (tmp_path / "t" / f"c.tar.{suffix}").write_bytes(b"no text")
    assert rows_of(tmp_path / "t", imports) == {"text": [b"one", b"two"]}
    (tmp_path / "t" / f"d.csv.{suffix}").write_bytes(packed(b"text\nthree\n", suffix))
    with pytest.raises(ValueError, match=r"files of several kinds \(csv, text\)"):
        m.build(str(tmp_path / "t"), "auto", imports)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *(
            (suffix, damage)
            for suffix in ("gz", "zst")
            for damage in ("cut off", "garbage behind", "no such thing")
        ),
        ("gz", "flipped"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, imports, suffix, kind, damage):
    rng = np.random.default_rng(0)
    lines = [{"text": bytes(rng.integers(97, 123, 60)).decode()} for _ in range(600)]
    data = {
        "txt": "\n".join(line["text"] for line in lines),
        "jsonl": "\n".join(map(json.dumps, lines)),
        "csv": pd.DataFrame(lines).to_csv(),
    }[kind].encode()
    whole = packed(data, suffix)
    bad = {
        "cut off": whole[:-9],
        "garbage behind": whole + b"garbage" * 9,
        "no such thing": data,
        "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    }
    path = tmp_path / f"a.{kind}.{suffix}"
    path.write_bytes(bad[damage])
    with pytest.raises(ValueError) as caught:
        m.build(str(path), "auto", imports)
    assert str(caught.value).startswith(
        f"{path}: not readable as {'gzip' if suffix == 'gz' else 'zstd'}: "
    ) and "fetch it again" in str(caught.value)
    assert not list((tmp_path / "imports").rglob("rows.parquet"))


def test_compression_of_another_kind_and_of_parquet_are_no_kind(tmp_path, imports):
    for name in ("a.txt.bz2", "a.parquet.gz", "a.png.gz"):
        (tmp_path / name).write_bytes(bz2.compress(b"one"))
        with pytest.raises(
            ValueError,
            match=r"no files of a known kind .*, and compressed \.gz, \.zst, \.zstd\); unpack it",
        ):
            m.build(str(tmp_path / name), "auto", imports)


@SUFFIXES
def test_compressed_files_on_s3(s3_server, suffix):
    place = f"{s3_server}/test-imports-{suffix}"
    storage.write_bytes(f"{place}/in/a.txt.{suffix}", packed(b"one\n\ntwo\n", suffix))
    storage.write_bytes(f"{place}/in/b.txt", b"three\n")
    assert rows_of(f"{place}/in", f"{place}/imports") == {"text": [b"one", b"two", b"three"]}
    storage.write_bytes(f"{place}/bad/a.txt.{suffix}", packed(b"one\n\ntwo\n", suffix)[:-5])
    with pytest.raises(ValueError, match=rf"bad/a\.txt\.{suffix}: not readable as"):
        m.build(f"{place}/bad", "auto", f"{place}/imports")


# ---------------------------------------------------------------- limits


@SUFFIXES
def test_a_bomb_and_rows_beyond_the_limit_are_reported(tmp_path, imports, suffix, monkeypatch):
    """A small file that unpacks to a row without end: reading stops at the limit."""
    monkeypatch.setattr(made, "LINE_BYTES", 1 << 20)
    read = []
    monkeypatch.setattr(
        made._Decompressed,
        "readinto",
        lambda self, buffer, inner=made._Decompressed.readinto: (
            read.append(n := inner(self, buffer)) or n
        ),
    )
    (tmp_path / f"a.txt.{suffix}").write_bytes(packed(b"fine\n" + b"a" * (64 << 20), suffix))
    for form, message in (
        ("text", ":2: the line is longer than 1 MiB"),
        ("documents", ": the document is larger than 1 MiB"),
    ):
        read.clear()
        with pytest.raises(ValueError) as caught:
            m.build(str(tmp_path / f"a.txt.{suffix}"), form, imports)
        assert (
            str(caught.value).startswith(f"{tmp_path}/a.txt.{suffix}{message}")
            and sum(read) < 4 << 20
        )
    (tmp_path / f"b.txt.{suffix}").write_bytes(packed(b"line\n" * (1 << 20), suffix))
    with pytest.raises(
        ValueError,
        match=r"b\.txt\.\w+:209716: the paragraph is longer than 1 MiB; blank lines separate "
        r"documents",
    ):
        m.build(str(tmp_path / f"b.txt.{suffix}"), "paragraphs", imports)


def test_a_row_of_just_the_limit_is_fine(tmp_path, imports, monkeypatch):
    monkeypatch.setattr(made, "LINE_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"123456789\n12\n")
    assert rows_of(tmp_path / "a.txt", imports) == {"text": [b"123456789", b"12"]}
    (tmp_path / "b.txt").write_bytes(b"1234567890")
    assert rows_of(tmp_path / "b.txt", imports, "documents") == {"text": [b"1234567890"]}


def test_large_documents_come_in_groups_of_bounded_size(tmp_path, imports, monkeypatch):
    monkeypatch.setattr(made, "GROUP_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"\n".join(b"x" * 300 for _ in range(40)))
    built = m.build(str(tmp_path / "a.txt"), "auto", imports)
    assert {group.num_rows for group in built.row_groups} == {4}


def test_a_folder_read_as_documents_has_no_tables_and_images_among_them(tmp_path, imports):
    folder = tmp_path / "t"
    folder.mkdir()
    for name, data in (
        ("a.txt", b"first\n\nsecond"),
        ("labels.csv", b"file,label\na.txt,1\n"),
        ("cover.jpg", b"\xff\xd8"),
        ("meta.json", b"{}"),
    ):
        (folder / name).write_bytes(data)
    assert rows_of(folder, imports, "documents") == {"text": [b"first\n\nsecond"]}
    assert rows_of(folder, imports, "paragraphs") == {"text": [b"first", b"second"]}
    assert rows_of(folder, imports, "csv") == {"file": ["a.txt"], "label": [1]}
    # A glob names what it means
    assert rows_of(folder / "*.csv", imports, "text") == {"text": [b"file,label", b"a.txt,1"]}
    with pytest.raises(ValueError, match="no file of format parquet in there"):
        m.build(str(folder), "parquet", imports)


# ---------------------------------------------------------------- names in messages


def test_rows_are_named_by_the_file_that_they_were_brought_in_from(tmp_path, imports):
    (tmp_path / "one.csv").write_text("text,label\na,b\nc,d\n")
    assert m.build(str(tmp_path / "one.csv"), "auto", imports).location(1) == (
        f"{tmp_path / 'one.csv'} row 1"
    )
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(name.encode())
    pictures = m.build(str(tmp_path / "pictures"), "auto", imports)
    assert pictures.location(2) == str(tmp_path / "pictures" / "dog" / "1.png")
    (tmp_path / "two").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "two" / name).write_text("one\ntwo\n")
    texts = m.build(str(tmp_path / "two"), "auto", imports)
    assert texts.location(3) == f"{tmp_path / 'two'} row 3"


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "text; more\nno mark here\n", ["text; more"]),
        ("a.csv", '"a;b"\n"c;d"\n', ["a;b"]),
        ("a.csv", "a;b,c\nd;e,f\n", ["a;b", "c"]),
        ("a.tsv", "a;b\tc\nd;e\tf\n", ["a;b", "c"]),
        ("a.csv", "a,b,b\nc,d,e\n", ["a", "b", "b"]),
    ],
)
def test_other_marks_in_a_table_part_no_fields(tmp_path, imports, name, content, columns):
    (tmp_path / name).write_text(content)
    assert m.build(str(tmp_path / name), "auto", imports).schema.names == columns


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "a;b\nc;d\n", "separated by semicolons, .* by commas; .* --set delimiter=';'"),
        ("a.csv", '"a, x";"b"\n"c";"d"\n', "separated by semicolons, .* by commas"),
        ("a.csv", "a|b\nc|d\n", "separated by vertical bars, .* --set delimiter='\\|'"),
        ("a.csv", "a\tb\nc\td\n", "separated by tabs, .* --set delimiter=tab"),
        ("a.tsv", "a,b\nc,d\n", "separated by commas, .* by tabs; .* --set delimiter=','"),
    ],
)
def test_another_delimiter_is_named_with_what_to_do(tmp_path, imports, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        m.build(str(tmp_path / name), "auto", imports)


# ---------------------------------------------------------------- rows that are not UTF-8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"fine\nbad \xff byte\nalso fine\n"),
        ("a.txt.gz", gzip.compress(b"fine\nbad \xff byte\nalso fine\n", mtime=0)),
        ("a.csv", b"text,label\nfine,1\nbad \xff byte,2\nalso fine,3\n"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "bad \xff byte"}\n{"text": "also fine"}\n'),
    ],
)
def test_a_row_that_is_not_utf8_spoils_itself_alone(tmp_path, imports, name, content):
    (tmp_path / name).write_bytes(content)
    table = m.Reader(m.build(str(tmp_path / name), "auto", imports), ["text"]).take(np.arange(3))
    text = Text(
        TextOptions(length=8),
        Text.fit(TextOptions(length=8, vocabulary=256), table, {"text": "text"}, "bert"),
    )
    for call in (text.decode, text.pack):
        assert call(table, {"text": "text"})[1] == [
            "",
            "not UTF-8 text (invalid start byte at byte 4)",
            "",
        ]
    arrays, _ = text.decode(table, {"text": "text"})
    assert arrays["lengths"].tolist()[::2] == [
        len(text.tokenizer.encode(t, add_special_tokens=False).ids) + 2
        for t in ("fine", "also fine")
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "one"}\n'),
        ("a.csv", "text,label\none,1\n"),
        ("a.csv.gz", "text,label\none,1\n"),
    ],
)
def test_tables_may_have_the_mark_of_utf8_and_not_that_of_utf16(tmp_path, imports, name, text):
    def write(data: bytes) -> None:
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    write(text.encode("utf-8-sig"))
    assert rows_of(tmp_path / name, imports)["text"] == ["one"]
    write(text.encode("utf-16"))
    with pytest.raises(ValueError, match=f"{name}: the file is UTF-16; convert it to UTF-8"):
        m.build(str(tmp_path / name), "auto", imports)


def test_a_binary_file_is_no_csv(tmp_path, imports):
    """Its bytes were taken for tabs, and the advice was to say so."""
    (tmp_path / "a.csv").write_bytes(b"\x93\0a\tb\n\0\xe2\tc\n")
    with pytest.raises(ValueError, match=r"a\.csv: its content is binary, not text"):
        m.build(str(tmp_path / "a.csv"), "auto", imports)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf16_is_refused_whole(tmp_path, imports, encoding):
    data = "one\ntwo\n".encode(encoding)
    (tmp_path / "a.txt").write_bytes(
        data
        if encoding == "utf-16"
        else {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}[encoding] + data
    )
    for form in ("text", "paragraphs", "documents"):
        with pytest.raises(ValueError, match=r"a\.txt: the file is UTF-16; convert it to UTF-8"):
            m.build(str(tmp_path / "a.txt"), form, imports)
