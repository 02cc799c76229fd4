"""Extractive question answering: the answer is a span of the context, or there is none (SQuAD).

After Rajpurkar et al. 2016 and 2018. Shapes: B rows of a batch, n rows of a table, W windows of a
context, R windows of all rows of a batch, N tokens of a window.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_bytes, is_list, is_text
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.nn.eager import eager
from pipeline.core.windows import WINDOWS_AT_ONCE, has_windows, windows_as_rows
from pipeline.media.tagging_schemes import answer_scores, texts

SHOWN = 60
"""Characters of an answer that a message shows."""


class QAOptions(Options):
    max_answer_length: int = Field(
        30, ge=1, description="longest answer that is predicted, in tokens"
    )
    unanswerable: bool = Field(
        False,
        description="rows may be without an answer, and be predicted to have none (SQuAD v2.0)",
    )
    null_threshold: float = Field(
        0.0,
        description="unanswerable: a row is predicted to have none if the score of no answer is "
        "more than this above that of the best answer",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")


class Answers(NamedTuple):
    """The right answers of a row, where each begins, and "" or why they cannot be used."""

    texts: list[str]
    starts: list[int]
    reason: str


class QAState(TypedDict):
    """State of `QuestionAnswering`."""

    unanswerable: bool
    """Whether rows may have no answer."""


@register("objective", "qa", options=QAOptions)
class QuestionAnswering(Objective):
    """Extractive question answering: a linear head scores tokens as start and end (BERT).

    It needs questions, contexts, and answers that are parts of the contexts. Use it to find the
    answer in a text, not to write one.

    The modality reads the question as ``text`` and the context as ``text_pair``, which it cuts into
    windows.

    Columns, by role. Both may name SQuAD's one column {text, answer_start}.

    - ``answers``: a text or a list of texts, all of them right. No answer: null, an empty text or
      an empty list.
    - ``answer_start``: where each answer begins in the context, in characters

    The loss is BERT's (Devlin et al. 2019). Each window is an example: the mean of the cross
    entropies of the first and of the last token of the answer, over the window's positions. If the
    window does not hold the whole answer, both are its first position, [CLS]. It is summed over
    windows and divided by their number. When compiled, the last window is repeated without weight
    up to a round number of windows, so that few shapes are compiled.

    The predicted answer of a row is the best span over all windows: the largest sum of the scores
    of first and last token, among all spans of up to ``max_answer_length`` tokens. (The reference
    code tries 20 first and 20 last tokens.) The score of no answer is the smallest [CLS] score of
    the windows, as in the reference.

    Tensors: ``tokens``, ``mask``, ``types`` (B, W, N), ``offsets`` (B, W, N, 2), and ``span`` (B,
    2) int32: the characters of the first answer without outer spaces, (-1, -1) if there is none.
    """

    state: QAState
    roles = ("answers", "answer_start")
    metrics = ("answer_f1", "exact_match", "loss")
    transformers_head = TransformersHead(
        "ForQuestionAnswering",
        tensors=(
            ("head.weight", "qa_outputs.weight"),
            ("head.bias", "qa_outputs.bias"),
        ),
    )
    null_label_means = "a question that has no answer"
    raw_roles = ("answers", "answer_start", "text_pair")
    output_types = {}

    @classmethod
    def fit(cls, options, table, columns) -> QAState:
        """Keep whether rows may have no answer.

        Raises:
            ValueError: no context column, no answer at all, or rows without one where
                ``unanswerable`` is false.
        """
        if "text_pair" not in columns:
            raise ValueError(
                "question answering reads two texts: name them both (columns: {text: QUESTION, "
                "text_pair: CONTEXT})"
            )
        state: QAState = {"unanswerable": options.unanswerable}
        answers = _answers(table, columns)
        if not any(row.texts for row in answers):
            raise ValueError(
                f"column {columns['answers']}: none of {len(answers)} training rows has an answer"
            )
        _check_answered(answers, columns, state)
        return state

    @classmethod
    def encode(cls, table, columns, state: QAState) -> Arrays:
        """Return ``span`` (n, 2) int32, (-2, -2) for rows whose answers cannot be used.

        Raises:
            ValueError: rows without an answer where ``unanswerable`` is false.
        """
        if columns.get("answers") not in table.column_names:  # new rows to predict
            return {}
        answers = _answers(table, columns)
        _check_answered(answers, columns, state)
        span = np.full((len(table), 2), -2, dtype=np.int32)
        for i, row in enumerate(answers):
            if row.reason:
                continue
            span[i] = _stripped(row.texts[0], row.starts[0]) if row.texts else -1
        return {"span": span}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: QAState):
        """Name rows with an answer that is not where it should be, and where it is."""
        if columns.get("answers") not in table.column_names:
            return [""] * len(table)
        contexts: list[str | None] = [None] * len(table)
        if columns.get("text_pair") in table.column_names:
            contexts = [*_contexts(table, columns)]
        pairs = zip(_answers(table, columns), contexts, strict=True)
        return [answers.reason or _misplaced_reason(answers, context) for answers, context in pairs]

    def __init__(self, backbone: Backbone, options: QAOptions, state: QAState):
        super().__init__(backbone, options, state)
        if backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch.name} gives no tokens: question answering needs a backbone of "
                "texts (transformers/bert)"
            )
        self.head = nn.Linear(backbone.token_dim, 2)

    # ---------------------------------------------------------------- loss and predictions

    def logits(self, backbone, batch):
        return self.head(backbone(batch, want=("tokens",)).tokens)

    def raw_outputs(self, backbone, batch):
        """`start` and `end` (B, N): scores of each token as the first and last of the answer.

        A row is a question and one window of its context. The first token stands for no answer.
        """
        start, end = self.logits(backbone, batch).unbind(-1)
        return {"start": start, "end": end}

    def head_scores(self, backbone: Backbone, windows: Batch) -> tuple[Tensor, Features]:
        """Return scores (R, N, 2) as first and as last token, -inf at padding."""
        features = backbone(windows, want=("tokens",))
        assert features.tokens is not None
        tokens = F.dropout(features.tokens, self.options.dropout, self.training)
        scores = self.head(tokens).float()
        return scores.masked_fill(~windows["mask"][:, :, None], float("-inf")), features

    def _losses(self, scores: Tensor, windows: Batch) -> Tensor:
        """Return (R,)."""
        first, last = windows["target"].unbind(1)
        of_first = F.cross_entropy(scores[..., 0], first, reduction="none")
        of_last = F.cross_entropy(scores[..., 1], last, reduction="none")
        return (of_first + of_last) / 2

    def loss(self, backbone: Backbone, batch: Batch):
        windows, _ = flattened(batch, torch.compiler.is_compiling())
        scores, features = self.head_scores(backbone, windows)
        # a pooler is part of the graph: DDP waits for every parameter's gradient
        unused = features.pooled.float().sum() * 0.0
        total = (self._losses(scores, windows) * windows["weight"]).sum()
        return total + unused, windows["weight"].sum(), {}

    def _predict_windows(self, backbone: Backbone, windows: Batch) -> dict[str, Tensor]:
        """Return the ``best`` span's score (R,), its characters ``span`` (R, 2), and ``none``.

        ``none`` (R,) is the score of no answer; with answers also ``loss`` (R,).
        """
        scores, _ = self.head_scores(backbone, windows)
        offsets = windows["offsets"].long()
        most = self.options.max_answer_length
        is_context = (offsets[..., 0] >= 0)[..., None]
        inside = scores.masked_fill(~is_context, float("-inf"))
        padded = F.pad(inside[..., 1], (0, most - 1), value=float("-inf"))
        last = padded.unfold(1, most, 1)
        spans = (inside[..., :1] + last).flatten(1)
        best, index = spans.max(1)
        row = torch.arange(len(best), device=best.device)
        first = index // most
        end = torch.where(best.isfinite(), first + index % most, 0)
        begin_character = offsets[row, first, 0]
        end_character = offsets[row, end, 1]
        predictions = {
            "best": best,
            "span": torch.stack([begin_character, end_character], 1),
            "none": scores[:, 0].sum(1),
        }
        if "target" in windows.data:
            predictions["loss"] = self._losses(scores, windows)
        return predictions

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``answer`` (B, 2) int32 characters of the context, (-1, -1) for none.

        And ``score`` of the best span and ``null_score`` (B,); with answers ``loss`` and its
        ``count`` (B,).
        """
        windows, real = flattened(batch)
        predict_windows = partial(self._predict_windows, backbone)
        predicted = (
            windows.predict_in_parts(predict_windows, WINDOWS_AT_ONCE) if len(windows) else {}
        )

        def by_row(name: str, value: float) -> Tensor:
            """Return (B, W, ...) by row and window, ``value`` where there is no window."""
            shape = (*real.shape, 2) if name == "span" else real.shape
            out = torch.full(shape, value, device=real.device)
            if name in predicted:
                out[real] = predicted[name].to(out.dtype)
            return out

        score, window = by_row("best", float("-inf")).max(1)
        null = by_row("none", float("inf")).amin(1)
        is_none_likelier = null - score > self.options.null_threshold
        is_none_likelier = is_none_likelier & self.options.unanswerable
        has_no_answer = ~score.isfinite() | is_none_likelier
        row = torch.arange(len(batch), device=real.device)
        answer = by_row("span", -1)[row, window]
        answer = answer.masked_fill(has_no_answer[:, None], -1)
        predictions = {"answer": answer.to(torch.int32), "score": score, "null_score": null}
        if "span" in batch.data:
            predictions["loss"] = by_row("loss", 0.0).sum(1)
            predictions["count"] = real.sum(1).float()
        return predictions

    def postprocess(self, predictions, raw_rows):
        """Add ``exact`` and ``f1`` (n,): the best over a row's right answers.

        As the official script has it. Nothing is added to rows without answers.
        """
        if raw_rows.columns.get("answers") not in raw_rows.table.column_names:
            return predictions
        contexts = _contexts(raw_rows.table, raw_rows.columns)
        scores = []
        for right, context, span in zip(
            _answers(raw_rows.table, raw_rows.columns), contexts, predictions["answer"], strict=True
        ):
            first, last = span
            answer = context[first:last] if first >= 0 else ""
            scores.append(answer_scores(answer, right.texts))
        exact, f1 = np.array(scores).reshape(-1, 2).T
        return {**predictions, "exact": exact, "f1": f1}

    def output_columns(self, predictions, raw_rows):
        """Return ``answer`` ("": none), ``start`` and ``end``, and ``score``.

        Start and end are characters of the context, -1 without an answer.
        """
        contexts = _contexts(raw_rows.table, raw_rows.columns)
        answers = np.empty(len(contexts), dtype=object)
        spans = np.full((len(contexts), 2), -1, dtype=np.int64)
        pairs = zip(contexts, predictions["answer"].tolist(), strict=True)
        for row, (context, (first, last)) in enumerate(pairs):
            text = context[first:last] if first >= 0 else ""
            answers[row] = text.strip()
            if answers[row]:
                spans[row] = _stripped(text, first)
        return {
            "answer": answers,
            "start": spans[:, 0],
            "end": spans[:, 1],
            "score": predictions["score"],
        }


