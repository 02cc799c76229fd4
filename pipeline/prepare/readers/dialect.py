"""Read CSV and TSV record by record, with the place of each line that cannot be parsed.

Fields in quotes may hold delimiters, line ends and doubled quotes (RFC 4180). This reader is slower
than pyarrow's (`csv_blocks`), and is used where one bad line must stay one bad line: after a quote
that is left open pyarrow and duckdb (2.0.1, store_rejects) lose the rows that follow.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import registry
from pipeline.data.csv_tables import CODE
from pipeline.prepare.engine.inputs import ROW_BYTES, InputSplit, SplitReader, decoded, plain_suffix
from pipeline.prepare.engine.value_types import ValueType, type_of_integer
from pipeline.prepare.readers.archives import Entry, Opener

SUFFIXES = (".csv", ".tsv", ".tab")
WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|nan|[+-]?inf", re.IGNORECASE)
"""With nan and inf, which are numbers in CSV; those of `logs` and `plausible` differ in this."""
LABEL = re.compile(CODE)
SEPARATOR = re.compile(rb"sep=([!-~\t])", re.IGNORECASE)
"""The first line of a file in which Excel is to find the delimiter."""
TAB = "\t"
OPEN = "a quote is left open"
Line = tuple[int, bytes | None]
"""Its number, and its bytes (None: too long)."""


@dataclass(frozen=True)
class Dialect:
    """How fields are divided. Raises ValueError for values that are not allowed.

    Attributes:
        delimiter: one character, or tab; empty: tab for .tsv and .tab, else a comma.
        quote: encloses fields; empty: nothing does, every line is a record.
        encoding: of the files; one in which ASCII is ASCII.
    """

    delimiter: str = ""
    quote: str = '"'
    encoding: str = "utf-8"

    def __post_init__(self):
        for name, value in (("delimiter", self.delimiter), ("quote", self.quote)):
            if len(value) > 1 and value not in ("tab", "\\t"):
                raise ValueError(f"--set {name}={value}: one character, or tab")
        try:
            ascii_alike = 'a,\n"'.encode(codecs.lookup(self.encoding).name) == b'a,\n"'
        except LookupError:
            ascii_alike = False
        if not ascii_alike:
            raise ValueError(
                f"--set encoding={self.encoding}: no encoding in which ASCII is ASCII, such as "
                "latin-1; convert the files (iconv -t UTF-8)"
            )

    def check_header(self, header: list[str], place: str, written: bool = True) -> None:
        """Raise ValueError for a repeated name, or a `written` header with another delimiter."""
        other = next((c for c in ";,|\t" if c in header[0]), "")
        if len(header) == 1 and other and written and not self.delimiter:
            raise ValueError(
                f"{place}: one column, {header[0]!r}; is it {'tab' if other == TAB else other} "
                "that stands between them? Pass --set delimiter=..."
            )
        doubled = next((name for name in header if header.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(
                f"{place}: two columns are called {doubled!r}; if this line is a row, pass "
                "--set header=false, else rename one"
            )

    def rows(
        self,
        reading: SplitReader,
        has_header: bool = True,
        names: Sequence[str] = (),
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield (line, names of the columns), then (line, fields) of every row.

        Rows with another number of fields than there are columns go to `reading.bad`.

        Args:
            reading: the file; one without a record yields nothing.
            has_header: its first record names the columns.
            names: of the columns, where it does not; empty: their numbers from 0.

        Raises:
            ValueError: a header that cannot be read, or has a name twice.
        """
        width = 0
        for number, fields in self.records(reading, has_header):
            if not width:
                if has_header:
                    columns = [name.strip() for name in fields]
                elif names:
                    columns = list(names)
                else:
                    columns = [str(i) for i in range(len(fields))]
                self.check_header(columns, reading.location(number), has_header)
                width = len(columns)
                yield number, columns
                if has_header:
                    continue
            if len(fields) == width:
                yield number, fields
            else:
                reading.bad(number, f"{len(fields)} fields, where there are {width} columns")

    def records(self, reading: SplitReader, header: bool) -> Iterator[tuple[int, list[str]]]:
        """Yield (line, fields) of every record; invalid ones go to `reading.bad`.

        A record spans several lines while a quote is open. If no later line closes the quote, or if
        closing it gives another number of fields than the first record has, only the first of these
        lines is invalid, and the lines after it are read again.

        `header`: the first record is the header. Raises ValueError if it cannot be read.
        """
        again, width = deque[Line](), 0
        tab = self.delimiter in ("tab", "\\t") or (
            not self.delimiter and plain_suffix(reading.input_split.name) != ".csv"
        )
        delimiter = "\t" if tab else self.delimiter or ","
        take = _taker(reading.numbered(), again)
        while (line := take()) is not None:
            number, raw = line
            if raw is not None and not raw.strip(b" \r"):
                continue
            if number == 1 and (stated := SEPARATOR.fullmatch(raw or b"")):
                delimiter = delimiter if self.delimiter else stated[1].decode()
                continue
            text, problem = decoded(raw, self.encoding)
            fields, more = [], []
            if not problem and (not self.quote or self.quote not in text):
                fields = text.split(delimiter)
            elif not problem:
                fields, problem, more = self._quoted(text, delimiter, take)
                if more and (problem or (width and len(fields) != width)):
                    again.extendleft(reversed(more))
                    problem = (
                        problem
                        if problem != OPEN and problem
                        else f"{OPEN}: no later line closes it"
                    )
            if problem and header and not width:
                raise ValueError(
                    f"{reading.location(number)}: the names of the columns cannot be read: "
                    f"{problem}; see --set encoding, quote and header"
                )
            if problem:
                reading.bad(number, problem)
            else:
                width = width or len(fields)
                yield number, fields

    def _quoted(
        self,
        text: str,
        delimiter: str,
        take: Callable[[], Line | None],
    ) -> tuple[list[str], str, list[Line]]:
        """Parse a record that begins with a line: (fields, error or "", further lines it took)."""
        more: list[Line] = []

        def lines() -> Iterator[str]:
            size = len(text)
            yield f"{text}\n"
            while size < ROW_BYTES and (line := take()) is not None:
                more.append(line)
                part, bad = decoded(line[1], self.encoding)
                if bad:
                    raise ValueError(f"a line of it is bad: {bad}")
                size += len(part)
                yield f"{part}\n"

        csv.field_size_limit(2 * ROW_BYTES)
        try:
            return (
                next(csv.reader(lines(), delimiter=delimiter, quotechar=self.quote, strict=True)),
                "",
                more,
            )
        except csv.Error as error:
            return [], OPEN if "unexpected end" in str(error) else f"not of CSV: {error}", more
        except ValueError as error:  # of lines()
            return [], str(error), more


