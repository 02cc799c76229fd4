"""The report of some results, as tests of its parts read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.io import storage
from pipeline.report import matrix, report
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions


def report_texts(
    folder: Path, rows: list[ResultRow], runs: dict[str, RunPredictions], **more: Any
) -> tuple[str, str]:
    """Write the report of a job with these results, and return its Markdown and its HTML.

    Args:
        more: Further fields of `report.ReportInputs`.
    """
    fields = {"curves": {}, "pretraining": (), "splits": {}, "notes": (), "versions": {}, **more}
    if "entries" not in fields:
        fields["entries"] = matrix.matrix_entries(rows, runs)
    inputs = report.ReportInputs(**{"job_name": "j", "rows": rows, "runs": runs, **fields})
    markdown, html = report.write(str(folder), inputs)
    return storage.read_bytes(markdown).decode(), storage.read_bytes(html).decode()
