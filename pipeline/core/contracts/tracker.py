"""The contract of a tracker: a program that collects runs of experiments (MLflow, ...).

`pipeline.transfer.tracking` decides what is logged and when. A tracker only passes it on. It lives
in the process that drives a job, and one thread calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from pipeline.config.registry import Options

OptionsT = TypeVar("OptionsT", bound=Options)
RunStatus = Literal["done", "failed", "pruned", "stopped"]
"""How a run ended: ``pruned`` by a scheduler or budget, ``stopped`` by its user or an error."""


class Point(NamedTuple):
    """A value of a metric."""

    name: str
    value: float
    step: int
    time: float
    """Seconds since 1970."""


def values_by_step(points: Sequence[Point]) -> dict[int, dict[str, float]]:
    """Return each step's values by their names, in the order of the steps."""
    out: dict[int, dict[str, float]] = {}
    for one in sorted(points, key=lambda point: point.step):
        out.setdefault(one.step, {})[one.name] = one.value
    return out


@dataclass(frozen=True)
class RunDescription:
    """A run that a tracker is to begin: a job, a source that is trained, or a trial."""

    name: str
    key: str
    """Tells it from every other run of its job, in each attempt to log it."""
    kind: Literal["job", "source", "trial"]
    parent: str | None
    """Id of the job's run; None for a job."""
    group: str
    """Name of the job."""
    began: float
    """Seconds since 1970."""
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])


class Tracker(Generic[OptionsT]):
    """Passes runs on to a program that collects them.

    Any method may raise any exception: the job then goes on without a tracker. `log` and `upload`
    are also asked to add to a run that has ended, which they leave as it is otherwise.
    """

    registered_name = ""

    def __init__(self, options: OptionsT, job: str):
        """
        Args:
            job: Name of the job.
        """
        self.options = options
        self.job = job

    def check_library(self) -> None:
        """Check that the program's client is installed. Nothing is connected.

        Raises:
            ValueError: It is not; the message has the command that installs it.
        """
        raise NotImplementedError

    def begin(self, run: RunDescription, replaces: str | None = None) -> str:
        """Begin a run and return its id.

        Args:
            replaces: Id of a run that was to hold the same and was not finished; it is removed.
        """
        raise NotImplementedError

    def exists(self, run_id: str) -> bool:
        """Return whether a run is there: its user may have deleted it."""
        raise NotImplementedError

    def resume(self, run_id: str) -> bool:
        """Go on with a run that may have ended, and return whether it is there."""
        raise NotImplementedError

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        """Add values of metrics, in the order of their steps."""
        raise NotImplementedError

    def upload(self, run_id: str, path: Path, folder: str = "") -> None:
        """Add a file or all files of a folder together, or replace what has the same name.

        Args:
            folder: Where they go among the run's files.
        """
        raise NotImplementedError

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        """End a run.

        Args:
            ended: Seconds since 1970.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Send what is still buffered."""
