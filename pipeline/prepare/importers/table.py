"""Plain tables, one row an entity: numbers and categories to a struct column."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import DelimitedOptions, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_number, is_text
from pipeline.prepare.engine.importing import (
    NO_SPLIT,
    SPLITS,
    Notes,
    check_columns,
    check_one_split,
    first_few,
    parse_names,
)
from pipeline.prepare.engine.inputs import (
    InputSplit,
    SplitReader,
    check_kinds,
    find_inputs,
    plain_suffix,
)
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter
from pipeline.prepare.engine.value_types import ValueType, common_type, type_of_integer
from pipeline.prepare.readers import dialect, parquet

FEW, MANY = 10, 1000
"""Whole numbers with so few values may be codes; a column with more values is hardly a category."""
ROWS = 4096
"""Rows that are processed at a time."""
COMMA_NUMBER = re.compile(r"[+-]?\d+((\.\d{3})*,\d+|(,\d{3})+(\.\d+)?)")
"""A number with a decimal comma (27,3 or 1.234,5), or with commas between thousands (1,234.5)."""
ID_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.0+)?")
"""An id that may be written as a number: +49 30 and 12e5 may not, nor 007. pandas writes 1 as 1.0
where an id is missing.
"""
FEATURES = "features"
ROW_NUMBERS = ("Unnamed: 0", "Unnamed: 0.1")
"""As pandas calls a first column without a name: DataFrame.to_csv writes its index so. The second
one is of a table that was written twice.
"""
OF_COLUMNS = (
    *("label", "id", "group", "split_column"),
    *("columns", "drop", "categorical", "numeric"),
)
"""Options that name columns."""


class TableOptions(DelimitedOptions):
    label: str = Field(
        "", description="the column (or columns: a,b) to predict; a row without it is broken"
    )
    id: str = Field("", description="the column that names the row; kept beside the features")
    group: str = Field(
        "",
        description="the column that says which rows belong together (a patient), for splits; "
        "kept beside the features",
    )
    columns: str = Field(
        "", description="the features, such as age,sex,bmi; empty: all other columns"
    )
    drop: str = Field("", description="columns that are no features")
    categorical: str = Field("", description="columns whose numbers are codes: kept as texts")
    numeric: str = Field(
        "",
        description="columns of numbers though some values are none (<0.1, ERROR): those are "
        "counted and null",
    )
    missing: str = Field(
        ",NA,N/A,NaN,nan,?,null,NULL,None",
        description="texts that mean a missing value; the first one here is the empty text",
    )


@register("importer", "table", options=TableOptions)
class Table(TableImporter):
    """A table of features: numbers and categories, with a row for each entity.

    It reads CSV and TSV (also .gz and .zst) or Parquet: `--set label=died,id=stay,group=patient`.
    All files must have the same columns, in any order. A CSV file is one shard: cut up large ones.

    Columns:

    - `features`: a struct with a field for each feature. It is float64 if all values of the whole
      table are numbers, else text. Missing values are null.
    - label, id and group keep their names and types.

    Rules:

    - Numbers with leading zeros are categories.
    - In a column of `--set numeric=` what is no number is counted and null.
    - A first column without a name, as pandas writes its index, is called "Unnamed: 0". If it has
      whole numbers, it is a feature only if an option names it.
    - Rows with labels are shuffled in a fixed order within their shard. Rows without labels keep
      their order, so that predictions have the order of the file.
    - Invalid rows: without a label, with another number of fields, or not text.
    - The summary notes columns without values or with one value, whole numbers with few values
      (codes?), and categories with very many.
    """

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        self.dialect = dialect.Dialect(o.delimiter, o.quote, o.encoding)
        self.labels = parse_names(o.label)
        self.columns = parse_names(o.columns)
        self.dropped = parse_names(o.drop)
        self.categorical = parse_names(o.categorical)
        self.numeric = parse_names(o.numeric)
        self.header = parse_names(o.names)
        copied = [*self.labels, *parse_names(o.id), *parse_names(o.group)]
        self.copied = list(dict.fromkeys(copied))
        self.missing = frozenset(text.strip() for text in o.missing.split(","))
        both = sorted(set(self.categorical) & set(self.numeric))
        if both:
            raise ValueError(
                f"--set categorical= and numeric= both name {both[0]}; it is one of them"
            )
        check_one_split(o)
        for option, names in (("drop", self.dropped), ("columns", self.columns)):
            if taken := [name for name in names if name in self.copied or name == o.split_column]:
                raise ValueError(
                    f"--set {option}= names {taken[0]}, which is label, id, group or "
                    "split_column; such a column is no feature anyway"
                )
        self.label = self.labels[0] if self.labels else ""
        self.shuffles_rows = bool(self.labels)

    # ------------------------------------------------------------ reading

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        by_rows = "all" if self.options.split_column else ""
        kinds = (*dialect.SUFFIXES, *parquet.SUFFIXES)
        listed = find_inputs(source, kinds, self.options.split or by_rows)
        check_kinds(listed, kinds)
        return parquet.split_files(listed, part_bytes), listed.fingerprint, listed.notes

    def _batches(self, reading: SplitReader) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Yield (place of each row, {column: values}) of valid rows in batches.

        Values are texts of CSV or Python values of Parquet, None where missing.
        """
        if plain_suffix(reading.input_split.name) in parquet.SUFFIXES:
            for before, block in parquet.batches(reading):
                for name, kind in zip(block.column_names, block.schema.types, strict=True):
                    self._check_type(name, kind, reading)
                columns = {
                    name: self._with_missing_as_none(_values(block[name]))
                    for name in self._wanted(block.column_names, reading.input_split.name)
                }
                yield from self._drop_unlabelled_rows(
                    reading, [before + 1 + i for i in range(len(block))], columns
                )
            return
        place = reading.input_split.name
        records = self.dialect.rows(reading, not self.header, self.header)
        line, names = next(records, (0, self.header))
        if not names:
            raise ValueError(f"{place}: empty, not even a header; leave it out")
        if names[0] == "":
            unnamed = ROW_NUMBERS[1] if ROW_NUMBERS[0] in names else ROW_NUMBERS[0]
            names = [unnamed, *names[1:]]
        if "" in names:
            raise ValueError(
                f"{reading.location(line)}: column {names.index('') + 1} has no name; give it one, "
                "or pass --set names=... for a file without a header"
            )
        wanted = self._wanted(names, place)
        at = {name: names.index(name) for name in wanted}
        while batch := list(islice(records, ROWS)):
            columns = {
                name: self._with_missing_as_none([fields[i] for _, fields in batch])
                for name, i in at.items()
            }
            yield from self._drop_unlabelled_rows(reading, [number for number, _ in batch], columns)

    def _with_missing_as_none(self, values: list[Any]) -> list[Any]:
        """Strip texts, and set values that mean a missing one to None."""
        stripped = [value.strip() if isinstance(value, str) else value for value in values]
        return [
            None if isinstance(value, str) and value in self.missing else value
            for value in stripped
        ]

    def _check_type(self, name: str, kind: pa.DataType, reading: SplitReader) -> None:
        """Raise ValueError for a feature in Parquet that is neither number nor text."""
        is_value = is_number(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)
        is_read = not self.columns or name in (*self.columns, *self.copied)
        if is_read and name not in self.dropped and not (is_value or is_text(kind)):
            raise ValueError(
                f"{reading.input_split.name}: column {name} is {kind}, neither a number nor a "
                f"category; turn it into one, or pass --set drop={name}"
            )

    def _wanted(self, names: list[str], place: str) -> list[str]:
        """Return the columns to read. Raises ValueError for an option with an unknown one."""
        o = self.options
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{place}: two columns are called {twice[0]!r}; rename one")
        given = [
            (option, name) for option in OF_COLUMNS for name in parse_names(getattr(o, option))
        ]
        check_columns(place, names, *given)
        own = [*self.copied, *parse_names(o.split_column)]
        for name in [name for name in self.copied if name in (FEATURES, "split")]:
            raise ValueError(f"{place}: column {name} has a name that is taken here; rename it")
        features = self.columns or [
            name for name in names if name not in own and name not in self.dropped
        ]
        if not features:
            raise ValueError(f"{place}: no column is left for the features")
        return [*features, *own]

    def _drop_unlabelled_rows(
        self,
        reading: SplitReader,
        places: list[int],
        columns: dict[str, list[Any]],
    ) -> Iterator[tuple[list[int], dict[str, list[Any]]]]:
        """Drop rows without label or split from a batch; these go to `reading.bad`."""
        lacking: dict[int, str] = {}
        if self.options.split_column:
            texts = [_as_category(value) for value in columns[self.options.split_column]]
            lacking = {
                i: NO_SPLIT
                for i, text in enumerate(texts)
                if text is not None and text.lower() not in SPLITS
            }
        for name, what in [
            (self.options.split_column, "split"),
            *((name, f"label ({name})") for name in reversed(self.labels)),
        ]:
            if name:
                lacking |= {
                    i: f"no {what}"
                    for i, value in enumerate(columns[name])
                    if value is None or value != value
                }
        for i in sorted(lacking):
            reading.bad(places[i], lacking[i])
        keep = [i for i in range(len(places)) if i not in lacking]
        if lacking:
            places = [places[i] for i in keep]
            columns = {name: [values[i] for i in keep] for name, values in columns.items()}
        yield places, columns

    # ------------------------------------------------------------ the two passes

    def scan(self, reading: SplitReader) -> Scan:
        """Return the statistics of each column."""
        rows, columns = 0, dict[str, _ColumnStatistics]()
        ids = {*parse_names(self.options.id), *parse_names(self.options.group)}
        for places, found in self._batches(reading):
            rows += len(places)
            for name, values in found.items():
                columns.setdefault(name, _ColumnStatistics()).update(values, name in ids)
        return {"rows": rows, "columns": {name: one.to_json() for name, one in columns.items()}}

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        columns: dict[str, _ColumnStatistics] = {}
        first = ""
        for input_split, scan in zip(input_splits, scans, strict=True):
            here = scan["columns"]
            first = first or (input_split.name if here else "")
            if here and columns and here.keys() != columns.keys():
                odd = sorted(here.keys() ^ columns.keys())
                raise ValueError(
                    f"{input_split.name}: other columns than {first}: {first_few(odd)} in one of "
                    "them alone; make them alike, or name the features: --set columns="
                )
            for name, statistics in here.items():
                columns.setdefault(name, _ColumnStatistics()).merge(*statistics)
        row_numbers = self._row_numbers(columns)
        no_features = {*self.copied, self.options.split_column, *row_numbers}
        features = [name for name in columns if name not in no_features]
        number = {
            name: name in self.numeric
            or (name not in self.categorical and columns[name].value_type < ValueType.STRING)
            for name in features
        }
        fields = [
            pa.field(name, pa.float64() if number[name] else pa.string()) for name in features
        ]
        types = {name: columns[name].value_type for name in self.copied}
        if self.label and types[self.label] == ValueType.FLOAT:
            self.label = ""  # a number to estimate has no classes to count
        own = [pa.field(name, of.column_type) for name, of in types.items()]
        info = {
            "label": self.labels,
            "id": self.options.id,
            "group": self.options.group,
            "numeric": [name for name in features if number[name]],
            "categorical": [name for name in features if not number[name]],
        }
        notes = self._notes(columns, number, sum(scan["rows"] for scan in scans))
        if row_numbers:
            notes["row numbers in a first column without a name, left out"] = ", ".join(row_numbers)
        return InferredSchema(
            [pa.field(FEATURES, pa.struct(fields)), *own],
            [(number, types)] * len(input_splits),
            notes,
            info,
        )

    def _row_numbers(self, columns: dict[str, _ColumnStatistics]) -> list[str]:
        """Return the columns that are the index of a table of pandas: whole numbers.

        Those that an option names are features, or what the option says.
        """
        named = {*self.columns, *self.numeric, *self.categorical, *self.copied}
        return [
            name
            for name in ROW_NUMBERS
            if name in columns
            and name not in named
            and columns[name].value_type == ValueType.INTEGER
        ]

    def _notes(
        self,
        columns: dict[str, _ColumnStatistics],
        number: dict[str, bool],
        rows: int,
    ) -> Notes:
        """Return what a user may want to know of the columns: names and counts, no values."""
        features = {name: columns[name] for name in number}
        numeric = {name: column for name, column in features.items() if number[name]}
        texts = {name: column for name, column in features.items() if not number[name]}
        guessed = {name: one for name, one in texts.items() if name not in self.categorical}
        num_not_numeric = {
            name: column.num_not_numeric
            for name, column in numeric.items()
            if column.num_not_numeric
        }
        noted = {
            "columns without a value": [
                name for name, column in features.items() if not column.num_present
            ],
            "columns with one value": [
                name
                for name, column in features.items()
                if column.num_present and len(column.hashes) == 1
            ],
            "whole numbers with few values (if they are codes: --set categorical=)": [
                name
                for name, column in numeric.items()
                if column.value_type == ValueType.INTEGER and 1 < len(column.hashes) <= FEW
            ],
            "categories though most values are numbers (if the others mean none: --set numeric=)": [
                name
                for name, column in guessed.items()
                if 0 < 2 * column.num_not_numeric < column.num_present
            ],
            "categories that look like numbers with a comma (write them with a point alone)": [
                name
                for name, column in guessed.items()
                if column.num_with_comma
                and 2 * (column.num_not_numeric - column.num_with_comma) < column.num_present
            ],
            f"categories with more than {MANY} values (names? --set drop=)": [
                name for name, column in texts.items() if len(column.hashes) > MANY
            ],
        }
        missing = {
            name: rows - column.num_present
            for name, column in features.items()
            if column.num_present < rows
        }
        return {
            "numeric features": len(numeric),
            "categorical features": len(texts),
            **({"values missing": missing} if missing else {}),
            **({"values that are no number, now null": num_not_numeric} if num_not_numeric else {}),
            **{name: first_few(found) for name, found in noted.items() if found},
        }

    def rows(self, reading: SplitReader) -> Iterator[pa.Table]:
        number: dict[str, bool]
        types: dict[str, ValueType]
        number, types = reading.scan_result
        for places, found in self._batches(reading):
            arrays = [
                pa.array([_as_finite_number(value) for value in found[name]], pa.float64())
                if number[name]
                else pa.array([_as_category(value) for value in found[name]], pa.string())
                for name in number
            ]
            made: dict[str, pa.Array] = {FEATURES: pa.StructArray.from_arrays(arrays, list(number))}
            for name, of_column in types.items():
                values = [_convert(value, of_column) for value in found[name]]
                made[name] = pa.array(values, of_column.column_type)
            if self.options.split_column:
                texts = [_as_category(value) or "" for value in found[self.options.split_column]]
                made["split"] = pa.array([SPLITS[text.lower()] for text in texts], pa.string())
            if places:
                yield pa.table(made)


