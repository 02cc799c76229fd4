"""Summary of a finished preparation: sizes, classes, exact duplicates and invalid files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.arrow_compute import pc
from pipeline.io import storage
from pipeline.prepare.engine.importing import InvalidRow
from pipeline.prepare.engine.row_groups import by_split

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SHARES = [f"{share} %" for share in PERCENTILES]
EXAMPLES = 20
"""The Markdown names so many of each kind; the JSON has all invalid files."""
DARK_IMAGES = "16-bit images without a level above 16383, written with 8 bits"
"""Name of the count of such images, by split."""


def summarise(
    output: str,
    parts: list[str],
    label: str,
    measures: tuple[str, ...],
    invalid: list[InvalidRow],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Count rows and classes of each split, and invalid rows by reason.

    If the columns to measure are there: also sizes of images, hours and speakers of recordings, and
    files with equal bytes within and across splits.
    """
    tables = []
    for name in parts:
        with storage.open_read(storage.join(output, name)) as handle:
            file = pq.ParquetFile(handle)
            wanted = dict.fromkeys(("split", "path", *measures, label))
            columns = [name for name in wanted if name in file.schema_arrow.names]
            tables.append(file.read(columns=columns))
    rows = pa.concat_tables(tables).combine_chunks()
    return {
        "rows": dict(sorted(Counter(rows["split"].to_pylist()).items())),
        "classes": _classes(rows, label),
        "sizes": _sizes(rows, measures),
        "duplicates": duplicates(rows, "transcript" if "transcript" in measures else label)
        if "sha256" in measures
        else {},
        **(
            {"recordings": _recordings(rows), "speakers": _speakers(rows)}
            if "seconds" in measures
            else {}
        ),
        "broken": {
            "rows": len(invalid),
            "reasons": dict(Counter(row["reason"] for row in invalid).most_common()),
            "files": invalid,
        },
        "notes": notes,
    }


def _classes(rows: pa.Table, label: str) -> dict[str, Any]:
    """Count the labels of each split; for columns of lists also the rows without any."""
    if label not in rows.column_names:
        return {}
    listed = pa.types.is_list(rows.schema.field(label).type)
    out: dict[str, Any] = {}
    for split, here in by_split(rows).items():
        column = here[label].combine_chunks()
        values = column.flatten() if listed else column
        counts = {count["values"]: count["counts"] for count in values.value_counts().to_pylist()}
        out[split] = {
            "labels": {
                str(value): counts[value] for value in sorted(counts, key=lambda v: (v is None, v))
            }
        }
        if listed:
            out[split]["rows_without"] = int(
                pc.sum(pc.equal(pc.list_value_length(column), 0)).as_py() or 0
            )
    return out


def _sizes(rows: pa.Table, measures: tuple[str, ...]) -> dict[str, Any]:
    """Percentiles of the written images' sizes in pixels."""
    if not len(rows) or "width" not in measures:
        return {}
    width, height = (rows[name].to_numpy() for name in ("width", "height"))
    measured = {
        "width": width,
        "height": height,
        "shorter_side": np.minimum(width, height),
        "megapixels": width * height / 1e6,
    }
    return {name: _percentiles(values) for name, values in measured.items()}


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {
        str(percentile): round(float(value), 3)
        for percentile, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }


def _recordings(rows: pa.Table) -> dict[str, Any]:
    """Return hours, percentiles of seconds, and rows a speaker (least, most) of each split."""
    out: dict[str, Any] = {}
    for split, here in by_split(rows).items():
        seconds = here["seconds"].to_numpy()
        out[split] = {
            "hours": round(float(seconds.sum()) / 3600, 4),
            "seconds": _percentiles(seconds),
        }
        if "speaker" in rows.column_names:
            each = [
                count
                for name, count in Counter(here["speaker"].to_pylist()).items()
                if name is not None
            ]
            out[split] |= {
                "speakers": len(each),
                "rows_a_speaker": [min(each, default=0), max(each, default=0)],
            }
    return out


def _speakers(rows: pa.Table) -> dict[str, Any]:
    """Count rows of each speaker by split, and the speakers that two splits share."""
    if "speaker" not in rows.column_names:
        return {}
    pairs = Counter(zip(rows["speaker"].to_pylist(), rows["split"].to_pylist(), strict=True))
    splits: dict[str, dict[str, int]] = {}
    for (speaker, split), count in sorted(
        (pair, count) for pair, count in pairs.items() if pair[0] is not None
    ):
        splits.setdefault(speaker, {})[split] = count
    across: Counter[str] = Counter(
        " and ".join(pair) for found in splits.values() for pair in combinations(sorted(found), 2)
    )
    both = [speaker for speaker, found in splits.items() if len(found) > 1]
    return {
        "rows": splits,
        "in_two_splits": {
            "speakers": len(both),
            "across": dict(across),
            "examples": both[:EXAMPLES],
        },
    }


