"""Trackio."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts.tracker import (
    Point,
    RunDescription,
    RunStatus,
    Tracker,
    values_by_step,
)

INSTALL = "uv pip install 'trackio>=0.43'"
PRINTING = ("trackio", "trackio.run", "trackio.utils")
"""Its modules that print."""


class TrackioOptions(Options):
    project: str = Field("", description="the project; empty: the name of the job")
    space: str = Field(
        "",
        description="a Space of the Hugging Face hub, USER/NAME; empty: as TRACKIO_SPACE_ID or "
        "TRACKIO_SERVER_URL says, else this machine (TRACKIO_DIR), which `trackio show` displays",
    )
    bundles: bool = Field(False, description="whether the bundles that are kept are uploaded too")


@register("tracker", "trackio", options=TrackioOptions)
class Trackio(Tracker[TrackioOptions]):
    """Trackio: a run for the job, and one for each source and trial in its group.

    There is no extra for it: Trackio 0.43 needs Pillow below 13, and this project is tested with
    Pillow 13. Values have the time at which they were sent. Trackio does not raise where a Space or
    server cannot be reached: it warns, and keeps what it could not send on this machine.
    """

    def check_library(self) -> None:
        if find_spec("trackio") is None:
            raise ValueError(f"trackio is not installed: {INSTALL}")

    @property
    def _project(self) -> str:
        return self.options.project or self.job

    @contextmanager
    def _open(self, name: str, resume: str = "must", **more: Any) -> Iterator[Any]:
        """Yield a run, and send what was logged in the block.

        Raises ValueError where it must be there and is not.
        """
        trackio = _client()
        with _without_its_lines():
            run = trackio.init(
                self._project,
                name=name,
                resume=resume,
                space_id=self.options.space or None,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                **more,
            )
            # a run that is opened again would get this call's settings, which are none
            run._config_logged = resume == "must"
            try:
                yield run
            finally:
                trackio.finish()

    def begin(self, run: RunDescription, replaces: str | None = None) -> str:
        """Begin a run. One that it replaces is removed where Trackio keeps it on this machine."""
        if replaces is not None:
            for old in _client().Api().runs(self._project):
                if old.name == replaces:
                    old.delete()
        name = f"{run.name}-{uuid.uuid4().hex[:8]}"  # it finds runs by their names
        with self._open(name, "never", group=run.group, config=dict(run.parameters)) as made:
            made.log({"status": "running"}, step=0)  # a run without a value is not kept
        return name

    def exists(self, run_id: str) -> bool:
        try:
            with self._open(run_id):
                return True
        except ValueError:
            return False

    def resume(self, run_id: str) -> bool:
        return self.exists(run_id)

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        with self._open(run_id) as run:
            for step, values in values_by_step(points).items():
                run.log(values, step=step)

    def upload(self, run_id: str, path: Path, folder: str = "") -> None:
        name = re.sub(r"[^\w.-]", "-", f"{run_id}-{folder or path.name}")
        artifact = _client().Artifact(name, type=folder or "report")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path), name=path.name)
        with self._open(run_id) as run:
            run.log_artifact(artifact)

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        with self._open(run_id) as run:
            run.log({"status": status})

    def close(self) -> None:
        """Nothing is buffered."""


def _client() -> Any:
    return import_module("trackio")


@contextmanager
def _without_its_lines() -> Iterator[None]:
    """Let Trackio print nothing: its lines would stand among those of the job. No option does."""
    modules = [vars(import_module(name)) for name in PRINTING]
    for module in modules:
        module["print"] = _print_nothing
    try:
        yield
    finally:
        for module in modules:
            del module["print"]


def _print_nothing(*_: object, **__: object) -> None:
    """Take the place of ``print``."""
