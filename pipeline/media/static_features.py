"""Features of a row without times: a struct of numbers, texts (categories) and lists of texts
(codes), as numbers and places in a vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from pipeline.config.registry import close_names
from pipeline.core.arrow_lists import floats, is_list, is_number, is_text, joined
from pipeline.core.capabilities import NameDifference
from pipeline.core.inputs import StaticInputs
from pipeline.core.ragged import ragged
from pipeline.media.deviation import divisors, rounded_mean

MAX_DEVIATIONS = 8.0
"""Standardised numbers are clipped to this many standard deviations."""
TAILS = (0.001, 0.999)
"""Mean and deviation are those of values clipped to these quantiles. The quantiles themselves,
which may be a single patient's, are not kept.
"""

SHORT_FLOATS = (pa.float16(), pa.float32())
WHOLE_NUMBER = re.compile(r"(0|-?[1-9]\d*)\.0")
MAX_NAMED, EXAMPLES = 8, 3
"""Names in an error, and numbers in an example."""

PREPARATION = r"""
import re


def plain_spelling(value):  # a category has one spelling: 1 for 1.0, true for True
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else re.sub(r"^WHOLE$", r"\1", text)


raw = np.array([[row.get(name) for name in state["numbers"]] for row in rows], float)
numbers_known = np.isfinite(raw)
numbers = (np.where(numbers_known, raw, 0) - state["mean"]) / state["std"]
numbers = np.where(numbers_known, numbers.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS), 0)
places, categories = {}, {}  # counted from 1; 0 fills up the rows
for place, code in enumerate(state["codes"], 1):
    field, _, text = code.partition("=")
    places[code] = place
    categories.setdefault((field, plain_spelling(text)), place)
codes = []
for row in rows:
    in_row = set()
    for field, value in row.items():
        if isinstance(value, list):
            in_row |= {places.get(f"{field}={text}") for text in value if text is not None}
        elif value is not None:
            category = categories.get((field, plain_spelling(value)))
            in_row.add(places.get(f"{field}={value}", category))
    codes.append(sorted(in_row - {None}))