def warnings(summary: dict[str, Any]) -> list[str]:
    """Return what is also shown at the end of the run."""
    out: list[str] = []
    if dark := summary["notes"].get(DARK_IMAGES):
        out.append(
            f"{DARK_IMAGES}: {_format_counts(dark)}; they are nearly black now, and their fine "
            "differences are lost: multiply their levels (12 bits by 16), or write them with 8 "
            "bits, before --resize or --quality"
        )
    two = summary.get("speakers", {}).get("in_two_splits", {})
    if two.get("speakers"):
        out.append(
            f"{two['speakers']} speakers stand in two splits ({_format_counts(two['across'])}); "
            "a job without split_column that says group: speaker cuts splits of its own"
        )
    return out


def duplicates(rows: pa.Table, label: str) -> dict[str, Any]:
    """Count rows with equal files: within splits, across them, and with different labels."""
    counts = pc.value_counts(rows["sha256"].combine_chunks())
    doubled = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    same: dict[str, list[dict[str, Any]]] = {}
    for row in rows.filter(pc.is_in(rows["sha256"], value_set=doubled)).to_pylist():
        same.setdefault(row["sha256"], []).append(row)
    groups = [
        sorted(group, key=lambda row: (row["split"], row["path"]))
        for _, group in sorted(same.items())
    ]
    within, across = Counter[str](), Counter[str]()
    for group in groups:
        splits = Counter(row["split"] for row in group)
        within.update(split for split, count in splits.items() if count > 1)
        across.update(" and ".join(pair) for pair in combinations(sorted(splits), 2))
    labels = [{str(row.get(label)) for row in group} for group in groups]
    return {
        "files": len(groups),
        "rows_beyond_the_first": sum(len(group) - 1 for group in groups),
        "within": dict(within),
        "across": dict(across),
        "with_different_labels": sum(len(of_group) > 1 for of_group in labels),
        "examples": [
            [f"{row['split']}: {row['path']}" for row in group] for group in groups[:EXAMPLES]
        ],
    }


def markdown(title: str, summary: dict[str, Any], noun: str = "files") -> str:
    """Format the summary for people; `noun`: what invalid rows are called."""
    out = [f"# {title}", *_table(["split", "rows"], summary["rows"].items())]
    if summary["sizes"]:
        out += _table(
            ["size", *SHARES],
            (
                [name.replace("_", " "), *(f"{value:g}" for value in values.values())]
                for name, values in summary["sizes"].items()
            ),
        )
    out += _recording_table(summary["recordings"]) if "recordings" in summary else []
    out += ["", *(f"Warning: {line}." for line in lines)] if (lines := warnings(summary)) else []
    out += _class_table(summary["classes"])
    out += _duplicate_lines(summary["duplicates"]) if summary["duplicates"] else []
    out += ["", f"Broken {noun}, left out: {summary['broken']['rows']}."]
    out += [
        f"- {row['split']}: {row['path']}: {row['reason']}"
        for row in summary["broken"]["files"][:EXAMPLES]
    ]
    if summary["notes"]:
        out += [
            "",
            *(
                f"- {name}: {_format_counts(value) if isinstance(value, dict) else value}"
                for name, value in summary["notes"].items()
            ),
        ]
    return "\n".join(out) + "\n"


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table, after a blank one."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return ["", lines[0], "|---" * len(header) + "|", *lines[1:]]


def _recording_table(recordings: dict[str, Any]) -> list[str]:
    with_speakers = any("speakers" in of_split for of_split in recordings.values())
    rows = []
    for split, of_split in recordings.items():
        seconds = [f"{value:g} s" for value in of_split["seconds"].values()]
        rows.append([split, f"{of_split['hours']:g}", *seconds])
        if with_speakers:
            rows[-1] += [of_split["speakers"], "{} to {}".format(*of_split["rows_a_speaker"])]
    speakers = ["speakers", "rows a speaker"] if with_speakers else []
    return _table(["split", "hours", *SHARES, *speakers], rows)


def _duplicate_lines(same: dict[str, Any]) -> list[str]:
    out = [
        "",
        f"Exact duplicates: {same['files']} files stand more than once "
        f"({same['rows_beyond_the_first']} rows beyond the first); within splits: "
        f"{_format_counts(same['within'])}; across splits: {_format_counts(same['across'])}; with "
        f"different labels: {same['with_different_labels']}.",
    ]
    return out + [f"- {' = '.join(group)}" for group in same["examples"]]


def _class_table(classes: dict[str, Any]) -> list[str]:
    labels = list(dict.fromkeys(label for split in classes.values() for label in split["labels"]))
    if not labels:
        return []
    counts = [[found["labels"].get(label, 0) for label in labels] for found in classes.values()]
    if len(labels) > 100:  # a thousand lines are no summary: the JSON has them
        return [
            "",
            *(
                f"{split}: {len(labels)} labels, {min(n)} to {max(n)} times each (see "
                "_summary.json)."
                for split, n in zip(classes, counts, strict=True)
            ),
        ]
    rows = list(zip(labels, *counts, strict=True))
    without = [found["rows_without"] for found in classes.values() if "rows_without" in found]
    if without:
        rows.append(("(no label)", *without))
    return _table(["label", *classes], rows)


def _format_counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"
