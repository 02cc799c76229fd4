"""Masked and causal language modelling: losses of transformers, whole words, bytes, generation."""

import base64
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers as hf
from toys import SMALL, sentences, task_of, text_modality

from pipeline.core.contracts import Batch, RawRows, Task
from pipeline.core.rng import uniform

VOCABULARY, LENGTH = 60, 40
SPECIALS = [0, 1, 2, 3, 4]
PAD, UNK, CLS, SEP = 0, 1, 2, 3
CONTINUING = np.arange(VOCABULARY) >= 35
"""Tokens 35 to 59 go on a word."""
INPUTS = {
    "vocabulary": VOCABULARY,
    "length": LENGTH,
    "specials": SPECIALS,
    "continuing": base64.b64encode(np.packbits(CONTINUING)).decode(),
}


def make(family: str, options: dict | None = None, inputs: dict | None = None, **backbone) -> Task:
    objective = "clm" if family == "gpt2" else "mlm"
    return task_of(
        f"transformers/{family}",
        inputs or INPUTS,
        objective,
        seed=3,
        options=options,
        **{**SMALL, **backbone},
    ).eval()


def shaken(task: Task, scale: float = 0.1) -> Task:
    """Weights that are not what they begin as, so that no bias and no norm can be forgotten
    unseen.
    """
    with torch.no_grad():
        for i, p in enumerate(task.parameters()):
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return task


def batch(keys=None, **tensors) -> Batch:
    n = len(tensors["tokens"])
    return Batch(np.arange(n), torch.arange(n) * 7919 + 11 if keys is None else keys, tensors)


def rows(n: int = 6, length: int = LENGTH, seed: int = 0) -> Batch:
    """Texts ``[CLS] ids [SEP]`` of several lengths with padding behind, as targets read them; the
    first one has no padding.
    """
    random = np.random.default_rng(seed)
    tokens, mask = np.full((n, length), PAD), np.zeros((n, length), dtype=bool)
    for i in range(n):
        size = length if i == 0 else int(random.integers(5, length))
        tokens[i, :size] = [CLS, *random.integers(5, VOCABULARY, size - 2), SEP]
        mask[i, :size] = True
    return batch(tokens=torch.from_numpy(tokens), mask=torch.from_numpy(mask))


def packed(n: int = 6, seed: int = 1) -> Batch:
    """Rows full of documents; the second one goes on a document that began in the row before."""
    random = np.random.default_rng(seed)
    tokens, segments = np.zeros((n, LENGTH), dtype=np.int64), np.zeros((n, LENGTH), dtype=np.int32)
    for i in range(n):
        at, number = 0, 1
        while at < LENGTH - 3:
            size = min(int(random.integers(3, 20)), LENGTH - at)
            tokens[i, at : at + size] = [CLS, *random.integers(5, VOCABULARY, size - 2), SEP]
            segments[i, at : at + size] = number
            at, number = at + size, number + 1
    tokens[1, 0] = 17
    return batch(tokens=torch.from_numpy(tokens), segments=torch.from_numpy(segments))


# ---------------------------------------------------------------- transformers' losses


def head_names(family: str) -> dict[str, str]:
    """Our names in the objective to transformers' names of the whole model."""
    dense, norm, bias = {
        "bert": (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
        ),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    }[family]
    return {
        f"transform.{place}.{part}": f"{name}.{part}"
        for place, name in ((0, dense), (2, norm))
        for part in ("weight", "bias")
    } | {"bias": bias}


