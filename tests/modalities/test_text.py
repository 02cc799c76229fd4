"""Text: tokenizers that go there and back and come out the same each time, rows that fail alone,
packing without padding, masks.
"""

import base64
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import SMALL, rows_of, sentences, take, task_of

from pipeline.config import registry
from pipeline.core.capabilities import Packs
from pipeline.core.contracts import Batch
from pipeline.media.tokenization import SPECIALS
from pipeline.modalities.text import Text, TextOptions

COLUMNS = {"text": "text"}
PAD, UNK, CLS, SEP, MASK = range(5)


# ---------------------------------------------------------------- tokenizers


def test_text_goes_there_and_back(modality):
    for text in sentences(20, seed=9)[0]:
        ids = modality.tokenizer.encode(text, add_special_tokens=False).ids
        assert UNK not in ids and not set(ids) & set(range(5))
        back = modality.tokenizer.decode(ids)
        # WordPiece is lower case, spaced by itself
        squeezed = (
            (lambda t: t.replace(" ", "").lower()) if modality.state["vocabulary"] < 400 else str
        )
        assert squeezed(back) == squeezed(text)


def test_specials_stand_at_the_first_ids(modality):
    assert (
        [modality.tokenizer.token_to_id(name) for name in SPECIALS]
        == list(range(5))
        == modality.state["specials"]
    )
    inputs = modality.inputs()
    bits = np.unpackbits(
        np.frombuffer(base64.b64decode(inputs.pop("continuing")), dtype=np.uint8),
        count=inputs["vocabulary"],
    )
    names = [modality.tokenizer.id_to_token(i) for i in range(inputs["vocabulary"])]
    goes_on = [
        name.startswith("##") if any(n.startswith("##") for n in names) else name[0] not in "ĠĊĉċČč"
        for name in names
    ]
    assert bits.tolist() == [0] * 5 + goes_on[5:] and 0 < bits.sum() < len(bits) - 5
    assert inputs == {
        "vocabulary": modality.tokenizer.get_vocab_size(),
        "length": 32,
        "specials": list(range(5)),
    }


def test_algorithm_follows_the_backbone():
    table = pa.table({"text": sentences(50)[0]})
    kinds = {}
    for backbone, algorithm in (
        ("transformers/bert", "auto"),
        ("transformers/gpt2", "auto"),
        ("transformers/bert", "bpe"),
        ("transformers/gpt2", "wordpiece"),
    ):
        state = Text.fit(TextOptions(vocabulary=300, algorithm=algorithm), table, COLUMNS, backbone)
        kinds[backbone, algorithm] = json.loads(state["tokenizer"])["model"]["type"]
    assert list(kinds.values()) == ["WordPiece", "BPE", "BPE", "WordPiece"]
    with pytest.raises(ValueError, match="lowercase: true has no effect with byte-level BPE"):
        Text.fit(TextOptions(lowercase=True), table, COLUMNS, "transformers/gpt2")


def test_fit_without_text_says_which_column():
    with pytest.raises(ValueError, match="column text: no row holds text to train a tokenizer on"):
        Text.fit(
            TextOptions(),
            pa.table({"text": pa.array([None, b"\xff"], pa.binary())}),
            COLUMNS,
            "transformers/bert",
        )


def test_a_modality_can_be_sent_to_a_worker(modality):
    modality.tokenizer  # noqa: B018 - made, and left out of what is sent
    again = pickle.loads(pickle.dumps(modality))
    assert (
        again.tokenizer.to_str() == modality.tokenizer.to_str()
        and "tokenizer" not in modality.__getstate__()
    )


# ---------------------------------------------------------------- rows


