"""Tagging: tags of every kind of column, rows that are refused, the loss against transformers',
entities counted as seqeval counts them.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqeval.metrics as theirs
import torch
import transformers as hf
from seqeval.scheme import IOB2
from torch.nn import functional as F

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.core.contracts import Batch, RawRows, Task
from pipeline.core.metrics.catalog import metric
from pipeline.core.specs import ModalitySpec, ObjectiveSpec
from pipeline.data.stream import Decoder
from pipeline.objectives.tagging import Tagging, TaggingOptions
from pipeline.report import per_label
from pipeline.report.blocks import Heading, Table, Text
from pipeline.report.stats import RunPredictions
from pipeline.train import evaluate, loop
from tests import toys
from tests.report import test_per_label as test_labels

COLUMNS = {"text": "words", "tags": "tags"}
ROWS = [["B-per", "I-per", "O"], ["O"], ["B-loc", "O", "O", "B-per"]]
LABELS = ["O", "B-loc", "I-loc", "B-per", "I-per"]
NUMBERS = [[3, 4, 0], [0], [1, 0, 0, 3]]
INPUTS = {"vocabulary": 50, "length": 16, "specials": [0, 1, 2, 3, 4]}


def table_of(tags, words: Any = None, kind: Any = None) -> pa.Table:
    words = (
        [[f"w{i}" for i in range(len(row))] if row is not None else None for row in tags]
        if words is None
        else words
    )
    return pa.table({"words": pa.array(words), "tags": pa.array(tags, kind)})


def fitted(tags=None, **options) -> dict[str, Any]:
    return Tagging.fit(
        TaggingOptions(**{"max_words": 6, **options}),
        table_of(ROWS if tags is None else tags),
        COLUMNS,
    )


def padded(rows, width: int = 6) -> list[list[int]]:
    return [row + [-1] * (width - len(row)) for row in rows]


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "kind", ["lists", "large lists", "dictionary", "numbers", "number: tag", "chunks"]
)
def test_every_form_of_a_column_gives_the_same_tags(kind):
    names: Any = None
    tags = pa.chunked_array([pa.array(ROWS)])
    if kind == "large lists":
        tags = pa.chunked_array([pa.array(ROWS, pa.large_list(pa.large_string()))])
    if kind == "dictionary":
        flat = [tag for row in ROWS for tag in row]
        tags = pa.chunked_array(
            [
                pa.ListArray.from_arrays(
                    pa.array([0, 3, 4, 8], pa.int32()), pa.array(flat).dictionary_encode()
                )
            ]
        )
    if kind in ("numbers", "number: tag"):
        tags, names = pa.chunked_array([pa.array(NUMBERS, pa.list_(pa.int8()))]), LABELS
    if kind == "number: tag":
        tags = pa.chunked_array([pa.array([[n + 7 for n in row] for row in NUMBERS])])
        names = {i + 7: label for i, label in enumerate(LABELS)}
    if kind == "chunks":
        tags = pa.chunked_array([pa.array([["O"], *ROWS]).slice(1, 1), pa.array(ROWS).slice(1)])
    table = pa.table({"tags": tags})
    state = Tagging.fit(TaggingOptions(names=names, max_words=6), table, {"tags": "tags"})
    assert (state["labels"], state["types"], state["scheme"]) == (LABELS, ["loc", "per"], "bio")
    found = Tagging.encode(table, {"tags": "tags"}, state)["tags"]
    assert found.dtype == np.int16 and found.tolist() == padded(NUMBERS)
    assert Tagging.encode(table.slice(2), {"tags": "tags"}, state)["tags"].tolist() == padded(
        NUMBERS[2:]
    )
    assert Tagging.encode(table.slice(0, 0), {"tags": "tags"}, state)["tags"].shape == (0, 6)
    assert Tagging.invalid_label_reasons(table, {"tags": "tags"}, state) == [""] * 3
    assert Tagging.encode(pa.table({"words": [["a"]]}), COLUMNS, state) == {}


def test_plain_tags_and_given_schemes():
    plain = fitted([["NOUN", "VERB"], ["DET", "NOUN"]])
    assert (
        plain["labels"] == plain["types"] == ["DET", "NOUN", "VERB"] and plain["scheme"] == "none"
    )
    assert Tagging.encode(table_of([["VERB"]]), COLUMNS, plain)["tags"].tolist() == padded([[2]])
    assert fitted([["B-a", "I-a"]], scheme="none")["labels"] == ["B-a", "I-a"]
    assert fitted([["B-a", "O"]], scheme="bioes")["labels"] == ["O", "B-a", "I-a", "E-a", "S-a"]
    assert fitted([[0, 2], [1]])["labels"] == ["0", "1", "2"]  # numbers without names are classes
    whole = Tagging.fit(
        TaggingOptions(names=["O", "B-a", "I-a", "B-b", "I-b"]), table_of([[0, 1]]), COLUMNS
    )
    assert whole["types"] == ["a", "b"]  # what is named is known, also where no training row has it
    assert Tagging.encode(table_of([[3, 4]]), COLUMNS, whole)["tags"][0, :2].tolist() == [3, 4]


def test_the_scheme_decides_the_primary_metric():
    """Plain classes are told by word accuracy, as the field counts parts of speech; words that were
    cut off do not flatter it as they do entity_f1.
    """
    entities, plain = fitted(), fitted([["DET", "NOUN"], ["VERB"]])
    options = TaggingOptions()
    assert (
        Tagging.target_metrics(options, entities)
        == Tagging.source_metrics(options, entities)
        == ("entity_f1", "word_accuracy", "loss")
    )
    assert (
        Tagging.target_metrics(options, plain)
        == Tagging.source_metrics(options, plain)
        == ("word_accuracy", "entity_f1", "loss")
    )


@pytest.mark.parametrize(
    ("options", "tags", "message"),
    [
        ({}, [["B-a", "X"]], "column tags: tag 'X' has no prefix of a scheme"),
        ({}, [["B-a", "L-a"]], "column tags: tag 'L-a' is of the scheme BILOU"),
        ({"scheme": "bio"}, [["S-a"]], "column tags: tag 'S-a' is not of the scheme bio"),
        ({}, [["O"], ["O"]], "the training rows hold 1 different tags"),
        ({"names": ["O"]}, [["O"]], "objective.names: they are for a column of numbers"),
        (
            {"names": ["O", "B-a"]},
            [[0, 1, 2]],
            r"column tags: tag 2 of the training rows has no name in objective.names \(2 names\)",
        ),
        ({"names": ["O", "O"]}, [[0, 1]], "objective.names: two numbers have the same tag"),
        ({}, ["O", "B-a"], "column tags holds string: tags are a list of texts or whole numbers"),
        ({}, [[0.5]], "column tags holds list<.*double>: tags are a list"),
    ],
)
def test_columns_that_cannot_be_used_are_reported(options, tags, message):
    with pytest.raises(ValueError, match=message):
        Tagging.fit(TaggingOptions(**options), pa.table({"tags": tags}), COLUMNS)


def test_a_tag_that_training_never_has_is_told_with_its_nearest():
    state = fitted()
    with pytest.raises(
        ValueError,
        match=r"column tags: tag 'B-pre' is in no training row, nor in objective.names \(5 tags "
        r"known\); did you mean B-per or I-per\?",
    ):
        Tagging.encode(table_of([["O", "B-pre"]]), COLUMNS, state)
    # Though no training row has I-loc
    assert Tagging.encode(table_of([["B-loc", "I-loc"]]), COLUMNS, state)["tags"][
        0, :2
    ].tolist() == [1, 2]
    with pytest.raises(ValueError, match="tag '9' is in no training row"):
        Tagging.encode(table_of([[9]]), COLUMNS, fitted([[0, 1]], names=["O", "B-a"]))


def test_rows_that_cannot_be_used_are_refused_with_their_reason():
    bad = {
        "I-per O": "tag I-per of word 0 has no B-per before it (it is the first word); "
        "objective.repair: true reads such rows",
        "B-loc I-per": "tag I-per of word 1 has no B-per before it (word 0 is B-loc); "
        "objective.repair: true reads such rows",
        "O " * 7: "7 words, more than objective.max_words=6",
        "": "it has no words",
        "B-loc I-loc": "",
    }
    tags = [*(row.split() for row in bad), None, ["O", None], ["O", "O"], ["O"]]
    words = [*([["w"] * len(row.split()) for row in bad]), None, ["a", "b"], ["a", "b", "c"], None]
    # A null text is the modality's to tell
    want = [
        *bad.values(),
        "its tags are null",
        "the tag of word 1 is null",
        "3 words, but 2 tags",
        "",
    ]
    table, state = table_of(tags, words, pa.list_(pa.string())), fitted()
    assert Tagging.invalid_label_reasons(table, COLUMNS, state) == want
    assert Tagging.encode(table, COLUMNS, state)["tags"][4].tolist() == [1, 2, -1, -1, -1, -1]
    repaired = fitted(repair=True)
    assert Tagging.invalid_label_reasons(table.slice(0, 2), COLUMNS, repaired) == ["", ""]
    assert Tagging.encode(table.slice(0, 2), COLUMNS, repaired)["tags"].tolist() == padded(
        [[3, 0], [1, 3]]
    )
    numbered = fitted([[0, 2]], names=LABELS)
    assert Tagging.invalid_label_reasons(table_of([[0, 2]]), COLUMNS, numbered)[0].startswith(
        "tag I-loc of word 1 has no B-loc before it (word 0 is O)"
    )
    with pytest.raises(
        ValueError,
        match="column words holds string: tagging reads a list of words, one for each tag",
    ):
        Tagging.invalid_label_reasons(table_of([["O"]], ["a text"]), COLUMNS, state)


def test_test_rows_without_an_entity_are_reported():
    with pytest.raises(ValueError, match="none of these 2 rows holds an entity"):
        Tagging.check_test(TaggingOptions(), table_of([["O"], ["O", "O"]]), COLUMNS, fitted())
    Tagging.check_test(TaggingOptions(), table_of(ROWS), COLUMNS, fitted())


# ---------------------------------------------------------------- loss and predictions


def task_of(state=None, hidden: int = 16, seed: int = 0, dropout: float = 0.0, **options) -> Task:
    words = {"layers": 2, "hidden": hidden, "heads": 2, "dropout": dropout}
    return toys.task_of(
        "transformers/bert",
        INPUTS,
        "tagging",
        state or fitted(),
        seed,
        options={"max_words": 6, "dropout": dropout, **options},
        **words,
    )


def batch_of(tags: Any = NUMBERS, n: int = 10, seed: int = 0, cut: int | None = None) -> Batch:
    """Rows as the modality gives them: words of one or two sub-tokens between [CLS] and [SEP];
    words behind ``cut`` tokens have no position.
    """
    rng = np.random.default_rng(seed)
    tokens, words, mask = (
        np.zeros((len(tags), n), np.int64),
        np.full((len(tags), n), -1, np.int16),
        np.zeros((len(tags), n), bool),
    )
    for i, row in enumerate(tags):
        at = 1
        for number in range(len(row)):
            if at < (cut or n):
                words[i, at] = number
            at += int(rng.integers(1, 3))
        at = min(at, (cut or n) - 1)
        tokens[i, :at], tokens[i, 0], tokens[i, at], mask[i, : at + 1] = (
            rng.integers(5, 50, at),
            2,
            3,
            True,
        )
    data = {
        "tokens": torch.from_numpy(tokens),
        "words": torch.from_numpy(words),
        "mask": torch.from_numpy(mask),
        "tags": torch.tensor(padded(tags), dtype=torch.int16),
    }
    return Batch(np.arange(len(tags)), torch.arange(len(tags)), data)


def test_the_loss_is_that_of_transformers_token_classifier():
    """Labels at first sub-tokens, -100 elsewhere, as Hugging Face's own example aligns them."""
    task, batch = task_of().train(), batch_of()
    backbone = task.backbone
    model = hf.BertForTokenClassification(
        hf.BertConfig(
            **{**backbone.model.config.to_dict(), "num_labels": 5, "classifier_dropout": 0.0}
        )
    ).train()
    missing = model.load_state_dict(
        {
            **{f"bert.{n}": t for n, t in backbone.model.state_dict().items()},
            "classifier.weight": task.objective.head.weight,
            "classifier.bias": task.objective.head.bias,
        }
    )
    assert not missing.missing_keys and not missing.unexpected_keys
    labels_ = torch.full_like(batch["tokens"], -100)
    for i, place in (batch["words"] >= 0).nonzero().tolist():
        labels_[i, place] = NUMBERS[i][batch["words"][i, place]]
    want = model(input_ids=batch["tokens"], attention_mask=batch["mask"].long(), labels=labels_)
    total, count, logs = task(batch)
    assert count == 8 and (total / count).item() == pytest.approx(want.loss.item(), abs=1e-6)
    there = labels_ >= 0
    assert logs["accuracy"] == ((want.logits.argmax(-1) == labels_) & there).sum()
    (total / count).backward()
    want.loss.backward()
    assert torch.allclose(task.objective.head.weight.grad, model.classifier.weight.grad, atol=1e-6)
    assert torch.allclose(
        backbone.embedding().weight.grad,
        model.bert.embeddings.word_embeddings.weight.grad,
        atol=1e-6,
    )


