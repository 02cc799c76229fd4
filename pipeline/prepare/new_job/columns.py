"""What the columns of a table seem to hold: labels, texts, names of files, groups and splits.

Names and values decide together. These are guesses, so the job that is written names each of them
and the columns that it passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_bytes, is_list, is_text
from pipeline.prepare.engine.importing import SPLITS, kind_of_files

LABELS = {
    "label", "labels", "target", "class", "category", "y", "outcome", "sentiment", "diagnosis",
    "finding", "findings", "species", "intent", "topic", "emotion", "genre", "churn", "survived",
    "died", "death", "mortality", "fraud", "spam", "rating", "stars", "grade", "digit", "word",
    "command", "disease", "event", "tag", "tags", "expire", "expired", "flag", "defect",
}  # fmt: skip
"""Words in the names of columns that are usually predicted."""
NUMBERS = {
    "price", "cost", "progression", "demand", "sales", "salary", "yield", "consumption", "revenue",
}  # fmt: skip
"""Words in the names of columns that are usually estimated, where they hold numbers."""
CODES = {"class", "category", "label", "code", "type"}
"""Words in the names of whole numbers that stand for classes."""
CLASS_WORDS = {
    "species", "diagnosis", "finding", "findings", "intent", "topic", "emotion", "genre", "digit",
    "word", "command", "disease", "event", "tag", "tags", "sentiment", "breed", "defect",
}  # fmt: skip
"""Words in the names of whole numbers that stand for classes, where a value stands in some rows."""
COUNTED = {
    "count", "counts", "number", "num", "length", "total", "time", "score", "rate", "age", "days",
}  # fmt: skip
"""Words beside those that make a number of them: word_count."""
CIRCUMSTANCES = {
    "id", "index", "age", "year", "date", "time", "sex", "gender", "view", "domain", "source",
    "corpus", "site", "hospital", "region", "country", "width", "height", "rate", "channels",
    "seconds", "duration", "take", "lang", "language", "file", "path", "title", "author", "fold",
    "batch", "cluster", "device", "scanner", "camera",
}  # fmt: skip
"""Words in the names of columns that are seldom predicted: circumstances of a row."""
GROUPS = {
    "patient", "subject", "speaker", "person", "user", "author", "client", "customer", "recording",
    "participant", "session", "scene", "group", "family", "household", "video", "donor", "animal",
}  # fmt: skip
"""Words in the names of columns whose rows belong together."""
JOINED = re.compile(rf"(?<![a-z])({'|'.join(sorted(GROUPS))})(id|no|nr|num|name)(?![a-z])")
"""A name of a group without a space, such as patientid."""
NAMING = {"id", "no", "nr", "num", "number", "name", "code", "key", "index", "uuid"}
"""Words beside that of a group which do not make it another thing: patient_id, not patient_type."""
MIN_GROUPS = 5
"""Fewer groups can hardly be shared out over three splits."""
TEXTS = (
    "text", "sentence", "review", "comment", "tweet", "message", "content", "body", "document",
    "utterance", "question", "description", "abstract", "summary", "query", "title", "headline",
)  # fmt: skip
"""Words in the names of texts, the likeliest first."""
TRANSCRIPTS = {"transcript", "transcription", "text", "sentence", "normalized_text"}
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
SERIES = {"series", "signal", "window", "waveform", "sensor", "ecg", "eeg", "observation"}
"""Words in the names of columns whose rows are series of numbers."""
NO_SERIES = {
    "embedding", "vector", "token", "id", "label", "tag", "target", "box", "bbox", "mask", "logit",
    "score", "probability", "action",
}  # fmt: skip
"""Words in the names of lists of numbers that are no series."""
IDS = {"id", "index", "idx", "uuid", "guid", "key", "unnamed"}
MAX_CLASSES = 1000
"""Values of a label."""
MAX_CODES = 20
"""Values of a label of whole numbers without a telling name."""
MAX_LETTERS = 60
"""Letters of a label of texts, on average."""
MAX_GROUPS = 50
"""Values of a label that names persons or other groups."""
MIN_ROWS = 5
"""A label with two values of at least so many rows is taken before others."""
MIN_WORDS, MIN_DISTINCT_SHARE = 6.0, 0.1
"""Words on average, and distinct share, of a text column without a telling name."""
NO_VALUES = ("bytes", "file", "list", "time", "other")
"""Kinds of columns of which no values are counted."""
SHOWN = 6
TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d(:?\d\d)?)?)?")
"""A text that is a date or a time, as CSV and JSON have them."""


@dataclass(frozen=True)
class Column:
    """A column of a sample of rows.

    Attributes:
        kind: text, whole, number, bool, bytes, file (bytes and path), list, time or other.
        rows: rows of the sample.
        present: how many have a value.
        counts: rows of each value, commonest first; empty for bytes, lists and others.
        letters, words: of a text, on average.
    """

    name: str
    kind: str
    rows: int
    present: int
    counts: dict[Any, int] = field(default_factory=dict[Any, int])
    letters: float = 0.0
    words: float = 0.0

    @property
    def distinct(self) -> int:
        return len(self.counts)

    @property
    def parts(self) -> set[str]:
        """The words of the name, in lower case: patient and id of patientID and patientid."""
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", self.name)
        found = re.findall(r"[a-z]+", JOINED.sub(r"\1 \2", spaced.lower()))
        return {*found, *(word.removesuffix("s") for word in found)}

    @property
    def is_unique(self) -> bool:
        return self.present > 1 and self.distinct == self.present

    def describe(self) -> str:
        """Return the name and what the column holds, without a value."""
        if self.kind in NO_VALUES:
            return f"{self.name} ({self.kind})"
        return f"{self.name} ({self.kind}, {self.distinct} different values)"


def _kind(kind: pa.DataType) -> str:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(plain):
        return "file" if {"bytes", "path"} & {one.name for one in plain} else "other"
    tests = {
        "text": is_text,
        "bytes": is_bytes,
        "list": is_list,
        "bool": pa.types.is_boolean,
        "whole": pa.types.is_integer,
        "time": pa.types.is_temporal,
        "number": lambda of: pa.types.is_floating(of) or pa.types.is_decimal(of),
    }
    return next((word for word, test in tests.items() if test(plain)), "other")


def profile(name: str, values: pa.ChunkedArray) -> Column:
    """Describe a column of a sample. Numbers that are all whole count as whole ones."""
    kind = _kind(values.type)
    rows, present = len(values), len(values) - values.null_count
    if kind in NO_VALUES:
        return Column(name, kind, rows, present)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    found = [value for value in values.to_pylist() if value is not None and value == value]
    if kind == "text":
        found = [value for value in found if value.strip()]
    if kind == "text" and found and all(map(TIME.fullmatch, found)):
        return Column(name, "time", rows, present)
    counts = dict(Counter(found).most_common())
    if kind == "number" and found and all(float(value).is_integer() for value in counts):
        kind = "whole"
    if kind != "text" or not found:
        return Column(name, kind, rows, len(found), counts)
    letters = float(np.mean([len(value) for value in found]))
    words = float(np.mean([len(value.split()) for value in found]))
    return Column(name, kind, rows, len(found), counts, letters, words)


def names_files(column: Column) -> str:
    """Return image or audio where nearly all values are names of such files, else ""."""
    return kind_of_files(column.counts) if column.kind == "text" else ""


def split_columns(columns: Iterable[Column]) -> list[Column]:
    """Return the columns whose values are train, test and the like, at least two of them."""
    return [
        column
        for column in columns
        if column.kind == "text"
        and 2 <= column.distinct <= 6
        and all(value.strip().lower() in SPLITS for value in column.counts)
        and "train" in {SPLITS[value.strip().lower()] for value in column.counts}
    ]


def group_columns(columns: Iterable[Column]) -> list[Column]:
    """Return the columns whose names say that their rows belong together (a patient).

    They have several values, some of them in several rows. The largest groups come first, as they
    keep the smaller ones together, too. Columns about a group (speaker_dialect) and those with very
    few values come last.
    """

    def order(column: Column) -> tuple[bool, bool, int]:
        speaks_of = any(word.removesuffix("s") not in GROUPS | NAMING for word in column.parts)
        return speaks_of, column.distinct < MIN_GROUPS, column.distinct

    found = [
        column
        for column in columns
        if column.kind in ("text", "whole")
        and column.letters <= MAX_LETTERS
        and column.parts & GROUPS
        and column.parts.isdisjoint({"age", "sex", "gender", "count"})
        and 2 < column.distinct < column.present
    ]
    return sorted(found, key=order)


def may_name_rows(column: Column) -> bool:
    """Tell whether a column may name rows or groups of rows.

    A sample cannot tell which: of each group it may hold one row.
    """
    if column.kind not in ("text", "whole") or column.letters > MAX_LETTERS:
        return False
    return bool(column.parts & GROUPS) or column.is_unique


def series_columns(schema: pa.Schema, columns: Iterable[Column], has_texts: bool) -> list[str]:
    """Return the columns whose rows are series of numbers, the likeliest first.

    They are structs of lists, lists of lists, or lists of numbers. Lists of whole numbers may be
    codes, so their names must say it; with ``has_texts``, a named column of texts, all must.
    """
    found: list[tuple[bool, str]] = []
    for column in columns:
        inner = _values_of_series(schema.field(column.name).type)
        named = bool(column.parts & SERIES)
        if inner is None or column.parts & NO_SERIES:
            continue
        if not named and (has_texts or pa.types.is_integer(inner)):
            continue
        found.append((not named, column.name))
    return [name for _, name in sorted(found, key=lambda one: one[0])]


def _values_of_series(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the numbers in a column of series, None for other columns."""
    if pa.types.is_struct(kind):
        inner = [field.type.value_type for field in kind if is_list(field.type)]
        kinds = inner if len(inner) == kind.num_fields else []
    elif is_list(kind):
        kinds = [kind.value_type.value_type if is_list(kind.value_type) else kind.value_type]
    else:
        kinds = []
    is_number = all(pa.types.is_integer(one) or pa.types.is_floating(one) for one in kinds)
    return kinds[0] if kinds and is_number else None


