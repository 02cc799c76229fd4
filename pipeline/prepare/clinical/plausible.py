"""Clinical values: parse texts to numbers, convert units, and reject implausible values.

The ranges are a data file (`clinical/ranges.csv`), so that a hospital can see and change them.
Everything here works on whole columns.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes, floats, is_text

if TYPE_CHECKING:
    from pipeline.prepare.engine.grouped import EventReader, Events

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
"""Without nan and inf, which are no measurements."""
BOUND = r"(?i:<=?|>=?|less than|greater than|under|over)"
MEASURED = rf"^(?P<bound>{BOUND}?)\s*(?P<first>{NUMBER})\s*(?:/\s*(?P<second>{NUMBER}))?$"
NO_VALUE = "no value"
NO_NUMBER = "no number"
PAIR = "a pair of numbers"
OUT_OF_RANGE = "out of range"
CENSORED, CLAMPED = "censored values taken as their bound", "values set to the valid bound"
CLINICAL = Path(__file__).parent


class Numbers(NamedTuple):
    """Parsed numbers.

    Attributes:
        values: (n,) float64, NaN where there is none.
        reasons: (n,) int8, why there is none, as an index in REASONS.
        censored: (n,) bool, the value is a bound.
    """

    values: np.ndarray
    reasons: np.ndarray
    censored: np.ndarray


REASONS = ("", NO_VALUE, NO_NUMBER, PAIR)


def rows_of(name: str, folder: Path = CLINICAL) -> Iterator[dict[str, str]]:
    """Read a CSV file of this package; lines that begin with # are comments."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    yield from csv.DictReader(line for line in lines if line.strip() and not line.startswith("#"))


def fingerprint() -> str:
    """Return a digest that changes when the data files do."""
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted(CLINICAL.glob("*.csv")))
    ).hexdigest()


def numbers(column: Any, pair: int | np.ndarray = 0) -> Numbers:
    """Parse the numbers of a column.

    "<0.1" and "LESS THAN 0.1" give their bound.

    Args:
        column: (n,) texts, numbers or bools.
        pair: of "120/80" take the first (1), the second (2) or none (0); one for all, or (n,).
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if not is_text(kind):
        found = _plain(array)
        reasons = np.where(np.isnan(found), 1, 0).astype(np.int8)
        return Numbers(found, reasons, np.zeros(len(array), dtype=bool))
    codes, texts = dictionary_codes(array)
    first, second, reasons, censored = _texts(texts.cast(pa.string()))
    at = np.where(codes < 0, len(texts), codes)
    reason, bound = np.append(reasons, np.int8(1))[at], np.append(censored, False)[at]
    one, two = np.append(first, np.nan)[at], np.append(second, np.nan)[at]
    is_pair = reason == REASONS.index(PAIR)
    taken = is_pair & (np.asarray(pair) > 0)
    out = np.where(is_pair, np.where(np.asarray(pair) == 2, two, one), one)
    out = np.where(is_pair & ~taken, np.nan, out)
    reason = np.where(taken, 0, reason).astype(np.int8)
    return Numbers(out, reason, bound)


def drop_unusable(
    reader: EventReader,
    numbers: Numbers,
    factors: np.ndarray,
    codes: np.ndarray,
    names: list[str],
) -> None:
    """Drop the rows of a batch without a number or in an unknown unit, and count bounds and
    conversions of the others.

    Args:
        reader: of the rows.
        numbers: (n,) parsed numbers.
        factors: (n,) what they are multiplied by; NaN for an unknown unit.
        codes: (n,) index of each number's variable in `names`.
        names: of the variables.
    """
    reader.drop_by_code(REASONS, numbers.reasons)
    has_other_unit = np.isnan(factors)
    # Each variable's own count: that is where to look
    for code in np.unique(codes[has_other_unit & reader.good]):
        reader.drop(f"{names[code]} {OTHER_UNIT}", has_other_unit & (codes == code))
    reader.dropped[CENSORED] += int(np.count_nonzero(reader.good & numbers.censored))
    reader.dropped[CONVERTED] += int(np.count_nonzero(reader.good & (factors != 1)))


def _plain(array: Any) -> np.ndarray:
    """Convert a column that is no text to (n,) float64; NaN where it is null or infinite."""
    try:
        found = floats(array, np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(
            f"a column of values has the type {array.type}; it must hold numbers or texts"
        ) from None
    return np.where(np.isfinite(found), found, np.nan)


def _texts(values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parse texts: (number, second number of a pair, index in REASONS, whether it is a bound)."""
    text = pc.utf8_trim_whitespace(values).fill_null("")
    found = pc.extract_regex(text, MEASURED)
    bound, first, second = (
        pc.struct_field(found, name).fill_null("") for name in ("bound", "first", "second")
    )
    is_bound, is_pair = (np.asarray(pc.not_equal(part, "")) for part in (bound, second))
    one, two = _cast(first), _cast(second)
    is_empty = np.asarray(pc.equal(text, ""))
    is_none = ~np.isfinite(one) | (is_bound & is_pair)
    reasons = np.select([is_empty, is_none, is_pair], [1, 2, 3], 0).astype(np.int8)
    one, two = (np.where(is_none, np.nan, part) for part in (one, two))
    return one, two, reasons, is_bound & (reasons == 0)


def _cast(texts: Any) -> np.ndarray:
    bare = pc.replace_substring_regex(texts, r"^\+", "")
    return floats(pc.if_else(pc.equal(bare, ""), None, bare), np.float64)


# ---------------------------------------------------------------- units