def whole_model(task: Task, family: str):
    """transformers' model with its head, with the task's weights."""
    kind = {
        "bert": hf.BertForMaskedLM,
        "roberta": hf.RobertaForMaskedLM,
        "distilbert": hf.DistilBertForMaskedLM,
        "gpt2": hf.GPT2LMHeadModel,
    }[family]
    model = kind(task.backbone.model.config).eval()
    base = "transformer" if family == "gpt2" else family
    tensors = {
        f"{base}.{name}": tensor for name, tensor in task.backbone.model.state_dict().items()
    }
    if family != "gpt2":
        tensors |= {
            name: dict(task.objective.named_parameters())[own]
            for own, name in head_names(family).items()
        }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
        "vocab_projector.weight",
        "lm_head.weight",
    }
    assert not unexpected and set(missing) <= tied
    model.tie_weights()
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {}),
        ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("roberta", {}),
        ("roberta", {"hidden_act": "relu"}),
        ("distilbert", {}),
        ("distilbert", {"activation": "relu"}),
    ],
)
def test_masked_loss_is_that_of_transformers(family, config):
    """The same masks given to both: chosen positions with their labels, -100 elsewhere."""
    plain = make(family)
    task = shaken(
        make(family, config={**plain.backbone.model.config.to_dict(), **config})
        if config
        else plain
    )
    assert sorted(dict(task.objective.named_parameters())) == sorted(head_names(family))
    given = rows()
    places, valid, tokens = task.objective.chosen_positions(given)
    labels = torch.full_like(tokens, -100).scatter(
        1, places, torch.where(valid, given["tokens"].gather(1, places), -100)
    )
    assert not labels[~given["mask"]].ge(0).any()
    want = whole_model(task, family)(
        input_ids=tokens, attention_mask=given["mask"].long(), labels=labels
    ).loss
    total, count, logs = task(given)
    torch.testing.assert_close(total / count, want, rtol=1e-5, atol=1e-5)
    assert count == valid.sum() == labels.ge(0).sum() and 0 <= logs["accuracy"] <= count
    found = task.objective.predict(task.backbone, given)
    torch.testing.assert_close(
        found["loss"].sum() / found["count"].sum(), want, rtol=1e-5, atol=1e-5
    )
    assert set(found) == {"loss", "count"} and len(found["loss"]) == len(given)


@torch.no_grad()
def test_causal_loss_is_that_of_transformers():
    task, given = shaken(make("gpt2")), rows()
    labels = torch.where(given["mask"], given["tokens"], -100)
    want = whole_model(task, "gpt2")(
        input_ids=given["tokens"], attention_mask=given["mask"].long(), labels=labels
    ).loss
    total, count, _ = task(given)
    torch.testing.assert_close(total / count, want, rtol=1e-5, atol=1e-5)
    assert count == given["mask"].sum() - len(given)
    for i in range(len(given)):  # row by row, as predict writes it
        size = int(given["mask"][i].sum())
        alone = whole_model(task, "gpt2")(
            input_ids=given["tokens"][i : i + 1, :size], labels=given["tokens"][i : i + 1, :size]
        ).loss
        found = task.objective.predict(task.backbone, given)
        torch.testing.assert_close(
            found["loss"][i] / found["count"][i], alone, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_text_is_the_same_with_a_mask_and_as_one_segment(family):
    task, given = shaken(make(family)), rows()
    segments = given["mask"].to(torch.int32)
    as_segment = Batch(given.rows, given.keys, {"tokens": given["tokens"], "segments": segments})
    (a, n, _), (b, m, _) = task(given), task(as_segment)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert n == m


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bf16_loss_is_near(family):
    task, given = shaken(make(family)), packed()
    exact, _, _ = task(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, count, _ = task(given)
        found = task.objective.predict(task.backbone, given)
    assert (
        total.dtype == torch.float32
        and torch.isfinite(total)
        and found["loss"].dtype == torch.float32
    )
    torch.testing.assert_close(total / count, exact / count, rtol=0.02, atol=0.0)
    assert total != exact  # it did run in bf16


def test_bf16_gives_gradients_in_float32():
    task = make("bert").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _, _ = task(packed())
    total.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
        for p in task.parameters()
    )


# ---------------------------------------------------------------- what is chosen


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"whole_word": True}])
def test_only_chosen_positions_go_through_the_vocabulary(options):
    task, given, seen = make("bert", options), packed(), []
    task.objective.transform.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape)
    )
    task(given)
    assert seen == [(len(given), round(0.15 * LENGTH), SMALL["hidden"])]


