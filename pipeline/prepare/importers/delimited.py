"""CSV and TSV with any columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline.config import registry
from pipeline.config.registry import DelimitedOptions, register
from pipeline.prepare.engine.importing import (
    NO_SPLIT,
    SPLITS,
    Row,
    check_columns,
    check_one_split,
    first_few,
)
from pipeline.prepare.engine.inputs import InputSplit, SplitReader
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter
from pipeline.prepare.engine.value_types import ValueType, common_type
from pipeline.prepare.readers.dialect import SUFFIXES, Dialect, type_of_field, value_of_field

NAMES = {"string": ValueType.STRING, "float": ValueType.FLOAT, "int": ValueType.LONG_INTEGER}
TEXTS = ("text", "text_pair")
NO_NUMBERS = "no numbers, or whole numbers beyond 2^53 beside fractions, which float would round"


class CsvOptions(DelimitedOptions):
    columns: str = Field(
        "",
        description="NEW=OLD,... : what columns are to be called, such as "
        "text=review,label=stars; by number (text=5) without a header",
    )
    keep: bool = Field(
        True, description="false: columns that --set columns does not name are dropped"
    )
    header: bool = Field(
        True,
        description="false: the first line is a row; columns are then called by names, or by "
        "their numbers from 0",
    )
    required: str = Field(
        "text",
        description="columns (new names) of which an empty field makes a row broken, those that "
        "the file has",
    )
    types: str = Field(
        "",
        description="NAME=string, float or int,... in the place of what the values look like; "
        "text and text_pair are always texts",
    )


@register("importer", "csv", options=CsvOptions)
class Csv(TableImporter):
    """CSV and TSV files, column by column. (For a table of features take `table`.)

    It reads a file, folder, glob or archive, also .gz and .zst, with or without a header. Quotes,
    and line ends in quotes, are read. A file is one shard: cut up large ones.

    Columns: as in the files, or renamed by `--set columns="text=review,label=stars"`.

    - The type of a column is the same over all files: whole numbers (none with leading zeros),
      other numbers, else text. An empty field is null.
    - Rows are shuffled in a fixed order within their shard, since such files are often sorted by
      class.
    - Invalid rows: another number of fields than the header has, a quote that is left open, no
      text.
    """

    label = "label"
    suffixes = SUFFIXES
    shuffles_rows = True

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        self.mapping = _pairs("columns", o.columns)
        self.given_types = _pairs("types", o.types)
        for name, kind in self.given_types.items():
            if kind not in NAMES:
                raise ValueError(f"--set types={name}={kind}: {registry.nearest(kind, NAMES)}")
        check_one_split(o)
        if o.names and o.header:
            raise ValueError(
                f"--set names={o.names}: names are for files without a header; pass --set "
                "header=false too, or rename with --set columns=NEW=OLD"
            )
        self.dialect = Dialect(o.delimiter, o.quote, o.encoding)

    def _named(self, reading: SplitReader) -> Iterator[dict[str, str]]:
        """Yield every row by the new names of its columns."""
        o = self.options
        names = [name.strip() for name in o.names.split(",")] if o.names else []
        rows = self.dialect.rows(reading, o.header, names)
        first = next(rows, None)
        picked = self._picked(first[1], reading.location(first[0])) if first else []
        required = [*map(str.strip, o.required.split(",")), "split"]
        required = [name for name in required if name in dict(picked)]
        for number, fields in rows:
            row = {name: fields[i] for name, i in picked}
            empty = next((name for name in required if not row[name].strip()), None)
            if empty is not None:
                reading.bad(number, f"no {empty}")
            elif "split" in row and row["split"].strip().lower() not in SPLITS:
                reading.bad(number, NO_SPLIT)
            else:
                yield row

    def _picked(self, header: list[str], place: str) -> list[tuple[str, int]]:
        """Return (new name, field) of columns to keep. Raises ValueError for a missing one."""
        split = self.options.split_column
        renamed = [("columns", old) for old in self.mapping.values()]
        check_columns(place, header, *renamed, ("split_column", split))
        new = {old: name for name, old in self.mapping.items()}
        taken = [
            (new.get(old, old), i)
            for i, old in enumerate(header)
            if old in new or (self.options.keep and old != split)
        ]
        clash = [name for name, _ in taken if [n for n, _ in taken].count(name) > 1]
        if clash:
            raise ValueError(
                f"{place}: --set columns calls a column {clash[0]!r}, as another one is "
                "called; rename that one too, or pass --set keep=false"
            )
        if "split" in dict(taken):
            raise ValueError(
                f"{place}: a column is called split, as the one that says which rows are for "
                "training and which for tests; if it is that, pass --set split_column=split, else "
                "rename it: --set columns=fold=split"
            )
        return [*taken, ("split", header.index(split))] if split else taken

    def scan(self, reading: SplitReader) -> Scan:
        """Return the columns and what their values look like."""
        types: dict[str, int] = {}
        rows = 0
        for row in self._named(reading):
            rows += 1
            for name, value in row.items():
                known = types.get(name, ValueType.NULL)
                if known != ValueType.STRING:
                    own = ValueType.STRING if name in TEXTS else type_of_field(value)
                    types[name] = common_type(known, own)
        return {"rows": rows, "kinds": types}

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        types: dict[str, ValueType] = {}
        for scan in scans:
            for name, value_type in scan["kinds"].items():
                types[name] = common_type(types.get(name, ValueType.NULL), value_type)
        types.pop("split", None)
        for name, given in self.given_types.items():
            if name not in types:
                raise ValueError(
                    f"--set types: no column {name!r}; {registry.nearest(name, types)}"
                )
            _check_given(name, types[name], given)
            types[name] = NAMES[given]
        missing = {
            name: first_few(
                input_split.name
                for input_split, scan in zip(input_splits, scans, strict=True)
                if scan["rows"] and name not in scan["kinds"]
            )
            for name in types
        }
        columns = [pa.field(name, of_column.column_type) for name, of_column in types.items()]
        return InferredSchema(
            columns,
            [types] * len(input_splits),
            {
                f"files without a column {name}, where it is null": where
                for name, where in missing.items()
                if where
            },
        )

    def rows(self, reading: SplitReader) -> Iterator[Row]:
        types: dict[str, int] = reading.scan_result
        for row in self._named(reading):
            values = {
                name: value_of_field(row.get(name, ""), value_type)
                for name, value_type in types.items()
            }
            if "split" in row:
                values["split"] = SPLITS[row["split"].strip().lower()]
            yield values


def _check_given(name: str, found: ValueType, given: str) -> None:
    """Raise ValueError where a type that is given does not hold a column's values."""
    where = f"--set types={name}={given}"
    if NAMES[given] == ValueType.FLOAT and found == ValueType.LONG_INTEGER:
        raise ValueError(
            f"{where}: it holds whole numbers beyond 2^53, which float would round; write int, "
            "or string for names of things"
        )
    if found > NAMES[given]:
        is_string = found == ValueType.STRING
        reason = NO_NUMBERS if is_string else "no whole numbers"
        raise ValueError(f"{where}: it holds values that are {reason}")


def _pairs(option: str, text: str) -> dict[str, str]:
    """Parse NEW=OLD,... Raises ValueError for another form."""
    out = {}
    for pair in text.split(",") if text else ():
        new, equals, old = (part.strip() for part in pair.partition("="))
        is_complete = new and equals and old
        if not is_complete or new in out:
            wrong = f"two columns are called {new}" if new in out else f"{pair!r} is not NAME=VALUE"
            names, types = "text=review,label=stars", "label=string,stars=float"
            example = names if option == "columns" else types
            raise ValueError(f"--set {option}={text}: {wrong}; write {example}")
        out[new] = old
    return out
