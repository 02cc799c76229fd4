"""Tokenizers: trained ones that come out the same each time, folders of transformers, and long
texts whose pieces give the ids of the whole.
"""

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from toys import sentences

from pipeline.io import storage
from pipeline.media import tokenization as t
from pipeline.media.tokenization import SPECIALS, train_tokenizer

# ---------------------------------------------------------------- training


def test_the_vocabulary_is_no_larger_than_asked():
    texts = sentences(300, seed=3)[0]
    for kind in ("wordpiece", "bpe"):
        assert train_tokenizer(
            texts, kind, 120 if kind == "wordpiece" else 300, True
        ).get_vocab_size() <= (120 if kind == "wordpiece" else 300)


def test_the_alphabet_covers_the_text_up_to_half_of_the_vocabulary():
    def characters(text: str, vocabulary: int) -> int:
        tokens = train_tokenizer([text], "wordpiece", vocabulary, True).get_vocab()
        return sum(len(token) == 1 for token in tokens)

    chinese = "".join(chr(0x4E00 + i) * (1 + 3000 // (i + 1)) for i in range(3000))
    assert 2950 < characters(chinese, 8192) <= 3000
    assert characters(chinese, 5000) == 2500
    assert characters(chinese, 1200) == 1000
    rare = "".join(chr(0x4E00 + i) for i in range(1100))
    assert characters("the quick brown fox " * 20_000 + rare, 8192) == 1000


def test_case_is_kept_when_it_is_asked_for():
    texts = ["Alpha beta ALPHA"] * 5
    upper = train_tokenizer(texts, "wordpiece", 256, False)
    assert upper.encode("Alpha").tokens == ["Alpha"] and upper.encode("ALPHA").tokens == ["ALPHA"]
    assert train_tokenizer(texts, "wordpiece", 256, True).encode("ALPHA").tokens == ["alpha"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_a_tokenizer_is_a_pure_function_of_the_texts(kind):
    """tokenizers keeps words in hash maps that are seeded anew for every training: plain WordPiece
    training differs each time.
    """
    texts = sentences(100, seed=4)[0]
    assert len({train_tokenizer(texts, kind, 400, True).to_str() for _ in range(4)}) == 1


def test_pieces_inside_words_are_not_special():
    """The first pass of the training finds "##a"; in a text it is three tokens, like any other."""
    tokenizer = train_tokenizer(["banana bandana ##a # a"] * 4, "wordpiece", 256, True)
    assert tokenizer.encode("##a").tokens == ["#", "#", "a"]
    assert [t.content for t in tokenizer.get_added_tokens_decoder().values()] == list(SPECIALS)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_odd_corpora_train(kind):
    for texts in (
        ["a"],
        ["   "],
        ["!?!"],
        ["日本語 テキスト", "naïve café"],
        ["".join(map(chr, range(0x400, 0x400 + 1500)))],
    ):
        tokenizer = train_tokenizer(texts, kind, 2000, True)
        assert [tokenizer.token_to_id(name) for name in SPECIALS] == list(range(5))
        tokenizer.encode(texts[0])


# ---------------------------------------------------------------- folders of transformers

BERT_MAP = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def folder_of(
    path: Path, names: list[str], beside: dict | None = None, config: dict | None = None
) -> Path:
    """A folder whose tokenizer has the given special tokens from id 0 on, as transformers saves it:
    with padding and truncation.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate([*names, "a", "b", "ab"])}, [("a", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(names)
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(5)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, value in (("special_tokens_map.json", beside), ("tokenizer_config.json", config)):
        if value is not None:
            (path / name).write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("names", "beside", "config", "want"),
    [
        (["[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]"], None, None, [4, 3, 2, 1, 0]),
        (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], None, None, [1, 3, 0, 2, 4]),  # RoBERTa
        (["<|endoftext|>"], None, None, [0] * 5),  # GPT-2
        (
            ["x1", "x2", "x3", "x4", "x5"],
            dict(
                zip(
                    BERT_MAP,
                    ["x1", "x2", "x3", "x4", {"content": "x5", "lstrip": True}],
                    strict=True,
                )
            ),
            None,
            [2, 0, 3, 1, 4],
        ),
        (
            ["x1", "x2", "x3", "x4", "x5"],
            None,
            dict(zip(BERT_MAP, ["x1", "x2", "x3", "x4", "x5"], strict=True)),
            [2, 0, 3, 1, 4],
        ),
        (
            ["[MASK]", "[SEP]", "[CLS]", "[UNK]", "[PAD]", "other"],
            {"mask_token": "other", "pad_token": None, "sep_token": "not there"},
            None,
            [4, 3, 2, 1, 5],
        ),
        # Llama
        (
            ["<unk>", "<s>", "</s>"],
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
            None,
            [2, 0, 1, 2, 2],
        ),
        (
            ["<s>", "</s>", "<unk>", "x"],
            {"eos_token": "</s>"},
            {"bos_token": "<s>", "pad_token": "x"},
            [3, 2, 0, 1, 1],
        ),
    ],
)
def test_special_tokens_of_a_folder(tmp_path, names, beside, config, want):
    from tokenizers import Tokenizer

    text, vocabulary, specials = t.from_folder(
        str(folder_of(tmp_path / "f", names, beside, config))
    )
    assert specials == want and vocabulary == len(names) + 3
    tokenizer = Tokenizer.from_str(text)
    assert (
        tokenizer.padding is None
        and tokenizer.truncation is None
        and len(tokenizer.encode("ab" * 50, add_special_tokens=False).ids) == 50
    )


def test_a_vocabulary_with_gaps_reaches_to_its_last_id(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(
        models.WordPiece({name: 7 * i for i, name in enumerate(SPECIALS)}, unk_token="[UNK]")
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert t.from_folder(str(tmp_path))[1:] == (29, [0, 7, 14, 21, 28])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "f: no such folder; a tokenizer is a folder with tokenizer.json"),
        (lambda folder: folder.mkdir(), "f: no tokenizer.json in this folder"),
        (
            lambda folder: (folder_of(folder, ["<s>"]) / "tokenizer.json").write_text(
                '{"model": 3'
            ),
            "tokenizer.json: not a tokenizer that the package",
        ),
        (
            lambda folder: (folder_of(folder, ["<s>"]) / "tokenizer.json").write_bytes(b"\xff"),
            "tokenizer.json: not a tokenizer that the package",
        ),
        (
            lambda folder: folder_of(folder, ["[PAD]", "[CLS]", "[SEP]"]),
            r"f: its tokenizer lacks special tokens: unk, mask; name them in .*unk_token, "
            r"mask_token",
        ),
        (
            lambda folder: folder_of(folder, ["<s>"], beside=["x"]),
            "special_tokens_map.json: not a JSON object",
        ),
        (
            lambda folder: (
                folder_of(folder, ["<s>"], beside={}) / "special_tokens_map.json"
            ).write_text("{"),
            "special_tokens_map.json: it is not JSON",
        ),
    ],
)
def test_a_folder_that_does_not_fit_says_what_is_missing(tmp_path, make, message):
    make(tmp_path / "f")
    with pytest.raises((ValueError, storage.StorageError), match=message):
        t.from_folder(str(tmp_path / "f"))


def test_a_folder_on_s3(tmp_path, s3_server):
    folder = folder_of(tmp_path / "f", list(BERT_MAP.values()), BERT_MAP)
    for file in folder.iterdir():
        storage.write_bytes(f"{s3_server}/test-tokenizer/f/{file.name}", file.read_bytes())
    assert t.from_folder(f"{s3_server}/test-tokenizer/f") == t.from_folder(str(folder))


# ---------------------------------------------------------------- words


def bits(text: str, n: int) -> list[int]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n).tolist()


def test_tokens_that_go_on_a_word():
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "##x", "in", "##ing", "##", "a##"]
    wordpiece = Tokenizer(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[PAD]")
    )
    wordpiece.add_special_tokens(["##x"])
    assert bits(t.continuing(wordpiece, 6, [0]), 6) == [0, 0, 0, 1, 1, 0]
    names = ["<s>", "in", "Ġin", "ing", "Ċ", "ĉx", "Ġ", "."]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    # Nothing says how it marks words
    assert t.continuing(bpe, 8, [0]) is None and not t.marks_beginnings(bpe)
    for split, change in (
        (pre_tokenizers.ByteLevel(), str),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]), str),
        (
            pre_tokenizers.Metaspace(),
            lambda name: name.replace("Ġ", "▁").replace("Ċ", "▁").replace("ĉ", "▁"),
        ),
    ):
        bpe = Tokenizer(
            models.BPE(
                {
                    change(name): i
                    for i, name in enumerate(names)
                    if change(name) not in ("▁",) or i == 6
                },
                [],
            )
        )
        bpe.pre_tokenizer = split
        assert [b for i, b in enumerate(bits(t.continuing(bpe, 8, [0]), 8)) if i != 4] == [
            0,
            1,
            0,
            1,
            0,
            0,
            1,
        ] and t.marks_beginnings(bpe)


# ---------------------------------------------------------------- long texts


@pytest.fixture(scope="module")
def corpus() -> str:
    """Some real text with what is hard about cutting: several spaces, tabs, line ends, accents
    apart from their letters, other scripts, special tokens.
    """
    hard = [
        "two  spaces",
        "a\ttab",
        "\n\n",
        " \n ",
        "e\u0301te\u0301",
        "x \u0301y",
        "日本語のテキスト です",
        "naïve ünï",
        "don't 's",
        "3.14 1,000",
        "[SEP] [MASK]",
        "🙂 🙂",
        "\u00a0nbsp \u2003em",
        "a \x1c b",
        "\x00 \x00",
        "Σίσυφος ΣΊΣΥΦΟΣ",
    ]
    plain = sentences(3000, seed=11)[0]
    return "".join(
        text + (" " if i % 3 else "  ") + hard[i % len(hard)] + (" " if i % 2 else "")
        for i, text in enumerate(plain)
    )


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request, corpus):
    return train_tokenizer([corpus[:30_000]], request.param, 600, True)


@pytest.mark.parametrize("size", [64, 1000, 5000])
def test_pieces_give_the_ids_of_the_whole_text(tokenizer, corpus, size, monkeypatch):
    monkeypatch.setattr(t, "PIECE_BYTES", size)
    data = corpus.encode()
    parts, stop = [], 0
    while stop < len(data):
        text, stop = t.piece(data, stop, size)
        parts.append(text)
    assert (
        "".join(parts) == corpus
        and max(len(part.encode()) for part in parts) <= size
        and len(parts) >= len(data) / size
    )
    assert not any(part == "" for part in parts)
    (got,) = t.encode(tokenizer, [memoryview(data)], np.uint16)
    assert got.tolist() == tokenizer.encode(corpus, add_special_tokens=False).ids


@pytest.mark.data
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("name", ["tinyshakespeare", "wikitext2"])
def test_pieces_of_real_text_give_the_ids_of_the_whole(kind, name):
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA is not set")
    import pyarrow.parquet as pq

    folder = Path(os.environ["ONETOMANY_DATA"], "text")
    text = (
        (folder / "tinyshakespeare" / "input.txt").read_text()
        if name == "tinyshakespeare"
        else "".join(
            pq.read_table(folder / "wikitext2_valid_test" / "test.parquet")["text"].to_pylist()
        )
    )
    assert len(text) > 2 * t.PIECE_BYTES
    text = text[: 2 * t.PIECE_BYTES + 9999]
    tokenizer = train_tokenizer([text[:100_000]], kind, 2000, True)
    (got,) = t.encode(tokenizer, [text.encode()], np.uint16)
    assert got.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_many_documents_come_out_in_their_order(tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(t, "PIECE_BYTES", 500)
    monkeypatch.setattr(t, "GROUP_BYTES", 1200)
    texts = [
        corpus[i : i + n]
        for i, n in ((0, 3000), (10, 0), (500, 40), (5000, 700), (9000, 4000), (0, 1))
    ]
    got = t.encode(tokenizer, [text.encode() for text in texts], np.uint16)
    assert [ids.tolist() for ids in got] == [
        tokenizer.encode(text, add_special_tokens=False).ids for text in texts
    ]


@pytest.mark.parametrize("offsets", [False, True])
def test_the_first_ids_are_those_of_the_whole_text_and_no_more_is_read(
    tokenizer, corpus, offsets, monkeypatch
):
    monkeypatch.setattr(t, "PIECE_BYTES", 700)
    monkeypatch.setattr(t, "FIRST_BYTES", 100)
    read = []
    original = t.piece
    monkeypatch.setattr(
        t,
        "piece",
        lambda document, start, size: read.append(start) or original(document, start, size),
    )
    texts = [corpus, corpus[100:150], "", corpus[:2000]]
    for most in (1, 50, 400):
        read.clear()
        got = t.encode_first(tokenizer, [text.encode() for text in texts], most, np.uint16, offsets)
        for one, text in zip(got, texts, strict=True):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            assert (
                len(one.ids) >= min(most, len(encoding.ids))
                and one.ids.tolist() == encoding.ids[: len(one.ids)]
            )
            assert one.whole == (len(one.ids) == len(encoding.ids))
            if offsets:
                assert [text[a:b] for a, b in one.offsets] == [
                    text[a:b].strip() for a, b in encoding.offsets[: len(one.ids)]
                ]
        assert max(read) < 40 * most + 1500
    assert got[1].whole and got[2].whole and not got[0].whole


def test_a_text_without_spaces_is_cut_between_characters(tokenizer, monkeypatch):
    monkeypatch.setattr(t, "PIECE_BYTES", 50)
    for text in ("日本語のテキスト" * 40, "x" * 1000, "🙂" * 77, "a  b" * 100):
        parts = list(t.pieces(text.encode()))
        assert (
            "".join(parts) == text
            and max(len(part.encode()) for part in parts) <= 50
            and len(parts) <= len(text.encode()) / 40 + 2
        )
        assert len(t.encode(tokenizer, [text.encode()], np.uint16)[0])


def test_where_bytes_are_no_text_is_told_for_the_whole_document(monkeypatch):
    monkeypatch.setattr(t, "PIECE_BYTES", 10)
    text = "日本語 und mehr, länger als ein Stück".encode()
    assert t.not_utf8(text) == t.not_utf8(b"") == ""
    for place in range(len(text)):
        for bad in (
            text[:place] + b"\xff" + text[place:],
            text[:place],
            text[:place] + text[place + 1 :],
        ):
            try:
                bad.decode()
                want = ""
            except UnicodeDecodeError as error:
                want = f"not UTF-8 text ({error.reason} at byte {error.start})"
            assert t.not_utf8(bad) == want


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_line_of_twenty_megabytes_takes_a_bounded_memory(kind, corpus):
    """Ids in the process's own memory, and the tokenizer's (which Python does not count): measured
    as the process's peak.
    """
    import subprocess
    import sys

    program = """
import resource, sys
import numpy as np
from toys import sentences
from pipeline.media import tokenization as t
tokenizer = t.train_tokenizer(sentences(300, seed=3)[0], sys.argv[1], 400, True)
line = " ".join(sentences(2000, seed=1)[0]).encode()
line *= (20 << 20) // len(line)
t.encode(tokenizer, [line[:1 << 20]], np.uint16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids, = t.encode(tokenizer, [line], np.uint16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(ids))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
    )
    more_kib, ids = map(int, done.stdout.split())
    # Seen: 83 MiB, and 3 GiB for the line as a whole (2026-11-25)
    assert ids > 4 << 20 and more_kib < 250 << 10