width = max(1, *map(len, codes))
inputs = {
    "numbers": numbers.astype(np.float32),
    "numbers_known": numbers_known,
    "codes": np.array([row + [0] * (width - len(row)) for row in codes]),
}
"""
"""Code that makes the inputs of a network from ``rows`` and ``state`` outside of this package."""


class StaticState(TypedDict):
    """State of `StaticFeatures`."""

    numbers: list[str]
    """Names of the fields that hold numbers."""
    mean: list[float]
    """Mean of each number."""
    std: list[float]
    """Standard deviation of each number."""
    codes: list[str]
    """Known texts, as ``FIELD=TEXT``. A category has its `plain_spelling`, in states of earlier
    versions the spelling of their rows.
    """


class StaticFeatures:
    """Static features of a fitted state. Fields are matched by name; booleans are texts."""

    def __init__(self, state: StaticState):
        self.state = state
        self.place = {code: place + 1 for place, code in enumerate(state["codes"])}
        # a state of an earlier version may have two spellings of a category: each keeps its own
        self.known_as = {code: code for code in state["codes"]}
        for code in state["codes"]:
            field, _, text = code.partition("=")
            self.known_as.setdefault(f"{field}={plain_spelling(text)}", code)

    @staticmethod
    def empty_state() -> StaticState:
        return {"numbers": [], "mean": [], "std": [], "codes": []}

    @staticmethod
    def fit(column: Any, name: str, min_rows: int) -> StaticState:
        """Fit the state on a column of structs.

        A number or text is known where ``min_rows`` rows have it. Raises ValueError for another
        type.
        """
        state = StaticFeatures.empty_state()
        rows_with = Counter()
        for field, values in _fields(column, name):
            if is_number(values.type):
                numbers = floats(values, np.float64)
                numbers = numbers[np.isfinite(numbers)]
                if len(numbers) < min_rows:
                    continue
                numbers = numbers.clip(*np.quantile(numbers, TAILS))
                is_float64 = values.type not in SHORT_FLOATS
                std = float(divisors(numbers.std(), np.abs(numbers).max(), is_float64))
                state["numbers"].append(field)
                state["mean"].append(rounded_mean(float(numbers.mean()), std))
                state["std"].append(float(f"{std:.7g}"))
            else:
                for codes in _codes(field, values):
                    rows_with.update(set(codes))
        state["codes"] = sorted(code for code, count in rows_with.items() if count >= min_rows)
        return state

    def sizes(self) -> StaticInputs:
        return {"numbers": len(self.state["numbers"]), "codes": len(self.state["codes"])}

    def required_type(self, kind: pa.DataType) -> str:
        """Describe the needed type where a column cannot be read with this state; else ""."""
        if not pa.types.is_struct(kind):
            return "a struct of numbers, texts and lists of texts"
        texts = {code.partition("=")[0] for code in self.state["codes"]}
        for field in kind:
            value = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if pa.types.is_null(value):
                continue
            if field.name in self.state["numbers"] and not is_number(value):
                needed, option = "numbers", "numeric"
            elif field.name in texts and is_number(value):
                needed, option = "texts", "categorical"
            else:
                continue
            return (
                f"{needed} in its field {field.name}, as in training (for a plain table: onetomany "
                f"prepare table --set {option}={field.name})"
            )
        return ""

    def coverage(self, column: Any, name: str) -> str:
        """Describe which fields and texts of these rows are unknown, and which known numbers they
        lack.
        """
        numbers, texts = self._numbers_and_texts(column, name)
        known = self.state["numbers"]
        left_out = [number for number in numbers if number not in known]
        missing = [number for number in known if number not in numbers]
        unknown = len([text for text in texts if text not in self.place])
        parts = [
            f"numbers of {name} left out: {', '.join(left_out)}" if left_out else "",
            f"not there: {', '.join(missing)}" if missing else "",
            f"{unknown} of {len(texts)} texts of {name} are unknown" if unknown else "",
        ]
        return "; ".join(filter(None, parts))

    def name_differences(self, column: Any, name: str, min_rows: int) -> list[NameDifference]:
        """List all numbers and texts that only the state or only these rows have.

        Texts that fewer than ``min_rows`` rows have are counted, not named.
        """
        numbers, rows_with = self._numbers_and_texts(column, name)
        unknown = sorted(code for code in rows_with if code not in self.place)
        named = tuple(code for code in unknown if rows_with[code] >= min_rows)
        differences = [
            NameDifference(
                f"numbers of {name} that the source knows and its rows lack",
                tuple(n for n in self.state["numbers"] if n not in numbers),
            ),
            NameDifference(
                f"numbers of {name} that its rows have and the source does not know (left out)",
                tuple(n for n in numbers if n not in self.state["numbers"]),
            ),
            NameDifference(
                f"texts of {name} that the source knows and its rows lack",
                tuple(code for code in self.place if code not in rows_with),
            ),
            NameDifference(
                f"texts of {name} that its rows have and the source does not know (left out)",
                named,
                len(unknown) - len(named),
            ),
        ]
        return [difference for difference in differences if difference.names or difference.rare]

    def _numbers_and_texts(self, column: Any, name: str) -> tuple[list[str], Counter[str]]:
        """Return the fields of numbers that have values, and how many rows have each text."""
        numbers, rows_with = list[str](), Counter[str]()
        for field, values in self._matched(column, name):
            if is_number(values.type):
                numbers += [field] if len(values) > values.null_count else []
            else:
                for codes in self._codes(field, values):
                    rows_with.update(set(codes))
        return numbers, rows_with

    @staticmethod
    def preparation_code() -> str:
        """Return code that does what `decode` and padding do (`PreparesInputs`)."""
        return PREPARATION.replace("MAX_DEVIATIONS", f"{MAX_DEVIATIONS:g}").replace(
            "WHOLE", WHOLE_NUMBER.pattern
        )

    def example_row(self) -> dict[str, float | str]:
        """Return a row with the mean of the first known numbers, and a text of each field."""
        numbers = dict(zip(self.state["numbers"], self.state["mean"], strict=True))
        row: dict[str, float | str] = dict(list(numbers.items())[:EXAMPLES])
        for code in self.state["codes"]:
            field, _, text = code.partition("=")
            row.setdefault(field, text)
        return row

    def features(
        self,
        column: Any,
        name: str,
        min_rows: int,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the values of each field that is known, or of all where nothing was fitted.

        (n,) float64 numbers, (n,) int64 category numbers, and for lists of texts (n,) float64
        whether a row has each text that ``min_rows`` rows have.
        """
        known_fields = self.field_names()
        for field, values in _fields(column, name):
            if known_fields and field not in known_fields:
                continue
            if is_number(values.type):
                yield f"{name}.{field}", floats(values, np.float64)
            elif not is_list(values.type):
                # in one spelling, as the network reads them: 1 for 1.0
                texts = [codes[0] if codes else None for codes in self._codes(field, values)]
                numbers = pa.array(texts, pa.string()).dictionary_encode().indices.fill_null(-1)
                yield f"{name}.{field}", numbers.to_numpy(zero_copy_only=False).astype(np.int64)
            else:
                yield from self._presence(field, values, name, min_rows)

    def random_rows(
        self, rows: int, rng: np.random.Generator
    ) -> list[dict[str, float | list[str]]]:
        """Return rows with a value for every known number, and a known text for each field."""
        state = self.state
        fields: dict[str, list[str]] = {}
        for code in state["codes"]:
            name, _, text = code.partition("=")
            fields.setdefault(name, []).append(text)
        out: list[dict[str, float | list[str]]] = []
        for _ in range(rows):
            numbers = {
                name: float(mean + std * rng.standard_normal())
                for name, mean, std in zip(
                    state["numbers"], state["mean"], state["std"], strict=True
                )
            }
            texts = {name: [str(rng.choice(known))] for name, known in fields.items()}
            out.append({**numbers, **texts})
        return out

    def _presence(
        self, field: str, values: Any, name: str, min_rows: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        rows_with: dict[str, set[int]] = {}
        for row, codes in enumerate(self._codes(field, values)):
            for code in codes:
                rows_with.setdefault(code, set()).add(row)
        for code, rows in rows_with.items():
            if len(rows) >= min_rows and (not self.place or code in self.place):
                is_present = np.zeros(len(values))
                is_present[sorted(rows)] = 1.0
                yield f"{name}.{code}", is_present

    def _codes(self, field: str, values: Any) -> list[list[str]]:
        """Return the texts of each row as FIELD=TEXT, a category as the state spells it."""
        return _codes(field, values, self.known_as)

    def known_values(self, column: Any, name: str) -> tuple[int, int]:
        """Count the values of these rows that are known, and all of them."""
        known, total = 0, 0
        for field, values in self._matched(column, name):
            if is_number(values.type):
                count = int(np.isfinite(floats(values, np.float64)).sum())
                known, total = known + count * (field in self.state["numbers"]), total + count
            else:
                codes = [code for codes in self._codes(field, values) for code in codes]
                known += sum(code in self.place for code in codes)
                total += len(codes)
        return known, total

    def field_names(self) -> set[str]:
        """Return the names of the fields that are known."""
        return {*self.state["numbers"], *(code.partition("=")[0] for code in self.place)}

    def _matched(self, column: Any, name: str) -> list[tuple[str, Any]]:
        """Return the fields. Raises ValueError for texts where the state has numbers, or the other
        way round.
        """
        fields = _fields(column, name)
        for field, values in fields:
            texts = any(code.startswith(f"{field}=") for code in self.place)
            if (field in self.state["numbers"] and not is_number(values.type)) or (
                texts and is_number(values.type)
            ):
                option = "categorical" if texts else "numeric"
                raise ValueError(
                    f"column {name}, field {field}: it holds {values.type} here and "
                    f"{'texts' if texts else 'numbers'} in the rows that it was "
                    "fitted on; write both in one type (for a plain table: onetomany prepare "
                    f"table --set {option}={field})"
                )
        return fields

    def decode(self, column: Any, rows: int, name: str) -> dict[str, np.ndarray]:
        """Decode rows.

        Returns:
            ``numbers`` (B, K) float32 standardised, 0 where unknown; ``numbers_known`` (B, K) bool;
            ``codes``, ragged int64 places of known texts plus 1.
        """
        numbers = np.full((rows, len(self.state["numbers"])), np.nan)
        codes: list[list[int]] = [[] for _ in range(rows)]
        at = {number: place for place, number in enumerate(self.state["numbers"])}
        for field, values in self._matched(column, name) if column is not None else ():
            if is_number(values.type):
                if field in at:
                    numbers[:, at[field]] = floats(values, np.float64)
            else:
                for row, texts in enumerate(self._codes(field, values)):
                    codes[row] += [self.place[text] for text in texts if text in self.place]
        known = np.isfinite(numbers)
        scaled = (
            (np.where(known, numbers, 0.0) - self.state["mean"]) / self.state["std"]
            if len(at)
            else numbers
        )
        return {
            "numbers": np.where(known, scaled.clip(-MAX_DEVIATIONS, MAX_DEVIATIONS), 0.0).astype(
                np.float32
            ),
            "numbers_known": known,
            "codes": ragged(np.array(sorted(set(row)), dtype=np.int64) for row in codes),
        }


def texts_present(codes: np.ndarray, count: int) -> np.ndarray:
    """Return (n, count) float64, 1 where a row has a text, of `codes` as `decode` returns them."""
    out = np.zeros((len(codes), count))
    for row, places in enumerate(codes):
        out[row, places - 1] = 1.0
    return out


def check_share(
    known: int, total: int, place: str, names: Collection[str], known_names: Collection[str]
) -> float:
    """Return the share of some rows' values that a state knows, 1 where they have no value.

    Args:
        known: How many of the values are known.
        total: How many there are.
        place: The columns, for the error.
        names: Names of the rows' fields and variables.
        known_names: Those that the state knows.

    Raises:
        ValueError: Nothing is known. The message has the nearest names.
    """
    if known or not total:
        return known / total if total else 1.0
    described = []
    for name in sorted(names)[:MAX_NAMED]:
        near = close_names(name, known_names)
        hint = f"did you mean {' or '.join(near)}?" if near else ""
        hint = "with other texts" if name in known_names else hint
        described.append(f"{name} ({hint})" if hint else name)
    more = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    shown = sorted(known_names)[:MAX_NAMED]
    more_known = len(known_names) - len(shown)
    raise ValueError(
        f"{place}: the source knows none of the values in these rows, whose names are "
        f"{', '.join([*described, *more])}; the source knows "
        f"{', '.join([*shown, *([f'{more_known} more'] if more_known else [])])}: rename them as "
        "in the source's rows, or use another source"
    )


def _fields(column: Any, name: str) -> list[tuple[str, Any]]:
    """Return (name, values as one Arrow array) of each field; a null struct has null fields."""
    column = joined(column) if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_struct(column.type):
        raise ValueError(
            f"column {name}: it holds {column.type}; facts are a struct of numbers, texts and "
            "lists of texts"
        )
    out = []
    for field, values in zip(column.type, column.flatten(), strict=True):
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        inner = values.type.value_type if is_list(values.type) else values.type
        is_text_or_bool = is_text(inner) or pa.types.is_boolean(inner) or pa.types.is_null(inner)
        if not is_number(values.type) and not is_text_or_bool:
            raise ValueError(
                f"column {name}, field {field.name}: it holds {values.type}; facts are "
                "numbers, texts and lists of texts"
            )
        if not pa.types.is_null(values.type):
            out.append((field.name, values))
    return out


def plain_spelling(value: str | bool) -> str:
    """Return the one spelling of a category: 1 for 1.0, true for True.

    Programs write one value in several ways: pandas writes 1 as 1.0 where a value is missing.
    """
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    whole_number = WHOLE_NUMBER.fullmatch(text)
    return whole_number[1] if whole_number else text


def _codes(
    field: str,
    values: Any,
    known_as: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """Return the texts of each row as FIELD=TEXT.

    Categories are spelled as in ``known_as``, else plainly; lists hold codes (410.0 is not 410).
    """
    if is_list(values.type):
        return [
            [f"{field}={text}" for text in texts or () if text is not None]
            for texts in values.to_pylist()
        ]
    codes: dict[Any, list[str]] = {None: []}
    for value in values.unique().to_pylist():
        if value is not None:
            code = f"{field}={plain_spelling(value)}"
            exact = (known_as or {}).get(f"{field}={value}")
            codes[value] = [exact or (known_as or {}).get(code, code)]
    return [codes[value] for value in values.to_pylist()]