def words_of(tokens: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """Places of the tokens of each word, by reading from left to right."""
    words: list[list[int]] = []
    for i, token in enumerate(tokens.tolist()):
        if token in SPECIALS:
            continue
        if (
            CONTINUING[token]
            and i
            and tokens[i - 1] not in SPECIALS
            and segments[i] == segments[i - 1]
        ):
            words[-1].append(i)
        else:
            words.append([i])
    return words


def drawn_words(row_tokens, row_segments, key, k: int) -> list[int]:
    """Places that are predicted: words in the order of their first token's number until one does
    not fit, in plain Python.
    """
    numbers = uniform(key[None], len(row_tokens))[0].tolist()
    out: list[int] = []
    for word in sorted(
        (w for w in words_of(row_tokens, row_segments) if len(w) <= k), key=lambda w: numbers[w[0]]
    ):
        if len(out) + len(word) > k:
            break
        out += word
    return sorted(out)


@pytest.mark.parametrize("share", [0.1, 0.15, 0.4, 0.97])
def test_whole_words_are_chosen(share):
    task, given = make("bert", {"whole_word": True, "mask_share": share}), packed(40)
    places, valid, tokens = task.objective.chosen_positions(given)
    assert places.shape == valid.shape == (40, max(1, round(share * LENGTH)))
    for i in range(40):
        found, k = (
            places[i][valid[i]].tolist(),
            max(1, round(share * int((given["segments"][i] > 0).sum()))),
        )
        assert sorted(found) == drawn_words(
            given["tokens"][i].numpy(), given["segments"][i].numpy(), given.keys[i], k
        ) and len(set(found)) == len(found)
        for word in words_of(given["tokens"][i].numpy(), given["segments"][i].numpy()):
            assert set(word) <= set(found) or not set(word) & set(found)
        untouched = torch.ones(LENGTH, dtype=torch.bool)
        untouched[found] = False
        assert torch.equal(tokens[i][untouched], given["tokens"][i][untouched])
    assert valid.sum() > 0.6 * valid.numel()


@pytest.mark.parametrize("options", [{}, {"whole_word": True}])
def test_padding_takes_no_share_of_the_masks(options):
    """A short text beside a long one: the tokens that are masked when it stands alone, a sixth of
    them.
    """
    task, given = make("bert", options), rows(30)
    places, valid, tokens = task.objective.chosen_positions(given)
    for i in range(30):
        size = int(given["mask"][i].sum())
        alone = {name: tensor[i : i + 1, :size] for name, tensor in given.data.items()}
        near, sound, masked = task.objective.chosen_positions(
            Batch(given.rows[i : i + 1], given.keys[i : i + 1], alone)
        )
        assert set(places[i][valid[i]].tolist()) == set(near[0][sound[0]].tolist()) and torch.equal(
            masked[0], tokens[i, :size]
        )
        assert valid[i].sum() <= max(1, round(0.15 * size)) and (
            options or valid[i].sum() == max(1, round(0.15 * size))
        )


def test_random_tokens_are_those_that_the_tokenizer_has():
    """An embedding padded to a round number has more rows; and a number just below one times the
    vocabulary may be rounded up to it.
    """
    config = {**make("bert").backbone.model.config.to_dict(), "vocab_size": 600}
    objective, given = make("bert", config=config).objective, packed(400)
    places, valid, tokens = objective.chosen_positions(given)
    new = tokens.gather(1, places)[valid]
    drawn = new[(new != SPECIALS[-1]) & (new != given["tokens"].gather(1, places)[valid])]
    assert len(drawn) > 100 and VOCABULARY - 10 < drawn.max() < VOCABULARY


def test_words_end_with_their_document():
    """Two documents without marks between them, the second one beginning with a token that goes on
    a word.
    """
    tokens = torch.tensor([[10, 40, 41, 42, 43, 11, 12, 13]]).expand(200, -1)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]], dtype=torch.int32).expand(200, -1)
    task = make("bert", {"whole_word": True, "mask_share": 0.375})
    places, valid, _ = task.objective.chosen_positions(batch(tokens=tokens, segments=segments))
    found = {tuple(sorted(p[v].tolist())) for p, v in zip(places, valid, strict=True)}
    assert (0, 1, 2) in found and any({3, 4} <= set(f) and not {0, 1, 2} & set(f) for f in found)
    assert all(len({0, 1, 2} & set(f)) in (0, 3) and len({3, 4} & set(f)) in (0, 2) for f in found)
    joined, sound, _ = task.objective.chosen_positions(
        batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))
    )
    # As one text the word has five tokens: more than the three places
    assert {tuple(sorted(p.tolist())) for p in joined} == {(5, 6, 7)} and sound.all()


