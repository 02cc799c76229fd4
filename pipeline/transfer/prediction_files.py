"""Files of predictions and features: Parquet, CSV or JSON Lines, and subtitles beside them.

Names of other files and folders beside them begin with ``_``, which pyarrow, pandas and Spark skip,
so that the folder opens as one data set.
"""

from __future__ import annotations

import base64
import io
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import OutputFormat
from pipeline.core.arrow_lists import is_list, is_text
from pipeline.io import csv_rows, storage
from pipeline.media import transcripts
from pipeline.media.tagging_schemes import texts

CLASSES = "classes"
"""Key of the Parquet files' metadata with the names of the classes, JSON."""
PROBABILITIES = "probabilities"
SUBTITLES, DRAWN = "_subtitles", "_drawn"
"""Folders for subtitles and for pictures on which predictions are drawn."""


def encode(table: pa.Table, format: OutputFormat, classes: list[str] | None = None) -> bytes:
    """Return the bytes of a file with the rows of a table.

    In CSV a null is an empty cell, and a list or struct is JSON. In CSV and JSON Lines a number
    that is not finite is null, and so is a list of such numbers alone; bytes are base64, times are
    ISO 8601, decimals are texts, and ``probabilities`` is an object, class name to probability.

    Args:
        classes: Names of the classes that ``probabilities`` are of, in their order.
    """
    sink = io.BytesIO()
    if format == "parquet":
        if classes:
            names = json.dumps(classes, ensure_ascii=False)
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), CLASSES: names})
        pq.write_table(table, sink)
        return sink.getvalue()
    columns = {
        name: [json_value(value, column.type) for value in _values(column)]
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    if classes and PROBABILITIES in columns:
        columns[PROBABILITIES] = [_named(values, classes) for values in columns[PROBABILITIES]]
    rows = zip(*columns.values(), strict=True)
    with io.TextIOWrapper(sink, encoding="utf-8", newline="", write_through=True) as text:
        if format == "jsonl":
            for row in rows:
                text.write(_json(dict(zip(columns, row, strict=True))) + "\n")
        else:
            csv_rows.write(text, [columns, *([_cell(value) for value in row] for row in rows)])
        return sink.getvalue()


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; bytes of a text that are not UTF-8 become U+FFFD."""
    return texts(column) if is_text(column.type) else column.to_pylist()


def json_value(value: Any, kind: Any) -> Any:
    """Return a value of an Arrow column of type ``kind`` as JSON has it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        # the shortest number with the same value in single precision: 0.1, not 0.10000000149
        return float(str(np.float32(value))) if pa.types.is_float32(kind) else value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if pa.types.is_struct(kind):
        return {field.name: json_value(value[field.name], field.type) for field in kind}
    if is_list(kind):
        items = [json_value(item, kind.value_type) for item in value]
        are_unknown = all(item is None for item in items)
        is_of_floats = pa.types.is_floating(kind.value_type)
        return None if items and is_of_floats and are_unknown else items
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _named(values: Any, classes: list[str]) -> Any:
    """Return a dict from class name to probability; other values stay as they are."""
    if not isinstance(values, list) or len(values) != len(classes):
        return values
    if any(isinstance(value, list) for value in values):
        return values
    return dict(zip(classes, values, strict=True))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


Row = dict[str, Any]
"""Column to value."""


def read(uri: str, columns: tuple[str, ...]) -> list[Row]:
    """Return some columns of a file of `encode`, those that it has.

    Of CSV, values other than texts are as JSON writes them.
    """
    if uri.endswith(".parquet"):
        with storage.open_read(uri) as handle:
            file = pq.ParquetFile(handle)
            present = [name for name in columns if name in file.schema_arrow.names]
            return file.read(present).to_pylist()
    text = storage.read_bytes(uri).decode()
    if uri.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.split("\n") if line]
    else:
        rows = csv_rows.read(text)
    return [{name: row[name] for name in columns if name in row} for row in rows]


def write_subtitles(output: str, parts: list[str]) -> int:
    """Write one .srt file for each recording into the folder of subtitles; return their number.

    The rows of a recording are held in memory until its last one is read.
    """

    def name(row: Row) -> str:
        return row.get("recording") or f"row-{int(row['row']):06d}"

    def begin(row: Row) -> float:
        start = row.get("start")
        seconds = 0.0 if start in (None, "") else float(start)
        return 0.0 if math.isnan(seconds) else seconds

    def words(row: Row) -> list[Row]:
        stored = row["words"] or []
        return json.loads(stored) if isinstance(stored, str) else stored

    last_part = {
        name(row): number
        for number, part in enumerate(parts)
        for row in read(part, ("row", "recording"))
    }
    files = transcripts.file_names(last_part, ".srt")
    rows_of: dict[str, list[Row]] = {}
    for number, part in enumerate(parts):
        for row in read(part, ("row", "recording", "start", "words")):
            rows_of.setdefault(name(row), []).append(row)
        for recording in [one for one in rows_of if last_part[one] == number]:
            rows = sorted(rows_of.pop(recording), key=begin)
            cues = transcripts.cues(word for row in rows for word in words(row))
            uri = storage.join(output, SUBTITLES, *files[recording].split("/"))
            storage.write_bytes(uri, transcripts.srt(cues).encode())
    return len(files)
