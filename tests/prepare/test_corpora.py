"""Corpora: their documents, what cleaning drops and why, and near duplicates against the Jaccard
similarity of all pairs.
"""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import read, reasons, summary, write
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import registry
from pipeline.media import minhash
from pipeline.prepare.engine import importing, inputs
from pipeline.prepare.engine.write import Preparation
from pipeline.prepare.readers import cleaning


def prepare(source, output, *pairs: str, **settings) -> tuple[list[dict], dict, list[dict]]:
    """The rows in the order of the parts, the summary's notes and the list of dropped documents."""
    conftest.prepare("text", source, output, *pairs, **settings)
    dropped = Path(output) / "_dropped.parquet"
    return (
        read_rows(output),
        summary(output)["notes"],
        pq.read_table(dropped).to_pylist() if dropped.exists() else [],
    )


def read_rows(output) -> list[dict]:
    return [row for row in read(output) if "text" in row]


def folder(place: str) -> Path:
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA names no data folder")
    return Path(os.environ["ONETOMANY_DATA"]) / "text" / place


# ---------------------------------------------------------------- documents


def test_documents_of_each_kind_of_file(tmp_path):
    write(tmp_path / "in/a.txt", "one\n\ntwo\nthree\n")
    write(
        tmp_path / "in/b.jsonl",
        '{"body": "four", "text": "4", "year": 1999, "url": null, "tags": ["x"]}\n\n{"text": '
        '"5", "body": "five", "year": 0.5}\n',
    )
    pq.write_table(
        pa.table({"text": pa.array(["six", None, "seven"], pa.large_string()), "year": [6, 7, 8]}),
        tmp_path / "in/c.parquet",
        row_group_size=1,
    )
    rows, notes, _ = prepare(tmp_path / "in/a.txt", tmp_path / "line")
    assert [(row["text"], row["id"]) for row in rows] == [
        ("one", "a.txt:1"),
        ("two", "a.txt:3"),
        ("three", "a.txt:4"),
    ] and notes["documents read"] == 3
    rows, _, _ = prepare(tmp_path / "in/a.txt", tmp_path / "blank", "documents=blank")
    assert [(row["text"], row["id"]) for row in rows] == [
        ("one", "a.txt:1"),
        ("two\nthree", "a.txt:3"),
    ]
    assert [
        row["text"]
        for row in prepare(tmp_path / "in/a.txt", tmp_path / "file", "documents=file")[0]
    ] == ["one\n\ntwo\nthree\n"]
    rows, _, _ = prepare(
        tmp_path / "in/b.jsonl", tmp_path / "json", "text=body", "keep=year,url,tags"
    )
    assert rows == [
        {
            "text": "four",
            "id": "b.jsonl:1",
            "year": 1999.0,
            "url": None,
            "tags": '["x"]',
            "split": "train",
        },
        {
            "text": "five",
            "id": "b.jsonl:3",
            "year": 0.5,
            "url": None,
            "tags": None,
            "split": "train",
        },
    ]
    write(tmp_path / "nul.jsonl", '{"text": "a", "url": "x\\u0000"}\n{"text": "b", "url": "y"}\n')
    assert [
        row["text"]
        for row in prepare(tmp_path / "nul.jsonl", tmp_path / "nul", "keep=url", max_bad=0.5)[0]
    ] == ["b"]
    rows, _, _ = prepare(
        tmp_path / "in/c.parquet", tmp_path / "parquet", "keep=year", part_mb=1e-5, max_bad=0.5
    )
    assert [(row["text"], row["id"], row["year"]) for row in rows] == [
        ("six", "c.parquet:1", 6),
        ("seven", "c.parquet:3", 8),
    ]
    assert len(list((tmp_path / "parquet").glob("train*.parquet"))) == 3
    assert reasons(summary(tmp_path / "parquet")) == {"c.parquet:2": "null"}
    rows, _, _ = prepare(tmp_path / "in", tmp_path / "all", max_bad=0.5)
    assert [row["text"] for row in rows] == ["one", "two", "three", "4", "5", "six", "seven"]


