"""CoNLL, SQuAD and CSV: the same rows back from files written of real data, and what is wrong in
them told.
"""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare.conftest import prepare_and_read, question, reasons, squad_file, write


def folder(place: str) -> Path:
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA names no data folder")
    return Path(os.environ["ONETOMANY_DATA"]) / place


# ---------------------------------------------------------------- CoNLL


def lines(sentences, form="{} {}\n") -> str:
    return "".join(
        "".join(form.format(*pair) for pair in zip(*sentence, strict=True)) + "\n"
        for sentence in sentences
    )


CLASSIC = [
    (["EU", "rejects", "German", "call"], ["I-ORG", "O", "I-MISC", "O"]),
    (["Peter", "Blackburn"], ["I-PER", "I-PER"]),
    (["Paris", "London"], ["I-LOC", "B-LOC"]),
    (["A", "B"], ["I-LOC", "I-ORG"]),
]
AS_BIO = [["B-ORG", "O", "B-MISC", "O"], ["B-PER", "I-PER"], ["B-LOC", "B-LOC"], ["B-LOC", "B-ORG"]]


def test_iob1_is_found_out_and_becomes_bio(tmp_path):
    """Four columns, documents and the tags of the original CoNLL-2003 files."""
    text = "".join(
        f"-DOCSTART- -X- O O\n\n{lines([s], '{} NN I-NP {}' + chr(10))}" for s in CLASSIC
    )
    rows, found = prepare_and_read("conll", write(tmp_path / "eng.testa", text), tmp_path / "out")
    assert [row["tags"] for row in rows] == AS_BIO
    assert [row["words"] for row in rows] == [words for words, _ in CLASSIC]
    assert [row["document"] for row in rows] == [1, 2, 3, 4]
    assert {row["split"] for row in rows} == {"validation"}
    assert found["notes"]["scheme"] == "iob1, written as bio (6 I- became B-)"
    assert found["notes"]["documents"] == 4
    assert found["classes"]["validation"]["labels"] == dict(
        sorted(Counter(tag for tags in AS_BIO for tag in tags).items())
    )


def test_documents_are_numbered_over_all_files(tmp_path):
    for name, text in (
        ("a.txt", "-DOCSTART- O\n\nx O\n\n-DOCSTART- O\n\ny O\n\n"),
        ("b.txt", "z O\n\nz O\n"),
        ("c.txt", "-DOCSTART- O\nw O\n"),
    ):
        write(tmp_path / "in" / name, text)
    rows, _ = prepare_and_read("conll", tmp_path / "in", tmp_path / "out")
    found = [(row["words"][0], row["document"]) for row in rows]
    assert found == [("x", 1), ("y", 2), ("z", 3), ("z", 3), ("w", 4)]


GOOD = "good B-PER\nword I-PER\n\n" * 40


def test_spaces_that_are_not_ascii_are_part_of_a_word(tmp_path):
    source = write(tmp_path / "a.conll", "5\u00a0km  B-NUM \nfar\tO\n\n")
    rows, _ = prepare_and_read("conll", source, tmp_path / "out", max_bad=0)
    assert [(row["words"], row["tags"]) for row in rows] == [(["5\u00a0km", "far"], ["B-NUM", "O"])]


def test_what_stands_before_the_first_docstart_is_a_document_of_its_own(tmp_path):
    write(tmp_path / "in/a.train", "-DOCSTART- O\n\na O\n\n")
    write(tmp_path / "in/b.train", "b O\n\n-DOCSTART- O\n\nc O\n")
    rows, found = prepare_and_read("conll", tmp_path / "in", tmp_path / "out")
    assert [(*row["words"], row["document"]) for row in rows] == [("a", 1), ("b", 2), ("c", 3)]
    assert found["notes"]["documents"] == 3


def test_a_carriage_return_within_a_line_does_not_make_a_word_of_two_lines(tmp_path):
    source = write(tmp_path / "a.conll", "Anna B-PER\rsleeps O\n\nRome B-LOC\n\n")
    rows, found = prepare_and_read("conll", source, tmp_path / "out")
    assert [row["words"] for row in rows] == [["Rome"]]
    assert reasons(found) == {"a.conll:1": "line 1: a carriage return within the line"}