def rows_of(uri: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a small CSV file with a header: yield (line, {column: field}).

    A row with fewer fields than the header has empty ones for the others. Raises ValueError for one
    of `columns` that is missing, and for a line that cannot be read.
    """
    name = uri.rpartition("/")[2]
    names: list[str] = []
    with Opener() as opener:
        reading = SplitReader(InputSplit(name, "", Entry.of_file(name, uri)), opener)
        for number, fields in Dialect().records(reading, True):
            if reading.num_invalid:
                break
            if names:
                yield number, dict(zip(names, [*fields, *[""] * len(names)], strict=False))
                continue
            names = [field.strip() for field in fields]
            for column in columns:
                if column not in names:
                    raise ValueError(
                        f"{uri}: no column {column!r}; {registry.nearest(column, names)}"
                    )
    if reading.num_invalid:
        raise ValueError(
            f"{reading.listed[0]['path']}: {reading.listed[0]['reason']}; repair the table"
        )
    if not names:
        raise ValueError(f"{uri}: an empty table; download it again")


def _taker(
    fresh: Iterator[tuple[int, int, bytes | None]],
    again: deque[Line],
) -> Callable[[], Line | None]:
    """Return a function that gives the lines that were given back, then new ones, then None.

    A generator would be finished when the last lines of a file are given back.
    """

    def take() -> Line | None:
        if again:
            return again.popleft()
        line = next(fresh, None)
        return line and (line[0], line[2])

    return take


def type_of_field(text: str) -> ValueType:
    """Return the type of what a field looks like; a label with leading zeros is a string."""
    text = text.strip()
    if not text:
        return ValueType.NULL
    if WHOLE.fullmatch(text):
        return type_of_integer(int(text))
    is_number = NUMBER.fullmatch(text) and not LABEL.fullmatch(text)
    return ValueType.FLOAT if is_number else ValueType.STRING


def value_of_field(text: str, value_type: int) -> Any:
    """Convert a field to a type; None where it is empty."""
    if value_type == ValueType.STRING:
        return text or None
    text = text.strip()
    if not text:
        return None
    return int(text) if ValueType(value_type).is_whole else float(text)