def test_padding_and_micro_batches_change_nothing():
    task, batch = task_of().eval(), batch_of()
    total, count, _ = task(batch)
    parts = [task(part) for part in batch.split(1)]
    assert (
        torch.stack([p[0] for p in parts]).sum().item() == pytest.approx(total.item(), abs=1e-5)
        and sum(p[1] for p in parts) == count == 8
    )
    wide = batch.replace(
        **{
            name: F.pad(batch[name], (0, 5), value=-1 if name == "words" else 0)
            for name in ("tokens", "words", "mask")
        }
    )
    assert task(wide)[0].item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_predictions_are_counted_as_seqeval_counts_them(strict):
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 5, rng.integers(1, 7)).tolist() for _ in range(60)]
    task, batch = task_of(strict=strict).eval(), batch_of(rows, n=16)
    with torch.no_grad():
        found = {
            name: tensor.numpy()
            for name, tensor in task.objective.predict(task.backbone, batch).items()
        }
        total, count, _ = task(batch)
    y, p = (
        [[LABELS[k] for k in row if k >= 0] for row in tags]
        for tags in (padded(rows), found["prediction"].tolist())
    )
    assert [len(row) for row in p] == [len(row) for row in rows] and len(
        {tag for row in p for tag in row}
    ) > 2
    words = {"mode": "strict", "scheme": IOB2} if strict else {}
    assert found["hits"].shape == (60, 2) and metric("entity_f1").value(found) == pytest.approx(
        theirs.f1_score(y, p, **words), abs=1e-12
    )
    assert metric("word_accuracy").value(found) == pytest.approx(
        theirs.accuracy_score(y, p), abs=1e-12
    )
    assert metric("loss").value(found) == pytest.approx((total / count).item(), abs=1e-6)
    new = Batch(batch.rows, batch.keys, {name: batch[name] for name in ("tokens", "mask", "words")})
    assert (
        np.array_equal(
            task.objective.predict(task.backbone, new)["prediction"].numpy(), found["prediction"]
        )
        and len(new.data) == 3
    )


