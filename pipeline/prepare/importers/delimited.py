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
    preview,
)
from pipeline.prepare.engine.inputs import InputSplit, SplitReader
from pipeline.prepare.engine.table_importer import (
    KINDS,
    Found,
    InferredSchema,
    TableImporter,
    wider,
)
from pipeline.prepare.readers.dialect import SUFFIXES, Dialect, field_kind, field_value

NAMES = {"string": 4, "float": 3, "int": 2}
TEXTS = ("text", "text_pair")


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
    """CSV and TSV files (a file, folder, glob or archive, also .gz and .zst), with quotes and line
    ends in quotes, with or without a header.

    Columns: as in the files, or renamed by --set columns="text=review,label=stars". Their types are
    the same over all files: whole numbers (none with leading zeros), other numbers, else text; an
    empty field is null. Invalid rows: another number of fields than the header has, a quote that is
    left open, no text. Rows of a shard are shuffled in a fixed order, since such files are often
    sorted by class. A file is one shard: cut up large ones.
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
                f"--set names={o.names}: names are for files without a header; say --set "
                "header=false too, or rename with --set columns=NEW=OLD"
            )
        self.dialect = Dialect(o.delimiter, o.quote, o.encoding)

    def _named(self, reading: SplitReader) -> Iterator[dict[str, str]]:
        """Yield every row by the new names of its columns."""
        o = self.options
        names = [name.strip() for name in o.names.split(",")] if o.names else []
        rows = self.dialect.rows(reading, o.header, names)
        first = next(rows, None)
        picked = self._picked(first[1], reading.place(first[0])) if first else []
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
        """Return (new name, index of the field) of the columns to keep. Raises ValueError for a
        missing one.
        """
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
                "called; rename that one too, or say --set keep=false"
            )
        if "split" in dict(taken):
            raise ValueError(
                f"{place}: a column is called split, as the one that says which rows are for "
                "training and which for tests; if it is that, say --set split_column=split, else "
                "rename it: --set columns=fold=split"
            )
        return [*taken, ("split", header.index(split))] if split else taken

    def scan(self, reading: SplitReader) -> Found:
        """Return the columns and what their values look like."""
        kinds: dict[str, int] = {}
        rows = 0
        for row in self._named(reading):
            rows += 1
            for name, value in row.items():
                known = kinds.get(name, 0)
                kinds[name] = (
                    known if known == 4 else wider(known, 4 if name in TEXTS else field_kind(value))
                )
        return {"rows": rows, "kinds": kinds}

    def infer_schema(self, input_splits: list[InputSplit], found: list[Found]) -> InferredSchema:
        kinds: dict[str, int] = {}
        for one in found:
            for name, kind in one["kinds"].items():
                kinds[name] = wider(kinds.get(name, 0), kind)
        kinds.pop("split", None)
        for name, kind in self.given_types.items():
            if name not in kinds:
                raise ValueError(
                    f"--set types: no column {name!r}; {registry.nearest(name, kinds)}"
                )
            if kinds[name] > NAMES[kind]:
                raise ValueError(
                    f"--set types={name}={kind}: it holds values that are "
                    f"{'no numbers' if kinds[name] == 4 else 'no whole numbers'}"
                )
            kinds[name] = NAMES[kind]
        missing = {
            name: preview(
                input_split.name
                for input_split, one in zip(input_splits, found, strict=True)
                if one["rows"] and name not in one["kinds"]
            )
            for name in kinds
        }
        columns = [
            pa.field(name, KINDS[kind] if kind else pa.string()) for name, kind in kinds.items()
        ]
        return InferredSchema(
            columns,
            [kinds] * len(input_splits),
            {
                f"files without a column {name}, where it is null": where
                for name, where in missing.items()
                if where
            },
        )

    def rows(self, reading: SplitReader) -> Iterator[Row]:
        kinds: dict[str, int] = reading.scan_result
        for row in self._named(reading):
            made = {
                name: field_value(row[name], kind) if name in row else None
                for name, kind in kinds.items()
            }
            if "split" in row:
                made["split"] = SPLITS[row["split"].strip().lower()]
            yield made


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