OTHER_UNIT = "in a unit that clinical/units.csv does not have"
CONVERTED = "values converted from another unit"
RAW_UNITS = {"inches": "in", "pounds": "lb"}
"""Units of an item's values before its conversion, where they differ from that of its variable."""


def plain_unit(text: str) -> str:
    """Normalise a unit: case, blanks, micro signs, dots; "None" is no unit."""
    plain = (
        "".join(text.lower().split())
        .replace("\u00b5", "u")
        .replace("\u03bc", "u")
        .replace("deg.", "deg")
        .rstrip(".")
    )
    plain = plain.removeprefix("x") if plain.startswith("x10") else plain
    return "" if plain in ("none", "null", "na", "n/a", "nounits", "-") else plain


class Units:
    """Units that a variable's values may be written in, and their factors (`units.csv`)."""

    def __init__(self):
        self.of_variable: dict[tuple[str, str], float] = {}
        self.of_unit: dict[tuple[str, str], float] = {}
        for row in rows_of("units.csv"):
            of_all = row["variable"] == "*"
            known, key = (self.of_unit, "unit") if of_all else (self.of_variable, "variable")
            known[row[key], plain_unit(row["written"])] = float(row["factor"])

    def factor(self, written: str | None, variable: str, unit: str, conversion: str) -> float:
        """Return the factor from the unit that is written to the item's own, before its conversion.

        It is NaN for an unknown unit, and 1 where no unit is written. `unit`: that of the variable.
        """
        plain = plain_unit(written or "")
        own = RAW_UNITS.get(conversion, unit)
        if plain in ("", plain_unit(own)):
            return 1.0
        known = None if conversion in RAW_UNITS else self.of_variable.get((variable, plain))
        return self.of_unit.get((own, plain), float("nan")) if known is None else known


def converted(values: np.ndarray, conversions: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Convert values to this project's units, (n,) float64.

    As in Harutyunyan et al. 2019 (mimic3benchmark/preprocessing.py), a temperature from 79 on is in
    Fahrenheit, whatever its column says. `conversions`: (n,) index of each value's conversion in
    `names`.
    """
    out = values.astype(np.float64, copy=True)
    for number, name in enumerate(names):
        here = np.flatnonzero(conversions == number)
        if not len(here) or name not in CONVERSIONS:
            continue
        out[here] = CONVERSIONS[name](out[here])
    return out


CONVERSIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "celsius": lambda x: np.where(x >= 79, (x - 32) * 5 / 9, x),
    "percent": lambda x: np.where((x > 0) & (x <= 1.1), x * 100, x),
    "pounds": lambda x: x * 0.45359237,
    "inches": lambda x: x * 2.54,
    "acidity": lambda x: np.where(
        (x >= 630) & (x <= 850),
        x / 100,
        np.where(
            (x >= 63) & (x <= 85),
            x / 10,
            x,
        ),
    ),
}
"""`acidity`: a pH without its point (735 is 7.35)."""
OWN = {"Temp": "celsius", "FiO2": "percent", "SaO2": "percent", "SpO2": "percent", "pH": "acidity"}
"""Conversions of values under a canonical name where nothing else is known of them."""


# ---------------------------------------------------------------- ranges


class Ranges:
    """Bounds of variables: (outlier low, valid low, valid high, outlier high); others have none."""

    def __init__(self):
        columns = ("outlier_low", "valid_low", "valid_high", "outlier_high")
        self.known = {
            row["variable"]: [float(row[name]) for name in columns] for row in rows_of("ranges.csv")
        }

    def apply(
        self,
        values: np.ndarray,
        codes: np.ndarray,
        names: list[str],
        tally: Counter[str],
        table: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clip values to the valid bounds, and find implausible ones.

        Args:
            values: (n,).
            codes: (n,) index of each value's variable in `names`.
            names: of the variables.
            tally: takes the counts of implausible and of clipped values.
            table: its name in the counts.

        Returns:
            ((n,) clipped values, (n,) whether they are plausible).
        """
        bounds = np.array(
            [self.known.get(name, [-np.inf, -np.inf, np.inf, np.inf]) for name in names],
            dtype=np.float64,
        ).reshape(-1, 4)
        low, valid_low, valid_high, high = bounds[codes].T
        good = (values >= low) & (values <= high)
        inside = np.clip(values, valid_low, valid_high)
        tally[f"{table}: {OUT_OF_RANGE}"] += int(len(good) - np.count_nonzero(good))
        tally[CLAMPED] += int(np.count_nonzero(good & (inside != values)))
        return inside, good

    def fact(self, name: str, values: np.ndarray) -> pa.Array:
        """Return (n,) numbers of one variable, clipped; null for what is not plausible."""
        codes = np.zeros(len(values), dtype=np.int64)
        clipped, good = self.apply(values, codes, [name], Counter(), "")
        return pa.array(clipped, mask=~good)


def canonical(events: Events, ranges: Ranges, reader: EventReader) -> Events:
    """Convert values under canonical names (`OWN`), and return the events within their ranges.

    Other variables are unchanged. `reader` takes the counts of implausible and of clipped values.
    """
    kinds, names, values = tuple(CONVERSIONS), events.names, events.values
    if names:
        own = np.array([kinds.index(OWN[name]) if name in OWN else -1 for name in names])
        values = converted(values, own[events.codes], kinds)
    values, good = ranges.apply(values, events.codes, names, reader.dropped, reader.table)
    return events._replace(values=values).filter(good)


def units() -> dict[str, str]:
    """Return the unit of each canonical variable."""
    return {
        row["variable"]: row["unit"]
        for name in ("items.csv", "ranges.csv")
        for row in rows_of(name)
    }
