"""When each process that runs trials was last heard of.

It is an actor of Ray, whose process imports this module: nothing here may import torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class _Process:
    """A process that runs a unit."""

    actor: bytes
    """Its handle as an actor of Ray, pickled."""
    unit: int
    began: float
    """When it began, in seconds of `time.monotonic`."""
    heard: float
    """When it last sent a heartbeat, in seconds of `time.monotonic`."""


class Pulses:
    """When each process that runs trials last sent a heartbeat, by the clock of this process."""

    def __init__(self):
        self.running: dict[str, _Process] = {}

    def begin(self, actor_id: str, actor: bytes, unit: int, waits_for_ranks: bool = False) -> None:
        """Note that a process begins a unit.

        Args:
            actor_id: Id of the process's actor, which its heartbeats carry.
            actor: The handle of that actor, pickled.
            unit: Index of the unit.
            waits_for_ranks: Count silence and time from the first heartbeat, which each rank sends
                before anything else: a growing cluster may take long to place the ranks.
        """
        now = float("inf") if waits_for_ranks else time.monotonic()
        self.running[actor_id] = _Process(actor, unit, now, now)

    def beat(self, actor_id: str, unit: int) -> None:
        process = self.running.get(actor_id)
        if process is not None and process.unit == unit:
            process.heard = time.monotonic()
            process.began = min(process.began, process.heard)

    def end(self, unit: int) -> None:
        self.running = {
            actor: process for actor, process in self.running.items() if process.unit != unit
        }

    def overdue(
        self, silence: float | None, limits: dict[int, float]
    ) -> list[tuple[int, bytes, str]]:
        """List the processes that are silent or over their time limit, each of them once.

        Args:
            silence: Seconds without a heartbeat; None: any number.
            limits: Seconds that a unit may take, where it has a limit.

        Returns:
            Unit, pickled actor, and "silence" or "time".
        """
        now, out = time.monotonic(), []
        for actor_id, process in list(self.running.items()):
            late = now - process.began > limits.get(process.unit, float("inf"))
            silent = silence is not None and now - process.heard > silence
            if late or silent:
                out.append((process.unit, process.actor, "time" if late else "silence"))
                del self.running[actor_id]
        return out
