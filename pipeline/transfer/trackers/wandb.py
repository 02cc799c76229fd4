"""Weights & Biases."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.config import extras
from pipeline.config.registry import Options, register
from pipeline.core.contracts.tracker import Point, RunDescription, RunStatus, Tracker

EXIT_CODES = {"done": 0, "failed": 1, "pruned": 0, "stopped": 255}
ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_CODE": "true"}
"""Settings of its client, where the user has made none: its own lines would be in the way of the
job's.
"""


class WandbOptions(Options):
    project: str = Field("", description="the project; empty: the name of the job")
    entity: str = Field("", description="user or team; empty: the one that is logged in")
    mode: Literal["online", "offline"] | None = Field(
        None,
        description="offline: runs are kept in a folder (WANDB_DIR, or wandb/ here), which `wandb "
        "sync` sends later; none: as WANDB_MODE says. The key belongs into WANDB_API_KEY",
    )
    bundles: bool = Field(False, description="whether the bundles that are kept are uploaded too")


@register("tracker", "wandb", options=WandbOptions, title="Weights & Biases")
class Wandb(Tracker[WandbOptions]):
    """Weights & Biases: a run for the job, and one for each source and trial in its group (extra
    `wandb`).
    """

    def __init__(self, options: WandbOptions, job: str):
        super().__init__(options, job)
        self._runs: dict[str, Any] = {}
        """Id to the run, for those that have not ended."""

    def check_library(self) -> None:
        if find_spec("wandb") is None:
            raise ValueError(f"wandb is not installed: {extras.install('wandb')}")

    def _init(self, run_id: str, **more: Any) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        made = wandb.init(
            project=self.options.project or self.job,
            entity=self.options.entity or None,
            mode=self.options.mode,
            id=run_id,
            reinit="create_new",
            **more,
        )
        self._runs[run_id] = made
        return made

    def begin(self, run: RunDescription, replaces: str | None = None) -> str:
        """Begin a run. One that it replaces is overwritten, as it has the same id."""
        parts = (run.group, run.key, run.parent or str(run.began))
        run_id = replaces or hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
        self._init(
            run_id,
            name=run.name,
            group=run.group,
            job_type=run.kind,
            config=dict(run.parameters),
        )
        return run_id

    def resume(self, run_id: str) -> bool:
        self._init(run_id, resume="allow")
        return True

    def _running(self, run_id: str) -> Any:
        """Return a run, which may have ended."""
        return self._runs.get(run_id) or self._init(run_id, resume="allow")

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for one in points:
            by_step[one.step][one.name] = one.value
        run = self._running(run_id)
        for step, values in sorted(by_step.items()):
            # steps of the program only grow, and a run may be logged again in part
            run.log({**values, "training_step": step})
        run.summary.update({one.name: one.value for one in points})

    def upload(self, run_id: str, file: Path, folder: str = "") -> None:
        import wandb

        run = self._running(run_id)
        made = wandb.Artifact(f"{run_id}-{folder or file.name}", type=folder or "report")
        made.add_file(str(file), name=file.name)
        run.log_artifact(made).wait() if not run.offline else run.log_artifact(made)

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.summary["status"] = status
            run.finish(exit_code=EXIT_CODES[status])

    def close(self) -> None:
        for run_id in list(self._runs):
            self.end(run_id, "done", 0.0)
