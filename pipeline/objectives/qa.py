"""Extractive question answering: the answer is a span of the context, or there is none (SQuAD;
Rajpurkar et al. 2016, 2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.media.tagging_schemes import answer_scores, texts

AT_ONCE = 32
"""Windows predicted at a time: evaluation hands over hundreds of rows of several windows each."""

SHOWN = 60
"""Characters of an answer that a message shows."""


class QAOptions(Options):
    max_answer_length: int = Field(
        30, ge=1, description="longest answer that is predicted, in tokens"
    )
    unanswerable: bool = Field(
        False,
        description="rows without an answer are allowed, and none may be predicted (SQuAD v2.0)",
    )
    null_threshold: float = Field(
        0.0,
        description="unanswerable: no answer where the score of none is higher than the best "
        "answer's by more than this",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")


@register("objective", "qa", options=QAOptions)
class QuestionAnswering(Objective):
    """A linear head that scores each token as the answer's first and as its last (BERT, Devlin et
    al. 2019).

    Columns: ``answers``, a text or a list of texts, all of them right; ``answer_start``, where each
    begins in the context, in characters; no answer: null, an empty text or an empty list. Both may
    name SQuAD's one column {text, answer_start}. The modality reads the question as ``text``, the
    context as ``text_pair``, cut into windows. Tensors: ``tokens``, ``mask``, ``types`` (B, W, N),
    ``offsets`` (B, W, N, 2) and ``span`` (B, 2) int32: the first answer's characters without outer
    spaces, (-1, -1) without one.

    The loss is BERT's: each window is an example, the mean of the cross entropies of first and last
    token over its positions; its first position, [CLS], where it does not hold the whole answer.
    Summed over windows, over their number. Compiled, the last window is read again, without weight,
    until there are a round number of them, so that few numbers are compiled for. The answer of a
    row is its best span over all windows, first plus last score, among all spans of up to
    ``max_answer_length`` tokens (the reference looks at 20 firsts and 20 lasts); the score of no
    answer is the smallest [CLS] score of its windows, as in the reference.
    """

    roles = ("answers", "answer_start")
    metrics = ("answer_f1", "exact_match", "loss")
    null_label_means = "a question that has no answer"
    label_tensors = ("span",)

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError without a context column, without any answer, and for rows without one
        where ``unanswerable`` is false.
        """
        if "text_pair" not in columns:
            raise ValueError(
                "question answering reads two texts: name them both (columns: {text: "
                "QUESTION, text_pair: CONTEXT})"
            )
        golds, state = _right_answers(table, columns), {"unanswerable": options.unanswerable}
        if not any(answers for answers, *_ in golds):
            raise ValueError(
                f"column {columns['answers']}: none of {len(golds)} training rows has an answer"
            )
        _answerable(golds, columns, state)
        return state

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """``span`` (n, 2) int32, (-2, -2) for rows that are refused. Raises ValueError as ``fit``
        does for rows without an answer.
        """
        if columns.get("answers") not in table.column_names:  # new rows to predict
            return {}
        span = np.full((len(table), 2), -2, dtype=np.int32)
        golds = _right_answers(table, columns)
        _answerable(golds, columns, state)
        for i, (answers, starts, reason) in enumerate(golds):
            if not reason:
                span[i] = _stripped(answers[0], starts[0]) if answers else -1
        return {"span": span}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Rows with an answer that does not stand where it is said to stand; where it does, is
        told.
        """
        if columns.get("answers") not in table.column_names:
            return [""] * len(table)
        contexts = (
            _contexts(table, columns)
            if columns.get("text_pair") in table.column_names
            else [None] * len(table)
        )
        return [
            reason
            or next(
                filter(
                    None,
                    (
                        _position_problem(answer, start, context)
                        for answer, start in zip(answers, starts, strict=True)
                    ),
                ),
                "",
            )
            for (answers, starts, reason), context in zip(
                _right_answers(table, columns), contexts, strict=True
            )
        ]

    def __init__(self, backbone: Backbone, options: QAOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        if backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch['name']} gives no tokens: question answering needs a backbone "
                "of texts (transformers/bert)"
            )
        self.head = nn.Linear(backbone.token_dim, 2)

    def _scores(self, backbone: Backbone, windows: Batch) -> tuple[Tensor, Features]:
        """(R, N, 2) scores as first and as last token, -inf at padding."""
        features = backbone(windows, want=("tokens",))
        assert features.tokens is not None
        scores = self.head(F.dropout(features.tokens, self.options.dropout, self.training)).float()
        return scores.masked_fill(~windows["mask"][:, :, None], float("-inf")), features

    def _losses(self, scores: Tensor, windows: Batch) -> Tensor:
        """(R,)"""
        first, last = windows["target"].unbind(1)
        return (
            F.cross_entropy(scores[..., 0], first, reduction="none")
            + F.cross_entropy(scores[..., 1], last, reduction="none")
        ) / 2

    def loss(self, backbone: Backbone, batch: Batch):
        # pyright: ignore[reportCallIssue, reportGeneralTypeIssues, reportArgumentType]
        windows, _ = flattened(batch, torch.compiler.is_compiling())
        scores, features = self._scores(backbone, windows)
        unused = (
            features.pooled.float().sum() * 0.0
        )  # a pooler belongs to the graph too: DDP waits for every parameter
        return (
            (self._losses(scores, windows) * windows["weight"]).sum() + unused,
            windows["weight"].sum(),
            {},
        )

    def _answers(self, backbone: Backbone, windows: Batch) -> dict[str, Tensor]:
        """Of each window the ``best`` span's score (R,), its characters ``span`` (R, 2), the score
        of ``none`` (R,), and ``loss`` where it is known.
        """
        scores, _ = self._scores(backbone, windows)
        offsets, most = windows["offsets"].long(), self.options.max_answer_length
        inside = scores.masked_fill((offsets[..., 0] < 0)[..., None], float("-inf"))
        last = F.pad(inside[..., 1], (0, most - 1), value=float("-inf")).unfold(1, most, 1)
        best, place = (inside[..., :1] + last).flatten(1).max(1)
        row, first = torch.arange(len(best), device=best.device), place // most
        end = torch.where(best.isfinite(), first + place % most, 0)
        out = {
            "best": best,
            "span": torch.stack([offsets[row, first, 0], offsets[row, end, 1]], 1),
            "none": scores[:, 0].sum(1),
        }
        return {**out, "loss": self._losses(scores, windows)} if "target" in windows.data else out

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``answer`` (B, 2) int32 characters of the context, (-1, -1) for none; ``score`` of the
        best span and ``null_score`` (B,); with answers ``loss`` and its ``count`` (B,).
        """
        # pyright: ignore[reportCallIssue, reportGeneralTypeIssues, reportArgumentType]
        windows, real = flattened(batch)
        parts = [self._answers(backbone, part) for part in windows.split(AT_ONCE) if len(part)]
        found = (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        )

        def spread(name: str, value: float) -> Tensor:
            """(B, W, ...) by row and window, ``value`` where no window is."""
            out = torch.full(
                (*real.shape, *((2,) if name == "span" else ())), value, device=real.device
            )
            if name in found:
                out[real] = found[name].to(out.dtype)
            return out

        score, window = spread("best", float("-inf")).max(1)
        null = spread("none", float("inf")).amin(1)
        nothing = ~score.isfinite() | (
            (null - score > self.options.null_threshold) & self.options.unanswerable
        )
        answer = spread("span", -1)[torch.arange(len(batch), device=real.device), window]
        out = {
            "answer": answer.masked_fill(nothing[:, None], -1).to(torch.int32),
            "score": score,
            "null_score": null,
        }
        return (
            {**out, "loss": spread("loss", 0.0).sum(1), "count": real.sum(1).float()}
            if "span" in batch.data
            else out
        )

    def postprocess(self, found, raw_rows):
        """``exact`` and ``f1`` (n,): the best over a row's right answers, as the official script
        has it; without them as it is.
        """
        if raw_rows.columns.get("answers") not in raw_rows.table.column_names:
            return found
        golds = (answers for answers, *_ in _right_answers(raw_rows.table, raw_rows.columns))
        contexts = _contexts(raw_rows.table, raw_rows.columns)
        said = [
            context[first:last] if first >= 0 else ""
            for context, (first, last) in zip(contexts, found["answer"], strict=True)
        ]
        scores = np.array(
            [answer_scores(answer, right) for answer, right in zip(said, golds, strict=True)]
        ).reshape(-1, 2)
        return {**found, "exact": scores[:, 0], "f1": scores[:, 1]}

    def output_columns(self, found, raw_rows):
        """``answer`` ("": none), ``start`` and ``end`` in characters of the context (-1: none), and
        ``score``.
        """
        answer, span = (
            np.empty(len(found["answer"]), dtype=object),
            np.full((len(found["answer"]), 2), -1, dtype=np.int64),
        )
        for i, (context, (first, last)) in enumerate(
            zip(_contexts(raw_rows.table, raw_rows.columns), found["answer"].tolist(), strict=True)
        ):
            answer[i] = context[first:last].strip() if first >= 0 else ""
            if answer[i]:
                span[i] = _stripped(context[first:last], first)
        return {"answer": answer, "start": span[:, 0], "end": span[:, 1], "score": found["score"]}