@pytest.mark.parametrize("documents", ["line", "blank"])
@pytest.mark.parametrize("seed", range(4))
def test_ranges_of_a_file_give_every_document_once_with_its_place(documents, seed, tmp_path):
    """Lines of many lengths, some blank, both line ends: cut anywhere, they are what the whole file
    is.
    """
    draw = random.Random(seed)
    lines = [
        "" if draw.random() < 0.3 else "wörd " * draw.randrange(1, 12) + str(i) for i in range(60)
    ]
    end = "\r\n" if seed % 2 else "\n"
    data = (end.join(lines) + (end if seed < 2 else "")).encode()
    write(tmp_path / "a.txt", (b"\xef\xbb\xbf" if seed == 3 else b"") + data)
    if documents == "line":
        wanted = [(line, f"a.txt:{i}") for i, line in enumerate(lines, 1) if line]
    else:
        wanted, held = [], []
        for i, line in enumerate([*lines, ""], 1):
            held += [(line, i)] if line else []
            if not line and held:
                wanted.append(("\n".join(text for text, _ in held), f"a.txt:{held[0][1]}"))
                held = []
    importer = registry.get("importer", "text")(
        importing.options_of("text", [f"documents={documents}"])
    )
    for size in (7, 23, 61, 150, 4000):
        found, before = [], 0
        pieces, _, _ = importer.input_splits(str(tmp_path / "a.txt"), size)
        for piece in pieces:
            reading = inputs.SplitReader(piece, inputs.Opener(), before=before)
            found += [(text, reading.location(at)) for at, text, _ in importer._documents(reading)]
            before += reading.lines
        assert found == wanted, size
        assert (len(pieces) > 100) == (size == 7)