def test_rows_are_cls_ids_sep_padding(modality):
    texts = ["the old film was dull", "", "a new play " * 40]
    arrays, bad = modality.decode(pa.table({"text": texts}), COLUMNS)
    assert (
        bad == [""] * 3
        and arrays["tokens"].shape == (3, 32)
        and arrays["tokens"].dtype == np.uint16
    )
    for row, length, text in zip(
        arrays["tokens"].tolist(), arrays["lengths"].tolist(), texts, strict=True
    ):
        ids = modality.tokenizer.encode(text, add_special_tokens=False).ids[:30]
        assert row == [CLS, *ids, SEP] + [PAD] * (30 - len(ids)) and length == len(ids) + 2
    assert arrays["lengths"].tolist()[1:] == [2, 32]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_text_may_come_in_any_type_of_text(wordpiece, kind):
    texts = ["the old film", "été", None]
    data = [None if t is None else t.encode() for t in texts] if "binary" in str(kind) else texts
    column = (
        pa.array(texts).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(data, kind)
    )
    arrays, bad = wordpiece.decode(
        pa.table({"text": pa.chunked_array([column.slice(0, 1), column.slice(1)])}), COLUMNS
    )
    want, _ = wordpiece.decode(pa.table({"text": texts[:2]}), COLUMNS)
    assert bad == ["", "", "the text is null"] and np.array_equal(
        arrays["tokens"][:2], want["tokens"]
    )


def test_throughput_is_in_tokens_without_padding(wordpiece):
    table = pa.table({"text": ["the old film", "a new play in the old house", "the film"]})
    arrays, _ = wordpiece.decode(table, COLUMNS)
    batch = Batch(np.arange(3), torch.zeros(3), wordpiece.collate(arrays))
    assert wordpiece.throughput(batch) == arrays["lengths"].sum() < arrays["tokens"].size
    packed, _ = wordpiece.pack(table, COLUMNS)
    arrays, _ = wordpiece.decode(packed, {name: name for name in packed.column_names})
    batch = Batch(np.arange(len(packed)), torch.zeros(len(packed)), wordpiece.collate(arrays))
    count = sum(
        len(wordpiece.tokenizer.encode(text, add_special_tokens=False).ids) + 2
        for text in table["text"].to_pylist()
    )
    assert wordpiece.throughput(batch) == count and wordpiece.throughput_unit == "tokens"


def test_bytes_that_are_no_text_spoil_their_own_row(wordpiece):
    values = [b"the old film", b"na\xefve", "naïve".encode(), None, b"a new play"]
    arrays, bad = wordpiece.decode(pa.table({"text": pa.array(values, pa.binary())}), COLUMNS)
    assert bad == [
        "",
        "not UTF-8 text (invalid continuation byte at byte 2); it looks like Latin-1: convert the "
        "file (iconv -f LATIN1 -t UTF-8)",
        "",
        "the text is null",
        "",
    ]
    alone, _ = wordpiece.decode(
        pa.table({"text": ["the old film", "naïve", "a new play"]}), COLUMNS
    )
    assert np.array_equal(arrays["tokens"][[0, 2, 4]], alone["tokens"])
    packed, reasons = wordpiece.pack(pa.table({"text": pa.array(values, pa.binary())}), COLUMNS)
    without, none = wordpiece.pack(
        pa.table({"text": ["the old film", "naïve", "a new play"]}), COLUMNS
    )
    assert packed.equals(without) and reasons == bad and none == [""] * 3


def test_a_column_that_holds_no_text_is_refused(wordpiece):
    """The label's column taken for the text's would else train on digits."""
    table = pa.table({"text": [1, 2]})
    for call in (
        lambda: wordpiece.decode(table, COLUMNS),
        lambda: Text.fit(TextOptions(), table, COLUMNS, "transformers/bert"),
    ):
        with pytest.raises(ValueError, match="the text column holds int64 values, not text"):
            call()


def test_collate_cuts_to_the_longest_row_and_masks_the_padding(modality):
    arrays, _ = modality.decode(
        pa.table({"text": ["the old film", "", "a new play was bright"]}), COLUMNS
    )
    batch = modality.collate({**arrays, "label": np.array([1, 0, 1])})
    width = batch["tokens"].shape[1]
    longest = int(arrays["lengths"].max())
    assert longest <= width < longest + 8 and width % 8 == 0
    assert torch.equal(batch["mask"].sum(1), torch.from_numpy(arrays["lengths"]).long())
    assert torch.equal(
        batch["tokens"], torch.from_numpy(arrays["tokens"][:, :width].astype(np.int64))
    ) and batch["label"].tolist() == [1, 0, 1]
    assert torch.equal(batch["mask"], batch["tokens"] != PAD)