def test_whole_words_of_a_row_depend_on_its_key_alone():
    task, given = make("bert", {"whole_word": True}), packed(12)
    whole = task.objective.chosen_positions(given)
    part = task.objective.chosen_positions(
        Batch(
            given.rows[5:7],
            given.keys[5:7],
            {name: tensor[5:7] for name, tensor in given.data.items()},
        )
    )
    assert all(torch.equal(a[5:7], b) for a, b in zip(whole, part, strict=True))
    other = task.objective.chosen_positions(Batch(given.rows, given.keys + 1, given.data))
    assert not torch.equal(whole[0], other[0])


def test_words_are_drawn_evenly():
    """Over many keys every word of a row is masked about as often as its neighbours of the same
    length.
    """
    n = 4000
    tokens = torch.tensor([[CLS, *range(5, 15), 40, 16, 41, 18, 19, 20, SEP]]).expand(n, -1)
    task = make("bert", {"whole_word": True, "mask_share": 0.3})
    places, valid, _ = task.objective.chosen_positions(
        batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))
    )
    rate = torch.zeros(tokens.shape).scatter(1, places, valid.float()).mean(0)
    singles = rate[[1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15, 16]]
    assert rate[0] == rate[-1] == 0 and (singles - singles.mean()).abs().max() < 0.04
    assert torch.equal(rate[10], rate[11]) and abs(rate[10] - singles.mean()) < 0.08


@pytest.mark.parametrize(
    ("family", "options", "inputs", "backbone", "message"),
    [
        (
            "bert",
            {"whole_word": True},
            {"vocabulary": 60, "length": 40, "specials": SPECIALS},
            {},
            "transformers/bert: whole_word needs the tokens that go on a word",
        ),
        ("bert", {}, INPUTS, {"pool": "pooler"}, "transformers/bert: mlm never reads the pooler"),
        (
            "bert",
            {},
            {**INPUTS, "specials": [0, 1, 2, 3, 3]},
            {},
            "token 3 is this tokenizer's mask and its sep too",
        ),
        (
            "gpt2",
            {"generate": 40},
            INPUTS,
            {},
            "generate 40 leaves no place for a text in the 40 positions of transformers/gpt2",
        ),
        (
            "gpt2",
            {"top_k": 5},
            INPUTS,
            {},
            "clm: top_k 5 draws from several tokens, temperature 0 always takes the likeliest",
        ),
    ],
)
def test_what_cannot_be_done_is_reported(family, options, inputs, backbone, message):
    with pytest.raises(ValueError, match=message):
        make(family, options, inputs, **backbone)


# ---------------------------------------------------------------- bytes


@torch.no_grad()
def test_causal_bytes_are_those_of_the_predicted_tokens():
    """Counted by hand: three bytes for each token that is not a document's first, of which only
    those with a token before them in the row are predicted.
    """
    task, given = make("gpt2"), packed()
    tokens, segments = given["tokens"].numpy(), given["segments"].numpy()
    first = tokens == CLS
    given = given.replace(
        bytes=torch.from_numpy((3.0 * ((segments > 0) & ~first).sum(1)).astype(np.float32))
    )
    found = task.objective.predict(task.backbone, given)
    by_hand = [3 * sum(s[i] == s[i - 1] > 0 for i in range(1, LENGTH)) for s in segments]
    assert found["bytes"].tolist() == pytest.approx(by_hand) and not first[1, 0] and first[0, 0]
    assert found["bytes"].shape == found["loss"].shape and "bytes" not in task.objective.predict(
        task.backbone, packed()
    )