def test_words_that_were_cut_off_are_missed():
    task, batch = task_of().eval(), batch_of([[3, 4, 4, 4, 4, 4], [1, 0, 0, 0, 0, 3]], n=10, cut=4)
    assert (batch["words"] >= 0).sum() < 12
    with torch.no_grad():
        found = task.objective.predict(task.backbone, batch)
    last = batch["words"].amax(1)
    for i in range(2):
        assert (found["prediction"][i, last[i] + 1 :] == 0).all()
    assert (
        found["actual"].sum() == 3
        and found["words"].tolist() == [6, 6]
        and found["count"].sum() == (batch["words"] >= 0).sum()
    )
    plain = task_of(fitted([["A", "B", "C", "D", "E"]])).eval()
    with torch.no_grad():
        found = plain.objective.predict(plain.backbone, batch)
    assert (found["prediction"] < 0).sum() == (batch["words"] < 0).sum() - 2 * 10 + 12 and found[
        "actual"
    ].sum() == 12
    assert (
        found["guessed"].sum() == (batch["words"] >= 0).sum()
        and found["right"].tolist() == found["hits"].sum(1).tolist()
    )


def test_what_is_written():
    task = task_of()
    words = [["Ada", "Lovelace", "of", "London"], ["x"] * 8, ["a", "b"], None]
    prediction = np.array(padded([[3, 4, 0, 1], [0, 2, 2, 0, 0, 1], [0], [0]]), np.int16)
    out = task.objective.output_columns(
        {"prediction": prediction}, RawRows(pa.table({"words": words}), COLUMNS, None)
    )
    assert out["tags"].tolist() == [
        ["B-per", "I-per", "O", "B-loc"],
        ["O", "I-loc", "I-loc", "O", "O", "B-loc", None, None],
        ["O", None],
        [],
    ]
    assert out["entities"][0] == [
        {"type": "per", "first": 0, "last": 1, "text": "Ada Lovelace", "start": 0, "end": 12},
        {"type": "loc", "first": 3, "last": 3, "text": "London", "start": 16, "end": 22},
    ]
    assert [(e["type"], e["first"], e["last"]) for e in out["entities"][1]] == [
        ("loc", 1, 2),
        ("loc", 5, 5),
    ] and out["entities"][2] == []
    for name, kind in Tagging.output_types.items():
        assert pa.array(out[name].tolist(), kind).to_pylist() == out[name].tolist()
    strict = task_of(strict=True).objective.output_columns(
        {"prediction": prediction[:2]}, RawRows(pa.table({"words": words[:2]}), COLUMNS, None)
    )
    assert [e["first"] for e in strict["entities"][1]] == [5]
    plain = task_of(fitted([["A", "B", "C", "D", "E"]])).objective
    assert plain.output_columns(
        {"prediction": prediction[2:3]}, RawRows(pa.table({"words": words[2:3]}), COLUMNS, None)
    )["tags"].tolist() == [["A", None]]