def test_a_vocabulary_above_65536_is_not_cut_to_16_bits(wordpiece):
    large = Text(wordpiece.options, {**wordpiece.state, "vocabulary": (1 << 16) + 1})
    assert large.decode(pa.table({"text": ["the"]}), COLUMNS)[0]["tokens"].dtype == np.int32


# ---------------------------------------------------------------- packing


def test_packed_rows_hold_every_document_end_to_end(modality):
    texts = sentences(50, seed=2)[0]
    texts[7] = ""  # holds nothing to learn from
    packed, left_out = modality.pack(pa.table({"text": texts}), COLUMNS)
    assert left_out == ["the text is empty" if not text else "" for text in texts]
    arrays, bad = modality.decode(packed, {"tokens": "tokens", "segments": "segments"})
    tokens, segments = arrays["tokens"], arrays["segments"]
    assert not any(bad) and tokens.shape == segments.shape == (packed.num_rows, 32)
    assert (segments[:-1] > 0).all() and (tokens[:-1] != PAD).all()  # only the last row has padding
    real = segments[-1] > 0
    assert (np.diff(real.astype(int)) <= 0).all() and (tokens[-1][~real] == PAD).all()
    want = [
        token
        for text in texts
        if text
        for token in [CLS, *modality.tokenizer.encode(text, add_special_tokens=False).ids, SEP]
    ]
    assert tokens[segments > 0].tolist() == want
    for row, numbers in zip(tokens, segments, strict=True):
        used = numbers[numbers > 0]
        assert used[0] == 1 and set(np.diff(used)) <= {0, 1}
        starts = np.flatnonzero(np.diff(used) == 1) + 1
        assert (
            (row[starts] == CLS).all()
            and (row[starts - 1] == SEP).all()
            and (row[: len(used)] == CLS).sum() == len(starts) + (row[0] == CLS)
        )


def test_padding_is_the_tokenizers_own_pad(wordpiece):
    """GPT-2's folder has one special for everything, and it is not 0."""
    other = Text(wordpiece.options, {**wordpiece.state, "specials": [9] * 5})
    arrays, _ = other.decode(pa.table({"text": ["the old film"]}), COLUMNS)
    n = int(arrays["lengths"][0])
    row = arrays["tokens"][0].tolist()
    assert row[0] == row[n - 1] == 9 and row[n:] == [9] * (32 - n)
    packed, _ = other.decode(
        other.pack(pa.table({"text": ["the old film"]}), COLUMNS)[0],
        {"tokens": "tokens", "segments": "segments"},
    )
    assert packed["tokens"][0].tolist() == row and packed["segments"][0].tolist() == [1] * n + [
        0
    ] * (32 - n)


def test_packing_nothing_gives_no_rows(modality):
    packed, left_out = modality.pack(pa.table({"text": pa.array([None, ""], pa.string())}), COLUMNS)
    assert packed.num_rows == 0 and packed.column_names == ["tokens", "segments", "bytes"]
    assert left_out == ["the text is null", "the text is empty"]
    _, left_out = modality.pack(pa.table({"text": [" \n"]}), COLUMNS)
    # WordPiece knows no spaces
    assert left_out == ["the text is empty" if modality.state["vocabulary"] < 400 else ""]


def test_packed_rows_survive_parquet(modality, tmp_path):
    import pyarrow.parquet as pq

    packed, _ = modality.pack(pa.table({"text": sentences(30)[0]}), COLUMNS)
    pq.write_table(packed, tmp_path / "p.parquet", row_group_size=3)
    columns = {"tokens": "tokens", "segments": "segments"}
    a, b = (
        modality.decode(table, columns)[0]
        for table in (packed, pq.read_table(tmp_path / "p.parquet").slice(2, 5))
    )
    assert np.array_equal(a["tokens"][2:7], b["tokens"]) and np.array_equal(
        a["segments"][2:7], b["segments"]
    )