# ---------------------------------------------------------------- windows


@eager
def flattened(batch: Batch, rounded: bool = False) -> tuple[Batch, Tensor]:
    """Make the windows of all rows rows of their own.

    Args:
        rounded: repeat the last window, with a weight of 0, up to 4, 5, 6 or 7 times a power of
            two windows.

    Returns:
        The batch of R windows with ``target`` (R, 2) and ``weight`` (R,), and which windows
        (B, W) of the rows are real.

    Raises:
        ValueError: the rows have no windows.
    """
    if not has_windows(batch):
        raise ValueError(
            "question answering reads contexts in windows, and these rows have none: name columns "
            "text and text_pair, and give data.modality.text the option windows (the most that a "
            "context may take)"
        )
    windows, real = windows_as_rows(batch)
    row, data = real.nonzero()[:, 0], dict(windows.data)
    if "span" in batch.data:
        order = real.cumsum(1)[real]
        count = real.sum(1)[row]
        span = batch["span"][row].long()
        data["target"] = targets(data["offsets"].long(), span, order == 1, order == count)
    data["weight"] = torch.ones(len(row), device=row.device)
    if rounded and len(row):
        step = 1 << max(0, len(row).bit_length() - 3)
        padded_length = -(-len(row) // step) * step
        index = torch.arange(padded_length, device=row.device)
        repeated = index.clamp(max=len(row) - 1)
        row = row[repeated]
        data = {name: tensor[repeated] for name, tensor in data.items()}
        data["weight"] = (index < real.sum()).float()
    rows = batch.rows[row.cpu().numpy()]
    keys = batch.keys[row.to(batch.keys.device)]
    return Batch(rows, keys, data), real


def targets(offsets: Tensor, span: Tensor, opens: Tensor, closes: Tensor) -> Tensor:
    """Return (R, 2) int64 positions of the answer's first and last token in each window.

    (0, 0) where the window does not hold the whole answer. Characters that the tokenizer drops at
    either end of the context are in no window, which is why its first and last window count as
    reaching to its ends.

    Args:
        offsets: (R, N, 2) characters, -1 outside the context.
        span: (R, 2) the answer's characters.
        opens: (R,) whether the window is the context's first.
        closes: (R,) whether the window is the context's last.
    """
    begin, end = offsets.unbind(-1)
    is_context = end > begin
    overlaps = (end > span[:, :1]) & (begin < span[:, 1:])
    inside = is_context & overlaps
    low = torch.where(is_context, begin, torch.iinfo(torch.int64).max).amin(1)
    high = torch.where(is_context, end, -1).amax(1)
    holds_begin = opens | (low <= span[:, 0])
    holds_end = closes | (high >= span[:, 1])
    holds_answer = inside.any(1) & holds_begin & holds_end
    first = inside.int().argmax(1)
    from_the_end = inside.int().flip(1).argmax(1)
    last = inside.shape[1] - 1 - from_the_end
    positions = torch.stack([first, last], 1)
    return torch.where(holds_answer[:, None], positions, 0)


# ---------------------------------------------------------------- rows


def _contexts(table: pa.Table, columns: dict[str, str]) -> list[str]:
    """Return texts as the modality reads them."""
    return [value or "" for value in texts(table[columns["text_pair"]])]


def _column(table: pa.Table, columns: dict[str, str], role: str) -> list[Any]:
    """Return lists of values, one a row, empty for a null.

    Raises:
        ValueError: a column of another type.
    """
    column = table[columns[role]]
    name = columns[role]
    if pa.types.is_struct(column.type):  # SQuAD's {text, answer_start}
        inner = {"answers": "text", "answer_start": "answer_start"}[role]
        if column.type.get_field_index(inner) < 0:
            raise ValueError(f"column {name} holds {column.type}, without a field {inner}")
        column = pc.struct_field(column, inner)
    kind = column.type
    while is_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    holds_texts = is_text(kind) or is_bytes(kind)
    is_usable = holds_texts if role == "answers" else pa.types.is_integer(kind)
    if not pa.types.is_null(kind) and not is_usable:
        needed = "whole numbers or lists of them"
        if role == "answers":
            needed = "texts or lists of texts"
        raise ValueError(f"column {name} holds {column.type}: {role} are {needed}")
    values = texts(column) if holds_texts else column.to_pylist()
    return [_as_list(value) for value in values]


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _answers(table: pa.Table, columns: dict[str, str]) -> list[Answers]:
    """Return each row's right answers; without any both lists are empty, whatever begins."""
    starts_of_rows: list[Any] = [None] * len(table)
    if columns.get("answer_start") in table.column_names:
        starts_of_rows = _column(table, columns, "answer_start")
    answers_of_rows = []
    for answers, starts in zip(_column(table, columns, "answers"), starts_of_rows, strict=True):
        if not any(answers):
            answers_of_rows.append(Answers([], [], ""))
            continue
        reason = _invalid_answers_reason(answers, starts)
        answers_of_rows.append(Answers(answers, starts if starts is not None else [], reason))
    return answers_of_rows


def _invalid_answers_reason(answers: list[str | None], starts: list[int | None] | None) -> str:
    """Return "" or why the answers of a row cannot be used; without starts they can."""
    empty = [i for i, answer in enumerate(answers) if not (answer or "").strip()]
    if empty:
        return f"answer {empty[0]} of {len(answers)} is empty"
    if starts is None:
        return ""
    if len(starts) != len(answers):
        return f"{len(answers)} answers, but {len(starts)} answer starts"
    if None in starts:
        answer = answers[starts.index(None)] or ""
        return f"the start of answer {answer[:SHOWN]!r} is null"
    return ""


def _check_answered(answers: list[Answers], columns: dict[str, str], state: QAState) -> None:
    """Raise ValueError for rows without an answer where ``unanswerable`` is false."""
    without = sum(1 for row in answers if not row.texts and not row.reason)
    if without and not state["unanswerable"]:
        raise ValueError(
            f"column {columns['answers']}: {without} of {len(answers)} rows have no answer; set "
            "objective.unanswerable: true to predict that too, or leave them out (data.where)"
        )


def _stripped(answer: str, start: int) -> tuple[int, int]:
    """Return [begin, end) of an answer that begins at ``start``, without the spaces around it."""
    return start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())


def _misplaced_reason(answers: Answers, context: str | None) -> str:
    """Return "" or where the first misplaced answer is in the context instead."""
    if context is None:
        return ""
    for answer, start in zip(answers.texts, answers.starts, strict=True):
        if start >= 0 and context[start : start + len(answer)] == answer:
            continue
        shown = repr(answer[:SHOWN] + ("…" if len(answer) > SHOWN else ""))
        places = _places(answer, context)
        if not places:
            return f"answer {shown} is not at {start}; it stands nowhere in the context"
        nearest = min(places, key=lambda place: abs(place - start))
        return f"answer {shown} is not at {start}; it stands at {nearest}"
    return ""


def _places(answer: str, context: str) -> list[int]:
    """Return every place of the answer in the context."""
    places = []
    at = context.find(answer)
    while at >= 0:
        places.append(at)
        at = context.find(answer, at + 1)
    return places