def text_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the columns of texts to read, the likeliest first."""
    scored: list[tuple[float, Column]] = []
    for column in columns:
        if column.kind != "text" or not column.counts or names_files(column):
            continue
        if "answer" in column.parts:  # what is asked for, not what is read
            continue
        varied = column.distinct >= MIN_DISTINCT_SHARE * column.present
        named = next((len(TEXTS) - i for i, word in enumerate(TEXTS) if word in column.parts), 0)
        is_long = column.words >= MIN_WORDS or (column.letters >= 40 and column.words < 1.5)
        if varied and (is_long or (named and column.words >= 2)):
            scored.append((100 * named + column.words, column))
    return [column for _, column in sorted(scored, key=lambda one: -one[0])]


def pair_of(text: Column, columns: Sequence[Column]) -> Column | None:
    """Return the second text of a pair (premise and hypothesis) whose first is given."""
    by_name = {column.name.lower(): column for column in columns}
    return next(
        (by_name.get(second) for first, second in PAIRS if text.name.lower() == first), None
    )


def label_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that can be a label of classes, the most plausible first.

    A telling name counts most; then few values, a text, and standing last.
    """
    scored: list[tuple[float, Column]] = []
    for place, column in enumerate(columns):
        named = is_named_label(column)
        if not can_be_label(column, named):
            continue
        score = 100.0 if column.name.lower() in LABELS else 50.0 if named else 0.0
        score += {"text": 6, "bool": 6, "whole": 4}.get(column.kind, 0)
        score += 5 if column.distinct == 2 else 3 if column.distinct <= MAX_CODES else 0
        score += 10 if place == len(columns) - 1 else 0
        score -= 12 if column.parts & CIRCUMSTANCES else 0
        score -= 40 if sorted(column.counts.values())[-2] < MIN_ROWS else 0
        scored.append((score, column))
    return [column for _, column in sorted(scored, key=lambda one: -one[0])]