def test_broken_sentences_are_listed_with_their_line(tmp_path):
    text = (
        "Inside I-LOC\n\nOther B-LOC\nkind I-PER\n\nno_tag\nmore O\n\nthree X O\n\nfoo PER\n\n"
        + GOOD
    )
    rows, found = prepare_and_read(
        "conll", write(tmp_path / "a.conll", text), tmp_path / "out", "scheme=bio", max_bad=0.2
    )
    assert len(rows) == 40
    message = reasons(found)
    wanted = {
        "a.conll:1": "I-LOC of word 0 has no B-",
        "a.conll:3": "I-PER",
        "a.conll:6": "lines of 1 columns, where the others of the file have 2",
        "a.conll:9": "lines of 3 columns",
        "a.conll:11": "PER",
    }
    assert list(message) == list(wanted)
    assert all(said in message[place] for place, said in wanted.items()), message
    fixed, found = prepare_and_read(
        "conll", tmp_path / "a.conll", tmp_path / "fixed", "scheme=bio", "repair=true", max_bad=0.2
    )
    assert [row["tags"] for row in fixed[:2]] == [["B-LOC"], ["B-LOC", "B-PER"]]
    assert len(fixed) == 42 and found["notes"]["I- without B-, now B-"] == 2


def test_bioes_is_checked_and_bilou_and_tags_of_another_kind_are_reported(tmp_path):
    text = "a B-X\nb E-X\n\nc S-X\n\nd B-X\n\n" + "e O\n\n" * 20
    rows, found = prepare_and_read(
        "conll", write(tmp_path / "a.txt", text), tmp_path / "out", max_bad=0.1
    )
    assert found["notes"]["scheme"] == "bioes" and list(reasons(found)) == ["a.txt:6"]
    assert [row["words"] for row in rows[:2]] == [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="tags that begin with L, U: neither bio, bioes nor iob1"):
        prepare_and_read(
            "conll", write(tmp_path / "b.txt", "a B-X\nb L-X\n\nc U-X\n"), tmp_path / "none"
        )
    with pytest.raises(ValueError, match=r"tags that begin with DT, NN: .*scheme=none"):
        prepare_and_read("conll", write(tmp_path / "c.txt", "the DT\ncat NN\n"), tmp_path / "none2")
    (row,), _ = prepare_and_read("conll", tmp_path / "c.txt", tmp_path / "pos", "scheme=none")
    assert row["tags"] == ["DT", "NN"]


def test_columns_separators_and_comments(tmp_path):
    text = "# id 1\n1\tNew York\tNNP\tB-LOC\n2\tnow\tRB\tO\n\n# id 2\n1\t#\tX\tO\n"
    pairs = ("word_column=1", "separator=tab", "comment=# ")
    rows, _ = prepare_and_read("conll", write(tmp_path / "a.tsv", text), tmp_path / "out", *pairs)
    assert [(row["words"], row["tags"]) for row in rows] == [
        (["New York", "now"], ["B-LOC", "O"]),
        (["#"], ["O"]),
    ]
    _, found = prepare_and_read(
        "conll", write(tmp_path / "b.txt", "a O\n\n" * 50 + "b\n"), tmp_path / "two", "tag_column=1"
    )
    assert reasons(found) == {"b.txt:101": "line 101: 1 columns: no column 1"}


