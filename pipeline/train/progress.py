"""Progress of a stage: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.train.log import LogRecord

PLAIN_EVERY_SECONDS = 5.0
PLAIN_ETA_SECONDS = 30.0
"""Seconds between plain lines that differ in their ETA only."""


def duration(seconds: float) -> str:
    """A duration as ``7s``, ``3m05s`` or ``2h10m``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def training_line(name: str, record: LogRecord) -> str:
    """Return a progress line: step, loss, metrics, throughput, share of time spent waiting for
    data, ETA.
    """
    parts = [f"{name}: step {record['step']}/{record['steps']}"]
    for key, value in record.items():
        is_validation = key.startswith("validation_") and key != "validation_loss"
        if is_validation or key in ("loss", "accuracy", "probe_knn"):
            parts.append(f"{key.replace('validation_', 'val ')} {value:.4g}")
    validated = record.get("validated_step", record["step"])
    if validated != record["step"]:
        parts.append(f"(val of step {validated})")
    if "rows_per_second" in record:
        rate = record.get("units_per_second", record["rows_per_second"])
        parts.append(f"{rate:.0f} {record.get('unit', 'rows')}/s")
    if "wait_share" in record:
        parts.append(f"data wait {record['wait_share']:.0%}")
    if "eta_seconds" in record and "stopped" not in record:
        parts.append(f"ETA {duration(record['eta_seconds'])}")
    if skipped := record.get("skipped_steps"):
        parts.append(f"{skipped} steps skipped (not finite)")
    if "stopped" in record:
        parts.append(f"stopped: {record['stopped']}")
    return "  ".join(parts)


class Progress:
    """Shows the newest line, and prints notes, which stay. Both begin with the time of day.

    Args:
        console: Where lines go.
        clock: Returns seconds, which decide when a plain line is due.
        now: Returns the time of day, as ``time.localtime`` does.
    """

    def __init__(self, console: Console | None = None, clock=time.monotonic, now=time.localtime):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.clock, self.now, self._last, self._shown = clock, now, float("-inf"), ""
        self.newest = ""
        """The newest line of `update`."""
        self.trials: Mapping[str, Any] = {}
        """Trials of the run so far, by id (`add_trials`)."""
        self.outdated: Mapping[str, str | None] = {}
        """Ids of trials that are made again, to the run that wrote the old record."""
        self.on_end: Callable[[Sequence[Any]], None] = lambda ended: None
        """Called with sources and trials that have ended, or were done before."""
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc):
        if self._live:
            self._live.stop()

    def _timed(self, line: str) -> str:
        return f"{time.strftime('%H:%M:%S', self.now())} {line}"

    def add_trials(
        self, trials: Iterable[Any], outdated: Mapping[str, str | None] | None = None
    ) -> None:
        """Add trials that the run works on from now on, or that were done before.

        Args:
            outdated: Ids of trials that are made again, to the run that wrote the old record.
        """
        # new dicts: another thread may be reading the old ones
        self.outdated = {**self.outdated, **(outdated or {})}
        self.trials = {**self.trials, **{trial.id: trial for trial in trials}}

    def update(self, line: str, final: bool = False) -> None:
        """Show a line in place of the one before.

        Without a terminal a line is printed when one is due, and not twice in a row.

        Args:
            final: Whether the line is the last of its kind, which is shown in any case.
        """
        self.newest = line
        if self._live:
            self._live.update(Text(self._timed(line)))
            return
        only_eta_changed = line.partition("  ETA ")[0] == self._shown.partition("  ETA ")[0]
        wait = PLAIN_ETA_SECONDS if only_eta_changed else PLAIN_EVERY_SECONDS
        if line != self._shown and (final or self.clock() - self._last >= wait):
            self._last, self._shown = self.clock(), line
            self.console.print(self._timed(line), markup=False)

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(self._timed(line), markup=False)
