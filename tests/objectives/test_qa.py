"""Question answering: columns of every form, answers that are not where they should be, the loss
against transformers', spans over windows.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.config import registry
from pipeline.core.contracts import Backbone, Batch, Features, RawRows, Task
from pipeline.core.metrics.catalog import metric
from pipeline.core.specs import Architecture
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.stream import Decoder, Rows
from pipeline.objectives import qa
from pipeline.objectives.qa import QAOptions, QuestionAnswering
from pipeline.train import loop
from tests import toys

COLUMNS = {
    "text": "question",
    "text_pair": "context",
    "answers": "answers",
    "answer_start": "starts",
}
INPUTS = {"vocabulary": 50, "length": 16, "specials": [0, 1, 2, 3, 4]}
CONTEXT = "Ada Lovelace was born in London, in 1815."


def table_of(answers, starts, contexts=None) -> pa.Table:
    return pa.table(
        {
            "question": ["Where?"] * len(answers),
            "context": contexts or [CONTEXT] * len(answers),
            "answers": answers,
            "starts": starts,
        }
    )


def golds(table, columns=COLUMNS) -> dict[str, Any]:
    return {
        "span": QuestionAnswering.encode(table, columns, {"unanswerable": True})["span"].tolist(),
        "bad": QuestionAnswering.invalid_label_reasons(table, columns, {}),
    }


def as_text(column: pa.Array) -> pa.Array:
    """Bytes under the type of texts, unlooked at, as files may hold them."""
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())


# ---------------------------------------------------------------- columns


def test_every_form_of_a_column_gives_the_same_spans():
    want = {"span": [[25, 31], [-1, -1]], "bad": ["", ""]}
    squad = pa.array(
        [
            {"text": ["London", "London,"], "answer_start": [25, 25]},
            {"text": [], "answer_start": []},
        ]
    )
    for answers, starts in (
        (["London", None], [25, None]),
        (["London", ""], [25, -1]),
        ([["London", "in London"], []], [[25, 22], []]),
        (
            pa.array([["London"], None], pa.large_list(pa.large_string())),
            pa.array([[25], None], pa.list_(pa.int16())),
        ),
        (pa.array(["London", None]).dictionary_encode(), [25, 0]),
        ([["London"], [""]], [[25], []]),
    ):
        assert golds(table_of(answers, starts)) == want
        sliced = pa.concat_tables([table_of(answers, starts)] * 2).slice(1, 2)
        assert golds(sliced) == {"span": [[-1, -1], [25, 31]], "bad": ["", ""]}
    columns = {**COLUMNS, "answer_start": "answers"}
    assert golds(pa.table({"context": [CONTEXT] * 2, "answers": squad}), columns) == want
    assert golds(
        pa.concat_tables([pa.table({"context": [CONTEXT] * 2, "answers": squad})] * 2).slice(1, 2),
        columns,
    )["span"] == [[-1, -1], [25, 31]]
    assert QuestionAnswering.encode(pa.table({"context": [CONTEXT]}), COLUMNS, {}) == {}
    # Outer spaces are no part of a span
    assert golds(table_of([" London,"], [24]))["span"] == [[25, 32]]


@pytest.mark.parametrize(
    ("answers", "starts", "reason"),
    [
        ("London", 22, "answer 'London' is not at 22; it stands at 25"),
        ("in", 24, "answer 'in' is not at 24; it stands at 22"),
        ("in", 30, "answer 'in' is not at 30; it stands at 33"),
        ("Paris", 3, "answer 'Paris' is not at 3; it stands nowhere in the context"),
        ("London", -1, "answer 'London' is not at -1; it stands at 25"),
        ("1815.", 900, "answer '1815.' is not at 900; it stands at 36"),
        (["London", "1815"], [25, 35], "answer '1815' is not at 35; it stands at 36"),
        (["London", "1815"], [25], "2 answers, but 1 answer starts"),
        (["London", ""], [25, 3], "answer 1 of 2 is empty"),
        (["London", None], [25, 3], "answer 1 of 2 is empty"),
        (["London"], [None], "the start of answer 'London' is null"),
        (" ", 3, "answer 0 of 1 is empty"),
        ([" ", "London"], [3, 25], "answer 0 of 2 is empty"),
        ("x" * 100, 0, f"answer {'x' * 60 + '…'!r} is not at 0; it stands nowhere in the context"),
    ],
)
def test_an_answer_that_is_not_in_its_place_is_refused(answers, starts, reason):
    one = golds(table_of([answers], pa.array([starts])))
    assert one["bad"] == [reason]
    assert one["span"] == [[-2, -2]] or reason.startswith("answer '")


def test_characters_are_those_of_the_text_and_not_bytes():
    context = "Zoë lebt in 東京 🙂 seit 1999."
    assert golds(table_of(["1999"], [context.index("1999")], [context])) == {
        "span": [[context.index("1999"), context.index("1999") + 4]],
        "bad": [""],
    }


@pytest.mark.parametrize(
    ("columns", "options", "answers", "message"),
    [
        ({"text": "question"}, {}, ["a"], r"question answering reads two texts: name them both"),
        ({}, {}, [None, ""], "column answers: none of 2 training rows has an answer"),
        (
            {},
            {},
            ["a", None, ""],
            "column answers: 2 of 3 rows have no answer; set objective.unanswerable: true",
        ),
        ({}, {}, [0.5], "column answers holds double: answers are texts or lists of texts"),
        (
            {"answer_start": "answers"},
            {},
            ["a"],
            "column answers holds string: answer_start are whole numbers",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_reported(columns, options, answers, message):
    table = pa.table({"answers": answers, "starts": [0] * len(answers)})
    with pytest.raises(ValueError, match=message):
        QuestionAnswering.fit(
            QAOptions(**options), table, columns if "text" in columns else {**COLUMNS, **columns}
        )


def test_a_row_that_is_not_utf8_spoils_itself_alone():
    """JSON Lines and Parquet hand on such bytes in columns of texts."""
    contexts = pa.array([CONTEXT.encode(), b"caf\xe9 of London", CONTEXT.encode()])
    table = table_of(["London", "London", b"Lon\xe9"], [25, 8, 25], contexts)
    for made in (table, table.set_column(1, "context", as_text(contexts))):
        assert golds(made)["bad"] == [
            "",
            "",
            "answer 'Lon\ufffd' is not at 25; it stands nowhere in the context",
        ]
        found = {"answer": np.array([[25, 31]] * 3), "score": np.zeros(3)}
        objective = words_task().objective
        assert objective.postprocess(found, RawRows(made, COLUMNS, None))["exact"][0] == 1
        assert (
            objective.output_columns(found, RawRows(made, COLUMNS, None))["answer"].tolist()[::2]
            == ["London"] * 2
        )


def test_rows_without_an_answer_need_the_option():
    table = pa.table({"answers": ["a", None], "starts": [0, None]})
    assert QuestionAnswering.fit(QAOptions(unanswerable=True), table, COLUMNS) == {
        "unanswerable": True
    }
    assert QuestionAnswering.encode(table, COLUMNS, {"unanswerable": True})["span"].tolist() == [
        [0, 1],
        [-1, -1],
    ]
    # Of any split: each is encoded before anything starts
    with pytest.raises(ValueError, match="1 of 2 rows have no answer"):
        QuestionAnswering.encode(table, COLUMNS, {"unanswerable": False})


# ---------------------------------------------------------------- windows


class Words(Backbone):
    """Each token's own vector, whatever stands around it: windows make no difference."""

    def __init__(self, vocabulary: int = 50, width: int = 8):
        nn.Module.__init__(self)
        self.table = nn.Embedding(vocabulary, width)
        self.pooled_dim = self.token_dim = width
        self.arch = Architecture("tests/words", {}, INPUTS)
        self.seen: list[int] = []

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        self.seen.append(len(batch))
        tokens = self.table(batch["tokens"])
        return Features(tokens.mean(1), tokens, batch["mask"])

    def layers(self):
        return {"table": ["table.weight"]}