def test_a_parquet_string_that_is_no_utf8_is_one_broken_row(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 3, pa.array([b"good", b"b\xffd", b"more"], pa.binary()).buffers()
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows, _, _ = prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert [row["text"] for row in rows] == ["good", "more"]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: column 'text' is int64, no text"):
        prepare(tmp_path / "b.parquet", tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"a\.parquet: no column 'txt' for --set text; did you mean text"
    ):
        prepare(tmp_path / "a.parquet", tmp_path / "none", "text=txt")
    with pytest.raises(ValueError, match="id is a name of the corpus's own columns"):
        prepare(tmp_path / "a.parquet", tmp_path / "none", "keep=id")


# ---------------------------------------------------------------- cleaning


def test_each_filter_drops_what_it_says(tmp_path):
    texts = {
        "A good sentence of English.": None,
        "   ": None,
        "ab": "too short (min_chars)",
        "word " * 40: "too long (max_chars)",
        "Antidisestablishmentarianism": "too few words (min_words)",
        "12 34 56 78 90 !!! ...": "too few letters (min_letters)",
        "Это предложение на русском языке": "of another script (script)",
        "Naïve café, über jalapeño": None,
    }
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["min_chars=3", "max_chars=100", "min_words=2", "min_letters=0.5", "script=latin"]
    rows, notes, dropped = prepare(tmp_path / "a.jsonl", tmp_path / "out", *options, max_bad=0)
    assert [row["text"] for row in rows] == [
        "A good sentence of English.",
        "Naïve café, über jalapeño",
    ]
    wanted = {
        f"a.jsonl:{i}": reason or "empty"
        for i, (text, reason) in enumerate(texts.items(), 1)
        if reason or not text.strip()
    }
    assert {row["id"]: row["reason"] for row in dropped} == wanted and all(
        row["twin"] is None for row in dropped
    )
    assert (
        notes["dropped"] == dict(Counter(wanted.values()))
        and "dropped: empty 1, too short (min_chars) 1"
        in (tmp_path / "out/_summary.md").read_text()
    )


@pytest.mark.parametrize(
    ("text", "script", "letters", "own"),
    [
        ("Hello, world", "latin", 10 / 11, 1.0),
        ("Привет you", "cyrillic", 1.0, 6 / 9),
        ("漢字かな", "han", 1.0, 0.5),
        ("नमस्ते", "devanagari", 1.0, 1.0),
        ("e\u0301 1", "latin", 2 / 3, 1.0),
        ("123", "latin", 0.0, 0.0),
        ("", "latin", 0.0, 0.0),
        ("한국어 ok", "hangul", 1.0, 3 / 5),
    ],
)
def test_shares_of_letters_and_scripts(text, script, letters, own):
    assert cleaning.letter_shares(text, script) == pytest.approx((letters, own))


def test_the_first_of_equal_documents_stays_and_held_out_ones_come_first(tmp_path):
    write(tmp_path / "in/train.txt", "A line,  twice\nanother\na LINE, twice\nin test too\n")
    write(tmp_path / "in/test.txt", "In test too\n")
    rows, notes, dropped = prepare(tmp_path / "in", tmp_path / "out", "dedup=exact", part_mb=1e-5)
    assert [(row["split"], row["text"]) for row in rows] == [
        ("test", "In test too"),
        ("train", "A line,  twice"),
        ("train", "another"),
    ]
    assert [(row["id"], row["twin"], row["reason"]) for row in dropped] == [
        ("train.txt:3", "train.txt:1", "exact duplicate"),
        ("train.txt:4", "test.txt:1", "exact duplicate"),
    ]
    assert notes["dropped"] == {"exact duplicate": 2} and notes["documents read"] == 5


def test_an_equal_of_a_near_duplicate_names_the_one_that_is_kept(tmp_path):
    words = [f"w{i}" for i in range(60)]
    near = " ".join([*words[:-1], "other"])
    write(
        tmp_path / "a.txt",
        "\n".join([" ".join(words), near, near.upper(), "something else altogether"]),
    )
    _, _, dropped = prepare(tmp_path / "a.txt", tmp_path / "out", "dedup=near")
    assert [(row["id"], row["reason"], row["twin"]) for row in dropped] == [
        ("a.txt:2", "near duplicate", "a.txt:1"),
        ("a.txt:3", "exact duplicate", "a.txt:1"),
    ]


def test_a_folder_that_another_rule_for_words_made_is_not_current(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a line\nanother line\n")
    for dedup in ("near", "exact"):
        prepare(tmp_path / "a.txt", tmp_path / dedup, f"dedup={dedup}")
    monkeypatch.setattr(minhash, "VERSION", minhash.VERSION + 1)
    prepare(tmp_path / "a.txt", tmp_path / "exact", "dedup=exact")
    with pytest.raises(ValueError, match="of another source, of other options or of an earlier"):
        prepare(tmp_path / "a.txt", tmp_path / "near", "dedup=near")


def test_documents_without_words_are_alike_only_when_they_are(tmp_path):
    write(tmp_path / "a.txt", "!!!\n???\n\U0001f389 \U0001f389\nhello\n!!!\n")
    rows, _, dropped = prepare(tmp_path / "a.txt", tmp_path / "out", "dedup=near")
    assert len(rows) == 4 and [(row["id"], row["twin"]) for row in dropped] == [
        ("a.txt:5", "a.txt:1")
    ]


def test_a_corpus_of_which_nothing_would_stay_is_refused(tmp_path):
    write(tmp_path / "a.txt", "some words\n\na b\nb c\n")
    with pytest.raises(
        ValueError,
        match=r"all of the 3 documents would be dropped: too short \(min_chars\) 2, too few words "
        r"\(min_words\) 1",
    ):
        prepare(tmp_path / "a.txt", tmp_path / "out", "min_chars=5", "min_words=3")
    prepare(tmp_path / "a.txt", tmp_path / "out", "min_chars=5")
    message = Preparation(
        "text",
        str(tmp_path / "a.txt"),
        str(tmp_path / "out"),
        importing.options_of("text", ["min_chars=5"]),
    ).describe()
    assert message.endswith(
        "train 1 row in 1 part, left out: 0 broken, 2 dropped; see _summary.md there"
    )


def test_documents_that_share_no_more_than_bands_are_verified():
    """Signatures that agree in one band alone are no duplicates; those that agree in enough places
    are, in whatever group they stand.
    """
    draw = np.random.default_rng(0)
    signs = draw.integers(0, 1 << 32, (400, minhash.NUM_PERM), dtype=np.uint32)
    # One band of 200 documents
    signs[:200, : minhash.rows_per_band(0.8)] = signs[0, : minhash.rows_per_band(0.8)]
    assert (cleaning.first_near_duplicates(signs, 0.8) == np.arange(400)).all()
    signs[150] = signs[7]
    signs[150, 100:120] += 1
    signs[399], signs[398] = signs[300], signs[300]
    signs[398, :30] += 1
    found = cleaning.first_near_duplicates(signs, 0.8)
    assert (
        found[150] == 7
        and found[399] == 300
        and found[398] == 398
        and (found == np.arange(400)).sum() == 398
    )


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_meet_at_the_threshold(threshold):
    rows = minhash.rows_per_band(threshold)
    assert 1 <= rows <= minhash.NUM_PERM
    assert (
        threshold == 1 or 1 - (1 - threshold**rows) ** (minhash.NUM_PERM // rows) >= minhash.RECALL
    )
    assert (
        threshold == 1
        or 1 - (1 - threshold ** (rows + 1)) ** (minhash.NUM_PERM // (rows + 1)) < minhash.RECALL
    )


def jaccard_components(texts: list[str], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The first of each text's component and the similarities of all pairs, by sets: the definition
    itself.
    """
    words = [text.lower().replace("\n", " ").split() for text in texts]
    sets = [{tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))} for w in words]
    numbers = {shingle: i for i, shingle in enumerate(set().union(*sets))}
    rows, columns = zip(
        *((i, numbers[shingle]) for i, one in enumerate(sets) for shingle in one), strict=True
    )
    holds = coo_array(
        (np.ones(len(rows)), (rows, columns)), shape=(len(sets), len(numbers))
    ).tocsr()
    both, sizes = (holds @ holds.T).toarray(), np.array([len(one) for one in sets])
    alike = both / (sizes[:, None] + sizes - both)
    _, component = connected_components(coo_array(alike >= threshold), directed=False)
    return np.array([int(np.flatnonzero(component == c)[0]) for c in component]), alike


def corpus(name: str) -> list[str]:
    """Passages of 60 to 200 words, plain words alone so that all ways to cut them into words
    agree.
    """
    if name == "tinyshakespeare":
        text = folder(name).joinpath("input.txt").read_text()
    elif name == "us_speeches":
        text = "\n".join(pq.read_table(folder(name) / "speeches.parquet")["text"].to_pylist()[::12])
    else:
        text = "\n".join(
            pq.read_table(folder("wikitext2_valid_test") / "valid.parquet")["text"].to_pylist()
        )
    words, draw, out, at = (
        ["".join(c for c in w if c.isalnum()) for w in text.split()],
        random.Random(0),
        [],
        0,
    )
    words = [word for word in words if word]
    while at < len(words) and len(out) < 250:
        size = draw.randrange(60, 200)
        out.append(" ".join(words[at : at + size]))
        at += size
    return out


def changed(text: str, share: float, draw: random.Random) -> str:
    """The text with words replaced: each takes up to five shingles with it."""
    words = text.split()
    for i in draw.sample(range(len(words)), max(1, round(share * len(words)))):
        words[i] = f"other{draw.randrange(10**6)}"
    return " ".join(words)


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("wikitext2", marks=pytest.mark.slow),
        pytest.param("us_speeches", marks=pytest.mark.slow),
        "tinyshakespeare",
    ],
)
def test_planted_duplicates_are_found_as_all_pairs_find_them(name, tmp_path):
    texts, draw = corpus(name), random.Random(1)
    base = list(texts)
    for text in draw.sample(base, 40):
        texts.append(text.upper().replace(" ", "  ", 3))  # equal
    for share in (0.005, 0.01, 0.02, 0.04):
        texts += [changed(text, share, draw) for text in draw.sample(base, 40)]
    draw.shuffle(texts)
    first, alike = jaccard_components(texts, 0.8)
    write(tmp_path / "a.txt", "\n".join(texts))
    rows, notes, dropped = prepare(tmp_path / "a.txt", tmp_path / "out", "dedup=near")
    equal = [
        i
        for i in range(len(texts))
        if any(
            " ".join(texts[i].lower().split()) == " ".join(texts[j].lower().split())
            for j in range(i)
        )
    ]
    assert {
        int(row["id"].split(":")[1]) - 1 for row in dropped if row["reason"] == "exact duplicate"
    } == set(equal) and len(equal) >= 40
    wanted, got = (
        set(np.flatnonzero(first != np.arange(len(texts)))),
        {int(row["id"].split(":")[1]) - 1 for row in dropped},
    )
    precision, recall = len(got & wanted) / len(got), len(got & wanted) / len(wanted)
    print(
        f"{name}: {len(texts)} documents, {len(wanted)} to drop, {len(got)} dropped, precision "
        f"{precision:.3f}, recall {recall:.3f}"
    )
    assert (
        precision >= 0.9
        and recall >= 0.9
        and len(rows) == len(texts) - len(dropped) == len(texts) - sum(notes["dropped"].values())
    )
    margin = 0.12  # over three deviations of an estimate from 128 signatures at 0.8
    best = np.where(np.tri(len(texts), k=-1, dtype=bool), alike, 0).max(axis=1)
    assert not [
        i
        for i in got - wanted
        if alike[i][[j for j in range(len(texts)) if j != i]].max() < 0.8 - margin
    ], "what is dropped has a twin"
    assert not [i for i in wanted - got if best[i] > 0.8 + margin], (
        "what is clearly alike is not missed"
    )
    for row in dropped:
        assert row["twin"] in {kept["id"] for kept in rows}


@pytest.mark.data
def test_corpora_come_back_as_they_were(tmp_path):
    wanted = {
        split: pq.read_table(folder("wikitext2_valid_test") / f"{split}.parquet")[
            "text"
        ].to_pylist()
        for split in ("valid", "test")
    }
    rows, _, _ = prepare(folder("wikitext2_valid_test"), tmp_path / "wiki", part_mb=0.3)
    for split, name in (("test", "test"), ("validation", "valid")):
        assert [row["text"] for row in rows if row["split"] == split] == wanted[name]
    speeches = pq.read_table(folder("us_speeches") / "speeches.parquet").to_pylist()
    rows, notes, _ = prepare(
        folder("us_speeches"),
        tmp_path / "speeches",
        "keep=corpus,file",
        "script=latin",
        "min_letters=0.6",
    )
    assert [(row["text"], row["corpus"], row["file"]) for row in rows] == [
        (row["text"], row["corpus"], row["file"]) for row in speeches
    ]
    assert notes["characters"] == {"train": sum(len(row["text"]) for row in speeches)}
    text = folder("tinyshakespeare").joinpath("input.txt").read_text()
    rows, _, _ = prepare(
        folder("tinyshakespeare"), tmp_path / "blank", "documents=blank", part_mb=0.1
    )
    assert [row["text"] for row in rows] == re.split(r"\n{2,}", text.strip("\n"))


@pytest.mark.slow
def test_a_hundred_thousand_documents_take_the_memory_and_time_that_is_said():
    """529 bytes a document, and what one band is sorted in."""
    import resource

    draw = np.random.default_rng(0)
    signs = draw.integers(0, 1 << 32, (100_000, minhash.NUM_PERM), dtype=np.uint32)
    signs[50_000:] = signs[:50_000]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = cleaning.first_near_duplicates(signs, 0.8)
    assert (found[50_000:] == np.arange(50_000)).all() and (
        found[:50_000] == np.arange(50_000)
    ).all()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 100_000
    print(f"{grown:.0f} bytes a document beyond the signatures")
    assert grown < 3000