@torch.no_grad()
def test_a_row_that_begins_with_the_end_of_a_document_counts_no_byte_of_it():
    """GPT-2's tokenizer has one token for beginning and end."""
    task = make("gpt2", inputs={**INPUTS, "specials": [2] * 5})
    tokens = torch.tensor([[2, 2, 10, 11, 12, 2], [2, 10, 11, 12, 13, 2], [9, 2, 2, 10, 11, 2]])
    segments = torch.tensor(
        [[1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2]], dtype=torch.int32
    )
    found = task.objective.predict(
        task.backbone,
        batch(tokens=tokens, segments=segments, bytes=torch.tensor([15.0, 15.0, 15.0])),
    )
    assert found["count"].tolist() == [4, 5, 4] and found["bytes"].tolist() == pytest.approx(
        [12, 15, 12]
    )


@torch.no_grad()
def test_masked_bytes_are_the_predicted_share():
    task, given = make("bert"), packed()
    given = given.replace(bytes=torch.arange(6).float() * 10 + 100)
    found = task.objective.predict(task.backbone, given)
    text = (given["tokens"] > 4).sum(1)
    torch.testing.assert_close(found["bytes"], given["bytes"] * found["count"] / text)
    assert "bytes" not in task.objective.predict(task.backbone, rows())
    # What is never predicted has bytes as well
    half = torch.where(torch.arange(given["tokens"].shape[1]) % 2 == 0, UNK, given["tokens"])
    found = task.objective.predict(task.backbone, given.replace(tokens=half))
    torch.testing.assert_close(
        found["bytes"], given["bytes"] * found["count"] / ((half == UNK) | (half > 4)).sum(1)
    )
    empty = batch(
        tokens=torch.tensor([[CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD]]),
        mask=torch.ones(1, 8, dtype=torch.bool),
        bytes=torch.zeros(1),
    )
    nothing = task.objective.predict(task.backbone, empty)
    assert nothing["bytes"] == 0 and nothing["count"] == 0 and nothing["loss"] == 0


# ---------------------------------------------------------------- generation

NEW = 12


@pytest.fixture(scope="module")
def writer() -> Task:
    """Weights large enough that what follows is not one token again and again."""
    return shaken(make("gpt2", {"generate": NEW}, positions=LENGTH + NEW), 0.5)


def generated(task: Task, given: Batch) -> list[list[int]]:
    found = task.objective.predict(task.backbone, given)["generated"]
    assert (
        found.shape == (len(given), task.objective.options.generate) and found.dtype == torch.int64
    )
    return found.tolist()


