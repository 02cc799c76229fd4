"""What counts as a word of a text, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.media.tagging_schemes import texts

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_MARKS = "".join(
    chr(code) for code in range(0x300, 0x1D00) if unicodedata.category(chr(code))[0] == "M"
)
UNSPACED = re.compile(f"[{_UNSPACED}]")
"""A character of a script without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and
Chinese."""
_TWO_UNSPACED = re.compile(f"[{_UNSPACED}].*[{_UNSPACED}]", re.DOTALL)
_SPACE_BETWEEN = re.compile(f"[{_UNSPACED}] +[{_UNSPACED}]")
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[{_MARKS}]+[^\W{_UNSPACED}]*)*")
"""A run of letters, digits and underscores with the marks on them (accents, vowel signs of Hindi);
in a script without spaces a single character."""


def are_segmented(texts: Iterable[str]) -> bool:
    """Return whether texts in a script without spaces were cut into words by spaces all the same.

    Most texts with two characters of such a script then have a space between two. Single ones may
    have it for another reason: a dash that was removed, the end of a Thai phrase.
    """
    has_space = [
        _SPACE_BETWEEN.search(text) is not None for text in texts if _TWO_UNSPACED.search(text)
    ]
    return sum(has_space) > len(has_space) / 2


def plain_texts(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """Return each value of a column of texts, or of lists of words, as one text; "" for null."""
    return [_joined(cell) for cell in texts(column)]


def _joined(cell: Any) -> str:
    return " ".join(map(_joined, cell)) if isinstance(cell, list) else cell or ""