# ---------------------------------------------------------------- columns and values


class _ColumnStatistics:
    """Statistics of a column.

    Attributes:
        value_type: the one that holds all values.
        num_present: number of values that are not missing.
        num_not_numeric: number of values that are no number.
        num_with_comma: number of values that look like numbers with a comma.
        hashes: hashes of its values, as long as they are few.
    """

    def __init__(self):
        self.value_type, self.num_present = ValueType.NULL, 0
        self.num_not_numeric, self.num_with_comma = 0, 0
        self.hashes: set[int] = set()

    def update(self, values: Iterable[Any], are_ids: bool) -> None:
        for value, count in Counter(values).items():
            if value is None or value != value:
                continue
            self.num_present += count
            is_code = are_ids and isinstance(value, str) and not ID_NUMBER.fullmatch(value)
            value_type = ValueType.STRING if is_code else _type_of(value)
            if are_ids and value_type == ValueType.INTEGER:
                value_type = type_of_integer(_convert(value, value_type))
            self.value_type = common_type(self.value_type, value_type)
            self.num_not_numeric += count * (_as_finite_number(value) is None)
            self.num_with_comma += count * bool(COMMA_NUMBER.fullmatch(str(value)))
            if len(self.hashes) <= MANY:
                self.hashes.add(_hash(value))

    def to_json(self) -> tuple[int, int, int, list[int], int]:
        """Return the statistics as JSON can hold them, and as `merge` takes them."""
        numbers = self.value_type, self.num_present, self.num_not_numeric
        return (*numbers, sorted(self.hashes), self.num_with_comma)

    def merge(
        self,
        value_type: int,
        num_present: int,
        num_not_numeric: int,
        hashes: list[int],
        num_with_comma: int = 0,
    ) -> None:
        """Add the statistics of a file. Scans of earlier versions have no numbers with a comma."""
        self.value_type = common_type(self.value_type, value_type)
        self.num_present += num_present
        self.num_not_numeric += num_not_numeric
        self.num_with_comma += num_with_comma
        self.hashes.update(hashes)