def cut(
    rows: list[tuple[list[int], list[int]]], n: int, stride: int, most: int, spans=None
) -> Batch:
    """Windows of (question, context) ids as the modality makes them; a word of the context takes 3
    characters, after each stands a space.
    """
    shape = (len(rows), most, n)
    tokens, types, offsets, mask = (
        np.zeros(shape, np.int64),
        np.zeros(shape, np.uint8),
        np.full((*shape, 2), -1, np.int32),
        np.zeros(shape, bool),
    )
    for i, (question, context) in enumerate(rows):
        room = n - len(question) - 3
        starts = [0]
        while starts[-1] + room < len(context):
            starts.append(starts[-1] + room - stride)
        assert len(starts) <= most and room > stride
        for w, start in enumerate(starts):
            part = context[start : start + room]
            ids = [2, *question, 3, *part, 3]
            at = len(question) + 2
            tokens[i, w, : len(ids)], mask[i, w, : len(ids)], types[i, w, at : len(ids)] = (
                ids,
                True,
                1,
            )
            offsets[i, w, at : at + len(part)] = [
                (4 * k, 4 * k + 3) for k in range(start, start + len(part))
            ]
    data = {
        "tokens": torch.from_numpy(tokens),
        "types": torch.from_numpy(types),
        "offsets": torch.from_numpy(offsets),
        "mask": torch.from_numpy(mask),
    }
    if spans is not None:
        data["span"] = torch.tensor(spans, dtype=torch.int32)
    return Batch(np.arange(len(rows)), torch.arange(len(rows)), data)


