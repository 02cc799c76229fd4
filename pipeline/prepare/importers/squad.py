"""Questions on paragraphs with answers as spans: SQuAD v1.1 and v2.0 (Rajpurkar et al.)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.io.json_values import JsonObject
from pipeline.prepare.engine.importing import Notes, Row
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, text_problem
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter
from pipeline.prepare.readers.archives import MAX_FILE_BYTES

SHOWN = 40
"""Characters of a text that a reason shows."""


class Question(TypedDict):
    """A row: a question on a paragraph, with its answers and where each begins."""

    id: str
    title: str
    context: str
    question: str
    answers: list[str]
    answer_start: list[int]


class SquadOptions(Options):
    repair: bool = Field(
        False,
        description="an answer that stands within 20 characters of its offset is moved there, in "
        "the place of a broken row",
    )
    split: str = Field(
        "",
        description="the split of all files; empty: from the file's name or folder "
        "(train-v2.0.json, dev-v1.1.json), else train",
    )


NEAR = 20
"""Most characters by which `repair` moves an answer."""


@register("importer", "squad", options=SquadOptions)
class Squad(TableImporter):
    """SQuAD v1.1 and v2.0: questions with answers from a text.

    It reads JSON files of articles with paragraphs, questions and answers: a file, folder, glob or
    archive, also .gz and .zst. A file is read whole, which takes about 10 times its size in memory.

    Columns: `id`, `title`, `context`, `question`, `answers` (list of texts) and `answer_start`
    (list of offsets in characters). Both lists are empty for a question that is marked unanswerable
    (is_impossible).

    Invalid rows: an answer that is not at its offset (the reason says where it is), an empty
    question or context, a question without answers that is not marked, a repeated id.
    """

    suffixes = (".json",)
    amounts = {"characters of questions": "question"}

    def scan(self, reading: SplitReader) -> Scan:
        """Return the ids of valid questions, to find repeated ones, and counts of questions."""
        ids, counts = [], Counter[str]()
        for row, reason, moved in self._questions(reading):
            ids.append("" if reason else row["id"])
            if reason:
                reading.bad(_name(row, len(ids)), reason)
            else:
                counts.update(
                    ["rows", *["unanswerable"] * (not row["answers"]), *["moved"] * moved]
                )
        return {"ids": ids, **{name: counts[name] for name in ("rows", "unanswerable", "moved")}}

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        seen: set[str] = set()
        repeated: list[frozenset[int]] = []
        for scan in scans:
            again = [
                i for i, name in enumerate(scan["ids"]) if name and (name in seen or seen.add(name))
            ]
            repeated.append(frozenset(again))
        total = {name: sum(scan[name] for scan in scans) for name in ("unanswerable", "moved")}
        notes: Notes = {"unanswerable questions": total["unanswerable"]}
        if self.options.repair:
            notes["answers moved to where they stand"] = total["moved"]
        texts = [pa.field(name, pa.string()) for name in ("id", "title", "context", "question")]
        return InferredSchema(
            [
                *texts,
                pa.field("answers", pa.list_(pa.string())),
                pa.field("answer_start", pa.list_(pa.int64())),
            ],
            repeated,
            notes,
        )

    def rows(self, reading: SplitReader) -> Iterator[Row]:
        for number, (row, reason, _) in enumerate(self._questions(reading)):
            if not reason and number in reading.scan_result:
                reason = "its id stood before"
            if reason:
                reading.bad(_name(row, number + 1), reason)
            else:
                yield dict(row)

    def _questions(self, reading: SplitReader) -> Iterator[tuple[Question, str, int]]:
        """Yield (row, "" or why it is invalid, number of moved answers) of each question."""
        for title, context, qa in _walk(_document(reading), reading.input_split.name):
            identifier = qa.get("id")
            texts: dict[str, Any] = {
                "id": "" if identifier is None else str(identifier),
                "title": title,
                "context": context,
                "question": qa.get("question"),
            }
            given: Any = qa.get("answers") or []
            reason = next(
                (
                    f"no {name}"
                    for name in ("id", "context", "question")
                    if not isinstance(texts[name], str) or not texts[name].strip()
                ),
                "",
            )
            reason = reason or next(
                (wrong for name in texts if (wrong := text_problem(texts[name], f"the {name}"))), ""
            )
            row = cast(Question, {**texts, "answers": [], "answer_start": []})
            moved = 0
            if not reason and qa.get("is_impossible") and given:
                reason = "is_impossible, and yet it has answers"
            elif not reason and not given and not qa.get("is_impossible"):
                reason = "no answers, and nothing marks it as unanswerable (is_impossible)"
            for answer in given if not reason else ():
                text, start, reason = self._span(context, answer)
                if reason:
                    break
                moved += start != answer["answer_start"]
                row["answers"].append(text)
                row["answer_start"].append(start)
            yield row, reason, moved

    def _span(self, context: str, answer: Any) -> tuple[str, int, str]:
        """Return (text, offset, "" or why the answer cannot be used)."""
        text, start = (
            (answer.get("text"), answer.get("answer_start"))
            if isinstance(answer, dict)
            else (None, None)
        )
        if (
            not isinstance(text, str)
            or not text.strip()
            or not isinstance(start, int)
            or isinstance(start, bool)
        ):
            return "", 0, f"an answer without text or answer_start: {_short(str(answer))}"
        if start >= 0 and context.startswith(text, start):
            return text, start, ""
        before = context.rfind(text, 0, max(0, start) + len(text))
        after = context.find(text, max(0, start))
        places = [place for place in (before, after) if place >= 0]
        nearest = min(places, key=lambda i: abs(i - start)) if places else None
        if nearest is not None and self.options.repair and abs(nearest - start) <= NEAR:
            return text, nearest, ""
        where = (
            "it stands nowhere in the context"
            if nearest is None
            else f"the nearest place is {nearest}"
        )
        return (
            "",
            0,
            f"answer {_short(text)} is not at {start}: there stands "
            f"{_short(context[max(0, start) :][: len(text)])}; {where}",
        )


def _name(row: Question, number: int) -> str:
    """Return the name of a question in the list of invalid rows.

    It is its id, or its number where the id cannot be written.
    """
    return f"question {number}" if not row["id"] or text_problem(row["id"], "id") else row["id"]


def _short(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _document(reading: SplitReader) -> Any:
    """Parse a file's JSON; bytes that are not UTF-8 only invalidate the rows with them."""
    data = reading.whole()
    if data is None:
        raise ValueError(
            f"{reading.input_split.name}: more than {MAX_FILE_BYTES >> 20} MiB of JSON; cut it "
            "into several files"
        )
    try:
        return json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{reading.input_split.name}: not JSON ({error}); download it again"
        ) from None


def _walk(document: Any, name: str) -> Iterator[tuple[str, Any, JsonObject]]:
    """Yield (title, context, question) of all questions. Raises ValueError for other JSON."""
    try:
        for number, article in enumerate(document["data"]):
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    if not isinstance(qa, dict):
                        raise TypeError(f"a question of article {number} is no object")
                    title = article.get("title", "")
                    yield (
                        title if isinstance(title, str) else str(title),
                        paragraph.get("context"),
                        qa,
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: not of SQuAD's layout, data[].paragraphs[].qas[] with context "
            f"({type(error).__name__}: {error})"
        ) from None
