"""Named entities, one word a line: CoNLL-2003 (Tjong Kim Sang and De Meulder), WNUT 2017."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.media.tagging_schemes import check
from pipeline.prepare.engine.importing import Notes, Row, first_few
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, decoded
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter

SUFFIXES = (
    ".conll",
    ".txt",
    ".tsv",
    ".bio",
    ".iob",
    ".iob2",
    ".bioes",
    ".train",
    ".valid",
    ".dev",
    ".test",
    ".testa",
    ".testb",
    ".annotated",
)
DOCUMENT = "-DOCSTART-"
MAX_WORDS = 100_000
"""A longer sentence means a file without blank lines."""
WIDEST = 100


class ConllOptions(Options):
    word_column: int = Field(
        0, description="where the word stands in a line, from 0; from the end when negative"
    )
    tag_column: int = Field(-1, description="where the tag stands, likewise")
    separator: Literal["whitespace", "tab"] = Field(
        "whitespace", description="what stands between the columns"
    )
    scheme: Literal["auto", "bio", "bioes", "iob1", "none"] = Field(
        "auto",
        description="of the tags; iob1 (the original CoNLL-2003 files) is written as bio; auto "
        "finds it out; none: tags of another kind",
    )
    repair: bool = Field(
        False,
        description="an I- with no B- before it becomes B-, in the place of a broken sentence "
        "(bio)",
    )
    comment: str = Field(
        "", description="lines that begin with it are passed over, such as #; empty: there are none"
    )
    split: str = Field(
        "",
        description="the split of all files; empty: from the file's name or folder (eng.testa, "
        "wnut17train.conll, dev.txt), else train",
    )


class Sentence(NamedTuple):
    """Words and tags, from line `number` on.

    Attributes:
        widths: how many columns the lines have.
        reason: why it is invalid, or "".
    """

    line: int
    words: list[str]
    tags: list[str]
    widths: Counter[int]
    document: int
    reason: str


class FileScan(NamedTuple):
    """What the scan finds of a file: scheme of the tags, columns of a line, documents before it."""

    scheme: str
    width: int
    documents: int


@register("importer", "conll", options=ConllOptions)
class Conll(TableImporter):
    """Words with tags, as in CoNLL-2003 and WNUT.

    It reads one word a line, with its tag in another column and a blank line after each sentence;
    -DOCSTART- begins a document. Files are .conll, .txt, .tsv, .bio, eng.testa and the like, also
    .gz and .zst: a file, folder, glob or archive.

    Columns: `words` and `tags` (lists of texts of equal length), `document` (numbered over all
    files; a file without -DOCSTART- is one).

    Invalid rows: a sentence with a line of another number of columns than most lines of its file,
    or with tags that do not follow the scheme (an I- with no B-, an unknown tag).
    """

    label = "tags"
    suffixes = SUFFIXES
    amounts = {"words": "words"}

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        if self.options.repair and self.options.scheme in ("bioes", "none"):
            raise ValueError(
                f"--set repair=true: not with scheme={self.options.scheme}: only an I- of bio "
                "has one B- that it can become"
            )
        return super().input_splits(source, part_bytes)

    def _sentences(self, reading: SplitReader) -> Iterator[Sentence]:
        """Yield every sentence of a file, valid or not, and the number of its document."""
        o = self.options
        # Other spaces are part of a word
        between = re.compile("\t" if o.separator == "tab" else "[ \t]+")
        words, tags, widths, first, reason, document = [], [], Counter[int](), 0, "", 0
        for number, _, raw in reading.numbered():
            line, problem = decoded(raw)
            problem = problem or ("a carriage return within the line" if "\r" in line else "")
            cells = between.split(line if o.separator == "tab" else line.strip(" \t"))
            starts = not problem and line.startswith(DOCUMENT)
            if not problem and (starts or not line.strip()):
                if words or reason:
                    yield Sentence(first, words, tags, widths, document, reason)
                words, tags, widths, first, reason = [], [], Counter[int](), 0, ""
                document += starts
                continue
            if not problem and o.comment and line.startswith(o.comment):
                continue
            first, document = first or number, document or 1
            try:
                if not problem:
                    widths[min(len(cells), WIDEST)] += 1
                    words.append(cells[o.word_column].strip())
                    tags.append(cells[o.tag_column].strip())
            except IndexError:
                has_word = -len(cells) <= o.word_column < len(cells)
                missing = o.tag_column if has_word else o.word_column
                problem = f"{len(cells)} columns: no column {missing}"
            if problem and not reason:
                reason = f"line {number + reading.before}: {problem}"
            if len(words) > MAX_WORDS:
                raise ValueError(
                    f"{reading.location(first)}: more than {MAX_WORDS} words without a blank "
                    "line; in this layout one stands after every sentence"
                )
        if words or reason:
            yield Sentence(first, words, tags, widths, document, reason)

    def scan(self, reading: SplitReader) -> Scan:
        """Count sentences, documents and columns, and the tags that tell the scheme."""
        widths, tags, seen = Counter[int](), Counter[str](), Counter[str]()
        rows = last = 0
        for sentence in self._sentences(reading):
            last = sentence.document
            widths.update(sentence.widths)
            if sentence.reason:
                reading.bad(sentence.line, sentence.reason)
                continue
            rows += 1
            tags.update(tag.partition("-")[0] for tag in sentence.tags)
            if self.options.scheme != "none":
                seen.update(_openings(sentence.tags))
        return {
            "rows": rows,
            "width": min(widths, key=lambda width: (-widths[width], width), default=0),
            "documents": last,
            "prefixes": sorted(tags)[:20],
            "inside": seen["I"],
            "begin": seen["B"],
        }

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        scheme = self.options.scheme if self.options.scheme != "auto" else _scheme(scans)
        inside = sum(scan["inside"] for scan in scans)
        layouts, documents = [], 0
        for scan in scans:
            layouts.append(FileScan(scheme, scan["width"], documents))
            documents += scan["documents"]
        notes = {
            "scheme": f"{scheme}, written as bio ({inside} I- became B-)"
            if scheme == "iob1"
            else scheme,
            "documents": documents,
        }
        if self.options.repair and scheme == "bio":
            notes["I- without B-, now B-"] = inside
        columns = [
            pa.field("words", pa.list_(pa.string())),
            pa.field("tags", pa.list_(pa.string())),
            pa.field("document", pa.int64()),
        ]
        return InferredSchema(
            columns, layouts, notes, {"scheme": "bio" if scheme == "iob1" else scheme}
        )

    def rows(self, reading: SplitReader) -> Iterator[Row]:
        layout: FileScan = reading.scan_result
        width, scheme = layout.width, layout.scheme
        for line, words, tags, widths, document, reason in self._sentences(reading):
            other = [n for n in widths if n != width]
            if not reason and other:
                reason = (
                    f"lines of {other[0]} columns, where the others of the file have {width}: "
                    "words and tags do not go together"
                )
            if scheme == "iob1" or (self.options.repair and scheme == "bio"):
                tags = [
                    f"B{tag[1:]}" if opens == "I" else tag
                    for tag, opens in zip(tags, _openings(tags), strict=True)
                ]
            if not reason and scheme != "none":
                reason = _against(tags, "bioes" if scheme == "bioes" else "bio")
            if not reason and not all(words):
                reason = "an empty word"
            if reason:
                reading.bad(line, reason)
            else:
                yield {"words": words, "tags": tags, "document": layout.documents + document}


def _against(tags: list[str], scheme: str) -> str:
    """Return why tags do not follow a scheme, or ""."""
    try:
        return check(tags, scheme)
    except ValueError as error:  # a tag that is none
        return str(error)


def _openings(tags: list[str]) -> list[str]:
    """Return "I" or "B" for each tag that begins an entity of another type than before, else ""."""
    out, before = [], "O"
    for tag in tags:
        out.append(
            tag[0]
            if tag[:2] in ("I-", "B-") and not re.fullmatch(rf"[BI]-{re.escape(tag[2:])}", before)
            else ""
        )
        before = tag
    return out


def _scheme(scans: list[Scan]) -> str:
    """Return the scheme of the tags.

    bioes has S- or E-. In iob1 an entity begins with I-, and with B- only after one of its type.
    """
    prefixes = {name for scan in scans for name in scan["prefixes"]} - {""}
    if not prefixes <= {"B", "I", "O", "E", "S"}:
        raise ValueError(
            f"tags that begin with {first_few(sorted(prefixes - set('BIOES')))}: neither bio, "
            "bioes nor iob1; is tag_column right? --set scheme=none takes tags of any kind, --set "
            "scheme=bio lists such rows as broken"
        )
    if prefixes & {"E", "S"}:
        return "bioes"
    return (
        "iob1"
        if any(scan["inside"] for scan in scans) and not any(scan["begin"] for scan in scans)
        else "bio"
    )