def _hash(value: Any) -> int:
    """Hash a value, the same for 1 and "1" and in every process, unlike Python's own."""
    return int.from_bytes(
        hashlib.blake2b(str(_as_category(value)).encode(), digest_size=8).digest(),
        "little",
        signed=True,
    )


def _type_of(value: Any) -> ValueType:
    """Return the type of a value; bools are categories, 1.0 is a whole number."""
    if isinstance(value, str):
        of_field = dialect.type_of_field(value)
        if of_field == ValueType.FLOAT:
            return _type_of(float(value))
        return ValueType.INTEGER if of_field.is_whole else of_field
    if isinstance(value, float):
        is_whole = value.is_integer() and abs(value) < 1 << 53
        return ValueType.INTEGER if is_whole else ValueType.FLOAT
    is_whole = not isinstance(value, bool) and abs(value) < 1 << 63
    return ValueType.INTEGER if is_whole else ValueType.STRING


def _values(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    return (pc.cast(column, pa.float64()) if pa.types.is_decimal(kind) else column).to_pylist()


def _as_finite_number(value: Any) -> float | None:
    """Return the value as a finite number, or None."""
    if value is None or (isinstance(value, str) and not dialect.NUMBER.fullmatch(value)):
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def _as_category(value: Any) -> str | None:
    """Return the value as a category; None where it is missing."""
    if value is None or value != value:
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(value: Any, value_type: ValueType) -> Any:
    """Convert a label, id or group to a type."""
    if value_type == ValueType.STRING:
        return _as_category(value)
    if value is None or value != value:
        return None
    if not value_type.is_whole:
        return float(value)
    is_float = isinstance(value, str) and not dialect.WHOLE.fullmatch(value)
    return int(float(value)) if is_float else int(value)