def is_named_label(column: Column) -> bool:
    """Tell whether the name alone says that a column is a label."""
    return column.name.lower() in LABELS or bool(column.parts & LABELS)


def is_likely_label(column: Column) -> bool:
    """Tell whether a column may well be a label: its name says so, or speaks of no circumstance."""
    return is_named_label(column) or column.parts.isdisjoint(CIRCUMSTANCES)


def is_estimated(column: Column) -> bool:
    """Tell whether the values of a column are numbers to estimate, and no codes of classes.

    Codes are few whole numbers, or have the name of a code. They count up from 0 or 1 and occur in
    several rows, or have the name of a kind and occur twice or more on average.
    """
    if column.kind == "number":
        return column.distinct > 2 and column.present >= column.rows / 2
    if column.kind != "whole" or column.present < column.rows / 2:
        return False
    if column.distinct <= MAX_CODES or not column.parts.isdisjoint(CODES):
        return False
    names_kinds = not column.parts.isdisjoint(CLASS_WORDS) and column.parts.isdisjoint(COUNTED)
    if names_kinds and column.distinct <= min(MAX_CLASSES, column.present / 2):
        return False
    least, most = min(column.counts), max(column.counts)
    counts_up = least in (0, 1) and column.distinct >= 0.9 * (most - least + 1)
    return not (counts_up and column.present >= MIN_ROWS * column.distinct)


