"""Metadata of a prepared folder for others: Croissant (JSON-LD), and a data card for model hubs.

Croissant 1.0 (MLCommons, 2024) says which files there are, with checksums, and what their columns
hold; `mlcroissant` and the search of data sets read it. Neither file names a row of the data or a
place on a disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.core.arrow_lists import is_bytes, is_list, is_text
from pipeline.io.json_values import Json, JsonObject, as_object

FILE, CARD = "_croissant.json", "_card.md"
"""Names of the two files; readers of data pass over names that begin with an underscore."""
CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
TERMS = (
    "citeAs", "column", "dataBiases", "dataCollection", "extract", "field", "fileObject",
    "fileProperty", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5",
    "parentField", "path", "personalSensitiveInformation", "recordSet", "references", "regex",
    "repeated", "replace", "separator", "source", "subField", "transform",
)  # fmt: skip
"""Terms of Croissant's own vocabulary."""
CONTEXT: JsonObject = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
    **{term: f"cr:{term}" for term in TERMS},
}
"""The context that Croissant 1.0 asks for."""
MEDIA = {"image": "sc:ImageObject", "mask": "sc:ImageObject", "audio": "sc:AudioObject"}
"""Columns of encoded files, and what they hold."""
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
"""Sizes of data sets as model hubs name them."""


def describe(
    name: str,
    importer: str,
    rows: Mapping[str, int],
    schema: pa.Schema,
    files: Mapping[str, Mapping[str, Any]],
) -> JsonObject:
    """Return the Croissant metadata of a prepared folder.

    Args:
        name: Of the data set.
        importer: Which prepared it.
        rows: Split to its number of rows.
        schema: Of the Parquet files.
        files: File to its ``sha256`` and ``size``.
    """
    fields = [one for field in schema if (one := _field(field)) is not None]
    left = [field.name for field in schema if _field(field) is None]
    text = f"{_counts(rows)}, prepared by `onetomany prepare {importer}`."
    if left:
        text += f" Columns of the files that are not described here: {', '.join(left)}."
    found: list[Json] = [
        {
            "@type": "cr:FileObject",
            "@id": file,
            "name": file,
            "contentUrl": file,
            "encodingFormat": "application/x-parquet",
            "sha256": entry["sha256"],
            "contentSize": f"{entry['size']} B",
        }
        for file, entry in files.items()
    ]
    # the files themselves for their checksums, and a set of them for the records
    everything: JsonObject = {
        "@type": "cr:FileSet",
        "@id": "parquet-files",
        "name": "parquet-files",
        "encodingFormat": "application/x-parquet",
        "includes": "*.parquet",
    }
    records: JsonObject = {"@type": "cr:RecordSet", "@id": "rows", "name": "rows"}
    return {
        "@context": dict(sorted(CONTEXT.items())),
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": _identifier(name),
        "description": text,
        "distribution": [*found, everything],
        "recordSet": [{**records, "field": list(fields)}],
    }


def _counts(rows: Mapping[str, int]) -> str:
    splits = ", ".join(f"{count} of {split or 'no split'}" for split, count in rows.items())
    return f"{sum(rows.values())} rows ({splits})"


def _identifier(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "data"


def _field(field: pa.Field) -> JsonObject | None:
    """Return the description of a column; None for a kind that Croissant has no word for."""
    kind, repeated = field.type, False
    if is_list(kind):
        kind, repeated = kind.value_type, True
    named = _data_type(field.name, kind)
    if named is None:
        return None
    return {
        "@type": "cr:Field",
        "@id": f"rows/{field.name}",
        "name": field.name,
        "dataType": named,
        "source": {"fileSet": {"@id": "parquet-files"}, "extract": {"column": field.name}},
        **({"repeated": True} if repeated else {}),
    }


def _data_type(name: str, kind: pa.DataType) -> str | None:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "sc:Float"
    if is_text(kind):
        return "sc:Text"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "sc:Date"
    if is_bytes(kind):
        return MEDIA.get(name)
    return None


def card(name: str, importer: str, found: Mapping[str, Any], schema: pa.Schema) -> str:
    """Return the data card, with counts alone.

    Args:
        found: The summary of the folder (`summary.summarise`).
    """
    rows: Mapping[str, int] = found["rows"]
    total = sum(rows.values())
    size = next((words for most, words in SIZES if total < most), "n>10M")
    invalid = as_object(found.get("broken")).get("rows", 0)
    splits = [f"| {split or 'none'} | {count} |" for split, count in rows.items()]
    columns = [f"| `{field.name}` | {field.type} |" for field in schema]
    lines = [
        "---",
        "license: unknown",
        "tags:",
        "- onetomany",
        "size_categories:",
        f"- {size}",
        "---",
        "",
        f"# {name}",
        "",
        f"{_counts(rows)} in Parquet files, prepared by `onetomany prepare {importer}`. Rows of "
        f"the publisher's files that could not be read and are left out: {invalid}.",
        "",
        "| split | rows |",
        "|---|---|",
        *splits,
        "",
        "| column | type |",
        "|---|---|",
        *columns,
        "",
        "The licence is the publisher's: it is not recorded here. Check it, and whether rows tell "
        "of persons, before the files are passed on.",
    ]
    return "\n".join(lines) + "\n"