@pytest.mark.data
def test_wnut17_comes_back_as_it_was(tmp_path):
    names = {
        "train": "wnut17train.conll",
        "dev": "emerging.dev.conll",
        "test": "emerging.test.annotated",
    }
    wanted = {}
    for split, name in names.items():
        rows = pq.read_table(folder("text/wnut17_ner") / f"{split}.parquet").to_pylist()
        wanted[{"dev": "validation"}.get(split, split)] = [
            (row["tokens"], row["ner_tags"]) for row in rows
        ]
        write(
            tmp_path / "in" / name,
            lines([(row["tokens"], row["ner_tags"]) for row in rows], "{}\t{}\n"),
        )
    rows, found = prepare_and_read("conll", tmp_path / "in", tmp_path / "out", max_bad=0)
    assert {
        split: [(row["words"], row["tags"]) for row in rows if row["split"] == split]
        for split in wanted
    } == wanted
    assert found["notes"]["scheme"] == "bio" and found["rows"] == {
        "test": 1287,
        "train": 3394,
        "validation": 1009,
    }
    classic = [
        (
            [*words],
            [
                f"I{t[1:]}" if t[0] == "B" and not (i and tags[i - 1][1:] == t[1:] != "") else t
                for i, t in enumerate(tags)
            ],
        )
        for words, tags in wanted["train"]
    ]
    write(tmp_path / "classic/train.txt", lines(classic, "{}\t{}\n"))
    rows, found = prepare_and_read(
        "conll", tmp_path / "classic", tmp_path / "from-classic", max_bad=0
    )
    assert [(row["words"], row["tags"]) for row in rows] == wanted["train"] and found["notes"][
        "scheme"
    ].startswith("iob1")


# ---------------------------------------------------------------- SQuAD

CONTEXT = "Denver beat Carolina. In Denver, the Broncos wön 24 to 10."


def squad(*questions: dict) -> str:
    good = [asked(f"good{i}", "Carolina", 12) for i in range(40)]
    return json.dumps(squad_file(CONTEXT, [*questions, *good]))


def asked(name: str, text: str, start: int, **more) -> dict:
    return {**question(name, "What?", text, start), **more}


def test_answers_are_checked_where_they_stand(tmp_path):
    text = squad(
        asked("off", "Denver", 23),
        asked("far", "24 to 10", 0),
        asked("never", "Seattle", 3),
        asked("behind", "Denver", 500),
        asked("doubled", "the Broncos", 33),
        asked("doubled", "the Broncos", 33),
        {"id": "none", "question": "Why?", "answers": []},
        {
            "id": "impossible",
            "question": "Why?",
            "answers": [],
            "is_impossible": True,
            "plausible_answers": [{"text": "x", "answer_start": 1}],
        },
        asked("both", "Denver", 0, is_impossible=True),
        {"id": "blank", "question": " ", "answers": []},
        asked("text", "", 0),
        asked("true", "D", True),
    )
    rows, found = prepare_and_read(
        "squad", write(tmp_path / "dev-v2.0.json", text), tmp_path / "out", max_bad=0.3
    )
    message = {path.rpartition(":")[2]: reason for path, reason in reasons(found).items()}
    wanted = {
        "off": "answer 'Denver' is not at 23: there stands 'n Denv'; the nearest place is 25",
        "far": "the nearest place is 49",
        "never": "it stands nowhere in the context",
        "behind": "the nearest place is 25",
        "doubled": "its id stood before",
        "none": "no answers, and nothing marks it",
        "both": "is_impossible, and yet",
        "blank": "no question",
        "text": "an answer without text",
        "true": "an answer without text",
    }
    assert message.keys() == wanted.keys()
    assert all(said in message[name] for name, said in wanted.items()), message
    kept = {row["id"]: row for row in rows}
    assert len(rows) == 42
    assert kept["impossible"]["answers"] == kept["impossible"]["answer_start"] == []
    assert all(
        row["context"][start : start + len(answer)] == answer
        for row in rows
        for answer, start in zip(row["answers"], row["answer_start"], strict=True)
    )
    fixed, found = prepare_and_read(
        "squad", tmp_path / "dev-v2.0.json", tmp_path / "fixed", "repair=true", max_bad=0.3
    )
    assert {row["id"]: row["answer_start"] for row in fixed}["off"] == [25]
    assert found["notes"]["answers moved to where they stand"] == 1
    assert {f"dev-v2.0.json:{name}" for name in ("far", "behind", "never")} <= set(reasons(found))