def test_words_in_bytes_are_written_as_text():
    """As imports hand them on where a row of the file is not UTF-8; such a row has no prediction
    and stops no other one.
    """
    words = pa.array([[b"Zo\xc3\xab", b"Lovelace"], [b"caf\xe9"]], pa.list_(pa.binary()))
    as_text = pa.ListArray.from_arrays(
        words.offsets, pa.Array.from_buffers(pa.string(), 3, words.values.buffers())
    )
    for column in (words, as_text):
        found = {"prediction": np.array(padded([[3, 4], [3]]), np.int16)}
        out = task_of().objective.output_columns(
            found, RawRows(pa.table({"words": column}), COLUMNS, None)
        )
        assert out["entities"][0][0]["text"] == "Zoë Lovelace" and len(out["tags"][1]) == 1
        with pytest.raises(ValueError, match="tag 'caf\ufffd' is in no training row"):
            Tagging.encode(pa.table({"tags": as_text.slice(1)}), COLUMNS, fitted())
    assert (
        Tagging.invalid_label_reasons(
            pa.table({"tags": pa.chunked_array([table_of(ROWS)["tags"].chunk(0)])}),
            COLUMNS,
            fitted(),
        )
        == [""] * 3
    )


def test_every_parameter_takes_part_in_the_reduction():
    """DDP waits for all of them, a pooler that tags do not need among them."""
    backbone = toys.task_of(
        "transformers/bert",
        INPUTS,
        "tagging",
        fitted(),
        options={"max_words": 6},
        pool="pooler",
        **toys.SMALL,
    ).train()
    backbone(batch_of())[0].backward()
    assert (
        all(p.grad is not None for p in backbone.parameters())
        and not backbone.backbone.model.pooler.dense.weight.grad.any()
    )


