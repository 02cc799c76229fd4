"""CSV whose cells may hold any text, however long and with any line breaks."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

_END = "\r\n"


def write(sink: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV; each ends in a line feed.

    Args:
        sink: It must write line breaks as they are (``newline=""``).
    """
    # before 3.13, the writer quotes a lone carriage return only where rows end in one
    csv.writer(_LineFeeds(sink), lineterminator=_END).writerows(rows)


class _LineFeeds:
    """Replaces the end of each row by a line feed."""

    def __init__(self, sink: TextIO):
        self.sink = sink

    def write(self, row: str) -> None:
        self.sink.write(row.removesuffix(_END) + "\n")


def read(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV text with a header, column to cell."""
    before = csv.field_size_limit(sys.maxsize)  # of the whole process
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    finally:
        csv.field_size_limit(before)