def test_ids_that_stand_in_two_files_and_files_of_another_layout(tmp_path):
    write(tmp_path / "in/train-a.json", squad())
    write(tmp_path / "in/train-b.json", squad())
    rows, found = prepare_and_read("squad", tmp_path / "in", tmp_path / "out", max_bad=0.5)
    assert len(rows) == 40
    assert list(reasons(found).values()) == ["its id stood before"] * 40
    for text, said in (
        ("[1]", "not of SQuAD's layout"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"data": [{"paragraphs": 3}]}', "not of SQuAD's layout"),
    ):
        with pytest.raises(ValueError, match=f"c.json: {said}"):
            prepare_and_read("squad", write(tmp_path / "c.json", text), tmp_path / "none")


def test_ids_that_are_none_or_cannot_be_written_or_stood_at_a_broken_question(tmp_path):
    text = (
        squad(
            asked("off", "Denver", 23),
            asked("off", "Denver", 25),
            {**asked("", "Denver", 25), "id": None},
            {**asked("", "Denver", 25), "id": 7},
            asked("@@", "Denver", 25),
        )
        .encode()
        .replace(b"@@", b"a\xff")
    )
    rows, found = prepare_and_read(
        "squad", write(tmp_path / "dev.json", text), tmp_path / "out", max_bad=0.1
    )
    kept = {row["id"]: row["answer_start"] for row in rows}
    assert kept["off"] == [25] and kept["7"] == [25] and "None" not in kept
    message = {path.removeprefix("dev.json:"): reason for path, reason in reasons(found).items()}
    assert message.pop("off").startswith("answer 'Denver' is not at 23")
    assert sorted(message.values()) == ["no id", "the id is not UTF-8 text (at character 1)"]
    assert all(path.startswith("question ") for path in message)


def test_offsets_count_characters_also_beyond_the_basic_plane(tmp_path):
    """JSON may write such a character as two escapes: it is one."""
    questions = [asked("1", "cat \U0001f431", 3), asked("2", "cat", 5)]
    document = squad_file("\U0001f600\U0001f600 cat \U0001f431", questions)
    for name, escapes in (("a", True), ("b", False)):
        rows, found = prepare_and_read(
            "squad",
            write(tmp_path / f"{name}.json", json.dumps(document, ensure_ascii=escapes)),
            tmp_path / name,
        )
        assert [(row["context"][3:], row["answers"], row["answer_start"]) for row in rows] == [
            ("cat \U0001f431", ["cat \U0001f431"], [3])
        ]
        assert reasons(found)[f"{name}.json:2"].endswith("the nearest place is 3")


@pytest.mark.data
def test_xquad_comes_back_as_it_was(tmp_path):
    wanted = pq.read_table(folder("text/xquad_en") / "xquad_en.parquet").to_pylist()
    for split in ("train", "test"):
        articles: dict = {}
        for row in wanted:
            if row["split"] == split:
                paragraphs = articles.setdefault(row["title"], {})
                paragraphs.setdefault(row["context"], []).append(
                    question(row["id"], row["question"], row["answer_text"], row["answer_start"])
                )
        data = [
            {
                "title": title,
                "paragraphs": [{"context": c, "qas": qas} for c, qas in paragraphs.items()],
            }
            for title, paragraphs in articles.items()
        ]
        write(tmp_path / f"in/{split}-v1.1.json", json.dumps({"version": "1.1", "data": data}))
    rows, _ = prepare_and_read("squad", tmp_path / "in", tmp_path / "out", max_bad=0)
    names = ("id", "title", "context", "question", "split")
    assert sorted(
        (*(row[name] for name in names), row["answers"], row["answer_start"]) for row in rows
    ) == sorted(
        (*(row[name] for name in names), [row["answer_text"]], [row["answer_start"]])
        for row in wanted
    )


# ---------------------------------------------------------------- CSV


def by_text(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: str(row.get("text")))