# ---------------------------------------------------------------- rows tokenised once


def test_tokenised_rows_decode_to_what_the_texts_decode_to(modality, tmp_path):
    import pyarrow.parquet as pq

    texts = [*sentences(20, seed=3)[0], "", "a new play " * 40, None, b"na\xefve", "naïve ünknown"]
    rows = pa.array(
        [text.encode() if isinstance(text, str) else text for text in texts], pa.binary()
    )
    table = pa.table(
        {
            "label": pa.array(range(len(texts))),
            "text": rows,
            "label_name": [f"name {i}" for i in range(len(texts))],
        }
    )
    table = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    want, bad = modality.decode(table, COLUMNS)
    made = modality.tokenize(table, COLUMNS)
    assert made is not None
    tokenised, reasons = made
    good = [i for i, reason in enumerate(bad) if not reason]
    assert reasons == bad and [i for i in range(len(texts)) if i not in good] == [22, 23]
    assert tokenised.column_names == ["label", "tokens", "label_name"] and tokenised.schema.field(
        "tokens"
    ).type == pa.list_(pa.uint16())
    assert tokenised["label"].to_pylist() == good and tokenised["label_name"].to_pylist() == [
        f"name {i}" for i in good
    ]
    assert tokenised["tokens"][0].as_py() == [
        CLS,
        *modality.tokenizer.encode(texts[0], add_special_tokens=False).ids[:30],
        SEP,
    ]
    pq.write_table(tokenised, tmp_path / "t.parquet", row_group_size=5)
    for read in (tokenised, pq.read_table(tmp_path / "t.parquet")):
        arrays, none = modality.decode(read, {"tokens": "tokens", "label": "label"})
        assert none == [""] * len(good) and arrays.keys() == want.keys()
        assert all(
            np.array_equal(arrays[name], want[name][good])
            and arrays[name].dtype == want[name].dtype
            for name in want
        )
    part, _ = modality.decode(read.slice(3, 9), {"tokens": "tokens"})
    assert np.array_equal(part["tokens"], want["tokens"][good][3:12]) and np.array_equal(
        part["lengths"], want["lengths"][good][3:12]
    )
    assert modality.collate(part)["mask"].shape == modality.collate(part)["tokens"].shape


def test_tokenising_nothing_and_a_text_column_called_tokens(wordpiece):
    made = wordpiece.tokenize(pa.table({"text": pa.array([], pa.string())}), COLUMNS)
    arrays, bad = wordpiece.decode(made[0], {"tokens": "tokens"})
    assert (
        made[1] == bad == []
        and arrays["tokens"].shape == (0, 32)
        and arrays["lengths"].shape == (0,)
    )
    table, _ = wordpiece.tokenize(pa.table({"tokens": ["the old film", None]}), {"text": "tokens"})
    assert (
        table.column_names == ["tokens"]
        and table["tokens"].to_pylist()[0][0] == CLS
        and len(table) == 1
    )
    with pytest.raises(ValueError, match="a column is called tokens, the name that token ids get"):
        wordpiece.tokenize(pa.table({"text": ["the old film"], "tokens": [1]}), COLUMNS)


def test_other_modalities_have_nothing_to_tokenise():
    able = [
        name
        for name in registry.names("modality")
        if isinstance(registry.get("modality", name), Packs)
    ]
    assert able == ["text"]


# ---------------------------------------------------------------- masks of masked prediction


@pytest.fixture(scope="module")
def masked(wordpiece):
    """A masked-LM task, and 400 rows of 128 tokens with all specials in them."""
    modality = Text(TextOptions(length=128), wordpiece.state)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, wordpiece.state["vocabulary"], (400, 128)).astype(np.uint16)
    segments = np.ones_like(tokens)
    rows = rows_of(modality, {"tokens": tokens, "segments": segments}, "mlm")
    return task_of("transformers/bert", modality.inputs(), "mlm", **SMALL), rows