def some(n: int = 6, seed: int = 0, longest: int = 40) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(5, 50, 3).tolist(), rng.integers(5, 50, rng.integers(4, longest)).tolist())
        for _ in range(n)
    ]


def words_task(seed: int = 0, **options) -> Task:
    torch.manual_seed(seed)
    backbone = Words()
    return Task(backbone, QuestionAnswering(backbone, QAOptions(**options), {})).eval()


def predicted(task: Task, batch: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {
            name: tensor.numpy()
            for name, tensor in task.objective.predict(task.backbone, batch).items()
        }


def test_the_answer_is_the_same_whatever_windows_the_context_is_cut_in():
    """Spans of up to 4 tokens in windows that share 4 or more: every span lies whole in some
    window, at borders too.
    """
    rows, task = some(12), words_task(max_answer_length=4)
    whole = predicted(task, cut(rows, 64, 0, 1))
    for n, stride, most in ((64, 10, 2), (20, 4, 4), (16, 4, 8), (12, 5, 40), (18, 9, 12)):
        parts = predicted(task, cut(rows, n, stride, most))
        assert np.array_equal(parts["answer"], whole["answer"]), (n, stride)
        assert np.allclose(parts["score"], whole["score"], atol=1e-6) and np.allclose(
            parts["null_score"], whole["null_score"], atol=1e-6
        )
    shorter = predicted(task, cut(rows, 12, 2, 40))
    assert (shorter["score"] <= whole["score"] + 1e-6).all()  # a span may be cut in every window


def test_spans_are_the_best_of_all_that_are_allowed():
    rows = some(8, seed=3)
    task = words_task(seed=4, max_answer_length=5)
    found = predicted(task, cut(rows, 20, 5, 8))
    with torch.no_grad():
        for i, (_, context) in enumerate(rows):
            scores = task.objective.head(task.backbone.table(torch.tensor(context))).numpy()
            spans = [
                (scores[a, 0] + scores[b, 1], a, b)
                for a in range(len(context))
                for b in range(a, min(a + 5, len(context)))
            ]
            best, first, last = max(spans)
            assert found["answer"][i].tolist() == [4 * first, 4 * last + 3] and found["score"][
                i
            ] == pytest.approx(best, abs=1e-6)


def test_no_answer_is_predicted_where_its_score_is_higher():
    rows = some(20, seed=1)
    batch = cut(rows, 20, 4, 8)
    plain = predicted(words_task(max_answer_length=4), batch)
    margin = plain["null_score"] - plain["score"]
    assert (plain["answer"] >= 0).all()
    for threshold in (float(np.median(margin)), float(margin.min() - 1), float(margin.max() + 1)):
        found = predicted(
            words_task(max_answer_length=4, unanswerable=True, null_threshold=threshold), batch
        )
        assert np.array_equal((found["answer"] == -1).all(1), margin > threshold)
        assert np.array_equal(
            found["answer"][margin <= threshold], plain["answer"][margin <= threshold]
        )
    task = words_task(max_answer_length=4)
    with torch.no_grad():  # the smallest over a row's windows, as the reference has it
        cls = task.objective.head(task.backbone.table(torch.tensor(2))).sum().item()
    assert np.allclose(plain["null_score"], cls, atol=1e-6)


def test_the_null_score_is_the_smallest_of_a_row_s_windows():
    task, batch = (
        toys.task_of("transformers/bert", INPUTS, "qa", {}, **toys.SMALL).eval(),
        cut(some(3, seed=8, longest=30), 16, 4, 8),
    )
    windows, real = qa.flattened(batch)
    with torch.no_grad():
        scores, _ = task.objective.head_scores(task.backbone, windows)
    row = real.nonzero()[:, 0]
    want = [scores[row == i, 0].sum(1).min().item() for i in range(3)]
    assert (
        predicted(task, batch)["null_score"] == pytest.approx(want, abs=1e-5)
        and (real.sum(1) > 1).any()
    )


def test_windows_are_predicted_in_parts(monkeypatch):
    rows, task = some(9, seed=5), words_task()
    batch = cut(rows, 16, 4, 8, [[4, 11]] * 9)
    whole = predicted(task, batch)
    # Real windows, each once
    assert (
        sum(task.backbone.seen) == batch["mask"].any(-1).sum()
        and max(task.backbone.seen) <= qa.WINDOWS_AT_ONCE
    )
    monkeypatch.setattr(qa, "WINDOWS_AT_ONCE", 4)
    task.backbone.seen.clear()
    parts = predicted(task, batch)
    assert max(task.backbone.seen) <= 4 and all(
        np.allclose(parts[name], whole[name], atol=1e-6) for name in whole
    )
    assert set(whole) == {"answer", "score", "null_score", "loss", "count"}


def test_a_row_without_windows_has_no_answer():
    """A row that could not be decoded is predicted from zeros."""
    batch = cut(some(3), 20, 4, 8)
    batch["mask"][1] = False
    found = predicted(words_task(), batch)
    assert found["answer"][1].tolist() == [-1, -1] and (found["answer"][[0, 2]] >= 0).all()
    batch["mask"][:] = False
    assert (predicted(words_task(), batch)["answer"] == -1).all()


# ---------------------------------------------------------------- loss


def test_targets_are_the_tokens_of_the_whole_answer_or_cls():
    """Beside the rule said plainly: a window holds the answer when it has all tokens that the whole
    context has of it.
    """
    rng, held = np.random.default_rng(2), [0, 0]
    rows = some(200, seed=6)
    spans = []
    for i, (_, context) in enumerate(rows):
        a, b = sorted(rng.integers(0, 4 * len(context), 2).tolist())
        a, b = (a + (a % 4 == 3), max(b, a + 1) + 1)  # no answer begins with a space
        spans.append([a, min(b - (b % 4 == 0), 4 * len(context) - 1)] if i % 10 else [-1, -1])
    batch = cut(rows, 16, 4, 12, spans)
    windows, real = qa.flattened(batch)
    row = real.nonzero()[:, 0].tolist()
    for r, target in enumerate(windows["target"].tolist()):
        context, (a, b) = rows[row[r]][1], spans[row[r]]
        tokens = (
            {k for k in range(len(context)) if 4 * k + 3 > a and 4 * k < b} if a >= 0 else set()
        )
        begins = (windows["offsets"][r, :, 0] // 4).tolist()
        if tokens and tokens <= set(begins):
            held[1] += 1
            assert target == [begins.index(min(tokens)), begins.index(max(tokens))]
        else:
            held[0] += 1
            assert target == [0, 0]
    assert min(held) > 50


def test_characters_that_the_tokenizer_drops_at_the_ends_do_not_lose_an_answer():
    offsets = torch.tensor([[[-1, -1], [1, 3], [4, 7], [-1, -1]]])
    yes, no = torch.tensor([True]), torch.tensor([False])
    for span, opens, closes, want in (
        ((0, 3), yes, no, [1, 1]),
        ((0, 3), no, no, [0, 0]),
        ((4, 8), no, yes, [2, 2]),
        ((4, 8), no, no, [0, 0]),
        ((1, 7), no, no, [1, 2]),
        ((3, 4), yes, yes, [0, 0]),
        ((8, 9), yes, yes, [0, 0]),
    ):
        assert qa.targets(offsets, torch.tensor([span]), opens, closes).tolist() == [want], span


def test_the_loss_is_that_of_transformers_question_answering():
    task = toys.task_of("transformers/bert", INPUTS, "qa", {}, **toys.SMALL).train()
    # Each fills its window: transformers counts padding, this loss does not
    rows = [
        ([5, 6, 7], list(range(10, 20))),
        ([8, 9, 5], list(range(30, 40))),
    ]
    batch = cut(rows, 16, 0, 2, [[8, 15], [-1, -1]])
    config = {**task.backbone.model.config.to_dict(), "num_labels": 2}
    model = hf.BertForQuestionAnswering(hf.BertConfig(**config)).train()
    report = model.load_state_dict(
        {
            **{f"bert.{n}": t for n, t in task.backbone.model.state_dict().items()},
            "qa_outputs.weight": task.objective.head.weight,
            "qa_outputs.bias": task.objective.head.bias,
        }
    )
    assert not report.missing_keys and not report.unexpected_keys
    windows, _ = qa.flattened(batch)
    assert windows["target"].tolist() == [[7, 8], [0, 0]]
    want = model(
        input_ids=windows["tokens"],
        attention_mask=windows["mask"].long(),
        token_type_ids=windows["types"].long(),
        start_positions=windows["target"][:, 0],
        end_positions=windows["target"][:, 1],
    )
    total, count, _ = task(batch)
    assert count == 2 and (total / count).item() == pytest.approx(want.loss.item(), abs=1e-6)
    (total / count).backward()
    want.loss.backward()
    assert torch.allclose(task.objective.head.weight.grad, model.qa_outputs.weight.grad, atol=1e-6)
    assert torch.allclose(
        task.backbone.embedding().weight.grad,
        model.bert.embeddings.word_embeddings.weight.grad,
        atol=1e-6,
    )


def test_the_loss_adds_up_over_rows_and_windows_and_padding_is_no_position():
    task = toys.task_of(
        "transformers/bert", {**INPUTS, "length": 24}, "qa", {}, **toys.SMALL
    ).eval()
    rows = some(5, seed=9)
    batch = cut(
        rows, 16, 4, 8, [[4 * (len(context) - 2), 4 * len(context) - 1] for _, context in rows]
    )
    total, count, _ = task(batch)
    assert count == batch["mask"].any(-1).sum()
    parts = [task(part) for part in batch.split(2)]
    assert (
        sum(p[0].item() for p in parts) == pytest.approx(total.item(), abs=1e-5)
        and sum(p[1] for p in parts) == count
    )
    wide = batch.replace(
        **{name: nn.functional.pad(batch[name], (0, 6)) for name in ("tokens", "types", "mask")},
        offsets=nn.functional.pad(batch["offsets"], (0, 0, 0, 6), value=-1),
    )
    assert task(wide)[0].item() == pytest.approx(total.item(), abs=1e-5)
    found = predicted(task, batch)
    assert found["loss"].shape == (5,) and metric("loss").value(found) == pytest.approx(
        (total / count).item(), abs=1e-6
    )
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize("backbone", ["roberta", "bert"])
def test_every_parameter_takes_part_in_the_reduction(backbone):
    """DDP waits for all of them, a pooler that answers do not need among them."""
    task = toys.task_of(
        f"transformers/{backbone}", INPUTS, "qa", {}, pool="pooler", **toys.SMALL
    ).train()
    task(cut(some(3), 16, 4, 12, [[4, 11]] * 3))[0].backward()
    assert all(p.grad is not None for p in task.parameters())
    assert not task.backbone.model.pooler.dense.weight.grad.any()


@pytest.mark.slow
def test_compiled_it_reads_few_numbers_of_windows():
    task = toys.task_of("transformers/bert", INPUTS, "qa", {}, **toys.SMALL).train()
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(task, dynamic=False, backend=backend), []
    for seed in range(12):
        rows = some(8, seed=seed, longest=34)
        batch = cut(rows, 16, 4, 12, [[4, 4 * len(context) - 1] for _, context in rows])
        counts.append(len(qa.flattened(batch, True)[0]))
        (total, count, _), (want, windows, _) = compiled(batch), task(batch)
        torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)
        assert count == windows == batch["mask"].any(-1).sum() <= counts[-1] <= 1.25 * windows
        total.backward()
    before = backend.frame_count
    real = {
        int(cut(some(8, seed=seed, longest=34), 16, 4, 12)["mask"].any(-1).sum())
        for seed in range(12)
    }
    assert len(set(counts)) < len(real) and before <= 2 * len(set(counts))


# ---------------------------------------------------------------- answers


def test_answers_are_scored_against_all_that_are_right():
    table = pa.table(
        {"context": [CONTEXT] * 5, "answers": [["Paris", "in London,"], ["1815"], [], [], ["Ada"]]}
    )
    found = {
        "answer": np.array([[22, 31], [33, 41], [-1, -1], [0, 3], [-1, -1]]),
        "score": np.zeros(5),
    }
    objective = words_task().objective
    done = objective.postprocess(found, RawRows(table, COLUMNS, None))
    assert done["exact"].tolist() == [1, 0, 1, 0, 0] and done["f1"] == pytest.approx(
        [1, 2 / 3, 1, 0, 0]
    )
    assert metric("exact_match").value(done) == pytest.approx(0.4) and metric("answer_f1").value(
        done
    ) == pytest.approx((2 + 2 / 3) / 5)
    assert objective.postprocess(found, RawRows(table.select(["context"]), COLUMNS, None)) is found
    none = objective.postprocess(
        {"answer": np.zeros((0, 2), np.int32)}, RawRows(table.slice(0, 0), COLUMNS, None)
    )
    assert none["f1"].shape == (0,)


def test_what_is_written():
    contexts = [CONTEXT, "a  b ", None, CONTEXT.encode()]
    found = {
        "answer": np.array([[25, 32], [1, 4], [-1, -1], [24, 31]], np.int32),
        "score": np.array([1.0, 2, 3, 4]),
    }
    table = pa.table(
        {"context": pa.array([c.encode() if isinstance(c, str) else c for c in contexts])}
    )
    out = words_task().objective.output_columns(found, RawRows(table, COLUMNS, None))
    assert out["answer"].tolist() == ["London,", "b", "", "London"]
    assert (
        out["start"].tolist() == [25, 3, -1, 25]
        and out["end"].tolist() == [32, 4, -1, 31]
        and out["score"].tolist() == [1, 2, 3, 4]
    )


def test_rows_without_windows_and_backbones_without_tokens_are_refused():
    task, batch = words_task(), cut(some(2), 20, 4, 8)
    with pytest.raises(
        ValueError, match="question answering reads contexts in windows, and these rows have none"
    ):
        task(
            Batch(
                batch.rows,
                batch.keys,
                {"tokens": batch["tokens"][:, 0], "mask": batch["mask"][:, 0]},
            )
        )
    with pytest.raises(
        ValueError, match="toys/net gives no tokens: question answering needs a backbone of texts"
    ):
        QuestionAnswering(toys.Net(), QAOptions(), {})


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(900)
def test_qa_learns_sixteen_questions_of_xquad(tmp_path):
    """Through the modality, contexts in windows, from scratch: 16 questions are learned by
    heart.
    """
    folder = Path(
        os.environ.get("ONETOMANY_DATA") or pytest.skip("ONETOMANY_DATA names no data folder"),
        "text",
        "xquad_en",
    )
    columns = {
        "text": "question",
        "text_pair": "context",
        "answers": "answer_text",
        "answer_start": "answer_start",
    }
    table = pq.read_table(folder / "xquad_en.parquet")
    state = QuestionAnswering.fit(QAOptions(), table, columns)
    assert not any(QuestionAnswering.invalid_label_reasons(table, columns, state))
    table = table.take(np.arange(0, len(table), len(table) // 16)[:16])
    pq.write_table(table, tmp_path / "rows.parquet")
    kind = registry.get("modality", "text")
    options = kind.options_class(length=128, vocabulary=3000, windows=8, stride=32)
    modality = kind(options, kind.fit(options, table, columns, "transformers/bert"))
    rows = Rows(
        Selection(manifests.build([str(tmp_path / "rows.parquet")], "parquet", str(tmp_path))),
        Decoder(modality, "qa", state, columns),
    ).in_memory(0.0)
    task = toys.task_of(
        "transformers/bert",
        modality.inputs(),
        "qa",
        state,
        layers=2,
        hidden=64,
        heads=2,
        dropout=0.0,
    )
    began = time.monotonic()
    run = toys.make_run(
        rows,
        task,
        steps=150,
        validation=rows,
        global_batch=16,
        lr=2e-3,
        keep="last",
        eval_every_steps=150,
    )
    found = loop.fit(run).curve[-1]
    print(found, time.monotonic() - began)
    assert found["answer_f1"] >= 0.95, found