def test_columns_are_mapped_kept_and_dropped(tmp_path):
    write(tmp_path / "a.csv", 'review,stars,when\n"one, two",5,today\nthree,4,\n')
    pairs = ["columns=text=review,label=stars"]
    rows, found = prepare_and_read("csv", tmp_path / "a.csv", tmp_path / "out", *pairs)
    assert by_text(rows) == [
        {"text": "one, two", "label": 5, "when": "today", "split": "train"},
        {"text": "three", "label": 4, "when": None, "split": "train"},
    ]
    assert found["classes"]["train"]["labels"] == {"4": 1, "5": 1}
    rows, _ = prepare_and_read(
        "csv", tmp_path / "a.csv", tmp_path / "dropped", *pairs, "keep=false"
    )
    assert set(rows[0]) == {"text", "label", "split"}
    source, pairs = write(tmp_path / "b.csv", "5;a text\n3;b\n"), ["header=false", "delimiter=;"]
    rows, _ = prepare_and_read("csv", source, tmp_path / "bare", *pairs, "columns=text=1,label=0")
    assert by_text(rows) == [
        {"label": 5, "text": "a text", "split": "train"},
        {"label": 3, "text": "b", "split": "train"},
    ]
    rows, _ = prepare_and_read("csv", source, tmp_path / "named", *pairs, "names=label,text")
    assert by_text(rows)[0] == {"label": 5, "text": "a text", "split": "train"}


def test_types_are_the_same_over_all_files(tmp_path):
    write(tmp_path / "in/train-a.csv", "text,label,zip,score,long\n1,1,00123,1,1\n")
    write(
        tmp_path / "in/train-b.csv",
        "text,label,zip,score,long\na,,55555,0.5,123456789012345678901\n",
    )
    write(tmp_path / "in/test.csv", "text,zip,score,long\nb,1,-2e3,\n")
    rows, found = prepare_and_read("csv", tmp_path / "in", tmp_path / "out")
    schemas = [pq.read_schema(file) for file in (tmp_path / "out").glob("*.parquet")]
    wanted = {
        "text": pa.string(),
        "zip": pa.string(),
        "score": pa.float64(),
        "long": pa.string(),
        "label": pa.int64(),
        "split": pa.string(),
    }
    assert [dict(zip(schema.names, schema.types, strict=True)) for schema in schemas] == [
        wanted
    ] * 2
    assert {row["text"]: (row["label"], row["zip"], row["score"], row["long"]) for row in rows} == {
        "1": (1, "00123", 1.0, "1"),
        "a": (None, "55555", 0.5, "123456789012345678901"),
        "b": (None, "1", -2000.0, None),
    }
    assert found["notes"]["files without a column label, where it is null"] == "test.csv"
    rows, _ = prepare_and_read(
        "csv", tmp_path / "in", tmp_path / "typed", "types=label=string,score=float"
    )
    assert {row["label"] for row in rows} == {"1", None}
    with pytest.raises(
        ValueError, match="--set types=zip=int: it holds values that are no numbers"
    ):
        prepare_and_read("csv", tmp_path / "in", tmp_path / "none", "types=zip=int")


def test_whole_numbers_that_float_would_round_are_no_floats(tmp_path):
    source = write(tmp_path / "a.csv", f"text,id,small\na,{2**53 + 1},3\nb,5,4\n")
    with pytest.raises(ValueError, match=r"types=id=float: .* beyond 2\^53, which float would rou"):
        prepare_and_read("csv", source, tmp_path / "id", "types=id=float")
    rows, _ = prepare_and_read("csv", source, tmp_path / "out", "types=id=int,small=float")
    assert {(row["id"], row["small"]) for row in rows} == {(2**53 + 1, 3.0), (5, 4.0)}


