"""Runs in a file of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts.tracker import Point, RunDescription, RunStatus, Tracker


class NotebookOptions(Options):
    file: str = Field("notebook.jsonl", description="where lines are added")


@register("tracker", "notebook", options=NotebookOptions)
class Notebook(Tracker[NotebookOptions]):
    """One line of JSON for each thing that is logged."""

    def check_library(self) -> None:
        """Nothing but Python is needed."""

    def _write(self, run_id: str, **values: Any) -> None:
        with Path(self.options.file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"run": run_id, **values}) + "\n")

    def begin(self, run: RunDescription, replaces: str | None = None) -> str:
        self._write(run.key, name=run.name, kind=run.kind, parameters=dict(run.parameters))
        return run.key

    def exists(self, run_id: str) -> bool:
        return Path(self.options.file).exists()

    def resume(self, run_id: str) -> bool:
        return self.exists(run_id)

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        self._write(run_id, metrics={one.name: one.value for one in points})

    def upload(self, run_id: str, path: Path, folder: str = "") -> None:
        self._write(run_id, file=f"{folder}/{path.name}".removeprefix("/"))

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        self._write(run_id, status=status)