def test_what_cannot_be_built_or_read_is_refused():
    with pytest.raises(
        ValueError, match="toys/net gives no tokens: tagging needs a backbone of texts"
    ):
        Tagging(toys.Net(), TaggingOptions(), fitted())
    task, batch = task_of(), batch_of()
    with pytest.raises(
        ValueError, match="tagging reads a list of words a row, and these rows are whole texts"
    ):
        task(Batch(batch.rows, batch.keys, {"tokens": batch["tokens"], "mask": batch["mask"]}))


def test_a_head_is_carried_over_by_the_names_of_its_tags(tmp_path):
    task = task_of()
    words = {
        "arch": task.backbone.arch,
        "objective": ObjectiveSpec("tagging", {"max_words": 6}, fitted()),
    }
    bundle.save(str(tmp_path / "b"), task, ModalitySpec("text", {}, {}))
    saved = bundle.load(str(tmp_path / "b"))
    turned = {**fitted(), "labels": [LABELS[k] for k in (0, 3, 4, 1, 2)], "types": ["per", "loc"]}
    again = bundle.build_task(words["arch"], replace(words["objective"], state=turned), seed=3)
    assert bundle.carry_head(again, saved) == "head kept: the same labels, put into their new order"
    assert torch.equal(again.objective.head.weight, task.objective.head.weight[[0, 3, 4, 1, 2]])
    other = bundle.build_task(
        words["arch"], replace(words["objective"], state=fitted([["B-per", "B-org"]])), seed=3
    )
    assert "new head" in bundle.carry_head(other, saved)