def test_quotes_line_ends_in_fields_and_a_quote_that_is_left_open(tmp_path):
    text = (
        'text,label\n"two\nlines, and ""quotes""",1\n"left open,2\nafter,3\n5" '
        'disk,4\n"swallows,5\nthis"one,6\n' + "more,7\n" * 60 + '"at the end,8\nlast,9\n'
    )
    rows, found = prepare_and_read(
        "csv", write(tmp_path / "a.csv", text), tmp_path / "out", max_bad=0.1
    )
    message = reasons(found)
    assert set(message) == {"a.csv:4", "a.csv:7", "a.csv:69"}
    assert all("quote" in reason or "CSV" in reason for reason in message.values())
    kept = {row["text"]: row["label"] for row in rows}
    assert kept == {
        'two\nlines, and "quotes"': 1,
        "after": 3,
        '5" disk': 4,
        'this"one': 6,
        "more": 7,
        "last": 9,
    }
    source = write(tmp_path / "b.tsv", 'text\tlabel\n"he said\t1\nso" he did\t2\n')
    rows, _ = prepare_and_read("csv", source, tmp_path / "tsv", "quote=", max_bad=0)
    assert by_text(rows)[0]["text"] == '"he said' and len(rows) == 2


def test_a_quote_may_stand_in_a_field_without_quotes_beside_one_that_goes_over_lines(tmp_path):
    text = 'size,text\n5" disk,"two\nlines"\n"7"" disk","one ""\n\nmore"\n8,b\n'
    rows, _ = prepare_and_read("csv", write(tmp_path / "a.csv", text), tmp_path / "out", max_bad=0)
    wanted = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(wanted) == 3 and by_text(
        [{n: row[n] for n in ("size", "text")} for row in rows]
    ) == by_text(wanted)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            "text,l\xe4bel\nfoo,1\nbar,0\n".encode("latin-1"),
            "a.csv:1: the names of the columns cannot be read: not UTF-8",
        ),
        (
            b'"text,label\nfoo,1\nbar,0\n',
            "a.csv:1: the names of the columns cannot be read: a quote",
        ),
        (b"text;label\nfoo;1\n", "a.csv:1: one column, 'text;label'; is it ; that"),
        (b"text\tlabel\nfoo\t1\n", "is it tab that"),
    ],
)
def test_no_row_is_taken_for_the_names_of_the_columns_nor_all_columns_for_one(data, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        prepare_and_read("csv", write(tmp_path / "a.csv", data), tmp_path / "out", max_bad=0.9)


@pytest.mark.parametrize(
    ("first", "pairs"), [("sep=;", ()), ("\ufeffSEP=;", ()), ("sep=,", ("delimiter=;",))]
)
def test_a_first_line_with_the_separator_for_excel_is_no_row(first, pairs, tmp_path):
    source = write(tmp_path / "a.csv", f"{first}\r\ntext;label\r\none, two;1\r\n")
    rows, found = prepare_and_read("csv", source, tmp_path / "out", *pairs)
    assert rows == [{"text": "one, two", "label": 1, "split": "train"}]
    assert not reasons(found)


def test_a_row_of_empty_fields_and_one_without_a_split_are_broken(tmp_path):
    rows, found = prepare_and_read(
        "csv", write(tmp_path / "a.tsv", "text\tlabel\n\t\n\nfoo\t1\n"), tmp_path / "tsv"
    )
    assert len(rows) == 1 and reasons(found) == {"a.tsv:2": "no text"}
    source = write(tmp_path / "b.csv", "text,fold\na,train\nb, \nc,dev\n")
    _, found = prepare_and_read("csv", source, tmp_path / "out", "split_column=fold")
    assert found["rows"] == {"train": 1, "validation": 1}
    assert reasons(found) == {"b.csv:3": "no split"}
    with pytest.raises(
        ValueError, match="--set split=test: --set split_column=fold gives each row its own"
    ):
        prepare_and_read("csv", source, tmp_path / "none", "split_column=fold", "split=test")


def test_what_cannot_be_is_reported(tmp_path):
    write(tmp_path / "a.csv", "text,label,split\na,1,dev\nb,2,train\nc,3,test\n")
    for pairs, said in (
        (["columns=text=txet"], "a.csv:1: no column 'txet' for --set columns; did you mean text?"),
        ([], "pass --set split_column=split"),
        (["columns=text"], "'text' is not NAME=VALUE"),
        (["delimiter=ab"], "one character"),
        (["names=a,b"], "pass --set header=false too"),
        (["columns=text=label", "split_column=split"], "as another one is called"),
        (["encoding=utf-16"], "no encoding in which ASCII is ASCII"),
        (["types=label=integer", "split_column=split"], "types=label=integer: did you mean int"),
        (["encoding=klingon"], "no encoding"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare_and_read("csv", tmp_path / "a.csv", tmp_path / "none", *pairs)
    with pytest.raises(ValueError, match="two columns are called 'a'"):
        prepare_and_read("csv", write(tmp_path / "b.csv", "a,a\n1,2\n"), tmp_path / "none2")
    rows, found = prepare_and_read(
        "csv", tmp_path / "a.csv", tmp_path / "out", "split_column=split"
    )
    splits = {row["text"]: row["split"] for row in rows}
    assert splits == {"a": "validation", "b": "train", "c": "test"}
    assert found["rows"] == {"test": 1, "train": 1, "validation": 1}
    source = write(tmp_path / "c.csv", "text\nna\xefve\n".encode("latin-1"))
    rows, _ = prepare_and_read("csv", source, tmp_path / "latin", "encoding=latin-1")
    assert rows[0]["text"] == "naïve"


def test_rows_sorted_by_class_are_mixed(tmp_path):
    write(tmp_path / "a.csv", "text,label\n" + "".join(f"t{i},{i // 500}\n" for i in range(1000)))
    rows, _ = prepare_and_read("csv", tmp_path / "a.csv", tmp_path / "out")
    assert (
        150 < sum(row["label"] for row in rows[:500]) < 350
        and len({row["text"] for row in rows}) == 1000
    )


@pytest.mark.data
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_sentiment_sentences_come_back_as_pandas_reads_them(suffix, tmp_path):
    wanted = pq.read_table(folder("text/sentiment_sentences") / "sentences.parquet").to_pylist()
    for split in ("train", "test"):
        sink = io.StringIO()
        writer = csv.writer(sink, delimiter="," if suffix == "csv" else "\t")
        writer.writerow(["sentence", "polarity", "domain"])
        writer.writerows(
            [row["text"], row["label"], row["domain"]] for row in wanted if row["split"] == split
        )
        write(tmp_path / f"in/{split}.{suffix}", sink.getvalue())
    rows, _ = prepare_and_read(
        "csv", tmp_path / "in", tmp_path / "out", "columns=text=sentence,label=polarity", max_bad=0
    )
    key = ["text", "label", "domain", "split"]
    assert sorted(tuple(row[n] for n in key) for row in rows) == sorted(
        tuple(row[n] for n in key) for row in wanted
    )
    other = pandas.read_csv(
        tmp_path / f"in/test.{suffix}", sep="," if suffix == "csv" else "\t", keep_default_na=False
    )
    assert sorted(other["sentence"]) == sorted(
        row["text"] for row in rows if row["split"] == "test"
    )


def test_ids_beside_fractions_stay_exact(tmp_path):
    """As floats two of them would become one; without a fraction they are whole numbers."""
    ids = ["9007199254740993", "123456789012345678", "0.5"]
    text = "text,id,long\n" + "".join(f"t{i},{id},{ids[0]}\n" for i, id in enumerate(ids))
    rows, _ = prepare_and_read("csv", write(tmp_path / "a.csv", text), tmp_path / "out")
    assert {row["text"]: row["id"] for row in rows} == {f"t{i}": id for i, id in enumerate(ids)}
    assert {row["long"] for row in rows} == {int(ids[0])}
    lines = "".join(f'{{"text": "t{i}", "number": {id}}}\n' for i, id in enumerate(ids))
    source = write(tmp_path / "b.jsonl", lines)
    rows, _ = prepare_and_read("text", source, tmp_path / "texts", "keep=number", "dedup=none")
    assert {row["number"] for row in rows} == {*ids}