def test_masks_have_their_shares(masked):
    task, rows = masked
    batch = take(rows, np.arange(400))
    places, valid, tokens = task.objective.chosen_positions(batch)
    assert valid.all() and places.shape == (400, round(0.15 * 128))
    assert all(len(set(row)) == len(row) for row in places.tolist())
    old, new = batch["tokens"].gather(1, places), tokens.gather(1, places)
    mask, kept = (new == MASK).float().mean().item(), (new == old).float().mean().item()
    n = places.numel()
    assert mask == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5) and kept == pytest.approx(
        0.1, abs=4 * (0.09 / n) ** 0.5 + 0.01
    )
    random = new[(new != MASK) & (new != old)]
    # From all of the vocabulary
    assert len(random) / n == pytest.approx(0.1, abs=0.02) and len(random.unique()) > 150
    elsewhere = torch.ones_like(tokens, dtype=torch.bool).scatter(1, places, False)
    assert torch.equal(tokens[elsewhere], batch["tokens"][elsewhere])
    counts = torch.bincount(places.flatten(), minlength=128).float()
    assert counts.min() > 30 and counts.max() < 100  # anywhere in the row (57 on average)


def test_specials_are_never_predicted(masked):
    task, rows = masked
    batch = take(rows, np.arange(400))
    places, valid, _ = task.objective.chosen_positions(batch)
    assert (batch["tokens"].gather(1, places)[valid] >= 5).all()
    # Three tokens to choose from
    bare = batch.replace(
        tokens=torch.where(torch.arange(128) < 125, SEP, batch["tokens"].clamp(min=5))
    )
    places, valid, tokens = task.objective.chosen_positions(bare)
    assert valid.sum(1).tolist() == [3] * 400 and set(places[valid].tolist()) == {125, 126, 127}
    assert torch.equal(tokens[:, :125], bare["tokens"][:, :125])
    total, count, _ = task(bare)
    assert count == 1200 and torch.isfinite(total)


def test_a_row_of_specials_alone_counts_for_nothing(masked):
    task, rows = masked
    batch = take(rows, np.arange(2))
    empty = batch.replace(tokens=torch.full_like(batch["tokens"], PAD))
    total, count, logs = task(empty)
    assert count == 0 and total == 0 and logs["accuracy"] == 0


def test_masks_come_from_the_keys_alone(masked):
    task, rows = masked
    whole = task.objective.chosen_positions(take(rows, np.arange(20)))
    part = task.objective.chosen_positions(take(rows, [19, 4]))
    assert all(torch.equal(a[[19, 4]], b) for a, b in zip(whole, part, strict=True))
    other = task.objective.chosen_positions(take(rows, np.arange(20), seed=1))
    assert not torch.equal(whole[2], other[2])


def test_loss_of_masked_prediction_is_the_mean_over_what_was_chosen(masked):
    """Against the whole vocabulary at every position, looked up where something was chosen."""
    task, rows = masked
    batch = take(rows, np.arange(6))
    total, count, logs = task(batch)
    places, valid, tokens = task.objective.chosen_positions(batch)
    hidden = task.backbone(batch.replace(tokens=tokens), want=("tokens",)).tokens
    scores = (
        task.objective.transform(hidden) @ task.backbone.embedding().weight.T + task.objective.bias
    )
    chance = scores.log_softmax(-1)
    want = [
        -chance[i, p, batch["tokens"][i, p]]
        for i in range(6)
        for p, v in zip(places[i], valid[i], strict=True)
        if v
    ]
    torch.testing.assert_close(total, torch.stack(want).sum(), rtol=1e-5, atol=1e-5)
    assert count == len(want)
    found = task.objective.predict(task.backbone, batch)
    torch.testing.assert_close(found["loss"].sum(), total, rtol=1e-5, atol=1e-5)
    hits = sum(
        int(scores[i, p].argmax() == batch["tokens"][i, p]) for i in range(6) for p in places[i]
    )
    assert int(logs["accuracy"]) == hits