def without_end(row: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    text = row[mask]
    return text[:-1] if text[-1] == SEP else text


@torch.no_grad()
def test_greedy_text_is_that_of_transformers_and_of_each_row_alone(writer):
    given, model = rows(), whole_model(writer, "gpt2")
    found = generated(writer, given)
    for i in range(len(given)):
        prompt = without_end(given["tokens"][i], given["mask"][i])
        want = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=SEP,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        want = want[: want.index(SEP)] if SEP in want else want
        assert found[i] == want + [-1] * (NEW - len(want))
        single = Batch(
            given.rows[i : i + 1],
            given.keys[i : i + 1],
            {name: tensor[i : i + 1] for name, tensor in given.data.items()},
        )
        assert generated(writer, single) == [found[i]]
    assert len({tuple(row) for row in found}) > 3 and max(len(set(row)) for row in found) > 3


@torch.no_grad()
def test_text_ends_where_the_model_ends_it(writer, monkeypatch):
    given = rows()
    free = generated(writer, given)
    end = next(token for token in free[2] if token != free[2][0])
    monkeypatch.setattr(writer.objective, "end_id", end)
    # The texts' own end has that id too
    given = given.replace(tokens=torch.where(given["tokens"] == SEP, end, given["tokens"]))
    found = generated(writer, given)
    assert found == [
        row[: row.index(end)] + [-1] * (NEW - row.index(end)) if end in row else row for row in free
    ]
    assert any(row[-1] == -1 for row in found) and -1 in found[2] and found[2][0] != -1


@torch.no_grad()
def test_a_long_text_gives_its_last_tokens():
    task = shaken(make("gpt2", {"generate": NEW}), 0.5)  # 40 positions: 28 for the text
    given = rows()
    found = generated(task, given)
    prompt = without_end(given["tokens"][0], given["mask"][0])[-(LENGTH - NEW) :]
    short = batch(tokens=prompt[None], mask=torch.ones(1, len(prompt), dtype=torch.bool))
    assert generated(task, short) == [found[0]]


@torch.no_grad()
def test_drawn_text_follows_from_the_rows_key(writer):
    options = type(writer.objective.options)(generate=NEW, temperature=1.5, top_k=8)
    task = Task(writer.backbone, type(writer.objective)(writer.backbone, options, {})).eval()
    given = rows()
    found = generated(task, given)
    assert found == generated(task, given) and found != generated(writer, given)
    single = Batch(
        given.rows[3:4], given.keys[3:4], {name: tensor[3:4] for name, tensor in given.data.items()}
    )
    assert generated(task, single) == found[3:4]
    assert generated(task, Batch(given.rows, given.keys + 1, given.data)) != found
    sharp = Task(
        writer.backbone,
        type(writer.objective)(
            writer.backbone, type(options)(generate=NEW, temperature=1.5, top_k=1), {}
        ),
    ).eval()
    assert generated(sharp, given) == generated(writer, given)


def test_draws_have_the_probabilities_of_the_model(writer):
    """u on an even grid: each token comes as often as its probability says, to one grid step."""
    n = 20000
    scores = 2.0 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(n) + 0.5) / n
    for temperature, top_k in itertools.product((0.7, 2.0), (None, 5)):
        objective = type(writer.objective)(
            writer.backbone,
            type(writer.objective.options)(generate=1, temperature=temperature, top_k=top_k),
            {},
        )
        counts = objective.sample_tokens(scores.expand(n, -1), u).bincount(minlength=30).float() / n
        kept = (
            scores
            if top_k is None
            else torch.where(scores >= scores.topk(top_k).values[:, -1:], scores, -torch.inf)
        )
        assert (counts - (kept[0] / temperature).softmax(0)).abs().max() < 2.0 / n + 1e-5


@torch.no_grad()
def test_packed_rows_are_not_gone_on_with(writer):
    assert set(writer.objective.predict(writer.backbone, packed())) == {"loss", "count"}


@torch.no_grad()
def test_tokens_that_the_tokenizer_lacks_are_never_written():
    """An embedding padded to a round number has more rows than the tokenizer has tokens."""
    plain = make("gpt2")
    config = {
        **plain.backbone.model.config.to_dict(),
        "vocab_size": 64,
        "n_positions": LENGTH + NEW,
    }
    task = shaken(make("gpt2", {"generate": NEW}, config=config), 0.5)
    task.backbone.embedding().weight[VOCABULARY:] *= 50  # the likeliest by far
    assert max(itertools.chain.from_iterable(generated(task, rows()))) < VOCABULARY


@torch.no_grad()
def test_what_predict_writes_is_text():
    modality = text_modality("transformers/gpt2")
    task = shaken(make("gpt2", {"generate": 6}, modality.inputs(), positions=48), 0.3)
    texts = sentences(4)[0]
    table = pa.table({"text": texts})
    arrays, _ = modality.decode(table, {"text": "text"})
    given = batch(**modality.collate(arrays))
    found = {
        name: tensor.numpy()
        for name, tensor in task.objective.predict(task.backbone, given).items()
    }
    out = task.objective.output_columns(found, RawRows(table, {"text": "text"}, modality))
    assert set(out) == {"loss", "count", "perplexity", "generated"}
    assert out["perplexity"] == pytest.approx(np.exp(found["loss"] / found["count"]), rel=1e-5)
    ids = [[int(i) for i in row if i >= 0] for row in found["generated"]]
    assert out["generated"].dtype == object and out["generated"].tolist() == [
        modality.tokenizer.decode(row) for row in ids
    ]
    assert all(isinstance(text, str) for text in out["generated"]) and any(out["generated"])
    nothing = task.objective.output_columns(
        {"loss": np.zeros(2, np.float32), "count": np.array([0, 1], np.float32)},
        RawRows(table, {}, modality),
    )
    assert np.isnan(nothing["perplexity"][0]) and nothing["perplexity"][1] == 1