def test_the_options_norm_and_dropout_are_obeyed():
    batch = batch_of()
    for norm in (False, True):
        task = task_of(norm=norm).eval()
        tokens = task.backbone(batch, want=("tokens",)).tokens * 3 + 1
        scores = task.objective.head_scores(
            lambda *_, tokens=tokens, **__: type(
                "F", (), {"tokens": tokens, "pooled": tokens[:, 0]}
            )(),
            batch,
        )[0]
        assert torch.allclose(
            scores, task.objective.head(F.layer_norm(tokens, (16,)) if norm else tokens)
        )
    task = task_of(dropout=0.5).train()
    torch.manual_seed(0)
    assert task(batch)[0] != task(batch)[0]


# ---------------------------------------------------------------- the report


def test_the_report_tells_types_one_by_one():
    def run(seed: int, skill: float) -> RunPredictions:
        truth = np.random.default_rng(5).integers(0, 3, (80, 2))
        hits = np.random.default_rng([seed, int(10 * skill)]).binomial(truth, skill)
        return RunPredictions(
            np.arange(80),
            {"hits": hits, "guessed": hits + 1, "actual": truth, "loss": np.zeros(80)},
            seed,
            labels=("loc", "per"),
        )

    made = {
        ("none", "scratch"): [run(s, 0.3) for s in (0, 1, 2)],
        ("src", "full"): [run(s, 0.9) for s in (0, 1, 2)],
    }
    heading, text, listed = test_labels.said(*test_labels.table("entity_f1", made))
    assert (
        isinstance(heading, Heading)
        and isinstance(text, Text)
        and isinstance(listed, Table)
        and heading.text == "Type by type"
    )
    assert (
        list(listed.header) == ["Type", "Test entities", "F1", "F1, scratch", "F1, gain"]
        and "AUROC" not in text.text
    )
    p = made["src", "full"][0].predictions
    order = np.argsort(-p["actual"].sum(0))
    for k, line in zip(order, listed.rows, strict=True):
        assert (
            line[:2] == [("loc", "per")[k], str(p["actual"][:, k].sum())] and line[4].tone == "wins"
        )
        each = [
            2
            * r.predictions["hits"][:, k].sum()
            / (r.predictions["guessed"][:, k] + r.predictions["actual"][:, k]).sum()
            for r in made["src", "full"]
        ]
        assert float(line[2].lines[0]) == pytest.approx(np.mean(each), abs=0.006)
    assert per_label.label_blocks("t", [], [], {}) == []


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(600)
def test_tagging_learns_sixteen_rows_of_wnut():
    """Through the modality, from scratch: 16 rows with entities are learned by heart."""
    folder = Path(
        os.environ.get("ONETOMANY_DATA") or pytest.skip("ONETOMANY_DATA names no data folder"),
        "text",
        "wnut17_ner",
    )
    table, columns = pq.read_table(folder / "train.parquet"), {"text": "tokens", "tags": "ner_tags"}
    state = Tagging.fit(TaggingOptions(), table, columns)
    assert state["scheme"] == "bio" and state["types"] == [
        "corporation",
        "creative-work",
        "group",
        "location",
        "person",
        "product",
    ]
    assert not any(Tagging.invalid_label_reasons(table, columns, state))
    table = table.take(
        [i for i, tags in enumerate(table["ner_tags"].to_pylist()) if len(set(tags)) > 1][:16]
    )
    kind = registry.get("modality", "text")
    options = kind.options_class(length=64, vocabulary=2000)
    modality = kind(options, kind.fit(options, table, columns, "transformers/bert"))
    arrays, bad = Decoder(modality, "tagging", state, columns)(table)
    assert bad == [""] * 16
    rows = toys.rows_of(modality, arrays, "tagging", state)
    task = toys.task_of(
        "transformers/bert",
        modality.inputs(),
        "tagging",
        state,
        layers=2,
        hidden=64,
        heads=2,
        dropout=0.0,
    )
    run = toys.make_run(
        rows, task, steps=120, validation=rows, global_batch=16, lr=2e-3, keep="last"
    )
    outcome = loop.fit(run)
    print(outcome.curve[-1], outcome.seconds)
    assert outcome.curve[-1]["entity_f1"] >= 0.97, outcome.curve[-1]
    batch = toys.take(rows, np.arange(16))
    with torch.no_grad():
        found = {
            name: tensor.numpy()
            for name, tensor in task.eval().objective.predict(task.backbone, batch).items()
        }
    out = task.objective.output_columns(found, RawRows(table, columns, modality))
    y, p = table["ner_tags"].to_pylist(), out["tags"].tolist()
    assert theirs.f1_score(y, p) == pytest.approx(
        evaluate.compute_metrics(found, ("entity_f1",))["entity_f1"], abs=1e-12
    )
