"""Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.config import extras
from pipeline.config.registry import Options, register
from pipeline.core.contracts.tracker import (
    Point,
    RunDescription,
    RunStatus,
    Tracker,
    values_by_step,
)

EXIT_CODES = {"done": 0, "failed": 1, "pruned": 0, "stopped": 255}
ENVIRONMENT = {
    # its own lines would be in the way of the job's
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    # seconds: a server that is gone must not hold up the end of a run or of the process for ever
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}
"""Settings of its client, where the user has made none."""


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
        if replaces is not None and not self.exists(replaces):
            replaces = None  # the id of a run that was deleted can never be used again
        run_id = replaces or uuid.uuid4().hex[:16]
        self._init(
            run_id,
            name=run.name,
            group=run.group,
            job_type=run.kind,
            config=dict(run.parameters),
        )
        return run_id

    def _reopen(self, run_id: str) -> Any:
        """Go on with a run that has ended. Raises UsageError where it is not there."""
        return self._init(run_id, resume="allow" if self._is_offline() else "must")

    def _is_offline(self) -> bool:
        return (self.options.mode or os.environ.get("WANDB_MODE")) == "offline"

    def exists(self, run_id: str) -> bool:
        from wandb.errors import UsageError

        if self._is_offline():
            return True  # nobody can be asked
        try:
            with self._open(run_id):
                return True
        except UsageError:
            return False

    def resume(self, run_id: str) -> bool:
        from wandb.errors import UsageError

        try:
            self._reopen(run_id)
        except UsageError:
            return False
        return True

    @contextmanager
    def _open(self, run_id: str) -> Iterator[Any]:
        """Yield a run. One that has ended is opened, and ends again with the block."""
        if run_id in self._runs:
            yield self._runs[run_id]
            return
        run = self._reopen(run_id)
        try:
            yield run
        finally:
            del self._runs[run_id]
            run.finish()

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        with self._open(run_id) as run:
            for step, values in values_by_step(points).items():
                # steps of the program only grow, and a run may be logged again in part
                run.log({**values, "training_step": step})
            run.summary.update({one.name: one.value for one in points})

    def upload(self, run_id: str, path: Path, folder: str = "") -> None:
        import wandb

        made = wandb.Artifact(f"{run_id}-{folder or path.name}", type=folder or "report")
        if path.is_dir():
            made.add_dir(str(path))
        else:
            made.add_file(str(path), name=path.name)
        with self._open(run_id) as run:
            sent = run.log_artifact(made)
            if not run.offline:
                sent.wait()

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.summary["status"] = status
            run.finish(exit_code=EXIT_CODES[status])

    def close(self) -> None:
        for run_id in list(self._runs):
            self.end(run_id, "done", 0.0)