def number_columns(columns: Sequence[Column]) -> list[Column]:
    """Return the columns of numbers to estimate: telling names first, then from the last one."""
    found = [column for column in columns if is_estimated(column)]
    return sorted(reversed(found), key=lambda one: not is_named_number(one))


def is_named_number(column: Column) -> bool:
    """Tell whether the name alone says that a number is what is estimated."""
    is_named = column.name.lower() in LABELS or bool(column.parts & NUMBERS)
    return is_named and column.parts.isdisjoint(CIRCUMSTANCES)


def holds_numbers(column: Column) -> bool:
    """Tell whether a column's values can be numbers to estimate, even if they look like classes."""
    return column.kind in ("whole", "number") and column.distinct >= 2


def can_be_label(column: Column, named: bool = True) -> bool:
    """Tell whether classes can be read from a column, `named`: its name says so."""
    return not is_estimated(column) and holds_classes(column, named)


def holds_classes(column: Column, named: bool = True) -> bool:
    """Tell whether the values of a column can be classes, even if they look like numbers."""
    if column.kind not in ("text", "bool", "whole") or column.present < column.rows / 2:
        return False
    if column.kind == "text" and column.letters > MAX_LETTERS:
        return False
    most = MAX_CLASSES if named or column.kind == "text" else MAX_CODES
    return 2 <= column.distinct <= min(most, column.present / 2)


def label_set_columns(table: pa.Table, columns: Sequence[Column]) -> list[str]:
    """Return the columns that hold lists of texts with few different values: sets of labels."""
    found = []
    for column in columns:
        if column.kind != "list" or not is_text(table.schema.field(column.name).type.value_type):
            continue
        counts = Counter(table[column.name].combine_chunks().flatten().to_pylist())
        if 2 <= len(counts) <= MAX_CLASSES and sum(counts.values()) >= 2 * len(counts):
            found.append(column.name)
    return found


def tag_columns(table: pa.Table, columns: Sequence[Column]) -> tuple[str, str] | None:
    """Return the columns of words and of their tags, where two lists are equally long."""
    lists = [
        column.name
        for column in columns
        if column.kind == "list" and is_text(table.schema.field(column.name).type.value_type)
    ]
    for words in lists:
        for tags in lists:
            if words == tags or not re.search(r"tag|ner|pos|label", tags.lower()):
                continue
            same = pc.equal(pc.list_value_length(table[words]), pc.list_value_length(table[tags]))
            if pc.all(same).as_py():
                return words, tags
    return None


def label_copies(table: pa.Table, label: str, columns: Sequence[Column]) -> list[str]:
    """Return the columns that determine the label: another name for each of its values."""
    out = []
    labels = table[label].to_pylist()
    known = len({value for value in labels if value is not None})
    for column in columns:
        if column.name == label or column.distinct != known:
            continue
        pairs = {
            pair
            for pair in zip(labels, table[column.name].to_pylist(), strict=True)
            if None not in pair
        }
        if len(pairs) == known:
            out.append(column.name)
    return out


def id_columns(columns: Iterable[Column]) -> list[str]:
    """Return the columns that number or name the rows, each value once."""
    found = []
    for column in columns:
        if not column.is_unique or column.present < column.rows:
            continue
        values = list(column.counts)
        counted = column.kind == "whole" and max(values) - min(values) == len(values) - 1
        named = bool(column.parts & IDS) or column.name.lower().endswith("id")
        if column.kind == "text" or counted or (column.kind == "whole" and named):
            found.append(column.name)
    return found


def describe_counts(counts: dict[Any, int]) -> str:
    """Return the commonest values with their rows: "train (40 rows), test (10)"."""
    order = sorted(counts.items(), key=lambda one: -one[1])
    shown = ", ".join(
        f"{str(value)[:30]} ({count}{'' if place else ' rows'})"
        for place, (value, count) in enumerate(order[:SHOWN])
    )
    more = len(order) - SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
