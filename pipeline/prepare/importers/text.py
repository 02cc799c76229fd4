"""Corpora: documents of plain text, JSON Lines and Parquet, filtered where asked."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import registry
from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import is_text
from pipeline.media import minhash
from pipeline.prepare.engine.importing import Notes, Row, check_columns, parse_names
from pipeline.prepare.engine.inputs import (
    ROW_BYTES,
    InputFiles,
    InputSplit,
    SplitReader,
    check_kinds,
    decoded,
    find_inputs,
    plain_suffix,
    split_files,
    text_problem,
    whole_files,
)
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter
from pipeline.prepare.engine.value_types import ValueType, common_type, convert, type_of_value
from pipeline.prepare.readers import cleaning, parquet

PLAIN, LINES, PARQUET = (".txt", ".text"), (".jsonl", ".ndjson"), parquet.SUFFIXES
BATCH_ROWS = 256
REASONS = (
    "",
    "empty",
    "too short (min_chars)",
    "too long (max_chars)",
    "too few words (min_words)",
    "too few letters (min_letters)",
    "of another script (script)",
    "exact duplicate",
    "near duplicate",
)
EXACT, NEAR = 7, 8
RESERVED = ("text", "id", "split")


class TextOptions(Options):
    documents: Literal["line", "blank", "file"] = Field(
        "line",
        description="of plain text: a line, what stands between blank lines, or a file is one",
    )
    text: str = Field(
        "text", description="the column or field of the text in Parquet and JSON Lines"
    )
    keep: str = Field(
        "",
        description="further columns or fields to keep, such as url,date; values that are no "
        "number or text are kept as JSON",
    )
    dedup: Literal["none", "exact", "near"] = Field(
        "none",
        description="drop (exact) what is equal but for case and spaces, (near) what is alike too",
    )
    threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="near: the Jaccard similarity from which two documents are alike",
    )
    min_chars: int = Field(1, ge=0, description="shorter documents are dropped")
    max_chars: int = Field(0, ge=0, description="longer ones too; 0: no limit")
    min_words: int = Field(0, ge=0, description="documents of fewer words (by spaces) are dropped")
    min_letters: float = Field(
        0.0,
        ge=0,
        le=1,
        description="documents with a smaller share of letters among their characters (blanks "
        "aside) are dropped",
    )
    script: Literal[
        "",
        "latin",
        "cyrillic",
        "greek",
        "arabic",
        "hebrew",
        "devanagari",
        "bengali",
        "tamil",
        "thai",
        "georgian",
        "armenian",
        "hangul",
        "han",
        "hiragana",
        "katakana",
    ] = Field(
        "",
        description="documents with too few letters of this script are dropped; empty: any script",
    )
    min_script: float = Field(
        0.5, ge=0, le=1, description="the share of the letters that must be of the script"
    )
    split: str = Field(
        "",
        description="the split of all files; empty: from the file's name or folder "
        "(wiki.train.txt, dev/a.txt), else train",
    )


class Document(NamedTuple):
    """A text, its place in its file, and the kept columns."""

    place: int
    text: str
    kept: Row


class DroppedDocuments(NamedTuple):
    """Which documents of an input split are dropped, and the types of the kept columns.

    Attributes:
        is_dropped: (documents,) bool.
        types: of the kept columns.
    """

    is_dropped: np.ndarray
    types: dict[str, ValueType]


@register("importer", "text", options=TextOptions)
class Text(TableImporter):
    """Corpora of texts, for language models and other pretraining.

    It reads .txt, .jsonl (or .ndjson) and .parquet, also .gz and .zst: a file, folder, glob or
    archive.

    Columns: `text`, `id` (FILE:LINE, or FILE:ROW of Parquet) and those of `--set keep=a,b`.

    - Invalid rows: not UTF-8, a NUL character, null, not JSON, longer than 32 MiB.
    - Options drop further rows: by length, by letters, and exact or near duplicates. The first of
      several duplicates is kept, in the order test, validation, train: so what is tested on is not
      trained on.
    - `_summary.md` counts the dropped rows. `_dropped.parquet` lists each, with the reason and the
      id of the duplicate that was kept.
    - Finding duplicates takes 0.1 kB of memory for each document (exact), or 1.8 kB (near).
    """

    amounts = {"characters": "text"}

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.kept = parse_names(self.options.keep)
        wrong = [name for name in self.kept if name in RESERVED or name == self.options.text]
        if wrong:
            raise ValueError(
                f"--set keep={self.options.keep}: {wrong[0]} is a name of the corpus's own "
                "columns; rename it in the source, or leave it out"
            )

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        kinds = (*PLAIN, *LINES, *PARQUET)
        listed = find_inputs(source, kinds, self.options.split)
        check_kinds(listed, kinds)

        def cut(one: InputFiles) -> list[InputSplit]:
            suffix = plain_suffix(one.files[0][0].name)
            by_lines = suffix in LINES or (suffix in PLAIN and self.options.documents != "file")
            return split_files(one, part_bytes) if by_lines else whole_files(one)

        fingerprint = listed.fingerprint
        if self.options.dedup == "near":
            fingerprint += f" minhash {minhash.VERSION}"
        return parquet.split_files(listed, part_bytes, cut), fingerprint, listed.notes

    # ------------------------------------------------------------ documents

    def _documents(self, reading: SplitReader) -> Iterator[Document]:
        """Yield the documents of an input split in order; invalid ones go to `reading.bad`."""
        suffix = plain_suffix(reading.input_split.name)
        if suffix in PARQUET:
            yield from self._of_parquet(reading)
        elif suffix in LINES:
            yield from self._of_json(reading)
        elif self.options.documents == "file":
            raw = reading.whole(ROW_BYTES)
            text, problem = decoded(raw and raw.removeprefix(codecs.BOM_UTF8))
            if problem:
                reading.bad("whole", problem)
            else:
                yield Document(1, text, {})
        elif self.options.documents == "blank":
            yield from self._between_blanks(reading)
        else:
            for number, _, raw in reading.numbered():
                text, problem = decoded(raw)
                if problem:
                    reading.bad(number, problem)
                elif text.strip():
                    yield Document(number, text, {})

    def _between_blanks(self, reading: SplitReader) -> Iterator[Document]:
        """Yield documents between blank lines.

        A document belongs to the input split in which the blank line before it (or the file)
        begins.
        """
        held, first, reason, size, stop = [], 0, "", 0, reading.input_split.stop
        inside = not reading.input_split.start

        def done() -> Iterator[Document]:
            if reason:
                reading.bad(first, reason)
            elif held:
                yield Document(first, "\n".join(held), {})

        for number, begins, raw in reading.numbered(past_end=True):
            if raw is not None and not raw.strip():
                yield from done() if inside else ()
                held, first, reason, size, inside = [], 0, "", 0, True
                if 0 <= stop <= begins:
                    return
                continue
            if not inside:
                if 0 <= stop <= begins:
                    return
                continue
            first = first or number
            text, problem = decoded(raw)
            size += len(text) + 1
            if size > ROW_BYTES:
                problem = decoded(None)[1]
            reason = reason or problem
            if reason:
                held.clear()
            else:
                held.append(text)
        yield from done() if inside else ()

    def _of_json(self, reading: SplitReader) -> Iterator[Document]:
        for number, _, raw in reading.numbered():
            line, problem = decoded(raw)
            if problem or not line.strip():
                if problem:
                    reading.bad(number, problem)
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reading.bad(number, f"not JSON: {error}")
                continue
            text = row.get(self.options.text) if isinstance(row, dict) else None
            if not isinstance(row, dict) or not isinstance(text, str):
                wanted = self.options.text
                reading.bad(
                    number,
                    f"no text in field {wanted!r}; {registry.nearest(wanted, row)}"
                    if isinstance(row, dict)
                    else "no JSON object",
                )
                continue
            kept = {name: row.get(name) for name in self.kept}
            texts = {
                name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
                for name, v in kept.items()
            }
            problem = text_problem(text, "the text") or next(
                (w for name, v in texts.items() if (w := text_problem(v, name))), ""
            )
            if problem:
                reading.bad(number, problem)
            else:
                yield Document(number, text, kept)

    def _of_parquet(self, reading: SplitReader) -> Iterator[Document]:
        name = self.options.text
        check = partial(self._check_columns, reading.input_split.name)
        for before, batch in parquet.batches(reading, [name, *self.kept], BATCH_ROWS, check):
            column = batch[name]
            if pa.types.is_dictionary(column.type):
                column = column.cast(pa.string())
            kept = batch.select(self.kept).to_pylist()
            for i, data in enumerate(column.cast(pa.large_binary()).to_pylist()):
                row = before + i + 1
                is_long = data is not None and len(data) > ROW_BYTES
                text, problem = ("", "null") if data is None else decoded(None if is_long else data)
                if problem:
                    reading.bad(row, problem)
                else:
                    yield Document(row, text, kept[i] if self.kept else {})

    def _check_columns(self, place: str, schema: pa.Schema) -> None:
        """Raise ValueError for a wanted column that is missing, and for texts that are none."""
        kept = [("keep", name) for name in self.kept]
        check_columns(place, schema.names, ("text", self.options.text), *kept)
        kind = schema.field(self.options.text).type
        if not is_text(kind):
            raise ValueError(f"{place}: column {self.options.text!r} is {kind}, no text")

    # ------------------------------------------------------------ what is left out

    def _reason(self, text: str) -> int:
        """Return why a text is dropped, as an index in REASONS."""
        o = self.options
        stripped = text.strip()
        if not stripped:
            return 1
        if len(stripped) < o.min_chars:
            return 2
        if o.max_chars and len(stripped) > o.max_chars:
            return 3
        if o.min_words and len(stripped.split()) < o.min_words:
            return 4
        if o.min_letters or o.script:
            letters, own = cleaning.letter_shares(stripped, o.script)
            if letters < o.min_letters:
                return 5
            if o.script and own < o.min_script:
                return 6
        return 0

    def scan(self, reading: SplitReader) -> Scan:
        """Return place, reason and signature of each document, and types of the kept columns."""
        places, reasons, digests, signs = [], [], [], []
        types = dict.fromkeys(self.kept, ValueType.NULL)

        def staying() -> Iterator[str]:
            for place, text, kept in self._documents(reading):
                places.append(place)
                reasons.append(self._reason(text))
                for name, value in kept.items():
                    types[name] = common_type(types[name], type_of_value(value))
                if not reasons[-1]:
                    if self.options.dedup != "none":
                        digests.append(cleaning.digest(text))
                    yield text

        if self.options.dedup == "near":
            signs = list(minhash.signatures(staying()))
        else:
            for _ in staying():
                pass
        return {
            "rows": len(places),
            "places": np.array(places, dtype=np.int64),
            "reasons": np.array(reasons, dtype=np.uint8),
            "digests": np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2),
            "signs": np.array(signs, dtype=np.uint32).reshape(-1, minhash.NUM_PERM),
            "kinds": types,
        }

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        reasons = np.concatenate([scan["reasons"] for scan in scans])
        twins = self._alike(scans, reasons)
        cuts = np.cumsum([len(scan["reasons"]) for scan in scans])[:-1]
        types = dict.fromkeys(self.kept, ValueType.NULL)
        for name in self.kept:
            for scan in scans:
                types[name] = common_type(types[name], scan["kinds"][name])
        kept = [pa.field(name, of_column.column_type) for name, of_column in types.items()]
        columns = [pa.field("text", pa.string()), pa.field("id", pa.string()), *kept]
        selections = [DroppedDocuments(part > 0, types) for part in np.split(reasons, cuts)]
        counts = Counter(reasons[reasons > 0].tolist())
        notes = {
            "dropped": {REASONS[code]: count for code, count in sorted(counts.items())},
            "documents read": len(reasons),
        }
        if len(reasons) and reasons.all():
            why = ", ".join(f"{reason} {count}" for reason, count in notes["dropped"].items())
            raise ValueError(
                f"all of the {len(reasons)} documents would be dropped: {why}; loosen those options"
            )
        return InferredSchema(
            columns,
            selections,
            notes,
            dropped=self._list(input_splits, scans, reasons, twins) if counts else None,
        )

    def _alike(self, scans: list[Scan], reasons: np.ndarray) -> np.ndarray:
        """Return (n,) the first duplicate of each document; sets the `reasons` of later ones."""
        first = np.arange(len(reasons))
        if self.options.dedup == "none":
            return first
        remaining = np.flatnonzero(reasons == 0)
        same = cleaning.first_exact_duplicates(np.concatenate([scan["digests"] for scan in scans]))
        first[remaining] = remaining[same]
        reasons[remaining[same != np.arange(len(same))]] = EXACT
        if self.options.dedup == "near":
            alone = np.flatnonzero(same == np.arange(len(same)))
            like = cleaning.first_near_duplicates(
                np.concatenate([scan["signs"] for scan in scans])[alone], self.options.threshold
            )
            first[remaining[alone]] = remaining[alone[like]]
            reasons[remaining[alone[like != np.arange(len(like))]]] = NEAR
            first = first[first]  # an equal of one that is dropped
        return first

    def _list(
        self,
        input_splits: list[InputSplit],
        scans: list[Scan],
        reasons: np.ndarray,
        twins: np.ndarray,
    ) -> pa.Table:
        """List every dropped document: id, split, reason and the id of the kept duplicate."""
        places = np.concatenate([scan["places"] + scan["before"] for scan in scans])
        owner = np.repeat(np.arange(len(input_splits)), [len(scan["reasons"]) for scan in scans])
        gone = np.flatnonzero(reasons)

        def ids(rows: np.ndarray) -> list[str]:
            pairs = zip(owner[rows].tolist(), places[rows].tolist(), strict=True)
            return [f"{input_splits[number].name}:{place}" for number, place in pairs]

        has_twin = (twins[gone] != gone).tolist()
        named = zip(ids(twins[gone]), has_twin, strict=True)
        twin = [name if is_other else None for name, is_other in named]
        return pa.table(
            {
                "id": ids(gone),
                "split": [input_splits[input_split].split for input_split in owner[gone].tolist()],
                "reason": [REASONS[code] for code in reasons[gone].tolist()],
                "twin": pa.array(twin, pa.string()),
            }
        )

    def rows(self, reading: SplitReader) -> Iterator[Row]:
        selection: DroppedDocuments = reading.scan_result
        for number, (place, text, kept) in enumerate(self._documents(reading)):
            if not selection.is_dropped[number]:
                yield {
                    "text": text,
                    "id": reading.location(place),
                    **{key: convert(value, selection.types[key]) for key, value in kept.items()},
                }