# ---------------------------------------------------------------- windows


@torch.compiler.disable
def flattened(batch: Batch, rounded: bool = False) -> tuple[Batch, Tensor]:
    """The real windows (R of them) of all rows as rows of their own, with ``target`` (R, 2) and
    ``weight`` (R,), and which windows (B, W) are real.

    ``rounded``: the last one again and again, with a weight of 0, up to 4, 5, 6 or 7 times a power
    of two.
    """
    if "offsets" not in batch.data or batch["offsets"].dim() != 4:
        raise ValueError(
            "question answering reads contexts in windows, and these rows have none: name "
            "columns text and text_pair, and give "
            "data.modality.text the option windows (the most that a context may take)"
        )
    real = batch["mask"].any(-1)
    row = real.nonzero()[:, 0]
    data = {
        name: batch[name][real]
        for name in ("tokens", "mask", "types", "offsets")
        if name in batch.data
    }
    if "span" in batch.data:
        order, count = real.cumsum(1)[real], real.sum(1)[row]
        data["target"] = targets(
            data["offsets"].long(), batch["span"][row].long(), order == 1, order == count
        )
    data["weight"] = torch.ones(len(row), device=row.device)
    if rounded and len(row):
        step = 1 << max(0, len(row).bit_length() - 3)
        place = torch.arange(-(-len(row) // step) * step, device=row.device)
        row, data = (
            row[place.clamp(max=len(row) - 1)],
            {name: tensor[place.clamp(max=len(row) - 1)] for name, tensor in data.items()},
        )
        data["weight"] = (place < real.sum()).float()
    return Batch(batch.rows[row.cpu().numpy()], batch.keys[row.to(batch.keys.device)], data), real


def targets(offsets: Tensor, span: Tensor, opens: Tensor, closes: Tensor) -> Tensor:
    """(R, 2) int64 places of the answer's first and last token in each window, (0, 0) where it does
    not hold the whole answer.

    offsets: (R, N, 2) characters, -1 outside the context. span: (R, 2) the answer's. opens, closes:
    (R,) whether the window is the context's first or last, so that nothing of the context lies
    before or behind it (characters that the tokenizer drops at either end are no other window's).
    """
    begin, end = offsets.unbind(-1)
    context = end > begin
    inside = context & (end > span[:, :1]) & (begin < span[:, 1:])
    low = torch.where(context, begin, torch.iinfo(torch.int64).max).amin(1)
    high = torch.where(context, end, -1).amax(1)
    whole = inside.any(1) & (opens | (low <= span[:, 0])) & (closes | (high >= span[:, 1]))
    first = inside.int().argmax(1)
    last = inside.shape[1] - 1 - inside.int().flip(1).argmax(1)
    return torch.where(whole[:, None], torch.stack([first, last], 1), 0)


# ---------------------------------------------------------------- rows


def _contexts(table: pa.Table, columns: dict[str, str]) -> list[str]:
    """Texts as the modality reads them."""
    return [value or "" for value in texts(table[columns["text_pair"]])]


def _column(table: pa.Table, columns: dict[str, str], role: str) -> list[Any]:
    """Lists of values, one a row. Raises ValueError for a column of another type."""
    column, name = table[columns[role]], columns[role]
    if pa.types.is_struct(column.type):  # SQuAD's {text, answer_start}
        inner = {"answers": "text", "answer_start": "answer_start"}[role]
        if column.type.get_field_index(inner) < 0:
            raise ValueError(f"column {name} holds {column.type}, without a field {inner}")
        column = pc.struct_field(column, inner)
    kind = column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = any(
        same(kind)
        for same in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )
    if not pa.types.is_null(kind) and not (
        text if role == "answers" else pa.types.is_integer(kind)
    ):
        what = "texts or lists of texts" if role == "answers" else "whole numbers or lists of them"
        raise ValueError(f"column {name} holds {column.type}: {role} are {what}")
    return [
        value if isinstance(value, list) else [] if value is None else [value]
        for value in (texts(column) if text else column.to_pylist())
    ]


def _right_answers(
    table: pa.Table, columns: dict[str, str]
) -> list[tuple[list[str], list[int], str]]:
    """For each row its right answers, where they begin, and "" or why they cannot be used. Without
    an answer both are empty, whatever begins.
    """
    out = []
    starts_given = (
        _column(table, columns, "answer_start")
        if columns.get("answer_start") in table.column_names
        else [None] * len(table)
    )
    for answers, starts in zip(_column(table, columns, "answers"), starts_given, strict=True):
        reason = ""
        if not any(answers):
            answers, starts = [], []
        elif empty := [str(i) for i, answer in enumerate(answers) if not (answer or "").strip()]:
            reason = f"answer {empty[0]} of {len(answers)} is empty"
        elif starts is not None and len(starts) != len(answers):
            reason = f"{len(answers)} answers, but {len(starts)} answer starts"
        elif starts is not None and None in starts:
            reason = f"the start of answer {answers[starts.index(None)][:SHOWN]!r} is null"
        out.append((answers, starts if starts is not None else [], reason))
    return out


def _answerable(
    golds: list[tuple[list[str], list[int], str]], columns: dict[str, str], state: dict[str, Any]
) -> None:
    without = sum(1 for answers, _, reason in golds if not answers and not reason)
    if without and not state["unanswerable"]:
        raise ValueError(
            f"column {columns['answers']}: {without} of {len(golds)} rows have no answer; set "
            "objective.unanswerable: true to predict that too, "
            "or leave them out (data.where)"
        )


def _stripped(answer: str, start: int) -> tuple[int, int]:
    """[begin, end) of an answer that begins at ``start``, without the spaces around it."""
    return start + len(answer) - len(answer.lstrip()), start + len(answer.rstrip())


def _position_problem(answer: str, start: int, context: str | None) -> str:
    """ "" or where the answer truly stands."""
    if context is None or (start >= 0 and context[start : start + len(answer)] == answer):
        return ""
    places, at = [], context.find(answer)
    while at >= 0:
        places.append(at)
        at = context.find(answer, at + 1)
    shown = repr(answer[:SHOWN] + ("…" if len(answer) > SHOWN else ""))
    return f"answer {shown} is not at {start}; " + (
        f"it stands at {min(places, key=lambda place: abs(place - start))}"
        if places
        else "it stands nowhere in the context"
    )
